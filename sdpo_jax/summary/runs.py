"""Reads the runs of a grid from curves.json and scores.json."""

import re
from typing import NamedTuple

SPLITS = ("heldout", "unseen", "adversarial")
_AVERAGE = re.compile(r"eval/(.+)/avg@k")
# The arms whose last evaluation others have to reach
TARGETS = ("sdpo", "grpo")


class Run(NamedTuple):
  """One run of a grid."""

  domain: str  # of the questions; "" where the grid has one domain
  arm: str
  seed: int
  tuning: dict | None  # how many trials its arm had, and which was chosen; None: none
  points: list[dict]  # one for each evaluation, the base model's first
  warned: dict[str, int]  # sign of collapse -> the step at which it was first seen
  is_watched: bool  # whether signs were looked for
  arguments: list[str]  # of sdpo_jax.main

  def evaluations(self, split: str) -> list[dict]:
    return [point for point in self.points if f"eval/{split}/avg@k" in point]

  def first(self, split: str) -> float:
    return self.evaluations(split)[0][f"eval/{split}/avg@k"]

  def last(self, split: str) -> float:
    return self.evaluations(split)[-1][f"eval/{split}/avg@k"]


def read_run(name: str, entry: dict) -> Run:
  """Reads an entry of curves.json or scores.json, and the name of its run.

  The arguments name a configuration file and the file's keys. Their values name the arm, unless the
  run is called [DOMAIN_]ARM_seedN or ARM_on_DOMAIN_seedN.
  """
  keys = dict(pair.split("=", 1) for pair in entry["arguments"][0].rpartition(":")[2].split(","))
  domain, seed = keys.pop("domain", ""), int(keys.pop("seed"))
  arm = name.removesuffix(f"_seed{seed}")
  if arm != name and "_on_" in arm:
    arm, _, domain = arm.partition("_on_")
  elif arm == name:
    arm = ", ".join(keys.values())
  elif domain and arm.startswith(f"{domain}_"):
    arm = arm.removeprefix(f"{domain}_")
  else:
    domain = ""
  return Run(
    domain,
    arm,
    seed,
    entry.get("tuning"),
    entry.get("points", []),
    entry.get("warned") or {},
    is_watched=entry.get("warned") is not None,
    arguments=entry["arguments"],
  )


def ended_runs(entries: dict) -> list[Run]:
  """Returns the runs of curves.json that have a result.

  Of one that has not ended the last evaluation is none.
  """
  return [
    read_run(name, entry)
    for name, entry in entries.items()
    if entry.get("ended", True) and entry["points"]
  ]


def splits_of(runs: list[Run]) -> list[str]:
  """Returns the splits on which all these runs are evaluated, the first of SPLITS first.

  Those of stages have a table of their own (forgetting.py).
  """
  evaluated = [{x[1] for x in map(_AVERAGE.fullmatch, run.points[-1]) if x} for run in runs]
  common = {name for name in set.intersection(*evaluated) if not name.startswith("stage_")}
  return [x for x in SPLITS if x in common] + sorted(common - set(SPLITS))


def main_split(runs: list[Run]) -> str:
  """Returns the split by which runs are compared; ValueError if they have none in common."""
  splits = splits_of(runs)
  if not splits:
    raise ValueError(
      f"no split is evaluated at the end of all of {[run.arguments for run in runs]}"
    )
  return splits[0]


def by_arm(runs: list[Run]) -> dict[str, list[Run]]:
  """Returns the runs by arm, seeds in order, the arm that is best at the main split first."""
  if not runs:
    return {}
  split, arms = main_split(runs), {}
  for run in sorted(runs, key=lambda run: run.seed):
    arms.setdefault(run.arm, []).append(run)

  def mean_score(arm):
    return sum(run.last(split) for run in arms[arm]) / len(arms[arm])

  return {arm: arms[arm] for arm in sorted(arms, key=mean_score, reverse=True)}
