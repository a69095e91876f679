"""Refuses rows whose parts cannot go together, or of which one would not be read.

A row comes here with every setting of its parts. Each refusal is a ValueError of one line that
names the setting, its value, and what to choose instead.
"""

from collections.abc import Mapping
import re
from typing import Any

from sdpo_jax import ranges
from sdpo_jax.objectives.cti import CREDIT
from sdpo_jax.objectives.notes import Notes
from sdpo_jax.objectives.signals import TEACHER_ENTROPY
from sdpo_jax.objectives.teacher_context import TEMPLATES

# The axes with parts that may read the credit of a contrast.
READ_CONTRAST = ("token_signal", "token_weight", "balance", "reference_kl")
# What a method with a contrast has on the axes of other methods' terms.
ALONE = {
  "credit": "none",
  "counterfactual": "none",
  "memory": "none",
  "route": "taught",
  "teacher_logits": "plain",
}


def check(row: dict, parts: Mapping[str, Any], notes: Notes | None, reads: set[str]) -> None:
  """Refuses combinations of parts that cannot mean anything.

  parts: the part of each axis, built; reads: what they declare.
  """
  _check_divergence(row["token_signal"])
  _check_sampled_token(row["token_signal"])
  _check_shares(row)
  _check_balance(row)
  _check_contrast(row, has_reader=CREDIT in reads)
  _check_teacher(row, reads)
  _check_further(row, parts, notes)
  if notes is not None:
    _check_notes(row, notes)
  _check_unread(row)
  _check_memory(row, parts)
  _check_successes(row, parts)
  if parts["teacher_weights"].remote is not None:
    _check_remote(row, parts["teacher_weights"].remote.url, reads)


def _check_divergence(part: dict) -> None:
  alpha, top_k, clip = (part.get(key) for key in ("alpha", "top_k", "advantage_clip"))
  if clip is not None and (top_k is None or alpha != 1.0):
    raise ValueError(
      f"method.token_signal.advantage_clip={clip!r} must be above 0 and needs alpha=1 (reverse KL) "
      f"and a top_k, not alpha={alpha!r}, top_k={top_k!r}"
    )
  bounds = tuple(part.get("ratio_bounds") or ())
  if bounds and (top_k is None or len(bounds) != 2 or not bounds[0] < 1 < bounds[1]):
    raise ValueError(
      f"method.token_signal.ratio_bounds={bounds!r} must be () or two numbers, one below and one "
      f"above 1, and needs a top_k, not top_k={top_k!r}"
    )


def _check_sampled_token(part: dict) -> None:
  alpha, corrected, baseline = (part.get(key) for key in ("alpha", "corrected", "baseline"))
  if corrected is False and alpha == 1.0:
    raise ValueError(
      "method.token_signal.corrected=False would not be read: with alpha=1.0 (reverse KL) both "
      "forms are one"
    )
  if baseline and alpha != 1.0:
    raise ValueError(
      "method.token_signal.baseline=True is known for alpha=1.0 (reverse KL) alone, "
      f"not for alpha={alpha!r}"
    )


def _check_shares(row: dict) -> None:
  """Refuses a blend of which one side has no part."""
  share = row["policy_share"]
  signal, surrogate = row["token_signal"]["name"], row["surrogate"]["name"]
  has_signal, has_surrogate = signal != "none", surrogate != "none"
  if row["balance"]["name"] != "none":
    return  # the two are added, not blended
  if share == "routed":
    share = 0.5  # what follows is the same for every share between 0 and 1
  if not ranges.RANGES["method.policy_share"].holds(share):
    raise ValueError(f"method.policy_share={share!r} must lie in [0, 1], or be 'routed'")
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


def _check_balance(row: dict) -> None:
  """Refuses coefficients that nothing would read, and a term without one."""
  name, penalty = row["balance"]["name"], row["reference_kl"]
  names = {axis: row[axis]["name"] for axis in ("token_signal", "surrogate")}
  if name != "none" and (row["policy_share"] != 1 or "none" in names.values()):
    raise ValueError(
      f"method.balance.name={name!r} adds a token signal to the whole of a surrogate: it needs "
      f"policy_share=1.0, not {row['policy_share']!r}, with token_signal {names['token_signal']!r} "
      f"and surrogate {names['surrogate']!r}"
    )
  if penalty["name"] == "none":
    return
  coefficient = penalty["coefficient"]
  if name == "contrast" and coefficient is not None:
    raise ValueError(
      f"method.reference_kl.coefficient={coefficient!r} would not be read: "
      "method.balance.name='contrast' decides it; set it to None"
    )
  if name != "contrast" and coefficient is None:
    raise ValueError(
      f"method.reference_kl.coefficient=None is for method.balance.name='contrast', not {name!r}: "
      "set a number"
    )


def _check_contrast(row: dict, *, has_reader: bool) -> None:
  """Refuses a contrast that nothing reads, a reader without one, and terms that go with none."""
  name = row["contrast"]["name"]
  parts = ", ".join(f"{axis} {row[axis]['name']!r}" for axis in READ_CONTRAST)
  if name == "none" and has_reader:
    raise ValueError(
      f"method.contrast.name='none', and one of {parts} reads its credit: set it to cti"
    )
  if name == "none":
    return
  if not has_reader:
    raise ValueError(f"method.contrast.name={name!r} would not be read by any of {parts}")
  for axis, plain in ALONE.items():
    if row[axis]["name"] == plain:
      continue
    raise ValueError(
      f"method.contrast.name={name!r} goes with no other method's terms: "
      f"set method.{axis}.name={plain}, not {row[axis]['name']!r}"
    )
  if row["policy_share"] != 1 or row["surrogate"]["name"] == "none":
    raise ValueError(
      f"method.contrast.name={name!r} is made of the advantages of a surrogate that counts whole: "
      f"it needs policy_share=1.0, not {row['policy_share']!r}, and a surrogate, not "
      f"{row['surrogate']['name']!r}"
    )


def _check_teacher(row: dict, reads: set[str]) -> None:
  """Refuses what reads a teacher without one, and a teacher that nothing reads."""
  context, weights = row["teacher_context"]["name"], row["teacher_weights"]["name"]
  for axis in ("token_signal", "credit"):
    name = row[axis]["name"]
    if name != "none" and "none" in (context, weights):
      raise ValueError(
        f"method.{axis}.name={name!r} needs a teacher, "
        f"but teacher_context is {context!r} and teacher_weights {weights!r}"
      )
  if row["credit"]["name"] != "none" and row["surrogate"]["name"] == "none":
    raise ValueError(
      f"method.credit.name={row['credit']['name']!r} would not be read: "
      "method.surrogate.name is 'none'"
    )
  acts_on_none = row["route"]["name"] == "taught" or row["teacher_context"].get("only_failures")
  if row["credit"]["name"] != "none" and row["policy_share"] == "routed" and acts_on_none:
    raise ValueError(
      f"method.credit.name={row['credit']['name']!r} would not be read: with "
      f"policy_share='routed', route {row['route']['name']!r} and teacher_context {context!r} no "
      "response that learns from the reward has a reading"
    )
  if context == "question_alone":
    _check_anchor(row)
  reader = {row["token_signal"]["name"], row["credit"]["name"]} - {"none"}
  for axis, name in (("teacher_context", context), ("teacher_weights", weights)):
    if name != "none" and not reader:
      raise ValueError(
        f"method.{axis}.name={name!r} would not be read: "
        "method.token_signal.name and method.credit.name are 'none'"
      )


def _check_anchor(row: dict) -> None:
  """Refuses an anchor that holds nothing, and a teacher that is more than an anchor."""
  weights, share = row["teacher_weights"]["name"], row["policy_share"]
  if weights in ("live", "remote"):
    whose = "the policy itself" if weights == "live" else "another model, and no anchor"
    raise ValueError(
      f"method.teacher_context.name='question_alone' with teacher_weights {weights!r}: the teacher "
      f"would be {whose}; choose ema, frozen or another of method.teacher_weights.name"
    )
  has_both = row["token_signal"]["name"] != "none" and row["surrogate"]["name"] != "none"
  if not has_both or share == "routed":
    raise ValueError(
      "method.teacher_context.name='question_alone' holds the policy near its teacher and teaches "
      f"nothing: it needs a token_signal beside a surrogate, not policy_share={share!r} with "
      f"token_signal {row['token_signal']['name']!r} and surrogate {row['surrogate']['name']!r}"
    )


def _check_further(row: dict, parts: Mapping[str, Any], notes: Notes | None) -> None:
  """Refuses readings beyond the plain one that nothing would read, and too few of them."""
  name, context = row["teacher_logits"]["name"], row["teacher_context"]["name"]
  has = getattr(parts["teacher_context"], "further_count", 0)
  needs = max(getattr(parts[axis], "further_count", 0) for axis in ("teacher_logits", "credit"))
  if needs != has and parts["credit"] is None and row["credit"]["name"] != "none":
    return  # the credit is idle: nothing is read
  if needs != has:
    raise ValueError(
      f"method.teacher_context.name={context!r} has {has} further readings, and "
      f"method.credit.name={row['credit']['name']!r} with teacher_logits {name!r} reads {needs}"
    )
  if has and notes is not None:
    raise ValueError(
      f"method.teacher_context.name={context!r} has readings of its own: "
      f"set method.counterfactual.name=none, not {row['counterfactual']['name']!r}"
    )
  if name == "plain":
    return
  weights = row["teacher_weights"]["name"]
  if row["token_signal"]["name"] == "none" or weights in ("trust_region", "remote"):
    raise ValueError(
      f"method.teacher_logits.name={name!r} needs a token signal and teacher weights whose hidden "
      f"states are here, not {row['token_signal']['name']!r} and {weights!r}"
    )
  if notes is not None:
    raise ValueError(
      f"method.teacher_logits.name={name!r} is one teacher: set method.counterfactual.name=none"
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
  for axis in ("counterfactual", "credit"):
    if row[axis]["name"] != "none":
      raise ValueError(
        f"{name} has one reading of the divergence; set method.{axis}.name=none, "
        f"not {row[axis]['name']!r}"
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
  if context != "feedback_or_solution" or row["policy_share"] == "routed":
    raise ValueError(
      f"method.counterfactual.name={name!r} adds to the teacher context 'feedback_or_solution', "
      f"not to {context!r}, and to a policy_share that is a number, not {row['policy_share']!r}"
    )
  if row["token_signal"]["name"] == "none":
    raise ValueError(
      f"method.counterfactual.name={name!r} would not be read: method.token_signal.name is 'none'"
    )
  reprompt = (TEMPLATES | row["teacher_context"]["templates"])["reprompt"]
  if "{notes}" not in reprompt:
    raise ValueError(
      f"method.teacher_context.templates.reprompt={reprompt!r} has no {{notes}}: "
      f"the teacher would not read those of method.counterfactual.name={name!r}"
    )


def _check_unread(row: dict) -> None:
  """Refuses a part that no other part would read."""
  names = {axis: part["name"] for axis, part in row.items() if isinstance(part, dict)}
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
  if names["route"] != "taught" and row["policy_share"] != "routed":
    raise ValueError(
      f"method.route.name={names['route']!r} would not be read: "
      f"method.policy_share is {row['policy_share']!r}, not 'routed'"
    )


def _check_successes(row: dict, parts: Mapping[str, Any]) -> None:
  """Refuses a credit for readings that there are not, and readings that no credit reads."""
  context, credit = row["teacher_context"], row["credit"]["name"]
  if "medium_successes" not in context or context["medium_successes"] == (credit != "none"):
    return
  raise ValueError(
    f"method.teacher_context.medium_successes={context['medium_successes']!r} of "
    f"{context['name']!r} are the readings that a credit needs, and nothing else reads them: "
    f"it does not go with method.credit.name={credit!r}"
  )


def _check_memory(row: dict, parts: Mapping[str, Any]) -> None:
  """Refuses a memory that nothing reads, and what reads one where there is none."""
  name = row["memory"]["name"]
  readers = [a for a in ("teacher_context", "route") if getattr(parts[a], "needs_memory", False)]
  if name == "none" and readers:
    axis = readers[0]
    raise ValueError(
      f"method.{axis}.name={row[axis]['name']!r} needs a memory of questions, "
      "but method.memory.name is 'none'"
    )
  if name != "none" and not readers:
    raise ValueError(
      f"method.memory.name={name!r} would not be read: neither "
      f"teacher_context {row['teacher_context']['name']!r} nor route {row['route']['name']!r} does"
    )
