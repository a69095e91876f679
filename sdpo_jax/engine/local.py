"""The local engine: samples from the decoder on this process's own devices.

A jitted prefill reads the prompts into a key-value cache, and a jitted loop decodes from it.
Prompts are padded on the LEFT, so that all rows write the same cache column and a write is
one dynamic_update_slice.

Shapes are bucketed, which bounds the number of compilations. The prompts' length is rounded up
to a multiple, the number of rows to a power of two, or to the most allowed. Decoding runs in chunks
of tokens. Rows that have finished are handed out after each chunk, so that judging starts while
others are still being sampled.

Randomness: there is one seed a prompt, folded with the sample's index and then with the
token's index. A response thus depends on its own seed alone, not on what shares the batch.
Numerics: logits and log-probabilities are float32. A log-probability is that of the sampled
token at the sampling temperature, over the whole vocabulary, before top-p cuts. At temperature
0 it is that at temperature 1.
"""

import functools
from typing import Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.hosts import to_host
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Completion, Sampling


class DecodeState(NamedTuple):
  """Holds what decoding carries from token to token."""

  cache: decoder.Cache
  hidden_BD: jax.Array  # of the last token: its logits give the next one
  length_B: jax.Array  # int32: real tokens so far, the next token's position
  done_B: jax.Array  # bool
  tokens_BR: jax.Array  # int32: sampled so far
  logp_BR: jax.Array  # float32
  t: jax.Array  # int32: tokens sampled so far, the same for all rows


def top_p_cut(logits_BV: jax.Array, top_p: float) -> jax.Array:
  """Sets to -inf what is outside the smallest set of entries whose probability reaches top_p.

  The likeliest entry always stays.
  """
  sorted_BV = jnp.flip(jnp.sort(logits_BV, -1), -1)
  probability_BV = jax.nn.softmax(sorted_BV, -1)
  before_BV = jnp.cumsum(probability_BV, -1) - probability_BV
  last_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), -1, keepdims=True)
  return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)


def choose(
  logits_BV: jax.Array, key_B: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
  """Returns (token_B, logp_B) of one step."""
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
  """Returns one key a row: the prompt's seed folded with the sample's index."""

  def sample_key(seed, sample):
    return jax.random.fold_in(jax.random.key(seed), sample)

  return jax.vmap(sample_key)(seed_B, sample_B)


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens"))
def prefill(
  params, prompt_BT: jax.Array, length_B: jax.Array, *, config: ModelConfig, max_new_tokens: int
) -> DecodeState:
  """Reads the prompts (padded on the left) into a fresh cache of T + max_new_tokens columns."""
  B, T = prompt_BT.shape
  position_BT = jnp.arange(T)[None] - (T - length_B)[:, None]
  cache = decoder.init_cache(config, B, T + max_new_tokens)
  hidden_BTD, cache = decoder.extend(
    params,
    config,
    prompt_BT,
    cache,
    start=jnp.int32(0),
    positions_BT=jnp.maximum(position_BT, 0),
    valid_BT=position_BT >= 0,
  )
  hidden_BD = hidden_BTD[:, -1]
  done_B = jnp.zeros(B, bool)
  tokens_BR = jnp.zeros((B, max_new_tokens), jnp.int32)
  logp_BR = jnp.zeros((B, max_new_tokens), jnp.float32)
  return DecodeState(cache, hidden_BD, length_B, done_B, tokens_BR, logp_BR, t=jnp.int32(0))


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
    token_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, state.t)
    token_B, logp_B = choose(logits_BV, token_key_B, sampling)
    token_B = jnp.where(state.done_B, 0, token_B)
    tokens_BR = jax.lax.dynamic_update_slice(state.tokens_BR, token_B[:, None], (0, state.t))
    logp_B = jnp.where(state.done_B, 0.0, logp_B)
    logp_BR = jax.lax.dynamic_update_slice(state.logp_BR, logp_B[:, None], (0, state.t))
    # the cache ends in max_new_tokens columns for what is sampled
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


def _next_power_of_two(count: int) -> int:
  """Returns the least power of two that is not below a positive count."""
  return 1 << (count - 1).bit_length()


def _round_up(count: int, multiple: int) -> int:
  return -(-count // multiple) * multiple


class _Job(NamedTuple):
  """Asks for one sample of one prompt."""

  prompt_index: int
  sample_index: int
  prompt: list[int]
  seed: int


class LocalEngine:
  """Samples with the decoder itself. `sdpo_jax.engine` states what `generate` guarantees."""

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
    """Keeps the settings; weights come with each call of `generate`.

    Args:
      config: the decoder that samples.
      rows: most sequences decoded together, which row_multiple divides.
      row_multiple: the row shards of a mesh.
      prompt_multiple: what prompt lengths are rounded up to.
      chunk: tokens between hand-outs.
      pad_token: what stands to the left of a prompt; nothing attends to it.
    """
    self.config = config
    self.rows = rows
    self.row_multiple = row_multiple
    self.prompt_multiple = prompt_multiple
    self.chunk = chunk
    self.pad_token = pad_token

  def generate(
    self, params, prompts: list[list[int]], *, n: int, sampling: Sampling, seeds: list[int]
  ) -> Iterator[Completion]:
    """Yields n completions of each prompt, as they finish, in no promised order.

    `seeds` holds one seed a prompt.
    """
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts but {len(seeds)} seeds"
    jobs = [_Job(p, s, prompts[p], seeds[p]) for p in range(len(prompts)) for s in range(n)]
    for first in range(0, len(jobs), self.rows):
      yield from self._wave(params, jobs[first : first + self.rows], sampling)

  def _wave(self, params, jobs: list[_Job], sampling: Sampling) -> Iterator[Completion]:
    """Yields the completions of jobs that are decoded together, one a row."""
    prompt_BT, length_B, key_B = self._inputs(jobs)
    state = prefill(
      params, prompt_BT, length_B, config=self.config, max_new_tokens=sampling.max_new_tokens
    )
    rows = len(prompt_BT)
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
          waiting.remove(b)
          yield _completion(jobs[b], tokens_BR[b, :t], logp_BR[b, :t], sampling.stop_tokens)

  def _inputs(self, jobs: list[_Job]) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """Returns (prompt_BT padded on the left, length_B, key_B), in bucketed shapes.

    Rows beyond the jobs read one padding token and are thrown away.
    """
    T = _round_up(max(len(job.prompt) for job in jobs), self.prompt_multiple)
    rows = min(self.rows, _round_up(_next_power_of_two(len(jobs)), self.row_multiple))
    prompt_BT = np.full((rows, T), self.pad_token, np.int32)
    length_B = np.ones(rows, np.int32)
    seed_B = np.zeros(rows, np.uint32)
    sample_B = np.zeros(rows, np.uint32)
    for b, job in enumerate(jobs):
      prompt_BT[b, T - len(job.prompt) :] = job.prompt
      length_B[b] = len(job.prompt)
      seed_B[b] = job.seed
      sample_B[b] = job.sample_index
    return prompt_BT, length_B, sample_keys(seed_B, sample_B)


def _completion(
  job: _Job, tokens_R: np.ndarray, logp_R: np.ndarray, stop_tokens: tuple[int, ...]
) -> Completion:
  """Cuts a row after its first stop token."""
  stops = np.flatnonzero(np.isin(tokens_R, stop_tokens))
  length = int(stops[0]) + 1 if len(stops) else len(tokens_R)
  return Completion(
    job.prompt_index,
    job.sample_index,
    tokens_R[:length].tolist(),
    logp_R[:length].tolist(),
    "stop" if len(stops) else "length",
  )
