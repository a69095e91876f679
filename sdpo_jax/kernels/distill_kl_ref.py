"""Specifies the divergence between teacher and policy, from hidden states and heads.

For each token x, the policy's logits are s = h_s W_s / T and the teacher's are t = h_t W_t / T.
Both run over V entries. With pi = softmax(s) and q = softmax(t) the divergence is

  alpha = 0        KL(q || pi)                                  (forward)
  alpha = 1        KL(pi || q)                                  (reverse)
  0 < alpha < 1    (1 - alpha) KL(pi || m) + alpha KL(q || m),  m = (1 - alpha) pi + alpha q

The mixture form tends to 0, not to a KL, as alpha tends to 0 or 1. So the two ends are cases of
their own, as in the method's released code (arXiv 2601.20802). The mixture form is the generalised
Jensen-Shannon divergence of arXiv 2306.13649.

Shapes: hidden states [X, D] and [X, E], heads (output matrices) [D, V] and [E, V], target [X].
Results are [X], in nats.
Numerics: float32, or float64 when an input is float64; products at the highest precision.
Gradient: plain differentiation; the teacher is stopped. Several X x V arrays are held.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp


class DistillKL(NamedTuple):
  """Holds the per-token results, in nats, at the given temperature."""

  divergence_X: jax.Array
  logp_X: jax.Array  # ln pi(target)
  logp_teacher_X: jax.Array  # ln q(target); carries no gradient
  entropy_X: jax.Array  # of pi


def distill_kl(
  student_hidden_XD,
  student_head_DV,
  teacher_hidden_XE,
  teacher_head_EV,
  target_X,
  *,
  alpha,
  temperature,
) -> DistillKL:
  """Computes the divergence and its companions from whole rows of logits."""
  dtype = jnp.promote_types(
    jnp.result_type(student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV),
    jnp.float32,
  )

  def log_softmax(hidden, head):
    product_XV = jnp.matmul(hidden.astype(dtype), head.astype(dtype), precision="highest")
    logits_XV = product_XV / temperature
    return logits_XV - logsumexp(logits_XV, axis=1, keepdims=True)

  def at_target(logp_XV):
    return jnp.take_along_axis(logp_XV, target_X[:, None], axis=1)[:, 0]

  policy_XV = log_softmax(student_hidden_XD, student_head_DV)
  teacher_XV = jax.lax.stop_gradient(log_softmax(teacher_hidden_XE, teacher_head_EV))
  divergence_X = divergence(policy_XV, teacher_XV, alpha)
  entropy_X = -jnp.sum(jnp.exp(policy_XV) * policy_XV, axis=1)
  return DistillKL(divergence_X, at_target(policy_XV), at_target(teacher_XV), entropy_X)


def divergence(policy_XV, teacher_XV, alpha):
  """Returns the divergence [X] of log-probabilities over any buckets: the vocabulary or a top M."""
  if alpha == 0:
    return _kl(teacher_XV, policy_XV)
  if alpha == 1:
    return _kl(policy_XV, teacher_XV)
  mixture_XV = jnp.logaddexp(math.log1p(-alpha) + policy_XV, math.log(alpha) + teacher_XV)
  return (1 - alpha) * _kl(policy_XV, mixture_XV) + alpha * _kl(teacher_XV, mixture_XV)


def _kl(a_XV, b_XV):
  """Returns KL(a || b) of two arrays of log-probabilities."""
  return jnp.sum(jnp.exp(a_XV) * (a_XV - b_XV), axis=1)
