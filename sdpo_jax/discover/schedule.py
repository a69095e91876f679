"""Spreads the runs of a session over parts of the devices, one thread each, and records them.

Each part holds the weights and takes the next job when it is done with one. The parts share the
environment with its sandbox, and nothing else.

A job is one run. With warm starts it is all runs of one learning arm and seed, which follow one
another: each begins with the weights that the one before ended with, from warm/ARM_seed_SEED.
"""

import concurrent.futures
import json
import pathlib
import queue
import shutil
import threading
from typing import Any, Iterator

from sdpo_jax import checkpoint
from sdpo_jax.discover.arms import LEARNING, ArmRun
from sdpo_jax.discover.replay import AttemptLog
from sdpo_jax.discover.solver import Solver, Stopped
from sdpo_jax.session import Session, on_other_devices, uncommitted
from sdpo_jax.workdir import read_lines


def finish_all(
  c,
  workdir: pathlib.Path,
  runs: list[ArmRun],
  session: Session,
  first: Solver,
  other_devices: list,
  stop: threading.Event,
) -> None:
  """Makes the runs that are not done: `first` in this thread, the others in threads of their own.

  session: on the devices of `first`; each element of other_devices gets a copy of it. Whatever
  ends one thread, an error or an interrupt, stops the others after their present batch and is
  raised here.
  """
  schedule = Schedule(c, workdir, runs)

  def work_beside(devices) -> None:
    try:
      with on_other_devices(c, session, devices) as copy:
        schedule.work(Solver(c, copy, stop))
    except BaseException:
      stop.set()
      raise

  with concurrent.futures.ThreadPoolExecutor(max(1, len(other_devices))) as pool:
    others = [pool.submit(work_beside, devices) for devices in other_devices]
    try:
      schedule.work(first)
      for other in others:
        other.result()
    except BaseException:
      # Set inside the pool's block, which waits for the threads on leaving.
      stop.set()
      raise
  shutil.rmtree(workdir / "attempts", ignore_errors=True)


class Schedule:
  """Hands the unfinished runs of a work directory to solvers. Its methods are safe in threads."""

  def __init__(self, c, workdir: pathlib.Path, runs: list[ArmRun]):
    self.workdir = workdir
    self.warm_start = c.discover.warm_start
    self.results = workdir / "discover.jsonl"
    self.writing = threading.Lock()  # of results
    self.jobs: queue.SimpleQueue[list[ArmRun]] = queue.SimpleQueue()
    for job in self._jobs(runs):
      self.jobs.put(job)

  def _jobs(self, runs: list[ArmRun]) -> list[list[ArmRun]]:
    lines = read_lines(self.results)
    finished = {(line["arm"], line["task_id"], line["seed"]) for line in lines}
    jobs: dict[Any, list[ArmRun]] = {}
    for run in runs:
      if run.key not in finished:
        name = (run.arm, run.seed) if self._is_warm(run) else run.number
        jobs.setdefault(name, []).append(run)
    return list(jobs.values())

  def _is_warm(self, run: ArmRun) -> bool:
    return self.warm_start and run.arm in LEARNING

  def work(self, solver: Solver) -> None:
    """Makes runs until no job is left, or until the session is stopped."""
    try:
      for job in self._take_jobs():
        for run in job:
          self._finish(solver, run)
    except Stopped:
      return

  def _take_jobs(self) -> Iterator[list[ArmRun]]:
    while True:
      try:
        job = self.jobs.get_nowait()
      except queue.Empty:
        return
      yield job

  def _finish(self, solver: Solver, run: ArmRun) -> None:
    log = AttemptLog(self.workdir / "attempts" / f"{run.number:05d}.jsonl", list(run.key))
    if self._is_warm(run):
      line = self._solve_warm(solver, run, log)
    else:
      line, _ = solver.solve(run, log)
    with self.writing, open(self.results, "a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
    log.path.unlink()

  def _solve_warm(self, solver: Solver, run: ArmRun, log: AttemptLog) -> dict[str, Any]:
    """Solves a run from the weights of the run before it, and keeps those that it ends with."""
    kept = self.workdir / "warm" / f"{run.arm}_seed_{run.seed}"
    start = None
    if run.place > 0:
      start = checkpoint.restore_params(kept, solver.base, step=run.place)
      if solver.session.mesh is None:
        start = uncommitted(start)
    line, state = solver.solve(run, log, start)
    # They are there already if a kill came between this write and that of the run's line.
    if run.place + 1 not in checkpoint.all_steps(kept):
      checkpoint.save(kept, run.place + 1, state._replace(opt_state=None, teacher=None), {})
    return line
