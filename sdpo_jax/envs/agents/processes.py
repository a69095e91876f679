"""A bounded pool of child processes that run an engine: a game, an index, whatever is slow to load.

An engine is a file with `start(**settings)`, as `engine_child.py` says; it lives in processes of
its own, so what hangs or dies there costs one request here. Two uses:

  pool.ask(request)    an engine without memory (a search index): any process answers
  seat = pool.sit()    an engine with memory (games): a conversation with one process. Other seats
                       may share the process, so requests name what they are about, as with
                       `seat.number`. `seat.leave(request)` says good-bye.

So the number of processes bounds memory and cores, never how many episodes are at work: a seat is
always free, and no episode waits for another one to end.

Failures. A process that dies, is late or answers garbage is killed, and replaced when it is next
needed. That costs the one whose request it was an EngineFailed. The others that sat there notice
nothing: what they had asked is asked again in the new process, which has to answer the same.
EngineFailed is also what an exception of the engine becomes; its process goes on then.

Waiting. One request at a time is at work in a process; others wait their turn, and the deadline of
a request counts from when it is sent. Each in front of it has its own, so every wait is bounded.
`close` ends all processes, also in the middle of a request, which then raises.
"""

import contextlib
import itertools
import json
import os
import shlex
import sys
import tempfile
import threading
from typing import Any

from sdpo_jax.envs.agents import engine_child
from sdpo_jax.envs.child_process import ChildLost, ChildProcess


class EngineFailed(RuntimeError):
  """A request has no answer, for reasons that are the engine's; the message is one line."""


class Pool:
  """Runs up to `size` processes of an engine. Any number of threads may ask.

  name: what the engine is called in messages.
  file: the path of the engine's Python file.
  settings: the keyword arguments of its `start`, of what JSON can say.
  size: processes; None for as many as there are cores.
  time_s: seconds in which a request is answered.
  start_s: seconds in which a process is ready.
  environment: environment variables of the processes, beside those of this one.
  """

  def __init__(
    self,
    name: str,
    file: str,
    settings: dict,
    *,
    size: int | None = None,
    time_s: float = 30.0,
    start_s: float = 60.0,
    environment: dict[str, str] | None = None,
  ):
    if size is None:
      size = len(os.sched_getaffinity(0))
    if size < 1:
      raise ValueError(f"a pool of {size} processes cannot run {name}: give it 1 or more")
    self.name, self.time_s, self.start_s = name, time_s, start_s
    self.command = [sys.executable, "-P", engine_child.__file__, file, json.dumps(settings)]
    self._environment = environment or {}
    self._slots = [_Slot(self) for _ in range(size)]
    self._seats = itertools.count(1)
    self._lock = threading.Lock()  # guards what follows, and how many each slot serves
    self._scratch: tempfile.TemporaryDirectory | None = None
    self._is_closed = False

  def open(self) -> None:
    """Starts all processes at once and waits for them. EngineFailed if one does not start."""
    try:
      for slot in self._slots:
        with slot.lock:
          slot.begin()
      for slot in self._slots:
        with slot.lock:
          slot.ready()
    except EngineFailed:
      self.close()
      raise

  def ask(self, request, time_s: float | None = None) -> Any:
    """Returns what any process answers. EngineFailed if it does not within `time_s`."""
    with self._serving() as slot, slot.lock:
      slot.ready()
      return slot.ask(request, time_s or self.time_s)

  def sit(self) -> "Seat":
    """Returns a seat at the process that serves the fewest."""
    with contextlib.ExitStack() as stack:
      slot = stack.enter_context(self._serving())
      return Seat(slot, next(self._seats), stack.pop_all())

  def pids(self) -> list[int]:
    """Returns the process numbers, for looking at their memory."""
    children = [slot.child for slot in self._slots]
    return [child.pid for child in children if child is not None]

  def close(self) -> None:
    """Ends all processes, for good, and removes the files that they have left."""
    with self._lock:
      self._is_closed = True
      children = [slot.child for slot in self._slots]
    for child in children:
      if child is not None:
        child.kill()
    for slot in self._slots:
      with slot.lock:  # whoever asked has been woken by the end of the process
        slot.drop()
    if self._scratch is not None:
      self._scratch.cleanup()

  @contextlib.contextmanager
  def _serving(self):
    """Yields the slot that serves the fewest, which serves one more for the time being."""
    with self._lock:
      slot = min(self._slots, key=lambda slot: slot.serves)
      slot.serves += 1
    try:
      yield slot
    finally:
      with self._lock:
        slot.serves -= 1

  def start_child(self, slot: "_Slot") -> None:
    """Gives a slot a process. EngineFailed once the pool is closed."""
    with self._lock:
      if self._is_closed:
        raise EngineFailed(f"{self.name}: its processes have been closed")
      if self._scratch is None:
        # A process that is killed leaves its temporary files behind.
        self._scratch = tempfile.TemporaryDirectory(prefix="engines_", ignore_cleanup_errors=True)
      # Sets have the same order in the process that replaces another.
      fixed = {"TMPDIR": self._scratch.name, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
      slot.child = ChildProcess(self.command, fixed | self._environment)


class _Slot:
  """A place of the pool: a process, or room for one. Used under its lock, but for `serves`."""

  def __init__(self, pool: Pool):
    self._pool = pool
    self.time_s = pool.time_s
    self.lock = threading.Lock()
    self.serves = 0  # seats and requests that have chosen this place
    self.generation = 0  # how many processes have been started here
    self.child: ChildProcess | None = None
    self._is_ready = False
    self._requests = itertools.count(1)

  def begin(self) -> None:
    """Starts a process if there is none, without waiting for it."""
    if self.child is None:
      self._is_ready = False
      self._pool.start_child(self)
      self.generation += 1

  def ready(self) -> None:
    """Waits until there is a process that answers. EngineFailed if it does not start."""
    self.begin()
    if self._is_ready:
      return
    try:
      self._answer(0, None, self._pool.start_s)
    except EngineFailed as error:
      self.drop()
      command = shlex.join(self._pool.command)
      raise EngineFailed(f"{error}; to see more of it start {command}") from None
    self._is_ready = True

  def ask(self, request, time_s: float) -> Any:
    """Has the process answer a request. EngineFailed, and its end unless the engine raised."""
    number = next(self._requests)
    line = json.dumps([number, time_s, request]).encode()
    return self._answer(number, line, time_s)

  def _answer(self, number: int, line: bytes | None, time_s: float) -> Any:
    """Sends a line, if any, and returns the result in the answer of that number."""
    assert self.child is not None
    try:
      reply = self.child.read(time_s) if line is None else self.child.ask(line, time_s)
      answer = _parse(reply, number)
    except ChildLost as error:
      self.drop()
      raise EngineFailed(f"{self._pool.name}: its process {error}") from None
    if "error" in answer:
      raise EngineFailed(f"{self._pool.name}: {answer['error']}")
    return answer["result"]

  def drop(self) -> None:
    """Ends the process, if there is one; the next who asks starts another."""
    if self.child is not None:
      self.child.close()
      self.child = None


class Seat:
  """A conversation with one process of a pool, for one thread at a time."""

  def __init__(self, slot: _Slot, number: int, place: contextlib.ExitStack):
    self.number = number  # no other seat of the pool has it
    self._slot, self._place = slot, place
    self._generation = 0  # of the process that knows the conversation
    self._past: list[tuple[Any, Any]] = []  # requests and their answers

  def ask(self, request, time_s: float | None = None) -> Any:
    """Returns the answer to the next request. EngineFailed if there is none within `time_s`."""
    slot = self._slot
    with slot.lock:
      slot.ready()
      if self._generation != slot.generation:
        self._repeat()
        self._generation = slot.generation
      answer = slot.ask(request, time_s or slot.time_s)
    self._past.append((request, answer))
    return answer

  def leave(self, request=None) -> None:
    """Gives the seat up. request: lets the process forget the conversation; it may fail."""
    slot = self._slot
    with self._place, slot.lock:
      is_known = slot.child is not None and self._generation == slot.generation
      if request is not None and is_known:
        with contextlib.suppress(EngineFailed):
          slot.ask(request, slot.time_s)

  def _repeat(self) -> None:
    """Tells a new process what the old one knew."""
    for request, answer in self._past:
      if self._slot.ask(request, self._slot.time_s) != answer:
        raise EngineFailed("a new process answers otherwise than the one that it replaces")


def _parse(line: bytes, number: int) -> dict:
  """Reads an answer. ChildLost if it is none to the request of that number."""
  try:
    answer = json.loads(line)
  except (ValueError, RecursionError):
    answer = None
  if not isinstance(answer, dict) or answer.get("number") != number:
    raise ChildLost(f"answered {line[:60]!r}, which is no answer")
  if not isinstance(answer.get("error", ""), str) or not answer.keys() & {"error", "result"}:
    raise ChildLost(f"answered {line[:60]!r}, which is no answer")
  return answer
