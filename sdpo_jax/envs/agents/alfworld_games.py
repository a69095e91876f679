"""ALFWorld games of our own: kitchens that the real engine plays, where its data is not at hand.

ALFWorld's package brings the rules (`alfred.pddl`) and the wording (`alfred.twl2`), its games come
separately. A game is a problem over these rules: what stands where, and a goal. Ours has one of
ALFWorld's six kinds of task, a kitchen of about twenty places and ten objects, all drawn.

  pick_and_place_simple           put a mug in shelf
  pick_clean_then_place_in_recep  put a clean mug in shelf      (at the sink)
  pick_heat_then_place_in_recep   put a hot mug in shelf        (in the microwave)
  pick_cool_then_place_in_recep   put a cool mug in shelf       (in the fridge)
  pick_two_obj_and_place          put two mug in shelf
  look_at_obj_in_light            look at mug under the desklamp

Template of a game: (kind of task, object, place). The split `unseen` shows templates that no other
split shows, 30 % of them, by hash. A game is a pure function of (seed, split, index).

Games lie in memory. To have them as files, in the layout of ALFWorld's data:

  python -m sdpo_jax.envs.agents.alfworld_games DIRECTORY
"""

import argparse
import importlib.util
import json
import pathlib
import random
from typing import NamedTuple
import zlib

UNSEEN_SHARE = 0.3

# Places: how many there may be of each, and whether they open.
PLACES = {
  "Cabinet": (2, 4, True),
  "CounterTop": (1, 2, False),
  "DiningTable": (1, 1, False),
  "Drawer": (2, 4, True),
  "Fridge": (1, 1, True),
  "GarbageCan": (1, 1, False),
  "Microwave": (1, 1, True),
  "Shelf": (1, 3, False),
  "SideTable": (1, 1, False),
  "SinkBasin": (1, 1, False),
}
_FOOD = ("CounterTop", "DiningTable", "Fridge", "GarbageCan", "Microwave", "SinkBasin")
_DISH = ("Cabinet", "CounterTop", "DiningTable", "Fridge", "Microwave", "Shelf", "SinkBasin")
_CUTLERY = ("CounterTop", "DiningTable", "Drawer", "SinkBasin")
_THING = ("CounterTop", "DiningTable", "Drawer", "Shelf", "SideTable")
# Objects: where they may be, and what may be done to them.
OBJECTS = {
  "Apple": (_FOOD, ("heatable", "coolable", "cleanable")),
  "Book": (_THING, ()),
  "Bread": (_FOOD, ("heatable", "coolable")),
  "Cup": (_DISH, ("heatable", "coolable", "cleanable")),
  "Egg": (_FOOD, ("heatable", "coolable", "cleanable")),
  "Fork": (_CUTLERY, ("cleanable",)),
  "Ladle": (_CUTLERY, ("cleanable",)),
  "Mug": (_DISH, ("heatable", "coolable", "cleanable")),
  "Pen": (_THING, ()),
  "Plate": (_DISH, ("heatable", "coolable", "cleanable")),
  "Potato": (_FOOD, ("heatable", "coolable", "cleanable")),
  "Spoon": (_CUTLERY, ("cleanable",)),
  "Tomato": (_FOOD, ("heatable", "coolable", "cleanable")),
  "Vase": (_THING, ()),
  "Watch": (_THING, ()),
}
LAMP = "DeskLamp"  # stands on the side table


class Kind(NamedTuple):
  """One of ALFWorld's kinds of task."""

  wordings: tuple[str, ...]  # of the request
  needs: str = ""  # what the object must be
  at: str = ""  # the place where it is done, which is never the goal
  becomes: str = ""  # the state that the goal asks for
  verb: str = ""  # of the command


KINDS = {
  "pick_and_place_simple": Kind(("put a {item} in {place}", "put some {item} on {place}")),
  "look_at_obj_in_light": Kind(
    ("look at {item} under the {place}", "examine the {item} with the {place}")
  ),
  "pick_clean_then_place_in_recep": Kind(
    ("put a clean {item} in {place}", "clean some {item} and put it in {place}"),
    *("cleanable", "SinkBasin", "isClean", "clean"),
  ),
  "pick_heat_then_place_in_recep": Kind(
    ("put a hot {item} in {place}", "heat some {item} and put it in {place}"),
    *("heatable", "Microwave", "isHot", "heat"),
  ),
  "pick_cool_then_place_in_recep": Kind(
    ("put a cool {item} in {place}", "cool some {item} and put it in {place}"),
    *("coolable", "Fridge", "isCool", "cool"),
  ),
  "pick_two_obj_and_place": Kind(
    ("put two {item} in {place}", "find two {item} and put them in {place}")
  ),
}


class Template(NamedTuple):
  """What is asked for, without the kitchen."""

  kind: str
  item: str
  place: str  # a place, or the lamp

  @property
  def is_unseen(self) -> bool:
    """Tells whether it belongs to the split `unseen`."""
    return zlib.crc32("-".join(self).encode()) / 2**32 < UNSEEN_SHARE


class Rules(NamedTuple):
  """What ALFWorld's package brings."""

  domain: str
  grammar: str


class Game(NamedTuple):
  """A game, before the rules are added."""

  template: Template
  request: str  # "put a clean mug in shelf"
  problem: str  # PDDL
  walkthrough: list[str]  # commands that win


def read_rules() -> Rules:
  """Reads the rules from ALFWorld's package, which is not imported. ValueError if it is missing."""
  spec = importlib.util.find_spec("alfworld")
  if spec is None or not spec.submodule_search_locations:
    raise ValueError("games of ALFWorld need its package: pip install 'sdpo_jax[textworld]'")
  folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
  return Rules(*((folder / f"alfred.{end}").read_text("utf-8") for end in ("pddl", "twl2")))


def make_game(seed: int, split: str, index: int) -> Game:
  """Draws a game."""
  rng = random.Random(f"alfworld/{seed}/{split}/{index}")
  template = draw_template(rng)
  while template.is_unseen != (split == "unseen"):
    template = draw_template(rng)
  kitchen = Kitchen(rng, template)
  wording = rng.choice(KINDS[template.kind].wordings)
  request = wording.format(item=template.item.lower(), place=template.place.lower())
  return Game(template, request, kitchen.problem(), kitchen.walkthrough())


def draw_template(rng: random.Random) -> Template:
  """Draws what is asked for."""
  name = rng.choice(sorted(KINDS))
  kind = KINDS[name]
  able = [item for item, (_, abilities) in OBJECTS.items() if kind.needs in ("", *abilities)]
  item = rng.choice(able)
  if name == "look_at_obj_in_light":
    return Template(name, item, LAMP)
  return Template(name, item, rng.choice([p for p in OBJECTS[item][0] if p != kind.at]))


def game_file(game: Game, rules: Rules) -> dict:
  """Returns what a game file holds."""
  return {
    "pddl_domain": rules.domain,
    "grammar": rules.grammar.replace("UNKNOWN GOAL", game.request),
    "pddl_problem": game.problem,
    "solvable": True,
    "walkthrough": game.walkthrough,
  }


class Kitchen:
  """Places and objects, drawn so that the goal is not reached yet and can be."""

  def __init__(self, rng: random.Random, template: Template):
    self._template = template
    self._places = _numbered({k: rng.randint(*most[:2]) for k, most in PLACES.items()})
    copies = 2 if template.kind == "pick_two_obj_and_place" else 1
    others = rng.sample([item for item in OBJECTS if item != template.item], 7)
    counts = {template.item: copies} | {item: rng.randint(1, 2) for item in others}
    self._objects = _numbered(counts | {LAMP: 1})
    self._where: dict[Named, Named] = {}  # object: its place
    for thing in self._objects:
      self._where[thing] = rng.choice([p for p in self._places if p.kind in self._starts(thing)])
    # The lamp counts as a place, too: it is where a task that needs light ends.
    ends = [named for named in (*self._places, *self._objects) if named.kind == template.place]
    self._end = rng.choice(ends)

  def _starts(self, thing: "Named") -> tuple[str, ...]:
    """Returns the kinds of place where an object may be at first."""
    if thing.kind == LAMP:
      return ("SideTable",)
    kinds = OBJECTS[thing.kind][0]
    if thing.kind == self._template.item:
      kinds = tuple(kind for kind in kinds if kind != self._template.place)
    return kinds

  def walkthrough(self) -> list[str]:
    """Returns commands that win."""
    verb, tool_kind = KINDS[self._template.kind].verb, KINDS[self._template.kind].at
    route = _Route()
    for thing in (thing for thing in self._objects if thing.kind == self._template.item):
      route.go(self._where[thing], is_opened=True)
      route.commands.append(f"take {thing.name} from {self._where[thing].name}")
      if verb:
        tool = next(place for place in self._places if place.kind == tool_kind)
        route.go(tool)
        route.commands.append(f"{verb} {thing.name} with {tool.name}")
      if self._end.kind == LAMP:
        route.go(self._where[self._end])
        route.commands.append(f"use {self._end.name}")
      else:
        route.go(self._end, is_opened=True)
        route.commands.append(f"move {thing.name} to {self._end.name}")
    return route.commands

  def problem(self) -> str:
    """Returns the PDDL problem."""
    objects = ["agent1 - agent", "loc_bar_0 - location"]
    facts = ["(atLocation agent1 loc_bar_0)", "(= (total-cost) 0)"]
    for number, place in enumerate(self._places, 1):
      objects += [f"loc_bar_{number} - location", f"{place.id} - receptacle"]
      facts.append(f"(receptacleType {place.id} {place.kind}Type)")
      facts.append(f"(receptacleAtLocation {place.id} loc_bar_{number})")
      if PLACES[place.kind][2]:
        facts.append(f"(openable {place.id})")
    for thing in self._objects:
      place = self._where[thing]
      objects.append(f"{thing.id} - object")
      facts.append(f"(objectType {thing.id} {thing.kind}Type)")
      facts.append(f"(inReceptacle {thing.id} {place.id})")
      facts.append(f"(objectAtLocation {thing.id} loc_bar_{self._places.index(place) + 1})")
      abilities = ("toggleable",)
      if thing.kind != LAMP:
        abilities = ("pickupable", *OBJECTS[thing.kind][1])
      facts += [f"({ability} {thing.id})" for ability in abilities]
    # The rules name some types that no kitchen has.
    kinds = {LAMP, "Knife", "ButterKnife", *OBJECTS}
    objects += [f"{kind}Type - otype" for kind in sorted(kinds)]
    objects += [f"{kind}Type - rtype" for kind in PLACES]
    for item, (places, _) in OBJECTS.items():
      facts += [f"(canContain {place}Type {item}Type)" for place in places]
    return (
      "(define (problem kitchen)\n(:domain alfred)\n(:objects\n"
      + "\n".join(objects)
      + "\n)\n(:init\n"
      + "\n".join(facts)
      + f"\n)\n(:goal {_goal(self._template)})\n(:metric minimize (total-cost))\n)\n"
    )


class Named(NamedTuple):
  """A place or an object under its two names."""

  kind: str
  id: str  # in the problem
  name: str  # in the text


class _Route:
  """Commands in the making: where they lead, and what they have opened."""

  def __init__(self):
    self.commands: list[str] = []
    self._at: Named | None = None
    self._opened: set[Named] = set()

  def go(self, place: Named, is_opened: bool = False) -> None:
    """Adds the way to a place, which is then open if it has to be."""
    if place != self._at:
      self.commands.append(f"go to {place.name}")
      self._at = place
    if is_opened and PLACES[place.kind][2] and place not in self._opened:
      self.commands.append(f"open {place.name}")
      self._opened.add(place)


def _numbered(counts: dict[str, int]) -> list[Named]:
  """Returns that many of each kind; the engine gives the first of a kind the highest number."""
  found = []
  for kind, count in counts.items():
    end = "_bar_SinkBasin" if kind == "SinkBasin" else ""
    prefix = kind.removesuffix("Basin")
    for number in range(count):
      found.append(Named(kind, f"{prefix}_bar_{number}{end}", f"{kind.lower()} {count - number}"))
  return found


def _goal(template: Template) -> str:
  """Returns the goal in PDDL. It names no object, so any of the kind will do."""
  kind, item, place = template
  if place == LAMP:
    return (
      f"(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and "
      f"(objectType ?ot {place}Type) (toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l) "
      "(atLocation ?a ?l) (inReceptacle ?ot ?r))) (exists (?o - object ?a - agent) "
      f"(and (objectType ?o {item}Type) (holds ?a ?o))))"
    )
  there = f"(objectType {{0}} {item}Type) (receptacleType ?r {place}Type) (inReceptacle {{0}} ?r)"
  if kind == "pick_two_obj_and_place":
    second = f"(exists (?o2 - object) (and (not (= ?o1 ?o2)) {there.format('?o2')}))"
    inner = f"(exists (?o1 - object) (and {there.format('?o1')} {second}))"
  else:
    state = KINDS[kind].becomes
    is_done = f" ({KINDS[kind].needs} ?o) ({state} ?o)" if state else ""
    inner = f"(exists (?o - object) (and {there.format('?o')}{is_done}))"
  return f"(and (exists (?r - receptacle) {inner}))"


def write_games(directory: str, seed: int, count: int) -> None:
  """Writes `count` games of each split, in the layout of ALFWorld's data."""
  rules = read_rules()
  folders = {"train": "train", "heldout": "valid_seen", "unseen": "valid_unseen"}
  for split, folder in folders.items():
    for index in range(count):
      game = make_game(seed, split, index)
      kind, item, place = game.template
      path = pathlib.Path(directory) / "json_2.1.1" / folder / f"{kind}-{item}-None-{place}-1"
      path = path / f"trial_{seed}_{index}"
      path.mkdir(parents=True, exist_ok=True)
      (path / "initial_state.pddl").write_text(game.problem)
      (path / "traj_data.json").write_text(json.dumps({"task_type": kind}))
      (path / "game.tw-pddl").write_text(json.dumps(game_file(game, rules)))


def main() -> None:
  """Writes games where the command line says."""
  parser = argparse.ArgumentParser(description="Writes ALFWorld games of our own.")
  parser.add_argument("directory")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--count", type=int, default=100, help="games of each split")
  arguments = parser.parse_args()
  write_games(arguments.directory, arguments.seed, arguments.count)


if __name__ == "__main__":
  main()
