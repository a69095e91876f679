"""The local engine: samples from the decoder on this process's own devices.

A prompt is read once, into pages that all its samples share; each sample (a *row*) writes what it
adds into pages of its own. Between two chunks of decoding the host looks at what has ended, hands
it out, fills free rows from the queue, and picks the smallest program that holds what lives: few
rows for few survivors, few pages for short texts. Nothing waits for the longest row.

Programs are compiled for the few numbers of rows that `row_counts` gives, and with each for the
sizes of both pools that occur, which are powers of two: a call whose lengths vary a thousandfold
meets about a dozen.

A request whose prompt begins with an earlier prompt and its completion (the next turn of a
conversation) goes on in that row's pages, as long as they are kept: those of as many rows as are
decoded together, in a call that is fed by a `RequestQueue`. Only what is new is read.

Rows are numbered anew for each chunk, in the order of their requests. What is computed thus
depends on the requests alone, never on time, and a run repeats bit for bit. Randomness comes from
a generator of each row, with the request's seed and the sample's index as its key; it is the same
on every kind of device.
"""

import bisect
import collections
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from sdpo_jax import sharding
from sdpo_jax.engine import beams, programs
from sdpo_jax.engine.pages import Book, pool_size, power_of_two
from sdpo_jax.engine.requests import RequestQueue, check
from sdpo_jax.engine.sampling import needs_sorting
from sdpo_jax.kernels.paged_attention import Chain
from sdpo_jax.kernels.target import target_platform
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Completion, Request

READ_TOKENS = 512  # most tokens of prompts that are read together
FIRST_PAGES = 3  # that a row has room for from the beginning, if it may write so many


@dataclasses.dataclass(eq=False)
class _Prompt:
  """A prompt in a shard's cache, but for its last token, which each of its rows reads itself."""

  tokens: list[int]  # a copy: the caller may go on with its own
  pages: list[int]
  rows: int = 0  # that read it, or are kept for what may follow
  is_read: bool = False

  @property
  def length(self) -> int:
    """Tokens in the shared pages."""
    return len(self.tokens) - 1


@dataclasses.dataclass(eq=False)
class _Row:
  """One sample while it is decoded."""

  request: Request
  prompt: _Prompt
  sample_index: int
  pages: list[int]  # its own
  written: int  # tokens in them
  tokens: list[int]  # sampled
  logp: list[float]
  entropy: list[float]  # empty where it is not asked for
  dice: np.random.Philox
  uniforms: np.ndarray  # drawn so far, one a token
  has_stop_string: bool = False

  def uniform(self, first: int, count: int) -> np.ndarray:
    """Returns the numbers in [0, 1) that decide these tokens, float32.

    They come from the generator's raw bits, which no version of numpy changes.
    """
    while len(self.uniforms) < first + count:
      bits = self.dice.random_raw(64) >> np.uint64(40)
      self.uniforms = np.append(self.uniforms, bits.astype(np.float32) * np.float32(2**-24))
    return self.uniforms[first : first + count]

  @property
  def left(self) -> int:
    """How many tokens it may still sample."""
    return self.request.sampling.max_new_tokens - len(self.tokens)

  @property
  def own(self) -> list[int]:
    """What stands, or will, in its own pages: its text behind the shared ones.

    While it is decoded, all but the last token is written.
    """
    return self.request.prompt[self.prompt.length :] + self.tokens

  def finish_reason(self) -> str | None:
    """Returns why nothing more is sampled; None while it lives."""
    if self.has_stop_string:
      return "stop"
    if self.tokens and self.tokens[-1] in self.request.sampling.stop_tokens:
      return "stop"
    return "length" if self.left <= 0 else None

  def completion(self, version: int) -> Completion:
    """Returns what it has become, once it has ended. version: of the weights."""
    key, reason = self.request.key, self.finish_reason()
    entropy = self.entropy if self.request.sampling.entropy else None
    return Completion(key, self.sample_index, self.tokens, self.logp, reason, version, entropy)


@dataclasses.dataclass(eq=False)
class _Parked:
  """A row that has ended and may be gone on with: its text, and where it lies."""

  place: tuple  # key and sample of its completion
  text: list[int]
  prompt: _Prompt
  pages: list[int]
  written: int


def _new_row(request: Request, sample_index: int, cached: _Prompt | _Parked) -> _Row:
  """Returns a row that begins with a prompt in the cache, or goes on with a row that has ended."""
  dice = np.random.Philox(key=[request.seed, sample_index])
  if isinstance(cached, _Parked):
    prompt, pages, written = cached.prompt, cached.pages, cached.written
  else:
    prompt, pages, written = cached, [], 0
  request = request._replace(prompt=list(request.prompt))  # the caller may go on with its own
  numbers = np.zeros(0, np.float32)
  return _Row(request, prompt, sample_index, pages, written, [], [], [], dice, numbers)


class _Block(NamedTuple):
  """A page's columns that have tokens to read."""

  tokens: list[int]  # of the page, from its first column on
  begin: int  # the first of them that is new
  base: int  # the position of the page's first column
  prompt: _Prompt
  pages: list[int]  # those of the text in this pool, up to this one


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


def _resized(book: Book, pool: decoder.Pool, size: int, lists: list[list[list[int]]]):
  """Returns a pool of another size with the pages in `lists`, which are renumbered."""
  return programs.resized(pool, np.asarray(book.resize(size, lists), np.int32))


_cast = jax.jit(decoder.cast, static_argnames=("config",))


class LocalEngine:
  """Samples with the decoder itself. `sdpo_jax.engine` states what `generate` guarantees."""

  takes_adapters = False  # but the sum of adapters and base
  samples_alone = True  # in each process, on the devices of its own

  def __init__(
    self,
    config: ModelConfig,
    *,
    rows: int,
    row_multiple: int = 1,
    columns: int | None = None,
    chunk: int = 16,
    stacked: bool | None = None,
    text_of: Callable[[list[int]], str] | None = None,
    deterministic: bool = True,
  ):
    """Keeps the settings; weights come with `load`.

    Args:
      config: the decoder that samples.
      rows: most sequences decoded together, which row_multiple divides.
      row_multiple: the row shards of a mesh.
      columns: tokens of a page; None: as `programs.page_columns` says.
      chunk: most tokens between hand-outs.
      stacked: whether to go through the layers in a loop; None: except on a CPU (see
        `decoder.unstacked`).
      text_of: turns tokens into text; requests with stop strings need it.
      deterministic: whether a `RequestQueue` is asked only when no answer is missing, so that what
        shares a batch does not depend on who answers first; False: whenever there is room.
    """
    assert rows % row_multiple == 0, f"{rows} rows on {row_multiple} shards"
    self.config = config
    self.shards = row_multiple
    self.rows = rows // row_multiple  # of a shard
    self.columns = columns or programs.page_columns()
    self.chunk = chunk
    self.blocks = max(1, READ_TOKENS // self.columns // self.shards)  # of a shard
    self.text_of = text_of
    self.deterministic = deterministic
    self.stacked = target_platform() != "cpu" if stacked is None else stacked
    self.trace: list[Snapshot] = []  # of the last call of `generate`
    self._mesh: sharding.SamplingMesh | None = None  # None: one device
    self._params: Any = None
    self._version = 0

  @classmethod
  def on_mesh(
    cls, mesh: sharding.SamplingMesh | None, config: ModelConfig, *, rows: int, **settings
  ):
    """Returns an engine for this process's devices, and for its share of the rows.

    None: for one device.
    """
    if mesh is None:
      return cls(config, rows=rows, **settings)
    shards, of_all = sharding.row_shards(mesh.own), sharding.row_shards(mesh.whole)
    engine = cls(config, rows=rows * shards // of_all, row_multiple=shards, **settings)
    engine._mesh = mesh
    return engine

  def load(self, params, version: int) -> None:
    """Takes the weights that are sampled from now on, as training holds them.

    Where the engine has a mesh every process must call it.
    """
    if self.config.dtype != self.config.param_dtype:
      params = _cast(params, config=self.config)
    if self._mesh is not None:
      params = self._mesh.put(params, decoder.axes(self.config))
    self._params, self._version = params, version

  def unload(self) -> None:
    """Lets go of the weights."""
    self._params = None

  def generate(self, requests: Iterable[Request] | RequestQueue) -> Iterator[Completion]:
    """Returns an iterator over the completions of all requests, as they end.

    Raises ValueError for a request that cannot be, when its turn comes.
    """
    assert self._params is not None, "`load` gives the engine its weights"
    self.trace = []
    return self._completions(self._params, self._version, requests)

  def search(self, requests: Iterable[Request]) -> Iterator[Completion]:
    """Returns an iterator over the n likeliest completions of each request (see `beams`).

    `sampling.beams` is the width of the search. Raises ValueError for a request that cannot be.
    """
    assert self._params is not None, "`load` gives the engine its weights"
    listed = list(requests)
    for request in listed:
      check(request, self.config.vocab, has_text=self.text_of is not None, searches=True)
      beams.check(request, self.config.vocab)
    setup = beams.Setup(
      config=self.config,
      params=self._for_decoding(self._params),
      placed=self.placed,
      stacked=self.stacked,
      shards=self.shards,
      rows=self.rows,
      columns=self.columns,
      chunk=self.chunk,
      blocks=self.blocks,
    )
    return beams.search(setup, listed, version=self._version)

  def placed(self) -> contextlib.AbstractContextManager:
    """Sets the mesh, not to be held while a completion is handed out: the caller has another."""
    return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh.own)

  def _for_decoding(self, params):
    if self.stacked:
      return params
    with self.placed():
      return programs.unstacked(params, config=self.config)

  def _completions(self, params, version: int, requests) -> Iterator[Completion]:
    yield from _Decoding(self, self._for_decoding(params), version).run(requests)


class _Decoding:
  """One call of `generate`: what is in the cache, and who uses it."""

  def __init__(self, engine: LocalEngine, params, version: int):
    self.engine, self.params, self.version = engine, params, version
    shards = range(engine.shards)
    self.live: list[list[_Row]] = [[] for _ in shards]
    self.prompts: list[list[_Prompt]] = [[] for _ in shards]  # in the cache
    self.parked: list[list[_Parked]] = [[] for _ in shards]  # the oldest first
    self.waiting: tuple[Request, int] | None = None  # and its next sample
    self.is_full = False  # whether room, and not requests, ran out last
    self.shared_book, self.own_book = Book(engine.shards), Book(engine.shards)
    self.shared = self.own = None
    self.most_readers = 1  # rows that one prompt had at a time, rounded up
    self.sizes = programs.Sizes(
      shards=engine.shards,
      rows=engine.rows,
      shared_pages=0,
      own_pages=0,
      readers=1,
      columns=engine.columns,
      chunk=engine.chunk,
    )

  def run(self, requests: Iterable[Request] | RequestQueue) -> Iterator[Completion]:
    """Yields all completions."""
    queue: RequestQueue | None = None
    listed: Iterator[Request] = iter(())
    if isinstance(requests, RequestQueue):
      queue = requests
    else:
      listed = iter(requests)
    while True:
      if queue is None:
        self._admit(lambda: next(listed, None))
      else:
        if self.engine.deterministic or not any(self.live):
          queue.wait(for_all=self.engine.deterministic)
        self._forget(queue.take_dropped())
        self._admit(queue.take)
      if not any(self.live):
        return
      with self.engine.placed():
        self._read_prompts()
        self._read_answers()
        ended = self._decode(may_go_on=queue is not None)
      for completion in ended:
        if queue is not None:
          queue.hand_out(completion)
        yield completion

  # ---- who is in the cache

  def _admit(self, take: Callable[[], Request | None]) -> None:
    """Gives free rows to samples, in their order."""
    self.is_full = True
    while any(len(rows) < self.engine.rows for rows in self.live):
      if self.waiting is None:
        request = take()
        if request is None:
          self.is_full = False
          return
        check(request, self.engine.config.vocab, has_text=self.engine.text_of is not None)
        self.waiting = request, 0
      request, sample_index = self.waiting
      if not self._go_on(request):
        z = self._shard_for(request.prompt)
        prompt = self._cached(request.prompt, z)
        prompt.rows += 1
        self.live[z].append(_new_row(request, sample_index, prompt))
      if sample_index + 1 < request.n:
        self.waiting = request, sample_index + 1
      else:
        self.waiting = None
        self._drop_idle_prompts()

  def _go_on(self, request: Request) -> bool:
    """Lets a request go on in the pages of a row whose text its prompt begins with, if one is left.

    Not where several samples are asked for, as each would need pages of its own.
    """
    if request.n > 1:
      return False
    fitting = [
      (len(row.text), z, row)
      for z, parked in enumerate(self.parked)
      for row in parked
      if len(self.live[z]) < self.engine.rows
      and len(row.text) < len(request.prompt)
      and request.prompt[: len(row.text)] == row.text
    ]
    if not fitting:
      return False
    _, z, row = max(fitting, key=lambda entry: entry[0])
    self.parked[z].remove(row)
    self.live[z].append(_new_row(request, 0, row))
    return True

  def _park(self, z: int, row: _Row) -> None:
    """Keeps a row that has ended for what may follow it; the oldest ones make room."""
    place = row.request.key, row.sample_index
    text = row.request.prompt + row.tokens
    self.parked[z].append(_Parked(place, text, row.prompt, row.pages, row.written))
    while len(self.parked[z]) > self.engine.rows:
      self._release(z, self.parked[z].pop(0))

  def _forget(self, places: list[tuple]) -> None:
    """Frees the rows that nothing follows."""
    for z, parked in enumerate(self.parked):
      for row in parked:
        if row.place in places:
          self._release(z, row)
      self.parked[z] = [row for row in parked if row.place not in places]
    self._drop_idle_prompts()

  def _shard_for(self, tokens: list[int]) -> int:
    """Returns the emptiest shard with room, of those that have the prompt if there are any."""
    room = [z for z, rows in enumerate(self.live) if len(rows) < self.engine.rows]
    holders = [z for z in room if any(p.tokens == tokens for p in self.prompts[z])]
    return min(holders or room, key=lambda z: len(self.live[z]))

  def _cached(self, tokens: list[int], z: int) -> _Prompt:
    """Returns a prompt in a shard's cache, where it may still have to be read."""
    for prompt in self.prompts[z]:
      if prompt.tokens == tokens:
        return prompt
    self.prompts[z].append(_Prompt(list(tokens), []))
    return self.prompts[z][-1]

  def _release(self, z: int, row: _Row | _Parked) -> None:
    """Frees the pages of a row that has ended."""
    self.own_book.give_back(z, row.pages)
    row.prompt.rows -= 1

  def _drop_idle_prompts(self) -> None:
    """Frees the pages of prompts that no row reads and no sample waits for."""
    awaited = None if self.waiting is None else self.waiting[0].prompt
    for z, prompts in enumerate(self.prompts):
      for prompt in prompts:
        if not prompt.rows and prompt.tokens != awaited:
          self.shared_book.give_back(z, prompt.pages)
      self.prompts[z] = [p for p in prompts if p.rows or p.tokens == awaited]

  # ---- reading prompts

  def _read_prompts(self) -> None:
    """Reads the prompts that are new in the cache."""
    C = self.engine.columns
    new = [[p for p in prompts if not p.is_read] for prompts in self.prompts]
    count = [[-(-p.length // C) for p in prompts] for prompts in new]
    self._fit_shared([sum(counts) for counts in count])
    blocks: list[list[_Block]] = []
    for z, prompts in enumerate(new):
      for prompt, pages in zip(prompts, count[z], strict=True):
        prompt.pages = self.shared_book.take(z, pages)
        prompt.is_read = True
      blocks.append(
        [
          _Block(prompt.tokens[:-1][i * C : (i + 1) * C], 0, i * C, prompt, prompt.pages[: i + 1])
          for prompt in prompts
          for i in range(len(prompt.pages))
        ]
      )
    for now in self._portions(blocks):
      self.shared = programs.read_shared(
        self.params, self.shared, self._new_blocks(now), config=self.engine.config
      )

  def _read_answers(self) -> None:
    """Reads what stands between an earlier completion and the last token of a row's new prompt."""
    C = self.engine.columns
    unread = [[row for row in rows if row.written < len(row.own) - 1] for rows in self.live]
    if not any(unread):
      return
    more = [[-(-(len(row.own) - 1) // C) - len(row.pages) for row in rows] for rows in unread]
    self._fit_own([sum(counts) for counts in more], may_shrink=False)
    blocks: list[list[_Block]] = []
    for z, rows in enumerate(unread):
      blocks.append([])
      for row, count in zip(rows, more[z], strict=True):
        row.pages += self.own_book.take(z, count)
        tokens = row.own[:-1]
        for i in range(row.written // C, len(row.pages)):
          begin, base = max(0, row.written - i * C), row.prompt.length + i * C
          block = tokens[i * C : (i + 1) * C], begin, base, row.prompt, row.pages[: i + 1]
          blocks[z].append(_Block(*block))
        row.written = len(tokens)
    for now in self._portions(blocks):
      self.own = programs.read_own(
        self.params,
        self.shared,
        self.own,
        self._new_blocks(now, is_own=True),
        config=self.engine.config,
      )

  def _portions(self, blocks: list[list["_Block"]]) -> Iterator[list[list["_Block"]]]:
    """Yields the blocks of all shards in portions that a program takes, in order."""
    while any(blocks):
      yield [shard[: self.engine.blocks] for shard in blocks]
      blocks = [shard[self.engine.blocks :] for shard in blocks]

  def _new_blocks(self, blocks: list[list["_Block"]], *, is_own: bool = False) -> decoder.NewBlocks:
    """Returns what the program reads. Few blocks have a smaller program."""
    few = max(1, self.engine.blocks // 8)
    most = max(len(shard) for shard in blocks)
    Z, Y, C = len(blocks), few if most <= few else self.engine.blocks, self.engine.columns
    longest = max(len(b.pages) for shard in blocks for b in shard)
    if is_own:
      longest = max(longest, *(len(b.prompt.pages) for shard in blocks for b in shard))
    X = max(64, power_of_two(longest))

    def zeros(*rest: int) -> np.ndarray:
      return np.zeros((Z, Y, *rest), np.int32)

    token, begin, base = zeros(C), zeros(), zeros()  # nothing attends to what is not a text's
    book = self.own_book if is_own else self.shared_book
    page = np.full((Z, Y), book.size, np.int32)
    shared, own = (Chain(zeros(X), zeros(), zeros(), zeros()) for _ in range(2))
    for z, shard in enumerate(blocks):
      for y, b in enumerate(shard):
        token[z, y, : len(b.tokens)] = b.tokens
        begin[z, y], base[z, y], page[z, y] = b.begin, b.base, b.pages[-1]
        shared_pages = b.prompt.pages if is_own else b.pages
        shared.page_ZYX[z, y, : len(shared_pages)] = shared_pages
        shared.count_ZY[z, y], shared.end_ZY[z, y] = len(shared_pages), b.prompt.length
        if is_own:
          own.page_ZYX[z, y, : len(b.pages)] = b.pages
          own.count_ZY[z, y], own.first_ZY[z, y] = len(b.pages), b.prompt.length
          own.end_ZY[z, y] = b.base + C
    return decoder.NewBlocks(token, begin, page, base, (shared, own) if is_own else (shared,))

  # ---- pools

  def _fit_shared(self, more: list[int]) -> None:
    """Makes room for so many more shared pages of each shard."""
    need = max(self.shared_book.used(z) + count for z, count in enumerate(more))
    if self.shared is None:
      self._make_pools(pool_size(need))
    elif need > self.shared_book.size:
      lists = [[prompt.pages for prompt in prompts] for prompts in self.prompts]
      self.shared = _resized(self.shared_book, self.shared, pool_size(need), lists)

  def _make_pools(self, shared_pages: int) -> None:
    """Makes both pools, in one program."""
    no_pages: list[list[list[int]]] = [[] for _ in self.live]
    self.shared_book.resize(shared_pages, no_pages)
    # four parts: most of what a short batch will ever need is there now
    self.own_book.resize(pool_size(self._own_need(), parts=4), no_pages)
    self.shared, self.own = programs.empty_pools(
      config=self.engine.config,
      shards=self.engine.shards,
      pages=(self.shared_book.size, self.own_book.size),
      columns=self.engine.columns,
      stacked=self.engine.stacked,
    )

  def _own_need(self) -> int:
    """Returns the pages, of a shard, that hold the live rows for some time to come."""
    need = 0
    for rows, parked in zip(self.live, self.parked, strict=True):
      pages = sum(len(row.pages) for row in parked)
      for row in rows:
        most = -(-(len(row.own) + row.left - 1) // self.engine.columns)  # the last is not written
        pages += min(most, max(FIRST_PAGES, len(row.pages) + 1))
      need = max(need, pages)
    return need

  def _fit_own(self, more: list[int], *, may_shrink: bool) -> None:
    """Makes room for so many more own pages of each shard."""
    need = max(self.own_book.used(z) + count for z, count in enumerate(more))
    size = pool_size(max(need, self._own_need()))
    if need > self.own_book.size or (may_shrink and size < self.own_book.size):
      lists = [
        [row.pages for row in rows] + [row.pages for row in parked]
        for rows, parked in zip(self.live, self.parked, strict=True)
      ]
      self.own = _resized(self.own_book, self.own, size, lists)

  # ---- decoding

  def _decode(self, *, may_go_on: bool) -> list[Completion]:
    """Decodes one chunk, and returns the completions that ended in it.

    may_go_on: keeps their pages for what may follow.
    """
    engine = self.engine
    most = max(len(rows) for rows in self.live)
    B = min(count for count in row_counts(engine.rows) if count >= most)
    may_shrink = B < self.sizes.rows
    self.sizes = self._grown_sizes(B)
    self._give_pages(may_shrink=may_shrink)
    live = sum(len(rows) for rows in self.live)
    samplings = [row.request.sampling for rows in self.live for row in rows]
    result, self.own = programs.decode(
      self.params,
      self.shared,
      self.own,
      self._tables(),
      config=engine.config,
      is_sorted=any(map(needs_sorting, samplings)),
      has_entropy=any(sampling.entropy for sampling in samplings),
    )
    result = jax.tree.map(np.asarray, result)
    self._add(result)
    self._record(B, live, int(result.count_ZB.max()))
    return self._take_ended(may_go_on=may_go_on)

  def _give_pages(self, *, may_shrink: bool) -> None:
    """Gives each row the pages that the next chunk may write."""
    chunk, C = self.engine.chunk, self.engine.columns
    more = []
    for rows in self.live:
      ends = [row.written + min(chunk, row.left) for row in rows]
      wanted = [max(0, -(-end // C) - len(row.pages)) for row, end in zip(rows, ends, strict=True)]
      more.append(wanted)
    self._fit_own([sum(wanted) for wanted in more], may_shrink=may_shrink)
    for z, rows in enumerate(self.live):
      for row, count in zip(rows, more[z], strict=True):
        row.pages += self.own_book.take(z, count)

  def _add(self, chunk: programs.Chunk) -> None:
    """Adds to the rows what a chunk has sampled."""
    for z, rows in enumerate(self.live):
      for b, row in enumerate(rows):
        count = chunk.count_ZB[z, b]
        row.tokens += chunk.token_ZBR[z, b, :count].tolist()
        row.logp += chunk.logp_ZBR[z, b, :count].tolist()
        if row.request.sampling.entropy:
          row.entropy += chunk.entropy_ZBR[z, b, :count].tolist()
        row.written += int(count)
        if row.request.sampling.stop_strings:
          self._cut_at_stop_string(row)

  def _take_ended(self, *, may_go_on: bool) -> list[Completion]:
    """Takes out the rows that have ended, and returns their completions."""
    ended = []
    for z, rows in enumerate(self.live):
      for row in rows:
        if row.finish_reason():
          ended.append(row.completion(self.version))
          if may_go_on:
            self._park(z, row)
          else:
            self._release(z, row)
      self.live[z] = [row for row in rows if not row.finish_reason()]
    self._drop_idle_prompts()
    return ended

  def _cut_at_stop_string(self, row: _Row) -> None:
    """Ends a row at the token that completes its first stop string, if one stands in it."""
    text_of = self.engine.text_of

    def has_one(count: int) -> bool:
      text = text_of(row.tokens[:count])
      return any(stop in text for stop in row.request.sampling.stop_strings)

    if has_one(len(row.tokens)):
      length = bisect.bisect_left(range(len(row.tokens)), True, key=has_one)
      row.written -= len(row.tokens) - length
      del row.tokens[length:], row.logp[length:], row.entropy[length:]
      row.has_stop_string = True

  def _record(self, rows: int, live: int, steps: int) -> None:
    prompts = sum(p.length for prompts in self.prompts for p in prompts)
    own = sum(row.written for rows in self.live for row in rows)
    own += sum(row.written for rows in self.parked for row in rows)
    pages = self.engine.shards * (self.shared_book.size + self.own_book.size)
    self.engine.trace.append(Snapshot(rows, live, steps, pages, prompts + own))

  def _grown_sizes(self, B: int) -> programs.Sizes:
    """Returns the sizes for B rows; what rows may bring along never shrinks during a call.

    Else each survivor's own need would be another program.
    """
    samplings = [row.request.sampling for rows in self.live for row in rows]
    readers = collections.Counter(id(row.prompt) for rows in self.live for row in rows)
    stops = max(len(s.stop_tokens) for s in samplings)
    biases = max(len(s.logit_bias) + len(s.banned_tokens) for s in samplings)
    self.most_readers = max(self.most_readers, power_of_two(max(readers.values())))
    return self.sizes._replace(
      rows=B,
      readers=min(B, self.most_readers),
      stops=max(self.sizes.stops, power_of_two(stops)),
      biases=max(self.sizes.biases, power_of_two(biases)),
    )

  def _tables(self) -> programs.Tables:
    """Returns what the program reads about rows, and about the pages of both pools.

    A text is the prompt's tokens but the last, in shared pages, and then the rest in own ones: page
    i of a row begins at position `prompt.length + i * columns`.
    """
    sizes = self.sizes._replace(shared_pages=self.shared_book.size, own_pages=self.own_book.size)
    tables, C = programs.empty_tables(sizes), self.engine.columns
    for z, rows in enumerate(self.live):
      for b, row in enumerate(rows):
        self._fill_row(tables.rows, z, b, row)
        tables.own.row_ZWM[z, row.pages, 0] = b
        tables.own.base_ZW[z, row.pages] = row.prompt.length + np.arange(len(row.pages)) * C
      for prompt in self.prompts[z]:
        readers = [b for b, row in enumerate(rows) if row.prompt is prompt]
        base = np.arange(len(prompt.pages)) * C
        tables.shared.row_ZWM[z, prompt.pages, : len(readers)] = readers
        tables.shared.base_ZW[z, prompt.pages] = base
        tables.shared.fill_ZW[z, prompt.pages] = np.minimum(C, prompt.length - base)
    tables.own.fill_ZW[:] = C
    live = sum(len(rows) for rows in self.live)
    # a free row is worth the end of a chunk only where somebody may wait for it
    enough = np.int32(max(1, sizes.rows // 16) if self.is_full else live)
    return tables._replace(enough=enough)

  def _fill_row(self, table: programs.Rows, z: int, b: int, row: _Row) -> None:
    """Writes a row into the table."""
    C = self.engine.columns
    first = row.written // C  # of its pages that will be written
    table.token_ZB[z, b] = row.own[-1]
    table.position_ZB[z, b] = row.prompt.length + row.written
    table.begin_ZB[z, b] = row.prompt.length + first * C
    ahead = row.pages[first:]
    table.pages_ZBX[z, b, : len(ahead)] = ahead
    table.budget_ZB[z, b] = row.left
    sampling = row.request.sampling
    table.stop_ZBX[z, b, : len(sampling.stop_tokens)] = sampling.stop_tokens
    table.uniform_ZBR[z, b] = row.uniform(len(row.tokens), self.engine.chunk)
    settings, x = table.settings, z * table.token_ZB.shape[1] + b
    settings.temperature_B[x] = sampling.temperature
    settings.top_p_B[x], settings.top_k_B[x] = sampling.top_p, sampling.top_k
    settings.min_p_B[x] = sampling.min_p
    biases = [*sampling.logit_bias, *((token, -np.inf) for token in sampling.banned_tokens)]
    for i, (token, bias) in enumerate(biases):
      settings.biased_BX[x, i], settings.bias_BX[x, i] = token, bias
