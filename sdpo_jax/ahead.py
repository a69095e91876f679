"""Samples the next batch while the present one is trained on: `config.rollout.lag=1`.

One thread collects one batch, with a copy of the weights as they were before the present update.
What it samples is thus one update old when it is trained on. Tokens keep their log-probabilities
under the weights that sampled them, which the truncated importance weights of the loss read; the
divergence is computed under the policy of the day. No sample spans a change of weights.

A checkpoint waits for the batch and holds it, so that a killed run repeats it. A run that is
asked to stop has no time to wait: where the batch is not there yet, the next start samples it anew,
with the weights that were saved.
"""

from collections.abc import Callable
import concurrent.futures
from typing import Any

from sdpo_jax.records import Rollout


class Ahead:
  """One batch on its way. It knows where the run was in its data before it took the questions."""

  def __init__(
    self,
    data: Any,
    collect: Callable[[], list[list[Rollout]]],
    interrupt: Callable[[], None] = lambda: None,
  ):
    """Begins to collect.

    Args:
      data: the position before the batch, as a checkpoint stores it.
      collect: samples and judges the batch.
      interrupt: makes `collect` raise soon.
    """
    self.data = data
    self._interrupt = interrupt
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ahead")
    self._groups = self._pool.submit(collect)
    self._pool.shutdown(wait=False)  # nothing more is submitted

  def groups(self) -> list[list[Rollout]]:
    """Waits for the batch and returns it. Raises what ended its collection."""
    return self._groups.result()

  def abandon(self) -> None:
    """Ends the collection, if it has not ended, and waits until its thread is through."""
    if not self._groups.done():
      self._interrupt()
    self._groups.exception()

  def groups_now(self) -> list[list[Rollout]] | None:
    """Returns the batch if it is there; else abandons it and returns None."""
    if not self._groups.done() or self._groups.exception():
      self.abandon()
      return None
    return self._groups.result()
