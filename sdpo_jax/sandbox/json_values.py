"""Reads JSON that holds integers longer than Python would read.

Python refuses to read or write an integer of more than 4300 decimal digits, since that takes time
quadratic in their number. A jail allows 50,000, as LiveCodeBench's grader does; the host compares
such integers digit by digit.
"""

import dataclasses
import json
import re

MAX_INT_DIGITS = 4300  # of an integer that becomes an int
MAX_DIGITS = 50_000  # that a jail reads and writes, as jail.py has it


@dataclasses.dataclass(frozen=True)
class Digits:
  """Holds an integer that is too long to be an int; two of them are equal digit by digit."""

  text: str

  def __repr__(self):
    return self.text


def parse_json(text: str):
  """Parses JSON; an integer of more than `MAX_INT_DIGITS` becomes a `Digits`.

  Raises ValueError, also for an integer that no jail could read or write.
  """
  return json.loads(text, parse_int=_integer)


def parse_record(text: bytes) -> dict:
  """Parses what a jail, or a program in its name, wrote; {} if it is no JSON object."""
  try:
    record = parse_json(text.decode("utf-8")) if text else {}
  except (ValueError, RecursionError):
    return {}
  return record if isinstance(record, dict) else {}


def write_json(value) -> str:
  """Writes what `parse_json` returned, as text to be read."""
  text = json.dumps(value, default=lambda digits: f"\0{digits.text}\0")
  return re.sub(r'"\\u0000(-?\d+)\\u0000"', r"\1", text)


def _integer(text: str) -> int | Digits:
  if len(text.lstrip("-")) > MAX_DIGITS:
    raise ValueError(f"an integer has more than {MAX_DIGITS} digits")
  return int(text) if len(text) <= MAX_INT_DIGITS else Digits(text)
