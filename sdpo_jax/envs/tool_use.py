"""Judges tool calls: lines "Action: NAME" and "Action Input: {JSON}" against reference calls.

Rows are the SDPO paper's (ToolAlpaca style): `prompt` documents the tools, `answer` is a list of
{"Action", "Action_Input"}.

Source of the rule: arXiv 2601.20802 and its release. A response is right if two things hold:
  * The multiset of its actions is the reference's.
  * All its arguments, merged into one object in the order of the calls (a later call overrides),
    equal the reference's, nested values included.
Two departures: a reference call marked "[Optional]" may be left out, and 1 is not true.
An input that is not a JSON object makes the response wrong.

Feedback speaks of what the response did. It names unknown tools, actions and arguments that should
not be there, and arguments with a wrong value; it counts what is missing. Names and values that
only the reference holds are printed with `reveal_answer` alone. (The release prints them always,
which hands the teacher the solution.)
"""

import collections
import itertools
import json
import re

from sdpo_jax.envs.rows import field, final_text, given, messages, optional_text, task_id
from sdpo_jax.records import Feedback, Task

FORM = (
  "Write each call as a line 'Action: ' with the name of a tool and a line 'Action Input: ' "
  "with a JSON object."
)
_KEYWORD = re.compile(r"^[ \t]*(Action Input|Action)[ \t]*:[ \t]*", re.MULTILINE)
_FENCE = re.compile(r"\s*(?:```(?:json)?\s*)?")
# A tool of a prompt's documentation: its name, its description, its parameters.
_TOOL = re.compile(r"^(\w+):.*\n(?:(?!\w+:).*\n)*?Parameters:", re.MULTILINE)
_OPTIONAL = "[Optional]"
_JSON = json.JSONDecoder()


class ToolUse:
  """Judges calls.

  reveal_answer
      ends the feedback on a wrong response with the reference calls
  """

  def __init__(self, *, reveal_answer: bool = False):
    self.reveal_answer = reveal_answer

  def task_from_row(self, row: dict, split: str) -> Task:
    """Reads a row. ValueError that names the field."""
    if given(row, "kind") not in (None, "tooluse"):
      raise ValueError(f"field 'kind' is {row['kind']!r}, not 'tooluse'")
    prompt = field(row, "prompt")
    calls = _reference_calls(field(row, "answer", (str, list)))
    return Task(
      id=task_id(row, split, "tooluse"),
      prompt=prompt,
      system=optional_text(row, "system"),
      solution=render(calls),
      split=split,
      data={"calls": calls, "tools": _TOOL.findall(prompt)},
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the question as it stands: it says itself how calls are written."""
    return messages(task)

  def judge(self, task: Task, response: str) -> Feedback:
    """Compares the response's calls with the reference's."""
    complaints = self._complaints(task, response)
    if not complaints:
      return Feedback(1.0, "")
    if self.reveal_answer:
      complaints.append(f"Expected:\n{render(task.data['calls'])}")
    return Feedback(0.0, "\n".join(complaints))

  def _complaints(self, task: Task, response: str) -> list[str]:
    text, fault = final_text(response)
    if fault:
      return [fault, FORM]
    names, arguments, faults = parse(text)
    if faults:
      return [*faults, FORM]
    candidates = []
    for calls in _variants(task.data["calls"]):
      try:
        candidates.append(mismatches(names, arguments, calls, task.data["tools"]))
      except RecursionError:  # It was read, but is too deep to be compared or written.
        return ["The arguments are nested too deeply.", FORM]
    # Optional calls allow several answers: this one is what the response comes closest to.
    return min(candidates, key=len)


def parse(text: str) -> tuple[list[str], dict, list[str]]:
  """Returns actions in order, merged arguments, and what is wrong with the form, if anything."""
  names, arguments, faults = [], {}, []
  position = 0
  input_count = 0
  while keyword := _KEYWORD.search(text, position):
    position = keyword.end()
    if keyword[1] == "Action":
      name, _, _ = text[position:].partition("\n")
      names.append(name.strip())
      continue
    input_count += 1
    begin = _FENCE.match(text, position).end()
    try:
      value, position = _JSON.raw_decode(text, begin)
    except (ValueError, RecursionError) as error:
      reason = str(error)
      if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at its character {error.pos - begin + 1}"
      faults.append(f"Action Input {input_count} is not valid JSON: {reason}.")
      continue
    if isinstance(value, dict):
      arguments |= value
    else:
      faults.append(f"Action Input {input_count} is not a JSON object.")
  if "" in names:
    faults.append("An Action names no tool.")
  if not names:
    faults.insert(0, "The response calls no tool.")
  return names, arguments, faults


def same(a, b) -> bool:
  """Tells whether two JSON values are equal: numbers equal numbers (1 is 1.0), nothing else."""
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(map(same, a, b))
  return isinstance(a, bool) == isinstance(b, bool) and a == b


def mismatches(names: list[str], arguments: dict, calls: list[dict], tools: list[str]) -> list[str]:
  """Says what differs from the reference calls; the list is empty where nothing does.

  The words name only what the response holds.
  """
  reference_names = [call["name"] for call in calls]
  reference_arguments = {}
  for call in calls:
    reference_arguments |= call["arguments"]
  return [
    *_action_mismatches(names, reference_names, tools),
    *_argument_mismatches(arguments, reference_arguments),
  ]


def _action_mismatches(names: list[str], reference: list[str], tools: list[str]) -> list[str]:
  given = collections.Counter(names)
  expected = collections.Counter(reference)
  lines = []
  for name in given - expected:
    if tools and name not in tools and name not in expected:
      lines.append(f"There is no tool {name!r}.")
    elif name in expected:
      lines.append(f"The action {name!r} is called {given[name]} times, which is too often.")
    else:
      lines.append(f"The action {name!r} should not be called here.")
  missing = (expected - given).total()
  if missing:
    lines.append(f"{missing} expected {'action is' if missing == 1 else 'actions are'} missing.")
  return lines


def _argument_mismatches(arguments: dict, reference: dict) -> list[str]:
  lines = []
  for name, value in arguments.items():
    if name not in reference:
      lines.append(f"The argument {name!r} should not be given.")
    elif not same(value, reference[name]):
      shown = json.dumps(value, ensure_ascii=False)
      lines.append(f"The argument {name!r} has a wrong value: {shown}.")
  missing = len(reference.keys() - arguments.keys())
  if missing:
    lines.append(
      f"{missing} expected {'argument is' if missing == 1 else 'arguments are'} missing."
    )
  return lines


def render(calls: list[dict]) -> str:
  """Returns the calls as a response writes them."""
  return "\n".join(
    f"Action: {call['name']}\nAction Input: {json.dumps(call['arguments'], ensure_ascii=False)}"
    for call in calls
  )


def _variants(calls: list[dict]):
  """Yields the reference with and without each of its optional calls, the whole first."""
  choices = [(True, False) if call["optional"] else (True,) for call in calls]
  for kept in itertools.product(*choices):
    yield list(itertools.compress(calls, kept))


def _reference_calls(answer: str | list) -> list[dict]:
  """Reads the reference calls. ValueError that names the field."""
  try:
    calls = [_reference_call(call) for call in _decoded(answer)]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"field 'answer' is not a list of Action and Action_Input: {type(error).__name__} {error}"
    ) from error
  if all(call["optional"] for call in calls):
    raise ValueError("field 'answer' holds no call that must be made")
  return calls


def _reference_call(call: dict) -> dict:
  arguments = _decoded(call["Action_Input"])
  if not isinstance(arguments, dict) or not _is_name(call["Action"]):
    raise ValueError(f"a call needs a name and a JSON object: {call}")
  name = call["Action"].strip()
  return {
    "name": name.removeprefix(_OPTIONAL).strip(),
    "optional": name.startswith(_OPTIONAL),
    "arguments": arguments,
  }


def _decoded(value):
  """Returns the value of JSON text; other values as they are: sets have both."""
  return json.loads(value) if isinstance(value, str) else value


def _is_name(value) -> bool:
  return isinstance(value, str) and bool(value.strip())
