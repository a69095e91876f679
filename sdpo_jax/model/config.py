"""The shape of a decoder, and its translation from and to a Hugging Face `config.json`.

One `ModelConfig` describes Qwen2 / Qwen2.5, Qwen3, Llama 3, Olmo 3 and Gemma 3 (text). Families
differ by fields, never by code: what a family fixes is one `Family` record in `FAMILIES`. A new
family is a record there, and the names of its tensors in `hf_weights`. A `ModelConfig` is
frozen and hashable, so it can be a static argument of `jax.jit`. This file imports no jax
and no transformers.

Rotary settings exist in two spellings, and both are read:
  the hub's          `rope_theta`, `rope_scaling`
  transformers 5's   `rope_parameters`, which Olmo 3 and Gemma 3 nest by layer type
Where a file has both, they must agree. In the hub's spelling the `rope_scaling` of these two
concerns the full-attention layers only. Olmo 3's `rope_theta` concerns all layers; Gemma 3's
sliding layers have `rope_local_base_freq` instead.

Errors: ValueError names the field and its value, for every setting that would change the
output and is not implemented.
"""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
  """Describes a rotary position embedding.

  `kind` is "default", "linear" (positions divided by `factor`), "llama3" (Llama 3.1) or "yarn"
  (arXiv:2309.00071). `theta` is the base, `factor` the context extension, `original_positions`
  the context length before it, which linear does not read.
  llama3 reads `low_freq_factor` and `high_freq_factor`. yarn reads `beta_fast`, `beta_slow`
  and `truncate`, and multiplies cos and sin by `attention_factor`.
  """

  theta: float = 10000.0
  kind: str = "default"
  factor: float = 1.0
  original_positions: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Family:
  """Holds what the architecture of a family fixes, mostly without a word in config.json."""

  architecture: str  # transformers' class, written on export
  qkv_bias: bool = False
  qk_norm: str = "none"
  norm_placement: str = "pre"
  norm_plus_one: bool = False
  scaled_embedding: bool = False
  activation: str = "silu"
  activation_key: str = "hidden_act"  # config.json's name for it
  # the head size whose root divides attention's logits is a setting of config.json
  query_pre_attn_scalar: bool = False
  # Which layers slide. "never": none; "optional": with use_sliding_window those from
  # max_window_layers on; "always": all but each `full_every`-th. A file's layer_types may choose
  # others.
  windows: str = "never"
  full_every: int = 4
  # rope_parameters are nested by layer type: sliding layers have rotary settings of their own
  rope_by_layer_type: bool = False
  # transformers' defaults where the file is silent
  norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  sliding_rope_theta: float | None = None  # None: rope_theta
  head_dim: int | None = None  # None: width / heads
  max_positions: int = 32768
  tied: bool = False


# model_type -> Family.
FAMILIES = {
  "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, windows="optional"),
  "qwen3": Family("Qwen3ForCausalLM", qk_norm="head", windows="optional", head_dim=128),
  "llama": Family("LlamaForCausalLM", max_positions=2048),
  "olmo3": Family(
    "Olmo3ForCausalLM",
    qk_norm="all",
    norm_placement="post",
    windows="always",
    rope_by_layer_type=True,
    norm_eps=1e-5,
    rope_theta=500000.0,
    max_positions=2048,
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    qk_norm="head",
    norm_placement="both",
    norm_plus_one=True,
    scaled_embedding=True,
    activation="gelu_tanh",
    activation_key="hidden_activation",
    query_pre_attn_scalar=True,
    windows="always",
    full_every=6,
    rope_by_layer_type=True,
    rope_theta=1e6,
    sliding_rope_theta=1e4,
    head_dim=256,
    max_positions=131072,
    tied=True,
  ),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Describes one decoder by sizes and switches; the letters are the axes of `records`."""

  family: str  # key of FAMILIES: the model_type written on export
  vocab: int  # V
  width: int  # D
  layers: int  # L
  heads: int  # N
  kv_heads: int  # K, divides N
  head_dim: int  # H, even
  ff_width: int  # F
  norm_eps: float = 1e-6
  rope: Rope = Rope()
  sliding_rope: Rope | None = None  # of sliding layers; None: the same as `rope`
  sliding_window: int | None = None  # columns that a sliding layer sees, its own included
  sliding: tuple[bool, ...] = ()  # which layers slide; () = none
  qk_norm: str = "none"  # "head": each head by itself (Qwen3); "all": all together (Olmo 3)
  qkv_bias: bool = False  # Qwen2
  # "pre": x + f(norm(x)); "post": x + norm(f(x)) (Olmo 3); "both": x + norm(f(norm(x))) (Gemma 3)
  norm_placement: str = "pre"
  norm_plus_one: bool = False  # norms multiply by 1 + their weight (Gemma 3)
  scaled_embedding: bool = False  # embeddings are multiplied by the root of the width (Gemma 3)
  activation: str = "silu"  # of the gate; "gelu_tanh" (Gemma 3)
  # Queries are multiplied by it after their rotation, before attention divides by the root of the
  # head size.
  query_scale: float = 1.0
  tied: bool = False  # the output matrix is the transposed embedding
  # activations and matrix products; norms, softmax and logits are always float32
  dtype: str = "float32"
  param_dtype: str = "float32"  # how weights are stored
  max_positions: int = 32768  # what the checkpoint was made for; not enforced here
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None

  def __post_init__(self):
    choices = {
      "family": tuple(FAMILIES),
      "qk_norm": ("none", "head", "all"),
      "norm_placement": ("pre", "post", "both"),
      "activation": ("silu", "gelu_tanh"),
      "dtype": ("float32", "bfloat16", "float16"),
      "param_dtype": ("float32", "bfloat16", "float16"),
    }
    for field, allowed in choices.items():
      if getattr(self, field) not in allowed:
        raise ValueError(f"model.{field}={getattr(self, field)!r}: choose from {list(allowed)}")
    if self.heads % self.kv_heads:
      raise ValueError(f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}")
    if self.head_dim % 2:
      raise ValueError(f"model.head_dim={self.head_dim} is odd; rotary embedding needs pairs")
    if self.sliding and len(self.sliding) != self.layers:
      raise ValueError(
        f"model.sliding names {len(self.sliding)} layers, model.layers={self.layers}"
      )
    if any(self.sliding) and not self.sliding_window:
      raise ValueError(f"model.sliding_window={self.sliding_window!r} while some layers slide")


# Named shapes, for planning without a checkpoint; a run reads the checkpoint's own config.json.
_QWEN3 = dict(
  family="qwen3",
  vocab=151936,
  head_dim=128,
  kv_heads=8,
  rope=Rope(1e6),
  qk_norm="head",
  max_positions=40960,
)
PRESETS = {
  "qwen3-0.6b": ModelConfig(**_QWEN3, width=1024, layers=28, heads=16, ff_width=3072, tied=True),
  "qwen3-1.7b": ModelConfig(**_QWEN3, width=2048, layers=28, heads=16, ff_width=6144, tied=True),
  "qwen3-4b": ModelConfig(**_QWEN3, width=2560, layers=36, heads=32, ff_width=9728, tied=True),
  "qwen3-8b": ModelConfig(**_QWEN3, width=4096, layers=36, heads=32, ff_width=12288),
  "olmo3-7b-instruct": ModelConfig(
    family="olmo3",
    vocab=100278,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    ff_width=11008,
    qk_norm="all",
    norm_placement="post",
    rope=Rope(5e5, "yarn", 8.0, 8192, attention_factor=0.1 * math.log(8.0) + 1.0),
    sliding_rope=Rope(5e5),
    sliding_window=4096,
    sliding=tuple(i % 4 != 3 for i in range(32)),
    max_positions=65536,
  ),
  "smollm2-135m": ModelConfig(
    family="llama",
    vocab=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    ff_width=1536,
    norm_eps=1e-5,
    rope=Rope(1e5),
    tied=True,
    max_positions=8192,
  ),
  "gemma3-270m": ModelConfig(
    family="gemma3_text",
    vocab=262144,
    width=640,
    layers=18,
    heads=4,
    kv_heads=1,
    head_dim=256,
    ff_width=2048,
    qk_norm="head",
    norm_placement="both",
    norm_plus_one=True,
    scaled_embedding=True,
    activation="gelu_tanh",
    rope=Rope(1e6),
    sliding_rope=Rope(1e4),
    sliding_window=512,
    sliding=tuple(i % 6 != 5 for i in range(18)),
    tied=True,
  ),
}

# Names of the activations in config.json; the first is written.
_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}

# Fields that would change the output, with the only values that mean "absent".
_ABSENT = {
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "partial_rotary_factor": (1, None),
  "num_experts": (0, None),
  "num_local_experts": (0, None),
  "n_routed_experts": (0, None),
  "quantization_config": (None,),
  "clip_qkv": (None,),
  "logit_scale": (1, None),
  "attn_logit_softcapping": (None,),
  "final_logit_softcapping": (None,),
  "use_bidirectional_attention": (False, None),
}

# Settings that each rope_type reads.
_ROPE_KEYS = {
  "default": {"rope_theta"},
  "linear": {"rope_theta", "factor"},
  "llama3": {
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  },
  "yarn": {
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
  },
}

# Sizes without a default.
_REQUIRED = (
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "intermediate_size",
)


def from_hf(
  hf: dict[str, Any], *, dtype: str = "float32", param_dtype: str = "float32"
) -> ModelConfig:
  """Translates the content of a config.json; `dtype`, `param_dtype`: see ModelConfig."""
  name = hf.get("model_type")
  if name not in FAMILIES:
    raise ValueError(f"model_type={name!r} is not supported; choose from {list(FAMILIES)}")
  family = FAMILIES[name]
  _check_supported(hf, name)

  rope, sliding_rope = _ropes_from_hf(hf, name)
  heads = hf["num_attention_heads"]
  head_dim = hf.get("head_dim") or family.head_dim or hf["hidden_size"] // heads
  sliding = _sliding_from_hf(hf, name)
  windows = {}
  if any(sliding):
    window = hf.get("sliding_window", 4096)
    windows = dict(sliding=sliding, sliding_window=window, sliding_rope=sliding_rope)
  return ModelConfig(
    family=name,
    vocab=hf["vocab_size"],
    width=hf["hidden_size"],
    layers=hf["num_hidden_layers"],
    heads=heads,
    kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=head_dim,
    ff_width=hf["intermediate_size"],
    norm_eps=hf.get("rms_norm_eps", family.norm_eps),
    rope=rope,
    qk_norm=family.qk_norm,
    qkv_bias=family.qkv_bias,
    norm_placement=family.norm_placement,
    norm_plus_one=family.norm_plus_one,
    scaled_embedding=family.scaled_embedding,
    activation=family.activation,
    query_scale=_query_scale(hf, family, head_dim),
    tied=bool(hf.get("tie_word_embeddings", family.tied)),
    dtype=dtype,
    param_dtype=param_dtype,
    max_positions=hf.get("max_position_embeddings", family.max_positions),
    bos_id=hf.get("bos_token_id"),
    pad_id=hf.get("pad_token_id"),
    eos_ids=_eos_ids(hf),
    **windows,
  )


def _check_supported(hf: dict, name: str) -> None:
  """Raises ValueError for a setting that is not implemented, or a size that is missing."""
  family = FAMILIES[name]
  only = _ABSENT | {family.activation_key: _ACTIVATIONS[family.activation]}
  for field, absent in only.items():
    if hf.get(field, absent[0]) not in absent:
      raise ValueError(
        f"{field}={hf[field]!r} is not supported for model_type={name!r} (only {absent[0]!r})"
      )
  for field in _REQUIRED:
    if hf.get(field) is None:
      raise ValueError(f"config.json lacks {field}")


def _query_scale(hf: dict, family: Family, head_dim: int) -> float:
  """Returns the factor of queries, given that attention divides by the head size's root."""
  if not family.query_pre_attn_scalar:
    return 1.0
  return math.sqrt(head_dim / hf.get("query_pre_attn_scalar", 256))


def _eos_ids(hf: dict) -> tuple[int, ...]:
  """Returns the end-of-turn tokens; files name none, one or a list."""
  eos = hf.get("eos_token_id")
  if eos is None:
    return ()
  return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)


def _sliding_from_hf(hf: dict, name: str) -> tuple[bool, ...]:
  """Tells which layers slide; () when none does."""
  windows = FAMILIES[name].windows
  layers = hf["num_hidden_layers"]
  types = hf.get("layer_types")
  if windows == "optional" and not hf.get("use_sliding_window", False):
    if any(t != "full_attention" for t in types or ()):
      raise ValueError("layer_types asks for windows while use_sliding_window is false")
    return ()
  if windows == "never":
    if any(t != "full_attention" for t in types or ()):
      raise ValueError(f"layer_types={types} asks for windows, but model_type={name!r} has none")
    if hf.get("sliding_window") is not None:
      window = hf["sliding_window"]
      raise ValueError(f"sliding_window={window} is set, but model_type={name!r} has no windows")
    return ()
  if types is None and windows == "always":
    every = hf.get("sliding_window_pattern") or FAMILIES[name].full_every
    types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
  elif types is None:
    first = hf.get("max_window_layers", 28)
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
  unknown = set(types) - {"full_attention", "sliding_attention"}
  if unknown or len(types) != layers:
    raise ValueError(
      f"layer_types={types} is not supported: {layers} entries of full_attention or "
      "sliding_attention"
    )
  sliding = tuple(t == "sliding_attention" for t in types)
  return sliding if any(sliding) else ()


def _ropes_from_hf(hf: dict, name: str) -> tuple[Rope, Rope | None]:
  """Returns the rotary settings of the full layers, and of the sliding ones if they may differ.

  ValueError where the spellings that the file uses disagree.
  """
  theta = hf.get("rope_theta")
  new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
  nested = isinstance(new, dict) and ("full_attention" in new or "sliding_attention" in new)
  by_layer_type = FAMILIES[name].rope_by_layer_type
  if nested and not by_layer_type:
    raise ValueError(f"rope_parameters by layer type are not supported for model_type={name!r}")
  if by_layer_type and new and not nested:
    raise ValueError(
      f"rope_parameters of {name} must be given by layer type: full_attention, sliding_attention"
    )
  spellings = _nested_spellings(hf, name) if by_layer_type else _flat_spellings(hf, name)
  if any(spelling != spellings[0] for spelling in spellings):
    raise ValueError(f"rope_scaling={old} and rope_parameters={new} disagree")
  if theta is not None and spellings[0][0].theta != theta:
    raise ValueError(f"rope_theta={theta} and rope_parameters={new} disagree")
  full, sliding = spellings[0]
  local = hf.get("rope_local_base_freq")
  if local is not None and sliding is not None and sliding.theta != local:
    raise ValueError(f"rope_local_base_freq={local} and rope_parameters={new} disagree")
  return full, sliding


def _flat_spellings(hf: dict, name: str) -> list[tuple[Rope, None]]:
  """Reads the one group of rotary settings in each spelling that the file uses."""
  used = [where for where in ("rope_parameters", "rope_scaling") if hf.get(where)]
  if not used:
    return [(_rope_from_hf(hf, name, None, "rope_theta"), None)]
  return [(_rope_from_hf(hf, name, hf[where], where), None) for where in used]


def _nested_spellings(hf: dict, name: str) -> list[tuple[Rope, Rope]]:
  """Reads (full, sliding) rotary settings in each spelling that the file uses."""
  by_type = hf.get("rope_parameters") or {}
  scaling = hf.get("rope_scaling")
  full_groups = []
  if by_type or scaling is None:
    full_groups.append((by_type.get("full_attention"), "rope_parameters.full_attention"))
  if scaling is not None:
    full_groups.append((dict(by_type.get("full_attention") or {}) | dict(scaling), "rope_scaling"))
  spellings = []
  for settings, where in full_groups:
    full = _rope_from_hf(hf, name, settings, where)
    sliding_where = "rope_parameters.sliding_attention"
    sliding_settings = by_type.get("sliding_attention") or {}
    sliding_theta = hf.get("rope_local_base_freq", FAMILIES[name].sliding_rope_theta)
    if sliding_theta is not None:
      sliding_settings = {"rope_theta": sliding_theta} | sliding_settings
    sliding = _rope_from_hf(hf, name, sliding_settings, sliding_where)
    spellings.append((full, sliding))
  # transformers reads truncate from the wrong level and so ignores it: nobody knows what is meant
  if not all(full.truncate for full, _ in spellings):
    raise ValueError(f"rope truncate=False is not supported for model_type={name!r}")
  return spellings


def _rope_from_hf(hf: dict, name: str, settings: dict | None, where: str) -> Rope:
  """Translates one group of rotary settings; `where` names the group in errors."""
  settings = dict(settings or {})
  kind = settings.get("rope_type", settings.get("type", "default"))
  if kind not in _ROPE_KEYS:
    raise ValueError(f"{where}.rope_type={kind!r} is not supported; choose from {list(_ROPE_KEYS)}")
  given = {k: v for k, v in settings.items() if k not in ("rope_type", "type") and v is not None}
  partial = given.pop("partial_rotary_factor", 1)
  if partial != 1:
    raise ValueError(f"{where}.partial_rotary_factor={partial!r} is not supported (only 1)")
  unknown = sorted(set(given) - _ROPE_KEYS[kind])
  if unknown and kind != "default":  # without scaling, leftovers such as a factor mean nothing
    raise ValueError(
      f"{where}.{unknown[0]}={given[unknown[0]]!r} is not supported for rope_type={kind!r}"
    )
  theta = given.get("rope_theta", hf.get("rope_theta"))
  theta = float(FAMILIES[name].rope_theta if theta is None else theta)
  if kind == "default":
    return Rope(theta)

  if "factor" not in given:
    raise ValueError(f"{where} lacks factor, which rope_type={kind!r} needs")
  if kind == "linear":
    return Rope(theta, kind, float(given["factor"]))

  outer_original = hf.get("original_max_position_embeddings")
  if outer_original is not None:  # transformers lets it win, and only sometimes
    raise ValueError(
      f"original_max_position_embeddings={outer_original} outside {where} is not supported"
    )
  positions = hf.get("max_position_embeddings", FAMILIES[name].max_positions)
  original = int(given.get("original_max_position_embeddings", positions))
  for key in ("low_freq_factor", "high_freq_factor"):
    if kind == "llama3" and key not in given:
      raise ValueError(f"{where} lacks {key}, which rope_type={kind!r} needs")

  factor = float(given["factor"])
  if kind == "llama3":
    low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    return Rope(theta, kind, factor, original, low, high)
  return Rope(
    theta,
    kind,
    factor,
    original,
    beta_fast=float(given.get("beta_fast") or 32),
    beta_slow=float(given.get("beta_slow") or 1),
    truncate=bool(given.get("truncate", True)),
    attention_factor=_yarn_attention_factor(given, factor),
  )


def _yarn_attention_factor(given: dict, factor: float) -> float:
  """Returns the factor of cos and sin; where it is not given, from mscale and mscale_all_dim."""

  def mscale(scale):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

  if given.get("attention_factor") is not None:
    return float(given["attention_factor"])
  if given.get("mscale") and given.get("mscale_all_dim"):
    return float(mscale(given["mscale"]) / mscale(given["mscale_all_dim"]))
  return mscale(1)


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """Returns the content of a config.json, with both rotary spellings for old and new readers."""
  family = FAMILIES[config.family]
  rope = _rope_to_hf(config.rope)
  eos_ids = list(config.eos_ids)
  hf = {
    "architectures": [family.architecture],
    "model_type": config.family,
    "vocab_size": config.vocab,
    "hidden_size": config.width,
    "intermediate_size": config.ff_width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    family.activation_key: _ACTIVATIONS[config.activation][0],
    "rms_norm_eps": config.norm_eps,
    "max_position_embeddings": config.max_positions,
    "tie_word_embeddings": config.tied,
    "rope_theta": config.rope.theta,
    "rope_scaling": None,
    "rope_parameters": rope,
    "attention_dropout": 0.0,
    "bos_token_id": config.bos_id,
    "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
    "pad_token_id": config.pad_id,
    "dtype": config.param_dtype,
    "torch_dtype": config.param_dtype,
  }
  if config.rope.kind != "default":
    hf["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
  if family.rope_by_layer_type:
    hf["rope_parameters"] = {
      "full_attention": rope,
      "sliding_attention": _rope_to_hf(config.sliding_rope or config.rope),
    }
  if family.sliding_rope_theta is not None:
    hf["rope_local_base_freq"] = (config.sliding_rope or config.rope).theta
  if family.query_pre_attn_scalar:
    # an integer in transformers; the root's rounding must not make it 255.99...
    hf["query_pre_attn_scalar"] = round(config.head_dim / config.query_scale**2)
  if family.windows != "never":
    sliding = config.sliding or (False,) * config.layers
    hf["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]
    hf["sliding_window"] = config.sliding_window
  if family.windows == "optional":
    hf["use_sliding_window"] = any(config.sliding)
    hf["max_window_layers"] = config.layers
  return hf


def _rope_to_hf(rope: Rope) -> dict[str, Any]:
  """Returns the settings of one rotary embedding in transformers 5's spelling."""
  hf = {"rope_type": rope.kind, "rope_theta": rope.theta}
  if rope.kind != "default":
    hf["factor"] = rope.factor
  if rope.kind in ("llama3", "yarn"):
    hf["original_max_position_embeddings"] = rope.original_positions
  if rope.kind == "llama3":
    hf |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
  if rope.kind == "yarn":
    hf |= {
      "beta_fast": rope.beta_fast,
      "beta_slow": rope.beta_slow,
      "attention_factor": rope.attention_factor,
    }
    if not rope.truncate:
      hf["truncate"] = False
  return hf
