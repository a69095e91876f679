"""What the processes of one run share: plain values, over the devices' own network.

Every process runs the same loop on the same data. What one of them alone knows (a verdict), all
have to hear before they go on. With one process nothing is sent. Every process must call `share`
equally often and in the same order.
"""

import json
import re
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


def start(address: str) -> None:
  """Joins the processes of a run, before any device is used.

  `address` is "auto" where the cluster tells (TPU pods, Slurm, Open MPI, Kubernetes). Else it is
  "HOST:PORT,PROCESSES,RANK" with the address of process 0. ValueError for anything else.
  """
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
      f"--distributed={address!r} must be auto or HOST:PORT,PROCESSES,RANK, "
      "with a rank below the number of processes"
    ) from None
  jax.distributed.initialize(coordinator, processes, rank)


def leads() -> bool:
  """Tells whether this process is the one that writes."""
  return jax.process_index() == 0


def share(value: Any) -> list[Any]:
  """Returns the JSON-able values of all processes, by rank."""
  if jax.process_count() == 1:
    return [value]
  own = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([own.size]))[:, 0]
  # arrays that are gathered have one length
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: own.size] = own
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def to_host(x) -> np.ndarray:
  """Returns the whole array, also where other processes hold parts of it.

  Every process must call this then.
  """
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    whole = jax.NamedSharding(x.sharding.mesh, jax.P())
    x = jax.jit(lambda y: y, out_shardings=whole)(x)
  return np.asarray(x)
