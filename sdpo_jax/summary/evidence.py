"""Holds a claim against the measurements of a grid: holds, does not hold, or cannot be told.

A measure is a record that says what is compared, in which grid. Called with the folder results/, it
returns a Verdict, or None where the grid has not run far enough. A verdict is read off an interval:

  does not hold    the interval is short of what is claimed; for a difference, below MARGIN
  holds            the whole interval is on the claimed side
  cannot be told   the interval has room for both, or is of fewer than SEEDS runs

Of what happens in runs (a collapse), a claim holds if it happens in all of them.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Sequence

import numpy as np

from sdpo_jax import final_scores, stats
from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.collapse import collapsed_at
from sdpo_jax.summary.forgetting import forgotten_at_end
from sdpo_jax.summary.pace import cost_ratio, of_same_seeds
from sdpo_jax.summary.runs import SPLITS, Run, by_arm, ended_runs, main_split, read_run

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
MARGIN = 0.02  # a smaller advantage counts for nothing
SEEDS = 3  # of fewer the spread over runs is hardly known


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a grid says of a claim."""

  word: str
  figure: str


# Reading results/


@functools.cache
def _json(path: pathlib.Path, _changed_ns: int) -> dict:
  return json.loads(path.read_text(encoding="utf-8"))


def read(path: pathlib.Path) -> dict:
  """Returns the contents of a file, {} if there is none; each version of it is read once."""
  return _json(path, path.stat().st_mtime_ns) if path.exists() else {}


def _runs(results: pathlib.Path, grid: str, domain: str = "") -> dict[str, list[Run]]:
  """Returns {arm: its runs that have ended}."""
  runs = ended_runs(read(results / grid / "curves.json"))
  return by_arm([run for run in runs if run.domain == domain])


def _arms(results: pathlib.Path, grid: str, split: str) -> dict[str, final_scores.Arm]:
  """Returns {arm: what its last checkpoints can do on a split}."""
  runs = []
  for name, entry in read(results / grid / "scores.json").items():
    run = read_run(name, entry)
    runs.append((run.arm, run.seed, entry["splits"]))
  return final_scores.arms_of(runs, split)


def _question_scores(results, grid: str, split: str, names) -> dict[str, np.ndarray]:
  """Returns {arm: scores by question and seed, [Q, S]} of the seeds that all these arms have."""
  arms = _arms(results, grid, split)
  if not {*names} <= arms.keys():
    return {}
  seeds = sorted(set.intersection(*({*arms[name].seeds} for name in names)))
  return {name: arms[name].of_seeds(seeds).table("reward") for name in names} if seeds else {}


def _last_scores(results, grid: str, split: str, domain: str, names) -> dict[str, np.ndarray]:
  """Returns {arm: the last evaluation of each seed, [S]} of the seeds that all these arms have."""
  runs = _runs(results, grid, domain)
  by_seed = [{run.seed: run.last(split) for run in runs.get(name, [])} for name in names]
  seeds = sorted(set.intersection(*map(set, by_seed)))
  if not seeds:
    return {}
  return {name: np.array([x[s] for s in seeds]) for name, x in zip(names, by_seed, strict=True)}


# Differences


@dataclasses.dataclass(frozen=True)
class Above:
  """Claims that an arm's last checkpoints score higher than the best of `others`, by their means.

  So a baseline with several forms is held to the one that did best, not to one that collapsed.
  Intervals draw seeds and questions, or seeds alone where the grid has no scores.json.
  """

  grid: str
  arm: str
  others: tuple[str, ...]
  split: str = SPLITS[0]
  domain: str = ""

  def __call__(self, results: pathlib.Path) -> Verdict | None:
    names = (self.arm, *self.others)
    scores = {} if self.domain else _question_scores(results, self.grid, self.split, names)
    scores = scores or _last_scores(results, self.grid, self.split, self.domain, names)
    if not scores:
      return None
    best = max(self.others, key=lambda name: np.mean(scores[name]))
    verdict = _of_difference(scores[self.arm], scores[best], seeds=scores[self.arm].shape[-1])
    if verdict is None or len(self.others) == 1:
      return verdict
    return dataclasses.replace(verdict, figure=f"{verdict.figure}, against `{best}`")


@dataclasses.dataclass(frozen=True)
class ForgetsLess:
  """Claims that an arm keeps a larger share of what earlier stages taught than another."""

  grid: str
  arm: str
  other: str

  def __call__(self, results: pathlib.Path) -> Verdict | None:
    runs = _runs(results, self.grid)
    pairs = of_same_seeds(runs.get(self.arm, []), runs.get(self.other, []))
    kept = [[1 - forgotten_at_end(run) for run in pair] for pair in pairs]
    if not kept:
      return None
    return _of_difference(*map(np.array, zip(*kept)), seeds=len(pairs))


@dataclasses.dataclass(frozen=True)
class DiscoversMore:
  """Claims that an arm solves more questions than another with the whole budget of attempts."""

  arm: str
  other: str
  grid: str = "discover"

  def __call__(self, results: pathlib.Path) -> Verdict | None:
    summary = read(results / self.grid / "discover.json")
    if not {self.arm, self.other} <= {*summary.get("arms", ())}:
      return None
    rows = summary["questions"]
    shares = [[row[x]["solved"] / row[x]["runs"] for row in rows] for x in (self.arm, self.other)]
    return _of_difference(*shares, seeds=rows[0][self.arm]["runs"])


def _of_difference(own, others, *, seeds: int) -> Verdict | None:
  """Returns the verdict on a difference that is claimed to be above zero; None without a spread."""
  difference, low, high, _ = stats.paired_bootstrap(own, others)
  if low is None or high is None:
    return None
  low, high = max(low, -1.0), min(high, 1.0)
  word = OPEN
  if seeds >= SEEDS and high < MARGIN:
    word = FAILS
  elif seeds >= SEEDS and low > 0:
    word = HOLDS
  return Verdict(word, f"{md.score(difference, low, high, '+')} points, {_seeds(seeds)}")


def _seeds(count: int) -> str:
  return "one seed" if count == 1 else f"{count} seeds"


# Ratios


@dataclasses.dataclass(frozen=True)
class Sooner:
  """Claims that an arm is as good as another's end after this share of its responses."""

  grid: str
  arm: str
  other: str
  share: float

  def __call__(self, results: pathlib.Path) -> Verdict | None:
    runs = _runs(results, self.grid)
    pairs = of_same_seeds(runs.get(self.arm, []), runs.get(self.other, []))
    if len(pairs) < 5:  # fewer give no interval
      return None
    ratio = cost_ratio(pairs, "generations", main_split(runs[self.arm]))
    high = math.inf if ratio.high is None else ratio.high
    median = "unknown" if ratio.ratio is None else f"{ratio.ratio:.2f}"
    bounds = f"[{ratio.low:.2f}, {md.bound(ratio.high)}]"
    figure = f"{median} {bounds} of the responses, {_seeds(len(pairs))}"
    return Verdict(_at_most(ratio.low, high, self.share), figure)


@dataclasses.dataclass(frozen=True)
class Shorter:
  """Claims that an arm's responses have at most this share of the length of another's.

  In place of an interval stands the span of the seeds' ratios.
  """

  grid: str
  arm: str
  other: str
  share: float
  split: str = SPLITS[0]

  def __call__(self, results: pathlib.Path) -> Verdict | None:
    arms = _arms(results, self.grid, self.split)
    if not {self.arm, self.other} <= arms.keys():
      return None
    seeds = sorted({*arms[self.arm].seeds} & {*arms[self.other].seeds})
    if len(seeds) < SEEDS:
      return None
    own, others = (arms[name].of_seeds(seeds).entries for name in (self.arm, self.other))
    ratios = [a["length_mean"] / b["length_mean"] for a, b in zip(own, others, strict=True)]
    figure = f"{min(ratios):.2f} to {max(ratios):.2f} times as long, {_seeds(len(seeds))}"
    return Verdict(_at_most(min(ratios), max(ratios), self.share), figure)


@dataclasses.dataclass(frozen=True)
class DiscoversSooner:
  """Claims that an arm needs this share of best_of_k's attempts for what that discovers."""

  arm: str
  share: float
  grid: str = "discover"

  def __call__(self, results: pathlib.Path) -> Verdict | None:
    summary = read(results / self.grid / "discover.json")
    compared = summary.get(f"{self.arm}_against_best_of_k")
    if compared is None or not compared["target"]:  # best_of_k has solved nothing
      return None
    whole = compared["baseline_attempts"]
    cost = {key: compared["attempts"][key] for key in ("to_reach", "low", "high")}
    median, low, high = (math.inf if x is None else x / whole for x in cost.values())
    figure = (
      f"{md.bound(median)} [{md.bound(low)}, {md.bound(high)}] of the attempts "
      f"({100 * summary['level']:.0f} %)"
    )
    return Verdict(_at_most(low, high, self.share), figure)


def _at_most(low: float, high: float, limit: float) -> str:
  """Returns the word on a figure that is claimed to be at most this."""
  if high <= limit:
    return HOLDS
  return FAILS if low > limit else OPEN


# What happens in runs


@dataclasses.dataclass(frozen=True)
class Collapses:
  """Claims that every run of an arm collapses: by the step `within`, and later than an other's."""

  grid: str
  arm: str
  within: int | None = None
  later_than: str = ""

  def __call__(self, results: pathlib.Path) -> Verdict | None:
    runs = _runs(results, self.grid)
    members = runs.get(self.arm, [])
    others = {run.seed: collapsed_at(run) for run in runs.get(self.later_than, [])}

    def is_claimed(run: Run) -> bool:
      step = collapsed_at(run)
      if step is None or self.within is not None and step > self.within:
        return False
      other = others.get(run.seed)
      return not self.later_than or other is not None and step > other

    return _of_runs([is_claimed(run) for run in members], members)


@dataclasses.dataclass(frozen=True)
class Lasts:
  """Claims that no run of an arm collapses."""

  grid: str
  arm: str

  def __call__(self, results: pathlib.Path) -> Verdict | None:
    members = _runs(results, self.grid).get(self.arm, [])
    return _of_runs([collapsed_at(run) is None for run in members], members)


def _of_runs(claimed: Sequence[bool], runs: list[Run]) -> Verdict | None:
  """Returns the verdict on what is claimed of every run."""
  if not runs:
    return None
  word = HOLDS if all(claimed) else OPEN
  word = FAILS if not any(claimed) else word
  steps = ["never" if collapsed_at(run) is None else str(collapsed_at(run)) for run in runs]
  figure = f"collapsed at step: {', '.join(steps)}, of {runs[0].points[-1]['step']}"
  return Verdict(word if len(runs) >= SEEDS else OPEN, figure)


@dataclasses.dataclass(frozen=True)
class WarnsBefore:
  """Claims that a sign is seen at least so many steps before each collapse, and seldom else.

  Collapses before step `after`, when the sign cannot yet have been seen, are left out.
  """

  grid: str
  sign: str
  steps: int
  after: int

  def __call__(self, results: pathlib.Path) -> Verdict | None:
    runs = [run for members in _runs(results, self.grid).values() for run in members]
    ends = [(run.warned.get(self.sign), collapsed_at(run)) for run in runs if run.is_watched]
    collapses = [(seen, end) for seen, end in ends if end is not None and end > self.after]
    others = [seen for seen, end in ends if end is None]
    if len(collapses) < SEEDS:
      return None
    early = sum(seen is not None and seen <= end - self.steps for seen, end in collapses)
    false = len(others) - others.count(None)
    word = OPEN
    if not early:
      word = FAILS
    elif early == len(collapses) and 2 * false < len(others):
      word = HOLDS
    figure = f"before {early} of {len(collapses)} collapses; in {false} of {len(others)} other runs"
    return Verdict(word, figure)


Measure = (
  Above
  | ForgetsLess
  | DiscoversMore
  | Sooner
  | Shorter
  | DiscoversSooner
  | Collapses
  | Lasts
  | WarnsBefore
)
