"""Renders the teacher's prompt: the question with its context, shortened where there is no room.

The feedback gives way before the solution does, and peers' failures before their successes. The
question, the closing instruction and the header of the assistant's turn are never touched.
"""

import dataclasses

from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import TaskError
from sdpo_jax.objectives.teacher_context import Context

CUT = "\n[...]\n"
# The fields of a context that may be shortened, in this order.
SHORTENED_FIRST = ("notes", "attempt", "failures", "feedback", "more_solutions", "solution")


def shorten(text: str, keep: int) -> str:
  """Returns at most `keep` characters of a text: its head and its tail around a visible gap.

  Head and tail hold the error and its place. Where there is no room for more than the gap, the
  result is "", so that the template around the text goes too.
  """
  if len(text) <= keep:
    return text
  kept = keep - len(CUT)
  if kept <= 0:
    return ""
  head, tail = text[: (kept + 1) // 2], text[len(text) - kept // 2 :]
  return head + CUT + tail


def teacher_prompt(
  chat: Chat, messages: list[dict[str, str]], context: Context, max_tokens: int
) -> tuple[list[int], bool]:
  """Returns the tokens of the teacher's prompt, and whether a text of it had to be shortened.

  The user's last message carries the context. Where the context hides the question, what was said
  before it goes too; system messages stay. TaskError if the prompt is too long even without the
  context.
  """
  *earlier, question = messages
  if context.question == "hidden":
    earlier = [message for message in earlier if message["role"] == "system"]

  def render(c: Context) -> list[int]:
    if c.question == "alone":
      return chat.prompt_tokens(messages)
    last = question | {"content": c.render(question["content"])}
    return chat.prompt_tokens([*earlier, last], teacher=True)

  tokens = render(context)
  if len(tokens) <= max_tokens:
    return tokens, False
  for field in SHORTENED_FIRST:
    if not getattr(context, field):
      continue
    context = _shorten_field(context, field, lambda c: len(render(c)) <= max_tokens)
    tokens = render(context)
    if len(tokens) <= max_tokens:
      return tokens, True
  raise TaskError(
    f"a question with its closing instruction takes {len(tokens)} tokens, "
    f"more than config.data.max_teacher_tokens={max_tokens}"
  )


def _shorten_field(context: Context, field: str, fits) -> Context:
  """Returns the context with the longest text of this field that fits, found by bisection.

  The field is "" where no text of it fits.
  """

  def kept(characters: int) -> Context:
    return dataclasses.replace(context, **{field: shorten(getattr(context, field), characters)})

  low, high = 0, len(getattr(context, field))
  while low < high:
    middle = (low + high + 1) // 2
    if fits(kept(middle)):
      low = middle
    else:
      high = middle - 1
  return kept(low)
