"""How seldom the base model solves a question."""

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
  task: Task, *, below: float, attempts: int, collect: Callable, env_failures: int = 3
) -> dict[str, Any]:
  """Base attempts on one candidate; ends early once it is too easy even if all that would come failed, when its pass@64 is a rough figure."""
  budget = Budget(attempts, env_failures=env_failures)
  while budget.left:
    budget.count(collect(budget.asked))
    if stats.pass_at_k(attempts, budget.successes, 64) >= below:
      break
  n, c = budget.attempts, budget.successes
  pass_at_64 = stats.pass_at_k(n, c, min(64, n))
  return {
    "task_id": task.id,
    "attempts": n,
    "successes": c,
    "pass@64": pass_at_64,
    "used": n >= attempts and pass_at_64 < below,
  }


def exact_difficulty(
  task: Task, programs: list[str], *, below: float, prompt: list[int], chat, logp: Callable
) -> dict[str, Any]:
  """From the probability of the known solutions: a lower bound, in which solutions of another form are missing. logp([rollout]) -> nats each."""
  rows = [
    Rollout(task, prompt, tokens, [0.0] * len(tokens), "stop", text, Feedback(1.0, ""))
    for text in programs
    for tokens in [chat.text_tokens(text) + [chat.stop_tokens[0]]]
  ]
  p = min(float(np.exp(logp(rows)).sum()), 1.0)
  pass_at_64 = 1.0 - (1.0 - p) ** 64
  return {
    "task_id": task.id,
    "pass@1": p,
    "solutions": len(rows),
    "pass@64": pass_at_64,
    "used": pass_at_64 < below,
  }


def make_logp(score: Callable, make_batch: Callable, rows: int) -> Callable:
  """-> logp([rollout]) -> log-probability of each whole response, in batches of one shape. score(batch) -> logp_BR."""

  def logp(rollouts: list[Rollout]) -> np.ndarray:
    said = {}
    for first in range(0, len(rollouts), rows):
      part = rollouts[first : first + rows]
      packed = make_batch([part + part[:1] * (rows - len(part))])
      logp_B = np.where(packed.batch.weight_BR > 0, np.asarray(score(packed.batch)), 0.0).sum(1)
      # packs have their rows in an order of their own
      said |= dict(zip(map(id, packed.rollouts), logp_B))
    return np.array([said[id(r)] for r in rollouts])

  return logp


def choose_hard(candidates: list[Task], d, workdir: pathlib.Path, measure: Callable) -> list[Task]:
  """The first `d.questions` candidates that measure(task) finds hard enough."""
  known = {line["task_id"]: line for line in read_lines(workdir / "difficulty.jsonl")}
  chosen = []
  with open(workdir / "difficulty.jsonl", "a", encoding="utf-8") as log:
    for task in candidates:
      if len(chosen) == d.questions:
        break
      if task.id not in known:
        known[task.id] = measure(task)
        log.write(json.dumps(known[task.id]) + "\n")
        log.flush()
      if known[task.id]["used"]:
        chosen.append(task)
  with blame_settings():
    if not chosen:
      raise ValueError(
        f"config.discover.below_pass_at_64={d.below_pass_at_64}: none of {len(candidates)} candidates is as hard as that"
      )
  return chosen
