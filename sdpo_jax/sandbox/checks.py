"""Lets a check call the program that it judges, each in a jail of its own.

  check (one jail) -- call --> judged program (another jail)
  check           <-- answer -- judged program

Two pipes join the jails. A call and an answer are one line of JSON each, in the form that the jail
gives to values, and the check's jail takes no other line. So neither side meets the other's code or
objects, and what the judged program says can only be a wrong value. `check_source.py` says what a
check is.
"""

import contextlib
import dataclasses
import json
import os
from typing import NamedTuple
import zlib

from sdpo_jax.sandbox.jail_worker import CHECK, Job, Worker
from sdpo_jax.sandbox.json_values import Digits, parse_record
from sdpo_jax.sandbox.verdict import Limits, Outcome

_MAX_DEPTH = 100  # of a value: the jail writes no deeper one
_CHECK_OUTPUT_KB = 4096  # more than two lines of jail.py's MAX_LINE_BYTES


class CheckRun(NamedTuple):
  """Holds how a check ended and, as its jail wrote it, what it said."""

  outcome: Outcome
  call: list | None  # the last one, [tagged arguments, {name: tagged}]; [] if it is unreadable
  answer: dict  # to that call; {} if there was none
  verdict: dict  # {} if it came to none

  @property
  def was_called(self) -> bool:
    """Tells whether the check has called the program."""
    return self.call is not None


def read_check_run(outcome: Outcome) -> CheckRun:
  """Reads the two lines of a check's result; `jail.py` says what they are."""
  said, _, rest = outcome.result.partition(b"\n")
  said, verdict = parse_record(said), parse_record(rest.partition(b"\n")[0])
  match said:
    case {"call": list(call), "answer": dict(answer)}:
      return CheckRun(outcome, call, answer, verdict)
    case {"call": list(call)}:
      return CheckRun(outcome, call, {}, verdict)
  # What is unreadable was written halfway when the check was killed, or holds what a program wrote.
  was_called = outcome.result.startswith(b'{"call": [')
  return CheckRun(outcome, [] if was_called else None, {}, verdict)


def check_job(
  check_fd: int, program: str, fn_name: str | None, limits: Limits, answer: list | None = None
) -> Job:
  """Returns the job of a check, which calls the program, or judges an answer of it.

  answer: [input, output, expected] as JSON values; such a check calls nothing. ValueError if one
  of them cannot cross.
  """
  # What a check prints is nobody's answer; its result has room for the longest call and answer.
  limits = dataclasses.replace(limits, output_kb=max(limits.output_kb, _CHECK_OUTPUT_KB))
  given: dict = {"seed": zlib.crc32(program.encode("utf-8", "replace"))}
  if answer is not None:
    given["arguments"] = [_tagged(value, _MAX_DEPTH) for value in answer]
    fn_name = None
  return Job(check_fd, json.dumps(given), CHECK, limits, fn_name or "")


def run_check(
  checker: Worker, worker: Worker, check: Job, program: Job
) -> tuple[CheckRun, Outcome | None]:
  """Runs a check, in mode CHECK, and the program that it calls, in mode CALLS.

  Returns how the check ended, and the program if it ended first. Raises WorkerLost, which names the
  worker.
  """
  with contextlib.ExitStack() as stack:
    with _two_pipes() as (calls, to_program, answers, to_check):
      program = dataclasses.replace(program, pipes=(to_check, calls))
      called = stack.enter_context(worker.begin(program))
      check = dataclasses.replace(check, pipes=(to_program, answers))
      caller = stack.enter_context(checker.begin(check))
    checked = read_check_run(caller.finish())
    return checked, called.finish() if checked.verdict.get("ended") is True else None


@contextlib.contextmanager
def _two_pipes():
  """Opens two pipes and yields their ends, (to read from, to write to) each; closes them."""
  with contextlib.ExitStack() as stack:
    ends = []
    for _ in range(2):
      for end in os.pipe():
        stack.callback(os.close, end)
        ends.append(end)
    yield ends


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
