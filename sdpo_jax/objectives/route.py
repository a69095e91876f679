"""Routes: which responses learn from the teacher's divergence, and which from the reward.

Read where a method's `policy_share` is "routed". A part of this axis is made from its settings and
called as route(group, standing) -> (lots, standing): a `Lot` for each response of a group, and the
standing of its question (`memory.py`) with what the route has decided about it; None without a
memory. Host code.

What a success is, the teacher context says where it has such a setting.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from sdpo_jax.objectives.memory import Standing
from sdpo_jax.records import Rollout


class Lot(NamedTuple):
  """What one response learns from."""

  distils: bool | None  # the divergence, if a reading exists; None: if a reading exists, it does
  factor: float = 1.0  # at least 0, on its advantage


def measure(
  standings: list[Standing], route_B: np.ndarray, is_read_B: np.ndarray, is_judged_B: np.ndarray
) -> dict[str, float]:
  """Returns where the questions of a batch stand, and what its judged responses learn from.

  is_read_B: the teacher has a reading. Values of which nothing was counted are left out.
  """
  metrics = {}
  if is_judged_B.any():
    goes_to_teacher_B = (route_B > 0)[is_judged_B]
    metrics["route/distilled"] = float(np.mean(goes_to_teacher_B & is_read_B[is_judged_B]))
    metrics["route/neither"] = float(np.mean(goes_to_teacher_B & ~is_read_B[is_judged_B]))
  if standings:
    metrics["route/first_stage"] = float(np.mean([s.stage == 1 for s in standings]))
    for level in ("easy", "medium", "hard"):
      metrics[f"route/{level}"] = float(np.mean([s.level == level for s in standings]))
  return metrics


@dataclasses.dataclass(frozen=True)
class Taught:
  """Gives the divergence to each response that has a teacher, and the reward to the others."""

  def __call__(
    self, group: list[Rollout], standing: Standing | None
  ) -> tuple[list[Lot], Standing | None]:
    return [Lot(None)] * len(group), standing


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Gives the divergence to failures and the reward to successes (H2SD, arXiv 2607.18955)."""

  success_threshold: float = 0.5

  def __call__(
    self, group: list[Rollout], standing: Standing | None
  ) -> tuple[list[Lot], Standing | None]:
    return [Lot(r.feedback.reward < self.success_threshold) for r in group], standing


@dataclasses.dataclass(frozen=True)
class Drift:
  """Routes by stage, outcome and difficulty (DRIFT, arXiv 2606.30345, sections 3.1 and 3.2).

  Stage 1, the first visits of each question: all its responses get the divergence. Stage 2:
  failures get the divergence, successes the reward, times a factor for the question's level. It is
  easy where the pass rate, this visit included, lies above `easy_above`, hard below `hard_below`,
  else medium. The paper counts stages in epochs; the visits of a question are counted here.

  warm_up_visits: so many visits are stage 1.
  easy, medium, hard: the factors, at least 0.
  """

  success_threshold: float = 0.5
  _: dataclasses.KW_ONLY
  warm_up_visits: int = 2
  hard_below: float = 0.2
  easy_above: float = 0.8
  easy: float = 0.5
  medium: float = 1.0
  hard: float = 0.0

  needs_memory = True

  def __post_init__(self):
    if self.hard_below > self.easy_above:
      raise ValueError(
        f"method.route.hard_below={self.hard_below!r} must be at most "
        f"method.route.easy_above={self.easy_above!r}"
      )

  def __call__(self, group: list[Rollout], standing: Standing) -> tuple[list[Lot], Standing]:
    level = "medium"
    if standing.pass_rate > self.easy_above:
      level = "easy"
    elif standing.pass_rate < self.hard_below:
      level = "hard"
    stage = 1 if standing.visits <= self.warm_up_visits else 2
    standing = dataclasses.replace(standing, stage=stage, level=level)
    if stage == 1:
      return [Lot(True)] * len(group), standing
    success = Lot(False, {"easy": self.easy, "medium": self.medium, "hard": self.hard}[level])
    failed = [r.feedback.reward < self.success_threshold for r in group]
    return [Lot(True) if has_failed else success for has_failed in failed], standing


ROUTES = {"taught": Taught, "outcome": Outcome, "drift": Drift}
