"""What the runs of discover.jsonl say: discovery@k with intervals, what it cost, and how few attempts reach the baseline.

discovery@k = P(first success within k attempts): mean over questions of the share of their seeds. Default convention (arXiv 2601.20802): a run
that ended without a success, for whatever reason, counts as not found at every k. Beside it stands the Kaplan-Meier estimate, which takes
a run that ended early (its tokens were spent) for censored: its failure is known only up to the attempts that it made. Where every unsolved
run made all attempts of the budget, the two are equal. Means per run (attempts, tokens) end at the first success, best_of_k's too. best_of_k's discovery@k is the unbiased pass@k of the n attempts that it made.

Intervals are 90 % bootstrap intervals over questions; a question takes its seeds with it, since seeds are nested in questions.
"Attempts to reach": the least k at which a learning arm's discovery@k is at least best_of_k's at its whole budget; in each draw both are taken over the same
resampled questions. 0 where the baseline found nothing; None where the arm does not get there within the budget. Tokens likewise: generated
ones, up to and with the successful response; with the teacher's, those that it read are added (re-scoring is cheaper than generating, so that is
the unfavourable count).
"""

import pathlib
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from sdpo_jax import stats

# pass@64 of the base model below which a question is called so (arXiv 2601.20802)
HARD, VERY_HARD = 0.5, 0.03


DRAWS = 10_000


COLOURS = {
  "sdpo": "#0072b2",
  "counterfactual": "#cc79a7",
  "best_of_k": "#d55e00",
  "multi_turn": "#009e73",
}


def by_question(lines: list[dict]) -> dict[str, list[dict]]:
  found: dict[str, list[dict]] = {}
  for line in lines:
    found.setdefault(line["task_id"], []).append(line)
  return found


def discovery(arm: str, runs: list[dict], k: int) -> float:
  """discovery@k of one question."""
  if arm == "best_of_k":
    return float(
      np.mean([stats.pass_at_k(r["attempts"], r["successes"], min(k, r["attempts"])) for r in runs])
    )
  return stats.discovery_at_k([r["first_success"] for r in runs], k)


def summarise(
  lines: list[dict], budget: int, *, difficulty: dict[str, float] | None = None, level: float = 0.9
) -> dict[str, Any]:
  """difficulty: the base model's pass@64 by question, where it was measured."""
  difficulty = difficulty or {}
  ks = sorted({2**i for i in range(budget.bit_length()) if 2**i <= budget} | {budget})
  arms = list(dict.fromkeys(line["arm"] for line in lines))
  summary: dict[str, Any] = {"budget": budget, "level": level, "arms": {}, "questions": []}
  for arm in arms:
    mine = [line for line in lines if line["arm"] == arm]
    groups = by_question(mine)
    curve = lambda groups: {
      str(k): stats.mean_interval(
        [discovery(arm, runs, k) for runs in groups], level=level
      )._asdict()
      for k in ks
    }
    classes = {
      name: [runs for q, runs in groups.items() if q in difficulty and low <= difficulty[q] < high]
      for name, low, high in (("hard", VERY_HARD, HARD), ("very hard", 0.0, VERY_HARD))
    }
    summary["arms"][arm] = {
      "discovery": curve(list(groups.values())),
      "discovery_by_difficulty": {
        name: {"questions": len(members)} | curve(members)
        for name, members in classes.items()
        if members
      },
      "discovery_kaplan_meier": {
        str(k): stats.kaplan_meier(
          [r["first_success"] for r in mine], [r["attempts"] for r in mine], k
        )
        for k in ks
      },
      "questions": len(groups),
      "runs": len(mine),
      "solved": sum(r["first_success"] is not None for r in mine),
      # unsolved when its tokens were spent
      "ended_early": sum(r["first_success"] is None and r["attempts"] < budget for r in mine),
      "mean_attempts": float(np.mean([r["first_success"] or r["attempts"] for r in mine])),
      "mean_tokens": float(np.mean([r["first_success_tokens"] or r["tokens"] for r in mine])),
      "mean_teacher_tokens": float(np.mean([r["teacher_tokens"] for r in mine])),
      # None: not recorded
      "env_failed": sum(r["env_failed"] for r in mine)
      if all("env_failed" in r for r in mine)
      else None,
      "time_s": float(np.sum([r["time_s"] for r in mine])),
    }
  for question in dict.fromkeys(line["task_id"] for line in lines):
    row: dict[str, Any] = {"task_id": question, "pass@64": difficulty.get(question)}
    for arm in arms:
      runs = [line for line in lines if line["arm"] == arm and line["task_id"] == question]
      row[arm] = {
        "solved": sum(r["first_success"] is not None for r in runs),
        "runs": len(runs),
        "first_success": [r["first_success"] for r in runs],
      }
    summary["questions"].append(row)
  for arm in ("sdpo", "counterfactual"):
    if {arm, "best_of_k"} <= set(arms):
      summary[f"{arm}_against_best_of_k"] = compare(lines, budget, arm=arm, level=level)
  return summary


def compare(
  lines: list[dict],
  budget: int,
  *,
  arm: str = "sdpo",
  level: float,
  draws: int = DRAWS,
  seed: int = 0,
) -> dict[str, Any]:
  """How little a learning arm needs to reach what best_of_k finds with its whole budget; and what it finds in a third of it."""
  learned, sampled = (
    by_question([line for line in lines if line["arm"] == arm]) for arm in (arm, "best_of_k")
  )
  questions = [q for q in learned if q in sampled]
  target_Q = np.array([discovery("best_of_k", sampled[q], budget) for q in questions])
  curves = {}
  for name, cost in (
    ("attempts", lambda r: r["first_success"]),
    ("tokens", lambda r: r["first_success_tokens"]),
    (
      "tokens_with_teacher",
      lambda r: (
        None if r["first_success"] is None else r["first_success_tokens"] + r["teacher_tokens"]
      ),
    ),
  ):
    costs = sorted({cost(r) for q in questions for r in learned[q] if cost(r) is not None})
    curves[name] = (
      costs,
      np.array(
        [[stats.discovery_at_k([cost(r) for r in learned[q]], k) for k in costs] for q in questions]
      ).reshape(len(questions), len(costs)),
    )

  def reach(costs, share_QK, chosen_XQ):
    """Least cost per draw at which the mean share reaches the target's mean; inf where none does."""
    reached_XK = share_QK[chosen_XQ].mean(1) >= target_Q[chosen_XQ].mean(1)[:, None] - 1e-12
    first_X = (
      np.where(
        reached_XK.any(1),
        np.append(costs, np.inf)[np.where(reached_XK.any(1), reached_XK.argmax(1), len(costs))],
        np.inf,
      )
      if len(costs)
      else np.full(len(chosen_XQ), np.inf)
    )
    return np.where(target_Q[chosen_XQ].mean(1) <= 0, 0.0, first_X)

  rng = np.random.default_rng(seed)
  chosen_XQ = rng.integers(len(questions), size=(draws, len(questions)))
  finite = lambda x: None if np.isinf(x) else float(x)
  said: dict[str, Any] = {"target": float(target_Q.mean()), "questions": len(questions)}
  for name, (costs, share_QK) in curves.items():
    (point,) = reach(costs, share_QK, np.arange(len(questions))[None])
    low, high = np.quantile(
      np.concatenate([reach(costs, share_QK, part) for part in np.array_split(chosen_XQ, 20)]),
      [(1 - level) / 2, (1 + level) / 2],
      method="inverted_cdf",
    )
    said[name] = {"to_reach": finite(point), "low": finite(low), "high": finite(high)}
  said["baseline_attempts"], said["baseline_tokens"] = (
    budget,
    float(np.mean([r["tokens"] for q in questions for r in sampled[q]])),
  )
  third = budget // 3
  shares = [
    np.array(
      [
        [float(r["first_success"] is not None and r["first_success"] <= k) for r in group[q]]
        for q in questions
      ]
    ).mean(1)
    for group, k in ((learned, third), (sampled, budget))
  ]
  said["third"] = third
  said["difference_at_a_third"] = stats.paired_bootstrap(*shares, level=level)._asdict()
  return said


def summary_lines(summary: dict[str, Any]) -> list[str]:
  """discovery@k with intervals, one line an arm and k; a table of the questions; and the headline."""
  span = lambda x, form: f" [{x['low']:{form}}, {x['high']:{form}}]" if x["low"] is not None else ""
  lines, most = [], str(summary["budget"])
  for arm, result in summary["arms"].items():
    lines.append(
      f"{arm}: {result['solved']} of {result['runs']} runs solved; up to the first success or the budget's end, on average {result['mean_attempts']:.0f} attempts, "
      f"{result['mean_tokens']:.0f} tokens generated, {result['mean_teacher_tokens']:.0f} read by the teacher; {result['time_s']:.0f} s in all"
      + (
        f"; {result['env_failed']} attempts could not be judged and do not count"
        if result["env_failed"]
        else ""
      )
    )
    lines += [
      f"  discovery@{k}: {x['mean']:.1%}{span(x, '.1%')}" for k, x in result["discovery"].items()
    ]
    lines += [
      f"  discovery@{most}, {name}: {x[most]['mean']:.1%}{span(x[most], '.1%')}, {x['questions']} questions"
      for name, x in result["discovery_by_difficulty"].items()
    ]
    if result["ended_early"]:
      lines.append(
        f"  {result['ended_early']} unsolved runs ended before attempt {most} and count as not found; taken for censored (Kaplan-Meier), "
        f"discovery@{most} is {result['discovery_kaplan_meier'][most]:.1%}"
      )
  title = "runs solved by question"
  widest = max(len(title), *(len(row["task_id"]) for row in summary["questions"]))
  lines.append(
    f"{title:{widest}}  base pass@64" + "".join(f"  {arm:>10}" for arm in summary["arms"])
  )
  for row in summary["questions"]:
    known = "-" if row["pass@64"] is None else f"{row['pass@64']:.3f}"
    lines.append(
      f"{row['task_id']:{widest}}  {known:>12}"
      + "".join(
        f"  {str(row[arm]['solved']) + '/' + str(row[arm]['runs']):>10}" for arm in summary["arms"]
      )
    )
  whole = lambda x: "not reached" if x is None else f"{x:.0f}"
  for arm in summary["arms"]:
    said, budget = summary.get(f"{arm}_against_best_of_k"), summary["budget"]
    if said is None:
      continue
    show = lambda name: (
      f"{whole(said[name]['to_reach'])} [{whole(said[name]['low'])}, {whole(said[name]['high'])}]"
    )
    difference = said["difference_at_a_third"]
    lines.append(
      f"best_of_k found nothing with {budget} attempts: there is nothing to reach"
      if said["target"] <= 0
      else f"{arm} reaches best_of_k's discovery@{budget} of {said['target']:.1%} with {show('attempts')} attempts, {show('tokens')} generated tokens "
      f"(best_of_k: {said['baseline_tokens']:.0f}), {show('tokens_with_teacher')} with those that the teacher read"
    )
    lines.append(
      f"{arm}'s discovery@{said['third']} minus best_of_k's discovery@{budget}: {difference['difference']:+.1%}{span(difference, '+.1%')}"
    )
  return lines


def plot(lines: list[dict], budget: int, path: pathlib.Path, *, level: float = 0.9) -> None:
  """discovery@k against attempts, with bands over questions; and against generated tokens."""
  figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
  attempts, tokens = figure.subplots(1, 2)
  ks = sorted({int(k) for k in np.geomspace(1, budget, 40).round()})
  for arm in dict.fromkeys(line["arm"] for line in lines):
    groups, colour = by_question([line for line in lines if line["arm"] == arm]), COLOURS[arm]
    points = [
      stats.mean_interval([discovery(arm, runs, k) for runs in groups.values()], level=level)
      for k in ks
    ]
    attempts.plot(ks, [p.mean for p in points], color=colour, label=arm)
    if points[0].low is not None:
      attempts.fill_between(
        ks, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.2, linewidth=0
      )
    costs = sorted(
      r["first_success_tokens"]
      for runs in groups.values()
      for r in runs
      if r["first_success"] is not None
    )
    runs = sum(map(len, groups.values()))
    # nothing more was found up to there
    most = max(r["tokens"] for runs_of in groups.values() for r in runs_of)
    tokens.step(
      [0, *costs, most],
      np.append(np.arange(len(costs) + 1), len(costs)) / runs,
      where="post",
      color=colour,
      label=arm,
    )
  attempts.set(
    xscale="log",
    xlabel="attempts k",
    ylabel="discovery@k",
    title=f"bands: {level:.0%} over questions",
    ylim=(0, None),
  )
  tokens.set(xlabel="generated tokens", ylabel="runs solved", ylim=(0, None))
  attempts.legend()
  figure.savefig(path, format="png")
