"""What the processes of one run share: plain values, over the devices' own network; and their end.

Every process runs the same loop on the same data. What one of them alone knows (a verdict), all
have to hear before they go on. With one process nothing is sent. Every process must call `share`
equally often and in the same order.

They also end together. A process that waits for one that is gone would wait for ever: jax notices
a lost machine after some minutes, and an exception in one process not before its end. So each
process has a thread that tells the others once a second that it is there, in the store of jax's
coordinator, and that looks after them:

  another one failed        the same exit status as that one's, and its message
  another one fell silent   exit status `LOST_PEER`, which a launcher starts again
  the coordinator is gone   jax aborts the process, with the same status
"""

import atexit
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

PEER_TIMEOUT_S = 100
LOST_PEER = 134  # as of a process that jax aborts, by SIGABRT
_BEAT_S = 1.0
_LEAVE_S = 10.0  # that the coordinator waits for the others to end before it
_NAMES = "sdpo_jax/"  # of our entries in the coordinator's store
# What collectives and the coordinator's clients say when the other end is gone.
_LOST = re.compile(
  "gloo|NCCL|Connection (closed|reset) by peer|coordination service|CoordinationService|"
  "Socket closed|another task died",
  re.IGNORECASE,
)


def start(address: str, peer_timeout_s: int = PEER_TIMEOUT_S) -> None:
  """Joins the processes of a run, before any device is used.

  `address` is "auto" where the cluster tells (TPU pods, Slurm, Open MPI, Kubernetes). Else it is
  "HOST:PORT,PROCESSES,RANK" with the address of process 0. ValueError for anything else.
  A process that is silent for `peer_timeout_s` seconds is taken for lost, also one that has not
  joined so long after this one began to wait.
  """
  coordinator, processes, rank = (None, None, None) if address == "auto" else _parse(address)
  patience = threading.Timer(peer_timeout_s, _give_up, (address, peer_timeout_s))
  patience.daemon = True
  patience.start()
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      rank,
      local_device_ids=_gpus_of_a_whole_node(),
      initialization_timeout=peer_timeout_s + 20,  # on which jax aborts, with no word of ours
      # jax's own notice is only for what ours cannot see: a thread that does not run either
      heartbeat_timeout_seconds=peer_timeout_s + 20,
      shutdown_timeout_seconds=peer_timeout_s,
    )
  finally:
    patience.cancel()
  if jax.process_count() > 1:
    watch = _Watch(peer_timeout_s)
    watch.start()
    atexit.register(watch.end)


def _give_up(address: str, waited_s: int) -> None:
  """Ends this process, which waits for others in jax, where no exception could reach it."""
  print(
    f"sdpo_jax: --distributed={address}: after {waited_s} s not all processes have joined",
    file=sys.stderr,
    flush=True,
  )
  os._exit(LOST_PEER)


def _parse(address: str) -> tuple[str, int, int]:
  """Returns (HOST:PORT, PROCESSES, RANK)."""
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
  return coordinator, processes, rank


def _gpus_of_a_whole_node() -> list[int] | None:
  """Returns the numbers of this node's GPUs if Slurm has given them all to this one process.

  Else None: jax decides. Under Slurm it gives each process one GPU, so that with one process a node
  the others would stay idle, and nobody would say so.
  """
  tasks, gpus = os.environ.get("SLURM_NTASKS_PER_NODE"), os.environ.get("SLURM_GPUS_ON_NODE", "")
  if tasks != "1" or not gpus.isdecimal() or "JAX_LOCAL_DEVICE_IDS" in os.environ:
    return None
  return list(range(int(gpus)))


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


def connect(mesh: jax.sharding.Mesh) -> None:
  """Makes the connections of a mesh on CPUs, while all processes are at the same place.

  The first sum over some devices fails where a process comes to it 30 seconds after another one,
  as when one of them has to compile what the other finds compiled. Later sums wait.
  """
  if jax.process_count() == 1 or jax.default_backend() != "cpu":
    return
  share(None)
  axes = [axis for axis, size in mesh.shape.items() if size > 1]
  subsets = [itertools.combinations(axes, count) for count in range(1, len(axes) + 1)]
  for summed in itertools.chain.from_iterable(subsets):
    zeros = np.zeros(math.prod(mesh.shape[axis] for axis in summed))
    split = jax.NamedSharding(mesh, jax.P(summed))
    x = jax.make_array_from_callback(zeros.shape, split, zeros.__getitem__)
    jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))(x).block_until_ready()


def to_host(x) -> np.ndarray:
  """Returns the whole array, also where other processes hold parts of it.

  Every process must call this then.
  """
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    if x.is_fully_replicated:
      return np.asarray(x.addressable_data(0))
    whole = jax.NamedSharding(x.sharding.mesh, jax.P())
    x = jax.jit(lambda y: y, out_shardings=whole)(x)
  return np.asarray(x)


# ---- the end of a run of several processes -------------------------------------------------------


def are_several() -> bool:
  """Tells whether this process is one of several, without asking for devices."""
  return jax.distributed.is_initialized() and _count() > 1


def blames_a_peer(error: BaseException) -> bool:
  """Tells whether an error says that another process of the run is gone."""
  while error is not None:
    if _LOST.search(str(error)):
      return True
    error = error.__cause__
  return False


def follow_a_peer() -> None:
  """Ends this process as another one has ended, if that one has said why; else it returns.

  What a process says stands in the store before its connections close.
  """
  try:
    ended = _get("ended")
  except Exception:  # the coordinator is gone, and with it what it knew
    return
  _follow(ended)


def _follow(ended: dict[int, str]) -> None:
  ended.pop(_rank(), None)
  for rank, text in sorted(ended.items()):
    status, message = json.loads(text)
    print(f"sdpo_jax: process {rank} of this run ended: {message}", file=sys.stderr)
    leave(status, f"process {rank} ended")


def leave(status: int, message: str) -> None:
  """Ends this process, and with it the others, with this exit status and message.

  It does not return, and waits for no exit barrier: the others may never come to theirs.
  """
  _set("ended", json.dumps([status, message]))
  if _rank() == 0:
    # a coordinator that is gone would abort the others before they have said why they end
    deadline = time.monotonic() + _LEAVE_S
    while len(_get("ended")) < _count() and time.monotonic() < deadline:
      time.sleep(0.1)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


class _Watch(threading.Thread):
  """Tells the other processes that this one is there, and ends it when one of them is not."""

  def __init__(self, timeout_s: float):
    super().__init__(name="peers", daemon=True)
    self.timeout_s = timeout_s
    self._is_over = threading.Event()
    self._beats = {}  # rank -> (its last beat, when it was first seen here)

  def end(self) -> None:
    """Leaves the run with all others, watched up to then, and waits until the thread is through.

    jax waits for the others so long as `shutdown_timeout_seconds`, and process 0 may write a report
    for longer: so all wait here before, where silence alone counts. A thread that still calls the
    coordinator while the interpreter ends would abort the process.
    """
    try:
      _set("through", "")
      while len(_get("through")) < _count():
        time.sleep(0.1)
      jax.distributed.shutdown()
    finally:
      self._is_over.set()
      self.join()

  def run(self):
    """Beats and looks until the process leaves the run."""
    beat = 0
    while not self._is_over.is_set():
      beat += 1
      try:
        _set("beat", str(beat))
        ended, beats = _get("ended"), _get("beat")
      except Exception:  # the coordinator is gone or leaving: jax ends this process
        return
      _follow(ended)
      self._miss(beats)
      self._is_over.wait(_BEAT_S)

  def _miss(self, beats: dict[int, str]) -> None:
    """Ends this process if another one has been silent for too long."""
    now = time.monotonic()
    for rank, beat in beats.items():
      if self._beats.get(rank, (None, 0))[0] != beat:
        self._beats[rank] = beat, now
    for rank, (_, seen) in self._beats.items():
      if rank != _rank() and now - seen > self.timeout_s:
        message = (
          f"process {rank} has been silent for {self.timeout_s:g} s and is taken for lost; "
          "the same command, in all processes, goes on from the last checkpoint"
        )
        print(f"sdpo_jax: {message}", file=sys.stderr)
        leave(LOST_PEER, message)


# jax has no public door to the store of its coordinator. All that is used of it stands here.


def _state():
  from jax._src import distributed

  return distributed.global_state


def _rank() -> int:
  return _state().process_id


def _count() -> int:
  return _state().num_processes


def _set(name: str, value: str) -> None:
  _state().client.key_value_set(f"{_NAMES}{name}/{_rank()}", value, allow_overwrite=True)


def _get(name: str) -> dict[int, str]:
  """Returns what each process has set, by rank; those that have not are left out."""
  entries = _state().client.key_value_dir_get(f"{_NAMES}{name}/")
  return {int(key.rpartition("/")[2]): value for key, value in entries}
