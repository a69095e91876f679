"""Save and restore everything a run needs to go on: device state and host state, as one.

A checkpoint is WORKDIR/checkpoints/STEP, written by Orbax: `state` is a pytree of arrays (a TrainState: parameters, optimiser, teacher,
controller), `host` is JSON: what the caller passed (data position, counters, random states; bytes allowed) and `leaves`, the path, type and shape
of every array, so that a person can read what is inside. It has its name only while complete: a save or a deletion that was killed leaves a
directory of another name, which no reader takes for a checkpoint and the next save removes.

Saving is synchronous: when `save` returns the state may be donated and the step counts as saved. Every process calls `save` and `restore` (Orbax
waits for all of them); the host part is process 0's, so it must be the same on all or be derived from the step. Arrays come back bit for bit, on the
shardings of the `like` that is passed, which may differ from those they were saved with. A power cut, unlike a kill, may lose what the
operating system had not yet written.

Errors: FileNotFoundError naming the directory and the steps it holds; ValueError where the stored arrays are not those asked for
(Orbax itself would convert a type silently); OSError with the system's number where the disk does not take what is saved: the
checkpoints that were there stay whole.
"""

import base64
import contextlib
import logging
import os
import pathlib
import re
import shutil
import sys

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


def latest_step(workdir) -> int | None:
  """The newest complete checkpoint, or None."""
  return max(all_steps(workdir), default=None)


def all_steps(workdir) -> list[int]:
  """Steps of the complete checkpoints, ascending. Waits for no other process, unlike Orbax's manager: one may ask alone, after a failure."""
  directory = _directory(workdir)
  return (
    sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    if directory.is_dir()
    else []
  )


def save(workdir, step: int, state, host: dict, *, keep: int = 2):
  """Write checkpoint `step`, which must not exist, and delete all but the last `keep`."""
  options = dict(
    preservation_policy=checkpoint_managers.LatestN(keep),
    todelete_subdir="deleted",
    cleanup_tmp_directories=True,
  )
  with _system_errors(_directory(workdir) / str(step)), _manager(workdir, **options) as manager:
    manager.save(
      int(step),
      force=True,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state),
        host=ocp.args.JsonSave({"host": _to_json(host), "leaves": _leaves(state)}),
      ),
    )
  # moved away whole first: a deletion that was killed must not leave half a checkpoint under its
  # name
  if jax.process_index() == 0:
    shutil.rmtree(_directory(workdir) / "deleted", ignore_errors=True)


def tell_failures_once():
  """For entry points: of a save that fails nothing is printed but what its caller makes of the error. Holds for the process.

  Orbax's threads log the error with its traceback before they raise it. Its other writes, whose result nobody waits for then, either fail
  too, which asyncio logs when it drops them, or outlive their event loop, which TensorStore prints.
  """
  from_orbax = lambda record: (
    record.exc_info and record.pathname.endswith("orbax/checkpoint/_src/futures/future.py")
  )
  logging.getLogger("absl").addFilter(lambda record: not from_orbax(record))
  logging.getLogger("asyncio").addFilter(
    lambda record: not (record.exc_info and "orbax/checkpoint" in record.getMessage())
  )
  told = sys.unraisablehook
  sys.unraisablehook = lambda error: (
    None if str(error.exc_value) == "Event loop is closed" else told(error)
  )


def restore(workdir, like_state, step: int | None = None):
  """(state, host) of checkpoint `step`, by default the newest. like_state: the same tree of arrays or ShapeDtypeStructs with shardings."""
  return _restore(workdir, like_state, step, _leaves(like_state), under="")


def restore_params(workdir, like_params, step: int | None = None):
  """The policy's parameters alone: neither the optimiser nor the teacher is read."""
  state, _ = _restore(
    workdir,
    {"params": like_params},
    step,
    {".params" + path: kind for path, kind in _leaves(like_params).items()},
    under=".params",
  )
  return state["params"]


def _restore(workdir, like, step, wanted, under):
  """Arrays of `like`, whose paths in the saved state are `wanted`'s keys: all that lie under that path."""
  step = _existing(workdir, step)
  with _manager(workdir, create=False) as manager:
    text = manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore())).host
    stored = {path: kind for path, kind in text["leaves"].items() if path.startswith(under)}
    unlike = sorted(
      path for path in wanted.keys() | stored.keys() if wanted.get(path) != stored.get(path)
    )
    if unlike:
      shown = "; ".join(
        f"{path}: stored {stored.get(path, 'nothing')}, wanted {wanted.get(path, 'nothing')}"
        for path in unlike[:3]
      )
      raise ValueError(
        f"checkpoint {manager.directory / str(step)} holds another state ({len(unlike)} arrays differ): {shown}"
      )
    arguments = ocp.args.PyTreeRestore(
      like,
      restore_args=ocp.checkpoint_utils.construct_restore_args(like),
      partial_restore=bool(under),
    )
    return manager.restore(step, args=ocp.args.Composite(state=arguments)).state, _from_json(
      text["host"]
    )


def _existing(workdir, step):
  steps = all_steps(workdir)
  if not steps or step not in (None, *steps):
    missing = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise FileNotFoundError(
      f"{missing} in {_directory(workdir)}; it holds " + (f"steps {steps}" if steps else "none")
    )
  return steps[-1] if step is None else int(step)


def _directory(workdir):
  return pathlib.Path(workdir).absolute() / "checkpoints"


def _manager(workdir, **options):
  return contextlib.closing(
    ocp.CheckpointManager(
      _directory(workdir),
      options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options),
    )
  )


@contextlib.contextmanager
def _system_errors(path):
  """An error of the system as an OSError: TensorStore raises ValueError and tells the number in the text alone."""
  try:
    yield
  except ValueError as error:
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if not number:
      raise
    raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _leaves(tree):
  return {
    jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _to_json(value):
  """JSON has no bytes: they become {"__bytes__": base64}."""
  if isinstance(value, dict):
    return {key: _to_json(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_to_json(item) for item in value]
  return {"__bytes__": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_json(value):
  if isinstance(value, dict):
    return (
      base64.b64decode(value["__bytes__"])
      if value.keys() == {"__bytes__"}
      else {key: _from_json(item) for key, item in value.items()}
    )
  return [_from_json(item) for item in value] if isinstance(value, list) else value
