r"""The command line.

  python -m sdpo_jax.main --config=configs/FILE.py[:key=value,...] --workdir=DIR [--mode=train|eval|discover|plan] [--config.section.key=value ...]

train (default) runs, resumes if the work directory holds a checkpoint, and ends with a report. eval scores a checkpoint:
--checkpoint=WORKDIR[:step] or a Hugging Face directory. discover is test-time self-distillation on single hard questions.
plan compiles the train and decode steps for --topology (v5p:2x2x2, v5e:8x8, v6e:4x4, h200:8), without the hardware, and says whether they fit. Without --workdir a fresh directory under runs/ is made and printed.
Exit status: 0 success, 2 a wrong command line or setting (one line on stderr), 1 a failed run; of a full disk it says so in a line.
"""

import datetime
import os
import pathlib
import sys

from absl import flags
from absl import logging as absl_logging

MODES = ("train", "eval", "discover", "plan")


class UsageError(Exception):
  """The command line or a setting is wrong; the message is one line."""


def parse(argv: list[str]):
  """-> the flags, and the configuration: the file's, each setting of its parts filled in, with the overrides. UsageError says what is wrong.

  Flags are defined here: importing this file does nothing.
  """
  f, sys.argv = flags.FlagValues(), argv  # run.json tells the command
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
    "distributed",
    None,
    "several processes: auto (TPU pods, Slurm, ...) or HOST:PORT,PROCESSES,RANK; needs --workdir",
    flag_values=f,
  )
  flags.DEFINE_string(
    "topology", None, "plan: chip and shape, such as v5p:2x2x2 or h200:8", flag_values=f
  )
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=f)
  try:
    rest = f(argv, known_only=True)
    if f.mode not in MODES:
      raise UsageError(f"--mode={f.mode!r} is unknown; choose from {list(MODES)}")
    if f.help:
      return f, None
    for argument in rest[1:]:
      if not argument.lstrip("-").startswith(("config.", "noconfig.")) and argument.startswith("-"):
        raise UsageError(f"unknown flag {argument!r}")
    # at once: what follows imports jax, which takes seconds
    if not os.path.isfile(path := f.config.partition(":")[0]):
      raise UsageError(f"--config={path}: no such file")
    from sdpo_jax import config

    c = config.load(f.config)
    config.complete(c, rest)
    return f, config.overridden(c, rest)
  except (flags.Error, ValueError) as error:
    raise UsageError(str(error)) from error


def fresh_workdir() -> str:
  stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
  return os.path.join("runs", f"{stamp}-{os.getpid()}")


def check_writable(workdir: str) -> None:
  path = pathlib.Path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".writable"
    probe.write_text("")
    probe.unlink(missing_ok=True)  # several processes may try at once
  except OSError as error:
    raise UsageError(f"--workdir={workdir}: cannot write there: {error.strerror}") from error


def main(argv: list[str]) -> int:
  try:
    f, c = parse(argv)
    if f.help:
      print(__doc__, f.get_help(), sep="\n")
      return 0
    if f.distributed:
      if not f.workdir:
        raise UsageError("--distributed needs --workdir: all processes write to one place")
      from sdpo_jax import hosts

      hosts.start(f.distributed)  # before anything asks for devices
    workdir = f.workdir or fresh_workdir()
    # after the flags: a wrong one answers at once, jax takes seconds to import
    from sdpo_jax import config

    config.validate(c)
    if f.mode == "eval" and not f.checkpoint:
      raise UsageError("--mode=eval needs --checkpoint=WORKDIR[:step] or a Hugging Face directory")
    for name, mode, instead in (
      ("checkpoint", "eval", "; to begin from it, export it and set config.model.path"),
      ("topology", "plan", ""),
    ):
      if f[name].value is not None and f.mode != mode:
        raise UsageError(f"--{name} would not be read: it is for --mode={mode}{instead}")
    if f.mode == "plan":
      if not f.topology:
        raise UsageError("--mode=plan needs --topology, such as v5p:2x2x2 or h200:8")
      for line in plan_lines(c, f.topology):
        print(line, flush=True)
      return 0
    check_writable(workdir)
  except (UsageError, ValueError) as error:
    return complain(error, 2)
  from sdpo_jax import checkpoint, errors, evaluate, metrics, train
  from sdpo_jax.discover import mode, results

  checkpoint.tell_failures_once()
  absl_logging.use_absl_handler()
  absl_logging.set_verbosity(absl_logging.WARNING)
  try:
    with errors.blame_disk(workdir, checkpoint.latest_step):
      if f.mode == "train":
        print(f"work directory: {workdir}", file=sys.stderr)
        train.train(c, workdir)
        lines = metrics.read(workdir)
        results, base = lines[-1], lines[0]
      elif f.mode == "eval":
        results, base = evaluate.evaluate_checkpoint(c, workdir, f.checkpoint), {}
      else:
        for line in results.summary_lines(mode.discover(c, workdir)):
          print(line)
        return 0
  except (errors.SettingError, errors.TaskError, FileNotFoundError) as error:
    return complain(error, 2)
  except errors.RunError as error:
    return complain(error, 1)
  for line in evaluate.summary_lines(results, base):
    print(line)
  if f.mode == "train":
    print(f"      report  {os.path.join(workdir, 'report', 'index.html')}")
  return 0


def plan_lines(c, topology: str):
  import dataclasses
  import functools

  import jax

  from sdpo_jax import learner, plan, session, sharding
  from sdpo_jax.model import lora
  from sdpo_jax.objectives import build

  # the compiler alone is wanted: neither a TPU nor its lock
  jax.config.update("jax_platforms", "cpu")
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  # libtpu complains where they are unset; it plans for the topology whatever they say
  for name, value in {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}.items():
    os.environ.setdefault(name, value)
  session.check_rows(
    c, sharding.row_shards(sharding.make_mesh(plan.topology_devices(topology), **c.mesh))
  )
  model = dataclasses.replace(
    session.model_shape(c.model.path), dtype=c.model.dtype, param_dtype=c.model.param_dtype
  )
  session.check_positions(
    session.longest_texts(c, build.build_method(c.method.to_dict())["counterfactual"]()),
    model,
    c.model.path,
  )
  adapters = lora.from_settings(c.model)
  return plan.plan(
    c,
    topology,
    model,
    learner.learner(c, model, adapters and functools.partial(lora.attach, lora=adapters)),
    adapters,
  )


def complain(error: Exception, status: int) -> int:
  print(f"sdpo_jax: {' '.join(str(error).split())}", file=sys.stderr)
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv))
