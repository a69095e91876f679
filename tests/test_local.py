"""The local engine says what the trainer would say; a response depends on its seed alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.engine.local import LocalEngine, choose, top_p_cut
from sdpo_jax.model import decoder
from sdpo_jax.records import Sampling
from tests import fakes

PROMPTS = [[5, 6, 7], [9] * 11, [250, 3]]


def generate(prompts=PROMPTS, *, rows=8, n=2, seeds=(1, 2, 3), chunk=3, **sampling):
  config, params = fakes.toy_model(0)
  settings = Sampling(**(dict(max_new_tokens=7, stop_tokens=(257, 11)) | sampling))
  engine = LocalEngine(config, rows=rows, prompt_multiple=8, chunk=chunk)
  done = list(engine.generate(params, prompts, n=n, sampling=settings, seeds=list(seeds)))
  assert len(done) == len(prompts) * n
  return {(c.prompt_index, c.sample_index): c for c in done}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_trainers(temperature):
  """<= 1e-3 nats in float32, for left-padded rows of different lengths."""
  config, params = fakes.toy_model(0)
  for (p, _), c in generate(temperature=temperature, stop_tokens=(257,)).items():
    row = jnp.asarray([PROMPTS[p] + c.tokens])
    logp_TV = jax.nn.log_softmax(decoder.logits(params, config, row)[0] / temperature)
    want = [float(logp_TV[len(PROMPTS[p]) - 1 + i, t]) for i, t in enumerate(c.tokens)]
    np.testing.assert_allclose(c.logp, want, atol=1e-3)


def test_a_response_depends_on_its_own_seed_alone():
  """Other batch, other company, other chunk: the same tokens."""
  together = generate()
  alone = generate(prompts=PROMPTS[1:2], seeds=(2,), rows=2, chunk=7)
  for s in range(2):
    assert alone[0, s].tokens == together[1, s].tokens
  assert together[1, 0].tokens != together[1, 1].tokens
  assert generate(seeds=(1, 99, 3))[1, 0].tokens != together[1, 0].tokens


def test_stop_tokens_end_a_response_and_are_part_of_it():
  config, params = fakes.toy_model(0)
  free = generate(temperature=0.0, stop_tokens=())[0, 0]
  assert free.finish_reason == "length" and len(free.tokens) == 7
  stopped = generate(temperature=0.0, stop_tokens=(free.tokens[2],))[0, 0]
  assert stopped.finish_reason == "stop"
  assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1] and len(
    stopped.logp
  ) == len(stopped.tokens)


def test_greedy_is_the_argmax_of_the_full_forward_pass():
  config, params = fakes.toy_model(0)
  c = generate(temperature=0.0, stop_tokens=())[1, 0]
  row = PROMPTS[1] + c.tokens
  best = jnp.argmax(decoder.logits(params, config, jnp.asarray([row]))[0], -1)
  assert c.tokens == best[len(PROMPTS[1]) - 1 : -1].tolist()


def test_top_p_keeps_the_smallest_sufficient_set():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  kept = lambda p: np.isfinite(np.asarray(top_p_cut(logits, p)))[0].tolist()
  assert kept(0.4) == [True, False, False, False]
  assert kept(0.6) == [True, True, False, False]
  assert kept(0.81) == [True, True, True, False]
  assert kept(0.999) == [True] * 4


def test_frequencies_follow_the_distribution():
  """Makes 20,000 draws at temperature 0.5 with top-p 0.9.

  Their shares are within five standard errors of the renormalised, sharpened distribution.
  """
  p = np.array([0.45, 0.3, 0.2, 0.05])
  logits = jnp.tile(jnp.log(jnp.array(p, jnp.float32)), (20_000, 1))
  keys = jax.random.split(jax.random.key(0), 20_000)
  token, logp = choose(logits, keys, Sampling(1, temperature=0.5, top_p=0.9))
  sharp = p**2 / np.sum(p**2)
  kept = np.where(np.arange(4) < 3, sharp, 0.0)  # 0.52 + 0.23 + ... : the first three reach 0.9
  kept = kept / kept.sum()
  share = np.bincount(np.asarray(token), minlength=4) / 20_000
  assert np.all(np.abs(share - kept) <= 5 * np.sqrt(kept * (1 - kept) / 20_000))
  np.testing.assert_allclose(
    np.asarray(logp)[:50], np.log(sharp)[np.asarray(token)[:50]], atol=1e-5
  )
