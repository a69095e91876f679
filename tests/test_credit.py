"""Credits: numbers worked by hand, the identities they promise, and what their teachers read."""

import math

from absl.testing import flagsaver
import grain  # noqa: F401 - defines flags: imported first inside flagsaver, it would lose them
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpo_jax import config, errors, hlo, main, metrics, monitors, train
from sdpo_jax.bench import step as bench_step
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.shapes import Shapes
from sdpo_jax.data.teacher_prompt import teacher_prompt
from sdpo_jax.discover import mode
from sdpo_jax.kernels import token_logp
from sdpo_jax.model import decoder
from sdpo_jax.objectives import build, credit, loss, teacher_context
from sdpo_jax.objectives.control import Control
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.records import Feedback, Histogram, Rollout, Status, Task
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from tests import fakes

SMALL = dict(layers=1, width=16, heads=2, kv_heads=1)
ROWS = ("rlsd", "rlrt", "anti_sd", "cscr")
MULTIPLICATIVE = ("rlsd", "rlrt", "cscr")
TINYCODE = "--config=configs/tinycode.py"


def gap_signals(*gaps_BR):
  """The signals of readings that differ from the policy by these gaps."""
  zeros_BR = jnp.zeros(gaps_BR[0].shape)
  return tuple(Signals(zeros_BR, zeros_BR, None, jnp.asarray(g), zeros_BR) for g in gaps_BR)


def batch_of(advantage_B, weight_BR, share=0.5, read_B=None):
  rows, response = np.shape(weight_BR)
  batch = fakes.toy_batch(rows=rows, response=response)
  read_B = np.ones(rows, np.float32) if read_B is None else np.asarray(read_B, np.float32)
  return batch._replace(
    advantage_BR=fakes.per_token(advantage_B, batch),
    weight_BR=np.asarray(weight_BR, np.float32),
    readings=(batch.readings[0]._replace(weight_BR=fakes.per_token(read_B, batch)),),
    control=batch.control | {"credit": np.float32(share)},
  )


def credited(part, gaps_BR, advantage_B, **settings):
  """The advantages of tokens that all count; two gaps for a part with two readings."""
  batch = batch_of(advantage_B, np.ones(np.shape(gaps_BR[0])), **settings)
  return np.asarray(credit.advantages(part, gap_signals(*gaps_BR), batch))


# ---- formulas ------------------------------------------------------------------------------------


def test_rlsd_by_hand():
  """A success gains where the teacher likes the token better, a failure is blamed where not."""
  gap_BR = np.log(np.array([[1.1, 0.9, 9.0], [1.1, 0.9, 0.01]], np.float32))
  got = credited(credit.Rlsd(), [gap_BR], [2.0, -1.0], share=0.5)
  # for the failure the ratio is turned over: 1 / 1.1, 1 / .9, and 100 held at 1.2
  want = [[2 * 1.05, 2 * 0.95, 2 * 1.1], [-(0.5 + 0.5 / 1.1), -(0.5 + 0.5 / 0.9), -1.1]]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  part = credit.Rlsd(negative_only=True)
  got = credited(part, [gap_BR], [2.0, -1.0], share=0.5)
  np.testing.assert_allclose(got, [[2.0, 2.0, 2.0], want[1]], rtol=1e-5)


def test_rlrt_by_hand():
  """A success is credited to what the teacher would not have said; beyond 2 it is held."""
  gap_BR = np.log(np.array([[2.0, 0.8, 0.1]], np.float32))
  got = credited(credit.Rlrt(), [gap_BR], [2.0])
  np.testing.assert_allclose(got, [[2 * 0.75, 2 * 1.125, 2 * 1.5]], rtol=1e-5)


def test_anti_sd_by_hand():
  """With share 1, q / pi = 3 takes ln(2) / 2; an advantage of 0 is changed too."""
  gap_BR = np.log(np.array([[3.0, 1.0], [3.0, 1e-30]], np.float32))
  got = credited(credit.AntiSd(), [gap_BR], [1.0, 0.0], share=1.0)
  half = 0.5 * math.log(2.0)
  np.testing.assert_allclose(got, [[1.0 - half, 1.0], [-half, half]], atol=1e-6)


def test_cscr_by_hand():
  """s is .02, .05 and .25: weights 1, 1 and 1 - .2 (1 - e^-2); their mean becomes 1."""
  right_BR, wrong_BR = np.array([[0.02, -0.05, 0.1]]), np.array([[-0.01, 0.0, -0.25]])
  got = credited(credit.Cscr(), [right_BR, wrong_BR], [3.0])
  low = 1 - 0.2 * (1 - math.exp(-2.0))
  np.testing.assert_allclose(got, 3 * np.array([[1, 1, low]]) / ((2 + low) / 3), rtol=1e-5)


def test_the_mean_of_cscr_is_over_the_tokens_that_count():
  gap_BR = np.array([[0.0, 1.0, 9.0]])
  batch = batch_of([1.0], [[1.0, 0.5, 0.0]])
  got = credit.Cscr()(gap_signals(gap_BR, gap_BR), batch)[0, :2]
  assert float(got.sum()) == pytest.approx(2.0, rel=1e-5) and float(got[0]) > 1 > float(got[1])


# ---- identities ----------------------------------------------------------------------------------


def random_case(name, seed):
  """Returns (part, gaps, advantages): gaps of many sizes, infinite ones among them."""
  rng = np.random.default_rng(seed)
  part = build.build_method(build.method_row(name)).credit
  shape = (6, 5)
  gaps = rng.normal(size=(2, *shape)) * 10.0 ** rng.integers(-3, 3, (2, *shape))
  gaps[0, 0, 0], gaps[1, 1, 1] = np.inf, -np.inf
  advantage_B = rng.normal(size=6)
  advantage_B[2] = 0.0
  count = 1 + getattr(part, "further_count", 0)
  return part, gaps[:count].astype(np.float32), advantage_B.astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", MULTIPLICATIVE)
def test_multiplicative_credits_keep_the_sign(name, seed):
  part, gaps, advantage_B = random_case(name, seed)
  got = credited(part, gaps, advantage_B, share=1.0)
  assert np.isfinite(got).all()
  assert (np.sign(got) == np.sign(advantage_B)[:, None]).all()
  assert np.abs(got / np.where(advantage_B, advantage_B, 1)[:, None] - 1).max() > 0.1


@pytest.mark.parametrize("name", ROWS)
def test_without_a_reading_the_advantage_stays(name):
  part, gaps, advantage_B = random_case(name, 0)
  got = credited(
    part, np.nan_to_num(gaps, posinf=9, neginf=-9), advantage_B, read_B=[1, 1, 1, 0, 0, 0]
  )
  np.testing.assert_array_equal(got[3:], np.repeat(advantage_B[3:, None], 5, 1))
  assert (got[:2] != advantage_B[:2, None]).any()


@pytest.mark.parametrize("name", ["rlsd", "anti_sd"])
def test_a_share_that_has_fallen_to_0_gives_the_advantage_bit_for_bit(name):
  part, gaps, advantage_B = random_case(name, 0)
  gaps = np.nan_to_num(gaps, posinf=500, neginf=-500)
  got = credited(part, gaps, advantage_B, share=0.0)
  np.testing.assert_array_equal(got, np.repeat(advantage_B[:, None], 5, 1))


def test_the_weights_of_cscr_stay_within_their_bounds():
  rng = np.random.default_rng(0)
  for scale in (0.01, 0.1, 1.0, 100.0):
    gaps = rng.normal(size=(2, 64, 7)) * scale
    weight_BR = credited(credit.Cscr(), gaps, np.ones(64))
    assert 0.8 <= weight_BR.min() and weight_BR.max() <= 1.25
    np.testing.assert_allclose(weight_BR.mean(1), 1.0, rtol=1e-5)
  one_apart = np.array([[9.0] * 63 + [0.0]])  # close to the upper bound
  assert credited(credit.Cscr(), [one_apart, one_apart], [1.0]).max() > 1.24


def test_phi_is_the_weight_of_the_jensen_shannon_divergence():
  """With u = q / pi, phi = ln((1 + u) / 2) / 2, and sum_v pi_v phi_v grad ln pi_v = -grad JSD."""
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    z, q = jnp.asarray(rng.normal(size=9) * 2), jax.nn.softmax(jnp.asarray(rng.normal(size=9) * 2))

    def jsd(z):
      p = jax.nn.softmax(z)
      m = 0.5 * (p + q)
      return 0.5 * jnp.sum(p * jnp.log(p / m)) + 0.5 * jnp.sum(q * jnp.log(q / m))

    p = jax.nn.softmax(z)
    gap_BR = jnp.log(q / p)[None]
    phi_V = -credited(credit.AntiSd(), [gap_BR], [0.0], share=1.0)[0]
    np.testing.assert_allclose(phi_V, 0.5 * np.log((1 + q / p) / 2), rtol=1e-6)
    np.testing.assert_allclose(p * (phi_V - jnp.sum(p * phi_V)), -jax.grad(jsd)(z), atol=1e-7)
  large = credited(credit.AntiSd(), [np.array([[200.0, -200.0]], np.float32)], [0.0], share=1.0)
  np.testing.assert_allclose(large, [[-100 + 0.5 * math.log(2), 0.5 * math.log(2)]], rtol=1e-5)


# ---- the gate of anti_sd -------------------------------------------------------------------------


def gate_after(gate, *medians, applied=True):
  """Tells the gate of batches with these medians; returns the share after each."""
  shares = []
  for median in medians:
    x_BR = np.full((1, 5), median, np.float32)
    counted = loss.histogram(jnp.asarray(x_BR), np.isfinite(x_BR), loss.FINE)
    gate.end({gate.MEDIAN: counted}, applied=applied)
    shares.append(gate.begin(None)[0])
  return shares


def test_the_gate_closes_below_its_floor_and_opens_at_its_reference():
  gate = credit.EntropyGate(0.5, 5, 0.93)
  assert gate.begin(None) == (0.0, {"control/credit_gate": 1.0})
  # the reference is the median of the first five
  assert gate_after(gate, 1.0, 3.0, 2.0, 9.0, 0.1) == [0, 0, 0, 0, 0.5]
  _, reasons = gate.begin(None)
  assert reasons["control/credit_entropy_reference"] == pytest.approx(2.0, rel=0.01)
  # above .93 * 2 it stays as it is, whichever that is
  assert gate_after(gate, 1.9, 1.84, 1.9, 2.03, 1.9) == [0.5, 0, 0, 0.5, 0.5]
  # a batch without a reading, or whose gradient was not finite, says nothing
  assert gate_after(gate, np.nan) == [0.5]
  assert gate_after(gate, 0.1, applied=False) == [0.5]
  assert gate_after(gate, 0.1) == [0]


@pytest.mark.parametrize("before", [2, 7])
def test_a_gate_goes_on_from_its_state(before):
  medians = [1.0, 3.0, 2.0, 9.0, 0.1, 1.9, 1.8, 1.9, 2.1]
  whole, first, second = (credit.EntropyGate(0.5, 5, 0.93) for _ in range(3))
  wanted = gate_after(whole, *medians)
  gate_after(first, *medians[:before])
  state = first.state()
  gate_after(first, *medians[before:])  # later changes do not show in it
  second.restore(state)
  assert gate_after(second, *medians[before:]) == wanted[before:]


# ---- whole steps ---------------------------------------------------------------------------------


def toy_step(row, batch):
  """Makes one step of a row; returns (state, metrics)."""
  model, params = fakes.toy_model(0, **SMALL)
  method = build.build_method(row)
  tx = optax.adam(1e-3)
  step = jax.jit(make_train_step(make_signals(model, method), method, tx))
  return step(init_state(params, tx, keep_teacher=method.teacher_weights.keep), batch)


def two_readings(**changes):
  """A batch whose responses are all read twice, under prompts of the same lengths."""
  batch = fakes.toy_batch(**changes)
  rows = batch.readings[0].rows
  is_prompt = np.ones(rows.token_CPT.shape, bool)
  for c, at_X in enumerate(rows.at_CX):
    is_prompt[c].reshape(-1)[at_X + 1] = False
  changed = np.where(is_prompt & (rows.segment_CPT > 0), 299 - rows.token_CPT, rows.token_CPT)
  further = batch.readings[0]._replace(rows=rows._replace(token_CPT=changed))
  everyone = np.ones_like(batch.weight_BR)
  readings = tuple(r._replace(weight_BR=everyone) for r in (batch.readings[0], further))
  return batch._replace(readings=readings)


def idle_row(name):
  """The row of a name with settings of its credit that change nothing."""
  row = build.method_row(name)
  off = dict(rlsd=dict(share=0.0, share_end=0.0), cscr=dict(depth=0.0))
  return row | dict(credit=row["credit"] | off.get(name, dict(share=0.0)))


@pytest.mark.parametrize("name", ROWS)
def test_an_idle_credit_reads_no_teacher(name):
  method = build.build_method(idle_row(name))
  assert not method.needs_teacher and not method.teacher_weights.keep
  assert method.teacher_context([], 0) is None and not method.further_count
  assert Control(method).names() == ["learn"]


@pytest.mark.parametrize("name", ["rlsd", "cscr"])
def test_an_idle_credit_is_the_row_without_it(name):
  """Weights and metrics of a real step are equal bit for bit."""
  none = dict(name="none")
  plain = idle_row(name) | dict(credit=none, teacher_context=none, teacher_weights=none)
  batch = fakes.toy_batch()
  got, wanted = (toy_step(row, batch) for row in (idle_row(name), plain))
  jax.tree.map(np.testing.assert_array_equal, got, wanted)
  assert wanted[1]["train/grad_norm"].mean > 0


@pytest.mark.parametrize("name", ROWS)
def test_a_row_against_plain_logits(name):
  """The loss of the packed path, its credit's change and the gap, from dense logits in numpy."""
  model, params = fakes.toy_model(0)
  _, frozen = fakes.toy_model(1)
  row = build.method_row(name)
  method = build.build_method(row)
  batch = two_readings(rows=6)
  batch = batch._replace(readings=batch.readings[: 1 + method.further_count])
  teacher = frozen if method.teacher_weights.keep else None
  signals = jax.jit(make_signals(model, method))(params, teacher, batch)

  def logp(weights, rows):
    logp_BRV = jax.nn.log_softmax(fakes.dense_logits(weights, model, rows, batch))
    return np.take_along_axis(np.asarray(logp_BRV), batch.response_BR[..., None], -1)[..., 0]

  policy_BR = logp(params, batch.policy)
  weights = params if teacher is None else teacher
  gaps = [logp(weights, reading.rows) - policy_BR for reading in batch.readings]
  counts_BR, A_B1 = batch.weight_BR > 0, batch.advantage_BR
  if name == "rlsd":
    ratio_BR = np.exp(np.sign(A_B1) * gaps[0])
    want = A_B1 * (0.5 + 0.5 * np.clip(ratio_BR, 0.8, 1.2))
  elif name == "rlrt":
    want = A_B1 * (0.5 + 0.5 * np.clip(np.exp(-np.sign(A_B1) * gaps[0]), 0.0, 2.0))
  elif name == "anti_sd":
    want = A_B1 - 0.5 * 0.5 * np.log((1 + np.exp(gaps[0])) / 2)
  else:
    s_BR = np.maximum(*np.abs(gaps))
    w_BR = np.where(s_BR < 0.05, 1.0, 1 - 0.2 * (1 - np.exp(-10 * (s_BR - 0.05))))
    want = A_B1 * w_BR / [[w_BR[b][counts_BR[b]].mean()] for b in range(6)]
  got = np.asarray(credit.advantages(method.credit, signals, batch))
  np.testing.assert_allclose(got[counts_BR], want[counts_BR], rtol=1e-3, atol=1e-4)

  # on policy the surrogate's value is minus the mean of the credited advantages
  batch = batch._replace(logp_old_BR=policy_BR, logp_rollout_BR=policy_BR)
  total, said = loss.token_loss(method, signals, batch, loss.normalisers(method, batch))
  tokens = [row_R[n] for row_R, n in zip(want, counts_BR)]
  means = [x.mean() for x in tokens] if name == "cscr" else np.concatenate(tokens)
  assert float(total) == pytest.approx(-np.mean(means), rel=1e-3, abs=1e-4)
  change = np.abs(want - A_B1)[counts_BR].mean()
  assert float(said["train/credit_change"].mean) == pytest.approx(change, rel=1e-3, abs=1e-5)
  assert float(said["train/teacher_gap"].mean) == pytest.approx(
    gaps[0][counts_BR].mean(), rel=1e-3, abs=1e-5
  )
  if name == "anti_sd":
    logq_BRV = jax.nn.log_softmax(fakes.dense_logits(params, model, batch.readings[0].rows, batch))
    entropies = -np.sum(np.exp(logq_BRV) * logq_BRV, -1)[counts_BR]
    median = np.quantile(entropies, 0.5, method="inverted_cdf")
    assert said["train/teacher_entropy_p50"].quantile(0.5) == pytest.approx(median, rel=0.011)
  assert ("counterfactual/agreement" in said) == (name == "cscr")


def test_a_step_holds_no_array_of_tokens_and_vocabulary(monkeypatch):
  """Where the vocabulary goes in blocks it stays in blocks, in both readings too."""
  vocab = 4096
  model, params = fakes.toy_model(0, vocab=vocab, **SMALL)
  batch, method = two_readings(rows=16), build.build_method(build.method_row("cscr"))
  tokens = batch.policy.at_CX.size
  state = init_state(params, optax.sgd(0.01))

  def logits(block_tokens):
    monkeypatch.setattr(token_logp, "BLOCK_BYTES", 4 * vocab * block_tokens)
    step = make_train_step(make_signals(model, method), method, optax.sgd(0.01))
    text = jax.jit(step).lower(state, batch).compile().as_text()
    return hlo.logit_arrays(text, tokens, vocab, model)

  assert 32 < tokens and not logits(tokens // 8) and logits(tokens)


def test_a_reading_costs_at_most_a_third_of_sdpos_step():
  """In operations of the step's matrix products, at the shape of the benchmark's small:equal."""
  model, tx = bench_step.model_of("small", "cpu"), optax.sgd(0.01)
  lengths = bench_step.lengths_of("equal", 8)

  def operations(name):
    method = build.build_method(build.method_row(name))
    further = method.further_count
    batch = bench_step.device_batch(model, method, lengths, 1, "cpu", further=further)
    step = make_train_step(make_signals(model, method, remat="dots"), method, tx)
    keep = method.teacher_weights.keep
    state = jax.eval_shape(
      lambda key: init_state(decoder.init(model, key), tx, keep_teacher=keep), jax.random.key(0)
    )
    return hlo.operations(jax.make_jaxpr(step)(state, batch).jaxpr)

  of_sdpo = operations("sdpo")
  assert operations("rlsd") <= 1.01 * of_sdpo  # one reading, without a divergence
  assert 1.1 * of_sdpo < operations("cscr") <= 1.35 * of_sdpo  # two


# ---- what the teacher reads ----------------------------------------------------------------------


def rollout(text, reward, *, task=None, status=Status.SCORED):
  task = task or Task("t", "What?", solution="<think>hm</think>the reference")
  return Rollout(task, [1], [2, 3], [-1.0, -1.0], "stop", text, Feedback(reward, "said", status))


def test_only_successes_have_a_teacher_where_it_says_so():
  group = [rollout("a", 1.0), rollout("b", 0.0), rollout("c", 1.0)]
  context = build.build_method(build.method_row("rlrt")).teacher_context
  assert [c and c.solution for c in (context(group, i) for i in range(3))] == ["c", None, "a"]
  assert context(group[:2], 0) is None  # no other success, and no feedback instead
  with pytest.raises(ValueError, match="only_failures and only_successes leave nothing"):
    teacher_context.FeedbackOrSolution(only_failures=True, only_successes=True)


def test_anti_sds_teacher_reads_a_solution_and_whether_the_attempt_was_right():
  context = teacher_context.SolutionAndVerdict()
  group = [rollout("a", 1.0), rollout("b", 0.0), rollout("c", 0.0, status=Status.ENV_FAILED)]
  first, second = context(group, 0), context(group, 1)
  assert context(group, 2) is None
  assert (first.solution, second.solution) == ("the reference", "a")
  for shown, verdict in ((first, context.RIGHT), (second, context.WRONG)):
    text = shown.render("Q")
    assert text.startswith("Q\nCorrect solution:\n\n" + shown.solution)
    assert verdict in text and text.endswith(teacher_context.CLOSING)
    assert "feedback" not in text and "said" not in text
  assert context([rollout("a", 1.0, task=Task("t", "What?"))], 0) is None


def test_an_instruction_is_all_that_is_shown():
  context = teacher_context.Instruction(text=fakes.NASTY, further_texts=("not {prompt}",))
  group = [rollout("a", 1.0), rollout("b", 0.0, status=Status.ENV_FAILED)]
  assert context(group, 0).render("Q {x}") == "Q {x}\n\n" + fakes.NASTY
  ((further, weight),) = context.further(group, 0)
  assert weight == 1.0 and further.render("Q") == "Q\n\nnot {prompt}"
  assert context(group, 1) is None and context.further(group, 1) == [None]
  for wrong in (dict(text=" "), dict(text="x", further_texts=("",))):
    with pytest.raises(ValueError, match="must say something"):
      teacher_context.Instruction(**wrong)


def test_a_remark_is_never_shortened():
  chat = Chat(fakes.ByteTokenizer())
  context = teacher_context.SolutionAndVerdict()([rollout("a", 1.0), rollout("s" * 400, 1.0)], 0)
  tokens, was_shortened = teacher_prompt(chat, [dict(role="user", content="Q")], context, 250)
  text = chat.tokenizer.decode(tokens)
  assert was_shortened and context.remark in text and "[...]" in text


def test_both_readings_of_cscr_are_packed():
  chat = Chat(fakes.ByteTokenizer())
  method = build.build_method(build.method_row("cscr"))
  packer = fakes.make_packer(
    method,
    chat,
    lambda task: [dict(role="user", content=task.prompt)],
    Shapes((500, 500, 50)),
    max_teacher_tokens=400,
    further_readings=method.teacher_context.further,
  )
  group = [rollout("a", 1.0), rollout("b", 0.0), rollout("c", 0.5, status=Status.ENV_FAILED)]
  for r in group:
    r.prompt_tokens = chat.text_tokens(r.task.prompt)
  packed = packer.pack([group])
  right, wrong = packed.batch.readings
  valid = np.array([r.feedback.status is Status.SCORED for r in packed.rollouts], np.float32)
  for reading, word in ((right, "right"), (wrong, "wrong")):
    np.testing.assert_array_equal(reading.weight_BR.max(1), valid)
    text = chat.tokenizer.decode(reading.rows.token_CPT.reshape(-1).tolist())
    assert text.count(f"is {word}, and so is its answer") >= 1
  assert [len(shown) for shown in packed.contexts] == [3, 3]


# ---- refusals, and what reads a run --------------------------------------------------------------


@pytest.mark.parametrize(
  "row, change, named",
  [
    ("rlsd", dict(teacher_context=dict(name="none")), "credit.name='rlsd' needs a teacher"),
    ("rlsd", dict(teacher_weights=dict(name="none")), "credit.name='rlsd' needs a teacher"),
    ("rlsd", dict(credit=dict(name="none")), "teacher_context.name='reference_solution' would not"),
    ("rlsd", dict(credit=dict(name="rlsd", share_steps=0)), "credit.share=0.5 would not be read"),
    ("rlsd", dict(credit=dict(name="rlsd", epsilon=1.5)), "credit.epsilon=1.5 must be at least 0"),
    ("rlsd", dict(credit=dict(name="cscr")), "has 0 further readings.* reads 1"),
    ("cscr", dict(credit=dict(name="rlsd")), "has 1 further readings.* reads 0"),
    ("cscr", dict(credit=dict(name="cscr", depth=1.0)), "credit.depth=1.0 must be .* below 1"),
    ("sdpo", dict(credit=dict(name="rlsd")), "credit.name='rlsd' would not be read"),
    (
      "cscr",
      dict(teacher_context=dict(name="instruction", text=None)),
      "text=None .* must be of type str",
    ),
    ("rlsd", dict(teacher_weights=dict(name="remote", url="http://a:1")), "needs the token signal"),
  ],
)
def test_what_cannot_be_is_named(row, change, named):
  with pytest.raises(ValueError, match=named):
    build.build_method(build.method_row(row) | change)


def test_discovery_needs_more_than_the_reward():
  c = config.load("configs/discover.py:local")
  c.method = build.method_row("rlsd")
  with pytest.raises(ValueError, match="learns from the reward alone, which is 0 until the first"):
    mode.check(c)


def test_few_readings_are_a_sign():
  line = {"train/loss": 1.0, "data/teacher_share": 0.01}
  assert not monitors.warnings([line] * 20)
  signs = monitors.warnings([line | {"train/credit_change": 0.1}] * 20)
  assert "only 1% of the responses have a teacher" in signs["teacher_share"]


def test_a_histogram_names_its_percentile():
  counts = np.zeros(loss.FINE, np.int32)
  counts[[10, 2000]] = 5, 1
  half = Histogram(counts).quantile(0.5)
  assert metrics.reduce({"train/teacher_entropy_p50": Histogram(counts)}) == {
    "train/teacher_entropy_p50": half
  }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rlsd", "anti_sd", "craft"])
def test_a_resumed_run_repeats_itself(name, tmp_path, monkeypatch):
  """Killed at step 4, behind the checkpoint of step 2, with a gate that has its reference by 3."""
  settings = [
    f"{TINYCODE}:method={name},local",
    "--config.total_steps=5",
    "--config.eval.every_steps=5",
    "--config.checkpoint.every_steps=2",
    "--config.rollout.questions=8",
    "--config.optimizer.lr=0.003",
    "--config.optimizer.warmup_steps=0",
  ]
  if name == "anti_sd":
    settings += ["--config.method.credit.warmup_steps=3"]
  if name == "craft":
    settings += ["--config.method.balance.hold=1"]
  write = train.Steps.write

  def run(workdir):
    with flagsaver.flagsaver():
      return main.main(["main", *settings, f"--workdir={workdir}"])

  def write_and_die(self, i, values):
    write(self, i, values)
    if i == 4:
      raise errors.RunError("the process ends here")

  assert run(tmp_path / "whole") == 0
  with monkeypatch.context() as patch:
    patch.setattr(train.Steps, "write", write_and_die)
    assert run(tmp_path / "killed") == 1
  assert run(tmp_path / "killed") == 0
  whole, killed = (
    [metrics.reproducible(line) for line in metrics.read(tmp_path / x)] for x in ("whole", "killed")
  )
  assert whole == killed
  steps = whole[1:]
  if name == "craft":
    rho = [line["control/balance"] for line in steps]
    assert rho[:2] == [0.5, 0.5] and len(set(rho)) == 4
    assert all(line["train/loss_reference"] != 0 for line in steps[3:])
    return
  # the groups of step 2 have one outcome each
  assert [line["train/grad_norm"] > 0 for line in steps[2:]] == [True] * 3
  shares = [line["control/credit"] for line in steps]
  if name == "anti_sd":
    assert shares[:3] == [0, 0, 0] and shares[3] == 0.5
  else:
    np.testing.assert_allclose(shares, [0.5, 0.49, 0.48, 0.47, 0.46], rtol=1e-6)
