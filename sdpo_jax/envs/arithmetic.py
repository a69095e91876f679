"""Arithmetic: word problems whose steps are executed one by one. TinyCode's counterpart in mathematics.

    Ann has 7 apples. Take their number: double it, then blick it. What is the result?

The answer is a chain of steps, one calculation a line, and the result in a box:

    7 * 2 = 14
    14 - 5 = 9
    \\boxed{9}

The reward is that of the boxed number. The feedback executes the steps and says where the first one goes off: a wrong sum, a step that
does not go on from the one before, or a step that comes to another number than it should (and to which one). Known and novel words, splits
and levels: `composed`. Deterministic; runs no foreign code: a step is two whole numbers and one of + - * // %.
"""

import functools
import json
import operator
import random
import re

from sdpo_jax.envs import composed
from sdpo_jax.records import Feedback, Status, Task

OPS = {  # operation: (the step as text over the number before, what it gives, known phrases)
  "plus_one": ("{} + 1", lambda v: v + 1, ("add one", "increase it by one")),
  "plus_three": ("{} + 3", lambda v: v + 3, ("add three", "increase it by three")),
  "plus_six": ("{} + 6", lambda v: v + 6, ("add six", "increase it by six")),
  "plus_ten": ("{} + 10", lambda v: v + 10, ("add ten", "increase it by ten")),
  "minus_two": ("{} - 2", lambda v: v - 2, ("subtract two", "take two away")),
  "minus_four": ("{} - 4", lambda v: v - 4, ("subtract four", "take four away")),
  "minus_seven": ("{} - 7", lambda v: v - 7, ("subtract seven", "take seven away")),
  "minus_ten": ("{} - 10", lambda v: v - 10, ("subtract ten", "take ten away")),
  "double": ("{} * 2", lambda v: v * 2, ("double it", "multiply it by two")),
  "triple": ("{} * 3", lambda v: v * 3, ("triple it", "multiply it by three")),
  "five_fold": ("{} * 5", lambda v: v * 5, ("multiply it by five", "take it five times")),
  "square": ("{0} * {0}", lambda v: v * v, ("square it", "multiply it by itself")),
  "negate": ("0 - {}", lambda v: -v, ("flip its sign", "subtract it from zero")),
  "from_twenty": (
    "20 - {}",
    lambda v: 20 - v,
    ("subtract it from twenty", "take it away from twenty"),
  ),
  "halve": ("{} // 2", lambda v: v // 2, ("halve it", "divide it by two")),
  "third": ("{} // 3", lambda v: v // 3, ("divide it by three", "take a third of it")),
  "mod_four": ("{} % 4", lambda v: v % 4, ("take the remainder by four", "reduce it modulo four")),
  "mod_seven": (
    "{} % 7",
    lambda v: v % 7,
    ("take the remainder by seven", "reduce it modulo seven"),
  ),
}
HEADERS = (
  "{} has {} {}. Take their number: {}. What is the result?",
  "Start from the number of {1} {2} that {0} has: {3}. What comes out?",
)
NAMES, THINGS = ("Ann", "Ben", "Eva", "Tom"), ("apples", "coins", "stamps", "shells")
# the number that a problem starts from; the largest size of a number on the way
STARTS, LARGEST = range(2, 21), 99
_STEP = re.compile(r"(-?\d{1,4}) (\+|-|\*|//|%) (-?\d{1,4}) = (-?\d{1,9})")
_BOX = re.compile(r"\\boxed\{(-?\d{1,9})\}")
_SIGNS = {
  "+": operator.add,
  "-": operator.sub,
  "*": operator.mul,
  "//": operator.floordiv,
  "%": operator.mod,
}


def chain(ops, start: int) -> list[int]:
  """[start, the number after each step]."""
  numbers = [start]
  for name in ops:
    numbers.append(OPS[name][1](numbers[-1]))
  return numbers


def program(ops, start: int) -> str:
  """The steps in the one form that the base model writes."""
  numbers = chain(ops, start)
  lines = [
    f"{OPS[name][0].format(before)} = {after}"
    for name, before, after in zip(ops, numbers, numbers[1:])
  ]
  return "\n".join(lines + [f"\\boxed{{{numbers[-1]}}}"])


@functools.cache
def compositions(length: int) -> dict[tuple[str, ...], str]:
  """Those in which every operation matters: leaving one out changes most results, and enough starts stay within LARGEST."""
  chains = [()]
  for _ in range(length):
    chains = [ops + (name,) for ops in chains for name in OPS]

  def informative(ops) -> bool:
    starts = [s for s in STARTS if max(map(abs, chain(ops, s))) <= LARGEST]
    results = [chain(ops, s)[-1] for s in starts]
    shorter = [ops[:i] + ops[i + 1 :] for i in range(len(ops))]
    return (
      len(starts) >= 4
      and len(set(results)) >= 2
      and all(
        2 * sum(chain(other, s)[-1] == r for s, r in zip(starts, results)) < len(starts)
        for other in shorter
      )
    )

  return {(*ops, "number"): "number" for ops in chains if informative(ops)}


def draw(rng: random.Random, ops, kind: str) -> dict:
  """Who has how many of what."""
  start = rng.choice([s for s in STARTS if max(map(abs, chain(ops, s))) <= LARGEST])
  return {"name": rng.choice(NAMES), "start": start, "thing": rng.choice(THINGS)}


def statement(body: str, kind: str, details: dict, header: int) -> str:
  return HEADERS[header].format(details["name"], details["start"], details["thing"], body)


def mistake(response: str, numbers: list[int]) -> str:
  """Where the steps go off, as the judge reports it; numbers: what they should come to, the start first. "" if they are all right."""
  lines = [line.strip() for line in response.strip().split("\n") if line.strip()]
  if not lines or not _BOX.fullmatch(lines[-1]):
    return "Wrong format\nThe last line must be the result in a box: \\boxed{...}"
  now = numbers[0]
  for i, line in enumerate(lines[:-1], 1):
    step = _STEP.fullmatch(line)
    if step is None:
      return (
        f"Wrong format\nStep {i} is not a calculation: {json.dumps(line[:60], ensure_ascii=False)}"
      )
    a, sign, b, said = int(step[1]), step[2], int(step[3]), int(step[4])
    if sign in ("//", "%") and b == 0:
      return f"Wrong answer\nStep {i}: {a} {sign} {b} divides by zero."
    value = _SIGNS[sign](a, b)
    if said != value:
      return f"Wrong answer\nStep {i}: {a} {sign} {b} is {value}, not {said}."
    if now not in (a, b):
      return f"Wrong answer\nStep {i} does not go on from {now}."
    if i < len(numbers) and value != numbers[i]:
      return f"Wrong answer\nStep {i}: {now} came to {value}.\nExpected: {numbers[i]}"
    now = value
  if len(lines) - 1 != len(numbers) - 1:
    return f"Wrong answer\nThere are {len(lines) - 1} steps.\nExpected: {len(numbers) - 1}"
  return (
    ""
    if int(_BOX.fullmatch(lines[-1])[1]) == now
    else f"Wrong answer\nThe box says {_BOX.fullmatch(lines[-1])[1]}, the steps come to {now}."
  )


def _complain(attempt, ops, details: dict) -> str:
  return mistake(program(attempt, details["start"]), chain(ops, details["start"]))


DOMAIN = composed.Domain(
  phrases={name: phrases for name, (_, _, phrases) in OPS.items()},
  types={name: {"number": "number"} for name in OPS},
  compositions=compositions,
  draw=draw,
  statement=statement,
  answer=lambda ops, details: (
    program(ops, details["start"]),
    {"numbers": chain(ops, details["start"])},
  ),
  complain=_complain,
  solves=lambda response, ops, kind, details: boxed(response) == chain(ops, details["start"])[-1],
)


def boxed(response: str) -> int | None:
  """The last boxed number."""
  found = _BOX.findall(response)
  return int(found[-1]) if found else None


class Arithmetic:
  """Judges by executing the steps; in process, since nothing foreign runs."""

  def __init__(self, *, level: str = "default", words_seed: int = 0):
    self.problems = composed.Problems(DOMAIN, level, words_seed)

  def task(self, split: str, index: int) -> Task:
    return self.problems.task(split, index)

  def prompt(self, task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.prompt}]

  def judge(self, task: Task, response: str) -> Feedback:
    """1 for the right number in the last box, however it was found."""
    numbers = task.data["numbers"]
    if boxed(response) == numbers[-1]:
      return Feedback(1.0, "")
    return Feedback(0.0, mistake(response, numbers) or "Wrong answer", Status.SCORED)
