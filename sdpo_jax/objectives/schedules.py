"""Schedules: when, and how far, a teacher's weights follow the policy's. Host code.

Each is a controller (`control.py`) of one scalar a batch, rho in
teacher <- (1 - rho) teacher + rho policy. rho is applied after the updates of its batch, and only
if their last gradient was finite.

Sources: restart-and-freeze, arXiv 2607.01763, section 3.1; the collapse-gated refresh (CGTR), arXiv
2606.03532, section 4 and appendix C.
"""

import math
from typing import Any, NamedTuple

from sdpo_jax.objectives.control import Facts, Ramp, Scheduled


def constant(rate: float) -> Scheduled:
  """Returns the schedule of a moving average; at rate 0 the teacher is frozen."""
  return Scheduled(Ramp(rate, rate, 0))


class _Periodic(NamedTuple):
  """`share` in every `period`-th step, and 0 in between."""

  period: int
  share: float

  def at(self, step: int) -> float:
    return 0.0 if step % self.period else self.share


def periodic(period: int, share: float) -> Scheduled:
  """Returns a schedule that moves the teacher by a share after every `period`-th batch."""
  return Scheduled(_Periodic(period, share))


class GateSettings(NamedTuple):
  """The settings of `Gated`; `teacher_weights.gated` explains them."""

  check_every: int
  min_gap: int
  window: int
  reward_margin: float
  max_tail: float


class _Batch(NamedTuple):
  """What a window keeps of one generation batch."""

  reward: float  # summed over its judged responses
  responses: int
  longest: int  # tokens
  tokens: int  # of all judged responses


class Gated:
  """Copies the policy when three gates are open, at every `check_every`-th batch.

    isolation  min_gap batches have passed since the last refresh, or since the start
    reward     the window's mean reward is above that at the last refresh by more than the margin
    tail       the longest response of the window is less than max_tail times the mean one

  Decided here, where the paper is silent: until the first refresh the reward is compared with the
  mean of the first full window. The length is that of every judged response, not of batch means. A
  window that is not full closes the last two gates. A refresh that could not be made, since the
  gradient was not finite, does not count: the next check may make it.

  All that it reads are facts of judged groups. Every process has all groups of a batch, in the same
  order, and sums are rounded once (fsum): so all processes decide alike.
  """

  def __init__(self, settings: GateSettings):
    self.settings = settings
    self._last = 0  # the step of the last refresh
    self._reference: float | None = None  # the mean reward that has to be beaten
    self._window: list[_Batch] = []
    self._pending: tuple[int, float] | None = None  # a refresh that this batch's step is to make

  def begin(self, facts: Facts) -> tuple[float, dict[str, float]]:
    batch = _Batch(
      math.fsum(facts.rewards),
      len(facts.rewards),
      max(facts.lengths, default=0),
      sum(facts.lengths),
    )
    self._window = [*self._window, batch][-self.settings.window :]
    reward, tail = self._means()
    if self._reference is None:
      self._reference = reward
    gates = self._gates(facts.step, reward, tail)
    is_checked = facts.step % self.settings.check_every == 0
    self._pending = (facts.step, reward) if is_checked and all(gates.values()) else None
    numbers = {"reward": reward, "reward_reference": self._reference, "tail": tail}
    metrics = {f"control/gate_{name}": float(is_open) for name, is_open in gates.items()}
    metrics |= {f"control/window_{k}": x for k, x in numbers.items() if x is not None}
    return (0.0 if self._pending is None else 1.0), metrics

  def end(self, metrics: dict[str, Any], *, applied: bool) -> None:
    if self._pending is not None and applied:
      self._last, self._reference = self._pending
    self._pending = None

  def state(self) -> dict:
    window = [list(batch) for batch in self._window]
    return {"last": self._last, "reference": self._reference, "window": window}

  def restore(self, state: dict) -> None:
    self._last, self._reference = state["last"], state["reference"]
    self._window = [_Batch(*numbers) for numbers in state["window"]]

  def _means(self) -> tuple[float | None, float | None]:
    """Returns the mean reward and the length tail of a full window; None where there is none."""
    responses = sum(batch.responses for batch in self._window)
    tokens = sum(batch.tokens for batch in self._window)
    if len(self._window) < self.settings.window or not responses:
      return None, None
    reward = math.fsum(batch.reward for batch in self._window) / responses
    longest = max(batch.longest for batch in self._window)
    return reward, longest * responses / tokens if tokens else None

  def _gates(self, step: int, reward: float | None, tail: float | None) -> dict[str, bool]:
    is_better, is_short = False, False
    if reward is not None and self._reference is not None:
      is_better = reward > self._reference + self.settings.reward_margin
    if tail is not None:
      is_short = tail < self.settings.max_tail
    isolated = step - self._last >= self.settings.min_gap
    return {"isolation": isolated, "reward": is_better, "tail": is_short}
