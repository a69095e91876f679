"""Keeps what the runs of a grid gave, apart from their directories, so that none is repeated.

A grid that takes hours may be run in parts: on another day, or on a machine where the directories
of earlier runs are gone. What counts of a run is small and stands in three files:

  curves.json   every evaluation of every run, whether it ended, how its arm was tuned, the step at
                which each sign of collapse (monitors.py) was first seen, the commit of the code and
                the machine
  scores.json   what the last checkpoints can do, question by question (final_scores.py)
  trials.json   the last evaluation of every trial that has ended (tuning.py)

A run or a trial that ended there from the same arguments is not begun again. Nor is one that ended
in the directory of another grid: it is taken over, with the other directory under "from".
"""

import json
import pathlib
from typing import Sequence

from sdpo_jax import ending, final_scores, metrics, monitors
from sdpo_jax.config import defaults_of
from sdpo_jax.workdir import about_run, check_same_run, write_atomically

_CURVES, _SCORES, _TRIALS = "curves.json", "scores.json", "trials.json"
_KEPT_OF_A_POINT = (
  "step",
  "time_s",
  "train/generations",
  "train/sampled_tokens",
  "train/reward",
  "rollout/length_tail",
  "rollout/turns",
  "rollout/invalid_turns",
  "craft/aligned",
)


class Kept:
  """The three files of one directory; what it adds is written at once.

  Two parts of a grid that run at the same time may share a directory, if not in the same instant:
  there is no lock.
  """

  def __init__(self, directory: pathlib.Path, others: Sequence[pathlib.Path] = ()):
    """Reads the files of a directory, and of others from which runs may be taken over."""
    self.directory = directory
    self._others = [Kept(other) for other in others]
    self.curves, self.scores, self.trials = map(self._read, (_CURVES, _SCORES, _TRIALS))

  def _read(self, name: str) -> dict:
    """Returns a file's contents; ValueError for one that is broken."""
    path = self.directory / name
    if not path.exists():
      return {}
    try:
      return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise ValueError(f"{path} cannot be read: {error}; remove it, or take it from git") from error

  def _add(self, name: str, run: str, entry: dict) -> dict:
    """Returns a file's contents with the entry of a run, and writes them.

    The file is read again: another part of the grid may have added to it.
    """
    contents = self._read(name) | {run: entry}
    self.directory.mkdir(parents=True, exist_ok=True)
    # one run a line: what a later part of the grid adds is a small change
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(x)}" for key, x in contents.items())
    write_atomically(self.directory / name, f"{{\n{lines}\n}}\n")
    return contents

  def has_run(self, name: str, arguments: list[str], *, scored: bool) -> bool:
    """Tells whether a run of the grid ended, and was evaluated at its end if it had to be."""
    entry = self.curves.get(name, {})
    is_scored = not scored or self.scores.get(name, {}).get("arguments") == list(arguments)
    return bool(entry.get("ended")) and entry["arguments"] == list(arguments) and is_scored

  def has_ended(self, name: str) -> bool:
    """Tells whether a run of this name ended there, from whatever arguments."""
    return name in self.curves and self.curves[name].get("ended", True)

  def has_trial(self, name: str, arguments: list[str]) -> bool:
    return self.trials.get(name, {}).get("arguments") == list(arguments)

  def take_run(self, name: str, arguments: list[str], tuned, *, scored: bool) -> bool:
    """Takes over a run of another directory that ended from these arguments; tells whether one did.

    What was evaluated at its end has to be what this grid evaluates: the same SUITES.
    """
    for other in self._others:
      for its_name in other.curves:
        if not other.has_run(its_name, arguments, scored=scored):
          continue
        source = {"tuning": tuned, "from": str(other.directory)}
        self.curves = self._add(_CURVES, name, other.curves[its_name] | source)
        if scored:
          self.scores = self._add(_SCORES, name, other.scores[its_name] | source)
        return True
    return False

  def take_trial(self, name: str, arguments: list[str]) -> bool:
    """Takes over a trial of another directory that ended from these arguments, likewise."""
    for other in self._others:
      for its_name, entry in other.trials.items():
        if other.has_trial(its_name, arguments):
          self.trials = self._add(_TRIALS, name, entry | {"from": str(other.directory)})
          return True
    return False

  def add_run(self, name: str, arguments, workdir: pathlib.Path, tuned, *, ended: bool) -> None:
    """Takes over the evaluations in a run's directory, which may have ended or not.

    tuned: how its arm was tuned (tuning.of_run).
    """
    entry = {"arguments": list(arguments), "tuning": tuned}
    lines = metrics.read(workdir)
    seen = {"ended": ended, "warned": _warned(lines), "points": _points(lines)}
    about = about_run(workdir)
    made = {key: about.get(key) for key in ("commit", "machine")}
    self.curves = self._add(_CURVES, name, entry | seen | made)
    if ended and (splits := final_scores.collect(workdir)):
      self.scores = self._add(_SCORES, name, entry | {"splits": splits})

  def add_trial(self, name: str, arguments, end: dict) -> None:
    """Takes over the last evaluation of a trial's run."""
    self.trials = self._add(_TRIALS, name, {"arguments": list(arguments), "end": end})


def is_scored_in(workdir: pathlib.Path) -> bool:
  """Tells whether the checkpoint with which a run ended has been evaluated on suites."""
  step = ending.of_run_file(workdir).get("step")
  return step is not None and (workdir / "eval" / f"step_{step:06d}.json").exists()


def has_ended_in(workdir: pathlib.Path, c) -> bool:
  """Tells whether a run of these settings has ended in a work directory.

  Raises ValueError, naming the first difference, if a run with other settings ended there.
  """
  ended = ending.of_run_file(workdir)
  check_same_run(workdir, c, begun=bool(ended), defaults=defaults_of(c))
  return bool(ended) and (ended["stopped"] or ended["step"] >= c.total_steps)


def _warned(lines: list[dict]) -> dict[str, int]:
  """Returns {sign of collapse: the step at which it was first seen}."""
  first: dict[str, int] = {}
  for i, line in enumerate(lines):
    for sign in monitors.warnings(lines[: i + 1]):
      first.setdefault(sign, line["step"])
  return first


def _points(lines: list[dict]) -> list[dict]:
  """Returns a run's evaluations, and what it had generated by each of them."""

  def is_kept(key: str) -> bool:
    return key.startswith("eval/") or key in _KEPT_OF_A_POINT

  evaluated = [line for line in lines if any(key.startswith("eval/") for key in line)]
  return [{key: value for key, value in line.items() if is_kept(key)} for line in evaluated]
