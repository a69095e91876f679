"""Every environment from its questions to a gradient: a scripted sampler gives right and wrong
responses, the real judge, teacher context, batch and step do the rest.

The tiny model solves none of these tasks, so that without a script nothing would ever be shown, or
taught. All environments share one shape, so that a step is compiled once a method.
"""

import functools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpo_jax.config import ROWS
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.shapes import Shape, Shapes
from sdpo_jax.data.tasks import first_tasks, with_rows
from sdpo_jax.envs.base import ENVS, make_env, plays
from sdpo_jax.objectives import build, methods
from sdpo_jax.objectives.teacher_context import CLOSING, FEEDBACK, SOLUTION
from sdpo_jax.optimizer import make_optimizer
from sdpo_jax.records import Feedback, Sampling, Status
from sdpo_jax.rollout import Collector
from sdpo_jax.sandbox import Sandbox
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from tests import fakes

CHAT = Chat(fakes.ByteTokenizer())
# nothing else is compiled
SHAPE = Shape(
  rows=4,
  length=768,
  teacher_rows=4,
  teacher_length=1280,
  tokens=640,
  responses=256,
  further_rows=0,
  further_length=0,
  packs=1,
)
OWN_ROWS = {  # of the environments that no row comes with
  "ifeval": {
    "key": 1,
    "prompt": "Describe rain.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"relation": "at least", "num_words": 4}],
  },
  "pairwise": {"prompt": "Describe rain.", "reference": "Many drops fall, they say."},
}

# name: settings, source, (a second right response from the first, a wrong one, what the judge says
# of it; a malformed one, what the judge says of it)
CASES = {
  "tinycode": (
    dict(level="easy"),
    None,
    lambda s: f"So:\n```python\n{s}\n```",
    "def f(x):\n    return [x]",
    "Wrong answer\nInput: ",
    "def f(x:",
    "Runtime error",
  ),
  "arithmetic": (
    dict(level="easy"),
    None,
    lambda s: s.split("\n")[-1],
    "\\boxed{98}",
    "Wrong answer",
    "98",
    "Wrong format",
  ),
  "coding": (
    {},
    "coding",
    lambda s: "Sum them.\n" + s,
    "```python\nprint(7)\n```",
    "Test 1: wrong answer\nInput: 1 2 3\nOutput: 7\nExpected: 6",
    "print(6)",
    "no Python code block",
  ),
  "mcq": (
    dict(tell_correctness=True),
    "science_mcq",
    lambda s: "<reasoning>\nI know.\n</reasoning>\n" + s,
    "<answer>\nD\n</answer>",
    "The answer D is not correct.",
    "It is carbon dioxide.",
    "has no <answer>",
  ),
  "math_qa": (
    dict(tell_correctness=True),
    "math_qa",
    lambda s: "\\boxed{19.0}",
    "\\boxed{29}",
    "The final answer 29 is not correct.",
    "It is 19.",
    "has no \\boxed{}",
  ),
  "tool_use": (
    {},
    "tool_use",
    lambda s: "Thought: look it up.\n" + s,
    'Action: getTime\nAction Input: {"city": "Rome"}',
    "The argument 'city' has a wrong value: \"Rome\".",
    "Action: getTime\nAction Input: {city}",
    "Action Input 1 is not valid JSON",
  ),
  "ifeval": (
    {},
    "ifeval",
    lambda s: s + " too",
    "Water falls, and falls.",
    "punctuation:no_comma",
    "",
    "The response is empty.",
  ),
  "instructions": (  # small letters, and a paragraph that begins with one word
    {},
    None,
    lambda s: s + " too",
    "A LOUD ENGINE!",
    "change_case:english_lowercase",
    "",
    "The response is empty.",
  ),
  "pairwise": (
    dict(judge="tests.fakes:longer_is_better"),
    "pairwise",
    lambda s: s + " too",
    "Water falls, and falls.",
    "The judge prefers the reference answer.",
    "",
    "The response is empty.",
  ),
}


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox(workers=1) as pool:
    yield pool


def judged(name, sandbox, tmp_path, *, broken=None):
  """(environment, one group of four judged rollouts: right, wrong, right, malformed). broken:
  judges instead, by response.
  """
  settings, source, again, wrong, _, malformed, _ = CASES[name]
  if name in OWN_ROWS:
    (tmp_path / f"{name}.train.jsonl").write_text(json.dumps(OWN_ROWS[name]) + "\n")
  env = make_env(name, sandbox=sandbox, **settings)
  env = with_rows(
    env,
    (f"{tmp_path if name in OWN_ROWS else ROWS}/{source}.{{split}}.jsonl",) if source else (),
    splits=("train",),
  )
  task = first_tasks(env, "train", 1)[0]
  steam = "honestly, an engine pushes pistons."
  right = steam if name == "instructions" else task.solution or "Water falls from the clouds."
  thought = "" if name in ("tinycode", "arithmetic") else "<think>\nhm, 5?\n</think>\n\n"
  responses = [thought + right, wrong, again(right), malformed]
  if broken:
    env.judge = lambda task, response, judge=env.judge: (
      broken[responses.index(response)]()
      if responses.index(response) in broken
      else judge(task, response)
    )
  collector = Collector(
    env,
    CHAT,
    fakes.ScriptedEngine([[CHAT.text_tokens(r) + [257] for r in responses]]),
    max_prompt_tokens=1024,
    judge_threads=2,
    judge_timeout_s=3.0 if broken else 60.0,
  )
  try:
    (group,) = collector.collect(
      None, [task], n=4, sampling=Sampling(256, stop_tokens=(257,)), seeds=[0]
    )
  finally:
    collector.close()
    if hasattr(env, "close"):
      env.close()
  return env, group, right


@functools.cache
def machine(name):
  """(initial state, step, signals) of a method with a frozen teacher on a toy model; plain descent,
  so that a direction is one.
  """
  config, params = fakes.toy_model(0, layers=1, width=16, heads=2, kv_heads=1)
  row = build.method_row(name)
  if name == "sdpo":
    row |= dict(teacher_weights=dict(name="frozen"), token_weight=dict(name="uniform"))
  method, tx = build.build_method(row), optax.sgd(0.01)
  signals = make_signals(config, method)
  step = jax.jit(make_train_step(signals, method, tx))
  return (
    init_state(params, tx, keep_teacher=name == "sdpo"),
    step,
    jax.jit(lambda state, batch: signals(state.params, state.teacher, batch)[0].logp_BR),
  )


def batch_of(env, group, name, shape=SHAPE, **context):
  row = build.method_row(name)
  row["teacher_context"].update(context)
  shapes = Shapes((2000, 3000, 1000), [shape] if shape else [], limit=1 if shape else 2)
  method = build.build_method(row)
  further = getattr(method.teacher_context, "further", None)
  packer = fakes.make_packer(
    method, CHAT, env.prompt, shapes, max_teacher_tokens=2000, further_readings=further
  )
  return fakes.controlled(packer.pack([group]), method)


def text_before(half, batch, b):
  """The tokens of row b's text, read off the packed rows."""
  start = half.at_CX[0, batch.start_B[b]]
  row, segments = start // half.token_CPT.shape[2], half.segment_CPT[0].reshape(-1)
  mine = half.segment_CPT[0, row] == segments[start]
  return half.token_CPT[0, row][mine].tolist()


@pytest.mark.parametrize("name", CASES)
def test_from_responses_to_a_gradient(name, sandbox, tmp_path):
  _, _, _, _, said, _, said_of_form = CASES[name]
  env, group, right = judged(name, sandbox, tmp_path)
  assert [r.feedback.reward for r in group] == [1.0, 0.0, 1.0, 0.0] and not group[0].feedback.text
  assert said in group[1].feedback.text and said_of_form in group[3].feedback.text

  # Teacher's text: another success without its thinking, then the feedback; the question and the
  # closing around them.
  batch = batch_of(env, group, "sdpo", feedback="always").batch
  question = env.prompt(group[0].task)
  for b, (solution, feedback) in enumerate(
    [
      (group[2].text, ""),
      (right, group[1].feedback.text),
      (right, ""),
      (right, group[3].feedback.text),
    ]
  ):
    asked = (
      question[-1]["content"]
      + SOLUTION
      + solution
      + (FEEDBACK + feedback if feedback else "")
      + CLOSING
    )
    assert (
      text_before(batch.readings[0].rows, batch, b)
      == CHAT.prompt_tokens(question[:-1] + [{"role": "user", "content": asked}]) + group[b].tokens
    )
    assert text_before(batch.policy, batch, b) == CHAT.prompt_tokens(question) + group[b].tokens
  # Mask: every token of every judged response, and nothing else.
  assert batch.weight_BR.sum(1).tolist() == [len(r.tokens) for r in group] and batch.readings[
    0
  ].weight_BR.max(1).tolist() == [1, 1, 1, 1]
  assert all(batch.weight_BR[b, : len(r.tokens)].all() for b, r in enumerate(group))

  # Divergence: not zero, and one step lowers it.
  state, step, _ = machine("sdpo")
  state, first = step(state, batch)
  _, second = step(state, batch)
  assert (
    first["train/loss"].mean > 1e-3
    and second["train/loss"].mean < first["train/loss"].mean
    and first["train/grad_norm"].mean > 0
  )

  # Rewards: one step makes right responses likelier and wrong ones less likely.
  batch = batch_of(env, group, "grpo").batch
  np.testing.assert_allclose(batch.advantage_BR[:, 0], [0.5, -0.5, 0.5, -0.5])
  state, step, logp = machine("grpo")
  before = logp(state, batch)
  after = logp(step(state, batch)[0], batch)
  gained_B = jnp.sum((after - before) * batch.weight_BR, -1)
  assert gained_B[0] + gained_B[2] > 0 > gained_B[1] + gained_B[3]


def test_every_environment_has_a_script():
  assert CASES.keys() == {name for name, env in ENVS.items() if not plays(env)}


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_a_judge_that_fails_or_returns_nan_for_one_response_costs_that_row_alone(
  how, sandbox, tmp_path
):
  """The step goes on, as if the row had not been there."""
  over = threading.Event()

  def fail():
    if how == "raises":
      raise RuntimeError("boom")
    over.wait(60)

  env, group, _ = judged(
    "mcq", sandbox, tmp_path, broken={1: fail, 3: lambda: Feedback(float("nan"), "")}
  )
  over.set()
  assert [r.feedback.status for r in group] == [
    Status.SCORED,
    Status.ENV_FAILED,
    Status.SCORED,
    Status.ENV_FAILED,
  ]
  packed = batch_of(env, group, "sdpo")
  assert (
    packed.metrics["data/dropped"] == 2
    and packed.batch.readings[0].weight_BR.max(1).tolist() == [1, 0, 1, 0]
    and not packed.batch.weight_BR[[1, 3]].any()
  )
  state, step, _ = machine("sdpo")
  _, metrics = step(state, packed.batch)
  assert (
    metrics["train/loss"].mean > 1e-3
    and metrics["train/update_skipped"].mean == 0
    and np.isfinite(metrics["train/grad_norm"].mean)
  )


SINGLE = {name for name, row in methods.METHODS.items() if not build.reads_turns(row)}


@pytest.mark.parametrize("name", sorted(SINGLE - set(fakes.VARIANTS)))
def test_every_method_runs_two_steps(name, sandbox, tmp_path):
  """Its own context, advantage, teacher and optimiser; the loss and the update are numbers, and
  something is learned from the group.
  """
  env, group, _ = judged("math_qa", sandbox, tmp_path)
  config, params = fakes.toy_model(0, layers=1, width=16, heads=2, kv_heads=1)
  row = build.method_row(name)
  method = build.build_method(row)
  batch = batch_of(env, group, name, shape=None).batch
  assert batch.readings[0].weight_BR.max(1).any() == method.needs_teacher
  tx = make_optimizer(
    name="adamw",
    lr=1e-3,
    warmup_steps=0,
    decay_steps=0,
    weight_decay=0.01,
    clip_norm=1.0,
    b1=0.9,
    b2=0.999,
    state_dtype="float32",
  )
  step = jax.jit(make_train_step(make_signals(config, method), method, tx))
  state = init_state(params, tx, keep_teacher=method.teacher_weights.keep)
  for i in (1, 2):
    state, metrics = step(state, batch)
    assert (
      int(state.step) == i
      and np.isfinite(metrics["train/loss"].mean)
      and metrics["train/grad_norm"].mean > 0
      and int(state.skipped) == 0
    )
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, params)
  assert max(jax.tree.leaves(moved)) > 0
