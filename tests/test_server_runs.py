"""Whole runs that sample from servers, against stand-ins that have the tiny model."""

import json

from absl.testing import flagsaver
import grain  # noqa: F401 - defines flags: imported first inside flagsaver, it would lose them
import pytest

from sdpo_jax import main
from sdpo_jax.config import MODELS
from tests.servers import RealModel, SglangStandIn, VllmStandIn

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


@pytest.mark.parametrize("kind", KINDS)
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
