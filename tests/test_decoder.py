"""The decoder against itself.

Causality, packing, cache, the policy-teacher pair, sharding, precision, compile size.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax import sharding
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig, Rope

QWEN = ModelConfig(
  family="qwen3",
  vocab=61,
  width=32,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=12,
  ff_width=48,
  qk_norm="head",
  tied=True,
)
OLMO = dataclasses.replace(
  QWEN,
  family="olmo3",
  qk_norm="all",
  norm_placement="post",
  tied=False,
  sliding=(True, False, True),
  sliding_window=5,
  rope=Rope(5e4, "yarn", factor=4.0, original_positions=64, attention_factor=1.2),
  sliding_rope=Rope(7e3),
)
YARN = dataclasses.replace(OLMO, rope=dataclasses.replace(OLMO.rope, truncate=False))
GEMMA = dataclasses.replace(
  QWEN,
  family="gemma3_text",
  norm_placement="both",
  norm_plus_one=True,
  scaled_embedding=True,
  activation="gelu_tanh",
  query_scale=1.25,
  sliding=(True, False, True),
  sliding_window=5,
  rope=Rope(5e4, "linear", factor=4.0),
  sliding_rope=Rope(7e3),
)
LLAMA = dataclasses.replace(
  QWEN, family="llama", qk_norm="none", rope=Rope(3e4, "llama3", factor=4.0, original_positions=64)
)

# Many programs, little arithmetic: what takes the time here is the compiler.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
logits = jit(decoder.logits, static_argnums=1)


@functools.cache
def params_of(config):
  """Random weights whose norms and biases are not at their neutral start."""
  rng = np.random.default_rng(0)

  def draw(x, axes):
    scale = 0.3 * rng.standard_normal(x.shape)
    is_scale = axes in ("D", "LD", "LH", "LNH", "LKH") and not config.norm_plus_one
    return jnp.asarray(scale + is_scale, x.dtype)

  return jax.tree.map(draw, decoder.shapes(config), decoder.axes(config))


def tokens(rows, length, seed=0):
  return np.random.default_rng(seed).integers(0, QWEN.vocab, (rows, length)).astype(np.int32)


def test_init_agrees_with_the_declared_axes_and_shapes():
  for config in (
    QWEN,
    OLMO,
    GEMMA,
    dataclasses.replace(QWEN, qkv_bias=True, param_dtype="bfloat16"),
  ):
    params = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
      lambda x: (x.shape, x.dtype), decoder.shapes(config)
    )
    assert all(
      jax.tree.leaves(jax.tree.map(lambda x, a: x.ndim == len(a), params, decoder.axes(config)))
    )


@pytest.mark.parametrize("config", [QWEN, OLMO, GEMMA], ids=["qwen", "olmo", "gemma"])
def test_a_later_token_cannot_change_an_earlier_logit(config):
  before = tokens(2, 16)
  after = before.copy()
  after[:, 9] = (after[:, 9] + 1) % config.vocab
  a, b = (np.asarray(logits(params_of(config), config, row)) for row in (before, after))
  np.testing.assert_array_equal(a[:, :9], b[:, :9])
  assert np.all(np.max(np.abs(a[:, 9:] - b[:, 9:]), axis=-1)[:, 0] > 1e-3)


@pytest.mark.parametrize("config", [QWEN, OLMO, GEMMA], ids=["qwen", "olmo", "gemma"])
def test_packed_and_padded_rows_equal_rows_alone(config):
  a, b = tokens(1, 9, seed=1), tokens(1, 12, seed=2)
  params = params_of(config)
  alone = np.concatenate([logits(params, config, a), logits(params, config, b)], axis=1)
  packed = np.pad(np.concatenate([a, b], axis=1), [(0, 0), (3, 4)])
  segments = np.array([[0] * 3 + [1] * 9 + [2] * 12 + [0] * 4])
  together = np.asarray(logits(params, config, packed, segment_ids_BT=segments))
  np.testing.assert_allclose(together[:, 3:24], alone, atol=2e-5)
  positions = np.array([[0] * 3 + list(range(9)) + list(range(12)) + [0] * 4])
  explicit = np.asarray(
    logits(params, config, packed, positions_BT=positions, segment_ids_BT=segments)
  )
  np.testing.assert_array_equal(explicit[:, 3:24], together[:, 3:24])
  assert np.all(np.isfinite(together))


def halves():
  policy_tokens, teacher = tokens(3, 10, seed=3), tokens(2, 15, seed=4)
  teacher_segments = np.array([[1] * 15, [0] * 4 + [1] * 11])
  return (policy_tokens, None, None), (teacher, None, teacher_segments)


@pytest.mark.parametrize("config", [QWEN, OLMO], ids=["qwen", "olmo"])
@pytest.mark.parametrize("ema", [False, True], ids=["live", "ema"])
def test_the_pair_equals_two_passes_and_only_the_policy_is_differentiated(config, ema):
  params, (policy_rows, teacher) = params_of(config), halves()
  teacher_params = jax.tree.map(lambda x: np.float32(0.9) * np.asarray(x), params) if ema else None

  def pair_loss(params, teacher_params, remat="none"):
    policy, teaching = decoder.hidden_pair(
      params, teacher_params, config, policy_rows, teacher, remat=remat
    )
    return jnp.sum(jnp.sin(policy)) + jnp.sum(jnp.cos(teaching)), (policy, teaching)

  def policy_loss(params):
    return jnp.sum(jnp.sin(decoder.hidden(params, config, policy_rows[0])))

  if ema:
    (grads, teacher_grads), (policy, teaching) = jit(
      jax.grad(pair_loss, argnums=(0, 1), has_aux=True)
    )(params, teacher_params)
    assert all(not np.any(g) for g in jax.tree.leaves(teacher_grads))
  else:
    grads, (policy, teaching) = jit(jax.grad(pair_loss, has_aux=True), static_argnums=1)(
      params, None
    )
  expected = jit(jax.grad(policy_loss))(params)
  hidden = jit(decoder.hidden, static_argnums=1)
  np.testing.assert_allclose(policy, hidden(params, config, policy_rows[0]), atol=1e-5)
  other = teacher_params if ema else params
  np.testing.assert_allclose(
    teaching, hidden(other, config, teacher[0], segment_ids_BT=teacher[2]), atol=1e-5
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.max(np.abs(b)))),
    grads,
    expected,
  )


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_the_teacher_half_costs_one_forward_pass_and_no_residuals(remat):
  """The compiler's own counts: pair = policy forward and backward + teacher forward."""
  config, (policy_rows, teacher) = QWEN, halves()
  shapes = decoder.shapes(config)
  teacher = (tokens(32, 48), None, None)  # large, so that a backward pass over it could not hide

  def cost(f):
    compiled = jit(f).lower(shapes).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

  policy = lambda p: jnp.sum(decoder.hidden(p, config, policy_rows[0], remat=remat))
  pair = lambda p: sum(
    jnp.sum(h) for h in decoder.hidden_pair(p, None, config, policy_rows, teacher, remat=remat)
  )
  policy_flops, _ = cost(jax.grad(policy))
  teacher_flops, teacher_bytes = cost(lambda p: decoder.hidden(p, config, teacher[0]))
  pair_flops, pair_bytes = cost(jax.value_and_grad(pair))
  _, differentiated_bytes = cost(jax.grad(lambda p: jnp.sum(decoder.hidden(p, config, teacher[0]))))
  assert pair_flops <= (1.03 if remat == "none" else 1.05) * (policy_flops + teacher_flops), (
    pair_flops,
    policy_flops,
    teacher_flops,
  )
  assert pair_bytes < 0.7 * differentiated_bytes, (pair_bytes, teacher_bytes, differentiated_bytes)


def test_rematerialisation_changes_memory_and_not_the_gradient():
  row, params = tokens(4, 32), params_of(QWEN)
  grad = lambda remat: (
    jit(jax.grad(lambda p: jnp.sum(jnp.sin(decoder.hidden(p, QWEN, row, remat=remat)))))
    .lower(params)
    .compile()
  )
  plain, dots, block = map(grad, ("none", "dots", "block"))
  for other in (dots, block):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.max(np.abs(a)))),
      plain(params),
      other(params),
    )
  bytes_of = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
  assert bytes_of(block) < bytes_of(dots) < 0.8 * bytes_of(plain)
  with pytest.raises(ValueError, match="model.remat='all'"):
    decoder.hidden(params, QWEN, row, remat="all")


def test_program_size_does_not_grow_with_depth():
  def size(layers):
    config = dataclasses.replace(OLMO, layers=layers, sliding=(True,) * (layers - 1) + (False,))
    f = lambda p, t: decoder.logits(p, config, t)
    return len(
      jax.jit(f)
      .lower(decoder.shapes(config), jax.ShapeDtypeStruct((2, 8), jnp.int32))
      .as_text()
      .splitlines()
    )

  assert abs(size(3) - size(30)) <= 2


@pytest.mark.parametrize("config", [QWEN, OLMO, GEMMA], ids=["qwen", "olmo", "gemma"])
def test_sharded_equals_unsharded(config):
  """Values and gradients on data 2 x fsdp 2 x tensor 2.

  Heads and width divide by 2, and so does the vocabulary, which is odd elsewhere.
  """
  config = dataclasses.replace(config, vocab=64)
  row, params = tokens(8, 12), params_of(config)
  loss = lambda p, row: jnp.sum(jnp.sin(decoder.logits(p, config, row)))
  value, grads = jit(jax.value_and_grad(loss))(params, row)
  mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  where = sharding.named(mesh, decoder.axes(config))
  with jax.set_mesh(mesh):
    sharded = jax.device_put(params, where)
    rows = jax.NamedSharding(mesh, sharding.spec("BT", sharding.ACTIVATIONS))
    step = jit(jax.value_and_grad(loss), in_shardings=(where, rows), out_shardings=(None, where))
    sharded_value, sharded_grads = step(sharded, jax.device_put(row, rows))
  assert sharded["layers"]["attn"]["q"].addressable_shards[0].data.shape == (3, 16, 2, 12)
  # the terms cancel, so the sum's rounding is measured by their number: 1e-6 of each logit
  terms = row.size * config.vocab
  np.testing.assert_allclose(sharded_value, value, rtol=1e-5, atol=1e-6 * terms**0.5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.max(np.abs(b)))),
    sharded_grads,
    grads,
  )


def test_the_pair_gathers_each_weight_once():
  """Under fsdp the scan has one all-gather a weight of the block, as in one half alone.

  The backward pass has one more.
  """
  config = dataclasses.replace(QWEN, heads=8, kv_heads=8, vocab=64)
  mesh = jax.make_mesh(
    (1, 8, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  where = sharding.named(mesh, decoder.axes(config))
  rows = jax.NamedSharding(mesh, sharding.spec("BT", sharding.ACTIVATIONS))
  row = jax.ShapeDtypeStruct((16, 12), jnp.int32, sharding=rows)
  split = sum("D" in a for a in jax.tree.leaves(decoder.axes(config)["layers"]))

  def gathers(f):
    with jax.set_mesh(mesh):
      text = (
        jit(f, in_shardings=(where, rows, rows))
        .lower(decoder.shapes(config), row, row)
        .compile()
        .as_text()
      )
    return len(re.findall(r" all-gather(?:-start)?\(.*while/body", text))

  pair = lambda p, a, b: decoder.hidden_pair(
    p, None, config, (a, None, None), (b, None, None), remat="block"
  )
  assert gathers(lambda p, a, b: decoder.hidden(p, config, a)) == split
  assert gathers(pair) == split
  assert gathers(jax.grad(lambda p, a, b: jnp.sum(pair(p, a, b)[0]))) == 2 * split


def test_bfloat16_computes_norms_softmax_and_logits_in_float32():
  config = dataclasses.replace(OLMO, dtype="bfloat16", param_dtype="bfloat16")
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(OLMO))
  row = tokens(2, 12)
  jaxpr = str(jax.make_jaxpr(lambda p: decoder.logits(p, config, row))(params))
  for name in ("exp", "rsqrt", "cos", "sin"):
    results = re.findall(rf"(\w+)\[[\d,]*\] = {name}\b", jaxpr)
    assert results and set(results) == {"f32"}, (name, results)
  out = np.asarray(logits(params, config, row))
  assert out.dtype == jnp.float32
  sizes = dict(shared=True, shards=1, pages=1, columns=4, stacked=True)
  assert decoder.init_pool(config, **sizes).k.dtype == jnp.bfloat16
  exact = logits(jax.tree.map(lambda x: x.astype(jnp.float32), params), OLMO, row)
  assert 0 < np.max(np.abs(out - exact)) < 0.05 * np.max(np.abs(exact))
  # float32 weights, bfloat16 computation
  mixed = dataclasses.replace(config, param_dtype="float32")
  grads = jax.eval_shape(
    jax.grad(lambda p: jnp.sum(decoder.hidden(p, mixed, row).astype(jnp.float32))), params_of(OLMO)
  )
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


# Every field of the configuration: what changing it alone does.
CHANGED = {  # same weights, other output: (base, changes)
  "norm_eps": (QWEN, dict(norm_eps=0.1)),
  "rope": (QWEN, dict(rope=Rope(5e5))),
  "sliding_rope": (OLMO, dict(sliding_rope=None)),
  "sliding_window": (OLMO, dict(sliding_window=6)),
  "sliding": (OLMO, dict(sliding=(True, True, True))),
  "norm_placement": (QWEN, dict(norm_placement="post")),
  "norm_plus_one": (GEMMA, dict(norm_plus_one=False)),
  "scaled_embedding": (GEMMA, dict(scaled_embedding=False)),
  "activation": (GEMMA, dict(activation="silu")),
  "query_scale": (GEMMA, dict(query_scale=1.0)),
  "dtype": (QWEN, dict(dtype="bfloat16")),
  "rope.theta": (QWEN, dict(rope=Rope(2e4))),
  "rope.kind": (LLAMA, dict(rope=dataclasses.replace(LLAMA.rope, kind="yarn"))),
  "rope.factor": (LLAMA, dict(rope=dataclasses.replace(LLAMA.rope, factor=8.0))),
  "rope.original_positions": (
    LLAMA,
    dict(rope=dataclasses.replace(LLAMA.rope, original_positions=128)),
  ),
  "rope.low_freq_factor": (LLAMA, dict(rope=dataclasses.replace(LLAMA.rope, low_freq_factor=2.0))),
  "rope.high_freq_factor": (
    LLAMA,
    dict(rope=dataclasses.replace(LLAMA.rope, high_freq_factor=3.0)),
  ),
  "rope.beta_fast": (YARN, dict(rope=dataclasses.replace(YARN.rope, beta_fast=4.0))),
  "rope.beta_slow": (YARN, dict(rope=dataclasses.replace(YARN.rope, beta_slow=0.1))),
  "rope.truncate": (YARN, dict(rope=dataclasses.replace(YARN.rope, truncate=True))),
  "rope.attention_factor": (OLMO, dict(rope=dataclasses.replace(OLMO.rope, attention_factor=1.0))),
}
RESHAPED = dict(
  vocab=62,
  width=36,
  layers=4,
  heads=8,
  kv_heads=4,
  head_dim=14,
  ff_width=50,
  qk_norm="all",
  qkv_bias=True,
  tied=False,
  param_dtype="bfloat16",
)
NOT_IN_THE_FUNCTION = {"family", "max_positions", "bos_id", "eos_ids", "pad_id"}


def test_every_field_is_accounted_for():
  fields = {f.name for f in dataclasses.fields(ModelConfig)} | {
    f"rope.{f.name}" for f in dataclasses.fields(Rope)
  }
  assert fields == set(CHANGED) | set(RESHAPED) | NOT_IN_THE_FUNCTION


@pytest.mark.parametrize("field", CHANGED)
def test_each_field_alone_changes_the_output(field):
  base, changes = CHANGED[field]
  row = tokens(1, 24)
  before = np.asarray(logits(params_of(base), base, row))
  after = np.asarray(logits(params_of(base), dataclasses.replace(base, **changes), row))
  assert np.max(np.abs(before - after)) > 1e-3


@pytest.mark.parametrize("field", RESHAPED)
def test_each_size_alone_changes_the_weights(field):
  describe = lambda c: jax.tree.map(lambda x: (x.shape, x.dtype), decoder.shapes(c))
  assert describe(dataclasses.replace(QWEN, **{field: RESHAPED[field]})) != describe(QWEN)


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(family="gpt2"), "model.family='gpt2'"),
    (dict(kv_heads=3), "model.kv_heads=3"),
    (dict(head_dim=11), "model.head_dim=11"),
    (dict(qk_norm="yes"), "model.qk_norm='yes'"),
    (dict(dtype="int8"), "model.dtype='int8'"),
    (dict(sliding=(True,)), "model.sliding names 1 layers"),
    (dict(sliding=(True,) * 3), "model.sliding_window=None"),
  ],
)
def test_impossible_configurations_are_named(changes, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    dataclasses.replace(QWEN, **changes)


def test_scales_of_norms_are_not_rounded_to_the_compute_dtype():
  config = dataclasses.replace(QWEN, dtype="bfloat16", param_dtype="float32")
  grads = jit(
    jax.grad(lambda p: jnp.sum(decoder.hidden(p, config, tokens(2, 12)).astype(jnp.float32) ** 2))
  )(params_of(QWEN))
  for path in (("norm",), ("layers", "attn_norm"), ("layers", "attn", "q_norm")):
    g = functools.reduce(lambda tree, key: tree[key], path, grads)
    assert np.any(np.asarray(g) != np.asarray(g.astype(jnp.bfloat16).astype(jnp.float32))), path
