"""Teacher weights: which weights re-score the policy's responses.

An entry of TEACHER_WEIGHTS makes the record that says so. A teacher with weights of its own follows
the policy by a schedule: after the updates of each generation batch

  teacher <- (1 - rho) teacher + rho policy,

with one scalar rho a batch that the host decides (`control.py`). rho = 0 leaves the teacher as it
is, rho = 1 makes it a copy. The program is the same for all schedules.

Source: arXiv 2601.20802, section 3 (moving average, trust region); OPSD, arXiv 2601.18734 (frozen).
"""

from collections.abc import Callable
from typing import NamedTuple

from sdpo_jax import ranges
from sdpo_jax.objectives.control import Controller, Ramp, Scheduled


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
  _checked(rate)
  return TeacherWeights(
    keep=True, controller=lambda: _constant(rate), in_float32=rate not in (0, 1)
  )


def trust_region(*, rate: float = 0.05) -> TeacherWeights:
  """Mixes logits on the teacher's prompt: (1 - rate) initial weights + rate live policy."""
  return TeacherWeights(keep=True, mix=_checked(rate))


def frozen() -> TeacherWeights:
  """Teaches with the weights that the run started from."""
  return TeacherWeights(keep=True, controller=lambda: _constant(0.0))


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


def _constant(rate: float) -> Controller:
  return Scheduled(Ramp(rate, rate, 0))


def _checked(rate: float) -> float:
  ranges.check("method.teacher_weights.rate", rate)
  return rate


TEACHER_WEIGHTS = {
  "none": none,
  "live": live,
  "ema": ema,
  "trust_region": trust_region,
  "frozen": frozen,
  "remote": remote,
}
