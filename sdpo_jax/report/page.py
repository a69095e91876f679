"""Assembles the page of a report: reads the runs, draws their pictures, fills in the template.

The page is one file. It asks the network for nothing, and its content policy forbids it: pictures
are inside, and the one script that a browser may run there is named by its digest.
"""

import pathlib

from sdpo_jax.report.answers import answers
from sdpo_jax.report.cards import legend, rollout_data, short_card
from sdpo_jax.report.comparison import comparison, results
from sdpo_jax.report.curves import SPEED, curves, picture, title_and_unit, unchanged
from sdpo_jax.report.diagnosis import diagnosis
from sdpo_jax.report.files import spread
from sdpo_jax.report.forest import differences, gains
from sdpo_jax.report.runs import Run, read_runs
from sdpo_jax.report.system import settings, system
from sdpo_jax.report.templates import script, template

WITHOUT_SCRIPT = 4  # cards of each run for a browser that runs no script


def write_report(
  workdirs, out, tuned: dict[pathlib.Path, str] | None = None, find: str = ""
) -> pathlib.Path:
  """Writes the page and its pictures into the directory `out`; returns the path of the page.

  tuned: {work directory: how the settings of its run were chosen}, where that is known.
  find: a text; the page then carries the rollouts that hold it, not a sample of all.
  Raises FileNotFoundError for a work directory that there is not, and where none is named.
  """
  out = pathlib.Path(out)
  runs = read_runs(workdirs, find)
  if not runs:
    raise FileNotFoundError("no work directory is named: there is nothing to report")
  for run in runs:
    run.tuned = (tuned or {}).get(run.workdir, "")
  out.mkdir(parents=True, exist_ok=True)
  found = [diagnosis(run, out) for run in runs]
  text, digest = script("rollouts.js")
  page = template("report.html").render(
    title=_title(runs),
    results=results(runs),
    tasks=_tasks(runs, out),
    diagnoses=[one for one in found if one is not None],
    answers=[answers(run) for run in runs],
    rollouts=_rollouts(runs, find),
    legend=legend(),
    systems=[system(run) for run in runs],
    speed=_speed(runs, out),
    settings=[settings(run) for run in runs],
    script=text,
    digest=digest,
  )
  path = out / "index.html"
  # a lone surrogate in a response must not cost the page
  path.write_bytes(page.encode("utf-8", "replace"))
  return path


def _title(runs: list[Run]) -> str:
  tasks = dict.fromkeys(str(run.setting("env.name")) for run in runs if run.setting("env.name"))
  methods = dict.fromkeys(str(run.setting("method.name", run.workdir.name)) for run in runs)
  return ", ".join(methods) + (f" on {', '.join(tasks)}" if tasks else "")


def _tasks(runs: list[Run], out: pathlib.Path) -> list[dict]:
  """Returns comparison and curves of each task; writes the pictures into `out`."""
  members: dict[str, list[Run]] = {}
  for run in runs:
    members.setdefault(str(run.setting("env.name", "")), []).append(run)
  return [
    {
      "name": task,
      "comparison": comparison(own),
      "gains": gains(own),
      "differences": differences(own),
      "curves": curves(own, out, f"{task}_" if len(members) > 1 else ""),
      "unchanged": [(title_and_unit(name)[0], f"{x:g}") for name, x in unchanged(own).items()],
    }
    for task, own in members.items()
  ]


def _rollouts(runs: list[Run], find: str) -> dict:
  """Returns the cards of all runs as JSON, and for each run how many of how many these are."""
  data, shown = rollout_data(runs)
  return {
    "data": data,
    "find": find,
    "shown": sum(shown),
    "recorded": sum(run.recorded for run in runs),
    "runs": [
      {
        "label": run.label,
        "seed": run.seed,
        "workdir": run.workdir,
        "shown": count,
        "recorded": run.recorded,
        "cards": [short_card(rollout) for rollout in spread(run.rollouts, WITHOUT_SCRIPT)],
      }
      for run, count in zip(runs, shown, strict=True)
    ],
  }


def _speed(runs: list[Run], out: pathlib.Path) -> list[dict]:
  """Returns the pictures of what depends on the machine, by step."""
  names = [name for name in SPEED if any(run.series(name) for run in runs)]
  return [picture(runs, name, "step", out) for name in names]
