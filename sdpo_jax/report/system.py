"""Says on what a run was made, where its time went, and of what its monitors warned."""

import json
import statistics
from typing import NamedTuple

from sdpo_jax.report.comparison import NONE, duration
from sdpo_jax.report.files import mapping, sequence
from sdpo_jax.report.runs import Run, flattened

# The two halves of a step, one after the other; what they leave of a run is "the rest"
HALVES = {
  "time/rollout_s": "sampling and judging",
  "time/update_s": "readings by the teacher, update",
}
OVERLAPPING = {  # times within the halves, or beside them
  "time/judge_wait_s": "of sampling: waiting for judges",
  "time/judge_hidden_s": "judging while others are sampled",
  "time/pack_hidden_s": "packing while others are sampled",
  "time/worlds_wait_s": "of sampling: waiting for worlds",
  "time/worlds_hidden_s": "worlds at work while others are sampled",
  "time/remote_teacher_s": "waiting for a teacher elsewhere",
  "time/probe_s": "probes of the teacher",
}
REST = "evaluations, checkpoints, start"
MEMORY = ("memory", "bytes", "_mb", "_gb")  # what names of such metrics hold
# Entries of run.json that tell of the machine, and those that are told under other names
OF_MACHINE = ("devices", "machine", "python", "versions", "processes", "mesh", "sandbox_isolation")
OF_RUN = ("command", "commit", "started", "rows")


class Time(NamedTuple):
  """A line of the table of times, as text."""

  what: str
  name: str
  median: str  # seconds a step
  total: str
  share: str  # of the run


def system(run: Run) -> dict:
  """Returns the facts and figures of a run that depend on its machine."""
  return {
    "label": run.label,
    "seed": run.seed,
    "facts": _facts(run.about),
    "shares": _shares(run),
    "times": _times(run),
    "figures": _figures(run),
    "warnings": run.warnings,
    "warned": _warned(run) if not run.warnings else "",
  }


def settings(run: Run) -> dict:
  """Returns how a run was made: run.json as (name, text) pairs, and config.json as text."""
  about = run.about
  rows = mapping(about.get("rows")).items()
  facts = {
    "command": about.get("command"),
    "commit": about.get("commit"),
    "started": ", ".join(map(str, sequence(about.get("started")))),
    "rows": ", ".join(f"{split} {mapping(found).get('rows', '?')}" for split, found in rows),
    "work directory": run.workdir,
  }
  told = {*OF_MACHINE, *OF_RUN}
  pairs = [*facts.items(), *((name, about[name]) for name in about if name not in told)]
  config = json.dumps(run.config, indent=2, ensure_ascii=False)
  return {
    "label": run.label,
    "seed": run.seed,
    "facts": [(name, value) for name, value in pairs if value not in (None, "")],
    "config": config if run.config else "config.json is missing.",
  }


def _facts(about: dict) -> list[tuple[str, str]]:
  versions = flattened(mapping(about.get("versions"))).items()
  machine = mapping(about.get("machine"))
  facts = {
    "devices": ", ".join(map(str, sequence(about.get("devices")))),
    **{name: str(value) for name, value in machine.items()},
    "processes": about.get("processes"),
    "mesh": about.get("mesh"),
    "sandbox": about.get("sandbox_isolation"),
    "python": about.get("python"),
    "versions": ", ".join(f"{name} {version}" for name, version in versions),
  }
  return [(name, value) for name, value in facts.items() if value not in (None, "")]


def _seconds(run: Run) -> float:
  return max((line["time_s"] for line in run.lines if "time_s" in line), default=0.0)


def _totals(run: Run) -> dict[str, list[float]]:
  """Returns {metric: its values} of every time that was measured."""
  values: dict[str, list[float]] = {}
  for line in run.lines:
    for name, value in line.items():
      if name.startswith("time/"):
        values.setdefault(name, []).append(value)
  return values


def _shares(run: Run) -> list[dict]:
  """Returns the parts that a run's time falls into, in per cent; [] where they are not known."""
  totals, seconds = _totals(run), _seconds(run)
  if not seconds or not all(name in totals for name in HALVES):
    return []
  parts = {what: sum(totals[name]) / seconds for name, what in HALVES.items()}
  parts[REST] = max(0.0, 1.0 - sum(parts.values()))
  return [{"what": what, "percent": f"{100 * share:.1f}"} for what, share in parts.items()]


def _times(run: Run) -> list[Time]:
  totals, seconds = _totals(run), _seconds(run)
  known = HALVES | OVERLAPPING
  order = [*(name for name in known if name in totals), *sorted(totals.keys() - known.keys())]
  rows = []
  for name in order:
    total = sum(totals[name])
    share = f"{total / seconds:.1%}" if seconds else NONE
    median = f"{statistics.median(totals[name]):.2f}"
    rows.append(Time(known.get(name, name), name, median, duration(total), share))
  return rows


def _figures(run: Run) -> list[tuple[str, str]]:
  """Returns (what, value): speed, start, compilations, and memory where it is recorded."""
  rows = []
  speeds = [y for _, y in run.series("perf/tokens_per_s")]
  if speeds:
    rows.append(("tokens a second, median over steps", f"{statistics.median(speeds):,.0f}"))
  starts = [y for _, y in run.series("perf/first_step_s")]
  if starts:
    rows.append(("from a start to the end of its first step", ", ".join(map(duration, starts))))
  compiles = run.series("perf/compiles")
  if compiles:
    grew = [
      step for (step, now), before in zip(compiles, [0, *dict(compiles).values()]) if now > before
    ]
    steps = ", ".join(map(str, grew[:12])) + (", ..." if len(grew) > 12 else "")
    rows.append(("shapes compiled", f"{compiles[-1][1]:,.0f}, new ones at steps {steps}"))
  names = dict.fromkeys(name for line in run.lines for name in line)
  for name in names:
    if any(part in name for part in MEMORY) and not name.startswith("memory/"):
      rows.append((f"{name}, most", f"{max(y for _, y in run.series(name)):,.1f}"))
  return rows


def _warned(run: Run) -> str:
  """Returns at which steps a sign was seen whose text is not known; "" for none."""
  steps = [line["step"] for line in run.lines if line.get("train/warnings")]
  shown = ", ".join(map(str, steps[:12])) + (", ..." if len(steps) > 12 else "")
  return f"{len(steps)} steps with a warning: {shown}" if steps else ""
