"""What the reported numbers are: avg@k, pass@k, discovery@k, and how sure of them we are.

Scores are in [0, 1] unless a caller says otherwise; questions are the unit of resampling, since responses to one question are alike.

Intervals are percentile bootstrap intervals of 10,000 draws, with the "expanded" quantiles of Hesterberg 2014 (arXiv:1411.5279, 4.3.3):
plain percentile intervals are too narrow by sqrt((n-1)/n) and by normal instead of Student tails, which matters for 5 seeds. They never leave
the range of the data. Where all scores are equal the width is zero: zero of 20 solved shows [0, 0], which is not proof of zero.
The same inputs and seed give the same bits.

Errors: ValueError for empty or non-finite scores, k outside 1..n, c outside 0..n. None stands for a bound or p-value that one sample cannot give.
NumPy and SciPy only.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats

DRAWS = 10_000
_CHUNK = 500    # draws held in memory at once


class Interval(NamedTuple):
  mean: float
  low: float | None     # None: one question says nothing about the spread
  high: float | None


class Difference(NamedTuple):
  difference: float       # mean of a minus mean of b
  low: float | None
  high: float | None
  p_value: float | None   # two-sided; the difference is zero under the null


def mean_interval(score_Q, *, level=0.95, seed=0) -> Interval:
  """Mean over questions, with a bootstrap interval that resamples questions. score_Q[q] may itself be a mean over responses."""
  mean, low, high, _ = _bootstrap(_finite(score_Q, ndim=1), [0], level, seed)
  return Interval(mean, low, high)


def avg_at_k(score_QG, *, level=0.95, seed=0) -> Interval:
  """Mean score of k = G responses a question: an average over responses, then over questions. Rows may differ in length."""
  return mean_interval([_finite(score_G, ndim=1).mean() for score_G in score_QG], level=level, seed=seed)


def pass_at_k(n, c, k):
  """Unbiased probability that one of k responses is right, c of n sampled ones being right (arXiv:2107.03374 eq. 1).

  1 - C(n-c, k) / C(n, k), correctly rounded. Scalars give a float; arrays broadcast and give one value a question (their mean is pass@k).
  """
  def one(n, c, k):
    n, c, k = int(n), int(c), int(k)
    if not (1 <= k <= n and 0 <= c <= n):
      raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n; got n={n}, c={c}, k={k}")
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways    # whole numbers until the one division, so no cancellation
  value = np.vectorize(one, otypes=[float])(n, c, k)
  return float(value) if value.ndim == 0 else value


def discovery_at_k(first_success, k):
  """Share of runs whose first success came within k attempts: P(first success <= k).

  first_success: any shape (runs, or questions x seeds), attempts counted from 1; None, inf or NaN is a run that never succeeded and counts as not
  found at every k, however early it was stopped. k: a number or an array of numbers (a curve); the result has its shape.
  """
  first_X = np.array(first_success, dtype=float).ravel()    # None becomes NaN, which is <= nothing
  if not first_X.size:
    raise ValueError("discovery@k of no runs")
  if np.any(first_X < 1):
    raise ValueError(f"attempts are counted from 1; got {np.nanmin(first_X)}")
  value = np.mean(first_X <= np.asarray(k, dtype=float)[..., None], axis=-1)
  return float(value) if value.ndim == 0 else value


def paired_bootstrap(a_QS, b_QS, *, level=0.95, seed=0) -> Difference:
  """mean(a) - mean(b) over the same questions and as many seeds, with an interval and a two-sided p-value.

  a_QS, b_QS: scores, question x seed (one seed: [Q] or [Q, 1]). Questions are paired; so is seed s of a with seed s of b. Each draw resamples
  the questions, and the seeds with them: the per-question means and the per-seed means of a - b are drawn independently and their deviations added.
  That is right when a seed is one training run scored on every question (its luck is shared by all of them, and drawing seeds anew in
  each question would miss it), and errs on the wide side when each question has seeds of its own: the noise of single cells is then counted twice.
  Tails are Student's with Satterthwaite's degrees of freedom, so that five seeds are not taken for many. p < 1 - level exactly when the
  interval leaves out 0, up to the resolution of the draws.
  """
  a_QS, b_QS = _finite(a_QS), _finite(b_QS)
  if a_QS.shape != b_QS.shape or a_QS.ndim not in (1, 2):
    raise ValueError(f"paired scores must both be questions x seeds; got shapes {a_QS.shape} and {b_QS.shape}")
  return Difference(*_bootstrap(a_QS - b_QS, range(a_QS.ndim), level, seed))


def _finite(score, ndim=None):
  score = np.asarray(score, dtype=float)
  if not score.size or not np.all(np.isfinite(score)) or ndim not in (None, score.ndim):
    raise ValueError(f"scores must be finite, not empty and of the right rank; got shape {score.shape}")
  return score


def _bootstrap(x, axes, level, seed):
  """(mean, low, high, p) of the mean of x, resampling each of `axes` (the means along it) independently of the others."""
  if not 0 < level < 1:
    raise ValueError(f"level={level} must lie between 0 and 1")
  mean = float(x.mean())
  parts = [x.mean(axis=tuple(i for i in range(x.ndim) if i != axis)) for axis in axes]
  parts = [part for part in parts if len(part) > 1]
  if not parts:
    return mean, None, None, None
  rng = np.random.default_rng(seed)
  draws = mean + sum(np.concatenate([part[rng.integers(len(part), size=(_CHUNK, len(part)))].mean(axis=1) - part.mean()
                                     for _ in range(DRAWS // _CHUNK)]) for part in parts)

  variance = [part.var(ddof=1) / len(part) for part in parts]
  total = sum(variance)
  # Equal scores have no variance to weigh: rounding must not pass for spread.
  if total <= (1e-12 * max(1.0, abs(mean))) ** 2:
    freedom, stretch = sum(len(part) - 1 for part in parts), 1.0
    draws = np.full(DRAWS, mean)
  else:
    freedom = total**2 / sum(v**2 / (len(part) - 1) for v, part in zip(variance, parts))
    stretch = math.sqrt(total / sum(v * (len(part) - 1) / len(part) for v, part in zip(variance, parts)))
  tail = scipy.stats.norm.cdf(stretch * scipy.stats.t.ppf((1 - level) / 2, freedom))
  low, high = np.quantile(draws, [tail, 1 - tail])
  side = (1 + min(np.sum(draws <= 0), np.sum(draws >= 0))) / (1 + DRAWS)
  p_value = min(1.0, 2 * scipy.stats.t.sf(scipy.stats.norm.isf(side) / stretch, freedom))
  return mean, float(low), float(high), float(p_value)
