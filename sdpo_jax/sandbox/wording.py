"""Writes the feedback of a verdict: text that a model will read.

It is deterministic, valid UTF-8 and at most `MAX_CHARS` characters. A value of one line stands
behind its header; a longer one is indented, so that program output cannot forge a header. Every
value is cleaned (`sdpo_jax.text.clean`): chat-template markers are broken up, and control,
bidirectional and zero-width characters become U+FFFD. Who tokenises the text must still disable
special tokens.
"""

import builtins

from sdpo_jax.sandbox.compare import untagged
from sdpo_jax.sandbox.verdict import Limits, ProgramError, TestResult, Verdict
from sdpo_jax.text import MAX_CHARS, clean, cut

MAX_VALUE_CHARS = 250  # of an input, an output or a line
MAX_ERROR_CHARS = 600

_PHRASES = {
  "wrong_answer": "wrong answer",
  "runtime_error": "runtime error",
  "time_limit": "time limit exceeded",
  "memory_limit": "memory limit exceeded",
  "output_limit": "output limit exceeded",
  "format": "wrong form",
  "contained": "the program tampered with the process that ran it",
  "sandbox_failed": "the test could not be run",
}
_BUILT_IN_EXCEPTIONS = {
  name for name, x in vars(builtins).items() if isinstance(x, type) and issubclass(x, BaseException)
}
_BRACKETS = {
  "list": ("[", "]"),
  "tuple": ("(", ")"),
  "set": ("{", "}"),
  "frozenset": ("frozenset({", "})"),
  "iterator": ("iter([", "])"),
}


def make_verdict(results: list[TestResult], number: int, limits: Limits) -> Verdict:
  """Makes the verdict on a program from the tests that ran; `number` is how many there were.

  The first failing test gives the kind. The feedback describes an error alone, or else the two
  shortest wrong answers.
  """
  failing = [(i, result) for i, result in enumerate(results, 1) if not result.passed]
  if not failing:
    return Verdict("passed", "", tuple(results), number)
  kind = failing[0][1].kind
  described = failing[:1]
  if kind == "wrong_answer":
    wrong = [(i, result) for i, result in failing if result.kind == kind]
    shortest = sorted(wrong, key=lambda pair: _shown_length(pair[1]))[:2]
    described = sorted(shortest, key=lambda pair: pair[0])
  text = "\n\n".join(describe(result, i, limits) for i, result in described)
  return Verdict(kind, cut(text, MAX_CHARS), tuple(results), number)


def _shown_length(result: TestResult) -> int:
  return len(result.input) + len(result.expected or "")


def describe(result: TestResult, number: int, limits: Limits) -> str:
  """Describes one failing test in words; `number` counts from 1."""
  name = f"Hidden test {number}" if result.hidden else f"Test {number}"
  limit = {
    "time_limit": f" ({limits.time_s:g} s)",
    "memory_limit": f" ({limits.memory_mb} MB)",
    "output_limit": f" ({limits.output_kb} KB)",
  }.get(result.kind, "")
  lines = [f"{name}: {_PHRASES[result.kind]}{limit}"]
  if not result.hidden:
    lines += _shown_values(result)
  if result.error is not None:
    lines += _error_lines(result.error, result.hidden)
  return "\n".join(lines)


def _shown_values(result: TestResult) -> list[str]:
  lines = []
  if result.detail:
    lines.append(_field("Reason", result.detail, MAX_ERROR_CHARS))
  lines.append(_field("Input", result.input))
  if result.kind == "wrong_answer":
    lines.append(_field("Output", result.output))
    if result.expected is not None:
      lines.append(_field("Expected", result.expected))
  return lines


def _error_lines(error: ProgramError, hidden: bool) -> list[str]:
  """Describes an exception and its line.

  Of a hidden test it takes no word that the program chooses: a message, a class's name or an exit
  status may quote the input.
  """
  if not hidden:
    words = [error.type, error.message]
  elif error.type in _BUILT_IN_EXCEPTIONS:
    words = [error.type]
  else:
    words = []
  lines = []
  exception = ": ".join(filter(None, words))
  if exception:
    lines.append(_field("Error", exception, MAX_ERROR_CHARS))
  if error.line:
    lines.append(_field(f"Line {error.line}", error.source))
  return lines


def _field(header: str, text: str, limit: int = MAX_VALUE_CHARS) -> str:
  """Writes a header and a value of at most `limit` characters, cleaned."""
  # cut before cleaning too, which would take its time over a long text
  text = cut(clean(cut(text, 4 * limit)).strip("\n"), limit)
  if not text.strip():
    return f"{header}: (nothing)"
  if "\n" not in text:
    return f"{header}: {text}"
  return f"{header}:\n" + "\n".join("  " + line for line in text.split("\n"))


def call_text(name: str, call: list) -> str:
  """Writes a call, as the jail tagged it, as Python would."""
  arguments, keywords = call
  words = [literal_text(x) for x in arguments]
  words += [f"{key}={literal_text(x)}" for key, x in keywords.items()]
  return f"{name}({', '.join(words)})"


def literal_text(tagged) -> str:
  """Writes a value that the jail tagged as Python would, without building it."""
  if not isinstance(tagged, dict):
    return repr(tagged)
  ((tag, items),) = tagged.items()
  if tag == "dict":
    pairs = [f"{literal_text(key)}: {literal_text(value)}" for key, value in items]
    return "{" + ", ".join(pairs) + "}"
  if tag not in _BRACKETS:
    return repr(untagged(tagged))
  if not items and tag in ("set", "frozenset"):
    return tag + "()"
  left, right = _BRACKETS[tag]
  comma = "," if tag == "tuple" and len(items) == 1 else ""
  return left + ", ".join(literal_text(item) for item in items) + comma + right
