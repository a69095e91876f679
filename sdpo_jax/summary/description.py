"""Reads what the file of an experiment states in its docstring."""

import ast
import pathlib
import re

from sdpo_jax.summary import markdown as md


def path_of(root: pathlib.Path, name: str) -> pathlib.Path | None:
  """Returns configs/experiments/NAME.py, else configs/NAME.py; None where neither is there."""
  places = [root / "configs" / "experiments" / f"{name}.py", root / "configs" / f"{name}.py"]
  return next((path for path in places if path.exists()), None)


def description(root: pathlib.Path, name: str) -> list[str]:
  """Returns title, command and cost of an experiment, as its section begins."""
  path = path_of(root, name)
  if path is None:
    return []
  title = " ".join(_docstring(path).partition("\n\n")[0].split())
  return [
    f"{title} (`{path.relative_to(root)}`)",
    f"```bash\n{field(root, name, 'Run')}\n```",
    f"Cost: {field(root, name, 'Cost')}",
  ]


def field(root: pathlib.Path, experiment: str, name: str) -> str:
  """Returns the docstring's "NAME: text", with its indented further lines; a dash for none."""
  path = path_of(root, experiment)
  if path is None:
    return md.NONE
  match = re.search(rf"^{name}:((?:.*\n?)(?:[ ]+.*\n?)*)", _docstring(path), re.MULTILINE)
  return " ".join(match[1].replace("\\\n", " ").split()) if match else md.NONE


def _docstring(path: pathlib.Path) -> str:
  return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
