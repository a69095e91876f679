"""Hears that a run has to leave its machine, and says so where the run can be interrupted.

A cluster that takes a machine back sends SIGTERM and waits for some seconds. The run asks between
its phases (sampling, judging, update, evaluation) whether that has happened. `Preempted` then ends
it: training saves once, and the command exits with 143, on which a launcher starts it again.

One process hears the signal itself. Of several, each machine may get it at another moment; jax's
preemption service makes them agree on the question at which all of them stop.
"""

import os
import signal

import jax
from jax.experimental import multihost_utils

from sdpo_jax.errors import Preempted


class Notice:
  """Tells whether this run was asked to stop. A context, within which SIGTERM only leaves word.

  Before it, SIGTERM ends a single process at once: there is nothing to save. `then` is what the
  message of Preempted says about the next start.
  """

  def __init__(self, then: str = ""):
    self._message = ": ".join(filter(None, ["asked to stop (SIGTERM)", then]))
    self._asked = 0  # questions so far; every process asks equally often
    self._came = False
    self._previous = None

  def __enter__(self):
    # with several processes jax's service has the signal, and a handler here would hide it
    if not jax.distributed.is_initialized():
      self._previous = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_):
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)
      self._previous = None

  def _note(self, *_) -> None:
    if not self._came:
      # a signal may come in the middle of a print, which must not be entered twice
      os.write(2, b"asked to stop (SIGTERM): this phase is finished, then the run is saved\n")
    self._came = True

  def check(self) -> None:
    """Raises Preempted once the run is asked to stop. Every process must call it equally often."""
    self._asked += 1
    if jax.distributed.is_initialized():
      self._came = multihost_utils.reached_preemption_sync_point(self._asked)
    if self._came:
      raise Preempted(self._message)
