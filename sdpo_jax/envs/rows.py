"""Reads a row's fields and a response's final text, for the environments over fixed data sets.

Such an environment has, beside `prompt` and `judge`,

  task_from_row(row, split) -> Task

`row` is one row as it stands in a file or on the hub. It always has `idx`: the row's number
where the set has none of its own. A row that cannot be used is a ValueError that names the
field; whoever reads the file adds where the row stands.
"""


def field(row: dict, name: str, kind=str):
  """Returns row[name] if it is of the given type, or of one of the types; no text is empty.

  ValueError that names the field.
  """
  if row.get(name) is None:
    raise ValueError(f"field {name!r} is missing; the row has {sorted(row)}")
  value = row[name]
  # Python's booleans are integers, but no number of a data set is one.
  if not isinstance(value, kind) or isinstance(value, bool):
    raise ValueError(f"field {name!r} is of type {type(value).__name__}: {str(value)[:100]!r}")
  if isinstance(value, str) and not value.strip():
    raise ValueError(f"field {name!r} is empty")
  return value


def task_id(row: dict, split: str, default: str) -> str:
  """Returns the id of a row's task; `default` stands for the data set if the row names none."""
  return f"{row.get('dataset') or default}/{split}/{row['idx']}"


def messages(task) -> list[dict[str, str]]:
  """Returns the system message, if the task has one, and the question."""
  question = {"role": "user", "content": task.prompt}
  if task.system is None:
    return [question]
  return [{"role": "system", "content": task.system}, question]


def final_text(response: str) -> tuple[str, str]:
  """Returns the text after the thinking block and what is wrong; one of the two is ""."""
  text = response.rpartition("</think>")[2]
  if "<think>" in text:
    return "", "The response ends inside its thinking block."
  if not text.strip():
    return "", "The response is empty."
  return text, ""
