"""The one file that knows the mesh: its axes, and which logical axis of a tensor lies on which of them.

Mesh axes: "data" (rows; weights copied), "fsdp" (rows and weights split), "tensor" (heads, feed-forward, vocabulary split).
Logical axes are the letters of `records`. Errors: ValueError where two dimensions of one tensor would share a mesh axis.
"""

import functools

import jax
from jax.sharding import NamedSharding, PartitionSpec

WEIGHTS = {"L": None, "D": "fsdp", "N": "tensor", "K": "tensor", "H": None, "F": "tensor", "V": "tensor",
           "r": None}   # r: rank of an adapter
ACTIVATIONS = {"B": ("data", "fsdp"), "T": None, "R": None, "S": None, "L": None, "D": None, "N": "tensor", "K": "tensor",
               "H": None, "F": "tensor", "V": "tensor"}

GATHERED = WEIGHTS | {"D": None}   # a layer's weights while they are used: fsdp holds them in parts only between uses


def spec(axes: str, rules: dict) -> PartitionSpec:
  """spec("DNH", WEIGHTS) -> PartitionSpec("fsdp", "tensor", None)."""
  entries = [rules[a] for a in axes]
  used = jax.tree.leaves(entries)
  if len(used) != len(set(used)):
    raise ValueError(f"axes {axes!r} put two dimensions on one mesh axis: {entries}")
  return PartitionSpec(*entries)


def named(mesh: jax.sharding.Mesh, axes, rules: dict = WEIGHTS):
  """A tree of axis letters -> the same tree of shardings on this mesh."""
  return jax.tree.map(lambda a: NamedSharding(mesh, spec(a, rules)), axes)


def constrain(x: jax.Array, axes: str) -> jax.Array:
  """Places an activation by its letters where a mesh is set (`jax.set_mesh`); without one, x unchanged."""
  assert x.ndim == len(axes), (x.shape, axes)
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, ACTIVATIONS))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(w: jax.Array, axes: str) -> jax.Array:
  """One layer's weight, whole along "fsdp" for use; its gradient goes back in parts. Without a mesh, w unchanged."""
  if jax.sharding.get_abstract_mesh().empty:
    return w
  return jax.lax.with_sharding_constraint(w, spec(axes, GATHERED))


def _scatter(axes: str, _, g: jax.Array):
  if jax.sharding.get_abstract_mesh().empty:
    return (g,)
  return (jax.lax.with_sharding_constraint(g, spec(axes, WEIGHTS)),)


gather.defvjp(lambda w, axes: (gather(w, axes), None), _scatter)
