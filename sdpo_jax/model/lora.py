"""Low-rank adapters (arXiv:2106.09685): a matrix W is used as W + (alpha / rank) A B, and only A and B are trained.

Adapters are a tree of their own beside the frozen weights: {"layers": {"attn": {"q": {"a", "b"}}, ...}}, stacked along L like
the weights. `attach` joins the two into what `decoder` takes as params (each layer's sum is formed as the scan reaches it, in
float32, then rounded to the compute dtype); `merge` forms all sums at once, for sampling and export. B starts at zero, so a
fresh adapter changes nothing. On disk adapters are a PEFT directory (adapter_config.json, adapter_model.safetensors).

Errors: ValueError naming the target and the choices; CheckpointError naming file and tensor.
"""

import dataclasses
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax import hosts
from sdpo_jax.model import decoder, hf_weights
from sdpo_jax.model.config import ModelConfig

# Name (as PEFT's target_modules say): group, our name, how many leading axes of ours are inputs.
TARGETS = {
  "q_proj": ("attn", "q", 1),
  "k_proj": ("attn", "k", 1),
  "v_proj": ("attn", "v", 1),
  "o_proj": ("attn", "o", 2),
  "gate_proj": ("mlp", "gate", 1),
  "up_proj": ("mlp", "up", 1),
  "down_proj": ("mlp", "down", 1),
}


@dataclasses.dataclass(frozen=True)
class Lora:
  rank: int
  alpha: float
  targets: tuple[str, ...] = tuple(TARGETS)

  def __post_init__(self):
    unknown = sorted(set(self.targets) - set(TARGETS))
    if unknown or not self.targets:
      raise ValueError(f"lora.targets={list(self.targets)}: choose from {list(TARGETS)}")
    if self.rank < 1:
      raise ValueError(f"lora.rank={self.rank} must be at least 1")

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def from_settings(model) -> Lora | None:
  """From `config.model`, or "model" of a run's config.json; None where all weights are trained."""
  settings = model["lora"]
  return (
    Lora(settings["rank"], settings["alpha"], tuple(settings["targets"]))
    if settings["rank"]
    else None
  )


def axes(config: ModelConfig, lora: Lora) -> dict:
  """The tree of adapters with axis letters at each leaf; r is the rank."""
  blocks = decoder.axes(config)["layers"]
  tree: dict = {}
  for target in lora.targets:
    group, name, inputs = TARGETS[target]
    letters = blocks[group][name][1:]
    tree.setdefault(group, {})[name] = {
      "a": "L" + letters[:inputs] + "r",
      "b": "Lr" + letters[inputs:],
    }
  return {"layers": tree}


def shapes(config: ModelConfig, lora: Lora, dtype=jnp.float32) -> dict:
  """The tree of adapters with a jax.ShapeDtypeStruct at each leaf."""
  shape = lambda letters: tuple(
    lora.rank if a == "r" else decoder.axis_size(config, a) for a in letters
  )
  return jax.tree.map(
    lambda letters: jax.ShapeDtypeStruct(shape(letters), dtype), axes(config, lora)
  )


def init(config: ModelConfig, lora: Lora, key: jax.Array, dtype=jnp.float32) -> dict:
  """A normal with variance 1 / inputs, B zero."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(config, lora, dtype))

  def draw(path, leaf, key):
    if path[-1].key == "b":
      return jnp.zeros(leaf.shape, dtype)
    return jax.random.normal(key, leaf.shape, dtype) * math.prod(leaf.shape[1:-1]) ** -0.5

  keys = jax.random.split(key, len(leaves))
  return tree.unflatten([draw(path, leaf, k) for (path, leaf), k in zip(leaves, keys)])


def attach(params: dict, adapters: dict, lora: Lora) -> dict:
  """What `decoder` takes as params: frozen weights with their adapters; gradients flow to the adapters only."""
  frozen = jax.lax.stop_gradient(params)
  layers = dict(frozen["layers"])
  for group, names in adapters["layers"].items():
    pairs = {
      name: decoder.Adapted(layers[group][name], ab["a"], ab["b"] * lora.scale)
      for name, ab in names.items()
    }
    layers[group] = layers[group] | pairs
  return {**frozen, "layers": layers}


def merge(params: dict, adapters: dict, lora: Lora) -> dict:
  """Plain params with the adapters added in, in the weights' dtype; one layer's sum is in float32 at a time."""
  attached = attach(params, adapters, lora)
  merged = jax.lax.map(decoder.resolve, attached["layers"])
  return {**attached, "layers": merged}


# ---- PEFT's format -------------------------------------------------------------------------------
# --------------------

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class _Part(NamedTuple):
  name: str  # PEFT's
  path: tuple[str, str]  # ours: group, name
  leaf: str  # "a" | "b"
  layer: int
  shape: tuple[int, int]  # PEFT's: a is [rank, inputs], b is [outputs, rank]


def _parts(config: ModelConfig, lora: Lora) -> list[_Part]:
  result = []
  for layer in range(config.layers):
    for target in sorted(lora.targets):
      group, name, inputs = TARGETS[target]
      letters = decoder.axes(config)["layers"][group][name][1:]
      size = lambda letters: math.prod(decoder.axis_size(config, a) for a in letters)
      module = f"base_model.model.model.layers.{layer}.{'self_attn' if group == 'attn' else 'mlp'}.{target}"
      result += [
        _Part(
          f"{module}.lora_A.weight", (group, name), "a", layer, (lora.rank, size(letters[:inputs]))
        ),
        _Part(
          f"{module}.lora_B.weight", (group, name), "b", layer, (size(letters[inputs:]), lora.rank)
        ),
      ]
  return result


def save_adapters(path, config: ModelConfig, lora: Lora, adapters: dict, *, base: str) -> None:
  """Writes a directory that PEFT (and vLLM) loads on top of `base`, the directory or hub id of the frozen weights."""
  path = os.fspath(path)
  parts = _parts(config, lora)
  leaf = lambda part: adapters["layers"][part.path[0]][part.path[1]][part.leaf]
  host = lambda part: hosts.to_host(leaf(part)[part.layer]).reshape(part.shape[::-1]).T
  os.makedirs(path, exist_ok=True)
  tensors = [(part.name, part.shape, lambda part=part: host(part)) for part in parts]
  hf_weights.write_safetensors(
    os.path.join(path, _WEIGHTS), tensors, jnp.dtype(leaf(parts[0]).dtype)
  )
  if jax.process_index() == 0:
    hf_weights.write_json(
      os.path.join(path, _CONFIG),
      {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
      },
    )
