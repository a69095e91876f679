"""Makes the tables of how often the right next token is expected (oracle_*.json)."""

import json
import pathlib

from sdpo_jax.diagnose.prompts import ABOUT
from sdpo_jax.summary import markdown as md

ORACLE_LEGEND = """\
How often the likeliest next token is the right one, in per cent, averaged over attempts and then
questions; differences are in points, with 95 % intervals over questions. "right answers" are read
whole by both. Attempts are followed as far as the right token is known: a solved one to its end, a
failed one to the token at which it departs from a right answer that the teacher was not shown. It
departs where the policy drew another token, so there, and less so before, the policy's share is low
by selection. "Style" is the share of the gap between teacher and policy, over all attempts, that
another question's context makes as well."""
PLACES = "The same by tenths of the part that is followed; the gap by tenths of whole attempts"


def oracle(folder: pathlib.Path) -> list[str]:
  """Returns the tables of how often teacher and policy expect the right token."""
  rows, places, styles = [], [], []
  for path in sorted(folder.glob("oracle_*.json")):
    model = path.stem.removeprefix("oracle_")
    read = json.loads(path.read_text(encoding="utf-8"))["tokens"]
    styles.append([model, md.NONE if read["alike"] is None else md.percent(read["alike"])])
    for name, right in read["right"].items():
      rows.append([model, f"right answers; shown: {ABOUT[name]}", *_right_cells(right)])
    for name, right in read["followed"].items():
      rows.append([model, f"{name} attempts", *_right_cells(right)])
      if "departure" in right:
        cells = _right_cells(right["departure"])
        rows.append([model, f"{name} attempts, at the departure", *cells])
      for reader in ("policy", "teacher"):
        shares = [md.NONE if x is None else md.percent(x) for x in right["by_part"][reader]]
        places.append([model, name, reader, *shares])
    gaps = [md.NONE if x is None else md.number(x, ".2f") for x in read["gap_by_part"]]
    places.append([model, "all", "gap, nats", *gaps])
  head = ["model", "what is read", "number", "policy", "teacher", "difference"]
  by_place = md.table(["model", "attempts", "tenth", *map(str, range(1, 11))], places)
  return [
    ORACLE_LEGEND,
    md.table(head, rows),
    md.table(["model", "style"], styles),
    md.folded(PLACES, by_place),
  ]


def _right_cells(right: dict) -> list[str]:
  difference = right["difference"]
  return [
    str(right["answers"]),
    md.percent(right["policy"]),
    md.percent(right["teacher"]),
    md.score(difference["mean"], difference["low"], difference["high"], "+"),
  ]
