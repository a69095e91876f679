"""Whether what a program returned is what a test expects."""

import ast
import decimal
import math

from sdpo_jax.sandbox.verdict import TestCase

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
