"""How much each token counts in the distillation term: a detached factor per token.

importance (SDPO, arXiv 2601.20802): min(exp(clip(log pi - log pi_old, +-20)), is_clip), one-sided, times the engine-mismatch
weight min(exp(log pi_old - log pi_rollout), rollout_clip). A clip of None removes its factor.
certainty (SRPO, arXiv 2604.02288): the same times e^{-H(q)}, divided by its mean over the response, so that tokens on which the
teacher is sure count more. The mean is per response, so that neither the batch nor its cut into micro-batches changes a weight;
which mean the paper takes is not stated.
"""

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.signals import Signals
from sdpo_jax.records import TrainBatch


def capped_ratio(log_ratio: jax.Array, cap: float | None) -> jax.Array:
  """min(exp(log_ratio), cap), detached; ones if cap is None."""
  if cap is None:
    return jnp.ones_like(log_ratio)
  return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.clip(log_ratio, -20.0, 20.0)), cap))


def uniform(signals: Signals, batch: TrainBatch) -> jax.Array:
  return jnp.ones_like(signals.logp_BR)


def importance(
  signals: Signals,
  batch: TrainBatch,
  *,
  is_clip: float | None = 2.0,
  rollout_is_clip: float | None = 2.0,
  by_question: bool = False,
) -> jax.Array:
  """by_question: times the row's advantage, which is then a weight of its question (`advantage.question_spread`)."""
  weight_BR = capped_ratio(signals.logp_BR - batch.logp_old_BR, is_clip) * capped_ratio(
    batch.logp_old_BR - batch.logp_rollout_BR, rollout_is_clip
  )
  return weight_BR * batch.advantage_B[:, None] if by_question else weight_BR


def certainty(
  signals: Signals,
  batch: TrainBatch,
  *,
  is_clip: float | None = 2.0,
  rollout_is_clip: float | None = 2.0,
) -> jax.Array:
  sure_BR = jnp.exp(-jax.lax.stop_gradient(signals.entropy_teacher_BR))
  counted_BR = batch.weight_BR > 0
  mean_B1 = jnp.sum(sure_BR * counted_BR, -1, keepdims=True) / jnp.maximum(
    jnp.sum(counted_BR, -1, keepdims=True), 1
  )
  return (
    importance(signals, batch, is_clip=is_clip, rollout_is_clip=rollout_is_clip)
    * sure_BR
    / jnp.maximum(mean_B1, 1e-30)
  )


TOKEN_WEIGHTS = {"uniform": uniform, "importance": importance, "certainty": certainty}
