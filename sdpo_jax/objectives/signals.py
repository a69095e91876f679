"""Token signals: what each response token contributes once a teacher has re-scored it.

A token signal maps `Signals`, the per-token quantities of policy and teacher, to loss_BR in nats.
It is named by the granularity of its credit, as in SDPO (arXiv 2601.20802, section 2.3):

  divergence     logit level: D(policy, teacher) over the whole vocabulary (the default),
                 or over the policy's top K entries and a tail
  sampled_token  token level: sg(log pi(y) - log q(y)) * log pi(y),
                 the score-function form of reverse KL; and such forms of the other divergences
  return_to_go   the same with what the tokens after it add, discounted
  sequence       the mean token advantage of the response as one scalar:
                 -sg(mean_t (log q - log pi)) * log pi(y)
  gated          the gap times a gate that opens where the teacher likes the token better
  weighted_k3    an estimate of KL(pi || q) from the sampled token, importance-weighted
  likelier       makes tokens that the teacher rejects less likely than others the policy likes
  contrast       -c log pi(y), where c contrasts the response with its siblings (cti.py)

The teacher carries no gradient in any of them.
"""

import math
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.cti import CREDIT
from sdpo_jax.records import TrainBatch

# What a part may declare that it reads. The train step computes none unless some part does, and
# runs no teacher at all where no part reads any.
DIVERGENCE, TEACHER_LOGP, TEACHER_ENTROPY = "divergence_BR", "logp_teacher_BR", "entropy_teacher_BR"
RIVALS = "logp_rivals"
NO_RIVAL = -1e9  # nats: of an entry that is the sampled token itself


class Part(NamedTuple):
  """One entry of a table of parts: a function of arrays, and the costly signals that it reads."""

  function: Callable | None  # None: the method has no such part
  # of DIVERGENCE, TEACHER_LOGP, TEACHER_ENTROPY, RIVALS, CREDIT; a function of its settings where
  # they decide
  reads: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()


class Signals(NamedTuple):
  """Policy and teacher on each response token, for one reading by the teacher, in nats.

  The first three fields and the rivals carry gradient.
  """

  logp_BR: jax.Array  # log pi(y_t)
  entropy_BR: jax.Array  # H(pi)
  divergence_BR: jax.Array | None  # D(pi, q); None where the method computes none
  logp_teacher_BR: jax.Array | None  # log q(y_t); None without a teacher
  entropy_teacher_BR: jax.Array | None = None  # H(q); None where no part reads it
  # log pi, each [B, R], of the policy's likeliest tokens; NO_RIVAL at the sampled one. None where
  # no part reads them
  logp_rivals: tuple[jax.Array, ...] | None = None

  @property
  def gap_BR(self) -> jax.Array:
    """Detached log q(y_t) - log pi(y_t); positive where the teacher likes the token better."""
    return jax.lax.stop_gradient(self.logp_teacher_BR - self.logp_BR)


def mean_per_response(x_BR: jax.Array, weight_BR: jax.Array) -> jax.Array:
  """Returns the weighted mean of each response as [B, 1]; 0 where nothing has a weight."""
  total_B1 = jnp.sum(x_BR * weight_BR, -1, keepdims=True)
  return total_B1 / jnp.maximum(jnp.sum(weight_BR, -1, keepdims=True), 1.0)


def divergence(
  signals: Signals,
  batch: TrainBatch,
  *,
  alpha: float = 0.5,
  top_k: int | None = None,
  add_tail: bool = True,
  clip: float | None = None,
  advantage_clip: float | None = None,
  ratio_bounds: tuple = (),
) -> jax.Array:
  """Returns D(policy, teacher). The kernel has applied all of these settings but `clip`.

  alpha: 0 is KL(q || pi), 1 is KL(pi || q), between them lies the generalised JSD.
  top_k, add_tail: over the policy's K likeliest entries, with one entry for the rest of the mass.
  clip: a token above it counts as that much and has no gradient (OPSD, arXiv 2601.18734).
  advantage_clip: with alpha = 1 and top_k, holds the advantage log q - log pi of each kept entry
    within +-advantage_clip.
  ratio_bounds: with top_k, (least, most) within which q / pi of each kept entry and of the tail is
    held, or (); q is not renormalised (RESD, arXiv 2605.12741).
  """
  if clip is None:
    return signals.divergence_BR
  return jnp.minimum(signals.divergence_BR, clip)


def sampled_token(
  signals: Signals,
  batch: TrainBatch,
  *,
  alpha: float = 1.0,
  corrected: bool = True,
  baseline: bool = False,
) -> jax.Array:
  """Weighs the log-probability of each sampled token by how much more the teacher likes it.

  alpha: of the divergence whose gradient this has in the mean over the tokens that the policy may
    sample (OPD+, arXiv 2606.01039, section 3).
  corrected: without it the value of the divergence is taken as a reward. The mean is then another
    gradient unless alpha is 1: a control.
  baseline: subtracts from the gap its mean under the policy, -KL(pi || q), which the kernel knows;
    the mean stays, the variance falls (vOPD, arXiv 2605.07865). Needs alpha = 1.
  """
  gain_BR = token_gain(signals.gap_BR, alpha) if corrected else token_reward(signals.gap_BR, alpha)
  if baseline:
    gain_BR = gain_BR + jax.lax.stop_gradient(signals.divergence_BR)
  return -gain_BR * signals.logp_BR


def sampled_token_reads(*, baseline: bool, **_) -> tuple[str, ...]:
  """Returns what `sampled_token` reads with these settings."""
  return (TEACHER_LOGP, DIVERGENCE) if baseline else (TEACHER_LOGP,)


def token_gain(gap: jax.Array, alpha: float) -> jax.Array:
  """Returns the advantage of a token whose mean is the gradient of a divergence D.

  For logits z of the policy, sum_v pi_v gain(v) (1[v = j] - pi_j) = -dD/dz_j. With u = q/pi that is
  u f'(u) - f(u) for D = E_pi f(u): ln u for reverse KL, u for forward KL, and the mixture form's
  (1 - alpha) ln(1 - alpha + alpha u), which is derived here. The mean of forward KL's, 1, is taken
  off. A constant does not change the sum, so that of reverse KL is left out.

  gap: ln u. It is held within +-20 where u itself is formed.
  """
  if alpha == 1:
    return gap
  if alpha == 0:
    return jnp.expm1(jnp.clip(gap, -20.0, 20.0))
  return (1.0 - alpha) * _log_mixture(gap, alpha)


def token_reward(gap: jax.Array, alpha: float) -> jax.Array:
  """Returns -f(u), where the divergence is E_pi f(u): what a token takes off it.

  As an advantage its mean is not the gradient of the divergence, since f depends on the policy too;
  with reverse KL it is.
  """
  if alpha == 1:
    return gap
  gap = jnp.clip(gap, -20.0, 20.0)
  if alpha == 0:
    return -jnp.exp(gap) * gap
  log_mixture = _log_mixture(gap, alpha)
  return (1.0 - alpha) * log_mixture - alpha * jnp.exp(gap) * (gap - log_mixture)


def _log_mixture(gap: jax.Array, alpha: float) -> jax.Array:
  """ln(m/pi) of the mixture m = (1 - alpha) pi + alpha q."""
  gap = jnp.clip(gap, -20.0, 20.0)
  return jnp.logaddexp(math.log1p(-alpha), math.log(alpha) + gap)


def return_to_go(signals: Signals, batch: TrainBatch, *, gamma: float = 0.99) -> jax.Array:
  """Weighs each sampled token by its gap and those of the tokens after it, discounted.

  The weight is sum over s >= t of gamma^(s - t) gap_s (beta-OPSD, arXiv 2607.28582, eq. 17-25);
  gamma = 0 is `sampled_token`. The sum begins anew behind a token without a weight: what follows
  the answer of a tool is another turn's.
  """
  counts_BR = batch.weight_BR > 0

  def join(later, earlier):
    (later_decay, later_sum), (decay, own_sum) = later, earlier
    return decay * later_decay, own_sum + decay * later_sum

  decay_BR = jnp.where(counts_BR, gamma, 0.0)
  gap_BR = jnp.where(counts_BR, signals.gap_BR, 0.0)
  _, return_BR = jax.lax.associative_scan(join, (decay_BR, gap_BR), reverse=True, axis=1)
  return -return_BR * signals.logp_BR


def sequence(signals: Signals, batch: TrainBatch) -> jax.Array:
  """Weighs all tokens of a response by the mean gap of the response."""
  return -mean_per_response(signals.gap_BR, batch.weight_BR) * signals.logp_BR


def gated(signals: Signals, batch: TrainBatch, *, beta: float = 5.0) -> jax.Array:
  """Takes sigmoid(beta gap) (log q - log pi), the gate detached (SDAR, arXiv 2605.15155).

  The gradient raises log pi of every token, most where the teacher likes it better. beta = 0 is a
  gate of 1/2 everywhere. Both readings are today's, where SDAR's released loop takes log q from
  before the updates of the batch.
  """
  gate_BR = jax.nn.sigmoid(beta * signals.gap_BR)
  return gate_BR * (jax.lax.stop_gradient(signals.logp_teacher_BR) - signals.logp_BR)


def weighted_k3(signals: Signals, batch: TrainBatch) -> jax.Array:
  """Takes (pi / pi_old) (e^gap - 1 - gap), whose mean is KL(pi || q) (Skill-SD, arXiv 2604.10674).

  The ratio carries gradient too: without it the mean of the gradient is that of KL(q || pi), with
  it that of KL(pi || q). The gap is held within +-20.
  """
  gap_BR = jax.lax.stop_gradient(signals.logp_teacher_BR) - signals.logp_BR
  gap_BR = jnp.clip(gap_BR, -20.0, 20.0)
  ratio_BR = jnp.exp(signals.logp_BR - batch.logp_old_BR)
  return ratio_BR * (jnp.expm1(gap_BR) - gap_BR)


def likelier(
  signals: Signals, batch: TrainBatch, *, rivals: int = 5, threshold: float = 0.0
) -> jax.Array:
  """Takes -log(e^l+ / (e^l+ + e^l_y)) where gap < -threshold: contrasts a token with a likely one.

  l are the policy's logits, y is the sampled token and + one of the policy's `rivals` likeliest
  tokens, y left out. CRINGE (arXiv 2211.05826) draws +; here its mean over the draw is taken, which
  has the same mean gradient, less noise, and needs no random numbers.

  threshold: nats, at least 0.
  """
  logp_BRM = jnp.stack(signals.logp_rivals, -1)
  chance_BRM = jax.lax.stop_gradient(jax.nn.softmax(logp_BRM, -1))
  contrast_BRM = jax.nn.softplus(signals.logp_BR[..., None] - logp_BRM)
  # an entry that is y itself has no chance, and so large a contrast that 0 times it is kept away
  contrast_BRM = jnp.where(logp_BRM > 0.5 * NO_RIVAL, contrast_BRM, 0.0)
  is_rejected_BR = signals.gap_BR < -threshold
  return jnp.where(is_rejected_BR, jnp.sum(chance_BRM * contrast_BRM, -1), 0.0)


def contrast(signals: Signals, batch: TrainBatch) -> jax.Array:
  """Weighs log pi by the credit c of the token (CRAFT, arXiv 2606.29476, pillar 1).

  As printed, and with two-valued rewards, c opposes the policy gradient: see `cti.py`.
  """
  return -batch.credit_BR * signals.logp_BR


TOKEN_SIGNALS = {
  "none": Part(None),
  "divergence": Part(divergence, reads=(DIVERGENCE,)),
  "sampled_token": Part(sampled_token, reads=sampled_token_reads),
  "return_to_go": Part(return_to_go, reads=(TEACHER_LOGP,)),
  "sequence": Part(sequence, reads=(TEACHER_LOGP,)),
  "gated": Part(gated, reads=(TEACHER_LOGP,)),
  "weighted_k3": Part(weighted_k3, reads=(TEACHER_LOGP,)),
  "likelier": Part(likelier, reads=(TEACHER_LOGP, RIVALS)),
  "contrast": Part(contrast, reads=(CREDIT,)),
}
