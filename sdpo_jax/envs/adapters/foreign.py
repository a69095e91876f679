"""What the adapters share: settings, seeds of tasks, rewards in [0, 1]."""

import asyncio
import inspect
import json
import math
import threading

from sdpo_jax.errors import SettingError, unknown
from sdpo_jax.records import Task

SPLITS = ("train", "tune", "heldout")
SEEDS = 1 << 28  # of a split; the splits' ranges lie one behind the other


def read_arguments(text: str) -> dict:
  """Reads config.env.arguments: keyword arguments as JSON, "" for none. SettingError if not."""
  try:
    arguments = json.loads(text or "{}")
  except ValueError:
    arguments = None
  if not isinstance(arguments, dict):
    raise SettingError(f'config.env.arguments={text!r} must be a JSON object: {{"name": value}}')
  return arguments


def seed_of(split: str, index: int) -> int:
  """Returns the seed of a task; no other task of any split has it. ValueError for no split."""
  if split not in SPLITS:
    raise ValueError(unknown("the split", split, SPLITS))
  if not 0 <= index < SEEDS:
    raise ValueError(f"a split has the tasks 0 to {SEEDS - 1}, and no task {index}")
  return SPLITS.index(split) * SEEDS + index


def seed_task(world: str, instruction: str, split: str, index: int) -> Task:
  """Returns a seed as a task, of a world that says itself what to do."""
  seed = seed_of(split, index)
  prompt = f"{instruction or world} (seed {seed})"
  return Task(f"{world}/{split}/{index}", prompt, split=split, data={"seed": seed})


def opening(instruction: str, seen: str) -> list[dict[str, str]]:
  """Returns the first message: the instruction, if there is one, and the first observation."""
  return [{"role": "user", "content": f"{instruction}\n\n{seen}" if instruction else seen}]


class Rewards:
  """Maps what a foreign world counts to [0, 1].

  reward_range: (lowest, highest) return of an episode, so far and at its end.
  """

  def __init__(self, reward_range: tuple[float, float]):
    is_range = len(reward_range) == 2 and all(map(math.isfinite, reward_range))
    if not is_range or not reward_range[0] < reward_range[1]:
      raise SettingError(
        f"config.env.reward_range={reward_range!r} must be (lowest, highest), both finite"
      )
    self._low, self._high = map(float, reward_range)

  def mapped(self, reward) -> float:
    """Returns the reward in [0, 1]. ValueError for one outside of the range, and for no number."""
    value, width = float(reward), self._high - self._low
    share = (value - self._low) / width
    if not -1e-6 <= share <= 1 + 1e-6:  # sums of rewards are rounded
      raise ValueError(
        f"the reward {value:g} lies outside config.env.reward_range=({self._low:g}, "
        f"{self._high:g}): set it to the lowest and the highest return that an episode can have"
      )
    return min(1.0, max(0.0, share))


class Loop:
  """Runs coroutines of all threads in one event loop, which a world may count on."""

  def __init__(self):
    self._loop = asyncio.new_event_loop()
    threading.Thread(target=self._loop.run_forever, name="foreign loop", daemon=True).start()

  def run(self, coroutine):
    """Returns what a coroutine returns; it may be called from any thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

  def wait(self, value):
    """Returns a value, or what it comes to where it has to be awaited."""
    return self.run(_awaited(value)) if inspect.isawaitable(value) else value

  def close(self) -> None:
    """Ends the loop; nothing may run in it any more."""
    self._loop.call_soon_threadsafe(self._loop.stop)


async def _awaited(value):
  return await value
