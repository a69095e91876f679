"""Computes each target's log-probability and the policy's entropy, without a teacher.

This file serves methods and losses without a divergence (GRPO, supervised training). Both outputs
come from hidden states and a head, and are differentiable with respect to both. Units: nats.

Memory. Where X x V logits are few they are kept for the gradient. Otherwise the vocabulary goes
through in blocks over all tokens, each computed again in the backward pass; X x V logits are never
held.
Numerics. Logits are float32 whatever the inputs' dtype; products are as in distill_kl_xla.py.
Mesh. Layout and collectives are those of distill_kl_sweeps.py: tokens over token_axes, the
vocabulary over vocabulary_axis, the head gathered over head_axis once. No logits and no hidden
states leave their device.
"""

import functools

import jax
import jax.numpy as jnp

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels import distill_kl_xla as blocked
from sdpo_jax.kernels.distill_kl_sweeps import Layout
from sdpo_jax.kernels.target import target_platform

BLOCK_BYTES = 64 * 2**20  # float32 logits that a device holds at a time
# Of logits that are kept a CPU may hold so many times more, 256 MB as in distill_kl_xla.py: there
# they are worth less than the product that makes them again.
MORE_ON_CPU = 4


def token_logp(
  hidden_XD: jax.Array,
  head_DV: jax.Array,
  target_X: jax.Array,
  *,
  temperature: float = 1.0,
  mesh=None,
  token_axes=("data", "fsdp"),
  vocabulary_axis="tensor",
  head_axis="fsdp",
) -> tuple[jax.Array, jax.Array]:
  """Returns (logp_X, entropy_X), both float32.

  mesh is None where one device holds everything. X may be anything; D and V must divide over a mesh
  (ValueError).
  """
  X, D = hidden_XD.shape
  V = head_DV.shape[1]
  shapes = hidden_XD.shape, head_DV.shape, target_X.shape
  assert head_DV.shape[0] == D and target_X.shape == (X,), shapes
  kept_bytes = BLOCK_BYTES * (MORE_ON_CPU if target_platform() == "cpu" else 1)
  if mesh is None and 4 * X * V <= kept_bytes:
    return _all_at_once(hidden_XD, head_DV, target_X, temperature)
  layout = Layout(mesh, tuple(token_axes), vocabulary_axis, head_axis)
  rows, _ = layout.sizes(X, D, V)
  size = max(BLOCK_BYTES // (4 * rows) // 128 * 128, 128)
  plan = blocked.Plan(dm.NO_DIVERGENCE, temperature, size)
  hidden_XD, target_X = layout.pad(hidden_XD), layout.pad(target_X)
  logp_X, entropy_X = _sweep(plan, layout, hidden_XD, head_DV, target_X)
  return logp_X[:X], entropy_X[:X]  # without the padding


def _all_at_once(hidden_XD, head_DV, target_X, temperature):
  plan = blocked.Plan(dm.NO_DIVERGENCE, temperature, 0)
  logits_XV = blocked.logits(plan, hidden_XD, head_DV, blocked.logit_dtype(hidden_XD, head_DV))
  logp_XV = jax.nn.log_softmax(logits_XV)
  logp_X = jnp.take_along_axis(logp_XV, target_X[:, None], -1)[:, 0]
  return logp_X, -jnp.sum(jnp.exp(logp_XV) * logp_XV, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sweep(plan, layout, hidden_XD, head_DV, target_X):
  return _forward_rule(plan, layout, hidden_XD, head_DV, target_X)[0]


def _forward_rule(plan, layout, hidden_XD, head_DV, target_X):
  head_DV = layout.gather(head_DV)
  forward = functools.partial(_forward, plan, layout)
  in_specs = (layout.tokens, layout.heads, layout.tokens)
  outputs = layout.run(forward, in_specs, layout.tokens, hidden_XD, head_DV, target_X)
  (logp_X, entropy_X), log_z_X = outputs
  return (logp_X, entropy_X), (hidden_XD, head_DV, target_X, log_z_X, entropy_X)


def _forward(plan, layout, hidden_XD, head_DV, target_X):
  """Returns ((logp_X, entropy_X), log_z_X) of one device's tokens, the shards combined."""
  X, V = target_X.shape[0], head_DV.shape[1]
  dtype = blocked.logit_dtype(hidden_XD, head_DV)
  target_X = layout.own_targets(target_X, V)
  no_teacher = jnp.zeros((X, 1), dtype)  # the teacher's side of the sums

  def body(start, size, stats):
    head = jax.lax.dynamic_slice_in_dim(head_DV, start, size, axis=1)
    s = blocked.logits(plan, hidden_XD, head, dtype)
    at_target = blocked.is_target(target_X, start, size)
    return dm.add_block(stats, s, no_teacher, at_target, plan.alpha)

  stats = blocked.over_blocks(V, plan.size, body, dm.empty_stats(X, dtype))
  stats = layout.add_shards(stats, plan.alpha)
  _, logp, _, scalars = dm.finish(stats, plan.alpha)
  return (logp[:, 0], scalars.entropy[:, 0]), scalars.log_z_s[:, 0]


def _backward_rule(plan, layout, saved, cotangents):
  hidden_XD, head_DV, *_ = saved
  backward = functools.partial(_backward, plan, layout)
  in_specs = (layout.tokens, layout.heads, *[layout.tokens] * 5)
  out_specs = (layout.tokens, layout.head_gradient)
  d_hidden_XD, d_head_DV = layout.run(backward, in_specs, out_specs, *saved, *cotangents)
  return d_hidden_XD.astype(hidden_XD.dtype), d_head_DV.astype(head_DV.dtype), None


def _backward(plan, layout, hidden_XD, head_DV, target_X, *per_token):
  """Returns the gradients of one device's tokens and rows of the head.

  per_token: log_z, entropy, and the cotangents of logp and of entropy, each [X].
  """
  V = head_DV.shape[1]
  log_z, entropy, g_logp, g_entropy = (x_X[:, None] for x_X in per_token)
  dtype = log_z.dtype
  target_X = layout.own_targets(target_X, V)
  head_dtype = layout.head_gradient_dtype(head_DV.dtype, dtype)

  def body(start, size, carry):
    head = jax.lax.dynamic_slice_in_dim(head_DV, start, size, axis=1)
    log_pi = blocked.logits(plan, hidden_XD, head, dtype) - log_z
    d = jnp.where(blocked.is_target(target_X, start, size), g_logp, 0)
    d = d - jnp.exp(log_pi) * (g_entropy * (log_pi + entropy) + g_logp)
    block_gradients = blocked.gradient_products(plan, d, hidden_XD, head, dtype)
    return blocked.add_gradients(carry, block_gradients, start)

  zero = jnp.zeros(hidden_XD.shape, dtype), jnp.zeros(head_DV.shape, head_dtype)
  return layout.reduce_gradients(*blocked.over_blocks(V, plan.size, body, zero))


_sweep.defvjp(_forward_rule, _backward_rule)
