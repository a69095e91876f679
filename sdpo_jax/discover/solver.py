"""Makes runs on one part of the devices: samples, updates and scores with one copy of the weights.

A Solver belongs to one thread. What it compiles serves all of its runs, so batches are laid out in
a fixed set of shapes, and no result depends on what ran before.

Errors: SettingError for sizes that do not divide among the devices, before anything is sampled;
RunError where too many updates in a row are skipped.
"""

import functools
import logging
import threading
from typing import Any, Callable, NamedTuple

import jax

from sdpo_jax import sharding
from sdpo_jax.alternatives import Explorer
from sdpo_jax.data.batch import Packed, Packer, PackSettings
from sdpo_jax.data.conversation import Continuation
from sdpo_jax.data.shapes import Shape, ShapeRules, Shapes, bucket, most_tokens
from sdpo_jax.discover.arms import (
  LEARNING,
  ArmRun,
  solve_by_learning,
  solve_by_sampling,
  solve_by_turns,
)
from sdpo_jax.discover.budget import Budget
from sdpo_jax.discover.difficulty import calibrate, exact_difficulty, make_logp
from sdpo_jax.discover.replay import AttemptLog
from sdpo_jax.discover.turns import make_history
from sdpo_jax.errors import RunError, blame_settings
from sdpo_jax.learner import Learner, make_explorer, make_learner
from sdpo_jax.monitors import check_engine
from sdpo_jax.objectives import build
from sdpo_jax.objectives.build import Method
from sdpo_jax.objectives.control import Control, as_trial
from sdpo_jax.records import Sampling, Task
from sdpo_jax.rollout import prompt_seed
from sdpo_jax.session import Session
from sdpo_jax.teacher_gate import TeacherGate
from sdpo_jax.train_step import TrainState, make_signals


class Stopped(Exception):
  """No further batch is begun, since another thread failed or was interrupted.

  What is on disk is intact.
  """


class LearningArm(NamedTuple):
  """What the runs of a learning arm share."""

  learner: Learner
  step: Callable  # compiled
  packer: Packer  # with the shapes that it is compiled for
  explorer: Explorer | None  # None: the method has no alternatives
  gate: TeacherGate  # passed by the first update of the solver's first question


# Shares of the longest text that there are shapes for.
HALVINGS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)


def fixed_shapes(
  packs: int, rows: int, data, max_new_tokens: int, *, has_readings: bool = False
) -> Shapes:
  """Returns shapes for packs of `rows` responses, one a row, of which one holds any batch.

  The set never grows, so what a run computes depends on nothing that ran before. Responses are
  max_new_tokens long or that halved up to five times; prompts likewise from their limits. The
  teacher's prompts have half-way steps too.

  data: config.data. has_readings: the teacher reads each batch again, in rows of the same sizes.
  """
  down = functools.partial(_lengths_below, fractions=HALVINGS)
  prompts = down(data.max_prompt_tokens, data.length_multiple)
  teacher_prompts = _lengths_below(
    data.max_teacher_tokens, data.length_multiple, (*HALVINGS, 0.75, 0.375)
  )
  shapes = []
  for response in down(max_new_tokens, data.response_multiple):
    for prompt in prompts:
      for teacher_prompt in teacher_prompts:
        teacher_length = bucket(teacher_prompt + response, data.length_multiple)
        reading_rows, reading_length = (rows, teacher_length) if has_readings else (0, 0)
        shape = Shape(
          rows,
          bucket(prompt + response, data.length_multiple),
          rows,
          teacher_length,
          bucket(rows * response, data.length_multiple),
          response,
          reading_rows,
          reading_length,
          packs,
        )
        shapes.append(shape)
  return Shapes(most_tokens(data, max_new_tokens, max_new_tokens), shapes, limit=len(shapes))


def _lengths_below(longest: int, multiple: int, fractions: tuple[float, ...]) -> list[int]:
  """Returns these fractions of the longest length, each rounded up to the multiple."""
  return sorted({bucket(int(longest * fraction), multiple) for fraction in fractions})


def method_of(c, arm: str) -> dict:
  """Returns config.method as a learning arm uses it.

  sdpo has no counterfactual part. counterfactual has the configured one or, by default, notes of
  what the batch's other attempts received: any other source would try the question outside the
  budget.
  """
  method = c.method.to_dict()
  if arm == "sdpo":
    method["counterfactual"] = build.complete_part("counterfactual", "none")
  elif method["counterfactual"]["name"] == "none":
    method["counterfactual"] = build.complete_part("counterfactual", "notes", sources=("siblings",))
  return method


class Solver:
  """Makes runs, one after another, on the devices of a session.

  stop: once it is set no batch is begun, and Stopped is raised instead.
  """

  def __init__(self, c, session: Session, stop: threading.Event):
    self.c = c
    self.session = session
    self.stop = stop
    self.env = session.collector.env
    self.shards = sharding.row_shards(session.mesh)
    self.packs = c.train.micro_batches * self.shards
    with blame_settings():
      if c.discover.rollouts % self.packs:
        raise ValueError(
          f"config.discover.rollouts={c.discover.rollouts} rows do not divide into {self.packs} "
          "packs: train.micro_batches x the mesh's data x fsdp"
        )
      self.base, self.frozen = session.trainable(c.seed)
      self.learning_arms = {
        arm: self._learning_arm(arm) for arm in c.discover.arms if arm in LEARNING
      }
    self.sampling = Sampling(
      c.rollout.max_new_tokens, c.rollout.temperature, c.rollout.top_p, session.chat.stop_tokens
    )
    self.continuation = None  # None: no run holds a conversation
    if "multi_turn" in c.discover.arms and c.discover.history == "attempt_and_feedback":
      self.continuation = Continuation(session.chat)
    # batches of independent attempts that the sampler has rows for
    self.together = max(1, c.rollout.rows // c.discover.rollouts)

  def solve(
    self, run: ArmRun, log: AttemptLog, start=None
  ) -> tuple[dict[str, Any], TrainState | None]:
    """Returns the run's line of discover.jsonl, and a learning arm's last state.

    start: the weights that a learning arm begins with; None: the base model's.
    """
    d = self.c.discover
    budget = Budget(d.attempts, d.tokens or None, self.c.train.max_env_failures_in_a_row)
    state, rendered_again = None, 0
    if run.arm in LEARNING:
      state = self._learn(run, budget, log, self.base if start is None else start)
    elif run.arm == "best_of_k":
      solve_by_sampling(
        run.task,
        budget,
        params=self.session.params,
        collect=self._logged_collect(run, log, d.rollouts),
        rollouts=d.rollouts,
        together=self.together,
      )
    else:
      chat, limit = self.session.chat, self.c.data.max_prompt_tokens
      history = make_history(run.task, self.env.prompt, chat, self.continuation, limit)
      solve_by_turns(
        run.task,
        budget,
        params=self.session.params,
        collect=self._logged_collect(run, log, 1),
        history=history,
      )
      rendered_again = history.rendered_again
    line = {"arm": run.arm, "task_id": run.task.id, "seed": run.seed} | budget.record()
    line["skipped_updates"] = 0 if state is None else int(state.skipped)
    line["rendered_again"] = rendered_again
    line["time_s"] = log.time_s
    return line, state

  def make_measure(self) -> Callable:
    """Returns measure(task) -> the task's line of difficulty.jsonl."""
    if hasattr(self.env, "solutions"):
      return functools.partial(self._measure_exactly, self._make_logp())
    return self._measure_by_attempts

  # Sampling and judging.

  def collect(
    self,
    weights,
    batches: list[tuple[Task, int]],
    prompts: list[list[int]] | None = None,
    *,
    path: tuple,
    n: int,
  ):
    """Samples and judges n attempts for each (task, first attempt), a group each.

    A batch has a seed of its own, so it is the same whatever is sampled beside it. path: what
    tells these seeds from those of other uses. prompts: see `Collector.collect`.
    """
    if self.stop.is_set():
      raise Stopped
    tasks = [task for task, _ in batches]
    seeds = [prompt_seed(self.c.seed, *path, task.id, first) for task, first in batches]
    return self.session.collector.collect(
      weights, tasks, n=n, sampling=self.sampling, seeds=seeds, prompts=prompts
    )

  def _logged_collect(
    self, run: ArmRun, log: AttemptLog, n: int, *, trained: bool = False
  ) -> Callable:
    """Returns collect(params, batches, prompts=None) for this run: what is on disk comes first.

    n: attempts a batch. trained: params are what training moves, and not yet plain weights.
    """

    def collect(params, batches, prompts):
      weights = self.session.weights(params, self.frozen) if trained else params
      return self.collect(weights, batches, prompts, path=("discover", run.seed), n=n)

    return functools.partial(log.read_or_collect, collect)

  # Learning.

  def _learning_arm(self, arm: str) -> LearningArm:
    """Builds an arm's method and jits its step, which is compiled at the first update."""
    session = self.session
    c = self.c.copy_and_resolve_references()
    with c.unlocked():
      c.method = method_of(self.c, arm)
    learner = make_learner(c, session.model, session.join)
    state_shardings = None
    if session.mesh is not None:
      fresh = self._fresh_state(learner, self.base)
      state_shardings = jax.tree.map(lambda x: x.sharding, fresh)
    step = jax.jit(
      learner.step, donate_argnums=0, out_shardings=(state_shardings, session.everywhere)
    )
    shapes = self._fixed_shapes(has_readings=learner.further_count > 0)
    # A run tries a question within its budget, so alternatives are siblings and need no seed.
    explorer = make_explorer(c, learner.method, session.collector, seed=0)
    packer = self._make_packer(learner.method, shapes, learner.further_readings)
    return LearningArm(learner, step, packer, explorer, TeacherGate(learner.method, packer))

  def _fixed_shapes(self, *, has_readings: bool = False) -> Shapes:
    c = self.c
    rows = c.discover.rollouts // self.packs
    return fixed_shapes(
      self.packs, rows, c.data, c.rollout.max_new_tokens, has_readings=has_readings
    )

  def _learn(self, run: ArmRun, budget: Budget, log: AttemptLog, start) -> TrainState:
    arm = self.learning_arms[run.arm]
    collect = self._logged_collect(run, log, self.c.discover.rollouts, trained=True)
    control = Control(arm.learner.method)
    return solve_by_learning(
      run.task,
      budget,
      fresh_state=functools.partial(self._fresh_state, arm.learner, start),
      collect=collect,
      make_batch=functools.partial(self.learning_batch, arm, control),
      step=functools.partial(self._update, arm, control),
    )

  def _fresh_state(self, learner: Learner, params) -> TrainState:
    """Returns a state with a copy of the weights: the step overwrites those that it is given."""
    copied = jax.tree.map(lambda x: x.copy(), params)
    return self.session.fresh_state(copied, learner.tx, learner.method.teacher_weights)

  def learning_batch(self, arm: LearningArm, control: Control, groups, step: int) -> Packed:
    """Packs judged attempts for an update, the `step`-th on this question.

    The alternatives that a method may want are siblings, which cost nothing: finding them needs
    no weights and uses no seed.
    """
    if arm.explorer is not None:
      arm.explorer.explore(None, groups, sampling=self.sampling, step=0)
    packed = arm.packer.pack(groups)
    scalars, _ = control.begin(groups, step)
    return packed._replace(batch=packed.batch._replace(control=scalars))

  def _update(
    self, arm: LearningArm, control: Control, state: TrainState, packed: Packed
  ) -> TrainState:
    trial = functools.partial(self._trial, arm)
    state = arm.gate.check(state, packed, trial, when="an update of one question")
    state, metrics = self._step(arm, state, packed.batch)
    control.end(metrics, applied=not int(state.skipped_in_a_row))
    check_engine(
      metrics["train/rollout_gap"].mean,
      self.c.train.max_rollout_gap,
      when="an update of one question",
      then="finished runs are intact",
    )
    skipped = int(state.skipped_in_a_row)
    if not skipped:
      return state
    logging.warning("the gradient was not finite: update skipped, %d in a row", skipped)
    if skipped >= self.c.train.max_skipped_in_a_row:
      raise RunError(
        f"the gradient was not finite in {skipped} updates in a row; finished runs are intact; "
        "lower config.optimizer.lr"
      )
    return state

  def _step(self, arm: LearningArm, state: TrainState, batch) -> tuple[TrainState, dict]:
    state, metrics = arm.step(state, sharding.put_rows(self.session.mesh, batch), self.frozen)
    return state, jax.device_get(metrics)

  def _trial(self, arm: LearningArm, state: TrainState, packed: Packed) -> tuple[TrainState, dict]:
    """Returns the state as it was, and the metrics of an update that learns nothing."""
    return self._step(arm, state, as_trial(packed.batch))

  def _make_packer(self, method: Method, shapes: Shapes, further_readings=None) -> Packer:
    data = self.c.data
    settings = PackSettings(
      data.max_teacher_tokens,
      ShapeRules.of(data),
      micro_batches=self.c.train.micro_batches,
      shards=self.shards,
    )
    return Packer(
      self.session.chat,
      self.env.prompt,
      method,
      settings,
      shapes,
      further_readings,
    )

  # Difficulty under the base model.

  def _measure_by_attempts(self, task: Task) -> dict[str, Any]:
    c = self.c
    rollouts = c.discover.rollouts

    def collect(first):
      batches = [(task, first + i * rollouts) for i in range(self.together)]
      groups = self.collect(self.session.params, batches, path=("calibration",), n=rollouts)
      return [rollout for group in groups for rollout in group]

    return calibrate(
      task,
      below=c.discover.below_pass_at_64,
      attempts=c.discover.calibration,
      max_failed_batches=c.train.max_env_failures_in_a_row,
      collect=collect,
    )

  def _measure_exactly(self, logp: Callable, task: Task) -> dict[str, Any]:
    chat = self.session.chat
    return exact_difficulty(
      task,
      self.env.solutions(task),
      below=self.c.discover.below_pass_at_64,
      prompt=chat.prompt_tokens(self.env.prompt(task)),
      chat=chat,
      logp=logp,
    )

  def _make_logp(self) -> Callable:
    """Returns logp([rollout]) -> nats of each whole response under the base model."""
    session = self.session
    # The plainest method: it has no teacher, so a response is read once.
    grpo = build.build_method(build.method_row("grpo"))
    signals = make_signals(session.model, grpo, temperature=self.c.rollout.temperature)

    def logp_BR(batch):
      (plain,) = signals(session.params, None, batch)
      return plain.logp_BR

    score = jax.jit(logp_BR, out_shardings=session.everywhere)
    packer = self._make_packer(grpo, self._fixed_shapes())
    return make_logp(score, packer.pack, self.c.discover.rollouts)
