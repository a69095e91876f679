"""DRIFT and H2SD: who learns from what, which text is read, and the rhythm gate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.shapes import Shapes
from sdpo_jax.objectives import build
from sdpo_jax.objectives.contexts_outcome import Drift, RephraseOrHint
from sdpo_jax.objectives.credit import advantages
from sdpo_jax.objectives.memory import Standing
from sdpo_jax.objectives.rhythm import Rhythm
from sdpo_jax.objectives.route import Drift as DriftRoute
from sdpo_jax.objectives.route import Lot, Outcome
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.records import Feedback, Rollout, Status, Task
from sdpo_jax.train_step import make_signals
from tests import fakes
from tests.test_objectives import loss_of, two_responses, with_teacher

CHAT, ENV = Chat(fakes.ByteTokenizer()), fakes.ListEnv({})
TASK = Task("t/0", "Write f.")


def response(text, reward, logp=-1.0, status=Status.SCORED, task=TASK):
  tokens = CHAT.text_tokens(text) + [257]
  prompt = CHAT.prompt_tokens(ENV.prompt(task))
  feedback = Feedback(reward, "it failed", status)
  return Rollout(task, prompt, tokens, [logp] * len(tokens), "stop", text, feedback)


FIRST, SECOND = Standing(0.5, 1, stage=1), Standing(0.5, 3, ("old", "older"), stage=2)
GROUP = [
  response("<think>a</think> the long one", 1.0, logp=-0.5),
  response("short", 1.0, logp=-0.7),
  response("wrong", 0.0),
  response("lower", 0.8, logp=-2.0),
  response("broken", 1.0, status=Status.ENV_FAILED),
]
FAILURES = [response("wrong", 0.0), response("also wrong", 0.2)]


def shown(context, group, standing):
  contexts = [context(group, i, standing) for i in range(len(group))]
  return [None if c is None else c.solution for c in contexts]


# ---- routes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "pass_rate, level, factor",
  [
    (0.0, "hard", 0.0),
    (0.2, "medium", 1.0),  # a bound is medium
    (0.5, "medium", 1.0),
    (0.8, "medium", 1.0),
    (0.81, "easy", 0.5),
  ],
)
def test_the_second_stage_routes_by_outcome_and_difficulty(pass_rate, level, factor):
  lots, standing = DriftRoute()(GROUP, Standing(pass_rate, 3))
  assert (standing.stage, standing.level) == (2, level)
  assert lots == [Lot(False, factor)] * 2 + [Lot(True)] + [Lot(False, factor)] * 2


def test_the_first_visits_are_the_first_stage():
  for visits in (1, 2):
    lots, standing = DriftRoute()(GROUP, Standing(0.9, visits))
    assert standing.stage == 1 and lots == [Lot(True)] * 5
  assert DriftRoute(warm_up_visits=0)(GROUP, Standing(0.9, 1))[1].stage == 2
  assert [lot.distils for lot in Outcome(0.9)(GROUP, None)[0]] == [0, 0, 1, 1, 0]


def test_levels_do_not_overlap():
  row = build.method_row("drift")
  row["route"].update(hard_below=0.9, easy_above=0.8)
  with pytest.raises(ValueError, match="method.route.hard_below=0.9 must be at most"):
    build.build_method(row)


# ---- what is read --------------------------------------------------------------------------------


def test_the_first_stage_shows_the_success_of_largest_entropy_among_the_best():
  """The reward decides first, nobody reads itself, and what was not judged is not shown."""
  assert shown(Drift(), GROUP[:4], FIRST) == ["short", "the long one", "short", "short"]
  within = Drift(delta=0.3)
  assert shown(within, GROUP[:4], FIRST) == ["lower", "lower", "lower", "short"]
  assert shown(Drift(success_threshold=0.9), GROUP[2:], FIRST) == [None] * 3
  # no feedback, and nothing remembered, stands in for a success
  assert shown(Drift(), FAILURES, dataclasses.replace(SECOND, stage=1)) == [None, None]


def test_the_second_stage_shows_failures_the_shortest_success_of_the_largest_reward():
  assert shown(Drift(), GROUP[:4], SECOND) == [None, None, "short", None]
  assert shown(Drift(delta=0.3, pick="first"), GROUP[:4], SECOND)[2] == "the long one"
  assert shown(Drift(pick="largest_entropy"), GROUP[:4], SECOND)[2] == "short"
  gated = Drift(medium_successes=True)
  assert shown(gated, GROUP[:4], SECOND) == ["short", "the long one", "short", "short"]
  assert shown(gated, GROUP[1:3], SECOND) == [None, "short"]  # a success without another one
  easy = dataclasses.replace(SECOND, level="easy")
  assert shown(gated, GROUP[:4], easy) == [None, None, "short", None]


def test_failures_among_themselves_read_an_earlier_solution_drawn_by_question_and_visit():
  standings = [dataclasses.replace(SECOND, visits=v, solutions=("a", "b", "c")) for v in range(300)]
  drawn = [shown(Drift(), FAILURES, standing) for standing in standings]
  assert drawn == [shown(Drift(), FAILURES, standing) for standing in standings]
  for column in zip(*drawn):
    counts = [column.count(solution) for solution in "abc"]
    assert sum(counts) == 300 and min(counts) > 75  # of 100 each, 3 standard deviations are 24
  assert drawn != [
    shown(Drift(), [response("no", 0.0, task=Task("t/1", ""))] * 2, s) for s in standings
  ]
  assert all(Drift()(FAILURES, i, SECOND).remembered for i in (0, 1))
  assert not Drift()(GROUP, 2, SECOND).remembered
  assert shown(Drift(), FAILURES, dataclasses.replace(SECOND, solutions=())) == [None, None]


def test_h2sd_shows_a_success_itself_and_a_failure_a_hint():
  context = RephraseOrHint()
  texts = [c and c.render("Write f.") for c in (context(GROUP, i) for i in range(5))]
  assert "Correct solution:\n\nthe long one\n\n" in texts[0] and "in your own words" in texts[0]
  assert "Correct solution:\n\nthe long one\n\n" in texts[2] and "own words" not in texts[2]
  assert texts[4] is None
  hinted = Task("t", "Write f.", solution="return 1", data={"hint": "Think of {x}."})
  assert "Hint:\n\nThink of {x}." in context([response("no", 0.0, task=hinted)], 0).render("Q")
  told = dataclasses.replace(hinted, data={})
  assert context([response("no", 0.0, task=told), GROUP[0]], 0).solution == "return 1"
  assert context(FAILURES, 0) is None
  with pytest.raises(ValueError, match="asks for {text}"):
    RephraseOrHint(rephrase="{text}")


# ---- the batch and its loss ----------------------------------------------------------------------


def packed(name, groups, **axes):
  row = build.method_row(name)
  for axis, settings in axes.items():
    row[axis] |= settings
  method = build.build_method(row)
  shapes = Shapes((4000, 5000, 3000), [], 0.0)
  return method, fakes.make_packer(method, CHAT, ENV.prompt, shapes, max_teacher_tokens=400).pack(
    groups
  )


def test_a_batch_of_the_second_stage():
  """A medium question: one failure of two distils, successes have the advantage over the group.

  A question without a success and without memory is in neither term, and its level is hard.
  """
  others = [dataclasses.replace(r, task=Task("t/1", "Write f.")) for r in FAILURES]
  groups = [[GROUP[1], GROUP[2]], others]
  method, p = packed("drift", groups, route=dict(warm_up_visits=0))
  b, rows = p.batch, [p.rollouts.index(r) for group in groups for r in group]
  assert b.route_B[rows].tolist() == [0, 1, 1, 1]
  assert b.readings[0].weight_BR.max(1)[rows].tolist() == [0, 1, 0, 0]
  assert b.advantage_BR[:, 0][rows].tolist() == pytest.approx([0.5, -0.5, -0.1, 0.1])
  assert {k: v for k, v in p.metrics.items() if k.startswith(("route/", "memory/"))} == {
    "route/distilled": 0.25,
    "route/neither": 0.5,
    "route/first_stage": 0,
    "route/easy": 0,
    "route/medium": 0.5,
    "route/hard": 0.5,
    "memory/questions": 2,
    "memory/solutions": 1,
    "memory/megabytes": pytest.approx(5e-6),
    "memory/read": 0,
  }
  easy = [response("x", 1.0), response("y", 1.0), response("z", 1.0), response("no", 0.0)]
  _, p = packed("drift", [easy], route=dict(warm_up_visits=0, easy_above=0.7, easy=0.5))
  assert sorted(p.batch.advantage_BR[:, 0]) == pytest.approx([-0.75 * 0.5 * 2, 0.125, 0.125, 0.125])


def test_the_loss_by_hand():
  """Both terms over the tokens of the whole batch: D of the failure, -A at ratio 1 of the success.

  The failure without a reading counts in the normaliser alone.
  """
  batch, old = two_responses()  # lengths 1 and 3
  method = build.build_method(build.method_row("drift"))
  divergence = jnp.full((2, 3), 0.3)
  signals = Signals(jnp.asarray(old), jnp.zeros((2, 3)), divergence, jnp.asarray(old))
  ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
  first = np.array([1.0, 0.0], np.float32)
  for route_B, weight_B, want in (
    (first, ones, (0.3 + 3) / 4),
    (1 - first, ones, (-1 + 3 * 0.3) / 4),
    (ones, first, 0.3 / 4),
    (ones, zeros, 0.0),
    (zeros, ones, (-1 + 3) / 4),
  ):
    routed = with_teacher(batch, weight_B)._replace(route_B=route_B)
    assert float(loss_of(method, (signals,), routed)) == pytest.approx(want, abs=1e-6)


def test_h2sd_by_hand():
  """A success has A clip(e^gap, 1 +- 0.2) on each token, a failure its divergence; one divisor."""
  batch, old = two_responses()  # lengths 1 and 3, advantages 1 and -1
  batch = with_teacher(batch, np.ones(2, np.float32))
  batch = batch._replace(route_B=np.array([0, 1], np.float32), control={"credit": np.float32(1.0)})
  method = build.build_method(build.method_row("h2sd"))
  divergence = jnp.asarray([[9.0, 0, 0], [0.1, 0.2, 0.6]])
  for gap, factor in ((0.1, np.exp(0.1)), (-0.1, np.exp(-0.1)), (3.0, 1.2), (-3.0, 0.8)):
    signals = Signals(jnp.asarray(old), jnp.zeros((2, 3)), divergence, jnp.asarray(old) + gap)
    assert float(loss_of(method, (signals,), batch)) == pytest.approx((0.9 - factor) / 4, abs=1e-6)


def test_a_batch_of_h2sd():
  task = Task("t/0", "Write f.", data={"hint": "Think."})
  group = [dataclasses.replace(r, task=task) for r in (GROUP[0], GROUP[2])]
  _, p = packed("h2sd", [group])
  rows = [p.rollouts.index(r) for r in group]
  assert p.batch.route_B[rows].tolist() == [0, 1]
  assert p.batch.readings[0].weight_BR.max(1)[rows].tolist() == [1, 1]
  assert [p.contexts[0][b].solution for b in rows] == ["the long one", "Think."]
  assert p.metrics["route/distilled"] == 0.5 and p.metrics["route/neither"] == 0


# ---- the gate ------------------------------------------------------------------------------------


def by_hand(
  logp, logq, policy, teacher, counts, *, mu=0.1, tau=1.0, cap=1.5, W=8, a=1.0, s=1.0, most=2.0
):
  """The factors of one response, token by token, as the paper's section 3.3 is printed."""
  T, drops = len(logp), []
  for entropy in (teacher, policy):
    drop = []
    for t in range(T):
      past, future = (
        entropy[i][counts[i]] for i in (slice(max(t - W, 0), t), slice(t + 1, t + 1 + W))
      )
      drop.append(max(np.mean(past) - np.mean(future), 0) if len(past) and len(future) else 0.0)
    drops.append(np.array(drop))
  D = np.maximum(drops[0] - drops[1], 0) * np.maximum(policy - teacher, 0)
  std = D[counts].std()
  z = (D - D[counts].mean()) / std if std else np.zeros(T)
  m = 1 + s * 2 * np.maximum(1 / (1 + np.exp(-a * z)) - 0.5, 0)
  gate = np.clip((np.clip(m / m[counts].mean(), 0.5, most) - 1) / (most - 1), 0, 1)
  return 1 + gate * (np.minimum(np.exp(tau * np.maximum(logp - logq - mu, 0)), cap) - 1)


def random_response(T, seed=0):
  rng = np.random.default_rng(seed)
  logp, logq = -rng.exponential(size=(2, T))
  return logp, logq, *rng.exponential(size=(2, T))


def signals_of(*per_token):
  logp, logq, policy, teacher = (jnp.asarray(x, jnp.float32) for x in per_token)
  return Signals(logp, policy, None, logq, teacher)


@pytest.mark.parametrize(
  "settings, same",
  [
    (dict(), dict()),
    (dict(window=2, tau=3.0, mu=0.4), dict(W=2, tau=3.0, mu=0.4)),
    (
      dict(window=50, bonus_most=4.0, steepness=3.0, strength=5.0, most=1.5),
      dict(W=50, cap=4.0, a=3.0, s=5.0, most=1.5),
    ),
  ],
)
def test_the_gate_against_its_formula(settings, same):
  """Responses of 1, 2, 5 and 20 tokens, padded, and with tokens between that do not count."""
  counts_BR = np.zeros((4, 40), bool)
  for b, n in enumerate((1, 2, 5, 20)):
    counts_BR[b, np.r_[: n // 2, n // 2 + 3 : n + 3]] = True
  rows = [random_response(40, seed) for seed in range(4)]
  factor_BR = Rhythm(**settings).factor(signals_of(*np.stack(rows, 1)), np.float32(counts_BR))
  want_BR = np.array([by_hand(*row, counts, **same) for row, counts in zip(rows, counts_BR)])
  np.testing.assert_allclose(factor_BR[counts_BR], want_BR[counts_BR], rtol=1e-5)
  assert want_BR[counts_BR].min() == 1 and want_BR[3][counts_BR[3]].max() > 1.05


def test_windows_end_at_the_response():
  """Nothing lies before the first token or behind the last, and nothing of the padding counts."""
  policy, teacher = np.ones(6), np.array([0.9, 0.9, 0.5, 0.1, 0.1, 0.1])
  logp, logq = np.zeros(6), np.full(6, -5.0)
  want = by_hand(logp, logq, policy, teacher, np.ones(6, bool))
  assert want[0] == want[5] == 1 and want[2] > 1.02
  padded = [np.pad(x, (0, 9), constant_values=3.0) for x in (logp, logq, policy, teacher)]
  weight = np.pad(np.ones(6, np.float32), (0, 9))
  factor_BR = Rhythm().factor(signals_of(*(x[None] for x in padded)), weight[None])
  np.testing.assert_allclose(factor_BR[0, :6], want, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 30])
def test_without_an_anchor_nothing_changes(length):
  """All anchors are 0: the teacher is nowhere surer than the policy, or the response too short."""
  logp, logq, policy, teacher = random_response(length)
  surer = policy + 0.1 if length > 2 else teacher
  factor_BR = Rhythm().factor(
    signals_of(*(x[None] for x in (logp, logq, policy, surer))), np.ones((1, length), np.float32)
  )
  np.testing.assert_array_equal(factor_BR, np.ones((1, length)))


def test_the_credit_keeps_the_sign_and_leaves_alone_what_has_no_reading():
  batch = fakes.toy_batch(rows=4, response=12)
  method = build.build_method(build.method_row("drift_gate"))
  rows = [random_response(12, seed) for seed in range(4)]
  signals = signals_of(*np.stack(rows, 1))._replace(divergence_BR=jnp.ones((4, 12)))
  batch = with_teacher(batch, np.array([1, 0, 1, 1], np.float32))
  batch = batch._replace(
    weight_BR=np.ones((4, 12), np.float32),
    advantage_BR=fakes.per_token([2.0, 2.0, -2.0, 0.0], batch),
  )
  credited_BR = np.asarray(advantages(method.credit, (signals,), batch))
  assert (np.sign(credited_BR) == np.sign(batch.advantage_BR)).all()
  assert (np.abs(credited_BR) >= np.abs(batch.advantage_BR)).all()
  assert (credited_BR[[0, 2]] != batch.advantage_BR[[0, 2]]).any()
  assert (credited_BR[1] == 2).all() and (credited_BR[3] == 0).all()


def test_a_gate_that_never_opens_is_drift_bit_for_bit():
  config, params = fakes.toy_model(0, layers=1)
  _, teacher = fakes.toy_model(1, layers=1)
  batch = fakes.toy_batch(rows=4, response=12)
  batch = batch._replace(route_B=np.array([1, 1, 0, 0], np.float32))
  batch = with_teacher(batch, np.array([1, 0, 1, 1], np.float32))

  def method_of(name, **credit):
    row = build.method_row(name)
    row["credit"] |= credit
    return build.build_method(row)

  def loss_and_gradient(method):
    def loss(params):
      return loss_of(method, make_signals(config, method)(params, teacher, batch), batch)

    return jax.jit(jax.value_and_grad(loss))(params)

  for never in (dict(bonus_most=1.0), dict(tau=0.0), dict(steepness=0.0)):
    assert method_of("drift_gate", **never).credit is None
  want = loss_and_gradient(method_of("drift"))
  got = loss_and_gradient(method_of("drift_gate", strength=0.0))
  assert jax.tree.all(jax.tree.map(np.array_equal, got, want))
  opened = loss_and_gradient(method_of("drift_gate", strength=1000.0, most=1.01, mu=0.0))
  assert not np.array_equal(opened[0], want[0])


@pytest.mark.parametrize(
  "axis, change, said",
  [
    (
      "teacher_context",
      dict(medium_successes=False),
      "does not go with method.credit.name='rhythm'",
    ),
    ("credit", dict(name="none"), "medium_successes=True of 'drift' are the readings"),
    ("memory", dict(name="none"), "method.teacher_context.name='drift' needs a memory"),
    ("teacher_weights", dict(name="none"), "needs a teacher"),
    ("teacher_context", dict(pick="longest"), "method.teacher_context.pick='longest' is unknown"),
  ],
)
def test_what_does_not_go_together_is_refused(axis, change, said):
  row = build.method_row("drift_gate")
  name = change.get("name", row[axis]["name"])
  row[axis] = build.complete_part(axis, name) if "name" in change else row[axis] | change
  with pytest.raises(ValueError) as error:
    build.build_method(row)
  assert said in str(error.value) and "\n" not in str(error.value)
