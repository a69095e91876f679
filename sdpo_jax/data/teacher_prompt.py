"""The teacher's prompt: the question with its context, shortened where there is no room."""

import dataclasses

from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import TaskError
from sdpo_jax.objectives.teacher_context import Context

CUT = "\n[...]\n"


def shorten(text: str, keep: int) -> str:
  """At most `keep` characters: the head and the tail, which hold the error and its place, with a
  visible gap; "" where there is no room for more than the gap.
  """
  if len(text) <= keep:
    return text
  keep = keep - len(CUT)
  if keep <= 0:  # so that what holds it, a template, goes too
    return ""
  return text[: (keep + 1) // 2] + CUT + (text[len(text) - keep // 2 :] if keep // 2 else "")


def teacher_prompt(
  chat: Chat, messages: list[dict[str, str]], context: Context, max_tokens: int
) -> tuple[list[int], bool]:
  """Tokens of the teacher's prompt and whether its texts had to be shortened. The user's last
  message carries the context.
  """

  def render(c: Context) -> list[int]:
    return chat.prompt_tokens(
      messages[:-1] + [messages[-1] | {"content": c.render(messages[-1]["content"])}], teacher=True
    )

  tokens = render(context)
  if len(tokens) <= max_tokens:
    return tokens, False
  for field in ("notes", "attempt", "feedback", "solution"):
    low, high = 0, len(getattr(context, field))  # the longest text that fits, by bisection
    if not high:
      continue
    while low < high:
      middle = (low + high + 1) // 2
      if (
        len(
          render(dataclasses.replace(context, **{field: shorten(getattr(context, field), middle)}))
        )
        <= max_tokens
      ):
        low = middle
      else:
        high = middle - 1
    context = dataclasses.replace(context, **{field: shorten(getattr(context, field), low)})
    tokens = render(context)
    if len(tokens) <= max_tokens:
      return tokens, True
  raise TaskError(
    f"a question with its closing instruction takes {len(tokens)} tokens, more than config.data.max_teacher_tokens={max_tokens}"
  )
