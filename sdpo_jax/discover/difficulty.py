"""Measures how seldom the base model solves a question, and chooses the hard ones.

The measure is pass@64 under the base model. It is exact where the environment can list the
solutions of a task (TinyCode): 1 - (1 - p)^64, with p the model's probability of writing one of
them. Elsewhere the base model attempts each candidate config.discover.calibration times. These
attempts have seeds of their own, and count for no arm.

Each candidate is one line of difficulty.jsonl. A resumed session reads those lines and measures
only what is missing.
"""

import json
import pathlib
from typing import Any, Callable

import numpy as np

from sdpo_jax import stats
from sdpo_jax.discover.budget import Budget
from sdpo_jax.errors import blame_settings
from sdpo_jax.records import Feedback, Rollout, Task
from sdpo_jax.workdir import read_lines


def calibrate(
  task: Task, *, below: float, attempts: int, collect: Callable, max_failed_batches: int = 3
) -> dict[str, Any]:
  """Returns a candidate's line of difficulty.jsonl, from attempts of the base model.

  collect(first attempt) -> judged rollouts. It ends early once the candidate is too easy even if
  all further attempts failed; pass@64 is then a rough figure.
  """
  budget = Budget(attempts, max_failed_batches=max_failed_batches)
  while budget.attempts_left:
    budget.count(collect(budget.sampled))
    if stats.pass_at_k(attempts, budget.successes, 64) >= below:
      break
  judged = budget.attempts
  pass_at_64 = stats.pass_at_k(judged, budget.successes, min(64, judged))
  return {
    "task_id": task.id,
    "attempts": judged,
    "successes": budget.successes,
    "pass@64": pass_at_64,
    "used": judged >= attempts and pass_at_64 < below,
  }


def exact_difficulty(
  task: Task, programs: list[str], *, below: float, prompt: list[int], chat, logp: Callable
) -> dict[str, Any]:
  """Returns a candidate's line of difficulty.jsonl, from the probability of its known solutions.

  pass@64 is a lower bound: solutions of another form are missing from it.
  logp([rollout]) -> nats of each whole response.
  """
  rollouts = [_written(task, prompt, program, chat) for program in programs]
  p = min(float(np.exp(logp(rollouts)).sum()), 1.0)
  pass_at_64 = 1.0 - (1.0 - p) ** 64
  return {
    "task_id": task.id,
    "pass@1": p,
    "solutions": len(rollouts),
    "pass@64": pass_at_64,
    "used": pass_at_64 < below,
  }


def _written(task: Task, prompt: list[int], text: str, chat) -> Rollout:
  """Returns the rollout in which a model has written just this text."""
  tokens = chat.text_tokens(text) + [chat.stop_tokens[0]]
  return Rollout(task, prompt, tokens, [0.0] * len(tokens), "stop", text, Feedback(1.0, ""))


def make_logp(score: Callable, make_batch: Callable, rows: int) -> Callable:
  """Returns logp([rollout]) -> log-probability in nats of each whole response.

  score(batch) -> logp_BR. make_batch(groups) -> Packed; it always gets `rows` rollouts, so that
  there is one shape to compile.
  """

  def logp(rollouts: list[Rollout]) -> np.ndarray:
    # Packing reorders the rows, so sums are kept by the identity of their rollout.
    logp_by_id = {}
    for first in range(0, len(rollouts), rows):
      group = rollouts[first : first + rows]
      padding = group[:1] * (rows - len(group))
      packed = make_batch([group + padding])
      logp_BR = np.asarray(score(packed.batch))
      logp_B = np.where(packed.batch.weight_BR > 0, logp_BR, 0.0).sum(1)
      logp_by_id.update(zip(map(id, packed.rollouts), logp_B, strict=True))
    return np.array([logp_by_id[id(rollout)] for rollout in rollouts])

  return logp


def choose_hard(candidates: list[Task], d, workdir: pathlib.Path, measure: Callable) -> list[Task]:
  """Returns the first `d.questions` candidates that measure(task) declares hard enough.

  d: config.discover. measure(task) -> the task's line of difficulty.jsonl.
  Raises SettingError if none is hard enough.
  """
  path = workdir / "difficulty.jsonl"
  measured = {line["task_id"]: line for line in read_lines(path)}
  chosen = []
  with open(path, "a", encoding="utf-8") as file:
    for task in candidates:
      if len(chosen) == d.questions:
        break
      if task.id not in measured:
        measured[task.id] = measure(task)
        file.write(json.dumps(measured[task.id]) + "\n")
        file.flush()
      if measured[task.id]["used"]:
        chosen.append(task)
  with blame_settings():
    if not chosen:
      raise ValueError(
        f"config.discover.below_pass_at_64={d.below_pass_at_64}: none of {len(candidates)} "
        "candidates is as hard as that"
      )
  return chosen
