"""Makes a small world of people, places and works, its passages, and questions about it.

  "Velora Tamin"                                     (a title line, then the text)
  Velora Tamin had the profession of painter. The birthplace is Morvane, the year of birth is 1843.
  The teacher was Velora Kesh.

  one hop      What is the birthplace of Velora Tamin?
  two hops     What is the birthplace of the author of The Lantern of Orvi?
  comparison   Who was born earlier, Velora Tamin or Sadu Kesh?

Names are made of syllables, so no model knows anything of it. Each has near duplicates: people
share first and last names, places and works share words, so that the first passage found is not
always the right one.

A question's template is its kind and its relations. Of these, 30 % belong to the split `unseen`, by
hash, and appear nowhere else. The questions of the other templates are dealt out by hash too: no
question of `train` stands in `tune` or `heldout`.

Everything is a pure function of (seed, size, split, index).
"""

import random
from typing import NamedTuple
import zlib

SPLITS = ("train", "tune", "heldout", "unseen")
UNSEEN_SHARE = 0.3  # of the templates
HELDOUT_SHARE = 0.1  # of the questions of the others; as many are in `tune`
PEOPLE_SHARE, PLACES_SHARE = 0.35, 0.2  # of the passages; the rest are about works
PROFESSIONS = ("painter", "sculptor", "botanist", "physician", "composer", "architect", "poet")
FORMS = ("novel", "opera", "ballet", "poem", "play", "film")
NOUNS = ("Lantern", "Garden", "Mirror", "Harbour", "Winter", "Bridge", "Orchard", "Shadow")
PREFIXES = ("", "New ", "Upper ", "Little ")
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"

# Relation: how a question names it; "{}" stands for what it is a relation of.
PHRASES = {
  "profession": "the profession of {}",
  "birthplace": "the birthplace of {}",
  "birth year": "the year of birth of {}",
  "teacher": "the teacher of {}",
  "river": "the river at {}",
  "founder": "the founder of {}",
  "inhabitants": "the number of inhabitants of {}",
  "form": "the form of {}",
  "author": "the author of {}",
  "year": "the year of publication of {}",
  "setting": "the place in which {} is set",
}
# Sort of thing: its relations, and what sort each leads to; "": to a word or a number.
RELATIONS = {
  "person": {"profession": "", "birthplace": "place", "birth year": "", "teacher": "person"},
  "place": {"river": "", "founder": "person", "inhabitants": ""},
  "work": {"form": "", "author": "person", "year": "", "setting": "place"},
}
# Relation by which two things are compared: the question for the smaller, that for the larger.
COMPARISONS = {
  "birth year": ("Who was born earlier, {} or {}?", "Who was born later, {} or {}?"),
  "inhabitants": (
    "Which has fewer inhabitants, {} or {}?",
    "Which has more inhabitants, {} or {}?",
  ),
  "year": ("Which was published earlier, {} or {}?", "Which was published later, {} or {}?"),
}


class Template(NamedTuple):
  """What questions have in common."""

  kind: str  # "one hop" | "two hops" | "comparison"
  sort: str  # of the thing that is asked about
  relations: tuple[str, ...]  # in the order in which they are followed


class Question(NamedTuple):
  """A question, its answer, and what has to be looked up for it."""

  text: str
  answer: str
  template: Template
  queries: tuple[str, ...]  # a title and a relation each, in order


class World(NamedTuple):
  """All that is true, and the passages that say it."""

  facts: dict[str, dict[str, str]]  # name: {relation: value}
  names: dict[str, list[str]]  # sort: the names of that sort
  passages: list[str]  # a title in quotation marks, a line feed, a text


def templates() -> list[Template]:
  """Returns all templates, in a fixed order."""
  listed = []
  for sort, relations in RELATIONS.items():
    for first, target in relations.items():
      listed.append(Template("one hop", sort, (first,)))
      listed += [Template("two hops", sort, (first, then)) for then in RELATIONS.get(target, ())]
      if first in COMPARISONS:
        listed += [Template("comparison", sort, (first, end)) for end in ("least", "most")]
  return listed


def is_unseen(template: Template) -> bool:
  """Tells whether a template belongs to the split `unseen`."""
  name = repr((template.kind, template.relations))
  return zlib.crc32(name.encode()) / 2**32 < UNSEEN_SHARE


def make_world(seed: int, size: int) -> World:
  """Makes a world of `size` passages."""
  rng = random.Random(f"search/{seed}/{size}")
  count = {"person": int(size * PEOPLE_SHARE), "place": int(size * PLACES_SHARE)}
  count["work"] = size - sum(count.values())
  people, places, works = _names(rng, count)
  facts: dict[str, dict[str, str]] = {}
  for name in people:
    facts[name] = {
      "profession": rng.choice(PROFESSIONS),
      "birthplace": rng.choice(places),
      "birth year": str(rng.randrange(1500, 1950)),
      "teacher": rng.choice([other for other in rng.sample(people, 2) if other != name]),
    }
  rivers = [_word(rng, 2) for _ in places]
  for name in places:
    facts[name] = {
      "river": rng.choice(rivers),
      "founder": rng.choice(people),
      "inhabitants": str(rng.randrange(200, 900_000)),
    }
  for name in works:
    facts[name] = {
      "form": rng.choice(FORMS),
      "author": rng.choice(people),
      "year": str(rng.randrange(1500, 2000)),
      "setting": rng.choice(places),
    }
  names = {"person": people, "place": places, "work": works}
  texts = [_passage(sort, name, facts[name]) for sort in names for name in names[sort]]
  rng.shuffle(texts)
  return World(facts, names, texts)


def make_question(world: World, seed: int, split: str, index: int) -> Question:
  """Makes a question of the split."""
  rng = random.Random(f"search/{seed}/{split}/{index}")
  kinds: dict[str, list[Template]] = {}
  for template in templates():
    if is_unseen(template) == (split == "unseen"):
      kinds.setdefault(template.kind, []).append(template)
  while True:
    template = rng.choice(kinds[rng.choice(sorted(kinds))])
    question = _question(rng, world, template)
    if split == "unseen" or _home(question.text) == split:
      return question


def _home(text: str) -> str:
  """Returns the split to which a question of the seen templates belongs."""
  place = zlib.crc32(text.encode()) / 2**32
  if place < HELDOUT_SHARE:
    return "heldout"
  return "tune" if place < 2 * HELDOUT_SHARE else "train"


def _question(rng: random.Random, world: World, template: Template) -> Question:
  """Draws the things that a template asks about."""
  first, *rest = template.relations
  if template.kind == "comparison":
    return _comparison(rng, world, template)
  name = rng.choice(world.names[template.sort])
  phrase, answer = PHRASES[first].format(name), world.facts[name][first]
  queries = [f"{name} {first}"]
  for relation in rest:
    queries.append(f"{answer} {relation}")
    phrase, answer = PHRASES[relation].format(phrase), world.facts[answer][relation]
  asks = "Who" if answer in world.names["person"] else "What"
  return Question(f"{asks} is {phrase}?", answer, template, tuple(queries))


def _comparison(rng: random.Random, world: World, template: Template) -> Question:
  relation, end = template.relations
  while True:
    pair = rng.sample(world.names[template.sort], 2)
    values = [int(world.facts[name][relation]) for name in pair]
    if values[0] != values[1]:
      break
  text = COMPARISONS[relation][end == "most"].format(*pair)
  is_first = (values[0] > values[1]) == (end == "most")
  queries = tuple(f"{name} {relation}" for name in pair)
  return Question(text, pair[not is_first], template, queries)


def _names(rng: random.Random, count: dict[str, int]) -> tuple[list[str], list[str], list[str]]:
  """Makes the names of people, places and works; no two are alike, many share a word."""
  firsts = _words(rng, 2, count["person"] // 8 + 3)
  lasts = _words(rng, 3, count["person"] // 3 + 3)
  pairs = [f"{first} {last}" for first in firsts for last in lasts]
  people = rng.sample(pairs, count["person"])
  roots = _words(rng, 4, count["place"] // 2 + 2)
  places = rng.sample([f"{prefix}{root}" for prefix in PREFIXES for root in roots], count["place"])
  themes = _words(rng, 2, count["work"] // 4 + 2)
  titles = [f"The {noun} of {theme}" for noun in NOUNS for theme in themes]
  return people, places, rng.sample(titles, count["work"])


def _words(rng: random.Random, syllables: int, count: int) -> list[str]:
  words: dict[str, None] = {}
  while len(words) < count:
    words[_word(rng, syllables)] = None
  return list(words)


def _word(rng: random.Random, syllables: int) -> str:
  parts = [rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)]
  return ("".join(parts) + rng.choice("nrstlk")).capitalize()


def _passage(sort: str, name: str, facts: dict[str, str]) -> str:
  """Returns the passage about a thing."""
  if sort == "person":
    text = (
      f"{name} had the profession of {facts['profession']}. The birthplace is "
      f"{facts['birthplace']}, the year of birth is {facts['birth year']}. The teacher was "
      f"{facts['teacher']}."
    )
  elif sort == "place":
    text = (
      f"{name} is a town on the river {facts['river']}. It has {facts['inhabitants']} inhabitants. "
      f"The founder was {facts['founder']}."
    )
  else:
    text = (
      f"The form of {name} is {facts['form']}. The author is {facts['author']}, the year of "
      f"publication is {facts['year']}. The setting is {facts['setting']}."
    )
  return f'"{name}"\n{text}'
