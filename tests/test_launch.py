"""The launch scripts: what they print, and what they do with stand-ins for the tools of a cluster.

A stand-in is a script on PATH that records its arguments, and answers as the test says. No tool of
a cloud is on that PATH otherwise. The last test runs a real Slurm of one node on loopback, where
Debian's packages slurmctld, slurmd and slurm-client are installed.
"""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import jsonschema
import kubernetes_validate
import pytest
import yaml

from sdpo_jax import config, main

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SHELL_SCRIPTS = sorted(LAUNCH.glob("*.sh"))
PROGRAMS = ("gke.sh", "gpu_node.sh", "slurm.sh", "sweep.py", "tpu_pod.sh")
# what the scripts may use; a PATH of these alone has no gcloud, kubectl, sbatch or nvidia-smi
TOOLS = "awk bash cat curl date env git grep hostname mkdir mktemp nohup rm sed seq setsid sh sleep"
MORE_TOOLS = "tail tar timeout touch tr wc xargs"
WORKDIR = "--workdir=/runs/a"


class Bench:
  """A PATH of stand-ins, and what they recorded."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.bin = folder / "bin"
    self.bin.mkdir()
    for tool in [*TOOLS.split(), *MORE_TOOLS.split()]:
      where = shutil.which(tool)
      assert where, tool
      (self.bin / tool).symlink_to(where)
    self.stand_in("python", f'exec {shlex.quote(sys.executable)} "$@"', record=False)
    self.env = {
      "PATH": str(self.bin),
      "HOME": str(folder),
      "BENCH": str(folder),
      "POLL_S": "0.1",
      "RESTART_PAUSE_S": "0",
    }

  def stand_in(self, name: str, body: str, record: bool = True) -> None:
    """Puts a bash script on PATH, in which `next FILE` prints and drops the first line of FILE.

    The last line stays.
    """
    lines = ["#!" + shutil.which("bash")]
    if record:
      lines += [
        'printf -v call "%s\\t" "${0##*/}" "$@"',
        'printf "%s\\n" "${call%?}" >>"$BENCH/calls"',
      ]
    lines += [
      'next() { line=$(sed -n 1p "$BENCH/$1"); echo "$line"',
      '[[ $(wc -l <"$BENCH/$1") == 1 ]] || sed -i 1d "$BENCH/$1"; }',
      body,
    ]
    path = self.bin / name
    path.unlink(missing_ok=True)
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)

  def answers(self, name: str, *lines) -> None:
    (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

  def calls(self, name: str = "") -> list[list[str]]:
    """Returns the words of each recorded call."""
    path = self.folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    calls = [line.split("\t") for line in lines]
    return [call[1:] for call in calls if call[0] == name] if name else calls

  def start(self, script, *arguments, **env) -> subprocess.Popen:
    command = [str(LAUNCH / script), *arguments]
    if str(script).endswith(".py"):
      command.insert(0, sys.executable)
    return subprocess.Popen(
      command,
      cwd=ROOT,
      env=self.env | env,
      text=True,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )

  def run(self, script, *arguments, **env) -> subprocess.CompletedProcess:
    process = self.start(script, *arguments, **env)
    out, err = process.communicate(timeout=300)  # of a busy machine
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)

  def wait_for(self, name: str, text: str = "", seconds: float = 20) -> str:
    """Waits until a file holds a text, and returns all of it."""
    end = time.monotonic() + seconds
    path = self.folder / name
    while not (path.exists() and text in path.read_text() and path.read_text()):
      assert time.monotonic() < end, f"no {text!r} in {name}"
      time.sleep(0.02)
    return path.read_text()


@pytest.fixture
def bench(tmp_path):
  return Bench(tmp_path)


def commands(output: str) -> list[list[str]]:
  """Returns the words of every line that is no comment."""
  lines = [line for line in output.splitlines() if line and not line.startswith("#")]
  return [shlex.split(line) for line in lines]


def trainer_arguments(words: list[str]) -> list[str]:
  return words[words.index("sdpo_jax.main") + 1 :]


def script(name: str):
  """Imports a script of launch/, which is no package."""
  spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def is_alive(pid: int) -> bool:
  try:
    status = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except FileNotFoundError:
    return False
  return status.rpartition(")")[2].split()[0] != "Z"


def ends(pid: int, seconds: float = 10) -> bool:
  """Waits until a process is gone, which on a busy machine takes a while after it was killed."""
  end = time.monotonic() + seconds
  while is_alive(pid) and time.monotonic() < end:
    time.sleep(0.02)
  return not is_alive(pid)


# ---- all scripts


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_no_complaint(path):
  shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
  done = subprocess.run([shellcheck, "-x", path], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", PROGRAMS)
def test_a_bare_dry_run_prints_valid_trainer_commands(script, bench, monkeypatch):
  monkeypatch.chdir(ROOT)
  before = set(ROOT.iterdir())
  done = bench.run(script, "--dry-run")
  assert (done.returncode, done.stderr) == (0, "")
  assert set(ROOT.iterdir()) == before
  found = [
    part for part in done.stdout.splitlines() if "sdpo_jax.main" in part or "worker.sh run" in part
  ]
  assert found
  for line in found:
    if script == "gke.sh":
      words = json.loads(line.partition("command: ")[2])
    elif script == "tpu_pod.sh":
      [remote] = [word for word in shlex.split(line) if word.startswith("--command=")]
      words = ["sdpo_jax.main", *shlex.split(remote)[5:]]
    else:
      words = shlex.split(line)
    _, c = main.parse(["main", *trainer_arguments(words)])
    config.validate(c)


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_and_unknown_flags(script, bench):
  done = bench.run(script, "--help")
  assert done.returncode == 0 and "--dry-run" in done.stdout and "set -e" not in done.stdout
  done = bench.run(script, "--no-such-flag")
  assert (done.returncode, done.stdout) == (2, "")
  assert len(done.stderr.splitlines()) == 1 and "--no-such-flag" in done.stderr


@pytest.mark.parametrize(
  "script, arguments, reason",
  [
    ("slurm.sh", ["--", WORKDIR], "sbatch is not installed"),
    ("slurm.sh", ["--", "--config=configs/tinycode.py"], "--workdir"),
    ("slurm.sh", ["--dry-run", "--gpus=8", "--tasks-per-node=3"], "cannot be divided"),
    ("slurm.sh", ["--nodes=two"], "--nodes=two"),
    ("slurm.sh", ["--nodes=0"], "positive"),
    ("gpu_node.sh", ["--dry-run", "--server=x"], "choose from none, vllm, sglang"),
    ("gpu_node.sh", ["--dry-run", "--server=vllm", "--gpus=1"], "each server and the trainer need"),
    ("gpu_node.sh", ["--dry-run", "--server=vllm", "--gpus=4", "--servers=4"], "need one"),
    ("gpu_node.sh", ["--dry-run", "--server=vllm", "--servers=0"], "--servers=0"),
    ("gpu_node.sh", ["--dry-run", "--server=vllm", "--port=65536"], "no room for 1 servers"),
    ("gpu_node.sh", ["--dry-run", "--server=vllm", "--", WORKDIR], "takes adapters"),
    ("slurm.sh", ["--dry-run", "--server=vllm", "--servers=8"], "each server and the trainer need"),
    ("slurm.sh", ["--dry-run", "--server=sglang", "--nodes=2"], "--nodes=1"),
    ("slurm.sh", ["--dry-run", "--server=vllm", "--", WORKDIR], "takes adapters"),
    ("gpu_node.sh", ["--server=vllm", "--", WORKDIR], "no nvidia-smi"),
    ("gpu_node.sh", [], "--workdir"),
    ("tpu_pod.sh", ["create"], "--zone"),
    ("tpu_pod.sh", ["create", "--zone=z"], "gcloud is not installed"),
    ("tpu_pod.sh", ["grow", "--dry-run"], "unknown command 'grow'"),
    ("tpu_pod.sh", ["--dry-run", "--type=tpu7x-8"], "GKE"),
    ("tpu_pod.sh", ["--dry-run", "--type=v9-8"], "v6e-N"),
    ("tpu_pod.sh", ["--dry-run", "--name=A b"], "--name"),
    ("gke.sh", ["--dry-run", "--chip=v6e", "--topology=3x3"], "4x4"),
    ("gke.sh", ["--dry-run", "--chip=v6e", "--hosts=2"], "--chip=gpu"),
    ("gke.sh", ["--dry-run", "--chip=v4"], "v5e, v6e, v5p, gpu"),
    ("gke.sh", ["--dry-run", "--name=Run_1"], "--name"),
    ("gke.sh", ["--dry-run", "--image=a b"], "a b"),
    ("gke.sh", ["--dry-run", "--", "--workdir=runs/a"], "--claim"),
    ("gke.sh", ["--dry-run", "--", "--workdir=/mnt/b/a", "--config=a\nb"], "control character"),
    ("gke.sh", ["--image=i", "--claim=c", "--", WORKDIR], "kubectl is not installed"),
    ("sweep.py", [], "no axis"),
    ("sweep.py", ["seed=1,1"], "twice"),
    ("sweep.py", ["seed"], "NAME=VALUE"),
    ("sweep.py", ["model=a/b,a_b"], "one directory"),
  ],
)
def test_a_wrong_command_line_gives_one_line_and_status_2(script, arguments, reason, bench):
  done = bench.run(script, *arguments)
  assert done.returncode == 2 and done.stdout == ""
  assert len(done.stderr.splitlines()) == 1 and reason in done.stderr, done.stderr


def documented() -> list[str]:
  """Returns the commands of launch scripts in both READMEs, and those of its table of examples."""
  found = []
  for path in (ROOT / "README.md", LAUNCH / "README.md"):
    text = path.read_text()
    found += re.findall(r"^launch/.*", text, re.M) + re.findall(r"`(launch/[^`]* --[^`]*)`", text)
  return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_is_valid(command, bench):
  """Dots stand for the arguments of a run; a dry run takes an example for them."""
  script, *words = shlex.split(command.replace("$HOME", "/home/me").removesuffix("-- ..."))
  at = words.index("--") if "--" in words else len(words)
  if script.endswith("tpu_pod.sh"):
    at = max(1, at)
  done = bench.run(script.removeprefix("launch/"), *words[:at], "--dry-run", *words[at:])
  assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_printed_words_are_read_back_as_they_were(bench):
  nasty = ['--config.x=it\'s "so" $HOME `id` \\ & *', "--config.y=('a', 'b')", ""]
  done = bench.run("gpu_node.sh", "--dry-run", "--", WORKDIR, *nasty)
  [words] = commands(done.stdout)
  assert trainer_arguments(words) == [WORKDIR, *nasty]


def test_preflight_counts_devices(capsys):
  preflight = script("preflight")
  assert preflight.main(["preflight.py", "8", "1"]) == 0  # what conftest.py sets
  assert preflight.main(["preflight.py", "4", "1"]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert "4 devices" in line and "{0: 8}" in line


# ---- sweep.py


def test_a_sweep_is_a_grid_of_valid_runs(bench, monkeypatch):
  monkeypatch.chdir(ROOT)
  axes = ["method=sdpo,grpo", "seed=0,1", "config.optimizer.lr=1e-4,3e-4"]
  done = bench.run("sweep.py", *axes, "--workdir=runs/s", "--", "--config.total_steps=3")
  lines = commands(done.stdout)
  assert len(lines) == 8
  points, places = set(), set()
  for words in lines:
    f, c = main.parse(["main", *trainer_arguments(words)])
    config.validate(c)
    assert c.total_steps == 3
    points.add((c.method.advantage.name, c.seed, c.optimizer.lr))
    places.add(f.workdir)
  assert len(points) == len(places) == 8
  assert "runs/s/grpo-seed1-lr3e-4" in places


def test_the_lines_of_a_sweep_run_under_xargs_and_under_a_launcher(bench):
  bench.stand_in("python", "")
  launcher = "launch/gpu_node.sh --max-restarts=1 --"
  lines = bench.run("sweep.py", "seed=1,2", f"--launcher={launcher}").stdout
  subprocess.run(
    ["xargs", "-d", "\n", "-P", "2", "-I{}", "sh", "-c", "{}"],
    input=lines,
    text=True,
    check=True,
    cwd=ROOT,
    env=bench.env,
  )
  assert sorted(call[3] for call in bench.calls("python")) == [
    "--workdir=runs/sweep/seed1",
    "--workdir=runs/sweep/seed2",
  ]


# ---- gpu_node.sh: the rule of restarts

# what the trainer does: the next status of a list, and its process id
TRAINER = 'echo $$ >>"$BENCH/trainers"; exit $(next statuses)'
# one that saves when it is asked to stop
SAVING = """
trap 'echo asked >>"$BENCH/said"; sleep 0.2; exit 143' TERM
echo began >>"$BENCH/said"
while :; do sleep 0.05; done
"""
# and leaves a child behind
LASTING = f'sleep 300 &\necho $! >"$BENCH/orphan"\n{SAVING}'


@pytest.mark.parametrize(
  "statuses, starts, last",
  [
    ([0], 1, 0),
    ([143, 134, 0], 3, 0),
    ([2], 1, 2),
    ([1], 1, 1),
    ([137], 1, 137),  # killed, and there is no peer that could have been lost
    ([143, 2], 2, 2),
    ([143], 3, 143),  # --max-restarts=2
    ([134], 3, 134),
  ],
)
def test_only_a_preempted_run_or_one_that_lost_a_peer_starts_again(statuses, starts, last, bench):
  bench.stand_in("python", TRAINER)
  bench.answers("statuses", *statuses)
  done = bench.run("gpu_node.sh", "--max-restarts=2", "--", WORKDIR)
  assert done.returncode == last, done.stderr
  assert bench.calls("python") == [["-m", "sdpo_jax.main", WORKDIR]] * starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_trainer_politely_and_for_good(number, bench):
  bench.stand_in("python", LASTING)
  process = bench.start("gpu_node.sh", "--", WORKDIR)
  bench.wait_for("said", "began")
  process.send_signal(number)
  process.communicate(timeout=20)
  assert process.returncode == 143
  assert (bench.folder / "said").read_text() == "began\nasked\n"
  assert ends(int((bench.folder / "orphan").read_text()))


def test_a_signal_during_the_pause_prevents_the_next_start(bench):
  bench.stand_in("python", TRAINER)
  bench.answers("statuses", 143)
  process = bench.start("gpu_node.sh", "--", WORKDIR, RESTART_PAUSE_S="60")
  while "started again" not in process.stderr.readline():
    pass
  process.terminate()
  process.communicate(timeout=20)
  assert process.returncode == 143 and len(bench.calls("python")) == 1


# ---- gpu_node.sh: servers beside the trainer

# answers like vLLM or SGLang after a while, with a worker in its process group; or fails as it is
# told, on one port: --fail-at, --never-at
SERVER = """
import os, pathlib, signal, socket, sys, time
arguments, bench = sys.argv[1:], pathlib.Path(os.environ["BENCH"])
port = int(arguments[arguments.index("--port") + 1])
told = lambda flag: flag in arguments and arguments[arguments.index(flag) + 1] == str(port)
print("loading", flush=True)
worker = os.fork()
if worker == 0:
  os.execvp("sleep", ["sleep", "300"])

def stop(*_):
  os.waitpid(worker, 0)  # the group is asked to stop, and the worker is in it
  os._exit(0)

if "--deaf" in arguments:
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
  signal.signal(signal.SIGTERM, stop)
facts = [os.getpid(), worker, os.environ["CUDA_VISIBLE_DEVICES"]]
(bench / f"server-{port}").write_text(" ".join(map(str, facts)) + "\\n")
if told("--fail-at"):
  sys.exit("no room on the GPU")
ready = time.monotonic() + (1000 if told("--never-at") else 0.1)
listening = socket.create_server(("127.0.0.1", port))
while True:
  asked, _ = listening.accept()
  path = asked.recv(1000).split()[1]
  status = b"200 OK" if time.monotonic() > ready else b"503 Service Unavailable"
  body = b'{"data": [{"id": "MODEL"}]}' if path == b"/v1/models" else b""
  asked.sendall(b"HTTP/1.0 " + status + b"\\r\\n\\r\\n" + body)
  asked.close()
"""
# of trainer and launch/server_settings.py, which the tests of servers run as the trainer's stand-in
SETTINGS = """
if [[ $1 == launch/server_settings.py ]]; then
  printf '%s\\n' "${3:-MODEL}" "${3:-MODEL}" --asked
  exit
fi
"""
TELLS = "--config.rollout."  # what the trainer's arguments about servers begin with


def free_ports(count: int) -> int:
  """Returns the first of so many ports in a row that are free."""
  while True:
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
      first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
      for port in range(first + 1, first + count):
        stack.enter_context(socket.create_server(("127.0.0.1", port)))
      return first


class Servers:
  """Stand-ins for vLLM and SGLang on four GPUs, and what became of them."""

  def __init__(self, bench):
    self.bench, self.port = bench, free_ports(3)
    (bench.folder / "server.py").write_text(SERVER)
    body = f'exec {sys.executable} -S "$BENCH/server.py" "$@"'
    bench.stand_in("vllm", body)
    (bench.folder / "venv" / "bin").mkdir(parents=True)
    self.memory = bench.folder / "memory"
    self.memory.mkdir()
    bench.env["WEIGHTS_ROOT"] = str(self.memory)
    self.workdir = f"--workdir={bench.folder}/run"
    self.flags = ["--server=vllm", "--gpus=4", f"--port={self.port}"]

  def trainer(self, body: str) -> None:
    self.bench.stand_in("python", SETTINGS + body)

  def command(self, *flags: str) -> list[str]:
    return ["gpu_node.sh", *self.flags, *flags, "--", self.workdir]

  def run(self, *flags: str, **env):
    return self.bench.run(*self.command(*flags), **env)

  def start(self, *flags: str):
    return self.bench.start(*self.command(*flags))

  def trainers(self) -> list[list[str]]:
    """Returns the arguments of each start of the trainer."""
    return [call[2:] for call in self.bench.calls("python") if call[0] == "-m"]

  def facts(self, index: int) -> list[str]:
    """Returns (process id, worker's process id, GPUs) of a server."""
    return self.bench.wait_for(f"server-{self.port + index}", "\n").split()

  def log(self, index: int) -> pathlib.Path:
    return self.bench.folder / "run" / "servers" / f"vllm-{self.port + index}.log"

  def pids(self) -> list[int]:
    files = self.bench.folder.glob("server-*")
    return [int(pid) for path in files for pid in path.read_text().split()[:2]]


@pytest.fixture
def servers(bench):
  """At the end no process of a server may be left, and no directory of weights."""
  held = Servers(bench)
  yield held
  left = [pid for pid in held.pids() if not ends(pid)]
  for pid in left:
    os.kill(pid, signal.SIGKILL)
  assert not left, "a server or its worker was left behind"
  assert not list(held.memory.iterdir())


def told(arguments: list[str]) -> dict[str, str]:
  """Returns the settings of config.rollout among arguments."""
  pairs = [word.removeprefix(TELLS).split("=", 1) for word in arguments if word.startswith(TELLS)]
  return dict(pairs)


def test_servers_and_trainer_divide_the_gpus(servers):
  servers.trainer('echo "$CUDA_VISIBLE_DEVICES" >"$BENCH/trainer"; exit $(next statuses)')
  servers.bench.answers("statuses", 143, 0)
  done = servers.run("--servers=3", "--server-flag=--x=1")
  assert done.returncode == 0, done.stderr
  assert (servers.bench.folder / "trainer").read_text() == "0\n"
  assert [servers.facts(i)[2] for i in range(3)] == ["1", "2", "3"]
  calls = sorted(servers.bench.calls("vllm"))  # the trainer was started twice, each server once
  assert len(calls) == 3 and len(servers.trainers()) == 2
  for index, call in enumerate(calls):
    assert call[:4] == ["serve", "MODEL", "--tensor-parallel-size", "1"]
    assert call[4:] == [
      "--host",
      "127.0.0.1",
      "--port",
      str(servers.port + index),
      "--asked",
      "--x=1",
    ]
    assert servers.log(index).read_text() == "loading\n"
    assert f"server {index} (vllm on port {servers.port + index}) is ready" in done.stderr
  first_of = [call[0] for call in servers.bench.calls()]
  assert first_of.index("vllm") < len(first_of) - 2  # the trainer waited for them


def test_a_server_may_have_several_gpus(servers):
  servers.trainer('echo "$CUDA_VISIBLE_DEVICES" >"$BENCH/trainer"')
  servers.flags.remove("--gpus=4")
  done = servers.run("--server-gpus=2", CUDA_VISIBLE_DEVICES="3,5,7")
  assert done.returncode == 0, done.stderr
  assert (servers.bench.folder / "trainer").read_text() == "3\n"
  assert servers.facts(0)[2] == "5,7"


def test_the_trainer_is_told_of_the_servers(servers, monkeypatch):
  servers.trainer(
    'for word; do case $word in *weights_dir=*) test -d "${word#*=}" && '
    'echo "${word#*=}" >"$BENCH/weights";; esac; done'
  )
  assert servers.run("--servers=2").returncode == 0
  [arguments] = servers.trainers()
  weights = (servers.bench.folder / "weights").read_text().strip()
  assert told(arguments) == {
    "engine": "vllm",
    "server.urls": f"('http://127.0.0.1:{servers.port}','http://127.0.0.1:{servers.port + 1}',)",
    "server.weights_dir": weights,
    "server.patience_s": "60",
  }
  assert not pathlib.Path(weights).exists()  # made by the script, and removed by it
  monkeypatch.chdir(ROOT)
  words = [*arguments, "--config=configs/tinycode.py", "--config.model.lora.rank=2"]
  config.validate(main.parse(["main", *words])[1])


def test_a_directory_of_weights_that_is_named_stays(servers):
  servers.trainer("")
  weights = servers.bench.folder / "weights"
  weights.mkdir()
  assert servers.run(f"--weights-dir={weights}").returncode == 0
  assert told(servers.trainers()[0])["server.weights_dir"] == str(weights) and weights.exists()


def test_another_model_is_named_to_the_trainer(servers):
  servers.trainer("")
  assert servers.run("--server-model=MODEL").returncode == 0
  assert told(servers.trainers()[0])["server.model"] == "MODEL"


def test_sglang_gets_its_own_flags_and_no_name(servers):
  venv = servers.bench.folder / "venv"
  python = venv / "bin" / "python"
  python.write_text((servers.bench.bin / "vllm").read_text().replace("${0##*/}", "sglang"))
  python.chmod(0o755)
  servers.trainer("")
  servers.flags[0] = "--server=sglang"
  done = servers.run(f"--server-venv={venv}", "--server-model=MODEL")
  assert done.returncode == 0, done.stderr
  [call] = servers.bench.calls("sglang")
  assert call[:5] == ["-m", "sglang.launch_server", "--model-path", "MODEL", "--tp-size"]
  assert "server.model" not in told(servers.trainers()[0])


def test_servers_may_be_for_an_environment(servers):
  """The trainer samples by itself, and is told of none."""
  servers.trainer("")
  command = [*servers.command(), "--config.rollout.engine=local"]
  assert servers.bench.run(*command).returncode == 0
  assert told(servers.trainers()[0]) == {"engine": "local"}


@pytest.mark.parametrize(
  "flags, reason",
  [
    (["--server-flag=--fail-at", "--server-flag={1}"], "ended with status 1"),
    (["--server-flag=--never-at", "--server-flag={0}", "--ready-timeout=2"], "not ready after 2 s"),
    (["--server-model=OTHER"], "does not serve OTHER"),
  ],
)
def test_without_all_servers_there_is_no_training(flags, reason, servers):
  """One line names the server and its log; the other one is ended."""
  servers.trainer("")
  ports = [servers.port, servers.port + 1]
  done = servers.run("--servers=2", *[flag.format(*ports) for flag in flags])
  assert done.returncode == 1 and not servers.trainers()
  [line] = [line for line in done.stderr.splitlines() if "is ready" not in line]
  index = 1 if "ended" in reason else 0
  assert f"server {index} (vllm on port {ports[index]})" in line and reason in line
  assert line.endswith(f"its log: {servers.log(index)}")
  if "ended" in reason:
    assert "no room on the GPU" in servers.log(1).read_text()


def test_a_port_in_use_is_refused(servers):
  servers.bench.stand_in("curl", "exit 0")  # somebody answers there
  servers.trainer("")
  done = servers.run()
  assert done.returncode == 1 and "choose another --port" in done.stderr
  assert not servers.bench.calls("vllm")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_trainer_and_servers(number, servers):
  servers.trainer(LASTING)
  process = servers.start("--servers=2")
  servers.bench.wait_for("said", "began")
  process.send_signal(number)
  process.communicate(timeout=20)
  assert process.returncode == 143
  assert (servers.bench.folder / "said").read_text() == "began\nasked\n"
  assert ends(int((servers.bench.folder / "orphan").read_text()))
  assert len(servers.pids()) == 4


def test_a_signal_stops_servers_that_are_loading(servers):
  servers.trainer("")
  process = servers.start(
    "--servers=2", "--server-flag=--never-at", f"--server-flag={servers.port}"
  )
  for index in (0, 1):
    servers.facts(index)
  process.terminate()
  process.communicate(timeout=20)
  assert process.returncode == 143 and not servers.trainers()


def test_servers_that_do_not_listen_are_killed_all_at_a_time(servers):
  servers.trainer("")
  begun = time.monotonic()
  done = servers.run("--servers=3", "--server-flag=--deaf", SERVER_GRACE_S="2")
  assert done.returncode == 0 and done.stderr.count("still runs after 2 s: killed") == 3
  assert time.monotonic() - begun < 20


def test_the_trainer_stops_when_a_server_dies(servers):
  servers.trainer(LASTING)
  process = servers.start("--servers=2")
  servers.bench.wait_for("said", "began")
  os.kill(int(servers.facts(1)[0]), signal.SIGKILL)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 1
  assert f"server 1 (vllm on port {servers.port + 1}) ended with status 137; its log: " in err
  assert "asked to save and stop" in err and str(servers.log(1)) in err
  assert (servers.bench.folder / "said").read_text() == "began\nasked\n"
  assert ends(int((servers.bench.folder / "orphan").read_text()))


def test_a_trainer_that_fails_ends_the_servers(servers):
  servers.trainer("exit 1")
  assert servers.run("--servers=2").returncode == 1
  assert len(servers.pids()) == 4


LORA = ["--config=configs/tinycode.py", "--config.model.lora.rank=20"]
VLLM = [
  f"{TELLS}engine=vllm",
  f"{TELLS}server.urls=('http://h:1',)",
  f"{TELLS}server.weights_dir=/w",
]


@pytest.mark.parametrize(
  "kind, model, arguments, lines",
  [
    ("vllm", "", [*LORA, *VLLM], ["TINY", "TINY", "--enable-lora", "--max-lora-rank", "32"]),
    (
      "vllm",
      "M",
      [*LORA, *VLLM, f"{TELLS}temperature=0.7", f"{TELLS}server.model=name"],
      ["M", "name", *"--enable-lora --max-lora-rank 32 --logprobs-mode processed_logprobs".split()],
    ),
    ("vllm", "", LORA, ["TINY", "TINY"]),  # the trainer samples by itself
    (
      "sglang",
      "",
      [LORA[0], f"{TELLS}engine=sglang", *VLLM[1:]],
      ["TINY", "TINY", "--enable-deterministic-inference"],
    ),
  ],
)
def test_flags_of_a_server_follow_from_the_run(kind, model, arguments, lines, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert script("server_settings").main(["server_settings.py", kind, model, *arguments]) == 0
  assert capsys.readouterr().out.split("\n")[:-1] == [
    config.MODELS["tiny"] if line == "TINY" else line for line in lines
  ]


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([LORA[0], *VLLM], "takes adapters, and config.model.lora.rank=0"),
    ([LORA[0], *VLLM, "--config.model.lora.rank=513"], "rank=513: vLLM takes adapters up to 512"),
    ([*LORA, "--config.rollout.grup=1"], "did you mean config.rollout.group"),
    (["--config=configs/none.py"], "no such file"),
  ],
)
def test_wrong_settings_are_found_before_a_server_loads(arguments, message, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert script("server_settings").main(["server_settings.py", "vllm", "", *arguments]) == 2
  captured = capsys.readouterr()
  assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


# ---- tpu_pod.sh and tpu_worker.sh

GCLOUD = """
case " $* " in
  *" describe "*) next states ;;
  *"tpu_worker.sh status"*) next statuses ;;
  *" ssh "* | *" scp "*) exit "${SSH_STATUS:-0}" ;;
esac
"""


def tpu(bench, *arguments, states, statuses=("running",), **env):
  bench.stand_in("gcloud", GCLOUD)
  bench.answers("states", *states)
  bench.answers("statuses", *statuses)
  words = [*arguments[:1], "--zone=z", "--poll=0", *arguments[1:]]
  return bench.run("tpu_pod.sh", *words, **env)


def requests(bench):
  """Returns what was asked of queued resources, without the questions about their state."""
  calls = [call[3] for call in bench.calls("gcloud") if call[2] == "queued-resources"]
  return [call for call in calls if call != "describe"]


WAITING = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"]


def test_create_waits_until_the_slice_is_active(bench):
  flags = ["--type=v5p-16", "--spot", "--name=n", "--create-flag=--project=p"]
  done = tpu(bench, "create", *flags, states=[*WAITING, "", "ACTIVE"])
  assert done.returncode == 0, done.stderr
  create, *questions = bench.calls("gcloud")
  assert create[:5] == ["compute", "tpus", "queued-resources", "create", "n"]
  wanted = {"--node-id=n", "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5"}
  assert wanted | {"--spot", "--zone=z", "--project=p"} <= set(create)
  assert [call[3] for call in questions] == ["describe"] * 5


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "SUSPENDING", "DELETING", ""])
def test_create_stops_at_a_state_that_leads_nowhere(state, bench):
  done = tpu(bench, "create", states=[*WAITING, state])
  assert done.returncode == 1
  assert (state or "does not tell") in done.stderr


def test_train_runs_the_same_line_on_all_workers(bench):
  done = tpu(
    bench,
    "train",
    "--",
    "--workdir=/mnt/b/r",
    "--config=a b",
    states=["ACTIVE"],
    statuses=["running", "running", "0"],
  )
  assert done.returncode == 0, done.stderr
  remote = [call for call in bench.calls("gcloud") if call[3] in ("ssh", "scp")]
  assert all("--worker=all" in call for call in remote[:3])
  [command] = [word for word in remote[2] if word.startswith("--command=")]
  assert command.endswith(
    "tpu_worker.sh run 20 4 --workdir=/mnt/b/r '--config=a b' --distributed=auto"
  )
  assert requests(bench) == ["create"]  # the slice stays until `delete`


@pytest.mark.parametrize("status", ["2", "1", "143"])
def test_train_ends_with_the_status_of_the_run(status, bench):
  # 143 on a slice that stays: its restarts are used up
  done = tpu(bench, "train", "--spot", "--", WORKDIR, states=["ACTIVE"], statuses=[status])
  assert done.returncode == int(status) and requests(bench) == ["create"]


def test_a_spot_slice_is_created_again_a_bounded_number_of_times(bench):
  taken_away = ["ACTIVE", "ACTIVE", "SUSPENDED"]
  arguments = ["train", "--spot", "--max-recreations=1", "--", WORKDIR]
  done = tpu(bench, *arguments, states=taken_away * 2, statuses=["running", "143"])
  assert done.returncode == 1 and "created again 1 times" in done.stderr
  assert requests(bench) == ["create", "delete", "create"]
  [delete] = [call for call in bench.calls("gcloud") if call[3] == "delete"]
  assert "--force" in delete


def test_a_slice_that_is_not_spot_is_not_created_again(bench):
  done = tpu(bench, "train", "--", WORKDIR, states=["ACTIVE", "FAILED"])
  assert done.returncode == 1 and requests(bench) == ["create"]


def test_a_failed_setup_starts_no_run(bench):
  done = tpu(bench, "train", "--", WORKDIR, states=["ACTIVE"], SSH_STATUS="255")
  assert done.returncode == 1 and "could not be set up" in done.stderr
  assert not [call for call in bench.calls("gcloud") if "tpu_worker.sh run" in " ".join(call)]


@pytest.fixture
def worker(bench):
  """Makes a TPU worker's home directory, with a trainer of the test's."""
  (bench.folder / "sdpo_jax").symlink_to(ROOT)
  (bench.folder / "venv" / "bin").mkdir(parents=True)
  (bench.folder / "venv" / "bin" / "python").symlink_to(bench.bin / "python")
  return bench


def test_a_worker_starts_its_trainer_again_after_a_lost_peer(worker):
  worker.stand_in("python", TRAINER)
  worker.answers("statuses", 137, 134, 143, 0)  # with peers, a killed one is a lost one
  assert worker.run("tpu_worker.sh", "run", "3", "4", WORKDIR).returncode == 0
  assert worker.wait_for("run.status") == "0\n"
  assert worker.calls("python") == [["-m", "sdpo_jax.main", WORKDIR]] * 4
  assert worker.run("tpu_worker.sh", "status").stdout == "0\n"
  assert "started again (3 of at most 3)" in worker.run("tpu_worker.sh", "logs").stdout


def test_a_worker_is_stopped_politely(worker):
  assert worker.run("tpu_worker.sh", "status").stdout == "none\n"
  worker.stand_in("python", LASTING)
  worker.run("tpu_worker.sh", "run", "3", "4", WORKDIR)
  worker.wait_for("said", "began")
  assert worker.run("tpu_worker.sh", "status").stdout == "running\n"
  assert worker.run("tpu_worker.sh", "run", "3", "4", WORKDIR).returncode == 2
  assert worker.run("tpu_worker.sh", "stop").returncode == 0
  assert worker.wait_for("run.status") == "143\n"
  assert (worker.folder / "said").read_text() == "began\nasked\n"


# ---- gke.sh


def rendered(bench, *arguments) -> dict:
  """Returns the JobSet that a dry run prints, checked against strict schemas.

  JobSet is no built-in kind, and kubernetes-validate lets unknown kinds pass. So the JobSet is
  checked against jobset.schema.json, which knows the fields that are used and refuses others; and
  the template inside, as a Job, against Kubernetes' own schema.
  """
  done = bench.run("gke.sh", "--dry-run", *arguments)
  assert (done.returncode, done.stderr) == (0, "")
  first, *lines, last = done.stdout.splitlines()
  assert (first, last) == ("kubectl apply -f - <<'END'", "END")
  jobset = yaml.safe_load("\n".join(lines))
  check_jobset(jobset)
  return jobset


def check_jobset(jobset: dict) -> None:
  schema = json.loads((ROOT / "tests" / "jobset.schema.json").read_text())
  jsonschema.validate(jobset, schema)
  for job in jobset["spec"]["replicatedJobs"]:
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
    kubernetes_validate.validate(whole, "1.37", strict=True)


def job_of(jobset: dict) -> dict:
  return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def container_of(jobset: dict) -> dict:
  return job_of(jobset)["template"]["spec"]["containers"][0]


def starts_again(jobset: dict, exit_code: int) -> bool:
  """Tells what Kubernetes and JobSet would do when a container ends with this status."""
  [everything_else, by_status] = job_of(jobset)["podFailurePolicy"]["rules"]
  assert everything_else["onPodConditions"] and everything_else["action"] == "Count"
  assert by_status["action"] == "FailJob" and by_status["onExitCodes"]["operator"] == "NotIn"
  [rule] = jobset["spec"]["failurePolicy"]["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  assert job_of(jobset)["backoffLimit"] == 0  # one pod's failure is the Job's
  return exit_code in by_status["onExitCodes"]["values"]


SLICES = {
  "v5e": "2x4 4x4 4x8 8x8 8x16 16x16",
  "v6e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
  "v5p": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8",
}
ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v6e": "tpu-v6e-slice", "v5p": "tpu-v5p-slice"}


@pytest.mark.parametrize(
  "chip, topology", [(chip, topology) for chip in SLICES for topology in SLICES[chip].split()]
)
def test_a_slice_has_as_many_chips_as_its_topology(chip, topology, bench):
  jobset = rendered(bench, f"--chip={chip}", f"--topology={topology}")
  job = job_of(jobset)
  pod = job["template"]["spec"]
  chips = container_of(jobset)["resources"]["limits"]["google.com/tpu"]
  hosts = job["parallelism"]
  assert job["completions"] == hosts
  assert hosts * chips == math.prod(map(int, topology.split("x")))
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[chip],
    "cloud.google.com/gke-tpu-topology": topology,
  }
  assert ("--distributed=auto" in container_of(jobset)["command"]) == (hosts > 1)


def test_a_gpu_run_names_its_first_pod_as_coordinator(bench):
  jobset = rendered(bench, "--chip=gpu", "--hosts=4", "--gpus=8", "--name=run")
  container = container_of(jobset)
  assert job_of(jobset)["parallelism"] == job_of(jobset)["completions"] == 4
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
  assert container["command"][-1] == "--distributed=run-workers-0-0.run:8476,4,$(RANK)"
  assert jobset["spec"]["replicatedJobs"][0]["name"] == "workers"
  assert container["env"][0]["name"] == "RANK"
  alone = container_of(rendered(bench, "--chip=gpu"))
  assert not [word for word in alone["command"] if word.startswith("--distributed")]


@pytest.mark.parametrize("chip", ["v6e", "gpu"])
def test_optional_parts_of_a_jobset(chip, bench):
  bare = rendered(bench, f"--chip={chip}", "--", "--workdir=/mnt/b/r")
  assert "labels" not in bare["metadata"]
  assert "runs" not in json.dumps(job_of(bare)["template"]["spec"].get("volumes", []))
  flags = ["--queue=q", "--claim=c", "--spot", "--service-account=s", "--grace=60", "--image=i:1"]
  full = rendered(bench, f"--chip={chip}", *flags, "--max-restarts=3", "--", WORKDIR)
  pod = job_of(full)["template"]["spec"]
  assert full["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
  assert full["spec"]["failurePolicy"]["maxRestarts"] == 3
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert (pod["serviceAccountName"], pod["terminationGracePeriodSeconds"]) == ("s", 60)
  assert {"name": "runs", "persistentVolumeClaim": {"claimName": "c"}} in pod["volumes"]
  assert {"name": "runs", "mountPath": "/runs"} in pod["containers"][0]["volumeMounts"]
  assert pod["containers"][0]["image"] == "i:1"


def test_python_is_process_1_and_gets_its_words_unchanged(bench):
  nasty = ['--config.x=it\'s "so" \\ # {} & *', "--config.y=$(HOME) $HOME @NAME@"]
  command = container_of(rendered(bench, "--", "--workdir=/mnt/b/r", *nasty))["command"]
  assert command[:4] == ["python", "-m", "sdpo_jax.main", "--workdir=/mnt/b/r"]
  # Kubernetes reads $$( as $(, which it would otherwise expand
  assert [word.replace("$$(", "$(") for word in command[4:6]] == nasty
  assert command[5].startswith("--config.y=$$(")


@pytest.mark.parametrize("chip, hosts", [("v6e", 4), ("v6e", 1), ("gpu", 2), ("gpu", 1)])
def test_a_jobset_starts_again_on_the_same_statuses_as_all_launchers(chip, hosts, bench):
  size = [f"--hosts={hosts}"] if chip == "gpu" else [f"--topology={'4x4' if hosts > 1 else '2x2'}"]
  jobset = rendered(bench, f"--chip={chip}", *size)
  assert starts_again(jobset, 143) and starts_again(jobset, 134)
  assert starts_again(jobset, 137) == (hosts > 1)
  assert not starts_again(jobset, 2) and not starts_again(jobset, 1)


def test_the_schemas_find_misspelt_fields(bench):
  for place in (
    lambda jobset: jobset["spec"],
    lambda jobset: jobset["spec"]["replicatedJobs"][0],
    lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0],
    job_of,
    lambda jobset: job_of(jobset)["podFailurePolicy"]["rules"][1],
    lambda jobset: job_of(jobset)["template"]["spec"],
    container_of,
  ):
    jobset = rendered(bench)
    place(jobset)["replicaz"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
      check_jobset(jobset)


def test_kubectl_gets_the_rendered_file(bench):
  bench.stand_in("kubectl", 'if [[ $1 == apply ]]; then cat >"$BENCH/applied"; fi')
  arguments = ["--image=i", "--claim=c", "--", WORKDIR]
  assert bench.run("gke.sh", *arguments).returncode == 0
  applied = yaml.safe_load((bench.folder / "applied").read_text())
  assert applied == rendered(bench, *arguments)
  for command in ("status", "logs", "delete"):
    bench.run("gke.sh", command, "--name=run")
  assert [call[0] for call in bench.calls("kubectl")] == ["apply", "get", "get", "logs", "delete"]
  assert bench.calls("kubectl")[-1] == ["delete", "jobset", "run"]


# ---- slurm.sh

# starts a command once a task, as srun does, and returns the highest status
SRUN = """
for word in "$@"; do case $word in --ntasks-per-node=*) tasks=${word#*=} ;; esac; done
while [[ $1 == -* ]]; do shift; done
for ((rank = 0; rank < tasks; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
  pids+=($!)
done
trap 'for pid in "${pids[@]}"; do kill "$pid"; done' TERM
highest=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; status=$?; done
  wait "$pid" || status=$?
  if ((status > highest)); then highest=$status; fi
done
exit "$highest"
"""
# the preflight's status, or the trainer's by rank
TASK = """
if [[ $1 == launch/preflight.py ]]; then exit "${PREFLIGHT:-0}"; fi
echo "$SLURM_PROCID ${JAX_LOCAL_DEVICE_IDS:-}" >>"$BENCH/tasks"
statuses=($STATUSES)
exit "${statuses[SLURM_PROCID]}"
"""


def slurm_job(bench, *arguments, task=TASK, workdir=WORKDIR, **env) -> subprocess.Popen:
  """Starts the batch script as Slurm does: a copy of it, in the directory of the submission."""
  bench.stand_in("srun", SRUN)
  bench.stand_in("scontrol", "")
  bench.stand_in("python", task)
  copy = bench.folder / "slurm_script"
  shutil.copy(LAUNCH / "slurm.sh", copy)
  job = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_CPUS_ON_NODE": "32",
    "SLURM_GPUS_ON_NODE": "8",
  }
  return bench.start(copy, "--max-restarts=3", *arguments, "--", workdir, **job | env)


@pytest.mark.parametrize(
  "statuses, restarts, last, requeued",
  [
    ("0 0", 0, 0, False),
    ("143 143", 0, 143, True),
    ("143 143", 2, 143, True),
    ("143 143", 3, 143, False),  # --max-restarts=3
    ("134 137", 0, 137, True),  # a killed task and the peer that jax aborted
    ("134 134", 0, 134, True),
    ("2 134", 0, 2, False),  # the task that refused its settings outranks its peer
    ("134 1", 0, 1, False),
    ("143 2", 0, 2, False),
  ],
)
def test_a_job_is_requeued_by_the_statuses_of_its_tasks(statuses, restarts, last, requeued, bench):
  process = slurm_job(bench, STATUSES=statuses, SLURM_RESTART_COUNT=str(restarts))
  _, err = process.communicate(timeout=30)
  assert process.returncode == last, err
  assert bench.calls("scontrol") == [["requeue", "7"]] * requeued


def test_tasks_divide_the_gpus_of_their_node(bench):
  process = slurm_job(bench, STATUSES="0 0")
  assert process.wait(30) == 0
  assert sorted((bench.folder / "tasks").read_text().splitlines()) == ["0 0,1,2,3", "1 4,5,6,7"]
  preflight, trainer = bench.calls("srun")
  assert preflight[-4:] == ["python", "launch/preflight.py", "4", "2"]
  assert trainer[-4:] == ["-m", "sdpo_jax.main", WORKDIR, "--distributed=auto"]
  assert "--cpus-per-task=16" in trainer  # srun does not inherit it


def test_no_training_without_the_devices_that_were_asked_for(bench):
  process = slurm_job(bench, PREFLIGHT="2", STATUSES="0 0")
  _, err = process.communicate(timeout=30)
  assert process.returncode == 2 and "preflight" in err
  assert len(bench.calls("srun")) == 1 and not bench.calls("scontrol")


def test_a_cancelled_job_saves_and_is_not_requeued(bench):
  process = slurm_job(bench, task=f"[[ $1 == launch/* ]] && exit\n{SAVING}")
  bench.wait_for("said", "began\nbegan")
  process.terminate()  # scancel tells the batch script and, by srun, the tasks
  srun = [line for line in ps() if "bin/srun" in line[1] and str(bench.bin) in line[1]]
  for pid, _ in srun:
    os.kill(pid, signal.SIGTERM)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 143 and "not requeued" in err
  assert not bench.calls("scontrol")


def ps() -> list[tuple[int, str]]:
  """Returns (process id, command line) of all processes."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
      found.append((int(path.name), words))
  return found


def test_a_job_with_servers_runs_them_beside_its_one_trainer(servers):
  bench = servers.bench
  task = (
    SETTINGS + '[[ $1 == launch/preflight.py ]] || echo "$CUDA_VISIBLE_DEVICES" >"$BENCH/trainer"'
  )
  flags = ["--server=vllm", "--servers=2", f"--port={servers.port}"]
  one = {"SLURM_NTASKS": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
  process = slurm_job(bench, *flags, task=task, workdir=servers.workdir, **one)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert (bench.folder / "trainer").read_text() == "0,1,2,3,4,5\n"
  assert [servers.facts(i)[2] for i in range(2)] == ["6", "7"]
  preflight, node = bench.calls("srun")
  assert preflight[-3:] == ["launch/preflight.py", "8", "1"]
  assert node[node.index("launch/gpu_node.sh") + 1 :][:2] == ["--gpus=8", "--max-restarts=0"]


@pytest.mark.parametrize(
  "ending, status, requeued",
  [("exit 143", 143, True), ("exit 1", 1, False), ("exit 2", 2, False), ("kill -9 $$", 137, False)],
)
def test_a_job_with_servers_is_requeued_by_the_same_rule(ending, status, requeued, servers):
  task = f"{SETTINGS}\n[[ $1 == launch/preflight.py ]] && exit\n{ending}"
  flags = ["--server=vllm", f"--port={servers.port}"]
  process = slurm_job(servers.bench, *flags, task=task, workdir=servers.workdir, SLURM_NTASKS="1")
  _, err = process.communicate(timeout=60)
  assert process.returncode == status, err
  assert bool(servers.bench.calls("scontrol")) == requeued


def test_a_job_whose_server_dies_fails(servers):
  task = f"{SETTINGS}\n[[ $1 == launch/preflight.py ]] && exit\n{SAVING}"
  process = slurm_job(
    servers.bench,
    *["--server=vllm", f"--port={servers.port}"],
    task=task,
    workdir=servers.workdir,
    SLURM_NTASKS="1",
  )
  servers.bench.wait_for("said", "began")
  os.kill(int(servers.facts(0)[0]), signal.SIGKILL)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 1 and "server 0 (vllm on port" in err
  assert not servers.bench.calls("scontrol")


def test_slurm_submits_itself(bench):
  bench.stand_in("sbatch", "")
  flags = ["--nodes=2", "--gpus=4", "--time=1:00:00", "--sbatch=--partition=p"]
  done = bench.run("slurm.sh", *flags, "--", WORKDIR)
  assert done.returncode == 0, done.stderr
  [call] = bench.calls("sbatch")
  at = call.index(str(LAUNCH / "slurm.sh"))
  wanted = {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--time=1:00:00"}
  assert wanted | {"--partition=p", "--exclusive", f"--chdir={ROOT}"} <= set(call[:at])
  assert call[at + 1 :] == [*flags, "--", WORKDIR]
  header = (LAUNCH / "slurm.sh").read_text()
  assert "#SBATCH --signal=TERM@300" in header and "#SBATCH --requeue" in header


# ---- a real Slurm

SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""  # a job goes back into the queue for cred_expire + 1 seconds, by default 121
SLURM_TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
MISSING_SLURM = [tool for tool in SLURM_TOOLS if not shutil.which(tool)]


@pytest.fixture
def slurm(bench):
  """Runs a Slurm of one node with two CPUs on loopback."""
  for tool in SLURM_TOOLS:
    (bench.bin / tool).symlink_to(shutil.which(tool))
  for name in ("state", "spool"):
    (bench.folder / name).mkdir()
  conf = bench.folder / "slurm.conf"
  conf.write_text(SLURM_CONF.format(folder=bench.folder, ports=[free_ports(1), free_ports(1)]))
  bench.env["SLURM_CONF"] = str(conf)
  daemons = []
  try:
    for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
      with open(bench.folder / f"{command[0]}.out", "w") as out:
        daemons.append(
          subprocess.Popen(command, env=bench.env, stdout=out, stderr=subprocess.STDOUT)
        )
    wait_until(lambda: "idle" in ask_slurm(bench, "sinfo", "-h", "-o", "%t"), 60)
    yield bench
  finally:
    ask_slurm(bench, "scancel", "--signal=KILL", "--full", "--user=root")
    for daemon in reversed(daemons):
      daemon.terminate()
    for daemon in daemons:
      daemon.wait(30)


def ask_slurm(bench, *command) -> str:
  done = subprocess.run(command, env=bench.env, capture_output=True, text=True, timeout=60)
  return done.stdout


def wait_until(condition, seconds: float) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(
  bool(MISSING_SLURM) or os.getuid() != 0,
  reason=f"needs root and Debian's slurmctld, slurmd, slurm-client; missing: {MISSING_SLURM}",
)
def test_a_job_of_two_tasks_is_stopped_requeued_and_finishes_under_a_real_slurm(slurm):
  """The preflight is the real one; the trainer's stand-in saves at TERM and then finishes."""
  python = shlex.quote(sys.executable)
  trainer = f"""
if [[ $1 == launch/preflight.py ]]; then JAX_PLATFORMS=cpu exec {python} "$@"; fi
log=$BENCH/task$SLURM_PROCID
echo "began ${{SLURM_RESTART_COUNT:-0}} ${{@: -1}}" >>"$log"
if [[ -e $log.saved ]]; then echo finished >>"$log"; exit 0; fi
trap 'touch "$log.saved"; echo saved >>"$log"; exit 143' TERM
while :; do sleep 0.1; done
"""
  slurm.stand_in("python", trainer)
  flags = ["--gpus=0", "--tasks-per-node=2", "--time=10", f"--sbatch=--output={slurm.folder}/out"]
  done = slurm.run("slurm.sh", *flags, "--", WORKDIR)
  assert done.returncode == 0, done.stderr
  job = done.stdout.split()[-1]
  for rank in "01":
    slurm.wait_for(f"task{rank}", "began", 120)
  ask_slurm(slurm, "scancel", "--signal=TERM", job)
  for rank in "01":
    log = slurm.wait_for(f"task{rank}", "finished", 120)
    flag = "--distributed=auto"
    assert log.splitlines() == [f"began 0 {flag}", "saved", f"began 1 {flag}", "finished"]
  wait_until(lambda: "JobState=COMPLETED" in ask_slurm(slurm, "scontrol", "show", "job", job), 30)
  out = (slurm.folder / "out").read_text()
  assert out.count("preflight: 2 processes with 1 devices each") == 2
  assert "status 143: requeued (1 of at most 20)" in out
