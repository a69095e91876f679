"""Reads signs that a run goes wrong off its metrics, each with the setting to change.

This is host code, and pure functions. `warnings` compares the last WINDOW steps of metrics.jsonl
with the first WINDOW; it reports nothing before there are two windows. Its limits are rules of
thumb, not measurements: they ask a person to look, and change nothing. A fall in length or entropy
is a sign only while the reward has not risen: SDPO's responses grow shorter as they get better
(arXiv 2601.20802).

The copy rate is the share of a response's n-grams of tokens that also stand in what its teacher
read, a solution or feedback, and not in the question. The policy has not read that text. A rate
that climbs therefore means that the policy recites rather than solves.
"""

import functools

from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import RunError
from sdpo_jax.objectives.teacher_context import without_thinking
from sdpo_jax.records import Ratio, Rollout

WINDOW = 10  # steps
NGRAM = 8  # tokens


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


def copy_rate(rollouts: list[Rollout], contexts, chat: Chat) -> Ratio:
  """Returns copied n-grams over all n-grams of the responses that have a teacher.

  contexts[b] is what the teacher of rollouts[b] read, or None if it has no teacher.
  """

  # cached, since the teachers of a group read one solution for many responses
  @functools.cache
  def ngrams_of(text):
    return frozenset(ngrams(chat.text_tokens(text)))

  copied = total = 0
  for rollout, context in zip(rollouts, contexts):
    if context is None or context.solution == without_thinking(rollout.text):
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

  Lines of an evaluation alone do not count.
  """
  steps = [line for line in history if "train/loss" in line]
  if len(steps) < 2 * WINDOW:
    return {}
  trends = Trends(steps)
  signs = {
    "length": _length(trends),
    "truncated": _truncated(trends),
    "entropy": _entropy(trends),
    "gap": _gap(trends),
    "teacher_share": _teacher_share(trends),
    "copy_rate": _copy_rate(trends),
  }
  return {name: text for name, text in signs.items() if text is not None}


class Trends:
  """Holds a run's first and last windows of steps."""

  def __init__(self, steps: list[dict]):
    self._first, self._last = steps[:WINDOW], steps[-WINDOW:]
    reward = self.means("train/reward")
    self.better = reward is not None and reward[1] > reward[0] + 0.02
    of_teacher = {"train/loss_distill", "train/credit_change"}
    self.has_teacher = any(of_teacher & line.keys() for line in self._last)

  def means(self, name: str) -> tuple[float, float] | None:
    """Returns a metric's mean over the first and over the last window; None if one has none."""
    first, last = _mean(name, self._first), _mean(name, self._last)
    return None if first is None or last is None else (first, last)


def _mean(name: str, lines: list[dict]) -> float | None:
  values = [line[name] for line in lines if name in line]
  return sum(values) / len(values) if values else None


# One function for each sign: what is seen and what to change, or None.


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
  if means is None:
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
