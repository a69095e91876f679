"""Which weights teach."""

from typing import NamedTuple


class TeacherWeights(NamedTuple):
  """keep: a second weight tree travels with the state; move: its rate towards the policy; mix: the policy's share in its logits."""

  keep: bool
  move: float = 0.0
  mix: float | None = None


def _rate(rate: float) -> float:
  if not 0.0 <= rate <= 1.0:
    raise ValueError(f"method.teacher_weights.rate={rate!r} must lie in [0, 1]")
  return rate


def none() -> TeacherWeights:
  """No teacher at all."""
  return TeacherWeights(False)


def live() -> TeacherWeights:
  """The policy's own weights of this very step."""
  return TeacherWeights(False)


def ema(*, rate: float = 0.05) -> TeacherWeights:
  """teacher <- (1 - rate) teacher + rate policy, once per generation batch."""
  return TeacherWeights(True, move=_rate(rate))


def trust_region(*, rate: float = 0.05) -> TeacherWeights:
  """log q proportional to (1 - rate) logits of the initial weights + rate logits of the policy, both on the teacher's prompt."""
  return TeacherWeights(True, mix=_rate(rate))


def frozen() -> TeacherWeights:
  """The weights that the run started from."""
  return TeacherWeights(True)


TEACHER_WEIGHTS = {
  "none": none,
  "live": live,
  "ema": ema,
  "trust_region": trust_region,
  "frozen": frozen,
}
