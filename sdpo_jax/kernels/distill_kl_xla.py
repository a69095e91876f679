"""Divergence between teacher and policy without X x V logits, in plain XLA operations with an own gradient.

Same contract as distill_kl_ref.py. Three plans, chosen from the sizes:

  one         X * V small: all logits at once, kept for the gradient. 4 matrix products, as few as there can be.
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
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels.distill_kl_ref import DistillKL

ONE_BLOCK_ENTRIES = 2**22      # X * V up to here: plan `one`, 16 MB for each of the two logit arrays kept
TOKEN_BLOCK_ENTRIES = 2**27    # logits in a block of tokens: 512 MB for each of the two
VOCABULARY_BLOCK_ENTRIES = 2**21  # logits in a block of the vocabulary: 8 MB, near the caches


class Plan(NamedTuple):
  alpha: float
  temperature: float
  blocks: str   # "one" | "tokens" | "vocabulary"
  size: int     # tokens, or entries of the vocabulary, in a block


def distill_kl(student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X, *, alpha, temperature,
               weights_X=None, blocks=None):
  X, V = target_X.shape[0], student_head_DV.shape[1]
  if blocks is None:
    if X * V <= ONE_BLOCK_ENTRIES:
      blocks = "one"
    else:
      blocks = "vocabulary" if jax.default_backend() == "cpu" else "tokens"
  if blocks == "vocabulary":
    size = max(VOCABULARY_BLOCK_ENTRIES // max(X, 1) // 128 * 128, 128)
  else:
    size = max(TOKEN_BLOCK_ENTRIES // V // 8 * 8, 8)
  plan = Plan(alpha, temperature, blocks, size)
  return _distill(plan, student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X, weights_X)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distill(plan, *args):
  return _forward(plan, args)[0]


def _forward_rule(plan, *args):
  args = [None if a is None else a.value for a in args]
  out, residuals = _forward(plan, args, gradients=True)
  return out, (args, residuals)


def _forward(plan, args, gradients=False):
  """(DistillKL, what the backward rule wants to keep beside the arguments)."""
  if plan.blocks == "vocabulary":
    return _forward_vocabulary(plan, args)
  if plan.blocks == "tokens":
    return _forward_tokens(plan, args, gradients and args[-1] is not None)
  h, w, g, u, target, _ = args
  out, scalars, s, t = _whole_vocabulary(plan, h, w, g, u, target)
  return out, (scalars, s, t)


def _backward_rule(plan, saved, cotangents):
  args, residuals = saved
  h, w, g, u, target, weights = args
  only_divergence = all(isinstance(c, jax.custom_derivatives.SymbolicZero) for c in (cotangents.logp_X, cotangents.entropy_X))
  dtype = logit_dtype(h, w, g, u)
  columns = tuple(jnp.zeros((target.shape[0], 1), dtype) if isinstance(c, jax.custom_derivatives.SymbolicZero)
                  else c.astype(dtype)[:, None]
                  for c in (cotangents.divergence_X, cotangents.logp_X, cotangents.entropy_X))
  if plan.blocks == "one":
    scalars, s, t = residuals
    d = dm.dlogits(s, t, _hit(target, 0, s.shape[1]), scalars, columns, plan.alpha)
    dh, dw = gradient_products(plan, d, h, w, dtype)
  elif plan.blocks == "tokens" and weights is not None and only_divergence:
    dh, dw = residuals
    weight, given = weights.astype(dtype), columns[0][:, 0]
    scale = jnp.sum(weight * given) / jnp.maximum(jnp.sum(weight * weight), jnp.finfo(dtype).tiny)
    kept = jnp.all(jnp.abs(given - scale * weight) <= 1e-3 * jnp.max(jnp.abs(given)))
    scale = jnp.where(kept, scale, jnp.nan)
    dh, dw = dh * scale, dw * scale
  elif plan.blocks == "tokens":
    dh, dw = _backward_tokens(plan, args, columns)
  else:
    dh, dw = _backward_vocabulary(plan, args, residuals, columns)
  return dh.astype(h.dtype), dw.astype(w.dtype), None, None, None, None


_distill.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


# ---- pieces -------------------------------------------------------------------------------------------------------


def logit_dtype(*arrays):
  return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def product(a, b, contract, dtype):
  """a . b over axes `contract`, accumulated in dtype; float32 operands are not rounded to anything shorter."""
  operand = jnp.promote_types(a.dtype, b.dtype)
  precision = lax.Precision.HIGHEST if operand == jnp.float32 else None
  return lax.dot_general(a.astype(operand), b.astype(operand), ((contract[:1], contract[1:]), ((), ())),
                         precision=precision, preferred_element_type=dtype)


def _logits(plan, hidden, head, dtype):
  logits = product(hidden, head, (1, 0), dtype)
  return logits if plan.temperature == 1 else logits / plan.temperature


def gradient_products(plan, d, h, w, dtype):
  """(dh, dw), accumulated in dtype, of dlogits d. Only here does dlogits take the inputs' dtype."""
  d = (d if plan.temperature == 1 else d / plan.temperature).astype(jnp.promote_types(h.dtype, w.dtype))
  return product(d, w, (1, 1), dtype), product(h, d, (0, 0), dtype)


def _hit(target, start, size):
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
  s, t = _logits(plan, h, w, dtype), _logits(plan, g, u, dtype)
  stats = dm.add_block(dm.empty_stats(target.shape[0], dtype), s, t, _hit(target, 0, s.shape[1]), plan.alpha)
  divergence, logp, logp_teacher, scalars = dm.finish(stats, plan.alpha)
  if dm.is_mixture(plan.alpha):
    divergence, scalars = _with_mixture(plan, scalars, dm.mixture_sums(s, t, scalars, plan.alpha))
  return DistillKL(divergence[:, 0], logp[:, 0], logp_teacher[:, 0], scalars.entropy[:, 0]), scalars, s, t


def _with_mixture(plan, scalars, sums):
  policy, teacher = sums
  return (1 - plan.alpha) * policy + plan.alpha * teacher, scalars._replace(level=policy)


# ---- blocks of tokens ---------------------------------------------------------------------------------------------


def _forward_tokens(plan, args, gradients):
  """(DistillKL, (dh, dw) for cotangent weights_X if `gradients`, else ())."""
  h, w, g, u, target, weights = args
  dtype = logit_dtype(h, w, g, u)
  X = target.shape[0]

  def body(start, size, carry):
    out, grads = carry
    cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
    put = lambda x, part: lax.dynamic_update_slice_in_dim(x, part, start, 0)
    part, scalars, s, t = _whole_vocabulary(plan, cut(h), w, cut(g), u, cut(target))
    if gradients:
      zero = jnp.zeros((size, 1), dtype)
      columns = cut(weights).astype(dtype)[:, None], zero, zero
      d = dm.dlogits(s, t, _hit(cut(target), 0, w.shape[1]), scalars, columns, plan.alpha)
      dh, dw = gradient_products(plan, d, cut(h), w, dtype)
      grads = put(grads[0], dh), grads[1] + dw
    return DistillKL(*map(put, out, part)), grads

  grads = (jnp.zeros(h.shape, dtype), jnp.zeros(w.shape, dtype)) if gradients else ()
  return over_blocks(X, plan.size, body, (DistillKL(*[jnp.zeros(X, dtype)] * 4), grads))


def _backward_tokens(plan, args, columns):
  h, w, g, u, target, _ = args
  dtype = columns[0].dtype

  def body(start, size, carry):
    cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
    _, scalars, s, t = _whole_vocabulary(plan, cut(h), w, cut(g), u, cut(target))
    d = dm.dlogits(s, t, _hit(cut(target), 0, w.shape[1]), scalars, tuple(map(cut, columns)), plan.alpha)
    dh, dw = gradient_products(plan, d, cut(h), w, dtype)
    return lax.dynamic_update_slice_in_dim(carry[0], dh, start, 0), carry[1] + dw

  return over_blocks(target.shape[0], plan.size, body, (jnp.zeros(h.shape, dtype), jnp.zeros(w.shape, dtype)))


# ---- blocks of the vocabulary -------------------------------------------------------------------------------------


def _block_logits(plan, args, start, size, dtype):
  h, w, g, u, target, _ = args
  cut = lambda head: lax.dynamic_slice_in_dim(head, start, size, axis=1)
  return _logits(plan, h, cut(w), dtype), _logits(plan, g, cut(u), dtype), _hit(target, start, size)


def _forward_vocabulary(plan, args):
  h, w, g, u, target, _ = args
  X, V = target.shape[0], w.shape[1]
  dtype = logit_dtype(h, w, g, u)

  def sweep(start, size, stats):
    s, t, hit = _block_logits(plan, args, start, size, dtype)
    return dm.add_block(stats, s, t, hit, plan.alpha)

  stats = over_blocks(V, plan.size, sweep, dm.empty_stats(X, dtype))
  divergence, logp, logp_teacher, scalars = dm.finish(stats, plan.alpha)
  if dm.is_mixture(plan.alpha):
    def second_sweep(start, size, sums):
      s, t, _ = _block_logits(plan, args, start, size, dtype)
      return jax.tree.map(jnp.add, sums, dm.mixture_sums(s, t, scalars, plan.alpha))

    zero = jnp.zeros((X, 1), dtype)
    divergence, scalars = _with_mixture(plan, scalars, over_blocks(V, plan.size, second_sweep, (zero, zero)))
  return DistillKL(divergence[:, 0], logp[:, 0], logp_teacher[:, 0], scalars.entropy[:, 0]), scalars


def _backward_vocabulary(plan, args, scalars, columns):
  h, w, _, _, _, _ = args
  dtype = columns[0].dtype

  def body(start, size, carry):
    dh, dw = carry
    s, t, hit = _block_logits(plan, args, start, size, dtype)
    d = dm.dlogits(s, t, hit, scalars, columns, plan.alpha)
    dh_part, dw_part = gradient_products(plan, d, h, lax.dynamic_slice_in_dim(w, start, size, axis=1), dtype)
    # Each column of dw is written once, so it can be stored in the head's own dtype.
    return dh + dh_part, lax.dynamic_update_slice_in_dim(dw, dw_part.astype(w.dtype), start, 1)

  return over_blocks(w.shape[1], plan.size, body, (jnp.zeros(h.shape, dtype), jnp.zeros_like(w)))
