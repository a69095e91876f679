"""Policy-gradient surrogates, and how their tokens add up."""

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.signals import Signals
from sdpo_jax.objectives.token_weight import capped_ratio
from sdpo_jax.records import TrainBatch


def clipped(
  signals: Signals,
  batch: TrainBatch,
  *,
  low: float = 0.2,
  high: float = 0.28,
  rollout_is_clip: float | None = 2.0,
) -> jax.Array:
  """PPO's clipped surrogate per token: -min(r A, clip(r, 1-low, 1+high) A), r = pi / pi_old, times the engine-mismatch weight."""
  ratio_BR = jnp.exp(signals.logp_BR - batch.logp_old_BR)
  advantage_B1 = batch.advantage_B[:, None]
  gain_BR = jnp.minimum(
    ratio_BR * advantage_B1, jnp.clip(ratio_BR, 1.0 - low, 1.0 + high) * advantage_B1
  )
  return -gain_BR * capped_ratio(batch.logp_old_BR - batch.logp_rollout_BR, rollout_is_clip)


def gspo(
  signals: Signals,
  batch: TrainBatch,
  *,
  low: float = 3e-4,
  high: float = 4e-4,
  rollout_is_clip: float | None = 2.0,
) -> jax.Array:
  """GSPO's token form: one ratio a sequence, s = exp(mean_t (log pi - log pi_old)), clipped as a whole; each token carries its gradient."""
  weight_BR = batch.weight_BR
  log_ratio_BR = jnp.where(weight_BR > 0, signals.logp_BR - batch.logp_old_BR, 0.0)
  mean_B1 = jnp.sum(log_ratio_BR * weight_BR, -1, keepdims=True) / jnp.maximum(
    jnp.sum(weight_BR, -1, keepdims=True), 1.0
  )
  ratio_BR = jnp.exp(
    jax.lax.stop_gradient(mean_B1) + signals.logp_BR - jax.lax.stop_gradient(signals.logp_BR)
  )
  advantage_B1 = batch.advantage_B[:, None]
  gain_BR = jnp.minimum(
    ratio_BR * advantage_B1, jnp.clip(ratio_BR, 1.0 - low, 1.0 + high) * advantage_B1
  )
  return -gain_BR * capped_ratio(batch.logp_old_BR - batch.logp_rollout_BR, rollout_is_clip)


def cispo(
  signals: Signals,
  batch: TrainBatch,
  *,
  low: float = 1.0,
  high: float = 0.28,
  rollout_is_clip: float | None = 2.0,
) -> jax.Array:
  """CISPO: REINFORCE with a clipped, detached importance weight, so that no token loses its gradient."""
  ratio_BR = jax.lax.stop_gradient(
    jnp.clip(jnp.exp(signals.logp_BR - batch.logp_old_BR), 1.0 - low, 1.0 + high)
  )
  return (
    -ratio_BR
    * batch.advantage_B[:, None]
    * signals.logp_BR
    * capped_ratio(batch.logp_old_BR - batch.logp_rollout_BR, rollout_is_clip)
  )


def token_mean(weight_BR: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Every token of the batch counts the same (DAPO, SDPO)."""
  return weight_BR, jnp.maximum(jnp.sum(weight_BR), 1.0)


def sequence_mean(weight_BR: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Every response counts the same, whatever its length (GRPO as first published)."""
  length_B1 = jnp.sum(weight_BR, -1, keepdims=True)
  return weight_BR / jnp.maximum(length_B1, 1.0), jnp.maximum(jnp.sum(length_B1 > 0), 1.0)


def constant(weight_BR: jax.Array, *, length: float) -> tuple[jax.Array, jax.Array]:
  """Tokens add up and are divided by responses x `length`, so that no response's length touches its gradient (Dr.GRPO)."""
  return weight_BR, jnp.maximum(jnp.sum(jnp.any(weight_BR > 0, -1)) * length, 1.0)


SURROGATES = {"none": None, "clipped": clipped, "gspo": gspo, "cispo": cispo}


REDUCTIONS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "constant": constant}
