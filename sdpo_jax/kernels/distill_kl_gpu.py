"""Computes the divergence on Hopper GPUs, in Pallas (Mosaic GPU) kernels.

Their logits live in registers only. The contract is that of distill_kl_ref.py, and the three
kernels are those of distill_kl_tpu.py:

  statistics   sums over a part of the vocabulary, per token; the parts are added at the very end
  mixture      the two sums of the mixture form, once both normalisers are known
               (0 < alpha < 1 only)
  dlogits      the gradient with respect to the policy's logits, rounded to the inputs' dtype

The first two write a few numbers a token and part. The last writes a bounded workspace of
WORKSPACE_BYTES, all tokens by a stretch of the vocabulary, from which cuBLAS makes the gradients. A
stretch's part of the head's gradient is complete at once, so only that of the hidden states is
carried along, in float32.
Cost, in units of 2 X D V operations: forward 2 (mixture form 4), backward 4. weights_X brings
nothing here.

Work of a block. Three warpgroups keep 128 tokens and walk their part of the vocabulary, 128 entries
at a time. One warpgroup copies (TMA) tiles of hidden states and heads. It takes one side after the
other, so that their widths may differ. The other two multiply (wgmma), 64 tokens each: two 64 x 128
float32 accumulators a warpgroup are what its registers hold. Copies and products meet at two rings
of barriers, one for "full" and one for "free" tiles.
GROUP blocks of tokens times PARTS of the vocabulary run at a time, so that their hidden states stay
in the L2 cache.

Numerics. Logits, statistics and the head's gradient are float32, as in distill_kl_xla.py. Tensor
cores would round float32 inputs to 10 bits. Instead each is split into three bfloat16 terms, and
the six leading products add up along a six times wider D. So float32 is exact here, not fast.
X and D or E are padded where they do not divide a tile, which is cheap. A vocabulary that is no
multiple of 128 costs one padded copy of both heads; no public model needs that. A head that is a
transposed view of a [V, D] embedding costs such a copy too. Off a GPU the kernels run in GPU
interpret mode, which simulates one device of a process at a time.

No figure of time stands here. The kernels have been held against the reference in interpret mode
with race detection, and compiled for an H200, but not yet run on one. So distill_kl chooses "xla"
on a GPU unless "pallas_gpu" is named.
"""

import sys
from typing import Any, NamedTuple

import jax
from jax import lax

# Public from jax 0.11 on only.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels.distill_kl_ref import DistillKL
from sdpo_jax.kernels.distill_kl_sweeps import Inputs, Layout, distill
from sdpo_jax.kernels.distill_kl_xla import add_gradients, gradient_products, over_blocks
from sdpo_jax.kernels.target import target_platform

WORKSPACE_BYTES = 640 * 2**20  # dlogits: 40,960 entries of the vocabulary at X = 8192 in bfloat16
# Tokens, entries of the vocabulary, and entries of D in a tile.
ROWS, COLUMNS, DEPTH = 128, 128, 64
HALF = ROWS // 2  # tokens of one of the two multiplying warpgroups
STAGES = 4  # tiles of either operand on their way, 32 KB together
# Tiles of tokens and parts of the vocabulary that run at a time: their product is below an H200's
# 132 multiprocessors.
GROUP, PARTS = 16, 8
COPYING_WARPGROUP = 2  # 0 and 1 multiply


class Plan(NamedTuple):
  """Holds what is fixed while tracing."""

  alpha: float
  temperature: float
  interpret: object  # False, or InterpretGPUParams


# A token's running number is an element of a vector, not a column as in dm.ROWS: wgmma's layout
# reduces along a row to one dimension.
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
) -> DistillKL:
  """Computes the divergence on one device. interpret: as in make_plan."""
  inputs = Inputs(student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X)
  dtypes = [x.dtype for x in inputs.matrices]
  assert all(dtype in (jnp.float32, jnp.bfloat16) for dtype in dtypes), dtypes
  plan = make_plan(alpha, temperature, interpret)
  return distill(sys.modules[__name__], plan, Layout(), inputs)


def make_plan(alpha, temperature, interpret=None) -> Plan:
  """Returns the plan; interpret: False, InterpretGPUParams, or None to choose by the target."""
  if interpret is None:
    interpret = False if target_platform() in ("gpu", "cuda") else InterpretGPUParams()
  return Plan(alpha, temperature, interpret)


# ---- the three functions that distill_kl_sweeps.py asks of an implementation


def statistics(plan, inputs: Inputs) -> dm.Stats:
  """Returns the Stats of every token over this vocabulary."""
  X = inputs.target_X.shape[0]
  sums = _call(plan, "statistics", inputs, (inputs.target_X,), 8)
  part_stats = dm.Stats(*jnp.moveaxis(sums, 1, 0))  # each [parts, padded X]
  max_s, max_t = (jnp.max(x, axis=0, keepdims=True) for x in part_stats[:2])
  sums = dm.rescale(part_stats, max_s, max_t, plan.alpha)[2:]

  def as_column(x):
    return x[:X, None]

  maxima = as_column(max_s[0]), as_column(max_t[0])
  return dm.Stats(*maxima, *[as_column(jnp.sum(x, axis=0)) for x in sums])


def mixture_sums(plan, inputs: Inputs, scalars: dm.Scalars):
  """Returns this vocabulary's part of KL(pi || m) and of KL(q || m)."""
  X = inputs.target_X.shape[0]
  nowhere = jnp.full(X, -1)  # this kernel needs no target
  part_sums = _call(plan, "mixture", inputs, (nowhere, *_vectors(scalars)), 2)
  return tuple(x[:X, None] for x in jnp.sum(part_sums, axis=0))


def gradients(plan, inputs: Inputs, scalars: dm.Scalars, cotangents: dm.Cotangents, head_dtype):
  """Returns the gradients of the policy's hidden states, in float32, and head, in head_dtype."""
  hidden_XD, head_DV = inputs.policy_hidden_XD, inputs.policy_head_DV
  dlogits_dtype = jnp.promote_types(hidden_XD.dtype, head_DV.dtype)
  X, V = hidden_XD.shape[0], head_DV.shape[1]
  entries = WORKSPACE_BYTES // (X * dlogits_dtype.itemsize)
  stretch = max(entries // COLUMNS * COLUMNS, COLUMNS)

  def body(start, size, carry):
    # The barrier makes a stretch wait for the gradients of the one before: one workspace at a time.
    hidden, d_hidden_XD, d_head_DV = lax.optimization_barrier((hidden_XD, *carry))
    head, teacher_head = (
      lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (head_DV, inputs.teacher_head_EV)
    )
    stretch_inputs = inputs._replace(
      policy_hidden_XD=hidden, policy_head_DV=head, teacher_head_EV=teacher_head
    )
    per_token = (inputs.target_X - start, *_vectors(scalars), *_vectors(cotangents))
    dlogits = _call(plan, "dlogits", stretch_inputs, per_token, dlogits_dtype)
    stretch_gradients = gradient_products(plan, dlogits[:X, :size], hidden_XD, head, jnp.float32)
    return add_gradients((d_hidden_XD, d_head_DV), stretch_gradients, start)

  zero = jnp.zeros(hidden_XD.shape, jnp.float32), jnp.zeros(head_DV.shape, head_dtype)
  return over_blocks(V, stretch, body, zero)


def _vectors(columns):
  return [x[:, 0] for x in columns]


# ---- launching a kernel


class Launch(NamedTuple):
  """Says what one launch computes and how it is cut up; all of it is fixed while tracing."""

  plan: Plan
  name: str  # statistics | mixture | dlogits
  V: int  # before padding
  vectors: int  # per token: the target, Scalars, cotangents
  policy_steps: int  # tiles of D, and of E below
  teacher_steps: int
  blocks: int  # tiles of tokens
  group: int  # of them, running at a time
  tiles: int  # of the vocabulary
  parts: int
  tiles_per_part: int  # the last parts may have fewer, or none

  @property
  def is_dense(self) -> bool:
    """Tells whether the output is dlogits rather than a few sums a token."""
    return self.name == "dlogits"

  @property
  def steps_per_tile(self) -> int:
    """Returns how many pairs of operand tiles make the logits of a tile, both sides together."""
    return self.policy_steps + self.teacher_steps


class Refs(NamedTuple):
  """Names a kernel's references: arrays in memory, then buffers and barriers of a block."""

  policy_hidden: Any
  policy_head: Any
  teacher_hidden: Any
  teacher_head: Any
  vectors: Any  # [vectors, padded X]
  out: Any
  hidden_smem: Any  # [STAGES, ROWS, DEPTH]
  head_smem: Any  # [STAGES, DEPTH, COLUMNS]
  vectors_smem: Any  # [vectors, ROWS]
  out_smem: Any  # one buffer for each multiplying warpgroup
  full: Any  # STAGES barriers: a pair of tiles has come
  free: Any  # STAGES barriers: both warpgroups are done with it
  vectors_full: Any


class Place(NamedTuple):
  """Names where a warpgroup stands."""

  block: Any  # of tokens
  part: Any  # of the vocabulary
  warpgroup: Any
  first_tile: Any  # of the part
  tiles: Any  # that the part has


def _call(plan, name, inputs: Inputs, per_token, output):
  """Runs a kernel and returns its padded output.

  statistics and mixture return [parts, output, padded X]: `output` sums. dlogits returns [padded X,
  padded V] of dtype `output`.
  per_token: vectors [X]: the target, counted from the heads' first entry (or outside them), then
  Scalars and cotangents as the kernel needs them.
  """
  V = inputs.policy_head_DV.shape[1]
  hidden, head = _as_bfloat16(inputs.policy_hidden_XD, inputs.policy_head_DV)
  teacher_hidden, teacher_head = _as_bfloat16(inputs.teacher_hidden_XE, inputs.teacher_head_EV)
  hidden, teacher_hidden = _pad(hidden, ROWS, DEPTH), _pad(teacher_hidden, ROWS, DEPTH)
  head, teacher_head = _pad(head, DEPTH, COLUMNS), _pad(teacher_head, DEPTH, COLUMNS)
  assert V < 2**24, V  # targets travel as float32
  vectors = _pad(jnp.stack([x.astype(jnp.float32) for x in per_token]), 1, ROWS)
  blocks, tiles = hidden.shape[0] // ROWS, head.shape[1] // COLUMNS
  parts = min(PARTS * max(GROUP // blocks, 1), tiles)
  launch = Launch(
    plan=plan,
    name=name,
    V=V,
    vectors=len(per_token),
    policy_steps=hidden.shape[1] // DEPTH,
    teacher_steps=teacher_hidden.shape[1] // DEPTH,
    blocks=blocks,
    group=min(GROUP, blocks),
    tiles=tiles,
    parts=parts,
    tiles_per_part=-(-tiles // parts),
  )
  if launch.is_dense:
    out_type = jax.ShapeDtypeStruct((hidden.shape[0], head.shape[1]), output)
    out_smem = plgpu.SMEM((2, HALF, COLUMNS), output, transforms=_swizzled(output))
  else:
    out_type = jax.ShapeDtypeStruct((parts, output, hidden.shape[0]), jnp.float32)
    out_smem = plgpu.SMEM((2, output, HALF), jnp.float32)
  run = _compiled(launch, out_type, out_smem)
  return run(hidden, head, teacher_hidden, teacher_head, vectors)


def _compiled(launch: Launch, out_type, out_smem):
  """Returns the kernel as a function of its five arrays."""

  def kernel(*refs):
    _kernel(launch, Refs(*refs))

  kernel.__name__ = f"distill_kl_{launch.name}"
  swizzled = _swizzled(jnp.bfloat16)
  scratch_types = [  # in the order of Refs
    plgpu.SMEM((STAGES, ROWS, DEPTH), jnp.bfloat16, transforms=swizzled),
    plgpu.SMEM((STAGES, DEPTH, COLUMNS), jnp.bfloat16, transforms=swizzled),
    plgpu.SMEM((launch.vectors, ROWS), jnp.float32),
    out_smem,
    plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    plgpu.Barrier(),
  ]
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(-(-launch.blocks // launch.group), launch.parts, launch.group),
    grid_names=("group", "part", "block"),
    num_threads=3,
    thread_name="warpgroup",
    interpret=launch.plan.interpret,
    scratch_types=scratch_types,
  )


def _swizzled(dtype):
  """Returns the layout in shared memory that TMA writes and wgmma reads: rows of 128 bytes."""
  return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _pad(x, rows, columns):
  """Appends zeros to x, up to multiples of rows and columns."""
  return jnp.pad(x, ((0, -x.shape[0] % rows), (0, -x.shape[1] % columns)))


def _as_bfloat16(hidden, head):
  """Returns operands in bfloat16 whose product is that of these ones.

  A float32 is the sum of three bfloat16 terms. Of the nine products of terms, the six largest stand
  along D.
  """
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


# ---- inside a kernel


def _kernel(launch: Launch, refs: Refs):
  """Runs one warpgroup: it either copies operands or multiplies them."""
  block = lax.axis_index("group") * launch.group + lax.axis_index("block")
  part, warpgroup = lax.axis_index("part"), lax.axis_index("warpgroup")
  first_tile = part * launch.tiles_per_part
  tiles = jnp.clip(launch.tiles - first_tile, 0, launch.tiles_per_part)
  place = Place(block, part, warpgroup, first_tile, tiles)

  @pl.when((warpgroup == COPYING_WARPGROUP) & (block < launch.blocks))
  def _():
    _copy_operands(launch, refs, place)

  @pl.when((warpgroup < COPYING_WARPGROUP) & (block < launch.blocks))
  def _():
    _consume_logits(launch, refs, place)


def _slot(step):
  """Returns which of the STAGES buffers a step uses."""
  return lax.rem(step, jnp.int32(STAGES))


def _copy_operands(launch: Launch, refs: Refs, place: Place):
  """Copies every pair of operand tiles to shared memory, at most STAGES ahead of the products."""
  plgpu.set_max_registers(40, action="decrease")
  own_tokens = pl.ds(place.block * ROWS, ROWS)
  plgpu.copy_gmem_to_smem(refs.vectors.at[:, own_tokens], refs.vectors_smem, refs.vectors_full)

  def fill(step, hidden, head, tile, k):
    slot = _slot(step)
    pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
    hidden_tile = hidden.at[pl.ds(place.block * ROWS, ROWS), pl.ds(k * DEPTH, DEPTH)]
    depths = pl.ds(k * DEPTH, DEPTH)
    head_tile = head.at[depths, pl.ds((place.first_tile + tile) * COLUMNS, COLUMNS)]
    plgpu.copy_gmem_to_smem(hidden_tile, refs.hidden_smem.at[slot], refs.full.at[slot])
    plgpu.copy_gmem_to_smem(head_tile, refs.head_smem.at[slot], refs.full.at[slot])

  @pl.loop(0, place.tiles)
  def _(tile):
    step = tile * launch.steps_per_tile

    @pl.loop(0, launch.policy_steps)
    def _(k):
      fill(step + k, refs.policy_hidden, refs.policy_head, tile, k)

    @pl.loop(0, launch.teacher_steps)
    def _(k):
      fill(step + launch.policy_steps + k, refs.teacher_hidden, refs.teacher_head, tile, k)

  # The last arrivals at `free` open no further copy, but no barrier may be left with one unseen.
  steps = place.tiles * launch.steps_per_tile

  @pl.loop(jnp.maximum(steps - STAGES, 0), steps)
  def _(step):
    plgpu.barrier_wait(refs.free.at[_slot(step)])


def _consume_logits(launch: Launch, refs: Refs, place: Place):
  """Makes the logits of 64 tokens tile by tile, and writes what the kernel is for."""
  plgpu.set_max_registers(232, action="increase")
  plgpu.barrier_wait(refs.vectors_full)

  def row(k):
    own_tokens = pl.ds(place.warpgroup * HALF, HALF)
    return _as_row(launch.plan, refs.vectors_smem[k, own_tokens])

  target = row(0).astype(jnp.int32)
  others = [row(k) for k in range(1, launch.vectors)]
  if launch.is_dense:
    _write_dlogits(launch, refs, place, target, others)
  else:
    _write_sums(launch, refs, place, target, others)
  plgpu.wait_smem_to_gmem(0)


def _write_dlogits(launch: Launch, refs: Refs, place: Place, target, others):
  """Writes dlogits tile by tile; others: the five Scalars, then the three cotangents."""
  scalars = dm.Scalars(*map(_spread, others[:5]))
  cotangents = dm.Cotangents(*map(_spread, others[5:]))
  out_smem = refs.out_smem.at[place.warpgroup]

  @pl.loop(0, place.tiles)
  def _(tile):
    s, t, is_target = _tile_logits(launch, refs, place, target, tile)
    d = dm.dlogits(s, t, is_target, scalars, cotangents, launch.plan.alpha)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left the buffer
    refs.out_smem[place.warpgroup] = d.astype(refs.out_smem.dtype)
    plgpu.commit_smem()
    own_tokens = pl.ds(place.block * ROWS + place.warpgroup * HALF, HALF)
    own_entries = pl.ds((place.first_tile + tile) * COLUMNS, COLUMNS)
    plgpu.copy_smem_to_gmem(out_smem, refs.out.at[own_tokens, own_entries])


def _write_sums(launch: Launch, refs: Refs, place: Place, target, others):
  """Writes a part's sums: dm.Stats, or those of the mixture form from the Scalars in others."""
  alpha = launch.plan.alpha
  zero = target.astype(jnp.float32) * 0  # in the layout of a row
  if launch.name == "statistics":
    lowest = zero + dm.NEG
    sums = dm.Stats(lowest, lowest, *[zero] * 6)

    def add(tile, sums):
      s, t, is_target = _tile_logits(launch, refs, place, target, tile)
      return dm.add_block(sums, s, t, is_target, alpha, FOLD)
  else:
    sums, scalars = (zero, zero), dm.Scalars(*map(_spread, others))

    def add(tile, sums):
      s, t, _ = _tile_logits(launch, refs, place, target, tile)
      return tuple(map(jnp.add, sums, dm.mixture_sums(s, t, scalars, alpha, FOLD)))

  for k, total in enumerate(lax.fori_loop(0, place.tiles, add, sums)):
    refs.out_smem[place.warpgroup, k] = total
  plgpu.commit_smem()
  own_tokens = pl.ds(place.block * ROWS + place.warpgroup * HALF, HALF)
  plgpu.copy_smem_to_gmem(refs.out_smem.at[place.warpgroup], refs.out.at[place.part, :, own_tokens])


def _tile_logits(launch: Launch, refs: Refs, place: Place, target, tile):
  """Returns (s, t, is_target), each [HALF, COLUMNS], of a tile of the vocabulary."""
  step = tile * launch.steps_per_tile
  s = _logits(launch, refs, place, step, launch.policy_steps)
  t = _logits(launch, refs, place, step + launch.policy_steps, launch.teacher_steps)
  entry = _iota(launch.plan, (HALF, COLUMNS), 1)
  start = (place.first_tile + tile) * COLUMNS
  if not launch.is_dense and launch.V % COLUMNS:  # padded dlogits are cut off instead
    exists = entry < launch.V - start
    s, t = jnp.where(exists, s, dm.NEG), jnp.where(exists, t, dm.NEG)
  return s, t, entry == _spread(target - start)


def _logits(launch: Launch, refs: Refs, place: Place, first_step, steps):
  """Returns one side's logits [HALF, COLUMNS], summed over the operand tiles of these steps."""

  def multiply(accumulator):
    def add_product(k, _):
      slot = _slot(first_step + k)
      plgpu.barrier_wait(refs.full.at[slot])
      own_tokens = refs.hidden_smem.at[slot, pl.ds(place.warpgroup * HALF, HALF)]
      plgpu.wgmma(accumulator, own_tokens, refs.head_smem.at[slot])
      plgpu.wgmma_wait(1)  # the product before this one has ended: its tiles may go
      pl.when(k > 0)(lambda: plgpu.barrier_arrive(refs.free.at[_slot(first_step + k - 1)]))

    lax.fori_loop(0, steps, add_product, None)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(refs.free.at[_slot(first_step + steps - 1)])
    return accumulator[...]

  logits = pl.run_scoped(multiply, plgpu.ACC((HALF, COLUMNS), jnp.float32))
  return logits if launch.plan.temperature == 1 else logits / launch.plan.temperature


def _spread(row):
  return FOLD.spread(row, COLUMNS)


def _as_row(plan, row):
  """Casts a vector to the layout that wgmma's result has after a reduction along its rows."""
  if plan.interpret:  # the interpreter knows no layouts
    return row
  return plgpu.layout_cast(row, plgpu.Layout.WGMMA.reduce(1))


def _iota(plan, shape, dimension):
  """Returns int32 indices along a dimension, in the layout of wgmma's result."""
  if plan.interpret:
    return lax.broadcasted_iota(jnp.int32, shape, dimension)
  return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)
