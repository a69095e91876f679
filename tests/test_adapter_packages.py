"""Environments of verifiers and of reasoning-gym, played here by stand-ins of the packages."""

import importlib.util
import json
import sys
import types

import pytest

from sdpo_jax.envs.adapters import foreign, reasoning_gym
from sdpo_jax.envs.adapters.openenv import OpenEnvText
from sdpo_jax.envs.adapters.reasoning_gym import ReasoningGym
from sdpo_jax.envs.adapters.verifiers import Verifiers
from sdpo_jax.envs.base import plays
from sdpo_jax.errors import SettingError
from tests.my_worlds import WORDS
from tests.turns import call, turns_of

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


def load_environment():
  """Makes an environment as a package for verifiers does: this file is its module."""
  import datasets
  import verifiers as vf

  class Words(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
      if messages[-1].content != state["answer"]:
        return [vf.UserMessage(content="No.")]
      state["final_env_response"] = [vf.UserMessage(content="Yes!")]
      return state["final_env_response"]

  def right(completion, answer):
    return float(any(m["content"] == answer for m in completion))

  rows = datasets.Dataset.from_list([{"question": "Guess.", "answer": word} for word in WORDS])
  return Words(dataset=rows, rubric=vf.Rubric(funcs=[right]), max_turns=3)


def test_a_real_environment_of_verifiers():
  pytest.importorskip("verifiers", minversion="0.3.0")
  sys.modules["words_of_ours"] = sys.modules[__name__]
  env = Verifiers(world="words_of_ours")
  task = env.task("train", 5)
  first, turns = turns_of(env, task, ["chair", "bread"])
  assert first == task.prompt == "Guess."
  assert [tuple(t[:3]) for t in turns] == [("No.", 0.0, False), ("Yes!", 1.0, True)]
  _, turns = turns_of(env, task, ["chair"] * 3)
  assert [t.done for t in turns] == [False, False, True] and turns[-1].reward == 0.0
  env.close()
