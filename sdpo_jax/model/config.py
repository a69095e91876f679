"""The shape of a decoder, and its translation from and to a Hugging Face `config.json`.

One `ModelConfig` describes Qwen2 / Qwen2.5, Qwen3, Llama 3 and Olmo 3: the families differ by fields, never by code.
It is frozen and hashable, so it can be a static argument of `jax.jit`. Imports no jax and no transformers.

Two spellings of rotary settings exist and both are read: the hub's (`rope_theta`, `rope_scaling`) and transformers 5's
(`rope_parameters`, which Olmo 3 nests by layer type). Where a file has both, they must agree.
In the hub's spelling Olmo 3's `rope_scaling` concerns the full-attention layers only and `rope_theta` concerns all layers.

Errors: ValueError naming the field and its value, for every setting that would change the output and is not implemented.
"""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding. `kind`: "default", "llama3" (Llama 3.1) or "yarn" (arXiv:2309.00071).

  `theta` is the base; `factor` the context extension; `original_positions` the context length before it.
  llama3 reads `low_freq_factor`, `high_freq_factor`; yarn reads `beta_fast`, `beta_slow`, `truncate`, and multiplies
  cos and sin by `attention_factor`.
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
class ModelConfig:
  """Sizes and switches of one decoder. The letters are the axis alphabet of `records`."""

  # "qwen2" | "qwen3" | "llama" | "olmo3": the model_type written on export
  family: str
  vocab: int  # V
  width: int  # D
  layers: int  # L
  heads: int  # N
  kv_heads: int  # K, divides N
  head_dim: int  # H, even
  ff_width: int  # F
  norm_eps: float = 1e-6
  rope: Rope = Rope()
  # rotary settings of sliding layers, None: the same as `rope`
  sliding_rope: Rope | None = None
  # a sliding layer sees this many columns, its own included
  sliding_window: int | None = None
  sliding: tuple[bool, ...] = ()  # which layers slide; () = none
  # "head": each head by itself (Qwen3); "all": all heads together (Olmo 3)
  qk_norm: str = "none"
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


# What the four architectures fix without writing it in config.json.
FAMILIES = {
  "qwen2": dict(qkv_bias=True),
  "qwen3": dict(qk_norm="head"),
  "llama": dict(),
  "olmo3": dict(qk_norm="all", norm_placement="post"),
}
ARCHITECTURES = {
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "llama": "LlamaForCausalLM",
  "olmo3": "Olmo3ForCausalLM",
}
# transformers' default where the file is silent, else 1e-6
_EPS = {"olmo3": 1e-5}
_THETA = {"olmo3": 500000.0}  # likewise, else 10000
_HEAD_DIM = {"qwen3": 128}  # likewise, else width / heads
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


def from_hf(
  hf: dict[str, Any], *, dtype: str = "float32", param_dtype: str = "float32"
) -> ModelConfig:
  """The content of a config.json -> ModelConfig."""
  family = hf.get("model_type")
  if family not in FAMILIES:
    raise ValueError(f"model_type={family!r} is not supported; choose from {list(FAMILIES)}")
  for field, absent in _ABSENT.items():
    if hf.get(field, absent[0]) not in absent:
      raise ValueError(
        f"{field}={hf[field]!r} is not supported for model_type={family!r} (only {absent[0]!r})"
      )
  missing = [
    k
    for k in (
      "vocab_size",
      "hidden_size",
      "num_hidden_layers",
      "num_attention_heads",
      "intermediate_size",
    )
    if hf.get(k) is None
  ]
  if missing:
    raise ValueError(f"config.json lacks {missing[0]}")

  layers, heads, width = hf["num_hidden_layers"], hf["num_attention_heads"], hf["hidden_size"]
  rope, sliding_rope = _ropes_from_hf(hf, family)
  sliding = _sliding_from_hf(hf, family, layers)
  eos = hf.get("eos_token_id")
  return ModelConfig(
    family=family,
    vocab=hf["vocab_size"],
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=hf.get("head_dim") or _HEAD_DIM.get(family) or width // heads,
    ff_width=hf["intermediate_size"],
    norm_eps=hf.get("rms_norm_eps", _EPS.get(family, 1e-6)),
    rope=rope,
    sliding_rope=sliding_rope if any(sliding) else None,
    sliding_window=hf.get("sliding_window", 4096) if any(sliding) else None,
    sliding=sliding,
    tied=bool(hf.get("tie_word_embeddings", False)),
    dtype=dtype,
    param_dtype=param_dtype,
    max_positions=hf.get(
      "max_position_embeddings", 2048 if family in ("llama", "olmo3") else 32768
    ),
    bos_id=hf.get("bos_token_id"),
    pad_id=hf.get("pad_token_id"),
    eos_ids=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
    **FAMILIES[family],
  )


def _sliding_from_hf(hf: dict, family: str, layers: int) -> tuple[bool, ...]:
  """Which layers slide; () when none does."""
  if family == "llama" or (family != "olmo3" and not hf.get("use_sliding_window", False)):
    types = ["full_attention"] * layers
    if any(t != "full_attention" for t in hf.get("layer_types") or types):
      raise ValueError(
        f"layer_types={hf['layer_types']} asks for windows, but model_type={family!r} has none"
        if family == "llama"
        else "layer_types asks for windows while use_sliding_window is false"
      )
  elif hf.get("layer_types") is not None:
    types = hf["layer_types"]
  elif family == "olmo3":
    types = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(layers)]
  else:
    first = hf.get("max_window_layers", 28)
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
  unknown = set(types) - {"full_attention", "sliding_attention"}
  if unknown or len(types) != layers:
    raise ValueError(
      f"layer_types={types} is not supported: {layers} entries of full_attention or sliding_attention"
    )
  sliding = tuple(t == "sliding_attention" for t in types)
  return sliding if any(sliding) else ()


def _ropes_from_hf(hf: dict, family: str) -> tuple[Rope, Rope | None]:
  """Rotary settings of the full layers, and of the sliding layers where the family lets them differ."""
  positions = hf.get("max_position_embeddings", 2048 if family in ("llama", "olmo3") else 32768)
  theta = hf.get("rope_theta", None)
  new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
  nested = isinstance(new, dict) and ("full_attention" in new or "sliding_attention" in new)
  if nested and family != "olmo3":
    raise ValueError(f"rope_parameters by layer type are not supported for model_type={family!r}")
  if family == "olmo3" and new and not nested:
    raise ValueError(
      "rope_parameters of olmo3 must be given by layer type: full_attention, sliding_attention"
    )

  def build(settings, where):
    settings = dict(settings or {})
    if settings.get("rope_theta") is None:
      settings["rope_theta"] = _THETA.get(family, 10000.0) if theta is None else theta
    return _rope_from_hf(settings, positions, hf.get("original_max_position_embeddings"), where)

  if family == "olmo3":
    by_type = new or {}
    candidates = []
    if by_type or old is None:
      candidates.append(
        (
          build(by_type.get("full_attention"), "rope_parameters.full_attention"),
          build(by_type.get("sliding_attention"), "rope_parameters.sliding_attention"),
        )
      )
    if old is not None:
      both = dict(by_type.get("full_attention") or {}) | dict(old)
      candidates.append(
        (
          build(both, "rope_scaling"),
          build(by_type.get("sliding_attention"), "rope_parameters.sliding_attention"),
        )
      )
    for full, _ in candidates:
      # transformers reads it from the wrong level and so ignores it: nobody knows what is meant
      if not full.truncate:
        raise ValueError("rope truncate=False is not supported for model_type='olmo3'")
  else:
    candidates = [
      (build(s, where), None) for s, where in ((new, "rope_parameters"), (old, "rope_scaling")) if s
    ]
    candidates = candidates or [(build(None, "rope_theta"), None)]
  if any(c != candidates[0] for c in candidates):
    raise ValueError(f"rope_scaling={old} and rope_parameters={new} disagree")
  if theta is not None and candidates[0][0].theta != theta:
    raise ValueError(f"rope_theta={theta} and rope_parameters={new} disagree")
  return candidates[0]


def _rope_from_hf(settings: dict, positions: int, outer_original: int | None, where: str) -> Rope:
  kind = settings.get("rope_type", settings.get("type", "default"))
  if kind not in _ROPE_KEYS:
    raise ValueError(f"{where}.rope_type={kind!r} is not supported; choose from {list(_ROPE_KEYS)}")
  given = {k: v for k, v in settings.items() if k not in ("rope_type", "type") and v is not None}
  if given.pop("partial_rotary_factor", 1) != 1:
    raise ValueError(
      f"{where}.partial_rotary_factor={settings['partial_rotary_factor']!r} is not supported (only 1)"
    )
  unknown = sorted(set(given) - _ROPE_KEYS[kind])
  if unknown and kind != "default":  # without scaling, leftovers such as a factor mean nothing
    raise ValueError(
      f"{where}.{unknown[0]}={given[unknown[0]]!r} is not supported for rope_type={kind!r}"
    )
  theta = float(given["rope_theta"])
  if kind == "default":
    return Rope(theta)
  if outer_original is not None:  # transformers lets it win, and only sometimes
    raise ValueError(
      f"original_max_position_embeddings={outer_original} outside {where} is not supported"
    )
  original = int(given.get("original_max_position_embeddings", positions))
  required = ["factor"] + ["low_freq_factor", "high_freq_factor"] * (kind == "llama3")
  for key in required:
    if key not in given:
      raise ValueError(f"{where} lacks {key}, which rope_type={kind!r} needs")
  factor = float(given["factor"])
  if kind == "llama3":
    return Rope(
      theta,
      kind,
      factor,
      original,
      float(given["low_freq_factor"]),
      float(given["high_freq_factor"]),
    )

  def mscale(scale):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

  attention = given.get("attention_factor")
  if attention is None and given.get("mscale") and given.get("mscale_all_dim"):
    attention = mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
  return Rope(
    theta,
    kind,
    factor,
    original,
    beta_fast=float(given.get("beta_fast") or 32),
    beta_slow=float(given.get("beta_slow") or 1),
    truncate=bool(given.get("truncate", True)),
    attention_factor=mscale(1) if attention is None else float(attention),
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """ModelConfig -> the content of a config.json, in both rotary spellings so that old and new readers agree."""
  rope = _rope_to_hf(config.rope)
  sliding = config.sliding or (False,) * config.layers
  types = ["sliding_attention" if s else "full_attention" for s in sliding]
  eos = list(config.eos_ids)
  hf = {
    "architectures": [ARCHITECTURES[config.family]],
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
    "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    "pad_token_id": config.pad_id,
    "dtype": config.param_dtype,
    "torch_dtype": config.param_dtype,
  }
  if config.rope.kind != "default":
    hf["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
  if config.family == "olmo3":
    hf["rope_parameters"] = {
      "full_attention": rope,
      "sliding_attention": _rope_to_hf(config.sliding_rope or config.rope),
    }
  if config.family != "llama":
    hf |= {"layer_types": types, "sliding_window": config.sliding_window}
  if config.family in ("qwen2", "qwen3"):
    hf |= {"use_sliding_window": any(sliding), "max_window_layers": config.layers}
  return hf


def _rope_to_hf(rope: Rope) -> dict[str, Any]:
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
