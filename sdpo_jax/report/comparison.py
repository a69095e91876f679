"""Tables of results: a row for each run, and groups side by side.

The test of two groups is `stats.paired_bootstrap` over the seeds that both have.
"""

from typing import NamedTuple

from sdpo_jax import stats
from sdpo_jax.report.curves import mean_curve
from sdpo_jax.report.files import mapping
from sdpo_jax.report.runs import Run, groups_of, splits_of

NONE = "–"


class Score(NamedTuple):
  """A mean and its interval, as text. The interval is empty where one sample tells no spread."""

  mean: str
  interval: str


def score(mean, low, high) -> Score:
  """Returns a mean and its interval in per cent."""
  known = low is not None and high is not None
  return Score(f"{mean:.1%}", f"[{low:.1%}, {high:.1%}]" if known else "")


class MeanCurves(NamedTuple):
  """A group's mean score against what it had generated: [(x, mean over seeds)]."""

  by_responses: list[tuple[float, float]]
  by_tokens: list[tuple[float, float]]


class Paired(NamedTuple):
  """A difference of two groups over the seeds that both have, as a share of the reward."""

  mean: float
  low: float | None  # None: one seed tells no spread
  high: float | None
  seeds: int
  is_complete: bool  # no seed is left out


def results(runs: list[Run]) -> dict:
  """Returns the table of all runs: the base model and the last evaluation of each split."""
  splits = splits_of(runs)
  several_tasks = len({run.task for run in runs}) > 1
  return {
    "splits": splits,
    "samples": runs[0].setting("eval.samples") or "k",
    "rows": [_result_row(run, splits, several_tasks) for run in runs],
    "has_metrics": any(run.lines for run in runs),
    "skipped": sum(run.skipped for run in runs),
    "not_numbers": sum(run.not_numbers for run in runs),
  }


def _result_row(run: Run, splits: list[str], several_tasks: bool) -> dict:
  last = run.lines[-1] if run.lines else {}
  generated = max((y for _, y in run.series("train/generations")), default=0)
  return {
    "label": run.label,
    "tuned": run.tuned,
    "place": f"{run.task}: {run.workdir}" if several_tasks else str(run.workdir),
    "seed": run.seed,
    "done": f"{last.get('step', 0)} / {run.config.get('total_steps', '?')}{_ended(run)}",
    "generated": f"{generated:,}",
    "time": duration(last.get("time_s")),
    "evaluations": [_evaluations(run, f"eval/{split}/avg@k") for split in splits],
  }


def _ended(run: Run) -> str:
  """Returns what run.json says about the end of a run beyond its last step; "" for nothing."""
  ended = mapping(run.about.get("ended"))
  stopped = ", stopped: worse than the base model" if ended.get("stopped") else ""
  best = mapping(ended.get("best")).get("step")
  return stopped + (f", best at {best}" if best not in (None, ended.get("step")) else "")


def _evaluations(run: Run, name: str) -> dict | None:
  """Returns the base model's score and the last one; None for a split never evaluated.

  `at_step` names the step of the last evaluation if the run has gone on since.
  """
  lines = [line for line in run.lines if line.get(name) is not None]
  if not lines:
    return None
  first, last = lines[0], lines[-1]
  has_base = first["step"] == 0 and len(lines) > 1
  late = last is not run.lines[-1]
  base = _score_at(first, name) if has_base else None
  return {
    "base": base,
    "last": _score_at(last, name),
    "at_step": last["step"] if late else None,
  }


def _score_at(line: dict, name: str) -> Score:
  return score(line[name], line.get(name + "_low"), line.get(name + "_high"))


def duration(seconds) -> str:
  """Returns seconds as hours, minutes and seconds."""
  if seconds is None:
    return NONE
  hours, rest = divmod(int(seconds), 3600)
  minutes, seconds = divmod(rest, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# ---- groups side by side, by their last evaluation and by what it cost to get there --------------


def trained(runs: list[Run], name: str) -> dict[str, list[Run]]:
  """Returns the groups with the runs in which a metric was measured after training had begun."""
  return {
    label: [run for run in members if max(run.points(name, "step"), default=0) > 0]
    for label, members in groups_of(runs).items()
  }


def comparison(runs: list[Run]) -> dict | None:
  """Returns the rows of a table of the groups; None if there is nothing to compare."""
  groups = groups_of(runs)
  if len(runs) == 1:
    return None
  rows, left_out = [], []
  for split in splits_of(runs):
    name = f"eval/{split}/avg@k"
    kept = trained(runs, name)
    rows += [dict(row, split=split) for row in _compared(kept, name)]
    for label, members in kept.items():
      missing = len(groups[label]) - len(members)
      if missing:
        left_out.append(f"{split}: {label} ({missing} of {len(groups[label])} runs)")
  if not rows:
    return None
  return {"first": next(iter(groups)), "rows": rows, "left_out": "; ".join(left_out)}


def _compared(groups: dict[str, list[Run]], name: str) -> list[dict]:
  """Returns a row for each group that has values: its last evaluation, and how soon it was good."""
  first = next(iter(groups))
  curves = {
    label: MeanCurves(
      mean_curve(members, name, "train/generations"),
      mean_curve(members, name, "train/sampled_tokens"),
    )
    for label, members in groups.items()
  }
  rows = []
  for label, members in groups.items():
    own = curves[label]
    if not own.by_responses:
      continue
    others = [other for other in groups if other != label and curves[other].by_responses]
    against = None if label == first else _against(paired(members, groups[first], name))
    row = {
      "label": label,
      "tuned": members[0].tuned,
      "seeds": len(members),
      "tokens": f"{own.by_tokens[-1][0]:,.0f}" if own.by_tokens else NONE,
      "last": score(*stats.mean_interval([run.last(name) for run in members])),
      "against": against,
      "reached": [_reach(own, other, curves[other]) for other in others],
    }
    rows.append(row)
  return rows


def paired(members: list[Run], others: list[Run], name: str) -> Paired | None:
  """Compares last values, members minus others, over the seeds that both have; None: no seed."""
  own_scores = {run.config.get("seed"): run.last(name) for run in members}
  other_scores = {run.config.get("seed"): run.last(name) for run in others}
  seeds = sorted(own_scores.keys() & other_scores.keys(), key=str)
  if not seeds:
    return None
  found = stats.paired_bootstrap(
    [own_scores[seed] for seed in seeds], [other_scores[seed] for seed in seeds]
  )
  is_complete = len(seeds) == max(len(own_scores), len(other_scores))
  return Paired(found.difference, found.low, found.high, len(seeds), is_complete)


def points(mean, low=None, high=None) -> Score:
  """Returns a difference and its interval in points, hundredths of the reward."""
  interval = "" if low is None else f"[{100 * low:+.1f}, {100 * high:+.1f}]"
  return Score(f"{100 * mean:+.1f}", interval)


def _against(found: Paired | None) -> dict:
  if found is None:
    return {"mean": NONE, "interval": "", "seeds": ""}
  text = points(found.mean, found.low, found.high)
  count = "" if found.is_complete else f"({found.seeds} seeds)"
  return {"mean": f"{text.mean} points", "interval": text.interval, "seeds": count}


def _reach(own: MeanCurves, other: str, target: MeanCurves) -> str:
  """Returns a line: what these curves cost until they are as good as another's last value."""
  beginning = f"{other}'s {target.by_responses[-1][1]:.1%}: "
  costs = []
  for unit, curve, goal in (
    ("responses", own.by_responses, target.by_responses),
    ("tokens", own.by_tokens, target.by_tokens),
  ):
    if not curve or not goal:
      continue
    end_x, end_y = goal[-1]
    reached = next((x for x, y in curve if y >= end_y), None)
    if reached is None:
      return beginning + "not reached"
    if reached == 0:
      return beginning + "the base model already"
    cost = f"{reached:,.0f} / {end_x:,.0f} {unit}"
    if reached < end_x:
      cost += f" ({end_x / reached:.1f}×)"
    costs.append(cost)
  return beginning + ", ".join(costs)
