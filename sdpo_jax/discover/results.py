"""Summarises the runs of discover.jsonl: discovery@k with intervals, costs, and a comparison.

discovery@k is P(first success within k attempts): the mean over questions of the share of their
seeds. By default (arXiv 2601.20802) a run that ended without a success, for whatever reason,
counts as not found at every k. best_of_k's is the unbiased pass@k of the n attempts that it made.

The Kaplan-Meier estimate stands beside it. It takes a run that ended early (its tokens were spent)
for censored: its failure is known only up to the attempts that it made. The two are equal where
every unsolved run made all attempts of the budget.

Means per run (attempts, tokens) end at the first success, best_of_k's too.

Intervals are 90 % bootstrap intervals over questions. A question takes its seeds with it, since
seeds are nested in questions.

"Attempts to reach" is the least k at which a learning arm's discovery@k is at least best_of_k's at
its whole budget. In each draw both are taken over the same resampled questions. It is 0 where the
baseline solved nothing, and None where the arm does not get there within the budget.

Tokens likewise: generated ones, up to and with the successful response. "With the teacher's" adds
all that the teacher read. Re-scoring is cheaper than generating, so that is the unfavourable count.
"""

import pathlib
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from sdpo_jax import stats

# pass@64 of the base model below which a question is called so (arXiv 2601.20802)
HARD, VERY_HARD = 0.5, 0.03
# class of questions -> pass@64 from, and below
CLASSES = {"hard": (VERY_HARD, HARD), "very hard": (0.0, VERY_HARD)}
DRAWS = 10_000
_CHUNKS = 20  # of the draws, so that fewer are held in memory at once
COSTS = ("attempts", "tokens", "tokens_with_teacher")
COLOURS = {
  "sdpo": "#0072b2",
  "counterfactual": "#cc79a7",
  "best_of_k": "#d55e00",
  "multi_turn": "#009e73",
}


def arms_of(lines: list[dict]) -> list[str]:
  """Returns the arms of these runs, in the order of their first runs."""
  return list(dict.fromkeys(line["arm"] for line in lines))


def runs_of(lines: list[dict], arm: str) -> list[dict]:
  """Returns the lines of one arm."""
  return [line for line in lines if line["arm"] == arm]


def by_question(runs: list[dict]) -> dict[str, list[dict]]:
  """Returns task id -> the runs on that question."""
  groups: dict[str, list[dict]] = {}
  for run in runs:
    groups.setdefault(run["task_id"], []).append(run)
  return groups


def discovery(arm: str, runs: list[dict], k: int) -> float:
  """Returns discovery@k of one question, from an arm's runs on it."""
  if arm != "best_of_k":
    return stats.discovery_at_k([run["first_success"] for run in runs], k)
  # A run whose tokens were spent has made fewer than k attempts.
  estimates = [
    stats.pass_at_k(run["attempts"], run["successes"], min(k, run["attempts"])) for run in runs
  ]
  return float(np.mean(estimates))


def summarise(
  lines: list[dict], budget: int, *, difficulty: dict[str, float] | None = None, level: float = 0.9
) -> dict[str, Any]:
  """Returns what discover.json holds: a summary of each arm and question, and the comparisons.

  lines: of discover.jsonl. budget: attempts. difficulty: task id -> the base model's pass@64, where
  it was measured. level: of the intervals.
  """
  difficulty = difficulty or {}
  arms = arms_of(lines)
  summary: dict[str, Any] = {"budget": budget, "level": level, "arms": {}, "questions": []}
  for arm in arms:
    summary["arms"][arm] = _arm_summary(arm, runs_of(lines, arm), budget, difficulty, level)
  for task_id in dict.fromkeys(line["task_id"] for line in lines):
    row = {"task_id": task_id, "pass@64": difficulty.get(task_id)}
    for arm in arms:
      row[arm] = _solved_counts([run for run in runs_of(lines, arm) if run["task_id"] == task_id])
    summary["questions"].append(row)
  for arm in ("sdpo", "counterfactual"):
    if {arm, "best_of_k"} <= set(arms):
      summary[f"{arm}_against_best_of_k"] = compare(lines, budget, arm=arm, level=level)
  return summary


def _arm_summary(
  arm: str, runs: list[dict], budget: int, difficulty: dict[str, float], level: float
) -> dict[str, Any]:
  ks = _powers_of_two(budget)
  groups = by_question(runs)
  first_successes = [run["first_success"] for run in runs]
  attempts = [run["attempts"] for run in runs]
  unsolved = [run for run in runs if run["first_success"] is None]
  by_difficulty = {}
  for name, (least, below) in CLASSES.items():
    members = [
      group for q, group in groups.items() if q in difficulty and least <= difficulty[q] < below
    ]
    if members:
      by_difficulty[name] = {"questions": len(members)} | _curve(arm, members, ks, level)
  env_failed = None  # not recorded
  if all("env_failed" in run for run in runs):
    env_failed = sum(run["env_failed"] for run in runs)
  return {
    "discovery": _curve(arm, list(groups.values()), ks, level),
    "discovery_by_difficulty": by_difficulty,
    "discovery_kaplan_meier": {
      str(k): stats.kaplan_meier(first_successes, attempts, k) for k in ks
    },
    "questions": len(groups),
    "runs": len(runs),
    "solved": len(runs) - len(unsolved),
    # unsolved when its tokens were spent
    "ended_early": sum(run["attempts"] < budget for run in unsolved),
    "mean_attempts": _mean([run["first_success"] or run["attempts"] for run in runs]),
    "mean_tokens": _mean([run["first_success_tokens"] or run["tokens"] for run in runs]),
    "mean_teacher_tokens": _mean([run["teacher_tokens"] for run in runs]),
    "env_failed": env_failed,
    "time_s": float(np.sum([run["time_s"] for run in runs])),
  }


def _powers_of_two(budget: int) -> list[int]:
  """Returns the powers of two up to the budget, and the budget itself."""
  powers = {2**i for i in range(budget.bit_length())}
  return sorted({k for k in powers if k <= budget} | {budget})


def _curve(arm: str, groups: list[list[dict]], ks: list[int], level: float) -> dict[str, dict]:
  """Returns k -> discovery@k with its interval over the questions, one group of runs each."""
  curve = {}
  for k in ks:
    discovery_Q = [discovery(arm, runs, k) for runs in groups]
    curve[str(k)] = stats.mean_interval(discovery_Q, level=level)._asdict()
  return curve


def _mean(values: list) -> float:
  return float(np.mean(values))


def _solved_counts(runs: list[dict]) -> dict[str, Any]:
  first_successes = [run["first_success"] for run in runs]
  return {
    "solved": sum(first is not None for first in first_successes),
    "runs": len(runs),
    "first_success": first_successes,
  }


def compare(
  lines: list[dict],
  budget: int,
  *,
  arm: str = "sdpo",
  level: float,
  draws: int = DRAWS,
  seed: int = 0,
) -> dict[str, Any]:
  """Compares a learning arm with best_of_k over the questions that both attempted.

  Returns what the arm needs to reach best_of_k's discovery@budget, in each of COSTS, and how much
  more or less it discovers in a third of the budget.
  """
  learned = by_question(runs_of(lines, arm))
  sampled = by_question(runs_of(lines, "best_of_k"))
  questions = [q for q in learned if q in sampled]
  target_Q = np.array([discovery("best_of_k", sampled[q], budget) for q in questions])
  rng = np.random.default_rng(seed)
  chosen_XQ = rng.integers(len(questions), size=(draws, len(questions)))
  comparison: dict[str, Any] = {"target": float(target_Q.mean()), "questions": len(questions)}
  for name in COSTS:
    cost_QG = [[success_cost(run, name) for run in learned[q]] for q in questions]
    comparison[name] = cost_to_reach(cost_QG, target_Q, chosen_XQ, level)
  baseline_runs = [run for q in questions for run in sampled[q]]
  comparison["baseline_attempts"] = budget
  comparison["baseline_tokens"] = _mean([run["tokens"] for run in baseline_runs])
  third = budget // 3
  difference = stats.paired_bootstrap(
    _share_solved([learned[q] for q in questions], third),
    _share_solved([sampled[q] for q in questions], budget),
    level=level,
  )
  comparison["third"] = third
  comparison["difference_at_a_third"] = difference._asdict()
  return comparison


def success_cost(run: dict, name: str) -> int | None:
  """Returns what a run's first success cost, in one of COSTS; None where there is none."""
  if run["first_success"] is None:
    return None
  if name == "attempts":
    return run["first_success"]
  if name == "tokens":
    return run["first_success_tokens"]
  return run["first_success_tokens"] + run["teacher_tokens"]


def cost_to_reach(
  cost_QG: list[list], target_Q: np.ndarray, chosen_XQ: np.ndarray, level: float
) -> dict[str, float | None]:
  """Returns the least cost at which an arm reaches the target's mean, with an interval.

  cost_QG: of each run's first success, or None; questions may differ in their runs. chosen_XQ:
  resampled questions, one draw a row. None in the result: it is not reached.
  """
  costs = sorted({cost for cost_G in cost_QG for cost in cost_G if cost is not None})
  # share of a question's runs whose success cost at most costs[k]
  share_QK = np.array([stats.discovery_at_k(cost_G, costs) for cost_G in cost_QG])
  every_question_1Q = np.arange(len(target_Q))[None]
  (to_reach,) = least_cost(costs, share_QK, target_Q, every_question_1Q)
  drawn = [
    least_cost(costs, share_QK, target_Q, part_XQ) for part_XQ in np.array_split(chosen_XQ, _CHUNKS)
  ]
  low, high = np.quantile(
    np.concatenate(drawn),
    [(1 - level) / 2, (1 + level) / 2],
    # Costs may be infinite: a quantile must be one of them, not something in between.
    method="inverted_cdf",
  )
  return {
    "to_reach": _none_if_infinite(to_reach),
    "low": _none_if_infinite(low),
    "high": _none_if_infinite(high),
  }


def least_cost(
  costs: list, share_QK: np.ndarray, target_Q: np.ndarray, chosen_XQ: np.ndarray
) -> np.ndarray:
  """Returns per draw the least cost at which the mean share reaches the target's mean.

  It is infinite where no cost does, and 0 where the target is 0.
  """
  target_X = target_Q[chosen_XQ].mean(1)
  short_XK = share_QK[chosen_XQ].mean(1) < target_X[:, None] - 1e-12
  cost_X = np.where(short_XK, np.inf, costs).min(1, initial=np.inf)
  return np.where(target_X <= 0, 0.0, cost_X)


def _none_if_infinite(x) -> float | None:
  return None if np.isinf(x) else float(x)


def _share_solved(groups: list[list[dict]], k: int) -> np.ndarray:
  """Returns per question the share of its runs that succeeded within k attempts."""
  return np.array(
    [stats.discovery_at_k([run["first_success"] for run in runs], k) for runs in groups]
  )


def summary_lines(summary: dict[str, Any]) -> list[str]:
  """Returns what is printed of a summary.

  First come each arm's costs and its discovery@k, then a table of the questions, then what each
  learning arm needs to reach best_of_k.
  """
  lines = []
  for arm, result in summary["arms"].items():
    lines += _arm_lines(arm, result, str(summary["budget"]))
  lines += _question_table(summary)
  for arm in summary["arms"]:
    comparison = summary.get(f"{arm}_against_best_of_k")
    if comparison is not None:
      lines += _comparison_lines(arm, comparison, summary["budget"])
  return lines


def _arm_lines(arm: str, result: dict[str, Any], budget: str) -> list[str]:
  costs = (
    f"{arm}: {result['solved']} of {result['runs']} runs solved; up to the first success or the "
    f"budget's end, on average {result['mean_attempts']:.0f} attempts, "
    f"{result['mean_tokens']:.0f} tokens generated, {result['mean_teacher_tokens']:.0f} read by "
    f"the teacher; {result['time_s']:.0f} s in all"
  )
  if result["env_failed"]:
    costs += f"; {result['env_failed']} attempts could not be judged and do not count"
  lines = [costs]
  for k, value in result["discovery"].items():
    lines.append(f"  discovery@{k}: {_percent(value)}")
  for name, curve in result["discovery_by_difficulty"].items():
    lines.append(
      f"  discovery@{budget}, {name}: {_percent(curve[budget])}, {curve['questions']} questions"
    )
  if result["ended_early"]:
    lines.append(
      f"  {result['ended_early']} unsolved runs ended before attempt {budget} and count as not "
      f"found; taken for censored (Kaplan-Meier), discovery@{budget} is "
      f"{result['discovery_kaplan_meier'][budget]:.1%}"
    )
  return lines


def _percent(value: dict) -> str:
  return f"{value['mean']:.1%}{_span(value, '.1%')}"


def _span(interval: dict, form: str) -> str:
  """Returns " [low, high]", or nothing where there is no interval."""
  if interval["low"] is None:
    return ""
  return f" [{interval['low']:{form}}, {interval['high']:{form}}]"


def _question_table(summary: dict[str, Any]) -> list[str]:
  title = "runs solved by question"
  width = max(len(title), *(len(row["task_id"]) for row in summary["questions"]))
  header = f"{title:{width}}  base pass@64"
  for arm in summary["arms"]:
    header += f"  {arm:>10}"
  lines = [header]
  for row in summary["questions"]:
    pass_at_64 = "-" if row["pass@64"] is None else f"{row['pass@64']:.3f}"
    line = f"{row['task_id']:{width}}  {pass_at_64:>12}"
    for arm in summary["arms"]:
      solved = f"{row[arm]['solved']}/{row[arm]['runs']}"
      line += f"  {solved:>10}"
    lines.append(line)
  return lines


def _comparison_lines(arm: str, comparison: dict[str, Any], budget: int) -> list[str]:
  if comparison["target"] <= 0:
    reach = f"best_of_k found nothing with {budget} attempts: there is nothing to reach"
  else:
    attempts, tokens, tokens_with_teacher = (_cost(comparison[name]) for name in COSTS)
    reach = (
      f"{arm} reaches best_of_k's discovery@{budget} of {comparison['target']:.1%} with "
      f"{attempts} attempts, {tokens} generated tokens "
      f"(best_of_k: {comparison['baseline_tokens']:.0f}), {tokens_with_teacher} with those that "
      "the teacher read"
    )
  difference = comparison["difference_at_a_third"]
  return [
    reach,
    f"{arm}'s discovery@{comparison['third']} minus best_of_k's discovery@{budget}: "
    f"{difference['difference']:+.1%}{_span(difference, '+.1%')}",
  ]


def _cost(interval: dict) -> str:
  to_reach, low, high = (
    "not reached" if x is None else f"{x:.0f}"
    for x in (interval["to_reach"], interval["low"], interval["high"])
  )
  return f"{to_reach} [{low}, {high}]"


def plot(lines: list[dict], budget: int, path: pathlib.Path, *, level: float = 0.9) -> None:
  """Plots discovery@k over attempts, with bands over questions, and runs solved over tokens."""
  figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
  attempts_axes, tokens_axes = figure.subplots(1, 2)
  for arm in arms_of(lines):
    groups = by_question(runs_of(lines, arm))
    _plot_discovery(attempts_axes, arm, list(groups.values()), budget, level)
    _plot_tokens(tokens_axes, arm, runs_of(lines, arm))
  attempts_axes.set(
    xscale="log",
    xlabel="attempts k",
    ylabel="discovery@k",
    title=f"bands: {level:.0%} over questions",
    ylim=(0, None),
  )
  tokens_axes.set(xlabel="generated tokens", ylabel="runs solved", ylim=(0, None))
  attempts_axes.legend()
  figure.savefig(path, format="png")


def _plot_discovery(axes, arm: str, groups: list[list[dict]], budget: int, level: float) -> None:
  ks = sorted({int(k) for k in np.geomspace(1, budget, 40).round()})
  points = []
  for k in ks:
    discovery_Q = [discovery(arm, runs, k) for runs in groups]
    points.append(stats.mean_interval(discovery_Q, level=level))
  marker = "o" if len(ks) == 1 else None  # a line of one point shows nothing
  axes.plot(ks, [point.mean for point in points], color=COLOURS[arm], label=arm, marker=marker)
  if points[0].low is not None:  # None: one question gives no interval
    lows = [point.low for point in points]
    highs = [point.high for point in points]
    axes.fill_between(ks, lows, highs, color=COLOURS[arm], alpha=0.2, linewidth=0)


def _plot_tokens(axes, arm: str, runs: list[dict]) -> None:
  costs = sorted(run["first_success_tokens"] for run in runs if run["first_success"] is not None)
  # Nothing more was solved up to the most tokens that a run has generated.
  most = max(run["tokens"] for run in runs)
  solved = np.append(np.arange(len(costs) + 1), len(costs)) / len(runs)
  axes.step([0, *costs, most], solved, where="post", color=COLOURS[arm], label=arm)
