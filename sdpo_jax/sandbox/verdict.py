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
import dataclasses
import json

from sdpo_jax.text import cut

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
