"""Fingerprints the rows of a run, so that a resumed run can tell whether its data changed.

There are two digests, since either may change for a reason that is no change of the data. That of
the rows, as the files hold them, stays when another version of an environment reads them otherwise.
That of the tasks stays when the files gain a column that nothing reads.
"""

import dataclasses
import hashlib
import json

from sdpo_jax.records import Task


class RowDigest:
  """Counts and digests the rows of one source, and the tasks that they became, in their order."""

  def __init__(self):
    self.rows = 0
    self._rows, self._tasks = hashlib.sha256(), hashlib.sha256()

  def add_row(self, row) -> None:
    """Adds a row as it was read; None: one that is not JSON."""
    self.rows += 1
    self._rows.update(_line(row))

  def add_task(self, task: Task) -> None:
    """Adds a task with all that decides its question and its reward."""
    self._tasks.update(_line([task.id, task.system, task.prompt, task.solution]))
    self._tasks.update(_line(task.data))

  @property
  def rows_sha256(self) -> str:
    return self._rows.hexdigest()

  @property
  def tasks_sha256(self) -> str:
    return self._tasks.hexdigest()


def fingerprint(digests: list[RowDigest]) -> dict:
  """Returns the number of rows and both digests of a split from those of its sources, for JSON."""
  return {
    "rows": sum(digest.rows for digest in digests),
    "rows_sha256": _joined([digest.rows_sha256 for digest in digests]),
    "tasks_sha256": _joined([digest.tasks_sha256 for digest in digests]),
  }


def _joined(digests: list[str]) -> str:
  return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _line(value) -> bytes:
  """Returns the value as one line of text, the same in every process that reads it."""
  try:
    text = json.dumps(value, default=_plain)
  except (TypeError, ValueError):  # keys that JSON cannot have
    text = json.dumps(_text(value))
  except RecursionError:
    text = "too deep"
  return text.encode() + b"\n"


def _plain(value):
  """Returns a value of an environment's own that JSON lacks as one that it has."""
  if isinstance(value, (set, frozenset)):  # their order differs by process
    return sorted(map(_text, value))
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  if hasattr(value, "tolist"):  # an array, of which repr leaves out the middle
    return value.tolist()
  return _text(value)


def _text(value) -> str:
  """Returns what repr says, unless it names an address in memory, which differs by process."""
  text = repr(value)
  return type(value).__name__ if " at 0x" in text else text
