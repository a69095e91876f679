"""Computes what a diagnosis finds from judged groups and from attempts that were made again.

A mean is over questions, each of which counts with the mean of its attempts; its interval (95 %) is
a bootstrap over questions, as `stats.py` has it. A difference is paired: the same attempts, under a
prompt and under the control. Attempts or answers without a verdict are left out, and counted.

All is returned as plain numbers in dicts, which go into a JSON file as they are:

  interval    {"mean", "low", "high"}; bounds are null where one question tells no spread
  difference  the same, of a prompt minus the control
"""

import collections
from typing import Iterable

import numpy as np

from sdpo_jax import monitors, stats
from sdpo_jax.data.chat import Chat
from sdpo_jax.diagnose.again import Again
from sdpo_jax.diagnose.prompts import ABOUT, CONTROL, OWN, SDPO, Prompt
from sdpo_jax.objectives.teacher_context import without_thinking
from sdpo_jax.records import Rollout


def of_policy(groups: list[list[Rollout]], succeeded, *, is_uncut: bool) -> dict:
  """Returns the figures of the policy's own responses.

  reward        interval
  solved        share of questions at which a response of the group succeeds
  mixed         interval: share of groups whose rewards differ, from which alone GRPO learns
  spread        mean over groups of the rewards' standard deviation
  entropy       nats a token, as the mean of -log p over what was sampled; null where top_p cuts
  truncated, length_mean, length_p90, length_tail
  responses, questions, unjudged
  """
  judged = [[r for r in group if r.is_judged] for group in groups]
  judged = [group for group in judged if group]
  rewards = [[r.feedback.reward for r in group] for group in judged]
  rollouts = [r for group in groups for r in group]
  lengths = np.array([len(r.tokens) for r in rollouts])
  logp = [x for r in rollouts for x in r.logp]
  figures = {
    "questions": len(groups),
    "responses": len(rollouts),
    "unjudged": sum(not r.is_judged for r in rollouts),
    "truncated": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    "length_mean": float(lengths.mean()),
    "length_p90": float(np.quantile(lengths, 0.9)),
    "length_tail": float(lengths.max() / max(lengths.mean(), 1.0)),
    "entropy": -float(np.mean(logp)) if logp and is_uncut else None,
  }
  if not judged:
    return figures
  return figures | {
    "reward": _interval([float(np.mean(group)) for group in rewards]),
    "solved": float(np.mean([any(map(succeeded, group)) for group in judged])),
    "mixed": _interval([float(max(group) > min(group)) for group in rewards]),
    "spread": float(np.mean([np.std(group) for group in rewards])),
  }


def of_prompts(
  groups: list[list[Rollout]], prompts_QG: list[list[dict[str, Prompt]]], succeeded
) -> dict[str, dict]:
  """Returns of each kind of prompt which share of the judged attempts has one, before sampling.

  {name: {"share", "share_of_failed", "shortened", "says_nothing", "same_as_policy",
  "same_as_own"}}; the last four are shares of the prompts.
  """
  counts = collections.defaultdict(list)
  judged = failed = 0
  for group, prompts_G in zip(groups, prompts_QG, strict=True):
    for rollout, prompts in zip(group, prompts_G, strict=True):
      judged += rollout.is_judged
      failed += rollout.is_judged and not succeeded(rollout)
      own = prompts.get(OWN)
      for name, prompt in prompts.items():
        is_own = own is not None and own.tokens == prompt.tokens
        counts[name].append((rollout, prompt, is_own))
  figures = {}
  for name in (name for name in ABOUT if name != CONTROL and counts[name]):
    of_name = counts[name]
    has_failed = sum(not succeeded(rollout) for rollout, _, _ in of_name)
    figures[name] = {
      "share": len(of_name) / judged,
      "share_of_failed": has_failed / failed if failed else None,
      "shortened": _share(bool(p.shown and p.shown.was_shortened) for _, p, _ in of_name),
      "says_nothing": _share(p.says_nothing for _, p, _ in of_name),
      "same_as_policy": _share(p.tokens == r.prompt_tokens for r, p, _ in of_name),
      "same_as_own": _share(is_own for _, _, is_own in of_name),
    }
  return figures


def of_again(made: list[Again], succeeded, chat: Chat) -> dict:
  """Returns what a prompt is worth.

    failed   {name: figures} of the attempts that had failed
    solved   figures of "own" on those that had succeeded
    all      {"own", "sdpo"}: figures on all attempts, what a policy that has become this teacher
             would gain
  where figures are
    reward       interval, of the answers to this prompt
    control      interval, of the control's on the same attempts
    difference   of the two
    against_own  the same, minus the own prompt's, with the p-value "p"; null for "own", and where
                 no attempt has both
    attempts, questions
    copied       share of the answers' 8-grams that stand in what was shown
    recited      share of the successes that are the solution that was shown, word for word
  The last two are null where there is nothing to count.
  """
  failed = [again for again in made if not succeeded(again.attempt)]
  solved = [again for again in made if succeeded(again.attempt)]
  names = [name for name in ABOUT if any(name in again.answers for again in failed)]
  return {
    "failed": {name: _figures(name, failed, succeeded, chat) for name in names},
    "solved": _figures(OWN, solved, succeeded, chat),
    "all": {name: _figures(name, made, succeeded, chat) for name in (OWN, SDPO)},
  }


def gain(made: list[Again], name: str, base: str = CONTROL) -> stats.Difference | None:
  """Returns the reward under a prompt minus that under another; None where no attempt has both."""
  pairs = _pairs(name, base, made)
  if not pairs:
    return None
  return stats.paired_bootstrap(*np.array(_by_question(pairs)).T)


def _figures(name: str, made: list[Again], succeeded, chat: Chat) -> dict | None:
  pairs = _pairs(name, CONTROL, made)
  if not pairs:
    return None
  answered_Q, control_Q = np.array(_by_question(pairs)).T
  answers = [again for again in made if name in again.answers]
  contexts = [again.prompts[name].shown and again.prompts[name].shown.context for again in answers]
  copies = monitors.copy_rate(
    [_as_policys(again, name) for again in answers], contexts, chat, skips_recitals=False
  )
  return {
    "reward": _interval(answered_Q),
    "control": _interval(control_Q),
    "difference": _bounds(gain(made, name)),
    "against_own": None if name == OWN else _tested(gain(made, name, OWN)),
    "attempts": len(pairs),
    "questions": len(answered_Q),
    "copied": copies.mean,
    "recited": _recited([again.answers[name] for again in answers], contexts, succeeded),
  }


def _recited(answers: list[Rollout], contexts, succeeded) -> float | None:
  """Returns the share of the successes that are the solution that was shown."""
  recitals = [
    context is not None
    and bool(context.solution)
    and without_thinking(answer.text).split() == context.solution.split()
    for answer, context in zip(answers, contexts, strict=True)
    if succeeded(answer)
  ]
  return _share(recitals) if recitals else None


def _as_policys(again: Again, name: str) -> Rollout:
  """Returns an answer as if it followed the question alone: what it repeats of that is no copy."""
  answer = again.answers[name]
  return Rollout(
    answer.task,
    again.attempt.prompt_tokens,
    answer.tokens,
    answer.logp,
    answer.finish_reason,
    answer.text,
    answer.feedback,
  )


def _pairs(name: str, base: str, made: list[Again]) -> list[tuple[str, float, float]]:
  """Returns (question, reward, that under another prompt) of the attempts with both verdicts."""
  pairs = []
  for again in made:
    answer, other = again.answers.get(name), again.answers.get(base)
    if answer is not None and other is not None and answer.is_judged and other.is_judged:
      pairs.append((again.attempt.task.id, answer.feedback.reward, other.feedback.reward))
  return pairs


def _by_question(pairs: list[tuple[str, float, float]]) -> list[tuple[float, float]]:
  """Returns the two means of each question."""
  of_question = collections.defaultdict(list)
  for question, answered, other in pairs:
    of_question[question].append((answered, other))
  return [tuple(np.mean(values, axis=0)) for values in of_question.values()]


def _bounds(found: stats.Difference | None) -> dict | None:
  """Returns a difference of rewards, which lie in [0, 1], with its bounds."""
  if found is None:
    return None
  bounds = {"mean": found.difference, "low": found.low, "high": found.high}
  if found.low is not None:
    bounds |= {"low": max(found.low, -1.0), "high": min(found.high, 1.0)}
  return bounds


def _tested(found: stats.Difference | None) -> dict | None:
  bounds = _bounds(found)
  return None if bounds is None else bounds | {"p": found.p_value}


def _interval(values_Q) -> dict:
  return stats.mean_interval(values_Q)._asdict()


def _share(flags: Iterable[bool]) -> float:
  return float(np.mean(list(flags)))
