"""Reference KL: what a policy pays for leaving the weights that its run started from. Device code.

With r = log pi(y) - log pi_ref(y) of a sampled token, y ~ pi, in nats:

  k1         r                        mean KL(pi || ref); its gradient has mean 0: a control
  k2         r^2 / 2                  mean E[r^2] / 2; the gradient's mean is that of KL(pi || ref)
  k3         e^-r - 1 + r             mean KL(pi || ref), never below 0; the gradient's mean is that
                                      of KL(ref || pi)
  polarised  k1 where c > threshold, -k1 where c < -threshold, else k3 (CRAFT, arXiv 2606.29476,
             pillar 3): it resists what the credit c asks for, in either direction

Means are those over the policy's own samples. The names are those of Schulman's note on
approximating KL; that a loss needs the mean of the gradient and not of the value is shown in
tests/test_reference_kl.py.

log pi_ref is found once a generation batch (`TrainBatch.logp_ref_BR`). It has no gradient. r is
held within +-20 before e^-r is taken, and the estimate then within +-clamp: beyond either a token
has no gradient. SDAR's released loop does so for k3, with a clamp of 10.
"""

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.cti import CREDIT
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.records import TrainBatch

LARGEST_RATIO = 20.0  # nats


class ReferenceKl(NamedTuple):
  """An estimator, and how much it counts."""

  estimate: Callable  # (log_ratio_BR, batch) -> nats a token
  coefficient: float | None  # in the loss; None: the method's balance decides
  clamp: float | None
  reads: tuple[str, ...] = ()

  def __call__(self, signals: Signals, batch: TrainBatch) -> jax.Array:
    """Returns the penalty of each token in nats, without the coefficient."""
    log_ratio_BR = signals.logp_BR - batch.logp_ref_BR
    kl_BR = self.estimate(jnp.clip(log_ratio_BR, -LARGEST_RATIO, LARGEST_RATIO), batch)
    return kl_BR if self.clamp is None else jnp.clip(kl_BR, -self.clamp, self.clamp)


def none() -> None:
  """Lets the policy go wherever it is led."""


def k1(*, coefficient: float | None = 0.01, clamp: float | None = 10.0) -> ReferenceKl:
  """Takes the log-ratio itself."""
  return ReferenceKl(_k1, coefficient, clamp)


def k2(*, coefficient: float | None = 0.01, clamp: float | None = 10.0) -> ReferenceKl:
  """Takes half of the squared log-ratio."""
  return ReferenceKl(_k2, coefficient, clamp)


def k3(*, coefficient: float | None = 0.01, clamp: float | None = 10.0) -> ReferenceKl:
  """Takes the estimate that is never below 0."""
  return ReferenceKl(_k3, coefficient, clamp)


def polarised(
  *,
  coefficient: float | None = 0.01,
  clamp: float | None = 10.0,
  threshold: float = 0.0,
  swap: bool = False,
) -> ReferenceKl:
  """Takes k1 against the sign of the credit c, and k3 where c is within +-threshold.

  swap: exchanges k1 and -k1 (the paper's falsification run A7).
  """

  def estimate(log_ratio_BR, batch: TrainBatch) -> jax.Array:
    credit_BR = -batch.credit_BR if swap else batch.credit_BR
    signed_BR = jnp.where(credit_BR > threshold, log_ratio_BR, -log_ratio_BR)
    is_strong_BR = jnp.abs(credit_BR) > threshold
    return jnp.where(is_strong_BR, signed_BR, _k3(log_ratio_BR, batch))

  return ReferenceKl(estimate, coefficient, clamp, reads=(CREDIT,))


def _k1(log_ratio_BR, batch: TrainBatch):
  return log_ratio_BR


def _k2(log_ratio_BR, batch: TrainBatch):
  return 0.5 * jnp.square(log_ratio_BR)


def _k3(log_ratio_BR, batch: TrainBatch):
  return jnp.expm1(-log_ratio_BR) + log_ratio_BR


REFERENCE_KLS = {"none": none, "k1": k1, "k2": k2, "k3": k3, "polarised": polarised}
