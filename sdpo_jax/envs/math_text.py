r"""Writes mathematics that models type as the LaTeX that math-verify reads, and finds the boxes.

`latex` replaces Unicode (×, ², ½, √2, full-width digits), the macros that only change the look,
and the spaces, dollar signs and thin spaces around numbers. Two texts that mean different things
stay different: what cannot be placed is left as it stands.
"""

import re
import unicodedata

# Those that NFKC would turn into something else, and those that it leaves alone.
_SYMBOLS = {
  "×": r"\times ", "✕": r"\times ", "⨯": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
  "∙": r"\cdot ", "•": r"\cdot ", "∗": "*", "÷": r"\div ", "∕": "/", "⁄": "/", "±": r"\pm ",
  "∓": r"\mp ", "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ",
  "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "∞": r"\infty ",
  "∅": r"\emptyset ", "⌀": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
  "∉": r"\notin ", "⊂": r"\subset ", "⊆": r"\subseteq ", "∖": r"\setminus ", "∠": r"\angle ",
  "△": r"\triangle ", "→": r"\to ", "∣": "|", "∶": ":", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
  "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": r"\mathbb{R}",
  "ℕ": r"\mathbb{N}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "…": r"\ldots ",
  "⋯": r"\cdots ", "°": r"^{\circ}", "º": r"^{\circ}", "℃": r"^{\circ}\text{C}",
  "℉": r"^{\circ}\text{F}", "′": "'", "″": "''", "’": "'", "‘": "'", "“": '"', "”": '"',
  "¢": r"\text{cent}", "€": r"\text{eur}", "£": r"\text{gbp}", "¥": r"\text{yen}",
  "₹": r"\text{inr}", "₩": r"\text{won}", "₽": r"\text{rub}", "₺": r"\text{lira}",
  "₪": r"\text{shekel}", "₫": r"\text{dong}", "₱": r"\text{peso}", "₿": r"\text{bitcoin}",
  "٫": ".", "٬": ",", "٪": "%", "％": "%", "＄": "$", "￥": r"\text{yen}", "﹩": "$",
}  # fmt: skip
_GREEK = (
  "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
  "upsilon phi chi psi omega"
)
_GREEK_CAPITALS = "gamma delta theta lambda xi pi sigma phi psi omega"


def _greek() -> dict[str, str]:
  """Returns the commands of the Greek letters; Unicode spells lambda without its b."""
  commands = {"ϕ": r"\phi ", "ϵ": r"\epsilon ", "ϑ": r"\theta "}
  for size, names in (("SMALL", _GREEK), ("CAPITAL", _GREEK_CAPITALS)):
    for name in names.split():
      letter = unicodedata.lookup(f"GREEK {size} LETTER {name.replace('lambda', 'lamda')}")
      commands[letter] = f"\\{name if size == 'SMALL' else name.title()} "
  return commands


_COMMANDS = _SYMBOLS | _greek()
_DASHES = "‐‑‒–—―−﹣－"
_RANGE = re.compile(r"\W*\d[\d.,]*\s*[–—]\s*\d[\d.,]*(?:\s[A-Za-z ]{2,})?\W*")
_HIDDEN = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f"
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_LOWERED = "₀₁₂₃₄₅₆₇₈₉₊₋"
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}

# What stands between the thousands, besides the comma.
_THIN = "(?:\\\\[,;: ]|~|[\u00a0\u2007\u2009\u202f\u2008]|\\{\\\\,\\})"
_THOUSANDS = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_THIN}\d{{3}})+(?!\d)")
_APOSTROPHES = re.compile(r"(?<![\d.])\d{1,3}(?:'\d{3})+(?![\d'])")
_LOOKS = re.compile(
  r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg|displaystyle|textstyle|"
  r"scriptstyle|limits|nolimits|boldmath|bf|it|sf|tt|rm|normalsize|large|Large)(?![A-Za-z])\s*"
)
_SPACES = re.compile(
  r"(?<!\\)\\[,;:> ]|~|\\(?:q?quad|thinspace|medspace|enspace|space|hfill)(?![A-Za-z])|\s"
)
_TEXT = re.compile(
  r"\\(?:mbox|hbox|text(?:rm|bf|it|sf|tt|normal|up|md)|emph|mathrm|mathsf|mathit)\s*(?=\{)"
)
_BOLD = re.compile(r"\\(?:mathbf|boldsymbol|bm|ensuremath|mathord)\s*(?=\{)")
_ROMAN = re.compile(r"\{\s*\\(?:rm|text)\s+([^{}\\]*)\}")
_CIRCLE = re.compile(
  r"\s*\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\circ(?![A-Za-z]))|\s*\\degree(?![A-Za-z])"
)
_TRIGONOMETRY = re.compile(r"(?<![a-zA-Z])(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![a-zA-Z])")
# A sign before one digit of an exponent may be a plus or minus: 3e-7 is 3e - 7 too.
_E_NOTATION = re.compile(
  r"(?<![A-Za-z\\\d.])(\d+\.\d*|\.\d+|1(?=[eE])|\d+(?=[eE](?:\d|[+-]\d\d)))"
  r"[eE]\+?(-?\d+)(?![\d.A-Za-z])"
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")


def latex(text: str) -> str:
  """Returns the text as LaTeX without what does not count: delimiters, sizes, odd characters."""
  text = _unicode(text.strip())
  text = re.sub(r"\\!\s*", "", text)
  text = _THOUSANDS.sub(lambda match: re.sub(_THIN, "", match[0]), text)
  text = _APOSTROPHES.sub(lambda match: match[0].replace("'", ""), text)
  # In braces it is a comma between thousands, or the decimal comma.
  text = re.sub(r"\{,\}(?=\d{3}(?!\d))", ",", text).replace("{,}", ".")
  text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
  text = re.sub(r"\\(?:colon|ratio)(?![A-Za-z])", ":", text)
  text = re.sub(r"\\varnothing(?![A-Za-z])", r"\\emptyset", text)
  text = re.sub(r"\\lbrace(?![A-Za-z])", r"\\{", text)
  text = re.sub(r"\\rbrace(?![A-Za-z])", r"\\}", text)
  text = re.sub(r"\\math(?:rm|it|sf|bf)\s*\{\s*([ei])\s*\}", r"\1 ", text)
  text = _ROMAN.sub(r"\\text{\1}", text)
  text = _BOLD.sub("", _TEXT.sub(r"\\text", _unwrapped(text)))
  text = _SPACES.sub(" ", _LOOKS.sub("", text))
  text = _delimiters(text).strip().strip("*`").strip()
  text = re.sub(r"(?<=\d)\s*\\text\{\s*[eE]\s*\}\s*(?=[+-]?\d)", "e", text)
  text = _E_NOTATION.sub(r"\1\\times 10^{\2}", text)
  text = _degrees(text)
  text = re.sub(r"(?<=[^.\\])(?<!\.[A-Za-z])[.;,]$", "", text.rstrip())
  return re.sub(r"\s+", " ", text).strip()


def _unicode(text: str) -> str:
  """Replaces every character that LaTeX writes with a command."""
  pieces = []
  for hidden in _HIDDEN:
    text = text.replace(hidden, "")
  text = re.sub(f"[{_RAISED}]+", _script("^", _RAISED, "0123456789+-n"), text)
  text = re.sub(f"[{_LOWERED}]+", _script("_", _LOWERED, "0123456789+-"), text)
  # Between two numbers and nothing else a dash means "to"; elsewhere it is a minus.
  if _RANGE.fullmatch(text):
    text = re.sub("[–—]", r"\\text{ to }", text)
  for dash in _DASHES:
    text = text.replace(dash, "-")
  for character in text:
    if character in _COMMANDS:
      pieces.append(_COMMANDS[character])
    elif unicodedata.decomposition(character).startswith("<fraction>"):
      top, _, bottom = unicodedata.normalize("NFKC", character).partition("⁄")
      pieces.append(f"\\frac{{{top}}}{{{bottom or 1}}}")
    elif character in _ROOTS or character.isascii():
      pieces.append(character)
    elif unicodedata.decimal(character, None) is not None:
      pieces.append(str(unicodedata.decimal(character)))
    elif character.isspace():
      pieces.append(character)
    else:
      plain = unicodedata.normalize("NFKC", character)
      pieces.append("".join(_COMMANDS.get(c, c) for c in plain))
  return _roots("".join(pieces))


def _script(mark: str, characters: str, plain: str):
  """Returns a replacement for a run of raised or lowered characters."""
  table = str.maketrans(characters, plain)

  def replace(match):
    return f"{mark}{{{match[0].translate(table)}}}"

  return replace


def _roots(text: str) -> str:
  """Gives the root sign its argument: a group, a number, a letter or a command."""
  argument = re.compile(r"\s*(\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+)")
  position = len(text)
  while position > 0:
    position -= 1
    if text[position] not in _ROOTS:
      continue
    command, rest = _ROOTS[text[position]], text[position + 1 :].lstrip()
    if rest[:1] in ("(", "{"):
      end = group_end(rest, 0)
      if end is not None:
        rest = f"{{{rest[1:end]}}}{rest[end + 1 :]}"
    else:
      found = argument.match(rest)
      if found:
        rest = f"{{{found[1]}}}{rest[found.end() :]}"
    text = text[:position] + command + rest
  return text


def _delimiters(text: str) -> str:
  """Removes the signs around mathematics; a dollar sign before or after an amount stays."""
  text = re.sub(r"(?<!\\)\\[()\[\]]", "", text)
  signs = [match.start() for match in re.finditer(r"(?<!\\)\$", text)]
  is_amount = len(signs) % 2 == 1 or (
    signs and re.match(r"\$\s*[\d.]", text[signs[-1] :]) is not None
  )
  if not is_amount:
    text = re.sub(r"(?<!\\)\$", "", text)
  return text.replace("\\$", "$")


def _degrees(text: str) -> str:
  """Writes degrees as a word, or as a multiple of pi where a function takes them."""
  if _TRIGONOMETRY.search(text):
    text = re.sub(rf"(\d+(?:\.\d+)?)(?:{_CIRCLE.pattern})", r"(\1\\cdot\\frac{\\pi}{180})", text)
  text = re.sub(
    rf"(?:{_CIRCLE.pattern})\s*(?:\\text\s*\{{\s*([CFK])\s*\}}|([CF])(?![A-Za-z]))",
    r"\\text{ degree \1\2}",
    text,
  )
  return _CIRCLE.sub(r"\\text{ degree }", text)


def _unwrapped(text: str) -> str:
  r"""Removes boxes within a box: \boxed{\fbox{5}}."""
  while (match := _BOX.search(text)) is not None:
    end = group_end(text, match.end()) if text[match.end() :].startswith("{") else None
    if end is None:
      text = text[: match.start()] + text[match.end() :]
    else:
      text = text[: match.start()] + text[match.end() + 1 : end] + text[end + 1 :]
  return text


def group_end(text: str, start: int) -> int | None:
  """Returns where the group that opens at `start` closes, None if it does not.

  Braces count only braces, brackets count both kinds: [1, 2) is a group.
  """
  opening, closing = ("{", "}") if text[start] == "{" else ("([", ")]")
  depth = 0
  position = start
  while position < len(text):
    if text[position] == "\\":
      position += 2
      continue
    if text[position] in opening:
      depth += 1
    elif text[position] in closing:
      depth -= 1
      if depth == 0:
        return position
    position += 1
  return None


def last_boxed(text: str) -> tuple[str, str]:
  r"""Returns what the last box holds, and what is wrong with it ("" if nothing).

  A box is \boxed{5}, \boxed {5}, \boxed 5, \fbox{5} or \framebox{5}. Without braces it holds what
  comes up to the next white space or dollar sign. A box within a box belongs to the outer one.
  """
  boxes = list(_BOX.finditer(text))
  if not boxes:
    return "", "The response has no \\boxed{}."
  position = 0
  content = None
  for box in boxes:
    if box.start() < position:
      continue
    if text[box.end() : box.end() + 1] == "{":
      end = group_end(text, box.end())
      content = None if end is None else text[box.end() + 1 : end].strip()
      # An unclosed box may hold a closed one by mistake: the last one decides.
      position = box.end() if end is None else end
    else:
      token = re.match(r"[^\s$]*", text[box.end() :])[0]
      content = re.sub(r"(?:\\[)\]]|[.,;:!?*)])+$", "", token)
      position = box.end()
  if content is None:
    return "", "The response ends inside \\boxed{: a brace is not closed."
  return content, "" if content else "The last \\boxed{} is empty."


def has_box(text: str) -> bool:
  """Tells whether the text has a box, closed or not."""
  return _BOX.search(text) is not None
