"""Which settings to change, as far as the figures of a diagnosis say so: one function a rule.

A rule returns what is seen and what to change, or None. Its limits are rules of thumb, and the line
names them.
"""

from sdpo_jax import stats
from sdpo_jax.diagnose.prompts import ABOUT, CONTEXTS, OWN
from sdpo_jax.diagnose.states import (
  COPIED,
  FEW_QUESTIONS,
  GATE,
  MUCH,
  NO_BETTER,
  OWN_RUNS,
  PAPER,
  UNCLEAR,
  WORSE,
  Line,
  state_of_teacher,
)

TRUNCATED = 0.2  # share of responses
NATS_HIGH, NATS_LOW = 2.5, 0.02  # entropy a token
SMALL_MODEL = 1e9  # parameters
LEVEL = 0.05  # of a family of comparisons


def advice(figures: dict, context: str) -> list[Line]:
  """Returns which settings to change, as far as a figure says so.

  context: the name of the configured teacher context.
  """
  said = [rule(figures) for rule in (*_POLICY_RULES, *_PROMPT_RULES)]
  said.append(_better_prompt(figures, context))
  return [line for line in said if line is not None]


def _truncated(figures: dict) -> Line | None:
  share = figures["policy"]["truncated"]
  if share < TRUNCATED:
    return None
  text = f"{share:.0%} of the responses are cut off: raise --config.rollout.max_new_tokens"
  return Line(text, f"truncated >= {TRUNCATED:g}", "arXiv 2503.14476")


def _entropy(figures: dict) -> Line | None:
  entropy = figures["policy"]["entropy"]
  if entropy is not None and entropy > NATS_HIGH:
    text = (
      f"{entropy:.2f} nats a token: the text is hardly coherent; lower --config.rollout.temperature"
    )
    return Line(text, f"entropy > {NATS_HIGH:g}", OWN_RUNS)
  if entropy is not None and entropy < NATS_LOW:
    text = (
      f"{entropy:.3f} nats a token: the samples are one answer; raise --config.rollout.temperature"
    )
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
  return Line(text, "unjudged > 0", "verdicts of the environment")


def _silent(figures: dict) -> Line | None:
  own = figures["prompts"].get(OWN)
  if own is None or own["says_nothing"] < 0.1:
    return None
  text = (
    f"{own['says_nothing']:.0%} of the teacher's prompts show nothing of their context: "
    "--config.method.teacher_context.templates must keep {solution} and {feedback} in reprompt, "
    "and {text} in those two"
  )
  return Line(text, "says_nothing >= 0.1", GATE)


def _shortened(figures: dict) -> Line | None:
  own = figures["prompts"].get(OWN)
  if own is None or own["shortened"] < 0.1:
    return None
  text = (
    f"{own['shortened']:.0%} of the teacher's prompts are cut: raise "
    "--config.data.max_teacher_tokens"
  )
  return Line(text, "shortened >= 0.1", "prompts as they were rendered")


def _better_prompt(figures: dict, context: str) -> Line | None:
  """Another prompt beats the configured one on the same attempts, by a tenth or more."""
  failed = figures["again"]["failed"]
  compared = {
    name: figure
    for name, figure in failed.items()
    if name in CONTEXTS and figure["against_own"] and figure["questions"] >= FEW_QUESTIONS
  }
  if not compared:
    return None
  p_values = [figure["against_own"]["p"] for figure in compared.values()]
  sure = stats.holm([1.0 if p is None else p for p in p_values]) <= LEVEL
  better = {
    name: figure["against_own"]["mean"]
    for (name, figure), is_sure in zip(compared.items(), sure, strict=True)
    if is_sure and figure["against_own"]["mean"] >= MUCH
  }
  if not better:
    return None
  best = max(better, key=lambda name: better[name])
  where, settings = CONTEXTS[best]
  if context != where:
    settings = {"name": where} | settings
  flags = " ".join(f"--config.method.teacher_context.{key}={x}" for key, x in settings.items())
  text = (
    f"{ABOUT[best]} is worth {100 * better[best]:.0f} points more than what the teacher reads, on "
    f"the same attempts: {flags or 'use the plain settings of method=sdpo'}"
  )
  recited = failed[best]["recited"] or 0.0
  if recited >= COPIED:
    text += f"; but {recited:.0%} of the right answers recite what was shown"
  return Line(
    text, f"adds {MUCH:g} or more, p <= {LEVEL:g} after Holm", "paired, on the same attempts"
  )


def _copied(figures: dict) -> Line | None:
  own = figures["again"]["failed"].get(OWN)
  if own is None:
    return None
  copied = max(own["copied"] or 0.0, own["recited"] or 0.0)
  if copied < COPIED:
    return None
  text = (
    f"{copied:.0%} of what the teacher answers stands word for word in what it was shown: it may "
    "recite, and recitals are learned too; watch data/copy_rate, or show feedback alone"
  )
  return Line(text, f"copied or recited >= {COPIED:g}", "word for word")


def _blind_teacher(figures: dict) -> Line | None:
  """Shown feedback, the teacher expects a right answer less than the policy does."""
  right = figures["tokens"]["right"].get("feedback")
  if right is None or right["difference"]["high"] is None or right["difference"]["high"] >= 0:
    return None
  text = (
    f"shown feedback, the teacher's likeliest token is right in {right['teacher']:.0%} of a right "
    f"answer's tokens, the policy's in {right['policy']:.0%}: feedback misleads this model"
  )
  return Line(text, "right tokens fall", "known right answers")


def _small_model(figures: dict) -> Line | None:
  state, _ = state_of_teacher(figures, OWN)
  if figures["parameters"] >= SMALL_MODEL or state not in (NO_BETTER, UNCLEAR, WORSE):
    return None
  millions = figures["parameters"] / 1e6
  text = (
    f"a model of {millions:.0f} M parameters: self-teaching grows with size, and below a billion "
    "SDPO was at or under GRPO: try a larger model"
  )
  return Line(text, "fewer than 1e9 parameters", f"{PAPER}, models of several sizes")


_POLICY_RULES = (_unjudged, _difficulty, _truncated, _entropy)
_PROMPT_RULES = (_silent, _shortened, _copied, _blind_teacher, _small_model)
