r"""Test-time self-distillation: one hard question, binary reward, no solution known; keep attempting and learn between attempts.

Source: arXiv 2601.20802, section 5. Arms, all with the same sampler, judge and accounting:
  sdpo        batches of `rollouts` attempts from fresh weights; each batch without a success is one update on its feedback alone
  best_of_k   independent attempts of the base model
  counterfactual  like sdpo; besides, the teacher is told of a failed attempt what the batch's other attempts received (config.method.counterfactual,
              by default the notes of objectives/counterfactual.py; from siblings alone, since any other source would try the question outside the budget)
  multi_turn  one attempt after another; the prompt holds the feedback on the earlier ones (`history` says whether the attempts as
              well), the oldest dropped first at the limit of the prompt

A run is one (arm, question, seed). It stops at its first success or when a budget (attempts, generated tokens) is spent. best_of_k spends
its whole budget, so that discovery@k is the unbiased estimator pass@k with n = budget. What the figures mean: `discovery.py`.

An attempt that the environment could not judge is no attempt: it enters no count but `env_failed`, and the run goes on; RunError where batches
without any verdict follow one another (train.max_env_failures_in_a_row). A wrong setting is a SettingError before anything is sampled.

Several questions at a time (config.discover.parallel): the devices are cut into that many equal parts, config.mesh describes one of them, and each
part holds the weights and takes the next run when it is done with one. They share the environment and its sandbox, nothing else. That they
fit is the user's to know; a killed session may go on with another number. One process; not done: several processes, and several questions in one device program.

Warm starts (config.discover.warm_start; off): a learning arm's run on question n begins from the weights that its run on question n - 1 of the same seed
ended with; optimiser and teacher begin anew. Its results then depend on the order of the questions, and are no longer independent of one another,
as the intervals suppose them to be. The runs of a seed follow one another; those of other seeds and arms may share the time.

Hard questions: with `below_pass_at_64` < 1 only candidates are used whose pass@64 under the base model lies below it. Where the environment
can list the solutions of a task (TinyCode), this is 1 - (1 - p)^64 with p the model's probability of writing one of them, which no luck
enters; elsewhere the base model attempts each candidate `calibration` times, with seeds of their own, which count for no arm.

A run is a pure function of (weights, settings, question, seed), as long as every attempt is judged, and starts from the base weights (but for warm
starts): nothing leaks between questions, and neither the order of the runs, nor what shares a batch, nor which part of the devices is used changes
a result. The shape of the mesh does, by rounding. Files of the work directory:
  difficulty.jsonl  one candidate a line: its pass@64 and whether it is used
  attempts/*.jsonl  the judged batches of the runs under way. A killed session replays them (the updates are done again, nothing is
                    sampled or judged again) and goes on in mid-question to the same end
  warm/ARM_seed_*   with warm starts: the weights that the last runs of each seed ended with
  discover.jsonl    one finished run a line, in the order in which they ended; then discover.json (summary), discover.txt (what is printed) and
                    discover.png. time_s: what a run took, earlier sessions included; runs side by side each count in full
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import queue
import shutil
import threading
import time
from typing import Any, Callable, NamedTuple

import jax
import numpy as np

from sdpo_jax import checkpoint, discovery, sharding, stats
from sdpo_jax.data.batch import Shape, Shapes, bucket, most_tokens, pack
from sdpo_jax.data.tasks import RowEnv, first_tasks
from sdpo_jax.metrics import write_atomically
from sdpo_jax.objectives import methods
from sdpo_jax.objectives.loss import make_objective
from sdpo_jax.objectives.teacher_context import CLOSING, TEMPLATES, Context, fill
from sdpo_jax.records import Feedback, Rollout, Sampling, Status, Task
from sdpo_jax.rollout import prompt_seed
from sdpo_jax.train_step import make_signals
from sdpo_jax.wiring import (
  Learner,
  RunError,
  Wired,
  blame_settings,
  describe_run,
  learner,
  on_other_devices,
  same_run,
  uncommitted,
  wired,
)

ARMS = ("sdpo", "counterfactual", "best_of_k", "multi_turn")
LEARNING = ARMS[:2]
HISTORIES = ("feedback", "attempt_and_feedback")


def judged(rollouts: list[Rollout]) -> bool:
  """Whether the environment said anything at all."""
  return any(r.feedback.status is not Status.ENV_FAILED for r in rollouts)


class Budget:
  """Attempts, generated tokens and teacher tokens of one run, and what they were when the first success came.

  attempts, tokens: limits; tokens None: no limit. An attempt counts if the budget was not spent before it, so the last one may go beyond the
  limit of tokens. What could not be judged is neither an attempt nor a failure, and its tokens do not count: `env_failed` says how many those
  were, and RunError ends a run that has `env_failures` batches of them in a row. asked: attempts sampled, counted or not; seeds are numbered by it.
  """

  def __init__(self, attempts: int, tokens: int | None = None, env_failures: int = 3):
    self.limit, self.token_limit, self.env_failures = attempts, tokens, env_failures
    self.asked = self.attempts = self.tokens = self.teacher_tokens = self.successes = (
      self.env_failed
    ) = self.failed_batches = 0
    self.first: dict[str, Any] = {
      "first_success": None,
      "first_success_tokens": None,
      "response": None,
    }

  def count(self, rollouts: list[Rollout]) -> None:
    """One batch, in order; what comes after the end of the budget is ignored, a success as well: it must not matter what shared the batch."""
    self.asked += len(rollouts)
    for r in rollouts:
      if not self.left:
        break
      if r.feedback.status is Status.ENV_FAILED:
        self.env_failed += 1
        continue
      self.attempts += 1
      self.tokens += len(r.tokens)
      if r.feedback.reward >= 1.0:
        self.successes += 1
        if not self.found:
          self.first = {
            "first_success": self.attempts,
            "first_success_tokens": self.tokens,
            "response": r.text,
          }
    self.failed_batches = 0 if judged(rollouts) else self.failed_batches + 1
    if self.failed_batches >= self.env_failures:
      raise RunError(
        f"no attempt could be judged in {self.failed_batches} batches in a row: the environment or its sandbox is broken, see the log above; "
        "finished runs are intact, and the same command goes on with the one under way"
      )

  @property
  def found(self) -> bool:
    return self.first["first_success"] is not None

  @property
  def left(self) -> int:
    """Attempts that may still be made."""
    return (
      0
      if self.token_limit is not None and self.tokens >= self.token_limit
      else self.limit - self.attempts
    )

  def record(self) -> dict[str, Any]:
    return self.first | {
      "attempts": self.attempts,
      "successes": self.successes,
      "env_failed": self.env_failed,
      "tokens": self.tokens,
      "teacher_tokens": self.teacher_tokens,
    }


def solve_by_learning(
  task: Task,
  budget: Budget,
  *,
  fresh: Callable,
  collect: Callable,
  make_batch: Callable,
  step: Callable,
):
  """SDPO on one question from fresh() weights, until a success or the budget's end; returns the last state. collect(params, [(task, first attempt)]) -> groups."""
  state = fresh()
  while not budget.found and budget.left:
    groups = collect(state.params, [(task, budget.asked)])
    budget.count(groups[0])
    if not budget.found and budget.left and judged(groups[0]):
      packed = make_batch(groups)
      budget.teacher_tokens += sum(
        int((half.segment_CPT > 0).sum())
        for half in (packed.batch.teacher, *(c.teacher for c in packed.batch.counterfactuals))
      )
      state = step(state, packed.batch)
  return state


def solve_by_sampling(
  task: Task, budget: Budget, *, params, collect: Callable, rollouts: int, together: int = 1
) -> None:
  """All of the budget, independent, in `together` batches of `rollouts` attempts at a time."""
  while budget.left:
    groups = collect(
      params,
      [(task, budget.asked + i * rollouts) for i in range(together) if i * rollouts < budget.left],
    )
    budget.count(sum(groups, []))


def solve_by_turns(
  task: Task,
  budget: Budget,
  *,
  params,
  collect: Callable,
  fits: Callable,
  history: str = "feedback",
) -> None:
  """What was said of earlier attempts stays in the prompt, newest last; the oldest is dropped while the prompt does not fit."""
  turns: list[Rollout] = []
  while not budget.found and budget.left:
    shown = list(turns)
    while shown and not fits(prompt_with(task, shown, history)):
      shown.pop(0)
    (rollout,) = collect(params, [(prompt_with(task, shown, history), budget.asked)])[0]
    budget.count([rollout])
    if rollout.feedback.text and rollout.feedback.status is not Status.ENV_FAILED:
      turns.append(rollout)


def prompt_with(task: Task, turns: list[Rollout], history: str) -> Task:
  """The task with earlier turns in its prompt, in the words that the teacher reads."""
  if not turns:
    return task
  if history == "feedback":
    prompt = Context(feedback="\n\n".join(r.feedback.text for r in turns)).render(task.prompt)
  else:
    said = [
      fill(TEMPLATES["attempt"], {"text": r.text})
      + fill(TEMPLATES["feedback"], {"text": r.feedback.text})
      for r in turns
    ]
    prompt = task.prompt + "".join(said) + CLOSING
  return dataclasses.replace(task, prompt=prompt)


class Attempts:
  """The judged batches of one run, on disk: what a killed session has sampled and judged is read back, not done again."""

  def __init__(self, path: pathlib.Path, run: list):
    self.path, self.run, self.stored = path, run, read_lines(path)
    assert all(line["run"] == run for line in self.stored), (
      f"{path} does not belong to the run {run}"
    )
    while self.stored and not judged(
      [from_json(r, None) for group in self.stored[-1]["groups"] for r in group]
    ):
      self.stored.pop()  # the sandbox that broke there may work now
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.stored))
    self.begun = time.monotonic() - (self.stored[-1]["time_s"] if self.stored else 0.0)

  @property
  def time_s(self) -> float:
    """Since the run began; of earlier sessions, what the batches on disk took."""
    return round(time.monotonic() - self.begun, 3)

  def around(self, collect: Callable) -> Callable:
    """collect(params, [(task, first attempt)]) -> groups, those on disk first."""

    def collect_or_read(params, asked):
      if self.stored:
        line = self.stored.pop(0)
        assert line["first"] == [first for _, first in asked], (
          f"{self.path} does not belong to this run"
        )
        return [
          [from_json(r, task) for r in group] for (task, _), group in zip(asked, line["groups"])
        ]
      groups = collect(params, asked)
      line = {
        "run": self.run,
        "first": [first for _, first in asked],
        "time_s": self.time_s,
        "groups": [[to_json(r) for r in g] for g in groups],
      }
      with open(self.path, "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
      return groups

    return collect_or_read


def to_json(r: Rollout) -> dict:
  return dataclasses.asdict(dataclasses.replace(r, task=None)) | {
    "feedback": [r.feedback.reward, r.feedback.text, r.feedback.status.value]
  }


def from_json(line: dict, task: Task | None) -> Rollout:
  reward, text, status = line["feedback"]
  return Rollout(**line | {"task": task, "feedback": Feedback(reward, text, Status(status))})


def calibrate(
  task: Task, *, below: float, attempts: int, collect: Callable, env_failures: int = 3
) -> dict[str, Any]:
  """Base attempts on one candidate; ends early once it is too easy even if all that would come failed, when its pass@64 is a rough figure."""
  budget = Budget(attempts, env_failures=env_failures)
  while budget.left:
    budget.count(collect(budget.asked))
    if stats.pass_at_k(attempts, budget.successes, 64) >= below:
      break
  n, c = budget.attempts, budget.successes
  pass_at_64 = stats.pass_at_k(n, c, min(64, n))
  return {
    "task_id": task.id,
    "attempts": n,
    "successes": c,
    "pass@64": pass_at_64,
    "used": n >= attempts and pass_at_64 < below,
  }


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


def exact_difficulty(
  task: Task, programs: list[str], *, below: float, prompt: list[int], chat, logp: Callable
) -> dict[str, Any]:
  """From the probability of the known solutions: a lower bound, in which solutions of another form are missing. logp([rollout]) -> nats each."""
  rows = [
    Rollout(task, prompt, tokens, [0.0] * len(tokens), "stop", text, Feedback(1.0, ""))
    for text in programs
    for tokens in [chat.text_tokens(text) + [chat.stop_tokens[0]]]
  ]
  p = min(float(np.exp(logp(rows)).sum()), 1.0)
  pass_at_64 = 1.0 - (1.0 - p) ** 64
  return {
    "task_id": task.id,
    "pass@1": p,
    "solutions": len(rows),
    "pass@64": pass_at_64,
    "used": pass_at_64 < below,
  }


def make_logp(score: Callable, make_batch: Callable, rows: int) -> Callable:
  """-> logp([rollout]) -> log-probability of each whole response, in batches of one shape. score(batch) -> logp_BR."""

  def logp(rollouts: list[Rollout]) -> np.ndarray:
    said = {}
    for first in range(0, len(rollouts), rows):
      part = rollouts[first : first + rows]
      packed = make_batch([part + part[:1] * (rows - len(part))])
      logp_B = np.where(packed.batch.weight_BR > 0, np.asarray(score(packed.batch)), 0.0).sum(1)
      # packs have their rows in an order of their own
      said |= dict(zip(map(id, packed.rollouts), logp_B))
    return np.array([said[id(r)] for r in rollouts])

  return logp


class Stopped(Exception):
  """Another thread's run failed, or somebody wants the end: no further batch is begun. What is on disk is intact."""


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
    method["counterfactual"] = methods.cell("counterfactual", "none")
  elif method["counterfactual"]["name"] == "none":
    method["counterfactual"] = methods.cell("counterfactual", "notes", sources=("siblings",))
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
      w.model, make_objective(methods.row("grpo")), temperature=c.rollout.temperature
    )
    score = jax.jit(lambda batch: plain(w.params, None, batch).logp_BR, out_shardings=w.everywhere)
    shapes, parts = (
      fixed_shapes(self.packs, d.rollouts // self.packs, c.data, c.rollout.max_new_tokens),
      methods.build(methods.row("grpo")),
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


def check(c) -> None:
  """ValueError for settings that this mode cannot run with."""
  d = c.discover
  if not d.arms or len(set(d.arms)) < len(d.arms) or len(set(d.indices)) < len(d.indices):
    raise ValueError(
      f"config.discover.arms={tuple(d.arms)} must name at least one, and neither arms nor config.discover.indices={tuple(d.indices)} one twice"
    )
  if d.tokens < 0:
    raise ValueError(f"config.discover.tokens={d.tokens} must be at least 0 (0: no limit)")
  for arm in d.arms:
    if arm not in ARMS:
      raise ValueError(f"config.discover.arms={arm!r} is unknown; choose from {list(ARMS)}")
  if jax.process_count() > 1:
    raise ValueError("--mode=discover runs in one process; it uses all of its devices")
  if d.history not in HISTORIES:
    raise ValueError(
      f"config.discover.history={d.history!r} is unknown; choose from {list(HISTORIES)}"
    )
  for arm in (arm for arm in LEARNING if arm in d.arms):
    if not make_objective(c.method.to_dict()).needs_teacher:
      raise ValueError(
        f"config.discover.arms holds {arm!r}, but config.method has no teacher to learn from: its reward is 0 until the first success; choose one that has"
      )
    if sources := set(method_of(c, arm)["counterfactual"].get("sources", ())) - {"siblings"}:
      raise ValueError(
        f"config.method.counterfactual.sources holds {sorted(sources)[0]!r}, which would try the question outside the budget: "
        "--mode=discover takes ('siblings',) alone"
      )
  if c.train.updates_per_batch != 1:
    raise ValueError(
      f"config.train.updates_per_batch={c.train.updates_per_batch} must be 1: --mode=discover makes one update a batch"
    )
  if any(i < 0 for i in d.indices):
    raise ValueError(f"config.discover.indices={tuple(d.indices)} must not be negative")
  if d.rollouts % c.train.micro_batches:
    raise ValueError(
      f"config.discover.rollouts={d.rollouts} rows do not divide into train.micro_batches={c.train.micro_batches}"
    )
  if d.below_pass_at_64 < 1 and d.calibration < 64:
    raise ValueError(
      f"config.discover.calibration={d.calibration} must be at least 64 where below_pass_at_64={d.below_pass_at_64} asks for it"
    )


def discover(c, workdir: str) -> dict[str, Any]:
  """Makes every (arm, question, seed) run that is not done yet and returns the summary, also written to discover.json. What is finished is left as it is."""
  workdir, d = pathlib.Path(workdir), c.discover
  with blame_settings():
    check(c)
    parts = sharding.divide(jax.devices(), d.parallel)
    same_run(
      workdir,
      c,
      begun=any(
        (workdir / name).exists() for name in ("attempts", "discover.jsonl", "difficulty.jsonl")
      ),
    )
  if (workdir / "discover.json").exists():  # written last
    return json.loads((workdir / "discover.json").read_text())
  stop = threading.Event()
  with wired(c, devices=parts[0]) as w:
    describe_run(
      workdir,
      c,
      {"sandbox_isolation": w.isolation, "mesh": None if w.mesh is None else dict(w.mesh.shape)},
    )
    first = Solver(c, w, stop)
    tasks = questions(c, first, workdir)
    runs = [
      Run(n, arm, task, place, seed)
      for n, (seed, (place, task), arm) in enumerate(
        itertools.product(range(d.seeds), enumerate(tasks), d.arms)
      )
    ]
    finish_all(c, workdir, runs, w, first, parts[1:], stop)
  number = {(run.arm, run.task.id, run.seed): run.number for run in runs}
  lines = sorted(
    read_lines(workdir / "discover.jsonl"),
    key=lambda line: number[line["arm"], line["task_id"], line["seed"]],
  )
  difficulty = {
    line["task_id"]: line["pass@64"] for line in read_lines(workdir / "difficulty.jsonl")
  }
  summary = discovery.summarise(lines, d.attempts, difficulty=difficulty)
  discovery.plot(lines, d.attempts, workdir / "discover.png")
  write_atomically(
    workdir / "discover.txt", "".join(line + "\n" for line in discovery.summary_lines(summary))
  )
  write_atomically(workdir / "discover.json", json.dumps(summary, indent=2) + "\n")
  return summary


def questions(c, solver: Solver, workdir: pathlib.Path) -> list[Task]:
  env, d = solver.env, c.discover
  with blame_settings():
    if isinstance(env, RowEnv) and max(d.indices, default=0) >= env.size(d.split):
      raise ValueError(
        f"config.discover.indices={tuple(d.indices)}: split {d.split!r} has {env.size(d.split)} tasks, numbered from 0"
      )
    tasks = [env.task(d.split, i) for i in d.indices] or first_tasks(
      env, d.split, d.candidates if d.below_pass_at_64 < 1 else d.questions
    )
  return choose_hard(tasks, d, workdir, solver.measure()) if d.below_pass_at_64 < 1 else tasks


def finish_all(
  c,
  workdir: pathlib.Path,
  runs: list[Run],
  w: Wired,
  first: Solver,
  more_devices: list,
  stop: threading.Event,
) -> None:
  """Makes the runs that are not done: `first` in this thread, and a solver in a thread of its own for each part of `more_devices`.

  Whatever ends one of them, an error or an interrupt, stops the others after their present batch and is raised here.
  """
  done = {
    (line["arm"], line["task_id"], line["seed"]) for line in read_lines(workdir / "discover.jsonl")
  }
  # a job's runs follow one another; without warm starts each run is a job
  jobs: dict[Any, list[Run]] = {}
  for run in runs:
    if (run.arm, run.task.id, run.seed) not in done:
      jobs.setdefault(
        (run.arm, run.seed) if c.discover.warm_start and run.arm in LEARNING else run.number, []
      ).append(run)
  todo: queue.SimpleQueue = queue.SimpleQueue()
  for job in jobs.values():
    todo.put(job)
  writing = threading.Lock()

  def finish(solver: Solver, run: Run) -> None:
    log = Attempts(
      workdir / "attempts" / f"{run.number:05d}.jsonl", [run.arm, run.task.id, run.seed]
    )
    chain = (
      workdir / "warm" / f"{run.arm}_seed_{run.seed}"
      if c.discover.warm_start and run.arm in LEARNING
      else None
    )
    start = (
      checkpoint.restore_params(chain, solver.base, step=run.place) if chain and run.place else None
    )
    if start is not None and solver.w.mesh is None:
      start = uncommitted(start)
    line, state = solver.solve(run, log, start)
    # it is there if a kill came between the two writes
    if chain and run.place + 1 not in checkpoint.all_steps(chain):
      checkpoint.save(chain, run.place + 1, state._replace(opt_state=None, teacher=None), {})
    with writing, open(workdir / "discover.jsonl", "a", encoding="utf-8") as out:
      out.write(json.dumps(line) + "\n")
    log.path.unlink()

  def next_job() -> list[Run]:
    try:
      return todo.get_nowait()
    except queue.Empty:
      return []

  def work(solver: Solver) -> None:
    try:
      while job := next_job():
        for run in job:
          finish(solver, run)
    except Stopped:
      return

  def beside(devices) -> None:
    try:
      with on_other_devices(c, w, devices) as other:
        work(Solver(c, other, stop))
    except BaseException:
      stop.set()
      raise

  with concurrent.futures.ThreadPoolExecutor(max(1, len(more_devices))) as pool:
    others = [pool.submit(beside, devices) for devices in more_devices]
    try:
      work(first)
      for other in others:
        other.result()
    except BaseException:
      stop.set()
      raise
  shutil.rmtree(workdir / "attempts", ignore_errors=True)


def choose_hard(candidates: list[Task], d, workdir: pathlib.Path, measure: Callable) -> list[Task]:
  """The first `d.questions` candidates that measure(task) finds hard enough."""
  known = {line["task_id"]: line for line in read_lines(workdir / "difficulty.jsonl")}
  chosen = []
  with open(workdir / "difficulty.jsonl", "a", encoding="utf-8") as log:
    for task in candidates:
      if len(chosen) == d.questions:
        break
      if task.id not in known:
        known[task.id] = measure(task)
        log.write(json.dumps(known[task.id]) + "\n")
        log.flush()
      if known[task.id]["used"]:
        chosen.append(task)
  with blame_settings():
    if not chosen:
      raise ValueError(
        f"config.discover.below_pass_at_64={d.below_pass_at_64}: none of {len(candidates)} candidates is as hard as that"
      )
  return chosen


def read_lines(path: pathlib.Path) -> list[dict]:
  """Whole lines; a last one that a kill cut short is removed from the file."""
  if not path.exists():
    return []
  text = path.read_text(encoding="utf-8")
  whole = text[: text.rfind("\n") + 1]
  if whole != text:
    write_atomically(path, whole)
  return [json.loads(line) for line in whole.splitlines()]
