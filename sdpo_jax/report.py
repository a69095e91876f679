r"""One HTML page from work directories: learning curves, results with intervals, and what the model said.

  python -m sdpo_jax.report WORKDIR [WORKDIR ...] [--out=DIR]

Reads config.json, run.json, metrics.jsonl and rollouts/step_*.jsonl and writes DIR/index.html (by default WORKDIR/report, or report/ for
several) and the curves as PNG files beside it. The page carries its pictures inside, so it can be sent as one file. It needs no accelerator and
no jax, and can be made while a run goes on: what is missing is left out and said to be missing.

Several work directories: those whose settings differ only in the seed are one group, drawn as their mean with a band from the lowest to the
highest seed; runs of different tasks are compared and drawn apart. A run goes by the `label` of its settings, else by its
method; what else distinguishes it from runs of that name on the same task is added. Of a single run the band is its evaluation's own 95 % interval
over questions. Curves of training metrics are running means over a tenth of the steps, the single steps faint behind them.

Errors: FileNotFoundError naming a work directory that is not there; unreadable lines are skipped and counted on the page.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import math
import pathlib
import sys
import textwrap

from matplotlib.figure import Figure
import numpy as np

from sdpo_jax import stats

X_AXES = {
  "step": "step",
  "train/generations": "responses generated",
  "train/sampled_tokens": "tokens generated",
}
TRAINING = {  # metric -> title, unit
  "train/reward": ("Training reward", "mean reward of a step's responses"),
  "train/loss": ("Training loss", "loss"),
  "train/entropy": ("Policy entropy", "nats a token"),
  "train/teacher_gap_abs": ("Distance of teacher and policy", "mean |log-prob. gap|, nats a token"),
  "rollout/length": ("Response length", "tokens"),
}
# Okabe and Ito: told apart by everyone
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
FULL_COLOUR_NATS = 2.0  # a gap this large is painted at full strength
ROLLOUTS_SHOWN = 16  # of each run


@dataclasses.dataclass
class Run:
  """What a work directory says. Missing files are empty."""

  workdir: pathlib.Path
  config: dict
  about: dict  # run.json
  lines: list[dict]  # metrics.jsonl
  rollouts: list[dict]  # a sample, oldest first
  skipped: int  # lines that could not be read
  label: str = ""  # what it is compared as; runs of one label differ in the seed only

  def points(self, name, x_axis):
    """{step: (x, y)} where both are known; the base model, step 0, has generated nothing."""
    points = {
      line["step"]: (0 if line["step"] == 0 else line.get(x_axis), line.get(name))
      for line in self.lines
    }
    return {step: (x, y) for step, (x, y) in points.items() if x is not None and y is not None}

  def series(self, name, x_axis):
    return list(self.points(name, x_axis).values())

  def splits(self):
    """Evaluation splits in the order in which they first appear."""
    names = [
      name.split("/")[1]
      for line in self.lines
      for name in line
      if name.startswith("eval/") and name.endswith("/avg@k")
    ]
    return list(dict.fromkeys(names))


def read_run(workdir) -> Run:
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f"no work directory {workdir}")
  lines, skipped = _json_lines(workdir / "metrics.jsonl")
  lines = [line for line in lines if isinstance(line.get("step"), int)]
  rollouts = []
  files = sorted((workdir / "rollouts").glob("step_*.jsonl"))
  chosen = (
    [files[i] for i in sorted({round(i) for i in np.linspace(0, len(files) - 1, 4)})]
    if files
    else []
  )
  for path in chosen:  # the first, the last and two between show how the answers changed
    found, bad = _json_lines(path)
    rollouts += (
      [
        found[i]
        for i in sorted(
          {round(i) for i in np.linspace(0, len(found) - 1, ROLLOUTS_SHOWN // len(chosen))}
        )
      ]
      if found
      else []
    )
    skipped += bad
  return Run(
    workdir,
    _json_file(workdir / "config.json"),
    _json_file(workdir / "run.json"),
    lines,
    rollouts,
    skipped,
  )


def write_report(workdirs, out) -> pathlib.Path:
  """Writes the page and its pictures into `out`; returns the path of the page."""
  out = pathlib.Path(out)
  runs = [read_run(workdir) for workdir in workdirs]
  _label(runs)
  out.mkdir(parents=True, exist_ok=True)
  page = "\n".join(
    [
      f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{_text(_title(runs))}</title><style>{STYLE}</style></head><body>",
      f"<h1>{_text(_title(runs))}</h1>",
      _results(runs),
      *_by_task(runs, out),
      *[_rollouts(run, len(runs) == 1) for run in runs],
      _settings(runs),
      "</body></html>",
    ]
  )
  path = out / "index.html"
  # a lone surrogate in a response must not cost the page
  path.write_bytes(page.encode("utf-8", "replace"))
  return path


def _by_task(runs, out):
  """Comparison and curves of each task."""
  tasks = {}
  for run in runs:
    tasks.setdefault(str(_flat(run.config).get("env.name", "")), []).append(run)
  return [
    f"<h1>{_text(task)}</h1>" * (len(tasks) > 1)
    + _comparison(members)
    + _curves(members, out, f"{task}_" if len(tasks) > 1 else "", i)
    for i, (task, members) in enumerate(tasks.items())
  ]


def _json_file(path):
  try:
    value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
  except (FileNotFoundError, json.JSONDecodeError):
    return {}
  return value if isinstance(value, dict) else {}


def _json_lines(path):
  """(objects, how many lines are none). The last line of a live file may be half there."""
  objects, skipped = [], 0
  if path.exists():
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
      if text.strip():
        try:
          value = json.loads(text)
        except json.JSONDecodeError:
          value = None
        if isinstance(value, dict):
          objects.append(value)
        else:
          skipped += 1
  return objects, skipped


def _flat(config, path=""):
  """{"rollout.group": 8, ...}: a value that is no dict, with its path."""
  flat = {}
  for key, value in config.items():
    flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
  return flat


def _label(runs):
  """Name every run by its `label`, else its method, and by whatever else distinguishes it from runs of the same name and task, but for the seed."""
  # where these differ, the runs are still of one kind
  same_learning = ("seed", "checkpoint.", "log.", "sandbox.")
  settings = [
    {key: value for key, value in _flat(run.config).items() if not key.startswith(same_learning)}
    for run in runs
  ]
  names = [
    str(flat.get("label") or flat.get("method.name", run.workdir.name))
    for run, flat in zip(runs, settings)
  ]
  kinds = [(name, flat.get("env.name")) for name, flat in zip(names, settings)]
  for run, flat, name, kind in zip(runs, settings, names, kinds):
    rivals = [other for other, other_kind in zip(settings, kinds) if other_kind == kind]
    differing = [
      key
      for key in sorted({key for rival in rivals for key in rival})
      if any(rival.get(key) != flat.get(key) for rival in rivals)
    ]
    run.label = ", ".join([name, *(f"{key}={flat.get(key)}" for key in differing)])


def _groups(runs):
  groups = {}
  for run in runs:
    groups.setdefault(run.label, []).append(run)
  return groups


def _title(runs):
  tasks = dict.fromkeys(
    str(task) for task in (_flat(run.config).get("env.name") for run in runs) if task
  )
  methods = dict.fromkeys(
    str(_flat(run.config).get("method.name", run.workdir.name)) for run in runs
  )
  return ", ".join(methods) + (f" on {', '.join(tasks)}" if tasks else "")


# Results: one row a run, and per split the base model and the last evaluation.


def _results(runs):
  splits = list(dict.fromkeys(split for run in runs for split in run.splits()))
  samples = _flat(runs[0].config).get("eval.samples")
  heads = "".join(
    f"<th>{_text(split)}<br><small>avg@{_text(samples or 'k')}, base model, then last</small></th>"
    for split in splits
  )
  task_of = lambda run: str(_flat(run.config).get("env.name", "?"))
  several, rows = len(set(map(task_of, runs))) > 1, []
  for run in runs:
    last = run.lines[-1] if run.lines else {}
    done = f"{last.get('step', 0)} / {run.config.get('total_steps', '?')}"
    cells = "".join(f"<td>{_evaluations(run, split)}</td>" for split in splits)
    generated = max((y for _, y in run.series("train/generations", "step")), default=0)
    rows.append(
      f"<tr><td><b>{_text(run.label)}</b><br><small>{_text(task_of(run) + ': ' if several else '')}{_text(run.workdir)}</small></td><td>{_text(run.config.get('seed', '?'))}</td><td class='line'>{_text(done)}</td>"
      f"<td>{generated:,}</td><td>{_duration(last.get('time_s'))}</td>{cells}</tr>"
    )
  note = "" if any(run.lines for run in runs) else "<p class='note'>No metrics yet.</p>"
  skipped = sum(run.skipped for run in runs)
  note += (
    f"<p class='note'>{skipped} unreadable line{'s' * (skipped > 1)} left out.</p>"
    if skipped
    else ""
  )
  return (
    "<h2>Results</h2><table class='grid'><tr><th>run</th><th>seed</th><th>steps</th><th>responses</th><th>time</th>"
    f"{heads}</tr>{''.join(rows)}</table>{note}<p class='note'>In brackets: 95 % intervals over questions.</p>"
  )


def _comparison(runs):
  """Groups side by side: the last evaluation over seeds, and how many responses and tokens one needs for what another ends with."""
  groups, rows, left_out = _groups(runs), [], []
  if len(groups) == len(runs) == 1:
    return ""
  first = next(iter(groups))
  for split in dict.fromkeys(split for run in runs for split in run.splits()):
    name = f"eval/{split}/avg@k"
    trained = {
      label: [run for run in members if max(run.points(name, "step"), default=0) > 0]
      for label, members in groups.items()
    }
    left_out += [
      f"{split}: {label} ({len(groups[label]) - len(members)} of {len(groups[label])} runs)"
      for label, members in trained.items()
      if len(members) < len(groups[label])
    ]
    curves, by_tokens = (
      {label: _mean_curve(members, name, axis) for label, members in trained.items()}
      for axis in ("train/generations", "train/sampled_tokens")
    )
    for label, members in trained.items():
      if not curves[label]:
        continue
      mean, low, high = stats.mean_interval([run.series(name, "step")[-1][1] for run in members])
      reached = "<br>".join(
        _reach(curves[label], other, curves[other], by_tokens[label], by_tokens[other])
        for other in groups
        if other != label and curves[other]
      )
      spent = f"{by_tokens[label][-1][0]:,.0f}" if by_tokens[label] else "&ndash;"
      interval = f" <small>[{low:.1%}, {high:.1%}]</small>" if low is not None else ""
      rows.append(
        f"<tr><td>{_text(split)}</td><td><b>{_text(label)}</b></td><td>{len(members)}</td><td>{spent}</td><td><b>{mean:.1%}</b>{interval}</td>"
        f"<td>{_against(members, trained[first], name) if label != first else ''}</td><td>{reached}</td></tr>"
      )
  if not rows:
    return ""
  missing = (
    f"<p class='note'>Left out, not evaluated since the base model: {_text('; '.join(left_out))}.</p>"
    if left_out
    else ""
  )
  return (
    "<h2>Comparison</h2><table class='grid'><tr><th>split</th><th>method</th><th>seeds</th><th>tokens generated</th><th>last evaluation</th>"
    f"<th>minus {_text(first)} of the same seed</th><th>as good as another's last: after / other's</th></tr>{''.join(rows)}</table><p class='note'>In brackets: 95 % intervals over seeds; right, "
    f"how many times fewer. Means over seeds, at the evaluations that were made.</p>{missing}"
  )


def _against(members, others, name):
  """Points of the last evaluation more than the others', over the seeds that both have."""
  last = lambda runs: {run.config.get("seed"): run.series(name, "step")[-1][1] for run in runs}
  mine, theirs = last(members), last(others)
  seeds = sorted(mine.keys() & theirs.keys(), key=str)
  if not seeds:
    return "&ndash;"
  difference, low, high, _ = stats.paired_bootstrap(
    [mine[s] for s in seeds], [theirs[s] for s in seeds]
  )
  interval = f" <small>[{100 * low:+.1f}, {100 * high:+.1f}]</small>" if low is not None else ""
  return f"{100 * difference:+.1f} points{interval}" + (
    f" <small>({len(seeds)} seeds)</small>" if len(seeds) < max(len(mine), len(theirs)) else ""
  )


def _reach(curve, other, target, by_tokens, target_by_tokens):
  said = f"{_text(other)}'s {target[-1][1]:.1%}: "
  found = []
  for what, points, goal in (("responses", curve, target), ("tokens", by_tokens, target_by_tokens)):
    if points and goal:
      end_x, end_y = goal[-1]
      at = next((x for x, y in points if y >= end_y), None)
      if not at:
        return said + ("not reached" if at is None else "the base model already")
      found.append(
        f"{at:,.0f} / {end_x:,.0f} {what}" + (f" ({end_x / at:.1f}×)" if at < end_x else "")
      )
  return said + ", ".join(found)


def _shared(members, name, x_axis):
  """(mean x of each point, values_SX) at the steps where every seed has a value: a mean over fewer of them would jump. Seeds sample unequal numbers of tokens."""
  curves = [curve for curve in (run.points(name, x_axis) for run in members) if curve]
  steps = sorted(set.intersection(*map(set, curves))) if curves else []
  return (
    [float(np.mean([curve[step][0] for curve in curves])) for step in steps],
    np.array([[curve[step][1] for step in steps] for curve in curves], dtype=float).reshape(
      len(curves), len(steps)
    ),
  )


def _mean_curve(members, name, x_axis):
  """[(x, mean over seeds)]"""
  x_X, value_SX = _shared(members, name, x_axis)
  return list(zip(x_X, value_SX.mean(axis=0).tolist())) if x_X else []


def _evaluations(run, split):
  name = f"eval/{split}/avg@k"
  found = [line for line in run.lines if line.get(name) is not None]
  if not found:
    return "&ndash;"

  def one(line):
    low, high = line.get(name + "_low"), line.get(name + "_high")
    return f"<b>{line[name]:.1%}</b>" + (
      f" <small>[{low:.1%}, {high:.1%}]</small>" if low is not None and high is not None else ""
    )

  base = one(found[0]) + "<br>" if found[0]["step"] == 0 and len(found) > 1 else ""
  late = f" <small>at step {found[-1]['step']}</small>" if found[-1] is not run.lines[-1] else ""
  return f"{base}{one(found[-1])}{late}"


def _duration(seconds):
  if seconds is None:
    return "&ndash;"
  hours, rest = divmod(int(seconds), 3600)
  return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


# Curves: every panel once for each x axis; the reader picks the axis.


def _curves(runs, out, prefix="", number=0):
  panels = [
    (f"eval/{split}/avg@k", f"Evaluation: {split}", "mean reward (avg@k)")
    for split in dict.fromkeys(s for run in runs for s in run.splits())
  ]
  panels += [(name, title, unit) for name, (title, unit) in TRAINING.items()]
  axes = [axis for axis in X_AXES if any(run.series(axis, "step") for run in runs)] or ["step"]
  figures = {axis: [] for axis in axes}
  for axis in axes:
    for name, title, unit in panels:
      if any(run.series(name, axis) for run in runs):
        png = _picture(runs, name, title, unit, axis)
        file_name = (
          "".join(c if c.isalnum() else "_" for c in f"{prefix}{name} by {axis.split('/')[-1]}")
          + ".png"
        )
        (out / file_name).write_bytes(png)
        figures[axis].append(
          f"<img alt='{_text(title)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
        )
  if not any(figures.values()):
    return ""
  buttons = "".join(
    f"<input type='radio' name='x{number}' class='x{i}' id='x{number}_{i}'{' checked' * (i == 0)}><label for='x{number}_{i}'>{_text(X_AXES[axis])}</label>"
    for i, axis in enumerate(axes)
  )
  blocks = "".join(
    f"<div class='curves by{i}'>{''.join(figures[axis])}</div>" for i, axis in enumerate(axes)
  )
  return f"<h2>Curves</h2><div class='choice'><span>against</span>{buttons}{blocks}</div>"


def _picture(runs, name, title, unit, x_axis):
  figure = Figure(figsize=(5.4, 3.5), dpi=110, layout="constrained")
  plot = figure.add_subplot(title=title, xlabel=X_AXES[x_axis], ylabel=unit)
  groups = _groups(runs)
  evaluation = name.startswith("eval/")
  for colour, (label, members) in zip(
    [COLOURS[i % len(COLOURS)] for i in range(len(groups))], groups.items()
  ):
    curves = [dict(points) for points in (run.series(name, x_axis) for run in members) if points]
    if not curves:
      continue
    shared, value_SX = _shared(members, name, x_axis)
    mean_X = value_SX.mean(axis=0)
    label = textwrap.shorten(label, 60, placeholder=" ...").replace("$", r"\$") + (
      f" ({len(curves)} seeds)" if len(curves) > 1 else ""
    )
    if not evaluation:
      for curve in curves:
        plot.plot(list(curve), list(curve.values()), color=colour, alpha=0.2, linewidth=0.8)
      mean_X, value_SX = _smooth(mean_X), np.array([_smooth(value_X) for value_X in value_SX])
    plot.plot(
      shared,
      mean_X,
      color=colour,
      linewidth=1.8,
      label=label,
      marker="o" if evaluation else None,
      markersize=3.5,
    )
    if len(curves) > 1:
      plot.fill_between(
        shared, value_SX.min(axis=0), value_SX.max(axis=0), color=colour, alpha=0.18, linewidth=0
      )
    elif evaluation:
      low, high = (dict(members[0].series(f"{name}_{side}", x_axis)) for side in ("low", "high"))
      known = [x for x in shared if x in low and x in high]
      plot.fill_between(
        known,
        [low[x] for x in known],
        [high[x] for x in known],
        color=colour,
        alpha=0.18,
        linewidth=0,
      )
  if evaluation or name == "train/reward":
    plot.set_ylim(-0.02, 1.02)
  plot.grid(alpha=0.25)
  plot.spines[["top", "right"]].set_visible(False)
  if len(groups) > 1:
    plot.legend(fontsize=8, frameon=False)
  picture = io.BytesIO()
  figure.savefig(picture, format="png")
  return picture.getvalue()


def _smooth(value_X):
  """Running mean over a tenth of the points, narrower at both ends so that it stays centred."""
  half = len(value_X) // 20
  reach = [min(half, i, len(value_X) - 1 - i) for i in range(len(value_X))]
  return np.array([value_X[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


# Rollouts: what was asked, answered and said about it, each token painted by what the teacher
# thought of it.


def _rollouts(run, alone):
  if not run.rollouts:
    return f"<h2>Rollouts{'' if alone else ': ' + _text(run.label)}</h2><p class='note'>None recorded in {_text(run.workdir)}.</p>"
  seed = f", seed {run.config.get('seed', '?')}"
  cards = "\n".join(_card(rollout) for rollout in run.rollouts)
  legend = "".join(
    f"<span class='token' style='{_paint(gap)}'>{gap:+g}</span>"
    for gap in (-2, -1, -0.5, 0, 0.5, 1, 2)
  )
  body = (
    f"<p class='note'>A token's colour is the teacher's log-probability minus the policy's, in nats: <span class='legend'>{legend}</span> "
    f"orange: it would rather not; blue: it would more. Point at a token for its number.</p>{cards}"
  )
  return (
    f"<h2>Rollouts</h2>{body}"
    if alone
    else f"<details class='run'><summary><h2>Rollouts: {_text(run.label)}{_text(seed)}</h2></summary>{body}</details>"
  )


def _card(rollout):
  reward = rollout.get("reward")
  known = isinstance(reward, (int, float)) and math.isfinite(reward)
  badge = f"<span class='badge {'right' if known and reward >= 1 else 'wrong' if known and reward <= 0 else 'part'}'>reward {f'{reward:g}' if known else '?'}</span>"
  head = " ".join(
    f"<span>{_text(text)}</span>"
    for text in (
      f"step {rollout.get('step', '?')}",
      rollout.get("task_id", ""),
      rollout.get("status", ""),
    )
    if text
  )
  context = rollout.get("teacher_context")
  read = (
    f"<details><summary>What the teacher read</summary><pre>{_text(context)}</pre></details>"
    if context
    else "<p class='note'>The teacher read nothing more.</p>"
  )
  read += "".join(
    f"<details><summary>What it read of alternatives</summary><pre>{_text(told)}</pre></details>"
    for told in rollout.get("counterfactual_contexts") or ()
  )
  return (
    f"<div class='card'><div class='head'>{badge} {head}</div><div class='columns'><div><h3>Prompt</h3><pre>{_text(rollout.get('prompt', ''))}</pre>"
    f"<h3>Feedback</h3><pre>{_text(rollout.get('feedback') or '–')}</pre>{read}</div>"
    f"<div><h3>Response</h3><pre class='response'>{_response(rollout)}</pre></div></div></div>"
  )


def _response(rollout):
  """The response token by token where there is a gap for each; else as plain text."""
  tokens, gaps = rollout.get("tokens"), rollout.get("teacher_gap")
  if not isinstance(tokens, list) or not isinstance(gaps, list) or len(tokens) != len(gaps):
    return _text(rollout.get("response", ""))
  return "".join(_token(token, gap) for token, gap in zip(tokens, gaps))


def _token(token, gap):
  shown = _text(token).replace("\n", "<i>&#8629;</i>\n") if token else "<i>&#8709;</i>"
  if not isinstance(gap, (int, float)) or not math.isfinite(gap):
    return f"<span class='token'>{shown}</span>"
  return f"<span class='token' style='{_paint(gap)}' title='{gap:+.2f} nats'>{shown}</span>"


def _paint(gap):
  strength = min(abs(gap) / FULL_COLOUR_NATS, 1.0)
  return f"background:rgba({'0,114,178' if gap > 0 else '213,94,0'},{0.75 * strength:.2f})" + (
    ";color:#fff" if strength > 0.8 else ""
  )


def _settings(runs):
  parts = []
  for run in runs:
    about = run.about
    facts = [
      ("command", about.get("command")),
      ("commit", about.get("commit")),
      ("started", ", ".join(about.get("started") or [])),
      ("python", about.get("python")),
      (
        "versions",
        ", ".join(
          f"{name} {version}" for name, version in _flat(about.get("versions") or {}).items()
        ),
      ),
      ("devices", ", ".join(map(str, about.get("devices") or []))),
      ("work directory", run.workdir),
    ]
    facts += [
      (key, value)
      for key, value in about.items()
      if key not in ("command", "commit", "started", "python", "versions", "devices")
    ]
    rows = "".join(
      f"<tr><th>{_text(name)}</th><td><code>{_text(value)}</code></td></tr>"
      for name, value in facts
      if value not in (None, "")
    )
    config = (
      json.dumps(run.config, indent=2, ensure_ascii=False)
      if run.config
      else "config.json is missing."
    )
    parts.append(
      f"<h3>{_text(run.label)}, seed {_text(run.config.get('seed', '?'))}</h3><table class='facts'>{rows}</table>"
      f"<details><summary>All settings (config.json)</summary><pre>{_text(config)}</pre></details>"
    )
  return "<h2>How it was run</h2>" + "".join(parts)


def _text(value):
  """Escaped for HTML; control characters, which HTML forbids, as their printable pictures."""
  text = html.escape(str(value))
  return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1160px; margin: 2em auto; padding: 0 1.2em }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin: 1.8em 0 .6em } h3 { font-size: .82em; margin: .9em 0 .2em; color: #666; font-weight: 600 }
small, .note { color: #666 } .note { font-size: .9em }
table { border-collapse: collapse } .grid { display: block; overflow-x: auto }
.grid th, .grid td { padding: .4em .9em .4em 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; font-variant-numeric: tabular-nums }
.line { white-space: nowrap }
.facts th { text-align: left; padding: .1em 1em .1em 0; vertical-align: top; font-weight: 600; color: #666; white-space: nowrap }
.choice > span { color: #666; margin-right: .6em } .choice > input { margin: 0 .3em 0 0 } .choice > label { margin-right: 1.2em }
.curves { display: none; margin-top: .6em } .curves img { width: 49%; min-width: 330px; height: auto }
.x0:checked ~ .by0, .x1:checked ~ .by1, .x2:checked ~ .by2 { display: block }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .6em 1em 1em; margin: 0 0 1em } .head span { margin-right: .8em; color: #666 }
.head .badge { border-radius: 4px; padding: .1em .5em; color: #fff } .right { background: #00795a } .wrong { background: #b34a00 } .part { background: #777 }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 1.6em } .columns > div { min-width: 0 }
@media (max-width: 760px) { .columns { grid-template-columns: 1fr } }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.55 ui-monospace, monospace } code { overflow-wrap: anywhere; font-size: .9em }
.legend { white-space: nowrap } .legend .token { padding: 0 .3em }
.token { border-radius: 2px; outline: 1px solid #0001 } .token i { opacity: .45; font-style: normal }
summary { cursor: pointer; color: #555; font-size: .9em; margin-top: .6em } summary h2 { display: inline }
"""


def main(argv=None):
  parser = argparse.ArgumentParser(
    prog="python -m sdpo_jax.report", description="Work directories -> one HTML page."
  )
  parser.add_argument("workdir", nargs="+")
  parser.add_argument(
    "--out", help="directory of the page; default WORKDIR/report, or report/ for several"
  )
  flags = parser.parse_args(argv)
  out = flags.out or (
    pathlib.Path(flags.workdir[0]) / "report" if len(flags.workdir) == 1 else "report"
  )
  try:
    print(write_report(flags.workdir, out))
  except OSError as error:
    print(f"sdpo_jax.report: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
