"""Makes attempts again, each under several prompts, so that what a prompt is worth can be compared.

An attempt is a judged response to a question. Under each of its prompts (`prompts.py`) the policy
answers once more, with the sampling of training, and is judged by the same environment. Whether the
teacher knows more than the policy is then a paired comparison: its answer against that of the
control, the question alone, for the same attempts.

Two prompts of an attempt that read alike are answered once.
"""

from typing import NamedTuple

from sdpo_jax.diagnose.prompts import CONTROL, TURN, Prompt
from sdpo_jax.records import Rollout, Sampling
from sdpo_jax.rollout import Collector, prompt_seed

# (question, its number): an attempt
Place = tuple[int, int]


class Again(NamedTuple):
  """An attempt, and what came of making it again."""

  attempt: Rollout
  prompts: dict[str, Prompt]
  answers: dict[str, Rollout]  # name of a prompt -> the answer to it


def choose(prompts_QG: list[list[dict[str, Prompt]]], budget: int) -> list[Place]:
  """Returns the attempts that are made again with at most `budget` responses.

  They are the first ones of all questions, then the second ones, and so on: attempts at one
  question tell less than attempts at many. The first one that the budget cannot pay ends the
  choice; a failed one has more prompts, and so costs more.
  """
  chosen: list[Place] = []
  for g in range(max(map(len, prompts_QG), default=0)):
    for q, prompts_G in enumerate(prompts_QG):
      prompts = prompts_G[g]
      if not prompts:
        continue
      cost = len(_distinct(prompts))
      if cost > budget:
        return chosen
      chosen.append((q, g))
      budget -= cost
  return chosen


def _distinct(prompts: dict[str, Prompt]) -> dict[tuple[int, ...], str]:
  """Returns {ids: the first name that has them}."""
  names: dict[tuple[int, ...], str] = {}
  for name, prompt in prompts.items():
    names.setdefault(tuple(prompt.tokens), name)
  return names


def make_again(
  collector: Collector,
  params,
  attempts: dict[Place, tuple[Rollout, dict[str, Prompt]]],
  *,
  sampling: Sampling,
  path: tuple,
  version: int = 0,
) -> list[Again]:
  """Returns each attempt with an answer to each of its prompts.

  path: what the seeds depend on, beside the place of the attempt and the name of the prompt.
  """
  asked = [
    (place, name, list(tokens))
    for place, (_, prompts) in attempts.items()
    for tokens, name in _distinct(prompts).items()
  ]
  answers = {}
  # a chat template may let the teacher think where the policy does not
  for by_teacher in (False, True):
    of_reader = [x for x in asked if (x[1] not in (CONTROL, TURN)) == by_teacher]
    if not of_reader:
      continue
    with collector.read_by_teacher(by_teacher):
      groups = collector.collect(
        params,
        [attempts[place][0].task for place, _, _ in of_reader],
        n=1,
        sampling=sampling,
        seeds=[prompt_seed(*path, name, *place) for place, name, _ in of_reader],
        version=version,
        prompts=[tokens for _, _, tokens in of_reader],
      )
    for (place, name, _), (answer,) in zip(of_reader, groups, strict=True):
      answers[place, name] = answer
  made = []
  for place, (attempt, prompts) in attempts.items():
    names = _distinct(prompts)
    of_attempt = {name: answers[place, names[tuple(p.tokens)]] for name, p in prompts.items()}
    made.append(Again(attempt, prompts, of_attempt))
  return made
