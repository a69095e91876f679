"""Computes the divergence over the policy's top M entries and one bucket for the rest.

No X x V logits are held. Source: SDPO (arXiv 2601.20802). Its released code keeps the policy's top
M, gathers the teacher there, and appends to both a bucket with the remaining probability. The
bucketed KL never exceeds the full one and equals it at M >= V - 1. Without the bucket both sides
are renormalised over the M entries. M is `top_k`, or the vocabulary if that is smaller.

`top_log_probs` returns the log-probabilities themselves, [X, M], differentiable in the policy.
Mixtures of teachers, clipped advantages, and remote teachers that know only M entries are plain
arithmetic on them. `distill_topk` and `distill_mixture` are such arithmetic: the divergence of
distill_kl_ref.py on the buckets.

Sweeps. There is one sweep over blocks of the vocabulary forward and one backward. The best M so far
travel along with the teacher's logits at the same entries.
Gradient. That of given_logp.py; the choice of the M entries carries none.
Mesh. Layout and collectives are those of distill_kl_sweeps.py. Besides, each device offers its own
best M, of which vocabulary_axis gathers 3 M numbers a token and shard.
Numerics. As in distill_kl_xla.py; the bucket is log(-expm1(min(logsumexp, -1e-7))), as released.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels import distill_kl_xla as blocked
from sdpo_jax.kernels.distill_kl_ref import DistillKL, divergence
from sdpo_jax.kernels.distill_kl_sweeps import Inputs, Layout, input_gradients
from sdpo_jax.kernels.given_logp import GivenLogProbs, policy_gradients


class TopLogProbs(NamedTuple):
  """Holds the policy's M most likely entries, most likely first, and per-token results."""

  logp_XM: jax.Array
  logp_teacher_XM: jax.Array  # no gradient
  index_XM: jax.Array  # int32
  logp_X: jax.Array  # at the target
  logp_teacher_X: jax.Array  # no gradient
  entropy_X: jax.Array  # of the policy, over the whole vocabulary


def distill_topk(inputs: Inputs, *, top_k, temperature=1.0, mesh=None, **buckets) -> DistillKL:
  """Computes the divergence over M + 1 buckets; the other results are those of distill_kl.

  buckets: the settings of `in_buckets`.
  """
  top = top_log_probs(inputs, top_k=top_k, temperature=temperature, mesh=mesh)
  return in_buckets(top, **buckets)


def distill_mixture(
  readings: list[Inputs],
  weight_GX,
  *,
  top_k,
  temperature=1.0,
  mesh=None,
  **buckets,
) -> DistillKL:
  """Computes distill_topk from a mixture of several readings by one teacher.

  The mixture is q = sum over readings of weight * q_reading. The policy's top M do not depend on
  the teacher, so each reading costs one more sweep, and mixing is arithmetic on [X, M].

  Args:
    readings: they differ in the teacher's hidden states alone.
    weight_GX: of each reading; those of a token add up to 1.
    buckets: the settings of `in_buckets`.
  """
  tops = [
    top_log_probs(inputs, top_k=top_k, temperature=temperature, mesh=mesh) for inputs in readings
  ]
  mixed_XM = logsumexp(
    jnp.stack([top.logp_teacher_XM for top in tops]), axis=0, b=weight_GX[..., None]
  )
  mixed_X = logsumexp(jnp.stack([top.logp_teacher_X for top in tops]), axis=0, b=weight_GX)
  top = tops[0]._replace(logp_teacher_XM=mixed_XM, logp_teacher_X=mixed_X)
  return in_buckets(top, **buckets)


def in_buckets(
  top: TopLogProbs,
  *,
  alpha,
  add_tail=True,
  advantage_clip=None,
  ratio_bounds=(),
) -> DistillKL:
  """Computes the divergence over the buckets of `top`.

  Args:
    add_tail: if False, the divergence is over the M entries, renormalised.
    advantage_clip: bound of each bucket's advantage, for the reverse KL only (ValueError else).
      The gradient of KL(pi || q) is a policy gradient whose advantage is ln q - ln pi for every
      entry (arXiv 2601.20802, Prop. 2.1). Each bucket's is held within +-advantage_clip, as in the
      paper's test-time runs. Where no bucket leaves these bounds, neither value nor gradient
      changes.
    ratio_bounds: (least, most) of q / pi in each bucket, or () (RESD, arXiv 2605.12741). q is held
      within them, pi detached, and not renormalised.
  """
  if advantage_clip is not None and alpha != 1:
    raise ValueError(
      f"advantage_clip={advantage_clip!r} needs alpha=1, the reverse KL, not alpha={alpha!r}"
    )
  buckets = add_tail_bucket if add_tail else _renormalise
  policy_XM = buckets(top.logp_XM)
  teacher_XM = buckets(top.logp_teacher_XM)
  if ratio_bounds:
    least, most = (lax.stop_gradient(policy_XM) + math.log(x) for x in ratio_bounds)
    teacher_XM = jnp.clip(teacher_XM, least, most)
  if advantage_clip is None:
    divergence_X = divergence(policy_XM, teacher_XM, alpha)
  else:
    # Through exp(policy) alone the gradient is that of a policy gradient with a fixed cost.
    cost_XM = lax.stop_gradient(jnp.clip(policy_XM - teacher_XM, -advantage_clip, advantage_clip))
    divergence_X = jnp.sum(jnp.exp(policy_XM) * cost_XM, axis=1)
  return DistillKL(divergence_X, top.logp_X, top.logp_teacher_X, top.entropy_X)


def add_tail_bucket(logp_XM):
  """Appends a last column, [X, M + 1]: the log-probability of everything else."""
  kept = jnp.minimum(logsumexp(logp_XM, axis=1, keepdims=True), -1e-7)
  return jnp.concatenate([logp_XM, jnp.log(-jnp.expm1(kept))], axis=1)


def _renormalise(logp_XM):
  return logp_XM - logsumexp(logp_XM, axis=1, keepdims=True)


def top_log_probs(inputs: Inputs, *, top_k, temperature=1.0, mesh=None) -> TopLogProbs:
  """Returns log-probabilities at the policy's top_k entries, or at all of a smaller vocabulary.

  ValueError for top_k < 1, and for heads that do not divide over the mesh.
  """
  if top_k < 1:
    raise ValueError(f"top_k={top_k!r} must be at least 1")
  layout = Layout(mesh)
  X, D = inputs.policy_hidden_XD.shape
  V = inputs.policy_head_DV.shape[1]
  rows, _ = layout.sizes(X, D, V)
  plan = blocked.vocabulary_plan(rows, dm.NO_DIVERGENCE, temperature)
  padded = _top(plan, min(top_k, V), layout, layout.pad_tokens(inputs))
  return jax.tree.map(lambda x: x[:X], padded)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _top(plan, M, layout, inputs: Inputs) -> TopLogProbs:
  return _forward_rule(plan, M, layout, inputs)[0]


def _forward_rule(plan, M, layout, inputs):
  inputs = layout.gather_heads(inputs)
  forward = functools.partial(_forward, plan, M, layout)
  top, scalars = layout.run(forward, (layout.inputs,), layout.tokens, inputs)
  # The gradient needs nothing of the teacher.
  policy = inputs._replace(teacher_hidden_XE=None, teacher_head_EV=None)
  return top, (policy, top.index_XM, scalars)


def _forward(plan, M, layout, inputs):
  """Returns (TopLogProbs, Scalars) of one device's tokens."""
  X, V = inputs.target_X.shape[0], inputs.policy_head_DV.shape[1]
  dtype = blocked.logit_dtype(*inputs.matrices)
  own_M = min(M, V)  # a shard may have fewer entries than the whole keeps
  target_X = layout.own_targets(inputs.target_X, V)

  def body(start, size, carry):
    stats, *best = carry
    s, t = blocked.block_logits(plan, inputs, start, size)
    at_target = blocked.is_target(target_X, start, size)
    stats = dm.add_block(stats, s, t, at_target, plan.alpha)
    index = jnp.broadcast_to(start + lax.iota(jnp.int32, size), (X, size))
    candidates = [jnp.concatenate(pair, axis=1) for pair in zip(best, (s, t, index), strict=True)]
    return stats, *_highest(candidates, own_M)

  best = (
    jnp.full((X, own_M), dm.NEG, dtype),
    jnp.zeros((X, own_M), dtype),
    jnp.zeros((X, own_M), jnp.int32),
  )
  nothing = (dm.empty_stats(X, dtype), *best)
  stats, s, t, index = blocked.over_blocks(V, plan.size, body, nothing)
  stats = layout.add_shards(stats, plan.alpha)
  if layout.mesh is not None:
    axis = layout.vocabulary_axis
    offered = s, t, index + V * lax.axis_index(axis)
    gathered = [lax.all_gather(x, axis, axis=1, tiled=True) for x in offered]
    s, t, index = _highest(gathered, M)
  _, logp, logp_teacher, scalars = dm.finish(stats, plan.alpha)
  top = TopLogProbs(
    s - scalars.log_z_s,
    t - scalars.log_z_t,
    index,
    logp[:, 0],
    logp_teacher[:, 0],
    scalars.entropy[:, 0],
  )
  return top, scalars


def _highest(arrays, count):
  """Returns each of the arrays [X, entries] at the `count` highest entries of the first."""
  first, *others = arrays
  value, at = lax.top_k(first, count)
  return value, *[jnp.take_along_axis(x, at, axis=1) for x in others]


def _backward_rule(plan, M, layout, saved, cotangents: TopLogProbs):
  del M
  policy, *_ = saved
  given = GivenLogProbs(cotangents.logp_XM, cotangents.logp_X, cotangents.entropy_X)
  return (input_gradients(policy, *policy_gradients(plan, layout, saved, given)),)


_top.defvjp(_forward_rule, _backward_rule)
