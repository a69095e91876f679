"""Makes the tables of how much runs had generated, and of how soon they were good."""

from sdpo_jax import stats
from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.runs import TARGETS, Run

PACE_LEGEND = """\
Held-out questions, and how soon a run is good at them. "After a quarter" and "after half" hold
the mean over seeds (lowest to highest) at the last evaluation within that share of a run's steps.
The last columns state for each seed when a run is first as good as the last evaluation of another
run of that seed: the thousands of generated tokens, read off the straight line between two
evaluations, and in brackets the responses at the later of the two."""
RATIO_LEGEND = """\
How much an arm generates until it is as good as another's last evaluation on held-out questions,
over what the other itself had generated when it was first as good: median over seeds, with the sign
test's interval (five seeds: 93.75 %, from the lowest to the highest)."""


def pace(arms: dict[str, list[Run]], split: str) -> str:
  """Returns the table of what runs had generated, and of how soon they were good at a split."""
  targets = [arm for arm in TARGETS if arm in arms]
  rows = []
  for arm, members in arms.items():
    ends = [run.points[-1] for run in members]
    row = [f"`{arm}`"]
    for name in ("step", "train/generations", "train/sampled_tokens"):
      row.append(md.span([end[name] for end in ends]))
    for divisor in (4, 2):
      scores = [_score_within(run, divisor, split) for run in members]
      row.append(md.mean(scores))
    row += [_reached(members, arms[other], split) for other in targets]
    rows.append(row)
  head = ["arm", "steps", "responses", "generated tokens", "after a quarter", "after half"]
  return md.table(head + [f"as good as `{other}`'s last" for other in targets], rows)


def ratios(arms: dict[str, list[Run]], split: str) -> list[str]:
  """Returns the table of cost ratios with its legend; nothing where no arms can be compared."""
  rows = []
  for other in (arm for arm in TARGETS if arm in arms):
    for arm, members in arms.items():
      pairs = of_same_seeds(members, arms[other])
      if arm == other or len(pairs) < 5:  # fewer seeds give no interval
        continue
      row = [f"`{arm}`", f"`{other}`", str(len(pairs))]
      rows.append(row + [_ratio(pairs, cost, split) for cost in ("generations", "sampled_tokens")])
  if not rows:
    return []
  return [RATIO_LEGEND, md.table(["arm", "as good as", "seeds", "responses", "tokens"], rows)]


def of_same_seeds(members: list[Run], others: list[Run]) -> list[tuple[Run, Run]]:
  """Returns the runs of the seeds that both have, paired."""
  other_of = {run.seed: run for run in others}
  return [(run, other_of[run.seed]) for run in members if run.seed in other_of]


def _ratio(pairs: list[tuple[Run, Run]], cost: str, split: str) -> str:
  ratio = cost_ratio(pairs, cost, split)
  median = "unknown" if ratio.ratio is None else f"{ratio.ratio:.2f}"
  never = f", {ratio.censored_a} never" if ratio.censored_a else ""
  return f"{median} [{ratio.low:.2f}, {md.bound(ratio.high)}]{never}"


def cost_ratio(pairs: list[tuple[Run, Run]], cost: str, split: str) -> stats.CostRatio:
  """Returns what the first runs cost to be as good as the others' ends, over what those cost.

  cost: "generations" (responses) or "sampled_tokens".
  """

  def until(run: Run, target: float) -> float | None:
    points = run.evaluations(split)
    costs = [point.get(f"train/{cost}", 0) for point in points]
    return stats.cost_to_target(costs, [p[f"eval/{split}/avg@k"] for p in points], target)

  def end(run: Run) -> int:
    return run.evaluations(split)[-1][f"train/{cost}"]

  targets = [other.last(split) for _, other in pairs]
  return stats.cost_ratio(
    [until(run, target) for (run, _), target in zip(pairs, targets, strict=True)],
    [until(other, target) for (_, other), target in zip(pairs, targets, strict=True)],
    end_a_S=[end(run) for run, _ in pairs],
    end_b_S=[end(other) for _, other in pairs],
  )


def _score_within(run: Run, divisor: int, split: str) -> float:
  """Returns the score at the last evaluation within the first 1/divisor of the run's steps."""
  limit = run.points[-1]["step"] / divisor
  points = [point for point in run.evaluations(split) if point["step"] <= limit]
  return points[-1][f"eval/{split}/avg@k"]


def _reached(members: list[Run], others: list[Run], split: str) -> str:
  """Returns, for each seed of both, what was generated until as good as the other's last score."""
  targets = {run.seed: run.last(split) for run in others}
  cells = [_reach(run, targets[run.seed], split) for run in members if run.seed in targets]
  return ", ".join(cells) or md.NONE


def _reach(run: Run, target: float, split: str) -> str:
  name = f"eval/{split}/avg@k"
  points = run.evaluations(split)
  tokens = stats.cost_to_target(
    [point.get("train/sampled_tokens", 0) for point in points],  # the base model has generated none
    [point[name] for point in points],
    target,
  )
  if tokens is None:
    return "never"
  later = next(point for point in points if point[name] >= target)
  if later is points[0]:
    return "at once"
  return f"{tokens / 1000:.0f} ({later['train/generations']:,})"
