"""Names the platform that a program is traced for."""

import jax


def target_platform() -> str:
  """Returns the platform of the abstract mesh's device if one is set, else the default backend.

  A plan compiles for devices that are not attached: it sets an abstract mesh that describes them.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  is_described = device is not None and device.platform
  return device.platform if is_described else jax.default_backend()
