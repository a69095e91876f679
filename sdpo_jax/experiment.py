r"""Runs a grid of experiments, resumably, and then writes one report of all runs.

  python -m sdpo_jax.experiment --config=configs/experiments/FILE.py[:local] --workdir=DIR \
      [--jobs=2] [--results=results/NAME]
  python -m sdpo_jax.experiment --config=configs/experiments/FILE.py --workdir=DIR --commands
  python -m sdpo_jax.experiment --summary

The file's `get_grid()` returns {run name: arguments of sdpo_jax.main}. Each run has its own process
and its own directory under DIR. A grid that was killed therefore goes on where it was: finished
runs are left alone, unfinished ones resume. With several jobs each gets its share of the cores.

For a cluster, `--commands` runs nothing. It keeps what has ended under DIR and prints what has not,
one run a line: the trials first, then the grid. Each line is for a machine of its own that sees
DIR; the same command tells again what is left. A run that is at work has not ended, so its line
comes again: do not start it twice.

`--config=FILE.py:local` runs the file's `get_local()` instead, a grid of seconds that shows that
the runs work; nothing is tuned for it.

The file's `get_tuning()`, if it has one, returns trials that choose settings for the grid, on
questions and seeds of their own (see tuning.py). They run first, under DIR/tuning/ARM/TRIAL.

With `SUITES = "FILE"` in it, the last checkpoint of each run is evaluated on the suites of that
file when the run has ended (--mode=eval), which goes on likewise where it was.

With `REUSED = ("results/OTHER", ...)` in it, a run or a trial that ended there from the same
arguments is taken over instead of being repeated; files of one REUSED have one SUITES. With
`RUN_S = 150.0`, what a run takes on one core, the command says beforehand how many CPU hours are to
go. At its end it says how many it has spent itself.

What a run gave is kept under --results, else under DIR, as soon as it has ended (see kept.py):
  curves.json   every evaluation of every run, and how its arm was tuned
  scores.json   what the last checkpoints can do, question by question (see final_scores.py)
  trials.json   how each trial ended
  tuning.json   the trials and the choice, as soon as it is made
With --results=results/NAME a grid goes on even where DIR is gone: what stands there as ended is not
repeated. At the end, and by --report alone at any time after the trials, DIR also gets
  report/       the curves of all runs whose directories are there
and runs that have not ended are kept too, as such. --summary, called at the top of the repository,
writes RESULTS.md from all that stands in results/ (see summary/).

Exit status: 0 if all runs ended well; 1 if one failed, or if DIR cannot be written (one line);
2 for a wrong command line; 143 if it was asked to stop (SIGTERM), after its runs have saved.
"""

import argparse
import json
import os
import pathlib
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import Callable, NamedTuple

from sdpo_jax import report, summary, tuning
from sdpo_jax.config import in_file
from sdpo_jax.errors import RunError, local_path
from sdpo_jax.kept import Kept, has_ended_in, is_scored_in
from sdpo_jax.tuning import Grid
from sdpo_jax.workdir import write_atomically

TUNING_FILE = "tuning.json"
# Set by SIGTERM: to exit from the handler could miss a run that is just being started.
_asked_to_stop = threading.Event()
SAVE_S = 120.0  # that a run may take to save and end once it is asked to
Commands = list[list[str]]  # arguments of sdpo_jax.main, one after another in one directory


class Experiment:
  """What an experiment file says: the trials of its arms, if it has any, and its grid."""

  def __init__(self, path: str):
    """Reads and checks the file; ValueError for what cannot be run, or is no fair comparison."""
    self.path, _, argument = path.partition(":")
    self._maker = "get_local" if argument == "local" else "get_grid"
    if argument not in ("", "local"):
      raise ValueError(f"--config={path}: {argument!r} is unknown; choose from ['local']")
    if not os.path.isfile(self.path):
      raise ValueError(f"--config={path}: no such file")
    self._names = self._blaming_the_file(runpy.run_path, self.path)
    if self._maker not in self._names:
      is_run = "get_config" in self._names
      hint = "; a single run is for python -m sdpo_jax.main" if is_run else ""
      raise ValueError(f"--config={path}: it has no {self._maker}(){hint}")
    self.suites = self._read_suites()
    self.reused = self._read_reused()
    self.run_s: float | None = None if argument else self._names.get("RUN_S")
    self.tuning: tuning.Tuning = {}
    if "get_tuning" not in self._names or argument:
      self.grid({})
      return
    self.tuning = tuning.read(self._blaming_the_file(self._names["get_tuning"]))
    tuning.check_trials(self.tuning)
    for choice in tuning.choices(self.tuning):
      self.grid(choice)

  def grid(self, choice: dict[str, str]) -> Grid:
    """Returns the grid after a choice {arm: trial}, which is empty where nothing is tuned."""
    chosen = [tuning.arguments_of(self.tuning, choice)] if self.tuning else []
    grid = self._blaming_the_file(self._names[self._maker], *chosen)
    is_grid = isinstance(grid, dict) and all(isinstance(x, (list, tuple)) for x in grid.values())
    if not is_grid:
      raise ValueError(
        f"--config={self.path}: {self._maker}() returns {type(grid).__name__}, "
        "not a dict of run names and lists of arguments"
      )
    if self.tuning:
      tuning.check_grid(self.tuning, choice, grid)
    return grid

  def _read_suites(self) -> str | None:
    """Returns the file of suites on which the last checkpoint of each run is evaluated, if any."""
    suites = self._names.get("SUITES")
    if suites is not None and not os.path.isfile(str(suites).partition(":")[0]):
      raise ValueError(f"--config={self.path}: SUITES={suites!r}: no such file")
    return suites

  def _read_reused(self) -> list[pathlib.Path]:
    """Returns the directories of results from which runs may be taken over."""
    reused = [pathlib.Path(path) for path in self._names.get("REUSED", ())]
    for path in reused:
      if not path.is_dir():
        raise ValueError(f"--config={self.path}: REUSED={str(path)!r}: no such directory")
    return reused

  def _blaming_the_file(self, function, *arguments):
    """Calls a function of the file; ValueError with the file's line for whatever it raises."""
    try:
      return function(*arguments)
    except Exception as error:
      raise ValueError(f"--config={in_file(self.path, error)}") from error


def launch(workdir: pathlib.Path, arguments: list[str], cores: list[int]) -> subprocess.Popen:
  """Starts one run in its own process, bound to its cores; its output goes to run.log."""
  workdir.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, *module_arguments(workdir, arguments)]
  with open(workdir / "run.log", "a", encoding="utf-8") as log:
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(process.pid, cores)  # before jax counts its threads
  return process


def module_arguments(workdir: pathlib.Path, arguments: list[str]) -> list[str]:
  """Returns what follows the name of the interpreter."""
  return ["-m", "sdpo_jax.main", *arguments, f"--workdir={workdir}"]


class Job(NamedTuple):
  """A run in progress."""

  name: str
  process: subprocess.Popen
  rest: Commands  # that follow when the process has ended well
  begun: float  # time.monotonic()


def run_all(
  runs: dict[str, Commands], root: pathlib.Path, jobs: int, on_end: Callable[[str], None]
) -> list[str]:
  """Runs everything, `jobs` runs at a time; returns the names of runs that failed.

  on_end: called with the name of each run whose commands have all ended well.
  """
  cores = _cores()
  waiting, failed = list(runs.items()), []
  running: dict[int, Job] = {}  # by slot; each slot has its share of the cores

  def begin(slot: int, name: str, commands: Commands) -> None:
    process = launch(root / name, commands[0], cores[slot::jobs] or cores)
    running[slot] = Job(name, process, commands[1:], time.monotonic())

  try:
    while waiting or running:
      for slot in range(jobs):
        if slot not in running and waiting:
          begin(slot, *waiting.pop(0))
      if _asked_to_stop.wait(0.2):
        sys.exit(143)
      for slot, job in list(running.items()):
        if job.process.poll() is None:
          continue
        del running[slot]
        _print_end(job, root, len(waiting) + len(running))
        if job.process.returncode:
          failed.append(job.name)
        elif job.rest:
          begin(slot, job.name, job.rest)
        elif not _is_kept(on_end, job.name):
          failed.append(job.name)
  finally:
    # none is left, unless one could not be started or this process is interrupted
    end_all([job.process for job in running.values()])
  return failed


def end_all(processes: list[subprocess.Popen]) -> None:
  """Asks runs to stop and waits until they have saved: a restart must not find them at work."""
  for process in processes:
    process.terminate()
  for process in processes:
    try:
      process.wait(SAVE_S)
    except subprocess.TimeoutExpired:
      process.kill()


def _cores() -> list[int]:
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def _print_end(job: Job, root: pathlib.Path, left: int):
  status = job.process.returncode
  result = f"failed with status {status}, see {root / job.name}/run.log" if status else "done"
  seconds = time.monotonic() - job.begun
  print(f"{job.name}: {result} after {seconds:.0f} s, {left} to go", flush=True)


def _is_kept(on_end: Callable[[str], None], name: str) -> bool:
  """Calls on_end, and says in one line why what a run gave cannot be kept; others go on."""
  try:
    on_end(name)
  except RunError as error:
    complain(error)
    return False
  return True


def run_grid(
  experiment: Experiment, root: pathlib.Path, jobs: int, kept: Kept, record: dict | None
) -> list[str]:
  """Runs what the grid lacks, and keeps what it gives; returns the names of runs that failed."""
  grid = experiment.grid(chosen(record))

  def keep(name: str) -> None:
    kept.add_run(name, grid[name], root / name, tuning.of_run(name, record), ended=True)

  missing = missing_runs(experiment, root, kept, record)
  say_cost("runs", len(missing), experiment.run_s)
  return run_all(missing, root, jobs, keep)


def missing_runs(
  experiment: Experiment, root: pathlib.Path, kept: Kept, record: dict | None
) -> dict[str, Commands]:
  """Returns the commands of each run that the grid lacks, after taking over what it may.

  record: the contents of tuning.json; None: no arm was tuned.
  """
  grid = experiment.grid(chosen(record))
  scored = experiment.suites is not None

  def commands(name: str) -> Commands:
    if not scored:
      return [grid[name]]
    place = [f"--checkpoint={root / name}", f"--suites={experiment.suites}"]
    return [grid[name], [*grid[name], "--mode=eval", *place]]

  def is_there(name: str) -> bool:
    if kept.has_run(name, grid[name], scored=scored):
      return True
    return kept.take_run(name, grid[name], tuning.of_run(name, record), scored=scored)

  return {name: commands(name) for name in grid if not is_there(name)}


def say_cost(what: str, count: int, run_s: float | None) -> None:
  """Says how much is to be run, and what it will take where the experiment states it."""
  if count:
    hours = "" if run_s is None else f", about {count * run_s / 3600:.1f} CPU hours"
    print(f"{count} {what} to go{hours}", flush=True)


def _cpu_hours() -> float:
  """Returns what all processes that this one started have taken, with theirs."""
  spent = resource.getrusage(resource.RUSAGE_CHILDREN)
  return (spent.ru_utime + spent.ru_stime) / 3600


def begun_runs(grid: Grid, root: pathlib.Path) -> list[pathlib.Path]:
  """Returns the work directories of the grid's runs that have settings to report."""
  return [root / name for name in grid if (root / name / "config.json").exists()]


def main(argv=None) -> int:
  """Runs the command line; returns the exit status."""
  flags = _parse(argv)
  try:
    if flags.summary:
      print(summary.write(pathlib.Path()))
      return 0
    if flags.jobs < 1:
      raise ValueError(f"--jobs={flags.jobs} must be at least 1")
    experiment, root = Experiment(flags.config), pathlib.Path(flags.workdir)
    kept = Kept(pathlib.Path(flags.results or flags.workdir), experiment.reused)
    if flags.report:
      record = recorded(experiment, kept.directory)
      if not begun_runs(experiment.grid(chosen(record)), root):
        raise ValueError(f"--workdir={flags.workdir}: no run of {flags.config} began there")
  except (ValueError, FileNotFoundError) as error:
    complain(error)
    return 2
  try:
    if flags.commands:
      print_commands(experiment, root, kept)
      return 0
    failed = []
    if not flags.report:
      try:
        record = tune(experiment, root, flags.jobs, kept)
        failed = run_grid(experiment, root, flags.jobs, kept, record)
      finally:
        print(f"{_cpu_hours():.2f} CPU hours were spent by this command")
    _report(experiment.grid(chosen(record)), root, record, kept)
  except (RunError, ValueError) as error:
    complain(error)
    return 1
  except OSError as error:  # of a run that fails for this reason, its run.log tells
    complain(f"{error.strerror or error}: {error.filename or root}")
    return 1
  return 1 if failed else 0


def complain(error: Exception | str) -> None:
  """Prints an error as one line."""
  print(f"sdpo_jax.experiment: {' '.join(str(error).split())}", file=sys.stderr)


def tune(experiment: Experiment, root: pathlib.Path, jobs: int, kept: Kept) -> dict | None:
  """Runs the trials, chooses, and writes tuning.json; returns its contents, None without trials.

  RunError if a trial failed: a choice among the others would not be the one that was announced.
  """
  if not experiment.tuning:
    return None
  runs = tuning.runs(experiment.tuning)

  def keep(name: str) -> None:
    kept.add_trial(name, runs[name], tuning.last_evaluation(root / name))

  missing = missing_trials(experiment, kept)
  say_cost("trials", len(missing), experiment.run_s)
  failed = run_all(missing, root, jobs, keep)
  if failed:
    raise RunError(f"nothing is chosen, since trials failed: {', '.join(failed)}")
  record = choose(experiment, kept)
  for arm, name in chosen(record).items():
    print(f"{arm}: {name} is chosen of {len(experiment.tuning[arm])} trials", flush=True)
  return record


def choose(experiment: Experiment, kept: Kept) -> dict:
  """Chooses by the trials, which have all ended; writes tuning.json and returns its contents."""
  record = tuning.choose(experiment.tuning, {name: x["end"] for name, x in kept.trials.items()})
  kept.directory.mkdir(parents=True, exist_ok=True)
  write_atomically(kept.directory / TUNING_FILE, json.dumps(record, indent=1) + "\n")
  return record


def missing_trials(experiment: Experiment, kept: Kept) -> dict[str, Commands]:
  """Returns the commands of each trial that has not ended, after taking over what it may."""
  return {
    name: [run]
    for name, run in tuning.runs(experiment.tuning).items()
    if not kept.has_trial(name, run) and not kept.take_trial(name, run)
  }


def print_commands(experiment: Experiment, root: pathlib.Path, kept: Kept) -> None:
  """Keeps what has ended under root, and prints the commands of what has not, a line for each run.

  The grid's commands wait until all trials have ended, which choose its settings.
  """
  for name, (arguments,) in missing_trials(experiment, kept).items():
    if has_ended_in(root / name, tuning.settings(name, arguments)):
      kept.add_trial(name, arguments, tuning.last_evaluation(root / name))
  missing = missing_trials(experiment, kept)
  if not missing:
    record = choose(experiment, kept) if experiment.tuning else None
    for name, (arguments, *rest) in missing_runs(experiment, root, kept, record).items():
      is_scored = not rest or is_scored_in(root / name)
      if is_scored and has_ended_in(root / name, tuning.settings(name, arguments)):
        how = tuning.of_run(name, record)
        kept.add_run(name, arguments, root / name, how, ended=True)
    missing = missing_runs(experiment, root, kept, record)
  for name, commands in missing.items():
    lines = [["python", *module_arguments(root / name, command)] for command in commands]
    print(" && ".join(map(shlex.join, lines)))


def recorded(experiment: Experiment, directory: pathlib.Path) -> dict | None:
  """Returns the contents of tuning.json; None without trials. ValueError if it cannot be used."""
  if not experiment.tuning:
    return None
  path = directory / TUNING_FILE
  if not path.exists():
    raise ValueError(f"{path}: no such file: until all trials have run, the grid is not chosen")
  record = json.loads(path.read_text(encoding="utf-8"))
  tuning.check_same_trials(experiment.tuning, record)
  return record


def chosen(record: dict | None) -> dict[str, str]:
  """Returns {arm: its chosen trial} of the contents of tuning.json."""
  return {} if record is None else tuning.choice_of(record)


def _parse(argv) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m sdpo_jax.experiment", description=__doc__.splitlines()[0]
  )
  parser.add_argument("--config", type=local_path, help="a file with get_grid()")
  parser.add_argument("--workdir", type=local_path)
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
  parser.add_argument("--results", type=local_path, help="where results are kept; default: workdir")
  parser.add_argument("--commands", action="store_true", help="only print what is to be run")
  parser.add_argument("--report", action="store_true", help="only summarise what is there")
  parser.add_argument("--summary", action="store_true", help="write RESULTS.md from results/")
  flags = parser.parse_args(argv)
  missing = [f"--{name}" for name in ("config", "workdir") if getattr(flags, name) is None]
  if flags.summary and (len(missing) < 2 or flags.report or flags.commands):
    parser.error("--summary goes alone: it reads results/")
  if missing and not flags.summary:
    parser.error(f"the following arguments are required: {', '.join(missing)}")
  return flags


def _report(grid: Grid, root: pathlib.Path, record: dict | None, kept: Kept):
  """Writes the report of the runs that have begun, and keeps what unfinished ones gave."""
  begun = begun_runs(grid, root)
  if not begun:
    return
  tuned = {name: tuning.of_run(name, record) for name in grid if root / name in begun}
  words = {root / name: summary.tuning_words(how) for name, how in tuned.items()}
  report.write_report(begun, root / "report", words)
  for name, how in tuned.items():
    if not kept.has_ended(name):
      kept.add_run(name, grid[name], root / name, how, ended=False)
  print(f"report: {root}/report/index.html")


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, lambda *_: _asked_to_stop.set())  # so that its runs end with it
  sys.exit(main())
