"""The algebra that every fast form of the distillation divergence shares: no loops, no memory plan.

s and t are logits [X, C] of policy and teacher over C entries of the vocabulary (a tile, a shard, or all of
it); every per-token number is a column [X, 1], so that the same lines run under XLA and inside a kernel.
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

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEG = -1e30  # finite: -inf - -inf and 0 * inf would be NaN


class Stats(NamedTuple):
  """Partial sums over some entries; exponentials are relative to the maximum of the same side."""
  max_s: jax.Array
  max_t: jax.Array
  sum_s: jax.Array    # sum e^(s - max_s)
  sum_t: jax.Array
  sum_ss: jax.Array   # sum e^(s - max_s) (s - max_s)
  cross: jax.Array    # alpha = 0: sum e^(t - max_t) (t - s); alpha = 1: sum e^(s - max_s) (s - t); else 0
  target_s: jax.Array  # s at the target, 0 if it is not among these entries
  target_t: jax.Array


class Scalars(NamedTuple):
  """What the gradient needs to know about a token beside its logits."""
  log_z_s: jax.Array
  log_z_t: jax.Array
  log_ratio: jax.Array  # log_z_s - log_z_t, without its cancellation
  entropy: jax.Array
  level: jax.Array      # alpha = 1: KL(pi || q); mixture: K = KL(pi || m); alpha = 0: unused


def empty_stats(X, dtype):
  column = lambda value: jnp.full((X, 1), value, dtype)
  return Stats(column(NEG), column(NEG), *[column(0)] * 6)


def block_stats(s, t, hit, alpha, width=None):
  """hit: bool [X, C], where the target stands. width: entries from this column on do not exist."""
  if width is not None:
    exists = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) < width
    s, t = jnp.where(exists, s, NEG), jnp.where(exists, t, NEG)
  total = lambda x: jnp.sum(x, axis=1, keepdims=True)
  max_s, max_t = (jnp.max(x, axis=1, keepdims=True) for x in (s, t))
  e_s, e_t = jnp.exp(s - max_s), jnp.exp(t - max_t)
  if alpha == 0:
    cross = total(e_t * (t - s))
  elif alpha == 1:
    cross = total(e_s * (s - t))
  else:
    cross = jnp.zeros_like(max_s)
  return Stats(max_s, max_t, total(e_s), total(e_t), total(e_s * (s - max_s)), cross,
               total(jnp.where(hit, s, 0)), total(jnp.where(hit, t, 0)))


def merge(a: Stats, b: Stats, alpha) -> Stats:
  max_s, max_t = jnp.maximum(a.max_s, b.max_s), jnp.maximum(a.max_t, b.max_t)
  a_s, b_s = a.max_s - max_s, b.max_s - max_s
  ea_s, eb_s = jnp.exp(a_s), jnp.exp(b_s)
  ea_t, eb_t = jnp.exp(a.max_t - max_t), jnp.exp(b.max_t - max_t)
  ea, eb = (ea_t, eb_t) if alpha == 0 else (ea_s, eb_s)
  return Stats(max_s, max_t, a.sum_s * ea_s + b.sum_s * eb_s, a.sum_t * ea_t + b.sum_t * eb_t,
               (a.sum_ss + a_s * a.sum_s) * ea_s + (b.sum_ss + b_s * b.sum_s) * eb_s,
               a.cross * ea + b.cross * eb, a.target_s + b.target_s, a.target_t + b.target_t)


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
  scalars = Scalars(stats.max_s + log_sum_s, stats.max_t + log_sum_t, log_ratio, entropy, divergence)
  return divergence, stats.target_s - scalars.log_z_s, stats.target_t - scalars.log_z_t, scalars


def is_mixture(alpha):
  return alpha not in (0, 1)


def log_over_mixture(u, alpha):
  """ln(pi/m), given u = ln(pi/q). ln(q/m) is this minus u. The exponential never overflows."""
  larger = alpha if alpha == 0.5 else jnp.where(u >= 0, 1 - alpha, alpha)  # weight of the larger of pi and q
  return jnp.minimum(u, 0) - jnp.log(larger + (1 - larger) * jnp.exp(-jnp.abs(u)))


def mixture_sums(s, t, scalars: Scalars, alpha, width=None):
  """This block's part of KL(pi || m) and of KL(q || m)."""
  u = (s - t) - scalars.log_ratio
  r = log_over_mixture(u, alpha)
  pi_r, q_r = jnp.exp(s - scalars.log_z_s) * r, jnp.exp(t - scalars.log_z_t) * (r - u)
  if width is not None:
    exists = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) < width
    pi_r, q_r = jnp.where(exists, pi_r, 0), jnp.where(exists, q_r, 0)
  return jnp.sum(pi_r, axis=1, keepdims=True), jnp.sum(q_r, axis=1, keepdims=True)


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
