"""jail.py runs alone inside the jail; what it repeats of its host's files must agree with them."""

import json
import pathlib
import subprocess
import sys

from sdpo_jax.sandbox import jail_filter, jail_worker, json_values

JAIL = pathlib.Path(jail_worker.__file__).with_name("jail.py")


def import_jail(then: str) -> str:
  """Imports jail.py in a process of its own, for it changes the process, and runs `then` there."""
  code = f"import os, sys; sys.path.insert(0, {str(JAIL.parent)!r}); {then}"
  done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_both_ends_of_the_socket_agree():
  repeated = json.loads(
    import_jail(
      "import jail, json; print(json.dumps([jail.JOB.format, jail.DONE.format, jail.STDIN, "
      "jail.FUNCTION, jail.EXPRESSION, jail.CALLS, jail.CHECK, jail.STOP.decode(), jail.SELF, "
      "jail.MAX_DIGITS]))"
    )
  )
  assert repeated == [
    jail_worker.JOB.format,
    jail_worker.DONE.format,
    jail_worker.STDIN,
    jail_worker.FUNCTION,
    jail_worker.EXPRESSION,
    jail_worker.CALLS,
    jail_worker.CHECK,
    jail_worker.STOP.decode(),
    jail_filter.SELF,
    json_values.MAX_DIGITS,
  ]


def test_the_filter_names_its_process_once_a_rule():
  """The child puts its number where SELF stands, so those bytes may mean nothing else."""
  self_bytes = jail_filter.SELF.to_bytes(4, "little")
  program = jail_filter.build()
  starts = [at for at in range(len(program)) if program[at : at + 4] == self_bytes]
  assert len(starts) == 3  # kill, tgkill, prlimit64
  # the operand is the last half of an instruction of 8 bytes
  assert all(at % 8 == 4 for at in starts)


def test_nothing_of_the_jail_runs_after_a_fork():
  """Imports that register hooks come after the line that ignores them: a third of a test's time."""
  hooks = import_jail(
    "calls = []; os.register_at_fork = lambda **hooks: calls.append(hooks); "
    "assert 'threading' not in sys.modules; import jail, random; print(len(calls))"
  )
  assert hooks == "0\n"
