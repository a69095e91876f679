"""Tests attention over packed rows: every implementation against the reference.

The TPU kernel is interpreted. Segments never see each other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.kernels import attention


def problem(T=256, B=2, N=2, K=1, H=32):
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, g = (jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(keys, (N, K, K, N)))
  segment = np.zeros((B, T), np.int32)
  segment[0, :100], segment[0, 100:230], segment[1] = 1, 2, 1
  return q, k, v, g, segment


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(attend, segment, q, k, v, g, *others):
  """(output, dq, dk, dv) of attend(q, k, v, *others), with nothing at padding."""
  out, back = jax.vjp(
    lambda *qkv: jnp.where((segment > 0)[..., None, None], attend(*qkv, *others), 0.0), q, k, v
  )
  return out, *back(g.astype(out.dtype))


@pytest.mark.parametrize("window", [None, 40])
def test_splash_gives_the_reference_and_its_gradients(window):
  q, k, v, g, segment = problem()
  splash = lambda *given: attention.splash(*given, window, interpret=True)
  reference = with_gradients(
    attention.reference, segment, q, k, v, g, attention.packed_mask(segment, segment.shape, window)
  )
  for got, want in zip(with_gradients(splash, segment, q, k, v, g, segment), reference):
    np.testing.assert_allclose(got, want, atol=1e-5)


def shared_prefixes(T, B, K):
  """Draws two rows that end in padding.

  Row 0 has a prefix of 50 and three answers that continue it, then a text of its own; row 1 has one
  text.
  """
  q, k, v, g, segment = problem(T, B, K=K, N=4)
  prefix, position, length = np.zeros_like(segment), np.zeros_like(segment), T - 5
  segment[:] = 0
  for number, (start, end, before) in enumerate(
    [(0, 50, 0), (50, 120, 1), (120, 140, 1), (140, 200, 1), (200, length, 0)], 1
  ):
    segment[0, start:end] = number
    prefix[0, start:end] = before
    position[0, start:end] = 50 * (before > 0) + np.arange(end - start)
  segment[1, :length], position[1, :length] = 1, np.arange(length)
  return q, k, v, g, segment, prefix, position


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("T,K", [(256, 4), (333, 2), (700, 1)])
def test_skipped_blocks_hide_nothing(T, K, window):
  """Blocks may end beyond the row; both modes of differentiation that training uses; bfloat16."""
  q, k, v, g, segment, prefix, position = shared_prefixes(T, 2, K)
  visible = attention.packed_mask(
    segment, segment.shape, window, prefix_BT=prefix, position_BT=position
  )
  who = attention.visibility(visible)
  blocks = who.key_block_counts.shape[1]
  # fewer than on and below the two rows' diagonals
  assert int(who.key_block_counts.sum()) < 2 * blocks * (blocks + 1) // 2
  exact = with_gradients(attention.reference, segment, q, k, v, g, visible)
  blocked = with_gradients(attention.blocked, segment, q, k, v, g, who)
  again = with_gradients(jax.checkpoint(attention.blocked), segment, q, k, v, g, who)
  short = with_gradients(
    attention.blocked, segment, *(x.astype(jnp.bfloat16) for x in (q, k, v, g)), who
  )
  for want, got, remade, rough in zip(exact, blocked, again, short):
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(remade, want, atol=1e-5)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      np.asarray(rough, np.float32), want, atol=0.03 * np.max(np.abs(want))
    )


def test_a_row_of_padding_is_finite_with_no_gradient():
  q, k, v, g, segment = problem(T=128)
  who = attention.visibility(attention.packed_mask(0 * segment[:, :128], (2, 128)))
  out, back = jax.vjp(lambda *qkv: attention.blocked(*qkv, who), q, k, v)
  for x in (out, *back(g)):
    np.testing.assert_array_equal(x, 0.0)


@pytest.mark.parametrize("T", [256, 700, 1100])
def test_blocks_of_queries_give_the_reference_and_its_gradients(T):
  q, k, v, g, segment = problem(T)
  segment[1, 300:] = 2
  visible = attention.packed_mask(segment, segment.shape)
  for got, want in zip(
    *(
      with_gradients(attend, segment, q, k, v, g, visible)
      for attend in (attention.causal, attention.reference)
    )
  ):
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("trouble", ["none", "refuses", "ungrouped", "no gradient"])
def test_cudnn_is_used_where_it_gives_the_reference(trouble, monkeypatch, caplog):
  """On a GPU each shape is tried first, in the middle of tracing.

  A library that is missing, refuses, or forgets to group queries costs a warning.
  """
  used = []

  def cudnn(q, k, v, mask):
    used.append(q.shape)
    if trouble == "refuses":
      raise RuntimeError("cuDNN is not detected")
    if trouble == "ungrouped":  # heads of queries and keys paired in the wrong order
      k, v = (jnp.flip(x, axis=2) for x in (k, v))
    out = attention.reference(q, k, v, mask)
    return spoil(out) if trouble == "no gradient" else out

  spoil = jax.custom_vjp(lambda x: x)  # the right values, and NaN for gradients
  spoil.defvjp(lambda x: (x, None), lambda _, g: (jnp.nan * g,))
  monkeypatch.setattr(attention, "_cudnn", cudnn)
  monkeypatch.setattr(attention, "target_platform", lambda: "gpu")
  monkeypatch.setattr(attention, "_is_here", lambda: True)
  attention.cudnn_agrees.cache_clear()
  q, k, v, g, segment = problem(T=300, B=3, N=4, K=2)
  visible = attention.packed_mask(segment, segment.shape)
  assert attention.visibility(visible).key_blocks is None
  attend = lambda *given: attention.attend_packed(*given[:3], attention.visibility(given[3]))
  short = [x.astype(jnp.bfloat16) for x in (q, k, v, g)]
  got = with_gradients(jax.checkpoint(attend), segment, *short, visible)
  assert got[0].dtype == jnp.bfloat16
  for rough, want in zip(got, with_gradients(attention.reference, segment, q, k, v, g, visible)):
    np.testing.assert_allclose(
      np.asarray(rough, np.float32), want, atol=0.03 * np.max(np.abs(want))
    )
  tried = [shape for shape in used if shape[0] == 2]
  # two blocks of queries, each tried once
  assert len(tried) == 2 and (len(used) > 2) == (trouble == "none")
  warnings = [r.getMessage() for r in caplog.records if "without cuDNN" in r.getMessage()]
  assert len(warnings) == (0 if trouble == "none" else 2), warnings
  used.clear()
  # float32: cuDNN has none
  with_gradients(lambda *given: attend(*given), segment, q, k, v, g, visible)
  assert used == []
  attention.cudnn_agrees.cache_clear()


def test_for_a_gpu_that_is_not_here_cudnn_is_not_tried(monkeypatch):
  monkeypatch.setattr(attention, "_cudnn", None)
  monkeypatch.setattr(attention, "target_platform", lambda: "gpu")
  attention.cudnn_agrees.cache_clear()
  assert attention.cudnn_agrees((256, 4, 64), (256, 2, 64), jnp.bfloat16)
  attention.cudnn_agrees.cache_clear()


def test_a_text_sees_neither_its_neighbour_nor_the_padding():
  q, k, v, _, segment = problem(T=128)
  segment = segment[:, :128]
  out = lambda k, v: attention.reference(q, k, v, attention.packed_mask(segment, segment.shape))
  first = segment == 1
  moved = out(jnp.where(first[..., None, None], k, 7.0), jnp.where(first[..., None, None], v, -7.0))
  np.testing.assert_array_equal(np.asarray(moved)[first], np.asarray(out(k, v))[first])


def test_splash_is_for_tpus_and_whole_lanes():
  assert not attention.splash_fits(256)  # here: a CPU
  described = jax.sharding.AbstractMesh(
    (),
    (),
    abstract_device=jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu"),
  )
  with jax.sharding.use_abstract_mesh(described):
    assert attention.splash_fits(256) and not attention.splash_fits(200)
