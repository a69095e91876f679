"""Tests the top M with a bucket for the rest, against whole logits and the full divergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.kernels import distill_kl_ref, distill_kl_xla
from sdpo_jax.kernels.distill_kl_sweeps import Inputs
from sdpo_jax.kernels.distill_topk import TopLogProbs, distill_topk, in_buckets, top_log_probs
from sdpo_jax.kernels.given_logp import given_log_probs


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Sets blocks of 128 entries: the best M come from several blocks, the last one ragged."""
  monkeypatch.setattr(distill_kl_xla, "CPU_BLOCK_ENTRIES", 1)


def problem(X=9, D=16, E=24, V=300, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return (normal(X, D), normal(D, V) * 0.6, normal(X, E), normal(E, V) * 0.6), rng.integers(0, V, X)


def plain(*arrays, alpha, top_k, add_tail, temperature):
  """Whole logits, the definition word for word; differentiated by jax."""
  log_softmax = lambda x: x - jax.scipy.special.logsumexp(x, axis=1, keepdims=True)
  hidden, head, teacher_hidden, teacher_head, target = arrays
  s = log_softmax(hidden @ head / temperature)
  t = jax.lax.stop_gradient(log_softmax(teacher_hidden @ teacher_head / temperature))
  _, index = jax.lax.top_k(s, top_k)
  a, b = (jnp.take_along_axis(x, index, axis=1) for x in (s, t))
  if add_tail:
    tail = lambda x: jnp.log(1 - jnp.sum(jnp.exp(x), axis=1, keepdims=True))
    a, b = (jnp.concatenate([x, tail(x)], axis=1) for x in (a, b))
  else:
    a, b = log_softmax(a), log_softmax(b)
  kl = lambda x, y: jnp.sum(jnp.exp(x) * (x - y), axis=1)
  m = jnp.log((1 - alpha) * jnp.exp(a) + alpha * jnp.exp(b))
  if alpha == 0:
    divergence = kl(b, a)
  elif alpha == 1:
    divergence = kl(a, b)
  else:
    divergence = (1 - alpha) * kl(a, m) + alpha * kl(b, m)
  at = lambda x: jnp.take_along_axis(x, target[:, None], axis=1)[:, 0]
  return distill_kl_ref.DistillKL(divergence, at(s), at(t), -jnp.sum(jnp.exp(s) * s, axis=1))


def value_and_gradients(fn, arrays, target, cotangents, **static):
  def loss(hidden, head):
    out = fn(hidden, head, *arrays[2:], target, **static)
    return sum(jnp.sum(c * o) for c, o in zip(cotangents, out)), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays[:2])
  return [np.asarray(x) for x in (*out, *grads)]


def topk(*arrays, **settings):
  return distill_topk(Inputs(*arrays), **settings)


@pytest.mark.parametrize("add_tail", (True, False))
@pytest.mark.parametrize("alpha", (0, 0.5, 1))
def test_equals_the_plain_formula(alpha, add_tail):
  arrays, target = problem()
  cotangents = np.random.default_rng(1).normal(size=(4, 9)).astype(np.float32)
  static = dict(alpha=alpha, top_k=7, add_tail=add_tail, temperature=0.8)
  got = value_and_gradients(topk, arrays, target, cotangents, **static)
  with jax.enable_x64(True):
    to64 = lambda x: np.asarray(x, np.float64)
    want = value_and_gradients(plain, tuple(map(to64, arrays)), target, to64(cotangents), **static)
  for a, b in zip(got[:4], want[:4]):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
  for a, b in zip(got[4:], want[4:]):
    assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


@pytest.mark.parametrize(
  "mesh_shape",
  (
    (1, 2, 2),
    pytest.param((2, 2, 2), marks=pytest.mark.slow),
    pytest.param((1, 1, 8), marks=pytest.mark.slow),
  ),
)
def test_sharded_equals_unsharded(mesh_shape):
  """9 tokens divide by no mesh; 41 entries are more than a device of the last mesh has (38)."""
  mesh = jax.make_mesh(
    mesh_shape,
    ("data", "fsdp", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[: np.prod(mesh_shape)],
  )
  arrays, target = problem(V=304)
  cotangents = np.random.default_rng(1).normal(size=(4, 9)).astype(np.float32)
  static = dict(alpha=0.5, top_k=41, temperature=0.8)
  whole = value_and_gradients(topk, arrays, target, cotangents, **static)
  for a, b in zip(
    value_and_gradients(topk, arrays, target, cotangents, mesh=mesh, **static), whole
  ):
    np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-6 * np.abs(b).max())
  at = lambda **mesh: np.asarray(top_log_probs(Inputs(*arrays, target), top_k=41, **mesh).index_XM)
  np.testing.assert_array_equal(at(mesh=mesh), at())


def test_entries_are_the_policys_best():
  arrays, target = problem()
  top = top_log_probs(Inputs(*arrays, target), top_k=5)
  s = arrays[0] @ arrays[1]
  np.testing.assert_array_equal(top.index_XM, np.argsort(-s, axis=1)[:, :5])
  t = jax.nn.log_softmax(arrays[2] @ arrays[3])
  np.testing.assert_allclose(
    top.logp_teacher_XM, np.take_along_axis(np.asarray(t), np.asarray(top.index_XM), 1), atol=1e-5
  )


@pytest.mark.parametrize("alpha", (0, 0.5, 1))
def test_bucketed_never_exceeds_the_full_divergence_and_reaches_it(alpha):
  """In float64: 1 - sum(p) has few digits left in float32 when the rest is small."""
  with jax.enable_x64(True):
    arrays, target = problem(V=40)
    arrays = [np.asarray(a, np.float64) for a in arrays]
    full = distill_kl_ref.distill_kl(*arrays, target, alpha=alpha, temperature=1.0).divergence_X
    bucketed = [
      np.asarray(distill_topk(Inputs(*arrays, target), alpha=alpha, top_k=k).divergence_X)
      for k in (1, 5, 39)
    ]
    for smaller, larger in zip(bucketed, bucketed[1:] + [full]):
      assert (smaller <= larger + 1e-9).all()
    np.testing.assert_allclose(bucketed[2], full, rtol=1e-6)
    np.testing.assert_allclose(
      distill_topk(Inputs(*arrays, target), alpha=alpha, top_k=100).divergence_X, full, atol=1e-5
    )


def test_same_weights_and_prompt_give_zero():
  (hidden, head, _, _), target = problem()

  def loss(*policy):
    return jnp.sum(
      distill_topk(Inputs(*policy, hidden, head, target), alpha=1, top_k=6).divergence_X
    )

  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
  assert value == 0 and max(np.abs(g).max() for g in grads) <= 1e-6


def test_top_k_must_be_positive():
  arrays, target = problem()
  with pytest.raises(ValueError, match="top_k=0"):
    distill_topk(Inputs(*arrays, target), alpha=1, top_k=0)


def given_buckets(index_XM, teacher_XM, teacher_X, *arrays, mesh=None, **settings):
  """The bucketed divergence from a teacher whose numbers at the named entries are constants."""
  hidden, head, _, _, target = arrays
  temperature = settings.pop("temperature")
  given = given_log_probs(hidden, head, target, index_XM, temperature=temperature, mesh=mesh)
  top = TopLogProbs(given.logp_XM, teacher_XM, index_XM, given.logp_X, teacher_X, given.entropy_X)
  return in_buckets(top, advantage_clip=None, **settings)


@pytest.mark.parametrize("mesh_shape", (None, (1, 2, 2)))
def test_entries_named_by_the_caller_give_the_same_value_and_gradients(mesh_shape):
  """When they are the policy's own top M; each token's in another order, which must not matter."""
  mesh = None
  if mesh_shape:
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(
      mesh_shape, ("data", "fsdp", "tensor"), axis_types=axis_types, devices=jax.devices()[:4]
    )
  arrays, target = problem(V=304)
  cotangents = np.random.default_rng(1).normal(size=(4, 9)).astype(np.float32)
  shared = dict(alpha=0.5, add_tail=True, temperature=0.8)
  want = value_and_gradients(topk, arrays, target, cotangents, top_k=7, **shared)
  top = top_log_probs(Inputs(*arrays, target), top_k=7, temperature=0.8)
  order_XM = np.random.default_rng(2).permuted(np.tile(np.arange(7), (9, 1)), axis=1)
  index_XM, teacher_XM = (
    np.take_along_axis(np.asarray(x), order_XM, 1) for x in (top.index_XM, top.logp_teacher_XM)
  )
  fn = functools.partial(given_buckets, index_XM, teacher_XM, np.asarray(top.logp_teacher_X))
  got = value_and_gradients(fn, arrays, target, cotangents, mesh=mesh, **shared)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_entries_named_by_the_caller_need_not_be_likely():
  arrays, target = problem()
  index_XM = np.random.default_rng(3).integers(0, 300, (9, 4))
  given = given_log_probs(arrays[0], arrays[1], target, index_XM)
  logp_XV = np.asarray(jax.nn.log_softmax(arrays[0] @ arrays[1]))
  np.testing.assert_allclose(given.logp_XM, np.take_along_axis(logp_XV, index_XM, 1), atol=1e-4)


def test_the_ratio_of_the_readings_is_held_within_bounds():
  """By hand: two entries leave the bounds, on either side; q is not renormalised."""
  pi, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.29, 0.61])
  top = TopLogProbs(*np.log([[pi], [q]]), None, *np.zeros((3, 1)))
  held = np.array([0.5 * 0.4, 0.29, 0.2 * 2.0])
  mean = (pi + held) / 2
  want = 0.5 * np.sum(pi * np.log(pi / mean)) + 0.5 * np.sum(held * np.log(held / mean))
  settings = dict(alpha=0.5, add_tail=False, ratio_bounds=(0.4, 2.0))

  def loss(logp_XM):
    return in_buckets(top._replace(logp_XM=logp_XM), **settings).divergence_X[0]

  got, grad = jax.value_and_grad(loss)(jnp.log(pi)[None])
  np.testing.assert_allclose(got, want, rtol=1e-6)
  # with q held constant; logits' gradient: what is common to all entries falls out of it
  of_logp = 0.5 * pi * np.log(pi / mean)
  np.testing.assert_allclose(grad[0], of_logp - pi * of_logp.sum(), rtol=1e-5, atol=1e-7)
  free = in_buckets(top, alpha=0.5, add_tail=False).divergence_X[0]
  wide = in_buckets(top, alpha=0.5, add_tail=False, ratio_bounds=(1e-9, 1e9))
  assert float(wide.divergence_X[0]) == float(free) > float(got)
