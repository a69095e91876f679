r"""Writes RESULTS.md from the measurements that are committed under results/.

  python -m sdpo_jax.experiment --summary

A folder results/NAME/ may hold
  curves.json      every evaluation of every run of a grid, as sdpo_jax.experiment writes it
  scores.json      what the last checkpoints can do (final_scores.py), likewise
  tuning.json      the trials that chose the grid's settings, likewise
  discover.json    the summary of a session of --mode=discover
  diagnosis_*.json what --mode=diagnose said of a task; its runs are those of curves.json that are
                   called ARM_on_TASK, else those of results/TASK
  oracle_*.json    what --mode=diagnose wrote (its index.json), for the right next tokens alone
  notes.md         facts that the committed data does not hold, in prose
  *.png            plots

Its section begins with what configs/experiments/NAME.py, else configs/NAME.py, states in its
docstring: what is compared, the command (`Run:`) and the cost (`Cost:`). Every number of a table is
computed here. Scores are avg@k, in per cent; intervals are those of stats.py. The section of
results/bench has the tables of sdpo_jax/bench/results instead.

Errors: FileNotFoundError where there is no folder results/.
"""

import ast
from collections import Counter
import itertools
import json
import pathlib
import re
from typing import NamedTuple

from sdpo_jax import final_scores, stats
from sdpo_jax.diagnose import agreement
from sdpo_jax.diagnose.prompts import ABOUT

SPLITS = ("heldout", "unseen", "adversarial")
# The arms that others are compared with, where an experiment has them
BASELINES = ("sdpo", "sdpo_extra")
# The arms whose last evaluation others have to reach
TARGETS = ("sdpo", "grpo")
FEW_ARMS = 6  # of which every pair is compared
MANY_ROWS = 40  # a longer table is folded
NONE = "–"
INTRODUCTION = """\
# Results

`python -m sdpo_jax.experiment --summary` writes this file from what is committed under `results/`
and `sdpo_jax/bench/results/`. Numbers in tables are computed from the JSON files there. Numbers
under "Notes" are not: they were taken from reports of runs whose data is not committed.
"""
CURVES_LEGEND = """\
Each score is a run's last evaluation, in per cent; its base model is evaluated at step 0. Intervals
are 95 % bootstrap intervals over seeds. Differences are in points, between runs of the same seed:
mean, interval, and each seed's."""
FINALS_LEGEND = """\
The last checkpoints on the same questions, n samples a question at temperature 1, in per cent; the
column "seeds" has the lowest and the highest avg@n. Intervals of 95 % and p-values draw seeds and
questions both. Holm's correction is over the whole second table. Entropy is in nats a token."""
DIAGNOSIS_LEGEND = """\
What `--mode=diagnose` said before training, against held-out accuracy at the end, in per cent. Tau
is Kendall's (tau-b) between the likely order and the measured means: 1 is the same order, -1 the
reverse. The last column is that of a constant answer, "grpo first, of the others no opinion"."""
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
FORGETTING_LEGEND = """\
Novel words are taught group after group, in stages of equal length. Each row is what the policy
knows of every group at the end of a stage, in per cent, means over seeds (lowest to highest).
"Forgotten" is the share that the groups taught before have lost by then of their best evaluations.
"""
ORACLE_LEGEND = """\
How often the likeliest next token is the right one, in per cent, averaged over attempts and then
questions; differences are in points, with 95 % intervals over questions. "right answers" are read
whole by both. Attempts are followed as far as the right token is known: a solved one to its end, a
failed one to the token at which it departs from a right answer that the teacher was not shown. It
departs where the policy drew another token, so there, and less so before, the policy's share is low
by selection. "Style" is the share of the gap between teacher and policy, over all attempts, that
another question's context makes as well."""
PLACES = "The same by tenths of the part that is followed; the gap by tenths of whole attempts"
VERSUS = "against_best_of_k"  # ends the names of comparisons in discover.json


def write(root: pathlib.Path) -> pathlib.Path:
  """Writes RESULTS.md of the repository at `root`; returns its path."""
  path = root / "RESULTS.md"
  path.write_text(text(root), encoding="utf-8")
  return path


def text(root: pathlib.Path) -> str:
  """Returns the contents of RESULTS.md."""
  results = root / "results"
  if not results.is_dir():
    raise FileNotFoundError(f"no folder {results}: run this at the top of the repository")
  folders = sorted(path for path in results.iterdir() if path.is_dir())
  return "\n".join([INTRODUCTION, *(_section(root, folder) for folder in folders)])


def _section(root: pathlib.Path, folder: pathlib.Path) -> str:
  """Returns the section of one experiment, in Markdown."""
  name = folder.name
  parts = [f"## {name}", *_description(root, name)]
  if (folder / "curves.json").exists():
    parts += _curves(json.loads((folder / "curves.json").read_text(encoding="utf-8")))
  if (folder / "scores.json").exists():
    parts += _finals(json.loads((folder / "scores.json").read_text(encoding="utf-8")))
  if (folder / "tuning.json").exists():
    parts.append(_trials(json.loads((folder / "tuning.json").read_text(encoding="utf-8"))))
  if (folder / "discover.json").exists():
    parts += _discover(json.loads((folder / "discover.json").read_text(encoding="utf-8")))
  if any(folder.glob("diagnosis_*.json")):
    parts += _diagnoses(folder)
  if any(folder.glob("oracle_*.json")):
    parts += _oracle(folder)
  if name == "bench":
    parts += _benchmarks(root / "sdpo_jax" / "bench" / "results")
  parts += [f"![{path.stem}]({path.relative_to(root)})" for path in sorted(folder.glob("*.png"))]
  if (folder / "notes.md").exists():
    parts += ["### Notes", (folder / "notes.md").read_text(encoding="utf-8").strip()]
  return "\n\n".join(parts) + "\n"


def _description(root: pathlib.Path, name: str) -> list[str]:
  """Returns what the docstring of the experiment's configuration states."""
  places = [root / "configs" / "experiments" / f"{name}.py", root / "configs" / f"{name}.py"]
  path = next((path for path in places if path.exists()), None)
  if path is None:
    return []
  docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
  title = " ".join(docstring.partition("\n\n")[0].split())
  return [
    f"{title} (`{path.relative_to(root)}`)",
    f"```bash\n{_field(docstring, 'Run')}\n```",
    f"Cost: {_field(docstring, 'Cost')}",
  ]


def _field(docstring: str, name: str) -> str:
  """Returns a docstring's "NAME: text", with its indented further lines."""
  match = re.search(rf"^{name}:((?:.*\n?)(?:[ ]+.*\n?)*)", docstring, re.MULTILINE)
  return " ".join(match[1].replace("\\\n", " ").split()) if match else NONE


def _table(head: list[str], rows: list[list[str]]) -> str:
  """Returns a table in Markdown."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _folded(title: str, body: str) -> str:
  return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _percent(share: float, sign: str = "") -> str:
  """Returns per cent with one decimal. Rounding first hides the noise of a float difference."""
  return f"{round(100 * share, 6):{sign}.1f}"


def _interval(low, high, sign: str = "") -> str:
  """Returns "[low, high]" in per cent; nothing where one sample tells no spread."""
  if low is None or high is None:
    return ""
  return f"[{_percent(low, sign)}, {_percent(high, sign)}]"


# Grids: curves.json


class Run(NamedTuple):
  """One run of a grid."""

  domain: str  # of the questions; "" where the grid has one domain
  arm: str
  seed: int
  tuning: dict | None  # how many trials its arm had, and which was chosen; None: none
  points: list[dict]  # one for each evaluation, the base model's first

  def evaluations(self, split: str) -> list[dict]:
    return [point for point in self.points if f"eval/{split}/avg@k" in point]

  def first(self, split: str) -> float:
    return self.evaluations(split)[0][f"eval/{split}/avg@k"]

  def last(self, split: str) -> float:
    return self.evaluations(split)[-1][f"eval/{split}/avg@k"]


def _read_run(name: str, entry: dict) -> Run:
  """Reads an entry of curves.json or scores.json, and the name of its run.

  The arguments name a configuration file and the file's keys. Their values name the arm, unless the
  run is called [DOMAIN_]ARM_seedN or ARM_on_DOMAIN_seedN.
  """
  keys = dict(pair.split("=", 1) for pair in entry["arguments"][0].rpartition(":")[2].split(","))
  domain, seed = keys.pop("domain", ""), int(keys.pop("seed"))
  arm = name.removesuffix(f"_seed{seed}")
  if arm != name and "_on_" in arm:
    arm, _, domain = arm.partition("_on_")
  elif arm == name:
    arm = ", ".join(keys.values())
  elif domain and arm.startswith(f"{domain}_"):
    arm = arm.removeprefix(f"{domain}_")
  else:
    domain = ""
  return Run(domain, arm, seed, entry.get("tuning"), entry.get("points", []))


def _ended_runs(entries: dict) -> list[Run]:
  """Returns the runs of curves.json that have a result.

  Of one that has not ended the last evaluation is none.
  """
  return [
    _read_run(name, entry)
    for name, entry in entries.items()
    if entry.get("ended", True) and entry["points"]
  ]


def _curves(entries: dict) -> list[str]:
  """Returns the tables of a grid, for each domain apart."""
  runs = _ended_runs(entries)
  if not runs:
    return ["No run has ended yet."]
  times = [run.points[-1]["time_s"] for run in runs]
  parts = [
    f"Recorded: {len(runs)} runs, {sum(times) / 3600:.1f} hours in all, "
    f"{min(times):,.0f} to {max(times):,.0f} s a run, evaluations included."
  ]
  for source, count in sorted(Counter(x["from"] for x in entries.values() if "from" in x).items()):
    parts.append(f"{count} of them are runs of `{source}`, begun from the same arguments.")
  for domain in sorted({run.domain for run in runs}):
    members = [run for run in runs if run.domain == domain]
    splits = [split for split in SPLITS if any(run.evaluations(split) for run in members)]
    arms = _by_arm(members)
    if domain:
      parts.append(f"### {domain}")
    parts += [_tuned(arms), CURVES_LEGEND, _scores(arms, splits), *_forgetting(arms)]
    parts += [PACE_LEGEND, _pace(arms)]
    parts += _ratios(arms)
    parts.append(_folded("Every run, with 95 % intervals over questions", _runs(arms, splits)))
  return parts


def _by_arm(runs: list[Run]) -> dict[str, list[Run]]:
  """Returns the runs by arm, seeds in order, the arm that is best at the first split first."""
  arms = {}
  for run in sorted(runs, key=lambda run: run.seed):
    arms.setdefault(run.arm, []).append(run)

  def mean_score(arm):
    return sum(run.last(SPLITS[0]) for run in arms[arm]) / len(arms[arm])

  return {arm: arms[arm] for arm in sorted(arms, key=mean_score, reverse=True)}


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


def _trials(record: dict) -> str:
  """Returns the table of all trials in tuning.json."""
  rows = []
  for arm, entry in record["arms"].items():
    for name, trial in entry["trials"].items():
      seeds = ", ".join(map(str, trial["seeds"]))
      score = f"{_percent(trial['mean'])} {_interval(trial['low'], trial['high'])}"
      mark = "chosen" if name == entry["chosen"] else ""
      rows.append([f"`{arm}`", f"`{name}`", seeds, score, mark])
  title = f"Every trial, by {record['metric']} in per cent; the choice is {record['rule']}"
  return _folded(title, _table(["arm", "trial", "seeds", "mean, interval", ""], rows))


def _scores(arms: dict[str, list[Run]], splits: list[str]) -> str:
  """Returns the table of last evaluations, with differences to the baselines."""
  baselines = [arm for arm in BASELINES if arm in arms]
  rows = []
  for split in splits:
    rows.append(_base_row(arms, split) + [""] * len(baselines))
    for arm, members in arms.items():
      scores = [run.last(split) for run in members]
      mean, low, high = stats.mean_interval(scores)
      row = [split, f"`{arm}`", str(len(members)), _percent(mean), _interval(low, high)]
      row.append(_range(scores))
      rows.append(row + [_difference(members, arms[other], split) for other in baselines])
  head = ["split", "arm", "seeds", "mean", "interval", "lowest to highest"]
  return _table(head + [f"minus `{other}`" for other in baselines], rows)


def _base_row(arms: dict[str, list[Run]], split: str) -> list[str]:
  scores = [run.first(split) for members in arms.values() for run in members]
  span = _range(scores) if min(scores) < max(scores) else ""
  return [split, "base model", "", _percent(sum(scores) / len(scores)), "", span]


def _range(scores: list[float]) -> str:
  return f"{_percent(min(scores))} to {_percent(max(scores))}"


def _difference(members: list[Run], others: list[Run], split: str) -> str:
  """Returns members minus others over the seeds of both: mean, interval, and each seed's."""
  own = {run.seed: run.last(split) for run in members}
  other = {run.seed: run.last(split) for run in others}
  seeds = sorted(own.keys() & other.keys())
  if members is others or not seeds:
    return NONE
  difference, low, high, _ = stats.paired_bootstrap(
    [own[seed] for seed in seeds], [other[seed] for seed in seeds]
  )
  each = ", ".join(_percent(own[seed] - other[seed], "+") for seed in seeds)
  return f"{_percent(difference, '+')} {_interval(low, high, '+')} ({each})"


def _forgetting(arms: dict[str, list[Run]]) -> list[str]:
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
        row.append(f"{_percent(sum(scores) / len(scores))} ({_range(scores)})")
      lost = [_forgotten(run, end, keys[: stage - 1]) for run, end in ends]
      row.append(f"{_percent(sum(lost) / len(lost))} ({_range(lost)})" if stage > 1 else NONE)
      rows.append(row)
  if not rows:
    return []
  head = ["arm", "after stage", *(f"words of stage {n}" for n in stages), "forgotten"]
  return [FORGETTING_LEGEND, _table(head, rows)]


def _stages(point: dict) -> list[str]:
  """Returns the numbers of the stages whose words an evaluation asked for."""
  return [x[1] for x in map(re.compile(r"eval/stage_(\d+)/avg@k").fullmatch, point) if x]


def _end_of_stage(run: Run, stage: int, keys: list[str]) -> dict | None:
  """Returns a run's evaluation at the end of a stage, on all stages; None if there is none."""
  step = run.points[-1]["step"] * stage / len(keys)
  found = [point for point in run.points if point["step"] == step and point.keys() >= set(keys)]
  return found[0] if found else None


def _forgotten(run: Run, end: dict, keys: list[str]) -> float:
  """Returns the share that these scores have lost of their best until this evaluation."""
  before = [point for point in run.points if point["step"] <= end["step"]]
  best = {key: max(point.get(key, 0.0) for point in before) for key in keys}
  reached = sum(best.values())
  return sum(best[key] - end[key] for key in keys) / reached if reached else 0.0


def _pace(arms: dict[str, list[Run]]) -> str:
  """Returns the table of what runs had generated, and of how soon they were good."""
  split = SPLITS[0]
  targets = [arm for arm in TARGETS if arm in arms]
  rows = []
  for arm, members in arms.items():
    ends = [run.points[-1] for run in members]
    row = [f"`{arm}`"]
    for name in ("step", "train/generations", "train/sampled_tokens"):
      row.append(_span([end[name] for end in ends]))
    for divisor in (4, 2):
      scores = [_score_within(run, divisor, split) for run in members]
      row.append(f"{_percent(sum(scores) / len(scores))} ({_range(scores)})")
    row += [_reached(members, arms[other], split) for other in targets]
    rows.append(row)
  head = ["arm", "steps", "responses", "generated tokens", "after a quarter", "after half"]
  return _table(head + [f"as good as `{other}`'s last" for other in targets], rows)


def _ratios(arms: dict[str, list[Run]]) -> list[str]:
  """Returns the table of cost ratios with its legend; nothing where no arms can be compared."""
  rows = []
  for other in (arm for arm in TARGETS if arm in arms):
    for arm, members in arms.items():
      pairs = _by_seed(members, arms[other])
      if arm == other or len(pairs) < 5:  # fewer seeds give no interval
        continue
      row = [f"`{arm}`", f"`{other}`", str(len(pairs))]
      rows.append(row + [_ratio(pairs, cost) for cost in ("generations", "sampled_tokens")])
  if not rows:
    return []
  return [RATIO_LEGEND, _table(["arm", "as good as", "seeds", "responses", "tokens"], rows)]


def _by_seed(members: list[Run], others: list[Run]) -> list[tuple[Run, Run]]:
  """Returns the runs of the seeds that both have, paired."""
  other_of = {run.seed: run for run in others}
  return [(run, other_of[run.seed]) for run in members if run.seed in other_of]


def _ratio(pairs: list[tuple[Run, Run]], cost: str) -> str:
  """Returns the median of one cost ratio with its interval."""

  def until(run: Run, target: float) -> float | None:
    points = run.evaluations(SPLITS[0])
    costs = [point.get(f"train/{cost}", 0) for point in points]
    return stats.cost_to_target(costs, [p[f"eval/{SPLITS[0]}/avg@k"] for p in points], target)

  def end(run: Run) -> int:
    return run.evaluations(SPLITS[0])[-1][f"train/{cost}"]

  targets = [other.last(SPLITS[0]) for _, other in pairs]
  ratio = stats.cost_ratio(
    [until(run, target) for (run, _), target in zip(pairs, targets, strict=True)],
    [until(other, target) for (_, other), target in zip(pairs, targets, strict=True)],
    end_a_S=[end(run) for run, _ in pairs],
    end_b_S=[end(other) for _, other in pairs],
  )
  median = "unknown" if ratio.ratio is None else f"{ratio.ratio:.2f}"
  high = "∞" if ratio.high is None else f"{ratio.high:.2f}"
  never = f", {ratio.censored_a} never" if ratio.censored_a else ""
  return f"{median} [{ratio.low:.2f}, {high}]{never}"


def _span(values: list[int]) -> str:
  low, high = min(values), max(values)
  return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _score_within(run: Run, divisor: int, split: str) -> float:
  """Returns the score at the last evaluation within the first 1/divisor of the run's steps."""
  limit = run.points[-1]["step"] / divisor
  points = [point for point in run.evaluations(split) if point["step"] <= limit]
  return points[-1][f"eval/{split}/avg@k"]


def _reached(members: list[Run], others: list[Run], split: str) -> str:
  """Returns, for each seed of both, what was generated until as good as the other's last score."""
  targets = {run.seed: run.last(split) for run in others}
  cells = [_reach(run, targets[run.seed], split) for run in members if run.seed in targets]
  return ", ".join(cells) or NONE


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


def _runs(arms: dict[str, list[Run]], splits: list[str]) -> str:
  rows = []
  for arm, members in arms.items():
    for run in members:
      end = run.points[-1]
      generated = [f"{end['train/generations']:,}", f"{end['train/sampled_tokens']:,}"]
      scores = [_run_score(run, split) for split in splits]
      rows.append([f"`{arm}`", str(run.seed), *scores, *generated, f"{end['time_s']:,.0f}"])
  return _table(["arm", "seed", *splits, "responses", "generated tokens", "seconds"], rows)


def _run_score(run: Run, split: str) -> str:
  name = f"eval/{split}/avg@k"
  point = run.evaluations(split)[-1]
  return f"{_percent(point[name])} {_interval(point[name + '_low'], point[name + '_high'])}"


# What the last checkpoints of a grid can do: scores.json


def _finals(entries: dict) -> list[str]:
  """Returns the tables of the last checkpoints: each arm, and the differences between arms."""
  runs = []
  for name, entry in entries.items():
    run = _read_run(name, entry)
    runs.append((run.arm, run.seed, entry["splits"]))
  splits = [split for split in SPLITS if any(split in run[2] for run in runs)]
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
    [split, arms, what, *_difference_cells(difference), _number(p, ".4f")]
    for (split, arms, what, difference), p in zip(differences, corrected, strict=True)
  ]
  head_of_compared = ["split", "arms", "of", "difference", "interval", "p", "p, Holm"]
  compared = _table(head_of_compared, compared_rows)
  if len(compared_rows) > MANY_ROWS:
    compared = _folded(f"All {len(compared_rows)} comparisons", compared)
  return [FINALS_LEGEND, _table(head, rows), compared]


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
    cells.append(f"{_percent(mean)} {_interval(low, high)}")
  cells.insert(3, _range(list(reward_QS.mean(axis=0))))
  entropy = f"{arm.mean('entropy'):.3f}" if "entropy" in arm.entries[0] else NONE
  tokens = f"{arm.mean('length_mean'):.1f} (p99 {arm.mean('length_p99'):.0f})"
  return [*cells, entropy, tokens, f"{_percent(arm.mean('cut_off'))} %"]


def _differences(a: final_scores.Arm, b: final_scores.Arm, samples: int):
  """Returns (what, difference of a and b) for the seeds of both."""
  if a.seeds != b.seeds:
    raise ValueError(f"{a.name} has the seeds {a.seeds}, {b.name} {b.seeds}")
  return [
    (f"avg@{samples}", stats.paired_bootstrap(a.table("reward"), b.table("reward"))),
    (f"pass@{samples}", stats.paired_bootstrap(a.pass_at(samples), b.pass_at(samples))),
  ]


def _difference_cells(difference: stats.Difference) -> list[str]:
  points = _percent(difference.difference, "+")
  interval = _interval(difference.low, difference.high, "+")
  return [points, interval, _number(difference.p_value, ".4f")]


# What a diagnosis said, and what training then did: diagnosis_TASK.json


def _diagnoses(folder: pathlib.Path) -> list[str]:
  """Returns the table that holds each diagnosis against the runs on its task."""
  rows, taus = [], []
  for path in sorted(folder.glob("diagnosis_*.json")):
    task = path.stem.removeprefix("diagnosis_")
    found = json.loads(path.read_text(encoding="utf-8"))
    scores = _scores_on(task, folder)
    said = " > ".join(" = ".join(tied) for tied in found["verdict"]["ranking"])
    row = [task, found["verdict"]["teacher"], found["verdict"]["rewards"], said]
    if len(scores) < 2:
      rows.append([*row, NONE, NONE, NONE])
      continue
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    measured = ", ".join(
      f"{name} {_percent(mean[name])} ({_range(scores[name])})" for name in agreement.by_score(mean)
    )
    both = agreement.compare(found["verdict"]["ranking"], mean)
    taus.append([0.0 if tau is None else tau for tau in both])
    rows.append([*row, measured, *(_number(tau, ".2f") for tau in both)])
  if taus:
    means = [f"**{sum(column) / len(taus):.2f}**" for column in zip(*taus, strict=True)]
    rows.append([f"mean of {len(taus)}", "", "", "", "", *means])
  head = ["task", "teacher", "groups", "likely order", "held-out at the end (lowest to highest)"]
  return [DIAGNOSIS_LEGEND, _table([*head, "tau", "tau of grpo first"], rows)]


def _scores_on(task: str, folder: pathlib.Path) -> dict[str, list[float]]:
  """Returns {method as a diagnosis calls it: the last score of each seed}."""
  scores: dict[str, list[float]] = {}
  for place, domain in ((folder, task), (folder.parent / task, "")):
    path = place / "curves.json"
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for run in _ended_runs(entries):
      name = agreement.CALLED.get(run.arm)
      if name is not None and run.domain == domain:
        scores.setdefault(name, []).append(run.last(SPLITS[0]))
    if scores:
      break
  return scores


# Right next tokens: oracle_*.json


def _oracle(folder: pathlib.Path) -> list[str]:
  """Returns the tables of how often teacher and policy expect the right token."""
  rows, places, styles = [], [], []
  for path in sorted(folder.glob("oracle_*.json")):
    model = path.stem.removeprefix("oracle_")
    read = json.loads(path.read_text(encoding="utf-8"))["tokens"]
    styles.append([model, NONE if read["alike"] is None else _percent(read["alike"])])
    for name, right in read["right"].items():
      rows.append([model, f"right answers; shown: {ABOUT[name]}", *_right_cells(right)])
    for name, right in read["followed"].items():
      rows.append([model, f"{name} attempts", *_right_cells(right)])
      if "departure" in right:
        cells = _right_cells(right["departure"])
        rows.append([model, f"{name} attempts, at the departure", *cells])
      for reader in ("policy", "teacher"):
        shares = [NONE if x is None else _percent(x) for x in right["by_part"][reader]]
        places.append([model, name, reader, *shares])
    gaps = [NONE if x is None else _number(x, ".2f") for x in read["gap_by_part"]]
    places.append([model, "all", "gap, nats", *gaps])
  head = ["model", "what is read", "number", "policy", "teacher", "difference"]
  by_place = _table(["model", "attempts", "tenth", *map(str, range(1, 11))], places)
  return [
    ORACLE_LEGEND,
    _table(head, rows),
    _table(["model", "style"], styles),
    _folded(PLACES, by_place),
  ]


def _right_cells(right: dict) -> list[str]:
  found = right["difference"]
  difference = f"{_percent(found['mean'], '+')} {_interval(found['low'], found['high'], '+')}"
  return [
    str(right["answers"]),
    _percent(right["policy"]),
    _percent(right["teacher"]),
    difference.strip(),
  ]


# Test-time self-distillation: discover.json


def _discover(summary: dict) -> list[str]:
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
    _folded("Runs solved by question", _discovery_questions(arms, questions)),
  ]


def _discovery(arms: dict) -> str:
  rows = []
  for k in next(iter(arms.values()))["discovery"]:
    intervals = [arm["discovery"][k] for arm in arms.values()]
    cells = [f"{_percent(x['mean'])} {_interval(x['low'], x['high'])}" for x in intervals]
    rows.append([k, *cells])
  return _table(["k", *(f"`{arm}`" for arm in arms)], rows)


def _discovery_costs(arms: dict) -> str:
  rows = []
  for name, arm in arms.items():
    numbers = [arm[f"mean_{what}"] for what in ("attempts", "tokens", "teacher_tokens")]
    solved = f"{arm['solved']} of {arm['runs']}"
    rows.append([f"`{name}`", solved, *map(_number, [*numbers, arm["time_s"]])])
  head = ["arm", "runs solved", "attempts", "tokens generated", "read by the teacher", "seconds"]
  return _table(head, rows)


def _discovery_questions(arms: dict, questions: list[dict]) -> str:
  rows = []
  for question in questions:
    solved = [f"{question[arm]['solved']}/{question[arm]['runs']}" for arm in arms]
    rows.append([question["task_id"], _number(question["pass@64"], ".3f"), *solved])
  return _table(["question", "pass@64 of the base model", *(f"`{arm}`" for arm in arms)], rows)


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
    bounds = f"[{_number(cost['low'])}, {_number(cost['high'])}]"
    rows.append([title, f"{_number(cost['to_reach'])} {bounds}", _number(baseline)])
  goal = f"best_of_k's discovery@{summary['budget']}"
  head = [f"to reach {goal}, {_percent(compared['target'])} %", f"`{arm}`", "`best_of_k`"]
  difference = compared["difference_at_a_third"]
  points = _percent(difference["difference"], "+")
  interval = _interval(difference["low"], difference["high"], "+")
  return (
    f"{_table(head, rows)}\n\n`{arm}`'s discovery@{compared['third']} minus {goal}: "
    f"{points} points {interval}, p = {_number(difference['p_value'], '.4f')}."
  )


def _number(value, form: str = ",.0f") -> str:
  return NONE if value is None else f"{value:{form}}"


# Measurements of speed and memory: sdpo_jax/bench/results

BENCHMARKS = {  # file -> {column: (field of a record, format)}
  "step_cpu": {
    "case": ("case", ""),
    "responses": ("responses", ""),
    "CPU seconds": ("cpu_s", ".2f"),
    "seconds": ("time_s", ".2f"),
    "peak memory MB": ("peak_mb", ",.0f"),
    "temporaries MB": ("temporaries_mb", ",.0f"),
    "share of useful columns": ("useful", ".3f"),
  },
  "step_methods_cpu": {
    "method": ("method", ""),
    "readings by the teacher": ("readings", ""),
    "CPU seconds / sdpo's": ("relative_cpu", ".2f"),
    "seconds": ("time_s", ".2f"),
  },
  "loss_cpu": {
    "implementation": ("implementation", ""),
    "tokens, width, vocabulary": ("shape", ""),
    "CPU seconds": ("cpu_s", ".2f"),
    "temporaries MB": ("temporaries_mb", ",.0f"),
    "peak memory MB": ("peak_mb", ",.0f"),
  },
  "rollout_cpu": {
    "mix": ("mix", ""),
    "tokens": ("tokens", ","),
    "tokens a CPU second": ("tokens_per_cpu_s", ".0f"),
    "CPU seconds": ("cpu_s", ".1f"),
    "least CPU seconds of this schedule": ("floor_s", ".1f"),
    "cache, at its peak over need": ("cache_peak", ".2f"),
    "on average": ("cache_mean", ".2f"),
    "programs": ("programs", ""),
  },
  "episodes_cpu": {
    "a world's answer takes ms": ("delay_ms", ".0f"),
    "overlap": ("overlap", ""),
    "episodes/s": ("episodes_per_s", ".1f"),
    "CPU seconds a batch": ("cpu_s", ".2f"),
    "turns": ("turns", ".1f"),
    "waiting for worlds": ("waiting", ".1%"),
    "worlds at work beside sampling": ("hidden", ".1%"),
  },
  "sandbox_cpu": {
    "worker": ("kind", ""),
    "programs/s": ("per_s", ",.0f"),
    "p50 ms": ("p50_ms", ".1f"),
    "p99 ms": ("p99_ms", ".1f"),
    "MB a worker, proportional": ("pss_mb", ".1f"),
    "MB a worker, resident": ("rss_mb", ".1f"),
    "cold start s": ("cold_s", ".2f"),
    "time limit reported after ms": ("late_ms", ".1f"),
  },
}


def _benchmarks(folder: pathlib.Path) -> list[str]:
  """Returns a table for each measurement of sdpo_jax.bench."""
  parts = []
  for name, columns in BENCHMARKS.items():
    sittings = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    # methods that were compared in one sitting stand in one record
    records = [record for sitting in sittings for record in sitting.get("steps", [sitting])]
    rows = [
      [_number(record.get(field), form) for field, form in columns.values()] for record in records
    ]
    parts += [f"### {name}.json", _table(list(columns), rows)]
  return parts
