"""Answers as language: what the base model says of them, and what a run keeps and shows of them."""

import json
import pathlib

import jax
import numpy as np
import pytest

from sdpo_jax import main, metrics, sharding
from sdpo_jax.data.packing import texts_after
from sdpo_jax.evaluation.fluency import BaseReader
from sdpo_jax.evaluation.scores import distinct_2, of_fluency, summarise
from sdpo_jax.evaluation.suites import read_suites
from sdpo_jax.model import decoder
from sdpo_jax.records import Completion, Feedback, Rollout, Segment, Task
from tests import fakes

ROOT = pathlib.Path(__file__).parent.parent


def rollout(prompt, tokens, sampled=None):
  return Rollout(Task("t", "q"), prompt, tokens, [], "stop", "", Feedback(0.0, ""), sampled=sampled)


def talk(prompt, tokens):
  """Two turns, between which a tool has said two tokens."""
  first, between, second = tokens[:2], tuple(tokens[2:4]), tokens[4:]
  turns = [
    Segment(0, Completion("q", 0, first, [], "stop")),
    Segment(2, Completion("q", 0, second, [], "stop"), between),
  ]
  return rollout(prompt, first + second, turns)


def rollouts():
  """Responses of unequal lengths: one empty, one of which a tool has written the middle."""
  rng = np.random.default_rng(0)
  sizes = [(3, 5), (1, 1), (7, 40), (140, 9), (4, 0)]
  texts = [[list(map(int, rng.integers(1, 296, size))) for size in pair] for pair in sizes]
  made = [rollout(*text) for text in texts] + [talk(*texts[0])]
  return made * 2  # more than one batch


def by_hand(config, params):
  """The means of log-softmax over each response's tokens; all texts padded to one length."""
  read = jax.jit(lambda tokens_BT: decoder.logits(params, config, tokens_BT))
  means = []
  for response in rollouts():
    (((text, spans, *_),),) = texts_after([response.prompt_tokens], [response]).of
    logits_TV = np.float64(read(np.array([text + [0] * (150 - len(text))]))[0])
    logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    kept = [logp_TV[t - 1, text[t]] for begin, end in spans for t in range(begin, end)]
    means.append(np.mean(kept) if kept else None)
  return means


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_the_base_model_reads_answers_as_by_hand(shape):
  config, params = fakes.toy_model(0, vocab=296, heads=16, kv_heads=8)
  wanted = by_hand(config, params)
  if shape is None:
    means = BaseReader(config, params, None).mean_logp(rollouts())
  else:
    mesh = sharding.make_mesh(jax.devices(), **dict(zip(sharding.AXES, shape, strict=True)))
    with jax.set_mesh(mesh):
      placed = jax.device_put(params, sharding.named(mesh, decoder.axes(config)))
      means = BaseReader(config, placed, mesh).mean_logp(rollouts())
  assert means[4] is wanted[4] is None and wanted[0] != wanted[5]
  for mean, want in zip(means, wanted, strict=True):
    assert mean == (None if want is None else pytest.approx(want, rel=1e-4))


def test_distinct_bigrams_by_hand():
  assert distinct_2(["a b a b", "a b"]) == 2 / 4  # ab ba ab, ab; none across answers
  assert distinct_2(["A b\n a  B"]) == 1.0
  assert distinct_2(["one", "", " two "]) is None


def test_metrics_come_from_lines_that_hold_them():
  def line(*responses):
    return {"kind": None, "difficulty": None, "responses": list(responses)}

  def answer(**extra):
    known = {"reward": 1.0, "status": "scored", "length": 3, "finish_reason": "stop"}
    return known | {"mean_logp": None} | extra

  lines = [
    line(answer(text="a b a", base_logp=-1.0), answer(text="a b", base_logp=-4.0)),
    line(answer(text="", base_logp=None)),
  ]
  wanted = {"x/distinct_2": 2 / 3, "x/base_logp": -2.5}
  assert of_fluency("x", lines) == wanted
  assert wanted.items() <= summarise("x", lines, has_entropy=False).items()
  assert of_fluency("x", [line(answer())]) == {}


def texts_of(workdir, step):
  path = workdir / "eval" / "texts" / f"heldout.step_{step:06d}.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_keeps_answers_and_evaluates_as_its_checkpoint_does(tmp_path, capsys):
  """All weights are trained, so the base model is loaded anew; --mode=eval has it at hand."""
  run = tmp_path / "run"
  command = ["main", f"--config={ROOT}/configs/instructions.py:local"]
  learning = ["--config.optimizer.lr=3e-3", "--config.optimizer.warmup_steps=0"]
  assert main.main([*command, "--config.rollout.group=4", *learning, f"--workdir={run}"]) == 0
  first, _, last = metrics.read(run)
  names = ("eval/heldout/base_logp", "eval/heldout/distinct_2")
  assert all(first[name] is not None and last[name] is not None for name in names)
  for step, line in ((0, first), (2, last)):
    lines = texts_of(run, step)
    assert of_fluency("eval/heldout", lines) == {name: pytest.approx(line[name]) for name in names}
  page = (run / "report" / "index.html").read_text(encoding="utf-8")
  assert "Answers before and after" in page and "base model and step 2" in page
  evaluated = tmp_path / "evaluated"
  more = ["--mode=eval", f"--checkpoint={run}", f"--workdir={evaluated}"]
  suites = (
    f"--suites={ROOT}/configs/eval/instructions.py:local,transfer=false,questions=2,samples=1"
  )
  assert main.main([*command, *more, suites]) == 0
  assert "base model's log-prob." in capsys.readouterr().out
  scores = json.loads((evaluated / "eval" / "step_000002.json").read_text())
  for name in ("avg@k", "distinct_2", "base_logp"):
    assert scores[f"eval/instructions.heldout/{name}"] == pytest.approx(
      last[f"eval/heldout/{name}"], rel=1e-3
    )
  assert "eval/instructions.adversarial/base_logp" in scores


def test_the_suites_measure_the_task_and_what_it_may_carry_over_to():
  _, c = main.parse(["main", f"--config={ROOT}/configs/instructions.py"])
  own, *others = read_suites(f"{ROOT}/configs/eval/instructions.py:data=/d,questions=7", c)
  assert own.c.eval.keep_texts and own.c.eval.base_logp and own.c.rollout.max_new_tokens == 64
  assert [part.name for part in own.parts()] == [
    f"instructions.{split}" for split in ("heldout", "unseen", "adversarial")
  ]
  assert [(suite.name, suite.c.data.sources) for suite in others] == [
    ("ifeval", ("test=/d/ifeval.jsonl",)),
    ("gsm8k", ("test=/d/gsm8k.test.jsonl",)),
  ]
  for suite in others:
    (part,) = suite.parts()
    assert part.decoding == "greedy" and suite.c.eval.questions == 7
    assert not suite.c.eval.keep_texts and not suite.c.eval.base_logp
  with pytest.raises(ValueError, match="data='/d' .* transfer=false reads no files"):
    read_suites(f"{ROOT}/configs/eval/instructions.py:data=/d,transfer=false", c)


def test_a_method_that_shows_solutions_is_refused(tmp_path, capsys):
  file = f"--config={ROOT}/configs/instructions.py:local,method=rlsd"
  assert main.main(["main", file, f"--workdir={tmp_path}"]) == 2
  assert "none of 8 questions for training has one" in capsys.readouterr().err
