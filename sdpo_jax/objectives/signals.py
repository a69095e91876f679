"""Token signals: what each response token contributes once a teacher has re-scored it.

A token signal maps `Signals`, the per-token quantities of policy and teacher, to loss_BR in nats.
It is named by the granularity of its credit, as in SDPO (arXiv 2601.20802, section 2.3):

  divergence     logit level: D(policy, teacher) over the whole vocabulary (the default),
                 or over the policy's top K entries and a tail
  sampled_token  token level: sg(log pi(y) - log q(y)) * log pi(y),
                 the score-function form of reverse KL
  sequence       the mean token advantage of the response as one scalar:
                 -sg(mean_t (log q - log pi)) * log pi(y)

The teacher carries no gradient in any of them.
"""

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.records import TrainBatch

# What a part may declare that it reads. The train step computes none unless some part does, and
# runs no teacher at all where no part reads any.
DIVERGENCE, TEACHER_LOGP, TEACHER_ENTROPY = "divergence_BR", "logp_teacher_BR", "entropy_teacher_BR"


class Part(NamedTuple):
  """One entry of a table of parts: a function of arrays, and the costly signals that it reads."""

  function: Callable | None  # None: the method has no such part
  # of DIVERGENCE, TEACHER_LOGP, TEACHER_ENTROPY; a function of its settings where they decide
  reads: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()


class Signals(NamedTuple):
  """Policy and teacher on each response token, for one reading by the teacher, in nats.

  Only the first three fields carry gradient.
  """

  logp_BR: jax.Array  # log pi(y_t)
  entropy_BR: jax.Array  # H(pi)
  divergence_BR: jax.Array | None  # D(pi, q); None where the method computes none
  logp_teacher_BR: jax.Array | None  # log q(y_t); None without a teacher
  entropy_teacher_BR: jax.Array | None = None  # H(q); None where no part reads it

  @property
  def gap_BR(self) -> jax.Array:
    """Detached log q(y_t) - log pi(y_t); positive where the teacher likes the token better."""
    return jax.lax.stop_gradient(self.logp_teacher_BR - self.logp_BR)


def mean_per_response(x_BR: jax.Array, weight_BR: jax.Array) -> jax.Array:
  """Returns the weighted mean of each response as [B, 1]; 0 where nothing has a weight."""
  total_B1 = jnp.sum(x_BR * weight_BR, -1, keepdims=True)
  return total_B1 / jnp.maximum(jnp.sum(weight_BR, -1, keepdims=True), 1.0)


def divergence(
  signals: Signals,
  batch: TrainBatch,
  *,
  alpha: float = 0.5,
  top_k: int | None = None,
  add_tail: bool = True,
  clip: float | None = None,
  advantage_clip: float | None = None,
) -> jax.Array:
  """Returns D(policy, teacher). The kernel has applied all of these settings but `clip`.

  alpha: 0 is KL(q || pi), 1 is KL(pi || q), between them lies the generalised JSD.
  top_k, add_tail: over the policy's K likeliest entries, with one entry for the rest of the mass.
  clip: a token above it counts as that much and has no gradient (OPSD, arXiv 2601.18734).
  advantage_clip: with alpha = 1 and top_k, holds the advantage log q - log pi of each kept entry
    within +-advantage_clip.
  """
  if clip is None:
    return signals.divergence_BR
  return jnp.minimum(signals.divergence_BR, clip)


def sampled_token(signals: Signals, batch: TrainBatch) -> jax.Array:
  """Weighs the log-probability of each sampled token by how much less the teacher likes it."""
  return -signals.gap_BR * signals.logp_BR


def sequence(signals: Signals, batch: TrainBatch) -> jax.Array:
  """Weighs all tokens of a response by the mean gap of the response."""
  return -mean_per_response(signals.gap_BR, batch.weight_BR) * signals.logp_BR


TOKEN_SIGNALS = {
  "none": Part(None),
  "divergence": Part(divergence, reads=(DIVERGENCE,)),
  "sampled_token": Part(sampled_token, reads=(TEACHER_LOGP,)),
  "sequence": Part(sequence, reads=(TEACHER_LOGP,)),
}
