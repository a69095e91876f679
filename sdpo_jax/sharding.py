"""The one file that knows the mesh: its axes, and which logical axis of a tensor lies on which of them.

Mesh axes: "data" (rows; weights copied), "fsdp" (rows and weights split), "tensor" (heads, feed-forward, vocabulary split).
Logical axes are the letters of `records`. Errors: ValueError where two dimensions of one tensor would share a mesh axis.
"""

import functools
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

WEIGHTS = {
  "L": None,
  "D": "fsdp",
  "N": "tensor",
  "K": "tensor",
  "H": None,
  "F": "tensor",
  "V": "tensor",
  "r": None,
}  # r: rank of an adapter
ACTIVATIONS = {
  "B": ("data", "fsdp"),
  "T": None,
  "R": None,
  "S": None,
  "L": None,
  "D": None,
  "N": "tensor",
  "K": "tensor",
  "H": None,
  "F": "tensor",
  "V": "tensor",
}

# a layer's weights while they are used: fsdp holds them in parts only between uses
GATHERED = WEIGHTS | {"D": None}


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


AXES = ("data", "fsdp", "tensor")


def make_mesh(devices, *, data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
  """One of the sizes may be -1: what the devices leave. Sizes of 1 take one device and leave the others idle. ValueError where they do not multiply
  to the number of devices."""
  if (data, fsdp, tensor) == (1, 1, 1):
    devices = devices[:1]
  sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
  open_axes = [name for name, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(open_axes) == 1 and known > 0 and len(devices) % known == 0:
    sizes[open_axes[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1:
    raise ValueError(
      f"config.mesh={dict(data=data, fsdp=fsdp, tensor=tensor)} does not multiply to the {len(devices)} devices; one size may be -1"
    )
  shape, types = tuple(sizes.values()), (jax.sharding.AxisType.Auto,) * 3
  try:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  # the chips' grid has no side of these lengths (8 x 2 on 4 x 4): one side is shared by two axes
  except NotImplementedError:
    return jax.sharding.Mesh(
      mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True),
      AXES,
      axis_types=types,
    )


def split_devices(devices, parts: int) -> list:
  """The devices in `parts` lists of equal length, neighbours together. ValueError where they do not divide."""
  if parts < 1 or len(devices) % parts:
    raise ValueError(f"config.discover.parallel={parts} must divide the {len(devices)} devices")
  size = len(devices) // parts
  return [devices[i * size : (i + 1) * size] for i in range(parts)]


def current_mesh():
  """The mesh that is set (`jax.set_mesh`) where a program is traced; None without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def row_shards(mesh: jax.sharding.Mesh | None) -> int:
  """Among how many devices rows are split."""
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def row_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Of an array whose leading axis is rows, or packs."""
  return NamedSharding(mesh, PartitionSpec(ACTIVATIONS["B"]))


def put_rows(mesh: jax.sharding.Mesh | None, batch):
  """A host batch, the same on every process, onto the mesh: each process hands over what its own devices hold. Without a mesh, unchanged."""
  if mesh is None:
    return batch
  where = row_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, where, lambda at: x[at]), batch
  )


def state_shardings(mesh: jax.sharding.Mesh, state, axes):
  """Of a state that holds trees like `axes` (parameters, moments, a teacher): those lie like the parameters, the rest on every device."""
  known = {path: letters for path, letters in jax.tree_util.tree_leaves_with_path(axes)}

  def of(path, leaf):
    letters = next((known[path[i:]] for i in range(len(path)) if path[i:] in known), "")
    return NamedSharding(mesh, spec(letters if len(letters) == leaf.ndim else "", WEIGHTS))

  return jax.tree_util.tree_map_with_path(of, state)


def constrain(x: jax.Array, axes: str) -> jax.Array:
  """Places an activation by its letters where a mesh is set (`jax.set_mesh`); without one, x unchanged."""
  assert x.ndim == len(axes), (x.shape, axes)
  if current_mesh() is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, ACTIVATIONS))


def constrain_embeddings(x_BTD: jax.Array) -> jax.Array:
  """Looked-up embeddings where the table's parts are: rows over "data", width over "fsdp". From there to rows, and back for the gradient, is an
  all-to-all; left to itself the compiler gathers the embeddings of all rows on every device. Without a mesh, x unchanged."""
  if current_mesh() is None:
    return x_BTD
  return jax.lax.with_sharding_constraint(x_BTD, PartitionSpec("data", None, WEIGHTS["D"]))


def constrain_rows(x: jax.Array, axis: int) -> jax.Array:
  """The rows (or packs) that stand at `axis` over the mesh's row axes; without a mesh, x unchanged."""
  if current_mesh() is None:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, ACTIVATIONS["B"]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_weight(w: jax.Array, axes: str) -> jax.Array:
  """One layer's weight, whole along "fsdp" for use; its gradient goes back in parts. Without a mesh, w unchanged."""
  if current_mesh() is None:
    return w
  return jax.lax.with_sharding_constraint(w, spec(axes, GATHERED))


def _scatter(axes: str, _, g: jax.Array):
  if current_mesh() is None:
    return (g,)
  return (jax.lax.with_sharding_constraint(g, spec(axes, WEIGHTS)),)


gather_weight.defvjp(lambda w, axes: (gather_weight(w, axes), None), _scatter)
