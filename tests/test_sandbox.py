"""The sandbox's contract: kinds, feedback, limits, our own failures, a caller never forked."""

import concurrent.futures
import os
import pathlib
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest

from sdpo_jax.sandbox import KINDS, Limits, Sandbox, TestCase, jail_worker, verdict, wording
from sdpo_jax.sandbox import pool as sandbox_module
from sdpo_jax.sandbox.compare import same_output, same_value
from sdpo_jax.text import clean, cut
from tests.sandbox_host import check_text, descendants, descriptors, left_open


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox(workers=2) as pool:
    yield pool


def kind(sandbox, program, given="", output="", **kw):
  return sandbox.run(program, [TestCase(given, output)], **kw).kind


# Comparison, on the host.


@pytest.mark.parametrize(
  "output, expected, same",
  [
    ("1 2\n", "1 2", True),
    ("1 2  \n\n", "1 2", True),
    (" 1\t2", "1 2", True),
    ("1\n2", "1 2", False),
    ("a  b", "a b", False),
    ("1.0 2", "1 2.00", True),
    ("1e3", "1000", True),
    ("0.30000000000000004", "0.3", False),
    ("-0", "0", True),
    ("1,2", "1, 2", False),
    ("", "", True),
    ("", "0", False),
    ("nan", "nan", True),
    ("NaN", "nan", False),
    ("sNaN", "1", False),
    ("Infinity", "inf", True),
    ("Yes", "YES", False),
    ("5-", "5", False),
    ("1\n\n2", "1\n2", False),
    ("9" * 10_000_000, "8", False),
    ("1e999999999", "5", False),
  ],
)
def test_same_lines(output, expected, same):
  start = time.monotonic()
  assert same_output(output, TestCase(output=expected)) is same
  assert time.monotonic() - start < 1.0


def _nested(depth):
  value = []
  for _ in range(depth):
    value = [value]
  return value


@pytest.mark.parametrize(
  "value, expected, same",
  [
    (1, 1.0, True),
    (True, 1, False),
    (1, True, False),
    (True, True, True),
    (None, None, True),
    (None, 0, False),
    ("1", 1, False),
    ([1, [2, 3]], [1, [2, 3]], True),
    ([1, 2], [2, 1], False),
    ([], {}, False),
    ({"a": [1]}, {"a": [1]}, True),
    ({"a": 1}, {"a": 1, "b": 2}, False),
    (float("nan"), float("nan"), False),
    (2**53 + 1, float(2**53), False),
    ([True], [1], False),
    (_nested(5000), _nested(5000), True),
  ],
)
def test_same_value(value, expected, same):
  assert same_value(value, expected) is same


# Verdicts.


def test_verdict_of_each_failing_test(sandbox):
  program = "x = input()\nif x == 'boom':\n  raise ValueError('no ' + x)\nprint(x)"
  right, wrong, boom = TestCase("a", "a"), TestCase("a", "b"), TestCase("boom", "boom")
  passed = sandbox.run(program, [right, right])
  assert (
    passed.passed
    and passed.kind == "passed"
    and passed.feedback == ""
    and passed.number == 2
    and len(passed.tests) == 2
  )
  verdict = sandbox.run(program, [right, wrong, boom, wrong])
  assert verdict.kind == "wrong_answer" and [t.kind for t in verdict.tests] == [
    "passed",
    "wrong_answer",
    "runtime_error",
  ]
  assert verdict.feedback == "Test 2: wrong answer\nInput: a\nOutput: a\nExpected: b"
  verdict = sandbox.run(program, [right, boom, wrong])
  assert verdict.kind == "runtime_error" and len(verdict.tests) == 2
  error = verdict.tests[1].error
  assert (error.type, error.message, error.line, error.source) == (
    "ValueError",
    "no boom",
    3,
    "raise ValueError('no ' + x)",
  )
  assert (
    verdict.feedback == "Test 2: runtime error\n"
    "Input: boom\n"
    "Error: ValueError: no boom\n"
    "Line 3: raise ValueError('no ' + x)"
  )
  assert len(sandbox.run(program, [wrong] * 5, max_failures=1).tests) == 1
  assert len(sandbox.run(program, [wrong] * 5, max_failures=4).tests) == 4
  assert sandbox.run(program, []).passed


def test_feedback_tells_the_two_shortest_wrong_answers(sandbox):
  tests = [TestCase("a" * n, "b") for n in (9, 3, 7, 5)]
  verdict = sandbox.run("print(input())", tests, max_failures=4)
  assert [line for line in verdict.feedback.split("\n") if line.startswith("Test")] == [
    "Test 2: wrong answer",
    "Test 4: wrong answer",
  ]


def test_feedback_is_bounded_and_deterministic(sandbox):
  program = "class A: pass\nprint(A())\nprint('y' * 100000)\nraise ValueError('x' * 100000, A())"
  verdicts = {
    sandbox.run(program, [TestCase("i" * 100000, "o" * 100000)]).feedback for _ in range(3)
  }
  assert len(verdicts) == 1 and len(verdicts.pop()) <= 2000
  program = "class A: pass\nprint(A(), id(3) % 2 < 2, {'b', 'a', 'c'}, hash('a'))"
  feedback = sandbox.run(program, [TestCase("", "")]).feedback
  assert "A object at 0x...>" in feedback
  assert feedback == sandbox.run(program, [TestCase("", "")]).feedback
  many = sandbox.run(
    "print('\\n'.join(map(str, range(1000))))", [TestCase("1\n2\n3", "x\ny")]
  ).feedback
  assert "Input:\n  1\n  2\n  3\nOutput:\n  0\n  1\n" in many and many.endswith(
    "Expected:\n  x\n  y"
  )
  check_text(many, [])


def test_hidden_tests_show_no_values(sandbox):
  secret = TestCase("secret-input", "secret-output", hidden=True)
  for program in (
    "print('wrong')",
    "raise ValueError(input())",
    "print(input(), file=__import__('sys').stderr); 1 / 0",
    "import sys; sys.exit(input())",
    "raise type(input(), (Exception,), {})",
    "import json, os; os.pwrite(3, json.dumps({'error': ['', input(), None]}).encode(), "
    "0); os._exit(1)",
  ):
    assert "secret" not in sandbox.run(program, [secret]).feedback
  function = TestCase('"secret"', "1", hidden=True)
  for body in (
    "return type(s, (), {})()",
    'import os; os.pwrite(3, b\'{"format": "%s"}\' % s.encode(), 0); os._exit(0)',
  ):
    assert (
      sandbox.run(f"def f(s): {body}", [function], fn_name="f").feedback
      == "Hidden test 1: wrong form"
    )
  assert (
    sandbox.run("def f(s): raise KeyError(s)", [function], fn_name="f").feedback
    == "Hidden test 1: runtime error\nError: KeyError\nLine 1: def f(s): raise KeyError(s)"
  )
  assert (
    sandbox.run("import sys\nsys.exit(len(input()))", [secret]).feedback
    == "Hidden test 1: runtime error"
  )


@pytest.mark.parametrize(
  "program, passes",
  [
    ("gcd", False),
    ("from math import gcd", False),
    ("import math\nmath.gcd, old = None, gcd", False),
    ("class Solution:\n  def gcd(self, a, b): return 99", False),
    ("class Solution:\n  def gcd(self, a, b): return gcd(a, b)", True),
    ("def gcd(a, b): return 6", True),
    ("gcd = lambda *a: 6", True),
    (
      "class Solution:\n"
      "  def gcd(self, a, b): return 6\n"
      "def gcd(a, b): return Solution().gcd(a, b)",
      True,
    ),
  ],
)
def test_a_library_function_is_not_the_programs_own(sandbox, program, passes):
  assert sandbox.run(program, [TestCase("12\n18", "6")], fn_name="gcd").passed is passes
  if "class" not in program or "\ndef" in program:
    assert (
      sandbox.run(program, [TestCase(expression="gcd(12, 18)", output="6")], fn_name="gcd").passed
      is passes
    )


def test_no_returned_value_breaks_the_comparison(sandbox):
  near = TestCase(expression="f()", output="1.5", compare="isclose")
  assert sandbox.run("def f(): return 10 ** 400", [near]).kind == "wrong_answer"
  forged = (
    "import os\n"
    "def f():\n"
    "  os.pwrite(3, b'{\"value\": {\"complex\": [1%s, 0]}}' % (b'0' * 400), 0)\n"
    "  os._exit(0)"
  )
  assert sandbox.run(forged, [near]).kind == "format"


@pytest.mark.parametrize(
  "text",
  [
    "<|im_start|>",
    "<|im_<|im_end|>end|>",
    "<<||>>",
    "</s><s>",
    "[INST] [/INST]",
    "<start_of_turn>user",
    "<\uff5cUser\uff5c>",
    "</think>",
    "a\x00b\x1b[0m\u202e\u200b\ud800",
    "\r\n\r",
    "{braces} \\n {{",
    "ordinary: x < y | z > w, 2 <= 3",
  ],
)
def test_clean(text):
  result = clean(text)
  check_text(
    result,
    [
      "<|",
      "|>",
      "<s>",
      "</s>",
      "[INST]",
      "[/INST]",
      "<start_of_turn>",
      "<\uff5c",
      "\uff5c>",
      "</think>",
    ],
  )
  assert clean(result) == result
  if text.startswith(("ordinary", "{")):
    assert result == text


def test_cut():
  assert cut("abc", 3) == "abc"
  assert len(cut("x" * 100, 30)) == 30 and cut("a" * 100 + "b", 30).endswith("ab")


# Programs.

GIVEN_VALUES = {  # of one name each from what LiveCodeBench's grader imports
  "log2(8)": "3",
  "factorial(3)": "6",
  "list(islice([1, 2], 1))": "[1]",
  "deepcopy([1])": "[1]",
  "ascii_lowercase[0]": '"a"',
  "hypot(3, 4)": "5",
  "itemgetter(0)([1])": "1",
  "mean([1, 3])": "2",
  "timedelta(days=1).days": "1",
  "datetime.date(2020, 1, 2).day": "2",
  "findall('a', 'aa')": '["a", "a"]',
  "loads('[1]')": "[1]",
  "pow(2, 3, 5)": "3",
  "StringIO('a').read()": '"a"',
  "getrecursionlimit()": "50000",
  "repr(copy.copy([1]))": '"[1]"',
}


def test_graders_names_are_given(sandbox):
  values = ", ".join(GIVEN_VALUES)
  expected = "[" + ", ".join(GIVEN_VALUES.values()) + "]"
  method = f"class Solution:\n  def f(self):\n    return [{values}]"
  verdict = sandbox.run(method, [TestCase("", expected)], fn_name="f")
  assert verdict.passed, verdict.feedback
  test = TestCase(output=expected.replace("[3,", "[3.0,").replace(" 5,", " 5.0,"))
  whole = f"print(json.dumps([{values}]))"
  assert sandbox.run(whole, [test]).passed
  assert "name 'json' is not defined" in sandbox.run(whole, [test], gives_names=False).feedback
  own = "e = 5\nif 'pi' in globals() and 'tau' not in globals(): print(e, count, pi > 3)"
  assert kind(sandbox, "count = 1\n" + own, output="5 1 True") == "passed"


def test_numbers_and_calls_may_be_as_long_as_graders_allow(sandbox):
  digits = "1" + "0" * 5000
  assert kind(sandbox, "print(10 ** 5000)", output=digits) == "passed"
  assert sandbox.run("print(int(input()) % 9)", [TestCase("7" * 5000, str(7 * 5000 % 9))]).passed
  power = "def f(x): return 10 ** x"
  assert sandbox.run(power, [TestCase("5000", digits)], fn_name="f").passed
  wrong = sandbox.run(power, [TestCase("5000", digits[:-1] + "1")], fn_name="f")
  assert wrong.kind == "wrong_answer" and "Output: 1000" in wrong.feedback
  assert sandbox.run(power, [TestCase("5000", f'"{digits}"')], "f").kind == "wrong_answer"
  assert sandbox.run(power, [TestCase("50000", "1")], fn_name="f").kind == "format"
  deep = "class Solution:\n  def f(self, x): return 0 if x == 0 else 1 + self.f(x - 1)"
  assert sandbox.run(deep, [TestCase("40000", "40000")], fn_name="f").passed
  assert kind(sandbox, "def f(): return f()\nf()") == "runtime_error"


COUNTING_METHOD = (
  "class Solution:\n"
  "  seen = []\n"
  "  def __init__(self):\n"
  "    self.n = 10\n"
  "  def _more(self, x):\n"
  "    self.n += x\n"
  "    Solution.seen.append(x)\n"
  "  def f(self, x: int) -> List[int]:\n"
  "    self._more(x)\n"
  "    self._more(x)\n"
  "    return [self.n, len(self.seen)]"
)


def test_functions_and_expressions(sandbox):
  program = (
    "class Solution:\n"
    "  def both(self, a: List[int], s: Optional[str] = None):\n"
    "    return Counter(a), s\n"
    "rows = lambda n: {(i, i * i) for i in range(n)}"
  )
  assert sandbox.run(
    program, [TestCase('["x", "x"]\n"s"', '[{"x": 2}, "s"]')], fn_name="both"
  ).passed
  assert sandbox.run(
    program,
    [
      TestCase(expression="rows(2)", output="{(1, 1), (0, 0)}"),
      TestCase(expression="len(rows(5))", output="5"),
      TestCase(expression="math.sqrt(2)", output="1.4142", compare="isclose", rel_tol=1e-4),
      TestCase(expression="[2, 1, 1]", output="(1, 2)", compare="set"),
      TestCase(expression="{1: b'x', None: 2j}", output="{1: b'x', None: 2j}"),
      TestCase(expression="frozenset([()])", output="{()}"),
    ],
  ).passed
  verdict = sandbox.run(program, [TestCase(expression="rows(1)", output="{(0, 1)}")])
  assert (
    verdict.feedback == "Test 1: wrong answer\nInput: rows(1)\nOutput: {(0, 0)}\nExpected: {(0, 1)}"
  )
  assert sandbox.run(program, [TestCase(expression="rows", output="1")]).kind == "format"
  assert sandbox.run(
    program, [TestCase(expression="nothing(1)", output="1")], fn_name="nothing"
  ).feedback == (
    "Test 1: wrong form\nReason: the program defines no function nothing\nInput: nothing(1)"
  )
  assert sandbox.run("def f(x): return x + 1", [TestCase("1", "2")], fn_name="g").kind == "format"
  # within one call it stays, from test to test it does not
  assert sandbox.run(COUNTING_METHOD, [TestCase("1", "[12, 2]")] * 2, fn_name="f").passed
  assert sandbox.run(
    "print('noise')\n"
    "def f(x):\n"
    "  print(x)\n"
    "  return (x, None)\n"
    "if __name__ == '__main__':\n"
    "  f(input())",
    [TestCase("true", "[true, null]")],
    fn_name="f",
  ).passed
  numpy = "import numpy as np\ndef f(x): return np.int64(x)"
  if jail_worker.installed("numpy"):
    assert sandbox.run(numpy, [TestCase("1", "1")], fn_name="f").passed
    assert sandbox.run(
      "import numpy.linalg, numpy.fft, numpy as np\n"
      "print(np.linalg.det(np.eye(2)), np.random.default_rng(0).integers(2, 3))",
      [TestCase("", "1.0 2")],
    ).passed


@pytest.mark.parametrize(
  "source, error, line",
  [
    ("def f(:\n  pass", "SyntaxError", 1),
    ("x = 1\n  y = 2", "IndentationError", 2),
    ("x = (1,\n", "SyntaxError", 1),
    ("import json\njson.loads('{')", "JSONDecodeError", 2),
    ("def f(x):\n  return f(x)\nf(1)", "RecursionError", 2),
    ("x = 'a", "SyntaxError", 1),
    ("try:\n  1/0\nexcept Exception as e:\n  raise KeyError(2) from e", "KeyError", 4),
    ("import sys\nsys.exit('bye')", "SystemExit", 2),
    ("def g():\n  yield\n  raise StopIteration\nlist(g())", "RuntimeError", 4),
    ("raise ExceptionGroup('many', [ValueError(1)])", "ExceptionGroup", 1),
  ],
)
def test_errors_name_the_line(sandbox, source, error, line):
  result = sandbox.run(source, [TestCase("", "")]).tests[0]
  assert (result.kind, result.error.type) == ("runtime_error", error)
  if error != "RuntimeError":
    assert result.error.line == line and result.error.source == source.split("\n")[line - 1].strip()


@pytest.mark.parametrize("isolation", ["bubblewrap", "landlock"])
def test_ordinary_programs(isolation):
  """What contest programs do besides computing; each prints ok."""
  try:
    pool = Sandbox(workers=1, isolation=isolation)
  except RuntimeError as e:
    pytest.skip(str(e))
  programs = (
    "import sys\nsys.stdout.write('ok')",
    "import os\nos.write(1, b'ok')",
    "import atexit\natexit.register(print, 'ok')",
    "print('ok')\nexit()",
    "print('ok')\nquit(0)",
    "import asyncio\n"
    "async def f():\n"
    "  await asyncio.sleep(0.001)\n"
    "  return 'ok'\n"
    "print(asyncio.run(f()))",
    "import threading\nthreading.Timer(.01, print, ['ok']).start()",
    "import concurrent.futures as c\nwith c.ThreadPoolExecutor(4) as p: print(*p.map(str, ['ok']))",
    "import sys\nprint('o', end='')\nsys.stdout.flush()\nprint('k')",
    "import io, os, sys\nsys.stdin = io.BytesIO(os.read(0, 100))\nprint('ok')",
    "import sys\nfor line in open('/dev/stdin'): pass\nprint('ok')",
    "import sys\nassert sys.stdin.buffer.read() == b'x'\nprint('ok')",
    "import signal\n"
    "signal.signal(signal.SIGALRM, lambda *a: print('ok') or exit())\n"
    "signal.alarm(1)\n"
    "signal.pause()",
    "import sqlite3, ssl, decimal, hashlib, zlib, lzma, bz2, csv, xml.dom, email, "
    "unittest\n"
    "print('ok')",
    "import subprocess, multiprocessing, socket, tempfile, shutil, glob, getpass\nprint('ok')",
    "import inspect, pickle, pprint, textwrap, traceback, logging, datetime, zoneinfo, "
    "statistics, array\n"
    "print('ok')",
    "import sys\n"
    "sys.setrecursionlimit(10**6)\n"
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
    "assert f(50000) == 50000\n"
    "print('ok')",
    "from dataclasses import dataclass\n"
    "@dataclass\n"
    "class A: x: int\n"
    "import pickle\n"
    "assert pickle.loads(pickle.dumps(A(1))) == A(1)\n"
    "print('ok')",
    "import resource\n"
    "assert resource.getrlimit(resource.RLIMIT_STACK)[0] >= 256 << 20\n"
    "print('ok')",
    "import time, os\n"
    "time.sleep(0.001)\n"
    "assert os.cpu_count() and os.getpid() and os.urandom(3)\n"
    "print('ok')",
  )
  with pool:
    for program in programs:
      verdict = pool.run(program, [TestCase("x", "ok")])
      assert verdict.passed, (program, verdict.feedback)


def test_time_limit_is_punctual(sandbox):
  """CPU time decides; where the machine gives the program none, wall time does."""
  limits = Limits(time_s=0.2)
  for program in (
    "while True: pass",
    "import hashlib\nwhile True: hashlib.sha256(bytes(10**5)).digest()",
    # giving back its memory does not count, nor delay the verdict
    "b = b'x' * 600_000_000\nwhile True: pass",
  ):
    results = [sandbox.run(program, [TestCase("", "")], limits=limits).tests[0] for _ in range(3)]
    assert all(
      r.kind == "time_limit" and (r.cpu_s >= 0.2 or r.wall_s >= limits.wall_s) for r in results
    )
    # other work on the machine may delay one verdict, not most
    assert statistics.median(r.cpu_s for r in results) < 0.23
  result = sandbox.run("import time\ntime.sleep(9)", [TestCase("", "")], limits=limits).tests[0]
  assert (
    result.kind == "time_limit"
    and limits.wall_s <= result.wall_s < limits.wall_s + 0.5
    and result.cpu_s < 0.2
  )


# Our own failures.


def _zygotes(pool):
  return [worker for slot in pool._slots for worker in slot.workers.values()]


def test_worker_killed_from_outside_costs_nothing():
  with Sandbox(workers=1) as pool:
    (worker,) = _zygotes(pool)
    signal.pidfd_send_signal(worker._pidfd, signal.SIGKILL)  # idle
    time.sleep(0.05)
    assert kind(pool, "print(1)", output="1") == "passed"
    (worker,) = _zygotes(pool)
    # at work
    threading.Timer(0.2, signal.pidfd_send_signal, [worker._pidfd, signal.SIGKILL]).start()
    assert kind(pool, "import time\ntime.sleep(0.5)\nprint(1)", output="1") == "passed"


class _Dies:
  """A worker that is lost at every program but the trivial one."""

  def __init__(self, worker, trivial):
    self._worker, self._trivial = worker, trivial

  def __getattr__(self, name):
    return getattr(self._worker, name)

  def run(self, job):
    if self._trivial and os.pread(job.program_fd, 100, 0) == b"print(input())":
      return self._worker.run(job)
    raise jail_worker.WorkerLost("gone")


@pytest.mark.parametrize("trivial, expected", [(True, "contained"), (False, "sandbox_failed")])
def test_contained_or_our_fault(monkeypatch, trivial, expected):
  with Sandbox(workers=1) as pool:
    pool._slots[0].discard()
    start = pool._slots[0]._start
    monkeypatch.setattr(pool._slots[0], "_start", lambda *a: _Dies(start(*a), trivial))
    verdict = pool.run("print(1)", [TestCase("", "1"), TestCase("", "1")])
    assert verdict.kind == expected and not verdict.passed and len(verdict.tests) == 1
    monkeypatch.undo()
    pool._slots[0].discard()
    assert kind(pool, "print(1)", output="1") == "passed"


def test_no_worker_or_no_memory_is_our_fault(monkeypatch):
  with Sandbox(workers=1) as pool:
    pool._slots[0].discard()
    with monkeypatch.context() as patch:
      patch.setattr(
        pool._slots[0], "_start", lambda *a: (_ for _ in ()).throw(OSError(12, "no memory"))
      )
      verdict = pool.run("print(1)", [TestCase("", "1")])
      assert verdict.kind == "sandbox_failed" and "no memory" in verdict.feedback

    def full(*_):
      raise OSError(28, "No space left on device")

    for name in ("memory_file",):
      with monkeypatch.context() as patch:
        patch.setattr(sandbox_module, name, full)
        assert kind(pool, "print(1)", output="1") == "sandbox_failed"
    with monkeypatch.context() as patch:
      patch.setattr(jail_worker, "memory_file", full)
      assert kind(pool, "print(1)", output="1") == "sandbox_failed"
    assert kind(pool, "print(1)", output="1") == "passed"


def test_no_descriptors_left_is_our_fault():
  """However few are left, there is a verdict, it is never one on the program, and none is lost."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  opened, taken = descriptors(), []
  with Sandbox(workers=1) as pool:
    resource.setrlimit(
      resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard)
    )
    try:
      with pytest.raises(OSError, match="Too many open files"):
        while True:
          taken.append(os.dup(0))
      kinds = []
      while taken and "passed" not in kinds:
        kinds.append(kind(pool, "print(1)", output="1"))
        os.close(taken.pop())
      # the others first copy a Python, which takes descriptors too
      if pool.isolation == "bubblewrap":
        with pytest.raises(RuntimeError, match="Too many open files"):
          Sandbox(workers=8, isolation="bubblewrap")
    finally:
      for fd in taken:
        os.close(fd)
      resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(kinds) > 4 and kinds == ["sandbox_failed"] * (len(kinds) - 1) + ["passed"]
  assert not left_open(opened)


@pytest.mark.parametrize("isolation", ["bubblewrap", "landlock"])
def test_a_low_limit_of_descriptors_is_not_the_programs(isolation):
  """The soft limit of whoever starts the pool (40 here) is raised: workers need descriptor 63."""
  if isolation == "bubblewrap" and shutil.which("bwrap") is None:
    pytest.skip("bubblewrap is not installed")
  code = (
    "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, "
    "resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
    "from sdpo_jax.sandbox import Sandbox, TestCase\n"
    f"with Sandbox(workers=1, isolation={isolation!r}) as pool:\n"
    "  print(pool.run('print(1)', [TestCase(input='', output='1')]).passed)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout == "True\n", done.stderr


def test_missing_bubblewrap(monkeypatch, caplog):
  monkeypatch.setattr(shutil, "which", lambda name: None)
  sandbox_module._warn.cache_clear()
  with pytest.raises(RuntimeError, match="bwrap is not installed"):
    Sandbox(workers=1, isolation="bubblewrap")
  with Sandbox(workers=1) as pool:
    assert pool.isolation == "landlock"
    assert kind(pool, "print(1)", output="1") == "passed"
  assert (
    len(
      [r for r in caplog.records if "WEAKER" in r.message and "bwrap is not installed" in r.message]
    )
    == 1
  )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes copies, for the workers' own users")
def test_no_copy_is_left_behind(monkeypatch):
  """Neither by close(), nor by an end without it, nor, once another sandbox is made, by a kill."""
  directory = pathlib.Path(tempfile.mkdtemp())
  # the workers' users read there, which pytest's own directories do not allow
  directory.chmod(0o755)
  monkeypatch.setattr(tempfile, "tempdir", str(directory))

  def left(end):
    """What there is once a process that has made a directory has come to this end."""
    begin = (
      "import os, signal; from sdpo_jax.sandbox import jail_worker; stage = "
      "jail_worker.StageDirectory(); "
    )
    subprocess.run(
      [sys.executable, "-c", begin + end], env=os.environ | {"TMPDIR": str(directory)}, check=False
    )
    return set(directory.iterdir())

  with Sandbox(workers=1, isolation="landlock") as pool:
    held = set(directory.iterdir())
    assert len(held) == 1 and left("stage.cleanup()") == held and left("") == held
    killed = left("os.kill(os.getpid(), signal.SIGKILL)") - held
    assert len(killed) == 1
    jail_worker.remove_abandoned()
    # too young: its process may be about to lock it
    assert set(directory.iterdir()) == held | killed
    for path in held | killed:
      os.utime(path, (0, 0))
    jail_worker.remove_abandoned()
    assert (
      set(directory.iterdir()) == held
      and kind(pool, "import json; print(1)", output="1") == "passed"
    )
  directory.rmdir()  # which must be empty


def test_weak_isolation_only_by_name(monkeypatch):
  with pytest.raises(ValueError, match="isolation='docker' is unknown"):
    Sandbox(isolation="docker")
  with pytest.raises(ValueError, match="workers=0"):
    Sandbox(workers=0)
  monkeypatch.setattr(
    sandbox_module,
    "_try_canaries",
    lambda worker, isolation: (_ for _ in ()).throw(jail_worker.WorkerLost("a program could fork")),
  )
  before = descendants()
  with pytest.raises(RuntimeError, match="a program could fork"):
    Sandbox(workers=1)
  assert descendants() == before
  monkeypatch.undo()
  for isolation in ("seccomp", "unsafe"):
    with Sandbox(workers=1, isolation=isolation) as pool:
      assert pool.isolation == isolation and kind(pool, "print(1)", output="1") == "passed"


def test_canaries_notice_a_hole():
  """The probe of a stronger isolation refuses a worker of a weaker one."""
  with Sandbox(workers=1, isolation="unsafe") as pool:
    with pytest.raises(jail_worker.WorkerLost, match="could exec, fork, .*ptrace, read"):
      sandbox_module._try_canaries(_zygotes(pool)[0], "bubblewrap")


def test_malformed_tests_are_not_the_program_s_fault(sandbox):
  with pytest.raises(ValueError, match="test 2: the expected output '.1, 2' is not JSON"):
    sandbox.run("def f(): return 1", [TestCase("", "1"), TestCase("", "[1, 2")], fn_name="f")
  with pytest.raises(ValueError, match="not a literal"):
    sandbox.run("", [TestCase(expression="1", output="f(1)")])
  with pytest.raises(ValueError, match="compare='near'"):
    TestCase(expression="1", output="1", compare="near")
  with pytest.raises(ValueError, match="above 0"):
    Limits(time_s=0)


def test_interrupted_run_does_not_mix_up_answers(monkeypatch):
  with Sandbox(workers=1) as pool:
    (worker,) = _zygotes(pool)
    with monkeypatch.context() as patch:
      patch.setattr(
        jail_worker.socket,
        "send_fds",
        lambda *a, send=jail_worker.socket.send_fds: (
          send(*a),
          (_ for _ in ()).throw(KeyboardInterrupt),
        ),
      )
      with pytest.raises(KeyboardInterrupt):
        pool.run("print(1)", [TestCase("", "1")])
    assert kind(pool, "print(2)", output="2") == "passed"


def test_closed_and_interrupted():
  pool = Sandbox(workers=1)
  with concurrent.futures.ThreadPoolExecutor(1) as threads:
    running = threads.submit(kind, pool, "import time\ntime.sleep(5)")
    time.sleep(0.2)
    pool.close()
    assert running.result(timeout=3) == "sandbox_failed"
  with pytest.raises(RuntimeError, match="closed"):
    pool.run("print(1)", [])
  pool.close()


def test_caller_is_never_forked_and_dies_alone():
  """No fork hook runs in it, it makes no heavy import, and killing it leaves no worker."""
  code = textwrap.dedent("""
      import os, sys, time
      forks = []
      os.register_at_fork(before=lambda: forks.append(1))
      from sdpo_jax.sandbox import Sandbox, TestCase
      pool = Sandbox(workers=2)
      assert pool.run("print(1)", [TestCase("", "1")]).passed
      assert not forks and "jax" not in sys.modules and "numpy" not in sys.modules
      print("ready", flush=True)
      pool.run("while True: pass", [TestCase("", "1")])
  """)
  before = descendants()
  with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    below = descendants() - before
    assert len(below) >= 4  # the caller, two workers, one test; bubblewrap's own
    process.kill()
  deadline = time.monotonic() + 5

  def alive(pid):
    try:
      return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:  # it ended
      return False

  while any(map(alive, below)) and time.monotonic() < deadline:
    time.sleep(0.02)
  assert not any(map(alive, below))


def test_many_threads_share_few_workers(sandbox):
  def job(i):
    return sandbox.run("a = int(input())\nprint(a * a)", [TestCase(str(i), str(i * i))]).passed

  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    assert all(threads.map(job, range(200)))


def test_kinds_are_the_contract():
  assert KINDS == (
    "passed",
    "wrong_answer",
    "runtime_error",
    "time_limit",
    "memory_limit",
    "output_limit",
    "format",
    "contained",
    "sandbox_failed",
  )
  for name in KINDS[1:]:
    result = verdict.TestResult(input="1", output="2", expected="3", kind=name)
    assert wording.describe(result, 1, Limits()).startswith("Test 1: ")


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["bubblewrap", "landlock"])
def test_ten_thousand_programs_leave_nothing(isolation):
  before, opened = descendants(), descriptors()
  with Sandbox(workers=2, isolation=isolation) as pool:
    staged = pool._staged and pool._staged.name
    workers = descendants() - before

    def job(i):
      if i % 50 == 0:
        program, want = (
          ("import os\nwhile True: os.fork()", "runtime_error")
          if i % 100
          else ("print('x' * 10 ** 8)", "output_limit")
        )
      elif i % 50 == 25:
        program, want = "b = bytearray(10 ** 10)", "memory_limit"
      else:
        program, want = f"print({i})", "passed"
      return (
        kind(pool, program, output=str(i), limits=Limits(time_s=2.0, memory_mb=256, output_kb=64))
        == want
      )

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
      assert all(threads.map(job, range(10_000)))
    assert len(descendants() - before) == len(workers)
  assert descendants() == before and not left_open(opened)
  assert not staged or not os.path.exists(staged)


@pytest.mark.slow
def test_same_verdicts_beside_six_hogs():
  programs = [
    ("print(1)", "passed"),
    ("print(2)", "wrong_answer"),
    ("1/0", "runtime_error"),
    ("while True: pass", "time_limit"),
    ("s = 0\nfor i in range(5_000_000): s += i\nprint(1)", "passed"),
    ("import time\ntime.sleep(0.3)\nprint(1)", "passed"),
  ]
  hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
  try:
    with Sandbox(workers=2) as pool, concurrent.futures.ThreadPoolExecutor(4) as threads:
      kinds = list(
        threads.map(lambda p: kind(pool, p[0], output="1", limits=Limits(time_s=1.5)), programs * 5)
      )
  finally:
    for hog in hogs:
      hog.kill()
      hog.wait()
  assert kinds == [expected for _, expected in programs] * 5
