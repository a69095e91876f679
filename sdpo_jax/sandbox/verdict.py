"""Holds the records of the sandbox: tests, limits, outcomes, results and verdicts.

They live on the host only. An `Outcome` is what came out of the jail and is untrusted; classify.py
turns it into a `TestResult`, and wording.py turns results into a `Verdict`.
"""

import ast
from collections.abc import Callable
import dataclasses
import math

from sdpo_jax.sandbox.check_source import Check, read_check
from sdpo_jax.sandbox.json_values import parse_json
from sdpo_jax.text import cut

# How a test, and so a program, can end.
KINDS = (
  "passed",
  "wrong_answer",
  "runtime_error",  # an exception, an exit status or a signal
  "time_limit",
  "memory_limit",
  "output_limit",
  "format",  # no such function, or a value that cannot be returned
  "contained",  # the program made its worker misbehave, and the worker was replaced
  "sandbox_failed",  # we could not judge: our fault, never a reward
)
COMPARISONS = ("equal", "tokens", "float", "in", "isclose", "set")


@dataclasses.dataclass(frozen=True)
class TestCase:
  """Holds one test of a program.

  With an `expression`, the jail evaluates it after the program and returns its value. A number is
  close to another within `rel_tol` or `abs_tol`. With a `check`, that program judges the answer, or
  calls the judged function itself; then there is no input.

  The feedback on a hidden test shows neither its input nor what was expected, nor a word that the
  program chose. A program can still tell something of the input: by the kind of failure, the
  built-in exception and the line of its own that it ends with.
  """

  __test__ = False  # not a test class, whatever pytest thinks of the name
  input: str = ""  # standard input, or one JSON argument a line for a function
  output: str = ""  # what is expected: text, JSON for a function, a literal for an expression
  expression: str | None = None
  # "equal": by the rule of the test's mode, see compare.py
  # for an expression also "set": equal as sets, "in": one of the expected elements,
  # "isclose": close to the number
  # for an answer also "float": numbers within a tolerance, and of a program that writes to
  # standard output "tokens": the same words, however they are spaced
  compare: str = "equal"
  rel_tol: float = 1e-9
  abs_tol: float = 0.0
  hidden: bool = False
  check: str | None = None  # the source of a program that judges, see check_source.py

  def __post_init__(self):
    if self.compare not in COMPARISONS:
      raise ValueError(
        f"TestCase.compare={self.compare!r} is unknown; choose from {', '.join(COMPARISONS)}"
      )
    if self.compare in ("in", "isclose", "set") and self.expression is None:
      raise ValueError(f"TestCase.compare={self.compare!r} needs an expression")
    if self.compare in ("tokens", "float") and self.expression is not None:
      raise ValueError(f"TestCase.compare={self.compare!r} is not for an expression")
    if self.hidden not in (True, False):
      raise ValueError(f"TestCase.hidden={self.hidden!r} must be true or false")
    for name, tolerance in (("rel_tol", self.rel_tol), ("abs_tol", self.abs_tol)):
      if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise ValueError(f"TestCase.{name}={tolerance!r} must be a finite number of at least 0")
    if self.check is not None and (self.expression is not None or self.compare != "equal"):
      raise ValueError("TestCase.check takes no expression and no compare: it judges by itself")

  @property
  def given(self) -> str:
    """Returns what the program gets: the expression if there is one, else the input."""
    return self.input if self.expression is None else self.expression


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits one test: CPU time decides, and wall time is the backstop."""

  time_s: float = 6.0  # CPU seconds of all threads together
  memory_mb: int = 1024  # on top of the bare interpreter; MiB
  output_kb: int = 4096  # of standard output, standard error and the result each; KiB

  def __post_init__(self):
    if not (self.time_s > 0 and self.memory_mb > 0 and self.output_kb > 0):
      raise ValueError(f"{self}: every limit must be above 0")

  @property
  def wall_s(self) -> float:
    """Returns the wall time after which a program is ended, however little CPU time it had."""
    return max(2 * self.time_s, self.time_s + 2)


@dataclasses.dataclass(frozen=True)
class ProgramError:
  """Describes an exception as the program's user would see it."""

  type: str  # class name, "" where the process died without one
  message: str
  line: int | None  # line of the program, from 1
  source: str  # that line's text


@dataclasses.dataclass(frozen=True)
class TestResult:
  """Says how a program did on one test."""

  __test__ = False  # as for TestCase
  input: str  # what the program was given (the expression, for an expression test)
  output: str  # standard output, or the returned value as text; "" where there is none
  expected: str | None  # None: only a check knows
  kind: str  # one of KINDS
  error: ProgramError | None = None
  detail: str = ""  # why the form is wrong, or why the sandbox failed
  hidden: bool = False
  cpu_s: float = 0.0
  wall_s: float = 0.0

  @property
  def passed(self) -> bool:
    """Tells whether the program's answer was right."""
    return self.kind == "passed"


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Says how a program did on its tests."""

  kind: str  # one of KINDS: the first failing test's
  feedback: str  # "" when everything passed
  tests: tuple[TestResult, ...]  # those that ran, in order
  number: int  # of tests there were

  @property
  def passed(self) -> bool:
    """Tells whether the program passed every test."""
    return self.kind == "passed"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Holds what the host saw of one test's process, none of it to be believed beyond its type."""

  status: int  # as wait(2) gives it
  killed: bool  # by the watchdog, for its time
  cpu_s: float
  wall_s: float
  max_rss_kb: int
  stdout: bytes  # each cut at the cap
  result: bytes
  capped: bool  # one of the files reached the cap


def check_tests(tests: list[TestCase], fn_name: str | None) -> None:
  """Raises ValueError for a test that no program could pass, because its form is wrong.

  Its fields must be text. The expected output of an expression must be a literal; that of a
  function, and each line of its input, must be JSON. A check must define what `check_source.py`
  says.
  """
  for number, test in enumerate(tests, 1):
    for name, text in (
      ("input", test.input),
      ("expected output", test.output),
      ("expression", test.expression or ""),
      ("check", test.check or ""),
    ):
      if not isinstance(text, str):
        raise ValueError(f"test {number}: the {name} is {cut(repr(text), 80)}, not text")
    if test.compare == "tokens" and fn_name is not None:
      raise ValueError(f"test {number}: compare='tokens' is for what a program prints")
    check = None if test.check is None else _read_check(test, fn_name, number)
    if test.expression is not None:
      _require(ast.literal_eval, test.output.strip(), f"{_expected(test, number)} is not a literal")
    elif fn_name is not None and (check is None or check.judges_answers):
      _check_json(test, number)


def _read_check(test: TestCase, fn_name: str | None, number: int) -> Check:
  """Reads a test's check. Raises ValueError if it or the fields beside it are of no use."""
  try:
    check = read_check(test.check, fn_name)
  except ValueError as e:
    raise ValueError(f"test {number}: {e}") from e
  if not check.judges_answers and (test.input or test.output):
    raise ValueError(f"test {number}: check(candidate) calls by itself, without input and output")
  return check


def _check_json(test: TestCase, number: int) -> None:
  """Raises ValueError if a function's expected output or a line of its input is no JSON.

  A check may do without an expected output.
  """
  if test.output or test.check is None:
    _require(parse_json, test.output, f"{_expected(test, number)} is not JSON")
  message = f"test {number}: a line of the input {cut(test.input, 80)!r} is not JSON"
  for line in filter(str.strip, test.input.split("\n")):
    _require(parse_json, line, message)


def _expected(test: TestCase, number: int) -> str:
  return f"test {number}: the expected output {cut(test.output, 80)!r}"


def _require(parse: Callable, text: str, message: str) -> None:
  """Raises ValueError with this message for a text that the parser does not take."""
  try:
    parse(text)
  except (ValueError, SyntaxError, RecursionError) as e:
    raise ValueError(message) from e
