r"""Compares quantities and words, which math-verify cannot tell apart.

math-verify drops everything from the first unit on, and reads words as products of letters.
`compare` decides what consists of numbers and words, and returns what is left as pairs of
mathematics, for math-verify. Two answers with words are equal if their numbers and words agree:

  scales      5 million is 5000000; such a word may not be missing
  units       may be missing in one of the answers (18 and 18 eggs); where both have one, they
              agree or measure the same: 1 m is 100 cm; and 5 feet 6 inches are 66 inches
  percent     50% is 0.5; the sign may be missing as well, unless the number is below 1
  money       signs are units: \$5 is 5 dollars or 500 cents, and not 5 euros
  time        8 PM is 20:00; the half of the day may be missing in the reference alone
  directions  and what else decides (5 miles north) may be missing in the reference alone
  words       are equal letter by letter, whatever their case; `red and blue` has no order
  bases       101_2 is 5_{10}; the base may be missing where the digits are the same
  angles      degrees are a unit, so 90^\circ is 90. It is not \frac{\pi}{2}, as for math-verify:
              the question asks for one of the two, and a multiple of pi need not be an angle
Truth values, letters of choices, dates and ratios have rules of their own in `math_names.py`.
"""

import collections
import fractions
import re
from typing import NamedTuple

from sdpo_jax.envs import math_names, numerals
from sdpo_jax.envs.math_text import latex
from sdpo_jax.envs.math_words import MONEY_SIGNS, Token, mark, tokenize
from sdpo_jax.envs.numerals import Value

# A dimension, and units with how many of its first one they are; | joins names of one unit.
_UNIT_TABLE = """
length      m|metre|meter=1 mm|millimetre|millimeter=1/1000 cm|centimetre|centimeter=1/100
length      dm|decimetre|decimeter=1/10 km|kilometre|kilometer=1000 inch|in=127/5000
length      ft|foot|feet=381/1250 yd|yard=1143/1250 mi|mile=201168/125
mass        g|gram|gramme|gm=1 mg|milligram=1/1000 kg|kilogram|kilo=1000 tonne=1000000
mass        lb|pound=45359237/100000 oz|ounce=45359237/1600000
time        s|sec|second=1 ms|millisecond=1/1000 min|minute=60 h|hr|hour=3600
time        day=86400 wk|week=604800
month       mo|month=1 yr|year=12
volume      l|litre|liter=1 ml|millilitre|milliliter|cc=1/1000 cl|centilitre|centiliter=1/100
kitchen     cup=1 pt|pint=2 qt|quart=4 gal|gallon=16
dollar      dollar|usd|buck=1 cent=1/100
euro        eur|euro=1
sterling    gbp|quid=1 pence|penny=1/100
rupee       inr|rupee|rs=1
yuan        cny|rmb|yuan=1
yen         jpy|yen=1
frequency   hz|hertz=1 khz|kilohertz=1000 mhz|megahertz=1000000
dozen       dozen=12
"""
_UNITS = {
  name: (line.split()[0], fractions.Fraction(entry.partition("=")[2]))
  for line in _UNIT_TABLE.strip().split("\n")
  for entry in line.split()[1:]
  for name in entry.partition("=")[0].split("|")
}
_SPEEDS = {"mph": "mile", "kmh": "km", "kph": "km", "kmph": "km"}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_MONEY = frozenset("dollar euro sterling rupee yuan yen".split())
_MONEY_SCALES = {"k": 10**3, "m": 10**6, "b": 10**9}
# Other names of one thing.
_SYNONYMS = {
  "c": "celsius",
  "celsius": "celsius",  # which is no plural
  "children": "child",
  "deg": "degree",
  "f": "fahrenheit",
  "men": "man",
  "pct": "percent",
  "people": "person",
  "percentage": "percent",
  "solutions": "solution",
  "women": "woman",
}
# What does not count in an answer.
_FILLERS = frozenset(
  "the a an of is are answer final equal about approximately approx exactly total altogether "
  "there it option choice only and in each so =".split()
)
# What decides, and may be missing in the reference alone.
_QUALIFIERS = frozenset(
  "am pm noon midnight north south east west northeast northwest southeast southwest left right "
  "up down upward downward upwards downwards clockwise counterclockwise anticlockwise ahead "
  "behind before after ago bc ad bce ce".split()
)
# What makes another statement of a number; it may be missing in neither.
_TURNS = frozenset(
  "not no or than least most over under above below between except minus plus negative without "
  "to from squared cubed twice thrice half wrong incorrect".split()
)
_SHARES = {"tenth": 10, "hundredth": 10**2, "thousandth": 10**3, "millionth": 10**6}
_RELATION = r"\\(?:times|cdot|div|leq?|geq?|neq?|approx|pm|to|cup|cap|in|equiv)(?![A-Za-z])"
_OPEN_START = re.compile(rf"[+*/^=<>_!|]|{_RELATION}")
_OPEN_END = re.compile(rf"(?:[-+*/^=<>_|]|{_RELATION}|\\(?:frac|sqrt|sin|cos|tan|log|ln))\s*$")
MAX_DECIMALS = 400  # of a number with an exponent that is written without
MAX_WORDS = 12  # of one quantity; more make a text
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?")
_NOON = {"noon": ("12", "pm"), "midnight": ("12", "am")}


class Unit(NamedTuple):
  """What the words around a number come to."""

  factor: fractions.Fraction
  dimensions: frozenset[tuple[str, int]]  # of the units that the table has
  names: frozenset[tuple[str, int]]  # of the rest
  qualifiers: frozenset[str]
  is_percent: bool

  @property
  def is_empty(self) -> bool:
    return not (self.dimensions or self.names or self.is_percent)


class Quantity(NamedTuple):
  """Mathematics with its unit; `value` is None if it is no plain number."""

  mathematics: str
  value: Value | None
  unit: Unit


def compare(reference: str, answer: str) -> bool | list[tuple[str, str]]:
  """Tells whether two answers are equal, or returns the pairs that must be for it.

  The pairs are mathematics without words, for math-verify.
  """
  reference, answer = (_plain_signs(latex(text)) for text in (reference, answer))
  reference, answer = (
    math_names.full_names(reference, answer),
    math_names.full_names(answer, reference),
  )
  if "\\text{ to }" in reference + answer:
    reference, answer = (
      re.sub(r"(?<=\d)-(?=\d)", r"\\text{ to }", text) for text in (reference, answer)
    )
  if reference == answer:
    return True
  for decide in (_compare_numbers, _compare_bases, math_names.are_same):
    are_equal = decide(reference, answer)
    if are_equal is not None:
      return are_equal
  texts = [
    mark(text, has_unit_letters=numerals.value(other) is not None or "\\text" in mark(other))
    for text, other in ((reference, answer), (answer, reference))
  ]
  sides = [tokenize(text) for text in texts]
  times = [_minutes(side) for side in sides]
  if None not in times:
    return _same_time(*times)
  if not any(token.kind == "word" for side in sides for token in side):
    return _compare_mathematics(sides)
  only_words = [all(token.kind != "math" for token in side) for side in sides]
  if all(only_words):
    return _word_lists(sides[0]) == _word_lists(sides[1])
  if any(only_words):
    return _letters(sides[0]) == _letters(sides[1])
  lists = [_quantities(side) for side in sides]
  if None in lists:
    return _pairs([texts])
  are_equal = _compare_quantities(*lists)
  return are_equal if isinstance(are_equal, bool) else _pairs(are_equal)


def _pairs(pairs) -> bool | list[tuple[str, str]]:
  """Returns the pairs of mathematics that are to be asked; False where ratios tell them apart."""
  asked = []
  for reference, answer in pairs:
    are_equal = math_names.compare_ratios(reference, answer)
    if are_equal is False:
      return False
    if are_equal is None:
      asked.append((_exact(reference), _exact(answer)))
  return asked or True


def _exact(text: str) -> str:
  """Writes decimals without trailing zeros, and repeating ones as fractions.

  math-verify rounds what is written with a point, so 0.0 would be equal to all that is small.
  """

  def fraction(match):
    read = numerals.value(match[0])
    if read is None:
      return match[0]
    return f"\\frac{{{read.exact.numerator}}}{{{read.exact.denominator}}}"

  def decimal(match):
    decimals = match[2].rstrip("0")
    return match[1] + ("." + decimals if decimals else "")

  read = numerals.value(text)
  if read is not None and read.decimals is not None and read.decimals <= MAX_DECIMALS:
    whole, rest = divmod(abs(read.exact) * 10**read.decimals, 10**read.decimals)
    text = f"{'-' if read.exact < 0 else ''}{whole}.{rest.numerator:0{read.decimals}}"
  text = text.replace(r"\text{ degree }", " ")
  text = re.sub(r"\d+\.\d*\\(?:overline|bar)\s*\{\s*\d+\s*\}", fraction, text)
  return re.sub(r"(?<![\d.])(\d+)\.(\d+)(?![\d.])", decimal, text)


def _plain_signs(text: str) -> str:
  """Moves a minus behind a sign of money, and reads 5'6" as feet and inches."""
  text = re.sub(r"^-\s*(\$|\\text\{(?:eur|gbp|yen|inr)\})\s*(?=[\d.])", r"\1 -", text)
  feet = re.fullmatch(r"(\d+)\s*'\s*(\d+)\s*(?:''|\")", text)
  return text if feet is None else f"{feet[1]}\\text{{ feet }}{feet[2]}\\text{{ inches}}"


def _compare_numbers(reference: str, answer: str) -> bool | None:
  values = [numerals.value(text) for text in (reference, answer)]
  if None not in values:
    return numerals.equal(*values)
  # A list is no number, so beside a number a comma is a decimal comma.
  commas = [numerals.decimal_comma(text) for text in (reference, answer)]
  if values[0] is not None and commas[1] is not None:
    return numerals.equal(values[0], commas[1])
  if values[1] is not None and commas[0] is not None:
    return numerals.equal(commas[0], values[1])
  return None


def _compare_bases(reference: str, answer: str) -> bool | None:
  sides = [numerals.in_base(text) for text in (reference, answer)]
  if sides == [None, None]:
    return None
  if None not in sides:
    return sides[0].value == sides[1].value
  based, plain = (sides[0], answer) if sides[0] is not None else (sides[1], reference)
  digits = re.fullmatch(r"-?[0-9A-Fa-f]+", plain.replace(" ", "").replace(",", ""))
  return None if digits is None else digits[0].upper() == based.digits


def _compare_mathematics(sides: list[list[Token]]) -> bool | list[tuple[str, str]]:
  """Asks for answers without words; what stood in \\text{} may have become a number."""
  texts = [
    "".join(", " if token.kind == "separator" else token.text for token in side) for side in sides
  ]
  values = [numerals.value(text) for text in texts]
  if None not in values:
    return numerals.equal(*values)
  return _pairs([texts])


def _minutes(tokens: list[Token]) -> tuple[int, bool] | None:
  """Returns a time of day in minutes, and whether its half of the day is known; else None."""
  texts = [token.text for token in tokens]
  if len(texts) == 1 and texts[0] in _NOON:
    texts = list(_NOON[texts[0]])
  elif len(texts) == 2 and texts[1] in _NOON and texts[0] in ("12", "12:00"):
    texts = [texts[0], _NOON[texts[1]][1]]
  texts = [text for text in texts if text not in ("o'clock", "oclock", "at")]
  clock = _CLOCK.fullmatch(texts[0]) if texts else None
  if clock is None or len(texts) > 2 or (len(texts) == 2 and texts[1] not in ("am", "pm")):
    return None
  hour, minute = int(clock[1]), int(clock[2] or 0)
  if len(texts) == 2:
    if not 1 <= hour <= 12:
      return None
    return 60 * (hour % 12 + 12 * (texts[1] == "pm")) + minute, True
  if clock[2] is None or hour > 24:
    return None
  return 60 * hour + minute, hour > 12 or hour == 0


def _same_time(reference: tuple[int, bool], answer: tuple[int, bool]) -> bool:
  if reference[1]:
    # The clock of 24 hours writes the morning like a time without its half.
    return reference[0] == answer[0] and (answer[1] or reference[0] < 12 * 60)
  return reference[0] % 720 == answer[0] % 720


def _word_lists(tokens: list[Token]) -> list:
  """Returns the words of an answer; those joined by `and` or `or` in alphabetical order."""
  text = " ".join(token.text for token in tokens)
  joined = re.split(r" (?:and|or) ", text)
  groups = ["".join(_content(part)) for part in re.split(r"[,;]", " , ".join(joined))]
  return sorted(filter(None, groups)) if len(joined) > 1 else groups


def _content(text: str) -> list[str]:
  """Returns the words that count: fillers do not, unless there is nothing else."""
  words = [_SYNONYMS.get(word, word) for word in text.replace("-", "").split()]
  return [word for word in words if word not in _FILLERS] or words


def _letters(tokens: list[Token]) -> str:
  text = " ".join(token.text.lower() for token in tokens)
  return re.sub(r"[\s().]", "", "".join(_content(text)))


def _quantities(tokens: list[Token]) -> list[Quantity] | None:
  """Reads numbers with units; None if words and mathematics form another expression."""
  groups = [[]]
  for token in tokens:
    if token.kind == "separator":
      groups.append([])
    else:
      groups[-1].append(token)
  quantities = []
  for group in groups:
    parts = _parts(group)
    if parts is None:
      return None
    quantities += parts
  return _merged(quantities)


def _parts(tokens: list[Token]) -> list[Quantity] | None:
  """Gives each piece of mathematics the words after it, and the first also those before it."""
  parts: list[tuple[str, list[Token]]] = []
  leading = []
  for token in tokens:
    if token.kind == "word":
      (parts[-1][1] if parts else leading).append(token)
      continue
    text = token.text
    if leading and text.startswith(("=", ":")):
      leading, text = [], text[1:].strip()
    if leading and leading[-1].text in ("minus", "negative"):
      leading, text = leading[:-1], f"-{text}"
    if parts and len(parts[-1][1]) > 1 and parts[-1][1][-1].text in MONEY_SIGNS:
      leading = [parts[-1][1].pop()]  # 5 red and $6: a sign stands before its amount
    is_first_number = not parts and numerals.value(text) is not None
    is_open = _OPEN_START.match(text) or _OPEN_END.search(text)
    if not text or (is_open and not is_first_number):
      return None
    parts.append((text, leading))
    leading = []
  if leading or not parts or any(len(words) > MAX_WORDS for _, words in parts):
    return None
  return [_quantity(text, words) for text, words in parts]


def _quantity(text: str, words: list[Token]) -> Quantity:
  """Reads the scale and the unit of a number."""
  scale = fractions.Fraction(1)
  rest = []
  has_money = any(_UNITS.get(_singular(word.text), ("",))[0] in _MONEY for word in words)
  suffix = re.fullmatch(r"(.*\d)\s*([kKmMbB])", text)
  if has_money and suffix:
    text, scale = suffix[1], scale * _MONEY_SCALES[suffix[2].lower()]
  for word in words:
    name = word.text if word.text in numerals.SCALES else word.text.removesuffix("s")
    if name in numerals.SCALES:
      scale *= numerals.SCALES[name]
    elif name in _SHARES:
      scale /= _SHARES[name]
    elif has_money and word.text in _MONEY_SCALES:
      scale *= _MONEY_SCALES[word.text]
    else:
      rest.append(word)
  value = numerals.value(text)
  if scale != 1:
    text = f"({text})\\cdot\\frac{{{scale.numerator}}}{{{scale.denominator}}}"
    value = None if value is None else Value(value.exact * scale, value.decimals)
  return Quantity(text, value, _unit(rest))


def _singular(name: str) -> str:
  """Returns the singular of a noun, roughly: only equality of two of them matters."""
  if name in _SYNONYMS or name in _UNITS or name in _QUALIFIERS or name in _TURNS:
    return _SYNONYMS.get(name, name)
  if name.endswith("ies") and len(name) > 4:
    name = name.removesuffix("ies") + "y"
  elif name.endswith(("ches", "shes", "xes", "sses")):
    name = name.removesuffix("es")
  elif len(name) > 2 and not name.endswith("ss"):
    name = name.removesuffix("s")
  return _SYNONYMS.get(name, name)


def _unit(words: list[Token]) -> Unit:
  """Multiplies the units that the table has, and counts the other words."""
  factor = fractions.Fraction(1)
  dimensions = collections.Counter()
  names = collections.Counter()
  for name, exponent in _factors(words):
    if name in _UNITS:
      dimension, size = _UNITS[name]
      dimensions[dimension] += exponent
      factor *= size**exponent
    else:
      names[name] += exponent
  qualifiers = {name for name in names if name in _QUALIFIERS or name in _TURNS}
  ignored = qualifiers | _FILLERS | {"percent"}
  if {"celsius", "fahrenheit"} & set(names):
    ignored |= {"degree"}
  return Unit(
    factor,
    frozenset((name, exponent) for name, exponent in dimensions.items() if exponent),
    frozenset((name, exponent) for name, exponent in names.items() if name not in ignored),
    frozenset(qualifiers),
    "percent" in names,
  )


def _factors(words: list[Token]) -> list[tuple[str, int]]:
  """Returns the words with their exponents: square feet, metres squared, miles per hour."""
  found: list[tuple[str, int]] = []
  sign = power = 1
  for i, word in enumerate(words):
    name = _singular(word.text)
    is_last = i == len(words) - 1
    if word.text == "per" or (word.text in ("a", "an", "each") and found and not is_last):
      sign = -1
    elif name in ("squared", "cubed") and found:
      found[-1] = (found[-1][0], found[-1][1] * (2 if name == "squared" else 3))
    elif name in _POWERS and not is_last:
      power = _POWERS[name]
    elif name in _SPEEDS:
      found += [(_SPEEDS[name], 1), ("hour", -1)]
    else:
      found.append((name, sign * power * word.exponent))
      power = 1
  return found


def _merged(quantities: list[Quantity]) -> list[Quantity]:
  """Adds up what is one quantity in several units: 5 feet 6 inches."""
  merged: list[Quantity] = []
  for part in quantities:
    last = merged[-1] if merged else None
    is_more = (
      last is not None
      and last.value is not None
      and part.value is not None
      and part.unit.dimensions == last.unit.dimensions != frozenset()
      and not part.unit.names
      and part.unit.factor < last.unit.factor
    )
    if is_more:
      exact = last.value.exact * last.unit.factor / part.unit.factor + part.value.exact
      unit = part.unit._replace(qualifiers=part.unit.qualifiers | last.unit.qualifiers)
      merged[-1] = Quantity(str(exact), Value(exact), unit)
    else:
      merged.append(part)
  return merged


def _compare_quantities(
  reference: list[Quantity], answer: list[Quantity]
) -> bool | list[tuple[str, str]]:
  if len(reference) != len(answer):
    return False
  if len(reference) > 1:
    lists = [
      {part.unit.names | part.unit.dimensions for part in side} for side in (reference, answer)
    ]
    # Without the words nobody can tell which number belongs to which.
    if any(len(units) > 1 for units in lists) and any(units == {frozenset()} for units in lists):
      return False
    if all(part.value is not None for part in reference + answer):
      return _are_pairs(reference, answer)
  pairs = []
  for expected, given in zip(reference, answer, strict=True):
    are_equal = _compare_quantity(expected, given)
    if are_equal is False:
      return False
    if are_equal is not True:
      pairs.append(are_equal)
  return pairs or True


def _are_pairs(reference: list[Quantity], answer: list[Quantity]) -> bool:
  """Tells whether each quantity has an equal one of its own, in any order."""
  left = list(answer)
  for expected in reference:
    match = next((part for part in left if _compare_quantity(expected, part) is True), None)
    if match is None:
      return False
    left.remove(match)
  return True


def _compare_quantity(reference: Quantity, answer: Quantity) -> bool | tuple[str, str]:
  a, b = reference.unit, answer.unit
  if a.qualifiers & _TURNS != b.qualifiers & _TURNS:
    return False
  if a.qualifiers and a.qualifiers != b.qualifiers:
    return False
  if a.is_empty or b.is_empty:
    return _compare_without_unit(reference, answer)
  is_part = a.names <= b.names or b.names <= a.names
  if a.dimensions != b.dimensions or a.is_percent != b.is_percent or not is_part:
    return False
  # One unit of the table or one word must be in both.
  if not (a.dimensions or a.is_percent or (a.names and b.names)):
    return False
  if reference.value is not None and answer.value is not None:
    if a.factor == b.factor:
      return numerals.equal(reference.value, answer.value)
    return reference.value.exact * a.factor == answer.value.exact * b.factor
  ratio = b.factor / a.factor
  if ratio == 1:
    return reference.mathematics, answer.mathematics
  scaled = f"({answer.mathematics})\\cdot\\frac{{{ratio.numerator}}}{{{ratio.denominator}}}"
  return reference.mathematics, scaled


def _compare_without_unit(reference: Quantity, answer: Quantity) -> bool | tuple[str, str]:
  """Compares where one answer has no unit, which then counts for nothing, but for percent."""
  values = [reference.value, answer.value]
  if None in values:
    return reference.mathematics, answer.mathematics
  if reference.unit.is_percent == answer.unit.is_percent:
    for unit in (reference.unit, answer.unit):
      if unit.dimensions == {("dozen", 1)}:
        scaled = [
          value.exact * part.unit.factor
          for value, part in zip(values, (reference, answer), strict=True)
        ]
        return scaled[0] == scaled[1] or numerals.equal(*values)
    return numerals.equal(*values)
  share, plain = values if reference.unit.is_percent else reversed(values)
  decimals = None if share.decimals is None else share.decimals + 2
  if numerals.equal(Value(share.exact / 100, decimals), plain):
    return True
  # Below 1 a number without the sign is read as a proportion.
  return abs(plain.exact) >= 1 and numerals.equal(share, plain)
