"""A teacher context of hints that the policy writes in hindsight (HERO, arXiv 2606.11559).

After an episode the policy reads all of it, with its outcome, and writes as JSON what should have
gone otherwise in single turns, or nothing (`sdpo_jax/hindsight.py` samples it). Before a turn with
a hint, the teacher reads the episode up to there, the outcome and the hint, and nothing else of
what comes later. Other turns have no reading, and turns with one count alike, however long. An
episode without a hint has no teacher.

Not the paper's: all words, and that a hint stands behind the observation before its turn.

Host code: text in, text out. What the policy writes may be anything at all; `read_hints` says what
of it is a hint.
"""

from collections.abc import Iterator
import itertools
import json
import re
from typing import NamedTuple

from sdpo_jax.objectives.teacher_context import Context, fill, without_thinking
from sdpo_jax.records import Rollout, Status
from sdpo_jax.text import MAX_CHARS, clean, cut

REFLECTING = (
  "{prompt}\n\nAn attempt at this is over. Each turn has its number, what was written and, below "
  "that, the answer to it.\n\n{attempt}\n{outcome}\n\n"
  "Which turns should have gone otherwise? Reply with a JSON list that has an entry for each of "
  'them, as [{"turn": 2, "diagnosis": "what is wrong with it", "action": "what to write instead"}].'
  ' Leave "action" out where you know none, and reply [] where no turn should change.'
)
HINT = "\n\n{outcome} Looking back, of what you do now: {diagnosis}{action}"
ACTION = "\nBetter would be: {text}"
SUCCESS, FAILURE = "The attempt succeeded.", "The attempt failed."
MOST_OPENINGS = 1000  # brackets of an answer that are looked at: some milliseconds each at worst


class Hint(NamedTuple):
  """What the policy says of one turn."""

  diagnosis: str
  action: str  # what to do instead; "": it names nothing


class Hints(NamedTuple):
  """What there is in one answer of the policy."""

  of: dict[int, Hint]  # by turn, counted from 0
  refused: int  # entries of its JSON that are no hint
  has_json: bool  # whether any list or object stands in it


class Hindsight:
  """Shows, before each turn of an episode that has one, the outcome and the hint.

  hint_tokens: the most that the policy writes of an episode.
  success_threshold: the least reward of a success.
  reflecting: what the policy reads then, with {prompt}, {attempt} and {outcome}.
  hint: what the teacher reads behind the observation, with {outcome}, {diagnosis} and {action};
    action: how a corrected action stands there, with {text}.
  """

  by_turn = True
  made_of = "hints that the policy writes as JSON"

  def __init__(
    self,
    *,
    hint_tokens: int = 512,
    success_threshold: float = 0.5,
    reflecting: str = REFLECTING,
    hint: str = HINT,
    action: str = ACTION,
  ):
    fill(reflecting, dict.fromkeys(("prompt", "attempt", "outcome"), ""))
    fill(hint, dict.fromkeys(("outcome", "diagnosis", "action"), ""))
    fill(action, {"text": ""})
    self.hint_tokens, self.success_threshold = hint_tokens, success_threshold
    self._reflecting, self._hint, self._action = reflecting, hint, action

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    rollout = group[i]
    if rollout.feedback.status is Status.ENV_FAILED or not rollout.reflection:
      return None
    hints = read_hints(rollout.reflection, len(rollout.turns)).of
    if not hints:
      return None
    outcome, texts = self._outcome(rollout), [""] * len(rollout.turns)
    for k, (diagnosis, action) in hints.items():
      better = fill(self._action, {"text": action}) if action else ""
      texts[k] = fill(self._hint, dict(outcome=outcome, diagnosis=diagnosis, action=better))
    return Context(turns=tuple(texts), turns_alike=True)

  def reflect_on(self, rollout: Rollout, messages: list[str]) -> Context:
    """Returns what the policy reads in hindsight. messages: its own, without thoughts, by turn."""
    attempt = "".join(
      f"{k + 1}> {message}\n{turn.observation}\n"
      for k, (message, turn) in enumerate(zip(messages, rollout.turns))
    )
    template = self._reflecting.replace("{outcome}", "{remark}")
    templates = (("reprompt", template), ("attempt", "{text}"))
    return Context(attempt=attempt, remark=self._outcome(rollout), templates=templates)

  def _outcome(self, rollout: Rollout) -> str:
    return SUCCESS if rollout.feedback.reward >= self.success_threshold else FAILURE


def read_hints(answer: str, turns: int) -> Hints:
  """Finds the hints in an answer that may be anything.

  Entries are {"turn": int, "diagnosis": str, "action": str}, with turns counted from 1 and the
  action left out or null where there is none. They stand in lists, also in one that is a value of
  an object, or alone, anywhere behind the thought of an answer. Entries of another form are
  refused: a turn that there is not, or not any more, and what is not a text or is blank. Texts are
  cleaned and cut as feedback is.
  """
  hints: dict[int, Hint] = {}
  refused, has_json = 0, False
  for value in _json_values(without_thinking(answer)):
    has_json = True
    for entry in _entries(value):
      turn, hint = _hint(entry)
      if hint is None or not 1 <= turn <= turns or turn - 1 in hints:
        refused += 1
      else:
        hints[turn - 1] = hint
  return Hints(hints, refused, has_json)


def _json_values(text: str) -> Iterator[list | dict]:
  """Yields the lists and objects of a text, in order, but those that lie in another one."""
  decoder, end = json.JSONDecoder(), 0
  for opening in itertools.islice(re.finditer(r"[\[{]", text), MOST_OPENINGS):
    if opening.start() < end:
      continue
    try:
      value, end = decoder.raw_decode(text, opening.start())
    except (ValueError, RecursionError):  # prose around JSON, what was cut off, or too deep
      continue
    yield value


def _entries(value: list | dict) -> list:
  if isinstance(value, dict) and "turn" not in value:
    value = next((x for x in value.values() if isinstance(x, list)), value)
  return value if isinstance(value, list) else [value]


def _hint(entry) -> tuple[int, Hint | None]:
  """Returns what an entry says, and of which turn, counted from 1; None: it is no hint."""
  fields = entry if isinstance(entry, dict) else {}
  turn, diagnosis, action = (fields.get(key) for key in ("turn", "diagnosis", "action"))
  texts = [diagnosis, "" if action is None else action]
  if type(turn) is not int or not all(isinstance(text, str) for text in texts):
    return 0, None
  diagnosis, action = (cut(clean(text), MAX_CHARS).strip() for text in texts)
  return turn, Hint(diagnosis, action) if diagnosis else None
