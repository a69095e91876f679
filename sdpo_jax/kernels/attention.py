"""Causal attention over packed rows: a token sees the tokens of its own segment at the same or an earlier column.

  reference   logits held at once, softmax in float32; any device, any length
  causal      the same without what lies above the diagonal, but for a few blocks on it: what a GPU gets. There each block of bfloat16 goes through
              cuDNN's fused attention, which holds no logits, where that gives the reference and its gradients for these lengths and heads when tried:
              versions of it are missing, refuse shapes, or are silently wrong with grouped queries. (Not yet run on a GPU)
  blocked     block by block of 64 x 64 with the running softmax of FlashAttention (arXiv 2205.14135); blocks in which nobody sees anything are
              skipped, as the data have them: other texts of the row, padding, what is above the diagonal. Only the logarithm of each softmax's
              denominator is kept for the backward pass. What a CPU gets: in rows of 8 answers of 128 tokens six times as fast as `causal`
  splash      the TPU kernel that ships with jax: blocks of T x T in on-chip memory, blocks above the diagonal or outside the window skipped

Shapes: q_BTNH, k_BTKH, v_BTKH with K dividing N (grouped queries), segment_BT int32. window: a token sees its last `window` columns, its
own included; None: all of them. What stands at padding (segment 0) is finite but meaningless.
XLA cannot split a Pallas kernel or a loop of data-dependent length by itself: where a mesh is set, each device runs splash or `blocked` on its
own rows and heads.
"""

import functools
from typing import NamedTuple

from absl import logging
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from sdpo_jax.kernels.target import target_platform

LANES = 128  # splash works on multiples of it
QUERIES = 256  # at least so many a block in `causal`: each block is code of its own
# name of what the backward pass of `blocked` and of splash needs beside q, k and v: see decoder's
# remat
KEPT = "attention"
# queries and keys of a block of `blocked`: with 32 its loop costs more, with 128 it computes more
# that nobody sees
BLOCK = 64


def packed_mask(
  segment_BT: jax.Array | None,
  shape: tuple[int, int],
  window: int | None = None,
  *,
  prefix_BT: jax.Array | None = None,
  position_BT: jax.Array | None = None,
) -> jax.Array:
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


class Visibility(NamedTuple):
  """Who sees whom in packed rows, and for `blocked` in which blocks; S = T, I and J count blocks of queries and of keys."""

  mask_BTS: jax.Array
  # the key blocks that a query block sees something of, before the others
  key_blocks: jax.Array | None = None
  key_block_counts: jax.Array | None = None  # how many these are


def visibility(mask_BTS: jax.Array) -> Visibility:
  """What `attend_packed` takes, made once for all layers."""
  if target_platform() != "cpu":
    return Visibility(mask_BTS)
  B, T, _ = mask_BTS.shape
  n = -(-T // BLOCK)
  mask_BTS = jnp.pad(mask_BTS, ((0, 0), (0, n * BLOCK - T), (0, n * BLOCK - T)))
  any_BIJ = jnp.any(mask_BTS.reshape(B, n, BLOCK, n, BLOCK), axis=(2, 4))
  return Visibility(
    mask_BTS,
    jnp.argsort(~any_BIJ, axis=-1, stable=True).astype(jnp.int32),
    jnp.sum(any_BIJ, axis=-1, dtype=jnp.int32),
  )


def attend_packed(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, who: Visibility
) -> jax.Array:
  """Attention over packed rows where splash is not used: `blocked` on a CPU, if its mesh divides the rows; else `causal`."""
  (B, T, _, _), mesh = k_BTKH.shape, jax.sharding.get_abstract_mesh()
  if who.key_blocks is None or not (
    mesh.empty or B % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
  ):
    return causal(q_BTNH, k_BTKH, v_BTKH, who.mask_BTS[:, :T, :T])
  if mesh.empty:
    return blocked(q_BTNH, k_BTKH, v_BTKH, who)
  rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")
  return jax.shard_map(
    blocked,
    in_specs=(heads, heads, heads, Visibility(rows, rows, rows)),
    out_specs=heads,
    check_vma=False,
  )(q_BTNH, k_BTKH, v_BTKH, who)


@jax.custom_vjp
def blocked(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, who: Visibility) -> jax.Array:
  """`reference` block by block; a token that sees nothing gets zeros. Products in the inputs' type, sums and softmax in float32."""
  return _blocked_forward(q_BTNH, k_BTKH, v_BTKH, who)[0]


def _by_blocks(x_BTNH: jax.Array, who: Visibility, kv_heads: int) -> jax.Array:
  """[B * I, K, G * BLOCK, H]: a key head's G query heads one below the other, as rows of one product."""
  (B, T, N, H), (_, I) = x_BTNH.shape, who.key_block_counts.shape
  x = jnp.pad(x_BTNH, ((0, 0), (0, I * BLOCK - T), (0, 0), (0, 0))).reshape(
    B, I, BLOCK, kv_heads, N // kv_heads, H
  )
  return x.transpose(0, 1, 3, 4, 2, 5).reshape(B * I, kv_heads, -1, H)


def _by_columns(x: jax.Array, like_BTNH: jax.Array) -> jax.Array:
  """The reverse."""
  (B, T, N, H), K = like_BTNH.shape, x.shape[1]
  x = x.reshape(B, -1, K, N // K, BLOCK, H).transpose(0, 1, 4, 2, 3, 5)
  return x.reshape(B, -1, N, H)[:, :T].astype(like_BTNH.dtype)


def _keys(x_BTKH: jax.Array, who: Visibility) -> jax.Array:
  return _by_blocks(x_BTKH, who, x_BTKH.shape[2])


def _product(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
  """One matrix product a key head, `over` these axes of a and b."""
  return jax.lax.dot_general(
    a, b, (((over[0],), (over[1],)), ((0,), (0,))), preferred_element_type=jnp.float32
  )


def _scores(q: jax.Array, k: jax.Array, visible_TS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(logits, who is seen) of one block pair, [K, G, BLOCK, BLOCK]."""
  scores = _product(q, k, (2, 2)).reshape(len(q), -1, BLOCK, BLOCK) * q.shape[-1] ** -0.5
  return scores, jnp.broadcast_to(visible_TS, scores.shape)


def _visible(who: Visibility, b: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
  return jax.lax.dynamic_slice(who.mask_BTS, (b, i * BLOCK, j * BLOCK), (1, BLOCK, BLOCK))[0]


def _blocked_forward(q_BTNH, k_BTKH, v_BTKH, who: Visibility):
  K, (_, I, _) = k_BTKH.shape[2], who.key_blocks.shape
  q, k, v = _by_blocks(q_BTNH, who, K), _keys(k_BTKH, who), _keys(v_BTKH, who)
  G, H = q.shape[2] // BLOCK, q.shape[3]

  def queries(at):
    b, i = at // I, at % I

    def keys(n, carry):
      out, top, total = carry
      j = who.key_blocks[b, i, n]
      scores, visible = _scores(q[at], k[b * I + j], _visible(who, b, i, j))
      new_top = jnp.maximum(top, jnp.max(scores, axis=-1, where=visible, initial=-1e30))
      share = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
      shrink = jnp.exp(top - new_top)
      part = _product(share.astype(v.dtype).reshape(K, -1, BLOCK), v[b * I + j], (2, 1)).reshape(
        out.shape
      )
      return out * shrink[..., None] + part, new_top, total * shrink + jnp.sum(share, axis=-1)

    rows = (K, G, BLOCK)
    out, top, total = jax.lax.fori_loop(
      0,
      who.key_block_counts[b, i],
      keys,
      (jnp.zeros((*rows, H)), jnp.full(rows, -1e30), jnp.zeros(rows)),
    )
    total = jnp.where(total > 0, total, 1.0)
    return out / total[..., None], top + jnp.log(total)

  out, log_total = jax.lax.map(queries, jnp.arange(len(q)))
  out_BTNH, log_total = checkpoint_name((_by_columns(out, q_BTNH), log_total), KEPT)
  return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, who, out_BTNH, log_total)


def _blocked_backward(kept, g_BTNH):
  q_BTNH, k_BTKH, v_BTKH, who, out_BTNH, log_total = kept
  K, (_, I, _) = k_BTKH.shape[2], who.key_blocks.shape
  q, g, k, v = (
    _by_blocks(q_BTNH, who, K),
    _by_blocks(g_BTNH, who, K),
    _keys(k_BTKH, who),
    _keys(v_BTKH, who),
  )
  # what softmax takes off its gradient
  mean_g = jnp.sum(_by_blocks(out_BTNH, who, K).astype(jnp.float32) * g, axis=-1).reshape(
    log_total.shape
  )

  def queries(carry, at):
    b, i = at // I, at % I

    def keys(n, carry):
      dq, dk, dv = carry
      j = who.key_blocks[b, i, n]
      there = b * I + j
      scores, visible = _scores(q[at], k[there], _visible(who, b, i, j))
      share = jnp.where(visible, jnp.exp(scores - log_total[at][..., None]), 0.0)
      dscores = (
        share
        * (_product(g[at], v[there], (2, 2)).reshape(share.shape) - mean_g[at][..., None])
        * q.shape[-1] ** -0.5
      )
      flat = lambda x: x.astype(q.dtype).reshape(K, -1, BLOCK)
      return (
        dq + _product(flat(dscores), k[there], (2, 1)),
        dk.at[there].add(_product(flat(dscores), q[at], (1, 1))),
        dv.at[there].add(_product(flat(share), g[at], (1, 1))),
      )

    dq, *carry = jax.lax.fori_loop(
      0, who.key_block_counts[b, i], keys, (jnp.zeros(q.shape[1:]), *carry)
    )
    return carry, dq

  (dk, dv), dq = jax.lax.scan(queries, [jnp.zeros(k.shape), jnp.zeros(v.shape)], jnp.arange(len(q)))
  return _by_columns(dq, q_BTNH), _by_columns(dk, k_BTKH), _by_columns(dv, v_BTKH), None


blocked.defvjp(_blocked_forward, _blocked_backward)


def reference(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """A row with nothing to see averages everything, so it stays finite."""
  return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None])


def _cudnn(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="cudnn"
  )


def _fused(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """`reference`, by cuDNN where that can be trusted."""
  short = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)  # cuDNN has no other
  shards = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
  of_a_device = lambda x: (x.shape[1], x.shape[2] // shards, x.shape[3])
  trusted = (
    target_platform() == "gpu"
    and short
    and cudnn_agrees(of_a_device(q_BTNH), of_a_device(k_BSKH), q_BTNH.dtype)
  )
  return (_cudnn if trusted else reference)(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


@functools.cache
def cudnn_agrees(queries: tuple[int, int, int], keys: tuple[int, int, int], dtype) -> bool:
  """Whether cuDNN gives the reference and its gradients, within the inputs' own rounding, on two random rows [T, N, H] and [S, K, H] with two texts each
  and a last token that sees nothing, which must stay finite. Tried on the device, once a shape; a warning says where it does not. Where there is none, as in
  a plan, it is taken to agree."""
  if not _is_here():
    return True
  draw = lambda seed, shape: np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
  (T, _, _), (S, _, _) = queries, keys
  first = S - T + np.arange(T)  # of the last T columns
  visible = (first[:, None] >= np.arange(S)) & (
    (np.arange(S) < S // 3) == (first < S // 3)[:, None]
  )
  real = np.arange(T)[:, None, None] < T - 1
  visible &= real[:, :, 0]

  def gradients(attend, exact):
    cast = lambda x: jnp.asarray(x, dtype).astype(jnp.float32 if exact else dtype)
    out, back = jax.vjp(
      lambda *qkv: attend(*qkv, jnp.broadcast_to(visible, (2, T, S))) * real.astype(dtype),
      *map(cast, (draw(0, queries), draw(1, keys), draw(2, keys))),
    )
    return [np.asarray(x, np.float32) for x in (out, *back(cast(draw(3, queries))))]

  try:
    with jax.ensure_compile_time_eval():
      pairs = list(zip(gradients(_cudnn, False), gradients(reference, True)))
    # NaN if one is
    off = float(np.max([np.max(np.abs(got - want)) / np.max(np.abs(want)) for got, want in pairs]))
    why = "" if off <= 0.03 else f"off by {off:.2g} of the largest value"
  except Exception as error:  # whatever it is, the other path works
    why = f"{type(error).__name__}: {error}".splitlines()[0]
  if why:
    logging.warning(
      "attention of queries %s on keys %s in %s without cuDNN: %s",
      queries,
      keys,
      jnp.dtype(dtype).name,
      why,
    )
  return not why


def causal(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """`reference` where no token sees a later column: in up to four blocks of queries, each against the columns up to its end, for five eighths of the work."""
  T = q_BTNH.shape[1]
  block = max(-(-T // 4 // LANES) * LANES, QUERIES)
  parts = [
    _fused(
      q_BTNH[:, first : first + block],
      k_BTKH[:, : first + block],
      v_BTKH[:, : first + block],
      mask_BTS[:, first : first + block, : first + block],
    )
    for first in range(0, T, block)
  ]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def splash_fits(T: int) -> bool:
  """Whether rows of this length, on the platform that is being compiled for, go through splash."""
  return target_platform() == "tpu" and T % LANES == 0


def _is_here() -> bool:
  """Whether what is being compiled for is there to run on."""
  return target_platform() == jax.default_backend()


def splash(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  window: int | None = None,
  *,
  interpret: bool = False,
) -> jax.Array:
  run = functools.partial(_splash, window=window, interpret=interpret)
  if jax.sharding.get_abstract_mesh().empty:
    return run(q_BTNH, k_BTKH, v_BTKH, segment_BT)
  rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")
  return jax.shard_map(run, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(
    q_BTNH, k_BTKH, v_BTKH, segment_BT
  )


def _splash(q_BTNH, k_BTKH, v_BTKH, segment_BT, *, window, interpret):
  B, T, N, H = q_BTNH.shape
  block = next(b for b in (1024, 512, 256, LANES) if T % b == 0)
  sizes = splash_lib.BlockSizes(
    block, block, min(block, 512), block, block, min(block, 512), block, block
  )
  one = (
    splash_lib.CausalMask((T, T))
    if window is None
    else splash_lib.LocalMask((T, T), (window - 1, 0), 0)
  )
  kernel = splash_lib.make_splash_mha_single_device(
    splash_lib.MultiHeadMask([one] * N),
    block_sizes=sizes,
    residual_checkpoint_name=KEPT,
    interpret=interpret,
  )
  major = lambda x: jnp.swapaxes(x, 1, 2)
  attend = lambda q, k, v, segment: kernel(
    q, k, v, segment_ids=splash_lib.SegmentIds(segment, segment)
  )
  scaled = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
  return major(jax.vmap(attend)(major(scaled), major(k_BTKH), major(v_BTKH), segment_BT)).astype(
    q_BTNH.dtype
  )
