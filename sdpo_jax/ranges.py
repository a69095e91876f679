"""The range of every numeric setting, in one table, and the check of a value against it.

A comparison such as `x <= 0` lets NaN through, so every check of a single number goes through
`check`. What two settings mean together is checked where they are read.

Keys of RANGES: "rollout.group" of `config.base()`; "method.AXIS.SETTING" of a method's parts, which
mean the same in every part of an axis; "env.NAME.SETTING" of an environment of the package;
"pretrain.SETTING" of what pre-training alone is told, which shares the optimizer's settings.
"""

import dataclasses
import math
import numbers

# Counters and sizes on a device are 32-bit numbers.
LARGEST_WHOLE = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # larger ones give the random numbers of smaller ones


@dataclasses.dataclass(frozen=True)
class Range:
  """The numbers from `least` to `most` that a setting may have; NaN and infinities never."""

  least: float
  most: float = math.inf
  above: bool = False  # `least` itself is outside
  below: bool = False  # `most` itself is outside
  whole: bool = False
  each: bool = False  # the setting is a tuple of such numbers
  also: tuple = ()  # values outside the range that may stand too
  remark: str = ""  # ends the message

  def holds(self, value) -> bool:
    """Tells whether a setting may have this value, of whatever type it is."""
    if isinstance(value, bool):  # True is no number here, though Python takes it for 1
      return False
    if any(value is other or value == other for other in self.also):
      return True
    kind = numbers.Integral if self.whole else numbers.Real
    if not isinstance(value, kind) or not -math.inf < value < math.inf:
      return False
    is_low_enough = value < self.most or (value == self.most and not self.below)
    return is_low_enough and (value > self.least or (value == self.least and not self.above))

  def describe(self, value) -> str:
    """Returns what a value outside the range must be, as the end of a sentence."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_kind = is_number and math.isfinite(value)
    kind = " (a finite number)"
    if self.whole:
      is_kind = is_kind and isinstance(value, numbers.Integral)
      kind = " (a whole number)"
    bounds = [f"{'above' if self.above else 'at least'} {self.least}"]
    if self.most < math.inf:
      bounds.append(f"{'below' if self.below else 'at most'} {self.most}")
    return " and ".join(bounds) + self.remark + ("" if is_kind else kind)


def _whole(least: int, most: int = LARGEST_WHOLE, remark: str = "", also: tuple = ()) -> Range:
  return Range(least, most, whole=True, remark=remark, also=also)


def _above(least: float, most: float = math.inf, remark: str = "", also: tuple = ()) -> Range:
  return Range(least, most, above=True, remark=remark, also=also)


_COUNT = _whole(1)
_CLIP = _above(0, remark=", or None: no clipping", also=(None,))
_MESH_AXIS = _whole(1, remark=", or -1: what the devices leave", also=(-1,))
_SEED = _whole(0, LARGEST_SEED)
_THREADS = _whole(1, 4096)
_TIMEOUT_S = _above(0, 1_000_000)
_LIMIT_SIZE = _whole(1, 2**20)

RANGES = {
  "seed": _SEED,
  "total_steps": _COUNT,
  "model.lora.rank": _whole(0, remark="; 0 trains all weights"),
  "model.lora.alpha": _above(0, 1_000_000),
  "mesh.data": _MESH_AXIS,
  "mesh.fsdp": _MESH_AXIS,
  "mesh.tensor": _MESH_AXIS,
  "sandbox.workers": _THREADS,
  "data.questions": _whole(0, remark=" (0: without end)"),
  "data.max_prompt_tokens": _COUNT,
  "data.max_teacher_tokens": _COUNT,
  "data.length_multiple": _COUNT,
  "data.response_multiple": _COUNT,
  "data.room": Range(0, 10),
  "data.compilation_steps": _above(0, 1_000_000),
  "rollout.questions": _COUNT,
  "rollout.group": _COUNT,
  "rollout.max_new_tokens": _COUNT,
  "rollout.max_episode_tokens": _COUNT,
  "rollout.history": _whole(0, remark=" (0: the first messages alone)"),
  "rollout.turn_penalty": Range(0, 1),
  # below, logits divided by it leave float32's range
  "rollout.temperature": Range(
    0.001, 100, remark=": the loss is taken at the rollout's temperature"
  ),
  "rollout.top_p": _above(0, 1),
  "rollout.rows": _COUNT,
  "rollout.lag": _whole(0, 1),
  "rollout.tensor": _whole(0, remark=" (0: as mesh.tensor)"),
  "rollout.chunk": _COUNT,
  "rollout.judge_threads": _THREADS,
  "rollout.judge_timeout_s": _TIMEOUT_S,
  "rollout.server.timeout_s": _TIMEOUT_S,
  "rollout.server.patience_s": Range(0, 1_000_000, remark="; 0 asks once"),
  "rollout.server.concurrency": _whole(1, 65536),
  "optimizer.lr": Range(0, 1),
  "optimizer.warmup_steps": _whole(0),
  "optimizer.decay_steps": _whole(0, remark="; 0 keeps the rate constant"),
  "optimizer.weight_decay": Range(0, 100),
  "optimizer.b1": Range(0, 1, below=True),
  "optimizer.b2": Range(0, 1, below=True),
  "optimizer.clip_norm": _CLIP,
  "train.updates_per_batch": _COUNT,
  "train.micro_batches": _COUNT,
  "train.max_skipped_in_a_row": _COUNT,
  "train.max_env_failures_in_a_row": _COUNT,
  "train.stop_when_worse": _whole(0, remark="; 0 never stops"),
  "train.max_rollout_gap": _above(0, 1000),
  "train.probe_teacher_every_steps": _whole(0, remark=" (0: off)"),
  "train.probe_attempts": _COUNT,
  "eval.every_steps": _COUNT,
  "eval.questions": _COUNT,
  "eval.samples": _COUNT,
  "eval.temperature": Range(0.001, 100, remark=", or 0: the likeliest token", also=(0,)),
  "eval.top_p": _above(0, 1),
  "diagnose.responses": _COUNT,
  "diagnose.texts": _whole(0),
  "discover.questions": _COUNT,
  "discover.seeds": _COUNT,
  "discover.indices": Range(0, LARGEST_WHOLE, whole=True, each=True),
  "discover.below_pass_at_64": _above(0, 1, remark="; 1 takes every question"),
  "discover.candidates": _COUNT,
  "discover.calibration": _COUNT,
  "discover.attempts": _COUNT,
  "discover.tokens": _whole(0, remark=" (0: no limit)"),
  "discover.rollouts": _COUNT,
  "discover.parallel": _COUNT,
  "checkpoint.every_steps": _COUNT,
  "checkpoint.keep": _COUNT,
  "log.rollouts_every_steps": _COUNT,
  "log.rollouts_kept": _whole(0),
  "log.tracker_timeout_s": _TIMEOUT_S,
  # at 0 a response without any reward would be a success
  "method.teacher_context.success_threshold": _above(0, 1),
  "method.teacher_context.delta": Range(0, 1),
  "method.teacher_context.share": _above(0, 1),
  "method.teacher_context.solutions": _whole(1, 1000),
  "method.teacher_context.failures": _whole(0, 1000),
  "method.teacher_context.hint_tokens": _COUNT,
  "method.teacher_weights.rate": Range(0, 1),
  "method.teacher_weights.period": _COUNT,
  "method.teacher_weights.share": _above(0, 1),
  "method.teacher_weights.match_rate": _above(0, 1, remark=", or None: as share", also=(None,)),
  "method.teacher_weights.check_every": _COUNT,
  "method.teacher_weights.min_gap": _whole(0),
  "method.teacher_weights.window": _whole(1, 10_000),
  # rewards lie in [0, 1]: at -1 every reward above none at all opens the gate
  "method.teacher_weights.reward_margin": Range(-1, 1),
  "method.teacher_weights.max_tail": _above(1, 1_000_000),
  "method.teacher_weights.timeout_s": _TIMEOUT_S,
  "method.teacher_logits.share": Range(0, 1),
  "method.teacher_logits.share_end": Range(0, 1),
  "method.teacher_logits.share_steps": _whole(0),
  "method.teacher_logits.beta": _above(0, 1_000_000),
  "method.token_signal.alpha": Range(
    0, 1, remark=": 0 is KL(teacher || policy), 1 is KL(policy || teacher)"
  ),
  "method.token_signal.top_k": _whole(1, remark=", or None for the whole vocabulary", also=(None,)),
  "method.token_signal.clip": _CLIP,
  "method.token_signal.advantage_clip": _CLIP,
  "method.token_signal.ratio_bounds": Range(0, 1_000_000_000, above=True, each=True),
  "method.token_signal.gamma": Range(0, 1, remark=": the discount of a later token's gap"),
  "method.token_weight.is_clip": _CLIP,
  "method.token_weight.rollout_is_clip": _CLIP,
  "method.token_weight.gamma": Range(0, 1000),
  "method.token_weight.share": _above(0, 1),
  "method.advantage.epsilon": _above(0, 1),  # at 0 a group of equal rewards would divide by 0
  "method.advantage.clip": _CLIP,
  "method.advantage.success_bonus": Range(0, 1000),
  "method.credit.share": Range(0, 1),
  "method.credit.share_end": Range(0, 1),
  "method.credit.share_steps": _whole(0, remark="; 0: share_end from the first step on"),
  "method.credit.epsilon": Range(0, 1),  # beyond it a weight turns the sign of an advantage
  "method.credit.warmup_steps": _COUNT,
  "method.credit.entropy_floor": _above(0, 1),
  "method.credit.threshold": Range(0, 1000),
  "method.credit.rate": Range(0, 1_000_000),
  "method.credit.depth": Range(0, 1, below=True),  # at 1 a token could lose all of its weight
  "method.surrogate.low": Range(0, 1),  # ratios are held above 1 - low
  "method.surrogate.high": Range(0),
  "method.surrogate.rollout_is_clip": _CLIP,
  "method.reduction.length": _above(0, 1_000_000_000),
  "method.counterfactual.eta": Range(0, 1000),
  "method.counterfactual.alternatives": _whole(0, 1000),
  "method.counterfactual.kappa": Range(0, 1),
  "method.counterfactual.imagined_tokens": _COUNT,
  "method.counterfactual.beam_width": _whole(1, 1000),
  "method.credit.mu": Range(0, 100),
  "method.credit.tau": Range(0, 100),
  "method.credit.bonus_most": Range(1, 1000),
  "method.credit.window": _whole(1, 10_000),
  "method.credit.steepness": Range(0, 1000),
  "method.credit.strength": Range(0, 1000),
  "method.credit.most": _above(1, 1000),
  "method.memory.alpha": Range(0, 1, below=True),
  "method.memory.solutions": _whole(0, 1000),
  "method.memory.megabytes": Range(0, 100_000),
  "method.route.warm_up_visits": _whole(0),
  "method.route.hard_below": Range(0, 1),
  "method.route.easy_above": Range(0, 1),
  "method.route.easy": Range(0, 1000),
  "method.route.medium": Range(0, 1000),
  "method.route.hard": Range(0, 1000),
  "method.token_signal.beta": Range(0, 1000, remark=": how sharply the gate opens; 0 is a half"),
  "method.token_signal.rivals": _COUNT,
  "method.token_signal.threshold": Range(0, 1000, remark=" nats"),
  "method.surrogate.dual_clip": _above(1, 1_000_000, remark=", or None: no bound", also=(None,)),
  "method.contrast.tau": _above(0, 1_000_000),
  "method.contrast.beta_pos": _above(0, 1_000_000),
  "method.contrast.beta_neg": _above(0, 1_000_000),
  "method.contrast.g_min": _whole(2),
  "method.contrast.cti_sign": _whole(-1, 1),
  "method.contrast.strong": Range(0, 1, below=True),  # |c| is at most 1
  "method.balance.share": _above(0, 1000),
  "method.balance.least": Range(0, 1000),
  "method.balance.width": _above(0, 1000),
  "method.balance.rho": Range(0, 1),
  "method.balance.hold": _whole(0),
  "method.balance.decay": Range(0, 1, below=True),
  "method.reference_kl.coefficient": _above(
    0, 1000, remark=", or None: method.balance decides it", also=(None,)
  ),
  "method.reference_kl.clamp": _CLIP,
  "method.reference_kl.threshold": Range(0, 1, below=True),
  "method.policy_share": Range(0, 1, remark=", or 'routed'", also=("routed",)),
  "pretrain.seed": _SEED,
  "pretrain.total_steps": _COUNT,
  "pretrain.log_every_steps": _COUNT,
  "pretrain.checkpoint_every_steps": _COUNT,
  "pretrain.model.width": _COUNT,
  "pretrain.model.layers": _COUNT,
  "pretrain.model.heads": _COUNT,
  "pretrain.model.kv_heads": _COUNT,
  "pretrain.model.head_dim": _COUNT,
  "pretrain.model.ff_width": _COUNT,
  "pretrain.model.rope_theta": _above(0, 1_000_000_000_000),
  "pretrain.model.max_positions": _COUNT,
  "pretrain.corpus.plain": Range(0, 1_000_000),
  "pretrain.corpus.feedback": Range(0, 1_000_000),
  "pretrain.corpus.solution": Range(0, 1_000_000),
  "pretrain.corpus.both": Range(0, 1_000_000),
  "pretrain.corpus.notes": Range(0, 1_000_000),
  "pretrain.corpus.imagine": Range(0, 1_000_000),
  "pretrain.corpus.lengths": Range(0, 1_000_000, each=True),
  "pretrain.corpus.novel": Range(0, 1),
  "pretrain.corpus.twist": Range(0, 1),
  "pretrain.corpus.slip": Range(0, 1),
  "pretrain.corpus.alternatives": _whole(1, 1000),
  "pretrain.corpus.success": Range(0, 1),
  "pretrain.corpus.learnt": Range(0, 1),
  "pretrain.corpus.skill": Range(0, 1),
  "pretrain.corpus.other": Range(0, 1),
  "pretrain.corpus.extra": _whole(0, 12),
  "pretrain.corpus.search": Range(0, 1),
  "pretrain.corpus.inadmissible": Range(0, 0.9),
  "pretrain.corpus.wrong": Range(0, 0.9),
  "pretrain.corpus.rest_weight": Range(0, 1),
  "pretrain.batch.rows": _COUNT,
  "pretrain.batch.length": _COUNT,
  "pretrain.batch.responses": _COUNT,
  "pretrain.batch.texts": _COUNT,
  "pretrain.eval.every_steps": _COUNT,
  "pretrain.eval.questions": _COUNT,
  "pretrain.eval.max_new_tokens": _COUNT,
  "env.tinycode.words_seed": _SEED,
  "env.tinycode.stages": _COUNT,
  "env.tinycode.stage_questions": _COUNT,
  "env.arithmetic.words_seed": _SEED,
  "env.coding.time_s": _TIMEOUT_S,
  "env.coding.memory_mb": _LIMIT_SIZE,
  "env.coding.output_kb": _LIMIT_SIZE,
  "env.coding.max_failures": _COUNT,
  "env.math_qa.time_s": _TIMEOUT_S,
  "env.math_qa.memory_mb": _LIMIT_SIZE,
  "env.math_qa.workers": _THREADS,
  "env.pairwise.timeout_s": _TIMEOUT_S,
  "env.pairwise.retries": _whole(0, 100),
  "env.household.words_seed": _SEED,
  "env.household.limit": _COUNT,
  "env.alfworld.seed": _SEED,
  "env.alfworld.limit": _COUNT,
  "env.alfworld.processes": _whole(0, 1000, remark=" (0: one a core)"),
  "env.search_qa.size": _whole(100, 10000),
  "env.search_qa.world_seed": _SEED,
  "env.search_qa.limit": _COUNT,
  "env.search_qa.top_k": _COUNT,
  "env.search_qa_rows.limit": _COUNT,
  "env.search_qa_rows.top_k": _COUNT,
  "env.webshop.world_seed": _SEED,
  "env.webshop.limit": _COUNT,
}


def check(key: str, value, *, setting: str | None = None) -> None:
  """Raises ValueError unless RANGES[key] holds the value, or each number of a tuple.

  setting: the name that the message gives it; without one it is the key.
  """
  allowed = RANGES[key]
  for number in value if allowed.each else (value,):
    if not allowed.holds(number):
      raise ValueError(f"{setting or key}={value!r} must be {allowed.describe(number)}")


def check_finite(setting: str, value) -> None:
  """Raises ValueError for NaN and infinities, in settings whose range nobody has stated."""
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{setting}={value!r} must be a finite number")
