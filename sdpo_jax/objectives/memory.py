"""Memories: what a run remembers of its questions from one visit to the next. Host code.

A part of this axis is made from its settings, once a run; `visit(group)` is called with each judged
group in the order of the batch, and returns where the question stands. The memory is in the
checkpoint. Every process sees every group and so keeps the same memory, whatever their number.
"""

import dataclasses
from typing import Any, Protocol

from sdpo_jax.records import Rollout


@dataclasses.dataclass(frozen=True)
class Standing:
  """What is known of a question, its present visit included."""

  pass_rate: float  # in [0, 1], a moving average over visits
  visits: int
  solutions: tuple[str, ...] = ()  # of earlier visits
  stage: int = 2
  level: str = "medium"


class Memory(Protocol):
  """What a part of this axis is."""

  def visit(self, group: list[Rollout]) -> Standing:
    """Notes a judged group and returns where its question stands."""

  def state(self) -> Any:
    """Returns all of it, JSON-able; later visits do not show in it."""

  def restore(self, state: Any) -> None:
    """Goes on from a state."""


def none() -> None:
  """Remembers nothing."""


MEMORIES = {"none": none}
