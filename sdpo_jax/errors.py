"""The errors that a person has to act on, and the two guards that turn others into them.

Commands print such an error as one line, without a traceback, and exit with its status:

  error         what happened                                         who has to act        status
  UsageError    a flag or a settings file is wrong                    caller of the command    2
  SettingError  a setting, a path or this machine forbids the run     caller of the command    2
  TaskError     a question is longer than the settings have room for  who chose data or limit  2
  RunError      a run that has begun cannot go on                     who runs it              1
  Preempted     the run was asked to stop, and has saved              a launcher: start again  143

Before a RunError something was trained, and its message says what is intact. Any other exception is
a mistake of ours and keeps its traceback. A response that is wrong or an environment that breaks
is no error at all: see `records.Status`.
"""

import argparse
import contextlib
import difflib
import errno
import os
import re

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, limit of a file's size


class UsageError(argparse.ArgumentTypeError):
  """The command line or a setting is wrong; the message is one line, also where argparse reads."""


class SettingError(ValueError):
  """A setting, a path or this machine does not allow the run; nothing has been trained yet."""


class TaskError(ValueError):
  """A task needs more room than the settings give; the message names the task and the setting."""


class RunError(Exception):
  """The run cannot go on; the message says what happened and what is intact."""


class ServerLost(RunError):
  """A server that the run asks answers no more; nothing is wrong with what was trained."""


class Preempted(Exception):
  """The machine is being taken away; the message says what is saved."""


def local_path(path: str) -> str:
  """Puts the home directory in the place of `~`, which a shell leaves alone after `--flag=`.

  Raises UsageError for the address of an object store: `gs://bucket/run` would silently become a
  directory here that nobody looks for.
  """
  if re.match(r"[A-Za-z][\w+.-]*:/", path):
    raise UsageError(
      f"{path}: files are read and written by their paths; mount the bucket (Cloud Storage FUSE, "
      "mount-s3) or a network disk, and name the directory"
    )
  return os.path.expanduser(path)


def unknown(setting: str, value, choices) -> str:
  """Returns the message on a value that is none of the choices: it names the closest one."""
  advice = did_you_mean(value, choices)
  return f"{setting}={value!r} is unknown{advice}; choose from {list(choices)}"


def did_you_mean(value, choices, prefix: str | None = None) -> str:
  """Returns "; did you mean ..." with the closest choice, "" where none is close.

  The choice stands in quotation marks, or behind the prefix that names its section.
  """
  close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
  if not close:
    return ""
  return f"; did you mean {repr(close[0]) if prefix is None else prefix + close[0]}"


@contextlib.contextmanager
def blame_settings():
  """Turns what fails while a run is put together into a SettingError.

  At that time only what the run was given can be wrong: one line says so, not a traceback.
  """
  try:
    yield
  except (ValueError, OSError, RuntimeError) as error:
    raise SettingError(str(error)) from error


@contextlib.contextmanager
def blame_disk(workdir, latest_step):
  """Turns an OSError for want of room in the work directory into a RunError.

  Args:
    workdir: named in the message where the system names no file.
    latest_step: workdir -> step of its newest complete checkpoint, or None.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in _NO_ROOM:
      raise
    step = latest_step(workdir)
    resumes = "it goes on from what is complete"
    if step is not None:
      resumes = f"it goes on from the checkpoint of step {step}, the last complete one"
    raise RunError(
      f"{error.strerror}: {error.filename or workdir} could not be written. "
      f"Make room, then run the same command again: {resumes}"
    ) from error
