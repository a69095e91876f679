"""A child process that is spoken to by lines, each with a deadline.

The child reads lines of its standard input and writes lines to its standard output; both are one
socket. It is started by exec, so that a large parent (a trainer with its arrays) is never forked.
What it writes to its standard error is dropped.
"""

import os
import signal
import socket
import subprocess
import threading
import time

MAX_LINE = 1 << 24  # bytes of one line of the child; a longer one is garbage


class ChildLost(Exception):
  """The child ended, was late or wrote no line. It has been killed; the message says why."""


class ChildProcess:
  """Runs one child. One thread at a time speaks to it; `kill` may come from any thread.

  environment: what differs from this process's environment variables.
  """

  def __init__(self, command: list[str], environment: dict[str, str] | None = None):
    self._socket, childs = socket.socketpair()
    with childs:
      # Its own session: an interrupt at the keyboard is this process's affair, and `kill` reaches
      # whatever the child has started.
      self._process = subprocess.Popen(
        command,
        stdin=childs,
        stdout=childs,
        stderr=subprocess.DEVNULL,
        env=os.environ | (environment or {}),
        start_new_session=True,
      )
    self._killed = False
    self._kill_lock = threading.Lock()
    self.pid = self._process.pid

  def ask(self, line: bytes, within_s: float) -> bytes:
    """Writes a line and returns the next line of the child, both without the newline.

    ChildLost unless both are done within `within_s` seconds.
    """
    deadline = time.monotonic() + within_s
    try:
      self._socket.settimeout(max(0.001, within_s))
      self._socket.sendall(line + b"\n")
    except TimeoutError:
      raise self._lost(f"read nothing within {within_s:g} s") from None
    except OSError:
      raise self._lost("ended") from None
    return self._read(deadline, within_s)

  def read(self, within_s: float) -> bytes:
    """Returns the next line of the child, without its newline. ChildLost as in `ask`."""
    return self._read(time.monotonic() + within_s, within_s)

  def _read(self, deadline: float, within_s: float) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while not pieces or not pieces[-1].endswith(b"\n"):
      try:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        pieces.append(self._socket.recv(1 << 16))
      except TimeoutError:
        raise self._lost(f"did not answer within {within_s:g} s") from None
      except OSError:
        raise self._lost("ended") from None
      size += len(pieces[-1])
      if not pieces[-1]:
        raise self._lost("ended")
      if size > MAX_LINE:
        raise self._lost(f"answered with more than {MAX_LINE} bytes")
    return b"".join(pieces)[:-1]

  def _lost(self, reason: str) -> ChildLost:
    self.kill()
    return ChildLost(reason)

  def kill(self) -> None:
    """Ends the child and all that it has started. Whoever waits for its answer gets ChildLost."""
    with self._kill_lock:
      if not self._killed:
        self._killed = True
        # Nobody has waited for the child yet, so its number is still its own.
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
    try:
      self._socket.shutdown(socket.SHUT_RDWR)
    except OSError:
      pass  # closed already

  def close(self) -> None:
    """Kills the child and closes the socket, once nobody speaks to it."""
    self.kill()
    self._socket.close()
