"""Sampled-token forms, returns to go, position weights: by hand, and against exact gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.kernels import distill_kl_ref
from sdpo_jax.objectives import build, signals, token_weight
from sdpo_jax.objectives.loss import normalisers, token_loss
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.train_step import make_signals
from tests import fakes

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def two_distributions(V=7):
  r = np.random.default_rng(3)
  return jnp.asarray(r.normal(size=V) * 2), jnp.asarray(r.normal(size=V) * 2)


def gain_of_every_entry(z_V, teacher_V, **settings):
  """What `sampled_token` multiplies log pi(v) by, were v the token that is sampled."""
  logp_V, logq_V = jax.nn.log_softmax(z_V), jax.nn.log_softmax(teacher_V)
  kl = jnp.sum(jnp.exp(logp_V) * (logp_V - logq_V))
  divergence_1V = jnp.full((1, len(z_V)), kl)

  def total(logp_1V):
    # the gap is detached, so this is linear in the log-probability
    each = Signals(logp_1V, None, divergence_1V, logq_V[None])
    return jnp.sum(signals.sampled_token(each, None, **settings))

  return -jax.grad(total)(logp_V[None])[0]


def mean_gradient(z_V, gain_V):
  """Sum over v of pi_v gain_v (1[v = j] - pi_j): a policy gradient over every token."""
  p_V = jax.nn.softmax(z_V)
  return p_V * (gain_V - jnp.sum(p_V * gain_V))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_mean_of_the_corrected_form_is_the_exact_gradient_and_the_biased_ones_is_not(alpha):
  with jax.enable_x64(True):
    z_V, teacher_V = two_distributions()
    logq_1V = jax.nn.log_softmax(teacher_V)[None]

    def divergence(z):
      return distill_kl_ref.divergence(jax.nn.log_softmax(z)[None], logq_1V, alpha)[0]

    want = -jax.grad(divergence)(z_V)
    got = mean_gradient(z_V, gain_of_every_entry(z_V, teacher_V, alpha=alpha))
    np.testing.assert_allclose(got, want, atol=1e-12)
    biased_V = gain_of_every_entry(z_V, teacher_V, alpha=alpha, corrected=False)
    # the mean of the reward is minus the divergence itself
    p_V = jax.nn.softmax(z_V)
    np.testing.assert_allclose(-jnp.sum(p_V * biased_V), divergence(z_V), atol=1e-12)
    off = float(jnp.abs(mean_gradient(z_V, biased_V) - want).max() / jnp.abs(want).max())
    assert off < 1e-9 if alpha == 1 else off > 0.1


def test_forward_kl_has_no_mean_and_jsd_is_half_of_ln_half_of_one_plus_u():
  z_V, teacher_V = two_distributions()
  u = np.asarray(jax.nn.softmax(teacher_V) / jax.nn.softmax(z_V), np.float64)
  forward = gain_of_every_entry(z_V, teacher_V, alpha=0.0)
  np.testing.assert_allclose(forward, u - 1, rtol=1e-4, atol=1e-6)
  assert float(jnp.sum(jax.nn.softmax(z_V) * forward)) == pytest.approx(0, abs=1e-6)
  mixed = gain_of_every_entry(z_V, teacher_V, alpha=0.5)
  np.testing.assert_allclose(mixed, 0.5 * np.log((1 + u) / 2), rtol=1e-4, atol=1e-6)


def test_ratios_are_bounded_and_reverse_kl_is_left_as_it_was():
  gap = jnp.array([-1000.0, 1000.0])
  for alpha in ALPHAS[:-1]:
    for form in (signals.token_gain, signals.token_reward):
      assert jnp.isfinite(form(gap, alpha)).all()
  np.testing.assert_allclose(signals.token_gain(gap, 0.0)[1], np.expm1(20.0), rtol=1e-6)
  np.testing.assert_array_equal(signals.token_gain(gap, 1.0), gap)


def test_the_baseline_has_the_gaps_mean_and_keeps_the_gradients():
  z_V, teacher_V = two_distributions()
  p_V = jax.nn.softmax(z_V)
  plain_V = gain_of_every_entry(z_V, teacher_V)
  centred_V = gain_of_every_entry(z_V, teacher_V, baseline=True)
  assert float(jnp.sum(p_V * centred_V)) == pytest.approx(0, abs=1e-5)
  assert abs(float(jnp.sum(p_V * plain_V))) > 0.5
  np.testing.assert_allclose(
    mean_gradient(z_V, centred_V), mean_gradient(z_V, plain_V), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize(
  "signal, named",
  [
    (dict(baseline=True, alpha=0.5), "baseline=True is known for alpha=1.0 (reverse KL) alone"),
    (dict(corrected=False), "corrected=False would not be read: with alpha=1.0"),
    (dict(baseline=True, corrected=False), "corrected=False would not be read: with alpha=1.0"),
  ],
)
def test_settings_of_the_sampled_token_that_nothing_would_read_are_refused(signal, named):
  row = build.method_row("sdpo") | dict(token_signal=dict(name="sampled_token") | signal)
  with pytest.raises(ValueError, match=re.escape("method.token_signal." + named)):
    build.build_method(row)


def test_the_kernel_runs_where_the_baseline_reads_it_and_nowhere_else():
  reads = {name: build.build_method(build.method_row(name)) for name in ("vopd", "opd_plus")}
  assert reads["vopd"].divergence["alpha"] == 1.0
  assert reads["opd_plus"].divergence is None and reads["opd_plus"].needs_teacher


def loss_of(method, readings, batch):
  return token_loss(method, readings, batch, normalisers(method, batch))[0]


def test_the_sampled_token_with_a_baseline_of_a_real_batch_is_that_of_its_logits():
  """Value and gradient, with logits written out."""
  small = dict(vocab=64, layers=1, width=16, heads=2, kv_heads=1)
  config, params = fakes.toy_model(0, **small)
  _, teacher = fakes.toy_model(1, **small)
  batch = fakes.toy_batch(vocab=64)
  method = build.build_method(build.method_row("vopd") | dict(token_weight=dict(name="uniform")))
  weight_BR = batch.weight_BR * batch.readings[0].weight_BR

  def fast(p):
    return loss_of(method, make_signals(config, method)(p, teacher, batch), batch)

  def plain(p):
    z_BRV = fakes.dense_logits(p, config, batch.policy, batch)
    q_BRV = fakes.dense_logits(teacher, config, batch.readings[0].rows, batch)
    logp_BRV, logq_BRV = jax.nn.log_softmax(z_BRV), jax.nn.log_softmax(q_BRV)
    at = lambda x: jnp.take_along_axis(x, batch.response_BR[..., None], -1)[..., 0]
    kl_BR = jnp.sum(jnp.exp(logp_BRV) * (logp_BRV - logq_BRV), -1)
    gain_BR = at(logq_BRV) - at(logp_BRV) + kl_BR
    loss_BR = -jax.lax.stop_gradient(gain_BR) * at(logp_BRV)
    return jnp.sum(loss_BR * weight_BR) / weight_BR.sum()

  (got, got_grad), (want, want_grad) = (
    jax.jit(jax.value_and_grad(f))(params) for f in (fast, plain)
  )
  assert float(got) == pytest.approx(float(want), rel=1e-4)
  for g, w in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
    np.testing.assert_allclose(g, w, atol=1e-4 * float(jnp.abs(w).max() + 1e-3))


def random_batch(R=9):
  """Six responses whose weights have gaps, as tool output leaves them, and one without any."""
  r = np.random.default_rng(5)
  batch = fakes.toy_batch(rows=6, response=R)
  weight_BR = (r.random((6, R)) < 0.7).astype(np.float32)
  weight_BR[5] = 0
  logp_BR, logq_BR = (jnp.asarray(-r.exponential(size=(6, R)), jnp.float32) for _ in range(2))
  batch = batch._replace(weight_BR=weight_BR, logp_rollout_BR=logp_BR, logp_old_BR=logp_BR)
  return batch, Signals(logp_BR, None, None, logq_BR)


def test_returns_to_go_begin_anew_behind_what_the_policy_did_not_write():
  batch, each = random_batch()
  want_BR = np.zeros(batch.weight_BR.shape)
  for b, r in np.argwhere(batch.weight_BR > 0)[::-1]:
    later = want_BR[b, r + 1] if r + 1 < want_BR.shape[1] else 0.0
    want_BR[b, r] = float(each.gap_BR[b, r]) + 0.99 * later
  got_BR = signals.return_to_go(each, batch, gamma=0.99)
  np.testing.assert_allclose(got_BR, -want_BR * each.logp_BR, rtol=1e-5, atol=1e-6)
  # without a future it is the sampled token's own gap
  counted = batch.weight_BR > 0
  np.testing.assert_array_equal(
    signals.return_to_go(each, batch, gamma=0.0)[counted],
    signals.sampled_token(each, batch)[counted],
  )


def test_prefix_gap_by_hand():
  """Gaps 1, (4), 2, 1 with the second uncounted: before them lie 0, 1/4 and 3/4 of the sum."""
  batch, _ = random_batch(R=4)
  weight_BR = np.array([[1, 0, 1, 1]] * 2 + [[0] * 4] * 4, np.float32)
  batch = batch._replace(weight_BR=weight_BR)
  gap_BR = jnp.array([[1, 4, -2, 1], [0, 4, 0, 0]] + [[1] * 4] * 4, jnp.float32)
  each = Signals(jnp.asarray(batch.logp_old_BR), None, None, batch.logp_old_BR + gap_BR)
  got_BR = token_weight.prefix_gap(each, batch)
  counted = weight_BR > 0
  np.testing.assert_allclose(got_BR[0][counted[0]], [1.5, 1.375, 1.125], rtol=1e-5)
  np.testing.assert_array_equal(got_BR[1][counted[1]], 1.0)  # no gap at all
  assert jnp.isfinite(got_BR).all()


def test_prefix_gap_falls_and_without_gamma_is_the_importance_ratio():
  batch, each = random_batch()
  old_BR = each.logp_BR - 0.3
  batch = batch._replace(logp_old_BR=old_BR, logp_rollout_BR=old_BR)
  ratio_BR = token_weight.importance(each, batch)
  assert float(jnp.abs(ratio_BR - 1).max()) > 0.1
  np.testing.assert_array_equal(token_weight.prefix_gap(each, batch, gamma=0.0), ratio_BR)
  factor_BR = np.asarray(token_weight.prefix_gap(each, batch) / ratio_BR)
  for factor_R, weight_R in zip(factor_BR[:5], batch.weight_BR[:5]):
    counted = factor_R[weight_R > 0]
    assert counted[0] == pytest.approx(1.5) and (np.diff(counted) < 0).all() and counted[-1] > 1


@pytest.mark.parametrize("n, kept", [(1, 1), (3, 1), (4, 2), (10, 3), (20, 6), (0, 0)])
def test_the_first_share_of_the_counted_tokens_counts(n, kept):
  """.3 of n tokens, rounded up, wherever tool output stands between them."""
  batch, _ = random_batch(R=41)
  weight_BR = np.zeros((6, 41), np.float32)
  weight_BR[:, 1 : 2 * n : 2] = 1.0
  batch = batch._replace(weight_BR=weight_BR)
  each = Signals(jnp.asarray(batch.logp_old_BR), None, None, None)
  got_BR = token_weight.first_share(each, batch) * weight_BR
  want_R = np.zeros(41)
  want_R[1 : 2 * kept : 2] = 1.0
  np.testing.assert_array_equal(got_BR, [want_R] * 6)


def test_dgrpo_is_two_thirds_of_grpo_plus_half_the_reverse_kl():
  """The surrogate takes the mean of each response, the divergence that of all tokens."""
  r = np.random.default_rng(1)
  batch = fakes.toy_batch()
  batch = batch._replace(advantage_BR=fakes.per_token([1, -1, 0.5, 2], batch))
  shape = batch.weight_BR.shape
  kl_BR = jnp.asarray(r.random(shape), jnp.float32)
  logp_BR = jnp.asarray(batch.logp_old_BR + r.normal(size=shape) * 0.1, jnp.float32)
  batch = batch._replace(logp_rollout_BR=batch.logp_old_BR)
  got = loss_of(
    build.build_method(build.method_row("dgrpo")),
    (Signals(logp_BR, jnp.zeros(shape), kl_BR, logp_BR),),
    batch,
  )
  ratio_BR, A_B1 = np.exp(logp_BR - batch.logp_old_BR), batch.advantage_BR
  gain_BR = np.minimum(ratio_BR * A_B1, np.clip(ratio_BR, 0.8, 1.2) * A_B1)
  weight_BR = batch.weight_BR
  policy = np.mean(np.sum(-gain_BR * weight_BR, 1) / weight_BR.sum(1))
  taught_BR = weight_BR * batch.readings[0].weight_BR
  importance_BR = np.minimum(ratio_BR, 2.0)
  kl = np.sum(kl_BR * importance_BR * taught_BR) / taught_BR.sum()
  assert float(got) == pytest.approx(float(2 / 3 * (policy + 0.5 * kl)), rel=1e-5)


def test_the_plain_forward_row_differs_from_sdpo_in_its_divergence_alone():
  row, sdpo = build.method_row("sdpo_forward_kl"), build.method_row("sdpo")
  assert row["token_signal"] == sdpo["token_signal"] | dict(alpha=0.0)
  assert {key for key in sdpo if row[key] != sdpo[key]} == {"name", "token_signal"}
