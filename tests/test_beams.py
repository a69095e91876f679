"""Beam search finds what transformers finds, and what trying everything finds."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import torch
import transformers

from sdpo_jax import sharding
from sdpo_jax.engine.beam_step import Beams, Tables, extend
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.kernels.paged_attention import Readers
from sdpo_jax.model import decoder
from sdpo_jax.model.hf_weights import save_pretrained
from sdpo_jax.records import Request, Sampling
from tests import fakes
from tests.test_decoder import OLMO, QWEN, logits, params_of
from tests.test_local import copies

DICE = np.random.default_rng(0)
PROMPTS = [DICE.integers(1, 60, count).tolist() for count in (3, 21, 1, 2, 17)]
STOPS = (57, 11, 30)


def requests(n=3, prompts=PROMPTS, max_new_tokens=11, **sampling):
  settings = Sampling(max_new_tokens, **dict(stop_tokens=STOPS, beams=3) | sampling)
  return [Request(i, prompt, n, settings, seed=0) for i, prompt in enumerate(prompts)]


def search(asked, *, config=QWEN, rows=8, chunk=4, columns=8, **settings):
  """Returns {key: its completions, the best first}."""
  engine = LocalEngine(config, rows=rows, chunk=chunk, columns=columns, **settings)
  engine.load(params_of(config), 5)
  found = {}
  for c in engine.search(iter(asked)):
    assert c.version == 5 and c.sample_index == len(found.setdefault(c.key, []))
    found[c.key].append(c)
  assert {key: len(completions) for key, completions in found.items()} == {
    request.key: request.n for request in asked
  }
  return found


def check_against_transformers(model, found, width):
  """Tokens, and the scores as sums of log-probabilities; returns why completions ended."""
  reasons = set()
  for key, prompt in enumerate(PROMPTS):
    output = model.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      num_beams=width,
      num_return_sequences=len(found[key]),
      do_sample=False,
      length_penalty=0.0,
      max_new_tokens=11,
      eos_token_id=list(STOPS),
      pad_token_id=60,
      return_dict_in_generate=True,
      output_scores=True,
    )
    sequences, scores = output.sequences.tolist(), output.sequences_scores.tolist()
    for c, sequence, score in zip(found[key], sequences, scores, strict=True):
      end = sequence[len(prompt) :]
      assert c.tokens == end[: len(c.tokens)] and set(end[len(c.tokens) :]) <= {60}
      assert sum(c.logp) == pytest.approx(score, abs=1e-4)
      assert (c.finish_reason == "stop") == (c.tokens[-1] in STOPS)
      reasons.add(c.finish_reason)
  return reasons


@pytest.mark.parametrize("config", [QWEN, OLMO], ids=["qwen", "olmo"])
def test_transformers_finds_the_same(config, tmp_path):
  """With prompts of unequal lengths, in one wave and in several, stop tokens and windows."""
  save_pretrained(tmp_path, config, params_of(config))
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
  for width, settings in ((4, dict(rows=8)), (3, dict(rows=40, stacked=True, chunk=5, columns=4))):
    found = search(requests(beams=width), config=config, **settings)
    reasons = check_against_transformers(model, found, width)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_wide_search_finds_the_likeliest_of_all(temperature):
  """Every continuation of three tokens of a tiny vocabulary is tried."""
  config = dataclasses.replace(QWEN, vocab=5)
  prompt, stop = [3, 1, 2, 0, 3], 4
  ends = [
    end
    for length in (1, 2, 3)
    for end in itertools.product(range(5), repeat=length)
    if stop not in end[:-1] and (end[-1] == stop or length == 3)
  ]
  rows = np.zeros((len(ends), 8), np.int32)
  for row_T, end in zip(rows, ends, strict=True):
    row_T[: 5 + len(end)] = [*prompt, *end]
  logp_BTV = jax.nn.log_softmax(logits(params_of(config), config, rows) / temperature)
  scores = [
    sum(logp_BTV[b, 4 + i, token] for i, token in enumerate(end)) for b, end in enumerate(ends)
  ]
  likeliest = np.argsort(scores)[::-1][:5]
  settings = dict(prompts=[prompt], max_new_tokens=3, stop_tokens=(stop,), temperature=temperature)
  found = search(requests(5, beams=16, **settings), config=config)[0]
  assert [c.tokens for c in found] == [list(ends[b]) for b in likeliest]
  for c, b in zip(found, likeliest, strict=True):
    want = [logp_BTV[b, 4 + i, token] for i, token in enumerate(c.tokens)]
    np.testing.assert_allclose(c.logp, want, atol=1e-3)


def test_a_search_of_width_one_is_greedy():
  engine = LocalEngine(QWEN, rows=8, chunk=4, columns=8)
  engine.load(params_of(QWEN), 0)
  greedy = {c.key: c.tokens for c in engine.generate(requests(1, temperature=0.0, beams=0))}
  assert greedy == {key: c.tokens for key, (c,) in search(requests(1, beams=1)).items()}


def test_requests_of_other_lengths_and_stops_share_a_wave():
  """Each is found as it is alone; pages grow, and few programs are compiled."""
  mixed = [
    request._replace(sampling=Sampling(1 + 7 * i, stop_tokens=STOPS[: i % 4], beams=3))
    for i, request in enumerate(requests())
  ]
  settings = dict(stacked=True, chunk=8, columns=16)
  with fakes.compilations("extend") as programs:
    found = search(mixed, rows=30, **settings)
  assert len(programs) <= 2  # one page and two
  for i, request in enumerate(mixed):
    (alone,) = search([request], **settings).values()
    assert [c.tokens for c in alone] == [c.tokens for c in found[i]]


def test_a_mesh_finds_what_one_device_finds():
  config = dataclasses.replace(OLMO, vocab=64)
  mesh = sharding.make_mesh(jax.devices(), data=2, fsdp=2, tensor=2)
  settings = dict(chunk=4, columns=8, stacked=True)
  with jax.set_mesh(mesh):
    params = jax.device_put(params_of(config), sharding.named(mesh, decoder.axes(config)))
    engine = LocalEngine.on_mesh(sharding.sampling_mesh(mesh), config, rows=8, **settings)
    engine.load(params, 0)
    found = list(engine.search(requests()))
  alone = search(requests(), config=config, stacked=True)
  assert [c.tokens for c in found] == [c.tokens for c in itertools.chain(*alone.values())]


def test_no_beam_is_copied():
  """The pool is updated in place, although beams go on with the text of others."""
  config, params = fakes.toy_model(0)
  pools = functools.partial(decoder.init_pool, config, shards=1, pages=64, columns=8, stacked=False)
  shared, own = (
    jax.eval_shape(functools.partial(pools, shared=shared)) for shared in (True, False)
  )
  zeros = functools.partial(np.zeros, dtype=np.int32)
  beams = Beams(zeros((1, 8)), np.zeros((1, 8), np.float32), zeros((1, 8, 64)))
  readers = Readers(zeros((1, 64, 4)), zeros((1, 64)), zeros((1, 64)))
  tables = Tables(readers, zeros((1, 8)), np.ones((1, 2), np.float32), zeros((1, 2, 1)))
  params = jax.eval_shape(lambda p: decoder.unstacked(p, config), params)
  span = np.int32(0), np.int32(4)
  lowered = extend.lower(params, shared, own, beams, tables, span, config=config, chunk=4)
  compiled = lowered.compile()
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(own))
  assert compiled.memory_analysis().alias_size_in_bytes >= size
  shapes = {f"f32[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(own)}
  assert shapes.isdisjoint(copies(compiled.as_text()))


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(n=4), "n=4, more than beams=3"),
    (dict(prompt=[]), "an empty prompt"),
    (
      dict(sampling=Sampling(5, top_p=0.5, min_p=0.1, beams=3)),
      "top_p, min_p, which a beam search does not",
    ),
    (
      dict(sampling=Sampling(5, entropy=True, beams=3)),
      "entropy, which a beam search does not read",
    ),
  ],
)
def test_a_request_that_cannot_be_searched_for_is_named(change, words):
  with pytest.raises(ValueError, match=f"request 0 has .*{words}"):
    search([requests()[0]._replace(**change)])
