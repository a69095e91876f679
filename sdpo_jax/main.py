r"""The command line of training, evaluation, diagnosis, discovery and planning.

  python -m sdpo_jax.main --config=configs/FILE.py[:key=value,...] --workdir=DIR \
      [--mode=train|eval|diagnose|discover|plan] [--config.section.key=value ...]

  train     (default) runs, resumes if the work directory holds a checkpoint, ends with a report
  eval      scores a checkpoint: --checkpoint=WORKDIR[:step], where the step may be "best", or a
            Hugging Face directory, on the final splits or on
            --suites=configs/eval/FILE.py[:key=value,...]
  diagnose  says in minutes, without training, what can learn here and what would hurt
  discover  is test-time self-distillation on single hard questions
  plan      compiles the train and decode steps for --topology (v5p:2x2x2, v5e:8x8, v6e:4x4,
            h200:8), without the hardware, and says whether they fit

Without --workdir a fresh directory under runs/ is made and printed.

train ends early where config.train.stop_when_worse says so. That is a success: the command says
why, run.json holds it under `ended`, and the same command again trains nothing. The best checkpoint
by config.checkpoint.best is kept beside the last ones, and named at the end.

Exit status: 0 success, 2 a wrong command line or setting (one line on stderr), 1 a failed run; of a
full disk it says so in a line. 143: stopped by SIGTERM and saved, 134: another process of the run
is lost; after these two the same command goes on.
"""

import contextlib
import datetime
import os
import pathlib
import sys
import time
import traceback

from absl import flags
from absl import logging as absl_logging

from sdpo_jax.errors import (
  Preempted,
  RunError,
  SettingError,
  TaskError,
  UsageError,
  blame_disk,
  local_path,
  unknown,
)

# jax takes seconds to import: whatever needs it is imported after the checks that do not

MODES = ("train", "eval", "diagnose", "discover", "plan")
# flag -> (the mode that reads it, what to do instead in another one)
_FLAGS_OF_ONE_MODE = {
  "suites": ("eval", ""),
  "checkpoint": ("eval", "; to begin from it, export it and set config.model.path"),
  "topology": ("plan", ""),
}


def define_flags() -> flags.FlagValues:
  """Defines the flags in a registry of their own, so that importing this file does nothing."""
  f = flags.FlagValues()
  flags.DEFINE_string(
    "config",
    "configs/tinycode.py",
    "settings: FILE[:key=value,...]; --config.section.key=value changes one",
    flag_values=f,
  )
  flags.DEFINE_string(
    "workdir",
    None,
    "where everything about the run goes; default: a fresh directory under runs/",
    flag_values=f,
  )
  flags.DEFINE_string("mode", "train", " | ".join(MODES), flag_values=f)
  flags.DEFINE_string(
    "checkpoint", None, "eval: WORKDIR[:step] or a Hugging Face directory", flag_values=f
  )
  flags.DEFINE_string(
    "suites",
    None,
    "eval: environments and splits, FILE[:key=value,...]; default: those of the configuration",
    flag_values=f,
  )
  flags.DEFINE_string(
    "distributed",
    None,
    "several processes: auto (TPU pods, Slurm, ...) or HOST:PORT,PROCESSES,RANK; needs --workdir",
    flag_values=f,
  )
  flags.DEFINE_integer(
    "peer_timeout_s",
    100,
    "several processes: after so many seconds of silence one is taken for lost, and all end",
    lower_bound=5,
    flag_values=f,
  )
  flags.DEFINE_string(
    "compilation_cache",
    "auto",
    "where compiled programs are kept for the next start: auto (~/.cache/sdpo_jax), off, or DIR",
    flag_values=f,
  )
  flags.DEFINE_string(
    "topology", None, "plan: chip and shape, such as v5p:2x2x2 or h200:8", flag_values=f
  )
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=f)
  return f


def parse(argv: list[str]):
  """Returns (flags, configuration); the configuration is None if help is asked for.

  The configuration is the file's, with every setting of its parts filled in and with the overrides
  of the command line. UsageError for whatever is wrong.
  """
  sys.argv = argv  # run.json tells the command
  f = define_flags()
  try:
    rest = f(argv, known_only=True)
    make_local(f, "config", "workdir", "checkpoint", "suites", "compilation_cache")
    if f.mode not in MODES:
      raise UsageError(unknown("--mode", f.mode, MODES))
    if f.help:
      return f, None
    for argument in rest[1:]:
      is_setting = argument.lstrip("-").startswith(("config.", "noconfig."))
      if argument.startswith("-") and not is_setting:
        raise UsageError(f"unknown flag {argument!r}")
    path = f.config.partition(":")[0]
    if not os.path.isfile(path):
      raise UsageError(f"--config={path}: no such file")
    from sdpo_jax import config

    c = config.load(f.config)
    config.complete_parts(c, rest)
    return f, config.with_overrides(c, rest)
  except (flags.Error, ValueError) as error:
    raise UsageError(str(error)) from error


def make_local(f: flags.FlagValues, *names: str) -> None:
  """Makes the flags paths of this machine; UsageError, with the flag's name, if one cannot be."""
  for name in names:
    if f[name].value is not None:
      try:
        f[name].value = local_path(f[name].value)
      except UsageError as error:
        raise UsageError(f"--{name}={error}") from error


def main(argv: list[str]) -> int:
  """Runs one command and returns its exit status."""
  begun = time.monotonic()
  try:
    run_command(argv, begun)
    return 0
  except Exception as error:
    return end(error)


def run_command(argv: list[str], begun: float) -> None:
  """Runs one command, which began at this time of the monotonic clock.

  Raises one of the errors of `errors.py`, or another that is our mistake.
  """
  # transformers advises whoever lacks PyTorch to install it, and nothing here needs it
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  try:
    f, c = parse(argv)
    if f.help:
      print(__doc__, f.get_help(), sep="\n")
      return
    if f.distributed:
      join_processes(f)  # before anything asks for devices
    from sdpo_jax import config

    config.validate(c)
    check_flags(f)
    if f.mode == "plan":  # what is compiled for other machines cannot be kept
      print_plan(c, f.topology)
      return
    from sdpo_jax.compilation import keep_compiled

    keep_compiled(f.compilation_cache)
    workdir = f.workdir or fresh_workdir()
    is_new = not pathlib.Path(workdir).exists()
    check_writable(workdir)
  except ValueError as error:
    raise UsageError(str(error)) from error
  try:
    run(f, c, workdir, begun)
  except FileNotFoundError as error:
    raise UsageError(str(error)) from error
  finally:
    if is_new:
      with contextlib.suppress(OSError):  # where something is kept, it stays
        os.rmdir(workdir)


def end(error: Exception) -> int:
  """Prints the line of an error and returns the exit status. Of several processes, it ends all.

  An error that is our mistake keeps its traceback.
  """
  from sdpo_jax import hosts

  status = status_of(error)
  are_several = hosts.are_several()
  if are_several and hosts.blames_a_peer(error):
    hosts.follow_a_peer()
    status = hosts.LOST_PEER
    error = RunError(
      f"another process of this run is lost ({error}); the same command, in all processes, goes on "
      "from the last checkpoint"
    )
  if status is None:
    if not are_several:
      raise error
    traceback.print_exception(error)
    status = 1
  complain(error, status)
  if are_several and not isinstance(error, Preempted):
    hosts.leave(status, " ".join(str(error).split()))
  return status


def status_of(error: Exception) -> int | None:
  """Returns the exit status that `errors.py` gives to an error; None: it is our mistake."""
  match error:
    case UsageError() | SettingError() | TaskError():
      return 2
    case RunError():
      return 1
    case Preempted():
      return 143
  return None


def join_processes(f: flags.FlagValues) -> None:
  """Joins the other processes of this run, as --distributed says."""
  if not f.workdir:
    raise UsageError("--distributed needs --workdir: all processes write to one place")
  from sdpo_jax import hosts

  hosts.start(f.distributed, f.peer_timeout_s)


def check_flags(f: flags.FlagValues) -> None:
  """Raises UsageError for a flag that the mode lacks, or does not read."""
  if f.mode == "eval" and not f.checkpoint:
    raise UsageError("--mode=eval needs --checkpoint=WORKDIR[:step] or a Hugging Face directory")
  for name, (mode, instead) in _FLAGS_OF_ONE_MODE.items():
    if f[name].value is not None and f.mode != mode:
      raise UsageError(f"--{name} would not be read: it is for --mode={mode}{instead}")
  if f.mode == "plan" and not f.topology:
    raise UsageError("--mode=plan needs --topology, such as v5p:2x2x2 or h200:8")


def fresh_workdir() -> str:
  """Names a directory under runs/ by the time and this process."""
  stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
  return os.path.join("runs", f"{stamp}-{os.getpid()}")


def check_writable(workdir: str) -> None:
  """Makes the work directory; UsageError if nothing can be written there."""
  path = pathlib.Path(workdir).expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".writable"
    probe.write_text("")
    probe.unlink(missing_ok=True)  # several processes may try at once
  except OSError as error:
    raise UsageError(f"--workdir={workdir}: cannot write there: {error.strerror}") from error


def print_plan(c, topology: str) -> None:
  """Prints the lines of a plan as they come; some take minutes."""
  from sdpo_jax import plan

  for line in plan.report_lines(c, topology):
    print(line, flush=True)


def run(f: flags.FlagValues, c, workdir: str, begun: float) -> None:
  """Trains, evaluates, diagnoses or discovers, and prints the summary."""
  from sdpo_jax import checkpoint, ending, metrics, train
  from sdpo_jax.diagnose import mode as diagnose_mode
  from sdpo_jax.discover import mode as discover_mode
  from sdpo_jax.discover import results as discover_results
  from sdpo_jax.evaluation import evaluate

  checkpoint.tell_failures_once()
  absl_logging.use_absl_handler()
  absl_logging.set_verbosity(absl_logging.WARNING)
  with blame_disk(workdir, checkpoint.latest_step):
    if f.mode == "train":
      print(f"work directory: {workdir}", file=sys.stderr)
      train.train(c, workdir, begun)
      steps = metrics.read(workdir)
      lines = evaluate.summary_lines(steps[-1], steps[0])  # step 0 is the base model
      lines += ending.closing_lines(pathlib.Path(workdir), c, steps)
    elif f.mode == "eval":
      scores = evaluate.evaluate_checkpoint(c, workdir, f.checkpoint, f.suites)
      lines = evaluate.summary_lines(scores, {})
    elif f.mode == "diagnose":
      lines = diagnose_mode.summary_lines(diagnose_mode.diagnose(c, workdir))
    else:
      lines = discover_results.summary_lines(discover_mode.discover(c, workdir))
    for line in lines:
      print(line)
  if f.mode == "diagnose":
    print(f"page: {os.path.join(workdir, 'diagnose', 'index.html')}")
  if f.mode == "train":
    print(f"      report  {os.path.join(workdir, 'report', 'index.html')}")
  else:  # only now: a mode that is refused prints one line
    print(f"work directory: {workdir}", file=sys.stderr)


def complain(error: Exception, status: int) -> int:
  """Prints an error as one line and returns the exit status."""
  print(f"sdpo_jax: {' '.join(str(error).split())}", file=sys.stderr)
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv))
