"""Compares the arms of a grid by what their last checkpoints can do: scores.json, and its tables.

An experiment file with SUITES = "FILE" has the last checkpoint of each run evaluated on the suites
of that file (`--mode=eval`). scores.json keeps, for each run, what every table is computed from:

  {run: {"arguments": ..., "tuning": ..., "splits": {split: scores}}}

  reward             the mean reward of each question's samples
  solved, judged     of each question: how many samples are right, and how many have a verdict
  greedy             the reward of the greedy response to each question
  entropy, length_mean, length_p90, length_p99, cut_off
                     of all samples, as evaluation/scores.py says

A seed is one training run, scored on the same questions as the others. Intervals and tests
therefore draw seeds and questions both: they speak of training runs and questions at large.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from sdpo_jax import stats
from sdpo_jax.evaluation.scores import rewards_of, successes
from sdpo_jax.workdir import read_lines

_FIGURES = ("entropy", "length_mean", "length_p90", "length_p99", "cut_off")


def collect(workdir: pathlib.Path) -> dict:
  """Returns {split: scores} of a run's newest evaluation; {} if it has none."""
  summaries = sorted((workdir / "eval").glob("step_*.json"))
  if not summaries:
    return {}
  figures = json.loads(summaries[-1].read_text(encoding="utf-8"))
  files = sorted(summaries[-1].with_suffix("").glob("*.sampled.jsonl"))
  return {path.name.split(".")[1]: _of_split(path, figures) for path in files}


def _of_split(sampled: pathlib.Path, figures: dict) -> dict:
  """Returns the scores of one split from its lines, by question in order."""
  suite, split, _ = sampled.name.split(".", 2)
  rewards = _rewards(sampled)
  greedy = _rewards(sampled.with_name(f"{suite}.{split}.greedy.jsonl"))
  values = {name: figures.get(f"eval/{suite}.{split}/{name}") for name in _FIGURES}
  return {
    "reward": [_mean(r) for r in rewards],
    "solved": [successes(r) for r in rewards],
    "judged": [len(r) for r in rewards],
    "greedy": [_mean(r) for r in greedy],
  } | {name: value for name, value in values.items() if value is not None}


def _mean(rewards: list[float]) -> float | None:
  return float(np.mean(rewards)) if rewards else None


def _rewards(path: pathlib.Path) -> list[list[float]]:
  """Returns the rewards of the judged responses to each question."""
  lines = sorted(read_lines(path), key=lambda line: line["question"])
  return [rewards_of(line) for line in lines]


class Arm(NamedTuple):
  """The runs of one arm on one split, seeds in order; Q questions, S seeds."""

  name: str
  seeds: list[int]
  entries: list[dict]  # of each seed, as scores.json has them

  def table(self, key: str) -> np.ndarray:
    """Returns values by question and seed, [Q, S]. ValueError for a question without a verdict."""
    columns = [entry[key] for entry in self.entries]
    if any(value is None for column in columns for value in column):
      raise ValueError(f"{self.name}: a question has no verdict, so {key} cannot be compared")
    return np.array(columns, dtype=float).T

  def of_seeds(self, seeds: list[int]) -> "Arm":
    """Returns the runs of these seeds alone."""
    kept = [self.entries[self.seeds.index(seed)] for seed in seeds]
    return self._replace(seeds=list(seeds), entries=kept)

  def pass_at(self, k: int) -> np.ndarray:
    """Returns the unbiased pass@k by question and seed, [Q, S]."""
    return stats.pass_at_k(self.table("judged"), self.table("solved"), k)

  def mean(self, key: str) -> float:
    """Returns the mean over seeds of a figure of all responses."""
    return float(np.mean([entry[key] for entry in self.entries]))


def arms_of(runs: list[tuple[str, int, dict]], split: str) -> dict[str, Arm]:
  """Returns {arm: its runs that were scored on the split} from (arm, seed, splits) of each run."""
  arms: dict[str, Arm] = {}
  for arm, seed, splits in sorted(runs, key=lambda run: run[1]):
    if split in splits:
      own = arms.setdefault(arm, Arm(arm, [], []))
      own.seeds.append(seed)
      own.entries.append(splits[split])
  return arms
