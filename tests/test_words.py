"""Words match code.

The commands in the README, in RESULTS.md and in docstrings name modules, files, arguments and
settings that exist. Axis suffixes of names use the letters that records.py lists.
"""

import ast
import importlib.util
import pathlib
import re
import shlex

import pytest

from sdpo_jax import config, experiment, main, records, tuning

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [
  ROOT / "README.md",
  ROOT / "RESULTS.md",
  ROOT / "launch" / "README.md",
  ROOT / "colabs" / "README.md",
  *sorted((ROOT / "configs").rglob("*.py")),
  *sorted((ROOT / "sdpo_jax").rglob("*.py")),
]
# what is quoted may hold anything
COMMAND = re.compile(r"python -m (sdpo_jax\.\w+)((?:'[^'\n]*'|[^\n`|&)\"'])*)")


def commands():
  for path in SOURCES:
    for module, rest in COMMAND.findall(path.read_text(encoding="utf-8").replace("\\\n", " ")):
      # a synopsis, not a command
      if rest.strip() and not any(
        mark in rest for mark in ("FILE", "...", "[", "NAME", "{", "WORKDIR")
      ):
        yield f"{path.relative_to(ROOT)}: {module}{rest.rstrip()}", module, rest


ALL = {label: (module, rest) for label, module, rest in commands()}


def test_there_are_commands_to_check():
  assert len(ALL) > 8 and any("README" in label for label in ALL)


@pytest.mark.parametrize("label", ALL)
def test_commands_parse(label, monkeypatch):
  monkeypatch.chdir(ROOT)
  module, rest = ALL[label]
  assert importlib.util.find_spec(module), module
  words = shlex.split(rest, comments=True)
  if module == "sdpo_jax.main":
    _, c = main.parse(["main", *words])
    config.validate(c)
  for word in words:
    if word.startswith("--config=") and module == "sdpo_jax.experiment":
      assert experiment.Experiment(word.removeprefix("--config="))
    elif word.startswith("--config="):
      assert config.load(word.removeprefix("--config="))


@pytest.mark.parametrize(
  "path", sorted((ROOT / "configs" / "experiments").glob("*.py")), ids=lambda p: p.name
)
def test_every_run_of_a_grid_is_a_valid_configuration(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  file = experiment.Experiment(str(path))
  choices = list(tuning.choices(file.tuning)) or [{}]
  grids = [tuning.runs(file.tuning), *map(file.grid, choices)]
  for arguments in {tuple(x): None for grid in grids for x in grid.values()}:
    _, c = main.parse(["main", *arguments])
    config.validate(c)


def test_the_first_screen_has_exactly_two_commands():
  first_screen = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
  blocks = re.findall(r"```bash\n(.*?)```", first_screen, re.DOTALL)
  assert [b.strip() for b in blocks] == [
    "pip install -e . && python -m sdpo_jax.main --config=configs/tinycode.py",
    'pip install -e ".[test]" && pytest',
  ]


def test_the_ci_script_runs_the_readmes_test_command():
  assert 'pip install -q -e ".[test]" && pytest' in (ROOT / ".ci" / "run").read_text(
    encoding="utf-8"
  )


# "_" and the axes' letters at the end of a name; a digit is the size of an axis
SUFFIX = re.compile(r"[a-z].*_([0-9]*[A-Z][A-Z0-9]*)$")


def alphabet() -> set[str]:
  """Returns the letters of the table in the docstring of records.py."""
  table = records.__doc__.partition("Axis letters")[2].partition("\nLog-probabilities")[0]
  return set(re.findall(r"\b[A-Z]\b", table))


def suffixes(path):
  """Yields (name, axes) of the names that a file binds or takes; constants have no suffix."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      name = node.name
    elif isinstance(node, ast.arg):
      name = node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      name = node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
      name = node.attr
    else:
      continue
    match = SUFFIX.search(name)
    if match:
      yield name, match[1]


def test_axis_suffixes_use_the_letters_that_records_lists():
  letters = alphabet()
  assert {"B", "R", "V", "X", "E", "H"} <= letters
  unlisted = {
    f"{path.relative_to(ROOT)}: {name}: {axis}"
    for path in sorted((ROOT / "sdpo_jax").rglob("*.py"))
    for name, axes in suffixes(path)
    for axis in axes
    if axis.isalpha() and axis not in letters
  }
  assert not unlisted, "list these letters in records.py:\n" + "\n".join(sorted(unlisted))
