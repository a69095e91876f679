"""How the next token is drawn: cuts, biases, frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sdpo_jax.engine.sampling import Settings, choose, draw

P = np.array([0.45, 0.3, 0.2, 0.05])
LOGITS = np.log(P).astype(np.float32)


def settings(rows, *, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0, bias=()):
  def full(value, dtype=np.float32):
    return np.full(rows, value, dtype)

  tokens = np.tile(np.array([t for t, _ in bias], np.int32), (rows, 1))
  raised = np.tile(np.array([x for _, x in bias], np.float32), (rows, 1))
  return Settings(
    full(temperature), full(top_p), full(min_p), full(top_k, np.int32), tokens, raised
  )


def share_of(logits, count=20_000, is_sorted=True, **cuts):
  """Returns (how often each token comes, its log-probability as told)."""
  uniform = jax.random.uniform(jax.random.key(0), (count,))
  rows = jnp.tile(jnp.asarray(logits), (count, 1))
  token, logp = choose(rows, uniform, settings(count, **cuts), is_sorted=is_sorted)
  token, logp = np.asarray(token), np.asarray(logp)
  told = {t: logp[token == t][0] for t in set(token.tolist())}
  return np.bincount(token, minlength=len(logits)), told


@pytest.mark.parametrize(
  "cuts, kept",
  [
    (dict(), [True] * 4),
    (dict(top_p=0.4), [True, False, False, False]),
    (dict(top_p=0.6), [True, True, False, False]),
    (dict(top_p=0.81), [True, True, True, False]),
    (dict(top_k=2), [True, True, False, False]),
    (dict(top_k=3, top_p=0.7), [True, True, False, False]),  # of what top-k leaves
    (dict(min_p=0.4), [True, True, True, False]),
    (dict(bias=((1, -np.inf),)), [True, False, True, True]),
  ],
)
def test_cuts_leave_the_shares_of_what_they_keep(cuts, kept):
  """Chi-square of 20,000 draws; log-probabilities are those before any cut."""
  count, told = share_of(LOGITS, **cuts)
  want = np.where(kept, P, 0.0)
  want = want / want.sum()
  assert np.all(count[~np.array(kept)] == 0)
  if sum(kept) > 1:
    assert stats.chisquare(count[kept], want[kept] * count.sum()).pvalue > 1e-3
  for token, logp in told.items():
    assert logp == pytest.approx(np.log(P[token]), abs=1e-5)


def test_the_temperature_sharpens_both():
  count, told = share_of(LOGITS, temperature=0.5, is_sorted=False)
  sharp = P**2 / np.sum(P**2)
  assert stats.chisquare(count, sharp * count.sum()).pvalue > 1e-3
  assert told[0] == pytest.approx(np.log(sharp[0]), abs=1e-5)


def test_a_bias_changes_what_comes_and_not_what_is_told():
  count, told = share_of(LOGITS, bias=((3, np.log(9.0)),))
  want = P * [1, 1, 1, 9]
  assert stats.chisquare(count, want / want.sum() * count.sum()).pvalue > 1e-3
  assert told[3] == pytest.approx(np.log(0.05), abs=1e-5)


def test_a_large_vocabulary_keeps_its_frequencies():
  """More tokens than a block, and not a multiple of one."""
  logits = np.random.default_rng(1).normal(0, 2, 1000).astype(np.float32)
  count, _ = share_of(logits, is_sorted=False)
  want = np.exp(logits) / np.exp(logits).sum() * count.sum()
  often = want >= 5
  assert often.sum() > 300
  count = np.append(count[often], count[~often].sum())
  want = np.append(want[often], want[~often].sum())
  assert stats.chisquare(count, want * count.sum() / want.sum()).pvalue > 1e-3


def test_greedy_takes_the_first_of_the_likeliest():
  logits = jnp.array([[1.0, 3.0, 3.0, 2.0]])
  for cuts in (dict(), dict(top_p=0.1), dict(bias=((0, 2.0),))):
    token, logp = choose(
      logits, jnp.array([0.999]), settings(1, temperature=0.0, **cuts), is_sorted=True
    )
    assert int(token[0]) == (0 if "bias" in cuts else 1)
    assert float(logp[0]) == pytest.approx(float(jax.nn.log_softmax(logits)[0, int(token[0])]))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_what_has_no_weight_is_never_drawn(uniform):
  """Even where a rounded sum of what has some falls short."""
  dice = np.random.default_rng(0)
  weight = dice.random((64, 777)).astype(np.float32) * (dice.random((64, 777)) < 0.01)
  weight[:, 5] = 1e-30
  token = np.asarray(draw(jnp.asarray(weight), jnp.full(64, uniform)))
  assert np.all(weight[range(64), token] > 0)
