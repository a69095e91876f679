"""A teacher context of several answers by peers: successes of the group, and failures beside them.

Source: MOPD, arXiv 2605.12652, section 4. Which peers are shown is not printed; they are taken by
their position in the group here. Host code: text in, text out.
"""

from sdpo_jax.objectives.teacher_context import (
  TEMPLATES,
  Context,
  changed_templates,
  fill,
  without_thinking,
)
from sdpo_jax.records import Rollout, Status


class Peers:
  """Shows the first successes of the others in the group, and the first failures, marked as such.

  A response to whose question no other one succeeds has no teacher. Where there are fewer
  successes or failures than asked for, those that there are are shown. Thinking blocks are removed;
  a response of which nothing is left is none. No feedback is shown.

  solutions, failures: the most that are shown.
  templates: replaces entries of TEMPLATES.
  """

  needs_success = True

  def __init__(
    self,
    *,
    success_threshold: float = 0.5,
    solutions: int = 2,
    failures: int = 1,
    templates: dict[str, str] = TEMPLATES,
  ):
    self.success_threshold = success_threshold
    self.solutions, self.failures = solutions, failures
    self.templates = changed_templates(templates)
    self._texts = TEMPLATES | dict(self.templates)
    for asked, field in ((solutions > 1, "more_solutions"), (failures > 0, "failures")):
      if asked and f"{{{field}}}" not in self._texts["reprompt"]:
        raise ValueError(
          f"method.teacher_context.templates.reprompt={self._texts['reprompt']!r} has no "
          f"{{{field}}}: the teacher would not read what solutions={solutions}, "
          f"failures={failures} ask for"
        )

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    if group[i].feedback.status is Status.ENV_FAILED:
      return None
    others = [r for j, r in enumerate(group) if j != i]
    first, *more = self._answers(others, succeeded=True)[: self.solutions] or [""]
    if not first:
      return None
    failures = self._answers(others, succeeded=False)[: self.failures]
    return Context(
      solution=first,
      more_solutions=self._filled("more_solution", more),
      failures=self._filled("failure", failures),
      templates=self.templates,
    )

  def _answers(self, rollouts: list[Rollout], *, succeeded: bool) -> list[str]:
    """Returns what those that solve their task say, or those that do not."""
    answers = []
    for rollout in rollouts:
      judged = rollout.feedback.status is not Status.ENV_FAILED
      if judged and (rollout.feedback.reward >= self.success_threshold) == succeeded:
        answers.append(without_thinking(rollout.text).strip())
    return [answer for answer in answers if answer]

  def _filled(self, template: str, texts: list[str]) -> str:
    return "".join(fill(self._texts[template], {"text": text}) for text in texts)
