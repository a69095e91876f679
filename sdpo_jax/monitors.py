"""Watches a run for signs that it goes wrong, and for an engine that samples other weights.

This is host code, and pure functions. `warnings` reads the signs of `signs.py` off metrics.jsonl;
each names the setting to change. A sign asks a person to look, and changes nothing.

The copy rate is the share of a response's n-grams of tokens that also stand in what its teacher
read, a solution or feedback, and not in the question. The policy has not read that text. A rate
that climbs therefore means that the policy recites rather than solves.
"""

import functools

from sdpo_jax import signs
from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import RunError
from sdpo_jax.objectives.teacher_context import without_thinking
from sdpo_jax.records import Ratio, Rollout

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

  Lines of an evaluation alone count for `worse` and `fallen` only. Of the steps nothing is reported
  before there are two windows, but for `teacher_knows`. Of two rows with one name the first that is
  seen counts.
  """
  found: dict[str, str] = {}
  steps = signs.steps_of(history)
  trends = signs.Trends(steps) if len(steps) >= 2 * signs.WINDOW else None
  for sign in signs.OF_HISTORY:
    _note(found, sign, sign.look(history), signs.has_teacher(history))
  for sign in signs.OF_WINDOWS if trends is not None else ():
    _note(found, sign, sign.look(trends), trends.has_teacher)
  return found


def _note(found: dict[str, str], sign: signs.Sign, seen: str | None, has_teacher: bool) -> None:
  if seen is not None:
    found.setdefault(sign.name, sign.warning(seen, has_teacher))
