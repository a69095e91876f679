"""Teacher contexts that depend on the outcome of a response, and on what is known of its question.

drift             another success of the group, or one of an earlier visit (DRIFT, arXiv 2606.30345)
rephrase_or_hint  a success reads itself, a failure a hint (H2SD, arXiv 2607.18955)

Host code: text in, text out; `teacher_context.py` says what a context is.
"""

import random

import numpy as np

from sdpo_jax.errors import unknown
from sdpo_jax.objectives.memory import Standing
from sdpo_jax.objectives.teacher_context import (
  SOLUTION,
  TEMPLATES,
  Context,
  changed_templates,
  fill,
  without_thinking,
)
from sdpo_jax.records import Rollout, Status

REPHRASE = (
  "{prompt}{solution}\n\nThis solution is correct. "
  "Give it once more in your own words, without reference to it."
)
HINT = "\nHint:\n\n{text}"
_PICKS = ("first", "largest_entropy", "shortest")


class Drift:
  """Shows another success of the group, or else one of an earlier visit.

  Stage 1 (`route.Drift`): every response reads another success of its group, and there is no
  reading without one. Stage 2: failures do, and where the group has no success one of an earlier
  visit, drawn uniformly; question, visit and place in the group decide which.

  delta: in stage 1 the successes to choose from have the largest reward, or up to so much less; in
    stage 2 the largest.
  warm_up_pick, pick: which of them stage 1 and stage 2 choose, "first" | "shortest" (in characters)
    | "largest_entropy" (-mean log pi over the sampled tokens, as the engine reported it).
  medium_successes: in stage 2 the successes of a medium question have a reading too, of another
    success of the group; the credit `rhythm` reads it.
  templates: replaces entries of TEMPLATES.
  """

  needs_memory = True

  def __init__(
    self,
    *,
    success_threshold: float = 0.5,
    delta: float = 0.0,
    warm_up_pick: str = "largest_entropy",
    pick: str = "shortest",
    medium_successes: bool = False,
    templates: dict[str, str] = TEMPLATES,
  ):
    for setting, value in (("warm_up_pick", warm_up_pick), ("pick", pick)):
      if value not in _PICKS:
        raise ValueError(unknown(f"method.teacher_context.{setting}", value, _PICKS))
    self.success_threshold, self.delta = success_threshold, delta
    self.warm_up_pick, self.pick = warm_up_pick, pick
    self.medium_successes = medium_successes
    self.templates = changed_templates(templates)

  def __call__(self, group: list[Rollout], i: int, standing: Standing) -> Context | None:
    succeeded = _succeeded(group[i], self.success_threshold)
    if standing.stage == 2 and succeeded:
      if not self.medium_successes or standing.level != "medium":
        return None
    solution = self._sibling(group, i, standing.stage)
    if solution:
      return Context(solution, templates=self.templates)
    if standing.stage == 1 or succeeded or not standing.solutions:
      return None
    # one generator each: what is drawn depends on no other draw
    draw = random.Random(f"{group[i].task.id}/{standing.visits}/{i}")
    solution = draw.choice(standing.solutions)
    return Context(solution, templates=self.templates, remembered=True)

  def _sibling(self, group: list[Rollout], i: int, stage: int) -> str:
    """The success of the group that response i reads; "" where there is no other one."""
    successes = _successes(group, i, self.success_threshold)
    if not successes:
      return ""
    slack, pick = (self.delta, self.warm_up_pick) if stage == 1 else (0.0, self.pick)
    largest = max(r.feedback.reward for r in successes)
    best = [r for r in successes if r.feedback.reward >= largest - slack]
    if pick == "largest_entropy":
      best.sort(key=_entropy, reverse=True)
    elif pick == "shortest":
      best.sort(key=lambda r: len(without_thinking(r.text)))
    return without_thinking(best[0].text)


class RephraseOrHint:
  """Shows a success its own response, to be said in other words, and a failure a hint.

  The hint is `hint` in the task's data, which a column of that name fills (data/tasks.py). Without
  one it is the task's solution, and without that the first success of the group.

  rephrase: the whole message that a success reads, with {prompt} and {solution}.
  hint: how a hint stands in the message, with {text}.
  """

  reads_hints = True

  def __init__(self, *, success_threshold: float = 0.5, rephrase: str = REPHRASE, hint: str = HINT):
    fill(rephrase, {"prompt": "", "solution": ""})
    fill(hint, {"text": ""})
    self.success_threshold = success_threshold
    self.templates = (("reprompt", rephrase), ("solution", SOLUTION + "{text}"))
    self._hint = (("solution", hint),)

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    rollout, task = group[i], group[i].task
    if rollout.feedback.status is Status.ENV_FAILED:
      return None
    if _succeeded(rollout, self.success_threshold):
      own = without_thinking(rollout.text)
      return Context(own, templates=self.templates) if own else None
    if task.data.get("hint"):
      return Context(task.data["hint"], templates=self._hint)
    solution = without_thinking(task.solution or "")
    successes = _successes(group, i, self.success_threshold)
    if not solution and successes:
      solution = without_thinking(successes[0].text)
    return Context(solution) if solution else None


def _succeeded(rollout: Rollout, success_threshold: float) -> bool:
  judged = rollout.feedback.status is not Status.ENV_FAILED
  return judged and rollout.feedback.reward >= success_threshold


def _successes(group: list[Rollout], i: int, success_threshold: float) -> list[Rollout]:
  """The successes of a group beside response i that have a text to show."""
  others = group[:i] + group[i + 1 :]
  return [r for r in others if _succeeded(r, success_threshold) and without_thinking(r.text)]


def _entropy(rollout: Rollout) -> float:
  """An estimate of the policy's entropy a token on a response: -mean log pi, in nats."""
  logp = np.array(rollout.logp)
  return -float(logp.mean()) if len(logp) else 0.0
