"""The train step: invariances that must not depend on layout, and what it does when a gradient is
not finite.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpo_jax.objectives import build
from sdpo_jax.optimizer import make_optimizer
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from tests import fakes

BLEND = build.method_row("sdpo") | dict(
  advantage=dict(name="group_mean"), surrogate=dict(name="clipped"), policy_share=0.3
)


@functools.cache
def grads_of(sliding=False):
  """(batch, teacher or None) -> (loss, gradient): read back from one SGD step of rate 1. The blend
  exercises both terms.
  """
  windows = dict(sliding=(True, False), sliding_window=5) if sliding else {}
  config, params = fakes.toy_model(0, **windows)
  method = build.build_method(BLEND)
  tx = optax.sgd(1.0)
  step = jax.jit(make_train_step(make_signals(config, method), method, tx, recompute_old=True))
  _, teacher = fakes.toy_model(1)

  def run(batch, teacher=teacher):
    state = init_state(params, tx)._replace(teacher=teacher)
    new, metrics = step(state, batch)
    return float(metrics["train/loss"].mean), jax.tree.map(
      lambda a, b: np.asarray(a - b), params, new.params
    )

  return run


def assert_same(a, b, rel=1e-5):
  assert a[0] == pytest.approx(b[0], rel=rel)
  scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(a[1]))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=rel * scale), a[1], b[1])


def test_padding_changes_nothing():
  """More rows, columns and tokens, and garbage in all of them."""
  narrow, wide = fakes.toy_batch(), fakes.toy_batch(spare=5)
  rng = np.random.default_rng(5)
  masked = wide.weight_BR == 0
  for field in ("response_BR", "logp_rollout_BR", "logp_old_BR"):
    getattr(wide, field)[masked] = rng.integers(1, 250, masked.sum())
  for half in (wide.policy, wide.readings[0].rows):
    padding = half.segment_CPT == 0
    half.token_CPT[padding] = rng.integers(1, 250, padding.sum())
    half.at_CX[0, -5:] = rng.integers(0, half.token_CPT.size, 5)
  assert_same(grads_of()(narrow), grads_of()(wide))


def test_packed_rows_equal_rows_of_their_own():
  """Several texts in a row, and in two packs that number by themselves."""
  alone = grads_of()(fakes.toy_batch(rows=8))
  packed = fakes.toy_batch(rows=8, length=33, teacher_length=41)
  assert packed.policy.segment_CPT.max() > 2 and packed.readings[0].rows.segment_CPT.max() > 2
  assert_same(alone, grads_of()(packed))
  assert_same(alone, grads_of()(fakes.toy_batch(rows=8, length=26, teacher_length=20, packs=2)))


def test_what_texts_share_may_stand_once():
  """Loss and gradient of texts that begin alike, with that beginning repeated and shared; the same
  with windows, which then span what is between.
  """
  batch = functools.partial(
    fakes.toy_batch,
    rows=8,
    packs=2,
    prompt=16,
    teacher_prompt=24,
    alike=4,
    length=64,
    teacher_length=90,
  )
  apart, shared = batch(), batch(share=True)
  for a, b in ((apart.policy, shared.policy), (apart.readings[0].rows, shared.readings[0].rows)):
    assert (b.segment_CPT > 0).sum() < 0.8 * (a.segment_CPT > 0).sum() and b.prefix_CPT.any()
  assert_same(grads_of()(apart), grads_of()(shared))
  assert_same(grads_of(sliding=True)(apart), grads_of(sliding=True)(shared))


def test_row_order_changes_nothing():
  batch = fakes.toy_batch(packs=4)
  order = np.array([2, 0, 3, 1])
  shuffled = jax.tree.map(lambda x: x[order] if x.ndim else x, batch)
  assert_same(grads_of()(batch), grads_of()(shuffled))


def test_micro_batches_change_nothing():
  """Rows of unequal length and distill mask: a mean of means would differ."""
  batch = functools.partial(fakes.toy_batch, rows=8, length=20, teacher_length=26)
  assert_same(grads_of()(batch()), grads_of()(batch(packs=4)))


def test_weight_zero_means_no_gradient():
  """A row of weight 0 may hold anything, not-a-number included."""
  batch = fakes.toy_batch()
  batch.weight_BR[1] = 0.0
  clean = grads_of()(batch)
  advantage_BR = batch.advantage_BR.copy()
  advantage_BR[1] = np.nan
  batch = batch._replace(advantage_BR=advantage_BR)
  batch.logp_old_BR[1] = np.inf
  assert_same(clean, grads_of()(batch), rel=1e-7)


def test_live_teacher_on_the_same_prompt_gives_zero():
  config, params = fakes.toy_model(0)
  batch = fakes.toy_batch()
  plain = batch.readings[0]._replace(rows=batch.policy)
  batch = batch._replace(readings=(plain,))
  method = build.build_method(build.method_row("sdpo") | dict(teacher_weights=dict(name="live")))
  step = jax.jit(make_train_step(make_signals(config, method), method, optax.sgd(1.0)))
  state, metrics = step(init_state(params, optax.sgd(1.0)), batch)
  assert abs(metrics["train/loss"].mean) < 1e-6
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, params)


@functools.cache
def adamw_step(method="sdpo", lr=0.0, updates=1):
  config, params = fakes.toy_model(0)
  tx = make_optimizer(
    name="adamw",
    lr=lr,
    warmup_steps=0,
    decay_steps=0,
    weight_decay=0.01,
    clip_norm=1.0,
    b1=0.9,
    b2=0.999,
    state_dtype="float32",
  )
  method = build.build_method(build.method_row(method))
  step = jax.jit(make_train_step(make_signals(config, method), method, tx, updates=updates))
  return step, init_state(params, tx, keep_teacher=True)


def test_learning_rate_zero_leaves_every_parameter_bit_identical():
  step, state = adamw_step()
  new, _ = step(state, fakes.toy_batch())
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), new.params, state.params)
  assert int(new.step) == 1


def test_the_moving_teacher_follows_once_per_generation_batch():
  step, state = adamw_step(lr=1e-2, updates=2)
  new, _ = step(state, fakes.toy_batch(packs=2))
  jax.tree.map(
    lambda t, old, p: np.testing.assert_allclose(t, old + 0.05 * (p - old), atol=1e-7),
    new.teacher,
    state.teacher,
    new.params,
  )
  assert not np.array_equal(new.params["embed"], state.params["embed"])


def test_a_moving_average_of_bfloat16_weights_moves():
  """A hundredth of a small step is below bfloat16's resolution: the average is kept in float32."""
  params, tx = {"w": jnp.full(4, 1.0, jnp.bfloat16)}, optax.sgd(1.0)
  state = init_state(params, tx, keep_teacher=True, teacher_in_float32=True)
  assert (
    state.teacher["w"].dtype == jnp.float32
    and init_state(params, tx, keep_teacher=True).teacher["w"].dtype == jnp.bfloat16
  )
  config, weights = fakes.toy_model(0, dtype="bfloat16", param_dtype="bfloat16")
  row = build.method_row("sdpo") | dict(teacher_weights=dict(name="ema", rate=0.01))
  method = build.build_method(row)
  step = jax.jit(make_train_step(make_signals(config, method), method, tx))
  before = init_state(weights, tx, keep_teacher=True, teacher_in_float32=True)
  rho = {"teacher_weights": np.float32(0.01)}
  after, _ = step(before, fakes.toy_batch()._replace(control=rho))
  jax.tree.map(
    lambda t, old, p: np.testing.assert_allclose(
      t, old + 0.01 * (p.astype(jnp.float32) - old), atol=1e-6
    ),
    after.teacher,
    before.teacher,
    after.params,
  )
  assert not np.array_equal(after.teacher["embed"], before.teacher["embed"])


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
  step, state = adamw_step(lr=1e-2, updates=2)
  batch = fakes.toy_batch(packs=2)
  batch.logp_rollout_BR[:] = np.nan
  broken, metrics = step(state, batch)
  for field in ("params", "teacher", "opt_state"):
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, b),
      getattr(broken, field),
      getattr(state, field),
    )
  assert (
    int(broken.skipped) == 2
    and int(broken.skipped_in_a_row) == 2
    and metrics["train/update_skipped"].mean == 1.0
  )
  good, _ = step(broken, fakes.toy_batch(packs=2))
  assert int(good.skipped) == 2 and int(good.skipped_in_a_row) == 0


def test_no_backward_work_and_no_gradient_for_the_teacher():
  """With a live teacher the gradient is that of a frozen copy: nothing flows through the teacher's
  half.
  """
  config, params = fakes.toy_model(0)
  batch = fakes.toy_batch()
  results = []
  for row in ("live", "frozen"):
    method = build.build_method(build.method_row("sdpo") | dict(teacher_weights=dict(name=row)))
    step = jax.jit(make_train_step(make_signals(config, method), method, optax.sgd(1.0)))
    results.append(
      step(init_state(params, optax.sgd(1.0), keep_teacher=row == "frozen"), batch)[0].params
    )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *results)


def test_warm_up_starts_at_zero_and_ends_at_the_rate():
  tx = make_optimizer(
    name="adamw",
    lr=1.0,
    warmup_steps=4,
    decay_steps=0,
    weight_decay=0.0,
    clip_norm=None,
    b1=0.9,
    b2=0.999,
    state_dtype=None,
  )
  params = jnp.ones(3)
  state, sizes = tx.init(params), []
  for _ in range(6):
    update, state = tx.update(jnp.ones(3), state, params)
    sizes.append(-float(update[0]))
  np.testing.assert_allclose(sizes, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0], atol=1e-4)


def test_both_moments_have_the_dtype_that_is_asked_for():
  settings = dict(
    name="adamw",
    lr=1e-2,
    warmup_steps=0,
    decay_steps=0,
    weight_decay=0.01,
    clip_norm=1.0,
    b1=0.9,
    b2=0.999,
  )
  params = {"w": jnp.ones(4, jnp.bfloat16)}
  for dtype, expected in (("float32", jnp.float32), (None, jnp.bfloat16)):
    tx = make_optimizer(**settings, state_dtype=dtype)
    state = tx.init(params)
    update, state = tx.update({"w": jnp.full(4, 0.5, jnp.bfloat16)}, state, params)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (4,)]
    assert len(moments) == 2 and all(m.dtype == expected for m in moments)
    assert optax.apply_updates(params, update)["w"].dtype == jnp.bfloat16
