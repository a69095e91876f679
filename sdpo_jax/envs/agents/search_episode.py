"""Search-R1's protocol as a conversation: what a message of the policy does, and what is shown.

The action of a message is its first complete <search>, else its first complete <answer>. Tags may
be in either case, and what stands inside a thought is no action. A turn is invalid without an
action, with both kinds, and with a tag twice. In the last two cases the action is carried out all
the same, as in the released loop.

An answer ends the episode, and so do `limit` turns; nothing is looked up in the last one. The
reward is 1 if the answer is an exact match (`search_answers.py`), else 0.

Source: arXiv:2503.09516 and its release, which continues one response instead of taking turns.
"""

import re
from typing import Callable

from sdpo_jax import thought
from sdpo_jax.envs.agents.search_answers import is_match
from sdpo_jax.records import Turn

INSTRUCTION = """\
Answer the question. In each turn, do one of two things:
- To look something up, write a query between <search> and </search>. What is found comes back \
between <information> and </information>.
- To end, write the answer, and nothing else, between <answer> and </answer>. For example, \
<answer>Beijing</answer>.
You have {limit} turns.

Question: {question}"""
INVALID = (
  "The action is invalid. To search, put the query between <search> and </search>. To give the "
  "final answer, put it between <answer> and </answer>."
)
NOTHING = "<information>Nothing was found.</information>"
RIGHT, WRONG = "The answer is right.", "The answer is wrong."
_TAGS = {kind: re.compile(f"<(/?){kind}>", re.IGNORECASE) for kind in ("search", "answer")}


def action_of(message: str) -> tuple[str, str, bool]:
  """Returns the kind of a message's action ("" for none), its text, and whether it is valid."""
  text, is_open = thought.split(message)
  if is_open:
    return "", "", False
  tags = {kind: list(tag.finditer(text)) for kind, tag in _TAGS.items()}
  openings = sum(not tag[1] for of_kind in tags.values() for tag in of_kind)
  for kind in tags:
    content = _between(text, tags[kind])
    if content is not None:
      return kind, content, openings == 1 and bool(content)
  return "", "", False


def _between(text: str, tags: list[re.Match]) -> str | None:
  """Returns what stands between the first opening tag and the next closing one; None without."""
  # No regular expression over both tags: its time would grow with the square of the text.
  start = None
  for tag in tags:
    if tag[1] and start is not None:
      return text[start : tag.start()].strip()
    if not tag[1] and start is None:
      start = tag.end()
  return None


def information(passages: list[str]) -> str:
  """Returns what a search shows: a line for each passage, whose first line is its title."""
  lines = []
  for number, passage in enumerate(passages, 1):
    title, _, text = passage.partition("\n")
    lines.append(f"Doc {number}(Title: {title}) {text}".strip())
  return f"<information>{chr(10).join(lines)}</information>" if lines else NOTHING


class SearchEpisode:
  """One question, which is searched for until it is answered; used once."""

  def __init__(self, question: str, golden: list[str], find: Callable, limit: int):
    """find(query): returns the passages that a search finds."""
    self._question, self._golden = question, golden
    self._find, self._limit = find, limit
    self._turns = 0

  def prompt(self) -> list[dict[str, str]]:
    """Returns the messages before the first turn."""
    text = INSTRUCTION.format(limit=self._limit, question=self._question)
    return [{"role": "user", "content": text}]

  def step(self, message: str) -> Turn:
    """Searches, or judges the answer. EngineFailed or RuntimeError if a search fails."""
    self._turns += 1
    kind, text, is_valid = action_of(message)
    if kind == "answer":
      is_right = is_match(text, self._golden)
      return Turn(RIGHT if is_right else WRONG, float(is_right), True, is_valid)
    if self._turns >= self._limit:
      return Turn(f"The {self._limit} turns are over without an answer.", 0.0, True, is_valid)
    if not kind:
      return Turn(INVALID, 0.0, False, is_valid)
    return Turn(information(self._find(text)), 0.0, False, is_valid)

  def close(self) -> None:
    """Ends the episode; nothing is held."""
