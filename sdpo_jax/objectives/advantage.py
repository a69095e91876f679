"""Advantages from the rewards of a group, and the policy-gradient surrogates that use them.

Baselines run on the host, once per generation batch, so that micro-batches cannot change a group's statistics. A reward that is
not finite (a judge that failed) leaves its group's statistics and gets advantage 0.
Sources: GRPO arXiv 2402.03300 (with the std), SDPO's baseline without the std (arXiv 2601.20802, appendix), asymmetric clip DAPO
arXiv 2503.14476.
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


def group_mean(reward_QG: np.ndarray, *, normalize_std: bool = False, epsilon: float = 1e-6) -> np.ndarray:
  """A = r - mean(r) of the valid rewards of the group, divided by their (sample) standard deviation if asked."""
  valid_QG = np.isfinite(reward_QG)
  count_Q1 = np.maximum(valid_QG.sum(1, keepdims=True), 1)
  mean_Q1 = np.where(valid_QG, reward_QG, 0.0).sum(1, keepdims=True) / count_Q1
  advantage_QG = np.where(valid_QG, reward_QG - mean_Q1, 0.0)
  if normalize_std:
    std_Q1 = np.sqrt((advantage_QG**2).sum(1, keepdims=True) / np.maximum(count_Q1 - 1, 1))
    advantage_QG = advantage_QG / (std_Q1 + epsilon)
  return advantage_QG


def clipped(signals: Signals, batch: TrainBatch, *, low: float = 0.2, high: float = 0.28, rollout_is_clip: float | None = 2.0) -> jax.Array:
  """PPO's clipped surrogate per token: -min(r A, clip(r, 1-low, 1+high) A), r = pi / pi_old, times the engine-mismatch weight."""
  ratio_BR = jnp.exp(signals.logp_BR - batch.logp_old_BR)
  advantage_B1 = batch.advantage_B[:, None]
  gain_BR = jnp.minimum(ratio_BR * advantage_B1, jnp.clip(ratio_BR, 1.0 - low, 1.0 + high) * advantage_B1)
  return -gain_BR * capped_ratio(batch.logp_old_BR - batch.logp_rollout_BR, rollout_is_clip)


ADVANTAGES = {"zero": zero, "group_mean": group_mean}
SURROGATES = {"none": None, "clipped": clipped}
