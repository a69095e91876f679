"""Tests the text world of our own: its rules, its wording, its splits."""

import collections
import random

import pytest

from sdpo_jax.envs.agents import household
from sdpo_jax.envs.agents.household import Goal, Household, World

GOAL = Goal(("heat", "blick"), ("oven", "mixer"), "egg", "desk", "shelf")


def play(world, commands):
  return [world.step(command) for command in commands]


def test_the_walkthrough_wins_in_the_fewest_turns():
  turns = play(World(GOAL, "default", 10), household.walkthrough(GOAL))
  assert [turn.reward for turn in turns] == [0.0] * 7 + [1.0]
  assert [turn.done for turn in turns] == [False] * 7 + [True]
  assert all(turn.valid for turn in turns) and len(turns) == 8
  assert [turn.observation for turn in turns] == [
    "You arrive at desk. On the desk, you see a egg.",
    "You pick up the egg from the desk.",
    "You arrive at oven.",
    "You use the oven on the egg.",
    "You arrive at mixer.",
    "You use the mixer on the egg.",
    "You arrive at shelf.",
    "You put the egg on the shelf.",
  ]


@pytest.mark.parametrize(
  "commands",
  [
    ["go desk", "take egg", "go mixer", "use mixer", "go oven", "use oven", "go shelf", "put egg"],
    ["go desk", "take egg", "go oven", "use oven", "go shelf", "put egg"],
    ["go desk", "take egg", "go oven", "use oven", "use oven", "go mixer", "use mixer"]
    + ["go shelf", "put egg"],
    [*household.walkthrough(GOAL)[:-2], "go bed", "put egg"],
  ],
)
def test_other_orders_numbers_and_places_win_nothing(commands):
  last = play(World(GOAL, "default", 10), commands)[-1]
  assert last.done and last.valid and last.reward == 0.0


@pytest.mark.parametrize(
  "message",
  ["", "\n\n", "take egg", "use oven", "put egg", "go", "go moon", "go desk\x00", "x" * 10**5],
)
def test_what_is_not_admissible_changes_nothing_and_costs_a_turn(message):
  world = World(GOAL, "default", 3)
  before = world.commands()
  turn = world.step(message)
  assert turn == household.Turn(household.NOTHING, 0.0, False, valid=False)
  assert world.commands() == before
  assert [world.step(message).done for _ in range(2)] == [False, True]


def test_an_action_is_the_last_line_that_says_something():
  assert household.action_of("I think.\n> go desk\n\n") == "go desk"
  assert household.action_of("  go desk  ") == "go desk"


def test_commands_are_those_that_are_carried_out():
  """A random player: every admissible command is valid, and never two at once win."""
  rng = random.Random(0)
  env = Household()
  for index in range(50):
    world = env.start(env.task("train", index))
    done = False
    while not done:
      turn = world.step(rng.choice(world.commands()))
      done = turn.done
      assert turn.valid


def test_splits_are_disjoint_and_the_words_mean_the_same_in_all():
  env = Household(words_seed=3)
  templates = {
    split: {
      (tuple(t.data["goal"][0]), t.data["goal"][2], t.data["goal"][4])
      for t in (env.task(split, i) for i in range(400))
    }
    for split in household.SPLITS
  }
  assert not templates["unseen"] & (templates["train"] | templates["heldout"] | templates["tune"])
  assert templates["train"] & templates["heldout"]
  meaning = household.meanings(3)
  kinds = collections.Counter()
  for split in household.SPLITS:
    for i in range(400):
      task = env.task(split, i)
      kinds[task.data["kind"]] += 1
      for word, appliance in zip(*task.data["goal"][:2], strict=True):
        assert meaning.get(word, appliance) == appliance
        assert word in meaning or household.KNOWN[appliance] == word
  # half of the tasks have two processes, half of the processes a novel word
  expected = {
    "0 novel of 1": 1 / 4,
    "1 novel of 1": 1 / 4,
    "0 novel of 2": 1 / 8,
    "1 novel of 2": 1 / 4,
    "2 novel of 2": 1 / 8,
  }
  assert kinds.keys() == expected.keys()
  assert all(abs(kinds[kind] / 1600 - share) < 0.04 for kind, share in expected.items())


def test_a_novel_word_stands_in_the_skill_alone():
  env = Household()
  skills = env.skills()
  for word, appliance in household.meanings(0).items():
    assert skills["skills"][word] == f"{word} means the {appliance}."
  task = next(
    t for t in map(lambda i: env.task("train", i), range(99)) if "1 novel" in t.data["kind"]
  )
  world = env.start(task)
  (message,) = world.prompt()
  assert task.prompt in message["content"] and "means" not in message["content"]


def test_at_the_level_search_the_task_hides_where_the_object_is():
  default, search = (Household(level=level).task("train", 0).prompt for level in household.LEVELS)
  assert " is on the " in default and " is on the " not in search
  with pytest.raises(ValueError, match="config.env.level='hard' is unknown"):
    Household(level="hard")
  with pytest.raises(ValueError, match="split"):
    Household().task("test", 0)


def test_tasks_are_the_same_on_any_machine():
  assert Household().task("train", 0) == Household().task("train", 0)
  assert Household().task("train", 0) != Household(words_seed=1).task("train", 0)
