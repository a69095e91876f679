"""Judges small programming problems in plain words, answered by a function that is executed.

A problem composes one to three operations on a list of numbers, a string or a number:

    Write f(x) for a list of numbers x: blick it, then keep the even numbers.

The answer is a Python function `f`. Hidden tests run it in the sandbox, unless it consists of the
lines that solutions are made of, which need none. The feedback is what an online judge would say:
failing input, output and expected output, or the exception with its line.

`composed.py` explains known and novel words, splits and levels.
"""

import dataclasses
import functools
import json
import random
from typing import NamedTuple

from sdpo_jax.envs import coding, composed
from sdpo_jax.envs.rows import final_text
from sdpo_jax.records import Feedback, Status, Task
from sdpo_jax.sandbox import Limits, Sandbox, TestCase, TestResult


@dataclasses.dataclass(frozen=True)
class Op:
  """Describes an operation on the input, or on what the operation before it gives."""

  types: dict[str, str]  # type it takes: type it gives
  code: str  # a Python expression over x
  phrases: tuple[str, ...]  # known ones


class Failure(NamedTuple):
  """Holds a failed test as the feedback shows it."""

  input: str
  output: str
  expected: str
  error: str | None  # stands in the place of the output; None for a wrong answer


_SEQ = {"list": "list", "str": "str"}
_LIST = {"list": "list"}
OPS = {
  "reverse": Op(_SEQ, "x[::-1]", ("reverse it", "turn it around")),
  "rest": Op(_SEQ, "x[1:]", ("drop the first item", "leave out the first item")),
  "front": Op(_SEQ, "x[:-1]", ("drop the last item", "leave out the last item")),
  "every_other": Op(_SEQ, "x[::2]", ("keep every second item", "take every second item")),
  "twice": Op(_SEQ, "x + x", ("repeat it", "append it to itself")),
  "sort": Op(_LIST, "sorted(x)", ("sort it", "put it in order")),
  "sort_down": Op(
    _LIST, "sorted(x, reverse=True)", ("sort it downwards", "put it in falling order")
  ),
  "unique": Op(
    _LIST, "list(dict.fromkeys(x))", ("remove repeated numbers", "keep one of each number")
  ),
  "evens": Op(
    _LIST, "[v for v in x if v % 2 == 0]", ("keep the even numbers", "remove the odd numbers")
  ),
  "odds": Op(
    _LIST, "[v for v in x if v % 2 == 1]", ("keep the odd numbers", "remove the even numbers")
  ),
  "positives": Op(
    _LIST, "[v for v in x if v > 0]", ("keep the positive numbers", "keep numbers above zero")
  ),
  "double": Op(_LIST, "[v * 2 for v in x]", ("double each number", "multiply each number by two")),
  "increment": Op(
    _LIST, "[v + 1 for v in x]", ("add one to each number", "raise each number by one")
  ),
  "negate": Op(_LIST, "[-v for v in x]", ("negate each number", "flip the sign of each number")),
  "square": Op(
    _LIST, "[v * v for v in x]", ("square each number", "multiply each number by itself")
  ),
  "sum": Op({"list": "int"}, "sum(x)", ("add them up", "take the sum")),
  "max": Op({"list": "int"}, "max(x)", ("take the largest", "find the maximum")),
  "min": Op({"list": "int"}, "min(x)", ("take the smallest", "find the minimum")),
  "len": Op({"list": "int", "str": "int"}, "len(x)", ("count the items", "take the length")),
  "plus_ten": Op({"int": "int"}, "x + 10", ("add ten", "increase the result by ten")),
  "triple": Op({"int": "int"}, "x * 3", ("triple the result", "multiply the result by three")),
  "mod_seven": Op(
    {"int": "int"}, "x % 7", ("take the remainder by seven", "reduce it modulo seven")
  ),
  "upper": Op({"str": "str"}, "x.upper()", ("make it upper case", "write it in capitals")),
  "swap": Op(
    {"str": "str"}, "x.swapcase()", ("swap the case", "exchange capitals and small letters")
  ),
}
HEADERS = ("Write f(x) for {}: {}.", "f(x) takes {}: {}.")
INPUTS = {"list": "a list of numbers x", "str": "a string x", "int": "a number x"}
TESTS = 5  # hidden tests of a problem
SHOWN = 2  # failing tests that the feedback shows
# A program of so few of our own lines is executed without the sandbox: a process for each test
# costs as much as learning from the response. More of them may double a list out of memory.
RUN_HERE = 6
# These are our own expressions, not a model's.
_APPLY = {name: eval("lambda x: " + op.code) for name, op in OPS.items()}
_OP_OF_LINE = {f"    x = {op.code}": name for name, op in OPS.items()}


def sample_input(rng: random.Random, kind: str):
  """Draws an input of a type: three to five items, or a number, from -9 to 9."""
  if kind == "list":
    items = []
    for _ in range(rng.randint(3, 5)):
      # Some numbers repeat, so that removing repeated ones shows.
      repeats = bool(items) and rng.random() < 0.25
      items.append(rng.choice(items) if repeats else rng.randint(-9, 9))
    return items
  if kind == "str":
    return "".join(rng.choice("abcdeABCDE") for _ in range(rng.randint(3, 5)))
  return rng.randint(-9, 9)


def distinct_inputs(rng: random.Random, ops, kind: str, count: int) -> list:
  """Draws different inputs on which a composition runs (max of an empty list does not)."""
  inputs = []
  while len(inputs) < count:
    x = sample_input(rng, kind)
    _, error = execute(ops, x)
    if x not in inputs and error is None:
      inputs.append(x)
  # The judge goes through them in order: the shortest come first.
  return sorted(inputs, key=lambda x: (len(repr(x)), repr(x)))


def program(ops) -> str:
  """Returns the solution in the one form that the base model writes, a line per operation."""
  lines = [f"    x = {OPS[name].code}" for name in ops]
  return "\n".join(["def f(x):", *lines, "    return x"])


def execute(ops, x):
  """Returns (output, None), or (None, error text with its line) as the judge would report it.

  It runs our own operations only.
  """
  for i, name in enumerate(ops):
    try:
      x = _APPLY[name](x)
    except Exception as error:  # The operation does not fit the type: so wrong attempts end.
      return None, f"{type(error).__name__}: {error}\nLine {i + 2}: x = {OPS[name].code}"
  return x, None


@functools.cache  # It is pure, and takes half a second for three operations.
def compositions(length: int) -> dict[tuple[str, ...], str]:
  """Returns {(*ops, input type): input type} of every well-typed composition.

  In each of them every operation matters.
  """
  chains = [((), kind, kind) for kind in INPUTS]  # operations, input type, type of x now
  for _ in range(length):
    longer = []
    for ops, kind, now in chains:
      for name, op in OPS.items():
        if now in op.types:
          longer.append((ops + (name,), kind, op.types[now]))
    chains = longer
  return {(*ops, kind): kind for ops, kind, _ in chains if _is_informative(ops, kind)}


def _is_informative(ops, kind: str) -> bool:
  """Tells whether every operation matters on a fixed sample of inputs.

  Neither a constant nor a program with one operation less gives the same outputs.
  """
  rng = random.Random(f"probe/{kind}")
  inputs = [sample_input(rng, kind) for _ in range(24)]
  results = [execute(ops, x) for x in inputs]
  outputs = {repr(result) for result in results}
  if any(error for _, error in results) or len(outputs) < 3:
    return False
  for i in range(len(ops)):
    shorter = ops[:i] + ops[i + 1 :]
    unchanged = sum(execute(shorter, x) == r for x, r in zip(inputs, results, strict=True))
    if unchanged >= 16:
      return False
  return True


def solutions(task: Task) -> list[str]:
  """Returns every program of one to three operations that passes the tests of the task.

  They have the form that the base model writes.
  """
  (first_input, first_output), *other_tests = task.data["tests"]
  attempts = [((), first_input)]  # operations, and what they make of the first input
  right = []
  for _ in range(3):
    longer = []
    for ops, x in attempts:
      for name, apply in _APPLY.items():
        try:
          longer.append((ops + (name,), apply(x)))
        except Exception:  # The operation does not fit the type: no program that begins so runs.
          continue
    attempts = longer
    for ops, x in attempts:
      if x == first_output and all(execute(ops, y) == (z, None) for y, z in other_tests):
        right.append(ops)
  return [program(ops) for ops in right]


def feedback_text(failures: list[Failure]) -> str:
  """Returns what the judge says of failing tests."""
  lines = ["Runtime error" if failures[0].error else "Wrong answer"]
  for failure in failures:
    lines += [
      f"Input: {failure.input}",
      failure.error or f"Output: {failure.output}",
      f"Expected: {failure.expected}",
    ]
  return "\n".join(lines)


def failures_of(attempt, ops, inputs) -> list[Failure]:
  """Returns the failures that the judge would report of one of our own compositions."""
  return failures_on(attempt, [(x, execute(ops, x)[0]) for x in inputs])


def failures_on(attempt, tests) -> list[Failure]:
  """Returns the failures of a composition on tests [(input, expected output)].

  They end with the first exception, or with SHOWN wrong answers.
  """
  failures = []
  for x, expected in tests:
    output, error = execute(attempt, x)
    if error or output != expected:
      shown = Failure(json.dumps(x), json.dumps(output), json.dumps(expected), error)
      failures.append(shown)
    if error or len(failures) == SHOWN:
      break
  return failures


def statement(body: str, kind: str, details, header: int) -> str:
  """Returns the problem in words."""
  return HEADERS[header].format(INPUTS[kind], body)


def operations(program_text: str) -> tuple[str, ...] | None:
  """Returns the operations of a program in the form of `program`; None for any other text."""
  first, *steps, last = program_text.split("\n") if "\n" in program_text else ("", "")
  if first != "def f(x):" or last != "    return x":
    return None
  if not all(step in _OP_OF_LINE for step in steps):
    return None
  return tuple(_OP_OF_LINE[step] for step in steps)


def solves(response: str, ops, kind: str, inputs=None) -> bool:
  """Tells whether a program of the known form is right on inputs that no feedback showed."""
  attempt = operations(response)
  if attempt is None:
    return False
  fresh = distinct_inputs(random.Random(f"solves/{tuple(ops)}"), ops, kind, 8)
  return all(execute(attempt, x) == execute(ops, x) for x in fresh)


def _draw(rng: random.Random, ops, kind: str) -> list:
  return distinct_inputs(rng, ops, kind, TESTS)


def _answer(ops, inputs) -> tuple[str, dict]:
  return program(ops), {"tests": [(x, execute(ops, x)[0]) for x in inputs]}


def _complain(attempt, ops, inputs) -> str:
  failures = failures_of(attempt, ops, inputs)
  return feedback_text(failures) if failures else ""


DOMAIN = composed.Domain(
  phrases={name: op.phrases for name, op in OPS.items()},
  types={name: op.types for name, op in OPS.items()},
  compositions=compositions,
  draw=_draw,
  statement=statement,
  answer=_answer,
  complain=_complain,
  solves=solves,
)


class TinyCode:
  """Judges responses by running them. It is thread-safe.

  stages, stage_questions: groups in which the novel words are taught, and the questions of train
    for each of them but the last (composed.py).
  """

  LIMITS = Limits(time_s=2.0, memory_mb=256, output_kb=64)

  def __init__(
    self,
    *,
    level: str = "default",
    words_seed: int = 0,
    stages: int = 1,
    stage_questions: int = 1000,
    sandbox: Sandbox,
  ):
    self.problems = composed.Problems(DOMAIN, level, words_seed, stages, stage_questions)
    self.sandbox = sandbox

  def task(self, split: str, index: int) -> Task:
    """Returns a problem of a split of `composed.SPLITS`."""
    return self.problems.task(split, index)

  def solutions(self, task: Task) -> list[str]:
    """Lists the right programs of one to three operations."""
    return solutions(task)

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the question."""
    return [{"role": "user", "content": task.prompt}]

  def judge(self, task: Task, response: str) -> Feedback:
    """Runs the response's program on the hidden tests."""
    _, fault = final_text(response)
    if fault and response.strip():  # nothing follows the thought
      return Feedback(0.0, fault)
    program_text = extract(response)
    ops = operations(program_text)
    if ops is None or len(ops) > RUN_HERE:
      return self._judge_in_sandbox(task, program_text)
    failures = failures_on(ops, task.data["tests"])
    return Feedback(0.0, feedback_text(failures)) if failures else Feedback(1.0, "")

  def _judge_in_sandbox(self, task: Task, program_text: str) -> Feedback:
    """Judges what anybody may have written."""
    tests = [TestCase(input=json.dumps(x), output=json.dumps(y)) for x, y in task.data["tests"]]
    verdict = self.sandbox.run(
      program_text,
      tests,
      fn_name="f",
      limits=self.LIMITS,
      max_failures=SHOWN,
      gives_names=False,
    )
    if verdict.kind == "sandbox_failed":
      return Feedback(0.0, verdict.feedback, Status.ENV_FAILED)
    if verdict.passed:
      return Feedback(1.0, "")
    failures = [
      Failure(result.input, result.output, result.expected, _error_text(result))
      for result in verdict.tests
      if not result.passed
    ]
    status = Status.TIMEOUT if verdict.kind == "time_limit" else Status.SCORED
    return Feedback(0.0, feedback_text(failures), status)


def extract(response: str) -> str:
  """Returns the program: the last fenced block if there is one, else all after the thought."""
  block, fault = coding.extract(response)
  return final_text(response)[0] if fault else block


def _error_text(result: TestResult) -> str | None:
  """Returns what stands in the place of an output; None for a wrong answer.

  It is the exception with its line, or why there is no output.
  """
  if result.kind == "wrong_answer":
    return None
  error = result.error
  if error is None:
    reason = result.kind.replace("_", " ")
    return (f"{reason}: {result.detail}" if result.detail else reason).capitalize()
  where = f"\nLine {error.line}: {error.source}" if error.line else ""
  return f"{error.type}: {error.message}{where}"
