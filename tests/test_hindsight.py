"""Hints that the policy writes in hindsight: what is one, who reads it, what is trained of it."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest

from sdpo_jax import config, errors, hindsight, learner, main, metrics, session, train
from sdpo_jax.hindsight import Reflector
from sdpo_jax.objectives import build
from sdpo_jax.objectives.contexts_hindsight import Hindsight, Hint, read_hints
from sdpo_jax.objectives.loss import normalisers, token_loss
from sdpo_jax.records import Completion, Feedback, Ratio, Sampling, Status
from sdpo_jax.text import MAX_CHARS
from sdpo_jax.train_step import make_signals
from tests import fakes
from tests.test_turns import CHAT, WRONG, episode, messages, packed, reader

ROOT = pathlib.Path(__file__).parent.parent
ONE = {"turn": 1, "diagnosis": "no such place"}
TWO = {"turn": 2, "diagnosis": "too early", "action": "take mug"}
# what stands before the end of a thought is none of the answer
NASTY = fakes.NASTY.replace("</think>", "")
FIRST, SECOND = Hint("no such place", ""), Hint("too early", "take mug")


@pytest.mark.parametrize(
  "answer, hints, refused",
  [
    (json.dumps([ONE, TWO]), {0: FIRST, 1: SECOND}, 0),
    (json.dumps([TWO, ONE], indent=2), {0: FIRST, 1: SECOND}, 0),
    (json.dumps(TWO), {1: SECOND}, 0),
    (json.dumps({"hints": [ONE, TWO]}), {0: FIRST, 1: SECOND}, 0),
    (f"{json.dumps(ONE)}\n{json.dumps(TWO)}", {0: FIRST, 1: SECOND}, 0),
    (f"Here {{I}} am [sic]:\n```json\n{json.dumps([TWO])}\n```\nDone.", {1: SECOND}, 0),
    (f"<think>[{json.dumps(ONE)}]</think>{json.dumps([TWO])}", {1: SECOND}, 0),
    (json.dumps([ONE, TWO])[:-20], {0: FIRST}, 0),  # cut off at its limit
    (json.dumps([ONE | {"action": None}, TWO | {"more": [1]}]), {0: FIRST, 1: SECOND}, 0),
    ("[]", {}, 0),
    ("{}", {}, 1),
    ("see [1]", {}, 1),
    (json.dumps([ONE, ONE | {"diagnosis": "again"}]), {0: FIRST}, 1),
    (json.dumps([[ONE], "TWO", 3, None, True]), {}, 5),
    *((json.dumps([ONE | {"turn": k}]), {}, 1) for k in (0, 4, -1, 10**30, 1.0, "1", True, None)),
    *((json.dumps([ONE | {"diagnosis": d}]), {}, 1) for d in (3, None, ["x"], {}, "", " \n", True)),
    *((json.dumps([ONE | {"action": a}]), {}, 1) for a in (3, ["x"], {}, False)),
    (json.dumps([{"turn": 1}, {"diagnosis": "x"}, {"Turn": 1, "diagnosis": "x"}]), {}, 3),
    ('[{"turn": NaN, "diagnosis": "x"}, {"turn": Infinity, "diagnosis": "x"}]', {}, 2),
  ],
)
def test_a_hint_is_read_wherever_it_stands(answer, hints, refused):
  assert read_hints(answer, 3) == (hints, refused, True)


@pytest.mark.parametrize(
  "answer",
  ["", "go desk", "<think>" + json.dumps([ONE]), "{'turn': 1, 'diagnosis': 'x'}", "\x00", "]}",
   '{"turn": 1', '["', '{"turn": 1' + "0" * 100_000 + ', "diagnosis": "x"}', "[" * 100_000,
   '{"a":' * 50_000, '["' * 50_000, '[{"turn":' * 20_000, "{" * 1000 + json.dumps(ONE)],
)  # fmt: skip
def test_what_is_no_json_is_no_hint(answer):
  assert read_hints(answer, 3) == ({}, 0, False)


def test_a_value_within_a_bomb_harms_nobody():
  deep = "[" * 900 + "]" * 900  # deep enough to be read, or not, as the interpreter likes
  assert read_hints(f'[{{"turn": 1, "diagnosis": {deep}}}] {json.dumps(TWO)}', 3).of == {1: SECOND}


@pytest.mark.parametrize(
  "text", ["a\x00b", "\ud800", "<|im_end|>\n<|im_start|>", "x" * 100_000, NASTY, "\u2028"]
)
def test_the_words_of_a_hint_are_clean_and_short(text):
  entry = {"turn": 1, "diagnosis": "It is " + text, "action": text}
  hint = read_hints(json.dumps([entry]), 1).of[0]
  for said in hint:
    assert len(said.encode()) <= 4 * MAX_CHARS and len(said) <= MAX_CHARS  # no lone surrogate
    assert "\x00" not in said and "<|im_end|>" not in said
  rollout = dataclasses.replace(episode(0), reflection=json.dumps([entry]))
  ((shown,),) = reader(Hindsight()).of_group([rollout])
  (text_read,) = shown.texts
  stops = text_read.prompt.count(CHAT.stop_tokens[0])
  assert stops == rollout.prompt_tokens.count(CHAT.stop_tokens[0])


def reflected(rollout, *entries):
  return dataclasses.replace(rollout, reflection=json.dumps(entries))


@pytest.mark.parametrize("reward, outcome", [(1.0, "succeeded"), (0.4, "failed")])
def test_a_turn_is_read_with_its_hint_and_nothing_later(reward, outcome):
  rollout = reflected(episode(0, reward=reward), TWO, ONE)
  ((shown,),) = reader(Hindsight()).of_group([rollout])
  words = (
    f"\n\nThe attempt {outcome}. Looking back, of what you do now: no such place",
    f"\n\nThe attempt {outcome}. Looking back, of what you do now: too early"
    "\nBetter would be: take mug",
  )
  first, second = rollout.sampled[:2]
  said = [CHAT.plain_text(segment.completion.tokens) for segment in (first, second)]
  begun = CHAT.plain_text(rollout.prompt_tokens)
  header = "<|im_end|>\n<|im_start|>assistant\n"
  between = CHAT.plain_text(second.before)
  assert begun.endswith(header) and between.endswith(header)
  want = [
    begun.removesuffix(header) + words[0] + header + said[0],
    begun + said[0] + between.removesuffix(header) + words[1] + header + said[1],
  ]
  assert [CHAT.plain_text(text.tokens) for text in shown.texts] == want
  assert [text.first for text in shown.texts] == [first.start, second.start]
  for text, segment in zip(shown.texts, (first, second), strict=True):
    assert text.weight == 1 / len(segment.completion.tokens)


def test_without_a_hint_there_is_no_teacher():
  whole = episode(0)
  lost = dataclasses.replace(
    reflected(episode(0), ONE), feedback=Feedback(0.0, "", Status.ENV_FAILED)
  )
  group = [whole, reflected(whole), reflected(whole, ONE | {"turn": 99}), lost]
  group.append(dataclasses.replace(whole, reflection="go desk"))
  assert reader(Hindsight()).of_group(group) == [[None] * 5]


def test_own_words_are_settings_and_wrong_ones_are_refused():
  hindsight = Hindsight(hint="({diagnosis}{action})", action="; {text}", reflecting="{attempt}?")
  rollout = reflected(episode(0), TWO)
  assert hindsight([rollout], 0).turns[:2] == ("", "(too early; take mug)")
  for wrong in (dict(hint="{future}"), dict(action="{diagnosis}"), dict(reflecting="{remark}")):
    with pytest.raises(ValueError, match="asks for {"):
      Hindsight(**wrong)


class Answering(fakes.ScriptedEngine):
  """Answers with these texts, in order, and keeps what it was asked."""

  def __init__(self, answers):
    super().__init__([[CHAT.text_tokens(answer) + [257]] for answer in answers])
    self.asked = []

  def generate(self, requests):
    self.asked += requests
    yield from super().generate(requests)


def reflect(groups, answers, context=None, most=4000):
  engine = Answering(answers)
  env = types.SimpleNamespace(prompt=messages)
  player = types.SimpleNamespace(engine=engine, chat=CHAT, env=env)
  reflector = Reflector(context or Hindsight(hint_tokens=99), player, 7, most)
  sampling = Sampling(8, stop_tokens=(257,), entropy=True)
  return engine, reflector.explore(None, groups, sampling=sampling, step=3)


def test_the_policy_reads_the_whole_episode_and_its_hints_reach_the_teacher():
  lost = dataclasses.replace(episode(0), feedback=Feedback(0.0, "", Status.ENV_FAILED))
  right, wrong = episode(0), episode(0, WRONG)
  groups = [[right, lost], [wrong, episode(1, WRONG)]]
  answers = [json.dumps([TWO]), "Well: " + json.dumps([ONE, ONE | {"turn": 9}]), "go desk"]
  engine, metrics = reflect(groups, answers)
  assert len(engine.asked) == 3 and len({request.seed for request in engine.asked}) == 3
  assert all(r.sampling == Sampling(99, stop_tokens=(257,)) for r in engine.asked)
  read = CHAT.plain_text(engine.asked[1].prompt)
  trace = "".join(
    f"{k}> {said}\n{turn.observation}\n"
    for k, said, turn in zip((1, 2, 3), WRONG, wrong.turns, strict=True)
  )
  first = messages(wrong.task)[-1]["content"]
  assert f"{first}\n\nAn attempt at this is over." in read
  assert f"\n\n{trace}\nThe attempt failed.\n\nWhich turns" in read
  assert "The attempt succeeded." in CHAT.plain_text(engine.asked[0].prompt)
  assert lost.reflection is None and wrong.reflection == answers[1]
  sizes = [len(answer) + 1 for answer in answers]
  rollouts = [right, lost, wrong, groups[1][1]]
  assert [r.extra_tokens for r in rollouts] == [sizes[0], 0, *sizes[1:]]
  assert [r.extra_calls for r in rollouts] == [1, 0, 1, 1]
  turns = len(right.turns) + 6
  assert metrics["hindsight/hint_share"] == Ratio(2, turns)
  assert metrics["hindsight/parse_failures"].mean == pytest.approx(1 / 3)
  assert metrics["hindsight/refused"].mean == pytest.approx(1 / 3)
  assert metrics["hindsight/shortened"] == metrics["hindsight/not_asked"] == 0
  _, _, p = packed("hero", groups)
  shown = [CHAT.plain_text(text.tokens) for texts in p.teacher_texts.of for text in texts]
  assert len(shown) == 2 and p.metrics["data/teacher_share"] == 0.5
  assert sum("too early" in text for text in shown) == 1 == sum("no such" in text for text in shown)
  # the batch holds as much weight as there are turns with a hint
  weight_BR = p.batch.readings[0].weight_BR
  assert weight_BR.sum() == pytest.approx(2) and len(set(weight_BR[weight_BR > 0])) == 2


def test_a_long_episode_loses_its_middle_and_one_without_room_is_not_asked():
  groups = [[episode(0)]]
  words = len(CHAT.prompt_tokens(messages(groups[0][0].task))) + 600
  engine, metrics = reflect(groups, ["[]"], most=words)
  assert "\n[...]\n" in CHAT.plain_text(engine.asked[0].prompt)
  assert len(engine.asked[0].prompt) <= words and metrics["hindsight/shortened"] == 1
  assert metrics["hindsight/parse_failures"].total == 0  # to say nothing is no failure
  groups = [[episode(0)]]
  engine, metrics = reflect(groups, [], most=100)
  assert not engine.asked and metrics["hindsight/not_asked"] == 1
  assert groups[0][0].reflection is None and groups[0][0].extra_calls == 0


def mean_jsd(policy_RV, teacher_RV):
  """By hand: the mean over tokens of the JSD, over the policy's 100 likeliest and a tail."""
  found = []
  for p_V, q_V in zip(policy_RV.astype(np.float64), teacher_RV.astype(np.float64), strict=True):
    p_V, q_V = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p_V, q_V))
    top = np.argsort(-p_V)[:100]
    p, q = (np.append(x[top], 1 - x[top].sum()) for x in (p_V, q_V))
    q = np.clip(q, 0.4 * p, 10 * p)
    m = (p + q) / 2
    found.append(0.5 * np.sum(p * np.log(p / m)) + 0.5 * np.sum(q * np.log(q / m)))
  return np.mean(found)


def test_the_loss_is_the_mean_over_turns_of_the_mean_over_their_tokens():
  """Two episodes with three hints in all, for turns of unequal lengths."""
  right, wrong = reflected(episode(0), ONE, TWO), reflected(episode(0, WRONG), TWO)
  method, _, p = packed("hero", [[right, wrong, episode(0, WRONG)]])
  batch = p.batch
  config, params = fakes.toy_model(0, layers=1)
  _, teacher = fakes.toy_model(1, layers=1)
  signals = make_signals(config, method)(params, teacher, batch)
  got, _ = token_loss(method, signals, batch, normalisers(method, batch))
  policy_BRV = np.asarray(fakes.dense_logits(params, config, batch.policy, batch))
  teacher_BRV = np.asarray(fakes.dense_logits(teacher, config, batch.readings[0].rows, batch))
  turns, lengths = [], []
  for b, rollout in enumerate(p.rollouts):
    hints = {0: (), 2: (0, 1), 1: (1,)}[len(json.loads(rollout.reflection or "[]"))]
    for start, completion, *_ in (rollout.sampled[k] for k in hints):
      place = slice(start, start + len(completion.tokens))
      turns.append(mean_jsd(policy_BRV[b, place], teacher_BRV[b, place]))
      lengths.append(len(completion.tokens))
  assert len(turns) == 3 and len(set(lengths)) > 1
  assert float(got) == pytest.approx(np.mean(turns), rel=1e-4)
  by_token = np.average(turns, weights=lengths)
  assert abs(by_token - np.mean(turns)) > 1e-3 * by_token  # which would be another loss


def test_what_cannot_run_is_refused_in_one_line(monkeypatch):
  c = config.load("configs/tinycode.py")
  c.method = build.method_row("hero")
  with pytest.raises(ValueError, match="'hindsight' reads the turns of episodes, and .*'tinycode'"):
    config.validate(c)
  c = config.load("configs/agentic.py:method=hero")
  method = build.build_method(c.method.to_dict())
  tokens, settings = session.longest_texts(c, method)[-1]
  assert tokens == 160 + 192 + 32 and settings.endswith("teacher_context.hint_tokens=32")
  assert len(session.longest_texts(c, None)) == 2


LOCAL = ["main", f"--config={ROOT}/configs/agentic.py:method=hero,local", "--config.mesh.fsdp=1"]


def lines_of(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_model_that_writes_no_json_learns_nothing_and_the_run_says_so(tmp_path, caplog, capsys):
  assert main.main([*LOCAL, f"--workdir={tmp_path}"]) == 0
  for line in lines_of(tmp_path)[1:]:
    assert line["train/loss"] == line["train/grad_norm"] == line["data/teacher_share"] == 0
    assert line["hindsight/hint_share"] == line["hindsight/not_asked"] == 0
    assert line["train/generations"] == 8 * line["step"]  # four episodes, and four answers
  said = caplog.text + capsys.readouterr().err
  assert "the teacher was never tested, in 2 batches: no response has a context" in said
  assert "which is made of hints that the policy writes as JSON" in said
  (line, *_) = (tmp_path / "rollouts" / "step_000001.jsonl").read_text().splitlines()
  assert isinstance(json.loads(line)["reflection"], str)
  lag = [*LOCAL, f"--workdir={tmp_path}/lag", "--config.rollout.lag=1"]
  assert main.main(lag) == 2
  assert "the hints of config.method.teacher_context.name='hindsight' are sampled after" in (
    capsys.readouterr().err
  )


def test_a_model_that_writes_json_learns_and_a_resumed_run_repeats_it(
  tmp_path, monkeypatch, capsys
):
  tokens, asked = [], []

  def answers(engine, requests):
    asked.append([(request.prompt, request.seed) for request in requests])
    return [Completion(r.key, 0, tokens, [-1.0] * len(tokens), "stop") for r in requests]

  class Encoding(Reflector):
    def explore(self, *args, **settings):
      tokens[:] = self.player.chat.text_tokens(json.dumps([ONE]))
      return super().explore(*args, **settings)

  def write_or_end(self, i, values):
    if i == 2:
      raise errors.RunError("the process ends here")
    write(self, i, values)

  monkeypatch.setattr(hindsight, "sample", answers)
  monkeypatch.setattr(learner, "Reflector", Encoding)
  command = [*LOCAL, "--config.checkpoint.every_steps=1"]
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  assert main.main([*command, f"--workdir={whole}"]) == 0
  first, second = lines_of(whole)[1:]
  for line in (first, second):
    assert line["train/loss"] > 0 and line["train/grad_norm"] > 0
    assert line["data/teacher_share"] == 1 and line["hindsight/parse_failures"] == 0
    assert 0 < line["hindsight/hint_share"] < 1
  assert "the teacher reads 4 responses" in capsys.readouterr().err
  (line, *_) = (whole / "rollouts" / "step_000001.jsonl").read_text().splitlines()
  assert "of what you do now: no such place" in json.loads(line)["teacher_context"]
  write = train.Steps.write
  with monkeypatch.context() as patch:
    patch.setattr(train.Steps, "write", write_or_end)
    assert main.main([*command, f"--workdir={killed}"]) == 1
  assert main.main([*command, f"--workdir={killed}"]) == 0
  in_whole, again, resumed = asked[:2], asked[2:4], asked[4:]
  assert in_whole == again and resumed == in_whole[1:] and in_whole[0] != in_whole[1]
  assert [metrics.reproducible(line) for line in lines_of(killed)] == [
    metrics.reproducible(line) for line in lines_of(whole)
  ]
