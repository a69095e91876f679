"""Makes the table of runs that lost what they had learnt, and of the signs that came before."""

from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.runs import Run, main_split

COLLAPSE_LEGEND = """\
Which runs lost what they had learnt, and what warned of it (`warned` in curves.json; the signs are
the README's). "Best" and "last" are of held-out evaluations, means over seeds, the best one of each
run with its step. A run has collapsed from the first evaluation on after which none reaches half of
its best any more, if that was 10 % or more. It was "worse" at the first evaluation of any split
that is below the base model's on the same questions, or below the run's own best, beyond intervals.
The last columns have the step at which each seed's sign was first seen."""
LEAST = 0.1  # accuracy; half of less than that is a few questions
FALLS = ("worse", "fallen")  # the signs that an evaluation is worse


def collapse(arms: dict[str, list[Run]]) -> list[str]:
  """Returns the table with its legend; nothing where no run showed a sign."""
  members = [run for runs in arms.values() for run in runs]
  names = sorted({name for run in members for name in run.warned} - set(FALLS))
  if not any(run.warned for run in members):
    return []
  names.sort(key=lambda name: name != "length_tail")
  rows = [_row(arm, runs, names) for arm, runs in arms.items()]
  head = ["arm", "best", "at step", "last", "collapsed at", "worse at"]
  return [COLLAPSE_LEGEND, md.table([*head, *(f"`{name}`" for name in names)], rows)]


def _row(arm: str, runs: list[Run], names: list[str]) -> list[str]:
  split = main_split(runs)
  key = f"eval/{split}/avg@k"
  best = [max(run.evaluations(split), key=lambda point: point[key]) for run in runs]
  return [
    f"`{arm}`",
    md.mean([point[key] for point in best]),
    ", ".join(str(point["step"]) for point in best),
    md.mean([run.last(split) for run in runs]),
    _listed([collapsed_at(run) for run in runs]),
    _listed([_worse_at(run) for run in runs]),
    *(_listed([run.warned.get(name) for run in runs]) for name in names),
  ]


def collapsed_at(run: Run) -> int | None:
  """Returns the step of the first evaluation after which none reaches half of the run's best.

  The base model's counts as one; None: the last evaluation does, or the best is below LEAST.
  """
  split = main_split([run])
  key = f"eval/{split}/avg@k"
  points = run.evaluations(split)
  best = max(point[key] for point in points)
  if best < LEAST:
    return None
  half = best / 2
  step = None
  for point in reversed(points):
    if point[key] >= half:
      break
    step = point["step"]
  return step


def _worse_at(run: Run) -> int | None:
  """Returns the step of the first evaluation that was worse; None if none was."""
  return min((run.warned[name] for name in FALLS if name in run.warned), default=None)


def _listed(steps: list[int | None]) -> str:
  """Returns the step of each seed; a dash where none has one."""
  if all(step is None for step in steps):
    return md.NONE
  return ", ".join(md.NONE if step is None else str(step) for step in steps)
