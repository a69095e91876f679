"""Computes the numbers that are reported (avg@k, pass@k, discovery@k), and how sure of them we are.

Questions are the unit of resampling, since responses to one question are alike. The same inputs
and seed give the same bits.

Intervals are percentile bootstrap intervals of 10,000 draws. Their deviations from the mean are
widened by sqrt(n/(n-1)) and by the ratio of Student's to the normal quantile. Plain intervals are
too narrow by just these factors (Hesterberg 2014, arXiv:1411.5279, 4.3.3), which matters for 5
seeds. Hesterberg moves the quantile instead; with few values that stops at the extreme draw and
covers too little.

Where all scores are equal the width is zero: none of 20 solved shows [0, 0], which does not prove
that none can be.

Errors: ValueError for scores that are empty, not finite or (where an interval is cut to it) outside
[0, 1], for k outside 1..n, and for c outside 0..n. None stands for a bound or a p-value that one
sample cannot give.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.special

DRAWS = 10_000
_CHUNK = 500  # draws held in memory at once


class Interval(NamedTuple):
  """A mean with the bounds of its interval."""

  mean: float
  low: float | None  # None: one question says nothing about the spread
  high: float | None


class Difference(NamedTuple):
  """A difference of means with the bounds of its interval, and a test of whether it is zero."""

  difference: float  # mean of a minus mean of b
  low: float | None
  high: float | None
  p_value: float | None  # two-sided; the difference is zero under the null


def mean_interval(score_Q, *, level=0.95, seed=0) -> Interval:
  """Returns the mean over questions, with an interval (cut to [0, 1]) that resamples questions.

  score_Q[q] may itself be a mean over responses.
  """
  score_Q = _finite(score_Q, ndim=1)
  if score_Q.min() < 0 or score_Q.max() > 1:
    raise ValueError(f"scores must lie in [0, 1]; got {score_Q.min()} to {score_Q.max()}")
  mean, low, high, _ = _bootstrap(score_Q, [0], level, seed)
  if low is None:
    return Interval(mean, None, None)
  return Interval(mean, max(low, 0.0), min(high, 1.0))


def avg_at_k(score_QG, *, level=0.95, seed=0) -> Interval:
  """Returns the mean score of k = G responses a question.

  The average is over responses, then over questions. Questions may differ in their responses.
  """
  score_Q = [_finite(score_G, ndim=1).mean() for score_G in score_QG]
  return mean_interval(score_Q, level=level, seed=seed)


def pass_at_k(n, c, k):
  """Returns the unbiased probability that one of k responses is right, if c of n sampled ones are.

  This is 1 - C(n-c, k) / C(n, k), correctly rounded (arXiv:2107.03374 eq. 1). Scalars give a
  float; arrays broadcast and give one value a question, whose mean is pass@k.
  """
  value = np.vectorize(_pass_at_k, otypes=[float])(n, c, k)
  return float(value) if value.ndim == 0 else value


def _pass_at_k(n, c, k) -> float:
  n, c, k = int(n), int(c), int(k)
  if not (1 <= k <= n and 0 <= c <= n):
    raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n; got n={n}, c={c}, k={k}")
  ways = math.comb(n, k)
  # Whole numbers until the one division, so nothing cancels.
  return (ways - math.comb(n - c, k)) / ways


def discovery_at_k(first_success, k):
  """Returns the share of runs whose first success came within k attempts.

  first_success: any shape (runs, or questions x seeds), attempts counted from 1. None, inf or NaN
  is a run that never succeeded: it counts as not found at every k, however early it was stopped.
  k: a number or an array of numbers (a curve); the result has its shape.
  """
  # None becomes NaN, and NaN <= k is false.
  first_X = np.array(first_success, dtype=float).ravel()
  if not first_X.size:
    raise ValueError("discovery@k of no runs")
  if np.any(first_X < 1):
    raise ValueError(f"attempts are counted from 1; got {np.nanmin(first_X)}")
  value = np.mean(first_X <= np.asarray(k, dtype=float)[..., None], axis=-1)
  return float(value) if value.ndim == 0 else value


def kaplan_meier(first_success, attempts, k):
  """Estimates the probability of a success within k attempts where runs may have ended early.

  This is 1 - prod over j <= k of (1 - successes at j / runs still going at j). A run without
  success is censored after its attempts. With every unsolved run observed up to k it is
  discovery_at_k. Beyond the last attempt of any run the estimate stays where it was.

  first_success: as in discovery_at_k, any shape. attempts: how many each run made.
  """
  first_X = np.array(first_success, dtype=float).ravel()
  attempts_X = np.array(attempts, dtype=float).ravel()
  if not first_X.size or first_X.shape != attempts_X.shape:
    raise ValueError(
      "kaplan_meier needs as many numbers of attempts as runs, and at least one; "
      f"got {first_X.size} and {attempts_X.size}"
    )
  end_X = np.where(np.isfinite(first_X), first_X, attempts_X)
  survival = 1.0
  for j in np.unique(first_X[np.isfinite(first_X) & (first_X <= k)]):
    survival *= 1.0 - np.sum(first_X == j) / np.sum(end_X >= j)
  return float(1.0 - survival)


def paired_bootstrap(a_QS, b_QS, *, level=0.95, seed=0) -> Difference:
  """Returns mean(a) - mean(b) over the same questions and seeds, with interval and p-value.

  a_QS, b_QS: scores, question x seed (one seed: [Q] or [Q, 1]). Questions are paired, and so is
  seed s of a with seed s of b.

  Each draw resamples the questions, and the seeds with them. The per-question means and the
  per-seed means of a - b are drawn independently, and their deviations are added. That is right
  when a seed is one training run scored on every question: all questions share its luck, which
  drawing seeds anew in each question would miss. It errs on the wide side when each question has
  seeds of its own, since the noise of single cells is then counted twice.

  Student's quantile has Satterthwaite's degrees of freedom, so that five seeds are not taken for
  many. The two-sided p-value is the level at which the interval just touches 0, and never below
  2/10,001. Where all differences are equal it is the sign test's, 2^(1-n).
  """
  a_QS, b_QS = _finite(a_QS), _finite(b_QS)
  if a_QS.shape != b_QS.shape or a_QS.ndim not in (1, 2):
    raise ValueError(
      f"paired scores must both be questions x seeds; got shapes {a_QS.shape} and {b_QS.shape}"
    )
  return Difference(*_bootstrap(a_QS - b_QS, range(a_QS.ndim), level, seed))


def _finite(score, ndim=None):
  """Returns scores as an array. ValueError where they are unusable or not of rank `ndim`."""
  score = np.asarray(score, dtype=float)
  if not score.size or not np.all(np.isfinite(score)) or ndim not in (None, score.ndim):
    raise ValueError(
      f"scores must be finite, not empty and of the right rank; got shape {score.shape}"
    )
  return score


def _bootstrap(x, axes, level, seed):
  """Returns (mean, low, high, p) of the mean of x.

  The means along each of `axes` are resampled independently of the others. p is two-sided, of a
  mean of zero. One sample gives None for all but the mean.
  """
  if not 0 < level < 1:
    raise ValueError(f"level={level} must lie between 0 and 1")
  mean = float(x.mean())
  marginals = [x.mean(axis=tuple(i for i in range(x.ndim) if i != axis)) for axis in axes]
  marginals = [marginal for marginal in marginals if len(marginal) > 1]
  if not marginals:
    return mean, None, None, None
  variances = [marginal.var(ddof=1) / len(marginal) for marginal in marginals]
  variance = sum(variances)
  # All equal up to rounding: only the signs speak.
  if math.sqrt(variance) <= 1e-12 * max(1.0, abs(mean)):
    p_value = 1.0 if mean == 0 else 2.0 ** (1 - max(len(marginal) for marginal in marginals))
    return mean, mean, mean, p_value

  counts = [len(marginal) for marginal in marginals]
  # Satterthwaite's degrees of freedom; and by how much the plain draws vary too little.
  freedom = variance**2 / sum(v**2 / (n - 1) for v, n in zip(variances, counts, strict=True))
  stretch = math.sqrt(
    variance / sum(v * (n - 1) / n for v, n in zip(variances, counts, strict=True))
  )
  rng = np.random.default_rng(seed)
  deviation = sum(_resampled(marginal, rng) - marginal.mean() for marginal in marginals)

  def interval(outside):
    """Returns (low, high) with a probability of `outside` to lie beyond them."""
    student = scipy.special.stdtrit(freedom, outside / 2)
    widen = stretch * student / scipy.special.ndtri(outside / 2)
    return mean + widen * np.quantile(deviation, [outside / 2, 1 - outside / 2])

  low, high = interval(1 - level)
  return mean, float(low), float(high), _p_value(interval)


def _resampled(values, rng):
  """Returns the means of DRAWS resamples of the values."""
  n = len(values)
  chunks = [values[rng.integers(n, size=(_CHUNK, n))].mean(axis=1) for _ in range(DRAWS // _CHUNK)]
  return np.concatenate(chunks)


def _p_value(interval):
  """Returns the level `outside` at which interval(outside) just touches 0, found by bisection."""
  least, most = 2 / (1 + DRAWS), 1.0  # the least is what the draws can resolve
  for _ in range(20):
    middle = (least + most) / 2
    low, high = interval(middle)
    if low <= 0 <= high:
      least = middle
    else:
      most = middle
  return most
