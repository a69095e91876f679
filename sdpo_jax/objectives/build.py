"""From a row of METHODS to functions, with the checks that refuse what cannot mean anything."""

import copy
import functools
import inspect
import types
import typing

from sdpo_jax.objectives.advantage import ADVANTAGES
from sdpo_jax.objectives.methods import METHODS
from sdpo_jax.objectives.notes import COUNTERFACTUALS
from sdpo_jax.objectives.signals import TOKEN_SIGNALS
from sdpo_jax.objectives.surrogate import REDUCTIONS, SURROGATES
from sdpo_jax.objectives.teacher_context import TEACHER_CONTEXTS, TEMPLATES
from sdpo_jax.objectives.teacher_weights import TEACHER_WEIGHTS
from sdpo_jax.objectives.token_weight import TOKEN_WEIGHTS
from sdpo_jax.records import Feedback, Rollout, Task

AXES = {
  "teacher_context": TEACHER_CONTEXTS,
  "teacher_weights": TEACHER_WEIGHTS,
  "token_signal": TOKEN_SIGNALS,
  "token_weight": TOKEN_WEIGHTS,
  "advantage": ADVANTAGES,
  "surrogate": SURROGATES,
  "reduction": REDUCTIONS,
  "counterfactual": COUNTERFACTUALS,
}


def method_row(name: str) -> dict:
  """A private copy of a named row with every argument of its parts; ValueError with the choices if there is none."""
  if name not in METHODS:
    raise ValueError(f"method={name!r} is unknown; choose from {sorted(METHODS)}")
  return METHODS[name] | {axis: complete_part(axis, **METHODS[name][axis]) for axis in AXES}


def settings_of(axis: str, name: str) -> dict[str, inspect.Parameter]:
  """What can be set of a part: its function's keyword-only arguments. ValueError names the choices if there is no such part."""
  if name not in AXES[axis]:
    raise ValueError(f"method.{axis}.name={name!r} is unknown; choose from {sorted(AXES[axis])}")
  function = AXES[axis][name]
  return (
    {}
    if function is None
    else {
      k: p for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY
    }
  )


def complete_part(axis: str, name: str, **given) -> dict:
  """A part with every argument that it has: as given, else its default; None where it has no default and must be given."""
  defaults = {
    k: None if p.default is p.empty else p.default for k, p in settings_of(axis, name).items()
  }
  return {"name": name} | copy.deepcopy(defaults | given)


def part_settings(method: dict, axis: str) -> dict:
  """The named arguments of one part, its function's defaults filled in."""
  filled = complete_part(axis, **method[axis])
  del filled["name"]
  return filled


def build_method(method: dict) -> dict:
  """{axis: {"name": ..., **arguments}} -> {axis: function or None}. ValueError names the axis and the choices."""
  built = {}
  for axis, table in AXES.items():
    if axis not in method:
      raise ValueError(f"method.{axis} is missing; choose from {sorted(table)}")
    given = dict(method[axis])
    name = given.pop("name")
    accepted = settings_of(axis, name)
    for key, value in given.items():
      if key not in accepted:
        raise ValueError(
          f"method.{axis}.{key} is not an argument of {name!r}; choose from {sorted(accepted)}"
        )
      kinds = _kinds(accepted[key].annotation)
      if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        said = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"method.{axis}.{key}={value!r} of {name!r} must be of type {said}")
    function = table[name]
    built[axis] = None if function is None else functools.partial(function, **given)
  check(method)
  made_up = Rollout(Task("", ""), [], [], [], "stop", "", Feedback(0.0, ""))
  # refuses wrong choices and templates: now, not when the first batch has been sampled
  built["teacher_context"]([made_up], 0)
  threshold = part_settings(method, "teacher_context").get("success_threshold")
  # one setting says what a success is
  if method["advantage"]["name"] == "question_spread" and threshold is not None:
    built["advantage"] = functools.partial(built["advantage"], success_threshold=threshold)
  return built


def _kinds(annotation) -> tuple[type, ...]:
  """The types that an argument may have. An integer is a number."""
  kinds = tuple(
    typing.get_origin(kind) or kind
    for kind in (
      typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
  )
  return (int, *kinds) if float in kinds else kinds


def check(method: dict) -> None:
  """Combinations that cannot mean anything stop here."""
  names = {axis: method[axis]["name"] for axis in AXES}
  share = method["policy_share"]
  if share == "untaught":
    share = 0.5  # what follows is the same for every share between 0 and 1
  if isinstance(share, str) or not 0.0 <= share <= 1.0:
    raise ValueError(f"method.policy_share={share!r} must lie in [0, 1], or be 'untaught'")
  alpha, top_k = (method["token_signal"].get(key) for key in ("alpha", "top_k"))
  if alpha is not None and not 0.0 <= alpha <= 1.0:
    raise ValueError(
      f"method.token_signal.alpha={alpha!r} must lie in [0, 1]: 0 is KL(teacher || policy), 1 is KL(policy || teacher)"
    )
  if top_k is not None and top_k < 1:
    raise ValueError(
      f"method.token_signal.top_k={top_k!r} must be at least 1, or None for the whole vocabulary"
    )
  clip = method["token_signal"].get("advantage_clip")
  if clip is not None and (clip <= 0 or top_k is None or alpha != 1.0):
    raise ValueError(
      f"method.token_signal.advantage_clip={clip!r} must be above 0 and needs alpha=1 (reverse KL) and a top_k, not alpha={alpha!r}, top_k={top_k!r}"
    )
  taught = names["token_signal"] != "none"
  part = dict(method["counterfactual"])
  told = COUNTERFACTUALS[part.pop("name")](**part)
  if told is not None and told.form == "mixture" and top_k is None:
    raise ValueError(
      "method.counterfactual.form='mixture' goes through the policy's likeliest tokens: set method.token_signal.top_k"
    )
  if told is not None and (
    names["teacher_context"] != "feedback_or_solution" or method["policy_share"] == "untaught"
  ):
    raise ValueError(
      f"method.counterfactual.name={names['counterfactual']!r} adds to the teacher context 'feedback_or_solution', not to "
      f"{names['teacher_context']!r}, and to a policy_share that is a number, not {method['policy_share']!r}"
    )
  if told is not None and "{notes}" not in (
    reprompt := (TEMPLATES | part_settings(method, "teacher_context")["templates"])["reprompt"]
  ):
    raise ValueError(
      f"method.teacher_context.templates.reprompt={reprompt!r} has no {{notes}}: the teacher would not read those of method.counterfactual.name={names['counterfactual']!r}"
    )
  if taught and (names["teacher_context"] == "none" or names["teacher_weights"] == "none"):
    raise ValueError(
      f"method.token_signal.name={names['token_signal']!r} needs a teacher, but teacher_context is "
      f"{names['teacher_context']!r} and teacher_weights {names['teacher_weights']!r}"
    )
  if not taught and names["surrogate"] == "none":
    raise ValueError(
      "method.token_signal.name and method.surrogate.name are both 'none': nothing would be learned"
    )
  if (share < 1.0) != taught:
    raise ValueError(
      f"method.policy_share={share!r} with token_signal {names['token_signal']!r}: a share below 1 needs a token signal, "
      "and a token signal needs a share below 1"
    )
  if (share > 0.0) != (names["surrogate"] != "none"):
    raise ValueError(
      f"method.policy_share={share!r} with surrogate {names['surrogate']!r}: a share above 0 needs a surrogate, "
      "and a surrogate needs a share above 0"
    )
  if names["surrogate"] != "none" and names["advantage"] != "group_mean":
    raise ValueError(
      f"method.surrogate.name={names['surrogate']!r} needs the advantage 'group_mean', not {names['advantage']!r}"
    )
  if (names["advantage"] == "question_spread") != bool(method["token_weight"].get("by_question")):
    raise ValueError(
      "method.advantage.name='question_spread' is a weight that method.token_weight.by_question=True applies: set both or neither"
    )
  for axis, idle, unread, reader in (
    ("token_weight", "uniform", not taught, "token_signal"),
    ("reduction", "token_mean", names["surrogate"] == "none", "surrogate"),
  ):
    if unread and names[axis] != idle:
      raise ValueError(
        f"method.{axis}.name={names[axis]!r} would not be read: method.{reader}.name is 'none'"
      )
  if names["advantage"] == "group_mean" and names["surrogate"] == "none":
    raise ValueError(
      "method.advantage.name='group_mean' would not be read: method.surrogate.name is 'none'"
    )
