"""What an attack on the sandbox might reach, and whether it did."""

import contextlib
import gc
import os
import pathlib
import socket
import unicodedata
import uuid

import pytest


def descriptors() -> dict[str, str]:
  """Returns what each open descriptor of this process leads to.

  Compare with `left_open`: what earlier tests of the same process left behind may be collected, and
  so closed, at any moment.
  """
  gc.collect()
  opened = {}
  for fd in os.listdir("/proc/self/fd"):
    with contextlib.suppress(FileNotFoundError):  # the one that lists them
      opened[fd] = os.readlink(f"/proc/self/fd/{fd}")
  return opened


def left_open(before: dict[str, str]) -> dict[str, str]:
  """Returns the descriptors that are open now and were not `before`."""
  return dict(descriptors().items() - before.items())


class Host:
  """What an attack might reach: a file, its folder and listeners."""

  def __init__(self, folder):
    self.token = f"SBX-CANARY-TOKEN-{uuid.uuid4().hex}"
    self.mark = f"mark{uuid.uuid4().hex[:12]}"
    self.folder = folder
    folder.chmod(0o777)
    self.file = folder / "canary.txt"
    self.file.write_text(self.token)
    self.file.chmod(0o666)
    self.abstract = f"abstract-{self.mark}"
    self.reached = []
    tcp = socket.create_server(("127.0.0.1", 0))
    self.port = tcp.getsockname()[1]
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", self.port))
    stream = socket.socket(socket.AF_UNIX)
    dgram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    stream.bind("\0" + self.abstract)
    stream.listen()
    dgram.bind("\0" + self.abstract + "-dgram")
    self.listeners = [tcp, udp, stream, dgram]
    for listener in self.listeners:
      listener.setblocking(False)

  def fill(self, text):
    for name, value in (
      ("@CANARY_FILE@", self.file),
      ("@CANARY_DIR@", self.folder),
      ("@PORT@", self.port),
      ("@ABSTRACT@", self.abstract),
      ("@MARK@", self.mark),
    ):
      text = text.replace(name, str(value))
    return text

  def check(self):
    assert self.file.read_text() == self.token
    assert self.file.stat().st_mode & 0o777 == 0o666
    assert [p.name for p in self.folder.iterdir()] == ["canary.txt"]
    for place in ("/tmp", "/dev/shm", "/var/tmp", "/"):
      assert not [name for name in os.listdir(place) if self.mark in name], place
    for listener in self.listeners:
      with pytest.raises(BlockingIOError):
        listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(1)


def check_text(text, forbidden, limit=2000):
  assert len(text) <= limit
  text.encode("utf-8")
  assert not [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs")]
  for word in forbidden:
    assert word not in text


def descendants():
  """Returns the process numbers of everything below this process."""
  parents = {}
  for entry in os.listdir("/proc"):
    if entry.isdigit():
      try:
        fields = pathlib.Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
      except OSError:  # it ended
        continue
      if fields[0] != "Z":
        parents[int(entry)] = int(fields[1])
  pids, parents_of_next = set(), {os.getpid()}
  while parents_of_next:
    parents_of_next = {p for p, parent in parents.items() if parent in parents_of_next}
    pids |= parents_of_next
  return pids


def starved(verdict, limits):
  """Tells whether the wall clock ended a test before it had its CPU time.

  Sleepers end so, and everything may on a machine that others use.
  """
  last = verdict.tests[-1]
  return verdict.kind == "time_limit" and last.cpu_s < limits.time_s
