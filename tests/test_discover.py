"""Tests test-time self-distillation.

Accounting, stopping, history, estimators and resuming are tested by themselves; then the whole mode
on a toy model.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from sdpo_jax import checkpoint, main, session, stats, workdir
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.conversation import Continuation, converse
from sdpo_jax.discover import arms, difficulty, replay, results, solver
from sdpo_jax.discover.arms import solve_by_learning, solve_by_sampling, solve_by_turns
from sdpo_jax.discover.budget import Budget
from sdpo_jax.discover.difficulty import calibrate
from sdpo_jax.discover.replay import AttemptLog
from sdpo_jax.discover.results import compare, summarise
from sdpo_jax.discover.turns import make_history, with_feedback
from sdpo_jax.errors import RunError
from sdpo_jax.records import Feedback, Rollout, Status, Task
from sdpo_jax.rollout import Collector
from tests import fakes

ROOT = pathlib.Path(__file__).parent.parent
TASK = Task("q", "question")


def attempt(right, tokens=3, status=Status.SCORED, text="no", task=TASK):
  return Rollout(
    task,
    [1, 2],
    [0] * tokens,
    [-0.1] * tokens,
    "stop",
    "tried",
    Feedback(float(right), "" if right else text, status),
  )


def scripted(outcomes, size):
  """Returns a collect(...) that hands out the outcomes in batches of `size`."""
  return lambda params, batches: [
    [attempt(x) for x in outcomes[first : first + size]] for _, first in batches
  ]


def reading(segment_CPT):
  return types.SimpleNamespace(rows=types.SimpleNamespace(segment_CPT=segment_CPT))


def learn(outcomes, limit, size=4, tokens=None):
  updates = []
  budget = Budget(limit, tokens)
  batch = types.SimpleNamespace(
    batch=types.SimpleNamespace(
      readings=[reading(np.array([[[1, 1, 1, 2, 2, 2, 2, 0]]]))],
    )
  )
  solve_by_learning(
    TASK,
    budget,
    fresh_state=lambda: types.SimpleNamespace(params=None),
    collect=scripted(outcomes, size),
    make_batch=lambda groups, i: batch,
    step=lambda state, b: updates.append(1) or state,
  )
  return budget, len(updates)


def test_learning_stops_at_the_first_success():
  budget, updates = learn([0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0], limit=12)
  assert budget.record() == {
    "first_success": 6,
    "first_success_tokens": 18,
    "response": "tried",
    "attempts": 8,
    "successes": 2,
    "env_failed": 0,
    "tokens": 24,
    "teacher_tokens": 7,
  }
  assert updates == 1


def test_learning_stops_at_the_budget_without_a_last_useless_update():
  budget, updates = learn([0] * 12, limit=12)
  assert not budget.solved and budget.attempts == 12 and updates == 2
  budget, updates = learn([0] * 12, limit=12, tokens=20)
  # the 7th began below the limit
  assert not budget.solved and budget.attempts == 7 and budget.tokens == 21 and updates == 1


FAILED = attempt(1, status=Status.ENV_FAILED)


def test_what_could_not_be_judged_is_neither_success_nor_failure():
  budget = Budget(4)
  budget.count([FAILED, attempt(0)])
  assert (
    not budget.solved
    and budget.attempts_left == 3
    and (budget.sampled, budget.attempts, budget.env_failed, budget.tokens) == (2, 1, 1, 3)
  )


def test_a_broken_sandbox_ends_the_run_and_no_update_is_made_without_a_verdict():
  budget, first_attempts, updates = Budget(8, max_failed_batches=2), [], []

  def broken(params, batches):
    first_attempts.append(batches[0][1])
    return [[FAILED] * 4 if len(first_attempts) != 2 else [FAILED, attempt(0)] * 2]

  step = lambda state, b: updates.append(1) or state
  batch = types.SimpleNamespace(
    batch=types.SimpleNamespace(readings=[reading(np.zeros((1, 1, 1)))])
  )
  with pytest.raises(RunError, match="in 2 batches in a row"):
    solve_by_learning(
      TASK,
      budget,
      fresh_state=lambda: types.SimpleNamespace(params=None),
      collect=broken,
      make_batch=lambda groups, i: batch,
      step=step,
    )
  assert first_attempts == [0, 4, 8, 12] and updates == [1]
  assert (budget.attempts, budget.env_failed) == (2, 14)
  with pytest.raises(RunError):
    calibrate(TASK, below=0.03, attempts=64, collect=lambda n: [FAILED])


@pytest.mark.parametrize("together", [1, 2, 5])
def test_sampling_spends_everything_whatever_is_sampled_together(together):
  budget = Budget(6)
  solve_by_sampling(
    TASK,
    budget,
    params=None,
    collect=scripted([0, 0, 1, 0, 1, 1, 1, 1], 4),
    rollouts=4,
    together=together,
  )
  assert (
    budget.record()["successes"] == 3
    and budget.at_first_success["first_success"] == 3
    and budget.attempts == 6
    and not budget.attempts_left
  )


@pytest.mark.parametrize("together", [1, 4])
def test_a_limit_of_tokens_counts_the_same_whatever_is_sampled_together(together):
  budget, outcomes = Budget(64, tokens=16), [0, 0, 1, 0, 1, 1, 1, 1] * 8
  solve_by_sampling(
    TASK, budget, params=None, collect=scripted(outcomes, 4), rollouts=4, together=together
  )
  assert (budget.attempts, budget.tokens, budget.successes) == (6, 18, 3)
  assert budget.at_first_success["first_success"] == 3


def messages_of(task):
  return [{"role": "user", "content": task.prompt}]


def solve_in_turns(chat, continuation, limit):
  """Solves TASK at the fourth attempt; returns the prompts as text, and the history."""
  budget, seen = Budget(4), []
  history = make_history(TASK, messages_of, chat, continuation, limit)

  def collect(params, batches, prompts):
    ((task, first),) = batches
    assert task == TASK  # a judge reads the question alone
    seen.append(prompts[0])
    response = attempt(first == 3, text=f"F{first}")
    return [[dataclasses.replace(response, tokens=chat.text_tokens(f"A{first}"))]]

  solve_by_turns(TASK, budget, params=None, collect=collect, history=history)
  assert budget.at_first_success["first_success"] == 4
  assert all(len(prompt) <= limit for prompt in seen)
  return [chat.plain_text(prompt) for prompt in seen], history


def test_turns_show_feedback_newest_last_and_drop_the_oldest():
  chat = Chat(fakes.ByteTokenizer())
  turns = [attempt(0, text=f"F{i}") for i in range(3)]
  prompts = [with_feedback(TASK, turns[i:j]) for i, j in ((0, 0), (0, 1), (0, 2), (1, 3))]
  want = [chat.prompt_tokens(messages_of(task)) for task in prompts]
  seen, history = solve_in_turns(chat, None, len(want[2]))
  assert seen == [chat.plain_text(prompt) for prompt in want]
  assert "A0" not in seen[1] and history.rendered_again == 0


@pytest.mark.parametrize("is_cut", [True, False])
def test_attempts_are_turns_of_the_policy_where_asked_for(is_cut):
  """As ids where the template can be cut, else rendered anew, which is counted."""
  chat = Chat(fakes.ByteTokenizer())
  continuation = Continuation(chat)
  assert continuation.finding.way == "exact"
  if not is_cut:
    continuation.glue = None
  two = converse(continuation, messages_of(TASK), [attempt(0, text=f"F{i}") for i in (1, 2)])
  seen, history = solve_in_turns(chat, continuation, len(two.prompt) + 8)
  for text, turns in zip(seen, ((), (0,), (0, 1), (1, 2)), strict=True):
    parts = [part for turn in turns for part in (f"A{turn}<|im_end|>", f"F{turn}")]
    places = [text.index(part) for part in ("question", *parts)]
    assert places == sorted(places) and text.count("<|im_end|>") == 1 + 2 * len(turns)
  assert history.rendered_again == (0 if is_cut else 3)


def test_calibration_is_unbiased_to_the_end_and_stops_where_nothing_can_help():
  outcomes = [0] * 100 + [1] + [0] * 1000
  ask = lambda n: [attempt(x) for x in outcomes[n : n + 64]]
  assert calibrate(TASK, below=0.03, attempts=512, collect=ask) == {
    "task_id": "q",
    "attempts": 128,
    "successes": 1,
    "pass@64": 0.5,
    "used": False,
  }
  assert calibrate(TASK, below=0.2, attempts=512, collect=ask) == {
    "task_id": "q",
    "attempts": 512,
    "successes": 1,
    "pass@64": 64 / 512,
    "used": True,
  }


def test_a_solution_keeps_its_own_probability_where_packs_reorder_the_rows():
  rollouts = [dataclasses.replace(attempt(1), tokens=[i]) for i in range(5)]

  def make_batch(groups):
    rows = groups[0][::-1]
    weight_BR = np.array([[1.0, 0.0]] * len(rows))
    return types.SimpleNamespace(
      rollouts=rows, batch=types.SimpleNamespace(rows=rows, weight_BR=weight_BR)
    )

  score = lambda batch: np.array([[-float(r.tokens[0]), -100.0] for r in batch.rows])
  np.testing.assert_array_equal(
    difficulty.make_logp(score, make_batch, 4)(rollouts), [-0.0, -1.0, -2.0, -3.0, -4.0]
  )


def run_line(arm, q, s, first, attempts=8, successes=None, per_attempt=10, teacher=5):
  tokens = (attempts if arm == "best_of_k" or first is None else first) * per_attempt
  return {
    "arm": arm,
    "task_id": q,
    "seed": s,
    "first_success": first,
    "first_success_tokens": None if first is None else first * per_attempt,
    "successes": int(first is not None) if successes is None else successes,
    "attempts": attempts,
    "tokens": tokens,
    "teacher_tokens": teacher,
    "time_s": 1.0,
  }


def test_summary_counts_unsolved_runs_as_not_found_and_best_of_k_without_bias():
  learned = [
    run_line("sdpo", q, s, f) for q, s, f in (("a", 0, 3), ("a", 1, None), ("b", 0, 1), ("b", 1, 8))
  ]
  sampled = [
    run_line("best_of_k", q, 0, f, successes=c) for q, f, c in (("a", 2, 2), ("b", None, 0))
  ]
  summary = summarise(learned + sampled, 8, difficulty={"a": 0.01, "b": 0.2})
  at = {
    arm: {int(k): x["mean"] for k, x in r["discovery"].items()}
    for arm, r in summary["arms"].items()
  }
  assert at["sdpo"] == {1: 0.25, 2: 0.25, 4: 0.5, 8: 0.75}
  assert at["best_of_k"] == {k: pytest.approx(stats.pass_at_k(8, 2, k) / 2) for k in (1, 2, 4, 8)}
  assert summary["arms"]["sdpo"]["solved"] == 3 and json.loads(json.dumps(summary)) == summary
  assert summary["arms"]["sdpo"]["discovery_by_difficulty"]["very hard"]["8"]["mean"] == 0.5
  assert summary["arms"]["sdpo"]["discovery_by_difficulty"]["hard"]["8"]["mean"] == 1.0
  assert summary["arms"]["sdpo"]["discovery_kaplan_meier"] == {
    k: pytest.approx(x["mean"]) for k, x in summary["arms"]["sdpo"]["discovery"].items()
  }
  means = {
    arm: (r["mean_attempts"], r["mean_tokens"], r["env_failed"])
    for arm, r in summary["arms"].items()
  }
  # (3 + 8 + 1 + 8) / 4 and (2 + 8) / 2 attempts, 10 tokens each
  assert means == {"sdpo": (5.0, 50.0, None), "best_of_k": (5.0, 50.0, None)}
  printed = [line.split() for line in results.summary_lines(summary)]
  assert ["runs", "solved", "by", "question", "base", "pass@64", "sdpo", "best_of_k"] in printed
  assert ["a", "0.010", "1/2", "1/1"] in printed
  assert ["discovery@8,", "very", "hard:", "50.0%,", "1", "questions"] in printed


def test_runs_whose_tokens_were_spent_are_said_to_have_ended_early():
  summary = summarise(
    [
      run_line("sdpo", "a", s, f, attempts=n)
      for s, (f, n) in enumerate(((None, 2), (4, 8), (None, 8), (6, 8)))
    ],
    8,
  )
  arm = summary["arms"]["sdpo"]
  assert (
    arm["ended_early"] == 1
    and arm["discovery"]["8"]["mean"] == 0.5
    and arm["discovery_kaplan_meier"]["8"] == pytest.approx(2 / 3)
  )
  assert any(
    "1 unsolved runs ended before attempt 8" in line and line.endswith("is 66.7%")
    for line in results.summary_lines(summary)
  )


def test_attempts_and_tokens_to_reach_the_baseline_by_hand():
  learned = [
    run_line("sdpo", q, s, f, attempts=90)
    for q, fs in (("a", (4, 20)), ("b", (None, 60)))
    for s, f in enumerate(fs)
  ]
  sampled = [
    run_line("best_of_k", q, s, f, attempts=90)
    for q, fs in (("a", (50, None)), ("b", (None, None)))
    for s, f in enumerate(fs)
  ]
  comparison = compare(learned + sampled, 90, level=0.9)
  assert comparison["target"] == 0.25
  assert comparison["attempts"]["to_reach"] == 4 and comparison["tokens"]["to_reach"] == 40
  assert (
    comparison["tokens_with_teacher"]["to_reach"] == 45 and comparison["baseline_tokens"] == 900
  )
  # Draws of questions: both a -> best_of_k finds 1/2, sdpo needs 4; one of each -> 4; both b ->
  # nothing is found, 0 are needed.
  assert comparison["attempts"]["low"] == 0 and comparison["attempts"]["high"] == 4
  assert comparison["difference_at_a_third"]["difference"] == pytest.approx(2 / 4 - 1 / 4)
  never = compare([run_line("sdpo", "a", 0, None), run_line("best_of_k", "a", 0, 3)], 8, level=0.9)
  assert never["attempts"] == {"to_reach": None, "low": None, "high": None}


def test_intervals_cover_in_this_very_design():
  """20 questions x 5 seeds, nominal 90 %; very unlike difficulties, seeds nested in questions."""
  rng, trials, budget = np.random.default_rng(0), 400, 256
  # Mean success probability of one attempt, the first like a baseline that finds little. The
  # spread over questions is log-uniform.
  for rate in (0.0003, 0.002, 0.01):
    expected = np.mean(
      [np.mean(1 - (1 - rate * np.exp(rng.uniform(-1.5, 1.5, 2000))) ** budget) for _ in range(10)]
    )
    hits = 0
    for trial in range(trials):
      true_Q = rate * np.exp(rng.uniform(-1.5, 1.5, 20))
      first_QS = rng.geometric(true_Q[:, None], (20, 5))
      score_Q = (first_QS <= budget).mean(1)
      interval = stats.mean_interval(score_Q, level=0.9, seed=trial)
      hits += interval.low <= expected <= interval.high
    assert 0.86 <= hits / trials <= 0.96, (rate, hits / trials)


def test_a_line_cut_short_by_a_kill_is_removed_and_its_run_repeated(tmp_path):
  (tmp_path / "discover.jsonl").write_text('{"arm": "sdpo"}\n{"arm": "be')
  assert workdir.read_lines(tmp_path / "discover.jsonl") == [{"arm": "sdpo"}]
  assert (tmp_path / "discover.jsonl").read_text() == '{"arm": "sdpo"}\n'


def test_batches_on_disk_are_not_sampled_again(tmp_path):
  path, run, calls = tmp_path / "attempts" / "00000.jsonl", ["sdpo", "q", 0], []

  def collect(params, batches, prompts):
    calls.append(batches)
    return [[attempt(0, text="{}\n\u2028\\"), attempt(1)] for _ in batches]

  first = AttemptLog(path, run)
  first.begun -= 100.0
  original = first.read_or_collect(collect, None, [(TASK, 0)])
  again = AttemptLog(path, run)
  assert again.read_or_collect(collect, None, [(TASK, 0)]) == original and len(calls) == 1
  again.read_or_collect(collect, None, [(TASK, 2)])
  assert len(calls) == 2 and again.time_s >= 100.0  # what the earlier session spent counts
  again.read_or_collect(lambda *_: [[FAILED]], None, [(TASK, 4)])
  repaired = AttemptLog(path, run)  # what a broken sandbox left behind is asked again
  assert [line["first"] for line in repaired.stored] == [[0], [2]]
  with pytest.raises(AssertionError, match="does not belong"):
    AttemptLog(path, ["sdpo", "q", 1])


@pytest.mark.parametrize(
  "config, override, words",
  [
    (
      "tinycode.py:method=grpo",
      "--config.discover.seeds=1",
      "config.method learns from the reward alone",
    ),
    ("discover.py:local", "--config.train.updates_per_batch=2", "config.train.updates_per_batch=2"),
    ("discover.py:local", "--config.discover.indices=(3,-1)", "config.discover.indices=(3, -1)"),
    (
      "discover.py:local",
      "--config.discover.arms=('counterfactual',) --config.method.counterfactual.name=notes",
      "config.method.counterfactual.sources holds 'samples'",
    ),
    (
      "discover.py:local",
      "--config.discover.arms=('counterfactual',) --config.method.counterfactual.name=notes "
      "--config.method.counterfactual.sources=('siblings','model') "
      "--config.method.counterfactual.model=tiny_arithmetic",
      "config.method.counterfactual.sources holds 'model'",
    ),
    (
      "discover.py:local",
      "--config.discover.parallel=3",
      "config.discover.parallel=3 must divide the 8 devices",
    ),
    (
      "tinycode.py:local",
      "--config.mesh.tensor=2",
      "config.mesh.tensor=2 does not divide vocab=707 of the model",
    ),
    (
      "tinycode.py:local",
      "--config.mesh.fsdp=2 --config.mesh.data=4 --config.train.loss_implementation=reference",
      "loss_implementation='reference' is for one device",
    ),
    (
      "discover.py:local",
      "--config.mesh.fsdp=4 --config.discover.parallel=2 --config.train.micro_batches=4",
      "do not divide into 16 packs",
    ),
    (
      "discover.py:task=livecodebench,local",
      "--config.discover.indices=(0,99) --config.rollout.rows=8",
      "config.discover.indices=(0, 99): split",
    ),
  ],
)
def test_what_cannot_run_says_so_in_one_line(config, override, words, tmp_path, capsys):
  assert (
    main.main(
      [
        "main",
        "--mode=discover",
        f"--config={ROOT}/configs/{config}",
        *override.split(),
        f"--workdir={tmp_path}",
      ]
    )
    == 2
  )
  message = capsys.readouterr().err.strip()
  assert words in message and "\n" not in message


LOCAL = [
  "--mode=discover",
  f"--config={ROOT}/configs/discover.py:local",
  "--config.discover.below_pass_at_64=1.0",
]


def repeatable(workdir):
  """The finished runs without their times, in one order."""
  lines = (
    [json.loads(line) for line in (workdir / "discover.jsonl").read_text().splitlines()]
    if (workdir / "discover.jsonl").exists()
    else []
  )
  return sorted(
    ({k: v for k, v in line.items() if k != "time_s"} for line in lines),
    key=lambda line: (line["arm"], line["task_id"], line["seed"]),
  )


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
  """Sessions of this file compile the same programs: the later ones read them."""
  settings = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.2,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted session over two questions and all arms, one run after another."""
  workdir = tmp_path_factory.mktemp("whole")
  assert (
    main.main(["main", *LOCAL, "--config.discover.indices=(37,6)", f"--workdir={workdir}"]) == 0
  )
  return workdir


def test_a_session_leaves_everything_that_was_promised(whole, capsys):
  workdir, summary = whole, json.loads((whole / "discover.json").read_text())
  assert len(repeatable(workdir)) == 6 and set(summary["arms"]) == set(arms.ARMS) - {
    "counterfactual"
  }
  assert (workdir / "discover.png").stat().st_size > 10_000 and not (workdir / "attempts").exists()
  learned = [line for line in repeatable(workdir) if line["arm"] == "sdpo"]
  # there was an update
  assert all(
    line["teacher_tokens"] > 0 and line["skipped_updates"] == 0
    for line in learned
    if line["attempts"] > 8
  )
  before = {path.name: path.read_bytes() for path in workdir.iterdir()}
  # finished: nothing changes, and it says the same
  assert (
    main.main(["main", *LOCAL, "--config.discover.indices=(37,6)", f"--workdir={workdir}"]) == 0
  )
  assert capsys.readouterr().out == (workdir / "discover.txt").read_text()
  assert {path.name: path.read_bytes() for path in workdir.iterdir()} == before


def interrupt(monkeypatch, batches_before):
  """Makes the session end by an interrupt when it samples one batch more than `batches_before`."""
  original, calls = replay.AttemptLog.read_or_collect, []

  def read_or_cut(self, collect, params, batches, prompts=None):
    def counted(params, batches_to_sample, prompts):
      calls.append(batches_to_sample)
      if len(calls) == batches_before + 1:
        raise KeyboardInterrupt
      return collect(params, batches_to_sample, prompts)

    return original(self, counted, params, batches, prompts)

  monkeypatch.setattr(replay.AttemptLog, "read_or_collect", read_or_cut)


@pytest.mark.parametrize("way", ["exact", "kept"])
def test_a_conversation_goes_on_with_the_ids_that_were_sampled(way, tmp_path, monkeypatch, caplog):
  sampled, original, load = [], Collector.collect, session.load_tokenizer

  def load_tokenizer(path):
    tokenizer = load(path)
    if way == "kept":  # a template that strips white space
      template = tokenizer.chat_template
      tokenizer.chat_template = template.replace("message['content']", "message['content'] | trim")
    return tokenizer

  monkeypatch.setattr(session, "load_tokenizer", load_tokenizer)

  def collect(self, *arguments, **settings):
    groups = original(self, *arguments, **settings)
    sampled.extend(rollout for group in groups for rollout in group)
    return groups

  monkeypatch.setattr(Collector, "collect", collect)
  arguments = [
    "--config.discover.arms=('multi_turn',)",
    "--config.discover.history=attempt_and_feedback",
    "--config.discover.attempts=4",
    "--config.discover.indices=(37,)",
    "--config.data.max_prompt_tokens=512",
    f"--workdir={tmp_path}",
  ]
  assert main.main(["main", *LOCAL, *arguments]) == 0
  finding = json.loads((tmp_path / "run.json").read_text())["conversations"]
  assert finding["way"] == way and bool(finding["reason"]) == (way == "kept")
  assert caplog.text.count("conversations: the chat template of ") == (way == "kept")
  assert finding["reason"] in caplog.text
  assert len(sampled) == 4 and [line["rendered_again"] for line in repeatable(tmp_path)] == [0]
  for before, after in zip(sampled, sampled[1:]):
    fed = before.prompt_tokens + before.tokens
    assert after.prompt_tokens[: len(fed)] == fed and len(after.prompt_tokens) > len(fed) + 10


def test_an_interrupt_in_mid_question_changes_nothing(whole, tmp_path, monkeypatch):
  """Nothing leaks from one question to the next, or to the one beside it.

  The session has the other order of the questions, and goes on with two of them at a time.
  """
  arguments = [
    "main",
    *LOCAL,
    "--config.discover.indices=(6,37)",
    "--config.discover.arms=('sdpo','best_of_k')",
    f"--workdir={tmp_path}",
  ]
  with monkeypatch.context() as m:
    # the first question's learning has made one of its two batches, and an update
    interrupt(m, 1)
    with pytest.raises(KeyboardInterrupt):
      main.main(arguments)
  (begun,) = (tmp_path / "attempts").iterdir()
  # what is begun belongs to its settings
  assert main.main([*arguments, "--config.optimizer.lr=1.0"]) == 2
  assert (
    len(begun.read_text().splitlines()) == 1
    and not repeatable(tmp_path)
    and not (tmp_path / "discover.json").exists()
  )
  devices, both, original = set(), threading.Barrier(2), solver.Solver.solve

  def solve(self, run, *rest):
    if run.arm == "sdpo":
      devices.add(jax.tree.leaves(self.session.params)[0].device)
      both.wait(timeout=300)  # neither question learns before the other does
    return original(self, run, *rest)

  monkeypatch.setattr(solver.Solver, "solve", solve)
  assert main.main([*arguments, "--config.discover.parallel=2"]) == 0
  assert (
    repeatable(tmp_path) == [line for line in repeatable(whole) if line["arm"] != "multi_turn"]
    and len(devices) == 2
  )


def test_a_warm_start_begins_where_the_question_before_ended(whole, tmp_path, monkeypatch):
  starts, original = [], solver.Solver.solve
  monkeypatch.setattr(
    solver.Solver,
    "solve",
    lambda self, run, log, start=None: starts.append(start) or original(self, run, log, start),
  )
  assert (
    main.main(
      [
        "main",
        *LOCAL,
        "--config.discover.indices=(37,6)",
        "--config.discover.warm_start=True",
        "--config.discover.arms=('sdpo',)",
        f"--workdir={tmp_path}",
      ]
    )
    == 0
  )
  # what the first question's run left
  kept = checkpoint.restore_params(tmp_path / "warm" / "sdpo_seed_0", starts[1], step=1)
  assert starts[0] is None
  for begun_with, left_behind in zip(*map(jax.tree.leaves, (starts[1], kept)), strict=True):
    assert (np.asarray(begun_with) == np.asarray(left_behind)).all()
  cold, warm = (
    {line["task_id"]: line for line in repeatable(workdir) if line["arm"] == "sdpo"}
    for workdir in (whole, tmp_path)
  )
  one, other = (next(q for q in cold if q.endswith(end)) for end in ("/37", "/6"))
  assert warm[one] == cold[one] and warm[other] != cold[other]


@pytest.mark.slow
def test_counterfactual_tells_what_the_other_attempts_received(whole, tmp_path, monkeypatch):
  read, original = [], solver.Solver.learning_batch
  monkeypatch.setattr(
    solver.Solver, "learning_batch", lambda self, *a: read.append(original(self, *a)) or read[-1]
  )
  assert (
    main.main(
      [
        "main",
        *LOCAL,
        "--config.discover.indices=(37,6)",
        "--config.discover.arms=('counterfactual','sdpo')",
        f"--workdir={tmp_path}",
      ]
    )
    == 0
  )
  lines = {
    arm: [line for line in repeatable(tmp_path) if line["arm"] == arm]
    for arm in ("counterfactual", "sdpo")
  }
  # its part is not sdpo's
  assert lines["sdpo"] == [line for line in repeatable(whole) if line["arm"] == "sdpo"]
  with_notes = [packed for packed in read if packed.contexts[1:]]
  assert with_notes and any(
    "would have" in c.notes
    for packed in with_notes
    for row in packed.contexts[1:]
    for c in row
    if c is not None
  )
  updated = [
    (line, plain)
    for line, plain in zip(lines["counterfactual"], lines["sdpo"])
    if plain["attempts"] > 8
  ]
  assert updated and all(
    line["task_id"] == plain["task_id"] and line["teacher_tokens"] > plain["teacher_tokens"]
    for line, plain in updated
  )


@pytest.mark.slow
def test_questions_side_by_side_on_meshes_of_two_equal_one_after_the_other(tmp_path):
  """Two devices hold one question's weights in parts; four hold two questions."""
  for devices in (2, 4):
    command = [
      sys.executable,
      "-m",
      "sdpo_jax.main",
      *LOCAL,
      "--config.discover.indices=(37,6)",
      "--config.discover.arms=('sdpo',)",
      "--config.mesh.fsdp=2",
      f"--config.discover.parallel={devices // 2}",
      f"--workdir={tmp_path / str(devices)}",
    ]
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    done = subprocess.run(command, cwd=ROOT, env=env, timeout=900, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
  assert repeatable(tmp_path / "4") == repeatable(tmp_path / "2")


@pytest.mark.slow
def test_killed_and_resumed(whole, tmp_path):
  command = [
    sys.executable,
    "-m",
    "sdpo_jax.main",
    *LOCAL,
    "--config.discover.indices=(37,6)",
    f"--workdir={tmp_path}",
  ]
  options = dict(
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  process = subprocess.Popen(command, start_new_session=True, **options)
  attempts, deadline = tmp_path / "attempts" / "00000.jsonl", time.monotonic() + 300
  # in mid-question: a batch is done
  while (
    not (attempts.exists() and attempts.stat().st_size)
    and process.poll() is None
    and time.monotonic() < deadline
  ):
    time.sleep(0.005)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert subprocess.run(command, timeout=600, **options).returncode == 0
  assert repeatable(tmp_path) == repeatable(whole)
