"""Tests log-probability and entropy of the policy alone against their float64 definition.

That is values and gradients, in blocks, over meshes, in both dtypes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax import train_step
from sdpo_jax.kernels import token_logp as module
from sdpo_jax.kernels.token_logp import token_logp
from sdpo_jax.model import decoder
from sdpo_jax.objectives import build
from tests import fakes


def problem(X, D, V, dtype=np.float32):
  """Hidden states and head with logits of about 3, targets, cotangents of both outputs."""
  rng = np.random.default_rng(0)
  arrays = rng.normal(size=(X, D)), rng.normal(size=(D, V)) * 3 / D**0.5
  return (
    [jnp.asarray(a, dtype) for a in arrays],
    rng.integers(0, V, X),
    rng.normal(size=(2, X)).astype(np.float32),
  )


def run(fn, arrays, target, cotangents):
  """(logp, entropy, gradient of the hidden states, of the head) as float64 NumPy."""

  def loss(hidden, head):
    out = fn(hidden, head, target)
    return sum(jnp.sum(c * o) for c, o in zip(cotangents, out)), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays)
  return [np.asarray(x, np.float64) for x in (*out, *grads)]


def definition(hidden, head, target, temperature):
  logp_XV = jax.nn.log_softmax(hidden @ head / temperature)
  return logp_XV[jnp.arange(len(target)), target], -jnp.sum(jnp.exp(logp_XV) * logp_XV, 1)


def exact(arrays, target, cotangents, temperature):
  with jax.enable_x64(True):
    return run(
      functools.partial(definition, temperature=temperature),
      [np.asarray(a.astype(jnp.float32), np.float64) for a in arrays],
      target,
      cotangents,
    )


def check(got, want, tolerance):
  for name, a, b in zip("logp entropy hidden head".split(), got, want):
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


def test_by_hand():
  """Two entries, (3/4, 1/4)."""
  logp, entropy = token_logp(jnp.ones((1, 1)), jnp.log(jnp.array([[3.0, 1.0]])), jnp.array([1]))
  np.testing.assert_allclose(
    [*logp, *entropy], [np.log(0.25), 2 * np.log(2) - 0.75 * np.log(3)], rtol=1e-6
  )


@pytest.mark.parametrize("block_bytes", (module.BLOCK_BYTES, 1), ids=("all_at_once", "blocks"))
@pytest.mark.parametrize(
  "dtype,tolerance", ((np.float32, 1e-5), (jnp.bfloat16, 1e-2)), ids=("float32", "bfloat16")
)
def test_values_and_gradients(dtype, tolerance, block_bytes, monkeypatch):
  """391 entries in blocks of 128, the last one ragged."""
  monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
  args = problem(21, 64, 391, dtype)
  got = run(functools.partial(token_logp, temperature=0.7), *args)
  want = exact(*args, 0.7)
  check(got[:2], want[:2], 1e-5)  # logits are float32 either way
  check(got, want, tolerance)


@pytest.mark.parametrize("block_bytes", (module.BLOCK_BYTES, 1), ids=("one_block", "blocks"))
@pytest.mark.parametrize("mesh_shape", ((2, 2, 2), (1, 8, 1), (1, 1, 8), (4, 1, 2)))
def test_sharded_equals_plain(mesh_shape, block_bytes, monkeypatch):
  """21 tokens divide by no row shards; 131 to 1,048 entries a device, in blocks of 128."""
  mesh = jax.make_mesh(
    mesh_shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  args = problem(21, 64, 8 * 131)
  want = run(functools.partial(token_logp, temperature=0.7), *args)
  monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
  got = run(functools.partial(token_logp, temperature=0.7, mesh=mesh), *args)
  check(got, want, 1e-5)
  check(got, exact(*args, 0.7), 1e-5)


def test_a_head_that_does_not_divide_is_named():
  mesh = jax.make_mesh(
    (1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  for D, V in ((64, 391), (66, 392)):
    arrays, target, _ = problem(4, D, V)
    with pytest.raises(ValueError, match=f"{D} x {V}"):
      token_logp(*arrays, target, mesh=mesh)


def test_the_train_step_multiplies_in_the_dtype_of_the_model(monkeypatch):
  """Hidden states and head come as bfloat16, as the divergence gets them, from float32 weights."""
  config, seen = fakes.toy_config(dtype="bfloat16"), []
  monkeypatch.setattr(
    train_step,
    "token_logp",
    lambda *arrays, **settings: (
      seen.append([x.dtype for x in arrays[:2]]) or token_logp(*arrays, **settings)
    ),
  )
  signals = train_step.make_signals(config, build.build_method(build.method_row("grpo")))
  assert decoder.shapes(config)["embed"].dtype == jnp.float32
  jax.eval_shape(lambda params: signals(params, None, fakes.toy_batch()), decoder.shapes(config))
  assert seen == [[jnp.bfloat16, jnp.bfloat16]]
