"""Makes the matrix of what runs that were taught in stages know after each of them."""

import re

from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.runs import Run

FORGETTING_LEGEND = """\
Novel words are taught group after group, in stages of equal length. Each row is what the policy
knows of every group at the end of a stage, in per cent, means over seeds (lowest to highest).
"Forgotten" is the share that the groups taught before have lost by then of their best evaluations.
"""


def forgetting(arms: dict[str, list[Run]]) -> list[str]:
  """Returns the matrix of what is known after each stage, where runs were taught in stages."""
  stages = sorted({int(n) for run in sum(arms.values(), []) for n in _stages(run.points[-1])})
  keys = [f"eval/stage_{n}/avg@k" for n in stages]
  rows = []
  for arm, members in arms.items():
    for stage in range(1, len(keys) + 1):
      ends = [(run, _end_of_stage(run, stage, keys)) for run in members]
      ends = [(run, end) for run, end in ends if end is not None]
      if not ends:
        continue
      row = [f"`{arm}`", str(stage)]
      for key in keys:
        scores = [end[key] for _, end in ends]
        row.append(md.mean(scores))
      lost = [_forgotten(run, end, keys[: stage - 1]) for run, end in ends]
      row.append(md.mean(lost) if stage > 1 else md.NONE)
      rows.append(row)
  if not rows:
    return []
  head = ["arm", "after stage", *(f"words of stage {n}" for n in stages), "forgotten"]
  return [FORGETTING_LEGEND, md.table(head, rows)]


def _stages(point: dict) -> list[str]:
  """Returns the numbers of the stages whose words an evaluation asked for."""
  return [x[1] for x in map(re.compile(r"eval/stage_(\d+)/avg@k").fullmatch, point) if x]


def _end_of_stage(run: Run, stage: int, keys: list[str]) -> dict | None:
  """Returns a run's evaluation at the end of a stage, on all stages; None if there is none."""
  step = run.points[-1]["step"] * stage / len(keys)
  ends = [point for point in run.points if point["step"] == step and point.keys() >= set(keys)]
  return ends[0] if ends else None


def forgotten_at_end(run: Run) -> float:
  """Returns the share that a run has lost at its end of what all stages but the last taught."""
  keys = [f"eval/stage_{n}/avg@k" for n in sorted(map(int, _stages(run.points[-1])))]
  return _forgotten(run, run.points[-1], keys[:-1])


def _forgotten(run: Run, end: dict, keys: list[str]) -> float:
  """Returns the share that these scores have lost of their best until this evaluation."""
  before = [point for point in run.points if point["step"] <= end["step"]]
  best = {key: max(point.get(key, 0.0) for point in before) for key in keys}
  reached = sum(best.values())
  return sum(best[key] - end[key] for key in keys) / reached if reached else 0.0
