"""What is right, and what is said about it: tests, comparison, verdicts and feedback text.

Runs on the host only. Everything that came out of the jail (`Outcome`) is untrusted: bytes with a cap on
their number, an exit status and some numbers. It is parsed without recursion over its depth, compared without calling
into it, and cleaned before it enters a text that a model will read.

Comparison
  stdin       LiveCodeBench's rule: strip the text, split at newlines, strip each line; two lines are equal as
              text or as lists of decimal numbers. No tolerance.
  functional  JSON values: numbers by value (1.0 == 1), `true` is not 1, tuples count as lists.
  expression  Python's `==` on literals, or the named `compare`.
Several correct answers to one test are not supported: the expected output is the only right one.

Feedback is deterministic, valid UTF-8 and at most `MAX_CHARS` characters. A value of one line stands behind its header; a
longer one is indented, so that program output cannot forge a header. Chat-template markers are broken up, and control,
bidirectional and zero-width characters become U+FFFD. Who tokenises the text must still disable special tokens.
"""

import ast
import builtins
import dataclasses
import decimal
import json
import math
import re
import signal
import unicodedata

MAX_CHARS = 2000
MAX_VALUE_CHARS = 250
MAX_ERROR_CHARS = 600

KINDS = (
  "passed",
  "wrong_answer",
  "runtime_error",
  "time_limit",
  "memory_limit",
  "output_limit",
  "format",
  "contained",
  "sandbox_failed",
)


@dataclasses.dataclass(frozen=True)
class TestCase:
  """One test. `input` is standard input, or one JSON argument a line for a function; `output` is what is expected.

  With `expression`, the jail evaluates it after the program and returns its value, and `output` is a Python literal.
  compare  "equal": by the rule of the test's mode; "set": as sets; "in": one of its elements; "isclose": a number within `rel_tol` or `abs_tol`
  hidden   the feedback shows neither its input nor what was expected, nor a word that the program chose; what a program can
           still tell of the input is which kind of failure, built-in exception and line of its own it ends with
  """

  __test__ = False  # not a test class, whatever pytest thinks of the name
  input: str = ""
  output: str = ""
  expression: str | None = None
  compare: str = "equal"
  rel_tol: float = 1e-9
  abs_tol: float = 0.0
  hidden: bool = False

  def __post_init__(self):
    if self.compare not in ("equal", "set", "in", "isclose"):
      raise ValueError(
        f"TestCase.compare={self.compare!r} is unknown; choose from equal, in, isclose, set"
      )
    if self.compare != "equal" and self.expression is None:
      raise ValueError(f"TestCase.compare={self.compare!r} needs an expression")


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of one test. CPU time decides; wall time max(2 time_s, time_s + 2) is the backstop."""

  time_s: float = 6.0  # CPU seconds of all threads together
  memory_mb: int = 1024  # on top of the bare interpreter; MiB
  output_kb: int = 4096  # of standard output, standard error and the result each; KiB

  def __post_init__(self):
    if not (self.time_s > 0 and self.memory_mb > 0 and self.output_kb > 0):
      raise ValueError(f"{self}: every limit must be above 0")

  @property
  def wall_s(self) -> float:
    return max(2 * self.time_s, self.time_s + 2)


@dataclasses.dataclass(frozen=True)
class ProgramError:
  """An exception as the program's user would see it."""

  type: str  # class name, "" where the process died without one
  message: str
  line: int | None  # line of the program, from 1
  source: str  # that line's text


@dataclasses.dataclass(frozen=True)
class TestResult:
  __test__ = False
  input: str  # what the program was given (the expression, for an expression test)
  output: str  # standard output, or the returned value as text; "" where there is none
  expected: str
  kind: str  # one of KINDS
  error: ProgramError | None = None
  detail: str = ""  # what else there is to say: why the form is wrong
  hidden: bool = False
  cpu_s: float = 0.0
  wall_s: float = 0.0
  max_rss_mb: float = 0.0

  @property
  def passed(self) -> bool:
    return self.kind == "passed"


@dataclasses.dataclass(frozen=True)
class Verdict:
  kind: str  # one of KINDS: the first failing test's
  feedback: str  # "" when everything passed
  tests: tuple[TestResult, ...]  # those that ran, in order
  number: int  # of tests there were

  @property
  def passed(self) -> bool:
    return self.kind == "passed"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What the host saw of one test's process. Nothing in it is to be believed beyond its type."""

  status: int  # as wait(2) gives it
  killed: bool  # by the watchdog, for its time
  cpu_s: float
  wall_s: float
  max_rss_kb: int
  stdout: bytes  # each cut at the cap
  result: bytes
  capped: bool  # one of the files reached the cap


# Comparison.


def same_text(output: str, expected: str) -> bool:
  """LiveCodeBench's comparison of standard output."""
  output_lines = [line.strip() for line in output.strip().split("\n")]
  expected_lines = [line.strip() for line in expected.strip().split("\n")]
  return len(output_lines) == len(expected_lines) and all(
    a == b or _same_decimals(a, b) for a, b in zip(output_lines, expected_lines)
  )


def _same_decimals(a: str, b: str) -> bool:
  if len(a) > 10 * len(b) + 1000:  # a number of a million digits is only there to cost time
    return False
  a_words, b_words = a.split(), b.split()
  if len(a_words) != len(b_words):
    return False
  try:
    return all(decimal.Decimal(x) == decimal.Decimal(y) for x, y in zip(a_words, b_words))
  except decimal.InvalidOperation:  # not a number, or a signalling NaN
    return False


def same_value(value, expected) -> bool:
  """Equality of JSON values: numbers by value, booleans apart from numbers. No recursion: depth is the program's choice."""
  todo = [(value, expected)]
  while todo:
    a, b = todo.pop()
    if isinstance(a, bool) or isinstance(b, bool):
      if a is not b:
        return False
    elif isinstance(a, list) and isinstance(b, list):
      if len(a) != len(b):
        return False
      todo.extend(zip(a, b))
    elif isinstance(a, dict) and isinstance(b, dict):
      if a.keys() != b.keys():
        return False
      todo.extend((a[k], b[k]) for k in a)
    elif isinstance(a, (list, dict)) or isinstance(b, (list, dict)) or a != b:
      return False
  return True


def _same_literal(tagged, test: TestCase) -> bool:
  expected = ast.literal_eval(test.output.strip())
  # Size first: a set of many numbers with one hash takes the host minutes to build.
  if _parts(tagged) > 10 * _parts(_as_json(expected)) + 100:
    return False
  value = _literal(tagged)
  if test.compare == "isclose":
    try:
      return type(value) in (int, float) and math.isclose(
        value, expected, rel_tol=test.rel_tol, abs_tol=test.abs_tol
      )
    except OverflowError:  # an integer beyond every float
      return False
  if test.compare == "set":
    return set(value) == set(expected)
  if test.compare == "in":
    return value in expected
  return value == expected


def _parts(value) -> int:
  """Lists, objects and scalars in a JSON value."""
  count, todo = 0, [value]
  while todo:
    x = todo.pop()
    count += 1
    if isinstance(x, list):
      todo.extend(x)
    elif isinstance(x, dict):
      todo.extend(x.values())
  return count


def _as_json(literal):
  """The literal with every container as a list: for its size alone."""
  if isinstance(literal, dict):
    return [[_as_json(k), _as_json(v)] for k, v in literal.items()]
  if isinstance(literal, (list, tuple, set, frozenset)):
    return [_as_json(x) for x in literal]
  return literal


def _literal(tagged):
  """The value that the jail tagged: JSON for scalars, {tag: items} for containers and what JSON has no word for."""
  if isinstance(tagged, list):
    raise ValueError("untagged list")
  if not isinstance(tagged, dict):
    return tagged
  ((tag, items),) = tagged.items()
  match tag:
    case "list":
      return [_literal(x) for x in items]
    case "tuple":
      return tuple(_literal(x) for x in items)
    case "set":
      return {_literal(x) for x in items}
    case "frozenset":
      return frozenset(_literal(x) for x in items)
    case "dict":
      return {_literal(k): _literal(v) for k, v in items}
    case "bytes":
      return bytes.fromhex(items)
    case "complex":
      return complex(*items)
  raise ValueError(f"unknown tag {tag!r}")


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


def check_tests(tests: list[TestCase], fn_name: str | None):
  """ValueError for a test that no program could pass because its input or its expected output has the wrong form."""
  for number, test in enumerate(tests, 1):
    for name, text in (
      ("input", test.input),
      ("expected output", test.output),
      ("expression", test.expression or ""),
    ):
      if not isinstance(text, str):
        raise ValueError(f"test {number}: the {name} is {cut(repr(text), 80)}, not text")
    what = "the expected output", test.output
    try:
      if test.expression is not None:
        ast.literal_eval(test.output.strip())
      elif fn_name is not None:
        json.loads(test.output)
        what = "a line of the input", test.input
        for line in filter(str.strip, test.input.split("\n")):
          json.loads(line)
    except (ValueError, SyntaxError, RecursionError) as e:
      raise ValueError(
        f"test {number}: {what[0]} {cut(what[1], 80)!r} is not {'JSON' if test.expression is None else 'a literal'}"
      ) from e


# From what a process left behind to a result.


def judge_test(
  outcome: Outcome, test: TestCase, program: str, fn_name: str | None, limits: Limits
) -> TestResult:
  kind, output, error, detail = _classify(outcome, test, program, fn_name, limits)
  return TestResult(
    input=test.input if test.expression is None else test.expression,
    output=output,
    expected=test.output,
    kind=kind,
    error=error,
    detail=detail,
    hidden=test.hidden,
    cpu_s=outcome.cpu_s,
    wall_s=outcome.wall_s,
    max_rss_mb=outcome.max_rss_kb / 1024,
  )


def _classify(outcome, test, program, fn_name, limits):
  """-> kind, output text, error, detail."""
  stdin_program = fn_name is None and test.expression is None
  stdout = outcome.stdout.decode("utf-8", "replace")
  output = stdout if stdin_program else ""
  record = _record(outcome.result)
  error = _program_error(record.get("error"), program)
  if outcome.killed or outcome.cpu_s > limits.time_s or outcome.status & 0x7F == signal.SIGXCPU:
    return "time_limit", output, None, ""
  if outcome.capped:
    return "output_limit", output, None, ""
  if signal_number := outcome.status & 0x7F:
    if signal_number == signal.SIGKILL and outcome.max_rss_kb > 0.9 * 1024 * limits.memory_mb:
      # the kernel was short of memory and chose this process
      return "memory_limit", output, None, ""
    try:
      name = signal.Signals(signal_number).name
    except ValueError:
      name = f"signal {signal_number}"
    return (
      "runtime_error",
      output,
      ProgramError("", f"the process was ended by {name}", None, ""),
      "",
    )
  if outcome.status:
    error = error or ProgramError("", f"exit status {outcome.status >> 8 & 0xFF}", None, "")
    return ("memory_limit" if error.type == "MemoryError" else "runtime_error"), output, error, ""
  if stdin_program:
    return ("passed" if same_text(stdout, test.output) else "wrong_answer"), output, None, ""
  if isinstance(record.get("format"), str):
    return "format", "", None, record["format"][:MAX_ERROR_CHARS]
  if "value" not in record:
    return (
      "runtime_error",
      "",
      ProgramError("", "the program ended before it returned a value", None, ""),
      "",
    )
  value = record["value"]
  try:
    if test.expression is None:
      same, text = same_value(value, json.loads(test.output)), json.dumps(value)
    else:
      same, text = _same_literal(value, test), _literal_text(value)
  # mostly what a program wrote into the result by itself; whatever it is, it is the program's fault
  except Exception:
    return "format", "", None, "the result is not a value"
  return ("passed" if same else "wrong_answer"), text, None, ""


def _record(result: bytes) -> dict:
  try:
    record = json.loads(result) if result else {}
  except (ValueError, RecursionError):
    return {}
  return record if isinstance(record, dict) else {}


def _program_error(fields, program: str) -> ProgramError | None:
  if (
    not isinstance(fields, list)
    or len(fields) != 3
    or not all(isinstance(x, str) for x in fields[:2])
  ):
    return None
  name, message, line = fields
  lines = program.split("\n")
  if isinstance(line, bool) or not isinstance(line, int) or not 1 <= line <= len(lines):
    line = None
  return ProgramError(
    name[:MAX_ERROR_CHARS], message[:MAX_ERROR_CHARS], line, lines[line - 1].strip() if line else ""
  )


# Words.

_ADDRESS = re.compile(r"(?<= at )0x[0-9a-fA-F]+")
_MARKERS = re.compile(
  r"<[|\uff5c]|[|\uff5c]>|\[/?INST\]|<</?SYS>>|"
  r"</?(s|start_of_turn|end_of_turn|think|tool_call|tool_response|bos|eos|pad|unk)>",
  re.IGNORECASE,
)


def clean(text: str) -> str:
  """Text that is safe to show: newline and tab are its only control characters, and no chat marker is left whole."""
  text = text.replace("\r\n", "\n")
  if not text.isascii() or not text.replace("\n", "").replace("\t", "").isprintable():
    text = "".join(
      "\ufffd" if c not in "\n\t" and unicodedata.category(c) in _UNSAFE else c for c in text
    )
  # a space after the first character breaks a marker, and a broken marker cannot join its
  # neighbours into a new one
  return _ADDRESS.sub("0x...", _MARKERS.sub(lambda m: m[0][0] + " " + m[0][1:], text))


_EXCEPTIONS = {
  name for name, x in vars(builtins).items() if isinstance(x, type) and issubclass(x, BaseException)
}
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def cut(text: str, limit: int) -> str:
  """The text's beginning and end, at most `limit` characters: errors and answers tend to stand at the ends."""
  if len(text) <= limit:
    return text
  mark = " ... "
  head = (limit - len(mark)) * 2 // 3
  return text[:head] + mark + text[len(text) - (limit - len(mark) - head) :]


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
