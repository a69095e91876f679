"""Draws a run's metrics: every panel once for each x axis, of which the reader picks one.

- A group of seeds is drawn as its mean, with a band from the lowest to the highest seed.
- The band of a single run is its evaluation's own 95 % interval over questions.
- Curves of training metrics are running means over a tenth of the steps. The single steps stand
  faintly behind them.

Pictures are small: a palette of COLOURS_KEPT colours, and margins of a fixed size in place of a
layout that is solved for each.
"""

import base64
import io
import pathlib
import textwrap
from typing import Iterable

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
import numpy as np
from PIL import Image

from sdpo_jax.report.runs import CLOCK, Run, groups_of, splits_of

X_AXES = {
  "step": "step",
  "train/generations": "responses generated",
  "train/sampled_tokens": "tokens generated",
  CLOCK: "seconds",
}
EVALUATION = {  # metric of a split -> title, unit
  "avg@k": ("Evaluation", "mean reward (avg@k)"),
  "pass@k": ("Evaluation, any of k", "share solved (pass@k)"),
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
  "rollout/truncated": ("Responses cut at their limit", "share"),
}
SPEED = {"perf/tokens_per_s": ("Speed", "tokens a second")}
# Okabe and Ito's colours: readers with any colour vision can tell them apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
INCHES, DPI = (4.0, 2.75), 190
COLOURS_KEPT = 64  # of a picture
MARGINS = dict(left=0.165, right=0.965, bottom=0.175, top=0.89)


def curves(runs: list[Run], out: pathlib.Path, prefix: str = "") -> list[dict]:
  """Returns the pictures of each x axis; writes them into `out`, names beginning with `prefix`."""
  panels = [f"eval/{split}/{score}" for split in splits_of(runs) for score in EVALUATION]
  panels += [name for name in TRAINING if name not in unchanged(runs)]
  axes = [axis for axis in X_AXES if any(run.series(axis) for run in runs)] or ["step"]
  found = [
    {
      "title": X_AXES[axis],
      "pictures": [
        picture(runs, name, axis, out, prefix)
        for name in panels
        if any(run.series(name, axis) for run in runs)
      ],
    }
    for axis in axes
  ]
  return found if any(axis["pictures"] for axis in found) else []


def unchanged(runs: list[Run]) -> dict[str, float]:
  """Returns {metric: value} of the curves of training that nobody needs to see: they are flat."""
  flat = {}
  for name in TRAINING:
    values = [value for run in runs for _, value in run.series(name)]
    if len(values) > 2 and len(set(values)) == 1:
      flat[name] = values[0]
  return flat


def picture(runs: list[Run], name: str, x_axis: str, out: pathlib.Path, prefix: str = "") -> dict:
  """Draws one metric of all groups, and writes it into `out`; returns its title and its PNG."""
  png = _drawn(runs, name, x_axis)
  file_name = f"{prefix}{name} by {x_axis.split('/')[-1]}"
  file_name = "".join(c if c.isalnum() else "_" for c in file_name) + ".png"
  (out / file_name).write_bytes(png)
  title, _ = title_and_unit(name)
  return {"title": title, "base64": base64.b64encode(png).decode()}


def title_and_unit(name: str) -> tuple[str, str]:
  """Returns what stands over the panel of a metric, and at its y axis."""
  known = TRAINING | SPEED
  if name in known:
    return known[name]
  _, _, score = name.rpartition("/")
  if name.startswith("eval/") and score in EVALUATION:
    title, unit = EVALUATION[score]
    return f"{title}: {name.split('/')[1]}", unit
  return name, name


def _drawn(runs: list[Run], name: str, x_axis: str) -> bytes:
  """Returns a PNG file of one metric of all groups."""
  figure = Figure(figsize=INCHES, dpi=DPI, layout="none")  # whatever a notebook has set
  figure.subplots_adjust(**MARGINS)
  plot = figure.add_subplot()
  draw_curves(plot, runs, name, x_axis)
  plot.title.set(size=10.5, weight="bold")
  plot.xaxis.label.set_fontsize(10)
  plot.yaxis.label.set_fontsize(10)
  plot.tick_params(labelsize=9.5)
  plot.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  plot.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
  file = io.BytesIO()
  figure.savefig(file, format="png")
  return _small(file)


def _small(file: io.BytesIO) -> bytes:
  """Returns a PNG file with few colours, which is a quarter as large."""
  smaller = io.BytesIO()
  with Image.open(file) as image:
    few = image.convert("RGB").quantize(COLOURS_KEPT, dither=Image.Dither.NONE)
  few.save(smaller, "png")
  return smaller.getvalue()


def draw_curves(plot, runs: list[Run], name: str, x_axis: str = "train/generations") -> None:
  """Draws a metric of the runs of `read_runs` into an Axes, as the report does.

  x_axis: one of X_AXES.
  """
  title, unit = title_and_unit(name)
  plot.set_title(title, parse_math=False)
  plot.set(xlabel=X_AXES[x_axis], ylabel=unit)
  groups = groups_of(runs)
  legend = {}  # line -> what it stands for
  for i, (label, members) in enumerate(groups.items()):
    again, colour = divmod(i, len(COLOURS))
    dashes = LINE_STYLES[again % len(LINE_STYLES)]  # colours that come again are told apart
    line, seeds = _draw_group(plot, members, name, x_axis, COLOURS[colour], dashes)
    if line is not None:
      legend[line] = legend_text(label, groups) + (f" ({seeds} seeds)" if seeds > 1 else "")
  if name.startswith("eval/") or name == "train/reward":
    plot.set_ylim(-0.02, 1.02)
  plot.grid(alpha=0.25)
  plot.spines[["top", "right"]].set_visible(False)
  if len(groups) > 1:
    _write_legend(plot, legend)


def legend_text(label: str, labels: Iterable[str]) -> str:
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
  x_X, value_SX = shared(members, name, x_axis)
  mean_X = value_SX.mean(axis=0)
  if not evaluation:
    for curve in curves:
      plot.plot(list(curve), list(curve.values()), color=colour, alpha=0.2, linewidth=0.8)
    mean_X = smooth(mean_X)
    value_SX = np.array([smooth(value_X) for value_X in value_SX])
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


def shared(members: list[Run], name: str, x_axis: str) -> tuple[list[float], np.ndarray]:
  """Returns mean x, and values by seed and x, of the steps where every seed has a value.

  A mean over fewer seeds would jump. The x of a step is a mean too, since seeds sample unequal
  numbers of tokens. Runs without any value are left out.
  """
  curves = [curve for curve in (run.points(name, x_axis) for run in members) if curve]
  steps = sorted(set.intersection(*map(set, curves))) if curves else []
  x_X = [float(np.mean([curve[step][0] for curve in curves])) for step in steps]
  value_SX = np.array([[curve[step][1] for step in steps] for curve in curves], dtype=float)
  return x_X, value_SX.reshape(len(curves), len(steps))


def mean_curve(members: list[Run], name: str, x_axis: str) -> list[tuple[float, float]]:
  """Returns [(x, mean over seeds)]."""
  x_X, value_SX = shared(members, name, x_axis)
  return list(zip(x_X, value_SX.mean(axis=0).tolist())) if x_X else []


def smooth(value_X: np.ndarray) -> np.ndarray:
  """Returns running means over a tenth of the points.

  Windows narrow at both ends so that they stay centred.
  """
  half = len(value_X) // 20
  reach = [min(half, i, len(value_X) - 1 - i) for i in range(len(value_X))]
  return np.array([value_X[i - r : i + r + 1].mean() for i, r in enumerate(reach)])
