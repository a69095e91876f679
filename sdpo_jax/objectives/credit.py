"""Credits: the advantage of each token, made from that of its response and the teacher's readings.

A credit stands between the group's advantage A and the surrogate, which reads it in place of A. It
is detached: the teacher says where in a response the reward was earned, and the reward alone says
what is learned. So the loss has no divergence, and the teacher is read for log-probabilities.

A part of this axis is made from its settings and called as credit(signals, batch) -> advantage_BR,
with the signals of the plain reading first. `reads` are the costly signals that it needs, as of a
`Part`. `is_idle` tells that its settings leave every advantage as it is: then no teacher is read.

Where the teacher has no reading of a response, its tokens keep A (`advantages`).
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.rhythm import Rhythm
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.records import TrainBatch


class Credit(Protocol):
  """What a part of this axis is."""

  reads: tuple[str, ...]

  @property
  def is_idle(self) -> bool:
    """Tells that the settings change no advantage."""

  def __call__(self, signals: tuple[Signals, ...], batch: TrainBatch) -> jax.Array:
    """Returns advantage_BR."""


def none() -> None:
  """Gives every token the advantage of its response."""


def advantages(credit: Credit | None, signals: tuple[Signals, ...], batch: TrainBatch) -> jax.Array:
  """Returns the detached advantage of each token, [B, R], or [B, 1] without a credit."""
  advantage_B1 = batch.advantage_B[:, None]
  if credit is None:
    return advantage_B1
  has_reading_B1 = (batch.readings[0].weight_B > 0)[:, None]
  credited_BR = jnp.where(has_reading_B1, credit(signals, batch), advantage_B1)
  return jax.lax.stop_gradient(credited_BR)


CREDITS = {"none": none, "rhythm": Rhythm}
