"""Routes: which responses learn from the teacher's divergence, and which from the reward.

Read where a method's `policy_share` is "routed". A part of this axis is made from its settings and
called as route(group, standing) -> (lots, standing): a `Lot` for each response of a group, and the
standing of its question (`memory.py`) with what the route has decided about it; None without a
memory. Host code.
"""

import dataclasses
from typing import NamedTuple

from sdpo_jax.objectives.memory import Standing
from sdpo_jax.records import Rollout


class Lot(NamedTuple):
  """What one response learns from."""

  distils: bool | None  # the divergence, if a reading exists; None: if a reading exists, it does
  factor: float = 1.0  # at least 0, on its advantage


@dataclasses.dataclass(frozen=True)
class Taught:
  """Gives the divergence to each response that has a teacher, and the reward to the others."""

  def __call__(
    self, group: list[Rollout], standing: Standing | None
  ) -> tuple[list[Lot], Standing | None]:
    return [Lot(None)] * len(group), standing


ROUTES = {"taught": Taught}
