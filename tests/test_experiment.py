"""A grid of runs as processes, and the page that is written from what grids measured."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from sdpo_jax import experiment

ROOT = pathlib.Path(__file__).parent.parent


def running(pid: int) -> list[int]:
  """Returns the children of a process."""
  return [
    int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
  ]


def until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    value = condition()
    if value:
      return value
    time.sleep(0.05)
  return condition()


@pytest.mark.parametrize("where", ["nowhere", "grid.py"])
def test_a_report_of_nothing_is_one_line(where, tmp_path, capsys):
  (tmp_path / "grid.py").write_text("def get_grid(): return {'one': []}\n")
  assert (
    experiment.main([f"--config={tmp_path}/grid.py", f"--workdir={tmp_path / where}", "--report"])
    == 2
  )
  error = capsys.readouterr().err
  assert "no run of" in error
  assert f"{where}: " in error
  assert error.count("\n") == 1


def test_a_grid_that_is_told_to_end_ends_its_runs(tmp_path):
  grid = tmp_path / "grid.py"
  grid.write_text(
    "def get_grid():\n"
    "  return {'one': ['--config=configs/tinycode.py:local', '--config.total_steps=100000']}\n"
  )
  experiment = subprocess.Popen(
    [sys.executable, "-m", "sdpo_jax.experiment", f"--config={grid}", f"--workdir={tmp_path}"],
    cwd=ROOT,
  )
  try:
    # a library may start a process of its own while it is imported: the run has begun with its log
    until(lambda: (tmp_path / "one" / "run.log").exists())
    (run,) = until(lambda: running(experiment.pid))
    experiment.send_signal(signal.SIGTERM)
    assert experiment.wait(60) == 143
    assert not pathlib.Path(f"/proc/{run}").exists()
  finally:
    experiment.kill()


def test_a_summary_of_nothing_is_one_line(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert experiment.main(["--summary"]) == 2
  error = capsys.readouterr().err
  assert "no folder results" in error
  assert error.count("\n") == 1
  for arguments in (["--summary", "--config=x"], ["--workdir=x"], []):
    with pytest.raises(SystemExit, match="2"):
      experiment.main(arguments)
