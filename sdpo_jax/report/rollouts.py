"""Reads rollout files: all of them, a sample spread over the run, or those that hold a text.

The files' field names (`prompt`, `tokens`, `teacher_gap`, ...) are written by rollout_log.py and
shared with it by string only: rename them in both files.

A long run has more rollouts than anybody reads. So a sample takes STEPS files of it at even
distances, and up to EACH_STEP lines of each; the other files are counted and not parsed.
"""

import json
import pathlib
from typing import NamedTuple

from sdpo_jax.report.files import json_lines, mapping, objects, raw_lines, sequence, spread

STEPS = 48  # files of each run
EACH_STEP = 16  # rollouts of each file
FOUND = 500  # rollouts of each run that hold a text that is looked for
READ_BYTES = 24_000_000  # of each run, as they stand in the files
# where a text is looked for, and where in each turn of an episode
SEARCHED = ("task_id", "prompt", "response", "feedback", "teacher_context", "reflection")
SEARCHED += ("counterfactual_contexts",)
OF_A_TURN = ("message", "observation", "teacher_context")


class Sample(NamedTuple):
  """Some of a run's rollouts, the oldest first."""

  rollouts: list[dict]
  recorded: int  # lines of all files
  skipped: int  # lines among those that were read which hold no rollout


def read_rollouts(workdir) -> list[dict]:
  """Returns all lines of a run's rollout files (`rollout_log.py`), the oldest first.

  Lines that cannot be read are left out.
  """
  return [line for path in files_of(workdir) for line in json_lines(path)[0]]


def files_of(workdir) -> list[pathlib.Path]:
  """Returns the rollout files of a work directory, the oldest first."""
  return sorted((pathlib.Path(workdir) / "rollouts").glob("step_*.jsonl"))


def sample(workdir, find: str = "") -> Sample:
  """Returns rollouts of a run.

  find: a text; the first FOUND rollouts that hold it are returned, whatever its case. Without one
  they are spread over the run, the first and the last rollout among them.
  """
  files = files_of(workdir)
  return _holding(files, find) if find else _spread_over(files)


def _spread_over(files: list[pathlib.Path]) -> Sample:
  chosen = spread(files, STEPS)
  read = set(chosen)
  rollouts, recorded, skipped = [], 0, 0
  for path in files:
    if path not in read:
      recorded += _count(path.read_bytes())
      continue
    lines = raw_lines(path)
    own, bad = objects(_within(lines, READ_BYTES // len(chosen)))
    recorded, skipped = recorded + len(lines), skipped + bad
    rollouts += own
  return Sample(rollouts, recorded, skipped)


def _within(lines: list[bytes], limit: int) -> list[bytes]:
  """Returns lines at even distances that take about `limit` bytes together, at least one.

  The first and the last line come before those between.
  """
  numbers = spread(list(range(len(lines))), EACH_STEP)
  taken: list[int] = []
  used = 0
  for i in dict.fromkeys([*numbers[:1], *numbers[-1:], *numbers]):
    if taken and used + len(lines[i]) > limit:
      continue
    taken.append(i)
    used += len(lines[i])
  return [lines[i] for i in sorted(taken)]


def _count(data: bytes) -> int:
  return data.count(b"\n") + (not data.endswith(b"\n") and bool(data))


def _holding(files: list[pathlib.Path], find: str) -> Sample:
  """Of a text in ASCII only lines that hold it as JSON writes it are parsed."""
  # bytes know no case of other letters, which JSON may write in two ways
  needle = json.dumps(find)[1:-1].lower().encode() if find.isascii() else b""
  rollouts: list[dict] = []
  recorded = skipped = 0
  for path in files:
    lines = raw_lines(path)
    recorded += len(lines)
    if len(rollouts) >= FOUND:
      continue
    candidates = [line for line in lines if needle in line.lower()]
    read, bad = objects(candidates)
    skipped += bad
    rollouts += [rollout for rollout in read if find.lower() in _text_of(rollout)]
  return Sample(rollouts[:FOUND], recorded, skipped)


def _text_of(rollout: dict) -> str:
  texts = [rollout.get(name) for name in SEARCHED]
  for turn in sequence(rollout.get("turns")):
    texts += [mapping(turn).get(name) for name in OF_A_TURN]
  parts = [part for text in texts for part in (text if isinstance(text, list) else [text])]
  return "\n".join(str(part or "") for part in parts).lower()
