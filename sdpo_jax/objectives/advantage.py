"""Advantages from the rewards of a group, and the policy-gradient surrogates that use them.

Baselines run on the host, once per generation batch, so that micro-batches cannot change a group's statistics. A reward that is
not finite (a judge that failed) leaves its group's statistics and gets advantage 0.
Sources: GRPO arXiv 2402.03300 (with the std), SDPO's baseline without the std (arXiv 2601.20802, appendix), asymmetric clip DAPO
arXiv 2503.14476, Dr.GRPO arXiv 2503.20783, GSPO arXiv 2507.18071, CISPO arXiv 2506.13585.

A surrogate gives the loss of each token; a reduction says how tokens add up: which weight each has and what the sum is divided by.
"""

import numpy as np


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


ADVANTAGES = {"zero": zero, "group_mean": group_mean, "question_spread": question_spread}
