"""The objectives against the specification, worked numbers and the paper's identities."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.kernels.distill_kl import distill_kl
from sdpo_jax.kernels.distill_kl_sweeps import Inputs
from sdpo_jax.kernels.distill_topk import distill_topk
from sdpo_jax.objectives import advantage, build, methods, reference, surrogate, token_weight
from sdpo_jax.objectives.loss import normalisers, token_loss
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.train_step import make_signals
from tests import fakes


def logits(seed, shape=(2, 3, 7), scale=2.0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


RESPONSE = np.array([[1, 2, 0], [3, 6, 5]], np.int32)
WEIGHT = np.array([[1, 1, 0], [1, 1, 1]], np.float32)
DISTILL = np.array([1, 1], np.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_divergence_by_hand(alpha):
  """Two outcomes, worked with plain sums."""
  p, q = np.array([0.9, 0.1]), np.array([0.3, 0.7])
  kl = lambda a, b: float(np.sum(a * np.log(a / b)))
  m = (1 - alpha) * p + alpha * q
  want = (
    kl(q, p)
    if alpha == 0
    else kl(p, q)
    if alpha == 1
    else (1 - alpha) * kl(p, m) + alpha * kl(q, m)
  )
  got = reference.divergence(jnp.log(jnp.array(p)), jnp.log(jnp.array(q)), alpha)
  assert got == pytest.approx(want, rel=1e-5)


def test_proposition_2_1_closed_form_and_finite_differences():
  """The gradient of reverse KL with respect to a logit is p * (ln(p/q) - KL): a policy gradient
  with advantage ln q - ln p.
  """
  with jax.enable_x64(True):
    student, teacher = logits(0).astype(jnp.float64), logits(1).astype(jnp.float64)
    loss = lambda s: reference.sdpo_loss(s, teacher, RESPONSE, WEIGHT, DISTILL, alpha=1.0)
    grad = jax.grad(loss)(student)
    p, q = jax.nn.softmax(student), jax.nn.softmax(teacher)
    kl = jnp.sum(p * jnp.log(p / q), -1, keepdims=True)
    closed = p * (jnp.log(p / q) - kl) * WEIGHT[..., None] / WEIGHT.sum()
    np.testing.assert_allclose(grad, closed, atol=1e-12)
    # The same number as -E_{y ~ p}[A(y) grad ln p(y)], summed over every y.
    score = jax.nn.one_hot(jnp.arange(7), 7) - p[..., None, :]  # [B, R, y, v]
    policy_gradient = (
      -jnp.einsum("bry,bry,bryv->brv", p, jnp.log(q / p), score) * WEIGHT[..., None] / WEIGHT.sum()
    )
    np.testing.assert_allclose(grad, policy_gradient, atol=1e-12)
    eps = 1e-6
    for index in [(0, 0, 0), (0, 1, 6), (1, 2, 3)]:
      step = jnp.zeros_like(student).at[index].set(eps)
      assert (loss(student + step) - loss(student - step)) / (2 * eps) == pytest.approx(
        float(grad[index]), abs=1e-8
      )


@pytest.mark.parametrize(
  "kwargs",
  [dict(alpha=a) for a in (0.0, 0.4, 1.0)]
  + [dict(alpha=0.5, top_k=3), dict(alpha=1.0, top_k=3, add_tail=False)]
  + [dict(alpha=1.0, granularity="token"), dict(granularity="sequence")],
)
def test_teacher_equal_to_policy_teaches_nothing(kwargs):
  student = logits(0)
  value, grad = jax.value_and_grad(
    lambda s: reference.sdpo_loss(s, student, RESPONSE, WEIGHT, DISTILL, **kwargs)
  )(student)
  assert abs(float(value)) < 1e-6 and float(jnp.abs(grad).max()) < 1e-6


def test_top_k_bounds():
  """Bucketed KL never exceeds the full one, and equals it once only one entry is in the tail."""
  student, teacher = logits(2), logits(3)
  loss = lambda **k: float(
    reference.sdpo_loss(student, teacher, RESPONSE, WEIGHT, DISTILL, alpha=1.0, **k)
  )
  full = loss()
  by_k = [loss(top_k=k) for k in range(1, 7)]
  assert all(b <= full + 1e-6 for b in by_k)
  assert by_k[-1] == pytest.approx(full, rel=1e-5)


def test_advantage_clip_by_hand():
  """Where no advantage leaves the bounds nothing changes; else the gradient is -p_v (a_v - sum_u
  p_u a_u) with a = clip(ln q - ln p).
  """
  student, teacher = logits(2), logits(3)
  value_and_grad = lambda **k: jax.value_and_grad(
    lambda s: reference.sdpo_loss(s, teacher, RESPONSE, WEIGHT, DISTILL, alpha=1.0, **k)
  )(student)
  for kwargs in (dict(), dict(top_k=3), dict(top_k=3, add_tail=False)):
    (free, free_grad), (wide, wide_grad) = (
      value_and_grad(**kwargs),
      value_and_grad(advantage_clip=100.0, **kwargs),
    )
    assert float(wide) == pytest.approx(float(free), rel=1e-5)
    np.testing.assert_allclose(wide_grad, free_grad, atol=1e-6)
  value, grad = value_and_grad(advantage_clip=0.5)
  p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (student, teacher))
  advantage_BRV = np.clip(np.log(q / p), -0.5, 0.5)
  assert (np.abs(np.log(q / p)) > 0.5).mean() > 0.3  # the bounds matter here
  mean_BR1 = (p * advantage_BRV).sum(-1, keepdims=True)
  assert float(value) == pytest.approx(
    float((-mean_BR1[..., 0] * WEIGHT).sum() / WEIGHT.sum()), rel=1e-5
  )
  np.testing.assert_allclose(
    grad, -p * (advantage_BRV - mean_BR1) * WEIGHT[..., None] / WEIGHT.sum(), atol=1e-6
  )


def test_importance_weights_by_hand():
  """One token: ratio e^1 is capped at 2, the engine mismatch e^-0.5 is not; both multiply the
  divergence.
  """
  student, teacher = logits(4, (1, 1, 7)), logits(5, (1, 1, 7))
  response, one = np.array([[2]]), np.ones((1, 1), np.float32)
  logp = jax.nn.log_softmax(student)[0, 0, 2]
  plain = reference.sdpo_loss(student, teacher, response, one, one[0])
  weighted = reference.sdpo_loss(
    student,
    teacher,
    response,
    one,
    one[0],
    logp_old_BR=logp[None, None] - 1.0,
    logp_rollout_BR=logp[None, None] - 0.5,
  )
  assert float(weighted) == pytest.approx(float(plain) * 2.0 * np.exp(-0.5), rel=1e-5)


def by_hand(
  student,
  teacher,
  old,
  rollout,
  distill,
  *,
  alpha,
  top_k,
  add_tail,
  granularity,
  is_clip,
  rollout_is_clip,
):
  """The paper's formulas once more in plain NumPy, float64, token by token."""
  log_softmax = lambda x: x - np.log(np.exp(x - x.max()).sum()) - x.max()
  total = count = 0.0
  for b, r in np.argwhere(WEIGHT > 0):
    gaps = [
      log_softmax(teacher[b, t])[RESPONSE[b, t]] - log_softmax(student[b, t])[RESPONSE[b, t]]
      for t in np.flatnonzero(WEIGHT[b])
    ]
    p, q, y = log_softmax(student[b, r]), log_softmax(teacher[b, r]), RESPONSE[b, r]
    logp = p[y]
    if granularity == "logit":
      if top_k:
        kept = np.argsort(-p)[:top_k]
        p, q = p[kept], q[kept]
        if add_tail:
          p, q = (np.append(x, np.log(1 - np.exp(x).sum())) for x in (p, q))
        else:
          p, q = log_softmax(p), log_softmax(q)
      kl = lambda a, b: (np.exp(a) * (a - b)).sum()
      m = np.log((1 - alpha) * np.exp(p) + alpha * np.exp(q))
      loss = (
        kl(q, p)
        if alpha == 0
        else kl(p, q)
        if alpha == 1
        else (1 - alpha) * kl(p, m) + alpha * kl(q, m)
      )
    else:
      loss = -logp * (q[y] - p[y] if granularity == "token" else np.mean(gaps))
    if is_clip is not None:
      loss *= min(np.exp(logp - old[b, r]), is_clip)
    if rollout_is_clip is not None:
      loss *= min(np.exp(old[b, r] - rollout[b, r]), rollout_is_clip)
    total, count = total + loss * distill[b], count + distill[b]
  return total / count


GRID = [
  dict(alpha=a, top_k=k, add_tail=t, granularity="logit")
  for a in (0.0, 0.3, 0.5, 1.0)
  for k, t in ((None, True), (3, True), (3, False), (1, True))
]
GRID += [dict(alpha=1.0, top_k=None, add_tail=True, granularity=g) for g in ("token", "sequence")]


@pytest.mark.parametrize("distill", [DISTILL, np.array([0, 1], np.float32)], ids=["all", "one"])
@pytest.mark.parametrize("kwargs", GRID, ids=lambda k: "-".join(map(str, k.values())))
def test_specification_and_fast_path_over_the_whole_grid(kwargs, distill):
  """Every alpha, top-K with and without tail, granularity and pair of clips: plain NumPy, the
  specification, and row + kernel, loss and gradient.
  """
  rng = np.random.default_rng(7)
  student, teacher = rng.normal(size=(2, 2, 3, 7)) * 2
  logp = np.take_along_axis(
    np.log(np.exp(student) / np.exp(student).sum(-1, keepdims=True)), RESPONSE[..., None], -1
  )[..., 0]
  old, rollout = logp - rng.normal(size=(2, 3)), logp - rng.normal(size=(2, 3))
  batch = with_teacher(fakes.toy_batch(rows=2, response=3), distill)._replace(
    response_BR=RESPONSE,
    weight_BR=WEIGHT,
    logp_old_BR=old.astype(np.float32),
    logp_rollout_BR=rollout.astype(np.float32),
  )
  signal = {
    "logit": dict(name="divergence", **{k: kwargs[k] for k in ("alpha", "top_k", "add_tail")}),
    "token": dict(name="sampled_token"),
    "sequence": dict(name="sequence"),
  }
  flat = lambda x: jnp.asarray(x, jnp.float32).reshape(6, 7)
  for is_clip in (None, 1.5):
    for rollout_is_clip in (None, 2.0):
      clips = dict(is_clip=is_clip, rollout_is_clip=rollout_is_clip)
      with jax.enable_x64(True):
        spec = lambda s: reference.sdpo_loss(
          s,
          teacher,
          RESPONSE,
          WEIGHT,
          distill,
          logp_old_BR=old,
          logp_rollout_BR=rollout,
          **kwargs,
          **clips,
        )
        want, want_grad = jax.value_and_grad(spec)(jnp.asarray(student))
        assert float(want) == pytest.approx(
          by_hand(student, teacher, old, rollout, distill, **kwargs, **clips), rel=1e-5
        )
      method = build.build_method(
        build.method_row("sdpo")
        | dict(
          token_signal=signal[kwargs["granularity"]], token_weight=dict(name="importance", **clips)
        )
      )

      def fast(s):
        # logits are hidden states under the identity
        halves = (
          s,
          jnp.eye(7, dtype=jnp.float32),
          flat(teacher),
          jnp.eye(7, dtype=jnp.float32),
          RESPONSE.reshape(-1),
        )
        wanted = method.divergence or dict(alpha=0.5, top_k=None)
        out = (
          distill_kl(*halves, alpha=wanted["alpha"])
          if wanted["top_k"] is None
          else distill_topk(Inputs(*halves), **wanted)
        )
        said = Signals(
          *(
            x.reshape(2, 3)
            for x in (out.logp_X, out.entropy_X, out.divergence_X, out.logp_teacher_X)
          )
        )
        return loss_of(method, (said,), batch)

      got, got_grad = jax.value_and_grad(fast)(flat(student))
      assert float(got) == pytest.approx(float(want), rel=1e-5)
      np.testing.assert_allclose(
        np.reshape(got_grad, (2, 3, 7)), want_grad, atol=2e-5 * np.abs(want_grad).max()
      )


METHOD_CASES = {
  "jsd": (dict(), dict(alpha=0.5)),
  "forward": (dict(token_signal=dict(name="divergence", alpha=0.0)), dict(alpha=0.0)),
  "top_k": (
    dict(token_signal=dict(name="divergence", alpha=0.5, top_k=20)),
    dict(alpha=0.5, top_k=20),
  ),
  "top_k_renormalised": (
    dict(token_signal=dict(name="divergence", alpha=1.0, top_k=5, add_tail=False)),
    dict(alpha=1.0, top_k=5, add_tail=False),
  ),
  "advantage_clip": (
    dict(token_signal=dict(name="divergence", alpha=1.0, top_k=20, advantage_clip=1.0)),
    dict(alpha=1.0, top_k=20, advantage_clip=1.0),
  ),
  "ratio_bounds": (
    dict(token_signal=dict(name="divergence", alpha=0.5, top_k=20, ratio_bounds=(0.8, 1.2))),
    dict(alpha=0.5, top_k=20, ratio_bounds=(0.8, 1.2)),
  ),
  "ratio_bounds_reverse": (
    dict(token_signal=dict(name="divergence", alpha=1.0, top_k=20, ratio_bounds=(0.01, 1.1))),
    dict(alpha=1.0, top_k=20, ratio_bounds=(0.01, 1.1)),
  ),
  "reverse": (dict(token_signal=dict(name="divergence", alpha=1.0)), dict(alpha=1.0)),
  "skewed": (
    dict(
      token_signal=dict(name="divergence", alpha=0.2),
      token_weight=dict(name="importance", is_clip=None, rollout_is_clip=1.1),
    ),
    dict(alpha=0.2, is_clip=None, rollout_is_clip=1.1),
  ),
  "token": (dict(token_signal=dict(name="sampled_token")), dict(alpha=1.0, granularity="token")),
  "sequence": (
    dict(token_signal=dict(name="sequence"), token_weight=dict(name="uniform")),
    dict(granularity="sequence", is_clip=None, rollout_is_clip=None),
  ),
}


@pytest.mark.parametrize("case", METHOD_CASES)
def test_fast_path_agrees_with_the_specification(case):
  """Rows, kernel and packing of the trainer against plain logits: loss and every gradient."""
  changes, kwargs = METHOD_CASES[case]
  config, params = fakes.toy_model(0)
  _, teacher = fakes.toy_model(1)
  batch = fakes.toy_batch(length=26, teacher_length=34)
  method = build.build_method(build.method_row("sdpo") | changes)
  signals = make_signals(config, method, temperature=1.3)

  def fast(p):
    return loss_of(method, signals(p, teacher, batch), batch)

  def plain(p):
    student = fakes.dense_logits(p, config, batch.policy, batch) / 1.3
    q = fakes.dense_logits(teacher, config, batch.readings[0].rows, batch) / 1.3
    return reference.sdpo_loss(
      student,
      q,
      batch.response_BR,
      batch.weight_BR,
      batch.readings[0].weight_BR.max(1),
      logp_old_BR=batch.logp_old_BR,
      logp_rollout_BR=batch.logp_rollout_BR,
      **kwargs,
    )

  (got, got_grad), (want, want_grad) = (
    jax.jit(jax.value_and_grad(f))(params) for f in (fast, plain)
  )
  # a divergence is made of log-probabilities of some nats, which float32 holds to 2e-7
  assert float(got) == pytest.approx(float(want), rel=1e-5, abs=3e-8)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max() + 1e-3)),
    got_grad,
    want_grad,
  )


def test_trust_region_mixes_logits():
  """log q proportional to .7 logits of the anchor + .3 logits of the policy, both on the teacher's
  prompt, no gradient to either.
  """
  config, params = fakes.toy_model(0)
  _, anchor = fakes.toy_model(1)
  batch = fakes.toy_batch()
  method = build.build_method(
    build.method_row("sdpo") | dict(teacher_weights=dict(name="trust_region", rate=0.3))
  )
  signals = make_signals(config, method)

  def fast(p):
    return loss_of(method, signals(p, anchor, batch), batch)

  def plain(p):
    dense = lambda w, rows, batch: fakes.dense_logits(w, config, rows, batch)
    q = 0.7 * dense(anchor, batch.readings[0].rows, batch) + 0.3 * dense(
      jax.lax.stop_gradient(p), batch.readings[0].rows, batch
    )
    return reference.sdpo_loss(
      dense(p, batch.policy, batch),
      q,
      batch.response_BR,
      batch.weight_BR,
      batch.readings[0].weight_BR.max(1),
      logp_old_BR=batch.logp_old_BR,
      logp_rollout_BR=batch.logp_rollout_BR,
    )

  (got, got_grad), (want, want_grad) = (
    jax.jit(jax.value_and_grad(f))(params) for f in (fast, plain)
  )
  assert float(got) == pytest.approx(float(want), rel=1e-5)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max() + 1e-3)),
    got_grad,
    want_grad,
  )


def loss_of(method, readings, batch):
  """The loss of a whole batch from the signals of its readings."""
  return token_loss(method, readings, batch, normalisers(method, batch))[0]


def policy_loss(logp_BR, batch, **changes):
  """Loss and gradient of a GRPO-like row with respect to the log-probabilities of the policy."""
  method = build.build_method(build.method_row("grpo") | changes)
  loss = lambda x: loss_of(method, (Signals(x, jnp.zeros_like(x), None, None),), batch)
  return jax.value_and_grad(loss)(jnp.asarray(logp_BR, jnp.float32))


def with_teacher(batch, weight_B):
  """The batch with these weights of its plain reading."""
  return batch._replace(
    readings=(batch.readings[0]._replace(weight_BR=fakes.per_token(weight_B, batch)),)
  )


def two_responses():
  """Lengths 1 and 3, advantages 1 and -1, log-probabilities equal to the old ones."""
  batch = fakes.toy_batch(rows=2, response=3)
  weight = np.array([[1, 0, 0], [1, 1, 1]], np.float32)
  old = np.full((2, 3), -1.0, np.float32)
  return batch._replace(
    weight_BR=weight,
    advantage_BR=fakes.per_token([1.0, -1.0], batch),
    logp_old_BR=old,
    logp_rollout_BR=old,
  ), old


def test_reductions_by_hand():
  batch, old = two_responses()
  for reduction, first, second in (
    (dict(name="token_mean"), 1 / 4, 1 / 4),
    (dict(name="sequence_mean"), 1 / 2, 1 / 6),
    (dict(name="constant", length=5.0), 1 / 10, 1 / 10),
  ):
    _, grad = policy_loss(old, batch, reduction=reduction)
    np.testing.assert_allclose(grad, [[-first, 0, 0], [second] * 3], rtol=1e-5)


def test_gspo_clips_whole_sequences_and_cispo_never_loses_a_gradient():
  batch, old = two_responses()
  up = old + np.array([[0.1, 0, 0], [0.1, 0.2, 0.0]], np.float32)
  value, grad = policy_loss(up, batch, surrogate=dict(name="gspo", low=0.05, high=0.05))
  s1, s2 = np.exp(0.1), np.exp(0.1)  # the mean of (.1, .2, 0) is .1 too
  # clipped for A > 0, free for A < 0
  assert float(value) == pytest.approx((-1.05 + 3 * s2) / 4, rel=1e-5)
  np.testing.assert_allclose(grad, [[0, 0, 0], [s2 / 4] * 3], rtol=1e-5)
  assert s1 > 1.05
  _, grad = policy_loss(up, batch, surrogate=dict(name="cispo", low=1.0, high=0.05))
  np.testing.assert_allclose(grad, [[-1.05 / 4, 0, 0], [1.05 / 4, 1.05 / 4, 1 / 4]], rtol=1e-5)


def test_opsd_clips_the_divergence_of_a_token():
  batch, old = two_responses()
  batch = with_teacher(batch, np.ones(2, np.float32))
  method = build.build_method(build.method_row("opsd"))
  divergence = jnp.array([[0.01, 9, 9], [0.04, 0.2, 3.0]], jnp.float32)
  loss = lambda d: loss_of(
    method, (Signals(jnp.asarray(old), jnp.zeros((2, 3)), d, jnp.asarray(old)),), batch
  )
  value, grad = jax.value_and_grad(loss)(divergence)
  assert float(value) == pytest.approx((0.01 + 0.04 + 0.05 + 0.05) / 4, rel=1e-5)
  np.testing.assert_allclose(grad, np.array([[1, 0, 0], [1, 0, 0]]) / 4, rtol=1e-5)


def test_clipped_surrogate_by_hand():
  """PPO's four cases of sign and side, ratio 1.5: clipped for A > 0, not for A < 0."""
  batch = fakes.toy_batch(rows=2)
  batch = batch._replace(advantage_BR=fakes.per_token([1.0, -1.0], batch))
  old = np.full_like(batch.logp_old_BR, -1.0)
  batch = batch._replace(logp_old_BR=old, logp_rollout_BR=old)
  up = Signals(jnp.asarray(old + np.log(1.5), jnp.float32), None, None, None)
  down = Signals(jnp.asarray(old + np.log(0.5), jnp.float32), None, None, None)
  advantage_B1 = batch.advantage_BR
  gain_up, gain_down = (-surrogate.clipped(x, batch, advantage_B1)[:, 0] for x in (up, down))
  np.testing.assert_allclose(gain_up, [1.28, -1.5], rtol=1e-6)
  np.testing.assert_allclose(gain_down, [0.5, -0.8], rtol=1e-6)


def test_group_mean_leaves_out_what_was_not_judged():
  reward = np.array([[1.0, 0.0, np.nan, 0.5], [np.nan] * 4])
  got = advantage.group_mean(reward)
  np.testing.assert_allclose(got, [[0.5, -0.5, 0.0, 0.0], [0.0] * 4])
  std = advantage.group_mean(np.array([[1.0, 0.0, 1.0, 0.0]]), normalize_std=True)
  np.testing.assert_allclose(
    std, np.array([[0.5, -0.5, 0.5, -0.5]]) / np.std([1, 0, 1, 0], ddof=1), rtol=1e-4
  )


def test_a_bonus_for_successes_is_supervised_training_on_them():
  """It comes to a success whatever its group did, and to nothing that was not judged."""
  reward = np.array([[1.0, 0.0, np.nan], [1.0, 1.0, 1.0]])
  got = advantage.group_mean(reward, success_bonus=0.25)
  np.testing.assert_array_equal(got, [[0.75, -0.5, 0.0], [0.25, 0.25, 0.25]])
  only_best = advantage.group_mean(np.array([[0.6, 0.4]]), 0.7, success_bonus=0.25)
  np.testing.assert_allclose(only_best, [[0.1, -0.1]])


def test_group_mean_within_a_clip():
  np.testing.assert_allclose(
    advantage.group_mean(np.array([[1.0, 0.0, 0.0, 0.0]]), clip=0.5), [[0.5, -0.25, -0.25, -0.25]]
  )


@pytest.mark.parametrize("name", methods.METHODS)
def test_rewards_that_are_not_numbers_change_nothing_else(name):
  """A row whose judge failed (NaN, weight 0) and the same batch without it: same advantages, loss
  and gradient for every method.
  """
  row = build.method_row(name)
  if row["reduction"]["name"] == "constant":
    row["reduction"]["length"] = 6.0
  method = build.build_method(row)
  rng = np.random.default_rng(3)
  signals = rng.normal(size=(5, 4, 6)).astype(np.float32)
  signals[2] = np.abs(signals[2])
  batch = fakes.toy_batch(rows=4)
  reward = np.array([[1.0, 0.0, np.nan, 0.75]])
  broken = batch._replace(
    advantage_BR=fakes.per_token(method.advantage(reward)[0], batch),
    weight_BR=batch.weight_BR * np.array([1, 1, 0, 1], np.float32)[:, None],
  )
  broken = with_teacher(broken, np.array([0, 1, 0, 1], np.float32))
  assert np.isfinite(broken.advantage_BR).all() and not broken.advantage_BR[2].any()
  signals[:, 2] = np.nan  # whatever the passes say of that row
  keep = np.array([0, 1, 3])
  alone = broken._replace(
    advantage_BR=fakes.per_token(np.insert(method.advantage(reward[:, keep])[0], 2, 0), batch)
  )
  without = alone._replace(
    **{name: x[keep] for name, x in alone._asdict().items() if name.endswith(("_B", "_BR"))}
  )
  without = with_teacher(without, alone.readings[0].weight_BR.max(1)[keep])

  def value_and_grad(signals, batch):
    readings = 1 + method.further_count
    rivals = lambda x: tuple(x[0] + i for i in range(method.rivals or 0)) or None
    loss = lambda x: loss_of(method, (Signals(*x, rivals(x)),) * readings, batch)
    return jax.value_and_grad(loss)(jnp.asarray(signals))

  (got, got_grad), (want, want_grad) = (
    value_and_grad(signals, broken),
    value_and_grad(signals[:, keep], without),
  )
  assert np.isfinite(got) and float(got) == pytest.approx(float(want), rel=1e-5)
  np.testing.assert_allclose(got_grad[:, keep], want_grad, atol=1e-6)
  assert not np.asarray(got_grad[:, 2]).any()


def test_srpo_by_hand():
  """Row 0 has a teacher: its divergence, weighted by the teacher's certainty with mean 1. Row 1 has
  none: the policy gradient. Both over all 3 tokens.
  """
  batch, old = two_responses()
  batch = batch._replace(weight_BR=np.array([[1, 1, 0], [1, 0, 0]], np.float32))
  has_teacher_B = np.array([1, 0], np.float32)
  batch = with_teacher(batch, has_teacher_B)._replace(route_B=has_teacher_B)
  method = build.build_method(build.method_row("srpo"))
  divergence, entropy = (
    np.array([[0.3, 0.7, 9], [9, 9, 9]], np.float32),
    np.array([[0.0, 2.0, 5], [0, 0, 0]], np.float32),
  )
  loss = lambda x, d: loss_of(
    method, (Signals(x, jnp.zeros((2, 3)), d, jnp.asarray(old), jnp.asarray(entropy)),), batch
  )
  value, (grad, grad_divergence) = jax.value_and_grad(loss, argnums=(0, 1))(
    jnp.asarray(old), jnp.asarray(divergence)
  )
  sure = np.exp([0.0, -2.0])
  sure /= sure.mean()
  # advantage -1: loss +1 at ratio 1
  assert float(value) == pytest.approx((sure[0] * 0.3 + sure[1] * 0.7 + 1.0) / 3, rel=1e-5)
  np.testing.assert_allclose(grad_divergence, [[sure[0] / 3, sure[1] / 3, 0], [0, 0, 0]], rtol=1e-5)
  np.testing.assert_allclose(grad, [[0, 0, 0], [1 / 3, 0, 0]], atol=1e-6)
  assert np.isclose(
    token_weight.certainty(
      Signals(jnp.asarray(old), None, None, None, jnp.asarray(entropy)), batch
    )[0, :2].mean(),
    1.0,
  )


def test_the_teachers_entropy_is_that_of_its_distribution():
  config, params = fakes.toy_model(0)
  _, teacher = fakes.toy_model(1)
  batch = fakes.toy_batch()
  method = build.build_method(build.method_row("srpo"))
  (plain,) = jax.jit(make_signals(config, method, temperature=1.3))(params, teacher, batch)
  logq_BRV = jax.nn.log_softmax(
    fakes.dense_logits(teacher, config, batch.readings[0].rows, batch) / 1.3
  )
  counted_BR = batch.weight_BR > 0
  np.testing.assert_allclose(
    plain.entropy_teacher_BR[counted_BR],
    -(jnp.exp(logq_BRV) * logq_BRV).sum(-1)[counted_BR],
    rtol=1e-4,
  )


def test_sc_sdpo_weighs_questions_by_how_open_they_are():
  reward = np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, np.nan], [1.0] * 4, [0.0] * 4])
  weight = advantage.question_spread(reward)
  np.testing.assert_allclose(weight[:, 0], [0.5, np.sqrt(2) / 3, 0, 0], rtol=1e-6)
  assert weight[1, 3] == 0
  batch, old = two_responses()
  batch = batch._replace(advantage_BR=fakes.per_token([0.5, 0.25], batch))
  batch = with_teacher(batch, np.ones(2, np.float32))
  method = build.build_method(build.method_row("sc_sdpo"))
  loss = lambda d: loss_of(
    method, (Signals(jnp.asarray(old), jnp.zeros((2, 3)), d, jnp.asarray(old)),), batch
  )
  np.testing.assert_allclose(
    jax.grad(loss)(jnp.ones((2, 3))), [[0.5 / 4, 0, 0], [0.25 / 4] * 3], rtol=1e-6
  )


def test_blend_is_the_weighted_sum_of_its_two_losses():
  config, params = fakes.toy_model(0)
  batch = fakes.toy_batch()
  blend = build.method_row("sdpo") | dict(
    advantage=dict(name="group_mean"), surrogate=dict(name="clipped"), policy_share=0.9
  )
  value = {}
  for name, row in dict(
    blend=blend, sdpo=build.method_row("sdpo"), grpo=build.method_row("grpo")
  ).items():
    method = build.build_method(row)
    value[name] = float(loss_of(method, make_signals(config, method)(params, None, batch), batch))
  assert value["blend"] == pytest.approx(0.9 * value["grpo"] + 0.1 * value["sdpo"], rel=1e-5)


@pytest.mark.parametrize(
  "change, named",
  [
    (dict(token_signal=dict(name="divergense")), "method.token_signal.name='divergense'"),
    (dict(token_signal=dict(name="divergence", alhpa=1.0)), "method.token_signal.alhpa"),
    (dict(teacher_context=dict(name="none")), "needs a teacher"),
    (
      dict(token_signal=dict(name="divergence", alpha=1.0, advantage_clip=5.0)),
      "method.token_signal.advantage_clip=5.0 must be above 0 and needs",
    ),
    (
      dict(token_signal=dict(name="divergence", ratio_bounds=(0.4, 10.0))),
      "method.token_signal.ratio_bounds=(0.4, 10.0) must be () or two numbers, one below",
    ),
    (
      dict(token_signal=dict(name="divergence", top_k=9, ratio_bounds=(0.0, 2.0))),
      "method.token_signal.ratio_bounds=(0.0, 2.0) must be above 0",
    ),
    (dict(policy_share=0.5), "needs a surrogate"),
    (dict(policy_share=1.5), "must lie in [0, 1]"),
    (
      dict(policy_share="both"),
      "method.policy_share='both' must lie in [0, 1], or be 'routed'",
    ),
    (dict(advantage=dict(name="question_spread")), "set both or neither"),
    (
      dict(
        advantage=dict(name="question_spread"), surrogate=dict(name="clipped"), policy_share=0.5
      ),
      "needs the advantage 'group_mean'",
    ),
  ],
)
def test_a_row_that_cannot_be_built_says_why(change, named):
  with pytest.raises(ValueError, match=re.escape(named)):
    build.build_method(build.method_row("sdpo") | change)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_row_builds(name):
  method = build.build_method(build.method_row(name))
  assert {*method._fields, "counterfactual"} >= set(build.AXES)
  axes = ("token_signal", "credit")
  assert method.needs_teacher == any(methods.METHODS[name][x]["name"] != "none" for x in axes)
