"""Tool calls: lines "Action: NAME" and "Action Input: {JSON}", compared with the reference calls.

Rows are the SDPO paper's (ToolAlpaca style): `prompt` documents the tools, `answer` is a list of {"Action", "Action_Input"}.
Source of the rule: arXiv 2601.20802 and its release. A response is right if the multiset of its actions is the reference's and if all its
arguments, merged into one object in the order of the calls (a later call overrides), equal the reference's, nested values included. Two
departures: a reference call marked "[Optional]" may be left out, and 1 is not true. An input that is not a JSON object makes the response wrong.

Feedback says what does not match by speaking of what the response did: unknown tools, actions and arguments that should not be there,
arguments with a wrong value, how many are missing. Names and values that only the reference holds are printed with `reveal_answer` alone (the
release prints them always, which hands the teacher the solution).
"""

import collections
import itertools
import json
import re

from sdpo_jax.envs.rows import field, final_text, messages, task_id
from sdpo_jax.records import Feedback, Task

FORM = "Write each call as a line 'Action: ' with the name of a tool and a line 'Action Input: ' with a JSON object."
_KEYWORD = re.compile(r"^[ \t]*(Action Input|Action)[ \t]*:[ \t]*", re.MULTILINE)
_FENCE = re.compile(r"\s*(?:```(?:json)?\s*)?")
_TOOL = re.compile(r"^(\w+):.*\n(?:(?!\w+:).*\n)*?Parameters:", re.MULTILINE)
_OPTIONAL = "[Optional]"
_JSON = json.JSONDecoder()


class ToolUse:
  """Judges calls. reveal_answer: the feedback on a wrong response ends with the reference calls."""

  def __init__(self, *, reveal_answer: bool = False):
    self.reveal_answer = reveal_answer

  def task_from_row(self, row: dict, split: str) -> Task:
    if row.get("kind", "tooluse") != "tooluse":
      raise ValueError(f"field 'kind' is {row['kind']!r}, not 'tooluse'")
    prompt, calls = field(row, "prompt"), _calls(field(row, "answer", (str, list)))
    return Task(
      id=task_id(row, split, "tooluse"),
      prompt=prompt,
      system=row.get("system"),
      solution=render(calls),
      split=split,
      data={"calls": calls, "tools": _TOOL.findall(prompt)},
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    return messages(task)

  def judge(self, task: Task, response: str) -> Feedback:
    complaints = self._complaints(task, response)
    if not complaints:
      return Feedback(1.0, "")
    if self.reveal_answer:
      complaints.append(f"Expected:\n{render(task.data['calls'])}")
    return Feedback(0.0, "\n".join(complaints))

  def _complaints(self, task: Task, response: str) -> list[str]:
    text, fault = final_text(response)
    names, arguments, faults = ([], {}, [fault]) if fault else parse(text)
    if faults:
      return [*faults, FORM]
    # Where optional calls allow several answers, the one that the response comes closest to is
    # spoken of.
    try:
      return min(
        (
          mismatches(names, arguments, calls, task.data["tools"])
          for calls in _variants(task.data["calls"])
        ),
        key=len,
      )
    except RecursionError:  # read, but too deep to be compared or shown
      return ["The arguments are nested too deeply.", FORM]


def parse(text: str) -> tuple[list[str], dict, list[str]]:
  """-> actions in order, merged arguments, and what is wrong with the form (empty if nothing)."""
  names, arguments, faults = [], {}, []
  position = inputs = 0
  while found := _KEYWORD.search(text, position):
    position = found.end()
    if found[1] == "Action":
      name, _, _ = text[position:].partition("\n")
      names.append(name.strip())
      continue
    inputs += 1
    begin = _FENCE.match(text, position).end()
    try:
      value, position = _JSON.raw_decode(text, begin)
    except (ValueError, RecursionError) as error:
      reason = (
        f"{error.msg} at its character {error.pos - begin + 1}"
        if isinstance(error, json.JSONDecodeError)
        else str(error)
      )
      faults.append(f"Action Input {inputs} is not valid JSON: {reason}.")
      continue
    if isinstance(value, dict):
      arguments |= value
    else:
      faults.append(f"Action Input {inputs} is not a JSON object.")
  if "" in names:
    faults.append("An Action names no tool.")
  return names, arguments, faults if names else ["The response calls no tool.", *faults]


def same(a, b) -> bool:
  """Equality of JSON values, in which numbers equal numbers (1 is 1.0) and nothing else."""
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(map(same, a, b))
  return isinstance(a, bool) == isinstance(b, bool) and a == b


def mismatches(names: list[str], arguments: dict, calls: list[dict], tools: list[str]) -> list[str]:
  """What differs from the reference calls, in words that name only what the response holds; empty where nothing does."""
  given, wanted = collections.Counter(names), collections.Counter(call["name"] for call in calls)
  lines = []
  for name, count in (given - wanted).items():
    if tools and name not in tools and name not in wanted:
      lines.append(f"There is no tool {name!r}.")
    elif name in wanted:
      lines.append(f"The action {name!r} is called {given[name]} times, which is too often.")
    else:
      lines.append(f"The action {name!r} should not be called here.")
  missing = (wanted - given).total()
  if missing:
    lines.append(f"{missing} expected {'action is' if missing == 1 else 'actions are'} missing.")
  expected = {}
  for call in calls:
    expected |= call["arguments"]
  for name, value in arguments.items():
    if name not in expected:
      lines.append(f"The argument {name!r} should not be given.")
    elif not same(value, expected[name]):
      lines.append(
        f"The argument {name!r} has a wrong value: {json.dumps(value, ensure_ascii=False)}."
      )
  absent = len(expected.keys() - arguments.keys())
  if absent:
    lines.append(f"{absent} expected {'argument is' if absent == 1 else 'arguments are'} missing.")
  return lines


def render(calls: list[dict]) -> str:
  """The calls as a response writes them."""
  return "\n".join(
    f"Action: {call['name']}\nAction Input: {json.dumps(call['arguments'], ensure_ascii=False)}"
    for call in calls
  )


def _variants(calls: list[dict]):
  """The reference, with and without each of its optional calls; the whole first."""
  for kept in itertools.product((True, False), repeat=sum(call["optional"] for call in calls)):
    keep = iter(kept)
    yield [call for call in calls if not call["optional"] or next(keep)]


def _calls(answer) -> list[dict]:
  """The reference calls; ValueError that names the field."""
  try:
    answer = json.loads(answer) if isinstance(answer, str) else answer
    calls = []
    for call in answer:
      arguments = (
        json.loads(call["Action_Input"])
        if isinstance(call["Action_Input"], str)
        else call["Action_Input"]
      )
      if (
        not isinstance(arguments, dict)
        or not isinstance(call["Action"], str)
        or not call["Action"].strip()
      ):
        raise ValueError(f"a call needs a name and a JSON object: {call}")
      name = call["Action"].strip()
      calls.append(
        {
          "name": name.removeprefix(_OPTIONAL).strip(),
          "optional": name.startswith(_OPTIONAL),
          "arguments": arguments,
        }
      )
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"field 'answer' is not a list of Action and Action_Input: {type(error).__name__} {error}"
    ) from error
  if all(call["optional"] for call in calls):
    raise ValueError("field 'answer' holds no call that must be made")
  return calls
