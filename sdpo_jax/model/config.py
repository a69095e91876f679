"""The shape of a decoder, and its translation from and to a Hugging Face `config.json`.

One `ModelConfig` describes Qwen2 / Qwen2.5, Qwen3, Llama 3 and Olmo 3. Families differ by
fields, never by code: what a family fixes is one `Family` record in `FAMILIES`. A new
family is a record there, and the names of its tensors in `hf_weights`. A `ModelConfig` is
frozen and hashable, so it can be a static argument of `jax.jit`. This file imports no jax
and no transformers.

Rotary settings exist in two spellings, and both are read:
  the hub's          `rope_theta`, `rope_scaling`
  transformers 5's   `rope_parameters`, which Olmo 3 nests by layer type
Where a file has both, they must agree. In the hub's spelling Olmo 3's `rope_scaling`
concerns the full-attention layers only, and its `rope_theta` concerns all layers.

Errors: ValueError names the field and its value, for every setting that would change the
output and is not implemented.
"""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
  """Describes a rotary position embedding.

  `kind` is "default", "llama3" (Llama 3.1) or "yarn" (arXiv:2309.00071). `theta` is the base,
  `factor` the context extension, `original_positions` the context length before it.
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
  # Which layers slide. "never": none; "optional": with use_sliding_window those from
  # max_window_layers on; "always": three of four. A file's layer_types may choose others.
  windows: str = "never"
  # rope_parameters are nested by layer type: sliding layers have rotary settings of their own
  rope_by_layer_type: bool = False
  # transformers' defaults where the file is silent
  norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  head_dim: int | None = None  # None: width / heads
  max_positions: int = 32768


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
  norm_placement: str = "pre"  # "pre": x + f(norm(x));  "post": x + norm(f(x)) (Olmo 3)
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
      "norm_placement": ("pre", "post"),
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
}

# Fields that would change the output, with the only values that mean "absent".
_ABSENT = {
  "hidden_act": ("silu", "swish"),
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
}

# Settings that each rope_type reads.
_ROPE_KEYS = {
  "default": {"rope_theta"},
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
    head_dim=hf.get("head_dim") or family.head_dim or hf["hidden_size"] // heads,
    ff_width=hf["intermediate_size"],
    norm_eps=hf.get("rms_norm_eps", family.norm_eps),
    rope=rope,
    qk_norm=family.qk_norm,
    qkv_bias=family.qkv_bias,
    norm_placement=family.norm_placement,
    tied=bool(hf.get("tie_word_embeddings", False)),
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
  for field, absent in _ABSENT.items():
    if hf.get(field, absent[0]) not in absent:
      raise ValueError(
        f"{field}={hf[field]!r} is not supported for model_type={name!r} (only {absent[0]!r})"
      )
  for field in _REQUIRED:
    if hf.get(field) is None:
      raise ValueError(f"config.json lacks {field}")


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
    types = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(layers)]
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
  return spellings[0]


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
    sliding = _rope_from_hf(hf, name, by_type.get("sliding_attention"), sliding_where)
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

  outer_original = hf.get("original_max_position_embeddings")
  if outer_original is not None:  # transformers lets it win, and only sometimes
    raise ValueError(
      f"original_max_position_embeddings={outer_original} outside {where} is not supported"
    )
  positions = hf.get("max_position_embeddings", FAMILIES[name].max_positions)
  original = int(given.get("original_max_position_embeddings", positions))
  required = ["factor"]
  if kind == "llama3":
    required += ["low_freq_factor", "high_freq_factor"]
  for key in required:
    if key not in given:
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
    "hidden_act": "silu",
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
    hf |= {"factor": rope.factor, "original_max_position_embeddings": rope.original_positions}
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
