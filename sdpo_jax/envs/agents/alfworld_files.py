"""Finds the games in ALFWorld's data, which whoever wants to use it has to fetch.

  DIRECTORY/json_2.1.1/{train,valid_seen,valid_unseen}/KIND-OBJECT-MOVABLE-PLACE-SCENE/trial_*/
    traj_data.json  initial_state.pddl  game.tw-pddl

As in ALFWorld's own loader, games with movable places or slices are left out, and those that are
not known to be solvable. A game file is JSON; what the task is stands in its grammar.
"""

import json
import pathlib
import re
from typing import NamedTuple

from sdpo_jax.envs.agents.alfworld_games import KINDS, Template
from sdpo_jax.errors import SettingError

FOLDERS = {"train": "train", "heldout": "valid_seen", "unseen": "valid_unseen"}
_REQUEST = re.compile(r'"Your task is to: ((?:[^"\\]|\\.)*?)\.?"')
_LAYOUT = "json_2.1.1/{train,valid_seen,valid_unseen}/*/*/game.tw-pddl"


class GameFile(NamedTuple):
  """A game that can be played."""

  path: str  # within the data directory
  template: Template
  request: str  # "put a clean mug in shelf"


def find_games(directory: str, split: str) -> list[GameFile]:
  """Returns the games of a split, sorted by path.

  SettingError if there is none, and for a file that cannot be read.
  """
  root = pathlib.Path(directory).expanduser()
  folder = root / "json_2.1.1" / FOLDERS[split]
  found = []
  for path in sorted(folder.glob("*/*/game.tw-pddl")):
    relative = path.relative_to(root)
    kind, item, _movable, place, *_ = [*path.parents[1].name.split("-"), "", "", ""]
    if kind not in KINDS or "movable" in str(relative) or "Sliced" in str(relative):
      continue
    request = _read_request(path)
    if request is not None:
      found.append(GameFile(str(relative), Template(kind, item, place), request))
  if not found:
    raise SettingError(
      f"config.env.data={directory!r} has no playable game at {_LAYOUT} for the split {split!r}; "
      "fetch ALFWorld's data with its `alfworld-download`, or leave the setting out for our own "
      "games"
    )
  return found


def _read_request(path: pathlib.Path) -> str | None:
  """Returns what a game asks for; None if the game is not known to be solvable."""
  try:
    game = json.loads(path.read_text(encoding="utf-8"))
    if not game.get("solvable", False):
      return None
    match = _REQUEST.search(game["grammar"])
    return json.loads(f'"{match[1]}"')
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise SettingError(f"{path} is no game of ALFWorld: fetch it again ({error!r:.100})") from error
