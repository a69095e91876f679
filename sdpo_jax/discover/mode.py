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

import itertools
import json
import pathlib
import threading
from typing import Any

import jax

from sdpo_jax import sharding
from sdpo_jax.data.tasks import RowEnv, first_tasks
from sdpo_jax.discover import results
from sdpo_jax.discover.arms import ARMS, HISTORIES, LEARNING
from sdpo_jax.discover.difficulty import choose_hard
from sdpo_jax.discover.schedule import finish_all
from sdpo_jax.discover.solver import Run, Solver, method_of
from sdpo_jax.errors import blame_settings
from sdpo_jax.objectives.loss import make_objective
from sdpo_jax.records import Task
from sdpo_jax.session import wired
from sdpo_jax.workdir import check_same_run, describe_run, read_lines, write_atomically


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
    parts = sharding.split_devices(jax.devices(), d.parallel)
    check_same_run(
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
  summary = results.summarise(lines, d.attempts, difficulty=difficulty)
  results.plot(lines, d.attempts, workdir / "discover.png")
  write_atomically(
    workdir / "discover.txt", "".join(line + "\n" for line in results.summary_lines(summary))
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
