"""Keeps the judged batches of a run on disk, so that a killed session goes on in mid-question.

A resumed run reads these batches instead of sampling and judging them again; it only repeats the
updates. One file a run, one batch of attempts a line:

  run     [arm, task id, seed]
  first   numbers of the first attempts, one a group
  time_s  seconds since the run began, earlier sessions included
  groups  the rollouts, without their task
"""

import dataclasses
import json
import pathlib
import time
from typing import Callable

from sdpo_jax.discover.budget import any_judged
from sdpo_jax.records import Feedback, Rollout, Status, Task
from sdpo_jax.workdir import read_lines, write_atomically


class AttemptLog:
  """Holds the batches of one run that are on disk and not yet read again.

  run_key: [arm, task id, seed]. Raises AssertionError if the file belongs to another run.
  """

  def __init__(self, path: pathlib.Path, run_key: list):
    self.path = path
    self.run_key = run_key
    self.stored = read_lines(path)
    for line in self.stored:
      assert line["run"] == run_key, f"{path} does not belong to the run {run_key}"
    # Batches without any verdict are tried again: the sandbox that broke there may work now.
    while self.stored and not _holds_a_verdict(self.stored[-1]):
      self.stored.pop()
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.stored))
    earlier_s = self.stored[-1]["time_s"] if self.stored else 0.0
    self.begun = time.monotonic() - earlier_s

  @property
  def time_s(self) -> float:
    """Seconds since the run began; of earlier sessions, what the batches on disk took."""
    return round(time.monotonic() - self.begun, 3)

  def read_or_collect(
    self,
    collect: Callable,
    params,
    batches: list[tuple[Task, int]],
    prompts: list[list[int]] | None = None,
  ):
    """Returns the groups of the next batches: from disk while there are any, else collected.

    collect(params, batches, prompts) -> groups; what it returns is written before it is handed on.
    """
    if self.stored:
      return self._read(batches)
    groups = collect(params, batches, prompts)
    line = {
      "run": self.run_key,
      "first": [first for _, first in batches],
      "time_s": self.time_s,
      "groups": [[to_json(rollout) for rollout in group] for group in groups],
    }
    with open(self.path, "a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
    return groups

  def _read(self, batches: list[tuple[Task, int]]) -> list[list[Rollout]]:
    line = self.stored.pop(0)
    assert line["first"] == [first for _, first in batches], (
      f"{self.path} does not belong to this run"
    )
    groups = []
    for (task, _), group in zip(batches, line["groups"], strict=True):
      groups.append([from_json(fields, task) for fields in group])
    return groups


def _holds_a_verdict(line: dict) -> bool:
  return any(any_judged([from_json(fields, None) for fields in group]) for group in line["groups"])


def to_json(rollout: Rollout) -> dict:
  """Returns the fields of a rollout as JSON values, without its task and `sampled`."""
  fields = dataclasses.asdict(dataclasses.replace(rollout, task=None, sampled=None))
  feedback = rollout.feedback
  fields["feedback"] = [feedback.reward, feedback.text, feedback.status.value]
  return fields


def from_json(fields: dict, task: Task | None) -> Rollout:
  """Returns the rollout of which to_json made these fields."""
  reward, text, status = fields["feedback"]
  feedback = Feedback(reward, text, Status(status))
  return Rollout(**fields | {"task": task, "feedback": feedback})
