"""The compiled program of beam search: extends all beams of a wave by some tokens.

Beams are never copied. Each is a row that writes its tokens into pages of its own, and it may go on
with the tokens of another: for each of its tokens it knows the row in whose pages that lies
(`Beams.slot_ZBT`). Every beam of a request reads the pages of all of them, and sees the columns
that hold its own text.

A program is compiled for the requests Q of a shard, the beams W of each, and the pages of both
pools.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.kernels.paged_attention import LOWEST, Readers, Seen, visible
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Array


class Beams(NamedTuple):
  """Holds the unfinished beams of a wave: row b = q * width + w is a beam of request q."""

  token_ZB: Array  # int32: the last token, which has not been read yet
  score_ZB: Array  # float32, nats; -inf: there is no such beam
  # int32: which of its request's rows has token t in its pages; -1: not there yet
  slot_ZBT: Array


class Tables(NamedTuple):
  """Says what is the same for all tokens of a wave."""

  shared: Readers  # of the prompts' pages
  begin_ZB: Array  # int32: the position of the first own column, the last token of the prompt
  temperature_ZQ: Array  # float32
  stop_ZQX: Array  # int32: tokens that end a beam; -1: none


class Found(NamedTuple):
  """Holds continuations of beams by one token, the best first."""

  score: jax.Array  # float32, nats, of the whole continuation; -inf: there is none
  parent: jax.Array  # int32: the beam that it continues, of its request's
  token: jax.Array  # int32
  logp: jax.Array  # float32, nats, of the token


class Step(NamedTuple):
  """Holds what one step found, in arrays [Z, Q, width]; those of a chunk have an R in front."""

  best: Found  # of all continuations
  kept: Found  # the best that do not end in a stop token: the next beams


@functools.partial(jax.jit, static_argnames=("config", "chunk"), donate_argnames=("own",))
def extend(
  params,
  shared: decoder.Pool,
  own: decoder.Pool,
  beams: Beams,
  tables: Tables,
  span: tuple[Array, Array],
  *,
  config: ModelConfig,
  chunk: int,
) -> tuple[Beams, Step, decoder.Pool]:
  """Extends all beams by some tokens.

  span: (the first token's number, how many). At most `chunk` of them; steps beyond hold zeros.
  """
  first, count = span
  Z, B, _ = beams.slot_ZBT.shape
  Q = tables.temperature_ZQ.shape[1]
  W, C = B // Q, decoder.columns_of(shared)
  window = config.sliding_window if config.sliding else None
  row_B = jnp.arange(B)

  def step(i, state):
    own, beams, steps = state
    t = first + i
    position_ZB = tables.begin_ZB + t
    slot_ZBT = beams.slot_ZBT.at[:, :, t].set(row_B % W)
    places = decoder.Places(
      position_ZB,
      jnp.broadcast_to(t // C * B + row_B, (Z, B)),
      jnp.broadcast_to(t % C, (Z, B)),
      visible(tables.shared, position_ZB, C, window),
      _visible_to_beams(slot_ZBT, t, (Q, W, C), window),
    )
    hidden_ZBD, own = decoder.extend_rows(params, config, beams.token_ZB, places, shared, own)
    logits_XV = decoder.project(hidden_ZBD.reshape(Z * B, -1), decoder.head(params, config))
    now = _ranked(logits_XV.reshape(Z, Q, W, -1), beams.score_ZB.reshape(Z, Q, W), tables)
    slot_ZQWT = slot_ZBT.reshape(Z, Q, W, -1)
    slot_ZQWT = jnp.take_along_axis(slot_ZQWT, now.kept.parent[..., None], 2)
    rows = now.kept.token, now.kept.score, slot_ZQWT
    beams = Beams(*(x.reshape(Z, B, *x.shape[3:]) for x in rows))
    return own, beams, jax.tree.map(lambda all_steps, x: all_steps.at[i].set(x), steps, now)

  ints, floats = (jnp.zeros((chunk, Z, Q, W), dtype) for dtype in (jnp.int32, jnp.float32))
  nothing = Found(floats, ints, ints, floats)
  state = (own, jax.tree.map(jnp.asarray, beams), Step(nothing, nothing))
  own, beams, steps = jax.lax.fori_loop(0, count, step, state)
  return beams, steps, own


def _visible_to_beams(slot_ZBT, t, sizes: tuple[int, int, int], window: int | None) -> Seen:
  """Returns what each beam sees of its request's own pages.

  Page i of row b is page i * B + b of the pool, and its readers are the rows of b's request.
  sizes: requests, width, columns of a page.
  """
  Z, B, T = slot_ZBT.shape
  Q, W, C = sizes
  pages = T // C
  slot = slot_ZBT.reshape(Z, Q, W, pages, C).transpose(0, 3, 1, 2, 4)[:, :, :, None]
  mask = slot == jnp.arange(W)[:, None, None]  # [Z, pages, Q, the page's row, its reader, C]
  distance = t - jnp.arange(T).reshape(pages, 1, 1, 1, C)

  def bias(mask):
    return jnp.where(mask, 0.0, LOWEST).reshape(Z, pages * B, W, C)

  reader = jnp.arange(B).reshape(Q, 1, W)
  row_ZX = jnp.broadcast_to(reader, (Z, pages, Q, W, W)).reshape(Z, -1)
  reads_ZBX = (row_ZX[:, None] == jnp.arange(B)[:, None]).astype(jnp.float32)
  sliding_mask = mask if window is None else mask & (distance < window)
  # else every layer computes them again, as in `paged_attention.visible`
  return jax.lax.optimization_barrier(Seen(row_ZX, reads_ZBX, bias(mask), bias(sliding_mask)))


def _ranked(logits_ZQWV, score_ZQW, tables: Tables) -> Step:
  """Returns the best continuations of each request's beams."""
  Z, Q, W, V = logits_ZQWV.shape
  logp_ZQWV = jax.nn.log_softmax(logits_ZQWV / tables.temperature_ZQ[..., None, None])
  score_ZQX = (score_ZQW[..., None] + logp_ZQWV).reshape(Z, Q, -1)
  # as many as may end in a stop token, and the width
  most = min((1 + tables.stop_ZQX.shape[-1]) * W, W * V)
  score, index = jax.lax.top_k(score_ZQX, most)
  logp = jnp.take_along_axis(logp_ZQWV.reshape(Z, Q, -1), index, -1)
  found = Found(score, index // V, index % V, logp)
  is_stop = jnp.any(found.token[..., None] == tables.stop_ZQX[:, :, None], -1)
  going_on, pick = jax.lax.top_k(jnp.where(is_stop, -jnp.inf, score), W)
  kept = Found(*(jnp.take_along_axis(x, pick, -1) for x in found))
  return Step(Found(*(x[..., :W] for x in found)), kept._replace(score=going_on))
