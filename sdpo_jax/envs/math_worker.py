r"""Compares mathematical answers in a process of its own: `python math_worker.py MEMORY_MB TIME_S`.

Reads lines of JSON [reference, answer] and writes "true" or "false" for each, after one line "ready". math-verify's own time limit is a
Python signal handler, which neither works in threads nor interrupts a long C call (9^{9^{9^9}}); so whoever started this process kills it.
The alarm here ends it where nobody is left to do so; its default action needs no Python. Run by its path: it imports nothing of ours.
"""

import json
import math
import resource
import signal
import sys


def main(memory_mb: int, time_s: float) -> None:
  resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  import math_verify

  # the other extractors evaluate text as Python
  latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

  def parsed(text):
    return math_verify.parse(f"\\boxed{{{text}}}", latex, parsing_timeout=None)

  sys.stdout.write("ready\n")
  sys.stdout.flush()
  for line in sys.stdin:
    reference, answer = json.loads(line)
    signal.alarm(math.ceil(time_s) + 5)
    try:
      same = math_verify.verify(parsed(reference), parsed(answer), timeout_seconds=None)
    except (MemoryError, RecursionError):
      return
    signal.alarm(0)
    sys.stdout.write(json.dumps(bool(same)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
  main(int(sys.argv[1]), float(sys.argv[2]))
