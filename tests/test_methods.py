"""The table of methods as a whole: its page, its README, and a row that comes from outside."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.shapes import Shapes
from sdpo_jax.objectives import build, contexts, credit, families, methods, page
from sdpo_jax.objectives.signals import TEACHER_LOGP
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Feedback, Rollout, Task
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from tests import fakes

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_readme_lists_what_the_command_prints():
  assert page.page() in README.read_text(), (
    "README.md has another list of methods: put the output of "
    "python -m sdpo_jax.objectives.methods into its place"
  )


def test_the_readme_has_the_short_list_that_the_command_prints(capsys):
  page.print_page(["--short"])
  assert capsys.readouterr().out in README.read_text(), (
    "README.md has another short list of methods: put the output of "
    "python -m sdpo_jax.objectives.methods --short into its place"
  )


def test_every_method_is_in_one_family():
  names = [name for rows in families.FAMILIES.values() for name in rows]
  assert len(names) == len(set(names)) and set(names) == set(methods.METHODS)


def test_every_row_says_where_it_comes_from():
  assert methods.ABOUT.keys() == methods.METHODS.keys()
  for name, about in methods.ABOUT.items():
    assert about.source and "|" not in about.source + about.decided, name


@pytest.mark.parametrize(
  "name, base, changes",
  [
    ("sdpo", "sdpo", []),
    ("dapo", "grpo", ["advantage `group_mean` (normalize_std=True)"]),
    ("sdpo_forward_kl", "sdpo", ["token_signal `divergence` (alpha=0.0)"]),
    ("counterfactual", "sdpo", ["counterfactual `notes`"]),
  ],
)
def test_what_a_row_changes_is_read_off_it(name, base, changes):
  assert page.changes(name) == (base, changes)


@pytest.mark.parametrize(
  "name, needs",
  [
    ("grpo", []),
    ("rlrt", []),
    ("rlsd", ["weights of a teacher", "reference solutions"]),
    ("cscr", ["1 more reading"]),
    ("pmi", ["weights of a teacher", "2 more readings", "reference solutions"]),
    ("drift", ["weights of a teacher", "questions that come back"]),
    ("counterfactual", ["weights of a teacher", "more responses", "1 more reading"]),
  ],
)
def test_what_a_row_needs_is_read_off_it(name, needs):
  assert page.needs(name) == needs


@pytest.mark.parametrize(
  "name, change, named",
  [
    (
      "srpo",
      dict(credit=dict(name="rlsd")),
      "no response that learns from the reward has a reading",
    ),
    ("h2sd", dict(route=dict(name="taught")), "no response that learns from the reward"),
    ("grpo", dict(credit=dict(name="rlsd")), "needs a teacher"),
    ("grpo", dict(teacher_context=dict(name="reference_solution")), "would not be read"),
    ("grpo", dict(teacher_weights=dict(name="frozen")), "would not be read"),
    ("sdpo", dict(credit=dict(name="rlsd")), "method.surrogate.name is 'none'"),
    ("rlsd", dict(credit=dict(name="cscr")), "has 0 further readings"),
    ("beta_opsd", dict(teacher_logits=dict(name="tilt", share_steps=0)), "would not be read"),
    (
      "beta_opsd",
      dict(teacher_logits=dict(name="tilt", share=0.0, share_end=0.0)),
      "makes the teacher the policy itself",
    ),
    ("sdpo", dict(route=dict(name="outcome")), "not 'routed'"),
    (
      "sdpo",
      dict(teacher_context=dict(name="question_alone"), teacher_weights=dict(name="live")),
      "the teacher would be the policy itself",
    ),
    ("sdpo", dict(teacher_context=dict(name="question_alone")), "teaches nothing: it needs a"),
    ("srpo", dict(teacher_context=dict(name="question_alone")), "not policy_share='routed'"),
    ("sdpo", dict(memory=dict(name="questions")), "would not be read"),
    ("drift", dict(memory=dict(name="none")), "needs a memory of questions"),
  ],
)
def test_a_row_whose_parts_do_not_meet_is_refused_in_one_line(name, change, named):
  with pytest.raises(ValueError) as error:
    build.build_method(build.method_row(name) | change)
  assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cscr", "pmi"])
def test_a_reward_that_is_not_finite_drops_its_response_from_every_reading(name):
  method = build.build_method(build.method_row(name))
  chat, task = Chat(fakes.ByteTokenizer()), Task("q", "question", solution="four")
  group = [
    Rollout(task, [1, 2], [3] * n, [-1.0] * n, "stop", "x" * n, Feedback(reward, ""))
    for n, reward in ((3, 1.0), (5, np.nan), (2, 0.0))
  ]
  packer = fakes.make_packer(
    method,
    chat,
    lambda task: [{"role": "user", "content": task.prompt}],
    Shapes((200, 300, 40)),
    max_teacher_tokens=200,
    further_readings=method.teacher_context.further,
  )
  packed = packer.pack([group])
  assert packed.metrics["data/dropped"] == 1
  assert len(packed.batch.readings) == 1 + method.further_count
  for reading in packed.batch.readings:
    assert sorted(reading.weight_BR.max(1)) == [0, 1, 1]


class Doubled:
  """A credit of a user's own: twice the advantage where the teacher likes a token better."""

  reads = (TEACHER_LOGP,)
  is_idle = False

  def __init__(self, *, factor: float = 2.0):
    self.factor = factor

  def __call__(self, signals, batch):
    advantage_B1 = batch.advantage_BR
    return jnp.where(signals[0].gap_BR > 0, self.factor * advantage_B1, advantage_B1)


class Hint:
  """A context of a user's own: always the same hint."""

  def __init__(self, *, hint: str = "think"):
    self.hint = hint

  def __call__(self, group, i):
    return Context(feedback=self.hint)


def test_a_method_from_outside_trains(monkeypatch):
  """A new credit and a new context are two entries and a row; no file of the package knows them."""
  monkeypatch.setitem(credit.CREDITS, "doubled", Doubled)
  monkeypatch.setitem(contexts.TEACHER_CONTEXTS, "hint", Hint)
  outside = methods.METHODS["grpo"] | dict(
    name="outside",
    teacher_context=dict(name="hint", hint="a word"),
    teacher_weights=dict(name="frozen"),
    credit=dict(name="doubled", factor=3.0),
  )
  monkeypatch.setitem(methods.METHODS, "outside", outside)
  method = build.build_method(build.method_row("outside"))
  config, params = fakes.toy_model(0, layers=1, width=16, heads=2, kv_heads=1)
  chat, task = Chat(fakes.ByteTokenizer()), Task("q", "question")
  group = []
  for text, reward in (("right", 1.0), ("no", 0.0)):
    tokens = chat.text_tokens(text)
    said = Feedback(reward, "")
    group.append(Rollout(task, [1, 2], tokens, [-1.0] * len(tokens), "stop", text, said))
  packer = fakes.make_packer(
    method,
    chat,
    lambda task: [{"role": "user", "content": task.prompt}],
    Shapes((200, 300, 40)),
    max_teacher_tokens=200,
  )
  packed = fakes.controlled(packer.pack([group]), method)
  assert [context.feedback for context in packed.contexts[0]] == ["a word"] * 2
  tx = optax.sgd(0.1)
  step = jax.jit(make_train_step(make_signals(config, method), method, tx))
  # a teacher that differs from the policy
  state = init_state(params, tx, keep_teacher=True)
  state = state._replace(teacher=jax.tree.map(lambda p: 1.5 * p, state.teacher))
  after, metrics = step(state, packed.batch)
  assert metrics["train/grad_norm"].mean > 0 and metrics["train/credit_change"].mean > 0
  # A is +-1/2, so a token that is credited gains twice that
  gains = np.asarray(metrics["train/credit_change"].total)
  assert gains == pytest.approx(round(float(gains)))
  assert not np.array_equal(after.params["embed"], params["embed"])
