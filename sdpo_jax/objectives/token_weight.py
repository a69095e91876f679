"""Token weights: how much each token counts in the distillation term, as a detached factor.

importance  SDPO, arXiv 2601.20802: min(exp(clip(log pi - log pi_old, +-20)), is_clip), one-sided,
            times the engine-mismatch weight min(exp(log pi_old - log pi_rollout), rollout_is_clip).
            A clip of None removes its factor.
certainty   SRPO, arXiv 2604.02288: the same times e^{-H(q)} divided by its mean over the response,
            so that tokens on which the teacher is sure count more. The paper does not state which
            mean it takes. The mean of a response is chosen here since neither the batch nor its
            cut into micro-batches can then change a weight.
prefix_gap  arXiv 2606.22600, eq. 16: the same times 1 + gamma * (the share of the response's
            sum |log q - log pi| that is still to come, this token's included). It falls from
            1 + gamma to 1 along the response.
first_share The same paper's Prefix-30: the same on the first tokens of a response and 0 on the
            others. The term is divided by all tokens, and the number of tokens is rounded up
            (decided here).
contrast    max(c, 0), where c contrasts the response with its siblings (cti.py): a variant of CRAFT
            that is of this project.
"""

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.cti import CREDIT
from sdpo_jax.objectives.signals import TEACHER_ENTROPY, TEACHER_LOGP, Part, Signals
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
  return factor_BR * batch.advantage_BR if by_question else factor_BR


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


def prefix_gap(
  signals: Signals,
  batch: TrainBatch,
  *,
  gamma: float = 0.5,
  is_clip: float | None = 2.0,
  rollout_is_clip: float | None = 2.0,
) -> jax.Array:
  """Multiplies the importance ratios by up to 1 + gamma, the more of the gaps is still to come.

  It is 1 where the readings agree on a whole response. Only tokens with a weight add to the sums.
  """
  gap_BR = jnp.where(batch.weight_BR > 0, jnp.abs(signals.gap_BR), 0.0)
  total_B1 = jnp.sum(gap_BR, -1, keepdims=True)
  before_BR = jnp.cumsum(gap_BR, -1) - gap_BR
  left_BR = jnp.where(total_B1 > 0, 1.0 - before_BR / jnp.maximum(total_B1, 1e-30), 0.0)
  ratio_BR = importance(signals, batch, is_clip=is_clip, rollout_is_clip=rollout_is_clip)
  return ratio_BR * (1.0 + gamma * left_BR)


def first_share(
  signals: Signals,
  batch: TrainBatch,
  *,
  share: float = 0.3,
  is_clip: float | None = 2.0,
  rollout_is_clip: float | None = 2.0,
) -> jax.Array:
  """Takes the importance ratios on the first `share` of a response's weighted tokens, else 0."""
  counts_BR = batch.weight_BR > 0
  place_BR = jnp.cumsum(counts_BR, -1) - counts_BR  # counted from 0
  # A share of a length that is whole may come out a rounding too large.
  end_B1 = share * (1.0 - 1e-6) * jnp.sum(counts_BR, -1, keepdims=True)
  ratio_BR = importance(signals, batch, is_clip=is_clip, rollout_is_clip=rollout_is_clip)
  return jnp.where(place_BR < end_B1, ratio_BR, 0.0)


def contrast(signals: Signals, batch: TrainBatch) -> jax.Array:
  """Takes the credit c of a token where it is above 0, and 0 elsewhere."""
  return jnp.maximum(batch.credit_BR, 0.0)


TOKEN_WEIGHTS = {
  "uniform": Part(uniform),
  "importance": Part(importance),
  "certainty": Part(certainty, reads=(TEACHER_ENTROPY,)),
  "prefix_gap": Part(prefix_gap, reads=(TEACHER_LOGP,)),
  "first_share": Part(first_share),
  "contrast": Part(contrast, reads=(CREDIT,)),
}
