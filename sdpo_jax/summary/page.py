"""Puts RESULTS.md together, a section for each folder of results/."""

import json
import pathlib

from sdpo_jax.summary.bases import bases
from sdpo_jax.summary.benchmarks import benchmarks
from sdpo_jax.summary.claims import claims
from sdpo_jax.summary.description import description
from sdpo_jax.summary.diagnoses import diagnoses
from sdpo_jax.summary.discovery import discover
from sdpo_jax.summary.finals import finals
from sdpo_jax.summary.grids import curves, trials
from sdpo_jax.summary.oracle import oracle

INTRODUCTION = """\
# Results

`python -m sdpo_jax.experiment --summary` writes this file from what is committed under `results/`
and `sdpo_jax/bench/results/`. Numbers in tables are computed from the JSON files there. Numbers
under "Notes" are not: they were taken from reports of runs whose data is not committed.
"""


def write(root: pathlib.Path) -> pathlib.Path:
  """Writes RESULTS.md of the repository at `root`; returns its path."""
  path = root / "RESULTS.md"
  path.write_text(text(root), encoding="utf-8")
  return path


def text(root: pathlib.Path) -> str:
  """Returns the contents of RESULTS.md."""
  results = root / "results"
  if not results.is_dir():
    raise FileNotFoundError(f"no folder {results}: run this at the top of the repository")
  folders = sorted(path for path in results.iterdir() if path.is_dir())
  sections = [_section(root, folder) for folder in folders]
  return "\n".join([INTRODUCTION, claims(root), *sections])


def _section(root: pathlib.Path, folder: pathlib.Path) -> str:
  """Returns the section of one experiment, in Markdown."""
  name = folder.name
  parts = [f"## {name}", *description(root, name)]
  if (folder / "curves.json").exists():
    parts += curves(json.loads((folder / "curves.json").read_text(encoding="utf-8")))
  if (folder / "scores.json").exists():
    parts += finals(json.loads((folder / "scores.json").read_text(encoding="utf-8")))
  if (folder / "tuning.json").exists():
    parts.append(trials(json.loads((folder / "tuning.json").read_text(encoding="utf-8"))))
  if (folder / "discover.json").exists():
    parts += discover(json.loads((folder / "discover.json").read_text(encoding="utf-8")))
  if any(folder.glob("base_*.json")):
    parts += bases(folder)
  if any(folder.glob("diagnosis_*.json")):
    parts += diagnoses(folder)
  if any(folder.glob("oracle_*.json")):
    parts += oracle(folder)
  if name == "bench":
    parts += benchmarks(root / "sdpo_jax" / "bench" / "results")
  parts += [f"![{path.stem}]({path.relative_to(root)})" for path in sorted(folder.glob("*.png"))]
  if (folder / "notes.md").exists():
    parts += ["### Notes", (folder / "notes.md").read_text(encoding="utf-8").strip()]
  return "\n\n".join(parts) + "\n"
