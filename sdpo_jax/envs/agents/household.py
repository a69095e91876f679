"""A text world of our own, in ALFWorld's wording, small enough for the tiny model.

  -= Welcome to TextWorld, ALFRED! =-

  You are in the middle of a room. Looking quickly around you, you see a basin, ..., and a table.

  Your task is to: blick then heat the apple and put it on the shelf. The apple is on the desk.

  > go desk            You arrive at desk. On the desk, you see a apple.
  > take apple         You pick up the apple from the desk.
  > go oven            You arrive at oven.
  > use oven           You use the oven on the apple.
  ...
  > put apple          You put the apple on the shelf.

A task names one or two processes, each done with one of eight appliances, an object, where it is,
and where it has to go. A process has a *known* word (heat: the oven) or a *novel* one ("blick"),
whose appliance `words_seed` draws. That stands nowhere but in the skill ("blick means the oven."),
which a teacher may read and the policy does not: `skill_text(task)`. Using an appliance is final,
and nothing says whether it was the right one. Putting the object down ends the episode. The reward
is 1 if exactly the right appliances were used, in their order, and the place is right; else 0. So
one novel word is guessed once in eight episodes, and two once in 64.

An action is the last line of the policy's message that is no empty line, without a leading ">". It
is admissible if it is among the commands that the state allows, and answered by "Nothing happens."
otherwise: such a turn is invalid and is counted. As in ALFWorld the article is always "a". At the
level `search` the task does not say where the object is.

Splits:
  train, tune, heldout   tasks of the same templates, drawn apart
  unseen                 templates (process words, object, goal) that no other split shows, 30 % of
                         them, by hash

Everything is a pure function of (level, words_seed, split, index).
"""

import random
from typing import Any, NamedTuple
import zlib

from sdpo_jax.envs.agents.skills import Skills, read_skills
from sdpo_jax.envs.composed import NOVEL_WORDS
from sdpo_jax.errors import unknown
from sdpo_jax.records import Task, Turn

# Appliance: the word that everybody knows for what it does.
KNOWN = {
  "oven": "heat",
  "fridge": "cool",
  "basin": "wash",
  "press": "squeeze",
  "mixer": "stir",
  "grinder": "grind",
  "scale": "weigh",
  "lamp": "light",
}
APPLIANCES = tuple(KNOWN)
OBJECTS = ("apple", "bread", "cup", "egg", "fork", "mug", "pan", "towel")
PLACES = ("bed", "cart", "desk", "drawer", "shelf", "table")
SPLITS = ("train", "tune", "heldout", "unseen")
LEVELS = ("default", "search")
UNSEEN_SHARE = 0.3
NOVEL_SHARE = 0.5  # of the processes of a task
TWO_SHARE = 0.5  # of the tasks have two processes
LIMIT = 10  # turns; a task of two processes takes eight
WELCOME = "-= Welcome to TextWorld, ALFRED! =-"
NOTHING = "Nothing happens."
GENERAL = "Take the object, use what each word means in that order, then put the object down."


class Goal(NamedTuple):
  """What a task asks for."""

  words: tuple[str, ...]  # of the processes, in order
  appliances: tuple[str, ...]  # what they mean
  item: str
  where: str  # the place where it is
  place: str  # where it has to go


def meanings(words_seed: int) -> dict[str, str]:
  """Returns {novel word: its appliance}: the only place where a novel word's meaning stands."""
  rng = random.Random(f"household/{words_seed}")
  words = rng.sample(NOVEL_WORDS, len(APPLIANCES))
  return dict(zip(words, rng.sample(APPLIANCES, len(APPLIANCES)), strict=True))


def meaning_line(word: str, appliance: str) -> str:
  """Returns what a skill says of a process word."""
  return f"{word} means the {appliance}."


def is_unseen(words: tuple[str, ...], item: str, place: str) -> bool:
  """Tells whether a template belongs to the split `unseen`."""
  return zlib.crc32(repr((words, item, place)).encode()) / 2**32 < UNSEEN_SHARE


def draw(rng: random.Random, meaning: dict[str, str]) -> Goal:
  """Draws what a task asks for. meaning: {novel word: its appliance}."""
  appliances = tuple(rng.sample(APPLIANCES, 1 + (rng.random() < TWO_SHARE)))
  word_of = {appliance: word for word, appliance in meaning.items()}
  words = tuple(
    word_of[appliance] if rng.random() < NOVEL_SHARE else KNOWN[appliance]
    for appliance in appliances
  )
  where, place = rng.sample(PLACES, 2)
  return Goal(words, appliances, rng.choice(OBJECTS), where, place)


def request(goal: Goal, level: str) -> str:
  """Returns the line that says what the task is."""
  done = f"{' then '.join(goal.words)} the {goal.item} and put it on the {goal.place}."
  where = "" if level == "search" else f" The {goal.item} is on the {goal.where}."
  return f"Your task is to: {done}{where}"


def beginning(goal: Goal, level: str) -> str:
  """Returns the first observation."""
  *names, last = sorted((*APPLIANCES, *PLACES))
  seen = "".join(f"a {name}, " for name in names) + f"and a {last}"
  room = f"You are in the middle of a room. Looking quickly around you, you see {seen}."
  return f"{WELCOME}\n\n{room}\n\n{request(goal, level)}"


def walkthrough(goal: Goal) -> list[str]:
  """Returns the shortest way to the goal, as commands."""
  commands = [f"go {goal.where}", f"take {goal.item}"]
  for appliance in goal.appliances:
    commands += [f"go {appliance}", f"use {appliance}"]
  return [*commands, f"go {goal.place}", f"put {goal.item}"]


def action_of(message: str) -> str:
  """Returns the command in the policy's message; "" where there is none."""
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  return lines[-1].removeprefix(">").strip() if lines else ""


class World:
  """The state of one episode, which is used once."""

  def __init__(self, goal: Goal, level: str, limit: int):
    self._goal, self._level, self._limit = goal, level, limit
    self._at = ""  # where the policy stands; "": in the middle of the room
    self._carries = False
    self._used: list[str] = []
    self._turns = 0

  def commands(self) -> list[str]:
    """Returns the admissible commands, sorted."""
    goal = self._goal
    found = [f"go {name}" for name in (*APPLIANCES, *PLACES) if name != self._at]
    if self._at == goal.where and not self._carries:
      found.append(f"take {goal.item}")
    if self._carries and self._at in APPLIANCES:
      found.append(f"use {self._at}")
    if self._carries and self._at in PLACES:
      found.append(f"put {goal.item}")
    return sorted(found)

  def prompt(self) -> list[dict[str, str]]:
    """Returns the messages before the first action."""
    return [{"role": "user", "content": beginning(self._goal, self._level)}]

  def step(self, message: str) -> Turn:
    """Carries out the command of a message and says what is seen then."""
    self._turns += 1
    command = action_of(message)
    is_over = self._turns >= self._limit
    if command not in self.commands():
      return Turn(NOTHING, 0.0, is_over, valid=False)
    verb, _, name = command.partition(" ")
    if verb == "put":
      return Turn(f"You put the {name} on the {self._at}.", self._reward(), True)
    return Turn(self._carry_out(verb, name), 0.0, is_over)

  def close(self) -> None:
    """Ends the episode; nothing is held."""

  def _carry_out(self, verb: str, name: str) -> str:
    goal = self._goal
    if verb == "take":
      self._carries = True
      return f"You pick up the {name} from the {self._at}."
    if verb == "use":
      self._used.append(name)
      return f"You use the {name} on the {goal.item}."
    self._at = name
    is_here = name == goal.where and not self._carries
    seen = f" On the {name}, you see a {goal.item}." if is_here else ""
    return f"You arrive at {name}.{seen}"

  def _reward(self) -> float:
    is_right = tuple(self._used) == self._goal.appliances and self._at == self._goal.place
    return float(is_right)


class Household:
  """Makes tasks and the worlds that they are played in."""

  def __init__(
    self,
    *,
    level: str = "default",
    words_seed: int = 0,
    limit: int = LIMIT,
    skill: str = "matched",
    skills: str = "",
  ):
    """Takes settings.

    limit: turns of an episode.
    skill: what a teacher reads, "matched" or "random", as `skills.py` says.
    skills: a file of skills; empty: those of this world.
    """
    if level not in LEVELS:
      raise ValueError(unknown("config.env.level", level, LEVELS))
    self._level, self._words_seed, self._limit = level, words_seed, limit
    self._meaning = meanings(words_seed)
    content, where = self.skills(), "household"
    if skills:
      content, where = read_skills(skills), skills
    self.skill_text = Skills(content, where=where, skill=skill, seed=words_seed).text

  def task(self, split: str, index: int) -> Task:
    """Returns a task. ValueError for a split that does not exist."""
    if split not in SPLITS:
      raise ValueError(unknown("the split", split, SPLITS))
    rng = random.Random(f"household/{self._words_seed}/{self._level}/{split}/{index}")
    while True:
      goal = draw(rng, self._meaning)
      if is_unseen(goal.words, goal.item, goal.place) == (split == "unseen"):
        break
    novel = sum(word in self._meaning for word in goal.words)
    data: dict[str, Any] = {"goal": list(map(list, goal[:2])) + list(goal[2:])}
    data |= {"kind": f"{novel} novel of {len(goal.words)}", "difficulty": len(goal.words)}
    task = Task(
      f"household/{self._level}/{self._words_seed}/{split}/{index}",
      request(goal, self._level),
      solution="\n".join(walkthrough(goal)),
      split=split,
      data=data,
    )
    data["skill"] = self.skill_text(task)
    return task

  def start(self, task: Task) -> World:
    """Returns the world of a task, for one episode."""
    words, appliances, *rest = task.data["goal"]
    return World(Goal(tuple(words), tuple(appliances), *rest), self._level, self._limit)

  def skills(self) -> dict:
    """Returns what is known about the world, as a skills file holds it.

    A task may have two words, and needs the lines of all its words.
    """
    lines = {word: meaning_line(word, name) for word, name in self._meaning.items()}
    lines |= {word: meaning_line(word, name) for name, word in KNOWN.items()}
    keywords = [[word, [word]] for word in lines]
    return {"general": GENERAL, "skills": lines, "keywords": keywords, "match": "all"}
