"""Adapters: fresh ones change nothing, only they learn, and merged equals attached.

PEFT's files mean what PEFT says.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdpo_jax import sharding
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.model import decoder, hf_weights, lora
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Request, Sampling
from tests.test_decoder import GEMMA, params_of

CONFIG = ModelConfig(
  family="qwen3",
  vocab=64,
  width=32,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=12,
  ff_width=48,
  qk_norm="head",
  tied=True,
)
LORA = lora.Lora(rank=4, alpha=6.0)
jit = lambda f, **k: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0}, **k)
logits = jit(decoder.logits, static_argnums=1)


def random_tree(shapes, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)


PARAMS, ADAPTERS = random_tree(decoder.shapes(CONFIG), 0), random_tree(lora.shapes(CONFIG, LORA), 1)
ROW = np.random.default_rng(2).integers(0, CONFIG.vocab, (2, 10)).astype(np.int32)


def test_init_agrees_with_the_declared_shapes_and_changes_nothing():
  fresh = lora.init(CONFIG, LORA, jax.random.key(0))
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert describe(fresh) == describe(lora.shapes(CONFIG, LORA))
  assert all(
    jax.tree.leaves(jax.tree.map(lambda x, a: x.ndim == len(a), fresh, lora.axes(CONFIG, LORA)))
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
    assert np.any(leaf) == (path[-1].key == "a")
  np.testing.assert_array_equal(
    logits(lora.attach(PARAMS, fresh, LORA), CONFIG, ROW), logits(PARAMS, CONFIG, ROW)
  )


@pytest.mark.parametrize("target", lora.TARGETS)
def test_each_target_is_the_weight_plus_its_product(target):
  one = dataclasses.replace(LORA, targets=(target,))
  adapters = random_tree(lora.shapes(CONFIG, one), 3)
  merged = lora.merge(PARAMS, adapters, one)
  group, name, _ = lora.TARGETS[target]
  ab, w = adapters["layers"][group][name], np.asarray(PARAMS["layers"][group][name])
  a, b = np.asarray(ab["a"]).reshape(3, -1, 4), np.asarray(ab["b"]).reshape(3, 4, -1)
  expected = w + 1.5 * np.einsum("lir,lro->lio", a, b).reshape(w.shape)
  np.testing.assert_allclose(merged["layers"][group][name], expected, atol=1e-5)
  merged["layers"][group][name] = PARAMS["layers"][group][name]
  assert jax.tree.all(jax.tree.map(np.array_equal, merged, PARAMS))


@pytest.mark.parametrize(
  "dtype, base", [("float32", CONFIG), ("bfloat16", CONFIG), ("float32", GEMMA)]
)
def test_attached_equals_merged_in_training_and_sampling(dtype, base):
  config = dataclasses.replace(base, vocab=CONFIG.vocab, dtype=dtype, param_dtype=dtype)
  weights = PARAMS if base == CONFIG else params_of(config)
  params = jax.tree.map(lambda x: x.astype(dtype), weights)
  attached, merged = lora.attach(params, ADAPTERS, LORA), lora.merge(params, ADAPTERS, LORA)
  np.testing.assert_allclose(logits(attached, config, ROW), logits(merged, config, ROW), atol=1e-5)
  assert not np.allclose(logits(params, config, ROW), logits(merged, config, ROW), atol=0.1)
  engine, told = LocalEngine(config, rows=2, columns=8), {}
  requests = [
    Request(i, row.tolist(), 1, Sampling(6, temperature=0.0), 0) for i, row in enumerate(ROW)
  ]
  for name, weights in (("attached", attached), ("merged", merged)):
    engine.load(weights, 0)
    told[name] = {c.key: (c.tokens, c.logp) for c in engine.generate(requests)}
  for i in range(len(ROW)):
    assert told["attached"][i][0] == told["merged"][i][0]
    np.testing.assert_allclose(told["attached"][i][1], told["merged"][i][1], atol=1e-5)


def test_gradients_reach_the_adapters_alone_and_equal_the_chain_rule():
  loss = lambda params: jnp.sum(jnp.sin(decoder.logits(params, CONFIG, ROW)))
  frozen, grads = jit(jax.grad(lambda p, a: loss(lora.attach(p, a, LORA)), argnums=(0, 1)))(
    PARAMS, ADAPTERS
  )
  assert not any(np.any(g) for g in jax.tree.leaves(frozen))
  whole = jit(jax.grad(loss))(lora.merge(PARAMS, ADAPTERS, LORA))
  for group, name, _ in lora.TARGETS.values():
    ab, g = ADAPTERS["layers"][group][name], grads["layers"][group][name]
    a, b = np.asarray(ab["a"]).reshape(3, -1, 4), np.asarray(ab["b"]).reshape(3, 4, -1)
    dw = np.asarray(whole["layers"][group][name]).reshape(3, a.shape[1], b.shape[2])
    scale = 1e-4 * np.max(np.abs(dw))
    np.testing.assert_allclose(
      np.asarray(g["a"]).reshape(a.shape), 1.5 * np.einsum("lio,lro->lir", dw, b), atol=10 * scale
    )
    np.testing.assert_allclose(
      np.asarray(g["b"]).reshape(b.shape), 1.5 * np.einsum("lir,lio->lro", a, dw), atol=10 * scale
    )


def test_adapters_on_a_mesh():
  mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  params = jax.device_put(PARAMS, sharding.named(mesh, decoder.axes(CONFIG)))
  adapters = jax.device_put(ADAPTERS, sharding.named(mesh, lora.axes(CONFIG, LORA)))
  loss = lambda a, p: jnp.sum(jnp.sin(decoder.logits(lora.attach(p, a, LORA), CONFIG, ROW)))
  with jax.set_mesh(mesh):
    split = jit(jax.grad(loss))(adapters, params)
  whole = jit(jax.grad(loss))(ADAPTERS, PARAMS)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * max(1.0, np.max(np.abs(y)))),
    split,
    whole,
  )


def test_saved_adapters_mean_what_peft_says(tmp_path):
  """PEFT: weight + lora_alpha / r * lora_B @ lora_A, on transformers' own names and layout."""
  hf_weights.save_pretrained(tmp_path / "base", CONFIG, PARAMS)
  lora.save_adapters(tmp_path / "adapter", CONFIG, LORA, ADAPTERS, base=str(tmp_path / "base"))
  about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert set(about["target_modules"]) == set(lora.TARGETS)
  base = load_file(tmp_path / "base" / "model.safetensors")
  tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
  for name, a in tensors.items():
    if name.endswith(".lora_A.weight"):
      target = re.fullmatch(r"base_model\.model\.(.*)\.lora_A\.weight", name).group(1) + ".weight"
      b = tensors[name.replace("lora_A", "lora_B")]
      assert a.shape[0] == b.shape[1] == about["r"]
      base[target] = base[target] + about["lora_alpha"] / about["r"] * (b @ a)
  assert len(tensors) == 2 * 7 * CONFIG.layers
  save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
  _, by_hand = hf_weights.load_pretrained(tmp_path / "base", dtype=jnp.float32)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
    by_hand,
    lora.merge(PARAMS, ADAPTERS, LORA),
  )


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(rank=0), "lora.rank=0"),
    (dict(targets=("q",)), "lora.targets=['q']"),
    (dict(targets=()), "lora.targets=[]"),
  ],
)
def test_impossible_adapters_are_named(changes, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    dataclasses.replace(LORA, **changes)
