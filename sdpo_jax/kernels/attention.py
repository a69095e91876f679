"""Causal attention over packed rows: a token sees the tokens of its own segment at the same or an earlier column.

  reference   logits held at once, softmax in float32; any device, any length
  causal      the same without what lies above the diagonal, but for a few blocks on it
  splash      the TPU kernel that ships with jax: blocks of T x T in on-chip memory, blocks above the diagonal or outside the window skipped

Shapes: q_BTNH, k_BTKH, v_BTKH with K dividing N (grouped queries), segment_BT int32. window: a token sees its last `window` columns, its
own included; None: all of them. What stands at padding (segment 0) is finite but meaningless.
XLA cannot split a Pallas kernel by itself: where a mesh is set, each device runs splash on its own rows and heads.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib
from jax.sharding import PartitionSpec as P

LANES = 128   # splash works on multiples of it
QUERIES = 256   # at least so many a block in `causal`: each block is code of its own


def mask(segment_BT: jax.Array | None, shape: tuple[int, int], window: int | None = None, *, prefix_BT: jax.Array | None = None,
         position_BT: jax.Array | None = None) -> jax.Array:
  """[B, T, S = T] for `causal`. Without segments the row is one. prefix_BT: the segment that a token sees beside its own, 0 for none; with it,
  which needs segments, a window is measured in positions, for what a text sees need not stand next to it."""
  B, T = shape
  column = jnp.arange(T)
  mask_BTS = jnp.broadcast_to(column[:, None] >= column[None, :], (B, T, T))
  if window is not None:
    place_BT = column[None, :] if prefix_BT is None else position_BT
    mask_BTS &= place_BT[:, :, None] - place_BT[:, None, :] < window
  if segment_BT is not None:
    seen = segment_BT[:, :, None] == segment_BT[:, None, :]
    if prefix_BT is not None:
      seen |= prefix_BT[:, :, None] == segment_BT[:, None, :]
    mask_BTS &= seen & (segment_BT[:, None, :] != 0)
  return mask_BTS


def reference(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """A row with nothing to see averages everything, so it stays finite."""
  return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None])


def causal(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """`reference` where no token sees a later column: in up to four blocks of queries, each against the columns up to its end, for five eighths of the work."""
  T = q_BTNH.shape[1]
  block = max(-(-T // 4 // LANES) * LANES, QUERIES)
  parts = [reference(q_BTNH[:, first:first + block], k_BTKH[:, :first + block], v_BTKH[:, :first + block], mask_BTS[:, first:first + block, :first + block])
           for first in range(0, T, block)]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def splash_fits(T: int) -> bool:
  """Whether rows of this length, on the platform that is being compiled for, go through splash."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = device.platform if device is not None and device.platform else jax.default_backend()
  return platform == "tpu" and T % LANES == 0


def splash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_BT: jax.Array, window: int | None = None, *, interpret: bool = False) -> jax.Array:
  run = functools.partial(_splash, window=window, interpret=interpret)
  if jax.sharding.get_abstract_mesh().empty:
    return run(q_BTNH, k_BTKH, v_BTKH, segment_BT)
  rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")
  return jax.shard_map(run, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(q_BTNH, k_BTKH, v_BTKH, segment_BT)


def _splash(q_BTNH, k_BTKH, v_BTKH, segment_BT, *, window, interpret):
  B, T, N, H = q_BTNH.shape
  block = next(b for b in (1024, 512, 256, LANES) if T % b == 0)
  sizes = splash_lib.BlockSizes(block, block, min(block, 512), block, block, min(block, 512), block, block)
  one = splash_lib.CausalMask((T, T)) if window is None else splash_lib.LocalMask((T, T), (window - 1, 0), 0)
  kernel = splash_lib.make_splash_mha_single_device(splash_lib.MultiHeadMask([one] * N), block_sizes=sizes, interpret=interpret)
  major = lambda x: jnp.swapaxes(x, 1, 2)
  attend = lambda q, k, v, segment: kernel(q, k, v, segment_ids=splash_lib.SegmentIds(segment, segment))
  scaled = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
  return major(jax.vmap(attend)(major(scaled), major(k_BTKH), major(v_BTKH), segment_BT)).astype(q_BTNH.dtype)
