"""Teachers whose logits are sums of readings' logits: one virtual hidden state a token.

The oracles add up whole rows of logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpo_jax import hlo, sharding
from sdpo_jax.kernels import distill_kl_xla
from sdpo_jax.model import decoder
from sdpo_jax.objectives import build, reference
from sdpo_jax.objectives.control import Control
from sdpo_jax.objectives.loss import normalisers, token_loss
from sdpo_jax.records import Reading
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from tests import fakes

SMALL = dict(vocab=64, layers=1, width=16, heads=2, kv_heads=1)
TILT = build.method_row("sdpo") | dict(
  teacher_logits=dict(name="tilt"), token_weight=dict(name="uniform")
)
RETURNS = TILT | dict(token_signal=dict(name="return_to_go"))
INFORMATION = build.method_row("pmi") | dict(teacher_logits=dict(name="pmi", beta=0.5))


def three_readings(batch):
  """The batch with two more readings of its responses: of the policy's prompt, and of another."""
  question_alone = batch.policy
  other = batch.readings[0].rows
  reference_alone = other._replace(token_CPT=(other.token_CPT * 7) % 61)
  weight_BR = batch.readings[0].weight_BR
  readings = (
    *batch.readings,
    Reading(question_alone, weight_BR),
    Reading(reference_alone, weight_BR),
  )
  return batch._replace(readings=readings)


def with_share(batch, w):
  return batch._replace(control=batch.control | {"teacher_logits": np.float32(w)})


def summed(name, z_BRV, readings):
  """The teacher's logits as the papers write them, for w = .6 and beta = .5."""
  z_BRV = jax.lax.stop_gradient(z_BRV)
  if name == "tilt":
    return 0.4 * z_BRV + 0.6 * readings[0]
  both, question, alone = readings
  return question + (both - alone) / 0.5


CASES = {
  "one tree": (TILT, "live"),
  "two trees": (TILT, "frozen"),
  "pmi": (INFORMATION, "frozen"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_virtual_hidden_state_gives_the_divergence_and_gradient_of_the_summed_logits(case):
  row, weights = CASES[case]
  name = row["teacher_logits"]["name"]
  method = build.build_method(row | dict(teacher_weights=dict(name=weights)))
  config, params = fakes.toy_model(0, **SMALL)
  _, other = fakes.toy_model(1, **SMALL)
  teacher = None if weights == "live" else other
  batch = with_share(fakes.toy_batch(vocab=64), 0.6)
  if name == "pmi":
    batch = three_readings(batch)
  signals = make_signals(config, method, temperature=1.3)

  def fast(p):
    return token_loss(method, signals(p, teacher, batch), batch, normalisers(method, batch))[0]

  def plain(p):
    z_BRV = fakes.dense_logits(p, config, batch.policy, batch)
    reader = jax.lax.stop_gradient(p if teacher is None else teacher)
    readings = [fakes.dense_logits(reader, config, r.rows, batch) for r in batch.readings]
    return reference.sdpo_loss(
      z_BRV / 1.3,
      summed(name, z_BRV, readings) / 1.3,
      batch.response_BR,
      batch.weight_BR,
      batch.readings[0].weight_BR.max(1),
      is_clip=None,
      rollout_is_clip=None,
    )

  (got, got_grad), (want, want_grad) = (
    jax.jit(jax.value_and_grad(f))(params) for f in (fast, plain)
  )
  assert float(want) > 1e-3 and float(got) == pytest.approx(float(want), rel=1e-4)
  for g, w in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
    np.testing.assert_allclose(g, w, atol=1e-4 * float(jnp.abs(w).max() + 1e-3))


def test_at_share_1_the_tilted_teacher_is_the_plain_one_and_at_0_the_policy_itself():
  config, params = fakes.toy_model(0, **SMALL)
  _, teacher = fakes.toy_model(1, **SMALL)
  batch = fakes.toy_batch(vocab=64)
  row = TILT | dict(teacher_weights=dict(name="frozen"))
  tilted = jax.jit(make_signals(config, build.build_method(row)))
  plain_row = row | dict(teacher_logits=dict(name="plain"))
  plain = jax.jit(make_signals(config, build.build_method(plain_row)))
  counted = batch.weight_BR * batch.readings[0].weight_BR > 0
  (want,) = plain(params, teacher, batch)
  (whole,) = tilted(params, teacher, with_share(batch, 1.0))
  np.testing.assert_allclose(
    whole.divergence_BR[counted], want.divergence_BR[counted], rtol=1e-5, atol=1e-7
  )
  (none,) = tilted(params, teacher, with_share(batch, 0.0))
  np.testing.assert_allclose(none.divergence_BR[counted], 0.0, atol=1e-6)
  np.testing.assert_allclose(none.gap_BR[counted], 0.0, atol=1e-5)


def test_returns_to_go_of_a_tilted_teacher_are_those_of_its_logits():
  """The loss of beta-OPSD on a real batch, with logits written out; value and gradient."""
  config, params = fakes.toy_model(0, **SMALL)
  _, teacher = fakes.toy_model(1, **SMALL)
  batch = with_share(fakes.toy_batch(vocab=64), 0.6)
  method = build.build_method(build.method_row("beta_opsd"))
  weight_BR = batch.weight_BR * batch.readings[0].weight_BR
  R = weight_BR.shape[1]
  later_RR = np.arange(R) - np.arange(R)[:, None]  # [t, s] holds s - t
  discount_RR = np.where(later_RR >= 0, 0.99 ** np.maximum(later_RR, 0), 0.0)

  def fast(p):
    readings = make_signals(config, method)(p, teacher, batch)
    return token_loss(method, readings, batch, normalisers(method, batch))[0]

  def plain(p):
    z_BRV = fakes.dense_logits(p, config, batch.policy, batch)
    q_BRV = fakes.dense_logits(teacher, config, batch.readings[0].rows, batch)
    logp_BR, logq_BR = (
      jnp.take_along_axis(jax.nn.log_softmax(x), batch.response_BR[..., None], -1)[..., 0]
      for x in (z_BRV, 0.4 * z_BRV + 0.6 * q_BRV)
    )
    rho_BR = jnp.where(batch.weight_BR > 0, logp_BR - logq_BR, 0.0)
    return_BR = jax.lax.stop_gradient(rho_BR @ discount_RR.T)
    return jnp.sum(return_BR * logp_BR * weight_BR) / weight_BR.sum()

  (got, got_grad), (want, want_grad) = (
    jax.jit(jax.value_and_grad(f))(params) for f in (fast, plain)
  )
  assert float(got) == pytest.approx(float(want), rel=1e-4)
  for g, w in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
    np.testing.assert_allclose(g, w, atol=1e-4 * float(jnp.abs(w).max() + 1e-3))


def test_the_share_rises_by_the_step_alone_and_compiles_nothing():
  """w goes from .5 to .8 in 200 steps; a run that resumes finds it without any state."""
  method = build.build_method(build.method_row("beta_opsd"))
  steps = (1, 101, 201, 1000)
  shares = [Control(method).begin([], step)[0]["teacher_logits"] for step in steps]
  np.testing.assert_allclose(shares, [0.5, 0.65, 0.8, 0.8], rtol=1e-6)
  assert Control(method).state()["teacher_logits"] == {}
  config, params = fakes.toy_model(0, **SMALL)
  batch, tx = fakes.toy_batch(vocab=64), optax.sgd(0.1)
  step = jax.jit(make_train_step(make_signals(config, method), method, tx))
  state = init_state(params, tx, keep_teacher=True)
  with fakes.compilations("step") as programs:
    norms = [float(step(state, with_share(batch, w))[1]["train/loss"].mean) for w in shares[:3]]
  assert len(programs) == 1 and len(set(norms)) == 3


SPLIT = dict(vocab=296, layers=1, heads=16, kv_heads=8)


def gradient(row, batch, mesh=None):
  """Loss and gradient of one long SGD step, over a mesh or on one device."""
  config, params = fakes.toy_model(0, **SPLIT)
  _, teacher = fakes.toy_model(1, **SPLIT)
  method, tx = build.build_method(row), optax.sgd(1024.0)
  step = make_train_step(make_signals(config, method), method, tx)
  state = init_state(params, tx)._replace(teacher=teacher)
  if mesh is None:
    new, measured = jax.jit(step)(state, batch)
  else:
    places = sharding.state_shardings(mesh, state, decoder.axes(config))
    with jax.set_mesh(mesh):
      new, measured = jax.jit(step, out_shardings=(places, None))(
        jax.device_put(state, places), sharding.put_rows(mesh, batch)
      )
  moved = jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / 1024, params, new.params)
  return float(measured["train/loss"].mean), moved


@pytest.mark.parametrize("name", ["tilt", pytest.param("pmi", marks=pytest.mark.slow)])
def test_a_mesh_gives_the_gradient_of_one_device(name):
  """Two heads one above the other, or three readings, split over rows, width and vocabulary."""
  frozen = dict(teacher_weights=dict(name="frozen"))
  row = (RETURNS if name == "tilt" else INFORMATION) | frozen
  mesh = sharding.make_mesh(jax.devices(), data=2, fsdp=2, tensor=2)

  def batch(**packing):
    made = with_share(fakes.toy_batch(rows=8, vocab=296, **packing), 0.6)
    return three_readings(made) if name == "pmi" else made

  want, want_grad = gradient(row, batch())
  got, got_grad = gradient(
    row, batch(length=26, teacher_length=34, packs=sharding.row_shards(mesh)), mesh
  )
  assert got == pytest.approx(want, rel=1e-5)
  for g, w in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
    assert np.linalg.norm(g - w) <= 1e-5 * np.linalg.norm(w)


@pytest.mark.parametrize("name", ["tilt", "pmi"])
def test_no_array_of_tokens_times_vocabulary(name, monkeypatch):
  """With the vocabulary in blocks, as it is at real sizes, the sum of logits is never written."""
  V = 2048
  config = fakes.toy_config(**SMALL | dict(vocab=V))
  batch = with_share(fakes.toy_batch(rows=16, vocab=V, response=30), 0.6)
  if name == "pmi":
    batch = three_readings(batch)
  row = (TILT if name == "tilt" else INFORMATION) | dict(teacher_weights=dict(name="frozen"))
  method, tx = build.build_method(row), optax.sgd(1.0)
  state = jax.eval_shape(lambda p: init_state(p, tx, keep_teacher=True), decoder.shapes(config))
  tokens = batch.policy.at_CX.size
  assert tokens > 2 * config.width

  def found():
    step = make_train_step(make_signals(config, method), method, tx)
    return hlo.logit_arrays(str(jax.make_jaxpr(step)(state, batch)), tokens, V, config)

  assert found()  # few logits are kept
  monkeypatch.setattr(distill_kl_xla, "_choose_blocks", lambda X, D, V: "vocabulary")
  monkeypatch.setattr(distill_kl_xla, "CPU_BLOCK_ENTRIES", 1)
  assert not found()


def test_a_linear_teacher_is_refused_where_its_hidden_states_or_readings_are_not_here():
  for change, named in (
    (dict(teacher_weights=dict(name="trust_region")), "teacher weights whose hidden states are"),
    (dict(teacher_logits=dict(name="pmi")), "has 0 further readings"),
    (dict(teacher_context=dict(name="pmi")), "has 2 further readings"),
    (dict(counterfactual=dict(name="notes")), "is one teacher"),
  ):
    with pytest.raises(ValueError, match=named):
      build.build_method(TILT | change)
