"""Threads for what worlds do: each waits for an engine process or a server, none computes.

A call that raises or takes too long is lost, and costs whoever asked for it. Python cannot end a
thread, so one that hangs in a call is left to itself, as a daemon, and another takes its place.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from typing import Any


class Lost(Exception):
  """Why a call of a world came to nothing, in a line."""

  def __init__(self, why: str, *, hangs: bool = False):
    """hangs: some thread is still in the call."""
    super().__init__(why)
    self.hangs = hangs


@dataclasses.dataclass(eq=False)
class _Call:
  """One call, from its queueing to its end, of which there is one."""

  what: str
  function: Callable[[], Any]
  then: Callable[[Any], None]
  late: Callable[[], None]
  begun: float = 0.0
  is_over: bool = False


class Worlds:
  """Makes calls in threads, in the order of `submit`. `close` ends them."""

  def __init__(self, *, threads: int, timeout_s: float):
    """timeout_s: of one call, from its begin."""
    self._threads, self._timeout_s = threads, timeout_s
    self._waiting: queue.SimpleQueue = queue.SimpleQueue()  # of calls; None ends a thread
    self._running: set[_Call] = set()
    self._lock = threading.Lock()
    self._alive = 0  # threads that take calls
    self._watched = threading.Event()  # set: the watch may end
    self._busy: list[tuple[float, float]] = []

  def submit(
    self,
    what: str,
    function: Callable[[], Any],
    then: Callable[[Any], None],
    late: Callable[[], None] = lambda: None,
  ) -> None:
    """Queues a call. Any thread may.

    Args:
      what: it is, for the log.
      function: is called.
      then: called once with what it returns, or with a Lost, in a thread of the worlds; it must
        neither raise nor wait.
      late: called when the function returns though it was given up.
    """
    with self._lock:
      if not self._alive:
        self._watched.clear()
        threading.Thread(target=self._watch, name="worlds", daemon=True).start()
      while self._alive < self._threads:
        self._start_thread()
    self._waiting.put(_Call(what, function, then, late))

  def take_busy(self) -> list[tuple[float, float]]:
    """Returns when a call was made since the last time, as (begin, end) of the clock."""
    busy, self._busy = self._busy, []
    return busy

  def close(self) -> None:
    """Ends the threads, those in a call after it."""
    self._watched.set()
    with self._lock:
      for _ in range(self._alive):
        self._waiting.put(None)
      self._alive = 0

  def _start_thread(self) -> None:
    threading.Thread(target=self._work, name="world", daemon=True).start()
    self._alive += 1

  def _work(self) -> None:
    """Makes the calls that are queued, until None is or one of them took too long."""
    while (call := self._waiting.get()) is not None:
      call.begun = time.monotonic()
      with self._lock:
        self._running.add(call)
      try:
        result = call.function()
      except Exception as error:  # whatever a world throws, the run goes on without the episode
        logging.exception("%s failed", call.what)
        result = Lost(f"{type(error).__name__}: {error}")
      if not self._end(call, result):
        with contextlib.suppress(Exception):
          call.late()
        return  # another thread has taken this one's place

  def _end(self, call: _Call, result: Any) -> bool:
    """Ends a call with a result; False if it has ended."""
    with self._lock:
      if call.is_over:
        return False
      call.is_over = True
      self._running.discard(call)
      self._busy.append((call.begun, time.monotonic()))
    call.then(result)
    return True

  def _watch(self) -> None:
    """Ends calls that take too long."""
    while not self._watched.wait(min(1.0, self._timeout_s / 4)):
      late = time.monotonic() - self._timeout_s
      with self._lock:
        hanging = [call for call in self._running if call.begun < late]
      for call in hanging:
        if self._end(call, Lost(f"no answer within {self._timeout_s:g} s", hangs=True)):
          logging.error("%s took more than %g s", call.what, self._timeout_s)
          with self._lock:
            self._start_thread()
            self._alive -= 1  # for the one that hangs
