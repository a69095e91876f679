"""Readings turn by turn: what the teacher reads before each turn, and what is trained of it."""

import dataclasses

import numpy as np
import pytest

from sdpo_jax import config
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.conversation import Continuation, Conversation
from sdpo_jax.data.packing import sampled_tokens
from sdpo_jax.data.teacher_prompt import TeacherReader
from sdpo_jax.envs.agents.household import Household, walkthrough
from sdpo_jax.objectives import build
from sdpo_jax.objectives.contexts_agents import NOT_PROVIDED, LaterObservations, Skill, TurnWords
from sdpo_jax.objectives.credit import advantages
from sdpo_jax.records import Completion, Feedback, Rollout, Status
from tests import fakes
from tests.test_batch import fresh
from tests.test_credit import gap_signals

CHAT = Chat(fakes.ByteTokenizer(), thinking=False, eos_ids=(257,))
ENV = Household()


def episode(index, actions=None, reward=None, logp=-0.5):
  """An episode that follows the walkthrough, or other actions."""
  task = ENV.task("train", index)
  world = ENV.start(task)
  conversation = Conversation(Continuation(CHAT), world.prompt())
  turns = []
  for action in actions or walkthrough(world._goal):
    tokens = CHAT.text_tokens(action) + [257]
    logps = [logp * (1 + len(turns))] * len(tokens)
    conversation.add_response(Completion("", 0, tokens, logps, "stop"))
    turns.append(world.step(action))
    if turns[-1].done:
      break
    conversation.add_message(turns[-1].observation)
  (row,) = conversation.rows()
  feedback = Feedback(turns[-1].reward if reward is None else reward, "what happened")
  return Rollout(
    task, row.prompt_tokens, row.tokens, row.logp, "done", "", feedback, None, sampled=row.sampled,
    turns=turns,
  )  # fmt: skip


def messages(task):
  return ENV.start(task).prompt()


def reader(context, most=4000):
  further = getattr(context, "further", None)
  return TeacherReader(CHAT, messages, context, most, further, getattr(context, "further_count", 0))


def test_a_turn_is_read_under_its_own_history_and_words():
  rollout = episode(0)
  ((shown,),) = reader(TurnWords()).of_group([rollout])
  assert len(shown.texts) == len(rollout.turns) and not shown.was_shortened
  fed = CHAT.plain_text(rollout.prompt_tokens)
  for text, segment, turn in zip(shown.texts, rollout.sampled, rollout.turns, strict=True):
    said = CHAT.plain_text(segment.completion.tokens)
    fed += CHAT.plain_text(segment.before)
    read = CHAT.plain_text(text.tokens)
    words = f"\n\nThe answer to what you do now will be: {turn.observation}"
    assert read.replace(words, "", 1) == fed + said and read.count(words) == 1
    assert text.first == segment.start and read.endswith(said)
    assert sampled_tokens(text.spans) == len(segment.completion.tokens)
    fed += said


def test_words_that_are_too_long_lose_their_end():
  rollout = episode(0)
  whole = TurnWords()
  most = len(rollout.prompt_tokens) + 50
  ((shown,),) = reader(whole, most).of_group([rollout])
  assert shown.was_shortened
  ((full,),) = reader(whole).of_group([rollout])
  for text, longer in zip(shown.texts, full.texts, strict=True):
    assert len(text.tokens) <= len(longer.tokens)
    (span,) = text.spans
    assert text.tokens[slice(*span)] == longer.tokens[slice(*longer.spans[0])]


def test_the_turns_that_were_least_sure_are_read_with_and_without_what_comes_later():
  rollout = episode(0)  # each turn is less sure than the one before it
  count = len(rollout.turns)
  (plain,), (further,) = reader(LaterObservations(share=0.3)).of_group([rollout])
  chosen = -(-3 * count // 10)
  assert len(plain.texts) == len(further.texts) == chosen
  assert [t.first for t in plain.texts] == [s.start for s in rollout.sampled[count - chosen :]]
  shown, hidden = (CHAT.plain_text(read.texts[0].tokens) for read in (plain, further))
  later = [turn.observation for turn in rollout.turns[count - chosen :]]
  assert all(f"(an action) {words}" in shown for words in later)
  assert hidden.count(f"(an action) {NOT_PROVIDED}") == chosen
  assert not any(f"(an action) {words}" in hidden for words in later)


def test_a_lost_episode_and_a_response_without_turns_are_not_read():
  lost = dataclasses.replace(episode(0), feedback=Feedback(0.0, "", Status.ENV_FAILED))
  plain = dataclasses.replace(episode(0), turns=None)
  for context in (TurnWords(), LaterObservations()):
    assert context([lost, plain], 0) is None and context([lost, plain], 1) is None


def test_a_skill_stands_before_the_question():
  rollout = episode(0)
  ((shown,),) = reader(Skill()).of_group([rollout])
  text = CHAT.plain_text(shown.prompt)
  skill = rollout.task.data["skill"]
  assert skill and text.index(skill) < text.index("-= Welcome")
  without = dataclasses.replace(rollout, task=dataclasses.replace(rollout.task, data={}))
  assert reader(Skill()).of_group([without]) == [[None]]


def packed(name, groups, penalty=0.0, **parts):
  method = build.build_method(build.method_row(name) | parts)
  further = method.teacher_context.further if method.further_count else None
  settings = dict(max_teacher_tokens=4000, turn_penalty=penalty, further_readings=further)
  packer = fakes.make_packer(method, CHAT, messages, fresh(), **settings)
  return method, packer, packer.pack(groups)


WRONG = ["dance", "go bed", "sing"]


def test_each_turn_lies_in_a_text_of_its_own():
  groups = [[episode(0), episode(0, WRONG)]]
  _, packer, p = packed("sdpo_turns", groups)
  rows, batch = p.batch.readings[0].rows, p.batch
  for b, rollout in enumerate(p.rollouts):
    count = len(rollout.tokens)
    at = rows.at_CX[0, batch.start_B[b] : batch.start_B[b] + count]
    flat, segment = rows.token_CPT[0].reshape(-1), rows.segment_CPT[0].reshape(-1)
    assert flat[at + 1].tolist() == rollout.tokens
    assert batch.readings[0].weight_BR[b].tolist() == batch.weight_BR[b].tolist()
    places = list(zip(at // rows.token_CPT.shape[-1], segment[at], strict=True))
    assert len(set(places)) == len(rollout.turns)
    turn_R = batch.turn_BR[b, :count]
    assert [len(set(p for p, t in zip(places, turn_R) if t == k)) for k in set(turn_R)] == [
      1
    ] * len(rollout.turns)
    lengths = [len(s.completion.tokens) for s in rollout.sampled]
    assert batch.place_BR[b, :count].tolist() == sum((list(range(n)) for n in lengths), [])
  emptied = packer.emptied(p)
  assert emptied.batch.readings[0].rows is batch.policy


def test_turns_without_a_reading_keep_their_advantage():
  groups = [[episode(0), episode(0, WRONG)]]
  method, _, p = packed("ocsd", groups, teacher_context=dict(name="later_observations", share=0.3))
  batch = p.batch
  has_BR = batch.readings[0].has_BR
  for b, rollout in enumerate(p.rollouts):
    count = len(rollout.tokens)
    read = {int(t) for t, has in zip(batch.turn_BR[b, :count], has_BR[b, :count]) if has}
    assert 0 < len(read) < len(rollout.turns)
  rng = np.random.default_rng(0)
  shape = batch.weight_BR.shape
  shown, hidden = gap_signals(*rng.normal(size=(2, *shape)))
  credited = np.asarray(advantages(method.credit, (shown, hidden), batch))
  e_BR = np.asarray(shown.logp_teacher_BR - hidden.logp_teacher_BR)
  A_BR = batch.advantage_BR
  want = np.where(has_BR, A_BR * (1 + 0.5 * np.sign(A_BR) * np.tanh(e_BR / 2)), A_BR)
  np.testing.assert_allclose(credited, want, rtol=1e-5, atol=1e-6)
  assert (credited != A_BR).any()


def test_an_invalid_turn_costs_its_penalty():
  """By hand: four turns of two episodes are the rows whose mean is taken."""
  right, wrong = episode(0, reward=1.0), episode(0, ["dance", "go bed"], reward=0.0)
  _, _, p = packed("grpo", [[right, wrong]], penalty=0.1)
  returns = [1.0] * len(right.turns) + [-0.1, 0.0]
  mean = np.mean(returns)
  for b, rollout in enumerate(p.rollouts):
    of_turns = [1.0 - mean] * len(right.turns)
    if rollout.feedback.reward == 0:
      of_turns = [-0.1 - mean, -mean]
    got_R = p.batch.advantage_BR[b]
    want = np.repeat(of_turns, [len(s.completion.tokens) for s in rollout.sampled])
    np.testing.assert_allclose(got_R[: len(want)], want, rtol=1e-5)
    assert not got_R[len(want) :].any()


def test_a_penalty_passes_over_lost_episodes():
  lost = dataclasses.replace(episode(0), feedback=Feedback(0.0, "", Status.ENV_FAILED))
  lost.turns = lost.turns[:-1]  # the world died in the last one
  _, _, p = packed("grpo", [[lost, episode(0), episode(0, WRONG)]], penalty=0.1)
  assert np.isfinite(p.batch.advantage_BR).all() and p.metrics["data/dropped"] == 1


def test_a_method_of_turns_needs_episodes():
  c = config.load("configs/tinycode.py")
  c.method = build.method_row("sdpo_turns")
  with pytest.raises(ValueError, match="'turn_words' reads the turns of episodes"):
    config.validate(c)
  c = config.load("configs/tinycode.py")
  c.rollout.turn_penalty = 0.5
  with pytest.raises(ValueError, match="turn_penalty=0.5 would not be read"):
    config.validate(c)
