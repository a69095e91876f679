"""The prompts under which attempts are made again: the question alone, and all that may be shown.

  control    the question alone, as the policy reads it
  own        what the configured teacher reads
  sdpo       what SDPO's teacher reads: another success of the group, else the feedback
  feedback   the feedback on the attempt
  solution   another success of the group
  reference  the solution that comes with the question
  both       the feedback and another success of the group
  attempt    the feedback, and the attempt itself
  turn       the attempt and the feedback on it, as a conversation

Every prompt but the last is rendered as the teacher's are in training, from the contexts of
`objectives/contexts.py`; in the templates of the configured one, if it is SDPO's or shows a
reference. An attempt lacks the prompts that would show nothing, but for the configured one. Host
code.
"""

import dataclasses
from typing import Callable, NamedTuple

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.conversation import Continuation, converse
from sdpo_jax.data.teacher_prompt import Shown, TeacherReader, teacher_prompt
from sdpo_jax.objectives.build import Method
from sdpo_jax.objectives.contexts import TEACHER_CONTEXTS
from sdpo_jax.objectives.teacher_context import Context, FeedbackOrSolution, ReferenceSolution
from sdpo_jax.records import Rollout, Task

CONTROL, OWN, SDPO, TURN = "control", "own", "sdpo", "turn"
# name -> what the page and the table say of it
ABOUT = {
  CONTROL: "the question alone (the policy)",
  OWN: "what the configured teacher reads",
  SDPO: "another success, else feedback",
  "feedback": "feedback",
  "solution": "another success",
  "reference": "the question's own solution",
  "both": "feedback and another success",
  "attempt": "feedback and the attempt",
  TURN: "feedback as a second turn",
}
# name -> (context of `TEACHER_CONTEXTS`, its settings): how config.method.teacher_context would be
# set so that the teacher reads this
CONTEXTS = {
  SDPO: ("feedback_or_solution", {}),
  "feedback": ("feedback_or_solution", dict(use_solution=False, feedback="always")),
  "solution": ("feedback_or_solution", dict(feedback="never")),
  "reference": ("reference_solution", {}),
  "both": ("feedback_or_solution", dict(feedback="always")),
  "attempt": (
    "feedback_or_solution",
    dict(use_solution=False, feedback="always", show_attempt=True),
  ),
}


class Prompt(NamedTuple):
  """What is read before an attempt is made again."""

  tokens: list[int]
  shown: Shown | None  # None: the question alone, or a conversation
  says_nothing: bool = False  # it would be the same without the texts of its context


@dataclasses.dataclass
class PromptMaker:
  """Renders the prompts of attempts.

  messages(task): the chat messages that ask the question.
  method: the one whose teacher is "own"; it has a teacher.
  max_tokens: of every prompt with a context.
  """

  chat: Chat
  messages: Callable[[Task], list[dict[str, str]]]
  method: Method
  max_tokens: int

  def __post_init__(self):
    own = self.method.teacher_context
    self.success_threshold = getattr(own, "success_threshold", 0.5)
    self._own = self._reader(own)
    has_plain_templates = isinstance(own, (FeedbackOrSolution, ReferenceSolution))
    templates = {"templates": dict(own.templates)} if has_plain_templates else {}
    self._readers = {}
    for name, (context, settings) in CONTEXTS.items():
      settings = settings | templates
      if context == "feedback_or_solution":
        settings |= {"success_threshold": self.success_threshold}
      self._readers[name] = self._reader(TEACHER_CONTEXTS[context](**settings))
    self._continuation = Continuation(self.chat)

  @property
  def conversations(self) -> str:
    """Says how a second turn departs from the chat template; "" where it does not."""
    continuation = self._continuation
    return "" if continuation.finding.way == "exact" else continuation.describe()

  def succeeded(self, rollout: Rollout) -> bool:
    """Tells whether an attempt was judged and solves its question."""
    return rollout.is_judged and rollout.feedback.reward >= self.success_threshold

  def of_group(self, group: list[Rollout]) -> list[dict[str, Prompt]]:
    """Returns {name: prompt} of each attempt of a group, in the order of ABOUT."""
    standing = None
    if self.method.memory is not None:
      _, standing = self.method.route(group, self.method.memory.visit(group))
    own, *_ = self._own.of_group(group, standing)
    others = {name: reader.of_group(group)[0] for name, reader in self._readers.items()}
    return [
      self._of_attempt(rollout, own[i], {name: shown[i] for name, shown in others.items()})
      for i, rollout in enumerate(group)
    ]

  def shown(self, task: Task, context: Context) -> list[int]:
    """Returns the teacher's prompt for a question with a context that may be another's."""
    return teacher_prompt(self.chat, self.messages(task), context, self.max_tokens)[0]

  def _of_attempt(
    self, rollout: Rollout, own: Shown | None, others: dict[str, Shown | None]
  ) -> dict[str, Prompt]:
    if not rollout.is_judged:
      return {}
    prompts = {CONTROL: Prompt(rollout.prompt_tokens, None)}
    if own is not None:
      prompts[OWN] = self._prompt(rollout.task, own)
    both = others["both"]
    if both is not None and not (both.context.solution and both.context.feedback):
      others = others | {"both": None}
    if self.succeeded(rollout):  # nobody needs to be told what solved it
      others = {SDPO: others[SDPO]}
    shown = {name: self._prompt(rollout.task, x) for name, x in others.items() if x}
    prompts |= {name: prompt for name, prompt in shown.items() if not prompt.says_nothing}
    turn = None if self.succeeded(rollout) else self._turn(rollout)
    return prompts | ({TURN: Prompt(turn, None)} if turn else {})

  def _reader(self, context: Callable) -> TeacherReader:
    return TeacherReader(self.chat, self.messages, context, self.max_tokens)

  def _prompt(self, task: Task, shown: Shown) -> Prompt:
    silent = shown.context != shown.context.without_texts() and self._own.says_nothing(
      task, shown.context, shown.prompt
    )
    return Prompt(shown.prompt, shown, silent)

  def _turn(self, rollout: Rollout) -> list[int] | None:
    """Returns the conversation after the feedback; None where there is none, or no room for it."""
    if not rollout.feedback.text:
      return None
    held = converse(self._continuation, self.messages(rollout.task), [rollout])
    return held.prompt if len(held.prompt) <= self.max_tokens else None
