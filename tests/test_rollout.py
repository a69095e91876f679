"""Collecting: judges run while sampling goes on, and one that fails costs its own row."""

import threading
import time

import pytest

from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import TaskError
from sdpo_jax.judging import busy_s
from sdpo_jax.records import Completion, Feedback, Sampling, Status
from sdpo_jax.rollout import Collector, prompt_seed
from tests import fakes

CHAT = Chat(fakes.ByteTokenizer())
SAMPLING = Sampling(8, stop_tokens=(257,))


def say(text):
  return CHAT.text_tokens(text) + [257]


def collector(answers, engine, **settings):
  return Collector(
    fakes.ListEnv(answers),
    CHAT,
    engine,
    **(dict(max_prompt_tokens=200, judge_threads=4, judge_timeout_s=0.5) | settings),
  )


def test_a_judge_that_raises_hangs_or_returns_nan_costs_its_own_row():
  hang = threading.Event()
  answers = {
    "good": Feedback(1.0, ""),
    "raise": RuntimeError("boom"),
    "nan": Feedback(float("nan"), ""),
    "hang": lambda: hang.wait(5) or Feedback(1.0, ""),
  }
  c = collector(
    answers, fakes.ScriptedEngine([[say(t) for t in ("good", "raise", "nan", "hang", "bad")]])
  )
  try:
    (group,) = c.collect(None, [c.env.task("train", 0)], n=5, sampling=SAMPLING, seeds=[0])
  finally:
    hang.set()
    c.close()
  assert [r.feedback.status for r in group] == [
    Status.SCORED,
    Status.ENV_FAILED,
    Status.ENV_FAILED,
    Status.ENV_FAILED,
    Status.SCORED,
  ]
  assert [r.feedback.reward for r in group] == [1.0, 0.0, 0.0, 0.0, 0.0]
  assert group[4].feedback.text == "wrong: bad"
  assert "boom" in group[1].feedback.text
  assert group[0].text == "good"
  assert group[0].tokens[-1] == 257


def test_an_answer_to_a_teachers_prompt_is_read_as_the_teachers():
  """A chat template may open a thought for one of the two readers alone."""

  class Thinks(Chat):
    def response_text(self, tokens, *, teacher=False):
      return ("<think>" if teacher else "") + super().response_text(tokens)

  answers = {"four": Feedback(1.0, ""), "<think>four": Feedback(0.0, "unfinished")}
  c = collector(answers, fakes.ScriptedEngine([[say("four")]] * 3))
  c.chat = Thinks(fakes.ByteTokenizer())
  found = []
  try:
    for by_teacher in (False, True, False):
      with c.read_by_teacher(by_teacher):
        ((r,),) = c.collect(None, [c.env.task("train", 0)], n=1, sampling=SAMPLING, seeds=[0])
      found.append((r.text, r.feedback.reward))
  finally:
    c.close()
  assert found == [("four", 1.0), ("<think>four", 0.0), ("four", 1.0)]


def test_a_response_that_was_cut_off_is_told_so():
  """The engine's word alone decides it.

  Nothing is added where it is right, where the judge is silent, or where the fault is ours.
  """
  answers = {
    "right": Feedback(1.0, ""),
    "silent": Feedback(0.0, ""),
    "broken": fakes.FAILED,
    "late": Feedback(0.0, "time", Status.TIMEOUT),
  }
  texts = ("right", "silent", "broken", "late", "def f(")
  c = collector(
    answers, fakes.ScriptedEngine([[say(t)[:-1] for t in texts], [say(t) for t in texts]])
  )
  cut_off, ended = c.collect(
    None, [c.env.task("train", i) for i in range(2)], n=5, sampling=SAMPLING, seeds=[0, 0]
  )
  c.close()
  too_long = "The response was too long: it was cut off after {} tokens.\n"
  assert [r.feedback.text for r in cut_off] == [
    "",
    "",
    "the judge broke",
    too_long.format(4) + "time",
    too_long.format(6) + "wrong: def f(",
  ]
  assert [r.feedback.text for r in ended] == ["", "", "the judge broke", "time", "wrong: def f("]
  assert [(r.feedback.reward, r.feedback.status) for r in cut_off] == [
    (r.feedback.reward, r.feedback.status) for r in ended
  ]


def test_judging_starts_before_sampling_ends():
  judged = threading.Event()

  class SlowEngine(fakes.ScriptedEngine):
    def generate(self, requests):
      yield Completion(0, 1, say("first"), [-1.0] * 6, "stop")  # out of order, too
      assert judged.wait(5), "the first response was not judged while the second was being sampled"
      yield Completion(0, 0, say("second"), [-1.0] * 7, "stop")

  c = collector({"first": lambda: judged.set() or Feedback(1.0, "")}, SlowEngine([]))
  (group,) = c.collect(None, [c.env.task("train", 0)], n=2, sampling=SAMPLING, seeds=[0])
  c.close()
  assert [r.text for r in group] == ["second", "first"]


def test_what_judging_hides_behind_sampling_is_told():
  spans = [(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (1.5, 2.5), (9.0, 12.0), (11.0, 13.0)]
  assert busy_s(spans, 10.0) == 3.0 + 1.0 + 1.0
  assert busy_s([], 10.0) == busy_s([(11.0, 12.0)], 10.0) == 0.0
  c = collector({"first": lambda: time.sleep(0.2) or Feedback(1.0, "")}, Sleeping([]))
  c.collect(None, [c.env.task("train", 0)], n=2, sampling=SAMPLING, seeds=[0])
  c.close()
  told = c.take_times()
  assert told["time/judge_hidden_s"] >= 0.19 and told["time/judge_wait_s"] >= 0.0
  assert set(c.take_times().values()) == {0.0}


def test_a_group_that_is_judged_is_handed_on_while_others_are_sampled():
  handed = threading.Event()

  class TwoGroups(fakes.ScriptedEngine):
    def generate(self, requests):
      for s in (1, 0):
        yield Completion(0, s, say("first"), [-1.0] * 6, "stop")
      assert handed.wait(5), "the first group was not handed on while the second was being sampled"
      for s in (0, 1):
        yield Completion(1, s, say("second"), [-1.0] * 7, "stop")

  seen = []

  def hand_on(group):
    seen.append(group)
    handed.set()
    raise ValueError("who is handed a group may stumble: nothing is lost")

  c = collector({}, TwoGroups([]))
  tasks = [c.env.task("train", i) for i in (0, 1)]
  settings = dict(n=2, sampling=SAMPLING, seeds=[0, 1])
  with c.handing_on(hand_on):
    groups = c.collect(None, tasks, **settings)
  assert [r.text for group in groups for r in group] == ["first"] * 2 + ["second"] * 2
  for group, same in zip(groups, sorted(seen, key=lambda g: g[0].text), strict=True):
    assert all(a is b for a, b in zip(group, same, strict=True))
  c.collect(None, tasks, **settings)  # nobody asks any more
  c.close()
  assert len(seen) == 2


class Sleeping(fakes.ScriptedEngine):
  """Samples a second response for half a second."""

  def generate(self, requests):
    yield Completion(0, 0, say("first"), [-1.0] * 6, "stop")
    time.sleep(0.5)
    yield Completion(0, 1, say("second"), [-1.0] * 7, "stop")


def test_a_prompt_over_the_limit_names_the_setting():
  c = collector({}, fakes.ScriptedEngine([[say("x")]]), max_prompt_tokens=5)
  with pytest.raises(ValueError, match="config.data.max_prompt_tokens=5"):
    c.collect(None, [c.env.task("train", 0)], n=1, sampling=SAMPLING, seeds=[0])
  c.close()


def test_seeds_differ_by_path_and_repeat():
  assert prompt_seed(0, "train", 1, 0) == prompt_seed(0, "train", 1, 0)
  assert (
    len({prompt_seed(s, "train", i, q) for s in range(5) for i in range(20) for q in range(8)})
    == 800
  )


def test_a_rollout_keeps_what_the_engine_returned():
  """In lists of its own, so that the gate sees what somebody changes later."""
  c = collector({}, fakes.ScriptedEngine([[say("yes")], [say("no")]]))
  tasks = [c.env.task("train", i) for i in range(2)]
  begun = [([], []), ([5, 6], [-0.5, -0.25])]
  try:
    groups = c.collect(None, tasks, n=1, sampling=SAMPLING, seeds=[0, 1], begun=begun)
  finally:
    c.close()
  for (rollout,), (head, logp), text in zip(groups, begun, ("yes", "no"), strict=True):
    ((start, completion, *_),) = rollout.sampled
    assert (start, completion.tokens) == (0, head + say(text)) and completion.logp[:2] == (
      logp or [-1.0] * 2
    )
    rollout.tokens[0] += 1
    rollout.logp[0] -= 1
    assert completion.tokens == head + say(text) and completion.logp[0] != rollout.logp[0]


def test_prompts_may_be_given_as_ids_that_their_maker_limits():
  prompts, limit = [[7, 8, 9], [1] * 5], 4
  c = collector({}, fakes.ScriptedEngine([[say("yes")], [say("yes")]]), max_prompt_tokens=limit)
  settings = dict(n=1, sampling=SAMPLING, seeds=[0])
  task = c.env.task("train", 0)
  try:
    for prompt in prompts:
      ((rollout,),) = c.collect(None, [task], prompts=[prompt], **settings)
      assert rollout.prompt_tokens == prompt
    with pytest.raises(TaskError, match="more than config.data.max_prompt_tokens=4"):
      c.collect(None, [task], **settings)
  finally:
    c.close()
