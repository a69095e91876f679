"""Conversations in the local engine: each turn goes on in the pages of the one before."""

import concurrent.futures
import random
import threading
import time

import numpy as np
import pytest

from sdpo_jax.engine import programs
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.engine.requests import RequestQueue
from sdpo_jax.errors import Preempted
from sdpo_jax.records import Completion, Request, Sampling
from tests.test_decoder import OLMO, QWEN, logits, params_of

DICE = np.random.default_rng(1)
SYSTEM = DICE.integers(1, 60, 13).tolist()
FIRST = [SYSTEM + DICE.integers(1, 60, count).tolist() for count in (4, 4, 1, 9, 2, 6)]
FIRST[1] = FIRST[0]
GLUE = [DICE.integers(1, 60, count).tolist() for count in (1, 12, 5)]
TURNS = 3
LIMITS = (6, 3, 9)


def request_of(key, turn, prompt, temperature):
  sampling = Sampling(LIMITS[turn] + key % 3, temperature=temperature, stop_tokens=(57, 11))
  return Request((key, turn), prompt, 1, sampling, seed=100 * key + turn)


def converse(*, config=QWEN, temperature=1.0, delays=None, workers=0, **settings):
  """Returns {(key, turn): (prompt, completion)} of conversations, and the engine's cache."""
  engine = LocalEngine(config, **(dict(rows=4, chunk=4, columns=8) | settings))
  engine.load(params_of(config), 0)
  queue = RequestQueue(request_of(key, 0, prompt, temperature) for key, prompt in enumerate(FIRST))
  prompts, done = {(key, 0): prompt for key, prompt in enumerate(FIRST)}, {}

  def answer(completion):
    key, turn = completion.key
    if delays is not None:
      time.sleep(delays.random() / 20)
    following = None
    if turn + 1 < TURNS and key != 4:  # conversation 4 ends after its first turn
      prompt = prompts[key, turn] + completion.tokens + GLUE[(key + turn) % 3]
      prompts[key, turn + 1] = prompt
      following = request_of(key, turn + 1, prompt, temperature)
    queue.answer(completion, following)

  with concurrent.futures.ThreadPoolExecutor(workers or 1) as pool:
    waiting = []
    for completion in engine.generate(queue):
      done[completion.key] = (prompts[completion.key], completion)
      if workers:
        waiting.append(pool.submit(answer, completion))
      else:
        answer(completion)
    for future in waiting:
      future.result()
  assert sorted(done) == [(key, turn) for key in range(6) for turn in range(1 if key == 4 else 3)]
  return done


def check(done, config, temperature=1.0):
  rows = {place: prompt + c.tokens for place, (prompt, c) in done.items()}
  padded = np.zeros((len(rows), 96), np.int32)
  for padded_T, row in zip(padded, rows.values(), strict=True):
    padded_T[: len(row)] = row
  logits_BTV = np.asarray(logits(params_of(config), config, padded), np.float64)
  for b, (prompt, c) in enumerate(done.values()):
    logits_TV = logits_BTV[b, len(prompt) - 1 :][: len(c.tokens)] / (temperature or 1.0)
    logp_TV = logits_TV - np.log(np.sum(np.exp(logits_TV), -1, keepdims=True))
    np.testing.assert_allclose(c.logp, logp_TV[range(len(c.tokens)), c.tokens], atol=1e-3)
    if temperature == 0.0:
      assert c.tokens == logits_TV.argmax(-1).tolist()


@pytest.mark.parametrize("config", [QWEN, OLMO], ids=["qwen", "olmo"])
def test_every_turn_is_what_the_trainer_would_say_of_the_whole_row(config):
  check(converse(config=config, temperature=0.0), config, temperature=0.0)


def test_a_turn_reads_only_what_is_new(monkeypatch):
  read = {"read_shared": 0, "read_own": 0}

  def spy(name):
    kept = getattr(programs, name)

    def counted(params, *pools_and_new, config):
      new = pools_and_new[-1]
      C = new.token_ZYC.shape[2]
      is_used = new.page_ZY < pools_and_new[-2].v[0].shape[1]
      read[name] += int(np.sum((C - new.begin_ZY) * is_used))
      return kept(params, *pools_and_new, config=config)

    monkeypatch.setattr(programs, name, counted)

  spy("read_shared")
  spy("read_own")
  done = converse(rows=8)
  check(done, QWEN)
  prompts = {tuple(prompt) for (_, turn), (prompt, _) in done.items() if turn == 0}
  assert read["read_shared"] == sum(8 * -(-(len(prompt) - 1) // 8) for prompt in prompts)
  turns = [(key, turn) for key, turn in done if turn > 0]
  new = sum(len(GLUE[(key + turn - 1) % 3]) for key, turn in turns)
  assert new <= read["read_own"] <= new + 8 * len(turns)  # padding of the last page


def test_two_shards_and_few_rows_hold_the_same_conversations():
  """What has no place any more is read again."""
  want = {place: c.tokens for place, (_, c) in converse(rows=8).items()}
  for settings in (dict(rows=2), dict(rows=4, row_multiple=2), dict(rows=1, columns=4)):
    done = converse(**settings)
    assert {place: c.tokens for place, (_, c) in done.items()} == want


def test_threads_that_answer_in_any_order_change_nothing():
  """Bit for bit."""
  alone = {place: (c.tokens, c.logp) for place, (_, c) in converse().items()}
  for seed in range(3):
    done = converse(delays=random.Random(seed), workers=4)
    assert {place: (c.tokens, c.logp) for place, (_, c) in done.items()} == alone


def test_an_engine_that_goes_by_arrival_says_the_same():
  done = converse(delays=random.Random(0), workers=4, deterministic=False)
  check(done, QWEN)
  assert {place: c.tokens for place, (_, c) in done.items()} == {
    place: c.tokens for place, (_, c) in converse().items()
  }


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_engine_that_waits_for_answers_can_be_interrupted(deterministic):
  """Nobody answers here."""
  engine = LocalEngine(QWEN, rows=4, chunk=4, columns=8, deterministic=deterministic)
  engine.load(params_of(QWEN), 0)
  queue = RequestQueue([request_of(0, 0, FIRST[0], 1.0)])
  found = iter(engine.generate(queue))
  next(found)
  threading.Timer(0.1, engine.interrupt).start()
  with pytest.raises(Preempted):
    next(found)


def test_an_answer_twice_or_to_nothing_is_named():
  queue = RequestQueue()
  completion = Completion("q", 0, [1], [-1.0], "stop")
  with pytest.raises(ValueError, match=r"\('q', 0\) awaits no answer"):
    queue.answer(completion, None)
  queue.hand_out(completion)
  queue.answer(completion, None)
  assert queue.take_dropped() == [("q", 0)] and queue.take_dropped() == []
  with pytest.raises(ValueError, match="awaits no answer"):
    queue.answer(completion, None)


def test_a_request_may_have_more_samples_than_there_are_rows():
  """Nobody else asks or answers meanwhile, and the queue stays open."""
  engine = LocalEngine(QWEN, rows=2, chunk=4, columns=8, deterministic=False)
  engine.load(params_of(QWEN), 0)
  queue = RequestQueue(is_open=True)
  queue.add(Request("a", FIRST[0], 5, Sampling(3), seed=1))
  found = []
  for completion in engine.generate(queue):
    found.append(completion.sample_index)
    queue.answer(completion, None)
    if len(found) == 5:
      queue.close()
  assert sorted(found) == list(range(5))
