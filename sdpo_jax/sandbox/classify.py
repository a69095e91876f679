"""Turns what a program's process left behind into the result of its test.

An `Outcome` is untrusted: bytes with a cap on their number, an exit status and some numbers.
Whatever a program wrote there by itself must end as a kind of failure, never as an exception.
"""

import json
import signal
from typing import NamedTuple

from sdpo_jax.sandbox.compare import same_literal, same_text, same_value
from sdpo_jax.sandbox.verdict import Limits, Outcome, ProgramError, TestCase, TestResult
from sdpo_jax.sandbox.wording import MAX_ERROR_CHARS, literal_text


class _Judgement(NamedTuple):
  """Holds the fields of a TestResult that have to be decided."""

  kind: str  # one of KINDS
  output: str
  error: ProgramError | None = None
  detail: str = ""


def judge_test(
  outcome: Outcome, test: TestCase, program: str, fn_name: str | None, limits: Limits
) -> TestResult:
  """Judges one run of a program on one test."""
  reads_stdin = fn_name is None and test.expression is None
  stdout = outcome.stdout.decode("utf-8", "replace")
  output = stdout if reads_stdin else ""
  record = _record(outcome.result)
  judgement = _judge_end(outcome, output, record, program, limits)
  if judgement is None and reads_stdin:
    kind = "passed" if same_text(stdout, test.output) else "wrong_answer"
    judgement = _Judgement(kind, output)
  elif judgement is None:
    judgement = _judge_value(record, test)
  return TestResult(
    input=test.given,
    output=judgement.output,
    expected=test.output,
    kind=judgement.kind,
    error=judgement.error,
    detail=judgement.detail,
    hidden=test.hidden,
    cpu_s=outcome.cpu_s,
    wall_s=outcome.wall_s,
    max_rss_mb=outcome.max_rss_kb / 1024,
  )


def _judge_end(
  outcome: Outcome, output: str, record: dict, program: str, limits: Limits
) -> _Judgement | None:
  """Judges how the process ended; None if it ended well, so that its answer decides."""
  signal_number = outcome.status & 0x7F
  if outcome.killed or outcome.cpu_s > limits.time_s or signal_number == signal.SIGXCPU:
    return _Judgement("time_limit", output)
  if outcome.capped:
    return _Judgement("output_limit", output)
  if signal_number == signal.SIGKILL and outcome.max_rss_kb > 0.9 * 1024 * limits.memory_mb:
    # the kernel was short of memory and chose this process
    return _Judgement("memory_limit", output)
  if signal_number:
    return _Judgement("runtime_error", output, _died(signal_number))
  if outcome.status:
    error = _program_error(record.get("error"), program)
    if error is None:
      error = ProgramError("", f"exit status {outcome.status >> 8 & 0xFF}", None, "")
    kind = "memory_limit" if error.type == "MemoryError" else "runtime_error"
    return _Judgement(kind, output, error)
  return None


def _judge_value(record: dict, test: TestCase) -> _Judgement:
  """Judges the value that a function or an expression returned."""
  if isinstance(record.get("format"), str):
    return _Judgement("format", "", detail=record["format"][:MAX_ERROR_CHARS])
  if "value" not in record:
    error = ProgramError("", "the program ended before it returned a value", None, "")
    return _Judgement("runtime_error", "", error)
  value = record["value"]
  try:
    if test.expression is None:
      same, text = same_value(value, json.loads(test.output)), json.dumps(value)
    else:
      same, text = same_literal(value, test), literal_text(value)
  # mostly what a program wrote into the result by itself; whatever it is, it is the program's fault
  except Exception:
    return _Judgement("format", "", detail="the result is not a value")
  return _Judgement("passed" if same else "wrong_answer", text)


def _record(result: bytes) -> dict:
  """Parses what the jail, or the program in its name, wrote; {} if it is no JSON object."""
  try:
    record = json.loads(result) if result else {}
  except (ValueError, RecursionError):
    return {}
  return record if isinstance(record, dict) else {}


def _died(signal_number: int) -> ProgramError:
  """Returns the error of a process that a signal ended."""
  try:
    name = signal.Signals(signal_number).name
  except ValueError:
    name = f"signal {signal_number}"
  return ProgramError("", f"the process was ended by {name}", None, "")


def _program_error(fields, program: str) -> ProgramError | None:
  """Returns the error that a record states as [type, message, line]; None for another form."""
  if not isinstance(fields, list) or len(fields) != 3:
    return None
  if not all(isinstance(field, str) for field in fields[:2]):
    return None
  name, message, line = fields
  lines = program.split("\n")
  if isinstance(line, bool) or not isinstance(line, int) or not 1 <= line <= len(lines):
    line = None
  source = lines[line - 1].strip() if line else ""
  return ProgramError(name[:MAX_ERROR_CHARS], message[:MAX_ERROR_CHARS], line, source)
