"""Measures rate, latency, memory and start of the sandbox: lean, with numpy, and with checks.

  python -m sdpo_jax.bench sandbox [--workers=N] [--programs=2000] [--isolation=auto]
                                   [--repeats=1] [--json=FILE]

A program is trivial and has one test; a fresh process runs it. That of "checked" is judged by a
check, which calls it three times from a process of its own. There is one row for each kind, with
medians over the repeats:

  per_s             programs a second from 2 callers for each worker, all workers busy
  p50_ms, p99_ms    time of one verdict with one caller, everything else idle
  busy_p99_ms       the same from as many callers as workers
  rss_mb, pss_mb    resident memory of a warm worker; with shared pages divided among those who
                    share them (where readable)
  cold_s            from nothing to the first verdict of a pool of that many workers, probe included
  late_ms           from an endless loop's CPU limit of 0.2 s to its verdict at the caller, worst of
                    5
  late_600mb_ms     the same of a program that takes 600 MB first

Figures mean what they say only on idle cores: `load` is the machine's load average at the start.
Where others compute, `chrt -r 2` before the command (as root) gives it precedence. The kernel then
stops everything for 50 ms in each second of full use. That is why the loops are 0.2 s apart, and
why no repeat should be much longer than it must. MB = 10^6 bytes.
"""

import argparse
import concurrent.futures
import json
import os
import shlex
import statistics
import time

from sdpo_jax.bench.child import table
from sdpo_jax.bench.timing import machine
from sdpo_jax.errors import local_path
from sdpo_jax.sandbox import ISOLATIONS, Limits, Sandbox, TestCase, installed

PROGRAMS = {
  "lean": "print(int(input()) + 1)",
  "numpy": "import numpy\nprint(int(input()) + 1)",
  "checked": "def f(x): return x + 1",
}
CHECK = "def check(candidate):\n  for x in range(3):\n    assert candidate(x) == x + 1"
FIGURES = (
  "load",
  "per_s",
  "p50_ms",
  "p99_ms",
  "busy_p99_ms",
  "rss_mb",
  "pss_mb",
  "cold_s",
  "late_ms",
  "late_600mb_ms",
)
COLUMNS = ("kind", "isolation", "workers", *FIGURES)


def main(argv):
  """Measures and prints one JSON line for each kind of worker, then a table. Returns 0."""
  args = _arguments(argv)
  rows = []
  for kind in PROGRAMS:
    if kind == "numpy" and not installed("numpy"):
      continue
    repeats = [
      _measure(kind, args.workers, args.programs, args.isolation) for _ in range(args.repeats)
    ]
    rows.append(_median(repeats))
    rows[-1]["repeats"] = args.repeats
    rows[-1]["machine"] = machine()
    rows[-1]["command"] = shlex.join(["python", "-m", "sdpo_jax.bench", "sandbox", *argv])
    print(json.dumps(rows[-1]), flush=True)
  if args.json:
    with open(args.json, "w") as f:
      json.dump(rows, f, indent=1)
  print(table(COLUMNS, rows, error_in="kind"))
  return 0


def _arguments(argv):
  parser = argparse.ArgumentParser(
    prog="python -m sdpo_jax.bench sandbox",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--workers", type=int, help="default: as many as cores")
  parser.add_argument(
    "--programs", type=int, default=2000, help="for the rate; half as many for each latency"
  )
  parser.add_argument("--isolation", choices=("auto",) + ISOLATIONS, default="auto")
  parser.add_argument("--repeats", type=int, default=1)
  parser.add_argument(
    "--json",
    metavar="FILE",
    type=local_path,
    help="also write all results there, as one JSON list",
  )
  args = parser.parse_args(argv)
  for name, least in (("workers", 1), ("programs", 2), ("repeats", 1)):
    value = getattr(args, name)
    if value is not None and value < least:
      parser.error(f"--{name}={value} must be at least {least}")
  return args


def _median(repeats: list[dict]) -> dict:
  """Returns the first repeat with the medians of the figures; what was not readable stays ""."""
  row = dict(repeats[0])
  for figure in FIGURES:
    if row[figure] != "":
      row[figure] = statistics.median(repeat[figure] for repeat in repeats)
  return row


def _measure(kind, workers, programs, isolation) -> dict:
  """Measures a new pool once; the keys are COLUMNS."""
  load = os.getloadavg()[0]
  start = time.perf_counter()
  with Sandbox(workers=workers, isolation=isolation) as pool:
    lean_pids = set(pool.worker_pids())
    workers = len(lean_pids)

    def verdict_s(_):
      begin = time.perf_counter()
      test = TestCase(check=CHECK) if kind == "checked" else TestCase("1", "2")
      if not pool.run(PROGRAMS[kind], [test], "f" if kind == "checked" else None).passed:
        raise RuntimeError("the trivial program failed")
      return time.perf_counter() - begin

    verdict_s(0)
    cold_s = time.perf_counter() - start
    with concurrent.futures.ThreadPoolExecutor(2 * workers) as callers:
      list(callers.map(verdict_s, range(8 * workers)))  # brings up every worker of this kind
      begin = time.perf_counter()
      list(callers.map(verdict_s, range(programs)))
      per_s = programs / (time.perf_counter() - begin)
    alone = sorted(map(verdict_s, range(programs // 2)))
    with concurrent.futures.ThreadPoolExecutor(workers) as callers:
      busy = sorted(callers.map(verdict_s, range(programs // 2)))
    # those with numpy and those for checks come on top of the lean ones
    pids = set(pool.worker_pids()) - lean_pids or lean_pids
    imports = "import numpy\n" if kind == "numpy" else ""
    late_ms = _late_ms(pool, imports + "while True: pass")
    late_600mb_ms = _late_ms(pool, imports + "b = b'x' * 600_000_000\nwhile True: pass")
    rss_mb = max(_kib(pid, "status", "VmRSS") for pid in pids) * 1024 / 1e6
    return {
      "kind": kind,
      "isolation": pool.isolation,
      "workers": workers,
      "load": load,
      "per_s": per_s,
      "p50_ms": _quantile_ms(alone, 0.5),
      "p99_ms": _quantile_ms(alone, 0.99),
      "busy_p99_ms": _quantile_ms(busy, 0.99),
      "rss_mb": rss_mb,
      "pss_mb": _pss_mb(pids),
      "cold_s": cold_s,
      "late_ms": late_ms,
      "late_600mb_ms": late_600mb_ms,
    }


def _late_ms(pool, loop):
  """Returns the longest time from an endless loop's CPU limit to its verdict, of five."""
  late_s = []
  for _ in range(5):
    time.sleep(0.2)
    begin = time.perf_counter()
    verdict = pool.run(loop, [TestCase("", "")], limits=Limits(time_s=0.2))
    late_s.append(time.perf_counter() - begin - 0.2)
    if verdict.kind != "time_limit":
      raise RuntimeError(f"the endless loop ended as {verdict.kind}")
  return max(late_s) * 1e3


def _quantile_ms(sorted_s, quantile):
  return sorted_s[int(quantile * len(sorted_s))] * 1e3


def _kib(pid, file, name):
  """Reads a number of KiB from a file of /proc."""
  with open(f"/proc/{pid}/{file}") as f:
    return next(int(line.split()[1]) for line in f if line.startswith(name + ":"))


def _pss_mb(pids):
  """Returns the largest share of memory; "" where only root may read it, as these hide theirs."""
  try:
    return max(_kib(pid, "smaps_rollup", "Pss") for pid in pids) * 1024 / 1e6
  except PermissionError:
    return ""
