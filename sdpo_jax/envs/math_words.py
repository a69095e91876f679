r"""Tells the words of an answer from its mathematics, and splits it into both.

Letters in \text{} are words. Letters outside are words if they are a unit after a number, a common
short word, or cannot well be a product: `xy` and `abcd` are mathematics, `eggs`, `Ann` and the
triangle `ABC` are words. Texts are LaTeX as `math_text.latex` returns it.
"""

import re
from typing import NamedTuple

from sdpo_jax.envs import numerals
from sdpo_jax.envs.math_text import group_end

# Letters outside \text{} that are no product, beside units and long words.
_SHORT = frozenset(
  "no on yes in is at of to or and per the all any if it by up my me he we us go so do not nor "
  "am pm bc ad odd one two six ten day men sq cu kg km cm mm ft lb oz ml hr mph kmh kph mg yd "
  "rs usd eur gbp inr bn mn".split()
)
_MATHEMATICAL = frozenset(
  "max min gcd lcm mod sqrt "
  "frac det lim arg dim ker abs sgn sign floor ceil pmod bmod cis alpha beta gamma delta lambda "
  "sigma omega phi cdot times".split()
)
_FUNCTIONS = frozenset(
  "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp".split()
)
_NAMED = {"pi": r"\pi ", "infinity": r"\infty ", "inf": r"\infty ", "theta": r"\theta "}
# Units that are products elsewhere.
_AFTER_NUMBER = frozenset("mi dm gm cl hz min sec wk mo pt qt gal bn".split())
# After a number and a space these letters are units, where the other answer allows it.
_UNIT_LETTER = re.compile(r"(\d) ([mgshlL])(?=\s*(?:$|[,;\d]|and |or |\^\s*\{?[23]\}?\s*$))")
_RATE = re.compile(r"(\d\s?)((?:km|m|mi|cm|ft|kg|g|L|l)\s*/\s*(?:s|h|hr|min|sec|L|l))(?![A-Za-z])")
_RUN = re.compile(
  r"\\text\s*\{[^{}]*\}|\\(?:begin|end|operatorname\*?|math[a-z]+)\s*\{[^{}]*\}|\\[A-Za-z]+|\\.|"
  r"(?<![_^])((?:[A-Za-z]\.)+[A-Za-z](?![A-Za-z])\.?|[^\W\d_]+(?:['-](?=[^\W\d_]{2})[^\W\d_]+)*)",
  re.DOTALL,
)
_TEXT = re.compile(r"\\text\s*\{")
_UNIT_FRACTION = re.compile(
  r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}(\^\{?\d\}?)?\s*\}"
)
_EXPONENT = re.compile(r"\s*\^\s*(?:\{\s*(-?\d)\s*\}|(-?\d))")
_PIECE = re.compile(
  r"(?:[^\W\d_]\.)+[^\W\d_](?![^\W\d_])\.?|[^\W\d_]+(?:['-][^\W\d_]+)*|\d[\d,.:]*\d|\d|\S",
  re.DOTALL,
)
_SIGNS = {"$": "dollar", "%": "percent"}
MONEY_SIGNS = frozenset("dollar eur gbp inr yen usd rs".split())


class Token(NamedTuple):
  """A piece of an answer: its kind is "math", "word" or "separator"."""

  kind: str
  text: str
  exponent: int = 1


def mark(text: str, *, has_unit_letters: bool = False) -> str:
  r"""Puts every word of an answer into \text{}, so that no letters of it are multiplied."""
  text = _RATE.sub(r"\1\\text{\2}", text)
  if has_unit_letters:
    text = _UNIT_LETTER.sub(r"\1 \\text{\2}", text)
  whole = text.strip(" .!?()")

  def replace(match):
    run = match[1]
    if run is None:
      return match[0]
    name = run.replace(".", "").lower()
    if name in _NAMED:
      return _NAMED[name]
    if name in _FUNCTIONS:
      return f"\\{name} "
    before = text[: match.start()].rstrip()
    after = text[match.end() :].lstrip()
    is_item = before[-1:] in ("", ",", ";") and after[:1] in ("", ",", ";")
    after_number = before[-1:].isdigit() or before.endswith(("}", "%"))
    if after_number and name in _AFTER_NUMBER:
      return f"\\text{{{run}}}"
    if name in _MATHEMATICAL or not _is_word(run, run == whole, is_item or after_number):
      return run
    return f"\\text{{{run}}}"

  return _RUN.sub(replace, text)


def _is_word(run: str, is_whole: bool, is_apart: bool) -> bool:
  """Tells whether letters in a row are a word and not a product of variables."""
  name = run.replace(".", "").lower()
  if not run.isascii() or "-" in run or "'" in run or name in _SHORT:
    return True
  if len(run) == 1:
    return False
  # A name or a figure, which is no answer that a product is written like.
  if is_whole and (run.isupper() or run.istitle()):
    return True
  vowels = set(name) & set("aeiouy")
  ordered = "".join(sorted(name))
  is_alphabet = all(ord(b) - ord(a) == 1 for a, b in zip(ordered, ordered[1:], strict=False))
  if not vowels or is_alphabet:
    return False
  if run.istitle() and len(run) > 2:
    return True
  return len(name) > 3 or (len(name) == 3 and name != ordered and (is_whole or is_apart))


def tokenize(text: str) -> list[Token]:
  """Splits a marked answer into mathematics, words and separators, at its top level."""
  text = _UNIT_FRACTION.sub(r"\\text{\1/\2\3}", text)
  tokens = []
  position = 0
  while position < len(text):
    match = _TEXT.match(text, position)
    end = position
    if match:
      close = group_end(text, match.end() - 1)
      close = len(text) if close is None else close
      tokens += _text_tokens(text[match.end() : close])
      end = close
      if tokens and tokens[-1].kind == "word":
        exponent = _EXPONENT.match(text, end + 1)
        if exponent:
          tokens[-1] = tokens[-1]._replace(exponent=int(exponent[1] or exponent[2]))
          end = exponent.end() - 1
    elif text[position] == "\\":
      end = re.compile(r"\\(?:[A-Za-z]+|.|$)", re.DOTALL).match(text, position).end() - 1
      if text[position : end + 1] == "\\%":
        tokens.append(Token("word", "percent"))
      else:
        _add(tokens, text[position : end + 1])
    elif text[position] in _SIGNS:
      tokens.append(Token("word", _SIGNS[text[position]]))
    elif text[position] in "{([":
      close = group_end(text, position)
      end = len(text) - 1 if close is None else close
      _add(tokens, text[position : end + 1])
    elif text[position] in ",;" and not _is_between_thousands(text, position):
      tokens.append(Token("separator", text[position]))
    else:
      _add(tokens, text[position])
    position = end + 1
  return _with_separators(_with_numbers(_cleaned(tokens)))


def _add(tokens: list[Token], text: str) -> None:
  """Appends mathematics, to the last token if that is mathematics too."""
  if tokens and tokens[-1].kind == "math":
    tokens[-1] = Token("math", tokens[-1].text + text)
  else:
    tokens.append(Token("math", text))


def _is_between_thousands(text: str, position: int) -> bool:
  return re.compile(r"(?<=\d),\d{3}(?!\d)").match(text, position) is not None


def _text_tokens(text: str) -> list[Token]:
  r"""Splits what \text{} holds. Capitals alone name choices or points: \text{(A)}, \text{A, C}."""
  letters = re.findall(r"[^\W\d_]+", text)
  are_names = all(len(run) == 1 and run.isupper() or run in ("and", "or") for run in letters)
  tokens = []
  position = 0
  while (match := _PIECE.search(text, position)) is not None:
    piece = match[0]
    position = match.end()
    if piece[0].isalpha() and not (are_names and len(piece) == 1):
      exponent = _EXPONENT.match(text, position)
      tokens.append(Token("word", piece.replace(".", "").lower()))
      if exponent:
        tokens[-1] = tokens[-1]._replace(exponent=int(exponent[1] or exponent[2]))
        position = exponent.end()
    elif piece in ",;":
      tokens.append(Token("separator", piece))
    elif piece in _SIGNS:
      tokens.append(Token("word", _SIGNS[piece]))
    elif piece not in "\"'!?()\\." and (piece != "-" or text[position : position + 1].isdigit()):
      _add(tokens, f" {piece} " if piece[0].isalpha() else piece)
  return tokens


def _cleaned(tokens: list[Token]) -> list[Token]:
  """Drops empty mathematics and reads a slash between words as `per`."""
  cleaned = []
  for token in tokens:
    token = token._replace(text=re.sub(r"\s+", " ", token.text).strip())
    if token.kind != "math":
      cleaned.append(token)
    elif token.text == "/" and cleaned and cleaned[-1].kind == "word":
      cleaned.append(Token("word", "per"))
    elif token.text.strip(" .!?"):
      cleaned.append(token)
  return cleaned


def _with_numbers(tokens: list[Token]) -> list[Token]:
  """Replaces the longest runs of words that name a number by the number."""
  written = []
  i = 0
  while i < len(tokens):
    run = 0
    while i + run < len(tokens) and tokens[i + run].kind == "word":
      run += 1
    for length in range(min(run, 20), 0, -1):
      spoken = numerals.spoken([token.text for token in tokens[i : i + length]])
      if spoken is not None:
        written.append(Token("math", str(spoken)))
        i += length
        break
    else:
      written.append(tokens[i])
      i += 1
  return written


def _with_separators(tokens: list[Token]) -> list[Token]:
  """Reads `and` and `or` before a number as separators, and joins them with commas."""
  written = []
  for i, token in enumerate(tokens):
    after = tokens[i + 1] if i + 1 < len(tokens) else None
    is_number = after is not None and (
      after.kind == "math" or (after.kind == "word" and after.text in MONEY_SIGNS)
    )
    if token.kind == "word" and token.text in ("and", "or") and is_number and written:
      if written[-1].kind != "separator":
        written.append(Token("separator", token.text))
    else:
      written.append(token)
  return written
