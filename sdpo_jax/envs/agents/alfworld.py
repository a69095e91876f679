"""ALFWorld: the policy finds, carries, heats, cools and cleans things in a house, by commands.

The games are ALFWorld's own, from its data (`alfworld_files.py`), or kitchens of ours that the same
engine plays (`alfworld_games.py`). The engine is `textworld`'s, in processes of its own; it comes
with the extra `textworld`. Kinds of task, observations and commands are as published.

The first message says how to answer and what is seen; every observation ends with the admissible
commands, without `help`:

  You arrive at drawer 2. The drawer 2 is closed.

  Admissible commands: close drawer 2, examine drawer 2, ...

The action of a message is what stands in the last <action>...</action>, without them the last line
that says something; spaces at its ends and capitals do not count. Only an action that is equal to
an admissible command reaches the engine. All else is answered by "Nothing happens." and costs a
turn. The reward is 1 once the goal is reached, which ends the episode, else 0.

A turn is valid if its action is admissible. With `valid="format"` it is valid if the message has
<think>...</think> and <action>...</action> and no Chinese character, as in the published training
loop, and the first message asks for both.

Splits: `train`, `heldout` and `unseen` are ALFWorld's train, valid_seen and valid_unseen. Its games
come in an order drawn once from the seed, over and over; ours never repeat.
"""

import os
import random
import re
import threading

from sdpo_jax.envs.agents import alfworld_games, alfworld_worker
from sdpo_jax.envs.agents.alfworld_files import FOLDERS, GameFile, find_games
from sdpo_jax.envs.agents.processes import Pool, Seat
from sdpo_jax.envs.agents.skills import OWN, Skills, read_skills
from sdpo_jax.envs.imports import need
from sdpo_jax.errors import unknown
from sdpo_jax.records import Task, Turn

NOTHING = "Nothing happens."
VALID = ("admissible", "format")
TIME_S = 20.0  # of a request to the engine, which needs half a second on an idle core
START_S = 60.0  # of a process, which needs one second
_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL | re.IGNORECASE)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_ROLE = "You act in a house to carry out a task, one command a turn. "
_INSTRUCTION = {
  "admissible": _ROLE + "Write the next command between <action> and </action>.",
  "format": _ROLE + "First think about the next command between <think> and </think>, then write "
  "it between <action> and </action>.",
}


def action_of(message: str) -> str:
  """Returns the command that a message holds, in small letters; "" where there is none."""
  tagged = _ACTION.findall(message)
  lines = [line for line in message.splitlines() if line.strip()]
  return (tagged or lines or [""])[-1].strip().lower()


def has_form(message: str) -> bool:
  """Tells whether a message has the form of the published training loop."""
  has_parts = bool(_THOUGHT.search(message) and _ACTION.search(message))
  return has_parts and not _CHINESE.search(message)


class Alfworld:
  """Hands out games. It is thread-safe.

  `open` starts the engine's processes, else the first episodes do; `close` ends them.

  data
      the directory of ALFWorld's data, which holds json_2.1.1; empty: games of our own
  seed
      draws our own games, the order of ALFWorld's, and the skills of skill="random"
  limit
      turns of an episode
  valid
      what counts as a valid turn: "admissible" or "format"
  shows_commands
      ends every observation with the admissible commands
  processes
      of the engine, about 100 MB each; 0: one a core. Episodes share them.
  skill, skills
      which skill a teacher reads, "matched" or "random", and the file it comes from; empty: ours
  """

  def __init__(
    self,
    *,
    data: str = "",
    seed: int = 0,
    limit: int = 50,
    valid: str = "admissible",
    shows_commands: bool = True,
    processes: int = 0,
    skill: str = "matched",
    skills: str = "",
  ):
    if valid not in VALID:
      raise ValueError(unknown("config.env.valid", valid, VALID))
    if limit < 1 or processes < 0:
      raise ValueError(
        f"config.env.limit={limit} must be at least 1, "
        f"and config.env.processes={processes} at least 0"
      )
    need(
      "alfworld",
      "textworld",
      ("textworld", "alfworld"),
      remark=", which compiles (gcc, g++, make, cmake)",
    )
    self._rules = alfworld_games.read_rules()
    self._data = os.path.expanduser(data)
    self._seed, self._limit, self._valid = seed, limit, valid
    self.reads_thoughts = valid == "format"  # which asks for them
    self._shows_commands = shows_commands
    file = skills or OWN / "alfworld.json"
    self.skill_text = Skills(read_skills(file), where=str(file), skill=skill, seed=seed).text
    self._files: dict[str, list[GameFile]] = {}
    self._files_lock = threading.Lock()
    # Where ALFWorld's package makes a folder as soon as it is imported; here there is one.
    environment = {"ALFWORLD_DATA": os.curdir}
    self._pool = Pool(
      "ALFWorld's engine",
      alfworld_worker.__file__,
      {},
      size=processes or None,
      time_s=TIME_S,
      start_s=START_S,
      environment=environment,
    )

  def open(self) -> None:
    """Starts the engine's processes and waits for them. RuntimeError if one does not start."""
    self._pool.open()

  def close(self) -> None:
    """Ends the engine's processes, also in the middle of an episode."""
    self._pool.close()

  def task(self, split: str, index: int) -> Task:
    """Returns a task. ValueError for a split that does not exist or has no games."""
    if split not in FOLDERS:
      raise ValueError(unknown("the split", split, list(FOLDERS)))
    game: alfworld_games.Game | GameFile
    key: str | list
    if not self._data:
      game = alfworld_games.make_game(self._seed, split, index)
      name, key = f"{self._seed}/{split}/{index}", [split, index]
    else:
      files = self._games(split)
      game = files[index % len(files)]
      name = key = game.path
    data = {"kind": game.template.kind, "template": "-".join(game.template), "game": key}
    task = Task(f"alfworld/{name}", f"Your task is to: {game.request}.", split=split, data=data)
    data["skill"] = self.skill_text(task)
    return task

  def start(self, task: Task) -> "Episode":
    """Begins the game of a task. RuntimeError if the engine does not."""
    key = task.data["game"]
    game: str | dict = f"{self._data}/{key}"
    if not self._data:
      made = alfworld_games.make_game(self._seed, *key)
      game = alfworld_games.game_file(made, self._rules)
    return Episode(
      self._pool.sit(), game, limit=self._limit, valid=self._valid, shows=self._shows_commands
    )

  def _games(self, split: str) -> list[GameFile]:
    """Returns the games of a split in their order; they are looked for once."""
    with self._files_lock:
      if split not in self._files:
        files = find_games(self._data, split)
        random.Random(f"alfworld/{self._seed}/{split}").shuffle(files)
        self._files[split] = files
      return self._files[split]


class Episode:
  """One game, played once by one thread at a time."""

  def __init__(self, seat: Seat, game: str | dict, *, limit: int, valid: str, shows: bool):
    """game: the path of a game file, or what it holds. RuntimeError if it does not begin."""
    self._seat, self._limit, self._valid, self._shows = seat, limit, valid, shows
    self._turns = 0
    self._commands: list[str] = []
    try:
      self._first = self._ask("load", game)["text"]
    except BaseException:
      seat.leave()
      raise

  def prompt(self) -> list[dict[str, str]]:
    """Returns the messages before the first action."""
    text = f"{_INSTRUCTION[self._valid]}\n\n{self._with_commands(self._first)}"
    return [{"role": "user", "content": text}]

  def step(self, message: str) -> Turn:
    """Carries out the command of a message. RuntimeError if the engine fails."""
    self._turns += 1
    is_over = self._turns >= self._limit
    action = action_of(message)
    is_admissible = action in self._commands
    is_valid = is_admissible if self._valid == "admissible" else has_form(message)
    if not is_admissible:
      return Turn(self._with_commands(NOTHING), 0.0, is_over, is_valid)
    state = self._ask("step", action)
    is_over = is_over or state["won"]
    return Turn(self._with_commands(state["text"]), float(state["won"]), is_over, is_valid)

  def close(self) -> None:
    """Ends the game."""
    self._seat.leave(["close", self._seat.number])

  def _ask(self, action: str, argument) -> dict:
    """Has the engine act, and remembers the admissible commands."""
    state = self._seat.ask([action, self._seat.number, argument])
    self._commands = state["commands"]
    return state

  def _with_commands(self, text: str) -> str:
    """Returns an observation with the commands that it allows."""
    if not self._shows:
      return text
    commands = ", ".join(command for command in self._commands if command != "help")
    return f"{text}\n\nAdmissible commands: {commands}"
