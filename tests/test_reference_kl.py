"""Reference KL: closed forms of values and gradients, and what the polarised one chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.objectives import reference_kl
from sdpo_jax.objectives.signals import Signals
from tests import fakes

V = 6


def distributions(seed=0):
  """Log-probabilities of policy and reference over a small vocabulary, in float64."""
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=V)) for _ in range(2)]


def kl(p, q):
  return jnp.sum(p * (jnp.log(p) - jnp.log(q)))


def estimates(part, logits_V, logp_ref_V, credit=0.0):
  """The penalty of each token of the vocabulary."""
  logp_V = jax.nn.log_softmax(logits_V)
  batch = fakes.toy_batch()._replace(
    logp_ref_BR=logp_ref_V[None], credit_BR=jnp.full((1, V), credit)
  )
  return part(Signals(logp_V[None], None, None, None), batch)[0]


def mean_gradient(part, logits_V, logp_ref_V, **more):
  """The mean over the policy's own samples of the gradient of a sampled token's penalty."""
  each_VV = jax.jit(jax.jacobian(lambda z: estimates(part, z, logp_ref_V, **more)))(logits_V)
  return jax.nn.softmax(logits_V) @ each_VV


def test_means_and_mean_gradients_in_closed_form():
  with jax.enable_x64(True):
    z, ref = distributions()
    p, logq = jax.nn.softmax(z), jax.nn.log_softmax(ref)
    q, ratio = jnp.exp(logq), jax.nn.log_softmax(z) - logq
    mean = lambda part: float(p @ estimates(part, z, logq))
    assert mean(reference_kl.k1()) == pytest.approx(float(kl(p, q)))
    assert mean(reference_kl.k2()) == pytest.approx(float(p @ ratio**2) / 2)
    assert mean(reference_kl.k3()) == pytest.approx(float(kl(p, q)))
    assert (estimates(reference_kl.k3(), z, logq) >= 0).all()
    close = lambda part, want: np.testing.assert_allclose(
      mean_gradient(part, z, logq), want, atol=1e-12
    )
    close(reference_kl.k1(), np.zeros(V))
    close(reference_kl.k2(), jax.grad(lambda z: kl(jax.nn.softmax(z), q))(z))
    close(reference_kl.k3(), jax.grad(lambda z: kl(q, jax.nn.softmax(z)))(z))


def test_the_reference_itself_costs_nothing():
  with jax.enable_x64(True):
    z, _ = distributions()
    for part in (reference_kl.k1(), reference_kl.k2(), reference_kl.k3()):
      assert not estimates(part, z, jax.nn.log_softmax(z)).any()


@pytest.mark.parametrize("swap", [False, True])
def test_the_polarised_one_resists_the_credit(swap):
  with jax.enable_x64(True):
    z, ref = distributions()
    logq = jax.nn.log_softmax(ref)
    part = reference_kl.polarised(threshold=0.2, swap=swap)
    k1, k3 = (estimates(x(), z, logq) for x in (reference_kl.k1, reference_kl.k3))
    up, down = (estimates(part, z, logq, credit=c) for c in (0.3, -0.3))
    np.testing.assert_array_equal(up, -k1 if swap else k1)
    np.testing.assert_array_equal(down, k1 if swap else -k1)
    for inside in (0.2, 0.0, -0.2):
      np.testing.assert_array_equal(estimates(part, z, logq, credit=inside), k3)


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "polarised"])
def test_far_from_the_reference_there_are_numbers_and_no_gradient(name):
  part = reference_kl.REFERENCE_KLS[name]()
  ratio_BR = jnp.array([[-320.0, -80.0, -1.0, 1.0, 80.0, 320.0]])
  batch = fakes.toy_batch()._replace(
    logp_ref_BR=jnp.zeros((1, 6)), credit_BR=jnp.array([[0.5, -0.5, 0.0, 0.5, -0.5, 0.0]])
  )
  total = lambda x: jnp.sum(part(Signals(x, None, None, None), batch))
  values = part(Signals(ratio_BR, None, None, None), batch)
  gradients = jax.grad(total)(ratio_BR)
  assert np.isfinite(values).all() and np.abs(values).max() <= 10
  assert np.isfinite(gradients).all() and not np.asarray(gradients)[0, [0, 1, 4, 5]].any()
  assert np.asarray(gradients)[0, 2:4].all()
