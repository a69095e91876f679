"""The decoder: weights with their axes, hidden states, logits, and the cached step of sampling.

One causal transformer (RMSNorm, rotary positions, grouped-query attention, gated MLP) serves
training, teacher scoring and sampling; families differ by fields of `ModelConfig`. `params`
is a nested dict. Its `layers` are stacked along a leading axis L and scanned, so that compile
time does not grow with depth.

Visibility: a token attends to tokens of its own segment at the same or an earlier column.
Segment 0 is padding; what stands there is finite but meaningless. Without `segment_ids_BT`
the row is one segment. Without `positions_BT` positions count from 0 within each segment.
A sliding layer sees the last `sliding_window` columns, its own included.
Numerics: matrix products are in `config.dtype`; norms, rotary angles, softmax and logits in
float32.
Errors: AssertionError with both shapes, while tracing, where inputs disagree.
"""

import functools
import math
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax import sharding
from sdpo_jax.kernels import attention, paged_attention
from sdpo_jax.kernels.target import target_platform
from sdpo_jax.model.config import ModelConfig, Rope
from sdpo_jax.records import Array

Initializer = jax.nn.initializers.Initializer
_FAR = 1 << 30  # a window that reaches every position
_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


class Weight(NamedTuple):
  """Declares one weight of the decoder."""

  axes: str  # axis letters of records.py, one a dimension
  init: Initializer


def _scale(c: ModelConfig, axes: str) -> Weight:
  """Declares the weight of a norm, which starts as a factor of one."""
  neutral = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
  return Weight(axes, neutral)


def _attention_weights(c: ModelConfig) -> dict[str, Weight]:
  inwards = nn.initializers.normal(c.width**-0.5)
  # the residual stream sums two such outputs a layer: its variance must not grow with depth
  outwards = nn.initializers.normal((2 * c.layers * c.heads * c.head_dim) ** -0.5)
  weights = {
    "q": Weight("DNH", inwards),
    "k": Weight("DKH", inwards),
    "v": Weight("DKH", inwards),
    "o": Weight("NHD", outwards),
  }
  if c.qkv_bias:
    zeros = nn.initializers.zeros
    weights |= {
      "q_bias": Weight("NH", zeros),
      "k_bias": Weight("KH", zeros),
      "v_bias": Weight("KH", zeros),
    }
  if c.qk_norm == "head":
    weights |= {"q_norm": _scale(c, "H"), "k_norm": _scale(c, "H")}
  elif c.qk_norm == "all":
    weights |= {"q_norm": _scale(c, "NH"), "k_norm": _scale(c, "KH")}
  return weights


def _mlp_weights(c: ModelConfig) -> dict[str, Weight]:
  inwards = nn.initializers.normal(c.width**-0.5)
  outwards = nn.initializers.normal((2 * c.layers * c.ff_width) ** -0.5)
  return {
    "gate": Weight("DF", inwards),
    "up": Weight("DF", inwards),
    "down": Weight("FD", outwards),
  }


def _norm_weights(c: ModelConfig) -> dict[str, Weight]:
  names = ["attn_norm", "mlp_norm"]
  if c.norm_placement == "both":  # then these come before, and two more behind
    names += ["attn_out_norm", "mlp_out_norm"]
  return {name: _scale(c, "D") for name in names}


def _outer_weights(c: ModelConfig) -> dict[str, Weight]:
  weights = {
    "embed": Weight("VD", nn.initializers.normal(0.02)),
    "norm": _scale(c, "D"),
  }
  if not c.tied:
    weights["head"] = Weight("DV", nn.initializers.normal(0.02))
  return weights


def weights(config: ModelConfig) -> dict:
  """Declares every weight once: returns the tree of `params` with a Weight at each leaf.

  Those under "layers" are one layer's.
  """
  block = {"attn": _attention_weights(config), "mlp": _mlp_weights(config), **_norm_weights(config)}
  return {"layers": block, **_outer_weights(config)}


def axis_size(config: ModelConfig, letter: str) -> int:
  """Returns the size of the axis that a letter names."""
  sizes = dict(
    L=config.layers,
    D=config.width,
    N=config.heads,
    K=config.kv_heads,
    H=config.head_dim,
    F=config.ff_width,
    V=config.vocab,
  )
  return sizes[letter]


def check_mesh(
  config: ModelConfig, mesh: jax.sharding.Mesh, *, setting: str = "config.mesh"
) -> None:
  """Raises ValueError where the mesh of a setting does not divide a dimension of the weights."""
  split = {"D": "width", "N": "heads", "K": "kv_heads", "F": "ff_width", "V": "vocab"}
  for letter, name in split.items():
    axis = sharding.WEIGHTS[letter]
    size = axis_size(config, letter)
    if size % mesh.shape[axis]:
      raise ValueError(
        f"{setting}.{axis}={mesh.shape[axis]} does not divide {name}={size} of the model"
      )


def _shape(config: ModelConfig, letters: str) -> tuple[int, ...]:
  return tuple(axis_size(config, a) for a in letters)


def _for_use(name: str, w: jax.Array, config: ModelConfig) -> jax.Array:
  """Casts a weight to the compute dtype.

  Scales of norms stay as stored, since norms are computed in float32.
  """
  return w if name.endswith("norm") else w.astype(config.dtype)


def _declare(
  module: nn.Module, declared: dict[str, Weight], config: ModelConfig
) -> dict[str, jax.Array]:
  """Binds a table of weights to a Linen module and returns their values, cast for use."""
  values = {
    name: module.param(name, w.init, _shape(config, w.axes), config.param_dtype)
    for name, w in declared.items()
  }
  return {name: _for_use(name, value, config) for name, value in values.items()}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Divides x by its root mean square over the trailing axes that `scale` has, in float32."""
  x32 = x.astype(jnp.float32)
  axes = tuple(range(x.ndim - scale.ndim, x.ndim))
  x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
  return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def _norm(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
  """Applies the RMSNorm of a model's weight."""
  scale = weight.astype(jnp.float32) + 1.0 if config.norm_plus_one else weight
  return rms_norm(x, scale, config.norm_eps)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Returns the radians per position of each of the H/2 pairs, float32, after rope's scaling."""
  freq = 1.0 / np.float64(rope.theta) ** (np.arange(0, head_dim, 2) / head_dim)
  # long wavelengths are stretched by factor, short ones kept, those between blended
  if rope.kind == "llama3":
    turns = rope.original_positions * freq / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = np.clip((turns - rope.low_freq_factor) / span, 0, 1)
    freq = (1 - keep) * freq / rope.factor + keep * freq
  elif rope.kind == "linear":
    freq = freq / rope.factor
  elif rope.kind == "yarn":
    stretch = _yarn_stretch(rope, head_dim)
    freq = stretch * freq / rope.factor + (1 - stretch) * freq
  return freq.astype(np.float32)


def _yarn_stretch(rope: Rope, head_dim: int) -> np.ndarray:
  """Returns how far each pair is stretched, 0 to 1: a ramp over its index.

  Source: arXiv:2309.00071 section 3.2.
  """

  def pair_with(turns):
    """Returns the (fractional) index of the pair that makes so many turns in the old context."""
    positions_per_radian = rope.original_positions / (turns * 2 * math.pi)
    return head_dim * math.log(positions_per_radian) / (2 * math.log(rope.theta))

  low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  high += 0.001 * (low == high)  # a ramp of no width would divide by zero
  return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)


def _rotation(rope: Rope, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns cos and sin of shape [B, T, 1, H/2], float32."""
  angle = positions_BT[..., None, None].astype(jnp.float32) * frequencies(rope, head_dim)
  return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def _rotate(x_BTNH: jax.Array, rotation, scale: float = 1.0) -> jax.Array:
  """Rotates pair (h, h + H/2) by its angle, and multiplies by `scale` before the one rounding."""
  cos, sin = rotation
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return (rotated * scale).astype(x_BTNH.dtype)


def _product(x: jax.Array, w: jax.Array, contracted: int = 1) -> jax.Array:
  """Multiplies x[B, T, *c] by w[*c, *out] and sums over the `contracted` axes c.

  It is one plain matrix product. Over separate B and T axes XLA's CPU backend leaves its fast
  path for the weight gradient, 2.4 times slower for a whole MLP.
  """
  inner = math.prod(w.shape[:contracted])
  product = x.reshape(-1, inner) @ w.reshape(inner, -1)
  return product.reshape(*x.shape[:2], *w.shape[contracted:])


class Attention(nn.Module):
  """Projects to heads, rotates, lets `attend` (see Block) mix the columns, and projects back."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, rotation, attend):
    c = self.config
    w = _declare(self, _attention_weights(c), c)
    q, k, v = (_product(x_BTD, w[name]) for name in "qkv")
    if c.qkv_bias:
      q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    if c.qk_norm != "none":
      q, k = _norm(q, w["q_norm"], c), _norm(k, w["k_norm"], c)
    q, k = _rotate(q, rotation, c.query_scale), _rotate(k, rotation)
    out_BTNH, memory = attend(q, k, v)
    return _product(out_BTNH, w["o"], contracted=2), memory


class Mlp(nn.Module):
  """Computes the gated MLP: SwiGLU, or GeGLU where the activation is GELU."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD):
    w = _declare(self, _mlp_weights(self.config), self.config)
    gate = _ACTIVATIONS[self.config.activation](_product(x_BTD, w["gate"]))
    return _product(gate * _product(x_BTD, w["up"]), w["down"])


class Block(nn.Module):
  """Computes one layer and returns (x_BTD, memory).

  `attend(q_BTNH, k_BTKH, v_BTKH) -> out_BTNH, memory` decides what is visible. Its memory
  (the cache, in sampling) is handed through.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, rotation, attend):
    c = self.config
    w = _declare(self, _norm_weights(c), c)
    attn = Attention(c, name="attn")
    mlp = Mlp(c, name="mlp")

    def norm(x, name):
      return _norm(x, w[name], c)

    if c.norm_placement == "pre":
      out, memory = attn(norm(x_BTD, "attn_norm"), rotation, attend)
      x_BTD = x_BTD + out
      x_BTD = x_BTD + mlp(norm(x_BTD, "mlp_norm"))
    elif c.norm_placement == "both":
      out, memory = attn(norm(x_BTD, "attn_norm"), rotation, attend)
      x_BTD = x_BTD + norm(out, "attn_out_norm")
      x_BTD = x_BTD + norm(mlp(norm(x_BTD, "mlp_norm")), "mlp_out_norm")
    else:
      out, memory = attn(x_BTD, rotation, attend)
      x_BTD = x_BTD + norm(out, "attn_norm")
      x_BTD = x_BTD + norm(mlp(x_BTD), "mlp_norm")
    return sharding.constrain(x_BTD, "BTD"), memory


def init(config: ModelConfig, key: jax.Array) -> dict:
  """Draws random weights in `config.param_dtype`."""
  outer_key, layers_key = jax.random.split(key)
  x_BTD = jnp.zeros((1, 1, config.width), config.dtype)
  rotation = _rotation(config.rope, config.head_dim, jnp.zeros((1, 1), jnp.int32))

  def attend(q, k, v):
    return q, None

  def init_layer(key):
    return Block(config).init(key, x_BTD, rotation, attend)["params"]

  params = {"layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.layers))}
  for i, (name, w) in enumerate(_outer_weights(config).items()):
    weight_key = jax.random.fold_in(outer_key, i)
    params[name] = w.init(weight_key, _shape(config, w.axes), config.param_dtype)
  return params


def axes(config: ModelConfig) -> dict:
  """Returns the tree of `params` with a string of axis letters at each leaf."""
  tree = jax.tree.map(lambda w: w.axes, weights(config), is_leaf=lambda x: isinstance(x, Weight))
  return {**tree, "layers": jax.tree.map(lambda a: "L" + a, tree["layers"])}


def shapes(config: ModelConfig) -> dict:
  """Returns the tree of `params` with a jax.ShapeDtypeStruct at each leaf."""
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(_shape(config, a), config.param_dtype), axes(config)
  )


class Adapted(NamedTuple):
  """Stands for a layer's weight w + a b (see `lora`).

  The last axis of a and the first of b are the rank.
  """

  w: jax.Array
  a: jax.Array
  b: jax.Array


def _resolve_weight(x: Adapted | jax.Array) -> jax.Array:
  """Returns the sum that an Adapted stands for; a plain weight as it is."""
  if not isinstance(x, Adapted):
    return x
  a32, b32 = x.a.astype(jnp.float32), x.b.astype(jnp.float32)
  product = jnp.tensordot(a32, b32, 1, precision="highest")
  return (x.w.astype(jnp.float32) + product).astype(x.w.dtype)


def resolve(layer: dict) -> dict:
  """Replaces every Adapted of a layer by its sum, formed in float32, in the dtype of w."""
  return jax.tree.map(_resolve_weight, layer, is_leaf=lambda x: isinstance(x, Adapted))


class _Stream(NamedTuple):
  """Holds what a batch of rows brings along to every layer."""

  x_BTD: jax.Array
  rotation: tuple  # of the full layers
  sliding_rotation: tuple
  # Who sees whom in full layers; None: splash masks by segments, or pages say it.
  visible: attention.Visibility | None
  sliding_visible: attention.Visibility | None
  segment_BT: jax.Array | None = None


def _stream(
  params: dict,
  config: ModelConfig,
  tokens_BT,
  positions_BT,
  visible,
  sliding_visible,
  segment_BT=None,
) -> _Stream:
  embedded_BTD = params["embed"][tokens_BT].astype(config.dtype)
  if config.scaled_embedding:  # the factor is rounded as well: models were trained with it
    embedded_BTD *= jnp.asarray(math.sqrt(config.width), config.dtype)
  x_BTD = sharding.constrain(sharding.constrain_embeddings(embedded_BTD), "BTD")
  rotation = sliding_rotation = _rotation(config.rope, config.head_dim, positions_BT)
  if config.sliding_rope is not None:
    sliding_rotation = _rotation(config.sliding_rope, config.head_dim, positions_BT)
  return _Stream(x_BTD, rotation, sliding_rotation, visible, sliding_visible, segment_BT)


def _pick(stream: _Stream, config: ModelConfig, slides: jax.Array) -> tuple:
  """Returns (rotation, visible) of one layer; `slides` is its entry of `_slides`.

  They are selected by value: layers of both kinds run through one scanned body.
  """
  full = (stream.rotation, stream.visible)
  if not config.sliding:
    return full
  sliding = (stream.sliding_rotation, stream.sliding_visible)
  return jax.tree.map(lambda s, f: jnp.where(slides, s, f), sliding, full)


def _slides(config: ModelConfig) -> jax.Array:
  """Returns which layers slide, bool [L]."""
  return jnp.array(config.sliding or (False,) * config.layers)


def _row_stream(
  params: dict, config: ModelConfig, tokens_BT, positions_BT, segment_ids_BT, prefix_ids_BT=None
) -> _Stream:
  """Returns the stream of whole rows, as training and scoring see them."""
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
  if prefix_ids_BT is None and attention.splash_fits(T):  # splash knows no prefixes
    segment_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    return _stream(params, config, tokens_BT, positions_BT, None, None, segment_BT)

  def visibility(window):
    return attention.visibility(
      attention.packed_mask(
        segment_ids_BT, (B, T), window, prefix_BT=prefix_ids_BT, position_BT=positions_BT
      )
    )

  visible = visibility(None)
  sliding_visible = visibility(config.sliding_window if config.sliding else None)
  return _stream(params, config, tokens_BT, positions_BT, visible, sliding_visible)


def _gather(config: ModelConfig, layer: dict) -> dict:
  """Returns one layer's weights for use, whole along "fsdp".

  They are cast first, so that what moves between chips is the smaller dtype.
  """

  def gather(path, w, axes):
    return sharding.gather_weight(_for_use(path[-1].key, w, config), axes[1:])

  return jax.tree_util.tree_map_with_path(gather, resolve(layer), axes(config)["layers"])


def _layer(config: ModelConfig, stream: _Stream, x_BTD, layer: dict, slides) -> jax.Array:
  """Applies one layer, its weights gathered, to whole rows."""
  rotation, visible = _pick(stream, config, slides)

  def splash(q, k, v):
    return attention.splash(q, k, v, stream.segment_BT)

  def sliding_splash(q, k, v):
    return attention.splash(q, k, v, stream.segment_BT, config.sliding_window)

  def attend(q, k, v):
    if visible is not None:
      return attention.attend_packed(q, k, v, visible), None
    if not config.sliding:
      return splash(q, k, v), None
    return jax.lax.cond(slides, sliding_splash, splash, q, k, v), None

  return Block(config).apply({"params": layer}, x_BTD, rotation, attend)[0]


_policies = jax.checkpoint_policies
# What a layer keeps for the backward pass; the rest is computed again.
REMAT = {
  # everything, gathered weights included
  "none": None,
  # Products and attention, but not cuDNN's. Norms, rotations and activations cost little, and
  # on a CPU less than writing and reading their results.
  "dots": _policies.save_from_both_policies(
    _policies.dots_saveable, _policies.save_only_these_names(attention.KEPT)
  ),
  # its input alone
  "block": _policies.nothing_saveable,
}


def _scan(body, carry, xs, remat: str):
  """lax.scan over layers; REMAT[remat] says which activations the backward pass keeps."""
  if remat not in REMAT:
    raise ValueError(f"model.remat={remat!r}: choose from {list(REMAT)}")
  if remat != "none":
    body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[remat])
  return jax.lax.scan(body, carry, xs)[0]


def _final_norm(params: dict, config: ModelConfig, x_BTD) -> jax.Array:
  return _norm(x_BTD, params["norm"], config)


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
  """Returns hidden_BTD of the tokens after the final norm, in `config.dtype`.

  `prefix_ids_BT` (see `records.Rows`) needs positions and segments. `remat`: see REMAT.
  """
  stream = _row_stream(params, config, tokens_BT, positions_BT, segment_ids_BT, prefix_ids_BT)

  def body(x_BTD, xs):
    layer, slides = xs
    return _layer(config, stream, x_BTD, _gather(config, layer), slides), None

  x_BTD = _scan(body, stream.x_BTD, (params["layers"], _slides(config)), remat)
  return _final_norm(params, config, x_BTD)


def hidden_pair(
  params: dict,
  teacher_params: dict | None,
  config: ModelConfig,
  policy_rows: tuple,
  teacher_rows: tuple,
  *,
  remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
  """Returns (policy_hidden_BTD, teacher_hidden_BTD) of two batches of rows, from one scan.

  Each layer's weights are read once, and only the policy is differentiated. `policy_rows` and
  `teacher_rows` are (tokens_BT, positions_BT or None, segment_ids_BT or None[, prefix_ids_BT or
  None]); their B and T may differ. `teacher_params` None: the live weights teach, under
  stop_gradient.
  """
  live = teacher_params is None
  teacher_params = jax.lax.stop_gradient(params if live else teacher_params)
  policy = _row_stream(params, config, *policy_rows)
  teacher = _row_stream(teacher_params, config, *teacher_rows)

  def body(carry, xs):
    policy_BTD, teacher_BTD = carry
    layer, teacher_layer, slides = xs
    layer = _gather(config, layer)  # serves a live teacher too
    teacher_layer = jax.lax.stop_gradient(layer if live else _gather(config, teacher_layer))
    policy_BTD = _layer(config, policy, policy_BTD, layer, slides)
    teacher_BTD = _layer(config, teacher, teacher_BTD, teacher_layer, slides)
    return (policy_BTD, jax.lax.stop_gradient(teacher_BTD)), None

  xs = (params["layers"], None if live else teacher_params["layers"], _slides(config))
  policy_BTD, teacher_BTD = _scan(body, (policy.x_BTD, teacher.x_BTD), xs, remat)
  policy_hidden_BTD = _final_norm(params, config, policy_BTD)
  teacher_hidden_BTD = _final_norm(teacher_params, config, teacher_BTD)
  return policy_hidden_BTD, jax.lax.stop_gradient(teacher_hidden_BTD)


def head(params: dict, config: ModelConfig) -> jax.Array:
  """Returns the output matrix [D, V], in `config.param_dtype`; see `unstacked` too."""
  return params["head"] if "head" in params else params["embed"].T


def logits(
  params: dict, config: ModelConfig, tokens_BT, *, positions_BT=None, segment_ids_BT=None
) -> jax.Array:
  """Returns logits_BTV of the tokens, float32."""
  hidden_BTD = hidden(
    params, config, tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT
  )
  return project(hidden_BTD, head(params, config))


def project(hidden_XD, head_DV) -> jax.Array:
  """Returns logits_XV: hidden states times output matrix, summed in float32."""
  return jnp.matmul(hidden_XD, head_DV.astype(hidden_XD.dtype), preferred_element_type=jnp.float32)


class Pool(NamedTuple):
  """Holds keys and values in pages (see kernels.paged_attention), with axes as `pool_axes` says."""

  k: list | jax.Array
  v: list | jax.Array


def page_axes(*, shared: bool) -> tuple[str, str]:
  """Returns the order in which the compiler wants keys and values in memory while it decodes.

  A CPU computes scores 2.5 times as fast over keys that are columns. In any other order than these
  a TPU copies all of the pool at the beginning and the end of each call; they differ for the pool
  that is only read.
  """
  is_by_token = target_platform() == "tpu" and not shared
  return ("WCKH", "WCKH") if is_by_token else ("WKHC", "WKCH")


def pool_axes(config: ModelConfig, *, shared: bool, stacked: bool) -> Pool:
  """Returns the tree of a Pool with a string of axis letters at each leaf.

  Where `params["layers"]` is a list (see `unstacked`), it has a list of one array a layer.
  """
  if stacked:
    return Pool(*("ZL" + axes for axes in page_axes(shared=shared)))
  return Pool(*(["Z" + axes] * config.layers for axes in page_axes(shared=shared)))


def init_pool(
  config: ModelConfig, *, shared: bool, shards: int, pages: int, columns: int, stacked: bool
) -> Pool:
  """Returns a pool of empty pages, for prompts (shared) or for what rows add to them."""
  sizes = dict(Z=shards, W=pages, C=columns, L=config.layers, K=config.kv_heads, H=config.head_dim)

  def empty(axes: str):
    return sharding.constrain(jnp.zeros([sizes[a] for a in axes], config.dtype), axes)

  return jax.tree.map(empty, pool_axes(config, shared=shared, stacked=stacked))


def columns_of(shared: Pool) -> int:
  """Returns the tokens of a page, from a shared pool."""
  return jax.tree.leaves(shared.k)[0].shape[page_axes(shared=True)[0].index("C") - 4]


def _reorder(x: jax.Array, axes: str, wanted: str) -> jax.Array:
  return x.transpose([axes.index(axis) for axis in wanted])


def _read(pool: Pool, i, *, shared: bool) -> tuple[jax.Array, jax.Array]:
  """Returns a layer's (k_ZWKHC, v_ZWKCH)."""
  pair = []
  orders = page_axes(shared=shared)
  for pages, axes, wanted in zip(pool, orders, ("ZWKHC", "ZWKCH"), strict=True):
    if isinstance(pages, list):
      layer = pages[i]
    else:
      layer = jax.lax.dynamic_index_in_dim(pages, i, 1, keepdims=False)
    pair.append(_reorder(layer, "Z" + axes, wanted))
  return tuple(pair)


def _updated(pool: Pool, i, put) -> Pool:
  """Returns a pool in which put(a layer's pages, index of the layer or None, which) is new."""
  if not isinstance(pool.k, list):
    return Pool(*(put(pages, i, n) for n, pages in enumerate(pool)))
  keys, values = (put(pages[i], None, n) for n, pages in enumerate(pool))
  return Pool([*pool.k[:i], keys, *pool.k[i + 1 :]], [*pool.v[:i], values, *pool.v[i + 1 :]])


def _write_tokens(pool: Pool, i, page_ZB, column_ZB, new_ZBKH: tuple) -> Pool:
  """Puts the key and value of one token of each row into a layer's own pages."""

  def put(pages, layer, n):
    order = page_axes(shared=False)[n]

    def put_in_shard(pages, page_B, column_B, new_BKH):
      index = {"W": page_B, "C": column_B}
      where = [index.get(axis, slice(None)) for axis in order]
      return pages.at[(*_if_there(layer), *where)].set(new_BKH, mode="drop")

    return jax.vmap(put_in_shard)(pages, page_ZB, column_ZB, new_ZBKH[n])

  return _updated(pool, i, put)


def _write_pages(pool: Pool, i, page_ZY, new: tuple, *, shared: bool) -> Pool:
  """Puts whole pages of keys and values, [Z, Y, C, K, H], into a layer of a pool."""

  def put(pages, layer, n):
    def put_in_shard(pages, page_Y, new):
      return pages.at[(*_if_there(layer), page_Y)].set(new, mode="drop")

    order = "ZY" + page_axes(shared=shared)[n][1:]
    return jax.vmap(put_in_shard)(pages, page_ZY, _reorder(new[n], "ZYCKH", order))

  return _updated(pool, i, put)


def _if_there(layer) -> tuple:
  return () if layer is None else (layer,)


def cast(params: dict, config: ModelConfig) -> dict:
  """Returns the weights in the types in which they are used, as every use would cast them."""

  def cast_one(path, w):
    return _for_use(path[-1].key, w, config)

  return jax.tree_util.tree_map_with_path(cast_one, params)


def unstacked(params: dict, config: ModelConfig) -> dict:
  """Returns the weights as a CPU samples with them fastest; compile time grows with the layers.

  Layers are a list, and the output matrix stands by itself, both ready for use. From stacked or
  tied ones XLA copies each matrix, for each token: a step of one row takes twice as long.
  """

  def layer(i: int) -> dict:
    return _gather(config, jax.tree.map(lambda w: w[i], params["layers"]))

  return {
    **params,
    "layers": [layer(i) for i in range(config.layers)],
    "head": _for_use("head", head(params, config), config),
  }


def _through_layers(params: dict, config: ModelConfig, carry, body):
  """Returns the carry after body(carry, layer, slides, index) of every layer."""
  layers = params["layers"]
  if isinstance(layers, list):
    for i, layer in enumerate(layers):
      carry = body(carry, layer, bool(config.sliding) and config.sliding[i], i)
    return carry

  def step(carry, xs):
    layer, slides, i = xs
    return body(carry, _gather(config, layer), slides if config.sliding else False, i), None

  # the whole pool is carried, so that XLA updates it in place instead of restacking it
  return jax.lax.scan(step, carry, (layers, _slides(config), jnp.arange(config.layers)))[0]


class Places(NamedTuple):
  """Says where the current token of each row goes, and what it sees."""

  position_ZB: jax.Array  # int32
  page_ZB: jax.Array  # int32, of the row's own pool; beyond its end: written nowhere
  column_ZB: jax.Array  # int32
  shared: paged_attention.Seen
  own: paged_attention.Seen


def extend_rows(
  params: dict, config: ModelConfig, token_ZB: jax.Array, places: Places, shared: Pool, own: Pool
) -> tuple[jax.Array, Pool]:
  """Reads one token of each row; returns (its hidden_ZBD after the final norm, the own pages)."""
  Z, B = token_ZB.shape
  positions_BT = places.position_ZB.reshape(-1, 1)
  stream = _stream(params, config, token_ZB.reshape(-1, 1), positions_BT, None, None)

  def by_row(x_BTNH):
    return x_BTNH.reshape(Z, B, *x_BTNH.shape[2:])

  def body(carry, layer, slides, i):
    x_BTD, own = carry

    def attend(q, k, v):
      written = _write_tokens(own, i, places.page_ZB, places.column_ZB, (by_row(k), by_row(v)))
      pools = [
        (*_read(shared, i, shared=True), places.shared),
        (*_read(written, i, shared=False), places.own),
      ]
      return paged_attention.attend(by_row(q), pools, slides).reshape(q.shape), written

    rotation, _ = _pick(stream, config, slides)
    return Block(config).apply({"params": layer}, x_BTD, rotation, attend)

  x_BTD, own = _through_layers(params, config, (stream.x_BTD, own), body)
  return _final_norm(params, config, x_BTD).reshape(Z, B, -1), own


class NewBlocks(NamedTuple):
  """Holds blocks of new tokens: a page's columns each. What follows a text's end is padding."""

  token_ZYC: Array  # int32
  begin_ZY: Array  # int32: the first new column; earlier ones are in the page already
  page_ZY: Array  # int32: where it is written; beyond the pool's end: nowhere
  base_ZY: Array  # int32: the position of its first column
  chains: tuple[paged_attention.Chain, ...]  # where its text lies, the block itself included


def read_blocks(
  params: dict, config: ModelConfig, new: NewBlocks, shared: Pool, own: Pool | None = None
) -> Pool:
  """Returns the own pool with blocks of tokens written into it; without one, the shared pool.

  new.chains has an entry for each pool, the shared one first.
  """
  Z, Y, C = new.token_ZYC.shape
  positions_BT = (new.base_ZY[..., None] + jnp.arange(C)).reshape(-1, C)
  is_new_ZYC11 = (jnp.arange(C) >= new.begin_ZY[..., None])[..., None, None]
  stream = _stream(params, config, new.token_ZYC.reshape(-1, C), positions_BT, None, None)
  into_shared = own is None

  def body(carry, layer, slides, i):
    x_BTD, pool = carry

    def merged(old_pages, axes, new_ZYCKH):
      """Keeps what a page has before its new tokens."""
      old = jax.vmap(lambda pages, page: pages[page])(old_pages, jnp.maximum(new.page_ZY, 0))
      return jnp.where(is_new_ZYC11, new_ZYCKH, _reorder(old, axes, "ZYCKH"))

    def attend(q, k, v):
      q_ZYCNH, k_ZYCKH, v_ZYCKH = (x.reshape(Z, Y, C, *x.shape[2:]) for x in (q, k, v))
      old_k, old_v = _read(pool, i, shared=into_shared)
      pages = merged(old_k, "ZYKHC", k_ZYCKH), merged(old_v, "ZYKCH", v_ZYCKH)
      written = _write_pages(pool, i, new.page_ZY, pages, shared=into_shared)
      pools = [_read(written, i, shared=into_shared)]
      if not into_shared:
        pools.insert(0, _read(shared, i, shared=True))
      chained = [(*pair, chain) for pair, chain in zip(pools, new.chains, strict=True)]
      window = jnp.where(slides, config.sliding_window, _FAR) if config.sliding else None
      out = paged_attention.attend_blocks(q_ZYCNH, new.base_ZY, chained, window)
      return out.reshape(q.shape), written

    rotation, _ = _pick(stream, config, slides)
    return Block(config).apply({"params": layer}, x_BTD, rotation, attend)

  pool = shared if into_shared else own
  return _through_layers(params, config, (stream.x_BTD, pool), body)[1]
