"""A teacher on another machine: a real server process, and stand-ins that lack something."""

import contextlib
import http.server
import json
import re
import threading

from absl.testing import flagsaver
import grain  # noqa: F401 - defines flags: imported first inside flagsaver, it would lose them
import jax
import numpy as np
import optax
import pytest

from sdpo_jax import main, metrics
from sdpo_jax.config import MODELS
from sdpo_jax.data.batch import Packed
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.packing import Text, Texts
from sdpo_jax.engine import client
from sdpo_jax.errors import RunError
from sdpo_jax.given_teacher import make_candidates, make_given_signals
from sdpo_jax.model.hf_weights import load_pretrained
from sdpo_jax.objectives import build
from sdpo_jax.objectives.teacher_weights import Remote
from sdpo_jax.remote_teacher import RemoteTeacher
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from tests import fakes
from tests.serving import TOKEN, server

SETTINGS = ["--config.method.teacher_weights.name=remote", "--config.method.token_signal.top_k=20"]


@pytest.fixture(scope="module")
def url():
  with server("--checkpoint=tiny") as (address, _):
    yield address


@pytest.fixture(autouse=True)
def token(monkeypatch):
  monkeypatch.setenv("SDPO_JAX_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def tiny():
  return load_pretrained(MODELS["tiny"], dtype="float32")


def method(alpha=0.5, url="http://x", **weights):
  return build.build_method(
    build.method_row("sdpo")
    | dict(
      token_signal=dict(name="divergence", alpha=alpha, top_k=12),
      teacher_weights=weights or dict(name="remote", url=url),
    )
  )


def teacher_texts(batch):
  """What the teacher reads of each row, from the packed rows of the batch, of one text a row."""
  rows = batch.readings[0].rows
  packs, _, length = rows.token_CPT.shape
  texts = []
  for b, count in enumerate((batch.weight_BR > 0).sum(1)):
    c = b // (len(batch.start_B) // packs)
    first = rows.at_CX[c, batch.start_B[b]] + 1  # the column of the first response token
    row = rows.token_CPT[c, first // length]
    tokens = row[: first % length + count].tolist()
    span = (int(first % length), int(first % length + count))
    texts.append([Text(tokens, [span])] if batch.readings[0].weight_BR[b].any() else [])
  return Texts(texts)


@pytest.mark.parametrize("alpha, packs, temperature", [(0.5, 1, 1.0), (1.0, 2, 0.8)])
def test_the_same_weights_elsewhere_give_the_same_loss_and_gradient(
  url, tiny, alpha, packs, temperature
):
  """As the frozen teacher with the same top_k, whatever the policy is now."""
  config, teacher = tiny
  policy = jax.tree.map(lambda x: 0.95 * x, teacher)
  batch = fakes.toy_batch(rows=4, vocab=200, packs=packs)
  tx = optax.sgd(1.0)

  def step(method, signals, batch, frozen):
    state = init_state(policy, tx)._replace(teacher=frozen)
    new, measured = jax.jit(make_train_step(signals, method, tx))(state, batch)
    return measured, jax.tree.map(lambda a, b: np.asarray(a - b), policy, new.params)

  local = method(alpha, name="frozen")
  signals = make_signals(config, local, temperature=temperature)
  want, want_gradient = step(local, signals, batch, teacher)

  remote = method(alpha)
  candidates = jax.jit(make_candidates(config, remote, temperature=temperature))
  index_CXM = np.asarray(candidates(init_state(policy, tx), batch))
  assert index_CXM.shape == (*batch.policy.at_CX.shape, 12)
  asked = RemoteTeacher(Remote(url, "tiny", 60.0), temperature=temperature, vocab=config.vocab)
  packed = asked.read(Packed(batch, [], ([],), {}, teacher_texts(batch)), index_CXM)
  signals = make_given_signals(config, remote, temperature=temperature)
  got, gradient = step(remote, signals, packed.batch, None)
  for name in ("train/loss", "train/teacher_gap", "train/teacher_gap_abs", "train/entropy"):
    assert float(got[name].mean) == pytest.approx(float(want[name].mean), abs=1e-4), name
  assert float(want["train/loss"].mean) > 1e-3
  scale = max(np.abs(x).max() for x in jax.tree.leaves(want_gradient))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), gradient, want_gradient
  )


def test_each_text_of_a_response_is_asked_about(monkeypatch):
  """Turns with a text each; one is not read. What comes back is the id of each token."""
  batch = fakes.toy_batch(rows=2, response=6, packs=2)
  tokens = [x_R[w_R > 0].tolist() for x_R, w_R in zip(batch.response_BR, batch.weight_BR)]
  turns = [[3] + tokens[0][:1], [4, 4] + tokens[0][1:]]
  texts = Texts([[Text(turns[0], [(1, 2)]), Text(turns[1], [(2, len(turns[1]))], 1)], []])
  asked = []

  async def answer(self, text, ids, limit):
    asked.append((text, ids))
    return [[float(i) for i in row] for row in ids], [float(t) for t in text[-len(ids) :]]

  monkeypatch.setattr(RemoteTeacher, "_answer", answer)
  X = batch.policy.at_CX.shape[1]
  index_CXM = np.arange(2 * X * 3).reshape(2, X, 3)
  remote = RemoteTeacher(Remote("http://127.0.0.1:1", "tiny", 1.0), temperature=1.0, vocab=300)
  packed = remote.read(Packed(batch, [], ([],), {}, texts), index_CXM)
  scored, n = packed.batch.readings[0].scored, len(tokens[0])
  assert [text for text, _ in asked] == turns
  assert scored.logp_CX[0, :n].tolist() == tokens[0]
  assert scored.logp_CXM[0, :n].tolist() == index_CXM[0, :n].tolist()
  assert (scored.logp_CX[1] == np.float32(-np.log(300))).all()


def run(workdir, *more):
  with flagsaver.flagsaver():
    return main.main(
      [
        "main",
        "--config=configs/tinycode.py:local",
        f"--workdir={workdir}",
        "--config.eval.questions=2",
        "--config.eval.samples=1",
        *SETTINGS,
        *more,
      ]
    )


def test_two_steps_of_the_main_job(url, tmp_path, capsys):
  where = f"--config.method.teacher_weights.url={url}"
  assert run(tmp_path, where, "--config.mesh.fsdp=1") == 0
  # it was asked about the policy's own prompts too, before the first update
  assert "emptying its context changes the gradient's norm by 100 %" in capsys.readouterr().err
  steps = metrics.read(tmp_path)[1:]
  assert len(steps) == 2 and any(line["data/teacher_share"] > 0 for line in steps)
  for line in steps:
    assert line["time/remote_teacher_s"] > 0
    # the teacher reads more than the policy, with the same weights
    assert ("train/teacher_gap_abs" in line) == (line["data/teacher_share"] > 0)
  lines = (tmp_path / "rollouts" / "step_000001.jsonl").read_text().splitlines()
  gaps = [gap for line in lines for gap in json.loads(line).get("teacher_gap", [])]
  assert gaps and all(abs(gap) < 50 for gap in gaps) and any(gap != 0 for gap in gaps)


@pytest.mark.slow
def test_the_main_job_over_a_mesh_trains_as_with_a_frozen_teacher(url, tmp_path):
  """On eight devices, with the weights that the run begins with."""
  assert run(tmp_path / "remote", f"--config.method.teacher_weights.url={url}") == 0
  assert run(tmp_path / "frozen", "--config.method.teacher_weights.name=frozen") == 0
  remote, frozen = (metrics.read(tmp_path / name)[1:] for name in ("remote", "frozen"))
  for ours, theirs in zip(remote, frozen, strict=True):
    for name in ("train/loss", "train/teacher_gap_abs", "train/grad_norm"):
      assert (name in ours) == (name in theirs)
      if name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


# ---- what is refused


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(url=""), "url='' must be the address of a python -m sdpo_jax.serve"),
    (dict(timeout_s=0.0), "timeout_s=0.0 must be above 0"),
    (dict(token_signal=dict(name="divergence")), "with a top_k: set method.token_signal.top_k"),
    (dict(token_signal=dict(name="sampled_token")), "needs the token signal 'divergence'"),
    (dict(token_weight=dict(name="certainty")), "which method.token_weight.name='certainty' reads"),
    (dict(counterfactual=dict(name="notes")), "set method.counterfactual.name=none, not 'notes'"),
  ],
)
def test_a_method_that_cannot_ask_is_refused(changes, words):
  row = build.method_row("sdpo") | dict(token_signal=dict(name="divergence", top_k=5))
  weights = dict(name="remote", url="http://x")
  for key in changes.keys() & {"url", "timeout_s"}:
    weights[key] = changes[key]
  axes = {key: value for key, value in changes.items() if key in build.AXES}
  with pytest.raises(ValueError, match=re.escape(words)):
    build.build_method(row | dict(teacher_weights=weights) | axes)


@pytest.mark.parametrize(
  "more, words",
  [
    (["--mode=discover"], "is not for --mode=discover"),
    ([], "config.method.teacher_weights.url=http://127.0.0.1:9: the server did not answer"),
  ],
)
def test_a_run_that_cannot_begin_is_one_line(tmp_path, capsys, more, words):
  assert run(tmp_path, "--config.method.teacher_weights.url=http://127.0.0.1:9", *more) == 2
  assert words in capsys.readouterr().err.strip().splitlines()[-1]


class StandIn(http.server.BaseHTTPRequestHandler):
  """Answers with what `answers` says of the path; a number is a status."""

  def do_GET(self):
    self.reply()

  def do_POST(self):
    self.rfile.read(int(self.headers["Content-Length"]))
    self.reply()

  def reply(self):
    answer = self.server.answers[self.path].pop(0)
    status = answer if isinstance(answer, int) else 200
    body = json.dumps({} if isinstance(answer, int) else answer).encode()
    self.send_response(status)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def stand_in(completions, models=None):
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as httpd:
    listed = models or [{"id": "m", "max_model_len": 100}]
    httpd.answers = {"/v1/models": [{"data": listed}], "/v1/completions": list(completions)}
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


CHOICE = {"prompt_token_logprobs": [-1.0, -2.0], "prompt_id_logprobs": [[-3.0], [-4.0]]}


@pytest.mark.parametrize(
  "answer, asked, longest, words",
  [
    ({"choices": [{"text": ""}]}, "m", 9, "without prompt_id_logprobs: it has to be a python -m"),
    ({"choices": [CHOICE | {"prompt_token_ids": [1]}]}, "", 9, "gives other ids to a text"),
    (400, "m", 9, "answered /v1/completions with status 400"),
    (500, "m", 9, "answered /v1/completions with status 500"),
    (400, "other", 9, r"has \['m'\], not 'other'"),
    (400, "m", 101, "has 100 positions"),
  ],
)
def test_a_server_that_cannot_teach_is_named_at_the_start(answer, asked, longest, words):
  chat = Chat(load_tokenizer(MODELS["tiny"]))
  with stand_in([answer]) as url:
    teacher = RemoteTeacher(Remote(url, asked, 5.0), temperature=1.0, vocab=300)
    with pytest.raises(ValueError, match=words) as error:
      teacher.check(chat, longest)
  assert url in str(error.value) and "\n" not in str(error.value)


def one_row():
  batch = fakes.toy_batch(rows=1)
  return Packed(batch, [], ([],), {}, Texts([[Text([5, 6, 7], [(1, 3)])]]))


def test_a_server_that_is_away_for_a_while_is_asked_again(monkeypatch):
  monkeypatch.setattr(client, "_FIRST_DELAY_S", 0.01)
  with stand_in([503, 502, {"choices": [CHOICE]}]) as url:
    teacher = RemoteTeacher(Remote(url, "m", 30.0), temperature=1.0, vocab=300)
    scored = teacher.read(one_row(), np.zeros((1, 6, 1), np.int32)).batch.readings[0].scored
  np.testing.assert_allclose(scored.logp_CX[0], [-1, -2, *[-np.log(300)] * 4], rtol=1e-6)
  np.testing.assert_allclose(scored.logp_CXM[0, :3, 0], [-3, -4, -np.log(300)], rtol=1e-6)


@pytest.mark.parametrize("answer, words", [(503, "for 0.05 s; nothing of"), (422, "status 422")])
def test_a_server_that_stays_away_ends_the_run(monkeypatch, answer, words):
  monkeypatch.setattr(client, "_FIRST_DELAY_S", 0.02)
  with stand_in([answer] * 9) as url:
    teacher = RemoteTeacher(Remote(url, "m", 0.05), temperature=1.0, vocab=300)
    with pytest.raises(RunError, match=words):
      teacher.read(one_row(), np.zeros((1, 6, 1), np.int32))
