"""The algebra that every fast form of the distillation divergence shares: no loops, no memory plan.

s and t are logits [X, C] of policy and teacher over C entries of the vocabulary (a tile, a shard, or all of
it); every per-token number is a column [X, 1], or [X, 128] while a kernel keeps its lanes apart, so that the same
lines run under XLA and inside a kernel.
Nats throughout. Definitions of the divergences: distill_kl_ref.py.

Partial sums over C entries merge by rescaling to the common maximum, in any order and over any split.
KL then needs one sweep of the vocabulary; the mixture form needs both normalisers first, hence a second sweep.

Gradient with respect to s of sum(g_div * divergence + g_logp * logp + g_entropy * entropy), with
r = ln(pi/m) and K = sum(pi r):

  divergence   alpha = 0: pi - q;   alpha = 1: pi (ln(pi/q) - KL);   else (1 - alpha) pi (r - K)
  logp         1[v = target] - pi
  entropy      -pi (ln pi + entropy)

Numerics: u = ln(pi/q) is formed as (s - t) - ln(Z_s/Z_t), and ln(Z_s/Z_t) from the quotient of the two sums,
so that the difference of nearly equal logits survives; identical logits give exactly 0 everywhere.
"""

import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

NEG = -1e30  # finite: -inf - -inf and 0 * inf would be NaN


class Stats(NamedTuple):
  """Partial sums over some entries; exponentials are relative to the maximum of the same side."""

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
  """What the gradient needs to know about a token beside its logits."""

  log_z_s: jax.Array
  log_z_t: jax.Array
  log_ratio: jax.Array  # log_z_s - log_z_t, without its cancellation
  entropy: jax.Array
  level: jax.Array  # alpha = 1: KL(pi || q); mixture: K = KL(pi || m); alpha = 0: unused


class Fold(NamedTuple):
  """How a row of a block becomes a running number: one column, or one column for each of 128 lanes."""

  sum: Callable
  max: Callable
  spread: Callable  # from running numbers back over the block


ROWS = Fold(
  sum=lambda x: jnp.sum(x, axis=1, keepdims=True),
  max=lambda x: jnp.max(x, axis=1, keepdims=True),
  spread=lambda x, width: x,
)
_lane_groups = lambda x: [x[:, i : i + 128] for i in range(0, x.shape[1], 128)]
# no reduction across lanes until the very end
LANES = Fold(
  sum=lambda x: functools.reduce(jnp.add, _lane_groups(x)),
  max=lambda x: functools.reduce(jnp.maximum, _lane_groups(x)),
  spread=lambda x, width: jnp.tile(x, (1, width // 128)),
)


def empty_stats(X, dtype):
  column = lambda value: jnp.full((X, 1), value, dtype)
  return Stats(column(NEG), column(NEG), *[column(0)] * 6)


def rescale(stats: Stats, max_s, max_t, alpha) -> Stats:
  """The same sums relative to other maxima; from here on, Stats of different entries simply add."""
  d_s = stats.max_s - max_s
  e_s, e_t = jnp.exp(d_s), jnp.exp(stats.max_t - max_t)
  return Stats(
    max_s,
    max_t,
    stats.sum_s * e_s,
    stats.sum_t * e_t,
    (stats.sum_ss + d_s * stats.sum_s) * e_s,
    stats.cross * (e_t if alpha == 0 else e_s),
    stats.target_s,
    stats.target_t,
  )


def add_block(stats: Stats, s, t, hit, alpha, fold=ROWS) -> Stats:
  """stats and this block of logits. hit: bool [X, C], where the target stands."""
  max_s, max_t = jnp.maximum(stats.max_s, fold.max(s)), jnp.maximum(stats.max_t, fold.max(t))
  old = rescale(stats, max_s, max_t, alpha)
  d_s = s - fold.spread(max_s, s.shape[1])
  e_s, e_t = jnp.exp(d_s), jnp.exp(t - fold.spread(max_t, t.shape[1]))
  if alpha == 0:
    cross = old.cross + fold.sum(e_t * (t - s))
  elif alpha == 1:
    cross = old.cross + fold.sum(e_s * (s - t))
  else:
    cross = old.cross
  return Stats(
    max_s,
    max_t,
    old.sum_s + fold.sum(e_s),
    old.sum_t + fold.sum(e_t),
    old.sum_ss + fold.sum(e_s * d_s),
    cross,
    old.target_s + fold.sum(jnp.where(hit, s, 0)),
    old.target_t + fold.sum(jnp.where(hit, t, 0)),
  )


def add_lanes(stats: Stats, alpha) -> Stats:
  """Stats [X, 128] of separate lanes -> Stats [X, 1] of all."""
  max_s, max_t = ROWS.max(stats.max_s), ROWS.max(stats.max_t)
  sums = rescale(stats, max_s, max_t, alpha)[2:]
  return Stats(max_s, max_t, *map(ROWS.sum, sums))


def add_shards(stats: Stats, alpha, axis_name) -> Stats:
  """Stats of a mesh axis's shards of the vocabulary -> Stats of the whole of it, on every shard."""
  max_s, max_t = jax.lax.pmax((stats.max_s, stats.max_t), axis_name)
  return Stats(
    max_s, max_t, *jax.lax.psum(tuple(rescale(stats, max_s, max_t, alpha)[2:]), axis_name)
  )


def finish(stats: Stats, alpha):
  """(divergence, logp, logp_teacher, Scalars); the mixture's divergence and level come from `mixture_sums`."""
  log_ratio = (stats.max_s - stats.max_t) + jnp.log(stats.sum_s / stats.sum_t)
  log_sum_s, log_sum_t = jnp.log(stats.sum_s), jnp.log(stats.sum_t)
  entropy = log_sum_s - stats.sum_ss / stats.sum_s
  if alpha == 0:
    divergence = stats.cross / stats.sum_t + log_ratio
  elif alpha == 1:
    divergence = stats.cross / stats.sum_s - log_ratio
  else:
    divergence = jnp.zeros_like(log_ratio)
  scalars = Scalars(
    stats.max_s + log_sum_s, stats.max_t + log_sum_t, log_ratio, entropy, divergence
  )
  return divergence, stats.target_s - scalars.log_z_s, stats.target_t - scalars.log_z_t, scalars


def is_mixture(alpha):
  return alpha not in (0, 1)


def log_over_mixture(u, alpha):
  """ln(pi/m), given u = ln(pi/q). ln(q/m) is this minus u. The exponential never overflows."""
  # weight of the larger of pi and q
  larger = alpha if alpha == 0.5 else jnp.where(u >= 0, 1 - alpha, alpha)
  return jnp.minimum(u, 0) - jnp.log(larger + (1 - larger) * jnp.exp(-jnp.abs(u)))


def mixture_sums(s, t, scalars: Scalars, alpha, fold=ROWS):
  """This block's part of KL(pi || m) and of KL(q || m)."""
  u = (s - t) - scalars.log_ratio
  r = log_over_mixture(u, alpha)
  return fold.sum(jnp.exp(s - scalars.log_z_s) * r), fold.sum(
    jnp.exp(t - scalars.log_z_t) * (r - u)
  )


def with_mixture(sums, scalars: Scalars, alpha):
  """(divergence, Scalars) of the mixture form from the whole vocabulary's `mixture_sums`."""
  policy, teacher = sums
  return (1 - alpha) * policy + alpha * teacher, scalars._replace(level=policy)


def dlogits(s, t, hit, scalars: Scalars, cotangents, alpha):
  """Gradient with respect to s, in the logits' dtype. cotangents: columns for divergence, logp, entropy."""
  g_div, g_logp, g_entropy = cotangents
  log_pi = s - scalars.log_z_s
  pi = jnp.exp(log_pi)
  if alpha == 0:
    d = g_div * (pi - jnp.exp(t - scalars.log_z_t))
  else:
    u = (s - t) - scalars.log_ratio
    r = u if alpha == 1 else log_over_mixture(u, alpha)
    d = ((g_div if alpha == 1 else (1 - alpha) * g_div) * pi) * (r - scalars.level)
  d -= pi * (g_entropy * (log_pi + scalars.entropy) + g_logp)
  return d + jnp.where(hit, g_logp, 0)
