"""Advantages of responses from the rewards of their group. Host code, in numpy.

Baselines run once per generation batch, so that micro-batches cannot change a group's statistics.
A reward that is not finite (a judge that failed) leaves its group's statistics and gets advantage
0.

Sources: GRPO arXiv 2402.03300 (with the standard deviation), SDPO's baseline without it
(arXiv 2601.20802, appendix), SC-SDPO arXiv 2605.27765 (`question_spread`).
"""

import numpy as np


def zero(reward_QG: np.ndarray) -> np.ndarray:
  """Gives every response 0, for methods that learn from the teacher alone."""
  return np.zeros_like(reward_QG)


def question_spread(reward_QG: np.ndarray, success_threshold: float = 0.5) -> np.ndarray:
  """Computes sqrt(p (1 - p)), p being the share of successes in the group (SC-SDPO).

  It is a weight of the question and no baseline; a token weight with `by_question` applies it.
  Questions that the policy always or never solves get 0. The teacher context of the method
  decides what a success is, where it has such a setting.
  """
  valid_QG = np.isfinite(reward_QG)
  success_QG = np.where(valid_QG, reward_QG, 0.0) >= success_threshold
  p_Q1 = success_QG.sum(1, keepdims=True) / np.maximum(valid_QG.sum(1, keepdims=True), 1)
  return np.where(valid_QG, np.sqrt(p_Q1 * (1.0 - p_Q1)), 0.0)


def group_mean(
  reward_QG: np.ndarray,
  success_threshold: float = 0.5,
  *,
  normalize_std: bool = False,
  epsilon: float = 1e-6,
  clip: float | None = None,
  success_bonus: float = 0.0,
) -> np.ndarray:
  """Computes A = r - mean(r) over the valid rewards of the group.

  normalize_std: divides by their sample standard deviation plus epsilon.
  clip: then holds the advantage within +-clip.
  success_bonus: is added last, to successes alone. On the policy's own samples such a term has the
    gradient of supervised training on the group's filtered successes, so often weighted.
  """
  valid_QG = np.isfinite(reward_QG)
  count_Q1 = np.maximum(valid_QG.sum(1, keepdims=True), 1)
  mean_Q1 = np.where(valid_QG, reward_QG, 0.0).sum(1, keepdims=True) / count_Q1
  advantage_QG = np.where(valid_QG, reward_QG - mean_Q1, 0.0)
  if normalize_std:
    sum_of_squares_Q1 = (advantage_QG**2).sum(1, keepdims=True)
    std_Q1 = np.sqrt(sum_of_squares_Q1 / np.maximum(count_Q1 - 1, 1))
    advantage_QG = advantage_QG / (std_Q1 + epsilon)
  if clip is not None:
    advantage_QG = np.clip(advantage_QG, -clip, clip)
  if success_bonus:
    is_success_QG = valid_QG & (np.where(valid_QG, reward_QG, 0.0) >= success_threshold)
    advantage_QG = advantage_QG + success_bonus * is_success_QG
  return advantage_QG


ADVANTAGES = {"zero": zero, "group_mean": group_mean, "question_spread": question_spread}
