"""Episodes: worlds answer turns, and whatever one of them does costs itself alone."""

import dataclasses
import functools
import threading
import time

import numpy as np
import pytest

from sdpo_jax import config
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.conversation import Continuation, Conversation
from sdpo_jax.diagnose import mode as diagnose_mode
from sdpo_jax.discover import mode as discover_mode
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.envs.agents.household import Household, World, walkthrough
from sdpo_jax.episodes import Played, Player
from sdpo_jax.errors import SettingError, TaskError
from sdpo_jax.play import Room
from sdpo_jax.records import Completion, Request, Sampling, Status, Turn
from sdpo_jax.rollout import prompt_seed
from sdpo_jax.stored import restored, stored
from tests import fakes

CHAT = Chat(fakes.ByteTokenizer(), thinking=False, eos_ids=(257,))
SAMPLING = Sampling(12, stop_tokens=(257,))


class Scripted:
  """An engine that says what a function of (question, episode, turn) says."""

  samples_alone = True

  def __init__(self, say):
    self.say, self.asked = say, []

  def load(self, params, version):
    self.version = version

  def unload(self):
    pass

  def generate(self, requests):
    while True:
      requests.wait(for_all=True)
      batch = []
      while (request := requests.take()) is not None:
        batch.append(request)
      if not batch:
        return
      for request in batch:
        self.asked.append(request)
        text = self.say(*request.key)
        tokens = CHAT.text_tokens(text)[: request.sampling.max_new_tokens]
        is_whole = len(tokens) < request.sampling.max_new_tokens
        tokens += [257] if is_whole else []
        completion = Completion(
          request.key, 0, tokens, [-0.5] * len(tokens), "stop" if is_whole else "length", 3
        )
        requests.hand_out(completion)
        yield completion


@pytest.fixture
def play():
  """Plays n episodes of some tasks of an environment; all threads end with the test."""
  players = []

  def collect(env, engine, *, count=2, n=2, sampling=SAMPLING, **settings):
    settings = dict(threads=3, timeout_s=5) | settings
    room = {key: settings.pop(key) for key in Room._fields if key in settings}
    room = Room(**dict(max_prompt_tokens=600, max_episode_tokens=900) | room)
    player = Player(Played(env), CHAT, engine, room, **settings)
    players.append(player)
    tasks = [env.task("train", i) for i in range(count)]
    return tasks, player.collect(None, tasks, n=n, sampling=sampling, seeds=[11, 12][:count])

  yield collect
  for player in players:
    player.close()


def by_heart(env, tasks=2):
  """A policy that knows the way."""
  ways = [walkthrough(env.start(env.task("train", q))._goal) for q in range(tasks)]
  return lambda q, g, turn: ways[q][min(turn, len(ways[q]) - 1)]


def test_who_knows_the_way_is_rewarded(play):
  env = Household()
  engine = Scripted(by_heart(env))
  tasks, groups = play(env, engine)
  for q, group in enumerate(groups):
    for rollout in group:
      way = walkthrough(env.start(tasks[q])._goal)
      assert rollout.feedback.reward == 1.0 and rollout.is_judged
      assert rollout.finish_reason == "done" and len(rollout.turns) == len(rollout.sampled)
      assert all(turn.valid for turn in rollout.turns)
      assert [CHAT.response_text(s.completion.tokens) for s in rollout.sampled] == way
      assert f"> {way[0]}\nYou arrive at" in rollout.feedback.text
      assert rollout.tokens == sum((s.completion.tokens for s in rollout.sampled), [])
  prompts = {request.key: request.prompt for request in engine.asked}
  rollout = groups[1][0]
  text = list(rollout.prompt_tokens)
  for turn, (_, completion, before, _) in enumerate(rollout.sampled):
    text += before
    assert prompts[1, 0, turn] == text  # what was fed is what is trained
    text += completion.tokens
  assert len({request.seed for request in engine.asked}) == len(engine.asked)


def test_what_the_policy_may_not_do_costs_a_turn_alone(play):
  env = Household()
  way = by_heart(env)
  tasks, groups = play(env, Scripted(lambda q, g, t: way(q, g, t // 2) if t % 2 else "dance"), n=1)
  for (rollout,) in groups:
    assert [turn.valid for turn in rollout.turns[:4]] == [False, True, False, True]
    assert rollout.turns[0].observation == "Nothing happens."


class Broken(Household):
  """Episodes that do what a table says, in the order of their start."""

  def __init__(self, what):
    super().__init__()
    self.what, self.started, self.open, self.most, self.steps = what, [], 0, 0, 0
    self.awaited = 0  # steps of others that an episode "after" waits for
    self.lock = threading.Lock()

  def start(self, task):
    with self.lock:
      number = len(self.started)
      self.started.append(task.id)
      self.open += 1
      self.most = max(self.most, self.open)
    what = self.what.get(number, "")
    if what == "start":
      raise RuntimeError("no world today")
    world = super().start(task)
    return _Wrapped(self, world, what)


class _Wrapped:
  def __init__(self, env: Broken, world: World, what: str):
    self.env, self.world, self.what = env, world, what

  def prompt(self):
    return self.world.prompt()

  def step(self, message):
    if self.what == "raise":
      raise OSError("the engine has died")
    if self.what in ("hang", "slow"):
      time.sleep(2 if self.what == "hang" else 0.5)
    until = time.monotonic() + 60
    while self.what == "after" and self.env.steps < self.env.awaited and time.monotonic() < until:
      time.sleep(0.01)
    with self.env.lock:
      self.env.steps += 1
    garbage = {"reward": Turn("well", 1.5, False), "nan": Turn("well", float("nan"), True)}
    garbage |= {"text": Turn(None, 0.0, False), "nothing": None}
    return garbage[self.what] if self.what in garbage else self.world.step(message)

  def close(self):
    with self.env.lock:
      self.env.open -= 1
    if self.what == "close":
      raise OSError("already gone")


def all_closed(env):
  """Waits for the thread that hung in a world, which closes it."""
  deadline = time.monotonic() + 5
  while env.open and time.monotonic() < deadline:
    time.sleep(0.05)
  assert env.open == 0


@pytest.mark.parametrize("what", ["raise", "hang", "reward", "nan", "text", "nothing"])
def test_a_broken_world_costs_its_own_episode(play, what, caplog):
  env = Broken({1: what, 3: "close"})
  tasks, groups = play(env, Scripted(by_heart(Household())), timeout_s=0.5, threads=1)
  episodes = [rollout for group in groups for rollout in group]
  lost = [rollout for rollout in episodes if not rollout.is_judged]
  assert len(lost) == 1 and lost[0].feedback.status is Status.ENV_FAILED
  assert lost[0].finish_reason == "lost" and lost[0].feedback.text
  assert [r.feedback.reward for r in episodes if r.is_judged] == [1.0] * 3
  all_closed(env)
  assert tasks[0].id in caplog.text


def test_a_world_that_does_not_start_costs_its_own_episode(play):
  env = Broken({2: "start"})
  _, groups = play(env, Scripted(by_heart(Household())))
  rollouts = [rollout for group in groups for rollout in group]
  (lost,) = [rollout for rollout in rollouts if not rollout.is_judged]
  assert lost.tokens == [] and lost.prompt_tokens == [] and "no world today" in lost.feedback.text


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_worlds_are_open_than_there_may_be(play, at_once):
  env = Broken({2: "raise"})
  env.at_once = at_once
  engine = Scripted(by_heart(Household()))
  _, groups = play(env, engine, n=4)
  assert env.most <= at_once and env.open == 0
  rollouts = [rollout for group in groups for rollout in group]
  assert sum(rollout.is_judged for rollout in rollouts) == 7
  assert sum(rollout.feedback.reward for rollout in rollouts) == 7


def test_an_episode_ends_where_its_next_turn_has_no_room(play):
  env = Household()
  tokens = 200
  _, groups = play(env, Scripted(by_heart(env)), max_episode_tokens=tokens)
  for rollout in (rollout for group in groups for rollout in group):
    used = len(rollout.tokens) + sum(len(segment.before) for segment in rollout.sampled)
    assert rollout.finish_reason == "budget" and used <= tokens and len(rollout.turns) > 1
    assert rollout.is_judged and rollout.feedback.reward == 0.0


def test_a_turn_that_is_cut_off_is_invalid(play):
  env = Household()
  way = by_heart(env)
  long = dataclasses.replace(SAMPLING, max_new_tokens=len(way(0, 0, 0)))
  _, groups = play(env, Scripted(way), count=1, n=1, sampling=long)
  ((rollout,),) = groups
  first, second = rollout.sampled[:2]
  assert first.completion.finish_reason == "length" and not rollout.turns[0].valid
  assert second.before[0] == 257  # the end of turn that was not sampled
  assert 257 not in first.completion.tokens


def test_first_messages_that_are_too_long_name_the_setting(play):
  with pytest.raises(TaskError, match="config.data.max_prompt_tokens=20"):
    play(Household(), Scripted(lambda q, g, t: ""), max_prompt_tokens=20)


def test_episodes_come_back_as_they_were(play):
  env = Broken({1: "raise", 2: "start"})
  tasks, groups = play(env, Scripted(by_heart(Household())))
  assert restored(tasks, stored(groups)) == groups


def test_episodes_equal_those_of_a_player_that_plays_one_after_another(play):
  """The engine is given one conversation at a time, and whole prompts instead of a cache."""
  config, params = fakes.toy_model(vocab=258)
  sampling = dataclasses.replace(SAMPLING, max_new_tokens=5)
  env = Household(limit=4)
  engine = LocalEngine(config, rows=4)
  load = engine.load
  engine.load = lambda _, version: load(params, version)

  tasks, groups = play(env, engine, sampling=sampling)
  engine.load(None, 0)
  continuation = Continuation(CHAT)
  for q, task in enumerate(tasks):
    for g in range(2):
      world = env.start(task)
      conversation = Conversation(continuation, world.prompt())
      for turn in range(4):
        seed = prompt_seed([11, 12][q], "turn", g, turn)
        (completion,) = engine.generate([Request("", conversation.prompt, 1, sampling, seed)])
        conversation.add_response(completion)
        answer = world.step(CHAT.response_text(completion.tokens).strip())
        if answer.done:
          break
        conversation.add_message(answer.observation)
      (row,) = conversation.rows()
      rollout = groups[q][g]
      assert rollout.tokens == row.tokens and rollout.turns[-1].done
      np.testing.assert_allclose(rollout.logp, row.logp, atol=1e-4)
      assert [s.before for s in rollout.sampled] == [s.before for s in row.sampled]


def test_turns_are_sampled_while_a_world_is_at_work_if_that_is_asked_for(play):
  """The ids are the same either way; only who is sampled before whom differs."""
  config, params = fakes.toy_model(vocab=258)
  sampling = dataclasses.replace(SAMPLING, max_new_tokens=5)
  tokens, orders = [], []
  for deterministic in (True, False):
    # step by step the others wait for it; else it answers after the nine turns of the others
    env, order = Broken({0: "slow" if deterministic else "after"}), []
    env._limit, env.awaited = 3, 9
    engine = LocalEngine(config, rows=4, chunk=8, deterministic=deterministic)
    load, generate = engine.load, engine.generate
    engine.load = functools.partial(lambda load, _, version: load(params, version), load)

    def noting(requests, generate=generate, order=order):
      for completion in generate(requests):
        order.append(completion.key)
        yield completion

    engine.generate = noting
    _, groups = play(env, engine, sampling=sampling, threads=4)
    tokens.append([[rollout.tokens for rollout in group] for group in groups])
    orders.append(order)
  assert tokens[0] == tokens[1]
  step_by_step, overlapped = orders
  turns = [turn for _, _, turn in step_by_step]
  assert turns == sorted(turns) == [0] * 4 + [1] * 4 + [2] * 4
  # whichever episode was started first is slow, and the others end before its second turn
  assert len({key[:2] for key in overlapped[-2:]}) == 1 and len(overlapped) == 12


class Stubborn(Broken):
  """Episodes whose end is never over."""

  def start(self, task):
    wrapped = super().start(task)
    wrapped.close = lambda: time.sleep(3)
    return wrapped


def test_a_world_that_does_not_close_holds_nobody_up(play):
  _, groups = play(Stubborn({}), Scripted(by_heart(Household())), timeout_s=0.3, threads=1, n=1)
  assert [group[0].feedback.reward for group in groups] == [1.0, 1.0]


def test_a_hanging_world_is_closed_by_the_thread_that_is_in_it(play):
  env = Broken({1: "hang"})
  _, groups = play(env, Scripted(by_heart(Household())), timeout_s=0.3, threads=1, n=1)
  assert sum(not group[0].is_judged for group in groups) == 1
  all_closed(env)


def test_words_that_no_template_takes_cost_their_episode(play, monkeypatch):
  real = Conversation.add_message

  def add_message(self, text):
    if "You pick up" in text:
      raise SettingError("not this one")
    real(self, text)

  monkeypatch.setattr(Conversation, "add_message", add_message)
  _, groups = play(Household(), Scripted(by_heart(Household())), n=1)
  assert not any(group[0].is_judged for group in groups)
  assert "not this one" in groups[0][0].feedback.text


def test_what_needs_single_responses_refuses_episodes():
  c = config.load("configs/agentic.py:context=row")
  c.train.probe_teacher_every_steps = 5
  with pytest.raises(ValueError, match="steps=5 asks for single responses, and .*'household'"):
    config.validate(c)
  c = config.load("configs/agentic.py:context=row,method=counterfactual")
  with pytest.raises(ValueError, match="name='notes' asks for single responses"):
    config.validate(c)
  c = config.load("configs/agentic.py")
  for mode in (diagnose_mode, discover_mode):
    with pytest.raises(ValueError, match="plays episodes"):
      mode.check(c)


def test_an_engine_that_is_stopped_leaves_no_world_open(play):
  """Worlds that wait are closed at once, one that is in a call when that ends, and none begins."""
  env = Broken({0: "slow"})
  env.at_once = 3

  class Stopped(Scripted):
    def generate(self, requests):
      for number, completion in enumerate(super().generate(requests)):
        if number == 3:
          raise KeyboardInterrupt
        yield completion

  with pytest.raises(KeyboardInterrupt):
    play(env, Stopped(by_heart(Household())), n=4)
  all_closed(env)
  time.sleep(0.7)
  all_closed(env)
  assert len(env.started) == 3


def test_it_is_asked_whether_to_stop_before_a_world_starts(play):
  env = Broken({})

  def stop():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    play(env, Scripted(by_heart(Household())), check_stop=stop)
  assert not env.started
