"""The 25 checks of IFEval: each takes a text and returns what is wrong with it, "" if nothing is.

A check gets the arguments of its row by name. The names, with their spelling, are the data set's.
"There" is the release; `ifeval.py` has the rules that hold for all of them.
"""

import collections
import json
import re
import unicodedata

from sdpo_jax.envs import language as languages

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
RELATIONS = ("at least", "less than")
# A mark of the first kind needs white space behind it; scripts without spaces have the second kind.
# The look-behind and the possessive ++ and *+ keep the time linear over a long run of marks.
_SENTENCE_END = re.compile(
  r"(?<![.!?…؟۔。？！।॥])"
  r"([.!?…؟۔]++[\"'”’)\]*_]*+(?=\s|$)|[。？！।॥]++[\"'”’」』）)\]*_]*+)\s*"
)
# A name or an example follows these.
_ABBREVIATIONS = frozenset(
  "mr mrs ms dr prof vs e.g i.e cf capt gen rev sen gov col lt sgt mt".split()
)
# These, like an initial, end a sentence before a word that often begins one.
_LAST_ABBREVIATIONS = frozenset(
  "jr sr st etc inc ltd co corp vol fig eq a.m p.m u.s u.s.a u.k u.n d.c ph.d b.c a.d".split()
)
_BEGINNINGS = frozenset(
  """
  I You He She It We They The An This That These Those There Here My Your His Her Its Our Their In
  On At By For From With To As If When While After Before But And Or So Yet However Also Then Now
  What Who Why How Where Which Is Are Was Were Do Does Did Can Not No Yes Many Some All Most Every
  """.split()
)
_NEXT_WORD = re.compile(r"[\"'“‘(*_]*([^\W\d_]+)")


def as_it_looks(text: str) -> str:
  """Returns a text with composed letters, plain line ends and nothing that does not print."""
  text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
  # A variation selector chooses a form of the character before it.
  return "".join(
    c for c in text if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f"
  )


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


def words(text: str) -> list[str]:
  """Splits a text into runs of letters and digits; vowel signs and accents belong to a word."""
  # Python's \w has no combining marks, which would split most words of Hindi.
  return re.findall(r"\w+", "".join(c for c in text if unicodedata.category(c)[0] != "M"))


def _goes_on(character: str) -> bool:
  """Tells whether a word would go on with that character."""
  return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"


def finds_word(text: str, word: str) -> bool:
  """Tells whether a text has the word, in capital or small letters, and not as part of another."""
  # A phrase may be broken over two lines.
  pattern = r"\s+".join(map(re.escape, word.split()))
  return any(
    _stands_alone(text, *match.span()) for match in re.finditer(pattern, text, re.IGNORECASE)
  )


def _stands_alone(text: str, begin: int, end: int) -> bool:
  """Tells whether text[begin:end] neither begins nor ends inside a word."""
  begins = begin == 0 or not (_goes_on(text[begin - 1]) and _goes_on(text[begin]))
  ends = end == len(text) or not (_goes_on(text[end - 1]) and _goes_on(text[end]))
  return begins and ends


def sentences(text: str) -> list[str]:
  """Splits a text into its sentences.

  One ends at . ! ? and their like before white space, but not after an abbreviation, an initial
  or the number of a list item, nor before a small letter in a text that has capitals too. Initials
  and abbreviations such as U.S. end one before a word that often begins a sentence: "in the U.S. It
  rains." is two, "the U.S. Army." is one. Full stops of scripts without spaces need none.
  """
  found = []
  begin = 0
  has_cases = not (text.islower() or text.isupper())
  for end in _SENTENCE_END.finditer(text):
    following = text[end.end() : end.end() + 20]
    if _ends_sentence(text[begin : end.start()], end[1], following, has_cases):
      found.append(text[begin : end.end()].strip())
      begin = end.end()
  found.append(text[begin:].strip())
  return [sentence for sentence in found if any(c.isalnum() for c in sentence)]


def _ends_sentence(before: str, mark: str, following: str, has_cases: bool) -> bool:
  """Tells whether a mark ends a sentence.

  `before` is the sentence up to the mark, `following` how the text goes on after the white space
  behind it, "" at its end. Without cases no small letter tells that a sentence goes on.
  """
  if mark != "." or not following:
    return True
  word = before.rpartition(" ")[2].rpartition("\n")[2].lower().lstrip("(\"'“*_")
  line = before.rpartition("\n")[2].strip(" \t*#_-(>")
  goes_on = (has_cases and following[0].islower()) or (word == "no" and following[0].isdigit())
  if goes_on or word in _ABBREVIATIONS or line.isdecimal():
    return False
  is_initial = len(word) == 1 and word.isalpha() and word != "i"
  if is_initial or word in _LAST_ABBREVIATIONS:
    match = _NEXT_WORD.match(following)
    next_word = match[1] if match else ""
    # A letter alone is the label of a list item.
    return len(line) > 1 and (next_word if has_cases else next_word.title()) in _BEGINNINGS
  return True


# length_constraints


def number_words(text, *, num_words, relation):
  """Asks for at least, or less than, so many words.

  Words are runs of letters and digits: "don't" and "well-known" are two each, as there. A word with
  combining marks, such as "नमस्ते", is one; there each mark splits it.
  """
  return _in_relation(len(words(text)), "words", relation, num_words)


def number_sentences(text, *, num_sentences, relation):
  """Asks for at least, or less than, so many sentences.

  Sentences are split by the rule of `sentences`; there a trained model of English splits them,
  which takes Chinese or Japanese without spaces for one.
  """
  return _in_relation(len(sentences(text)), "sentences", relation, num_sentences)


def number_paragraphs(text, *, num_paragraphs):
  """Asks for so many paragraphs with dividers *** between them.

  A divider is three stars and no more, and ***bold italics*** in a line are none. There any three
  stars divide: "***Title***" counts as two dividers, and **** as one.
  """
  paragraphs = _DIVIDER.split(_BOLD_ITALIC.sub("_", text))
  if any(not paragraph.strip() for paragraph in paragraphs[1:-1]):
    return "two dividers *** stand with nothing between them."
  return _exactly(_count_filled(paragraphs), "paragraphs between dividers ***", num_paragraphs)


_DIVIDER = re.compile(r"\s?(?<!\*)\*{3}(?!\*)\s?")
_BOLD_ITALIC = re.compile(r"(?<!\*)\*{3}(?=[^\s*])[^*\n]*+(?<=\S)\*{3}(?!\*)")


def nth_paragraph_first_word(text, *, num_paragraphs, nth_paragraph, first_word):
  """Asks for so many paragraphs, and for the first word of one of them; the count starts at 1.

  Empty lines may hold white space, and there may be several between paragraphs or before the first.
  There paragraphs are counted without empty ones but indexed with them: after "\\n\\nHi.\\n\\nBye."
  the first paragraph is "", here it is "Hi."; "\\n \\n" divides nothing there.

  "It's" begins with "it" and with "it's", here; there with "it" alone. Marks before the word, such
  as ** or “, are passed over; there only ' and " are.
  """
  paragraphs = [piece for piece in re.split(r"\n\s*\n", text) if piece.strip()]
  complaint = _exactly(len(paragraphs), "paragraphs separated by an empty line", num_paragraphs)
  if complaint:
    return complaint
  pieces = paragraphs[nth_paragraph - 1].split()
  words = [word for word in map(without_marks, pieces) if word]
  word = words[0] if words else ""
  if without_marks(first_word) in (word, re.split(r"[.,?!'\"]", word)[0]):
    return ""
  return f"paragraph {nth_paragraph} begins with {word!r}; it must begin with {first_word!r}."


def without_marks(word: str) -> str:
  """Returns a word in small letters, without what is neither letter nor digit around it."""
  solid = [i for i, c in enumerate(word) if _goes_on(c) and c != "_"]
  return word[solid[0] : solid[-1] + 1].lower().replace("’", "'") if solid else ""


def _count_filled(texts: list[str]) -> int:
  """Counts the texts that hold more than white space."""
  return sum(bool(text.strip()) for text in texts)


# keywords


def existence(text, *, keywords):
  """Asks for all keywords, in capital or small letters, also as parts of words, as there."""
  absent = [keyword for keyword in keywords if keyword.lower() not in text.lower()]
  if not absent:
    return ""
  return f"the response does not contain {', '.join(map(repr, absent))}."


def frequency(text, *, keyword, frequency, relation):
  """Asks for a keyword at least, or less than, so many times.

  Parts of words count, as there: "war" occurs twice in "warm wars".
  """
  keyword = keyword.strip()
  count = text.lower().count(keyword.lower())
  return _in_relation(count, f"occurrences of {keyword!r}", relation, frequency)


def forbidden_words(text, *, forbidden_words):
  """Forbids words; other words that begin or end like them are allowed.

  A word may begin or end with a mark: "C++" is found in "C++ is". There it is found only before a
  letter. A phrase is found over the end of a line; there it is not.
  """
  present = [word for word in forbidden_words if finds_word(text, word)]
  if not present:
    return ""
  return f"the response contains {', '.join(map(repr, present))}."


def letter_frequency(text, *, letter, let_frequency, let_relation):
  """Asks for a letter, capital or small, at least, or less than, so many times."""
  count = text.lower().count(letter.lower())
  return _in_relation(count, f"occurrences of the letter {letter!r}", let_relation, let_frequency)


# language and case


def response_language(text, *, language):
  """Asks for a language, named by its ISO 639-1 code.

  What `language.mismatch` cannot tell counts as followed. There langdetect's first guess counts,
  also for a few words, and text in capitals has no features and counts as followed.
  """
  other = languages.mismatch(text, language)
  if not other:
    return ""
  return f"the response is in {other}; it must be in {languages.NAMES[language]}."


def english_capital(text):
  """Asks for English in capital letters; the language is told as for `response_language`."""
  if not text.isupper():
    fault = "small letters" if any(c.islower() for c in text) else "no capital letters"
    return f"the response has {fault}; all must be capital."
  return response_language(text, language="en")


def english_lowercase(text):
  """Asks for English in small letters; the language is told as for `response_language`."""
  if not text.islower():
    fault = "capital letters" if any(c.isupper() for c in text) else "no small letters"
    return f"the response has {fault}; all must be small."
  return response_language(text, language="en")


def capital_word_frequency(text, *, capital_frequency, capital_relation):
  """Asks for at least, or less than, so many words in capital letters.

  A word may hold hyphens, full stops and apostrophes. An ending in small letters does not count:
  "NASA's" and "I'm" are words in capitals. There a tokenizer of English does the same, but takes
  "DON'T" for two words and "AND/OR" for one; here it is the other way round.
  """
  words = re.findall(r"\w+(?:[-'.]\w+)*", text.replace("’", "'"))
  count = sum(_without_small_ending(word).isupper() for word in words)
  return _in_relation(count, "words in capital letters", capital_relation, capital_frequency)


def _without_small_ending(word: str) -> str:
  """Returns a word without an ending in small letters behind an apostrophe."""
  stem, apostrophe, ending = word.rpartition("'")
  return stem if apostrophe and ending.islower() else word


# detectable_content and detectable_format


def number_placeholders(text, *, num_placeholders):
  """Asks for at least so many placeholders such as [name]; empty brackets count there alone."""
  pieces = re.findall(r"\[([^\[\]\n]*)\]", text)
  return _in_relation(
    _count_filled(pieces), "placeholders in square brackets", "at least", num_placeholders
  )


def postscript(text, *, postscript_marker):
  """Asks for a postscript that begins with the marker; P.S. and P.P.S may hold spaces.

  It may stand anywhere, as there. There the marker may also be the end of a word, and "P.P.S."
  counts for "P.S."; here neither does.
  """
  marker = postscript_marker.strip()
  patterns = {"P.S.": r"(?<!p\.)(?<!p\.\s)p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
  pattern = patterns.get(marker, re.escape(marker.lower()))
  if re.search(rf"(?<!\w){pattern}", text.lower()):
    return ""
  return f"the response has no postscript that begins with {marker}."


def number_bullet_lists(text, *, num_bullets):
  """Asks for so many lines that begin with * or with -.

  There a line of *emphasis* and every line that begins with "-" count too, such as the rule "---"
  and the signature "-- Ann". Here they do not, nor does a bullet without text.
  """
  count = sum(_is_bullet(line.strip()) for line in text.split("\n"))
  return _exactly(count, "bullet points", num_bullets)


def _is_bullet(line: str) -> bool:
  """Tells whether a line without white space around it is a bullet point."""
  mark, rest = line[:1], line[1:]
  if mark not in ("*", "-") or rest.startswith(mark) or not rest.strip(" \t*-_"):
    return False
  # A star that closes makes the first one open emphasis, unless white space follows that.
  return mark == "-" or rest[0].isspace() or "*" not in rest


def constrained_response(text):
  """Asks for one of the OPTIONS; there several of them count as well."""
  present = [option for option in OPTIONS if option in text]
  if len(present) == 1:
    return ""
  amount = "several" if present else "none"
  return f"the response has {amount} of: {' '.join(OPTIONS)}"


def number_highlighted_sections(text, *, num_highlights):
  """Asks for at least so many pieces of text between single, double or triple stars.

  The star of a bullet point is none of them, nor is one with white space inside ("2 * 3 * 4").
  There both are, so that "* an item **a**" has three, and "***a***" has two; here each has one.
  """
  count = len(_HIGHLIGHT.findall(_BULLET_STAR.sub("", text)))
  return _in_relation(count, "highlighted sections such as *this*", "at least", num_highlights)


_BULLET_STAR = re.compile(r"^[^\S\n]*\*[^\S\n]", re.MULTILINE)
# The look-behind and the possessive ++ and *+ keep the time linear over a long run of stars.
_HIGHLIGHT = re.compile(r"(?<!\*)\*++(?=\S)[^*\n]++(?<=\S)\*++")


def multiple_sections(text, *, section_spliter, num_sections):
  """Asks for at least so many sections that begin with the marker and a number.

  A number counts once: "as Section 1 said" is no second section. There it is, and SUBSECTION 1
  counts for SECTION; here it does not.
  """
  marker = section_spliter.strip()
  numbers = re.findall(rf"(?<!\w){re.escape(marker)}\s?(\d+)", text)
  count = len(set(numbers))
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
  """Asks for JSON and nothing else; a code block may surround it.

  NaN and Infinity are no JSON; there they are. A number of any length is JSON; there one of more
  than 4,300 digits is not.
  """
  text = text.strip()
  for fence in ("```json", "```Json", "```JSON", "```"):
    text = text.removeprefix(fence)
  try:
    json.loads(text.removesuffix("```").strip(), parse_constant=_no_constant, parse_int=str)
  except (ValueError, RecursionError) as error:
    return f"the response as a whole is not JSON: {error}."
  return ""


def _no_constant(name: str):
  raise ValueError(f"{name} is no value of JSON")


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
  """Asks for a phrase at the end; a quotation mark may follow it.

  The phrase may itself end with a quotation mark; there such a row is never followed. There it may
  be the end of a longer word; here it may not.
  """
  end_phrase = end_phrase.strip()
  phrase, ending = end_phrase.lower(), text.strip().lower()
  for candidate in (ending, ending.strip('"').strip()):
    begin = len(candidate) - len(phrase)
    if candidate.endswith(phrase) and _stands_alone(candidate, begin, len(candidate)):
      return ""
  return f"the response does not end with: {end_phrase}"


def quotation(text):
  """Asks for double quotation marks around the whole response.

  Curly ones count, and there has to be something between them. There only straight ones count, and
  nothing need be between them.
  """
  text = text.strip()
  if text[:1] + text[-1:] in ('""', "“”", "„“", "„”") and text[1:-1].strip():
    return ""
  return "the response is not wrapped in double quotation marks."


def no_comma(text):
  """Forbids commas of every script, such as , and ، and 、; there only the first counts."""
  commas = [c for c in set(text) if "COMMA" in unicodedata.name(c, "") and _is_punctuation(c)]
  count = sum(text.count(comma) for comma in commas)
  return f"the response has {count} commas; it must have none." if count else ""


def _is_punctuation(character: str) -> bool:
  return unicodedata.category(character) == "Po"


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
