"""Runs spread over devices and threads."""

import concurrent.futures
import json
import pathlib
import queue
import shutil
import threading
from typing import Any

from sdpo_jax import checkpoint
from sdpo_jax.discover.arms import LEARNING
from sdpo_jax.discover.replay import Attempts
from sdpo_jax.discover.solver import Run, Solver, Stopped
from sdpo_jax.session import Wired, on_other_devices, uncommitted
from sdpo_jax.workdir import read_lines


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
