"""Reads signs that a run goes wrong off its metrics, each with the setting to change.

This is host code, and pure functions. `warnings` compares the last WINDOW steps of metrics.jsonl
with the first WINDOW, and the latest evaluation with that of the base model; of steps it reports
nothing before there are two windows. Its limits are rules of thumb: they ask a person to look, and
change nothing. A fall in length or entropy, or more copies, is a sign only while the reward has not
risen: SDPO's responses grow shorter as they get better (arXiv 2601.20802).

The copy rate is the share of a response's n-grams of tokens that also stand in what its teacher
read, a solution or feedback, and not in the question. The policy has not read that text. A rate
that climbs therefore means that the policy recites rather than solves.
"""

import functools
import math
import statistics

from sdpo_jax import stats
from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import RunError
from sdpo_jax.objectives.teacher_context import without_thinking
from sdpo_jax.records import Ratio, Rollout

WINDOW = 10  # steps
NGRAM = 8  # tokens
PROBES = (5, 20)  # of the teacher: so many at least are read, and the last so many at most
MUCH = 0.1  # reward that a teacher adds


def check_engine(gap: float | None, limit: float, *, when: str, then: str) -> None:
  """Raises RunError where what sampled is not the policy that is trained.

  Args:
    gap: the mean over a batch's tokens of |log pi_engine - log pi_trainer|, in nats; None: the
      batch has no tokens. Healthy engines in bfloat16 differ by about .02.
    limit: config.train.max_rollout_gap.
    when: says which batch it is.
    then: says what is left.
  """
  if gap is None or gap <= limit:  # NaN is neither
    return
  raise RunError(
    f"the engine's log-probabilities differ from the trainer's by {gap:.3f} nats a token "
    f"({when}), more than config.train.max_rollout_gap={limit:g}: it samples from other weights, "
    f"another precision or other settings, and its samples would mislead; {then}"
  )


def copy_rate(
  rollouts: list[Rollout], contexts, chat: Chat, *, skips_recitals: bool = True
) -> Ratio:
  """Returns copied n-grams over all n-grams of the responses that have a teacher.

  contexts[b] is what the teacher of rollouts[b] read, or None if it has no teacher.
  skips_recitals: leaves out responses that are the solution shown.
  """

  # cached, since the teachers of a group read one solution for many responses
  @functools.cache
  def ngrams_of(text):
    return frozenset(ngrams(chat.text_tokens(text)))

  copied = total = 0
  for rollout, context in zip(rollouts, contexts):
    if context is None:
      continue
    if skips_recitals and context.solution == without_thinking(rollout.text):
      continue  # a success that is to say itself once more copies nobody
    shown = (context.solution, context.more_solutions, context.feedback)
    readable = frozenset().union(*map(ngrams_of, shown))
    of_question = set(ngrams(rollout.prompt_tokens))
    of_response = ngrams(rollout.tokens)
    copied += sum(gram in readable and gram not in of_question for gram in of_response)
    total += len(of_response)
  return Ratio(copied, total)


def ngrams(tokens: list[int]) -> list[tuple[int, ...]]:
  """Returns all runs of NGRAM consecutive tokens."""
  return list(zip(*(tokens[i:] for i in range(NGRAM))))


def warnings(history: list[dict]) -> dict[str, str]:
  """Returns {sign: what is seen and what to change} at the last of these lines of metrics.jsonl.

  Lines of an evaluation alone count for `worse` and `fallen` only.
  """
  steps = [line for line in history if "train/loss" in line]
  signs = {
    "worse": _worse(history),
    "fallen": _fallen(history),
    "teacher_knows": _teacher_knows(steps),
  }
  if len(steps) >= 2 * WINDOW:
    signs |= _signs_of_steps(Trends(steps))
  return {name: text for name, text in signs.items() if text is not None}


def _signs_of_steps(trends: "Trends") -> dict[str, str | None]:
  """Returns every sign that is read off the steps, seen or not."""
  return {
    "reward": _reward(trends),
    "length": _length(trends),
    "length_tail": _length_tail(trends),
    "truncated": _truncated(trends),
    "entropy": _entropy(trends),
    "gap": _gap(trends),
    "teacher_share": _teacher_share(trends),
    "copy_rate": _copy_rate(trends),
  }


class Trends:
  """Holds a run's first and last windows of steps."""

  def __init__(self, steps: list[dict]):
    self._first, self._last = steps[:WINDOW], steps[-WINDOW:]
    reward = self.means("train/reward")
    self.better = reward is not None and reward[1] > reward[0] + 0.02
    self.has_teacher = _has_teacher(self._last)

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


def _values(name: str, lines: list[dict]) -> list[float]:
  return [line[name] for line in lines if name in line]


def _has_teacher(lines: list[dict]) -> bool:
  """Tells whether the steps learn from a teacher."""
  of_teacher = {"train/loss_distill", "train/credit_change"}
  return any(of_teacher & line.keys() for line in lines)


# One function for each sign: what is seen and what to change, or None.

_SLOWER = (
  "slow the teacher down (config.method.teacher_weights.name=frozen), "
  "keep rewards in the loss (method=sdpo_blend), learn from them alone (method=grpo), "
  "or lower config.optimizer.lr"
)


def _worse(history: list[dict]) -> str | None:
  """Looks at the latest evaluation of each split, paired with the base model's by question."""
  advice = _SLOWER if _has_teacher(history) else "lower config.optimizer.lr"
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
        f"on the same questions {gain:+.1%} [{low:+.1%}, {high:+.1%}]. Training makes the model "
        f"worse: {advice}; config.train.stop_when_worse ends such a run"
      )
  return None


def _teacher_knows(steps: list[dict]) -> str | None:
  """Looks at the last probes of the teacher (diagnose/probe.py), while the reward has not risen."""
  least, most = PROBES
  gains = _values("probe/teacher_gain", steps)[-most:]
  if len(gains) < least or Trends(steps).better:
    return None
  found = stats.paired_bootstrap(gains, [0.0] * len(gains))
  if found.high >= MUCH:
    return None
  return (
    f"the teacher's own answers beat the policy's by {found.difference:+.1%} "
    f"[{found.low:+.1%}, {found.high:+.1%}] in the last {len(gains)} probes: it knows hardly more; "
    f"ask --mode=diagnose what else it could read, or {_SLOWER}"
  )


def _fallen(history: list[dict]) -> str | None:
  """Looks at the latest evaluation of each split beside the best one before it.

  The best of several was lucky too. So their intervals must not even meet, although both are of
  the same questions.
  """
  advice = _SLOWER if _has_teacher(history) else "lower config.optimizer.lr"
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
        f"[{last[f'{name}_low']:.1%}, {last[f'{name}_high']:.1%}] at step {last['step']}: "
        f"{advice}; config.checkpoint.best says which checkpoint is kept"
      )
  return None


def _reward(trends: Trends) -> str | None:
  means = trends.means("train/reward")
  if means is None:
    return None
  first, last = means
  # three standard errors: runs are looked at after every step
  if last > first - max(0.05, 3 * trends.noise("train/reward")):
    return None
  seen = f"the reward fell from {first:.3f} to {last:.3f}"
  divergence = trends.means("train/loss_distill")
  if divergence is not None and divergence[1] < divergence[0]:
    return (
      f"{seen} while the divergence from the teacher fell from {divergence[0]:.4f} to "
      f"{divergence[1]:.4f} nats a token: the policy agrees ever more with a teacher that is no "
      f"longer right: {_SLOWER}"
    )
  return f"{seen}: {_SLOWER if trends.has_teacher else 'lower config.optimizer.lr'}"


def _length(trends: Trends) -> str | None:
  means = trends.means("rollout/length")
  if means is None or trends.better:
    return None
  first, last = means
  if last < 0.25 * first:
    return (
      f"responses shrank from {first:.0f} to {last:.0f} tokens and the reward did not rise: "
      "lower config.optimizer.lr, or keep rewards in the loss with method=sdpo_blend"
    )
  return None


def _length_tail(trends: Trends) -> str | None:
  """Asks whether single responses run away from the others (arXiv 2606.03532).

  There they do some 35 steps before the policy collapses. A ratio of few tokens jumps, so it has to
  leave the range of the first window; and the longest responses have to be longer than at first,
  since the ratio also grows where most responses become shorter.
  """
  tails, lengths = trends.means("rollout/length_tail"), trends.means("rollout/length")
  if tails is None or lengths is None:
    return None
  first, last = tails
  is_out_of_range = last > max(1.3 * first, trends.most_at_first("rollout/length_tail"))
  if is_out_of_range and last * lengths[1] > first * lengths[0]:
    return (
      f"the longest response of a step is {last:.1f} times the mean one, {first:.1f} times at "
      "first, and longer: single responses run away, which may come before a collapse: look at "
      "rollouts/ for repetition; slow the teacher down (config.method.teacher_weights.name), "
      "or lower config.optimizer.lr"
    )
  return None


def _truncated(trends: Trends) -> str | None:
  means = trends.means("rollout/truncated")
  if means is None:
    return None
  first, last = means
  if last > 0.5 and last > first + 0.1:
    return (
      f"{last:.0%} of the responses are cut at their limit, {first:.0%} at first: "
      "raise config.rollout.max_new_tokens, "
      "or lower config.optimizer.lr if they repeat themselves"
    )
  return None


def _entropy(trends: Trends) -> str | None:
  means = trends.means("train/entropy")
  if means is None:
    return None
  first, last = means
  if last > 3.0 * max(first, 0.05):
    return (
      f"the policy's entropy grew from {first:.3f} to {last:.3f} nats a token: "
      "lower config.optimizer.lr, or slow the teacher down (config.method.teacher_weights.name)"
    )
  if last < 0.1 * first and not trends.better:
    return (
      f"the policy's entropy fell from {first:.3f} to {last:.3f} nats a token "
      "and the reward did not rise: lower config.optimizer.lr, "
      "or raise config.rollout.group so that groups disagree again"
    )
  return None


def _gap(trends: Trends) -> str | None:
  means = trends.means("train/teacher_gap_abs")
  if means is None:
    return None
  first, last = means
  if last < 0.02 * first and not trends.better:
    return (
      f"policy and teacher hardly differ any more ({first:.3f} to {last:.3f} nats a token) "
      "and the reward did not rise: the context teaches nothing new; "
      "look at teacher_context in rollouts/, "
      "or slow the teacher down (config.method.teacher_weights.name)"
    )
  if last > 3.0 * max(first, 0.01):
    return (
      f"policy and teacher drift apart ({first:.3f} to {last:.3f} nats a token): "
      "lower config.optimizer.lr, "
      "or hold the teacher with config.method.teacher_weights.name=trust_region"
    )
  return None


def _teacher_share(trends: Trends) -> str | None:
  means = trends.means("data/teacher_share")
  if means is None or not trends.has_teacher:
    return None
  neither = trends.means("route/neither")
  if neither is not None:  # a response that learns from the reward may well have none
    if neither[1] > 0.9:
      return (
        f"{neither[1]:.0%} of the responses learn from nothing, for the teacher has nothing to "
        "show them: raise config.rollout.group so that some succeed, or begin with easier questions"
      )
    return None
  _, last = means
  if last < 0.1:
    return (
      f"only {last:.0%} of the responses have a teacher: "
      "raise config.rollout.group so that some succeed, "
      "show feedback (config.method.teacher_context.name=feedback_or_solution), "
      "or begin with easier questions"
    )
  return None


def _copy_rate(trends: Trends) -> str | None:
  means = trends.means("data/copy_rate")
  if means is None or trends.better:
    return None
  first, last = means
  if last > 0.5 and last > first + 0.25:
    return (
      f"{last:.0%} of what the responses say stands word for word in what their teachers read, "
      f"{first:.0%} at first: show another success each time "
      "(config.method.teacher_context.demonstration=random, where the context has it) "
      "or feedback alone (config.method.teacher_context.use_solution=False)"
    )
  return None
