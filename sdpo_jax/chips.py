"""Names the chips that a plan can be made for, and what their compilers ask about them.

TPUs are known to libtpu by name. Of a GPU the compiler asks many things that its device would
answer; `topology_devices` answers for one that is not there.

Errors: ValueError naming the topology and the choices.
"""

import os
import re
from typing import NamedTuple

from jax.experimental import topologies


class Chip(NamedTuple):
  """A chip as its maker states it.

  links_gb_s adds up all links of a chip, one direction each; of a GPU, those within its node.
  """

  memory_gb: float
  tflops: float  # bfloat16, summed in float32
  memory_gb_s: float
  links_gb_s: float


CHIPS = {
  "v4": Chip(32, 275, 1228, 300),
  "v5e": Chip(16, 197, 819, 200),
  "v5p": Chip(95, 459, 2765, 600),
  "v6e": Chip(32, 918, 1640, 448),
  "h100": Chip(80, 989, 3350, 450),
  "h200": Chip(141, 989, 4800, 450),
  # linked by PCI Express alone
  "l4": Chip(24, 121, 300, 32),
  "rtx4080": Chip(16, 97.5, 716.8, 32),
}


class Design(NamedTuple):
  """What sets a GPU's chip apart, as XLA's own descriptions of devices count it.

  Those are in XLA's backends/gpu/target_config/specs.
  """

  capability: str  # of CUDA, as the compiler's description writes it
  cores: int  # streaming multiprocessors
  clock_ghz: float
  threads_per_core: int
  shared_memory_per_core: int  # bytes, as the next two
  shared_memory_per_block: int
  l2_cache: int


HOPPER = Design("major: 9", 132, 1.98, 2048, 233_472, 232_448, 50 * 2**20)
GPUS = {
  "h100": HOPPER,
  "h200": HOPPER,
  "l4": Design("major: 8 minor: 9", 58, 2.04, 1536, 102_400, 101_376, 48 * 2**20),
  "rtx4080": Design("major: 8 minor: 9", 76, 2.505, 1536, 102_400, 101_376, 64 * 2**20),
}

_DEVICE = """
gpu_device_info {{
  cuda_compute_capability {{ {design.capability} }}
  core_count: {design.cores} fpus_per_core: 128 clock_rate_ghz: {design.clock_ghz}
  threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: {design.threads_per_core}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {design.shared_memory_per_block}
  shared_memory_per_core: {design.shared_memory_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: {design.l2_cache} memory_bandwidth: {bytes_per_s:.0f}
  device_memory_size: {memory:.0f}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def description(gpu: str) -> str:
  """Returns what the compiler for GPUs asks a device, answered for one that is not there."""
  chip = CHIPS[gpu]
  return _DEVICE.format(
    name=gpu,
    design=GPUS[gpu],
    bytes_per_s=chip.memory_gb_s * 1e9,
    memory=chip.memory_gb * 1e9,
  )


def topology_devices(name: str):
  """Returns the devices of a topology such as "v5p:2x2x2", or "h200:2x8", two nodes of eight.

  ValueError with the choices if there is no such topology, or no compiler for it here.
  """
  chip, _, shape = name.partition(":")
  is_gpu = chip in GPUS
  sizes = r"[1-9]\d*(x[1-9]\d*)?" if is_gpu else r"[1-9]\d*(x[1-9]\d*)*"
  if chip not in CHIPS or not re.fullmatch(sizes, shape):
    raise ValueError(
      f"--topology={name!r} must look like v5p:2x2x2, v5e:8x8, v6e:4x4, h200:8, h200:2x8 or l4:1; "
      f"choose the chip from {sorted(CHIPS)}"
    )
  try:
    if not is_gpu:
      return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    slices_nodes_gpus = f"1x{shape}" if "x" in shape else f"1x1x{shape}"
    return topologies.get_topology_desc(
      platform="cuda",
      topology_name=name,
      topology=slices_nodes_gpus,
      target_config=description(chip),
    ).devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    extra = "cuda13" if is_gpu else "tpu"
    python = ", with Python 3.12" if is_gpu else ""
    raise ValueError(
      f'--topology={name!r}: plan needs the compiler: pip install "jax[{extra}]"{python} '
      f"({str(error).splitlines()[0]})"
    ) from error


def usable_share(chip: str) -> float:
  """Returns the share of a chip's memory that jax gives a program."""
  # its new name, and the one that most people know
  setting = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get(
    "XLA_PYTHON_CLIENT_MEM_FRACTION"
  )
  try:
    return float(setting or 0.75) if chip in GPUS else 1.0
  except ValueError:
    raise ValueError(
      f"XLA_PYTHON_CLIENT_MEM_FRACTION={setting!r} must be a number, such as 0.9"
    ) from None
