"""Reads JSON files that may be missing, damaged, or still being written."""

import json
import math
import pathlib

import numpy as np


def json_file(path: pathlib.Path) -> dict:
  """Returns the JSON object of a file; {} where there is none."""
  try:
    value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
  except (OSError, ValueError, RecursionError):
    return {}
  return mapping(value)


def json_lines(path: pathlib.Path) -> tuple[list[dict], int]:
  """Returns the file's JSON objects, and how many lines hold none.

  The last line of a live run may be incomplete.
  """
  if not path.exists():
    return [], 0
  return objects(raw_lines(path))


def raw_lines(path: pathlib.Path) -> list[bytes]:
  """Returns the lines of a file that are not blank, unread."""
  return [line for line in path.read_bytes().split(b"\n") if line.strip()]


def objects(lines: list[bytes]) -> tuple[list[dict], int]:
  """Returns the JSON objects of lines, and how many lines hold none."""
  found = [_object(line) for line in lines]
  read = [value for value in found if value is not None]
  return read, len(found) - len(read)


def _object(line: bytes) -> dict | None:
  try:
    value = json.loads(line.decode("utf-8", errors="replace"))
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) else None


def spread(items: list, count: int) -> list:
  """Returns at most `count` items at even distances, the first and the last among them."""
  if not items:
    return []
  return [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, count)})]


def is_number(value) -> bool:
  """Tells whether a value is a number that can be drawn: finite, and no truth value."""
  try:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
  except OverflowError:  # an integer beyond any float
    return False


def mapping(value) -> dict:
  """Returns the value if it is a dictionary, else an empty one."""
  return value if isinstance(value, dict) else {}


def sequence(value) -> list:
  """Returns the value if it is a list, else an empty one."""
  return value if isinstance(value, list) else []
