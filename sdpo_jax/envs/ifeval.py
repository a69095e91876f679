"""Judges instructions that a program can check: the 25 constraints of IFEval.

A row has
  prompt                the request
  instruction_id_list   names of constraints, keys of CONSTRAINTS
  kwargs                one object of arguments per constraint; null and NaN, as on the hub and in
                        tables, count as absent
  key                   a number of the row
An argument of a wrong type, or one that no response or any response would follow, makes the row
malformed; so do two constraints that exclude each other, as far as `ifeval_conflicts.py` can tell.

Source: arXiv 2311.07911 and its release. The constraints are checked on the response after its
thinking block. They are those of the release but for slips that would make a wrong reward; where a
check here and there differ, its docstring says what the release does. These hold for all of them:
  * A response is judged as it looks: letters are composed (NFC), line ends are alike, and
    characters that print nothing (Unicode's Cf, such as zero-width spaces) are left out. A response
    of nothing else is empty. The release judges the raw text.
  * Texts in arguments are taken literally. The release takes keywords, forbidden words and markers
    for regular expressions, so that C++ is an error.
  * Where the request must be repeated and breaks another constraint itself (five rows, such as one
    that forbids commas and has some), that constraint holds for the rest of the response. There it
    holds for the whole response, and no response gets the reward.

Reward is 1 if every constraint is followed (prompt-level strict accuracy), else 0. Feedback names
each broken constraint with what the response holds instead.
"""

import inspect

from sdpo_jax.envs import ifeval_conflicts
from sdpo_jax.envs import language as languages
from sdpo_jax.envs.ifeval_checks import CONSTRAINTS, RELATIONS, as_it_looks, repeat_prompt
from sdpo_jax.envs.rows import (
  field,
  final_text,
  is_missing,
  messages,
  row_name,
  whole_number,
)
from sdpo_jax.records import Feedback, Task


class IFEval:
  """Judges by checks alone."""

  def task_from_row(self, row: dict, split: str) -> Task:
    """Reads a row. ValueError that names the field."""
    names = field(row, "instruction_id_list", list)
    arguments = field(row, "kwargs", list)
    if len(names) != len(arguments) or not names:
      raise ValueError(f"field 'kwargs' has {len(arguments)} entries for {len(names)} instructions")
    constraints = [_constraint(*pair) for pair in zip(names, arguments, strict=True)]
    conflict = ifeval_conflicts.find(constraints)
    if conflict:
      raise ValueError(
        f"field 'instruction_id_list': no response can follow both {conflict[0]} and "
        f"{conflict[1]}, with these arguments"
      )
    data = {"constraints": constraints}
    broken = ifeval_conflicts.broken_by_request(constraints)
    if broken:
      data["of_the_rest"] = broken
    return Task(
      id=f"ifeval/{split}/{row_name(row, 'key')}",
      prompt=field(row, "prompt"),
      split=split,
      data=data,
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the request as it stands: it names its constraints itself."""
    return messages(task)

  def judge(self, task: Task, response: str) -> Feedback:
    """Runs the checks of all constraints of the task."""
    text, fault = final_text(response)
    text = as_it_looks(text)
    if fault or not text.strip():
      return Feedback(0.0, fault or "The response is empty.")
    constraints = task.data["constraints"]
    complaints = []
    rest = _after_request(text, constraints)
    for i, (name, arguments) in enumerate(constraints):
      judged = rest if i in task.data.get("of_the_rest", ()) else text
      complaint = CONSTRAINTS[name](judged, **arguments)
      if complaint:
        complaints.append(f"- {name}: {complaint}")
    if not complaints:
      return Feedback(1.0, "")
    verb = "is" if len(complaints) == 1 else "are"
    head = f"{len(complaints)} of {len(constraints)} constraints {verb} not followed:"
    return Feedback(0.0, "\n".join([head, *complaints]))


def _after_request(text: str, constraints: list) -> str:
  """Returns what follows the repeated request, the whole text if none is repeated."""
  for name, arguments in constraints:
    if name == ifeval_conflicts.REPEAT and not repeat_prompt(text, **arguments):
      return text.strip()[len(arguments["prompt_to_repeat"].strip()) :]
  return text


def _constraint(name: str, arguments: dict | None) -> tuple[str, dict]:
  """Returns a constraint with those of its arguments that are set; ValueError for wrong ones."""
  if not isinstance(name, str) or name not in CONSTRAINTS:
    raise ValueError(
      f"field 'instruction_id_list': {name!r} is unknown; choose from {sorted(CONSTRAINTS)}"
    )
  if not is_missing(arguments) and not isinstance(arguments, dict):
    raise ValueError(f"field 'kwargs' of {name} is no object but {str(arguments)[:100]!r}")
  given = {} if is_missing(arguments) else arguments
  given = {key: value for key, value in given.items() if not is_missing(value)}
  try:
    inspect.signature(CONSTRAINTS[name]).bind("", **given)
    checked = {key: _argument(key, value) for key, value in given.items()}
  except (TypeError, ValueError) as error:
    raise ValueError(f"field 'kwargs' of {name}: {error}") from error
  if checked.get("nth_paragraph", 0) > checked.get("num_paragraphs", 0):
    raise ValueError(
      f"field 'kwargs' of {name}: nth_paragraph is {checked['nth_paragraph']}, "
      f"but there are to be {checked['num_paragraphs']} paragraphs"
    )
  return name, checked


# The least value of each argument that is a whole number. "At least 0" would ask for nothing.
_LEAST = {
  "num_words": 1,
  "num_sentences": 1,
  "num_paragraphs": 1,
  "nth_paragraph": 1,
  "num_placeholders": 1,
  "num_bullets": 0,
  "num_highlights": 1,
  "num_sections": 1,
  "frequency": 1,
  "let_frequency": 1,
  "capital_frequency": 1,
}
_LISTS = ("keywords", "forbidden_words")
_CHOICES = {
  "relation": RELATIONS,
  "let_relation": RELATIONS,
  "capital_relation": RELATIONS,
  "language": tuple(languages.NAMES),
}


def _argument(key: str, value):
  """Returns an argument as its check takes it; ValueError if its type or its value is wrong."""
  if key in _LEAST:
    number = whole_number(value)
    if number is None or number < _LEAST[key]:
      raise ValueError(f"{key} is {value!r}, not a whole number of at least {_LEAST[key]}")
    return number
  if key in _LISTS:
    if not isinstance(value, (list, tuple)) or not value:
      raise ValueError(f"{key} is {value!r}, not a list of words")
    return [_text_argument(key, word) for word in value]
  text = _text_argument(key, value)
  if key in _CHOICES and text not in _CHOICES[key]:
    raise ValueError(f"{key} is {value!r}; choose from {list(_CHOICES[key])}")
  if key == "letter" and len(text) != 1:
    raise ValueError(f"letter is {value!r}, not one character")
  if key == "first_word" and (len(text.split()) > 1 or not any(map(str.isalnum, text))):
    raise ValueError(f"first_word is {value!r}, not one word")
  return text


def _text_argument(key: str, value) -> str:
  """Returns a text as a response is read, without white space around it; ValueError if blank."""
  text = as_it_looks(value).strip() if isinstance(value, str) else ""
  if not text:
    raise ValueError(f"{key} is or holds {value!r}, not a text")
  return text
