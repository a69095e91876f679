"""Runs the divergence as sweeps over the vocabulary, on one device or over a mesh.

This file owns the custom gradient and the collectives; an implementation only sweeps. It is a
module with three functions over the vocabulary that one device holds:

  statistics(plan, inputs)              returns distill_kl_math.Stats, columns [X, 1]
  mixture_sums(plan, inputs, scalars)   returns its part of KL(pi || m) and of KL(q || m), [X, 1]
  gradients(plan, inputs, scalars, cotangents, head_dtype)
                                        returns the gradients of the policy's hidden states, in
                                        float32, and of its head, in head_dtype

A target outside [0, V) belongs to another device. A plan is any hashable record with `alpha`.

Layout over a mesh. Tokens are split over `token_axes` and the vocabulary over `vocabulary_axis`.
The heads' rows rest split over `head_axis` (fsdp); they are gathered over it once, for forward and
backward together. X need not divide by the devices, for it is padded; V and D must.

Collectives. Forward: one maximum of 2 and one sum of 6 numbers a token over vocabulary_axis; the
mixture form sums 2 more. Backward: the gradient of the hidden states is summed over
vocabulary_axis. The head's is reduce-scattered over head_axis and summed over the other token axes,
in float32. Nothing is differentiated through a collective: each rule is a shard_map of its own.
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


class Inputs(NamedTuple):
  """Holds what a divergence is computed from; only the policy's two arrays get a gradient."""

  policy_hidden_XD: jax.Array
  policy_head_DV: jax.Array
  teacher_hidden_XE: jax.Array  # E may differ from D
  teacher_head_EV: jax.Array
  target_X: jax.Array

  @property
  def matrices(self):
    """Returns the four arrays that are multiplied: all but the target."""
    return self[:4]


class Layout(NamedTuple):
  """Says how a mesh splits the problem; without a mesh one device has it all."""

  mesh: Any = None
  token_axes: tuple[str, ...] = ("data", "fsdp")  # includes head_axis
  vocabulary_axis: str = "tensor"
  head_axis: str = "fsdp"

  @property
  def tokens(self) -> P:
    """Returns the spec of an array [X, ...]."""
    return P(self.token_axes)

  @property
  def heads(self) -> P:
    """Returns the spec of a gathered head: whole columns, of one shard of the vocabulary."""
    return P(None, self.vocabulary_axis)

  @property
  def head_gradient(self) -> P:
    """Returns the spec of a head's gradient, which is that of a head at rest."""
    return P(self.head_axis, self.vocabulary_axis)

  @property
  def inputs(self) -> Inputs:
    """Returns the specs of Inputs whose heads are gathered."""
    return Inputs(self.tokens, self.heads, self.tokens, self.heads, self.tokens)

  @property
  def token_shards(self) -> int:
    """Returns into how many parts the tokens are split."""
    return math.prod(self.mesh.shape[axis] for axis in self.token_axes)

  def sizes(self, X, D, V):
    """Returns (tokens, vocabulary entries) of one device; tokens are rounded up.

    Raises ValueError for a head [D, V] that does not divide over the mesh.
    """
    if self.mesh is None:
      return X, V
    vocabulary_shards = self.mesh.shape[self.vocabulary_axis]
    head_shards = self.mesh.shape[self.head_axis]
    if V % vocabulary_shards or D % head_shards:
      raise ValueError(
        f"a head of {D} x {V} does not divide over mesh axes {self.head_axis}={head_shards}, "
        f"{self.vocabulary_axis}={vocabulary_shards}"
      )
    return -(-X // self.token_shards), V // vocabulary_shards

  def pad(self, x):
    """Appends rows to x [X, ...] until the tokens divide over the devices; callers cut them off."""
    if self.mesh is None:
      return x
    return jnp.pad(x, [(0, -x.shape[0] % self.token_shards)] + [(0, 0)] * (x.ndim - 1))

  def pad_tokens(self, inputs: Inputs) -> Inputs:
    """Pads the arrays that have tokens."""
    return inputs._replace(
      policy_hidden_XD=self.pad(inputs.policy_hidden_XD),
      teacher_hidden_XE=self.pad(inputs.teacher_hidden_XE),
      target_X=self.pad(inputs.target_X),
    )

  def gather_heads(self, inputs: Inputs) -> Inputs:
    """Gathers both heads over head_axis."""
    return inputs._replace(
      policy_head_DV=self.gather(inputs.policy_head_DV),
      teacher_head_EV=self.gather(inputs.teacher_head_EV),
    )

  def gather(self, head):
    """Gathers a head over head_axis, so that each device has all rows of its vocabulary."""
    if self.mesh is None:
      return head
    return lax.with_sharding_constraint(head, NamedSharding(self.mesh, self.heads))

  def run(self, function, in_specs, out_specs, *arguments):
    """Calls function on each device's part of the arguments; directly if there is no mesh."""
    if self.mesh is None:
      return function(*arguments)
    sharded = jax.shard_map(
      function, mesh=self.mesh, check_vma=False, in_specs=in_specs, out_specs=out_specs
    )
    return sharded(*arguments)

  # The rest is for functions that `run` calls.

  def own_targets(self, target_X, V):
    """Counts targets from this shard's first entry, of V; another shard's targets become -1."""
    if self.mesh is None:
      return target_X
    target_X = target_X - lax.axis_index(self.vocabulary_axis) * V
    return jnp.where((target_X >= 0) & (target_X < V), target_X, -1)

  def add_shards(self, stats: dm.Stats, alpha) -> dm.Stats:
    """Merges the vocabulary shards' Stats."""
    return stats if self.mesh is None else dm.add_shards(stats, alpha, self.vocabulary_axis)

  def sum_over_vocabulary(self, tree):
    """Adds up what the vocabulary's shards have."""
    return tree if self.mesh is None else lax.psum(tree, self.vocabulary_axis)

  def head_gradient_dtype(self, head_dtype, sum_dtype):
    """Returns the dtype in which a device makes its part of the head's gradient.

    A column of it is complete at once, so one device alone may round it to the head's dtype. Over a
    mesh the parts of several devices are added first, in the dtype of sums.
    """
    return head_dtype if self.mesh is None else sum_dtype

  def reduce_gradients(self, d_hidden_XD, d_head_DV):
    """Turns one device's parts into the gradients of its tokens and of its rows of the head."""
    if self.mesh is None:
      return d_hidden_XD, d_head_DV
    d_head_DV = lax.psum_scatter(d_head_DV, self.head_axis, scatter_dimension=0, tiled=True)
    d_hidden_XD = lax.psum(d_hidden_XD, self.vocabulary_axis)
    other_axes = tuple(axis for axis in self.token_axes if axis != self.head_axis)
    if other_axes:
      d_head_DV = lax.psum(d_head_DV, other_axes)
    return d_hidden_XD, d_head_DV


def as_result(divergence, logp, logp_teacher, entropy) -> DistillKL:
  """Turns four columns [X, 1] into the per-token results."""
  return DistillKL(*[column[:, 0] for column in (divergence, logp, logp_teacher, entropy)])


def input_gradients(inputs: Inputs, d_hidden_XD, d_head_DV) -> Inputs:
  """Returns what a backward rule owes for its Inputs: two gradients in the arrays' own dtypes."""
  return Inputs(
    d_hidden_XD.astype(inputs.policy_hidden_XD.dtype),
    d_head_DV.astype(inputs.policy_head_DV.dtype),
    None,
    None,
    None,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def distill(implementation, plan, layout: Layout, inputs: Inputs) -> DistillKL:
  """Computes the divergence by one implementation. Over a mesh the tokens must divide: see pad."""
  return _forward_rule(implementation, plan, layout, inputs)[0]


def _forward_rule(implementation, plan, layout, inputs):
  inputs = layout.gather_heads(inputs)
  forward = functools.partial(_forward, implementation, plan, layout)
  out_specs = (layout.tokens, layout.tokens)
  result, scalars = layout.run(forward, (layout.inputs,), out_specs, inputs)
  return result, (inputs, scalars)


def _forward(implementation, plan, layout, inputs):
  """Returns (DistillKL, Scalars) of one device's tokens, the vocabulary's shards combined."""
  inputs = _with_own_targets(layout, inputs)
  stats = implementation.statistics(plan, inputs)
  stats = layout.add_shards(stats, plan.alpha)
  divergence, logp, logp_teacher, scalars = dm.finish(stats, plan.alpha)
  if dm.is_mixture(plan.alpha):
    sums = layout.sum_over_vocabulary(implementation.mixture_sums(plan, inputs, scalars))
    divergence, scalars = dm.finish_mixture(sums, scalars, plan.alpha)
  return as_result(divergence, logp, logp_teacher, scalars.entropy), scalars


def _backward_rule(implementation, plan, layout, saved, cotangents: DistillKL):
  inputs, scalars = saved
  columns = dm.Cotangents(
    cotangents.divergence_X[:, None],
    cotangents.logp_X[:, None],
    cotangents.entropy_X[:, None],
  )
  backward = functools.partial(_backward, implementation, plan, layout)
  in_specs = (layout.inputs, layout.tokens, layout.tokens)
  out_specs = (layout.tokens, layout.head_gradient)
  gradients = layout.run(backward, in_specs, out_specs, inputs, scalars, columns)
  return (input_gradients(inputs, *gradients),)


def _backward(implementation, plan, layout, inputs, scalars, cotangents):
  """Returns the gradients of one device's tokens and rows of the head."""
  inputs = _with_own_targets(layout, inputs)
  head_dtype = layout.head_gradient_dtype(inputs.policy_head_DV.dtype, scalars.entropy.dtype)
  gradients = implementation.gradients(plan, inputs, scalars, cotangents, head_dtype)
  return layout.reduce_gradients(*gradients)


def _with_own_targets(layout, inputs):
  V = inputs.policy_head_DV.shape[1]
  return inputs._replace(target_X=layout.own_targets(inputs.target_X, V))


distill.defvjp(_forward_rule, _backward_rule)
