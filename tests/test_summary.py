"""RESULTS.md: it is what the command writes, and its tables equal what is worked out by hand."""

import json
import pathlib

from sdpo_jax import summary

ROOT = pathlib.Path(__file__).parent.parent


def test_the_committed_results_page_is_what_the_command_writes():
  committed = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
  assert summary.text(ROOT) == committed, "run python -m sdpo_jax.experiment --summary"


def test_every_plot_and_note_of_results_is_on_the_page():
  page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
  for path in (ROOT / "results").glob("*/*"):
    if path.suffix == ".png":
      assert f"({path.relative_to(ROOT)})" in page
    elif path.name == "notes.md":
      assert path.read_text(encoding="utf-8").strip() in page


def point(step, score, *, tokens=None):
  generated = {} if tokens is None else {"train/generations": tokens // 10}
  return {
    "step": step,
    "time_s": 10.0 * step,
    "eval/heldout/avg@k": score,
    "eval/heldout/avg@k_low": score - 0.1,
    "eval/heldout/avg@k_high": score + 0.1,
    **generated,
    **({} if tokens is None else {"train/sampled_tokens": tokens}),
  }


def entry(arm, seed, *scores):
  """An entry of curves.json whose run is evaluated every two steps of 1,000 tokens each."""
  points = [point(2 * i, score, tokens=2000 * i or None) for i, score in enumerate(scores)]
  return {"arguments": [f"--config=configs/x.py:method={arm},seed={seed}"], "points": points}


def test_tables_of_a_grid_by_hand(tmp_path):
  (tmp_path / "results" / "grid").mkdir(parents=True)
  (tmp_path / "results" / "grid" / "notes.md").write_text("- A caveat.\n")
  (tmp_path / "configs" / "experiments").mkdir(parents=True)
  (tmp_path / "configs" / "experiments" / "grid.py").write_text(
    'r"""Compares\ntwo methods.\n\n'
    'Run:    one \\\n          two\nCost:   a minute\n        or two.\n"""\n'
  )
  runs = {
    "a": entry("grpo", 0, 0.2, 0.3, 0.25),
    "b": entry("sdpo", 0, 0.2, 0.2, 0.6),
    "c": entry("sdpo", 1, 0.2, 0.4, 0.8),
  }
  (tmp_path / "results" / "grid" / "curves.json").write_text(json.dumps(runs))
  assert summary.write(tmp_path) == tmp_path / "RESULTS.md"
  page = (tmp_path / "RESULTS.md").read_text()
  for words in (
    "Compares two methods. (`configs/experiments/grid.py`)",
    "```bash\none two\n```",
    "Cost: a minute or two.",
    "Recorded: 3 runs, 0.0 hours in all, 40 to 40 s a run",
    "| heldout | base model |  | 20.0 |  |  |  |",
    "| 60.0 to 80.0 | – |",
    "| heldout | `grpo` | 1 | 25.0 |  | 25.0 to 25.0 | -35.0 (-35.0) |",
    # sdpo reaches grpo's 25 % an eighth of the way from step 2 to step 4; seed 1 has no partner
    "| `sdpo` | 4 | 400 | 4,000 | 20.0 (20.0 to 20.0) | 30.0 (20.0 to 40.0) |",
    "4 (400), 4 (400) | 2 (400) |",
    "never | 1 (200) |",
    "| `sdpo` | 1 | 80.0 [70.0, 90.0] | 400 | 4,000 | 40 | ",
    " 40 | `--config=configs/x.py:method=sdpo,seed=1` |",
    "- A caveat.",
  ):
    assert words in page, words


def test_cost_ratios_of_five_seeds_by_hand(tmp_path):
  """SDPO is as good as GRPO's last 30 % after 1,000 tokens of 4,000; in one seed after 2,000."""
  runs = {f"a{seed}": entry("grpo", seed, 0.2, 0.2, 0.3) for seed in range(5)}
  runs |= {f"b{seed}": entry("sdpo", seed, 0.2, 0.4, 0.8) for seed in range(4)}
  runs["b4"] = entry("sdpo", 4, 0.2, 0.3, 0.8)
  (tmp_path / "results" / "grid").mkdir(parents=True)
  (tmp_path / "results" / "grid" / "curves.json").write_text(json.dumps(runs))
  page = summary.write(tmp_path).read_text()
  assert "| `sdpo` | `grpo` | 5 | 0.25 [0.25, 0.50] | 0.25 [0.25, 0.50] |" in page
  assert "| `grpo` | `sdpo` | 5 | unknown [1.00, ∞], 5 never |" in page


def test_what_is_forgotten_by_hand(tmp_path):
  """One of two seeds loses .4 of the first group's words while the second is taught."""
  folder = tmp_path / "results" / "grid"
  folder.mkdir(parents=True)

  def point(step, first, second):
    scores = {"heldout": 0.5, "stage_1": first, "stage_2": second}
    named = {
      f"eval/{split}/avg@k{end}": x for split, x in scores.items() for end in ("", "_low", "_high")
    }
    return {"step": step, "time_s": 1.0, "train/generations": step, **named} | {
      "train/sampled_tokens": step
    }

  runs = {
    f"one_seed{seed}": {
      "arguments": [f"--config=configs/x.py:method=one,seed={seed}"],
      "points": [point(0, 0.1, 0.1), point(60, 0.9, 0.2), point(120, last, 0.8)],
    }
    for seed, last in ((0, 0.9), (1, 0.5))
  }
  (folder / "curves.json").write_text(json.dumps(runs))
  page = summary.text(tmp_path)
  assert "| arm | after stage | words of stage 1 | words of stage 2 | forgotten |" in page
  assert "| `one` | 1 | 90.0 (90.0 to 90.0) | 20.0 (20.0 to 20.0) | – |" in page
  assert "| `one` | 2 | 70.0 (50.0 to 90.0) | 80.0 (80.0 to 80.0) | 22.2 (0.0 to 44.4) |" in page


def test_right_tokens_by_hand(tmp_path):
  folder = tmp_path / "results" / "oracle"
  folder.mkdir(parents=True)
  share = {
    "policy": 0.5,
    "teacher": 0.75,
    "difference": {"mean": 0.25, "low": 0.1, "high": 0.4},
    "answers": 7,
    "by_part": {"policy": [0.5] * 9 + [None], "teacher": [1.0] * 10},
  }
  read = {
    "right": {"feedback": share},
    "followed": {"failed": share | {"departure": share | {"policy": 0.0}}},
    "alike": 0.125,
    "gap_by_part": [1.0] * 10,
  }
  (folder / "oracle_base.json").write_text(json.dumps({"tokens": read}))
  page = summary.text(tmp_path)
  assert "| base | failed attempts | 7 | 50.0 | 75.0 | +25.0 [+10.0, +40.0] |" in page
  assert "| base | failed attempts, at the departure | 7 | 0.0 | 75.0 |" in page
  assert "| base | right answers; shown: feedback | 7 | 50.0 | 75.0 |" in page
  assert "| base | 12.5 |" in page
  assert f"| base | failed | policy | {'50.0 | ' * 9}– |" in page


def test_how_policies_act_by_hand(tmp_path):
  folder = tmp_path / "results" / "grid"
  folder.mkdir(parents=True)
  runs = {"a": entry("craft", 0, 0.2, 0.3), "b": entry("craft", 1, 0.2, 0.3)}
  (folder / "curves.json").write_text(json.dumps(runs))
  page = summary.text(tmp_path)
  assert "| `craft` |" in page and "invalid turns" not in page  # runs that do not act
  for run, turns, invalid in (("a", 2.0, 0.0), ("b", 3.0, 0.5)):
    end = runs[run]["points"][-1]
    end |= {"rollout/turns": turns, "rollout/invalid_turns": invalid, "craft/aligned": 0.25}
    end |= {"train/sampled_tokens": 60, "train/generations": 8}
  (folder / "curves.json").write_text(json.dumps(runs))
  row = (
    "| `craft` | 2.5 (2.0 to 3.0) | 25.0 (0.0 to 50.0) | 7.5 (7.5 to 7.5) | 25.0 (25.0 to 25.0) |"
  )
  assert row in summary.text(tmp_path)


def test_what_a_model_solves_as_it_is_by_hand(tmp_path):
  folder = tmp_path / "results" / "small"
  folder.mkdir(parents=True)
  name = "eval/rows.test"
  figures = {"suites": {"rows": {"samples": 8}}, f"{name}/questions": 100.0}
  figures |= {f"{name}/length_mean": 71.6, f"{name}/cut_off": 0.125}
  for key, value in (("avg@k", 0.05), ("pass@8", 0.25)):
    figures |= {f"{name}/{key}": value, f"{name}/{key}_low": 0.0, f"{name}/{key}_high": 0.5}
  (folder / "base_rows.json").write_text(json.dumps(figures))
  row = "| `rows.test` | 100 | 8 | 5.0 [0.0, 50.0] | 25.0 [0.0, 50.0] | 72 | 12.5 | – |"
  assert row in summary.text(tmp_path)
  (folder / "base_rows.json").write_text(json.dumps(figures | {f"{name}/format_failed": 200.0}))
  assert "| 72 | 12.5 | 25.0 |" in summary.text(tmp_path)


def test_what_collapsed_and_what_warned_of_it_by_hand(tmp_path):
  folder = tmp_path / "results" / "grid"
  folder.mkdir(parents=True)
  runs = {
    "a": entry("grpo", 0, 0.2, 0.3, 0.4) | {"warned": {}},
    "b": entry("sdpo", 0, 0.2, 0.8, 0.1) | {"warned": {"worse": 4, "length_tail": 3, "gap": 4}},
    "c": entry("sdpo", 1, 0.2, 0.4, 0.8) | {"warned": {"length_tail": 1}},
    "d": entry("opsd", 0, 0.02, 0.01, 0.0) | {"warned": {}},  # never had anything to lose
  }
  (folder / "curves.json").write_text(json.dumps(runs))
  page = summary.text(tmp_path)
  head = "| arm | best | at step | last | collapsed at | worse at | `length_tail` | `gap` |"
  assert head in page
  row = "| `sdpo` | 80.0 (80.0 to 80.0) | 2, 4 | 45.0 (10.0 to 80.0) | 4, – | 4, – | 3, 1 | 4, – |"
  assert row in page
  assert "| `grpo` | 40.0 (40.0 to 40.0) | 4 | 40.0 (40.0 to 40.0) | – | – | – | – |" in page
  assert "| `opsd` | 2.0 (2.0 to 2.0) | 0 | 0.0 (0.0 to 0.0) | – | – | – | – |" in page
  for run in runs.values():  # of an earlier grid nothing is known
    run.pop("warned")
  (folder / "curves.json").write_text(json.dumps(runs))
  assert "collapsed at" not in summary.text(tmp_path).partition("## grid")[2]


def test_a_grid_on_other_splits_has_its_tables_by_hand(tmp_path):
  """As runs on rows of one's own have, of which none is called heldout."""
  folder = tmp_path / "results" / "grid"
  folder.mkdir(parents=True)
  runs = {"a": entry("sdpo", 0, 0.2, 0.3, 0.4), "b": entry("grpo", 0, 0.2, 0.2, 0.3)}
  text = json.dumps(runs).replace("eval/heldout/", "eval/test/")
  (folder / "curves.json").write_text(text)
  page = summary.text(tmp_path)
  assert "| test | `sdpo` | 1 | 40.0 |" in page and "| arm | seed | test | responses |" in page
