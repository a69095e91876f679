"""Checkpoints in and out: a Hugging Face directory (or hub id) <-> (ModelConfig, params).

The mapping is one table, read in both directions: every tensor of a checkpoint matches exactly one rule and every weight
of ours is filled exactly once. Files are read with plain reads (the pages of a memory map count as resident memory), one
tensor at a time, and each tensor goes straight to its place on the mesh: the host holds the tensor in flight, no more.

With `dtype` that of the files, import, export and import again give the same bits.
Errors: CheckpointError, one line that names the file and the tensor. A safetensors file has no checksum: damage to the
numbers themselves is not seen, damage to the header or the length is.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import struct
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax import sharding
from sdpo_jax.hosts import to_host
from sdpo_jax.model import config as model_config
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig

_L = r"model\.layers\.(\d+)\."


# Hugging Face name (regular expression)         our path               their axes: rows of a matrix
# are its outputs
_SHARED = [
  (r"model\.embed_tokens\.weight", "embed", "VD"),
  (r"model\.norm\.weight", "norm", "D"),
  (r"lm_head\.weight", "head", "VD"),
  (_L + r"self_attn\.q_proj\.weight", "layers/attn/q", "NHD"),
  (_L + r"self_attn\.k_proj\.weight", "layers/attn/k", "KHD"),
  (_L + r"self_attn\.v_proj\.weight", "layers/attn/v", "KHD"),
  (_L + r"self_attn\.o_proj\.weight", "layers/attn/o", "DNH"),
  (_L + r"self_attn\.q_proj\.bias", "layers/attn/q_bias", "NH"),
  (_L + r"self_attn\.k_proj\.bias", "layers/attn/k_bias", "KH"),
  (_L + r"self_attn\.v_proj\.bias", "layers/attn/v_bias", "KH"),
  (_L + r"mlp\.gate_proj\.weight", "layers/mlp/gate", "FD"),
  (_L + r"mlp\.up_proj\.weight", "layers/mlp/up", "FD"),
  (_L + r"mlp\.down_proj\.weight", "layers/mlp/down", "DF"),
]


_QK_NORM = {
  "none": [],
  "head": [
    (_L + r"self_attn\.q_norm\.weight", "layers/attn/q_norm", "H"),
    (_L + r"self_attn\.k_norm\.weight", "layers/attn/k_norm", "H"),
  ],
  "all": [
    (_L + r"self_attn\.q_norm\.weight", "layers/attn/q_norm", "NH"),
    (_L + r"self_attn\.k_norm\.weight", "layers/attn/k_norm", "KH"),
  ],
}


# The same name means another norm in the two placements.
_NORM = {
  "pre": [
    (_L + r"input_layernorm\.weight", "layers/attn_norm", "D"),
    (_L + r"post_attention_layernorm\.weight", "layers/mlp_norm", "D"),
  ],
  "post": [
    (_L + r"post_attention_layernorm\.weight", "layers/attn_norm", "D"),
    (_L + r"post_feedforward_layernorm\.weight", "layers/mlp_norm", "D"),
  ],
}


# Constants that older files carry and that are computed here.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


_DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}


_CODES = {dtype: code for code, dtype in _DTYPES.items()}


_INDEX = "model.safetensors.index.json"


_SINGLE = "model.safetensors"


_COMPARED_BYTES = 64 << 20  # how much of two equal tensors is held at once


class CheckpointError(ValueError):
  """A checkpoint that cannot be read as asked: one line with the file and the tensor."""


class Slot(NamedTuple):
  """Where one Hugging Face tensor lives in `params`."""

  name: str  # theirs
  path: tuple[str, ...]  # ours
  layer: int | None  # index on the leading axis L, None: the weight is not stacked
  hf_axes: str  # letters of their axes, heads and head size apart
  axes: str  # letters of ours, without L


def slots(config: ModelConfig) -> list[Slot]:
  """Every tensor of a checkpoint of this shape, in the order in which files are written."""
  rules = _SHARED + _QK_NORM[config.qk_norm] + _NORM[config.norm_placement]
  by_path = {tuple(path.split("/")): (name, hf_axes) for name, path, hf_axes in rules}
  result = []
  for keys, axes in jax.tree_util.tree_leaves_with_path(decoder.axes(config)):
    path = tuple(k.key for k in keys)
    pattern, hf_axes = by_path[path]
    stacked = path[0] == "layers"
    for layer in range(config.layers) if stacked else [None]:
      name = pattern.replace(r"(\d+)", str(layer)).replace("\\", "")
      result.append(Slot(name, path, layer, hf_axes, axes[1:] if stacked else axes))
  return sorted(result, key=lambda s: (-1 if s.layer is None else s.layer, s.name))


def _sizes(config: ModelConfig, letters: str) -> list[int]:
  return [decoder.axis_size(config, a) for a in letters]


def _hf_shape(config: ModelConfig, slot: Slot) -> tuple[int, ...]:
  """Their shape: heads and head size are one axis."""
  merged = re.findall("[NK]H|.", slot.hf_axes)
  return tuple(math.prod(_sizes(config, letters)) for letters in merged)


# ---- Reading -------------------------------------------------------------------------------------
# --------------------


class _Entry(NamedTuple):
  file: str
  offset: int  # bytes from the start of the file
  nbytes: int
  dtype: np.dtype
  shape: tuple[int, ...]


def read_header(path: str) -> dict[str, _Entry]:
  """The tensors of one safetensors file; checks that they fill the file exactly."""
  try:
    size = os.path.getsize(path)
    with open(path, "rb") as f:
      length = struct.unpack("<Q", f.read(8))[0]
      if length > size - 8:
        raise CheckpointError(
          f"{path}: truncated: the header claims {length} bytes, the file has {size}"
        )
      header = json.loads(f.read(length).decode("utf-8"))
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
      begin, end = info["data_offsets"]
      if info["dtype"] not in _DTYPES:
        raise CheckpointError(
          f"{path}: tensor {name} has dtype {info['dtype']}; supported are {sorted(_DTYPES)}"
        )
      dtype, shape = _DTYPES[info["dtype"]], tuple(info["shape"])
      if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
          f"{path}: corrupt: tensor {name} of shape {list(shape)} and dtype {info['dtype']} "
          f"claims {end - begin} bytes"
        )
      entries[name] = _Entry(path, 8 + length + begin, end - begin, dtype, shape)
  except FileNotFoundError:
    raise CheckpointError(f"{path}: the file is missing") from None
  except (
    struct.error,
    UnicodeDecodeError,
    json.JSONDecodeError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
  ) as e:
    if isinstance(e, CheckpointError):
      raise
    raise CheckpointError(
      f"{path}: corrupt: not a safetensors header ({type(e).__name__})"
    ) from None
  expected = 8 + length
  for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
    if entry.offset != expected or entry.offset + entry.nbytes > size:
      what = "truncated" if entry.offset == expected else "corrupt"
      raise CheckpointError(
        f"{path}: {what}: tensor {name} should end at byte {entry.offset + entry.nbytes} "
        f"of a file of {size} bytes"
      )
    expected = entry.offset + entry.nbytes
  if expected != size:
    raise CheckpointError(f"{path}: corrupt: {size - expected} bytes after the last tensor")
  return entries


def _find_tensors(directory: str) -> dict[str, _Entry]:
  """All tensors of a checkpoint directory, sharded or not."""
  index = os.path.join(directory, _INDEX)
  single = os.path.join(directory, _SINGLE)
  if os.path.exists(single) or not os.path.exists(index):
    return read_header(single)
  try:
    with open(index, encoding="utf-8") as f:
      weight_map = dict(json.load(f)["weight_map"])
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
    raise CheckpointError(f"{index}: corrupt: no weight_map that can be read") from None
  entries = {}
  for file in sorted(set(weight_map.values())):
    path = os.path.join(directory, file)
    names = sorted(n for n, f in weight_map.items() if f == file)
    if not os.path.exists(path):
      raise CheckpointError(
        f"{path}: the file is missing; {_INDEX} says that it holds {len(names)} tensors, "
        f"{names[0]} among them"
      )
    header = read_header(path)
    for name in sorted(set(names) ^ set(header)):
      where = f"{_INDEX} says it is there" if name in names else f"{_INDEX} does not name it there"
      kind = "missing" if name in names else "extra"
      raise CheckpointError(f"{path}: {kind} tensor {name}: {where}")
    entries |= header
  return entries


def _read_bytes(entry: _Entry, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
  end = entry.nbytes if end is None else end
  buffer = np.empty(end - begin, np.uint8)
  with open(entry.file, "rb", buffering=0) as f:
    f.seek(entry.offset + begin)
    view, done = memoryview(buffer), 0
    while done < len(buffer):
      count = f.readinto(view[done:])
      if not count:
        raise CheckpointError(f"{entry.file}: truncated inside tensor {name}")
      done += count
  return buffer


def read_tensor(entry: _Entry, name: str) -> np.ndarray:
  return _read_bytes(entry, name).view(entry.dtype).reshape(entry.shape)


def _same_bytes(a: _Entry, b: _Entry, name: str) -> bool:
  if (a.nbytes, a.dtype, a.shape) != (b.nbytes, b.dtype, b.shape):
    return False
  for begin in range(0, a.nbytes, _COMPARED_BYTES):
    end = min(begin + _COMPARED_BYTES, a.nbytes)
    if not np.array_equal(_read_bytes(a, name, begin, end), _read_bytes(b, name, begin, end)):
      return False
  return True


def _match(directory: str, config: ModelConfig, entries: dict[str, _Entry]) -> dict[str, Slot]:
  """Name -> slot; anything left over on either side is an error."""
  wanted = {s.name: s for s in slots(config)}
  for name in sorted(entries):
    if name in wanted or _IGNORED.fullmatch(name):
      continue
    if name == "lm_head.weight" and config.tied and "model.embed_tokens.weight" in entries:
      if _same_bytes(entries[name], entries["model.embed_tokens.weight"], name):
        continue  # some tied checkpoints store the same matrix twice
      raise CheckpointError(
        f"{entries[name].file}: tensor {name} differs from model.embed_tokens.weight, "
        "but config.json ties them"
      )
    raise CheckpointError(
      f"{entries[name].file}: extra tensor {name}: a {config.family} model of "
      f"{config.layers} layers has none of that name"
    )
  for name, slot in wanted.items():
    if name not in entries:
      raise CheckpointError(f"{directory}: missing tensor {name}")
    if entries[name].shape != _hf_shape(config, slot):
      raise CheckpointError(
        f"{entries[name].file}: tensor {name} has shape {list(entries[name].shape)}, "
        f"config.json asks for {list(_hf_shape(config, slot))}"
      )
  return wanted


def local_directory(path_or_hub_id) -> str:
  """The checkpoint directory itself, or where the hub's files were downloaded to."""
  path = os.fspath(path_or_hub_id)
  if os.path.isdir(path):
    return path
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
    raise CheckpointError(f"{path}: no such directory, and not a hub id of the form owner/name")
  import huggingface_hub  # only where a download is asked for

  try:
    return huggingface_hub.snapshot_download(
      path, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt"]
    )
  except (
    huggingface_hub.errors.HfHubHTTPError,
    huggingface_hub.errors.LocalEntryNotFoundError,
    OSError,
  ) as e:
    raise CheckpointError(
      f"{path}: no such directory, and the hub does not give it: {str(e).strip().splitlines()[0]}"
    ) from e


def read_json(path: str) -> dict:
  try:
    with open(path, encoding="utf-8") as f:
      content = json.load(f)
  except FileNotFoundError:
    raise CheckpointError(f"{path}: the file is missing") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise CheckpointError(f"{path}: corrupt: {e}") from None
  if not isinstance(content, dict):
    raise CheckpointError(f"{path}: corrupt: not a JSON object")
  return content


def read_config(path: str, *, dtype=jnp.bfloat16) -> ModelConfig:
  """The ModelConfig of a checkpoint directory, for weights and computation in `dtype`. End-of-turn tokens come from generation_config.json where it names them."""
  hf = read_json(os.path.join(path, "config.json"))
  generation = os.path.join(path, "generation_config.json")
  if os.path.exists(generation):
    hf["eos_token_id"] = read_json(generation).get("eos_token_id") or hf.get("eos_token_id")
  name = jnp.dtype(dtype).name
  try:
    return model_config.from_hf(hf, dtype=name, param_dtype=name)
  except CheckpointError:
    raise
  except ValueError as e:
    raise CheckpointError(f"{os.path.join(path, 'config.json')}: {e}") from None


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack, layer, i):
  return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


def load_pretrained(path_or_hub_id, *, dtype=jnp.bfloat16, mesh=None) -> tuple[ModelConfig, dict]:
  """(config, params); `dtype` for weights and computation. With a mesh, weights lie on it as `sharding.WEIGHTS` says; ValueError where it does not divide them."""
  directory = local_directory(path_or_hub_id)
  config = read_config(directory, dtype=dtype)
  if mesh is not None:
    decoder.check_mesh(config, mesh)
  entries = _find_tensors(directory)
  wanted = _match(directory, config, entries)
  dtype = jnp.dtype(dtype)

  def place(host: np.ndarray, axes: str):
    if mesh is None:
      return jnp.asarray(host.astype(dtype, order="C", copy=False))
    where = jax.NamedSharding(mesh, sharding.spec(axes, sharding.WEIGHTS))
    return jax.make_array_from_callback(
      host.shape, where, lambda i: host[i].astype(dtype, order="C")
    )

  def empty_stack(axes: str):
    where = (
      None if mesh is None else jax.NamedSharding(mesh, sharding.spec("L" + axes, sharding.WEIGHTS))
    )
    shape = (config.layers, *_sizes(config, axes))
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)()

  params: dict = {}
  for name, slot in wanted.items():
    their_view = read_tensor(entries[name], name).reshape(_sizes(config, slot.hf_axes))
    value = place(their_view.transpose([slot.hf_axes.index(a) for a in slot.axes]), slot.axes)
    parent = params
    for key in slot.path[:-1]:
      parent = parent.setdefault(key, {})
    if slot.layer is None:
      parent[slot.path[-1]] = value
    else:
      stack = parent.get(slot.path[-1])
      stack = empty_stack(slot.axes) if stack is None else stack
      parent[slot.path[-1]] = _put_layer(stack, value, slot.layer)
      # else reads run ahead and tensors pile up
      value = jax.block_until_ready(parent[slot.path[-1]])
  return config, params


def write_safetensors(
  path: str, tensors: list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]], dtype: np.dtype
) -> None:
  """One file from (name, shape, how to get it); one tensor is held at a time. Every process calls, process 0 writes."""
  header, offset = {"__metadata__": {"format": "pt"}}, 0
  for name, shape, _ in tensors:
    end = offset + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
    offset = end
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)
  with contextlib.ExitStack() as stack:
    f = stack.enter_context(open(path, "wb")) if jax.process_index() == 0 else None
    if f:
      f.write(struct.pack("<Q", len(encoded)) + encoded)
    for name, shape, fetch in tensors:
      value = fetch()
      assert (value.shape, value.dtype) == (shape, dtype), (
        name,
        value.shape,
        value.dtype,
        shape,
        dtype,
      )
      if f:
        f.write(np.ascontiguousarray(value).view(np.uint8).data)
    if f:
      f.flush()
      os.fsync(f.fileno())


def _fetch(slot: Slot, shape: tuple[int, ...], params: dict) -> np.ndarray:
  leaf = functools.reduce(lambda tree, key: tree[key], slot.path, params)
  ours = to_host(leaf if slot.layer is None else leaf[slot.layer])
  return ours.transpose([slot.axes.index(a) for a in slot.hf_axes]).reshape(shape)


def write_json(path: str, content: dict) -> None:
  with open(path, "w", encoding="utf-8") as f:
    json.dump(content, f, indent=2, sort_keys=True)
    f.write("\n")


def save_pretrained(
  path, config: ModelConfig, params: dict, *, tokenizer=None, shard_bytes: int = 4 << 30
) -> None:
  """Writes a directory that transformers loads: config, generation config, safetensors (sharded above `shard_bytes`).

  `tokenizer`: anything with `save_pretrained(path)`. Weights keep their dtype. Weights of an earlier export in the same
  directory are replaced. With several processes all must call it; process 0 writes.
  """
  path = os.fspath(path)
  dtypes = {jnp.dtype(x.dtype) for x in jax.tree.leaves(params)}
  assert len(dtypes) == 1, f"weights of several dtypes: {sorted(d.name for d in dtypes)}"
  assert jax.tree.structure(params) == jax.tree.structure(decoder.shapes(config)), (
    "params are not of this config"
  )
  dtype = dtypes.pop()
  writes = jax.process_index() == 0
  if writes:
    os.makedirs(path, exist_ok=True)

  shards, filled = [[]], 0
  for slot in slots(config):
    shape = _hf_shape(config, slot)
    nbytes = math.prod(shape) * dtype.itemsize
    if shards[-1] and filled + nbytes > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append((slot, shape))
    filled += nbytes
  names = (
    [_SINGLE]
    if len(shards) == 1
    else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  )
  for name, parts in zip(names, shards):
    tensors = [
      (slot.name, shape, functools.partial(_fetch, slot, shape, params)) for slot, shape in parts
    ]
    write_safetensors(os.path.join(path, name + ".partial"), tensors, dtype)
  if not writes:
    return
  for old in os.listdir(path):  # a stale file beside a new index would be read instead of it
    if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old):
      os.remove(os.path.join(path, old))
  for name in names:
    os.replace(os.path.join(path, name + ".partial"), os.path.join(path, name))
  if len(shards) > 1:
    total = sum(math.prod(shape) * dtype.itemsize for parts in shards for _, shape in parts)
    weight_map = {slot.name: name for name, parts in zip(names, shards) for slot, _ in parts}
    write_json(
      os.path.join(path, _INDEX), {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
  hf = model_config.to_hf(dataclasses.replace(config, param_dtype=dtype.name))
  write_json(os.path.join(path, "config.json"), hf)
  ids = {
    key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None
  }
  write_json(os.path.join(path, "generation_config.json"), ids)
  if tokenizer is not None:
    tokenizer.save_pretrained(path)
