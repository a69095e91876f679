"""Tasks from files, from the hub or from a generator, and the stream of them on grain: which
question comes next.

A source is a text "[SPLIT=]LOCATION[ xWEIGHT]"; LOCATION is

  a path of .jsonl or .parquet; it may be a pattern (`tests-*.parquet`), and "{split}" in it stands
  for the split
  hub:NAME[:CONFIG[:SPLIT]], a data set of the Hugging Face hub; or hub:OWNER/NAME/FILE, one .jsonl
    or .parquet of its repository

A location without "{split}" must name the split it serves; one of the hub serves every split unless
told otherwise. Examples: "sciknoweval/chemistry.{split}.jsonl", "train=gsm8k.jsonl x2",
"hub:openai/gsm8k:main", "test=hub:Idavidrein/gpqa:gpqa_diamond:train".

Rows become tasks by the environment's `task_from_row`, all at once when the source is opened, and
stay in memory: a malformed row is an error there, with file, line and field, before anything is
trained; or it is skipped and counted. So is a question that is too long for the run. A row for
which `task_from_row` returns None (outside a window of dates) is simply not part of the set.

The stream draws from the sources of a split by weight (equal by default), each shuffled anew in
each pass, and deals the questions to the processes in turn. Its position is grain's own iterator
state, saved with the checkpoint; it continues only over the same tasks.
"""

import dataclasses
import glob
import importlib
import json
import logging
import os
import re
from typing import NamedTuple
import zlib

import grain

from sdpo_jax.records import Task

_SOURCE = re.compile(r"(?:(?P<split>\w+)=)?(?P<location>.+?)(?:\s+x(?P<weight>\d+(?:\.\d+)?))?")


class Source(NamedTuple):
  """The tasks of one source in one split. skipped: how many of its rows were malformed."""

  location: str
  weight: float
  tasks: list[Task]
  skipped: int


class RowEnv:
  """An environment together with its rows: judges like the environment, knows `behaviour` if it
  does, and has `task(split, index)` and `size(split)` besides.
  """

  def __init__(self, env, sources, *, splits, on_bad_row: str = "error", check=None):
    """Opens the sources of the given splits; others are opened when asked for. ValueError for a
    source, or a row, that cannot be used, FileNotFoundError for a file.

    check(task): raises ValueError for a task that the run cannot use.
    """
    if on_bad_row not in ("error", "skip"):
      raise ValueError(
        f"config.data.on_bad_row={on_bad_row!r} is unknown; choose from ['error', 'skip']"
      )
    self.env, self.prompt, self.judge = env, env.prompt, env.judge
    if hasattr(env, "behaviour"):
      self.behaviour = env.behaviour

    def task_from_row(row, split):
      task = env.task_from_row(row, split)
      if task is not None and check is not None:
        check(task)
      return task

    self._open = lambda split: open_split(sources, split, task_from_row, on_bad_row)
    self._opened = {split: self._open(split) for split in dict.fromkeys(splits)}

  def size(self, split: str) -> int:
    return sum(len(source.tasks) for source in self.sources(split))

  def task(self, split: str, index: int) -> Task:
    """The index-th task of the split, in the order of sources and rows."""
    for source in self.sources(split):
      if index < len(source.tasks):
        return source.tasks[index]
      index -= len(source.tasks)
    raise IndexError(f"split {split!r} has {self.size(split)} tasks")

  def sources(self, split: str) -> list[Source]:
    if split not in self._opened:
      self._opened[split] = self._open(split)
    return self._opened[split]

  @property
  def skipped(self) -> int:
    """Malformed rows that were left out, over all splits."""
    return sum(source.skipped for sources in self._opened.values() for source in sources)

  def close(self) -> None:
    if hasattr(self.env, "close"):
      self.env.close()


def with_rows(env, sources, *, splits, on_bad_row: str = "error", check=None):
  """The environment as it is if it makes its own tasks, else with the rows of `sources`. ValueError
  where the two do not go together.
  """
  name = type(env).__name__
  if hasattr(env, "task_from_row"):
    if not sources:
      raise ValueError(
        f"config.data.sources is empty, and {name} makes no tasks of its own: name files or hub data sets"
      )
    return RowEnv(env, sources, splits=splits, on_bad_row=on_bad_row, check=check)
  if not hasattr(env, "task"):
    raise ValueError(
      f"config.env.name: {name} is no environment: it has neither task nor task_from_row (sdpo_jax/envs/base.py)"
    )
  if sources:
    raise ValueError(
      f"config.data.sources={sources!r}, but {name} makes its own tasks (it has no task_from_row)"
    )
  return env


def first_tasks(env, split: str, count: int) -> list[Task]:
  """`count` tasks for evaluation, always the same: the first of a generator; spread evenly over a
  fixed set, or all of a smaller one.
  """
  if not isinstance(env, RowEnv):
    return [env.task(split, i) for i in range(count)]
  size = env.size(split)
  count = min(count, size)
  return [env.task(split, i * size // count) for i in range(count)]


def check_sources(sources, splits: dict[str, str]) -> None:
  """Reads the first row of every source of the splits: a file or a library that is not there is an
  error now, not once a model has been loaded.

  splits: each with what asks for it, a setting or training.
  """
  for split, asked_by in splits.items():
    for location, _ in _locations(sources, split, f", which {asked_by} asks for"):
      next(read_rows(location, split), None)


def open_split(sources, split: str, task_from_row, on_bad_row: str) -> list[Source]:
  opened = [
    Source(location, weight, *_tasks(location, split, task_from_row, on_bad_row))
    for location, weight in _locations(sources, split)
  ]
  if len(opened) > 1:  # ids are unique within a source only
    opened = [
      s._replace(tasks=[dataclasses.replace(t, id=f"{i}/{t.id}") for t in s.tasks])
      for i, s in enumerate(opened)
    ]
  return opened


def _locations(sources, split: str, why: str = "") -> list[tuple[str, float]]:
  """(location, weight) of the sources that serve the split; ValueError if there is none."""
  found = []
  for text in sources:
    parts = _SOURCE.fullmatch(text.strip())
    if not parts:
      raise ValueError(
        f"config.data.sources: {text!r} is not of the form '[SPLIT=]LOCATION[ xWEIGHT]'"
      )
    location, weight = parts["location"], float(parts["weight"] or 1)
    if not parts["split"] and "{split}" not in location and not location.startswith("hub:"):
      raise ValueError(
        f"config.data.sources: {text!r} must say which split it serves: put {{split}} into the path or 'SPLIT=' before it"
      )
    if weight <= 0:
      raise ValueError(f"config.data.sources: the weight of {text!r} must be above 0")
    if parts["split"] in (None, split):
      found.append((location.replace("{split}", split), weight))
  if not found:
    raise ValueError(
      f"config.data.sources={tuple(sources)!r} has nothing for the split {split!r}{why}"
    )
  return found


def _tasks(location: str, split: str, task_from_row, on_bad_row: str) -> tuple[list[Task], int]:
  tasks, skipped, first = [], 0, ""
  for index, (where, row) in enumerate(read_rows(location, split)):
    try:
      if not isinstance(row, dict):
        raise ValueError(
          f"the row is not an object but {str(row)[:100]!r}"
          if row is not None
          else "the row is not JSON"
        )
      task = task_from_row({"idx": index} | row, split)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
      if on_bad_row == "skip":
        skipped, first = skipped + 1, first or f"{where}: {said}"
        continue
      raise ValueError(
        f"{where}: {said} (config.data.on_bad_row='skip' leaves such rows out)"
      ) from error
    if task is not None:
      tasks.append(task)
  if skipped:
    logging.warning("%d rows of %s are left out, the first of them %s", skipped, location, first)
  if not tasks:
    raise ValueError(
      f"{location} holds no usable row" + (f"; {skipped} are malformed" if skipped else "")
    )
  return tasks, skipped


def read_rows(location: str, split: str):
  """Yields (where it stands, row); the row is None for a line that is not JSON."""
  if location.startswith("hub:"):
    name, config, part = (location.removeprefix("hub:").split(":") + [None, None])[:3]
    if name.count("/") > 1:
      owner, repository, path = name.split("/", 2)
      download = _optional("huggingface_hub", location).hf_hub_download
      yield from read_rows(download(f"{owner}/{repository}", path, repo_type="dataset"), split)
      return
    rows = _optional("datasets", location).load_dataset(name, config or None, split=part or split)
    yield from ((f"{location}, row {i}", dict(row)) for i, row in enumerate(rows))
    return
  for path in sorted(glob.glob(location)) or [location]:
    if not path.endswith((".jsonl", ".parquet")):
      raise ValueError(
        f"config.data.sources: {path} is neither .jsonl nor .parquet, nor does it begin with hub:"
      )
    if not os.path.exists(path):
      raise FileNotFoundError(f"config.data.sources: {path}: no such file")
    if path.endswith(".jsonl"):
      with open(path, "rb") as lines:  # a line that is no UTF-8 is a malformed row as well
        for number, line in enumerate(lines, 1):
          if line.strip():
            yield f"{path}, line {number}", _json(line)
    else:
      table = _optional("pyarrow.parquet", path).ParquetFile(path)
      rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
      yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))


def _json(line: bytes):
  try:
    return json.loads(line)
  except (ValueError, RecursionError):
    return None


def _optional(module: str, source: str):
  """A module that the extra `hub` brings; ValueError that says how to get it."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
      f"config.data.sources: {source} needs {module.split('.')[0]}: pip install 'sdpo_jax[hub]'"
    ) from error


class TaskStream:
  """Endless stream of an environment's tasks. `state` is JSON-able; `restore` continues exactly."""

  def __init__(
    self, env, split: str, *, seed: int = 0, process_index: int = 0, process_count: int = 1
  ):
    if isinstance(env, RowEnv):
      sources = env.sources(split)
      order = [
        grain.MapDataset.source(s.tasks).shuffle(seed=zlib.crc32(f"{seed}/{i}".encode())).repeat()
        for i, s in enumerate(sources)
      ]
      dataset = grain.MapDataset.mix(order, [s.weight for s in sources])
      self._tasks = zlib.crc32(
        "\n".join(f"{s.weight} {t.id}" for s in sources for t in s.tasks).encode()
      )
    else:
      dataset = grain.MapDataset.range(2**31 - 1).map(lambda i: env.task(split, int(i)))
      self._tasks = None
    dataset = dataset[process_index::process_count]
    self._iterator = iter(
      dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )

  def take(self, n: int) -> list[Task]:
    return [next(self._iterator) for _ in range(n)]

  def state(self) -> dict:
    return {"position": self._iterator.get_state(), "tasks": self._tasks}

  def restore(self, state: dict) -> None:
    """ValueError if the checkpoint was written over other tasks: its position would mean nothing
    here.
    """
    if state["tasks"] != self._tasks:
      raise ValueError(
        "the data of config.data.sources is not what the checkpoint was written with: choose another --workdir, or the same data"
      )
    self._iterator.set_state(state["position"])
