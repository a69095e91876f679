"""Trains: the loop, and what one run of it needs.

The loop reads as a sentence: questions -> judged groups -> batch -> step -> metrics and checkpoint.
It owns time, files and failure and does no arithmetic on weights. What each step does is a function
of configuration, step, weights and data position. All of these are in the checkpoint, so a killed
and resumed run writes the same metrics.jsonl.

Metrics of step i belong to the i-th generation batch (from 1) and, where due, to the evaluation
after it. Step 0 is the evaluation of the base model.
"""

import functools
import json
import logging
import pathlib
import sys
import time
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax import checkpoint, ending, hosts, monitors, report, sharding
from sdpo_jax.ahead import Ahead
from sdpo_jax.config import (
  check_questions,
  defaults_of,
  history_of,
  response_tokens,
  sampled_tokens,
  validate,
)
from sdpo_jax.data.batch import Packed, Packer, PackSettings
from sdpo_jax.data.shapes import Shape, ShapeRules, Shapes, most_tokens
from sdpo_jax.data.tasks import RowEnv, TaskStream
from sdpo_jax.diagnose.probe import probe_teacher
from sdpo_jax.envs.base import plays
from sdpo_jax.errors import Preempted, RunError, ServerLost, blame_settings
from sdpo_jax.evaluation.evaluate import evaluate
from sdpo_jax.evaluation.fluency import Fluency
from sdpo_jax.evaluation.scores import gain, mean_rewards
from sdpo_jax.learner import make_explorer, make_learner
from sdpo_jax.metrics import Writer, read, reduce
from sdpo_jax.objectives.build import build_method
from sdpo_jax.objectives.control import Control, as_trial
from sdpo_jax.objectives.memory import check_ids
from sdpo_jax.preemption import Notice
from sdpo_jax.records import Rollout, Sampling, Status, Task
from sdpo_jax.remote_teacher import RemoteTeacher
from sdpo_jax.rollout import prompt_seed
from sdpo_jax.rollout_log import rollout_lines
from sdpo_jax.session import Session, open_session, same_rows, splits_of
from sdpo_jax.stored import restored, stored
from sdpo_jax.teacher_gate import TeacherGate
from sdpo_jax.trackers.child import check_installed, tracked
from sdpo_jax.workdir import (
  append_line,
  change_of_devices,
  check_same_run,
  cut_back,
  describe_run,
  finished,
  write_atomically,
)

WARNINGS = "warnings.jsonl"  # in the work directory


def run(state, host: dict, steps, *, total_steps: int, limits: "Limits"):
  """Trains `state` to total_steps, or until the run stops itself, and returns it.

  steps: the collaborators (see `Steps`); due(name, i) tells whether step i calls for one of them.
  host: what the checkpoint holds beside the state. The loop keeps "tokens" (sampled so far),
    "alternatives" (responses among them that are not trained on), "failed_batches" (without a
    verdict, in a row) and "unwritten" (the metrics of a step whose evaluation has not ended).
  Raises RunError at the limits, and Preempted where `steps` finds that the run has to stop.
  """
  first = int(state.step)
  saved = first  # the last checkpoint's step; 0: none
  if first == 0 and steps.due("eval", 0):
    try:
      steps.write(0, steps.evaluate(state, 0))
    except Preempted as stop:
      save_and_stop(0, state, {}, steps, saved, stop)
  elif host["unwritten"] is not None:
    finish_step(state, host, steps, first, saved)
  for i in range(first + 1, total_steps + 1):
    if steps.has_stopped():
      break
    begun = time.monotonic()
    before = steps.position(host)
    try:
      steps.check_stop()
      groups = steps.collect(state, i)
      sampled = time.monotonic()
      packed = steps.ask_teacher(state, steps.make_batch(groups, i))
      metrics = packed.metrics | rollout_metrics(groups, i) | count_rollouts(host, groups, i)
      unjudged = metrics["data/dropped"] == len(packed.rollouts)
      host["failed_batches"] = host["failed_batches"] + 1 if unjudged else 0
      limits.check_judging(host["failed_batches"], i, saved)
      packed = score_where_due(state, packed, steps, i)
      metrics |= packed.metrics
      metrics |= steps.probe_teacher(state, packed, i)
      steps.check_stop()
    except Preempted as stop:  # this step begins anew
      save_and_stop(i - 1, state, before, steps, saved, stop)
    except ServerLost:
      save_alone(i - 1, state, before, steps, saved)
      raise
    state = steps.check_teacher(state, packed, i)
    steps.sample_ahead(state, i + 1)
    state, step_metrics = steps.step(state, packed.batch)  # the only line that changes weights
    metrics |= steps.note(state, jax.device_get(step_metrics))
    metrics |= times(groups, begun, sampled, time.monotonic())
    limits.check_gradients(int(state.skipped_in_a_row), i, saved)
    host["unwritten"] = reduce(metrics)
    # of what was sampled ahead the gap is not the engine's alone: an update lies between
    if not metrics.get("rollout/lag"):
      limits.check_engine(metrics["train/rollout_gap"].mean, i, saved)
    saved = finish_step(state, host, steps, i, saved)
  return state


def score_where_due(state, packed: Packed, steps, i: int) -> Packed:
  """Returns the batch with what is known before the update alone, if somebody reads it."""
  scores = steps.score(state, packed.batch) if steps.due("score", i) else None
  if scores is not None:
    batch = packed.batch._replace(logp_old_BR=np.asarray(scores.logp_BR))
    packed = packed._replace(batch=batch)
  packed = steps.complete(packed, scores)
  if steps.due("rollouts", i):
    steps.write_rollouts(i, packed, scores)
  return packed


def finish_step(state, host: dict, steps, i: int, saved: int) -> int:
  """Evaluates, writes the metrics of step i and saves, where due. Returns the last saved step.

  A run that has to stop before the end of the evaluation saves the metrics that it has, and the
  next start evaluates.
  """
  metrics = host["unwritten"]
  try:
    try:
      steps.check_stop()
      if steps.due("eval", i):
        metrics = metrics | steps.evaluate(state, i)
    except Preempted as stop:
      save_and_stop(i, state, steps.position(host), steps, saved, stop)
    steps.write(i, metrics)
    host["unwritten"] = None
    if steps.due("checkpoint", i) and i > saved:
      steps.save(i, state, steps.position(host))
      saved = i
  except ServerLost:  # in the evaluation, or by the batch ahead, which the checkpoint was to hold
    save_alone(i, state, steps.position(host), steps, saved)
    raise
  return saved


def save_alone(i: int, state, position: dict, steps, saved: int) -> None:
  """Saves step i, if that is not done, because a server is lost.

  Of several processes one alone hears of that, and the others would not save with it.
  """
  if i > saved and not hosts.are_several():
    steps.save(i, state, position, at_once=True)
    logging.warning("step %d is saved", i)


def save_and_stop(i: int, state, position: dict, steps, saved: int, stop: Preempted) -> NoReturn:
  """Saves step i if that is not done, and raises Preempted with what the next start goes on from.

  position: the host's part of the checkpoint.
  """
  if i > saved:
    steps.save(i, state, position, at_once=True)
  then = f"goes on from step {i}, which is saved" if i else "begins anew: nothing was trained yet"
  raise Preempted(f"{stop}: the same command {then}") from stop


class Limits(NamedTuple):
  """How much may go wrong before a run stops; counts are in a row."""

  skipped: int  # updates whose gradient was not finite
  env_failures: int  # generation batches without one verdict
  rollout_gap: float  # nats a token, between engine and trainer; the mean over one batch is enough

  def check_judging(self, failed_batches: int, step: int, saved: int) -> None:
    """Raises RunError where the environment seems to be broken."""
    if failed_batches >= self.env_failures:
      raise RunError(
        f"no response could be judged in {failed_batches} generation batches in a row "
        f"(step {step}): the environment or its sandbox is broken, "
        f"see the log above; {_last_checkpoint(saved)}"
      )

  def check_engine(self, gap: float | None, step: int, saved: int) -> None:
    """Raises RunError where what sampled is not the policy that is trained."""
    then = _last_checkpoint(saved)
    monitors.check_engine(gap, self.rollout_gap, when=f"step {step}", then=then)

  def check_gradients(self, skipped_in_a_row: int, step: int, saved: int) -> None:
    """Raises RunError where no update has been made for too long."""
    if skipped_in_a_row >= self.skipped:
      raise RunError(
        f"the gradient was not finite in {skipped_in_a_row} updates in a row (step {step}); "
        f"{_last_checkpoint(saved)}; "
        "lower config.optimizer.lr or look at the rollouts of this step"
      )


def _last_checkpoint(step: int) -> str:
  return f"the last checkpoint is step {step}" if step else "there is no checkpoint yet"


def count_rollouts(host: dict, groups: list[list[Rollout]], step: int) -> dict[str, int]:
  """Adds a batch to the counts in `host`; returns them as metrics."""
  rollouts = [r for group in groups for r in group]
  host["tokens"] += sum(len(r.tokens) + r.extra_tokens for r in rollouts)
  host["alternatives"] += sum(r.extra_calls for r in rollouts)
  return {
    "train/generations": step * len(rollouts) + host["alternatives"],
    "train/sampled_tokens": host["tokens"],
  }


def episode_metrics(rollouts: list[Rollout]) -> dict[str, float]:
  """Returns what there is to say of episodes; nothing of responses without turns."""
  episodes = [r for r in rollouts if r.turns is not None]
  if not episodes:
    return {}
  turns = [turn for r in episodes for turn in r.turns]
  return {
    "rollout/turns": len(turns) / len(episodes),
    "rollout/invalid_turns": sum(not turn.valid for turn in turns) / max(1, len(turns)),
    "rollout/turns_cut_off": _share_cut_off(episodes),
    "rollout/out_of_room": float(np.mean([r.finish_reason == "budget" for r in episodes])),
    "env/lost_episodes": float(sum(r.finish_reason == "lost" for r in episodes)),
  }


def _share_cut_off(episodes: list[Rollout]) -> float:
  """Returns the share of turns that ran into config.rollout.max_new_tokens."""
  ends = [segment.completion.finish_reason for r in episodes for segment in r.sampled]
  return sum(end == "length" for end in ends) / max(1, len(ends))


def rollout_metrics(groups: list[list[Rollout]], step: int) -> dict[str, float]:
  """Returns means over the responses of a step's batch; rewards are those of judged ones."""
  rollouts = [r for group in groups for r in group]
  judged = [r for r in rollouts if r.feedback.status is not Status.ENV_FAILED]
  truncated = [r.finish_reason == "length" for r in rollouts]
  timeouts = sum(r.feedback.status is Status.TIMEOUT for r in rollouts)
  metrics = {
    "rollout/length": float(np.mean([len(r.tokens) for r in rollouts])),
    "rollout/truncated": float(np.mean(truncated)),
    "rollout/timeouts": float(timeouts),
  }
  metrics |= episode_metrics(rollouts)
  versions = [s.completion.version for r in rollouts for s in r.sampled or ()]
  if versions:  # steps between the weights that sampled and those that are trained
    metrics["rollout/lag"] = step - 1 - float(np.mean(versions))
  if judged:
    solved = [any(r.feedback.reward >= 1.0 for r in group) for group in groups]
    lengths = [len(r.tokens) for r in judged]
    if any(lengths):  # before a policy collapses, single responses run away from the others
      metrics["rollout/length_tail"] = max(lengths) / float(np.mean(lengths))
    metrics["train/reward"] = float(np.mean([r.feedback.reward for r in judged]))
    metrics["train/solved_questions"] = float(np.mean(solved))
  return metrics


def times(groups, begun: float, sampled: float, ended: float) -> dict[str, float]:
  """Returns the seconds of a step's two halves, and the rate at which tokens went through both."""
  tokens = sum(len(r.tokens) for group in groups for r in group)
  return {
    "time/rollout_s": sampled - begun,
    "time/update_s": ended - sampled,
    "perf/tokens_per_s": tokens / (ended - begun),
  }


def train(c, workdir: str, begun: float | None = None) -> None:
  """Trains or resumes the run of a configuration, and writes its report.

  begun: when the command began, by the monotonic clock; None: now.
  A finished run is left as it is, and so is one that has stopped itself. Raises SettingError for
  what cannot run, RunError for a run that cannot go on, and Preempted for one that was stopped and
  saved.
  """
  workdir = pathlib.Path(workdir)
  begun = time.monotonic() if begun is None else begun
  with blame_settings():
    validate(c)
    check_questions(c)
    method = build_method(c.method.to_dict())
    latest = checkpoint.latest_step(workdir)
    check_same_run(workdir, c, begun=latest is not None, defaults=defaults_of(c))
    host = _host_at_end(workdir, c, latest)
  is_finished = host is not None
  if not is_finished:
    notice = Notice()
    with blame_settings():
      check_installed(c.log)
    with open_session(c, method=method, check_stop=notice.check) as session:
      with blame_settings():
        steps, state = Steps.begin(c, workdir, session, latest)
        steps.begun = begun
      limits = Limits(
        c.train.max_skipped_in_a_row, c.train.max_env_failures_in_a_row, c.train.max_rollout_gap
      )
      with notice:  # until the last checkpoint is written: the signal may come twice
        try:
          steps.open(state, steps.latest)
          with tracked(c.log, workdir, anew=steps.latest is None):
            state = run(state, steps.host, steps, total_steps=c.total_steps, limits=limits)
          steps.gate.end()
        finally:
          steps.close()
    latest, host = int(state.step), steps.host
  if not hosts.leads():
    return
  if is_finished:
    checkpoint.remove_deleted(workdir)  # it may have been killed while it did so
    print(finished(workdir, latest, c.total_steps, _why_stopped(c, latest, host)), file=sys.stderr)
  ending.note_in_run_file(workdir, c, latest, host)
  # A finished run lacks its report where it was killed between the last step and the report.
  if not is_finished or not (workdir / "report" / "index.html").exists():
    report.write_report([workdir], workdir / "report")


def _host_at_end(workdir: pathlib.Path, c, latest: int | None) -> dict | None:
  """Returns the host's part of the last checkpoint of a run that has ended; None: it goes on.

  A run that was stopped in its last evaluation goes on: the last metrics are not written yet.
  """
  if latest is None or latest < c.total_steps and not ending.of_run_file(workdir).get("stopped"):
    return None
  host = {"best": None, "worse": 0} | checkpoint.read_host(workdir)
  is_over = latest >= c.total_steps or ending.has_stopped(c, host)
  return host if is_over and host.get("unwritten") is None else None


def _why_stopped(c, latest: int, host: dict) -> str:
  """Returns why a run has ended before its last step; "" where it has not."""
  return ending.why_stopped(c, latest) if latest < c.total_steps else ""


class Steps:
  """The collaborators of the loop in `run`, and what they share: model, data, shapes, files."""

  def __init__(self, c, workdir: pathlib.Path, session: Session, host: dict):
    self.c, self.workdir, self.session, self.host = c, workdir, session, host
    self.learner = make_learner(c, session.model, session.join)
    self.shards = sharding.row_shards(session.mesh)
    self._check_packs()
    self._check_lag()
    self._check_probe()
    self.trainable, self.frozen = session.trainable(c.seed)
    self.reference = self._reference_weights()
    self.stream = TaskStream(
      session.collector.env, "train", questions=c.data.questions, seed=c.seed
    )
    self._check_questions()
    notes = self.learner.method.notes
    self.sampling = Sampling(
      c.rollout.max_new_tokens,
      c.rollout.temperature,
      c.rollout.top_p,
      session.chat.stop_tokens,
      entropy=notes is not None and notes.branches,
    )
    self.explorer = make_explorer(
      c,
      self.learner.method,
      session.collector,
      seed=c.seed,
      second_model=session.second_model,
    )
    self.control = Control(self.learner.method)
    self.exploration = {}  # metrics of what was sampled beside the last batch
    self.ahead = None  # the next batch, where it is sampled already
    self._check_stop = session.collector.check_stop
    self._copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))
    self.teacher = self._make_teacher()
    self._step = self._score = self._candidates = self.packer = self._writer = None
    self._read_reference = None
    self._saver = checkpoint.Saver(workdir, c.checkpoint.keep)
    self._history, self._signs = [], set()
    self.latest = None  # the checkpoint's step that this start goes on from
    self.begun = None  # when this start's command began; None once its first step is written
    self.rows = {}  # fingerprints for run.json

  @classmethod
  def begin(cls, c, workdir: pathlib.Path, session: Session, latest: int | None):
    """Returns (steps, state) at the start of a run, or at its latest checkpoint; see `open`.

    Raises ValueError for settings that do not fit together, and for a checkpoint of another version
    or over other rows.
    """
    host = {"tokens": 0, "alternatives": 0, "failed_batches": 0}
    host |= {"data": None, "shapes": [], "owed": 0.0, "unwritten": None, "best": None}
    host |= {"base": None, "worse": 0}
    host |= {"ahead": None, "control": None, "memory": None, "taught": False}
    steps = cls(c, workdir, session, host)
    steps.rows = same_rows(workdir, session.collector.env, splits_of(c), begun=latest is not None)
    method = steps.learner.method
    state = session.fresh_state(steps.trainable, steps.learner.tx, method.teacher_weights)
    if latest is not None:
      steps.latest, state, found = checkpoint.restore_newest(workdir, state)
      earlier = dict.fromkeys(("unwritten", "best", "base", "ahead", "control", "memory"))
      found = earlier | {"worse": 0, "taught": True} | found  # earlier versions had none of them
      _check_version(workdir, found, host)
      steps.host = found
      steps.stream.restore(found["data"])
      steps.take_up(found.pop("ahead"))
      steps.recall(found.pop("control"), found.pop("memory"))
    return steps, state

  def open(self, state, latest: int | None) -> None:
    """Jits step and score, and opens the run's files, cut back to the step that it goes on from."""
    self._jit(state)
    self.packer = self._make_packer()
    self.gate = TeacherGate(self.learner.method, self.packer, passed=self.host["taught"])
    if hosts.leads():
      mesh = self.session.mesh
      facts = {
        "sandbox_isolation": self.session.isolation,
        "mesh": None if mesh is None else dict(mesh.shape),
        "rows": self.rows,
      }
      if self.c.rollout.top_p < 1:
        facts["importance_weights"] = message = (
          f"config.rollout.top_p={self.c.rollout.top_p:g} cuts what is sampled; log-probabilities "
          "and importance weights are those of the uncut policy, and do not correct for it"
        )
        logging.warning(message)
      change = "" if latest is None else change_of_devices(self.workdir, facts["mesh"])
      if change:
        logging.warning("step %d: %s", latest, change)
      describe_run(self.workdir, self.c, facts)
      self._writer = Writer(self.workdir, total_steps=self.c.total_steps)
      is_written = self.host["unwritten"] is None
      next_step = 0 if latest is None else latest + is_written
      self._writer.truncate(next_step)
      cut_back(self.workdir / WARNINGS, next_step)
    # Lines as they stand in the file, so that a resumed run sees the same ones.
    self._history = read(self.workdir)
    self._signs = set(monitors.warnings(self._history))

  def take_up(self, groups: list | None) -> None:
    """Takes up the batch that a checkpoint holds, sampled ahead; None: it holds none."""
    if groups is not None:
      position = self.stream.state()
      rollouts = restored(self._next_tasks(), groups)
      self.ahead = Ahead(position, lambda: rollouts)

  def recall(self, control: dict | None, memory) -> None:
    """Goes on with what controllers and memory had noted; None: nothing was."""
    if control is not None:
      self.control.restore(control)
    if memory is not None:
      self.learner.method.memory.restore(memory)

  def _jit(self, state) -> None:
    """Every array of the state stays where it is."""
    places = None
    if self.session.mesh is not None:
      places = jax.tree.map(lambda x: x.sharding, state)
    everywhere = self.session.everywhere
    self._step = jax.jit(self.learner.step, donate_argnums=0, out_shardings=(places, everywhere))
    self._score = jax.jit(self.learner.score, out_shardings=everywhere)
    if self.learner.candidates is not None:
      self._candidates = jax.jit(self.learner.candidates, out_shardings=everywhere)
    if self.learner.read_reference is not None:
      self._read_reference = jax.jit(self.learner.read_reference, out_shardings=everywhere)

  def _reference_weights(self):
    """Returns the weights that the run started from, if the method reads them; else None.

    With adapters they are what these stand on. Otherwise a copy of what was loaded is kept beside
    the train state: steps overwrite it. No checkpoint holds them, since every start loads them.
    """
    if self.learner.read_reference is None:
      return None
    if self.frozen is not None:
      return self.frozen
    return jax.tree.map(jnp.copy, self.session.params)

  def _make_teacher(self) -> RemoteTeacher | None:
    """The teacher on another machine, which has been asked whether it can teach this run."""
    remote = self.learner.method.teacher_weights.remote
    if remote is None:
      return None
    c, session = self.c, self.session
    teacher = RemoteTeacher(remote, temperature=c.rollout.temperature, vocab=session.model.vocab)
    teacher.check(session.chat, c.data.max_teacher_tokens + response_tokens(c))
    return teacher

  def _make_packer(self) -> Packer:
    """The packer, which goes on with the shapes that the run has used."""
    method, data, train = self.learner.method, self.c.data, self.c.train
    settings = PackSettings(
      data.max_teacher_tokens,
      ShapeRules.of(data),
      updates=train.updates_per_batch,
      micro_batches=train.micro_batches,
      shards=self.shards,
      share_prefixes=jax.default_backend() != "tpu",  # splash knows no prefixes
      turn_penalty=self.c.rollout.turn_penalty if plays(self.session.collector.env) else 0.0,
      history=history_of(self.c),
    )
    shapes = Shapes(
      most_tokens(data, response_tokens(self.c), sampled_tokens(self.c)),
      [Shape(*sizes) for sizes in self.host["shapes"]],
      self.host["owed"],
    )
    return Packer(
      self.session.chat,
      self.session.collector.env.prompt,
      method,
      settings,
      shapes,
      self.learner.further_readings,
    )

  def close(self) -> None:
    """Waits for the last checkpoint and closes the metrics files."""
    if self.ahead is not None:
      self.ahead.abandon()
    try:
      self._saver.close()
    finally:
      if self._writer is not None:
        self._writer.close()

  # ---- what the loop calls ----

  def due(self, name: str, i: int) -> bool:
    """Tells whether step i calls for "eval", "checkpoint", "rollouts" or "score".

    The checkpoint of a step at which the run stops itself is due once that is noted.
    """
    if name == "score":  # a pass of its own, only where somebody reads it
      return self.learner.score_first or self.due("rollouts", i)
    every = {
      "eval": self.c.eval.every_steps,
      "checkpoint": self.c.checkpoint.every_steps,
      "rollouts": self.c.log.rollouts_every_steps,
    }
    is_first_of_rollouts = name == "rollouts" and i == 1
    is_last = i == self.c.total_steps or name == "checkpoint" and self.has_stopped()
    return is_last or i % every[name] == 0 or is_first_of_rollouts

  def has_stopped(self) -> bool:
    """Tells whether the run has stopped itself: every process finds the same."""
    return ending.has_stopped(self.c, self.host)

  def collect(self, state, i: int) -> list[list[Rollout]]:
    """Returns judged groups of rollouts, with what the method samples beside them."""
    if self.ahead is not None:
      groups = self.ahead.groups()
      self.ahead = None
      return groups
    params = self.session.weights(state.params, self.frozen)
    groups = self._collect(params, self._next_tasks(), i, version=i - 1)
    if self.explorer is not None:
      self.exploration = self.explorer.explore(params, groups, sampling=self.sampling, step=i)
    return groups

  def sample_ahead(self, state, i: int) -> None:
    """Begins to collect the batch of step i with these weights, if config.rollout.lag says so."""
    if not self.c.rollout.lag or i > self.c.total_steps:
      return
    position, tasks = self.stream.state(), self._next_tasks()
    # the step may overwrite the weights where they are
    params = self._copy(self.session.weights(state.params, self.frozen))

    def collect() -> list[list[Rollout]]:
      # A run that has to stop saves the batch with the step, and so awaits it.
      with self.session.collector.undisturbed():
        return self._collect(params, tasks, i, version=i - 2)

    self.ahead = Ahead(position, collect, self.session.collector.engine.interrupt)

  def _next_tasks(self) -> list[Task]:
    return self.stream.take(self.c.rollout.questions)

  def _collect(self, params, tasks: list[Task], i: int, *, version: int) -> list[list[Rollout]]:
    """Returns judged groups of step i. version: of the weights, the steps that they have seen."""
    collector = self.session.collector
    # what alternatives add to a group comes later
    prepare = self.packer.prepare if self.explorer is None else None
    with collector.handing_on(prepare):
      return collector.collect(
        params,
        tasks,
        n=self.c.rollout.group,
        sampling=self.sampling,
        seeds=[prompt_seed(self.c.seed, "train", i, q) for q in range(len(tasks))],
        version=version,
      )

  def make_batch(self, groups: list[list[Rollout]], i: int) -> Packed:
    """Packs the groups of step i, and adds what the host decides, and metrics of both."""
    packed = self.packer.pack(groups)
    scalars, reasons = self.control.begin(groups, i)
    env, chat = self.session.collector.env, self.session.chat
    metrics = packed.metrics | self.exploration | self.session.collector.take_times() | reasons
    if isinstance(env, RowEnv):
      metrics["data/skipped_rows"] = float(env.skipped)
    metrics["data/copy_rate"] = monitors.copy_rate(packed.rollouts, packed.contexts[0], chat)
    return packed._replace(batch=packed.batch._replace(control=scalars), metrics=metrics)

  def ask_teacher(self, state, packed: Packed) -> Packed:
    """Returns the batch with what a teacher on another machine says of it, if the run has one."""
    if self._candidates is None:
      return packed
    rows = sharding.put_rows(self.session.mesh, packed.batch)
    return self.teacher.read(packed, hosts.to_host(self._candidates(state, rows, self.frozen)))

  def probe_teacher(self, state, packed: Packed, i: int) -> dict[str, float]:
    """Measures, where it is due, whether the teacher knows more than the policy."""
    every = self.c.train.probe_teacher_every_steps
    if not every or i % every:
      return {}
    begun = time.monotonic()
    teacher = state.params if state.teacher is None else state.teacher
    metrics = probe_teacher(
      self.session.collector,
      self.session.weights(state.params, self.frozen),
      self.session.weights(teacher, self.frozen),
      packed,
      most=self.c.train.probe_attempts,
      sampling=self.sampling,
      path=(self.c.seed, "probe", i),
    )
    return metrics | {"time/probe_s": time.monotonic() - begun}

  def check_teacher(self, state, packed: Packed, i: int):
    """Returns the state as it was, once the teacher of the run's first batch is tested."""
    return self.gate.check(state, packed, self._trial, when=f"step {i}")

  def _trial(self, state, packed: Packed) -> tuple:
    """Returns the state as it was, and the metrics of a step that learns nothing."""
    if packed.batch.readings[0].scored is None:  # of other prompts than it was asked about
      packed = self.ask_teacher(state, packed)
    if self.learner.method.contrast is not None:  # of what the teacher reads here
      packed = self.complete(packed, self.score(state, packed.batch))
    state, metrics = self.step(state, as_trial(packed.batch))
    return state, jax.device_get(metrics)

  def note(self, state, metrics: dict) -> dict:
    """Tells the controllers what the step said, and returns it."""
    self.control.end(metrics, applied=not int(state.skipped_in_a_row))
    return metrics

  def step(self, state, batch):
    """Makes one step; returns (state, metrics)."""
    return self._step(state, sharding.put_rows(self.session.mesh, batch), self.frozen)

  def score(self, state, batch):
    """Returns the signals of the plain reading under the weights before the step."""
    return self._score(state, sharding.put_rows(self.session.mesh, batch), self.frozen)

  def complete(self, packed: Packed, scores) -> Packed:
    """Returns the batch with what its method finds before the updates: see TrainBatch.

    scores: of the plain reading, from `score`; None where they are not due.
    """
    batch, metrics = packed.batch, packed.metrics
    contrast = self.learner.method.contrast
    if contrast is not None:
      gap_BR = np.asarray(scores.logp_teacher_BR) - np.asarray(scores.logp_BR)
      credit_BR, found = contrast.credit(batch, gap_BR, packed.member_B2)
      batch, metrics = batch._replace(credit_BR=credit_BR), metrics | found
    if self._read_reference is not None and batch.logp_ref_BR is None:
      rows = sharding.put_rows(self.session.mesh, packed.batch)
      logp_BR = np.asarray(self._read_reference(self.reference, rows))
      batch = batch._replace(logp_ref_BR=logp_BR)
    return packed._replace(batch=batch, metrics=metrics)

  def evaluate(self, state, i: int) -> dict[str, float]:
    """Evaluates on the splits that are due at step i, and compares with the base model."""
    if self.ahead is not None:
      self.ahead.groups()  # one engine, one batch at a time
    settings = self.c.eval
    is_end = i in (0, self.c.total_steps)
    splits = settings.final_splits if is_end else settings.splits
    fluency = Fluency(settings.keep_texts)
    if is_end:
      # steps overwrite the weights that the session began with
      fluency = Fluency.of(self.c, self.session, holds_base=i == 0)
    means = {}

    def keep(split: str, lines: list[dict]) -> None:
      means[split] = mean_rewards(lines)
      self._keep_texts(i, split, lines)

    metrics = evaluate(
      self.session.collector,
      self.session.weights(state.params, self.frozen),
      settings,
      splits=splits,
      sampling=self.session.eval_sampling,
      fluency=fluency,
      keep=keep,
    )
    if i == 0:
      self.host["base"] = means
    base = self.host["base"] or {}  # a checkpoint of an earlier version has none
    for split in base.keys() & means.keys() if i else ():
      metrics |= gain(f"eval/{split}", means[split], base[split])
    return metrics

  def _keep_texts(self, i: int, split: str, lines: list[dict]) -> None:
    """Keeps the answers of the first and the last evaluation, if config.eval asks."""
    is_end = i in (0, self.c.total_steps)
    if is_end and self.c.eval.keep_texts and hosts.leads():
      directory = self.workdir / "eval" / "texts"
      directory.mkdir(parents=True, exist_ok=True)
      text = "".join(json.dumps(line) + "\n" for line in lines)
      write_atomically(directory / f"{split}.step_{i:06d}.jsonl", text)

  def write(self, i: int, metrics: dict) -> None:
    """Writes the metrics of step i, and logs the signs of collapse that are new."""
    ending.note(self.c, self.host, i, metrics, has_checkpoint=self.due("checkpoint", i))
    if not hosts.leads():
      return
    if i and self.begun is not None:
      metrics = metrics | {"perf/first_step_s": time.monotonic() - self.begun}
      print(f"first step after {metrics['perf/first_step_s']:.0f} s", file=sys.stderr)
      self.begun = None
    self._history.append({"step": i} | reduce(metrics))
    warnings = monitors.warnings(self._history)
    for sign in sorted(warnings.keys() - self._signs):
      logging.warning("step %d: %s", i, warnings[sign])
      line = {"step": i, "sign": sign, "text": warnings[sign]}
      append_line(self.workdir / WARNINGS, line)
    self._signs = set(warnings)
    self._writer.write(i, metrics | {"train/warnings": len(warnings)})
    if self.has_stopped():
      logging.warning(ending.why_stopped(self.c, i))

  def write_rollouts(self, i: int, packed: Packed, scores) -> None:
    """Writes the first rollouts of step i."""
    if not hosts.leads():
      return
    directory = self.workdir / "rollouts"
    directory.mkdir(exist_ok=True)
    lines = rollout_lines(i, packed, scores, self.session.chat, self.c.log.rollouts_kept)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(directory / f"step_{i:06d}.jsonl", text)

  def check_stop(self) -> None:
    """Raises Preempted if the run has to stop."""
    self._check_stop()

  def position(self, host: dict) -> dict:
    """Returns the host's part of a checkpoint, as of now: where the run is in its data."""
    shapes = self.packer.shapes
    known = [tuple(shape) for shape in shapes.known]
    memory = self.learner.method.memory
    position = host | {"shapes": known, "owed": shapes.owed, "ahead": self.ahead}
    position |= {
      "control": self.control.state(),
      "taught": self.gate.passed,
      "memory": None if memory is None else memory.state(),
    }
    return position | {"data": self.stream.state() if self.ahead is None else self.ahead.data}

  def save(self, i: int, state, position: dict, *, at_once: bool = False) -> None:
    """Saves all that a resumed run needs, while the run goes on.

    What is being sampled ahead is part of it. It is awaited, unless all has to be saved at once.
    """
    ahead = position.get("ahead")
    if ahead is not None:
      groups = ahead.groups_now() if at_once else ahead.groups()
      position = position | {"ahead": None if groups is None else stored(groups)}
    best = position.get("best")
    self._saver.save(i, state, position, keep_also=[best[0]] if best else [])

  def _check_lag(self) -> None:
    c = self.c
    if not c.rollout.lag:
      return
    more = "the alternatives of config.method.counterfactual"
    if self.learner.method.hint_tokens:
      more = f"the hints of config.method.teacher_context.name={c.method.teacher_context.name!r}"
    if self.learner.method.notes is not None or self.learner.method.hint_tokens:
      raise ValueError(
        f"config.rollout.lag={c.rollout.lag} samples while the batch before is trained on, and "
        f"{more} are sampled after their batch: use lag=0"
      )
    alone = self.session.mesh is None or c.rollout.engine != "local"
    if not alone or jax.process_count() > 1:
      size = 1 if self.session.mesh is None else self.session.mesh.size
      raise ValueError(
        f"config.rollout.lag={c.rollout.lag} is for one process that samples on servers "
        f"(config.rollout.engine) or has a single device; this run has {jax.process_count()} "
        f"processes and {size} devices: use lag=0"
      )

  def _check_probe(self) -> None:
    every, method = self.c.train.probe_teacher_every_steps, self.learner.method
    setting = f"config.train.probe_teacher_every_steps={every}"
    if every and not method.needs_teacher:
      raise ValueError(f"{setting} would not be read: method={self.c.method.name} has no teacher")
    if every and method.teacher_weights.remote is not None:
      raise ValueError(
        f"{setting} is for a teacher that is sampled from here, and it lives elsewhere"
      )

  def _check_questions(self) -> None:
    """Refuses questions without what the method reads of them, as far as they are known."""
    env, method = self.session.collector.env, self.learner.method
    if isinstance(env, RowEnv):
      tasks = [task for source in env.sources("train") for task in source.tasks]
      if method.memory is not None:
        check_ids(tasks)
    else:
      tasks = [env.task("train", i) for i in range(8)]
    has_solution = any(task.solution for task in tasks)
    if getattr(method.teacher_context, "needs_solution", False) and not has_solution:
      raise ValueError(
        f"config.method.teacher_context.name={self.c.method.teacher_context.name!r} shows the "
        f"solution that comes with a question, and none of {len(tasks)} questions for training has "
        "one: choose another method, or fill the rows' solution"
      )

  def _check_packs(self) -> None:
    c = self.c
    responses = c.rollout.questions * c.rollout.group
    packs = c.train.updates_per_batch * c.train.micro_batches * self.shards
    if responses % packs:
      raise ValueError(
        f"config.rollout.questions x group = {responses} responses do not divide into {packs} "
        "packs: train.updates_per_batch x micro_batches x the mesh's data x fsdp"
      )


def _check_version(workdir: pathlib.Path, found: dict, host: dict) -> None:
  """Refuses a checkpoint whose host part has other entries than those of this version."""
  same_entries = found.keys() == host.keys()
  if not same_entries or any(len(sizes) != len(Shape._fields) for sizes in found["shapes"]):
    raise ValueError(
      f"the checkpoint in {workdir} was written by another version of sdpo_jax: "
      "go on with that one, or choose another --workdir"
    )
