"""Writes down for the decoding program what the host knows: `programs.Tables`, anew for each chunk.

A row's position in the tables is its place among the live rows of its shard. Its text is the
prompt's tokens but for the last, in shared pages, and then the rest in own ones: own page i begins
at position `prompt.length + i * columns`.
"""

from collections.abc import Sequence

import numpy as np

from sdpo_jax.engine import programs
from sdpo_jax.engine.cache import Cache, Shard
from sdpo_jax.engine.pages import power_of_two
from sdpo_jax.engine.programs import Setup, Sizes
from sdpo_jax.engine.rows import Prompt, Row
from sdpo_jax.engine.sampling import Settings
from sdpo_jax.kernels.paged_attention import Readers


def least_sizes(setup: Setup) -> Sizes:
  """Returns the sizes from which those of a call grow."""
  return Sizes(
    shards=setup.shards,
    rows=setup.rows,
    shared_pages=0,
    own_pages=0,
    readers=1,
    columns=setup.columns,
    chunk=setup.chunk,
  )


def grown_sizes(sizes: Sizes, shards: list[Shard], rows: int) -> Sizes:
  """Returns the sizes for so many rows of each shard.

  What rows bring along (readers of a prompt, stop tokens, biases) never shrinks during a call. Else
  what each survivor brings would be another program.
  """
  samplings = [row.request.sampling for shard in shards for row in shard.live]
  readers = max(len(places) for s in shards for places in _readers_by_prompt(s.live).values())
  stops = max(len(s.stop_tokens) for s in samplings)
  biases = max(len(s.logit_bias) + len(s.banned_tokens) for s in samplings)
  return sizes._replace(
    rows=rows,
    readers=max(sizes.readers, power_of_two(readers)),
    stops=max(sizes.stops, power_of_two(stops)),
    biases=max(sizes.biases, power_of_two(biases)),
  )


def make_tables(sizes: Sizes, cache: Cache, *, enough: int) -> programs.Tables:
  """Returns the tables of what lives. enough: rows whose end is the end of the chunk."""
  tables = programs.empty_tables(
    sizes._replace(
      shared_pages=cache.shared_pages,
      own_pages=cache.own_pages,
      readers=min(sizes.rows, sizes.readers),
    )
  )
  C = sizes.columns
  tables.own.fill_ZW[:] = C
  for z, shard in enumerate(cache.shards):
    _write_rows(tables.rows, z, shard.live, C)
    for b, row in enumerate(shard.live):
      pages = np.asarray(row.pages, np.int32)
      tables.own.row_ZWM[z, pages, 0] = b
      tables.own.base_ZW[z, pages] = row.prompt.length + np.arange(len(pages)) * C
    for prompt, places in _readers_by_prompt(shard.live).items():
      write_readers(tables.shared, z, prompt, places, C)
  return tables._replace(enough=np.int32(enough))


def write_readers(
  table: Readers, z: int, prompt: Prompt, rows: Sequence[int], columns: int
) -> None:
  """Writes into the table of the shared pages that these rows of shard z read a prompt."""
  pages = np.asarray(prompt.pages, np.int32)
  base = np.arange(len(pages)) * columns
  table.row_ZWM[z, pages, : len(rows)] = rows
  table.base_ZW[z, pages] = base
  table.fill_ZW[z, pages] = np.minimum(columns, prompt.length - base)


def _readers_by_prompt(rows: list[Row]) -> dict[Prompt, list[int]]:
  places: dict[Prompt, list[int]] = {}
  for b, row in enumerate(rows):
    places.setdefault(row.prompt, []).append(b)
  return places


def _write_rows(table: programs.Rows, z: int, rows: list[Row], C: int) -> None:
  count = len(rows)
  table.token_ZB[z, :count] = [row.last_token for row in rows]
  table.position_ZB[z, :count] = [row.prompt.length + row.written for row in rows]
  table.begin_ZB[z, :count] = [row.prompt.length + row.written // C * C for row in rows]
  table.budget_ZB[z, :count] = [row.left for row in rows]
  chunk = table.uniform_ZBR.shape[2]
  for b, row in enumerate(rows):
    ahead = row.pages[row.written // C :]  # that will be written
    table.pages_ZBX[z, b, : len(ahead)] = ahead
    table.uniform_ZBR[z, b] = row.uniform(chunk)
    stop_tokens = row.request.sampling.stop_tokens
    table.stop_ZBX[z, b, : len(stop_tokens)] = stop_tokens
  _write_settings(table.settings, z * table.token_ZB.shape[1], rows)


def _write_settings(settings: Settings, first: int, rows: list[Row]) -> None:
  """Writes how rows are sampled, from entry `first` on."""
  samplings = [row.request.sampling for row in rows]
  of_rows = slice(first, first + len(rows))
  settings.temperature_B[of_rows] = [s.temperature for s in samplings]
  settings.top_p_B[of_rows] = [s.top_p for s in samplings]
  settings.top_k_B[of_rows] = [s.top_k for s in samplings]
  settings.min_p_B[of_rows] = [s.min_p for s in samplings]
  for x, sampling in enumerate(samplings, first):
    banned = [(token, -np.inf) for token in sampling.banned_tokens]
    for i, (token, bias) in enumerate((*sampling.logit_bias, *banned)):
      settings.biased_BX[x, i], settings.bias_BX[x, i] = token, bias
