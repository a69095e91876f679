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


class TeacherLogits(Protocol):
  """What a part of this axis is."""

  def coefficients(
    self, control: dict[str, jax.Array]
  ) -> tuple[float | jax.Array | None, tuple[float | jax.Array, ...]]:
    """Returns (the policy's factor or None, those of the readings)."""


def plain() -> None:
  """Takes the logits of the plain reading as they are."""


TEACHER_LOGITS = {"plain": plain}
