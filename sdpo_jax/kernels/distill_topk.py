"""Divergence over the policy's K most likely entries and one bucket for the rest, without X x V logits.

Source: SDPO (arXiv 2601.20802), whose released code keeps the student's top K, gathers the teacher there, and appends
to both a bucket with the remaining probability. The bucketed KL never exceeds the full one and equals it at
K >= V - 1. Without the bucket both sides are renormalised over the K entries.

`top_log_probs` gives the log-probabilities themselves, [X, K], differentiable in the policy: mixtures of teachers,
clipped advantages and remote teachers that only know K entries are plain arithmetic on them. `distill_topk` is the
divergence of distill_kl_ref.py on the buckets.

One sweep over blocks of the vocabulary forward, one backward; the best K so far travel along with the teacher's
logits at the same entries. Gradient with respect to a logit, for cotangents c_k of the K log-probabilities:
sum over k of c_k (1[v = index_k] - pi_v). The choice of the K entries itself carries no gradient.
Over a mesh (`mesh`) the layout and the collectives are those of distill_kl_sweeps.py; beside them each device offers
its own best K, of which vocabulary_axis gathers 3 K numbers a token and shard.
Numerics as in distill_kl_xla.py; the bucket is log(-expm1(min(logsumexp, -1e-7))), as released.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jax.sharding import PartitionSpec as P

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels import distill_kl_xla as blocked
from sdpo_jax.kernels.distill_kl_ref import DistillKL, divergence
from sdpo_jax.kernels.distill_kl_sweeps import Layout, own, reduce_gradients


class TopLogProbs(NamedTuple):
  """The policy's K most likely entries, most likely first, beside the per-token results of distill_kl."""

  logp_XK: jax.Array
  logp_teacher_XK: jax.Array  # no gradient
  index_XK: jax.Array  # int32
  logp_X: jax.Array  # at the target
  logp_teacher_X: jax.Array  # no gradient
  entropy_X: jax.Array  # of the policy, over the whole vocabulary


def distill_topk(
  student_hidden_XD,
  student_head_DV,
  teacher_hidden_XE,
  teacher_head_EV,
  target_X,
  *,
  alpha,
  top_k,
  add_tail=True,
  temperature=1.0,
  advantage_clip=None,
  mesh=None,
) -> DistillKL:
  """The divergence over K + 1 buckets, or over K renormalised entries; the other results as in distill_kl.

  advantage_clip: reverse KL only. The gradient of KL(pi || q) is a policy gradient with advantage ln q - ln pi for every entry
  (arXiv 2601.20802, Prop. 2.1); each bucket's is held within +-advantage_clip, as in the paper's test-time runs. Nothing
  changes, in value or gradient, where no bucket leaves these bounds.
  """
  top = top_log_probs(
    student_hidden_XD,
    student_head_DV,
    teacher_hidden_XE,
    teacher_head_EV,
    target_X,
    top_k=top_k,
    temperature=temperature,
    mesh=mesh,
  )
  return in_buckets(top, alpha=alpha, add_tail=add_tail, advantage_clip=advantage_clip)


def distill_mixture(
  student_hidden_XD,
  student_head_DV,
  teachers,
  teacher_head_EV,
  target_X,
  weight_MX,
  *,
  alpha,
  top_k,
  add_tail=True,
  temperature=1.0,
  advantage_clip=None,
  mesh=None,
) -> DistillKL:
  """distill_topk from a mixture of M readings by one teacher, q = sum over m of weight_m q_m; teachers: M hidden states [X, E]; weight_MX: each token's add up to 1.

  The policy's top K do not depend on the teacher, so each reading is one more sweep, and mixing is arithmetic on [X, K].
  """
  tops = [
    top_log_probs(
      student_hidden_XD,
      student_head_DV,
      hidden_XE,
      teacher_head_EV,
      target_X,
      top_k=top_k,
      temperature=temperature,
      mesh=mesh,
    )
    for hidden_XE in teachers
  ]
  mixed_XK = logsumexp(
    jnp.stack([top.logp_teacher_XK for top in tops]), axis=0, b=weight_MX[..., None]
  )
  mixed_X = logsumexp(jnp.stack([top.logp_teacher_X for top in tops]), axis=0, b=weight_MX)
  return in_buckets(
    tops[0]._replace(logp_teacher_XK=mixed_XK, logp_teacher_X=mixed_X),
    alpha=alpha,
    add_tail=add_tail,
    advantage_clip=advantage_clip,
  )


def in_buckets(top: "TopLogProbs", *, alpha, add_tail, advantage_clip) -> DistillKL:
  if advantage_clip is not None and alpha != 1:
    raise ValueError(
      f"advantage_clip={advantage_clip!r} needs alpha=1, the reverse KL, not alpha={alpha!r}"
    )
  buckets = add_tail_bucket if add_tail else lambda x: x - logsumexp(x, axis=1, keepdims=True)
  policy_XK, teacher_XK = buckets(top.logp_XK), buckets(top.logp_teacher_XK)
  if advantage_clip is None:
    divergence_X = divergence(policy_XK, teacher_XK, alpha)
  else:
    cost_XK = lax.stop_gradient(jnp.clip(policy_XK - teacher_XK, -advantage_clip, advantage_clip))
    divergence_X = jnp.sum(jnp.exp(policy_XK) * cost_XK, axis=1)
  return DistillKL(divergence_X, top.logp_X, top.logp_teacher_X, top.entropy_X)


def add_tail_bucket(logp_XK):
  """[X, K] -> [X, K + 1]: the probability of everything else comes last."""
  kept = jnp.minimum(logsumexp(logp_XK, axis=1, keepdims=True), -1e-7)
  return jnp.concatenate([logp_XK, jnp.log(-jnp.expm1(kept))], axis=1)


def top_log_probs(
  student_hidden_XD,
  student_head_DV,
  teacher_hidden_XE,
  teacher_head_EV,
  target_X,
  *,
  top_k,
  temperature=1.0,
  mesh=None,
  token_axes=("data", "fsdp"),
  vocabulary_axis="tensor",
  head_axis="fsdp",
) -> TopLogProbs:
  """Log-probabilities at the policy's top_k entries (all of them if the vocabulary is smaller)."""
  if top_k < 1:
    raise ValueError(f"top_k={top_k!r} must be at least 1")
  X, V = target_X.shape[0], student_head_DV.shape[1]
  arrays = student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X
  layout, rows = None, X
  if mesh is not None:
    layout = Layout(mesh, tuple(token_axes), vocabulary_axis, head_axis)
    rows, _ = layout.sizes(*student_hidden_XD.shape, V)
    arrays = [x if i in (1, 3) else layout.pad(x) for i, x in enumerate(arrays)]
  # alpha 0.5: statistics without a divergence
  plan = blocked.vocabulary_plan(rows, 0.5, temperature)
  return jax.tree.map(lambda x: x[:X], _top(plan, min(top_k, V), layout, *arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _top(plan, K, layout, h, w, g, u, target):
  return _forward_rule(plan, K, layout, h, w, g, u, target)[0]


def _forward_rule(plan, K, layout, h, w, g, u, target):
  run = functools.partial(_forward, plan, K, layout)
  if layout is not None:
    w, u = layout.gather(w), layout.gather(u)
    tokens, heads = P(layout.token_axes), P(None, layout.vocabulary_axis)
    run = jax.shard_map(
      run,
      mesh=layout.mesh,
      check_vma=False,
      in_specs=(tokens, heads, tokens, heads, tokens),
      out_specs=tokens,
    )
  out, scalars = run(h, w, g, u, target)
  return out, (h, w, target, out.index_XK, scalars)


def _forward(plan, K, layout, h, w, g, u, target):
  """(TopLogProbs, Scalars) of one device's tokens."""
  X, V = target.shape[0], w.shape[1]
  dtype = blocked.logit_dtype(h, w, g, u)
  kept, target = min(K, V), own(layout, target, V)

  def body(start, size, carry):
    stats, *best = carry
    s, t = blocked.block_logits(plan, h, w, g, u, start, size)
    stats = dm.add_block(stats, s, t, blocked.hit(target, start, size), plan.alpha)
    block = s, t, jnp.broadcast_to(start + lax.iota(jnp.int32, size), (X, size))
    both = [jnp.concatenate(pair, axis=1) for pair in zip(best, block)]
    value, at = lax.top_k(both[0], kept)
    return stats, value, *[jnp.take_along_axis(x, at, axis=1) for x in both[1:]]

  nothing = (
    jnp.full((X, kept), dm.NEG, dtype),
    jnp.zeros((X, kept), dtype),
    jnp.zeros((X, kept), jnp.int32),
  )
  stats, s, t, index = blocked.over_blocks(V, plan.size, body, (dm.empty_stats(X, dtype), *nothing))
  if layout is not None:
    stats = dm.add_shards(stats, plan.alpha, layout.vocabulary_axis)
    offered = s, t, index + V * lax.axis_index(layout.vocabulary_axis)
    s, t, index = (lax.all_gather(x, layout.vocabulary_axis, axis=1, tiled=True) for x in offered)
    s, at = lax.top_k(s, K)
    t, index = (jnp.take_along_axis(x, at, axis=1) for x in (t, index))
  _, logp, logp_teacher, scalars = dm.finish(stats, plan.alpha)
  out = TopLogProbs(
    s - scalars.log_z_s,
    t - scalars.log_z_t,
    index,
    logp[:, 0],
    logp_teacher[:, 0],
    scalars.entropy[:, 0],
  )
  return out, scalars


def _backward_rule(plan, K, layout, saved, cotangents):
  del K
  h, w, *_ = saved
  run = functools.partial(_backward, plan, layout)
  if layout is not None:
    tokens, heads = P(layout.token_axes), P(None, layout.vocabulary_axis)
    run = jax.shard_map(
      run,
      mesh=layout.mesh,
      check_vma=False,
      in_specs=(tokens, heads, tokens, tokens, tokens, tokens),
      out_specs=(tokens, P(layout.head_axis, layout.vocabulary_axis)),
    )
  dh, dw = run(*saved, cotangents)
  return dh.astype(h.dtype), dw.astype(w.dtype), None, None, None


def _backward(plan, layout, h, w, target, index, scalars, cotangents):
  X, V = target.shape[0], w.shape[1]
  dtype = scalars.entropy.dtype
  c_XK, g_logp, g_entropy = (
    cotangents.logp_XK,
    cotangents.logp_X[:, None],
    cotangents.entropy_X[:, None],
  )
  from_all = g_logp + jnp.sum(c_XK, axis=1, keepdims=True)
  dw_dtype = w.dtype  # a column of dw is complete at once
  if layout is not None:
    # until the devices' parts are added
    index, dw_dtype = index - V * lax.axis_index(layout.vocabulary_axis), dtype
    target = own(layout, target, V)

  def body(start, size, carry):
    dh, dw = carry
    head = lax.dynamic_slice_in_dim(w, start, size, axis=1)
    log_pi = blocked.logits(plan, h, head, dtype) - scalars.log_z_s
    d = -jnp.exp(log_pi) * (g_entropy * (log_pi + scalars.entropy) + from_all)
    d += jnp.where(blocked.hit(target, start, size), g_logp, 0)
    # size: nowhere
    column = jnp.where((index >= start) & (index < start + size), index - start, size)
    d = d.at[jnp.arange(X)[:, None], column].add(c_XK, mode="drop")
    dh_part, dw_part = blocked.gradient_products(plan, d, h, head, dtype)
    return dh + dh_part, lax.dynamic_update_slice_in_dim(dw, dw_part.astype(dw_dtype), start, 1)

  dh, dw = blocked.over_blocks(
    V, plan.size, body, (jnp.zeros(h.shape, dtype), jnp.zeros(w.shape, dw_dtype))
  )
  return (dh, dw) if layout is None else reduce_gradients(layout, dh, dw)


_top.defvjp(_forward_rule, _backward_rule)
