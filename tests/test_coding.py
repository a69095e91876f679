"""Code tasks: extraction, rows of public sets, and MBPP's mutants against plain CPython."""

import ast
import base64
import concurrent.futures
import json
import math
import os
import pathlib
import pickle
import subprocess
import sys
import zlib

import pytest

from sdpo_jax.envs.coding import Coding, extract
from sdpo_jax.envs.coding_rows import (
  humaneval_task,
  livecodebench_task,
  mbpp_task,
  plain_task,
  tests_from_asserts,
)
from sdpo_jax.records import Status
from sdpo_jax.sandbox import Limits, Sandbox, TestCase

tests_from_asserts.__test__ = False
_DATA = os.environ.get("SDPO_JAX_DATA")
needs_data = pytest.mark.skipif(_DATA is None, reason="SDPO_JAX_DATA is unset: no MBPP rows")


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox(workers=2) as pool:
    yield pool


EXTRACT = {
  "one": ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
  "last_wins": ("```python\nx = 1\n```\nBetter:\n```python\nx = 2\n```", "x = 2\n"),
  "label_before_none": ("```python\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
  "other_labels_do_not_count": ("```py\nx = 1\n```\n```text\n5\n```\n```json\n{}\n```", "x = 1\n"),
  "unlabelled": ("```\nx = 1\n```", "x = 1\n"),
  "capital_label": ("```Python3\nx = 1\n```", "x = 1\n"),
  "tildes": ("~~~python\ns = '```'\n```\n~~~", "s = '```'\n```\n"),
  "longer_fence": ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''\n"),
  "docstring_with_fences": (
    '```python\ndef f():\n  """\n  ```\n  f()\n  ```\n  """\n```',
    'def f():\n  """\n  ```\n  f()\n  ```\n  """\n',
  ),
  "inside_markdown": ("```markdown\n# Answer\n```python\nx = 1\n```\n```", "x = 1\n"),
  "indented_in_a_list": (
    "1. So:\n   ```python\n   x = 1\n   if x:\n     x = 2\n   ```",
    "x = 1\nif x:\n  x = 2\n",
  ),
  "inline_backticks": ("Use ```x``` and\n```python\nx = 1\n```", "x = 1\n"),
  "windows_lines": ("```python\r\nx = 1\r\n```\r\n", "x = 1\r\n"),
  "thought_first": ("<think>\n```python\nx = 1\n```\n</think>\n```python\nx = 2\n```", "x = 2\n"),
  "empty_block": ("```python\n```", "\n"),
}


@pytest.mark.parametrize("name", EXTRACT)
def test_extract(name):
  response, program = EXTRACT[name]
  assert extract(response) == (program, "")


@pytest.mark.parametrize(
  "response, says",
  [
    ("The answer is 5.", "no Python code block"),
    ("", "response is empty"),
    ("```cpp\nint x;\n```", "no Python code block"),
    ("`x = 1`", "no Python code block"),
    ("<think>\n```python\nx = 1\n```\n</think> So 5.", "no Python code block"),
    ("```python\nx = 1", "inside its code block"),
    ("```python\nx = 1\n```\n```python\nx =", "inside its code block"),
    ("```", "inside its code block"),
    ("<think>\n```python\nx = 1\n```\n", "inside its thinking block"),
  ],
)
def test_wrong_form_is_told(sandbox, response, says):
  program, fault = extract(response)
  assert program == "" and says in fault
  task = plain_task(
    {"id": 1, "question": "Double.", "fn_name": "twice", "tests": [{"input": "1", "output": "2"}]},
    "train",
  )
  feedback = Coding(sandbox=sandbox).judge(task, response)
  assert (feedback.reward, feedback.status) == (0.0, Status.SCORED)
  assert says in feedback.text and "`twice`" in feedback.text and "```python" in feedback.text


def test_judge_and_prompt(sandbox):
  env = Coding(sandbox=sandbox, time_s=0.5)
  task = plain_task(
    {
      "id": "a",
      "question": "Double the number.",
      "tests": [{"input": "3", "output": "6"}, {"input": "4", "output": "8", "hidden": True}],
    },
    "test",
  )
  messages = env.prompt(task)
  assert (
    messages[-1]["role"] == "user"
    and "Double the number." in messages[-1]["content"]
    and "standard input" in messages[-1]["content"]
  )

  def judge(code):
    return env.judge(task, f"```python\n{code}\n```")

  right = judge("print(2 * int(input()))")
  assert (right.reward, right.text, right.status) == (1.0, "", Status.SCORED)
  wrong = judge("print(6)")
  assert wrong.reward == 0.0 and wrong.text == "Hidden test 2: wrong answer"
  shown = Coding(sandbox=sandbox, reveal_hidden=True).judge(task, "```python\nprint(6)\n```")
  assert shown.text == "Test 2: wrong answer\nInput: 4\nOutput: 6\nExpected: 8"
  assert judge("while True: pass").status is Status.TIMEOUT
  crash = judge("x = int(input())\nif x == 4: raise ValueError(x)\nprint(2 * x)")
  assert (
    crash.text
    == "Hidden test 2: runtime error\nError: ValueError\nLine 2: if x == 4: raise ValueError(x)"
  )


def _lcb_row(tests, private):
  return {
    "question_id": "q1",
    "question_content": "Add.",
    "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
    "public_test_cases": json.dumps(tests[:1]),
    "private_test_cases": private,
    "metadata": json.dumps({"func_name": "add"}),
  }


def test_livecodebench_rows(sandbox):
  tests = [
    {"input": f"{i}\n{i + 1}", "output": str(2 * i + 1), "testtype": "functional"} for i in range(7)
  ]
  packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests[1:])))).decode()
  for private in (packed, json.dumps(tests[1:])):
    task = livecodebench_task(_lcb_row(tests, private), "test")
    assert [(t["input"], t["hidden"]) for t in task.data["tests"]] == [
      (t["input"], i > 0) for i, t in enumerate(tests)
    ]
    half = livecodebench_task(_lcb_row(tests, private), "train").data["tests"]
    assert (
      len(half) == 3 and half == livecodebench_task(_lcb_row(tests, private), "train").data["tests"]
    )
    assert half != livecodebench_task(_lcb_row(tests, private), "train", seed=1).data["tests"]
  env = Coding(sandbox=sandbox)
  assert "class Solution" in env.prompt(task)[-1]["content"]
  assert (
    env.judge(
      task, "```python\nclass Solution:\n    def add(self, a, b):\n        return a + b\n```"
    ).reward
    == 1.0
  )
  assert (
    env.judge(
      task, "```python\nclass Solution:\n    def add(self, a, b):\n        return a\n```"
    ).reward
    == 0.0
  )


def test_livecodebench_window_of_dates():
  row = _lcb_row([{"input": "1\n2", "output": "3"}], "[]")
  env = Coding(sandbox=None, first_date="2025-02-01", last_date="2025-05-01")
  kept = [
    date
    for date in (
      "2025-01-31T23:00:00",
      "2025-02-01T00:00:00",
      "2025-04-06T00:00:00",
      "2025-05-01T00:00:00",
      "2025-05-02T00:00:00",
    )
    if env.task_from_row(row | {"idx": 0, "contest_date": date}, "test") is not None
  ]
  assert kept == ["2025-02-01T00:00:00", "2025-04-06T00:00:00", "2025-05-01T00:00:00"]
  with pytest.raises(ValueError, match="Invalid isoformat"):
    Coding(sandbox=None, first_date="February")


def test_mbpp_rows_of_the_hub(sandbox):
  sanitized = {
    "idx": 0,
    "source_file": "x",
    "task_id": 11,
    "prompt": "Write a function to add.",
    "code": "def helper(a):\r\n    return a\r\ndef add(a, b):\r\n    return helper(a) + b",
    "test_imports": ["import math"],
    "test_list": [
      "assert add(1, 2) == 3",
      "assert math.isclose(add(0.1, 0.2), 0.3, rel_tol=0.001)",
    ],
  }
  full = {
    "idx": 0,
    "task_id": 12,
    "text": "Write a function to add.",
    "code": sanitized["code"],
    "test_list": sanitized["test_list"][:1],
    "test_setup_code": "",
    "challenge_test_list": [],
  }
  env = Coding(sandbox=sandbox)
  for row, name, count in ((sanitized, "MBPP/11", 2), (full, "MBPP/12", 1)):
    task = env.task_from_row(row, "train")
    assert (
      task.id == name
      and task.data["fn_name"] == "add"
      and len(task.data["tests"]) == count
      and "assert add(1, 2) == 3" in task.prompt
    )
    assert env.judge(task, f"```python\n{task.solution}\n```").reward == 1.0
    assert env.judge(task, "```python\ndef add(a, b): return 0\n```").reward == 0.0
  for change, says in (
    ({"test_list": ["assert add(math.pi, 0) == 3"]}, "its own solution does not pass its check"),
    ({"test_list": ["assert ("]}, "not Python"),
    ({"test_list": "assert add(1, 2) == 3"}, "field 'test_list' is no list"),
    ({"code": ["x"]}, "field 'code' is of type list"),
    ({"prompt": None}, "field 'text' is missing"),
    ({"test_list": ["assert other(1) == 1"]}, "call none of the functions"),
  ):
    with pytest.raises(ValueError, match=says):
      env.task_from_row(sanitized | change, "train")
  for change in (  # what the asserts need before them
    {"test_list": ["assert add(math.pi, 0) == math.pi"]},
    {"test_setup_code": "three = 3\r\n", "test_list": ["assert add(1, 2) == three"]},
  ):
    task = env.task_from_row(sanitized | change, "train")
    assert env.judge(task, "```python\ndef add(a, b): return a + b\n```").reward == 1.0
    assert env.judge(task, "```python\ndef add(a, b): return three\n```").reward == 0.0


def test_private_tests_are_never_unpickled(tmp_path):
  class Runs:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "ran"),)

  for payload in (Runs(), [json.dumps([]), Runs()], ["[]", "[]"]):
    private = base64.b64encode(zlib.compress(pickle.dumps(payload))).decode()
    with pytest.raises(ValueError, match="LiveCodeBench, split test, row q1"):
      livecodebench_task(_lcb_row([{"input": "", "output": ""}], private), "test")
  assert not (tmp_path / "ran").exists()


def test_humaneval_rows(sandbox):
  row = {
    "task_id": "HumanEval/0",
    "entry_point": "mean",
    "prompt": 'from typing import List\n\ndef mean(x: List[float]) -> float:\n    """ Mean. """\n',
    "canonical_solution": "    return sum(x) / len(x)\n",
    "test": (
      "\n\nMETADATA = {'author': 'x'}\n\ndef check(candidate):\n"
      "    assert candidate([1.0, 2.0]) == 1.5, 'first'\n"
      "    assert abs(candidate([0.1, 0.2]) - 0.15) < 1e-6\n"
      "    assert candidate([1]) in (1, 2)\n"
      "    assert candidate([2]) == candidate([2])\n"
      "    assert True, 'always'\n"
    ),
  }
  task = humaneval_task(row, "test")
  assert [t["expression"] for t in task.data["tests"]] == [
    "mean([1.0, 2.0])",
    "mean([0.1, 0.2])",
    "mean([1])",
  ]
  env = Coding(sandbox=sandbox)
  assert env.judge(task, f"```python\n{task.solution}```").reward == 1.0
  assert env.judge(task, "```python\ndef mean(x): return 1.5\n```").text.startswith(
    "Test 2: wrong answer\nInput: mean([0.1, 0.2])\nOutput: 1.5\nExpected: 0.15\n"
  )


# In the form of HumanEval's rows whose checks are programs.
PROGRAM_ROWS = {
  "loop": "def check(candidate):\n  for i in range(3):\n    assert candidate([i, 2]) == i + 2\n",
  "random_inputs_and_a_helper": (
    "def check(candidate):\n  import random\n  for _ in range(20):\n"
    "    x = [random.random() for _ in range(9)]\n"
    "    assert abs(twice(x) / 2 - candidate(x)) < 1e-9\n"
  ),
  "variables": "def check(candidate):\n  x = [1, 2]\n  y = sum(x)\n"
  "  assert candidate(x) == y, 'sum'\n",
  "a_constant_itself": "def check(candidate):\n  assert (candidate([4]) == 4) is True\n",
  "two_calls": "def check(candidate):\n  assert candidate([1, 2]) == candidate([2, 1])\n"
  "  assert candidate([5]) > 4\n",
}


@pytest.mark.parametrize("name", PROGRAM_ROWS)
def test_a_check_that_is_no_list_of_asserts_runs_as_a_program(sandbox, name):
  beginning = (
    "from typing import List\n\ndef twice(x):\n    return 2 * sum(x)\n\n"
    'def total(x: List[float]) -> float:\n    """ Sum. """\n'
  )
  row = {
    "task_id": "HumanEval/0",
    "entry_point": "total",
    "prompt": beginning,
    "canonical_solution": "    return sum(x)\n",
    "test": PROGRAM_ROWS[name],
  }
  env = Coding(sandbox=sandbox)
  task = env.task_from_row(row, "test")
  (test,) = task.data["tests"]
  assert "check" in test and "def total" not in test["check"]
  for body, reward in (("return twice(x) / 2", 1.0), ("return len(x) / 5", 0.0), ("return x", 0.0)):
    program = beginning + f"    {body}\n"
    assert env.judge(task, f"```python\n{program}```").reward == reward, body
  wrong = row | {"canonical_solution": "    return len(x) / 5\n"}
  with pytest.raises(ValueError, match="HumanEval/0: its own solution does not pass its check"):
    env.task_from_row(wrong, "test")


def test_a_row_states_which_answers_are_right(sandbox):
  env = Coding(sandbox=sandbox)

  def reward(program, **row):
    plain = {"idx": 1, "question": "q", "tests": [{"input": "1", "output": "0.5 yes\nno"}]} | row
    return env.judge(env.task_from_row(plain, "test"), f"```python\n{program}\n```").reward

  spaced, near = "print('0.5  yes'); print('no')", "print('0.5000004 yes\\nno')"
  joined = "print('0.5 yes no')"
  assert [reward(p) for p in (spaced, near, joined)] == [0, 0, 0]
  assert [reward(p, compare="exact") for p in (spaced, near, joined)] == [0, 0, 0]
  assert [reward(p, compare="tokens") for p in (spaced, near, joined)] == [1, 0, 1]
  assert [reward(p, compare="float:1e-6") for p in (spaced, near, joined)] == [1, 1, 1]
  assert reward("print('0.5_0 yes no')", compare="float:1e-6") == 0
  assert reward("print('nan yes no')", compare="float:.9") == 0
  function = {"fn_name": "f", "tests": [{"input": "1", "output": '[1e300, {"a": 2}, true, "x"]'}]}
  for value, exact, close in (
    ('[1e300, {"a": 2}, True, "x"]', 1, 1),
    ('[1e300 * 1.0000001, {"a": 2.0000001}, True, "x"]', 0, 1),
    ('[1e300, {"a": 2}, 1, "x"]', 0, 0),
    ('[1e300, {"a": 3}, True, "x"]', 0, 0),
    ('[10 ** 400, {"a": 2}, True, "x"]', 0, 0),
  ):
    program = f"def f(x): return {value}"
    assert reward(program, **function) == exact
    assert reward(program, **function, compare="float:1e-6") == close
  check = "def check(input, output, expected): return int(output) ** 2 == 49"
  tests = [{"input": "1", "output": ""}]
  for row in (
    {"check": check, "tests": tests},
    {"check": check, "compare": "program", "tests": tests},
  ):
    assert [reward(f"print({x})", **row) for x in (7, -7, 8)] == [1, 1, 0]
  calls = {"check": "def check(candidate): assert candidate(3) == 9", "tests": [], "fn_name": "f"}
  calls["solution"] = "So:\n```python\ndef f(x): return x * x\n```\n"  # a response, as rows have it
  assert [reward(f"def f(x): return {x}", **calls) for x in ("x * 3", "x")] == [1, 0]


@pytest.mark.parametrize(
  "row, says",
  [
    ({"compare": "loose"}, "compare='loose' is unknown; choose exact, tokens, float:1e-6 or"),
    ({"compare": "float"}, "needs a number from 0 to 1"),
    ({"compare": "float:nan"}, "needs a number from 0 to 1"),
    ({"compare": "float:-1e-6"}, "needs a number from 0 to 1"),
    ({"compare": 1e-6}, "compare=1e-06 is unknown"),
    ({"compare": "tokens", "fn_name": "f"}, "is for what a program prints"),
    ({"compare": "program"}, "needs the field 'check'"),
    ({"compare": "tokens", "check": "def check(candidate): 0"}, "'check' is not used where"),
    ({"check": "def check(candidate): 0"}, r"check\(candidate\) needs fn_name"),
    ({"check": "def check(candidate): 0", "fn_name": "f"}, "without input and output"),
    ({"check": 5}, "the check is 5, not text"),
    ({"check": "def check(input, output, expected): 0", "tests": []}, "needs the field 'tests'"),
    ({"tests": [{"input": "1", "hidden": "no"}]}, "hidden='no' must be true or false"),
    ({"tests": [{"inputs": "1"}]}, "the test's field='inputs' is unknown; did you mean 'input'"),
    ({"question": ["q"]}, "field 'question' is of type list"),
    ({"question": None}, "field 'question' is missing"),
    ({"question": " "}, "field 'question' is empty"),
    ({"starter": 3}, "field 'starter' is of type int"),
    ({"fn_name": 3}, "field 'fn_name' is of type int"),
    ({"tests": "1"}, "field 'tests' is no list but of type str"),
    ({"tests": 5}, "field 'tests' is no list but of type int"),
  ],
)
def test_rows_that_state_no_rule_are_refused(row, says):
  plain = {"id": 1, "question": "q", "tests": [{"input": "1", "output": "1"}]}
  with pytest.raises(ValueError, match=says):
    plain_task(plain | row, "test")


@pytest.mark.parametrize(
  "condition, test",
  [
    ("candidate(1)", {"expression": "not not f(1)", "output": "True"}),
    ("not candidate(1)", {"expression": "not not f(1)", "output": "False"}),
    ("3 == candidate(1)", {"expression": "f(1)", "output": "3"}),
    ("candidate(1) is None", {"expression": "f(1)", "output": "None"}),
    (
      "abs(candidate(1) - 2) <= 1e-3",
      {
        "expression": "f(1)",
        "output": "2",
        "compare": "isclose",
        "rel_tol": 0.0,
        "abs_tol": 0.001,
      },
    ),
    ("candidate(1) in [1, 2]", {"expression": "f(1)", "output": "[1, 2]", "compare": "in"}),
    ("candidate(1) == 6.0 / 5", {"expression": "f(1)", "output": "1.2"}),
    ("candidate(1) == (1 + 2, [3 * 4])", {"expression": "f(1)", "output": "(3, [12])"}),
    ("tuple(candidate(1)) == tuple([1])", {"expression": "tuple(f(1))", "output": "(1,)"}),
    ("candidate(1) == sys.getsizeof(())", {"expression": "f(1)", "output": str(sys.getsizeof(()))}),
  ],
)
def test_an_asserts_answer_stays_on_the_host(condition, test):
  assert tests_from_asserts(f"def check(candidate):\n  assert {condition}", "f") == [test]


@pytest.mark.parametrize(
  "condition",
  [
    "candidate(1) == g(1)",
    "all(candidate(1))",
    "not all(candidate(1))",
    "candidate(1) > 2",
    "candidate(1) == 2 and candidate(2) == 3",
    "candidate(1) == 1 / 0",
    "candidate(1) is True",
    "math.isclose(candidate(1), 2, rel_tol=TOLERANCE)",
    "math.isclose(candidate(1), 2, **{'rel_tol': 1e-3})",
    "abs(candidate(1) - 2) < (1,)",
  ],
)
def test_an_assert_that_the_program_could_decide_is_no_expression(condition):
  with pytest.raises(ValueError, match="no literal answer"):
    tests_from_asserts(f"def check(candidate):\n  assert {condition}", "f")


def test_a_check_names_what_it_judges():
  assert len(tests_from_asserts("def check(candidate, /):\n  assert candidate(1) == 2", "f")) == 1
  with pytest.raises(ValueError, match="takes no candidate"):
    tests_from_asserts("def check():\n  assert f(1) == 2", "f")


def test_a_program_cannot_decide_its_tests(sandbox):
  tests = [
    TestCase(**t)
    for t in tests_from_asserts(
      "def check(candidate):\n  assert candidate(1)\n  assert not candidate(2)\n"
      "  assert candidate(3) in (3, 4)",
      "f",
    )
  ]
  assert sandbox.run("def f(x): return x if x != 2 else []", tests, fn_name="f").passed
  assert sandbox.run("def f(x): return x", tests[2:], fn_name="f").passed
  for program in (
    "bool = lambda x: True\ndef f(x): return 5",
    "class A:\n  __eq__ = lambda s, o: True\n  __hash__ = None\ndef f(x): return A()",
    "def f(x): return 0",
  ):
    assert (
      not sandbox.run(program, tests[1:], fn_name="f").passed
      and not sandbox.run(program, tests[2:], fn_name="f").passed
    )


@pytest.mark.parametrize(
  "row",
  [
    {},
    {"id": 1, "question": "x", "tests": []},
    {"id": 1, "question": "x", "tests": [{"inptu": "1"}]},
    *(
      {"id": 1, "question": "x"} | more
      for more in (
        {"tests": [{"input": "1", "output": "[1, 2"}], "fn_name": "f"},
        {"tests": [{"input": "[1", "output": "1"}], "fn_name": "f"},
        {"tests": [{"input": "", "output": "[" * 100_000}], "fn_name": "f"},
        {"tests": [{"input": [1], "output": "1"}]},
        {"tests": [{"input": "1", "output": 1}]},
        {"tests": [{"input": "1", "output": "1", "compare": "float", "rel_tol": "1e-6"}]},
        {"tests": [{"input": "1", "output": "1", "compare": "float", "abs_tol": math.nan}]},
        {"tests": [{"input": "1", "output": "1", "compare": "float", "abs_tol": -1e-6}]},
        {"tests": [{"expression": "f(1)", "output": "g(1)"}], "fn_name": "f"},
      )
    ),
  ],
)
def test_bad_rows_are_named(row):
  with pytest.raises(ValueError, match=f"split train, row {row.get('id')}"):
    plain_task(row, "train")


# MBPP: every solution passes, every mutant that fails in plain CPython fails with the same kind.


def _mutants(solution, name):
  """-> {mutation: source}, of those that apply."""

  def changed(visit):
    tree = ast.parse(solution)
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    return ast.unparse(tree) if visit(function) else None

  def constant(function):
    for node in ast.walk(function):
      if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value += 7
        return True

  def off_by_one(function):
    for node in ast.walk(function):
      if isinstance(node, ast.Compare):
        swap = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}.get(
          type(node.ops[0])
        )
        if swap:
          node.ops[0] = swap()
          return True
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        last = node.args[min(1, len(node.args) - 1)]
        node.args[min(1, len(node.args) - 1)] = ast.BinOp(last, ast.Sub(), ast.Constant(1))
        return True

  def body(source):
    def replace(function):
      function.body = ast.parse(source).body
      return True

    return replace

  made = {
    "constant": changed(constant),
    "off_by_one": changed(off_by_one),
    "exception": changed(body("raise ValueError('mutant')")),
    "loop": changed(body("while True: pass")),
    "empty": changed(body("pass")),
  }
  return {k: v for k, v in made.items() if v is not None}


# Plain CPython as the judge: prints for each (program, test) how the first failing assert failed.
_ORACLE = r"""
import ast, json, os, resource, sys
def run(program, test):
  resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
  resource.setrlimit(resource.RLIMIT_AS, (1200 << 20, 1200 << 20))
  space = {"__name__": "solution"}
  try:
    exec(compile(program, "p", "exec"), space)
    import math, sys as system, types
    def isclose(a, b, **k):  # no number is a wrong answer, not the program's exception
      return isinstance(a, (int, float)) and math.isclose(a, b, **k)
    space.setdefault("sys", system)
    body = next(n for n in ast.parse(test).body if isinstance(n, ast.FunctionDef)).body
    for statement in body:
      condition = compile(ast.Expression(statement.test), "t", "eval")
      if not eval(condition, space, {"math": types.SimpleNamespace(isclose=isclose)}):
        return 1
  except MemoryError:
    return 3
  except BaseException:
    return 2
  return 0
for program, test in json.load(sys.stdin):
  pid = os.fork()
  if pid == 0:
    sys.stdout = open(os.devnull, "w")
    os._exit(run(program, test))
  status = os.waitpid(pid, 0)[1]
  kinds = ("passed", "wrong_answer", "runtime_error", "memory_limit")
  print("time_limit" if status & 127 else kinds[status >> 8])
"""


def _check_mbpp(sandbox, count):
  rows = [json.loads(line) for line in (pathlib.Path(_DATA) / "mbpp_sanitized.jsonl").open()]
  rows = rows if count is None else rows[:: len(rows) // count][:count]
  tasks = [mbpp_task(row, "test") for row in rows]

  def judge(task, program, time_s):
    return sandbox.run(
      program,
      [TestCase(**t) for t in task.data["tests"]],
      task.data["fn_name"],
      Limits(time_s=time_s, memory_mb=1024),
      max_failures=1,
    )

  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    verdicts = list(threads.map(lambda task: judge(task, task.solution, 10.0), tasks))
    assert not [(t.id, v.feedback) for t, v in zip(tasks, verdicts, strict=True) if not v.passed]
    mutants = [
      (row, task, kind, source)
      for row, task in zip(rows, tasks, strict=True)
      for kind, source in _mutants(task.solution, task.data["fn_name"]).items()
    ]
    ending = [m for m in mutants if m[2] != "loop"]  # how a loop ends is known
    answers = subprocess.run(
      [sys.executable, "-I", "-c", _ORACLE],
      input=json.dumps([(source, row["test"]) for row, _, _, source in ending]),
      capture_output=True,
      text=True,
      check=True,
    ).stdout.split()
    assert len(answers) == len(ending)
    answer_of = {id(m): answer for m, answer in zip(ending, answers, strict=True)}
    verdicts = list(
      threads.map(lambda m: judge(m[1], m[3], 0.05 if m[2] == "loop" else 1.0), mutants)
    )
  wrong, failures = [], {}
  for mutant, verdict in zip(mutants, verdicts, strict=True):
    expected = answer_of.get(id(mutant), "time_limit")
    if verdict.kind != expected:
      wrong.append((mutant[1].id, mutant[2], verdict.kind, expected, verdict.feedback[:300]))
    if expected != "passed":
      failures[mutant[2]] = failures.get(mutant[2], 0) + 1
  assert not wrong, f"{len(wrong)} of {len(mutants)}: {wrong[:5]}"
  return len(tasks), failures


@needs_data
@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in the rows
def test_mbpp_50_rows(sandbox):
  tasks, failures = _check_mbpp(sandbox, 50)
  assert (
    tasks == 50
    and set(failures) == {"constant", "off_by_one", "exception", "loop", "empty"}
    and sum(failures.values()) > 150
  )


@pytest.mark.slow
@needs_data
@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in the rows
def test_mbpp_all(sandbox):
  tasks, failures = _check_mbpp(sandbox, None)
  print(tasks, "solutions passed; mutants that failed as in CPython:", failures)
  assert (
    tasks == 427
    and failures["exception"] == failures["loop"] == 427
    and sum(failures.values()) > 1500
  )
