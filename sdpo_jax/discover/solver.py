"""What one thread needs to run an arm on its devices."""

import functools
import logging
import threading
from typing import Callable, NamedTuple

import jax

from sdpo_jax import sharding
from sdpo_jax.data.batch import pack
from sdpo_jax.data.shapes import Shape, Shapes, bucket, most_tokens
from sdpo_jax.discover.arms import LEARNING, solve_by_learning, solve_by_sampling, solve_by_turns
from sdpo_jax.discover.budget import Budget
from sdpo_jax.discover.difficulty import calibrate, exact_difficulty, make_logp
from sdpo_jax.discover.replay import Attempts
from sdpo_jax.errors import RunError, blame_settings
from sdpo_jax.learner import Learner, learner
from sdpo_jax.objectives import build
from sdpo_jax.objectives.loss import make_objective
from sdpo_jax.records import Sampling, Task
from sdpo_jax.rollout import prompt_seed
from sdpo_jax.session import Wired
from sdpo_jax.train_step import make_signals


class Stopped(Exception):
  """Another thread's run failed, or somebody wants the end: no further batch is begun. What is on disk is intact."""


def fixed_shapes(packs: int, rows: int, data, max_new_tokens: int, *, more: bool = False) -> Shapes:
  """Shapes of packs of `rows` responses, one a row: whatever is sampled, one of them holds it, so that what a run computes depends on nothing that ran before.

  more: further readings by the teacher, of the same sizes. Responses up to max_new_tokens halved a few times; prompts up to their limits halved a few
  times, and half-way steps for the teacher's.
  """
  down = lambda most, multiple, steps: sorted(
    {bucket(int(most * step), multiple) for step in steps}
  )
  halves = [2.0**-i for i in range(6)]
  teacher = lambda t, r: (rows, bucket(t + r, data.length_multiple))
  shapes = [
    Shape(
      rows,
      bucket(p + r, data.length_multiple),
      *teacher(t, r),
      bucket(rows * r, data.length_multiple),
      r,
      *(teacher(t, r) if more else (0, 0)),
      packs,
    )
    for r in down(max_new_tokens, data.response_multiple, halves)
    for p in down(data.max_prompt_tokens, data.length_multiple, halves)
    for t in down(data.max_teacher_tokens, data.length_multiple, [*halves, 0.75, 0.375])
  ]
  return Shapes(most_tokens(data, max_new_tokens), shapes, limit=len(shapes))


class Run(NamedTuple):
  number: int  # in the list of all runs
  arm: str
  task: Task
  place: int  # of the task among the questions
  seed: int


class Taught(NamedTuple):
  """A learning arm: its method, the compiled step, the shapes that it is compiled for."""

  learn: Learner
  step: Callable
  shapes: Shapes


def method_of(c, arm: str) -> dict:
  """config.method without its counterfactual part for sdpo, with it (by default: notes of the siblings) for counterfactual."""
  method = c.method.to_dict()
  if arm == "sdpo":
    method["counterfactual"] = build.complete_part("counterfactual", "none")
  elif method["counterfactual"]["name"] == "none":
    method["counterfactual"] = build.complete_part("counterfactual", "notes", sources=("siblings",))
  return method


class Solver:
  """Runs, one after another, on the devices of `w`; what they need is compiled once. stop: once it is set no batch is begun."""

  def __init__(self, c, w: Wired, stop: threading.Event):
    self.c, self.w, self.stop, self.env = c, w, stop, w.collector.env
    self.shards = sharding.row_shards(w.mesh)
    self.packs = c.train.micro_batches * self.shards
    with blame_settings():
      if c.discover.rollouts % self.packs:
        raise ValueError(
          f"config.discover.rollouts={c.discover.rollouts} rows do not divide into {self.packs} packs: train.micro_batches x the mesh's data x fsdp"
        )
      self.base, self.frozen = w.trainable(c.seed)
      self.taught = {arm: self.teach(arm) for arm in c.discover.arms if arm in LEARNING}
    self.sampling = Sampling(
      c.rollout.max_new_tokens, c.rollout.temperature, c.rollout.top_p, w.chat.stop_tokens
    )
    self.together = max(1, c.rollout.rows // c.discover.rollouts)

  def teach(self, arm: str) -> Taught:
    c, w = self.c.copy_and_resolve_references(), self.w
    with c.unlocked():
      c.method = method_of(self.c, arm)
    learn = learner(c, w.model, w.join)
    places = (
      None if w.mesh is None else jax.tree.map(lambda x: x.sharding, self.fresh(learn, self.base))
    )
    return Taught(
      learn,
      jax.jit(learn.step, donate_argnums=0, out_shardings=(places, w.everywhere)),
      fixed_shapes(
        self.packs,
        c.discover.rollouts // self.packs,
        c.data,
        c.rollout.max_new_tokens,
        more=learn.counterfactual is not None,
      ),
    )

  def fresh(self, learn: Learner, params):
    """A state of its own: a step overwrites the weights that it is given."""
    return self.w.fresh_state(jax.tree.map(lambda x: x.copy(), params), learn.tx, learn.teacher)

  def update(self, taught: Taught, state, batch):
    state, _ = taught.step(state, sharding.put_rows(self.w.mesh, batch), self.frozen)
    if skipped := int(state.skipped_in_a_row):
      logging.warning("the gradient was not finite: update skipped, %d in a row", skipped)
      if skipped >= self.c.train.max_skipped_in_a_row:
        raise RunError(
          f"the gradient was not finite in {skipped} updates in a row; finished runs are intact; lower config.optimizer.lr"
        )
    return state

  def batch_of(self, taught: Taught, groups):
    """What the update on these attempts reads. Siblings are alternatives that cost nothing: no weights are needed and no seed is used."""
    if taught.learn.explore:
      taught.learn.explore(
        self.w.collector,
        None,
        groups,
        sampling=self.sampling,
        seed=0,
        step=0,
        max_prompt_tokens=self.c.data.max_teacher_tokens,
      )
    return self.make_batch(groups, taught.learn.parts, taught.shapes, taught.learn.counterfactual)

  def make_batch(self, groups, parts: dict, shapes: Shapes, counterfactual=None):
    data = self.c.data
    return pack(
      groups,
      chat=self.w.chat,
      messages=self.env.prompt,
      teacher_context=parts["teacher_context"],
      advantage=parts["advantage"],
      counterfactual=counterfactual,
      max_teacher_tokens=data.max_teacher_tokens,
      length_multiple=data.length_multiple,
      response_multiple=data.response_multiple,
      shapes=shapes,
      micro_batches=self.c.train.micro_batches,
      shards=self.shards,
    )

  def collect(self, weights, asked, *, path, n):
    """n attempts for each (task, first attempt); a batch has a seed of its own, so it is the same whatever is sampled beside it."""
    if self.stop.is_set():
      raise Stopped
    seeds = [prompt_seed(self.c.seed, *path, task.id, first) for task, first in asked]
    return self.w.collector.collect(
      weights, [task for task, _ in asked], n=n, sampling=self.sampling, seeds=seeds
    )

  def fits(self, task: Task) -> bool:
    return len(self.w.chat.prompt_tokens(self.env.prompt(task))) <= self.c.data.max_prompt_tokens

  def measure(self) -> Callable:
    """-> measure(task) -> its line of difficulty.jsonl."""
    c, w, d = self.c, self.w, self.c.discover
    if not hasattr(self.env, "solutions"):
      return lambda task: calibrate(
        task,
        below=d.below_pass_at_64,
        attempts=d.calibration,
        env_failures=c.train.max_env_failures_in_a_row,
        collect=lambda n: sum(
          self.collect(
            w.params,
            [(task, n + i * d.rollouts) for i in range(self.together)],
            path=("calibration",),
            n=d.rollouts,
          ),
          [],
        ),
      )
    plain = make_signals(
      w.model, make_objective(build.method_row("grpo")), temperature=c.rollout.temperature
    )
    score = jax.jit(lambda batch: plain(w.params, None, batch).logp_BR, out_shardings=w.everywhere)
    shapes, parts = (
      fixed_shapes(self.packs, d.rollouts // self.packs, c.data, c.rollout.max_new_tokens),
      build.build_method(build.method_row("grpo")),
    )
    logp = make_logp(score, lambda groups: self.make_batch(groups, parts, shapes), d.rollouts)
    return lambda task: exact_difficulty(
      task,
      self.env.solutions(task),
      below=d.below_pass_at_64,
      prompt=w.chat.prompt_tokens(self.env.prompt(task)),
      chat=w.chat,
      logp=logp,
    )

  def solve(self, run: Run, log: Attempts, start=None):
    """-> (the run's line of discover.jsonl, a learning arm's last state or None). start: weights that it begins with; None: the base model's."""
    c, d, w = self.c, self.c.discover, self.w
    budget, state = Budget(d.attempts, d.tokens or None, c.train.max_env_failures_in_a_row), None
    asking = lambda n, weights=lambda params: params: log.around(
      lambda params, asked: self.collect(weights(params), asked, path=("discover", run.seed), n=n)
    )
    if run.arm in LEARNING:
      taught = self.taught[run.arm]
      state = solve_by_learning(
        run.task,
        budget,
        fresh=lambda: self.fresh(taught.learn, self.base if start is None else start),
        collect=asking(d.rollouts, lambda params: w.weights(params, self.frozen)),
        make_batch=functools.partial(self.batch_of, taught),
        step=functools.partial(self.update, taught),
      )
    elif run.arm == "best_of_k":
      solve_by_sampling(
        run.task,
        budget,
        params=w.params,
        collect=asking(d.rollouts),
        rollouts=d.rollouts,
        together=self.together,
      )
    else:
      solve_by_turns(
        run.task, budget, params=w.params, collect=asking(1), fits=self.fits, history=d.history
      )
    line = {"arm": run.arm, "task_id": run.task.id, "seed": run.seed} | budget.record()
    return line | {
      "skipped_updates": 0 if state is None else int(state.skipped),
      "time_s": log.time_s,
    }, state
