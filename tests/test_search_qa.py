"""Tests the search world: its protocol, exact match, the index, the questions, a server."""

import concurrent.futures
import http.server
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading

import pytest

from sdpo_jax.envs.agents import search_corpus, search_episode, search_retriever
from sdpo_jax.envs.agents.processes import EngineFailed
from sdpo_jax.envs.agents.search_answers import golden_answers, is_match, normalise
from sdpo_jax.envs.agents.search_episode import SearchEpisode, action_of
from sdpo_jax.envs.agents.search_qa import SearchQA, SearchQARows
from sdpo_jax.errors import SettingError

# Not `importorskip`, which would import bm25s, and with it jax's default device, here.
needs_bm25s = pytest.mark.skipif(
  importlib.util.find_spec("bm25s") is None, reason="needs the extra search"
)
HOSTILE = ["", "\x00", "a\nb", "x" * 10**5, "<search>" * 10**4, "\ud800", "<search>\ud800</search>"]


# Worked by hand: lower case, punctuation away, the words a, an, the away, white space collapsed.
@pytest.mark.parametrize(
  "text, expected",
  [
    ("The Beatles!", "beatles"),
    ("U.S.", "us"),
    ("3-1", "31"),
    ("a", ""),
    ("An the A", ""),
    ("theatre an-d anthem", "theatre and anthem"),
    ("A.B.", "ab"),
    ("the.the", "thethe"),
    ("  New\t\nYork  ", "new york"),
    ("$1,000.50", "100050"),
    ("Beyoncé’s", "beyoncé’s"),  # only ASCII punctuation goes
    ("rock 'n' roll (a song)", "rock n roll song"),
    ("ÉCOLE", "école"),
    ("__init__", "init"),
    ("\x00", "\x00"),
    ("\ud800.", "\ud800"),
  ],
)
def test_answers_are_normalised_as_squads_are(text, expected):
  assert normalise(text) == expected


def test_any_golden_answer_will_do_and_none_is_empty():
  assert is_match("the u.s.", ["America", "US"]) and not is_match("u s", ["US"])
  assert not is_match("US of A.", ["US"])
  assert golden_answers({"golden_answers": "Paris"}) == ["Paris"]
  row = {"reward_model": {"style": "rule", "ground_truth": {"target": ["Paris", "City of Light"]}}}
  assert golden_answers(row) == ["Paris", "City of Light"]


@pytest.mark.parametrize(
  "row, field",
  [
    ({}, "golden_answers"),
    ({"golden_answers": []}, "golden_answers"),
    ({"golden_answers": ["Paris", "the"]}, "golden_answers"),
    ({"golden_answers": [3]}, "golden_answers"),
    ({"golden_answers": {"Paris": 1}}, "golden_answers"),
    ({"reward_model": {"ground_truth": {}}}, "reward_model.ground_truth.target"),
    ({"reward_model": {"ground_truth": "Paris"}}, "reward_model.ground_truth.target"),
    ({"reward_model": "Paris"}, "reward_model"),
  ],
)
def test_a_row_without_usable_answers_names_its_field(row, field):
  with pytest.raises(ValueError, match=f"'{field}'"):
    golden_answers(row)


@pytest.mark.parametrize(
  "message, action",
  [
    ("<search> a b </search>", ("search", "a b", True)),
    ("I know. <ANSWER>x</Answer> bye", ("answer", "x", True)),
    ("<answer>x</answer><search>y</search>", ("search", "y", False)),
    ("<search>a</search><search>b</search>", ("search", "a", False)),
    ("<answer>x</answer> <answer>y</answer>", ("answer", "x", False)),
    ("<search>a <answer>x</answer>", ("answer", "x", False)),
    ("<search>a\nb</search>", ("search", "a\nb", True)),
    ("<search> </search>", ("search", "", False)),
    ("search", ("", "", False)),
    ("</search><search>", ("", "", False)),
    ("<think><search>a</search></think><answer>x</answer>", ("answer", "x", True)),
    ("<think><search>a</search>", ("", "", False)),
  ],
)
def test_an_action_is_the_first_complete_search_else_answer(message, action):
  assert action_of(message) == action


def test_an_episode_searches_answers_and_ends():
  shown = ['"Title"\nText.', "Bare"]
  episode = SearchEpisode("Who?", ["The Who"], lambda query: shown if query == "who" else [], 3)
  (message,) = episode.prompt()
  assert message["content"].endswith("Question: Who?") and "3 turns" in message["content"]
  found = '<information>Doc 1(Title: "Title") Text.\nDoc 2(Title: Bare)</information>'
  assert episode.step("<search>who</search>") == (found, 0.0, False, True)
  assert episode.step("<search>?</search>") == (search_episode.NOTHING, 0.0, False, True)
  assert episode.step("<answer>who!</answer>") == (search_episode.RIGHT, 1.0, True, True)
  wrong = SearchEpisode("Who?", ["Who"], None, 3).step("<answer>Me</answer>")
  assert wrong == (search_episode.WRONG, 0.0, True, True)


def test_the_last_turn_looks_nothing_up_and_says_so():
  episode = SearchEpisode("Who?", ["Who"], None, 2)  # to search would raise
  assert episode.step("hm") == (search_episode.INVALID, 0.0, False, False)
  turn = episode.step("<search>who</search>")
  assert turn == ("The 2 turns are over without an answer.", 0.0, True, True)
  last = SearchEpisode("Who?", ["Who"], None, 1).step("<answer>Who</answer>")
  assert (last.reward, last.done) == (1.0, True)


def test_questions_are_dealt_out_by_template_and_by_hash():
  world = search_corpus.make_world(0, 400)
  assert len(world.passages) == len(set(world.passages)) == 400
  assert world == search_corpus.make_world(0, 400) != search_corpus.make_world(1, 400)
  questions = {
    split: [search_corpus.make_question(world, 0, split, i) for i in range(150)]
    for split in search_corpus.SPLITS
  }
  kinds = {split: {q.template.kind for q in asked} for split, asked in questions.items()}
  assert all(names == {"one hop", "two hops", "comparison"} for names in kinds.values())
  templates = {split: {q.template for q in asked} for split, asked in questions.items()}
  assert not templates["unseen"] & (templates["train"] | templates["tune"] | templates["heldout"])
  texts = {split: {q.text for q in asked} for split, asked in questions.items()}
  assert not texts["train"] & (texts["tune"] | texts["heldout"]) and len(texts["train"]) > 130
  assert not texts["tune"] & texts["heldout"]


def test_a_question_is_answered_by_the_passages():
  """Follows the queries through the passages' texts alone."""
  world = search_corpus.make_world(3, 300)
  passages = {p.partition("\n")[0].strip('"'): p for p in world.passages}
  for index in range(60):
    question = search_corpus.make_question(world, 3, "train", index)
    names = [max((n for n in passages if q.startswith(n)), key=len) for q in question.queries]
    text = " ".join(passages[name] for name in names)
    assert question.answer in text and names[0] in question.text


@pytest.fixture(scope="module")
def env():
  if importlib.util.find_spec("bm25s") is None:
    pytest.skip("needs the extra search")
  env = SearchQA(size=2000)
  env.open()
  yield env
  env.close()


def test_a_scripted_player_wins_every_question(env):
  def play(task):
    episode = env.start(task)
    turns = [episode.step(message) for message in env.walkthrough(task)]
    episode.close()
    return task, turns

  tasks = [env.task(split, index) for split in ("train", "unseen") for index in range(20)]
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    for task, turns in threads.map(play, tasks):
      assert turns[-1] == (search_episode.RIGHT, 1.0, True, True)
      seen = " ".join(turn.observation for turn in turns[:-1])
      assert task.data["answers"][0] in seen or task.data["kind"] == "comparison"


def test_a_dead_process_costs_one_search(env):
  before = env.find("river")
  os.kill(env._index._pool.pids()[0], signal.SIGKILL)
  with pytest.raises(EngineFailed, match="the search index: its process ended"):
    env.find("river")
  assert env.find("river") == before


def test_a_random_player_seldom_wins(env):
  rng, won = random.Random(0), 0.0
  for index in range(100):
    episode, done = env.start(env.task("train", index)), False
    while not done:
      name = rng.choice(rng.choice(list(env._world.names.values())))
      kind = rng.choice(["search", "answer"])
      turn = episode.step(f"<{kind}>{name}</{kind}>")
      done = turn.done
    won += turn.reward
  assert won <= 5


@pytest.mark.parametrize("message", HOSTILE, ids=repr)
def test_any_text_is_an_action(env, message):
  task = env.task("train", 0)
  episode = env.start(task)
  episode.step(message)
  assert not episode.step(f"<search>{message}</search>").done
  assert episode.step(env.walkthrough(task)[-1]).reward == 1.0


@needs_bm25s
def test_search_is_deterministic_and_finds_only_what_shares_a_word():
  texts = ["red fox", "blue fox", "red fox", "green bird", "the of"]
  index = search_retriever.Index(texts, k1=0.9, b=0.4, stem=False)
  try:
    assert index.find("red", 10) == [0, 2] and index.find("fox", 10) == [0, 1, 2]
    assert index.find("fox", 2) == [0, 1] and index.find("blue fox", 1) == [1]
    assert index.find("unicorn", 3) == index.find("", 3) == index.find("the", 3) == []
    assert index.find("unicorn bird", 1000) == [3]
    assert [index.find("red bird", 3) for _ in range(3)] == [[3, 0, 2]] * 3
  finally:
    index.close()


def test_a_child_hides_jax_and_this_process_has_no_bm25s(env):
  assert env.find("river") and "bm25s" not in sys.modules
  code = (
    "import importlib.util, json, sys\n"
    "spec = importlib.util.spec_from_file_location('worker', sys.argv[1])\n"
    "worker = importlib.util.module_from_spec(spec)\n"
    "spec.loader.exec_module(worker)\n"
    "find = worker.start(sys.argv[2], 0.9, 0.4, False)\n"
    "assert find(['fox', 3]) == [0]\n"
    "print(sys.modules['jax'], 'jaxlib' in sys.modules)\n"
  )
  corpus = env._index._folder.name + "/one.jsonl"
  with open(corpus, "w") as file:
    file.write(json.dumps("a fox"))
  command = [sys.executable, "-c", code, search_retriever.search_worker.__file__, corpus]
  result = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert result.stdout.split() == ["None", "False"], result.stderr


class Retriever(http.server.BaseHTTPRequestHandler):
  """Stands in for Search-R1's server."""

  def do_POST(self):
    asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    assert self.path == "/retrieve" and asked["return_scores"] is True
    (query,) = asked["queries"]
    hits = [{"document": {"contents": f'"T{i}"\n{query}'}, "score": 1.0} for i in range(9)]
    reply = {"result": [hits[: asked["topk"]]]}
    if query == "garbage":
      reply = {"result": [[{"document": {"contents": 3}}]]}
    elif query == "nothing":
      reply = {"detail": "?"}
    self.send_response(500 if query == "broken" else 200)
    self.end_headers()
    self.wfile.write(json.dumps(reply).encode())

  def log_message(self, *args):
    pass


def test_a_server_answers_in_search_r1s_protocol():
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Retriever)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    env = SearchQARows(url=f"http://127.0.0.1:{server.server_port}/retrieve")
    env.open()
    row = {"idx": 4, "question": " Who? ", "golden_answers": ["Me"], "data_source": "nq"}
    task = env.task_from_row(row, "test")
    assert (task.id, task.prompt, task.data["kind"]) == ("search_qa/test/4", "Who?", "nq")
    seen = env.start(task).step("<search>ab \ud800</search>").observation
    assert (
      seen
      == "<information>"
      + "\n".join(f'Doc {i + 1}(Title: "T{i}") ab ?' for i in range(3))
      + "</information>"
    )
    for query, words in [("garbage", "no text"), ("nothing", "no list"), ("broken", "500")]:
      with pytest.raises(RuntimeError, match=words):
        env.start(task).step(f"<search>{query}</search>")
  finally:
    server.shutdown()
    server.server_close()
  with pytest.raises(RuntimeError, match="does not answer"):
    env.open()


@needs_bm25s
def test_a_corpus_of_ones_own_is_read_or_refused(tmp_path):
  pytest.importorskip("Stemmer")
  path = tmp_path / "corpus.jsonl"
  path.write_text(json.dumps({"id": "1", "contents": '"Foxes"\nThey were running.'}) + "\n\n")
  env = SearchQARows(corpus=str(path), stem=True)
  try:
    assert env.find("run fox") == ['"Foxes"\nThey were running.']
  finally:
    env.close()
  for line, words in [("{", "not JSON"), ("[]", "no object|not an object"), ("{}", "'contents'")]:
    path.write_text(json.dumps({"contents": "x y"}) + "\n" + line)
    with pytest.raises(SettingError, match=f"line 2: .*{words}|line 2.*({words})"):
      SearchQARows(corpus=str(path))
  path.write_text("")
  with pytest.raises(SettingError, match="holds no passage"):
    SearchQARows(corpus=str(path))
  with pytest.raises(SettingError, match="No such file"):
    SearchQARows(corpus=str(tmp_path / "other"))


@pytest.mark.parametrize(
  "settings, words",
  [
    ({}, "either config.env.corpus"),
    ({"corpus": "a", "url": "http://b"}, "either config.env.corpus"),
    ({"url": "b:80"}, "http://"),
    ({"url": "http://b", "stem": True}, "config.env.stem"),
    ({"url": "http://b", "limit": 0}, "config.env.limit=0"),
  ],
)
def test_wrong_settings_are_refused(settings, words):
  with pytest.raises(SettingError, match=words):
    SearchQARows(**settings)


@needs_bm25s
@pytest.mark.parametrize("size", [99, 10_001])
def test_a_world_has_bounds(size):
  with pytest.raises(SettingError, match="must be from 100 to 10000"):
    SearchQA(size=size)


def test_what_is_missing_is_named_with_its_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SettingError, match=r"bm25s.*pip install 'sdpo_jax\[search\]'"):
    SearchQA()
  SearchQARows(url="http://b/retrieve")  # needs nothing
