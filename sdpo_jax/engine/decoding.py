"""One call of `generate`: who is decoded with whom, chunk by chunk.

Each round gives free rows to what waits, reads what is new into the cache, decodes a chunk of
tokens, and takes out what has ended.

In a call that is fed by a `RequestQueue`, a row that has ended is parked until nothing follows it:
a request whose prompt begins with its text goes on in its pages, and only what is new is read. As
many are parked as rows are decoded together.

Rows are numbered anew for each chunk, in the order of their requests. What is computed thus depends
on the requests alone, never on time.
"""

from collections.abc import Callable, Iterable, Iterator
import functools
from typing import NamedTuple

import jax
import numpy as np

from sdpo_jax.engine import programs
from sdpo_jax.engine.cache import Cache, Shard
from sdpo_jax.engine.programs import Setup
from sdpo_jax.engine.requests import RequestQueue, check
from sdpo_jax.engine.rows import Parked
from sdpo_jax.engine.sampling import needs_sorting
from sdpo_jax.engine.tables import grown_sizes, least_sizes, make_tables
from sdpo_jax.errors import Preempted
from sdpo_jax.records import Completion, Request


class Snapshot(NamedTuple):
  """What the engine held while it decoded one chunk."""

  rows: int  # that the program has
  live: int
  steps: int  # tokens that the chunk took
  pages: int  # of both pools, in memory
  tokens: int  # that live rows and their prompts had in the cache at its end


def row_counts(rows: int) -> list[int]:
  """Returns the numbers of rows that programs are compiled for: a quarter each time, and one.

  A batch that is small from the beginning stays as it is: compiling would cost more than it spares.
  """
  counts = [rows]
  while counts[-1] > 8:
    counts.append(max(8, counts[-1] // 4))
  return counts if len(counts) == 1 else [*counts, 1]


class _Waiting(NamedTuple):
  """A request some of whose samples have no row yet."""

  request: Request
  tokens: tuple[int, ...]  # of its prompt
  sample_index: int  # the next one


class Decoding:
  """Samples what is asked for in one call."""

  def __init__(
    self,
    setup: Setup,
    version: int,
    *,
    text_of: Callable[[list[int]], str] | None,
    deterministic: bool,
    is_interrupted: Callable[[], bool] = lambda: False,
  ):
    """Takes the settings of the engine. version: of the weights in the setup."""
    self.is_interrupted = is_interrupted
    self.setup, self.version = setup, version
    self.text_of, self.deterministic = text_of, deterministic
    self.cache = Cache(setup)
    self.trace: list[Snapshot] = []
    self._sizes = least_sizes(setup)  # those of the last chunk
    self._waiting: _Waiting | None = None
    self._is_full = False  # whether room, and not requests, ran out last

  @property
  def shards(self) -> list[Shard]:
    """The shards of the rows."""
    return self.cache.shards

  def run(self, requests: Iterable[Request] | RequestQueue) -> Iterator[Completion]:
    """Yields all completions.

    Raises Preempted once it is interrupted: after a chunk, or where it waits for answers soon.
    """
    queue: RequestQueue | None = None
    if isinstance(requests, RequestQueue):
      queue, take = requests, requests.take
    else:
      take = functools.partial(next, iter(requests), None)
    while True:
      if queue is not None:
        self._hear(queue)
      if self.is_interrupted():
        raise Preempted("sampling was interrupted")
      self._admit(take)
      if not self._has_live():
        return
      with self.setup.placed():
        self.cache.read()
        self._decode()
      for completion in self._take_ended(may_go_on=queue is not None):
        if queue is not None:
          queue.hand_out(completion)
        yield completion

  def _has_live(self) -> bool:
    return any(shard.live for shard in self.shards)

  # ---- who gets a row

  def _hear(self, queue: RequestQueue) -> None:
    """Waits for answers as far as it must, and frees what nothing follows."""
    # what waits here is known to nobody else
    if self.deterministic or not (self._has_live() or self._waiting):
      queue.wait(for_all=self.deterministic, is_interrupted=self.is_interrupted)
    dropped = queue.take_dropped()
    if dropped:
      for shard in self.shards:
        shard.forget(set(dropped))
      self._drop_idle_prompts()

  def _admit(self, take: Callable[[], Request | None]) -> None:
    """Gives free rows to samples, in their order."""
    self._is_full = True
    while any(self._has_room(shard) for shard in self.shards):
      if self._waiting is None:
        request = take()
        if request is None:
          self._is_full = False
          return
        check(request, self.setup.config.vocab, has_text=self.text_of is not None)
        self._waiting = _Waiting(request, tuple(request.prompt), 0)
      self._seat(self._waiting)

  def _seat(self, waiting: _Waiting) -> None:
    """Gives the next sample of a request a row, where there is room."""
    request, tokens, sample_index = waiting
    shard, parked = self._followed(request)
    if parked is not None:
      shard.go_on(request, parked)
    else:
      self._shard_for(tokens).begin(request, sample_index, tokens)
    if sample_index + 1 < request.n:
      self._waiting = waiting._replace(sample_index=sample_index + 1)
      return
    self._waiting = None
    for shard in self.shards:  # it may be left where its last sample went elsewhere
      shard.drop_idle(tokens)

  def _has_room(self, shard: Shard) -> bool:
    return len(shard.live) < self.setup.rows

  def _followed(self, request: Request) -> tuple[Shard | None, Parked | None]:
    """Returns the row that a request goes on with, the one with the longest text, and its shard.

    None where several samples are asked for, as each would need pages of its own.
    """
    if request.n > 1:
      return None, None
    fitting = [
      (shard, parked)
      for shard in self.shards
      if self._has_room(shard)
      for parked in shard.parked
      if parked.is_beginning_of(request.prompt)
    ]
    return max(fitting, key=lambda entry: len(entry[1].text), default=(None, None))

  def _shard_for(self, tokens: tuple[int, ...]) -> Shard:
    """Returns the emptiest shard with room, of those that have the prompt if there are any."""
    room = [shard for shard in self.shards if self._has_room(shard)]
    holders = [shard for shard in room if tokens in shard.prompts]
    return min(holders or room, key=lambda shard: len(shard.live))

  def _drop_idle_prompts(self) -> None:
    awaited = None if self._waiting is None else self._waiting.tokens
    for shard in self.shards:
      shard.drop_all_idle(awaited)

  # ---- decoding a chunk

  def _decode(self) -> None:
    """Decodes one chunk, and adds to the rows what it has sampled."""
    setup, most = self.setup, max(len(shard.live) for shard in self.shards)
    B = min(count for count in row_counts(setup.rows) if count >= most)
    has_fewer_rows = B < self._sizes.rows
    self._sizes = grown_sizes(self._sizes, self.shards, B)
    self.cache.give_pages(may_shrink=has_fewer_rows)
    samplings = [row.request.sampling for shard in self.shards for row in shard.live]
    # a free row is worth the end of a chunk only where somebody may wait for it
    enough = max(1, B // 16) if self._is_full else len(samplings)
    chunk, self.cache.own = programs.decode(
      setup.params,
      self.cache.shared,
      self.cache.own,
      make_tables(self._sizes, self.cache, enough=enough),
      config=setup.config,
      is_sorted=any(map(needs_sorting, samplings)),
      has_entropy=any(sampling.entropy for sampling in samplings),
    )
    chunk = jax.tree.map(np.asarray, chunk)
    self._add(chunk)
    self._record(B, len(samplings), int(chunk.count_ZB.max()))

  def _add(self, chunk: programs.Chunk) -> None:
    for z, shard in enumerate(self.shards):
      for b, row in enumerate(shard.live):
        at = z, b, slice(chunk.count_ZB[z, b])
        entropy = chunk.entropy_ZBR[at].tolist() if row.request.sampling.entropy else []
        row.add(chunk.token_ZBR[at].tolist(), chunk.logp_ZBR[at].tolist(), entropy)
        if row.request.sampling.stop_strings:
          row.cut_at_stop_string(self.text_of)

  def _record(self, rows: int, live: int, steps: int) -> None:
    pages = self.setup.shards * (self.cache.shared_pages + self.cache.own_pages)
    tokens = sum(shard.tokens() for shard in self.shards)
    self.trace.append(Snapshot(rows, live, steps, pages, tokens))

  def _take_ended(self, *, may_go_on: bool) -> list[Completion]:
    """Takes out the rows that have ended, and returns their completions.

    may_go_on: keeps their pages for what may follow.
    """
    completions = []
    for shard in self.shards:
      ended = [row for row in shard.live if row.finish_reason()]
      shard.live = [row for row in shard.live if not row.finish_reason()]
      for row in ended:
        completions.append(row.completion(self.version))
        if may_go_on:
          shard.park(row, most=self.setup.rows)
        else:
          shard.release(row)
    if completions:
      self._drop_idle_prompts()
    return completions
