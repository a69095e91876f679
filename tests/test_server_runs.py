"""Whole runs that sample from servers, against stand-ins that have the tiny model."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

from absl.testing import flagsaver
import grain  # noqa: F401 - defines flags: imported first inside flagsaver, it would lose them
import pytest

from sdpo_jax import main
from sdpo_jax.config import MODELS
from tests.servers import RealModel, SglangStandIn, VllmStandIn
from tests.test_launch import free_ports

ROOT = pathlib.Path(__file__).parent.parent

KINDS = ("vllm", "sglang")


def run(workdir, *arguments):
  with flagsaver.flagsaver():
    return main.main(
      ["main", "--config=configs/tinycode.py:local", f"--workdir={workdir}", *arguments]
    )


def server_arguments(kind, server, path):
  return [
    f"--config.rollout.engine={kind}",
    f"--config.rollout.server.urls=('{server.url}',)",
    f"--config.rollout.server.weights_dir={path}",
  ]


@pytest.fixture(scope="module")
def tiny():
  return RealModel(MODELS["tiny"])


FEW = [
  "--config.mesh.fsdp=1",
  "--config.rollout.group=2",
  "--config.rollout.max_new_tokens=8",
  "--config.eval.questions=2",
  "--config.eval.samples=1",
  "--config.optimizer.lr=0.02",  # old weights would be seen in the log-probabilities
  "--config.optimizer.warmup_steps=0",
]


# the launcher's run is one with vLLM
@pytest.mark.parametrize("kind", [pytest.param("vllm", marks=pytest.mark.slow), "sglang"])
def test_a_run_samples_from_a_server(kind, tiny, tmp_path):
  """Adapters go to vLLM, all weights to SGLang; both sample what the trainer would."""
  model, more = tiny, FEW
  if kind == "vllm":
    server = VllmStandIn(model, "served")
    more = [*more, "--config.model.lora.rank=2", "--config.rollout.server.model=served"]
  else:
    server = SglangStandIn(model)
  try:
    assert run(tmp_path / "run", *server_arguments(kind, server, tmp_path / "weights"), *more) == 0
  finally:
    server.stop()
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
  assert [line["step"] for line in lines] == [0, 1, 2]
  for line in lines[1:]:
    assert abs(line["train/rollout_kl"]) < 1e-4
  assert "eval/heldout/avg@k" in lines[2] and "eval/heldout/entropy" not in lines[2]
  handed_over = [p for p, b, _ in server.asked if p.endswith(("/load_lora_adapter", "_from_disk"))]
  assert len(handed_over) == 3  # of steps 0, 1 and 2


@pytest.mark.parametrize("kind", ["vllm", pytest.param("sglang", marks=pytest.mark.slow)])
def test_the_launcher_starts_servers_and_a_run_that_samples_from_them(kind, tmp_path):
  """Stand-ins are the commands of the servers; script and trainer are the real ones."""
  stand_in = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tests.serve_stand_in "$@"\n'
  commands = tmp_path / "venv" / "bin"
  commands.mkdir(parents=True)
  command = commands / ("vllm" if kind == "vllm" else "python")
  command.write_text(stand_in)
  command.chmod(0o755)
  port = free_ports(2)
  python = pathlib.Path(sys.executable).parent
  done = subprocess.run(
    [
      *["launch/gpu_node.sh", f"--server={kind}", "--servers=2", "--gpus=3", f"--port={port}"],
      *[f"--server-venv={tmp_path / 'venv'}", "--", "--config=configs/tinycode.py:local"],
      *[f"--workdir={tmp_path / 'run'}", *FEW, "--config.total_steps=1"],
      *["--config.model.lora.rank=2"] * (kind == "vllm"),
    ],
    cwd=ROOT,
    env=os.environ | {"PATH": f"{python}:{os.environ['PATH']}"},
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
  assert [line["step"] for line in lines] == [0, 1]
  assert abs(lines[1]["train/rollout_kl"]) < 1e-4
  settings = json.loads((tmp_path / "run/config.json").read_text())["rollout"]
  assert settings["engine"] == kind
  assert settings["server"]["urls"] == [f"http://127.0.0.1:{port + i}" for i in range(2)]
  weights = pathlib.Path(settings["server"]["weights_dir"])
  assert weights.name.startswith("sdpo_jax.") and not weights.exists()
  assert done.stderr.count("is ready") == 2
  for index in range(2):
    log = tmp_path / "run" / "servers" / f"{kind}-{port + index}.log"
    assert "listening" in log.read_text()
