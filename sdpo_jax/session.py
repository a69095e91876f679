"""Opens what a configuration names: model, engine, environment, judges; and closes it again.

What fails here fails because of a setting, a path or this machine. It becomes a SettingError: one
line, before anything is trained.
"""

import contextlib
import ctypes
import dataclasses
import functools
import pathlib
from typing import Any, Callable, Iterable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax import hosts, sharding
from sdpo_jax.config import MODELS, history_of, model_location, response_tokens
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.tasks import RowEnv, check_sources, with_rows
from sdpo_jax.data.teacher_prompt import teacher_prompt
from sdpo_jax.engine import ENGINES
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.engine.remote import ServerSettings
from sdpo_jax.envs.base import find_env, make_env, plays
from sdpo_jax.episodes import Played, Player
from sdpo_jax.errors import blame_settings
from sdpo_jax.model import decoder, lora
from sdpo_jax.model.config import PRESETS, ModelConfig
from sdpo_jax.model.hf_weights import load_pretrained, local_directory, read_config
from sdpo_jax.objectives.build import Method
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.objectives.teacher_weights import TeacherWeights
from sdpo_jax.play import Room
from sdpo_jax.records import Sampling, Task
from sdpo_jax.rollout import Collector
from sdpo_jax.sandbox import Sandbox
from sdpo_jax.train_step import TrainState, init_state
from sdpo_jax.workdir import change_of_rows, rows_of_run


class Session(NamedTuple):
  """What training and evaluation share: a model that samples, an environment that judges it."""

  chat: Chat
  model: ModelConfig
  params: Any
  collector: Collector
  eval_sampling: Sampling
  isolation: str
  adapters: lora.Lora | None  # None: all weights are trained
  mesh: jax.sharding.Mesh | None  # None: one device
  # The collector and weights of a model that alternatives are drawn from; None: no method asks.
  second_model: tuple[Collector, Any] | None = None

  def fresh_state(self, trained, tx, teacher: TeacherWeights) -> TrainState:
    """Returns the state before the first step, each array made where it belongs."""
    make = functools.partial(
      init_state, tx=tx, keep_teacher=teacher.keep, teacher_in_float32=teacher.in_float32
    )
    if self.mesh is None:
      return make(trained)
    if self.adapters is None:
      axes = decoder.axes(self.model)
    else:
      axes = lora.axes(self.model, self.adapters)
    shardings = sharding.state_shardings(self.mesh, jax.eval_shape(make, trained), axes)
    return jax.jit(make, out_shardings=shardings)(trained)

  @property
  def everywhere(self) -> jax.NamedSharding | None:
    """The sharding of what every process reads: metrics, scores."""
    return None if self.mesh is None else jax.NamedSharding(self.mesh, jax.P())

  def trainable(self, seed: int) -> tuple[Any, Any]:
    """Returns (what training moves, what it stands on).

    These are fresh adapters and the loaded weights, or the weights and None.
    """
    if self.adapters is None:
      return self.params, None
    return lora.init(self.model, self.adapters, jax.random.key(seed)), self.params

  @property
  def join(self) -> Callable | None:
    """For `make_signals`: joins adapters with their base; None where all weights are trained."""
    return None if self.adapters is None else functools.partial(lora.attach, lora=self.adapters)

  def weights(self, params, frozen) -> Any:
    """Returns weights as sampling wants them: plain ones, or adapters for an engine of these."""
    if self.adapters is None or self.collector.engine.takes_adapters:
      return params
    return _merge(frozen, params, self.adapters)


_merge = jax.jit(lora.merge, static_argnums=2)


class Loaded(NamedTuple):
  """A model with its weights, on the mesh if there is one, and its tokens."""

  model: ModelConfig
  params: Any
  chat: Chat


@contextlib.contextmanager
def open_session(
  c,
  path: str | None = None,
  *,
  devices=None,
  method: Method | None = None,
  splits: dict[str, str] | None = None,
  check_stop: Callable[[], None] = lambda: None,
):
  """Yields a Session: loaded model, sandbox, environment and judges, which end with it.

  path: a Hugging Face directory instead of config.model.path.
  devices: those that config.mesh is laid over; None: all.
  method: the one that will be trained; None where nothing is. What it generates beside rollouts has
    to fit, and the second model of its notes is loaded beside. Questions of the split train have to
    fit into the teacher's prompt too, if the method has a teacher.
  splits: {split: what asks for it} of the splits that are read; None: those of `splits_of`.
  check_stop: the collectors call it between their phases; it may raise.
  """
  second_name = method.notes.model if method is not None and method.notes is not None else ""
  with contextlib.ExitStack() as stack:
    stack.enter_context(released_by_the_compiler())
    with blame_settings():
      path = path or model_location(c.model.path)
      mesh = _enter_mesh(c, devices, stack)
      adapters = lora.from_settings(c.model)
      splits = splits_of(c) if splits is None else splits
      if c.data.sources:
        check_sources(c.data.sources, splits)
      policy = load(c, path, mesh)
      check_positions(longest_texts(c, method), policy.model, path)
      second = load_second(c, second_name, mesh) if second_name else None
      env, isolation = _open_env(c, splits, stack, policy.chat, second and second.chat, method)
      engine = _policy_engine(c, policy, path, mesh, stack)
      collector = stack.enter_context(_collecting(c, env, policy, engine, check_stop))
      second_model = None
      if second is not None:
        engine = _local_engine(c, second, mesh)
        second_collector = stack.enter_context(_collecting(c, env, second, engine, check_stop))
        second_model = second_collector, second.params
    eval_sampling = Sampling(
      c.rollout.max_new_tokens,
      c.eval.temperature,
      c.eval.top_p,
      policy.chat.stop_tokens,
      wants_logp=False,
    )
    yield Session(
      chat=policy.chat,
      model=policy.model,
      params=policy.params,
      collector=collector,
      eval_sampling=eval_sampling,
      isolation=isolation,
      adapters=adapters,
      mesh=mesh,
      second_model=second_model,
    )


@contextlib.contextmanager
def over_other_questions(
  c, session: Session, splits: dict[str, str], check_stop: Callable[[], None]
):
  """Yields a collector of the session's model over the environment and limits of `c`.

  splits, check_stop: as for open_session.
  """
  loaded = Loaded(session.model, session.params, session.chat)
  with contextlib.ExitStack() as stack:
    with blame_settings():
      check_sampling(c, session.model, session.mesh)
      check_positions(longest_texts(c, None)[:1], session.model, "the model")
      env, _ = _open_env(c, splits, stack, session.chat)
      engine = session.collector.engine
      if c.rollout.engine == "local":  # with rows of its own
        engine = _local_engine(c, loaded, session.mesh)
      collector = stack.enter_context(_collecting(c, env, loaded, engine, check_stop))
    yield collector


def _enter_mesh(c, devices, stack: contextlib.ExitStack) -> jax.sharding.Mesh | None:
  """Lays config.mesh over the devices for the time of the session; None for a single device."""
  mesh = sharding.make_mesh(jax.devices() if devices is None else devices, **c.mesh)
  mesh = None if mesh.size == 1 else mesh
  if mesh is not None and c.train.loss_implementation == "reference":
    raise ValueError(
      "config.train.loss_implementation='reference' is for one device, "
      f"and config.mesh lays the run over {mesh.size}: use 'xla'"
    )
  if mesh is not None:
    hosts.connect(mesh)
    stack.enter_context(jax.set_mesh(mesh))
  return mesh


def splits_of(c) -> dict[str, str]:
  """{split: the setting that names it} of every split that the run reads."""
  splits = {"train": "training"}
  for setting in ("splits", "final_splits"):
    for split in c.eval[setting]:
      splits.setdefault(split, f"config.eval.{setting}")
  return splits


def _open_env(
  c,
  splits: dict[str, str],
  stack: contextlib.ExitStack,
  policy: Chat,
  second: Chat | None = None,
  method: Method | None = None,
) -> tuple[Any, str]:
  """Returns (environment with its rows, isolation of its sandbox); the stack closes them.

  Raises ValueError for a split that is not there and a question that is too long.
  """
  sandbox = stack.enter_context(Sandbox(workers=c.sandbox.workers, isolation=c.sandbox.isolation))
  env = _opened(c, sandbox, stack)
  env = Played(env) if plays(env) else env
  lengths = _LengthCheck(c, env, policy, second, method)
  env = with_rows(
    env, c.data.sources, splits=splits, on_bad_row=c.data.on_bad_row, check=lengths.check
  )
  # A split that is not there, a question too long: now, not at the first evaluation.
  for split in splits:
    lengths.check(env.task(split, 0))
  return env, sandbox.isolation


def _opened(c, sandbox: Sandbox, stack: contextlib.ExitStack):
  env = make_env(sandbox=sandbox, **c.env)
  stack.callback(getattr(env, "close", lambda: None))
  getattr(env, "open", lambda: None)()
  return env


class _LengthCheck:
  """Checks that a question fits every model that will read it."""

  def __init__(self, c, env, policy: Chat, second: Chat | None, method: Method | None):
    self._settings, self._env, self._policy, self._second = c, env, policy, second
    self._rendered_roles: set[tuple[str, ...]] = set()
    # The shortest prompt that the teacher can have: all that may be shortened is left out.
    self._empty_context = None
    if method is not None and method.needs_teacher:
      self._empty_context = Context(
        templates=getattr(method.teacher_context, "templates", ()),
        remark=getattr(method.teacher_context, "remark", ""),
      )

  def check(self, task: Task) -> None:
    """Raises ValueError for a question that is too long for one of its readers.

    SettingError where a chat template does not render conversations of this form.
    """
    messages = self._env.prompt(task)
    roles = tuple(message["role"] for message in messages)
    if roles not in self._rendered_roles:
      for chat in filter(None, (self._policy, self._second)):
        chat.check(messages)
      self._rendered_roles.add(roles)
    self._check_prompt(task, self._policy, "")
    if task.split != "train":
      return
    if self._second is not None:
      name = self._settings.method.counterfactual.model
      self._check_prompt(task, self._second, f" of config.method.counterfactual.model={name}")
    if self._empty_context is not None:
      limit = self._settings.data.max_teacher_tokens
      teacher_prompt(self._policy, messages, self._empty_context, limit)

  def _check_prompt(self, task: Task, chat: Chat, whose: str) -> None:
    length = len(chat.prompt_tokens(self._env.prompt(task)))
    limit = self._settings.data.max_prompt_tokens
    if length > limit:
      raise ValueError(
        f"the question takes {length} tokens{whose}, "
        f"more than config.data.max_prompt_tokens={limit}"
      )


def _collecting(
  c, env, loaded: Loaded, engine, check_stop: Callable[[], None]
) -> contextlib.AbstractContextManager:
  """The collector or player of one model, with the limits of the configuration."""
  if plays(env):
    player = Player(
      env,
      loaded.chat,
      engine,
      Room(c.data.max_prompt_tokens, c.rollout.max_episode_tokens, history_of(c)),
      threads=c.rollout.judge_threads,
      timeout_s=c.rollout.judge_timeout_s,
      check_stop=check_stop,
    )
    return contextlib.closing(player)
  collector = Collector(
    env,
    loaded.chat,
    engine,
    max_prompt_tokens=c.data.max_prompt_tokens,
    judge_threads=c.rollout.judge_threads,
    judge_timeout_s=c.rollout.judge_timeout_s,
    check_stop=check_stop,
  )
  return contextlib.closing(collector)


def _policy_engine(c, policy: Loaded, path: str, mesh, stack: contextlib.ExitStack):
  """Returns the engine of config.rollout.engine; the stack closes one that asks servers.

  Raises ValueError for servers that are not fit.
  """
  if c.rollout.engine == "local":
    return _local_engine(c, policy, mesh)
  engine = ENGINES[c.rollout.engine](
    policy.model,
    ServerSettings(**c.rollout.server),
    base=policy.params,
    path=path,
    adapters=lora.from_settings(c.model),
  )
  stack.callback(engine.close)
  sampling = Sampling(
    c.rollout.max_new_tokens, c.rollout.temperature, c.rollout.top_p, policy.chat.stop_tokens
  )
  engine.start(sampling, c.data.max_prompt_tokens + response_tokens(c))
  return engine


def _local_engine(c, loaded: Loaded, mesh) -> LocalEngine:
  return LocalEngine.on_mesh(
    check_sampling(c, loaded.model, mesh),
    loaded.model,
    rows=c.rollout.rows,
    chunk=c.rollout.chunk,
    text_of=loaded.chat.plain_text,
    deterministic=not c.rollout.overlap,
  )


def load(c, path: str, mesh) -> Loaded:
  """Loads a Hugging Face directory or hub id in the types of config.model.

  Raises ValueError or OSError for one that cannot be read, or that the mesh does not divide.
  """
  model, params = load_pretrained(path, dtype=c.model.param_dtype, mesh=mesh)
  chat = Chat(
    load_tokenizer(path),
    thinking=c.model.thinking,
    teacher_thinking=c.model.teacher_thinking,
    eos_ids=model.eos_ids,
  )
  check_tokens(chat, model, path)
  return Loaded(dataclasses.replace(model, dtype=c.model.dtype), params, chat)


def check_tokens(chat: Chat, model: ModelConfig, path: str) -> None:
  """Raises ValueError for a tokenizer that does not belong to the model's embedding.

  Checkpoints pad the embedding, so that it has a few rows more than there are tokens. A token
  without a row would silently read that of another one.
  """
  tokens, rows = chat.tokenizer.get_vocab(), model.vocab
  if not chat.stop_tokens:
    raise ValueError(
      f"neither the tokenizer of {path} (eos_token) nor its generation_config.json (eos_token_id) "
      "names a token that ends a response"
    )
  highest = max(*tokens.values(), *chat.stop_tokens)
  if highest >= rows or len(tokens) < rows * 3 / 4:
    raise ValueError(
      f"the tokenizer of {path} has {len(tokens)} tokens, numbered up to {highest}, and the "
      f"model's embedding {rows} rows: they belong to different models"
    )


def load_second(c, path: str, mesh) -> Loaded:
  """Loads the model that alternatives are drawn from.

  It reads questions and answers them, and never sees a teacher's prompt.
  """
  try:
    loaded = load(c, model_location(path), mesh)
    check_positions(longest_texts(c, None)[:1], loaded.model, path)
  except (ValueError, OSError) as error:
    raise ValueError(f"config.method.counterfactual.model={path!r}: {error}") from error
  return loaded


def model_shape(path: str) -> ModelConfig:
  """Returns the shape of a named model, a directory or a hub id, without its weights.

  A named one needs no hub.
  """
  if path in PRESETS:
    return PRESETS[path]
  return read_config(local_directory(model_location(path, {**PRESETS, **MODELS})))


# ---- checks of rows ------------------------------------------------------------------------------


def same_rows(workdir: pathlib.Path, env, splits: Iterable[str], *, begun: bool) -> dict[str, dict]:
  """Returns the fingerprints of all rows that the work directory has met, for its run.json.

  An environment that makes its questions has none. Raises ValueError, in every process of the run,
  where one of them would go on with other rows than the run was begun with.
  """
  now = {split: env.fingerprint(split) for split in splits} if isinstance(env, RowEnv) else {}
  change = change_of_rows(workdir, now) if begun else None
  # process 0 changes run.json later: after all have read it
  changes = [change for change in hosts.share(change) if change]
  if changes:
    raise ValueError(changes[0])
  return rows_of_run(workdir) | now


# ---- checks of lengths --------------------------------------------------------------------------


def longest_texts(c, method: Method | None) -> list[tuple[int, str]]:
  """Returns (tokens, the settings that make them) of the longest texts of a model.

  Each is read and written in one piece. Rollouts come first. method: None where nothing is trained.
  """
  prompt_tokens, new_tokens = c.data.max_prompt_tokens, response_tokens(c)
  teacher_tokens = c.data.max_teacher_tokens
  prompt = f"config.data.max_prompt_tokens={prompt_tokens}"
  teacher = f"config.data.max_teacher_tokens={teacher_tokens}"
  limit = "max_episode_tokens" if plays(find_env(c.env.name)) else "max_new_tokens"
  new = f"config.rollout.{limit}={new_tokens}"
  texts = [
    (prompt_tokens + new_tokens, f"{prompt} and {new}"),
    (teacher_tokens + new_tokens, f"{teacher} and {new}"),
  ]
  if method is None:
    return texts
  if method.hint_tokens:
    hints = f"config.method.teacher_context.hint_tokens={method.hint_tokens}"
    tokens = teacher_tokens + new_tokens + method.hint_tokens
    texts.append((tokens, f"{teacher}, {new} and {hints}"))
  where, notes = "config.method.counterfactual", method.notes
  if notes is not None and notes.feedback == "imagined":
    imagined = f"{where}.imagined_tokens={notes.imagined_tokens}"
    texts.append((teacher_tokens + notes.imagined_tokens, f"{teacher} and {imagined}"))
  if notes is not None and notes.branches:
    # A branch begins with the attempt up to its position, and may be as long again.
    sources = f"{where}.sources={notes.sources}"
    texts.append((prompt_tokens + 2 * new_tokens, f"{prompt} and twice {new}, for {sources},"))
  return texts


def check_positions(texts: list[tuple[int, str]], model: ModelConfig, path: str) -> None:
  """Raises ValueError for a text of `longest_texts` that the model has too few positions for."""
  for tokens, settings in texts:
    if tokens > model.max_positions:
      raise ValueError(f"{settings} together exceed the {model.max_positions} positions of {path}")


def check_sampling(c, model: ModelConfig, mesh) -> sharding.SamplingMesh | None:
  """Returns the mesh that a model samples on.

  Raises ValueError where it does not divide the weights, or what is decoded together.
  """
  sampling = sharding.sampling_mesh(mesh, c.rollout.tensor)
  if sampling is None and c.rollout.tensor > 1:
    raise ValueError(
      f"config.rollout.tensor={c.rollout.tensor} needs so many devices, and config.mesh lays the "
      "run over one"
    )
  if sampling is None:
    return None
  setting = "config.rollout" if c.rollout.tensor else "config.mesh"
  decoder.check_mesh(model, sampling.whole, setting=setting)
  shards = sharding.row_shards(sampling.whole)
  if c.rollout.rows % shards:
    raise ValueError(
      f"config.rollout.rows={c.rollout.rows} does not divide among the {shards} parts of "
      "config.mesh that sample, each with a copy of the weights"
    )
  return sampling


# ---- other devices ------------------------------------------------------------------------------


@contextlib.contextmanager
def on_other_devices(c, session: Session, devices):
  """Yields the session with a copy of its weights on other devices, for a thread of its own.

  It has an engine and judging threads of its own; environment and sandbox are shared.
  """
  mesh = sharding.make_mesh(devices, **c.mesh)
  mesh = None if mesh.size == 1 else mesh
  # Either holds for this thread alone.
  placed = jax.default_device(devices[0]) if mesh is None else jax.set_mesh(mesh)
  with placed:
    if mesh is None:
      params = uncommitted(session.params)
    else:
      places = sharding.named(mesh, decoder.axes(session.model))
      params = jax.device_put(session.params, places)
    first = session.collector
    loaded = Loaded(session.model, params, session.chat)
    engine = _local_engine(c, loaded, mesh)
    with _collecting(c, first.env, loaded, engine, first.check_stop) as collector:
      yield session._replace(params=params, collector=collector, mesh=mesh)


def uncommitted(params):
  """Copies weights to the default device uncommitted; jit would recompile for committed arrays."""
  return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)


# ---- memory -------------------------------------------------------------------------------------


@contextlib.contextmanager
def released_by_the_compiler():
  """Gives back to the system what a compilation of more than a second has freed.

  glibc keeps it: 0.5 GB after the train step of an eight-layer model.
  """
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none

  def trim_after_compiling(event: str, seconds: float, **_) -> None:
    if trim is not None and seconds > 1 and event.endswith("backend_compile_duration"):
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(trim_after_compiling)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(trim_after_compiling)
