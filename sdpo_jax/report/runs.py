"""Reads work directories, and names the runs so that they can be told apart.

Of a work directory are read: config.json, run.json, metrics.jsonl, warnings.jsonl, run.log,
rollouts/step_*.jsonl, diagnose/index.json, and eval/texts/, which a run keeps where
config.eval.keep_texts says so.

- Runs whose settings differ only in the seed are one group.
- A run's name is the `label` of its settings, else its method. Whatever else distinguishes it from
  runs of that name on the same task is added.

Errors: FileNotFoundError names a work directory that does not exist. Files may be missing.
Unreadable lines are skipped and counted.
"""

import dataclasses
import pathlib
import re
from typing import Any

from sdpo_jax.report import rollouts
from sdpo_jax.report.files import is_number, json_file, json_lines

# Settings in which runs may differ and still have learned in the same way
NOT_OF_LEARNING = ("seed", "checkpoint.", "log.", "sandbox.")
CLOCK = "time_s"  # the x axis that does not begin at 0
_WARNING = re.compile(r"(?:^|\s)step (\d+): (.+)")
_NO_WARNING = "the teacher reads"  # how the line of teacher_gate.py begins


@dataclasses.dataclass
class Run:
  """The contents of one work directory. Missing files are empty."""

  workdir: pathlib.Path
  config: dict
  about: dict  # run.json
  lines: list[dict]  # metrics.jsonl
  rollouts: list[dict]  # a sample, oldest first
  skipped: int  # lines that could not be read
  recorded: int = 0  # rollouts in all files
  # split -> step -> lines (evaluation/scores.py) of the evaluations whose texts were kept
  texts: dict[str, dict[int, list[dict]]] = dataclasses.field(default_factory=dict)
  not_numbers: int = 0  # values of metrics that are not finite numbers
  warnings: list[tuple[int, str]] = dataclasses.field(default_factory=list)  # (step, text)
  diagnosis: dict = dataclasses.field(default_factory=dict)  # diagnose/index.json
  label: str = ""  # name in comparisons; runs of one label differ in the seed only
  tuned: str = ""  # how its settings were chosen; empty: nobody told

  def setting(self, path: str, default=None):
    """Returns a setting by its dotted path, such as "env.name"."""
    return flattened(self.config).get(path, default)

  @property
  def task(self) -> str:
    return str(self.setting("env.name", "?"))

  @property
  def seed(self):
    return self.config.get("seed", "?")

  def points(self, name: str, x_axis: str) -> dict[int, tuple]:
    """Returns {step: (x, y)} of the steps that have both; at step 0 nothing is generated yet."""
    points = {}
    for line in self.lines:
      is_start = line["step"] == 0 and x_axis != CLOCK
      points[line["step"]] = (0 if is_start else line.get(x_axis), line.get(name))
    return {step: (x, y) for step, (x, y) in points.items() if x is not None and y is not None}

  def series(self, name: str, x_axis: str = "step") -> list[tuple]:
    return list(self.points(name, x_axis).values())

  def last(self, name: str):
    """Returns the metric's last value. IndexError if there is none."""
    return self.series(name)[-1][1]

  def splits(self) -> list[str]:
    """Returns the evaluation splits in the order in which they first appear."""
    names = (name for line in self.lines for name in line)
    scores = (name for name in names if name.startswith("eval/") and name.endswith("/avg@k"))
    return list(dict.fromkeys(name.split("/")[1] for name in scores))


def read_run(workdir, find: str = "") -> Run:
  """Reads a work directory. FileNotFoundError if there is none of this name.

  find: a text that its rollouts are to hold; without one they are spread over the run.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f"no work directory {workdir}")
  lines, bad_lines = json_lines(workdir / "metrics.jsonl")
  lines = [line for line in lines if isinstance(line.get("step"), int)]
  finite_lines = [_finite(line) for line in lines]
  sample = rollouts.sample(workdir, find)
  texts, bad_texts = _kept_texts(workdir / "eval" / "texts")
  return Run(
    workdir=workdir,
    config=json_file(workdir / "config.json"),
    about=json_file(workdir / "run.json"),
    lines=finite_lines,
    rollouts=sample.rollouts,
    recorded=sample.recorded,
    skipped=bad_lines + sample.skipped + bad_texts,
    texts=texts,
    not_numbers=sum(map(len, lines)) - sum(map(len, finite_lines)),
    warnings=_warnings(workdir, finite_lines),
    diagnosis=json_file(workdir / "diagnose" / "index.json"),
  )


def read_runs(workdirs, find: str = "") -> list[Run]:
  """Reads work directories, and names the runs so that they can be told apart."""
  runs = [read_run(workdir, find) for workdir in workdirs]
  label(runs)
  return runs


def _finite(line: dict) -> dict:
  """Returns the metrics of a line that are finite numbers: no other value can be drawn."""
  return {name: value for name, value in line.items() if is_number(value)}


def _kept_texts(folder: pathlib.Path) -> tuple[dict[str, dict[int, list[dict]]], int]:
  """Returns {split: {step: lines}} of the files SPLIT.step_N.jsonl, and how many were bad."""
  texts: dict[str, dict[int, list[dict]]] = {}
  skipped = 0
  for path in sorted(folder.glob("*.step_*.jsonl")):
    split, _, step = path.stem.rpartition(".step_")
    if step.isdecimal():
      lines, bad = json_lines(path)
      texts.setdefault(split, {})[int(step)] = lines
      skipped += bad
  return texts, skipped


def _warnings(workdir: pathlib.Path, lines: list[dict]) -> list[tuple[int, str]]:
  """Returns (step, text) of what the monitors have warned of, each once.

  A run writes warnings.jsonl; of an older one run.log may hold the lines that went to stderr.
  """
  written, _ = json_lines(workdir / "warnings.jsonl")
  found = [(line.get("step"), line.get("text")) for line in written]
  if not found:
    found = _logged_warnings(workdir / "run.log", lines)
  whole = [(step, text) for step, text in found if isinstance(step, int) and text]
  return sorted(dict.fromkeys((step, str(text)) for step, text in whole))


def _logged_warnings(log: pathlib.Path, lines: list[dict]) -> list[tuple[int, str]]:
  """Returns the lines of a log that tell of steps at which some sign was seen."""
  steps = {line["step"] for line in lines if line.get("train/warnings")}
  if not steps or not log.exists():
    return []
  text = log.read_text(encoding="utf-8", errors="replace")
  found = [(int(step), words) for step, words in _WARNING.findall(text.replace("\r", "\n"))]
  return [pair for pair in found if pair[0] in steps and not pair[1].startswith(_NO_WARNING)]


def flattened(config: dict, path: str = "") -> dict[str, Any]:
  """Flattens nested settings to {"rollout.group": 8, ...}."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    flat |= flattened(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
  return flat


def label(runs: list[Run]) -> None:
  """Names every run by its `label`, else its method, and by what distinguishes it from rivals.

  Rivals are runs of the same name and task. The seed and other settings of NOT_OF_LEARNING
  distinguish nothing.
  """
  settings = [
    {
      key: value
      for key, value in flattened(run.config).items()
      if not key.startswith(NOT_OF_LEARNING)
    }
    for run in runs
  ]
  names = [
    str(flat.get("label") or "").strip() or str(flat.get("method.name", run.workdir.name))
    for run, flat in zip(runs, settings)
  ]
  kinds = [(name, flat.get("env.name")) for name, flat in zip(names, settings)]
  for run, flat, name, kind in zip(runs, settings, names, kinds):
    rivals = [other for other, other_kind in zip(settings, kinds) if other_kind == kind]
    keys = sorted({key for rival in rivals for key in rival})
    differing = [key for key in keys if any(rival.get(key) != flat.get(key) for rival in rivals)]
    run.label = ", ".join([name, *(f"{key}={flat.get(key)}" for key in differing)])


def groups_of(runs: list[Run]) -> dict[str, list[Run]]:
  """Returns the runs by label: the seeds of one setting together."""
  groups: dict[str, list[Run]] = {}
  for run in runs:
    groups.setdefault(run.label, []).append(run)
  return groups


def splits_of(runs: list[Run]) -> list[str]:
  """Returns the evaluation splits of all runs."""
  return list(dict.fromkeys(split for run in runs for split in run.splits()))
