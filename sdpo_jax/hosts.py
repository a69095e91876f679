"""What the processes of one run tell each other: plain values, over the devices' own network.

Every process runs the same loop on the same data; where one of them alone knows something (a verdict), all have to hear it before they
go on. With one process nothing is sent. Every process must call `share` equally often and in the same order.
"""

import json
import re
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


def start(address: str) -> None:
  """Joins the processes of a run before any device is used: "auto" where the cluster tells (TPU pods, Slurm, Open MPI, Kubernetes), else
  "HOST:PORT,PROCESSES,RANK" with the address of process 0. ValueError for anything else."""
  if address == "auto":
    jax.distributed.initialize()
    return
  coordinator, _, counts = address.partition(",")
  try:
    processes, rank = map(int, counts.split(","))
    if not re.fullmatch(r".+:\d+", coordinator) or not 0 <= rank < processes:
      raise ValueError
  except ValueError:
    raise ValueError(
      f"--distributed={address!r} must be auto or HOST:PORT,PROCESSES,RANK, with a rank below the number of processes"
    ) from None
  jax.distributed.initialize(coordinator, processes, rank)


def leads() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def share(value: Any) -> list[Any]:
  """The JSON-able values of all processes, by rank."""
  if jax.process_count() == 1:
    return [value]
  mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([mine.size]))[:, 0]
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: mine.size] = mine
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(multihost_utils.process_allgather(padded), sizes)
  ]


# ---- Writing -------------------------------------------------------------------------------------
# --------------------


def to_host(x) -> np.ndarray:
  """The whole array, also where other processes hold parts of it (then every process must call this)."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = jax.jit(lambda y: y, out_shardings=jax.NamedSharding(x.sharding.mesh, jax.P()))(x)
  return np.asarray(x)
