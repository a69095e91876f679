"""Compares the order in which a diagnosis puts methods with the order that training then showed.

Kendall's tau-b: 1 where every pair stands as it ended, -1 where every pair stands the other way;
pairs that an order leaves open count as neither (Kendall 1945). With four methods it takes few
values, so that one task tells little; the mean over tasks is what counts.
"""

import math

import scipy

from sdpo_jax.diagnose.verdict import RANKED

# What somebody says who looks at nothing: rewards first, of the rest no opinion.
CONSTANT = [["grpo"], [name for name in RANKED if name != "grpo"]]


def tau(ranking: list[list[str]], scores: dict[str, float]) -> float | None:
  """Returns Kendall's tau-b of an order (the best first, equal ones together) and of scores.

  None where the order leaves every pair open.
  """
  place = {name: i for i, tied in enumerate(ranking) for name in tied}
  names = list(scores)
  value = scipy.stats.kendalltau([-place[name] for name in names], [scores[n] for n in names])
  return None if math.isnan(value.statistic) else float(value.statistic)


def by_score(scores: dict[str, float]) -> list[str]:
  """Returns the names, the best first."""
  return sorted(scores, key=lambda name: -scores[name])


# The arm of a grid -> what a diagnosis calls it
CALLED = {
  "sdpo": "sdpo",
  "frozen": "sdpo, frozen teacher",
  "sdpo_frozen": "sdpo, frozen teacher",
  "grpo": "grpo",
  "blend": "sdpo_blend",
  "sdpo_blend": "sdpo_blend",
}


def compare(ranking: list[list[str]], score_of: dict[str, float]) -> tuple[float | None, float]:
  """Returns tau of a diagnosis's order and tau of the constant one."""
  constant = tau(CONSTANT, score_of)
  assert constant is not None, "grpo is one of the methods"
  return tau(ranking, score_of), constant
