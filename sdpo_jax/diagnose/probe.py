"""Asks during a run whether the teacher still knows more than the policy that it teaches.

Some attempts of a step's batch are made again twice: by the policy under the question alone, and by
the teacher, with its own weights, under what it reads of the attempt. Both answers are judged. A
teacher whose answers are no better has nothing to teach, however far its opinion lies from the
policy's; what it then does to the policy is drift.
"""

import jax

from sdpo_jax.data.batch import Packed
from sdpo_jax.diagnose.again import Again, make_again
from sdpo_jax.diagnose.measures import gain
from sdpo_jax.diagnose.prompts import CONTROL, OWN, Prompt
from sdpo_jax.records import Rollout, Sampling
from sdpo_jax.rollout import Collector


def attempts_of(packed: Packed, most: int) -> dict[tuple[int, int], tuple[Rollout, list[int]]]:
  """Returns at most so many responses that have a teacher, each with its teacher's prompt.

  They lie at even distances in the batch, so that they belong to many questions.
  """
  rows = [b for b, context in enumerate(packed.contexts[0]) if context is not None]
  rows = [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else rows
  texts = packed.teacher_texts
  return {(0, b): (packed.rollouts[b], texts.prompt(b)) for b in rows}


def probe_teacher(
  collector: Collector,
  policy,
  teacher,
  packed: Packed,
  *,
  most: int,
  sampling: Sampling,
  path: tuple,
) -> dict[str, float]:
  """Returns what the teacher's answers are worth against the policy's, as metrics.

    probe/teacher_gain   the teacher's reward minus the policy's, a mean over questions
    probe/teacher_reward, probe/policy_reward, probe/attempts

  policy, teacher: weights as sampling wants them. path: what the seeds depend on. Nothing is
  returned where no response has a teacher, or none of its answers a verdict.
  """
  attempts = attempts_of(packed, most)
  teacher = jax.tree.map(lambda t, p: t.astype(p.dtype), teacher, policy)
  made = []
  for name, weights in ((CONTROL, policy), (OWN, teacher)):
    asked = {
      place: (rollout, {name: Prompt(rollout.prompt_tokens if name == CONTROL else prompt, None)})
      for place, (rollout, prompt) in attempts.items()
    }
    made.append(make_again(collector, weights, asked, sampling=sampling, path=path))
  joined = [
    Again(a.attempt, a.prompts | b.prompts, a.answers | b.answers)
    for a, b in zip(*made, strict=True)
  ]
  found = gain(joined, OWN)
  if found is None:
    return {}
  judged = [a for a in joined if all(answer.is_judged for answer in a.answers.values())]
  rewards = {
    name: sum(a.answers[name].feedback.reward for a in judged) / len(judged)
    for name in (CONTROL, OWN)
  }
  return {
    "probe/teacher_gain": found.difference,
    "probe/teacher_reward": rewards[OWN],
    "probe/policy_reward": rewards[CONTROL],
    "probe/attempts": float(len(judged)),
  }
