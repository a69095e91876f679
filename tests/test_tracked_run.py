"""A whole run with trackers: what the real loop leaves for them, and what a broken one costs."""

import json

from absl.testing import flagsaver
import grain  # noqa: F401 - defines flags: imported first inside flagsaver, it would lose them
import pytest

from sdpo_jax import main
from tests.test_trackers import Stage


@pytest.fixture
def stage(tmp_path, monkeypatch):
  stage = Stage(tmp_path, monkeypatch)
  monkeypatch.syspath_prepend(stage.path / "packages")  # where the run looks for them, too
  return stage


def run(workdir, *arguments):
  with flagsaver.flagsaver():
    return main.main(
      [
        "main",
        "--config=configs/tinycode.py:local",
        f"--workdir={workdir}",
        "--config.mesh.fsdp=1",
        "--config.rollout.group=2",
        "--config.rollout.max_new_tokens=8",
        "--config.eval.questions=2",
        "--config.eval.samples=1",
        *arguments,
      ]
    )


def test_trackers_hear_of_each_step_and_a_broken_one_is_a_line(stage, monkeypatch, capfd):
  workdir = stage.path / "real"
  monkeypatch.setenv("MISBEHAVE", "log_batch raises")  # MLflow alone
  both = "--config.log.trackers=('wandb','mlflow')"
  assert run(workdir, both, "--config.total_steps=1") == 0
  [line] = [line for line in capfd.readouterr().err.splitlines() if "the tracker" in line]
  assert "the tracker mlflow failed as it began (RuntimeError" in line
  [begun] = stage.calls("init")
  assert begun["config"]["method"]["name"] == "sdpo" and begun["config"]["run"]["seed"] == 0
  assert [call["step"] for call in stage.calls("log")] == [0, 1]
  table = stage.calls("log")[1]["entries"]["rollouts"]
  rows = [dict(zip(table["columns"], row)) for row in table["data"]]
  read = [row for row in rows if row["teacher_context"]]
  assert read and all(row["prompt"] in row["teacher_context"] for row in read)
  # further on, without MLflow, with wandb in the same run
  assert run(workdir, "--config.log.trackers=wandb", "--config.total_steps=2") == 0
  assert {call["id"] for call in stage.calls("init")} == {begun["id"]}
  logged = {call["step"]: call["entries"] for call in stage.calls("log")}
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
  assert [line["step"] for line in lines] == [0, 1, 2] == list(logged)
  for line in lines:
    sent = {key: value for key, value in logged[line["step"]].items() if key != "rollouts"}
    assert sent == {key: value for key, value in line.items() if key != "step"}
