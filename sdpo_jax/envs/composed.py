"""Problems composed of a few operations in plain words: what TinyCode and the arithmetic task share.

An operation has *known* phrases, which the base model has read in pre-training. A level names some operations by a *novel* word
("blick") alone, whose meaning is drawn by `words_seed` and stands nowhere but in what a judge says. A scalar reward has to
stumble on it; feedback shows it.

Splits, disjoint by construction:
  train        statements whose hash does not fall into the held-out share
  heldout      other statements over the same words (two novel words make one statement: there it is another composition)
  unseen       compositions (ordered pairs and triples) that neither pre-training nor `train` ever shows
  adversarial  misleading paraphrases of train and held-out compositions: an operation that is named but must not be done
               ("reverse it (do not sort it)"), or the order of the sentence against the order of the steps ("B after you A")

Levels (`LEVELS`): how many operations a problem has, and how many of the vocabulary are named by a novel word.

Everything is a pure function of (domain, level, words_seed, split, index): any problem can be rebuilt from its id.
"""

import random
from typing import Callable, NamedTuple
import zlib

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
# name: (weights of one, two, three operations; share of the operations that are named by their
# novel word, the others by known phrases)
LEVELS = {
  "easy": ((1.0, 0.0, 0.0), 0.5),
  "default": ((0.2, 0.8, 0.0), 0.5),
  "hard": ((0.0, 1.0, 0.0), 1.0),
  "very_hard": ((0.0, 0.0, 1.0), 1.0),
}
SPLITS = ("train", "heldout", "unseen", "adversarial")
HEADERS = 2  # wordings of the frame around a statement
HELDOUT_SHARE, UNSEEN_SHARE = 0.2, 0.15


class Domain(NamedTuple):
  """What the operations work on."""

  phrases: dict[str, tuple[str, ...]]  # operation: its known phrases
  # length -> {(*operations, input type): input type}: those in which each operation matters
  compositions: Callable
  # (rng, operations, input type) -> details: inputs, tests, whatever the problem is about
  draw: Callable
  # (body, input type, details, header) -> what the user says
  statement: Callable
  # (operations, details) -> (reference response, what the judge needs)
  answer: Callable
  types: dict[str, dict[str, str]]  # operation: {type it takes: type it gives}
  # (attempted operations, operations, details) -> what a judge says of the attempt; "" if it is
  # right
  complain: Callable
  # (response, operations, input type, details) -> bool, without running anything but our own
  # operations
  solves: Callable


def novel_phrase(word: str) -> str:
  return f"{word} it"


def novel_meanings(operations, words_seed: int) -> dict[str, str]:
  """{operation: its novel word}, in random order. The only place where the meaning of a novel word is written down."""
  rng = random.Random(f"words/{words_seed}")
  return dict(
    zip(rng.sample(list(operations), len(operations)), rng.sample(NOVEL_WORDS, len(operations)))
  )


def _share(*key) -> float:
  """A number in [0, 1) that depends on the key alone: the same on every machine and in every process."""
  return zlib.crc32(repr(key).encode()) / 2**32


def is_unseen(ops: tuple[str, ...]) -> bool:
  return len(ops) > 1 and _share("unseen", *ops) < UNSEEN_SHARE


def is_heldout(phrases, kind: str, header: int) -> bool:
  """A single operation is held out under one header at most: without its phrase, `train` could not teach what its word means."""
  if len(phrases) > 1:
    return _share("heldout", *phrases) < HELDOUT_SHARE
  # one of the two headers, or neither
  return int(_share("heldout", *phrases, kind) / HELDOUT_SHARE) == header


def body(phrases, *, twist: str | None = None, distractor: str = "") -> str:
  """The steps as one sentence. twist: None | "not" (names something that must not be done) | "order" (last step first)."""
  phrases = list(phrases)
  if twist == "not":
    phrases[-1] = f"{phrases[-1]} (do not {distractor})"
  return (
    f"{phrases[-1]} after you {', then '.join(phrases[:-1])}"
    if twist == "order" and len(phrases) > 1
    else ", then ".join(phrases)
  )


class Problems:
  """The problem generator: `task(split, index)` is a pure function of the arguments and the settings."""

  def __init__(self, domain: Domain, level: str = "default", words_seed: int = 0):
    if level not in LEVELS:
      raise ValueError(f"config.env.level={level!r} is unknown; choose from {sorted(LEVELS)}")
    self.domain, self.level, self.words_seed = domain, level, words_seed
    weights, novel = LEVELS[level]
    self.words = dict(
      list(novel_meanings(domain.phrases, words_seed).items())[: round(novel * len(domain.phrases))]
    )
    self.weights = {n: w for n, w in enumerate(weights, 1) if w}
    self._keys = {
      (n, unseen): [k for k in domain.compositions(n) if is_unseen(k[:-1]) == unseen]
      for n in self.weights
      for unseen in (False, True)
    }

  def task(self, split: str, index: int) -> Task:
    rng = random.Random(f"{self.level}/{self.words_seed}/{split}/{index}")
    lengths = [n for n in self.weights if self._keys[n, split == "unseen"]]
    if split not in SPLITS or not lengths:
      raise ValueError(
        f"split {split!r} is empty at level {self.level!r}; choose from {[s for s in SPLITS if s != split]}"
      )
    while True:  # rejection: until the statement falls into the split
      n = rng.choices(lengths, [self.weights[n] for n in lengths])[0]
      *ops, kind = rng.choice(self._keys[n, split == "unseen"])
      phrases = [self._phrase(rng, o) for o in ops]
      header = rng.randrange(HEADERS)
      twist = None
      if split == "adversarial":
        twist = rng.choice(("not", "order")) if n > 1 else "not"
      elif split != "unseen" and is_heldout(phrases, kind, header) != (split == "heldout"):
        continue
      distractor = self._phrase(rng, rng.choice([o for o in self.domain.phrases if o not in ops]))
      details = self.domain.draw(rng, ops, kind)
      solution, data = self.domain.answer(ops, details)
      return Task(
        id=f"{self.level}/{self.words_seed}/{split}/{index}",
        split=split,
        solution=solution,
        prompt=self.domain.statement(
          body(phrases, twist=twist, distractor=distractor), kind, details, header
        ),
        data={**data, "ops": list(ops), "phrases": phrases},
      )

  def _phrase(self, rng: random.Random, op: str) -> str:
    return novel_phrase(self.words[op]) if op in self.words else rng.choice(self.domain.phrases[op])
