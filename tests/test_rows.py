"""Fields of rows: missing ones in all their forms, numbers as tables write them."""

import math

import pytest

from sdpo_jax.envs import coding_rows, rows
from sdpo_jax.envs.arithmetic import Arithmetic
from sdpo_jax.envs.ifeval import IFEval
from sdpo_jax.envs.math_qa import MathQA
from sdpo_jax.envs.mcq import MCQ
from sdpo_jax.envs.rows import field, given, optional_text, row_name, task_id, whole_number
from sdpo_jax.envs.tool_use import ToolUse

NAN = float("nan")
CHOICE = {"idx": 4, "prompt": "Which?\nA: 1\nB: 2", "answer": "A"}
CALL = {"idx": 4, "prompt": "go", "answer": '[{"Action": "a", "Action_Input": "{}"}]'}


@pytest.mark.parametrize("nothing", [None, NAN, math.nan])
def test_null_and_nan_are_missing(nothing):
  row = {"idx": 3, "text": nothing, 5: "a key that is no text"}
  with pytest.raises(ValueError, match="'text' is missing"):
    field(row, "text")
  with pytest.raises(ValueError, match="'text' is missing"):
    field(row, "text", (str, float))
  assert given(row, "text") is None and given(row, "no such field") is None
  assert optional_text(row, "text") is None
  assert row_name(row, "text") == 3


def test_the_text_nan_is_a_text():
  assert field({"idx": 0, "text": "nan"}, "text") == "nan"


@pytest.mark.parametrize("value", [3, 0.5, True, ["a"], {"a": 1}])
def test_what_should_be_a_text_is_refused_if_it_is_none(value):
  with pytest.raises(ValueError, match="'system' is of type"):
    optional_text({"system": value}, "system")


@pytest.mark.parametrize(
  "value, number",
  [(3, 3), (3.0, 3), (-2.0, -2), (10**20, 10**20)]
  + [(value, None) for value in (3.5, NAN, math.inf, -math.inf, True, False, "3", None, [3])],
)
def test_whole_numbers(value, number):
  result = whole_number(value)
  assert result == number and not isinstance(result, (bool, float))


def test_a_name_that_a_gap_made_a_float_is_a_number():
  assert row_name({"idx": 0, "key": 70.0}, "key") == 70
  assert row_name({"idx": 0, "key": ""}, "key") == 0
  assert row_name({"idx": 0, "key": "rec1"}, "key") == "rec1"
  assert task_id({"idx": 0, "dataset": NAN}, "train", "mcq") == "mcq/train/0"


@pytest.mark.parametrize("env, row", [(MCQ(), CHOICE), (ToolUse(), CALL)])
@pytest.mark.parametrize("nothing", [None, NAN])
def test_optional_fields_may_hold_nothing(env, row, nothing):
  empty = dict.fromkeys(
    ("kind", "dataset", "system", "options", "Correct Answer", "answer_index"), nothing
  )
  task = env.task_from_row(row | empty, "train")
  assert task == env.task_from_row(row, "train")
  assert task.system is None and [m["role"] for m in env.prompt(task)] == ["user"]


@pytest.mark.parametrize("env, row", [(MCQ(), CHOICE), (ToolUse(), CALL)])
def test_fields_that_are_needed_must_hold_something(env, row):
  for name in ("prompt", "answer"):
    for nothing, says in ((None, "missing"), (NAN, "missing"), (" ", "is empty")):
      with pytest.raises(ValueError, match=f"'{name}' {says}|'{name}' is {says}"):
        env.task_from_row(row | {name: nothing}, "train")
  with pytest.raises(ValueError, match="'system' is of type int"):
    env.task_from_row(row | {"system": 3}, "train")


ODD = [3, 2.5, True, ["a"], {"a": 1}, b"x", " ", "x" * 10, None, NAN]
# A row of each form that an environment reads, with the fields that tell it apart.
FORMS = [
  (MCQ(), CHOICE | {"system": "s", "kind": "mcq", "dataset": "d"}),
  (MCQ(), {"question": "2 + 2?", "options": ["3", "4"], "answer": "B", "question_id": 3}),
  (MCQ(), {"Question": "q", "Correct Answer": "a", "Record ID": "r"}
   | {f"Incorrect Answer {i}": f"{i}" for i in (1, 2, 3)}),
  (ToolUse(), CALL | {"system": "s", "kind": "tooluse", "dataset": "d"}),
  (MathQA(), {"question": "2 + 2?", "answer": "4", "system": "s", "dataset": "d"}),
  (MathQA(), {"problem": "2 + 2?", "solution": "\\boxed{4}"}),
  (IFEval(), {"prompt": "Shout.", "key": 3, "kwargs": [{}],
              "instruction_id_list": ["change_case:english_capital"]}),
]  # fmt: skip


@pytest.mark.parametrize("env, row", FORMS)
def test_a_field_of_any_type_makes_a_task_or_is_named(env, row):
  row = {"idx": 0} | row
  env.task_from_row(row, "train")
  for name in row.keys() - {"idx"}:
    for odd in ODD:
      try:
        task = env.task_from_row(row | {name: odd}, "train")
      except ValueError as error:
        # without a field that tells its form apart, a row is read in another form
        assert "field '" in str(error) and (f"'{name}'" in str(error) or odd in (None, NAN))
      else:
        assert isinstance(task.prompt, str) and isinstance(task.system, str | None)
        assert not isinstance(odd, (bool, list, dict, bytes)), (name, odd)


def test_a_row_says_its_kind_and_difficulty_where_it_has_them():
  row = {"subject": "law", "level": 5.0, "empty": " ", "list": [1], "gap": float("nan")}
  assert rows.groups(row, kind="subject", difficulty="level") == {"kind": "law", "difficulty": 5.0}
  for name in ("empty", "list", "gap", "missing"):
    assert rows.groups(row, kind=name) == {}


def test_tasks_carry_what_their_rows_say():
  maths = {"idx": 0, "problem": "1 + 1?", "answer": "2", "level": "Level 3", "type": "Algebra"}
  data = MathQA().task_from_row(maths, "test").data
  assert (data["kind"], data["difficulty"]) == ("Algebra", "Level 3")
  code = {"idx": 0, "question": "4?", "tests": [{"output": "4"}], "difficulty": "hard"}
  assert coding_rows.task_from_row(code, "test").data["difficulty"] == "hard"
  for index in range(20):
    data = Arithmetic().task("heldout", index).data
    assert data["difficulty"] == len(data["ops"])


def test_environments_extract_final_answers():
  maths = MathQA()
  task = maths.task_from_row({"idx": 0, "problem": "1 + 1?", "answer": "2"}, "test")
  assert maths.answer(task, "So \\boxed{3}.") == "3" and maths.answer(task, "So 3.") is None
  arithmetic = Arithmetic()
  task = arithmetic.task("heldout", 0)
  assert arithmetic.answer(task, "\\boxed{07}") == "7"
  assert arithmetic.answer(task, "7") is None and arithmetic.answer(task, "<think>7") is None
