"""CRAFT and what it is compared with: the parts of their loss, switches, controller, refusals."""

import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpo_jax import config, hlo, train
from sdpo_jax.bench import step as bench_step
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.shapes import Shapes
from sdpo_jax.given_policy import make_recorded_signals
from sdpo_jax.model import decoder
from sdpo_jax.objectives import build, loss, methods, surrogate
from sdpo_jax.objectives.balance import STRONG, ByContrast
from sdpo_jax.objectives.control import Control
from sdpo_jax.objectives.signals import Signals, gated, likelier, weighted_k3
from sdpo_jax.records import Feedback, Ratio, Rollout, Task
from sdpo_jax.train_step import init_state, make_reader, make_score, make_signals, make_train_step
from tests import fakes

SMALL = dict(layers=1, width=16, heads=2, kv_heads=1)
PILLARS = ("cti", "balance", "polarised")
SWITCHES = [dict(zip(PILLARS, on)) for on in itertools.product([False, True], repeat=3)]
ROWS = [name for name, row in methods.METHODS.items() if row["balance"]["name"] != "none"]


def built(**switches):
  """CRAFT with some of its pillars."""
  return build.build_method(methods._craft(**switches))


def signals_of(batch, seed=0):
  """Policy, teacher and two likely tokens, each at random."""
  rng = np.random.default_rng(seed)
  each = [jnp.asarray(rng.normal(size=batch.weight_BR.shape), jnp.float32) for _ in range(7)]
  return (Signals(*each[:5], logp_rivals=tuple(each[5:])),)


def jaxpr_of_term(method, name):
  """The program of one term's loss with its gradient, as text."""
  part_of = dict(distill="token_signal", policy="surrogate", reference="reference_kl")
  others = {part: None for term, part in part_of.items() if term != name}
  method, batch = method._replace(**others), fakes.toy_batch()

  def total(signals):
    (term,) = loss.plain_terms(method, signals, batch)
    return term.share * jnp.sum(term.loss_BR * term.weight_BR)

  return str(jax.make_jaxpr(jax.value_and_grad(total))(signals_of(batch)))


# ---- switches ------------------------------------------------------------------------------------


def test_without_a_pillar_the_row_is_that_of_sdar():
  assert methods._craft(**SWITCHES[0]) | dict(name="sdar") == methods.METHODS["sdar"]
  assert methods._craft(**SWITCHES[-1]) | dict(name="craft") == methods.METHODS["craft"]
  method, sdar = built(**SWITCHES[0]), build.build_method(build.method_row("sdar"))
  assert method.token_signal.func is sdar.token_signal.func is gated
  assert method.reference_kl == sdar.reference_kl and method.found_before_updates == (
    "logp_ref_BR",
  )
  batch = fakes.toy_batch()

  def program(method):
    def total(signals, batch):
      return loss.token_loss(method, signals, batch, loss.normalisers(method, batch))

    both = jax.value_and_grad(total, has_aux=True)
    return str(jax.make_jaxpr(both)(signals_of(batch), batch)), both(signals_of(batch), batch)

  (text, values), (wanted, wanted_values) = program(method), program(sdar)
  assert text == wanted
  jax.tree.map(np.testing.assert_array_equal, values, wanted_values)
  # what the pillars would read is an input that is not there
  without = batch._replace(credit_BR=None)
  got = loss.token_loss(sdar, signals_of(batch), without, loss.normalisers(sdar, without))
  jax.tree.map(np.testing.assert_array_equal, got, wanted_values[0])


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_a_pillar_that_is_off_leaves_the_program_of_its_term(switches):
  method, sdar = built(**switches), build.build_method(build.method_row("sdar"))
  batch = fakes.toy_batch()
  assert (method.contrast is not None) == any(switches.values())
  assert jaxpr_of_term(method, "policy") == jaxpr_of_term(sdar, "policy")
  if not switches["balance"]:
    assert loss.share_of(method, "distill", batch) == loss.share_of(method, "reference", batch)
    assert type(loss.share_of(method, "distill", batch)) is float
    assert Control(method).names() == ["learn"]
  same_signal, same_kl = not switches["cti"], not switches["polarised"]
  if same_signal:
    assert method.token_signal.func is sdar.token_signal.func
    assert method.token_signal.keywords == sdar.token_signal.keywords
  if same_kl:
    assert method.reference_kl.estimate is sdar.reference_kl.estimate
  same_share = not switches["balance"]
  got = {name: jaxpr_of_term(method, name) for name in ("distill", "reference")}
  want = {name: jaxpr_of_term(sdar, name) for name in ("distill", "reference")}
  assert (got["distill"] == want["distill"]) == (same_signal and same_share)
  assert (got["reference"] == want["reference"]) == (same_kl and same_share)


def test_a_switch_changes_its_own_axes_alone():
  for pillar, axes in (
    ("cti", {"token_signal"}),
    ("balance", {"balance", "reference_kl"}),
    ("polarised", {"reference_kl"}),
  ):
    on, off = methods._craft(), methods._craft(**{pillar: False})
    assert {axis for axis in on if on[axis] != off[axis]} == axes
  swapped = build.method_row("craft_swapped")
  assert swapped["reference_kl"] == build.method_row("craft")["reference_kl"] | dict(swap=True)


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdar", "grpo_opsd", "skill_sd", "craft", "craft_distil"])
def test_the_terms_add_up(name):
  """Loss = surrogate + lambda signal + mu KL, each a mean over its tokens, in plain numpy."""
  method, batch = build.build_method(build.method_row(name)), fakes.toy_batch()
  (x,) = signals = signals_of(batch)
  total, _ = loss.token_loss(method, signals, batch, loss.normalisers(method, batch))
  logp, q, div = (np.asarray(y, float) for y in (x.logp_BR, x.logp_teacher_BR, x.divergence_BR))
  c, gap, w = batch.credit_BR.astype(float), q - logp, batch.weight_BR
  ratio, A = np.exp(logp - batch.logp_old_BR), batch.advantage_BR
  gain = np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A)
  gain = np.where(A < 0, np.maximum(gain, 3 * A), gain)
  signal = {
    "sdar": gap / (1 + np.exp(-5 * gap)),
    "grpo_opsd": gap / 2,
    "skill_sd": ratio * (np.exp(gap) - 1 - gap),
    "craft": -c * logp,
    "craft_distil": np.maximum(c, 0) * div,
  }[name]
  r = logp - batch.logp_ref_BR
  k3 = np.clip(np.exp(-np.clip(r, -20, 20)) - 1 + r, -10, 10)
  is_craft = name.startswith("craft")
  kl = np.where(c > 0, np.clip(r, -10, 10), -np.clip(r, -10, 10)) if is_craft else k3
  share = {"skill_sd": 0.001}.get(name, 0.0125 if is_craft else 0.01)
  read = w * batch.readings[0].has_BR
  want = (-gain * w).sum() / w.sum() + share * (signal * read).sum() / read.sum()
  want += (0.0125 if is_craft else 0.01) * (kl * w).sum() / w.sum()
  assert float(total) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ["craft", "craft_distil", "adaptive_cringe"])
def test_a_cut_into_micro_batches_changes_nothing(name):
  """Rows of unequal length and weight: the shares of two pieces add up to the whole."""
  method, batch = build.build_method(build.method_row(name)), fakes.toy_batch(rows=6)
  (x,) = signals_of(batch)
  whole = loss.normalisers(method, batch)

  def of_rows(rows):
    cut = lambda y: y[rows] if np.ndim(y) and len(y) == 6 else y
    piece = batch._replace(
      **{k: cut(y) for k, y in batch._asdict().items() if k.endswith(("_B", "_BR"))},
      readings=(batch.readings[0]._replace(weight_BR=batch.readings[0].weight_BR[rows]),),
    )
    return float(loss.token_loss(method, (jax.tree.map(cut, x),), piece, whole)[0])

  pieces = of_rows(slice(0, 2)) + of_rows(slice(2, 6))
  assert pieces == pytest.approx(of_rows(slice(0, 6)), rel=1e-5)


def gradient(signal, x, batch, **settings):
  total = lambda logp_BR: jnp.sum(signal(x._replace(logp_BR=logp_BR), batch, **settings))
  return np.asarray(jax.grad(total)(x.logp_BR))


def test_the_gate_is_detached():
  batch = fakes.toy_batch()
  (x,) = signals_of(batch)
  gate = 1 / (1 + np.exp(-5 * np.asarray(x.gap_BR)))
  np.testing.assert_allclose(gradient(gated, x, batch, beta=5.0), -gate, rtol=1e-5)
  np.testing.assert_allclose(gradient(gated, x, batch, beta=0.0), -0.5)


def test_the_mean_gradient_of_the_weighted_estimate_is_that_of_reverse_kl():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    z, old, teacher = (jnp.asarray(rng.normal(size=6)) for _ in range(3))
    logq, logp_old = jax.nn.log_softmax(teacher), jax.nn.log_softmax(old)
    batch = fakes.toy_batch()._replace(logp_old_BR=logp_old[None])

    def each(z):
      return weighted_k3(Signals(jax.nn.log_softmax(z)[None], None, None, logq[None]), batch)[0]

    def reverse_kl(z):
      return jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - logq))

    # the tokens were sampled by the old policy
    got = jnp.exp(logp_old) @ jax.jit(jax.jacobian(each))(z)
    np.testing.assert_allclose(got, jax.grad(reverse_kl)(z), atol=1e-12)


def test_a_rejected_token_is_contrasted_with_likely_ones():
  """Policy ln(.1, .5, .3); token 0 is sampled, and its place among the likely ones is no rival."""
  p = np.array([[0.1, 0.5, 0.3]])
  x = Signals(
    jnp.log(jnp.array([[0.1, 0.1]])),
    None,
    None,
    jnp.log(jnp.array([[0.05, 0.2]])),  # the second is not rejected
    logp_rivals=tuple(jnp.full((1, 2), v) for v in (np.log(0.5), np.log(0.3), -1e9)),
  )
  got = likelier(x, fakes.toy_batch())
  of_rival = -np.log(p[0, 1:] / (p[0, 1:] + 0.1))
  np.testing.assert_allclose(got, [[of_rival @ [0.5, 0.3] / 0.8, 0.0]], rtol=1e-5)
  assert not np.asarray(likelier(x, fakes.toy_batch(), threshold=1.0)).any()
  slope = gradient(likelier, x, fakes.toy_batch())
  assert np.isfinite(slope).all() and slope[0, 0] > 0 == slope[0, 1]


def test_rivals_are_the_policys_likeliest_tokens():
  model, params = fakes.toy_model(0, **SMALL)
  batch = fakes.toy_batch()
  method = build.build_method(build.method_row("adaptive_cringe"))
  (x,) = jax.jit(make_signals(model, method))(params, None, batch)
  logp_BRV = np.array(jax.nn.log_softmax(fakes.dense_logits(params, model, batch.policy, batch)))
  top_BRM = np.argsort(-logp_BRV, -1)[..., : len(x.logp_rivals)]
  want = np.take_along_axis(logp_BRV, top_BRM, -1)
  want[top_BRM == batch.response_BR[..., None]] = -1e9
  counts_BR = batch.weight_BR > 0
  got = np.stack(x.logp_rivals, -1)
  assert got.shape[-1] == 5
  np.testing.assert_allclose(got[counts_BR], want[counts_BR], rtol=1e-4)


def test_dual_clip_by_hand():
  """Ratios 5 and .5; the gain of a failure is held at three times its advantage."""
  batch = fakes.toy_batch(rows=2, response=2)._replace(logp_old_BR=np.zeros((2, 2), np.float32))
  x = Signals(jnp.log(jnp.array([[5.0, 0.5]] * 2)), None, None, None)
  A = jnp.array([[1.0], [-1.0]])
  plain = dict(low=0.2, high=0.2, rollout_is_clip=None)
  free = surrogate.clipped(x, batch, A, **plain)
  np.testing.assert_allclose(free, [[-1.2, -0.5], [5.0, 0.8]], rtol=1e-6)
  held = surrogate.clipped(x, batch, A, dual_clip=3.0, **plain)
  np.testing.assert_allclose(held, [[-1.2, -0.5], [3.0, 0.8]], rtol=1e-6)
  total = lambda y: jnp.sum(surrogate.clipped(y, batch, A, dual_clip=3.0, **plain))
  assert jax.grad(total)(x).logp_BR[1, 0] == 0


@pytest.mark.parametrize("name", ROWS)
def test_extremes_and_junk_under_tokens_that_do_not_count(name):
  """Gaps and log-ratios of +-320, NaN where the weight is 0: the loss and its gradient are
  numbers.
  """
  method, batch = build.build_method(build.method_row(name)), fakes.toy_batch()
  counts_BR = batch.weight_BR > 0
  (x,) = signals_of(batch)
  far = jnp.asarray(np.resize([80.0, -80.0, 320.0, -320.0], counts_BR.shape), jnp.float32)

  def spoilt(y_BR):
    return jnp.where(counts_BR, y_BR, jnp.nan)

  batch = batch._replace(
    logp_old_BR=spoilt(x.logp_BR),
    logp_rollout_BR=spoilt(x.logp_BR),
    logp_ref_BR=spoilt(x.logp_BR + far),
    credit_BR=spoilt(batch.credit_BR),
  )
  x = x._replace(logp_teacher_BR=x.logp_BR - far)
  x = jax.tree.map(spoilt, x)
  total = lambda x: loss.token_loss(method, (x,), batch, loss.normalisers(method, batch))[0]
  value, slope = jax.value_and_grad(total)(x)
  assert np.isfinite(value)
  for y_BR in jax.tree.leaves(slope):
    assert np.isfinite(y_BR).all() and not np.asarray(y_BR)[~counts_BR].any()


# ---- the controller ------------------------------------------------------------------------------


def fed(controller, *shares, applied=True):
  """Tells a controller of batches; returns rho before each of them."""
  seen = []
  for share in shares:
    seen.append(controller.begin(None)[0])
    controller.end({STRONG: Ratio(share * 40.0, 40.0)}, applied=applied)
  return seen


def test_the_share_is_held_for_ten_batches_and_then_averaged():
  controller = ByContrast().controller()
  assert fed(controller, *[1.0] * 11) == [0.5] * 11  # the eleventh is the first that counts
  rho, reasons = controller.begin(None)
  assert rho == pytest.approx(0.95 * 0.5 + 0.05)
  assert reasons == pytest.approx(
    {"control/signal": 0.005 + 0.015 * rho, "control/reference_kl": 0.005 + 0.015 * (1 - rho)}
  )
  assert fed(controller, 0.0, 0.0)[1] == pytest.approx(0.95 * rho)
  before = controller.state()
  fed(controller, 1.0, applied=False)
  controller.end({STRONG: Ratio(0.0, 0.0)}, applied=True)
  assert controller.state() == before and before["n"] == 13


@pytest.mark.parametrize("before", [0, 9, 10, 11, 14])
def test_the_controller_goes_on_from_a_checkpoint(before):
  method, shares = built(), np.linspace(0.1, 0.9, 20)
  whole, first, second = (Control(method) for _ in range(3))

  def feed(control, shares):
    seen = []
    for share in shares:
      seen.append(control.begin([], 1)[0]["balance"])
      control.end({STRONG: Ratio(share, 1.0)}, applied=True)
    return seen

  wanted = feed(whole, shares)
  feed(first, shares[:before])
  state = json.loads(json.dumps(first.state()))
  feed(first, shares[before:])
  second.restore(state)
  assert feed(second, shares[before:]) == wanted[before:]
  assert state["balance"]["n"] == before and len(set(wanted)) == 10


def test_coefficients_are_inputs_of_the_program_or_its_constants():
  batch = fakes.toy_batch()
  losses = {}
  for balance in (True, False):
    method = built(balance=balance)

    @jax.jit
    def total(batch, method=method):
      return loss.token_loss(method, signals_of(batch), batch, loss.normalisers(method, batch))[0]

    with fakes.compilations("total") as programs:
      for rho in (0.0, 1.0):
        moved = batch._replace(control=batch.control | {"balance": np.float32(rho)})
        losses[balance, rho] = float(total(moved))
    assert len(programs) == 1
  assert losses[True, 0.0] != losses[True, 1.0] and losses[False, 0.0] == losses[False, 1.0]


def test_strong_tokens_are_counted_among_all_that_are_scored():
  method, batch = built(), fakes.toy_batch()
  _, metrics = loss.token_loss(method, signals_of(batch), batch, loss.normalisers(method, batch))
  strong = (np.abs(batch.credit_BR) > 0.1) & (batch.weight_BR > 0)
  assert metrics[STRONG].mean == pytest.approx(strong.sum() / (batch.weight_BR > 0).sum())


# ---- the pass before the updates -----------------------------------------------------------------


def packed_groups(method, questions=2, group=4):
  """Judged groups whose responses lie in several packs, in another order than in the groups."""
  chat = Chat(fakes.ByteTokenizer())
  rng, groups = np.random.default_rng(0), []
  for q in range(questions):
    task = Task(f"q{q}", "question", solution="four")
    groups.append([])
    for g in range(group):
      tokens = rng.integers(97, 120, rng.integers(2, 9)).tolist()
      feedback = Feedback(float((q + g) % 2), "look again")
      logp = [-1.0] * len(tokens)
      groups[q].append(Rollout(task, [1, 2], tokens, logp, "stop", "text", feedback))
  packer = fakes.make_packer(
    method,
    chat,
    lambda task: [{"role": "user", "content": task.prompt}],
    Shapes((400, 500, 60)),
    max_teacher_tokens=400,
    shards=4,
  )
  return fakes.controlled(packer.pack(groups), method), groups


def completed(method, params, model, packed, reference):
  """What a run does before the updates, without its loop."""
  score = make_score(make_recorded_signals(model, mix=None))
  scores = jax.jit(score)(init_state(params, optax.sgd(0.1)), packed.batch)
  steps = types.SimpleNamespace(
    learner=types.SimpleNamespace(method=method),
    session=types.SimpleNamespace(mesh=None),
    reference=reference,
    _read_reference=jax.jit(make_reader(model)),
  )
  bare = packed._replace(batch=packed.batch._replace(credit_BR=None, logp_ref_BR=None))
  return train.Steps.complete(steps, bare, scores), scores


def test_the_pass_before_the_updates_fills_the_batch():
  model, params = fakes.toy_model(0, **SMALL)
  _, reference = fakes.toy_model(1, **SMALL)
  method = built()
  packed, groups = packed_groups(method)
  assert [groups[q][g] for q, g in packed.member_B2] == packed.rollouts
  assert packed.rollouts != groups[0] + groups[1]  # dealt to packs by their lengths
  got, scores = completed(method, params, model, packed, reference)
  batch, counts_BR = got.batch, packed.batch.weight_BR > 0
  own = make_signals(model, method)(reference, None, packed.batch)[0].logp_BR
  np.testing.assert_allclose(batch.logp_ref_BR[counts_BR], own[counts_BR], atol=1e-5)
  gap_BR = np.asarray(scores.logp_teacher_BR - scores.logp_BR)
  want, _ = method.contrast.credit(batch, gap_BR, packed.member_B2)
  np.testing.assert_array_equal(batch.credit_BR, want)
  assert np.abs(want[counts_BR]).min() > 0 and got.metrics["craft/aligned"] > 0.5
  # no teacher is run in the step itself
  assert make_signals(model, method)(params, None, batch)[0].logp_teacher_BR is None
  # and a response's credit has the sign of -A, or there is no sibling at its place
  A_BR = np.broadcast_to(batch.advantage_BR, want.shape)
  share = np.mean((want * A_BR)[counts_BR] < 0)
  assert share >= got.metrics["craft/aligned"] - 0.3


@pytest.mark.parametrize("mix", [None, 0.3])
def test_the_teacher_alone_is_read_as_beside_the_policy(mix):
  model, params = fakes.toy_model(0, **SMALL)
  _, teacher = fakes.toy_model(1, **SMALL)
  method = built()
  packed, _ = packed_groups(method)
  weights = method.teacher_weights._replace(mix=mix)
  both = make_signals(model, method.before_updates._replace(teacher_weights=weights))
  (want,) = both(params, teacher, packed.batch)
  counts_BR = packed.batch.weight_BR > 0
  batch = packed.batch._replace(logp_rollout_BR=want.logp_BR)  # an engine without rounding
  (got,) = make_recorded_signals(model, mix=mix)(params, teacher, batch)
  np.testing.assert_allclose(got.gap_BR[counts_BR], want.gap_BR[counts_BR], atol=2e-6)


def test_a_run_reads_the_first_weights_only_where_a_part_asks():
  for name in ("sdpo", "grpo", "rlsd"):
    assert not build.build_method(build.method_row(name)).found_before_updates
  assert built().found_before_updates == ("credit_BR", "logp_ref_BR")


def test_a_step_costs_no_more_than_sdars():
  """In operations of matrix products, with what is read before the update."""
  model, tx = bench_step.model_of("small", "cpu"), optax.sgd(0.01)
  lengths = bench_step.lengths_of("equal", 8)

  def operations(name):
    method = build.build_method(build.method_row(name))
    batch = bench_step.device_batch(model, method, lengths, 1, "cpu")
    signals = make_signals(model, method, remat="dots")
    state = jax.eval_shape(lambda key: init_state(decoder.init(model, key), tx), jax.random.key(0))
    step = make_train_step(signals, method, tx)
    score = make_score(make_recorded_signals(model, mix=None))
    count = lambda f, *args: hlo.operations(jax.make_jaxpr(f)(*args).jaxpr)
    read = count(make_reader(model), state.params, batch)
    before = count(score, state, batch) if "credit_BR" in method.found_before_updates else 0
    return count(step, state, batch), before + read

  (sdar, sdar_before), (craft, craft_before) = operations("sdar"), operations("craft")
  assert craft < 0.9 * sdar
  assert 0.97 < (craft + craft_before) / (sdar + sdar_before) < 1.03


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name, change, named",
  [
    ("craft", dict(contrast=dict(name="none")), "reads its credit: set it to cti"),
    ("sdar", dict(contrast=dict(name="cti")), "would not be read by any of"),
    ("craft", dict(credit=dict(name="rlsd")), "goes with no other method's terms"),
    ("craft", dict(counterfactual=dict(name="notes")), "goes with no other method's terms"),
    ("craft", dict(route=dict(name="outcome")), "goes with no other method's terms"),
    ("craft", dict(policy_share=0.5), "needs policy_share=1.0, not 0.5"),
    ("craft", dict(policy_share="routed"), "needs policy_share=1.0, not 'routed'"),
    ("sdpo", dict(balance=dict(name="fixed")), "adds a token signal to the whole of a surrogate"),
    ("grpo", dict(balance=dict(name="fixed")), "token_signal 'none'"),
    (
      "sdpo_blend",
      dict(
        contrast=dict(name="cti"),
        reference_kl=dict(name="polarised"),
        token_signal=dict(name="gated"),
      ),
      "counts whole",
    ),
    ("craft", dict(reference_kl=dict(name="k3", coefficient=0.01)), "set it to None"),
    ("sdar", dict(reference_kl=dict(name="k3", coefficient=None)), "set a number"),
    ("sdar", dict(surrogate=dict(name="clipped", dual_clip=1.0)), "must be above 1"),
  ],
)
def test_what_does_not_go_together_is_refused_in_one_line(name, change, named):
  with pytest.raises(ValueError) as error:
    build.build_method(build.method_row(name) | change)
  assert named in str(error.value) and "\n" not in str(error.value)


def test_one_response_a_question_has_nothing_to_contrast():
  c = config.load("configs/tinycode.py:method=craft,local")
  config.validate(c)
  c.rollout.group = 1
  with pytest.raises(ValueError, match=r"config\.rollout\.group=1 .* groups of 2 or more"):
    config.validate(c)


@pytest.mark.parametrize("base", ["sdpo", "grpo", "sdpo_blend"])
def test_any_row_may_pay_for_leaving_the_first_weights(base):
  row = build.method_row(base) | dict(reference_kl=dict(name="k2", coefficient=0.5))
  method, batch = build.build_method(row), fakes.toy_batch()
  plain = build.build_method(build.method_row(base))
  x = signals_of(batch)
  totals = [
    float(loss.token_loss(m, x, batch, loss.normalisers(m, batch))[0]) for m in (method, plain)
  ]
  r, w = np.asarray(x[0].logp_BR) - batch.logp_ref_BR, batch.weight_BR
  want = 0.5 * (np.minimum(r**2 / 2, 10) * w).sum() / w.sum()
  assert totals[0] - totals[1] == pytest.approx(want, rel=1e-4)
