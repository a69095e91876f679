"""METHODS: a method is a row of parts. New method = new row, and at most one new function in one table.

axis             what it decides                                                     table
teacher_context  what the teacher reads (host: text)                                 teacher_context.TEACHER_CONTEXTS
teacher_weights  which weights teach: live, ema, trust_region, frozen, none          TEACHER_WEIGHTS, applied by train_step
token_signal     what a re-scored token contributes                                  divergence.TOKEN_SIGNALS
token_weight     a detached factor on it                                             token_weight.TOKEN_WEIGHTS
advantage        the baseline of the rewards of a group (host: numpy)                advantage.ADVANTAGES
surrogate        the policy-gradient term that uses the advantage                    advantage.SURROGATES
reduction        how the tokens of that term add up                                  advantage.REDUCTIONS
counterfactual   what failed responses also learn from what might have been          counterfactual.COUNTERFACTUALS
policy_share     the blend: policy_share * surrogate + (1 - policy_share) * token_signal (arXiv 2601.20802); or "untaught": responses with
                 a teacher get the token signal, the others the surrogate

SDPO and GRPO differ in what stands in their rows and in nothing else. A row names what its method is about; `row` adds every other argument
of its parts with its default, so that a run's settings are all visible and can all be changed.
"""

import copy
import functools
import inspect
import types
import typing
from typing import NamedTuple

from sdpo_jax.objectives.advantage import ADVANTAGES, REDUCTIONS, SURROGATES
from sdpo_jax.objectives.counterfactual import COUNTERFACTUALS
from sdpo_jax.objectives.divergence import TOKEN_SIGNALS
from sdpo_jax.objectives.teacher_context import TEACHER_CONTEXTS, TEMPLATES
from sdpo_jax.objectives.token_weight import TOKEN_WEIGHTS
from sdpo_jax.records import Feedback, Rollout, Task


class TeacherWeights(NamedTuple):
  """keep: a second weight tree travels with the state; move: its rate towards the policy; mix: the policy's share in its logits."""

  keep: bool
  move: float = 0.0
  mix: float | None = None


def _rate(rate: float) -> float:
  if not 0.0 <= rate <= 1.0:
    raise ValueError(f"method.teacher_weights.rate={rate!r} must lie in [0, 1]")
  return rate


def none() -> TeacherWeights:
  """No teacher at all."""
  return TeacherWeights(False)


def live() -> TeacherWeights:
  """The policy's own weights of this very step."""
  return TeacherWeights(False)


def ema(*, rate: float = 0.05) -> TeacherWeights:
  """teacher <- (1 - rate) teacher + rate policy, once per generation batch."""
  return TeacherWeights(True, move=_rate(rate))


def trust_region(*, rate: float = 0.05) -> TeacherWeights:
  """log q proportional to (1 - rate) logits of the initial weights + rate logits of the policy, both on the teacher's prompt."""
  return TeacherWeights(True, mix=_rate(rate))


def frozen() -> TeacherWeights:
  """The weights that the run started from."""
  return TeacherWeights(True)


TEACHER_WEIGHTS = {
  "none": none,
  "live": live,
  "ema": ema,
  "trust_region": trust_region,
  "frozen": frozen,
}
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

_SDPO = dict(
  teacher_context=dict(name="feedback_or_solution"),
  teacher_weights=dict(name="ema", rate=0.05),
  token_signal=dict(name="divergence", alpha=0.5),
  token_weight=dict(name="importance", is_clip=2.0, rollout_is_clip=2.0),
  advantage=dict(name="zero"),
  surrogate=dict(name="none"),
  reduction=dict(name="token_mean"),
  counterfactual=dict(name="none"),
  policy_share=0.0,
)
_GRPO = dict(
  teacher_context=dict(name="none"),
  teacher_weights=dict(name="none"),
  token_signal=dict(name="none"),
  token_weight=dict(name="uniform"),
  advantage=dict(name="group_mean", normalize_std=False),
  surrogate=dict(name="clipped", low=0.2, high=0.28, rollout_is_clip=2.0),
  reduction=dict(name="token_mean"),
  counterfactual=dict(name="none"),
  policy_share=1.0,
)
_STD = dict(name="group_mean", normalize_std=True)
METHODS = {
  name: dict(row, name=name)
  for name, row in {
    "sdpo": _SDPO,
    # lambda of arXiv 2601.20802
    "sdpo_blend": _SDPO
    | {k: _GRPO[k] for k in ("advantage", "surrogate")}
    | dict(policy_share=0.9),
    # arXiv 2601.18734
    "opsd": _SDPO
    | dict(
      teacher_context=dict(name="reference_solution"),
      teacher_weights=dict(name="frozen"),
      token_signal=dict(name="divergence", alpha=0.5, clip=0.05),
      token_weight=dict(name="uniform"),
    ),
    # 2604.02288
    "srpo": _SDPO
    | {k: _GRPO[k] for k in ("advantage", "surrogate")}
    | dict(
      policy_share="untaught",
      teacher_context=dict(name="feedback_or_solution", only_failures=True),
      token_weight=dict(name="certainty", is_clip=2.0, rollout_is_clip=2.0),
    ),
    # 2605.27765
    "sc_sdpo": _SDPO
    | dict(
      advantage=dict(name="question_spread"),
      token_weight=dict(name="importance", is_clip=2.0, rollout_is_clip=2.0, by_question=True),
    ),
    "counterfactual": _SDPO | dict(counterfactual=dict(name="notes")),
    # SDPO's baseline: no std, token mean
    "grpo": _GRPO,
    # 2402.03300
    "grpo_std": _GRPO
    | dict(
      advantage=_STD,
      surrogate=dict(name="clipped", low=0.2, high=0.2),
      reduction=dict(name="sequence_mean"),
    ),
    # 2503.14476 without its dynamic sampling
    "dapo": _GRPO | dict(advantage=_STD),
    # 2503.20783
    "dr_grpo": _GRPO
    | dict(
      surrogate=dict(name="clipped", low=0.2, high=0.2),
      reduction=dict(name="constant", length=8192.0),
    ),
    # 2507.18071
    "gspo": _GRPO
    | dict(advantage=_STD, surrogate=dict(name="gspo"), reduction=dict(name="sequence_mean")),
    # 2506.13585
    "cispo": _GRPO | dict(advantage=_STD, surrogate=dict(name="cispo")),
  }.items()
}


def row(name: str) -> dict:
  """A private copy of a named row with every argument of its parts; ValueError with the choices if there is none."""
  if name not in METHODS:
    raise ValueError(f"method={name!r} is unknown; choose from {sorted(METHODS)}")
  return METHODS[name] | {axis: cell(axis, **METHODS[name][axis]) for axis in AXES}


def parameters(axis: str, name: str) -> dict[str, inspect.Parameter]:
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


def cell(axis: str, name: str, **given) -> dict:
  """A part with every argument that it has: as given, else its default; None where it has no default and must be given."""
  defaults = {
    k: None if p.default is p.empty else p.default for k, p in parameters(axis, name).items()
  }
  return {"name": name} | copy.deepcopy(defaults | given)


def arguments(method: dict, axis: str) -> dict:
  """The named arguments of one part, its function's defaults filled in."""
  filled = cell(axis, **method[axis])
  del filled["name"]
  return filled


def build(method: dict) -> dict:
  """{axis: {"name": ..., **arguments}} -> {axis: function or None}. ValueError names the axis and the choices."""
  built = {}
  for axis, table in AXES.items():
    if axis not in method:
      raise ValueError(f"method.{axis} is missing; choose from {sorted(table)}")
    given = dict(method[axis])
    name = given.pop("name")
    accepted = parameters(axis, name)
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
  threshold = arguments(method, "teacher_context").get("success_threshold")
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
    reprompt := (TEMPLATES | arguments(method, "teacher_context")["templates"])["reprompt"]
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
