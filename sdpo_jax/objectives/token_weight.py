"""How much each token counts in the distillation term: a detached factor per token.

importance (SDPO, arXiv 2601.20802): min(exp(clip(log pi - log pi_old, +-20)), is_clip), one-sided, times the engine-mismatch
weight min(exp(log pi_old - log pi_rollout), rollout_clip). A clip of None removes its factor.
"""

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.divergence import Signals
from sdpo_jax.records import TrainBatch


def capped_ratio(log_ratio: jax.Array, cap: float | None) -> jax.Array:
  """min(exp(log_ratio), cap), detached; ones if cap is None."""
  if cap is None:
    return jnp.ones_like(log_ratio)
  return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.clip(log_ratio, -20.0, 20.0)), cap))


def uniform(signals: Signals, batch: TrainBatch) -> jax.Array:
  return jnp.ones_like(signals.logp_BR)


def importance(signals: Signals, batch: TrainBatch, *, is_clip: float | None = 2.0, rollout_is_clip: float | None = 2.0) -> jax.Array:
  return (capped_ratio(signals.logp_BR - batch.logp_old_BR, is_clip)
          * capped_ratio(batch.logp_old_BR - batch.logp_rollout_BR, rollout_is_clip))


TOKEN_WEIGHTS = {"uniform": uniform, "importance": importance}
