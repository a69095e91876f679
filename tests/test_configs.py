"""Every configuration file, for real and tiny.

Its `:local` form goes through the command line's own main; its full form has the paper's settings.
"""

import importlib.util
import json
import pathlib
import re

import pytest

from sdpo_jax import config, main, metrics
from sdpo_jax.data.tasks import with_rows
from sdpo_jax.envs.base import make_env
from sdpo_jax.objectives import build, methods

ROOT = pathlib.Path(__file__).parent.parent
# Files for training, as their docstring's smoke command says; others belong to another mode or
# entry point, and to its tests.
FILES = sorted(
  p.stem
  for p in (ROOT / "configs").glob("*.py")
  if re.search(
    rf"^Smoke: +python -m sdpo_jax.main --config=configs/{p.stem}.py:local(?!.*--mode)",
    p.read_text(encoding="utf-8"),
    re.MULTILINE,
  )
)
PAPER = ("science_mcq", "tool_use", "math_qa", "coding")


def load(name, argument=""):
  spec = importlib.util.spec_from_file_location("config_file", ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(argument)
  config.validate(c)
  return c


def test_files_are_found():
  assert set(FILES) >= {*PAPER, "tinycode"}


@pytest.mark.parametrize("name", FILES)
def test_local_runs_through_main(name, tmp_path):
  assert (
    main.main(["main", f"--config={ROOT}/configs/{name}.py:local", f"--workdir={tmp_path}"]) == 0
  )
  lines = metrics.read(tmp_path)
  assert [line["step"] for line in lines] == [0, 1, 2]
  assert all("train/loss" in line and "train/reward" in line for line in lines[1:]) and any(
    k.endswith("/avg@k") for k in lines[2]
  )
  rows = [
    json.loads(line)
    for line in (tmp_path / "rollouts" / "step_000002.jsonl").read_text().splitlines()
  ]
  assert rows and all(r["status"] != "env_failed" for r in rows)
  if name in PAPER:
    assert lines[1]["data/skipped_rows"] == 0 and {r["task_id"].split("/")[0] for r in rows} <= {
      "examples",
      "math",
    }


def test_an_environment_of_ones_own_is_a_file_and_a_setting(tmp_path):
  """tests/my_env.py goes through the command line's own main.

  Its questions are asked, and its feedback is what the teacher reads.
  """
  assert (
    main.main(
      [
        "main",
        f"--config={ROOT}/configs/math_qa.py:local",
        "--config.env.name=tests.my_env:ReverseWord",
        "--config.data.sources=()",
        "--config.method.teacher_context.feedback=without_solution",
        f"--workdir={tmp_path}",
      ]
    )
    == 0
  )
  last = metrics.read(tmp_path)[-1]
  assert (
    last["data/teacher_share"] == 1.0 and last["train/loss"] > 0 and "data/skipped_rows" not in last
  )
  for row in (
    json.loads(line)
    for line in (tmp_path / "rollouts" / "step_000002.jsonl").read_text().splitlines()
  ):
    assert row["prompt"].endswith("backwards.") and row["feedback"] in row["teacher_context"]
    assert (
      row["feedback"].startswith("Wrong letters at places")
      or row["feedback"] == "The word is too long."
    )


def test_a_question_that_is_too_long_stops_the_run_before_anything_compiles(tmp_path, capsys):
  assert (
    main.main(
      [
        "main",
        f"--config={ROOT}/configs/math_qa.py:local",
        "--config.data.max_prompt_tokens=100",
        f"--workdir={tmp_path}",
      ]
    )
    == 2
  )
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert "math_qa.train.jsonl, line 1: the question takes" in error
  assert "config.data.max_prompt_tokens=100 (config.data.on_bad_row='skip'" in error
  assert not metrics.read(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_docstrings_say_how_to_run_and_what_came_of_it(name):
  docstring = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
  assert all(f"\n{word}:" in docstring for word in ("Run", "Smoke", "Cost", "Result"))


@pytest.mark.parametrize(
  "name, alpha, top_k, rate, lr, warmup, updates, samples",
  [
    ("science_mcq", 0.5, 100, 0.05, 1e-5, 10, 1, 16),
    ("tool_use", 0.5, 100, 0.05, 1e-5, 10, 1, 16),
    ("math_qa", 0.5, 100, 0.05, 1e-5, 10, 1, 16),
    ("coding", 1.0, 20, 0.01, 1e-6, 0, 32, 4),
  ],
)
def test_settings_are_the_papers(name, alpha, top_k, rate, lr, warmup, updates, samples):
  c = load(name)
  assert (
    c.method.token_signal.alpha,
    c.method.token_signal.top_k,
    c.method.teacher_weights.rate,
  ) == (alpha, top_k, rate)
  assert (
    c.optimizer.lr,
    c.optimizer.warmup_steps,
    c.optimizer.weight_decay,
    c.optimizer.clip_norm,
  ) == (lr, warmup, 0.01, 1.0)
  assert (
    c.rollout.questions,
    c.rollout.group,
    c.rollout.temperature,
    c.rollout.max_new_tokens,
  ) == (32, 8, 1.0, 8192)
  assert (c.train.updates_per_batch, c.data.max_prompt_tokens, c.model.thinking) == (
    updates,
    2048,
    False,
  )
  assert (c.eval.temperature, c.eval.top_p, c.eval.samples) == (0.6, 0.95, samples)
  assert c.method.teacher_context.feedback == ("without_solution" if name == "coding" else "never")
  assert load(name, "top_k=0").method.token_signal.top_k is None
  grpo = load(name, "method=grpo,seed=3,model=olmo3-7b-instruct")
  assert (grpo.optimizer.lr, grpo.train.updates_per_batch, grpo.seed, grpo.model.path) == (
    1e-6,
    4,
    3,
    "olmo3-7b-instruct",
  )


SINGLE = [name for name, row in methods.METHODS.items() if not build.reads_turns(row)]


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("name", FILES)
def test_every_method_is_a_valid_setting_of_every_file(name, method):
  if (name, method) == ("agentic", "counterfactual"):
    with pytest.raises(ValueError, match="asks for single responses"):
      load(name, f"method={method},local")
  elif (
    "method"
    in (ROOT / "configs" / f"{name}.py")
    .read_text(encoding="utf-8")
    .partition("parse_arg(")[2]
    .partition(")\n")[0]
  ):
    assert load(name, f"method={method},local").method.name == method


def test_coding_chooses_its_questions():
  assert load("coding").env.first_date == "2025-02-01" and load("coding").data.on_bad_row == "skip"
  assert load("coding", "tasks=mbpp").eval.final_splits == ("test", "humaneval")
  assert load("coding", "data=hub:me/own").data.sources == ("hub:me/own",)
  with pytest.raises(ValueError, match="tasks='apps' is unknown; choose from"):
    load("coding", "tasks=apps")


def test_discovery_reads_the_papers_questions():
  hard, very_hard = (
    load("discover", "task=livecodebench"),
    load("discover", "task=livecodebench,subset=very_hard"),
  )
  assert hard.discover.indices == (
    1,
    3,
    10,
    43,
    46,
    59,
    69,
    74,
    86,
    91,
    92,
    95,
    100,
    103,
    111,
    120,
    125,
    127,
    129,
  )
  assert (
    very_hard.discover.indices == (3, 10, 46, 74, 91, 92, 95, 103, 125)
    and hard.discover.attempts == 2750
    and hard.discover.split == "test"
  )
  local = load("discover", "task=livecodebench,local")
  assert (
    local.discover.indices == ()
    and local.model.path == "tiny"
    and local.data.sources == load("coding", "local").data.sources
  )
  assert hard.data.sources == load("coding").data.sources and hard.env.first_date == "2025-02-01"
  for c in (hard, load("discover")):
    assert (
      c.method.token_signal.alpha,
      c.method.token_signal.top_k,
      c.method.token_signal.advantage_clip,
    ) == (1.0, 20, 5.0)
    assert (
      c.method.teacher_weights.rate,
      c.discover.rollouts,
      c.discover.seeds,
      c.rollout.temperature,
      c.optimizer.warmup_steps,
    ) == (0.01, 16, 5, 1.0, 0)
    assert not c.method.teacher_context.use_solution
  with pytest.raises(ValueError, match="subset='easy' is unknown; choose from"):
    load("discover", "task=livecodebench,subset=easy")


@pytest.mark.parametrize("name", PAPER)
def test_the_shipped_rows_are_right(name):
  """The environment accepts every row that comes with the package.

  The row's own answer scores 1, a wrong one 0.
  """
  from sdpo_jax.sandbox import Sandbox

  c = load(name, "local")
  with Sandbox(workers=1) as sandbox:
    env = with_rows(make_env(sandbox=sandbox, **c.env), c.data.sources, splits=("train", "test"))
    try:
      assert (env.size("train"), env.size("test"), env.skipped) == (4, 2, 0)
      for split in ("train", "test"):
        for task in (env.task(split, i) for i in range(env.size(split))):
          assert env.judge(task, task.solution).reward == 1.0, task.id
          wrong = env.judge(task, "I do not know.")
          assert wrong.reward == 0.0 and wrong.text, task.id
    finally:
      env.close()
