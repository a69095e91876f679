"""Plays classes that were written for TRL's `environment_factory`, unchanged.

Such a class has `reset(**row)`, whose text is added to the row's `prompt`; tools, which are its
other public methods; and `get_reward()`, or a reward function beside it with TRL's signature, which
reads `environments`. Rows come from config.data.sources and hold `prompt`, a text or messages, and
whatever `reset` reads.

As in TRL a turn without a call ends the episode, what a tool raises is told to the policy, and a
row's columns go to `reset` and to the reward function. `tool_calls.py` says how tools are called.
Unlike there, the reward is read after each turn, as any may be the last one.
"""

import inspect

from sdpo_jax.envs.adapters.foreign import Loop, Rewards
from sdpo_jax.envs.adapters.tool_calls import calls_in, described, signatures, tools_of
from sdpo_jax.envs.imports import imported
from sdpo_jax.envs.rows import field, groups, row_name
from sdpo_jax.errors import SettingError
from sdpo_jax.records import Task, Turn


class TRLTools:
  """Makes an environment for each episode.

  world: "module.path:name" of the class, or of a function that makes an object of it.
  reward: "module.path:name" of a reward function; empty: `get_reward` of the class.
  reward_range: (lowest, highest) reward.
  """

  def __init__(
    self, *, world: str, reward: str = "", reward_range: tuple[float, float] = (0.0, 1.0)
  ):
    self._make = imported("config.env.world", world)
    self._function = imported("config.env.reward", reward) if reward else None
    if isinstance(self._make, type) and not reward and not hasattr(self._make, "get_reward"):
      raise SettingError(f"{world} has no get_reward: set config.env.reward to a reward function")
    self._rewards, self._loop = Rewards(reward_range), Loop()

  def task_from_row(self, row: dict, split: str) -> Task:
    """Reads a row. ValueError that names the field."""
    prompt = field(row, "prompt", (str, list))
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    data = {"row": row} | groups(row, kind="environment")
    return Task(f"trl/{split}/{row_name(row, 'id')}", text, split=split, data=data)

  def start(self, task: Task) -> "TRLEpisode":
    """Makes the environment of an episode."""
    return TRLEpisode(self._make(), task.data["row"], self.reward, self._loop)

  def reward(self, world, row: dict, prompt: list, completion: list) -> float:
    """Returns the reward of an episode so far, in [0, 1]."""
    if self._function is None:
      return self._rewards.mapped(self._loop.wait(world.get_reward()))
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    given = {"prompts": [prompt], "completions": [completion], "environments": [world]}
    return self._rewards.mapped(self._loop.wait(self._function(**given, **columns))[0])

  def close(self) -> None:
    """Ends the loop in which asynchronous tools run."""
    self._loop.close()


class TRLEpisode:
  """One episode, with an environment of its own."""

  def __init__(self, world, row: dict, reward, loop: Loop):
    self._world, self._row, self._reward, self._loop = world, row, reward, loop
    self._prompt: list[dict] = []
    self._completion: list[dict] = []
    self._tools = tools_of(world, "reset", "get_reward")

  def prompt(self) -> list[dict[str, str]]:
    """Resets the environment, and shows the tools before the row's last message."""
    parameters = inspect.signature(self._world.reset).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {name: value for name, value in self._row.items() if takes_all or name in parameters}
    seen = self._world.reset(**known)
    prompt = self._row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    *before, last = messages
    content = f"{described(signatures(self._tools))}\n\n{last['content']}{seen or ''}"
    self._prompt = [*before, last | {"content": content}]
    return self._prompt

  def step(self, message: str) -> Turn:
    """Makes the calls in a message, one after the other."""
    self._completion.append({"role": "assistant", "content": message})
    results = [self._call(name, arguments) for name, arguments in calls_in(message)]
    reward = self._reward(self._world, self._row, self._prompt, self._completion)
    if not results:
      return Turn("No tool was called, which ends the episode.", reward, True)
    observation = "\n".join(text for text, _ in results)
    return Turn(observation, reward, False, all(is_right for _, is_right in results))

  def close(self) -> None:
    """Ends the episode; TRL's classes have nothing to close."""

  def _call(self, name: str, arguments: dict) -> tuple[str, bool]:
    """Returns what a tool says, and False where it has raised."""
    try:
      if name not in self._tools:
        raise ValueError(f"Tool {name} not found.")
      result, is_right = str(self._loop.wait(self._tools[name](**arguments))), True
    except Exception as error:  # TRL's classes tell the policy so that an action is not allowed
      result, is_right = str({"error": str(error)}), False
    self._completion.append({"role": "tool", "name": name, "content": result})
    return result, is_right
