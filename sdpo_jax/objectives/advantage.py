"""Advantages from the rewards of a group, and the policy-gradient surrogates that use them.

Baselines run on the host, once per generation batch, so that micro-batches cannot change a group's statistics. A reward that is
not finite (a judge that failed) leaves its group's statistics and gets advantage 0.
Sources: GRPO arXiv 2402.03300 (with the std), SDPO's baseline without the std (arXiv 2601.20802, appendix), asymmetric clip DAPO
arXiv 2503.14476, Dr.GRPO arXiv 2503.20783, GSPO arXiv 2507.18071, CISPO arXiv 2506.13585.

A surrogate gives the loss of each token; a reduction says how tokens add up: which weight each has and what the sum is divided by.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.objectives.divergence import Signals
from sdpo_jax.objectives.token_weight import capped_ratio
from sdpo_jax.records import TrainBatch


def zero(reward_QG: np.ndarray) -> np.ndarray:
  """For methods that learn from the teacher alone."""
  return np.zeros_like(reward_QG)


def question_spread(reward_QG: np.ndarray, success_threshold: float = 0.5) -> np.ndarray:
  """(p (1 - p))^.5, p the share of successes in the group: a weight for each question, not a baseline (SC-SDPO, arXiv 2605.27765).

  A token weight with `by_question` applies it. Questions that the policy always or never solves get 0. What a success is, the teacher
  context of the method says, where it has such an argument.
  """
  valid_QG = np.isfinite(reward_QG)
  success_QG = np.where(valid_QG, reward_QG, 0.0) >= success_threshold
  p_Q1 = success_QG.sum(1, keepdims=True) / np.maximum(valid_QG.sum(1, keepdims=True), 1)
  return np.where(valid_QG, np.sqrt(p_Q1 * (1.0 - p_Q1)), 0.0)


def group_mean(
  reward_QG: np.ndarray,
  *,
  normalize_std: bool = False,
  epsilon: float = 1e-6,
  clip: float | None = None,
) -> np.ndarray:
  """A = r - mean(r) of the valid rewards of the group, divided by their (sample) standard deviation if asked, then held within +-clip."""
  valid_QG = np.isfinite(reward_QG)
  count_Q1 = np.maximum(valid_QG.sum(1, keepdims=True), 1)
  mean_Q1 = np.where(valid_QG, reward_QG, 0.0).sum(1, keepdims=True) / count_Q1
  advantage_QG = np.where(valid_QG, reward_QG - mean_Q1, 0.0)
  if normalize_std:
    std_Q1 = np.sqrt((advantage_QG**2).sum(1, keepdims=True) / np.maximum(count_Q1 - 1, 1))
    advantage_QG = advantage_QG / (std_Q1 + epsilon)
  return advantage_QG if clip is None else np.clip(advantage_QG, -clip, clip)


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


ADVANTAGES = {"zero": zero, "group_mean": group_mean, "question_spread": question_spread}
SURROGATES = {"none": None, "clipped": clipped, "gspo": gspo, "cispo": cispo}
REDUCTIONS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "constant": constant}
