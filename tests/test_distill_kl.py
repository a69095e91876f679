"""The distillation divergence against its float64 definition: values, every gradient, extremes, both dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.kernels import distill_kl_ref
from sdpo_jax.kernels import distill_kl_xla
from sdpo_jax.kernels.distill_kl import distill_kl
from sdpo_jax.kernels.distill_kl import distill_kl_sharded

ALPHAS = (0, 0.2, 0.5, 1)


def problem(X, D, E, V, seed=0, scale=1.0, dtype=np.float32):
  """Hidden states, heads, targets and cotangents of the four outputs; logits of about `scale`."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)
  arrays = (normal(X, D), normal(D, V) * scale / D**0.5, normal(X, E), normal(E, V) * scale / E**0.5)
  arrays = tuple(np.asarray(jnp.asarray(a, dtype)) for a in arrays)
  return arrays, rng.integers(0, V, X), [normal(X).astype(np.float32) for _ in range(4)]


@functools.cache
def compiled(fn, **static):
  def loss(h, w, g, u, target, cotangents):
    out = fn(h, w, g, u, target, **static)
    return sum(jnp.sum(c.astype(o.dtype) * o) for c, o in zip(cotangents, out)), out

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def run(fn, arrays, target, cotangents, **static):
  """(DistillKL, gradients of the four arrays) as float64 NumPy."""
  (_, out), grads = compiled(fn, **static)(*arrays, target, cotangents)
  to64 = lambda tree: [np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, np.float64) for x in tree]
  return to64(out), to64(grads)


def exact(arrays, target, cotangents, **static):
  with jax.enable_x64(True):
    return run(distill_kl_ref.distill_kl, [np.asarray(a, np.float64) for a in arrays], target,
               [np.asarray(c, np.float64) for c in cotangents], **static)


def check(got, want, value_tolerance=2e-5, gradient_tolerance=1e-4):
  for name, a, b in zip(distill_kl_ref.DistillKL._fields, got[0], want[0]):
    np.testing.assert_array_less(np.abs(a - b), value_tolerance * (1 + np.abs(b)) + 1e-300, err_msg=name)
  for name, a, b in zip("student_hidden student_head".split(), got[1], want[1]):
    assert np.abs(a - b).max() <= gradient_tolerance * np.abs(b).max(), name
  assert not any(g.any() for g in got[1][2:]), "the teacher got a gradient"
  assert got[0][0].min() >= -1e-6, "negative divergence"


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 128 entries or 8 tokens, so that small problems have several and a ragged last one."""
  monkeypatch.setattr(distill_kl_xla, "CPU_BLOCK_ENTRIES", 1)
  monkeypatch.setattr(distill_kl_xla, "BLOCK_ENTRIES", 1)


def test_by_hand():
  """Two entries, policy (3/4, 1/4), teacher (1/4, 3/4): every number worked out."""
  hidden, policy, teacher = np.ones((1, 1), np.float32), np.log([[3.0, 1.0]]), np.log([[1.0, 3.0]])
  for name in ("reference", "xla"):
    for alpha, want in ((0, np.log(3) / 2), (1, np.log(3) / 2), (0.5, 0.75 * np.log(1.5) + 0.25 * np.log(0.5))):
      out = distill_kl(hidden, policy.astype(np.float32), hidden, teacher.astype(np.float32), np.array([0]), alpha=alpha,
                       implementation=name)
      entropy = 2 * np.log(2) - 0.75 * np.log(3)
      np.testing.assert_allclose(np.ravel(out), [want, np.log(0.75), np.log(0.25), entropy], rtol=1e-6)


@pytest.mark.parametrize("blocks", ("one", "tokens", "vocabulary"))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_and_gradients(alpha, blocks, small_blocks):
  args = problem(21, 128, 256, 391, scale=3.0)
  check(run(distill_kl_xla.distill_kl, *args, alpha=alpha, temperature=0.7, blocks=blocks), exact(*args, alpha=alpha, temperature=0.7))


@pytest.mark.parametrize("alpha", (0, 0.5, 1))
@pytest.mark.parametrize("mesh_shape", ((2, 2, 2), (1, 1, 8), (1, 2, 4)))
def test_sharded_equals_unsharded(alpha, mesh_shape, small_blocks):
  """X = 21 divides by no mesh: it is padded. Gradients of both heads' layouts, float32."""
  mesh = jax.make_mesh(mesh_shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
  args = problem(21, 64, 32, 8 * 131, scale=3.0)
  check(run(functools.partial(distill_kl_sharded, mesh=mesh), *args, alpha=alpha, temperature=0.7),
        run(distill_kl_ref.distill_kl, *args, alpha=alpha, temperature=0.7), 3e-6, 3e-6)
