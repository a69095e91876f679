"""Makes code tasks from the rows of LiveCodeBench, HumanEval, MBPP and a plain form of our own.

Nothing here runs anything of a row.

* Private tests of LiveCodeBench are pickles, of which the one string is read and nothing is
  executed.
* An assert becomes an expression, which the jail evaluates, and a literal, which stays on the
  host.
* Where an assert cannot be split so, the whole check becomes a program that runs in a jail of its
  own and calls the judged function (sandbox/check_source.py). So it is with loops, random inputs,
  and a comparison of two calls: beside the program, that could decide them by an `__eq__` of its
  own.

A row of the plain form states with `compare` which answers are right:

  exact       the expected output alone, by the rule of the test's mode (sandbox/compare.py): the
              default
  tokens      the same words, however they are spaced; for programs that write to standard output
  float:1e-6  numbers may differ by that much, or by that part of the larger one
  program     what the row's field `check` accepts: the source of check(candidate) for a function,
              without tests, or of check(input, output, expected) about each test's answer

Give such a row a `solution` too, a program or a response that holds it: the check is tried with it
when the row is read, and nothing else tells a check that is wrong from answers that are.

Errors: a row that cannot be used is a ValueError, or what reading a missing field raises.
"""

import ast
import base64
import dataclasses
import json
import pickletools
import random
import re
import sys
import textwrap
import zlib

from sdpo_jax.envs.rows import field, given, groups, is_missing, optional_text
from sdpo_jax.errors import unknown
from sdpo_jax.records import Task
from sdpo_jax.sandbox import TestCase, check_tests, read_check

MAX_PRIVATE_BYTES = 1 << 30  # of one question's decoded private tests
# The opcodes of a pickle that holds one string.
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
# Syntax that `_literal_value` computes on the host, over numbers and lists of them alone.
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
  ast.Tuple,
  ast.List,
  ast.Load,
)
# Functions of one literal that `_literal_value` computes on the host.
_OF_LITERAL = {"set": set, "tuple": tuple, "sys.getsizeof": sys.getsizeof}


def is_livecodebench(row: dict) -> bool:
  """Tells whether a row is one of LiveCodeBench."""
  return "question_content" in row


def task_from_row(row: dict, split: str) -> Task:
  """Reads a row of any of the sets, which are told apart by their fields."""
  task = _task_of_set(row, split)
  return dataclasses.replace(task, data=task.data | groups(row, difficulty="difficulty"))


def _task_of_set(row: dict, split: str) -> Task:
  if is_livecodebench(row):
    return livecodebench_task(row, split)
  if "test_list" in row:
    return mbpp_hub_task(row, split)
  if "canonical_solution" in row:
    is_humaneval = str(row["task_id"]).startswith("HumanEval")
    return humaneval_task(row, split) if is_humaneval else mbpp_task(row, split)
  return plain_task({"id": row["idx"]} | row, split)


def plain_task(row: dict, split: str) -> Task:
  """Reads a row {id, question, tests: [{input, output}], fn_name?, starter?, solution?}.

  `compare` and `check` are optional too; the module says what they mean.
  """
  try:
    tests = _compared([dict(test) for test in _list(row, "tests")], row)
    if not tests:
      raise ValueError("no tests")
    fn_name = optional_text(row, "fn_name")
    check_tests([_test_case(test) for test in tests], fn_name)
    return Task(
      id=str(row["id"]),
      prompt=field(row, "question"),
      split=split,
      solution=optional_text(row, "solution"),
      data={"tests": tests, "fn_name": fn_name, "starter": optional_text(row, "starter")},
    )
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f"code tasks, split {split}, row {row.get('id')}: {type(e).__name__} {e}"
    ) from e


def _test_case(test: dict) -> TestCase:
  """Returns a test of a row. ValueError that names a field which no test has."""
  names = [field.name for field in dataclasses.fields(TestCase)]
  for name in test:
    if name not in names:
      raise ValueError(unknown("the test's field", name, names))
  return TestCase(**test)


def _list(row: dict, name: str) -> list:
  """Returns a list that a row need not have, as a list. ValueError if the field is none."""
  value = row.get(name)
  if is_missing(value):
    return []
  if isinstance(value, (str, bytes, dict)) or not hasattr(value, "__iter__"):
    raise ValueError(f"field {name!r} is no list but of type {type(value).__name__}")
  return list(value)


def _compared(tests: list[dict], row: dict) -> list[dict]:
  """Returns the tests with the comparison that the row states. Raises ValueError for another."""
  check = given(row, "check")
  rule = given(row, "compare") or ("program" if check else "exact")
  kind, _, tolerance = str(rule).partition(":")
  if kind == "program" and check is not None:
    if not tests and isinstance(check, str):
      fn_name = optional_text(row, "fn_name")
      if read_check(check, fn_name).judges_answers:
        raise ValueError("check(input, output, expected) needs the field 'tests', with inputs")
    return [test | {"check": check} for test in tests or [{}]]
  if check is not None:
    raise ValueError(f"field 'check' is not used where compare={rule!r}; it is for 'program'")
  match kind, tolerance:
    case "exact", "":
      return tests
    case "tokens", "":
      return [{"compare": "tokens"} | test for test in tests]
    case "float", _:
      try:
        allowed = float(tolerance)
      except ValueError:
        allowed = -1.0
      if not 0 <= allowed < 1:
        raise ValueError(f"compare={rule!r} needs a number from 0 to 1, as in 'float:1e-6'")
      return [{"compare": "float", "rel_tol": allowed, "abs_tol": allowed} | test for test in tests]
    case "program", "":
      raise ValueError("compare='program' needs the field 'check'")
  raise ValueError(f"compare={rule!r} is unknown; choose exact, tokens, float:1e-6 or program")


# LiveCodeBench.


def livecodebench_task(row: dict, split: str, *, seed: int = 0) -> Task:
  """Reads a row of LiveCodeBench's code_generation_lite.

  Split "train" gets a random half of the tests, as in the SDPO paper; other splits get all.
  """
  try:
    public = json.loads(row["public_test_cases"])
    tests = [_livecodebench_test(test, hidden=False) for test in public]
    private = _private_tests(row["private_test_cases"])
    tests += [_livecodebench_test(test, hidden=True) for test in private]
    if split == "train":
      rng = random.Random(f"{seed}/{row['question_id']}")
      chosen = rng.sample(range(len(tests)), max(1, len(tests) // 2))
      tests = [tests[i] for i in sorted(chosen)]
    fn_name = json.loads(row["metadata"] or "{}").get("func_name")
    plain = {
      "id": row["question_id"],
      "question": row["question_content"],
      "tests": tests,
      "fn_name": fn_name,
      "starter": row["starter_code"],
    }
    return plain_task(plain, split)
  except (KeyError, TypeError, ValueError, zlib.error) as e:
    raise ValueError(
      f"LiveCodeBench, split {split}, row {row.get('question_id')}: {type(e).__name__} {e}"
    ) from e


def _livecodebench_test(test: dict, *, hidden: bool) -> dict:
  return {"input": test["input"], "output": test["output"], "hidden": hidden}


def _private_tests(field: str) -> list[dict]:
  """Decodes JSON, or base64 of zlib of a pickle of one string of JSON.

  That string is read off the pickle's opcodes: unpickling would execute what the row says.
  """
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


# HumanEval and MBPP, whose tests are asserts.


def humaneval_task(row: dict, split: str) -> Task:
  """Reads a row of HumanEval: a program's beginning, and the asserts of `check(candidate)`.

  A check may use functions that the beginning defines beside the one to complete.
  """
  beginning, entry_point = field(row, "prompt"), field(row, "entry_point")
  return _assert_task(
    row,
    split,
    setup=_helpers(beginning, entry_point),
    fn_name=entry_point,
    question="Complete this function.",
    starter=beginning,
    solution=beginning + field(row, "canonical_solution"),
  )


def _helpers(beginning: str, entry_point: str) -> str:
  """Returns a program's beginning without the function to complete."""
  try:
    tree = ast.parse(beginning)
  except SyntaxError:  # the function to complete has no body yet, not even a docstring
    return ""
  tree.body = [node for node in tree.body if getattr(node, "name", None) != entry_point]
  return ast.unparse(tree)


def mbpp_task(row: dict, split: str) -> Task:
  """Reads a row of MBPP sanitized in HumanEval's form.

  Bodies indent by two or four, so the docstring is left out of the solution.
  `entry_point` is the first function, which need not be the one that the asserts call.
  """
  parts = field(row, "prompt").split("'''")
  if len(parts) != 3:
    raise ValueError("field 'prompt' holds no docstring between '''")
  head, description, _ = parts
  return _mbpp_task(
    row,
    split,
    description=description,
    solution=head.rstrip() + "\n" + field(row, "canonical_solution"),
    check=field(row, "test"),
    entry_point=field(row, "entry_point"),
  )


def mbpp_hub_task(row: dict, split: str) -> Task:
  """Reads a row of MBPP as the hub has it, where `test_list` holds the asserts.

  The question is `prompt` in the sanitized set and `text` in the full one.
  """
  asserts = textwrap.indent("\n".join(map(str, _list(row, "test_list"))), "  ")
  imports = "\n".join(map(str, _list(row, "test_imports")))
  setup = (optional_text(row, "test_setup_code") or "").replace("\r\n", "\n")
  return _mbpp_task(
    row | {"task_id": f"MBPP/{row['task_id']}"},
    split,
    setup=f"{imports}\n{setup}",
    description=optional_text(row, "prompt") or field(row, "text"),
    solution=field(row, "code").replace("\r\n", "\n"),
    check=f"def check(candidate):\n{asserts}",
    entry_point=None,
  )


def _mbpp_task(row, split, *, description, solution, check, entry_point, setup="") -> Task:
  """Makes a task whose question names the function that the asserts of `check` call.

  The question also shows the first assert: it says which arguments the function takes.
  """
  try:
    tree = ast.parse(check)
  except SyntaxError as e:
    raise ValueError(f"the asserts are not Python: {e}") from e
  calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
  called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
  defined = re.findall(r"^def +(\w+)", solution, re.MULTILINE)
  fn_name = next((name for name in defined if name in called), entry_point)
  if fn_name is None:
    raise ValueError(f"the tests call none of the functions {defined} of the solution")
  lines = [line.strip() for line in check.split("\n")]
  example = next((line for line in lines if line.startswith("assert")), "")
  return _assert_task(
    row | {"test": check},
    split,
    setup=setup,
    fn_name=fn_name,
    question=f"{description.strip()}\n\nFor example:\n{example}",
    starter=None,
    solution=solution,
  )


def _assert_task(row, split, *, setup, fn_name, question, starter, solution) -> Task:
  try:
    plain = {
      "id": row["task_id"],
      "question": question,
      "tests": _tests_of_check(row["test"], setup, fn_name),
      "fn_name": fn_name,
      "starter": starter,
      "solution": solution,
    }
    return plain_task(plain, split)
  except (KeyError, SyntaxError, ValueError) as e:
    raise ValueError(
      f"asserts, split {split}, row {row.get('task_id')}: {type(e).__name__} {e}"
    ) from e


def _tests_of_check(source: str, setup: str, fn_name: str) -> list[dict]:
  """Returns a test for each assert of a check, or one that runs the check as a program.

  `setup` is what the check needs before it: imports, functions. An expression of an assert is
  evaluated beside the judged program, so it must not need any of that.
  """
  try:
    tests = tests_from_asserts(source, fn_name)
  except _NotSplit:
    tests = None
  if tests is not None and not _needed(setup, tests):
    return tests
  return [{"check": f"{setup}\n{source}"}]


def _needed(setup: str, tests: list[dict]) -> set[str]:
  """Returns the names that a check's setup makes and the tests' expressions use.

  Most rows import math for `isclose`, which the host compares: it stands in no expression.
  """
  made = set()
  for node in ast.walk(ast.parse(setup)):
    match node:
      case ast.alias(name=name, asname=asname):
        made.add((asname or name).split(".")[0])
      case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
        made.add(name)
      case ast.Name(id=name, ctx=ast.Store()):
        made.add(name)
  words = {word for test in tests for word in re.findall(r"\w+", test["expression"])}
  return made & words


# Asserts as tests of expressions.


class _NotSplit(ValueError):
  """A check cannot be split into expressions and literals."""


def tests_from_asserts(source: str, fn_name: str) -> list[dict]:
  """Turns the asserts of a function `check(candidate)` into tests of expressions.

    f(x) == LITERAL             the expression f(x), expected LITERAL; also the other way round,
                                and `is None`
    set(f(x)) == set(LITERAL)   the expression set(f(x)), expected as a set
    math.isclose(f(x), LITERAL, rel_tol=t), abs(f(x) - LITERAL) < t
                                the expression f(x), within that tolerance
    f(x) in LITERAL             the expression f(x), expected to be an element
    f(x), not f(x)              the expression `not not f(x)`, expected True or False; no name in
                                it but the function's decides
    f(x) == f(x)                left out, as asserts without the function are: it holds whatever
                                f is

  A LITERAL may be arithmetic on numbers, a set or a tuple of a literal, or the size of one,
  which the host computes.
  ValueError for anything else: such a test has no literal answer, and the check must run as a
  program. So it is if `check` holds other statements, such as loops and assignments.

  What remains to the program: names of an expression other than the function's (`set`,
  `sorted`, `math`) are looked up beside it, so it may redefine them. It gains nothing that it
  could not return, since the expected value is not there.
  """
  functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
  check = next((function for function in functions if function.name == "check"), None)
  if check is None:
    raise ValueError("the test defines no check(candidate)")
  arguments = check.args.posonlyargs + check.args.args
  if not arguments:
    raise ValueError("check() takes no candidate")
  candidate = arguments[0].arg
  tests = []
  for statement in check.body:
    if _says_nothing(statement):
      continue
    if not isinstance(statement, ast.Assert):
      raise _NotSplit(
        f"check holds a statement that is not an assert: {ast.unparse(statement)[:100]}"
      )
    for node in ast.walk(statement):
      if isinstance(node, ast.Name) and node.id == candidate:
        node.id = fn_name
    if not _holds_always(statement.test):
      tests.append(_expression_test(statement.test, fn_name))
  # HumanEval has asserts of True.
  tests = [test for test in tests if fn_name in test["expression"]]
  if not tests:
    raise ValueError("check holds no assert on the function")
  return tests


def _says_nothing(statement: ast.stmt) -> bool:
  """Tells whether a statement is `pass`, a docstring or another constant, or a mere name."""
  if isinstance(statement, ast.Expr):
    return isinstance(statement.value, (ast.Constant, ast.Name))
  return isinstance(statement, ast.Pass)


def _holds_always(condition: ast.expr) -> bool:
  """Tells whether a condition is a constant, or compares an expression with itself."""
  match condition:
    case ast.Constant():
      return True
    case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
      return ast.dump(left) == ast.dump(right)
  return False


def _expression_test(condition: ast.expr, fn_name: str) -> dict:
  """Splits an assert's condition into an expression and its literal; ValueError if it cannot."""
  test = (
    _comparison_test(condition)
    or _truth_test(condition, fn_name)
    or _difference_test(condition)
    or _isclose_test(condition)
  )
  if test is None:
    raise _NotSplit(f"an assert has no literal answer: {ast.unparse(condition)[:100]}")
  return test


def _comparison_test(condition: ast.expr) -> dict | None:
  """Splits `f(x) == LITERAL`, `LITERAL == f(x)`, `f(x) in LITERAL` and `f(x) is None`."""
  match condition:
    case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
      for expression, literal in ((left, right), (right, left)):
        value = _literal_value(literal)
        if value is not None:
          return {"expression": ast.unparse(expression), "output": value}
    case ast.Compare(left=left, ops=[ast.Is()], comparators=[ast.Constant(value=None)]):
      return {"expression": ast.unparse(left), "output": "None"}
    case ast.Compare(left=left, ops=[ast.In()], comparators=[right]):
      value = _literal_value(right)
      if value is not None:
        return {"expression": ast.unparse(left), "output": value, "compare": "in"}
  return None


def _truth_test(condition: ast.expr, fn_name: str) -> dict | None:
  """Splits `f(x)` and `not f(x)`."""
  expected = "True"
  if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
    condition = condition.operand
    expected = "False"
  match condition:
    case ast.Call(func=ast.Name(id=name)) if name == fn_name:
      return {"expression": f"not not {ast.unparse(condition)}", "output": expected}
  return None


def _difference_test(condition: ast.expr) -> dict | None:
  """Splits `abs(f(x) - LITERAL) < t`."""
  match condition:
    case ast.Compare(
      left=ast.Call(
        func=ast.Name(id="abs"), args=[ast.BinOp(left=left, op=ast.Sub(), right=right)]
      ),
      ops=[ast.Lt() | ast.LtE()],
      comparators=[bound],
    ):
      value = _literal_value(right)
      tolerance = _number(bound)
      if value is not None and tolerance is not None:
        return _close_to(left, value, {"rel_tol": 0.0, "abs_tol": tolerance})
  return None


def _isclose_test(condition: ast.expr) -> dict | None:
  """Splits `math.isclose(f(x), LITERAL, rel_tol=t)`."""
  match condition:
    case ast.Call(
      func=ast.Attribute(value=ast.Name(id="math"), attr="isclose"),
      args=[left, right],
      keywords=keywords,
    ):
      value = _literal_value(right)
      tolerances = {k.arg: _number(k.value) for k in keywords}
      if value is not None and tolerances.keys() <= {"rel_tol", "abs_tol"}:
        if None not in tolerances.values():
          return _close_to(left, value, tolerances)
  return None


def _close_to(expression: ast.expr, value: str, tolerances: dict[str, float]) -> dict:
  test = {"expression": ast.unparse(expression), "output": value, "compare": "isclose"}
  return test | tolerances


def _number(node: ast.expr) -> float | None:
  """Returns an expression's value if it is a literal number, else None."""
  try:
    return float(_literal_value(node) or "")
  except ValueError:
    return None


def _literal_value(node: ast.expr) -> str | None:
  """Returns an expression's value as a literal's text; None where it is no literal."""
  try:
    match node:
      case ast.Call(func=ast.Name() | ast.Attribute() as function, args=[argument], keywords=[]):
        apply = _OF_LITERAL.get(ast.unparse(function))
        return repr(apply(ast.literal_eval(argument))) if apply else None
    if isinstance(node, (ast.BinOp, ast.Tuple, ast.List)) and _is_arithmetic(node):
      return repr(eval(compile(ast.Expression(node), "<literal>", "eval"), {}))
    return repr(ast.literal_eval(node))
  except (ValueError, TypeError, ArithmeticError):
    return None


def _is_arithmetic(node: ast.expr) -> bool:
  """Tells whether an expression holds numbers, + - * / and lists alone: it may be evaluated."""
  for part in ast.walk(node):
    if not isinstance(part, _ARITHMETIC):
      return False
    if isinstance(part, ast.Constant) and type(part.value) not in (int, float):
      return False
  return True
