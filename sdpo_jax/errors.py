"""Errors that a person has to act on, and who is to blame for what fails."""

import contextlib
import errno


class SettingError(ValueError):
  """A setting, a path or this machine does not allow the run; raised before anything is trained."""


class RunError(Exception):
  """The run cannot go on; the message says what happened and what is intact."""


@contextlib.contextmanager
def blame_settings():
  """What fails while a run is being wired fails because of what it was given: one line, not a traceback."""
  try:
    yield
  except (ValueError, OSError, RuntimeError) as error:
    raise SettingError(str(error)) from error


@contextlib.contextmanager
def blame_disk(workdir, latest_step):
  """No room where the work directory is written (disk, quota, limit of a file's size) is a RunError: one line, not a traceback."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise
    step = latest_step(workdir)
    raise RunError(
      f"{error.strerror}: {error.filename or workdir} could not be written. Make room, then run the same command again: "
      + (
        "it goes on from what is complete"
        if step is None
        else f"it goes on from the checkpoint of step {step}, the last complete one"
      )
    ) from error


class TaskError(ValueError):
  """A task that the settings have no room for; the message names the task and the setting."""
