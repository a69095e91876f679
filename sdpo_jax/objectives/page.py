"""The page of methods: `python -m sdpo_jax.objectives.methods` prints it, and the README shows it.

What a row changes, and what it needs, is read off the rows. Where a row comes from, and how
faithful it is, stands beside it in `methods.ABOUT`. With `--short` the command prints a line for
each method instead, by family (`families.py`).
"""

import argparse
from typing import Iterator

from sdpo_jax.objectives.build import AXES, build_method, complete_part, method_row, reads_turns
from sdpo_jax.objectives.families import FAMILIES
from sdpo_jax.objectives.methods import ABOUT, METHODS

# A row is told by what it changes against one of these, whichever is nearest; they themselves
# against those before them.
BASES = ("sdpo", "grpo", "sdar", "craft")
HEADER = "| method | changes | needs | arXiv | decided here |\n|---|---|---|---|---|\n"
FOOTER = (
  "\nA row without an entry in the last column is exact to its paper. None has been measured at "
  "scale by\nthis project; RESULTS.md has what was measured on TinyCode.\n"
)


def page() -> str:
  """Returns the table of all methods in Markdown."""
  return HEADER + "".join(_line(name) for name in METHODS) + FOOTER


def short_page() -> str:
  """Returns the methods by family, a line each, in Markdown."""
  return "\n".join(
    f"**{family}**\n\n"
    + "".join(f"- `{name}`: {text} ({_paper(name)})\n" for name, text in rows.items())
    for family, rows in FAMILIES.items()
  )


def _paper(name: str) -> str:
  """Returns the number of a method's paper, with a link, or that it is this project's."""
  number = ABOUT[name].source.split(",")[0].split()[0]
  return ABOUT[name].source if number == "of" else f"[{number}](https://arxiv.org/abs/{number})"


def changes(name: str) -> tuple[str, list[str]]:
  """Returns (base, what the row changes against it), one text for each axis."""
  if name == BASES[0]:
    return name, []
  bases = BASES[: BASES.index(name)] if name in BASES else BASES
  found = [(base, list(_differences(METHODS[base], METHODS[name]))) for base in bases]
  return min(found, key=lambda pair: len(pair[1]))


def needs(name: str) -> list[str]:
  """Returns what the row asks for beyond the responses, their rewards and feedback."""
  row = method_row(name)
  method = build_method(row)
  found = []
  if method.teacher_weights.keep:
    found.append("weights of a teacher")
  if method.reference_kl is not None:
    found.append("the first weights")
  if method.contrast is not None:
    found.append("groups of 2 or more")
  further = getattr(method.teacher_context, "further_count", 0)
  if method.notes is not None:
    further = method.notes.further_count
    found.append("more responses")
  if further:
    found.append(f"{further} more {'reading' if further == 1 else 'readings'}")
  if method.memory is not None:
    found.append("questions that come back")
  if reads_turns(row):
    found.append("episodes")
  if method.hint_tokens:
    found.append("hints of the policy's own")
  if getattr(method.teacher_context, "needs_solution", False):
    found.append("reference solutions")
  if getattr(method.teacher_context, "reads_hints", False):
    found.append("hints, else reference solutions")
  return found


def _differences(base: dict, row: dict) -> Iterator[str]:
  for axis in AXES:
    if complete_part(axis, **row[axis]) != complete_part(axis, **base[axis]):
      yield f"{axis} {_part(axis, row[axis], base[axis])}"
  if row["policy_share"] != base["policy_share"]:
    share = row["policy_share"]
    yield f"policy_share {share if isinstance(share, str) else format(share, '.3g')}"


def _part(axis: str, part: dict, base: dict) -> str:
  """Writes a part with the settings that are not its own defaults, nor the base's."""
  own = complete_part(axis, part["name"])
  if part["name"] == base["name"]:
    own = complete_part(axis, **base)
  complete = complete_part(axis, **part)
  settings = [_setting(k, complete[k]) for k in complete if complete[k] != own[k]]
  return f"`{part['name']}`" + (f" ({', '.join(settings)})" if settings else "")


def _setting(key: str, value) -> str:
  """Writes a setting; of one that is a text for the teacher, its name alone."""
  is_text = isinstance(value, str) and " " in value or isinstance(value, tuple)
  return key if is_text else f"{key}={value}"


def _line(name: str) -> str:
  about = ABOUT[name]
  base, differences = changes(name)
  told = "; ".join(differences) if differences else "–"
  if differences and base != BASES[0]:
    told = f"against `{base}`: {told}"
  cells = [f"`{name}`", told, ", ".join(needs(name)) or "–", about.source, about.decided or "–"]
  return "| " + " | ".join(cells) + " |\n"


def print_page(argv: list[str]) -> None:
  """Prints the table, or the short list that is asked for."""
  parser = argparse.ArgumentParser(
    prog="python -m sdpo_jax.objectives.methods", description="Prints every method."
  )
  parser.add_argument("--short", action="store_true", help="a line each, by family")
  print(short_page() if parser.parse_args(argv).short else page(), end="")
