"""The benchmark of episodes plays what it says. The figures are not tested."""

import json
import time

import pytest

from sdpo_jax.bench import episodes


def test_each_delay_is_measured_with_overlap_and_without(tmp_path, capsys):
  path = tmp_path / "rows.json"
  config = "--config=configs/agentic.py:local"
  assert episodes.main([config, "--batches=1", "--delays_ms=0,5", f"--json={path}"]) == 0
  rows = json.loads(path.read_text())
  assert [(row["delay_ms"], row["overlap"]) for row in rows] == [
    (0, False),
    (0, True),
    (5, False),
    (5, True),
  ]
  assert all(0 <= row["waiting"] <= 1 <= row["turns"] for row in rows)
  assert len(capsys.readouterr().out.splitlines()) == 6


def test_a_delay_comes_before_each_answer():
  class Env:
    def start(self, task):
      return self

    def step(self, message):
      return message

  episode = episodes.Delayed(Env(), 0.05).start(None)
  begun = time.monotonic()
  assert episode.step("look") == "look" and time.monotonic() - begun >= 0.05


@pytest.mark.parametrize("argv", [["--batches=0"], ["--delays_ms=-1"], ["--delays_ms=soon"]])
def test_nonsense_is_refused(argv):
  with pytest.raises(SystemExit, match="2"):
    episodes.main(argv)


def test_a_configuration_without_episodes_is_refused(capsys):
  assert episodes.main(["--config=configs/tinycode.py"]) == 2
  assert "'tinycode' plays no episodes" in capsys.readouterr().err
