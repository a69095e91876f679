"""The compiled programs of the local engine: read prompts, decode a chunk, resize a pool.

What lives on the device between two calls is the pages alone. Everything else (which row reads
which page, positions, seeds, the last token) comes from the host with each call, in small arrays;
rows can so be renumbered, dropped and added without any program for it.

A program is compiled for the rows B, the pages W of both pools and the readers M of a shared page.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.engine import sampling
from sdpo_jax.kernels.paged_attention import Readers, visible
from sdpo_jax.kernels.target import target_platform
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Array


class Setup(NamedTuple):
  """Holds what one call of the engine computes with: weights, and settings."""

  config: ModelConfig
  params: Any  # as `decoder.unstacked` makes them where stacked is False
  # sets the engine's mesh; not held while a completion is handed out, for the caller has another
  placed: Callable[[], contextlib.AbstractContextManager]
  stacked: bool  # as for `decoder.init_pool`
  shards: int
  rows: int  # most rows of a shard that are decoded together
  columns: int  # tokens of a page
  chunk: int  # most tokens that rows are extended by in one call of a program
  # of tokens, that a shard reads in one call of a program; one is compiled for each of these counts
  block_counts: tuple[int, ...]


class Rows(NamedTuple):
  """Says what is decoded: one entry a row, the same for a whole chunk. A free row has budget 0."""

  token_ZB: Array  # int32: the last token, which has not been read yet
  position_ZB: Array  # int32: its position
  begin_ZB: Array  # int32: the position of the first column of pages_ZBX
  pages_ZBX: Array  # int32: the own pages that the chunk may write, in order
  budget_ZB: Array  # int32: tokens that may still be sampled
  stop_ZBX: Array  # int32: tokens that end a row; -1: none
  uniform_ZBR: Array  # float32 in [0, 1): what decides each token of the chunk
  settings: sampling.Settings  # with B = Z * B


class Tables(NamedTuple):
  """Holds what the host says about one chunk."""

  rows: Rows
  shared: Readers  # of the shared pages
  own: Readers
  enough: Array  # int32: the chunk ends early when so many rows have ended


def page_columns() -> int:
  """Returns the tokens of a page: 128 on a TPU, whose lanes they fill, else 32."""
  return 128 if target_platform() == "tpu" else 32


class Sizes(NamedTuple):
  """Says what a decoding program is compiled for, beside the model."""

  shards: int
  rows: int  # of a shard
  shared_pages: int  # of a shard
  own_pages: int
  readers: int  # most rows that read one shared page
  columns: int  # tokens of a page
  chunk: int  # most tokens that are sampled of a row
  stops: int = 1  # most stop tokens of a row
  biases: int = 0  # most biased tokens of a row


def ints(*shape: int, fill: int = 0) -> np.ndarray:
  """Returns an array of int32 on the host."""
  return np.full(shape, fill, np.int32)


def no_readers(shards: int, pages: int, most: int) -> Readers:
  """Returns a table on the host of pages that nobody reads, with room for some rows each."""
  return Readers(ints(shards, pages, most, fill=-1), ints(shards, pages), ints(shards, pages))


def empty_tables(sizes: Sizes) -> Tables:
  """Returns tables on the host, with every row free."""
  Z, B = sizes.shards, sizes.rows

  def floats(value: float, *shape: int) -> np.ndarray:
    return np.full((Z * B, *shape), value, np.float32)

  settings = sampling.Settings(
    temperature_B=floats(1.0),
    top_p_B=floats(1.0),
    min_p_B=floats(0.0),
    top_k_B=ints(Z * B),
    biased_BX=ints(Z * B, sizes.biases),
    bias_BX=floats(0.0, sizes.biases),
  )
  rows = Rows(
    token_ZB=ints(Z, B),
    position_ZB=ints(Z, B),
    begin_ZB=ints(Z, B),
    pages_ZBX=ints(Z, B, sizes.chunk // sizes.columns + 2),
    budget_ZB=ints(Z, B),
    stop_ZBX=ints(Z, B, sizes.stops, fill=-1),
    uniform_ZBR=np.zeros((Z, B, sizes.chunk), np.float32),
    settings=settings,
  )
  shared = no_readers(Z, sizes.shared_pages, sizes.readers)
  return Tables(rows, shared, no_readers(Z, sizes.own_pages, 1), np.int32(1))


class Chunk(NamedTuple):
  """Holds what a chunk sampled: count_ZB tokens of each row."""

  token_ZBR: jax.Array  # int32
  logp_ZBR: jax.Array  # float32, nats
  count_ZB: jax.Array  # int32
  entropy_ZBR: jax.Array | None  # float32, nats


def _empty_chunk(sizes: tuple[int, int, int], *, has_entropy: bool) -> Chunk:
  floats_ZBR = jnp.zeros(sizes)
  count_ZB = jnp.zeros(sizes[:2], jnp.int32)
  entropy_ZBR = floats_ZBR if has_entropy else None
  return Chunk(floats_ZBR.astype(jnp.int32), floats_ZBR, count_ZB, entropy_ZBR)


@functools.partial(
  jax.jit, static_argnames=("config", "is_sorted", "has_entropy"), donate_argnames=("own",)
)
def decode(
  params,
  shared: decoder.Pool,
  own: decoder.Pool,
  tables: Tables,
  *,
  config: ModelConfig,
  is_sorted: bool,
  has_entropy: bool = False,
) -> tuple[Chunk, decoder.Pool]:
  """Samples up to R tokens of each row, as many as there are random numbers.

  is_sorted, has_entropy: whether some row needs a sorted vocabulary, or the entropy at its tokens.
  """
  rows = tables.rows
  Z, B, chunk = rows.uniform_ZBR.shape
  C = decoder.columns_of(shared)
  window = config.sliding_window if config.sliding else None
  nowhere = tables.own.base_ZW.shape[1]

  def is_wanted(state):
    t, live_ZB = state[0], state[3]
    ended = jnp.sum(rows.budget_ZB > 0) - jnp.sum(live_ZB)
    return (t < chunk) & jnp.any(live_ZB) & (ended < tables.enough)

  def step(state):
    t, own, token_ZB, live_ZB, result = state
    position_ZB = rows.position_ZB + t
    offset_ZB = position_ZB - rows.begin_ZB
    page_ZB1 = jnp.take_along_axis(rows.pages_ZBX, offset_ZB[..., None] // C, 2)
    places = decoder.Places(
      position_ZB,
      jnp.where(live_ZB, page_ZB1[..., 0], nowhere),
      offset_ZB % C,
      visible(tables.shared, position_ZB, C, window),
      visible(tables.own, position_ZB, C, window),
    )
    hidden_ZBD, own = decoder.extend_rows(params, config, token_ZB, places, shared, own)
    logits_XV = decoder.project(hidden_ZBD.reshape(Z * B, -1), decoder.head(params, config))
    uniform_X = rows.uniform_ZBR[:, :, t].reshape(-1)
    token_X, logp_X = sampling.choose(logits_XV, uniform_X, rows.settings, is_sorted=is_sorted)
    token_ZB = token_X.reshape(Z, B)
    entropy_ZBR = result.entropy_ZBR
    if has_entropy:
      entropy_X = sampling.entropy(logits_XV, rows.settings)
      entropy_ZBR = entropy_ZBR.at[:, :, t].set(entropy_X.reshape(Z, B))
    result = Chunk(
      result.token_ZBR.at[:, :, t].set(token_ZB),
      result.logp_ZBR.at[:, :, t].set(logp_X.reshape(Z, B)),
      result.count_ZB + live_ZB,
      entropy_ZBR,
    )
    is_stop_ZB = jnp.any(token_ZB[..., None] == rows.stop_ZBX, -1)
    live_ZB = live_ZB & ~is_stop_ZB & (t + 1 < rows.budget_ZB)
    return t + 1, own, token_ZB, live_ZB, result

  result = _empty_chunk((Z, B, chunk), has_entropy=has_entropy)
  state = (jnp.int32(0), own, rows.token_ZB, rows.budget_ZB > 0, result)
  _, own, _, _, result = jax.lax.while_loop(is_wanted, step, state)
  return result, own


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("shared",))
def read_shared(params, shared: decoder.Pool, new: decoder.NewBlocks, *, config: ModelConfig):
  """Reads blocks of prompts into the shared pool."""
  return decoder.read_blocks(params, config, new, shared)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("own",))
def read_own(
  params, shared: decoder.Pool, own: decoder.Pool, new: decoder.NewBlocks, *, config: ModelConfig
):
  """Reads blocks of what rows go on with into their own pages."""
  return decoder.read_blocks(params, config, new, shared, own)


@jax.jit
def _take(pool: decoder.Pool, source_ZW: jax.Array) -> decoder.Pool:
  """Returns pages of a pool, or of one layer of it."""

  def take(pages: jax.Array) -> jax.Array:
    axis = pages.ndim - 5  # 1 where layers are stacked, behind Z
    return jax.vmap(lambda pages, source: jnp.take(pages, source, axis=axis))(pages, source_ZW)

  return jax.tree.map(take, pool)


def resized(pool: decoder.Pool, source_ZW) -> decoder.Pool:
  """Returns a pool that holds in page w what source_ZW says of the old one.

  Layer by layer where there is a list of them, so that the old and the new pool are not held both;
  stacked ones are, for a moment.
  """
  if not isinstance(pool.k, list):
    return _take(pool, source_ZW)
  for i in range(len(pool.k)):
    pool.k[i], pool.v[i] = _take(decoder.Pool(pool.k[i], pool.v[i]), source_ZW)
  return pool


@functools.partial(jax.jit, static_argnames=("config",))
def unstacked(params, *, config: ModelConfig):
  """Returns the weights as a CPU decodes with them fastest."""
  return decoder.unstacked(params, config)


@functools.partial(jax.jit, static_argnames=("config", "shards", "pages", "columns", "stacked"))
def empty_pools(*, config: ModelConfig, shards: int, pages: tuple[int, int], columns, stacked):
  """Returns the shared pool and the own one, with so many pages."""
  sizes = dict(shards=shards, columns=columns, stacked=stacked)
  return tuple(
    decoder.init_pool(config, shared=shared, pages=count, **sizes)
    for shared, count in zip((True, False), pages, strict=True)
  )
