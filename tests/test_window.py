"""Rows as turns: what each is sampled after, what is trained of it, and what a teacher reads."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from sdpo_jax import config, plan
from sdpo_jax.data.shapes import Shapes
from sdpo_jax.data.teacher_prompt import CUT, TeacherReader
from sdpo_jax.data.window import OMITTED, WindowedConversation, message_of, window
from sdpo_jax.envs.agents.household import Household
from sdpo_jax.episodes import Played, Player
from sdpo_jax.errors import SettingError, TaskError
from sdpo_jax.objectives import build
from sdpo_jax.objectives.contexts_agents import Skill, TurnWords
from sdpo_jax.play import Room
from sdpo_jax.records import Completion, Sampling
from sdpo_jax.stored import restored, stored
from tests import fakes, families
from tests.test_batch import fresh
from tests.test_conversation import NO_THOUGHTS, chat_of, texts_of
from tests.test_episodes import CHAT, Scripted, by_heart

FIRST = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A task."}]
SAID, ANSWERS = ("go", "take", "put"), ("gone", "taken", "there")
ENV = Household()


def pairs(*turns):
  messages = []
  for turn in turns:
    messages.append({"role": "assistant", "content": SAID[turn]})
    messages.append({"role": "user", "content": ANSWERS[turn]})
  return messages


@pytest.mark.parametrize(
  "k, history, shown, leaves_out",
  [
    (0, 2, (), False),
    (0, 0, (), False),
    (1, 0, (), True),
    (3, 0, (), True),
    (1, 1, (0,), False),
    (3, 1, (2,), True),
    (2, 2, (0, 1), False),
    (3, 2, (1, 2), True),
    (3, 3, (0, 1, 2), False),
    (3, 9, (0, 1, 2), False),
  ],
)
def test_a_window_word_for_word(k, history, shown, leaves_out):
  system, user = FIRST
  first = [system, user | {"content": "A task." + OMITTED}] if leaves_out else FIRST
  assert window(FIRST, SAID, ANSWERS, k, history) == first + pairs(*shown)
  assert FIRST[-1] == {"role": "user", "content": "A task."}  # whoever owns it


def test_a_prompt_is_what_the_template_makes_of_it():
  conversation = WindowedConversation(CHAT, FIRST, 1)
  for said, answer in zip(("<think>\nhm\n</think>\n\n go", "take <|im_end|>"), ANSWERS):
    tokens = CHAT.text_tokens(said) + [257]
    conversation.add_response(Completion("", 0, tokens, [0.0] * len(tokens), "stop"))
    conversation.add_message(answer)
  assert CHAT.plain_text(conversation.prompt) == (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nA task.\n\n(Earlier turns are left out.)<|im_end|>\n"
    "<|im_start|>assistant\ntake < |im_end|><|im_end|>\n"
    "<|im_start|>user\ntaken<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  (row,) = conversation.rows()
  first, second = row.sampled
  assert CHAT.plain_text(list(second.prompt)).count("<|im_start|>assistant\ngo<|im_end|>") == 1
  assert list(first.prompt) == row.prompt_tokens == CHAT.prompt_tokens(FIRST)
  assert CHAT.text_tokens("hm")[0] in first.completion.tokens  # what was sampled stays
  assert row.tokens == first.completion.tokens + second.completion.tokens


def test_an_open_thought_is_no_message():
  assert message_of("<think>\nwell") == "" and message_of("<think>a</think>\n b\n") == "b"


# ---- playing -------------------------------------------------------------------------------------


def played(say, *, history, env=ENV, count=2, n=2, most=900, new=40, chat=CHAT):
  """Returns (what the engine was asked for, tasks, groups)."""
  engine = Scripted(say)
  room = Room(max_prompt_tokens=600, max_episode_tokens=most, history=history)
  player = Player(Played(env), chat, engine, room, threads=2, timeout_s=5)
  tasks = [env.task("train", i) for i in range(count)]
  sampling = Sampling(new, stop_tokens=(257,))
  try:
    return engine.asked, tasks, player.collect(None, tasks, n=n, sampling=sampling, seeds=[1, 2])
  finally:
    player.close()


def wander(q, g, turn):
  """One member goes the way, with thoughts; the other one stumbles first."""
  way = by_heart(ENV)(q, g, turn if g == 0 else max(0, turn - 2))
  return f"<think>hm</think>{way}" if g == 0 else (way if turn > 1 else "dance")


def packed(groups, name="grpo", *, shapes=None, **settings):
  method = build.build_method(build.method_row(name) | settings.pop("parts", {}))
  further = method.teacher_context.further if method.further_count else None
  settings = dict(max_teacher_tokens=4000, further_readings=further) | settings
  packer = fakes.make_packer(method, CHAT, Played(ENV).prompt, shapes or fresh(), **settings)
  return packer, packer.pack(groups)


@pytest.mark.parametrize("history", [0, 1, 2, 50])
def test_what_is_fed_is_what_is_trained(history):
  asked, tasks, groups = played(wander, history=history)
  fed = {request.key: request.prompt for request in asked}
  _, p = packed(groups, history=history)
  texts = texts_of(p.batch.policy)
  turns = 0
  for q, group in enumerate(groups):
    first = ENV.start(tasks[q]).prompt()
    for g, rollout in enumerate(group):
      said = [message_of(CHAT.response_text(s.completion.tokens)) for s in rollout.sampled]
      assert not any("think" in message for message in said)
      answers = [turn.observation for turn in rollout.turns]
      for k, segment in enumerate(rollout.sampled):
        want = CHAT.prompt_tokens(window(first, said, answers, k, history))
        assert fed[q, g, k] == list(segment.prompt) == want
        assert texts.count(want + segment.completion.tokens) >= 1
        turns += 1
  assert len(texts) == len(fed) == turns
  for b, rollout in enumerate(p.rollouts):
    count, begin = len(rollout.tokens), p.batch.start_B[b]
    assert p.batch.response_BR[b, :count].tolist() == rollout.tokens
    assert p.batch.weight_BR[b].sum() == count == p.batch.weight_BR[b, :count].sum()
    at_X = p.batch.policy.at_CX[0, begin : begin + count]
    assert p.batch.policy.token_CPT[0].reshape(-1)[at_X + 1].tolist() == rollout.tokens
    starts = [segment.start for segment in rollout.sampled]
    assert p.batch.turn_BR[b, starts].tolist() == list(range(len(starts)))
    assert not p.batch.place_BR[b, starts].any()


def test_what_the_turns_of_a_question_begin_with_stands_once_a_row():
  _, _, groups = played(wander, history=1, count=1)
  _, alone = packed(groups, history=1)
  _, together = packed(groups, history=1, share_prefixes=True)

  def filled(p):
    return int((p.batch.policy.segment_CPT > 0).sum())

  (group,) = groups
  turns = sum(len(rollout.sampled) for rollout in group)
  first = len(CHAT.prompt_tokens(ENV.start(group[0].task).prompt()))
  rows = int((together.batch.policy.segment_CPT[0] > 0).any(-1).sum())
  saved = filled(alone) - filled(together)
  assert (turns - rows) * (first - 40) < saved <= (turns - rows) * first


def test_an_episode_may_be_longer_than_its_window_and_ends_where_that_has_no_room():
  _, _, groups = played(wander, history=None, most=300)
  assert {r.finish_reason for group in groups for r in group} == {"budget"}
  _, _, groups = played(wander, history=1, most=300)
  assert {r.finish_reason for group in groups for r in group} == {"done"}
  _, _, groups = played(wander, history=1, most=150)
  for rollout in (r for group in groups for r in group):
    assert rollout.finish_reason in ("done", "budget") and rollout.is_judged
    first = len(rollout.prompt_tokens)
    assert all(len(s.prompt) - first + 40 <= 150 for s in rollout.sampled)
  assert any(r.finish_reason == "budget" for group in groups for r in group)


def test_a_template_that_cannot_be_cut_plays_rows_as_turns():
  chat = chat_of("qwen3", thinking=True, template=NO_THOUGHTS + families.QWEN3)
  for history in (None, 2):
    room = Room(600, 900, history)
    settings = dict(threads=1, timeout_s=5)
    if history is None:
      with pytest.raises(SettingError, match="an episode is one text"):
        Player(Played(ENV), chat, None, room, **settings)
    else:
      Player(Played(ENV), chat, None, room, **settings).close()
  alternates = "{% if messages|length > 1 %}{{ raise_exception('one question') }}{% endif %}"
  chat = chat_of("qwen2.5", template=alternates + families.QWEN25)
  with pytest.raises(SettingError, match="refuses a conversation of user, assistant, user"):
    Player(Played(ENV), chat, None, Room(600, 900, 2), threads=1, timeout_s=5)


def test_thoughts_stay_out_of_the_history_of_a_thinking_model():
  """Qwen3's template with thinking on: the header opens no thought, the policy does."""
  chat = chat_of("qwen3", thinking=True)
  conversation = WindowedConversation(chat, FIRST, 2)
  tokens = chat.encode("<think>\nhm\n</think>\n\ngo")
  conversation.add_response(Completion("", 0, tokens, [0.0] * len(tokens), "stop"))
  conversation.add_message("gone")
  assert conversation.prompt == chat.prompt_tokens(FIRST + pairs(0))
  assert "hm" not in chat.plain_text(conversation.prompt)


def test_episodes_with_prompts_come_back_as_they_were():
  _, tasks, groups = played(wander, history=1)
  assert restored(tasks, stored(groups)) == groups
  read = restored(tasks, json.loads(json.dumps(stored(groups))))
  for group, others in zip(groups, read, strict=True):
    for rollout, other in zip(group, others, strict=True):
      assert all(s.prompt for s in rollout.sampled) and other.turns == rollout.turns
      assert [s.prompt for s in other.sampled] == [s.prompt for s in rollout.sampled]
      assert [s.start for s in other.sampled] == [s.start for s in rollout.sampled]
  for a, b in zip(*(jax.tree.leaves(packed(g, history=1)[1].batch) for g in (groups, read))):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name, penalty", [("grpo", 0.01), ("grpo", 0.0), ("sdpo_turns", 0.01)])
def test_episodes_of_one_turn_are_the_same_rows_either_way(name, penalty):
  env = Household(limit=1)

  def say(q, g, turn):
    return "go oven" if g else "dance"

  batches, requests = [], []
  for history in (None, 2):
    asked, _, groups = played(say, history=history, env=env)
    requests.append(sorted((r.key, r.prompt, r.seed) for r in asked))
    packer, p = packed(groups, name, history=history, turn_penalty=penalty)
    batches.append((p.batch, p.metrics, p.teacher_texts, packer.emptied(p).batch))
  assert requests[0] == requests[1]
  (batch, metrics, texts, empty), (other, other_metrics, other_texts, other_empty) = batches
  assert metrics == other_metrics and texts == other_texts
  assert penalty == 0 or name != "grpo" or batch.advantage_BR.any()
  for a, b in ((batch, other), (empty, other_empty)):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y)


def test_each_turn_counts_in_the_statistics_of_its_group_without_a_penalty():
  """By hand: the rewarded episode is longer than the one beside it, so the mean is above a half."""

  def say(q, g, turn):
    return by_heart(ENV)(q, g, turn) if g == 0 else "put bread" if turn else "dance"

  _, _, groups = played(say, history=1, count=1, env=ENV)
  (group,) = groups
  _, p = packed(groups, history=1)
  counts = [len(r.sampled) for r in group]
  rewards = [r.feedback.reward for r in group]
  assert rewards == [1.0, 0.0] and counts[0] != counts[1]
  mean = counts[0] / sum(counts)
  for b, rollout in enumerate(p.rollouts):
    want = rollout.feedback.reward - mean
    np.testing.assert_allclose(p.batch.advantage_BR[b, : len(rollout.tokens)], want, rtol=1e-5)
  _, p = packed(groups)  # rows as episodes: the mean of two
  assert np.abs(p.batch.advantage_BR).max() == 0.5


def test_a_shape_for_whatever_can_come_holds_the_turns():
  """No setting bounds what all turns of an episode take; see `choose_shape` for the last shape."""
  _, _, groups = played(wander, history=1)
  tight = Shapes((1500, 5000, 8), [], limit=0)
  _, p = packed(groups, "sdpo_turns", history=1, shapes=tight)
  (shape,) = tight.known
  turns = [len(rollout.sampled) for rollout in p.rollouts]
  assert shape.rows == shape.teacher_rows == sum(turns) and shape.length >= 1500
  assert shape.responses >= max(len(rollout.tokens) for rollout in p.rollouts)


# ---- what the teacher reads ----------------------------------------------------------------------


def reader(context, history, most=4000):
  return TeacherReader(CHAT, Played(ENV).prompt, context, most, history=history)


@pytest.mark.parametrize("history", [0, 1, 2, 50])
def test_a_skill_stands_in_the_first_message_of_every_turn(history):
  _, tasks, groups = played(wander, history=history, count=1)
  (rollouts,) = groups
  shown_by_rollout = reader(Skill(), history).of_group(rollouts)[0]
  (first,) = ENV.start(tasks[0]).prompt()
  for rollout, shown in zip(rollouts, shown_by_rollout, strict=True):
    assert not shown.was_shortened and len(shown.texts) == len(rollout.sampled)
    for text, segment in zip(shown.texts, rollout.sampled, strict=True):
      said, read = map(CHAT.plain_text, (list(segment.prompt), text.prompt))
      head = shown.context.render("")
      assert tasks[0].data["skill"] in head
      assert read == said.replace(first["content"], head + first["content"], 1)
      assert text.first == segment.start
      assert text.tokens == text.prompt + segment.completion.tokens


def test_a_skill_that_is_too_long_is_shortened_alike_for_every_turn():
  _, tasks, groups = played(wander, history=1, count=1)
  (rollout, _), (first,) = groups[0], ENV.start(tasks[0]).prompt()
  long = dataclasses.replace(tasks[0], data={"skill": "Words of wisdom. " * 40})
  rollout = dataclasses.replace(rollout, task=long)
  beside = 150
  most = len(rollout.prompt_tokens) + beside
  messages = lambda task: ENV.start(tasks[0]).prompt()  # noqa: E731
  ((shown,),) = TeacherReader(CHAT, messages, Skill(), most, history=1).of_group([rollout])
  assert shown.was_shortened
  heads = set()
  for text, segment in zip(shown.texts, rollout.sampled, strict=True):
    assert 0 <= len(segment.prompt) + beside - len(text.prompt) < 3
    heads.add(CHAT.plain_text(text.prompt).partition(first["content"])[0])
  (head,) = heads
  assert CUT in head
  with pytest.raises(TaskError, match=f"takes {most - beside} tokens, more than .*tokens=20"):
    TeacherReader(CHAT, messages, Skill(), 20, history=1).of_group([rollout])


@pytest.mark.parametrize("history", [0, 1, 50])
def test_the_words_of_a_turn_stand_behind_the_window(history):
  _, _, groups = played(wander, history=history, count=1)
  (rollout, _) = groups[0]
  ((shown,),) = reader(TurnWords(), history).of_group([rollout])
  parts = zip(shown.texts, rollout.sampled, rollout.turns, strict=True)
  for text, segment, turn in parts:
    words = f"\n\nThe answer to what you do now will be: {turn.observation}<|im_end|>"
    head, found, header = CHAT.plain_text(list(segment.prompt)).rpartition("<|im_end|>")
    assert found and CHAT.plain_text(text.prompt) == head + words + header
    assert text.tokens == text.prompt + segment.completion.tokens
    assert text.first == segment.start


@pytest.mark.parametrize("name", ["sdpo", "sdar", "craft", "sdpo_turns", "ocsd"])
def test_every_reading_holds_what_was_sampled(name):
  """And a teacher that reads no context reads the policy's own rows."""
  _, _, groups = played(wander, history=1)
  parts = {}
  if name == "ocsd":  # not every turn has a reading
    parts = dict(teacher_context=dict(name="later_observations", share=0.3))
  elif name != "sdpo_turns":
    parts = dict(teacher_context=dict(name="skill"))
  packer, p = packed(groups, name, history=1, parts=parts)  # `check_sampled` looks
  texts = texts_of(p.batch.readings[0].rows)
  read = p.batch.readings[0].has_BR
  for b, rollout in enumerate(p.rollouts):
    turns = {int(t) for t in p.batch.turn_BR[b][read[b]]}
    assert (len(turns) == len(rollout.sampled)) == (name != "ocsd") and turns
    for k in turns:
      tokens = rollout.sampled[k].completion.tokens
      assert any(text[-len(tokens) :] == tokens for text in texts)
  assert all(r.rows is p.batch.policy for r in packer.emptied(p).batch.readings)


# ---- settings ------------------------------------------------------------------------------------


def settings(argument="rows=turns,local", **changes):
  c = config.load(f"configs/agentic.py:{argument}")
  for key, value in changes.items():
    section, _, name = key.partition("__")
    c[section][name] = value
  return c


@pytest.mark.parametrize(
  "argument, changes, message",
  [
    (
      "local",
      dict(rollout__history=3),
      "history=3 would not be read: with .*rows_are='episodes'",
    ),
    ("local", dict(rollout__rows_are="turn"), "config.rollout.rows_are='turn' is unknown.*'turns'"),
    ("rows=turns", dict(rollout__history=-1), "config.rollout.history=-1 must be at least 0"),
    ("local", dict(model__thinking=True), "set config.rollout.keeps_thoughts=True to train so, or"),
    ("local", dict(rollout__keeps_thoughts=True), "keeps_thoughts=True would not be read"),
    (
      "rows=turns",
      dict(rollout__keeps_thoughts=True, model__thinking=True),
      "keeps_thoughts=True would not be read: config.model.thinking=True with .*'turns'",
    ),
    ("rows=turns,method=gspo", {}, "config.method.reduction.name='sequence_mean' takes a mean"),
    (
      "rows=turns,method=position",
      {},
      "config.method.token_weight.name='prefix_gap' takes a mean or a share of each response",
    ),
    ("rows=turns,method=dgrpo", {}, "use rows_are='episodes', or another reduction"),
  ],
)
def test_what_is_refused_in_one_line(argument, changes, message):
  with pytest.raises(ValueError, match=message) as refusal:
    config.validate(settings(argument, **changes))
  assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
  "name, value", [("rows_are", "turns"), ("history", 1), ("keeps_thoughts", True)]
)
def test_an_environment_that_judges_reads_none_of_them(name, value):
  c = config.load("configs/tinycode.py:local")
  c.rollout[name] = value
  with pytest.raises(ValueError, match=f"rollout.{name}={value!r} would not be read: .*'tinycode'"):
    config.validate(c)


def test_what_may_be_set():
  config.validate(settings(model__thinking=True))
  config.validate(settings("local", model__thinking=True, rollout__keeps_thoughts=True))
  for history in (0, 7):
    c = settings(rollout__history=history)
    config.validate(c)
    assert config.history_of(c) == history
  assert config.history_of(settings("local")) is None


@pytest.mark.parametrize(
  "world, turns, history, prompt", [("alfworld", 50, 2, 2048), ("search_qa", 4, 4, 4096)]
)
def test_the_paper_s_worlds_have_its_windows(world, turns, history, prompt):
  c = config.load(f"configs/agentic.py:world={world},method=sdar")
  assert (c.rollout.rows_are, c.rollout.history, c.env.limit) == ("turns", history, turns)
  assert c.rollout.max_new_tokens == 512
  assert c.data.max_prompt_tokens + c.rollout.max_episode_tokens == prompt + 512
  updates = c.total_steps * c.train.updates_per_batch
  assert c.optimizer.warmup_steps == (updates / 10 if world == "search_qa" else 0)
  if world == "alfworld":
    assert c.env.get("shows_commands", True)


def test_a_plan_counts_every_turn_of_an_episode():
  c = config.load("configs/agentic.py:world=webshop,method=sdar")
  assert config.texts_per_response(c) == 15 and config.sampled_tokens(c) == 15 * 512
  method = types.SimpleNamespace(needs_teacher=True)
  learn = types.SimpleNamespace(method=method, further_count=0)
  work = types.SimpleNamespace(c=c, learn=learn, micro_batches=16, shards=8)
  shape = plan.Workload.full_shape(work, 2)
  text = c.data.max_prompt_tokens + c.rollout.max_episode_tokens
  assert (shape.rows, shape.length, shape.teacher_rows) == (30, text, 30)
  assert (shape.responses, shape.tokens) == (15 * 512, 2 * 15 * 512)
  c.rollout.rows_are = "episodes"
  shape = plan.Workload.full_shape(work, 2)
  assert (shape.rows, shape.responses) == (2, c.rollout.max_episode_tokens)
  assert shape.teacher_rows == 2
  c.method = build.method_row("sdpo_turns")  # its teacher reads each turn under a prompt of its own
  assert plan.Workload.full_shape(work, 2).teacher_rows == 30
  c.env = dict(name="tests.my_env:ReverseWord")
  c.rollout.rows_are = "turns"
  assert config.texts_per_response(c) == c.rollout.max_episode_tokens // 512
