"""Compares an answer with the right ones as SQuAD's evaluation and Search-R1 do: by exact match.

Both sides are made lower case, lose ASCII punctuation, then the words a, an and the, and have their
white space collapsed. So "The Beatles!" is "beatles", "U.S." is "us", and "3-1" is "31".

Source: the evaluation of SQuAD 1.1 (arXiv:1606.05250); Search-R1 (arXiv:2503.09516).
"""

import re
import string

from sdpo_jax.envs.rows import field, given

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
  """Returns what is compared of an answer."""
  letters = text.lower().translate(_PUNCTUATION)
  return " ".join(_ARTICLE.sub(" ", letters).split())


def is_match(answer: str, golden: list[str]) -> bool:
  """Tells whether an answer equals one of the right ones."""
  return normalise(answer) in map(normalise, golden)


def golden_answers(row: dict) -> list[str]:
  """Returns the right answers of a row.

  They stand in `golden_answers`, or in Search-R1's `reward_model.ground_truth.target`, as a list or
  a single text. ValueError that names the field, also for an answer that normalises to nothing,
  which an empty one would match.
  """
  name, value = "golden_answers", given(row, "golden_answers")
  if value is None and given(row, "reward_model") is not None:
    name = "reward_model.ground_truth.target"
    truth = field(row, "reward_model", dict).get("ground_truth")
    value = truth.get("target") if isinstance(truth, dict) else None
  if value is None:
    raise ValueError(f"field {name!r} is missing; the row has {sorted(map(str, row))}")
  if hasattr(value, "tolist"):  # an array, as parquet has them
    value = value.tolist()
  answers = [value] if isinstance(value, str) else value
  if not isinstance(answers, list) or not answers:
    raise ValueError(f"field {name!r} holds no list of answers: {str(value)[:100]!r}")
  for answer in answers:
    if not isinstance(answer, str) or not normalise(answer):
      raise ValueError(f"field {name!r} holds {str(answer)[:100]!r}, which is no answer")
  return answers
