"""Engines that ask servers, against stand-ins on loopback: from ids to ids, whatever happens."""

import concurrent.futures
import json
import pathlib
import threading
import time

import jax
import pytest

from sdpo_jax import config, hosts, rollout
from sdpo_jax.engine.answers import sample_seed
from sdpo_jax.engine.remote import ServerSettings
from sdpo_jax.engine.requests import RequestQueue
from sdpo_jax.engine.sglang import SglangEngine
from sdpo_jax.engine.vllm import VllmEngine
from sdpo_jax.errors import Preempted, RunError
from sdpo_jax.model import lora
from sdpo_jax.objectives import build
from sdpo_jax.records import Completion, Request, Sampling
from tests import fakes
from tests.servers import Drop, HashModel, SglangStandIn, Status, VllmStandIn

KINDS = ("vllm", "sglang")
LORA = lora.Lora(2, 4.0, ("q_proj",))
MODEL = HashModel()
STOP = (7, 11, 13)
SAMPLING = Sampling(20, stop_tokens=STOP)
CONFIG, BASE = fakes.toy_model()


@pytest.fixture
def make(tmp_path):
  """make(kind, count) -> (engine, its servers); they end with the test."""
  servers = []

  def begin(kind, count=1, *, mode="raw", start=SAMPLING, **settings):
    for _ in range(count):
      is_vllm = kind == "vllm"
      new = VllmStandIn(MODEL, "toy", mode=mode) if is_vllm else SglangStandIn(MODEL, mode=mode)
      servers.append(new)
    engine = engine_for(kind, servers[-count:], tmp_path, **settings)
    if start is not None:
      engine.start(start, 1024)
    return engine, servers[-count:]

  yield begin
  for server in servers:
    server.stop()


def engine_for(kind, servers, path, **changes):
  urls = tuple(server.url for server in servers)
  settings = ServerSettings(urls, "", str(path / "weights"), 20.0, 20.0, 8)
  return (VllmEngine if kind == "vllm" else SglangEngine)(
    CONFIG, settings._replace(**changes), base=BASE, path="toy", adapters=LORA
  )


def weights_of(kind, seed=1):
  if kind == "vllm":
    return lora.init(CONFIG, LORA, jax.random.key(seed))
  return fakes.toy_model(seed)[1]


def load(engine, kind, seed=1, version=3):
  """Returns what a stand-in makes of the weights that it is then given."""
  params = weights_of(kind, seed)
  engine.load(params, version)
  engine.params = params  # else its arrays are gone, and the engine knows them no more
  (path,) = pathlib.Path(engine.settings.weights_dir).glob(f"{engine.prefix}-*")
  return MODEL.read(path)


def requests(count=6, n=3, sampling=SAMPLING):
  return [Request(("q", i), [i + 1, 2 * i + 1, 5], n, sampling, 1000 + i) for i in range(count)]


def expected(weights, asked, version=3, mode="raw"):
  """Returns {(key, sample): its completion}, from the model itself."""
  done = {}
  for r in asked:
    for s in range(r.n):
      tokens, logp, _, reason = MODEL.sample(
        weights, r.prompt, r.sampling, sample_seed(r.seed, s), mode
      )
      done[r.key, s] = Completion(r.key, s, tokens, logp, reason, version)
  return done


def by_place(completions):
  return {(c.key, c.sample_index): c for c in completions}


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_depends_on_its_seed_and_index_alone(kind, make):
  engine, servers = make(kind, 2)
  weights = load(engine, kind)
  want = expected(weights, requests())
  assert by_place(engine.generate(iter(requests()))) == want
  assert {c.finish_reason for c in want.values()} == {"stop", "length"}
  few = by_place(engine.generate(requests()[3:5]))
  assert few == {place: c for place, c in want.items() if place in few} and len(few) == 6
  one = by_place(engine.generate(requests(n=1)))
  assert one == {(key, s): c for (key, s), c in want.items() if s == 0}
  for server in servers:  # both were asked, and all samples of a request at one place
    assert any("prompt" in (b or ()) or "input_ids" in (b or ()) for _, b, _ in server.asked)
  if kind == "vllm":
    sessions = [{s for _, _, s in server.asked if s} for server in servers]
    assert len(sessions[0] | sessions[1]) == 6 + 6 + 2 + 6 and not sessions[0] & sessions[1]


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_is_asked_at_a_time_than_the_setting_says(kind, make):
  engine, (server,) = make(kind, concurrency=3)
  load(engine, kind)
  now, most, lock = [0], [0], threading.Lock()
  reply = server.reply

  def counted(path, body, session):
    with lock:
      now[0] += 1
      most[0] = max(most[0], now[0])
    time.sleep(0.02)
    try:
      return reply(path, body, session)
    finally:
      with lock:
        now[0] -= 1

  server.reply = counted
  assert len(list(engine.generate(requests()))) == 18
  assert most[0] == 3


def test_every_setting_goes_to_its_field(make):
  sampling = Sampling(
    5, 1.0, 0.9, (7,), 4, 0.25, ((3, 1.5),), stop_strings=("END",), wants_logp=False
  )
  engine, (server,) = make("vllm")
  load(engine, "vllm")
  (c,) = engine.generate([Request("q", [1, 2], 1, sampling, 9)])
  assert c.logp == []
  body = server.asked[-1][1]
  for name, value in {
    "prompt": [1, 2],
    "max_tokens": 5,
    "temperature": 1.0,
    "top_p": 0.9,
    "stop_token_ids": [7],
    "top_k": 4,
    "min_p": 0.25,
    "logit_bias": {"3": 1.5},
    "stop": ["END"],
    "seed": sample_seed(9, 0),
    "ignore_eos": True,
  }.items():
    assert body[name] == value, name
  engine, (server,) = make("sglang")
  load(engine, "sglang")
  list(engine.generate([Request("q", [1, 2], 1, sampling, 9)]))
  settings = server.asked[-1][1]["sampling_params"]
  for name, value in {
    "max_new_tokens": 5,
    "temperature": 1.0,
    "top_p": 0.9,
    "stop_token_ids": [7],
    "top_k": 4,
    "min_p": 0.25,
    "logit_bias": {"3": 1.5},
    "stop": ["END"],
    "sampling_seed": sample_seed(9, 0),
  }.items():
    assert settings[name] == value, name


@pytest.mark.parametrize(
  "kind,changes,message",
  [
    ("vllm", dict(banned_tokens=(3,)), "takes no banned_tokens"),
    ("sglang", dict(banned_tokens=(3,)), "takes no banned_tokens"),
    ("vllm", dict(entropy=True), "takes no entropy"),
    ("vllm", dict(temperature=0.005), "temperature=0.005 .the least is 0.01"),
    ("vllm", dict(logit_bias=((3, 101.0),)), "a logit_bias beyond 100"),
    ("sglang", dict(logit_bias=((3, 1.0),)), "logit_bias with log-probabilities"),
    ("vllm", dict(temperature=0.7), "before the temperature, and temperature=0.7.*processed_logpr"),
    ("sglang", dict(temperature=0.7), "before the temperature.*SGLANG_RETURN_ORIGINAL_LOGPROB"),
  ],
)
def test_what_a_server_cannot_do_exactly_is_refused(kind, changes, message, make):
  sampling = Sampling(4, **changes)
  with pytest.raises(ValueError, match=message):
    make(kind, start=sampling)
  engine, _ = make(kind)
  load(engine, kind)
  with pytest.raises(ValueError, match=message):
    list(engine.generate([Request("q", [1], 1, sampling, 0)]))


def test_log_probabilities_are_those_at_the_temperature_before_cuts(make):
  warm, cut = Sampling(9, 0.7), Sampling(9, top_p=0.8)
  for mode, sampling in (("raw", cut), ("processed", warm), ("scaled", warm), ("scaled", cut)):
    engine, _ = make("vllm", mode=mode, start=sampling)
    weights = load(engine, "vllm")
    asked = requests(2, sampling=sampling)
    assert by_place(engine.generate(asked)) == expected(weights, asked, mode="scaled")
  with pytest.raises(ValueError, match="after cuts and biases, and top_p=0.8"):
    make("vllm", mode="processed", start=cut)
  engine, _ = make("vllm", mode="processed", start=Sampling(9, 0.0, top_p=0.8))  # greedy: no cuts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_server_that_is_killed_and_restarted_loses_no_prompt(kind, count, make):
  engine, servers = make(kind, count)
  weights = load(engine, kind)
  killed, asked = servers[0], []
  lock = threading.Lock()

  def kill(path, body):
    if path not in ("/generate", "/v1/completions"):
      return
    with lock:
      asked.append(body)
      is_last = len(asked) == 5
    if is_last:
      killed.stop()
      threading.Timer(0.3, killed.start).start()
      raise Drop
    time.sleep(0.01)

  killed.before = kill
  asked_for = requests(10)
  assert by_place(engine.generate(asked_for)) == expected(weights, asked_for)
  assert len(asked) > 5 or count == 2  # before and after, or the other one did the rest


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_gone_is_replaced_by_the_others(kind, make):
  engine, servers = make(kind, 2)
  weights = load(engine, kind)
  servers[0].stop()
  assert by_place(engine.generate(requests())) == expected(weights, requests())


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_stalls_is_asked_again_and_then_reported(kind, make):
  engine, (server,) = make(kind, timeout_s=0.3, patience_s=20.0)
  weights = load(engine, kind)
  release, stalled = threading.Event(), []

  def stall_once(path, body):
    if path in ("/generate", "/v1/completions") and len(stalled) < 2:
      stalled.append(path)
      release.wait(10)

  server.before = stall_once
  try:
    assert by_place(engine.generate(requests(3))) == expected(weights, requests(3))
    stalled.clear()
    hopeless = engine.settings._replace(patience_s=0.0)
    engine.settings = hopeless
    with pytest.raises(RunError) as error:
      list(engine.generate(requests(1, n=1)))
  finally:
    release.set()
  message = str(error.value)
  assert message.startswith(f"{server.url} did not answer ") and "within 0.3 s" in message
  assert "request ('q', 0), sample 0, was asked 1 times, for 0 s" in message and "\n" not in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_server_is_asked_again(kind, make):
  engine, (server,) = make(kind)
  weights = load(engine, kind)
  said = []

  def busy(path, body):
    said.append(path)
    if len(said) == 1:
      raise Drop  # while it is given weights
    if len(said) in (3, 9, 15):
      raise Status({3: 503, 9: 429, 15: 500}[len(said)], "busy")

  server.before = busy
  assert by_place(engine.generate(requests())) == expected(weights, requests())


def without(*path):
  """Returns an edit that takes a field out of an answer."""

  def edit(_, answer):
    parent = answer
    for key in path[:-1]:
      if not isinstance(parent, (dict, list)) or (isinstance(parent, dict) and key not in parent):
        return answer
      parent = parent[key]
    if isinstance(parent, dict):
      parent.pop(path[-1], None)
    return answer

  return edit


def changed(key, value):
  return lambda _, answer: answer | {key: value} if key in answer else answer


NOT_FIT = [
  ("vllm", without("choices", 0, "token_ids"), r"without choices\[0\].token_ids"),
  ("vllm", without("choices", 0, "logprobs"), r"without choices\[0\].logprobs"),
  ("vllm", without("model"), "without model"),
  ("vllm", changed("model", "other"), "answers with model 'other' where 'toy' was asked for"),
  ("vllm", changed("data", [{"id": "other"}]), r"serves \['other'\] and not 'toy'"),
  ("sglang", without("meta_info", "output_token_logprobs"), "meta_info.output_token_logprobs"),
  ("sglang", without("output_ids"), "without output_ids"),
  ("sglang", without("weight_version"), "without weight_version"),
  ("sglang", without("meta_info", "weight_version"), "without meta_info.weight_version"),
]


@pytest.mark.parametrize("kind,edit,message", NOT_FIT)
def test_a_server_that_lacks_something_is_refused_before_the_run(kind, edit, message, make):
  engine, (server,) = make(kind, start=None)
  server.edit = edit
  with pytest.raises(ValueError, match=message) as error:
    engine.start(SAMPLING, 1024)
  assert str(error.value).startswith(server.url) and "\n" not in str(error.value)


def test_a_server_without_adapters_or_a_field_is_refused_before_the_run(make):
  engine, (server,) = make("vllm", start=None)
  del server.routes["/v1/load_lora_adapter"], server.routes["/v1/unload_lora_adapter"]
  with pytest.raises(ValueError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
    engine.start(SAMPLING, 1024)
  engine, (server,) = make("vllm", start=None)
  fields = server.routes["/v1/completions"][1]
  known = {key: fields[key] for key in fields if key != "min_p"}
  server.routes["/v1/completions"] = (server.complete, known)
  with pytest.raises(ValueError, match="status 400: unknown field 'min_p'"):
    engine.start(SAMPLING, 1024)
  server.stop()
  with pytest.raises(ValueError, match="did not answer /v1/models .* config.rollout.server.urls"):
    engine.start(SAMPLING, 1024)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_weights_need_room(kind, make, tmp_path):
  engine, _ = make(kind, start=None)
  with pytest.raises(ValueError, match="has room for 1024 tokens, and .* makes 1025: start "):
    engine.start(SAMPLING, 1025)
  (tmp_path / "file").write_text("")
  engine, _ = make(kind, start=None, weights_dir=str(tmp_path / "file"))
  with pytest.raises(ValueError, match="config.rollout.server.weights_dir=.*file': File exists"):
    engine.start(SAMPLING, 1024)
  engine, _ = make(kind)
  load(engine, kind)
  (tmp_path / "weights").rename(tmp_path / "gone")
  (tmp_path / "weights").write_text("")
  with pytest.raises(RunError, match="the weights could not be written to .*weights_dir"):
    engine.load(weights_of(kind, 2), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_than_were_asked_for_are_refused(kind, make):
  engine, (server,) = make(kind)
  load(engine, kind)
  if kind == "vllm":
    server.edit = changed("model", "stale")
  else:
    server.edit = lambda path, answer: (
      answer | {"meta_info": answer["meta_info"] | {"weight_version": "stale"}}
      if path == "/generate"
      else answer
    )
  with pytest.raises(RunError, match="'stale' where .* was asked for .request .'q', 0., sample 0"):
    list(engine.generate(requests(1, n=1)))


def test_a_sample_that_vllm_gives_up_is_asked_for_again(make):
  engine, (server,) = make("vllm")
  load(engine, "vllm")
  (good,) = engine.generate(requests(1, n=1, sampling=Sampling(6)))
  given_up = []

  def edit(path, content):
    if path == "/v1/completions" and not given_up:
      given_up.append(path)
      content["choices"][0] |= {"finish_reason": "abort", "token_ids": []}
    return content

  server.edit = edit
  assert list(engine.generate(requests(1, n=1, sampling=Sampling(6)))) == [good] and given_up


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_waits_for_a_server_is_interrupted(kind, make):
  engine, (server,) = make(kind)
  load(engine, kind)
  server.edit = lambda path, answer: engine.interrupt() or answer
  with pytest.raises(Preempted):
    list(engine.generate(requests(8, n=4)))
  assert not engine._wakers


def test_an_answer_that_breaks_a_promise_is_refused(make):
  engine, (server,) = make("vllm")
  load(engine, "vllm")
  (good,) = engine.generate(requests(1, n=1, sampling=Sampling(6)))

  def sample(changes, stop=()):
    def edit(path, content):
      if path == "/v1/completions":
        choice = content["choices"][0]
        choice |= {key: value for key, value in changes.items() if key != "logp"}
        if "logp" in changes:
          choice["logprobs"]["token_logprobs"] = changes["logp"]
      return content

    server.edit = edit
    return list(engine.generate(requests(1, n=1, sampling=Sampling(6, stop_tokens=stop))))

  few = good.tokens[:3]
  for changes, message in (
    (dict(token_ids=few, logp=good.logp[:3]), "after 3 of 6 tokens: its context"),
    (dict(token_ids=few), "6 log-probabilities for 3 tokens"),
    (dict(finish_reason="stop"), "which is none of the model's stop tokens"),
    (dict(finish_reason="filtered"), "finish_reason 'filtered'"),
    (dict(logp=[None] * 6), r"token_logprobs\[0\]"),
    (dict(prompt_token_ids=[1]), "read a prompt of 1 tokens"),
  ):
    with pytest.raises(RunError, match=message):
      sample(changes)
  with pytest.raises(RunError, match="a stop token before its end"):
    sample(dict(token_ids=good.tokens, logp=good.logp), stop=(good.tokens[2],))


@pytest.mark.parametrize("kind", KINDS)
def test_three_turns_stay_at_one_server(kind, make):
  engine, servers = make(kind, 2)
  weights = load(engine, kind)
  prompts = {(key, 0): [key, 5, key] for key in range(6)}

  def request(key, turn):
    return Request((key, turn), prompts[key, turn], 1, SAMPLING, 10 * key + turn)

  queue, done = RequestQueue(request(key, 0) for key in range(6)), {}

  def answer(completion):
    key, turn = completion.key
    time.sleep(0.01 * (key % 3))
    if turn == 2 or key == 4:
      queue.answer(completion, None)
      return
    prompts[key, turn + 1] = prompts[key, turn] + completion.tokens + [200 + turn]
    queue.answer(completion, request(key, turn + 1))

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for completion in engine.generate(queue):
      done[completion.key, 0] = completion
      pool.submit(answer, completion)
  asked = [request(*place) for place in prompts]
  assert done == expected(weights, asked) and len(done) == 16
  field = "prompt" if kind == "vllm" else "input_ids"
  homes = [
    {b[field][0] for _, b, _ in s.asked if b and field in b and len(b[field]) > 2} for s in servers
  ]
  assert homes[0] | homes[1] == set(range(6)) and not homes[0] & homes[1]
  if kind == "vllm":
    sessions = {}
    for _, body, session in servers[0].asked + servers[1].asked:
      if body and len(body.get("prompt", ())) > 2:
        sessions.setdefault(body["prompt"][0], set()).add(session)
    assert all(len(names) == 1 for names in sessions.values())


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_replace_the_old_ones(kind, make):
  engine, (server,) = make(kind)
  for seed, version in ((1, 3), (2, 4)):
    weights = load(engine, kind, seed, version)
    done = by_place(engine.generate(requests(2)))
    engine.unload()
    assert done == expected(weights, requests(2), version)
  assert len(list(pathlib.Path(engine.settings.weights_dir).iterdir())) == 1
  handed_over = lambda: sum("load" in path or "update" in path for path, _, _ in server.asked)
  count = handed_over()
  engine.load(engine.params, 7)  # the same arrays
  assert by_place(engine.generate(requests(2))) == expected(weights, requests(2), 7)
  assert handed_over() == count
  if kind == "vllm":
    assert len(server.weights) == 2  # the base, and one adapter
    engine.load(BASE, 8)
    assert by_place(engine.generate(requests(2))) == expected(0, requests(2), 8)
  engine.close()
  assert not list(pathlib.Path(engine.settings.weights_dir).iterdir())


def test_a_consumer_that_stops_early_leaves_nothing_running(make):
  engine, (server,) = make("vllm")
  load(engine, "vllm")
  server.before = lambda path, body: time.sleep(0.05)
  completions = engine.generate(requests(20))
  next(completions)
  with pytest.raises(AssertionError, match="no sample may span a change of weights"):
    engine.load(engine.params, 4)
  completions.close()
  time.sleep(0.2)
  assert engine.servers[0].asked == 0
  assert len(server.asked) < 40


def test_of_several_processes_the_first_asks_for_all(make, monkeypatch):
  engine, (server,) = make("vllm")
  weights = load(engine, "vllm")
  sent = []

  def share(value):
    sent.append(json.loads(json.dumps(value)))
    return [sent[0], []]

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(hosts, "share", share)
  want = expected(weights, requests(2))
  assert by_place(rollout.sample(engine, requests(2))) == want
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  count = len(server.asked)
  assert by_place(rollout.sample(engine, requests(2))) == want
  assert sent[1] == [] and len(server.asked) == count


BRANCHING = {"method": build.method_row("counterfactual")}
BRANCHING["method.counterfactual.sources"] = ("siblings", "beams")
SETTINGS = [
  (dict(), {"rollout.server.model": "x"}, "server.model='x' would not be read"),
  (dict(engine="vlm"), {}, "did you mean 'vllm'"),
  (dict(engine="vllm"), {}, "needs config.rollout.server.urls"),
  (dict(engine="vllm"), {"rollout.server.urls": ("http://a:1",)}, "needs .*weights_dir"),
  (dict(engine="sglang"), {"rollout.server.urls": ("a:1",)}, "must have the form http://HOST:PORT"),
  (dict(engine="vllm"), {"rollout.server.urls": ("http://a:1",)}, "lora.rank=0 trains all"),
  (dict(engine="sglang"), {"rollout.server.model": "x"}, "SGLang has one model"),
  (dict(engine="sglang"), {"discover.parallel": 2}, "discover.parallel=2"),
  (dict(engine="sglang"), BRANCHING, "sources holds 'beams'.*use 'local'"),
  (dict(engine="sglang"), {"rollout.server.concurrency": 0}, "concurrency=0 must be at least 1"),
]


@pytest.mark.parametrize("changes,settings,message", SETTINGS)
def test_settings_that_cannot_be_are_refused(changes, settings, message):
  c = config.base()
  c.rollout.update(changes)
  if "needs" not in message and changes.get("engine") in KINDS:
    c.rollout.server.update(urls=("http://a:1",), weights_dir="/tmp/w")
  for path, value in settings.items():
    *sections, key = path.split(".")
    node = c
    for section in sections:
      node = node[section]
    node[key] = value
  with pytest.raises(ValueError, match=message):
    config.validate(c)
