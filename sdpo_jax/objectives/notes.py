r"""Counterfactual notes: failed responses also learn from what other responses would have received.

  L = L_SDPO(y; f) + eta * 1/M * sum over m of w_m * L_SDPO(y; f + note_m)

Both losses are on the policy's own tokens y. f is what plain SDPO shows. note_m is about
alternative m: "If you had tried X instead of Y, you would have received Z". X and Y are the lines
in which alternative and attempt differ; Z is the alternative's feedback, word for word. w is 1
where the environment ran the alternative and kappa where its feedback is imagined or turned round.
M is the number of alternatives that are left once duplicates and those like the attempt are
dropped.

There are three forms:

  joint    one further reading by the teacher, with all notes and weight eta * mean(w);
           it costs one teacher pass
  each     one further reading for each alternative, as written above
  mixture  the teacher changes and the loss gains no term: q = sum over m of q_m * w_m / sum(w),
           where m = 0 is the plain reading with w = 1 and the others have eta * w_m

A mixture of softmaxes is no product of one hidden state with one matrix, which is what the
full-vocabulary kernels take. It therefore goes through the policy's top K (`kernels/distill_topk`).
Where there is no plain reading there is no mixture.

A verified alternative that succeeds has no note: it joins the group's other successes, as a
solution that may be shown. An attempt without any note has no further reading. With eta = 0 or
alternatives = 0 nothing of this runs. Alternatives are text: those of a second model are shown like
the policy's own, and their tokens are counted by its own tokenizer.

Derived here; there is no paper. Host code: text in, text out.
"""

import dataclasses

from sdpo_jax import ranges
from sdpo_jax.errors import did_you_mean, unknown
from sdpo_jax.objectives.teacher_context import (
  TEMPLATES,
  Context,
  FeedbackOrSolution,
  fill,
  without_thinking,
)
from sdpo_jax.records import Alternative, Rollout, Status

SOURCES = ("samples", "model", "branches", "beams", "siblings")
FEEDBACKS = ("imagined", "opposite", "verified")
FORMS = ("each", "joint", "mixture")
KAPPA, IMAGINED_TOKENS, BEAM_WIDTH = 0.5, 64, 4
# The imagined feedback on an alternative without fault; the judge's own may be empty.
CORRECT, INCORRECT = "Correct", "Incorrect"
IMAGINE = (
  "{prompt}\n\nThis answer\n\n{attempt}\n\nreceived the verdict\n\n{feedback}\n\n"
  "Which verdict would this answer receive?\n\n{alternative}\n\n"
  "Reply with the verdict alone, in the same form, or with the one word " + CORRECT + "."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notes:
  """The settings of counterfactual notes.

  alternatives: M, the most that one failed attempt has.
  sources, in this order: "samples" (M draws a question, which its failed attempts share), "model"
    (likewise, from a second model), "branches" (M continuations from the position of the attempt
    where the policy's entropy was highest, for each attempt: samples), "beams" (likewise: the M
    likeliest that a beam search finds), "siblings" (the rest of the group, free).
  feedback: "verified" | "imagined" (by the policy; siblings are verified in any case) | "opposite":
    a control, in which the teacher is told of each alternative that failed that it was correct, and
    of each success that it was not. What the policy learns from this, and how often the reading
    agrees with the plain one (`counterfactual/agreement`), is not owed to what notes say (arXiv
    2607.27888).
  kappa: the weight of feedback that is not the judge's; not read with "verified".
  imagined_tokens: the greatest length of imagined feedback; read with "imagined" alone.
  beam_width: the unfinished continuations that a beam search keeps, at least M; read with "beams"
    alone.
  gate: counts only tokens on which the readings with and without notes agree in sign.
  form: see the top of this file.
  model: the second model, named as config.model.path names one. It is not trained, and may have
    another tokenizer.

  Raises ValueError for values that mean nothing, or that nothing would read.
  """

  eta: float = 1.0
  alternatives: int = 2
  sources: tuple[str, ...] = ("samples",)
  feedback: str = "verified"
  kappa: float = KAPPA
  gate: bool = False
  form: str = "joint"
  imagined_tokens: int = IMAGINED_TOKENS
  beam_width: int = BEAM_WIDTH
  model: str = ""

  def __post_init__(self):
    object.__setattr__(self, "sources", tuple(self.sources))
    self._check_choices()
    self._check_ranges()
    self._check_combinations()

  @property
  def teaches(self) -> bool:
    """Tells whether the settings ask for any note at all."""
    return bool(self.eta and self.alternatives and self.sources)

  @property
  def branches(self) -> bool:
    """Tells whether attempts are gone on with from within, for which their entropy is read."""
    return not {"branches", "beams"}.isdisjoint(self.sources)

  @property
  def further_count(self) -> int:
    """The further readings by the teacher that a batch has."""
    return 1 if self.form == "joint" else self.alternatives

  def _check_choices(self) -> None:
    for source in sorted(set(self.sources) - set(SOURCES)):
      raise ValueError(
        f"method.counterfactual.sources={self.sources!r}: {source!r} is unknown"
        f"{did_you_mean(source, SOURCES)}; choose from {list(SOURCES)}"
      )
    for name, choices in (("feedback", FEEDBACKS), ("form", FORMS)):
      value = getattr(self, name)
      if value not in choices:
        raise ValueError(unknown(f"method.counterfactual.{name}", value, choices))

  def _check_ranges(self) -> None:
    for name in ("eta", "alternatives", "kappa", "imagined_tokens", "beam_width"):
      ranges.check(f"method.counterfactual.{name}", getattr(self, name))

  def _check_combinations(self) -> None:
    where = "method.counterfactual"
    if self.gate and self.form == "mixture":
      raise ValueError(
        f"{where}.gate=True compares readings, and form='mixture' makes one teacher of them: "
        "use 'joint' or 'each'"
      )
    if "model" in self.sources and not self.model:
      raise ValueError(
        f"{where}.model='' must name a second model: sources={self.sources!r} holds 'model'"
      )
    if self.model and "model" not in self.sources:
      raise ValueError(
        f"{where}.model={self.model!r} would not be read: "
        f"sources={self.sources!r} does not hold 'model'"
      )
    if self.feedback == "imagined" and set(self.sources) == {"siblings"}:
      raise ValueError(
        f"{where}.feedback='imagined' would not be read: "
        f"of sources={self.sources!r} the judge's is known"
      )
    readers = {"kappa": ("imagined", "opposite"), "imagined_tokens": ("imagined",)}
    for name, default in (("kappa", KAPPA), ("imagined_tokens", IMAGINED_TOKENS)):
      value = getattr(self, name)
      if self.feedback not in readers[name] and value != default:
        raise ValueError(
          f"{where}.{name}={value!r} would not be read: {where}.feedback is {self.feedback!r}"
        )
    self._check_beam_width(where)

  def _check_beam_width(self, where: str) -> None:
    if "beams" not in self.sources and self.beam_width != BEAM_WIDTH:
      raise ValueError(
        f"{where}.beam_width={self.beam_width} would not be read: "
        f"sources={self.sources!r} does not hold 'beams'"
      )
    if "beams" in self.sources and self.beam_width < self.alternatives:
      raise ValueError(
        f"{where}.beam_width={self.beam_width} finds fewer continuations than "
        f"{where}.alternatives={self.alternatives}"
      )


def none() -> None:
  """Lets failed responses learn from their own feedback alone."""


COUNTERFACTUALS = {"none": none, "notes": Notes}


def failed(rollout: Rollout, success_threshold: float) -> bool:
  """Tells whether the rollout was judged and does not solve its task."""
  judged = rollout.feedback.status is not Status.ENV_FAILED
  return judged and rollout.feedback.reward < success_threshold


def imagining(question: str, attempt: Rollout, alternative: Rollout) -> str:
  """Returns the message that asks which feedback the alternative would receive.

  The attempt with its own feedback, which is real, is the example.
  """
  texts = {
    "prompt": question,
    "attempt": without_thinking(attempt.text),
    "feedback": attempt.feedback.text or INCORRECT,
    "alternative": without_thinking(alternative.text),
  }
  return fill(IMAGINE, texts)


def true_feedback(alternative: Rollout, success_threshold: float) -> str:
  """Returns the reply to `imagining` that would be right."""
  return alternative.feedback.text.strip() if failed(alternative, success_threshold) else CORRECT


def opposite_feedback(alternative: Rollout, success_threshold: float) -> str:
  """Returns a verdict that is wrong, without a reason."""
  return CORRECT if failed(alternative, success_threshold) else INCORRECT


def distinct(
  alternatives: list[Alternative],
  attempt: Rollout,
  *,
  most: int,
  success_threshold: float,
  behaviour,
) -> list[Alternative]:
  """Returns at most `most` alternatives that differ, verified successes first.

  An alternative that says or does the same as the attempt, or as an earlier one, is left out.
  behaviour(rollout) is equal for responses that do the same. What an imagined alternative does is
  unknown, so its text alone counts.
  """
  texts, behaviours = {without_thinking(attempt.text).strip()}, {behaviour(attempt)}
  kept = []

  def is_no_success(a: Alternative) -> bool:
    return a.imagined is not None or failed(a.rollout, success_threshold)

  for alternative in sorted(alternatives, key=is_no_success):
    rollout, verified = alternative.rollout, alternative.imagined is None
    text = without_thinking(rollout.text).strip()
    if rollout.feedback.status is Status.ENV_FAILED or text in texts:
      continue
    if verified and behaviour(rollout) in behaviours:
      continue
    kept.append(alternative)
    texts.add(text)
    if verified:
      behaviours.add(behaviour(rollout))
  return kept[:most]


def differing(alternative: str, attempt: str) -> tuple[str, str]:
  """Returns both texts without the lines that they begin and end with alike.

  At least one line of each stays.
  """
  x, y = alternative.split("\n"), attempt.split("\n")
  while len(x) > 1 and len(y) > 1 and x[0] == y[0]:
    del x[0], y[0]
  while len(x) > 1 and len(y) > 1 and x[-1] == y[-1]:
    del x[-1], y[-1]
  return "\n".join(x), "\n".join(y)


def note(alternative: Alternative, attempt: Rollout, template: str) -> str:
  """Returns the note on one alternative; "" where its feedback is empty."""
  feedback = alternative.imagined
  if feedback is None:
    feedback = alternative.rollout.feedback.text
  if not feedback:
    return ""
  x, y = differing(
    without_thinking(alternative.rollout.text).strip(), without_thinking(attempt.text).strip()
  )
  return fill(template, {"alternative": x, "attempt": y, "feedback": feedback})


def further_readings(
  notes: Notes, teacher_context: FeedbackOrSolution, group: list[Rollout], i: int
) -> list[tuple[Context, float] | None]:
  """Returns the teacher's context and its weight in each further reading of rollout i.

  An entry is None where the reading would hold nothing that the plain one does not.
  """
  attempt, plain = group[i], teacher_context(group, i)
  if notes.form == "mixture" and plain is None:
    return [None] * notes.further_count
  per_reading = [[alternative] for alternative in attempt.alternatives]
  if notes.form == "joint":
    per_reading = [attempt.alternatives] if attempt.alternatives else []
  readings = [
    _further_reading(notes, teacher_context, group, i, alternatives) for alternatives in per_reading
  ]
  unchanged = (teacher_context.silent(attempt), plain)
  for number, (context, weight) in enumerate(readings):
    if context in unchanged or not weight:
      readings[number] = None
  return readings + [None] * (notes.further_count - len(readings))


def _further_reading(
  notes: Notes,
  teacher_context: FeedbackOrSolution,
  group: list[Rollout],
  i: int,
  alternatives: list[Alternative],
) -> tuple[Context, float]:
  """The context with notes on these alternatives, and the weight of a reading with it."""
  attempt = group[i]
  template = (TEMPLATES | dict(teacher_context.templates))["note"]
  # A verified alternative that succeeds is a success like any other of the group.
  verified = [a.rollout for a in alternatives if a.imagined is None]
  context = teacher_context(group + verified, i) or teacher_context.silent(attempt)
  text = ""
  for a in alternatives:
    if a.imagined is not None or failed(a.rollout, teacher_context.success_threshold):
      text += note(a, attempt, template)
  weight = notes.eta * sum(1.0 if a.imagined is None else notes.kappa for a in alternatives)
  if notes.form != "mixture":
    weight /= len(attempt.alternatives)
  return dataclasses.replace(context, notes=text), weight
