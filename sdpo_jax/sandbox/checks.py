"""Lets a check call the program that it judges, each in a jail of its own.

  check (one jail) -- call -> host -- call -> judged program (another jail)
  check          <- answer -- host <- answer -- judged program

A call and an answer are one line of JSON each, in the form that the jail gives to values. The host
passes a line on only if it has that form, is short enough and not nested too deeply. So neither
side meets the other's code or objects, and what the judged program says can only be a wrong value.
`check_source.py` says what a check is.
"""

import json
from typing import NamedTuple
import zlib

from sdpo_jax.sandbox.jail_worker import CHECK, Job, Worker
from sdpo_jax.sandbox.json_values import Digits, parse_json
from sdpo_jax.sandbox.verdict import Limits, Outcome

_MAX_DEPTH = 100  # of a value: the jail writes no deeper one
_LISTS = {"list", "tuple", "set", "frozenset", "iterator"}


class Conversation(NamedTuple):
  """Holds how a check and the judged program ended, and what they said last."""

  check: Outcome | None  # None: the program had ended, or had answered with no value
  program: Outcome | None = None  # None: it did not end by itself
  call: list | None = None  # [tagged arguments, {name: tagged}]; None: there was none
  answer: dict | None = None  # to that call
  fault: str = ""  # what is wrong with the check's next call, which ended it


def check_job(
  check_fd: int, program: str, fn_name: str | None, limits: Limits, answer: list | None = None
) -> Job:
  """Returns the job of a check, which calls the program, or judges an answer of it.

  answer: [input, output, expected] as JSON values; such a check calls nothing. ValueError if one
  of them cannot cross.
  """
  given: dict = {"seed": zlib.crc32(program.encode("utf-8", "replace"))}
  if answer is not None:
    given["arguments"] = [_tagged(value, _MAX_DEPTH) for value in answer]
    fn_name = None
  return Job(check_fd, json.dumps(given), CHECK, limits, fn_name or "")


def converse(checker: Worker, worker: Worker, check: Job, program: Job) -> Conversation:
  """Runs a check, in mode CHECK, and the program that it calls, in mode CALLS.

  Raises WorkerLost, which names the worker.
  """
  with worker.begin(program) as called, checker.begin(check) as caller:
    call, answer = None, None
    while True:
      try:
        line = caller.receive()
        if line is None:
          return Conversation(caller.finish(), None, call, answer)
        call = _read_call(line)
      except ValueError as e:
        return Conversation(None, None, call, answer, str(e))
      try:
        line = called.receive() if called.send(line) else None
        answer = None if line is None else _read_answer(line)
      except ValueError as e:
        line, answer = None, {"format": f"the returned value {e}"}
      if answer is None:
        return Conversation(None, called.finish(), call)
      if line is None or "format" in answer:
        return Conversation(None, None, call, answer)
      caller.send(line)


def _read_call(line: bytes) -> list:
  """Parses a call: [tagged arguments, {name: tagged}]. ValueError if it is none."""
  call = _parse(line)
  match call:
    case [list(arguments), dict(keywords)]:
      _require_values([*arguments, *keywords.values()])
      return call
  raise ValueError("is no call")


def _read_answer(line: bytes) -> dict:
  """Parses an answer: one of "value", "error" and "format", and perhaps "arguments".

  ValueError if it has another form, for the program can write whatever it likes.
  """
  answer = _parse(line)
  match answer:
    case {"value": value, **others} if others.keys() <= {"arguments"}:
      _require_values([value])
    case {"error": [str(), str(), int() | None], **others} if others.keys() <= {"arguments"}:
      pass
    case {"format": str(), **others} if others.keys() <= {"arguments"}:
      pass
    case _:
      raise ValueError("is no answer")
  changed = others.get("arguments", [])
  if not isinstance(changed, list):
    raise ValueError("is no answer")
  _require_values(changed)
  return answer


def _parse(line: bytes):
  try:
    return parse_json(line.decode("ascii"))
  except RecursionError as e:
    raise ValueError("is nested too deeply") from e
  except ValueError as e:
    raise ValueError("is no JSON") from e


def _require_values(tagged: list) -> None:
  """Raises ValueError for a value that the jail would not have written so."""
  waiting = [(value, _MAX_DEPTH) for value in tagged]
  while waiting:
    value, depth = waiting.pop()
    if depth == 0:
      raise ValueError("is nested too deeply")
    match value:
      case None | bool() | int() | float() | str() | Digits():
        continue
      case {"dict": list(pairs)} if len(value) == 1:
        items = [item for pair in pairs for item in _pair(pair)]
      case {"bytes": str(digits)} if len(value) == 1:
        bytes.fromhex(digits)
        continue
      case {"complex": [float(), float()]} if len(value) == 1:
        continue
      case {} if len(value) == 1 and value.keys() <= _LISTS:
        (items,) = value.values()
        if not isinstance(items, list):
          raise ValueError("has an unknown form")
      case _:
        raise ValueError("has an unknown form")
    waiting.extend((item, depth - 1) for item in items)


def _pair(pair) -> list:
  """Returns the key and the value of a dictionary's item. ValueError for another form."""
  if not isinstance(pair, list) or len(pair) != 2:
    raise ValueError("has an unknown form")
  return pair


def _tagged(value, depth: int):
  """Returns a JSON value with its containers named, as the jail would. ValueError if it cannot."""
  if depth == 0:
    raise ValueError("is nested too deeply")
  if isinstance(value, list):
    return {"list": [_tagged(item, depth - 1) for item in value]}
  if isinstance(value, dict):
    return {"dict": [[key, _tagged(item, depth - 1)] for key, item in value.items()]}
  if isinstance(value, Digits):
    return {"int": value.text}
  return value
