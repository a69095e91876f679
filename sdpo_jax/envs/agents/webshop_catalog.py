"""Makes a small shop in the format of WebShop's files: some 200 products of twelve kinds.

A product has a made-up brand, three attributes, of which its instruction asks for two, and two
options with three or four values each. Brands and attributes are shared, so that a search finds
products that lack something. Everything is a pure function of the seed.
"""

import random
from typing import NamedTuple

SIZE = 200  # products
BRANDS = 40
SHAPES = ("plain", "striped", "round", "ribbed")
COLORS = ("black", "white", "blue", "green", "pink", "purple", "silver", "orange")
SIZES = ("small", "medium", "large")
PACKS = ("one", "two", "six")
SCENTS = ("vanilla", "jasmine", "cedar", "cucumber", "almond")
_CLOTH = ("machine washable", "long sleeve", "quick dry", "hand made", "loose fit", "cotton lining")
_CARE = ("sulfate free", "cruelty free", "long lasting", "tea tree", "travel sized", "plant based")
_HOME = ("easy to clean", "heavy duty", "space saving", "solid wood", "non slip", "fully assembled")
_DEVICE = (
  "fast charging",
  "water resistant",
  "noise cancelling",
  "wireless",
  "high speed",
  "compact",
)


class Kind(NamedTuple):
  """What the products of a kind have in common."""

  noun: str
  path: str  # product_category
  attributes: tuple[str, ...]
  options: dict[str, tuple[str, ...]]


_WORN = {"color": COLORS, "size": SIZES}
_SMELT = {"scent": SCENTS, "pack": PACKS}
_SHOWN = {"color": COLORS, "style": SHAPES}
KINDS = (
  Kind("shirt", "Clothing › Men › Shirts", _CLOTH, _WORN),
  Kind("sweater", "Clothing › Women › Sweaters", _CLOTH, _WORN),
  Kind("jacket", "Clothing › Women › Coats", _CLOTH, _WORN),
  Kind("shampoo", "Beauty › Hair Care › Shampoo", _CARE, _SMELT),
  Kind("candle", "Beauty › Home Scents › Candles", _CARE, _SMELT),
  Kind("lotion", "Beauty › Skin Care › Lotions", _CARE, _SMELT),
  Kind("bookcase", "Furniture › Living Room › Bookcases", _HOME, _SHOWN),
  Kind("stool", "Furniture › Kitchen › Stools", _HOME, _SHOWN),
  Kind("rug", "Furniture › Bedroom › Rugs", _HOME, _SHOWN),
  Kind("speaker", "Electronics › Audio › Speakers", _DEVICE, _SHOWN),
  Kind("headset", "Electronics › Audio › Headsets", _DEVICE, _SHOWN),
  Kind("keyboard", "Electronics › Computers › Keyboards", _DEVICE, _SHOWN),
)


def make_files(seed: int) -> tuple[list[dict], dict[str, dict]]:
  """Returns what WebShop's product file and its attribute file hold."""
  rng = random.Random(f"webshop/catalog/{seed}")
  brands = sorted({_brand(rng) for _ in range(BRANDS)})
  items, attributes = [], {}
  for index in range(SIZE):
    kind = KINDS[index % len(KINDS)]
    traits = rng.sample(kind.attributes, 3)
    asin = f"B{rng.randrange(10**5):05}{index:04}"
    items.append(_item(rng, asin, kind, rng.choice(brands), traits))
    attributes[asin] = {
      "attributes": traits,
      "instruction": f"find me {traits[0]}, {traits[1]} {kind.noun}",
      "instruction_attributes": traits[:2],
    }
  return items, attributes


def _item(rng: random.Random, asin: str, kind: Kind, brand: str, traits: list[str]) -> dict:
  price = rng.randrange(500, 12_000) / 100
  pricing = f"${price:.2f}"
  if rng.random() < 0.2:
    pricing += f" to ${price + rng.randrange(100, 2000) / 100:.2f}"
  options = {
    name: [{"value": value} for value in rng.sample(values, min(len(values), 4))]
    for name, values in kind.options.items()
  }
  return {
    "asin": asin,
    "name": f"{brand} {kind.noun.capitalize()}, {traits[0]}, {rng.choice(traits[1:])}",
    "full_description": f"A {kind.noun} by {brand}: {', '.join(traits)}.",
    "small_description": [f"{trait.capitalize()} {kind.noun}." for trait in traits],
    "pricing": pricing,
    "customization_options": options,
    "category": kind.path.partition(" › ")[0].lower(),
    "query": kind.noun,
    "product_category": kind.path,
  }


def _brand(rng: random.Random) -> str:
  syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)]
  return "".join(syllables).capitalize()
