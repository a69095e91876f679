r"""Writes one HTML page from work directories: learning curves, results with intervals, rollouts.

  python -m sdpo_jax.report WORKDIR [WORKDIR ...] [--out=DIR]

The command reads config.json, run.json, metrics.jsonl, rollouts/step_*.jsonl and eval/texts/,
which a run keeps where config.eval.keep_texts says so. It writes
DIR/index.html and the curves as PNG files beside it. DIR is WORKDIR/report by default, or report/
for several work directories. The page carries its pictures inside, so it can be sent as one file.
The command needs no accelerator and no jax, and works while a run goes on. The page leaves out
what is missing and says so. Its HTML is assets/report.html; this file computes what stands in it.
Cards of responses are as other pages have them too (assets/parts.html).

The rollout files' field names (`prompt`, `tokens`, `teacher_gap`, ...) are written by
rollout_log.py and shared with it by string only: rename them in both files.

Several work directories are compared:
- Runs whose settings differ only in the seed are one group. It is drawn as its mean, with a band
  from the lowest to the highest seed.
- Runs of different tasks are compared and drawn apart.
- A run's name is the `label` of its settings, else its method. Whatever else distinguishes it from
  runs of that name on the same task is added.
- The band of a single run is its evaluation's own 95 % interval over questions.
- Curves of training metrics are running means over a tenth of the steps. The single steps stand
  faintly behind them.

Errors: FileNotFoundError names a work directory that does not exist. Unreadable lines are skipped
and counted on the page.
"""

import argparse
import base64
import dataclasses
import io
import json
import math
import pathlib
import random
import sys
import textwrap
from typing import Any, Iterable, NamedTuple

import jinja2
from matplotlib.figure import Figure
import numpy as np

from sdpo_jax import stats
from sdpo_jax.errors import local_path

ASSETS = pathlib.Path(__file__).parent / "assets"
X_AXES = {
  "step": "step",
  "train/generations": "responses generated",
  "train/sampled_tokens": "tokens generated",
}
TRAINING = {  # metric -> title, unit
  "train/reward": ("Training reward", "mean reward of a step"),
  "train/loss": ("Training loss", "loss"),
  "train/entropy": ("Policy entropy", "nats a token"),
  "train/teacher_gap_abs": ("Distance of teacher and policy", "mean |gap|, nats a token"),
  "train/credit_change": ("What the credit changes", "mean |change of the advantage|"),
  "train/contrast_strong": ("Tokens with a strong credit", "share with |c| above contrast.strong"),
  "control/teacher_weights": ("How far the teacher moves", "share of its way to the policy"),
  "rollout/length": ("Response length", "tokens"),
  "rollout/length_tail": ("Longest response over the mean one", "ratio"),
}
# Okabe and Ito's colours: readers with any colour vision can tell them apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
FULL_COLOUR_NATS = 2.0  # a gap this large is painted at full strength
LEGEND_GAPS = (-2, -1, -0.5, 0, 0.5, 1, 2)  # nats
ROLLOUT_FILES_SHOWN = 4  # of each run
ROLLOUTS_SHOWN = 16  # of each run
QUESTIONS_SHOWN = 10  # of each split, with the answers before and after
NONE = "–"
# Settings in which runs may differ and still have learned in the same way
NOT_OF_LEARNING = ("seed", "checkpoint.", "log.", "sandbox.")
# Entries of run.json that stand first, in this order; the others follow
FACTS = ("command", "commit", "started", "python", "versions", "devices", "rows")


@dataclasses.dataclass
class Run:
  """The contents of one work directory. Missing files are empty."""

  workdir: pathlib.Path
  config: dict
  about: dict  # run.json
  lines: list[dict]  # metrics.jsonl
  rollouts: list[dict]  # a sample, oldest first
  skipped: int  # lines that could not be read
  # split -> step -> lines (evaluation/scores.py) of the evaluations whose texts were kept
  texts: dict[str, dict[int, list[dict]]] = dataclasses.field(default_factory=dict)
  not_numbers: int = 0  # values of metrics that are not finite numbers
  label: str = ""  # name in comparisons; runs of one label differ in the seed only
  tuned: str = ""  # how its settings were chosen; empty: nobody told

  def setting(self, path: str, default=None):
    """Returns a setting by its dotted path, such as "env.name"."""
    return flattened(self.config).get(path, default)

  @property
  def task(self) -> str:
    return str(self.setting("env.name", "?"))

  def points(self, name: str, x_axis: str) -> dict[int, tuple]:
    """Returns {step: (x, y)} of the steps that have both; at step 0 nothing is generated yet."""
    points = {}
    for line in self.lines:
      x = 0 if line["step"] == 0 else line.get(x_axis)
      points[line["step"]] = (x, line.get(name))
    return {step: (x, y) for step, (x, y) in points.items() if x is not None and y is not None}

  def series(self, name: str, x_axis: str) -> list[tuple]:
    return list(self.points(name, x_axis).values())

  def last(self, name: str):
    """Returns the metric's last value. IndexError if there is none."""
    return self.series(name, "step")[-1][1]

  def splits(self) -> list[str]:
    """Returns the evaluation splits in the order in which they first appear."""
    names = (name for line in self.lines for name in line)
    scores = (name for name in names if name.startswith("eval/") and name.endswith("/avg@k"))
    return list(dict.fromkeys(name.split("/")[1] for name in scores))


def read_run(workdir) -> Run:
  """Reads a work directory. FileNotFoundError if there is none of this name."""
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f"no work directory {workdir}")
  lines, bad_lines = _json_lines(workdir / "metrics.jsonl")
  lines = [line for line in lines if isinstance(line.get("step"), int)]
  finite_lines = [_finite(line) for line in lines]
  rollouts, bad_rollouts = _rollout_sample(workdir / "rollouts")
  texts, bad_texts = _kept_texts(workdir / "eval" / "texts")
  return Run(
    workdir=workdir,
    config=_json_file(workdir / "config.json"),
    about=_json_file(workdir / "run.json"),
    lines=finite_lines,
    rollouts=rollouts,
    skipped=bad_lines + bad_rollouts + bad_texts,
    texts=texts,
    not_numbers=sum(map(len, lines)) - sum(map(len, finite_lines)),
  )


def read_runs(workdirs) -> list[Run]:
  """Reads work directories, and names the runs so that they can be told apart."""
  runs = [read_run(workdir) for workdir in workdirs]
  _label(runs)
  return runs


def read_rollouts(workdir) -> list[dict]:
  """Returns all lines of a run's rollout files (`rollout_log.py`), the oldest first.

  Lines that cannot be read are left out.
  """
  files = sorted((pathlib.Path(workdir) / "rollouts").glob("step_*.jsonl"))
  return [line for path in files for line in _json_lines(path)[0]]


def _finite(line: dict) -> dict:
  """Returns the metrics of a line that are finite numbers: no other value can be drawn."""
  return {
    name: value
    for name, value in line.items()
    if isinstance(value, (int, float)) and math.isfinite(value)
  }


def _rollout_sample(folder: pathlib.Path) -> tuple[list[dict], int]:
  """Returns rollouts of the first, the last and two steps between, and how many lines were bad.

  The steps between show how the responses changed.
  """
  files = _spread(sorted(folder.glob("step_*.jsonl")), ROLLOUT_FILES_SHOWN)
  rollouts, skipped = [], 0
  for path in files:
    lines, bad = _json_lines(path)
    rollouts += _spread(lines, ROLLOUTS_SHOWN // len(files))
    skipped += bad
  return rollouts, skipped


def _kept_texts(folder: pathlib.Path) -> tuple[dict[str, dict[int, list[dict]]], int]:
  """Returns {split: {step: lines}} of the files SPLIT.step_N.jsonl, and how many were bad."""
  texts: dict[str, dict[int, list[dict]]] = {}
  skipped = 0
  for path in sorted(folder.glob("*.step_*.jsonl")):
    split, _, step = path.stem.rpartition(".step_")
    if step.isdecimal():
      lines, bad = _json_lines(path)
      texts.setdefault(split, {})[int(step)] = lines
      skipped += bad
  return texts, skipped


def _spread(items: list, count: int) -> list:
  """Returns at most `count` items at even distances, the first and the last among them."""
  if not items:
    return []
  return [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, count)})]


def _json_file(path: pathlib.Path) -> dict:
  try:
    value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
  except (FileNotFoundError, json.JSONDecodeError):
    return {}
  return value if isinstance(value, dict) else {}


def _json_lines(path: pathlib.Path) -> tuple[list[dict], int]:
  """Returns the file's JSON objects, and how many lines hold none.

  The last line of a live run may be incomplete.
  """
  if not path.exists():
    return [], 0
  objects, skipped = [], 0
  for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
    if not text.strip():
      continue
    try:
      value = json.loads(text)
    except json.JSONDecodeError:
      value = None
    if isinstance(value, dict):
      objects.append(value)
    else:
      skipped += 1
  return objects, skipped


def flattened(config: dict, path: str = "") -> dict[str, Any]:
  """Flattens nested settings to {"rollout.group": 8, ...}."""
  flat = {}
  for key, value in config.items():
    flat |= flattened(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
  return flat


# The page


def write_report(workdirs, out, tuned: dict[pathlib.Path, str] | None = None) -> pathlib.Path:
  """Writes the page and its pictures into the directory `out`; returns the path of the page.

  tuned: {work directory: how the settings of its run were chosen}, where that is known.
  """
  out = pathlib.Path(out)
  runs = read_runs(workdirs)
  for run in runs:
    run.tuned = (tuned or {}).get(run.workdir, "")
  out.mkdir(parents=True, exist_ok=True)
  page = template("report.html").render(
    title=_title(runs),
    results=_results(runs),
    tasks=_tasks(runs, out),
    answers=[_answers(run) for run in runs],
    rollouts=[_rollouts(run) for run in runs],
    legend=legend(),
    settings=[_settings(run) for run in runs],
  )
  path = out / "index.html"
  # a lone surrogate in a response must not cost the page
  path.write_bytes(page.encode("utf-8", "replace"))
  return path


def template(name: str) -> jinja2.Template:
  """Returns a page of assets/, whose values are escaped as they are printed."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ASSETS),
    autoescape=True,
    finalize=_printable,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(name)


def _printable(value):
  """Replaces control characters, which HTML forbids, by their printable pictures."""
  if hasattr(value, "__html__"):  # markup already: what a macro returns
    return value
  return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(value))


def _title(runs: list[Run]) -> str:
  tasks = dict.fromkeys(str(run.setting("env.name")) for run in runs if run.setting("env.name"))
  methods = dict.fromkeys(str(run.setting("method.name", run.workdir.name)) for run in runs)
  return ", ".join(methods) + (f" on {', '.join(tasks)}" if tasks else "")


def _label(runs: list[Run]) -> None:
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


def _groups(runs: list[Run]) -> dict[str, list[Run]]:
  """Returns the runs by label: the seeds of one setting together."""
  groups = {}
  for run in runs:
    groups.setdefault(run.label, []).append(run)
  return groups


def _splits(runs: list[Run]) -> list[str]:
  return list(dict.fromkeys(split for run in runs for split in run.splits()))


def _tasks(runs: list[Run], out: pathlib.Path) -> list[dict]:
  """Returns comparison and curves of each task; writes the pictures into `out`."""
  members = {}
  for run in runs:
    members.setdefault(str(run.setting("env.name", "")), []).append(run)
  return [
    {
      "name": task,
      "comparison": _comparison(own_runs),
      "curves": _curves(own_runs, out, f"{task}_" if len(members) > 1 else ""),
    }
    for task, own_runs in members.items()
  ]


class Score(NamedTuple):
  """A mean and its interval, as text. The interval is empty where one sample tells no spread."""

  mean: str
  interval: str


def _score(mean, low, high) -> Score:
  known = low is not None and high is not None
  return Score(f"{mean:.1%}", f"[{low:.1%}, {high:.1%}]" if known else "")


# Results: a row for each run, and per split the base model and the last evaluation.


def _results(runs: list[Run]) -> dict:
  splits = _splits(runs)
  several_tasks = len({run.task for run in runs}) > 1
  return {
    "splits": splits,
    "samples": runs[0].setting("eval.samples") or "k",
    "rows": [_result_row(run, splits, several_tasks) for run in runs],
    "has_metrics": any(run.lines for run in runs),
    "skipped": sum(run.skipped for run in runs),
    "not_numbers": sum(run.not_numbers for run in runs),
  }


def _result_row(run: Run, splits: list[str], several_tasks: bool) -> dict:
  last = run.lines[-1] if run.lines else {}
  generated = max((y for _, y in run.series("train/generations", "step")), default=0)
  return {
    "label": run.label,
    "tuned": run.tuned,
    "place": f"{run.task}: {run.workdir}" if several_tasks else str(run.workdir),
    "seed": run.config.get("seed", "?"),
    "done": f"{last.get('step', 0)} / {run.config.get('total_steps', '?')}{_ended(run)}",
    "generated": f"{generated:,}",
    "time": _duration(last.get("time_s")),
    "evaluations": [_evaluations(run, f"eval/{split}/avg@k") for split in splits],
  }


def _ended(run: Run) -> str:
  """Returns what run.json says about the end of a run beyond its last step; "" for nothing."""
  ended = run.about.get("ended") or {}
  stopped = ", stopped: worse than the base model" if ended.get("stopped") else ""
  best = ended.get("best") or {}
  is_earlier = best and best["step"] != ended["step"]
  return stopped + (f", best at {best['step']}" if is_earlier else "")


def _evaluations(run: Run, name: str) -> dict | None:
  """Returns the base model's score and the last one; None for a split never evaluated.

  `at_step` names the step of the last evaluation if the run has gone on since.
  """
  lines = [line for line in run.lines if line.get(name) is not None]
  if not lines:
    return None

  def score(line):
    return _score(line[name], line.get(name + "_low"), line.get(name + "_high"))

  first, last = lines[0], lines[-1]
  has_base = first["step"] == 0 and len(lines) > 1
  late = last is not run.lines[-1]
  base = score(first) if has_base else None
  return {"base": base, "last": score(last), "at_step": last["step"] if late else None}


def _duration(seconds) -> str:
  if seconds is None:
    return NONE
  hours, rest = divmod(int(seconds), 3600)
  minutes, seconds = divmod(rest, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# Comparison: groups side by side, by their last evaluation and by what it cost to get there.


class MeanCurves(NamedTuple):
  """A group's mean score against what it had generated: [(x, mean over seeds)]."""

  by_responses: list[tuple[float, float]]
  by_tokens: list[tuple[float, float]]


def _comparison(runs: list[Run]) -> dict | None:
  """Returns the rows of a table of the groups; None if there is nothing to compare."""
  groups = _groups(runs)
  if len(runs) == 1:
    return None
  rows, left_out = [], []
  for split in _splits(runs):
    name = f"eval/{split}/avg@k"
    trained = {
      label: [run for run in members if max(run.points(name, "step"), default=0) > 0]
      for label, members in groups.items()
    }
    rows += [dict(row, split=split) for row in _compared(trained, name)]
    for label, members in trained.items():
      missing = len(groups[label]) - len(members)
      if missing:
        left_out.append(f"{split}: {label} ({missing} of {len(groups[label])} runs)")
  if not rows:
    return None
  return {"first": next(iter(groups)), "rows": rows, "left_out": "; ".join(left_out)}


def _compared(groups: dict[str, list[Run]], name: str) -> list[dict]:
  """Returns a row for each group that has values: its last evaluation, and how soon it was good."""
  first = next(iter(groups))
  curves = {
    label: MeanCurves(
      _mean_curve(members, name, "train/generations"),
      _mean_curve(members, name, "train/sampled_tokens"),
    )
    for label, members in groups.items()
  }
  rows = []
  for label, members in groups.items():
    own = curves[label]
    if not own.by_responses:
      continue
    others = [other for other in groups if other != label and curves[other].by_responses]
    against = None if label == first else _against(members, groups[first], name)
    row = {
      "label": label,
      "tuned": members[0].tuned,
      "seeds": len(members),
      "tokens": f"{own.by_tokens[-1][0]:,.0f}" if own.by_tokens else NONE,
      "last": _score(*stats.mean_interval([run.last(name) for run in members])),
      "against": against,
      "reached": [_reach(own, other, curves[other]) for other in others],
    }
    rows.append(row)
  return rows


def _against(members: list[Run], others: list[Run], name: str) -> dict:
  """Compares last evaluations, members minus others, over the seeds that both have; in points."""
  own_scores = {run.config.get("seed"): run.last(name) for run in members}
  other_scores = {run.config.get("seed"): run.last(name) for run in others}
  seeds = sorted(own_scores.keys() & other_scores.keys(), key=str)
  if not seeds:
    return {"mean": NONE, "interval": "", "seeds": ""}
  difference, low, high, _ = stats.paired_bootstrap(
    [own_scores[seed] for seed in seeds], [other_scores[seed] for seed in seeds]
  )
  interval = "" if low is None else f"[{100 * low:+.1f}, {100 * high:+.1f}]"
  unpaired = len(seeds) < max(len(own_scores), len(other_scores))
  count = f"({len(seeds)} seeds)" if unpaired else ""
  return {"mean": f"{100 * difference:+.1f} points", "interval": interval, "seeds": count}


def _reach(own: MeanCurves, other: str, target: MeanCurves) -> str:
  """Returns a line: what these curves cost until they are as good as another's last value."""
  beginning = f"{other}'s {target.by_responses[-1][1]:.1%}: "
  costs = []
  for unit, points, goal in (
    ("responses", own.by_responses, target.by_responses),
    ("tokens", own.by_tokens, target.by_tokens),
  ):
    if not points or not goal:
      continue
    end_x, end_y = goal[-1]
    reached = next((x for x, y in points if y >= end_y), None)
    if reached is None:
      return beginning + "not reached"
    if reached == 0:
      return beginning + "the base model already"
    cost = f"{reached:,.0f} / {end_x:,.0f} {unit}"
    if reached < end_x:
      cost += f" ({end_x / reached:.1f}×)"
    costs.append(cost)
  return beginning + ", ".join(costs)


def _shared(members: list[Run], name: str, x_axis: str) -> tuple[list[float], np.ndarray]:
  """Returns mean x, and values by seed and x, of the steps where every seed has a value.

  A mean over fewer seeds would jump. The x of a step is a mean too, since seeds sample unequal
  numbers of tokens. Runs without any value are left out.
  """
  curves = [curve for curve in (run.points(name, x_axis) for run in members) if curve]
  steps = sorted(set.intersection(*map(set, curves))) if curves else []
  x_X = [float(np.mean([curve[step][0] for curve in curves])) for step in steps]
  value_SX = np.array([[curve[step][1] for step in steps] for curve in curves], dtype=float)
  return x_X, value_SX.reshape(len(curves), len(steps))


def _mean_curve(members: list[Run], name: str, x_axis: str) -> list[tuple[float, float]]:
  """Returns [(x, mean over seeds)]."""
  x_X, value_SX = _shared(members, name, x_axis)
  return list(zip(x_X, value_SX.mean(axis=0).tolist())) if x_X else []


# Curves: every panel once for each x axis; the reader picks the axis.


def _curves(runs: list[Run], out: pathlib.Path, prefix: str = "") -> list[dict]:
  """Returns the pictures of each x axis; writes them into `out`, names beginning with `prefix`."""
  panels = [*(f"eval/{split}/avg@k" for split in _splits(runs)), *TRAINING]
  axes = [axis for axis in X_AXES if any(run.series(axis, "step") for run in runs)] or ["step"]
  curves = []
  for axis in axes:
    pictures = []
    for name in panels:
      if not any(run.series(name, axis) for run in runs):
        continue
      png = _picture(runs, name, axis)
      file_name = f"{prefix}{name} by {axis.split('/')[-1]}"
      file_name = "".join(c if c.isalnum() else "_" for c in file_name) + ".png"
      (out / file_name).write_bytes(png)
      title, _ = _title_and_unit(name)
      pictures.append({"title": title, "base64": base64.b64encode(png).decode()})
    curves.append({"title": X_AXES[axis], "pictures": pictures})
  return curves if any(axis["pictures"] for axis in curves) else []


def _title_and_unit(name: str) -> tuple[str, str]:
  """Returns what stands over the panel of a metric, and at its y axis."""
  if name in TRAINING:
    return TRAINING[name]
  if name.startswith("eval/") and name.endswith("/avg@k"):
    return f"Evaluation: {name.split('/')[1]}", "mean reward (avg@k)"
  return name, name


def _picture(runs: list[Run], name: str, x_axis: str) -> bytes:
  """Draws one metric of all groups; returns a PNG file."""
  figure = Figure(figsize=(5.4, 3.5), dpi=110, layout="constrained")
  draw_curves(figure.add_subplot(), runs, name, x_axis)
  picture = io.BytesIO()
  figure.savefig(picture, format="png")
  return picture.getvalue()


def draw_curves(plot, runs: list[Run], name: str, x_axis: str = "train/generations") -> None:
  """Draws a metric of the runs of `read_runs` into an Axes, as the report does.

  x_axis: one of X_AXES.
  """
  title, unit = _title_and_unit(name)
  plot.set_title(title, parse_math=False)
  plot.set(xlabel=X_AXES[x_axis], ylabel=unit)
  groups = _groups(runs)
  legend = {}  # line -> what it stands for
  for i, (label, members) in enumerate(groups.items()):
    again, colour = divmod(i, len(COLOURS))
    dashes = LINE_STYLES[again % len(LINE_STYLES)]  # colours that come again are told apart
    line, seeds = _draw_group(plot, members, name, x_axis, COLOURS[colour], dashes)
    if line is not None:
      legend[line] = _legend_text(label, groups) + (f" ({seeds} seeds)" if seeds > 1 else "")
  if name.startswith("eval/") or name == "train/reward":
    plot.set_ylim(-0.02, 1.02)
  plot.grid(alpha=0.25)
  plot.spines[["top", "right"]].set_visible(False)
  if len(groups) > 1:
    _write_legend(plot, legend)


def _legend_text(label: str, labels: Iterable[str]) -> str:
  """Returns a label with its middle left out where it is long, unless another would be equal."""

  def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:36]} ... {text[-19:]}"

  is_unique = sum(shortened(other) == shortened(label) for other in labels) == 1
  return shortened(label) if is_unique else textwrap.fill(label, 60)


def _write_legend(plot, legend: dict) -> None:
  """Writes the legend of {line: text}, every text as it stands.

  matplotlib leaves out labels that begin with an underscore, so the texts are put in afterwards.
  What stands between dollar signs is no mathematics here.
  """
  written = plot.legend(list(legend), ["."] * len(legend), fontsize=8, frameon=False)
  for entry, text in zip(written.get_texts(), legend.values(), strict=True):
    entry.set_parse_math(False)
    entry.set_text(text)


def _draw_group(plot, members: list[Run], name: str, x_axis: str, colour: str, dashes: str):
  """Draws a group's mean, and a band: over its seeds, or over questions for a single run.

  Returns the line of the mean, None where there is nothing to draw, and the number of seeds.
  """
  curves = [dict(points) for points in (run.series(name, x_axis) for run in members) if points]
  if not curves:
    return None, 0
  evaluation = name.startswith("eval/")
  x_X, value_SX = _shared(members, name, x_axis)
  mean_X = value_SX.mean(axis=0)
  if not evaluation:
    for curve in curves:
      plot.plot(list(curve), list(curve.values()), color=colour, alpha=0.2, linewidth=0.8)
    mean_X = _smooth(mean_X)
    value_SX = np.array([_smooth(value_X) for value_X in value_SX])
  # a line of one point shows nothing without a marker
  marker = "o" if evaluation or len(x_X) == 1 else None
  style = {"linewidth": 1.8, "linestyle": dashes, "marker": marker, "markersize": 3.5}
  (line,) = plot.plot(x_X, mean_X, color=colour, **style)
  band = {"color": colour, "alpha": 0.18, "linewidth": 0}
  if len(curves) > 1:
    plot.fill_between(x_X, value_SX.min(axis=0), value_SX.max(axis=0), **band)
  elif evaluation:
    low = dict(members[0].series(f"{name}_low", x_axis))
    high = dict(members[0].series(f"{name}_high", x_axis))
    bounded = [x for x in x_X if x in low and x in high]
    plot.fill_between(bounded, [low[x] for x in bounded], [high[x] for x in bounded], **band)
  return line, len(curves)


def _smooth(value_X: np.ndarray) -> np.ndarray:
  """Returns running means over a tenth of the points.

  Windows narrow at both ends so that they stay centred.
  """
  half = len(value_X) // 20
  reach = [min(half, i, len(value_X) - 1 - i) for i in range(len(value_X))]
  return np.array([value_X[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


# Rollouts: prompt, response and feedback, each token painted by the teacher's gap.


def _rollouts(run: Run) -> dict:
  return {
    "label": run.label,
    "seed": run.config.get("seed", "?"),
    "workdir": run.workdir,
    "cards": [card(rollout) for rollout in run.rollouts],
  }


# Answers: what the base model and the last evaluation say to the same random questions.


def _answers(run: Run) -> dict:
  splits = []
  for split, by_step in run.texts.items():
    last = max(by_step)
    pairs = _pairs(by_step[0], by_step[last]) if 0 in by_step and last else []
    if pairs:
      splits.append({"name": split, "last": last, "pairs": pairs})
  return {"label": run.label, "seed": run.config.get("seed", "?"), "splits": splits}


def _pairs(before: list[dict], after: list[dict]) -> list[dict]:
  """Returns random questions, the same ones in every report, with the first answer to each."""
  firsts, lasts = _first_answers(before), _first_answers(after)
  questions = [question for question in firsts if question in lasts]
  chosen = random.Random(0).sample(questions, min(QUESTIONS_SHOWN, len(questions)))
  return [
    {"prompt": prompt, "before": firsts[place, prompt], "after": lasts[place, prompt]}
    for place, prompt in chosen
  ]


def _first_answers(lines: list[dict]) -> dict[tuple, dict]:
  """Returns {(place, question): text and badge of its first answer} of lines that hold texts."""
  answers = {}
  for line in lines:
    responses = line.get("responses")
    first = responses[0] if isinstance(responses, list) and responses else None
    if isinstance(first, dict) and isinstance(line.get("prompt"), str) and "text" in first:
      badge, reward = _reward(first.get("reward"))
      answer = {"badge": badge, "reward": reward, "text": first["text"]}
      answers[line.get("question"), line["prompt"]] = answer
  return answers


def card(rollout: dict) -> dict:
  """Returns what the page shows of one line of a rollout file; any field may be missing."""
  tokens, gaps = rollout.get("tokens"), rollout.get("teacher_gap")
  has_gaps = isinstance(tokens, list) and isinstance(gaps, list) and len(tokens) == len(gaps)
  step = f"step {rollout['step']}" if "step" in rollout else ""
  head = (step, rollout.get("task_id", ""), rollout.get("status", ""))
  badge, reward = _reward(rollout.get("reward"))
  return {
    "badge": badge,
    "reward": reward,
    "head": [text for text in head if text],
    "prompt": rollout.get("prompt", ""),
    "feedback": rollout.get("feedback") or NONE,
    "teacher_context": rollout.get("teacher_context"),
    "alternatives": rollout.get("counterfactual_contexts") or (),
    "answers": rollout.get("answers") or (),
    # token by token where there is a gap for each, else as plain text
    "response": rollout.get("response", ""),
    "tokens": [_token(token, gap) for token, gap in zip(tokens, gaps)] if has_gaps else None,
  }


def embedded(rollouts: Iterable[dict], height_px: int = 480) -> str:
  """Returns cards of rollouts as the HTML of a frame, so that a notebook keeps its own style.

  rollouts: lines of rollout files, or what else `card` shows.
  """
  cards = [card(rollout) for rollout in rollouts]
  page = template("cards.html").render(cards=cards, legend=legend())
  return template("frame.html").render(page=page, height_px=height_px)


def _reward(reward) -> tuple[str, str]:
  """Returns a badge's class in the page's style, and its text."""
  if not isinstance(reward, (int, float)) or not math.isfinite(reward):
    return "part", "?"
  if reward >= 1:
    return "right", f"{reward:g}"
  return ("wrong" if reward <= 0 else "part"), f"{reward:g}"


def _token(token, gap) -> dict:
  """Returns a token's lines (none: the token is empty), and its colour if its gap is a number."""
  lines = str(token).split("\n") if token else []
  if not isinstance(gap, (int, float)) or not math.isfinite(gap):
    return {"lines": lines, "style": None}
  return {"lines": lines, "style": _paint(gap), "title": f"{gap:+.2f} nats"}


def legend() -> list[tuple[str, str]]:
  """Returns (text, CSS) of the colours that tokens have."""
  return [(f"{gap:+g}", _paint(gap)) for gap in LEGEND_GAPS]


def _paint(gap: float) -> str:
  """Returns CSS: blue where the teacher likes a token better than the policy does, else orange."""
  strength = min(abs(gap) / FULL_COLOUR_NATS, 1.0)
  colour = "0,114,178" if gap > 0 else "213,94,0"
  white_text = ";color:#fff" if strength > 0.8 else ""
  return f"background:rgba({colour},{0.75 * strength:.2f}){white_text}"


def _settings(run: Run) -> dict:
  """Returns how a run was made: run.json as (name, text) pairs, and config.json as text."""
  about = run.about
  versions = flattened(about.get("versions") or {}).items()
  devices = map(str, about.get("devices") or [])
  rows = (about.get("rows") or {}).items()
  facts = {
    "command": about.get("command"),
    "commit": about.get("commit"),
    "started": ", ".join(about.get("started") or []),
    "python": about.get("python"),
    "versions": ", ".join(f"{name} {version}" for name, version in versions),
    "devices": ", ".join(devices),
    "rows": ", ".join(f"{split} {fingerprint['rows']}" for split, fingerprint in rows),
    "work directory": run.workdir,
  }
  pairs = [*facts.items(), *((name, about[name]) for name in about if name not in FACTS)]
  config = json.dumps(run.config, indent=2, ensure_ascii=False)
  return {
    "label": run.label,
    "seed": run.config.get("seed", "?"),
    "facts": [(name, value) for name, value in pairs if value not in (None, "")],
    "config": config if run.config else "config.json is missing.",
  }


def main(argv=None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m sdpo_jax.report", description="Work directories -> one HTML page."
  )
  parser.add_argument("workdir", nargs="+", type=local_path)
  parser.add_argument(
    "--out",
    type=local_path,
    help="directory of the page; default WORKDIR/report, or report/ for several",
  )
  flags = parser.parse_args(argv)
  default = pathlib.Path(flags.workdir[0]) / "report" if len(flags.workdir) == 1 else "report"
  try:
    print(write_report(flags.workdir, flags.out or default))
  except OSError as error:
    print(f"sdpo_jax.report: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
