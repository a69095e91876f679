"""The one file that knows the mesh: its axes, and which axis of a tensor lies on which of them.

Mesh axes:
  data     rows are split, weights are copied
  fsdp     rows and weights are split
  tensor   heads, feed-forward and vocabulary are split

Axes of tensors are the letters of `records`. A *constraint* tells the compiler where an
intermediate array has to lie; where no mesh is set (`jax.set_mesh`) it does nothing.

Errors: ValueError where two dimensions of one tensor would share a mesh axis.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

AXES = ("data", "fsdp", "tensor")

WEIGHTS = {
  "L": None,
  "D": "fsdp",
  "N": "tensor",
  "K": "tensor",
  "H": None,
  "F": "tensor",
  "V": "tensor",
  "r": None,  # rank of an adapter
}
ACTIVATIONS = {
  "B": ("data", "fsdp"),
  "T": None,
  "R": None,
  "Z": ("data", "fsdp"),
  "W": None,
  "C": None,
  "L": None,
  "D": None,
  "N": "tensor",
  "K": "tensor",
  "H": None,
  "F": "tensor",
  "V": "tensor",
}
# A layer's weights while they are used: fsdp holds them in parts only between uses. While sampling,
# where each step of one token uses them all, they lie so all the time.
GATHERED = WEIGHTS | {"D": None}


def spec(axes: str, rules: dict) -> PartitionSpec:
  """Translates axis letters: spec("DNH", WEIGHTS) is PartitionSpec("fsdp", "tensor", None)."""
  entries = [rules[a] for a in axes]
  used = jax.tree.leaves(entries)
  if len(used) != len(set(used)):
    raise ValueError(f"axes {axes!r} put two dimensions on one mesh axis: {entries}")
  return PartitionSpec(*entries)


def named(mesh: jax.sharding.Mesh, axes, rules: dict = WEIGHTS):
  """Translates a tree of axis letters to the same tree of shardings on this mesh."""
  return jax.tree.map(lambda a: NamedSharding(mesh, spec(a, rules)), axes)


def make_mesh(devices, *, data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
  """Lays the devices out as a mesh; one size may be -1, which stands for what they leave.

  Three sizes of 1 take one device and leave the others idle. ValueError where the sizes do not
  multiply to the number of devices.
  """
  if (data, fsdp, tensor) == (1, 1, 1):
    devices = devices[:1]
  settings = dict(data=data, fsdp=fsdp, tensor=tensor)
  sizes = dict(settings)
  open_names = [name for name, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(open_names) == 1 and fixed > 0 and len(devices) % fixed == 0:
    sizes[open_names[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1:
    raise ValueError(
      f"config.mesh={settings} does not multiply to the {len(devices)} devices; one size may be -1"
    )
  shape = tuple(sizes.values())
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  try:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  except NotImplementedError:
    # the chips' grid has no side of these lengths (8 x 2 on 4 x 4): two axes share one side
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=types)


class SamplingMesh(NamedTuple):
  """A mesh that responses are sampled on: rows over "data", weights split over "tensor" alone."""

  whole: jax.sharding.Mesh  # over the devices of all processes, on which the weights move
  own: jax.sharding.Mesh  # over this process's devices, on which it samples by itself

  def put(self, weights, axes):
    """Returns weights of the training mesh, whole for each row shard, on this process's devices.

    Every process must call it. Between devices they move once, on the mesh of all of them: arrays
    cannot be put from one mesh of several processes onto another one.
    """
    moved = jax.device_put(weights, named(self.whole, axes, GATHERED))
    if self.own == self.whole:
      return moved

    def own_part(x: jax.Array) -> jax.Array:
      where = NamedSharding(self.own, x.sharding.spec)
      parts = [shard.data for shard in x.addressable_shards]
      return jax.make_array_from_single_device_arrays(x.shape, where, parts)

    return jax.tree.map(own_part, moved)


def sampling_mesh(mesh: jax.sharding.Mesh | None, tensor: int = 0) -> SamplingMesh | None:
  """Returns the mesh for sampling over the devices of a training mesh; None where there is none.

  tensor: the devices that hold the weights together; 0: as many as in training. ValueError where
  they do not divide the mesh, or belong to several processes.
  """
  if mesh is None:
    return None
  tensor = tensor or mesh.shape["tensor"]
  setting = f"config.rollout.tensor={tensor} (0: as config.mesh.tensor)"
  if mesh.size % tensor:
    raise ValueError(f"{setting} must divide the {mesh.size} devices of config.mesh")
  groups = mesh.devices.reshape(-1, tensor)
  processes = [{device.process_index for device in group} for group in groups]
  if any(len(those) > 1 for those in processes):
    raise ValueError(
      f"{setting}: the devices that hold the weights together while sampling belong to several "
      "processes, and each process samples by itself: choose a divisor of a process's devices"
    )
  own = [group for group, (p,) in zip(groups, processes) if p == jax.process_index()]
  types = (jax.sharding.AxisType.Auto,) * len(AXES)

  def rows_by(groups) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(groups)[:, None], AXES, axis_types=types)

  return SamplingMesh(rows_by(groups), rows_by(own))


def split_devices(devices, parts: int) -> list:
  """Returns the devices in `parts` lists of equal length, neighbours together.

  ValueError where they do not divide.
  """
  if parts < 1 or len(devices) % parts:
    raise ValueError(f"config.discover.parallel={parts} must divide the {len(devices)} devices")
  size = len(devices) // parts
  return [devices[i * size : (i + 1) * size] for i in range(parts)]


def current_mesh():
  """Returns the mesh that is set (`jax.set_mesh`) where a program is traced; None without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def row_shards(mesh: jax.sharding.Mesh | None) -> int:
  """Returns the number of shards that rows are split into."""
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def row_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of an array whose leading axis is rows, or packs."""
  return NamedSharding(mesh, PartitionSpec(ACTIVATIONS["B"]))


def put_rows(mesh: jax.sharding.Mesh | None, batch):
  """Puts a host batch, the same on every process, onto the mesh; without one it is unchanged.

  Each process hands over what its own devices hold.
  """
  if mesh is None:
    return batch

  def put(x, where):
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

  return jax.tree.map(put, batch, batch_shardings(mesh, batch))


def batch_shardings(mesh: jax.sharding.Mesh, batch):
  """Returns where the arrays of a batch lie: split by rows, a scalar whole on every device."""
  rows, everywhere = row_sharding(mesh), NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda x: rows if x.ndim else everywhere, batch)


def state_shardings(mesh: jax.sharding.Mesh, state, axes):
  """Returns the shardings of a state that holds trees like `axes`, such as moments or a teacher.

  An array of such a tree lies like the parameter at the same path in it. The rest of the state
  lies whole on every device.
  """
  letters_at = dict(jax.tree_util.tree_leaves_with_path(axes))

  def leaf_sharding(path, leaf):
    # the longest end of the path that is a path of `axes`
    tails = (path[i:] for i in range(len(path)))
    letters = next((letters_at[tail] for tail in tails if tail in letters_at), "")
    if len(letters) != leaf.ndim:
      letters = ""
    return NamedSharding(mesh, spec(letters, WEIGHTS))

  return jax.tree_util.tree_map_with_path(leaf_sharding, state)


def constrain(x: jax.Array, axes: str) -> jax.Array:
  """Constrains an activation to lie as ACTIVATIONS says of its axis letters."""
  assert x.ndim == len(axes), (x.shape, axes)
  if current_mesh() is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, ACTIVATIONS))


def constrain_embeddings(x_BTD: jax.Array) -> jax.Array:
  """Constrains embeddings just looked up: rows lie over "data", width over "fsdp".

  That is where the parts of the embedding table are. From there to rows over "data" and
  "fsdp", and back for the gradient, is an all-to-all. Left to itself the compiler gathers the
  embeddings of all rows on every device.
  """
  if current_mesh() is None:
    return x_BTD
  return jax.lax.with_sharding_constraint(x_BTD, PartitionSpec("data", None, WEIGHTS["D"]))


def constrain_rows(x: jax.Array, axis: int) -> jax.Array:
  """Constrains x to be split along `axis` alone, its rows or packs, over the row shards."""
  if current_mesh() is None:
    return x
  leading = [None] * axis
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*leading, ACTIVATIONS["B"]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_weight(w: jax.Array, axes: str) -> jax.Array:
  """Constrains one layer's weight to be whole along "fsdp" while it is used.

  Its gradient is constrained to lie in parts, as the stored weight does.
  """
  if current_mesh() is None:
    return w
  return jax.lax.with_sharding_constraint(w, spec(axes, GATHERED))


def _gather_weight_forward(w: jax.Array, axes: str):
  return gather_weight(w, axes), None


def _gather_weight_backward(axes: str, _, grad: jax.Array):
  if current_mesh() is None:
    return (grad,)
  return (jax.lax.with_sharding_constraint(grad, spec(axes, WEIGHTS)),)


gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)
