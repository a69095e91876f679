"""The inside of the sandbox: a warm process that forks one child for each test. Runs as a script, never imported by the host.

`python -S jail.py FD`: FD is one end of a SEQPACKET socket pair whose other end the host holds.
First message: JSON, what to lock down (see `_lock_down`). Answer: JSON, what was achieved. After that, for each test:

  host -> here   JOB struct, then the function's name (UTF-8); descriptors program, input, stdout, stderr, result
  here -> host   DONE struct: wait status, killed by the watchdog, CPU seconds, wall seconds, largest resident size in KiB (0: killed)

The warm process passes the descriptors on unread, so nothing of a test stays in it, and no test shares a process with another.
The child takes limits, closes everything else, installs the system-call filter, and only then reads the program.
Into `result` it writes JSON: {"value": v} | {"error": [type, message, line]} | {"format": why}.

Needs nothing but the standard library. End of file on the socket (the host died) ends everything.
"""

import os
import sys

# Modules ask to be called after every fork (threading renews its locks, random its seed). That is
# a third of a short test's time, and needless in a process that forks with one thread and seeds
# for itself. So this line stands before the imports below.
os.register_at_fork = lambda **_: None

import array
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

JOB = struct.Struct("=ddQQB")  # CPU seconds, wall seconds, memory bytes, output bytes, mode


DONE = struct.Struct("=iBddQ")


STDIN, FUNCTION, EXPRESSION = 0, 1, 2


SELF = 0x7ABCDEF1  # where the filter has the number of the process that installs it


RESULT_FD = 3


RESERVE_BYTES = 4 << 20  # given back when memory runs out, so that the error can still be told


MAX_DEPTH = 100  # of a returned value


MAX_BITS = 14_000  # of a returned integer: Python writes and reads 4300 decimal digits


MAX_OPEN_FILES = 64


MAX_PROCESSES = 64


# else every thread reserves as much as the main stack, and a few exhaust the memory limit
THREAD_STACK = 16 << 20


_libc = ctypes.CDLL(None, use_errno=True)


_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38


class _SockFprog(ctypes.Structure):
  _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def _check(code, what):
  if code < 0:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")
  return code


# What LeetCode's and LiveCodeBench's graders give a function without an import, less names that
# programs like to give variables.
GIVEN = {
  name: module
  for module, names in {
    "typing": "Any Callable DefaultDict Deque Dict Iterable Iterator List Optional Sequence Set Tuple Union",
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "functools": "cache cmp_to_key lru_cache reduce partial",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort",
    "itertools": "accumulate chain combinations groupby pairwise permutations product zip_longest",
    "math": "ceil comb floor gcd inf isqrt lcm sqrt",
  }.items()
  for name in names.split()
}


GIVEN_MODULES = {
  "bisect",
  "collections",
  "functools",
  "heapq",
  "itertools",
  "json",
  "math",
  "operator",
  "random",
  "re",
  "string",
  "sys",
}


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
  # a trainer started in the background hands on an ignored SIGINT
  signal.signal(signal.SIGINT, signal.default_int_handler)
  sock = socket.socket(fileno=int(sys.argv[1]))
  config = json.loads(sock.recv(1 << 20))
  try:
    state = _lock_down(config)
  except Exception as e:  # told to the host, which tries the next kind of isolation or refuses
    sock.send(json.dumps({"failed": f"{type(e).__name__}: {e}"}).encode())
    return
  sock.send(json.dumps(state).encode())
  _serve(sock, config, bytes.fromhex(config["filter"]))


def _lock_down(config):
  """Imports, then gives up what the tests must not have. The order matters: the files may be out of reach afterwards."""
  few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  if most < MAX_OPEN_FILES:
    raise OSError(
      f"this user may open only {most} files (hard limit), and {MAX_OPEN_FILES} are needed"
    )
  # the caller's own limit, which may be lower than what a test's descriptors need
  if few < MAX_OPEN_FILES:
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, most))
  sys.path[:] = config["path"]
  for name in LEAN_IMPORTS + tuple(config["packages"]):
    __import__(name)
  if "numpy" in config["packages"]:
    import numpy.random

    numpy.random.seed(0)
  import _sitebuiltins  # `-S` leaves these two out
  import builtins

  builtins.exit, builtins.quit = (
    _sitebuiltins.Quitter("exit", "Ctrl-D"),
    _sitebuiltins.Quitter("quit", "Ctrl-D"),
  )
  config["reserve"] = mmap.mmap(-1, RESERVE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  vsz = (
    int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    if os.path.exists("/proc/self/statm")
    else 0
  )
  processes = config["processes"]
  abi, ruleset = _landlock_rules(**config["landlock"]) if config["landlock"] else (0, None)
  if config["uid"]:
    os.setgroups([])
    os.setresgid(config["uid"], config["uid"], config["uid"])
    os.setresuid(config["uid"], config["uid"], config["uid"])
    processes = MAX_PROCESSES  # the uid is this worker's alone
  _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
  _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
  if ruleset is not None:
    _check(_libc.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
  os.chdir("/")
  threading.stack_size(THREAD_STACK)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  config["vsz"], config["processes"] = vsz or 256 << 20, processes
  _warm()
  gc.collect()
  gc.freeze()
  return {
    "landlock": abi,
    "uid": os.getuid(),
    "stack": resource.getrlimit(resource.RLIMIT_STACK)[0],
    "python": sys.version.split()[0],
  }


def _warm():
  """Does once here what would otherwise be done in every child: the compiler's types are made at its first use."""
  exec(compile("def f(x):\n  return f'{x:d}'\nclass C:\n  pass\nf(1)\n", "<warm>", "exec"), {})
  json.loads(json.dumps({"value": [1, 1.5, "a", None, True]}))


def _landlock_rules(read, list):
  """Nothing in the file system but reading below `read` and listing below `list`; no TCP, no abstract sockets, no
  signals out. -> ABI version, ruleset descriptor."""
  abi = _check(_libc.syscall(444, None, ctypes.c_size_t(0), 1), "Landlock")
  fs = (1 << 13) - 1
  for version, bit in ((2, 13), (3, 14), (5, 15)):
    if abi >= version:
      fs |= 1 << bit
  net = 3 if abi >= 4 else 0  # bind, connect
  scoped = 3 if abi >= 6 else 0  # abstract unix sockets, signals
  attributes = struct.pack("=QQQ", fs, net, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
  ruleset = _check(
    _libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock_create_ruleset"
  )
  # 4: read, 8: list
  for path, rights in [(p, 4 | 8 if os.path.isdir(p) else 4) for p in read] + [
    (p, 8) for p in list
  ]:
    try:
      fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:  # a link out of the standard library to what is not here
      continue
    _check(
      _libc.syscall(445, ruleset, 1, struct.pack("=Qi", rights, fd), 0), f"landlock_add_rule {path}"
    )
    os.close(fd)
  return abi, ruleset


def _serve(sock, config, seccomp):
  poll = select.poll()
  poll.register(sock, select.POLLIN)
  while True:
    message, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(5 * 4))
    if not message:
      return
    fds = array.array("i")
    for _, _, data in ancillary:
      fds.frombytes(data)
    cpu_s, wall_s, memory, output, mode = JOB.unpack_from(message)
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
      try:
        _child(fds, cpu_s, memory, output, mode, message[JOB.size :].decode(), config, seccomp)
      finally:
        os._exit(125)
    for fd in fds:
      os.close(fd)
    used_s = _watch(pid, start, cpu_s, wall_s, poll)
    # told at once: the kernel takes 50 ms to give back each GB of a killed process
    if used_s is not None:
      sock.send(DONE.pack(signal.SIGKILL, True, used_s, time.monotonic() - start, 0))
    _, status, usage = os.wait4(pid, 0)
    if used_s is None:
      sock.send(
        DONE.pack(
          status, False, usage.ru_utime + usage.ru_stime, time.monotonic() - start, usage.ru_maxrss
        )
      )


def _watch(pid, start, cpu_s, wall_s, poll):
  """Waits for the child's end, or kills it at its limits. -> None, or the CPU seconds it had used when it was killed."""
  pidfd = os.pidfd_open(pid)
  poll.register(pidfd, select.POLLIN)
  clock = (~pid << 3) | 2  # the child's CPU clock, all its threads
  cores = os.cpu_count() or 1
  try:
    while True:
      wall_left = wall_s - (time.monotonic() - start)
      cpu_left = cpu_s - time.clock_gettime(clock)
      if wall_left <= 0 or cpu_left <= 0:
        os.kill(pid, signal.SIGKILL)
        return cpu_s - cpu_left
      # Threads on all cores use the rest of the CPU time this much sooner; on none of them it never
      # ends.
      wait_s = max(0.001, min(wall_left, cpu_left / cores))
      for fd, _ in poll.poll(wait_s * 1000):
        if fd == pidfd:
          return None
        os.kill(pid, signal.SIGKILL)  # nothing is said to a busy worker: the host is gone
        os._exit(0)
  except OSError:  # it ended between two looks
    return None
  finally:
    poll.unregister(pidfd)
    os.close(pidfd)


def _child(fds, cpu_s, memory, output, mode, name, config, seccomp):
  program_fd, input_fd, stdout_fd, stderr_fd, result_fd = fds
  _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  os.dup2(input_fd, 0)
  os.dup2(stdout_fd, 1)
  os.dup2(stderr_fd, 2)
  os.dup2(program_fd, 62)
  os.dup2(result_fd, RESULT_FD)  # over the socket
  os.closerange(RESULT_FD + 1, 62)
  os.closerange(63, 1 << 16)
  seconds = int(cpu_s) + 2
  total = config["vsz"] + memory
  setrlimit = resource.setrlimit
  for which, limit in (
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, total),
    (resource.RLIMIT_DATA, total),
    (resource.RLIMIT_FSIZE, output),
    (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
    (resource.RLIMIT_NPROC, config["processes"]),
    (resource.RLIMIT_MEMLOCK, 0),
    (resource.RLIMIT_MSGQUEUE, 0),
  ):
    if limit >= 0:
      setrlimit(which, (limit, limit))
  if seccomp:
    own = seccomp.replace(struct.pack("<I", SELF), struct.pack("<I", os.getpid()))
    prog = _SockFprog(len(own) // 8, ctypes.cast(ctypes.c_char_p(own), ctypes.c_void_p))
    if _libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(prog), 0, 0) != 0:
      os._exit(126)
  program = os.pread(62, os.fstat(62).st_size, 0)
  os.close(62)
  sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
  sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8")
  sys.stderr = io.TextIOWrapper(
    io.BufferedWriter(io.FileIO(2, "w", closefd=False)),
    "utf-8",
    "backslashreplace",
    line_buffering=True,
  )
  sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
  sys.argv = ["program.py"]
  sys.modules["random"].seed(0)
  run = {STDIN: _run_stdin, FUNCTION: _run_function, EXPRESSION: _run_expression}[mode]
  _finish(run, program, name, config["reserve"].close)


def _finish(
  run, program, name, free_reserve, *, write=os.pwrite, encode=json.dumps, leave=os._exit
):
  """Runs, tells the result, ends. What it needs afterwards is bound here: the program may patch every module."""
  status, record = 0, None
  try:
    record = run(program, name)
  except SystemExit as e:
    code = e.code
    if run is not _run_stdin:
      status, record = 1, {"error": ["SystemExit", _message(e), _line(e)]}
    elif code is None:
      status = 0
    elif issubclass(type(code), int):
      status = int.__index__(code) & 0xFF
    else:
      status, record = 1, {"error": ["SystemExit", _message(e), _line(e)]}
  except BaseException as e:
    free_reserve()
    status, record = 1, {"error": [type(e).__name__, _message(e), _line(e)]}
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
    status, record = status or 1, record or {"error": [type(e).__name__, _message(e), _line(e)]}
  if record is not None:
    try:
      data = encode(record).encode()
      done = 0
      while done < len(data):
        done += write(RESULT_FD, data[done:], done)
    except BaseException:
      leave(status or 1)
  leave(status)


def _message(e):
  try:
    return str(e.msg if isinstance(e, SyntaxError) else e)[:2000]
  except BaseException:
    return ""


def _line(e):
  """The program's line where it happened: the innermost one, if it happened inside a library."""
  if isinstance(e, SyntaxError) and e.filename == "<program>":
    return e.lineno
  line, trace = None, e.__traceback__
  while trace is not None:
    if trace.tb_frame.f_code.co_filename == "<program>":
      line = trace.tb_lineno
    trace = trace.tb_next
  return line


def _run_stdin(program, name):
  module = types.ModuleType("__main__")
  sys.modules["__main__"] = module
  exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)


def _names(code):
  """Every name that the code and the functions in it look up or assign."""
  todo, names = [code], set()
  while todo:
    part = todo.pop()
    names.update(part.co_names)
    todo.extend(c for c in part.co_consts if type(c) is types.CodeType)
  return names


def _give(namespace, names):
  for name in names:
    if name in GIVEN:
      namespace.setdefault(name, getattr(__import__(GIVEN[name]), name))
    elif name in GIVEN_MODULES:
      namespace.setdefault(name, __import__(name))


def _define(program, name):
  """Runs the program's definitions. -> its namespace, its own function of that name (None if there is none)

  A library function is not the program's own, whether it was given or imported. Which one that is, is looked up before the
  program can change the library.
  """
  module = types.ModuleType("solution")
  sys.modules["solution"] = module
  code = compile(program, "<program>", "exec", dont_inherit=True)
  library = {}
  _give(library, [name])
  _give(module.__dict__, _names(code))
  exec(code, module.__dict__)
  function = module.__dict__.get(name)
  return module.__dict__, function if callable(function) and function is not library.get(
    name
  ) else None


def _missing(name):
  return {"format": f"the program defines no function {name}"}


def _run_function(program, name):
  text = os.pread(0, os.fstat(0).st_size, 0).decode()
  arguments = [json.loads(line) for line in text.split("\n") if line.strip()]
  os.lseek(0, 0, os.SEEK_END)
  namespace, function = _define(program, name)
  solution = namespace.get("Solution")
  # it may use a function of its own name
  if isinstance(solution, type) and callable(getattr(solution, name, None)):
    function = getattr(solution(), name)
  if function is None:
    return _missing(name)
  try:
    return {"value": _plain(function(*arguments), MAX_DEPTH)}
  except _NotPlain as e:
    return {"format": f"the returned value {e}"}


def _run_expression(program, name):
  expression = os.pread(0, os.fstat(0).st_size, 0).decode()
  os.lseek(0, 0, os.SEEK_END)
  namespace, function = _define(program, name)
  if name and function is None:
    return _missing(name)
  code = compile(expression.strip(), "<test>", "eval", dont_inherit=True)
  _give(namespace, _names(code))
  try:
    return {"value": _tagged(eval(code, namespace), MAX_DEPTH)}
  except _NotPlain as e:
    return {"format": f"the value {e}"}


class _NotPlain(Exception):
  pass


def _scalar(x, kind):
  """x as an exact bool, int, float, str or None, whatever its class overrides; or a _NotPlain."""
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
  """x as JSON has it: tuples become lists."""
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
  """x with containers named, since JSON knows two of them."""
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


if __name__ == "__main__":
  main()
