"""From a configuration to the things that it names: model, sampler, environment, judges; and the files that describe a run.

What fails here fails because of a setting, a path or this machine, and becomes a SettingError: one line, before anything is trained.
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import importlib.metadata
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax import checkpoint, counterfactual, memory, sharding
from sdpo_jax.config import MODELS
from sdpo_jax.data.batch import teacher_prompt
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.tasks import check_sources, with_rows
from sdpo_jax.envs.base import make_env
from sdpo_jax.envs.sandbox import Sandbox
from sdpo_jax.metrics import write_atomically
from sdpo_jax.model import decoder, lora
from sdpo_jax.model.config import PRESETS, ModelConfig
from sdpo_jax.model.hf_weights import load_pretrained, local_directory, read_config
from sdpo_jax.objectives import methods
from sdpo_jax.objectives.counterfactual import Part, readings
from sdpo_jax.objectives.loss import Objective, make_objective
from sdpo_jax.objectives.methods import TeacherWeights
from sdpo_jax.objectives.teacher_context import Context, own_templates
from sdpo_jax.records import Sampling
from sdpo_jax.rollout import Collector
from sdpo_jax.sampler import Sampler
from sdpo_jax.train_step import (
  TrainState,
  init_state,
  make_optimizer,
  make_score,
  make_signals,
  make_train_step,
)


class SettingError(ValueError):
  """A setting, a path or this machine does not allow the run; raised before anything is trained."""


class RunError(Exception):
  """The run cannot go on; the message says what happened and what is intact."""


@contextlib.contextmanager
def blame_settings():
  """What fails while a run is being wired fails because of what it was given: one line, not a traceback."""
  try:
    yield
  except (ValueError, OSError, RuntimeError) as error:
    raise SettingError(str(error)) from error


@contextlib.contextmanager
def blame_disk(workdir):
  """No room where the work directory is written (disk, quota, limit of a file's size) is a RunError: one line, not a traceback."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise
    step = checkpoint.latest_step(workdir)
    raise RunError(
      f"{error.strerror}: {error.filename or workdir} could not be written. Make room, then run the same command again: "
      + (
        "it goes on from what is complete"
        if step is None
        else f"it goes on from the checkpoint of step {step}, the last complete one"
      )
    ) from error


class Wired(NamedTuple):
  """What training and evaluation share: a model that samples, and an environment that judges it."""

  chat: Chat
  model: ModelConfig
  params: Any
  collector: Collector
  eval_sampling: Sampling
  isolation: str
  adapters: lora.Lora | None  # None: all weights are trained
  mesh: jax.sharding.Mesh | None  # None: one device
  # a second model, with its weights, that alternatives are drawn from; None: the method asks for
  # none
  other: tuple[Collector, Any] | None = None

  def fresh_state(self, trained, tx, teacher: TeacherWeights) -> TrainState:
    """init_state, each array made where it belongs."""
    make = lambda p: init_state(p, tx, keep_teacher=teacher.keep, teacher_move=teacher.move)
    if self.mesh is None:
      return make(trained)
    axes = (
      decoder.axes(self.model) if self.adapters is None else lora.axes(self.model, self.adapters)
    )
    return jax.jit(
      make, out_shardings=sharding.state_shardings(self.mesh, jax.eval_shape(make, trained), axes)
    )(trained)

  @property
  def everywhere(self) -> jax.NamedSharding | None:
    """What every process reads: metrics, scores."""
    return None if self.mesh is None else jax.NamedSharding(self.mesh, jax.P())

  def trainable(self, seed: int) -> tuple[Any, Any]:
    """(what training moves, what it stands on): fresh adapters and the loaded weights, or the weights and None."""
    if self.adapters is None:
      return self.params, None
    return lora.init(self.model, self.adapters, jax.random.key(seed)), self.params

  @property
  def join(self):
    """For make_signals: the decoder's weights from the two; None where all weights are trained."""
    return None if self.adapters is None else functools.partial(lora.attach, lora=self.adapters)

  def weights(self, params, frozen) -> Any:
    """Plain weights, as sampling wants them."""
    return params if self.adapters is None else _merge(frozen, params, self.adapters)


_merge = jax.jit(lora.merge, static_argnums=2)


def longest_texts(c, part: Part | None) -> list[tuple[int, str]]:
  """(tokens, the settings that make them) of whatever a model may have to read and write in one piece; rollouts come first."""
  prompt, teacher, new = (
    f"config.{name}={value}"
    for name, value in (
      ("data.max_prompt_tokens", c.data.max_prompt_tokens),
      ("data.max_teacher_tokens", c.data.max_teacher_tokens),
      ("rollout.max_new_tokens", c.rollout.max_new_tokens),
    )
  )
  found = [
    (c.data.max_prompt_tokens + c.rollout.max_new_tokens, f"{prompt} and {new}"),
    (c.data.max_teacher_tokens + c.rollout.max_new_tokens, f"{teacher} and {new}"),
  ]
  if part is not None and part.feedback == "imagined":
    found.append(
      (
        c.data.max_teacher_tokens + part.imagined_tokens,
        f"{teacher} and config.method.counterfactual.imagined_tokens={part.imagined_tokens}",
      )
    )
  # one begins with the attempt up to there and may be as long again
  if part is not None and "branches" in part.sources:
    found.append(
      (
        c.data.max_prompt_tokens + 2 * c.rollout.max_new_tokens,
        f"{prompt} and twice {new}, for config.method.counterfactual.sources={part.sources},",
      )
    )
  return found


def check_positions(texts: list[tuple[int, str]], model: ModelConfig, path: str) -> None:
  """texts: from longest_texts. ValueError for one that has more tokens than the model has positions."""
  for tokens, settings in texts:
    if tokens > model.max_positions:
      raise ValueError(f"{settings} together exceed the {model.max_positions} positions of {path}")


def check_rows(c, shards: int) -> None:
  """ValueError where the sequences that are decoded together do not divide among the mesh's row shards."""
  if c.rollout.rows % shards:
    raise ValueError(
      f"config.rollout.rows={c.rollout.rows} does not divide among the {shards} row shards of config.mesh"
    )


class Loaded(NamedTuple):
  """A model with its weights, on the mesh if there is one, and its tokens."""

  model: ModelConfig
  params: Any
  chat: Chat


def load(c, path: str, mesh) -> Loaded:
  """From a Hugging Face directory or hub id, in the types of config.model. ValueError or OSError for one that cannot be read, or that the mesh does not divide."""
  model, params = load_pretrained(path, dtype=c.model.param_dtype, mesh=mesh)
  chat = Chat(
    load_tokenizer(path),
    thinking=c.model.thinking,
    teacher_thinking=c.model.teacher_thinking,
    eos_ids=model.eos_ids,
  )
  return Loaded(dataclasses.replace(model, dtype=c.model.dtype), params, chat)


def load_second(c, path: str, mesh) -> Loaded:
  """The model that alternatives are drawn from: it reads questions and answers them, and never sees a teacher's prompt."""
  try:
    loaded = load(c, MODELS.get(path, path), mesh)
    check_positions(longest_texts(c, None)[:1], loaded.model, path)
  except (ValueError, OSError) as error:
    raise ValueError(f"config.method.counterfactual.model={path!r}: {error}") from error
  return loaded


@contextlib.contextmanager
def wired(c, path: str | None = None, devices=None, part: Part | None = None, taught: bool = False):
  """Loads the model (config.model.path, or another Hugging Face directory) and starts sandbox, environment and judges; ends them on leaving.

  devices: those that config.mesh is laid over; None: all. part: the method's counterfactual one, if alternatives are to be explored: what it
  generates has to fit as well, and its second model, if it names one, is loaded beside. taught: the method's teacher will read the questions of the
  split train, so these have to fit into its prompt too.
  """
  path = path or MODELS.get(c.model.path, c.model.path)
  with contextlib.ExitStack() as stack:
    stack.enter_context(memory.released_by_the_compiler())
    with blame_settings():
      mesh = sharding.make_mesh(jax.devices() if devices is None else devices, **c.mesh)
      mesh = None if mesh.size == 1 else mesh
      shards = sharding.row_shards(mesh)
      if mesh is not None and c.train.loss_implementation == "reference":
        raise ValueError(
          f"config.train.loss_implementation='reference' is for one device, and config.mesh lays the run over {mesh.size}: use 'xla'"
        )
      check_rows(c, shards)
      if mesh is not None:
        stack.enter_context(jax.set_mesh(mesh))
      adapters = lora.from_settings(c.model)
      splits = {"train": "training"}
      for setting in ("splits", "final_splits"):
        splits |= {
          split: f"config.eval.{setting}" for split in c.eval[setting] if split not in splits
        }
      if c.data.sources:
        check_sources(c.data.sources, splits)
      model, params, chat = load(c, path, mesh)
      check_positions(longest_texts(c, part), model, path)
      readers, second = [(chat, "")], None
      if part is not None and part.model:
        second = load_second(c, part.model, mesh)
        readers.append((second.chat, f" of config.method.counterfactual.model={part.model}"))
      sandbox = stack.enter_context(
        Sandbox(workers=c.sandbox.workers, isolation=c.sandbox.isolation)
      )
      env = make_env(sandbox=sandbox, **c.env)
      stack.callback(getattr(env, "close", lambda: None))
      getattr(env, "start", lambda: None)()

      shown = methods.arguments(c.method.to_dict(), "teacher_context")
      taught, templates = (
        taught and c.method.teacher_context.name != "none",
        own_templates(shown.get("templates", {})),
      )

      def fits(task):
        for reader, whose in readers if task.split == "train" else readers[:1]:
          length = len(reader.prompt_tokens(env.prompt(task)))
          if length > c.data.max_prompt_tokens:
            raise ValueError(
              f"the question takes {length} tokens{whose}, more than config.data.max_prompt_tokens={c.data.max_prompt_tokens}"
            )
        if taught and task.split == "train":
          # all that may be shortened left out
          teacher_prompt(
            chat, env.prompt(task), Context(templates=templates), c.data.max_teacher_tokens
          )

      asked = with_rows(
        env, c.data.sources, splits=splits, on_bad_row=c.data.on_bad_row, check=fits
      )
      # a split that is not there, a question too long: now, not at the first evaluation
      for split in splits:
        fits(asked.task(split, 0))

      def collecting(model, chat):
        engine = Sampler(
          model,
          rows=c.rollout.rows,
          row_multiple=shards,
          chunk=c.rollout.chunk,
          prompt_multiple=c.data.length_multiple,
          pad_token=chat.pad_token,
        )
        return stack.enter_context(contextlib.closing(make_collector(c, asked, chat, engine)))

      collector = collecting(model, chat)
      other = None if second is None else (collecting(second.model, second.chat), second.params)
    yield Wired(
      chat,
      model,
      params,
      collector,
      Sampling(c.rollout.max_new_tokens, c.eval.temperature, c.eval.top_p, chat.stop_tokens),
      sandbox.isolation,
      adapters,
      mesh,
      other,
    )


def make_collector(c, env, chat: Chat, engine) -> Collector:
  return Collector(
    env,
    chat,
    engine,
    max_prompt_tokens=c.data.max_prompt_tokens,
    judge_threads=c.rollout.judge_threads,
    judge_timeout_s=c.rollout.judge_timeout_s,
  )


@contextlib.contextmanager
def on_other_devices(c, w: Wired, devices):
  """The same on other devices, for a thread of its own: a copy of the weights and other judging threads; environment and sandbox are shared."""
  mesh = sharding.make_mesh(devices, **c.mesh)
  mesh = None if mesh.size == 1 else mesh
  # both hold for this thread alone
  with jax.default_device(devices[0]) if mesh is None else jax.set_mesh(mesh):
    params = (
      uncommitted(w.params)
      if mesh is None
      else jax.device_put(w.params, sharding.named(mesh, decoder.axes(w.model)))
    )
    with contextlib.closing(
      make_collector(c, w.collector.env, w.chat, w.collector.engine)
    ) as collector:
      yield w._replace(params=params, collector=collector, mesh=mesh)


def uncommitted(params):
  """The same on the default device, as loaded weights are: a program is compiled anew for weights that were sent somewhere."""
  return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)


class Learner(NamedTuple):
  """A method as what training compiles. step(state, batch, frozen), score(state, batch, frozen): not jitted yet."""

  objective: Objective
  parts: dict
  teacher: TeacherWeights
  tx: Any
  step: Any
  score: Any
  # several updates a batch: log-probabilities from before the first one are needed
  score_first: bool
  explore: Any  # finds the alternatives of failed rollouts; None: the method asks for none
  counterfactual: Any  # what the teacher reads of them, for `pack`; None likewise
  readings: int  # further ones by the teacher of each batch; 0 likewise


def learner(c, model: ModelConfig, join=None) -> Learner:
  """From the settings of method, optimiser and training."""
  method = c.method.to_dict()
  objective, parts = make_objective(method), methods.build(method)
  teacher, tx = parts["teacher_weights"](), make_optimizer(**c.optimizer)
  signals = make_signals(
    model,
    objective,
    mix=teacher.mix,
    temperature=c.rollout.temperature,
    remat=c.model.remat,
    join=join,
    implementation=None if c.train.loss_implementation == "auto" else c.train.loss_implementation,
  )
  several = c.train.updates_per_batch > 1
  part, explore, told = parts["counterfactual"](), None, None
  if part is not None:
    shown = methods.arguments(method, "teacher_context")
    explore = functools.partial(
      counterfactual.explore, part, success_threshold=shown["success_threshold"]
    )
    told = functools.partial(
      readings,
      part,
      parts["teacher_context"],
      **{key: shown[key] for key in ("success_threshold", "show_attempt", "templates")},
    )
  step = make_train_step(
    signals,
    objective,
    tx,
    teacher_move=teacher.move,
    updates=c.train.updates_per_batch,
    recompute_old=several,
  )
  return Learner(
    objective,
    parts,
    teacher,
    tx,
    step,
    make_score(signals),
    several,
    explore,
    told,
    part.readings if part else 0,
  )


def model_shape(path: str) -> ModelConfig:
  """The shape of a named model, of a directory or of a hub id, without its weights; a named one needs no hub."""
  return PRESETS[path] if path in PRESETS else read_config(local_directory(MODELS.get(path, path)))


def same_run(workdir: pathlib.Path, c, *, begun: bool) -> None:
  """A work directory belongs to one configuration; only the number of steps and that of questions at a time may change. ValueError names the first difference."""
  path = workdir / "config.json"
  if not begun or not path.exists():
    return
  flat = lambda d, prefix="config": {
    k2: v2
    for k, v in d.items()
    for k2, v2 in (
      flat(v, f"{prefix}.{k}") if isinstance(v, dict) else {f"{prefix}.{k}": v}
    ).items()
  }
  before, now = flat(json.loads(path.read_text())), flat(json.loads(json.dumps(c.to_dict())))
  for key in sorted(before.keys() | now.keys()):
    if key not in ("config.total_steps", "config.discover.parallel") and before.get(key) != now.get(
      key
    ):
      raise ValueError(
        f"{key}={now.get(key)!r} but {workdir} was begun with {before.get(key)!r}: choose another --workdir, or the same settings"
      )


def describe_run(workdir: pathlib.Path, c, extra: dict) -> None:
  """config.json (resolved) and run.json (command, commit, versions, devices, seed), before anything is trained. A resumed run adds a start."""
  path = workdir / "run.json"
  earlier = json.loads(path.read_text()).get("started", []) if path.exists() else []
  git = shutil.which("git")  # an installed package has neither git nor a commit
  commit = (
    git
    and subprocess.run(
      [git, "-C", os.path.dirname(__file__), "rev-parse", "HEAD"],
      capture_output=True,
      text=True,
      check=False,
    ).stdout.strip()
  )
  packages = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "grain",
    "numpy",
  )
  about = {
    "command": shlex.join([os.path.basename(sys.executable), "-m", "sdpo_jax.main", *sys.argv[1:]]),
    "commit": commit or None,
    "started": earlier
    + [datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")],
    "python": sys.version.split()[0],
    "versions": {p: importlib.metadata.version(p) for p in packages},
    "devices": [str(d) for d in jax.devices()],
    "seed": c.seed,
  } | extra
  write_atomically(path, json.dumps(about, indent=2) + "\n")
  write_atomically(workdir / "config.json", json.dumps(c.to_dict(), indent=2) + "\n")
