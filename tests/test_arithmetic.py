"""Arithmetic: the judge executes the steps and says where they go off, as pre-training showed."""

import random

import pytest

from sdpo_jax.data.corpus import DOMAINS, Corpus, build_tokenizer
from sdpo_jax.envs import arithmetic, composed
from sdpo_jax.records import Task

ENV = arithmetic.Arithmetic()
TASK = Task("t", "", data={"numbers": [7, 14, 9]})  # 7 doubled, then minus five
RIGHT = "7 * 2 = 14\n14 - 5 = 9\n\\boxed{9}"


@pytest.mark.parametrize("level", composed.LEVELS)
def test_references_score_one_and_another_composition_scores_zero(level):
  env, rng = arithmetic.Arithmetic(level=level), random.Random(0)
  for split in composed.SPLITS:
    if level == "easy" and split == "unseen":
      continue
    for i in range(40):
      task = env.task(split, i)
      assert env.judge(task, task.solution).reward == 1.0
      numbers = task.data["numbers"]
      other = [rng.choice(list(arithmetic.OPS)) for _ in task.data["ops"]]
      judged = env.judge(task, arithmetic.program(other, numbers[0]))
      assert judged.reward == float(arithmetic.chain(other, numbers[0])[-1] == numbers[-1])
      assert (judged.text == "") == (judged.reward == 1.0)


@pytest.mark.parametrize(
  "response, says",
  [
    ("7 * 2 = 15\n15 - 5 = 10\n\\boxed{10}", "Step 1: 7 * 2 is 14, not 15."),
    ("7 * 2 = 14\n13 - 5 = 8\n\\boxed{8}", "Step 2 does not go on from 14."),
    ("7 * 2 = 14\n14 + 5 = 19\n\\boxed{19}", "Step 2: 14 came to 19.\nExpected: 9"),
    ("7 + 3 = 10\n10 - 5 = 5\n\\boxed{5}", "Step 1: 7 came to 10.\nExpected: 14"),
    ("7 * 2 = 14\n14 - 5 = 9\n\\boxed{8}", "The box says 8, the steps come to 9."),
    ("7 * 2 = 14\n\\boxed{14}", "There are 1 steps.\nExpected: 2"),
    ("7 // 0 = 1\n\\boxed{1}", "divides by zero"),
    ("7 * 2 = 14\n14 - 5 = 9", "result in a box"),
    ("", "result in a box"),
    ("seven\n\\boxed{8}", "Step 1 is not a calculation"),
    ("__import__('os')\n\\boxed{8}", "is not a calculation"),
    ("7 * 2 = 14\n14 - 5 = 9\n\\boxed{x}", "result in a box"),
    ("\\boxed{99999999999999}", "result in a box"),
  ],
)
def test_feedback_says_where_the_steps_go_off(response, says):
  judged = ENV.judge(TASK, response)
  assert judged.reward == 0.0 and says in judged.text


def test_the_number_in_the_last_box_is_what_counts():
  assert (
    ENV.judge(TASK, RIGHT).reward
    == ENV.judge(TASK, "It is \\boxed{3}, no, \\boxed{9}.").reward
    == 1.0
  )
  for wrong in (
    "\\boxed{9} or \\boxed{3}",
    "\\boxed{9}, no, \\boxed{x}",
    "\\boxed{9}, or \\boxed{9.5}",
    "\\boxed{9} \\boxed{",
    "\\boxed{90}",
    "\\boxed{9",
    "9",
  ):
    assert ENV.judge(TASK, wrong).reward == 0.0
  for right in (
    "\\boxed{ 9 }",
    "\\boxed 9",
    "\\fbox{9}",
    "\\boxed{9.0}",
    "\\boxed{+9}",
    "\\boxed{\\text{9}}",
  ):
    assert ENV.judge(TASK, right).reward == 1.0
  negative = Task("t", "", data={"numbers": [1, -9]})
  assert ENV.judge(negative, "\\boxed{−9}").reward == 1.0  # U+2212
  assert ENV.judge(negative, "\\boxed{9}").reward == 0.0


def test_pre_training_shows_what_the_judge_says():
  """Feedback in the corpus is the judge's on the failed attempt; a few tokens write any text."""
  corpus, tokenizer = Corpus(DOMAINS["arithmetic"][0]), build_tokenizer("arithmetic")
  lengths = []
  for i in range(200):
    p = corpus.problem(0, i)
    assert (
      ENV.judge(
        Task("t", "", data={"numbers": arithmetic.chain(p.ops, p.details["start"])}), p.response
      ).reward
      == 1.0
    )
    for text in (p.message, p.response):
      assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    lengths.append(len(tokenizer(p.response)["input_ids"]))
  assert sum(lengths) / len(lengths) < 16
  seen = {corpus.problem(0, i).ops for i in range(400)}
  unseen = {
    tuple(composed.Problems(arithmetic.DOMAIN).task("unseen", i).data["ops"]) for i in range(100)
  }
  assert not seen & unseen
