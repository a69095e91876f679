"""Teacher weights: which weights re-score the policy's responses.

An entry of TEACHER_WEIGHTS makes the record that `train_step` applies.
Source: arXiv 2601.20802, section 3 (moving average, trust region); OPSD, arXiv 2601.18734 (frozen).
"""

from typing import NamedTuple

from sdpo_jax import ranges


class TeacherWeights(NamedTuple):
  """How the teacher's weights follow the policy's."""

  keep: bool  # a second tree of weights travels with the train state
  move: float = 0.0  # its rate towards the policy, once per generation batch
  mix: float | None = None  # the live policy's share in the teacher's logits; None: no trust region


def none() -> TeacherWeights:
  """Has no teacher at all."""
  return TeacherWeights(keep=False)


def live() -> TeacherWeights:
  """Teaches with the policy's own weights of this very step."""
  return TeacherWeights(keep=False)


def ema(*, rate: float = 0.05) -> TeacherWeights:
  """Moves the teacher once per generation batch: (1 - rate) teacher + rate policy."""
  return TeacherWeights(keep=True, move=_checked(rate))


def trust_region(*, rate: float = 0.05) -> TeacherWeights:
  """Mixes logits on the teacher's prompt: (1 - rate) initial weights + rate live policy."""
  return TeacherWeights(keep=True, mix=_checked(rate))


def frozen() -> TeacherWeights:
  """Teaches with the weights that the run started from."""
  return TeacherWeights(keep=True)


def _checked(rate: float) -> float:
  ranges.check("method.teacher_weights.rate", rate)
  return rate


TEACHER_WEIGHTS = {
  "none": none,
  "live": live,
  "ema": ema,
  "trust_region": trust_region,
  "frozen": frozen,
}
