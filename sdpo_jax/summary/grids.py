"""Makes the tables of a grid from its curves.json and tuning.json."""

from collections import Counter
import shlex

from sdpo_jax import stats
from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.acting import acting
from sdpo_jax.summary.collapse import collapse
from sdpo_jax.summary.forgetting import forgetting
from sdpo_jax.summary.pace import PACE_LEGEND, pace, ratios
from sdpo_jax.summary.runs import Run, by_arm, ended_runs, splits_of

# The arms that others are compared with, where an experiment has them
BASELINES = ("sdpo", "sdpo_extra")
CURVES_LEGEND = """\
Each score is a run's last evaluation, in per cent; its base model is evaluated at step 0. Intervals
are 95 % bootstrap intervals over seeds. Differences are in points, between runs of the same seed:
mean, interval, and each seed's."""


def curves(entries: dict) -> list[str]:
  """Returns the tables of a grid, for each domain apart."""
  runs = ended_runs(entries)
  if not runs:
    return ["No run has ended yet."]
  times = [run.points[-1]["time_s"] for run in runs]
  parts = [
    f"Recorded: {len(runs)} runs, {sum(times) / 3600:.1f} hours in all, "
    f"{min(times):,.0f} to {max(times):,.0f} s a run, evaluations included{_commits(entries)}."
  ]
  for source, count in sorted(Counter(x["from"] for x in entries.values() if "from" in x).items()):
    parts.append(f"{count} of them are runs of `{source}`, begun from the same arguments.")
  for domain in sorted({run.domain for run in runs}):
    members = [run for run in runs if run.domain == domain]
    splits = splits_of(members)
    arms = by_arm(members)
    if domain:
      parts.append(f"### {domain}")
    parts += [_tuned(arms), CURVES_LEGEND, _scores(arms, splits), *forgetting(arms), *acting(arms)]
    parts += [PACE_LEGEND, pace(arms, splits[0])]
    parts += ratios(arms, splits[0])
    parts += collapse(arms)
    parts.append(
      md.folded(
        "Every run, with 95 % intervals over questions, and what repeats it", _runs(arms, splits)
      )
    )
  return parts


def _commits(entries: dict) -> str:
  """Returns by which code the runs were made, as far as curves.json says it."""
  named = [entry["commit"][:7] for entry in entries.values() if entry.get("commit")]
  if not named:
    return ""
  some = "" if len(named) == len(entries) else f" ({len(named)} of them, the rest by earlier code)"
  return f", by the code of {', '.join(sorted(set(named)))}{some}"


def tuning_words(tuning: dict | None) -> str:
  """Returns how an arm was tuned, from an entry of curves.json."""
  if tuning is None:
    return "not tuned"
  return f"tuned: {tuning['trials']} trials on the tune split, chosen {tuning['chosen']}"


def _tuned(arms: dict[str, list[Run]]) -> str:
  """Returns a line for each way in which arms were tuned, with these arms."""
  lines = {}
  for arm, members in arms.items():
    for words in sorted({tuning_words(run.tuning) for run in members}):
      lines.setdefault(words, []).append(f"`{arm}`")
  return "\n".join(f"- {', '.join(names)}: {words}." for words, names in lines.items())


def trials(record: dict) -> str:
  """Returns the table of all trials in tuning.json."""
  rows = []
  for arm, entry in record["arms"].items():
    for name, trial in entry["trials"].items():
      seeds = ", ".join(map(str, trial["seeds"]))
      score = md.score(trial["mean"], trial["low"], trial["high"])
      mark = "chosen" if name == entry["chosen"] else ""
      rows.append([f"`{arm}`", f"`{name}`", seeds, score, mark])
  title = f"Every trial, by {record['metric']} in per cent; the choice is {record['rule']}"
  return md.folded(title, md.table(["arm", "trial", "seeds", "mean, interval", ""], rows))


def _scores(arms: dict[str, list[Run]], splits: list[str]) -> str:
  """Returns the table of last evaluations, with differences to the baselines."""
  baselines = [arm for arm in BASELINES if arm in arms]
  rows = []
  for split in splits:
    rows.append(_base_row(arms, split) + [""] * len(baselines))
    for arm, members in arms.items():
      scores = [run.last(split) for run in members]
      mean, low, high = stats.mean_interval(scores)
      row = [
        split,
        f"`{arm}`",
        str(len(members)),
        md.percent(mean),
        md.interval(low, high),
      ]
      row.append(md.lowest_to_highest(scores))
      rows.append(row + [_difference(members, arms[other], split) for other in baselines])
  head = ["split", "arm", "seeds", "mean", "interval", "lowest to highest"]
  return md.table(head + [f"minus `{other}`" for other in baselines], rows)


def _base_row(arms: dict[str, list[Run]], split: str) -> list[str]:
  scores = [run.first(split) for members in arms.values() for run in members]
  span = md.lowest_to_highest(scores) if min(scores) < max(scores) else ""
  return [split, "base model", "", md.percent(sum(scores) / len(scores)), "", span]


def _difference(members: list[Run], others: list[Run], split: str) -> str:
  """Returns members minus others over the seeds of both: mean, interval, and each seed's."""
  own = {run.seed: run.last(split) for run in members}
  other = {run.seed: run.last(split) for run in others}
  seeds = sorted(own.keys() & other.keys())
  if members is others or not seeds:
    return md.NONE
  difference, low, high, _ = stats.paired_bootstrap(
    [own[seed] for seed in seeds], [other[seed] for seed in seeds]
  )
  each = ", ".join(md.percent(own[seed] - other[seed], "+") for seed in seeds)
  return f"{md.score(difference, low, high, '+')} ({each})"


def _runs(arms: dict[str, list[Run]], splits: list[str]) -> str:
  """Returns the table of every run, with what repeats it."""
  rows = []
  for arm, members in arms.items():
    for run in members:
      end = run.points[-1]
      generated = [f"{end['train/generations']:,}", f"{end['train/sampled_tokens']:,}"]
      scores = [_run_score(run, split) for split in splits]
      seconds, command = f"{end['time_s']:,.0f}", f"`{shlex.join(run.arguments)}`"
      rows.append([f"`{arm}`", str(run.seed), *scores, *generated, seconds, command])
  head = ["arm", "seed", *splits, "responses", "generated tokens", "seconds"]
  return md.table([*head, "arguments of `python -m sdpo_jax.main`"], rows)


def _run_score(run: Run, split: str) -> str:
  name = f"eval/{split}/avg@k"
  point = run.evaluations(split)[-1]
  return md.score(point[name], point[name + "_low"], point[name + "_high"])
