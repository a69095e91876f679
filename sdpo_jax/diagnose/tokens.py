"""Reads attempts token by token, with the teacher's prompt and without: where the two disagree.

Both readings are the policy's weights on the attempt's own ids (`engine/scoring.py`). Where a right
answer to the question is known, another success of the group or the solution that comes with it,
both read that too: a teacher that knows more has its likeliest token right more often, though it
was never shown that answer.

An attempt itself is followed as far as its right next token is known: a success to its end, a
failure to the token at which it departs from a right answer (`Reading.right`). There the teacher
reads what it reads in training; an answer that stands in its prompt counts for nothing, as it would
only be recited. The policy drew a failed attempt, so at the departure, and less so before, its own
share is low by selection: two equally good readers differ there. What both expect of whole right
answers is the fair comparison.

An attempt is read once more under what the teacher was shown of another question's attempt. What
moves alike under either is mostly the style of being shown something (`figures`, "alike");
questions that have something in common may share more.

Units: nats a token.
"""

import os
from typing import NamedTuple

import numpy as np

from sdpo_jax import stats
from sdpo_jax.data.chat import Chat
from sdpo_jax.diagnose.prompts import OWN, Prompt, PromptMaker
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
  right: "Right | None" = None  # None: no right answer is known
  gap_elsewhere: list[float] | None = None  # log q' - log pi, q' shown another question's context


class Right(NamedTuple):
  """How often the likeliest next token of an attempt is the right one, as far as that is known."""

  solved: bool  # the attempt succeeded, so all of its tokens are right
  departs: bool  # the last of these places is where the attempt departs from a right answer
  policy: list[bool]  # one for each place from the first token on
  teacher: list[bool]


class Answer(NamedTuple):
  """A right answer as policy and teacher expect it."""

  question: str
  policy: list[bool]  # whether each of its tokens is the policy's likeliest one
  teacher: list[bool]


class TokenReader:
  """Reads texts with one set of weights, at the temperature of sampling."""

  def __init__(self, scorer: TextScorer, chat: Chat, temperature: float):
    self._scorer, self._chat = scorer, chat
    self._temperature = temperature or 1.0  # greedy: as the model is

  def read(
    self,
    attempt: Rollout,
    prompt: Prompt,
    *,
    answer: list[int] | None = None,
    solved: bool = False,
    elsewhere: list[int] | None = None,
  ) -> Reading | None:
    """Compares both readings of an attempt; None where it is empty.

    answer: the ids of a right answer; of a solved attempt its own. elsewhere: the prompt with what
    the teacher is shown of another question's attempt.
    """
    if not attempt.tokens:
      return None
    logp, top = self._read(attempt.prompt_tokens, attempt.tokens)
    logp_teacher, top_teacher = self._read(prompt.tokens, attempt.tokens)
    right = None
    if answer:
      shared = len(os.path.commonprefix([attempt.tokens, answer]))
      places = min(shared + 1, len(attempt.tokens), len(answer))
      wanted = np.array(answer[:places])
      likeliest = [(x[:places] == wanted).tolist() for x in (top, top_teacher)]
      right = Right(solved, places > shared, *likeliest)
    gap_elsewhere = None
    if elsewhere is not None:
      gap_elsewhere = (self._read(elsewhere, attempt.tokens)[0] - logp).tolist()
    return Reading(
      attempt,
      self._chat.token_strings(attempt.tokens),
      (logp_teacher - logp).tolist(),
      (top != top_teacher).tolist(),
      self._chat.token_strings(top.tolist()),
      self._chat.token_strings(top_teacher.tolist()),
      right,
      gap_elsewhere,
    )

  def expect(self, attempt: Rollout, prompt: Prompt, answer: list[int]) -> Answer:
    """Tells how often either reader's likeliest token is the right answer's next one."""
    _, top = self._read(attempt.prompt_tokens, answer)
    _, top_teacher = self._read(prompt.tokens, answer)
    return Answer(attempt.task.id, *((x == np.array(answer)).tolist() for x in (top, top_teacher)))

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


def unshown_answer(
  group: list[Rollout], attempt: Rollout, prompt: Prompt, maker: PromptMaker
) -> list[int] | None:
  """Returns the ids of a right answer that does not stand in a prompt; None where there is none.

  A solved attempt is its own answer.
  """
  shown = maker.chat.plain_text(prompt.tokens)
  if maker.succeeded(attempt):
    candidates = [attempt.tokens]
  else:
    candidates = [r.tokens for r in group if maker.succeeded(r)]
    solution = attempt.task.solution
    candidates += [maker.chat.text_tokens(solution)] if solution else []
  for answer in candidates:
    text = maker.chat.response_text(answer).strip()
    if text and text not in shown:
      return answer
  return None


def read_attempts(
  reader: TokenReader,
  groups: list[list[Rollout]],
  prompts_QG: list[list[dict[str, Prompt]]],
  maker: PromptMaker,
  most: int,
) -> tuple[list[Reading], dict[str, list[Answer]]]:
  """Reads at most `most` attempts with the own prompt, and half as many answers with blind ones.

  One attempt a question and round, failed ones before others.
  """
  readings: list[Reading] = []
  answers: dict[str, list[Answer]] = {}
  places = [(g, q) for q, group in enumerate(groups) for g in range(len(group))]
  places.sort(key=lambda place: (maker.succeeded(groups[place[1]][place[0]]), place))
  for g, q in places:
    attempt, prompts = groups[q][g], prompts_QG[q][g]
    answer = known_answer(groups[q], maker.succeeded, maker.chat)
    if OWN in prompts and len(readings) < most:
      reading = reader.read(
        attempt,
        prompts[OWN],
        answer=unshown_answer(groups[q], attempt, prompts[OWN], maker),
        solved=maker.succeeded(attempt),
        elsewhere=_elsewhere(groups, prompts_QG, q, attempt, maker),
      )
      readings += [reading] if reading is not None else []
    for name in BLIND:
      if name in prompts and answer and len(answers.get(name, ())) < most // 2:
        answers.setdefault(name, []).append(reader.expect(attempt, prompts[name], answer))
  return readings, answers


def _elsewhere(
  groups: list[list[Rollout]],
  prompts_QG: list[list[dict[str, Prompt]]],
  q: int,
  attempt: Rollout,
  maker: PromptMaker,
) -> list[int] | None:
  """Returns the attempt's prompt with what is shown of another question's, of the same outcome.

  It is that of the next question which has one; None if none has.
  """
  solved = maker.succeeded(attempt)
  for step in range(1, len(prompts_QG)):
    other = (q + step) % len(prompts_QG)
    for rollout, prompts in zip(groups[other], prompts_QG[other], strict=True):
      is_alike = OWN in prompts and maker.succeeded(rollout) == solved
      if is_alike and prompts[OWN].shown is not None:
        return maker.shown(attempt.task, prompts[OWN].shown.context)
  return None


def figures(readings: list[Reading], answers: dict[str, list[Answer]]) -> dict:
  """Returns the figures of a diagnosis.

  gap            mean |log q - log pi|; null where nothing was read
  gap_by_part    the same in each tenth of the response
  top_differs    share of tokens
  right          {prompt: {"policy", "teacher", "difference" with its interval, "answers",
                 "by_part"}}: of right answers, the share of tokens that are the likeliest ones,
                 averaged over answers and then questions; by tenths, over tokens
  followed       {"solved" | "failed": the same of attempts}, as far as the right token is known;
                 of failed ones also "departure": the same at the token where they leave the answer
  alike          the share of the gap, by tokens, that another question's context makes too: the
                 lesser of both gaps where they have one sign; null where nothing was read
  """
  right = {name: _right(of_name) for name, of_name in answers.items()}
  if not readings:
    return {
      "attempts": 0,
      "gap": None,
      "gap_by_part": [None] * PARTS,
      "top_differs": None,
      "right": right,
      "followed": {},
      "alike": None,
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
    "followed": _followed(readings),
    "alike": _alike(readings),
  }


def _mean(values: np.ndarray) -> float | None:
  return float(values.mean()) if values.size else None


def _parts(length: int) -> np.ndarray:
  """Returns the tenth in which each token of a response lies."""
  return np.arange(length) * PARTS // length


def _followed(readings: list[Reading]) -> dict[str, dict]:
  """Returns how often either reader is right along attempts, solved and failed apart."""
  found = {}
  for name, solved in (("solved", True), ("failed", False)):
    rights = [
      (reading.attempt.task.id, reading.right)
      for reading in readings
      if reading.right is not None and reading.right.solved == solved
    ]
    answers = [Answer(question, right.policy, right.teacher) for question, right in rights]
    if not answers:
      continue
    found[name] = _right(answers)
    ends = [Answer(q, x.policy[-1:], x.teacher[-1:]) for q, x in rights if x.departs]
    if ends and not solved:
      found[name]["departure"] = _right(ends)
      del found[name]["departure"]["by_part"]  # they are single tokens
  return found


def _alike(readings: list[Reading]) -> float | None:
  both = [r for r in readings if r.gap_elsewhere is not None]
  if not both:
    return None
  gap, elsewhere = (
    np.concatenate([getattr(r, name) for r in both]) for name in ("gap", "gap_elsewhere")
  )
  common = np.where(gap * elsewhere > 0, np.minimum(np.abs(gap), np.abs(elsewhere)), 0.0)
  return float(common.sum() / np.abs(gap).sum()) if gap.any() else None


def _right(answers: list[Answer]) -> dict:
  questions = list(dict.fromkeys(answer.question for answer in answers))
  policy_Q, teacher_Q = (
    [
      float(np.mean([np.mean(a[field]) for a in answers if a.question == question]))
      for question in questions
    ]
    for field in (1, 2)
  )
  parts = np.concatenate([_parts(len(answer.policy)) for answer in answers])
  by_part = {}
  for name in ("policy", "teacher"):
    is_right = np.concatenate([getattr(answer, name) for answer in answers])
    by_part[name] = [_mean(is_right[parts == i]) for i in range(PARTS)]
  found = stats.paired_bootstrap(teacher_Q, policy_Q)
  return {
    "policy": float(np.mean(policy_Q)),
    "teacher": float(np.mean(teacher_Q)),
    "difference": {"mean": found.difference, "low": found.low, "high": found.high},
    "answers": len(answers),
    "by_part": by_part,
  }
