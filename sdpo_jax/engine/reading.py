"""Reads texts into pages: prompts into shared ones, what conversations add into own ones.

A text is cut into blocks, each of which fills one page. A program reads some blocks of each shard
at a time, in order: a block attends to the pages before it, and to itself. Blocks of many texts
share a call, so that many short prompts are read as fast as a long one.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sdpo_jax.engine import programs
from sdpo_jax.engine.pages import power_of_two
from sdpo_jax.engine.programs import Setup
from sdpo_jax.engine.rows import Prompt, Row
from sdpo_jax.kernels.paged_attention import Chain
from sdpo_jax.model import decoder

LEAST_CHAIN = 64  # pages that a program has room for in a text, so that short ones share it
NOWHERE = np.iinfo(np.int32).max  # a page beyond the end of any pool: nothing is written


class _Block(NamedTuple):
  """One page of a text, which has tokens to read."""

  tokens: Sequence[int]  # of the page, from its first column on
  begin: int  # the column of the first one that is new
  base: int  # the position of the page's first column
  prompt: Prompt
  pages: list[int]  # those of the text in the pool that is written, up to this one


def read_prompts(setup: Setup, shared: decoder.Pool, prompts: list[list[Prompt]]) -> decoder.Pool:
  """Returns the shared pool with prompts of each shard written into the pages that they hold."""
  C = setup.columns
  blocks = [
    [
      _Block(_on_page(prompt.tokens, i, C), 0, i * C, prompt, prompt.pages[: i + 1])
      for prompt in of_shard
      for i in range(len(prompt.pages))
    ]
    for of_shard in prompts
  ]
  for portion in _portions(blocks, max(setup.block_counts)):
    new = _new_blocks(portion, setup, is_own=False)
    shared = programs.read_shared(setup.params, shared, new, config=setup.config)
  return shared


def read_given(
  setup: Setup, shared: decoder.Pool, own: decoder.Pool, rows: list[list[Row]]
) -> decoder.Pool:
  """Returns the own pool with what rows of each shard are given written into their pages.

  The first `row.written` tokens of `row.given` stand there already; the last one is not read.
  """
  C = setup.columns
  blocks = [
    [
      _Block(
        _on_page(row.given, i, C),
        max(0, row.written - i * C),
        row.prompt.length + i * C,
        row.prompt,
        row.pages[: i + 1],
      )
      for row in of_shard
      for i in range(row.written // C, len(row.pages))
    ]
    for of_shard in rows
  ]
  for portion in _portions(blocks, max(setup.block_counts)):
    new = _new_blocks(portion, setup, is_own=True)
    own = programs.read_own(setup.params, shared, own, new, config=setup.config)
  return own


def _on_page(tokens: Sequence[int], i: int, columns: int) -> Sequence[int]:
  """Returns what page i of a text holds; its last token is in none."""
  return tokens[i * columns : min((i + 1) * columns, len(tokens) - 1)]


def _portions(blocks: list[list[_Block]], most: int) -> Iterator[list[list[_Block]]]:
  """Yields the blocks of all shards in portions that a program takes, in order."""
  for first in range(0, max(map(len, blocks)), most):
    yield [of_shard[first : first + most] for of_shard in blocks]


def _new_blocks(blocks: list[list[_Block]], setup: Setup, *, is_own: bool) -> decoder.NewBlocks:
  """Returns what the program reads. Few blocks have a smaller program."""
  most = max(map(len, blocks))
  Y = min(count for count in setup.block_counts if count >= most)
  Z, C = len(blocks), setup.columns
  chains = [b.pages for of_shard in blocks for b in of_shard]
  if is_own:
    chains += [b.prompt.pages for of_shard in blocks for b in of_shard]
  X = max(LEAST_CHAIN, power_of_two(max(map(len, chains))))

  def zeros(*rest: int) -> np.ndarray:
    return np.zeros((Z, Y, *rest), np.int32)

  token, begin, base = zeros(C), zeros(), zeros()  # nothing attends to what is not a text's
  page = np.full((Z, Y), NOWHERE, np.int32)
  shared, own = (Chain(zeros(X), zeros(), zeros(), zeros()) for _ in range(2))
  for z, of_shard in enumerate(blocks):
    for y, b in enumerate(of_shard):
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
