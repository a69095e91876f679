"""Compares what a program answered with what its test expects, on the host.

The answer is untrusted. It is compared without calling into it, its size is bounded before it costs
time, and JSON values are compared without recursion, for their depth is the program's choice.

Rules, by the test's mode:

  standard input  LiveCodeBench's: strip the text, split at newlines, strip each line; two lines are
                  equal as text or as lists of decimal numbers. No tolerance.
  function        JSON values: numbers by value (1.0 == 1), `true` is not 1, tuples count as lists.
  expression      Python's `==` on literals, or the test's `compare`.

A test may state another rule for the first two:

  tokens  the same words in the same order, however they are spaced; for standard output
  float   words or values as above, but two numbers are equal within the tolerance: they differ by
          at most `abs_tol`, or by `rel_tol` times the larger one

Several right answers to one test take a check: see check_source.py.
"""

import ast
import decimal
import math

from sdpo_jax.sandbox.json_values import parse_json
from sdpo_jax.sandbox.verdict import TestCase

_MAX_NUMBER_CHARS = 1000  # by which a number may be longer than the expected one


def same_output(output: str, test: TestCase) -> bool:
  """Tells whether a standard output is what the test expects, by the rule that it states."""
  if test.compare == "tokens":
    return output.split() == test.output.split()
  if test.compare == "float":
    words, expected = output.split(), test.output.split()
    return len(words) == len(expected) and all(
      word == wanted or _close_words(word, wanted, test)
      for word, wanted in zip(words, expected, strict=True)
    )
  return _same_lines(output, test.output)


def _close_words(word: str, wanted: str, test: TestCase) -> bool:
  """Tells whether two words are numbers within the test's tolerance."""
  # Python reads an underscore between digits, which is no way to print a number
  if "_" in word or len(word) > len(wanted) + _MAX_NUMBER_CHARS:
    return False
  try:
    return _close(float(word), float(wanted), test)
  except ValueError:
    return False


def _close(number: float, wanted: float, test: TestCase) -> bool:
  try:
    return math.isclose(number, wanted, rel_tol=test.rel_tol, abs_tol=test.abs_tol)
  except OverflowError:  # an integer beyond every float
    return number == wanted


def _same_lines(output: str, expected: str) -> bool:
  """Tells whether a standard output is the expected one, by LiveCodeBench's rule."""
  output_lines = [line.strip() for line in output.strip().split("\n")]
  expected_lines = [line.strip() for line in expected.strip().split("\n")]
  return len(output_lines) == len(expected_lines) and all(
    line == wanted or _same_decimals(line, wanted)
    for line, wanted in zip(output_lines, expected_lines, strict=True)
  )


def _same_decimals(line: str, expected: str) -> bool:
  """Tells whether two lines hold the same decimal numbers."""
  if (
    len(line) > 10 * len(expected) + _MAX_NUMBER_CHARS
  ):  # a number of a million digits only costs time
    return False
  words, expected_words = line.split(), expected.split()
  if len(words) != len(expected_words):
    return False
  try:
    return all(
      decimal.Decimal(word) == decimal.Decimal(wanted)
      for word, wanted in zip(words, expected_words, strict=True)
    )
  except decimal.InvalidOperation:  # not a number, or a signalling NaN
    return False


def same_answer(value, test: TestCase) -> bool:
  """Tells whether a function's value is what the test expects, by the rule that it states."""
  expected = parse_json(test.output)
  return same_value(value, expected, test if test.compare == "float" else None)


def same_value(value, expected, close: TestCase | None = None) -> bool:
  """Tells whether two JSON values are equal: numbers by value, booleans apart from numbers.

  `close` has the tolerance within which two numbers count as equal; None: there is none.
  """
  waiting = [(value, expected)]
  while waiting:
    a, b = waiting.pop()
    if isinstance(a, bool) or isinstance(b, bool):
      if a is not b:
        return False
    elif isinstance(a, list) and isinstance(b, list):
      if len(a) != len(b):
        return False
      waiting.extend(zip(a, b, strict=True))
    elif isinstance(a, dict) and isinstance(b, dict):
      if a.keys() != b.keys():
        return False
      waiting.extend((a[key], b[key]) for key in a)
    elif close and isinstance(a, (int, float)) and isinstance(b, (int, float)):
      if not _close(a, b, close):
        return False
    elif isinstance(a, (list, dict)) or isinstance(b, (list, dict)) or a != b:
      return False
  return True


def same_literal(tagged, test: TestCase) -> bool:
  """Tells whether an expression's value, as the jail tagged it, is what the test expects.

  Any exception means that the program wrote something into the result that is no such value.
  """
  expected = ast.literal_eval(test.output.strip())
  # Size first: a set of many numbers with one hash takes the host minutes to build.
  if _size(tagged) > 10 * _size(_as_json(expected)) + 100:
    return False
  value = untagged(tagged)
  if test.compare == "isclose":
    return type(value) in (int, float) and _close(value, expected, test)
  if test.compare == "set":
    return set(value) == set(expected)
  if test.compare == "in":
    return value in expected
  return value == expected


def _size(value) -> int:
  """Counts the lists, objects and scalars in a JSON value."""
  count = 0
  waiting = [value]
  while waiting:
    inner = waiting.pop()
    count += 1
    if isinstance(inner, list):
      waiting.extend(inner)
    elif isinstance(inner, dict):
      waiting.extend(inner.values())
  return count


def _as_json(literal):
  """Returns the literal with every container as a list, which is for its size alone."""
  if isinstance(literal, dict):
    return [[_as_json(key), _as_json(value)] for key, value in literal.items()]
  if isinstance(literal, (list, tuple, set, frozenset)):
    return [_as_json(item) for item in literal]
  return literal


def untagged(tagged):
  """Returns the value that the jail tagged. ValueError, TypeError for what it would not write.

  Scalars are themselves; containers and what JSON has no word for are {tag: items}.
  """
  if isinstance(tagged, list):
    raise ValueError("untagged list")
  if not isinstance(tagged, dict):
    return tagged
  ((tag, items),) = tagged.items()
  match tag:
    case "list":
      return [untagged(item) for item in items]
    case "tuple":
      return tuple(untagged(item) for item in items)
    case "set":
      return {untagged(item) for item in items}
    case "frozenset":
      return frozenset(untagged(item) for item in items)
    case "dict":
      return {untagged(key): untagged(value) for key, value in items}
    case "bytes":
      return bytes.fromhex(items)
    case "complex":
      return complex(*items)
  raise ValueError(f"unknown tag {tag!r}")
