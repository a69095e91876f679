"""Builds a method from its row: fills in settings, binds them, refuses what means nothing.

A row is a dict {axis: {"name": part, **settings}, "policy_share": share}. Every setting of a part
is a keyword-only argument of its function (or class) in the axis's table, with its default and type
there.

Errors: ValueError naming the setting, its value and the choices.
"""

import copy
import functools
import inspect
import re
import types
import typing
from typing import Any, Callable, NamedTuple

from sdpo_jax import ranges
from sdpo_jax.errors import unknown
from sdpo_jax.objectives.advantage import ADVANTAGES
from sdpo_jax.objectives.methods import METHODS
from sdpo_jax.objectives.notes import COUNTERFACTUALS, Notes
from sdpo_jax.objectives.signals import DIVERGENCE, TEACHER_ENTROPY, TOKEN_SIGNALS, Part
from sdpo_jax.objectives.surrogate import REDUCTIONS, SURROGATES
from sdpo_jax.objectives.teacher_context import TEACHER_CONTEXTS, TEMPLATES
from sdpo_jax.objectives.teacher_weights import TEACHER_WEIGHTS, TeacherWeights
from sdpo_jax.objectives.token_weight import TOKEN_WEIGHTS

AXES: dict[str, dict[str, Any]] = {
  "teacher_context": TEACHER_CONTEXTS,
  "teacher_weights": TEACHER_WEIGHTS,
  "token_signal": TOKEN_SIGNALS,
  "token_weight": TOKEN_WEIGHTS,
  "advantage": ADVANTAGES,
  "surrogate": SURROGATES,
  "reduction": REDUCTIONS,
  "counterfactual": COUNTERFACTUALS,
}
# Axes whose parts are made from their settings, once. Those of the others are functions to which
# the settings are bound.
MADE_ONCE = ("teacher_context", "teacher_weights", "counterfactual")
# The settings of the token signal that the divergence kernel has to know.
KERNEL_SETTINGS = ("alpha", "top_k", "add_tail", "advantage_clip")


class Method(NamedTuple):
  """A row as functions with their settings bound. None: the method has no such part."""

  teacher_context: Callable  # (group, i) -> Context | None
  teacher_weights: TeacherWeights
  token_signal: Callable | None  # (Signals, TrainBatch) -> loss_BR
  token_weight: Callable  # (Signals, TrainBatch) -> factor_BR
  advantage: Callable  # reward_QG -> advantage_QG
  surrogate: Callable | None  # (Signals, TrainBatch) -> loss_BR
  reduction: Callable  # weight_BR -> (weight_BR, normaliser)
  notes: Notes | None
  # Share of the surrogate in the loss. None ("untaught"): a response with a teacher has the token
  # signal alone, any other response the surrogate alone.
  policy_share: float | None
  divergence: dict | None  # KERNEL_SETTINGS; None: no part reads the divergence
  reads: frozenset[str]  # what its parts declare

  @property
  def needs_teacher(self) -> bool:
    return self.token_signal is not None

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


def part_settings(row: dict, axis: str) -> dict:
  """Returns the settings of one part of a row, without its name, defaults filled in."""
  settings = complete_part(axis, **row[axis])
  del settings["name"]
  return settings


def build_method(row: dict) -> Method:
  """Builds a method from a row of METHODS, or from one like it."""
  bound, reads = {}, set()
  for axis, table in AXES.items():
    if axis not in row:
      raise ValueError(f"method.{axis} is missing; choose from {sorted(table)}")
    settings = dict(row[axis])
    name = settings.pop("name")
    _check_settings(axis, name, settings)
    bound[axis] = _bind(axis, name, settings)
    if isinstance(table[name], Part):
      reads |= set(table[name].reads)
  notes = bound.pop("counterfactual")
  if notes is not None and not notes.teaches:
    notes = None
  check(row, notes)
  if bound["teacher_weights"].remote is not None:
    _check_remote(row, bound["teacher_weights"].remote.url, reads)
  if row["advantage"]["name"] == "question_spread":
    # One setting says what a success is: the teacher context's, where it has one.
    threshold = getattr(bound["teacher_context"], "success_threshold", None)
    if threshold is not None:
      bound["advantage"] = functools.partial(bound["advantage"], success_threshold=threshold)
  kernel = None
  if DIVERGENCE in reads:
    settings = part_settings(row, "token_signal")
    kernel = {key: settings[key] for key in KERNEL_SETTINGS}
  share = None if row["policy_share"] == "untaught" else row["policy_share"]
  return Method(**bound, notes=notes, policy_share=share, divergence=kernel, reads=frozenset(reads))


def _function(axis: str, name: str) -> Callable | None:
  if name not in AXES[axis]:
    raise ValueError(unknown(f"method.{axis}.name", name, sorted(AXES[axis])))
  entry = AXES[axis][name]
  return entry.function if isinstance(entry, Part) else entry


def _bind(axis: str, name: str, settings: dict):
  function = _function(axis, name)
  if function is None:
    return None
  return function(**settings) if axis in MADE_ONCE else functools.partial(function, **settings)


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


def check(row: dict, notes: Notes | None) -> None:
  """Refuses combinations of parts that cannot mean anything."""
  _check_divergence(row["token_signal"])
  _check_shares(row)
  if notes is not None:
    _check_notes(row, notes)
  _check_unread(row)


def _check_divergence(part: dict) -> None:
  alpha, top_k, clip = (part.get(key) for key in ("alpha", "top_k", "advantage_clip"))
  if clip is not None and (top_k is None or alpha != 1.0):
    raise ValueError(
      f"method.token_signal.advantage_clip={clip!r} must be above 0 and needs alpha=1 (reverse KL) "
      f"and a top_k, not alpha={alpha!r}, top_k={top_k!r}"
    )


def _check_shares(row: dict) -> None:
  """Refuses a blend of which one side has no part, and a token signal without a teacher."""
  share = row["policy_share"]
  signal, surrogate = row["token_signal"]["name"], row["surrogate"]["name"]
  context, weights = row["teacher_context"]["name"], row["teacher_weights"]["name"]
  has_signal, has_surrogate = signal != "none", surrogate != "none"
  if share == "untaught":
    share = 0.5  # what follows is the same for every share between 0 and 1
  if not ranges.RANGES["method.policy_share"].holds(share):
    raise ValueError(f"method.policy_share={share!r} must lie in [0, 1], or be 'untaught'")
  if has_signal and "none" in (context, weights):
    raise ValueError(
      f"method.token_signal.name={signal!r} needs a teacher, "
      f"but teacher_context is {context!r} and teacher_weights {weights!r}"
    )
  if not has_signal and not has_surrogate:
    raise ValueError(
      "method.token_signal.name and method.surrogate.name are both 'none': nothing would be learned"
    )
  if (share < 1.0) != has_signal:
    raise ValueError(
      f"method.policy_share={share!r} with token_signal {signal!r}: a share below 1 needs a token "
      "signal, and a token signal needs a share below 1"
    )
  if (share > 0.0) != has_surrogate:
    raise ValueError(
      f"method.policy_share={share!r} with surrogate {surrogate!r}: a share above 0 needs a "
      "surrogate, and a surrogate needs a share above 0"
    )


def _check_remote(row: dict, url: str, reads: set[str]) -> None:
  """Refuses what a teacher that answers with a few log-probabilities cannot do."""
  name = "method.teacher_weights.name='remote'"
  if not re.fullmatch(r"https?://[^/?#\s]+/?", url):
    raise ValueError(
      f"method.teacher_weights.url={url!r} must be the address of a python -m sdpo_jax.serve, "
      "such as http://10.0.0.2:8000, without a path"
    )
  if row["token_signal"]["name"] != "divergence" or row["token_signal"].get("top_k") is None:
    raise ValueError(
      f"{name} needs the token signal 'divergence' with a top_k: set method.token_signal.top_k"
    )
  if row["counterfactual"]["name"] != "none":
    raise ValueError(
      f"{name} has one reading; set method.counterfactual.name=none, "
      f"not {row['counterfactual']['name']!r}"
    )
  if TEACHER_ENTROPY in reads:
    raise ValueError(
      f"{name} does not say its entropy, which method.token_weight.name="
      f"{row['token_weight']['name']!r} reads: choose another token weight"
    )


def _check_notes(row: dict, notes: Notes) -> None:
  name, context = row["counterfactual"]["name"], row["teacher_context"]["name"]
  if notes.form == "mixture" and row["token_signal"].get("top_k") is None:
    raise ValueError(
      "method.counterfactual.form='mixture' goes through the policy's likeliest tokens: "
      "set method.token_signal.top_k"
    )
  if context != "feedback_or_solution" or row["policy_share"] == "untaught":
    raise ValueError(
      f"method.counterfactual.name={name!r} adds to the teacher context 'feedback_or_solution', "
      f"not to {context!r}, and to a policy_share that is a number, not {row['policy_share']!r}"
    )
  reprompt = (TEMPLATES | part_settings(row, "teacher_context")["templates"])["reprompt"]
  if "{notes}" not in reprompt:
    raise ValueError(
      f"method.teacher_context.templates.reprompt={reprompt!r} has no {{notes}}: "
      f"the teacher would not read those of method.counterfactual.name={name!r}"
    )


def _check_unread(row: dict) -> None:
  """Refuses a part that no other part would read."""
  names = {axis: row[axis]["name"] for axis in AXES}
  has_signal, has_surrogate = names["token_signal"] != "none", names["surrogate"] != "none"
  spreads = names["advantage"] == "question_spread"
  by_question = row["token_weight"].get("by_question")
  if has_surrogate and names["advantage"] != "group_mean":
    raise ValueError(
      f"method.surrogate.name={names['surrogate']!r} needs the advantage 'group_mean', "
      f"not {names['advantage']!r}"
    )
  if spreads != bool(by_question):
    raise ValueError(
      "method.advantage.name='question_spread' is a weight that "
      "method.token_weight.by_question=True applies: set both or neither"
    )
  unread = []
  if not has_signal and names["token_weight"] != "uniform":
    unread.append(("token_weight", "token_signal"))
  if not has_surrogate and names["reduction"] != "token_mean":
    unread.append(("reduction", "surrogate"))
  if not has_surrogate and names["advantage"] == "group_mean":
    unread.append(("advantage", "surrogate"))
  if unread:
    axis, reader = unread[0]
    raise ValueError(
      f"method.{axis}.name={names[axis]!r} would not be read: method.{reader}.name is 'none'"
    )
