"""Pairwise judging: both orders, the server's verdicts, and what a server does wrong."""

import contextlib
import http.server
import json
import threading
import time

import pytest

from sdpo_jax.envs import pairwise_judge
from sdpo_jax.envs.pairwise import Pairwise
from sdpo_jax.envs.pairwise_judge import ServerJudge, in_both_orders, read_verdict
from tests import fakes


def first_is_better(prompt, a, b):
  return "a"


def second_is_better(prompt, a, b):
  return "b"


def ties_in_one_order(prompt, a, b):
  return "a" if a == "good" else "tie"


@pytest.mark.parametrize(
  "judge, a, b, verdict",
  [
    (fakes.longer_is_better, "longer", "long", "a"),
    (fakes.longer_is_better, "long", "longer", "b"),
    (fakes.longer_is_better, "one", "two", "tie"),
    (first_is_better, "good", "bad", "tie"),
    (second_is_better, "good", "bad", "tie"),
    (ties_in_one_order, "good", "bad", "tie"),
  ],
)
def test_an_answer_wins_only_in_both_orders(judge, a, b, verdict):
  asked = []

  def noting(prompt, first, second):
    asked.append((prompt, first, second))
    return judge(prompt, first, second)

  assert in_both_orders(noting, "Which?", a, b) == verdict
  assert asked == [("Which?", a, b), ("Which?", b, a)]


def test_another_word_is_no_verdict():
  with pytest.raises(ValueError, match=r"returned 'A', not one of \['a', 'b', 'tie'\]"):
    in_both_orders(lambda prompt, a, b: "A", "Which?", "x", "y")


def test_the_last_verdict_of_a_text_counts():
  assert read_verdict("[[A]] would be rash.\n[[B]]") == "b"
  assert [read_verdict(f"So: [[{letter}]]") for letter in "AC"] == ["a", "tie"]
  with pytest.raises(ValueError, match="gave no verdict: 'Both are fine.'"):
    read_verdict("Both are fine.")


def test_rewards_are_win_tie_and_loss():
  env = Pairwise(judge="tests.fakes:longer_is_better")
  row = {"idx": 4, "prompt": "Weather?", "reference": "Rain.", "category": "small talk"}
  task = env.task_from_row(row, "test")
  assert (task.id, task.data["kind"]) == ("pairwise/test/4", "small talk")
  assert env.prompt(task) == [{"role": "user", "content": "Weather?"}]
  rewards = [env.judge(task, text).reward for text in ("It rains.", "Snow.", "Dry", "")]
  assert rewards == [1.0, 0.5, 0.0, 0.0]
  thought = "<think>a long thought is no part of it</think>"
  assert env.judge(task, f"{thought}Dry").reward == 0.0
  with pytest.raises(ValueError, match="'reference' is missing"):
    env.task_from_row({"idx": 0, "prompt": "Weather?"}, "test")
  with pytest.raises(ValueError, match="config.env.judge='nowhere:judge' cannot.*be 'server' or"):
    Pairwise(judge="nowhere:judge")


class Server(http.server.ThreadingHTTPServer):
  """Answers each request with the next of `replies`, the last one again and again.

  A reply is (status, text), or seconds of silence.
  """

  def __init__(self, *replies):
    super().__init__(("127.0.0.1", 0), Handler)
    self.replies, self.requests = list(replies), []
    self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    self.server.requests.append((self.path, self.headers, body))
    replies = self.server.replies
    reply = replies.pop(0) if len(replies) > 1 else replies[0]
    if isinstance(reply, float):
      time.sleep(reply)
      reply = (200, "{}")
    self.send_response(reply[0])
    self.end_headers()
    with contextlib.suppress(OSError):  # who asked may be gone
      self.wfile.write(reply[1].encode())

  do_POST = do_GET

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def serving(*replies):
  server = Server(*replies)
  threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()


def saying(text):
  return 200, json.dumps({"choices": [{"message": {"content": text}}]})


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
  monkeypatch.setattr(pairwise_judge, "_PAUSE_S", 0.001)
  monkeypatch.setenv("no_proxy", "127.0.0.1")


def judge_at(url, **changes):
  settings = {"timeout_s": 5.0, "retries": 2, "key_variable": ""}
  return ServerJudge(url, "judge", **settings | changes)


def test_a_server_is_asked_in_the_form_of_openai(monkeypatch):
  monkeypatch.setenv("JUDGES_KEY", "k")
  with serving(saying("The first is wrong.\n[[B]]")) as server:
    assert judge_at(server.url, key_variable="JUDGES_KEY")("What is {x}?", "one{", "two") == "b"
  ((path, headers, body),) = server.requests
  request = json.loads(body)
  assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer k"
  assert (request["model"], request["temperature"]) == ("judge", 0)
  system, user = request["messages"]
  assert "[[A]]" in system["content"]
  places = [user["content"].index(text) for text in ("What is {x}?", "one{", "two")]
  assert places == sorted(places)


@pytest.mark.parametrize("fault", [(503, "busy"), (429, ""), (200, "no JSON")])
def test_a_passing_fault_is_tried_again(fault):
  with serving(fault, fault, saying("[[C]]")) as server:
    assert judge_at(server.url)("Which?", "x", "y") == "tie"
  assert len(server.requests) == 3


@pytest.mark.parametrize(
  "reply, changes, attempts, says",
  [
    ((500, "broken\nhere"), {}, 3, r"HTTP 500 'broken\\nhere' \(3 attempts of at most 5 s\)"),
    ((401, "who are you"), {}, 1, r"HTTP 401 'who are you' \(1 attempts"),
    (1.0, {"timeout_s": 0.1, "retries": 1}, 2, r"timed out \(2 attempts of at most 0.1 s\)"),
    ((200, '{"choices": []}'), {}, 1, "sent \"{'choices': "),
  ],
)
def test_what_a_server_does_wrong_is_one_line(reply, changes, attempts, says):
  with serving(reply) as server:
    with pytest.raises(RuntimeError, match=says) as error:
      judge_at(server.url, **changes)("Which?", "x", "y")
  assert server.url in str(error.value) and "\n" not in str(error.value)
  assert len(server.requests) == attempts


def test_a_server_that_is_not_there_is_named_before_anything_is_sampled():
  with serving((200, "{}")) as server:
    url = server.url
  with pytest.raises(RuntimeError, match=f"judge at {url} cannot be asked: .*refused"):
    Pairwise(url=url, model="judge").open()
  models = json.dumps({"data": [{"id": "another"}]})
  with serving((200, models)) as server:
    with pytest.raises(RuntimeError, match=r"has no model 'judge'; it has \['another'\]"):
      Pairwise(url=server.url, model="judge").open()
    Pairwise(url=server.url, model="another").open()


def test_settings_that_cannot_be_used_are_named():
  with pytest.raises(ValueError, match="config.env.url='file:///etc' must begin with http"):
    Pairwise(url="file:///etc")
  with pytest.raises(ValueError, match="config.env.key_variable='NOWHERE_KEY': there is no such"):
    Pairwise(key_variable="NOWHERE_KEY")
