"""Every setting of a run: its name, default and unit, in one function; how a file's settings are read; and the checks that stop a wrong one.

A configuration file is a docstring and a handful of changes to `base()`. A setting that `base()` does not have, a method part
that does not exist and a combination that cannot run are a ValueError naming the field, the value and the choices, before
anything compiles.
"""

import contextlib
import difflib
import inspect
import json
import os
import pathlib
import re
import runpy
import traceback
import types

from absl import flags
import ml_collections
from ml_collections import config_flags

from sdpo_jax.envs.base import env_settings
from sdpo_jax.kernels.distill_kl import IMPLEMENTATIONS
from sdpo_jax.objectives import build

MODELS = {  # name: Hugging Face hub id; the tiny ones ship with the package
  "tiny": os.path.join(os.path.dirname(__file__), "assets", "tiny"),
  "tiny_notes": os.path.join(os.path.dirname(__file__), "assets", "tiny_notes"),
  "tiny_arithmetic": os.path.join(os.path.dirname(__file__), "assets", "tiny_arithmetic"),
  "qwen3-0.6b": "Qwen/Qwen3-0.6B",
  "qwen3-1.7b": "Qwen/Qwen3-1.7B",
  "qwen3-4b": "Qwen/Qwen3-4B",
  "qwen3-8b": "Qwen/Qwen3-8B",
  "olmo3-7b-instruct": "allenai/Olmo-3-7B-Instruct",
}


def base() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.seed = 0
  # what a report calls the run; empty: its method and what else differs
  c.label = ""
  c.total_steps = 240  # generation batches
  # each cell can be overridden by itself, and so can its part (`complete`)
  c.method = build.method_row("sdpo")
  c.model = dict(
    # a name of MODELS, a Hugging Face directory or a hub id
    path="tiny",
    dtype="float32",  # activations and matrix products
    param_dtype="float32",  # weights
    # none | dots | block: what the backward pass recomputes, see decoder.REMAT
    remat="dots",
    # passed to chat templates that know it: for the policy's prompts, and the teacher's
    thinking=False,
    teacher_thinking=False,
    # rank 0: all weights train
    lora=dict(
      rank=0,
      alpha=32.0,
      targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
  )
  # devices along each axis of the mesh (sharding.py); -1: what the devices leave
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.env = dict(name="tinycode", level="default", words_seed=0)
  c.sandbox = dict(workers=2, isolation="auto")
  c.data = dict(
    # "[SPLIT=]LOCATION[ xWEIGHT]" each (data/tasks.py); empty: the environment makes its own
    sources=(),
    # error | skip (and count): a row that the environment cannot use, or whose question is too
    # long
    on_bad_row="error",
    # a longer question is a bad row; from a generator, it stops the run
    max_prompt_tokens=256,
    # a longer teacher prompt has its feedback and solution shortened
    max_teacher_tokens=512,
    # padded row lengths are rounded up to it: bounds the number of compilations
    length_multiple=32,
    # likewise for the response columns, which the divergence is computed on
    response_multiple=8,
  )
  c.rollout = dict(
    questions=16,
    group=4,  # responses per generation batch = questions x group
    max_new_tokens=24,
    temperature=1.0,
    top_p=1.0,
    rows=64,  # sequences decoded together
    # tokens between two looks at which responses are done
    chunk=8,
    judge_threads=4,
    judge_timeout_s=60.0,
  )
  c.optimizer = dict(
    name="adamw",
    lr=1e-3,
    warmup_steps=10,
    decay_steps=0,
    weight_decay=0.01,
    b1=0.9,
    b2=0.999,
    state_dtype="float32",
    # None: no clipping
    clip_norm=ml_collections.FieldReference(1.0, field_type=object),
  )
  c.train = dict(
    updates_per_batch=1,  # optimiser updates per generation batch
    # gradient accumulation within an update: parts when texts are as long as can be; fewer when
    # they are short
    micro_batches=1,
    max_skipped_in_a_row=5,  # non-finite updates in a row that stop the run
    # generation batches without one judged response that stop the run
    max_env_failures_in_a_row=3,
    loss_implementation="auto",  # of kernels/distill_kl: auto | reference | xla | ...
  )
  c.eval = dict(
    every_steps=20,
    splits=("heldout",),
    final_splits=("heldout", "unseen", "adversarial"),
    questions=100,
    samples=4,  # per split; avg@samples
    temperature=0.6,
    top_p=0.95,
  )
  c.discover = dict(  # --mode=discover: test-time self-distillation
    arms=("sdpo", "best_of_k"),  # of sdpo, counterfactual, best_of_k, multi_turn
    split="heldout",
    questions=20,
    seeds=5,
    # tasks of the split by index; empty: the first `questions`
    indices=(),
    # below 1: only questions that the base model solves more seldom, out of the first
    # `candidates`
    below_pass_at_64=1.0,
    # base attempts at each candidate where the environment cannot list the solutions; beside all
    # budgets
    candidates=200,
    calibration=2048,
    # budgets of one (question, seed): attempts, and generated tokens (0: no limit)
    attempts=256,
    tokens=0,
    rollouts=16,  # attempts per update
    # feedback | attempt_and_feedback: what multi_turn's prompt keeps of a turn
    history="feedback",
    # questions at a time: the devices are divided among them, and `mesh` describes the part of
    # one
    parallel=1,
    # learning begins a question with the weights that the question before left it: the order then
    # matters
    warm_start=False,
  )
  c.checkpoint = dict(every_steps=20, keep=2)
  # rollout files: how often, how many rows
  c.log = dict(rollouts_every_steps=10, rollouts_kept=16)
  return c


def tiny(a: types.SimpleNamespace) -> ml_collections.ConfigDict:
  """The settings for the tiny models of the package. a: method, model, seed, local."""
  c = base()
  c.seed, c.model.path, c.method = a.seed, a.model, build.method_row(a.method)
  c.optimizer.update(lr=1.5e-3, decay_steps=c.total_steps)
  if c.method.teacher_weights.name == "ema":
    # the paper's rate for rich feedback; at 0.05 accuracy falls again once most problems are solved
    c.method.teacher_weights.rate = 0.01
  # rewards alone: larger groups, so that one of them holds a success, and smaller steps at a
  # constant rate
  if c.method.policy_share == 1.0:
    c.optimizer.update(lr=5e-4, decay_steps=0)
    c.rollout.update(questions=8, group=8)
  if c.method.reduction.name == "constant":
    c.method.reduction.length = float(c.rollout.max_new_tokens)
  if a.local:  # same path, toy sizes, seconds on a CPU
    c.total_steps = 2
    c.rollout.update(questions=2, group=4, rows=8)
    c.eval.update(every_steps=2, questions=4, samples=2, final_splits=("heldout",))
    c.checkpoint.every_steps = 2
    c.log.rollouts_every_steps = 1
  return c


def paper(a: types.SimpleNamespace, *, rich_feedback: bool) -> ml_collections.ConfigDict:
  """The hyper-parameters of arXiv 2601.20802 for training on a set of questions: its column without feedback (science, tools) or with it (code).

  a: method, model, seed, top_k (0: the whole vocabulary), local. What the paper does not state is ours: total_steps without feedback (it
  trains by the clock), micro_batches, and the rates of other methods than its two. GRPO is its default one: four updates at 1e-6.
  """
  c = base()
  c.seed, c.model.path, c.method = a.seed, a.model, build.method_row(a.method)
  # weights, moments and teacher in float32: steps of 1e-6 vanish in bfloat16
  c.model.update(dtype="bfloat16", remat="block")
  c.data.update(
    max_prompt_tokens=2048, max_teacher_tokens=10_240, length_multiple=512, response_multiple=512
  )
  c.rollout.update(questions=32, group=8, max_new_tokens=8192, rows=256, chunk=64)
  c.optimizer.update(lr=1e-6 if rich_feedback else 1e-5, warmup_steps=0 if rich_feedback else 10)
  # at full length 8 rows at a time
  c.train.update(
    updates_per_batch=32 if rich_feedback else 1, micro_batches=1 if rich_feedback else 32
  )
  # the method's own column: rows with other teachers keep theirs
  if c.method.teacher_weights.name == "ema":
    c.method.teacher_weights.rate = 0.01 if rich_feedback else 0.05
    c.method.token_signal.alpha = 1.0 if rich_feedback else 0.5
    c.method.token_signal.top_k = a.top_k or None
  elif c.method.token_signal.name != "divergence":
    refuse(a, "top_k", because=f"method={a.method} has no divergence")
  elif "top_k" in a.given:
    c.method.token_signal.top_k = a.top_k or None
  if c.method.teacher_context.name == "feedback_or_solution" and not rich_feedback:
    c.method.teacher_context.feedback = "never"
  if c.method.policy_share == 1.0:
    c.optimizer.lr = 1e-6
    c.train.update(updates_per_batch=4, micro_batches=8)
  c.total_steps = 80 if rich_feedback else 100
  # every question of the split
  c.eval.update(
    splits=("test",),
    final_splits=("test",),
    questions=10_000,
    samples=4 if rich_feedback else 16,
    every_steps=10,
  )
  c.discover.split = "test"
  # same path, toy sizes, seconds on a CPU: the tiny model reads any text, byte by byte where it
  # must, and solves nothing
  if a.local:
    c.total_steps = 2
    c.model.update(path="tiny", dtype="float32", remat="dots")
    c.data.update(
      max_prompt_tokens=700, max_teacher_tokens=1000, length_multiple=128, response_multiple=8
    )
    c.mesh.fsdp = 1  # too few rows to share
    c.rollout.update(questions=2, group=2, max_new_tokens=16, rows=4, chunk=16)
    c.train.update(updates_per_batch=min(c.train.updates_per_batch, 2), micro_batches=1)
    c.eval.update(every_steps=2, questions=2, samples=1)
    c.checkpoint.every_steps = 2
    c.log.rollouts_every_steps = 1
  return c


# a handful of our own questions a task, for `:local` without data=
ROWS = os.path.join(os.path.dirname(__file__), "assets", "rows")
EXAMPLES = "`local` reads the examples that come with the package, unless data= names others"


def parse_arg(arg: str, **defaults) -> types.SimpleNamespace:
  """ "method=grpo,local" -> a namespace with the types of the defaults; a bare word sets a flag. ValueError names the choices."""
  values = dict(defaults)
  for item in filter(None, arg.split(",")):
    key, given, text = item.partition("=")
    if key not in defaults:
      raise ValueError(
        f"argument {key!r} of the config file is unknown; choose from {sorted(defaults)}"
      )
    kind = type(defaults[key])
    if kind is bool:
      if given and text not in ("true", "false"):
        raise ValueError(f"argument {key}={text!r} must be true or false")
      values[key] = not given or text == "true"
    elif not given:
      raise ValueError(f"argument {key!r} of the config file needs a value: {key}=...")
    else:
      try:
        values[key] = kind(text)
      except ValueError:
        raise ValueError(f"argument {key}={text!r} must be of type {kind.__name__}") from None
  return types.SimpleNamespace(
    **values, given=frozenset(item.partition("=")[0] for item in filter(None, arg.split(",")))
  )


def refuse(a: types.SimpleNamespace, *names: str, because: str) -> None:
  """ValueError for an argument of the config file that was given although nothing reads it in this combination."""
  for name in names:
    if name in a.given:
      raise ValueError(
        f"argument {name}={getattr(a, name)!r} of the config file would not be read: {because}"
      )


def load(file_and_argument: str) -> ml_collections.ConfigDict:
  """ "FILE[:argument]" -> what the file's get_config(argument) returns. ValueError for a file that cannot be read so, with its line."""
  path, _, argument = file_and_argument.partition(":")
  if not os.path.isfile(path):
    raise ValueError(f"--config={path}: no such file")
  try:
    names = runpy.run_path(path)
    if "get_config" not in names:
      raise ValueError(
        f"--config={path}: it has no get_config()"
        + ("; a grid of runs is for python -m sdpo_jax.experiment" if "get_grid" in names else "")
      )
    c = names["get_config"](argument) if argument else names["get_config"]()
    if not isinstance(c, ml_collections.ConfigDict):
      raise ValueError(
        f"--config={path}: get_config() returns {type(c).__name__}, not a ConfigDict"
      )
    return c
  except ValueError:  # says what is wrong with the argument or a setting
    raise
  except Exception as error:
    lines = [
      frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path
    ]
    raise ValueError(
      f"--config={path}"
      + (f", line {lines[-1]}" if lines else "")
      + f": {type(error).__name__}: {error}"
    ) from error


def model_of_run(workdir) -> dict:
  """The settings of the model in a work directory's config.json. ValueError for one of pre-training, whose model stands elsewhere."""
  model = json.loads((pathlib.Path(workdir) / "config.json").read_text(encoding="utf-8")).get(
    "model", {}
  )
  if "path" not in model:
    raise ValueError(
      f"{workdir} is a work directory of sdpo_jax.pretrain: use what it wrote for transformers, {workdir}/hf unless --out named another directory"
    )
  return model


_OVERRIDE = re.compile(r"--?(?:no)?(config(?:\.\w+)+)(?:=(.*))?", re.DOTALL)


def _overrides(arguments: list[str]) -> list[tuple[str, str]]:
  """[("config.section.key", text)] of --config.section.key=text, or with the text as the next argument."""
  found = [
    (_OVERRIDE.fullmatch(argument), following)
    for argument, following in zip(arguments, [*arguments[1:], ""])
  ]
  return [
    (match[1], following if match[2] is None else match[2]) for match, following in found if match
  ]


def complete(c: ml_collections.ConfigDict, arguments: list[str]) -> None:
  """Gives the environment and each part of the method every setting that it has, with its default: so the command line can set it and config.json shows it.

  arguments: of the command line, which may choose other parts. A part of the method chosen so begins with its own defaults. An environment keeps the
  settings that it shares with the file's; of the others, one that the file has changed is a ValueError, since it would be lost.
  """
  _same_keys(c, base(), "config")
  chosen = {
    path.removeprefix("config.").removesuffix(".name"): value
    for path, value in _overrides(arguments)
    if path.endswith(".name")
  }
  for path, value in _overrides(arguments):
    if path == "config.method" or path == "config.method.name" and value != c.method.name:
      raise ValueError(
        f"{path} cannot be set alone: choose another row by the config file's argument, --config=FILE:method={value}"
      )
  # `validate` says so if one is missing
  for axis in [axis for axis in build.AXES if axis in c.method]:
    part = (
      {"name": chosen[name]} if (name := f"method.{axis}") in chosen else c.method[axis].to_dict()
    )
    with _named_in_full():
      known = build.settings_of(axis, part["name"])
    c.method[axis] = {
      key: _field(known.get(key), value) for key, value in build.complete_part(axis, **part).items()
    }
  before, name = c.env.to_dict(), chosen.get("env", c.env.name)
  known = env_settings(name)
  if name != before["name"]:
    defaults = env_settings(before["name"])
    for key in before.keys() - known.keys() - {"name"}:
      if key not in defaults or before[key] != defaults[key].default:
        raise ValueError(
          f"config.env.{key}={before[key]!r} is not a setting of {name}; choose from {sorted(known)}, or begin with another config file"
        )
    before = {key: value for key, value in before.items() if key in known}
  filled = {key: None if p.default is p.empty else p.default for key, p in known.items()} | before
  c.env = {key: _field(known.get(key), value) for key, value in (filled | {"name": name}).items()}


def _field(parameter: inspect.Parameter | None, value):
  """The value of a setting as the command line is to read it: as a number, text, ...; as whatever stands there if it may be None or is not set yet."""
  if parameter and (
    value is None or parameter.default is None or isinstance(parameter.annotation, types.UnionType)
  ):
    return ml_collections.FieldReference(value, field_type=object)
  return (
    float(value) if parameter and parameter.annotation is float and type(value) is int else value
  )


@contextlib.contextmanager
def _named_in_full():
  """A method's own errors begin with method.; the setting is config.method."""
  try:
    yield
  except ValueError as error:
    raise ValueError(
      f"config.{error}" if str(error).startswith("method.") else str(error)
    ) from error


def unknown(c: ml_collections.ConfigDict, path: str) -> str:
  """What is wrong with "config.section.key" as the name of a setting of c: "" if nothing."""
  node, name = c, "config"
  for key in path.split(".")[1:]:
    if not isinstance(node, ml_collections.ConfigDict):
      return f"{name}.{key} is not a setting: {name} has no parts"
    if key not in node:
      return _not_a_setting(name, key, node)
    node, name = node[key], f"{name}.{key}"
  return ""


def overridden(c: ml_collections.ConfigDict, arguments: list[str]) -> ml_collections.ConfigDict:
  """With every --config.section.key=value of the arguments, then locked. ValueError for a setting that it does not have, a wrong type or anything else among them."""
  for path, _ in _overrides(arguments):
    if said := unknown(c, path):
      raise ValueError(said)
  f = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", c, flag_values=f, sys_argv=arguments)
  try:
    left = f(arguments)
  except flags.Error as error:
    raise ValueError(str(error)) from error
  if len(left) > 1:
    raise ValueError(f"unknown argument {left[1]!r}")
  return f.config


def _not_a_setting(path: str, key: str, known) -> str:
  close = difflib.get_close_matches(key, list(known), n=1)
  return f"{path}.{key} is not a setting{f'; did you mean {path}.{close[0]}' if close else ''}; choose from {sorted(known)}"


def _same_keys(
  given: ml_collections.ConfigDict, known: ml_collections.ConfigDict, path: str
) -> None:
  for key in given:
    name = f"{path}.{key}"
    if key not in known:
      raise ValueError(_not_a_setting(path, key, known))
    # whose parts have settings of their own
    if isinstance(known[key], ml_collections.ConfigDict) and name not in (
      "config.method",
      "config.env",
    ):
      _same_keys(given[key], known[key], name)
  for key in known:
    if key not in given:
      raise ValueError(f"{path}.{key} is missing; start from sdpo_jax.config.base()")


def check_optimizer(o: ml_collections.ConfigDict) -> None:
  """ValueError for settings that train nothing, or away from the gradient."""
  for name in ("lr", "warmup_steps", "decay_steps"):
    if not o[name] >= 0:
      raise ValueError(f"config.optimizer.{name}={o[name]} must be at least 0")
  if 0 < o.decay_steps <= o.warmup_steps:
    raise ValueError(
      f"config.optimizer.decay_steps={o.decay_steps} must be more than config.optimizer.warmup_steps={o.warmup_steps}, or 0 for a constant rate"
    )
  for name in ("b1", "b2"):
    if not 0 <= o[name] < 1:
      raise ValueError(f"config.optimizer.{name}={o[name]} must be at least 0 and below 1")
  if o.clip_norm is not None and not (isinstance(o.clip_norm, (int, float)) and o.clip_norm > 0):
    raise ValueError(
      f"config.optimizer.clip_norm={o.clip_norm!r} must be above 0, or None: no clipping"
    )


def validate(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a setting that is unknown, out of range or at odds with another one."""
  _same_keys(c, base(), "config")
  known_method = {*build.AXES, "name", "policy_share"}
  for key in c.method:
    if key not in known_method:
      raise ValueError(
        f"config.method.{key} is not a part of a method; choose from {sorted(known_method)}"
      )
  with _named_in_full():
    build.build_method(c.method.to_dict())

  positive = {
    "total_steps": c.total_steps,
    "rollout.questions": c.rollout.questions,
    "rollout.group": c.rollout.group,
    "rollout.max_new_tokens": c.rollout.max_new_tokens,
    "rollout.rows": c.rollout.rows,
    "rollout.chunk": c.rollout.chunk,
    "rollout.judge_threads": c.rollout.judge_threads,
    "train.updates_per_batch": c.train.updates_per_batch,
    "train.micro_batches": c.train.micro_batches,
    "eval.every_steps": c.eval.every_steps,
    "eval.questions": c.eval.questions,
    "eval.samples": c.eval.samples,
    "checkpoint.every_steps": c.checkpoint.every_steps,
    "checkpoint.keep": c.checkpoint.keep,
    "data.length_multiple": c.data.length_multiple,
    "data.response_multiple": c.data.response_multiple,
    "log.rollouts_every_steps": c.log.rollouts_every_steps,
    "sandbox.workers": c.sandbox.workers,
    "discover.questions": c.discover.questions,
    "discover.seeds": c.discover.seeds,
    "discover.attempts": c.discover.attempts,
    "discover.rollouts": c.discover.rollouts,
    "train.max_skipped_in_a_row": c.train.max_skipped_in_a_row,
    "train.max_env_failures_in_a_row": c.train.max_env_failures_in_a_row,
  }
  for name, value in positive.items():
    if value < 1:
      raise ValueError(f"config.{name}={value} must be at least 1")
  choices = {
    "model.remat": (c.model.remat, ("none", "dots", "block")),
    "train.loss_implementation": (c.train.loss_implementation, ("auto", *IMPLEMENTATIONS)),
    "optimizer.state_dtype": (c.optimizer.state_dtype, ("float32", "bfloat16")),
    "model.dtype": (c.model.dtype, ("float32", "bfloat16")),
    "model.param_dtype": (c.model.param_dtype, ("float32", "bfloat16")),
  }
  for name, (value, allowed) in choices.items():
    if value not in allowed:
      raise ValueError(f"config.{name}={value!r} is unknown; choose from {list(allowed)}")
  chosen, signal = c.train.loss_implementation, c.method.token_signal
  if chosen != "auto" and (signal.name == "none" or signal.get("top_k")):
    why = (
      "config.method.token_signal.name is 'none'"
      if signal.name == "none"
      else f"config.method.token_signal.top_k={signal.top_k} has one implementation"
    )
    raise ValueError(f"config.train.loss_implementation={chosen!r} would not be read: {why}")
  if c.model.lora.rank < 0:
    raise ValueError(
      f"config.model.lora.rank={c.model.lora.rank} must be at least 0; 0 trains all weights"
    )
  if c.method.advantage.name == "group_mean" and c.rollout.group < 2:
    raise ValueError(
      f"config.rollout.group={c.rollout.group} with advantage 'group_mean': a group of 1 has no baseline; use at least 2"
    )
  rows, pieces = (
    c.rollout.questions * c.rollout.group,
    c.train.updates_per_batch * c.train.micro_batches,
  )
  if rows % pieces:
    raise ValueError(
      f"config.rollout.questions x group = {rows} rows do not divide into train.updates_per_batch x micro_batches = {pieces}"
    )
  updates = c.total_steps * c.train.updates_per_batch
  if 0 < c.optimizer.decay_steps < updates:
    raise ValueError(
      f"config.total_steps={c.total_steps} means {updates} updates, but the learning rate is 0 after config.optimizer.decay_steps="
      f"{c.optimizer.decay_steps}: set both, or decay_steps=0 for a constant rate"
    )
  check_optimizer(c.optimizer)
  if not c.rollout.judge_timeout_s > 0:
    raise ValueError(f"config.rollout.judge_timeout_s={c.rollout.judge_timeout_s} must be above 0")
  if c.rollout.temperature <= 0:
    raise ValueError(
      f"config.rollout.temperature={c.rollout.temperature} must be above 0: the loss is taken at the rollout's temperature"
    )
  if c.eval.temperature < 0 or not 0 < c.eval.top_p <= 1 or not 0 < c.rollout.top_p <= 1:
    raise ValueError(
      f"config.eval.temperature={c.eval.temperature} must be at least 0; top_p in (0, 1], not {c.eval.top_p} / {c.rollout.top_p}"
    )
