"""Holds the stopwatch that all benchmarks share."""

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
