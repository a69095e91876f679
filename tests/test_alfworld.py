"""Tests ALFWorld: our games in the real engine, its data's layout, and what a message may do."""

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys

import pytest

from sdpo_jax import config
from sdpo_jax.envs.agents import alfworld, alfworld_files, alfworld_games, household
from sdpo_jax.envs.agents.alfworld import Alfworld, action_of, has_form
from sdpo_jax.errors import SettingError
from sdpo_jax.records import Turn

ROOT = pathlib.Path(__file__).parents[1]
GAMES = [alfworld_games.make_game(0, "train", index) for index in range(60)]

# What the real engine says in the game ("train", 5) of seed 0.
TRANSCRIPT = [
  (
    "",
    "-= Welcome to TextWorld, ALFRED! =-\n\n"
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 3, a cabinet "
    "2, a cabinet 1, a countertop 2, a countertop 1, a diningtable 1, a drawer 2, a drawer 1, a "
    "fridge 1, a garbagecan 1, a microwave 1, a shelf 3, a shelf 2, a shelf 1, a sidetable 1, and "
    "a sinkbasin 1.\n\n"
    "Your task is to: examine the watch with the desklamp.",
  ),
  ("nonsense", "Nothing happens."),
  ("look", "You are in the middle of a room. Looking quickly around you, you see nothing."),
  ("inventory", "You are not carrying anything."),
  ("go to shelf 2", "You arrive at shelf 2. On the shelf 2, you see a book 2, and a watch 1."),
  ("take watch 1 from shelf 2", "You pick up the watch 1 from the shelf 2."),
  (
    "go to sidetable 1",
    "You arrive at sidetable 1. On the sidetable 1, you see a book 1, a desklamp 1, and a vase 2.",
  ),
  ("use desklamp 1", "You turn on the desklamp 1."),
]


# Importing them makes folders in the home directory.
HAS_ENGINE = all(map(importlib.util.find_spec, ("alfworld", "textworld", "fast_downward")))
needs_engine = pytest.mark.skipif(not HAS_ENGINE, reason="needs the extra textworld")


@pytest.fixture(scope="module")
def env():
  """An environment with two processes of the real engine."""
  if not HAS_ENGINE:
    pytest.skip("needs the extra textworld")
  made = Alfworld(processes=2, limit=50)
  made.open()
  yield made
  made.close()


@pytest.fixture
def begin(env):
  """Begins episodes and closes them."""
  episodes = []

  def begin(index, **attributes):
    episodes.append(env.start(env.task("train", index)))
    vars(episodes[-1]).update(attributes)
    return episodes[-1]

  yield begin
  for episode in episodes:
    episode.close()


def first_of_each_kind():
  """Returns the place of the first game of each kind of task."""
  return {game.template.kind: index for index, game in reversed(list(enumerate(GAMES)))}


@pytest.mark.parametrize("kind", alfworld_games.KINDS)
def test_each_kind_of_our_games_is_won_in_the_real_engine(begin, kind):
  index = first_of_each_kind()[kind]
  episode = begin(index)
  turns = [episode.step(f"<action>{command}</action>") for command in GAMES[index].walkthrough]
  assert all(turn.valid for turn in turns)
  assert [turn.reward for turn in turns] == [0.0] * (len(turns) - 1) + [1.0]
  assert [turn.done for turn in turns] == [False] * (len(turns) - 1) + [True]


@pytest.mark.slow
def test_the_planner_solves_our_games_and_what_is_kept_changes_no_word(env, begin):
  """The engine as it is, in this process, against that of the pool: the planner's way, stumbling.

  In a process of its own, whose end is as abrupt as that of a library that crashes there.
  """
  index = first_of_each_kind()["pick_heat_then_place_in_recep"]
  program = (
    "import json, os, random, sys\n"
    "from alfworld.agents.environment.alfred_tw_env import AlfredDemangler\n"
    "from textworld import EnvInfos\nfrom textworld.envs.pddl import PddlEnv\n"
    "infos = EnvInfos(won=True, admissible_commands=True, policy_commands=True)\n"
    "game = AlfredDemangler(PddlEnv(infos))\n"
    "game.load(json.load(sys.stdin))\nstate = game.reset()\nrng = random.Random(0)\n"
    "seen = [[None, state.feedback, state.admissible_commands, state.won]]\n"
    "while not state.won and len(seen) < 100:\n"
    "  command = state.policy_commands[0]\n"
    "  if len(seen) < 12: command = rng.choice(state.admissible_commands)\n"
    "  state, _, _ = game.step(command)\n"
    "  seen.append([command, state.feedback, state.admissible_commands, state.won])\n"
    "print(json.dumps(seen), flush=True)\nos._exit(0)\n"
  )
  game = json.dumps(alfworld_games.game_file(GAMES[index], alfworld_games.read_rules()))
  environment = os.environ | {"ALFWORLD_DATA": "."}
  run = subprocess.run(
    [sys.executable, "-P", "-c", program],
    input=game,
    capture_output=True,
    text=True,
    env=environment,
    check=True,
  )
  seen = json.loads(run.stdout.splitlines()[-1])
  episode = begin(index, _shows=False)
  assert episode._first == seen[0][1] and episode._commands == seen[0][2]
  for command, text, commands, won in seen[1:]:
    turn = episode.step(command)
    assert (turn.observation, episode._commands, turn.done) == (text, commands, won)
  assert turn.reward == 1.0 and 15 < len(seen) < 40


def test_the_engine_says_what_was_recorded(begin):
  episode = begin(5, _shows=False)
  assert episode._first == TRANSCRIPT[0][1]
  assert [(c, episode.step(c).observation) for c, _ in TRANSCRIPT[1:]] == TRANSCRIPT[1:]


# The wording that household's world shares with the engine, by the beginning of a command.
NAME = r"[a-z]+(?: \d+)?"
LIST = rf"(?:a {NAME}|(?:a {NAME}, )+and a {NAME})"
WORDING = {
  "": rf"-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room\. Looking quickly "
  rf"around you, you see {LIST}\.\n\nYour task is to: .+",
  "go": rf"You arrive at {NAME}\.(?: The {NAME} is closed\.| On the {NAME}, you see {LIST}\.)?",
  "take": rf"You pick up the {NAME} from the {NAME}\.",
  "nonsense": r"Nothing happens\.",
}


def test_household_has_the_wording_of_the_engine():
  goal = household.Goal(("heat",), ("oven",), "egg", "desk", "shelf")
  world = household.World(goal, "default", 10)
  ours = [("", household.beginning(goal, "default")), ("nonsense", world.step("?").observation)]
  ours += [(c, world.step(c).observation) for c in household.walkthrough(goal)]
  for lines in (TRANSCRIPT, ours):
    verbs = [command.partition(" ")[0] for command, _ in lines]
    assert WORDING.keys() <= set(verbs)
    for verb, (command, text) in zip(verbs, lines, strict=True):
      assert re.fullmatch(WORDING.get(verb, ".*"), text, re.DOTALL), (command, text)


def test_the_first_message_says_how_to_answer_and_what_can_be_done(env, begin):
  ((role, content),) = [m.values() for m in begin(0).prompt()]
  assert role == "user" and env.task("train", 0).prompt in content
  assert "<action>" in content and "<think>" not in content
  assert "\n\nAdmissible commands: go to cabinet 1, " in content and "help" not in content
  (message,) = begin(0, _valid="format", _shows=False).prompt()
  assert "<think>" in message["content"] and "Admissible" not in message["content"]


BAD = ["", "\n", "look\x00", "look\ninventory\n!", "x" * 10**5, "\ud800", "<action></action>"]


def test_only_an_admissible_command_reaches_the_engine(begin):
  episode = begin(0, _limit=len(BAD) + 2)
  before = episode._commands
  asked = episode._seat._past.copy()
  for message in BAD:
    assert episode.step(message) == Turn(
      episode._with_commands(alfworld.NOTHING), 0.0, False, False
    )
  assert episode._commands == before and episode._seat._past == asked
  assert episode.step("<think>hm</think> <action> LOOK </action> so").valid
  assert episode.step("look") == Turn(episode.step("look").observation, 0.0, True, True)


def test_what_the_action_of_a_message_is():
  assert action_of("I <action>look</action> then <action>go to\nbed 1</action>.") == "go to\nbed 1"
  assert action_of("I look around.\n  Open drawer 1  \n\n") == "open drawer 1"
  assert action_of("<action>look") == "<action>look"


def test_a_turn_can_be_valid_by_its_form_alone(begin):
  episode = begin(0, _valid="format")
  good = "<think>I fly.</think><action>fly</action>"
  assert [episode.step(m).valid for m in (good, "look", good + "飞")] == [True, False, False]
  assert has_form(good) and not has_form("<action>look</action>")


def test_two_episodes_are_at_once_in_two_processes_and_a_killed_engine_costs_one(env, begin):
  episodes = [begin(index) for index in (0, 1)]
  lost, kept = (episode._seat._slot.child.pid for episode in episodes)
  assert lost != kept and {lost, kept} == set(env._pool.pids())
  third = begin(0)
  assert third._seat._slot is episodes[0]._seat._slot
  third.step("look")
  os.kill(lost, signal.SIGKILL)
  with pytest.raises(RuntimeError, match="ALFWorld's engine: its process ended"):
    episodes[0].step("look")
  assert episodes[1].step("look").valid and third.step("look").valid
  won = [third.step(command) for command in GAMES[0].walkthrough][-1]
  assert won.reward == 1.0


def test_many_threads_play_at_once(env):
  def play(index):
    episode = env.start(env.task("train", index))
    try:
      return [episode.step(command) for command in GAMES[index].walkthrough][-1].reward
    finally:
      episode.close()

  with concurrent.futures.ThreadPoolExecutor(6) as threads:
    assert list(threads.map(play, range(6))) == [1.0] * 6


def test_the_tiny_model_can_read_the_houses_of_a_smoke_run(env):
  c = config.load(f"{ROOT}/configs/agentic.py:world=alfworld,local")
  for split, count in (("train", 4), ("heldout", 2), ("unseen", 2)):
    for index in range(count):
      episode = env.start(env.task(split, index))
      (message,) = episode.prompt()
      episode.close()
      assert len(message["content"].encode()) <= c.data.max_prompt_tokens  # it reads by byte


def test_games_are_functions_of_seed_split_and_index():
  assert alfworld_games.make_game(0, "train", 3) == GAMES[3]
  assert alfworld_games.make_game(1, "train", 3) != GAMES[3]
  assert alfworld_games.make_game(0, "heldout", 3) != GAMES[3]
  kinds = {game.template.kind for game in GAMES}
  assert kinds == set(alfworld_games.KINDS)


def test_templates_of_unseen_are_in_no_other_split():
  shown = {
    split: {alfworld_games.make_game(0, split, index).template for index in range(300)}
    for split in alfworld_files.FOLDERS
  }
  assert not shown["unseen"] & (shown["train"] | shown["heldout"])
  assert shown["train"] & shown["heldout"] and len(shown["unseen"]) > 50


def write_game(root, folder, name, trial="trial_1", **changes):
  """Writes a game file of ALFWorld's layout."""
  path = root / "json_2.1.1" / folder / name / trial
  path.mkdir(parents=True)
  game = {"solvable": True, "grammar": '"rhs": "Your task is to: put a \\"hot\\" mug in bed."'}
  (path / "game.tw-pddl").write_text(json.dumps(game | changes))


def test_alfworlds_data_is_read_as_its_own_loader_does(tmp_path):
  root = tmp_path / "movable"  # the user's own directories mean nothing
  write_game(root, "train", "pick_heat_then_place_in_recep-Mug-None-Bed-301")
  write_game(root, "train", "pick_and_place_with_movable_recep-Mug-Cup-Bed-301")
  write_game(root, "train", "pick_and_place_simple-AppleSliced-None-Bed-301")
  write_game(root, "train", "pick_and_place_simple-Mug-None-Bed-301", solvable=False)
  write_game(root, "train", "pick_two_obj_and_place-Mug-None-Bed-301", solvable=None)
  (game,) = alfworld_files.find_games(str(root), "train")
  assert game.path.endswith("pick_heat_then_place_in_recep-Mug-None-Bed-301/trial_1/game.tw-pddl")
  assert game.template == ("pick_heat_then_place_in_recep", "Mug", "Bed")
  assert game.request == 'put a "hot" mug in bed'


def test_data_that_cannot_be_used_is_refused_in_one_line(tmp_path):
  with pytest.raises(SettingError) as error:
    alfworld_files.find_games(str(tmp_path), "heldout")
  message = str(error.value)
  assert "json_2.1.1/" in message and "alfworld-download" in message and "\n" not in message
  write_game(tmp_path, "valid_seen", "pick_and_place_simple-Mug-None-Bed-1", grammar="none")
  with pytest.raises(SettingError, match="game.tw-pddl is no game of ALFWorld"):
    alfworld_files.find_games(str(tmp_path), "heldout")


@needs_engine
def test_games_that_are_written_are_played_like_those_in_memory(tmp_path):
  alfworld_games.write_games(str(tmp_path), seed=0, count=2)
  env = Alfworld(data=str(tmp_path), processes=1)
  tasks = [env.task("train", index) for index in range(4)]
  assert tasks[0] == tasks[2] and tasks[0] != tasks[1]
  assert {task.data["template"] for task in tasks} == {"-".join(g.template) for g in GAMES[:2]}
  episode = env.start(tasks[0])
  (number,) = re.findall(r"trial_0_(\d)", tasks[0].data["game"])
  try:
    turns = [episode.step(command) for command in GAMES[int(number)].walkthrough]
    assert turns[-1].reward == 1.0 and tasks[0].prompt in episode.prompt()[0]["content"]
  finally:
    episode.close()
    env.close()


@needs_engine
def test_wrong_settings_and_a_missing_package_are_one_line(monkeypatch):
  for settings, message in [
    ({"valid": "always"}, "config.env.valid='always' is unknown"),
    ({"limit": 0}, "config.env.limit=0 must"),
    ({"processes": -1}, "config.env.processes=-1 at least 0"),
    ({"skill": "none"}, "config.env.skill='none' is unknown"),
    ({"skills": "/no/file"}, "config.env.skills='/no/file': No such file"),
  ]:
    with pytest.raises(ValueError, match=re.escape(message)):
      Alfworld(**settings)
  with pytest.raises(ValueError, match="the split"):
    Alfworld().task("test", 0)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  for make in (Alfworld, alfworld_games.read_rules):
    with pytest.raises(ValueError, match=r"pip install 'sdpo_jax\[textworld\]'"):
      make()


def test_the_skill_of_a_task_is_that_of_its_kind():
  content = json.loads((pathlib.Path(alfworld.OWN) / "alfworld.json").read_text())
  chosen = alfworld.Skills(content, where="test")
  assert content["skills"].keys() == alfworld_games.KINDS.keys()
  rng = random.Random(0)
  for name, kind in alfworld_games.KINDS.items():
    for wording in kind.wordings:
      for _ in range(10):
        item, place = rng.choice(sorted(alfworld_games.OBJECTS)), rng.choice(["shelf", "desklamp"])
        request = wording.format(item=item.lower(), place=place)
        if place == "shelf" or name == "look_at_obj_in_light":
          assert chosen.matching(f"Your task is to: {request}.") == [name]
