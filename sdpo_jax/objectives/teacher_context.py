"""What the teacher reads and the policy does not. Host code: text in, text or None out; no tokenizer, no arrays.

Source: templates and rules of SDPO, arXiv 2601.20802 (section 3 and its released configuration).
  * A success is a rollout of the same question with reward >= `success_threshold`.
  * The solution shown is another successful rollout of the group, never the rollout's own, without its thinking block.
  * Feedback is shown only if it says something and, by default, only where no solution is at hand.
  * A rollout with neither has no teacher (`distill_B` is 0 for it).
  * The attempt itself is not shown (their Table 6: it lowers accuracy).
Text is joined, never formatted: braces, backslashes and chat tags in a program survive as they are.
"""

import dataclasses
import re

from sdpo_jax.records import Rollout, Status

SOLUTION = "\nCorrect solution:\n\n"
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
CLOSING = "\n\nCorrectly solve the original question."
_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Context:
  """The privileged part of one teacher prompt. At least one of the two texts is not empty."""
  solution: str = ""
  feedback: str = ""

  def render(self, question: str) -> str:
    """The teacher's user message: question, solution, feedback, closing instruction."""
    return (question + (SOLUTION + self.solution if self.solution else "")
            + (FEEDBACK + self.feedback if self.feedback else "") + CLOSING)


def without_thinking(text: str) -> str:
  return _THINKING.sub("", text)


def none(group: list[Rollout], i: int) -> Context | None:
  """No teacher: for methods that learn from the reward alone."""
  return None


def feedback_or_solution(group: list[Rollout], i: int, *, success_threshold: float = 0.5, use_solution: bool = True,
                         feedback: str = "without_solution") -> Context | None:
  """Context of rollout i of one question's group. feedback: "without_solution" | "always" | "never"."""
  if feedback not in ("without_solution", "always", "never"):
    raise ValueError(f"method.teacher_context.feedback={feedback!r} is unknown; choose from ['always', 'never', 'without_solution']")
  if group[i].feedback.status is Status.ENV_FAILED:
    return None
  solution = ""
  if use_solution:
    solution = next((without_thinking(r.text) for j, r in enumerate(group)
                     if j != i and r.feedback.status is not Status.ENV_FAILED and r.feedback.reward >= success_threshold), "")
  wanted = feedback == "always" or (feedback == "without_solution" and not solution)
  shown = group[i].feedback.text if wanted else ""
  return Context(solution, shown) if solution or shown else None


TEACHER_CONTEXTS = {"none": none, "feedback_or_solution": feedback_or_solution}
