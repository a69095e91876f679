"""metrics.jsonl, TensorBoard events and the progress line of a run. Host side; on several hosts only process 0 has a Writer.

metrics.jsonl holds one JSON object a step: `step`, `time_s` (seconds spent so far, earlier sessions of a resumed run included), then metrics
named `group/name`. A value that is None or not finite is left out, never written as NaN. A line is on the disk when `write` returns, so a
checkpoint saved afterwards never claims steps that the file lacks. Values that depend on the machine and not on the run are named as in MACHINE.

Errors: ValueError for a name without a group, a step that does not go up, or a metrics.jsonl damaged anywhere but in its last line; OSError where
the disk takes no more.
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

from sdpo_jax.records import Ratio
from sdpo_jax.workdir import write_atomically

# names of values that another machine, or another try, would not repeat
MACHINE = ("time*", "perf/*", "*per_s*")


def reduce(metrics) -> dict[str, float | int]:
  """Ratios to their means, numbers to Python's; what is missing, empty or not finite is left out. Key order is kept."""
  reduced = {}
  for name, value in metrics.items():
    value = value.mean if isinstance(value, Ratio) else value
    if value is None:
      continue
    value = np.asarray(value).item()
    if math.isfinite(value):
      reduced[name] = value
  return reduced


def reproducible(line: dict) -> dict:
  """A line of metrics.jsonl without the values that depend on the machine: what an exact resume must repeat."""
  return {
    name: value
    for name, value in line.items()
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in MACHINE)
  }


def read(workdir) -> list[dict]:
  """Every whole line of metrics.jsonl; a last line cut short by a kill does not count. No file: no lines."""
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
  """Writes a run's metrics. Creates nothing before the first `write`, so that opening a finished run leaves it alone."""

  def __init__(self, workdir, *, total_steps=None):
    self._workdir = pathlib.Path(workdir)
    self._path = self._workdir / "metrics.jsonl"
    self._file = self._events = None
    lines = read(workdir)
    self._last_step = lines[-1]["step"] if lines else -1
    self._purge_step = None
    self._earlier_s = lines[-1]["time_s"] if lines else 0.0
    self._opened = time.monotonic()
    self._progress = Progress(total_steps)

  def truncate(self, step: int):
    """Keep the lines before `step`, which is the one that the resumed run writes next. Before the first `write` only."""
    assert self._file is None, "truncate comes before the first write"
    kept = [line for line in read(self._workdir) if line["step"] < step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if self._path.exists() and self._path.read_text(encoding="utf-8") != text:
      write_atomically(self._path, text)
    self._last_step = kept[-1]["step"] if kept else -1
    self._earlier_s = kept[-1]["time_s"] if kept else 0.0
    self._purge_step = step  # TensorBoard hides what older event files hold from here on

  def write(self, step: int, metrics: dict):
    """One line. metrics: name -> Ratio, number or None; everything known about the step, training and evaluation, in one call."""
    step = int(step)
    if step <= self._last_step:
      raise ValueError(
        f"metrics of step {step} come after those of step {self._last_step}: merge what belongs to one step, or truncate first"
      )
    ungrouped = [name for name in metrics if "/" not in name]
    if ungrouped:
      raise ValueError(f"metrics are named group/name; got {ungrouped}")
    values = reduce(metrics)
    if self._file is None:
      self.truncate(self._last_step + 1)  # drops a last line cut short
      self._workdir.mkdir(parents=True, exist_ok=True)
      self._file = self._path.open("a", encoding="utf-8")
      older = any(self._workdir.glob("events*"))
      # in this thread: SummaryWriter's own dies of a full disk, and then it waits for it forever
      self._events = EventsWriter(str(self._workdir / "events"))
      if older and self._purge_step is not None:
        self._events.write_event(
          Event(
            wall_time=time.time(),
            step=self._purge_step,
            session_log=SessionLog(status=SessionLog.START),
          )
        )
    elapsed_s = self._earlier_s + time.monotonic() - self._opened
    self._file.write(
      json.dumps({"step": step, "time_s": round(elapsed_s, 3)} | values, allow_nan=False) + "\n"
    )
    self._file.flush()
    os.fsync(self._file.fileno())
    for name, value in values.items():
      self._events.write_event(
        Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value))
      )
    self._events.flush()
    self._last_step = step
    self._progress.show(step, values)

  def close(self):
    self._progress.close()
    if self._file is not None:
      self._file.close()
      self._events.close()


class Progress:
  """Where a run stands, on stderr: a moving bar on a terminal, elsewhere a line a step. Evaluations stay on the screen either way."""

  SHOWN = {
    "train/reward": "reward {:.3f}",
    "train/loss": "loss {:.4f}",
    "perf/tokens_per_s": "{:,.0f} tokens/s",
  }

  def __init__(self, total_steps):
    self._total = total_steps
    # (step, clock) of the first line of this session: its compilation is not typical
    self._first = None
    self._console = rich.console.Console(
      file=sys.stderr, highlight=False, markup=False, soft_wrap=True
    )
    self._bar = None

  def show(self, step, values):
    now = time.monotonic()
    self._first = self._first or (step, now)
    shown = [text.format(values[name]) for name, text in self.SHOWN.items() if name in values]
    if self._total and step > self._first[0]:
      left_s = (now - self._first[1]) / (step - self._first[0]) * max(self._total - step, 0)
      shown.append(f"{int(left_s) // 60}:{int(left_s) % 60:02d} left")
    count = f"step {step}/{self._total}" if self._total else f"step {step}"
    self._evaluation(count, values)
    if not self._console.is_terminal:
      self._console.print("  ".join([count, *shown]))
      return
    if self._bar is None:
      self._bar = rich.progress.Progress(
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TextColumn("{task.description}", markup=False),
        console=self._console,
      )
      self._bar.add_task("", total=self._total)
      self._bar.start()
    self._bar.update(self._bar.task_ids[0], completed=step, description="  ".join([count, *shown]))

  def _evaluation(self, count, values):
    for name, value in values.items():
      if name.startswith("eval/") and name.endswith("/avg@k"):
        low, high = values.get(name + "_low"), values.get(name + "_high")
        span = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        self._console.print(f"{count}  {name} {value:.3f}{span}")

  def close(self):
    if self._bar is not None:
      self._bar.stop()
