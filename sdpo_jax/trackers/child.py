"""Starts the processes that feed trackers beside a run, and ends them with it.

Of several processes of a run the first alone has trackers.

Nothing here raises because of a tracker, and nothing waits for one while the run goes on. At the
end of a run that is finished a tracker has `patience_s` seconds to send what it has; a run that
failed or is preempted leaves at once but for a moment. One that is not done by then is killed.
"""

import contextlib
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

from sdpo_jax import hosts
from sdpo_jax.errors import Preempted
from sdpo_jax.trackers.__main__ import FAILED
from sdpo_jax.trackers.sinks import folder

HURRY_S = 5.0  # that a run which does not end well waits


def _names(log) -> tuple[str, ...]:
  return log.trackers if hosts.leads() else ()


def check_installed(log) -> None:
  """Raises ValueError for a tracker of `config.log` whose package is not there."""
  for name in _names(log):
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a directory of that name is no package
      raise ValueError(
        f"config.log.trackers holds {name!r}, whose package is not installed: "
        f'pip install -e ".[{name}]"'
      )


@contextlib.contextmanager
def tracked(log, workdir: pathlib.Path, *, anew: bool):
  """Feeds the trackers of `config.log` while the run inside goes on.

  anew: the run begins here, and what the trackers have of an earlier one is not its beginning.
  """
  children = [_Child(name, log, workdir, anew) for name in _names(log)]
  ending = "failed"
  try:
    yield
    ending = "finished"
  except Preempted:
    ending = "preempted"
    raise
  finally:
    patience_s = log.tracker_timeout_s
    if ending != "finished":
      patience_s = min(HURRY_S, patience_s)
    for child in children:
      child.tell(ending)
    deadline = time.monotonic() + patience_s
    for child in children:
      child.end(deadline, patience_s)


class _Child:
  """The process that feeds one tracker."""

  def __init__(self, name: str, log, workdir: pathlib.Path, anew: bool):
    self._name, self._workdir = name, workdir
    command = [sys.executable, "-m", "sdpo_jax.trackers", "--follow", f"--workdir={workdir}"]
    command += [f"--tracker={name}", f"--project={log.project}"]
    # longer than `end` waits: the parent's word comes first
    command += [f"--patience_s={log.tracker_timeout_s + 5}", *["--anew"] * anew]
    self._process = None
    try:
      # its own session: what interrupts the run is not meant for it, and `kill` reaches what the
      # tracker has started
      self._process = subprocess.Popen(
        command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
      )
    except OSError as error:
      self._complain(f"could not be started ({error.strerror})")

  def tell(self, ending: str) -> None:
    """Says how the run ended."""
    if self._process is not None:
      with contextlib.suppress(OSError):  # it has ended already
        self._process.stdin.write(f"{ending}\n".encode())
        self._process.stdin.close()

  def end(self, deadline: float, patience_s: float) -> None:
    """Waits until the process ends, at most to the deadline of the monotonic clock."""
    if self._process is None:
      return
    try:
      status = self._process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      os.killpg(self._process.pid, signal.SIGKILL)
      self._process.wait()
      self._complain(
        f"was not done {patience_s:g} s after the run (config.log.tracker_timeout_s) and is killed"
      )
      return
    if status not in (0, FAILED):
      self._complain(f"ended with status {status}")

  def _complain(self, what: str) -> None:
    print(
      f"sdpo_jax: the tracker {self._name} {what}, nothing else changes; python -m "
      f"sdpo_jax.trackers --workdir={self._workdir} --tracker={self._name} sends the rest later; "
      f"its log: {folder(self._workdir) / (self._name + '.log')}",
      file=sys.stderr,
    )
