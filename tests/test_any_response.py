"""Any response ends in a feedback, never in an exception: environments that run or count steps.

Those over data sets that run nothing have such a test in their own files.
"""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from sdpo_jax.envs import arithmetic, composed, tinycode
from sdpo_jax.envs.arithmetic import Arithmetic
from sdpo_jax.envs.coding import Coding
from sdpo_jax.envs.tinycode import TinyCode
from sdpo_jax.records import Status
from sdpo_jax.sandbox import Sandbox
from sdpo_jax.text import clean

FAST, MANY = 60, 10_000
TAGS = ["<think>", "</think>", "[THINK]", "<|channel|>", "```python\n", "```", "~~~", "\n", "\t"]
ODD = [
  "\0",
  "\ud800",
  "\u2028",
  "\ufeff",
  "é",
  "²",
  "٣",
  "−",
  "9" * 5000,
  "[" * 300,
  "\\",
  "#",
  "'",
]
CODE = ["def f(x):", "return", "x", "lambda: f", "raise SystemExit", "print(x)", "1/0", "yield x"]
CODE += [
  "import os",
  "\n    ",
  "\n  ",
  "float('nan')",
  "10**400",
  "{}",
  "[x, x]",
  "f(x)",
  "global f",
]
STEPS = ["7 * 2 = 14", "14 - 5 = 9", "3 // 0 = 1", " = ", "\\boxed{", "}", "-", "\\boxed{9}", "1e9"]
PROGRAMS = [
  "def f(x):\n    x = sorted(x)\n    x = x[::-1]\n    return x",
  "def f(x):\n  return x * 2",
  "n = int(input())\nprint(n * 2)",
]


def responses(known: list[str], pieces: list[str], is_fenced: bool = False):
  """Draws random texts, pieces in a row, and known responses with random changes."""
  piece = st.sampled_from(pieces + TAGS + ODD)
  mixed = st.lists(piece | st.text(max_size=6), max_size=15).map("".join)
  changed = st.builds(
    lambda text, at, cut, new: text[: at % len(text)] + new + text[at % len(text) + cut :],
    st.sampled_from(known),
    st.integers(0, 200),
    st.integers(0, 4),
    piece | st.text(max_size=3),
  )
  drawn = st.one_of(st.text(), mixed, changed)
  # One in eight is a whole block of code: the others end before anything is run.
  fenced = st.tuples(st.integers(0, 7), changed).map(lambda pair: (pair[0] == 0, pair[1]))
  if not is_fenced:
    return drawn
  return st.tuples(drawn, fenced).map(
    lambda pair: f"```python\n{pair[1][1]}\n```" if pair[1][0] else pair[0]
  )


def judges(env, tasks, strategy, examples: int) -> None:
  """Asserts that every response ends in a judgement."""

  @settings(
    max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
  )
  @given(st.sampled_from(tasks), strategy)
  def check(task, response):
    feedback = env.judge(task, response)
    assert feedback.reward in (0.0, 1.0)
    assert feedback.status in (Status.SCORED, Status.TIMEOUT)
    assert feedback.reward == 0.0 or feedback.text == ""
    clean(feedback.text).encode()  # as a rollout keeps it

  check()


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox(workers=1) as pool:
    yield pool


EXAMPLES = pytest.mark.parametrize(
  "examples", [FAST, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)


@EXAMPLES
def test_arithmetic_judges_any_response(examples):
  env = Arithmetic(level="hard")
  tasks = [env.task(split, i) for split in composed.SPLITS for i in range(3)]
  known = [task.solution for task in tasks]
  judges(env, tasks, responses(known, STEPS), examples)


@EXAMPLES
def test_tinycode_judges_any_response(examples, sandbox):
  env = TinyCode(sandbox=sandbox)
  tasks = [env.task(split, i) for split in composed.SPLITS for i in range(3)]
  known = [task.solution for task in tasks] + PROGRAMS
  judges(env, tasks, responses(known, CODE), examples)


@EXAMPLES
def test_coding_judges_any_response(examples, sandbox):
  env = Coding(sandbox=sandbox, time_s=1.0)
  rows = [
    {"id": 1, "question": "Double.", "tests": [{"input": "4", "output": "8"}]},
    {"id": 2, "question": "Double.", "fn_name": "f", "tests": [{"input": "4", "output": "8"}]},
  ]
  tasks = [env.task_from_row({"idx": i} | row, "train") for i, row in enumerate(rows)]
  judges(env, tasks, responses(PROGRAMS, CODE, is_fenced=True), examples)


@EXAMPLES
@pytest.mark.parametrize("domain", [arithmetic.DOMAIN, tinycode.DOMAIN], ids=["steps", "code"])
def test_pre_training_judges_any_response(examples, domain):
  """`solves` measures the base models' accuracy; it runs nothing."""
  (*ops, kind), *_ = list(domain.compositions(2))
  details = {"start": 7, "name": "Ann", "thing": "coins"}
  known = [arithmetic.program(list(arithmetic.OPS)[:2], 7), PROGRAMS[0]]

  @settings(max_examples=examples, deadline=None, database=None)
  @given(responses(known, STEPS + CODE))
  def check(response):
    assert domain.solves(response, ops, kind, details) in (True, False)

  check()
