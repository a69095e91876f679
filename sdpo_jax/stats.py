"""Computes the numbers that are reported (avg@k, pass@k, discovery@k), and how sure of them we are.

Which population a number speaks of is chosen by the shape of the scores:

  [Q]     one value a question: questions at large, answered by these very runs
  [S]     one value a seed: training runs at large, on these very questions
  [Q, S]  training runs at large on questions at large; seed s is one run scored on every question

Where one is nested in the other, pass the means of the outer one: its values hold both spreads.
That is [Q] where each question has its own runs, and [S] where each run has its own questions.

Intervals are percentile bootstrap intervals of 10,000 draws. Their deviations from the mean are
widened by sqrt(n/(n-1)) and by the ratio of Student's to the normal quantile. Plain intervals are
too narrow by just these factors (Hesterberg 2014, arXiv:1411.5279, 4.3.3), which matters for 5
seeds. Hesterberg moves the quantile instead; with few values that stops at the extreme draw and
covers too little. The same inputs and seed give the same bits.

With [Q, S] the means of the questions and those of the seeds are drawn independently, and their
deviations are added. Both hold the noise of single cells, which is taken out of the questions'
(of the seeds', if there are fewer questions than seeds): it would be counted twice. Drawing rows
and columns of the table would count it three times (Owen 2007, arXiv:0712.1111). Drawing questions
anew within each drawn seed would miss that all seeds share them.

Where all scores are equal the width is zero: none of 20 solved shows [0, 0], which does not prove
that none can be.

Errors: ValueError for scores that are empty, not finite or (where an interval is cut to it) outside
[0, 1], for k outside 1..n, for c outside 0..n, and for a level, power or cost without a meaning.
None stands for a bound or a p-value that one sample cannot give.
"""

from collections import Counter
import math
from typing import NamedTuple

import numpy as np
import scipy  # loads its parts when they are first used: scipy.stats takes a second

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


class CostRatio(NamedTuple):
  """How many times the cost of b it takes a to reach a target: the median over seeds."""

  ratio: float | None  # None: the median lies among seeds of which only bounds are known
  low: float  # 0 where these seeds give no lower bound
  high: float | None  # None where they give no upper bound
  censored_a: int  # seeds in which a did not reach the target
  censored_b: int


def mean_interval(score_X, *, level=0.95, seed=0) -> Interval:
  """Returns the mean of scores, with an interval that is cut to [0, 1].

  score_X: [Q], [S] or [Q, S], which differ in what the interval speaks of (see above). A score may
  itself be a mean over responses.
  """
  score_X = _finite(score_X, ndims=(1, 2))
  if score_X.min() < 0 or score_X.max() > 1:
    raise ValueError(f"scores must lie in [0, 1]; got {score_X.min()} to {score_X.max()}")
  mean, low, high, _ = _bootstrap(score_X, level, seed)
  if low is None:
    return Interval(mean, None, None)
  return Interval(mean, max(low, 0.0), min(high, 1.0))


def avg_at_k(score_QG, *, level=0.95, seed=0) -> Interval:
  """Returns the mean score of k = G responses a question.

  The average is over responses, then over questions. Questions may differ in their responses.
  """
  score_Q = [_finite(score_G, ndims=(1,)).mean() for score_G in score_QG]
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


def maj_at_k(answer_G, score_G, k) -> float:
  """Returns the expected score of the majority answer among k of the n responses to a question.

  The majority answer of k responses is the one that most of them give (self-consistency,
  arXiv:2203.11171). Responses without an answer (None) do not vote. Answers that tie share the
  win: one of them is drawn. Where nobody votes the score is 0.

  The expectation is over all subsets of k responses and over the draws of ties. It is exact, and
  unbiased as pass_at_k is. So maj@1 is avg@n. Drawing k responses with replacement, as is often
  done, is biased: it repeats responses.

  answer_G: hashable, equal where they are the same vote. score_G: of each response; an answer
  counts by the mean score of those that gave it. It takes about n k^2 operations on whole numbers
  for each answer that scores: milliseconds for 64 responses.
  """
  n = len(answer_G)
  score_G = _finite(score_G, ndims=(1,))
  if len(score_G) != n or not 1 <= k <= n:
    raise ValueError(f"maj@k needs a score an answer and 1 <= k <= n; got {len(score_G)}, {n}, {k}")
  votes = Counter(answer for answer in answer_G if answer is not None)
  expected = 0.0
  for answer, count in votes.items():
    score = np.mean([s for a, s in zip(answer_G, score_G) if a == answer])
    if score:
      rivals = [rival_count for rival, rival_count in votes.items() if rival != answer]
      silent = n - votes.total()
      expected += score * _share_won(count, rivals, silent, k)
  return float(expected)


def _share_won(count, rivals, silent, k) -> float:
  """Returns the share of the subsets of k responses that an answer wins, ties shared.

  count: responses that give this answer; rivals: those of each other answer; silent: without one.
  """
  won = 0.0
  subsets = math.comb(count + sum(rivals) + silent, k)
  for votes in range(1, min(count, k) + 1):
    # ways_XX[chosen, tied]: in how many ways the rivals looked at so far have `chosen` responses in
    # the subset, with none ahead and `tied` level. Whole numbers of any size.
    rest = k - votes
    ways_XX = np.zeros((rest + 1, rest // votes + 1), dtype=object)
    ways_XX[0, 0] = 1
    for rival in rivals:
      before_XX, ways_XX = ways_XX, ways_XX.copy()
      for j in range(1, min(rival, votes, rest) + 1):
        new_XX = math.comb(rival, j) * before_XX[: rest + 1 - j]
        if j < votes:
          ways_XX[j:] += new_XX
        else:
          ways_XX[j:, 1:] += new_XX[:, :-1]
    for chosen, tied in zip(*np.nonzero(ways_XX)):
      ways = math.comb(count, votes) * ways_XX[chosen, tied] * math.comb(silent, rest - chosen)
      won += ways / subsets / (1 + tied)
  return won


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

  This is the project's test of two methods. a_QS, b_QS: scores, question x seed; or [Q], or [S],
  which speak of fewer populations (see above). Questions are paired, and so is seed s of a with
  seed s of b.

  Student's quantile has Satterthwaite's degrees of freedom, so that five seeds are not taken for
  many. The two-sided p-value is the level at which the interval just touches 0, and never below
  2/10,001. Where all differences are equal it is the sign test's, 2^(1-n).

  Where nothing differs it finds 3 to 7 % of differences at 5 %, for 5 seeds x 100 questions of
  avg@4, whichever of seeds and questions spread. Two or three seeds can give up to 12 %.
  """
  return Difference(*_bootstrap(_paired(a_QS, b_QS, ndims=(1, 2)), level, seed))


def sign_flip_test(a_X, b_X, *, seed=0) -> float:
  """Returns the two-sided p-value of a permutation test: methods change places within a pair.

  a_X, b_X: [S] or [Q], the paired means of the two methods. Every exchange of places is counted, or
  10,000 random ones where there are more. It assumes no distribution and no spread: only that
  either order of a pair is as likely, if the methods do not differ.

  The least p-value of n pairs is 2^(1-n): five seeds cannot show a difference at 5 %, six can.
  Flipping questions within seeds would not be exact: a seed's luck is in all of its questions.
  """
  return float(
    scipy.stats.permutation_test(
      (_paired(a_X, b_X, ndims=(1,)),),
      np.mean,
      permutation_type="samples",  # of one sample: its signs are flipped
      vectorized=True,
      n_resamples=DRAWS,
      batch=_CHUNK,
      rng=np.random.default_rng(seed),
    ).pvalue
  )


def holm(p_values):
  """Returns p-values adjusted for being a family: those <= alpha hold together at level alpha.

  Source: Holm 1979, with no assumption on how the tests depend on each other. Order is kept.
  """
  p_X = np.asarray(p_values, dtype=float)
  if p_X.ndim != 1 or not np.all((p_X >= 0) & (p_X <= 1)):
    raise ValueError(f"a family of p-values in [0, 1] is needed; got {p_values}")
  order_X = np.argsort(p_X)
  left_X = np.arange(len(p_X), 0, -1)  # hypotheses that are not yet rejected
  adjusted_X = np.empty_like(p_X)
  adjusted_X[order_X] = np.minimum(np.maximum.accumulate(left_X * p_X[order_X]), 1)
  return adjusted_X


def cost_to_target(cost_X, score_X, target) -> float | None:
  """Returns the cost at which a run's score first reaches the target; None if it never does.

  cost_X: generations, tokens or seconds up to each evaluation, not falling. Between evaluations
  the score is taken to lie on a straight line. A first evaluation that is good enough costs what
  was spent until then.
  """
  cost_X, score_X = _finite(cost_X, ndims=(1,)), _finite(score_X, ndims=(1,))
  if cost_X.shape != score_X.shape or np.any(np.diff(cost_X) < 0):
    raise ValueError("a curve needs a score at each cost, and costs that do not fall")
  good_X = score_X >= target
  if not good_X.any():
    return None
  i = int(np.argmax(good_X))
  if i == 0:
    return float(cost_X[0])
  share = (target - score_X[i - 1]) / (score_X[i] - score_X[i - 1])
  return float(cost_X[i - 1] + share * (cost_X[i] - cost_X[i - 1]))


def cost_ratio(a_S, b_S, *, end_a_S, end_b_S, level=0.9) -> CostRatio:
  """Returns the median over seeds of cost(a) / cost(b), with an interval; seeds are paired.

  a_S, b_S: cost_to_target of each seed, None where it was not reached. Then all that is known is
  that the cost exceeds end_a_S or end_b_S, what the run had spent at its last evaluation. Such a
  seed's ratio lies between two bounds, and so does that of two runs that were good enough before
  they had spent anything. Nothing is filled in, and no seed is left out.

  The interval is the sign test's, which needs no distribution: from the j-th smallest lower bound
  to the j-th largest upper bound. Five seeds give 93.75 % at most, from smallest to largest; a
  higher level than the seeds can give has no bounds.
  """
  _check_level(level)
  n = len(a_S)
  if not n or any(len(values_S) != n for values_S in (b_S, end_a_S, end_b_S)):
    raise ValueError("a ratio of costs needs both costs and both ends of each seed")
  least_a_S, most_a_S = _cost_bounds(a_S, end_a_S)
  least_b_S, most_b_S = _cost_bounds(b_S, end_b_S)
  with np.errstate(divide="ignore", invalid="ignore"):  # x / 0 is inf, and 0 / 0 may be anything
    low_S = np.sort(np.nan_to_num(least_a_S / most_b_S, nan=0.0, posinf=math.inf))
    high_S = np.sort(np.nan_to_num(most_a_S / least_b_S, nan=math.inf, posinf=math.inf))
  low_median, high_median = (
    float((ratio_S[(n - 1) // 2] + ratio_S[n // 2]) / 2) for ratio_S in (low_S, high_S)
  )
  low, high = 0.0, math.inf  # unless the seeds are enough
  for j in range(n // 2):  # as many values may lie beyond each bound as the level allows
    if 2 * scipy.special.bdtr(j, n, 0.5) <= 1 - level + 1e-12:
      low, high = float(low_S[j]), float(high_S[n - 1 - j])
  ratio = low_median if low_median == high_median else math.inf
  censored_a, censored_b = (int(np.isinf(most_S).sum()) for most_S in (most_a_S, most_b_S))
  ratio, high = (None if math.isinf(value) else value for value in (ratio, high))
  return CostRatio(ratio, low, high, censored_a, censored_b)


def _cost_bounds(cost_S, end_S):
  """Returns the least and the most that each seed's cost can be; None is a censored cost."""
  cost_S = np.array(cost_S, dtype=float)
  censored_S = np.isnan(cost_S)
  least_S = np.where(censored_S, _finite(end_S), cost_S)
  if np.any(least_S < 0):
    raise ValueError(f"costs are at least 0; got {least_S.min()}")
  return least_S, np.where(censored_S, math.inf, cost_S)


def detectable_effect(
  seeds, questions, samples, *, seed_sd, response_sd, question_sd=0.0, power=0.8, level=0.05
) -> float:
  """Returns the least difference of two methods that paired_bootstrap shows with this power.

  Both methods have this budget: training runs, questions, and responses a question in each run.
  Spreads are standard deviations. seed_sd: of the score of one method's runs, had each been asked
  endlessly often. response_sd: of one response to a question, sqrt(p (1 - p)) for binary scores.
  question_sd: over questions, of the true difference between the methods.

  The test is taken for Student's, of which the bootstrap is a close copy. Only a difference of the
  right sign counts as shown. One seed shows nothing of how runs spread, and one question nothing
  of questions: that spread must then be 0, and the result speaks of this run or question alone.
  """
  _check_level(level)
  if not level < power < 1:
    raise ValueError(f"power={power} must lie between level={level} and 1")
  if min(seeds, questions, samples) < 1 or seeds == questions == 1:
    raise ValueError(f"no effect is shown by {seeds=}, {questions=}, {samples=}")
  if (seeds == 1 and seed_sd) or (questions == 1 and question_sd):
    raise ValueError("one seed or question does not show its spread, which must then be 0")
  variances = [2 * seed_sd**2 / seeds, question_sd**2 / questions]
  # The noise of single responses stays with the fewer values, as in the test.
  noisy = 1 if seeds == 1 or 1 < questions < seeds else 0
  variances[noisy] += 2 * response_sd**2 / (seeds * questions * samples)
  if not sum(variances):
    return 0.0
  # One seed or question has no variance here, so any count will do.
  freedom = _satterthwaite(variances, [max(seeds, 2), max(questions, 2)])
  critical = scipy.special.stdtrit(freedom, 1 - level / 2)

  def excess_power(noncentrality):
    return 1 - scipy.special.nctdtr(freedom, noncentrality, critical) - power

  # The closed inverse has eight digits; it brackets the root.
  most = 2 * scipy.special.nctdtrinc(freedom, 1 - power, critical)
  return float(math.sqrt(sum(variances)) * scipy.optimize.brentq(excess_power, 0, most))


def _paired(a_X, b_X, ndims):
  """Returns the differences of paired scores."""
  a_X, b_X = _finite(a_X), _finite(b_X)
  if a_X.shape != b_X.shape or a_X.ndim not in ndims:
    raise ValueError(
      f"paired scores must both be questions x seeds; got shapes {a_X.shape} and {b_X.shape}"
    )
  return a_X - b_X


def _finite(score, ndims=None):
  """Returns scores as an array. ValueError where they are unusable or not of these ranks."""
  score = np.asarray(score, dtype=float)
  wrong_rank = ndims is not None and score.ndim not in ndims
  if not score.size or not np.all(np.isfinite(score)) or wrong_rank:
    raise ValueError(
      f"scores must be finite, not empty and of the right rank; got shape {score.shape}"
    )
  return score


def _check_level(level):
  if not 0 < level < 1:
    raise ValueError(f"level={level} must lie between 0 and 1")


def _bootstrap(x, level, seed):
  """Returns (mean, low, high, p) of the mean of x, which is [Q], [S] or [Q, S].

  p is two-sided, of a mean of zero. One sample gives None for all but the mean.
  """
  _check_level(level)
  mean = float(x.mean())
  marginals = [x.mean(axis=tuple(i for i in range(x.ndim) if i != axis)) for axis in range(x.ndim)]
  marginals = [marginal for marginal in marginals if len(marginal) > 1]
  if not marginals:
    return mean, None, None, None
  counts = [len(marginal) for marginal in marginals]
  drawn_variances = [marginal.var(ddof=1) / len(marginal) for marginal in marginals]
  variances = drawn_variances
  if len(marginals) == 2:
    variances = _without_twice_the_cells(x, drawn_variances)
  variance = sum(variances)
  # All equal up to rounding: only the signs speak.
  if math.sqrt(variance) <= 1e-12 * max(1.0, abs(mean)):
    p_value = 1.0 if mean == 0 else 2.0 ** (1 - max(counts))
    return mean, mean, mean, p_value

  freedom = _satterthwaite(variances, counts)
  # By how much the plain draws vary too little.
  stretch = math.sqrt(
    variance / sum(v * (n - 1) / n for v, n in zip(variances, counts, strict=True))
  )
  rng = np.random.default_rng(seed)
  deviation = 0.0
  for marginal, drawn, kept in zip(marginals, drawn_variances, variances):
    shrink = 1.0 if kept == drawn else math.sqrt(kept / drawn)
    deviation = deviation + shrink * (_resampled(marginal, rng) - marginal.mean())

  def interval(outside):
    """Returns (low, high) with a probability of `outside` to lie beyond them."""
    student = scipy.special.stdtrit(freedom, outside / 2)
    widen = stretch * student / scipy.special.ndtri(outside / 2)
    return mean + widen * np.quantile(deviation, [outside / 2, 1 - outside / 2])

  low, high = interval(1 - level)
  return mean, float(low), float(high), _p_value(interval)


def _without_twice_the_cells(x_QS, variances):
  """Returns the variances of the mean by questions and by seeds, the noise of cells in only one.

  It stays with the fewer of them, whose variance is the less sure: were it taken out there, the
  rest would often be next to nothing by chance, and chance would then be taken for an effect.
  """
  Q, S = x_QS.shape
  residual_QS = x_QS - x_QS.mean(0) - x_QS.mean(1, keepdims=True) + x_QS.mean()
  cells = (residual_QS**2).sum() / ((Q - 1) * (S - 1)) / (Q * S)
  by_question, by_seed = variances
  # Seeds may score alike by chance, where scores are coarse: that does not show that they are.
  if min(by_question, by_seed) <= 1e-24:
    return [by_question, by_seed]
  if S <= Q:
    return [max(by_question - cells, 0.0), by_seed]
  return [by_question, max(by_seed - cells, 0.0)]


def _satterthwaite(variances, counts):
  """Returns the degrees of freedom of a sum of variances, each known from a count of values."""
  return sum(variances) ** 2 / sum(v**2 / (n - 1) for v, n in zip(variances, counts, strict=True))


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
