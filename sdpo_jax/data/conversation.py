"""Conversations as ids: what the policy sampled is never decoded and encoded again.

The prompt of the next turn is the earlier prompt, the ids that were sampled, and glue:

  the token that ends the assistant's turn, unless the response ended with it (one that was cut off
    at its limit did not)
  what the chat template writes before a message, the message, and what it writes from there to the
    next response; only this is encoded

The constant texts are read off the template once, from the conversation [user, assistant SENTINEL,
user MESSAGE]. Rendering two prefixes and subtracting them would be wrong: a template may render the
last response otherwise than earlier ones.

Whether the result is what the template makes of the whole conversation is tried out on a few
conversations, in some milliseconds. A `Finding` says what came out:

  exact     It is, text for text and id for id.
  kept      The glue is the template's, but it would write earlier responses otherwise than they
            were read and sampled: without their thoughts (Qwen3; with thinking off, without the
            empty block), or without white space at their ends (Llama 3). The history keeps what was
            sampled. Each prompt then extends the last, and one row trains the whole conversation.
            What the policy reads differs from the template where the reason says so.
  rendered  The template cannot be cut. Each turn's prompt is rendered anew, without the thoughts of
            earlier responses, and begins a row of its own; `Conversation.rendered_again` counts.
"""

import functools
import os
from typing import NamedTuple

from sdpo_jax import thought
from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import SettingError
from sdpo_jax.objectives.teacher_context import CLOSING, TEMPLATES, fill
from sdpo_jax.records import Completion, Rollout, Segment

SENTINEL, MESSAGE = "SENTINEL", "MESSAGE"  # words that no template holds
SPACED = f" \n{MESSAGE}\n "
# Turns that are tried out: (response, the message that answers it).
PLAIN = (
  ("Four.", "And 2 + 3?"),
  ("Five, I think", "naïve ∑ 汉字 \\n {{ x }} <|im_end|></think>"),
  ("No: 6", ""),
)
SPACES = ((" \nFour. \n", " \n\n  And 2 + 3? \n"), ("Five.", "\n"))


class Glue(NamedTuple):
  """What a chat template writes between two responses, around messages of one role."""

  end: int  # the token that ends the assistant's turn
  end_text: str
  before: str  # from there to the message
  after: str  # from the message to the next response
  strips: bool  # the template takes white space away from the ends of a message

  def text(self, message: str) -> str:
    """Returns all that follows the end of the turn; special tokens in `message` must be none."""
    return self.before + (message.strip() if self.strips else message) + self.after


class Finding(NamedTuple):
  """How a conversation goes on with one chat template."""

  way: str  # exact | kept | rendered
  reason: str  # what the template does otherwise; "" where exact


class Row(NamedTuple):
  """A prompt and what was sampled after it, as one row of a batch trains it; see `Rollout`."""

  prompt_tokens: list[int]
  tokens: list[int]
  logp: list[float]  # nats
  sampled: list[Segment]


class Continuation:
  """How conversations go on after a response, for one chat and for messages of one role."""

  def __init__(self, chat: Chat, role: str = "user"):
    """Cuts the template and tries the result out.

    SettingError where the template takes no conversation of two turns.
    """
    self.chat, self.role = chat, role
    self.glue, self.finding = None, None
    # worlds say many things again and again, and a tokenizer takes longer than they do
    self._encoded = functools.lru_cache(maxsize=1024)(chat.encode)
    beginnings = _beginnings(chat)
    glue = _cut(chat, beginnings[0], role)
    if isinstance(glue, str):
      self.finding = Finding("rendered", glue)
      return
    self.glue = glue
    self.finding = _try_out(self, beginnings)
    if self.finding.way == "rendered":
      self.glue = None

  def tokens(self, sampled: list[int], message: str) -> list[int]:
    """Returns the glue after a response: ids from what was sampled to the next response."""
    text = self.glue.text(self.chat.neutral(message))
    # Encoded behind the end of the turn, as it will stand there.
    tokens = self._encoded(self.glue.end_text + text)
    begin = 1 if sampled[-1:] == [self.glue.end] else 0
    return tokens[begin:]

  def describe(self) -> str:
    """Says in a line what the template does otherwise, and what is done then."""
    name = self.chat.tokenizer.name_or_path
    then = "the history keeps what was read and sampled"
    if self.finding.way == "rendered":
      then = "each turn's prompt is rendered as a whole"
    return f"conversations: the chat template of {name} {self.finding.reason}; {then}"


class Conversation:
  """One conversation. The policy says completions, somebody else answers with messages."""

  def __init__(self, continuation: Continuation, messages: list[dict[str, str]]):
    """messages: those before the first response, as for `Chat.prompt_tokens`."""
    self._continuation = continuation
    self._messages = list(messages)
    self.prompt = continuation.chat.prompt_tokens(messages)  # all so far; a response follows it
    self._before: list[int] = []  # what of it follows the last response
    self._rows = [Row(self.prompt, [], [], [])]

  @property
  def rendered_again(self) -> int:
    """Prompts that were rendered anew, since the template cannot be cut."""
    return len(self._rows) - 1

  def add_response(self, completion: Completion) -> None:
    """Adds what the engine sampled after `prompt`."""
    row = self._rows[-1]
    row.sampled.append(Segment(len(row.tokens), completion, tuple(self._before)))
    row.tokens.extend(completion.tokens)
    row.logp.extend(completion.logp)
    self.prompt = self.prompt + completion.tokens
    self._before = []

  def add_message(self, text: str) -> None:
    """Adds the message that answers the last response."""
    continuation, row = self._continuation, self._rows[-1]
    response = row.sampled[-1].completion.tokens
    if continuation.glue is not None:
      self._before = continuation.tokens(response, text)
      self.prompt = self.prompt + self._before
      return
    answer, _ = thought.split(continuation.chat.response_text(response))
    self._messages.append({"role": "assistant", "content": answer})
    self._messages.append({"role": continuation.role, "content": text})
    self.prompt = continuation.chat.prompt_tokens(self._messages)
    self._rows.append(Row(self.prompt, [], [], []))

  def rows(self) -> list[Row]:
    """Returns what a batch trains: one row, or one a turn where prompts were rendered anew."""
    return [row for row in self._rows if row.sampled]


def converse(
  continuation: Continuation, messages: list[dict[str, str]], turns: list[Rollout]
) -> Conversation:
  """Returns the conversation of a question, attempts at it and the feedback on each.

  The feedback stands in the words that a teacher reads by default.
  """
  conversation = Conversation(continuation, messages)
  for turn in turns:
    completion = Completion(turn.task.id, 0, turn.tokens, turn.logp, turn.finish_reason)
    conversation.add_response(completion)
    feedback = fill(TEMPLATES["feedback"], {"text": turn.feedback.text})
    conversation.add_message(feedback.lstrip() + CLOSING)
  return conversation


# ---- what a template does between turns ----------------------------------------------------------


def _beginnings(chat: Chat) -> list[list[dict[str, str]]]:
  """Returns what conversations may begin with: with and without a system message, as allowed."""
  question = {"role": "user", "content": "What is 2 + 2?"}
  candidates = [[question], [{"role": "system", "content": "Be brief."}, question]]
  allowed = []
  for messages in candidates:
    try:
      chat.fill(messages)
    except SettingError as error:
      refusal = error
    else:
      allowed.append(messages)
  if not allowed:
    raise refusal
  return allowed


def _cut(chat: Chat, beginning: list[dict[str, str]], role: str) -> Glue | str:
  """Returns the glue of a template, or why there is none."""
  following = []
  for message in (MESSAGE, SPACED):
    response = {"role": "assistant", "content": SENTINEL}
    text = chat.fill([*beginning, response, {"role": role, "content": message}])
    _, found, rest = text.rpartition(SENTINEL)
    if not found:
      return "leaves earlier responses out"
    following.append(rest)
  plain, spaced = following
  ends = [(token, chat.plain_text([token])) for token in chat.stop_tokens]
  end, end_text = next(((i, text) for i, text in ends if plain.startswith(text)), (None, ""))
  if end is None:
    return f"ends a response with {plain[:12]!r}, which begins with no stop token"
  before, found, after = plain[len(end_text) :].partition(MESSAGE)
  strips = spaced == plain
  if not found or not strips and spaced != plain.replace(MESSAGE, SPACED):
    return f"changes the text of {role} messages"
  return Glue(end, end_text, before, after, strips)


def _try_out(continuation: Continuation, beginnings: list[list[dict[str, str]]]) -> Finding:
  """Compares conversations with the template's own rendering, and says how they differ."""
  reasons = []
  for beginning in beginnings:
    for turns in _probes(continuation.chat, beginning):
      try:
        finding = _try_turns(continuation, beginning, turns)
      except SettingError:  # gpt-oss refuses thoughts in a message
        return Finding("rendered", "refuses one of the conversations that were tried out")
      if finding.way == "rendered":
        return finding
      if finding.way == "kept":
        reasons.append(finding.reason)
  if reasons:
    return Finding("kept", " and ".join(dict.fromkeys(reasons)))
  return Finding("exact", "")


def _probes(chat: Chat, beginning: list[dict[str, str]]) -> list[tuple[tuple[str, str], ...]]:
  """Returns conversations as turns of (response, message that answers it).

  The last one has thoughts, in the form that the template names. There is none where the template
  names no form, or closes an empty thought before the response.
  """
  probes = [PLAIN, SPACES]
  prompt = chat.fill(beginning)
  for form in thought.FORMS:
    if form.opening in str(chat.tokenizer.chat_template):
      if form.closing not in prompt:
        opening = "" if chat.response_text([]) else form.opening  # the template may have opened it
        response = f"{opening}\nhm\n{form.closing}\n\nFour."
        probes.append(((response, "Why?"), (response, "Sure?")))
      break
  return probes


def _try_turns(
  continuation: Continuation,
  beginning: list[dict[str, str]],
  turns: tuple[tuple[str, str], ...],
) -> Finding:
  """Compares one conversation after each of its turns; every second response is cut off."""
  chat, glue = continuation.chat, continuation.glue
  conversation = Conversation(continuation, beginning)
  messages, ours = list(beginning), chat.fill(beginning)
  reason = ""
  for number, (response, message) in enumerate(turns):
    tokens = chat.encode(response)
    stop = [] if number % 2 else [glue.end]
    logp = [0.0] * len(tokens + stop)
    conversation.add_response(Completion("", 0, tokens + stop, logp, "stop"))
    conversation.add_message(message)
    safe = chat.neutral(message)
    messages.append({"role": "assistant", "content": chat.response_text(tokens)})
    messages.append({"role": continuation.role, "content": safe})
    theirs, tail = chat.fill(messages), glue.end_text + glue.text(safe)
    ours += response + tail
    encoded, tail_tokens = chat.encode(theirs), continuation.tokens([], message)
    if not theirs.endswith(tail) or encoded[-len(tail_tokens) :] != tail_tokens:
      return Finding("rendered", "writes something else after a response in other conversations")
    if reason:
      continue
    if ours != theirs:
      reason = _difference(ours, theirs)
    # White space before a response may be encoded with the line break in front of it.
    elif not response[:1].isspace() and encoded != conversation.prompt:
      reason = "encodes a whole conversation otherwise than its parts"
  return Finding("kept" if reason else "exact", reason)


def _difference(ours: str, theirs: str) -> str:
  """Returns the first place at which a template departs from what was read and sampled."""
  begin = len(os.path.commonprefix([ours, theirs]))
  ours, theirs = ours[begin:], theirs[begin:]
  alike = len(os.path.commonprefix([ours[::-1], theirs[::-1]]))
  ours, theirs = ours[: len(ours) - alike], theirs[: len(theirs) - alike]
  if not theirs:
    return f"leaves {ours!r} out of earlier turns"
  return f"writes {theirs!r} for {ours!r} in earlier turns"
