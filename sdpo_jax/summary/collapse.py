"""Makes the table of runs that lost what they had learnt, and of the signs that came before."""

from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.runs import SPLITS, Run

COLLAPSE_LEGEND = """\
Which runs lost what they had learnt, and what told of it (`warned` in curves.json; the signs are
the README's). "Best" and "last" are of held-out evaluations, means over seeds, the best one of each
run with its step. A run "fell" at the first evaluation of any split that is below the base model's
on the same questions, or below the run's own best, beyond intervals. The last columns have the step
at which each seed's sign was first seen, and in brackets how many steps before the fall."""
FALLS = ("worse", "fallen")  # signs that are a fall themselves


def collapse(arms: dict[str, list[Run]]) -> list[str]:
  """Returns the table with its legend; nothing where no run showed a sign."""
  members = [run for runs in arms.values() for run in runs]
  names = sorted({name for run in members for name in run.warned} - set(FALLS))
  if not any(run.warned for run in members):
    return []
  names.sort(key=lambda name: name != "length_tail")
  rows = [_row(arm, runs, names) for arm, runs in arms.items()]
  head = ["arm", "best", "at step", "last", "fell at step", *(f"`{name}`" for name in names)]
  return [COLLAPSE_LEGEND, md.table(head, rows)]


def _row(arm: str, runs: list[Run], names: list[str]) -> list[str]:
  key = f"eval/{SPLITS[0]}/avg@k"
  best = [max(run.evaluations(SPLITS[0]), key=lambda point: point[key]) for run in runs]
  return [
    f"`{arm}`",
    md.mean([point[key] for point in best]),
    ", ".join(str(point["step"]) for point in best),
    md.mean([run.last(SPLITS[0]) for run in runs]),
    _listed([fall(run) for run in runs]),
    *(_listed([_sign(run, name) for run in runs]) for name in names),
  ]


def fall(run: Run) -> int | None:
  """Returns the step of the first evaluation that shows a fall; None if there is none."""
  return min((run.warned[name] for name in FALLS if name in run.warned), default=None)


def _sign(run: Run, name: str) -> str | None:
  """Returns when a sign was first seen, and how long before the fall; None: never."""
  step, end = run.warned.get(name), fall(run)
  if step is None or end is None:
    return None if step is None else str(step)
  return f"{step} ({end - step:+d})"


def _listed(cells: list) -> str:
  """Returns what each seed has; a dash where none has anything."""
  if all(cell is None for cell in cells):
    return md.NONE
  return ", ".join(md.NONE if cell is None else str(cell) for cell in cells)
