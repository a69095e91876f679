"""Makes short instructions that a program can check, in IFEval's form, for a real model.

A question asks for a few words on a topic, among them a word that names it, and puts one to three
constraints on them:

    Write a short note about a lost key. Use the word key. Do not use any commas. Use less than 20
    words.

Without the word, one text that follows many kinds of constraint would be right for a third of the
questions, and a model could earn its reward without reading them.

The checks, the feedback and the reward are IFEval's (`ifeval.py`). `instruction_words.py` has the
topics, the requests and the constraints, fourteen kinds of them, each in two wordings and in two
that only the split `adversarial` uses. There is no reference solution.

Splits. A *combination* is a topic with its kinds of constraint; a hash gives each to one of train,
heldout, tune and adversarial, so that no question is in two of them:
  train        combinations that the model learns from
  heldout      other combinations of the same topics and the same sets of kinds
  tune         likewise, to choose settings by
  unseen       sets of kinds with a pair in them that no other split shows
  adversarial  other combinations, with constraints in indirect wordings, before the request or
               beside a sentence that has nothing to do with it

A question has at most one constraint of a group (case, length, words, frame, marks), and no two
that exclude each other (`ifeval_conflicts.py`).

A text that a question demands has the case that it demands. `Task.data` says `difficulty`, the
number of constraints beside the word, and `kind`, their names in alphabetical order. Everything is
a pure function of split and index.
"""

import dataclasses
import itertools
import random
import zlib

from sdpo_jax.envs import ifeval_conflicts
from sdpo_jax.envs.ifeval import IFEval
from sdpo_jax.envs.instruction_words import DISTRACTIONS, KINDS, REQUESTS, TOPIC_WORD, TOPICS, Kind
from sdpo_jax.errors import unknown
from sdpo_jax.records import Feedback, Task

SPLITS = ("train", "heldout", "tune", "unseen", "adversarial")
# Split: the part of [0, 1) into which the hashes of its combinations fall; all else is train's.
_SHARES = {"heldout": (0.0, 0.15), "tune": (0.15, 0.25), "adversarial": (0.25, 0.4)}
UNSEEN_SHARE = 0.2  # of the pairs of kinds
COUNTS = {1: 0.6, 2: 0.35, 3: 0.05}  # constraints a question: share of the questions
_TWISTS = ("order", "distraction", "both")


def _share(*key) -> float:
  """Returns a number in [0, 1) that depends on the key alone, on any machine and process."""
  return zlib.crc32(repr(key).encode()) / 2**32


def has_unseen_pair(kinds) -> bool:
  """Tells whether a set of kinds of constraint belongs to the split `unseen`."""
  pairs = itertools.combinations(sorted(kinds), 2)
  return any(_share("unseen", *pair) < UNSEEN_SHARE for pair in pairs)


def split_of(topic: str, kinds) -> str:
  """Returns the only split that asks about a topic with these kinds of constraint."""
  if has_unseen_pair(kinds):
    return "unseen"
  share = _share(topic, *sorted(kinds))
  return next((s for s, (low, high) in _SHARES.items() if low <= share < high), "train")


class Instructions:
  """Asks the questions, and has IFEval judge the responses."""

  def __init__(self):
    self._ifeval = IFEval()

  def task(self, split: str, index: int) -> Task:
    """Returns a question of a split."""
    if split not in SPLITS:
      raise ValueError(unknown("split", split, SPLITS))
    rng = random.Random(f"instructions/{split}/{index}")
    topic, kinds = _draw_combination(rng, split)
    constraints = _draw_arguments(rng, topic, kinds)
    row = {
      "key": index,
      "prompt": _text(rng, split, topic, constraints),
      "instruction_id_list": [kind.constraint for kind, _ in constraints],
      "kwargs": [arguments for _, arguments in constraints],
    }
    task = self._ifeval.task_from_row(row, split)
    task.data.update(kind=" + ".join(sorted(kinds)), difficulty=len(kinds), topic=topic)
    return dataclasses.replace(task, id=f"instructions/{split}/{index}")

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the question."""
    return self._ifeval.prompt(task)

  def judge(self, task: Task, response: str) -> Feedback:
    """Runs IFEval's checks of all constraints of the question."""
    return self._ifeval.judge(task, response)


def _draw_combination(rng: random.Random, split: str) -> tuple[str, list[str]]:
  """Draws a topic and kinds of constraint until they belong to the split."""
  counts = {count: share for count, share in COUNTS.items() if count > 1 or split != "unseen"}
  (count,) = rng.choices(list(counts), counts.values())
  while True:
    topic, kinds = rng.choice(TOPICS), rng.sample(list(KINDS), count)
    groups = {KINDS[kind].group for kind in kinds}
    if len(groups) == count and split_of(topic, kinds) == split:
      return topic, kinds


def _draw_arguments(rng: random.Random, topic: str, kinds: list[str]) -> list[tuple[Kind, dict]]:
  """Draws arguments of each constraint until a response can follow them all."""
  topic_word = (TOPIC_WORD, {"keywords": [topic.split()[-1]]})
  while True:
    drawn = [topic_word, *((KINDS[kind], KINDS[kind].draw(rng)) for kind in kinds)]
    constraints = [(kind, _in_case(arguments, kinds)) for kind, arguments in drawn]
    if (
      ifeval_conflicts.find([(kind.constraint, arguments) for kind, arguments in constraints])
      is None
    ):
      return constraints


def _in_case(arguments: dict, kinds: list[str]) -> dict:
  """Returns the arguments with their texts in the case that the question demands, if any."""
  if "small_letters" not in kinds and "capitals" not in kinds:
    return arguments
  change = str.lower if "small_letters" in kinds else str.upper

  def changed(name, value):
    if name == "relation":  # of two numbers
      return value
    if isinstance(value, list):
      return [change(text) for text in value]
    return change(value) if isinstance(value, str) else value

  return {name: changed(name, value) for name, value in arguments.items()}


def _text(rng: random.Random, split: str, topic: str, constraints: list[tuple[Kind, dict]]) -> str:
  """Returns the question in the words of its split."""
  request = rng.choice(REQUESTS).format(topic)
  if split != "adversarial":
    return " ".join([request, *(_wording(rng, k.wordings, a) for k, a in constraints)])
  demands = [_wording(rng, kind.others, a) for kind, a in constraints]
  twist = rng.choice(_TWISTS)
  if twist != "order":
    demands.insert(rng.randrange(len(demands) + 1), rng.choice(DISTRACTIONS))
  sentences = [request, *demands] if twist == "distraction" else [*demands, request]
  return " ".join(sentences)


def _wording(rng: random.Random, wordings: tuple[str, ...], arguments: dict) -> str:
  """Returns a constraint in words, its lists joined by commas."""
  texts = {
    name: ", ".join(value) if isinstance(value, list) else value
    for name, value in arguments.items()
  }
  return rng.choice(wordings).format(**texts)
