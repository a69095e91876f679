"""Computes causal attention over packed rows, in four implementations.

A row packs several texts, called segments. A token sees the tokens of its own segment at the same
or an earlier column. Segment 0 is padding; what stands there is finite but meaningless.

Shapes: q_BTNH, k_BTKH and v_BTKH, with K dividing N (grouped queries); segment_BT is int32.
`window`: a token sees its last `window` columns, its own included; None: all of them.

  reference
    The definition. All logits are held at once, softmax is in float32; any device, any length.

  causal
    The reference without most of what lies above the diagonal. A GPU gets this one, and a TPU whose
    rows splash does not take. On a GPU each block of bfloat16 goes through cuDNN's fused attention,
    which holds no logits. It is trusted only where a trial gives the reference and its gradients
    for these lengths and heads. Versions of cuDNN are missing, refuse shapes, or are silently wrong
    with grouped queries. (Not yet run on a GPU.)

  blocked
    Blocks of 64 x 64 with the running softmax of FlashAttention (arXiv 2205.14135). Blocks in
    which nobody sees anything are skipped, as the data have them: other texts of the row, padding,
    what is above the diagonal. Only the logarithm of each softmax's denominator is kept for the
    backward pass. A CPU gets this one. In rows of 8 answers of 128 tokens it is six times as fast
    as `causal`.

  splash
    The TPU kernel that ships with jax. It works on large blocks in on-chip memory, and skips those
    above the diagonal or outside the window.

  attend_packed
    Chooses between `blocked` and `causal`.

XLA cannot split a Pallas kernel or a loop of data-dependent length by itself. Where a mesh is set,
each device runs splash or `blocked` on its own rows and heads.
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
# The least queries in a block of `causal`: each block is code of its own.
QUERIES = 256
# The name of what the backward pass of `blocked` and of splash needs beside q, k and v: see
# decoder's remat.
KEPT = "attention"
# Queries and keys in a block of `blocked`. With 32 its loop costs more; with 128 it computes more
# that nobody sees.
BLOCK = 64
LOWEST = -1e30  # a running maximum before the first key; finite, for -inf - -inf is NaN

# How a mesh splits arrays whose first axis is rows, and those that have heads as well.
ROW_SPEC = P(("data", "fsdp"))
HEAD_SPEC = P(("data", "fsdp"), None, "tensor")


# ---- who sees whom


class Visibility(NamedTuple):
  """Says who sees whom in packed rows, and for `blocked` in which blocks."""

  mask_BTS: jax.Array  # S = T
  # [B, query blocks, key blocks]: the key blocks that a query block sees something of, before the
  # others
  key_blocks: jax.Array | None = None
  key_block_counts: jax.Array | None = None  # [B, query blocks]: how many these are


def packed_mask(
  segment_BT: jax.Array | None,
  shape: tuple[int, int],
  window: int | None = None,
  *,
  prefix_BT: jax.Array | None = None,
  position_BT: jax.Array | None = None,
) -> jax.Array:
  """Returns the mask [B, T, S = T] of packed rows: True where query t sees key s.

  Args:
    segment_BT: None if every row is one text without padding.
    shape: (B, T).
    prefix_BT: the segment that a token sees beside its own, 0 for none; needs segments.
    position_BT: with prefixes a window is measured in positions, for what a text sees need not
      stand next to it.
  """
  B, T = shape
  column = jnp.arange(T)
  mask_BTS = jnp.broadcast_to(column[:, None] >= column[None, :], (B, T, T))
  if window is not None:
    place_BT = column[None, :] if prefix_BT is None else position_BT
    mask_BTS &= place_BT[:, :, None] - place_BT[:, None, :] < window
  if segment_BT is not None:
    is_visible_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
    if prefix_BT is not None:
      is_visible_BTS |= prefix_BT[:, :, None] == segment_BT[:, None, :]
    mask_BTS &= is_visible_BTS & (segment_BT[:, None, :] != 0)
  return mask_BTS


def visibility(mask_BTS: jax.Array) -> Visibility:
  """Returns what `attend_packed` takes; it is made once for all layers."""
  if target_platform() != "cpu":
    return Visibility(mask_BTS)
  B, T, _ = mask_BTS.shape
  blocks = -(-T // BLOCK)
  padding = blocks * BLOCK - T
  mask_BTS = jnp.pad(mask_BTS, ((0, 0), (0, padding), (0, padding)))
  # [B, query blocks, key blocks]
  is_any_visible = jnp.any(mask_BTS.reshape(B, blocks, BLOCK, blocks, BLOCK), axis=(2, 4))
  key_blocks = jnp.argsort(~is_any_visible, axis=-1, stable=True).astype(jnp.int32)
  return Visibility(mask_BTS, key_blocks, jnp.sum(is_any_visible, axis=-1, dtype=jnp.int32))


def attend_packed(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, visible: Visibility
) -> jax.Array:
  """Computes attention over packed rows where splash is not used.

  That is `blocked` on a CPU if its mesh divides the rows, and `causal` everywhere else.
  """
  B, T, _, _ = k_BTKH.shape
  mesh = jax.sharding.get_abstract_mesh()
  divides = mesh.empty or B % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
  if visible.key_blocks is None or not divides:
    return causal(q_BTNH, k_BTKH, v_BTKH, visible.mask_BTS[:, :T, :T])
  if mesh.empty:
    return blocked(q_BTNH, k_BTKH, v_BTKH, visible)
  sharded = jax.shard_map(
    blocked,
    in_specs=(HEAD_SPEC, HEAD_SPEC, HEAD_SPEC, Visibility(ROW_SPEC, ROW_SPEC, ROW_SPEC)),
    out_specs=HEAD_SPEC,
    check_vma=False,
  )
  return sharded(q_BTNH, k_BTKH, v_BTKH, visible)


# ---- blocked. Inside, arrays are cut into blocks of BLOCK columns, and the blocks of all rows are
# counted through: block number = row * (blocks of a row) + block of the row. The query heads that
# share a key head form a group; they stand one below the other, as rows of one product.


@jax.custom_vjp
def blocked(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, visible: Visibility
) -> jax.Array:
  """Computes the reference block by block, except that a token that sees nothing gets zeros.

  Products are in the inputs' type; sums and softmax are in float32.
  """
  return _blocked_forward(q_BTNH, k_BTKH, v_BTKH, visible)[0]


def _blocked_forward(q_BTNH, k_BTKH, v_BTKH, visible: Visibility):
  K = k_BTKH.shape[2]
  blocks = visible.key_blocks.shape[1]  # of a row
  q = _by_blocks(q_BTNH, visible, K)
  k = _by_blocks(k_BTKH, visible, K)
  v = _by_blocks(v_BTKH, visible, K)
  group, H = q.shape[2] // BLOCK, q.shape[3]

  def attend(number):
    """Returns a query block's output and the logarithm of its softmax's denominators."""
    row, query_block = number // blocks, number % blocks

    def add_keys(n, carry):
      out, top, total = carry  # relative to the running maximum `top`
      key_block = visible.key_blocks[row, query_block, n]
      scores, mask = _scores(
        q[number], k[row * blocks + key_block], _block_mask(visible, row, query_block, key_block)
      )
      new_top = jnp.maximum(top, jnp.max(scores, axis=-1, where=mask, initial=LOWEST))
      share = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
      shrink = jnp.exp(top - new_top)
      flat_share = share.astype(v.dtype).reshape(K, -1, BLOCK)
      block_out = _product(flat_share, v[row * blocks + key_block], (2, 1)).reshape(out.shape)
      out = out * shrink[..., None] + block_out
      return out, new_top, total * shrink + jnp.sum(share, axis=-1)

    count = visible.key_block_counts[row, query_block]
    heads_and_rows = (K, group, BLOCK)
    nothing = (
      jnp.zeros((*heads_and_rows, H)),
      jnp.full(heads_and_rows, LOWEST),
      jnp.zeros(heads_and_rows),
    )
    out, top, total = jax.lax.fori_loop(0, count, add_keys, nothing)
    total = jnp.where(total > 0, total, 1.0)  # tokens that see nothing
    return out / total[..., None], top + jnp.log(total)

  out, log_total = jax.lax.map(attend, jnp.arange(len(q)))
  out_BTNH, log_total = checkpoint_name((_by_columns(out, q_BTNH), log_total), KEPT)
  return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, visible, out_BTNH, log_total)


def _blocked_backward(residuals, d_out_BTNH):
  q_BTNH, k_BTKH, v_BTKH, visible, out_BTNH, log_total = residuals
  K = k_BTKH.shape[2]
  blocks = visible.key_blocks.shape[1]  # of a row
  q = _by_blocks(q_BTNH, visible, K)
  d_out = _by_blocks(d_out_BTNH, visible, K)
  k = _by_blocks(k_BTKH, visible, K)
  v = _by_blocks(v_BTKH, visible, K)
  # Softmax takes the mean of its gradient off it, and that mean is the product of output and d_out.
  out = _by_blocks(out_BTNH, visible, K).astype(jnp.float32)
  mean_d_share = jnp.sum(out * d_out, axis=-1).reshape(log_total.shape)

  def flat(x):
    return x.astype(q.dtype).reshape(K, -1, BLOCK)

  def attend(carry, number):
    """Adds a query block's part to dk and dv, and returns its dq."""
    row, query_block = number // blocks, number % blocks

    def add_keys(n, carry):
      dq, dk, dv = carry
      key_block = visible.key_blocks[row, query_block, n]
      there = row * blocks + key_block
      scores, mask = _scores(q[number], k[there], _block_mask(visible, row, query_block, key_block))
      share = jnp.where(mask, jnp.exp(scores - log_total[number][..., None]), 0.0)
      d_share = _product(d_out[number], v[there], (2, 2)).reshape(share.shape)
      d_scores = share * (d_share - mean_d_share[number][..., None]) * q.shape[-1] ** -0.5
      dq = dq + _product(flat(d_scores), k[there], (2, 1))
      dk = dk.at[there].add(_product(flat(d_scores), q[number], (1, 1)))
      dv = dv.at[there].add(_product(flat(share), d_out[number], (1, 1)))
      return dq, dk, dv

    count = visible.key_block_counts[row, query_block]
    start = (jnp.zeros(q.shape[1:]), *carry)
    dq, *carry = jax.lax.fori_loop(0, count, add_keys, start)
    return carry, dq

  zero = [jnp.zeros(k.shape), jnp.zeros(v.shape)]
  (dk, dv), dq = jax.lax.scan(attend, zero, jnp.arange(len(q)))
  return _by_columns(dq, q_BTNH), _by_columns(dk, k_BTKH), _by_columns(dv, v_BTKH), None


blocked.defvjp(_blocked_forward, _blocked_backward)


def _by_blocks(x_BTNH: jax.Array, visible: Visibility, kv_heads: int) -> jax.Array:
  """Cuts an array into blocks [number, kv_heads, group * BLOCK, H], the last ones padded."""
  B, T, N, H = x_BTNH.shape
  blocks = visible.key_block_counts.shape[1]
  padded = jnp.pad(x_BTNH, ((0, 0), (0, blocks * BLOCK - T), (0, 0), (0, 0)))
  x = padded.reshape(B, blocks, BLOCK, kv_heads, N // kv_heads, H)
  return x.transpose(0, 1, 3, 4, 2, 5).reshape(B * blocks, kv_heads, -1, H)


def _by_columns(x: jax.Array, like_BTNH: jax.Array) -> jax.Array:
  """Inverts `_by_blocks`: returns [B, T, N, H] in the other array's dtype, without the padding."""
  B, T, N, H = like_BTNH.shape
  kv_heads = x.shape[1]
  x = x.reshape(B, -1, kv_heads, N // kv_heads, BLOCK, H).transpose(0, 1, 4, 2, 3, 5)
  return x.reshape(B, -1, N, H)[:, :T].astype(like_BTNH.dtype)


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Multiplies one pair of matrices a key head, over these axes of a and b; sums are float32."""
  axis_of_a, axis_of_b = contract
  return jax.lax.dot_general(
    a, b, (((axis_of_a,), (axis_of_b,)), ((0,), (0,))), preferred_element_type=jnp.float32
  )


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (logits, mask) of a pair of blocks, each [K, group, BLOCK, BLOCK]."""
  scores = _product(q, k, (2, 2)).reshape(len(q), -1, BLOCK, BLOCK) * q.shape[-1] ** -0.5
  return scores, jnp.broadcast_to(mask, scores.shape)


def _block_mask(visible: Visibility, row, query_block, key_block) -> jax.Array:
  start = (row, query_block * BLOCK, key_block * BLOCK)
  return jax.lax.dynamic_slice(visible.mask_BTS, start, (1, BLOCK, BLOCK))[0]


# ---- reference, causal, and cuDNN


def reference(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """Computes attention from its definition, for any mask and any number of keys.

  A token that sees nothing averages everything, so it stays finite.
  """
  return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None])


def causal(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """Computes the reference where no token sees a later column, for about 5/8 of the work.

  Up to four blocks of queries each go against the columns up to their own end.
  """
  T = q_BTNH.shape[1]
  block = max(-(-T // 4 // LANES) * LANES, QUERIES)
  outputs = []
  for start in range(0, T, block):
    end = start + block
    queries, keys, values = q_BTNH[:, start:end], k_BTKH[:, :end], v_BTKH[:, :end]
    outputs.append(_trusted(queries, keys, values, mask_BTS[:, start:end, :end]))
  return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _trusted(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """Computes the reference, by cuDNN where that can be trusted."""
  shards = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)

  def on_a_device(x):
    return x.shape[1], x.shape[2] // shards, x.shape[3]

  is_trusted = (
    target_platform() == "gpu"
    and q_BTNH.dtype in (jnp.bfloat16, jnp.float16)  # cuDNN has no other
    and cudnn_agrees(on_a_device(q_BTNH), on_a_device(k_BSKH), q_BTNH.dtype)
  )
  attend = _cudnn if is_trusted else reference
  return attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def _cudnn(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="cudnn"
  )


@functools.cache
def cudnn_agrees(queries: tuple[int, int, int], keys: tuple[int, int, int], dtype) -> bool:
  """Tells whether cuDNN gives the reference and its gradients, within the inputs' own rounding.

  queries is a shape [T, N, H], keys [S, K, H]. It is tried on the device, once a shape; a warning
  says where it fails. Where there is no device, as in a plan, cuDNN is taken to agree.
  """
  if not _is_here():
    return True
  trial = _draw_trial(queries, keys)
  try:
    with jax.ensure_compile_time_eval():
      got = _trial_results(_cudnn, trial, dtype, in_float32=False)
      want = _trial_results(reference, trial, dtype, in_float32=True)
    errors = [np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(got, want, strict=True)]
    error = float(np.max(errors))  # NaN if one is
    trouble = "" if error <= 0.03 else f"off by {error:.2g} of the largest value"
  except Exception as failure:  # whatever it is, the reference works
    trouble = f"{type(failure).__name__}: {failure}".splitlines()[0]
  if trouble:
    logging.warning(
      "attention of queries %s on keys %s in %s without cuDNN: %s",
      queries,
      keys,
      jnp.dtype(dtype).name,
      trouble,
    )
  return not trouble


class _Trial(NamedTuple):
  """Holds two random rows of two texts each, whose last token sees nothing."""

  qkv: list[np.ndarray]
  d_out: np.ndarray
  visible_TS: np.ndarray
  is_real: np.ndarray  # [T, 1, 1]: False for the last token, which must only stay finite


def _draw_trial(queries, keys) -> _Trial:
  shapes = (queries, keys, keys, queries)
  *qkv, d_out = (
    np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    for seed, shape in enumerate(shapes)
  )
  T, S = queries[0], keys[0]
  query_column = S - T + np.arange(T)  # the queries are the last T columns
  key_column = np.arange(S)
  is_causal_TS = query_column[:, None] >= key_column
  is_same_text_TS = (key_column < S // 3) == (query_column < S // 3)[:, None]
  is_real = np.arange(T)[:, None, None] < T - 1
  return _Trial(qkv, d_out, is_causal_TS & is_same_text_TS & is_real[:, :, 0], is_real)


def _trial_results(attend, trial: _Trial, dtype, in_float32) -> list[np.ndarray]:
  """Returns output, dq, dk and dv of inputs rounded to dtype; in_float32: computed from float32."""

  def cast(x):
    rounded = jnp.asarray(x, dtype)
    return rounded.astype(jnp.float32) if in_float32 else rounded

  def attend_real(q, k, v):
    visible_BTS = jnp.broadcast_to(trial.visible_TS, (2, *trial.visible_TS.shape))
    return attend(q, k, v, visible_BTS) * trial.is_real.astype(dtype)

  out, back = jax.vjp(attend_real, *map(cast, trial.qkv))
  return [np.asarray(x, np.float32) for x in (out, *back(cast(trial.d_out)))]


def _is_here() -> bool:
  """Tells whether the platform that is being compiled for is there to run on."""
  return target_platform() == jax.default_backend()


# ---- splash


def splash_fits(T: int) -> bool:
  """Tells whether rows of this length, on the target platform, go through splash."""
  return target_platform() == "tpu" and T % LANES == 0


def splash(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_BT: jax.Array,
  window: int | None = None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Computes attention with the TPU kernel that ships with jax, on each device's rows and heads."""
  run = functools.partial(_splash, window=window, interpret=interpret)
  if not jax.sharding.get_abstract_mesh().empty:
    in_specs = (HEAD_SPEC, HEAD_SPEC, HEAD_SPEC, ROW_SPEC)
    run = jax.shard_map(run, in_specs=in_specs, out_specs=HEAD_SPEC, check_vma=False)
  return run(q_BTNH, k_BTKH, v_BTKH, segment_BT)


def _splash(q_BTNH, k_BTKH, v_BTKH, segment_BT, *, window, interpret):
  _, T, N, H = q_BTNH.shape
  block = next(size for size in (1024, 512, 256, LANES) if T % size == 0)
  block_sizes = splash_lib.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=min(block, 512),
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=min(block, 512),
    block_q_dq=block,
    block_kv_dq=block,
  )
  if window is None:
    head_mask = splash_lib.CausalMask((T, T))
  else:
    head_mask = splash_lib.LocalMask((T, T), (window - 1, 0), 0)
  kernel = splash_lib.make_splash_mha_single_device(
    splash_lib.MultiHeadMask([head_mask] * N),
    block_sizes=block_sizes,
    residual_checkpoint_name=KEPT,
    interpret=interpret,
  )

  def heads_first(x_BTNH):
    return jnp.swapaxes(x_BTNH, 1, 2)

  def attend_row(q, k, v, segment):
    return kernel(q, k, v, segment_ids=splash_lib.SegmentIds(segment, segment))

  scaled = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)  # the kernel does not scale
  out = jax.vmap(attend_row)(
    heads_first(scaled), heads_first(k_BTKH), heads_first(v_BTKH), segment_BT
  )
  return heads_first(out).astype(q_BTNH.dtype)
