"""Attention over packed rows: the TPU kernel, interpreted, against the reference; segments never see each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.kernels import attention


def problem(T=256, B=2, N=2, K=1, H=32):
  q, k, v, g = (jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(jax.random.split(jax.random.key(0), 4), (N, K, K, N)))
  segment = np.zeros((B, T), np.int32)
  segment[0, :100], segment[0, 100:230], segment[1] = 1, 2, 1
  return q, k, v, g, segment


@pytest.mark.parametrize("window", [None, 40])
def test_splash_gives_the_reference_and_its_gradients(window):
  q, k, v, g, segment = problem()
  real = (segment > 0)[..., None, None]

  def both(attend):
    out, back = jax.vjp(lambda *qkv: jnp.where(real, attend(*qkv), 0.0), q, k, v)
    return out, *back(g)

  splash = both(lambda *qkv: attention.splash(*qkv, jnp.asarray(segment), window, interpret=True))
  for got, want in zip(splash, both(lambda *qkv: attention.reference(*qkv, attention.mask(segment, segment.shape, window)))):
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("T", [256, 700, 1100])
def test_blocks_of_queries_give_the_reference_and_its_gradients(T):
  q, k, v, g, segment = problem(T)
  segment[1, 300:] = 2
  visible, real = attention.mask(segment, segment.shape), (segment > 0)[..., None, None]

  def both(attend):
    out, back = jax.vjp(lambda *qkv: jnp.where(real, attend(*qkv, visible), 0.0), q, k, v)
    return out, *back(g)

  for got, want in zip(both(attention.causal), both(attention.reference)):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_text_sees_neither_its_neighbour_nor_the_padding():
  q, k, v, _, segment = problem(T=128)
  segment = segment[:, :128]
  out = lambda k, v: attention.reference(q, k, v, attention.mask(segment, segment.shape))
  first = segment == 1
  moved = out(jnp.where(first[..., None, None], k, 7.0), jnp.where(first[..., None, None], v, -7.0))
  np.testing.assert_array_equal(np.asarray(moved)[first], np.asarray(out(k, v))[first])


def test_splash_is_for_tpus_and_whole_lanes():
  assert not attention.splash_fits(256)   # here: a CPU
  described = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu"))
  with jax.sharding.use_abstract_mesh(described):
    assert attention.splash_fits(256) and not attention.splash_fits(200)
