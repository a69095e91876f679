"""Draws the next token of each row from its logits, on the device.

Settings stand in arrays, one entry a row, so that rows of different requests share a program.

Order: banned tokens and biases; temperature; top-k, with all that tie with the last one kept; top-p
over what is left; min-p. The log-probability of a token is over the whole vocabulary at the
temperature, before all cuts and biases: it is what the trainer computes. At temperature 0 the
likeliest token is taken, and its log-probability is that at temperature 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.records import Array, Sampling

_BLOCK = 128  # entries that are summed before the sums are searched


class Settings(NamedTuple):
  """Holds how each row is sampled."""

  temperature_B: Array  # float32; 0: greedy
  top_p_B: Array  # float32; 1: off
  min_p_B: Array  # float32; 0: off
  top_k_B: Array  # int32; 0: off
  # added to the logits of these tokens; both [B, 0] where no row has any
  biased_BX: Array  # int32
  bias_BX: Array  # float32


def needs_sorting(sampling: Sampling) -> bool:
  """Says whether `choose` has to sort the vocabulary for these settings."""
  return sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)


def choose(
  logits_BV: jax.Array, uniform_B: jax.Array, settings: Settings, *, is_sorted: bool
) -> tuple[jax.Array, jax.Array]:
  """Returns (token_B, logp_B).

  uniform_B: a number of [0, 1) a row, which decides. is_sorted: False skips top-k and top-p.
  """
  is_greedy_B = settings.temperature_B == 0
  temperature_B1 = jnp.where(is_greedy_B, 1.0, settings.temperature_B)[:, None]
  logits_BV = logits_BV / temperature_B1
  top_B1 = jnp.max(logits_BV, -1, keepdims=True)
  weight_BV = jnp.exp(logits_BV - top_B1)
  log_total_B = top_B1[:, 0] + jnp.log(jnp.sum(weight_BV, -1))
  allowed_BV, allowed_top_B1 = logits_BV, top_B1
  if settings.biased_BX.shape[1]:
    row_B1 = jnp.arange(len(logits_BV))[:, None]
    bias_BX = settings.bias_BX / temperature_B1
    allowed_BV = allowed_BV.at[row_B1, settings.biased_BX].add(bias_BX)
    allowed_top_B1 = jnp.max(allowed_BV, -1, keepdims=True)
    weight_BV = jnp.exp(allowed_BV - allowed_top_B1)
  least_B1 = allowed_top_B1 + jnp.log(settings.min_p_B[:, None])
  if is_sorted:
    least_B1 = jnp.maximum(least_B1, _least_kept(allowed_BV, settings))
  least_B1 = jnp.where(is_greedy_B[:, None], allowed_top_B1, least_B1)
  kept_BV = allowed_BV >= least_B1
  # greedy: the first of the likeliest
  token_B = draw(jnp.where(kept_BV, weight_BV, 0.0), jnp.where(is_greedy_B, 0.0, uniform_B))
  logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], -1)[:, 0]
  return token_B, logit_B - log_total_B


def entropy(logits_BV: jax.Array, settings: Settings) -> jax.Array:
  """Returns entropy_B in nats of what `choose` reports log-probabilities of.

  That is the whole vocabulary at the temperature, before cuts and biases; at temperature 0, as at
  temperature 1.
  """
  temperature_B = jnp.where(settings.temperature_B == 0, 1.0, settings.temperature_B)
  logp_BV = jax.nn.log_softmax(logits_BV / temperature_B[:, None])
  return -jnp.sum(jnp.exp(logp_BV) * logp_BV, -1)


def _least_kept(logits_BV: jax.Array, settings: Settings) -> jax.Array:
  """Returns the least logit that top-k and then top-p keep, [B, 1]; the likeliest always stays."""
  V = logits_BV.shape[1]
  sorted_BV = jnp.flip(jnp.sort(logits_BV, -1), -1)
  count_B1 = jnp.where(settings.top_k_B > 0, settings.top_k_B, V)[:, None]
  kept_BV = jnp.where(jnp.arange(V) < count_B1, sorted_BV, -jnp.inf)
  probability_BV = jax.nn.softmax(kept_BV, -1)
  before_BV = jnp.cumsum(probability_BV, -1) - probability_BV
  top_p_B1 = settings.top_p_B[:, None]
  # a running sum may be rounded to 1 before its end
  is_kept_BV = ((before_BV < top_p_B1) | (top_p_B1 >= 1)) & (kept_BV > -jnp.inf)
  return jnp.min(jnp.where(is_kept_BV, sorted_BV, jnp.inf), -1, keepdims=True)


def draw(weight_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """Returns a token a row with a chance in proportion to its weight: inverts their running sum.

  One random number a row does it. (Adding a Gumbel variable to each logit takes V of them: on a
  CPU, a third of the time of a small model's step.) Tokens of less than 6e-8 of the weight
  may never come, as a float32 in [0, 1) has 24 bits. A token of weight 0 is never returned, however
  sums are rounded.
  """
  B, V = weight_BV.shape
  padded = jnp.pad(weight_BV, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
  sum_BX = jnp.sum(padded, -1)
  cumulative_BX = jnp.cumsum(sum_BX, -1)
  target_B1 = uniform_B[:, None] * cumulative_BX[:, -1:]
  block_B1 = _first(cumulative_BX > target_B1, sum_BX > 0)
  before_BX = jnp.pad(cumulative_BX, ((0, 0), (1, 0)))
  rest_B1 = target_B1 - jnp.take_along_axis(before_BX, block_B1, 1)
  inside = jnp.take_along_axis(padded, block_B1[..., None], 1)[:, 0]
  index_B1 = _first(jnp.cumsum(inside, -1) > rest_B1, inside > 0)
  return (block_B1 * _BLOCK + index_B1)[:, 0].astype(jnp.int32)


def _first(is_reached: jax.Array, is_possible: jax.Array) -> jax.Array:
  """Returns, as [B, 1], the first index that is reached and possible, or the last possible one."""
  index = jnp.arange(is_possible.shape[1])
  last = jnp.max(jnp.where(is_possible, index, 0), -1)
  first = jnp.min(jnp.where(is_reached & is_possible, index, len(index)), -1)
  return jnp.minimum(first, last)[:, None]
