"""Divergence between teacher and policy on Hopper GPUs: Pallas (Mosaic GPU) kernels in which logits live in registers only.

Same contract as distill_kl_ref.py, and the same three kernels as distill_kl_tpu.py:

  statistics   running sums of each token over a part of the vocabulary; the parts are added at the very end
  mixture      the two sums of the mixture form, once both normalisers are known (0 < alpha < 1 only)
  dlogits      the gradient with respect to the policy's logits, rounded to the inputs' dtype

The first two write a few numbers a token and part. The last writes a bounded workspace, WORKSPACE_BYTES for all tokens
and a stretch of the vocabulary, from which cuBLAS makes the gradients: a stretch's part of the head's gradient is
complete at once, so only that of the hidden states is carried along in float32.
In units of 2 X D V operations: forward 2 (mixture 4), backward 4. weights_X brings nothing here.

A block of three warpgroups keeps 128 tokens and walks its part of the vocabulary, 128 entries at a time. One warpgroup
copies (TMA) tiles of hidden states and heads of both sides, one side after the other, so that their widths may differ;
two multiply (wgmma), 64 tokens each: two 64 x 128 float32 accumulators a warpgroup are what its registers hold. GROUP
blocks of tokens times PARTS of the vocabulary run at a time, so that their hidden states stay in the L2 cache.

Numerics: logits, statistics and the head's gradient are float32, as in distill_kl_xla.py. Tensor cores would round
float32 inputs to 10 bits; they are split into three bfloat16 terms instead, whose six leading products add up along a
six times wider D. So float32 is there to be exact, not fast.
X and D or E are padded where they do not divide a tile (cheap); a vocabulary that is no multiple of 128 costs one padded
copy of both heads, and so does a head that is a transposed view of a [V, D] embedding. No public model's vocabulary
needs the former. Off a GPU the kernels run in GPU interpret mode, which simulates one device of a process at a time.

No figure of time stands here: the kernels have been held against the reference in interpret mode with race detection
and compiled for an H200, not yet run on one. So distill_kl chooses "xla" on a GPU unless told otherwise.
"""

import functools
import sys
from typing import NamedTuple

import jax
from jax import lax

# public from jax 0.11 on only
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels.distill_kl_sweeps import distill
from sdpo_jax.kernels.distill_kl_xla import gradient_products, over_blocks
from sdpo_jax.kernels.target import target_platform

WORKSPACE_BYTES = 640 * 2**20  # dlogits: 40,960 entries of the vocabulary at X = 8192 in bfloat16
# tokens, entries of the vocabulary and entries of D in a tile
ROWS, COLUMNS, DEPTH = 128, 128, 64
HALF = ROWS // 2  # tokens of one of the two multiplying warpgroups
STAGES = 4  # tiles of either operand on their way, 32 KB together
# blocks that run at a time: fewer than an H200's 132 multiprocessors
GROUP, PARTS = 16, 8


class Plan(NamedTuple):
  alpha: float
  temperature: float
  interpret: object  # False, or InterpretGPUParams


FOLD = dm.Fold(
  sum=lambda x: jnp.sum(x, axis=1),
  max=lambda x: jnp.max(x, axis=1),
  spread=lambda x, width: lax.broadcast_in_dim(x, (x.shape[0], width), (0,)),
)


def distill_kl(
  student_hidden_XD,
  student_head_DV,
  teacher_hidden_XE,
  teacher_head_EV,
  target_X,
  *,
  alpha,
  temperature,
  interpret=None,
):
  arrays = student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV
  assert all(a.dtype in (jnp.float32, jnp.bfloat16) for a in arrays), [a.dtype for a in arrays]
  return distill(
    sys.modules[__name__], make_plan(alpha, temperature, interpret), None, *arrays, target_X
  )


def make_plan(alpha, temperature, interpret=None):
  """interpret: False or InterpretGPUParams; None chooses by what is being compiled for."""
  if interpret is None:
    interpret = False if target_platform() in ("gpu", "cuda") else InterpretGPUParams()
  return Plan(alpha, temperature, interpret)


# ---- the three parts that distill_kl_sweeps.py asks for
# -------------------------------------------------------------


def statistics(plan, h, w, g, u, target):
  parts = dm.Stats(*jnp.moveaxis(_call(plan, "statistics", h, w, g, u, (target,), 8), 1, 0))
  max_s, max_t = (jnp.max(x, axis=0, keepdims=True) for x in parts[:2])
  sums = dm.rescale(parts, max_s, max_t, plan.alpha)[2:]
  column = lambda x: x[: h.shape[0], None]
  return dm.Stats(column(max_s[0]), column(max_t[0]), *[column(jnp.sum(x, axis=0)) for x in sums])


def mixture_sums(plan, h, w, g, u, scalars):
  nowhere = jnp.full(h.shape[0], -1)
  sums = jnp.sum(_call(plan, "mixture", h, w, g, u, (nowhere, *_rows(scalars)), 2), axis=0)
  return tuple(x[: h.shape[0], None] for x in sums)


def gradients(plan, h, w, g, u, target, scalars, cotangents, dtype):
  dlogits_dtype = jnp.promote_types(h.dtype, w.dtype)
  X, V = h.shape[0], w.shape[1]
  size = max(WORKSPACE_BYTES // (X * dlogits_dtype.itemsize) // COLUMNS * COLUMNS, COLUMNS)

  def body(start, size, carry):
    dh, dw = carry
    hidden, dh, dw = lax.optimization_barrier((h, dh, dw))  # one workspace at a time
    head, teacher_head = (lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (w, u))
    d = _call(
      plan,
      "dlogits",
      hidden,
      head,
      g,
      teacher_head,
      (target - start, *_rows(scalars), *_rows(cotangents)),
      dlogits_dtype,
    )
    dh_part, dw_part = gradient_products(plan, d[:X, :size], h, head, jnp.float32)
    return dh + dh_part, lax.dynamic_update_slice_in_dim(dw, dw_part.astype(dtype), start, 1)

  return over_blocks(V, size, body, (jnp.zeros(h.shape, jnp.float32), jnp.zeros(w.shape, dtype)))


def _rows(columns):
  return [x[:, 0] for x in columns]


# ---- kernels -------------------------------------------------------------------------------------
# -----------------


def _call(plan, name, h, w, g, u, per_token, output):
  """statistics, mixture: [parts, K, padded X], output being K. dlogits: [padded X, padded V], output being its dtype.

  per_token: the target (counted from the first entry of w, or outside it), then Scalars and cotangents.
  """
  V, count = w.shape[1], len(per_token)
  h, w = _as_bfloat16(h, w)
  g, u = _as_bfloat16(g, u)
  h, g = _pad(h, ROWS, DEPTH), _pad(g, ROWS, DEPTH)
  w, u = _pad(w, DEPTH, COLUMNS), _pad(u, DEPTH, COLUMNS)
  assert V < 2**24, V  # targets travel as float32
  rows_KX = _pad(jnp.stack([x.astype(jnp.float32) for x in per_token]), 1, ROWS)
  blocks, tiles = h.shape[0] // ROWS, w.shape[1] // COLUMNS
  parts = min(PARTS * max(GROUP // blocks, 1), tiles)
  each = -(-tiles // parts)  # tiles of the vocabulary in a part
  group = min(GROUP, blocks)
  dense = not isinstance(output, int)
  if dense:
    out_type = jax.ShapeDtypeStruct((h.shape[0], w.shape[1]), output)
    out_scratch = plgpu.SMEM((2, HALF, COLUMNS), output, transforms=_swizzled(output))
  else:
    out_type = jax.ShapeDtypeStruct((parts, output, h.shape[0]), jnp.float32)
    out_scratch = plgpu.SMEM((2, output, HALF), jnp.float32)

  def kernel(
    h_ref,
    w_ref,
    g_ref,
    u_ref,
    rows_ref,
    out_ref,
    a_smem,
    b_smem,
    rows_smem,
    out_smem,
    full,
    free,
    rows_full,
  ):
    block = lax.axis_index("group") * group + lax.axis_index("block")
    part, warpgroup = lax.axis_index("part"), lax.axis_index("warpgroup")
    first = part * each
    count_tiles = jnp.clip(tiles - first, 0, each)  # the last parts may have fewer, or none
    depths = h_ref.shape[1] // DEPTH, g_ref.shape[1] // DEPTH
    slot_of = lambda step: lax.rem(step, jnp.int32(STAGES))

    @pl.when((warpgroup == 2) & (block < blocks))
    def _():
      plgpu.set_max_registers(40, action="decrease")
      plgpu.copy_gmem_to_smem(rows_ref.at[:, pl.ds(block * ROWS, ROWS)], rows_smem, rows_full)

      def fill(step, hidden_ref, head_ref, tile, k):
        slot = slot_of(step)
        pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
        a = hidden_ref.at[pl.ds(block * ROWS, ROWS), pl.ds(k * DEPTH, DEPTH)]
        b = head_ref.at[pl.ds(k * DEPTH, DEPTH), pl.ds((first + tile) * COLUMNS, COLUMNS)]
        plgpu.copy_gmem_to_smem(a, a_smem.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(b, b_smem.at[slot], full.at[slot])

      @pl.loop(0, count_tiles)
      def _(tile):
        step = tile * sum(depths)
        pl.loop(0, depths[0])(lambda k: fill(step + k, h_ref, w_ref, tile, k))
        pl.loop(0, depths[1])(lambda k: fill(step + depths[0] + k, g_ref, u_ref, tile, k))

      steps = count_tiles * sum(depths)  # a barrier is left with every arrival seen
      pl.loop(jnp.maximum(steps - STAGES, 0), steps)(
        lambda step: plgpu.barrier_wait(free.at[slot_of(step)])
      )

    @pl.when((warpgroup < 2) & (block < blocks))
    def _():
      plgpu.set_max_registers(232, action="increase")
      plgpu.barrier_wait(rows_full)
      row = lambda k: as_row(rows_smem[k, pl.ds(warpgroup * HALF, HALF)])
      target = row(0).astype(jnp.int32)
      others = [row(k) for k in range(1, count)]
      spread = lambda x: FOLD.spread(x, COLUMNS)

      def logits(step, depth):
        def multiply(accumulator):
          def one(k, _):
            slot = slot_of(step + k)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(
              accumulator, a_smem.at[slot, pl.ds(warpgroup * HALF, HALF)], b_smem.at[slot]
            )
            plgpu.wgmma_wait(1)  # the product before this one has ended: its tiles may go
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[slot_of(step + k - 1)]))

          lax.fori_loop(0, depth, one, None)
          plgpu.wgmma_wait(0)
          plgpu.barrier_arrive(free.at[slot_of(step + depth - 1)])
          return accumulator[...]

        product = pl.run_scoped(multiply, plgpu.ACC((HALF, COLUMNS), jnp.float32))
        return product if plan.temperature == 1 else product / plan.temperature

      def tile_logits(tile):
        step = tile * sum(depths)
        s, t = logits(step, depths[0]), logits(step + depths[0], depths[1])
        entry = iota(jnp.int32, (HALF, COLUMNS), 1)
        start = (first + tile) * COLUMNS
        if not dense and V % COLUMNS:
          exists = entry < V - start
          s, t = jnp.where(exists, s, dm.NEG), jnp.where(exists, t, dm.NEG)
        return s, t, entry == spread(target - start)

      if dense:
        scalars, cotangents = dm.Scalars(*map(spread, others[:5])), tuple(map(spread, others[5:]))

        @pl.loop(0, count_tiles)
        def _(tile):
          s, t, hit = tile_logits(tile)
          d = dm.dlogits(s, t, hit, scalars, cotangents, plan.alpha)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          out_smem[warpgroup] = d.astype(output)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(
            out_smem.at[warpgroup],
            out_ref.at[
              pl.ds(block * ROWS + warpgroup * HALF, HALF), pl.ds((first + tile) * COLUMNS, COLUMNS)
            ],
          )
      else:
        zero = target.astype(jnp.float32) * 0  # in the layout of a row
        if name == "statistics":
          sums = (zero + dm.NEG,) * 2 + (zero,) * 6

          def add(tile, sums):
            s, t, hit = tile_logits(tile)
            return tuple(dm.add_block(dm.Stats(*sums), s, t, hit, plan.alpha, FOLD))
        else:
          sums, scalars = (zero,) * 2, dm.Scalars(*map(spread, others[:5]))

          def add(tile, sums):
            s, t, _ = tile_logits(tile)
            return tuple(map(jnp.add, sums, dm.mixture_sums(s, t, scalars, plan.alpha, FOLD)))

        for k, x in enumerate(lax.fori_loop(0, count_tiles, add, sums)):
          out_smem[warpgroup, k] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          out_smem.at[warpgroup], out_ref.at[part, :, pl.ds(block * ROWS + warpgroup * HALF, HALF)]
        )
      plgpu.wait_smem_to_gmem(0)

  kernel.__name__ = f"distill_kl_{name}"
  as_row = lambda x: x
  iota = lax.broadcasted_iota
  if not plan.interpret:  # the interpreter knows no layouts
    as_row = functools.partial(plgpu.layout_cast, new_layout=plgpu.Layout.WGMMA.reduce(1))
    iota = functools.partial(plgpu.broadcasted_iota, layout=plgpu.Layout.WGMMA)
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(-(-blocks // group), parts, group),
    grid_names=("group", "part", "block"),
    num_threads=3,
    thread_name="warpgroup",
    interpret=plan.interpret,
    scratch_types=[
      plgpu.SMEM((STAGES, ROWS, DEPTH), jnp.bfloat16, transforms=_swizzled(jnp.bfloat16)),
      plgpu.SMEM((STAGES, DEPTH, COLUMNS), jnp.bfloat16, transforms=_swizzled(jnp.bfloat16)),
      plgpu.SMEM((count, ROWS), jnp.float32),
      out_scratch,
      plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),  # a pair of tiles has come
      plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),  # both warpgroups are done with it
      plgpu.Barrier(),
    ],
  )(h, w, g, u, rows_KX)


def _swizzled(dtype):
  """The layout in shared memory that TMA writes and wgmma reads: rows of 128 bytes."""
  return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _pad(x, rows, columns):
  """x with zeros appended, to multiples of rows and columns."""
  return jnp.pad(x, ((0, -x.shape[0] % rows), (0, -x.shape[1] % columns)))


def _as_bfloat16(hidden, head):
  """Operands in bfloat16 whose product is that of these ones."""
  if hidden.dtype == head.dtype == jnp.bfloat16:
    return hidden, head

  def terms(x):
    x = x.astype(jnp.float32)
    for _ in range(3):
      rounded = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
      yield rounded.astype(jnp.bfloat16)
      x = x - rounded

  (a, b, c), (A, B, C) = terms(hidden), terms(head)
  return jnp.concatenate([a, a, a, b, b, c], axis=1), jnp.concatenate([A, B, C, A, B, A], axis=0)
