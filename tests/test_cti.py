"""The contrast with siblings: a plain loop, its layout, its sign, and what it tends to."""

import math

import numpy as np
import pytest

from sdpo_jax.objectives.advantage import group_mean
from sdpo_jax.objectives.cti import Cti, Places, cti_credit
from tests import fakes


def by_loop(gap_GR, adv_GR, valid_GR, *, tau=1.0, beta_pos=5.0, beta_neg=5.0, g_min=2):
  """c as its definition says it, one token after another, in float64."""
  G, R = gap_GR.shape
  c_GR = np.zeros((G, R))
  members = sum(any(valid_R) for valid_R in valid_GR)
  for i in range(G):
    for r in range(R):
      if not valid_GR[i][r]:
        continue
      siblings = [j for j in range(G) if j != i and valid_GR[j][r]]
      if members < g_min or not siblings:
        contrast = float(adv_GR[i][r]) * float(gap_GR[i][r])
      else:
        top = max(gap_GR[j][r] / tau for j in siblings)
        weights = [math.exp(gap_GR[j][r] / tau - top) for j in siblings]
        mean = math.fsum(w * adv_GR[j][r] for w, j in zip(weights, siblings)) / math.fsum(weights)
        contrast = mean - adv_GR[i][r]
      beta = beta_pos if contrast > 0 else beta_neg
      sigmoid = 1 / (1 + math.exp(-beta * abs(contrast))) if beta * abs(contrast) < 700 else 1.0
      c_GR[i, r] = math.copysign(2 * sigmoid - 1, contrast)
  return c_GR


def random_group(G, seed, R=7, scale=1.0):
  rng = np.random.default_rng([G, seed])
  gap_GR, adv_GR = rng.normal(size=(2, G, R)) * np.array([scale, 1.0])[:, None, None]
  return gap_GR, adv_GR, rng.random((G, R)) < 0.7


SETTINGS = [dict(), dict(tau=0.5, beta_pos=2.0, beta_neg=9.0), dict(g_min=4)]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("G", range(1, 9))
def test_a_loop_gives_the_same(G, settings):
  gap_GR, adv_GR, valid_GR = random_group(G, 0)
  want = by_loop(gap_GR, adv_GR, valid_GR, **settings)
  got = cti_credit(gap_GR, adv_GR, valid_GR, **settings)
  np.testing.assert_allclose(got, want, atol=1e-12)
  narrow = [x.astype(np.float32) for x in (gap_GR, adv_GR)]
  got = cti_credit(*narrow, valid_GR, **settings)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_an_advantage_a_member_and_several_groups_at_once():
  groups = [random_group(4, seed) for seed in range(3)]
  gap_QGR, adv_QGR, valid_QGR = map(np.stack, zip(*groups))
  adv_QG = adv_QGR[..., 0]
  got = cti_credit(gap_QGR, adv_QG, valid_QGR)
  for q in range(3):
    adv_GR = np.repeat(adv_QG[q][:, None], 7, 1)
    np.testing.assert_allclose(got[q], by_loop(gap_QGR[q], adv_GR, valid_QGR[q]), atol=1e-12)


@pytest.mark.parametrize("tau", [1.0, 0.25])
@pytest.mark.parametrize("size", [80.0, 320.0])
def test_large_gaps_give_numbers(size, tau):
  rng = np.random.default_rng(0)
  gap_GR = rng.choice([-size, size], (6, 40)).astype(np.float32)
  adv_GR, valid_GR = rng.normal(size=(6, 40)).astype(np.float32), rng.random((6, 40)) < 0.7
  with np.errstate(all="raise", under="ignore"):
    got = cti_credit(gap_GR, adv_GR, valid_GR, tau=tau)
  np.testing.assert_allclose(got, by_loop(gap_GR, adv_GR, valid_GR, tau=tau), atol=1e-6)


def test_the_largest_gap_is_that_of_the_siblings():
  """Member 0 is 700 nats above the others, whose own mean does not vanish by that."""
  gap_GR = np.array([[700.0], [0.0], [0.0]], np.float32)
  got = cti_credit(gap_GR, np.array([9.0, 1.0, 3.0]), np.ones((3, 1), bool), beta_neg=0.1)
  assert got[0, 0] == pytest.approx(math.tanh(0.05 * (2.0 - 9.0)))


def test_what_stands_under_an_invalid_token_is_harmless():
  gap_GR, adv_GR, valid_GR = random_group(5, 1)
  want = cti_credit(gap_GR, adv_GR, valid_GR)
  for junk in (np.nan, np.inf, -np.inf, 1e30):
    broken = [np.where(valid_GR, x, junk) for x in (gap_GR, adv_GR)]
    np.testing.assert_array_equal(cti_credit(*broken, valid_GR), want)
  assert not want[~valid_GR].any() and want[valid_GR].all()


def two_valued(seed, *, penalty=0.0):
  """Gaps, standardised advantages of rewards 0 and 1, and validity; every group has both."""
  rng = np.random.default_rng(seed)
  reward_QG = (rng.random((40, 8)) < 0.4).astype(float)
  reward_QG[:, :2] = [0.0, 1.0]
  adv_QG = group_mean(reward_QG - penalty * rng.integers(0, 2, (40, 8)), normalize_std=True)
  return rng.normal(size=(40, 8, 30)) * 0.3, adv_QG, rng.random((40, 8, 30)) < 0.8


def test_with_two_valued_rewards_c_opposes_the_advantage():
  """The estimator never has the sign of A; the fallback has that of A times the gap."""
  gap_QGR, adv_QG, valid_QGR = two_valued(0)
  adv_QGR = np.broadcast_to(adv_QG[..., None], gap_QGR.shape)
  c_QGR = cti_credit(gap_QGR, adv_QG, valid_QGR)
  is_estimated = valid_QGR & (valid_QGR.sum(1, keepdims=True) > 1)
  assert (c_QGR * adv_QGR)[is_estimated].max() < 1e-12
  is_mixed = [np.ptp(adv_QG[q][valid_QGR[q, :, r]]) > 0 for q in range(40) for r in range(30)]
  is_mixed = is_estimated & np.reshape(is_mixed, (40, 1, 30))
  # a lone success has failures alone as siblings: the sign is strict wherever outcomes differ
  assert is_mixed.mean() > 0.7 and (c_QGR * adv_QGR)[is_mixed].mean() < -0.8
  fallback_QGR = cti_credit(gap_QGR, adv_QG, valid_QGR, g_min=999)
  signs = np.sign(adv_QGR * gap_QGR)
  np.testing.assert_array_equal(np.sign(fallback_QGR)[valid_QGR], signs[valid_QGR])


def test_standardised_two_valued_rewards_saturate_c():
  for penalty in (0.0, 0.01):
    gap_QGR, adv_QG, valid_QGR = two_valued(1, penalty=penalty)
    c_QGR = cti_credit(gap_QGR, adv_QG, np.ones_like(valid_QGR))
    assert (np.abs(c_QGR) > 0.1).all()
    assert (np.sign(c_QGR) == -np.sign(adv_QG)[..., None]).all()


def test_with_many_valued_rewards_c_may_have_either_sign():
  adv_G = np.array([-1.0, 0.5, 2.0])
  signs = set()
  for gap in (-9.0, 9.0):  # of the best sibling
    c = cti_credit(np.array([[0.0], [0.0], [gap]]), adv_G, np.ones((3, 1), bool))
    signs.add(float(np.sign(c[1, 0])))
  assert signs == {-1.0, 1.0}


def test_the_estimate_tends_to_a_ratio_of_means():
  """Success with chance p; gaps are normal around a mean that depends on the outcome."""
  p, values, means, spread = 0.3, np.array([-0.7, 1.5]), np.array([-0.2, 0.4]), 0.5
  chance = np.array([1 - p, p])
  w, w2 = np.exp(means + spread**2 / 2), np.exp(2 * means + 2 * spread**2)
  limit = (chance * w * values).sum() / (chance * w).sum()
  scaled_variance = (chance * w2 * (values - limit) ** 2).sum() / (chance * w).sum() ** 2
  rng = np.random.default_rng(0)
  errors = {}
  for G in (9, 33, 129):
    outcome_NG = (rng.random((1500, G)) < p).astype(int)
    gap_NG = means[outcome_NG] + spread * rng.normal(size=(1500, G))
    adv_NG = values[outcome_NG]
    # a small beta keeps c in proportion to the contrast; the first member's is enough
    valid = np.ones((1500, G, 1), bool)
    c_NG = cti_credit(gap_NG[..., None], adv_NG, valid, beta_pos=0.1, beta_neg=0.1)[..., 0]
    mean_N = np.arctanh(c_NG[:, 0]) / 0.05 + adv_NG[:, 0]
    errors[G] = mean_N - limit
    assert (G - 1) * mean_N.var() == pytest.approx(scaled_variance, rel=0.35 if G == 9 else 0.15)
  # the bias of a ratio of means, to first order in 1 / (G - 1)
  bias = -(chance * w2 * (values - limit)).sum() / (chance * w).sum() ** 2 / 128
  assert errors[129].mean() == pytest.approx(bias, abs=4 * math.sqrt(scaled_variance / 128 / 1500))
  assert np.abs(errors[129]).mean() < 0.6 * np.abs(errors[33]).mean()


# ---- the layout ----------------------------------------------------------------------------------


def ragged(seed=0):
  """Tokens of episodes whose turns have unequal lengths: (member_B2, turn, place, counts)."""
  rng = np.random.default_rng(seed)
  member_B2 = np.array([(q, g) for q in range(2) for g in range(3)])[rng.permutation(6)]
  turn_BR, place_BR = np.zeros((2, 6, 20), int)
  counts_BR = np.zeros((6, 20), bool)
  for b in range(6):
    at = 0
    for turn in range(rng.integers(1, 4)):
      n = rng.integers(1, 6)
      turn_BR[b, at : at + n], place_BR[b, at : at + n] = turn, np.arange(n)
      counts_BR[b, at : at + n] = rng.random(n) < 0.9
      at += n + 1
  return member_B2, turn_BR, place_BR, counts_BR


def test_tokens_stand_beside_those_of_the_same_turn_and_place():
  member_B2, turn_BR, place_BR, counts_BR = ragged()
  places = Places.of(member_B2, turn_BR, place_BR, counts_BR)
  name_BR = np.arange(1, 121).reshape(6, 20)
  laid_QGR = places.lay_out(name_BR)
  np.testing.assert_array_equal(places.take_back(laid_QGR), np.where(counts_BR, name_BR, 0))
  assert (laid_QGR > 0).sum() == counts_BR.sum()
  key = {n: (turn_BR.flat[n - 1], place_BR.flat[n - 1]) for n in name_BR[counts_BR]}
  for column in laid_QGR.reshape(6, -1).T:
    assert len({key[n] for n in column if n}) <= 1


def test_rows_that_are_turns_are_members_together():
  """An episode in one row, and the same one in a row for each turn."""
  counts_BR = np.ones((2, 5), bool)
  turn_BR, place_BR = np.array([[0, 0, 1, 1, 1]] * 2), np.array([[0, 1, 0, 1, 2]] * 2)
  whole = Places.of(np.array([[0, 0], [0, 1]]), turn_BR, place_BR, counts_BR)
  counts_BR = np.array([[1, 1, 0], [1, 1, 1]] * 2, bool)
  turn_BR, place_BR = np.array([[0] * 3, [1] * 3] * 2), np.array([[0, 1, 2]] * 4)
  cut = Places.of(np.array([[0, 0], [0, 0], [0, 1], [0, 1]]), turn_BR, place_BR, counts_BR)
  x_BR = np.arange(12.0).reshape(4, 3)
  np.testing.assert_array_equal(whole.lay_out(x_BR[counts_BR].reshape(2, 5)), cut.lay_out(x_BR))


def case(seed=3):
  batch = fakes.toy_batch(rows=6, seed=seed, response=8)
  member_B2 = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]])
  gap_BR = np.random.default_rng(seed).normal(size=batch.weight_BR.shape)
  return batch, gap_BR, member_B2


@pytest.mark.parametrize("sign", [1, -1])
def test_the_credit_of_a_batch_is_that_of_its_groups(sign):
  """Rows of two questions in turns; some have no reading, and all are of unequal lengths."""
  batch, gap_BR, member_B2 = case()
  credit_BR, metrics = Cti(cti_sign=sign).credit(batch, gap_BR, member_B2)
  counts_BR = (batch.weight_BR > 0) & batch.readings[0].has_BR
  aligned = 0
  for q in range(2):
    rows = np.flatnonzero(member_B2[:, 0] == q)
    adv_GR = np.repeat(batch.advantage_BR[:, 0][rows, None], 8, 1)
    want = by_loop(gap_BR[rows], adv_GR, counts_BR[rows])
    np.testing.assert_allclose(credit_BR[rows], sign * want, atol=2e-6)
    aligned += (counts_BR[rows] & (counts_BR[rows].sum(0) > 1)).sum()
  assert metrics["craft/aligned"] == pytest.approx(aligned / (batch.weight_BR > 0).sum())
  assert metrics["train/teacher_gap"] == pytest.approx(gap_BR[counts_BR].mean(), rel=1e-5)
  gap_BR[~counts_BR] = np.nan
  np.testing.assert_array_equal(Cti(cti_sign=sign).credit(batch, gap_BR, member_B2)[0], credit_BR)


def test_a_batch_without_a_reading_has_no_credit():
  batch, gap_BR, member_B2 = case()
  nothing = batch.readings[0]._replace(weight_BR=np.zeros_like(batch.weight_BR))
  credit_BR, metrics = Cti().credit(batch._replace(readings=(nothing,)), gap_BR, member_B2)
  assert not credit_BR.any() and credit_BR.dtype == np.float32 and not metrics


def test_turns_are_read_from_the_batch():
  """The same tokens, cut into turns in one way and in another, have other siblings."""
  batch, gap_BR, member_B2 = case()
  cut = batch._replace(turn_BR=batch.place_BR // 3, place_BR=batch.place_BR % 3)
  one = batch._replace(turn_BR=None, place_BR=None)
  credits_ = [Cti().credit(x, gap_BR, member_B2)[0] for x in (batch, one, cut)]
  np.testing.assert_array_equal(credits_[0], credits_[1])
  np.testing.assert_array_equal(credits_[0], credits_[2])  # both keys name the same columns
  shifted = batch._replace(turn_BR=np.repeat(member_B2[:, 1:], 8, 1))  # no turn in common
  alone, metrics = Cti().credit(shifted, gap_BR, member_B2)
  counts_BR = (batch.weight_BR > 0) & batch.readings[0].has_BR
  want = np.tanh(2.5 * batch.advantage_BR * gap_BR) * counts_BR
  np.testing.assert_allclose(alone, want, atol=1e-6)
  assert metrics["craft/aligned"] == 0


def test_a_sign_that_is_none_is_refused():
  with pytest.raises(ValueError, match=r"method\.contrast\.cti_sign=0 must be 1"):
    Cti(cti_sign=0)
