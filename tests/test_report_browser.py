"""The report in a browser: no network, no overflow, letters one can read, search and taps."""

import json
import time

import pytest

from sdpo_jax import report
from sdpo_jax.report import cards
from tests import browser
from tests.test_report import NASTY, kept_texts, rollout, workdir
from tests.test_report_sections import add_to_last

WHY_NOT = browser.missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
MOST_BYTES, MOST_SECONDS = 20_000_000, 3.0  # of the page of a long run


@pytest.fixture(scope="module")
def chromium():
  with browser.opened() as opened:
    yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """The page of two runs, whose texts are hostile and whose labels are long."""
  folder = tmp_path_factory.mktemp("report")
  turns = [
    {"message": "open door", "tokens": 2, "observation": "It is locked.", "reward": 0.0},
    {"message": "use key", "tokens": 2, "observation": None, "reward": 1.0, "valid": False},
  ]
  lines = [
    *(rollout(1, reward=i % 2, task_id=f"train/{i}") for i in range(25)),
    rollout(2, prompt=NASTY, response=NASTY, tokens=[NASTY, "w" * 900], teacher_gap=[1.0, -9]),
    rollout(2, reward=0.5, feedback="a rare word", teacher_context=None, tokens=None),
    rollout(2, turns=turns),
  ]
  first = workdir(folder / "a", rollouts=[(1, lines[:25]), (2, lines[25:])])
  second = workdir(folder / "b", method="grpo", config={"label": "a-long-name-" * 12})
  for run in (first, second):
    kept_texts(run, 0)
    kept_texts(run, 2)
    add_to_last(run, eval__heldout__gain=0.3, time__rollout_s=1.0, time__update_s=1.0)
  return report.write_report([first, second], folder / "out")


@pytest.mark.parametrize("width", [browser.WIDE, browser.NARROW])
def test_a_page_asks_for_nothing_and_fits_its_screen(chromium, page, width):
  chromium.resize(width)
  chromium.open(page)
  measured = chromium.run(
    "document.querySelectorAll('details').forEach(one => { one.open = true });" + browser.MEASURES
  )
  assert measured["inner"] == width >= measured["scroll"]
  assert measured["least"][0] >= 12, measured["least"]
  assert chromium.errors() == []
  assert {url.partition(":")[0] for url in chromium.requests()} <= {"file", "data"}


def shown(chromium):
  return chromium.run("return document.querySelectorAll('#cards .card').length")


def choose(chromium, name, value):
  """Sets a filter, and waits until the cards have been chosen anew."""
  chromium.run(
    "const one = document.getElementById(arguments[0]); one.value = arguments[1];"
    "one.dispatchEvent(new Event('input')); one.dispatchEvent(new Event('change'))",
    name,
    value,
  )
  time.sleep(0.5)  # a search waits for the end of typing


def count_of(chromium):
  return chromium.run("return document.getElementById('count').textContent")


def test_cards_are_drawn_as_asked_for_and_a_search_narrows_them(chromium, page):
  chromium.resize(browser.WIDE)
  chromium.open(page)
  total = len(
    json.loads(chromium.run("return document.getElementById('data').textContent"))["cards"]
  )
  assert shown(chromium) == 10 and count_of(chromium) == f"{total} of {total} match, 10 drawn"
  chromium.run("document.getElementById('further').click()")
  assert shown(chromium) == min(20, total)
  choose(chromium, "text", "RARE word")
  assert shown(chromium) == 1 and count_of(chromium).startswith("1 of")
  choose(chromium, "text", "It is LOCKED")  # what a world said
  assert shown(chromium) == 1
  choose(chromium, "text", "")
  choose(chromium, "reward", "part")
  assert shown(chromium) == 1
  choose(chromium, "taught", "yes")
  assert shown(chromium) == 0
  choose(chromium, "reward", "")
  choose(chromium, "step", "2")
  assert shown(chromium) == 2


def test_hostile_texts_stay_texts_and_tokens_have_the_colours_of_the_legend(chromium, page):
  chromium.resize(browser.WIDE)
  chromium.open(page)
  choose(chromium, "text", "alert('1')")
  # a driver cannot return half a character
  text = chromium.run("return document.querySelector('#cards .card').innerText.toWellFormed()")
  assert "</pre><script>alert('1')</script> &amp; ␀␛[31m" in text
  assert chromium.run("return document.querySelectorAll('#cards script').length") == 0
  assert chromium.errors() == []
  choose(chromium, "text", "train/0")
  drawn = chromium.run(
    "return [...document.querySelectorAll('#cards .card:first-child .token')].map("
    "one => [one.title, one.getAttribute('style')])"
  )
  for (title, style), token in zip(drawn, cards.card(rollout(1))["tokens"], strict=True):
    assert title == token["title"] and style == token["style"]


def test_a_tap_on_a_token_shows_its_number(chromium, page):
  chromium.resize(browser.NARROW)
  chromium.open(page)
  assert (
    chromium.run("""
    const token = document.querySelectorAll('#cards .token')[1];
    token.focus();
    return document.activeElement === token && getComputedStyle(token, '::after').content;
  """)
    == '"-1.25 nats"'
  )


@pytest.mark.slow
def test_the_page_of_a_long_run_is_made_and_opened_fast(chromium, tmp_path):
  run = workdir(tmp_path / "run")
  lines = [
    {"step": i, "time_s": 3.0 * i, "train/reward": i / 1000, "train/loss": 1 / (i + 1)}
    | {"train/generations": 100 * i, "train/sampled_tokens": 9000 * i, "rollout/length": 90.0 + i}
    for i in range(1001)
  ]
  (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (run / "rollouts").mkdir()
  tokens = {"tokens": [" word"] * 100, "teacher_gap": [0.1234] * 100}
  for step in range(1, 1001):
    one = json.dumps(rollout(step, response=" word" * 100, **tokens)) + "\n"
    (run / "rollouts" / f"step_{step:06d}.jsonl").write_text(one * 100)
  begun = time.process_time()
  page = report.write_report([run], tmp_path / "out")
  assert time.process_time() - begun < 20 and page.stat().st_size < MOST_BYTES
  assert "of 100,000 recorded rollouts" in page.read_text(encoding="utf-8")
  chromium.resize(browser.WIDE)
  assert chromium.open(page) < MOST_SECONDS
  assert shown(chromium) == 10 and chromium.errors() == []
