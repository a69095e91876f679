"""Turns what a program's process left behind into the result of its test.

An `Outcome` is untrusted: bytes with a cap on their number, an exit status and some numbers.
Whatever a program wrote there by itself must end as a kind of failure, never as an exception.
"""

import dataclasses
import signal
from typing import NamedTuple

from sdpo_jax.sandbox.checks import CheckRun
from sdpo_jax.sandbox.compare import same_answer, same_literal, same_output
from sdpo_jax.sandbox.json_values import parse_json, parse_record, write_json
from sdpo_jax.sandbox.verdict import Limits, Outcome, ProgramError, TestCase, TestResult
from sdpo_jax.sandbox.wording import MAX_ERROR_CHARS, call_text, literal_text


class _Judgement(NamedTuple):
  """Holds the fields of a TestResult that have to be decided."""

  kind: str  # one of KINDS
  output: str
  error: ProgramError | None = None
  detail: str = ""
  expected: str | None = None  # None: only a check knows
  call: str = ""  # a check's last one, which is then the program's input


def judge_test(
  outcome: Outcome, test: TestCase, program: str, fn_name: str | None, limits: Limits
) -> TestResult:
  """Judges one run of a program on one test."""
  reads_stdin = fn_name is None and test.expression is None
  stdout = outcome.stdout.decode("utf-8", "replace")
  output = stdout if reads_stdin else ""
  record = parse_record(outcome.result)
  judgement = _judge_end(outcome, output, record, program, limits)
  if judgement is None and reads_stdin:
    kind = "passed" if same_output(stdout, test) else "wrong_answer"
    judgement = _Judgement(kind, output)
  elif judgement is None:
    judgement = _judge_value(record, test)
  return _result(test, judgement._replace(expected=test.output), outcome)


def answer_to_check(
  outcome: Outcome, test: TestCase, program: str, fn_name: str | None, limits: Limits
) -> list | TestResult:
  """Returns [input, output, expected] for the check of a test, or the result if there is none.

  They are texts for a program that reads standard input, else JSON values.
  """
  stdout = outcome.stdout.decode("utf-8", "replace")
  record = parse_record(outcome.result)
  output = stdout if fn_name is None else ""
  judgement = _judge_end(outcome, output, record, program, limits)
  if judgement is None and fn_name is None:
    return [test.input, stdout, test.output]
  if judgement is None:
    judgement = _judge_form(record)
  if judgement is None:
    arguments = [parse_json(line) for line in test.input.split("\n") if line.strip()]
    return [arguments, record["value"], parse_json(test.output) if test.output else None]
  return _result(test, judgement, outcome)


def judge_check(
  check: CheckRun,
  ended: Outcome | None,
  test: TestCase,
  program: str,
  fn_name: str,
  limits: Limits,
) -> TestResult:
  """Judges a program by what a check that called it found. `ended`: the program did so first."""
  judgement = _judge_called(check, ended, program, limits)
  try:
    call = call_text(fn_name, check.call)
  except Exception:  # there was none, or it is unreadable
    call = ""
  return _result(test, judgement._replace(call=call), ended or check.outcome)


def judge_answer_check(
  check: CheckRun, test: TestCase, answer: list, fn_name: str | None, limits: Limits
) -> TestResult:
  """Judges an answer by how its check ended. `answer` is as `answer_to_check` returns it."""
  judgement = _judge_verdict(check, limits, was_called=True)
  output = answer[1] if fn_name is None else write_json(answer[1])
  judgement = judgement._replace(output=output, expected=test.output or None)
  return _result(test, judgement, check.outcome)


def _result(test: TestCase, judgement: _Judgement, outcome: Outcome | None) -> TestResult:
  """Returns the result of a test. None: no process ended by itself."""
  result = TestResult(
    input=judgement.call or test.given,
    output=judgement.output,
    expected=judgement.expected,
    kind=judgement.kind,
    error=judgement.error,
    detail=judgement.detail,
    hidden=test.hidden,
  )
  if outcome is None:
    return result
  return dataclasses.replace(result, cpu_s=outcome.cpu_s, wall_s=outcome.wall_s)


def _judge_called(
  check: CheckRun, ended: Outcome | None, program: str, limits: Limits
) -> _Judgement:
  """Judges a program that a check called."""
  if ended is not None:
    record = parse_record(ended.result)
    return _judge_end(ended, "", record, program, limits) or _judge_form(record) or _ended_early()
  if "format" in check.verdict:
    return _judge_form(check.verdict)
  judgement = _judge_verdict(check, limits, was_called=check.was_called)
  if judgement.kind == "runtime_error":  # the program raised it, and the check let it pass
    return judgement._replace(error=_program_error(check.answer.get("error"), program))
  return judgement._replace(output=_answer_text(check.answer))


def _answer_text(answer: dict) -> str:
  """Writes the value that a call returned; "" if there is none to show."""
  try:
    return literal_text(answer["value"])
  except Exception:
    return ""


def _judge_verdict(check: CheckRun, limits: Limits, *, was_called: bool) -> _Judgement:
  """Judges by how a check ended.

  The judgement "runtime_error" stands for an exception of the program.
  """
  blamed = _blamed(was_called=was_called)
  outcome, verdict = check.outcome, check.verdict
  if outcome.killed or outcome.cpu_s > limits.time_s or outcome.status & 0x7F:
    if not was_called:
      return _Judgement(blamed, "", detail="the check did not come to an end")
    if check.call and not check.answer:  # the program had not answered yet
      return _Judgement("time_limit", "")
    return _Judgement("time_limit", "", detail="the check did not come to an end on this answer")
  if verdict.get("passed") is True:
    if not was_called:  # any program would pass, even one that does not compile
      return _Judgement(blamed, "", detail="the check never calls the program")
    return _Judgement("passed", "")
  failed = verdict.get("failed")
  if not isinstance(failed, dict):
    return _Judgement(blamed, "", detail="the check ended without a verdict")
  message = str(failed.get("message", ""))
  match failed.get("how"):
    case "program":
      return _Judgement("runtime_error", "")
    case "broken":
      return _Judgement(blamed, "", detail=f"the check passes a value that {message}")
    case "assertion":
      told = [f"assert {failed['condition']}"] if "condition" in failed else []
      told = ": ".join(filter(None, [*told, message])) or "an assertion of the check fails"
      return _Judgement(blamed, "", detail=told, expected=_text(failed.get("wanted")))
    case "raised":
      return _Judgement(blamed, "", detail=f"the check raises {failed.get('type')}: {message}")
  return _Judgement(blamed, "", detail=message)


def _blamed(*, was_called: bool) -> str:
  """Returns the kind of a test whose check failed.

  A check that fails before it has called the program is wrong itself. Afterwards the answers are,
  whatever the check stumbles over: else a program could choose to be left out of training.
  """
  return "wrong_answer" if was_called else "sandbox_failed"


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
  ended = _judge_form(record)
  if ended is not None:
    return ended
  value = record["value"]
  try:
    if test.expression is None:
      same, text = same_answer(value, test), write_json(value)
    else:
      same, text = same_literal(value, test), literal_text(value)
  # mostly what a program wrote into the result by itself; whatever it is, it is the program's fault
  except Exception:
    return _Judgement("format", "", detail="the result is not a value")
  return _Judgement("passed" if same else "wrong_answer", text)


def _text(value) -> str | None:
  return value if isinstance(value, str) else None


def _judge_form(record: dict) -> _Judgement | None:
  """Judges a process that ended well and left no value; None if it left one."""
  if isinstance(record.get("format"), str):
    return _Judgement("format", "", detail=record["format"][:MAX_ERROR_CHARS])
  return None if "value" in record else _ended_early()


def _ended_early() -> _Judgement:
  error = ProgramError("", "the program ended before it returned a value", None, "")
  return _Judgement("runtime_error", "", error)


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
