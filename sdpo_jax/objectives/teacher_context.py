"""What the teacher reads and the policy does not. Host code: text in, text or None out; no tokenizer, no arrays.

Source: templates and rules of SDPO, arXiv 2601.20802 (section 3 and its released configuration).
  * A success is a rollout of the same question with reward >= `success_threshold`.
  * The solution shown is another successful rollout of the group, never the rollout's own, without its thinking block.
  * Feedback is shown only if it says something and, by default, only where no solution is at hand.
  * A rollout with neither has no teacher (`distill_B` is 0 for it).
  * The attempt itself is not shown by default (their Table 6: it lowers accuracy from 48.3 to 44.5).
`reference_solution` shows the task's own solution instead, as OPSD does (arXiv 2601.18734).

Templates are settings; a name in braces stands for a text. They are split, never formatted, and what is put in is not looked at
again: braces, backslashes and chat tags in a program survive as they are.
"""

import dataclasses
import re
import zlib

from sdpo_jax.records import Rollout, Status

SOLUTION = "\nCorrect solution:\n\n"
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
CLOSING = "\n\nCorrectly solve the original question."
TEMPLATES = {
  "reprompt": "{prompt}{attempt}{solution}{feedback}{notes}" + CLOSING,
  "attempt": "\nYour earlier attempt:\n\n{text}",
  "solution": SOLUTION + "{text}",
  "feedback": FEEDBACK + "{text}",
  # `counterfactual`
  "note": "\nIf you had tried\n{alternative}\ninstead of\n{attempt}\nyou would have received\n{feedback}",
}
# the others: one text
TEXTS = {
  "reprompt": ("prompt", "attempt", "solution", "feedback", "notes"),
  "note": ("alternative", "attempt", "feedback"),
}
# the chat template may have opened the block
_THINKING = re.compile(r"\A.*</think>\s*", re.DOTALL)
_FIELD = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Context:
  """The privileged part of one teacher prompt. Solution, feedback and notes are not all empty."""

  solution: str = ""
  feedback: str = ""
  attempt: str = ""
  templates: tuple[tuple[str, str], ...] = ()  # those that differ from TEMPLATES
  # what alternatives would have received, templates filled in (`counterfactual`)
  notes: str = ""

  def render(self, question: str) -> str:
    """The teacher's user message: question, what is shown, closing instruction."""
    templates = TEMPLATES | dict(self.templates)
    parts = {
      name: fill(templates[name], {"text": text}) if text else ""
      for name, text in (
        ("attempt", self.attempt),
        ("solution", self.solution),
        ("feedback", self.feedback),
      )
    }
    return fill(templates["reprompt"], {"prompt": question, "notes": self.notes} | parts)


def fill(template: str, texts: dict[str, str]) -> str:
  """Puts each text in the place of its name in braces. ValueError for a name that is not there."""
  pieces = _FIELD.split(template)
  for name in pieces[1::2]:
    if name not in texts:
      raise ValueError(f"template {template!r} asks for {{{name}}}; choose from {sorted(texts)}")
  return "".join(texts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def without_thinking(text: str) -> str:
  """What the environments judge: the text after the last thinking block."""
  return _THINKING.sub("", text)


def none(group: list[Rollout], i: int) -> Context | None:
  """No teacher: for methods that learn from the reward alone."""
  return None


def feedback_or_solution(
  group: list[Rollout],
  i: int,
  *,
  success_threshold: float = 0.5,
  use_solution: bool = True,
  demonstration: str = "first",
  feedback: str = "without_solution",
  show_attempt: bool = False,
  only_failures: bool = False,
  templates: dict[str, str] = TEMPLATES,
) -> Context | None:
  """Context of rollout i of one question's group.

  demonstration: which success is shown: "first" | "shortest" | "random" (the same one whenever the same rollout is asked about)
  feedback: "without_solution" | "always" | "never"; only_failures: a success has no teacher; templates: replaces entries of TEMPLATES
  """
  for name, value, allowed in (
    ("feedback", feedback, ("always", "never", "without_solution")),
    ("demonstration", demonstration, ("first", "random", "shortest")),
  ):
    if value not in allowed:
      raise ValueError(
        f"method.teacher_context.{name}={value!r} is unknown; choose from {list(allowed)}"
      )
  templates = own_templates(templates)
  if group[i].feedback.status is Status.ENV_FAILED or (
    only_failures and group[i].feedback.reward >= success_threshold
  ):
    return None
  successes = [
    without_thinking(r.text)
    for j, r in enumerate(group)
    if use_solution
    and j != i
    and r.feedback.status is not Status.ENV_FAILED
    and r.feedback.reward >= success_threshold
  ]
  solution = ""
  if successes:
    solution = {
      "first": lambda: successes[0],
      "shortest": lambda: min(successes, key=len),
      "random": lambda: successes[zlib.crc32(f"{group[i].task.id}/{i}".encode()) % len(successes)],
    }[demonstration]()
  shown = (
    group[i].feedback.text
    if feedback == "always" or (feedback == "without_solution" and not solution)
    else ""
  )
  if not solution and not shown:
    return None
  return Context(solution, shown, group[i].text if show_attempt else "", templates)


def reference_solution(
  group: list[Rollout], i: int, *, templates: dict[str, str] = TEMPLATES
) -> Context | None:
  """The task's own solution, where it has one (OPSD)."""
  templates = own_templates(templates)
  if group[i].feedback.status is Status.ENV_FAILED or not group[i].task.solution:
    return None
  return Context(without_thinking(group[i].task.solution), templates=templates)


def own_templates(templates: dict[str, str]) -> tuple[tuple[str, str], ...]:
  """Those that differ from TEMPLATES. ValueError for one that does not exist, or asks for a text that it does not get."""
  for name, template in templates.items():
    if name not in TEMPLATES:
      raise ValueError(
        f"method.teacher_context.templates.{name} is not a template; choose from {sorted(TEMPLATES)}"
      )
    fill(template, dict.fromkeys(TEXTS.get(name, ("text",)), ""))
  return tuple(
    sorted((name, template) for name, template in templates.items() if template != TEMPLATES[name])
  )


TEACHER_CONTEXTS = {
  "none": none,
  "feedback_or_solution": feedback_or_solution,
  "reference_solution": reference_solution,
}
