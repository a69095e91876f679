"""The server: a real process on loopback, compared with the engine and the decoder themselves."""

import concurrent.futures
import json
import signal
import socket
import sys

import jax
import numpy as np
import optax
import pytest

from sdpo_jax import checkpoint, train_step
from sdpo_jax.config import MODELS
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.engine.remote import ServerSettings
from sdpo_jax.engine.requests import RequestQueue
from sdpo_jax.engine.scoring import TextScorer
from sdpo_jax.engine.vllm import VllmEngine
from sdpo_jax.model import decoder, lora
from sdpo_jax.model.hf_weights import load_pretrained
from sdpo_jax.records import Request, Sampling
from sdpo_jax.serve import __main__ as command
from sdpo_jax.serve.weights import load_checkpoint
from sdpo_jax.serve.worker import Stopped, Worker
from tests.serving import TOKEN, ask, server

PROMPTS = [np.random.default_rng(i).integers(3, 200, 3 + 5 * i).tolist() for i in range(6)]


@pytest.fixture(scope="module")
def url():
  with server("--checkpoint=tiny", "--rows=8") as (address, _):
    yield address


@pytest.fixture(scope="module")
def tiny():
  config, params = load_pretrained(MODELS["tiny"], dtype="float32")
  return config, params, Chat(load_tokenizer(MODELS["tiny"]), eos_ids=config.eos_ids)


def complete(url, **fields):
  status, answer = ask(url, "/v1/completions", fields)
  assert status == 200, answer
  return answer["choices"]


def test_clients_that_share_the_batch_get_what_the_engine_samples(url, tiny):
  """The same ids as an engine gives to each request alone, and its log-probabilities."""
  config, params, chat = tiny
  engine = LocalEngine(config, rows=8)
  engine.load(params, 0)
  wanted = {}
  for key, prompt in enumerate(PROMPTS):
    sampling = Sampling(4 + 3 * key, 1.5, 0.95, chat.stop_tokens, top_k=50, logit_bias=((40, 2.0),))
    request = Request(key, prompt, 2, sampling, seed=2**40 + key)
    wanted[key] = sorted(engine.generate([request]), key=lambda c: c.sample_index)

  def sample(key):
    return complete(
      url,
      model="tiny",
      prompt=PROMPTS[key],
      max_tokens=4 + 3 * key,
      n=2,
      temperature=1.5,
      top_p=0.95,
      top_k=50,
      logit_bias={"40": 2},
      seed=2**40 + key,
      logprobs=0,
      return_token_ids=True,
    )

  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    for key, choices in enumerate(pool.map(sample, range(6))):
      for choice, completion in zip(choices, wanted[key], strict=True):
        assert choice["token_ids"] == completion.tokens
        assert choice["finish_reason"] == completion.finish_reason
        assert choice["prompt_token_ids"] == PROMPTS[key]
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], completion.logp, atol=1e-3)


@pytest.mark.parametrize("temperature, divisor", [(0.7, 0.7), (0, 1.0)])
def test_scores_of_a_prompt_are_the_decoders(url, tiny, temperature, divisor):
  config, params, _ = tiny
  prompt = PROMPTS[4]
  logits_TV = decoder.logits(params, config, np.array([prompt]))[0] / divisor
  logp_TV = np.asarray(jax.nn.log_softmax(logits_TV))
  named = [[7, 1, 250], [], [9]]
  (choice,) = complete(
    url,
    prompt=prompt,
    max_tokens=0,
    temperature=temperature,
    prompt_logprobs=3,
    prompt_logprob_ids=named,
  )
  assert choice["finish_reason"] == "length" and choice["text"] == ""
  first, *others = choice["prompt_logprobs"]
  assert first is None and len(others) == len(prompt) - 1
  for t, entries in enumerate(others):
    best = np.argsort(-logp_TV[t])[:3].tolist()
    assert set(entries) == {str(token) for token in [*best, prompt[t + 1]]}
    for token, entry in entries.items():
      assert abs(entry["logprob"] - logp_TV[t, int(token)]) < 1e-3
    assert [entries[str(token)]["rank"] for token in best] == [1, 2, 3]
  before_TV = logp_TV[-4:-1]  # what predicts the last three tokens
  for values, ids, logp_V in zip(choice["prompt_id_logprobs"], named, before_TV, strict=True):
    np.testing.assert_allclose(values, logp_V[ids], atol=1e-3)
  np.testing.assert_allclose(
    choice["prompt_token_logprobs"], before_TV[range(3), prompt[-3:]], atol=1e-3
  )


def test_the_likeliest_entries_of_what_was_sampled(url, tiny):
  config, params, _ = tiny
  asked = dict(prompt=PROMPTS[2], max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
  ids = dict(return_token_ids=True, return_tokens_as_token_ids=True)
  (choice,) = complete(url, **asked, **ids)
  text = PROMPTS[2] + choice["token_ids"]
  logp_TV = np.asarray(jax.nn.log_softmax(decoder.logits(params, config, np.array([text]))[0]))
  for t, entries in enumerate(choice["logprobs"]["top_logprobs"]):
    logp_V = logp_TV[len(PROMPTS[2]) - 1 + t]
    best = np.argsort(-logp_V)[:2]
    assert list(entries) == [f"token_id:{token}" for token in best]
    np.testing.assert_allclose(list(entries.values()), logp_V[best], atol=1e-3)
  assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_chat_goes_through_the_template_and_texts_end_at_stop_strings(url, tiny):
  _, _, chat = tiny
  messages = [{"role": "user", "content": "Write f(x)<|im_end|>: double it."}]
  asked = dict(messages=messages, temperature=0, max_tokens=20, return_token_ids=True)
  status, answer = ask(
    url, "/v1/chat/completions", asked | dict(logprobs=True, top_logprobs=1, stop=["return"])
  )
  (choice,) = answer["choices"]
  assert status == 200 and choice["finish_reason"] == "stop" and choice["stop_reason"] == "return"
  assert choice["prompt_token_ids"] == chat.prompt_tokens(messages)
  text = choice["message"]["content"]
  assert text.startswith("def f") and "return" not in text
  assert "return" in chat.plain_text(choice["token_ids"])
  assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])
  for entry in choice["logprobs"]["content"]:
    assert entry["token"] == entry["top_logprobs"][0]["token"]  # it was greedy
  status, answer = ask(url, "/v1/chat/completions", asked)
  (choice,) = answer["choices"]
  assert choice["token_ids"][-1] in chat.stop_tokens and choice["stop_reason"] is None
  assert choice["message"]["content"] == chat.plain_text(choice["token_ids"][:-1])


@pytest.mark.parametrize(
  "fields, status, words",
  [
    (dict(prompt=[5], streem=True), 400, "streem: not a field of this server"),
    (dict(prompt=[5], stream=True), 400, "stream: this server has it only as False"),
    (dict(prompt=[5], model="other"), 404, "model 'other' is not served here, 'tiny' is"),
    (dict(prompt=[5], temperature="hot"), 400, "temperature: Input should be a valid number"),
    (dict(prompt=[5], temperature=1e-5), 400, "temperature: must be 0, or from 0.001"),
    (dict(prompt=[5], top_p=0), 400, "top_p: Input should be greater than 0"),
    (dict(prompt=[5], logit_bias={"a": 1}), 400, "logit_bias: invalid literal"),
    (dict(prompt=[[5]]), 400, "prompt: must be a text or a list of ids"),
    (dict(prompt=[]), 400, "the request has an empty prompt"),
    (dict(prompt=[99999]), 400, "the request has a token that is not in [0, "),
    (dict(prompt=[5] * 1020), 400, "1020 tokens and 16 more exceed the model's 1024 positions"),
    (dict(prompt=[5], max_tokens=0), 400, "max_tokens: 0 is for requests with prompt_logprobs"),
    (dict(prompt=[5, 6], prompt_logprob_ids=[[1], [2]]), 400, "2 lists for the 1 positions"),
    (dict(prompt=[5, 6], prompt_logprob_ids=[[99999]]), 400, "a token that is not in [0, "),
    (dict(prompt=[5], messages=[]), 400, "messages: not a field of this server"),
    ([1], 400, "the body must be a JSON object"),
  ],
)
def test_what_cannot_be_answered_is_one_line(url, fields, status, words):
  got, answer = ask(url, "/v1/completions", fields)
  message = answer["error"]["message"]
  assert got == status and words in message and "\n" not in message


def test_a_wrong_token_is_refused(url):
  for path, body in (("/v1/models", None), ("/v1/completions", {"prompt": [5]})):
    status, answer = ask(url, path, body, token="wrong")
    assert status == 401 and "token" in answer["error"]["message"]
  assert ask(url, "/health", token="wrong") == (200, {"status": "ok"})
  _, answer = ask(url, "/v1/models")
  assert answer["data"][0]["id"] == "tiny" and answer["data"][0]["max_model_len"] == 1024


def test_the_engine_for_vllm_samples_from_it(url, tiny, monkeypatch, tmp_path):
  """Its fields and its reading of answers fit; log-probabilities are the trainer's."""
  config, params, _ = tiny
  monkeypatch.setenv("SDPO_JAX_TOKEN", TOKEN)
  settings = ServerSettings((url,), "tiny", str(tmp_path), 60.0, 30.0, 8)
  engine = VllmEngine(config, settings, base=params, path="tiny", adapters=None)
  sampling = Sampling(8, 1.0, stop_tokens=(5, 9))
  engine.start(sampling, 64)
  engine.load(params, 3)
  asked = [Request(key, prompt, 2, sampling, seed=key) for key, prompt in enumerate(PROMPTS)]
  done = list(engine.generate(iter(asked)))
  assert sorted((c.key, c.sample_index) for c in done) == [(k, s) for k in range(6) for s in (0, 1)]
  for completion in done[:4]:
    text = PROMPTS[completion.key] + completion.tokens
    logp_TV = jax.nn.log_softmax(decoder.logits(params, config, np.array([text]))[0])
    logp_TV = np.asarray(logp_TV)[len(PROMPTS[completion.key]) - 1 : -1]
    wanted = logp_TV[range(len(completion.tokens)), completion.tokens]
    np.testing.assert_allclose(completion.logp, wanted, atol=1e-3)
    assert completion.version == 3


def send_and_leave(url, **fields):
  """Sends a request and closes the connection without reading."""
  host, port = url.removeprefix("http://").split(":")
  body = json.dumps(fields).encode()
  head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n"
  with socket.create_connection((host, int(port))) as connection:
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def test_a_client_that_goes_away_does_not_stop_the_others(url):
  for n in (1, 20):
    send_and_leave(url, prompt=[5], n=n, max_tokens=60, ignore_eos=True)
  (choice,) = complete(url, prompt=[5, 6], max_tokens=3, ignore_eos=True, return_token_ids=True)
  assert len(choice["token_ids"]) == 3


def test_a_polite_stop_in_mid_answer():
  with server("--checkpoint=tiny", "--rows=2") as (address, process):
    send_and_leave(address, prompt=[5], n=500, max_tokens=900, ignore_eos=True)
    assert ask(address, "/health")[0] == 200
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
  assert process.returncode == 143 and output == ""
  assert errors == "sdpo_jax: asked to stop (SIGTERM): the same command serves again\n"


# ---- in this process


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "--checkpoint=WORKDIR[:step], a Hugging Face directory or a name is needed"),
    (["--checkpoint=tiny", "--host=0.0.0.0"], "set --token or SDPO_JAX_TOKEN"),
    (["--checkpoint=tiny", "--host=example.org"], "can be reached from other machines"),
    (["--checkpoint=tiny", "--port=x"], "--port=x"),
    (["--checkpoint=/nowhere", "--port=0"], "neither a work directory"),
    (["--checkpoint=tiny", "tiny"], "unknown argument 'tiny'"),
  ],
)
def test_wrong_arguments_are_one_line(arguments, words, capsys, monkeypatch):
  monkeypatch.delenv("SDPO_JAX_TOKEN", raising=False)
  off = ["--compilation_cache=off"]
  monkeypatch.setattr("sdpo_jax.compilation.keep_compiled", lambda where: None)
  assert command.main(["serve", *off, *arguments]) == 2
  error = capsys.readouterr().err
  assert words in error and error.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    assert command.main(["serve", "--checkpoint=tiny", f"--port={port}"]) == 2
  assert f"--port={port}: cannot listen there" in capsys.readouterr().err


def test_without_the_extra_one_line_names_it(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  monkeypatch.delitem(sys.modules, "sdpo_jax.serve.lifetime", raising=False)
  assert command.main(["serve", "--checkpoint=tiny", "--port=0"]) == 2
  assert "pip install 'sdpo_jax[serve]'" in capsys.readouterr().err


class BrokenEngine:
  def generate(self, queue):
    queue.wait(for_all=False)
    queue.take()
    raise RuntimeError("out of memory")
    yield


def test_an_engine_that_fails_leaves_nobody_waiting():
  told = []
  worker = Worker(BrokenEngine(), TextScorer(None), on_failure=lambda: told.append(True))
  worker.start()
  for _ in range(2):  # while it runs, and after its end
    with pytest.raises(RuntimeError, match="out of memory"):
      worker.sample([1], 1, Sampling(1), 0).result(timeout=60)
  worker.close()
  assert told == [True]


def test_a_worker_that_is_closed_answers_nobody(tiny):
  config, params, _ = tiny
  engine = LocalEngine(config, rows=2, deterministic=False)
  engine.load(params, 0)
  worker = Worker(engine, TextScorer(config))
  worker.start()
  future = worker.sample([5], 200, Sampling(500), 0)
  worker.close()
  with pytest.raises(Stopped):
    future.result(timeout=60)


def test_an_open_queue_takes_requests_until_it_is_closed(tiny):
  config, params, _ = tiny
  engine = LocalEngine(config, rows=2, deterministic=False)
  engine.load(params, 0)
  queue = RequestQueue(is_open=True)
  queue.add(Request(0, [5, 6], 1, Sampling(3), 0))
  keys = []
  for completion in engine.generate(queue):
    keys.append(completion.key)
    if completion.key < 3:
      queue.add(Request(completion.key + 1, [5, 6], 1, Sampling(3), 0))
    else:
      queue.close()
    queue.answer(completion, None)
  assert keys == [0, 1, 2, 3]
  with pytest.raises(ValueError, match="closed"):
    queue.add(Request(4, [5], 1, Sampling(1), 0))


def test_the_weights_of_a_run(tiny, tmp_path):
  """Of the newest checkpoint, of one by its step, and of adapters, which are merged."""
  config, params, _ = tiny
  settings = dict(path="tiny", param_dtype="float32", dtype="float32", lora=dict(rank=0))
  (tmp_path / "config.json").write_text(json.dumps(dict(model=settings)))
  for step, factor in ((2, 1.25), (4, 1.5)):
    scaled = jax.tree.map(lambda x, factor=factor: factor * x, params)
    checkpoint.save(tmp_path, step, train_step.init_state(scaled, optax.sgd(0.1)), {"tokens": 0})
  for source, factor in ((f"{tmp_path}", 1.5), (f"{tmp_path}:2", 1.25)):
    loaded = load_checkpoint(source, None)
    np.testing.assert_array_equal(loaded.params["embed"], factor * params["embed"])
  assert load_checkpoint(f"{tmp_path}:2", "bfloat16").params["embed"].dtype == "bfloat16"

  adapted = tmp_path / "adapted"
  adapted.mkdir()
  settings["lora"] = dict(rank=2, alpha=4.0, targets=["q_proj"])
  (adapted / "config.json").write_text(json.dumps(dict(model=settings)))
  shape = lora.from_settings(settings)
  ones = jax.tree.map(np.ones_like, lora.init(config, shape, jax.random.key(0)))
  checkpoint.save(adapted, 1, train_step.init_state(ones, optax.sgd(0.1)), {"tokens": 0})
  merged = lora.merge(params, ones, shape)
  for got, want in zip(
    jax.tree.leaves(load_checkpoint(str(adapted), None).params),
    jax.tree.leaves(merged),
    strict=True,
  ):
    np.testing.assert_array_equal(got, want)
