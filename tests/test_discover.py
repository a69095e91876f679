"""Test-time self-distillation: accounting, stopping, history, estimators; and the whole mode, tiny."""

import json
import types

import numpy as np
import pytest

from sdpo_jax import discover, stats
from sdpo_jax.discover import Budget, prompt_with, solve_by_learning, solve_by_sampling, solve_by_turns, summarise
from sdpo_jax.records import Feedback, Status, Task

TASK = Task("q", "question")


def attempt(right, tokens=3, status=Status.SCORED, text="no"):
  return types.SimpleNamespace(tokens=[0] * tokens, feedback=Feedback(float(right), "" if right else text, status))


def scripted(outcomes, size):
  """collect(...) that hands out the outcomes in batches of `size`."""
  pending = list(outcomes)

  def collect(params, task, attempts):
    assert attempts == len(outcomes) - len(pending)
    batch, pending[:] = pending[:size], pending[size:]
    return [[attempt(x) for x in batch]]

  return collect


def learn(outcomes, limit, size=4):
  updates = []
  budget = Budget(limit)
  batch = types.SimpleNamespace(batch=types.SimpleNamespace(teacher=types.SimpleNamespace(segment_CPT=np.array([[[1, 1, 1, 1], [2, 2, 2, 0]]]))))
  solve_by_learning(TASK, budget, fresh=lambda: types.SimpleNamespace(params=None), collect=scripted(outcomes, size), make_batch=lambda groups: batch,
                    step=lambda state, b: (updates.append(1) or state, {}))
  return budget, len(updates)


def test_learning_stops_at_the_first_success():
  budget, updates = learn([0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0], limit=12)
  assert budget.record() == {"first_success": 6, "attempts": 8, "tokens": 24, "teacher_tokens": 7} and updates == 1


def test_learning_stops_at_the_budget_without_a_last_useless_update():
  budget, updates = learn([0] * 12, limit=12)
  assert budget.first_success is None and budget.attempts == 12 and updates == 2


def test_a_judge_that_failed_is_no_success():
  budget = Budget(4)
  budget.count([attempt(1, status=Status.ENV_FAILED), attempt(0)])
  assert budget.first_success is None and budget.attempts == 2


def test_sampling_spends_everything_and_counts_successes():
  budget = Budget(6)
  assert solve_by_sampling(TASK, budget, params=None, collect=scripted([0, 0, 1, 0, 1, 1], 4)) == {"successes": 3}
  assert budget.first_success == 3 and budget.spent


def test_turns_show_feedback_newest_last_and_drop_the_oldest():
  budget, seen = Budget(4), []

  def collect_one(params, task, attempts):
    seen.append(task.prompt)
    return attempt(attempts == 3, text=f"F{attempts}")

  solve_by_turns(TASK, budget, params=None, collect_one=collect_one, fits=lambda t: t.prompt.count("F") <= 2)
  assert budget.first_success == 4 and seen[0] == "question"
  assert seen[1] == prompt_with(TASK, ["F0"]).prompt and seen[3] == prompt_with(TASK, ["F1", "F2"]).prompt


def test_summary_counts_unsolved_runs_as_not_found_and_best_of_k_without_bias():
  learned = [{"arm": "sdpo", "task_id": q, "seed": s, "first_success": f, "attempts": 8, "tokens": 10, "teacher_tokens": 5, "time_s": 1.0}
             for q, s, f in (("a", 0, 3), ("a", 1, None), ("b", 0, 1), ("b", 1, 8))]
  sampled = [{"arm": "best_of_k", "task_id": q, "seed": 0, "first_success": f, "successes": c, "attempts": 8, "tokens": 10, "teacher_tokens": 0, "time_s": 1.0}
             for q, f, c in (("a", 2, 2), ("b", None, 0))]
  summary = summarise(learned + sampled, 8)
  at = {arm: {int(k): x["mean"] for k, x in r["discovery"].items()} for arm, r in summary["arms"].items()}
  assert at["sdpo"] == {1: 0.25, 2: 0.25, 4: 0.5, 8: 0.75}
  assert at["best_of_k"] == {k: pytest.approx(stats.pass_at_k(8, 2, k) / 2) for k in (1, 2, 4, 8)}
  assert summary["arms"]["sdpo"]["solved"] == 3 and json.loads(json.dumps(summary)) == summary


def test_a_line_cut_short_by_a_kill_is_removed_and_its_run_repeated(tmp_path):
  (tmp_path / "discover.jsonl").write_text('{"arm": "sdpo"}\n{"arm": "be')
  assert discover.read_lines(tmp_path) == [{"arm": "sdpo"}]
  assert (tmp_path / "discover.jsonl").read_text() == '{"arm": "sdpo"}\n'
