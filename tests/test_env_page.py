"""The page of environments: complete, true to setup.py and configurations, and in the README."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from sdpo_jax import config
from sdpo_jax.envs import base, page

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_what_the_command_prints():
  assert page.own() in README and page.adapters() in README, (
    "README.md has other environments: put the tables of python -m sdpo_jax.envs there"
  )


def test_the_command_prints_the_page_without_jax():
  code = "import runpy, sys; runpy.run_module('sdpo_jax.envs', run_name='__main__')"
  done = subprocess.run(
    [sys.executable, "-c", f"{code}; assert 'jax' not in sys.modules"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == page.page()


def test_every_environment_has_a_line():
  assert page.ABOUT.keys() == base.ENVS.keys()
  files = {path.stem for path in (ROOT / "sdpo_jax/envs/adapters").glob("*.py")}
  helpers = {"__init__", "foreign", "tool_calls"}
  assert {name.partition(":")[0] for name in page.ADAPTERS} == files - helpers
  for name in page.ADAPTERS:
    assert base.find_env(f"{page.PACKAGE}.{name}")


def test_extras_are_those_of_setup():
  tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
  (extras,) = [
    {key.value for key in node.value.keys}
    for node in ast.walk(tree)
    if isinstance(node, ast.keyword) and node.arg == "extras_require"
  ]
  named = {x.extra for x in [*page.ABOUT.values(), *page.ADAPTERS.values()]} - {""}
  assert named <= extras
  # and those that the README names anywhere
  assert set(re.findall(r'"\.\[(\w+)\]"', README)) <= extras


@pytest.mark.parametrize("name", page.ABOUT)
def test_an_environment_is_shown_by_the_file_that_its_line_names(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  shown_by = page.ABOUT[name].shown_by
  if shown_by.startswith("configs/eval/"):
    argument = ":judge=a-model" if name == "pairwise" else ""
    found = config.call_file("suites", shown_by + argument, "get_suites").values()
    assert name in {suite["env"]["name"] for suite in found}
  else:
    shown = config.load(shown_by).env.name
    assert shown == name.removesuffix("_rows")
