"""Lays out forest plots: a row for each group of runs, with a mean, its interval and a zero line.

A plot is drawn by the page as a table, in whose middle column marks stand at per cents of its
width; so its texts stay texts. Values are points, hundredths of the reward. A mean without an
interval (a single seed) is a bare point.

  differences   last evaluations against the first group's, over the seeds that both have
  gains         last evaluations against the base model's: over seeds, or of a single run over
                questions, as it has measured that itself (`eval/SPLIT/gain`)
"""

import math
from typing import NamedTuple

from sdpo_jax import stats
from sdpo_jax.report.comparison import paired, points, trained
from sdpo_jax.report.curves import COLOURS
from sdpo_jax.report.runs import Run, groups_of, splits_of

STEPS = (1, 2, 5, 10, 20, 25, 50)  # points between two ticks
MOST_TICKS = 6


class Mark(NamedTuple):
  """A mean and its interval, in points."""

  label: str
  colour: str
  mean: float
  low: float | None
  high: float | None
  seeds: int


def differences(runs: list[Run]) -> dict | None:
  """Returns the plot of every group against the first; None where there is no other."""
  groups = groups_of(runs)
  first, *others = groups
  splits = {}
  for split in splits_of(runs):
    name = f"eval/{split}/avg@k"
    kept = trained(runs, name)
    found = {label: paired(kept[label], kept[first], name) for label in others}
    marks = [
      _mark(label, groups, pair[:3], pair.seeds)
      for label, pair in found.items()
      if pair is not None
    ]
    splits[split] = marks
  return _plot(splits, first=first)


def gains(runs: list[Run]) -> dict | None:
  """Returns the plot of every group against its base model; None where no gain was measured."""
  groups = groups_of(runs)
  splits = {}
  for split in splits_of(runs):
    name = f"eval/{split}/gain"
    marks = []
    for label, members in groups.items():
      measured = [run for run in members if run.series(name)]
      if measured:
        marks.append(_mark(label, groups, _gain(measured, name), len(measured)))
    splits[split] = marks
  return _plot(splits, first="")


def _gain(members: list[Run], name: str) -> tuple:
  """Returns the mean gain and its interval: over seeds, or over the questions of a single run."""
  if len(members) == 1:
    line = next(line for line in reversed(members[0].lines) if name in line)
    return line[name], line.get(f"{name}_low"), line.get(f"{name}_high")
  last = [run.last(name) for run in members]
  return stats.paired_bootstrap(last, [0.0] * len(last))[:3]


def _points(share: float | None) -> float | None:
  return None if share is None else 100 * share


def _mark(label: str, groups: dict, interval: tuple, seeds: int) -> Mark:
  """Returns a mark with the colour that the group has in curves. interval: mean, low, high."""
  mean, low, high = (_points(x) for x in interval)
  colour = COLOURS[list(groups).index(label) % len(COLOURS)]
  return Mark(label, colour, mean, low, high, seeds)


def _plot(splits: dict[str, list[Mark]], first: str) -> dict | None:
  """Returns rows and ticks with their places in per cent of the axis; None without any mark."""
  marks = [mark for of_split in splits.values() for mark in of_split]
  if not marks:
    return None
  ends = [x for mark in marks for x in (mark.mean, mark.low, mark.high) if x is not None]
  ticks = ticks_of(min(0.0, *ends), max(0.0, *ends))
  low, high = ticks[0], ticks[-1]

  def place(value: float) -> str:
    return f"{100 * (value - low) / (high - low):.2f}"

  return {
    "first": first,
    "zero": place(0.0),
    "ticks": [(place(tick), f"{tick:+g}" if tick else "0") for tick in ticks],
    "splits": [
      {"name": split, "rows": [_row(mark, place) for mark in of_split]}
      for split, of_split in splits.items()
      if of_split
    ],
  }


def _row(mark: Mark, place) -> dict:
  text = points(mark.mean / 100, *(None if x is None else x / 100 for x in (mark.low, mark.high)))
  ends = (None, None)
  if mark.low is not None and mark.high is not None:
    ends = place(mark.low), place(mark.high)
  return {
    "label": mark.label,
    "colour": mark.colour,
    "at": place(mark.mean),
    "from": ends[0],
    "to": ends[1],
    "mean": text.mean,
    "interval": text.interval,
    "seeds": mark.seeds,
  }


def ticks_of(low: float, high: float) -> list[float]:
  """Returns round numbers at equal distances that enclose both ends, at most MOST_TICKS + 1."""
  step = next((s for s in STEPS if (high - low) / s <= MOST_TICKS - 1), STEPS[-1])
  while (high - low) / step > MOST_TICKS - 1:
    step *= 10
  first, last = math.floor(low / step), math.ceil(high / step)
  last = max(last, first + 1)
  return [float(i * step) for i in range(first, last + 1)]
