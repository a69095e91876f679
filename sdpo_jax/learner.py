"""Makes of a configuration's method, optimizer and training settings what training compiles."""

import functools
from typing import Any, Callable, NamedTuple

from sdpo_jax.alternatives import Explorer
from sdpo_jax.config import response_tokens
from sdpo_jax.given_policy import make_recorded_signals
from sdpo_jax.given_teacher import make_candidates, make_given_signals
from sdpo_jax.hindsight import Reflector
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.objectives.build import Method, build_method
from sdpo_jax.objectives.notes import further_readings
from sdpo_jax.optimizer import make_optimizer
from sdpo_jax.rollout import Source
from sdpo_jax.train_step import make_reader, make_score, make_signals, make_train_step


class Learner(NamedTuple):
  """A method with its optimizer and its device functions, which are not jitted yet."""

  method: Method
  tx: Any  # optax.GradientTransformation
  step: Callable  # (state, batch, frozen) -> (state, metrics)
  score: Callable  # (state, batch, frozen) -> Signals
  # Several updates a batch need log-probabilities from before the first one, and a contrast needs
  # the teacher's.
  score_first: bool
  # (weights, batch) -> logp_BR: of the weights that the run started from; None: no part reads them
  read_reference: Callable | None
  # (state, batch, frozen) -> index_CXM: the tokens that a teacher elsewhere is asked about; None:
  # the teacher lives here
  candidates: Callable | None = None

  @property
  def further_readings(self) -> Callable | None:
    """For the packer: (group, i) -> the context and weight of each further reading."""
    if self.method.notes is None:
      return self.method.teacher_context.further if self.method.further_count else None
    return functools.partial(further_readings, self.method.notes, self.method.teacher_context)

  @property
  def further_count(self) -> int:
    """Further readings by the teacher of each batch."""
    return self.method.further_count


def make_learner(c, model: ModelConfig, join: Callable | None = None) -> Learner:
  """Builds the learner of a configuration. ValueError for a method or optimizer that cannot be.

  join: see `make_signals`.
  """
  method = build_method(c.method.to_dict())
  implementation = c.train.loss_implementation
  shared = dict(temperature=c.rollout.temperature, join=join)
  candidates = None
  if method.teacher_weights.remote is None:
    implementation = None if implementation == "auto" else implementation
    make = functools.partial(
      make_signals, model, remat=c.model.remat, implementation=implementation, **shared
    )
    signals = signals_before = make(method)
  else:
    signals = make_given_signals(model, method, remat=c.model.remat, **shared)
    signals_before = signals
    candidates = make_candidates(model, method, **shared)
  several_updates = c.train.updates_per_batch > 1
  if method.contrast is not None and candidates is None:
    if several_updates:
      signals_before = make(method.before_updates)
    else:
      signals_before = make_recorded_signals(model, mix=method.teacher_weights.mix, **shared)
  tx = make_optimizer(**c.optimizer)
  step = make_train_step(
    signals, method, tx, updates=c.train.updates_per_batch, recompute_old=several_updates
  )
  read_reference = None
  if method.reference_kl is not None:
    read_reference = make_reader(model, temperature=c.rollout.temperature)
  return Learner(
    method,
    tx,
    step,
    make_score(signals_before),
    score_first=several_updates or method.contrast is not None,
    read_reference=read_reference,
    candidates=candidates,
  )


def make_explorer(
  c, method: Method, collector: Source, *, seed: int, second_model: tuple | None = None
) -> Explorer | Reflector | None:
  """Returns what samples beside the rollouts of a step, before they are packed; None: nothing does.

  These are alternatives to failed attempts, or what the policy writes of its episodes.
  second_model: its collector and weights.
  """
  if method.hint_tokens:
    longest = c.data.max_teacher_tokens + response_tokens(c)  # as of a teacher's text
    return Reflector(method.teacher_context, collector, seed, longest)
  if method.notes is None:
    return None
  return Explorer(
    method.notes,
    collector,
    seed=seed,
    success_threshold=method.teacher_context.success_threshold,
    max_prompt_tokens=c.data.max_teacher_tokens,
    second_model=second_model,
  )
