"""Teacher weights: which weights re-score the policy's responses.

An entry of TEACHER_WEIGHTS makes the record that says so. A teacher with weights of its own follows
the policy by a schedule: after the updates of each generation batch

  teacher <- (1 - rho) teacher + rho policy,

with one scalar rho a batch that the host decides (`control.py`). rho = 0 leaves the teacher as it
is, rho = 1 makes it a copy. The program is the same for all schedules.

Source: arXiv 2601.20802, section 3 (moving average, trust region); OPSD, arXiv 2601.18734 (frozen);
`schedules.py` names those of the other schedules.
"""

from collections.abc import Callable
from typing import NamedTuple

from sdpo_jax import ranges
from sdpo_jax.objectives.control import Controller
from sdpo_jax.objectives.schedules import Gated, GateSettings, constant, periodic


class Remote(NamedTuple):
  """Where a teacher lives that this run has no weights of."""

  url: str
  model: str  # its name there; "": the one that is served
  timeout_s: float  # that it may be silent, a restart included


class TeacherWeights(NamedTuple):
  """How the teacher's weights follow the policy's."""

  keep: bool  # a second tree of weights travels with the train state
  # Makes what decides rho; None: there are no such weights, or they anchor a trust region.
  controller: Callable[[], Controller] | None = None
  # rho may lie between 0 and 1: a step of 1 % of a small difference vanishes in bfloat16
  in_float32: bool = False
  mix: float | None = None  # the live policy's share in the teacher's logits; None: no trust region
  remote: Remote | None = None  # who is asked instead; None: the teacher lives here


def none() -> TeacherWeights:
  """Has no teacher at all."""
  return TeacherWeights(keep=False)


def live() -> TeacherWeights:
  """Teaches with the policy's own weights of this very step."""
  return TeacherWeights(keep=False)


def ema(*, rate: float = 0.05) -> TeacherWeights:
  """Moves the teacher once per generation batch: (1 - rate) teacher + rate policy."""
  return _moving(_checked(rate))


def lag_matched_ema(*, period: int = 50) -> TeacherWeights:
  """Moves the teacher as `ema` does, lagging as much as a copy every `period` batches.

  Before a batch, such a copy is (period - 1) / 2 batches old on average, and a moving average
  (1 - rate) / rate; so rate = 2 / (period + 1).
  """
  return _moving(2.0 / (_checked_period(period) + 1))


def every(*, period: int = 50) -> TeacherWeights:
  """Copies the policy after every `period`-th generation batch (arXiv 2606.03532)."""
  _checked_period(period)
  return TeacherWeights(keep=True, controller=lambda: periodic(period, 1.0))


def restart(
  *, period: int = 10, share: float = 1.0, match_rate: float | None = None
) -> TeacherWeights:
  """Moves the teacher after every `period`-th batch and freezes it in between (StableSDPO).

  share: of its way to the policy.
  match_rate: takes the share from a moving average of this rate, 1 - (1 - rate)^period, which would
    move a teacher as far to a policy that stands still. `share` is then not read, and stays 1.
  """
  _checked_period(period)
  ranges.check("method.teacher_weights.share", share)
  ranges.check("method.teacher_weights.match_rate", match_rate)
  if match_rate is not None and share != 1:
    raise ValueError(
      f"method.teacher_weights.share={share!r} would not be read: "
      f"match_rate={match_rate!r} decides the share; set one of the two"
    )
  moves_by = share if match_rate is None else 1.0 - (1.0 - match_rate) ** period
  return TeacherWeights(
    keep=True, controller=lambda: periodic(period, moves_by), in_float32=moves_by != 1
  )


def gated(
  *,
  check_every: int = 5,
  min_gap: int = 30,
  window: int = 5,
  reward_margin: float = 0.05,
  max_tail: float = 3.2,
) -> TeacherWeights:
  """Copies the policy when rewards have risen and no response runs away (CGTR).

  check_every: batches from one look at the gates to the next.
  min_gap: batches that a teacher teaches at least.
  window: batches over which reward and lengths are taken.
  reward_margin: by which the mean reward has to exceed that of the last refresh.
  max_tail: the ratio of the longest response to the mean one that closes the gate.
  """
  settings = GateSettings(check_every, min_gap, window, reward_margin, max_tail)
  for name, value in settings._asdict().items():
    ranges.check(f"method.teacher_weights.{name}", value)
  return TeacherWeights(keep=True, controller=lambda: Gated(settings))


def trust_region(*, rate: float = 0.05) -> TeacherWeights:
  """Mixes logits on the teacher's prompt: (1 - rate) initial weights + rate live policy."""
  return TeacherWeights(keep=True, mix=_checked(rate))


def frozen() -> TeacherWeights:
  """Teaches with the weights that the run started from."""
  return TeacherWeights(keep=True, controller=lambda: constant(0.0))


def remote(*, url: str = "", model: str = "", timeout_s: float = 300.0) -> TeacherWeights:
  """Asks a teacher on another machine, `python -m sdpo_jax.serve` (remote_teacher.py).

  Needs the token signal `divergence` with a top_k: the teacher is asked for its log-probabilities
  at the policy's K likeliest tokens and at the sampled one, K + 1 numbers a token. K is top_k.

  Staleness: which K tokens these are is found once a generation batch, before its first update, so
  in the last one the choice is updates_per_batch - 1 updates old. The policy's log-probabilities
  are today's in every update, over the same K tokens and one bucket for the rest. Whichever the K
  tokens are, the bucketed divergence never exceeds the full one; an old choice sees less of it.

  The teacher has to have the policy's tokenizer. A resumed run repeats itself as far as the server
  does.
  """
  settings = Remote(url.rstrip("/"), model, timeout_s)
  ranges.check("method.teacher_weights.timeout_s", timeout_s)
  return TeacherWeights(keep=False, remote=settings)


def _moving(rate: float) -> TeacherWeights:
  return TeacherWeights(keep=True, controller=lambda: constant(rate), in_float32=0 < rate < 1)


def _checked(rate: float) -> float:
  ranges.check("method.teacher_weights.rate", rate)
  return rate


def _checked_period(period: int) -> int:
  ranges.check("method.teacher_weights.period", period)
  return period


TEACHER_WEIGHTS = {
  "none": none,
  "live": live,
  "ema": ema,
  "lag_matched_ema": lag_matched_ema,
  "every": every,
  "restart": restart,
  "gated": gated,
  "trust_region": trust_region,
  "frozen": frozen,
  "remote": remote,
}
