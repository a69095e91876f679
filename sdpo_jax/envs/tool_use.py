"""Judges tool calls: lines "Action: NAME" and "Action Input: {JSON}" against reference calls.

Rows are the SDPO paper's (ToolAlpaca style): `prompt` documents the tools, `answer` is a list of
{"Action", "Action_Input"}.

A response is right if two things hold:
  * The multiset of its actions is the reference's.
  * The arguments of its calls equal the reference's, nested values included. 1 is not true.
The order of the calls is free. A reference call marked "[Optional]" may be left out. An input that
is not a JSON object makes the response wrong.

How arguments are compared is the setting `arguments`:
  per_call  Each call keeps its own: the response is right if its calls can be paired with the
            reference's so that name and arguments are equal in each pair. An Action without an
            Action Input has no arguments; an input that belongs to no action, or a second one of
            the same action, makes the response wrong.
  merged    All arguments are merged into one object in the order of the calls, and a later call
            overrides an earlier one. This is the rule of the release of arXiv 2601.20802, but for
            optional calls and true. It takes two calls for right that have each other's arguments.

Feedback speaks of what the response did. It names unknown tools, actions and arguments that should
not be there, and arguments with a wrong value; it counts what is missing. Names and values that
only the reference holds are printed with `reveal_answer` alone. (The release prints them always,
which hands the teacher the solution.)
"""

import collections
import itertools
import json
import re

from sdpo_jax.envs.rows import field, final_text, messages, optional_text, task_id
from sdpo_jax.errors import unknown
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
# Each of a reference's optional calls doubles the answers that a response is compared with.
_MAX_OPTIONAL = 6
ARGUMENT_RULES = ("per_call", "merged")


def _refuse_constant(name: str):
  raise ValueError(f"{name} is not JSON")


# Python's own decoder takes NaN and Infinity.
_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


class ToolUse:
  """Judges calls.

  reveal_answer
      ends the feedback on a wrong response with the reference calls
  arguments
      per_call | merged: how the arguments of several calls are compared
  """

  def __init__(self, *, reveal_answer: bool = False, arguments: str = "per_call"):
    if arguments not in ARGUMENT_RULES:
      raise ValueError(unknown("config.env.arguments", arguments, sorted(ARGUMENT_RULES)))
    self.reveal_answer = reveal_answer
    self.arguments = arguments

  def task_from_row(self, row: dict, split: str) -> Task:
    """Reads a row. ValueError that names the field."""
    if optional_text(row, "kind") not in (None, "tooluse"):
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
    names, inputs, faults = parse(text)
    if self.arguments == "per_call":
      faults += _unpaired_inputs(inputs)
    if faults:
      return [*faults, FORM]
    compare = _call_mismatches if self.arguments == "per_call" else _merged_mismatches
    candidates = []
    for reference in _variants(task.data["calls"]):
      try:
        candidates.append(
          _action_mismatches(names, [call["name"] for call in reference], task.data["tools"])
          + compare(names, inputs, reference)
        )
      except RecursionError:  # It was read, but is too deep to be compared or written.
        return ["The arguments are nested too deeply.", FORM]
    # Optional calls allow several answers: this one is what the response comes closest to.
    return min(candidates, key=len)


def parse(text: str) -> tuple[list[str], list[tuple[int, dict]], list[str]]:
  """Reads a response's calls.

  Returns the actions in order; the inputs, each with the index of the action that it follows, -1
  before the first; and what is wrong with the form, if anything.
  """
  names, inputs, faults = [], [], []
  position = 0
  input_count = 0
  while keyword := _KEYWORD.search(text, position):
    position = keyword.end()
    if keyword[1] == "Action":
      end = text.find("\n", position)
      names.append(text[position : end if end >= 0 else None].strip())
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
      inputs.append((len(names) - 1, value))
    else:
      faults.append(f"Action Input {input_count} is not a JSON object.")
  if "" in names:
    faults.append("An Action names no tool.")
  if not names:
    faults.insert(0, "The response calls no tool.")
  return names, inputs, faults


def _unpaired_inputs(inputs: list[tuple[int, dict]]) -> list[str]:
  """Complains of inputs that are not the only one of an action."""
  faults = []
  count = collections.Counter(index for index, _ in inputs)
  if count[-1]:
    faults.append("An Action Input stands before the first Action.")
  repeated = sum(number > 1 for index, number in count.items() if index >= 0)
  if repeated:
    faults.append(f"{repeated} {'Action has' if repeated == 1 else 'Actions have'} several inputs.")
  return faults


def same(a, b) -> bool:
  """Tells whether two JSON values are equal: numbers equal numbers (1 is 1.0), nothing else."""
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(map(same, a, b))
  return isinstance(a, bool) == isinstance(b, bool) and a == b


# What differs from the reference calls, as lines; there are none where nothing does. The words name
# only what the response holds.


def _call_mismatches(names, inputs, reference: list[dict]) -> list[str]:
  """Compares calls one by one: those that are equal are paired first, the rest in their order."""
  arguments = dict(inputs)
  lines = []
  for name in dict.fromkeys(names):
    given = [arguments.get(i, {}) for i in range(len(names)) if names[i] == name]
    rest = [call["arguments"] for call in reference if call["name"] == name]
    unequal = []
    for number, call in enumerate(given, 1):
      equal = next((i for i, expected in enumerate(rest) if same(call, expected)), None)
      if equal is None:
        unequal.append((number, call))
      else:
        del rest[equal]
    # Calls without a partner are in excess, or missing: the comparison of actions says so.
    for (number, call), expected in zip(unequal, rest, strict=False):
      place = f"Call {number} of {name!r}: " if len(given) > 1 else ""
      lines += [place + line for line in _argument_mismatches(call, expected)]
  return lines


def _merged_mismatches(names, inputs, reference: list[dict]) -> list[str]:
  """Compares all arguments as one object, whichever calls they belong to."""
  given, expected = {}, {}
  for _, arguments in inputs:
    given |= arguments
  for call in reference:
    expected |= call["arguments"]
  return _argument_mismatches(given, expected)


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
  except (KeyError, TypeError, ValueError, RecursionError) as error:
    raise ValueError(
      f"field 'answer' is not a list of Action and Action_Input: {type(error).__name__} {error}"
    ) from error
  optional = sum(call["optional"] for call in calls)
  if optional == len(calls):
    raise ValueError("field 'answer' holds no call that must be made")
  if optional > _MAX_OPTIONAL:
    raise ValueError(f"field 'answer' holds {optional} optional calls, more than {_MAX_OPTIONAL}")
  return calls


def _reference_call(call: dict) -> dict:
  """Reads one call. TypeError, KeyError or ValueError if no response could make it."""
  arguments = _decoded(call["Action_Input"])
  if not isinstance(arguments, dict) or not isinstance(call["Action"], str):
    raise ValueError(f"a call needs a name and a JSON object: {call}")
  json.dumps(arguments, allow_nan=False)  # Tables may hold NaN and dates, which no response can.
  name = call["Action"].strip()
  is_optional = name.startswith(_OPTIONAL)
  name = name.removeprefix(_OPTIONAL).strip()
  if not name or "\n" in name:
    raise ValueError(f"a call needs a name of one line: {call}")
  return {"name": name, "optional": is_optional, "arguments": arguments}


def _decoded(value):
  """Returns the value of JSON text; other values as they are: sets have both."""
  return json.loads(value, parse_constant=_refuse_constant) if isinstance(value, str) else value
