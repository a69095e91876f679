"""What a diagnosis finds about a teacher and about rewards, each as a state with its reason.

`verdict.py` explains the states. A reason names its rule and its source.
"""

from typing import NamedTuple

from sdpo_jax.diagnose.prompts import OWN

FEW_QUESTIONS = 8  # fewer tell nothing about a difference
LEAST_SHARE = 0.1  # of attempts that have a teacher
ALL_SILENT = 0.99  # of the prompts that say nothing
ROUNDING_NATS = 1e-6
MIXED, RARELY_MIXED = 0.1, 0.02  # shares of groups
MUCH = 0.1  # reward that a teacher adds
WIDE = 0.3  # of an interval of the reward that tells nothing
COPIED = 0.5  # share of 8-grams, or of right answers

INERT, BETTER, WORSE, UNKNOWN = "inert", "better", "worse", "unknown"
NO_BETTER, UNCLEAR = "no better", "unclear"
OFTEN, RARELY, NEVER = "mixed", "rarely mixed", "not mixed"

PAPER = "arXiv 2601.20802"
GATE = "the gate of training, teacher_gate.py"
OWN_RUNS = "this project's runs with SmolLM2-135M, RESULTS.md"


class Line(NamedTuple):
  """One thing that is said, and what says so."""

  text: str
  rule: str
  source: str


def state_of_teacher(figures: dict, name: str) -> tuple[str, Line]:
  """Returns INERT, BETTER, WORSE, NO_BETTER, UNCLEAR or UNKNOWN, and why.

  name: OWN or SDPO, whose prompt is looked at.
  """
  prompts, worth = figures["prompts"].get(name), figures["again"]["all"][name]
  if prompts is None or prompts["share"] < LEAST_SHARE:
    share = prompts["share"] if prompts else 0.0
    return INERT, Line(f"{share:.0%} of the attempts have a teacher", "few_teachers", PAPER)
  if prompts["says_nothing"] >= ALL_SILENT or prompts["same_as_policy"] >= ALL_SILENT:
    text = "the teacher's prompts say nothing that the policy does not read"
    return INERT, Line(text, "empty_context", GATE)
  gap = figures["tokens"]["gap"]
  if name == OWN and gap is not None and gap <= ROUNDING_NATS:
    text = f"the teacher agrees with the policy on every token ({gap:.2g} nats apart)"
    return INERT, Line(text, "equal_teacher", GATE)
  if worth is None or worth["questions"] < FEW_QUESTIONS:
    count = worth["questions"] if worth else 0
    text = f"only {count} questions were tried again: raise --config.diagnose.responses"
    return UNKNOWN, Line(text, "few_questions", "a bootstrap over questions")
  return _state_of_answers(worth)


def _state_of_answers(worth: dict) -> tuple[str, Line]:
  """Returns BETTER, WORSE, NO_BETTER or UNCLEAR, and why."""
  told, found = difference_text(worth), worth["difference"]
  if found["low"] > 0:
    recited = worth["recited"] or 0.0
    by_heart = f", {recited:.0%} of its right answers by reciting" if recited >= COPIED else ""
    text = f"the teacher beats the policy by {told}{by_heart}"
    return BETTER, Line(text, "teacher_better", PAPER)
  if found["high"] < 0:
    return WORSE, Line(f"the teacher is worse than the policy: {told}", "teacher_worse", OWN_RUNS)
  if found["high"] < MUCH:
    text = f"the teacher knows hardly more than the policy: {told}"
    return NO_BETTER, Line(text, "teacher_no_better", OWN_RUNS)
  text = (
    f"the teacher is not shown to know more than the policy: {told}; four times the responses "
    "(--config.diagnose.responses) halve the interval"
  )
  if found["high"] - found["low"] > WIDE:
    return UNKNOWN, Line(text, f"an interval wider than {WIDE:g}", "a bootstrap over questions")
  return UNCLEAR, Line(text, "teacher_unclear", OWN_RUNS)


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


def difference_text(figure: dict) -> str:
  found = figure["difference"]
  bounds = ""
  if found["low"] is not None:
    bounds = f" [{100 * found['low']:+.0f}, {100 * found['high']:+.0f}]"
  return (
    f"{100 * found['mean']:+.0f} points{bounds} ({figure['reward']['mean']:.0%} against "
    f"{figure['control']['mean']:.0%})"
  )
