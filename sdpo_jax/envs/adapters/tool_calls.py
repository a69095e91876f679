"""Calls of tools as plain text, which any chat template carries and any model can write.

The tools stand in the first message of the user. A call is a JSON object in the policy's message,

  {"name": "guess", "arguments": {"word": "crane"}}

wherever it stands: also between tags such as `<tool_call>`, as models write it that have learnt to
call tools. What the tools return is the next message of the user. Templates differ in how they show
tools, calls and their results, and some show none; their own way is therefore not used.
"""

from collections.abc import Callable
import inspect
import itertools
import json
import re
import textwrap

MAX_OBJECTS = 64  # that a message begins; those behind them are not read

HEAD = """You have tools. To call one, write a JSON object such as
{"name": "TOOL", "arguments": {"ARGUMENT": "value"}}
A message that calls no tool is your last one."""
_BEGINNING = re.compile(r'\{\s*"')


def described(tools: list[tuple[str, str]]) -> str:
  """Returns what the policy reads about tools, each as (name and arguments, description)."""
  texts = [f"{name}\n{textwrap.indent(about, '  ')}".rstrip() for name, about in tools]
  return "\n\n".join([HEAD, *texts])


def calls_in(message: str) -> list[tuple[str, dict]]:
  """Returns the calls in a message, as (name, arguments), in order."""
  decoder = json.JSONDecoder()
  calls: list[tuple[str, dict]] = []
  end = 0
  for beginning in itertools.islice(_BEGINNING.finditer(message), MAX_OBJECTS):
    if beginning.start() < end:
      continue  # inside the object before
    try:
      value, end = decoder.raw_decode(message, beginning.start())
    except (ValueError, RecursionError):
      continue
    arguments = value.get("arguments", value.get("parameters", {}))  # Llama says parameters
    if isinstance(value.get("name"), str) and isinstance(arguments, dict):
      calls.append((value["name"], arguments))
  return calls


def tools_of(world, *others: str) -> dict[str, Callable]:
  """Returns the public methods of an object's class that are no tools under other names."""
  members = inspect.getmembers(type(world), inspect.isfunction)
  names = [name for name, _ in members if not name.startswith("_") and name not in others]
  return {name: getattr(world, name) for name in names}


def signatures(tools: dict[str, Callable]) -> list[tuple[str, str]]:
  """Returns methods as `described` shows them."""
  return [
    (f"{n}{inspect.signature(tool)}", inspect.getdoc(tool) or "") for n, tool in tools.items()
  ]
