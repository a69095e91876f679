"""Holds what benchmarks share: the stopwatch, and how a machine is described."""

import os
import platform
import time
from typing import Callable


def best(run: Callable[[], object], repeats: int) -> tuple[float, float]:
  """Returns (wall seconds, processor seconds of all threads) of the fastest of several runs.

  One more run comes first, to warm up. `run` must return only when its work is done.
  """
  run()
  times = []
  for _ in range(repeats):
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    run()
    times.append((time.perf_counter() - wall_start, time.process_time() - cpu_start))
  return min(times)


def machine() -> str:
  """Describes the machine, and how this process is scheduled on it."""
  with open("/proc/cpuinfo") as f:
    names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
  name = names[0] if names else platform.machine()
  real_time = os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)
  policy = "real-time" if real_time else "ordinary"
  return (
    f"{len(os.sched_getaffinity(0))} cores of {name}, Linux {platform.release()}, "
    f"Python {platform.python_version()}, {policy} scheduling, uid {os.geteuid()}"
  )
