"""Computes the divergence on TPU, in Pallas (Mosaic) kernels whose logits live in VMEM only.

The contract is that of distill_kl_ref.py, and the algebra is distill_kl_math.py. Three kernels make
the float32 logits of both sides, tile by tile, and differ in what they do with a tile:

  statistics   adds it to running sums
  mixture      adds it to the two sums of the mixture form, once both normalisers are known
               (0 < alpha < 1 only)
  dlogits      turns it into the gradient with respect to the policy's logits, rounded to the
               inputs' dtype, and writes that out

Tiling. The grid is (tiles of tokens, tiles of the vocabulary), the vocabulary innermost. So a tile
of tokens keeps its hidden states, policy [rows, D] and teacher [rows, E], in VMEM. Meanwhile the
heads stream by, [D, columns] and [E, columns] at a time, double-buffered. The heads are read from
memory once for each tile of tokens, and a bfloat16 head yields `rows` operations per byte read.
Hence many rows come first when make_plan chooses a tile; long tiles come second, because each tile
waits at its ends. Tiles of tokens are independent, and a chip with two cores splits them.

Inside a tile. The matrix unit makes logits and the vector unit consumes them. A tile is therefore
cut into sub-tiles, and the code orders the products of one before the vector work on its
predecessor. The compiler's static schedule overlaps the two units only within one basic block. So
the loop over sub-tiles is unrolled, without conditions. The vocabulary's ragged tail is masked in a
second copy of that code, which only the last tile runs. Rows past the last token compute garbage
that is never written.

Running sums keep the 128 lanes apart, as [rows, 128]. Adding a sub-tile is then elementwise work;
the reduction across lanes, which is slow, is done once at the very end by XLA.

Why dlogits go through memory. The head's gradient sums over tokens and the hidden states' gradient
over the vocabulary. No order of the grid completes both in VMEM: one of them would be read and
written in float32 for every tile, and two kernels would make the logits twice. Instead `dlogits`
fills a bounded workspace of WORKSPACE_BYTES: all tokens by a stretch of the vocabulary. XLA's own
matrix products make the gradients from it. A stretch's part of the head's gradient is complete at
once, so only that of the hidden states is carried along, in float32.

Cost, in units of 2 X D V operations: forward 2 (mixture form 4), backward 4. weights_X brings
nothing here. The compiler's schedule keeps the matrix unit 63 to 78 % busy on v6e at a width of
1024, and 84 to 92 % at 4096. On v5p and v5e it is at least 90 %. This holds for both KLs and the
JSD (tests/distill_kl_tpu_baseline.json); waiting for memory is not in these figures.

Numerics: as distill_kl_xla.py. Off TPU the kernels run in interpret mode.
Heads are read as [D, V]: a transposed view of a [V, D] embedding costs one copy of it.
"""

import functools
import sys
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels.distill_kl_ref import DistillKL
from sdpo_jax.kernels.distill_kl_sweeps import Inputs, Layout, distill
from sdpo_jax.kernels.distill_kl_xla import add_gradients, gradient_products, over_blocks

LANE_COUNT = 128
WORKSPACE_BYTES = 640 * 2**20  # dlogits: 40,960 entries of the vocabulary at X = 8192 in bfloat16
VMEM_BYTES = 60 * 2**20  # what a kernel may use; v5p has 64 MB, v5e and v6e twice that
# Tokens, entries of the vocabulary, and entries of a sub-tile; the first that fits is taken.
TILES = (
  (1024, 1024, 512),
  (1024, 512, 512),
  (512, 512, 512),
  (512, 256, 256),
  (256, 256, 256),
  (256, 128, 128),
  (128, 128, 128),
)


class Plan(NamedTuple):
  """Holds what is fixed while tracing."""

  alpha: float
  temperature: float
  rows: int  # tokens in a tile
  columns: int  # entries of the vocabulary in a tile
  sub: int  # entries in a sub-tile
  interpret: object  # False | True | pltpu.InterpretParams: for every platform but TPU


def distill_kl(
  student_hidden_XD,
  student_head_DV,
  teacher_hidden_XE,
  teacher_head_EV,
  target_X,
  *,
  alpha,
  temperature,
  interpret=True,
) -> DistillKL:
  """Computes the divergence on one device. interpret: how, on every platform but TPU."""
  inputs = Inputs(student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X)
  X, V = target_X.shape[0], student_head_DV.shape[1]
  plan = make_plan(inputs, X, V, alpha, temperature, interpret)
  return distill(sys.modules[__name__], plan, Layout(), inputs)


def make_plan(inputs: Inputs, X, V, alpha, temperature, interpret=True) -> Plan:
  """Chooses the tiles for one device's X tokens and V entries, in the inputs' widths and dtypes."""
  dtypes = [x.dtype for x in inputs.matrices]
  assert all(dtype in (jnp.float32, jnp.bfloat16) for dtype in dtypes), dtypes
  width = inputs.policy_hidden_XD.shape[1] + inputs.teacher_hidden_XE.shape[1]
  itemsize = max(dtype.itemsize for dtype in dtypes)
  fitting = [t for t in TILES if _vmem_bytes(*t, width, itemsize) <= 0.95 * VMEM_BYTES]
  rows, columns, sub = fitting[0] if fitting else TILES[-1]
  # A small problem needs no more than it has: whole registers of tokens, whole lanes of entries.
  sub = min(sub, _round_up(V, LANE_COUNT))
  rows = min(rows, _round_up(X, 16))
  columns = min(columns, _round_up(V, sub))
  return Plan(alpha, temperature, rows, columns, sub, interpret)


def _round_up(n, multiple):
  return -(-n // multiple) * multiple


def _vmem_bytes(rows, columns, sub, width, itemsize):
  """Returns an upper bound of a kernel's VMEM. width: D + E."""
  inputs = 2 * itemsize * width * (rows + columns)  # two buffers of hidden states and heads
  logits = 4 * 4 * rows * sub  # float32, two sub-tiles of both sides
  # Two buffers of what goes out: eight running sums, or a tile of dlogits.
  outputs = 2 * 4 * rows * max(8 * LANE_COUNT, columns)
  return inputs + logits + outputs


# ---- the three functions that distill_kl_sweeps.py asks of an implementation


def statistics(plan, inputs: Inputs) -> dm.Stats:
  """Returns the Stats of every token over this vocabulary."""
  X, V = inputs.target_X.shape[0], inputs.policy_head_DV.shape[1]
  kernel = functools.partial(_statistics_kernel, plan, V)
  per_token = (inputs.target_X[:, None],)
  lanes = _call(plan, kernel, "statistics", inputs, per_token, _running_sums(X, 8))
  return dm.add_lanes(dm.Stats(*lanes), plan.alpha)


def mixture_sums(plan, inputs: Inputs, scalars: dm.Scalars):
  """Returns this vocabulary's part of KL(pi || m) and of KL(q || m)."""
  X, V = inputs.target_X.shape[0], inputs.policy_head_DV.shape[1]
  kernel = functools.partial(_mixture_kernel, plan, V)
  per_token = (jnp.concatenate(scalars, axis=1),)
  lanes = _call(plan, kernel, "mixture", inputs, per_token, _running_sums(X, 2))
  return tuple(map(dm.ROWS.sum, lanes))


def gradients(plan, inputs: Inputs, scalars: dm.Scalars, cotangents: dm.Cotangents, head_dtype):
  """Returns the gradients of the policy's hidden states, in float32, and head, in head_dtype."""
  hidden_XD, head_DV = inputs.policy_hidden_XD, inputs.policy_head_DV
  columns_X8 = jnp.concatenate([*scalars, *cotangents], axis=1)
  dlogits_dtype = jnp.promote_types(hidden_XD.dtype, head_DV.dtype)
  X, V = hidden_XD.shape[0], head_DV.shape[1]
  entries = WORKSPACE_BYTES // (X * dlogits_dtype.itemsize)
  stretch = max(entries // plan.columns * plan.columns, plan.columns)

  def body(start, size, carry):
    # The barrier makes a stretch wait for the gradients of the one before: one workspace at a time.
    hidden, d_hidden_XD, d_head_DV = lax.optimization_barrier((hidden_XD, *carry))
    stretch_inputs = inputs._replace(policy_hidden_XD=hidden)
    dlogits = _dlogits(plan, stretch_inputs, columns_X8, start, size, dlogits_dtype)
    head = lax.dynamic_slice_in_dim(head_DV, start, size, axis=1)
    stretch_gradients = gradient_products(plan, dlogits, hidden_XD, head, jnp.float32)
    return add_gradients((d_hidden_XD, d_head_DV), stretch_gradients, start)

  zero = jnp.zeros(hidden_XD.shape, jnp.float32), jnp.zeros(head_DV.shape, head_dtype)
  return over_blocks(V, stretch, body, zero)


def _dlogits(plan, inputs: Inputs, columns_X8, start, size, dtype):
  """Returns dlogits [X, size] from entry `start` on, which is a multiple of a tile."""
  X = inputs.target_X.shape[0]
  kernel = functools.partial(_dlogits_kernel, plan)
  per_token = inputs.target_X[:, None], columns_X8
  out_shape = jax.ShapeDtypeStruct((X, size), dtype)
  return _call(plan, kernel, "dlogits", inputs, per_token, out_shape, start // plan.columns)


def _running_sums(X, count):
  return [jax.ShapeDtypeStruct((X, LANE_COUNT), jnp.float32)] * count


# ---- kernels. References: the number of the first tile (a prefetched scalar), the four matrices,
# what is known per token, and the outputs.


def _statistics_kernel(plan, V, first_ref, *refs):
  """Adds this tile to the eight running sums of dm.Stats, each [rows, 128]."""
  del first_ref
  matrix_refs, target_ref, sum_refs = refs[:4], refs[4], refs[5:]
  tile, last = pl.program_id(1), pl.num_programs(1) - 1

  @pl.when(tile == 0)
  def _():
    for ref, initial in zip(sum_refs, dm.Stats(dm.NEG, dm.NEG, *[0] * 6), strict=True):
      ref[...] = jnp.full(ref.shape, initial, jnp.float32)

  def consume(is_ragged, column, s, t):
    lane = lax.broadcasted_iota(jnp.int32, s.shape, 1)
    start = tile * plan.columns + column
    if is_ragged:
      exists = lane < V - start
      s, t = jnp.where(exists, s, dm.NEG), jnp.where(exists, t, dm.NEG)
    stats = dm.Stats(*[ref[...] for ref in sum_refs])
    is_target = lane == target_ref[...] - start
    stats = dm.add_block(stats, s, t, is_target, plan.alpha, dm.LANES)
    for ref, value in zip(sum_refs, stats, strict=True):
      ref[...] = value

  _for_sub_tiles(plan, V, tile == last, matrix_refs, consume)


def _mixture_kernel(plan, V, first_ref, *refs):
  """Adds this tile to the two running sums of the mixture form, each [rows, 128]."""
  del first_ref
  matrix_refs, scalars_ref, sum_refs = refs[:4], refs[4], refs[5:]
  tile, last = pl.program_id(1), pl.num_programs(1) - 1

  @pl.when(tile == 0)
  def _():
    for ref in sum_refs:
      ref[...] = jnp.zeros(ref.shape, jnp.float32)

  def consume(is_ragged, column, s, t):
    if is_ragged:  # equal, hopeless logits on both sides add exactly nothing
      exists = lax.broadcasted_iota(jnp.int32, s.shape, 1) < V - tile * plan.columns - column
      s, t = jnp.where(exists, s, dm.NEG), jnp.where(exists, t, dm.NEG)
    sums = dm.mixture_sums(s, t, _scalars(scalars_ref), plan.alpha, dm.LANES)
    for ref, value in zip(sum_refs, sums, strict=True):
      ref[...] += value

  _for_sub_tiles(plan, V, tile == last, matrix_refs, consume)


def _dlogits_kernel(plan, first_ref, *refs):
  """Writes this tile's dlogits. What stands past the vocabulary's end is never written."""
  *matrix_refs, target_ref, columns_ref, out_ref = refs
  tile = first_ref[0] + pl.program_id(1)

  def consume(is_ragged, column, s, t):
    del is_ragged
    lane = lax.broadcasted_iota(jnp.int32, s.shape, 1)
    is_target = lane == target_ref[...] - (tile * plan.columns + column)
    cotangents = dm.Cotangents(*[columns_ref[:, k : k + 1] for k in (5, 6, 7)])
    d = dm.dlogits(s, t, is_target, _scalars(columns_ref), cotangents, plan.alpha)
    out_ref[:, column : column + plan.sub] = d.astype(out_ref.dtype)

  _for_sub_tiles(plan, None, None, matrix_refs, consume)


def _scalars(ref) -> dm.Scalars:
  """Reads the Scalars from the first five columns."""
  return dm.Scalars(*[ref[:, k : k + 1] for k in range(5)])


def _for_sub_tiles(plan, V, is_last, matrix_refs, consume):
  """Calls consume(is_ragged, column, s, t) for every sub-tile, with its first column and logits.

  The next sub-tile's products stand before this one's `consume`, so that the schedule can overlap
  the matrix and the vector unit. V: the vocabulary's size, or None where its end needs no mask.
  """
  hidden_ref, head_ref, teacher_hidden_ref, teacher_head_ref = matrix_refs

  def logits(hidden, head, column):
    logits = jnp.dot(
      hidden[...],
      head[:, column : column + plan.sub],
      precision=lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32,
    )
    return logits if plan.temperature == 1 else logits / plan.temperature

  def both_logits(column):
    s = logits(hidden_ref, head_ref, column)
    return s, logits(teacher_hidden_ref, teacher_head_ref, column)

  def whole_tile(is_ragged):
    following = both_logits(0)
    for column in range(0, plan.columns, plan.sub):
      current = following
      if column + plan.sub < plan.columns:
        following = both_logits(column + plan.sub)
      consume(is_ragged, column, *current)

  if V is None or V % plan.columns == 0:
    whole_tile(False)
  else:
    pl.when(is_last)(lambda: whole_tile(True))
    pl.when(jnp.logical_not(is_last))(lambda: whole_tile(False))


def _call(plan, kernel, name, inputs: Inputs, per_token, out_shape, first_tile=0):
  """Runs a kernel over all tiles, from tile `first_tile` of the vocabulary on.

  per_token: arrays [X, columns] that the kernel gets beside the matrices.
  out_shape: a list of sums [X, 128] over the whole vocabulary, or one array [X, entries].
  """
  matrices = _same_dtype(*inputs.matrices[:2]) + _same_dtype(*inputs.matrices[2:])
  X, D = inputs.policy_hidden_XD.shape
  E, V = inputs.teacher_head_EV.shape

  def of_tokens(width):
    return pl.BlockSpec((plan.rows, width), lambda x, v, first: (x, 0))

  def of_vocabulary(width):
    return pl.BlockSpec((width, plan.columns), lambda x, v, first: (0, first[0] + v))

  if isinstance(out_shape, list):
    entries = V
    out_specs = [of_tokens(LANE_COUNT)] * len(out_shape)
  else:
    entries = out_shape.shape[1]
    out_specs = pl.BlockSpec((plan.rows, plan.columns), lambda x, v, first: (x, v))
  matrix_specs = [of_tokens(D), of_vocabulary(D), of_tokens(E), of_vocabulary(E)]
  grid_spec = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1,  # the stretch's first tile: it varies in a loop
    grid=(pl.cdiv(X, plan.rows), pl.cdiv(entries, plan.columns)),
    out_specs=out_specs,
    in_specs=matrix_specs + [of_tokens(x.shape[1]) for x in per_token],
  )

  def call(interpret):
    return pl.pallas_call(
      kernel,
      out_shape,
      grid_spec=grid_spec,
      interpret=interpret,
      name=f"distill_kl_{name}",
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
      ),
    )

  first = jnp.asarray(first_tile, jnp.int32)[None]
  return lax.platform_dependent(
    first, *matrices, *per_token, tpu=call(False), default=call(plan.interpret)
  )


def _same_dtype(hidden, head):
  dtype = jnp.promote_types(hidden.dtype, head.dtype)
  return hidden.astype(dtype), head.astype(dtype)
