r"""Reads a number in the notations of models and data sets, exactly.

  1080, 1,080, 12,34,567, 1 080, .5, 3{,}14, 1.234,5     whole numbers and decimals
  1.08e3, 1.08\times 10^3, 10^{-7}, 1e+16                with an exponent
  3/4, \frac{3}{4}, \frac34, 2\frac{1}{2}, 2 1/2         fractions and mixed numbers
  0.\overline{3}, 0.(3)                                  repeating decimals
  1011_2, 2A_{16}, 12_{\text{five}}                      in another base
  five, twenty-one, two hundred and five                 in words
Texts are LaTeX as `math_text.latex` returns it.
"""

import fractions
import re
from typing import NamedTuple

# Of ten, in a number that is computed; what is beyond is left to math-verify.
MAX_EXPONENT = 2000
MAX_CHARACTERS = 1000
_PLAIN = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?")

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_SIGN = r"([-+]?)\s*"
_POWER = r"10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))"
_TIMES = r"(?:\\times|\\cdot|\\ast|\*|[xX])"
_DECIMAL_NUMBER = re.compile(rf"{_SIGN}({_DECIMAL})")
_E_NUMBER = re.compile(rf"{_SIGN}({_DECIMAL})[eE]([-+]?\d+)")
_SCIENTIFIC = re.compile(rf"{_SIGN}(?:({_DECIMAL})\s*{_TIMES}\s*)?{_POWER}")
_CONTINENTAL = re.compile(rf"{_SIGN}(\d{{1,3}}(?:\.\d{{3}})+),(\d+)")
_DECIMAL_COMMA = re.compile(rf"{_SIGN}(\d+),(\d+)")
_REPEATING = re.compile(
  rf"{_SIGN}(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{{\s*(\d+)\s*\}}|(\d))|\((\d+)\))"
)
_DOTS = re.compile(rf"{_SIGN}(\d*)\.(\d*?)(\d)\4{{2,}}\s*(?:\.\.\.|\\[cl]?dots)")
_MIXED = re.compile(rf"({_INTEGER})\s*(\\frac.*)|(\d+) (\d+\s*/\s*\d+)")
_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_SLASH = re.compile(r"([^/]+)/([^/]+)")
_BASE = re.compile(r"(-?)([0-9A-Fa-f]+)\s*_\s*(?:\{([^{}]*)\}|(\d)|\{\\text\{([^{}]*)\}\})")

_WRAPPED = re.compile(
  r"(?:\\text\s*)?\{((?:[^{}]|\{[^{}]*\})+)\}|\(([^(){},]+)\)|\(((?:[^(){},]|\{[^{}]*\})+)\)"
)

_SMALL = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
  "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_COUNTS = {name: count for count, name in enumerate(_SMALL.split())}
_COUNTS |= {name: 10 * count for count, name in enumerate(_TENS.split(), 2)}
SCALES = {
  "hundred": 10**2,
  "thousand": 10**3,
  "lakh": 10**5,
  "million": 10**6,
  "mn": 10**6,
  "crore": 10**7,
  "billion": 10**9,
  "bn": 10**9,
  "trillion": 10**12,
  "quadrillion": 10**15,
}


class Value(NamedTuple):
  """A number, and how many decimals were written: None for fractions and whole numbers."""

  exact: fractions.Fraction
  decimals: int | None = None


class Based(NamedTuple):
  """A whole number in another base."""

  value: int
  digits: str


def number(text: str) -> fractions.Fraction | None:
  """Returns the value of a plain number; None for everything else.

  It may have a dollar sign, and commas between thousands.
  """
  text = text.strip().strip("$")
  for command, plain in (("\\$", ""), ("\\,", ""), ("{,}", ","), ("\\!", "")):
    text = text.replace(command, plain)
  text = text.strip().removeprefix("$").strip()
  has_digit = any(c.isdecimal() for c in text)
  # Python converts no text of thousands of digits; \d matches the digits of other scripts too.
  if len(text) > 60 or not has_digit or not text.isascii() or not _PLAIN.fullmatch(text):
    return None
  return fractions.Fraction(text.replace(",", "").rstrip("."))


def value(text: str) -> Value | None:
  """Returns the number that a text is, in any notation of above but words; else None."""
  text = _bare(text)
  if not text or len(text) > MAX_CHARACTERS or not text.isascii():
    return None
  for read in (_decimal, _scientific, _repeating, _fraction):
    found = read(text)
    if found is not None:
      return found
  return None


def equal(a: Value, b: Value) -> bool:
  """Tells whether two numbers are equal.

  A fraction whose decimals never end equals those that it rounds or is cut to, from six decimals
  and six digits on; math-verify has the same six.
  """
  if a.exact == b.exact:
    return True
  if (a.decimals is None) == (b.decimals is None):
    return False
  decimal, fraction = (a, b) if b.decimals is None else (b, a)
  if decimal.decimals < 6 or _ends(fraction.exact):
    return False
  scale = 10**decimal.decimals
  digits, scaled = abs(decimal.exact * scale), abs(fraction.exact * scale)
  has_sign = (decimal.exact < 0) == (fraction.exact < 0)
  return (
    has_sign and digits >= 10**5 and digits in (int(scaled), int(scaled + fractions.Fraction(1, 2)))
  )


def _ends(value: fractions.Fraction) -> bool:
  """Tells whether a number has finitely many decimals."""
  return pow(10, value.denominator.bit_length(), value.denominator) == 0


def decimal_comma(text: str) -> Value | None:
  """Returns the number that a text is if its comma is a decimal comma: 3,14; else None."""
  match = _DECIMAL_COMMA.fullmatch(_bare(text))
  return None if match is None else _decimal(f"{match[1]}{match[2]}.{match[3]}")


def in_base(text: str) -> Based | None:
  """Reads a number that is written with its base, 101_2; None for everything else."""
  match = _BASE.fullmatch(text.strip())
  if match is None:
    return None
  name = next(filter(None, match.groups()[2:]), "").strip()
  name = re.sub(r"\\text\s*\{\s*([^{}]*?)\s*\}", r"\1", name).removeprefix("base").strip()
  base = int(name) if re.fullmatch(r"[0-9]{1,2}", name) else _COUNTS.get(name.lower(), 0)
  if not 2 <= base <= 16 or any(int(digit, 16) >= base for digit in match[2]):
    return None
  digits = match[1] + match[2].upper()
  return Based(int(digits, base), digits)


def spoken(words: list[str]) -> fractions.Fraction | None:
  """Returns the number that lower-case words name, "two hundred and five"; else None."""
  words = [part for word in words for part in word.split("-")]
  sign = -1 if words[:1] in (["minus"], ["negative"]) else 1
  words = words[1:] if sign < 0 else words
  if words in (["half"], ["one", "half"]):
    return fractions.Fraction(sign, 2)
  if not words or words[0] not in _COUNTS:
    return None
  total = group = 0
  last = 0  # the count before, to which only a smaller one is added
  for position, word in enumerate(words):
    if word in _COUNTS:
      count = _COUNTS[word]
      if position and last and not (last >= 20 and last % 10 == 0 and 0 < count < 10):
        return None
      group, last = group + count, count or 1
    elif word == "hundred" and 0 < group < 100:
      group, last = 100 * group, 0
    elif word in SCALES and word != "hundred" and group:
      total, group, last = total + group * SCALES[word], 0, 0
    elif not (word == "and" and last == 0 and 0 < position < len(words) - 1):
      return None
  return fractions.Fraction(sign * (total + group))


def _bare(text: str) -> str:
  r"""Removes \text{}, braces and round brackets around a number, and space."""
  text = text.strip()
  while (match := _WRAPPED.fullmatch(text)) is not None:
    text = (match[1] or match[2] or match[3]).strip()
  return text


def _decimal(text: str) -> Value | None:
  match = _CONTINENTAL.fullmatch(text)
  if match:
    text = f"{match[1]}{match[2].replace('.', '')}.{match[3]}"
  match = _DECIMAL_NUMBER.fullmatch(text)
  if match is None:
    return None
  digits = re.sub("[, ]", "", match[2])
  decimals = len(digits.partition(".")[2]) or None
  return Value(fractions.Fraction(match[1] + digits.rstrip(".")), decimals)


def _scientific(text: str) -> Value | None:
  match = _SCIENTIFIC.fullmatch(text)
  if match:
    sign, mantissa, exponent = match[1], match[2] or "1", match[3] or match[4]
  else:
    match = _E_NUMBER.fullmatch(text)
    if match is None:
      return None
    sign, mantissa, exponent = match.groups()
  if len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT:
    return None
  read = _decimal(sign + mantissa)
  decimals = max(0, (read.decimals or 0) - int(exponent)) or None
  return Value(read.exact * fractions.Fraction(10) ** int(exponent), decimals)


def _repeating(text: str) -> Value | None:
  match = _REPEATING.fullmatch(text) or _DOTS.fullmatch(text)
  if match is None:
    return None
  sign, whole, fixed = match.groups()[:3]
  period = next(filter(None, match.groups()[3:]))
  nines = (10 ** len(period) - 1) * 10 ** len(fixed)
  exact = fractions.Fraction(f"{whole or 0}.{fixed or 0}") + fractions.Fraction(int(period), nines)
  return Value(-exact if sign == "-" else exact)


def _fraction(text: str) -> Value | None:
  sign = -1 if text[0] == "-" else 1
  text = text[1:].strip() if text[0] in "+-" else text
  whole = fractions.Fraction(0)
  mixed = _MIXED.fullmatch(text)
  if mixed:
    whole = fractions.Fraction(re.sub("[, ]", "", mixed[1] or mixed[3]))
    text = mixed[2] or mixed[4]
  match = _FRACTION.fullmatch(text)
  if match:
    top, bottom = match[1] or match[2], match[3] or match[4]
  else:
    match = _SLASH.fullmatch(text)
    if match is None:
      return None
    top, bottom = match.groups()
  terms = [_decimal(_bare(term or "")) for term in (top, bottom)]
  if None in terms or terms[1].exact == 0:
    return None
  quotient = terms[0].exact / terms[1].exact
  if mixed and quotient < 0:
    return None
  return Value(sign * (whole + quotient))
