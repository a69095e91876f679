"""Beam search: the likeliest continuations of prompts, as far as beams of some width find them.

Score: the sum of the log-probabilities of a continuation's tokens, in nats, at the temperature (at
temperature 0, as at 1). There is no length penalty, so that a short continuation may win. It is
what transformers' `generate(num_beams=W, length_penalty=0.0)` finds and ranks by.

A request has up to W = `sampling.beams` unfinished beams. Of all their continuations by one token
the W best are looked at; those that end, by a stop token or at max_new_tokens, are finished. The W
best that do not end in a stop token are the next beams. A request is done when no unfinished beam
can come among its n best: a score only falls.

Requests go in waves of as many as fill the engine's rows; a wave ends with its last one, and the
pages of beams that died stay so long. What beams add starts small, and doubles.
"""

from collections.abc import Iterator
import itertools
import math
from typing import NamedTuple

import jax
import numpy as np

from sdpo_jax.engine import programs
from sdpo_jax.engine.beam_step import Beams, Found, Tables, extend
from sdpo_jax.engine.pages import pool_size, power_of_two
from sdpo_jax.engine.programs import Setup
from sdpo_jax.engine.reading import read_prompts
from sdpo_jax.engine.rows import Prompt
from sdpo_jax.engine.tables import write_readers
from sdpo_jax.kernels.paged_attention import Readers
from sdpo_jax.records import Completion, Request, Sampling


def check(request: Request, vocab: int) -> None:
  """Raises ValueError for a request that the engine can sample for, and cannot search for."""
  sampling, plain = request.sampling, Sampling(1)
  width = sampling.beams
  cuts = ("top_p", "top_k", "min_p", "logit_bias", "banned_tokens", "stop_strings", "entropy")
  unread = [name for name in cuts if getattr(sampling, name) != getattr(plain, name)]
  problems = {
    f"n={request.n}, more than beams={width}": request.n > width,
    f"n={request.n}, more than the {vocab} tokens": request.n > vocab,
    f"{', '.join(unread)}, which a beam search does not read": bool(unread),
  }
  for problem, is_there in problems.items():
    if is_there:
      raise ValueError(f"request {request.key!r} has {problem}")


def search(setup: Setup, requests: list[Request], *, version: int) -> Iterator[Completion]:
  """Yields the n best continuations of each request; the best one's sample_index is 0."""
  for width, group in itertools.groupby(requests, lambda request: request.sampling.beams):
    searches = [_Search(request) for request in group]
    most = power_of_two(-(-len(searches) // setup.shards))
    per_shard = max(1, min(setup.rows // width, most))
    size = per_shard * setup.shards
    for wave in (searches[i : i + size] for i in range(0, len(searches), size)):
      with setup.placed():
        _run_wave(setup, wave, width, per_shard)
      for one in wave:
        yield from one.completions(version)


class _Node(NamedTuple):
  """A continuation: another one and a token more."""

  parent: "_Node | None"  # None: nothing yet
  token: int
  logp: float


class _Search:
  """One request while it is searched."""

  def __init__(self, request: Request):
    self.request = request
    self.beams: list[_Node | None] = [None] * request.sampling.beams
    self.length = 0  # tokens of each beam
    self.finished: list[tuple[float, _Node]] = []  # with their scores, the best first
    self.is_done = False

  def add(self, best: Found, kept: Found) -> None:
    """Takes in one step of the search, in lists."""
    if self.is_done:
      return
    sampling = self.request.sampling
    self.length += 1
    is_last = self.length == sampling.max_new_tokens
    for score, node in self._continuations(best):
      if score != -math.inf and (is_last or node.token in sampling.stop_tokens):
        self.finished.append((score, node))
    self.finished.sort(key=lambda entry: -entry[0])  # of two that tie the earlier one stays ahead
    del self.finished[self.request.n :]
    going_on = self._continuations(kept)
    self.beams = [node for _, node in going_on]
    is_full = len(self.finished) == self.request.n
    self.is_done = is_last or (is_full and self.finished[-1][0] >= going_on[0][0])

  def _continuations(self, found: Found) -> list[tuple[float, _Node]]:
    return [
      (score, _Node(self.beams[parent], token, logp))
      for score, parent, token, logp in zip(*found, strict=True)
    ]

  def completions(self, version: int) -> Iterator[Completion]:
    """Yields what was found, the best first."""
    stop_tokens = self.request.sampling.stop_tokens
    for rank, (_, end) in enumerate(self.finished):
      tokens: list[int] = []
      logp: list[float] = []
      node: _Node | None = end
      while node is not None:
        tokens.append(node.token)
        logp.append(node.logp)
        node = node.parent
      reason = "stop" if end.token in stop_tokens else "length"
      yield Completion(self.request.key, rank, tokens[::-1], logp[::-1], reason, version)


def _run_wave(setup: Setup, searches: list[_Search], width: int, per_shard: int) -> None:
  """Runs searches until all are done: the x-th as request x // Z of shard x % Z."""
  Z, C, B = setup.shards, setup.columns, width * per_shard
  prompts, readers = _lay_out([searches[z::Z] for z in range(Z)], width, C)
  beams, tables = _begin(setup, searches, readers, width, per_shard)
  longest = max(one.request.sampling.max_new_tokens for one in searches)
  pages, t = power_of_two(-(-min(setup.chunk, longest) // C)), 0  # pages: of each row
  beams = _with_columns(beams, pages * C)
  shared, own = programs.empty_pools(
    config=setup.config,
    shards=Z,
    pages=(readers.base_ZW.shape[1], pages * B),
    columns=C,
    stacked=setup.stacked,
  )
  shared = read_prompts(setup, shared, prompts)
  while not all(one.is_done for one in searches):
    count = min(setup.chunk, longest - t)
    need = power_of_two(-(-(t + count) // C))
    if need > pages:
      source_W = np.append(np.arange(pages * B), np.zeros((need - pages) * B, int))
      own = programs.resized(own, np.tile(source_W.astype(np.int32), (Z, 1)))
      beams, pages = _with_columns(beams, need * C), need
    beams, steps, own = extend(
      setup.params,
      shared,
      own,
      beams,
      tables,
      (np.int32(t), np.int32(count)),
      config=setup.config,
      chunk=setup.chunk,
    )
    beams, steps = jax.tree.map(np.asarray, (beams, steps))
    for x, one in enumerate(searches):
      for i in range(count):
        one.add(*jax.tree.map(lambda found, at=(i, x % Z, x // Z): found[at].tolist(), steps))
    t += count


def _begin(
  setup: Setup, searches: list[_Search], readers: Readers, width: int, per_shard: int
) -> tuple[Beams, Tables]:
  """Returns one beam for each request, which is its prompt, and what holds for the whole wave."""
  Z, Q, B = setup.shards, per_shard, width * per_shard
  stops = max(len(one.request.sampling.stop_tokens) for one in searches)
  beams = Beams(programs.ints(Z, B), np.full((Z, B), -np.inf, np.float32), programs.ints(Z, B, 0))
  stop_ZQX = programs.ints(Z, Q, power_of_two(stops), fill=-1)
  tables = Tables(readers, programs.ints(Z, B), np.ones((Z, Q), np.float32), stop_ZQX)
  for x, one in enumerate(searches):
    z, q = x % Z, x // Z
    rows, sampling = slice(q * width, (q + 1) * width), one.request.sampling
    beams.token_ZB[z, rows] = one.request.prompt[-1]
    beams.score_ZB[z, q * width] = 0.0
    tables.begin_ZB[z, rows] = len(one.request.prompt) - 1
    tables.temperature_ZQ[z, q] = sampling.temperature or 1.0
    stop_ZQX[z, q, : len(sampling.stop_tokens)] = sampling.stop_tokens
  return beams, tables


def _with_columns(beams: Beams, columns: int) -> Beams:
  """Returns beams that have room for so many tokens of their own."""
  more = columns - beams.slot_ZBT.shape[-1]
  unwritten = np.full((*beams.token_ZB.shape, more), -1, np.int32)
  return beams._replace(slot_ZBT=np.append(beams.slot_ZBT, unwritten, -1))


def _lay_out(
  searches: list[list[_Search]], width: int, columns: int
) -> tuple[list[list[Prompt]], Readers]:
  """Returns the prompts of each shard, with pages, and the beams that read these."""
  Z, C = len(searches), columns
  prompts = [[Prompt(tuple(one.request.prompt)) for one in shard] for shard in searches]
  size = pool_size(max(sum(-(-prompt.length // C) for prompt in shard) for shard in prompts))
  readers = programs.no_readers(Z, size, width)
  for z, shard in enumerate(prompts):
    pages = iter(range(size))
    for q, prompt in enumerate(shard):
      prompt.pages = [next(pages) for _ in range(0, prompt.length, C)]
      write_readers(readers, z, prompt, range(q * width, (q + 1) * width), C)
  return prompts, readers
