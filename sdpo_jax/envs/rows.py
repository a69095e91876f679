"""Reads a row's fields and a response's final text, for the environments over fixed data sets.

Such an environment has, beside `prompt` and `judge`,

  task_from_row(row, split) -> Task

`row` is one row as it stands in a file or on the hub. It always has `idx`: the row's number
where the set has none of its own. A row that cannot be used is a ValueError that names the
field; whoever reads the file adds where the row stands.

A field that is null or NaN counts as missing: tables write one or the other where a row has
nothing. Likewise a whole number may come as a float, into which a column with gaps turns it.
"""

import math

from sdpo_jax import thought


def given(row: dict, name: str):
  """Returns row[name], or None if the field is missing, null or NaN."""
  value = row.get(name)
  return None if is_missing(value) else value


def is_missing(value) -> bool:
  """Tells whether a value stands for none: null or NaN."""
  return value is None or (isinstance(value, float) and math.isnan(value))


def field(row: dict, name: str, kind=str):
  """Returns row[name] if it is of the given type, or of one of the types; no text is empty.

  ValueError that names the field.
  """
  value = given(row, name)
  if value is None:
    raise ValueError(f"field {name!r} is missing; the row has {sorted(map(str, row))}")
  # Python's booleans are integers, but no number of a data set is one.
  if not isinstance(value, kind) or isinstance(value, bool):
    raise ValueError(f"field {name!r} is of type {type(value).__name__}: {str(value)[:100]!r}")
  if isinstance(value, str) and not value.strip():
    raise ValueError(f"field {name!r} is empty")
  return value


def optional_text(row: dict, name: str) -> str | None:
  """Returns a text that a row need not have: None if it is missing or blank.

  ValueError that names the field if it is no text.
  """
  value = given(row, name)
  if value is None or (isinstance(value, str) and not value.strip()):
    return None
  return field(row, name)


def whole_number(value) -> int | None:
  """Returns an integer, or a float without a fraction, as an integer; None for all else."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return None
  if isinstance(value, float) and not value.is_integer():  # Neither inf nor NaN is an integer.
    return None
  return int(value)


def task_id(row: dict, split: str, default: str) -> str:
  """Returns the id of a row's task; `default` stands for the data set if the row names none."""
  return f"{optional_text(row, 'dataset') or default}/{split}/{row['idx']}"


def row_name(row: dict, name: str):
  """Returns the row's own name or number in that field, or its `idx` where it has none.

  ValueError that names the field if it is neither text nor number.
  """
  value = given(row, name)
  if value is None or (isinstance(value, str) and not value.strip()):
    return row["idx"]
  number = whole_number(value)
  return field(row, name, (str, int, float)) if number is None else number


def groups(row: dict, *, kind: str = "", difficulty: str = "") -> dict:
  """Returns what a row says of its kind and its difficulty, for `Task.data`.

  The arguments name its fields. One that holds neither text nor number says nothing.
  """
  found = {"kind": given(row, kind), "difficulty": given(row, difficulty)}
  return {
    name: value
    for name, value in found.items()
    if (isinstance(value, str) and value.strip()) or whole_number(value) is not None
  }


def messages(task) -> list[dict[str, str]]:
  """Returns the system message, if the task has one, and the question."""
  question = {"role": "user", "content": task.prompt}
  if task.system is None:
    return [question]
  return [{"role": "system", "content": task.system}, question]


def final_text(response: str) -> tuple[str, str]:
  """Returns the text after the thinking block and what is wrong; one of the two is ""."""
  text, is_open = thought.split(response)
  if is_open:
    return "", "The response ends inside its thinking block."
  if not text.strip():
    return "", "The response is empty."
  return text, ""
