"""Makes the tables of what the last checkpoints of a grid can do, from its scores.json."""

import itertools

from sdpo_jax import final_scores, stats
from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.runs import SPLITS, TARGETS, read_run

FEW_ARMS = 6  # of which every pair is compared
MANY_ROWS = 40  # a longer table is folded
FINALS_LEGEND = """\
The last checkpoints (`--mode=eval --checkpoint=RUN --suites=FILE`, where FILE is SUITES of the
experiment) on the same questions, n samples a question at temperature 1, in per cent; the
column "seeds" has the lowest and the highest avg@n. Intervals of 95 % and p-values draw seeds and
questions both. Holm's correction is over the whole second table. Entropy is in nats a token."""


def finals(entries: dict) -> list[str]:
  """Returns the tables of the last checkpoints: each arm, and the differences between arms."""
  runs = []
  for name, entry in entries.items():
    run = read_run(name, entry)
    runs.append((run.arm, run.seed, entry["splits"]))
  evaluated = {split for _, _, splits_of_run in runs for split in splits_of_run}
  splits = [x for x in SPLITS if x in evaluated] + sorted(evaluated - set(SPLITS))
  rows, differences = [], []
  for split in splits:
    arms = final_scores.arms_of(runs, split)
    samples = int(min(arm.table("judged").min() for arm in arms.values()))
    rows += [_final_row(split, arm, samples) for arm in arms.values()]
    differences += [
      (split, f"`{a.name}` minus `{b.name}`", *compared)
      for a, b in _pairs(arms)
      for compared in _differences(a, b, samples)
    ]
  head = ["split", "arm", "avg@n", "seeds", "greedy", "pass@n", "entropy", "tokens", "cut off"]
  p_values = [row[-1].p_value for row in differences]
  corrected = stats.holm([1.0 if p is None else p for p in p_values])
  compared_rows = [
    [split, arms, what, *_difference_cells(difference), md.number(p, ".4f")]
    for (split, arms, what, difference), p in zip(differences, corrected, strict=True)
  ]
  if not compared_rows:  # many arms, and no baseline among them
    return [FINALS_LEGEND, md.table(head, rows)]
  head_of_compared = ["split", "arms", "of", "difference", "interval", "p", "p, Holm"]
  compared = md.table(head_of_compared, compared_rows)
  if len(compared_rows) > MANY_ROWS:
    compared = md.folded(f"All {len(compared_rows)} comparisons", compared)
  return [FINALS_LEGEND, md.table(head, rows), compared]


def _pairs(arms: dict[str, final_scores.Arm]) -> list[tuple]:
  """Returns the arms that are compared: all pairs of a few, else each with the baselines."""
  if len(arms) <= FEW_ARMS:
    return list(itertools.combinations(arms.values(), 2))
  baselines = [arms[name] for name in TARGETS if name in arms]
  pairs = [(arm, other) for other in baselines for arm in arms.values() if arm not in baselines]
  return pairs + list(itertools.combinations(baselines, 2))


def _final_row(split: str, arm: final_scores.Arm, samples: int) -> list[str]:
  """Returns the row of an arm on a split, of `samples` responses a question."""
  reward_QS = arm.table("reward")
  cells = [split, f"`{arm.name}`"]
  for score_QS in (reward_QS, arm.table("greedy"), arm.pass_at(samples)):
    mean, low, high = stats.mean_interval(score_QS)
    cells.append(md.score(mean, low, high))
  cells.insert(3, md.lowest_to_highest(list(reward_QS.mean(axis=0))))
  entropy = f"{arm.mean('entropy'):.3f}" if "entropy" in arm.entries[0] else md.NONE
  tokens = f"{arm.mean('length_mean'):.1f} (p99 {arm.mean('length_p99'):.0f})"
  return [*cells, entropy, tokens, f"{md.percent(arm.mean('cut_off'))} %"]


def _differences(a: final_scores.Arm, b: final_scores.Arm, samples: int):
  """Returns (what, difference of a and b) for the seeds that both have, if there are any."""
  both = sorted({*a.seeds} & {*b.seeds})
  if not both:
    return []
  a, b = a.of_seeds(both), b.of_seeds(both)
  return [
    (f"avg@{samples}", stats.paired_bootstrap(a.table("reward"), b.table("reward"))),
    (f"pass@{samples}", stats.paired_bootstrap(a.pass_at(samples), b.pass_at(samples))),
  ]


def _difference_cells(difference: stats.Difference) -> list[str]:
  points = md.percent(difference.difference, "+")
  interval = md.interval(difference.low, difference.high, "+")
  return [points, interval, md.number(difference.p_value, ".4f")]
