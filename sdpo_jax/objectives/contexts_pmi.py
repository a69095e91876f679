"""A teacher context of three readings: question with reference, question alone, reference alone.

They are what `teacher_logits.PointwiseInformation` adds up (arXiv 2607.02234). The paper does not
print its prompts. Here the question alone is the policy's own prompt. The reference alone is the
first prompt without the question: of the messages before it only the system's stay. Host code: text
in, text out.
"""

import dataclasses

from sdpo_jax.objectives.teacher_context import Context, ReferenceSolution
from sdpo_jax.records import Rollout


class QuestionAndReference(ReferenceSolution):
  """Shows the task's own solution, where it has one; else the response has no teacher."""

  further_count = 2

  def further(self, group: list[Rollout], i: int) -> list[tuple[Context, float] | None]:
    """Returns the readings of the question alone and of the reference alone, in this order."""
    both = self(group, i)
    if both is None:
      return [None] * self.further_count
    reference_alone = dataclasses.replace(both, question="hidden")
    return [(Context(question="alone"), 1.0), (reference_alone, 1.0)]
