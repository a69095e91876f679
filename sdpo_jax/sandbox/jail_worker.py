"""The host's side of one jailed worker: how it is started, spoken to and ended.

A `Worker` is the process of `jail.py` behind a socket. What comes back over that socket or through
the memory files is untrusted: a struct of numbers, and bytes up to a cap. Every wait has a
deadline. A worker that dies, falls silent or answers nonsense raises `WorkerLost` and must be
replaced.
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
import threading
import time

from sdpo_jax.sandbox import jail_filter
from sdpo_jax.sandbox.verdict import Limits, Outcome

# jail.py holds these too, for it runs alone in the jail.
STDIN, FUNCTION, EXPRESSION, CALLS, CHECK = 0, 1, 2, 3, 4  # modes
STOP = b"stop"
# CPU seconds, wall seconds, memory bytes, output bytes, mode, whether names are given
JOB = struct.Struct("=ddQQB?")
DONE = struct.Struct("=iBddQ")  # wait status, killed, CPU seconds, wall seconds, resident KiB

STACK_KB = 256 << 10  # C stack of a program: recursion through C functions is common in contests
START_S = 20.0  # for a worker to come up
GRACE_S = 1.0  # for a worker to answer after the test's own deadline
FIRST_UID, UIDS = 61000, 4000
SPARE_PROCESSES = 512  # allowed on top of those a shared uid has at the start
STAGING_S = 60.0  # within which a directory is locked, once it is there

_STAGE_PREFIX = "sdpo-sandbox-"
_JAIL = pathlib.Path(__file__).with_name("jail.py")
_DEVICES = ["/dev/null", "/dev/urandom"]
# parts of the standard library that no program needs
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
  """The worker died, fell silent or answered nonsense. `worker` is it, once it has started."""

  def __init__(self, reason: str, worker=None):
    super().__init__(reason)
    self.worker = worker


# What a worker needs of the host's files.


@dataclasses.dataclass(frozen=True)
class PythonLayout:
  """Says where the interpreter and the packages lie on the host."""

  executable: str
  prefix: str
  stdlib: str
  loader: str  # the dynamic linker that the executable names; "" if it names none
  libraries: tuple[str, ...]  # directories of shared libraries outside the prefix
  packages: tuple[str, ...]  # directories of third-party packages, and of their libraries
  home: str = ""  # PYTHONHOME, where the interpreter is not to look around its executable


@functools.cache
def find_layout(packages: tuple[str, ...]) -> PythonLayout:
  """Finds this interpreter, its shared libraries, and the packages that are installed."""
  executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
  with open(executable, "rb") as f:
    loader = re.search(rb"(/[\w./-]*/ld-[\w.-]*so[\w.]*)\0", f.read(1 << 16))
  directories = []
  for name in packages:
    spec = importlib.util.find_spec(name)
    if spec is not None:
      directory = spec.submodule_search_locations[0]
      directories.append(directory)
      directories += glob.glob(os.path.join(os.path.dirname(directory), name + ".libs"))
  return PythonLayout(
    executable=executable,
    prefix=sys.base_prefix,
    stdlib=os.path.dirname(os.path.realpath(os.__file__)),
    loader=loader[1].decode() if loader else "",
    libraries=_linked_libraries(),
    packages=tuple(directories),
  )


def _linked_libraries() -> tuple[str, ...]:
  """Returns the directories of the shared libraries that this process has mapped."""
  libraries = set()
  with open("/proc/self/maps") as f:
    for line in f:
      if re.search(r"/(libc|libm|libpython[\w.]*|libffi|libz|libstdc\+\+)[-.\w]*so", line):
        directory = os.path.dirname(os.path.realpath(line.split(maxsplit=5)[5].strip()))
        if "-packages" not in directory:
          libraries.add(directory)
  return tuple(sorted(libraries))


def installed(name: str) -> bool:
  """Tells whether a package is installed here, without importing it."""
  return importlib.util.find_spec(name) is not None


class StageDirectory:
  """Holds a directory for `stage`, locked while its process lives.

  `cleanup` removes it, and so does the end of the interpreter. What a killed process leaves,
  `remove_abandoned` removes.
  """

  def __init__(self):
    self._directory = tempfile.TemporaryDirectory(prefix=_STAGE_PREFIX)
    self.name = self._directory.name
    self._lock = os.open(self.name, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(self._lock, fcntl.LOCK_EX)

  def cleanup(self) -> None:
    """Removes the directory and unlocks it."""
    self._directory.cleanup()
    os.close(self._lock)


def remove_abandoned() -> None:
  """Removes stage directories that killed processes left: those of ours that nobody has locked."""
  for path in glob.glob(os.path.join(tempfile.gettempdir(), _STAGE_PREFIX + "*")):
    try:
      fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
      continue
    try:
      status = os.fstat(fd)
      # a younger one may be about to be locked
      if status.st_uid == os.geteuid() and time.time() - status.st_mtime > STAGING_S:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
      pass
    finally:
      os.close(fd)


def stage(layout: PythonLayout, directory: str) -> PythonLayout:
  """Copies what an unprivileged uid could not reach, e.g. a Python below /root, to the directory.

  Returns the layout with the copies. The executable needs none: it starts before the uid changes.
  """
  os.chmod(directory, 0o755)
  inner = os.path.join(sys.platlibdir, os.path.basename(layout.stdlib))
  stdlib = _reachable_copy(layout.stdlib, os.path.join(directory, inner))
  packages = [
    _reachable_copy(path, os.path.join(directory, "packages", os.path.basename(path)))
    for path in layout.packages
  ]
  home = directory if stdlib != layout.stdlib else ""
  return dataclasses.replace(layout, stdlib=stdlib, home=home, packages=tuple(packages))


def _reachable_copy(path: str, target: str) -> str:
  """Returns the path if every user can reach it, else the target, to which it copies the folder."""
  place = pathlib.Path(path)
  enterable = all(p.stat().st_mode & stat.S_IXOTH for p in (place, *place.parents))
  if enterable and place.stat().st_mode & stat.S_IROTH:
    return path
  shutil.copytree(path, target, ignore=shutil.ignore_patterns(*_UNNEEDED, "config-*", "*.a"))
  return target


# The world that a worker sees.


@dataclasses.dataclass(frozen=True)
class _View:
  """Describes one worker's world.

  It says how to start the interpreter in it; the paths are as they are there.
  """

  command: list[str]  # up to and with the interpreter
  script: str
  stdlib: str
  packages: list[str]
  readable: list[str]  # for Landlock, besides the standard library


def _shared_objects(directory: str) -> list[str]:
  return glob.glob(os.path.join(directory, "lib*.so*"))


def _is_pythons_own(layout: PythonLayout, directory: str) -> bool:
  """Tells whether it is a self-contained Python's own folder, with more than libraries in it."""
  return layout.prefix != "/usr" and directory.startswith(layout.prefix + "/lib")


def _plain_view(layout: PythonLayout) -> _View:
  """Describes the host's own file system, of which Landlock leaves readable what is listed."""
  readable = []
  for directory in layout.libraries:
    if _is_pythons_own(layout, directory):
      readable += _shared_objects(directory)
    else:
      readable.append(directory)
  readable += [path for path in ["/etc/ld.so.cache", *_DEVICES] if os.path.exists(path)]
  readable += layout.packages
  return _View([layout.executable], str(_JAIL), layout.stdlib, list(layout.packages), readable)


def _bubblewrap_view(layout: PythonLayout, uid: int, with_proc: bool) -> _View:
  """Describes a file system of the interpreter, the standard library and the packages alone.

  Raises WorkerLost if bubblewrap is not installed.
  """
  bwrap = shutil.which("bwrap")
  if bwrap is None:
    raise WorkerLost("bwrap is not installed (apt install bubblewrap)")
  home = f"/py/{sys.platlibdir}"
  stdlib = f"{home}/{os.path.basename(layout.stdlib)}"
  readable = list(_DEVICES)
  bound = [(layout.executable, "/py/bin/python"), (str(_JAIL), "/jail.py")]  # (here, there)
  if layout.prefix == "/usr":
    bound.append((layout.stdlib, stdlib))
    libraries = list(layout.libraries)
  else:  # the shared libraries of a self-contained Python lie beside its standard library
    own = os.path.join(layout.prefix, sys.platlibdir)
    bound.append((own, home))
    readable += [path.replace(own, home, 1) for path in _shared_objects(own)]
    libraries = [d for d in layout.libraries if not _is_pythons_own(layout, d)]
  packages = ["/packages/" + os.path.basename(path) for path in layout.packages]
  bound += zip(layout.packages, packages, strict=True)
  bound += [(path, path) for path in [*libraries, layout.loader] if path]
  masked = [
    f"{stdlib}/{name}"
    for name in ("site-packages", "dist-packages")
    if os.path.isdir(os.path.join(layout.stdlib, name))
  ]
  command = [
    bwrap,
    *_namespace_options(uid),
    *_file_system_options(bound, masked, with_proc),
    *("--chdir", "/"),
    *("--setenv", "LD_LIBRARY_PATH", ":".join([home, *libraries])),
    "/py/bin/python",
  ]
  return _View(command, "/jail.py", stdlib, packages, readable + libraries + packages)


def _namespace_options(uid: int) -> list[str]:
  """Returns bubblewrap's options for namespaces and capabilities."""
  options = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
  options += ["--unshare-cgroup-try", "--as-pid-1", "--hostname", "sandbox", "--cap-drop", "ALL"]
  # Root gives each worker a uid of its own and needs no user namespace; anyone else needs one for
  # the other namespaces.
  if uid:
    return options + ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
  return options + ["--unshare-user"]


def _file_system_options(
  bound: list[tuple[str, str]], masked: list[str], with_proc: bool
) -> list[str]:
  """Returns bubblewrap's options for the file system.

  `bound` are paths (here, there) to show read-only; `masked` are folders to cover with empty ones.
  """
  options = []
  # Made here: those that bubblewrap makes on its own only root may enter.
  parents = {str(parent) for _, there in bound for parent in pathlib.PurePosixPath(there).parents}
  for directory in sorted(parents - {"/"}):
    options += ["--perms", "0755", "--dir", directory]
  for here, there in bound:
    options += ["--ro-bind", here, there]
  for directory in masked:
    options += ["--tmpfs", directory]
  options += ["--tmpfs", "/dev"]
  for device in _DEVICES:
    options += ["--dev-bind", device, device]
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    options += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
  if with_proc:
    options += ["--proc", "/proc"]
  options += ["--perms", "1777", "--size", str(1 << 20), "--tmpfs", "/tmp"]
  return options + ["--remount-ro", "/dev", "--remount-ro", "/"]


# The worker's process.


_uids = itertools.count(os.getpid() * 61)  # so that two trainers on one machine rarely meet


def worker_uid() -> int:
  """Returns another uid for each worker when root can give it one, else 0: stay who we are."""
  return FIRST_UID + next(_uids) % UIDS if os.geteuid() == 0 else 0


def _own_processes() -> int:
  """Counts the threads of all processes of this user, as RLIMIT_NPROC does."""
  count = 0
  for path in glob.glob("/proc/[0-9]*"):
    try:
      if os.stat(path).st_uid == os.geteuid():
        count += len(os.listdir(path + "/task"))
    except OSError:  # it ended
      pass
  return count


def _lock_down_config(
  isolation: str, view: _View, layout: PythonLayout, packages: tuple[str, ...], uid: int
) -> dict:
  """Returns what the worker is to lock down; `jail.lock_down` lists the keys."""
  path = [view.stdlib, view.stdlib + "/lib-dynload"]
  path += sorted({os.path.dirname(package) for package in view.packages})
  landlock = None
  if isolation in ("bubblewrap", "landlock"):
    own = [
      os.path.join(view.stdlib, entry.name)
      for entry in os.scandir(layout.stdlib)
      if entry.name not in _UNNEEDED
    ]
    # importing lists what it may not read
    landlock = {"read": own + view.readable, "list": [view.stdlib]}
  seccomp = b"" if isolation == "unsafe" else jail_filter.build()
  return {
    "path": path,
    "packages": packages,
    "uid": uid,
    "processes": 0 if uid else _own_processes() + SPARE_PROCESSES,
    "filter": seccomp.hex(),
    "landlock": landlock,
  }


def _environment(home: str) -> dict[str, str]:
  """Returns the worker's environment, from scratch. `home` is PYTHONHOME, "" for none."""
  environment = {
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "HOME": "/",
    "PATH": "/usr/bin:/bin",
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # else each thread reserves 64 MB of address space
    "LD_BIND_NOW": "1",  # else every child resolves the same symbols again
  }
  if home:
    environment["PYTHONHOME"] = home
  return environment


# The shell sets what must hold from the first instruction on: the C stack, and who dies first when
# memory runs out.
_SHELL = (
  f'ulimit -s {STACK_KB} 2>/dev/null || ulimit -s "$(ulimit -H -s)"; '
  'echo 1000 2>/dev/null > /proc/self/oom_score_adj; exec "$@"'
)
# -I would also refuse PYTHONHASHSEED; -s, -P and an environment from scratch keep out everything
# else that it does.
_PYTHON_OPTIONS = ["-s", "-P", "-S", "-B", "-X", "utf8"]


class Worker:
  """Runs programs in one warm jailed process.

  The constructor starts it and returns at once; `hello` waits until it is ready for `run`.
  `pid` is its process number as the host sees it, None before `hello`.
  """

  def __init__(
    self, isolation: str, layout: PythonLayout, packages: tuple[str, ...], with_proc: bool
  ):
    uid = worker_uid()
    layout = layout if packages else dataclasses.replace(layout, packages=())
    if isolation == "bubblewrap":
      view, home = _bubblewrap_view(layout, uid, with_proc), ""
    else:
      view, home = _plain_view(layout), layout.home
    config = _lock_down_config(isolation, view, layout, packages, uid)
    self.pid = None
    self._pidfd = None
    self._kill_lock = threading.Lock()  # `Sandbox.close` may kill what a caller's thread kills
    self._errors = os.memfd_create("errors")
    try:
      self._sock, self._process = _start(view, _environment(home), self._errors)
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
    """Waits until the worker is locked down and returns what it reached.

    Raises WorkerLost with the reason if it failed.
    """
    try:
      message, ancillary, _, _ = self._sock.recvmsg(1 << 16, socket.CMSG_SPACE(12))
    except OSError as e:
      raise WorkerLost(f"did not start: {e} {self._stderr()}", self) from e
    for _, kind, data in ancillary:
      if kind == socket.SCM_CREDENTIALS and message:
        self.pid, _, _ = struct.unpack("=iII", data)
        self._pidfd = os.pidfd_open(self.pid)
    try:
      state = json.loads(message)
    except ValueError:
      state = {"failed": self._stderr() or "the worker ended"}
    if "failed" in state:
      raise WorkerLost(state["failed"], self)
    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    return state

  def run(self, job: "Job") -> Outcome:
    """Runs a program once, in a fresh process, and returns what that left behind.

    Raises WorkerLost if there is no answer by the test's deadline or no sensible one.
    """
    with self.begin(job) as run:
      return run.finish()

  def begin(self, job: "Job") -> "Run":
    """Starts a program in a fresh process; nothing else can run here until its `Run` has ended."""
    return Run(self, job)

  def send(self, message: bytes, fds: list[int]) -> None:
    """Sends a message with descriptors. Raises WorkerLost if the worker has ended."""
    try:
      socket.send_fds(self._sock, [message], fds)
    except OSError as e:
      raise WorkerLost(str(e), self) from e

  def answer(self, deadline: float) -> bytes:
    """Returns the answer to the job, which has the size of DONE. Raises WorkerLost."""
    self._sock.settimeout(max(0.01, deadline - time.monotonic()))
    try:
      answer = self._sock.recv(DONE.size + 1)
    except TimeoutError as e:
      raise WorkerLost("silent", self) from e
    except OSError as e:
      raise WorkerLost(str(e), self) from e
    if len(answer) != DONE.size:
      raise WorkerLost(f"an answer of {len(answer)} bytes", self)
    return answer

  def kill(self):
    """Ends the worker and everything it started.

    Its process namespace, or the parent-death signal, takes the test along.
    """
    with self._kill_lock:
      if self._sock.fileno() < 0:
        return
      if self._pidfd is not None:
        try:
          signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
          pass
        os.close(self._pidfd)
        self._pidfd = None
      else:  # `hello` never learned its process number
        self._process.kill()
      self._sock.close()
      os.close(self._errors)
    self._process.wait(timeout=START_S)

  @property
  def alive(self) -> bool:
    """Tells whether the worker still runs."""
    return self._sock.fileno() >= 0 and self._process.poll() is None

  def _stderr(self) -> str:
    return os.pread(self._errors, 2000, 0).decode("utf-8", "replace").strip()


@dataclasses.dataclass(frozen=True)
class Job:
  """Says what a worker is to run."""

  program_fd: int
  input_text: str  # standard input, JSON arguments, the expression or a check's job
  mode: int
  limits: Limits
  fn_name: str = ""
  gives_names: bool = False  # those that graders import before a program starts
  pipes: tuple[int, ...] = ()  # of a check and what it calls: to write to, to read from

  @property
  def wall_s(self) -> float:
    """Returns the wall time after which the worker ends it.

    What a check calls also waits while the check computes, whose limit is to come first.
    """
    return self.limits.wall_s + (GRACE_S if self.mode == CALLS else 0)


class Run:
  """Is one program at work in a worker: a context that ends with it."""

  def __init__(self, worker: Worker, job: Job):
    self._worker = worker
    self._cap = job.limits.output_kb << 10
    self._deadline = time.monotonic() + job.wall_s + GRACE_S
    self._fds = []  # input, stdout, stderr, result
    self._is_at_work = False
    try:
      self._open(job)
    except BaseException:
      self.close()
      raise

  def _open(self, job: Job) -> None:
    self._fds.append(memory_file(job.input_text))
    for name in ("stdout", "stderr", "result"):
      self._fds.append(os.memfd_create(name))
    numbers = JOB.pack(
      job.limits.time_s,
      job.wall_s,
      job.limits.memory_mb << 20,
      self._cap,
      job.mode,
      job.gives_names,
    )
    # before it is sent: an interrupt may come in between
    self._is_at_work = True
    self._worker.send(numbers + job.fn_name.encode(), [job.program_fd, *self._fds, *job.pipes])

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    """Ends the program if it is still at work, and closes the files."""
    try:
      if kind is None and self._is_at_work:
        self._worker.send(STOP, [])
        self.finish()
    finally:
      self.close()

  def finish(self) -> Outcome:
    """Waits until the program ends and returns what it left behind."""
    answer = self._worker.answer(self._deadline)
    self._is_at_work = False
    status, killed, cpu_s, wall_s, max_rss_kb = DONE.unpack(answer)
    if not (math.isfinite(cpu_s) and math.isfinite(wall_s)):
      raise WorkerLost("an answer that is not a number", self._worker)
    stdout = os.pread(self._fds[1], self._cap, 0)
    result = os.pread(self._fds[3], self._cap, 0)
    return Outcome(
      status=status,
      killed=bool(killed),
      cpu_s=cpu_s,
      wall_s=wall_s,
      max_rss_kb=max_rss_kb,
      stdout=stdout,
      result=result,
      capped=any(os.fstat(fd).st_size >= self._cap for fd in self._fds[1:]),
    )

  def close(self) -> None:
    """Closes the files, and ends a worker whose program is still at work.

    It would take the answer to this test for the next one's.
    """
    for fd in self._fds:
      os.close(fd)
    self._fds.clear()
    if self._is_at_work:
      self._worker.kill()


def _start(view: _View, environment: dict[str, str], errors: int):
  """Starts jail.py in its view. Returns (the host's end of its socket, the process).

  Popen starts it by vfork and exec, so that a large parent is never copied. Raises OSError.
  """
  ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  with theirs:
    script = [*_PYTHON_OPTIONS, view.script, str(theirs.fileno())]
    process = subprocess.Popen(
      ["/bin/sh", "-c", _SHELL, "sh", *view.command, *script],
      env=environment,
      cwd="/",
      pass_fds=[theirs.fileno()],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=errors,
      start_new_session=True,
    )
  return ours, process


def memory_file(text: str) -> int:
  """Makes a file without a name that holds the text, at its start. The caller closes it."""
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
