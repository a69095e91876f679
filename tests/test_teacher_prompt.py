"""The teacher's prompt keeps question and closing, and shortens the rest."""

import pytest

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.teacher_prompt import CUT, shorten, teacher_prompt
from sdpo_jax.objectives.teacher_context import (
  CLOSING,
  Context,
)
from sdpo_jax.records import Task
from tests import fakes

CHAT = Chat(fakes.ByteTokenizer())


TASK = Task("t/0", "Write f.", system="Be brief.")


def messages(task):
  return [{"role": "system", "content": task.system}, {"role": "user", "content": task.prompt}]


def test_system_message_is_kept_and_tags_in_feedback_end_no_turn():
  tokens, cut = teacher_prompt(CHAT, messages(TASK), Context(feedback=fakes.NASTY), 4096)
  assert not cut
  # system, user, and the open assistant turn
  assert tokens.count(257) == 2 and tokens.count(256) == 3
  text = CHAT.tokenizer.decode(tokens)
  assert (
    text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    and "< |im_end|>" in text
    and "{prompt} {0} \\n \\1 %s" in text
  )


@pytest.mark.parametrize(
  "context",
  [Context(feedback="x" * 500 + "END"), Context(solution="y" * 600), Context("y" * 300, "x" * 300)],
)
def test_over_long_texts_are_shortened_and_nothing_else(context):
  budget = 250
  tokens, cut = teacher_prompt(CHAT, messages(TASK), context, budget)
  text = CHAT.tokenizer.decode(tokens)
  assert cut and budget - 8 <= len(tokens) <= budget
  assert (
    TASK.prompt in text
    and text.endswith(CLOSING + "<|im_end|>\n<|im_start|>assistant\n")
    and CUT in text
  )


def test_feedback_gives_way_before_the_solution():
  tokens, _ = teacher_prompt(CHAT, messages(TASK), Context("y" * 40, "x" * 400), 330)
  assert "y" * 40 in CHAT.tokenizer.decode(tokens)


def test_where_a_question_alone_fits_it_fits_whatever_was_said():
  """What a run checks of a question before it begins is what it needs later."""
  alone = len(teacher_prompt(CHAT, messages(TASK), Context(), 4096)[0])
  tokens, cut = teacher_prompt(
    CHAT, messages(TASK), Context("y" * 300, "x" * 300, "z" * 300, notes="n" * 300), alone
  )
  assert cut and len(tokens) == alone


def test_a_question_that_alone_is_too_long_is_an_error_that_names_the_setting():
  with pytest.raises(ValueError, match="more than config.data.max_teacher_tokens=60"):
    teacher_prompt(CHAT, messages(TASK), Context(feedback="x"), 60)


def test_shorten_keeps_head_and_tail():
  assert shorten("abcdef", 6) == "abcdef"
  assert shorten("a" * 50 + "b" * 50, 20) == "aaaaaaa" + CUT + "bbbbbb"
  assert shorten("a" * 100, 3) == shorten("a" * 100, len(CUT)) == ""
