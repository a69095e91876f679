"""One JSON object per response: the lines of a run's rollout files."""

import numpy as np

from sdpo_jax.data.batch import Packed
from sdpo_jax.data.chat import Chat


def rollout_lines(step: int, packed: Packed, said, chat: Chat, kept: int):
  """One JSON-able object per response: what was asked, answered, said about it, read by the teacher, and the gap per token in nats."""
  gap_BR = (
    np.asarray(said.logp_teacher_BR) - np.asarray(said.logp_BR)
    if said is not None and said.logp_teacher_BR is not None
    else None
  )
  for b, (r, context) in enumerate(list(zip(packed.rollouts, packed.contexts))[:kept]):
    line = {
      "step": step,
      "task_id": r.task.id,
      "prompt": r.task.prompt,
      "response": r.text,
      "reward": r.feedback.reward,
      "status": r.feedback.status.value,
      "finish_reason": r.finish_reason,
      "feedback": r.feedback.text,
      "teacher_context": None if context is None else context.render(r.task.prompt),
      "tokens": chat.token_strings(r.tokens),
    }
    if gap_BR is not None and context is not None:
      line["teacher_gap"] = [round(float(x), 4) for x in gap_BR[b, : len(r.tokens)]]
    if r.alternatives:
      line["counterfactuals"] = [
        {
          "source": a.source,
          "response": a.rollout.text,
          "reward": a.rollout.feedback.reward,
          "feedback": a.rollout.feedback.text,
          "imagined": a.imagined,
        }
        for a in r.alternatives
      ]
    told = [c[b].render(r.task.prompt) for c in packed.counterfactuals if c[b] is not None]
    yield line | ({"counterfactual_contexts": told} if told else {})
