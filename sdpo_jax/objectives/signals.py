"""The token signals: what each response token contributes when a teacher has re-scored it.

A token signal maps `Signals` (per-token quantities of policy and teacher, in nats) to loss_BR. It is named by its credit
granularity, as in SDPO (arXiv 2601.20802, section 2.3):
  divergence     logit level: D(policy, teacher) over the whole vocabulary, the default, or over the policy's top K and a tail
  sampled_token  token level: sg(log pi(y) - log q(y)) * log pi(y), the score-function form of reverse KL
  sequence       the mean token advantage of the response as one scalar: -sg(mean_t (log q - log pi)) * log pi(y)
The teacher carries no gradient in any of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.records import TrainBatch


class Signals(NamedTuple):
  """What the two passes say of each response token, in nats. Only the first three carry gradient."""

  logp_BR: jax.Array  # log pi(y_t)
  entropy_BR: jax.Array  # H(pi)
  divergence_BR: jax.Array | None  # D(pi, q); None where the method computes none
  logp_teacher_BR: jax.Array | None  # log q(y_t); None without a teacher
  entropy_teacher_BR: jax.Array | None = None  # H(q); None where the method reads none
  counterfactuals: tuple["Signals", ...] = ()  # the same of each further reading of the batch

  @property
  def gap_BR(self) -> jax.Array:
    """log q(y_t) - log pi(y_t), detached: where it is positive the teacher likes the token better."""
    return jax.lax.stop_gradient(self.logp_teacher_BR - self.logp_BR)


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
  """alpha = 0: KL(q || pi); 1: KL(pi || q); between: generalised JSD. The kernel has computed it, with alpha, top_k, add_tail and advantage_clip.

  clip: a token above it counts as that much and has no gradient (OPSD, arXiv 2601.18734).
  advantage_clip: with alpha = 1 and top_k, the advantage log q - log pi of each kept entry is held within +-advantage_clip.
  """
  return signals.divergence_BR if clip is None else jnp.minimum(signals.divergence_BR, clip)


def sampled_token(signals: Signals, batch: TrainBatch) -> jax.Array:
  return -signals.gap_BR * signals.logp_BR


def sequence(signals: Signals, batch: TrainBatch) -> jax.Array:
  weight_BR = batch.weight_BR
  mean_B1 = jnp.sum(signals.gap_BR * weight_BR, -1, keepdims=True) / jnp.maximum(
    jnp.sum(weight_BR, -1, keepdims=True), 1.0
  )
  return -mean_B1 * signals.logp_BR


TOKEN_SIGNALS = {
  "none": None,
  "divergence": divergence,
  "sampled_token": sampled_token,
  "sequence": sequence,
}
