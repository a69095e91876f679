"""The host's side of one jailed worker: how it is started, spoken to and ended.

A `Worker` is the process of `jail.py` behind a socket. What comes back over that socket or through the memory files is
untrusted: a struct of numbers and bytes up to a cap. Every wait has a deadline. A worker that dies, falls silent or
answers nonsense raises `WorkerLost` and must be replaced.
"""

import dataclasses
import fcntl
import functools
import glob
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time

from sdpo_jax.sandbox import jail_filter
from sdpo_jax.sandbox.verdict import Limits, Outcome

STDIN, FUNCTION, EXPRESSION = 0, 1, 2  # jail.py has the same three, and the same two structs


JOB = struct.Struct("=ddQQB")


DONE = struct.Struct("=iBddQ")


# C stack of a program: recursion through C functions is common in contest code
STACK_KB = 256 << 10


START_S = 20.0  # for a worker to come up


GRACE_S = 1.0  # for a worker to answer after the test's own deadline


FIRST_UID, UIDS = 61000, 4000


SPARE_PROCESSES = 512  # allowed on top of those a shared uid has at the start


STAGING_S = 60.0  # within which a directory is locked, once it is there


_STAGE_PREFIX = "sdpo-sandbox-"


_JAIL = pathlib.Path(__file__).with_name("jail.py")


_UNNEEDED = (
  "test",
  "site-packages",
  "dist-packages",
  "idlelib",
  "tkinter",
  "turtledemo",
  "lib2to3",
  "ensurepip",
)


class WorkerLost(Exception):
  """The worker died, fell silent or answered nonsense."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the interpreter and the packages lie on the host."""

  executable: str
  prefix: str
  stdlib: str
  loader: str  # the dynamic linker that the executable names
  libraries: tuple[str, ...]  # directories of shared libraries outside the prefix
  # directories to import third-party packages from, each one package
  packages: tuple[str, ...]
  # PYTHONHOME, where the interpreter is not to look around its executable
  home: str = ""


@functools.cache
def find_layout(packages: tuple[str, ...]) -> Layout:
  executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
  with open(executable, "rb") as f:
    loader = re.search(rb"(/[\w./-]*/ld-[\w.-]*so[\w.]*)\0", f.read(1 << 16))
  libraries = set()
  with open("/proc/self/maps") as f:
    for line in f:
      if re.search(r"/(libc|libm|libpython[\w.]*|libffi|libz|libstdc\+\+)[-.\w]*so", line):
        directory = os.path.dirname(os.path.realpath(line.split(maxsplit=5)[5].strip()))
        if "-packages" not in directory:
          libraries.add(directory)
  found = []
  for name in packages:
    spec = importlib.util.find_spec(name)
    if spec is not None:
      home = spec.submodule_search_locations[0]
      found += [home] + glob.glob(os.path.join(os.path.dirname(home), name + ".libs"))
  return Layout(
    executable,
    sys.base_prefix,
    os.path.dirname(os.path.realpath(os.__file__)),
    loader[1].decode() if loader else "",
    tuple(sorted(libraries)),
    tuple(found),
  )


def installed(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


_uids = itertools.count(os.getpid() * 61)  # so that two trainers on one machine rarely meet


def worker_uid() -> int:
  """Another uid for each worker when root can give it one, else 0: stay who we are."""
  return FIRST_UID + next(_uids) % UIDS if os.geteuid() == 0 else 0


class StageDirectory:
  """A directory for `stage`, locked while its process lives. cleanup() removes it; so does the end of the interpreter, and of a killed one `remove_abandoned`."""

  def __init__(self):
    self._directory = tempfile.TemporaryDirectory(prefix=_STAGE_PREFIX)
    self.name = self._directory.name
    self._lock = os.open(self.name, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(self._lock, fcntl.LOCK_EX)

  def cleanup(self) -> None:
    self._directory.cleanup()
    os.close(self._lock)


def remove_abandoned() -> None:
  """Removes what processes that were killed could not: directories of ours that nobody has locked."""
  for path in glob.glob(os.path.join(tempfile.gettempdir(), _STAGE_PREFIX + "*")):
    try:
      fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
      continue
    try:
      about = os.fstat(fd)
      # a younger one may be about to be locked
      if about.st_uid == os.geteuid() and time.time() - about.st_mtime > STAGING_S:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
      pass
    finally:
      os.close(fd)


def stage(layout: Layout, directory: str) -> Layout:
  """The layout with copies of what an unprivileged uid could not reach, e.g. a Python below /root."""
  ignore = shutil.ignore_patterns(*_UNNEEDED, "config-*", "*.a")
  os.chmod(directory, 0o755)

  def reachable(path):
    target = pathlib.Path(path)
    return (
      all(p.stat().st_mode & stat.S_IXOTH for p in (target, *target.parents))
      and target.stat().st_mode & stat.S_IROTH
    )

  def copied(path, name):
    if reachable(path):
      return path
    target = os.path.join(directory, name)
    shutil.copytree(path, target, ignore=ignore)
    return target

  # The executable needs no copy: it is started before the uid changes.
  stdlib = copied(layout.stdlib, os.path.join(sys.platlibdir, os.path.basename(layout.stdlib)))
  return dataclasses.replace(
    layout,
    stdlib=stdlib,
    home=directory if stdlib != layout.stdlib else "",
    packages=tuple(
      copied(p, os.path.join("packages", os.path.basename(p))) for p in layout.packages
    ),
  )


@dataclasses.dataclass(frozen=True)
class _View:
  """One worker's world: how to start the interpreter in it, and the paths as they are there."""

  command: list[str]  # up to and with the interpreter
  script: str
  stdlib: str
  packages: list[str]
  readable: list[str]  # for Landlock, besides the standard library


_DEVICES = ["/dev/null", "/dev/urandom"]


def _shared_objects(directory: str) -> list[str]:
  return glob.glob(os.path.join(directory, "lib*.so*"))


def _own(layout: Layout, directory: str) -> bool:
  """Whether the directory is a self-contained Python's own, which holds more than shared libraries."""
  return layout.prefix != "/usr" and directory.startswith(layout.prefix + "/lib")


def _plain_view(layout: Layout) -> _View:
  libraries = [
    p for d in layout.libraries for p in (_shared_objects(d) if _own(layout, d) else [d])
  ]
  return _View(
    [layout.executable],
    str(_JAIL),
    layout.stdlib,
    list(layout.packages),
    [
      *libraries,
      *[p for p in ["/etc/ld.so.cache", *_DEVICES] if os.path.exists(p)],
      *layout.packages,
    ],
  )


def _bubblewrap_view(layout: Layout, uid: int, with_proc: bool) -> _View:
  bwrap = shutil.which("bwrap")
  if bwrap is None:
    raise WorkerLost("bwrap is not installed (apt install bubblewrap)")
  home = f"/py/{sys.platlibdir}"
  stdlib = f"{home}/{os.path.basename(layout.stdlib)}"
  command = [
    bwrap,
    "--unshare-pid",
    "--unshare-net",
    "--unshare-ipc",
    "--unshare-uts",
    "--unshare-cgroup-try",
    "--as-pid-1",
    "--hostname",
    "sandbox",
    "--cap-drop",
    "ALL",
  ]
  # Root gives each worker a uid of its own and needs no user namespace; anyone else needs one for
  # the other namespaces.
  command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if uid else ["--unshare-user"]
  readable, bound = (
    list(_DEVICES),
    [(layout.executable, "/py/bin/python"), (str(_JAIL), "/jail.py")],
  )
  if layout.prefix == "/usr":
    bound.append((layout.stdlib, stdlib))
    libraries = list(layout.libraries)
  else:  # the shared libraries of a self-contained Python lie beside its standard library
    bound.append((os.path.join(layout.prefix, sys.platlibdir), home))
    readable += [
      p.replace(os.path.join(layout.prefix, sys.platlibdir), home, 1)
      for p in _shared_objects(os.path.join(layout.prefix, sys.platlibdir))
    ]
    libraries = [d for d in layout.libraries if not _own(layout, d)]
  packages = ["/packages/" + os.path.basename(p) for p in layout.packages]
  bound += [*zip(layout.packages, packages), *[(p, p) for p in libraries + [layout.loader] if p]]
  # Made here: those that bubblewrap makes on its own only root may enter.
  for directory in sorted(
    {str(parent) for _, there in bound for parent in pathlib.PurePosixPath(there).parents} - {"/"}
  ):
    command += ["--perms", "0755", "--dir", directory]
  for here, there in bound:
    command += ["--ro-bind", here, there]
  for name in ("site-packages", "dist-packages"):
    if os.path.isdir(os.path.join(layout.stdlib, name)):
      command += ["--tmpfs", f"{stdlib}/{name}"]
  command += ["--tmpfs", "/dev"]
  for device in _DEVICES:
    command += ["--dev-bind", device, device]
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    command += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
  if with_proc:
    command += ["--proc", "/proc"]
  command += [
    "--perms",
    "1777",
    "--size",
    str(1 << 20),
    "--tmpfs",
    "/tmp",
    "--remount-ro",
    "/dev",
    "--remount-ro",
    "/",
    "--chdir",
    "/",
    "--setenv",
    "LD_LIBRARY_PATH",
    ":".join([home, *libraries]),
    "/py/bin/python",
  ]
  return _View(command, "/jail.py", stdlib, packages, readable + libraries + packages)


def _own_processes() -> int:
  """Threads of all processes of this user: what RLIMIT_NPROC counts."""
  count = 0
  for path in glob.glob("/proc/[0-9]*"):
    try:
      if os.stat(path).st_uid == os.geteuid():
        count += len(os.listdir(path + "/task"))
    except OSError:  # it ended
      pass
  return count


class Worker:
  """One warm jailed process."""

  def __init__(self, isolation: str, layout: Layout, packages: tuple[str, ...], with_proc: bool):
    uid = worker_uid()
    layout = layout if packages else dataclasses.replace(layout, packages=())
    view = (
      _bubblewrap_view(layout, uid, with_proc) if isolation == "bubblewrap" else _plain_view(layout)
    )
    config = {
      "path": [
        view.stdlib,
        view.stdlib + "/lib-dynload",
        *sorted({os.path.dirname(p) for p in view.packages}),
      ],
      "packages": packages,
      "uid": uid,
      "processes": 0 if uid else _own_processes() + SPARE_PROCESSES,
      "filter": "" if isolation == "unsafe" else jail_filter.build().hex(),
      "landlock": None,
    }
    if isolation in ("bubblewrap", "landlock"):
      own = [
        os.path.join(view.stdlib, e.name)
        for e in os.scandir(layout.stdlib)
        if e.name not in _UNNEEDED
      ]
      # importing lists what it may not read
      config["landlock"] = {"read": own + view.readable, "list": [view.stdlib]}
    environment = {
      "LANG": "C.UTF-8",
      "TZ": "UTC",
      "HOME": "/",
      "PATH": "/usr/bin:/bin",
      "PYTHONHASHSEED": "0",
      "OPENBLAS_NUM_THREADS": "1",
      "OMP_NUM_THREADS": "1",
      "MALLOC_ARENA_MAX": "1",  # else each thread reserves 64 MB of address space
      "LD_BIND_NOW": "1",
    }  # else every child resolves the same symbols again
    if layout.home and isolation != "bubblewrap":
      environment["PYTHONHOME"] = layout.home
    # The shell sets what must hold from the first instruction on: the C stack, and who dies first
    # when memory runs out.
    shell = (
      f'ulimit -s {STACK_KB} 2>/dev/null || ulimit -s "$(ulimit -H -s)"; '
      'echo 1000 2>/dev/null > /proc/self/oom_score_adj; exec "$@"'
    )
    self.pid = None  # as the host sees it, once it said hello
    self._pidfd = None
    self._errors = os.memfd_create("errors")
    try:
      self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
      with theirs:
        # -I would also refuse PYTHONHASHSEED; -s, -P and an environment from scratch keep out
        # everything else that it does.
        self._process = subprocess.Popen(
          [
            "/bin/sh",
            "-c",
            shell,
            "sh",
            *view.command,
            "-s",
            "-P",
            "-S",
            "-B",
            "-X",
            "utf8",
            view.script,
            str(theirs.fileno()),
          ],
          env=environment,
          cwd="/",
          pass_fds=[theirs.fileno()],
          stdin=subprocess.DEVNULL,
          stdout=subprocess.DEVNULL,
          stderr=self._errors,
          start_new_session=True,
        )
    except OSError:  # no descriptor or no process left; the sockets close themselves
      os.close(self._errors)
      raise
    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    self._sock.settimeout(START_S)
    try:
      self._sock.send(json.dumps(config).encode())
    except OSError:  # it ended already; `hello` says why
      pass

  def hello(self) -> dict:
    """Waits until the worker is locked down. -> what it reached"""
    try:
      message, ancillary, _, _ = self._sock.recvmsg(1 << 16, socket.CMSG_SPACE(12))
    except OSError as e:
      raise WorkerLost(f"did not start: {e} {self._stderr()}") from e
    for _, kind, data in ancillary:
      if kind == socket.SCM_CREDENTIALS and message:
        self.pid, _, _ = struct.unpack("=iII", data)
        self._pidfd = os.pidfd_open(self.pid)
    try:
      state = json.loads(message)
    except ValueError:
      state = {"failed": self._stderr() or "the worker ended"}
    if "failed" in state:
      raise WorkerLost(state["failed"])
    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    return state

  def run(self, program_fd: int, given: str, mode: int, fn_name: str, limits: Limits) -> Outcome:
    cap = limits.output_kb << 10
    fds = []
    try:
      fds.append(memory_file(given))
      for name in ("stdout", "stderr", "result"):
        fds.append(os.memfd_create(name))
      job = (
        JOB.pack(limits.time_s, limits.wall_s, limits.memory_mb << 20, cap, mode) + fn_name.encode()
      )
      self._sock.settimeout(limits.wall_s + GRACE_S)
      try:
        socket.send_fds(self._sock, [job], [program_fd, *fds])
        answer = self._sock.recv(DONE.size + 1)
      except TimeoutError as e:
        raise WorkerLost("silent") from e
      except OSError as e:
        raise WorkerLost(str(e)) from e
      # interrupted: the answer to this test must not be taken for the next one's
      except BaseException:
        self.kill()
        raise
      if len(answer) != DONE.size:
        raise WorkerLost(f"an answer of {len(answer)} bytes")
      status, killed, cpu_s, wall_s, max_rss_kb = DONE.unpack(answer)
      if not (math.isfinite(cpu_s) and math.isfinite(wall_s)):
        raise WorkerLost("an answer that is not a number")
      return Outcome(
        status=status,
        killed=bool(killed),
        cpu_s=cpu_s,
        wall_s=wall_s,
        max_rss_kb=max_rss_kb,
        stdout=os.pread(fds[1], cap, 0),
        result=os.pread(fds[3], cap, 0),
        capped=any(os.fstat(fd).st_size >= cap for fd in fds[1:]),
      )
    finally:
      for fd in fds:
        os.close(fd)

  def kill(self):
    """Ends the worker and everything it started. Its process namespace, or the parent-death signal, takes the test along."""
    if self._sock.fileno() < 0:
      return
    if self._pidfd is not None:
      try:
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
      except ProcessLookupError:
        pass
      os.close(self._pidfd)
      self._pidfd = None
    else:  # it never said who it is
      self._process.kill()
    self._sock.close()
    os.close(self._errors)
    self._process.wait(timeout=START_S)

  @property
  def alive(self) -> bool:
    return self._sock.fileno() >= 0 and self._process.poll() is None

  def _stderr(self) -> str:
    return os.pread(self._errors, 2000, 0).decode("utf-8", "replace").strip()


def memory_file(text: str) -> int:
  """A file without a name, holding the text, at its start. The caller closes it."""
  data = text.encode("utf-8", "replace")
  fd = os.memfd_create("text")
  try:
    done = 0
    while done < len(data):
      done += os.pwrite(fd, data[done:], done)
  except OSError:
    os.close(fd)
    raise
  return fd
