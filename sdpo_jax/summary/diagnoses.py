"""Holds what a diagnosis said against what training then did (diagnosis_TASK.json)."""

import json
import pathlib

from sdpo_jax.diagnose import agreement
from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.runs import SPLITS, ended_runs

DIAGNOSIS_LEGEND = """\
What `--mode=diagnose` said before training, against held-out accuracy at the end, in per cent. Tau
is Kendall's (tau-b) between the likely order and the measured means: 1 is the same order, -1 the
reverse. The last column is that of a constant answer, "grpo first, of the others no opinion"."""


def diagnoses(folder: pathlib.Path) -> list[str]:
  """Returns the table that holds each diagnosis against the runs on its task."""
  rows, taus = [], []
  for path in sorted(folder.glob("diagnosis_*.json")):
    task = path.stem.removeprefix("diagnosis_")
    diagnosis = json.loads(path.read_text(encoding="utf-8"))
    scores = _scores_on(task, folder)
    likely = " > ".join(" = ".join(tied) for tied in diagnosis["verdict"]["ranking"])
    row = [task, diagnosis["verdict"]["teacher"], diagnosis["verdict"]["rewards"], likely]
    if len(scores) < 2:
      rows.append([*row, md.NONE, md.NONE, md.NONE])
      continue
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    measured = ", ".join(
      f"{name} {md.percent(mean[name])} ({md.lowest_to_highest(scores[name])})"
      for name in agreement.by_score(mean)
    )
    both = agreement.compare(diagnosis["verdict"]["ranking"], mean)
    taus.append([0.0 if tau is None else tau for tau in both])
    rows.append([*row, measured, *(md.number(tau, ".2f") for tau in both)])
  if taus:
    means = [f"**{sum(column) / len(taus):.2f}**" for column in zip(*taus, strict=True)]
    rows.append([f"mean of {len(taus)}", "", "", "", "", *means])
  head = ["task", "teacher", "groups", "likely order", "held-out at the end (lowest to highest)"]
  return [DIAGNOSIS_LEGEND, md.table([*head, "tau", "tau of grpo first"], rows)]


def _scores_on(task: str, folder: pathlib.Path) -> dict[str, list[float]]:
  """Returns {method as a diagnosis calls it: the last score of each seed}."""
  scores: dict[str, list[float]] = {}
  for place, domain in ((folder, task), (folder.parent / task, "")):
    path = place / "curves.json"
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for run in ended_runs(entries):
      name = agreement.CALLED.get(run.arm)
      if name is not None and run.domain == domain:
        scores.setdefault(name, []).append(run.last(SPLITS[0]))
    if scores:
      break
  return scores
