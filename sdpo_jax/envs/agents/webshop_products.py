"""Reads WebShop's product files into products.

Product file: a JSON list. Of an item are read
  asin                   its number; the items are skipped and counted where it is repeated, longer
                         than ten characters or "nan"
  name                   the title
  full_description       a text
  small_description      bullets: a list of texts, or one text
  pricing                "$10.99", "$8.00 to $12.00" (the price is drawn from the range), or nothing
                         (100 dollars)
  customization_options  {name: null or [{"value": text}, ...]}
  category, query        texts
  product_category       "Beauty › Hair Care › Shampoo"

Attribute file: {asin: {"attributes": [text, ...], "instruction": text or null,
"instruction_attributes": [text, ...]}}. File of people's instructions: {asin: [{"instruction":
text, "instruction_attributes": [...], "instruction_options": [text, ...]}, ...]}.

Option names and values are made lower case; in a value "/" becomes " | ".

Errors: SettingError for a file that cannot be read, and for an item that is malformed, with file,
index and field; with on_bad_row="skip" such items are left out and counted.

Source: WebShop, arXiv:2207.01206, and its release.
"""

import json
import random
import re
from typing import Any, NamedTuple

from sdpo_jax.envs.rows import field, given, optional_text
from sdpo_jax.errors import SettingError

LONGEST_ASIN = 10
DEFAULT_PRICE = 100.0
_NO_DIGIT = re.compile(r"[^\d.]")


class Instruction(NamedTuple):
  """What somebody asks for: the text, the attributes and the options that are wanted."""

  text: str
  attributes: tuple[str, ...]
  options: tuple[str, ...] = ()


class Product(NamedTuple):
  """A product as the shop shows it and as it is judged."""

  asin: str
  title: str
  description: str
  bullets: tuple[str, ...]
  price: float
  price_tag: str  # as the pages show it
  options: dict[str, tuple[str, ...]]  # name: values
  category: str
  query: str
  categories: frozenset[str]  # the names in product_category
  attributes: tuple[str, ...]
  instruction: Instruction | None  # from which synthetic goals are made
  human: tuple[Instruction, ...]  # what people wrote


class Catalog(NamedTuple):
  """The products of a shop, and how many items were left out."""

  products: list[Product]
  skipped: dict[str, int]  # {"asin": .., "malformed": ..}


def read_catalog(
  products: str, attributes: str, human: str = "", *, on_bad_row: str = "error"
) -> Catalog:
  """Reads the files at these paths; human: "" for none."""
  items = _read(products, "products", list)
  known = _read(attributes, "attributes", dict)
  people = _read(human, "human", dict) if human else {}
  return make_catalog(items, known, people, place=products, on_bad_row=on_bad_row)


def make_catalog(
  items: list, attributes: dict, human: dict, *, place: str, on_bad_row: str = "error"
) -> Catalog:
  """Makes products of what the files hold. place: the product file, for messages."""
  catalog = Catalog([], {"asin": 0, "malformed": 0})
  seen = set()
  for index, item in enumerate(items):
    try:
      asin = _asin(item)
      if asin in seen or asin == "nan" or len(asin) > LONGEST_ASIN:
        catalog.skipped["asin"] += 1
        continue
      catalog.products.append(_product(item, asin, attributes.get(asin), human.get(asin)))
      seen.add(asin)
    except ValueError as error:
      if on_bad_row != "skip":
        raise SettingError(
          f"{place}, item {index}: {error} (config.env.on_bad_row='skip' leaves such items out)"
        ) from None
      catalog.skipped["malformed"] += 1
  return catalog


def _read(path: str, setting: str, kind: type):
  """Returns what a JSON file holds."""
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except OSError as error:
    raise SettingError(
      f"config.env.{setting}: {path}: {error.strerror}; name a file of WebShop's release, such as "
      "items_shuffle_1000.json (the package webshop of the registry has none of them)"
    ) from None
  except (ValueError, RecursionError):
    raise SettingError(f"config.env.{setting}: {path} is not JSON") from None
  if not isinstance(content, kind):
    raise SettingError(f"config.env.{setting}: {path} holds no JSON {kind.__name__}")
  return content


def _asin(item) -> str:
  if not isinstance(item, dict):
    raise ValueError(f"the item is not an object but {str(item)[:60]!r}")
  return field(item, "asin")


def _product(item: dict, asin: str, known: Any, human: Any) -> Product:
  """Makes a product of an item. ValueError that names the field."""
  known, human = known or {}, human or []
  if not isinstance(known, dict):
    raise ValueError(f"the attribute file holds no object for {asin}")
  if not isinstance(human, list):
    raise ValueError(f"the file of people's instructions holds no list for {asin}")
  price, price_tag = _price(optional_text(item, "pricing"), asin)
  instruction = None
  if optional_text(known, "instruction") is not None:
    instruction = _instruction(known)
    if not instruction.attributes:
      raise ValueError("field 'instruction_attributes' is empty, but there is an instruction")
  return Product(
    asin=asin,
    title=field(item, "name"),
    description=optional_text(item, "full_description") or "",
    bullets=_texts(item, "small_description"),
    price=price,
    price_tag=price_tag,
    options=_options(given(item, "customization_options") or {}),
    category=field(item, "category"),
    query=field(item, "query").lower().strip(),
    categories=_categories(optional_text(item, "product_category") or ""),
    attributes=_texts(known, "attributes"),
    instruction=instruction,
    human=tuple(map(_instruction, human)),
  )


def _categories(text: str) -> frozenset[str]:
  return frozenset(part.strip() for part in text.split("›") if part.strip())


def _instruction(row) -> Instruction:
  if not isinstance(row, dict):
    raise ValueError(f"an instruction is not an object but {str(row)[:60]!r}")
  options = _texts(row, "instruction_options")
  return Instruction(field(row, "instruction"), _texts(row, "instruction_attributes"), options)


def _texts(row: dict, name: str) -> tuple[str, ...]:
  """Returns a field that holds a list of texts, or one; nothing if it is missing."""
  value = given(row, name)
  if value is None:
    return ()
  values = [value] if isinstance(value, str) else value
  if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
    raise ValueError(f"field {name!r} holds no list of texts: {str(value)[:60]!r}")
  return tuple(values)


def _price(text: str | None, asin: str) -> tuple[float, str]:
  """Returns the price in dollars and what the pages show."""
  if text is None:
    return DEFAULT_PRICE, f"${DEFAULT_PRICE}"
  try:
    prices = [float(_NO_DIGIT.sub("", part)) for part in text.split("$")[1:]]
  except ValueError:
    prices = []
  if not prices:
    raise ValueError(f"field 'pricing' is {text!r}, which is no price in dollars")
  if len(prices) == 1:
    return prices[0], f"${prices[0]}"
  # A generator of its own, so that the price does not depend on the other products.
  drawn = random.Random(f"webshop/price/{asin}").uniform(prices[0], prices[1])
  return drawn, f"${prices[0]} to ${prices[1]}"


def _options(contents) -> dict[str, tuple[str, ...]]:
  if not isinstance(contents, dict):
    raise ValueError(f"field 'customization_options' is no object: {str(contents)[:60]!r}")
  options = {}
  for name, choices in contents.items():
    if choices is None:
      continue
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
      raise ValueError(f"field 'customization_options': {name!r} holds no list of objects")
    values = (field(choice, "value").strip().replace("/", " | ").lower() for choice in choices)
    options[name.lower()] = tuple(values)
  return options
