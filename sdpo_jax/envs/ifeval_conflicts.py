"""Finds two constraints of IFEval that no response can follow both.

It knows these kinds; what it does not know counts as possible:
  amounts     at least 500 words, and less than 100; also what a text that must occur adds to one
  texts       a text that must occur holds a comma, or a forbidden word as a whole
  cases       capitals and small letters; an option or a section's marker in the other case
  languages   two of them, or another one than English in capitals
  places      two different beginnings, endings, or first words of one paragraph; a request that
              must be repeated before a text that begins with a mark of its own
A request that must be repeated may itself hold too much of something, such as the word that it
forbids. `broken_by_request` finds what can then hold for the rest of the response alone.

A constraint is a pair of its name and the arguments of its row, as `ifeval.py` has checked them.
Where its checks pass a response that only evades a constraint, the pair counts as possible: "cats"
holds the keyword "cat" and not the forbidden word "cat".
"""

import itertools
from typing import NamedTuple

from sdpo_jax.envs import ifeval_checks as checks

Constraint = tuple[str, dict]


class Text(NamedTuple):
  """A text that a response must hold: one of `forms`, so many `times`.

  `before` and `after` stand for what may surround it: a letter where a word may go on.
  """

  forms: tuple[str, ...]
  times: int = 1
  before: str = "x"
  after: str = "x"
  has_case: bool = False  # in capital or small letters exactly as it stands


REPEAT = "combination:repeat_prompt"


def find(constraints: list[Constraint]) -> tuple[str, str] | None:
  """Returns the names of two constraints that exclude each other, None if there are none."""
  for pair in itertools.combinations(constraints, 2):
    for a, b in (pair, pair[::-1]):
      exceeds = b[0] != REPEAT and _amounts(a, b)  # else see `broken_by_request`
      if exceeds or _cases(a, b) or _languages(a, b) or _places(a, b):
        return pair[0][0], pair[1][0]
  return None


def broken_by_request(constraints: list[Constraint]) -> list[int]:
  """Returns the places of those constraints that the request breaks which must be repeated."""
  requests = [constraint for constraint in constraints if constraint[0] == REPEAT]
  return [
    i
    for i, constraint in enumerate(constraints)
    if any(_amounts(constraint, request) for request in requests)
  ]


def _texts(name: str, arguments: dict) -> list[Text]:
  """Returns the texts that a constraint demands."""
  match name.partition(":")[2]:
    case "existence":
      return [Text((keyword,)) for keyword in arguments["keywords"]]
    case "frequency" if arguments["relation"] == "at least":
      return [Text((arguments["keyword"],), arguments["frequency"])]
    case "letter_frequency" if arguments["let_relation"] == "at least":
      return [Text((arguments["letter"],), arguments["let_frequency"])]
    case "constrained_response":
      return [Text(checks.OPTIONS, has_case=True)]
    case "repeat_prompt":
      return [Text((arguments["prompt_to_repeat"],))]
    case "end_checker":
      return [Text((arguments["end_phrase"],), before=" ", after=" ")]
    case "nth_paragraph_first_word":
      return [Text((checks.without_marks(arguments["first_word"]),), before=" ", after=" ")]
    case "multiple_sections":
      marker, count = arguments["section_spliter"], arguments["num_sections"]
      return [Text((marker,), count, before=" ", after="1", has_case=True)]
    case "postscript":
      marker = arguments["postscript_marker"]
      return [Text((marker, marker.replace(".", ". ").strip()), before=" ")]
  return []


def _amounts(a: Constraint, b: Constraint) -> bool:
  """Tells whether one demands more of something than the other allows."""
  return any(_least(*b, what) > most for what, most in _most(*a).items())


def _most(name: str, arguments: dict) -> dict[tuple, int]:
  """Returns what a constraint bounds from above, and the bounds."""
  match name.partition(":")[2]:
    case "no_comma":
      return {("commas",): 0}
    case "forbidden_words":
      return {("word", word): 0 for word in arguments["forbidden_words"]}
    case "frequency" if arguments["relation"] == "less than":
      return {("text", arguments["keyword"].lower()): arguments["frequency"] - 1}
    case "letter_frequency" if arguments["let_relation"] == "less than":
      return {("text", arguments["letter"].lower()): arguments["let_frequency"] - 1}
    case "number_words" if arguments["relation"] == "less than":
      return {("words",): arguments["num_words"] - 1}
    case "number_sentences" if arguments["relation"] == "less than":
      return {("sentences",): arguments["num_sentences"] - 1}
    case "capital_word_frequency" if arguments["capital_relation"] == "less than":
      return {("capitals",): arguments["capital_frequency"] - 1}
    case "english_lowercase":
      return {("capitals",): 0}
    case "number_paragraphs" | "nth_paragraph_first_word" | "number_bullet_lists":
      return dict([_exact(name, arguments)])
  return {}


def _exact(name: str, arguments: dict) -> tuple[tuple, int]:
  """Returns what a constraint demands exactly so much of. Paragraphs are of two kinds."""
  key = "num_bullets" if name.endswith("bullet_lists") else "num_paragraphs"
  return (name,), arguments[key]


def _least(name: str, arguments: dict, what: tuple) -> int:
  """Returns how much of something a constraint demands at least."""
  demanded = [_occurrences(text, what) for text in _texts(name, arguments)]
  match name.partition(":")[2]:
    case "number_words" if arguments["relation"] == "at least" and what == ("words",):
      demanded.append(arguments["num_words"])
    case "number_sentences" if arguments["relation"] == "at least":
      if what in (("sentences",), ("words",)):  # each sentence has a word
        demanded.append(arguments["num_sentences"])
    case "capital_word_frequency" if arguments["capital_relation"] == "at least":
      if what in (("capitals",), ("words",)):
        demanded.append(arguments["capital_frequency"])
    case "english_capital" if what == ("capitals",):
      demanded.append(1)
    case "number_paragraphs" | "nth_paragraph_first_word" | "number_bullet_lists":
      if what == (name,):
        demanded.append(_exact(name, arguments)[1])
  return max(demanded, default=0)


def _occurrences(text: Text, what: tuple) -> int:
  """Counts something in a text that must occur, at least."""
  match what:
    case ("commas",):
      counts = [bool(checks.no_comma(form)) for form in text.forms]
    case ("words",):
      # One word may hold the same text several times.
      times = text.times if text.before == " " else 1
      return times * min(len(checks.words(form)) for form in text.forms)
    case ("text", sought):
      counts = [form.lower().count(sought) for form in text.forms]
    case ("word", word):
      counts = [checks.finds_word(f"{text.before}{form}{text.after}", word) for form in text.forms]
    case _:
      return 0
  return text.times * int(min(counts))


def _cases(a: Constraint, b: Constraint) -> bool:
  """Tells whether one demands a text in the other case than the other."""
  capital, small = "change_case:english_capital", "change_case:english_lowercase"
  if a[0] not in (capital, small):
    return False
  change = str.upper if a[0] == capital else str.lower
  return any(
    all(change(form) != form for form in text.forms) for text in _texts(*b) if text.has_case
  )


def _languages(a: Constraint, b: Constraint) -> bool:
  languages = [_language(*constraint) for constraint in (a, b)]
  return None not in languages and languages[0] != languages[1]


def _language(name: str, arguments: dict) -> str | None:
  if name in ("change_case:english_capital", "change_case:english_lowercase"):
    return "en"
  return arguments["language"] if name == "language:response_language" else None


def _places(a: Constraint, b: Constraint) -> bool:
  """Tells whether two constraints demand different texts of one place."""
  kinds = [constraint[0].partition(":")[2] for constraint in (a, b)]
  if kinds == ["repeat_prompt", "repeat_prompt"]:
    begin, other = (_request(c) for c in (a, b))
    return not begin.startswith(other) and not other.startswith(begin)
  if kinds == ["end_checker", "end_checker"]:
    end, other = (c[1]["end_phrase"].lower().strip('" ') for c in (a, b))
    return not end.endswith(other) and not other.endswith(end)
  if kinds == ["repeat_prompt", "quotation"]:
    return _request(a)[:1] not in '"“„'
  if kinds == ["repeat_prompt", "json_format"]:
    return _request(a)[:1] not in '{["`-0123456789tfn'
  if kinds[0] == "nth_paragraph_first_word" == kinds[1]:
    words = [c[1]["first_word"] for c in (a, b)]
    is_one_place = a[1]["nth_paragraph"] == b[1]["nth_paragraph"]
    return is_one_place and not any(_begins(*pair) for pair in (words, words[::-1]))
  if kinds == ["repeat_prompt", "nth_paragraph_first_word"]:
    return b[1]["nth_paragraph"] == 1 and not _begins(_request(a), b[1]["first_word"])
  return False


def _request(constraint: Constraint) -> str:
  return constraint[1]["prompt_to_repeat"].lower()


def _begins(text: str, first_word: str) -> bool:
  """Tells whether a text could be the beginning of a paragraph that begins with a word."""
  paragraph = text.split("\n\n")[0]
  return not checks.nth_paragraph_first_word(
    paragraph, num_paragraphs=1, nth_paragraph=1, first_word=first_word
  )
