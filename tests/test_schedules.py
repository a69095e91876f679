"""Teacher schedules: which share of its way the teacher moves after which batch, and what resumes.

The oracle of the gated one is worked by hand; the program on the device is one for all.
"""

import functools
import json
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpo_jax import experiment, main, metrics, train
from sdpo_jax.objectives import build, schedules
from sdpo_jax.objectives.control import Control, Facts, facts_of
from sdpo_jax.records import Feedback, Rollout, Status, Task
from sdpo_jax.teacher_gate import TeacherGate
from sdpo_jax.train_step import init_state, make_signals, make_train_step, move_teacher
from tests import fakes

ROOT = pathlib.Path(__file__).parent.parent


def method_with(**teacher_weights):
  return build.build_method(build.method_row("sdpo") | dict(teacher_weights=teacher_weights))


def shares(controller, batches):
  """Runs a controller over (reward, lengths) of batches; returns rho and the metrics of each."""
  outcome = []
  for step, (reward, lengths) in enumerate(batches, start=1):
    rho, numbers = controller.begin(Facts(step, (reward,) * len(lengths), tuple(lengths)))
    controller.end({}, applied=True)
    outcome.append((rho, numbers))
  return outcome


@pytest.mark.parametrize(
  "part, expected",
  [
    (dict(name="every", period=3), [0, 0, 1, 0, 0, 1]),
    (dict(name="every", period=1), [1] * 6),
    (dict(name="ema", rate=0.05), [0.05] * 6),
    (dict(name="lag_matched_ema", period=3), [0.5] * 6),
    (dict(name="lag_matched_ema", period=1), [1] * 6),
    (dict(name="frozen"), [0] * 6),
    (dict(name="restart", period=2, share=0.4), [0, 0.4, 0, 0.4, 0, 0.4]),
    # two moves of 5 % towards the same place: 1 - 0.95^2
    (dict(name="restart", period=2, match_rate=0.05), [0, 0.0975, 0, 0.0975, 0, 0.0975]),
  ],
  ids=str,
)
def test_schedules_by_hand(part, expected):
  controller = method_with(**part).teacher_weights.controller()
  found = [rho for rho, _ in shares(controller, [(0.0, [1])] * 6)]
  assert found == pytest.approx(expected, abs=1e-12)


def test_a_restart_matches_an_average_that_follows_a_policy_that_stands_still():
  teacher, policy, rate = 2.0, 5.0, 0.05
  for _ in range(10):
    teacher += rate * (policy - teacher)
  restart = method_with(name="restart", match_rate=rate).teacher_weights.controller()
  (*_, (share, _)) = shares(restart, [(0.0, [1])] * 10)
  assert 2.0 + share * 3.0 == pytest.approx(teacher)
  assert share == pytest.approx(0.40, abs=2e-3)  # the paper's figure for a rate of 5 %


GATED = schedules.GateSettings(check_every=2, min_gap=3, window=2, reward_margin=0.1, max_tail=2.0)
# (mean reward, lengths) of a batch; what the gates say of the window that ends there
BATCHES = [
  (0.2, [10, 10]),  # half a window
  (0.4, [10, 10]),  # its mean, 0.3, has to be beaten by 0.1
  (0.6, [10, 10]),  # 0.5 and 3 batches, but only even ones are looked at
  (0.5, [10, 10]),  # 0.55: a refresh, and 0.55 has to be beaten
  (0.9, [10, 10]),
  (0.9, [10, 90]),  # 2 batches since; the longest is 3 times the mean
  (0.9, [10, 10]),  # 3 batches since
  (0.9, [10, 10]),  # the long response has left the window: a refresh
  (0.9, [10, 10]),
  (1.0, [10, 10]),  # 0.95 is not above 0.9 + 0.1
]
GATES = [  # isolation, reward, tail, rho
  (0, 0, 0, 0),
  (0, 0, 1, 0),
  (1, 1, 1, 0),
  (1, 1, 1, 1),
  (0, 1, 1, 0),
  (0, 1, 0, 0),
  (1, 1, 0, 0),
  (1, 1, 1, 1),
  (0, 0, 1, 0),
  (0, 0, 1, 0),
]


def gates_of(outcome):
  names = ("isolation", "reward", "tail")
  return [(*(numbers[f"control/gate_{n}"] for n in names), rho) for rho, numbers in outcome]


def test_the_gated_schedule_by_hand():
  outcome = shares(schedules.Gated(GATED), BATCHES)
  assert gates_of(outcome) == GATES
  _, at_six = outcome[5]
  assert at_six["control/window_reward"] == pytest.approx(0.9)
  assert at_six["control/window_reward_reference"] == pytest.approx(0.55)
  assert at_six["control/window_tail"] == pytest.approx(90 / 30)
  assert outcome[0][1].keys() == {f"control/gate_{n}" for n in ("isolation", "reward", "tail")}


@pytest.mark.parametrize("at", range(len(BATCHES)))
def test_a_gated_schedule_goes_on_from_what_a_checkpoint_holds(at):
  controller = schedules.Gated(GATED)
  first = shares(controller, BATCHES[:at])
  kept = json.loads(json.dumps(controller.state()))
  controller.begin(Facts(99, (0.0,), (1,)))  # does not show in what was kept
  resumed = schedules.Gated(GATED)
  resumed.restore(kept)
  rest = []
  for step, (reward, lengths) in enumerate(BATCHES[at:], start=at + 1):
    rest.append(resumed.begin(Facts(step, (reward,) * len(lengths), tuple(lengths))))
    resumed.end({}, applied=True)
  assert first + rest == shares(schedules.Gated(GATED), BATCHES)


def test_a_refresh_counts_only_where_it_was_made():
  """The gradient of batch 4 is not finite: batch 6 may refresh, against the first reference."""
  controller = schedules.Gated(GATED)
  rewards = [0.3, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5]
  found = []
  for step, reward in enumerate(rewards, start=1):
    rho, numbers = controller.begin(Facts(step, (reward,), (10,)))
    controller.end({}, applied=step != 4)
    found.append((rho, numbers.get("control/window_reward_reference")))
  assert [rho for rho, _ in found] == [0, 0, 0, 1, 0, 1, 0]
  assert [reference for _, reference in found] == [None] + [0.3] * 5 + [0.5]


def test_a_window_without_one_verdict_closes_the_gates():
  controller = schedules.Gated(GATED._replace(min_gap=0, reward_margin=-1.0, check_every=1))
  for step in range(1, 4):
    rho, numbers = controller.begin(Facts(step, (), ()))
    assert rho == 0 and "control/window_reward" not in numbers
    controller.end({}, applied=True)
  assert controller.begin(Facts(4, (0.5,), (3,)))[0] == 1


def rollout(reward, length, status=Status.SCORED):
  tokens = [1] * length
  feedback = Feedback(reward, "", status)
  return Rollout(Task("t", "question"), [1], tokens, [-1.0] * length, "stop", "", feedback)


def test_processes_decide_alike_whichever_way_they_add_up():
  """All facts are sums and the largest of all judged responses; their order changes no bit."""
  rng = random.Random(0)
  batches = []
  for _ in range(40):
    group = [rollout(rng.random(), rng.randrange(1, 40)) for _ in range(16)]
    group += [rollout(0.0, 1000, Status.ENV_FAILED), rollout(float("nan"), 1000)]
    batches.append(group)
  settings = GATED._replace(reward_margin=0.0, max_tail=1000.0)
  outcomes = []
  for shuffled in (False, True):
    controller, outcome = schedules.Gated(settings), []
    for step, group in enumerate(batches, start=1):
      order = rng.sample(group, len(group)) if shuffled else group
      outcome.append(controller.begin(facts_of([order], step)))
      controller.end({}, applied=True)
    outcomes.append(outcome)
  assert outcomes[0] == outcomes[1]
  assert sum(rho for rho, _ in outcomes[0]) > 1
  assert max(numbers.get("control/window_tail", 0) for _, numbers in outcomes[0]) < 40


def test_the_length_tail_of_every_batch_is_a_metric():
  groups = [[rollout(0.0, 2), rollout(1.0, 10)], [rollout(0.0, 99, Status.ENV_FAILED)]]
  assert train.rollout_metrics(groups, 1)["rollout/length_tail"] == pytest.approx(10 / 6)
  assert "rollout/length_tail" not in train.rollout_metrics([[rollout(0.0, 0)]], 1)


# ---- on the device ------------------------------------------------------------------------------


@functools.cache
def frozen_step():
  config, params = fakes.toy_model(0)
  method, tx = method_with(name="every"), optax.sgd(1e-2)
  step = jax.jit(make_train_step(make_signals(config, method), method, tx))
  _, teacher = fakes.toy_model(1)
  return step, init_state(params, tx, keep_teacher=True)._replace(teacher=teacher)


def stepped(rho, **changes):
  step, state = frozen_step()
  batch = fakes.toy_batch()._replace(control={"teacher_weights": np.float32(rho)}, **changes)
  return step(state, batch)[0], state


def assert_equal(a, b):
  """Compares trees value for value; numpy knows a NaN of float32 alone, which holds bfloat16's."""
  as_float = functools.partial(np.asarray, dtype=np.float32)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(as_float(x), as_float(y)), a, b)


def test_one_program_serves_every_schedule():
  with fakes.compilations("step") as programs:
    still, before = stepped(0.0)
    between, _ = stepped(0.05)
    copy, _ = stepped(1.0)
  assert len(programs) <= 1  # none if an earlier test has compiled it
  assert_equal(still.teacher, before.teacher)
  expected = jax.tree.map(lambda t, p: t + 0.05 * (p - t), before.teacher, between.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), between.teacher, expected)
  assert_equal(copy.teacher, copy.params)
  assert not np.array_equal(copy.params["embed"], before.params["embed"])


def test_nothing_moves_by_a_gradient_that_is_not_finite():
  broken = np.full_like(fakes.toy_batch().logp_rollout_BR, np.nan)
  for rho in (0.0, 0.05, 1.0):
    after, before = stepped(rho, logp_rollout_BR=broken)
    assert_equal(after.teacher, before.teacher)
    assert_equal(after.params, before.params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_outlives_a_teacher_that_is_not_finite(dtype):
  _, state = frozen_step()
  policy = {"w": jnp.asarray([1.25, -2.5, 3.0], jnp.float32)}
  old = {"w": jnp.asarray([jnp.nan, jnp.inf, 1.0], dtype)}
  state = state._replace(params=policy, teacher=old)
  move = jax.jit(move_teacher)
  copied = move(state, jnp.float32(1.0)).teacher["w"]
  np.testing.assert_array_equal(copied, policy["w"].astype(dtype))
  assert copied.dtype == dtype
  assert_equal(move(state, jnp.float32(0.0)).teacher, old)
  skipped = state._replace(skipped_in_a_row=jnp.int32(1))
  assert_equal(move(skipped, jnp.float32(1.0)).teacher, old)


def test_small_moves_are_kept_in_float32_and_copies_are_not():
  in_float32 = {
    "ema": True,
    "lag_matched_ema": True,
    "every": False,
    "restart": False,
    "gated": False,
    "frozen": False,
  }
  for name, expected in in_float32.items():
    weights = method_with(name=name).teacher_weights
    assert weights.keep and weights.in_float32 == expected
  assert method_with(name="restart", match_rate=0.05).teacher_weights.in_float32


# ---- on the command line ------------------------------------------------------------------------

LOCAL = f"--config={ROOT}/configs/tinycode.py:local"
GATED_RUN = [
  LOCAL,
  "--config.mesh.fsdp=1",
  "--config.total_steps=4",
  "--config.checkpoint.every_steps=2",
  "--config.eval.every_steps=4",
  "--config.eval.questions=2",
  "--config.eval.samples=1",
  *(
    f"--config.method.teacher_weights.{setting}"
    for setting in ("name=gated", "check_every=1", "window=3", "min_gap=1")
    + ("reward_margin=-0.5", "max_tail=100")
  ),
]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (
      ["name=live", "period=10"],
      "config.method.teacher_weights.period is not a setting of 'live'; to set it, choose "
      "config.method.teacher_weights.name from ['every', 'lag_matched_ema', 'restart']",
    ),
    (["name=every", "period=0"], "config.method.teacher_weights.period=0 must be at least 1"),
    (["name=restart", "share=0"], "config.method.teacher_weights.share=0.0 must be above 0"),
    (
      ["name=restart", "share=.5", "match_rate=.1"],
      "config.method.teacher_weights.share=0.5 would not be read: match_rate=0.1 decides",
    ),
    (["name=gated", "max_tail=1"], "config.method.teacher_weights.max_tail=1.0 must be above 1"),
    (["name=gated", "window=0"], "config.method.teacher_weights.window=0 must be at least 1"),
  ],
  ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message, tmp_path, capsys):
  settings = [f"--config.method.teacher_weights.{argument}" for argument in arguments]
  assert main.main(["main", LOCAL, *settings, f"--workdir={tmp_path}"]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


class Killed(BaseException):
  """Stands for a kill: nothing may catch it."""


@pytest.mark.slow
def test_a_gated_run_that_is_killed_writes_the_same_metrics(tmp_path, monkeypatch, capsys):
  """It dies in step 4, after the checkpoint of step 2, with a window that is not full.

  The gate at its first start changes nothing: the whole run, which it is compared with, has none.
  At its second the checkpoint says that the teacher has been tested.
  """
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  command = ["main", *GATED_RUN]
  monkeypatch.setattr(train.report, "write_report", lambda *_: None)
  with monkeypatch.context() as patch:
    patch.setattr(TeacherGate, "check", lambda self, state, *_, **__: state)
    assert main.main([*command, f"--workdir={whole}"]) == 0
  assert "the teacher reads" not in capsys.readouterr().err
  step = train.Steps.step

  def step_until_killed(steps, state, batch):
    if int(state.step) == 3 and steps.latest is None:
      raise Killed
    return step(steps, state, batch)

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(train.Steps, "step", step_until_killed)
    main.main([*command, f"--workdir={killed}"])
  assert main.main([*command, f"--workdir={killed}"]) == 0
  printed = capsys.readouterr().err
  tested = [line for line in printed.splitlines() if "the teacher reads" in line]
  assert [line.partition(":")[0] for line in tested] == ["step 1"]
  compiles = [
    [line["perf/compiles"] for line in metrics.read(run) if line["step"]] for run in (whole, killed)
  ]
  assert compiles[0] == compiles[1]
  lines = [metrics.reproducible(line) for line in metrics.read(whole)]
  assert [metrics.reproducible(line) for line in metrics.read(killed)] == lines
  shares = [line["control/teacher_weights"] for line in lines if line["step"]]
  assert shares == [0, 0, 1, 1]
  assert all(line["train/grad_norm"] > 0 for line in lines if line["step"])


def test_the_grid_of_schedules_has_a_small_form(monkeypatch):
  monkeypatch.chdir(ROOT)
  path = "configs/experiments/schedules.py"
  assert len(experiment.Experiment(path).grid({})) == 27
  small = experiment.Experiment(f"{path}:local").grid({})
  assert set(small) == {"every_1", "gated"}
  for arguments in small.values():
    assert main.parse(["main", *arguments])[1].total_steps == 2
  with pytest.raises(ValueError, match="headline.py:local: it has no get_local"):
    experiment.Experiment("configs/experiments/headline.py:local")
  with pytest.raises(ValueError, match=r"'lokal' is unknown; choose from \['local'\]"):
    experiment.Experiment(f"{path}:lokal")


def test_a_frozen_teacher_is_a_schedule_without_state():
  control = Control(method_with(name="frozen"))
  scalars, numbers = control.begin([[rollout(1.0, 3)]], 1)
  assert scalars["teacher_weights"] == 0 and numbers == {"control/teacher_weights": 0.0}
  assert control.state() == {"teacher_weights": {}}
