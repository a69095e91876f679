"""Teacher logits: teachers whose logits are sums of several readings' logits.

With one output matrix, a sum of logits is the matrix applied to the same sum of hidden states. So
such a teacher is one virtual hidden state a token, which the full-vocabulary kernel takes like any
other. Where policy and teacher have weights of their own, their hidden states stand side by side
and their matrices one above the other (`train_step.virtual_teacher`).

A part of this axis is made from its settings. coefficients(control) returns the policy's factor,
under its own prompt and detached, or None; then one factor for each reading by the teacher.
"""

from typing import Protocol

import jax

from sdpo_jax.objectives.control import Controller, Ramp, Scheduled, check_ramp


class TeacherLogits(Protocol):
  """What a part of this axis is."""

  def coefficients(
    self, control: dict[str, jax.Array]
  ) -> tuple[float | jax.Array | None, tuple[float | jax.Array, ...]]:
    """Returns (the policy's factor or None, those of the readings)."""


def plain() -> None:
  """Takes the logits of the plain reading as they are."""


class Tilt:
  """Teaches with (1 - w) of the policy's logits under its own prompt and w of the reading's.

  Source: beta-OPSD, arXiv 2607.28582, eq. 10, where w is 1 / beta. The policy's are today's, not
  the initial weights'.

  share, share_end, share_steps: w moves linearly from the first to the second in so many steps.
  """

  further_count = 0

  def __init__(self, *, share: float = 0.5, share_end: float = 0.8, share_steps: int = 200):
    check_ramp("method.teacher_logits", share, share_end, share_steps)
    if share == share_end == 0:
      raise ValueError(
        "method.teacher_logits.share=0 to share_end=0 makes the teacher the policy itself"
      )
    self._ramp = Ramp(share, share_end, share_steps)

  def controller(self) -> Controller:
    return Scheduled(self._ramp)

  def coefficients(self, control: dict[str, jax.Array]) -> tuple[jax.Array, tuple[jax.Array]]:
    share = control["teacher_logits"]
    return 1.0 - share, (share,)


class PointwiseInformation:
  """Teaches with what the question adds to a reference solution, on top of the question alone.

  The logits are z_0 + (z_q - z_r) / beta of three readings: z_q of the question with the reference,
  z_0 of the question alone, z_r of the reference alone. Source: arXiv 2607.02234, eq. 13-18,
  without its tanh (squashed logits are not linear). The mean over the vocabulary that it takes off
  changes no distribution.

  Needs a context with these two further readings, `pmi`.
  """

  further_count = 2

  def __init__(self, *, beta: float = 1.0):
    self._beta = beta

  def coefficients(self, control: dict[str, jax.Array]) -> tuple[None, tuple[float, ...]]:
    return None, (1.0 / self._beta, 1.0, -1.0 / self._beta)


TEACHER_LOGITS = {"plain": plain, "tilt": Tilt, "pmi": PointwiseInformation}
