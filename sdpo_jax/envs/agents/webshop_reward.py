"""Scores what was bought against a goal, as WebShop does.

score = type x (attributes matched + options matched + [price <= limit])
             / (attributes + options + 1)

An attribute is matched if one of the product's is alike, or if it stands in the title, the bullets
or the description. An option is matched if a bought value is alike; both are first reduced to the
first word of COLORS that they contain, in its order. Alike is a token-set ratio above 85.

The type compares kinds of products. s is the share of the wanted title's nouns that stand in the
bought one's, 0.2 if it has none. The type is
  0    where s = 0
  0.1  where s < 0.1
  1    where the queries are equal, two names of categories are shared, or s > 0.2
  0.5  elsewhere

Nouns are those of spaCy's en_core_web_sm where it is installed. The registry does not have it under
its own name. Elsewhere every word of three letters or more stands for a noun, unless it is a stop
word. `find_nouns` says which of the two it is.

The ratio is thefuzz's: rapidfuzz's own neither drops letters outside of ASCII nor rounds.

Source: WebShop, arXiv:2207.01206, and its release (the list of colours is its data).
"""

import functools
import importlib.util
import re
import threading
from typing import Callable

from sdpo_jax.envs.agents.webshop_goals import Goal
from sdpo_jax.envs.agents.webshop_products import Product

ALIKE = 85  # of 100
SPACY_MODEL = "en_core_web_sm"
COLORS = tuple(
  "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
  "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
  "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold "
  "granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon "
  "leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom "
  "mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal "
  "rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal "
  "tiger turquoise violet walnut wheat white wine yellow".split()
)
STOP_WORDS = frozenset(
  "a an and are as at be but by for if in into is it no not of on or such that the their then "
  "there these they this to was will with".split()
)
_WORD = re.compile(r"[^\W\d_]{3,}")


def score(
  goal: Goal, wanted: Product, bought: Product, values: list[str], nouns: Callable
) -> float:
  """Returns the score of a purchase, in [0, 1].

  wanted: the product of the goal. values: the chosen option values of the bought one.
  nouns(title): the nouns of a title.
  """
  attributes = sum(has_attribute(bought, attribute) for attribute in goal.attributes)
  options = sum(any(same_option(value, option) for value in values) for option in goal.options)
  is_cheap = bought.price <= goal.limit
  share = (attributes + options + is_cheap) / (len(goal.attributes) + len(goal.options) + 1)
  return share * type_score(wanted, bought, nouns)


def has_attribute(product: Product, attribute: str) -> bool:
  """Tells whether a product has an attribute, or speaks of it."""
  if any(ratio(own, attribute) > ALIKE for own in product.attributes):
    return True
  texts = (product.title, " ".join(product.bullets), product.description)
  return any(attribute in text.lower() for text in texts)


def same_option(value: str, wanted: str) -> bool:
  """Tells whether a bought value is what was wanted, a value or "name value"."""
  return ratio(colour(value), colour(wanted)) > ALIKE


def colour(text: str) -> str:
  """Returns the first word of COLORS that a text contains, also inside a word, or the text."""
  return next((word for word in COLORS if word in text), text)


def ratio(one: str, other: str) -> int:
  """Returns the token-set ratio of two texts, 0 to 100."""
  from thefuzz import fuzz

  return fuzz.token_set_ratio(one, other)


def type_score(wanted: Product, bought: Product, nouns: Callable) -> float:
  """Tells how far a product is of the wanted kind: 0, 0.1, 0.5 or 1."""
  wanted_nouns = nouns(wanted.title)
  same = len(set(wanted_nouns) & set(nouns(bought.title)))
  share = same / len(wanted_nouns) if wanted_nouns else 0.2
  if share == 0:
    return 0.0
  if share < 0.1:
    return 0.1
  shared_categories = len(wanted.categories & bought.categories)
  is_kind = wanted.query == bought.query or shared_categories >= 2 or share > 0.2
  return 1.0 if is_kind else 0.5


def find_nouns() -> tuple[str, Callable[[str], list[str]]]:
  """Returns the name of what finds the nouns of a title, and the function that does."""
  installed = all(importlib.util.find_spec(name) for name in ("spacy", SPACY_MODEL))
  return (SPACY_MODEL, _spacy_nouns()) if installed else ("words", words)


def words(title: str) -> list[str]:
  """Returns the words of three letters or more that are no stop words, in lower case."""
  return [word for word in _WORD.findall(title.lower()) if word not in STOP_WORDS]


def _spacy_nouns() -> Callable[[str], list[str]]:
  import spacy

  model, lock = spacy.load(SPACY_MODEL), threading.Lock()

  @functools.lru_cache(maxsize=4096)
  def nouns(title: str) -> list[str]:
    with lock:  # spaCy's models promise nothing about threads
      return [token.text.lower() for token in model(title) if token.pos_ in ("NOUN", "PROPN")]

  return nouns
