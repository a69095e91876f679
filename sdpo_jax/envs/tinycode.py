"""TinyCode: small programming problems in plain words, answered by a Python function that is really executed.

A problem composes one to three operations on a list of numbers, a string or a number:

    Write f(x) for a list of numbers x: blick it, then keep the even numbers.

The answer is a function `f`. Hidden tests run it in the sandbox; the feedback is what an online judge would say (failing
input, output and expected output, or the exception with its line). Known and novel words, splits and levels: `composed`.
"""

import dataclasses
import functools
import json
import random

from sdpo_jax.envs import coding, composed
from sdpo_jax.records import Feedback, Status, Task
from sdpo_jax.sandbox import Limits, Sandbox, TestCase


@dataclasses.dataclass(frozen=True)
class Op:
  """One operation: which input type gives which output type, its Python expression over x, its known phrases."""

  types: dict[str, str]
  code: str
  phrases: tuple[str, ...]


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
# our own expressions, not a model's
_APPLY = {name: eval("lambda x: " + op.code) for name, op in OPS.items()}


def sample_input(rng: random.Random, kind: str):
  if kind == "list":
    items = []
    for _ in range(rng.randint(3, 5)):  # with repeats, so that removing them shows
      items.append(rng.choice(items) if items and rng.random() < 0.25 else rng.randint(-9, 9))
    return items
  if kind == "str":
    return "".join(rng.choice("abcdeABCDE") for _ in range(rng.randint(3, 5)))
  return rng.randint(-9, 9)


def program(ops) -> str:
  """The solution in the one form that the base model writes: a line for each operation."""
  return "def f(x):" + "".join(f"\n    x = {OPS[name].code}" for name in ops) + "\n    return x"


def execute(ops, x):
  """(output, None), or (None, error text with its line) as the judge would report it. For our own operations only."""
  for i, name in enumerate(ops):
    try:
      x = _APPLY[name](x)
    except Exception as error:  # the operation does not fit the type: what a wrong attempt meets
      return None, f"{type(error).__name__}: {error}\nLine {i + 2}: x = {OPS[name].code}"
  return x, None


def _informative(ops, kind: str) -> bool:
  """Whether every operation matters: no shorter program and no constant gives the same outputs on a fixed probe."""
  rng = random.Random(f"probe/{kind}")
  probe = [sample_input(rng, kind) for _ in range(24)]
  outputs = [execute(ops, x) for x in probe]
  if any(error for _, error in outputs) or len({repr(o) for o, _ in outputs}) < 3:
    return False
  shorter = [ops[:i] + ops[i + 1 :] for i in range(len(ops))]
  return all(sum(execute(s, x) == o for x, o in zip(probe, outputs)) < 16 for s in shorter)


@functools.cache  # pure, and half a second for three operations
def compositions(length: int) -> dict[tuple[str, ...], str]:
  """{operations: input type} of every well-typed composition in which each operation matters."""
  chains = [((), kind, kind) for kind in INPUTS]
  for _ in range(length):
    chains = [
      (ops + (name,), start, op.types[now])
      for ops, start, now in chains
      for name, op in OPS.items()
      if now in op.types
    ]
  return {(*ops, start): start for ops, start, _ in chains if _informative(ops, start)}


def solutions(task: Task) -> list[str]:
  """Every program of one to three operations, in the form that the base model writes, that passes the tests of the task."""
  (first, wanted), *rest = task.data["tests"]
  alive, found = [((), first)], []
  for _ in range(3):
    grown = []
    for ops, x in alive:
      for name, apply in _APPLY.items():
        try:
          grown.append((ops + (name,), apply(x)))
        # the operation does not fit the type: no program that goes on from here runs
        except Exception:
          continue
    alive = grown
    found += [
      ops for ops, x in alive if x == wanted and all(execute(ops, y) == (z, None) for y, z in rest)
    ]
  return [program(ops) for ops in found]


def feedback_text(failures: list[dict]) -> str:
  """What the judge says of failing tests: [{input, output, expected, error}], as texts; error is None where there was none."""
  lines = ["Runtime error" if failures[0]["error"] else "Wrong answer"]
  for f in failures:
    lines += [
      f"Input: {f['input']}",
      f["error"] or f"Output: {f['output']}",
      f"Expected: {f['expected']}",
    ]
  return "\n".join(lines)


def failures_of(attempt, ops, inputs) -> list[dict]:
  """The failures that the judge would report of one of our own compositions: until an exception, or SHOWN wrong answers."""
  failures = []
  for x in inputs:
    output, error = execute(attempt, x)
    expected = execute(ops, x)[0]
    if error or output != expected:
      failures.append(
        {
          "input": json.dumps(x),
          "output": json.dumps(output),
          "expected": json.dumps(expected),
          "error": error,
        }
      )
    if error or len(failures) == SHOWN:
      break
  return failures


def distinct_inputs(rng: random.Random, ops, kind: str, count: int) -> list:
  """`count` different inputs on which the composition runs (max of an empty list does not)."""
  inputs = []
  while len(inputs) < count:
    x = sample_input(rng, kind)
    if x not in inputs and execute(ops, x)[1] is None:
      inputs.append(x)
  # the judge goes through them in order: the shortest come first
  return sorted(inputs, key=lambda x: (len(repr(x)), repr(x)))


def statement(body: str, kind: str, details, header: int) -> str:
  return HEADERS[header].format(INPUTS[kind], body)


def _answer(ops, inputs) -> tuple[str, dict]:
  return program(ops), {"tests": [(x, execute(ops, x)[0]) for x in inputs]}


def _complain(attempt, ops, inputs) -> str:
  failures = failures_of(attempt, ops, inputs)
  return feedback_text(failures) if failures else ""


def solves(response: str, ops, kind: str, inputs=None) -> bool:
  """Whether the response is a program of the known form that gives the right outputs, on inputs that no feedback showed."""
  lines = response.split("\n")
  code = {f"    x = {op.code}": name for name, op in OPS.items()}
  if (
    lines[0] != "def f(x):"
    or lines[-1] != "    return x"
    or not all(line in code for line in lines[1:-1])
  ):
    return False
  attempt = tuple(code[line] for line in lines[1:-1])
  fresh = distinct_inputs(random.Random(f"solves/{tuple(ops)}"), ops, kind, 8)
  return all(execute(attempt, x) == execute(ops, x) for x in fresh)


DOMAIN = composed.Domain(
  phrases={name: op.phrases for name, op in OPS.items()},
  types={name: op.types for name, op in OPS.items()},
  compositions=compositions,
  draw=lambda rng, ops, kind: distinct_inputs(rng, ops, kind, TESTS),
  statement=statement,
  answer=_answer,
  complain=_complain,
  solves=solves,
)


class TinyCode:
  """Judges responses by running them. Thread-safe; close() ends the sandbox."""

  LIMITS = Limits(time_s=2.0, memory_mb=256, output_kb=64)

  def __init__(self, *, level: str = "default", words_seed: int = 0, sandbox: Sandbox):
    self.problems = composed.Problems(DOMAIN, level, words_seed)
    self.sandbox = sandbox

  def task(self, split: str, index: int) -> Task:
    return self.problems.task(split, index)

  def solutions(self, task: Task) -> list[str]:
    return solutions(task)

  def prompt(self, task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.prompt}]

  def judge(self, task: Task, response: str) -> Feedback:
    tests = [TestCase(input=json.dumps(x), output=json.dumps(y)) for x, y in task.data["tests"]]
    verdict = self.sandbox.run(
      extract(response), tests, fn_name="f", limits=self.LIMITS, max_failures=SHOWN
    )
    if verdict.kind == "sandbox_failed":
      return Feedback(0.0, verdict.feedback, Status.ENV_FAILED)
    if verdict.passed:
      return Feedback(1.0, "")
    failures = [
      {"input": t.input, "output": t.output, "expected": t.expected, "error": _error(t)}
      for t in verdict.tests
      if not t.passed
    ]
    return Feedback(
      0.0,
      feedback_text(failures),
      Status.TIMEOUT if verdict.kind == "time_limit" else Status.SCORED,
    )


def extract(response: str) -> str:
  """The program: the last fenced block if there is one, else the whole response."""
  program, fault = coding.extract(response)
  return response if fault else program


def _error(test) -> str | None:
  """What stands in the place of an output: the exception with its line, or why there is no output; None for a wrong answer."""
  if test.kind == "wrong_answer":
    return None
  if test.error is None:
    return f"{test.kind.replace('_', ' ')}{': ' + test.detail if test.detail else ''}".capitalize()
  where = f"\nLine {test.error.line}: {test.error.source}" if test.error.line else ""
  return f"{test.error.type}: {test.error.message}{where}"
