"""What a verdict says in words."""

import builtins

from sdpo_jax.sandbox.compare import _literal
from sdpo_jax.sandbox.verdict import Limits, TestResult, Verdict
from sdpo_jax.text import MAX_CHARS, clean, cut

MAX_VALUE_CHARS = 250


MAX_ERROR_CHARS = 600


_BRACKETS = {
  "list": ("[", "]"),
  "tuple": ("(", ")"),
  "set": ("{", "}"),
  "frozenset": ("frozenset({", "})"),
}


def _literal_text(tagged) -> str:
  """As Python would write it, without building it."""
  if not isinstance(tagged, dict):
    return repr(tagged)
  ((tag, items),) = tagged.items()
  if tag == "dict":
    return "{" + ", ".join(f"{_literal_text(k)}: {_literal_text(v)}" for k, v in items) + "}"
  if tag not in _BRACKETS:
    return repr(_literal(tagged))
  if not items and tag in ("set", "frozenset"):
    return tag + "()"
  left, right = _BRACKETS[tag]
  comma = "," if tag == "tuple" and len(items) == 1 else ""
  return left + ", ".join(_literal_text(x) for x in items) + comma + right


_EXCEPTIONS = {
  name for name, x in vars(builtins).items() if isinstance(x, type) and issubclass(x, BaseException)
}


def _field(header: str, text: str, limit: int = MAX_VALUE_CHARS) -> str:
  text = cut(clean(cut(text, 4 * limit)).strip("\n"), limit)
  if not text.strip():
    return f"{header}: (nothing)"
  if "\n" not in text:
    return f"{header}: {text}"
  return f"{header}:\n" + "\n".join("  " + line for line in text.split("\n"))


def describe(result: TestResult, number: int, limits: Limits) -> str:
  """One failing test in words; `number` counts from 1."""
  says = {
    "wrong_answer": "wrong answer",
    "runtime_error": "runtime error",
    "time_limit": "time limit exceeded",
    "memory_limit": "memory limit exceeded",
    "output_limit": "output limit exceeded",
    "format": "wrong form",
    "contained": "the program tampered with the process that ran it",
    "sandbox_failed": "the test could not be run",
  }[result.kind]
  name = f"Hidden test {number}" if result.hidden else f"Test {number}"
  lines = [f"{name}: {says}"]
  if result.kind == "time_limit":
    lines[0] += f" ({limits.time_s:g} s)"
  elif result.kind == "memory_limit":
    lines[0] += f" ({limits.memory_mb} MB)"
  elif result.kind == "output_limit":
    lines[0] += f" ({limits.output_kb} KB)"
  if result.detail and not result.hidden:
    lines.append(_field("Reason", result.detail, MAX_ERROR_CHARS))
  if not result.hidden:
    lines.append(_field("Input", result.input))
    if result.kind == "wrong_answer":
      lines += [_field("Output", result.output), _field("Expected", result.expected)]
  if error := result.error:
    # Of a hidden test no word that the program chooses: a message, a class's name or an exit status
    # may quote the input.
    words = (
      (error.type, error.message)
      if not result.hidden
      else (error.type,)
      if error.type in _EXCEPTIONS
      else ()
    )
    if what := ": ".join(filter(None, words)):
      lines.append(_field("Error", what, MAX_ERROR_CHARS))
    if error.line:
      lines.append(_field(f"Line {error.line}", error.source))
  return "\n".join(lines)


def make_verdict(results: list[TestResult], number: int, limits: Limits) -> Verdict:
  """The first failing test gives the kind. Feedback tells an error alone, else the two shortest wrong answers."""
  failing = [(i, r) for i, r in enumerate(results, 1) if not r.passed]
  if not failing:
    return Verdict("passed", "", tuple(results), number)
  kind = failing[0][1].kind
  if kind == "wrong_answer":
    wrong = [(i, r) for i, r in failing if r.kind == kind]
    told = sorted(sorted(wrong, key=lambda ir: len(ir[1].input) + len(ir[1].expected))[:2])
  else:
    told = failing[:1]
  text = "\n\n".join(describe(r, i, limits) for i, r in told)
  return Verdict(kind, cut(text, MAX_CHARS), tuple(results), number)
