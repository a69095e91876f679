"""Monitors: each sign is seen where it is and only there, and names settings that exist."""

import pathlib
import re

import pytest

from sdpo_jax import config, main, monitors
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
  "rollout/truncated": 0.1,
  "train/entropy": 0.5,
  "train/teacher_gap_abs": 0.2,
  "data/teacher_share": 0.8,
  "data/copy_rate": 0.2,
}


def history(steps=30, **last):
  """A healthy run whose last third is otherwise; step 0 is an evaluation alone."""
  return [{"step": 0, "eval/test/avg@k": 0.1}] + [
    {"step": i} | HEALTHY | (last if i > steps - monitors.WINDOW else {})
    for i in range(1, steps + 1)
  ]


@pytest.mark.parametrize(
  "last, sign, says",
  [
    ({"rollout/length": 30.0}, "length", "from 200 to 30 tokens"),
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
  signs = monitors.warnings(history(**last))
  assert list(signs) == [sign] and says in signs[sign]
  # too early to tell
  assert not monitors.warnings(history(steps=2 * monitors.WINDOW - 1, **last))
  named = re.findall(r"(config(?:\.\w+)+)(?:=(\w+))?", signs[sign])
  rows = re.findall(r"(?<!\.)\bmethod=(\w+)", signs[sign])
  assert named or rows
  # each can be typed as it stands there; without a value, with the one that it has
  for row in rows or ["sdpo"]:
    for path, value in named:
      _, c = main.parse(["main", f"{TINYCODE}:method={row}"])
      for key in path.split(".")[1:]:
        c = c[key]
      _, c = main.parse(["main", f"{TINYCODE}:method={row}", f"--{path}={value or c}"])
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
  }
  assert monitors.warnings(history(**better)) == {}


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
