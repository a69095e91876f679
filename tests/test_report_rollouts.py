"""Rollouts in the report: which are read, what a card holds, and what the page carries of them."""

import dataclasses
import json
import types

import numpy as np
import pytest

from sdpo_jax import report, rollout_log
from sdpo_jax.data.batch import Packed
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.report import cards, curves, files, rollouts
from sdpo_jax.report.runs import Run
from tests.test_report import NASTY, Page, rollout, workdir
from tests.test_turns import CHAT, episode


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
  monkeypatch.setattr(curves, "_drawn", lambda *_: b"PNG")


def write_steps(path, steps, each, **changes):
  """Writes a work directory of rollouts alone; task ids are STEP/NUMBER."""
  (path / "rollouts").mkdir(parents=True)
  for step in range(1, steps + 1):
    lines = [rollout(step, task_id=f"{step}/{i}", **changes) for i in range(each)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)
  return path


def run_of(lines):
  return Run(None, {}, {}, [], lines, 0)


def carried(lines):
  """The cards that a page carries of one run's rollouts."""
  text, _ = cards.rollout_data([run_of(lines)])
  return json.loads(text)["cards"]


def test_a_sample_is_spread_over_the_run_and_counts_what_it_leaves_out(tmp_path, monkeypatch):
  run = write_steps(tmp_path / "run", steps=200, each=30)
  parsed = []
  monkeypatch.setattr(
    rollouts, "objects", lambda lines: parsed.append(len(lines)) or files.objects(lines)
  )
  sample = rollouts.sample(run)
  assert sample.recorded == 6000 and sample.skipped == 0
  assert len(parsed) == rollouts.STEPS and sum(parsed) == len(sample.rollouts)
  ids = [line["task_id"] for line in sample.rollouts]
  assert ids[0] == "1/0" and ids[-1] == "200/29"
  steps = [line["step"] for line in sample.rollouts]
  assert max(map(steps.count, steps)) == rollouts.EACH_STEP
  assert max(np.diff(sorted(set(steps)))) <= 5


def test_long_rollouts_take_a_bounded_part_of_each_file(tmp_path, monkeypatch):
  run = write_steps(tmp_path / "run", steps=3, each=10, response="x" * 1000)
  monkeypatch.setattr(rollouts, "READ_BYTES", 3 * 3500)
  ids = [line["task_id"] for line in rollouts.sample(run).rollouts]
  assert ids == [f"{step}/{i}" for step in (1, 2, 3) for i in (0, 9)]
  monkeypatch.setattr(rollouts, "READ_BYTES", 1)
  assert len(rollouts.sample(run).rollouts) == 3  # one at least


@pytest.mark.parametrize(
  "text", ["needle é", "NEEDLE É", 'a "quoted" \\ one', "</script>", "\u2028"]
)
def test_rollouts_that_hold_a_text_are_found(tmp_path, text):
  run = write_steps(tmp_path / "run", steps=3, each=4)
  held = rollout(2, response='before needle é a "quoted" \\ one </script>\u2028 behind')
  apart = rollout(2, status=text)  # not where texts are looked for
  for ascii_only in (True, False):
    with (run / "rollouts" / "step_000002.jsonl").open("a", encoding="utf-8") as file:
      for line in (held, apart):
        file.write(json.dumps(line, ensure_ascii=ascii_only) + "\n")
  sample = rollouts.sample(run, text)
  assert sample.rollouts == [held] * 2 and sample.recorded == 16


def test_the_page_says_how_many_of_how_many_it_carries(tmp_path):
  run = workdir(tmp_path / "run")
  write_steps(run, steps=3, each=20)
  page = Page(report.write_report([run], tmp_path / "out"))
  assert page.has("48 of 60 recorded rollouts are on this page, spread over the run.")
  assert page.has("--find=TEXT") and len(json.loads(data(page))["cards"]) == 48
  page = Page(report.write_report([run], tmp_path / "out", find="2/1"))
  assert page.has("11 of 60 recorded rollouts are on this page, the first ones that hold 2/1.")


def data(page):
  return page.source.split("<script type='application/json' id='data'>")[1].split("</script>")[0]


def test_what_a_page_carries_is_bounded_in_bytes_and_stays_spread(monkeypatch):
  lines = [rollout(step, response="x" * 2000) for step in range(100)]
  whole, shown = cards.rollout_data([run_of(lines)])
  assert shown == [100] and len(whole) <= cards.JSON_BYTES
  monkeypatch.setattr(cards, "JSON_BYTES", 10_000 + len(whole) // 2)
  text, shown = cards.rollout_data([run_of(lines), run_of(lines[:10])])
  steps = [card["step"] for card in json.loads(text)["cards"] if card["run"] == 0]
  assert len(text) <= cards.JSON_BYTES and shown[1] == 10 and 15 < len(steps) < 30
  assert steps[0] == 0 and steps[-1] == 99 and max(np.diff(steps)) < 15


def test_a_long_response_loses_its_middle_and_says_so():
  long = rollout(1, tokens=["ab"] * 9000, teacher_gap=[0.12345] * 9000, prompt="p" * 50_000)
  (card,) = carried([long])
  assert len(card["tokens"]) == cards.TOKENS_KEPT + 1 == len(card["gaps"])
  assert "[5,000 tokens left out]" in card["tokens"][cards.TOKENS_KEPT // 2]
  assert "[30,000 characters left out]" in card["prompt"] and set(card["gaps"]) == {0.123, None}


def test_the_json_of_a_page_ends_no_element_and_is_read_back():
  hostile = NASTY + "\u2028\u2029<!--<script>"
  text, _ = cards.rollout_data([run_of([rollout(NASTY, response=hostile, tokens=None)])])
  assert text.isascii() and not set("<>&") & set(text)
  (card,) = json.loads(text)["cards"]
  assert card["response"] == hostile.replace("\x00", "␀").replace("\x1b", "␛")


def test_odd_values_are_carried_as_what_they_are_not():
  odd = {"reward": float("nan"), "tokens": [None, 3], "teacher_gap": [float("inf"), "x"]}
  odd |= {
    "prompt": ["a"],
    "turns": [1],
    "counterfactual_contexts": {"a": 1},
    "step": [float("nan")],
  }
  (card,) = carried([odd])
  assert card["reward"] == "?" and card["tokens"] == ["", "3"] and card["gaps"] == [None, None]
  assert card["turns"] == [] and card["alternatives"] == [] and card["step"] == [cards.NONE]


# ---- episodes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played():
  """The line of an episode whose teacher reads something before its second turn alone."""
  rollout = episode(0)
  count, turns = len(rollout.tokens), len(rollout.turns)
  context = Context(turns=("", "HINT", *[""] * (turns - 2)))
  gap_BR = np.arange(count, dtype=np.float32)[None] / 100
  scores = types.SimpleNamespace(logp_BR=np.zeros((1, count)), logp_teacher_BR=gap_BR)
  packed = Packed(None, [rollout], ([context],), {})
  (line,) = rollout_log.rollout_lines(3, packed, scores, CHAT, kept=1)
  return rollout, json.loads(json.dumps(line))


def test_a_rollout_file_holds_the_turns_of_an_episode(played):
  rollout, line = played
  assert [turn["observation"] for turn in line["turns"]] == [t.observation for t in rollout.turns]
  assert [turn["reward"] for turn in line["turns"]] == [t.reward for t in rollout.turns]
  assert sum(turn["tokens"] for turn in line["turns"]) == len(line["tokens"])
  assert [turn.get("teacher_context") for turn in line["turns"][:3]] == [None, "HINT", None]
  messages = [CHAT.response_text(s.completion.tokens) for s in rollout.sampled]
  assert [turn["message"] for turn in line["turns"]] == messages


def test_a_turn_that_the_world_did_not_answer_has_no_observation(played):
  rollout, _ = played
  cut = dataclasses.replace(rollout, turns=rollout.turns[:-1])
  *_, before, last = rollout_log._turns(cut, None, CHAT)
  assert last["observation"] is None and not last["valid"] and last["reward"] == before["reward"]


def test_an_episode_is_shown_turn_by_turn_with_its_own_tokens(played, tmp_path):
  rollout, line = played
  card = cards.card(line)
  assert len(card["turns"]) == len(rollout.turns)
  joined = ["".join("\n".join(t["lines"]) for t in turn["tokens"]) for turn in card["turns"]]
  assert joined == ["".join(CHAT.token_strings(s.completion.tokens)) for s in rollout.sampled]
  second = card["turns"][1]["tokens"][0]["title"]
  assert second == f"{len(rollout.sampled[0].completion.tokens) / 100:+.2f} nats"
  (tmp_path / "page.html").write_text(
    report.template("cards.html").render(cards=[card], legend=report.legend())
  )
  page = Page(tmp_path / "page.html")
  assert page.has("What the teacher read of this turnHINT") and page.has("turn 2")
  assert page.has(" ".join(rollout.turns[0].observation.split()))
  (carried_card,) = carried([line])
  assert carried_card["tokens"] is None and carried_card["turns"][1]["teacher_context"] == "HINT"


def test_turns_without_gaps_are_plain_messages_and_many_lose_their_middle(played):
  _, line = played
  assert cards.record(line | {"teacher_gap": None})["turns"][0]["tokens"] is None
  many = line | {"turns": [dict(line["turns"][0], message=str(i)) for i in range(100)]}
  (card,) = carried([many])
  assert card["turns_left_out"] == 60
  assert [turn["message"] for turn in card["turns"]][19:21] == ["19", "80"]


def test_a_text_is_found_in_every_letter_case_and_in_turns(tmp_path):
  folder = tmp_path / "rollouts"
  folder.mkdir()
  turn = {"message": "look", "observation": "You see a CAFÉ.", "teacher_context": "Go there."}
  lines = [
    {"response": "café one"},
    {"response": "CAFÉ two"},
    {"turns": [turn]},
    {"response": "tea"},
  ]
  (folder / "step_000001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  for find, count in (("café", 3), ("CAFÉ", 3), ("go There", 1), ("TEA", 1), ("milk", 0)):
    assert len(rollouts.sample(tmp_path, find).rollouts) == count, find


def test_every_run_of_many_has_a_card():
  long = {"step": 1, "response": "\u8a9e" * 27_000, "reward": 1.0}
  runs = [types.SimpleNamespace(rollouts=[long]) for _ in range(45)]
  text, shown = cards.rollout_data(runs)
  assert shown == [1] * 45 and len(text) < cards.JSON_BYTES


def test_a_card_without_a_script_is_short():
  rollout = {"response": "x" * 9_000, "tokens": ["x"] * 9_000, "teacher_gap": [0.1] * 9_000}
  short = cards.short_card(rollout)
  assert len(short["tokens"]) == cards.SHORT_TOKENS + 1  # what is left out is one more
  assert len(short["response"]) < 2 * cards.SHORT_TEXT


@pytest.mark.parametrize("value", [10**400, float("nan"), True, "1", None])
def test_what_is_no_number_is_a_question_mark(value):
  assert cards.reward_badge(value) == ("part", "?")
