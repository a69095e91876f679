"""Tests the processes that run engines: they may die, hang or answer garbage, and end at close."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import pytest

from sdpo_jax.envs.agents.processes import EngineFailed, Pool
from sdpo_jax.envs.child_process import ChildLost, ChildProcess

ENGINE = """
import os, sys, time
def start(greeting="hello"):
  print("a library that prints")
  totals = {}
  def engine(request):
    print("it prints again")
    what, *rest = request
    if what == "echo": return [greeting, rest]
    if what == "add":
      seat, number = rest
      totals[seat] = totals.get(seat, 0) + number
      return totals[seat]
    if what == "forget": return totals.pop(rest[0])
    if what == "known": return sorted(totals)
    if what == "pid": return os.getpid()
    if what == "die": os._exit(3)
    if what == "hang": time.sleep(100)
    if what == "raise": raise ValueError("no such\\ngame")
    if what == "read": return sys.stdin.read()
  return engine
"""


@pytest.fixture
def make(tmp_path):
  """Makes pools of an engine and closes them."""
  pools = []

  def make(source=ENGINE, **settings):
    file = tmp_path / "engine.py"
    file.write_text(source)
    options = {"size": 1, "time_s": 10.0, "start_s": 20.0} | settings
    pools.append(Pool("test", str(file), options.pop("start", {}), **options))
    return pools[-1]

  yield make
  for pool in pools:
    pool.close()


def is_alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def test_any_process_answers_and_what_the_engine_prints_harms_nothing(make):
  pool = make(start={"greeting": "bye"})
  pool.open()
  texts = ["\x00\n\ud800", "x" * 10**6]
  assert [pool.ask(["echo", text]) for text in texts] == [["bye", [text]] for text in texts]
  assert pool.ask(["read"]) == ""


@pytest.mark.parametrize(
  "request_, message",
  [
    (["die"], "test: its process ended"),
    (["hang"], "test: its process did not answer within 0.5 s"),
  ],
)
def test_a_lost_process_costs_one_request_and_is_replaced(make, request_, message):
  pool = make()
  pid = pool.ask(["pid"])
  with pytest.raises(EngineFailed) as error:
    pool.ask(request_, time_s=0.5)
  assert message in str(error.value) and "\n" not in str(error.value)
  assert pool.ask(["pid"]) != pid and not is_alive(pid)


@pytest.mark.parametrize(
  "garbage",
  [
    "42",
    "",
    "\xff",
    "[" * 10**5,
    '{"number": 1}',
    '{"number": 2, "result": 1}',
    '{"number": 1, "error": 2}',
  ],
)
def test_garbage_is_no_answer(make, garbage):
  pool = make()
  says = '{"number": 0, "result": null}', garbage
  program = "import sys\nfor says in {!r}:\n  print(says, flush=True)\n  input()\n".format(says)
  pool.command = [sys.executable, "-c", program]
  with pytest.raises(EngineFailed, match="which is no answer"):
    pool.ask(1)
  assert pool.pids() == []


def test_an_exception_of_the_engine_is_a_line_and_its_process_goes_on(make):
  pool = make()
  pid = pool.ask(["pid"])
  with pytest.raises(EngineFailed, match="^test: ValueError: no such game$"):
    pool.ask(["raise"])
  assert pool.ask(["pid"]) == pid


def test_an_engine_that_does_not_start_is_one_line_for_each_who_asks(make):
  pool = make("def start():\n  import no_such_package\n")
  for act in (pool.open, lambda: make("import no_such_package").ask(1)):
    with pytest.raises(
      EngineFailed, match="ModuleNotFoundError: No module named 'no_such_package'"
    ):
      act()
  late = make("import time\ndef start():\n  time.sleep(100)\n", start_s=0.3)
  for _ in range(2):
    with pytest.raises(EngineFailed, match="did not answer within 0.3 s"):
      late.ask(1)
  assert late.pids() == []
  with pytest.raises(ValueError, match="pool of 0 processes"):
    make(size=0)


def test_a_request_larger_than_any_buffer_does_not_wait_for_a_process_that_hangs(tmp_path):
  child = ChildProcess(["sleep", "100"])
  with pytest.raises(ChildLost, match="read nothing within 0.3 s"):
    child.ask(b"x" * 10**7, 0.3)
  assert not is_alive(child.pid)
  child.close()


def test_what_a_child_has_started_ends_with_it():
  child = ChildProcess(["sh", "-c", "sleep 100 & echo $!; wait"])
  grandchild = int(child.read(10.0))
  assert is_alive(grandchild)
  child.close()
  deadline = time.monotonic() + 10
  while is_alive(grandchild) and "zombie" not in status(grandchild) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not is_alive(grandchild) or "zombie" in status(grandchild)


def status(pid):
  try:
    with open(f"/proc/{pid}/status") as file:
      return file.read()
  except OSError:
    return "zombie"


def test_seats_are_spread_over_the_processes_and_share_them(make):
  pool = make(size=2)
  seats = [pool.sit() for _ in range(4)]
  pids = [seat.ask(["pid"]) for seat in seats]
  assert pids[0] != pids[1] and sorted(pids[:2]) == sorted(pids[2:])
  assert len({seat.number for seat in seats}) == 4
  seats[0].leave()
  assert pool.sit().ask(["pid"]) == pids[0]


def test_a_killed_process_costs_the_one_who_asked_and_no_other_seat(make):
  pool = make()
  seats = [pool.sit() for _ in range(3)]
  assert [seat.ask(["add", seat.number, k]) for k in (1, 2) for seat in seats] == [1, 1, 1, 3, 3, 3]
  os.kill(pool.pids()[0], signal.SIGKILL)
  with pytest.raises(EngineFailed):
    seats[0].ask(["add", seats[0].number, 4])
  assert [seat.ask(["add", seat.number, 4]) for seat in seats[1:]] == [7, 7]
  assert pool.ask(["known"]) == [seat.number for seat in seats[1:]]
  seats[0].leave(["forget", seats[0].number])  # which the new process does not know
  seats[1].leave(["forget", seats[1].number])
  assert pool.ask(["known"]) == [seats[2].number]


def test_a_process_that_does_not_repeat_what_the_old_one_said_is_no_replacement(make):
  pool = make()
  seat = pool.sit()
  seat.ask(["pid"])
  with pytest.raises(EngineFailed):
    pool.ask(["die"])
  with pytest.raises(EngineFailed, match="answers otherwise"):
    seat.ask(["echo"])


def test_many_threads_get_their_own_answers_and_wait_longer_than_a_deadline(make):
  slow = "import time\ndef start():\n  return lambda request: (time.sleep(0.05), request)[1]\n"
  pool = make(slow, size=2, time_s=0.4)
  pool.open()
  with concurrent.futures.ThreadPoolExecutor(32) as threads:
    assert list(threads.map(pool.ask, range(64))) == list(range(64))
  assert len(pool.pids()) == 2


def test_close_ends_a_request_in_progress_those_that_wait_and_all_later_ones(make):
  pool = make(time_s=60.0)
  pool.open()
  (pid,) = pool.pids()
  with concurrent.futures.ThreadPoolExecutor(3) as threads:
    asked = [threads.submit(pool.ask, ["hang"]) for _ in range(3)]
    time.sleep(0.3)
    pool.close()
    for one in asked:
      with pytest.raises(EngineFailed):
        one.result(timeout=10)
  assert not is_alive(pid)
  with pytest.raises(EngineFailed, match="have been closed"):
    pool.ask(["echo"])
  pool.close()


def test_a_process_ends_when_its_parent_does(tmp_path):
  file = tmp_path / "engine.py"
  file.write_text(ENGINE)
  code = (
    "from sdpo_jax.envs.agents.processes import Pool\n"
    f"pool = Pool('test', {str(file)!r}, {{}}, size=1)\n"
    "pool.open()\nprint(*pool.pids(), flush=True)\nimport os, signal\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed process leaves its files
  output = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=environment
  ).stdout
  pid = int(output)
  deadline = time.monotonic() + 10
  while is_alive(pid) and time.monotonic() < deadline:
    time.sleep(0.02)
  assert not is_alive(pid)
