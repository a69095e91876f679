"""Teacher contexts of episodes: what is known of the world, and what its turns led to.

skill               what is known of the world, before the question (SDAR, CRAFT)
turn_words          before each turn, what the world said to it (sdpo_turns, decided here)
later_observations  before some turns, what the episode shows from there on (OCSD, arXiv 2608.04788)

The last two give each turn of an episode a reading of its own: the teacher reads the episode up to
that turn as the policy did, with a text of the turn's own behind the last observation. Public
results say why: a teacher who reads a whole demonstration, or raw observations at the beginning,
falls below the base model (HERO, arXiv 2606.11559).
"""

import math

from sdpo_jax.objectives.teacher_context import Context, fill
from sdpo_jax.records import Rollout, Status
from sdpo_jax.text import SKILL_TEMPLATE

TURN = "\n\nThe answer to what you do now will be: {text}"
LATER = "\n\nLater in this episode:\n{text}"
NOT_PROVIDED = "not provided"
AN_ACTION = "an action"


class Skill:
  """Shows every response what its task's data holds as `skill`, before the question.

  template: how it stands there, with {text}. Without a skill there is no teacher.
  """

  def __init__(self, *, template: str = SKILL_TEMPLATE):
    fill(template, {"text": ""})
    self.templates = (("reprompt", "{solution}{prompt}"), ("solution", template))

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    skill = group[i].task.data.get("skill", "")
    if group[i].feedback.status is Status.ENV_FAILED or not skill:
      return None
    return Context(skill, templates=self.templates)


class TurnWords:
  """Shows, before each turn of an episode, the world's answer to it.

  template: how it stands behind the observation before the turn, with {text}.
  """

  by_turn = True

  def __init__(self, *, template: str = TURN):
    fill(template, {"text": ""})
    self._template = template

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    turns = group[i].turns or []
    if group[i].feedback.status is Status.ENV_FAILED or not turns:
      return None
    return Context(turns=tuple(fill(self._template, {"text": t.observation}) for t in turns))


class LaterObservations:
  """Shows, before the turns that the policy was least sure of, all that the world says later.

  There are two readings, alike but for the observations: the plain one shows them, and the further
  one has a fixed phrase in the place of each. The actions between stand as "an action" in both, so
  that neither shows what to do. What a credit makes of the two is what the observations alone say.

  share: of an episode's turns, rounded up, that have readings: those whose tokens have the largest
    mean -log pi, as the engine reported it; the earlier of two alike (decided here).
  template: how the later turns stand behind the observation before the turn, with {text}.
  """

  by_turn = True
  further_count = 1

  def __init__(self, *, share: float = 0.2, template: str = LATER):
    fill(template, {"text": ""})
    self._share, self._template = share, template

  def __call__(self, group: list[Rollout], i: int) -> Context | None:
    return self._context(group[i], hides=False)

  def further(self, group: list[Rollout], i: int) -> list[tuple[Context, float] | None]:
    """Returns the reading that has no observations, with its weight."""
    context = self._context(group[i], hides=True)
    return [None if context is None else (context, 1.0)]

  def _context(self, rollout: Rollout, *, hides: bool) -> Context | None:
    turns = rollout.turns or []
    if rollout.feedback.status is Status.ENV_FAILED or not turns:
      return None
    chosen = self._unsure(rollout)
    texts = []
    for k in range(len(turns)):
      text = ""
      if k in chosen:
        seen = [NOT_PROVIDED if hides else turn.observation for turn in turns[k:]]
        text = fill(self._template, {"text": "\n".join(f"({AN_ACTION}) {words}" for words in seen)})
      texts.append(text)
    return Context(turns=tuple(texts))

  def _unsure(self, rollout: Rollout) -> set[int]:
    """Returns the turns that have readings."""
    count = math.ceil(self._share * len(rollout.sampled))

    def surprise(k: int) -> float:
      logp = rollout.sampled[k].completion.logp
      return -sum(logp) / max(1, len(logp))

    return set(sorted(range(len(rollout.sampled)), key=lambda k: (-surprise(k), k))[:count])
