"""Tests the loss benchmark: it measures, prints both implementations, and refuses nonsense."""

import importlib.util
import json
import os

import pytest

from sdpo_jax.bench import __main__ as bench
from sdpo_jax.bench import loss


def test_measures_both_in_children(tmp_path, capfd):
  path = tmp_path / "loss.json"
  assert (
    bench.main(
      [
        "loss",
        "--shapes=16x128x300",
        "--implementations=reference,xla",
        "--repeats=1",
        f"--json={path}",
      ]
    )
    == 0
  )
  rows = json.loads(path.read_text())
  assert [row["implementation"] for row in rows] == ["reference", "xla"]
  for row in rows:
    assert row["time_s"] > 0 and row["us_per_token"] == pytest.approx(row["cpu_s"] / 16 * 1e6)
    assert row["floor_us_per_token"] == pytest.approx(8 * 128 * 300 / row["matrix_tflops"] / 1e6)
    assert row["peak_mb"] > 0 and row["temporaries_mb"] >= 0
    assert row["value_error"] < 1e-4 and row["gradient_error"] < 1e-4 and row["cores"] >= 1
  assert "| 16x128x300 | float32 | 0.5 | xla |" in capfd.readouterr().out


def test_failed_measurement_is_told_and_fails(capfd):
  assert bench.main(["loss", "--shapes=4x128x200", "--implementations=fast", "--repeats=1"]) == 1
  assert "implementation='fast' is unknown" in capfd.readouterr().out


@pytest.mark.parametrize("argv", (["los"], []))
def test_unknown_measurement(argv, capsys):
  assert bench.main(argv) == 2
  assert capsys.readouterr().err.count("\n") == 1


def test_every_measurement_is_there():
  assert all(importlib.util.find_spec(f"sdpo_jax.bench.{name}") for name in bench.NAMES)


def test_a_peer_that_is_not_installed_is_told_and_does_not_fail(capfd, monkeypatch, tmp_path):
  (tmp_path / "liger_kernel.py").write_text(
    "raise ModuleNotFoundError(\"No module named 'liger_kernel'\")"
  )
  monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
  assert bench.main(["loss", "--shapes=4x128x200", "--implementations=liger", "--repeats=1"]) == 0
  assert (
    "| liger | exit 1: ModuleNotFoundError: No module named 'liger_kernel' |"
    in capfd.readouterr().out
  )


def test_malformed_shape(capsys):
  with pytest.raises(SystemExit) as stop:
    loss.main(["--shapes=16x128"])
  assert stop.value.code == 2 and "16x128" in capsys.readouterr().err


def test_speedup_is_the_peers_cost_over_ours():

  def row(implementation, **figures):
    request = dict(shape=[1, 2, 3], alpha=1, dtype="float32", implementation=implementation)
    return request | figures

  cpu = loss.with_speedups(
    [
      row("xla", device="cpu", cpu_s=2.0, time_s=1.0),
      row("torch", device="cpu", cpu_s=8.0, time_s=9.0),
    ]
  )
  assert [r["peer_speedup"] for r in cpu] == [4, 1]
  gpu = loss.with_speedups(
    [
      row("xla", device="gpu", time_s=3.0, cpu_s=1.0),
      row("liger", device="gpu", error="exit 1: no GPU"),
    ]
  )
  assert not any("peer_speedup" in r for r in gpu)
