"""Symptoms: the README's section is the command's output, and its words are those of the code."""

import ast
import pathlib
import re

import pytest

from sdpo_jax import config, main, signs, symptoms

ROOT = pathlib.Path(__file__).parent.parent
ROWS = [row for rows in symptoms.SECTIONS.values() for row in rows]


def texts(tree: ast.AST):
  """Yields the texts of a file, ... in the place of what is put in while it runs."""
  for node in ast.walk(tree):
    if isinstance(node, ast.JoinedStr):
      yield "".join(x.value if isinstance(x, ast.Constant) else "..." for x in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield re.sub(r"%(?:r|s|d|g|\.\d+f)", "...", node.value)


@pytest.fixture(scope="module")
def printed() -> str:
  """Returns every text in the package, but those of the table itself."""
  files = [path for path in (ROOT / "sdpo_jax").rglob("*.py") if path.name != "symptoms.py"]
  return "\n".join(
    text for path in files for text in texts(ast.parse(path.read_text(encoding="utf-8")))
  )


def test_the_readme_has_what_the_command_prints():
  assert symptoms.page() in (ROOT / "README.md").read_text(encoding="utf-8"), (
    "README.md has another list of symptoms: put the output of python -m sdpo_jax.symptoms there"
  )


@pytest.mark.parametrize("text", [row.text for row in ROWS if row.text])
def test_what_is_quoted_stands_in_the_code(text, printed):
  assert text.removesuffix(": ...") in printed


def test_metrics_that_are_named_exist(printed):
  page = symptoms.page()
  named = set(
    re.findall(r"`((?:train|data|rollout|route|probe|time|perf|env|eval)/[\w@/]+)`", page)
  )
  assert {"train/reward", "time/judge_wait_s", "eval/SPLIT/gain_high"} <= named
  for name in named - {"train/warnings"}:
    group, _, last = name.rpartition("/")
    assert name in printed or group == "eval/SPLIT" and last in printed, name


def test_settings_that_are_named_can_be_set():
  files = {"config.rollout.overlap": "agentic"}  # a setting of episodes
  named = re.findall(r"`(config(?:\.\w+)+)(?:=(\w+))?`", symptoms.page())
  assert len(named) > 40
  for path, value in dict.fromkeys(named):
    file = f"--config={ROOT}/configs/{files.get(path, 'tinycode')}.py:method=sdpo"
    _, c = main.parse(["main", file])
    for key in path.split(".")[1:]:
      c = c[key]
    if value and not path.startswith("config.method."):  # test_monitors.py types those
      config.validate(main.parse(["main", file, f"--{path}={value}"])[1])


def test_two_rows_share_a_name_only_where_they_watch_the_same_thing():
  of_name: dict[str, set[str]] = {}
  for sign in signs.SIGNS:
    of_name.setdefault(sign.name, set()).add(sign.watched.split(",")[0])
  assert {name: len(watched) for name, watched in of_name.items() if len(watched) > 1} == {
    "teacher_share": 2  # a routed method's share is another metric
  }


def test_only_words_that_are_no_code_yet_are_marked():
  assert symptoms.marked("lower config.a.b=c, see --mode=plan and `--x y` in rollouts/ of it") == (
    "lower `config.a.b=c`, see `--mode=plan` and `--x y` in `rollouts/` of it"
  )
