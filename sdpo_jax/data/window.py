"""Makes the prompts of rows as turns: the first messages of an episode, and a window of its turns.

Each turn is sampled from a prompt that the chat template renders anew: the first messages, then the
last few turns, the policy's message without its thoughts and the world's answer to each. Where
earlier turns are left out, a line behind the first messages says so. It stands there, and not
before them, so that all prompts to one question begin alike.

The history is text that was decoded, as the template writes it; what is sampled behind it is
trained as it is. Source: the released loop of SDAR, whose history holds two turns. There a turn
comes with the observation before it, so that its prompts show one observation more.
"""

from collections.abc import Callable, Sequence
import functools

from sdpo_jax import thought
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.conversation import Row
from sdpo_jax.records import Completion, Rollout, Segment

Messages = list[dict[str, str]]

OMITTED = "\n\n(Earlier turns are left out.)"


def window(
  first: Messages, said: Sequence[str], answers: Sequence[str], k: int, history: int
) -> Messages:
  """Returns the messages that turn k, counted from 0, is sampled after.

  Args:
    first: the messages before turn 0; the last one is the user's.
    said: what the policy said in each turn, without its thoughts.
    answers: what the world said to each.
    k: turns that are over. What `said` and `answers` hold beyond them is not read.
    history: the most turns that are shown; 0: none, not even the world's last answer.
  """
  begin = max(0, k - history)
  *earlier, last = first
  if begin:
    last = last | {"content": last["content"] + OMITTED}
  messages = [*earlier, last]
  for message, answer in zip(said[begin:k], answers[begin:k], strict=True):
    messages.append({"role": "assistant", "content": message})
    messages.append({"role": "user", "content": answer})
  return messages


def windows(chat: Chat, rollout: Rollout, history: int) -> list[Callable[[Messages], Messages]]:
  """Returns, for each turn of an episode, what makes its messages from the first ones."""
  said = [message_of(chat.response_text(s.completion.tokens)) for s in rollout.sampled]
  answers = [turn.observation for turn in rollout.turns]
  return [
    functools.partial(window, said=said, answers=answers, k=k, history=history)
    for k in range(len(said))
  ]


def message_of(text: str) -> str:
  """Returns what a turn of the policy says without its thoughts; "" where a thought is open."""
  message, is_open = thought.split(text)
  return "" if is_open else message.strip()


class WindowedConversation:
  """One episode of which each turn has a prompt of its own; used as a `Conversation` is."""

  def __init__(self, chat: Chat, messages: Messages, history: int):
    """messages: those before the first turn, as for `Chat.prompt_tokens`."""
    self._chat, self._first, self._history = chat, list(messages), history
    self.prompt = chat.prompt_tokens(messages)  # of the next turn
    self._row = Row(self.prompt, [], [], [])
    self._said: list[str] = []
    self._answers: list[str] = []

  def add_response(self, completion: Completion) -> None:
    """Adds what the engine sampled after `prompt`."""
    row = self._row
    segment = Segment(len(row.tokens), completion, prompt=tuple(self.prompt))
    row.sampled.append(segment)
    row.tokens.extend(completion.tokens)
    row.logp.extend(completion.logp)
    self._said.append(message_of(self._chat.response_text(completion.tokens)))

  def add_message(self, text: str) -> None:
    """Adds the message that answers the last response."""
    self._answers.append(text)
    k = len(self._answers)
    messages = window(self._first, self._said, self._answers, k, self._history)
    self.prompt = self._chat.prompt_tokens(messages)

  def rows(self) -> list[Row]:
    """Returns the episode; each part of what was sampled names its own prompt."""
    return [self._row]
