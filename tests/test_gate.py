"""The gate against silent nothing: what it refuses, what it lets pass, that it changes nothing."""

import dataclasses
import functools
import logging
import pathlib
import types

import jax
import numpy as np
import optax
import pytest

from sdpo_jax import checkpoint, main, metrics, sharding
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.shapes import Shapes
from sdpo_jax.discover import solver
from sdpo_jax.errors import RunError
from sdpo_jax.model import decoder, lora
from sdpo_jax.objectives import build
from sdpo_jax.objectives.control import Control, as_trial
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.optimizer import make_optimizer
from sdpo_jax.records import Feedback, Ratio, Rollout, Status, Task
from sdpo_jax.teacher_gate import MOST_TRIALS, TeacherGate
from sdpo_jax.train_step import init_state, make_score, make_signals, make_train_step
from tests import fakes

ROOT = pathlib.Path(__file__).parent.parent
CHAT = Chat(fakes.ByteTokenizer())
# parts of the same shapes and the same program, for one compilation
LIVE = build.method_row("sdpo") | dict(teacher_weights=dict(name="live"))
FROZEN = build.method_row("sdpo") | dict(teacher_weights=dict(name="frozen"))


def messages(task):
  return [{"role": "user", "content": task.prompt}]


def rollout(question, text, reward=0.0, feedback="", status=Status.SCORED):
  task = Task(question, question)
  tokens = CHAT.text_tokens(text) + [257]
  prompt = CHAT.prompt_tokens(messages(task))
  judged = Feedback(reward, feedback, status)
  return Rollout(task, prompt, tokens, [-0.5] * len(tokens), "stop", text, judged)


def groups(feedback="it is wrong: " + fakes.NASTY, reward=1.0):
  """Two questions: one with a success and one without; a judge failed in the second."""
  return [
    [rollout("Add.", "1+1", reward), rollout("Add.", "no", feedback=feedback)],
    [
      rollout("Multiply it.", "nothing", feedback=feedback),
      rollout("Multiply it.", "broken", status=Status.ENV_FAILED),
    ],
  ]


def packer_of(method, limit=400, **settings):
  """A packer whose batches all have one shape here, so that little is compiled."""
  settings = dict(max_teacher_tokens=limit, length_multiple=512, response_multiple=64) | settings
  return fakes.make_packer(method, CHAT, messages, Shapes((600, 600, 200)), **settings)


@functools.cache
def step_of(weights):
  config, params = fakes.toy_model(0)
  method = build.build_method(LIVE if weights == "live" else FROZEN)
  step = jax.jit(make_train_step(make_signals(config, method), method, optax.sgd(1e-2)))
  state = init_state(params, optax.sgd(1e-2), keep_teacher=weights == "frozen")
  if weights == "frozen":
    state = state._replace(teacher=fakes.toy_model(1)[1])
  return step, state


def tried(packed, packer, weights="live", change=lambda metrics: metrics):
  """Runs the gate over a batch; returns how often the step was tried."""
  step, state = step_of(weights)
  trials = []

  def trial(state, packed):
    state, metrics = step(state, as_trial(packed.batch))
    trials.append(packed)
    return state, change(metrics)

  gate = TeacherGate(packer.method, packer)
  assert gate.check(state, packed, trial, when="step 1") is not None
  assert gate.check(state, None, trial, when="step 2") is state  # asks nothing more
  return trials


def batch_of(weights="live", context=None, limit=400, judged=None):
  row = LIVE if weights == "live" else FROZEN
  method = build.build_method(row | ({} if context is None else dict(teacher_context=context)))
  packer = packer_of(method, limit)
  return fakes.controlled(packer.pack(judged or groups()), method), packer


# ---- what passes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["live", "frozen"])
def test_a_teacher_with_a_context_passes(weights, capsys):
  packed, packer = batch_of(weights)
  assert len(tried(packed, packer, weights)) == 2
  line = capsys.readouterr().err
  assert line.startswith("step 1: the teacher reads 2 responses, ") and line.count("\n") == 1
  assert "emptying its context changes the gradient's norm by" in line


def test_an_anchor_reads_what_the_policy_reads_and_is_not_tested():
  row = build.method_row("sdpo_blend") | dict(
    teacher_weights=dict(name="frozen"), teacher_context=dict(name="question_alone")
  )
  method = build.build_method(row)
  packer = packer_of(method)
  packed = fakes.controlled(packer.pack(groups()), method)
  contexts, *_ = packed.contexts
  for rollout, context in zip(packed.rollouts, contexts, strict=True):
    is_judged = rollout.feedback.status is not Status.ENV_FAILED
    assert (context is not None) == is_judged
  for own, emptied in zip(packed.batch.readings, packer.emptied(packed).batch.readings):
    np.testing.assert_array_equal(own.rows.token_CPT, emptied.rows.token_CPT)
  assert tried(packed, packer, "frozen") == []


def test_the_emptied_batch_has_the_same_shapes_and_program():
  packed, packer = batch_of()
  with fakes.compilations("step") as programs:
    full, empty = tried(packed, packer)
  shapes = lambda x: jax.tree.map(np.shape, x)
  assert full is packed and shapes(full.batch) == shapes(empty.batch)
  assert len(programs) <= 1 and len(packer.shapes.known) == 1


@pytest.mark.parametrize("share, packs", [(False, 1), (True, 2)])
def test_an_emptied_teacher_says_what_the_policy_says(share, packs):
  """With the policy's weights its log-probabilities are the policy's, wherever its texts stand."""
  config, params = fakes.toy_model(0)
  method = build.build_method(LIVE)
  packer = packer_of(method, share_prefixes=share, shards=packs, length_multiple=8)
  packed = fakes.controlled(packer.pack(groups() * 2), method)
  emptied = packer.emptied(packed)
  assert emptied.teacher_texts != packed.teacher_texts
  state = init_state(params, optax.sgd(1.0))
  score = jax.jit(make_score(make_signals(config, method)))
  gaps = []
  for batch in (packed.batch, emptied.batch):
    signals = score(state, batch)
    is_read_BR = (batch.weight_BR > 0) & batch.readings[0].has_BR
    gaps.append(np.abs(np.where(is_read_BR, signals.gap_BR, 0.0)).max())
  assert gaps[0] > 0.1 and gaps[1] < 1e-5


def test_a_teacher_with_a_shorter_prompt_than_the_policy_is_emptied_too():
  """There is no room in its rows: the reading takes the policy's, of another shape."""
  question = "A long question. " * 8
  judged = [[rollout(question, "a", 1.0), rollout(question, "b")]]
  context = dict(name="feedback_or_solution", templates={"reprompt": "{solution}"})
  packer = packer_of(build.build_method(LIVE | dict(teacher_context=context)), length_multiple=8)
  packed = packer.pack(judged)
  emptied = packer.emptied(packed)
  assert emptied.batch.readings[0].rows is packed.batch.policy
  assert packed.batch.readings[0].rows.token_CPT.size < packed.batch.policy.token_CPT.size


def test_methods_without_a_teacher_are_not_tried():
  method = build.build_method(build.method_row("grpo"))
  gate = TeacherGate(method, packer_of(method))
  assert gate.check("state", None, pytest.fail, when="step 1") == "state"


# ---- what is refused -----------------------------------------------------------------------------


def refused(weights="live", **settings):
  packed, packer = batch_of(weights, **settings)
  with pytest.raises(RunError) as error:
    tried(packed, packer, weights)
  assert "\n" not in str(error.value)
  assert str(error.value).startswith("step 1: ")
  assert str(error.value).endswith("; nothing of this step was trained")
  return str(error.value)


@pytest.mark.parametrize("weights", ["live", "frozen"])
@pytest.mark.parametrize("reprompt", ["{prompt}", "{prompt} Try again."])
def test_a_template_that_swallows_the_context(weights, reprompt):
  """Words of its own would make another gradient, but not out of the context."""
  templates = {"reprompt": reprompt}
  message = refused(weights, context=dict(name="feedback_or_solution", templates=templates))
  assert "its prompts show nothing of the context" in message
  assert "config.method.teacher_context.templates must keep {solution}" in message
  equals = weights == "live" and reprompt == "{prompt}"
  assert ("the teacher equals the policy everywhere" in message) == equals


def test_a_limit_that_leaves_no_room_for_the_context():
  prompt = CHAT.prompt_tokens([{"role": "user", "content": Context().render("Multiply it.")}])
  message = refused(limit=len(prompt))
  assert f"config.data.max_teacher_tokens={len(prompt)} leaves no room for its context" in message


@dataclasses.dataclass
class QuestionAlone:
  """A teacher context that shows what the policy reads."""

  success_threshold = 0.5

  def __call__(self, group, i):
    return Context(templates=(("reprompt", "{prompt}"),))


@pytest.mark.parametrize("weights", ["live", "frozen"])
def test_a_teacher_that_sees_the_policys_prompt(weights):
  method = build.build_method(LIVE if weights == "live" else FROZEN)
  packer = packer_of(method._replace(teacher_context=QuestionAlone()))
  packed = fakes.controlled(packer.pack(groups()), method)
  what = {"live": "equals the policy everywhere", "frozen": "the gradient is the same where"}
  with pytest.raises(RunError, match=f"{what[weights]}.*its prompts are the policy's own"):
    tried(packed, packer, weights)


def test_a_teacher_that_is_deaf_to_its_prompts():
  """Its prompts differ; the numbers of both trials are the same."""
  packed, packer = batch_of()
  one = {name: Ratio(0.5, 1.0) for name in ("train/grad_norm", "train/loss")}
  with pytest.raises(RunError, match="but not what it says of the responses"):
    tried(packed, packer, change=lambda metrics: one)


def test_a_gradient_that_is_zero():
  packed, packer = batch_of()
  no_gradient = lambda metrics: metrics | {"train/grad_norm": Ratio(0.0, 1.0)}
  with pytest.raises(RunError, match="the gradient is zero, though the teacher is [0-9.]+ nats a"):
    tried(packed, packer, change=no_gradient)


def test_a_clip_below_every_divergence_is_a_zero_gradient():
  """OPSD's clip takes a token's gradient where its divergence is above it."""
  row = LIVE | dict(token_signal=dict(name="divergence", alpha=0.5, clip=1e-12))
  config, params = fakes.toy_model(0)
  method = build.build_method(row)
  step = jax.jit(make_train_step(make_signals(config, method), method, optax.sgd(1e-2)))
  packer = packer_of(method)
  packed = fakes.controlled(packer.pack(groups()), method)
  gate = TeacherGate(method, packer)
  state = init_state(params, optax.sgd(1e-2))
  with pytest.raises(RunError, match="the gradient is zero"):
    gate.check(state, packed, lambda s, p: step(s, as_trial(p.batch)), when="step 1")


# ---- what cannot be tested yet -------------------------------------------------------------------


def test_a_batch_without_a_context_leaves_the_test_to_the_next(caplog, capsys):
  packed, packer = batch_of()
  silent = fakes.controlled(packer.pack(groups(feedback="", reward=0.0)), packer.method)
  step, state = step_of("live")
  trial = lambda s, p: step(s, as_trial(p.batch))
  gate = TeacherGate(packer.method, packer)
  with caplog.at_level(logging.WARNING):
    for i in (1, 2):
      assert gate.check(state, silent, pytest.fail, when=f"step {i}") is state
    gate.check(state, packed, trial, when="step 3")
  (record,) = caplog.records
  assert record.getMessage() == (
    "step 1: this batch cannot test the teacher: no response has a context (3 judged, 0 with a "
    "reward, 0 with feedback); the next one is tried"
  )
  assert "step 3: the teacher reads" in capsys.readouterr().err


class Credit:
  """Stands for a credit; the gate asks only whether there is one."""

  reads, is_idle = ("logp_teacher_BR",), False


@pytest.mark.parametrize(
  "reward, control, reason",
  [
    (0.0, {}, "no response with a context has an advantage"),
    (1.0, {"credit": np.float32(0)}, "its credit has a share of 0"),
  ],
)
def test_a_credit_without_an_advantage_is_no_failure(reward, control, reason, caplog):
  row = LIVE | {axis: build.METHODS["grpo"][axis] for axis in ("advantage", "surrogate")}
  method = build.build_method(row | dict(policy_share=0.5))
  method = method._replace(token_signal=None, credit=Credit(), policy_share=1.0)
  packer = packer_of(method)
  packed = packer.pack([[rollout("Add.", "1", reward, "ok"), rollout("Add.", "2", 0.0, "no")]])
  packed = packed._replace(batch=packed.batch._replace(control=control))
  gate = TeacherGate(method, packer)
  gate.check("state", packed, lambda *_: pytest.fail("tried"), when="step 1")
  assert reason in caplog.text
  # with an advantage and a credit that changes none, trials end after a few batches
  ready = packer.pack([[rollout("Add.", "1", 1.0, "ok"), rollout("Add.", "2", 0.0, "no")]])
  idle = {name: Ratio(0.5, 1.0) for name in ("train/grad_norm", "train/loss")}
  idle |= {"train/credit_change": Ratio(0.0, 9.0), "train/teacher_gap_abs": Ratio(1.0, 9.0)}
  tries = []
  for i in range(MOST_TRIALS + 3):
    gate.check("s", ready, lambda s, p: tries.append(p) or (s, idle), when=f"step {i}")
  assert len(tries) == MOST_TRIALS
  assert caplog.text.count("cannot test") == 1 and f"after {MOST_TRIALS} trials" in caplog.text


def test_questions_without_a_spread_weigh_nothing_and_are_no_failure(caplog):
  """SC-SDPO gives a question that is never solved the weight 0."""
  method = build.build_method(build.METHODS["sc_sdpo"] | dict(teacher_weights=dict(name="live")))
  packer = packer_of(method)
  packed = packer.pack([[rollout("Add.", "1", 0.0, "no"), rollout("Add.", "2", 0.0, "no")]])
  zero = {"train/grad_norm": Ratio(0.0, 1.0), "train/loss": Ratio(0.0, 1.0)}
  gate = TeacherGate(method, packer)
  gate.check("state", packed, lambda s, p: (s, zero), when="step 1")
  assert "all advantages are 0, by which the method weighs responses" in caplog.text


def test_a_teacher_that_was_never_tested_is_named_at_the_end(caplog):
  packed, packer = batch_of()
  silent = fakes.controlled(packer.pack(groups(feedback="", reward=0.0)), packer.method)
  gate = TeacherGate(packer.method, packer)
  gate.end()
  assert not caplog.text  # nothing was there to test
  gate.check("state", silent, pytest.fail, when="step 1")
  caplog.clear()
  gate.end()
  assert "the teacher was never tested, in 1 batches: no response has a context" in caplog.text


def test_a_run_that_has_passed_is_not_tested_again():
  """Its checkpoint says so: a policy that has come to equal its teacher ends no resumed run."""
  packed, packer = batch_of()
  gate = TeacherGate(packer.method, packer, passed=True)
  assert gate.check("state", packed, pytest.fail, when="step 3") == "state" and gate.passed
  assert not TeacherGate(packer.method, packer).passed
  grpo = build.build_method(build.method_row("grpo"))
  assert TeacherGate(grpo, packer).passed  # there is nothing to test


def test_a_batch_in_which_nothing_distils_may_have_an_idle_credit(caplog):
  """DRIFT with its gate: successes of medium questions alone, and the rhythm changes none."""
  row = build.method_row("h2sd")
  method = build.build_method(row)
  packer = packer_of(method)
  packed = packer.pack([[rollout("Add.", "1", 1.0, "ok"), rollout("Add.", "2", 0.6, "ok")]])
  idle = {name: Ratio(0.5, 1.0) for name in ("train/grad_norm", "train/loss")}
  idle |= {"train/credit_change": Ratio(0.0, 9.0), "train/teacher_gap_abs": Ratio(1.0, 9.0)}
  gate = TeacherGate(method, packer)
  gate.check("state", packed, lambda s, p: (s, idle), when="step 1")
  assert "its credit changes no advantage" in caplog.text and not gate.passed


def test_a_gradient_that_is_not_finite_is_left_to_the_run(caplog):
  packed, packer = batch_of()
  gate = TeacherGate(packer.method, packer)
  broken = {"train/grad_norm": Ratio(0.0, 0.0), "train/loss": Ratio(float("nan"), 1.0)}
  gate.check("state", packed, lambda s, p: (s, broken), when="step 1")
  assert "the gradient is not finite" in caplog.text


# ---- a trial changes nothing ---------------------------------------------------------------------


def assert_same_bits(before, after):
  same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  jax.tree.map(same, before, after)


def trained(kind):
  """Returns (jitted step, state, frozen weights, batch) of a run on this kind of machine."""
  config, params = fakes.toy_model(0, vocab=296, heads=16, kv_heads=8)
  method = build.build_method(build.method_row("sdpo"))
  adam = dict(name="adamw", lr=1e-2, warmup_steps=0, decay_steps=0, weight_decay=0.01)
  tx = make_optimizer(**adam, clip_norm=1.0, b1=0.9, b2=0.999, state_dtype="float32")
  frozen, join, updates = None, None, 2 if kind == "updates" else 1
  if kind == "lora":
    adapters = lora.Lora(rank=2, alpha=4.0)
    frozen, join = params, functools.partial(_attach, adapters)
    params = lora.init(config, adapters, jax.random.key(0))
  signals = make_signals(config, method, join=join)
  step = make_train_step(signals, method, tx, updates=updates, recompute_old=updates > 1)
  state = init_state(params, tx, keep_teacher=True)
  packs = {"lora": 1, "updates": 2, "mesh": 4}[kind]
  batch = fakes.toy_batch(rows=4, vocab=296, length=26, teacher_length=34, packs=packs)
  batch = batch._replace(control={"teacher_weights": np.float32(1), "learn": np.float32(1)})
  if kind == "mesh":
    mesh = sharding.make_mesh(jax.devices(), data=2, fsdp=2, tensor=2)
    places = sharding.state_shardings(mesh, state, decoder.axes(config))
    jitted = jax.jit(step, out_shardings=(places, None))
    on_mesh = lambda *a: _under(mesh, jitted, *a)
    return on_mesh, jax.device_put(state, places), None, batch
  return jax.jit(step), state, frozen, batch


def _attach(adapters, frozen, params):
  return lora.attach(frozen, params, adapters)


def _under(mesh, jitted, state, batch, frozen):
  with jax.set_mesh(mesh):
    return jitted(state, sharding.put_rows(mesh, batch), frozen)


@pytest.mark.parametrize("kind", ["lora", "updates", "mesh"])
def test_a_trial_leaves_every_bit_of_the_state(kind):
  step, state, frozen, batch = trained(kind)
  state, _ = step(state, batch, frozen)  # moments that are not zero
  kept = jax.tree.map(np.asarray, state)
  tried, metrics = step(state, as_trial(batch), frozen)
  assert_same_bits(kept, tried)
  learned, learned_metrics = step(tried, batch, frozen)
  assert metrics["train/grad_norm"].mean > 0 and int(learned.step) == int(kept.step) + 1
  if kind != "updates":  # the second update of a batch sees what the first one has moved
    assert_same_bits(metrics, learned_metrics)
  broken = batch._replace(logp_rollout_BR=np.full_like(batch.logp_rollout_BR, np.nan))
  after, metrics = step(learned, as_trial(broken), frozen)
  assert_same_bits(learned, after)
  assert metrics["train/grad_norm"].mean is None


# ---- in a run ------------------------------------------------------------------------------------


def test_a_run_without_a_signal_ends_before_its_first_update(tmp_path, capsys):
  template = "--config.method.teacher_context.templates.reprompt={prompt} Think twice."
  small = ["--config.eval.splits=()", "--config.mesh.fsdp=1", template]
  local = f"--config={ROOT}/configs/tinycode.py:local"
  assert main.main(["main", local, *small, f"--workdir={tmp_path}"]) == 1
  *_, line = capsys.readouterr().err.splitlines()
  assert line.startswith(
    "sdpo_jax: step 1: the gradient is the same where the teacher reads no context: its prompts "
    "show nothing of the context"
  )
  assert checkpoint.latest_step(tmp_path) is None
  assert all(line["step"] == 0 for line in metrics.read(tmp_path))


def test_the_first_update_of_discovery_tests_the_teacher():
  packed, packer = batch_of()
  step, state = step_of("live")
  arm = solver.LearningArm(None, step, packer, None, TeacherGate(packer.method, packer))
  its = solver.Solver.__new__(solver.Solver)
  its.session, its.frozen = types.SimpleNamespace(mesh=None), None
  its.c = types.SimpleNamespace(train=types.SimpleNamespace(max_rollout_gap=100.0))
  learns = []
  its._step = lambda arm, state, batch: (
    learns.append(float(batch.control["learn"])) or solver.Solver._step(its, arm, state, batch)
  )
  control = Control(packer.method)
  for _ in range(2):
    state = its._update(arm, control, state, packed)
  assert learns == [0, 0, 1, 1] and int(state.step) == 2
