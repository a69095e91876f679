"""Credits: the advantage of each token, made from that of its response and the teacher's readings.

A credit stands between the group's advantage A and the surrogate, which reads it in place of A. It
is detached: the teacher says where in a response the reward was earned, and the reward alone says
what is learned. So the loss has no divergence, and the teacher is read for log-probabilities.

With the gap d = log q(y) - log pi(y) of a token, in nats:

  rlsd     A ((1 - share) + share clip(e^(sign(A) d), 1 - epsilon, 1 + epsilon)): a success is
           credited to the tokens that the teacher likes better, a failure to those that it does not
  rlrt     the same with -d: a success is credited to what the teacher would not have said
  anti_sd  A - share phi(d), phi(d) = (softplus(d) - ln 2) / 2, while the teacher is unsure enough
  ocsd     A (1 + share sign(A) tanh(e / 2)), e the difference between two readings of a turn, of
           which one shows what the world says later
  cscr     A times a weight that is lower where two readings, one of which calls all of the response
           right and one wrong, differ from the policy

All but `anti_sd` multiply A by something that is above 0 for some token of the response and below 0
for none: they keep its sign, and give 0 where it is 0. Where the teacher has no reading of a
response, its tokens keep A (`advantages`).

A part of this axis is made from its settings and called as credit(signals, batch) -> advantage_BR,
with the signals of the plain reading first. `reads` are the costly signals that it needs, as of a
`Part`; `further_count` is the number of further readings, 0 where it is absent. `is_idle` tells
that its settings leave every advantage as it is: then no teacher is read.
"""

import statistics
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.control import Controller, Facts, Ramp, Scheduled, check_ramp
from sdpo_jax.objectives.rhythm import Rhythm
from sdpo_jax.objectives.signals import TEACHER_ENTROPY, TEACHER_LOGP, Signals
from sdpo_jax.records import TrainBatch

# e to this power is a finite number, and 0 times it is 0
LARGEST_GAP = 20.0  # nats


class Credit(Protocol):
  """What a part of this axis is."""

  reads: tuple[str, ...]

  @property
  def is_idle(self) -> bool:
    """Tells that the settings change no advantage."""

  def __call__(self, signals: tuple[Signals, ...], batch: TrainBatch) -> jax.Array:
    """Returns advantage_BR."""


def none() -> None:
  """Gives every token the advantage of its response."""


def advantages(credit: Credit | None, signals: tuple[Signals, ...], batch: TrainBatch) -> jax.Array:
  """Returns the detached advantage of each token, [B, R], or [B, 1] without a credit."""
  advantage_BR = batch.advantage_BR
  if credit is None:
    return advantage_BR
  has_reading_BR = batch.readings[0].has_BR
  credited_BR = jnp.where(has_reading_BR, credit(signals, batch), advantage_BR)
  return jax.lax.stop_gradient(credited_BR)


def weighted(advantage_BR, log_weight_BR, share, epsilon: float) -> jax.Array:
  """Returns A ((1 - share) + share clip(e^log_weight, 1 - epsilon, 1 + epsilon)).

  A share of 0 gives A bit for bit.
  """
  weight_BR = jnp.clip(jnp.exp(log_weight_BR), 1.0 - epsilon, 1.0 + epsilon)
  return advantage_BR * ((1.0 - share) + share * weight_BR)


def _gap_towards(advantage_BR, signals: Signals) -> jax.Array:
  """Returns sign(A) times the gap: positive where the teacher agrees with the reward."""
  return jnp.sign(advantage_BR) * jnp.clip(signals.gap_BR, -LARGEST_GAP, LARGEST_GAP)


class Rlsd:
  """Credits an outcome to the tokens whose gap agrees with it (RLSD, arXiv 2604.03128).

  share: of the weight in the first step, lambda in the paper; it moves linearly to `share_end`
    within `share_steps` steps, and stays there.
  epsilon: the weight is held within 1 - epsilon and 1 + epsilon.
  negative_only: responses whose advantage is above 0 keep it.

  Raises ValueError for a share that would not be read.
  """

  reads = (TEACHER_LOGP,)

  def __init__(
    self,
    *,
    share: float = 0.5,
    share_end: float = 0.0,
    share_steps: int = 50,
    epsilon: float = 0.2,
    negative_only: bool = False,
  ):
    check_ramp("method.credit", share, share_end, share_steps)
    self._ramp = Ramp(share, share_end, share_steps)
    self._epsilon, self._negative_only = epsilon, negative_only

  @property
  def is_idle(self) -> bool:
    return self._epsilon == 0 or self._ramp.start == self._ramp.end == 0

  def controller(self) -> Controller:
    return Scheduled(self._ramp)

  def __call__(self, signals: tuple[Signals, ...], batch: TrainBatch) -> jax.Array:
    advantage_BR = batch.advantage_BR
    towards_BR = _gap_towards(advantage_BR, signals[0])
    credited_BR = weighted(advantage_BR, towards_BR, batch.control["credit"], self._epsilon)
    if self._negative_only:
      return jnp.where(advantage_BR > 0, advantage_BR, credited_BR)
    return credited_BR


class Rlrt:
  """Credits a success to what the teacher would not have said (RLRT, arXiv 2605.10781, eq. 6-7).

  Failures keep their advantage because the teacher context shows them nothing (`only_successes`).

  share: of the weight, lambda in the paper.
  epsilon: as for `Rlsd`. The paper has 1 for base models, .5 for instruction-tuned ones and .2 for
    thinking ones.
  """

  reads = (TEACHER_LOGP,)

  def __init__(self, *, share: float = 0.5, epsilon: float = 1.0):
    self._share, self._epsilon = share, epsilon

  @property
  def is_idle(self) -> bool:
    return 0 in (self._share, self._epsilon)

  def __call__(self, signals: tuple[Signals, ...], batch: TrainBatch) -> jax.Array:
    advantage_BR = batch.advantage_BR
    away_BR = -_gap_towards(advantage_BR, signals[0])
    return weighted(advantage_BR, away_BR, self._share, self._epsilon)


class AntiSd:
  """Takes from the advantage what brings the policy closer to its teacher (Anti-SD).

  Source: arXiv 2605.11609, section 3.2 and algorithm 1. It is not multiplicative: it may turn the
  sign of A, and is there where A is 0. phi is the weight that makes -phi log pi the policy gradient
  of the Jensen-Shannon divergence (OPD+, arXiv 2606.01039): this is GRPO minus so much of it.

  share: of phi, lambda in the paper, while the gate is open.
  warmup_steps, entropy_floor: of the gate, see `EntropyGate`.
  """

  reads = (TEACHER_LOGP, TEACHER_ENTROPY)

  def __init__(self, *, share: float = 0.5, warmup_steps: int = 5, entropy_floor: float = 0.93):
    self._share, self._warmup_steps, self._floor = share, warmup_steps, entropy_floor

  @property
  def is_idle(self) -> bool:
    return self._share == 0

  def controller(self) -> Controller:
    return EntropyGate(self._share, self._warmup_steps, self._floor)

  def __call__(self, signals: tuple[Signals, ...], batch: TrainBatch) -> jax.Array:
    # the log of OPD+'s (1 + q / pi) / 2, without the overflow of q / pi
    phi_BR = 0.5 * (jax.nn.softplus(signals[0].gap_BR) - jnp.log(2.0))
    return batch.advantage_BR - batch.control["credit"] * phi_BR


class EntropyGate:
  """Holds a share back while the teacher is surer than it was at the start of the run.

  h is the median of the teacher's entropy over the tokens of a batch that it has read. The share is
  0 in the first `warmup_steps` batches, whose median h is the reference. Then a batch with h below
  `floor` of the reference closes the gate, one with h at the reference opens it again, and between
  the two it stays. Decided here: the gate begins open, a batch's h is used in the next one, and a
  batch that no teacher has read, or whose gradient was not finite, says nothing.
  """

  MEDIAN = "train/teacher_entropy_p50"  # of objectives/loss.py

  def __init__(self, share: float, warmup_steps: int, floor: float):
    self._share, self._warmup_steps, self._floor = share, warmup_steps, floor
    self._is_open = True
    self._medians: list[float] = []  # of the first batches, warmup_steps at most

  def begin(self, facts: Facts) -> tuple[float, dict[str, float]]:
    if len(self._medians) < self._warmup_steps:
      return 0.0, {"control/credit_gate": float(self._is_open)}
    reasons = {
      "control/credit_gate": float(self._is_open),
      "control/credit_entropy_reference": statistics.median(self._medians),
    }
    return self._share * self._is_open, reasons

  def end(self, metrics: dict[str, Any], *, applied: bool) -> None:
    h = metrics[self.MEDIAN].quantile(0.5)
    if h is None or not applied:
      return
    if len(self._medians) < self._warmup_steps:
      self._medians.append(h)
      return
    reference = statistics.median(self._medians)
    if h >= reference:
      self._is_open = True
    elif h < self._floor * reference:
      self._is_open = False

  def state(self) -> dict:
    return {"is_open": self._is_open, "medians": list(self._medians)}

  def restore(self, state: dict) -> None:
    self._is_open, self._medians = state["is_open"], list(state["medians"])


class Cscr:
  """Lowers the weight of tokens that an opinion on the response moves (CSCR, arXiv 2607.27888).

  Sections 2 and 3, eq. 14-16. Both readings are of every response, whatever its outcome: the plain
  one calls it right, the further one wrong. s is the larger distance of the two from the policy,
  and a token's weight is 1 where s < threshold, else 1 - depth (1 - e^(-rate (s - threshold))).
  Weights are divided by their mean over the response, so they lie within 1 - depth and
  1 / (1 - depth).

  threshold: nats. rate: 1 / nats. depth: below 1; the paper's runs collapse from .5 on.
  """

  reads = (TEACHER_LOGP,)
  further_count = 1

  def __init__(self, *, threshold: float = 0.05, rate: float = 10.0, depth: float = 0.2):
    self._threshold, self._rate, self._depth = threshold, rate, depth

  @property
  def is_idle(self) -> bool:
    return 0 in (self._depth, self._rate)

  def __call__(self, signals: tuple[Signals, ...], batch: TrainBatch) -> jax.Array:
    right, wrong = signals
    s_BR = jnp.maximum(jnp.abs(right.gap_BR), jnp.abs(wrong.gap_BR))
    beyond_BR = jnp.maximum(s_BR - self._threshold, 0.0)
    weight_BR = 1.0 + self._depth * jnp.expm1(-self._rate * beyond_BR)
    counts_BR = batch.weight_BR > 0
    tokens_B1 = jnp.maximum(jnp.sum(counts_BR, -1, keepdims=True), 1)
    mean_B1 = jnp.sum(weight_BR * counts_BR, -1, keepdims=True) / tokens_B1
    # a response without tokens has no mean
    return batch.advantage_BR * weight_BR / jnp.where(mean_B1 > 0, mean_B1, 1.0)


class Ocsd:
  """Credits an outcome to the turns that later observations speak for (OCSD, arXiv 2608.04788).

  Eq. 6-11: A (1 + share sign(A) c), c = tanh((log q_F - log q_A) / 2), with q_F of the plain
  reading, which shows what the world said later, and q_A of the further one, which hides it. Turns
  without readings keep A (`later_observations` chooses which have them).
  """

  reads = (TEACHER_LOGP,)
  further_count = 1

  def __init__(self, *, share: float = 0.5):
    self._share = share

  @property
  def is_idle(self) -> bool:
    return self._share == 0

  def __call__(self, signals: tuple[Signals, ...], batch: TrainBatch) -> jax.Array:
    shown, hidden = signals
    c_BR = jnp.tanh(0.5 * (shown.logp_teacher_BR - hidden.logp_teacher_BR))
    return batch.advantage_BR * (1.0 + self._share * jnp.sign(batch.advantage_BR) * c_BR)


CREDITS = {
  "none": none,
  "rlsd": Rlsd,
  "rlrt": Rlrt,
  "anti_sd": AntiSd,
  "cscr": Cscr,
  "ocsd": Ocsd,
  "rhythm": Rhythm,
}
