"""The rules that turn a diagnosis into words: what will learn, what is inert, what would hurt.

A rule reads the figures of `measures.py` and says one thing, with its source. They were written
down before the runs that test them; RESULTS.md has how they fared.

What a method can learn from is of two kinds:

  the teacher   tells more than the policy if its answers beat the control's, over all attempts that
                have a teacher (`again.all`): that is what a policy gains by becoming its teacher
  rewards       tell something in groups whose rewards differ (`policy.mixed`)

  teacher             what a divergence from it does
  inert               nothing: no attempt has a context, or the context says nothing
  better              learns: the difference's interval lies above 0
  worse               hurts: it lies below 0
  no better           hurts if the teacher moves with the policy, which then drifts with nothing to
                      hold it; hardly moves if the teacher is frozen
  unknown             too few questions

  rewards             what a surrogate does
  mixed               learns: at least a tenth of the groups differ
  rarely mixed        learns slowly: at least one in fifty
  not mixed           nothing

The order of the four plain methods follows: the teacher first where it is better by a tenth or
more, or where nothing else teaches; else the rewards first. A blend comes between, since it has a
part of both. Methods that come to the same stand side by side.

`NATS_HIGH` and the other limits are rules of thumb; each advice names its own.
"""

from typing import NamedTuple

from sdpo_jax.diagnose.prompts import ABOUT, OWN

FEW_QUESTIONS = 8  # fewer tell nothing about a difference
LEAST_SHARE = 0.1  # of attempts that have a teacher
ALL_SILENT = 0.99  # of the prompts that say nothing
ROUNDING_NATS = 1e-6
MIXED, RARELY_MIXED = 0.1, 0.02  # shares of groups
MUCH = 0.1  # reward that a teacher adds
TRUNCATED = 0.2  # share of responses
NATS_HIGH, NATS_LOW = 2.5, 0.02  # entropy a token
COPIED = 0.5  # share of 8-grams
SMALL_MODEL = 1e9  # parameters

INERT, BETTER, WORSE, NO_BETTER, UNKNOWN = "inert", "better", "worse", "no better", "unknown"
OFTEN, RARELY, NEVER = "mixed", "rarely mixed", "not mixed"

PAPER = "arXiv 2601.20802"
GATE = "sdpo_jax/teacher_gate.py"
OWN_RUNS = "this project's runs with a model of 135 M parameters, RESULTS.md"


class Line(NamedTuple):
  """One thing that is said, and what says so."""

  text: str
  rule: str
  source: str


class Learning(NamedTuple):
  """From what a method learns."""

  teacher: bool  # it distils
  moving: bool  # the teacher's weights follow the policy's
  credit: bool  # the teacher weighs the reward's advantage
  rewards: bool

  @classmethod
  def of(cls, row: dict) -> "Learning":
    """Reads a row as config.method has it."""
    share = row["policy_share"]  # or "routed": each response learns from one of the two
    return cls(
      teacher=row["token_signal"]["name"] != "none" and share != 1.0,
      moving=row["teacher_weights"]["name"] not in ("frozen", "none", "remote"),
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


def state_of_teacher(figures: dict) -> tuple[str, Line]:
  """Returns one of INERT, BETTER, WORSE, NO_BETTER, UNKNOWN, and why."""
  own, worth = figures["prompts"].get(OWN), figures["again"]["all"]
  if own is None or own["share"] < LEAST_SHARE:
    share = own["share"] if own else 0.0
    return INERT, Line(f"{share:.0%} of the attempts have a teacher", "no_teacher", PAPER)
  if own["says_nothing"] >= ALL_SILENT or own["same_as_policy"] >= ALL_SILENT:
    text = "the teacher's prompts say nothing that the policy does not read"
    return INERT, Line(text, "empty_context", GATE)
  gap = figures["tokens"]["gap"]
  if gap is not None and gap <= ROUNDING_NATS:
    text = f"the teacher agrees with the policy on every token ({gap:.2g} nats apart)"
    return INERT, Line(text, "equal_teacher", GATE)
  if worth is None or worth["questions"] < FEW_QUESTIONS:
    count = worth["questions"] if worth else 0
    text = f"only {count} questions were tried again: raise config.diagnose.responses"
    return UNKNOWN, Line(text, "few_questions", "stats.py")
  told = _difference(worth)
  if worth["difference"]["low"] > 0:
    return BETTER, Line(f"the teacher beats the policy by {told}", "teacher_better", PAPER)
  if worth["difference"]["high"] < 0:
    text = f"the teacher is worse than the policy: {told}"
    return WORSE, Line(text, "teacher_worse", OWN_RUNS)
  text = f"the teacher is not shown to know more than the policy: {told}"
  return NO_BETTER, Line(text, "teacher_no_better", OWN_RUNS)


def state_of_rewards(figures: dict) -> tuple[str, Line]:
  """Returns one of OFTEN, RARELY, NEVER, and why."""
  mixed = figures["policy"].get("mixed")
  if mixed is None:
    return NEVER, Line("no response was judged", "groups_mixed", "arXiv 2402.03300")
  share = mixed["mean"]
  state = OFTEN if share >= MIXED else RARELY
  if share < RARELY_MIXED:
    state = NEVER
  text = f"{share:.0%} of the groups hold both better and worse responses"
  return state, Line(text, "groups_mixed", "arXiv 2402.03300")


def ranking(teacher: str, rewards: str, worth: float) -> list[tuple[str, ...]]:
  """Returns RANKED from what should end best to what should end worst; equal ones together.

  worth: what the teacher adds to the reward.
  """
  sdpo, frozen, grpo, blend = RANKED
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
    return f"learns{slowly} from rewards alone" if from_rewards else "inert: nothing teaches"
  if teacher == UNKNOWN:
    return "unknown: too little was sampled"
  harm = "would hurt" if learning.moving or teacher == WORSE else "hardly moves"
  if not from_rewards:
    return harm
  return f"learns{slowly} from rewards, held back by its teacher"


def advice(figures: dict) -> list[Line]:
  """Returns which settings to change, as far as a figure says so."""
  said = [rule(figures) for rule in (*_POLICY_RULES, *_PROMPT_RULES)]
  return [line for line in said if line is not None]


def verdict(figures: dict, learning: Learning, name: str) -> dict:
  """Returns what is said: states, outlook of the configured method, ranking, reasons, advice."""
  teacher, why_teacher = state_of_teacher(figures)
  rewards, why_rewards = state_of_rewards(figures)
  worth = figures["again"]["all"]
  added = worth["difference"]["mean"] if worth else 0.0
  return {
    "teacher": teacher,
    "rewards": rewards,
    "method": name,
    "outlook": outlook(learning, teacher, rewards),
    "outlooks": {plain: outlook(x, teacher, rewards) for plain, x in RANKED.items()},
    "ranking": [list(tied) for tied in ranking(teacher, rewards, added)],
    "reasons": [why_teacher._asdict(), why_rewards._asdict()],
    "advice": [line._asdict() for line in advice(figures)],
  }


# ---- advice: one function a rule, what is seen and what to change, or None ----------------------


def _truncated(figures: dict) -> Line | None:
  share = figures["policy"]["truncated"]
  if share < TRUNCATED:
    return None
  text = f"{share:.0%} of the responses are cut off: raise config.rollout.max_new_tokens"
  return Line(text, f"truncated >= {TRUNCATED:g}", "arXiv 2503.14476")


def _entropy(figures: dict) -> Line | None:
  entropy = figures["policy"]["entropy"]
  if entropy is not None and entropy > NATS_HIGH:
    text = f"{entropy:.2f} nats a token: the text is hardly coherent; lower rollout.temperature"
    return Line(text, f"entropy > {NATS_HIGH:g}", OWN_RUNS)
  if entropy is not None and entropy < NATS_LOW:
    text = f"{entropy:.3f} nats a token: the samples are one answer; raise rollout.temperature"
    return Line(text, f"entropy < {NATS_LOW:g}", "arXiv 2503.14476")
  return None


def _difficulty(figures: dict) -> Line | None:
  solved, reward = figures["policy"].get("solved"), figures["policy"].get("reward")
  if solved is not None and solved < 0.05:
    text = f"{solved:.0%} of the questions are ever solved: begin with easier ones"
    return Line(text, "solved < 0.05", "arXiv 2503.14476")
  if reward is not None and reward["mean"] > 0.95:
    text = f"the policy has {reward['mean']:.0%} already: take harder questions"
    return Line(text, "reward > 0.95", "arXiv 2503.14476")
  return None


def _unjudged(figures: dict) -> Line | None:
  unjudged = figures["policy"]["unjudged"]
  if not unjudged:
    return None
  text = f"{unjudged} responses have no verdict: the log above says what the environment lacks"
  return Line(text, "unjudged > 0", "records.py")


def _shortened(figures: dict) -> Line | None:
  own = figures["prompts"].get(OWN)
  if own is None or own["shortened"] < 0.1:
    return None
  text = f"{own['shortened']:.0%} of the teacher's prompts are cut: raise data.max_teacher_tokens"
  return Line(text, "shortened >= 0.1", "data/teacher_prompt.py")


def _better_prompt(figures: dict) -> Line | None:
  """Another prompt beats the configured one on the same attempts, by a tenth or more."""
  failed = figures["again"]["failed"]
  better = {}
  for name, figure in failed.items():
    # without a prompt of its own a teacher is as good as the question alone
    found = figure["against_own"] if OWN in failed else figure["difference"]
    is_sure = found is not None and figure["questions"] >= FEW_QUESTIONS and found["low"] > 0
    if name in _HOW_TO_SHOW and is_sure and found["mean"] >= MUCH:
      better[name] = found["mean"]
  if not better:
    return None
  best = max(better, key=lambda name: better[name])
  text = (
    f"{ABOUT[best]} is worth {100 * better[best]:.0f} points more than what the teacher reads: "
    f"{_HOW_TO_SHOW[best]}"
  )
  return Line(text, f"another prompt adds {MUCH:g} on the same attempts", "measures.py")


_HOW_TO_SHOW = {
  "feedback": "set method.teacher_context.use_solution=False and feedback=always",
  "solution": "set method.teacher_context.feedback=never",
  "reference": "set method.teacher_context.name=reference_solution, as in method=opsd and rlsd",
  "both": "set method.teacher_context.feedback=always",
  "attempt": "set method.teacher_context.show_attempt=True and feedback=always",
  "turn": "no method here distils from a second turn; --mode=discover's multi_turn samples it",
}


def _copied(figures: dict) -> Line | None:
  own = figures["again"]["failed"].get(OWN)
  if own is None or own["copied"] is None or own["copied"] < COPIED:
    return None
  text = (
    f"{own['copied']:.0%} of the teacher's answers stand word for word in what it was shown: it "
    "may recite; show feedback alone (method.teacher_context.use_solution=False)"
  )
  return Line(text, f"copied >= {COPIED:g}", "monitors.py")


def _blind_teacher(figures: dict) -> Line | None:
  """Shown feedback, the teacher expects a right answer less than the policy does."""
  right = figures["tokens"]["right"].get("feedback")
  if right is None or right["difference"]["high"] is None or right["difference"]["high"] >= 0:
    return None
  text = (
    f"shown feedback, the teacher's likeliest token is right in {right['teacher']:.0%} of a right "
    f"answer's tokens, the policy's in {right['policy']:.0%}: feedback misleads this model"
  )
  return Line(text, "right tokens fall", "tokens.py")


def _small_model(figures: dict) -> Line | None:
  state, _ = state_of_teacher(figures)
  if figures["parameters"] >= SMALL_MODEL or state not in (NO_BETTER, WORSE):
    return None
  millions = figures["parameters"] / 1e6
  text = (
    f"a model of {millions:.0f} M parameters: self-teaching grows with size, and below a billion "
    "SDPO was at or under GRPO; try method=grpo, a larger model, or a blend (method=sdpo_blend)"
  )
  return Line(text, "fewer than 1e9 parameters", f"{PAPER}, models of several sizes")


_POLICY_RULES = (_unjudged, _difficulty, _truncated, _entropy)
_PROMPT_RULES = (_shortened, _better_prompt, _copied, _blind_teacher, _small_model)


def _difference(figure: dict) -> str:
  found = figure["difference"]
  bounds = ""
  if found["low"] is not None:
    bounds = f" [{100 * found['low']:+.0f}, {100 * found['high']:+.0f}]"
  return (
    f"{100 * found['mean']:+.0f} points{bounds} ({figure['reward']['mean']:.0%} against "
    f"{figure['control']['mean']:.0%})"
  )
