"""Runs of one, two and four processes on loopback that are stopped, killed and started again.

All have four devices in sum, so that they compute the same. A run that is stopped or killed must
end with the metrics of one that was left alone, and leave no process and no file behind.
"""

import ctypes
import functools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from sdpo_jax import checkpoint, hosts, metrics
from tests.sandbox_host import descendants

ROOT = pathlib.Path(__file__).parent.parent
DEVICES = 4
STEPS = 4
PEER_TIMEOUT_S = 10
SETTINGS = (
  "--config=configs/tinycode.py:local",
  "--config.env.name=tests.told_env:Told",
  f"--config.total_steps={STEPS}",
  "--config.checkpoint.every_steps=2",
  "--config.eval.every_steps=2",
  "--config.mesh.data=2",
  "--config.mesh.fsdp=2",
)
_PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(autouse=True, scope="module")
def orphans_come_here():
  """What loses its parent becomes a child of this process, which can then see it."""
  ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
  yield
  ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def free_port() -> int:
  """Returns a port that nobody listens on."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


class Job:
  """One start of a run in some processes."""

  def __init__(self, workdir: pathlib.Path, count: int, *extra: str, ranks_extra=None):
    self.workdir, self.told = workdir, workdir / "told"
    self.told.mkdir(parents=True, exist_ok=True)
    for marker in self.told.iterdir():
      marker.unlink()
    port = free_port()
    self.processes = []
    for rank in range(count):
      address = [f"--distributed=127.0.0.1:{port},{count},{rank}"] if count > 1 else []
      own = (ranks_extra or {}).get(rank, ())
      self.processes.append(self._start(DEVICES // count, rank, *address, *extra, *own))

  def _start(self, devices: int, rank: int, *extra: str) -> subprocess.Popen:
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "SDPO_TOLD": str(self.told),
    }
    log = open(self.workdir / f"log.{rank}", "w")
    command = [sys.executable, "-m", "sdpo_jax.main", *SETTINGS, f"--workdir={self.workdir}"]
    command += [f"--peer_timeout_s={PEER_TIMEOUT_S}", *extra]
    with log:
      return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

  def wait_for(self, is_there, timeout_s: float = 300) -> None:
    """Waits until something is so, or the run has ended."""
    deadline = time.monotonic() + timeout_s
    while not is_there() and time.monotonic() < deadline:
      if all(process.poll() is not None for process in self.processes):
        return
      time.sleep(0.005)

  def wait_for_phase(self, phase: str) -> None:
    """Waits for a moment in a phase of a step after the first."""
    lines = lambda: len(metrics.read(self.workdir)) if self.processes else 0
    if phase == "start":
      time.sleep(2.0)
      return
    self.wait_for(lambda: lines() >= 2)  # steps 0 and 1
    for marker in self.told.iterdir():
      marker.unlink(missing_ok=True)
    checkpoints = self.workdir / "checkpoints"
    moments = {
      "sampling": lambda: True,
      "judging": (self.told / "judged-train").exists,
      "update": (self.workdir / "rollouts" / "step_000002.jsonl").exists,
      "evaluation": (self.told / "judged-heldout").exists,
      "saving": lambda: checkpoints.exists() and any(checkpoints.iterdir()),
    }
    self.wait_for(moments[phase])

  def signal(self, number: int, ranks=None) -> None:
    """Sends a signal to some or all processes."""
    for rank in range(len(self.processes)) if ranks is None else ranks:
      if self.processes[rank].poll() is None:
        self.processes[rank].send_signal(number)

  def statuses(self, timeout_s: float = 600) -> list[int]:
    """Waits for the end of all processes; kills those that outlive the time."""
    deadline = time.monotonic() + timeout_s
    try:
      for process in self.processes:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      pytest.fail(f"still there after {timeout_s} s: {self.logs()}")
    finally:
      self.signal(signal.SIGKILL)
      for process in self.processes:
        process.wait()
    # as a shell says it: 128 and the signal that ended it
    return [p.returncode if p.returncode >= 0 else 128 - p.returncode for p in self.processes]

  def logs(self) -> str:
    """Returns what all processes printed, cut."""
    texts = [path.read_text(errors="replace") for path in sorted(self.workdir.glob("log.*"))]
    return "\n====\n".join(text[-3000:] for text in texts)


def finish(workdir: pathlib.Path, count: int, *extra: str) -> list[dict]:
  """Runs to the end and returns the lines of the metrics that must repeat."""
  job = Job(workdir, count, *extra)
  assert job.statuses() == [0] * count, job.logs()
  check_nothing_is_left(workdir)
  return repeatable(workdir)


def repeatable(workdir: pathlib.Path) -> list[dict]:
  return [metrics.reproducible(line) for line in metrics.read(workdir)]


def check_nothing_is_left(workdir: pathlib.Path) -> None:
  """No process that lost its parent, no half-written or half-deleted file."""
  deadline = time.monotonic() + 10
  while time.monotonic() < deadline and commands_below():
    time.sleep(0.1)
  assert not commands_below()
  names = [path.name for path in workdir.rglob("*")]
  assert not [name for name in names if name.endswith(".tmp") or "orbax-checkpoint-tmp" in name]
  assert "deleted" not in names


def commands_below() -> list[str]:
  """Returns the commands of processes below this one."""
  commands = []
  for pid in descendants():
    try:
      os.waitpid(pid, os.WNOHANG)  # an orphan that has ended waits for us
    except ChildProcessError:
      pass
    try:
      command = pathlib.Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
      continue
    if "sdpo_jax" in command or "jail.py" in command:
      commands.append(command)
  return commands


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  """Returns the directory of a run that was left alone, by its number of processes."""
  directories = {}

  def directory(count: int) -> pathlib.Path:
    if count not in directories:
      workdir = tmp_path_factory.mktemp(f"whole{count}")
      lines = finish(workdir, count)
      assert [line["step"] for line in lines] == list(range(STEPS + 1))
      directories[count] = workdir
    return directories[count]

  return directory


@pytest.fixture(scope="module")
def whole(whole_run):
  """Returns the metrics of a run that was left alone, by its number of processes."""
  return lambda count: repeatable(whole_run(count))


def assert_near(lines: list[dict], others: list[dict]) -> None:
  """The same numbers up to rounding: other hosts add in another order."""
  assert [line["step"] for line in lines] == [line["step"] for line in others]
  for a, b in zip(lines, others, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)


def stop_and_finish(workdir, count: int, phase: str, whole) -> None:
  """Asks a run to stop in a phase: it has to save, to leave in time, and to go on exactly."""
  job = Job(workdir, count)
  job.wait_for_phase(phase)
  asked = time.monotonic()
  job.signal(signal.SIGTERM, None if phase != "judging" else [count - 1])
  if count == 1:  # some clusters ask again: no reason to leave before all is saved
    for _ in range(20):
      time.sleep(0.1)
      job.signal(signal.SIGTERM)
  statuses = job.statuses(120)
  took_s = time.monotonic() - asked
  if (
    statuses == [0] * count
  ):  # jax's notice takes a second to go round: the last steps were shorter
    assert phase == "saving" and repeatable(workdir) == whole(count)
    return
  assert statuses == [143] * count, job.logs()
  if phase != "start":  # else it ends processes that have not begun to listen
    assert "asked to stop (SIGTERM): the same command" in job.logs()
    assert took_s < 30, took_s
  check_nothing_is_left(workdir)
  saved = checkpoint.all_steps(workdir)
  written = [line["step"] for line in metrics.read(workdir)]
  assert not written or not saved or written[-1] - saved[-1] in (0, -1)
  assert finish(workdir, count) == whole(count)


JOIN_AND_LEAVE = """
import sys, time
from sdpo_jax import hosts
hosts._BEAT_S = 0.0005  # the thread that looks after the others is nearly always in its call
hosts.start(sys.argv[1], 20)
time.sleep(0.3)
"""


def test_processes_that_are_through_leave_with_status_0():
  """Without the thread's end 9 of 12 pairs had one that was aborted as the interpreter ended."""
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  for _ in range(3):
    address = f"127.0.0.1:{free_port()},2"
    pair = [
      subprocess.Popen(
        [sys.executable, "-c", JOIN_AND_LEAVE, f"{address},{rank}"], cwd=ROOT, env=env
      )
      for rank in range(2)
    ]
    assert [process.wait(60) for process in pair] == [0, 0]


LEAVE_LATE = """
import sys, time
from sdpo_jax import hosts
hosts.start(sys.argv[1], 2)
if hosts.leads():
  time.sleep(6)
print("through")
"""


def test_who_is_through_waits_for_one_that_still_writes():
  """For three times as long as a process may be silent: it is at work and says so."""
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  address = f"127.0.0.1:{free_port()},2"
  pair = [
    subprocess.Popen([sys.executable, "-c", LEAVE_LATE, f"{address},{rank}"], cwd=ROOT, env=env)
    for rank in range(2)
  ]
  assert [process.wait(60) for process in pair] == [0, 0]


def test_two_processes_stop_save_and_go_on(tmp_path, whole):
  stop_and_finish(tmp_path, 2, "evaluation", whole)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
  "phase", ["start", "sampling", "judging", "update", "evaluation", "saving"]
)
def test_a_run_stops_in_every_phase(tmp_path, whole, phase, count):
  stop_and_finish(tmp_path, count, phase, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all_with_its_message(tmp_path, rank):
  """One of them alone has a setting that is wrong; the others wait for it in a collective."""
  job = Job(tmp_path, 2, ranks_extra={rank: ("--config.model.path=/nowhere/model",)})
  assert job.statuses(PEER_TIMEOUT_S + 60) == [2, 2], job.logs()
  texts = [(tmp_path / f"log.{i}").read_text() for i in range(2)]
  assert "sdpo_jax: /nowhere/model: no such directory" in texts[rank]
  assert f"process {rank} of this run ended: /nowhere/model: no such directory" in texts[1 - rank]
  check_nothing_is_left(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_falls_silent_ends_the_others(tmp_path, rank):
  job = Job(tmp_path, 2)
  job.wait_for(lambda: len(metrics.read(tmp_path)) >= 2)
  job.signal(signal.SIGSTOP, [rank])
  begun = time.monotonic()
  job.processes[1 - rank].wait(PEER_TIMEOUT_S + 60)
  took_s = time.monotonic() - begun
  job.signal(signal.SIGKILL, [rank])
  job.signal(signal.SIGCONT, [rank])
  assert job.statuses()[1 - rank] == hosts.LOST_PEER, job.logs()
  assert took_s < PEER_TIMEOUT_S + 50
  check_nothing_is_left(tmp_path)


# The sums of a mesh's axes, which one of two processes comes to later than gloo waits for it.
LATE = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from sdpo_jax import hosts, sharding
address, rank = sys.argv[1], int(sys.argv[2])
hosts.start(f"{address},2,{rank}")
mesh = sharding.make_mesh(jax.devices(), data=2, fsdp=2, tensor=1)
hosts.connect(mesh)
time.sleep(35 * rank)
for axes in ("data", "fsdp", ("data", "fsdp")):
  split, whole = jax.NamedSharding(mesh, jax.P(axes)), jax.NamedSharding(mesh, jax.P())
  x = jax.make_array_from_callback((4,), split, np.arange(4.0).__getitem__)
  print(jax.jit(jnp.sum, out_shardings=whole)(x))
"""


@pytest.mark.slow
def test_processes_wait_for_one_that_compiles_longer(tmp_path):
  address = f"127.0.0.1:{free_port()}"
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", LATE, address, str(rank)],
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  for process in processes:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.splitlines()[-3:] == ["6.0"] * 3, err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_peers_never_come_ends_with_one_line(tmp_path, rank):
  address = f"--distributed=127.0.0.1:{free_port()},2,{rank}"
  command = [sys.executable, "-m", "sdpo_jax.main", *SETTINGS, f"--workdir={tmp_path}", address]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  run = subprocess.run(
    [*command, "--peer_timeout_s=5"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
  )
  assert run.returncode == hosts.LOST_PEER
  assert run.stderr == f"sdpo_jax: {address}: after 5 s not all processes have joined\n"


KILLS = [
  (processes, then, seed)
  for seed, (processes, then) in enumerate(
    [(1, 1), (2, 2), (4, 4), (1, 2), (2, 1), (4, 2), (2, 4), (1, 4), (4, 1), (2, 2)] * 2
  )
]


@pytest.mark.slow
@pytest.mark.parametrize("count, then, seed", KILLS)
def test_kills_at_random_moments(tmp_path, whole, count, then, seed):
  """Killed while it samples, judges, evaluates or saves, in one process or all; goes on elsewhere.

  On as many processes the metrics are the same to the last bit, else up to rounding.
  """
  dice = random.Random(f"kill/{seed}")
  phase = dice.choice(["sampling", "judging", "update", "evaluation", "saving"])
  job = Job(tmp_path, count)
  job.wait_for_phase(phase)
  time.sleep(dice.uniform(0, 0.5))
  victims = None if dice.random() < 0.5 else [dice.randrange(count)]
  job.signal(signal.SIGKILL, victims)
  statuses = job.statuses(PEER_TIMEOUT_S + 60)
  assert all(status in (137, hosts.LOST_PEER, 0) for status in statuses), job.logs()
  lines = finish(tmp_path, then)
  if then == count:
    assert lines == whole(count)
  else:
    assert_near(lines, whole(then))
    started = json.loads((tmp_path / "run.json").read_text())["started"]
    assert len(started) == 2


EPISODES = (
  "--config=configs/agentic.py:local,method=craft",
  "--config.env.name=household",
  "--config.rollout.group=4",  # of two, the teacher would have no say in c
  "--config.rollout.rows=8",
  "--config.eval.questions=4",
)


@pytest.fixture(scope="module")
def whole_of_episodes(tmp_path_factory):
  """Returns the metrics of a run of episodes that was left alone, by its number of processes."""
  return functools.cache(
    lambda count: finish(tmp_path_factory.mktemp(f"episodes{count}"), count, *EPISODES)
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "count, then, after", [(1, 1, 1), (1, 1, 3), (2, 2, 2), (1, 2, 3), (2, 1, 1)]
)
def test_kills_of_a_run_of_episodes(tmp_path, whole_of_episodes, count, then, after):
  """Killed while episodes are played after some step, and gone on with, controller and all."""
  whole = whole_of_episodes(then)
  assert any("control/balance" in line for line in whole)
  assert any(line.get("rollout/turns", 0) > 1 for line in whole)
  job = Job(tmp_path, count, *EPISODES)
  job.wait_for(lambda: len(metrics.read(tmp_path)) > after)
  job.signal(signal.SIGKILL)
  statuses = job.statuses(PEER_TIMEOUT_S + 60)
  assert all(status == 137 for status in statuses), job.logs()
  lines = finish(tmp_path, then, *EPISODES)
  if then == count:
    assert lines == whole
  else:
    assert_near(lines, whole)


@pytest.mark.slow
@pytest.mark.parametrize("data, fsdp", [(4, 1), (1, 4)])
def test_kills_before_another_mesh(tmp_path, whole_run, data, fsdp):
  """A run that goes on over the same devices in another shape asks the same questions."""
  job = Job(tmp_path, 1)
  job.wait_for(lambda: checkpoint.all_steps(tmp_path))
  job.signal(signal.SIGKILL)
  assert job.statuses() == [137], job.logs()
  assert checkpoint.latest_step(tmp_path) == 2 < STEPS
  lines = finish(tmp_path, 1, f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}")
  whole = whole_run(1)
  assert_near(lines, repeatable(whole))
  assert questions(tmp_path) == questions(whole)
  log = (tmp_path / "log.0").read_text()
  assert "step 2: other devices than before (mesh {'data': 2, 'fsdp': 2, 'tensor': 1} then" in log
  assert f"{{'data': {data}, 'fsdp': {fsdp}, 'tensor': 1}} now" in log
  assert "the questions and their order stay the same" in log


def questions(workdir: pathlib.Path) -> list[list[str]]:
  """Returns the questions of each step, once for each response."""
  files = sorted((workdir / "rollouts").iterdir())
  steps = [[json.loads(line)["task_id"] for line in file.open()] for file in files]
  assert len(steps) == STEPS and all(len(set(step)) > 1 for step in steps)
  return [sorted(step) for step in steps]  # their rows are packed in another order


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["sampling", "judging"])
@pytest.mark.parametrize("count, then", [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_kills_of_an_evaluation(tmp_path, whole_run, count, then, moment):
  """It begins anew, and says of a run's last checkpoint all that the run itself said of it."""
  run = whole_run(then)
  mode = ("--mode=eval", f"--checkpoint={run}")
  dice = random.Random(f"eval/{count}/{then}/{moment}")
  job = Job(tmp_path, count, *mode)
  judged = job.told / "judged-heldout"
  if moment == "sampling":  # or what comes before it, once the processes have found each other
    job.wait_for(lambda: any("jail.py" in command for command in commands_below()))
    deadline = time.monotonic() + dice.uniform(0, 2)
    job.wait_for(lambda: judged.exists() or time.monotonic() > deadline)
  else:
    job.wait_for(judged.exists)
    time.sleep(dice.uniform(0, 0.04))  # the first verdict takes longer
  victims = None if dice.random() < 0.5 else [dice.randrange(count)]
  job.signal(signal.SIGKILL, victims)
  statuses = job.statuses(PEER_TIMEOUT_S + 60)
  assert all(status in (137, hosts.LOST_PEER) for status in statuses), job.logs()
  assert not (tmp_path / "eval").exists()
  job = Job(tmp_path, then, *mode)
  assert job.statuses() == [0] * then, job.logs()
  check_nothing_is_left(tmp_path)
  scores = json.loads((tmp_path / "eval" / f"step_{STEPS:06d}.json").read_text())
  said = {key: value for key, value in repeatable(run)[-1].items() if key.startswith("eval/")}
  assert said and {key: scores.get(key) for key in said} == said  # and more: intervals, kinds


DISCOVER = ("--mode=discover", "--config=configs/discover.py:local")
# moment of a kill -> whether it has come, by the lines of the files; runs 0 to 2 are those of sdpo,
# best_of_k and multi_turn on the first question, 3 is sdpo on the second
DISCOVER_KILLS = {
  "difficulty": lambda lines: lines("difficulty.jsonl") >= 2,
  "first update": lambda lines: lines("attempts/00000.jsonl") >= 1,
  "turns": lambda lines: lines("attempts/00002.jsonl") >= 5,
  "second question": lambda lines: lines("attempts/00003.jsonl") >= 1,
  "end": lambda lines: lines("discover.jsonl") >= 5,
}


@pytest.fixture(scope="module")
def whole_discovery(tmp_path_factory):
  """Returns the directory of a session of --mode=discover that was left alone."""
  workdir = tmp_path_factory.mktemp("discovery")
  job = Job(workdir, 1, *DISCOVER)
  assert job.statuses() == [0], job.logs()
  check_nothing_is_left(workdir)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize("moment", DISCOVER_KILLS)
def test_kills_of_a_discovery(tmp_path, whole_discovery, moment):
  """It goes on in mid-question: what was judged and written is not judged again."""
  job = Job(tmp_path, 1, *DISCOVER)
  job.wait_for(lambda: DISCOVER_KILLS[moment](lambda name: len(json_lines(tmp_path / name))))
  time.sleep(random.Random(f"discover/{moment}").uniform(0, 0.2))
  job.signal(signal.SIGKILL)
  assert job.statuses() == [137], job.logs()
  before = {name: json_lines(tmp_path / name) for name in ("difficulty.jsonl", "discover.jsonl")}
  known = attempts_on_disk(tmp_path)
  job = Job(tmp_path, 1, *DISCOVER)
  assert job.statuses() == [0], job.logs()
  check_nothing_is_left(tmp_path)
  assert not (tmp_path / "attempts").exists()
  for name, lines in before.items():  # with the times of their first session
    assert json_lines(tmp_path / name)[: len(lines)] == lines
  assert discovered(tmp_path) == discovered(whole_discovery)
  assert known > 0 or moment == "difficulty"
  assert len(judged(tmp_path)) == len(judged(whole_discovery)) - known


def json_lines(path: pathlib.Path) -> list[dict]:
  """Returns the whole lines of a file that is being written, or was when its writer was killed."""
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def attempts_on_disk(workdir: pathlib.Path) -> int:
  """Returns how many responses a killed session has judged and kept; none has solved a question."""
  finished = {
    (x["arm"], x["task_id"], x["seed"]): x for x in json_lines(workdir / "discover.jsonl")
  }
  begun = [batch for path in (workdir / "attempts").glob("*.jsonl") for batch in json_lines(path)]
  batches = [batch for batch in begun if tuple(batch["run"]) not in finished]
  kept = sum(len(group) for batch in batches for group in batch["groups"])
  return kept + sum(run["attempts"] for run in finished.values())


def discovered(workdir: pathlib.Path) -> dict:
  """Returns what a session has found, without times."""
  runs = [metrics.reproducible(line) for line in json_lines(workdir / "discover.jsonl")]
  assert len(runs) == 6 and all(run["attempts"] == 16 for run in runs)
  assert (workdir / "discover.json").exists()
  return {"runs": runs, "difficulty": json_lines(workdir / "difficulty.jsonl")}


def judged(workdir: pathlib.Path) -> list[str]:
  """Returns the questions of all responses that the last start judged."""
  return (workdir / "told" / "judged").read_text().splitlines()


@pytest.mark.slow
def test_a_discovery_in_two_processes_is_refused_in_one_line(tmp_path):
  job = Job(tmp_path, 2, *DISCOVER)
  assert job.statuses(120) == [2, 2], job.logs()
  for rank in range(2):
    log = (tmp_path / f"log.{rank}").read_text()
    assert "--mode=discover runs in one process; it uses all of its devices" in log
    assert "Traceback" not in log
  check_nothing_is_left(tmp_path)
  assert not (tmp_path / "discover.jsonl").exists()
