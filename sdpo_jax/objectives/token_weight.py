"""Token weights: how much each token counts in the distillation term, as a detached factor.

importance  SDPO, arXiv 2601.20802: min(exp(clip(log pi - log pi_old, +-20)), is_clip), one-sided,
            times the engine-mismatch weight min(exp(log pi_old - log pi_rollout), rollout_is_clip).
            A clip of None removes its factor.
certainty   SRPO, arXiv 2604.02288: the same times e^{-H(q)} divided by its mean over the response,
            so that tokens on which the teacher is sure count more. The paper does not state which
            mean it takes. The mean of a response is chosen here since neither the batch nor its
            cut into micro-batches can then change a weight.
"""

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.signals import TEACHER_ENTROPY, Part, Signals
from sdpo_jax.records import TrainBatch


def capped_ratio(log_ratio: jax.Array, cap: float | None) -> jax.Array:
  """Returns min(exp(log_ratio), cap), detached; ones if cap is None."""
  if cap is None:
    return jnp.ones_like(log_ratio)
  return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.clip(log_ratio, -20.0, 20.0)), cap))


def uniform(signals: Signals, batch: TrainBatch) -> jax.Array:
  """Counts every token the same."""
  return jnp.ones_like(signals.logp_BR)


def importance(
  signals: Signals,
  batch: TrainBatch,
  *,
  is_clip: float | None = 2.0,
  rollout_is_clip: float | None = 2.0,
  by_question: bool = False,
) -> jax.Array:
  """Corrects for the policy's moves since the batch was sampled, by clipped importance ratios.

  by_question: multiplies by the row's advantage, which is then a weight of its question
    (`advantage.question_spread`).
  """
  policy_ratio_BR = capped_ratio(signals.logp_BR - batch.logp_old_BR, is_clip)
  engine_ratio_BR = capped_ratio(batch.logp_old_BR - batch.logp_rollout_BR, rollout_is_clip)
  factor_BR = policy_ratio_BR * engine_ratio_BR
  return factor_BR * batch.advantage_B[:, None] if by_question else factor_BR


def certainty(
  signals: Signals,
  batch: TrainBatch,
  *,
  is_clip: float | None = 2.0,
  rollout_is_clip: float | None = 2.0,
) -> jax.Array:
  """Multiplies the importance ratios by how sure the teacher is, relative to its response."""
  sure_BR = jnp.exp(-jax.lax.stop_gradient(signals.entropy_teacher_BR))
  has_weight_BR = batch.weight_BR > 0
  count_B1 = jnp.maximum(jnp.sum(has_weight_BR, -1, keepdims=True), 1)
  mean_B1 = jnp.sum(sure_BR * has_weight_BR, -1, keepdims=True) / count_B1
  ratio_BR = importance(signals, batch, is_clip=is_clip, rollout_is_clip=rollout_is_clip)
  return ratio_BR * sure_BR / jnp.maximum(mean_B1, 1e-30)


TOKEN_WEIGHTS = {
  "uniform": Part(uniform),
  "importance": Part(importance),
  "certainty": Part(certainty, reads=(TEACHER_ENTROPY,)),
}
