"""Batches that are sampled ahead: what they are, and that a resumed run repeats them."""

import threading
import time

from absl.testing import flagsaver
import grain  # noqa: F401 - defines flags: imported first inside flagsaver, it would lose them
import jax
import numpy as np
import pytest

from sdpo_jax import errors, main, metrics, preemption, train
from sdpo_jax.ahead import Ahead
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.records import (
  Completion,
  Feedback,
  Request,
  Rollout,
  Sampling,
  Segment,
  Status,
  Task,
)
from sdpo_jax.stored import restored, stored
from tests.test_decoder import QWEN, params_of

ARGS = [
  "--config=configs/tinycode.py:local",
  "--config.rollout.lag=1",
  "--config.mesh.fsdp=1",
  "--config.total_steps=5",
  "--config.eval.every_steps=4",
  "--config.eval.questions=2",
  "--config.eval.samples=1",
  "--config.checkpoint.every_steps=2",
  "--config.optimizer.warmup_steps=0",
  "--config.train.max_rollout_gap=10.0",
  "--config.optimizer.lr=0.003",  # so that weights of another step sample something else
]


def run(workdir, *more):
  with flagsaver.flagsaver():
    return main.main(["main", *ARGS, f"--workdir={workdir}", *more])


def lines(workdir):
  return [metrics.reproducible(line) for line in metrics.read(workdir)]


@pytest.fixture(scope="module")
def sampled():
  """What the collector was asked for: (step that it is for, copy of a weight)."""
  return []


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sampled):
  workdir = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as patch:
    kept = train.Steps._collect

    def spy(self, params, tasks, i, *, version):
      weight = np.array(jax.tree.leaves(params)[0])
      groups = kept(self, params, tasks, i, version=version)
      sampled.append((i, version, weight, np.array(jax.tree.leaves(params)[0])))
      return groups

    patch.setattr(train.Steps, "_collect", spy)
    assert run(workdir) == 0
  return workdir


def test_each_batch_but_the_first_is_one_update_old(whole, sampled):
  assert [(i, version) for i, version, *_ in sampled] == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3)]
  assert [line["rollout/lag"] for line in lines(whole)[1:]] == [0, 1, 1, 1, 1]
  weights = [before for _, _, before, _ in sampled]
  # a step does not overwrite the weights that are being sampled from
  assert all(np.array_equal(before, after) for _, _, before, after in sampled)
  assert np.array_equal(weights[0], weights[1]) and not np.array_equal(weights[1], weights[2])
  gaps = [line["train/rollout_gap"] for line in lines(whole)[1:]]
  assert gaps[0] < 1e-4 < min(gaps[1:])  # the update between shows


@pytest.mark.parametrize("end", ["killed", pytest.param("asked to stop", marks=pytest.mark.slow)])
def test_a_resumed_run_repeats_what_was_sampled_ahead(whole, tmp_path, monkeypatch, end):
  write, has_ended = train.Steps.write, []

  def write_and_end(self, i, values):
    write(self, i, values)
    if i == 3 and end == "killed":
      raise errors.RunError("the process ends here")
    has_ended.append(i)

  def check(self):
    if 3 in has_ended and end != "killed":
      raise errors.Preempted("asked to stop")

  with monkeypatch.context() as patch:
    patch.setattr(train.Steps, "write", write_and_end)
    patch.setattr(preemption.Notice, "check", check)
    assert run(tmp_path) == (1 if end == "killed" else 143)
  assert run(tmp_path) == 0
  if end == "killed":  # at step 3, behind the checkpoint of step 2
    assert lines(tmp_path) == lines(whole)
  else:  # what was on its way is sampled anew
    resumed, expected = lines(tmp_path), lines(whole)
    assert resumed[:4] == expected[:4] and len(resumed) == len(expected)
    assert [line["rollout/lag"] for line in resumed[4:]] in ([0, 1], [1, 1])


def test_rollouts_come_back_as_they_were():
  task = Task("a", "What?")
  completion = Completion(0, 1, [5, 7], [-0.1, float(np.float32(-1 / 3))], "stop", version=3)
  feedback = Feedback(0.5, "no", Status.TIMEOUT)
  rollout = Rollout(
    task, [1, 2], [5, 7], completion.logp, "stop", "ab", feedback, sampled=[Segment(0, completion)]
  )
  assert restored([task], stored([[rollout]])) == [[rollout]]


def test_what_is_not_there_yet_is_abandoned():
  interrupted = threading.Event()

  def collect():
    assert interrupted.wait(5)
    raise errors.Preempted("interrupted")

  ahead = Ahead(None, collect, interrupted.set)
  assert ahead.groups_now() is None
  ready = Ahead(None, lambda: [["group"]], pytest.fail)
  assert ready.groups() == ready.groups_now() == [["group"]]
  ready.abandon()


def test_an_engine_can_be_interrupted_in_another_thread():
  engine = LocalEngine(QWEN, rows=2, chunk=4, columns=8)
  engine.load(params_of(QWEN), 0)
  requests = [Request(i, [1, 2, 3], 1, Sampling(5), seed=i) for i in range(8)]
  completions = engine.generate(requests)
  next(completions)
  threading.Thread(target=engine.interrupt).start()
  with pytest.raises(errors.Preempted):
    for _ in completions:
      time.sleep(0.05)
  with pytest.raises(errors.Preempted):
    next(engine.generate(requests))


def test_what_ends_the_collection_is_raised_where_it_is_awaited():
  def fail():
    raise errors.TaskError("too long")

  ahead = Ahead(None, fail)
  with pytest.raises(errors.TaskError, match="too long"):
    ahead.groups()


def test_it_needs_a_device_of_its_own_and_a_batch_in_one_piece(tmp_path, capsys):
  assert run(tmp_path / "a", "--config.mesh.fsdp=2", "--config.mesh.data=4") == 2
  assert (
    "config.rollout.lag=1 is for one process that samples on servers" in capsys.readouterr().err
  )
  assert run(tmp_path / "b", "--config=configs/tinycode.py:local,method=counterfactual") == 2
  assert "are sampled after their batch: use lag=0" in capsys.readouterr().err
