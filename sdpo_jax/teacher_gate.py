"""The gate against silent nothing: before the first update, a teacher must have something to teach.

A template that drops the context, feedback that is cut away, a teacher that sees the policy's own
prompt: such a run has a finite loss, and learns nothing, or something else. So every run whose
method reads a teacher makes two trials on its first batch that has something to show:

  as it is   the teacher must differ from the policy somewhere, and the gradient must not be zero
  emptied    with a teacher that reads the policy's own prompts, the gradient must be another one

A trial is the compiled step itself on arrays of the same shapes, with `control["learn"]` = 0: it
returns the state as it was, so the run computes what it would without the gate. It costs two
steps.

What is no failure: a batch without a context, or one whose credits have no advantage to act on.
Then the next batch is tested, and this one is trained. That a run has passed is in its checkpoint:
a policy that has collapsed onto its teacher since then ends no resumed run. The gate does not tell
whether what the teacher says is right. A teacher that is meant as an anchor is not tested.

Errors: RunError of one line that says what is missing, before the tested batch is trained.
"""

import logging
import sys
from typing import Any, Callable, NamedTuple

import numpy as np

from sdpo_jax import hosts
from sdpo_jax.data.batch import Packed, Packer
from sdpo_jax.errors import RunError
from sdpo_jax.objectives.advantage import zero
from sdpo_jax.objectives.build import Method
from sdpo_jax.records import Ratio, TrainBatch

# A mean |log q - log pi| below it is float32's rounding. bfloat16's is larger and passes; then the
# emptied trial, whose rounding is the same, tells.
ROUNDING_NATS = 1e-6
# A relative change below it is none. A credit that has almost faded away still changes more.
ROUNDING = 1e-5
# Batches that are tried and tell nothing, until the gate gives up.
MOST_TRIALS = 8
# How many batches have told nothing when it is said
SAID_AFTER = (1, 10, 100, 1000)

_SAME = "the gradient is the same where the teacher reads no context"
Trial = Callable[[Any, Packed], tuple[Any, dict[str, Ratio]]]


class Outcome(NamedTuple):
  """What a trial says. None: nothing was counted, or the method has no such thing."""

  gradient: float | None  # its norm; None: it is not finite
  loss: float
  gap: float | None  # the mean |log q - log pi|, nats a token
  credit: float | None  # the mean change of an advantage by the credit

  @classmethod
  def of(cls, metrics: dict[str, Ratio]) -> "Outcome":
    def mean(name: str) -> float | None:
      return metrics[name].mean if name in metrics else None

    return cls(
      mean("train/grad_norm"),
      metrics["train/loss"].mean,
      mean("train/teacher_gap_abs"),
      mean("train/credit_change"),
    )


class TeacherGate:
  """Tests the teacher of a run, once.

  passed: whether the run has been tested, or has nothing to test, as its checkpoint holds it.
  """

  def __init__(self, method: Method, packer: Packer, *, passed: bool = False):
    self._method, self._packer = method, packer
    has_nothing = not method.needs_teacher or getattr(method.teacher_context, "is_anchor", False)
    self.passed = passed or has_nothing
    self._trials = 0
    self._untested = 0  # batches
    self._reason = ""  # why the last of them told nothing

  def check(self, state, packed: Packed, trial: Trial, *, when: str):
    """Returns the state as it was, once the teacher of a batch has been tested, or could not be.

    trial(state, packed) returns the state as it was, and the metrics of a step that learns nothing.
    when: begins what is said of the batch, such as "step 3".
    Raises RunError where the teacher has nothing to teach.
    """
    if self.passed:
      return state
    reason = _why_untested(self._method, packed)
    if not reason:
      state, reason = self._try(state, packed, trial, when)
    if reason:
      self._postpone(reason, when)
    else:
      self.passed = True
    return state

  def end(self) -> None:
    """Says at the end of a run if its teacher was never tested."""
    if not self.passed and self._untested and hosts.leads():
      logging.warning(
        "the teacher was never tested, in %d batches: %s", self._untested, self._reason
      )

  def _try(self, state, packed: Packed, trial: Trial, when: str) -> tuple[Any, str]:
    """Returns the state as it was, and why the trials tell nothing; "": the teacher can teach."""
    self._trials += 1
    state, metrics = trial(state, packed)
    full = Outcome.of(metrics)
    if full.gradient is None:
      return state, "the gradient is not finite"
    emptied = self._packer.emptied(packed)
    if full.gap is not None and full.gap <= ROUNDING_NATS:
      cause = self._cause(packed, emptied)
      raise _refusal(when, f"the teacher equals the policy everywhere: {cause}")
    if full.credit == 0 and not _distilled(self._method, packed.batch).any():
      return state, "its credit changes no advantage"
    if full.gradient == 0:
      if not packed.batch.advantage_BR.any() and self._method.advantage.func is not zero:
        return state, "all advantages are 0, by which the method weighs responses"
      raise _refusal(
        when,
        f"the gradient is zero, though the teacher is {full.gap or 0:.2g} nats a token from the "
        "policy: a clip or a weight in config.method leaves no token any (token_signal, "
        "token_weight, surrogate)",
      )
    if self._is_silent(packed) or not _read_otherwise(packed, emptied):
      raise _refusal(when, f"{_SAME}: {self._cause(packed, emptied)}")
    state, metrics = trial(state, emptied)
    empty = Outcome.of(metrics)
    if max(_change(full.gradient, empty.gradient), _change(full.loss, empty.loss)) <= ROUNDING:
      raise _refusal(when, f"{_SAME}: {self._cause(packed, emptied)}")
    _report(packed, full, empty, when)
    return state, ""

  def _is_silent(self, packed: Packed) -> bool:
    """Tells whether no teacher's prompt shows anything of its context."""
    silences = self._packer.silences(packed)
    return bool(silences) and all(silences)

  def _cause(self, packed: Packed, emptied: Packed) -> str:
    """Returns what is wrong with the teacher's prompts, and what to change."""
    if self._is_silent(packed) and packed.metrics.get("data/teacher_shortened"):
      return (
        f"config.data.max_teacher_tokens={self._packer.settings.max_teacher_tokens} leaves no room "
        "for its context; raise it"
      )
    if self._is_silent(packed):
      return (
        "its prompts show nothing of the context; config.method.teacher_context.templates must "
        "keep {solution} and {feedback} in reprompt, and {text} in those two"
      )
    if not _read_otherwise(packed, emptied):
      return (
        "its prompts are the policy's own; config.method.teacher_context must show it something "
        "that the policy does not read"
      )
    return (
      "its prompts differ from the policy's, but not what it says of the responses; see "
      "config.method.teacher_weights and teacher_logits"
    )

  def _postpone(self, reason: str, when: str) -> None:
    """Says why a batch does not test the teacher, now and then; gives up after too many trials."""
    self._untested, self._reason = self._untested + 1, reason
    self.passed = gives_up = self._trials >= MOST_TRIALS
    if not hosts.leads() or not (gives_up or self._untested in SAID_AFTER):
      return
    which = "this batch" if self._untested == 1 else f"none of {self._untested} batches"
    cannot = "cannot" if self._untested == 1 else "could"
    then = f"given up after {self._trials} trials" if gives_up else "the next one is tried"
    logging.warning("%s: %s %s test the teacher: %s; %s", when, which, cannot, reason, then)


def _refusal(when: str, what: str) -> RunError:
  return RunError(f"{when}: {what}; nothing of this step was trained")


def _report(packed: Packed, full: Outcome, empty: Outcome, when: str) -> None:
  """Prints what the trials found, in one line."""
  if not hosts.leads():
    return
  gap = "" if full.gap is None else f", {full.gap:.2g} nats a token from the policy"
  print(
    f"{when}: the teacher reads {int(_has_reading(packed.batch).sum())} responses{gap}; emptying "
    f"its context changes the gradient's norm by {100 * _change(full.gradient, empty.gradient):.3g}"
    " %",
    file=sys.stderr,
  )


def _read_otherwise(packed: Packed, emptied: Packed) -> bool:
  """Tells whether any of the teacher's rows holds other tokens in one batch than in the other."""
  pairs = zip(packed.batch.readings, emptied.batch.readings, strict=True)
  return any(not np.array_equal(a.rows.token_CPT, b.rows.token_CPT) for a, b in pairs)


def _change(a: float, b: float | None) -> float:
  """Returns the difference of two numbers relative to the larger one."""
  if b is None:
    return 1.0
  return abs(a - b) / max(abs(a), abs(b), 1e-30)


def _why_untested(method: Method, packed: Packed) -> str:
  """Returns why nothing that the teacher says can change this batch's gradient; "" where it can."""
  batch = packed.batch
  has_reading_B = _has_reading(batch)
  if not has_reading_B.any():
    judged = [r for r, weight_R in zip(packed.rollouts, batch.weight_BR) if weight_R.any()]
    with_feedback = sum(bool(r.feedback.text) for r in judged)
    rewarded = sum(r.feedback.reward > 0 for r in judged)
    made_of = getattr(method.teacher_context, "made_of", "")
    return (
      f"no response has a context ({len(judged)} judged, {rewarded} with a reward, "
      f"{with_feedback} with feedback)" + (f", which is made of {made_of}" if made_of else "")
    )
  if _distilled(method, batch).any():
    is_off = batch.control.get("teacher_logits", 1.0) == 0
    return "its share of the teacher's logits is 0" if is_off else ""
  if method.credit is not None:
    if batch.control.get("credit", 1.0) == 0:
      return "its credit has a share of 0 in this step"
    if (has_reading_B & (batch.advantage_BR != 0).any(1)).any():
      return ""
    return (
      "no response with a context has an advantage, since the responses to a question all have the "
      "same reward; raise config.rollout.group, or begin with easier questions"
    )
  return "no response with a context is routed to it"


def _distilled(method: Method, batch: TrainBatch) -> np.ndarray:
  """Tells which responses the divergence acts on."""
  distils_B = _has_reading(batch) & (method.token_signal is not None)
  return distils_B & (batch.route_B > 0) if method.policy_share is None else distils_B


def _has_reading(batch: TrainBatch) -> np.ndarray:
  has_NBR = np.stack([reading.has_BR for reading in batch.readings])
  return (has_NBR.any(0) & (batch.weight_BR > 0)).any(1)
