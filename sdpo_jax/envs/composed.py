"""Makes problems composed of a few operations in plain words, for TinyCode and Arithmetic.

An operation has *known* phrases, which the base model has read in pre-training. A level names some
operations by a *novel* word ("blick") alone. `words_seed` draws the meaning of that word, which
stands nowhere but in what a judge says. A scalar reward has to stumble on it; feedback shows it.

Splits, disjoint by construction:
  train        statements whose hash does not fall into the held-out share
  heldout      other statements over the same words (two novel words make one statement: there it
               is another composition)
  tune         drawn like heldout, to choose settings by; of the compositions, statements that none
               of the first HELDOUT_ASKED questions of heldout shows
  unseen       compositions (ordered pairs and triples) that neither pre-training nor `train` ever
               shows
  adversarial  misleading paraphrases of train and held-out compositions: an operation that is
               named but must not be done ("reverse it (do not sort it)"), or the order of the
               sentence against the order of the steps ("B after you A")

There are so few statements that heldout shows each of them in the end. So tune is disjoint from as
many of its questions as an evaluation asks, and from the other splits as a whole. At the level hard
it has a handful of statements, with new tests each time; at the level easy TinyCode has none.

Levels (`LEVELS`) say how many operations a problem has, and how many of the vocabulary are named
by a novel word.

With stages, the novel words are taught group after group: so many questions of train name words of
the first group alone, as many then words of the second, and all further ones words of the last.
What is forgotten shows on the splits stage_1, stage_2, ...: each is drawn like heldout, with words
of one group. The other splits are what they are without stages.

Everything is a pure function of the settings, the split and the index, so any problem can be
rebuilt from its id.
"""

import dataclasses
import functools
import itertools
import random
from typing import Callable, NamedTuple
import zlib

from sdpo_jax.errors import unknown
from sdpo_jax.records import Task

# More words than any domain has operations, so that pre-training sees more words than meanings and
# no word is tied to the last meaning left.
NOVEL_WORDS = (
  "blick",
  "dax",
  "wug",
  "fep",
  "toma",
  "zib",
  "gorp",
  "lorp",
  "mimsy",
  "rell",
  "snid",
  "vash",
  "plim",
  "quor",
  "jent",
  "krat",
  "hob",
  "yolt",
  "drim",
  "stave",
  "frop",
  "glim",
  "nork",
  "pell",
  "tiv",
  "ulm",
)
# Name: (weights of one, two, three operations; share of the operations that are named by their
# novel word, the others by known phrases).
LEVELS = {
  "easy": ((1.0, 0.0, 0.0), 0.5),
  "default": ((0.2, 0.8, 0.0), 0.5),
  "hard": ((0.0, 1.0, 0.0), 1.0),
  "very_hard": ((0.0, 0.0, 1.0), 1.0),
}
SPLITS = ("train", "heldout", "tune", "unseen", "adversarial")
HEADERS = 2  # wordings of the frame around a statement
HELDOUT_SHARE = 0.2
UNSEEN_SHARE = 0.15
HELDOUT_ASKED = 100  # questions of heldout, from the first on, whose statements tune leaves out
_STAGE_DRAWS = 10_000  # draws after which a stage is taken to have no statement in a split
_TUNE_DRAWS = 1000  # draws after which a level is taken to have no statement left for tune


class Domain(NamedTuple):
  """Describes a vocabulary of operations and what they work on.

  `ops` are names of operations, in order; `kind` is the type of the input; `details` are inputs,
  tests, whatever the domain's problem is about.
  """

  # Operation: its known phrases.
  phrases: dict[str, tuple[str, ...]]
  # (length) -> {(*ops, kind): kind}, the compositions in which each operation matters.
  compositions: Callable
  # (rng, ops, kind) -> details.
  draw: Callable
  # (body, kind, details, header) -> what the user says.
  statement: Callable
  # (ops, details) -> (reference response, what the judge needs).
  answer: Callable
  # Operation: {type it takes: type it gives}.
  types: dict[str, dict[str, str]]
  # (attempted ops, ops, details) -> what a judge says of the attempt; "" if it is right.
  complain: Callable
  # (response, ops, kind, details) -> bool; it runs nothing but our own operations.
  solves: Callable


def novel_phrase(word: str) -> str:
  """Returns the phrase by which a novel word names its operation."""
  return f"{word} it"


def novel_meanings(operations, words_seed: int) -> dict[str, str]:
  """Returns {operation: its novel word}, in random order.

  This is the only place where the meaning of a novel word is written down.
  """
  rng = random.Random(f"words/{words_seed}")
  order = rng.sample(list(operations), len(operations))
  words = rng.sample(NOVEL_WORDS, len(operations))
  return dict(zip(order, words, strict=True))


def _share(*key) -> float:
  """Returns a number in [0, 1) that depends on the key alone, on any machine and process."""
  return zlib.crc32(repr(key).encode()) / 2**32


def is_unseen(ops: tuple[str, ...]) -> bool:
  """Tells whether a composition belongs to the split `unseen`."""
  return len(ops) > 1 and _share("unseen", *ops) < UNSEEN_SHARE


def is_heldout(phrases, kind: str, header: int) -> bool:
  """Tells whether a statement belongs to the split `heldout`.

  A single operation is held out under one header at most: without its phrase, `train` could not
  teach what its word means.
  """
  if len(phrases) > 1:
    return _share("heldout", *phrases) < HELDOUT_SHARE
  # The number is one of the two headers, or that of neither.
  return int(_share("heldout", *phrases, kind) / HELDOUT_SHARE) == header


def body(phrases, *, twist: str | None = None, distractor: str = "") -> str:
  """Returns the steps as one sentence.

  twist
      None; "not" also names the distractor, which must not be done; "order" names the last step
      first
  """
  *first, last = phrases
  if twist == "not":
    last = f"{last} (do not {distractor})"
  if twist == "order" and first:
    return f"{last} after you {', then '.join(first)}"
  return ", then ".join([*first, last])


def _question(task: Task):
  """Returns what two questions share if they are the same one.

  Compositions are the same whatever the frame around their phrases, single operations are not.
  """
  phrases = tuple(task.data["phrases"])
  return phrases if len(phrases) > 1 else task.prompt


class Problems:
  """Generates problems; each is a pure function of the settings, its split and its index."""

  def __init__(
    self,
    domain: Domain,
    level: str = "default",
    words_seed: int = 0,
    stages: int = 1,
    stage_questions: int = 0,
  ):
    """Prepares to draw problems.

    stages, stage_questions: groups of novel words, and the questions of train of each but the last.
    """
    if level not in LEVELS:
      raise ValueError(unknown("config.env.level", level, sorted(LEVELS)))
    self.domain = domain
    self.level = level
    self.words_seed = words_seed
    weights, novel_share = LEVELS[level]
    meanings = novel_meanings(domain.phrases, words_seed)
    novel_count = round(novel_share * len(domain.phrases))
    # Operation: its novel word, for those that the level names by one.
    self.words = dict(list(meanings.items())[:novel_count])
    if stages > novel_count:
      raise ValueError(
        f"config.env.stages={stages} must be at most {novel_count}, the novel words of level "
        f"{level!r}"
      )
    if stages > 1 and stage_questions < 1:
      raise ValueError(f"config.env.stage_questions={stage_questions} must be at least 1")
    self.stage_questions = stage_questions
    # Stage: the operations that it names by a novel word; nothing where there is one stage alone.
    names = list(self.words)
    self._stages = [set(names[i::stages]) for i in range(stages)] if stages > 1 else []
    # Number of operations: its weight.
    self.weights = {length: weight for length, weight in enumerate(weights, 1) if weight}
    # (Number of operations, whether unseen): compositions, as Domain.compositions has them.
    self._compositions = {}
    for length in self.weights:
      for unseen in (False, True):
        self._compositions[length, unseen] = [
          key for key in domain.compositions(length) if is_unseen(key[:-1]) == unseen
        ]
    for split in self.stage_splits:  # a group without a statement is refused at once
      self.task(split, 0)
    for stage in range(len(self._stages)):
      self.task("train", stage * stage_questions)

  def task(self, split: str, index: int) -> Task:
    """Returns a problem of a split. ValueError if the level has none of that split."""
    name = f"{self.level}/{self.words_seed}/{split}/{index}"
    rng = random.Random(name)
    if self._stages and split == "train":
      stage = min(index // self.stage_questions, len(self._stages) - 1)
      return self._draw(rng, split, f"{name}/{self._name(stage)}", self._stages[stage])
    if split in self.stage_splits:
      stage = self.stage_splits.index(split)
      name = f"{self.level}/{self.words_seed}/{self._name(stage)}/{index}"
      return dataclasses.replace(self._draw(rng, "heldout", name, self._stages[stage]), split=split)
    if split != "tune":
      return self._draw(rng, split, name)
    for _ in range(_TUNE_DRAWS):
      task = self._draw(rng, "heldout", name)
      if _question(task) not in self._asked:
        return dataclasses.replace(task, split=split)
    raise self._is_empty(split)

  def _name(self, stage: int) -> str:
    """Names a stage in ids: which group it is, and of how many."""
    return f"stage_{stage + 1}of{len(self._stages)}"

  @property
  def stage_splits(self) -> list[str]:
    """The splits of single stages, in the order in which they are taught."""
    return [f"stage_{i}" for i in range(1, len(self._stages) + 1)]

  @functools.cached_property
  def _asked(self) -> set:
    """The questions of heldout that may be reported."""
    return {_question(self.task("heldout", i)) for i in range(HELDOUT_ASKED)}

  def _is_empty(self, split: str) -> ValueError:
    return ValueError(
      f"split {split!r} is empty at level {self.level!r}; "
      f"choose from {[s for s in (*SPLITS, *self.stage_splits) if s != split]}"
    )

  def _draw(self, rng: random.Random, split: str, name: str, novel: set | None = None) -> Task:
    """Draws a problem of a split and gives it the name. ValueError if the level has none.

    novel: at least one operation is of these, and no other one is named by a novel word.
    """
    unseen = split == "unseen"
    lengths = [length for length in self.weights if self._compositions[length, unseen]]
    if split not in SPLITS or not lengths:
      raise self._is_empty(split)
    for draws in itertools.count():  # Rejects statements until one falls into the split.
      if novel is not None and draws == _STAGE_DRAWS:
        raise ValueError(
          f"config.env.stages={len(self._stages)} leaves a group of words without a question of "
          f"split {split!r} at level {self.level!r}; take fewer stages"
        )
      (length,) = rng.choices(lengths, [self.weights[n] for n in lengths])
      *ops, kind = rng.choice(self._compositions[length, unseen])
      if novel is not None:
        named = self.words.keys() & set(ops)
        if not named or not named <= novel:
          continue
      phrases = [self._phrase(rng, op) for op in ops]
      header = rng.randrange(HEADERS)
      if split in ("unseen", "adversarial"):
        break
      if is_heldout(phrases, kind, header) == (split == "heldout"):
        break
    twist = None
    if split == "adversarial":
      twist = rng.choice(("not", "order")) if length > 1 else "not"
    distractor = self._phrase(rng, rng.choice([o for o in self.domain.phrases if o not in ops]))
    details = self.domain.draw(rng, ops, kind)
    solution, judge_data = self.domain.answer(ops, details)
    sentence = body(phrases, twist=twist, distractor=distractor)
    return Task(
      id=name,
      split=split,
      solution=solution,
      prompt=self.domain.statement(sentence, kind, details, header),
      data={**judge_data, "ops": list(ops), "phrases": phrases, "difficulty": length},
    )

  def _phrase(self, rng: random.Random, op: str) -> str:
    """Draws a phrase that names an operation at this level."""
    if op in self.words:
      return novel_phrase(self.words[op])
    return rng.choice(self.domain.phrases[op])
