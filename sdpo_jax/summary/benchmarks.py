"""Makes the tables of speed and memory from sdpo_jax/bench/results."""

import json
import pathlib

from sdpo_jax.summary import markdown as md

BENCHMARKS = {  # file -> {column: (field of a record, format)}
  "step_cpu": {
    "case": ("case", ""),
    "responses": ("responses", ""),
    "CPU seconds": ("cpu_s", ".2f"),
    "seconds": ("time_s", ".2f"),
    "peak memory MB": ("peak_mb", ",.0f"),
    "temporaries MB": ("temporaries_mb", ",.0f"),
    "share of useful columns": ("useful", ".3f"),
  },
  "step_methods_cpu": {
    "method": ("method", ""),
    "readings by the teacher": ("readings", ""),
    "CPU seconds / sdpo's": ("relative_cpu", ".2f"),
    "seconds": ("time_s", ".2f"),
  },
  "loss_cpu": {
    "implementation": ("implementation", ""),
    "tokens, width, vocabulary": ("shape", ""),
    "CPU seconds": ("cpu_s", ".2f"),
    "temporaries MB": ("temporaries_mb", ",.0f"),
    "peak memory MB": ("peak_mb", ",.0f"),
  },
  "rollout_cpu": {
    "mix": ("mix", ""),
    "tokens": ("tokens", ","),
    "tokens a CPU second": ("tokens_per_cpu_s", ".0f"),
    "CPU seconds": ("cpu_s", ".1f"),
    "least CPU seconds of this schedule": ("floor_s", ".1f"),
    "cache, at its peak over need": ("cache_peak", ".2f"),
    "on average": ("cache_mean", ".2f"),
    "programs": ("programs", ""),
  },
  "episodes_cpu": {
    "a world's answer takes ms": ("delay_ms", ".0f"),
    "overlap": ("overlap", ""),
    "episodes/s": ("episodes_per_s", ".1f"),
    "CPU seconds a batch": ("cpu_s", ".2f"),
    "turns": ("turns", ".1f"),
    "waiting for worlds": ("waiting", ".1%"),
    "worlds at work beside sampling": ("hidden", ".1%"),
  },
  "sandbox_cpu": {
    "worker": ("kind", ""),
    "programs/s": ("per_s", ",.0f"),
    "p50 ms": ("p50_ms", ".1f"),
    "p99 ms": ("p99_ms", ".1f"),
    "MB a worker, proportional": ("pss_mb", ".1f"),
    "MB a worker, resident": ("rss_mb", ".1f"),
    "cold start s": ("cold_s", ".2f"),
    "time limit reported after ms": ("late_ms", ".1f"),
  },
}


def benchmarks(folder: pathlib.Path) -> list[str]:
  """Returns a table for each measurement of sdpo_jax.bench."""
  parts = []
  for name, columns in BENCHMARKS.items():
    sittings = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    # methods that were compared in one sitting stand in one record
    records = [record for sitting in sittings for record in sitting.get("steps", [sitting])]
    rows = [
      [md.number(record.get(field), form) for field, form in columns.values()] for record in records
    ]
    parts += [f"### {name}.json", md.table(list(columns), rows)]
  return parts
