"""The rules that turn a diagnosis into words: what will learn, what is inert, what would hurt.

A rule reads the figures of `measures.py` and says one thing, with its source. They were written
down before the runs that test them; RESULTS.md, diagnose, has how they fared.

What a method can learn from is of two kinds:

  a teacher   tells more than the policy if its answers beat the control's, over all attempts that
              have it (`again.all`): that is what a policy gains by becoming this teacher
  rewards     tell something in groups whose rewards differ (`policy.mixed`)

  teacher             what a divergence from it does
  inert               nothing: hardly an attempt has a context, or the context says nothing
  better              learns: the difference's interval lies above 0
  worse               hurts: it lies below 0
  no better           hurts if the teacher moves with the policy, which then drifts with nothing to
                      hold it, and hardly moves it if frozen: the interval holds 0 and ends below .1
  unclear             may hurt, likewise: the interval holds 0 and more than .1; a larger budget
                      tells
  unknown             nobody knows: too few questions, or an interval wider than .3 that holds 0

  rewards             what a surrogate does
  mixed               learns: at least a tenth of the groups differ
  rarely mixed        learns slowly: at least one in fifty
  not mixed           nothing

The configured method is judged by its own teacher. The four plain methods are put in order by the
teacher that SDPO has: the teacher first where it is better by a tenth or more, or where nothing
else teaches; else the rewards first. A blend comes between, since it has a part of both. Methods
that come to the same stand side by side, and of an unknown teacher no order is given.

The limits below are rules of thumb; each advice names its own.
"""

from typing import NamedTuple

from sdpo_jax.diagnose.advice import advice
from sdpo_jax.diagnose.prompts import OWN, SDPO
from sdpo_jax.diagnose.states import (
  BETTER,
  INERT,
  MUCH,
  NEVER,
  NO_BETTER,
  RARELY,
  UNKNOWN,
  WORSE,
  state_of_rewards,
  state_of_teacher,
)


class Learning(NamedTuple):
  """From what a method learns."""

  teacher: bool  # it distils
  moving: bool  # the teacher's weights follow the policy's, with nothing that holds them
  credit: bool  # the teacher weighs the reward's advantage
  rewards: bool

  @classmethod
  def of(cls, row: dict) -> "Learning":
    """Reads a row as config.method has it."""
    share = row["policy_share"]  # or "routed": each response learns from one of the two
    return cls(
      teacher=row["token_signal"]["name"] != "none" and share != 1.0,
      moving=row["teacher_weights"]["name"] not in ("frozen", "none", "remote", "trust_region"),
      credit=row["credit"]["name"] != "none",
      rewards=share != 0.0,
    )


# The four plain methods that are put in order.
RANKED = {
  "sdpo": Learning(teacher=True, moving=True, credit=False, rewards=False),
  "sdpo, frozen teacher": Learning(teacher=True, moving=False, credit=False, rewards=False),
  "grpo": Learning(teacher=False, moving=False, credit=False, rewards=True),
  "sdpo_blend": Learning(teacher=True, moving=True, credit=False, rewards=True),
}


def ranking(teacher: str, rewards: str, worth: float) -> list[tuple[str, ...]]:
  """Returns RANKED from what should end best to what should end worst; equal ones together.

  worth: what the teacher adds to the reward. Of an unknown teacher nothing is returned.
  """
  sdpo, frozen, grpo, blend = RANKED
  if teacher == UNKNOWN:
    return []
  if teacher == INERT:
    return [(sdpo, frozen, grpo, blend)] if rewards == NEVER else [(grpo, blend), (sdpo, frozen)]
  if teacher == BETTER and rewards == NEVER:
    return [(sdpo,), (frozen,), (blend,), (grpo,)]
  if teacher == BETTER and (worth >= MUCH or rewards == RARELY):
    return [(sdpo,), (blend,), (frozen,), (grpo,)]
  if teacher == BETTER:
    return [(blend,), (grpo,), (frozen,), (sdpo,)]
  if rewards == NEVER:
    return [(grpo,), (frozen,), (sdpo, blend)]
  return [(grpo,), (blend,), (frozen,), (sdpo,)]


def outlook(learning: Learning, teacher: str, rewards: str) -> str:
  """Returns in a few words what a method is likely to do here."""
  from_rewards = learning.rewards and rewards != NEVER
  slowly = " slowly" if rewards == RARELY else ""
  if not learning.teacher:
    if not from_rewards:
      return "inert: no group's rewards differ"
    idle = learning.credit and teacher == INERT
    return f"learns{slowly} from rewards" + (", and its credit does nothing" if idle else "")
  if teacher == BETTER:
    return "learns from the teacher" + (" and from rewards" if from_rewards else "")
  if teacher == INERT:
    return f"learns{slowly} from rewards alone" if from_rewards else "inert: hardly taught"
  if teacher == UNKNOWN:
    return "unknown: too little was sampled"
  return _without_knowledge(learning, teacher, slowly if from_rewards else None)


def _without_knowledge(learning: Learning, teacher: str, slowly: str | None) -> str:
  """Returns the outlook where the teacher is not better; slowly: None: rewards teach nothing."""
  if slowly is not None:
    return f"learns{slowly} from rewards, held back by its teacher"
  if teacher == WORSE:
    return "would hurt"
  if not learning.moving:
    return "hardly moves"
  return "would hurt" if teacher == NO_BETTER else "may hurt: its teacher is not shown to know more"


def verdict(figures: dict, row: dict) -> dict:
  """Returns what is said: states, outlook of the configured method, ranking, reasons, advice.

  row: config.method.
  """
  teacher, why_teacher = state_of_teacher(figures, OWN)
  plain_teacher, _ = state_of_teacher(figures, SDPO)
  rewards, why_rewards = state_of_rewards(figures)
  worth = figures["again"]["all"][SDPO]
  added = worth["difference"]["mean"] if worth else 0.0
  return {
    "teacher": teacher,
    "sdpo_teacher": plain_teacher,
    "rewards": rewards,
    "method": row["name"],
    "outlook": outlook(Learning.of(row), teacher, rewards),
    "outlooks": {plain: outlook(x, plain_teacher, rewards) for plain, x in RANKED.items()},
    "ranking": [list(tied) for tied in ranking(plain_teacher, rewards, added)],
    "reasons": [why_teacher._asdict(), why_rewards._asdict()],
    "advice": [line._asdict() for line in advice(figures, row["teacher_context"]["name"])],
  }
