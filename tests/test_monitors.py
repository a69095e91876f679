"""Monitors: each sign is seen where it is and only there, and names settings that exist."""

import pathlib
import re

import pytest

from sdpo_jax import config, main, monitors, signs
from sdpo_jax.data.chat import Chat
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Feedback, Rollout, Task
from tests import fakes

TINYCODE = f"--config={pathlib.Path(__file__).parent.parent}/configs/tinycode.py"
HEALTHY = {
  "train/loss": 0.1,
  "train/loss_distill": 0.1,
  "train/reward": 0.4,
  "rollout/length": 200.0,
  "rollout/length_tail": 1.5,
  "rollout/truncated": 0.1,
  "train/entropy": 0.5,
  "train/teacher_gap_abs": 0.2,
  "data/teacher_share": 0.8,
  "data/copy_rate": 0.2,
}


def history(steps=30, **last):
  """A healthy run whose last third is otherwise; step 0 is an evaluation alone."""
  return [{"step": 0, "eval/test/avg@k": 0.1}] + [
    {"step": i} | HEALTHY | (last if i > steps - signs.WINDOW else {}) for i in range(1, steps + 1)
  ]


@pytest.mark.parametrize(
  "last, sign, says",
  [
    ({"rollout/length": 30.0}, "length", "from 200 to 30 tokens"),
    ({"train/reward": 0.2}, "reward", "fell from 0.400 to 0.200: "),
    (
      {"train/reward": 0.2, "train/loss_distill": 0.04},
      "reward",
      "fell from 0.400 to 0.200 while the divergence from the teacher fell from 0.1000 to 0.0400",
    ),
    ({"rollout/length_tail": 4.0}, "length_tail", "4.0 times the mean one, 1.5 times at first"),
    ({"rollout/truncated": 0.8}, "truncated", "80% of the responses"),
    ({"train/entropy": 0.01}, "entropy", "fell from 0.500 to 0.010"),
    ({"train/entropy": 2.0}, "entropy", "grew from 0.500 to 2.000"),
    ({"train/teacher_gap_abs": 1.0}, "gap", "drift apart"),
    ({"train/teacher_gap_abs": 0.001}, "gap", "hardly differ"),
    ({"data/teacher_share": 0.02}, "teacher_share", "only 2% of the responses"),
    ({"data/copy_rate": 0.9}, "copy_rate", "90% of what the responses say"),
  ],
)
def test_each_sign_is_seen_and_says_what_to_change(last, sign, says):
  seen = monitors.warnings(history(**last))
  assert list(seen) == [sign] and says in seen[sign]
  # too early to tell
  assert not monitors.warnings(history(steps=2 * signs.WINDOW - 1, **last))
  named = re.findall(r"(config(?:\.\w+)+)(?:=(\w+))?", seen[sign])
  rows = re.findall(r"(?<!\.)\bmethod=(\w+)", seen[sign])
  assert named or rows
  # each can be typed as it stands there; without a value, with the one that it has
  for row in rows:
    config.validate(main.parse(["main", f"{TINYCODE}:method={row}"])[1])
  for path, value in named:
    _, c = main.parse(["main", f"{TINYCODE}:method=sdpo"])
    for key in path.split(".")[1:]:
      c = c[key]
    _, c = main.parse(["main", f"{TINYCODE}:method=sdpo", f"--{path}={value or c}"])
    config.validate(c)


def test_a_routed_run_whose_responses_succeed_needs_no_teacher():
  """What counts is whether the others learn from anything."""

  def routed(neither):
    routes = {"data/teacher_share": 0.02, "route/neither": neither}
    return [line | routes for line in history()]

  assert not monitors.warnings(routed(0.0))
  said = monitors.warnings(routed(0.98))["teacher_share"]
  assert said.startswith("98% of the responses learn from nothing")


def test_a_healthy_run_and_one_that_improves_are_left_alone():
  assert monitors.warnings(history()) == {} and monitors.warnings([]) == {}
  # what success looks like
  better = {
    "train/reward": 0.7,
    "rollout/length": 30.0,
    "train/entropy": 0.01,
    "train/teacher_gap_abs": 0.001,
    "data/copy_rate": 0.9,
    # the longest responses are as long as before, the others are not
    "rollout/length_tail": 9.0,
  }
  assert monitors.warnings(history(**better)) == {}


def test_what_jumps_from_step_to_step_is_no_sign():
  """Rewards of few responses, and the length tail of responses of few tokens."""
  noisy = history(**{"train/reward": 0.3, "rollout/length_tail": 2.4})
  for i, line in enumerate(noisy[1:]):
    swing = -1 if i % 2 else 1
    line["train/reward"] += 0.2 * swing
    line["rollout/length_tail"] += swing
  assert monitors.warnings(noisy) == {}
  for line in noisy[1:11]:  # the first window alone is quiet
    line |= {"train/reward": 0.6, "rollout/length_tail": 1.5}
  assert set(monitors.warnings(noisy)) == {"reward", "length_tail"}


def evaluated(gains, split="heldout"):
  """A step 0 at 40 %, and an evaluation at every tenth step: (gain, low, high) each."""
  lines = [{"step": 0, f"eval/{split}/avg@k": 0.4}]
  for i, (gain, low, high) in enumerate(gains, start=1):
    values = {"avg@k": 0.4 + gain, "gain": gain, "gain_low": low, "gain_high": high}
    line = {f"eval/{split}/{name}": value for name, value in values.items()}
    lines.append({"step": 10 * i} | HEALTHY | line)
  return lines


def test_an_evaluation_below_the_base_model_is_seen_at_once_and_until_the_next():
  worse, unsure = (-0.2, -0.3, -0.1), (-0.2, -0.5, 0.1)
  lines = evaluated([unsure, worse])
  assert monitors.warnings(lines[:2]) == {}
  text = monitors.warnings(lines)["worse"]
  assert text.startswith(
    "eval/heldout/avg@k is 20.0% at step 20, the base model's 40.0%: "
    "on the same questions -20.0% [-30.0%, -10.0%]"
  )
  assert "teacher_weights.name=frozen" in text and "method=grpo" in text
  assert "worse" in monitors.warnings([*lines, {"step": 21} | HEALTHY])
  assert monitors.warnings(evaluated([worse, unsure])) == {}
  # of a split that is evaluated at the end alone as well
  lines[-1] |= evaluated([(0.1, 0.0, 0.2)], "unseen")[-1] | {"step": 20}
  assert "eval/heldout" in monitors.warnings(lines)["worse"]


def test_an_evaluation_below_the_best_one_is_seen():
  name = "eval/heldout/avg@k"
  scores = [(0, 0.2), (10, 0.6), (20, 0.7), (30, 0.55), (40, 0.4)]
  lines = [
    {"step": i, name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1} | HEALTHY
    for i, value in scores
  ]
  assert monitors.warnings(lines[:4]) == {}  # the intervals meet
  text = monitors.warnings(lines)["fallen"]
  assert text.startswith(f"{name} fell from 70.0% at step 20 to 40.0% [30.0%, 50.0%] at step 40: ")
  # the base model is no checkpoint
  lines[0][name] = 0.9
  assert monitors.warnings(lines) == {}


def test_rewards_alone_have_no_teacher_to_slow_down():
  lines = evaluated([(-0.2, -0.3, -0.1)])
  lines[-1].pop("train/loss_distill")
  assert "teacher" not in monitors.warnings(lines)["worse"]


def test_a_method_without_a_teacher_is_not_told_that_it_has_none():
  lines = [
    {k: v for k, v in line.items() if k not in ("train/loss_distill", "train/teacher_gap_abs")}
    for line in history(**{"data/teacher_share": 0.0})
  ]
  assert monitors.warnings(lines) == {}


def test_copy_rate_by_hand():
  chat = Chat(fakes.ByteTokenizer())

  def rollout(text):
    return Rollout(
      Task("t", "Q"),
      chat.text_tokens("the question is this"),
      chat.text_tokens(text),
      [],
      "stop",
      text,
      Feedback(0.0, ""),
    )

  # 5, 5, 3 and 0 n-grams of 8 bytes
  rows = [rollout("0123456789ab"), rollout("the question"), rollout("0123456789"), rollout("short")]
  contexts = [
    Context(solution="x0123456789"),
    Context(feedback="the question is this"),
    None,
    Context(solution="short"),
  ]
  rate = monitors.copy_rate(rows, contexts, chat)
  # 01234567, 12345678, 23456789; what stands in the question is not copied
  assert (rate.total, rate.count) == (3, 10)
  assert monitors.copy_rate(rows[2:3], [None], chat).mean is None


def test_a_teacher_that_knows_hardly_more_is_told_once_that_is_sure():
  def probed(gains, rewards=None):
    return [
      {"step": i, "train/loss": 1.0, "train/reward": 0.5 if rewards is None else rewards[i]}
      | {"probe/teacher_gain": gain}
      for i, gain in enumerate(gains)
    ]

  idle = [0.05, -0.05, 0.0, 0.05, -0.05]
  (said,) = monitors.warnings(probed(idle)).values()
  assert "the teacher knows hardly more" in said and "method=grpo" in said
  assert not monitors.warnings(probed(idle[:4]))
  # nothing is said of a good teacher, or of one of whom little is known
  assert not monitors.warnings(probed([0.3, 0.1, 0.5, 0.0, 0.3]))
  assert not monitors.warnings(probed([0.4, -0.4, 0.3, -0.3, 0.0]))
  # old probes do not count, and a policy that has caught up is no bad sign
  assert monitors.warnings(probed([0.9] * 5 + idle * 4))
  assert not monitors.warnings(probed([0.4] * 10 + idle * 2, [0.2] * 10 + [0.9] * 10))
