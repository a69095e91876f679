"""Contexts of several answers or readings: who is shown what, and what gives way first."""

import dataclasses

import numpy as np
import pytest

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.shapes import Shapes
from sdpo_jax.data.teacher_prompt import teacher_prompt
from sdpo_jax.objectives import build
from sdpo_jax.objectives.contexts_peers import Peers
from sdpo_jax.objectives.contexts_pmi import QuestionAndReference
from sdpo_jax.objectives.teacher_context import CLOSING, SOLUTION, Context
from sdpo_jax.records import Feedback, Rollout, Status, Task
from tests import fakes

CHAT = Chat(fakes.ByteTokenizer())
TASK = Task("t/0", "Write f.", system="Be brief.")


def messages(task):
  return [{"role": "system", "content": task.system}, {"role": "user", "content": task.prompt}]


def rollout(text, reward, status=Status.SCORED, task=TASK):
  tokens = CHAT.text_tokens(text) + [257]
  prompt = CHAT.prompt_tokens(messages(task))
  feedback = Feedback(reward, "said of it", status)
  return Rollout(task, prompt, tokens, [-0.5] * len(tokens), "stop", text, feedback)


def group_of(*rewards, **changes):
  return [rollout(f"answer {g}", reward, **changes) for g, reward in enumerate(rewards)]


def shown(context):
  """The numbers of the answers in a context: its successes, its failures."""
  digits = lambda text: [int(c) for c in text if c.isdigit()]
  return digits(context.solution + context.more_solutions), digits(context.failures)


def test_peers_are_taken_by_position_and_never_the_response_itself():
  group = group_of(1, 0, 1, 0, 1)
  assert [shown(Peers()(group, i)) for i in range(5)] == [
    ([2, 4], [1]),
    ([0, 2], [3]),
    ([0, 4], [1]),
    ([0, 2], [1]),
    ([0, 2], [1]),
  ]
  assert shown(Peers(solutions=1, failures=0)(group, 1)) == ([0], [])
  assert shown(Peers(solutions=3, failures=2)(group, 0)) == ([2, 4], [1, 3])


def test_what_is_missing_among_the_peers_is_left_out():
  assert shown(Peers()(group_of(1, 0, 1), 0)) == ([2], [1])  # no second success
  assert shown(Peers()(group_of(1, 1, 1), 0)) == ([1, 2], [])  # no failure
  assert Peers()(group_of(1, 0, 0), 0) is None  # its own success alone
  assert Peers()(group_of(0, 0), 1) is None
  assert Peers()(group_of(1), 0) is None
  group = group_of(1, 1)
  broken = dataclasses.replace(group[0], feedback=Feedback(1.0, "", Status.ENV_FAILED))
  assert Peers()([broken, group[1]], 0) is None and Peers()([broken, group[1]], 1) is None
  # thoughts are not shown, and one without an end is no answer
  thinking = [rollout("<think>hm</think> 7", 1), rollout("<think>8", 0), rollout("9", 0)]
  assert shown(Peers()(thinking, 2)) == ([7], [])


def test_failures_are_marked_and_stand_behind_the_successes():
  text = Peers()(group_of(1, 0, 1, 0), 1).render("Q{text}")
  assert text.startswith("Q{text}" + SOLUTION + "answer 0\nAnother correct solution:\n\nanswer 2\n")
  _, marked = text.split("answer 2\n")
  assert marked == "A wrong answer, which does not solve the question:\n\nanswer 3" + CLOSING
  own = Peers(templates={"failure": " NOT[{text}]", "more_solution": " OR[{text}]"})
  assert " OR[answer 2] NOT[answer 3]" in own(group_of(1, 0, 1, 0), 1).render("Q")


def test_a_template_that_would_hide_peers_is_refused():
  for settings, field in ((dict(), "more_solutions"), (dict(solutions=1), "failures")):
    with pytest.raises(ValueError, match=f"has no {{{field}}}: the teacher would not read"):
      Peers(templates={"reprompt": "{prompt}{solution}"}, **settings)
  Peers(templates={"reprompt": "{prompt}{solution}"}, solutions=1, failures=0)


def test_without_room_the_failure_gives_way_first_then_the_second_success():
  group = [rollout(c * 120, r) for c, r in (("x", 0), ("y", 1), ("z", 1), ("w", 0))]
  context = Peers()(group, 3)
  letters = []
  for limit in (700, 520, 380, 250):
    tokens, cut = teacher_prompt(CHAT, messages(TASK), context, limit)
    text = CHAT.tokenizer.decode(tokens)
    assert len(tokens) <= limit and cut == (limit < 700) and CLOSING in text
    letters.append([text.count(c * 10) > 0 for c in "yzx"])
    whole = [c * 120 in text for c in "yzx"]
    assert whole == sorted(whole, reverse=True)  # y before z before x
  assert letters[0] == [True] * 3 and letters[-1] == [True, False, False]


def test_three_readings_of_a_task_with_a_reference():
  task = dataclasses.replace(TASK, solution="<think>x</think>def f")
  group = group_of(0, 1, task=task)
  teach = QuestionAndReference()
  both = teach(group, 0)
  (question, one), (reference, another) = teach.further(group, 0)
  assert both == Context("def f") and (one, another) == (1.0, 1.0)

  def read(context, asked=None):
    tokens, cut = teacher_prompt(CHAT, asked or messages(task), context, 4096)
    assert not cut
    return tokens

  assert read(question) == group[0].prompt_tokens  # the policy's own prompt
  assert question.render(task.prompt) == task.prompt
  conversation = [
    messages(task)[0],
    {"role": "user", "content": "Write g."},
    {"role": "assistant", "content": "def g"},
    messages(task)[1],
  ]
  text = CHAT.tokenizer.decode(read(reference, conversation))
  assert "Write" not in text and "def g" not in text
  assert "Be brief." in text and SOLUTION.strip() in text and "def f" in text
  assert "Write f." in CHAT.tokenizer.decode(read(both, conversation))


def test_the_question_alone_is_read_as_the_policy_reads_it_whatever_the_teacher_thinks():
  class Thinks(fakes.ByteTokenizer):
    def apply_chat_template(self, messages, *, enable_thinking, **settings):
      text = super().apply_chat_template(messages, enable_thinking=enable_thinking, **settings)
      return text + ("<think>" if enable_thinking else "")

  chat = Chat(Thinks(), teacher_thinking=True)
  asked = messages(TASK)
  alone, _ = teacher_prompt(chat, asked, Context(question="alone"), 4096)
  assert alone == chat.prompt_tokens(asked) != chat.prompt_tokens(asked, teacher=True)


def test_without_a_reference_there_is_no_teacher_in_any_reading():
  for solution in (None, "", "<think>no end"):
    group = group_of(1, 0, task=dataclasses.replace(TASK, solution=solution))
    teach = QuestionAndReference()
    assert teach(group, 0) is None and teach.further(group, 0) == [None, None]
  group = group_of(0, task=dataclasses.replace(TASK, solution="s"))
  broken = [dataclasses.replace(group[0], feedback=Feedback(0.0, "", Status.ENV_FAILED))]
  assert QuestionAndReference().further(broken, 0) == [None, None]


@pytest.mark.parametrize("name", ["mopd", "pmi", "beta_opsd"])
def test_batches_of_tasks_that_show_nothing_have_no_teacher_and_are_packed_all_the_same(name):
  method = build.build_method(build.method_row(name))
  further = getattr(method.teacher_context, "further", None)
  settings = dict(max_teacher_tokens=4096, further_readings=further)
  reference = dataclasses.replace(TASK, id="t/1", solution="def f")
  packer = fakes.make_packer(method, CHAT, messages, Shapes((512, 1024, 64)), **settings)
  # nobody succeeds at the first question, whose task has no reference; all do at the second
  packed = packer.pack([group_of(0, 0), group_of(1, 1, task=reference)])
  weights = [reading.weight_BR.max(1).tolist() for reading in packed.batch.readings]
  order = [r.task.id == "t/1" for r in packed.rollouts]
  assert weights == [np.float32(order).tolist()] * (3 if name == "pmi" else 1)
