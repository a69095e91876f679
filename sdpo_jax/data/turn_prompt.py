"""Renders what the teacher reads of an episode turn by turn: one text for each turn with a context.

A turn's text is the episode as the policy read it up to that turn, id for id, with the turn's
context at the end of the last message, and then the turn itself. So the teacher sees nothing that
comes later, but through the context. Where each turn is a row, what the policy read is a window of
the last turns (`data/window.py`).
"""

from collections.abc import Callable
import functools

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.conversation import Continuation
from sdpo_jax.data.packing import Text, segment_after
from sdpo_jax.data.window import Messages
from sdpo_jax.records import Rollout


def turn_texts(
  chat: Chat,
  messages: Messages,
  rollout: Rollout,
  contexts: tuple[str, ...],
  most: int,
  windows: list[Callable[[Messages], Messages]] | None = None,
  *,
  alike: bool = False,
) -> tuple[list[Text], bool]:
  """Returns the texts, and whether a context had to be shortened.

  Args:
    chat: of the policy, in whose words the teacher reads.
    messages: those before the first turn.
    rollout: the episode.
    contexts: of each turn; "": it has no text.
    most: the tokens that a context may take; the end of a longer one is left out.
    windows: of each turn, make its messages from the first ones; None: the episode is one text.
    alike: the tokens of each turn have a weight of 1 together, else each has.
  """
  prompts = _Prompts(chat, messages, rollout, windows)
  texts, was_shortened = [], False
  for k, context in enumerate(contexts[: len(rollout.sampled)]):
    if not context:
      continue
    prompt, is_whole = prompts.within(k, context, most)
    weight = 1.0 / max(1, len(rollout.sampled[k].completion.tokens)) if alike else 1.0
    texts.append(segment_after(prompt, rollout.sampled[k])._replace(weight=weight))
    was_shortened |= not is_whole
  return texts, was_shortened


class _Prompts:
  """What stands before the turns of an episode, with a text behind the last message."""

  def __init__(self, chat: Chat, messages: Messages, rollout: Rollout, windows):
    self._chat, self._messages, self._rollout = chat, messages, rollout
    self._windows = windows
    # [k]: all up to the end of the turn before turn k
    self._histories = [[], list(rollout.prompt_tokens)]
    for segment in rollout.sampled if windows is None else ():
      history = [*self._histories[-1], *segment.before, *segment.completion.tokens]
      self._histories.append(history)
    del self._histories[1]

  def within(self, k: int, text: str, most: int) -> tuple[list[int], bool]:
    """Returns the prompt of turn k with as much of a text as `most` tokens hold, and if it is all.

    The text is found by bisection.
    """
    limit = len(self._prompt(k, "")) + most
    prompt = self._prompt(k, text)
    if len(prompt) <= limit:
      return prompt, True
    low, high = 0, len(text) - 1
    while low < high:
      middle = (low + high + 1) // 2
      fits = len(self._prompt(k, text[:middle])) <= limit
      low, high = (middle, high) if fits else (low, middle - 1)
    return self._prompt(k, text[:low]), False

  def _prompt(self, k: int, text: str) -> list[int]:
    if k == 0 or self._windows is not None:
      messages = self._messages if self._windows is None else self._windows[k](self._messages)
      *earlier, last = messages
      return self._chat.prompt_tokens([*earlier, last | {"content": last["content"] + text}])
    said = self._rollout.sampled[k - 1].completion.tokens
    message = self._rollout.turns[k - 1].observation + text
    return self._histories[k] + _continuation(self._chat).tokens(said, message)


@functools.lru_cache(maxsize=8)
def _continuation(chat: Chat) -> Continuation:
  return Continuation(chat)
