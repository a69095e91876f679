"""Every setting of a run: its name, default and unit in one function, and the checks on them.

A configuration file is a docstring and a handful of changes to `base()`. What is wrong with one is
a ValueError naming the field, the value and the choices, before anything compiles. Wrong are a
setting that `base()` lacks, a method part that does not exist, a combination that cannot run.

The path of a setting: `load` reads the file, `complete_parts` adds what the chosen parts can be
told, `with_overrides` applies the command line and locks, `validate` checks the whole.
"""

import contextlib
import inspect
import itertools
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

from sdpo_jax import ranges
from sdpo_jax.engine import ENGINES
from sdpo_jax.envs.base import check_env_numbers, env_settings, find_env, plays
from sdpo_jax.errors import did_you_mean, local_path, unknown
from sdpo_jax.kernels.distill_kl import IMPLEMENTATIONS
from sdpo_jax.objectives import build
from sdpo_jax.trackers.sinks import SINKS

ASSETS = os.path.join(os.path.dirname(__file__), "assets")
MODELS = {  # name: Hugging Face hub id; the tiny ones ship with the package
  "tiny": os.path.join(ASSETS, "tiny"),
  "tiny_notes": os.path.join(ASSETS, "tiny_notes"),
  "tiny_arithmetic": os.path.join(ASSETS, "tiny_arithmetic"),
  "tiny_household": os.path.join(ASSETS, "tiny_household"),
  "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
  "qwen3-0.6b": "Qwen/Qwen3-0.6B",
  "qwen3-1.7b": "Qwen/Qwen3-1.7B",
  "qwen3-4b": "Qwen/Qwen3-4B",
  "qwen3-8b": "Qwen/Qwen3-8B",
  "olmo3-7b-instruct": "allenai/Olmo-3-7B-Instruct",
  "gemma3-270m": "google/gemma-3-270m-it",
}

# a handful of our own questions a task, for `:local` without data=
ROWS = os.path.join(ASSETS, "rows")
EXAMPLES = "`local` reads the examples that come with the package, unless data= names others"


def base() -> ml_collections.ConfigDict:
  """Returns every setting with its default; a comment gives the unit or the choices."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  # what a report calls the run; empty: its method and what else differs
  c.label = ""
  c.total_steps = 240  # generation batches
  # each cell can be overridden by itself, and so can its part (`complete_parts`)
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
    # of an environment that makes its own: so many come again and again, shuffled anew in each
    # pass; 0: new ones without end
    questions=0,
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
    # the share that a new shape has above its batch, since lengths drift: padding against
    # compilations
    room=0.0625,
    # what a compilation costs, in steps: so much padding is borne before a better shape is compiled
    compilation_steps=10.0,
  )
  c.rollout = dict(
    questions=16,
    group=4,  # responses per generation batch = questions x group
    max_new_tokens=24,  # of a response; of a turn, in an environment of episodes
    # of an episode: all that follows its first messages. One in which the next observation and a
    # turn of max_new_tokens have no room ends there
    max_episode_tokens=512,
    # episodes: one text of prompt, turn, observation, turn, ... | turns: a text for each turn, with
    # a prompt of its own that shows the last turns (data/window.py), and max_episode_tokens is for
    # these and the turn. What a method computes over a response goes over all turns either way
    rows_are="episodes",
    history=2,  # with rows as turns, the turns that a prompt shows; 0: the first messages alone
    # True: with rows as episodes, model.thinking=True may keep thoughts in the history
    keeps_thoughts=False,
    # what an invalid turn of an episode costs where its advantage is computed; rewards are in
    # [0, 1]. With a penalty, or rows as turns, each turn counts in the statistics of its group,
    # without them each episode does
    turn_penalty=0.01,
    # False: no turn is sampled while a world is at work, so that what is sampled together depends
    # on no world's speed, and a run repeats value for value. True: turns are sampled while other
    # episodes wait for their worlds, for worlds that are slow; the same text but for rounding.
    # Servers always do
    overlap=False,
    temperature=1.0,
    top_p=1.0,
    rows=64,  # sequences decoded together
    # devices among which the weights are split while sampling; 0: config.mesh.tensor. Each group of
    # so many holds a copy of the weights and rows of its own
    tensor=0,
    # 1: the next batch is sampled while this one is trained on, with weights one update old. One
    # process can, with servers or with a single device
    lag=0,
    # tokens between two looks at which responses are done
    chunk=16,
    judge_threads=4,  # responses that are judged, or worlds that are at work, at a time
    judge_timeout_s=60.0,  # of one verdict, or of one call of a world
    engine="local",  # local | vllm | sglang: what samples; the last two are servers
    server=dict(
      urls=(),  # "http://HOST:PORT" each
      model="",  # the name that vLLM serves it under; empty: model.path
      # a directory that the servers see under the same path; it has room for two sets of weights
      weights_dir="",
      timeout_s=600.0,  # of one response, or of reading weights
      patience_s=300.0,  # how long what failed is asked again
      concurrency=256,  # responses asked for at a time, over all servers
    ),
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
    # nats a token, mean over a batch: a larger difference between the log-probabilities of the
    # engine that sampled and those of the trainer stops the run, unless the batch was sampled ahead
    max_rollout_gap=0.2,
    # 0: off; so often the teacher answers some attempts anew, and so does the policy: the teacher
    # has to be better (diagnose/probe.py). Each time 2 x probe_attempts responses are sampled
    probe_teacher_every_steps=0,
    probe_attempts=16,
    # evaluations in a row with the first of eval.splits below the base model, on the same questions
    # beyond the interval, that end the run; 0: it goes on. In 20 evaluations of 60 answers chance
    # ends a run that is as good as its base model in about 20 % of cases at 1, 6 % at 2, 2 % at 3
    stop_when_worse=0,
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
    # --mode=eval: also the likeliest response to each question
    greedy=False,
    # Of answers as language (evaluation/fluency.py). keep_texts: the lines of --mode=eval and
    # eval/texts/ of a run (first and last evaluation) hold them, and distinct_2 is computed.
    # base_logp: the base model reads them too, in a run those of the first and the last evaluation;
    # it costs a pass over them, and without adapters a second set of weights as long as it takes
    keep_texts=False,
    base_logp=False,
  )
  c.diagnose = dict(  # --mode=diagnose: what can learn here
    responses=640,  # the budget; a third is the policy's own, the rest makes attempts again
    texts=32,  # attempts that are read token by token; 0: none
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
    # feedback | attempt_and_feedback: what multi_turn's prompt keeps of a turn (discover/turns.py)
    history="feedback",
    # questions at a time: the devices are divided among them, and `mesh` describes the part of
    # one
    parallel=1,
    # learning begins a question with the weights that the question before left it: the order then
    # matters
    warm_start=False,
  )
  # best: a metric, such as train/reward; the checkpoint with its highest value is kept too. auto:
  # avg@k of the first of eval.splits, at steps with a checkpoint; empty: none
  c.checkpoint = dict(every_steps=20, keep=2, best="auto")
  c.log = dict(
    # rollout files: how often, how many rows
    rollouts_every_steps=10,
    rollouts_kept=16,
    # of wandb, mlflow (`sdpo_jax.trackers`): where metrics and rollouts are sent to as well
    trackers=(),
    project="sdpo_jax",  # there: the project, or experiment, of the run
    tracker_timeout_s=60.0,  # how long the end of a run waits for what is not sent yet
  )
  return c


def defaults_of(c: ml_collections.ConfigDict) -> dict:
  """Returns every setting with its default, for the method's parts and the environment of `c`."""
  defaults = base().to_dict()
  for axis, part in defaults["method"].items():
    if axis in build.AXES:
      part |= build.complete_part(axis, c.method[axis].name) | {"name": part["name"]}
  defaults["env"] = _env_defaults(c.env.name) | {"name": defaults["env"]["name"]}
  return defaults


def tiny(a: types.SimpleNamespace) -> ml_collections.ConfigDict:
  """Returns the settings for the tiny models of the package. `a`: method, model, seed, local."""
  c = base()
  c.seed = a.seed
  c.model.path = a.model
  c.method = build.method_row(a.method)
  # a step of 0.3 s on a CPU, which takes 15 s to compile: padding is cheaper
  c.data.update(length_multiple=64, response_multiple=16, room=0.5, compilation_steps=50.0)
  c.optimizer.update(lr=1.5e-3, decay_steps=c.total_steps)
  if c.method.teacher_weights.name == "ema":
    # the paper's rate for rich feedback; at 0.05 accuracy falls again once most problems are solved
    c.method.teacher_weights.rate = 0.01
  if c.method.policy_share == 1.0:
    # rewards alone: larger groups, so that one of them holds a success, and smaller steps at a
    # constant rate
    c.optimizer.update(lr=5e-4, decay_steps=0)
    c.rollout.update(questions=8, group=8)
  if c.method.reduction.name == "constant":
    c.method.reduction.length = float(c.rollout.max_new_tokens)
  if c.method.memory.name != "none":
    # seven passes; what is remembered of a question is of use when it comes back
    c.data.questions = 512
  if a.local:  # same path, toy sizes, seconds on a CPU
    c.total_steps = 2
    c.rollout.update(questions=2, group=4, rows=8)
    c.eval.update(every_steps=2, questions=4, samples=2, final_splits=("heldout",))
    c.checkpoint.every_steps = 2
    c.log.rollouts_every_steps = 1
    remember_two_questions(c)
  return c


def toy_sizes(c: ml_collections.ConfigDict, a: types.SimpleNamespace) -> None:
  """Shrinks a real model's run to seconds, on the same path.

  The tiny model reads any text, byte by byte, and solves little. A model that `a` names is kept.
  """
  c.total_steps = 2
  if "model" not in a.given:
    c.model.path = "tiny"
  c.mesh.fsdp = 1  # too few rows to share
  c.data.update(max_prompt_tokens=700, max_teacher_tokens=1000, length_multiple=128)
  c.rollout.update(questions=2, group=2, max_new_tokens=16, rows=4)
  c.eval.update(every_steps=2, questions=2)
  c.checkpoint.every_steps = 2
  c.log.rollouts_every_steps = 1
  remember_two_questions(c)


def remember_two_questions(c: ml_collections.ConfigDict) -> None:
  """Lets a method that remembers questions meet both in two steps, the second stage included."""
  if c.method.memory.name != "none":  # both questions come back in the second step
    c.data.questions = 2
  if c.method.route.name == "drift":  # ... which is of the second stage
    c.method.route.warm_up_visits = 1


def paper(a: types.SimpleNamespace, *, rich_feedback: bool) -> ml_collections.ConfigDict:
  """Returns the hyper-parameters of arXiv 2601.20802 for training on a set of questions.

  They are its column with rich feedback (code), or the one without (science, tools). What the paper
  does not state is ours: total_steps without feedback (it trains by the clock), micro_batches, and
  the rates of other methods than its two. GRPO is its default one: four updates at 1e-6.

  `a`: method, model, seed, top_k (0: the whole vocabulary), local.
  """
  c = base()
  c.seed = a.seed
  c.model.path = a.model
  c.method = build.method_row(a.method)
  # weights, moments and teacher stay float32: steps of 1e-6 vanish in bfloat16
  c.model.update(dtype="bfloat16", remat="block")
  c.data.update(
    max_prompt_tokens=2048, max_teacher_tokens=10_240, length_multiple=512, response_multiple=512
  )
  c.rollout.update(questions=32, group=8, max_new_tokens=8192, rows=256, chunk=64)
  # every question of the split
  c.eval.update(splits=("test",), final_splits=("test",), questions=10_000, every_steps=10)
  c.discover.split = "test"
  # 256 responses, at full length 8 rows a micro-batch
  if rich_feedback:
    c.total_steps = 80
    c.optimizer.update(lr=1e-6, warmup_steps=0)
    c.train.update(updates_per_batch=32, micro_batches=1)
    c.eval.samples = 4
  else:
    c.total_steps = 100
    c.optimizer.update(lr=1e-5, warmup_steps=10)
    c.train.update(updates_per_batch=1, micro_batches=32)
    c.eval.samples = 16
  _papers_method(c.method, a, rich_feedback)
  if c.method.policy_share == 1.0:
    c.optimizer.lr = 1e-6
    c.train.update(updates_per_batch=4, micro_batches=8)
  if a.local:
    _papers_toy_sizes(c)
  return c


def _papers_method(method, a: types.SimpleNamespace, rich_feedback: bool) -> None:
  """Sets the paper's column of the method.

  Rows with other teachers, or with a divergence that is not SDPO's, keep their own settings.
  """
  is_papers_teacher = method.teacher_weights.name == "ema"
  if is_papers_teacher:
    method.teacher_weights.rate = 0.01 if rich_feedback else 0.05
  papers_signal = build.method_row("sdpo")["token_signal"]
  if is_papers_teacher and method.token_signal.to_dict() == papers_signal:
    method.token_signal.alpha = 1.0 if rich_feedback else 0.5
    method.token_signal.top_k = a.top_k or None
  elif method.token_signal.name != "divergence":
    refuse(a, "top_k", because=f"method={a.method} has no divergence")
  elif "top_k" in a.given:
    method.token_signal.top_k = a.top_k or None
  if method.teacher_context.name == "feedback_or_solution" and not rich_feedback:
    method.teacher_context.feedback = "never"


def _papers_toy_sizes(c: ml_collections.ConfigDict) -> None:
  """Shrinks the paper's settings to seconds on a CPU, on the same path.

  The tiny model reads any text, byte by byte where it must, and solves nothing.
  """
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


# ---- the argument of a configuration file --------------------------------------------------------


def parse_arg(arg: str, **defaults) -> types.SimpleNamespace:
  """Reads "method=grpo,local" into a namespace with the types of the defaults.

  A bare word sets a flag. `given` of the namespace holds the names that the text sets. ValueError
  names the choices.
  """
  values, given = dict(defaults), set()
  for item in filter(None, arg.split(",")):
    key, equals, text = item.partition("=")
    if key not in defaults:
      raise ValueError(
        f"argument {key!r} of the config file is unknown{did_you_mean(key, defaults)}; "
        f"choose from {sorted(defaults)}"
      )
    values[key] = _parse_value(key, text if equals else None, type(defaults[key]))
    given.add(key)
  return types.SimpleNamespace(**values, given=frozenset(given))


def _parse_value(key: str, text: str | None, kind: type):
  """Reads the text of one argument; None: it stands there as a bare word."""
  if kind is bool:
    if text not in (None, "true", "false"):
      raise ValueError(f"argument {key}={text!r} must be true or false")
    return text != "false"
  if text is None:
    raise ValueError(f"argument {key!r} of the config file needs a value: {key}=...")
  try:
    return kind(text)
  except ValueError:
    raise ValueError(f"argument {key}={text!r} must be of type {kind.__name__}") from None


def refuse(a: types.SimpleNamespace, *names: str, because: str) -> None:
  """Raises ValueError for an argument that was given although nothing reads it in this case."""
  for name in names:
    if name in a.given:
      raise ValueError(
        f"argument {name}={getattr(a, name)!r} of the config file would not be read: {because}"
      )


# ---- files ---------------------------------------------------------------------------------------


def load(file_and_argument: str) -> ml_collections.ConfigDict:
  """Reads "FILE[:argument]": what the file's get_config(argument) returns.

  ValueError for a file that cannot be read so, with its line.
  """
  c = call_file("config", file_and_argument, "get_config")
  if not isinstance(c, ml_collections.ConfigDict):
    path = file_and_argument.partition(":")[0]
    raise ValueError(f"--config={path}: get_config() returns {type(c).__name__}, not a ConfigDict")
  return c


# function -> what a file that has it is for
_PURPOSES = {
  "get_config": "settings of a run are for --config",
  "get_grid": "a grid of runs is for python -m sdpo_jax.experiment",
  "get_suites": "suites of questions are for --suites of --mode=eval",
}


def call_file(flag: str, file_and_argument: str, function: str):
  """Returns what a function of the file "FILE[:argument]" returns for the argument.

  flag: named in the ValueError for a file that cannot be read so, with its line.
  """
  path, _, argument = file_and_argument.partition(":")
  if not os.path.isfile(path):
    raise ValueError(f"--{flag}={path}: no such file")
  try:
    names = runpy.run_path(path)
    if function not in names:
      advice = "".join(f"; {purpose}" for name, purpose in _PURPOSES.items() if name in names)
      raise ValueError(f"--{flag}={path}: it has no {function}(){advice}")
    return names[function](argument) if argument else names[function]()
  except ValueError:  # says what is wrong with the argument or a setting
    raise
  except Exception as error:
    raise ValueError(f"--{flag}={in_file(path, error)}") from error


def in_file(path: str, error: Exception) -> str:
  """Returns "FILE, line N: Type: message" of an error that a user's file raised."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  where = f", line {lines[-1]}" if lines else ""
  return f"{path}{where}: {type(error).__name__}: {error}"


def model_location(name: str, names=MODELS) -> str:
  """Returns the directory or hub id of a model: of one of the names, or what stands there itself.

  ValueError for what can be none of them.
  """
  location = MODELS.get(name) or local_path(name)
  if "/" not in location and not os.path.exists(location):
    raise ValueError(
      f"{name}: no such directory, and not a hub id of the form owner/name"
      f"{did_you_mean(name, names)}; the models with a short name are {sorted(names)}"
    )
  return location


def model_of_run(workdir) -> dict:
  """Returns the settings of the model from a work directory's config.json.

  ValueError for a work directory of pre-training, whose model stands elsewhere.
  """
  text = (pathlib.Path(workdir) / "config.json").read_text(encoding="utf-8")
  model = json.loads(text).get("model", {})
  if "path" not in model:
    raise ValueError(
      f"{workdir} is a work directory of sdpo_jax.pretrain: use what it wrote for transformers, "
      f"{workdir}/hf unless --out named another directory"
    )
  return model


# ---- the command line ----------------------------------------------------------------------------

_OVERRIDE = re.compile(r"--?(?:no)?(config(?:\.\w+)+)(?:=(.*))?", re.DOTALL)


def _overrides(arguments: list[str]) -> list[tuple[str, str]]:
  """Returns (path, text) of every --config.section.key=text, or --config.section.key text."""
  overrides = []
  for argument, following in itertools.pairwise([*arguments, ""]):
    match = _OVERRIDE.fullmatch(argument)
    if match:
      path, text = match.groups()
      overrides.append((path, following if text is None else text))
  return overrides


def complete_parts(c: ml_collections.ConfigDict, arguments: list[str]) -> None:
  """Gives each part of the method, and the environment, every setting that it has.

  So the command line can set them all, and config.json shows them all. `arguments` of the command
  line may choose other parts; a part chosen there begins with its own defaults.
  """
  _check_keys(c, base(), "config")
  part_names = {}
  for path, value in _overrides(arguments):
    if path == "config.method" or path == "config.method.name" and value != c.method.name:
      if value not in build.METHODS:
        raise ValueError(unknown(path, value, sorted(build.METHODS)))
      raise ValueError(
        f"{path} cannot be set alone: choose another row by the config file's argument, "
        f"--config=FILE:method={value}"
      )
    if path.endswith(".name"):
      part_names[path.removesuffix(".name")] = value
  for axis in build.AXES:
    if axis in c.method:  # `validate` refuses a method that lacks one
      _complete_axis(c, axis, part_names.get(f"config.method.{axis}"))
  if "policy_share" in c.method:  # a number or a word, whichever the row has now
    share = c.method.policy_share
    del c.method.policy_share
    c.method.policy_share = ml_collections.FieldReference(share, field_type=object)
  _complete_environment(c, part_names.get("config.env", c.env.name))


def _complete_axis(c: ml_collections.ConfigDict, axis: str, chosen: str | None) -> None:
  """Completes the part of one axis: that of the file, or of the name chosen on the command line."""
  part = c.method[axis].to_dict() if chosen is None else {"name": chosen}
  with _with_full_path():
    parameters = build.settings_of(axis, part["name"])
  completed = build.complete_part(axis, **part)
  c.method[axis] = {key: _as_field(value, parameters.get(key)) for key, value in completed.items()}


def _complete_environment(c: ml_collections.ConfigDict, name: str) -> None:
  """Completes the settings of the environment `name`, which may be another than the file's.

  It keeps the settings that both have. Of the others, one that the file has changed is a
  ValueError, since it would be lost.
  """
  given = c.env.to_dict()
  parameters = env_settings(name)
  if name != given["name"]:
    of_the_file = env_settings(given["name"])
    for key in given.keys() - parameters.keys() - {"name"}:
      if key not in of_the_file or given[key] != of_the_file[key].default:
        raise ValueError(
          f"config.env.{key}={given[key]!r} is not a setting of {name}; "
          f"choose from {sorted(parameters)}, or begin with another config file"
        )
    given = {key: value for key, value in given.items() if key in parameters}
  settings = _env_defaults(name) | given | {"name": name}
  c.env = {key: _as_field(value, parameters.get(key)) for key, value in settings.items()}


def _env_defaults(name: str) -> dict:
  """Returns the settings of an environment; None stands for one that a user must give."""
  return {
    key: None if parameter.default is parameter.empty else parameter.default
    for key, parameter in env_settings(name).items()
  }


def _as_field(value, parameter: inspect.Parameter | None):
  """Returns the value of a setting in the form that decides how the command line reads it.

  It reads a number, text, ... like the value that is there. A setting that may be None, or has no
  value yet, takes whatever stands there, and `build` or the environment checks its type.
  """
  if parameter is None:
    return value
  may_be_none = parameter.default is None or isinstance(parameter.annotation, types.UnionType)
  if value is None or may_be_none:
    return ml_collections.FieldReference(value, field_type=object)
  if parameter.annotation is float and type(value) is int:
    return float(value)
  return value


@contextlib.contextmanager
def _with_full_path():
  """Completes the name of the setting in a method's own errors: they begin with "method."."""
  try:
    yield
  except ValueError as error:
    message = str(error)
    if message.startswith("method."):
      message = f"config.{message}"
    raise ValueError(message) from error


def with_overrides(c: ml_collections.ConfigDict, arguments: list[str]) -> ml_collections.ConfigDict:
  """Applies every --config.section.key=value of the arguments and locks the configuration.

  ValueError for a setting that it does not have, a wrong type or anything else among them.
  """
  for path, _ in _overrides(arguments):
    _check_path(c, path)
  f = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", c, flag_values=f, sys_argv=arguments)
  try:
    left = f(arguments)
  except flags.Error as error:
    raise ValueError(f"{error}{_range_of_flag(c, str(error))}") from error
  if len(left) > 1:
    raise ValueError(f"unknown argument {left[1]!r}")
  return f.config


def _range_of_flag(c: ml_collections.ConfigDict, message: str) -> str:
  """Returns what the number must be that absl could not read; "" for any other message."""
  match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message)
  if not match:
    return ""
  key, value = match.groups()
  if key.startswith("env."):
    key = f"env.{c.env.name}.{key.removeprefix('env.')}"
  allowed = ranges.RANGES.get(key)
  return f"; it must be {allowed.describe(value)}" if allowed else ""


def _check_path(c: ml_collections.ConfigDict, path: str) -> None:
  """Raises ValueError if "config.section.key" names no setting."""
  node, name = c, "config"
  for key in path.split(".")[1:]:
    if not isinstance(node, ml_collections.ConfigDict):
      raise ValueError(f"{name}.{key} is not a setting: {name} has no parts")
    if key not in node:
      raise ValueError(_not_of_this_part(name, key, node) or _not_a_setting(name, key, node))
    node = node[key]
    name = f"{name}.{key}"


def _not_a_setting(path: str, key: str, choices) -> str:
  advice = did_you_mean(key, choices, prefix=f"{path}.")
  return f"{path}.{key} is not a setting{advice}; choose from {sorted(choices)}"


def _not_of_this_part(path: str, key: str, part: ml_collections.ConfigDict) -> str:
  """Returns the message on a setting that other parts of the axis have; "" where none has it."""
  axis = path.removeprefix("config.method.")
  owners = [name for name in build.AXES.get(axis, ()) if key in build.settings_of(axis, name)]
  if not owners:
    return ""
  return (
    f"{path}.{key} is not a setting of {part.name!r}; "
    f"to set it, choose {path}.name from {sorted(owners)}"
  )


# ---- checks --------------------------------------------------------------------------------------

_DTYPES = ("float32", "bfloat16")
_CHOICES = {
  "model.remat": ("none", "dots", "block"),
  "rollout.engine": tuple(ENGINES),
  "rollout.rows_are": ("episodes", "turns"),
  "train.loss_implementation": ("auto", *IMPLEMENTATIONS),
  "optimizer.state_dtype": _DTYPES,
  "model.dtype": _DTYPES,
  "model.param_dtype": _DTYPES,
}
# their parts have settings of their own, which `complete_parts` and `build` know
_OPEN_SECTIONS = ("config.method", "config.env")


def validate(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a setting that is unknown, out of range or at odds with another one."""
  _check_keys(c, base(), "config")
  _check_method(c)
  _check_ranges(c)
  for path, choices in _CHOICES.items():
    if _setting(c, path) not in choices:
      raise ValueError(unknown(f"config.{path}", _setting(c, path), choices))
  _check_loss_implementation(c)
  _check_batch(c)
  _check_engine(c)
  _check_episodes(c)
  _check_evaluated(c)
  _check_trackers(c.log)
  check_optimizer(c.optimizer)


def _check_keys(
  given: ml_collections.ConfigDict, complete: ml_collections.ConfigDict, path: str
) -> None:
  """Raises ValueError for a setting of `given` that `complete` lacks, or the reverse."""
  for key in given:
    name = f"{path}.{key}"
    if key not in complete:
      raise ValueError(_not_a_setting(path, key, complete))
    if isinstance(complete[key], ml_collections.ConfigDict) and name not in _OPEN_SECTIONS:
      _check_keys(given[key], complete[key], name)
  for key in complete:
    if key not in given:
      raise ValueError(f"{path}.{key} is missing; start from sdpo_jax.config.base()")


def _check_ranges(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a number outside its range; `build` checks those of the method."""
  for key in ranges.RANGES:
    if not key.startswith(("method.", "env.", "pretrain.")):
      ranges.check(key, _setting(c, key), setting=f"config.{key}")
  settings = c.env.to_dict()
  check_env_numbers(settings.pop("name"), settings)


def _setting(c: ml_collections.ConfigDict, path: str):
  """Returns the value at "section.key"."""
  value = c
  for key in path.split("."):
    value = value[key]
  return value


def _check_method(c: ml_collections.ConfigDict) -> None:
  keys = {*build.AXES, "name", "policy_share"}
  for key in c.method:
    if key not in keys:
      advice = did_you_mean(key, keys, prefix="config.method.")
      raise ValueError(
        f"config.method.{key} is not a part of a method{advice}; choose from {sorted(keys)}"
      )
  with _with_full_path():
    method = build.build_method(c.method.to_dict())
  if method.contrast is not None and c.rollout.group < 2:
    raise ValueError(
      f"config.rollout.group={c.rollout.group} leaves nothing to contrast a response with: "
      f"config.method.contrast.name={c.method.contrast.name!r} needs groups of 2 or more"
    )


def _check_loss_implementation(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError for an implementation of a divergence that the method does not compute."""
  implementation, signal = c.train.loss_implementation, c.method.token_signal
  if implementation == "auto":
    return
  if signal.name == "none":
    reason = "config.method.token_signal.name is 'none'"
  elif signal.get("top_k"):
    reason = f"config.method.token_signal.top_k={signal.top_k} has one implementation"
  else:
    return
  raise ValueError(
    f"config.train.loss_implementation={implementation!r} would not be read: {reason}"
  )


def response_tokens(c: ml_collections.ConfigDict) -> int:
  """Returns the most tokens that follow a prompt in one text: of a response, or of an episode."""
  if plays(find_env(c.env.name)):
    return c.rollout.max_episode_tokens
  return c.rollout.max_new_tokens


def history_of(c: ml_collections.ConfigDict) -> int | None:
  """Returns the turns that the prompt of a turn shows, where turns are rows; else None."""
  return c.rollout.history if c.rollout.rows_are == "turns" else None


def turn_limit(c: ml_collections.ConfigDict) -> int | None:
  """Returns the most turns of an episode; None where the environment has no such setting."""
  setting = env_settings(c.env.name).get("limit")
  return c.env.get("limit", None if setting is None else setting.default)


def texts_per_response(c: ml_collections.ConfigDict) -> int:
  """Returns the most texts of a response: one, or one a turn where turns are rows."""
  return 1 if history_of(c) is None else _most_turns(c)


def teacher_texts_per_response(c: ml_collections.ConfigDict) -> int:
  """Returns the most texts that a teacher reads of a response: one a turn, if it reads so."""
  return _most_turns(c) if build.reads_turns(c.method) else texts_per_response(c)


def _most_turns(c: ml_collections.ConfigDict) -> int:
  """Returns the most turns of an episode.

  Without a limit of the world they are taken to be as many as one text of the episode would hold.
  """
  return turn_limit(c) or c.rollout.max_episode_tokens // c.rollout.max_new_tokens


def sampled_tokens(c: ml_collections.ConfigDict) -> int:
  """Returns the most tokens that the policy samples in a response, in all of its texts together."""
  if history_of(c) is None:
    return response_tokens(c)
  return texts_per_response(c) * c.rollout.max_new_tokens


def refuse_episodes(c: ml_collections.ConfigDict, what: str) -> None:
  """Raises ValueError where the environment plays episodes. what: cannot be done with them."""
  if plays(find_env(c.env.name)):
    raise ValueError(
      f"{what} asks for single responses, and config.env.name={c.env.name!r} plays episodes"
    )


def _check_episodes(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError for what an environment of episodes cannot be asked for."""
  rollout = c.rollout
  if not plays(find_env(c.env.name)):
    own = "max_episode_tokens", "turn_penalty", "overlap", "rows_are", "history", "keeps_thoughts"
    for key in own:
      if rollout[key] != base().rollout[key]:
        raise ValueError(
          f"config.rollout.{key}={rollout[key]!r} would not be read: "
          f"config.env.name={c.env.name!r} judges responses"
        )
    if build.reads_turns(c.method):
      raise ValueError(
        f"config.method.teacher_context.name={c.method.teacher_context.name!r} reads the turns of "
        f"episodes, and config.env.name={c.env.name!r} judges responses"
      )
    return
  if rollout.max_episode_tokens < rollout.max_new_tokens:
    raise ValueError(
      f"config.rollout.max_episode_tokens={rollout.max_episode_tokens} has no room for a turn of "
      f"config.rollout.max_new_tokens={rollout.max_new_tokens}"
    )
  _check_rows(c)
  if c.method.counterfactual.name != "none":
    refuse_episodes(c, f"config.method.counterfactual.name={c.method.counterfactual.name!r}")
  if c.train.probe_teacher_every_steps:
    every = c.train.probe_teacher_every_steps
    refuse_episodes(c, f"config.train.probe_teacher_every_steps={every}")
  if build.reads_turns(c.method) and c.model.teacher_thinking:
    raise ValueError(
      "config.model.teacher_thinking=True would not be read: "
      f"config.method.teacher_context.name={c.method.teacher_context.name!r} reads turns as the "
      "policy did"
    )


# axis: parts that relate a token to all others of its response
_OF_WHOLE_RESPONSES = {
  "reduction": ("sequence_mean",),
  "surrogate": ("gspo",),
  "token_signal": ("sequence",),
  "token_weight": ("certainty", "prefix_gap", "first_share"),
  "credit": ("cscr", "rhythm"),
}


def _check_rows(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError for what episodes as rows, or turns as rows, cannot be asked for."""
  rollout, rows = c.rollout, f"config.rollout.rows_are={c.rollout.rows_are!r}"
  if rollout.rows_are == "turns":
    for axis, names in _OF_WHOLE_RESPONSES.items():
      if c.method[axis].name in names:
        raise ValueError(
          f"config.method.{axis}.name={c.method[axis].name!r} takes a mean or a share of each "
          f"response, which is a whole episode and no row of {rows}: use rows_are='episodes', or "
          f"another {axis}"
        )
  elif rollout.history != base().rollout.history:
    raise ValueError(
      f"config.rollout.history={rollout.history} would not be read: with {rows} a turn is sampled "
      "after all that comes before it; a window of turns needs rows_are='turns'"
    )
  has_thoughts = c.model.thinking and rollout.rows_are == "episodes"  # in the history
  if has_thoughts and not rollout.keeps_thoughts:
    raise ValueError(
      f"config.model.thinking=True with {rows} keeps thoughts in the history, which chat templates "
      "leave out of earlier turns: set config.rollout.keeps_thoughts=True to train so, or "
      "rows_are='turns', which leaves them out"
    )
  if rollout.keeps_thoughts and not has_thoughts:
    raise ValueError(
      "config.rollout.keeps_thoughts=True would not be read: "
      f"config.model.thinking={c.model.thinking} with {rows} leaves no thoughts in a history"
    )


def check_questions(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError where training would not read the number of questions, or lacks it."""
  questions, memory = c.data.questions, c.method.memory.name
  has_rows = hasattr(find_env(c.env.name), "task_from_row")
  if has_rows and questions:
    raise ValueError(
      f"config.data.questions={questions} would not be read: config.env.name={c.env.name!r} takes "
      "the rows of config.data.sources"
    )
  if c.env.get("stages", 1) > 1 and questions:
    raise ValueError(
      f"config.env.stages={c.env.stages} with config.data.questions={questions}: questions that "
      "come again are shuffled, and the stages with them; set config.data.questions=0"
    )
  if memory != "none" and not has_rows and not questions:
    raise ValueError(
      f"config.method.memory.name={memory!r} remembers questions that come back, and "
      f"config.env.name={c.env.name!r} makes new ones without end: "
      "set config.data.questions, to 512 for example"
    )


def _check_engine(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError for servers that are not asked, and for ones that cannot do what is."""
  engine, server = c.rollout.engine, c.rollout.server
  if engine == "local":
    for key, value in base().rollout.server.items():
      if server[key] != value:
        raise ValueError(
          f"config.rollout.server.{key}={server[key]!r} would not be read: "
          "config.rollout.engine is 'local'"
        )
    return
  if c.rollout.tensor:
    raise ValueError(
      f"config.rollout.tensor={c.rollout.tensor} would not be read: config.rollout.engine="
      f"{engine!r} samples on servers"
    )
  _check_addresses(engine, server)
  _check_fit_for_servers(c)


def _check_addresses(engine: str, server) -> None:
  """Raises ValueError where servers cannot be found, or take no such setting."""
  for key in ("urls", "weights_dir"):
    if not server[key]:
      raise ValueError(f"config.rollout.engine={engine!r} needs config.rollout.server.{key}")
  if not isinstance(server.urls, tuple):
    raise ValueError(f"config.rollout.server.urls={server.urls!r} must be a tuple of addresses")
  for url in server.urls:
    if not re.fullmatch(r"https?://[^/?#\s]+/?", url):
      raise ValueError(
        f"config.rollout.server.urls: {url!r} must have the form http://HOST:PORT, without a path"
      )
  if engine == "sglang" and server.model:
    raise ValueError(
      f"config.rollout.server.model={server.model!r} would not be read: SGLang has one model"
    )


def _check_fit_for_servers(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError for what servers cannot do."""
  engine = c.rollout.engine
  if engine == "vllm" and not c.model.lora.rank:
    raise ValueError(
      "config.rollout.engine='vllm' takes adapters, and config.model.lora.rank=0 trains all "
      "weights: set a rank, or use 'sglang'"
    )
  for source in ("branches", "beams"):
    if source in c.method.counterfactual.get("sources", ()):
      raise ValueError(
        f"config.method.counterfactual.sources holds {source!r}, which needs the entropy of the "
        f"policy, and config.rollout.engine={engine!r} reports none: use 'local'"
      )
  if c.discover.parallel > 1:
    raise ValueError(
      f"config.discover.parallel={c.discover.parallel} with config.rollout.engine={engine!r}: "
      "servers have the weights of one question at a time; use 1"
    )


def _check_evaluated(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError where what a run is to be judged by is never measured."""
  splits, best = tuple(c.eval.splits), c.checkpoint.best
  if best.startswith("eval/"):
    all_splits = dict.fromkeys((*splits, *c.eval.final_splits))
    choices = [f"eval/{split}/{kind}" for split in all_splits for kind in ("avg@k", "pass@k")]
    if best not in choices:
      raise ValueError(unknown("config.checkpoint.best", best, ["auto", "", *choices]))
  elif best not in ("", "auto") and "/" not in best:
    raise ValueError(
      f"config.checkpoint.best={best!r} must be auto, empty, or the name of a metric, group/name"
    )
  # step 0, the base model, is evaluated on the final splits
  if c.train.stop_when_worse and not set(splits[:1]) & set(c.eval.final_splits):
    raise ValueError(
      f"config.train.stop_when_worse={c.train.stop_when_worse} compares the first of "
      f"config.eval.splits={splits} with the base model, which is evaluated on "
      f"config.eval.final_splits={tuple(c.eval.final_splits)}: it has to be one of them"
    )


def _check_trackers(log: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a tracker that nobody knows, and settings that no tracker reads."""
  if not isinstance(log.trackers, tuple):
    raise ValueError(f"config.log.trackers={log.trackers!r} must be a tuple of names")
  for name in log.trackers:
    if name not in SINKS:
      raise ValueError(unknown("config.log.trackers", name, SINKS))
  if len(set(log.trackers)) < len(log.trackers):
    raise ValueError(f"config.log.trackers={log.trackers!r} names a tracker twice")
  if not re.fullmatch(r"[\w.-]{1,128}", log.project):
    raise ValueError(
      f"config.log.project={log.project!r} must be 1 to 128 letters, digits, '_', '-' and '.'"
    )
  for key in ("project", "tracker_timeout_s"):
    if not log.trackers and log[key] != base().log[key]:
      raise ValueError(
        f"config.log.{key}={log[key]!r} would not be read: config.log.trackers is empty"
      )


def _check_batch(c: ml_collections.ConfigDict) -> None:
  """Raises ValueError for groups without a baseline, and rows or steps that do not match."""
  if c.method.advantage.name == "group_mean" and c.rollout.group < 2:
    raise ValueError(
      f"config.rollout.group={c.rollout.group} with advantage 'group_mean': "
      "a group of 1 has no baseline; use at least 2"
    )
  rows = c.rollout.questions * c.rollout.group
  micro_batches = c.train.updates_per_batch * c.train.micro_batches
  if rows % micro_batches:
    raise ValueError(
      f"config.rollout.questions x group = {rows} rows do not divide into "
      f"train.updates_per_batch x micro_batches = {micro_batches}"
    )
  check_schedule(c.optimizer.decay_steps, c.total_steps, c.train.updates_per_batch)


def check_schedule(decay_steps: int, total_steps: int, updates_per_step: int = 1) -> None:
  """Raises ValueError for a run that goes on after its learning rate has fallen to 0."""
  updates = total_steps * updates_per_step
  if 0 < decay_steps < updates:
    raise ValueError(
      f"config.total_steps={total_steps} means {updates} updates, but the learning rate is 0 after "
      f"config.optimizer.decay_steps={decay_steps}: a new run may set both, or decay_steps=0 for a "
      f"constant rate; one that was begun so ends by step {decay_steps // updates_per_step}"
    )


def check_optimizer(o: ml_collections.ConfigDict) -> None:
  """Raises ValueError for settings that train nothing, or away from the gradient."""
  for key in ranges.RANGES:
    section, _, name = key.partition(".")
    if section == "optimizer":
      ranges.check(key, o[name], setting=f"config.{key}")
  if 0 < o.decay_steps <= o.warmup_steps:
    raise ValueError(
      f"config.optimizer.decay_steps={o.decay_steps} must be more than "
      f"config.optimizer.warmup_steps={o.warmup_steps}, or 0 for a constant rate"
    )
