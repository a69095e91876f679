r"""Runs --mode=discover: attempts one hard question again and again, and learns between attempts.

This is test-time self-distillation: the reward is binary, and no solution is known. Source: arXiv
2601.20802, section 5. `arms.py` has the arms, which differ in how they spend a budget;
`results.py` says what the figures mean.

A run is one (arm, question, seed). It stops at its first success, or when its budget (attempts,
generated tokens) is spent. best_of_k spends its whole budget, so that discovery@k is the unbiased
estimator pass@k with n = budget.

An attempt that the environment could not judge is no attempt: it enters no count but `env_failed`,
and the run goes on.

Determinism: a run is a pure function of (weights, settings, question, seed), as long as every
attempt is judged. It starts from the base weights (but for warm starts), so nothing leaks between
questions. The result does not depend on the order of the runs, on what shares a batch, or on the
part of the devices. It does depend, by rounding, on the shape of the mesh.

Several questions at a time (config.discover.parallel): the devices are cut into that many equal
parts, and config.mesh describes one of them. Whether the weights fit is the user's to know. A
killed session may go on with another number. The mode runs in one process. Not done: several
processes, and several questions in one device program.

Warm starts (config.discover.warm_start; off): a learning arm's run on question n begins with the
weights that its run on question n - 1 of the same seed ended with. Optimizer and teacher begin
anew. The results then depend on the order of the questions, and are no longer independent of one
another, as the intervals suppose. The runs of a seed follow one another; those of other seeds and
arms may share the time.

Hard questions: with config.discover.below_pass_at_64 < 1 only candidates are used whose pass@64
under the base model lies below it (`difficulty.py`).

Files of the work directory:
  difficulty.jsonl  one candidate a line: its pass@64, and whether it is used
  attempts/*.jsonl  the judged batches of the runs under way (`replay.py`). A killed session reads
                    them, makes the updates again, and goes on in mid-question to the same end
  warm/ARM_seed_*   with warm starts: the weights that the last runs of each seed ended with
  discover.jsonl    one finished run a line, in the order in which they ended. time_s is what a
                    run took, earlier sessions included; runs side by side each count in full
  discover.json     the summary, written last; discover.txt is what is printed, discover.png a plot

Errors: SettingError for a wrong setting, before anything is sampled. RunError where batches
without any verdict follow one another (train.max_env_failures_in_a_row).
"""

import itertools
import json
import logging
import pathlib
import threading
from typing import Any

import jax

from sdpo_jax import sharding
from sdpo_jax.config import defaults_of, refuse_episodes, validate
from sdpo_jax.data.tasks import RowEnv, first_tasks
from sdpo_jax.discover import results
from sdpo_jax.discover.arms import ARMS, LEARNING, ArmRun
from sdpo_jax.discover.difficulty import choose_hard
from sdpo_jax.discover.schedule import finish_all
from sdpo_jax.discover.solver import Solver, method_of
from sdpo_jax.discover.turns import HISTORIES
from sdpo_jax.errors import blame_settings, unknown
from sdpo_jax.objectives.build import build_method
from sdpo_jax.preemption import Notice
from sdpo_jax.records import Task
from sdpo_jax.session import open_session, same_rows
from sdpo_jax.workdir import check_same_run, describe_run, read_lines, write_atomically


def discover(c, workdir: str) -> dict[str, Any]:
  """Makes every run that is not done yet, and returns the summary, also written to discover.json.

  Nothing is sampled and no file changes if the work directory is finished.
  """
  workdir = pathlib.Path(workdir)
  with blame_settings():
    check(c)
    first_devices, *other_devices = sharding.split_devices(jax.devices(), c.discover.parallel)
    written_first = ("attempts", "discover.jsonl", "difficulty.jsonl")
    begun = any((workdir / name).exists() for name in written_first)
    check_same_run(workdir, c, begun=begun, defaults=defaults_of(c))
  summary_path = workdir / "discover.json"
  if summary_path.exists():  # written last
    return json.loads(summary_path.read_text())
  stop = threading.Event()
  notice = Notice("the same command goes on with what is not done")
  with open_session(c, devices=first_devices, check_stop=notice.check) as session, notice:
    mesh_shape = None if session.mesh is None else dict(session.mesh.shape)
    with blame_settings():
      rows = same_rows(workdir, session.collector.env, (c.discover.split,), begun=begun)
    facts = {"sandbox_isolation": session.isolation, "mesh": mesh_shape, "rows": rows}
    first = Solver(c, session, stop)
    if first.continuation is not None:
      finding = first.continuation.finding
      facts["conversations"] = finding._asdict()
      if finding.way != "exact":
        logging.warning("%s", first.continuation.describe())
    describe_run(workdir, c, facts)
    runs = list_runs(c.discover, choose_tasks(c, first, workdir))
    finish_all(c, workdir, runs, session, first, other_devices, stop)
  return write_results(workdir, runs, c.discover.attempts)


def check(c) -> None:
  """Raises ValueError for settings that this mode cannot run with."""
  validate(c)
  refuse_episodes(c, "--mode=discover")
  d = c.discover
  _check_choices(d)
  for arm in LEARNING:
    if arm in d.arms:
      _check_learning(c, arm)
  if c.method.teacher_weights.name == "remote":
    raise ValueError(
      "config.method.teacher_weights.name='remote' is not for --mode=discover, whose teacher is "
      "the model that learns: choose another one"
    )
  if c.method.memory.name != "none":
    raise ValueError(
      f"config.method.memory.name={c.method.memory.name!r} is not for --mode=discover, which "
      "begins anew with each question: choose another method"
    )
  if c.train.updates_per_batch != 1:
    raise ValueError(
      f"config.train.updates_per_batch={c.train.updates_per_batch} must be 1: --mode=discover "
      "makes one update a batch"
    )
  if d.rollouts % c.train.micro_batches:
    raise ValueError(
      f"config.discover.rollouts={d.rollouts} rows do not divide into "
      f"train.micro_batches={c.train.micro_batches}"
    )
  if d.below_pass_at_64 < 1 and d.calibration < 64:
    raise ValueError(
      f"config.discover.calibration={d.calibration} must be at least 64 where "
      f"below_pass_at_64={d.below_pass_at_64} asks for it"
    )


def _check_choices(d) -> None:
  arms, indices = tuple(d.arms), tuple(d.indices)
  if not arms or len(set(arms)) < len(arms) or len(set(indices)) < len(indices):
    raise ValueError(
      f"config.discover.arms={arms} must name at least one, and neither arms nor "
      f"config.discover.indices={indices} one twice"
    )
  for arm in arms:
    if arm not in ARMS:
      raise ValueError(unknown("config.discover.arms", arm, ARMS))
  if jax.process_count() > 1:
    raise ValueError("--mode=discover runs in one process; it uses all of its devices")
  if d.history not in HISTORIES:
    raise ValueError(unknown("config.discover.history", d.history, HISTORIES))


def _check_learning(c, arm: str) -> None:
  method = build_method(c.method.to_dict())
  if method.token_signal is None:
    raise ValueError(
      f"config.discover.arms holds {arm!r}, but config.method learns from the reward alone, which "
      "is 0 until the first success: choose a method with a token signal"
    )
  if getattr(method.teacher_context, "needs_success", False):
    raise ValueError(
      f"config.discover.arms holds {arm!r}, but config.method.teacher_context.name="
      f"{c.method.teacher_context.name!r} shows successes alone, and --mode=discover ends with the "
      "first one: choose a context with feedback or a reference"
    )
  sources = method_of(c, arm)["counterfactual"].get("sources", ())
  others = sorted(set(sources) - {"siblings"})
  if others:
    raise ValueError(
      f"config.method.counterfactual.sources holds {others[0]!r}, which would try the question "
      "outside the budget: --mode=discover takes ('siblings',) alone"
    )


def choose_tasks(c, solver: Solver, workdir: pathlib.Path) -> list[Task]:
  """Returns the questions: those of config.discover.indices or the first ones, hard ones if asked.

  Raises SettingError for an index that the split does not have.
  """
  env = solver.env
  d = c.discover
  only_hard = d.below_pass_at_64 < 1
  with blame_settings():
    if isinstance(env, RowEnv) and max(d.indices, default=0) >= env.size(d.split):
      raise ValueError(
        f"config.discover.indices={tuple(d.indices)}: split {d.split!r} has {env.size(d.split)} "
        "tasks, numbered from 0"
      )
    if d.indices:
      tasks = [env.task(d.split, i) for i in d.indices]
    else:
      tasks = first_tasks(env, d.split, d.candidates if only_hard else d.questions)
  if not only_hard:
    return tasks
  return choose_hard(tasks, d, workdir, solver.make_measure())


def list_runs(d, tasks: list[Task]) -> list[ArmRun]:
  """Returns all runs of a session, numbered; the arm changes fastest, the seed slowest.

  d: config.discover. Files of attempts are named by these numbers.
  """
  product = itertools.product(range(d.seeds), enumerate(tasks), d.arms)
  return [
    ArmRun(number, arm, task, place, seed)
    for number, (seed, (place, task), arm) in enumerate(product)
  ]


def write_results(workdir: pathlib.Path, runs: list[ArmRun], attempts: int) -> dict[str, Any]:
  """Writes discover.png, discover.txt and discover.json from discover.jsonl; returns the summary.

  attempts: the budget of each run.
  """
  number = {run.key: run.number for run in runs}
  lines = sorted(
    read_lines(workdir / "discover.jsonl"),
    key=lambda line: number[line["arm"], line["task_id"], line["seed"]],
  )
  measured = read_lines(workdir / "difficulty.jsonl")
  difficulty = {line["task_id"]: line["pass@64"] for line in measured}
  summary = results.summarise(lines, attempts, difficulty=difficulty)
  results.plot(lines, attempts, workdir / "discover.png")
  text = "".join(line + "\n" for line in results.summary_lines(summary))
  write_atomically(workdir / "discover.txt", text)
  write_atomically(workdir / "discover.json", json.dumps(summary, indent=2) + "\n")
  return summary
