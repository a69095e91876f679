"""What the environments over fixed data sets share: reading a row's fields, and the part of a response that counts.

An environment over a fixed data set has, beside `prompt` and `judge`,

  task_from_row(row, split) -> Task

`row` is one row as it stands in a file or on the hub; `idx` is always there (the row's number where the set has none of its own).
A row that cannot be used is a ValueError that names the field; whoever reads the file adds where the row stands.
"""


def field(row: dict, name: str, kind=str):
  """row[name], of the given type (a text must not be empty); ValueError that names the field."""
  if row.get(name) is None:
    raise ValueError(f"field {name!r} is missing; the row has {sorted(row)}")
  value = row[name]
  if not isinstance(value, kind) or isinstance(value, bool):
    raise ValueError(f"field {name!r} is of type {type(value).__name__}: {str(value)[:100]!r}")
  if isinstance(value, str) and not value.strip():
    raise ValueError(f"field {name!r} is empty")
  return value


def task_id(row: dict, split: str, default: str) -> str:
  return f"{row.get('dataset') or default}/{split}/{row['idx']}"


def messages(task) -> list[dict[str, str]]:
  """System message, if the task has one, and the question."""
  return [{"role": "system", "content": task.system}] * (task.system is not None) + [
    {"role": "user", "content": task.prompt}
  ]


def final_text(response: str) -> tuple[str, str]:
  """-> the response after its thinking block, and what is wrong with it ("" if nothing)."""
  text = response.rpartition("</think>")[2]
  if "<think>" in text:
    return "", "The response ends inside its thinking block."
  if not text.strip():
    return "", "The response is empty."
  return text, ""
