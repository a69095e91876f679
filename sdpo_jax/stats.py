"""What the reported numbers are: avg@k, pass@k, discovery@k, and how sure of them we are.

Questions are the unit of resampling, since responses to one question are alike. The same inputs and seed give the same bits.

Intervals are percentile bootstrap intervals of 10,000 draws whose deviations from the mean are widened by sqrt(n/(n-1)) and by the ratio of
Student's to the normal quantile: plain ones are too narrow by just these factors (Hesterberg 2014, arXiv:1411.5279, 4.3.3), which matters
for 5 seeds. He moves the quantile instead; with few values that stops at the extreme draw and covers too little. Where all scores are
equal the width is zero: none of 20 solved shows [0, 0], which does not prove that none can be.

Errors: ValueError for scores that are empty, not finite or (where an interval is cut to it) outside [0, 1], for k outside 1..n and c
outside 0..n. None stands for a bound or a p-value that one sample cannot give.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.special

DRAWS = 10_000
_CHUNK = 500  # draws held in memory at once


class Interval(NamedTuple):
  mean: float
  low: float | None  # None: one question says nothing about the spread
  high: float | None


class Difference(NamedTuple):
  difference: float  # mean of a minus mean of b
  low: float | None
  high: float | None
  p_value: float | None  # two-sided; the difference is zero under the null


def mean_interval(score_Q, *, level=0.95, seed=0) -> Interval:
  """Mean over questions, with an interval (cut to [0, 1]) that resamples questions. score_Q[q] may itself be a mean over responses."""
  score_Q = _finite(score_Q, ndim=1)
  if score_Q.min() < 0 or score_Q.max() > 1:
    raise ValueError(f"scores must lie in [0, 1]; got {score_Q.min()} to {score_Q.max()}")
  mean, low, high, _ = _bootstrap(score_Q, [0], level, seed)
  return Interval(
    mean, None if low is None else max(low, 0.0), None if high is None else min(high, 1.0)
  )


def avg_at_k(score_QG, *, level=0.95, seed=0) -> Interval:
  """Mean score of k = G responses a question: an average over responses, then over questions. Rows may differ in length."""
  return mean_interval(
    [_finite(score_G, ndim=1).mean() for score_G in score_QG], level=level, seed=seed
  )


def pass_at_k(n, c, k):
  """Unbiased probability that one of k responses is right, c of n sampled ones being right (arXiv:2107.03374 eq. 1).

  1 - C(n-c, k) / C(n, k), correctly rounded. Scalars give a float; arrays broadcast and give one value a question (their mean is pass@k).
  """

  def one(n, c, k):
    n, c, k = int(n), int(c), int(k)
    if not (1 <= k <= n and 0 <= c <= n):
      raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n; got n={n}, c={c}, k={k}")
    ways = math.comb(n, k)
    # whole numbers until the one division, so no cancellation
    return (ways - math.comb(n - c, k)) / ways

  value = np.vectorize(one, otypes=[float])(n, c, k)
  return float(value) if value.ndim == 0 else value


def discovery_at_k(first_success, k):
  """Share of runs whose first success came within k attempts: P(first success <= k).

  first_success: any shape (runs, or questions x seeds), attempts counted from 1; None, inf or NaN is a run that never succeeded and counts as not
  found at every k, however early it was stopped. k: a number or an array of numbers (a curve); the result has its shape.
  """
  # None becomes NaN, which is <= nothing
  first_X = np.array(first_success, dtype=float).ravel()
  if not first_X.size:
    raise ValueError("discovery@k of no runs")
  if np.any(first_X < 1):
    raise ValueError(f"attempts are counted from 1; got {np.nanmin(first_X)}")
  value = np.mean(first_X <= np.asarray(k, dtype=float)[..., None], axis=-1)
  return float(value) if value.ndim == 0 else value


def kaplan_meier(first_success, attempts, k):
  """Probability of a success within k attempts where runs may have ended early: 1 - prod over j <= k of (1 - successes at j / runs still going at j).

  first_success: as in discovery_at_k, any shape; attempts: how many each run made. A run without success is censored after its attempts. With
  every unsolved run observed up to k this is discovery_at_k. Beyond the last attempt of any run the estimate stays where it was.
  """
  first_X, attempts_X = (
    np.array(first_success, dtype=float).ravel(),
    np.array(attempts, dtype=float).ravel(),
  )
  if not first_X.size or first_X.shape != attempts_X.shape:
    raise ValueError(
      f"kaplan_meier needs as many numbers of attempts as runs, and at least one; got {first_X.size} and {attempts_X.size}"
    )
  end_X = np.where(np.isfinite(first_X), first_X, attempts_X)
  survival = 1.0
  for j in np.unique(first_X[np.isfinite(first_X) & (first_X <= k)]):
    survival *= 1.0 - np.sum(first_X == j) / np.sum(end_X >= j)
  return float(1.0 - survival)


def paired_bootstrap(a_QS, b_QS, *, level=0.95, seed=0) -> Difference:
  """mean(a) - mean(b) over the same questions and as many seeds, with an interval and a two-sided p-value.

  a_QS, b_QS: scores, question x seed (one seed: [Q] or [Q, 1]). Questions are paired; so is seed s of a with seed s of b. Each draw resamples
  the questions, and the seeds with them: the per-question means and the per-seed means of a - b are drawn independently and their deviations added.
  That is right when a seed is one training run scored on every question (its luck is shared by all of them, and drawing seeds anew in
  each question would miss it), and errs on the wide side when each question has seeds of its own: the noise of single cells is then counted twice.
  Student's quantile has Satterthwaite's degrees of freedom, so that five seeds are not taken for many. The p-value is the level at which the
  interval just touches 0, and never below 2/10,001; where all differences are equal it is the sign test's, 2^(1-n).
  """
  a_QS, b_QS = _finite(a_QS), _finite(b_QS)
  if a_QS.shape != b_QS.shape or a_QS.ndim not in (1, 2):
    raise ValueError(
      f"paired scores must both be questions x seeds; got shapes {a_QS.shape} and {b_QS.shape}"
    )
  return Difference(*_bootstrap(a_QS - b_QS, range(a_QS.ndim), level, seed))


def _finite(score, ndim=None):
  score = np.asarray(score, dtype=float)
  if not score.size or not np.all(np.isfinite(score)) or ndim not in (None, score.ndim):
    raise ValueError(
      f"scores must be finite, not empty and of the right rank; got shape {score.shape}"
    )
  return score


def _bootstrap(x, axes, level, seed):
  """(mean, low, high, p) of the mean of x, resampling the means along each of `axes` independently of the others."""
  if not 0 < level < 1:
    raise ValueError(f"level={level} must lie between 0 and 1")
  mean = float(x.mean())
  parts = [x.mean(axis=tuple(i for i in range(x.ndim) if i != axis)) for axis in axes]
  parts = [part for part in parts if len(part) > 1]
  if not parts:
    return mean, None, None, None
  variance = [part.var(ddof=1) / len(part) for part in parts]
  total = sum(variance)
  # all equal up to rounding: only the signs speak
  if math.sqrt(total) <= 1e-12 * max(1.0, abs(mean)):
    return mean, mean, mean, 1.0 if mean == 0 else 2.0 ** (1 - max(len(part) for part in parts))
  freedom = total**2 / sum(v**2 / (len(part) - 1) for v, part in zip(variance, parts))
  stretch = math.sqrt(
    total / sum(v * (len(part) - 1) / len(part) for v, part in zip(variance, parts))
  )

  rng = np.random.default_rng(seed)
  deviation = sum(
    np.concatenate(
      [
        part[rng.integers(len(part), size=(_CHUNK, len(part)))].mean(axis=1)
        for _ in range(DRAWS // _CHUNK)
      ]
    )
    - part.mean()
    for part in parts
  )

  def interval(outside):
    widen = stretch * scipy.special.stdtrit(freedom, outside / 2) / scipy.special.ndtri(outside / 2)
    return mean + widen * np.quantile(deviation, [outside / 2, 1 - outside / 2])

  low, high = interval(1 - level)
  # the least that the draws can resolve; halve towards the interval that just touches 0
  p_value, most = 2 / (1 + DRAWS), 1.0
  for _ in range(20):
    middle = (p_value + most) / 2
    low_m, high_m = interval(middle)
    p_value, most = (middle, most) if low_m <= 0 <= high_m else (p_value, middle)
  return mean, float(low), float(high), most
