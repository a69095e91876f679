"""Attention of sampling: over keys and values that lie in pages.

A pool is an array of pages, each of which holds the keys and values of C columns (tokens). A row's
text is a list of pages, in any order, of one or two pools: those that it shares with other rows
(their common prompt), and its own.

`attend` computes one token of each row. It goes over the POOL, not over the rows: each page meets
the rows that read it where it lies, in one batched product. A page that many rows read is thus
read once, no key is copied, no row is padded to the length of another, and the work grows with
the pages in use. The softmax is that of all that a row sees, with its true maximum.

`attend_blocks` computes whole blocks of new tokens, as a prompt is read: each block goes through
its own list of pages with the running softmax of FlashAttention (arXiv 2205.14135), as many times
as the longest list demands.

The kernels for paged attention that ship with jax (TPU) return no normaliser, without which two
pools cannot be merged, and go through a page once a row; they are not used.

Axes are those of `records`; X stands for the readers of all pages, W * M, or the pages of a text.
Numerics: products in the dtype of the pool, summed in float32; softmax in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any  # numpy on the host, jax on the device
LOWEST = -1e30  # stands for the logit of what is not seen; finite, for -inf - -inf is NaN


class Readers(NamedTuple):
  """Says who reads the pages of a pool, and what they hold."""

  row_ZWM: Array  # int32: the rows that read a page; -1: none
  base_ZW: Array  # int32: the position of a page's first column in its text
  fill_ZW: Array  # int32: columns in use; others, in a shared page, are not the reader's


class Seen(NamedTuple):
  """Says what the current token of each row sees of a pool; it is made once for all layers."""

  row_ZX: jax.Array  # int32, X = W * M: the rows that read the pages; some row where none does
  reads_ZBX: jax.Array  # float32: 1 where row b is that reader
  # float32, added to scores: 0 where a reader sees a column, else LOWEST
  bias_ZWMC: jax.Array
  sliding_bias_ZWMC: jax.Array


def visible(readers: Readers, position_ZB: jax.Array, columns: int, window: int | None) -> Seen:
  """Returns what tokens at these positions see: their own column and earlier ones.

  window: those of sliding layers see the last `window` positions, their own included.
  """
  Z, W, M = readers.row_ZWM.shape
  B = position_ZB.shape[1]
  column = jnp.arange(columns)
  row_ZX = jnp.maximum(readers.row_ZWM, 0).reshape(Z, -1)
  reads_ZBX = (readers.row_ZWM.reshape(Z, 1, -1) == jnp.arange(B)[:, None]).astype(jnp.float32)
  position_ZWM = jnp.take_along_axis(position_ZB, row_ZX, 1).reshape(Z, W, M)
  distance = position_ZWM[..., None] - (readers.base_ZW[..., None] + column)[:, :, None]
  is_used = (column < readers.fill_ZW[..., None])[:, :, None]
  mask = (readers.row_ZWM >= 0)[..., None] & is_used & (distance >= 0)
  bias = jnp.where(mask, 0.0, LOWEST)
  sliding_bias = bias if window is None else jnp.where(mask & (distance < window), 0.0, LOWEST)
  # else every layer computes them again, in a fusion of its own
  return jax.lax.optimization_barrier(Seen(row_ZX, reads_ZBX, bias, sliding_bias))


def attend(
  q_ZBNH: jax.Array, pools: list[tuple[jax.Array, jax.Array, Seen]], slides: jax.Array | bool
) -> jax.Array:
  """Returns out_ZBNH of one token of each row; zero for a row that reads nothing.

  pools: (k_ZWKHC, v_ZWKCH, what is seen) of each. For one row b and head, it is

    seen = the columns c of all pages w that b reads, as far as its bias there is 0
    out = sum(softmax(q . k_w[:, c] over seen) * v_w[c])

  A row whose numbers are not finite makes those of its shard so: sums go over all pages.
  """
  Z, B, N, H = q_ZBNH.shape
  K = pools[0][0].shape[2]
  scaled = q_ZBNH * H**-0.5
  scores = [_scores(scaled, k_ZWKHC, seen, slides) for k_ZWKHC, _, seen in pools]
  tops = []
  for s_ZWKMJC, (_, _, seen) in zip(scores, pools, strict=True):
    top_ZXN = jnp.max(s_ZWKMJC, -1).swapaxes(2, 3).reshape(Z, -1, N)
    tops.append(jnp.where(seen.reads_ZBX[..., None] > 0, top_ZXN[:, None], LOWEST))
  top_ZBN = jnp.max(jnp.concatenate(tops, 2), 2)
  total_ZBN, out_ZBNH = 0.0, 0.0
  for s_ZWKMJC, (_, v_ZWKCH, seen) in zip(scores, pools, strict=True):
    W, M, C = seen.bias_ZWMC.shape[1:]
    top = _of_readers(top_ZBN, seen.row_ZX).reshape(Z, W, M, K, N // K).swapaxes(2, 3)
    share = jnp.exp(s_ZWKMJC - top[..., None])
    flat = share.astype(v_ZWKCH.dtype).reshape(Z, W, K, -1, C)
    part = jnp.einsum("zwkqc,zwkch->zwkqh", flat, v_ZWKCH, preferred_element_type=jnp.float32)
    total_ZBN += _sum_by_row(seen.reads_ZBX, jnp.sum(share, -1, keepdims=True)).reshape(Z, B, N)
    out_ZBNH += _sum_by_row(seen.reads_ZBX, part.reshape(*share.shape[:-1], H)).reshape(Z, B, N, H)
  out_ZBNH = out_ZBNH / jnp.where(total_ZBN > 0, total_ZBN, 1.0)[..., None]
  return out_ZBNH.astype(q_ZBNH.dtype)


def _of_readers(x_ZB: jax.Array, row_ZX: jax.Array) -> jax.Array:
  """Returns for each reader of a page the entry of its row."""
  return jax.vmap(lambda x_B, row_X: x_B[row_X])(x_ZB, row_ZX)


def _scores(q_ZBNH: jax.Array, k_ZWKHC: jax.Array, seen: Seen, slides) -> jax.Array:
  """Returns the scores of a pool's columns for the readers of its pages, [Z, W, K, M, J, C]."""
  Z, W, K, H, C = k_ZWKHC.shape
  M = seen.bias_ZWMC.shape[2]
  q = _of_readers(q_ZBNH, seen.row_ZX).reshape(Z, W, M, K, -1, H).swapaxes(2, 3)
  q = q.reshape(Z, W, K, -1, H)
  s = jnp.einsum("zwkqh,zwkhc->zwkqc", q, k_ZWKHC, preferred_element_type=jnp.float32)
  if isinstance(slides, bool):
    bias_ZWMC = seen.sliding_bias_ZWMC if slides else seen.bias_ZWMC
  else:
    bias_ZWMC = jnp.where(slides, seen.sliding_bias_ZWMC, seen.bias_ZWMC)
  return s.reshape(Z, W, K, M, -1, C) + bias_ZWMC[:, :, None, :, None]


def _sum_by_row(reads_ZBX: jax.Array, x: jax.Array) -> jax.Array:
  """Sums x [Z, W, K, M, J, *] over the pages of each row: [Z, B, K * J * *].

  A product with zeros and ones, since a scattered sum has no fixed order on a GPU.
  """
  Z, W, K, M, J, width = x.shape
  x = x.swapaxes(2, 3).reshape(Z, W * M, K * J * width)
  return jnp.einsum("zbx,zxy->zby", reads_ZBX, x, precision="highest")


class Chain(NamedTuple):
  """Says which pages of one pool hold a part of each block's text, in order."""

  page_ZYX: Array  # int32
  count_ZY: Array  # int32: how many these are
  first_ZY: Array  # int32: the position of the first one's first column
  end_ZY: Array  # int32: the position behind the part


def attend_blocks(
  q_ZYCNH: jax.Array,
  base_ZY: jax.Array,
  pools: list[tuple[jax.Array, jax.Array, Chain]],
  window: jax.Array | int | None,
) -> jax.Array:
  """Returns out_ZYCNH of blocks of new tokens, whose keys and values are in a pool already.

  Args:
    base_ZY: the position of a block's first column.
    pools: (k_ZWKHC, v_ZWKCH, chain) of each pool that holds a part of the texts.
    window: the positions that a token sees, its own included; None: all up to its own.
  """
  Z, Y, C, N, H = q_ZYCNH.shape
  K = pools[0][0].shape[2]
  J = N // K
  q = (q_ZYCNH * H**-0.5).reshape(Z, Y, C, K, J, H).transpose(0, 1, 3, 4, 2, 5)
  q = q.reshape(Z, Y, K, J * C, H)
  at_ZYC = base_ZY[..., None] + jnp.arange(C)
  heads = (Z, Y, K, J, C)
  carry = (jnp.zeros((*heads, H)), jnp.full(heads, LOWEST), jnp.zeros(heads))
  for k_ZWKHC, v_ZWKCH, chain in pools:

    def add_page(x, carry, pool=(k_ZWKHC, v_ZWKCH), chain=chain):
      """Adds the x-th page of each block's text to its running softmax."""
      out, top, total = carry
      page_ZY = jax.lax.dynamic_index_in_dim(chain.page_ZYX, x, 2, keepdims=False)
      k, v = (jax.vmap(lambda pages, page: pages[page])(pages, page_ZY) for pages in pool)
      s = jnp.einsum("zykqh,zykhc->zykqc", q, k, preferred_element_type=jnp.float32)
      s = s.reshape(Z, Y, K, J, C, C)
      key_ZYC = chain.first_ZY[..., None] + x * C + jnp.arange(C)
      distance = at_ZYC[..., :, None] - key_ZYC[..., None, :]
      mask = (distance >= 0) & (key_ZYC < chain.end_ZY[..., None])[..., None, :]
      mask &= (x < chain.count_ZY)[..., None, None]
      if window is not None:
        mask &= distance < window
      mask = mask[:, :, None, None]
      new_top = jnp.maximum(top, jnp.max(jnp.where(mask, s, LOWEST), -1))
      share = jnp.where(mask, jnp.exp(s - new_top[..., None]), 0.0)
      shrink = jnp.exp(top - new_top)
      flat = share.astype(v.dtype).reshape(Z, Y, K, J * C, C)
      part = jnp.einsum("zykqc,zykch->zykqh", flat, v, preferred_element_type=jnp.float32)
      out = out * shrink[..., None] + part.reshape(Z, Y, K, J, C, H)
      return out, new_top, total * shrink + jnp.sum(share, -1)

    carry = jax.lax.fori_loop(0, jnp.max(chain.count_ZY), add_page, carry)
  out, _, total = carry
  out = out / jnp.where(total > 0, total, 1.0)[..., None]
  return out.transpose(0, 1, 4, 2, 3, 5).reshape(q_ZYCNH.shape).astype(q_ZYCNH.dtype)
