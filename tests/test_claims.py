"""The table of claims: each verdict by hand, and each row is measured by runs that its grid has."""

import json
import pathlib
import runpy

import pytest

from sdpo_jax import tuning
from sdpo_jax.summary import claims, evidence

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
  return {"arguments": arguments, "warned": warned or {}, "points": points}


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
    ((0.510, 0.500, 0.505), (0.500, 0.490, 0.4951), "holds"),
    ((0.500, 0.500, 0.5001), (0.500, 0.500, 0.5), "does not hold"),  # too little to matter
    ((0.9, 0.1, 0.5), (0.2, 0.8, 0.4), "cannot be told"),
    ((0.9,), (0.1,), None),  # one seed has no interval without its questions
  ],
)
def test_the_verdict_on_a_difference(a, b, verdict, tmp_path):
  runs = {
    f"{arm}_seed{seed}": run(arm, seed, 0.1, score)
    for arm, scores in (("a", a), ("b", b))
    for seed, score in enumerate(scores)
  }
  found = evidence.above("grid", "a", "b")(results(tmp_path, "grid", runs))
  assert (found and found.verdict) == verdict


def test_one_seed_is_never_enough(tmp_path):
  """Its questions have a narrow interval, which says nothing of another run."""
  scores = {}
  for arm, value in (("a", 0.9), ("b", 0.1)):
    split = {"reward": [value] * 20, "judged": [16] * 20, "solved": [8] * 20, "greedy": [1.0] * 20}
    arguments = [f"--config=configs/x.py:method={arm},seed=0"]
    scores[f"{arm}_seed0"] = {"arguments": arguments, "splits": {"heldout": split}}
  runs = {f"{arm}_seed0": run(arm, 0, 0.1, 0.5) for arm in "ab"}
  measure = evidence.above("grid", "a", "b")
  found = measure(results(tmp_path, "grid", runs, scores))
  assert found == ("cannot be told", "+80.0 [+80.0, +80.0] points, one seed")
  for name, entry in list(scores.items()):
    other = json.loads(json.dumps(entry).replace("seed=0", "seed=1"))
    scores[name.replace("seed0", "seed1")] = other
  found = measure(results(tmp_path, "grid", runs, scores))
  assert found == ("holds", "+80.0 [+80.0, +80.0] points, 2 seeds")


def test_a_baseline_of_several_forms_is_the_one_that_did_best(tmp_path):
  ends = {"a": 0.5, "collapsed": 0.0, "well": 0.7}
  runs = {
    f"{arm}_seed{s}": run(arm, s, 0.1, x + s / 100) for arm, x in ends.items() for s in (0, 1)
  }
  folder = results(tmp_path, "grid", runs)
  assert evidence.above("grid", "a", "collapsed")(folder).verdict == "holds"
  found = evidence.above_best("grid", "a", ("collapsed", "well"))(folder)
  assert found == ("does not hold", "-20.0 [-20.0, -20.0] points, 2 seeds, against `well`")
  del runs["well_seed0"], runs["well_seed1"]
  assert (
    evidence.above_best("grid", "a", ("collapsed", "well"))(results(tmp_path, "grid", runs)) is None
  )


def test_falls_and_what_told_of_them(tmp_path):
  runs = {
    "a_seed0": run("a", 0, 0.5, 0.1, warned={"worse": 60, "length_tail": 20}),
    "a_seed1": run("a", 1, 0.5, 0.1, warned={"fallen": 80, "length_tail": 70}),
    "b_seed0": run("b", 0, 0.5, 0.9, warned={"length_tail": 5}),
    "b_seed1": run("b", 1, 0.5, 0.9),
  }
  folder = results(tmp_path, "grid", runs)
  assert evidence.falls("grid", "a")(folder) == ("holds", "fell at step: 60, 80, of 100")
  assert evidence.falls("grid", "a", within=60)(folder).verdict == "cannot be told"
  assert evidence.falls("grid", "a", within=59)(folder).verdict == "does not hold"
  assert evidence.lasts("grid", "a")(folder).verdict == "does not hold"
  assert evidence.lasts("grid", "b")(folder) == ("holds", "fell at step: never, never, of 100")
  told = evidence.told_before("grid", "length_tail", 35)(folder)
  assert told == ("cannot be told", "1 of 2 falls; seen in 1 of 2 others")
  assert evidence.told_before("grid", "length_tail", 10)(folder).verdict == "holds"
  assert evidence.told_before("grid", "entropy", 10)(folder).verdict == "does not hold"


def test_a_share_of_the_cost(tmp_path):
  """Arm a is as good as b's last 40 % after 640 of b's 6,400 responses."""
  runs = {f"a_seed{s}": run("a", s, 0.0, 0.4, 0.8, last_step=20) for s in range(5)}
  runs |= {f"b_seed{s}": run("b", s, 0.0, 0.2, 0.4) for s in range(5)}
  folder = results(tmp_path, "grid", runs)
  assert evidence.sooner("grid", "a", "b", 0.25)(folder).verdict == "holds"
  assert evidence.sooner("grid", "a", "b", 0.05)(folder).verdict == "does not hold"
  assert evidence.sooner("grid", "b", "a", 1.0)(folder).verdict == "does not hold"


def grid_of(name):
  """Returns the names of the runs of an experiment file, and their arguments."""
  names = runpy.run_path(str(ROOT / "configs" / "experiments" / f"{name}.py"))
  if "get_tuning" not in names:
    return names["get_grid"]()
  trials = tuning.read(names["get_tuning"]())
  return names["get_grid"](tuning.arguments_of(trials, next(tuning.choices(trials))))


@pytest.mark.parametrize("grid", sorted({claim.section for claim in claims.CLAIMS} - {"discover"}))
def test_every_claim_is_measured_by_runs_that_its_grid_has(grid, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  curves, scores = {}, {}
  for name, arguments in grid_of(grid).items():
    entry = run("", 0, FIGURE, FIGURE) | {"arguments": arguments}
    split = {"reward": [FIGURE] * 2, "judged": [2] * 2, "solved": [1] * 2, "greedy": [1.0] * 2}
    curves[name] = entry
    scores[name] = {
      "arguments": arguments,
      "splits": {"heldout": split | {"length_mean": 9.0}, "unseen": split},
    }
  for entry in list(curves.values())[:2]:  # a grid without falls says nothing of what told of them
    entry["warned"] = {"fallen": 100}
  folder = results(tmp_path, grid, curves, scores)
  for claim in claims.CLAIMS:
    if claim.section == grid:
      assert claim.measure(folder) is not None, claim.says


def test_what_has_not_run_is_said(tmp_path):
  page = claims.claims(tmp_path)
  assert page.count("| not run yet | – | `") == len(claims.CLAIMS)
