"""Environments of other trainers, played here: each against a stand-in or the real package."""

import importlib.util
import json
import sys
import types

import pytest

from sdpo_jax import play
from sdpo_jax.data.tasks import RowEnv
from sdpo_jax.envs.adapters import foreign, reasoning_gym, tool_calls
from sdpo_jax.envs.adapters.gym import GymText
from sdpo_jax.envs.adapters.openenv import OpenEnvText
from sdpo_jax.envs.adapters.reasoning_gym import ReasoningGym
from sdpo_jax.envs.adapters.trl import TRLTools
from sdpo_jax.envs.adapters.verifiers import Verifiers
from sdpo_jax.envs.base import make_env, plays
from sdpo_jax.errors import SettingError
from tests import my_worlds
from tests.my_worlds import WORDS

RANGE = (-0.3, 1.0)
GUESS = "tests.my_worlds:Guess"


def turns_of(env, task, messages):
  """Plays an episode as the player does; returns its first text and its turns."""
  episode = env.start(task)
  try:
    first = episode.prompt()[-1]["content"]
    return first, [play.checked(episode.step(message)) for message in messages]
  finally:
    episode.close()


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


def call(name, **arguments):
  return json.dumps({"name": name, "arguments": arguments})


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


# ---- packages that are missing


@pytest.mark.parametrize(
  ("make", "package"),
  [
    (lambda: OpenEnvText(url="http://127.0.0.1:1"), "websockets"),
    (lambda: Verifiers(world="x"), "verifiers"),
    (lambda: ReasoningGym(generators="leg_counting"), "reasoning_gym"),
  ],
)
def test_a_missing_package_is_named_with_its_extra(make, package, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  extra = {"websockets": "openenv"}.get(package, package)
  with pytest.raises(SettingError, match=rf"package {package}, .*sdpo_jax\[{extra}\]"):
    make()


# ---- verifiers


class Message(dict):
  """A message as verifiers has them: fields by name and by key."""

  def __init__(self, **fields):
    super().__init__(fields)

  __getattr__ = dict.__getitem__


class Rubric:
  async def score_rollout(self, state):
    said = [m.content for m in state["completion"] if m.role == "assistant"]
    state["reward"] = float(state["answer"] in said)


class WordEnv:
  """Does what MultiTurnEnv does with a state, and `env_response` besides."""

  def __init__(self, tools):
    self.rubric, self.tools, self.cleaned = Rubric(), tools, 0

  def build_dataset(self):
    prompt = [{"role": "user", "content": "Guess."}]
    return [{"prompt": prompt, "answer": word, "example_id": i} for i, word in enumerate(WORDS)]

  def build_eval_dataset(self):
    return None

  async def init_state(self, row, client, model):
    assert type(client).__mro__[1].__name__ == "Client"
    prompt = [Message(**m) for m in row["prompt"]]
    return {"prompt": prompt, "answer": row["answer"], "trajectory": [], "trajectory_id": "1"}

  async def setup_state(self, state):
    state["tool_defs"] = self.tools

  async def add_trajectory_step(self, state, step):
    state["trajectory"].append(step)

  async def is_completed(self, state):
    return len(state["trajectory"]) == 3 or "final_env_response" in state

  async def get_prompt_messages(self, state):
    if not state["trajectory"]:
      return state["prompt"]
    last = state["trajectory"][-1]
    messages = [*last["prompt"], *last["completion"]]
    return messages + await self.env_response(messages, state)

  async def env_response(self, messages, state):
    if messages[-1].tool_calls:
      (made,) = messages[-1].tool_calls
      return [Message(role="tool", content=f"{made['name']}: {json.loads(made['arguments'])}")]
    if messages[-1].content == state["answer"]:
      state["final_env_response"] = [Message(role="user", content="Yes!")]
      return state["final_env_response"]
    return [Message(role="user", content=[{"type": "text", "text": "No."}])]

  async def render_completion(self, state):
    last = state["trajectory"][-1]
    state["completion"] = [*last["prompt"], *last["completion"]][len(state["prompt"]) :]

  async def cleanup(self, state):
    await self.render_completion(state)
    self.cleaned += 1


@pytest.fixture
def verifiers(monkeypatch):
  """Puts a stand-in of the package in its place."""
  package = types.ModuleType("verifiers")
  package.load_environment = lambda world, tools=(): WordEnv([Message(**t) for t in tools])
  package.types = types.ModuleType("verifiers.types")
  package.types.AssistantMessage = lambda **fields: Message(role="assistant", **fields)
  package.clients = types.ModuleType("verifiers.clients")

  class Client:
    __abstractmethods__ = frozenset({"close"})

    def __init__(self, client):
      assert client is None

  package.clients.Client = Client
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
  for module in (package, package.types, package.clients):
    monkeypatch.setitem(sys.modules, module.__name__, module)
  envs = []

  def make(**settings):
    envs.append(Verifiers(world="words", **settings))
    return envs[-1]

  yield make
  for env in envs:
    env.close()


def test_an_environment_of_verifiers_is_played(verifiers):
  env = verifiers()
  task = env.task("train", 5)
  assert (task.id, task.prompt, task.solution) == ("words/train/1", "Guess.", "bread")
  first, turns = turns_of(env, task, ["chair", "bread"])
  assert first == "Guess."
  assert [tuple(t[:3]) for t in turns] == [("No.", 0.0, False), ("Yes!", 1.0, True)]
  _, turns = turns_of(env, task, ["chair"] * 3)
  assert [tuple(t[:3]) for t in turns[1:]] == [("No.", 0.0, False), ("", 0.0, True)]
  turns_of(env, task, ["chair"])  # given up in the middle
  assert env.env.cleaned == 3  # once an episode
  with pytest.raises(ValueError, match="words has no rows for 'heldout'"):
    env.task("heldout", 0)


def test_tools_of_verifiers_are_shown_and_called(verifiers):
  tool = {"name": "ask", "description": "Asks.", "parameters": {"type": "object"}}
  env = verifiers(arguments=json.dumps({"tools": [tool]}))
  first, turns = turns_of(env, env.task("train", 0), [f"Hm {call('ask', a=1)}", "apple"])
  assert first.endswith('ask {"type": "object"}\n  Asks.\n\nGuess.')
  assert [t.observation for t in turns] == ["ask: {'a': 1}", "Yes!"]
  assert env.env.tools[0].name == "ask"


# ---- reasoning-gym


class DataSet:
  """Stands for a generator: item i of seed s asks for s + i."""

  def __init__(self, seed):
    self.seed = seed

  def __getitem__(self, place):
    number = str(self.seed + place)
    return {"question": f"Write {number}.", "answer": number, "metadata": {}}

  def score_answer(self, answer, entry):
    return 1.0 if int(answer) == int(entry["answer"]) else 0.25


@pytest.fixture
def gym_package(monkeypatch):
  package = types.ModuleType("reasoning_gym")

  def create_dataset(name, seed, size, **arguments):
    if name == "unknown":
      raise ValueError("Dataset 'unknown' not registered")
    return DataSet(seed, **arguments)

  package.create_dataset = create_dataset
  monkeypatch.setitem(sys.modules, "reasoning_gym", package)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)


def test_generators_ask_by_turns_and_no_seed_comes_twice(gym_package):
  env = ReasoningGym(generators="one, two")
  tasks = [env.task("train", i) for i in range(4 * reasoning_gym.CHUNK)]
  assert [t.data["kind"] for t in tasks[:4]] == ["one", "two"] * 2
  numbers = [int(t.solution[8:-9]) for t in tasks]
  assert numbers == [i // 2 for i in range(len(tasks))]
  assert int(env.task("heldout", 0).solution[8:-9]) == 2 * foreign.SEEDS
  assert not plays(env)


@pytest.mark.parametrize(
  ("response", "reward", "text"),
  [
    ("So <answer> 7 </answer>", 1.0, ""),
    ("<answer>1</answer><answer>7</answer>", 1.0, ""),
    ("<answer>8</answer>", 0.25, 'Wrong answer\n"8" scores 0.25 of 1.'),
    ("7", 0.0, "Wrong format\nThe answer must stand between <answer> and </answer>."),
    ("<answer>x</answer>", 0.0, "Wrong format\nThe answer cannot be read: invalid literal"),
    ("<answer>" + "7" * 10_001 + "</answer>", 0.0, "Wrong format\nThe answer has more than 10000"),
    ("<think><answer>7</answer>", 0.0, "Wrong format"),
  ],
)
def test_feedback_says_what_can_be_told(gym_package, response, reward, text):
  env = ReasoningGym(generators="one")
  feedback = env.judge(env.task("train", 7), response)
  assert feedback.reward == reward and feedback.text.startswith(text)


def test_generators_that_run_answers_are_refused(gym_package):
  with pytest.raises(SettingError, match="n_queens would evaluate what the policy answers"):
    ReasoningGym(generators="one,n_queens")
  with pytest.raises(SettingError, match="'unknown': Dataset 'unknown' not registered"):
    ReasoningGym(generators="unknown")
  with pytest.raises(SettingError, match="unexpected keyword"):
    ReasoningGym(generators="one", arguments='{"colour": 1}')
  env = ReasoningGym(generators="countdown")
  for answer in ("__import__('os').getcwd()", "9**9**9**9", "open", "9 ** 9", "1+" * 101 + "1"):
    feedback = env.judge(env.task("train", 0), f"<answer>{answer}</answer>")
    assert feedback.text.startswith("Wrong format\nThe answer must consist of numbers")


def test_the_real_generators():
  """Those whose scoring evaluates the answer are the ones that are known to."""
  pytest.importorskip("reasoning_gym")
  import inspect

  from reasoning_gym.factory import DATASETS

  sources = {name: inspect.getsource(cls.score_answer) for name, (cls, _) in DATASETS.items()}
  own = {"number_sorting", "propositional_logic"}  # their own answer, a parser of their own
  running = {n for n, s in sources.items() if any(f"{f}(" in s for f in ("eval", "parse_expr"))}
  assert running - own == reasoning_gym.EVALUATING | reasoning_gym.ARITHMETIC
  env = ReasoningGym(generators="leg_counting,countdown,prime_factorization")
  for index in (0, 1, 2, 1501):
    task = env.task("train", index)
    assert task == env.task("train", index) != env.task("tune", index)
    assert env.judge(task, task.solution).reward == 1.0
    wrong = env.judge(task, "<answer>zzz</answer>")
    assert wrong.reward < 0.1 and wrong.text.startswith("Wrong")
