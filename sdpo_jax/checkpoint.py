"""Saves and restores everything a run needs to go on: device state and host state, as one.

A checkpoint is WORKDIR/checkpoints/STEP, written by Orbax:
  state   a pytree of arrays: a TrainState (parameters, optimizer, teacher, counts of skips)
  host    JSON: what the caller passed (data position, counters, shapes; bytes allowed),
          and of every array its path, type and shape (`leaves`) and a checksum (`checksums`)

A checksum is computed where the array is, whatever its sharding, before it is written and after it
is read. A checkpoint whose files say something else, or are missing, is `Damaged`.

It has its name only while complete. A save or a deletion that was killed leaves a directory of
another name, which no reader takes for a checkpoint and the next save removes.

A `Saver` writes while the run goes on: when its `save` returns, the state is copied and may be
donated, and the step counts as saved once `wait` has returned. A kill before that costs this
checkpoint alone. A power cut, unlike a kill, may lose what the operating system had not yet
written.

Every process saves and restores, and Orbax waits for all of them. The host part is
process 0's, so it must be the same on all or be derived from the step. Arrays come back bit for
bit, on the shardings of the `like` that is passed. These may differ from those they were saved
with.

Errors:
  FileNotFoundError   names the directory and the steps it holds
  ValueError          the stored arrays are not those asked for; Orbax would convert a type silently
  Damaged             the files are not those that were written, or cannot be read
  OSError             the disk does not take what is saved, with the system's number; the
                      checkpoints that were there stay whole
"""

import base64
import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from sdpo_jax import hosts

_log = logging.getLogger(__name__)


class Damaged(ValueError):
  """A checkpoint does not hold what was written into it; the message names it."""


def latest_step(workdir) -> int | None:
  """Returns the step of the newest complete checkpoint, or None."""
  return max(all_steps(workdir), default=None)


def best_step(workdir) -> int:
  """Returns the step of the best checkpoint by config.checkpoint.best, as the newest tells.

  FileNotFoundError where there is no checkpoint, or none that was evaluated.
  """
  best = read_host(workdir).get("best")
  if best is None:
    raise FileNotFoundError(
      f"{workdir}: no checkpoint has a value of config.checkpoint.best, so none is the best one"
    )
  return _existing(workdir, best[0])


def all_steps(workdir) -> list[int]:
  """Returns the steps of the complete checkpoints, ascending.

  Unlike Orbax's manager it waits for no other process: one may ask alone, after a failure.
  """
  directory = _directory(workdir)
  if not directory.is_dir():
    return []
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def save(workdir, step: int, state, host: dict, *, keep: int = 2, keep_also=()):
  """Writes checkpoint `step` as `Saver` does, and returns when it is there."""
  with contextlib.closing(Saver(workdir, keep)) as saver:
    saver.save(step, state, host, keep_also=keep_also)


class Saver:
  """Writes checkpoints beside the run that they are of, one at a time.

  Who has one calls `close` at the end, whatever happened.
  """

  def __init__(self, workdir, keep: int = 2):
    self._directory = _directory(workdir)
    self._keep = keep
    self._keep_also: list[int] = []
    self._step = 0  # of the last save
    self._manager = None  # made by the first save

  def save(self, step: int, state, host: dict, *, keep_also=()):
    """Begins to write checkpoint `step`, which must not exist.

    Deletes all but the last `keep` and those of the steps `keep_also`. Waits for the save before,
    and raises what that failed of.
    """
    self.wait()
    if self._manager is None:
      kept = [checkpoint_managers.LatestN(self._keep), _Steps(self._keep_also)]
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
          todelete_subdir="deleted",
          cleanup_tmp_directories=True,
        ),
      )
    self._step, self._keep_also[:] = int(step), keep_also
    host_json = {"host": _to_json(host), "leaves": _leaves(state), "checksums": checksums(state)}
    arguments = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state), host=ocp.args.JsonSave(host_json)
    )
    with _system_errors(self._directory / str(step)):
      self._manager.save(self._step, force=True, args=arguments)

  def wait(self) -> None:
    """Waits until what was begun is written. Raises OSError where the disk did not take it."""
    if self._manager is None:
      return
    try:
      with _system_errors(self._directory / str(self._step)):
        self._manager.wait_until_finished()
    except BaseException:
      self._manager = None  # it would raise the same again
      raise
    if jax.process_index() == 0:
      remove_deleted(self._directory.parent)

  def close(self) -> None:
    """Waits as `wait` does, and ends."""
    self.wait()
    if self._manager is not None:
      self._manager.close()
      self._manager = None


def remove_deleted(workdir) -> None:
  """Removes old checkpoints for good; one process calls this.

  They are first moved whole to a directory of their own. A deletion that was killed must not leave
  half a checkpoint under its name; after a run's last save, only the next start can end it.
  """
  shutil.rmtree(_directory(workdir) / "deleted", ignore_errors=True)


@dataclasses.dataclass
class _Steps(checkpoint_managers.PreservationPolicy):
  """Keeps the checkpoints of some steps; unlike Orbax's CustomSteps, they may change."""

  steps: list[int]

  def should_preserve(self, checkpoints, *, context):
    """Returns for each checkpoint whether it stays."""
    return [info.step in self.steps for info in checkpoints]


def tell_failures_once():
  """Leaves the report of a failed save to its caller: nothing else of it is printed.

  Entry points call it; it holds for the process. Orbax's threads log the error with its traceback
  before they raise it. Nobody then waits for the results of the other writes. These fail too, which
  asyncio logs when it drops them, or outlive their event loop, which TensorStore prints.
  """

  def is_not_from_orbax(record):
    return not (record.exc_info and "orbax/checkpoint/" in record.pathname)

  def is_not_about_orbax(record):
    return not (record.exc_info and "orbax/checkpoint" in record.getMessage())

  previous_hook = sys.unraisablehook

  def hook(error):
    if str(error.exc_value) != "Event loop is closed":
      previous_hook(error)

  logging.getLogger("absl").addFilter(is_not_from_orbax)
  logging.getLogger("asyncio").addFilter(is_not_about_orbax)
  sys.unraisablehook = hook


def restore_newest(workdir, like_state) -> tuple[int, Any, dict]:
  """Returns (step, state, host) of the newest checkpoint that is whole.

  A damaged one is set aside, under a name that is no step's, with a warning. Raises Damaged where
  all are, and as `restore` does.
  """
  while True:
    step = _existing(workdir, None)
    try:
      restored, damage = restore(workdir, like_state, step), None
    except Damaged as error:
      restored, damage = None, str(error)
    # one process may be the only one that reads the damaged file
    damages = [text for text in hosts.share(damage) if text]
    if not damages:
      return step, *restored
    if len(all_steps(workdir)) == 1:
      raise Damaged(f"{damages[0]}, and there is no earlier one")
    _set_aside(workdir, step)
    _log.warning("%s; going on from step %d", damages[0], latest_step(workdir))


def _set_aside(workdir, step: int) -> None:
  """Renames a damaged checkpoint, so that nobody takes it for one; every process calls this."""
  if hosts.leads():
    path = _directory(workdir) / str(step)
    target = path.with_name(f"{step}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
  hosts.share(None)  # the others look for the next one only then


def restore(workdir, like_state, step: int | None = None):
  """Returns (state, host) of checkpoint `step`, by default the newest.

  `like_state` is the same tree of arrays, or of ShapeDtypeStructs with shardings.
  """
  return _restore(workdir, like_state, step, _leaves(like_state), under="")


def restore_params(workdir, like_params, step: int | None = None):
  """Returns the policy's parameters alone: neither the optimizer nor the teacher is read."""
  leaves = {".params" + path: kind for path, kind in _leaves(like_params).items()}
  state, _ = _restore(workdir, {"params": like_params}, step, leaves, under=".params")
  return state["params"]


def read_host(workdir, step: int | None = None) -> dict:
  """Returns the host's part of checkpoint `step`, by default the newest, and no arrays."""
  step = _existing(workdir, step)
  with _manager(workdir) as manager:
    return _from_json(_read_host_json(manager, step)["host"])


def _restore(workdir, like, step: int | None, leaves: dict[str, str], under: str):
  """Returns (arrays like `like`, host) of a checkpoint.

  `leaves` describes all arrays of the saved state whose path begins with `under`. ValueError where
  the checkpoint holds others there.
  """
  step = _existing(workdir, step)
  with _manager(workdir) as manager:
    host_json = _read_host_json(manager, step)
    stored = {path: kind for path, kind in host_json["leaves"].items() if path.startswith(under)}
    _check_leaves(manager.directory / str(step), stored, leaves)
    arguments = ocp.args.PyTreeRestore(
      like,
      restore_args=ocp.checkpoint_utils.construct_restore_args(like),
      partial_restore=bool(under),
    )
    with _damage(manager.directory / str(step)):
      state = manager.restore(step, args=ocp.args.Composite(state=arguments)).state
    _check_sums(manager.directory / str(step), state, host_json.get("checksums", {}))
    return state, _from_json(host_json["host"])


def _read_host_json(manager, step: int) -> dict:
  path = manager.directory / str(step)
  with _damage(path):
    host_json = manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore())).host
    if not {"host", "leaves"} <= host_json.keys():
      raise ValueError("its host part is incomplete")
    return host_json


@contextlib.contextmanager
def _damage(path):
  """Turns whatever Orbax says of files that it cannot read into Damaged."""
  try:
    yield
  except PermissionError:
    raise
  except Exception as error:
    if hosts.blames_a_peer(error):
      raise
    reason, _, _ = str(error).partition("\n")
    kind = type(error).__name__
    raise Damaged(f"checkpoint {path} is damaged ({kind}: {reason[:150]})") from error


def _check_sums(path, state, stored: dict[str, int]) -> None:
  """Raises Damaged where an array is not the one that was written.

  Checkpoints of before there were checksums have none, and are believed.
  """
  wrong = [name for name, sum_ in checksums(state).items() if stored.get(name, sum_) != sum_]
  if wrong:
    raise Damaged(
      f"checkpoint {path} is damaged: {len(wrong)} arrays are not those that were written, "
      f"{wrong[0]} first"
    )


def checksums(tree) -> dict[str, int]:
  """Returns path -> checksum of every array.

  One after another: of several programs at once, each process of a run on CPUs may begin with
  another one, and they would wait for each other.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path): int(_checksum(x if isinstance(x, jax.Array) else jnp.asarray(x)))
    for path, x in leaves
  }


@jax.jit
def _checksum(x):
  """Returns a number (uint32) of an array's bits and their places, equal for every sharding.

  The words are mixed one by one and added up modulo 2^32: integers add up in any order.
  """
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  size = min(x.dtype.itemsize, 4)  # of 8 bytes XLA makes two words
  bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size])
  bits = bits.astype(jnp.uint32)
  place, stride = jnp.uint32(0), 1
  for axis in reversed(range(bits.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  mixed = (bits + jnp.uint32(0x9E3779B9)) * (2 * place + 1)
  mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
  return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


def _check_leaves(checkpoint: pathlib.Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
  """Raises ValueError, naming the first three, where arrays differ in path, type or shape."""
  paths = sorted(wanted.keys() | stored.keys())
  unlike = [path for path in paths if wanted.get(path) != stored.get(path)]
  if unlike:
    differences = "; ".join(
      f"{path}: stored {stored.get(path, 'nothing')}, wanted {wanted.get(path, 'nothing')}"
      for path in unlike[:3]
    )
    raise ValueError(
      f"checkpoint {checkpoint} holds another state ({len(unlike)} arrays differ): {differences}"
    )


def _existing(workdir, step: int | None) -> int:
  """Returns the step itself, or the newest for None. FileNotFoundError where it is not there."""
  steps = all_steps(workdir)
  if not steps or step not in (None, *steps):
    missing = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    held = f"steps {steps}" if steps else "none"
    raise FileNotFoundError(f"{missing} in {_directory(workdir)}; it holds {held}")
  return steps[-1] if step is None else int(step)


def _directory(workdir):
  return pathlib.Path(workdir).absolute() / "checkpoints"


def _manager(workdir):
  """Opens Orbax's manager for reading."""
  options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=False)
  return contextlib.closing(ocp.CheckpointManager(_directory(workdir), options=options))


@contextlib.contextmanager
def _system_errors(path):
  """Raises an error of the system as an OSError.

  TensorStore raises ValueError for it, with the system's number in the text alone.
  """
  try:
    yield
  except ValueError as error:
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if not number:
      raise
    raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _leaves(tree) -> dict[str, str]:
  """Returns path -> type and shape of every array; both are part of the file format."""
  return {
    jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _to_json(value):
  """Replaces bytes, which JSON has none of, by {"__bytes__": base64}."""
  if isinstance(value, dict):
    return {key: _to_json(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_to_json(item) for item in value]
  if isinstance(value, bytes):
    return {"__bytes__": base64.b64encode(value).decode()}
  return value


def _from_json(value):
  """Undoes `_to_json`; tuples come back as lists."""
  if isinstance(value, dict):
    if value.keys() == {"__bytes__"}:
      return base64.b64decode(value["__bytes__"])
    return {key: _from_json(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_from_json(item) for item in value]
  return value
