"""The table of claims: each verdict by hand, and each row is measured by runs that its grid has."""

import json
import pathlib
import runpy

import pytest

from sdpo_jax import report, tuning
from sdpo_jax.summary import claims, evidence
from sdpo_jax.summary.evidence import (
  Above,
  Collapses,
  DiscoversMore,
  DiscoversSooner,
  ForgetsLess,
  Lasts,
  Shorter,
  Sooner,
  WarnsBefore,
)

ROOT = pathlib.Path(__file__).parent.parent
FIGURE = 0.5


def run(arm, seed, *scores, warned=None, last_step=100):
  """An entry of curves.json with evaluations at equal distances."""
  gap = last_step // max(len(scores) - 1, 1)
  points = [
    {
      "step": i * gap,
      "time_s": 1.0,
      "train/generations": 64 * i * gap,
      "train/sampled_tokens": 640 * i * gap,
      **{f"eval/{name}/avg@k": score for name in ("heldout", "unseen", "stage_1", "stage_2")},
    }
    for i, score in enumerate(scores)
  ]
  arguments = [f"--config=configs/x.py:method={arm},seed={seed}"]
  return {"arguments": arguments, "warned": warned or {}, "points": points, "ended": True}


def results(tmp_path, name, runs, scores=None):
  folder = tmp_path / name
  folder.mkdir(exist_ok=True)
  (folder / "curves.json").write_text(json.dumps(runs))
  if scores is not None:
    (folder / "scores.json").write_text(json.dumps(scores))
  return tmp_path


@pytest.mark.parametrize(
  "a, b, verdict",
  [
    ((0.9, 0.8, 0.85), (0.2, 0.1, 0.15), "holds"),
    ((0.2, 0.1, 0.15), (0.9, 0.8, 0.85), "does not hold"),
    ((0.530, 0.520, 0.525), (0.500, 0.490, 0.4951), "holds"),
    ((0.510, 0.500, 0.505), (0.500, 0.490, 0.4951), "does not hold"),  # sure, but too little
    ((0.9, 0.1, 0.5), (0.2, 0.8, 0.4), "cannot be told"),
    ((0.9, 0.8), (0.2, 0.1), "cannot be told"),  # two seeds
    ((0.9,), (0.1,), None),  # one has no interval without its questions
  ],
)
def test_the_verdict_on_a_difference(a, b, verdict, tmp_path):
  runs = {
    f"{arm}_seed{seed}": run(arm, seed, 0.1, score)
    for arm, scores in (("a", a), ("b", b))
    for seed, score in enumerate(scores)
  }
  measured = Above("grid", "a", ("b",))(results(tmp_path, "grid", runs))
  assert (measured and measured.word) == verdict


def split_scores(value, length=9.0):
  """What scores.json has of a split of 20 questions, all answered alike."""
  return {
    "reward": [value] * 20,
    "judged": [16] * 20,
    "solved": [8] * 20,
    "greedy": [1.0] * 20,
    "length_mean": length,
  }


def scores_of(values, lengths=None):
  """Entries of scores.json from {arm: the value of each seed}."""
  entries = {}
  for arm, seeds in values.items():
    for seed, value in enumerate(seeds):
      length = 9.0 if lengths is None else lengths[arm][seed]
      arguments = [f"--config=configs/x.py:method={arm},seed={seed}"]
      splits = {"heldout": split_scores(value, length)}
      entries[f"{arm}_seed{seed}"] = {"arguments": arguments, "splits": splits}
  return entries


@pytest.mark.parametrize(
  "seeds, word", [(1, "cannot be told"), (2, "cannot be told"), (3, "holds")]
)
def test_few_seeds_are_never_enough(seeds, word, tmp_path):
  """Their questions have a narrow interval, which says nothing of another run."""
  folder = results(tmp_path, "grid", {}, scores_of({"a": [0.9] * seeds, "b": [0.1] * seeds}))
  count = "one seed" if seeds == 1 else f"{seeds} seeds"
  verdict = Above("grid", "a", ("b",))(folder)
  assert verdict == evidence.Verdict(word, f"+80.0 [+80.0, +80.0] points, {count}")
  assert Above("grid", "a", ("c",))(folder) is None
  assert Above("grid", "a", ("b",), split="unseen")(folder) is None


def test_a_baseline_of_several_forms_is_the_one_that_did_best(tmp_path):
  ends = {"a": 0.5, "collapsed": 0.0, "well": 0.7}
  runs = {
    f"{arm}_seed{s}": run(arm, s, 0.1, x + s / 100) for arm, x in ends.items() for s in range(3)
  }
  folder = results(tmp_path, "grid", runs)
  assert Above("grid", "a", ("collapsed",))(folder).word == "holds"
  verdict = Above("grid", "a", ("collapsed", "well"))(folder)
  figure = "-20.0 [-20.0, -20.0] points, 3 seeds, against `well`"
  assert verdict == evidence.Verdict("does not hold", figure)
  del runs["well_seed0"], runs["well_seed1"], runs["well_seed2"]
  folder = results(tmp_path, "grid", runs)
  assert Above("grid", "a", ("collapsed", "well"))(folder) is None


def test_collapses_and_what_warned_of_them(tmp_path):
  """Half of the best is the limit, to the end: a dip that is made good is none."""
  high, low = 0.8, 0.3
  ends = {
    "early": (high, low, low, low, low, low),  # at 20
    "late": (0.4, high, high, high, low, low),  # at 80
    "dips": (high, low, high, low, high, high),
    "well": (0.4, 0.5, 0.6, 0.7, high, high),
  }
  warned = {
    "early": {"tail": 10},
    "late": {"tail": 40},
    "dips": {"worse": 20},
    "well": {"tail": 50},
  }
  runs = {
    f"{arm}_seed{seed}": run(arm, seed, *scores, warned=warned[arm])
    for arm, scores in ends.items()
    for seed in range(3)
  }
  folder = results(tmp_path, "grid", runs)
  steps = "collapsed at step: 20, 20, 20, of 100"
  assert Collapses("grid", "early")(folder) == evidence.Verdict("holds", steps)
  assert Collapses("grid", "early", within=19)(folder).word == "does not hold"
  assert Collapses("grid", "late", later_than="early")(folder).word == "holds"
  assert Collapses("grid", "early", later_than="late")(folder).word == "does not hold"
  assert Collapses("grid", "early", later_than="well")(folder).word == "does not hold"
  assert Lasts("grid", "early")(folder).word == "does not hold"
  never = "collapsed at step: never, never, never, of 100"
  assert Lasts("grid", "dips")(folder) == evidence.Verdict("holds", never)
  assert Lasts("grid", "absent")(folder) is None
  # the three late ones; of the six that last three have shown the sign
  told = WarnsBefore("grid", "tail", 40, after=50)(folder)
  figure = "before 3 of 3 collapses; in 3 of 6 other runs"
  assert told == evidence.Verdict("cannot be told", figure)
  assert WarnsBefore("grid", "tail", 41, after=50)(folder).word == "does not hold"
  for seed in range(3):
    runs[f"well_seed{seed}"]["warned"] = {}
  folder = results(tmp_path, "grid", runs)
  assert WarnsBefore("grid", "tail", 40, after=50)(folder).word == "holds"
  assert WarnsBefore("grid", "tail", 40, after=10)(folder).word == "cannot be told"
  for entry in runs.values():  # an earlier grid looked for no signs
    del entry["warned"]
  assert WarnsBefore("grid", "tail", 40, after=50)(results(tmp_path, "grid", runs)) is None
  assert Collapses("grid", "early")(folder).word == "holds"


def test_a_share_of_the_cost(tmp_path):
  """Arm a is as good as b's last 40 % after 640 of b's 6,400 responses."""
  runs = {f"a_seed{s}": run("a", s, 0.0, 0.4, 0.8, last_step=20) for s in range(5)}
  runs |= {f"b_seed{s}": run("b", s, 0.0, 0.2, 0.4) for s in range(5)}
  folder = results(tmp_path, "grid", runs)
  figure = "0.10 [0.10, 0.10] of the responses, 5 seeds"
  assert Sooner("grid", "a", "b", 0.25)(folder) == evidence.Verdict("holds", figure)
  assert Sooner("grid", "a", "b", 0.05)(folder).word == "does not hold"
  never = Sooner("grid", "b", "a", 1.0)(folder)
  assert never.word == "does not hold" and "∞] of the responses" in never.figure


def test_lengths(tmp_path):
  values = {"a": [0.5] * 3, "b": [0.5] * 3}
  lengths = {"a": [4.0, 5.0, 6.0], "b": [10.0] * 3}
  folder = results(tmp_path, "grid", {}, scores_of(values, lengths))
  figure = "0.40 to 0.60 times as long, 3 seeds"
  assert Shorter("grid", "a", "b", 0.5)(folder) == evidence.Verdict("cannot be told", figure)
  assert Shorter("grid", "a", "b", 0.6)(folder).word == "holds"
  assert Shorter("grid", "a", "b", 0.39)(folder).word == "does not hold"


def test_forgetting(tmp_path):
  """Arm a ends with all of its best at stage 1, b with a quarter of it."""

  def taught(arm, seed, last):
    entry = run(arm, seed, 0.1, 0.8, last + seed / 1000)
    return entry

  runs = {f"a_seed{s}": taught("a", s, 0.8) for s in range(3)}
  runs |= {f"b_seed{s}": taught("b", s, 0.2) for s in range(3)}
  folder = results(tmp_path, "grid", runs)
  verdict = ForgetsLess("grid", "a", "b")(folder)
  assert verdict.word == "holds" and verdict.figure.startswith("+74.9 [")
  assert ForgetsLess("grid", "b", "a")(folder).word == "does not hold"


def test_discovery(tmp_path):
  rows = [
    {"sdpo": {"solved": 4, "runs": 5}, "best_of_k": {"solved": solved, "runs": 5}}
    for solved in (0, 1, 0, 0)
  ]
  compared = {"target": 0.05, "baseline_attempts": 256}
  compared["attempts"] = {"to_reach": 64, "low": 32, "high": 80}
  summary = {"arms": {"sdpo": {}, "best_of_k": {}}, "questions": rows, "level": 0.9}

  def write(**changes):
    (tmp_path / "discover").mkdir(exist_ok=True)
    summary["sdpo_against_best_of_k"] = compared | changes
    (tmp_path / "discover" / "discover.json").write_text(json.dumps(summary))
    evidence._json.cache_clear()  # within one tick of the clock
    return tmp_path

  folder = write()
  figure = "0.25 [0.12, 0.31] of the attempts (90 %)"
  assert DiscoversSooner("sdpo", 1 / 3)(folder) == evidence.Verdict("holds", figure)
  more = DiscoversMore("sdpo", "best_of_k")(folder)
  assert more.word == "holds" and more.figure.startswith("+75.0 [")
  assert DiscoversMore("best_of_k", "sdpo")(folder).word == "does not hold"
  assert DiscoversMore("sdpo", "multi_turn")(folder) is None
  not_reached = write(attempts={"to_reach": None, "low": 200, "high": None})
  figure = "∞ [0.78, ∞] of the attempts (90 %)"
  assert DiscoversSooner("sdpo", 1 / 3)(not_reached) == evidence.Verdict("does not hold", figure)
  assert DiscoversSooner("sdpo", 1 / 3)(write(target=0.0)) is None


def grid_of(name):
  """Returns the names of the runs of an experiment file, and their arguments."""
  names = runpy.run_path(str(ROOT / "configs" / "experiments" / f"{name}.py"))
  if "get_tuning" not in names:
    return names["get_grid"]()
  trials = tuning.read(names["get_tuning"]())
  return names["get_grid"](tuning.arguments_of(trials, next(tuning.choices(trials))))


GRIDS = sorted({claim.measure.grid for claim in claims.CLAIMS} - {"discover"})


@pytest.mark.parametrize("grid", GRIDS)
def test_every_claim_is_measured_by_runs_that_its_grid_has(grid, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  curves, scores = {}, {}
  for name, arguments in grid_of(grid).items():
    curves[name] = run("", 0, FIGURE, FIGURE) | {"arguments": arguments}
    splits = {split: split_scores(FIGURE) for split in ("heldout", "unseen")}
    scores[name] = {"arguments": arguments, "splits": splits}
  for entry in list(curves.values())[:3]:  # without a collapse nothing can warn of one
    entry["points"][-1] |= {"eval/heldout/avg@k": 0.0}
  folder = results(tmp_path, grid, curves, scores)
  for claim in claims.CLAIMS:
    if claim.measure.grid == grid:
      assert claim.measure(folder) is not None, claim.says


# Settings in which a pair may differ: what a method is, what was tuned for it, and its name
FREE = ("method.", "optimizer.lr", "label", "seed")
# and, where the other has what configs/tinycode.py gives to rows of the reward alone, these
GRPOS = ("rollout.group", "rollout.questions", "optimizer.decay_steps")


@pytest.mark.parametrize("grid", ["headline", "methods", "paper_tiny", "schedules"])
def test_a_pair_differs_in_the_method_alone_unless_its_row_says_so(grid, monkeypatch):
  monkeypatch.chdir(ROOT)
  runs = grid_of(grid)

  def settings(arm):
    name = f"{arm}_seed0"
    return report.flattened(tuning.settings(name, runs[name]).to_dict())

  grpos = {"rollout.group": 8, "rollout.questions": 8, "optimizer.decay_steps": 0}
  for claim in claims.CLAIMS:
    if claim.measure.grid != grid or not isinstance(claim.measure, Above):
      continue
    own = settings(claim.measure.arm)
    for other in map(settings, claim.measure.others):
      keys = {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)}
      keys = {key for key in keys if not key.startswith(FREE)}
      is_grpos = {key: other[key] for key in GRPOS} == grpos
      allowed = {*GRPOS} if is_grpos or claim.confounded_by else set()
      assert keys <= allowed, (claim.says, keys)


def test_what_has_not_run_is_stated(tmp_path):
  (tmp_path / "results").mkdir()
  page = claims.claims(tmp_path)
  assert page.count("| not measured yet | – | `") == len(claims.CLAIMS)


def test_a_confounded_pair_tells_nothing(tmp_path):
  folder = results(tmp_path, "grid", {}, scores_of({"a": [0.9] * 3, "b": [0.1] * 3}))
  claim = claims.Claim(
    "a beats b", "0000.00000", Above("grid", "a", ("b",)), "size", "on 20 questions"
  )
  word, figure = claims._cells(claim, folder)
  assert word == "**cannot be told**"
  assert figure.endswith("3 seeds; they also differ in: size; on 20 questions")
