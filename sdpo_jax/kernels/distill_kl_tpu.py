"""Divergence between teacher and policy on TPU: Pallas (Mosaic) kernels in which logits live in VMEM only.

Same contract as distill_kl_ref.py. Every kernel walks tiles of tokens x vocabulary, makes the float32 logits of both
sides there, and differs only in what it does with them:

  statistics   running sums of each of 128 lanes; the lanes are added at the very end
  mixture      the two sums of the mixture form, once both normalisers are known (0 < alpha < 1 only)
  dlogits      the gradient with respect to the policy's logits, rounded to the inputs' dtype

The first two write a few numbers a token. The last writes a bounded workspace, WORKSPACE_BYTES for all tokens and a
stretch of the vocabulary, from which XLA's own matrix products make the gradients: a stretch's part of the head's
gradient is complete at once, so only that of the hidden states is carried along in float32.
In units of 2 X D V operations: forward 2 (mixture 4), backward 4. weights_X brings nothing here.

Inside a tile the products of one sub-tile run on the matrix unit while the vector unit works on the sub-tile before. The
compiler's schedule keeps the matrix unit 63 to 78 % busy on v6e at a width of 1024 and 84 to 92 % at 4096, at least 90 % on v5p
and v5e, for both KLs and the JSD (tests/distill_kl_tpu_baseline.json; waiting for memory is not in these figures). The vocabulary's ragged tail is masked in the last tile only; rows past the last token compute garbage that is never written.

Numerics: as distill_kl_xla.py. Off TPU the kernels run in interpret mode.
Heads are read as [D, V]: a transposed view of a [V, D] embedding costs one copy of it.
"""

import sys
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels.distill_kl_sweeps import distill
from sdpo_jax.kernels.distill_kl_xla import gradient_products, over_blocks

WORKSPACE_BYTES = 640 * 2**20  # dlogits: 40,960 entries of the vocabulary at X = 8192 in bfloat16
VMEM_BYTES = 60 * 2**20  # what a kernel may use; v5p has 64 MB, v5e and v6e twice that
TILES = (
  (1024, 1024, 512),
  (1024, 512, 512),
  (512, 512, 512),
  (512, 256, 256),
  (256, 256, 256),
  (256, 128, 128),
  # tokens, entries of the vocabulary, entries of a sub-tile; the first that fits
  (128, 128, 128),
)


class Plan(NamedTuple):
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
):
  arrays = student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV
  plan = make_plan(*[jax.typeof(a) for a in arrays], alpha, temperature, interpret)
  return distill(sys.modules[__name__], plan, None, *arrays, target_X)


def make_plan(h, w, g, u, alpha, temperature, interpret=True):
  """Tiles for arrays of these shapes and dtypes, as one device sees them."""
  assert all(a.dtype in (jnp.float32, jnp.bfloat16) for a in (h, w, g, u)), (
    h.dtype,
    w.dtype,
    g.dtype,
    u.dtype,
  )
  (X, D), (E, V) = h.shape, u.shape
  item = max(a.dtype.itemsize for a in (h, w, g, u))
  # Many tokens in a tile: the heads are read from memory once for each of them. Long tiles: less
  # waiting at their ends.
  rows, columns, sub = next(
    t for t in TILES if _vmem_bytes(*t, D + E, item) <= 0.95 * VMEM_BYTES or t == TILES[-1]
  )
  sub = min(sub, -(-V // 128) * 128)
  return Plan(
    alpha,
    temperature,
    min(rows, -(-X // 16) * 16),
    min(columns, -(-V // sub) * sub),
    sub,
    interpret,
  )


def _vmem_bytes(rows, columns, sub, width, item):
  # two buffers of hidden states and heads; width: both sides'
  inputs = 2 * item * width * (rows + columns)
  logits = 4 * 4 * rows * sub  # two sub-tiles of both sides
  return inputs + logits + 2 * 4 * rows * max(8 * 128, columns)


# ---- the three parts that distill_kl_sweeps.py asks for
# -------------------------------------------------------------


def statistics(plan, h, w, g, u, target):
  return dm.add_lanes(dm.Stats(*_statistics(plan, h, w, g, u, target)), plan.alpha)


def mixture_sums(plan, h, w, g, u, scalars):
  return tuple(map(dm.ROWS.sum, _mixture(plan, h, w, g, u, jnp.concatenate(scalars, axis=1))))


def gradients(plan, h, w, g, u, target, scalars, cotangents, dtype):
  columns_X8 = jnp.concatenate([*scalars, *cotangents], axis=1)
  dlogits_dtype = jnp.promote_types(h.dtype, w.dtype)
  X, V = h.shape[0], w.shape[1]
  size = max(
    WORKSPACE_BYTES // (X * dlogits_dtype.itemsize) // plan.columns * plan.columns, plan.columns
  )

  def body(start, size, carry):
    dh, dw = carry
    hidden, dh, dw = lax.optimization_barrier((h, dh, dw))  # one workspace at a time
    d = _dlogits(plan, hidden, w, g, u, target, columns_X8, start, size, dlogits_dtype)
    dh_part, dw_part = gradient_products(
      plan, d, h, lax.dynamic_slice_in_dim(w, start, size, axis=1), jnp.float32
    )
    return dh + dh_part, lax.dynamic_update_slice_in_dim(dw, dw_part.astype(dtype), start, 1)

  return over_blocks(V, size, body, (jnp.zeros(h.shape, jnp.float32), jnp.zeros(w.shape, dtype)))


# ---- kernels -------------------------------------------------------------------------------------
# -----------------


def _statistics(plan, h, w, g, u, target):
  """Stats, each [X, 128]: the running numbers of each lane."""
  V = w.shape[1]

  def kernel(first_ref, h_ref, w_ref, g_ref, u_ref, target_ref, *out):
    del first_ref
    tile, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(tile == 0)
    def _():
      for k, ref in enumerate(out):
        ref[...] = jnp.full(ref.shape, dm.NEG if k < 2 else 0, jnp.float32)

    def consume(masked, column, s, t):
      lane = lax.broadcasted_iota(jnp.int32, s.shape, 1)
      start = tile * plan.columns + column
      if masked:
        exists = lane < V - start
        s, t = jnp.where(exists, s, dm.NEG), jnp.where(exists, t, dm.NEG)
      stats = dm.Stats(*[ref[...] for ref in out])
      stats = dm.add_block(stats, s, t, lane == target_ref[...] - start, plan.alpha, dm.LANES)
      for ref, value in zip(out, stats):
        ref[...] = value

    _tiles(plan, V, tile == last, (h_ref, w_ref, g_ref, u_ref), consume)

  return _call(plan, kernel, "statistics", (h, w, g, u), (target[:, None],), _sums(h, 8))


def _mixture(plan, h, w, g, u, scalars_X5):
  """This side's and the other's part of the mixture form, each [X, 128]."""
  V = w.shape[1]

  def kernel(first_ref, h_ref, w_ref, g_ref, u_ref, scalars_ref, *out):
    del first_ref
    tile, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(tile == 0)
    def _():
      for ref in out:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def consume(masked, column, s, t):
      if masked:  # equal, hopeless logits on both sides add exactly nothing
        exists = lax.broadcasted_iota(jnp.int32, s.shape, 1) < V - tile * plan.columns - column
        s, t = jnp.where(exists, s, dm.NEG), jnp.where(exists, t, dm.NEG)
      for ref, part in zip(out, dm.mixture_sums(s, t, _scalars(scalars_ref), plan.alpha, dm.LANES)):
        ref[...] += part

    _tiles(plan, V, tile == last, (h_ref, w_ref, g_ref, u_ref), consume)

  return _call(plan, kernel, "mixture", (h, w, g, u), (scalars_X5,), _sums(h, 2))


def _dlogits(plan, h, w, g, u, target, columns_X8, start, size, dtype):
  """[X, size]: the gradient with respect to the policy's logits from entry `start` on, a multiple of a tile."""

  def kernel(first_ref, h_ref, w_ref, g_ref, u_ref, target_ref, columns_ref, out_ref):
    tile = first_ref[0] + pl.program_id(1)

    def consume(masked, column, s, t):
      del masked  # what stands past the vocabulary's end is never written
      lane = lax.broadcasted_iota(jnp.int32, s.shape, 1)
      hit = lane == target_ref[...] - (tile * plan.columns + column)
      cotangents = tuple(columns_ref[:, k : k + 1] for k in (5, 6, 7))
      d = dm.dlogits(s, t, hit, _scalars(columns_ref), cotangents, plan.alpha)
      out_ref[:, column : column + plan.sub] = d.astype(dtype)

    _tiles(plan, None, None, (h_ref, w_ref, g_ref, u_ref), consume)

  return _call(
    plan,
    kernel,
    "dlogits",
    (h, w, g, u),
    (target[:, None], columns_X8),
    jax.ShapeDtypeStruct((h.shape[0], size), dtype),
    start // plan.columns,
  )


def _sums(h, count):
  return [jax.ShapeDtypeStruct((h.shape[0], 128), jnp.float32)] * count


def _scalars(ref):
  return dm.Scalars(*[ref[:, k : k + 1] for k in range(5)])


def _tiles(plan, V, is_last, refs, consume):
  """Calls consume(masked, column, s, t) for every sub-tile of this tile, the next one's products before it."""
  h_ref, w_ref, g_ref, u_ref = refs

  def products(column):
    def logits(hidden, head):
      precision = lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
      product = jnp.dot(
        hidden[...],
        head[:, column : column + plan.sub],
        precision=precision,
        preferred_element_type=jnp.float32,
      )
      return product if plan.temperature == 1 else product / plan.temperature

    return logits(h_ref, w_ref), logits(g_ref, u_ref)

  def whole(masked):
    following = products(0)
    for column in range(0, plan.columns, plan.sub):
      current = following
      if column + plan.sub < plan.columns:
        following = products(column + plan.sub)
      consume(masked, column, *current)

  if V is None or V % plan.columns == 0:
    whole(False)
  else:
    pl.when(is_last)(lambda: whole(True))
    pl.when(jnp.logical_not(is_last))(lambda: whole(False))


def _call(plan, kernel, name, arrays, per_token, out_shape, first=0):
  """Runs a kernel over tiles; out_shape: arrays [X, 128], summed over all tiles, or one [X, C] from tile `first` on."""
  h, w, g, u = arrays
  (X, D), (E, V) = h.shape, u.shape
  dtypes = jnp.promote_types(h.dtype, w.dtype), jnp.promote_types(g.dtype, u.dtype)
  arrays = h.astype(dtypes[0]), w.astype(dtypes[0]), g.astype(dtypes[1]), u.astype(dtypes[1])
  rows, columns = plan.rows, plan.columns
  of_tokens = lambda width: pl.BlockSpec((rows, width), lambda x, v, first: (x, 0))
  of_vocabulary = lambda width: pl.BlockSpec(
    (width, columns), lambda x, v, first: (0, first[0] + v)
  )
  if isinstance(out_shape, list):
    C, out_specs = V, [of_tokens(128)] * len(out_shape)
  else:
    C, out_specs = out_shape.shape[1], pl.BlockSpec((rows, columns), lambda x, v, first: (x, v))
  grid_spec = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1,
    grid=(pl.cdiv(X, rows), pl.cdiv(C, columns)),
    out_specs=out_specs,
    in_specs=[of_tokens(D), of_vocabulary(D), of_tokens(E), of_vocabulary(E)]
    + [of_tokens(a.shape[1]) for a in per_token],
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

  first = jnp.asarray(first, jnp.int32)[None]
  return lax.platform_dependent(
    first, *arrays, *per_token, tpu=call(False), default=call(plan.interpret)
  )
