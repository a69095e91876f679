"""Which platform a program is traced for."""

import jax


def target_platform():
  """What is being compiled for: the abstract mesh's device where one is set, else the default backend."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None and device.platform else jax.default_backend()
