"""How the benchmarks time a call."""

import time
from typing import Callable


def best(run: Callable[[], object], repeats: int) -> tuple[float, float]:
  """(wall seconds, processor seconds of all threads) of the fastest of several runs after a warm-up. run: returns when its work is done."""
  run()
  times = []
  for _ in range(repeats):
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    times.append((time.perf_counter() - wall, time.process_time() - cpu))
  return min(times)
