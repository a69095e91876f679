"""Renders what the teacher reads of an episode turn by turn: one text for each turn with a context.

A turn's text is the episode as the policy read it up to that turn, id for id, with the turn's
context at the end of the last message, and then the turn itself. So the teacher sees nothing that
comes later, but through the context.
"""

import functools

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.conversation import Continuation
from sdpo_jax.data.packing import Text
from sdpo_jax.records import Rollout


def turn_texts(
  chat: Chat,
  messages: list[dict[str, str]],
  rollout: Rollout,
  contexts: tuple[str, ...],
  most: int,
  *,
  alike: bool = False,
) -> tuple[list[Text], bool]:
  """Returns the texts, and whether a context had to be shortened.

  messages: those before the first turn. contexts: of each turn; "": it has no text. most: the
  tokens that a context may take; the end of a longer one is left out. alike: the tokens of each
  turn have a weight of 1 together, else each has.
  """
  prompts = _Prompts(chat, messages, rollout)
  texts, was_shortened = [], False
  for k, context in enumerate(contexts[: len(rollout.sampled)]):
    if not context:
      continue
    prompt, is_whole = prompts.within(k, context, most)
    first, completion, _ = rollout.sampled[k]
    span = (len(prompt), len(prompt) + len(completion.tokens))
    weight = 1.0 / max(1, len(completion.tokens)) if alike else 1.0
    texts.append(Text(prompt + completion.tokens, [span], first, weight))
    was_shortened |= not is_whole
  return texts, was_shortened


class _Prompts:
  """What stands before the turns of an episode, with a text behind the last message."""

  def __init__(self, chat: Chat, messages: list[dict[str, str]], rollout: Rollout):
    self._chat, self._messages, self._rollout = chat, messages, rollout
    # [k]: all up to the end of the turn before turn k
    self._histories = [[], list(rollout.prompt_tokens)]
    for _, completion, before in rollout.sampled:
      self._histories.append([*self._histories[-1], *before, *completion.tokens])
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
    if k == 0:
      *earlier, last = self._messages
      return self._chat.prompt_tokens([*earlier, last | {"content": last["content"] + text}])
    said = self._rollout.sampled[k - 1].completion.tokens
    message = self._rollout.turns[k - 1].observation + text
    return self._histories[k] + _continuation(self._chat).tokens(said, message)


@functools.lru_cache(maxsize=8)
def _continuation(chat: Chat) -> Continuation:
  return Continuation(chat)
