"""Makes the lines of a run's rollout files: one JSON object per response.

The report (`report/rollouts.py`, `report/cards.py`) reads these names from the files, all but
prompt_read:

  step, task_id, prompt, response, reward, status, finish_reason, feedback, tokens
  prompt_read              what the policy read before its response: the prompt's tokens as text, as
                           the environment's messages and the model's template made them
  teacher_context          what the teacher read; null: nothing
  learns_from              "teacher" | "reward" | null: neither; where responses are routed to one
  teacher_gap              log q - log pi of each token in nats, where the response has a teacher
  counterfactuals          the alternatives to a failed attempt: source, response, reward, feedback,
                           imagined
  reflection               what the policy wrote of its episode in hindsight, where it was asked
  turns                    of an episode: message, tokens (how many of the response's), observation
                           (null: the world was not asked any more, or did not answer), reward of
                           the episode so far, valid, and teacher_context: what the teacher read
                           before this turn alone, where there is such a text
  counterfactual_contexts  what the teacher read in each further reading
"""

import itertools
from typing import Iterator

import numpy as np

from sdpo_jax.data.batch import Packed
from sdpo_jax.data.chat import Chat
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Alternative, Rollout


def rollout_lines(
  step: int, packed: Packed, scores: Signals | None, chat: Chat, kept: int
) -> Iterator[dict]:
  """Yields one object for each of the first `kept` responses of a batch.

  scores: of the plain reading, [B, R]; None where nobody has scored the batch.
  """
  gap_BR = None
  if scores is not None and scores.logp_teacher_BR is not None:
    gap_BR = np.asarray(scores.logp_teacher_BR) - np.asarray(scores.logp_BR)
  plain, *further = packed.contexts
  for b, rollout in enumerate(packed.rollouts[:kept]):
    line = _line(step, rollout, plain[b], chat)
    if "route/neither" in packed.metrics:
      line["learns_from"] = _term(packed.batch.route_B[b], plain[b])
    if gap_BR is not None and plain[b] is not None:
      gaps = gap_BR[b, : len(rollout.tokens)]
      line["teacher_gap"] = [round(float(gap), 4) for gap in gaps]
    if rollout.alternatives:
      line["counterfactuals"] = [_alternative(a) for a in rollout.alternatives]
    if rollout.reflection is not None:
      line["reflection"] = rollout.reflection
    if rollout.turns is not None:
      line["turns"] = list(_turns(rollout, plain[b], chat))
    shown = [contexts[b] for contexts in further if contexts[b] is not None]
    if shown:
      line["counterfactual_contexts"] = [c.render(rollout.task.prompt) for c in shown]
    yield line


def _line(step: int, rollout: Rollout, context, chat: Chat) -> dict:
  return {
    "step": step,
    "task_id": rollout.task.id,
    "prompt": rollout.task.prompt,
    "prompt_read": chat.plain_text(rollout.prompt_tokens),
    "response": rollout.text,
    "reward": rollout.feedback.reward,
    "status": rollout.feedback.status.value,
    "finish_reason": rollout.finish_reason,
    "feedback": rollout.feedback.text,
    "teacher_context": None if context is None else context.render(rollout.task.prompt),
    "tokens": chat.token_strings(rollout.tokens),
  }


def _turns(rollout: Rollout, context: Context | None, chat: Chat) -> Iterator[dict]:
  """Yields the turns of an episode; the world may not have answered the last one."""
  shown = () if context is None else context.turns
  texts = itertools.chain(shown, itertools.repeat(""))
  for (segment, answer, reward), text in zip(rollout.turn_by_turn(), texts):
    turn = {
      "message": chat.response_text(segment.completion.tokens),
      "tokens": len(segment.completion.tokens),
      "observation": None if answer is None else answer.observation,
      "reward": reward,
      "valid": answer is not None and answer.valid,
    }
    yield turn | ({"teacher_context": text} if text else {})


def _term(route: float, context) -> str | None:
  """Names the term of the loss that a routed response is in."""
  if not route:
    return "reward"
  return None if context is None else "teacher"


def _alternative(alternative: Alternative) -> dict:
  rollout = alternative.rollout
  return {
    "source": alternative.source,
    "response": rollout.text,
    "reward": rollout.feedback.reward,
    "feedback": rollout.feedback.text,
    "imagined": alternative.imagined,
  }
