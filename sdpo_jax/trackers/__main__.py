"""Sends a run's metrics and rollouts to a tracker, from the files of its work directory.

  python -m sdpo_jax.trackers --workdir=runs/A --tracker=wandb

It sends the steps that the tracker does not have yet. A run at work starts this by itself, with
--follow (config.log.trackers); by hand it catches up on what the tracker missed of a run that has
ended. Exit status: 0; 2 for a wrong command line; 3 where the tracker failed, which one line says.
"""

import argparse
import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import IO, Iterator

from sdpo_jax.trackers.sinks import ENDINGS, SINKS, folder

FAILED = 3  # exit status; it is told
LATE = 4  # exit status of a process that its run did not wait for
POLL_S = 1.0  # between two looks at metrics.jsonl
ROLLOUTS = 8  # of each file, the first ones


class Ending:
  """Hears from the run that it ends, on a stream: one word, or nothing where it was killed.

  Whatever the tracker does then, this process is over `patience_s` seconds later: a tracker that
  hangs must not outlive the run.
  """

  def __init__(self, stream: IO[str], patience_s: float):
    self._stream, self._patience_s = stream, patience_s
    self._word, self._came = "", threading.Event()
    threading.Thread(target=self._listen, daemon=True).start()

  def _listen(self) -> None:
    word = self._stream.readline().strip()
    self._word = word if word in ENDINGS else "failed"
    self._came.set()
    time.sleep(self._patience_s)
    os._exit(LATE)

  def wait(self, seconds: float) -> str | None:
    """Returns how the run ended; None: after so many seconds it goes on."""
    return self._word if self._came.wait(seconds) else None


class Metrics:
  """The whole lines of a growing metrics.jsonl, each once, from the step after `last` on.

  A resumed run cuts the file back, that is, puts a shorter one in its place, and then writes the
  same lines again. They are passed over.
  """

  def __init__(self, path: pathlib.Path, last: int):
    self._path, self.last = path, last
    self._file_id, self._offset = None, 0

  def new(self) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields (step, values) of each line that has come."""
    for text in self._new_texts():
      values = json.loads(text)
      step = values.pop("step")
      if step > self.last:
        self.last = step
        yield step, values

  def _new_texts(self) -> list[bytes]:
    if not self._path.exists():
      return []
    with self._path.open("rb") as file:
      file_id = os.fstat(file.fileno()).st_ino
      if file_id != self._file_id:
        self._file_id, self._offset = file_id, 0
      file.seek(self._offset)
      *whole, _ = file.read().split(b"\n")  # what follows the last newline is not all there yet
    self._offset += sum(len(text) + 1 for text in whole)
    return whole


def read_json(path: pathlib.Path) -> dict:
  """Returns the object in a file, {} where there is none."""
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def rollouts_of(workdir: pathlib.Path, step: int) -> list[dict]:
  """Returns the first lines of a step's rollout file, if it has one."""
  path = workdir / "rollouts" / f"step_{step:06d}.jsonl"
  if not path.exists():
    return []
  with path.open(encoding="utf-8") as file:
    return [json.loads(line) for line, _ in zip(file, range(ROLLOUTS))]


class Feed:
  """A sink and the file that holds how far it has come."""

  def __init__(self, options: argparse.Namespace):
    """Begins the run at the tracker, or goes on with the one that the work directory names."""
    self._workdir, make = options.workdir, SINKS[options.tracker]
    self._path = folder(options.workdir) / f"{options.tracker}.json"
    earlier = {} if options.anew else read_json(self._path)
    project = options.project or earlier.get("project", "sdpo_jax")
    address = make.address(options.workdir, project)
    if earlier.get("address") != address:
      earlier = {}
    about = {"config": read_json(options.workdir / "config.json")}
    about["run"] = read_json(options.workdir / "run.json")
    self._sink = make(options.workdir, project, earlier.get("id"), about)
    self.place = self._sink.place
    self._about = {"id": self._sink.id, "project": project, "address": address}
    self._metrics = Metrics(options.workdir / "metrics.jsonl", earlier.get("step", -1))
    self._note()

  @property
  def last(self) -> int:
    """The last step that the tracker was given, -1 for none."""
    return self._metrics.last

  def send(self) -> None:
    """Sends what is new."""
    for step, values in self._metrics.new():
      self._sink.log(step, values, rollouts_of(self._workdir, step))
      self._note()

  def close(self, ending: str) -> None:
    """Ends the run at the tracker."""
    self._sink.close(ending)

  def _note(self) -> None:
    scratch = self._path.with_suffix(".tmp")
    scratch.write_text(json.dumps(self._about | {"step": self.last}) + "\n", encoding="utf-8")
    os.replace(scratch, self._path)


def feed(options: argparse.Namespace, ending: Ending | None, terminal: IO[str]) -> None:
  """Sends a run to its tracker until it ends.

  ending: None for a run that has ended. Whatever the tracker raises comes out of it, with a note
  of what it was doing.
  """
  doing = "as it began"
  try:
    sent = Feed(options)
    tell(terminal, f"{options.tracker}: {sent.place}")
    word = None
    while word is None:
      word = "finished" if ending is None else ending.wait(POLL_S)
      doing = f"after step {sent.last}"
      sent.send()
    doing = "as it ended"
    sent.close(word)
  except Exception as error:
    error.add_note(doing)
    raise


def tell(terminal: IO[str], text: str) -> None:
  """Prints one line for a person."""
  print(f"sdpo_jax: {' '.join(text.split())}", file=terminal, flush=True)


def own_output(path: pathlib.Path) -> IO[str]:
  """Sends what this process prints to a file from now on; returns the stderr that it had."""
  path.parent.mkdir(parents=True, exist_ok=True)
  terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
  with path.open("a") as log:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
  return terminal


def parse(argv: list[str]) -> argparse.Namespace:
  """Reads the command line; exits with 2 and one line for a wrong one."""
  parser = argparse.ArgumentParser(
    "python -m sdpo_jax.trackers",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of the run")
  parser.add_argument("--tracker", choices=sorted(SINKS), required=True)
  parser.add_argument("--project", help="default: that of the run")
  parser.add_argument("--anew", action="store_true", help="a new run there, from the first step on")
  parser.add_argument(
    "--follow", action="store_true", help="a run at work has the other end of stdin"
  )
  parser.add_argument("--patience_s", type=float, default=60.0, help="at its end, with --follow")
  options = parser.parse_args(argv[1:])
  if not options.follow and not (options.workdir / "metrics.jsonl").exists():
    parser.error(f"{options.workdir} holds no metrics.jsonl")
  return options


def main(argv: list[str]) -> int:
  """Runs one command and returns its exit status."""
  options = parse(argv)
  ending = None
  if options.follow:
    for number in (signal.SIGTERM, signal.SIGINT):  # the run hears them, and says how it ended
      signal.signal(number, signal.SIG_IGN)
    ending = Ending(sys.stdin, options.patience_s)
  log = folder(options.workdir) / f"{options.tracker}.log"
  terminal = own_output(log)
  try:
    feed(options, ending, terminal)
    return 0
  except Exception as error:
    doing = " ".join(error.__notes__)
    tell(
      terminal,
      f"the tracker {options.tracker} failed {doing} ({type(error).__name__}: {error}) and gets no "
      f"more, nothing else changes; python -m sdpo_jax.trackers --workdir={options.workdir} "
      f"--tracker={options.tracker} sends the rest later; its log: {log}",
    )
    return FAILED


if __name__ == "__main__":
  sys.exit(main(sys.argv))
