"""The last checkpoints of a grid: what is kept of them, and the tables made of that."""

import json
import pathlib
import random

import numpy as np
import pytest

from sdpo_jax import final_scores, stats
from sdpo_jax.summary.finals import finals

QUESTIONS, SAMPLES = 6, 4


def write_evaluation(workdir: pathlib.Path, seed: int) -> dict[str, np.ndarray]:
  """Writes an evaluation as --mode=eval does; returns its rewards, [question, sample], by split."""
  dice = random.Random(seed)
  directory = workdir / "eval" / "step_000240"
  directory.mkdir(parents=True)
  rewards, figures = {}, {}
  for split in ("heldout", "unseen"):
    rewards[split] = np.array([[dice.randrange(2) for _ in range(SAMPLES)] for _ in range(6)])
    lines = [question_line(place, row) for place, row in enumerate(rewards[split])]
    dice.shuffle(lines)
    for decoding, kept in (("sampled", SAMPLES), ("greedy", 1)):
      text = "".join(json.dumps(cut(line, kept)) + "\n" for line in lines)
      (directory / f"tinycode.{split}.{decoding}.jsonl").write_text(text)
    name = f"eval/tinycode.{split}"
    figures |= {f"{name}/entropy": 0.25 + seed, f"{name}/length_mean": 10.0}
    figures |= {f"{name}/length_p99": 24.0, f"{name}/cut_off": 0.5}
  (workdir / "eval" / "step_000240.json").write_text(json.dumps(figures))
  return rewards


def question_line(place: int, rewards) -> dict:
  responses = [{"reward": float(reward), "status": "scored"} for reward in rewards]
  return {"question": place, "id": f"q{place}", "responses": responses}


def cut(line: dict, kept: int) -> dict:
  return line | {"responses": line["responses"][:kept]}


@pytest.fixture
def grid(tmp_path):
  """Returns (entries of scores.json, the raw rewards by run)."""
  entries, raw = {}, {}
  for place, (arm, seed) in enumerate([("sdpo", 0), ("grpo", 0), ("sdpo", 1), ("grpo", 1)]):
    name = f"{arm}_seed{seed}"
    raw[name] = write_evaluation(tmp_path / name, place)
    argument = f"--config=configs/tinycode.py:method={arm},seed={seed}"
    splits = final_scores.collect(tmp_path / name)
    entries[name] = {"arguments": [argument], "tuning": None, "splits": splits}
  return json.loads(json.dumps(entries)), raw


def test_scores_are_those_of_the_lines(grid, tmp_path):
  entries, raw = grid
  for name, entry in entries.items():
    for split, scores in entry["splits"].items():
      rewards = raw[name][split]
      assert scores["reward"] == list(rewards.mean(axis=1))
      assert scores["solved"] == list(rewards.sum(axis=1))
      assert scores["judged"] == [SAMPLES] * QUESTIONS
      assert scores["greedy"] == list(rewards[:, 0])
      assert scores["cut_off"] == 0.5 and scores["length_mean"] == 10.0
  assert final_scores.collect(tmp_path / "no run") == {}


def test_the_tables_equal_a_computation_from_the_raw_lines(grid):
  entries, raw = grid
  _, table, compared = finals(entries)
  rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")[2:]]
  assert [row[:2] for row in rows] == [
    [split, f"`{arm}`"] for split in ("heldout", "unseen") for arm in ("sdpo", "grpo")
  ]
  reward_QS = {
    (split, arm): np.stack([raw[f"{arm}_seed{s}"][split].mean(axis=1) for s in (0, 1)], axis=1)
    for split in ("heldout", "unseen")
    for arm in ("sdpo", "grpo")
  }
  for row in rows:
    split, arm = row[0], row[1].strip("`")
    mean, low, high = stats.mean_interval(reward_QS[split, arm])
    assert row[2] == f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    any_right = [(raw[f"{arm}_seed{s}"][split].sum(axis=1) > 0).mean() for s in (0, 1)]
    assert row[5].startswith(f"{100 * np.mean(any_right):.1f} ")
  lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compared.split("\n")[2:]]
  p_values = []
  for line in lines:
    if line[2] == f"avg@{SAMPLES}":
      split = line[0]
      difference = stats.paired_bootstrap(reward_QS[split, "sdpo"], reward_QS[split, "grpo"])
      assert float(line[3]) == pytest.approx(100 * difference.difference, abs=0.05)
      assert line[5] == f"{difference.p_value:.4f}"
    p_values.append(float(line[5]))
  assert [float(line[6]) for line in lines] == pytest.approx(stats.holm(p_values), abs=5e-4)


def test_arms_are_compared_over_the_seeds_that_both_have(grid):
  entries, raw = grid
  entries["sdpo_seed1"]["arguments"] = ["--config=configs/tinycode.py:method=sdpo,seed=7"]
  _, _, compared = finals(entries)
  alone = [raw[f"{arm}_seed0"]["heldout"].mean() for arm in ("sdpo", "grpo")]
  line = next(x for x in compared.split("\n") if f"avg@{SAMPLES}" in x)
  difference = float(line.split("|")[4])
  assert difference == pytest.approx(100 * (alone[0] - alone[1]), abs=0.05)
  entries["sdpo_seed0"]["arguments"] = ["--config=configs/tinycode.py:method=sdpo,seed=8"]
  assert len(finals(entries)) == 2  # no seed is left that both have: no table of differences


def test_a_question_without_a_verdict_is_refused(grid):
  entries, _ = grid
  entries["sdpo_seed1"]["splits"]["heldout"]["reward"][2] = None
  with pytest.raises(ValueError, match="sdpo: a question has no verdict"):
    finals(entries)
