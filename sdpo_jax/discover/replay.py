"""Attempts on disk, read again before new ones are drawn."""

import dataclasses
import json
import pathlib
import time
from typing import Callable

from sdpo_jax.discover.budget import any_judged
from sdpo_jax.records import Feedback, Rollout, Status, Task
from sdpo_jax.workdir import read_lines, write_atomically


class Attempts:
  """The judged batches of one run, on disk: what a killed session has sampled and judged is read back, not done again."""

  def __init__(self, path: pathlib.Path, run: list):
    self.path, self.run, self.stored = path, run, read_lines(path)
    assert all(line["run"] == run for line in self.stored), (
      f"{path} does not belong to the run {run}"
    )
    while self.stored and not any_judged(
      [from_json(r, None) for group in self.stored[-1]["groups"] for r in group]
    ):
      self.stored.pop()  # the sandbox that broke there may work now
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.stored))
    self.begun = time.monotonic() - (self.stored[-1]["time_s"] if self.stored else 0.0)

  @property
  def time_s(self) -> float:
    """Since the run began; of earlier sessions, what the batches on disk took."""
    return round(time.monotonic() - self.begun, 3)

  def around(self, collect: Callable) -> Callable:
    """collect(params, [(task, first attempt)]) -> groups, those on disk first."""

    def collect_or_read(params, asked):
      if self.stored:
        line = self.stored.pop(0)
        assert line["first"] == [first for _, first in asked], (
          f"{self.path} does not belong to this run"
        )
        return [
          [from_json(r, task) for r in group] for (task, _), group in zip(asked, line["groups"])
        ]
      groups = collect(params, asked)
      line = {
        "run": self.run,
        "first": [first for _, first in asked],
        "time_s": self.time_s,
        "groups": [[to_json(r) for r in g] for g in groups],
      }
      with open(self.path, "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
      return groups

    return collect_or_read


def to_json(r: Rollout) -> dict:
  return dataclasses.asdict(dataclasses.replace(r, task=None)) | {
    "feedback": [r.feedback.reward, r.feedback.text, r.feedback.status.value]
  }


def from_json(line: dict, task: Task | None) -> Rollout:
  reward, text, status = line["feedback"]
  return Rollout(**line | {"task": task, "feedback": Feedback(reward, text, Status(status))})
