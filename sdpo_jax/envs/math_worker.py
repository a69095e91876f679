r"""Compares mathematical answers in its own process: `python math_worker.py MEMORY_MB TIME_S`.

It writes one line "ready", then reads lines of JSON [reference, answer] and writes "true" or
"false" for each.

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


def main(memory_mb: int, time_s: float) -> None:
  """Answers the lines of standard input until it ends or a comparison takes too much memory."""
  resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  import math_verify

  # The other extractors evaluate text as Python.
  latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

  def parse(text):
    return math_verify.parse(f"\\boxed{{{text}}}", latex, parsing_timeout=None)

  write_line("ready")
  for line in sys.stdin:
    reference, answer = json.loads(line)
    signal.alarm(math.ceil(time_s) + 5)
    try:
      are_equal = math_verify.verify(parse(reference), parse(answer), timeout_seconds=None)
    except (MemoryError, RecursionError):
      return
    signal.alarm(0)
    write_line(json.dumps(bool(are_equal)))


def write_line(text: str) -> None:
  """Writes a line to standard output at once."""
  sys.stdout.write(text + "\n")
  sys.stdout.flush()


if __name__ == "__main__":
  main(int(sys.argv[1]), float(sys.argv[2]))
