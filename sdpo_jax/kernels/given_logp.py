"""Computes the policy's log-probabilities at M entries of the vocabulary that the caller names.

A teacher that lives elsewhere knows only some entries (the policy's likeliest ones, found before);
the divergence compares it with today's policy at exactly these. No X x V logits are held.

Sweeps. There is one sweep over blocks of the vocabulary forward and one backward.
Gradient. With cotangents c_m of the M log-probabilities, the gradient with respect to the logit of
entry v is the sum over m of c_m (1[v = index_m] - pi_v).
Mesh. Layout and collectives are those of distill_kl_sweeps.py. Besides, vocabulary_axis adds up M
numbers a token, of which one shard has each.
Numerics. As in distill_kl_xla.py. Units: nats.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels import distill_kl_xla as blocked
from sdpo_jax.kernels.distill_kl_sweeps import Inputs, Layout


class GivenLogProbs(NamedTuple):
  """Holds the policy's log-probabilities at entries that the caller names; all have gradient."""

  logp_XM: jax.Array
  logp_X: jax.Array  # at the target
  entropy_X: jax.Array  # over the whole vocabulary


def given_log_probs(
  hidden_XD, head_DV, target_X, index_XM, *, temperature=1.0, mesh=None
) -> GivenLogProbs:
  """Returns the log-probabilities of the tokens index_XM, in float32, without X x V logits.

  An entry outside [0, V) has 0 less the normaliser, which means nothing. ValueError for a head that
  does not divide over the mesh.
  """
  layout = Layout(mesh)
  X, D = hidden_XD.shape
  rows, _ = layout.sizes(X, D, head_DV.shape[1])
  plan = blocked.vocabulary_plan(rows, dm.NO_DIVERGENCE, temperature)
  padded = _given(
    plan, layout, layout.pad(hidden_XD), head_DV, layout.pad(target_X), layout.pad(index_XM)
  )
  return jax.tree.map(lambda x: x[:X], padded)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _given(plan, layout, hidden_XD, head_DV, target_X, index_XM) -> GivenLogProbs:
  return _forward_rule(plan, layout, hidden_XD, head_DV, target_X, index_XM)[0]


def _forward_rule(plan, layout, hidden_XD, head_DV, target_X, index_XM):
  head_DV = layout.gather(head_DV)
  forward = functools.partial(_forward, plan, layout)
  in_specs = (layout.tokens, layout.heads, layout.tokens, layout.tokens)
  arrays = hidden_XD, head_DV, target_X, index_XM
  given, scalars = layout.run(forward, in_specs, layout.tokens, *arrays)
  return given, (Inputs(hidden_XD, head_DV, None, None, target_X), index_XM, scalars)


def _forward(plan, layout, hidden_XD, head_DV, target_X, index_XM):
  """Returns (GivenLogProbs, Scalars) of one device's tokens."""
  X, V = target_X.shape[0], head_DV.shape[1]
  dtype = blocked.logit_dtype(hidden_XD, head_DV)
  no_teacher = jnp.zeros((X, 1), dtype)  # the teacher's side of the sums
  target_X = layout.own_targets(target_X, V)
  index_XM = _own_entries(layout, index_XM, V)

  def body(start, size, carry):
    stats, logit_XM = carry
    head = lax.dynamic_slice_in_dim(head_DV, start, size, axis=1)
    s = blocked.logits(plan, hidden_XD, head, dtype)
    at_target = blocked.is_target(target_X, start, size)
    stats = dm.add_block(stats, s, no_teacher, at_target, plan.alpha)
    is_here = (index_XM >= start) & (index_XM < start + size)
    column = jnp.where(is_here, index_XM - start, 0)
    here_XM = jnp.take_along_axis(s, column, axis=1)
    return stats, jnp.where(is_here, here_XM, logit_XM)

  nothing = dm.empty_stats(X, dtype), jnp.zeros(index_XM.shape, dtype)
  stats, logit_XM = blocked.over_blocks(V, plan.size, body, nothing)
  stats = layout.add_shards(stats, plan.alpha)
  logit_XM = layout.sum_over_vocabulary(logit_XM)  # one shard has it, the others 0
  _, logp, _, scalars = dm.finish(stats, plan.alpha)
  return GivenLogProbs(logit_XM - scalars.log_z_s, logp[:, 0], scalars.entropy[:, 0]), scalars


def _backward_rule(plan, layout, saved, cotangents: GivenLogProbs):
  policy, *_ = saved
  d_hidden_XD, d_head_DV = policy_gradients(plan, layout, saved, cotangents)
  return (
    d_hidden_XD.astype(policy.policy_hidden_XD.dtype),
    d_head_DV.astype(policy.policy_head_DV.dtype),
    None,
    None,
  )


def policy_gradients(plan, layout, saved, cotangents: GivenLogProbs):
  """Returns the gradients of the policy's hidden states and of its head.

  saved: Inputs without a teacher, the entries whose log-probabilities were taken, and Scalars.
  """
  backward = functools.partial(_backward, plan, layout)
  policy_specs = layout.inputs._replace(teacher_hidden_XE=None, teacher_head_EV=None)
  in_specs = (policy_specs, *[layout.tokens] * 3)
  out_specs = (layout.tokens, layout.head_gradient)
  return layout.run(backward, in_specs, out_specs, *saved, cotangents)


def _backward(plan, layout, policy, index_XM, scalars, cotangents: GivenLogProbs):
  """Returns the gradients of one device's tokens and rows of the head."""
  hidden_XD, head_DV, target_X = policy.policy_hidden_XD, policy.policy_head_DV, policy.target_X
  X, V = target_X.shape[0], head_DV.shape[1]
  dtype = scalars.entropy.dtype
  head_dtype = layout.head_gradient_dtype(head_DV.dtype, dtype)
  g_logp = cotangents.logp_X[:, None]
  g_entropy = cotangents.entropy_X[:, None]
  g_all = g_logp + jnp.sum(cotangents.logp_XM, axis=1, keepdims=True)
  index_XM = _own_entries(layout, index_XM, V)
  target_X = layout.own_targets(target_X, V)

  def body(start, size, carry):
    head = lax.dynamic_slice_in_dim(head_DV, start, size, axis=1)
    log_pi = blocked.logits(plan, hidden_XD, head, dtype) - scalars.log_z_s
    d = -jnp.exp(log_pi) * (g_entropy * (log_pi + scalars.entropy) + g_all)
    d += jnp.where(blocked.is_target(target_X, start, size), g_logp, 0)
    # Entries of other blocks get a column that does not exist, which the scatter drops.
    is_here = (index_XM >= start) & (index_XM < start + size)
    column = jnp.where(is_here, index_XM - start, size)
    d = d.at[jnp.arange(X)[:, None], column].add(cotangents.logp_XM, mode="drop")
    block_gradients = blocked.gradient_products(plan, d, hidden_XD, head, dtype)
    return blocked.add_gradients(carry, block_gradients, start)

  zero = jnp.zeros(hidden_XD.shape, dtype), jnp.zeros(head_DV.shape, head_dtype)
  return layout.reduce_gradients(*blocked.over_blocks(V, plan.size, body, zero))


def _own_entries(layout, index_XM, V):
  """Counts entries from the first one of this device's shard of the vocabulary."""
  if layout.mesh is None:
    return index_XM
  return index_XM - V * lax.axis_index(layout.vocabulary_axis)


_given.defvjp(_forward_rule, _backward_rule)
