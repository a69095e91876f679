"""Runs inside the jail: a warm process that forks one child for each test.

It is a script, `python -S jail.py FD`, that the host never imports. It needs nothing but the
standard library. FD is one end of a SEQPACKET socket pair whose other end the host holds.
The first message is JSON and says what to lock down (see `lock_down`); the answer is JSON and
says what was achieved. After that, for each test:

  host -> here   a JOB struct, then the function's name (UTF-8);
                 descriptors: program, input, stdout, stderr, result, and for a check and what it
                 calls two pipes: one to write to, one to read from
                 STOP while a test runs ends it
  here -> host   a DONE struct: wait status, whether the watchdog killed the child,
                 CPU seconds, wall seconds, largest resident size in KiB (0: killed)

The warm process passes the descriptors on unread, so nothing of a test stays in it. No test
shares a process with another. The child takes limits, closes everything else, installs the
system-call filter, and only then reads the program. Into `result` it writes one JSON object:

  {"value": v}, {"error": [type, message, line]} or {"format": reason}

A check is the program of a data set's author. It runs in a worker of its own and calls the judged
program in another. Two pipes between them carry values, as lines of JSON: a call as
[arguments, keywords], its end as an object like the one above. Neither side ever sees the other's
code or objects, and a check takes no line of another form. Its result has two lines, the last call
with its answer and then the verdict, which is empty until there is one:

  {"call": c, "answer": a}
  {"passed": true}, {"failed": how}, {"format": reason} or {"ended": true}: the program is gone

End of file on the socket means that the host died, and ends everything.
"""

import os
import sys


def _ignore_hooks(**_):
  """Stands in for os.register_at_fork, by which modules ask to be called after every fork.

  threading renews its locks then, random its seed. That is a third of a short test's time, and
  needless in a process that forks with one thread and seeds for itself.
  """


os.register_at_fork = _ignore_hooks  # before the imports below, which would register theirs

import array
import collections.abc
import ctypes
import gc
import io
import json
import mmap
import resource
import select
import signal
import socket
import struct
import threading
import time
import types
import typing

# The host's jail_worker.py and jail_filter.py hold these too; tests/test_sandbox_jail.py compares.
JOB = struct.Struct("=ddQQB?")  # the numbers of a `Job`
DONE = struct.Struct("=iBddQ")
STDIN, FUNCTION, EXPRESSION, CALLS, CHECK = 0, 1, 2, 3, 4  # modes
STOP = b"stop"
SELF = 0x7ABCDEF1  # where the filter has the number of the process that installs it

RESULT_FD = 3
TO_PEER_FD, FROM_PEER_FD = 4, 5  # of a check and of what it calls
PROGRAM_FD = 62  # until the program is read
MAX_OPEN_FILES = 64
MAX_PROCESSES = 64
RESERVE_BYTES = 4 << 20  # given back when memory runs out, so that the error can still be reported
# without it every thread reserves as much as the main stack, and a few exhaust the memory limit
THREAD_STACK_BYTES = 16 << 20
UNREADABLE_ADDRESS_SPACE = 256 << 20  # bytes, where /proc does not say

MAX_LINE_BYTES = 1 << 20  # of one call of a check, or one answer to it
MAX_DEPTH = 100  # of a returned value
MAX_DIGITS = 50_000  # that Python writes and reads of an integer, as LiveCodeBench's grader allows
MAX_BITS = 166_000  # of a returned integer: fewer than that many digits
RECURSION_LIMIT = 50_000  # as in LiveCodeBench's grader

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR = 4, 8  # Landlock's access rights

_libc = ctypes.CDLL(None, use_errno=True)


class _SockFprog(ctypes.Structure):
  """Mirrors the kernel's `struct sock_fprog`: a filter and its number of instructions."""

  _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


class SystemCallFilter:
  """Holds a seccomp filter that is laid out but for the number of the process that installs it."""

  def __init__(self, instructions):
    """Takes an array of struct sock_filter, as bytes, with SELF for that number."""
    self._code = ctypes.create_string_buffer(instructions, len(instructions))
    self._program = _SockFprog(len(instructions) // 8, ctypes.addressof(self._code))
    # struct sock_filter: the last four of its eight bytes are the constant
    constants = [constant for _, constant in struct.iter_unpack("<II", instructions)]
    self._places = [8 * i + 4 for i, constant in enumerate(constants) if constant == SELF]

  def install(self):
    """Binds this process by the filter, or ends it with status 126."""
    for place in self._places:
      struct.pack_into("<I", self._code, place, os.getpid())
    program = ctypes.byref(self._program)
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) != 0:
      os._exit(126)


class Job(typing.NamedTuple):
  """Holds what the host asks of one child, in the order of JOB."""

  cpu_s: float
  wall_s: float
  memory: int  # bytes
  output: int  # bytes of each file
  mode: int
  gives_names: bool  # those of `STAR_IMPORTS` without an import


class Warm(typing.NamedTuple):
  """Holds what the warm process has ready for each child."""

  seccomp: SystemCallFilter | None  # None: every system call is allowed
  reserve: mmap.mmap  # memory to give back when it runs out
  address_space: int  # bytes that the bare interpreter maps
  processes: int  # RLIMIT_NPROC


# What LiveCodeBench's grader imports before a solution starts, and LeetCode's in part: everything
# of these modules, in this order, and then the modules themselves. A child gives what its program
# mentions.
STAR_IMPORTS = (
  "string re datetime collections heapq bisect copy math random statistics itertools functools "
  "operator io sys json typing"
).split()
# These two are large, so that a child imports them only if its program mentions one of their names.
_LAZY_NAMES = {
  "datetime": "MAXYEAR MINYEAR UTC date time timedelta timezone tzinfo",
  "statistics": "NormalDist StatisticsError correlation covariance fmean geometric_mean "
  "harmonic_mean linear_regression mean median median_grouped median_high median_low mode "
  "multimode pstdev pvariance quantiles stdev variance",
}
GIVEN = {}  # name -> (module, attribute; "" for the module itself): `_find_given_names` fills it
LEAN_IMPORTS = (
  "atexit",
  "bisect",
  "collections",
  "copy",
  "functools",
  "heapq",
  "itertools",
  "math",
  "operator",
  "random",
  "re",
  "string",
  "typing",
)


def main():
  """Locks this process down as the host says, reports what came of it, and serves tests."""
  # a trainer started in the background hands on an ignored SIGINT
  signal.signal(signal.SIGINT, signal.default_int_handler)
  sock = socket.socket(fileno=int(sys.argv[1]))
  config = json.loads(sock.recv(1 << 20))
  try:
    warm, achieved = lock_down(config)
  except Exception as e:  # reported to the host, which tries the next kind of isolation or refuses
    sock.send(json.dumps({"failed": f"{type(e).__name__}: {e}"}).encode())
    return
  sock.send(json.dumps(achieved).encode())
  _serve(sock, warm)


# Before the first test.


def lock_down(config):
  """Imports what tests may need, then gives up what they must not have.

  The order matters: after the restrictions the files of the standard library may be out of reach.
  `config` has these keys:

    path       list of directories for sys.path
    packages   third-party packages to import
    uid        the user to become; 0: stay who we are
    processes  RLIMIT_NPROC of a user that is not this worker's alone
    filter     the seccomp filter in hexadecimal digits; "": none
    landlock   {"read": paths, "list": directories}, or None for no Landlock

  Returns (Warm, the report for the host). Raises OSError where the kernel refuses.
  """
  _raise_descriptor_limit()
  sys.path[:] = config["path"]
  _import_modules(config["packages"])
  reserve = mmap.mmap(-1, RESERVE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  address_space = _address_space()
  landlock_abi, ruleset = 0, None
  if config["landlock"]:
    landlock_abi, ruleset = _landlock_rules(config["landlock"]["read"], config["landlock"]["list"])
  processes = config["processes"]
  if config["uid"]:
    os.setgroups([])
    os.setresgid(config["uid"], config["uid"], config["uid"])
    os.setresuid(config["uid"], config["uid"], config["uid"])
    processes = MAX_PROCESSES  # the uid is this worker's alone
  _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
  _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
  if ruleset is not None:
    _check(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
  os.chdir("/")
  threading.stack_size(THREAD_STACK_BYTES)
  sys.set_int_max_str_digits(MAX_DIGITS)
  sys.setrecursionlimit(RECURSION_LIMIT)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  _open_streams()
  sys.argv = ["program.py"]
  sys.modules["random"].seed(0)
  _warm_up()
  gc.collect()
  gc.freeze()
  achieved = {
    "landlock": landlock_abi,
    "uid": os.getuid(),
    "stack": resource.getrlimit(resource.RLIMIT_STACK)[0],
    "python": sys.version.split()[0],
  }
  seccomp = SystemCallFilter(bytes.fromhex(config["filter"])) if config["filter"] else None
  return Warm(seccomp, reserve, address_space, processes), achieved


def _raise_descriptor_limit():
  """Raises the caller's own limit of open files, which may be lower than what a test needs."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if hard < MAX_OPEN_FILES:
    raise OSError(
      f"this user may open only {hard} files (hard limit), and {MAX_OPEN_FILES} are needed"
    )
  if soft < MAX_OPEN_FILES:
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, hard))


def _import_modules(packages):
  """Imports once here what every child would import again."""
  for name in LEAN_IMPORTS + tuple(packages):
    __import__(name)
  if "numpy" in packages:
    import numpy.random

    numpy.random.seed(0)
  import _sitebuiltins
  import builtins

  # `-S` leaves these two out
  builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D")
  builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D")
  _find_given_names(vars(builtins))


def _find_given_names(builtin_names):
  """Fills GIVEN as the star imports would fill a namespace, where a later module wins.

  The built-in names are left alone: the grader imports them last but for typing.
  """
  for module in STAR_IMPORTS:
    names = _LAZY_NAMES[module].split() if module in _LAZY_NAMES else _public_names(module)
    GIVEN.update((name, (module, name)) for name in names if name not in builtin_names)
  GIVEN.update((module, (module, "")) for module in STAR_IMPORTS if module != "typing")


def _public_names(module):
  """Returns the names that a star import of the module takes."""
  public = vars(sys.modules[module])
  return public.get("__all__") or [name for name in public if not name.startswith("_")]


def _address_space():
  """Returns the bytes of address space that this process has mapped."""
  if not os.path.exists("/proc/self/statm"):
    return UNREADABLE_ADDRESS_SPACE
  with open("/proc/self/statm") as f:
    return int(f.read().split()[0]) * resource.getpagesize()


def _open_streams():
  """Gives Python its standard streams anew, as files that closing leaves open.

  A child puts its own files behind their numbers. They are opened here since that takes as long as
  a short program.
  """
  sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
  sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8")
  stderr = io.BufferedWriter(io.FileIO(2, "w", closefd=False))
  sys.stderr = io.TextIOWrapper(stderr, "utf-8", "backslashreplace", line_buffering=True)
  sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def _warm_up():
  """Does once here what every child would do: the compiler's types are made at its first use."""
  exec(compile("def f(x):\n  return f'{x:d}'\nclass C:\n  pass\nf(1)\n", "<warm>", "exec"), {})
  json.loads(json.dumps({"value": [1, 1.5, "a", None, True]}))


def _landlock_rules(readable, listable):
  """Makes the Landlock rules of the tests, which `lock_down` puts into force.

  They allow nothing in the file system but reading below `readable` and listing below `listable`;
  no TCP, no abstract sockets, no signals to processes outside.
  Returns (ABI version of the kernel's Landlock, the ruleset's descriptor).
  """
  version_flag = 1
  abi = _check(
    _libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), version_flag), "Landlock"
  )
  # struct landlock_ruleset_attr: what is forbidden unless a rule allows it, as far as the ABI goes
  file_rights = (1 << 13) - 1
  for version, bit in ((2, 13), (3, 14), (5, 15)):
    if abi >= version:
      file_rights |= 1 << bit
  fields = [file_rights]
  if abi >= 4:
    fields.append(3)  # bind and connect of TCP
  if abi >= 6:
    fields.append(3)  # abstract unix sockets and signals
  attributes = struct.pack(f"={len(fields)}Q", *fields)
  ruleset = _check(
    _libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0),
    "landlock_create_ruleset",
  )
  for path in readable:
    _allow(ruleset, path, _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE)
  for path in listable:
    _allow(ruleset, path, _READ_DIR)
  return abi, ruleset


def _allow(ruleset, path, rights):
  """Adds a rule that allows the rights below a path."""
  try:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
  except FileNotFoundError:  # a link out of the standard library to what is not here
    return
  below_path = 1
  rule = struct.pack("=Qi", rights, fd)
  _check(
    _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, below_path, rule, 0), f"landlock_add_rule {path}"
  )
  os.close(fd)


def _check(code, what):
  """Returns what a call of the C library returned. OSError with the call's name if it failed."""
  if code < 0:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")
  return code


# For each test, in the warm process.


def _serve(sock, warm):
  """Forks a child for each job from the host and reports how it ended, until the host is gone."""
  poll = select.poll()
  poll.register(sock, select.POLLIN)
  while True:
    message, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(7 * 4))
    if not message:
      return
    if message == STOP:  # the test had just ended
      continue
    fds = array.array("i")
    for _, _, data in ancillary:
      fds.frombytes(data)
    job = Job(*JOB.unpack_from(message))
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
      try:
        _child(fds, job, message[JOB.size :].decode(), warm)
      finally:
        os._exit(125)
    for fd in fds:
      os.close(fd)
    used_s = _watch(pid, start, job, sock, poll)
    if used_s is not None:
      # Before the wait: the kernel takes 50 ms to give back each GB of a killed process.
      sock.send(DONE.pack(signal.SIGKILL, True, used_s, time.monotonic() - start, 0))
    _, status, usage = os.wait4(pid, 0)
    if used_s is None:
      cpu_s = usage.ru_utime + usage.ru_stime
      sock.send(DONE.pack(status, False, cpu_s, time.monotonic() - start, usage.ru_maxrss))


def _watch(pid, start, job, sock, poll):
  """Waits for the child's end, or kills it at its limits or when the host says so.

  Returns None if it ended, else the CPU seconds that it had used when it was killed.
  """
  pidfd = os.pidfd_open(pid)
  poll.register(pidfd, select.POLLIN)
  clock = (~pid << 3) | 2  # the child's CPU clock, all its threads
  cores = os.cpu_count() or 1
  try:
    while True:
      wall_left = job.wall_s - (time.monotonic() - start)
      cpu_left = job.cpu_s - time.clock_gettime(clock)
      if wall_left <= 0 or cpu_left <= 0:
        os.kill(pid, signal.SIGKILL)
        return job.cpu_s - cpu_left
      # Threads on all cores use the rest of the CPU time this much sooner; on none of them it
      # never ends.
      wait_s = max(0.001, min(wall_left, cpu_left / cores))
      for fd, _ in poll.poll(wait_s * 1000):
        if fd == pidfd:
          return None
        os.kill(pid, signal.SIGKILL)
        if sock.recv(len(STOP)) == STOP:
          return job.cpu_s - cpu_left
        os._exit(0)  # the host is gone
  except OSError:  # it ended between two looks
    return None
  finally:
    poll.unregister(pidfd)
    os.close(pidfd)


# In the child.


def _child(fds, job, name, warm):
  """Confines this process, then runs the program in it and ends it."""
  program_fd, input_fd, stdout_fd, stderr_fd, result_fd, *pipes = fds
  _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  os.dup2(input_fd, 0)
  os.dup2(stdout_fd, 1)
  os.dup2(stderr_fd, 2)
  os.dup2(program_fd, PROGRAM_FD)
  os.dup2(result_fd, RESULT_FD)  # over the socket
  # in the order that they came in, so that none is overwritten before it is moved
  for number, pipe in enumerate(pipes, RESULT_FD + 1):
    os.dup2(pipe, number)
  os.closerange(RESULT_FD + 1 + len(pipes), PROGRAM_FD)
  os.closerange(PROGRAM_FD + 1, 1 << 16)
  _take_limits(job, warm)
  if warm.seccomp is not None:
    warm.seccomp.install()
  program = os.pread(PROGRAM_FD, os.fstat(PROGRAM_FD).st_size, 0)
  os.close(PROGRAM_FD)
  if not job.gives_names:
    globals()["GIVEN"] = {}  # to clear it would copy its pages
  run = _RUN[job.mode]
  free_reserve = warm.reserve.close
  status, record = _attempt(run, program, name, free_reserve)
  _finish(run, status, record, free_reserve)


def _take_limits(job, warm):
  """Sets the kernel's limits on this process, which bind it whatever the warm process does."""
  # more than a second behind the watchdog, which is exact; the kernel counts whole seconds
  cpu_s = int(job.cpu_s) + 2
  memory = warm.address_space + job.memory
  for which, limit in (
    (resource.RLIMIT_CPU, cpu_s),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_DATA, memory),
    (resource.RLIMIT_FSIZE, job.output),
    (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
    (resource.RLIMIT_NPROC, warm.processes),
    (resource.RLIMIT_MEMLOCK, 0),
    (resource.RLIMIT_MSGQUEUE, 0),
  ):
    resource.setrlimit(which, (limit, limit))


def _attempt(run, program, name, free_reserve):
  """Runs the program. Returns (exit status, record for the host or None), as the interpreter would.

  A program may end by sys.exit; a function or an expression must return.
  """
  try:
    return 0, run(program, name)
  except SystemExit as e:
    code = e.code
    if run is _run_stdin and code is None:
      return 0, None
    if run is _run_stdin and issubclass(type(code), int):
      return int.__index__(code) & 0xFF, None
    return 1, {"error": ["SystemExit", _message(e), _line(e)]}
  except BaseException as e:
    free_reserve()
    return 1, {"error": [type(e).__name__, _message(e), _line(e)]}


def _finish(
  run, status, record, free_reserve, *, write=os.write, encode=json.dumps, leave=os._exit
):
  """Ends the program as the interpreter would, writes the record, and leaves with the status.

  What it needs of other modules is bound here: the program may have patched every module.
  """
  try:
    if run is _run_stdin:
      # waits for the program's own threads, as the interpreter does
      threading._shutdown()
      sys.modules["atexit"]._run_exitfuncs()
    for stream in {id(s): s for s in (sys.stdout, sys.__stdout__)}.values():
      if stream is not None:
        stream.flush()
  except BaseException as e:
    free_reserve()
    record = record or {"error": [type(e).__name__, _message(e), _line(e)]}
    status = status or 1
  if record is not None:
    try:
      data = encode(record).encode() + b"\n"  # what a check kept may be longer
      while data:
        data = data[write(RESULT_FD, data) :]
    except BaseException:
      leave(status or 1)
  leave(status)


def _message(e):
  """Returns what the exception says; "" if that fails, for its class may be the program's."""
  try:
    return str(e.msg if isinstance(e, SyntaxError) else e)[:2000]
  except BaseException:
    return ""


def _line(e):
  """Returns the program's line where it happened.

  It is the innermost one of the program's own if it happened inside a library.
  """
  if isinstance(e, SyntaxError) and e.filename == "<program>":
    return e.lineno
  line, trace = None, e.__traceback__
  while trace is not None:
    if trace.tb_frame.f_code.co_filename == "<program>":
      line = trace.tb_lineno
    trace = trace.tb_next
  return line


# The modes. Each takes the program's text and a function's name, and returns a record.


def _run_stdin(program, name):
  """Runs a program that reads standard input. It returns None: what it prints is its answer."""
  module = types.ModuleType("__main__")
  sys.modules["__main__"] = module
  code = compile(program, "<program>", "exec", dont_inherit=True)
  _give(module.__dict__, _names(code))
  exec(code, module.__dict__)


def _run_function(program, name):
  """Calls the program's function, or method of class Solution, with the JSON lines of the input."""
  text = os.pread(0, os.fstat(0).st_size, 0).decode()
  arguments = [json.loads(line) for line in text.split("\n") if line.strip()]
  os.lseek(0, 0, os.SEEK_END)
  function = _callable(*_define(program, name), name)
  if function is None:
    return _no_function(name)
  try:
    return {"value": _plain(function(*arguments), MAX_DEPTH)}
  except _NotPlain as e:
    return {"format": f"the returned value {e}"}


def _run_expression(program, name):
  """Evaluates the expression that the input holds, after the program's definitions."""
  expression = os.pread(0, os.fstat(0).st_size, 0).decode()
  os.lseek(0, 0, os.SEEK_END)
  namespace, function = _define(program, name)
  if name and function is None:
    return _no_function(name)
  code = compile(expression.strip(), "<test>", "eval", dont_inherit=True)
  _give(namespace, _names(code))
  try:
    return {"value": _tagged(eval(code, namespace), MAX_DEPTH)}
  except _NotPlain as e:
    return {"format": f"the value {e}"}


def _answer_calls(program, name):
  """Calls the program's function as a check asks, until the check has ended.

  An exception is an answer too, for a check may expect one; but running out of memory ends it all.
  """
  function = _callable(*_define(program, name), name)
  if function is None:
    return _no_function(name)
  check = _Peer()
  while (line := check.receive()) is not None:
    given, keywords = json.loads(line)
    arguments = [_untagged(x) for x in given]
    try:
      keywords = {key: _untagged(x) for key, x in keywords.items()}
      answer = {"value": _tagged_answer(function(*arguments, **keywords))}
    except _NotPlain as e:
      answer = {"format": f"the returned value {e}"}
    except MemoryError:
      raise
    except Exception as e:
      answer = {"error": [type(e).__name__, _message(e), _line(e)]}
    changed = _changed(arguments, given)
    if changed is not None:
      answer["arguments"] = changed
    try:
      line = _line_of(answer)
    except _NotPlain as e:
      line = _line_of({"format": f"the returned value {e}"})
    check.send(line)
  return None


def _callable(namespace, function, name):
  """Returns the method of class Solution if there is one, else the function; None for neither.

  A class may use a function of its own name, so the method goes first.
  """
  solution = namespace.get("Solution")
  if isinstance(solution, type) and callable(getattr(solution, name, None)):
    return getattr(solution(), name)
  return function


def _changed(arguments, before):
  """Returns the arguments as they are tagged now if a call changed one of them, else None.

  An argument into which the program put an object of its own, which no check shall see, is None.
  """
  if not any(issubclass(type(x), (list, dict, set)) for x in arguments):
    return None
  now = []
  for x in arguments:
    try:
      now.append(_tagged(x, MAX_DEPTH))
    except _NotPlain:
      now.append(None)
  return now if now != before else None


def _run_check(check, name):
  """Runs the author's check, which calls the judged program or gets what the program answered.

  The input says {"seed": s} and, for a check of answers, {"arguments": tagged}. Random numbers
  differ from program to program, so that none can know what it will be asked.
  """
  job = json.loads(os.pread(0, os.fstat(0).st_size, 0))
  sys.modules["random"].seed(job["seed"])
  if "numpy" in sys.modules:
    sys.modules["numpy"].random.seed(job["seed"])
  calls = _Calls(name)
  module = types.ModuleType("check")
  sys.modules["check"] = module
  module.__dict__.update({"_sdpo_note": _Note, name: calls})
  try:
    exec(compile(check, "<program>", "exec", dont_inherit=True), module.__dict__)
    arguments = [_untagged(x) for x in job["arguments"]] if "arguments" in job else [calls]
    answer = module.__dict__["check"](*arguments)
    if answer is None or answer:
      verdict = {"passed": True}
    else:
      message = f"the check returned {answer!r}"
      verdict = {"failed": {"how": "returned", "message": message}}
  except BaseException as e:
    verdict = {"failed": _failure(e, calls)}
  calls.end()
  return verdict


def _failure(e, calls):
  """Describes for the host the exception that ended a check."""
  if isinstance(e, _NotPlain):
    return {"how": "broken", "message": str(e)}
  if e is calls.raised:
    return {"how": "program"}
  failure = {"how": "raised", "type": type(e).__name__, "message": _message(e), "line": _line(e)}
  if isinstance(e, AssertionError):
    failure["how"] = "assertion"
    if e.args and type(e.args[0]) is _Note:
      failure |= {"condition": e.args[0].condition, "wanted": e.args[0].wanted}
  return failure


class _Note:
  """Keeps what a failed assertion says: the host has put this into each assertion's message."""

  def __init__(self, condition, wanted=None, message=""):
    self.condition = condition
    self.wanted = None if wanted is None else repr(wanted[0])[:2000]
    self.message = message

  def __str__(self):
    return str(self.message)


class _Peer:
  """Exchanges lines with the other side of a check."""

  def __init__(self):
    self._received = b""  # what came after the last whole line

  def send(self, line):
    """Sends a line. BrokenPipeError if the other side has ended."""
    data = line + b"\n"
    while data:
      data = data[os.write(TO_PEER_FD, data) :]

  def receive(self):
    """Returns the next line; None if there will be none. _NotPlain if it is too long."""
    while b"\n" not in self._received:
      part = os.read(FROM_PEER_FD, 1 << 16)
      if not part:
        return None
      self._received += part
      if len(self._received) > MAX_LINE_BYTES:
        raise _NotPlain(_TOO_LONG)
    line, _, self._received = self._received.partition(b"\n")
    return line


def _line_of(value):
  """Returns the value as a line of JSON. _NotPlain if it is too long."""
  line = json.dumps(value).encode()
  if len(line) >= MAX_LINE_BYTES:
    raise _NotPlain(_TOO_LONG)
  return line


class _Calls:
  """Stands for the judged program in a check, and asks it."""

  def __init__(self, name):
    self.__name__ = name
    self.raised = None  # the program's last exception
    self._program = _Peer()
    # a check may call from several threads, one of which may outlive it
    self._turn, self._writing = threading.Lock(), threading.Lock()
    self._keep(b"null")

  def __call__(self, /, *arguments, **keywords):
    given = [_tagged(x, MAX_DEPTH) for x in arguments]
    call = _line_of([given, {key: _tagged(x, MAX_DEPTH) for key, x in keywords.items()}])
    with self._turn:
      return self._ask(arguments, call)

  def _ask(self, arguments, call):
    """Sends a call and returns its answer, or raises the program's exception."""
    self._keep(call)
    try:
      self._program.send(call)
      line = self._program.receive()
      if line is None:
        self._leave({"ended": True})
      kind, answer, changed = _read_answer(line)
    except BrokenPipeError:
      self._leave({"ended": True})
    except _NotPlain as e:
      self._leave({"format": f"the returned value {e}"})
    if kind == "format":
      self._leave({"format": answer[:2000]})
    self._keep(call, line)
    for old, now in zip(arguments, changed, strict=False):
      _replace_content(old, now)
    if kind == "error":
      self.raised = _exception(*answer[:2])
      raise self.raised
    return answer

  def _keep(self, call, answer=b"null"):
    """Keeps what was said last for the host, which reads it however this process ends."""
    line = b'{"call": %b, "answer": %b}\n' % (call, answer)
    with self._writing:
      os.pwrite(RESULT_FD, line + b"\n", 0)  # over a longer one: no verdict yet
      os.lseek(RESULT_FD, len(line), os.SEEK_SET)

  def end(self):
    """Makes room for the verdict: no thread writes any more."""
    self._writing.acquire()

  def _leave(self, verdict):
    """Ends this process with a verdict: there is no answer with which the check could go on."""
    try:
      self.end()
      os.write(RESULT_FD, json.dumps(verdict).encode() + b"\n")
    finally:
      os._exit(0)


def _read_answer(line):
  """Reads the end of a call.

  Returns ("value", the value), ("error", [type, message, line]) or ("format", reason), and the
  arguments that the call changed. _NotPlain if the program wrote something else by itself.
  """
  try:
    answer = json.loads(line.decode("ascii"))
  except RecursionError:
    raise _NotPlain("is nested too deeply") from None
  except ValueError:
    raise _NotPlain("is no JSON") from None
  try:
    changed = answer.pop("arguments", [])
    ((kind, answer),) = answer.items()
    if isinstance(changed, list):
      changed = [_untagged(x) for x in changed]
      match kind, answer:
        case "value", tagged:
          return kind, _untagged(tagged), changed
        case ("error", [str(), str(), int() | None]) | ("format", str()):
          return kind, answer, changed
  except (AttributeError, TypeError, ValueError, OverflowError):  # it has another form
    pass
  raise _NotPlain("is no answer")


class _Foreign:
  """Stands in a changed container for what cannot cross: it equals nothing."""


def _replace_content(old, new):
  """Makes a container hold what the program left in its copy of it; None: what cannot cross."""
  if new is None and type(old) in (list, dict, set):
    new = type(old)([(_Foreign(), _Foreign())])
  if type(old) is not type(new) or old == new:
    return
  if type(old) is list:
    old[:] = new
  elif type(old) in (dict, set):
    old.clear()
    old.update(new)


class ProgramException(Exception):
  """Stands in a check for an exception of the judged program that is not a built-in one."""


def _exception(name, message):
  """Returns the built-in exception of that name, for which a check may wait, or our own."""
  kind = getattr(sys.modules["builtins"], name, None)
  if name in ("StopIteration", "StopAsyncIteration"):  # would end a loop of the check as if done
    kind = None
  if isinstance(kind, type) and issubclass(kind, Exception):
    try:
      return kind(message)
    except TypeError:  # it takes more than a message
      pass
  return ProgramException(f"{name}: {message}")


def _define(program, name):
  """Runs the program's definitions.

  Returns (its namespace, its own function of that name or None). A library function is not the
  program's own, whether it was given or imported. Which one that is, is looked up before the
  program can change the library.
  """
  module = types.ModuleType("solution")
  sys.modules["solution"] = module
  code = compile(program, "<program>", "exec", dont_inherit=True)
  library = {}
  _give(library, {name})
  _give(module.__dict__, _names(code))
  exec(code, module.__dict__)
  function = module.__dict__.get(name)
  if not callable(function) or function is library.get(name):
    return module.__dict__, None
  return module.__dict__, function


def _names(code):
  """Returns every name that the code and the functions in it look up or assign."""
  names = set()
  waiting = [code]
  while waiting:
    inner = waiting.pop()
    names.update(inner.co_names)
    waiting.extend(c for c in inner.co_consts if type(c) is types.CodeType)
  return names


def _give(namespace, names):
  """Puts those of the names that graders give, and that are not there, into the namespace."""
  for name in names:
    # One look at a time: to walk over all that is given would copy its pages into every child.
    if name in GIVEN:
      module, attribute = GIVEN[name]
      value = __import__(module)
      namespace.setdefault(name, getattr(value, attribute) if attribute else value)


def _no_function(name):
  return {"format": f"the program defines no function {name}"}


# Returned values. None of the program's own methods is called: a class may override them all.


_TOO_LONG = f"is longer than {MAX_LINE_BYTES} bytes"


class _NotPlain(Exception):
  """A value has no form for the host. The message goes on after "the value"."""


def _scalar(x, kind):
  """Returns x as an exact bool, int, float, str or None, whatever its class overrides."""
  if x is None or kind is bool:
    return x
  if issubclass(kind, int):
    x = int.__index__(x)
    if x.bit_length() > MAX_BITS:
      raise _NotPlain("holds an integer with too many digits")
    return x
  if issubclass(kind, float):
    return float.__float__(x)
  if issubclass(kind, str):
    return str.__str__(x)
  if "numpy" in sys.modules and issubclass(kind, sys.modules["numpy"].generic):
    plain = x.item()
    return _scalar(plain, type(plain))
  raise _NotPlain(f"holds an object of type {kind.__name__}")


def _plain(x, depth):
  """Returns x as JSON has it: tuples become lists."""
  kind = type(x)  # not __class__, which an object may lie about
  if depth == 0:
    raise _NotPlain("is nested too deeply")
  if issubclass(kind, (list, tuple)):
    base = list if issubclass(kind, list) else tuple
    return [_plain(y, depth - 1) for y in base.__iter__(x)]
  if issubclass(kind, dict):
    plain = {}
    for key, value in dict.items(x):
      if not issubclass(type(key), str):
        raise _NotPlain(f"holds a dictionary key of type {type(key).__name__}")
      plain[str.__str__(key)] = _plain(value, depth - 1)
    return plain
  return _scalar(x, kind)


def _tagged(x, depth):
  """Returns x with its containers named, since JSON knows only two kinds of them."""
  kind = type(x)
  if depth == 0:
    raise _NotPlain("is nested too deeply")
  for base in (list, tuple, set, frozenset):
    if issubclass(kind, base):
      return {base.__name__: [_tagged(y, depth - 1) for y in base.__iter__(x)]}
  if issubclass(kind, dict):
    return {"dict": [[_tagged(k, depth - 1), _tagged(v, depth - 1)] for k, v in dict.items(x)]}
  if kind is bytes:
    return {"bytes": x.hex()}
  if kind is complex:
    return {"complex": [x.real, x.imag]}
  return _scalar(x, kind)


_ITERATED = (collections.abc.Iterator, range, type({}.keys()), type({}.values()), type({}.items()))


def _tagged_answer(x):
  """Returns what a program returned with its containers named; an iterator is one of them here."""
  if issubclass(type(x), _ITERATED):
    return {"iterator": [_tagged(y, MAX_DEPTH - 1) for y in x]}
  return _tagged(x, MAX_DEPTH)


def _untagged(tagged, depth=MAX_DEPTH):
  """Returns the value that `_tagged` wrote.

  Raises _NotPlain, ValueError, TypeError or OverflowError for what neither it nor the host would
  have written.
  """
  if depth == 0:
    raise _NotPlain("is nested too deeply")
  if isinstance(tagged, list):
    raise ValueError
  if not isinstance(tagged, dict):
    return tagged
  ((tag, items),) = tagged.items()
  match tag, items:
    case "dict", list() if all(type(pair) is list for pair in items):
      return {_untagged(key, depth - 1): _untagged(value, depth - 1) for key, value in items}
    case "bytes", str():
      return bytes.fromhex(items)
    case "complex", [float(), float()]:
      return complex(*items)
    case "int", str():  # one that is too long for the host to read
      return int(items)
    case (("list" | "tuple" | "set" | "frozenset" | "iterator"), list()):
      return _CONTAINERS[tag]([_untagged(x, depth - 1) for x in items])
  raise ValueError


_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
_RUN = {
  STDIN: _run_stdin,
  FUNCTION: _run_function,
  EXPRESSION: _run_expression,
  CALLS: _answer_calls,
  CHECK: _run_check,
}

if __name__ == "__main__":
  main()
