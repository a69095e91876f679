"""Holds a claim against the measurements of a grid: holds, does not hold, or cannot be told.

Each function here returns a measure: a function of results/ that returns what was found there, or
None where the grid has not run far enough. A claim says that something is larger, cheaper, or
happens in every run, and the verdict is read off the interval alone:

  holds            the whole interval is on the claimed side
  does not hold    the whole interval is short of it; for a difference, below MARGIN in its favour
  cannot be told   the interval has room for both, or is of one run
"""

import functools
import json
import math
import pathlib
from typing import Callable, NamedTuple

import numpy as np

from sdpo_jax import final_scores, stats
from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.collapse import fall
from sdpo_jax.summary.forgetting import forgotten_at_end
from sdpo_jax.summary.pace import cost_ratio, of_same_seeds
from sdpo_jax.summary.runs import SPLITS, Run, by_arm, ended_runs, read_run

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
MARGIN = 0.02  # a smaller advantage counts for nothing


class Found(NamedTuple):
  """What a grid says of a claim."""

  verdict: str
  figure: str


Measure = Callable[[pathlib.Path], Found | None]


@functools.cache
def _json(path: pathlib.Path, _changed_ns: int) -> dict:
  return json.loads(path.read_text(encoding="utf-8"))


def _read(path: pathlib.Path) -> dict:
  """Returns the contents of a file, {} if there is none; each version of it is read once."""
  return _json(path, path.stat().st_mtime_ns) if path.exists() else {}


def _runs(results: pathlib.Path, grid: str, domain: str = "") -> dict[str, list[Run]]:
  """Returns {arm: its runs that have ended}."""
  runs = ended_runs(_read(results / grid / "curves.json"))
  return by_arm([run for run in runs if run.domain == domain])


def _arms(results: pathlib.Path, grid: str, split: str) -> dict[str, final_scores.Arm]:
  """Returns {arm: what its last checkpoints can do on a split}."""
  runs = []
  for name, entry in _read(results / grid / "scores.json").items():
    run = read_run(name, entry)
    runs.append((run.arm, run.seed, entry["splits"]))
  return final_scores.arms_of(runs, split)


def above(grid: str, arm: str, other: str, *, split: str = SPLITS[0], domain: str = "") -> Measure:
  """Claims that an arm's last checkpoints score higher than another's, seed by seed.

  Intervals draw seeds and questions, or seeds alone where the grid has no scores.json.
  """
  return above_best(grid, arm, (other,), split=split, domain=domain)


def above_best(
  grid: str, arm: str, others: tuple[str, ...], *, split: str = SPLITS[0], domain: str = ""
) -> Measure:
  """Claims that an arm scores higher than the best of several others, by their means.

  So a baseline with several forms is held to the one that did best, not to one that collapsed.
  """

  def measure(results: pathlib.Path) -> Found | None:
    scores = {} if domain else _question_scores(results, grid, split, (arm, *others))
    scores = scores or _last_scores(results, grid, split, domain, (arm, *others))
    if not scores:
      return None
    best = max(others, key=lambda name: np.mean(scores[name]))
    found = _difference(scores[arm], scores[best], seeds=scores[arm].shape[-1])
    if found is None or len(others) == 1:
      return found
    return found._replace(figure=f"{found.figure}, against `{best}`")

  return measure


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


def _difference(own, others, *, seeds: int) -> Found | None:
  """Returns the verdict on a difference that is claimed to be above zero."""
  difference, low, high, _ = stats.paired_bootstrap(own, others)
  if low is None or high is None:
    return None
  verdict = OPEN
  if seeds > 1 and low > 0:
    verdict = HOLDS
  elif seeds > 1 and high < MARGIN:
    verdict = FAILS
  return Found(verdict, f"{md.score(difference, low, high, '+')} points, {_seeds(seeds)}")


def sooner(grid: str, arm: str, other: str, share: float) -> Measure:
  """Claims that an arm is as good as another's end after this share of its responses."""

  def measure(results: pathlib.Path) -> Found | None:
    runs = _runs(results, grid)
    pairs = of_same_seeds(runs.get(arm, []), runs.get(other, []))
    if len(pairs) < 5:  # fewer give no interval
      return None
    ratio = cost_ratio(pairs, "generations")
    high = float("inf") if ratio.high is None else ratio.high
    median = "unknown" if ratio.ratio is None else f"{ratio.ratio:.2f}"
    figure = f"{median} [{ratio.low:.2f}, {high:.2f}] of the responses, {_seeds(len(pairs))}"
    return Found(_at_most(ratio.low, high, share), figure)

  return measure


def shorter(grid: str, arm: str, other: str, share: float) -> Measure:
  """Claims that an arm's responses have at most this share of the length of another's."""

  def measure(results: pathlib.Path) -> Found | None:
    arms = _arms(results, grid, SPLITS[0])
    if arm not in arms or other not in arms:
      return None
    both = sorted({*arms[arm].seeds} & {*arms[other].seeds})
    lengths = [
      [entry["length_mean"] for entry in arms[name].of_seeds(both).entries] for name in (arm, other)
    ]
    ratios = [own / its for own, its in zip(*lengths, strict=True)]
    if len(both) < 2:
      return None
    figure = f"{min(ratios):.2f} to {max(ratios):.2f} times as long, {_seeds(len(both))}"
    return Found(_at_most(min(ratios), max(ratios), share), figure)

  return measure


def _at_most(low: float, high: float, limit: float) -> str:
  """Returns the verdict on a figure that is claimed to be at most this."""
  if high <= limit:
    return HOLDS
  return FAILS if low > limit else OPEN


def falls(grid: str, arm: str, *, within: int | None = None) -> Measure:
  """Claims that every run of an arm falls, by the step `within` if one is given."""

  def measure(results: pathlib.Path) -> Found | None:
    runs = _runs(results, grid).get(arm, [])
    steps = [fall(run) for run in runs]
    limit = math.inf if within is None else within
    fallen = [step for step in steps if step is not None and step <= limit]
    return _counted(len(fallen), runs, steps)

  return measure


def lasts(grid: str, arm: str) -> Measure:
  """Claims that no run of an arm falls."""

  def measure(results: pathlib.Path) -> Found | None:
    runs = _runs(results, grid).get(arm, [])
    steps = [fall(run) for run in runs]
    return _counted(steps.count(None), runs, steps)

  return measure


def _counted(claimed: int, runs: list[Run], steps: list[int | None]) -> Found | None:
  """Returns the verdict on what is claimed of every run; two runs or more can tell."""
  if len(runs) < 2:
    return None
  verdict = {len(runs): HOLDS, 0: FAILS}.get(claimed, OPEN)
  when = ", ".join("never" if step is None else str(step) for step in steps)
  return Found(verdict, f"fell at step: {when}, of {runs[0].points[-1]['step']}")


def told_before(grid: str, sign: str, steps: int) -> Measure:
  """Claims that a sign is seen at least so many steps before each fall of a grid's runs."""

  def measure(results: pathlib.Path) -> Found | None:
    runs = [run for members in _runs(results, grid).values() for run in members]
    ends = [(run.warned.get(sign), fall(run)) for run in runs]
    fallen = [(seen, end) for seen, end in ends if end is not None]
    if len(fallen) < 2:
      return None
    early = sum(seen is not None and seen <= end - steps for seen, end in fallen)
    verdict = {len(fallen): HOLDS, 0: FAILS}.get(early, OPEN)
    false = sum(seen is not None and end is None for seen, end in ends)
    figure = f"{early} of {len(fallen)} falls; seen in {false} of {len(ends) - len(fallen)} others"
    return Found(verdict, figure)

  return measure


def forgets_less(grid: str, arm: str, other: str) -> Measure:
  """Claims that an arm loses a smaller share of what earlier stages taught than another."""

  def measure(results: pathlib.Path) -> Found | None:
    runs = _runs(results, grid)
    pairs = of_same_seeds(runs.get(arm, []), runs.get(other, []))
    if len(pairs) < 2:
      return None
    kept, others_kept = [[1 - forgotten_at_end(run) for run in runs] for runs in zip(*pairs)]
    return _difference(kept, others_kept, seeds=len(pairs))

  return measure


def discovers_sooner(arm: str, share: float) -> Measure:
  """Claims that an arm needs this share of best_of_k's attempts for what that discovers."""

  def measure(results: pathlib.Path) -> Found | None:
    compared = _read(results / "discover" / "discover.json").get(f"{arm}_against_best_of_k")
    if compared is None:
      return None
    whole, cost = compared["baseline_attempts"], compared["attempts"]
    shares = [cost[key] / whole for key in ("to_reach", "low", "high")]
    figure = f"{shares[0]:.2f} [{shares[1]:.2f}, {shares[2]:.2f}] of the attempts"
    return Found(_at_most(*shares[1:], share), figure)

  return measure


def discovers_more(arm: str, other: str) -> Measure:
  """Claims that an arm has solved more within the whole budget of test-time attempts."""

  def measure(results: pathlib.Path) -> Found | None:
    summary = _read(results / "discover" / "discover.json")
    if not {arm, other} <= {*summary.get("arms", ())}:
      return None
    rows = summary["questions"]
    own, others = (
      [row[name]["solved"] / row[name]["runs"] for row in rows] for name in (arm, other)
    )
    return _difference(own, others, seeds=rows[0][arm]["runs"])

  return measure


def _seeds(count: int) -> str:
  return "one seed" if count == 1 else f"{count} seeds"
