"""Divergence between teacher and policy without X x V logits, in plain XLA operations with an own gradient.

Same contract as distill_kl_ref.py. Three plans, chosen from the sizes:

  one         X * V small; on CPU also where the logits of one are at most 256 MB, or those of both no larger than four output matrices (X <= 2 D):
              all at once, kept for the gradient.
              4 matrix products, as few as there can be.
  tokens      blocks of tokens over the whole vocabulary: 2 products forward, 4 backward; or, with weights_X,
              gradients in the forward pass: 4 in all. Memory: logits of one block, float32 gradient of the head.
  vocabulary  blocks of the vocabulary over all tokens: least memory. 2 products forward (4 for the mixture form,
              which must know both normalisers first), 4 backward.

One product is 2 X D V operations. weights_X promises that the cotangent of divergence_X will be c * weights_X
for some scalar c. The plan `tokens` then uses the gradient that it made in the forward pass, unless log-probability
or entropy are differentiated too; a broken promise makes every gradient NaN rather than wrong.

Numerics: logits, sums and the head's gradient are float32 whatever the input dtype (float64 for float64); only
dlogits is cast to the inputs' dtype, just before the two gradient products. float32 inputs multiply at the highest
precision. With bfloat16 logits the gradient would be off by 30 to 250 % where teacher and policy are close, which
is where training spends its time; bfloat16 inputs with float32 logits stay within 5e-3.

A head that is a transposed view of a [V, D] embedding costs nothing on TPU and GPU, where the loop takes either
layout, and in plan `one`; on CPU the other plans make one copy of it.
Targets must lie in [0, V).
"""

import functools
import sys
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels.distill_kl_ref import DistillKL
from sdpo_jax.kernels.distill_kl_sweeps import distill
from sdpo_jax.kernels.target import target_platform

# X * V up to here: plan `one`, 16 MB for each of the two logit arrays kept
ONE_BLOCK_ENTRIES = 2**22


# the same on CPU, where two to four more products cost more than 256 MB are worth
CPU_ONE_BLOCK_ENTRIES = 2**26


BLOCK_ENTRIES = 2**27  # logits in any other block: 512 MB for each of the two arrays


CPU_BLOCK_ENTRIES = 2**21  # logits in a block of the vocabulary on CPU: 8 MB, near the caches


class Plan(NamedTuple):
  alpha: float
  temperature: float
  size: int  # tokens, or entries of the vocabulary, in a block


def distill_kl(
  student_hidden_XD,
  student_head_DV,
  teacher_hidden_XE,
  teacher_head_EV,
  target_X,
  *,
  alpha,
  temperature,
  weights_X=None,
  blocks=None,
):
  """blocks: force a plan; None chooses."""
  X, V = target_X.shape[0], student_head_DV.shape[1]
  on_cpu = target_platform() == "cpu"
  if blocks is None:
    few = X * V <= (CPU_ONE_BLOCK_ENTRIES if on_cpu else ONE_BLOCK_ENTRIES) or (
      on_cpu and X <= 2 * student_head_DV.shape[0]
    )
    blocks = "one" if few else "vocabulary" if on_cpu else "tokens"
  arrays = student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X
  if blocks == "vocabulary":
    return distill(sys.modules[__name__], vocabulary_plan(X, alpha, temperature), None, *arrays)
  size = X if blocks == "one" else max(BLOCK_ENTRIES // V // 8 * 8, 8)
  return _distill(Plan(alpha, temperature, size), blocks == "one", *arrays, weights_X)


def vocabulary_plan(X, alpha, temperature):
  entries = CPU_BLOCK_ENTRIES if target_platform() == "cpu" else BLOCK_ENTRIES
  return Plan(alpha, temperature, max(entries // max(X, 1) // 128 * 128, 128))


# ---- all logits at once, and blocks of tokens
# -----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _distill(plan, keep_logits, h, w, g, u, target, weights):
  del keep_logits
  return _forward_tokens(plan, False, h, w, g, u, target, weights)[0]


def _forward_rule(plan, keep_logits, *args):
  h, w, g, u, target, weights = args = [None if a is None else a.value for a in args]
  if keep_logits:
    out, *residuals = _whole_vocabulary(plan, h, w, g, u, target)
  else:
    out, residuals = _forward_tokens(plan, weights is not None, *args)
  return out, (args, residuals)


def _backward_rule(plan, keep_logits, saved, cotangents):
  (h, w, g, u, target, weights), residuals = saved
  dtype = logit_dtype(h, w, g, u)
  is_zero = lambda c: isinstance(c, jax.custom_derivatives.SymbolicZero)
  used = cotangents.divergence_X, cotangents.logp_X, cotangents.entropy_X
  columns = tuple(
    jnp.zeros((target.shape[0], 1), dtype) if is_zero(c) else c.astype(dtype)[:, None] for c in used
  )
  if keep_logits:
    scalars, s, t = residuals
    d = dm.dlogits(s, t, hit(target, 0, s.shape[1]), scalars, columns, plan.alpha)
    dh, dw = gradient_products(plan, d, h, w, dtype)
  elif weights is not None and is_zero(cotangents.logp_X) and is_zero(cotangents.entropy_X):
    scale = _promised_scale(columns[0][:, 0], weights.astype(dtype))
    dh, dw = (x * scale for x in residuals)
  else:
    dh, dw = _backward_tokens(plan, h, w, g, u, target, columns)
  return dh.astype(h.dtype), dw.astype(w.dtype), None, None, None, None


_distill.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _promised_scale(cotangent, weights):
  """The scalar c of cotangent = c * weights; NaN where there is none."""
  scale = jnp.sum(weights * cotangent) / jnp.maximum(
    jnp.sum(weights * weights), jnp.finfo(weights.dtype).tiny
  )
  kept = jnp.all(jnp.abs(cotangent - scale * weights) <= 1e-3 * jnp.max(jnp.abs(cotangent)))
  return jnp.where(kept, scale, jnp.nan)


def _forward_tokens(plan, make_gradients, h, w, g, u, target, weights):
  """(DistillKL, (dh, dw) for cotangent weights_X if make_gradients, else ())."""
  dtype = logit_dtype(h, w, g, u)
  X = target.shape[0]

  def body(start, size, carry):
    out, grads = carry
    cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
    put = lambda x, part: lax.dynamic_update_slice_in_dim(x, part, start, 0)
    part, scalars, s, t = _whole_vocabulary(plan, cut(h), w, cut(g), u, cut(target))
    if make_gradients:
      zero = jnp.zeros((size, 1), dtype)
      columns = cut(weights).astype(dtype)[:, None], zero, zero
      d = dm.dlogits(s, t, hit(cut(target), 0, w.shape[1]), scalars, columns, plan.alpha)
      dh, dw = gradient_products(plan, d, cut(h), w, dtype)
      grads = put(grads[0], dh), grads[1] + dw
    return DistillKL(*map(put, out, part)), grads

  grads = (jnp.zeros(h.shape, dtype), jnp.zeros(w.shape, dtype)) if make_gradients else ()
  return over_blocks(X, plan.size, body, (DistillKL(*[jnp.zeros(X, dtype)] * 4), grads))


def _backward_tokens(plan, h, w, g, u, target, columns):
  dtype = columns[0].dtype

  def body(start, size, carry):
    cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
    _, scalars, s, t = _whole_vocabulary(plan, cut(h), w, cut(g), u, cut(target))
    d = dm.dlogits(
      s, t, hit(cut(target), 0, w.shape[1]), scalars, tuple(map(cut, columns)), plan.alpha
    )
    dh, dw = gradient_products(plan, d, cut(h), w, dtype)
    return lax.dynamic_update_slice_in_dim(carry[0], dh, start, 0), carry[1] + dw

  return over_blocks(
    target.shape[0], plan.size, body, (jnp.zeros(h.shape, dtype), jnp.zeros(w.shape, dtype))
  )


# ---- pieces --------------------------------------------------------------------------------------
# -----------------


def logit_dtype(*arrays):
  return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def product(a, b, contract, dtype):
  """a . b over axes `contract`, accumulated in dtype; float32 operands are not rounded to anything shorter."""
  operand = jnp.promote_types(a.dtype, b.dtype)
  precision = lax.Precision.HIGHEST if operand == jnp.float32 else None
  return lax.dot_general(
    a.astype(operand),
    b.astype(operand),
    ((contract[:1], contract[1:]), ((), ())),
    precision=precision,
    preferred_element_type=dtype,
  )


def logits(plan, hidden, head, dtype):
  logits = product(hidden, head, (1, 0), dtype)
  return logits if plan.temperature == 1 else logits / plan.temperature


def gradient_products(plan, d, h, w, dtype):
  """(dh, dw), accumulated in dtype, of dlogits d. Only here does dlogits take the inputs' dtype."""
  d = (d if plan.temperature == 1 else d / plan.temperature).astype(
    jnp.promote_types(h.dtype, w.dtype)
  )
  return product(d, w, (1, 1), dtype), product(h, d, (0, 0), dtype)


def hit(target, start, size):
  return target[:, None] == start + lax.broadcasted_iota(target.dtype, (1, size), 1)


def over_blocks(total, size, body, carry):
  """carry = body(start, size, carry) for consecutive blocks; the last one may be shorter, so nothing is masked."""
  whole, rest = divmod(total, size)
  if whole:
    carry = lax.fori_loop(0, whole, lambda i, c: body(i * size, size, c), carry)
  return body(whole * size, rest, carry) if rest else carry


def _whole_vocabulary(plan, h, w, g, u, target):
  """(DistillKL, Scalars, s, t) of some tokens, with their logits over the whole vocabulary."""
  dtype = logit_dtype(h, w, g, u)
  s, t = logits(plan, h, w, dtype), logits(plan, g, u, dtype)
  stats = dm.add_block(
    dm.empty_stats(target.shape[0], dtype), s, t, hit(target, 0, s.shape[1]), plan.alpha
  )
  divergence, logp, logp_teacher, scalars = dm.finish(stats, plan.alpha)
  if dm.is_mixture(plan.alpha):
    divergence, scalars = dm.with_mixture(
      dm.mixture_sums(s, t, scalars, plan.alpha), scalars, plan.alpha
    )
  return (
    DistillKL(divergence[:, 0], logp[:, 0], logp_teacher[:, 0], scalars.entropy[:, 0]),
    scalars,
    s,
    t,
  )


# ---- blocks of the vocabulary: the three parts that distill_kl_sweeps.py asks for
# -----------------------------------


def block_logits(plan, h, w, g, u, start, size):
  dtype = logit_dtype(h, w, g, u)
  cut = lambda head: lax.dynamic_slice_in_dim(head, start, size, axis=1)
  return logits(plan, h, cut(w), dtype), logits(plan, g, cut(u), dtype)


def statistics(plan, h, w, g, u, target):
  def body(start, size, stats):
    s, t = block_logits(plan, h, w, g, u, start, size)
    return dm.add_block(stats, s, t, hit(target, start, size), plan.alpha)

  return over_blocks(
    w.shape[1], plan.size, body, dm.empty_stats(h.shape[0], logit_dtype(h, w, g, u))
  )


def mixture_sums(plan, h, w, g, u, scalars):
  def body(start, size, sums):
    s, t = block_logits(plan, h, w, g, u, start, size)
    return jax.tree.map(jnp.add, sums, dm.mixture_sums(s, t, scalars, plan.alpha))

  zero = jnp.zeros_like(scalars.entropy)
  return over_blocks(w.shape[1], plan.size, body, (zero, zero))


def gradients(plan, h, w, g, u, target, scalars, cotangents, dtype):
  logit = scalars.entropy.dtype

  def body(start, size, carry):
    dh, dw = carry
    s, t = block_logits(plan, h, w, g, u, start, size)
    d = dm.dlogits(s, t, hit(target, start, size), scalars, cotangents, plan.alpha)
    dh_part, dw_part = gradient_products(
      plan, d, h, lax.dynamic_slice_in_dim(w, start, size, axis=1), logit
    )
    # Each column of dw is complete at once, so it can be stored in the head's own dtype.
    return dh + dh_part, lax.dynamic_update_slice_in_dim(dw, dw_part.astype(dtype), start, 1)

  return over_blocks(
    w.shape[1], plan.size, body, (jnp.zeros(h.shape, logit), jnp.zeros(w.shape, dtype))
  )
