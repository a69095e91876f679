"""Translates what a GGUF file holds to a model of ours: its ModelConfig and its tensors.

Sizes go through the fields of a config.json (`config.from_hf`), so a setting that this project does
not implement is refused by the same words. llama.cpp's converter changes some tensors, which is
undone here:
  rows of query and key of `llama`   pairs of a rotation stand next to each other
  norms of `gemma3`                  stored as 1 + weight
Llama 3's rotary scaling is a tensor of factors, from which its settings are recovered.

Source: convert_hf_to_gguf.py and gguf-py of llama.cpp.
Errors: GgufError, one line that names the file and the metadata or tensor.
"""

import math
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdpo_jax.model import config as model_config
from sdpo_jax.model import gguf_file, hf_weights
from sdpo_jax.model.config import ModelConfig, Rope
from sdpo_jax.model.decoder import frequencies
from sdpo_jax.model.gguf_file import GgufError, GgufFile, Tensor
from sdpo_jax.model.hf_weights import Slot

ARCHITECTURES = {  # llama.cpp's name -> key of model_config.FAMILIES
  "llama": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "gemma3": "gemma3_text",
}

# Metadata behind the architecture's name -> field of config.json.
_FIELDS = {
  "context_length": "max_position_embeddings",
  "embedding_length": "hidden_size",
  "block_count": "num_hidden_layers",
  "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.key_length": "head_dim",
  "attention.sliding_window": "sliding_window",
  "attn_logit_softcapping": "attn_logit_softcapping",
  "final_logit_softcapping": "final_logit_softcapping",
  "expert_count": "num_experts",
  "rope.freq_base": "rope_theta",
  "rope.freq_base_swa": "rope_local_base_freq",
}
_REQUIRED = tuple(_FIELDS)[:6]
# Read in another way, or without meaning here.
_OTHER_KEYS = {
  "vocab_size",
  "attention.value_length",
  "attention.sliding_window_pattern",
  "rope.dimension_count",
  "rope.scaling.type",
  "rope.scaling.factor",
  "rope.scaling.original_context_length",
  "rope.scaling.finetuned",
}
_ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1 to 3.3: the settings that their files do not repeat.
_LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
_GEMMA3_27B_LAYERS = 62  # its logits are divided by the root of width / heads

# What ends a turn, where the chat template uses it: files name one end, some models have two.
_ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def read_config(file: GgufFile, *, dtype: str) -> ModelConfig:
  """Returns the shape of the model in a file, for weights and computation in `dtype`."""
  architecture = file.require("general.architecture")
  if architecture not in ARCHITECTURES:
    raise GgufError(
      f"{file.name}: the architecture {architecture!r} is not supported; "
      f"choose from {list(ARCHITECTURES)}"
    )
  own = _of_architecture(file, architecture)
  if "token_embd.weight" not in file.tensors:
    raise GgufError(f"{file.name}: the tensor token_embd.weight is missing")
  hf = {field: own[key] for key, field in _FIELDS.items() if key in own}
  hf |= {
    "model_type": ARCHITECTURES[architecture],
    "vocab_size": file.tensors["token_embd.weight"].shape[0],
    "tie_word_embeddings": "output.weight" not in file.tensors,
    "head_dim": _head_dim(file, own),
    "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
    "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    "eos_token_id": _eos_ids(file),
  }
  if architecture == "gemma3":
    hf |= _gemma3_fields(file, own, hf["head_dim"])
  hf["rope_scaling"] = _rope_scaling(file, own)
  try:
    return model_config.from_hf(hf, dtype=dtype, param_dtype=dtype)
  except ValueError as error:
    raise GgufError(f"{file.name}: {error}") from None


def _of_architecture(file: GgufFile, architecture: str) -> dict[str, Any]:
  """Returns the metadata of the architecture, without its name in front.

  GgufError for what is missing, and for what is not known: it might change the function.
  """
  prefix = architecture + "."
  for key in _REQUIRED:
    file.require(prefix + key)
  own = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
  for key, value in own.items():
    if key not in _FIELDS and key not in _OTHER_KEYS:
      raise GgufError(f"{file.name}: the metadata {prefix}{key}={value!r} is not supported")
    if isinstance(value, list) and key in _FIELDS:
      if len(set(value)) != 1:
        raise GgufError(f"{file.name}: {prefix}{key} differs by layer, which is not supported")
      own[key] = value[0]
    if isinstance(own[key], float):  # a float32: the shortest number that means it, as people write
      own[key] = float(str(np.float32(own[key])))
  return own


def _head_dim(file: GgufFile, own: dict[str, Any]) -> int:
  """Returns the size of a head. GgufError where keys, values and rotation differ in it."""
  default = own["embedding_length"] // own["attention.head_count"]
  head_dim = own.get("attention.key_length") or own.get("rope.dimension_count") or default
  for key in ("attention.value_length", "rope.dimension_count"):
    if own.get(key, head_dim) != head_dim:
      raise GgufError(f"{file.name}: {key}={own[key]} differs from the head size {head_dim}")
  return head_dim


def _gemma3_fields(file: GgufFile, own: dict[str, Any], head_dim: int) -> dict[str, Any]:
  """Returns the fields that only this family has."""
  file.require("gemma3.attention.sliding_window")
  fields: dict[str, Any] = {"query_pre_attn_scalar": head_dim}
  if own["block_count"] == _GEMMA3_27B_LAYERS:
    fields["query_pre_attn_scalar"] = own["embedding_length"] // own["attention.head_count"]
  pattern = own.get("attention.sliding_window_pattern")
  if isinstance(pattern, list):
    fields["layer_types"] = [
      "sliding_attention" if slides else "full_attention" for slides in pattern
    ]
  elif pattern is not None:
    fields["sliding_window_pattern"] = pattern
  return fields


def _rope_scaling(file: GgufFile, own: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the field of config.json, from the metadata or from the tensor of factors."""
  kind = own.get("rope.scaling.type", "none")
  if _ROPE_FACTORS in file.tensors:
    return _llama3_scaling(file, own)
  if kind == "none":
    return None
  settings = {"rope_type": kind, "factor": own.get("rope.scaling.factor")}
  if kind == "yarn":
    settings["original_max_position_embeddings"] = own.get("rope.scaling.original_context_length")
  return settings


def _llama3_scaling(file: GgufFile, own: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the settings whose factors are those of the tensor, one for each pair."""
  factors = np.concatenate([rows.ravel() for _, rows in gguf_file.blocks(_rope_factors(file))])
  factor = float(factors.max())
  if factor == 1.0:
    return None
  theta, head_dim = own.get("rope.freq_base", 10000.0), _head_dim(file, own)
  rope = Rope(theta, "llama3", factor, **_LLAMA3)
  expected = frequencies(Rope(theta), head_dim) / frequencies(rope, head_dim)
  if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
    raise GgufError(
      f"{file.name}: the factors of {_ROPE_FACTORS} are not those of Llama 3's rotary scaling"
    )
  return {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": rope.low_freq_factor,
    "high_freq_factor": rope.high_freq_factor,
    "original_max_position_embeddings": rope.original_positions,
  }


def _rope_factors(file: GgufFile) -> Tensor:
  """Returns the tensor of rotary factors, which only llama's files should have."""
  if file.metadata["general.architecture"] != "llama":
    raise GgufError(f"{file.name}: the tensor {_ROPE_FACTORS} is not supported outside of llama")
  return file.tensors[_ROPE_FACTORS]


def _eos_ids(file: GgufFile) -> list[int]:
  """Returns the tokens that end a text or a turn, the file's own end first."""
  named = [file.require("tokenizer.ggml.eos_token_id")]
  named += [file.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eot", "eom")]
  template = file.metadata.get("tokenizer.chat_template", "")
  used = {token for token in _ENDS_OF_TURN if token in template}
  named += [i for i, token in enumerate(file.require("tokenizer.ggml.tokens")) if token in used]
  return list(dict.fromkeys(i for i in named if i is not None))


# ---- tensors


def tensors_by_slot(file: GgufFile, config: ModelConfig) -> list[tuple[Slot, Tensor]]:
  """Returns each tensor of a checkpoint with the file's tensor that fills it.

  GgufError for anything left over on either side, and for a shape that does not fit.
  """
  gguf = gguf_file.gguf_package()
  architecture = gguf.MODEL_ARCH[file.metadata["general.architecture"].upper()]
  names = gguf.get_tensor_name_map(architecture, config.layers)
  pairs = []
  for slot in hf_weights.slots(config):
    name = names.get_name(slot.name, (".weight", ".bias"))
    if name not in file.tensors:
      raise GgufError(f"{file.name}: the tensor {name} is missing (or the file is truncated)")
    shape = hf_weights.hf_shape(config, slot)
    if file.tensors[name].shape != shape:
      raise GgufError(
        f"{file.name}: tensor {name} has shape {list(file.tensors[name].shape)}, "
        f"the metadata asks for {list(shape)}"
      )
    pairs.append((slot, file.tensors[name]))
  extra = sorted(set(file.tensors) - {tensor.name for _, tensor in pairs} - {_ROPE_FACTORS})
  if extra:
    raise GgufError(
      f"{file.name}: extra tensor {extra[0]}: a {config.family} model of {config.layers} layers "
      "has none of that name"
    )
  return pairs


def fetch(slot: Slot, tensor: Tensor, config: ModelConfig) -> np.ndarray:
  """Returns a tensor as a checkpoint has it, in `config.param_dtype`, rounded to nearest."""
  dtype = jnp.dtype(config.param_dtype)
  rows = math.prod(tensor.shape[:-1])
  out = np.empty((rows, tensor.shape[-1]), dtype)
  is_offset = config.norm_plus_one and slot.path[-1].endswith("norm")
  for first, block in gguf_file.blocks(tensor):
    exact = block - np.float32(1.0) if is_offset else block
    if dtype == np.float16 and np.max(np.abs(exact)) > np.finfo(np.float16).max:
      raise GgufError(f"float16 cannot hold tensor {tensor.name}: use --dtype=bfloat16")
    out[first : first + len(exact)] = exact.astype(dtype)
  if config.family == "llama" and re.search(r"\.attn_[qk]\.", tensor.name):
    # pair h of a head stands in rows 2h and 2h + 1; a checkpoint has it in rows h and h + H/2
    pairs = out.reshape(-1, config.head_dim // 2, 2, tensor.shape[-1])
    out = pairs.swapaxes(1, 2).reshape(out.shape)
  return out.reshape(tensor.shape)
