"""Computes every figure of an evaluation from its lines, one line a question.

A line holds
  question     its place among the questions of its split, from 0
  id           of the task
  kind, difficulty
               as the task says in `Task.data`; null where it does not
  seed         of its samples
  prompt       the question, where config.eval.keep_texts says so
  responses    a list, in the order of sampling:
    reward, status, finish_reason
    length     in tokens, the stop token included
    mean_logp  the mean over its tokens, in nats, as the engine gave them; null where it gave none
    answer     the final answer, null if there is none in the form asked for; the field is missing
               where the environment extracts none
    text       where config.eval.keep_texts says so
    base_logp  as in `fluency.py`, where config.eval.base_logp says so; null without a token

Responses without a verdict (env_failed) are left out of all that is made of rewards, and counted.
Lengths and log-probabilities are those of all responses.

Entropy, in nats a token, is the mean of -log p over all sampled tokens. Given what stands before a
token, -log p of a sample has that distribution's entropy as its mean, if it was sampled from just
that distribution: at temperature 1, without top_p cuts. It is not computed for anything else.
"""

import collections
import itertools
import math

import numpy as np

from sdpo_jax import stats
from sdpo_jax.records import Status


def headline(name: str, lines: list[dict]) -> dict[str, float]:
  """Returns NAME/avg@k with `_low` and `_high`, and NAME/pass@k.

  avg@k is the mean reward over questions and their k responses; its interval is a bootstrap over
  questions (95 %). pass@k is the share of questions that one of all their responses solves.
  """
  rewards_of_lines = [rewards_of(line) for line in lines]
  failed = sum(
    len(line["responses"]) - len(rewards)
    for line, rewards in zip(lines, rewards_of_lines, strict=True)
  )
  metrics = {f"{name}/env_failed": float(failed)} if failed else {}
  rewards_of_lines = [rewards for rewards in rewards_of_lines if rewards]
  if not rewards_of_lines:  # questions without one verdict tell nothing
    return metrics
  metrics |= _interval(f"{name}/avg@k", stats.avg_at_k(rewards_of_lines))
  solved = sum(successes(rewards) > 0 for rewards in rewards_of_lines)
  return metrics | {f"{name}/pass@k": solved / len(rewards_of_lines)}


def mean_rewards(lines: list[dict]) -> list[float | None]:
  """Returns the mean reward of each question, None for one without a verdict."""
  means = []
  for line in lines:
    rewards = rewards_of(line)
    means.append(float(np.mean(rewards)) if rewards else None)
  return means


def gain(name: str, now_Q: list[float | None], base_Q: list[float | None]) -> dict[str, float]:
  """Returns NAME/gain: the mean reward on the same questions, less that of the base model.

  With it go `_low` and `_high`, a paired bootstrap over questions (95 %). They are missing where
  the questions are too few to tell a difference from none. A question counts if both have a
  verdict. {} where none has.
  """
  pairs = [pair for pair in zip(now_Q, base_Q, strict=True) if None not in pair]
  if not pairs:
    return {}
  difference = stats.paired_bootstrap(*zip(*pairs))
  metrics = {f"{name}/gain": difference.difference}
  # where all questions differ by the same the bounds have no width, however few they are
  has_width = difference.low != difference.high
  if difference.low is not None and (has_width or difference.p_value < 0.05):
    metrics |= {f"{name}/gain_low": difference.low, f"{name}/gain_high": difference.high}
  return metrics


def of_fluency(name: str, lines: list[dict]) -> dict[str, float]:
  """Returns metrics of the answers as language, those for which the lines hold what it takes.

  NAME/distinct_2   the share of different ones among all bigrams of words of all answers. It
                    falls where answers repeat themselves or each other, and by itself with their
                    number and length: compare like with like
  NAME/base_logp    the mean over answers of `base_logp`, nats a token
  """
  responses = [response for line in lines for response in line["responses"]]
  share = distinct_2([response["text"] for response in responses if "text" in response])
  metrics = {} if share is None else {f"{name}/distinct_2": share}
  means = [r["base_logp"] for r in responses if r.get("base_logp") is not None]
  return metrics | ({f"{name}/base_logp": float(np.mean(means))} if means else {})


def distinct_2(texts: list[str]) -> float | None:
  """Returns the share of different bigrams among all of the texts; None where there are none.

  Words are what white space divides, as they stand.
  """
  counts: collections.Counter = collections.Counter()
  for text in texts:
    counts.update(itertools.pairwise(text.split()))
  return len(counts) / counts.total() if counts else None


def summarise(name: str, lines: list[dict], *, has_entropy: bool) -> dict[str, float]:
  """Returns all metrics of one split: the headline, and what is behind it.

  has_entropy: whether the responses were sampled at temperature 1 without top_p cuts.

    NAME/pass@1, pass@2, pass@4, ...   unbiased, over the questions with so many verdicts; intervals
    NAME/maj@2, maj@4, ...             the majority's answer is right (stats.maj_at_k), likewise,
                                       where the environment extracts answers
    NAME/questions, timeouts, format_failed
                                       counts; the last is of responses without an answer in the
                                       form asked for, where the environment extracts answers
    NAME/length_mean, length_p50, length_p90, length_p99, cut_off
                                       tokens, and the share of responses cut off at the limit
    NAME/entropy                       nats a token
    NAME/distinct_2, base_logp         as `of_fluency` says
    NAME/kind/KIND/..., NAME/difficulty/DIFFICULTY/...
                                       headline and number of questions of each group
  """
  metrics = headline(name, lines) | _pass_at(name, lines) | _maj_at(name, lines)
  metrics |= _counts(name, lines) | of_fluency(name, lines)
  responses = [response for line in lines for response in line["responses"]]
  if responses:
    metrics |= _lengths(name, responses)
    if has_entropy:
      metrics |= _entropy(name, responses)
  for key in ("kind", "difficulty"):
    for value, group in _groups(lines, key).items():
      of_group = f"{name}/{key}/{value}"
      metrics[f"{of_group}/questions"] = float(len(group))
      metrics |= headline(of_group, group)
  return metrics


def judged_responses(line: dict) -> list[dict]:
  """Returns the responses of a line that have a verdict."""
  return [r for r in line["responses"] if r["status"] != Status.ENV_FAILED.value]


def rewards_of(line: dict) -> list[float]:
  """Returns their rewards."""
  return [response["reward"] for response in judged_responses(line)]


def successes(rewards: list[float]) -> int:
  """Returns how many of the responses solve their question."""
  return sum(reward >= 1.0 for reward in rewards)


def _interval(name: str, interval: stats.Interval) -> dict[str, float]:
  return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _pass_at(name: str, lines: list[dict]) -> dict[str, float]:
  rewards_of_lines = [rewards_of(line) for line in lines]
  most = max(map(len, rewards_of_lines), default=0)
  metrics, k = {}, 1
  while k <= most:
    enough = [rewards for rewards in rewards_of_lines if len(rewards) >= k]
    counts = [len(rewards) for rewards in enough]
    value_Q = stats.pass_at_k(counts, [successes(rewards) for rewards in enough], k)
    metrics |= _interval(f"{name}/pass@{k}", stats.mean_interval(value_Q))
    k *= 2
  return metrics


def _maj_at(name: str, lines: list[dict]) -> dict[str, float]:
  judged = [judged_responses(line) for line in lines]
  if not any("answer" in response for group in judged for response in group):
    return {}
  metrics, k = {}, 2
  while k <= max(map(len, judged)):
    value_Q = [
      stats.maj_at_k([r["answer"] for r in group], [r["reward"] for r in group], k)
      for group in judged
      if len(group) >= k
    ]
    metrics |= _interval(f"{name}/maj@{k}", stats.mean_interval(value_Q))
    k *= 2
  return metrics


def _counts(name: str, lines: list[dict]) -> dict[str, float]:
  responses = [response for line in lines for response in line["responses"]]
  metrics = {f"{name}/questions": float(len(lines))}
  metrics[f"{name}/timeouts"] = float(sum(r["status"] == "timeout" for r in responses))
  extracted = [r["answer"] for r in responses if "answer" in r]
  if extracted:
    metrics[f"{name}/format_failed"] = float(extracted.count(None))
  return metrics


def _lengths(name: str, responses: list[dict]) -> dict[str, float]:
  lengths = [response["length"] for response in responses]
  p50, p90, p99 = (float(value) for value in np.quantile(lengths, (0.5, 0.9, 0.99)))
  # an episode is cut off where its next turn has no room
  cut_off = sum(response["finish_reason"] in ("length", "budget") for response in responses)
  return {
    f"{name}/length_mean": float(np.mean(lengths)),
    f"{name}/length_p50": p50,
    f"{name}/length_p90": p90,
    f"{name}/length_p99": p99,
    f"{name}/cut_off": cut_off / len(responses),
  }


def _entropy(name: str, responses: list[dict]) -> dict[str, float]:
  sampled = [response for response in responses if response["mean_logp"] is not None]
  tokens = sum(response["length"] for response in sampled)
  if not tokens:
    return {}
  total = math.fsum(-response["mean_logp"] * response["length"] for response in sampled)
  return {f"{name}/entropy": total / tokens}


def _groups(lines: list[dict], key: str) -> dict:
  """Returns {value: its lines}, numbers before texts; lines without a value are in none."""
  values = {line[key] for line in lines if line[key] is not None}
  ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
  return {value: [line for line in lines if line[key] == value] for value in ordered}
