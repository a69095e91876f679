"""Multiple choice: rows of three sets, the form of answers, and every SciKnowEval row."""

import glob
import json
import os
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from sdpo_jax.envs.mcq import MCQ, extract
from sdpo_jax.records import Feedback, Status

_DATA = os.environ.get("SDPO_JAX_DATA")
needs_data = pytest.mark.skipif(_DATA is None, reason="SDPO_JAX_DATA is unset: no SciKnowEval rows")

PAPER = {
  "idx": 7,
  "kind": "mcq",
  "dataset": "sciknoweval",
  "answer": "B",
  "system": "Pick.",
  "prompt": "C: is no option here\nWhich?\n\nA: 1\n\nB: 2\nPlease reason step by step.",
}
MMLU_PRO = {
  "idx": 0,
  "question_id": 70,
  "question": "Which?",
  "options": [f"option {i}" for i in range(10)],
  "answer": "J",
  "answer_index": 9,
  "category": "law",
}
GPQA = {
  "idx": 3,
  "Record ID": "rec1",
  "Question": "Which?",
  "Correct Answer": "right\n",
  "Incorrect Answer 1": "w1",
  "Incorrect Answer 2": "w2",
  "Incorrect Answer 3": "w3",
}

MALFORMED = {  # ten kinds of response without a usable answer; {x} is the right letter
  "empty": "",
  "space": " \n ",
  "no_tags": "The answer is {x}.",
  "not_closed": "<reasoning>r</reasoning>\n<answer>\n{x}",
  "empty_answer": "<answer>\n</answer>",
  "restated": "<answer>\n{x}: the text\n</answer>",
  "two_letters": "<answer>\n{x}, A\n</answer>",
  "no_option": "<answer>Z</answer>",
  "small_letter": "<answer>{small}</answer>",
  "inside_thinking": "<think> I say <answer>{x}</answer>",
  "before_thinking_ends": "<think><answer>{x}</answer></think> Done.",
  "opened_again": "<answer>{x}</answer> or rather <answer>",
}


def fill(text, letter):
  return text.replace("{x}", letter).replace("{small}", letter.lower())


def test_rows_of_the_paper_are_asked_as_they_are():
  task = MCQ().task_from_row(PAPER, "test")
  assert MCQ().prompt(task) == [
    {"role": "system", "content": "Pick."},
    {"role": "user", "content": PAPER["prompt"]},
  ]
  assert (
    task.id == "sciknoweval/test/7"
    and task.data == {"answer": "B", "letters": "AB"}
    and task.split == "test"
  )


def test_mmlu_pro_has_ten_options():
  env = MCQ()
  task = env.task_from_row(MMLU_PRO, "test")
  system, user = env.prompt(task)
  assert (
    "ten options" in system["content"] and "(A, B, C, D, E, F, G, H, I, or J)" in system["content"]
  )
  assert (
    user["content"].startswith("Which?\n\nA: option 0\nB: option 1\n")
    and "\nJ: option 9\nPlease reason" in user["content"]
  )
  assert (
    env.judge(task, "<answer>J</answer>").reward == 1
    and env.judge(task, "<answer>A</answer>").reward == 0
  )
  assert task.id == "mmlu_pro/test/70"


def test_the_index_of_mmlu_pro_names_the_letter():
  """Its public rows have both; the letters A to J follow the number of options."""
  row = {key: value for key, value in MMLU_PRO.items() if key != "answer"}
  for count in range(2, 11):
    changed = row | {"options": MMLU_PRO["options"][:count], "answer_index": count - 1}
    task = MCQ().task_from_row(changed, "test")
    assert task.data["answer"] == "ABCDEFGHIJ"[count - 1] and task.data["kind"] == "law"
    for index in (count, -1):
      says = f"'answer_index' is {index}, not a number from 0 to {count - 1}"
      with pytest.raises(ValueError, match=says):
        MCQ().task_from_row(changed | {"answer_index": index}, "test")
  assert "kind" not in MCQ().task_from_row(row | {"category": None}, "test").data


def test_the_extracted_answer_is_the_letter_or_nothing():
  task = MCQ().task_from_row(MMLU_PRO, "test")
  assert MCQ().answer(task, "Hm.\n<answer>\nC\n</answer>") == "C"
  assert MCQ().answer(task, "It is C.") is None


def test_gpqa_places_depend_on_the_record_alone():
  tasks = [MCQ().task_from_row(GPQA | {"Record ID": f"rec{i}"}, "train") for i in range(40)]
  assert [t.data["answer"] for t in tasks] == [
    MCQ().task_from_row(GPQA | {"Record ID": f"rec{i}"}, "test").data["answer"] for i in range(40)
  ]
  assert {t.data["answer"] for t in tasks} == set("ABCD")
  for task in tasks:
    assert f"\n{task.data['answer']}: right\n" in task.prompt and sorted("ABCD") == sorted(
      line[0] for line in task.prompt.split("\n") if line[1:2] == ":"
    )


@pytest.mark.parametrize(
  "row, says",
  [
    (PAPER | {"answer": "C"}, "'answer'"),
    (PAPER | {"answer": None}, "'answer' is missing"),
    (PAPER | {"answer": 2}, "'answer' is of type int"),
    (PAPER | {"prompt": "Which?"}, "'prompt' has no options"),
    (PAPER | {"prompt": ""}, "'prompt' is empty"),
    (PAPER | {"kind": "tooluse"}, "'kind'"),
    (MMLU_PRO | {"answer_index": 3}, "'answer_index'"),
    (MMLU_PRO | {"options": ["only"]}, "'options'"),
    (MMLU_PRO | {"options": "ABC"}, "'options' is of type str"),
    (GPQA | {"Incorrect Answer 2": " "}, "'Incorrect Answer 2' is empty"),
  ],
)
def test_a_malformed_row_names_its_field(row, says):
  with pytest.raises(ValueError, match=says):
    MCQ().task_from_row(row, "train")


@pytest.mark.parametrize(
  "response",
  [
    "<answer>B</answer>",
    "<reasoning>\nA is wrong.\n</reasoning>\n<answer>\nB\n</answer>",
    "<answer>A</answer> No: <answer> B </answer>",
    "<think><answer>A</answer></think><answer>B</answer>",
    "the thought went before</think>\n<answer>B</answer>",
  ],
)
def test_right_answers(response):
  assert MCQ().judge(MCQ().task_from_row(PAPER, "test"), response).reward == 1


def test_that_a_letter_is_wrong_is_said_only_when_asked():
  task = MCQ().task_from_row(PAPER, "test")
  assert MCQ().judge(task, "<answer>A</answer>").text == ""
  assert (
    MCQ(tell_correctness=True).judge(task, "<answer>A</answer>").text
    == "The answer A is not correct."
  )


def test_extract_says_what_is_wrong():
  faults = {name: extract(fill(text, "B"), "AB")[1] for name, text in MALFORMED.items()}
  assert (
    "empty" in faults["empty"]
    and "no <answer>" in faults["no_tags"]
    and "not closed" in faults["not_closed"]
    and "not closed" in faults["opened_again"]
  )
  assert (
    faults["empty_answer"] == "The answer is empty."
    and "'Z' is not the letter" in faults["no_option"]
    and "thinking" in faults["inside_thinking"]
  )


LOOSE = "B b (B) [b] {B} B. b. (b). B: B) **B** **(B).** Ｂ".split() + ["\n b \n", "** B **"]


@pytest.mark.parametrize("answer", LOOSE)
def test_the_loose_rule_takes_a_letter_in_its_usual_dress(answer):
  exact, loose = MCQ(), MCQ(letters="loose")
  task = loose.task_from_row(PAPER, "test")
  assert loose.judge(task, f"<answer>{answer}</answer>").reward == 1
  assert exact.judge(task, f"<answer>{answer}</answer>").reward == (answer.strip() == "B")
  wrong = answer.replace("B", "A").replace("b", "a").replace("Ｂ", "Ａ")
  assert loose.judge(task, f"<answer>{wrong}</answer>") == Feedback(0.0, "")


@pytest.mark.parametrize(
  "answer", ["BB", "B b", "B or A", "(B", "(B]", "((B))", "B..", "Z", "z.", "c", "()", "**", "B!"]
)
@pytest.mark.parametrize("rule", ["exact", "loose"])
def test_no_rule_takes_more_than_a_letter(answer, rule):
  env = MCQ(letters=rule)
  feedback = env.judge(env.task_from_row(PAPER, "test"), f"<answer>{answer}</answer>")
  assert feedback.reward == 0 and "is not the letter of an option" in feedback.text


@pytest.mark.parametrize("answer", ["b", "(B)", "B.", "[b]"])
@pytest.mark.parametrize("row", [PAPER, MMLU_PRO | {"answer_index": 1}])
def test_rows_are_read_by_the_same_rule(row, answer):
  assert MCQ(letters="loose").task_from_row(row | {"answer": answer}, "test").data["answer"] == "B"
  with pytest.raises(ValueError, match="'answer"):
    MCQ().task_from_row(row | {"answer": answer}, "test")


@pytest.mark.parametrize("lines", ["A. 1\nB. 2", "(a) 1\n(b) 2", "[A] 1\n[B] 2", "a) 1\nb) 2"])
def test_options_in_other_forms(lines):
  row = PAPER | {"prompt": f"A good question. Which?\n{lines}\nA word at the end."}
  assert MCQ(letters="loose").task_from_row(row, "test").data["letters"] == "AB"
  with pytest.raises(ValueError, match="'prompt' has no options"):
    MCQ().task_from_row(row, "test")


def test_a_rule_that_does_not_exist():
  with pytest.raises(ValueError, match="config.env.letters='any' is unknown; choose from"):
    MCQ(letters="any")


@pytest.mark.parametrize(
  "change, says",
  [
    ({"answer_index": 9.0}, None),
    ({"answer_index": float("nan")}, None),
    ({"answer_index": 9.5}, "'answer_index' is 9.5"),
    ({"answer_index": True}, "'answer_index' is True"),
    ({"answer_index": "9"}, "'answer_index' is '9'"),
    ({"answer_index": -1}, "'answer_index' is -1"),
    ({"options": ["a", None] + ["b"] * 8}, "'options' must hold"),
    ({"options": ["a", float("nan")] + ["b"] * 8}, "'options' must hold"),
    ({"options": ["a", " "] + ["b"] * 8}, "'options' must hold"),
  ],
)
def test_numbers_and_options_of_mmlu_pro(change, says):
  if says is None:
    assert MCQ().task_from_row(MMLU_PRO | change, "test").data["answer"] == "J"
  else:
    with pytest.raises(ValueError, match=says):
      MCQ().task_from_row(MMLU_PRO | change, "test")


def responses():
  """Random texts, and answers with random changes."""
  pieces = st.sampled_from(
    [
      "<answer>",
      "</answer>",
      "<think>",
      "</think>",
      "A",
      "b",
      "(",
      ")",
      "**",
      ".",
      "\n",
      "\0",
      "Ｂ",
    ]
  )
  return st.lists(st.one_of(pieces, st.text(max_size=8)), max_size=20).map("".join)


def judges_anything(examples):
  @settings(max_examples=examples, deadline=None, database=None)
  @given(responses(), st.sampled_from(["exact", "loose"]), st.booleans())
  def check(response, rule, tell):
    env = MCQ(letters=rule, tell_correctness=tell)
    feedback = env.judge(env.task_from_row(PAPER, "test"), response)
    assert feedback.reward in (0.0, 1.0) and feedback.status is Status.SCORED
    if feedback.reward:
      assert re.search(r"[bBＢ]", response) and feedback.text == ""

  check()


def test_any_response_ends_in_feedback():
  judges_anything(200)


@pytest.mark.slow
def test_ten_thousand_responses_end_in_feedback():
  judges_anything(10_000)


@needs_data
def test_every_row_right_wrong_and_malformed():
  env, telling_env = MCQ(), MCQ(tell_correctness=True)
  rows = right = malformed = wrong = 0
  for path in sorted(glob.glob(os.path.join(_DATA, "sciknoweval", "*.jsonl"))):
    split = path.split(".")[-2]
    with open(path, encoding="utf-8") as lines:
      for line in lines:
        task = env.task_from_row(json.loads(line), split)
        rows += 1
        answer = task.data["answer"]
        right += env.judge(task, f"<reasoning>\n...\n</reasoning>\n{task.solution}").reward == 1.0
        for text in MALFORMED.values():
          feedback = env.judge(task, fill(text, answer))
          malformed += (
            feedback.reward == 0.0
            and feedback.status is Status.SCORED
            and "<answer>" in feedback.text
          )
        for letter in set(task.data["letters"]) - {answer}:
          feedback = telling_env.judge(task, f"<answer>{letter}</answer>")
          wrong += (
            feedback.reward == 0.0
            and letter in feedback.text
            and answer not in feedback.text.removeprefix("The answer")
          )
  assert (rows, right, malformed) == (4335, 4335, 4335 * len(MALFORMED)), (rows, right, malformed)
  assert wrong == 4135 * 3 + 200  # 200 rows have two options
