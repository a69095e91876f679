"""Low-rank adapters: a matrix W is used as W + (alpha / rank) A B; only A and B are trained.

Source: arXiv:2106.09685. Adapters are a tree of their own beside the frozen weights,
{"layers": {"attn": {"q": {"a", "b"}}, ...}}, stacked along L like the weights. `attach` joins
the two into what `decoder` takes as params. Each layer's sum is formed as the scan reaches
it, in float32, then rounded to the compute dtype. `merge` forms all sums at once, for
sampling and export. B starts at zero, so a fresh adapter changes nothing.

On disk adapters are a PEFT directory (adapter_config.json, adapter_model.safetensors).

Errors: ValueError naming the target and the choices; CheckpointError naming file and tensor.
"""

import dataclasses
import functools
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax import hosts
from sdpo_jax.model import decoder, hf_weights
from sdpo_jax.model.config import ModelConfig


class Target(NamedTuple):
  """Names one matrix of a layer that may get an adapter."""

  group: str  # of the layer's weights
  name: str  # in that group
  inputs: int  # how many leading axes of the matrix are inputs


# The keys are those of PEFT's target_modules.
TARGETS = {
  "q_proj": Target("attn", "q", 1),
  "k_proj": Target("attn", "k", 1),
  "v_proj": Target("attn", "v", 1),
  "o_proj": Target("attn", "o", 2),
  "gate_proj": Target("mlp", "gate", 1),
  "up_proj": Target("mlp", "up", 1),
  "down_proj": Target("mlp", "down", 1),
}


@dataclasses.dataclass(frozen=True)
class Lora:
  """Says which matrices of all layers have adapters, of which rank."""

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
    """Returns the factor of A B."""
    return self.alpha / self.rank


def from_settings(model) -> Lora | None:
  """Reads `config.model`, or "model" of a run's config.json; None where all weights are trained."""
  settings = model["lora"]
  if not settings["rank"]:
    return None
  return Lora(settings["rank"], settings["alpha"], tuple(settings["targets"]))


def axes(config: ModelConfig, lora: Lora) -> dict:
  """Returns the tree of adapters with axis letters at each leaf; r is the rank."""
  tree: dict = {}
  for target in lora.targets:
    group, name, _ = TARGETS[target]
    inputs, outputs = _input_output_axes(config, target)
    tree.setdefault(group, {})[name] = {"a": "L" + inputs + "r", "b": "Lr" + outputs}
  return {"layers": tree}


def _input_output_axes(config: ModelConfig, target: str) -> tuple[str, str]:
  """Returns the letters of a matrix's input axes and of its output axes."""
  group, name, inputs = TARGETS[target]
  letters = decoder.axes(config)["layers"][group][name][1:]
  return letters[:inputs], letters[inputs:]


def shapes(config: ModelConfig, lora: Lora, dtype=jnp.float32) -> dict:
  """Returns the tree of adapters with a jax.ShapeDtypeStruct at each leaf."""

  def leaf_shape(letters):
    sizes = tuple(lora.rank if a == "r" else decoder.axis_size(config, a) for a in letters)
    return jax.ShapeDtypeStruct(sizes, dtype)

  return jax.tree.map(leaf_shape, axes(config, lora))


def init(config: ModelConfig, lora: Lora, key: jax.Array, dtype=jnp.float32) -> dict:
  """Draws fresh adapters: A normal with variance 1 / inputs, B zero."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(config, lora, dtype))

  def draw(path, leaf, key):
    if path[-1].key == "b":
      return jnp.zeros(leaf.shape, dtype)
    return jax.random.normal(key, leaf.shape, dtype) * math.prod(leaf.shape[1:-1]) ** -0.5

  keys = jax.random.split(key, len(leaves))
  drawn = [draw(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)]
  return tree.unflatten(drawn)


def attach(params: dict, adapters: dict, lora: Lora) -> dict:
  """Joins frozen weights and adapters into what `decoder` takes as params.

  Gradients flow to the adapters only.
  """
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
  """Returns plain params with the adapters added in, in the weights' dtype.

  One layer's sum is in float32 at a time.
  """
  attached = attach(params, adapters, lora)
  merged = jax.lax.map(decoder.resolve, attached["layers"])
  return {**attached, "layers": merged}


# ---- PEFT's format ----

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_MODULES = {"attn": "self_attn", "mlp": "mlp"}  # our group -> transformers' module


class _Slot(NamedTuple):
  """Says where one tensor of PEFT's lives in our tree of adapters."""

  name: str  # PEFT's
  group: str
  weight: str
  leaf: str  # "a" | "b"
  layer: int
  shape: tuple[int, int]  # PEFT's: a is [rank, inputs], b is [outputs, rank]

  def stack(self, adapters: dict) -> jax.Array:
    """Returns our array of all layers."""
    return adapters["layers"][self.group][self.weight][self.leaf]

  def fetch(self, adapters: dict) -> np.ndarray:
    """Returns PEFT's tensor on the host: the transpose of ours, its axes merged."""
    ours = hosts.to_host(self.stack(adapters)[self.layer])
    return ours.reshape(self.shape[::-1]).T


def _slots(config: ModelConfig, lora: Lora) -> list[_Slot]:
  """Returns the slots of all tensors, in the order in which the file holds them."""

  def size(letters):
    return math.prod(decoder.axis_size(config, a) for a in letters)

  slots = []
  for layer in range(config.layers):
    for target in sorted(lora.targets):
      group, weight, _ = TARGETS[target]
      inputs, outputs = _input_output_axes(config, target)
      module = f"base_model.model.model.layers.{layer}.{_MODULES[group]}.{target}"
      a_shape = (lora.rank, size(inputs))
      b_shape = (size(outputs), lora.rank)
      slots.append(_Slot(f"{module}.lora_A.weight", group, weight, "a", layer, a_shape))
      slots.append(_Slot(f"{module}.lora_B.weight", group, weight, "b", layer, b_shape))
  return slots


def save_adapters(path, config: ModelConfig, lora: Lora, adapters: dict, *, base: str) -> None:
  """Writes a directory that PEFT (and vLLM) loads on top of `base`.

  `base` is the directory or hub id of the frozen weights. With several processes all must call
  it; process 0 writes.
  """
  path = os.fspath(path)
  slots = _slots(config, lora)
  os.makedirs(path, exist_ok=True)
  tensors = [
    hf_weights.TensorSource(slot.name, slot.shape, functools.partial(slot.fetch, adapters))
    for slot in slots
  ]
  dtype = jnp.dtype(slots[0].stack(adapters).dtype)
  hf_weights.write_safetensors(os.path.join(path, _WEIGHTS), tensors, dtype)
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
