"""What an environment has to provide is looked at before a run begins."""

import pytest

from sdpo_jax.envs.base import make_env
from tests.my_env import ReverseWord


class NoJudge:
  def task(self, split, index): ...

  def prompt(self, task): ...

  def juge(self, task, response): ...


class NoTask:
  def prompt(self, task): ...

  def judge(self, task, response): ...


class Player:
  """A world shows its own prompt, and judges itself."""

  def task_from_row(self, row, split): ...

  def start(self, task): ...


@pytest.mark.parametrize(
  "name, message",
  [
    ("NoJudge", r"NoJudge has no judge\(task, response\) and no start\(task\); .*envs/base.py"),
    ("NoTask", r"NoTask has no task\(split, index\) and no task_from_row\(row, split\);"),
  ],
)
def test_an_environment_that_lacks_something_is_refused(name, message):
  with pytest.raises(ValueError, match=message) as refusal:
    make_env(f"tests.test_envs:{name}", sandbox=None)
  assert "\n" not in str(refusal.value)


def test_one_that_lacks_nothing_is_made():
  assert make_env("tests.test_envs:Player", sandbox=None)
  assert isinstance(make_env("tests.my_env:ReverseWord", sandbox=None, length=3), ReverseWord)
