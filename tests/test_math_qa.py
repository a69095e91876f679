"""Mathematics: final answers, which are equal, a worker that hangs, and every GSM8K row."""

import concurrent.futures
import json
import math
import os
import time

import pytest

from sdpo_jax import config
from sdpo_jax.envs.math_qa import RESTART_S, MathQA, extract, number
from sdpo_jax.records import Status

_DATA = os.environ.get("SDPO_JAX_DATA")
needs_data = pytest.mark.skipif(_DATA is None, reason="SDPO_JAX_DATA is unset: no GSM8K rows")

GSM8K = {"idx": 4, "question": "How many?", "answer": "2*9 = <<2*9=18>>18 eggs.\n#### 18"}
MALFORMED = {  # {x} is the right answer
  "empty": "",
  "space": " \n",
  "no_box": "The answer is {x}.",
  "not_closed": "So \\boxed{{x}",
  "empty_box": "\\boxed{}",
  "blank_box": "\\boxed{  }",
  "inside_thinking": "<think> \\boxed{{x}}",
  "before_thinking_ends": "<think>\\boxed{{x}}</think> Done.",
  "nothing_after_hashes": "#### ",
  "too_long": "\\boxed{{x}" + "0" * 2000 + "}",
  "last_box_not_closed": "\\boxed{{x}} so \\boxed{",
}


@pytest.fixture(scope="module")
def env():
  env = MathQA(workers=1, time_s=20.0)
  yield env
  env.close()


def test_instruction_and_solution():
  task = MathQA().task_from_row(GSM8K, "train")
  assert MathQA().prompt(task) == [
    {
      "role": "user",
      "content": (
        "How many?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
      ),
    }
  ]
  assert task.solution == "2*9 = 18 eggs.\nThe answer is \\boxed{18}." and task.data == {
    "answer": "18"
  }
  other_task = MathQA().task_from_row(
    {
      "idx": 0,
      "prompt": "Give \\boxed{x}: 1+1?",
      "system": "Think.",
      "answer": 2,
      "dataset": "mine",
    },
    "test",
  )
  assert (
    MathQA().prompt(other_task)
    == [
      {"role": "system", "content": "Think."},
      {"role": "user", "content": "Give \\boxed{x}: 1+1?"},
    ]
    and other_task.id == "mine/test/0"
  )
  assert MathQA().task_from_row(
    {"idx": 0, "problem": "P", "solution": "So $\\boxed{\\frac{1}{2}}$."}, "test"
  ).data == {"answer": "\\frac{1}{2}"}


@pytest.mark.parametrize(
  "row, says",
  [
    ({"idx": 0, "question": "Q"}, "'solution' is missing"),
    ({"idx": 0, "answer": "1"}, "'prompt' is missing"),
    ({"idx": 0, "question": "Q", "answer": "so\n####"}, "'answer'"),
    ({"idx": 0, "question": "Q", "answer": True}, "'answer' is of type bool"),
    ({"idx": 0, "problem": "P", "solution": "\\boxed{"}, "'solution': It ends inside"),
    ({"idx": 0, "problem": "P", "solution": "Hence the result is 12."}, "'solution' has no"),
    ({"idx": 0, "problem": "P", "solution": ""}, "'solution' is"),
    ({"idx": 0, "problem": "P", "solution": "So \\boxed{ }."}, "'solution'.* is empty"),
    ({"idx": 0, "question": "Q", "answer": math.nan}, "'answer' is missing"),
    ({"idx": 0, "question": "Q", "answer": math.inf}, "'answer' is inf"),
    ({"idx": 0, "question": "Q", "answer": "NaN"}, "'answer' is 'NaN'"),
    ({"idx": 0, "question": "Q", "answer": None}, "'answer' is missing"),
    ({"idx": 0, "question": "Q", "answer": "$$"}, "'answer' is '\\$\\$', which is no answer"),
    ({"idx": 0, "question": "Q", "answer": r"\text{ }."}, "which is no answer"),
    ({"idx": 0, "question": "Q", "answer": "{"}, "which is no answer"),
    ({"idx": 0, "problem": "P", "solution": r"\boxed{\text{}}"}, "which is no answer"),
    ({"idx": 0, "question": "Q", "answer": 10**5000}, "'answer' has more than 1000 digits"),
    ({"idx": 0, "question": "Q", "answer": ["5"]}, "'answer' is of type list"),
    ({"idx": 0, "question": "Q", "answer": "5", "system": 3}, "'system' is of type int"),
  ],
)
def test_a_malformed_row_names_its_field(row, says):
  with pytest.raises(ValueError, match=says):
    MathQA().task_from_row(row, "train")


@pytest.mark.parametrize("answer", [r"\{\}", r"\emptyset", "<", r"\text{x}", r"\pi", "()"])
def test_an_answer_of_few_signs_is_one(answer):
  task = MathQA().task_from_row({"idx": 0, "question": "Q", "answer": answer}, "train")
  assert task.data["answer"] == answer


@pytest.mark.parametrize(
  "response, answer",
  [
    ("\\boxed{5}", "5"),
    ("\\boxed{4} no, \\boxed{5}", "5"),
    ("$\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("so\n#### 18\n", "18"),
    ("#### 1\nthen \\boxed{2}", "2"),
    ("<think>\\boxed{1}</think>\\boxed{2}", "2"),
    ("$\\boxed {7}$", "7"),
    ("so $\\boxed 7$.", "7"),
    ("\\(\\boxed 42\\)", "42"),
    ("\\boxed 7.", "7"),
    ("$\\boxed\\frac12$", "\\frac12"),
    ("\\fbox{7}", "7"),
    ("\\framebox {7}", "7"),
    ("\\boxed{3} and then \\fbox{7}", "7"),
    ("\\boxed{x = \\boxed{7}}", "x = \\boxed{7}"),
    ("\\boxed{ oh \\boxed{7}", "7"),
    ("\\boxed{a\\\\}", "a\\\\"),
    ("\\boxed{\\}7\\{}", "\\}7\\{"),
    ("#### 1\nthen \\boxed 2", "2"),
  ],
)
def test_extract(response, answer):
  assert extract(response) == (answer, "")


@pytest.mark.parametrize(
  "row, answer",
  [
    ({"answer": 1e21}, "1000000000000000000000"),
    ({"answer": 4e-07}, "0.0000004"),
    ({"answer": 4e-07}, "4\\times 10^{-7}"),
    ({"answer": "2400"}, "2.4e3"),
    ({"answer": 0.1 + 0.2}, "0.3"),
    ({"answer": 2 / 3}, "\\frac{2}{3}"),
    ({"answer": 12.0}, "12"),
    ({"answer": "$\\boxed 7$"}, "7"),
    ({"answer": None, "solution": "So \\fbox{7}."}, "7"),
    ({"answer": math.nan, "solution": "So $\\boxed 7$."}, "7"),
    ({"solution": "Seven.\n#### 7"}, "7"),
  ],
)
def test_an_answer_of_a_row_can_be_given(row, answer):
  env = MathQA()
  task = env.task_from_row({"idx": 0, "problem": "P"} | row, "train")
  assert env.judge(task, f"\\boxed{{{answer}}}").reward == 1.0
  assert env.judge(task, task.solution).reward == 1.0
  assert env.judge(task, "\\boxed{8}").reward == 0.0


@pytest.mark.parametrize(
  "text", ["\\boxed", "\\boxed ", "\\fbox{}", "\\boxed{7} \\boxed", "\\boxed{{7}"]
)
def test_a_box_without_content_is_no_answer(text):
  assert extract(text)[0] == "" and "\\boxed{" in extract(text)[1]


@pytest.mark.parametrize(
  "text, value",
  [
    ("18", 18),
    ("-10", -10),
    ("1,080", 1080),
    ("\\$1{,}080.50", 1080.5),
    ("$18$", 18),
    (".5", 0.5),
    ("18.", 18),
    ("+3", 3),
    ("1,08", None),
    ("", None),
    (".", None),
    ("-", None),
    ("1/2", None),
    ("x", None),
    ("18 eggs", None),
    ("1e5", None),
    ("²", None),
    ("9" * 5000, None),
    ("1 2", None),
    ("1_0", None),
  ],
)
def test_plain_numbers(text, value):
  assert number(text) == value


def test_equal_answers_in_a_worker(env):
  equal = [
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "1/2"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("(1, 2)", "(1,2)"),
    ("x^2+2x+1", "(x+1)^2"),
    ("18", "18\\text{ eggs}"),
    ("\\{1,2\\}", "\\{2,1\\}"),
  ]
  different = [
    ("\\frac{1}{2}", "\\frac{1}{3}"),
    ("x+1", "x+2"),
    ("(1, 2)", "(2, 1)"),
    ("18", "19 eggs"),
    ("5", "\\text{none}"),
    ("[0,1]", "(0,1)"),
    ("5", "}{"),
    ("5", "__import__('os')"),
  ]
  assert [env.same(a, b) for a, b in equal] == [True] * len(equal)
  assert [env.same(a, b) for a, b in different] == [False] * len(different)


def test_white_space_between_numbers_counts(env):
  assert env.same("21/2", "2 1/2") is False and env.same("x +  1", "x + 1\n") is True


def test_a_comparison_that_hangs_is_killed_and_the_next_one_works(env):
  task = env.task_from_row({"idx": 0, "question": "Q", "answer": "\\frac{1}{2}"}, "train")
  # starts the worker and has it load everything
  assert env.judge(task, "\\boxed{0.5}").reward == 1.0
  env.time_s = 1.0
  begun = time.monotonic()
  feedback = env.judge(task, "\\boxed{9^{9^{9^{9}}} - 3}")
  env.time_s = 20.0
  assert feedback.reward == 0.0 and (
    feedback.status is Status.TIMEOUT
    and "too complicated" in feedback.text
    and time.monotonic() - begun < 15.0
  )
  assert env.judge(task, "\\boxed{\\frac{2}{4}}").reward == 1.0


def test_judges_from_threads_share_the_workers(env):
  task = env.task_from_row({"idx": 0, "question": "Q", "answer": "\\frac{1}{2}"}, "train")
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    rewards = list(
      pool.map(lambda i: env.judge(task, f"\\boxed{{\\frac{{{i}}}{{6}}}}").reward, range(1, 6))
    )
  assert rewards == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_workers_that_do_not_start_are_our_failure(monkeypatch):
  monkeypatch.setattr("sdpo_jax.envs.math_qa.math_worker.__file__", "/nowhere.py")
  broken = MathQA(workers=1)
  task = broken.task_from_row({"idx": 0, "question": "Q", "answer": "x"}, "train")
  for _ in range(2):  # the place is given back
    with pytest.raises(RuntimeError, match="did not start"):
      broken.judge(task, "\\boxed{y}")
  with pytest.raises(RuntimeError, match="did not start"):
    broken.open()


def test_a_slow_start_is_no_failed_judgement(monkeypatch):
  """Workers started before the first judge do judge; a new one comes up within a judge's time."""
  env = MathQA(workers=2, time_s=20.0)
  env.open()
  try:
    monkeypatch.setattr("sdpo_jax.envs.math_qa.math_worker.__file__", "/nowhere.py")
    task = env.task_from_row({"idx": 0, "question": "Q", "answer": "\\frac{1}{2}"}, "train")
    assert [env.judge(task, "\\boxed{\\frac{2}{4}}").reward for _ in range(3)] == [1.0] * 3
  finally:
    env.close()
  assert RESTART_S + MathQA().time_s < config.base().rollout.judge_timeout_s


@pytest.mark.parametrize("setting", [{"time_s": math.nan}, {"time_s": math.inf}, {"memory_mb": 0}])
def test_limits_are_finite(setting):
  with pytest.raises(ValueError, match=next(iter(setting))):
    MathQA(**setting)


def test_that_an_answer_is_wrong_is_said_only_when_asked():
  task = MathQA().task_from_row(GSM8K, "train")
  assert MathQA().judge(task, "\\boxed{17}").text == ""
  assert (
    MathQA(tell_correctness=True).judge(task, "\\boxed{17}").text
    == "The final answer 17 is not correct."
  )


@needs_data
def test_every_gsm8k_row_right_wrong_and_malformed():
  env = MathQA(tell_correctness=True)
  rows = right = malformed = wrong = 0
  for split in ("train", "test"):
    with open(os.path.join(_DATA, f"gsm8k.{split}.jsonl"), encoding="utf-8") as lines:
      for index, line in enumerate(lines):
        row = {"idx": index} | json.loads(line)
        task = env.task_from_row(row, split)
        rows += 1
        answer = task.data["answer"]
        right += all(
          env.judge(task, text).reward == 1.0
          for text in (
            task.solution,
            row["answer"],
            f"\\boxed{{{answer}.00}}",
            f"\\boxed{{\\${answer}}}",
          )
        )
        for text in MALFORMED.values():
          feedback = env.judge(task, text.replace("{x}", answer))
          malformed += (
            feedback.reward == 0.0
            and feedback.status is Status.SCORED
            and "\\boxed{}" in feedback.text
          )
        feedback = env.judge(task, f"\\boxed{{{number(answer) + 1}}}")
        wrong += feedback.reward == 0.0 and "not correct" in feedback.text
  assert (rows, right, malformed, wrong) == (2000, 2000, 2000 * len(MALFORMED), 2000)
