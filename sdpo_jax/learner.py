"""From the settings of method, optimizer and training to what training compiles."""

import functools
from typing import Any, NamedTuple

from sdpo_jax import alternatives
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.objectives import build
from sdpo_jax.objectives.loss import Objective, make_objective
from sdpo_jax.objectives.notes import readings
from sdpo_jax.objectives.teacher_weights import TeacherWeights
from sdpo_jax.optimizer import make_optimizer
from sdpo_jax.train_step import make_score, make_signals, make_train_step


class Learner(NamedTuple):
  """A method as what training compiles. step(state, batch, frozen), score(state, batch, frozen): not jitted yet."""

  objective: Objective
  parts: dict
  teacher: TeacherWeights
  tx: Any
  step: Any
  score: Any
  # several updates a batch: log-probabilities from before the first one are needed
  score_first: bool
  explore: Any  # finds the alternatives of failed rollouts; None: the method asks for none
  counterfactual: Any  # what the teacher reads of them, for `pack`; None likewise
  readings: int  # further ones by the teacher of each batch; 0 likewise


def learner(c, model: ModelConfig, join=None) -> Learner:
  """From the settings of method, optimiser and training."""
  method = c.method.to_dict()
  objective, parts = make_objective(method), build.build_method(method)
  teacher, tx = parts["teacher_weights"](), make_optimizer(**c.optimizer)
  signals = make_signals(
    model,
    objective,
    mix=teacher.mix,
    temperature=c.rollout.temperature,
    remat=c.model.remat,
    join=join,
    implementation=None if c.train.loss_implementation == "auto" else c.train.loss_implementation,
  )
  several = c.train.updates_per_batch > 1
  part, explore, told = parts["counterfactual"](), None, None
  if part is not None:
    shown = build.part_settings(method, "teacher_context")
    explore = functools.partial(
      alternatives.explore, part, success_threshold=shown["success_threshold"]
    )
    told = functools.partial(
      readings,
      part,
      parts["teacher_context"],
      **{key: shown[key] for key in ("success_threshold", "show_attempt", "templates")},
    )
  step = make_train_step(
    signals,
    objective,
    tx,
    teacher_move=teacher.move,
    updates=c.train.updates_per_batch,
    recompute_old=several,
  )
  return Learner(
    objective,
    parts,
    teacher,
    tx,
    step,
    make_score(signals),
    several,
    explore,
    told,
    part.readings if part else 0,
  )
