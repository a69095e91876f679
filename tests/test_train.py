"""The loop with scripted collaborators: what it calls when, what it writes, when it stops."""

import json
import types

import numpy as np
import pytest

from sdpo_jax import checkpoint, errors, rollout_log, train
from sdpo_jax.data.batch import Packed
from sdpo_jax.data.chat import Chat
from sdpo_jax.objectives.teacher_context import CLOSING, Context
from sdpo_jax.records import Alternative, Feedback, Ratio, Rollout, Status, Task
from tests import fakes

CHAT = Chat(fakes.ByteTokenizer())


def rollout(status=Status.SCORED, text="ab", **extra):
  tokens = CHAT.text_tokens(text) + [257]
  return Rollout(
    Task("t", "question"),
    [1, 2],
    tokens,
    [-1.0] * len(tokens),
    "stop",
    text,
    Feedback(1.0, "well", status),
    **extra,
  )


def run(
  total_steps=3,
  *,
  status=Status.SCORED,
  extra=({}, {}),
  skipped=0,
  start=0,
  tokens=0,
  alternatives=0,
  due=lambda name, i: name != "score",
  gap=0.0,
  stops_at=None,
  unwritten=None,
  lost_at=None,
  lost_in="collect",
  log=None,
):
  log = log or types.SimpleNamespace(written={}, saved=[], rollouts=[], evaluated=[])
  batch = types.SimpleNamespace()

  def step(state, batch):
    return types.SimpleNamespace(
      step=state.step + 1, params=None, skipped_in_a_row=skipped * (state.step + 1)
    ), {"train/loss": Ratio(2.0, 4.0), "train/rollout_gap": Ratio(gap * (state.step + 1), 1.0)}

  def make_batch(groups, i):
    n = sum(r.feedback.status is Status.ENV_FAILED for g in groups for r in g)
    rollouts = [r for g in groups for r in g]
    contexts = ([Context(feedback="f")] * len(rollouts),)
    return Packed(batch, rollouts, contexts, {"data/dropped": float(n)})

  def lose(name, i):
    if i == lost_at and name == lost_in:
      raise errors.ServerLost("http://127.0.0.1:8000 does not answer")

  def collect(state, i):
    lose("collect", i)
    return [[rollout(status, **more) for more in extra]]

  def evaluate(state, i):
    lose("evaluate", i)
    log.evaluated.append(i)
    return {"eval/heldout/avg@k": 0.5}

  def ask_teacher(state, packed):
    lose("ask_teacher", state.step + 1)
    return packed

  def save(i, state, host, at_once=False):
    if not at_once:
      lose("save", i)
    log.saved.append((i, dict(host)))

  steps = types.SimpleNamespace(
    sample_ahead=lambda state, i: None,
    collect=collect,
    make_batch=make_batch,
    ask_teacher=ask_teacher,
    check_teacher=lambda state, packed, i: state,
    probe_teacher=lambda state, packed, i: {},
    step=step,
    note=lambda state, metrics: metrics,
    score=lambda state, batch: None,
    complete=lambda packed, scores: packed,
    evaluate=evaluate,
    due=lambda name, i: due(name, i) or (name == "checkpoint" and steps.has_stopped()),
    has_stopped=lambda: stops_at in log.written,
    write=lambda i, m: log.written.__setitem__(i, m),
    write_rollouts=lambda i, *_: log.rollouts.append(i),
    position=dict,
    check_stop=lambda: None,
    save=save,
  )
  state = train.run(
    types.SimpleNamespace(step=start, params=None, skipped_in_a_row=0),
    {"tokens": tokens, "alternatives": alternatives, "failed_batches": 0, "unwritten": unwritten},
    steps,
    total_steps=total_steps,
    limits=train.Limits(skipped=2, env_failures=2, rollout_gap=0.2),
  )
  return state, log


def test_a_run_evaluates_the_base_then_trains_to_the_end():
  state, log = run()
  assert (
    state.step == 3
    and list(log.written) == [0, 1, 2, 3]
    and log.evaluated == [0, 1, 2, 3]
    and log.rollouts == [1, 2, 3]
  )
  assert (
    log.written[2]["train/loss"] == 0.5
    and log.written[2]["train/reward"] == 1.0
    and log.written[2]["train/generations"] == 4
  )
  assert (
    log.saved[-1] == (3, {"tokens": 18, "alternatives": 0, "failed_batches": 0, "unwritten": None})
    and log.written[3]["train/sampled_tokens"] == 18
  )


def test_all_that_is_generated_is_counted():
  """What was generated for alternatives beside the rollouts: of their own two rollouts of three
  tokens a step, seven and four more tokens, in three responses.
  """
  _, log = run(extra=(dict(extra_tokens=7, extra_calls=2), dict(extra_tokens=4, extra_calls=1)))
  assert [log.written[i]["train/sampled_tokens"] for i in (1, 2, 3)] == [17, 34, 51] and [
    log.written[i]["train/generations"] for i in (1, 2, 3)
  ] == [5, 10, 15]
  ((at, stored),) = log.saved[1:2]
  assert (at, stored) == (
    2,
    {"tokens": 34, "alternatives": 6, "failed_batches": 0, "unwritten": None},
  )
  # resumed: only rollouts from there on
  _, log = run(start=2, tokens=stored["tokens"], alternatives=stored["alternatives"])
  assert (log.written[3]["train/sampled_tokens"], log.written[3]["train/generations"]) == (40, 12)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("lost_in", ["collect", "ask_teacher"])
def test_what_was_trained_before_a_server_was_lost_is_saved(monkeypatch, several, lost_in):
  monkeypatch.setattr(train.hosts, "are_several", lambda: several)
  log = types.SimpleNamespace(written={}, saved=[], rollouts=[], evaluated=[])
  lost = dict(lost_at=3, lost_in=lost_in, log=log)
  with pytest.raises(errors.RunError, match="does not answer"):
    run(due=lambda name, i: False, **lost)
  # as it was before step 3, whose rollouts are not counted
  assert [(i, host["tokens"]) for i, host in log.saved] == ([] if several else [(2, 12)])
  log.saved.clear()
  with pytest.raises(errors.RunError, match="does not answer"):  # step 2 is saved already
    run(due=lambda name, i: name == "checkpoint", **lost)
  assert [i for i, _ in log.saved] == [1, 2]


@pytest.mark.parametrize("lost_in", ["evaluate", "save"])
def test_a_step_whose_evaluation_lost_its_server_is_saved(lost_in):
  log = types.SimpleNamespace(written={}, saved=[], rollouts=[], evaluated=[])
  with pytest.raises(errors.RunError, match="does not answer"):
    run(due=lambda name, i: i == 3, lost_at=3, lost_in=lost_in, log=log)
  ((step, host),) = log.saved
  assert (step, host["tokens"]) == (3, 18)
  # the next start evaluates, and then writes these metrics
  assert (host["unwritten"] is not None) == (lost_in == "evaluate")


def test_a_resumed_run_goes_on_where_it_was():
  _, log = run(start=2)
  assert list(log.written) == [3] and log.evaluated == [3]


def test_a_run_that_stops_itself_saves_the_step_and_makes_no_other():
  never = lambda name, i: False
  state, log = run(total_steps=5, due=never, stops_at=2)
  assert state.step == 2 and list(log.written) == [1, 2] and [i for i, _ in log.saved] == [2]
  # one that had to end before that evaluation makes it, and no other step
  state, log = run(total_steps=5, start=2, stops_at=2, unwritten={"train/loss": 0.5})
  assert state.step == 2 and log.evaluated == [2] and list(log.written) == [2] and not log.saved
  # the last step is no reason to stop
  assert run(total_steps=2, stops_at=2)[0].step == 2


def test_a_judge_that_always_fails_stops_the_run():
  with pytest.raises(
    errors.RunError,
    match=r"2 generation batches in a row \(step 2\).*; the last checkpoint is step 1$",
  ):
    run(status=Status.ENV_FAILED)
  with pytest.raises(errors.RunError, match=r"; there is no checkpoint yet$"):
    run(status=Status.ENV_FAILED, due=lambda name, i: False)


def test_an_engine_that_is_not_the_policy_stops_the_run():
  with pytest.raises(
    errors.RunError,
    match=r"differ from the trainer's by 0.240 nats a token \(step 2\), more than "
    r"config.train.max_rollout_gap=0.2.*; the last checkpoint is step 1$",
  ):
    run(gap=0.12)
  run(gap=0.05)


def test_gradients_that_are_never_finite_stop_the_run():
  with pytest.raises(
    errors.RunError,
    match=r"not finite in 2 updates in a row \(step 2\); the last checkpoint is step 1;",
  ):
    run(skipped=1)
  never = lambda name, i: False
  with pytest.raises(errors.RunError, match=r"\(step 2\); there is no checkpoint yet;"):
    run(skipped=1, due=never)
  # the one that it began from
  with pytest.raises(
    errors.RunError,
    match=r"not finite in 8 updates in a row \(step 8\); the last checkpoint is step 7;",
  ):
    run(total_steps=9, skipped=1, start=7, due=never)


def test_a_resumed_run_sees_the_lines_up_to_its_checkpoint_alone(tmp_path, monkeypatch):
  """Killed two steps after its checkpoint: the lines of these steps are written again."""
  lines = [json.dumps({"step": i, "time_s": float(i), "train/loss": 1.0}) for i in range(5)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  for name in ("_jit", "_make_packer"):
    monkeypatch.setattr(train.Steps, name, lambda *_: None)
  monkeypatch.setattr(train, "describe_run", lambda *_: None)
  steps = train.Steps.__new__(train.Steps)
  rollout = types.SimpleNamespace(top_p=1.0)
  steps.c, steps.workdir = types.SimpleNamespace(total_steps=6, rollout=rollout), tmp_path
  steps.ahead = None
  steps.learner = types.SimpleNamespace(method=types.SimpleNamespace(needs_teacher=False))
  steps.session = types.SimpleNamespace(mesh=None, isolation="none")
  steps.rows = {}
  steps.host = {"unwritten": None, "taught": True}
  steps._saver = checkpoint.Saver(tmp_path)
  steps.open(None, latest=2)
  steps.close()
  assert [line["step"] for line in steps._history] == [0, 1, 2]


def test_rollout_files_hold_what_was_said_and_read():
  said = types.SimpleNamespace(
    logp_BR=np.array([[-1.0, -2.0, -3.0, 0.0]] * 2),
    logp_teacher_BR=np.array([[-0.5, -2.0, -4.0, 9.0]] * 2),
  )
  other = rollout()
  other.prompt_tokens = CHAT.prompt_tokens([{"role": "user", "content": "asked"}])
  other.alternatives = [Alternative(rollout(text="xy"), "samples", "perhaps")]
  packed = Packed(
    None,
    [rollout(), other],
    ([Context(feedback=fakes.NASTY), None], [None, Context(notes="NOTE")]),
    {},
  )
  first, second = rollout_log.rollout_lines(7, packed, said, CHAT, kept=8)
  assert json.loads(json.dumps(first)) == first
  assert (
    first["teacher_gap"] == [0.5, 0.0, -1.0]
    and first["tokens"] == ["a", "b", "<|im_end|>"]
    and fakes.NASTY in first["teacher_context"]
  )
  assert (second["prompt"], "asked" in second["prompt_read"]) == ("question", True)
  assert second["prompt_read"].endswith(CHAT.tokenizer.decode(other.prompt_tokens[-3:]))
  assert (
    second["teacher_context"] is None
    and "teacher_gap" not in second
    and "counterfactuals" not in first
    and "counterfactual_contexts" not in first
  )
  assert second["counterfactuals"] == [
    {
      "source": "samples",
      "response": "xy",
      "reward": 1.0,
      "feedback": "well",
      "imagined": "perhaps",
    }
  ]
  assert second["counterfactual_contexts"] == ["question" + "NOTE" + CLOSING]
  assert len(list(rollout_log.rollout_lines(7, packed, said, CHAT, kept=1))) == 1
