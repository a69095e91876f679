"""The memory of questions: what is kept, what goes first, and that a resumed run has all of it."""

import dataclasses
import json
import math
import socket

from absl.testing import flagsaver
import grain  # noqa: F401 - defines flags: imported first inside flagsaver, it would lose them
import pytest

from sdpo_jax import checkpoint, config, errors, main, metrics, preemption, train
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.shapes import Shapes
from sdpo_jax.data.tasks import TaskStream
from sdpo_jax.objectives import build
from sdpo_jax.objectives.memory import Questions, check_ids
from sdpo_jax.records import Feedback, Rollout, Status, Task
from tests import fakes, test_mesh


def response(text, reward, task="a", status=Status.SCORED):
  question = Task(task, f"question {task}")
  return Rollout(question, [1], [2], [-1.0], "stop", text, Feedback(reward, "", status))


def group(*rewards, task="a", visit=0):
  """Responses with these rewards and different texts; None: the judge failed."""
  texts = [f"{visit}.{i}" for i in range(len(rewards))]
  return [
    response(text, reward or 0.0, task, Status.ENV_FAILED if reward is None else Status.SCORED)
    for text, reward in zip(texts, rewards)
  ]


def through_json(state):
  return checkpoint._from_json(json.loads(json.dumps(checkpoint._to_json(state))))


def test_the_pass_rate_by_hand():
  memory = Questions(alpha=0.7)
  assert (memory.visit(group(1, 0, 0, 0)).pass_rate, memory.visit(group(1)).visits) == (0.25, 2)
  third = memory.visit(group(1, 0))
  assert third.pass_rate == pytest.approx(0.7 * (0.7 * 0.25 + 0.3 * 1) + 0.3 * 0.5)
  assert (third.visits, memory.visit(group(0, task="b")).visits) == (3, 1)
  assert Questions(0.9).visit(group(0.95, 0.8)).pass_rate == 0.5  # the threshold


def test_what_was_not_judged_does_not_count():
  memory = Questions()
  assert memory.visit(group(None, 1, 0, math.nan)).pass_rate == 0.5
  before = through_json(memory.state())
  standing = memory.visit(group(None, math.inf))
  assert (standing.pass_rate, standing.visits, standing.solutions) == (0.5, 1, ("0.1",))
  assert through_json(memory.state()) == before
  assert memory.visit(group(None, task="new")).visits == 0 == Questions().visit(group(None)).visits


@pytest.mark.parametrize(
  "replace, kept",
  [("reward", ("0.0", "0.1", "1.0")), ("oldest", ("1.1", "2.0", "2.1"))],
)
def test_equal_rewards_never_replace_each_other(replace, kept):
  """The rule as printed keeps the first successes for ever; "oldest" keeps the last ones."""
  memory = Questions(solutions=3, replace=replace)
  assert memory.visit(group(1, 1, 0)).solutions == ()  # those of this visit are for later ones
  assert memory.visit(group(1, 1, visit=1)).solutions == ("0.0", "0.1")
  memory.visit(group(1, 1, visit=2))
  assert memory.visit(group(0, visit=3)).solutions == kept


def test_a_higher_reward_takes_the_place_of_the_lowest():
  memory = Questions(solutions=2)
  memory.visit(group(0.6, 0.6))
  memory.visit(group(0.6, 0.7, visit=1))  # of equal ones the first goes
  assert memory.visit(group(0.65, visit=2)).solutions == ("0.1", "1.1")
  assert memory.visit(group(0.64, visit=3)).solutions == ("1.1", "2.0")
  assert memory.visit(group(1.0, visit=4)).solutions == ("1.1", "2.0")
  assert memory.visit(group(0.0)).solutions == ("1.1", "4.0")
  empty = Questions(solutions=0)
  empty.visit(group(1))
  assert empty.visit(group(1)).solutions == ()


def test_solutions_have_no_thought_and_differ():
  memory = Questions()
  memory.visit(
    [
      response("<think>hm</think> x", 1.0),
      response("x", 1.0),
      response("<think>hm, x", 1.0),
      response("y", 1.0),
    ]
  )
  assert memory.visit(group(0)).solutions == ("x", "y")


def test_beyond_the_bound_the_question_visited_longest_ago_loses_its_solutions():
  memory = Questions(megabytes=7e-6)  # of texts of 3 bytes: two fit
  for task in "abac":
    memory.visit(group(1, task=task))
  assert memory.metrics()["memory/solutions"] == 2 and memory.metrics()["memory/questions"] == 3
  assert memory.metrics()["memory/megabytes"] == pytest.approx(6e-6)
  assert memory.visit(group(0, task="b")).solutions == ()
  assert memory.visit(group(0, task="a")).solutions == ("0.0",)
  restored = Questions(megabytes=7e-6)  # as does the order of visits
  restored.restore(through_json(memory.state()))
  restored.visit(group(1, task="d"))
  assert restored.visit(group(0, task="c")).solutions == ()
  assert restored.visit(group(0, task="a")).solutions == ("0.0",)
  nothing = Questions(megabytes=0.0)
  nothing.visit(group(1))
  assert nothing.metrics()["memory/solutions"] == 0


def test_a_state_is_a_copy_and_all_there_is():
  memory, rounds = Questions(), [group(1, 0, visit=i, task="ab"[i % 2]) for i in range(6)]
  for each in rounds[:3]:
    memory.visit(each)
  state = memory.state()
  saved = through_json(state)
  standings = [memory.visit(each) for each in rounds[3:]]
  assert through_json(state) == saved != through_json(memory.state())
  again = Questions()
  again.restore(saved)
  assert [again.visit(each) for each in rounds[3:]] == standings
  assert through_json(again.state()) == through_json(memory.state())


def test_questions_have_ids_of_their_own():
  memory = Questions()
  memory.visit(group(1))
  with pytest.raises(errors.RunError, match="Task.id, and '' is that of none, 'question ' for one"):
    memory.visit(group(1, task=""))
  (other,) = group(1)
  other.task = dataclasses.replace(other.task, prompt="another one")
  with pytest.raises(errors.RunError, match="and 'a' is that of two, 'another one' for one"):
    memory.visit([other])
  check_ids(r.task for r in group(1, 0) + group(1, task="b"))
  with pytest.raises(ValueError, match="and 'a' is that of two, 'another one' for one"):
    check_ids(r.task for r in [*group(1), other])


def test_a_generator_asks_its_first_questions_again():
  """All of them in each pass, in another order, and from any position on."""
  env = fakes.ListEnv({})
  stream = TaskStream(env, "train", questions=5, seed=3)
  passes = [[int(task.id.split("/")[1]) for task in stream.take(5)] for _ in range(3)]
  assert [sorted(each) for each in passes] == [[0, 1, 2, 3, 4]] * 3
  assert passes[0] != passes[1] != passes[2]
  stream = TaskStream(env, "train", questions=5, seed=3)
  stream.take(7)
  again = TaskStream(env, "train", questions=5, seed=3)
  again.restore(json.loads(json.dumps(stream.state())))
  assert again.take(8) == stream.take(8)
  other = TaskStream(env, "train", questions=5, seed=4)
  assert [int(task.id.split("/")[1]) for task in other.take(10)] != passes[0] + passes[1]
  endless = TaskStream(env, "train")
  assert [task.id for task in endless.take(3)] == ["train/0", "train/1", "train/2"]


# ---- runs ----------------------------------------------------------------------------------------

ARGS = [
  "--config=configs/tinycode.py:method=drift_gate,local",
  "--config.mesh.fsdp=1",
  "--config.total_steps=4",
  "--config.eval.every_steps=4",
  "--config.eval.questions=1",
  "--config.eval.samples=1",
  "--config.checkpoint.every_steps=4",
  "--config.train.updates_per_batch=2",
  "--config.data.length_multiple=256",  # so that all batches have one shape
  "--config.data.response_multiple=24",
]


def run(workdir, *more):
  with flagsaver.flagsaver():
    return main.main(["main", *ARGS, f"--workdir={workdir}", *more])


def lines(workdir):
  return [metrics.reproducible(line) for line in metrics.read(workdir)]


def remembered(workdir):
  return checkpoint.read_host(workdir)["memory"]


def visits(workdir):
  return sorted(known[2] for _, known in remembered(workdir)["known"])


def stop_between_packing_and_step(patch, step):
  """Makes a run stop once the batch of a step is packed."""
  make_batch, packed = train.Steps.make_batch, []

  def pack(self, groups, i):
    packed.append(i)
    return make_batch(self, groups, i)

  def check(self):
    if step in packed:
      raise errors.Preempted("asked to stop")

  patch.setattr(train.Steps, "make_batch", pack)
  patch.setattr(preemption.Notice, "check", check)


def test_a_run_that_stops_between_packing_and_step_remembers_each_visit_once(tmp_path, monkeypatch):
  """With two updates a batch. Resumed, it repeats value for value what it would have done."""
  assert run(tmp_path / "whole") == 0
  with monkeypatch.context() as patch:
    stop_between_packing_and_step(patch, step=3)
    assert run(tmp_path / "stopped") == 143
  assert visits(tmp_path / "stopped") == [2, 2]
  assert run(tmp_path / "stopped") == 0
  steps = lines(tmp_path / "whole")
  assert lines(tmp_path / "stopped") == steps
  assert remembered(tmp_path / "stopped") == remembered(tmp_path / "whole")
  assert visits(tmp_path / "whole") == [4, 4]
  # each question came back, and what was remembered of it was read
  assert [line["memory/questions"] for line in steps[1:]] == [2, 2, 2, 2]
  assert [line["route/first_stage"] for line in steps[1:]] == [1, 0, 0, 0]
  assert any(line["memory/read"] for line in steps[1:])
  assert max(line["train/grad_norm"] for line in steps[1:]) > 0


@pytest.mark.slow
def test_a_batch_that_was_sampled_ahead_is_noted_when_it_is_packed(tmp_path, monkeypatch):
  lag = "--config.rollout.lag=1"
  assert run(tmp_path / "whole", lag) == 0
  with monkeypatch.context() as patch:
    stop_between_packing_and_step(patch, step=3)
    assert run(tmp_path / "stopped", lag) == 143
  assert visits(tmp_path / "stopped") == [2, 2]
  assert run(tmp_path / "stopped", lag) == 0
  assert visits(tmp_path / "stopped") == visits(tmp_path / "whole") == [4, 4]


def test_only_packing_notes_a_group():
  """Groups are prepared in other threads, and in any order."""
  env, method = fakes.ListEnv({}), build.build_method(build.method_row("drift"))
  packer = fakes.make_packer(
    method,
    Chat(fakes.ByteTokenizer()),
    env.prompt,
    Shapes((4000, 5000, 3000), [], 0.0),
    max_teacher_tokens=400,
  )
  groups = [group(1, 0, task=task) for task in "ab"]
  packer.prepare(groups[1])
  assert method.memory.metrics()["memory/questions"] == 0
  assert packer.pack(groups).metrics["memory/questions"] == 2
  packer.prepare(groups[0])
  assert packer.pack(groups).metrics["memory/questions"] == 2
  assert [known[1].visits for known in method.memory.state()["known"]] == [2, 2]


@pytest.mark.parametrize(
  "more, said",
  [
    (
      ["--config.data.questions=0"],
      "config.method.memory.name='questions' remembers questions that come back, and "
      "config.env.name='tinycode' makes new ones without end: set config.data.questions",
    ),
    (
      ["--config=configs/math_qa.py:local", "--config.data.questions=3"],
      "config.data.questions=3 would not be read: config.env.name='math_qa' takes the rows",
    ),
    (["--config.env.stages=2"], "are shuffled, and the stages with them"),
    (["--config.method.memory.name=none"], "'drift' needs a memory of questions"),
    (["--config.method.memory.replace=best"], "method.memory.replace='best' is unknown"),
    (
      ["--config=configs/tinycode.py:local", "--config.method.memory.name=questions"],
      "config.method.memory.name='questions' would not be read",
    ),
  ],
)
def test_a_memory_that_would_be_of_no_use_is_refused(tmp_path, capsys, more, said):
  assert run(tmp_path, *more) == 2
  lines = capsys.readouterr().err.splitlines()
  assert [said in line for line in lines if not line.startswith("work directory: ")] == [True]


def test_rows_with_one_id_are_refused_before_the_run(tmp_path, capsys):
  rows = [{"idx": 7, "question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in (1, 2)]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  args = ["--config=configs/math_qa.py:method=drift,local", "--config.train.updates_per_batch=1"]
  sources = f"--config.data.sources=('train={path}', 'test={path}')"
  assert run(tmp_path / "run", *args, sources) == 2
  assert "Task.id, and 'math/train/7' is that of two, 'What is 2 + 1?" in capsys.readouterr().err


def test_the_threshold_of_the_context_is_that_of_memory_and_route():
  row = build.method_row("drift")
  row["teacher_context"]["success_threshold"] = 0.9
  method = build.build_method(row)
  half = group(0.95, 0.8)
  assert method.memory.visit(half).pass_rate == 0.5 and method.route.success_threshold == 0.9
  assert config.load("configs/tinycode.py:method=drift").data.questions == 512


@pytest.mark.slow
def test_two_processes_remember_what_one_does(tmp_path):
  """Likewise where one process goes on with what two have saved."""
  drift = "--config=configs/tinycode.py:method=drift,local"
  one, two = tmp_path / "one", tmp_path / "two"
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    together = f"--distributed=127.0.0.1:{s.getsockname()[1]},2,"

  def finish(*processes):
    for process in processes:
      _, err = process.communicate(timeout=900)
      assert process.returncode == 0, err

  def noted(workdir):
    return [
      {key: x for key, x in line.items() if key.startswith(("memory/", "route/"))}
      for line in lines(workdir)
    ]

  finish(test_mesh.start(one, 4, drift))
  finish(*(test_mesh.start(two, 2, drift, f"{together}{rank}") for rank in range(2)))
  assert remembered(one) == remembered(two) and visits(one) == [2, 2]
  for workdir in (one, two):
    finish(test_mesh.start(workdir, 4, drift, "--config.total_steps=3"))
  assert remembered(one) == remembered(two) and visits(two) == [3, 3]
  assert noted(one) == noted(two) and len(noted(two)) == 4
