"""The local engine: samples from the decoder on this process's own devices.

A prompt is read once, into pages that all its samples share; each sample (a *row*) writes what it
adds into pages of its own. Between two chunks of decoding the host looks at what has ended, hands
it out, fills free rows from the queue, and picks the smallest program that holds what lives: few
rows for few survivors, few pages for short texts. Nothing waits for the longest row.

  rows       what a prompt, a row and a parked row are
  cache      which of them holds which pages, and how large the pools of pages are
  reading    prompts into pages
  tables     what the decoding program reads about rows and pages
  decoding   one call of `generate`: the scheduling
  programs   what is compiled
  beams      one call of `search`

Programs are compiled for the few numbers of rows that `decoding.row_counts` gives, and with each
for the sizes of both pools that occur, which are powers of two: a call whose lengths vary a
thousandfold meets about a dozen.

What is computed depends on the requests alone, never on time, and a run repeats bit for bit.
Randomness comes from a generator of each row, with the request's seed and the sample's index as its
key; it is the same on every kind of device.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import threading
from typing import Any

import jax

from sdpo_jax import sharding
from sdpo_jax.engine import beams, programs
from sdpo_jax.engine.decoding import Decoding, Snapshot
from sdpo_jax.engine.programs import Setup
from sdpo_jax.engine.requests import RequestQueue, check
from sdpo_jax.kernels.target import target_platform
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Completion, Request

READ_TOKENS = 512  # most tokens of prompts that are read together

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
    self._interrupted = threading.Event()

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

  def interrupt(self) -> None:
    """Ends every `generate`, those of other threads too, with Preempted. For good."""
    self._interrupted.set()

  def generate(self, requests: Iterable[Request] | RequestQueue) -> Iterator[Completion]:
    """Returns an iterator over the completions of all requests, as they end.

    Raises ValueError for a request that cannot be, when its turn comes.
    """
    decoding = self.decoding()
    self.trace = decoding.trace
    return decoding.run(requests)

  def search(self, requests: Iterable[Request]) -> Iterator[Completion]:
    """Returns an iterator over the n likeliest completions of each request (see `beams`).

    `sampling.beams` is the width of the search. Raises ValueError for a request that cannot be.
    """
    listed = list(requests)
    for request in listed:
      check(request, self.config.vocab, has_text=self.text_of is not None, searches=True)
      beams.check(request, self.config.vocab)
    # the prompts of a wave are read together: seldom are there so few blocks as to need the smaller
    # program
    setup = self._setup()._replace(block_counts=(self.blocks,))
    return beams.search(setup, listed, version=self._version)

  def decoding(self) -> Decoding:
    """Returns what samples for one call, with the weights as they are now."""
    return Decoding(
      self._setup(),
      self._version,
      text_of=self.text_of,
      deterministic=self.deterministic,
      is_interrupted=self._interrupted.is_set,
    )

  def placed(self) -> contextlib.AbstractContextManager:
    """Sets the mesh, not to be held while a completion is handed out: the caller has another."""
    return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh.own)

  def _setup(self) -> Setup:
    assert self._params is not None, "`load` gives the engine its weights"
    params = self._params
    if not self.stacked:
      with self.placed():
        params = programs.unstacked(params, config=self.config)
    return Setup(
      config=self.config,
      params=params,
      placed=self.placed,
      stacked=self.stacked,
      shards=self.shards,
      rows=self.rows,
      columns=self.columns,
      chunk=self.chunk,
      block_counts=(max(1, self.blocks // 8), self.blocks),
    )
