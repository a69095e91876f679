"""Reads what --mode=diagnose said of a run's configuration, where it was asked in its directory.

The figures are those of diagnose/index.json (sdpo_jax/diagnose/measures.py), shared by name only.
"""

import os
import pathlib
import urllib.parse

from sdpo_jax.report.comparison import points, score
from sdpo_jax.report.files import is_number, mapping, sequence
from sdpo_jax.report.runs import Run, flattened

CONTROL = "control"  # the question alone, against which prompts are compared


def diagnosis(run: Run, out: pathlib.Path) -> dict | None:
  """Returns verdict and main figures, with a link from `out` to their page; None for none."""
  said = run.diagnosis.get("verdict")
  if not isinstance(said, dict) or not said.get("outlook"):
    return None
  page = run.workdir / "diagnose" / "index.html"
  return {
    "label": run.label,
    "seed": run.seed,
    "method": said.get("method", ""),
    "outlook": said["outlook"],
    "reasons": _texts(said.get("reasons")),
    "advice": _texts(said.get("advice")),
    "order": _order(said.get("ranking")),
    "figures": _figures(run.diagnosis),
    "prompts": _prompts(run.diagnosis),
    "link": _link(page, out) if page.exists() else None,
  }


def _texts(lines) -> list[str]:
  found = [line.get("text") for line in sequence(lines) if isinstance(line, dict)]
  return [text for text in found if text]


def _order(ranking) -> str:
  return " > ".join(
    " = ".join(map(str, tied)) for tied in sequence(ranking) if isinstance(tied, list)
  )


def _figures(found: dict) -> list[tuple[str, str]]:
  """Returns (what, value) of the policy's own responses and of where the teacher disagrees."""
  flat = flattened(found)
  rows = []
  for what, name in (("the policy's reward", "reward"), ("groups with unequal rewards", "mixed")):
    of_policy = mapping(found.get("policy")).get(name)
    if _is_interval(of_policy):
      rows.append((what, _percent(of_policy)))
  gap, differs = flat.get("tokens.gap"), flat.get("tokens.top_differs")
  if is_number(gap) and is_number(differs):
    text = f"{gap:.2g} nats a token apart, another likeliest token at {differs:.0%}"
    rows.append(("teacher and policy", text))
  responses, questions = flat.get("policy.responses"), flat.get("policy.questions")
  if is_number(responses) and is_number(questions):
    rows.append(("sampled", f"{responses:,} responses to {questions:,} questions"))
  return rows


def _prompts(found: dict) -> list[dict]:
  """Returns what each prompt is worth: of failed attempts that were made again under it."""
  failed = mapping(mapping(found.get("again")).get("failed"))
  about = mapping(found.get("about"))
  return [
    {
      "name": about.get(name, name),
      "reward": score(*_interval(figures["reward"])),
      "against": None if name == CONTROL else points(*_interval(figures["difference"])),
    }
    for name, figures in failed.items()
    if all(_is_interval(mapping(figures).get(what)) for what in ("reward", "difference"))
  ]


def _is_interval(found) -> bool:
  """Tells whether a mean is there, and its ends are numbers or None."""
  mean, *ends = (mapping(found).get(name) for name in ("mean", "low", "high"))
  return is_number(mean) and all(end is None or is_number(end) for end in ends)


def _interval(found: dict) -> tuple:
  return found["mean"], found.get("low"), found.get("high")


def _percent(found: dict) -> str:
  mean, interval = score(*_interval(found))
  return f"{mean} {interval}".strip()


def _link(page: pathlib.Path, out: pathlib.Path) -> str:
  path = pathlib.Path(os.path.relpath(page.resolve(), out.resolve())).as_posix()
  return urllib.parse.quote(path)
