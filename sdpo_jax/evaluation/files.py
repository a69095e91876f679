"""Keeps the files of an evaluation, from which it goes on and its figures are computed again.

Files of WORKDIR/eval/NAME, where NAME is that of the checkpoint:

  SUITE.SPLIT.greedy.jsonl, SUITE.SPLIT.sampled.jsonl
                 one line a question (`scores.py`), appended as questions are done
  settings.json  what the lines depend on, {kind: {name: value}}: `suites` the settings of each,
                 `weights` a checksum of each array, `tasks` a digest of the questions of each split

Lines made under other settings are never joined: the checks refuse them. A suite, a split or the
greedy part may be added to an evaluation that was begun without it.

Process 0 alone reads and writes them; all processes have to call the same methods.
"""

import json
import os
import pathlib
from typing import Any, Iterable

from sdpo_jax import hosts
from sdpo_jax.config import defaults_of
from sdpo_jax.data.fingerprint import RowDigest
from sdpo_jax.evaluation.scores import summarise
from sdpo_jax.evaluation.suites import Part, Suite
from sdpo_jax.records import Task
from sdpo_jax.workdir import read_lines, write_atomically

# The settings that decide what a line holds, besides the environment's. Rows that are decoded
# together, and for how long, are among them: the shapes decide how sums are rounded.
_SETTINGS = {
  "model": ("dtype", "param_dtype", "thinking", "lora"),
  "data": ("sources", "on_bad_row", "max_prompt_tokens"),
  "rollout": ("max_new_tokens", "rows", "chunk"),
  "eval": ("questions", "samples", "temperature", "top_p", "keep_texts", "base_logp"),
}
# Where a judge is and how often it is asked, not who it is.
_ADDRESS = ("url", "key_variable", "timeout_s", "retries")


class EvalFiles:
  """The files of one evaluation."""

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self._settings = directory / "settings.json"
    # kind -> name -> value: of this start; written with the first line that depends on it
    self._now: dict[str, dict[str, Any]] = {}

  def check_settings(self, suite: Suite) -> None:
    """Raises ValueError if lines of the suite were made under other settings."""
    now, defaults = _settings_of(suite.c.to_dict()), _settings_of(defaults_of(suite.c))
    difference = self._first_difference("suites", suite.name, now, defaults)
    if difference:
      key, before = difference
      of_suite = f" of suite {suite.name!r}" if suite.name else ""
      raise ValueError(
        f"{key}={now.get(key)!r}{of_suite}, but {self.directory} was begun with {before!r}: "
        "choose another --workdir, or the same settings"
      )

  def check_weights(self, checksums: dict[str, int]) -> None:
    """Raises ValueError if lines were made with other weights. checksums: by array."""
    if self._first_difference("weights", "checksums", checksums):
      raise ValueError(
        f"the weights are not those that {self.directory} was begun with: choose another --workdir"
      )

  def check_tasks(self, part: Part, tasks: list[Task]) -> None:
    """Raises ValueError if lines of the part's split were made from other questions."""
    digest = RowDigest()
    for task in tasks:
      digest.add_task(task)
    if self._first_difference("tasks", part.name, {"sha256": digest.tasks_sha256}):
      raise ValueError(
        f"the questions of {part.name} are not those that {self.directory} was begun with: restore "
        "them, or choose another --workdir"
      )

  def _first_difference(
    self, kind: str, name: str, now: dict, defaults: dict | None = None
  ) -> tuple[str, Any] | None:
    """Returns (key, value before) of the first value that settings.json has otherwise, if any.

    defaults: the values of keys that are younger than the file.
    """
    self._now.setdefault(kind, {})[name] = now
    difference = None
    if hosts.leads():
      before = (defaults or {}) | self._stored().get(kind, {}).get(name, now)
      different = (key for key in now | before if now.get(key) != before.get(key))
      difference = next(((key, before.get(key)) for key in different), None)
    return hosts.share(difference)[0]

  def _stored(self) -> dict:
    return json.loads(self._settings.read_text()) if self._settings.exists() else {}

  def places_done(self, part: Part) -> set[int]:
    """Returns the questions of a part that have a line."""
    places = [line["question"] for line in self.lines(part)] if hosts.leads() else []
    return set(hosts.share(places)[0])

  def lines(self, part: Part) -> list[dict]:
    """Returns the lines of a part."""
    return read_lines(self.directory / part.file)

  def append(self, part: Part, lines: list[dict]) -> None:
    """Adds lines to a part; when it returns they are on the disk."""
    if not hosts.leads():
      return
    self._write_settings(part)
    with (self.directory / part.file).open("a", encoding="utf-8") as file:
      file.write("".join(json.dumps(line) + "\n" for line in lines))
      file.flush()
      os.fsync(file.fileno())

  def _write_settings(self, part: Part) -> None:
    """Adds to settings.json what the lines of a part depend on."""
    stored = self._stored()
    names = {"suites": part.suite, "weights": "checksums", "tasks": part.name}
    added = {
      kind: stored.get(kind, {}) | {name: self._now[kind][name]} for kind, name in names.items()
    }
    if added != stored:
      self.directory.mkdir(parents=True, exist_ok=True)
      write_atomically(self._settings, json.dumps(added, indent=2) + "\n")

  def metrics(self, parts: Iterable[Part]) -> dict[str, float]:
    """Computes every figure of the parts from their lines; every process has them then."""
    metrics = {}
    for part in parts if hosts.leads() else ():
      metrics |= summarise(part.metric, self.lines(part), has_entropy=part.has_entropy)
    return hosts.share(metrics)[0]


def _settings_of(settings: dict) -> dict:
  """Returns {"config.section.key": value} of what decides what a line holds, as JSON has it."""
  env = {key: value for key, value in settings["env"].items() if key not in _ADDRESS}
  kept = {f"config.env.{key}": value for key, value in env.items()}
  for section, keys in _SETTINGS.items():
    kept |= {f"config.{section}.{key}": settings[section][key] for key in keys}
  return json.loads(json.dumps(kept, default=repr))
