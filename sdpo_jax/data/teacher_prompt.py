"""Renders what the teacher reads: the question with its context, shortened where there is no room.

`TeacherReader` goes over the responses to a question, `teacher_prompt` renders one prompt. The
feedback gives way before the solution does, and peers' failures before their successes. The
question, the closing instruction and the header of the assistant's turn are never touched.

Where each turn of an episode is a row, the teacher reads every turn as the policy did, after the
same window of turns (`data/window.py`), and a context of the whole episode stands in the first
messages of each. It is shortened once, so that all turns are read with the same context.
"""

import dataclasses
from typing import Callable, NamedTuple

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.packing import Text, segment_after, text_after
from sdpo_jax.data.turn_prompt import turn_texts
from sdpo_jax.data.window import Messages, windows
from sdpo_jax.errors import TaskError
from sdpo_jax.objectives.memory import Standing
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Rollout, Task

CUT = "\n[...]\n"
# The fields of a context that may be shortened, in this order.
SHORTENED_FIRST = ("notes", "attempt", "failures", "feedback", "more_solutions", "solution")


class Shown(NamedTuple):
  """What the teacher reads of one response."""

  context: Context
  weight: float
  # One, or one for each turn: of those that have a context, or of all where turns are rows.
  texts: list[Text]
  was_shortened: bool

  @property
  def prompt(self) -> list[int]:
    """Returns what comes before what was sampled, in the first text."""
    return self.texts[0].prompt


@dataclasses.dataclass(frozen=True)
class TeacherReader:
  """Renders what a teacher reads of responses.

  messages(task): the chat messages that ask the question.
  teacher_context(group, i): what it reads of rollout i of a group beside the question, or None.
  max_tokens: of a prompt; of one that shows earlier turns, beside these.
  further_readings(group, i): (context, weight) or None for each of further_count more readings;
    None: there are none.
  history: the turns that the prompt of a turn shows, where each is a row; None: episodes are rows.
  """

  chat: Chat
  messages: Callable
  teacher_context: Callable
  max_tokens: int
  further_readings: Callable | None = None
  further_count: int = 0
  history: int | None = None

  def of_group(
    self, group: list[Rollout], standing: Standing | None = None
  ) -> list[list[Shown | None]]:
    """Returns what is read before each rollout of a group, in each of the readings.

    The plain reading comes first. None: the teacher has nothing to read there. standing: the
    question's in the memory, for contexts that need one.
    """
    teacher_context = self.teacher_context
    known = [standing] if getattr(teacher_context, "needs_memory", False) else []
    plain = []
    for i, rollout in enumerate(group):
      context = teacher_context(group, i, *known) if rollout.is_judged else None
      plain.append(None if context is None else (context, 1.0))
    readings = [plain]
    if self.further_readings is not None:
      nothing = [None] * self.further_count
      readings += zip(
        *(self.further_readings(group, i) if r.is_judged else nothing for i, r in enumerate(group)),
        strict=True,
      )
    return [
      [
        None if chosen is None else self._show(rollout, *chosen)
        for rollout, chosen in zip(group, reading, strict=True)
      ]
      for reading in readings
    ]

  def says_nothing(self, task: Task, context: Context, prompt: list[int]) -> bool:
    """Tells whether the prompt of a context is the same without the context's texts."""
    silent = context.without_texts()
    return teacher_prompt(self.chat, self.messages(task), silent, self.max_tokens)[0] == prompt

  def _show(self, rollout: Rollout, context: Context, weight: float) -> Shown:
    messages = self.messages(rollout.task)
    shown_turns = None
    if self.history is not None and rollout.turns is not None:
      shown_turns = windows(self.chat, rollout, self.history)
    if context.turns:
      most = self.max_tokens - len(rollout.prompt_tokens)
      texts, was_shortened = turn_texts(
        self.chat, messages, rollout, context.turns, most, shown_turns, alike=context.turns_alike
      )
    elif shown_turns is None:
      prompt, was_shortened = teacher_prompt(self.chat, messages, context, self.max_tokens)
      texts = [text_after(prompt, rollout)]
    else:
      # what a turn's prompt may take beyond the first one is what it took for the policy
      beside = self.max_tokens - len(rollout.prompt_tokens)
      limits = [len(segment.prompt) + beside for segment in rollout.sampled]
      prompts, was_shortened = teacher_prompts(self.chat, messages, context, shown_turns, limits)
      texts = list(map(segment_after, prompts, rollout.sampled))
    return Shown(context, weight, texts, was_shortened)


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
  (tokens,), was_shortened = teacher_prompts(chat, messages, context, [list], [max_tokens])
  return tokens, was_shortened


def teacher_prompts(
  chat: Chat,
  messages: Messages,
  context: Context,
  views: list[Callable[[Messages], Messages]],
  limits: list[int],
) -> tuple[list[list[int]], bool]:
  """Returns the tokens of several prompts with one context, as `teacher_prompt` does of one.

  views: each makes the messages of a prompt from the first ones, which carry the context.
  limits: the most tokens of each; that of the first is config.data.max_teacher_tokens.
  """
  *earlier, question = messages
  if context.question == "hidden":
    earlier = [message for message in earlier if message["role"] == "system"]

  def render(c: Context) -> list[list[int]]:
    if c.question == "alone":
      return [chat.prompt_tokens(view(messages)) for view in views]
    first = [*earlier, question | {"content": c.render(question["content"])}]
    return [chat.prompt_tokens(view(first), teacher=True) for view in views]

  def excess(prompts: list[list[int]]) -> int:
    return max(len(tokens) - limit for tokens, limit in zip(prompts, limits, strict=True))

  prompts = render(context)
  if excess(prompts) <= 0:
    return prompts, False
  for field in SHORTENED_FIRST:
    if not getattr(context, field):
      continue
    context = _shorten_field(context, field, lambda c: excess(render(c)) <= 0)
    prompts = render(context)
    if excess(prompts) <= 0:
      return prompts, True
  raise TaskError(
    f"a question with its closing instruction takes {limits[0] + excess(prompts)} tokens, "
    f"more than config.data.max_teacher_tokens={limits[0]}"
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
