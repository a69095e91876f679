"""Sections of the report beside curves and rollouts: forest plots, diagnosis, system."""

import json
import pathlib

import pytest

from sdpo_jax import report, stats
from sdpo_jax.diagnose.prompts import ABOUT
from sdpo_jax.report import curves, forest, system
from sdpo_jax.report.diagnosis import diagnosis
from tests.test_report import Page, workdir

ROOT = pathlib.Path(__file__).parent.parent
LAST = {"sdpo": (0.8, 0.9, 0.7), "grpo": (0.5, 0.7, 0.6)}


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
  monkeypatch.setattr(curves, "_drawn", lambda *_: b"PNG")


def add_to_last(run, **values):
  """Adds metrics to a run's last line; `/` of a name is written `__`."""
  *lines, last = (run / "metrics.jsonl").read_text().splitlines()
  line = json.loads(last) | {name.replace("__", "/"): value for name, value in values.items()}
  (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(line)]) + "\n")
  return run


@pytest.fixture
def runs(tmp_path):
  """Three seeds of two methods."""
  found = []
  for method, scores in LAST.items():
    for seed, value in enumerate(scores):
      path = workdir(
        tmp_path / f"{method}{seed}", method=method, seed=seed, accuracy=(0.1, value), unseen=False
      )
      found.append(add_to_last(path, eval__heldout__gain=value - 0.1))
  return found


# ---- forest plots --------------------------------------------------------------------------------


def test_differences_are_those_of_the_paired_bootstrap(runs):
  plot = forest.differences(report.read_runs(runs))
  (split,) = plot["splits"]
  (row,) = split["rows"]
  want = stats.paired_bootstrap(LAST["grpo"], LAST["sdpo"])
  assert (plot["first"], split["name"], row["label"], row["seeds"]) == (
    "sdpo",
    "heldout",
    "grpo",
    3,
  )
  assert row["mean"] == f"{100 * want.difference:+.1f}" == "-20.0"
  assert row["interval"] == f"[{100 * want.low:+.1f}, {100 * want.high:+.1f}]"
  low, high = (float(text) for _, text in (plot["ticks"][0], plot["ticks"][-1]))
  place = {name: float(row[name]) * (high - low) / 100 + low for name in ("from", "at", "to")}
  assert [place["from"], place["at"], place["to"]] == pytest.approx(
    [100 * want.low, -20, 100 * want.high], abs=0.02
  )
  assert float(plot["zero"]) * (high - low) / 100 + low == pytest.approx(0, abs=0.02)


def test_one_seed_is_a_bare_point_and_no_common_seed_none(runs):
  loaded = report.read_runs([runs[0], runs[3]])
  (row,) = forest.differences(loaded)["splits"][0]["rows"]
  assert row["from"] is None and row["interval"] == "" and row["mean"] == "-30.0"
  assert forest.differences(report.read_runs([runs[0], runs[4]])) is None
  assert forest.differences(report.read_runs(runs[:3])) is None


def test_gains_are_over_seeds_or_over_the_questions_of_one_run(runs, tmp_path):
  by_label = {r["label"]: r for r in forest.gains(report.read_runs(runs))["splits"][0]["rows"]}
  want = stats.paired_bootstrap([x - 0.1 for x in LAST["sdpo"]], [0.0] * 3)
  assert by_label["sdpo"]["mean"] == "+70.0" and by_label["sdpo"]["seeds"] == 3
  assert by_label["sdpo"]["interval"] == f"[{100 * want.low:+.1f}, {100 * want.high:+.1f}]"
  single = workdir(tmp_path / "single", unseen=False)
  gain = {"": 0.3, "_low": -0.1, "_high": 0.5}
  add_to_last(single, **{f"eval__heldout__gain{end}": value for end, value in gain.items()})
  plot = forest.gains(report.read_runs([single]))
  assert plot["splits"][0]["rows"][0]["interval"] == "[-10.0, +50.0]"
  page = Page(report.write_report([single], tmp_path / "out"))
  assert page.has("Gain over the base model") and page.has("+30.0 [-10.0, +50.0]")
  assert not page.has("Difference to")


@pytest.mark.parametrize(
  "low, high, ticks",
  [
    (0, 3, [0, 1, 2, 3]),
    (-12, 31, [-20, -10, 0, 10, 20, 30, 40]),
    (-100, 100, [-100, -50, 0, 50, 100]),
    (0, 0, [0, 1]),
    (0, 900, [0, 500, 1000]),
  ],
)
def test_ticks_are_round_and_enclose_both_ends(low, high, ticks):
  assert forest.ticks_of(low, high) == ticks


# ---- diagnosis -----------------------------------------------------------------------------------


@pytest.fixture
def diagnosed(tmp_path):
  run = workdir(tmp_path / "a run")
  (run / "diagnose").mkdir()
  found = json.loads((ROOT / "results" / "diagnose" / "diagnosis_tinycode.json").read_text())
  (run / "diagnose" / "index.json").write_text(json.dumps(found | {"about": ABOUT}))
  (run / "diagnose" / "index.html").write_text("<!doctype html>")
  return run, found


def test_the_verdict_stands_in_the_report_with_a_link_to_its_page(diagnosed):
  run, found = diagnosed
  page = Page(report.write_report([run], run / "report"))
  assert page.has(f"sdpo: {found['verdict']['outlook']}")
  assert page.has(found["verdict"]["reasons"][0]["text"]) and page.has("the policy's reward")
  assert page.has(ABOUT["feedback"]) and page.has("+41.9")
  (link,) = [a["href"] for tag, a in page.tags if tag == "a" and not a["href"].startswith("#")]
  assert link == "../diagnose/index.html"
  assert "a%20run" in diagnosis(report.read_run(run), run.parent / "out")["link"]


ODD = {
  "verdict": {"outlook": "x", "ranking": 3, "reasons": 4},
  "policy": {"reward": {}, "mixed": {"mean": None}, "responses": "many", "questions": 2},
  "again": {"failed": {"feedback": {"reward": {}, "difference": {"mean": 1}}}},
}


@pytest.mark.parametrize(
  "text", ["{", "[]", '{"verdict": 1}', '{"verdict": {"outlook": "x"}}', json.dumps(ODD)]
)
def test_a_damaged_or_partial_diagnosis_costs_nothing(diagnosed, text, tmp_path):
  run, _ = diagnosed
  (run / "diagnose" / "index.json").write_text(text)
  (run / "diagnose" / "index.html").unlink()
  page = Page(report.write_report([run], tmp_path / "out"))
  assert page.has("Diagnosis before training") == ("outlook" in text)
  assert not page.has("All figures and attempts")


@pytest.mark.parametrize(
  "about",
  [
    {"ended": "soon"},
    {"ended": {"best": {"step": 1}}},
    {"rows": [1], "started": "now", "devices": 3, "versions": "new", "machine": []},
    {"rows": {"train": 7}},
  ],
)
def test_a_run_file_of_another_form_costs_nothing(about, tmp_path):
  run = workdir(tmp_path / "run")
  (run / "run.json").write_text(json.dumps(about))
  page = Page(report.write_report([run], tmp_path / "out"))
  assert page.has("How it was run") or page.has("Settings")


def test_ticks_of_any_range_end():
  assert len(forest.ticks_of(-1e300, 1e300)) <= forest.MOST_TICKS + 1


# ---- system --------------------------------------------------------------------------------------


def test_times_are_shares_of_the_run(tmp_path):
  run = workdir(tmp_path / "run")
  values = {"time__rollout_s": 1.0, "time__update_s": 2.0, "time__other_s": 0.5}
  add_to_last(run, **values, perf__tokens_per_s=1234.0, perf__compiles=2.0, perf__peak_mb=7.5)
  found = system.system(report.read_run(run))  # the run took four seconds
  assert [part["percent"] for part in found["shares"]] == ["25.0", "50.0", "25.0"]
  assert [(row.name, row.share) for row in found["times"]] == [
    ("time/rollout_s", "25.0%"),
    ("time/update_s", "50.0%"),
    ("time/other_s", "12.5%"),
  ]
  figures = dict(found["figures"])
  assert figures["tokens a second, median over steps"] == "1,234"
  assert figures["shapes compiled"] == "2, new ones at steps 2"
  assert figures["perf/peak_mb, most"] == "7.5"


def test_warnings_come_from_their_file_once_else_from_the_log(tmp_path):
  run = add_to_last(workdir(tmp_path / "run"), train__warnings=2)
  assert system.system(report.read_run(run))["warned"] == "1 steps with a warning: 2"
  log = "step 1: the teacher reads 9 responses\nstep 2: the reward fell <b>\nstep 2/9  reward 1\n"
  (run / "run.log").write_text(log + "step 1: not warned\n")
  assert report.read_run(run).warnings == [(2, "the reward fell <b>")]
  line = json.dumps({"step": 2, "sign": "reward", "text": "it fell"}) + "\n"
  (run / "warnings.jsonl").write_text(line * 2 + "{")
  assert report.read_run(run).warnings == [(2, "it fell")]
  assert Page(report.write_report([run], tmp_path / "out")).has("it fell")


def test_flat_curves_are_named_and_not_drawn(tmp_path):
  run = workdir(tmp_path / "run", accuracy=(0.1, 0.2, 0.3, 0.4))
  page = Page(report.write_report([run], tmp_path / "out"))
  assert page.has("The same at all steps: Response length (9).")
  assert not list((tmp_path / "out").glob("rollout_length*"))
