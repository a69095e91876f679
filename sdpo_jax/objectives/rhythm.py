"""Rhythm: where the teacher grows surer than the policy does, a success counts for more.

The credit of DRIFT with its gate, arXiv 2606.30345, section 3.3. Of a response with a reading, on
its tokens t (H an entropy, S the policy, T the teacher, W a window of tokens):

  bonus    b = min(e^(tau max(log pi - log q - mu, 0)), bonus_most) - 1
  drop     Drop_S(t) = max(mean H_S over t-W..t-1  -  mean H_S over t+1..t+W, 0); likewise Drop_T
  anchor   D = max(Drop_T - Drop_S, 0) max(H_S - H_T, 0);  z = (D - mean D) / std D
  gate     m = 1 + strength * 2 max(sigmoid(steepness z) - 1/2, 0)
           m' = min(m / mean m, most);  gate = max((m' - 1) / (most - 1), 0)
  factor   M = 1 + gate b

The advantage is multiplied by M >= 1, so its sign stays. Means and the (population) standard
deviation are those of the response, so that no cut of the batch changes them.

The paper prints none of the settings. Decided here: their values; windows are cut to the response,
and an empty one gives Drop = 0; std D = 0 gives gate 0. Only tokens that count make up a window.
The paper's lower bound on m' is left out: below 1 the gate is 0 with it or without it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.signals import TEACHER_ENTROPY, TEACHER_LOGP, Signals, mean_per_response
from sdpo_jax.records import TrainBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rhythm:
  """The settings, named as at the top of this file.

  mu is in nats, window in tokens. A factor lies between 1 and bonus_most.
  """

  mu: float = 0.1
  tau: float = 1.0
  bonus_most: float = 1.5
  window: int = 8
  steepness: float = 1.0
  strength: float = 1.0
  most: float = 2.0

  reads = (TEACHER_LOGP, TEACHER_ENTROPY)

  @property
  def is_idle(self) -> bool:
    """Tells that every factor is 1."""
    return 0 in (self.tau, self.steepness, self.strength) or self.bonus_most == 1

  def __call__(self, signals: tuple[Signals, ...], batch: TrainBatch) -> jax.Array:
    """Returns M A, [B, R]."""
    return batch.advantage_BR * self.factor(signals[0], batch.weight_BR)

  def factor(self, signals: Signals, weight_BR: jax.Array) -> jax.Array:
    """Returns M of each token."""
    counts_BR = (weight_BR > 0).astype(jnp.float32)
    doubt_BR = jnp.maximum(-signals.gap_BR - self.mu, 0.0)
    bonus_BR = jnp.exp(jnp.minimum(self.tau * doubt_BR, math.log(self.bonus_most))) - 1.0
    return 1.0 + self._gate(signals.entropy_BR, signals.entropy_teacher_BR, counts_BR) * bonus_BR

  def _gate(self, policy_BR, teacher_BR, counts_BR) -> jax.Array:
    """The gate of each token, from both entropies."""
    earlier_BR = drop(teacher_BR, counts_BR, self.window) - drop(policy_BR, counts_BR, self.window)
    anchor_BR = jnp.maximum(earlier_BR, 0.0) * jnp.maximum(policy_BR - teacher_BR, 0.0)
    from_mean_BR = anchor_BR - mean_per_response(anchor_BR, counts_BR)
    std_B1 = jnp.sqrt(mean_per_response(from_mean_BR**2, counts_BR))
    z_BR = jnp.where(std_B1 > 0, from_mean_BR / jnp.where(std_B1 > 0, std_B1, 1.0), 0.0)
    raised_BR = jnp.maximum(jax.nn.sigmoid(self.steepness * z_BR) - 0.5, 0.0)
    factor_BR = 1.0 + self.strength * 2.0 * raised_BR
    # no mean of a response is below 1; that of an empty one is 0
    factor_BR = factor_BR / jnp.maximum(mean_per_response(factor_BR, counts_BR), 1.0)
    return jnp.clip((factor_BR - 1.0) / (self.most - 1.0), 0.0, 1.0)


def drop(entropy_BR: jax.Array, counts_BR: jax.Array, window: int) -> jax.Array:
  """Returns by how much the mean entropy falls from the window before a token to that behind it.

  At least 0, and 0 where a window holds no token that counts. counts_BR: 1 or 0.
  """
  past_BR, future_BR = _windows(entropy_BR * counts_BR, window)
  past_count_BR, future_count_BR = _windows(counts_BR, window)
  has_both_BR = (past_count_BR > 0) & (future_count_BR > 0)
  past_BR = past_BR / jnp.maximum(past_count_BR, 1.0)
  future_BR = future_BR / jnp.maximum(future_count_BR, 1.0)
  return jnp.where(has_both_BR, jnp.maximum(past_BR - future_BR, 0.0), 0.0)


def _windows(x_BR: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
  """The sums over the `window` tokens before each token, and over those behind it."""
  padded_BR = jnp.pad(x_BR, ((0, 0), (window, window)))
  sums_BR = jax.lax.reduce_window(padded_BR, 0.0, jax.lax.add, (1, window), (1, 1), "VALID")
  length = x_BR.shape[-1]
  return sums_BR[:, :length], sums_BR[:, window + 1 :]
