"""From a configuration to the things that it names: model, sampler, environment, judges; and the files that describe a run.

What fails here fails because of a setting, a path or this machine, and becomes a SettingError: one line, before anything is trained.
"""

import contextlib
import ctypes
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax import sharding
from sdpo_jax.config import MODELS
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.tasks import check_sources, with_rows
from sdpo_jax.data.teacher_prompt import teacher_prompt
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.envs.base import make_env
from sdpo_jax.errors import blame_settings
from sdpo_jax.model import decoder, lora
from sdpo_jax.model.config import PRESETS, ModelConfig
from sdpo_jax.model.hf_weights import load_pretrained, local_directory, read_config
from sdpo_jax.objectives import build
from sdpo_jax.objectives.notes import Part
from sdpo_jax.objectives.teacher_context import Context, own_templates
from sdpo_jax.objectives.teacher_weights import TeacherWeights
from sdpo_jax.records import Sampling
from sdpo_jax.rollout import Collector
from sdpo_jax.sandbox import Sandbox
from sdpo_jax.train_step import TrainState, init_state


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
    stack.enter_context(released_by_the_compiler())
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

      shown = build.part_settings(c.method.to_dict(), "teacher_context")
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
        engine = LocalEngine(
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


def model_shape(path: str) -> ModelConfig:
  """The shape of a named model, of a directory or of a hub id, without its weights; a named one needs no hub."""
  return PRESETS[path] if path in PRESETS else read_config(local_directory(MODELS.get(path, path)))


@contextlib.contextmanager
def released_by_the_compiler():
  """What a compilation of more than a second has freed goes back to the system: glibc keeps it, 0.5 GB after the train step of an eight-layer model."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none

  def ended(event: str, seconds: float, **_) -> None:
    if trim is not None and seconds > 1 and event.endswith("backend_compile_duration"):
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(ended)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(ended)
