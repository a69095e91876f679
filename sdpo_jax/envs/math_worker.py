r"""Compares mathematical answers in its own process: `python math_worker.py MEMORY_MB TIME_S`.

It writes one line "ready", then reads lines of JSON [reference, answer] and writes "true" or
"false" for each. The answers are LaTeX without units: whoever asks has compared those.

math-verify compares decimals at six places and chops differences of 1e-15. Both limits move with
the size of the numbers here, so that tiny ones are not all equal.

math-verify's own time limit is a Python signal handler. That neither works in threads nor
interrupts a long C call (9^{9^{9^9}}), so whoever started this process kills it. The alarm here
ends it where nobody is left to do so; its default action needs no Python.

It is run by its path, so it imports nothing of this package.
"""

import json
import math
import resource
import signal
import sys

DECIMALS = 6  # that two decimals near 1 must share
DIGITS = 15  # that two expressions near 1 must share
MAX_ZEROS = 10000  # behind the point, that are reckoned with


def main(memory_mb: int, time_s: float) -> None:
  """Answers the lines of standard input until it ends or a comparison takes too much memory."""
  resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  from latex2sympy2_extended.math_normalization import NormalizationConfig
  import math_verify

  # The other extractors evaluate text as Python. Units are left: it drops all that follows one.
  normalization = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
  )
  latex = [
    math_verify.LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)
  ]

  def parse(text):
    return math_verify.parse(f"\\boxed{{{text}}}", latex, parsing_timeout=None)

  def are_equal(reference, answer):
    parsed = parse(reference), parse(answer)
    expressions = [side[0] for side in parsed if side and not isinstance(side[0], str)]
    return math_verify.verify(
      *parsed,
      float_rounding=DECIMALS + max(map(_zeros_of_decimals, expressions), default=0),
      numeric_precision=DIGITS + max(map(_zeros, expressions), default=0),
      timeout_seconds=None,
    )

  write_line("ready")
  for line in sys.stdin:
    reference, answer = json.loads(line)
    signal.alarm(math.ceil(time_s) + 5)
    try:
      result = bool(are_equal(reference, answer))
    except (MemoryError, RecursionError):
      return
    signal.alarm(0)
    write_line(json.dumps(result))


def _zeros_of_decimals(expression) -> int:
  """Returns how many zeros beyond the first stand behind the point of the smallest decimal."""
  parts = [expression, *getattr(expression, "args", ())]
  logs = [_log10(part) for part in parts if getattr(part, "is_Float", False)]
  return max(0, min(MAX_ZEROS, math.floor(-min(logs, default=0.0)) - 1))


def _zeros(expression) -> int:
  """Returns how many zeros stand behind the point, at most, in a number of an expression."""
  import sympy

  logs = [_log10(node) for node in sympy.preorder_traversal(expression)]
  return min(MAX_ZEROS, math.ceil(-sum(log for log in logs if log < 0)))


def _log10(node) -> float:
  """Returns the logarithm of a number's size, 0 for what is no simple number."""
  if getattr(node, "is_Rational", False):
    return _log10_of_integer(node.p) - _log10_of_integer(node.q) if node != 0 else 0.0
  if getattr(node, "is_Float", False):
    _, mantissa, exponent, _ = node._mpf_
    return _log10_of_integer(mantissa) + exponent * math.log10(2) if node != 0 else 0.0
  if getattr(node, "is_NumberSymbol", False):
    return math.log10(float(node))
  argument = node.args[0] if getattr(node, "args", ()) else None
  if type(node).__name__ == "factorial" and argument.is_Integer and 0 < argument < 10**6:
    return math.lgamma(int(argument) + 1) / math.log(10)
  if hasattr(node, "as_base_exp"):
    base, exponent = node.as_base_exp()
    if base != node and getattr(exponent, "is_Rational", False):
      power = max(-MAX_ZEROS, min(MAX_ZEROS, float(exponent)))
      return max(-MAX_ZEROS, min(MAX_ZEROS, power * _log10(base)))
  return 0.0


def _log10_of_integer(value) -> float:
  return math.log10(abs(int(value)))


def write_line(text: str) -> None:
  """Writes a line to standard output at once."""
  sys.stdout.write(text + "\n")
  sys.stdout.flush()


if __name__ == "__main__":
  main(int(sys.argv[1]), float(sys.argv[2]))
