"""The decoder: weights with their axes, hidden states, logits, and the cached step that sampling uses.

One causal transformer (RMSNorm, rotary positions, grouped-query attention, SwiGLU) serves training, teacher scoring and
sampling; families differ by fields of `ModelConfig`. `params` is a nested dict whose `layers` are stacked along a leading
axis L and scanned, so that compile time does not grow with depth.

Positions and masks: a token attends to tokens of its own segment at the same or an earlier column; segment 0 is padding.
Without `segment_ids_BT` the row is one segment; without `positions_BT` positions count from 0 within each segment.
A sliding layer sees the last `sliding_window` columns, its own included.
What stands at padding is finite but meaningless.
Numerics: matrix products in `config.dtype`; norms, rotary angles, softmax and logits in float32.
Errors: AssertionError with both shapes, while tracing, where inputs disagree.
"""

import math
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax import sharding
from sdpo_jax.kernels import attention
from sdpo_jax.kernels.target import target_platform
from sdpo_jax.model.config import ModelConfig, Rope

Initializer = jax.nn.initializers.Initializer


class Weight(NamedTuple):
  axes: str  # axis letters of records.py, one a dimension
  init: Initializer


def _attention_weights(c: ModelConfig) -> dict[str, Weight]:
  inwards = nn.initializers.normal(c.width**-0.5)
  weights = {
    "q": Weight("DNH", inwards),
    "k": Weight("DKH", inwards),
    "v": Weight("DKH", inwards),
    "o": Weight("NHD", nn.initializers.normal((2 * c.layers * c.heads * c.head_dim) ** -0.5)),
  }
  if c.qkv_bias:
    zeros = nn.initializers.zeros
    weights |= {
      "q_bias": Weight("NH", zeros),
      "k_bias": Weight("KH", zeros),
      "v_bias": Weight("KH", zeros),
    }
  if c.qk_norm != "none":
    ones, whole = nn.initializers.ones, c.qk_norm == "all"
    weights |= {
      "q_norm": Weight("NH" if whole else "H", ones),
      "k_norm": Weight("KH" if whole else "H", ones),
    }
  return weights


def _mlp_weights(c: ModelConfig) -> dict[str, Weight]:
  inwards = nn.initializers.normal(c.width**-0.5)
  return {
    "gate": Weight("DF", inwards),
    "up": Weight("DF", inwards),
    "down": Weight("FD", nn.initializers.normal((2 * c.layers * c.ff_width) ** -0.5)),
  }


def _norm_weights(c: ModelConfig) -> dict[str, Weight]:
  return {
    "attn_norm": Weight("D", nn.initializers.ones),
    "mlp_norm": Weight("D", nn.initializers.ones),
  }


def _outer_weights(c: ModelConfig) -> dict[str, Weight]:
  weights = {
    "embed": Weight("VD", nn.initializers.normal(0.02)),
    "norm": Weight("D", nn.initializers.ones),
  }
  if not c.tied:
    weights["head"] = Weight("DV", nn.initializers.normal(0.02))
  return weights


def weights(config: ModelConfig) -> dict:
  """Every weight, declared once: the tree of `params` with a Weight at each leaf. Those under "layers" are one layer's."""
  block = {"attn": _attention_weights(config), "mlp": _mlp_weights(config), **_norm_weights(config)}
  return {"layers": block, **_outer_weights(config)}


def axis_size(config: ModelConfig, letter: str) -> int:
  return dict(
    L=config.layers,
    D=config.width,
    N=config.heads,
    K=config.kv_heads,
    H=config.head_dim,
    F=config.ff_width,
    V=config.vocab,
  )[letter]


def check_mesh(config: ModelConfig, mesh: jax.sharding.Mesh) -> None:
  """ValueError where the mesh does not divide a dimension of the weights."""
  for letter, name in {
    "D": "width",
    "N": "heads",
    "K": "kv_heads",
    "F": "ff_width",
    "V": "vocab",
  }.items():
    axis, size = sharding.WEIGHTS[letter], axis_size(config, letter)
    if size % mesh.shape[axis]:
      raise ValueError(
        f"config.mesh.{axis}={mesh.shape[axis]} does not divide {name}={size} of the model"
      )


def _shape(config: ModelConfig, letters: str) -> tuple[int, ...]:
  return tuple(axis_size(config, a) for a in letters)


def _for_use(name: str, w: jax.Array, config: ModelConfig) -> jax.Array:
  """In the compute dtype; scales of norms stay as stored, since norms are computed in float32."""
  return w if name.endswith("norm") else w.astype(config.dtype)


def _declare(
  module: nn.Module, declared: dict[str, Weight], config: ModelConfig
) -> dict[str, jax.Array]:
  """Binds a table of weights to a Linen module and gives them out as the computation wants them."""
  values = {
    name: module.param(name, w.init, _shape(config, w.axes), config.param_dtype)
    for name, w in declared.items()
  }
  return {name: _for_use(name, value, config) for name, value in values.items()}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Over the trailing axes that `scale` has; float32 inside."""
  x32 = x.astype(jnp.float32)
  axes = tuple(range(x.ndim - scale.ndim, x.ndim))
  x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
  return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Radians per position of each of the H/2 pairs, float32, after the scaling that `rope` asks for."""
  freq = 1.0 / np.float64(rope.theta) ** (np.arange(0, head_dim, 2) / head_dim)
  # long wavelengths are stretched by factor, short ones kept, those between blended
  if rope.kind == "llama3":
    turns = rope.original_positions * freq / (2 * math.pi)
    keep = np.clip(
      (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1
    )
    freq = (1 - keep) * freq / rope.factor + keep * freq
  # the same idea with a ramp over the index of the pair (arXiv:2309.00071 section 3.2)
  elif rope.kind == "yarn":

    def pair_with(turns):
      return (
        head_dim
        * math.log(rope.original_positions / (turns * 2 * math.pi))
        / (2 * math.log(rope.theta))
      )

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    stretch = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    freq = stretch * freq / rope.factor + (1 - stretch) * freq
  return freq.astype(np.float32)


def _rotation(rope: Rope, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin of shape [B, T, 1, H/2], float32."""
  angle = positions_BT[..., None, None].astype(jnp.float32) * frequencies(rope, head_dim)
  return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def _rotate(x_BTNH: jax.Array, rotation) -> jax.Array:
  """Rotates pair (h, h + H/2) by its angle."""
  cos, sin = rotation
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def _product(x: jax.Array, w: jax.Array, contracted: int = 1) -> jax.Array:
  """x[B, T, *c] times w[*c, *out], the `contracted` axes c summed.

  As one plain matrix product: over separate B and T axes XLA's CPU backend leaves its fast path for the weight gradient,
  2.4 times slower for a whole MLP.
  """
  rows, inner = x.shape[:2], math.prod(w.shape[:contracted])
  return (x.reshape(-1, inner) @ w.reshape(inner, -1)).reshape(*rows, *w.shape[contracted:])


class Attention(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, rotation, attend):
    c = self.config
    w = _declare(self, _attention_weights(c), c)
    q, k, v = (_product(x_BTD, w[name]) for name in "qkv")
    if c.qkv_bias:
      q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    if c.qk_norm != "none":
      q, k = rms_norm(q, w["q_norm"], c.norm_eps), rms_norm(k, w["k_norm"], c.norm_eps)
    out_BTNH, memory = attend(_rotate(q, rotation), _rotate(k, rotation), v)
    return _product(out_BTNH, w["o"], contracted=2), memory


class Mlp(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD):
    w = _declare(self, _mlp_weights(self.config), self.config)
    return _product(nn.silu(_product(x_BTD, w["gate"])) * _product(x_BTD, w["up"]), w["down"])


class Block(nn.Module):
  """One layer. `attend(q_BTNH, k_BTKH, v_BTKH) -> out_BTNH, memory` decides what is visible; memory is handed through."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, rotation, attend):
    c = self.config
    w = _declare(self, _norm_weights(c), c)
    norm = lambda x, name: rms_norm(x, w[name], c.norm_eps)
    attn, mlp = Attention(c, name="attn"), Mlp(c, name="mlp")
    if c.norm_placement == "pre":
      out, memory = attn(norm(x_BTD, "attn_norm"), rotation, attend)
      x_BTD = x_BTD + out
      x_BTD = x_BTD + mlp(norm(x_BTD, "mlp_norm"))
    else:
      out, memory = attn(x_BTD, rotation, attend)
      x_BTD = x_BTD + norm(out, "attn_norm")
      x_BTD = x_BTD + norm(mlp(x_BTD), "mlp_norm")
    return sharding.constrain(x_BTD, "BTD"), memory


def init(config: ModelConfig, key: jax.Array) -> dict:
  """Random weights in `config.param_dtype`."""
  outer_key, layers_key = jax.random.split(key)
  x_BTD = jnp.zeros((1, 1, config.width), config.dtype)
  rotation = _rotation(config.rope, config.head_dim, jnp.zeros((1, 1), jnp.int32))
  attend = lambda q, k, v: (q, None)
  layer = lambda k: Block(config).init(k, x_BTD, rotation, attend)["params"]
  params = {"layers": jax.vmap(layer)(jax.random.split(layers_key, config.layers))}
  for i, (name, w) in enumerate(_outer_weights(config).items()):
    params[name] = w.init(
      jax.random.fold_in(outer_key, i), _shape(config, w.axes), config.param_dtype
    )
  return params


def axes(config: ModelConfig) -> dict:
  """The tree of `params` with a string of axis letters at each leaf."""
  tree = jax.tree.map(lambda w: w.axes, weights(config), is_leaf=lambda x: isinstance(x, Weight))
  return {**tree, "layers": jax.tree.map(lambda a: "L" + a, tree["layers"])}


def shapes(config: ModelConfig) -> dict:
  """The tree of `params` with a jax.ShapeDtypeStruct at each leaf."""
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(_shape(config, a), config.param_dtype), axes(config)
  )


class Adapted(NamedTuple):
  """A weight of a layer that stands for w + a b (see `lora`): the last axis of a and the first of b are the rank."""

  w: jax.Array
  a: jax.Array
  b: jax.Array


def resolve(layer: dict) -> dict:
  """One layer's weights with every Adapted replaced by its sum, formed in float32, in the dtype of w."""

  def value(x):
    if not isinstance(x, Adapted):
      return x
    product = jnp.tensordot(
      x.a.astype(jnp.float32), x.b.astype(jnp.float32), 1, precision="highest"
    )
    return (x.w.astype(jnp.float32) + product).astype(x.w.dtype)

  return jax.tree.map(value, layer, is_leaf=lambda x: isinstance(x, Adapted))


class _Stream(NamedTuple):
  """What a batch of rows brings along to every layer."""

  x_BTD: jax.Array
  rotation: tuple  # of the full layers
  sliding_rotation: tuple
  mask_BTS: jax.Array | None  # None: splash masks by segments
  sliding_mask_BTS: jax.Array | None
  segment_BT: jax.Array | None = None


def _stream(
  params: dict,
  config: ModelConfig,
  tokens_BT,
  positions_BT,
  mask_BTS,
  sliding_mask_BTS,
  segment_BT=None,
) -> _Stream:
  x_BTD = sharding.constrain(
    sharding.constrain_embeddings(params["embed"][tokens_BT].astype(config.dtype)), "BTD"
  )
  rotation = sliding_rotation = _rotation(config.rope, config.head_dim, positions_BT)
  if config.sliding_rope is not None:
    sliding_rotation = _rotation(config.sliding_rope, config.head_dim, positions_BT)
  return _Stream(x_BTD, rotation, sliding_rotation, mask_BTS, sliding_mask_BTS, segment_BT)


def _pick(stream: _Stream, config: ModelConfig, slides: jax.Array) -> tuple:
  """(rotation, mask) of one layer. Selected by value: layers of both kinds run through one scanned body."""
  if not config.sliding:
    return stream.rotation, stream.mask_BTS
  full, sliding = (
    (stream.rotation, stream.mask_BTS),
    (stream.sliding_rotation, stream.sliding_mask_BTS),
  )
  return jax.tree.map(lambda s, f: jnp.where(slides, s, f), sliding, full)


def _slides(config: ModelConfig) -> jax.Array:
  return jnp.array(config.sliding or (False,) * config.layers)


def _rows(
  params: dict, config: ModelConfig, tokens_BT, positions_BT, segment_ids_BT, prefix_ids_BT=None
) -> _Stream:
  """The stream of whole rows, as training and scoring see them. Splash knows no prefixes."""
  B, T = tokens_BT.shape
  assert segment_ids_BT is None or segment_ids_BT.shape == (B, T), (
    segment_ids_BT.shape,
    tokens_BT.shape,
  )
  if positions_BT is None:
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segment_ids_BT is not None:
      starts_BT = jnp.diff(segment_ids_BT, axis=1, prepend=0) != 0
      positions_BT -= jax.lax.cummax(jnp.where(starts_BT, positions_BT, 0), axis=1)
  assert positions_BT.shape == (B, T), (positions_BT.shape, tokens_BT.shape)
  if prefix_ids_BT is None and attention.splash_fits(T):
    segment_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    return _stream(params, config, tokens_BT, positions_BT, None, None, segment_BT)
  windows = (None, config.sliding_window) if config.sliding else (None, None)
  masks = [
    attention.visibility(
      attention.packed_mask(
        segment_ids_BT, (B, T), window, prefix_BT=prefix_ids_BT, position_BT=positions_BT
      )
    )
    for window in windows
  ]
  return _stream(params, config, tokens_BT, positions_BT, *masks)


def _gather(config: ModelConfig, layer: dict) -> dict:
  """One layer's weights for use, whole along "fsdp": cast first, so that what moves between chips is the smaller dtype."""
  gather = lambda path, w, a: sharding.gather_weight(_for_use(path[-1].key, w, config), a[1:])
  return jax.tree_util.tree_map_with_path(gather, resolve(layer), axes(config)["layers"])


def _layer(config: ModelConfig, stream: _Stream, x_BTD, layer: dict, slides) -> jax.Array:
  rotation, mask_BTS = _pick(stream, config, slides)

  def attend(q, k, v):
    if mask_BTS is not None:
      return attention.attend_packed(q, k, v, mask_BTS), None
    full = lambda *qkv: attention.splash(*qkv, stream.segment_BT)
    if not config.sliding:
      return full(q, k, v), None
    return jax.lax.cond(
      slides,
      lambda *qkv: attention.splash(*qkv, stream.segment_BT, config.sliding_window),
      full,
      q,
      k,
      v,
    ), None

  return Block(config).apply({"params": layer}, x_BTD, rotation, attend)[0]


_policies = jax.checkpoint_policies
REMAT = {  # what a layer keeps for the backward pass; the rest is computed again
  "none": None,  # everything, gathered weights included
  # products and attention, but not cuDNN's: norms,
  "dots": _policies.save_from_both_policies(
    _policies.dots_saveable, _policies.save_only_these_names(attention.KEPT)
  ),
  # rotations and activations cost little, and on a CPU less than writing and
  # reading what they give
  "block": _policies.nothing_saveable,  # its input alone
}


def _scan(body, carry, xs, remat: str):
  """Over layers. What the backward pass finds again, see REMAT."""
  if remat not in REMAT:
    raise ValueError(f"model.remat={remat!r}: choose from {list(REMAT)}")
  if remat != "none":
    body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[remat])
  return jax.lax.scan(body, carry, xs)[0]


def _final(params: dict, config: ModelConfig, x_BTD) -> jax.Array:
  return rms_norm(x_BTD, params["norm"], config.norm_eps)


def hidden(
  params: dict,
  config: ModelConfig,
  tokens_BT,
  *,
  positions_BT=None,
  segment_ids_BT=None,
  prefix_ids_BT=None,
  remat: str = "none",
) -> jax.Array:
  """Tokens -> hidden_BTD after the final norm, in `config.dtype`. prefix_ids_BT: see records.Rows; it needs positions and segments."""
  stream = _rows(params, config, tokens_BT, positions_BT, segment_ids_BT, prefix_ids_BT)

  def body(x_BTD, xs):
    layer, slides = xs
    return _layer(config, stream, x_BTD, _gather(config, layer), slides), None

  return _final(
    params, config, _scan(body, stream.x_BTD, (params["layers"], _slides(config)), remat)
  )


def hidden_pair(
  params: dict,
  teacher_params: dict | None,
  config: ModelConfig,
  student: tuple,
  teacher: tuple,
  *,
  remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
  """Policy and teacher through one scan: each layer's weights are read once and only the policy is differentiated.

  `student` and `teacher` are (tokens_BT, positions_BT or None, segment_ids_BT or None[, prefix_ids_BT or None]); their B and T may differ.
  `teacher_params` None: the live weights teach, under stop_gradient. Returns (policy_hidden_BTD, teacher_hidden_BTD).
  """
  live = teacher_params is None
  teacher_params = jax.lax.stop_gradient(params if live else teacher_params)
  policy, teaching = _rows(params, config, *student), _rows(teacher_params, config, *teacher)

  def body(carry, xs):
    policy_BTD, teacher_BTD = carry
    layer, teacher_layer, slides = xs
    layer = _gather(config, layer)
    teacher_layer = jax.lax.stop_gradient(layer if live else _gather(config, teacher_layer))
    policy_BTD = _layer(config, policy, policy_BTD, layer, slides)
    teacher_BTD = jax.lax.stop_gradient(
      _layer(config, teaching, teacher_BTD, teacher_layer, slides)
    )
    return (policy_BTD, teacher_BTD), None

  xs = (params["layers"], None if live else teacher_params["layers"], _slides(config))
  policy_BTD, teacher_BTD = _scan(body, (policy.x_BTD, teaching.x_BTD), xs, remat)
  return _final(params, config, policy_BTD), jax.lax.stop_gradient(
    _final(teacher_params, config, teacher_BTD)
  )


def head(params: dict, config: ModelConfig) -> jax.Array:
  """The output matrix [D, V], in `config.param_dtype`."""
  return params["embed"].T if config.tied else params["head"]


def logits(
  params: dict, config: ModelConfig, tokens_BT, *, positions_BT=None, segment_ids_BT=None
) -> jax.Array:
  """Tokens -> logits_BTV, float32."""
  hidden_BTD = hidden(
    params, config, tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT
  )
  return project(hidden_BTD, head(params, config))


def project(hidden_XD, head_DV) -> jax.Array:
  """Hidden states times output matrix, summed in float32."""
  return jnp.matmul(hidden_XD, head_DV.astype(hidden_XD.dtype), preferred_element_type=jnp.float32)


class Cache(NamedTuple):
  """Keys and values of the columns written so far. Columns not written, and padding, are not valid."""

  k: jax.Array  # axes: cache_axes()
  v: jax.Array
  valid_BS: jax.Array  # bool


def cache_axes() -> str:
  """The order in which the compiler wants the cache in memory while it decodes. With LBSKH a TPU copies all of it at the beginning and the end of each call;
  with LSKBH a CPU copies a layer's for every token."""
  return "LSKBH" if target_platform() == "tpu" else "LBSKH"


def init_cache(config: ModelConfig, rows: int, length: int) -> Cache:
  sizes = dict(L=config.layers, B=rows, S=length, K=config.kv_heads, H=config.head_dim)
  empty = lambda: sharding.constrain(
    jnp.zeros([sizes[axis] for axis in cache_axes()], config.dtype), cache_axes()
  )
  return Cache(empty(), empty(), jnp.zeros((rows, length), bool))


def _reordered(x: jax.Array, axes: str, wanted: str) -> jax.Array:
  return x.transpose([axes.index(axis) for axis in wanted])


def extend(
  params: dict, config: ModelConfig, tokens_BT, cache: Cache, *, start, positions_BT, valid_BT
) -> tuple[jax.Array, Cache]:
  """Writes T columns at column `start` (one number for all rows) and returns their hidden_BTD after the final norm.

  A column sees the valid columns up to its own. T is the prompt's length in prefill and 1 in decoding.
  The caller keeps start + T within the cache: a write beyond its end would be shifted back silently.
  """
  (B, T), S = tokens_BT.shape, cache.valid_BS.shape[1]
  assert positions_BT.shape == valid_BT.shape == (B, T), (
    positions_BT.shape,
    valid_BT.shape,
    tokens_BT.shape,
  )
  assert cache.valid_BS.shape[0] == B and T <= S, (cache.valid_BS.shape, tokens_BT.shape)
  valid_BS = jax.lax.dynamic_update_slice(cache.valid_BS, valid_BT.astype(bool), (0, start))
  column_T, column_S = start + jnp.arange(T), jnp.arange(S)
  mask_BTS = valid_BS[:, None, :] & (column_S[None, :] <= column_T[:, None])
  sliding_mask_BTS = (
    mask_BTS & (column_T[:, None] - column_S[None, :] < config.sliding_window)
    if config.sliding
    else mask_BTS
  )
  stream = _stream(params, config, tokens_BT, positions_BT, mask_BTS, sliding_mask_BTS)

  axes = cache_axes()

  # the whole cache is carried, so that XLA updates it in place instead of restacking it
  def body(carry, xs):
    x_BTD, all_k, all_v = carry
    layer, slides, i = xs
    rotation, mask_BTS = _pick(stream, config, slides)
    at = [{"L": i, "S": start}.get(axis, 0) for axis in axes]

    def attend(q, k, v):
      write = lambda cached, new_BTKH: jax.lax.dynamic_update_slice(
        cached, _reordered(new_BTKH[None], "LBSKH", axes), at
      )
      read = lambda cached: _reordered(cached[i], axes[1:], "BSKH")
      written = write(all_k, k), write(all_v, v)
      return attention.reference(q, *map(read, written), mask_BTS), written

    x_BTD, (all_k, all_v) = Block(config).apply(
      {"params": _gather(config, layer)}, x_BTD, rotation, attend
    )
    return (x_BTD, all_k, all_v), None

  carry = (stream.x_BTD, cache.k, cache.v)
  (x_BTD, k, v), _ = jax.lax.scan(
    body, carry, (params["layers"], _slides(config), jnp.arange(config.layers))
  )
  return _final(params, config, x_BTD), Cache(k, v, valid_BS)
