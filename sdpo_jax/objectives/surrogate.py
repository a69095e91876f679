"""Policy-gradient surrogates, and the reductions that say how their tokens add up. Device code.

A surrogate maps `Signals`, a batch and the advantage of each token, [B, R] or [B, 1], to loss_BR,
the loss of each token before weighting. Sources:
the clip of PPO with DAPO's asymmetric bounds (arXiv 2503.14476), its dual clip (arXiv 1912.09729),
GSPO (arXiv 2507.18071), CISPO (arXiv 2506.13585). r is pi / pi_old, A the advantage.

A reduction maps weight_BR to (weight_BR, normaliser): the loss of a batch is
sum(loss_BR * weight_BR) / normaliser.
"""

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.signals import Signals, mean_per_response
from sdpo_jax.objectives.token_weight import capped_ratio
from sdpo_jax.records import TrainBatch


def _engine_ratio(batch: TrainBatch, cap: float | None) -> jax.Array:
  """The weight of the mismatch between trainer and rollout engine, pi_old / pi_rollout capped."""
  return capped_ratio(batch.logp_old_BR - batch.logp_rollout_BR, cap)


def _clipped_gain(ratio_BR, advantage_BR, low: float, high: float) -> jax.Array:
  """PPO's pessimistic gain: min(r A, clip(r, 1 - low, 1 + high) A)."""
  clipped_BR = jnp.clip(ratio_BR, 1.0 - low, 1.0 + high)
  return jnp.minimum(ratio_BR * advantage_BR, clipped_BR * advantage_BR)


def clipped(
  signals: Signals,
  batch: TrainBatch,
  advantage_BR: jax.Array,
  *,
  low: float = 0.2,
  high: float = 0.28,
  rollout_is_clip: float | None = 2.0,
  dual_clip: float | None = None,
) -> jax.Array:
  """Computes PPO's clipped surrogate with one ratio a token, times the engine-mismatch weight.

  dual_clip: where A < 0 the gain is at least dual_clip A, and has no gradient below it: a token
    that has become much likelier since it was sampled could otherwise lose without bound.
  """
  ratio_BR = jnp.exp(signals.logp_BR - batch.logp_old_BR)
  gain_BR = _clipped_gain(ratio_BR, advantage_BR, low, high)
  if dual_clip is not None:
    is_held_BR = (advantage_BR < 0) & (gain_BR < dual_clip * advantage_BR)
    gain_BR = jnp.where(is_held_BR, dual_clip * advantage_BR, gain_BR)
  return -gain_BR * _engine_ratio(batch, rollout_is_clip)


def gspo(
  signals: Signals,
  batch: TrainBatch,
  advantage_BR: jax.Array,
  *,
  low: float = 3e-4,
  high: float = 4e-4,
  rollout_is_clip: float | None = 2.0,
) -> jax.Array:
  """Computes GSPO's token form: one ratio a sequence, clipped as a whole.

  The ratio is s = exp(mean_t (log pi - log pi_old)), and each token carries its gradient.
  """
  weight_BR = batch.weight_BR
  log_ratio_BR = jnp.where(weight_BR > 0, signals.logp_BR - batch.logp_old_BR, 0.0)
  mean_B1 = mean_per_response(log_ratio_BR, weight_BR)
  # The value is that of the sequence, the gradient that of the token's own log-probability.
  log_ratio_BR = jax.lax.stop_gradient(mean_B1) + signals.logp_BR
  ratio_BR = jnp.exp(log_ratio_BR - jax.lax.stop_gradient(signals.logp_BR))
  return -_clipped_gain(ratio_BR, advantage_BR, low, high) * _engine_ratio(batch, rollout_is_clip)


def cispo(
  signals: Signals,
  batch: TrainBatch,
  advantage_BR: jax.Array,
  *,
  low: float = 1.0,
  high: float = 0.28,
  rollout_is_clip: float | None = 2.0,
) -> jax.Array:
  """Computes REINFORCE with a clipped, detached ratio, so that no token loses its gradient."""
  ratio_BR = jnp.exp(signals.logp_BR - batch.logp_old_BR)
  weight_BR = jax.lax.stop_gradient(jnp.clip(ratio_BR, 1.0 - low, 1.0 + high))
  reinforce_BR = -weight_BR * advantage_BR * signals.logp_BR
  return reinforce_BR * _engine_ratio(batch, rollout_is_clip)


def token_mean(weight_BR: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Counts every token of the batch the same (DAPO, SDPO)."""
  return weight_BR, jnp.maximum(jnp.sum(weight_BR), 1.0)


def sequence_mean(weight_BR: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Counts every response the same, whatever its length (GRPO as first published)."""
  length_B1 = jnp.sum(weight_BR, -1, keepdims=True)
  responses = jnp.maximum(jnp.sum(length_B1 > 0), 1.0)
  return weight_BR / jnp.maximum(length_B1, 1.0), responses


def constant(weight_BR: jax.Array, *, length: float) -> tuple[jax.Array, jax.Array]:
  """Divides the sum over tokens by responses x `length` (Dr.GRPO, arXiv 2503.20783).

  No response's length then touches its gradient.
  """
  responses = jnp.sum(jnp.any(weight_BR > 0, -1))
  return weight_BR, jnp.maximum(responses * length, 1.0)


SURROGATES = {"none": None, "clipped": clipped, "gspo": gspo, "cispo": cispo}
REDUCTIONS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "constant": constant}
