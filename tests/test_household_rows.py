"""Pre-training rows of the household: what a run would feed, by an expert who stumbles."""

import collections
import dataclasses

import pytest

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.household_rows import HouseholdRows, Mixture, build_tokenizer
from sdpo_jax.envs.agents import household
from sdpo_jax.envs.agents.household import APPLIANCES, KNOWN, LIMIT, Household, World
from sdpo_jax.envs.agents.skills import Skills
from sdpo_jax.episodes import Played, Player
from sdpo_jax.play import Room
from sdpo_jax.records import Completion, Sampling, Task
from sdpo_jax.text import SKILL_TEMPLATE

CHAT = Chat(build_tokenizer())
STOP = CHAT.stop_tokens[0]
SURE = dict(inadmissible=0.0, wrong=0.0)  # an expert who never stumbles


def rows_with(**settings):
  return HouseholdRows(CHAT, dataclasses.replace(Mixture(), **settings))


def world_of(row):
  return World(row.goal, "default" if "is on the" in row.message else "search", LIMIT)


class Replayed:
  """An environment whose tasks are rows; the world is their own."""

  def start(self, task):
    world = world_of(task.data["row"])
    message = {"role": "user", "content": task.data["row"].message}
    world.prompt = lambda: [message]
    return world


class Recited:
  """An engine that says the commands of rows."""

  samples_alone = True

  def __init__(self, rows):
    self.rows = rows

  def load(self, params, version):
    pass

  def unload(self):
    pass

  def generate(self, requests):
    while True:
      requests.wait(for_all=True)
      request = requests.take()
      if request is None:
        return
      q, _, turn = request.key
      tokens = CHAT.text_tokens(self.rows[q].steps[turn].command) + [STOP]
      completion = Completion(request.key, 0, tokens, [0.0] * len(tokens), "stop")
      requests.hand_out(completion)
      yield completion


def test_a_row_is_what_a_run_feeds():
  rows = HouseholdRows(CHAT)
  episodes = [rows.episode(3, i) for i in range(40)]
  player = Player(
    Played(Replayed()),
    CHAT,
    Recited(episodes),
    Room(500, 500),
    threads=1,
    timeout_s=30,
  )
  tasks = [Task(f"row/{i}", "", data={"row": row}) for i, row in enumerate(episodes)]
  try:
    sampling = Sampling(8, stop_tokens=(STOP,))
    groups = player.collect(None, tasks, n=1, sampling=sampling, seeds=list(range(40)))
  finally:
    player.close()
  for i, (rollout,) in enumerate(groups):
    tokens, weights = list(rollout.prompt_tokens), [0.0]
    weights += [0.05] * (len(tokens) - 1)
    steps = episodes[i].steps
    assert rollout.finish_reason == "done" and len(rollout.turns) == len(steps)
    for step, (_, completion, before, _) in zip(steps, rollout.sampled, strict=True):
      tokens += [*before, *completion.tokens]
      weights += [0.05] * len(before) + [float(step.is_imitated)] * len(completion.tokens)
    assert rows.text(3, i) == (tokens, weights)
  assert any(not step.is_imitated for row in episodes for step in row.steps)
  assert rows.text(3, 5) == rows.text(3, 5) != rows.text(4, 5)


def test_the_skill_stands_as_a_teacher_reads_it():
  rows, env = rows_with(skill=1.0, other=0.0, extra=0, search=0.0), Household()
  for i in range(60):
    row = rows.episode(0, i)
    env._meaning = row.meaning
    task = Task("t", household.request(row.goal, "default"))
    skill = Skills(env.skills(), where="").text(task)
    general, *lines = skill.split("\n")
    head, _, tail = SKILL_TEMPLATE.format(text=general + "\nLINES").partition("LINES")
    found = row.message.removeprefix(head).removesuffix(
      tail + household.beginning(row.goal, "default")
    )
    assert sorted(found.split("\n")) == sorted(lines)


def test_an_expert_with_the_skill_does_the_task():
  rows = rows_with(skill=1.0, other=0.0, search=0.0, **SURE)
  lengths = set()
  for i in range(60):
    row, world = rows.episode(0, i), None
    world = world_of(row)
    turns = [world.step(step.command) for step in row.steps]
    assert turns[-1].reward == 1.0 and turns[-1].done
    assert [turn.observation for turn in turns] == [step.observation for step in row.steps]
    assert all(step.is_imitated for step in row.steps)
    assert not household.is_unseen(row.goal.words, row.goal.item, row.goal.place)
    lengths.add(len(row.steps))
  assert lengths == {6, 8}  # one process, and two


@pytest.mark.parametrize("settings", [dict(skill=0.0), dict(skill=1.0, other=1.0)])
def test_without_the_right_skill_a_novel_word_is_guessed(settings):
  rows = rows_with(search=0.0, **SURE, **settings)
  used, right = collections.Counter(), []
  for i in range(500):
    row = rows.episode(0, i)
    does = [step.command.removeprefix("use ") for step in row.steps if "use" in step.command]
    for word, appliance, name in zip(row.goal.words, row.goal.appliances, does, strict=True):
      if word in KNOWN.values():
        assert name == appliance
      else:
        used[name] += 1
        right.append(name == appliance)
  expected = len(right) / len(APPLIANCES)
  assert all(abs(used[name] - expected) < 5 * expected**0.5 for name in APPLIANCES)
  assert abs(sum(right) - expected) < 5 * expected**0.5


def test_a_novel_word_means_something_else_in_every_row():
  rows, meant = HouseholdRows(CHAT), collections.defaultdict(set)
  for i in range(300):
    for word, appliance in rows.episode(0, i).meaning.items():
      meant[word].add(appliance)
  assert all(appliances == set(APPLIANCES) for appliances in meant.values())
  assert len(meant) > 2 * len(APPLIANCES)


def test_stumbles_are_read_and_never_imitated():
  """They are as frequent as asked for, and the expert goes on as best it can."""
  rows = rows_with(skill=1.0, other=0.0, search=0.0)
  actions = inadmissible = visits = turned_back = used_wrong = 0
  for i in range(400):
    row, at, used = rows.episode(0, i), "", 0
    world = world_of(row)
    for step, after in zip(row.steps, [*row.steps[1:], None]):
      turn = world.step(step.command)
      actions += 1
      inadmissible += not turn.valid
      verb, _, name = step.command.partition(" ")
      assert turn.valid or not step.is_imitated
      if verb == "use" and turn.valid:
        assert step.is_imitated == (name == row.goal.appliances[used])
        used_wrong += not step.is_imitated
        used += 1
        if after and after.is_imitated and used == len(row.goal.appliances):
          assert after.command == f"go {row.goal.place}"  # on with the plan
      if verb == "go" and turn.valid:
        visits += step.is_imitated
        at = name
        if not step.is_imitated and after and after.is_imitated:
          turned_back += 1
          assert after.command.startswith("go ") and after.command != f"go {at}"
    text = rows.text(0, i)
    stumbles = [step for step in row.steps if not step.is_imitated]
    assert text.weights.count(0.0) == 1 + sum(
      len(CHAT.text_tokens(step.command)) + 1 for step in stumbles
    )
  assert 0.045 < inadmissible / actions < 0.075
  assert 0.1 < (turned_back + used_wrong) / visits < 0.3 and min(turned_back, used_wrong) > 50


def test_texts_of_the_world_are_few_tokens_and_any_text_can_be_read():
  rows = HouseholdRows(CHAT)
  for step in rows.episode(0, 1).steps:
    assert len(CHAT.text_tokens(step.command)) == 2
    assert len(CHAT.text_tokens(step.observation)) <= 7
  strange = "naïve ∑ 汉字 <|user|> {{ x }}\n\tgo oven"
  assert CHAT.plain_text(CHAT.text_tokens(strange)) == CHAT.neutral(strange) != strange
  assert rows._continuation.finding.way == "exact"
