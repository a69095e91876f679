"""What the teacher reads and the policy does not.

A teacher context is made from its settings and called as context(group, i): it returns the
`Context` of rollout i among the responses to one question, or None where it has no teacher.
Host code: text in, text out; no tokenizer, no arrays.

Source: templates and rules of SDPO, arXiv 2601.20802 (section 3 and its released configuration).
  * A success is a rollout of the same question with reward >= `success_threshold`.
  * The solution shown is another successful rollout of the group, never the rollout's own, without
    its thinking block.
  * Feedback is shown only if it says something and, by default, only where no solution is at hand.
  * A rollout with neither has no teacher: its reading has weight 0.
  * The attempt itself is not shown by default (their Table 6: it lowers accuracy from 48.3 to
    44.5).
`ReferenceSolution` shows the task's own solution instead, as OPSD does (arXiv 2601.18734).
`SolutionAndVerdict` adds a line that says whether the attempt was right, and `Instruction` shows
nothing but a text of the method's own. Further contexts have files of their own; `contexts.py`
lists all.

Templates are settings, in which a name in braces stands for a text. They are split, never
formatted, and what is put in is not looked at again: braces, backslashes and chat tags in a program
survive.
"""

import dataclasses
import re
import zlib

from sdpo_jax import thought
from sdpo_jax.errors import unknown
from sdpo_jax.records import Rollout, Status

SOLUTION = "\nCorrect solution:\n\n"
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
CLOSING = "\n\nCorrectly solve the original question."
TEMPLATES = {
  "reprompt": "{prompt}{attempt}{solution}{more_solutions}{failures}{feedback}{notes}" + CLOSING,
  "attempt": "\nYour earlier attempt:\n\n{text}",
  "solution": SOLUTION + "{text}",
  # of `objectives/contexts_peers.py`
  "more_solution": "\nAnother correct solution:\n\n{text}",
  "failure": "\nA wrong answer, which does not solve the question:\n\n{text}",
  "feedback": FEEDBACK + "{text}",
  # of `objectives/notes.py`
  "note": (
    "\nIf you had tried\n{alternative}\ninstead of\n{attempt}\nyou would have received\n{feedback}"
  ),
}
# The names that a template may put in braces; those that are not listed here take {text}.
TEXTS = {
  "reprompt": (
    "prompt",
    "attempt",
    "solution",
    "more_solutions",
    "failures",
    "feedback",
    "notes",
    "remark",
  ),
  "note": ("alternative", "attempt", "feedback"),
}
_FIELD = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Context:
  """The privileged part of one teacher prompt."""

  solution: str = ""
  feedback: str = ""
  attempt: str = ""
  templates: tuple[tuple[str, str], ...] = ()  # those that differ from TEMPLATES
  notes: str = ""  # what alternatives would have received, templates filled in
  remark: str = ""  # a text of the method's own, which is never shortened
  more_solutions: str = ""  # beside the first one, templates filled in
  failures: str = ""  # wrong answers to the question, templates filled in
  # "shown"; "hidden": it stands nowhere in the prompt; "alone": the prompt is the policy's own
  question: str = "shown"
  remembered: bool = False  # the solution is of an earlier visit to the question
  # Of an episode, what stands before each of its turns, templates filled in; "": no reading of that
  # turn. Then the other texts are empty.
  turns: tuple[str, ...] = ()
  # Whether the turns with a reading count alike in the divergence; else their tokens do.
  turns_alike: bool = False

  def without_texts(self) -> "Context":
    """Returns the context whose templates have nothing to be filled with."""
    return Context(templates=self.templates)

  def render(self, question: str) -> str:
    """Returns the teacher's user message: question, context, closing instruction."""
    if self.question == "alone":
      return question
    if self.turns:
      return question + "".join(self.turns)
    templates = TEMPLATES | dict(self.templates)
    texts = {"prompt": "" if self.question == "hidden" else question}
    for name in ("notes", "more_solutions", "failures", "remark"):
      texts[name] = getattr(self, name)
    for name in ("attempt", "solution", "feedback"):
      text = getattr(self, name)
      texts[name] = fill(templates[name], {"text": text}) if text else ""
    return fill(templates["reprompt"], texts)


def fill(template: str, texts: dict[str, str]) -> str:
  """Puts each text in the place of its name in braces; ValueError for a name without a text."""
  pieces = _FIELD.split(template)
  for name in pieces[1::2]:
    if name not in texts:
      raise ValueError(f"template {template!r} asks for {{{name}}}; choose from {sorted(texts)}")
  return "".join(texts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def without_thinking(text: str) -> str:
  """Returns the text after the last thinking block, which is what the environments judge.

  It is "" where a block is open at the end: an unfinished thought is no answer.
  """
  answer, is_open = thought.split(text)
  if is_open:
    return ""
  return text if answer == text else answer.lstrip()


def changed_templates(templates: dict[str, str]) -> tuple[tuple[str, str], ...]:
  """Returns the templates that differ from TEMPLATES, sorted by name.

  Raises ValueError for one that does not exist, or that asks for a text that it does not get.
  """
  changed = []
  for name, template in sorted(templates.items()):
    if name not in TEMPLATES:
      raise ValueError(
        f"method.teacher_context.templates.{name} is not a template; "
        f"choose from {sorted(TEMPLATES)}"
      )
    try:
      fill(template, dict.fromkeys(TEXTS.get(name, ("text",)), ""))
    except ValueError as error:
      raise ValueError(f"method.teacher_context.templates.{name}: {error}") from error
    if template != TEMPLATES[name]:
      changed.append((name, template))
  return tuple(changed)


class NoTeacher:
  """Shows nothing, for methods that learn from the reward alone."""

  def __call__(self, group: list[Rollout], i: int) -> None:
    return None


class QuestionAlone:
  """Shows what the policy reads, and nothing more: an anchor, and no distillation.

  The teacher differs by its weights alone. With `ema` the policy is held near its own past, as with
  an exponential-moving-average anchor beside GRPO; with `frozen` near where the run began.
  """

  is_anchor = True  # a run begins with a teacher that says what the policy says

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    if group[i].feedback.status is Status.ENV_FAILED:
      return None
    return Context(question="alone")


class FeedbackOrSolution:
  """Shows another success of the group, or else the feedback on the attempt (SDPO).

  demonstration: which success is shown: "first" | "shortest" | "random"; random shows the same one
    whenever the same rollout is looked at.
  feedback: when it is shown: "without_solution" | "always" | "never".
  only_failures, only_successes: the other responses have no teacher.
  templates: replaces entries of TEMPLATES.
  """

  def __init__(
    self,
    *,
    success_threshold: float = 0.5,
    use_solution: bool = True,
    demonstration: str = "first",
    feedback: str = "without_solution",
    show_attempt: bool = False,
    only_failures: bool = False,
    only_successes: bool = False,
    templates: dict[str, str] = TEMPLATES,
  ):
    _choose("feedback", feedback, ("always", "never", "without_solution"))
    _choose("demonstration", demonstration, ("first", "random", "shortest"))
    if only_failures and only_successes:
      raise ValueError(
        "method.teacher_context.only_failures and only_successes leave nothing to teach: "
        "set one of them to False"
      )
    self.success_threshold, self.use_solution = success_threshold, use_solution
    self.demonstration, self.feedback = demonstration, feedback
    self.show_attempt = show_attempt
    self.only_failures, self.only_successes = only_failures, only_successes
    self.templates = changed_templates(templates)

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    rollout = group[i]
    if rollout.feedback.status is Status.ENV_FAILED:
      return None
    is_left_out = self.only_failures if self.succeeded(rollout) else self.only_successes
    if is_left_out:
      return None
    solution = self._solution(group, i) if self.use_solution else ""
    shows_feedback = self.feedback == "always" or (
      self.feedback == "without_solution" and not solution
    )
    feedback = rollout.feedback.text if shows_feedback else ""
    if not solution and not feedback:
      return None
    return dataclasses.replace(self.silent(rollout), solution=solution, feedback=feedback)

  @property
  def needs_success(self) -> bool:
    """Tells whether nothing is shown before a response of the group succeeds."""
    return self.feedback == "never"

  def silent(self, rollout: Rollout) -> Context:
    """Returns the context that reveals nothing: the attempt, if it is shown, and the templates."""
    return Context(attempt=rollout.text if self.show_attempt else "", templates=self.templates)

  def succeeded(self, rollout: Rollout) -> bool:
    """Tells whether the rollout was judged and solves its task."""
    judged = rollout.feedback.status is not Status.ENV_FAILED
    return judged and rollout.feedback.reward >= self.success_threshold

  def _solution(self, group: list[Rollout], i: int) -> str:
    """The success that demonstrates the task to rollout i; "" where all others failed."""
    others = [r for j, r in enumerate(group) if j != i]
    successes = [without_thinking(r.text) for r in others if self.succeeded(r)]
    if not successes:
      return ""
    if self.demonstration == "shortest":
      return min(successes, key=len)
    if self.demonstration == "random":
      return successes[zlib.crc32(f"{group[i].task.id}/{i}".encode()) % len(successes)]
    return successes[0]


class ReferenceSolution:
  """Shows the task's own solution, where it has one (OPSD)."""

  needs_solution = True

  def __init__(self, *, templates: dict[str, str] = TEMPLATES):
    self.templates = changed_templates(templates)

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    solution = without_thinking(group[i].task.solution or "")
    if group[i].feedback.status is Status.ENV_FAILED or not solution:
      return None
    return Context(solution, templates=self.templates)


class SolutionAndVerdict:
  """Shows another success of the group, or else the task's own solution, and the attempt's outcome.

  Source: Anti-SD, arXiv 2605.11609. The words are ours. A response whose question has neither a
  solution of its own nor another success has no teacher.
  """

  RIGHT = "Your earlier attempt at the question was right."
  WRONG = "Your earlier attempt at the question was wrong."

  def __init__(self, *, success_threshold: float = 0.5):
    self.success_threshold = success_threshold
    self._group = FeedbackOrSolution(success_threshold=success_threshold, feedback="never")
    self._reference = ReferenceSolution()
    self.templates = (("reprompt", "{prompt}{solution}\n\n{remark}" + CLOSING),)
    self.remark = max(self.RIGHT, self.WRONG, key=len)  # the longest there is

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    context = self._group(group, i) or self._reference(group, i)
    if context is None:
      return None
    remark = self.RIGHT if self._group.succeeded(group[i]) else self.WRONG
    return dataclasses.replace(context, remark=remark, templates=self.templates)


class Instruction:
  """Shows the question and a text of the method's own, the same for every response (CRISP, CSCR).

  text: of the plain reading.
  further_texts: of further readings, one each, for a credit that compares them with the plain one.

  Sources: CRISP, arXiv 2603.05433; CSCR, arXiv 2607.27888.
  """

  def __init__(self, *, text: str, further_texts: tuple[str, ...] = ()):
    for setting, value in [("text", text), *(("further_texts", x) for x in further_texts)]:
      if not value.strip():
        raise ValueError(
          f"method.teacher_context.{setting}={value!r} must say something to the teacher"
        )
    self.templates = (("reprompt", "{prompt}\n\n{remark}"),)
    self.further_count = len(further_texts)
    self.remark = max(text, *further_texts, key=len)  # the longest there is
    self._text, self._further_texts = text, further_texts

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    return self._context(group[i], self._text)

  def further(self, group: list[Rollout], i: int) -> list[tuple[Context, float] | None]:
    """Returns the context of each further reading of rollout i, with its weight."""
    contexts = [self._context(group[i], text) for text in self._further_texts]
    return [None if context is None else (context, 1.0) for context in contexts]

  def _context(self, rollout: Rollout, text: str) -> Context | None:
    if rollout.feedback.status is Status.ENV_FAILED:
      return None
    return Context(remark=text, templates=self.templates)


def _choose(setting: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(unknown(f"method.teacher_context.{setting}", value, choices))
