"""Following instructions that a program can check: the 25 constraints of IFEval.

Rows: `prompt`, `instruction_id_list`, `kwargs` (one object per instruction; null values, as on the hub, count as absent), `key`.
Source: arXiv 2311.07911 and its release; the constraints are checked as there, on the response after its thinking block. Departures: sentences are
split by a rule here rather than by a trained model; words in capitals may contain hyphens, apostrophes and full stops; the language is told by
`language.detect`, and what it cannot tell counts as followed; keywords are taken literally, not as patterns.

Reward is 1 if every constraint is followed (prompt-level strict accuracy), else 0. Feedback names each broken constraint with what was found.
Each check returns what is wrong ("" if nothing) and takes the row's arguments by name.
"""

import collections
import inspect
import json
import re

from sdpo_jax.envs import language as languages
from sdpo_jax.envs.rows import field, final_text, messages
from sdpo_jax.records import Feedback, Task

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_SENTENCE_END = re.compile(r"(?<![.!?…。？！।])([.!?…。？！।]++[\"'”’)\]*_]*+)(\s+|$)")
_ABBREVIATIONS = frozenset(
  "mr mrs ms dr prof st jr sr vs etc inc ltd co corp no vol fig eq e.g i.e a.m p.m u.s capt gen rev".split()
)


class IFEval:
  """Judges by checks alone."""

  def task_from_row(self, row: dict, split: str) -> Task:
    names, given = field(row, "instruction_id_list", list), field(row, "kwargs", list)
    if len(names) != len(given) or not names:
      raise ValueError(f"field 'kwargs' has {len(given)} entries for {len(names)} instructions")
    constraints = []
    for name, arguments in zip(names, given):
      if name not in CONSTRAINTS:
        raise ValueError(
          f"field 'instruction_id_list': {name!r} is unknown; choose from {sorted(CONSTRAINTS)}"
        )
      arguments = {k: v for k, v in (arguments or {}).items() if v is not None}
      try:
        inspect.signature(CONSTRAINTS[name]).bind("", **arguments)
      except TypeError as error:
        raise ValueError(f"field 'kwargs' of {name}: {error}") from error
      for key, value in arguments.items():
        if key.endswith("relation") and value not in ("less than", "at least"):
          raise ValueError(
            f"field 'kwargs' of {name}: {key} is {value!r}; choose from ['at least', 'less than']"
          )
      constraints.append((name, arguments))
    return Task(
      id=f"ifeval/{split}/{row.get('key', row['idx'])}",
      prompt=field(row, "prompt"),
      split=split,
      data={"constraints": constraints},
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    return messages(task)

  def judge(self, task: Task, response: str) -> Feedback:
    text, fault = final_text(response)
    if fault:
      return Feedback(0.0, fault)
    constraints = task.data["constraints"]
    broken = [
      (name, complaint)
      for name, arguments in constraints
      if (complaint := CONSTRAINTS[name](text, **arguments))
    ]
    if not broken:
      return Feedback(1.0, "")
    head = f"{len(broken)} of {len(constraints)} constraints {'is' if len(broken) == 1 else 'are'} not followed:"
    return Feedback(
      0.0, "\n".join([head, *(f"- {name}: {complaint}" for name, complaint in broken)])
    )


def _count(found: int, what: str, relation: str, bound: int) -> str:
  follows = found < bound if relation == "less than" else found >= bound
  return "" if follows else f"the response has {found} {what}; it must have {relation} {bound}."


def sentences(text: str) -> list[str]:
  """Ends: . ! ? and their like before white space, but not after an abbreviation, an initial or the number of a list item."""
  found, begin = [], 0
  for end in _SENTENCE_END.finditer(text):
    word = (
      text[begin : end.start()].rpartition(" ")[2].rpartition("\n")[2].lower().lstrip("(\"'“*_")
    )
    following = text[end.end() : end.end() + 1]
    if (
      end[1][0] == "."
      and len(end[1]) == 1
      and following
      and (
        word in _ABBREVIATIONS
        or (len(word) == 1 and word.isalpha() and word != "i")
        or text[begin : end.start()].strip().isdecimal()
        or following.islower()
      )
    ):
      continue
    found.append(text[begin : end.end()].strip())
    begin = end.end()
  return [s for s in [*found, text[begin:].strip()] if any(c.isalnum() for c in s)]


# length_constraints


def number_words(text, *, num_words, relation):
  return _count(len(re.findall(r"\w+", text)), "words", relation, num_words)


def number_sentences(text, *, num_sentences, relation):
  return _count(len(sentences(text)), "sentences", relation, num_sentences)


def number_paragraphs(text, *, num_paragraphs):
  parts = re.split(r"\s?\*\*\*\s?", text)
  if any(not part.strip() for part in parts[1:-1]):
    return "two dividers *** stand with nothing between them."
  found = sum(bool(part.strip()) for part in parts)
  return (
    ""
    if found == num_paragraphs
    else f"the response has {found} paragraphs between dividers ***; it must have exactly {num_paragraphs}."
  )


def nth_paragraph_first_word(text, *, num_paragraphs, nth_paragraph, first_word):
  parts = text.split("\n\n")
  found = sum(bool(part.strip()) for part in parts)
  if found != num_paragraphs:
    return f"the response has {found} paragraphs separated by an empty line; it must have exactly {num_paragraphs}."
  words = parts[nth_paragraph - 1].split()
  word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0].lower() if words else ""
  return (
    ""
    if word == first_word.lower()
    else f"paragraph {nth_paragraph} begins with {word!r}; it must begin with {first_word!r}."
  )


# keywords


def existence(text, *, keywords):
  absent = [k for k in keywords if k.lower() not in text.lower()]
  return f"the response does not contain {', '.join(map(repr, absent))}." if absent else ""


def frequency(text, *, keyword, frequency, relation):
  keyword = keyword.strip()
  return _count(
    text.lower().count(keyword.lower()), f"occurrences of {keyword!r}", relation, frequency
  )


def forbidden_words(text, *, forbidden_words):
  present = [w for w in forbidden_words if re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE)]
  return f"the response contains {', '.join(map(repr, present))}." if present else ""


def letter_frequency(text, *, letter, let_frequency, let_relation):
  return _count(
    text.lower().count(letter.lower()),
    f"occurrences of the letter {letter!r}",
    let_relation,
    let_frequency,
  )


# language and case


def response_language(text, *, language):
  found = languages.detect(text)
  wanted = languages.NAMES.get(language, language)
  return (
    ""
    if found in (None, language)
    else f"the response is in {languages.NAMES[found]}; it must be in {wanted}."
  )


def english_capital(text):
  return (
    "the response has small letters; all must be capital."
    if not text.isupper()
    else response_language(text, language="en")
  )


def english_lowercase(text):
  return (
    "the response has capital letters; all must be small."
    if not text.islower()
    else response_language(text, language="en")
  )


def capital_word_frequency(text, *, capital_frequency, capital_relation):
  words = re.findall(r"\w+(?:[-'’.]\w+)*", text)
  return _count(
    sum(word.isupper() for word in words),
    "words in capital letters",
    capital_relation,
    capital_frequency,
  )


# detectable_content and detectable_format


def number_placeholders(text, *, num_placeholders):
  return _count(
    len(re.findall(r"\[[^\[\]\n]*\]", text)),
    "placeholders in square brackets",
    "at least",
    num_placeholders,
  )


def postscript(text, *, postscript_marker):
  marker = postscript_marker.strip()
  pattern = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(marker, re.escape(marker.lower()))
  return (
    ""
    if re.search(pattern, text.lower())
    else f"the response has no postscript that begins with {marker}."
  )


def number_bullet_lists(text, *, num_bullets):
  found = len(re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)) + len(
    re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
  )
  return (
    ""
    if found == num_bullets
    else f"the response has {found} bullet points; it must have exactly {num_bullets}."
  )


def constrained_response(text):
  return (
    ""
    if any(option in text for option in OPTIONS)
    else f"the response has none of: {' '.join(OPTIONS)}"
  )


def number_highlighted_sections(text, *, num_highlights):
  found = sum(
    bool(h.strip("*").strip())
    for pattern in (r"\*[^\n*]*\*", r"\*\*[^\n*]*\*\*")
    for h in re.findall(pattern, text)
  )
  return _count(found, "highlighted sections such as *this*", "at least", num_highlights)


def multiple_sections(text, *, section_spliter, num_sections):
  marker = section_spliter.strip()
  return _count(
    len(re.findall(rf"{re.escape(marker)}\s?\d+", text)),
    f"sections that begin with '{marker} X'",
    "at least",
    num_sections,
  )


def title(text):
  # from the first << of a line to its last >>; the pattern <<.+>> takes quadratic time
  spans = [(line, line.find("<<"), line.rfind(">>")) for line in text.split("\n")]
  return (
    ""
    if any(
      0 <= begin < end - 2 and line[begin:end].strip("<>").strip() for line, begin, end in spans
    )
    else "the response has no title in double angular brackets, such as <<title>>."
  )


def json_format(text):
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
  return (
    ""
    if text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    else "the response does not begin with the request, word for word."
  )


def two_responses(text):
  parts = text.split("******")
  if any(not part.strip() for part in parts[1:-1]):
    return "two separators ****** stand with nothing between them."
  answers = collections.Counter(part.strip() for part in parts if part.strip())
  if answers.total() != 2:
    return (
      f"the response holds {answers.total()} answers separated by ******; it must hold exactly 2."
    )
  return "" if len(answers) == 2 else "the two answers are the same."


def end_checker(text, *, end_phrase):
  ends = text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
  return "" if ends else f"the response does not end with: {end_phrase.strip()}"


def quotation(text):
  text = text.strip()
  return (
    ""
    if len(text) > 1 and text[0] == text[-1] == '"'
    else "the response is not wrapped in double quotation marks."
  )


def no_comma(text):
  return f"the response has {text.count(',')} commas; it must have none." if "," in text else ""


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
