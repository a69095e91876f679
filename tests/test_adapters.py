"""Environments of other trainers, played here: each against a stand-in or the real package."""

import json
import sys

import pytest

from sdpo_jax.data.tasks import RowEnv
from sdpo_jax.envs.adapters import foreign, tool_calls
from sdpo_jax.envs.adapters.gym import GymText
from sdpo_jax.envs.adapters.openenv import OpenEnvText
from sdpo_jax.envs.adapters.trl import TRLTools
from sdpo_jax.envs.base import make_env, plays
from sdpo_jax.episodes import Played, Player
from sdpo_jax.errors import SettingError
from sdpo_jax.play import Room
from sdpo_jax.records import Sampling, Status
from tests import my_worlds
from tests.my_worlds import WORDS
from tests.test_episodes import CHAT, Scripted
from tests.turns import call, turns_of

RANGE = (-0.3, 1.0)
GUESS = "tests.my_worlds:Guess"


def word_of(seed):
  world = my_worlds.Guess()
  world.reset(seed=seed)
  return world.word


# ---- what they share


def test_no_two_tasks_of_any_split_share_a_seed():
  ends = [foreign.seed_of(split, i) for split in foreign.SPLITS for i in (0, foreign.SEEDS - 1)]
  assert ends == sorted(set(ends)) and foreign.seed_of("train", 7) == 7
  for split, index in (("test", 0), ("train", -1), ("train", foreign.SEEDS)):
    with pytest.raises(ValueError, match="split"):
      foreign.seed_of(split, index)


@pytest.mark.parametrize(
  ("reward", "share"), [(-1, 0.0), (3, 1.0), (1, 0.5), (3.000001, 1.0), (True, 0.5)]
)
def test_rewards_are_mapped_to_the_unit_interval(reward, share):
  assert foreign.Rewards((-1, 3)).mapped(reward) == share


@pytest.mark.parametrize("reward", [1.01, -0.01, float("nan"), float("inf"), None, "good"])
def test_a_reward_outside_of_the_range_is_no_reward(reward):
  with pytest.raises((ValueError, TypeError)):
    foreign.Rewards((0.0, 1.0)).mapped(reward)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.0, float("inf")), (0.0,), (0.0, 0.0)])
def test_a_range_that_is_none_is_refused(bounds):
  with pytest.raises(SettingError, match="config.env.reward_range"):
    GymText(world=GUESS, reward_range=bounds)


@pytest.mark.parametrize("world", ["tests.my_worlds:None_such", "no_module:Guess", "Guess", ""])
def test_a_world_that_cannot_be_imported_is_refused(world):
  with pytest.raises(SettingError, match=r"config\.env\.world=.*module\.path:name"):
    GymText(world=world)


@pytest.mark.parametrize("arguments", ["[1]", "{", "3"])
def test_arguments_that_are_no_object_are_refused(arguments):
  with pytest.raises(SettingError, match="config.env.arguments"):
    GymText(world=GUESS, arguments=arguments)


# ---- Gymnasium


def test_a_gym_world_is_played_and_its_words_are_kept():
  name = "sdpo_jax.envs.adapters.gym:GymText"
  env = make_env(name, sandbox=None, world=GUESS, reward_range=RANGE, instruction="Play.")
  assert plays(env)
  task = env.task("train", 3)
  assert task == env.task("train", 3) != env.task("tune", 3)
  word = word_of(3)
  wrong = next(w for w in WORDS if w != word)
  first, turns = turns_of(env, task, [wrong, f" {word}\n"])
  assert first == f"Play.\n\nGuess my word: {', '.join(WORDS)}."
  assert [t.observation for t in turns] == [f"No. It begins with {word[0]}.", "Right."]
  assert [t.reward for t in turns] == pytest.approx([0.2 / 1.3, 1.2 / 1.3])
  assert [t.done for t in turns] == [False, True]
  _, turns = turns_of(env, task, [wrong] * 3)
  assert turns[-1].done and turns[-1].reward == 0.0  # truncated there


def test_a_return_outside_of_the_range_ends_the_call_with_the_setting():
  env = GymText(world=GUESS)
  with pytest.raises(ValueError, match=r"reward -0\.1 lies outside config\.env\.reward_range"):
    turns_of(env, env.task("train", 0), ["nothing"])


def test_what_a_foreign_world_does_wrong_costs_its_episode():
  """The first player is right at once, the second leaves the range of rewards."""
  env = GymText(world=GUESS)
  word = word_of(0)
  player = Player(
    Played(env),
    CHAT,
    Scripted(lambda q, g, turn: [word, "nothing"][g]),
    Room(600, 900),
    threads=2,
    timeout_s=5,
  )
  (group,) = player.collect(
    None, [env.task("train", 0)], n=2, sampling=Sampling(12, stop_tokens=(257,)), seeds=[1]
  )
  player.close()
  assert [rollout.feedback.status for rollout in group] == [Status.SCORED, Status.ENV_FAILED]
  assert group[0].feedback.reward == 1.0 and group[0].feedback.text == f"> {word}\nRight."
  assert "set it to the lowest and the highest return" in group[1].feedback.text


class Numbers:
  """Shows no text, and wants to be closed."""

  closed = 0

  def reset(self, *, seed):
    return [seed], {}

  def close(self):
    Numbers.closed += 1


def test_a_world_without_text_says_so_and_is_closed():
  env = GymText(world="tests.test_adapters:Numbers")
  before = sys.modules["tests.test_adapters"].Numbers.closed
  with pytest.raises(ValueError, match="showed a list, not a str"):
    turns_of(env, env.task("train", 0), [])
  assert sys.modules["tests.test_adapters"].Numbers.closed == before + 1


def test_a_registered_gymnasium_world_is_made_by_its_id():
  gymnasium = pytest.importorskip("gymnasium")

  class Typed(gymnasium.Env):
    def __init__(self, tries):
      self.tries = tries

    def reset(self, *, seed=None, options=None):
      super().reset(seed=seed)
      return str(self.np_random.integers(1000)), {}

    def step(self, action):
      return action.upper(), 0.5, False, False, {}

  gymnasium.register("sdpo/Typed-v0", entry_point=Typed, max_episode_steps=2)
  arguments = {"id": "sdpo/Typed-v0", "tries": 2, "disable_env_checker": True}
  env = GymText(world="gymnasium:make", arguments=json.dumps(arguments))
  first, turns = turns_of(env, env.task("train", 0), ["a", "b"])
  assert first == turns_of(env, env.task("train", 0), [])[0]
  assert first != turns_of(env, env.task("train", 1), [])[0]
  assert [(t.observation, t.reward, t.done) for t in turns] == [("A", 0.5, False), ("B", 1.0, True)]


# ---- TRL


@pytest.fixture
def trl(tmp_path):
  """Makes the adapter over two rows; its loop ends with the test."""
  made = []

  def make(**settings):
    rows = tmp_path / "train.jsonl"
    rows.write_text(
      '{"prompt": "Find the word.", "secret": "apple"}\n'
      '{"prompt": [{"role": "system", "content": "Play."}, {"role": "user", "content": "Go."}], '
      '"secret": "sky"}\n'
    )
    env = TRLTools(world="tests.my_worlds:WordTools", **settings)
    made.append(RowEnv(env, (f"train={rows}",), splits=("train",)))
    return made[-1]

  yield make
  for env in made:
    env.close()


def test_a_class_for_trl_is_played_unchanged(trl):
  env = trl()
  messages = [
    f"Hm.\n<tool_call>\n{call('first_letter')}\n</tool_call>",
    call("guess", word="angle") + call("guess", word="apples"),
    call("guess", word="apple"),
    "I have found it.",
  ]
  first, turns = turns_of(env, env.task("train", 0), messages)
  assert first.endswith("\n\nFind the word. It has 5 letters.")
  assert "guess(word: str) -> str\n  Guesses the word.\n\n  Args:\n    word: in small" in first
  assert "first_letter() -> str" in first and "_hidden" not in first and "get_reward" not in first
  assert [t.observation for t in turns] == [
    "a",
    "wrong\n{'error': 'wrong length'}",
    "right",
    "No tool was called, which ends the episode.",
  ]
  assert [t.reward for t in turns] == [0.0, 0.0, 1.0, 1.0]
  assert [t.valid for t in turns] == [True, False, True, True]
  assert [t.done for t in turns] == [False, False, False, True]


def test_messages_of_a_row_and_a_reward_function_of_trl(trl):
  env = trl(reward="tests.my_worlds:few_guesses", reward_range=(-1.0, 1.0))
  task = env.task("train", 1)
  episode = env.start(task)
  system, user = episode.prompt()
  assert system == {"role": "system", "content": "Play."}
  assert user["content"].endswith("\n\nGo. It has 3 letters.")
  assert task.data["row"]["prompt"][1]["content"] == "Go."  # the row stays as it was
  assert episode.step(call("guess", word="sun")).reward == 0.375  # -0.25
  assert episode.step(call("guess", word="sky")).reward == 0.75  # 1 - 0.5


@pytest.mark.parametrize(
  ("message", "said"),
  [
    (call("nothing"), "Tool nothing not found."),
    (call("_hidden"), "Tool _hidden not found."),
    (call("reset", secret="a"), "Tool reset not found."),
    (call("guess"), "missing 1 required positional argument"),
    (call("guess", word=7), "has no len"),
  ],
)
def test_a_wrong_call_is_told_to_the_policy(trl, message, said):
  env = trl()
  _, (turn,) = turns_of(env, env.task("train", 0), [message])
  assert said in turn.observation and not turn.valid and not turn.done


def test_a_class_without_a_reward_needs_a_function():
  with pytest.raises(SettingError, match="set config.env.reward"):
    TRLTools(world="tests.my_worlds:Guess")


@pytest.mark.parametrize(
  ("message", "calls"),
  [
    ("", []),
    ("{", []),
    ('{"name": "a"}', [("a", {})]),
    ('x {"name": "a", "parameters": {"b": {"c": 1}}} y', [("a", {"b": {"c": 1}})]),
    ('{"name": "a", "arguments": "b"}', []),
    ('{"name": 3, "arguments": {}}', []),
    ('{"x": {"name": "a"}} {"name": "b"}', [("b", {})]),
    ('{"name": "a"}' * 100, [("a", {})] * tool_calls.MAX_OBJECTS),
    ('{"a":' * 20_000, []),
    ("{" * 100_000, []),
    ('{"name": "a", "arguments": {"b": ' + "9" * 5000 + "}}", []),
  ],
)
def test_calls_are_json_objects_with_a_name(message, calls):
  assert tool_calls.calls_in(message) == calls


# ---- OpenEnv


@pytest.fixture
def openenv():
  """Starts stand-ins of servers."""
  server = pytest.importorskip("websockets.sync.server")
  started = []

  def start(**settings):
    started.append(my_worlds.OpenEnv(server.serve, **settings))
    return started[-1]

  yield start
  for stand_in in started:
    stand_in.server.shutdown()


def test_a_world_behind_a_server_is_played(openenv):
  server = openenv()
  env = OpenEnvText(url=f"{server.url}/", observation="text", reward_range=RANGE)
  assert env.at_once == 1
  env.open()
  task = env.task("heldout", 2)
  word = word_of(task.data["seed"])
  for _ in range(5):  # a session ends before the next one asks for its only place
    first, turns = turns_of(env, task, ["\ud800", word])
    assert first.startswith("Guess my word") and turns[0].observation.startswith("No.")
    assert [t.done for t in turns] == [False, True]
    assert turns[1].reward == pytest.approx(1.2 / 1.3)
  assert server.opened == 6 and server.open == 0


def test_all_fields_of_an_observation_are_read_as_json(openenv):
  env = OpenEnvText(url=openenv().url)
  first, _ = turns_of(env, env.task("train", 0), [])
  assert json.loads(first) == {"text": f"Guess my word: {', '.join(WORDS)}.", "tries": 0}


def test_what_a_server_refuses_is_told(openenv):
  server = openenv()
  env = OpenEnvText(url=server.url, action="wrong")
  task = env.task("train", 0)
  with pytest.raises(RuntimeError, match="VALIDATION_ERROR: Invalid message: 'message'"):
    turns_of(env, task, ["apple"])
  with pytest.raises(RuntimeError, match=r"observation='code': the server shows \['text', 'tries'"):
    turns_of(OpenEnvText(url=server.url, observation="code"), task, [])
  held = env.start(task)
  held.prompt()
  with pytest.raises(RuntimeError, match="CAPACITY_REACHED: Server at capacity"):
    turns_of(env, task, [])
  held.close()
  server.server.shutdown()
  with pytest.raises(RuntimeError, match="does not answer"):
    env.open()


@pytest.mark.parametrize(
  "settings", [{"url": "127.0.0.1:8000"}, {"url": "http://x", "sessions": 0}]
)
def test_settings_of_a_server_are_checked(settings):
  pytest.importorskip("websockets")
  with pytest.raises(SettingError, match="config.env"):
    OpenEnvText(**settings)
