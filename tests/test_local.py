"""The local engine says what the trainer would say; a response depends on its seed alone."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from sdpo_jax import sharding
from sdpo_jax.engine import local, programs
from sdpo_jax.engine.decoding import row_counts
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.kernels.token_logp import token_logp
from sdpo_jax.model import decoder
from sdpo_jax.records import Request, Sampling
from tests import fakes
from tests.test_decoder import GEMMA, LLAMA, OLMO, QWEN, jit, logits, params_of

DICE = np.random.default_rng(0)
PROMPTS = [DICE.integers(1, 60, count).tolist() for count in (3, 11, 1, 2, 17, 40, 5)]
LIMITS = (7, 20, 13, 1, 30, 9, 25)


def requests(n=3, limits=LIMITS, **sampling):
  settings = dict(stop_tokens=(57, 11)) | sampling
  return [
    Request(i, prompt, n, Sampling(limit, **settings), seed=i + 1)
    for i, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True))
  ]


def run(asked, *, config=QWEN, rows=8, chunk=4, columns=8, **settings):
  """Returns ({(key, sample): completion}, the engine)."""
  engine = LocalEngine(config, rows=rows, chunk=chunk, columns=columns, **settings)
  engine.load(params_of(config), 5)
  done = list(engine.generate(iter(asked)))
  assert sorted((c.key, c.sample_index) for c in done) == [
    (request.key, s) for request in asked for s in range(request.n)
  ]
  assert all(c.version == 5 for c in done)
  return {(c.key, c.sample_index): c for c in done}, engine


@functools.cache
def usual():
  return run(requests())[0]


def tokens_of(done):
  return {place: c.tokens for place, c in done.items()}


def check_against_the_trainer(done, config, temperature=1.0):
  whole = {place: PROMPTS[place[0]] + c.tokens for place, c in done.items()}
  padded = np.zeros((len(whole), 72), np.int32)
  for padded_T, row in zip(padded, whole.values(), strict=True):
    padded_T[: len(row)] = row
  logits_BTV = logits(params_of(config), config, padded) / (temperature or 1.0)
  logp_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
  for b, ((key, _), c) in enumerate(done.items()):
    logp_TV = logp_BTV[b, len(PROMPTS[key]) - 1 :][: len(c.tokens)]
    np.testing.assert_allclose(c.logp, logp_TV[range(len(c.tokens)), c.tokens], atol=1e-3)
    if temperature == 0.0:
      assert c.tokens == logp_TV.argmax(-1).tolist()


@pytest.mark.parametrize(
  "config, stacked",
  # Gemma's layers in a list meet transformers in test_hf_weights
  [*itertools.product([QWEN, OLMO, LLAMA], [False, True]), (GEMMA, True)],
  ids=lambda value: getattr(value, "family", value),
)
def test_greedy_is_the_argmax_of_the_whole_row(config, stacked):
  """With unequal lengths, refilled and compacted rows, growing pools and windows."""
  asked = requests(n=4, temperature=0.0, stop_tokens=())
  asked[4] = asked[4]._replace(n=1)
  done, engine = run(asked, config=config, stacked=stacked, rows=16)
  check_against_the_trainer(done, config, temperature=0.0)
  assert {snapshot.rows for snapshot in engine.trace} == set(row_counts(16)) == {16, 8, 1}


def test_pages_in_the_order_of_a_tpu_hold_the_same(monkeypatch):
  """Pages of 6 columns are this test's alone, so that no program of another order is kept."""
  monkeypatch.setattr(decoder, "target_platform", lambda: "tpu")
  assert decoder.page_axes(shared=False) != decoder.page_axes(shared=True)
  done, _ = run(requests(temperature=0.0), config=OLMO, stacked=True, columns=6)
  check_against_the_trainer(done, OLMO, temperature=0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_trainers(temperature):
  """<= 1e-3 nats in float32."""
  done = run(requests(temperature=temperature))[0]
  check_against_the_trainer(done, QWEN, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_the_entropy_is_the_trainers_where_it_is_asked_for(temperature):
  """<= 1e-3 nats, as `make_score` computes it; a bias does not change it; others have none."""
  asked = requests(temperature=temperature, entropy=True, logit_bias=((3, 2.0),))
  asked[3] = asked[3]._replace(sampling=Sampling(8))
  done = run(asked)[0]
  for place, c in done.items():
    if place[0] == 3:
      assert c.entropy is None
      continue
    want = trainers_entropy(PROMPTS[place[0]], c.tokens, temperature or 1.0)
    np.testing.assert_allclose(c.entropy, want, atol=1e-3)
    assert len(c.entropy) == len(c.tokens)


def test_entropy_ends_where_a_stop_string_ends_the_tokens():
  asked = requests(entropy=True, stop_tokens=(), stop_strings=("7",))
  done = run(asked, text_of=lambda tokens: " ".join(map(str, tokens)))[0]
  stopped = [c for c in done.values() if c.finish_reason == "stop"]
  assert stopped and all(len(c.entropy) == len(c.tokens) for c in done.values())


def trainers_entropy(prompt, tokens, temperature):
  row = np.zeros((1, 72), np.int32)
  row[0, : len(prompt) + len(tokens)] = prompt + tokens
  params = params_of(QWEN)
  hidden_XD = hidden(params, QWEN, row)[0]
  target_X = np.roll(row[0], -1)
  _, entropy_X = token_logp(
    hidden_XD, decoder.head(params, QWEN), target_X, temperature=temperature
  )
  return entropy_X[len(prompt) - 1 :][: len(tokens)]


hidden = jit(decoder.hidden, static_argnums=1)


@pytest.mark.parametrize(
  "settings",
  [
    dict(rows=32, chunk=16, columns=32),
    dict(rows=2, chunk=3, columns=4),
    dict(rows=21, chunk=5, columns=16),
  ],
)
def test_a_response_depends_on_its_own_seed_alone(settings, monkeypatch):
  """Other company, other chunks, other pages, prompts read page by page: the same tokens."""
  monkeypatch.setattr(local, "READ_TOKENS", 16)
  assert tokens_of(run(requests(), **settings)[0]) == tokens_of(usual())


def test_a_response_does_not_depend_on_how_many_are_asked_for():
  few = run(requests(n=2))[0]
  assert tokens_of(few) == {place: c.tokens for place, c in usual().items() if place[1] < 2}
  assert usual()[4, 0].tokens != usual()[4, 1].tokens
  other = run([requests()[4]._replace(seed=99)])[0]
  assert other[4, 0].tokens != usual()[4, 0].tokens


def test_stop_tokens_end_a_response_and_are_part_of_it():
  free = run(requests(stop_tokens=(), temperature=0.0))[0][4, 0]
  assert free.finish_reason == "length" and len(free.tokens) == LIMITS[4]
  stop = free.tokens[9]
  stopped = run(requests(stop_tokens=(60, stop), temperature=0.0))[0][4, 0]
  assert stopped.finish_reason == "stop"
  assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
  assert len(stopped.logp) == len(stopped.tokens)


def test_a_stop_string_ends_a_response_at_the_token_that_completes_it():
  """It may begin in one chunk and end in the next."""

  def text_of(tokens):
    return "".join(f"<{token}>" for token in tokens)

  free = run(requests(stop_tokens=()))[0]
  for end in (5, 6, 9):  # of the third sample's 30 tokens, in chunks of 4
    tokens = free[4, 2].tokens
    stop = text_of(tokens[end - 3 : end])[1:-1]
    settings = dict(stop_tokens=(), stop_strings=("<no>", stop))
    done = run(requests(**settings), text_of=text_of)[0]
    first = next(n for n in range(31) if stop in text_of(tokens[:n]))
    assert done[4, 2].tokens == tokens[:first] and done[4, 2].finish_reason == "stop"
    assert len(done[4, 2].logp) == first
    assert sum(c.tokens == free[place].tokens for place, c in done.items()) >= len(done) - 2


def test_requests_with_other_settings_share_a_batch():
  mixed = requests()
  mixed[1] = mixed[1]._replace(sampling=Sampling(20, temperature=0.0))
  mixed[4] = mixed[4]._replace(sampling=Sampling(30, top_k=1, stop_tokens=(57, 11)))
  done = run(mixed)[0]
  assert done[1, 0].tokens == done[1, 2].tokens != usual()[1, 0].tokens
  assert done[4, 0].tokens == done[4, 1].tokens != usual()[4, 0].tokens
  assert all(
    done[place].tokens == usual()[place].tokens for place in done if place[0] not in (1, 4)
  )


def test_bans_and_biases_reach_every_row_that_has_them():
  free = run(requests(temperature=0.0, stop_tokens=()))[0]
  banned = free[4, 0].tokens[0]
  done = run(requests(temperature=0.0, stop_tokens=(), banned_tokens=(banned,)))[0]
  assert all(banned not in c.tokens for c in done.values())
  forced = run(requests(stop_tokens=(), logit_bias=((7, 1e4), (8, -1.0))))[0]
  assert {token for c in forced.values() for token in c.tokens} == {7}
  check_against_the_trainer(forced, QWEN)  # log-probabilities are those before the bias


def test_a_prompt_is_read_once_for_all_its_samples(monkeypatch):
  read = []
  kept = programs.read_shared

  def spy(params, shared, new, *, config):
    read.append(int(np.sum(new.chains[0].count_ZY > 0)))
    return kept(params, shared, new, config=config)

  monkeypatch.setattr(programs, "read_shared", spy)
  run(requests(n=8))
  assert sum(read) == sum(-(-(len(prompt) - 1) // 8) for prompt in PROMPTS)  # pages


def test_rows_and_pages_shrink_when_few_live():
  """One long response among many short ones: in the end one row, and a pool that just holds it."""
  limits = (6, 6, 6, 6, 90, 6, 6)
  asked = requests(n=8, limits=limits, stop_tokens=())
  asked[4] = asked[4]._replace(n=1)
  _, engine = run(asked, rows=64, columns=4, chunk=8)
  assert [engine.trace[0].rows, engine.trace[-1].rows] == [64, 1]
  first, last = engine.trace[0], engine.trace[-1]
  assert last.pages < first.pages and 4 * last.pages <= 3 * last.tokens


def test_prompts_of_one_token_need_no_pages():
  """And tell the same as beside others."""
  asked = [Request(2, PROMPTS[2], 3, Sampling(13, stop_tokens=(57, 11)), seed=3)]
  done, engine = run(asked)
  assert all(done[2, s].tokens == usual()[2, s].tokens for s in range(3))


def test_no_prompt_stays_in_the_cache_for_nobody():
  """With several shards a prompt can be left behind where its last sample went elsewhere."""
  engine = LocalEngine(QWEN, rows=4, row_multiple=2, chunk=4, columns=8)
  engine.load(params_of(QWEN), 0)
  decoding = engine.decoding()
  for _ in decoding.run(requests(n=5)):
    for shard in decoding.shards:
      assert sum(prompt.rows for prompt in shard.prompts.values()) == len(shard.live)
  for shard in decoding.shards:
    assert not shard.prompts and shard.shared_book.used == shard.own_book.used == 0


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(prompt=[]), "an empty prompt"),
    (dict(prompt=[61]), r"not in \[0, 61\)"),
    (dict(n=0), "n=0"),
    (dict(sampling=Sampling(0)), "max_new_tokens=0"),
    (dict(sampling=Sampling(5, temperature=-1.0)), "temperature=-1.0"),
    (dict(sampling=Sampling(5, top_p=0.0)), "top_p=0.0"),
    (dict(sampling=Sampling(5, min_p=2.0)), "min_p=2.0"),
    (dict(sampling=Sampling(5, top_k=-1)), "top_k=-1"),
    (dict(sampling=Sampling(5, banned_tokens=tuple(range(61)))), "every token banned"),
    (dict(sampling=Sampling(5, stop_strings=("x",))), "no text_of"),
    (dict(sampling=Sampling(5, stop_strings=("",))), "an empty stop string"),
    (dict(sampling=Sampling(5, beams=2)), "beams=2, which `search` reads"),
    (dict(sampling=Sampling(5, logit_bias=((3, float("inf")),))), "not finite"),
  ],
)
def test_a_request_that_cannot_be_is_named(change, words):
  request = Request("q7", [3], 1, Sampling(5), seed=0)._replace(**change)
  with pytest.raises(ValueError, match=f"request 'q7' has .*{words}"):
    run([request])


def test_lengths_of_all_kinds_meet_few_programs():
  """Counted are those of decoding, the most expensive ones."""
  limits = (200, 3, 60, 1, 20, 9, 100)
  with fakes.compilations("decode") as compiled:
    run(requests(n=8, limits=limits, stop_tokens=()), rows=32, columns=4, chunk=16)
  assert len(compiled) <= 6


def test_a_completion_is_handed_out_before_others_are_asked_for():
  engine = LocalEngine(QWEN, rows=8, chunk=4, columns=8)
  engine.load(params_of(QWEN), 0)
  taken = []

  def asked():
    for request in requests(stop_tokens=()):
      taken.append(request.key)
      yield request

  first = next(engine.generate(asked()))
  assert first.key == 0 and taken == [0, 1, 2] and len(engine.trace) == 2


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 1, 2)])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_mesh_samples_what_one_device_samples(shape, stacked):
  mesh = sharding.make_mesh(jax.devices(), **dict(zip(sharding.AXES, shape, strict=True)))
  shards = sharding.row_shards(mesh)
  with jax.set_mesh(mesh):
    params = jax.device_put(params_of(SHARDED), sharding.named(mesh, decoder.axes(SHARDED)))
    engine = LocalEngine(SHARDED, rows=8, row_multiple=shards, chunk=4, columns=8, stacked=stacked)
    engine.load(params, 0)
    done = {(c.key, c.sample_index): c for c in engine.generate(requests())}
  alone = run(requests(), config=SHARDED)[0]
  assert tokens_of(done) == tokens_of(alone)
  for place, c in done.items():
    np.testing.assert_allclose(c.logp, alone[place].logp, atol=1e-4)


SHARDED = dataclasses.replace(QWEN, vocab=64)


@pytest.mark.parametrize("stacked", [False, True])
def test_decoding_updates_its_pages_in_place(stacked):
  config, params = fakes.toy_model(0)
  sizes = dict(config=config, shared=False, shards=1, pages=64, columns=8, stacked=stacked)
  pool = jax.eval_shape(lambda: decoder.init_pool(**sizes))
  tables = programs.empty_tables(programs.Sizes(1, 4, 64, 64, readers=2, columns=8, chunk=4))
  if not stacked:
    params = jax.eval_shape(lambda p: decoder.unstacked(p, config), params)
  compiled = programs.decode.lower(
    params, pool, pool, tables, config=config, is_sorted=False
  ).compile()
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))
  assert compiled.memory_analysis().alias_size_in_bytes >= size
  shapes = {",".join(map(str, x.shape)) for x in jax.tree.leaves(pool)}
  copied = [f"f32[{shape}]" for shape in shapes if f"f32[{shape}]" in copies(compiled.as_text())]
  assert not copied


def copies(text: str) -> set[str]:
  """Returns the shapes that a program copies."""
  lines = (line.split("=", 1)[1] for line in text.splitlines() if " copy(" in line)
  return {line.split("{")[0].strip() for line in lines}
