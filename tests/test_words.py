"""Words match code: the commands in the README and in docstrings name modules, files, arguments and settings that exist."""

import importlib.util
import pathlib
import re
import shlex

import pytest

from sdpo_jax import config, experiment

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [ROOT / "README.md", *sorted((ROOT / "configs").rglob("*.py")), *sorted((ROOT / "sdpo_jax").rglob("*.py"))]
COMMAND = re.compile(r"python -m (sdpo_jax\.\w+)((?:'[^'\n]*'|[^\n`|&)\"'])*)")   # what is quoted may hold anything


def commands():
  for path in SOURCES:
    for module, rest in COMMAND.findall(path.read_text(encoding="utf-8").replace("\\\n", " ")):
      if rest.strip() and not any(mark in rest for mark in ("FILE", "...", "[", "NAME", "{", "WORKDIR")):   # a synopsis, not a command
        yield f"{path.relative_to(ROOT)}: {module}{rest.rstrip()}", module, rest


ALL = {label: (module, rest) for label, module, rest in commands()}


def load(path):
  spec = importlib.util.spec_from_file_location("config_file", ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_there_are_commands_to_check():
  assert len(ALL) > 8 and any("README" in label for label in ALL)


@pytest.mark.parametrize("label", ALL)
def test_commands_parse(label):
  module, rest = ALL[label]
  assert importlib.util.find_spec(module), module
  for word in shlex.split(rest, comments=True):
    if not word.startswith("--config"):
      continue
    name, _, value = word.removeprefix("--").partition("=")
    if name == "config":
      path, _, argument = value.partition(":")
      loaded = load(path)
      if hasattr(loaded, "get_grid"):
        assert loaded.get_grid()
      else:
        c = loaded.get_config(argument) if argument else loaded.get_config()
        if module == "sdpo_jax.main":
          config.validate(c)
    else:   # an override of a setting
      node = c
      for key in name.split(".")[1:]:
        assert key in node, f"{name} is not a setting"
        node = node[key]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "experiments").glob("*.py")), ids=lambda p: p.name)
def test_every_run_of_a_grid_is_a_valid_configuration(path):
  for arguments in experiment.load_grid(str(path)).values():
    name, _, argument = arguments[0].removeprefix("--config=").partition(":")
    config.validate(load(name).get_config(argument))


def test_the_first_screen_has_exactly_two_commands():
  first_screen = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
  blocks = re.findall(r"```bash\n(.*?)```", first_screen, re.DOTALL)
  assert [b.strip() for b in blocks] == ["pip install -e . && python -m sdpo_jax.main --config=configs/tinycode.py", 'pip install -e ".[test]" && pytest']


def test_the_ci_script_runs_the_readmes_test_command():
  assert 'pip install -q -e ".[test]" && pytest' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
