"""The divergence as sweeps over the vocabulary, on one device or over a mesh, for implementations made of three parts.

An implementation is a module with
  statistics(plan, h, w, g, u, target)                              -> distill_kl_math.Stats, columns [X, 1]
  mixture_sums(plan, h, w, g, u, scalars)                           -> this vocabulary's KL(pi || m), KL(q || m), [X, 1]
  gradients(plan, h, w, g, u, target, scalars, cotangents, dtype)   -> dh in float32, dw in dtype
over the vocabulary that it is given; a target outside [0, V) belongs to somebody else.

Over a mesh: tokens are split over `token_axes`, the vocabulary over `vocabulary_axis`, and the heads' rows rest split
over `head_axis` (fsdp). Heads are gathered over head_axis once, for forward and backward together. Forward: one maximum
of 2 and one sum of 6 numbers a token over vocabulary_axis (mixture form: 2 more). Backward: dh is summed over
vocabulary_axis; dw is reduce-scattered over head_axis and summed over the other token axes, in float32. Nothing is
differentiated through a collective. X need not divide by the devices (it is padded); V and D must.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels.distill_kl_ref import DistillKL


class Layout(NamedTuple):
  """How a mesh splits the problem. token_axes includes head_axis."""

  mesh: Any
  token_axes: tuple[str, ...]
  vocabulary_axis: str
  head_axis: str

  def sizes(self, X, D, V):
    """(tokens, entries of the vocabulary) of one device; tokens rounded up."""
    vocabulary_shards, head_shards = (
      self.mesh.shape[self.vocabulary_axis],
      self.mesh.shape[self.head_axis],
    )
    if V % vocabulary_shards or D % head_shards:
      raise ValueError(
        f"a head of {D} x {V} does not divide over mesh axes {self.head_axis}={head_shards}, "
        f"{self.vocabulary_axis}={vocabulary_shards}"
      )
    return -(-X // self.token_shards), V // vocabulary_shards

  @property
  def token_shards(self):
    return math.prod(self.mesh.shape[a] for a in self.token_axes)

  def pad(self, x):
    """x [X, ...] with tokens appended that are nobody's, so that it divides."""
    return jnp.pad(x, [(0, -x.shape[0] % self.token_shards)] + [(0, 0)] * (x.ndim - 1))

  def gather(self, head):
    """A head, whole over head_axis."""
    return lax.with_sharding_constraint(
      head, NamedSharding(self.mesh, P(None, self.vocabulary_axis))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def distill(implementation, plan, layout, h, w, g, u, target):
  return _forward_rule(implementation, plan, layout, h, w, g, u, target)[0]


def _forward_rule(implementation, plan, layout, h, w, g, u, target):
  if layout is None:
    out, scalars = _forward(implementation, plan, None, h, w, g, u, target)
  else:
    w, u = layout.gather(w), layout.gather(u)
    tokens, heads = P(layout.token_axes), P(None, layout.vocabulary_axis)
    out, scalars = jax.shard_map(
      functools.partial(_forward, implementation, plan, layout),
      mesh=layout.mesh,
      check_vma=False,
      in_specs=(tokens, heads, tokens, heads, tokens),
      out_specs=(tokens, tokens),
    )(h, w, g, u, target)
  return out, (h, w, g, u, target, scalars)


def _forward(implementation, plan, layout, h, w, g, u, target):
  """(DistillKL, Scalars) of one device's tokens, the vocabulary's shards combined."""
  target = own(layout, target, w.shape[1])
  stats = implementation.statistics(plan, h, w, g, u, target)
  if layout is not None:
    stats = dm.add_shards(stats, plan.alpha, layout.vocabulary_axis)
  divergence, logp, logp_teacher, scalars = dm.finish(stats, plan.alpha)
  if dm.is_mixture(plan.alpha):
    sums = implementation.mixture_sums(plan, h, w, g, u, scalars)
    if layout is not None:
      sums = lax.psum(sums, layout.vocabulary_axis)
    divergence, scalars = dm.with_mixture(sums, scalars, plan.alpha)
  return DistillKL(divergence[:, 0], logp[:, 0], logp_teacher[:, 0], scalars.entropy[:, 0]), scalars


def _backward_rule(implementation, plan, layout, saved, cotangents):
  h, w, g, u, target, scalars = saved
  cotangents = tuple(
    c[:, None] for c in (cotangents.divergence_X, cotangents.logp_X, cotangents.entropy_X)
  )
  if layout is None:
    dh, dw = implementation.gradients(plan, h, w, g, u, target, scalars, cotangents, w.dtype)
  else:
    tokens, heads = P(layout.token_axes), P(None, layout.vocabulary_axis)
    dh, dw = jax.shard_map(
      functools.partial(_backward, implementation, plan, layout),
      mesh=layout.mesh,
      check_vma=False,
      in_specs=(tokens, heads, tokens, heads, tokens, tokens, tokens),
      out_specs=(tokens, P(layout.head_axis, layout.vocabulary_axis)),
    )(h, w, g, u, target, scalars, cotangents)
  return dh.astype(h.dtype), dw.astype(w.dtype), None, None, None


def _backward(implementation, plan, layout, h, w, g, u, target, scalars, cotangents):
  target = own(layout, target, w.shape[1])
  dh, dw = implementation.gradients(
    plan, h, w, g, u, target, scalars, cotangents, scalars.entropy.dtype
  )
  return reduce_gradients(layout, dh, dw)


def reduce_gradients(layout, dh, dw):
  """One device's parts -> dh of its tokens, dw of its rows of the head."""
  dw = lax.psum_scatter(dw, layout.head_axis, scatter_dimension=0, tiled=True)
  others = tuple(a for a in layout.token_axes if a != layout.head_axis)
  return lax.psum(dh, layout.vocabulary_axis), lax.psum(dw, others) if others else dw


def own(layout, target, V):
  """Targets counted from this shard's first entry; -1 where another shard has them."""
  if layout is None:
    return target
  target = target - lax.axis_index(layout.vocabulary_axis) * V
  return jnp.where((target >= 0) & (target < V), target, -1)


distill.defvjp(_forward_rule, _backward_rule)
