"""Makes the table of what a model solves before anything is trained (base_TASK.json)."""

import json
import pathlib

from sdpo_jax.summary import markdown as md

LEGEND = """\
What the model solves as it is, by `--mode=eval`, in per cent with 95 % intervals over questions;
tokens of a mean response, the share of responses that were cut off, and of those without a final
answer in the form asked for, where there is one. The interval of a share of 0 has no width: none of
100 questions allows up to 3.6 % (Clopper-Pearson)."""


def bases(folder: pathlib.Path) -> list[str]:
  """Returns the table with its legend; a row for each split of each file."""
  rows = []
  for path in sorted(folder.glob("base_*.json")):
    figures = json.loads(path.read_text(encoding="utf-8"))
    for key in figures:
      if key.endswith("/avg@k"):
        split = key.removesuffix("/avg@k")
        rows.append(_row(split, figures, figures["suites"][_suite(split)]))
  head = ["split", "questions", "attempts at each", "avg@n", "pass@n", "tokens", "cut off"]
  return [LEGEND, md.table([*head, "without an answer"], rows)]


def _suite(split: str) -> str:
  """Returns the name of a split's suite: eval/SUITE.SPLIT."""
  return split.removeprefix("eval/").partition(".")[0]


def _row(split: str, figures: dict, suite: dict) -> list[str]:
  n, questions = suite["samples"], figures[f"{split}/questions"]
  unformed = figures.get(f"{split}/format_failed")
  return [
    f"`{split.removeprefix('eval/')}`",
    f"{questions:.0f}",
    str(n),
    *(md.score(*_interval(figures, f"{split}/{name}")) for name in ("avg@k", f"pass@{n}")),
    f"{figures[f'{split}/length_mean']:.0f}",
    md.percent(figures[f"{split}/cut_off"]),
    md.NONE if unformed is None else md.percent(unformed / (questions * n)),
  ]


def _interval(figures: dict, key: str) -> tuple[float, float, float]:
  """Returns a figure and the ends of its interval."""
  return figures[key], figures[f"{key}_low"], figures[f"{key}_high"]
