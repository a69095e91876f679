"""Runs untrusted programs against tests, in a warm pool of jailed workers.

  caller's thread --socket--> worker (jail.py: warm, jailed) --fork--> one process per test

The host creates every file that a test touches as an anonymous memory file, sends the descriptors,
and afterwards reads at most the cap from each. Expected outputs, other tests and reference
solutions stay here. A worker starts by vfork and exec, so that a large parent (a trainer with its
arrays) is never forked. The door, `sdpo_jax/sandbox/__init__.py`, lists what each isolation
protects.

Errors: ValueError for a bad argument; RuntimeError, with the reason, where the isolation asked for
does not work here. A verdict of kind `sandbox_failed` means that we could not judge: it is never a
reward.
"""

from collections.abc import Callable
import functools
import logging
import os
import queue
from typing import NamedTuple

from sdpo_jax.sandbox.check_source import read_check
from sdpo_jax.sandbox.checks import check_job, read_check_run, run_check
from sdpo_jax.sandbox.classify import (
  answer_to_check,
  judge_answer_check,
  judge_check,
  judge_test,
)
from sdpo_jax.sandbox.jail_worker import (
  CALLS,
  EXPRESSION,
  FUNCTION,
  STDIN,
  Job,
  PythonLayout,
  StageDirectory,
  Worker,
  WorkerLost,
  find_layout,
  installed,
  memory_file,
  remove_abandoned,
  stage,
)
from sdpo_jax.sandbox.verdict import Limits, Outcome, TestCase, TestResult, Verdict, check_tests
from sdpo_jax.sandbox.wording import make_verdict

ISOLATIONS = ("bubblewrap", "landlock", "seccomp", "unsafe")  # strongest first
# what a program may import besides the standard library, where it is installed
PACKAGES = ("numpy",)

_DEFAULT_LIMITS = Limits()
_TRIVIAL_LIMITS = Limits(time_s=2.0, memory_mb=256, output_kb=64)  # of our own programs

_log = logging.getLogger(__name__)

# Tries what must not be possible and prints what was.
_CANARY = """
import ctypes, os, socket
def fork():
  if os.fork() == 0: os._exit(0)
def execute():
  try:
    os.execv("/none", ["none"])
  except FileNotFoundError:
    pass
def ptrace():
  try:
    os.wait()  # the end of fork's child would stop a traced process for good
  except OSError:
    pass
  if ctypes.CDLL(None).ptrace(0, 0, 0, 0) < 0: raise OSError
tries = {"fork": fork, "exec": execute, "socket": socket.socket,
         "kill": lambda: os.kill(os.getppid(), 0), "write": lambda: open("/tmp/canary", "w"),
         "mkdir": lambda: os.mkdir("/tmp/canary"), "memfd": lambda: os.memfd_create("canary"),
         "limits": lambda: __import__("resource").prlimit(os.getppid(), 7),
         "read": lambda: open("/etc/passwd"), "list": lambda: os.listdir("/"),
         "see": lambda: os.stat("/etc/passwd"), "ptrace": ptrace}
done = []
for name in tries:
  try:
    tries[name]()
    done.append(name)
  except OSError:
    pass
print(*done)
"""
# What the canary may print, and what a warning says is lost, by isolation.
_VISIBLE = {"bubblewrap": set(), "landlock": {"see"}, "seccomp": {"see", "read", "list"}}
_LOST = {
  "landlock": "no private process table, and path metadata (which files exist) is visible to "
  "programs",
  "seccomp": "programs can read every file that this user can read",
  "unsafe": "programs can do whatever this user can do",
}


class Sandbox:
  """Runs programs in a pool of jailed workers.

  `run` may be called from any number of threads; each call takes one worker. `isolation` names the
  isolation in use.
  """

  def __init__(self, workers: int | None = None, isolation: str = "auto"):
    if isolation != "auto" and isolation not in ISOLATIONS:
      raise ValueError(f"isolation={isolation!r} is unknown; choose from {('auto',) + ISOLATIONS}")
    if workers is not None and workers < 1:
      raise ValueError(f"workers={workers} must be at least 1")
    self._staged = None
    self._slots = []
    self._idle = queue.LifoQueue()  # the worker used last has the warmest caches
    self._closed = False
    self.isolation = self._choose(ISOLATIONS[:2] if isolation == "auto" else (isolation,))
    workers = workers or len(os.sched_getaffinity(0))
    self._slots += [_Slot(self._start) for _ in range(1, workers)]
    try:
      started = [slot.begin() for slot in self._slots[1:]]
      for worker in started:
        worker.hello()
    except (WorkerLost, OSError) as e:
      self.close()
      raise RuntimeError(f"the sandbox could not start {workers} workers: {e}") from e
    for slot in self._slots:
      self._idle.put(slot)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Ends all workers. A `run` in progress ends with `sandbox_failed`."""
    self._closed = True
    for slot in self._slots:
      slot.discard()
    if self._staged is not None:
      self._staged.cleanup()
      self._staged = None

  def run(
    self,
    program: str,
    tests: list[TestCase],
    fn_name: str | None = None,
    limits: Limits = _DEFAULT_LIMITS,
    *,
    max_failures: int = 2,
    gives_names: bool = True,
  ) -> Verdict:
    """Runs the tests in order until one ends in an error or `max_failures` gave a wrong answer.

    `fn_name` is None for a program that reads standard input, else the function, or the method of
    class Solution, to call. `gives_names` lets a program use without an import what LiveCodeBench's
    grader imports before it. Raises ValueError for a test whose input or expected output is not of
    its form: JSON for a function, a literal for an expression, a check as `check_source.py` says.
    """
    if self._closed:
      raise RuntimeError("the sandbox is closed")
    tests = list(tests)
    check_tests(tests, fn_name)
    slot = self._idle.get()
    try:
      return slot.judge(
        program, tests, fn_name, limits, max_failures=max_failures, gives_names=gives_names
      )
    finally:
      self._idle.put(slot)
      if self._closed:  # `close` may have come before a worker that this call started
        slot.discard()

  def worker_pids(self) -> list[int]:
    """Returns the process numbers of the warm workers, for looking at their memory."""
    return [worker.pid for slot in self._slots for worker in slot.workers.values()]

  def _choose(self, candidates: tuple[str, ...]) -> str:
    """Returns the first isolation that works here: started for real, and tried from inside.

    Its worker becomes the pool's first. RuntimeError if none works.
    """
    reasons = []
    for isolation in candidates:
      # some containers forbid to mount a /proc and nothing else
      proc_choices = (True, False) if isolation == "bubblewrap" else (False,)
      for with_proc in proc_choices:
        self._settings = isolation, with_proc
        slot = _Slot(self._start)
        try:
          self._layout = self._place(isolation)
          worker = slot.begin()
          worker.hello()
          _try_canaries(worker, isolation)
        except (WorkerLost, OSError) as e:
          slot.discard()
          reasons.append(f"{isolation}: {e}")
          continue
        self._slots.append(slot)
        if isolation != "bubblewrap":
          _warn(isolation, "; ".join(reasons) or "asked for by name")
        return isolation
    self.close()
    raise RuntimeError(
      f"no sandbox works here: {'; '.join(reasons)}. Install bubblewrap or use a kernel with "
      "Landlock and seccomp; weaker isolation must be asked for by name"
    )

  def _place(self, isolation: str) -> PythonLayout:
    """Returns where workers find their files, copied to where their own users can read them."""
    layout = find_layout(PACKAGES)
    if isolation == "bubblewrap" or os.geteuid() != 0:
      return layout
    if self._staged is None:
      remove_abandoned()
      self._staged = StageDirectory()
    return stage(layout, self._staged.name)

  def _start(self, packages: tuple[str, ...]) -> Worker:
    isolation, with_proc = self._settings
    if self._closed:
      raise WorkerLost("the sandbox is closed")
    return Worker(isolation, self._layout, packages, with_proc)


def _try_canaries(worker: Worker, isolation: str) -> None:
  """Raises WorkerLost if a program can do in this worker what its isolation forbids."""
  if isolation == "unsafe":
    return
  outcome = _run_own(worker, _CANARY, "")
  if outcome.status != 0:
    raise WorkerLost(f"a trivial program failed: status {outcome.status} {outcome.result[:500]!r}")
  possible = set(outcome.stdout.decode().split()) - _VISIBLE[isolation]
  if possible:
    raise WorkerLost(f"a program could {', '.join(sorted(possible))}")


def _run_own(worker: Worker, program: str, input_text: str) -> Outcome:
  """Runs a program of ours that reads standard input."""
  program_fd = memory_file(program)
  try:
    return worker.run(Job(program_fd, input_text, STDIN, _TRIVIAL_LIMITS))
  finally:
    os.close(program_fd)


@functools.cache
def _warn(isolation: str, reasons: str) -> None:
  """Warns of a weaker isolation, once a process and reason."""
  _log.warning(
    "SANDBOX WEAKER THAN BUBBLEWRAP, isolation %r: %s (%s)", isolation, _LOST[isolation], reasons
  )


class _Program(NamedTuple):
  """Holds a program that is being judged."""

  text: str
  fd: int  # a memory file of it
  packages: tuple[str, ...]  # that it mentions
  fn_name: str | None
  limits: Limits
  gives_names: bool

  def job(self, mode: int, input_text: str) -> Job:
    """Returns the job of running it once."""
    return Job(self.fd, input_text, mode, self.limits, self.fn_name or "", self.gives_names)


class _Slot:
  """Judges programs at one place of the pool.

  It has at most one lean worker and one with third-party packages, never both at work; and another
  two for checks, which never run what is judged.
  """

  def __init__(self, start: Callable[[tuple[str, ...]], Worker]):
    self._start = start
    self.workers = {}  # (packages, whether it is for checks) -> Worker

  def begin(self, packages: tuple[str, ...] = (), *, for_checks: bool = False) -> Worker:
    """Starts a worker with these packages, without waiting for it."""
    self.workers[packages, for_checks] = worker = self._start(packages)
    return worker

  def discard(self) -> None:
    """Ends the workers. The next program gets new ones."""
    for key in list(self.workers):  # `Sandbox.close` does so while a caller's thread starts others
      worker = self.workers.pop(key, None)
      if worker is not None:
        worker.kill()

  def judge(
    self,
    program: str,
    tests: list[TestCase],
    fn_name: str | None,
    limits: Limits,
    *,
    max_failures: int,
    gives_names: bool,
  ) -> Verdict:
    """Runs the tests in order, as `Sandbox.run` says, and makes the verdict."""
    try:
      program_fd = memory_file(program)
    except OSError as e:
      first = tests[0] if tests else TestCase()
      return make_verdict([_failed(first, "sandbox_failed", str(e))], len(tests), limits)
    judged = _Program(program, program_fd, _packages(program), fn_name, limits, gives_names)
    results, wrong_answers = [], 0
    try:
      for test in tests:
        result = self._judge_test(judged, test)
        results.append(result)
        wrong_answers += result.kind == "wrong_answer"
        if result.kind not in ("passed", "wrong_answer") or wrong_answers >= max_failures:
          break
    finally:
      os.close(program_fd)
    return make_verdict(results, len(tests), limits)

  def _judge_test(self, program: _Program, test: TestCase) -> TestResult:
    """Judges the program on one test, and says whose fault it is if the worker is lost."""
    try:
      for _ in range(2):
        worker = self._worker(program.packages)
        try:
          if test.check is not None:
            return self._run_with_check(worker, program, test)
          return _run_test(worker, program, test)
        # Once may be bad luck (killed from outside, a machine that stood still): the program gets
        # another worker.
        except WorkerLost as e:
          if e.worker not in (None, worker):  # the check's: no program can be blamed for that
            raise
          worker.kill()
      # Twice is the program's doing if a trivial program passes on a fresh worker, else ours.
      kind = "contained" if self._passes_trivial(program.packages) else "sandbox_failed"
    except (WorkerLost, OSError) as e:
      self.discard()
      return _failed(test, "sandbox_failed", str(e))
    return _failed(test, kind, "")

  def _run_with_check(self, worker: Worker, program: _Program, test: TestCase) -> TestResult:
    """Runs the program and its check, each in a worker of its own."""
    check = read_check(test.check, program.fn_name)
    checker = self._worker(_packages(check.source), for_checks=True)
    check_fd = memory_file(check.source)
    try:
      run = _judge_answer if check.judges_answers else _run_called
      return run(worker, checker, check_fd, program, test)
    finally:
      os.close(check_fd)

  def _worker(self, packages: tuple[str, ...], *, for_checks: bool = False) -> Worker:
    """Returns the worker with these packages, a new one if it has ended."""
    worker = self.workers.get((packages, for_checks))
    if worker is not None and worker.alive:
      return worker
    if worker is not None:
      worker.kill()
    worker = self.begin(packages, for_checks=for_checks)
    worker.hello()
    return worker

  def _passes_trivial(self, packages: tuple[str, ...]) -> bool:
    outcome = _run_own(self._worker(packages), "print(input())", "1")
    return outcome.status == 0 and outcome.stdout == b"1\n"


def _packages(source: str) -> tuple[str, ...]:
  """Returns the packages that a program mentions.

  Who mentions one pays for a worker that has it; the others are smaller and faster.
  """
  return tuple(p for p in PACKAGES if p in source and installed(p))


def _run_test(worker: Worker, program: _Program, test: TestCase) -> TestResult:
  """Runs the program on a test whose expected output is known."""
  if test.expression is not None:
    mode = EXPRESSION
  else:
    mode = STDIN if program.fn_name is None else FUNCTION
  outcome = worker.run(program.job(mode, test.given))
  return judge_test(outcome, test, program.text, program.fn_name, program.limits)


def _run_called(
  worker: Worker, checker: Worker, check_fd: int, program: _Program, test: TestCase
) -> TestResult:
  """Lets a check call the program's function."""
  check = check_job(check_fd, program.text, program.fn_name, program.limits)
  checked, ended = run_check(checker, worker, check, program.job(CALLS, ""))
  return judge_check(checked, ended, test, program.text, program.fn_name, program.limits)


def _judge_answer(
  worker: Worker, checker: Worker, check_fd: int, program: _Program, test: TestCase
) -> TestResult:
  """Runs the program on the test's input, and then the check on what it answered."""
  mode = STDIN if program.fn_name is None else FUNCTION
  outcome = worker.run(program.job(mode, test.input))
  answer = answer_to_check(outcome, test, program.text, program.fn_name, program.limits)
  if isinstance(answer, TestResult):  # there is no answer
    return answer
  try:
    job = check_job(check_fd, program.text, program.fn_name, program.limits, answer)
  except ValueError as e:
    return _failed(test, "format", f"the returned value {e}")
  checked = read_check_run(checker.run(job))
  return judge_answer_check(checked, test, answer, program.fn_name, program.limits)


def _failed(test: TestCase, kind: str, reason: str) -> TestResult:
  """Returns the result of a test whose worker left nothing to judge."""
  return TestResult(
    input=test.given,
    output="",
    expected=test.output,
    kind=kind,
    detail=reason,
    hidden=test.hidden,
  )
