"""Makes the goals of a shop from its products: what has to be bought, and the text asking for it.

Synthetic goals: one for every combination of a product's option values. The text is the product's
instruction, " with k: v, and k: v" for the options, and ", and price lower than X dollars". Human
goals: one for every instruction that a person wrote and that names an attribute.

X is the larger of two prices drawn from the next four multiples of 10 above the product's price.
They end at 990; where fewer than two are left there is no limit.

The goals are shuffled once, with seed 233 as WebShop's: the first 500 are the split `test`, the
next 1,000 `eval`, the rest `train`. The draws come from generators of their own: in the released
loop each worker shuffles otherwise, and its training and validation goals overlap.
"""

import itertools
import random
from typing import NamedTuple

from sdpo_jax.envs.agents.webshop_products import Product
from sdpo_jax.errors import SettingError

SPLITS = {"test": slice(0, 500), "eval": slice(500, 1500), "train": slice(1500, None)}
SHUFFLE_SEED = 233
NO_LIMIT = 1e6  # dollars
_STEPS = [10.0 * i for i in range(1, 100)]


class Goal(NamedTuple):
  """What has to be bought."""

  asin: str  # of the product that the goal was made from
  text: str
  attributes: tuple[str, ...]
  options: tuple[str, ...]  # of synthetic goals "name value", else what the person wrote
  limit: float  # dollars


def make_goals(products: list[Product], *, human: bool) -> list[Goal]:
  """Returns all goals in the order of the products."""
  return [goal for product in products for goal in (_human if human else _synthetic)(product)]


def split_goals(goals: list[Goal]) -> dict[str, list[Goal]]:
  """Returns the goals of each split. SettingError where none is left for training."""
  if len(goals) <= SPLITS["train"].start:
    raise SettingError(
      f"config.env.products has {len(goals)} goals, and those from {SPLITS['train'].start} on are "
      "for training: name files with more instructions"
    )
  shuffled = list(goals)
  random.Random(SHUFFLE_SEED).shuffle(shuffled)
  return {split: shuffled[part] for split, part in SPLITS.items()}


def _synthetic(product: Product) -> list[Goal]:
  if product.instruction is None:
    return []
  text, attributes, _ = product.instruction
  limit, price_text = _limit(product, 0)
  names = sorted(product.options)
  goals = []
  for values in itertools.product(*(product.options[name] for name in names)):
    chosen = list(zip(names, values, strict=True))
    wish = ", and ".join(f"{name}: {value}" for name, value in chosen)
    whole = f"{text}{' with ' * bool(wish)}{wish}{price_text}"
    options = tuple(f"{name} {value}" for name, value in chosen)
    goals.append(Goal(product.asin, whole, attributes, options, limit))
  return goals


def _human(product: Product) -> list[Goal]:
  goals = []
  for number, (text, attributes, options) in enumerate(product.human):
    if attributes:
      limit, price_text = _limit(product, number)
      goals.append(Goal(product.asin, text.strip(".") + price_text, attributes, options, limit))
  return goals


def _limit(product: Product, number: int) -> tuple[float, str]:
  """Draws the price limit of a product's instruction, and returns it with its words."""
  steps = [step for step in _STEPS if step > product.price][:4]
  if len(steps) < 2:
    return NO_LIMIT, ""
  limit = max(random.Random(f"webshop/limit/{product.asin}/{number}").sample(steps, 2))
  return limit, f", and price lower than {limit:.2f} dollars"
