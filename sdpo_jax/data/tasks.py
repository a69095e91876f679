"""Reads tasks from files, the hub or a generator, and streams them: which question comes next.

A source is a text "[SPLIT=]LOCATION[ xWEIGHT]". LOCATION is one of

  PATH                      .jsonl or .parquet; it may be a pattern (`tests-*.parquet`), and
                            "{split}" in it stands for the split
  hub:NAME[:CONFIG[:SPLIT]] a data set of the Hugging Face hub
  hub:OWNER/NAME/FILE       one .jsonl or .parquet of a data set's repository

A path without "{split}" must name the split it serves. A data set of the hub serves every split
unless SPLIT= names one. Examples:

  "sciknoweval/chemistry.{split}.jsonl"    "train=gsm8k.jsonl x2"
  "hub:openai/gsm8k:main"                  "test=hub:Idavidrein/gpqa:gpqa_diamond:train"

Rows become tasks by the environment's `task_from_row`, all at once when the source is opened, and
stay in memory. A malformed row is an error there, with file, line and field, before anything is
trained; or it is skipped and counted. So is a question that is too long for the run. A row for
which `task_from_row` returns None (outside a window of dates) is not part of the set. A column
`hint` goes into `Task.data` of any environment.

The stream is grain's. It draws from the sources of a split by weight (equal by default), each
shuffled anew in each pass, and deals the questions to the processes in turn. Its position is
grain's own iterator state, saved with the checkpoint; it continues only over the same tasks.
"""

import dataclasses
import glob
import importlib
import json
import logging
import os
import re
from typing import Callable, Iterator, NamedTuple
import zlib

import grain

from sdpo_jax.data.fingerprint import RowDigest, fingerprint
from sdpo_jax.errors import SettingError, local_path, unknown
from sdpo_jax.records import Task

_SOURCE = re.compile(r"(?:(?P<split>\w+)=)?(?P<location>.+?)(?:\s+x(?P<weight>\d+(?:\.\d+)?))?")


class Source(NamedTuple):
  """The tasks of one source in one split."""

  location: str
  weight: float
  tasks: list[Task]
  skipped: int  # rows left out as malformed
  digest: RowDigest  # of its rows and of its tasks, before their ids are numbered by source


class RowEnv:
  """An environment together with its rows.

  It judges like the environment, and has its `behaviour` and `answer` if there are any. Besides,
  it has `task(split, index)` and `size(split)`.
  """

  def __init__(self, env, sources, *, splits, on_bad_row: str = "error", check=None):
    """Opens the sources of the given splits; others are opened when they are asked for.

    check(task): raises ValueError for a task that the run cannot use.
    Raises ValueError for a source or a row that cannot be used, FileNotFoundError for a file.
    """
    if on_bad_row not in ("error", "skip"):
      raise ValueError(unknown("config.data.on_bad_row", on_bad_row, ["error", "skip"]))
    self.env = env
    for name in ("prompt", "judge", "start", "remember", "at_once", "behaviour", "answer"):
      if hasattr(env, name):
        setattr(self, name, getattr(env, name))
    self._source_texts = sources
    self._on_bad_row = on_bad_row
    self._check = check
    self._opened = {split: self._open(split) for split in dict.fromkeys(splits)}

  def _open(self, split: str) -> list[Source]:
    return open_split(self._source_texts, split, self._task_from_row, self._on_bad_row)

  def _task_from_row(self, row: dict, split: str) -> Task | None:
    task = self.env.task_from_row(row, split)
    if task is not None:
      if row.get("hint"):  # of whatever environment; a teacher may read it
        task = dataclasses.replace(task, data={"hint": row["hint"]} | task.data)
      _check_texts(task)
      if self._check is not None:
        self._check(task)
    return task

  def size(self, split: str) -> int:
    """Returns the number of tasks in the split."""
    return sum(len(source.tasks) for source in self.sources(split))

  def task(self, split: str, index: int) -> Task:
    """Returns the index-th task of the split, in the order of sources and rows."""
    rest = index
    for source in self.sources(split):
      if rest < len(source.tasks):
        return source.tasks[rest]
      rest -= len(source.tasks)
    raise IndexError(f"split {split!r} has {self.size(split)} tasks")

  def sources(self, split: str) -> list[Source]:
    """Returns the sources of the split, and opens them the first time."""
    if split not in self._opened:
      self._opened[split] = self._open(split)
    return self._opened[split]

  def fingerprint(self, split: str) -> dict:
    """Returns what tells the rows of the split from others; see data/fingerprint.py."""
    return fingerprint([source.digest for source in self.sources(split)])

  @property
  def skipped(self) -> int:
    """The malformed rows that were left out, over all splits."""
    return sum(source.skipped for sources in self._opened.values() for source in sources)

  def close(self) -> None:
    if hasattr(self.env, "close"):
      self.env.close()


def with_rows(env, sources, *, splits, on_bad_row: str = "error", check=None):
  """Returns the environment itself if it makes its own tasks, else a RowEnv over `sources`.

  Raises ValueError where environment and sources do not go together.
  """
  name = type(getattr(env, "env", env)).__name__
  if hasattr(env, "task_from_row"):
    if not sources:
      raise ValueError(
        f"config.data.sources is empty, and {name} makes no tasks of its own: "
        "name files or hub data sets"
      )
    return RowEnv(env, sources, splits=splits, on_bad_row=on_bad_row, check=check)
  if not hasattr(env, "task"):
    raise ValueError(
      f"config.env.name: {name} is no environment: "
      "it has neither task nor task_from_row (sdpo_jax/envs/base.py)"
    )
  if sources:
    raise ValueError(
      f"config.data.sources={sources!r}, but {name} makes its own tasks (it has no task_from_row)"
    )
  return env


def first_tasks(env, split: str, count: int) -> list[Task]:
  """Returns `count` tasks for evaluation, always the same ones.

  Those of a generator are its first. Those of a fixed set are spread evenly over it; a set that is
  smaller is taken whole.
  """
  if not isinstance(env, RowEnv):
    return [env.task(split, i) for i in range(count)]
  size = env.size(split)
  count = min(count, size)
  return [env.task(split, i * size // count) for i in range(count)]


def check_sources(sources, splits: dict[str, str]) -> None:
  """Reads the first row of every source of the splits, before a model has been loaded.

  A file or a library that is missing is an error here.
  splits: {split: what asks for it, which is a setting or training}.
  """
  for split, asked_by in splits.items():
    for location, _ in _locations(sources, split, f", which {asked_by} asks for"):
      next(read_rows(location, split), None)


def open_split(sources, split: str, task_from_row: Callable, on_bad_row: str) -> list[Source]:
  """Reads all tasks of a split. Their ids are unique in the split."""
  opened = [
    Source(location, weight, *_tasks(location, split, task_from_row, on_bad_row))
    for location, weight in _locations(sources, split)
  ]
  if len(opened) == 1:
    return opened
  # Ids are unique within a source only, so each gets the number of its source in front.
  return [
    source._replace(tasks=[dataclasses.replace(task, id=f"{i}/{task.id}") for task in source.tasks])
    for i, source in enumerate(opened)
  ]


def _locations(sources, split: str, reason: str = "") -> list[tuple[str, float]]:
  """Returns (location, weight) of the sources that serve the split.

  Raises ValueError for a malformed source, and if there is none for the split.
  reason: why the split is read, for that message.
  """
  locations = []
  for text in sources:
    match = _SOURCE.fullmatch(text.strip())
    if not match:
      raise ValueError(
        f"config.data.sources: {text!r} is not of the form '[SPLIT=]LOCATION[ xWEIGHT]'"
      )
    location, weight = match["location"], float(match["weight"] or 1)
    serves_any_split = "{split}" in location or location.startswith("hub:")
    if not match["split"] and not serves_any_split:
      raise ValueError(
        f"config.data.sources: {text!r} must say which split it serves: "
        "put {split} into the path or 'SPLIT=' before it"
      )
    if weight <= 0:
      raise ValueError(f"config.data.sources: the weight of {text!r} must be above 0")
    if match["split"] in (None, split):
      locations.append((location.replace("{split}", split), weight))
  if not locations:
    raise ValueError(
      f"config.data.sources={tuple(sources)!r} has nothing for the split {split!r}{reason}"
    )
  return locations


def _tasks(
  location: str, split: str, task_from_row: Callable, on_bad_row: str
) -> tuple[list[Task], int, RowDigest]:
  """Returns the tasks of one source, how many of its rows were malformed, and their digest."""
  tasks, skipped, first_error, digest = [], 0, "", RowDigest()
  for index, (place, row) in enumerate(read_rows(location, split)):
    digest.add_row(row)
    try:
      task = task_from_row({"idx": index} | _checked(row), split)
    except SettingError:  # the same for every row
      raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
      message = f"{place}: {kind}{error}"
      if on_bad_row != "skip":
        raise ValueError(
          f"{message} (config.data.on_bad_row='skip' leaves such rows out)"
        ) from error
      skipped += 1
      first_error = first_error or message
      continue
    if task is not None:
      tasks.append(task)
      digest.add_task(task)
  if skipped:
    logging.warning(
      "%d rows of %s are left out, the first of them %s", skipped, location, first_error
    )
  if not tasks:
    malformed = f"; {skipped} are malformed" if skipped else ""
    raise ValueError(f"{location} holds no usable row{malformed}")
  return tasks, skipped, digest


def _check_texts(task: Task) -> None:
  """Raises ValueError for a task without a question, or with what no tokenizer can read."""
  texts = {name: getattr(task, name) for name in ("prompt", "system", "solution")}
  texts["hint"] = task.data.get("hint")
  for name, text in texts.items():
    if text is None and name != "prompt":
      continue
    if not isinstance(text, str):
      raise ValueError(f"the {name} is of type {type(text).__name__}: {str(text)[:100]!r}")
    if name == "prompt" and not text.strip():
      raise ValueError("the prompt is empty")
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(f"the {name} holds half of a surrogate pair: {error}") from error


def _checked(row) -> dict:
  """Returns the row; ValueError unless it is an object."""
  if row is None:
    raise ValueError("the row is not JSON")
  if not isinstance(row, dict):
    raise ValueError(f"the row is not an object but {str(row)[:100]!r}")
  return row


def read_rows(location: str, split: str) -> Iterator[tuple[str, dict | None]]:
  """Yields (place, row) for each row of a source.

  The place names file and line, for messages. The row is None for a line that is not JSON.
  """
  if location.startswith("hub:"):
    yield from _read_hub(location, split)
    return
  location = local_path(location)
  for path in sorted(glob.glob(location)) or [location]:
    if not path.endswith((".jsonl", ".parquet")):
      raise ValueError(
        f"config.data.sources: {path} is neither .jsonl nor .parquet, nor does it begin with hub:"
      )
    if not os.path.exists(path):
      raise FileNotFoundError(f"config.data.sources: {path}: no such file")
    if path.endswith(".jsonl"):
      yield from _read_jsonl(path)
    else:
      yield from _read_parquet(path)


def _read_hub(location: str, split: str) -> Iterator[tuple[str, dict | None]]:
  name, config, hub_split = (location.removeprefix("hub:").split(":") + [None, None])[:3]
  if name.count("/") > 1:  # one file of a repository
    owner, repository, path = name.split("/", 2)
    download = _optional("huggingface_hub", location).hf_hub_download
    yield from read_rows(download(f"{owner}/{repository}", path, repo_type="dataset"), split)
    return
  load_dataset = _optional("datasets", location).load_dataset
  for i, row in enumerate(load_dataset(name, config or None, split=hub_split or split)):
    yield f"{location}, row {i}", dict(row)


def _read_jsonl(path: str) -> Iterator[tuple[str, dict | None]]:
  # Read as bytes: a line that is no UTF-8 is a malformed row as well.
  with open(path, "rb") as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        yield f"{path}, line {number}", _json(line)


def _json(line: bytes):
  try:
    return json.loads(line)
  except (ValueError, RecursionError):
    return None


def _read_parquet(path: str) -> Iterator[tuple[str, dict]]:
  table = _optional("pyarrow.parquet", path).ParquetFile(path)
  rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
  for i, row in enumerate(rows):
    yield f"{path}, row {i}", row


def _optional(module: str, source: str):
  """Imports a module that the extra `hub` brings; ValueError that names the extra."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
      f"config.data.sources: {source} needs {module.split('.')[0]}: pip install 'sdpo_jax[hub]'"
    ) from error


class TaskStream:
  """Endless stream of an environment's tasks.

  Its state is JSON-able, and `restore` continues exactly where it was taken. With several
  processes, each gets every process_count-th task.
  """

  def __init__(
    self,
    env,
    split: str,
    *,
    questions: int = 0,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Begins a stream.

    questions: of a generator, so many first tasks come again and again, shuffled anew in each pass;
      0: each comes once, in its order. Rows are shuffled so in any case.
    """
    if isinstance(env, RowEnv):
      sources = env.sources(split)
      dataset = _mixed(sources, seed)
      self._tasks = _checksum(sources)
    else:
      numbers = grain.MapDataset.range(questions or 2**31 - 1)
      if questions:
        numbers = numbers.shuffle(seed=seed).repeat()
      dataset = numbers.map(lambda i: env.task(split, int(i)))
      self._tasks = None
    dataset = dataset[process_index::process_count]
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    self._iterator = iter(dataset.to_iter_dataset(options))

  def take(self, n: int) -> list[Task]:
    """Returns the next n tasks."""
    return [next(self._iterator) for _ in range(n)]

  def state(self) -> dict:
    """Returns the position, with a checksum of the tasks that it is a position in."""
    return {"position": self._iterator.get_state(), "tasks": self._tasks}

  def restore(self, state: dict) -> None:
    """Goes to a position that `state` returned.

    ValueError if it was taken over other tasks, among which it would mean nothing.
    """
    if state["tasks"] != self._tasks:
      raise ValueError(
        "the data of config.data.sources is not what the checkpoint was written with: "
        "choose another --workdir, or the same data"
      )
    self._iterator.set_state(state["position"])


def _mixed(sources: list[Source], seed: int):
  """Mixes the sources by weight, each shuffled anew in each pass; a grain dataset without end."""
  shuffled = []
  for i, source in enumerate(sources):
    source_seed = zlib.crc32(f"{seed}/{i}".encode())
    shuffled.append(grain.MapDataset.source(source.tasks).shuffle(seed=source_seed).repeat())
  return grain.MapDataset.mix(shuffled, [source.weight for source in sources])


def _checksum(sources: list[Source]) -> int:
  """Returns a checksum of the weights and the tasks' ids, in their order."""
  lines = [f"{source.weight} {task.id}" for source in sources for task in source.tasks]
  return zlib.crc32("\n".join(lines).encode())
