"""The cache of the local engine: two pools of pages on the device, and who holds which page.

The shared pool has the prompts, each once for all rows that go on from it. The own pool has what
rows add. Both are divided into shards, as rows are; a row and its prompt lie in the same shard.

Pools are as large as what lives needs, in a few sizes, as a program is compiled for each
(`pages.pool_size`). One that becomes too small is copied to a larger one; the own pool is copied to
a smaller one when few rows are left. Its pages are numbered anew then.
"""

import numpy as np

from sdpo_jax.engine import programs, reading
from sdpo_jax.engine.pages import Book, pool_size
from sdpo_jax.engine.programs import Setup
from sdpo_jax.engine.rows import Parked, Prompt, Row
from sdpo_jax.model import decoder
from sdpo_jax.records import Request

FIRST_PAGES = 3  # that a row has room for from the beginning, if it may write so many


class Shard:
  """Says what one shard of the rows holds in the cache; all of it is on the host."""

  def __init__(self) -> None:
    self.live: list[Row] = []  # what is decoded, in the order of requests
    self.parked: list[Parked] = []  # the oldest first
    self.prompts: dict[tuple[int, ...], Prompt] = {}  # by their tokens
    self.shared_book, self.own_book = Book(), Book()

  def begin(self, request: Request, sample_index: int, tokens: tuple[int, ...]) -> None:
    """Adds a row for a sample. tokens: the request's prompt, which may have to be read still."""
    prompt = self.prompts.setdefault(tokens, Prompt(tokens))
    prompt.rows += 1
    self.live.append(Row.begin(request, sample_index, prompt))

  def go_on(self, request: Request, parked: Parked) -> None:
    """Adds a row that takes over what a parked one holds."""
    self.parked.remove(parked)
    self.live.append(Row.begin(request, 0, parked))

  def release(self, row: Row | Parked) -> None:
    """Frees the own pages of a row that is over; its prompt may stay for nobody."""
    self.own_book.give_back(row.pages)
    row.prompt.rows -= 1

  def park(self, row: Row, *, most: int) -> None:
    """Keeps what a row that has ended holds; of more than `most`, the oldest make room."""
    self.parked.append(row.parked())
    while len(self.parked) > most:
      self.release(self.parked.pop(0))

  def forget(self, places: set[tuple]) -> None:
    """Frees the parked rows of these completions."""
    for parked in self.parked:
      if parked.place in places:
        self.release(parked)
    self.parked = [parked for parked in self.parked if parked.place not in places]

  def drop_idle(self, tokens: tuple[int, ...]) -> None:
    """Frees the pages of a prompt, if it is here and no row reads it."""
    if tokens in self.prompts and not self.prompts[tokens].rows:
      self.shared_book.give_back(self.prompts.pop(tokens).pages)

  def drop_all_idle(self, awaited: tuple[int, ...] | None) -> None:
    """Frees the pages of all prompts that no row reads, but for one that samples wait for."""
    for tokens in [tokens for tokens, prompt in self.prompts.items() if not prompt.rows]:
      if tokens != awaited:
        self.drop_idle(tokens)

  def holders(self) -> list[Row | Parked]:
    """Returns all that hold own pages."""
    return [*self.live, *self.parked]

  def own_need(self, columns: int) -> int:
    """Returns the own pages that hold the rows for some time to come."""
    need = sum(len(parked.pages) for parked in self.parked)
    for row in self.live:
      most = -(-row.most_written // columns)
      need += min(most, max(FIRST_PAGES, len(row.pages) + 1))
    return need

  def tokens(self) -> int:
    """Returns how many tokens stand in its pages."""
    prompts = sum(prompt.length for prompt in self.prompts.values())
    return prompts + sum(row.written for row in self.holders())


class Cache:
  """Holds both pools of one call of `generate`."""

  def __init__(self, setup: Setup):
    self.setup = setup
    self.shards = [Shard() for _ in range(setup.shards)]
    self.shared: decoder.Pool | None = None  # both are made when the first prompts are read
    self.own: decoder.Pool | None = None

  @property
  def shared_pages(self) -> int:
    """Pages of a shard's part of the shared pool."""
    return self.shards[0].shared_book.size

  @property
  def own_pages(self) -> int:
    """Pages of a shard's part of the own pool."""
    return self.shards[0].own_book.size

  def read(self) -> None:
    """Reads what rows were begun with and is not in the pools yet."""
    self._read_prompts()
    self._read_given()

  def give_pages(self, *, may_shrink: bool) -> None:
    """Gives each row the own pages that the next chunk may write.

    may_shrink: whether to look if a smaller pool would do.
    """
    chunk = self.setup.chunk
    wanted = [[(r, r.written + min(chunk, r.left)) for r in s.live] for s in self.shards]
    self._extend(wanted, may_shrink=may_shrink)

  def _read_prompts(self) -> None:
    C = self.setup.columns
    new = [[p for p in shard.prompts.values() if not p.is_read] for shard in self.shards]
    counts = [[-(-prompt.length // C) for prompt in prompts] for prompts in new]
    self._fit_shared([sum(count) for count in counts])
    for shard, prompts, count in zip(self.shards, new, counts, strict=True):
      for prompt, pages in zip(prompts, count, strict=True):
        prompt.pages = shard.shared_book.take(pages)
        prompt.is_read = True
    self.shared = reading.read_prompts(self.setup, self.shared, new)

  def _read_given(self) -> None:
    """Reads what conversations have added to the rows that they go on with."""
    rows = [[row for row in s.live if row.written < len(row.given) - 1] for s in self.shards]
    if not any(rows):
      return
    wanted = [[(row, len(row.given) - 1) for row in of_shard] for of_shard in rows]
    self._extend(wanted, may_shrink=False)
    self.own = reading.read_given(self.setup, self.shared, self.own, rows)
    for of_shard in wanted:
      for row, written in of_shard:
        row.written = written

  def _extend(self, wanted: list[list[tuple[Row, int]]], *, may_shrink: bool) -> None:
    """Gives rows of each shard the own pages that they lack for so many tokens."""

    def lacking(row: Row, tokens: int) -> int:
      return max(0, -(-tokens // self.setup.columns) - len(row.pages))

    more = [sum(lacking(*entry) for entry in of_shard) for of_shard in wanted]
    self._fit_own(more, may_shrink=may_shrink)
    for shard, of_shard in zip(self.shards, wanted, strict=True):
      for row, tokens in of_shard:
        row.pages += shard.own_book.take(lacking(row, tokens))

  # ---- the sizes of the pools

  def _fit_shared(self, more: list[int]) -> None:
    """Makes room for so many more shared pages of each shard."""
    need = max(s.shared_book.used + count for s, count in zip(self.shards, more, strict=True))
    if self.shared is None:
      self._make_pools(pool_size(need))
    elif need > self.shared_pages:
      size = pool_size(need)
      source = [
        shard.shared_book.resize(size, [prompt.pages for prompt in shard.prompts.values()])
        for shard in self.shards
      ]
      self.shared = programs.resized(self.shared, np.asarray(source, np.int32))

  def _make_pools(self, shared_pages: int) -> None:
    """Makes both pools, in one program."""
    # four parts: most of what a short batch will ever need is there now
    own_pages = pool_size(self._own_need(), parts=4)
    for shard in self.shards:
      shard.shared_book.resize(shared_pages, [])
      shard.own_book.resize(own_pages, [])
    self.shared, self.own = programs.empty_pools(
      config=self.setup.config,
      shards=self.setup.shards,
      pages=(shared_pages, own_pages),
      columns=self.setup.columns,
      stacked=self.setup.stacked,
    )

  def _own_need(self) -> int:
    return max(shard.own_need(self.setup.columns) for shard in self.shards)

  def _fit_own(self, more: list[int], *, may_shrink: bool) -> None:
    """Makes room for so many more own pages of each shard."""
    need = max(s.own_book.used + count for s, count in zip(self.shards, more, strict=True))
    if need <= self.own_pages and not may_shrink:
      return
    size = pool_size(max(need, self._own_need()))
    if need > self.own_pages or size < self.own_pages:
      source = [
        shard.own_book.resize(size, [row.pages for row in shard.holders()]) for shard in self.shards
      ]
      self.own = programs.resized(self.own, np.asarray(source, np.int32))
