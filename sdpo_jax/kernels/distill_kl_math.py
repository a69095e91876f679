"""Holds the algebra that every fast form of the distillation divergence shares.

This file has no loops over the vocabulary and no memory plan. It turns a block of logits into
running sums, the sums into results, and logits into gradients. distill_kl_ref.py defines the
divergences.

s and t are logits of policy and teacher, one row a token, over some entries of the vocabulary:
a tile, a shard, or all of it. Every per-token number is a column [X, 1]; it is [X, 128] while a
kernel keeps its lanes apart. So the same lines run under XLA and inside a kernel. Units: nats.

Sweeps. Partial sums over some entries merge by rescaling to the common maximum, in any order and
over any split. A KL therefore needs one sweep of the vocabulary. The mixture form needs both
normalisers first, hence a second sweep.

Gradient. Let the loss be a sum over tokens of

  g_divergence * divergence + g_logp * logp + g_entropy * entropy.

Its gradient with respect to s is the sum of three terms, each times its cotangent g:

  divergence   alpha = 0   pi - q
               alpha = 1   pi (r - KL(pi || q)),              r = ln(pi/q)
               else        (1 - alpha) pi (r - KL(pi || m)),  r = ln(pi/m)
  logp         1[v = target] - pi
  entropy      -pi (ln pi + entropy)

Numerics. u = ln(pi/q) is formed as (s - t) - ln(Z_s/Z_t), and ln(Z_s/Z_t) from the quotient of the
two sums. So the difference of nearly equal logits survives, where a difference of two
log-probabilities would cancel. Identical logits give exactly 0 everywhere.
"""

import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

NEG = -1e30  # finite: -inf - -inf and 0 * inf would be NaN
NO_DIVERGENCE = 0.5  # an alpha whose Stats hold no term of both sides


class Stats(NamedTuple):
  """Holds partial sums over some entries; exponentials are relative to the same side's maximum."""

  max_s: jax.Array
  max_t: jax.Array
  sum_s: jax.Array  # sum e^(s - max_s)
  sum_t: jax.Array
  sum_ss: jax.Array  # sum e^(s - max_s) (s - max_s)
  # alpha = 0: sum e^(t - max_t) (t - s); alpha = 1: sum e^(s - max_s) (s - t); else 0
  cross: jax.Array
  target_s: jax.Array  # s at the target, 0 if it is not among these entries
  target_t: jax.Array


class Scalars(NamedTuple):
  """Holds what the gradient needs to know about a token beside its logits."""

  log_z_s: jax.Array
  log_z_t: jax.Array
  log_ratio: jax.Array  # log_z_s - log_z_t, without its cancellation
  entropy: jax.Array
  level: jax.Array  # the mean of r: KL(pi || q) if alpha = 1, KL(pi || m) if mixed, else unused


class Cotangents(NamedTuple):
  """Holds the derivative of the loss with respect to each differentiable result of a token."""

  divergence: jax.Array
  logp: jax.Array
  entropy: jax.Array


class Fold(NamedTuple):
  """Says how a row of a block folds into running numbers: into one column, or one per lane."""

  sum: Callable
  max: Callable
  spread: Callable  # (running numbers, width of the block) -> the numbers over the whole block


def _lane_groups(x):
  return [x[:, start : start + 128] for start in range(0, x.shape[1], 128)]


ROWS = Fold(
  sum=lambda x: jnp.sum(x, axis=1, keepdims=True),
  max=lambda x: jnp.max(x, axis=1, keepdims=True),
  spread=lambda x, width: x,  # broadcasting does it
)
# Columns 128 apart share a lane, so adding them needs no reduction across lanes, which is slow.
LANES = Fold(
  sum=lambda x: functools.reduce(jnp.add, _lane_groups(x)),
  max=lambda x: functools.reduce(jnp.maximum, _lane_groups(x)),
  spread=lambda x, width: jnp.tile(x, (1, width // 128)),
)


def is_mixture(alpha) -> bool:
  """Tells whether alpha asks for the mixture form rather than one of the two KLs."""
  return alpha not in (0, 1)


def empty_stats(X, dtype) -> Stats:
  """Returns the Stats of X tokens over no entries at all."""
  max_s = jnp.full((X, 1), NEG, dtype)
  max_t = jnp.full((X, 1), NEG, dtype)
  zero = jnp.full((X, 1), 0, dtype)
  return Stats(max_s, max_t, *[zero] * 6)


def rescale(stats: Stats, max_s, max_t, alpha) -> Stats:
  """Returns the same sums relative to other maxima; Stats with equal maxima simply add."""
  d_s = stats.max_s - max_s
  e_s = jnp.exp(d_s)
  e_t = jnp.exp(stats.max_t - max_t)
  sum_s = stats.sum_s * e_s
  sum_t = stats.sum_t * e_t
  sum_ss = (stats.sum_ss + d_s * stats.sum_s) * e_s
  cross = stats.cross * (e_t if alpha == 0 else e_s)
  return Stats(max_s, max_t, sum_s, sum_t, sum_ss, cross, stats.target_s, stats.target_t)


def add_block(stats: Stats, s, t, is_target, alpha, fold=ROWS) -> Stats:
  """Returns stats with one more block of logits. is_target: bool, like s; True at the target."""
  max_s = jnp.maximum(stats.max_s, fold.max(s))
  max_t = jnp.maximum(stats.max_t, fold.max(t))
  old = rescale(stats, max_s, max_t, alpha)
  d_s = s - fold.spread(max_s, s.shape[1])
  e_s = jnp.exp(d_s)
  e_t = jnp.exp(t - fold.spread(max_t, t.shape[1]))
  if alpha == 0:
    cross = old.cross + fold.sum(e_t * (t - s))
  elif alpha == 1:
    cross = old.cross + fold.sum(e_s * (s - t))
  else:
    cross = old.cross
  sum_s = old.sum_s + fold.sum(e_s)
  sum_t = old.sum_t + fold.sum(e_t)
  sum_ss = old.sum_ss + fold.sum(e_s * d_s)
  target_s = old.target_s + fold.sum(jnp.where(is_target, s, 0))
  target_t = old.target_t + fold.sum(jnp.where(is_target, t, 0))
  return Stats(max_s, max_t, sum_s, sum_t, sum_ss, cross, target_s, target_t)


def add_lanes(stats: Stats, alpha) -> Stats:
  """Merges the Stats [X, 128] of separate lanes into Stats [X, 1]."""
  max_s = ROWS.max(stats.max_s)
  max_t = ROWS.max(stats.max_t)
  sums = rescale(stats, max_s, max_t, alpha)[2:]
  return Stats(max_s, max_t, *map(ROWS.sum, sums))


def add_shards(stats: Stats, alpha, axis_name) -> Stats:
  """Merges Stats of the vocabulary's shards along a mesh axis; every shard gets the whole."""
  max_s, max_t = jax.lax.pmax((stats.max_s, stats.max_t), axis_name)
  sums = tuple(rescale(stats, max_s, max_t, alpha)[2:])
  return Stats(max_s, max_t, *jax.lax.psum(sums, axis_name))


def finish(stats: Stats, alpha):
  """Returns (divergence, logp, logp_teacher, Scalars) from the whole vocabulary's Stats.

  In the mixture form divergence and level are still 0; `finish_mixture` fills them in.
  """
  log_ratio = (stats.max_s - stats.max_t) + jnp.log(stats.sum_s / stats.sum_t)
  log_sum_s = jnp.log(stats.sum_s)
  log_sum_t = jnp.log(stats.sum_t)
  entropy = log_sum_s - stats.sum_ss / stats.sum_s
  if alpha == 0:
    divergence = stats.cross / stats.sum_t + log_ratio
  elif alpha == 1:
    divergence = stats.cross / stats.sum_s - log_ratio
  else:
    divergence = jnp.zeros_like(log_ratio)
  log_z_s = stats.max_s + log_sum_s
  log_z_t = stats.max_t + log_sum_t
  scalars = Scalars(log_z_s, log_z_t, log_ratio, entropy, level=divergence)
  return divergence, stats.target_s - log_z_s, stats.target_t - log_z_t, scalars


def log_over_mixture(u, alpha):
  """Returns ln(pi/m), given u = ln(pi/q); ln(q/m) is this minus u. No exponential overflows."""
  # The larger of pi and q is factored out of m, so that what is left is e^-|u| <= 1.
  larger = alpha if alpha == 0.5 else jnp.where(u >= 0, 1 - alpha, alpha)  # its weight in m
  return jnp.minimum(u, 0) - jnp.log(larger + (1 - larger) * jnp.exp(-jnp.abs(u)))


def mixture_sums(s, t, scalars: Scalars, alpha, fold=ROWS):
  """Returns what this block adds to KL(pi || m) and to KL(q || m)."""
  u = (s - t) - scalars.log_ratio
  r = log_over_mixture(u, alpha)
  policy = fold.sum(jnp.exp(s - scalars.log_z_s) * r)
  teacher = fold.sum(jnp.exp(t - scalars.log_z_t) * (r - u))
  return policy, teacher


def finish_mixture(sums, scalars: Scalars, alpha):
  """Returns (divergence, Scalars) of the mixture form, given sums over the whole vocabulary."""
  policy, teacher = sums
  return (1 - alpha) * policy + alpha * teacher, scalars._replace(level=policy)


def dlogits(s, t, is_target, scalars: Scalars, cotangents: Cotangents, alpha):
  """Returns the loss's gradient with respect to s, in the logits' dtype (formulas: above)."""
  log_pi = s - scalars.log_z_s
  pi = jnp.exp(log_pi)
  if alpha == 0:
    d = cotangents.divergence * (pi - jnp.exp(t - scalars.log_z_t))
  else:
    u = (s - t) - scalars.log_ratio
    if alpha == 1:
      r = u
      scale = cotangents.divergence
    else:
      r = log_over_mixture(u, alpha)
      scale = (1 - alpha) * cotangents.divergence
    d = (scale * pi) * (r - scalars.level)
  d -= pi * (cotangents.entropy * (log_pi + scalars.entropy) + cotangents.logp)
  return d + jnp.where(is_target, cotangents.logp, 0)
