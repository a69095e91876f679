"""Judges word problems whose steps are executed one by one: TinyCode's counterpart in mathematics.

    Ann has 7 apples. Take their number: double it, then blick it. What is the result?

The answer is a chain of steps, one calculation a line, and the result in a box:

    7 * 2 = 14
    14 - 5 = 9
    \\boxed{9}

The reward is that of the boxed number. The feedback executes the steps and says where the first
one goes off:
  * a wrong sum,
  * a step that does not go on from the one before, or
  * a step that comes to another number than it should, and to which one it should come.

`composed.py` explains known and novel words, splits and levels. The judge is deterministic and
runs no foreign code: a step is two whole numbers and one of + - * // %.
"""

import functools
import itertools
import json
import operator
import random
import re
from typing import Callable, NamedTuple

from sdpo_jax.envs import composed, numerals
from sdpo_jax.envs.math_text import last_boxed, latex
from sdpo_jax.envs.rows import final_text
from sdpo_jax.records import Feedback, Status, Task


class Op(NamedTuple):
  """Describes an operation on the number before."""

  code: str  # the calculation as text, with {} for the number
  apply: Callable[[int], int]
  phrases: tuple[str, ...]  # known ones


OPS = {
  "plus_one": Op("{} + 1", lambda v: v + 1, ("add one", "increase it by one")),
  "plus_three": Op("{} + 3", lambda v: v + 3, ("add three", "increase it by three")),
  "plus_six": Op("{} + 6", lambda v: v + 6, ("add six", "increase it by six")),
  "plus_ten": Op("{} + 10", lambda v: v + 10, ("add ten", "increase it by ten")),
  "minus_two": Op("{} - 2", lambda v: v - 2, ("subtract two", "take two away")),
  "minus_four": Op("{} - 4", lambda v: v - 4, ("subtract four", "take four away")),
  "minus_seven": Op("{} - 7", lambda v: v - 7, ("subtract seven", "take seven away")),
  "minus_ten": Op("{} - 10", lambda v: v - 10, ("subtract ten", "take ten away")),
  "double": Op("{} * 2", lambda v: v * 2, ("double it", "multiply it by two")),
  "triple": Op("{} * 3", lambda v: v * 3, ("triple it", "multiply it by three")),
  "five_fold": Op("{} * 5", lambda v: v * 5, ("multiply it by five", "take it five times")),
  "square": Op("{0} * {0}", lambda v: v * v, ("square it", "multiply it by itself")),
  "negate": Op("0 - {}", lambda v: -v, ("flip its sign", "subtract it from zero")),
  "from_twenty": Op(
    "20 - {}", lambda v: 20 - v, ("subtract it from twenty", "take it away from twenty")
  ),
  "halve": Op("{} // 2", lambda v: v // 2, ("halve it", "divide it by two")),
  "third": Op("{} // 3", lambda v: v // 3, ("divide it by three", "take a third of it")),
  "mod_four": Op(
    "{} % 4", lambda v: v % 4, ("take the remainder by four", "reduce it modulo four")
  ),
  "mod_seven": Op(
    "{} % 7", lambda v: v % 7, ("take the remainder by seven", "reduce it modulo seven")
  ),
}
HEADERS = (
  "{} has {} {}. Take their number: {}. What is the result?",
  "Start from the number of {1} {2} that {0} has: {3}. What comes out?",
)
NAMES = ("Ann", "Ben", "Eva", "Tom")
THINGS = ("apples", "coins", "stamps", "shells")
STARTS = range(2, 21)  # numbers that a problem starts from
MAX_BOX = 100  # characters of a result
LARGEST = 99  # size of a number on the way
_STEP = re.compile(r"(-?[0-9]{1,4}) (\+|-|\*|//|%) (-?[0-9]{1,4}) = (-?[0-9]{1,9})")
_BOX = re.compile(r"\\boxed\{(-?[0-9]{1,9})\}")
_SIGNS = {
  "+": operator.add,
  "-": operator.sub,
  "*": operator.mul,
  "//": operator.floordiv,
  "%": operator.mod,
}


def chain(ops, start: int) -> list[int]:
  """Returns [start, the number after each step]."""
  numbers = [start]
  for name in ops:
    numbers.append(OPS[name].apply(numbers[-1]))
  return numbers


def program(ops, start: int) -> str:
  """Returns the steps in the one form that the base model writes."""
  numbers = chain(ops, start)
  lines = [
    f"{OPS[name].code.format(before)} = {after}"
    for name, (before, after) in zip(ops, itertools.pairwise(numbers), strict=True)
  ]
  return "\n".join([*lines, f"\\boxed{{{numbers[-1]}}}"])


@functools.cache
def compositions(length: int) -> dict[tuple[str, ...], str]:
  """Returns the chains of operations that `_is_informative` accepts, as Domain.compositions."""
  chains = itertools.product(OPS, repeat=length)
  return {(*ops, "number"): "number" for ops in chains if _is_informative(ops)}


def _is_informative(ops: tuple[str, ...]) -> bool:
  """Tells whether enough starts stay within LARGEST and every operation matters.

  An operation matters if leaving it out changes more than half of the results.
  """
  starts = _small_starts(ops)
  if len(starts) < 4:
    return False
  results = [chain(ops, start)[-1] for start in starts]
  if len(set(results)) < 2:
    return False
  for i in range(len(ops)):
    shorter = ops[:i] + ops[i + 1 :]
    others = [chain(shorter, start)[-1] for start in starts]
    unchanged = sum(map(operator.eq, others, results))
    if 2 * unchanged >= len(starts):
      return False
  return True


def _small_starts(ops) -> list[int]:
  """Returns the starts from which every number on the way stays within LARGEST."""
  return [start for start in STARTS if max(map(abs, chain(ops, start))) <= LARGEST]


def draw(rng: random.Random, ops, kind: str) -> dict:
  """Draws who has how many of what."""
  start = rng.choice(_small_starts(ops))
  return {"name": rng.choice(NAMES), "start": start, "thing": rng.choice(THINGS)}


def statement(body: str, kind: str, details: dict, header: int) -> str:
  """Returns the problem in words."""
  return HEADERS[header].format(details["name"], details["start"], details["thing"], body)


def mistake(response: str, numbers: list[int]) -> str:
  """Says where the steps go off, in the judge's words; "" if they are all right.

  `numbers` are what the steps should come to, the start first.
  """
  lines = [line.strip() for line in response.strip().split("\n") if line.strip()]
  box = _BOX.fullmatch(lines[-1]) if lines else None
  if box is None:
    return "Wrong format\nThe last line must be the result in a box: \\boxed{...}"
  steps = lines[:-1]
  expected_steps = len(numbers) - 1
  value = numbers[0]
  for i, line in enumerate(steps, 1):
    step = _STEP.fullmatch(line)
    if step is None:
      quoted = json.dumps(line[:60], ensure_ascii=False)
      return f"Wrong format\nStep {i} is not a calculation: {quoted}"
    expected = numbers[i] if i <= expected_steps else None
    complaint = _step_mistake(step, i, before=value, expected=expected)
    if complaint:
      return f"Wrong answer\n{complaint}"
    value = int(step[4])
  if len(steps) != expected_steps:
    return f"Wrong answer\nThere are {len(steps)} steps.\nExpected: {expected_steps}"
  if int(box[1]) != value:
    return f"Wrong answer\nThe box says {box[1]}, the steps come to {value}."
  return ""


def _step_mistake(step: re.Match, i: int, *, before: int, expected: int | None) -> str:
  """Says what is wrong with step i, "" if nothing; expected: its number, None for one too many."""
  left, sign, right, result = int(step[1]), step[2], int(step[3]), int(step[4])
  if sign in ("//", "%") and right == 0:
    return f"Step {i}: {left} {sign} {right} divides by zero."
  value = _SIGNS[sign](left, right)
  if result != value:
    return f"Step {i}: {left} {sign} {right} is {value}, not {result}."
  if before not in (left, right):
    return f"Step {i} does not go on from {before}."
  if expected is not None and value != expected:
    return f"Step {i}: {before} came to {value}.\nExpected: {expected}"
  return ""


def boxed(response: str) -> int | None:
  """Returns the whole number in the last box, in any notation; None if it holds none."""
  content, _ = last_boxed(response)
  value = numerals.value(latex(content)) if len(content) <= MAX_BOX else None
  if value is None or value.exact.denominator != 1:
    return None
  return int(value.exact)


def _answer(ops, details: dict) -> tuple[str, dict]:
  start = details["start"]
  return program(ops, start), {"numbers": chain(ops, start)}


def _complain(attempt, ops, details: dict) -> str:
  start = details["start"]
  return mistake(program(attempt, start), chain(ops, start))


def _solves(response: str, ops, kind: str, details: dict) -> bool:
  return boxed(response) == chain(ops, details["start"])[-1]


DOMAIN = composed.Domain(
  phrases={name: op.phrases for name, op in OPS.items()},
  types={name: {"number": "number"} for name in OPS},
  compositions=compositions,
  draw=draw,
  statement=statement,
  answer=_answer,
  complain=_complain,
  solves=_solves,
)


class Arithmetic:
  """Judges by executing the steps; in process, since nothing foreign runs."""

  def __init__(self, *, level: str = "default", words_seed: int = 0):
    self.problems = composed.Problems(DOMAIN, level, words_seed)

  def task(self, split: str, index: int) -> Task:
    """Returns a problem of a split of `composed.SPLITS`."""
    return self.problems.task(split, index)

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the question."""
    return [{"role": "user", "content": task.prompt}]

  def answer(self, task: Task, response: str) -> str | None:
    """Returns the number in the last box."""
    text, fault = final_text(response)
    number = None if fault else boxed(text)
    return None if number is None else str(number)

  def judge(self, task: Task, response: str) -> Feedback:
    """Gives 1 for the right number in the last box, by whatever steps."""
    numbers = task.data["numbers"]
    text, fault = final_text(response)
    if fault and response.strip():  # nothing follows the thought
      return Feedback(0.0, fault)
    if boxed(text) == numbers[-1]:
      return Feedback(1.0, "")
    return Feedback(0.0, mistake(text, numbers) or "Wrong answer", Status.SCORED)
