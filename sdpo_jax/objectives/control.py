"""Numbers that the host decides for each generation batch, and that its program reads as inputs.

A share that falls over the run, a teacher that moves now and then, a term that is switched off when
the teacher grows too sure: each is one scalar of `TrainBatch.control`, under the name of its axis.
So a change of it compiles nothing.

A part that has such a scalar says how it comes about by `controller()`, which returns a
`Controller`. What a controller remembers is in the checkpoint. All of it follows from the run's
own batches, which every process knows, so that all processes decide alike.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

from sdpo_jax.records import Rollout, TrainBatch

# the axes of a method that may have a controller
CONTROLLED = ("teacher_weights", "teacher_logits", "credit", "balance")
# of the batch: 0 makes the step a trial that changes nothing
LEARN = "learn"


class Facts(NamedTuple):
  """What the host knows of a generation batch before its update. Failed judgements are left out."""

  step: int  # counted from 1
  rewards: tuple[float, ...]  # one a response
  lengths: tuple[int, ...]  # tokens, one a response


class Controller(Protocol):
  """Decides one scalar a batch."""

  def begin(self, facts: Facts) -> tuple[float, dict[str, float]]:
    """Returns the scalar of the batch, and metrics that say why."""

  def end(self, metrics: dict[str, Any], *, applied: bool) -> None:
    """Notes what the step said of the batch. applied: its last gradient was finite."""

  def state(self) -> dict:
    """Returns what has to be remembered, JSON-able; later changes do not show in it."""

  def restore(self, state: dict) -> None:
    """Goes on from a state."""


def check_ramp(axis: str, share: float, share_end: float, share_steps: int) -> None:
  """Raises ValueError for the settings of a ramp of which the first would not be read."""
  if share_steps == 0 and share != share_end:
    raise ValueError(
      f"{axis}.share={share!r} would not be read: with {axis}.share_steps=0 the share is "
      f"{axis}.share_end={share_end!r} from the first step on"
    )


class Curve(Protocol):
  """A number that depends on the step alone."""

  def at(self, step: int) -> float:
    """Returns the value in a step, counted from 1."""


class Ramp(NamedTuple):
  """A setting that moves linearly from its value in the first step to another one, and stays."""

  start: float
  end: float
  steps: int  # until it has arrived; 0: it is there from the first step on

  def at(self, step: int) -> float:
    """Returns the value in a step, counted from 1."""
    share = min(1.0, (step - 1) / self.steps) if self.steps else 1.0
    return self.start + (self.end - self.start) * share


class Scheduled:
  """A scalar that depends on the step alone."""

  def __init__(self, curve: Curve):
    self.curve = curve

  def begin(self, facts: Facts) -> tuple[float, dict[str, float]]:
    return self.curve.at(facts.step), {}

  def end(self, metrics: dict[str, Any], *, applied: bool) -> None:
    pass

  def state(self) -> dict:
    return {}

  def restore(self, state: dict) -> None:
    pass


class Control:
  """The controllers of a method."""

  def __init__(self, method: Any):
    self._controllers: dict[str, Controller] = {}
    for axis in CONTROLLED:
      make = getattr(getattr(method, axis), "controller", None)
      if make is not None:
        self._controllers[axis] = make()

  def begin(
    self, groups: list[list[Rollout]], step: int
  ) -> tuple[dict[str, np.float32], dict[str, float]]:
    """Returns the scalars of a judged batch, and metrics: `control/<axis>` and what explains it.

    step: of the run, counted from 1.
    """
    facts = facts_of(groups, step)
    scalars: dict[str, float] = {LEARN: 1.0}
    metrics: dict[str, float] = {}
    for axis, controller in self._controllers.items():
      scalars[axis], reasons = controller.begin(facts)
      metrics |= {f"control/{axis}": scalars[axis]} | reasons
    return {name: np.float32(value) for name, value in scalars.items()}, metrics

  def end(self, metrics: dict[str, Any], *, applied: bool) -> None:
    """Tells every controller what the step said."""
    for controller in self._controllers.values():
      controller.end(metrics, applied=applied)

  def names(self) -> list[str]:
    """Returns the names of the scalars that a batch has."""
    return [LEARN, *self._controllers]

  def state(self) -> dict:
    """Returns the state of every controller, by its axis."""
    return {axis: controller.state() for axis, controller in self._controllers.items()}

  def restore(self, state: dict) -> None:
    """Goes on from a state."""
    for axis, controller in self._controllers.items():
      controller.restore(state[axis])


def as_trial(batch: TrainBatch) -> TrainBatch:
  """Returns a batch whose step changes nothing, in the same program."""
  return batch._replace(control=batch.control | {LEARN: np.float32(0)})


def facts_of(groups: list[list[Rollout]], step: int) -> Facts:
  """Returns what is known of a batch of judged groups."""
  judged = [rollout for group in groups for rollout in group if rollout.is_judged]
  rewards = tuple(float(rollout.feedback.reward) for rollout in judged)
  return Facts(step, rewards, tuple(len(rollout.tokens) for rollout in judged))
