"""Streams of tasks on grain: which question comes next, and where the stream stands.

A generated task set (TinyCode) is indexed by integers; its stream is `range -> task`, sharded by process, and its position is
grain's own iterator state, saved with the checkpoint: a resumed run sees the same questions.
"""

import grain

from sdpo_jax.records import Task


class TaskStream:
  """Endless stream of a generated environment's training tasks. `state` is JSON-able; `restore` continues exactly."""

  def __init__(self, env, split: str, *, process_index: int = 0, process_count: int = 1):
    indices = grain.MapDataset.range(process_index, 2**31 - 1, process_count)
    dataset = indices.map(lambda i: env.task(split, int(i)))
    self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

  def take(self, n: int) -> list[Task]:
    return [next(self._iterator) for _ in range(n)]

  def state(self) -> dict:
    return self._iterator.get_state()

  def restore(self, state: dict) -> None:
    self._iterator.set_state(state)
