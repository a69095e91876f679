r"""What failed responses also learn from what might have been: other responses to the question, and what they would have received.

  L = L_SDPO(y; f) + eta * 1/M * sum over m of w_m * L_SDPO(y; f + note_m)          always on the student's own tokens y

f is what plain SDPO shows; note_m says "If you had tried X instead of Y, you would have received Z" of alternative m, X and Y being the lines
in which the two differ and Z its feedback, word for word. Two forms: "joint", one further reading by the teacher with all notes and weight
eta * mean(w), which costs one teacher pass; "each", one reading for each alternative, as written.
A third, "mixture", changes the teacher instead of adding to the loss: q = sum over m of q_m * w_m / sum(w), m = 0 being the plain reading with
w = 1 and the others one for each alternative with eta * w_m. It goes through the policy's top K (`kernels/distill_topk`), since a mixture of softmaxes
is no product of one hidden state with one matrix, which is what the full-vocabulary kernels take; where there is no plain reading there is no mixture. w is 1 where the environment ran the alternative and kappa
where the policy imagined the feedback. A verified alternative that succeeds has no note: it joins the group's other successes, as a solution
that may be shown. M is the number of alternatives that are left after duplicates and those like the attempt are dropped. An attempt that
nothing is told about has no further reading. With eta = 0 or alternatives = 0 the part is None and nothing of it runs.

Alternatives are text: those of a second model are told and shown like the policy's own, and their tokens are counted by its own tokenizer.

Derived here; there is no paper. Host code: text in, text out.
"""

import dataclasses
from typing import NamedTuple

from sdpo_jax.objectives.teacher_context import (
  TEMPLATES,
  Context,
  fill,
  own_templates,
  without_thinking,
)
from sdpo_jax.records import Alternative, Rollout, Status

SOURCES = ("samples", "model", "branches", "siblings")


KAPPA, IMAGINED_TOKENS = 0.5, 64


# the feedback that is imagined of an alternative without fault; the judge's own may be empty
CORRECT = "Correct"


IMAGINE = (
  "{prompt}\n\nThis answer\n\n{attempt}\n\nreceived the verdict\n\n{feedback}\n\nWhich verdict would this answer receive?\n\n{alternative}\n\n"
  "Reply with the verdict alone, in the same form, or with the one word " + CORRECT + "."
)


class Part(NamedTuple):
  """The settings of `notes`."""

  eta: float
  alternatives: int
  sources: tuple[str, ...]
  feedback: str
  kappa: float
  gate: bool
  form: str
  imagined_tokens: int
  model: str = ""

  @property
  def readings(self) -> int:
    return 1 if self.form == "joint" else self.alternatives


def none() -> None:
  """Failed responses learn from their own feedback alone."""


def notes(
  *,
  eta: float = 1.0,
  alternatives: int = 2,
  sources: tuple[str, ...] = ("samples",),
  feedback: str = "verified",
  kappa: float = KAPPA,
  gate: bool = False,
  form: str = "joint",
  imagined_tokens: int = IMAGINED_TOKENS,
  model: str = "",
) -> Part | None:
  """alternatives: M, the most that are told to one failed attempt. sources, in this order: "samples" (M draws a question, which its failed attempts
  share), "model" (likewise, from a second model), "branches" (M continuations from the attempt's most uncertain position, for each
  attempt), "siblings" (the rest of the group, free).

  model: the second one, named as config.model.path names one; it is not trained, and may have another tokenizer.
  feedback: "verified" | "imagined" (siblings are verified in any case); imagined_tokens: the longest feedback that the policy may imagine; it and
  kappa are read with "imagined" alone.
  gate: only tokens of which the readings with and without notes say the same.
  """
  if unknown := set(sources) - set(SOURCES):
    raise ValueError(
      f"method.counterfactual.sources={tuple(sources)!r}: {sorted(unknown)[0]!r} is unknown; choose from {list(SOURCES)}"
    )
  for name, value, allowed in (
    ("feedback", feedback, ("imagined", "verified")),
    ("form", form, ("each", "joint", "mixture")),
  ):
    if value not in allowed:
      raise ValueError(
        f"method.counterfactual.{name}={value!r} is unknown; choose from {list(allowed)}"
      )
  for name, value, most in (
    ("eta", eta, float("inf")),
    ("alternatives", alternatives, float("inf")),
    ("kappa", kappa, 1.0),
  ):
    if not 0 <= value <= most:
      raise ValueError(
        f"method.counterfactual.{name}={value!r} must be at least 0{f' and at most {most:g}' if most == 1.0 else ''}"
      )
  if gate and form == "mixture":
    raise ValueError(
      "method.counterfactual.gate=True compares readings, and form='mixture' makes one teacher of them: use 'joint' or 'each'"
    )
  if imagined_tokens < 1:
    raise ValueError(
      f"method.counterfactual.imagined_tokens={imagined_tokens!r} must be at least 1"
    )
  if "model" in sources and not model:
    raise ValueError(
      f"method.counterfactual.model='' must name a second model: sources={tuple(sources)!r} holds 'model'"
    )
  if model and "model" not in sources:
    raise ValueError(
      f"method.counterfactual.model={model!r} would not be read: sources={tuple(sources)!r} does not hold 'model'"
    )
  if feedback == "imagined" and set(sources) == {"siblings"}:
    raise ValueError(
      f"method.counterfactual.feedback='imagined' would not be read: of sources={tuple(sources)!r} the judge's is known"
    )
  for name, value, default in (
    ("kappa", kappa, KAPPA),
    ("imagined_tokens", imagined_tokens, IMAGINED_TOKENS),
  ):
    if feedback == "verified" and value != default:
      raise ValueError(
        f"method.counterfactual.{name}={value!r} would not be read: method.counterfactual.feedback is 'verified'"
      )
  return (
    Part(eta, alternatives, tuple(sources), feedback, kappa, gate, form, imagined_tokens, model)
    if eta and alternatives and sources
    else None
  )


COUNTERFACTUALS = {"none": none, "notes": notes}


def failed(rollout: Rollout, success_threshold: float) -> bool:
  return (
    rollout.feedback.status is not Status.ENV_FAILED and rollout.feedback.reward < success_threshold
  )


def imagining(question: str, attempt: Rollout, alternative: Rollout) -> str:
  """The message that asks which feedback the alternative would receive; the attempt's own, which is real, is the example."""
  return fill(
    IMAGINE,
    {
      "prompt": question,
      "attempt": without_thinking(attempt.text),
      "feedback": attempt.feedback.text or "Incorrect",
      "alternative": without_thinking(alternative.text),
    },
  )


def truth(alternative: Rollout, success_threshold: float) -> str:
  """The right reply to it."""
  return alternative.feedback.text.strip() if failed(alternative, success_threshold) else CORRECT


def distinct(
  alternatives: list[Alternative],
  attempt: Rollout,
  *,
  most: int,
  success_threshold: float,
  behaviour,
) -> list[Alternative]:
  """At most `most`, verified successes first; without those that say or do the same as the attempt or as an earlier one.

  behaviour(rollout): equal for responses that do the same. Of an imagined alternative nobody knows what it does: its text alone counts.
  """
  texts, behaviours, kept = {without_thinking(attempt.text).strip()}, {behaviour(attempt)}, []
  for a in sorted(
    alternatives, key=lambda a: a.imagined is not None or failed(a.rollout, success_threshold)
  ):
    text = without_thinking(a.rollout.text).strip()
    if (
      a.rollout.feedback.status is Status.ENV_FAILED
      or text in texts
      or (a.imagined is None and behaviour(a.rollout) in behaviours)
    ):
      continue
    kept.append(a)
    texts.add(text)
    if a.imagined is None:
      behaviours.add(behaviour(a.rollout))
  return kept[:most]


def differing(alternative: str, attempt: str) -> tuple[str, str]:
  """Both without the lines that they begin and end with alike; at least one line of each stays."""
  x, y = alternative.split("\n"), attempt.split("\n")
  while len(x) > 1 and len(y) > 1 and x[0] == y[0]:
    del x[0], y[0]
  while len(x) > 1 and len(y) > 1 and x[-1] == y[-1]:
    del x[-1], y[-1]
  return "\n".join(x), "\n".join(y)


def note(alternative: Alternative, attempt: Rollout, template: str) -> str:
  """ "" where nothing was said of the alternative."""
  said = alternative.rollout.feedback.text if alternative.imagined is None else alternative.imagined
  x, y = differing(
    without_thinking(alternative.rollout.text).strip(), without_thinking(attempt.text).strip()
  )
  return fill(template, {"alternative": x, "attempt": y, "feedback": said}) if said else ""


def readings(
  part: Part,
  teacher_context,
  group: list[Rollout],
  i: int,
  *,
  success_threshold: float,
  show_attempt: bool = False,
  templates: dict[str, str] = TEMPLATES,
) -> list[tuple[Context, float] | None]:
  """What the teacher reads of rollout i in each further reading, and its weight; None: nothing that it has not read already.

  show_attempt, templates: those of teacher_context, which hold where it shows nothing as well.
  """
  attempt, plain, found = group[i], teacher_context(group, i), []
  silent = Context(attempt=attempt.text if show_attempt else "", templates=own_templates(templates))
  told = [attempt.alternatives] if part.form == "joint" else [[a] for a in attempt.alternatives]
  for chosen in filter(None, told if part.form != "mixture" or plain else []):
    verified = [a.rollout for a in chosen if a.imagined is None]
    shown = teacher_context(group + verified, i)  # one that succeeds is a success like any other
    text = "".join(
      note(a, attempt, (TEMPLATES | templates)["note"])
      for a in chosen
      if a.imagined is not None or failed(a.rollout, success_threshold)
    )
    context = dataclasses.replace(shown or silent, notes=text)
    weight = (
      part.eta
      * sum(1.0 if a.imagined is None else part.kappa for a in chosen)
      / (1 if part.form == "mixture" else len(attempt.alternatives))
    )
    changed = context not in (silent, plain)
    found.append((context, weight) if changed and weight else None)
  return found + [None] * (part.readings - len(found))
