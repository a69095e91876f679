"""Judges instructions that a program can check: the 25 constraints of IFEval.

A row has
  prompt                the request
  instruction_id_list   names of constraints, keys of CONSTRAINTS
  kwargs                one object of arguments per constraint; null values, as on the hub, count
                        as absent
  key                   a number of the row

Source: arXiv 2311.07911 and its release. The constraints are checked as there, on the response
after its thinking block. Departures:
  * Sentences are split by a rule here rather than by a trained model.
  * Words in capitals may contain hyphens, apostrophes and full stops.
  * `language.detect` tells the language, and what it cannot tell counts as followed.
  * Keywords are taken literally, not as patterns.

Reward is 1 if every constraint is followed (prompt-level strict accuracy), else 0. Feedback names
each broken constraint with what the response holds instead.
"""

import collections
import inspect
import json
import re

from sdpo_jax.envs import language as languages
from sdpo_jax.envs.rows import field, final_text, messages
from sdpo_jax.records import Feedback, Task

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
RELATIONS = ("at least", "less than")
# The look-behind and the possessive ++ and *+ keep the time linear over a long run of marks.
_SENTENCE_END = re.compile(r"(?<![.!?…。？！।])([.!?…。？！।]++[\"'”’)\]*_]*+)(\s+|$)")
_ABBREVIATIONS = frozenset(
  """
  mr mrs ms dr prof st jr sr vs etc inc ltd co corp no vol fig eq e.g i.e a.m p.m u.s capt gen rev
  """.split()
)


class IFEval:
  """Judges by checks alone."""

  def task_from_row(self, row: dict, split: str) -> Task:
    """Reads a row. ValueError that names the field."""
    names = field(row, "instruction_id_list", list)
    arguments = field(row, "kwargs", list)
    if len(names) != len(arguments) or not names:
      raise ValueError(f"field 'kwargs' has {len(arguments)} entries for {len(names)} instructions")
    constraints = [_constraint(*pair) for pair in zip(names, arguments, strict=True)]
    return Task(
      id=f"ifeval/{split}/{row.get('key', row['idx'])}",
      prompt=field(row, "prompt"),
      split=split,
      data={"constraints": constraints},
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the request as it stands: it names its constraints itself."""
    return messages(task)

  def judge(self, task: Task, response: str) -> Feedback:
    """Runs the checks of all constraints of the task."""
    text, fault = final_text(response)
    if fault:
      return Feedback(0.0, fault)
    constraints = task.data["constraints"]
    complaints = []
    for name, arguments in constraints:
      complaint = CONSTRAINTS[name](text, **arguments)
      if complaint:
        complaints.append(f"- {name}: {complaint}")
    if not complaints:
      return Feedback(1.0, "")
    verb = "is" if len(complaints) == 1 else "are"
    head = f"{len(complaints)} of {len(constraints)} constraints {verb} not followed:"
    return Feedback(0.0, "\n".join([head, *complaints]))


def _constraint(name: str, arguments: dict | None) -> tuple[str, dict]:
  """Returns a constraint with those of its arguments that are set; ValueError if it has others."""
  if name not in CONSTRAINTS:
    raise ValueError(
      f"field 'instruction_id_list': {name!r} is unknown; choose from {sorted(CONSTRAINTS)}"
    )
  arguments = {key: value for key, value in (arguments or {}).items() if value is not None}
  try:
    inspect.signature(CONSTRAINTS[name]).bind("", **arguments)
  except TypeError as error:
    raise ValueError(f"field 'kwargs' of {name}: {error}") from error
  for key, value in arguments.items():
    if key.endswith("relation") and value not in RELATIONS:
      raise ValueError(
        f"field 'kwargs' of {name}: {key} is {value!r}; choose from {list(RELATIONS)}"
      )
  return name, arguments


# The checks. Each takes the text and, by name, the arguments of the row. It returns what is wrong,
# "" if nothing is. Names of arguments, with their spelling, are the data set's.


def _in_relation(count: int, what: str, relation: str, bound: int) -> str:
  """Complains unless the count is less than the bound, or at least the bound, as asked."""
  is_followed = count < bound if relation == "less than" else count >= bound
  if is_followed:
    return ""
  return f"the response has {count} {what}; it must have {relation} {bound}."


def _exactly(count: int, what: str, expected: int) -> str:
  """Complains unless the count is the expected one."""
  if count == expected:
    return ""
  return f"the response has {count} {what}; it must have exactly {expected}."


def sentences(text: str) -> list[str]:
  """Splits a text into its sentences.

  One ends at . ! ? and their like before white space, but not after an abbreviation, an initial
  or the number of a list item.
  """
  found = []
  begin = 0
  for end in _SENTENCE_END.finditer(text):
    following = text[end.end() : end.end() + 1]
    if _ends_sentence(text[begin : end.start()], end[1], following):
      found.append(text[begin : end.end()].strip())
      begin = end.end()
  found.append(text[begin:].strip())
  return [sentence for sentence in found if any(c.isalnum() for c in sentence)]


def _ends_sentence(before: str, mark: str, following: str) -> bool:
  """Tells whether a mark ends a sentence.

  `before` is the sentence up to the mark, `following` the first character after the white space
  behind it, "" at the end of the text.
  """
  if mark != "." or not following:
    return True
  word = before.rpartition(" ")[2].rpartition("\n")[2].lower().lstrip("(\"'“*_")
  is_initial = len(word) == 1 and word.isalpha() and word != "i"
  is_list_number = before.strip().isdecimal()
  goes_on = following.islower()
  return not (word in _ABBREVIATIONS or is_initial or is_list_number or goes_on)


# length_constraints


def number_words(text, *, num_words, relation):
  """Asks for at least, or less than, so many words."""
  return _in_relation(len(re.findall(r"\w+", text)), "words", relation, num_words)


def number_sentences(text, *, num_sentences, relation):
  """Asks for at least, or less than, so many sentences."""
  return _in_relation(len(sentences(text)), "sentences", relation, num_sentences)


def number_paragraphs(text, *, num_paragraphs):
  """Asks for so many paragraphs with dividers *** between them."""
  paragraphs = re.split(r"\s?\*\*\*\s?", text)
  if any(not paragraph.strip() for paragraph in paragraphs[1:-1]):
    return "two dividers *** stand with nothing between them."
  return _exactly(_count_filled(paragraphs), "paragraphs between dividers ***", num_paragraphs)


def nth_paragraph_first_word(text, *, num_paragraphs, nth_paragraph, first_word):
  """Asks for so many paragraphs, and for the first word of one of them; the count starts at 1."""
  paragraphs = text.split("\n\n")
  complaint = _exactly(
    _count_filled(paragraphs), "paragraphs separated by an empty line", num_paragraphs
  )
  if complaint:
    return complaint
  words = paragraphs[nth_paragraph - 1].split()
  word = ""
  if words:
    unquoted = words[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", unquoted)[0].lower()
  if word == first_word.lower():
    return ""
  return f"paragraph {nth_paragraph} begins with {word!r}; it must begin with {first_word!r}."


def _count_filled(texts: list[str]) -> int:
  """Counts the texts that hold more than white space."""
  return sum(bool(text.strip()) for text in texts)


# keywords


def existence(text, *, keywords):
  """Asks for all keywords, in capital or small letters."""
  absent = [keyword for keyword in keywords if keyword.lower() not in text.lower()]
  if not absent:
    return ""
  return f"the response does not contain {', '.join(map(repr, absent))}."


def frequency(text, *, keyword, frequency, relation):
  """Asks for a keyword at least, or less than, so many times."""
  keyword = keyword.strip()
  count = text.lower().count(keyword.lower())
  return _in_relation(count, f"occurrences of {keyword!r}", relation, frequency)


def forbidden_words(text, *, forbidden_words):
  """Forbids words; other words that begin or end like them are allowed."""
  present = [
    word for word in forbidden_words if re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
  ]
  if not present:
    return ""
  return f"the response contains {', '.join(map(repr, present))}."


def letter_frequency(text, *, letter, let_frequency, let_relation):
  """Asks for a letter, capital or small, at least, or less than, so many times."""
  count = text.lower().count(letter.lower())
  return _in_relation(count, f"occurrences of the letter {letter!r}", let_relation, let_frequency)


# language and case


def response_language(text, *, language):
  """Asks for a language, named by its ISO 639-1 code."""
  detected = languages.detect(text)
  if detected in (None, language):
    return ""
  expected = languages.NAMES.get(language, language)
  return f"the response is in {languages.NAMES[detected]}; it must be in {expected}."


def english_capital(text):
  """Asks for English in capital letters."""
  if not text.isupper():
    return "the response has small letters; all must be capital."
  return response_language(text, language="en")


def english_lowercase(text):
  """Asks for English in small letters."""
  if not text.islower():
    return "the response has capital letters; all must be small."
  return response_language(text, language="en")


def capital_word_frequency(text, *, capital_frequency, capital_relation):
  """Asks for at least, or less than, so many words in capital letters."""
  words = re.findall(r"\w+(?:[-'’.]\w+)*", text)
  count = sum(word.isupper() for word in words)
  return _in_relation(count, "words in capital letters", capital_relation, capital_frequency)


# detectable_content and detectable_format


def number_placeholders(text, *, num_placeholders):
  """Asks for at least so many placeholders such as [name]."""
  count = len(re.findall(r"\[[^\[\]\n]*\]", text))
  return _in_relation(count, "placeholders in square brackets", "at least", num_placeholders)


def postscript(text, *, postscript_marker):
  """Asks for a postscript that begins with the marker; P.S. and P.P.S may hold spaces."""
  marker = postscript_marker.strip()
  patterns = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
  pattern = patterns.get(marker, re.escape(marker.lower()))
  if re.search(pattern, text.lower()):
    return ""
  return f"the response has no postscript that begins with {marker}."


def number_bullet_lists(text, *, num_bullets):
  """Asks for so many lines that begin with * or with -."""
  stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
  dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
  return _exactly(len(stars) + len(dashes), "bullet points", num_bullets)


def constrained_response(text):
  """Asks for one of the OPTIONS."""
  if any(option in text for option in OPTIONS):
    return ""
  return f"the response has none of: {' '.join(OPTIONS)}"


def number_highlighted_sections(text, *, num_highlights):
  """Asks for at least so many pieces of text between single or double stars."""
  pieces = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
  count = _count_filled([piece.strip("*") for piece in pieces])
  return _in_relation(count, "highlighted sections such as *this*", "at least", num_highlights)


def multiple_sections(text, *, section_spliter, num_sections):
  """Asks for at least so many sections that begin with the marker and a number."""
  marker = section_spliter.strip()
  count = len(re.findall(rf"{re.escape(marker)}\s?\d+", text))
  return _in_relation(count, f"sections that begin with '{marker} X'", "at least", num_sections)


def title(text):
  """Asks for a title such as <<title>> in one line."""
  for line in text.split("\n"):
    # From the first << of the line to its last >>: the pattern <<.+>> takes quadratic time.
    begin = line.find("<<")
    end = line.rfind(">>")
    if 0 <= begin < end - 2 and line[begin:end].strip("<>").strip():
      return ""
  return "the response has no title in double angular brackets, such as <<title>>."


def json_format(text):
  """Asks for JSON and nothing else; a code block may surround it."""
  text = text.strip()
  for fence in ("```json", "```Json", "```JSON", "```"):
    text = text.removeprefix(fence)
  try:
    json.loads(text.removesuffix("```").strip())
  except (ValueError, RecursionError) as error:
    return f"the response as a whole is not JSON: {error}."
  return ""


# combination, startend, punctuation


def repeat_prompt(text, *, prompt_to_repeat):
  """Asks for the request, word for word, before the answer."""
  if text.strip().lower().startswith(prompt_to_repeat.strip().lower()):
    return ""
  return "the response does not begin with the request, word for word."


def two_responses(text):
  """Asks for two different answers with ****** between them."""
  pieces = text.split("******")
  if any(not piece.strip() for piece in pieces[1:-1]):
    return "two separators ****** stand with nothing between them."
  answers = collections.Counter(piece.strip() for piece in pieces if piece.strip())
  count = answers.total()
  if count != 2:
    return f"the response holds {count} answers separated by ******; it must hold exactly 2."
  return "" if len(answers) == 2 else "the two answers are the same."


def end_checker(text, *, end_phrase):
  """Asks for a phrase at the end; a quotation mark may follow it."""
  end_phrase = end_phrase.strip()
  if text.strip().strip('"').lower().endswith(end_phrase.lower()):
    return ""
  return f"the response does not end with: {end_phrase}"


def quotation(text):
  """Asks for double quotation marks around the whole response."""
  text = text.strip()
  if len(text) > 1 and text[0] == text[-1] == '"':
    return ""
  return "the response is not wrapped in double quotation marks."


def no_comma(text):
  """Forbids commas."""
  count = text.count(",")
  return f"the response has {count} commas; it must have none." if count else ""


# Name of a constraint in `instruction_id_list`: its check.
CONSTRAINTS = {
  "change_case:capital_word_frequency": capital_word_frequency,
  "change_case:english_capital": english_capital,
  "change_case:english_lowercase": english_lowercase,
  "combination:repeat_prompt": repeat_prompt,
  "combination:two_responses": two_responses,
  "detectable_content:number_placeholders": number_placeholders,
  "detectable_content:postscript": postscript,
  "detectable_format:constrained_response": constrained_response,
  "detectable_format:json_format": json_format,
  "detectable_format:multiple_sections": multiple_sections,
  "detectable_format:number_bullet_lists": number_bullet_lists,
  "detectable_format:number_highlighted_sections": number_highlighted_sections,
  "detectable_format:title": title,
  "keywords:existence": existence,
  "keywords:forbidden_words": forbidden_words,
  "keywords:frequency": frequency,
  "keywords:letter_frequency": letter_frequency,
  "language:response_language": response_language,
  "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
  "length_constraints:number_paragraphs": number_paragraphs,
  "length_constraints:number_sentences": number_sentences,
  "length_constraints:number_words": number_words,
  "punctuation:no_comma": no_comma,
  "startend:end_checker": end_checker,
  "startend:quotation": quotation,
}
