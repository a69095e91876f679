"""Builds a method from its row: fills in settings, binds them, refuses what means nothing.

A row is a dict {axis: {"name": part, **settings}, "policy_share": share}. Every setting of a part
is a keyword-only argument of its function (or class) in the axis's table, with its default and type
there.

Errors: ValueError naming the setting, its value and the choices.
"""

from collections.abc import Mapping
import copy
import functools
import inspect
import types
import typing
from typing import Any, Callable, NamedTuple

from sdpo_jax import ranges
from sdpo_jax.errors import unknown
from sdpo_jax.objectives.advantage import ADVANTAGES
from sdpo_jax.objectives.balance import BALANCES, Balance
from sdpo_jax.objectives.checks import check
from sdpo_jax.objectives.contexts import TEACHER_CONTEXTS
from sdpo_jax.objectives.credit import CREDITS, Credit
from sdpo_jax.objectives.cti import CONTRASTS, CREDIT, Cti
from sdpo_jax.objectives.memory import MEMORIES, Memory
from sdpo_jax.objectives.methods import METHODS
from sdpo_jax.objectives.notes import COUNTERFACTUALS, Notes
from sdpo_jax.objectives.reference_kl import REFERENCE_KLS, ReferenceKl
from sdpo_jax.objectives.route import ROUTES
from sdpo_jax.objectives.signals import DIVERGENCE, TEACHER_LOGP, TOKEN_SIGNALS, Part
from sdpo_jax.objectives.surrogate import REDUCTIONS, SURROGATES
from sdpo_jax.objectives.teacher_context import NoTeacher
from sdpo_jax.objectives.teacher_logits import TEACHER_LOGITS, TeacherLogits
from sdpo_jax.objectives.teacher_weights import TEACHER_WEIGHTS, TeacherWeights
from sdpo_jax.objectives.teacher_weights import none as no_weights
from sdpo_jax.objectives.token_weight import TOKEN_WEIGHTS

AXES: dict[str, dict[str, Any]] = {
  "teacher_context": TEACHER_CONTEXTS,
  "teacher_weights": TEACHER_WEIGHTS,
  "teacher_logits": TEACHER_LOGITS,
  "token_signal": TOKEN_SIGNALS,
  "token_weight": TOKEN_WEIGHTS,
  "advantage": ADVANTAGES,
  "credit": CREDITS,
  "surrogate": SURROGATES,
  "reduction": REDUCTIONS,
  "counterfactual": COUNTERFACTUALS,
  "memory": MEMORIES,
  "route": ROUTES,
  "contrast": CONTRASTS,
  "balance": BALANCES,
  "reference_kl": REFERENCE_KLS,
}
# Axes whose parts are made from their settings, once. Those of the others are functions to which
# the settings are bound.
MADE_ONCE = (
  "teacher_context",
  "teacher_weights",
  "teacher_logits",
  "credit",
  "counterfactual",
  "memory",
  "route",
  "contrast",
  "balance",
  "reference_kl",
)
# The settings of the token signal that the divergence kernel has to know; where it lacks one, so.
KERNEL_DEFAULTS = {
  "alpha": 1.0,
  "top_k": None,
  "add_tail": True,
  "advantage_clip": None,
  "ratio_bounds": (),
}


class Method(NamedTuple):
  """A row as functions with their settings bound. None: the method has no such part."""

  teacher_context: Callable  # (group, i) -> Context | None
  teacher_weights: TeacherWeights
  token_signal: Callable | None  # (Signals, TrainBatch) -> loss_BR
  token_weight: Callable  # (Signals, TrainBatch) -> factor_BR
  advantage: Callable  # reward_QG -> advantage_QG
  surrogate: Callable | None  # (Signals, TrainBatch, advantage_BR) -> loss_BR
  reduction: Callable  # weight_BR -> (weight_BR, normaliser)
  notes: Notes | None
  # Share of the surrogate in the loss. None ("routed"): a response has the token signal alone or
  # the surrogate alone, as the route says.
  policy_share: float | None
  divergence: dict | None  # as KERNEL_DEFAULTS; None: no part reads the divergence
  reads: frozenset[str]  # of the teacher and the policy, what its parts declare for the step
  teacher_logits: TeacherLogits | None = None
  credit: Credit | None = None
  memory: Memory | None = None
  route: Callable | None = None  # (group, Standing | None) -> (lots, Standing | None)
  contrast: Cti | None = None
  balance: Balance | None = None  # None: policy_share blends
  reference_kl: ReferenceKl | None = None
  rivals: int | None = None  # likely tokens that a part contrasts the sampled one with

  @property
  def needs_teacher(self) -> bool:
    """Tells whether a teacher reads the responses, in the step or before it."""
    return bool(self.reads) or self.contrast is not None

  @property
  def hint_tokens(self) -> int:
    """The most tokens that the policy writes of an episode in hindsight; 0: it is not asked."""
    return getattr(self.teacher_context, "hint_tokens", 0)

  @property
  def before_updates(self) -> "Method":
    """A method with a contrast, as the pass before several updates has it: it reads the gap."""
    return self._replace(reads=self.reads | {TEACHER_LOGP})

  @property
  def found_before_updates(self) -> tuple[str, ...]:
    """The fields of `TrainBatch` that the pass before the updates fills for this method alone."""
    needed = {"credit_BR": self.contrast, "logp_ref_BR": self.reference_kl}
    return tuple(name for name, part in needed.items() if part is not None)

  @property
  def further_count(self) -> int:
    """The readings by the teacher that each batch has beside the plain one."""
    if self.notes is not None:
      return self.notes.further_count
    return getattr(self.teacher_context, "further_count", 0)

  @property
  def compares_further(self) -> bool:
    """Tells whether each further reading has a divergence of its own, as a counterfactual's has."""
    return self.notes is not None and self.notes.form != "mixture"

  @property
  def mixes_readings(self) -> bool:
    """Tells whether the further readings are mixed into one teacher instead of being terms."""
    return self.notes is not None and self.notes.form == "mixture"


def method_row(name: str) -> dict:
  """Returns a private copy of a named row with every setting of its parts."""
  if name not in METHODS:
    raise ValueError(unknown("method", name, sorted(METHODS)))
  row = METHODS[name]
  return row | {axis: complete_part(axis, **row[axis]) for axis in AXES}


def reads_turns(row: Mapping) -> bool:
  """Tells whether the teacher of a row reads the turns of episodes, one after another."""
  context = AXES["teacher_context"].get(row["teacher_context"]["name"])
  return getattr(context, "by_turn", False)


def settings_of(axis: str, name: str) -> dict[str, inspect.Parameter]:
  """Returns the settings that a part has, by name."""
  function = _function(axis, name)
  if function is None:
    return {}
  parameters = inspect.signature(function).parameters
  return {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def complete_part(axis: str, name: str, **given) -> dict:
  """Returns a part with every setting that it has: as given, else its default.

  A setting without a default, which a user must give, is None.
  """
  part = {"name": name}
  for key, parameter in settings_of(axis, name).items():
    part[key] = None if parameter.default is parameter.empty else parameter.default
  return copy.deepcopy(part | given)


def build_method(row: dict) -> Method:
  """Builds a method from a row of METHODS, or from one like it."""
  bound: dict[str, Any] = {}
  reads: set[str] = set()
  for axis, table in AXES.items():  # the teacher context comes first
    if axis not in row:
      raise ValueError(f"method.{axis} is missing; choose from {sorted(table)}")
    settings = dict(row[axis])
    name = settings.pop("name")
    _check_settings(axis, name, settings)
    # One setting says what a success is: the teacher context's, where it has one.
    threshold = getattr(bound.get("teacher_context"), "success_threshold", None)
    bound[axis] = _bind(axis, name, settings, threshold)
    reads |= _reads(table[name], bound[axis], complete_part(axis, **row[axis]))
  notes = bound.pop("counterfactual")
  if notes is not None and not notes.teaches:
    notes = None
  if bound["credit"] is not None and bound["credit"].is_idle:
    bound["credit"] = None
  complete = row | {axis: complete_part(axis, **row[axis]) for axis in AXES}
  check(complete, bound, notes, reads)
  reads.discard(CREDIT)
  if not reads and bound["contrast"] is None:
    # of an idle credit: the row is that of its surrogate alone
    bound["teacher_context"], bound["teacher_weights"] = NoTeacher(), no_weights()
  kernel = None
  if DIVERGENCE in reads:
    kernel = KERNEL_DEFAULTS | {
      key: value for key, value in complete["token_signal"].items() if key in KERNEL_DEFAULTS
    }
  return Method(
    **bound,
    notes=notes,
    policy_share=None if row["policy_share"] == "routed" else row["policy_share"],
    divergence=kernel,
    reads=frozenset(reads),
    rivals=complete["token_signal"].get("rivals"),
  )


def _function(axis: str, name: str) -> Callable | None:
  if name not in AXES[axis]:
    raise ValueError(unknown(f"method.{axis}.name", name, sorted(AXES[axis])))
  entry = AXES[axis][name]
  return entry.function if isinstance(entry, Part) else entry


def _bind(axis: str, name: str, settings: dict, success_threshold: float | None):
  """Returns a part with its settings. What is told a threshold has it as an ordinary argument."""
  function = _function(axis, name)
  if function is None:
    return None
  told = inspect.signature(function).parameters.keys() - settings_of(axis, name).keys()
  if "success_threshold" in told and success_threshold is not None:
    settings = settings | {"success_threshold": success_threshold}
  return function(**settings) if axis in MADE_ONCE else functools.partial(function, **settings)


def _reads(entry, part, settings: dict) -> set[str]:
  """Returns what a part declares that it reads; an idle one reads nothing."""
  if isinstance(entry, Part):
    if not callable(entry.reads):
      return set(entry.reads)
    return set(entry.reads(**{key: v for key, v in settings.items() if key != "name"}))
  return set() if getattr(part, "is_idle", False) else set(getattr(part, "reads", ()))


def _check_settings(axis: str, name: str, settings: dict) -> None:
  accepted = settings_of(axis, name)
  for key, value in settings.items():
    if key not in accepted:
      raise ValueError(
        f"method.{axis}.{key} is not an argument of {name!r}; choose from {sorted(accepted)}"
      )
    kinds = _kinds(accepted[key].annotation)
    is_misplaced_bool = isinstance(value, bool) and bool not in kinds
    if not isinstance(value, kinds) or is_misplaced_bool:
      names = ["None" if kind is types.NoneType else kind.__name__ for kind in kinds]
      allowed = ranges.RANGES.get(f"method.{axis}.{key}")
      numbers = f", and {allowed.describe(value)}" if allowed else ""
      raise ValueError(
        f"method.{axis}.{key}={value!r} of {name!r} must be of type {' or '.join(names)}{numbers}"
      )
    if f"method.{axis}.{key}" in ranges.RANGES:
      ranges.check(f"method.{axis}.{key}", value)


def _kinds(annotation) -> tuple[type, ...]:
  """The types that a setting may have. An integer is a number."""
  alternatives = (annotation,)
  if isinstance(annotation, types.UnionType):
    alternatives = typing.get_args(annotation)
  kinds = tuple(typing.get_origin(kind) or kind for kind in alternatives)
  return (int, *kinds) if float in kinds else kinds
