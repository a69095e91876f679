"""The signs that a run goes wrong, as rows: what is watched, what it means and what to change.

A warning of a run (`monitors.warnings`) is made of such a row, and so is the README's table
(`symptoms.py`). Two rows may share a name, under which `kept.py` counts the sign.

Rows compare the last WINDOW steps of metrics.jsonl with the first WINDOW, or the latest evaluation
with that of the base model. The limits are rules of thumb. A fall in length or entropy, or more
copies, is a sign only while the reward has not risen: SDPO's responses grow shorter as they get
better (arXiv 2601.20802).
"""

import math
import statistics
from typing import Callable, NamedTuple

from sdpo_jax import stats

WINDOW = 10  # steps
PROBES = (5, 20)  # of the teacher: so many at least are read, and the last so many at most
MUCH = 0.1  # reward that a teacher adds


class Sign(NamedTuple):
  """A row. Its texts are parts of one sentence: "{what is seen}: {means}; {remedy}"."""

  name: str
  watched: str  # metrics, with commas between them
  looks: str  # what a person sees of them
  means: str
  remedy: str
  look: Callable  # (history, or Trends) -> what is seen, with its figures; None: nothing
  source: str = ""  # "": a rule of thumb
  without_teacher: str = ""  # the remedy where the method has no teacher; "": the same

  def warning(self, seen: str, has_teacher: bool) -> str:
    """Returns the sentence on a sign that is seen."""
    is_plain = bool(self.without_teacher) and not has_teacher
    return f"{seen}: {self.means}; {self.without_teacher if is_plain else self.remedy}"


class Trends:
  """Holds a run's first and last windows of steps."""

  def __init__(self, steps: list[dict]):
    self._first, self._last = steps[:WINDOW], steps[-WINDOW:]
    reward = self.means("train/reward")
    self.better = reward is not None and reward[1] > reward[0] + 0.02
    self.has_teacher = has_teacher(self._last)

  def means(self, name: str) -> tuple[float, float] | None:
    """Returns a metric's mean over the first and over the last window; None if one has none."""
    first, last = _values(name, self._first), _values(name, self._last)
    return (statistics.fmean(first), statistics.fmean(last)) if first and last else None

  def most_at_first(self, name: str) -> float:
    """Returns the largest value of a metric in the first window, which has one."""
    return max(_values(name, self._first))

  def noise(self, name: str) -> float:
    """Returns the standard error of the difference of the means; infinite with less than two."""
    first, last = _values(name, self._first), _values(name, self._last)
    if min(len(first), len(last)) < 2:
      return math.inf
    return math.sqrt(sum(statistics.variance(values) / len(values) for values in (first, last)))


def steps_of(history: list[dict]) -> list[dict]:
  """Returns the lines of metrics.jsonl that are more than an evaluation."""
  return [line for line in history if "train/loss" in line]


def has_teacher(lines: list[dict]) -> bool:
  """Tells whether the steps learn from a teacher."""
  of_teacher = {"train/loss_distill", "train/credit_change"}
  return any(of_teacher & line.keys() for line in lines)


def _values(name: str, lines: list[dict]) -> list[float]:
  return [line[name] for line in lines if name in line]


# ---- evaluations and probes: what is seen of all lines so far ------------------------------------


def _worse(history: list[dict]) -> str | None:
  """Looks at the latest evaluation of each split, paired with the base model's by question."""
  latest = {}
  for line in history:
    for name in line:
      if name.startswith("eval/") and name.endswith("/gain_high"):
        latest[name.removesuffix("/gain_high")] = line
  for split, line in latest.items():
    gain, low, high = (line[f"{split}/gain{end}"] for end in ("", "_low", "_high"))
    if high < 0:
      now = line[f"{split}/avg@k"]
      return (
        f"{split}/avg@k is {now:.1%} at step {line['step']}, the base model's {now - gain:.1%}: "
        f"on the same questions {gain:+.1%} [{low:+.1%}, {high:+.1%}]"
      )
  return None


def _fallen(history: list[dict]) -> str | None:
  """Looks at the latest evaluation of each split beside the best one before it.

  The best of several was lucky too. So their intervals must not even meet, although both are of
  the same questions.
  """
  lines_of_splits: dict[str, list[dict]] = {}
  for line in history:
    for name in line:
      if name.startswith("eval/") and name.endswith("/avg@k_high"):
        lines_of_splits.setdefault(name.removesuffix("_high"), []).append(line)
  for name, (*_, last) in lines_of_splits.items():
    best = max(lines_of_splits[name], key=lambda line: line[name])
    # below the base model is another sign
    if best["step"] and last[f"{name}_high"] < best[f"{name}_low"]:
      return (
        f"{name} fell from {best[name]:.1%} at step {best['step']} to {last[name]:.1%} "
        f"[{last[f'{name}_low']:.1%}, {last[f'{name}_high']:.1%}] at step {last['step']}"
      )
  return None


def _teacher_knows(history: list[dict]) -> str | None:
  """Looks at the last probes of the teacher (diagnose/probe.py), while the reward has not risen."""
  least, most = PROBES
  steps = steps_of(history)
  gains = _values("probe/teacher_gain", steps)[-most:]
  if len(gains) < least or Trends(steps).better:
    return None
  found = stats.paired_bootstrap(gains, [0.0] * len(gains))
  if found.high >= MUCH:
    return None
  return (
    f"the teacher's own answers beat the policy's by {found.difference:+.1%} "
    f"[{found.low:+.1%}, {found.high:+.1%}] in the last {len(gains)} probes"
  )


# ---- steps: what is seen of the windows ----------------------------------------------------------


def _reward(trends: Trends) -> str | None:
  means = trends.means("train/reward")
  if means is None:
    return None
  first, last = means
  # three standard errors: runs are looked at after every step
  if last > first - max(0.05, 3 * trends.noise("train/reward")):
    return None
  return f"the reward fell from {first:.3f} to {last:.3f}"


def _reward_and_divergence(trends: Trends) -> str | None:
  seen, divergence = _reward(trends), trends.means("train/loss_distill")
  if seen is None or divergence is None or divergence[1] >= divergence[0]:
    return None
  first, last = divergence
  return (
    f"{seen} while the divergence from the teacher fell from {first:.4f} to {last:.4f} nats a token"
  )


def _length(trends: Trends) -> str | None:
  means = trends.means("rollout/length")
  if means is None or trends.better:
    return None
  first, last = means
  if last >= 0.25 * first:
    return None
  return f"responses shrank from {first:.0f} to {last:.0f} tokens and the reward did not rise"


def _length_tail(trends: Trends) -> str | None:
  """Asks whether single responses run away from the others.

  A ratio of few tokens jumps, so it has to leave the range of the first window. The longest
  responses have to be longer than at first, since the ratio also grows where most become shorter.
  """
  tails, lengths = trends.means("rollout/length_tail"), trends.means("rollout/length")
  if tails is None or lengths is None:
    return None
  first, last = tails
  is_in_range = last <= max(1.3 * first, trends.most_at_first("rollout/length_tail"))
  if is_in_range or last * lengths[1] <= first * lengths[0]:
    return None
  return (
    f"the longest response of a step is {last:.1f} times the mean one, {first:.1f} times at "
    "first, and longer"
  )


def _truncated(trends: Trends) -> str | None:
  means = trends.means("rollout/truncated")
  if means is None:
    return None
  first, last = means
  if last <= 0.5 or last <= first + 0.1:
    return None
  return f"{last:.0%} of the responses are cut at their limit, {first:.0%} at first"


def _entropy_grew(trends: Trends) -> str | None:
  means = trends.means("train/entropy")
  if means is None or means[1] <= 3.0 * max(means[0], 0.05):
    return None
  return f"the policy's entropy grew from {means[0]:.3f} to {means[1]:.3f} nats a token"


def _entropy_fell(trends: Trends) -> str | None:
  means = trends.means("train/entropy")
  if means is None or trends.better or means[1] >= 0.1 * means[0]:
    return None
  return (
    f"the policy's entropy fell from {means[0]:.3f} to {means[1]:.3f} nats a token and the reward "
    "did not rise"
  )


def _gap_closed(trends: Trends) -> str | None:
  means = trends.means("train/teacher_gap_abs")
  if means is None or trends.better or means[1] >= 0.02 * means[0]:
    return None
  return (
    f"policy and teacher hardly differ any more ({means[0]:.3f} to {means[1]:.3f} nats a token) "
    "and the reward did not rise"
  )


def _gap_grew(trends: Trends) -> str | None:
  means = trends.means("train/teacher_gap_abs")
  if means is None or means[1] <= 3.0 * max(means[0], 0.01):
    return None
  return f"policy and teacher drift apart ({means[0]:.3f} to {means[1]:.3f} nats a token)"


def _learn_from_nothing(trends: Trends) -> str | None:
  """Looks at a routed method, whose successes may well have no teacher."""
  neither, shares = trends.means("route/neither"), trends.means("data/teacher_share")
  if not trends.has_teacher or shares is None or neither is None or neither[1] <= 0.9:
    return None
  return f"{neither[1]:.0%} of the responses learn from nothing"


def _teacher_share(trends: Trends) -> str | None:
  means, neither = trends.means("data/teacher_share"), trends.means("route/neither")
  if means is None or not trends.has_teacher or neither is not None or means[1] >= 0.1:
    return None
  return f"only {means[1]:.0%} of the responses have a teacher"


def _copy_rate(trends: Trends) -> str | None:
  means = trends.means("data/copy_rate")
  if means is None or trends.better:
    return None
  first, last = means
  if last <= 0.5 or last <= first + 0.25:
    return None
  return (
    f"{last:.0%} of what the responses say stands word for word in what their teachers read, "
    f"{first:.0%} at first"
  )


# ---- the rows ------------------------------------------------------------------------------------

_LOWER = "lower config.optimizer.lr"
SLOWER = (
  "slow the teacher down (config.method.teacher_weights.name=frozen), "
  "keep rewards in the loss (method=sdpo_blend), learn from them alone (method=grpo), "
  f"or {_LOWER}"
)
_ENDS = "config.train.stop_when_worse ends such a run"
_KEEPS = "config.checkpoint.best says which checkpoint is kept"
_SLOW = "slow the teacher down (config.method.teacher_weights.name)"
_EASIER = "raise config.rollout.group so that some succeed"

OF_HISTORY = (
  Sign(
    "worse",
    "eval/SPLIT/gain_high",
    "an evaluation is below the base model's, on the same questions, beyond its interval",
    "training makes the model worse",
    f"{SLOWER}; {_ENDS}",
    _worse,
    without_teacher=f"{_LOWER}; {_ENDS}",
  ),
  Sign(
    "fallen",
    "eval/SPLIT/avg@k",
    "an evaluation is below the best one so far, and their intervals do not meet",
    "what was learnt is being lost",
    f"{SLOWER}; {_KEEPS}",
    _fallen,
    without_teacher=f"{_LOWER}; {_KEEPS}",
  ),
  Sign(
    "teacher_knows",
    "probe/teacher_gain",
    f"the last {PROBES[0]} probes or more show a gain whose interval ends below {MUCH:g}",
    "the teacher knows hardly more",
    f"ask --mode=diagnose what else it could read, or {SLOWER}",
    _teacher_knows,
    source="RESULTS.md, diagnose",
  ),
)
OF_WINDOWS = (
  Sign(
    "reward",
    "train/reward, train/loss_distill",
    "the reward falls, and the divergence from the teacher with it",
    "the policy agrees ever more with a teacher that is no longer right",
    SLOWER,
    _reward_and_divergence,
  ),
  Sign(
    "reward",
    "train/reward",
    "the reward falls by .05 and three standard errors",
    "updates are too large, or what teaches is wrong",
    SLOWER,
    _reward,
    without_teacher=_LOWER,
  ),
  Sign(
    "length",
    "rollout/length",
    "responses have a quarter of their first length, and the reward did not rise",
    "answers collapse",
    f"{_LOWER}, or keep rewards in the loss with method=sdpo_blend",
    _length,
    source="arXiv 2601.20802",
  ),
  Sign(
    "length_tail",
    "rollout/length_tail",
    "the longest response of a step leaves the others behind, more than at first",
    "single responses run away, which may come some 35 steps before a collapse",
    f"look at rollouts/ for repetition; {_SLOW}, or {_LOWER}",
    _length_tail,
    source="arXiv 2606.03532",
  ),
  Sign(
    "truncated",
    "rollout/truncated",
    "more than half of the responses are cut at their limit, more than at first",
    "what is cut is judged without its end",
    f"raise config.rollout.max_new_tokens, or {_LOWER} if they repeat themselves",
    _truncated,
    source="arXiv 2503.14476",
  ),
  Sign(
    "entropy",
    "train/entropy",
    "the entropy is three times as high as at first",
    "the text is losing its order",
    f"{_LOWER}, or {_SLOW}",
    _entropy_grew,
  ),
  Sign(
    "entropy",
    "train/entropy",
    "the entropy is a tenth of the first, and the reward did not rise",
    "all samples are one answer, from which groups learn nothing",
    f"{_LOWER}, or raise config.rollout.group so that groups disagree again",
    _entropy_fell,
    source="arXiv 2503.14476",
  ),
  Sign(
    "gap",
    "train/teacher_gap_abs",
    "policy and teacher hardly differ any more, and the reward did not rise",
    "the context teaches nothing new",
    f"look at teacher_context in rollouts/, or {_SLOW}",
    _gap_closed,
  ),
  Sign(
    "gap",
    "train/teacher_gap_abs",
    "policy and teacher are three times as far apart as at first",
    "the policy does not follow its teacher, or that runs ahead",
    f"{_LOWER}, or hold the teacher with config.method.teacher_weights.name=trust_region",
    _gap_grew,
  ),
  Sign(
    "teacher_share",
    "route/neither",
    "of a routed method, nine responses of ten learn from nothing",
    "the teacher has nothing to show them",
    f"{_EASIER}, or begin with easier questions",
    _learn_from_nothing,
  ),
  Sign(
    "teacher_share",
    "data/teacher_share",
    "fewer than one response in ten has a teacher",
    "there is neither feedback nor a success to show",
    f"{_EASIER}, show feedback (config.method.teacher_context.name=feedback_or_solution), "
    "or begin with easier questions",
    _teacher_share,
  ),
  Sign(
    "copy_rate",
    "data/copy_rate",
    "half of the responses' n-grams stand in what their teachers read, a quarter more than at "
    "first, and the reward did not rise",
    "the policy recites rather than solves",
    "show another success each time (config.method.teacher_context.demonstration=random, where "
    "the context has it) or feedback alone (config.method.teacher_context.use_solution=False)",
    _copy_rate,
  ),
)
SIGNS = OF_HISTORY + OF_WINDOWS
