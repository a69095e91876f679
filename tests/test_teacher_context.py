"""What the teacher is shown: solutions, feedback, templates."""

import dataclasses

import pytest

from sdpo_jax.data.chat import Chat
from sdpo_jax.objectives.teacher_context import (
  CLOSING,
  FEEDBACK,
  SOLUTION,
  Context,
  FeedbackOrSolution,
  ReferenceSolution,
  without_thinking,
)
from sdpo_jax.records import Feedback, Rollout, Status, Task
from tests import fakes

CHAT = Chat(fakes.ByteTokenizer())


TASK = Task("t/0", "Write f.", system="Be brief.")


def messages(task):
  return [{"role": "system", "content": task.system}, {"role": "user", "content": task.prompt}]


def rollout(text, reward, feedback="", status=Status.SCORED):
  tokens = CHAT.text_tokens(text) + [257]
  return Rollout(
    TASK,
    CHAT.prompt_tokens(messages(TASK)),
    tokens,
    [-0.5] * len(tokens),
    "stop",
    text,
    Feedback(reward, feedback, status),
  )


GROUP = [
  rollout("wrong", 0.0, "it " + fakes.NASTY),
  rollout("<think>hm</think> right", 1.0),
  rollout("broken", 0.0, "oops", Status.ENV_FAILED),
  rollout("also right", 1.0),
]


def feedback_or_solution(group, i, **settings):
  return FeedbackOrSolution(**settings)(group, i)


def test_who_is_shown_what():
  shown = [feedback_or_solution(GROUP, i) for i in range(4)]
  # the first success, its thinking removed; no feedback beside it
  assert shown[0] == Context(solution="right")
  assert shown[1] == Context(solution="also right")  # never its own
  assert shown[2] is None  # the judge failed: nothing is known
  assert shown[3] == Context(solution="right")
  assert feedback_or_solution(GROUP, 0, feedback="always") == Context(
    "right", GROUP[0].feedback.text
  )
  assert feedback_or_solution(GROUP, 0, use_solution=False) == Context("", GROUP[0].feedback.text)
  assert feedback_or_solution([GROUP[1]], 0) is None  # a lone success has neither
  assert feedback_or_solution(GROUP, 0, use_solution=False, feedback="never") is None
  with pytest.raises(ValueError, match="choose from"):
    feedback_or_solution(GROUP, 0, feedback="sometimes")


def test_options_of_the_context():
  group = [
    rollout("wrong", 0.0, "no"),
    rollout("a long success", 1.0),
    rollout("short", 0.6),
    rollout("middling", 1.0),
  ]
  assert feedback_or_solution(group, 0, demonstration="shortest").solution == "short"
  picks = {feedback_or_solution(group, i, demonstration="random").solution for i in range(4)}
  assert len(picks) > 1 and all(p in ("a long success", "short", "middling") for p in picks)
  assert feedback_or_solution(group, 0, demonstration="random") == feedback_or_solution(
    group, 0, demonstration="random"
  )
  assert feedback_or_solution(group, 0, success_threshold=0.7).solution == "a long success"
  with_attempt = feedback_or_solution(group, 0, show_attempt=True)
  assert (
    with_attempt.attempt == "wrong" and "Your earlier attempt:\n\nwrong" in with_attempt.render("Q")
  )
  own = feedback_or_solution(
    group, 0, templates={"solution": " SOL[{text}]", "reprompt": "{solution}|{prompt}"}
  )
  assert own.render("Q {text}") == " SOL[a long success]|Q {text}"
  with pytest.raises(ValueError, match="asks for {nothing}"):
    feedback_or_solution(group, 0, templates={"reprompt": "{nothing}"}).render("Q")
  assert ReferenceSolution()(group, 0) is None
  solved = dataclasses.replace(
    group[0], task=dataclasses.replace(TASK, solution="<think>x</think>def f")
  )
  assert ReferenceSolution()([solved], 0) == Context("def f")
  # the template may have opened the block
  assert [without_thinking(t) for t in ("thought</think>\nX", "<think>a</think>X", "X")] == [
    "X"
  ] * 3


def test_the_teacher_reads_question_solution_feedback_and_closing_in_this_order():
  text = Context("S{0}\\", "F{x}%s").render("Q{prompt}")
  assert text == "Q{prompt}" + SOLUTION + "S{0}\\" + FEEDBACK + "F{x}%s" + CLOSING
