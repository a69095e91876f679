"""Computes the divergence in plain XLA operations, without X x V logits.

The contract is that of distill_kl_ref.py; the gradient is written by hand. There are three plans,
chosen from the sizes. One product is 2 X D V operations.

  one         All logits at once, kept for the gradient. 4 products, as few as there can be.
              Used where X * V is small. On CPU it is also used where the logits of one side are at
              most 256 MB, or those of both no larger than four heads (X <= 2 D).
  tokens      Blocks of tokens over the whole vocabulary. 2 products forward and 4 backward; with
              weights_X the gradient is made in the forward pass: 4 in all.
              Memory: logits of one block and a float32 gradient of the head.
  vocabulary  Blocks of the vocabulary over all tokens: least memory. 2 products forward (4 for the
              mixture form, which must know both normalisers first) and 4 backward.

weights_X promises that the cotangent of divergence_X will be c * weights_X for some scalar c. Plan
`tokens` then only scales the gradient that its forward pass made. It falls back on the backward
pass where log-probability or entropy are differentiated too. A broken promise makes every gradient
NaN rather than wrong.

Numerics. Logits, sums and the head's gradient are float32 whatever the inputs' dtype (float64 for
float64). Only dlogits, the gradient with respect to the policy's logits, takes the inputs' dtype,
just before the two products that need it. float32 inputs multiply at the highest precision.
Where teacher and policy are close, as they mostly are in training, bfloat16 logits would put the
gradient off by 30 to 250 %. bfloat16 inputs with float32 logits stay within 5e-3.

A head may be a transposed view of a [V, D] embedding. That costs nothing on TPU and GPU, where the
loop takes either layout, nor in plan `one`; on CPU the other plans make one copy of it.
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
from sdpo_jax.kernels.distill_kl_sweeps import Inputs, Layout, as_result, distill, input_gradients
from sdpo_jax.kernels.target import target_platform

# Plan `one` takes X * V up to here: 16 MB for each of the two logit arrays that it keeps. On CPU
# the limit is higher, because two to four more products cost more than 256 MB are worth.
ONE_BLOCK_ENTRIES = 2**22
CPU_ONE_BLOCK_ENTRIES = 2**26
# Logits in a block of the other plans: 512 MB for each of the two arrays; in a block of the
# vocabulary on CPU 8 MB, near the caches.
BLOCK_ENTRIES = 2**27
CPU_BLOCK_ENTRIES = 2**21


class Plan(NamedTuple):
  """Holds what is fixed while tracing."""

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
) -> DistillKL:
  """Computes the divergence. blocks: "one", "tokens", "vocabulary", or None to choose."""
  inputs = Inputs(student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X)
  X = target_X.shape[0]
  D, V = student_head_DV.shape
  if blocks is None:
    blocks = _choose_blocks(X, D, V)
  if blocks == "vocabulary":
    plan = vocabulary_plan(X, alpha, temperature)
    return distill(sys.modules[__name__], plan, Layout(), inputs)
  size = X if blocks == "one" else max(BLOCK_ENTRIES // V // 8 * 8, 8)
  return _distill_tokens(Plan(alpha, temperature, size), blocks == "one", inputs, weights_X)


def _choose_blocks(X, D, V) -> str:
  on_cpu = target_platform() == "cpu"
  if X * V <= (CPU_ONE_BLOCK_ENTRIES if on_cpu else ONE_BLOCK_ENTRIES):
    return "one"
  if not on_cpu:
    return "tokens"
  return "one" if X <= 2 * D else "vocabulary"


def vocabulary_plan(X, alpha, temperature) -> Plan:
  """Returns the plan `vocabulary` for X tokens on one device."""
  entries = CPU_BLOCK_ENTRIES if target_platform() == "cpu" else BLOCK_ENTRIES
  return Plan(alpha, temperature, max(entries // max(X, 1) // 128 * 128, 128))


# ---- plans `one` and `tokens`


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _distill_tokens(plan, keep_logits, inputs: Inputs, weights_X):
  del keep_logits
  result, _ = _forward_blocks(plan, inputs)
  return result


def _forward_rule(plan, keep_logits, inputs, weights_X):
  # With symbolic zeros each array arrives in a wrapper that says whether it is differentiated.
  inputs, weights_X = jax.tree.map(lambda wrapped: wrapped.value, (inputs, weights_X))
  if keep_logits:
    result, *residuals = _whole_vocabulary(plan, inputs)
  else:
    result, residuals = _forward_blocks(plan, inputs, weights_X)
  return result, (inputs, weights_X, residuals)


def _backward_rule(plan, keep_logits, saved, result_cotangents: DistillKL):
  inputs, weights_X, residuals = saved
  dtype = logit_dtype(*inputs.matrices)
  X, V = inputs.target_X.shape[0], inputs.policy_head_DV.shape[1]

  def is_zero(cotangent_X):
    return isinstance(cotangent_X, jax.custom_derivatives.SymbolicZero)

  def as_column(cotangent_X):
    if is_zero(cotangent_X):
      return jnp.zeros((X, 1), dtype)
    return cotangent_X.astype(dtype)[:, None]

  divergence_X, logp_X, _, entropy_X = result_cotangents
  cotangents = dm.Cotangents(as_column(divergence_X), as_column(logp_X), as_column(entropy_X))
  if keep_logits:
    scalars, s, t = residuals
    d = dm.dlogits(s, t, is_target(inputs.target_X, 0, V), scalars, cotangents, plan.alpha)
    policy_gradients = gradient_products(
      plan, d, inputs.policy_hidden_XD, inputs.policy_head_DV, dtype
    )
  elif weights_X is not None and is_zero(logp_X) and is_zero(entropy_X):
    scale = _promised_scale(cotangents.divergence[:, 0], weights_X.astype(dtype))
    policy_gradients = [gradient * scale for gradient in residuals]
  else:
    policy_gradients = _backward_blocks(plan, inputs, cotangents)
  return input_gradients(inputs, *policy_gradients), None


_distill_tokens.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _promised_scale(cotangent_X, weights_X):
  """Returns the scalar c of cotangent = c * weights; NaN where there is none."""
  tiny = jnp.finfo(weights_X.dtype).tiny
  scale = jnp.sum(weights_X * cotangent_X) / jnp.maximum(jnp.sum(weights_X * weights_X), tiny)
  error_X = jnp.abs(cotangent_X - scale * weights_X)
  is_kept = jnp.all(error_X <= 1e-3 * jnp.max(jnp.abs(cotangent_X)))
  return jnp.where(is_kept, scale, jnp.nan)


def _forward_blocks(plan, inputs: Inputs, weights_X=None):
  """Returns (DistillKL, gradients of the policy's two arrays for cotangent weights_X, if given)."""
  dtype = logit_dtype(*inputs.matrices)
  X, V = inputs.target_X.shape[0], inputs.policy_head_DV.shape[1]

  def body(start, size, carry):
    result, gradients = carry

    def cut(x):
      return lax.dynamic_slice_in_dim(x, start, size)

    def put(x, block):
      return lax.dynamic_update_slice_in_dim(x, block, start, 0)

    block_result, scalars, s, t = _whole_vocabulary(plan, _cut_tokens(inputs, start, size))
    if weights_X is not None:
      zero = jnp.zeros((size, 1), dtype)
      cotangents = dm.Cotangents(cut(weights_X).astype(dtype)[:, None], zero, zero)
      at_target = is_target(cut(inputs.target_X), 0, V)
      d = dm.dlogits(s, t, at_target, scalars, cotangents, plan.alpha)
      d_hidden_XD, d_head_DV = gradient_products(
        plan, d, cut(inputs.policy_hidden_XD), inputs.policy_head_DV, dtype
      )
      gradients = put(gradients[0], d_hidden_XD), gradients[1] + d_head_DV
    return DistillKL(*map(put, result, block_result)), gradients

  gradients = () if weights_X is None else _zero_gradients(inputs, dtype, dtype)
  return over_blocks(X, plan.size, body, (DistillKL(*[jnp.zeros(X, dtype)] * 4), gradients))


def _backward_blocks(plan, inputs: Inputs, cotangents: dm.Cotangents):
  """Returns the gradients of the policy's two arrays; the logits are computed again."""
  dtype = cotangents.divergence.dtype
  X, V = inputs.target_X.shape[0], inputs.policy_head_DV.shape[1]

  def body(start, size, carry):
    d_hidden_XD, d_head_DV = carry

    def cut(x):
      return lax.dynamic_slice_in_dim(x, start, size)

    _, scalars, s, t = _whole_vocabulary(plan, _cut_tokens(inputs, start, size))
    at_target = is_target(cut(inputs.target_X), 0, V)
    block_cotangents = dm.Cotangents(*map(cut, cotangents))
    d = dm.dlogits(s, t, at_target, scalars, block_cotangents, plan.alpha)
    block_hidden, block_head = gradient_products(
      plan, d, cut(inputs.policy_hidden_XD), inputs.policy_head_DV, dtype
    )
    d_hidden_XD = lax.dynamic_update_slice_in_dim(d_hidden_XD, block_hidden, start, 0)
    return d_hidden_XD, d_head_DV + block_head

  return over_blocks(X, plan.size, body, _zero_gradients(inputs, dtype, dtype))


def _cut_tokens(inputs: Inputs, start, size) -> Inputs:
  return inputs._replace(
    policy_hidden_XD=lax.dynamic_slice_in_dim(inputs.policy_hidden_XD, start, size),
    teacher_hidden_XE=lax.dynamic_slice_in_dim(inputs.teacher_hidden_XE, start, size),
    target_X=lax.dynamic_slice_in_dim(inputs.target_X, start, size),
  )


def _whole_vocabulary(plan, inputs: Inputs):
  """Returns (DistillKL, Scalars, s, t) of some tokens, with their logits over all entries."""
  policy_hidden_XD, policy_head_DV, teacher_hidden_XE, teacher_head_EV, target_X = inputs
  dtype = logit_dtype(*inputs.matrices)
  s = logits(plan, policy_hidden_XD, policy_head_DV, dtype)
  t = logits(plan, teacher_hidden_XE, teacher_head_EV, dtype)
  nothing = dm.empty_stats(target_X.shape[0], dtype)
  stats = dm.add_block(nothing, s, t, is_target(target_X, 0, s.shape[1]), plan.alpha)
  divergence, logp, logp_teacher, scalars = dm.finish(stats, plan.alpha)
  if dm.is_mixture(plan.alpha):
    sums = dm.mixture_sums(s, t, scalars, plan.alpha)
    divergence, scalars = dm.finish_mixture(sums, scalars, plan.alpha)
  return as_result(divergence, logp, logp_teacher, scalars.entropy), scalars, s, t


# ---- plan `vocabulary`: the three functions that distill_kl_sweeps.py asks of an implementation


def statistics(plan, inputs: Inputs) -> dm.Stats:
  """Returns the Stats of every token over this vocabulary."""
  X, V = inputs.target_X.shape[0], inputs.policy_head_DV.shape[1]

  def body(start, size, stats):
    s, t = block_logits(plan, inputs, start, size)
    return dm.add_block(stats, s, t, is_target(inputs.target_X, start, size), plan.alpha)

  return over_blocks(V, plan.size, body, dm.empty_stats(X, logit_dtype(*inputs.matrices)))


def mixture_sums(plan, inputs: Inputs, scalars: dm.Scalars):
  """Returns this vocabulary's part of KL(pi || m) and of KL(q || m)."""

  def body(start, size, sums):
    s, t = block_logits(plan, inputs, start, size)
    return jax.tree.map(jnp.add, sums, dm.mixture_sums(s, t, scalars, plan.alpha))

  zero = jnp.zeros_like(scalars.entropy)
  return over_blocks(inputs.policy_head_DV.shape[1], plan.size, body, (zero, zero))


def gradients(plan, inputs: Inputs, scalars: dm.Scalars, cotangents: dm.Cotangents, head_dtype):
  """Returns the gradients of the policy's hidden states, in float32, and head, in head_dtype."""
  dtype = scalars.entropy.dtype

  def body(start, size, carry):
    s, t = block_logits(plan, inputs, start, size)
    at_target = is_target(inputs.target_X, start, size)
    d = dm.dlogits(s, t, at_target, scalars, cotangents, plan.alpha)
    head_DV = lax.dynamic_slice_in_dim(inputs.policy_head_DV, start, size, axis=1)
    block_gradients = gradient_products(plan, d, inputs.policy_hidden_XD, head_DV, dtype)
    return add_gradients(carry, block_gradients, start)

  zero = _zero_gradients(inputs, dtype, head_dtype)
  return over_blocks(inputs.policy_head_DV.shape[1], plan.size, body, zero)


def block_logits(plan, inputs: Inputs, start, size):
  """Returns the logits (s, t) of all tokens over `size` entries from `start` on."""
  dtype = logit_dtype(*inputs.matrices)
  policy_head_DV = lax.dynamic_slice_in_dim(inputs.policy_head_DV, start, size, axis=1)
  s = logits(plan, inputs.policy_hidden_XD, policy_head_DV, dtype)
  teacher_head_EV = lax.dynamic_slice_in_dim(inputs.teacher_head_EV, start, size, axis=1)
  return s, logits(plan, inputs.teacher_hidden_XE, teacher_head_EV, dtype)


# ---- pieces that other files use too


def logit_dtype(*arrays):
  """Returns the dtype of logits and sums: float32, or float64 if an array has it."""
  return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def product(a, b, contract, dtype):
  """Contracts axes (of a, of b) with sums in dtype; float32 operands are not shortened."""
  operand = jnp.promote_types(a.dtype, b.dtype)
  axis_of_a, axis_of_b = contract
  return lax.dot_general(
    a.astype(operand),
    b.astype(operand),
    (((axis_of_a,), (axis_of_b,)), ((), ())),
    precision=lax.Precision.HIGHEST if operand == jnp.float32 else None,
    preferred_element_type=dtype,
  )


def logits(plan, hidden_XD, head_DV, dtype):
  """Returns the logits [X, V] at the plan's temperature."""
  logits_XV = product(hidden_XD, head_DV, (1, 0), dtype)
  return logits_XV if plan.temperature == 1 else logits_XV / plan.temperature


def gradient_products(plan, dlogits_XV, hidden_XD, head_DV, dtype):
  """Returns the gradients of hidden states and head, summed in dtype.

  This is the only place where dlogits takes the inputs' dtype.
  """
  if plan.temperature != 1:
    dlogits_XV = dlogits_XV / plan.temperature
  dlogits_XV = dlogits_XV.astype(jnp.promote_types(hidden_XD.dtype, head_DV.dtype))
  d_hidden_XD = product(dlogits_XV, head_DV, (1, 1), dtype)
  return d_hidden_XD, product(hidden_XD, dlogits_XV, (0, 0), dtype)


def add_gradients(gradients, block_gradients, start):
  """Returns the gradients with those of a block of the vocabulary, from entry `start` on.

  Each column of the head's gradient is complete at once, so it can be stored in the head's dtype;
  only that of the hidden states is a running sum.
  """
  d_hidden_XD, d_head_DV = gradients
  block_hidden, block_head = block_gradients
  d_hidden_XD = d_hidden_XD + block_hidden
  block_head = block_head.astype(d_head_DV.dtype)
  return d_hidden_XD, lax.dynamic_update_slice_in_dim(d_head_DV, block_head, start, 1)


def is_target(target_X, start, size):
  """Returns bool [X, size]: True at a token's target, for entries from `start` on."""
  return target_X[:, None] == start + lax.broadcasted_iota(target_X.dtype, (1, size), 1)


def over_blocks(total, size, body, carry):
  """Folds body(start, size, carry) -> carry over blocks of `total`.

  The last block may be shorter, a call of its own; so nothing has to be masked.
  """
  whole, rest = divmod(total, size)
  if whole:
    carry = lax.fori_loop(0, whole, lambda i, c: body(i * size, size, c), carry)
  return body(whole * size, rest, carry) if rest else carry


def _zero_gradients(inputs: Inputs, hidden_dtype, head_dtype):
  d_hidden_XD = jnp.zeros(inputs.policy_hidden_XD.shape, hidden_dtype)
  return d_hidden_XD, jnp.zeros(inputs.policy_head_DV.shape, head_dtype)
