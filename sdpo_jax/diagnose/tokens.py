"""Reads attempts token by token, with the teacher's prompt and without: where the two disagree.

Both readings are the policy's weights on the attempt's own ids (`engine/scoring.py`). Where a right
answer to the question is known, another success of the group or the solution that comes with it,
both read that too: a teacher that knows more has its likeliest token right more often, though it
was never shown that answer.

Units: nats a token.
"""

from typing import NamedTuple

import numpy as np

from sdpo_jax import stats
from sdpo_jax.data.chat import Chat
from sdpo_jax.diagnose.prompts import OWN, Prompt
from sdpo_jax.engine.scoring import TextScorer
from sdpo_jax.records import Rollout

PARTS = 10  # of a response, equally long
# Prompts whose likeliest tokens are compared with an answer that they do not show.
BLIND = ("feedback", "attempt")


class Reading(NamedTuple):
  """One attempt as policy and teacher read it."""

  attempt: Rollout
  strings: list[str]  # the text of each token
  gap: list[float]  # log q - log pi of each token
  top_differs: list[bool]  # the likeliest token is another one
  policy_top: list[str]  # the text of the policy's likeliest token at each place
  teacher_top: list[str]


class Answer(NamedTuple):
  """A right answer as policy and teacher expect it."""

  question: str
  policy_right: float  # share of its tokens that are the policy's likeliest ones
  teacher_right: float


class TokenReader:
  """Reads texts with one set of weights, at the temperature of sampling."""

  def __init__(self, scorer: TextScorer, chat: Chat, temperature: float):
    self._scorer, self._chat = scorer, chat
    self._temperature = temperature or 1.0  # greedy: as the model is

  def read(self, attempt: Rollout, prompt: Prompt) -> Reading | None:
    """Compares both readings of an attempt; None where it is empty."""
    if not attempt.tokens:
      return None
    logp, top = self._read(attempt.prompt_tokens, attempt.tokens)
    logp_teacher, top_teacher = self._read(prompt.tokens, attempt.tokens)
    return Reading(
      attempt,
      self._chat.token_strings(attempt.tokens),
      (logp_teacher - logp).tolist(),
      (top != top_teacher).tolist(),
      self._chat.token_strings(top.tolist()),
      self._chat.token_strings(top_teacher.tolist()),
    )

  def expect(self, attempt: Rollout, prompt: Prompt, answer: list[int]) -> Answer:
    """Tells how often either reader's likeliest token is the right answer's next one."""
    _, top = self._read(attempt.prompt_tokens, answer)
    _, top_teacher = self._read(prompt.tokens, answer)
    right, right_teacher = (float(np.mean(x == np.array(answer))) for x in (top, top_teacher))
    return Answer(attempt.task.id, right, right_teacher)

  def _read(self, prompt: list[int], response: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (log-probability, likeliest token) at each token of a response."""
    scores = self._scorer.score(
      prompt + response, begin=len(prompt), temperature=self._temperature, top=1
    )
    return scores.logp_X, scores.top_token_XM[:, 0]


def known_answer(group: list[Rollout], succeeded, chat: Chat) -> list[int] | None:
  """Returns the ids of a right answer: a success of the group, or the question's own solution."""
  for rollout in group:
    if succeeded(rollout) and rollout.tokens:
      return rollout.tokens
  solution = group[0].task.solution
  return chat.text_tokens(solution) if solution else None


def read_attempts(
  reader: TokenReader,
  groups: list[list[Rollout]],
  prompts_QG: list[list[dict[str, Prompt]]],
  succeeded,
  chat: Chat,
  most: int,
) -> tuple[list[Reading], dict[str, list[Answer]]]:
  """Reads at most `most` attempts with the own prompt, and half as many answers with blind ones.

  One attempt a question and round, failed ones before others.
  """
  readings: list[Reading] = []
  answers: dict[str, list[Answer]] = {}
  places = [(g, q) for q, group in enumerate(groups) for g in range(len(group))]
  places.sort(key=lambda place: (succeeded(groups[place[1]][place[0]]), place))
  for g, q in places:
    attempt, prompts = groups[q][g], prompts_QG[q][g]
    if OWN in prompts and len(readings) < most:
      reading = reader.read(attempt, prompts[OWN])
      readings += [reading] if reading is not None else []
    answer = known_answer(groups[q], succeeded, chat)
    for name in BLIND:
      if name in prompts and answer and len(answers.get(name, ())) < most // 2:
        answers.setdefault(name, []).append(reader.expect(attempt, prompts[name], answer))
  return readings, answers


def figures(readings: list[Reading], answers: dict[str, list[Answer]]) -> dict:
  """Returns the figures of a diagnosis.

  gap            mean |log q - log pi|; null where nothing was read
  gap_by_part    the same in each tenth of the response
  top_differs    share of tokens
  right          {prompt: {"policy", "teacher", "difference" with its interval, "answers"}}
  """
  right = {name: _right(of_name) for name, of_name in answers.items()}
  if not readings:
    return {
      "attempts": 0,
      "gap": None,
      "gap_by_part": [None] * PARTS,
      "top_differs": None,
      "right": right,
    }
  gaps = np.abs(np.concatenate([reading.gap for reading in readings]))
  parts = np.concatenate([_parts(len(reading.gap)) for reading in readings])
  differs = np.concatenate([reading.top_differs for reading in readings])
  return {
    "attempts": len(readings),
    "gap": float(gaps.mean()),
    "gap_by_part": [_mean(gaps[parts == i]) for i in range(PARTS)],
    "top_differs": float(differs.mean()),
    "right": right,
  }


def _mean(values: np.ndarray) -> float | None:
  return float(values.mean()) if values.size else None


def _parts(length: int) -> np.ndarray:
  """Returns the tenth in which each token of a response lies."""
  return np.arange(length) * PARTS // length


def _right(answers: list[Answer]) -> dict:
  questions = list(dict.fromkeys(answer.question for answer in answers))
  policy_Q, teacher_Q = (
    [float(np.mean([a[field] for a in answers if a.question == q])) for q in questions]
    for field in (1, 2)
  )
  found = stats.paired_bootstrap(teacher_Q, policy_Q)
  return {
    "policy": float(np.mean(policy_Q)),
    "teacher": float(np.mean(teacher_Q)),
    "difference": {"mean": found.difference, "low": found.low, "high": found.high},
    "answers": len(answers),
  }
