"""The files that describe a run in its work directory, and how such files are written and read.

config.json     every setting, resolved
run.json        command, commit, package versions, devices and machine, seed, when each start was,
                `rows`: a fingerprint of the rows of each split (data/fingerprint.py), and `ended`
                (ending.py)
warnings.jsonl  step, sign and text of each warning of the monitors
"""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys

from flax.traverse_util import flatten_dict
import jax

# settings that may change while a run goes on: how far it goes, which checkpoint is kept, how many
# questions at a time, over which devices and servers, and who is sent the metrics
_MAY_CHANGE = (
  "config.total_steps",
  "config.train.stop_when_worse",
  "config.checkpoint.best",
  "config.log.trackers",
  "config.log.project",
  "config.log.tracker_timeout_s",
  "config.discover.parallel",
  "config.mesh.data",
  "config.mesh.fsdp",
  "config.mesh.tensor",
  "config.rollout.tensor",
  "config.rollout.server.urls",
  "config.rollout.server.weights_dir",
  "config.rollout.server.timeout_s",
  "config.rollout.server.patience_s",
  "config.rollout.server.concurrency",
  "config.method.teacher_weights.url",
  "config.method.teacher_weights.timeout_s",
)
_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "transformers",
  "grain",
  "numpy",
)


# What a value was called in work directories that earlier versions began.
_RENAMED = {("config.method.policy_share", "untaught"): "routed"}


def check_same_run(workdir: pathlib.Path, c, *, begun: bool, defaults: dict) -> None:
  """Raises ValueError, naming the first difference, if `workdir` was begun with other settings.

  A work directory belongs to one configuration. Only the number of steps, when the run stops
  itself, which checkpoint is best, the number of questions at a time, the mesh, the servers and the
  trackers may change. A setting that is younger than the work directory has to be at its default.
  """
  path = workdir / "config.json"
  if not begun or not path.exists():
    return
  before, now = _flat(json.loads(path.read_text())), _stored(c.to_dict())
  before = {key: _RENAMED.get((key, str(value)), value) for key, value in before.items()}
  before = {key: value for key, value in _stored(defaults).items() if key in now} | before
  for key in sorted(before.keys() | now.keys()):
    if key not in _MAY_CHANGE and before.get(key) != now.get(key):
      raise ValueError(
        f"{key}={now.get(key)!r} but {workdir} was begun with {before.get(key)!r}: "
        f"choose another --workdir, or the same settings{_why_not(key, before.get(key))}"
      )


def _stored(settings: dict) -> dict:
  """Returns flat settings as config.json would hold them: tuples are lists there."""
  return _flat(json.loads(json.dumps(settings, default=repr)))


def _flat(settings: dict) -> dict:
  """Returns {"config.section.key": value} of nested settings."""
  return flatten_dict({"config": settings}, sep=".")


def _why_not(key: str, before) -> str:
  """Returns what a user has to know who wants a longer run, and changes the schedule for it."""
  if key != "config.optimizer.decay_steps" or not before:
    return ""
  return (
    f"; its learning rate is on the way to 0 at update {before}, "
    "so config.total_steps may grow up to there and no further"
  )


def finished(workdir, latest: int, total_steps: int, why_stopped: str = "") -> str:
  """Says why nothing is trained: the run has come as far as it is asked to, or further.

  why_stopped: says why a run ended before that; "": it did not.
  """
  if why_stopped:
    return (
      f"finished: {workdir} {why_stopped}: nothing is trained; "
      "to go on all the same, set that to 0, or higher"
    )
  return (
    f"finished: {workdir} holds the checkpoint of step {latest} and config.total_steps is "
    f"{total_steps}: nothing is trained"
  )


def about_run(workdir: pathlib.Path) -> dict:
  """Returns the contents of run.json; {} where there is none."""
  path = workdir / "run.json"
  return json.loads(path.read_text()) if path.exists() else {}


def rows_of_run(workdir: pathlib.Path) -> dict[str, dict]:
  """Returns {split: fingerprint of its rows} as run.json tells; {} where it does not."""
  return about_run(workdir).get("rows", {})


def change_of_rows(workdir: pathlib.Path, now: dict[str, dict]) -> str | None:
  """Returns a line on the first split whose rows are not those of run.json; None: all are.

  Rows that differ but are read as the same tasks (a column more that nothing reads) are no change.
  Neither are the same rows read otherwise by another version, which is only logged.
  """
  before = rows_of_run(workdir)
  for split in sorted(before.keys() & now.keys()):
    then, here = before[split], now[split]
    if then["tasks_sha256"] == here["tasks_sha256"]:
      continue
    if then["rows_sha256"] != here["rows_sha256"]:
      return (
        f"config.data.sources: the rows of split {split!r} are not those that {workdir} was begun "
        f"with ({then['rows']} rows then, {here['rows']} now): restore them, "
        "or choose another --workdir"
      )
    logging.warning(
      "the rows of split %r are those that %s was begun with, but their environment or tokenizer "
      "now reads them otherwise: rewards before and after may differ",
      split,
      workdir,
    )
  return None


def describe_run(workdir: pathlib.Path, c, extra: dict) -> None:
  """Writes config.json and run.json before anything is trained.

  A resumed run adds its start to the list of starts. `extra` is added to run.json.
  """
  starts = about_run(workdir).get("started", [])
  now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
  python = os.path.basename(sys.executable)
  about = {
    "command": shlex.join([python, "-m", "sdpo_jax.main", *sys.argv[1:]]),
    "commit": _commit(),
    "started": [*starts, now],
    "python": sys.version.split()[0],
    "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
    "devices": [str(device) for device in jax.devices()],
    "machine": _machine(),
    "processes": jax.process_count(),
    "seed": c.seed,
  }
  write_atomically(workdir / "run.json", json.dumps(about | extra, indent=2) + "\n")
  write_atomically(workdir / "config.json", json.dumps(c.to_dict(), indent=2) + "\n")


def change_of_devices(workdir: pathlib.Path, mesh: dict | None) -> str:
  """Says what a resumed run computes on now and did not before; "" if that is the same.

  mesh: that of this start, {axis: size}; None: one device.
  """
  before = about_run(workdir)
  # as JSON has it, and as far as an older version has written it
  now = {"processes": jax.process_count(), "mesh": mesh}
  changes = [
    f"{name} {before[name]} then, {value} now"
    for name, value in now.items()
    if name in before and before[name] != value
  ]
  if not changes:
    return ""
  return (
    f"other devices than before ({'; '.join(changes)}): the questions and their order stay the "
    "same; sums over devices are rounded in another order, so later metrics may differ in their "
    "last digits, and a sampled token where two are almost equally likely"
  )


def _machine() -> dict:
  """Returns the names of processor and accelerator, and the number of cores, as far as known."""
  cpu = platform.processor() or platform.machine()
  with contextlib.suppress(OSError, IndexError):
    lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    cpu = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")][0]
  device = jax.devices()[0]
  accelerator = {} if device.platform == "cpu" else {"accelerator": device.device_kind}
  return {"cpu": cpu, "cores": os.cpu_count()} | accelerator


def _commit() -> str | None:
  """Returns the commit of this checkout; an installed package has neither git nor a commit."""
  git = shutil.which("git")
  if git is None:
    return None
  child = subprocess.run(
    [git, "-C", os.path.dirname(__file__), "rev-parse", "HEAD"],
    capture_output=True,
    text=True,
    check=False,
  )
  return child.stdout.strip() or None


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a reader, or a kill, meets the old text or the new and no mixture."""
  scratch = path.with_name(path.name + ".tmp")
  with scratch.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, path)


def append_line(path: pathlib.Path, value: dict) -> None:
  """Adds a line of JSON to a file."""
  with path.open("a", encoding="utf-8") as file:
    file.write(json.dumps(value) + "\n")


def cut_back(path: pathlib.Path, step: int) -> None:
  """Leaves of a file of lines with a "step" those before `step`, which is written next."""
  lines = read_lines(path)
  kept = [line for line in lines if line["step"] < step]
  if len(kept) < len(lines):
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: pathlib.Path) -> list[dict]:
  """Reads a file of one JSON object a line; no file has no lines.

  A last line that a kill cut short is removed from the file.
  """
  if not path.exists():
    return []
  text = path.read_text(encoding="utf-8")
  complete = text[: text.rfind("\n") + 1]
  if complete != text:
    write_atomically(path, complete)
  return [json.loads(line) for line in complete.splitlines()]
