"""The files of a work directory: which run it belongs to, what describes the run, and how files are written."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import jax


def check_same_run(workdir: pathlib.Path, c, *, begun: bool) -> None:
  """A work directory belongs to one configuration; only the number of steps and that of questions at a time may change. ValueError names the first difference."""
  path = workdir / "config.json"
  if not begun or not path.exists():
    return
  flat = lambda d, prefix="config": {
    k2: v2
    for k, v in d.items()
    for k2, v2 in (
      flat(v, f"{prefix}.{k}") if isinstance(v, dict) else {f"{prefix}.{k}": v}
    ).items()
  }
  before, now = flat(json.loads(path.read_text())), flat(json.loads(json.dumps(c.to_dict())))
  for key in sorted(before.keys() | now.keys()):
    if key not in ("config.total_steps", "config.discover.parallel") and before.get(key) != now.get(
      key
    ):
      raise ValueError(
        f"{key}={now.get(key)!r} but {workdir} was begun with {before.get(key)!r}: choose another --workdir, or the same settings"
      )


def describe_run(workdir: pathlib.Path, c, extra: dict) -> None:
  """config.json (resolved) and run.json (command, commit, versions, devices, seed), before anything is trained. A resumed run adds a start."""
  path = workdir / "run.json"
  earlier = json.loads(path.read_text()).get("started", []) if path.exists() else []
  git = shutil.which("git")  # an installed package has neither git nor a commit
  commit = (
    git
    and subprocess.run(
      [git, "-C", os.path.dirname(__file__), "rev-parse", "HEAD"],
      capture_output=True,
      text=True,
      check=False,
    ).stdout.strip()
  )
  packages = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "grain",
    "numpy",
  )
  about = {
    "command": shlex.join([os.path.basename(sys.executable), "-m", "sdpo_jax.main", *sys.argv[1:]]),
    "commit": commit or None,
    "started": earlier
    + [datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")],
    "python": sys.version.split()[0],
    "versions": {p: importlib.metadata.version(p) for p in packages},
    "devices": [str(d) for d in jax.devices()],
    "seed": c.seed,
  } | extra
  write_atomically(path, json.dumps(about, indent=2) + "\n")
  write_atomically(workdir / "config.json", json.dumps(c.to_dict(), indent=2) + "\n")


def write_atomically(path: pathlib.Path, text: str) -> None:
  """A reader, or a kill, finds the old file or the new one and nothing in between."""
  scratch = path.with_name(path.name + ".tmp")
  with scratch.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, path)


def read_lines(path: pathlib.Path) -> list[dict]:
  """Whole lines; a last one that a kill cut short is removed from the file."""
  if not path.exists():
    return []
  text = path.read_text(encoding="utf-8")
  whole = text[: text.rfind("\n") + 1]
  if whole != text:
    write_atomically(path, whole)
  return [json.loads(line) for line in whole.splitlines()]
