"""Tests the statistics of reported numbers against hand-worked values and simulated coverage."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from sdpo_jax import stats


def test_pass_at_k_counts_every_choice_of_k_responses():
  for n in range(1, 7):
    for c in range(n + 1):
      right = [True] * c + [False] * (n - c)
      for k in range(1, n + 1):
        choices = [any(choice) for choice in itertools.combinations(right, k)]
        assert stats.pass_at_k(n, c, k) == np.mean(choices)


def test_pass_at_k_is_the_hypergeometric_chance_of_a_right_one():
  n, c, k = (axis.ravel() for axis in np.mgrid[1:40, 0:40, 1:40])
  possible = (c <= n) & (k <= n)
  n, c, k = n[possible], c[possible], k[possible]
  np.testing.assert_allclose(
    stats.pass_at_k(n, c, k), scipy.stats.hypergeom.sf(0, n, c, k), rtol=0, atol=1e-9
  )


def test_pass_at_k_is_unbiased():
  p, n, k = 0.15, 12, 4  # the expectation over c of the estimate is the true 1 - (1-p)^k
  expectation = sum(
    math.comb(n, c) * p**c * (1 - p) ** (n - c) * stats.pass_at_k(n, c, k) for c in range(n + 1)
  )
  assert expectation == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_pass_at_k_large_broadcast_and_wrong():
  assert stats.pass_at_k(100_000, 1, 1) == 1e-5
  assert stats.pass_at_k(5000, 1, 2750) == 0.55
  np.testing.assert_array_equal(stats.pass_at_k([4, 4, 8], [0, 4, 2], 1), [0, 1, 0.25])
  for n, c, k in [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)]:
    with pytest.raises(ValueError, match="pass@k needs"):
      stats.pass_at_k(n, c, k)


def majority_score(answer_G, score_G):
  """Returns the score of the most frequent answer of all responses; those that tie share it."""
  votes = [answer for answer in answer_G if answer is not None]
  if not votes:
    return 0.0
  most = max(votes.count(answer) for answer in votes)
  winners = {answer for answer in votes if votes.count(answer) == most}
  return np.mean([score_G[answer_G.index(answer)] for answer in winners])


@pytest.mark.parametrize("seed", range(12))
def test_maj_at_k_is_the_mean_over_all_subsets(seed):
  rng = np.random.default_rng(seed)
  n = int(rng.integers(1, 10))
  answer_G = [[None, "a", "b", "c", (1, 2)][i] for i in rng.integers(5, size=n)]
  worth = dict(zip(["a", "b", "c", (1, 2)], rng.random(4)))
  score_G = [worth.get(answer, 0.0) for answer in answer_G]
  for k in range(1, n + 1):
    subsets = itertools.combinations(range(n), k)
    brute = [majority_score([answer_G[i] for i in g], [score_G[i] for i in g]) for g in subsets]
    assert stats.maj_at_k(answer_G, score_G, k) == pytest.approx(np.mean(brute), abs=1e-12)


def test_maj_at_k_of_two_answers_is_hypergeometric():
  """More than half of k votes are right; half of them win half the time."""
  n, c, k = 500, 240, 100
  votes = scipy.stats.hypergeom(n, c, k)
  maj = stats.maj_at_k([1] * c + [0] * (n - c), [1] * c + [0] * (n - c), k)
  assert maj == pytest.approx(votes.sf(k // 2) + votes.pmf(k // 2) / 2, abs=1e-9)


def test_maj_at_k_by_hand_and_wrong():
  # Two of three votes for "a" in one of the three pairs; else "a" and "b" tie.
  assert stats.maj_at_k(["a", "a", "b"], [1, 1, 0], 2) == pytest.approx(2 / 3)
  assert stats.maj_at_k(["a", "a", "b"], [1, 1, 0], 3) == 1
  assert stats.maj_at_k([None, None, None, "a"], [0, 0, 0, 1], 4) == 1  # who is silent has no vote
  assert stats.maj_at_k([None, None], [0, 0], 2) == 0
  assert stats.maj_at_k(["a", "b", None, "a"], [1, 0, 0, 1], 1) == 0.5  # avg@n
  # Responses with one answer that are judged unlike: the answer counts by their mean.
  assert stats.maj_at_k(["a", "a"], [1, 0], 2) == 0.5
  for answers, scores, k in ((["a"], [1], 2), (["a"], [1], 0), (["a", "b"], [1], 1)):
    with pytest.raises(ValueError, match="maj@k needs"):
      stats.maj_at_k(answers, scores, k)


def test_discovery_counts_runs_that_never_succeed():
  first = [[1, 3, None], [7, math.inf, 3]]
  assert stats.discovery_at_k(first, 2) == 1 / 6
  np.testing.assert_array_equal(
    stats.discovery_at_k(first, [1, 3, 6, 7, 10**6]), np.array([1, 3, 3, 4, 4]) / 6
  )
  assert stats.discovery_at_k([None, None], 100) == 0
  with pytest.raises(ValueError, match="counted from 1"):
    stats.discovery_at_k([0, 1], 3)
  with pytest.raises(ValueError, match="no runs"):
    stats.discovery_at_k([], 3)


def test_kaplan_meier_of_runs_that_ended_early_by_hand():
  """Successes at 2, 4 and 4; two runs without one ended after 1 and 3 attempts, one made all 5."""
  first, attempts = [2, 4, 4, None, None, None], [2, 4, 4, 1, 3, 5]
  # At 2: one of the 5 still going. At 4: two of the 3 still going (the run that ended after 3 has
  # left).
  for k, survival in ((1, 1.0), (2, 4 / 5), (3, 4 / 5), (4, 4 / 5 * 1 / 3), (5, 4 / 15)):
    assert stats.kaplan_meier(first, attempts, k) == pytest.approx(1 - survival)
  # all observed to the end
  assert stats.kaplan_meier(first, [5] * 6, 5) == pytest.approx(stats.discovery_at_k(first, 5))


def test_discovery_of_independent_attempts_is_pass_at_k():
  rng = np.random.default_rng(0)
  p, k = 0.1, 8
  first = rng.geometric(p, size=20_000)
  assert stats.discovery_at_k(first, k) == pytest.approx(
    1 - (1 - p) ** k, abs=4 * 0.5 / math.sqrt(len(first))
  )


def test_avg_at_k_averages_questions_not_responses():
  result = stats.avg_at_k([[1, 1, 1, 1], [0, 0], [1, 0]])
  assert result.mean == pytest.approx(0.5)
  assert 0 <= result.low < result.mean < result.high <= 1


def test_interval_is_exact_on_two_questions():
  # Draws of the mean of {0, 1} are 0, 1/2, 1 with probability 1/4, 1/2, 1/4; one degree of freedom
  # widens the outer ones past [0, 1].
  assert stats.mean_interval([0.0, 1.0], level=0.95) == stats.Interval(0.5, 0.0, 1.0)
  assert stats.mean_interval([0.0, 1.0], level=0.1) == stats.Interval(0.5, 0.5, 0.5)


def test_single_and_equal_scores():
  assert stats.mean_interval([0.25]) == stats.Interval(0.25, None, None)
  assert stats.mean_interval([0.3] * 7) == stats.Interval(
    pytest.approx(0.3), pytest.approx(0.3), pytest.approx(0.3)
  )
  assert stats.paired_bootstrap([[1.0]], [[0.0]]) == stats.Difference(1.0, None, None, None)
  same = stats.paired_bootstrap([[0.1, 0.3], [0.2, 1]], [[0.1, 0.3], [0.2, 1]])
  assert same == stats.Difference(0.0, 0.0, 0.0, 1.0)
  # Two equal differences are weak evidence, many are strong.
  assert stats.paired_bootstrap([1, 1], [0, 0]).p_value > 0.1
  assert stats.paired_bootstrap([1] * 30, [0] * 30).p_value < 0.01


def test_bad_scores_are_refused():
  for scores in ([], [[[0.0, 1.0]]], [0.5, math.nan]):
    with pytest.raises(ValueError, match="scores must be"):
      stats.mean_interval(scores)
  with pytest.raises(ValueError, match=r"\(2, 1\) and \(1, 2\)"):
    stats.paired_bootstrap([[1], [2]], [[1, 2]])
  with pytest.raises(ValueError, match=r"in \[0, 1\]; got 0.0 to 2.0"):
    stats.mean_interval([0, 2])
  with pytest.raises(ValueError, match="level=95"):
    stats.mean_interval([0, 1], level=95)


def test_same_seed_same_bits_and_order_of_questions_hardly_matters():
  score_Q = np.random.default_rng(0).random(40)
  assert stats.mean_interval(score_Q, seed=3) == stats.mean_interval(score_Q, seed=3)
  there, back = stats.mean_interval(score_Q), stats.mean_interval(score_Q[::-1])
  assert there.low == pytest.approx(back.low, abs=0.01) and there.high == pytest.approx(
    back.high, abs=0.01
  )


def test_interval_covers_the_true_mean(monkeypatch):
  monkeypatch.setattr(stats, "DRAWS", 2000)
  monkeypatch.setattr(stats, "_p_value", lambda interval: None)  # not looked at here, and slow
  rng, trials = np.random.default_rng(1), 600
  for Q, p in [(12, 0.5), (60, 0.3)]:
    hits = 0
    for trial in range(trials):
      # four responses a question, questions of all difficulties
      score_Q = rng.binomial(4, rng.beta(2 * p, 2 * (1 - p), size=Q)) / 4
      result = stats.mean_interval(score_Q, seed=trial)
      hits += result.low <= p <= result.high
    assert 0.92 <= hits / trials <= 0.98, (Q, p, hits / trials)


def paired_scores(rng, Q, S, gap, run_sd, cell_sd):
  """Returns scores in which a training run's luck (run_sd) is shared by all questions.

  Each cell has noise of its own besides (cell_sd).
  """
  b_QS = (
    rng.normal(0.5, 0.3, (Q, 1)) + rng.normal(0, run_sd, (1, S)) + rng.normal(0, cell_sd, (Q, S))
  )
  a_QS = (
    b_QS
    + gap
    + rng.normal(0, 0.2, (Q, 1)) * (Q > 1)
    + rng.normal(0, run_sd, (1, S))
    + rng.normal(0, cell_sd, (Q, S))
  )
  return a_QS, b_QS


@pytest.mark.parametrize(
  "Q,S,run_sd,cell_sd,least,most",
  [
    (40, 1, 0.0, 0.1, 0.92, 0.98),  # one seed: questions alone
    (40, 5, 0.0, 0.1, 0.92, 0.98),  # noise of single cells alone
    (5, 40, 0.1, 0.1, 0.92, 0.98),  # fewer questions than seeds
    (200, 5, 0.1, 0.1, 0.92, 0.98),  # the luck of five training runs dominates
    (1, 5, 0.1, 0.1, 0.92, 0.98),  # seeds alone
  ],
)
def test_paired_bootstrap_covers_and_does_not_cry_wolf(
  monkeypatch, Q, S, run_sd, cell_sd, least, most
):
  monkeypatch.setattr(stats, "DRAWS", 1000)
  rng, trials, gap = np.random.default_rng(2), 300, 0.07
  covered = false_alarms = 0
  for trial in range(trials):
    a_QS, b_QS = paired_scores(rng, Q, S, gap, run_sd, cell_sd)
    result = stats.paired_bootstrap(a_QS, b_QS, seed=trial)
    covered += result.low <= gap <= result.high
    false_alarms += stats.paired_bootstrap(a_QS - gap, b_QS, seed=trial).p_value < 0.05
  assert least <= covered / trials <= most
  assert 1 - most <= false_alarms / trials <= 1 - least


def test_pairing_sees_what_separate_intervals_cannot():
  rng = np.random.default_rng(3)
  b_QS = rng.random((50, 3))
  a_QS = b_QS + 0.02 + rng.normal(0, 0.02, b_QS.shape)
  result = stats.paired_bootstrap(a_QS, b_QS)
  assert result.low > 0 and result.p_value < 0.01
  separate = stats.mean_interval(a_QS.mean(1)).low, stats.mean_interval(b_QS.mean(1)).high
  assert separate[0] < separate[1]


def test_p_value_and_interval_agree():
  rng = np.random.default_rng(4)
  for _ in range(40):
    a_QS, b_QS = paired_scores(rng, 20, 3, 0.1, 0.02, 0.1)
    result = stats.paired_bootstrap(a_QS, b_QS)
    if abs(result.p_value - 0.05) > 0.003:
      assert (result.p_value < 0.05) == (result.low > 0 or result.high < 0)


# The design of the headline table: 5 seeds x 100 questions, avg@4 of binary rewards. The log-odds
# of a right response are a sum of effects, whose standard deviations are
#   question   how hard it is, for both methods
#   run        the luck of one training run
#   favour     how much a question suits one method more than the other
#   cell       how much a run's luck differs between questions
SPREADS = {
  "noise alone": dict(question=1.5, run=0.0, favour=0.0, cell=0.0),
  "cells": dict(question=1.5, run=0.0, favour=0.0, cell=0.5),
  "little luck": dict(question=1.5, run=0.1, favour=0.0, cell=0.3),
  "luck": dict(question=1.5, run=0.4, favour=0.0, cell=0.3),
  "little favour": dict(question=1.5, run=0.0, favour=0.3, cell=0.3),
  "favour": dict(question=1.5, run=0.0, favour=0.8, cell=0.3),
  "some of both": dict(question=1.5, run=0.2, favour=0.5, cell=0.3),
  "much of both": dict(question=1.5, run=0.4, favour=0.8, cell=0.3),
  "easy or hopeless": dict(question=3.0, run=0.2, favour=0.3, cell=0.3),
}
Q, S = 100, 5


def two_methods(rng, spread, log_odds_a=0.5, log_odds_b=0.5):
  """Returns avg@4 of two methods, question x seed."""
  question_Q1 = rng.normal(0, spread["question"], (Q, 1))
  favour_Q1 = rng.normal(0, spread["favour"], (Q, 1))
  scores = []
  for log_odds, sign in ((log_odds_a, 1), (log_odds_b, -1)):
    own_QS = rng.normal(0, spread["run"], (1, S)) + rng.normal(0, spread["cell"], (Q, S))
    odds_QS = np.exp(log_odds + question_Q1 + sign * favour_Q1 + own_QS)
    scores.append(rng.binomial(4, odds_QS / (1 + odds_QS)) / 4)
  return scores


def true_score(spread, log_odds):
  """Returns the mean score over all runs and questions: the effects add up to one normal."""
  points, weights = np.polynomial.hermite_e.hermegauss(80)
  sd = math.sqrt(sum(effect**2 for effect in spread.values()))
  return weights @ (1 / (1 + np.exp(-log_odds - sd * points))) / weights.sum()


# name, trials, draws, and by how much so few trials may be off
EFFORTS = [pytest.param(n, 300, 500, 0.02, id=n) for n in ("noise alone", "luck", "favour")] + [
  pytest.param(n, 4000, 1000, 0.0, id=f"{n}, many", marks=pytest.mark.slow) for n in SPREADS
]


@pytest.mark.parametrize("name,trials,draws,slack", EFFORTS)
def test_the_paired_test_finds_what_is_not_there_as_often_as_it_says(
  monkeypatch, name, trials, draws, slack
):
  monkeypatch.setattr(stats, "DRAWS", draws)
  rng = np.random.default_rng(5)
  found = 0
  for trial in range(trials):
    found += stats.paired_bootstrap(*two_methods(rng, SPREADS[name]), seed=trial).p_value < 0.05
  assert 0.03 - slack <= found / trials <= 0.07 + slack, found / trials


@pytest.mark.parametrize("name,trials,draws,slack", EFFORTS)
def test_intervals_of_seeds_and_questions_cover(monkeypatch, name, trials, draws, slack):
  monkeypatch.setattr(stats, "DRAWS", draws)
  monkeypatch.setattr(stats, "_p_value", lambda interval: None)  # not looked at here, and slow
  rng, spread = np.random.default_rng(6), SPREADS[name]
  score = true_score(spread, 0.5)
  gap = score - true_score(spread, 0.2)
  one = both = 0
  for trial in range(trials):
    a_QS, b_QS = two_methods(rng, spread, 0.5, 0.2)
    _, low, high = stats.mean_interval(a_QS, level=0.9, seed=trial)
    one += low <= score <= high
    difference = stats.paired_bootstrap(a_QS, b_QS, level=0.9, seed=trial)
    both += difference.low <= gap <= difference.high
  for covered in (one, both):
    assert 0.86 - slack <= covered / trials <= 0.96 + slack, (one / trials, both / trials)


@pytest.mark.parametrize("shape", [(200, 30), (30, 200), (30, 30)])
def test_the_noise_of_cells_is_counted_once(shape):
  """The width is Student's, of mean squares: the fewer's, and the others' beyond the residual."""
  rng = np.random.default_rng(14)
  for effect_sd in (0.0, 0.5):
    x_QS = rng.normal(0, 1, shape) + rng.normal(0, effect_sd, (shape[0], 1))
    x_QS += rng.normal(0, effect_sd, (1, shape[1]))
    squares = [shape[1] * x_QS.mean(1).var(ddof=1), shape[0] * x_QS.mean(0).var(ddof=1)]
    residual_QS = x_QS - x_QS.mean(1, keepdims=True) - x_QS.mean(0) + x_QS.mean()
    residual = (residual_QS**2).sum() / ((shape[0] - 1) * (shape[1] - 1))
    more = 0 if shape[0] >= shape[1] else 1
    squares[more] = max(squares[more] - residual, 0)
    freedom = sum(squares) ** 2 / sum(m**2 / (n - 1) for m, n in zip(squares, shape))
    width = 2 * scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(squares) / x_QS.size)
    result = stats.paired_bootstrap(x_QS, np.zeros(shape))
    assert result.high - result.low == pytest.approx(width, rel=0.05)


def test_means_of_the_outer_hold_the_spread_of_what_is_nested(monkeypatch):
  """Runs of one question each, and questions of one run each: their means are independent."""
  monkeypatch.setattr(stats, "DRAWS", 500)
  monkeypatch.setattr(stats, "_p_value", lambda interval: None)
  rng, trials = np.random.default_rng(7), 400
  for outer, inner in ((5, 100), (100, 5)):
    covered = 0
    for trial in range(trials):
      chance = np.clip(rng.normal(0.5, 0.1, (outer, 1)) + rng.normal(0, 0.1, (outer, inner)), 0, 1)
      means = rng.binomial(4, chance).mean(axis=1) / 4
      _, low, high = stats.mean_interval(means, level=0.9, seed=trial)
      covered += low <= 0.5 <= high
    assert 0.86 <= covered / trials <= 0.94


def test_seeds_that_score_alike_by_chance_prove_nothing():
  """Two seeds have the same mean, and questions no more spread than their cells."""
  a_QS = np.array([[1, 0], [0, 1]] * 20 + [[1, 1], [0, 0]] * 10, dtype=float)
  result = stats.paired_bootstrap(a_QS, np.full_like(a_QS, 0.49))
  assert result.low < 0 < result.high and result.p_value > 0.5


def test_sign_flips_are_all_counted():
  rng = np.random.default_rng(8)
  for n in (2, 5, 8):
    a_S, b_S = rng.normal(0.3, 1, n), rng.normal(0, 1, n)
    flipped = [np.dot(signs, a_S - b_S) for signs in itertools.product((1, -1), repeat=n)]
    p_value = np.mean(np.abs(flipped) >= abs(np.sum(a_S - b_S)) - 1e-12)
    assert stats.sign_flip_test(a_S, b_S) == pytest.approx(p_value, abs=1e-9)
  assert stats.sign_flip_test([1, 2, 3, 4, 5], [0] * 5) == 2 / 2**5  # no less with five seeds
  # The numbers 1..n have every sum of signed ranks: this is Wilcoxon's test.
  x_Q = np.array([3, -1, 4, 2, 5, 6, -7, 8, 9, 10])
  expected = scipy.stats.wilcoxon(x_Q, method="exact").pvalue
  assert stats.sign_flip_test(x_Q, 0 * x_Q) == pytest.approx(expected, abs=1e-9)


def test_many_signs_are_flipped_at_random_and_repeatably():
  a_Q = np.random.default_rng(9).normal(0.25, 1, 100)
  b_Q = np.zeros(100)
  p_value = stats.sign_flip_test(a_Q, b_Q)
  assert p_value == stats.sign_flip_test(a_Q, b_Q)
  assert p_value == pytest.approx(scipy.stats.ttest_rel(a_Q, b_Q).pvalue, abs=0.01)
  with pytest.raises(ValueError, match="paired scores"):
    stats.sign_flip_test([[1.0, 2.0]], [[1.0, 2.0]])


def test_sign_flips_find_what_is_not_there_as_often_as_they_say():
  rng, trials = np.random.default_rng(10), 400
  found = [
    stats.sign_flip_test(rng.normal(0, 1, 8), rng.normal(0, 1, 8)) < 0.05 for _ in range(trials)
  ]
  assert 0.02 <= np.mean(found) <= 0.08


def test_holm_is_the_closure_of_bonferroni():
  """The adjusted value of a hypothesis is the largest Bonferroni value of the sets it is in."""
  rng = np.random.default_rng(11)
  for n in (1, 2, 5):
    p_X = rng.random(n) ** 3
    closed = [
      max(
        min(1.0, len(family) * min(p_X[j] for j in family))
        for size in range(1, n + 1)
        for family in itertools.combinations(range(n), size)
        if i in family
      )
      for i in range(n)
    ]
    np.testing.assert_allclose(stats.holm(p_X), closed, rtol=0, atol=1e-12)


def test_holm_by_hand_and_wrong():
  np.testing.assert_allclose(
    stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02], rtol=0, atol=1e-12
  )
  np.testing.assert_array_equal(stats.holm([0.5, 0.5]), [1, 1])
  assert stats.holm([]).shape == (0,)
  for wrong in ([0.5, math.nan], [-0.1], [1.5], [0.5, None]):
    with pytest.raises(ValueError, match="family of p-values"):
      stats.holm(wrong)


def test_cost_to_target_lies_on_the_line_between_evaluations():
  cost_X, score_X = [0, 100, 300, 400], [0.1, 0.3, 0.2, 0.8]
  for target, cost in ((0.05, 0), (0.1, 0), (0.2, 50), (0.3, 100), (0.5, 350), (0.8, 400)):
    assert stats.cost_to_target(cost_X, score_X, target) == pytest.approx(cost, abs=1e-9)
    if target > 0.3:  # where the curve rises it is the inverse of numpy's straight lines
      assert np.interp(cost, cost_X, score_X) == pytest.approx(target, abs=1e-9)
  assert stats.cost_to_target(cost_X, score_X, 0.81) is None
  for costs, scores in (([0, 1], [0.5]), ([1, 0], [0.1, 0.2]), ([], []), ([0], [math.nan])):
    with pytest.raises(ValueError, match="curve needs|scores must be"):
      stats.cost_to_target(costs, scores, 0.2)


def test_cost_ratio_by_hand():
  ends = dict(end_a_S=[1000] * 5, end_b_S=[800] * 5)
  assert stats.cost_ratio([10, 20, 30, 40, 50], [100] * 5, **ends) == (0.3, 0.1, 0.5, 0, 0)
  # One of a's runs never got there: its ratio is at least 1000 / 100.
  result = stats.cost_ratio([10, None, 30, 40, 50], [100] * 5, **ends)
  assert result == (0.4, 0.1, None, 1, 0)
  # One of b's: at most 50 / 800. Both: anything.
  result = stats.cost_ratio([10, 20, 30, 40, 50], [100, 100, 100, 100, None], **ends)
  assert result == (0.2, 0.0, 0.4, 0, 1)
  result = stats.cost_ratio([10, 20, 30, 40, None], [100, 100, 100, 100, None], **ends)
  assert result == (None, 0.0, None, 1, 1)
  # Good enough before anything was spent: at once against 100, and against nothing.
  result = stats.cost_ratio([0, 0, 30, 40, 50], [100, 0, 100, 100, 100], **ends)
  assert result == (None, 0.0, None, 0, 0)
  # More than five seeds can give.
  assert stats.cost_ratio([1] * 5, [2] * 5, level=0.95, **ends) == (0.5, 0.0, None, 0, 0)
  with pytest.raises(ValueError, match="both ends"):
    stats.cost_ratio([1], [1, 2], end_a_S=[3], end_b_S=[3])
  with pytest.raises(ValueError, match="at least 0"):
    stats.cost_ratio([-1], [1], end_a_S=[3], end_b_S=[3])


def test_cost_ratio_bounds_are_the_sign_tests():
  ratios = np.arange(1.0, 21.0)
  ends = dict(end_a_S=[100] * 20, end_b_S=[100] * 20)
  for level in (0.5, 0.9, 0.95, 0.99):
    _, low, high, _, _ = stats.cost_ratio(ratios, np.ones(20), level=level, **ends)
    beyond = int(low) - 1
    assert high == 20 - beyond
    # scipy's sign test of a median at the bound, and one value further in
    assert scipy.stats.binomtest(beyond, 20).pvalue <= 1 - level + 1e-9
    assert scipy.stats.binomtest(beyond + 1, 20).pvalue > 1 - level


@pytest.mark.parametrize("budget", [math.inf, 2.0], ids=["all reached", "some censored"])
def test_cost_ratio_covers_the_median(budget):
  rng, trials, hits, censored = np.random.default_rng(12), 1500, 0, 0
  for _ in range(trials):
    a_S, b_S = 0.5 * rng.lognormal(0, 0.5, 5), rng.lognormal(0, 0.7, 5)
    reached = [[cost if cost <= budget else None for cost in cost_S] for cost_S in (a_S, b_S)]
    ends = [min(budget, 1e9)] * 5
    result = stats.cost_ratio(*reached, end_a_S=ends, end_b_S=ends)
    hits += result.low <= 0.5 <= (result.high or math.inf)
    censored += result.censored_a + result.censored_b
  assert (censored > trials / 2) == (budget == 2)
  assert 0.92 <= hits / trials <= 0.96  # 0.9375


def test_detectable_effect_has_the_power_of_students_test():
  """Without spread of questions it is a test of S pairs, whose power is the noncentral t's."""
  for level, power in ((0.05, 0.8), (0.01, 0.5), (0.1, 0.99)):
    effect = stats.detectable_effect(
      5, 100, 4, seed_sd=0.03, response_sd=0.4, level=level, power=power
    )
    error = math.sqrt((2 * 0.03**2 + 2 * 0.4**2 / 400) / 5)
    critical = scipy.stats.t.isf(level / 2, 4)
    shown = scipy.stats.nct.sf(critical, 4, effect / error)
    assert shown == pytest.approx(power, abs=1e-9)


def test_detectable_effect_of_one_axis_and_of_large_designs():
  # One seed: a test of 50 questions.
  effect = stats.detectable_effect(1, 50, 4, seed_sd=0, response_sd=0.4, question_sd=0.2)
  error = math.sqrt((0.2**2 + 2 * 0.4**2 / 4) / 50)
  critical = scipy.stats.t.isf(0.025, 49)
  assert scipy.stats.nct.sf(critical, 49, effect / error) == pytest.approx(0.8, abs=1e-9)
  # One question, and its spread says nothing.
  assert stats.detectable_effect(50, 1, 1, seed_sd=0, response_sd=0.4) > 0
  # Endlessly many of both: z(0.975) + z(0.8) standard errors.
  effect = stats.detectable_effect(10**6, 10**6, 1, seed_sd=1, response_sd=0, question_sd=1)
  errors = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)
  assert effect == pytest.approx(errors * math.sqrt(3e-6), rel=1e-5)
  assert stats.detectable_effect(5, 100, 4, seed_sd=0, response_sd=0) == 0


def test_detectable_effect_refuses_what_shows_nothing():
  for design, spread, message in (
    ((1, 1, 4), dict(seed_sd=0), "no effect"),
    ((5, 100, 0), dict(seed_sd=0), "no effect"),
    ((1, 100, 4), dict(seed_sd=0.1), "does not show"),
    ((5, 1, 4), dict(seed_sd=0, question_sd=0.1), "does not show"),
    ((5, 100, 4), dict(seed_sd=0, power=0.01), "power"),
  ):
    with pytest.raises(ValueError, match=message):
      stats.detectable_effect(*design, response_sd=0.4, **spread)


@pytest.mark.parametrize(
  "trials,slack", [(250, 0.08), pytest.param(4000, 0.05, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("seed_sd,question_sd", [(0.03, 0.0), (0.01, 0.15), (0.03, 0.1)])
def test_the_paired_test_shows_the_detectable_effect(
  monkeypatch, seed_sd, question_sd, trials, slack
):
  monkeypatch.setattr(stats, "DRAWS", 500)
  response_sd = 0.4
  gap = stats.detectable_effect(
    S, Q, 4, seed_sd=seed_sd, response_sd=response_sd, question_sd=question_sd
  )
  rng, shown = np.random.default_rng(13), 0
  for trial in range(trials):
    favour_Q1 = rng.normal(gap, question_sd, (Q, 1))
    luck_2S, noise_2QS = rng.normal(0, seed_sd, (2, S)), rng.normal(0, response_sd / 2, (2, Q, S))
    a_QS, b_QS = luck_2S[:, None] + noise_2QS
    result = stats.paired_bootstrap(a_QS + favour_Q1, b_QS, seed=trial)
    shown += result.p_value < 0.05 and result.difference > 0
  assert shown / trials == pytest.approx(0.8, abs=slack)
