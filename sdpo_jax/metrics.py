"""Writes a run's metrics: metrics.jsonl, TensorBoard events and the progress line.

This is host code. On several hosts only process 0 has a Writer.

metrics.jsonl holds one JSON object a step: `step`, `time_s`, then metrics named `group/name`.
`time_s` counts the seconds spent so far, earlier sessions of a resumed run included. A value that
is None or not finite is left out, never written as NaN. A line is on the disk when `write` returns,
so a checkpoint saved afterwards never claims steps that the file lacks. Values that depend on the
machine and not on the run have names that match MACHINE.

Errors:
  ValueError  a name without a group, a step that does not go up, or a metrics.jsonl that is
              damaged anywhere but in its last line
  OSError     the disk takes no more
"""

import fnmatch
import json
import math
import os
import pathlib
import sys
import time

import numpy as np
import rich.console
import rich.progress
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sdpo_jax.records import Histogram, Ratio
from sdpo_jax.workdir import write_atomically

# names of values that another machine, or another try, would not repeat
MACHINE = ("time*", "perf/*", "*per_s*")


def reduce(metrics) -> dict[str, float | int]:
  """Turns Ratios into means, Histograms into percentiles, others into numbers of Python.

  The name of a Histogram ends in the percentile: `train/rollout_gap_p99`.

  Values that are missing, empty or not finite are left out. The order of the keys is kept.
  """
  reduced = {}
  for name, value in metrics.items():
    if isinstance(value, Ratio):
      value = value.mean
    elif isinstance(value, Histogram):
      value = value.quantile(int(name.rpartition("p")[2]) / 100)
    if value is None:
      continue
    value = np.asarray(value).item()
    if math.isfinite(value):
      reduced[name] = value
  return reduced


def reproducible(line: dict) -> dict:
  """Returns a line of metrics.jsonl without the values that depend on the machine.

  An exact resume must repeat what is left.
  """
  return {
    name: value
    for name, value in line.items()
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in MACHINE)
  }


def read(workdir) -> list[dict]:
  """Reads every whole line of metrics.jsonl; returns no lines if there is no such file.

  A last line that a kill cut short does not count. ValueError for damage anywhere else.
  """
  path = pathlib.Path(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  # what follows the last newline is empty, or cut short
  *whole, _ = path.read_text(encoding="utf-8").split("\n")
  lines = []
  for number, text in enumerate(whole, start=1):
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError as error:
      raise ValueError(f"{path} line {number} is not JSON: {error}") from error
  return lines


class Writer:
  """Writes a run's metrics.

  It creates nothing before the first `write`, so that opening a finished run leaves it alone.
  """

  def __init__(self, workdir, *, total_steps=None):
    self._workdir = pathlib.Path(workdir)
    self._path = self._workdir / "metrics.jsonl"
    self._file = self._events = None
    self._continue_after(read(workdir))
    self._purge_step = None
    self._opened = time.monotonic()
    self._progress = Progress(total_steps)

  def _continue_after(self, lines: list[dict]):
    self._last_step = lines[-1]["step"] if lines else -1
    self._earlier_s = lines[-1]["time_s"] if lines else 0.0

  def truncate(self, step: int):
    """Keeps the lines before `step`, which is the one that the resumed run writes next.

    It may be called before the first `write` only.
    """
    assert self._file is None, "truncate comes before the first write"
    kept = [line for line in read(self._workdir) if line["step"] < step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if self._path.exists() and self._path.read_text(encoding="utf-8") != text:
      write_atomically(self._path, text)
    self._continue_after(kept)
    self._purge_step = step  # TensorBoard hides what older event files hold from here on

  def write(self, step: int, metrics: dict):
    """Writes one line: everything known about the step, training and evaluation, in one call.

    `metrics` maps a name to a Ratio, a number or None.
    """
    step = int(step)
    if step <= self._last_step:
      raise ValueError(
        f"metrics of step {step} come after those of step {self._last_step}: "
        "merge what belongs to one step, or truncate first"
      )
    ungrouped = [name for name in metrics if "/" not in name]
    if ungrouped:
      raise ValueError(f"metrics are named group/name; got {ungrouped}")
    values = reduce(metrics)
    if self._file is None:
      self._open()
    elapsed_s = self._earlier_s + time.monotonic() - self._opened
    line = {"step": step, "time_s": round(elapsed_s, 3)} | values
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    os.fsync(self._file.fileno())
    for name, value in values.items():
      scalar = summary.scalar(name, value)
      self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar))
    self._events.flush()
    self._last_step = step
    self._progress.show(step, values)

  def _open(self):
    self.truncate(self._last_step + 1)  # drops a last line cut short
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._file = self._path.open("a", encoding="utf-8")
    older = any(self._workdir.glob("events*"))
    # EventsWriter works in this thread. SummaryWriter's own thread dies of a full disk, and then
    # SummaryWriter waits for it forever.
    self._events = EventsWriter(str(self._workdir / "events"))
    if older and self._purge_step is not None:
      restart = SessionLog(status=SessionLog.START)
      self._events.write_event(
        Event(wall_time=time.time(), step=self._purge_step, session_log=restart)
      )

  def close(self):
    self._progress.close()
    if self._file is not None:
      self._file.close()
      self._events.close()


class Progress:
  """Shows on stderr where a run stands: a moving bar on a terminal, elsewhere a line a step.

  Evaluations stay on the screen either way.
  """

  SHOWN = {
    "train/reward": "reward {:.3f}",
    "train/loss": "loss {:.4f}",
    "perf/tokens_per_s": "{:,.0f} tokens/s",
  }

  def __init__(self, total_steps):
    self._total = total_steps
    # (step, clock) of this session's first line; its compilation would spoil the estimate
    self._first = None
    self._console = rich.console.Console(
      file=sys.stderr, highlight=False, markup=False, soft_wrap=True
    )
    self._bar = None

  def show(self, step, values):
    now = time.monotonic()
    self._first = self._first or (step, now)
    words = [text.format(values[name]) for name, text in self.SHOWN.items() if name in values]
    first_step, first_time = self._first
    if self._total and step > first_step:
      left_s = (now - first_time) / (step - first_step) * max(self._total - step, 0)
      words.append(f"{int(left_s) // 60}:{int(left_s) % 60:02d} left")
    count = f"step {step}/{self._total}" if self._total else f"step {step}"
    self._show_evaluation(count, values)
    text = "  ".join([count, *words])
    if not self._console.is_terminal:
      self._console.print(text)
      return
    if self._bar is None:
      self._bar = self._start_bar()
    self._bar.update(self._bar.task_ids[0], completed=step, description=text)

  def _start_bar(self):
    bar = rich.progress.Progress(
      rich.progress.BarColumn(bar_width=24),
      rich.progress.TextColumn("{task.description}", markup=False),
      console=self._console,
    )
    bar.add_task("", total=self._total)
    bar.start()
    return bar

  def _show_evaluation(self, count, values):
    for name, value in values.items():
      if not name.startswith("eval/") or not name.endswith("/avg@k"):
        continue
      low, high = values.get(name + "_low"), values.get(name + "_high")
      bounded = low is not None and high is not None
      interval = f" [{low:.3f}, {high:.3f}]" if bounded else ""
      self._console.print(f"{count}  {name} {value:.3f}{interval}")

  def close(self):
    if self._bar is not None:
      self._bar.stop()
