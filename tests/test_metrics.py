"""metrics.jsonl, its TensorBoard twin and the progress line: what is written, cut and shown."""

import functools
import glob
import io
import json
import math
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from sdpo_jax import metrics
from sdpo_jax.objectives import loss
from sdpo_jax.records import Ratio, bin_ratio
from tests.fakes import no_file_beyond


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, *steps, truncate=None):
  writer = metrics.Writer(workdir, total_steps=10)
  if truncate is not None:
    writer.truncate(truncate)
  for step in steps:
    writer.write(step, {"train/loss": step / 7})
  writer.close()


def test_reduce():
  reduced = metrics.reduce(
    {
      "a/ratio": Ratio(jnp.float32(3.0), jnp.float32(4.0)),
      "a/empty": Ratio(0.0, 0.0),
      "a/none": None,
      "a/nan": math.nan,
      "a/inf": Ratio(np.inf, 1.0),
      "a/int": np.int32(7),
      "a/float32": np.float32(0.1),
      "a/jax": jnp.int32(3),
    }
  )
  assert reduced == {"a/ratio": 0.75, "a/int": 7, "a/float32": float(np.float32(0.1)), "a/jax": 3}
  assert [type(value) for value in reduced.values()] == [float, int, float, int]


@pytest.mark.parametrize("bins", [loss.COARSE, loss.FINE])
def test_quantiles_add_up_over_parts(bins):
  histogram = functools.partial(loss.histogram, bins=bins)
  values = np.random.default_rng(0).lognormal(-4, 2, 4000).astype(np.float32)
  values[:40] = 0.0  # below the first bin
  is_counted = np.arange(len(values)) % 7 > 0
  whole = histogram(values, is_counted)
  parts = [histogram(values[half], is_counted[half]) for half in np.split(np.arange(4000), 2)]
  assert np.array_equal(whole.count_X, parts[0].count_X + parts[1].count_X)
  assert int(whole.count_X.sum()) == is_counted.sum()
  for share in (0.5, 0.9, 0.99):
    exact = np.quantile(values[is_counted], share, method="inverted_cdf")
    assert exact <= whole.quantile(share) <= exact * bin_ratio(bins) * 1.0001
  reduced = metrics.reduce({"a/p99": whole, "a/b_p50": whole})
  assert reduced == {"a/p99": whole.quantile(0.99), "a/b_p50": whole.quantile(0.5)}
  assert not metrics.reduce({"a/p99": histogram(values, np.zeros(4000, bool))})


def test_lines_are_strict_json_and_floats_survive(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.write(0, {"eval/heldout/avg@k": 0.1 + 0.2, "train/loss": math.nan, "train/none": None})
  writer.write(3, {"train/loss": Ratio(1, 3)})
  # readable before the writer is closed
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
  first, second = lines(tmp_path)
  assert (
    list(first) == ["step", "time_s", "eval/heldout/avg@k"]
    and first["eval/heldout/avg@k"] == 0.1 + 0.2
  )
  assert second["train/loss"] == 1 / 3 and second["time_s"] >= first["time_s"] >= 0
  assert metrics.read(tmp_path) == [first, second]
  writer.close()


def test_one_record_a_step_and_grouped_names(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.write(1, {"train/loss": 1.0})
  with pytest.raises(ValueError, match="step 1 come after those of step 1: merge"):
    writer.write(1, {"eval/heldout/avg@k": 1.0})
  with pytest.raises(ValueError, match=r"group/name; got \['loss'\]"):
    writer.write(2, {"loss": 1.0})
  writer.close()
  assert len(lines(tmp_path)) == 1


def test_resume_writes_what_an_uninterrupted_run_writes(tmp_path):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  write(whole, *range(8))
  write(cut, *range(6))
  time_s = lines(cut)[3]["time_s"]
  write(cut, *range(4, 8), truncate=4)
  assert [metrics.reproducible(line) for line in lines(cut)] == [
    metrics.reproducible(line) for line in lines(whole)
  ]
  assert lines(cut)[4]["time_s"] >= time_s
  assert not list(cut.glob("*.tmp"))


@pytest.mark.parametrize("keep", [1, 10, 33])
def test_a_last_line_cut_short_is_dropped(tmp_path, keep):
  write(tmp_path, 0, 1, 2)
  path = tmp_path / "metrics.jsonl"
  text = path.read_text()
  path.write_text(text + text.splitlines()[-1][:keep])
  assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1, 2]
  write(tmp_path, 3)  # without truncate, too
  assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]


def test_damage_elsewhere_is_named(tmp_path):
  write(tmp_path, 0, 1)
  path = tmp_path / "metrics.jsonl"
  path.write_text("{oops\n" + path.read_text())
  with pytest.raises(ValueError, match="metrics.jsonl line 1 is not JSON"):
    metrics.Writer(tmp_path)


def test_opening_a_finished_run_changes_nothing(tmp_path):
  write(tmp_path, 0, 1, 2)
  before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
  write(tmp_path, truncate=3)
  assert before == {
    path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()
  }
  write(tmp_path / "never", truncate=0)
  assert not (tmp_path / "never").exists()


def test_truncate_to_nothing(tmp_path):
  write(tmp_path, 0, 1, 2)
  write(tmp_path, truncate=0)
  assert metrics.read(tmp_path) == []
  write(tmp_path, 0)
  assert [line["step"] for line in lines(tmp_path)] == [0]


def test_reproducible_leaves_out_what_the_machine_decides():
  line = {
    "step": 1,
    "time_s": 3.0,
    "time/judge": 1.0,
    "perf/memory_gb": 1.0,
    "train/tokens_per_s": 9.0,
    "train/timeouts": 2,
    "train/loss": 0.1,
  }
  assert metrics.reproducible(line) == {"step": 1, "train/timeouts": 2, "train/loss": 0.1}


def events(workdir):
  """Returns (tag, step, value) of every scalar and ("purge", step, None) of every restart.

  They stand in the order of the event files' names.
  """
  scalars = []
  for path in sorted(glob.glob(str(workdir / "events*"))):
    data, at = open(path, "rb").read(), 0
    while at < len(data):  # a record: length 8, checksum 4, data, checksum 4
      size = int.from_bytes(data[at : at + 8], "little")
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += size + 16
      if event.session_log.status == event_pb2.SessionLog.START:
        scalars.append(("purge", event.step, None))
      scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
  return scalars


def test_tensorboard_gets_the_same_values_and_the_cut(tmp_path):
  write(tmp_path, 0, 1, 2)
  first = events(tmp_path)
  assert [(tag, step) for tag, step, _ in first] == [
    ("train/loss", 0),
    ("train/loss", 1),
    ("train/loss", 2),
  ]
  assert first[2][2] == pytest.approx(2 / 7)
  write(tmp_path, 2, truncate=2)
  assert ("purge", 2, None) in events(tmp_path)
  # killed before its first checkpoint: all that came before is hidden
  write(tmp_path, 0, truncate=0)
  assert ("purge", 0, None) in events(tmp_path)


def test_a_full_disk_is_an_error_at_once_and_spares_what_was_written(tmp_path):
  writer, written = metrics.Writer(tmp_path), []
  with no_file_beyond(20_000):
    with pytest.raises(OSError, match="File too large"):
      for step in range(1000):
        writer.write(step, {"train/loss": step / 7})
        written.append(step)
    with pytest.raises(OSError, match="File too large"):  # what the file did not take
      writer.close()
  assert written and [line["step"] for line in metrics.read(tmp_path)][: len(written)] == written


class Screen(io.StringIO):
  def __init__(self, terminal):
    super().__init__()
    self.terminal = terminal

  def isatty(self):
    return self.terminal


SHOWN = {
  "train/reward": 0.25,
  "train/loss": 0.5,
  "perf/tokens_per_s": 1234.0,
  "eval/heldout/avg@k": 0.4,
  "eval/heldout/avg@k_low": 0.3,
  "eval/heldout/avg@k_high": 0.5,
}


def test_plain_lines_without_a_terminal(tmp_path, monkeypatch):
  screen = Screen(terminal=False)
  monkeypatch.setattr(sys, "stderr", screen)
  writer = metrics.Writer(tmp_path, total_steps=4)
  writer.write(1, SHOWN)
  writer.write(2, {"train/reward": 0.5})
  writer.close()
  evaluation, first, second = screen.getvalue().splitlines()
  assert evaluation == "step 1/4  eval/heldout/avg@k 0.400 [0.300, 0.500]"
  assert first == "step 1/4  reward 0.250  loss 0.5000  1,234 tokens/s"
  assert re.fullmatch(r"step 2/4  reward 0\.500  \d+:\d\d left", second)
  assert "\x1b" not in screen.getvalue()


def test_bar_on_a_terminal(tmp_path, monkeypatch):
  screen = Screen(terminal=True)
  monkeypatch.setattr(sys, "stderr", screen)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "200")
  writer = metrics.Writer(tmp_path, total_steps=4)
  writer.write(1, SHOWN)
  writer.close()
  assert (
    "reward 0.250" in screen.getvalue()
    and "1,234 tokens/s" in screen.getvalue()
    and "[0.300, 0.500]" in screen.getvalue()
  )
  assert "\x1b[?25h" in screen.getvalue()  # the cursor is given back
