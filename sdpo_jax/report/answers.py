"""Puts the answers of the base model and of the last evaluation to the same questions in pairs."""

import random

from sdpo_jax.report.cards import reward_badge
from sdpo_jax.report.runs import Run

QUESTIONS = 10  # of each split, with the answers before and after


def answers(run: Run) -> dict:
  """Returns pairs of answers of each split whose texts were kept at both ends of the run."""
  splits = []
  for split, by_step in run.texts.items():
    last = max(by_step)
    pairs = _pairs(by_step[0], by_step[last]) if 0 in by_step and last else []
    if pairs:
      splits.append({"name": split, "last": last, "pairs": pairs})
  return {"label": run.label, "seed": run.seed, "splits": splits}


def _pairs(before: list[dict], after: list[dict]) -> list[dict]:
  """Returns random questions, the same ones in every report, with the first answer to each."""
  firsts, lasts = _first_answers(before), _first_answers(after)
  questions = [question for question in firsts if question in lasts]
  chosen = random.Random(0).sample(questions, min(QUESTIONS, len(questions)))
  return [
    {"prompt": prompt, "before": firsts[place, prompt], "after": lasts[place, prompt]}
    for place, prompt in chosen
  ]


def _first_answers(lines: list[dict]) -> dict[tuple, dict]:
  """Returns {(place, question): text and badge of its first answer} of lines that hold texts."""
  found = {}
  for line in lines:
    responses = line.get("responses")
    first = responses[0] if isinstance(responses, list) and responses else None
    if isinstance(first, dict) and isinstance(line.get("prompt"), str) and "text" in first:
      badge, reward = reward_badge(first.get("reward"))
      answer = {"badge": badge, "reward": reward, "text": first["text"]}
      found[line.get("question"), line["prompt"]] = answer
  return found
