"""Sampling from the decoder: a jitted prefill and a jitted decode loop over a key-value cache; tokens and log-probabilities out.

Prompts are padded on the LEFT, so that all rows write the same cache column and a write is one dynamic_update_slice. Shapes are
bucketed (prompt length to a multiple, rows to a power of two or the most allowed), which bounds the number of compilations. Decoding runs in chunks
of tokens; rows that have finished are handed out after each chunk, so that judging starts while others are still being sampled.

Randomness: one seed a prompt, folded with the sample index and then with the token's index: a response depends on its own seed
alone, not on what shares the batch.
Numerics: logits and log-probabilities are float32. A log-probability is that of the sampled token at the sampling temperature,
over the whole vocabulary, before top-p cuts; at temperature 0 it is that at temperature 1.
"""

import functools
from typing import Any, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.hosts import to_host
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Completion, Sampling


class DecodeState(NamedTuple):
  cache: Any
  hidden_BD: jax.Array  # of the last token: its logits give the next one
  length_B: jax.Array  # int32: real tokens so far, the next token's position
  done_B: jax.Array  # bool
  tokens_BR: jax.Array  # int32: sampled so far
  logp_BR: jax.Array  # float32
  t: jax.Array  # int32: tokens sampled so far, the same for all rows


def top_p_cut(logits_BV: jax.Array, top_p: float) -> jax.Array:
  """Keeps the smallest set of entries whose probability reaches top_p (always the likeliest one)."""
  sorted_BV = jnp.flip(jnp.sort(logits_BV, -1), -1)
  probability_BV = jax.nn.softmax(sorted_BV, -1)
  before_BV = jnp.cumsum(probability_BV, -1) - probability_BV
  last_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), -1, keepdims=True)
  return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)


def choose(
  logits_BV: jax.Array, key_B: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
  """(token_B, logp_B) of one step."""
  if sampling.temperature == 0.0:
    token_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
  else:
    logits_BV = logits_BV / sampling.temperature
    allowed_BV = top_p_cut(logits_BV, sampling.top_p) if sampling.top_p < 1.0 else logits_BV
    token_B = jax.vmap(jax.random.categorical)(key_B, allowed_BV).astype(jnp.int32)
  logp_BV = jax.nn.log_softmax(logits_BV)
  return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], -1)[:, 0]


@jax.jit
def sample_keys(seed_B, sample_B) -> jax.Array:
  """One key a row: the prompt's seed folded with the sample's index."""
  return jax.vmap(lambda seed, sample: jax.random.fold_in(jax.random.key(seed), sample))(
    seed_B, sample_B
  )


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens"))
def prefill(
  params, prompt_BP: jax.Array, length_B: jax.Array, *, config: ModelConfig, max_new_tokens: int
) -> DecodeState:
  """Reads the prompts (padded on the left) into a fresh cache of P + max_new_tokens columns."""
  B, P = prompt_BP.shape
  position_BP = jnp.arange(P)[None] - (P - length_B)[:, None]
  cache = decoder.init_cache(config, B, P + max_new_tokens)
  hidden_BPD, cache = decoder.extend(
    params,
    config,
    prompt_BP,
    cache,
    start=jnp.int32(0),
    positions_BT=jnp.maximum(position_BP, 0),
    valid_BT=position_BP >= 0,
  )
  return DecodeState(
    cache,
    hidden_BPD[:, -1],
    length_B,
    jnp.zeros(B, bool),
    jnp.zeros((B, max_new_tokens), jnp.int32),
    jnp.zeros((B, max_new_tokens), jnp.float32),
    jnp.int32(0),
  )


@functools.partial(
  jax.jit, static_argnames=("config", "sampling", "chunk"), donate_argnames=("state",)
)
def decode(
  params,
  state: DecodeState,
  key_B: jax.Array,
  *,
  config: ModelConfig,
  sampling: Sampling,
  chunk: int,
) -> DecodeState:
  """Samples up to `chunk` more tokens of each row; stops early when every row is done."""
  stop = jnp.asarray(sampling.stop_tokens, jnp.int32)
  last = jnp.minimum(state.t + chunk, sampling.max_new_tokens)

  def body(state: DecodeState) -> DecodeState:
    logits_BV = decoder.project(state.hidden_BD, decoder.head(params, config))
    token_B, logp_B = choose(
      logits_BV, jax.vmap(jax.random.fold_in, (0, None))(key_B, state.t), sampling
    )
    token_B = jnp.where(state.done_B, 0, token_B)
    tokens_BR = jax.lax.dynamic_update_slice(state.tokens_BR, token_B[:, None], (0, state.t))
    logp_BR = jax.lax.dynamic_update_slice(
      state.logp_BR, jnp.where(state.done_B, 0.0, logp_B)[:, None], (0, state.t)
    )
    start = state.cache.valid_BS.shape[1] - sampling.max_new_tokens + state.t
    hidden_B1D, cache = decoder.extend(
      params,
      config,
      token_B[:, None],
      state.cache,
      start=start,
      positions_BT=state.length_B[:, None],
      valid_BT=jnp.ones((token_B.shape[0], 1), bool),
    )
    done_B = state.done_B | jnp.isin(token_B, stop)
    return DecodeState(
      cache, hidden_B1D[:, 0], state.length_B + 1, done_B, tokens_BR, logp_BR, state.t + 1
    )

  return jax.lax.while_loop(lambda s: (s.t < last) & ~jnp.all(s.done_B), body, state)


class LocalEngine:
  """The plain engine. `generate` has the engine interface's signature."""

  def __init__(
    self,
    config: ModelConfig,
    *,
    rows: int,
    row_multiple: int = 1,
    prompt_multiple: int = 16,
    chunk: int = 8,
    pad_token: int = 0,
  ):
    """rows: most sequences decoded together, which row_multiple (the row shards of a mesh) divides; prompt_multiple: prompt lengths are rounded up to it; chunk: tokens between hand-outs."""
    self.config, self.rows, self.row_multiple, self.prompt_multiple, self.chunk, self.pad_token = (
      config,
      rows,
      row_multiple,
      prompt_multiple,
      chunk,
      pad_token,
    )

  def generate(
    self, params, prompts: list[list[int]], *, n: int, sampling: Sampling, seeds: list[int]
  ) -> Iterator[Completion]:
    """Yields n completions of each prompt, as they finish, in no promised order. seeds: one per prompt."""
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts but {len(seeds)} seeds"
    jobs = [(p, s) for p in range(len(prompts)) for s in range(n)]
    for first in range(0, len(jobs), self.rows):
      yield from self._wave(params, prompts, jobs[first : first + self.rows], sampling, seeds)

  def _wave(self, params, prompts, jobs, sampling: Sampling, seeds) -> Iterator[Completion]:
    longest = max(len(prompts[p]) for p, _ in jobs)
    P = -(-longest // self.prompt_multiple) * self.prompt_multiple
    rows = min(
      self.rows, -(-(1 << (len(jobs) - 1).bit_length()) // self.row_multiple) * self.row_multiple
    )
    prompt_BP = np.full((rows, P), self.pad_token, np.int32)
    # rows beyond the jobs read one padding token and are thrown away
    length_B = np.ones(rows, np.int32)
    seed_B, sample_B = np.zeros(rows, np.uint32), np.zeros(rows, np.uint32)
    for b, (p, s) in enumerate(jobs):
      prompt_BP[b, P - len(prompts[p]) :] = prompts[p]
      length_B[b], seed_B[b], sample_B[b] = len(prompts[p]), seeds[p], s
    key_B = sample_keys(seed_B, sample_B)
    state = prefill(
      params, prompt_BP, length_B, config=self.config, max_new_tokens=sampling.max_new_tokens
    )
    if len(jobs) < rows:
      state = state._replace(done_B=np.arange(rows) >= len(jobs))
    waiting = set(range(len(jobs)))
    while waiting:
      state = decode(params, state, key_B, config=self.config, sampling=sampling, chunk=self.chunk)
      done_B, tokens_BR, logp_BR, t = map(
        to_host, (state.done_B, state.tokens_BR, state.logp_BR, state.t)
      )
      for b in sorted(waiting):
        if done_B[b] or t >= sampling.max_new_tokens:
          stops = np.flatnonzero(np.isin(tokens_BR[b, :t], sampling.stop_tokens))
          length = int(stops[0]) + 1 if len(stops) else int(t)
          waiting.remove(b)
          yield Completion(
            *jobs[b],
            tokens_BR[b, :length].tolist(),
            logp_BR[b, :length].tolist(),
            "stop" if len(stops) else "length",
          )
