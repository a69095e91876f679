"""From what a process left behind to a test's result."""

import json
import signal

from sdpo_jax.sandbox.compare import _same_literal, same_text, same_value
from sdpo_jax.sandbox.verdict import Limits, Outcome, ProgramError, TestCase, TestResult
from sdpo_jax.sandbox.wording import MAX_ERROR_CHARS, _literal_text

# From what a process left behind to a result.


def judge_test(
  outcome: Outcome, test: TestCase, program: str, fn_name: str | None, limits: Limits
) -> TestResult:
  kind, output, error, detail = _classify(outcome, test, program, fn_name, limits)
  return TestResult(
    input=test.input if test.expression is None else test.expression,
    output=output,
    expected=test.output,
    kind=kind,
    error=error,
    detail=detail,
    hidden=test.hidden,
    cpu_s=outcome.cpu_s,
    wall_s=outcome.wall_s,
    max_rss_mb=outcome.max_rss_kb / 1024,
  )


def _classify(outcome, test, program, fn_name, limits):
  """-> kind, output text, error, detail."""
  stdin_program = fn_name is None and test.expression is None
  stdout = outcome.stdout.decode("utf-8", "replace")
  output = stdout if stdin_program else ""
  record = _record(outcome.result)
  error = _program_error(record.get("error"), program)
  if outcome.killed or outcome.cpu_s > limits.time_s or outcome.status & 0x7F == signal.SIGXCPU:
    return "time_limit", output, None, ""
  if outcome.capped:
    return "output_limit", output, None, ""
  if signal_number := outcome.status & 0x7F:
    if signal_number == signal.SIGKILL and outcome.max_rss_kb > 0.9 * 1024 * limits.memory_mb:
      # the kernel was short of memory and chose this process
      return "memory_limit", output, None, ""
    try:
      name = signal.Signals(signal_number).name
    except ValueError:
      name = f"signal {signal_number}"
    return (
      "runtime_error",
      output,
      ProgramError("", f"the process was ended by {name}", None, ""),
      "",
    )
  if outcome.status:
    error = error or ProgramError("", f"exit status {outcome.status >> 8 & 0xFF}", None, "")
    return ("memory_limit" if error.type == "MemoryError" else "runtime_error"), output, error, ""
  if stdin_program:
    return ("passed" if same_text(stdout, test.output) else "wrong_answer"), output, None, ""
  if isinstance(record.get("format"), str):
    return "format", "", None, record["format"][:MAX_ERROR_CHARS]
  if "value" not in record:
    return (
      "runtime_error",
      "",
      ProgramError("", "the program ended before it returned a value", None, ""),
      "",
    )
  value = record["value"]
  try:
    if test.expression is None:
      same, text = same_value(value, json.loads(test.output)), json.dumps(value)
    else:
      same, text = _same_literal(value, test), _literal_text(value)
  # mostly what a program wrote into the result by itself; whatever it is, it is the program's fault
  except Exception:
    return "format", "", None, "the result is not a value"
  return ("passed" if same else "wrong_answer"), text, None, ""


def _record(result: bytes) -> dict:
  try:
    record = json.loads(result) if result else {}
  except (ValueError, RecursionError):
    return {}
  return record if isinstance(record, dict) else {}


def _program_error(fields, program: str) -> ProgramError | None:
  if (
    not isinstance(fields, list)
    or len(fields) != 3
    or not all(isinstance(x, str) for x in fields[:2])
  ):
    return None
  name, message, line = fields
  lines = program.split("\n")
  if isinstance(line, bool) or not isinstance(line, int) or not 1 <= line <= len(lines):
    line = None
  return ProgramError(
    name[:MAX_ERROR_CHARS], message[:MAX_ERROR_CHARS], line, lines[line - 1].strip() if line else ""
  )
