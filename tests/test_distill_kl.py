"""Tests the distillation divergence against its float64 definition.

That is values, every gradient, extreme logits, and both dtypes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.kernels import distill_kl_ref, distill_kl_xla
from sdpo_jax.kernels.distill_kl import distill_kl, distill_kl_sharded
from sdpo_jax.kernels.distill_kl_sweeps import Inputs

ALPHAS = (0, 0.2, 0.5, 1)


def problem(X, D, E, V, seed=0, scale=1.0, dtype=np.float32):
  """Hidden states, heads, targets and cotangents of the four outputs; logits of about `scale`."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)
  arrays = (
    normal(X, D),
    normal(D, V) * scale / D**0.5,
    normal(X, E),
    normal(E, V) * scale / E**0.5,
  )
  arrays = tuple(np.asarray(jnp.asarray(a, dtype)) for a in arrays)
  return arrays, rng.integers(0, V, X), [normal(X).astype(np.float32) for _ in range(4)]


@functools.cache
def compiled(fn, **static):
  def loss(hidden, head, teacher_hidden, teacher_head, target, cotangents):
    out = fn(hidden, head, teacher_hidden, teacher_head, target, **static)
    return sum(jnp.sum(c.astype(o.dtype) * o) for c, o in zip(cotangents, out)), out

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def run(fn, arrays, target, cotangents, **static):
  """(DistillKL, gradients of the four arrays) as float64 NumPy."""
  (_, out), grads = compiled(fn, **static)(*arrays, target, cotangents)
  to64 = lambda tree: [
    np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, np.float64) for x in tree
  ]
  return to64(out), to64(grads)


def exact(arrays, target, cotangents, **static):
  with jax.enable_x64(True):
    return run(
      distill_kl_ref.distill_kl,
      [np.asarray(a, np.float64) for a in arrays],
      target,
      [np.asarray(c, np.float64) for c in cotangents],
      **static,
    )


def check(got, want, value_tolerance=2e-5, gradient_tolerance=1e-4):
  for name, a, b in zip(distill_kl_ref.DistillKL._fields, got[0], want[0]):
    np.testing.assert_array_less(
      np.abs(a - b), value_tolerance * (1 + np.abs(b)) + 1e-300, err_msg=name
    )
  for name, a, b in zip("student_hidden student_head".split(), got[1], want[1]):
    assert np.abs(a - b).max() <= gradient_tolerance * np.abs(b).max(), name
  assert not any(g.any() for g in got[1][2:]), "the teacher got a gradient"
  assert got[0][0].min() >= -1e-6, "negative divergence"


@pytest.fixture
def small_blocks(monkeypatch):
  """Sets blocks of 128 entries or 8 tokens: small problems have several, the last one ragged."""
  monkeypatch.setattr(distill_kl_xla, "CPU_BLOCK_ENTRIES", 1)
  monkeypatch.setattr(distill_kl_xla, "BLOCK_ENTRIES", 1)


def test_by_hand():
  """Two entries, policy (3/4, 1/4), teacher (1/4, 3/4): every number worked out."""
  hidden, policy, teacher = np.ones((1, 1), np.float32), np.log([[3.0, 1.0]]), np.log([[1.0, 3.0]])
  for name in ("reference", "xla"):
    for alpha, want in (
      (0, np.log(3) / 2),
      (1, np.log(3) / 2),
      (0.5, 0.75 * np.log(1.5) + 0.25 * np.log(0.5)),
    ):
      out = distill_kl(
        hidden,
        policy.astype(np.float32),
        hidden,
        teacher.astype(np.float32),
        np.array([0]),
        alpha=alpha,
        implementation=name,
      )
      entropy = 2 * np.log(2) - 0.75 * np.log(3)
      np.testing.assert_allclose(
        np.ravel(out), [want, np.log(0.75), np.log(0.25), entropy], rtol=1e-6
      )


@pytest.mark.parametrize("blocks", ("one", "tokens", "vocabulary"))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_and_gradients(alpha, blocks, small_blocks):
  args = problem(21, 128, 256, 391, scale=3.0)
  check(
    run(distill_kl_xla.distill_kl, *args, alpha=alpha, temperature=0.7, blocks=blocks),
    exact(*args, alpha=alpha, temperature=0.7),
  )


def sharded(mesh, **settings):
  """Returns distill_kl_sharded with the arguments of distill_kl."""

  def run_sharded(*arrays, **more):
    return distill_kl_sharded(Inputs(*arrays), mesh=mesh, **settings, **more)

  return run_sharded


@pytest.mark.parametrize("alpha", (0, 0.5, 1))
@pytest.mark.parametrize("mesh_shape", ((2, 2, 2), (1, 1, 8), (1, 2, 4)))
def test_sharded_equals_unsharded(alpha, mesh_shape, small_blocks):
  """X = 21 divides by no mesh: it is padded. Gradients of both heads' layouts, float32."""
  mesh = jax.make_mesh(
    mesh_shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  args = problem(21, 64, 32, 8 * 131, scale=3.0)
  check(
    run(sharded(mesh), *args, alpha=alpha, temperature=0.7),
    run(distill_kl_ref.distill_kl, *args, alpha=alpha, temperature=0.7),
    3e-6,
    3e-6,
  )


@pytest.mark.parametrize(
  "name,X,D,E,V",
  [("one_token", 1, 128, 128, 257), ("prime", 13, 4096, 128, 131), ("tiny", 3, 128, 128, 2)],
)
def test_odd_sizes(name, X, D, E, V):
  args = problem(X, D, E, V, scale=2.0)
  for alpha in (0.5, 1):
    check(run(distill_kl, *args, alpha=alpha), exact(*args, alpha=alpha, temperature=1.0))


def extreme(kind):
  """Logits that are the head's own entries: every token reads one row of it."""
  (_, head, _, teacher_head), target, cotangents = problem(12, 128, 128, 391)
  rng = np.random.default_rng(3)
  hidden = np.eye(128, dtype=np.float32)[rng.integers(0, 128, 12)]
  if kind == "eighty":
    head, teacher_head = (
      rng.choice([-80.0, 0.0, 80.0], head.shape).astype(np.float32) for _ in range(2)
    )
  # each side sure of one entry, the policy of another one than the teacher
  elif kind == "one_hot":
    head, teacher_head = (
      np.where(np.arange(391) == rng.integers(0, 391, (128, 1)), 80, -80).astype(np.float32)
      for _ in range(2)
    )
  elif kind == "teacher_sure":
    teacher_head = np.where(np.arange(391) == 5, 80, -80) * np.ones_like(teacher_head)
  return (hidden, head, hidden, teacher_head), target, cotangents


@pytest.mark.parametrize("blocks", ("one", "vocabulary"))
@pytest.mark.parametrize("kind", ("eighty", "one_hot", "teacher_sure"))
def test_extreme_logits(kind, blocks, small_blocks):
  args = extreme(kind)
  for alpha in (0, 0.5, 1):
    check(
      run(distill_kl_xla.distill_kl, *args, alpha=alpha, temperature=1.0, blocks=blocks),
      exact(*args, alpha=alpha, temperature=1.0),
    )


@pytest.mark.parametrize("blocks", ("one", "tokens", "vocabulary"))
def test_teacher_equal_to_policy_gives_exactly_nothing(blocks, small_blocks):
  (hidden, head, _, _), target, (weight, *_) = problem(21, 128, 128, 391, scale=5.0)
  for alpha in ALPHAS:
    cotangents = [weight] + [np.zeros_like(weight)] * 3
    (value, *_), grads = run(
      distill_kl_xla.distill_kl,
      (hidden, head, hidden, head),
      target,
      cotangents,
      alpha=alpha,
      temperature=1.0,
      blocks=blocks,
    )
    assert np.abs(value).max() <= 1e-6 and not grads[0].any() and not grads[1].any()


@pytest.mark.parametrize("blocks", ("one", "tokens", "vocabulary"))
def test_bfloat16_inputs(blocks, small_blocks):
  """Values are as exact as for float32 inputs.

  Gradients are within the rounding of bfloat16 dlogits and results.
  """
  args = problem(21, 256, 128, 391, scale=3.0, dtype=jnp.bfloat16)
  for alpha in (0, 0.5, 1):
    check(
      run(distill_kl_xla.distill_kl, *args, alpha=alpha, temperature=1.0, blocks=blocks),
      exact(*args, alpha=alpha, temperature=1.0),
      gradient_tolerance=2**-7,
    )


@pytest.mark.parametrize(
  "implementation", ("xla", pytest.param("pallas_tpu", marks=pytest.mark.slow))
)
@pytest.mark.parametrize("epsilon", (0.016, 0.15, 1.5))
def test_gradient_survives_a_close_teacher_in_bfloat16(epsilon, implementation):
  """KLs are about 1e-4, 1e-2 and 1; bfloat16 logits would be off by over 30 % at the small end."""
  (hidden, head, _, _), target, (weight, *_) = problem(
    16, 256, 256, 2000, scale=3.0, dtype=jnp.bfloat16
  )
  noise = np.random.default_rng(9).normal(size=head.shape).astype(np.float32) * epsilon / 16
  teacher_head = np.asarray(jnp.asarray(head.astype(np.float32) + noise, jnp.bfloat16))
  cotangents = [np.abs(weight)] + [np.zeros_like(weight)] * 3
  for alpha in (0, 0.5, 1):
    args = (hidden, head, hidden, teacher_head), target, cotangents
    got, want = (
      run(distill_kl, *args, alpha=alpha, implementation=implementation),
      exact(*args, alpha=alpha, temperature=1.0),
    )
    assert (
      alpha == 0.5 or 0.5 < want[0][0].mean() / {0.016: 1.2e-4, 0.15: 9e-3, 1.5: 0.85}[epsilon] < 2
    )
    for a, b in zip(got[1][:2], want[1][:2]):
      assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b)


@pytest.mark.parametrize("alpha", (0, 0.5, 1))
def test_weights_let_the_forward_pass_make_the_gradient(alpha, small_blocks):
  arrays, target, (weight, c_logp, *_) = problem(21, 128, 256, 391, scale=3.0)
  weight[3:5] = 0

  def grads(scale, logp_weight, promised):
    def loss(hidden, head):
      out = distill_kl_xla.distill_kl(
        hidden,
        head,
        *arrays[2:],
        target,
        alpha=alpha,
        temperature=0.7,
        weights_X=promised,
        blocks="tokens",
      )
      loss = scale * jnp.sum(weight * out.divergence_X)
      return loss if logp_weight is None else loss + jnp.sum(logp_weight * out.logp_X)

    return [np.asarray(g) for g in jax.jit(jax.grad(loss, argnums=(0, 1)))(*arrays[:2])]

  for scale, logp_weight in ((1.0, None), (-2.5, None), (0.0, None), (1.0, c_logp)):
    for a, b in zip(grads(scale, logp_weight, weight), grads(scale, logp_weight, None)):
      np.testing.assert_allclose(a, b, atol=3e-6 * max(np.abs(b).max(), 1e-3))
  assert all(np.isnan(g).all() for g in grads(1.0, None, np.abs(weight) + 1)), (
    "a broken promise must not pass for a gradient"
  )


def test_compiled_memory_at_a_real_vocabulary():
  """The mixture form in float32 takes at most 250 MB beside arguments and gradients."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  args = array(1024, 256), array(256, 151936), array(1024, 256), array(256, 151936)
  loss = lambda *a: jnp.mean(distill_kl(*a[:4], a[4], alpha=0.5, implementation="xla").divergence_X)
  compiled_ = (
    jax.jit(jax.grad(loss, argnums=(0, 1)))
    .lower(*args, jax.ShapeDtypeStruct((1024,), jnp.int32))
    .compile()
  )
  assert compiled_.memory_analysis().temp_size_in_bytes <= 250e6


def test_tied_embedding_is_not_copied_for_small_problems():
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

  def loss(hidden, embedding, teacher_hidden, target):
    head = embedding.T
    return jnp.mean(distill_kl(hidden, head, teacher_hidden, head, target, alpha=0.5).divergence_X)

  lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
    array(64, 128), array(700, 128), array(64, 128), jax.ShapeDtypeStruct((64,), jnp.int32)
  )
  assert "f32[128,700]" not in lowered.compile().as_text()


@pytest.mark.parametrize(
  "wrong,message",
  [
    (dict(implementation="fast"), "implementation='fast'"),
    (dict(alpha=1.5), "alpha=1.5"),
    (dict(temperature=0), "temperature=0"),
  ],
)
def test_wrong_settings_are_named(wrong, message):
  arrays, target, _ = problem(2, 128, 128, 9)
  with pytest.raises(ValueError, match=message):
    distill_kl(*arrays, target, **(dict(alpha=0.5) | wrong))
  with pytest.raises(AssertionError):
    distill_kl(*arrays, target[:1], alpha=0.5)


def test_name_is_logged_once(caplog):
  arrays, target, _ = problem(2, 128, 128, 9)
  from sdpo_jax.kernels import distill_kl as module

  module._log_once.cache_clear()
  with caplog.at_level("INFO"):
    for _ in range(2):
      distill_kl(*arrays, target, alpha=1)
  assert [r.getMessage() for r in caplog.records if "distillation" in r.getMessage()] == [
    "distillation divergence: implementation xla on cpu"
  ]


def test_choice_on_a_tpu():
  """A big problem alone on its device gets the kernel; a shared or small one plain XLA."""
  from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

  from sdpo_jax.kernels import distill_kl as module

  tpu = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
  )
  arrays = [jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16)] * 4
  with use_abstract_mesh(tpu):
    assert module._choose(None, arrays, 4096, 151936, alone=True) == "pallas_tpu"
    assert module._choose(None, arrays, 4096, 151936, alone=False) == "xla"
    assert module._choose(None, arrays, 64, 700, alone=True) == "xla"
    assert module._choose("xla", arrays, 4096, 151936, alone=True) == "xla"
  assert module._choose(None, arrays, 4096, 151936, alone=True) == "xla", "on a CPU"
