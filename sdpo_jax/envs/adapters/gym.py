"""Plays worlds with Gymnasium's interface whose observations and actions are texts.

A world is any class, or function that makes one, with

  reset(seed=...) -> (observation, info)
  step(text) -> (observation, reward, terminated, truncated, info)

and perhaps `close()`. Gymnasium itself is not needed, unless the world imports it. A task is a
seed. A message of the policy is handed on as it is. The reward of an episode is the sum of those of
its steps.
"""

import functools

from sdpo_jax.envs.adapters.foreign import Rewards, opening, read_arguments, seed_task
from sdpo_jax.envs.imports import imported
from sdpo_jax.records import Task, Turn


class GymText:
  """Makes a world for each episode.

  world: "module.path:name" of what makes it. `gymnasium:make` takes a registered one by its id.
  arguments: of the call, as JSON.
  instruction: stands before the first observation.
  reward_range: (lowest, highest) sum of the rewards of an episode.
  """

  def __init__(
    self,
    *,
    world: str,
    arguments: str = "",
    instruction: str = "",
    reward_range: tuple[float, float] = (0.0, 1.0),
  ):
    make = imported("config.env.world", world)
    self._make = functools.partial(make, **read_arguments(arguments))
    self._name, self._instruction = world, instruction
    self._rewards = Rewards(reward_range)

  def task(self, split: str, index: int) -> Task:
    """Returns a seed as a task. ValueError for a split that does not exist."""
    return seed_task(self._name, self._instruction, split, index)

  def start(self, task: Task) -> "GymEpisode":
    """Makes the world of an episode."""
    return GymEpisode(self._make(), task.data["seed"], self._instruction, self._rewards)


class GymEpisode:
  """One episode, with a world of its own."""

  def __init__(self, world, seed: int, instruction: str, rewards: Rewards):
    self._world, self._seed, self._instruction = world, seed, instruction
    self._rewards, self._return = rewards, 0.0

  def prompt(self) -> list[dict[str, str]]:
    """Begins the episode. ValueError for an observation that is no text."""
    seen, _ = self._world.reset(seed=self._seed)
    if not isinstance(seen, str):
      raise ValueError(f"the world showed a {type(seen).__name__}, not a str: wrap it into text")
    return opening(self._instruction, seen)

  def step(self, message: str) -> Turn:
    """Hands the message on."""
    seen, reward, terminated, truncated, _ = self._world.step(message)
    self._return += float(reward)
    return Turn(seen, self._rewards.mapped(self._return), bool(terminated or truncated))

  def close(self) -> None:
    """Closes the world, if it can be closed."""
    if hasattr(self._world, "close"):
      self._world.close()
