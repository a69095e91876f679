"""Makes the tables of test-time self-distillation from a session's discover.json."""

from sdpo_jax.summary import markdown as md

VERSUS = "against_best_of_k"  # ends the names of comparisons in discover.json


def discover(summary: dict) -> list[str]:
  """Returns the tables of a discover session's summary (discover/results.py)."""
  arms, questions = summary["arms"], summary["questions"]
  known = [row["pass@64"] for row in questions if row["pass@64"] is not None]
  difficulty = f" Their mean pass@64 is {sum(known) / len(known):.3f}." if known else ""
  return [
    f"discovery@k in per cent, over {len(questions)} questions.{difficulty} "
    f"Intervals are {100 * summary['level']:.0f} % bootstrap intervals over questions.",
    _discovery(arms),
    "Means per run, up to the first success or the end of the budget; seconds are of all runs.",
    _discovery_costs(arms),
    *(_against_best_of_k(arm, summary) for arm in arms if f"{arm}_{VERSUS}" in summary),
    md.folded("Runs solved by question", _discovery_questions(arms, questions)),
  ]


def _discovery(arms: dict) -> str:
  rows = []
  for k in next(iter(arms.values()))["discovery"]:
    intervals = [arm["discovery"][k] for arm in arms.values()]
    cells = [md.score(x["mean"], x["low"], x["high"]) for x in intervals]
    rows.append([k, *cells])
  return md.table(["k", *(f"`{arm}`" for arm in arms)], rows)


def _discovery_costs(arms: dict) -> str:
  rows = []
  for name, arm in arms.items():
    numbers = [arm[f"mean_{what}"] for what in ("attempts", "tokens", "teacher_tokens")]
    solved = f"{arm['solved']} of {arm['runs']}"
    rows.append([f"`{name}`", solved, *map(md.number, [*numbers, arm["time_s"]])])
  head = ["arm", "runs solved", "attempts", "tokens generated", "read by the teacher", "seconds"]
  return md.table(head, rows)


def _discovery_questions(arms: dict, questions: list[dict]) -> str:
  rows = []
  for question in questions:
    solved = [f"{question[arm]['solved']}/{question[arm]['runs']}" for arm in arms]
    rows.append([question["task_id"], md.number(question["pass@64"], ".3f"), *solved])
  return md.table(["question", "pass@64 of the base model", *(f"`{arm}`" for arm in arms)], rows)


def _against_best_of_k(arm: str, summary: dict) -> str:
  """Returns what an arm needs to reach best_of_k's discovery at the whole budget."""
  compared = summary[f"{arm}_{VERSUS}"]
  rows = []
  for title, key, baseline in (
    ("attempts", "attempts", compared["baseline_attempts"]),
    ("generated tokens", "tokens", compared["baseline_tokens"]),
    ("generated tokens and those that the teacher read", "tokens_with_teacher", None),
  ):
    cost = compared[key]
    bounds = f"[{md.number(cost['low'])}, {md.number(cost['high'])}]"
    rows.append([title, f"{md.number(cost['to_reach'])} {bounds}", md.number(baseline)])
  goal = f"best_of_k's discovery@{summary['budget']}"
  head = [f"to reach {goal}, {md.percent(compared['target'])} %", f"`{arm}`", "`best_of_k`"]
  difference = compared["difference_at_a_third"]
  points = md.percent(difference["difference"], "+")
  interval = md.interval(difference["low"], difference["high"], "+")
  return (
    f"{md.table(head, rows)}\n\n`{arm}`'s discovery@{compared['third']} minus {goal}: "
    f"{points} points {interval}, p = {md.number(difference['p_value'], '.4f')}."
  )
