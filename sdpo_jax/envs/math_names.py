r"""Compares answers that are names written in two ways, or ratios, before mathematics is asked.

  truth       T is True and F is False; no other letter or word is
  choices     where the reference is one letter from A to J alone, (D) 5 and D. 5 are D: the letter
              stands first, in brackets or with a full stop, and the text of its option follows.
              That text is not checked, but it continues no expression and names no other letter
  dates       days and months may be abbreviated: Fri or Fri. is Friday, Sept is September
  ratios      5:1 is 10:2 and 5/1, and neither 5 nor 5.0: a ratio is no number. 2:10:20 beside
              1:05:10 are hours, minutes and seconds

Texts are LaTeX as `math_text.latex` returns it.
"""

import itertools
import re

from sdpo_jax.envs import numerals

_TRUTH = {"true": "T", "false": "F"}
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = "January February March April May June July August September October November December"
_FULL_NAMES = {name[:3]: name for name in f"{_DAYS} {_MONTHS}".split()} | {
  "Tues": "Tuesday", "Weds": "Wednesday", "Thur": "Thursday", "Thurs": "Thursday",
  "Sept": "September",
}  # fmt: skip
# In small letters some of them are other words: sun, mar, may.
_ABBREVIATION = re.compile(
  rf"(?<![A-Za-z\\])({'|'.join(sorted(_FULL_NAMES, key=len, reverse=True))})"
  r"(?![A-Za-z])(?:\.(?=[\s,}]|$))?"
)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(([A-J])\)|\[([A-J])\]|([A-J])\.?")
_MARKED_OPTION = re.compile(r"\\text\s*\{\s*(?:\(([A-J])\)|\[([A-J])\]|([A-J])\.)(.*)", re.DOTALL)
_PLAIN_OPTION = re.compile(r"(?:\(([A-J])\)|\[([A-J])\]|([A-J])\.(?=\s))(.*)", re.DOTALL)
# What would make (D) a factor, a term or one choice of several.
_CONTINUES = re.compile(
  r"[+*/^=<>_!|,;:&'(\[]|-|\\(?:times|cdot|div|leq?|geq?|neq?|approx|pm|to|cup|cap|in|equiv)"
  r"(?![A-Za-z])|(?:and|or|nor|but|if|is|isn't|are|was|to|than)\b",
  re.IGNORECASE,
)
_OTHER_LETTER = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])")
_DURATION = re.compile(r"\d+(?::[0-5]\d){2}")
_RELATION = re.compile(r"[=<>,;|]|\\(?:leq?|geq?|neq?|approx|to|in|equiv|mid)(?![A-Za-z])")


def full_names(text: str, other: str) -> str:
  """Writes those abbreviated days and months in full that the other text names differently."""
  known = {_FULL_NAMES[match[1]] for match in _ABBREVIATION.finditer(other)}

  def full_name(match):
    name = _FULL_NAMES[match[1]]
    return name if name in known or name.lower() in other.lower() else match[0]

  return _ABBREVIATION.sub(full_name, text)


def are_same(reference: str, answer: str) -> bool | None:
  """Returns True for one truth value or one choice in two writings; None leaves it open."""
  truths = [_truth(text) for text in (reference, answer)]
  if None not in truths and truths[0] == truths[1]:
    return True
  choice = _CHOICE.fullmatch(_flat(reference))
  if choice is not None and _chosen(answer) == choice[choice.lastindex]:
    return True
  return None


def _flat(text: str) -> str:
  return _TEXT.sub(r"\1", text).strip()


def _truth(text: str) -> str | None:
  """Returns T or F for a truth value; a small letter is a variable."""
  text = _flat(text).rstrip(".")
  return text if text in ("T", "F") else _TRUTH.get(text.lower())


def _chosen(answer: str) -> str | None:
  r"""Returns the letter of an answer that gives it before its option's text; else None."""
  marked = _MARKED_OPTION.match(answer)
  match = marked or _PLAIN_OPTION.match(answer)
  if match is None:
    return None
  option = _TEXT.sub(r" \1 ", match[4].replace("}", " ", 1) if marked else match[4]).strip()
  # A letter in \text{} is no factor, so a minus behind it is the option's.
  beginning = re.sub(r"^-(?=\S)", "", option) if marked else option
  if not option or _CONTINUES.match(beginning) or _OTHER_LETTER.search(option):
    return None
  return next(filter(None, match.groups()[:3]))


def compare_ratios(reference: str, answer: str) -> bool | None:
  """Compares mathematics of which one side is a ratio; None leaves it open."""
  sides = [_terms(text) for text in (reference, answer)]
  counts = [len(terms) for terms in sides]
  if max(counts) == 1:
    return None
  if min(counts) == 1:
    other = reference if counts[0] == 1 else answer
    # A fraction that is written as one has two terms as well.
    return None if max(counts) == 2 and ("\\frac" in other or "/" in other) else False
  if counts[0] != counts[1]:
    return False
  values = [[numerals.value(term) for term in terms] for terms in sides]
  if None in values[0] + values[1]:
    return None
  if all(_DURATION.fullmatch(text.strip()) for text in (reference, answer)):
    return [term.exact for term in values[0]] == [term.exact for term in values[1]]
  pairs = [(a.exact, b.exact) for a, b in zip(*values, strict=True)]
  if any((a == 0) != (b == 0) for a, b in pairs):
    return False
  return all(a * d == b * c for (a, b), (c, d) in itertools.combinations(pairs, 2))


def _terms(text: str) -> list[str]:
  """Returns what stands between the colons of a ratio; the whole text where it is none."""
  terms = re.split(r":(?![^(\[{]*[)\]}])", text)
  if not all(map(str.strip, terms)) or _RELATION.search(text):
    return [text]
  return terms
