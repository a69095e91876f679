"""Code problems: the response's program is run in the sandbox against tests, and the feedback is what an online judge says.

A task's `data`:
  tests     list of dictionaries with the fields of `sandbox.TestCase`
  fn_name   the function, or method of class Solution, that the tests call; absent or None: a program that reads standard
            input and writes standard output
  starter   code that the question gives to begin with, if any

The program of a response is its last fenced Python block, else its last unlabelled one. A response that ends inside its
thinking or its code block, and one without a block, has the wrong form, is told so and gets reward 0. Reward is 1 where all
tests pass, else 0.
Several correct answers to one test are not supported: the expected output is the only right one (`verdict.py` has the rules).

Rows of public sets become tasks by `livecodebench_task`, `humaneval_task`, `mbpp_task`, and any row of LiveCodeBench's plain form
(question, tests) by `task_from_row`. None of them runs anything of the row: private tests of LiveCodeBench are pickles, of
which the one string is read and nothing is executed. An assert becomes an expression, which the jail evaluates, and a
literal, which stays on the host. An assert that cannot be split so (a comparison of two calls, say) makes its row a bad one: in
the jail the program could decide it, by an `__eq__` or a `bool` of its own.
"""

import ast
import base64
import datetime
import json
import pickletools
import random
import re
import sys
import textwrap
import zlib

from sdpo_jax.envs.rows import final_text
from sdpo_jax.records import Feedback, Status, Task
from sdpo_jax.sandbox import Limits, Sandbox, TestCase, check_tests

STDIN_FORM = (
  "Write a Python program that reads the input from standard input and writes the answer to standard output. "
  "Answer with the whole program in one code block that begins with ```python and ends with ```."
)
FUNCTION_FORM = (
  "Write the Python function `{name}`; it is called with the arguments of each test. "
  "Answer with the whole code in one code block that begins with ```python and ends with ```."
)

MAX_PRIVATE_BYTES = 1 << 30  # of one question's decoded private tests
_STRING_PICKLE = {
  "PROTO",
  "FRAME",
  "UNICODE",
  "SHORT_BINUNICODE",
  "BINUNICODE",
  "BINUNICODE8",
  "MEMOIZE",
  "PUT",
  "BINPUT",
  "STOP",
}
_LABELS = {"python", "python3", "py", "py3"}
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*$")


class Coding:
  """Judges programs. Thread-safe as its sandbox is.

  reveal_hidden         show inputs and expected outputs of hidden tests as well, as the SDPO release does
  first_date, last_date of a question of LiveCodeBench, both inclusive, as "2025-02-01"; others are not part of the set
  """

  def __init__(
    self,
    *,
    sandbox: Sandbox,
    time_s: float = 6.0,
    memory_mb: int = 1024,
    output_kb: int = 4096,
    max_failures: int = 2,
    reveal_hidden: bool = False,
    first_date: str = "0001-01-01",
    last_date: str = "9999-12-31",
  ):
    self.sandbox = sandbox
    self.limits = Limits(time_s=time_s, memory_mb=memory_mb, output_kb=output_kb)
    self.max_failures = max_failures
    self.reveal_hidden = reveal_hidden
    self.first, self.last = (
      datetime.date.fromisoformat(first_date),
      datetime.date.fromisoformat(last_date),
    )

  def task_from_row(self, row: dict, split: str) -> Task | None:
    """A row of LiveCodeBench, HumanEval, MBPP or the plain form, told apart by its fields. None: outside the dates."""
    if "question_content" in row:
      inside = self.first <= datetime.date.fromisoformat(str(row["contest_date"])[:10]) <= self.last
      return livecodebench_task(row, split) if inside else None
    if "test_list" in row:
      return mbpp_hub_task(row, split)
    if "canonical_solution" in row:
      return (
        humaneval_task(row, split)
        if str(row["task_id"]).startswith("HumanEval")
        else mbpp_task(row, split)
      )
    return task_from_row({"id": row["idx"]} | row, split)

  def prompt(self, task: Task) -> list[dict[str, str]]:
    starter = task.data.get("starter")
    parts = [task.prompt.strip(), form(task)]
    if starter and starter.strip():
      parts.append(f"Begin with this code:\n```python\n{starter.rstrip()}\n```")
    system = [{"role": "system", "content": task.system}] if task.system else []
    return system + [{"role": "user", "content": "\n\n".join(parts)}]

  def judge(self, task: Task, response: str) -> Feedback:
    program, fault = extract(response)
    if fault:
      return Feedback(0.0, f"{fault} {form(task)}")
    tests = [TestCase(**test) for test in task.data["tests"]]
    if self.reveal_hidden:
      tests = [TestCase(**test | {"hidden": False}) for test in task.data["tests"]]
    verdict = self.sandbox.run(
      program, tests, task.data.get("fn_name"), self.limits, max_failures=self.max_failures
    )
    status = {"sandbox_failed": Status.ENV_FAILED, "time_limit": Status.TIMEOUT}.get(
      verdict.kind, Status.SCORED
    )
    return Feedback(float(verdict.passed), verdict.feedback, status)


def form(task: Task) -> str:
  name = task.data.get("fn_name")
  return FUNCTION_FORM.format(name=name) if name else STDIN_FORM


def extract(response: str) -> tuple[str, str]:
  """-> the program, and what is wrong with the response's form ("" if nothing).

  A fence closes with its own character, at least its own length, no label and no deeper indentation, so a docstring may hold
  an indented one. A Python label always opens a block, even inside another (a Markdown document that holds the program).
  """
  text, fault = final_text(response)
  if fault:
    return "", fault
  blocks, opened = [], None  # blocks: (is Python, text, terminated)
  for line in text.split("\n"):
    fence = _FENCE.match(line.rstrip("\r"))
    if fence:
      indent, mark, label = fence[1], fence[2], fence[3].lower()
      closes = (
        opened is not None
        and not label
        and mark[0] == opened["mark"][0]
        and len(mark) >= len(opened["mark"])
        and len(indent) <= len(opened["indent"])
      )
      if closes:
        blocks.append((opened["label"], opened["lines"], True))
        opened = None
        continue
      if opened is None or (label in _LABELS and opened["label"] not in _LABELS):
        opened = {"mark": mark, "label": label, "indent": indent, "lines": []}
        continue
    if opened is not None:
      opened["lines"].append(line.removeprefix(opened["indent"]))
  if opened is not None:
    blocks.append((opened["label"], opened["lines"], False))
  chosen = [b for b in blocks if b[0] in _LABELS] or [b for b in blocks if not b[0]]
  if not chosen:
    return "", "The response holds no Python code block."
  _, lines, terminated = chosen[-1]
  if not terminated:
    return "", "The response ends inside its code block."
  return "\n".join(lines) + "\n", ""


# Rows of data sets.


def task_from_row(row: dict, split: str) -> Task:
  """A row {id, question, tests: [{input, output}], fn_name?, starter?, solution?} of any JSONL."""
  try:
    tests = [dict(test) for test in row["tests"]]
    if not tests:
      raise ValueError("no tests")
    check_tests([TestCase(**test) for test in tests], row.get("fn_name"))
    return Task(
      id=str(row["id"]),
      prompt=row["question"],
      split=split,
      solution=row.get("solution"),
      data={"tests": tests, "fn_name": row.get("fn_name"), "starter": row.get("starter")},
    )
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f"code tasks, split {split}, row {row.get('id')}: {type(e).__name__} {e}"
    ) from e


def livecodebench_task(row: dict, split: str, *, seed: int = 0) -> Task:
  """A row of LiveCodeBench code_generation_lite. In split "train" a random half of the tests, as in the SDPO paper; else all."""
  try:
    public = json.loads(row["public_test_cases"])
    tests = [_livecodebench_test(t, False) for t in public]
    tests += [_livecodebench_test(t, True) for t in _private_tests(row["private_test_cases"])]
    if split == "train":
      chosen = random.Random(f"{seed}/{row['question_id']}").sample(
        range(len(tests)), max(1, len(tests) // 2)
      )
      tests = [tests[i] for i in sorted(chosen)]
    fn_name = json.loads(row["metadata"] or "{}").get("func_name")
    return task_from_row(
      {
        "id": row["question_id"],
        "question": row["question_content"],
        "tests": tests,
        "fn_name": fn_name,
        "starter": row["starter_code"],
      },
      split,
    )
  except (KeyError, TypeError, ValueError, zlib.error) as e:
    raise ValueError(
      f"LiveCodeBench, split {split}, row {row.get('question_id')}: {type(e).__name__} {e}"
    ) from e


def _livecodebench_test(test: dict, hidden: bool) -> dict:
  return {"input": test["input"], "output": test["output"], "hidden": hidden}


def _private_tests(field: str) -> list[dict]:
  """JSON, or base64 of zlib of a pickle of one string of JSON: that string is read off the pickle's opcodes."""
  try:
    return json.loads(field)
  except ValueError:
    pass
  inflate = zlib.decompressobj()
  data = inflate.decompress(base64.b64decode(field), MAX_PRIVATE_BYTES)
  if not inflate.eof:
    raise ValueError(f"private tests are truncated or above {MAX_PRIVATE_BYTES} bytes")
  operations = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(data)]
  strings = [argument for name, argument in operations if "UNICODE" in name]
  if len(strings) != 1 or not {name for name, _ in operations} <= _STRING_PICKLE:
    raise ValueError("private tests are a pickle of something else than one string")
  return json.loads(strings[0])


def humaneval_task(row: dict, split: str) -> Task:
  """A row of HumanEval: the prompt is the beginning of the program, the tests are the asserts of `check(candidate)`."""
  return _assert_task(
    row,
    split,
    row["entry_point"],
    "Complete this function.",
    row["prompt"],
    row["prompt"] + row["canonical_solution"],
  )


def mbpp_task(row: dict, split: str) -> Task:
  """A row of MBPP sanitized in HumanEval's form.

  Bodies indent by two or four, so the docstring is left out of the solution. `entry_point` is the first function, which need not
  be the one that the asserts call; the question names that one, and shows the first assert for the arguments' sake (`_mbpp`).
  """
  head, description, _ = row["prompt"].split("'''")
  return _mbpp(
    row,
    split,
    description,
    head.rstrip() + "\n" + row["canonical_solution"],
    row["test"],
    row["entry_point"],
  )


def mbpp_hub_task(row: dict, split: str) -> Task:
  """A row of MBPP as the hub has it: `test_list` holds the asserts; the question is `prompt` (sanitized) or `text` (full)."""
  if (row.get("test_setup_code") or "").strip():
    raise ValueError("field 'test_setup_code' is not empty: tests that need it are not supported")
  test = "def check(candidate):\n" + textwrap.indent("\n".join(row["test_list"]), "  ")
  task = _mbpp(
    row | {"task_id": f"MBPP/{row['task_id']}"},
    split,
    row.get("prompt") or row["text"],
    row["code"].replace("\r\n", "\n"),
    test,
    None,
  )
  imported = {
    word for line in row.get("test_imports") or [] for word in re.findall(r"\w+", line)
  } - {"import", "from", "as"}
  used = imported & {
    word for t in task.data["tests"] for word in re.findall(r"\w+", t["expression"])
  }
  # isclose, which most of them import math for, is compared on the host and stands in no expression
  if used:
    raise ValueError(f"field 'test_imports': the tests use {sorted(used)}, which is not supported")
  return task


def _mbpp(row, split, description, solution, test, entry_point) -> Task:
  try:
    tree = ast.parse(test)
  except SyntaxError as e:
    raise ValueError(f"the asserts are not Python: {e}") from e
  called = [
    node.func.id
    for node in ast.walk(tree)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
  ]
  defined = re.findall(r"^def +(\w+)", solution, re.MULTILINE)
  name = next((name for name in defined if name in called), entry_point)
  if name is None:
    raise ValueError(f"the tests call none of the functions {defined} of the solution")
  example = next(
    (line.strip() for line in test.split("\n") if line.strip().startswith("assert")), ""
  )
  return _assert_task(
    row | {"test": test},
    split,
    name,
    f"{description.strip()}\n\nFor example:\n{example}",
    None,
    solution,
  )


def _assert_task(row, split, name, question, starter, solution) -> Task:
  try:
    return task_from_row(
      {
        "id": row["task_id"],
        "question": question,
        "tests": tests_from_asserts(row["test"], name),
        "fn_name": name,
        "starter": starter,
        "solution": solution,
      },
      split,
    )
  except (KeyError, SyntaxError, ValueError) as e:
    raise ValueError(
      f"asserts, split {split}, row {row.get('task_id')}: {type(e).__name__} {e}"
    ) from e


def tests_from_asserts(source: str, fn_name: str) -> list[dict]:
  """The asserts of a function `check(candidate)` as expression tests.

  f(x) == LITERAL             the expression f(x), expected LITERAL; also the other way round, and `is None`
  set(f(x)) == set(LITERAL)   the expression set(f(x)), expected as a set
  math.isclose(f(x), LITERAL, rel_tol=t), abs(f(x) - LITERAL) < t    within that tolerance
  f(x) in LITERAL             the expression f(x), expected to be an element
  f(x), not f(x)              the expression `not not f(x)`, expected True or False; no name in it but the function's decides
  f(x) == f(x)                left out, as asserts without the function are: it holds whatever f is
  ValueError for anything else, and if `check` holds other statements (loops, assignments): such a test has no literal answer.
  A LITERAL may be arithmetic on numbers, a set or a tuple of a literal, or the size of one, which the host computes.
  What remains to the program: names of an expression other than the function's (`set`, `sorted`, `math`) are looked up beside
  it, so it may redefine them. It gains nothing that it could not return, since the expected value is not there.
  """
  check = next(
    (
      node
      for node in ast.parse(source).body
      if isinstance(node, ast.FunctionDef) and node.name == "check"
    ),
    None,
  )
  if check is None:
    raise ValueError("the test defines no check(candidate)")
  candidate = check.args.args[0].arg
  tests = []
  for statement in check.body:
    if (
      isinstance(statement, ast.Pass)
      or isinstance(statement, ast.Expr)
      and isinstance(statement.value, ast.Constant)
    ):
      continue
    if not isinstance(statement, ast.Assert):
      raise ValueError(
        f"check holds a statement that is not an assert: {ast.unparse(statement)[:100]}"
      )
    for node in ast.walk(statement):
      if isinstance(node, ast.Name) and node.id == candidate:
        node.id = fn_name
    if (test := _expression_test(statement.test, fn_name)) is not None:
      tests.append(test)
  # HumanEval has asserts of True
  tests = [test for test in tests if fn_name in test["expression"]]
  if not tests:
    raise ValueError("check holds no assert on the function")
  return tests


def _expression_test(condition: ast.expr, fn_name: str) -> dict | None:
  match condition:
    case ast.Constant():
      return None
    case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
      if ast.dump(left) == ast.dump(right):
        return None
      if (value := _literal_value(right)) is not None:
        return {"expression": ast.unparse(left), "output": value}
      if (value := _literal_value(left)) is not None:
        return {"expression": ast.unparse(right), "output": value}
    case ast.Compare(left=left, ops=[ast.Is()], comparators=[ast.Constant(value=None)]):
      return {"expression": ast.unparse(left), "output": "None"}
    case ast.Compare(left=left, ops=[ast.In()], comparators=[right]):
      value = _literal_value(right)
      if value is not None:
        return {"expression": ast.unparse(left), "output": value, "compare": "in"}
    case ast.Call(func=ast.Name(id=name)) if name == fn_name:
      return {"expression": f"not not {ast.unparse(condition)}", "output": "True"}
    case ast.UnaryOp(op=ast.Not(), operand=ast.Call(func=ast.Name(id=name)) as call) if (
      name == fn_name
    ):
      return {"expression": f"not not {ast.unparse(call)}", "output": "False"}
    case ast.Compare(
      left=ast.Call(
        func=ast.Name(id="abs"), args=[ast.BinOp(left=left, op=ast.Sub(), right=right)]
      ),
      ops=[ast.Lt() | ast.LtE()],
      comparators=[tolerance],
    ):
      value, within = _literal_value(right), _literal_value(tolerance)
      if value is not None and within is not None:
        return {
          "expression": ast.unparse(left),
          "output": value,
          "compare": "isclose",
          "rel_tol": 0.0,
          "abs_tol": float(within),
        }
    case ast.Call(
      func=ast.Attribute(value=ast.Name(id="math"), attr="isclose"),
      args=[left, right],
      keywords=keywords,
    ):
      value = _literal_value(right)
      tolerances = {k.arg: float(_literal_value(k.value)) for k in keywords}
      if value is not None:
        return {"expression": ast.unparse(left), "output": value, "compare": "isclose"} | tolerances
  raise ValueError(f"an assert has no literal answer: {ast.unparse(condition)[:100]}")


_ARITHMETIC = (
  ast.Constant,
  ast.BinOp,
  ast.UnaryOp,
  ast.Add,
  ast.Sub,
  ast.Mult,
  ast.Div,
  ast.UAdd,
  ast.USub,
)
_OF_LITERAL = {"set": set, "tuple": tuple, "sys.getsizeof": sys.getsizeof}


def _literal_value(node: ast.expr) -> str | None:
  """The expression as a literal's text, None where it is none."""
  try:
    match node:
      case ast.Call(func=ast.Name() | ast.Attribute() as function, args=[argument], keywords=[]):
        apply = _OF_LITERAL.get(ast.unparse(function))
        return repr(apply(ast.literal_eval(argument))) if apply else None
      case ast.BinOp() if all(
        isinstance(x, _ARITHMETIC) and type(getattr(x, "value", 0)) in (int, float)
        for x in ast.walk(node)
      ):
        return repr(eval(compile(ast.Expression(node), "<literal>", "eval"), {}))
    return repr(ast.literal_eval(node))
  except (ValueError, TypeError, ArithmeticError):
    return None
