"""Runs an engine in its own process: `python -P engine_child.py FILE JSON`.

FILE is a Python file with a function `start(**settings)`, called with the object that JSON holds.
It returns the engine: a function that takes a request and returns an answer, both of what JSON can
say. After that the first line is written, then one for each line of standard input:

  {"number": 0, "result": null}       the engine has started
  [number, seconds, request]          the request, and how long it may take
  {"number": .., "result": answer}    its answer
  {"number": .., "error": text}       the engine raised; it goes on

What the engine prints goes to standard error, and it cannot read the requests. Whoever started this
process kills it where it is late; the alarm ends it where nobody is left to do so.

It is run by its path, so it imports nothing of this package.
"""

import importlib.util
import json
import math
import os
import signal
import sys


def main(file: str, settings: str) -> None:
  """Starts the engine of a file and answers until standard input ends."""
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  requests = os.fdopen(os.dup(0), "r", encoding="ascii")
  answers = os.fdopen(os.dup(1), "w", encoding="ascii")
  nothing = os.open(os.devnull, os.O_RDWR)
  os.dup2(nothing, 0)
  os.dup2(2, 1)

  def write(reply: dict) -> None:
    answers.write(json.dumps(reply) + "\n")
    answers.flush()

  try:
    engine = _load(file).start(**json.loads(settings))
  except Exception as error:
    write({"number": 0, "error": _one_line(error)})
    return
  write({"number": 0, "result": None})
  for line in requests:
    number, seconds, request = json.loads(line)
    signal.alarm(math.ceil(seconds) + 5)
    try:
      reply = {"number": number, "result": engine(request)}
    except Exception as error:
      reply = {"number": number, "error": _one_line(error)}
    signal.alarm(0)
    write(reply)
  os._exit(0)  # libraries of engines crash where they are unloaded


def _load(file: str):
  """Imports a file by its path; its folder is no place to import from."""
  spec = importlib.util.spec_from_file_location("engine", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _one_line(error: Exception) -> str:
  """Returns what an exception says, shortened to a line."""
  return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
  main(*sys.argv[1:])
