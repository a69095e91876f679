"""Pre-training through its command: it learns, resumes, and writes what the trainer loads."""

import json
import pathlib

from absl.testing import flagsaver
import jax
import numpy as np
import pytest

from sdpo_jax import acting, metrics, pretrain
from sdpo_jax.config import load
from sdpo_jax.data import household_rows
from sdpo_jax.data.corpus import DOMAINS, Text, build_tokenizer
from sdpo_jax.model.hf_weights import load_pretrained, save_pretrained
from tests import fakes

ROOT = pathlib.Path(__file__).parent.parent


def run(domain, workdir, *overrides, start=""):
  with flagsaver.flagsaver():
    arguments = f"domain={domain},local" + f",start={start}" * bool(start)
    config = f"--config=configs/pretrain_tiny.py:{arguments}"
    return pretrain.main(["pretrain", config, f"--workdir={workdir}", *overrides])


@pytest.mark.parametrize(
  "domain", [pytest.param(x, marks=pytest.mark.slow) if x == "arithmetic" else x for x in DOMAINS]
)
def test_a_killed_run_resumes_to_the_same_weights(domain, tmp_path, capsys):
  assert run(domain, tmp_path / "whole") == 0
  lines = [
    json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
  ]
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  assert lines[-1]["train/nll"] < lines[0]["train/nll"]
  assert {"eval/plain", "eval/feedback", "eval/solution"} <= lines[-1].keys()
  assert lines[-1]["data/left_out"] == 0
  assert run(domain, tmp_path / "cut", "--config.total_steps=2") == 0
  # killed after a line, before its checkpoint
  with open(tmp_path / "cut" / "metrics.jsonl", "a") as log:
    log.write(json.dumps(lines[2]) + "\n" + '{"step": 4, "tra')
  assert run(domain, tmp_path / "cut") == 0
  assert list(map(metrics.reproducible, metrics.read(tmp_path / "cut"))) == list(
    map(metrics.reproducible, lines)
  )
  assert run(domain, tmp_path / "cut", "--config.optimizer.lr=1.0") == 2
  err = capsys.readouterr().err
  assert "config.optimizer.lr=1.0" in err
  assert "was begun with" in err
  assert err.count("\n") == 1
  (config, whole), (_, cut) = (
    load_pretrained(tmp_path / name / "hf", dtype="float32") for name in ("whole", "cut")
  )
  jax.tree.map(np.testing.assert_array_equal, whole, cut)
  assert config.eos_ids and config.max_positions == 1024


def test_episodes_are_learnt(tmp_path, capsys, monkeypatch):
  """Rows with a weight for each token go through the same command; test_assets.py plays."""
  shares = {f"eval/{view}": 0.25 for view in acting.VIEWS} | {"eval/skill_1_of_2": 0.5}
  monkeypatch.setattr(acting, "success", lambda *_, **__: shares)
  config = f"--config={ROOT}/configs/pretrain_household.py:local"
  with flagsaver.flagsaver():
    assert pretrain.main(["pretrain", config, f"--workdir={tmp_path}"]) == 0
  lines = metrics.read(tmp_path)
  assert lines[-1]["train/nll"] < lines[0]["train/nll"] and lines[0]["data/left_out"] == 0
  assert shares.items() <= lines[-1].items()
  assert "\n  skill: 25.0%; novel: 50.0% 1_of_2\n" in capsys.readouterr().out
  model, _ = load_pretrained(tmp_path / "hf", dtype="float32")
  assert model.vocab == len(household_rows.build_tokenizer())


def test_a_pack_scores_the_tokens_that_have_weight():
  pack = pretrain.Pack(rows=1, length=8, responses=4, pad_token=0)
  assert pack.add(Text([5, 6, 7, 8], [0.0, 0.5, 0.0, 1.0]))
  assert pack.add(Text([1, 2, 3], [0.0, 1.0, 1.0]))
  assert not pack.add(Text([9], [1.0])) and not pack.add(Text([7, 8], [0.0, 0.0]))
  assert pack.response_BR.tolist() == [[6, 8, 2, 3]]
  assert pack.weight_BR.tolist() == [[0.5, 1.0, 1.0, 1.0]]
  assert pack.token_BT[0, pack.at_BR[0]].tolist() == [5, 7, 1, 2]  # the token before
  assert pack.segment_BT.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]


def test_it_goes_on_from_a_model_of_the_same_vocabulary(tmp_path, capsys):
  """From its weights; it reads notes and verdicts too, and says what it makes of them."""
  tokenizer = build_tokenizer("arithmetic")
  model, params = fakes.toy_model(
    0,
    layers=1,
    vocab=len(tokenizer),
    eos_ids=(tokenizer.eos_token_id,),
    pad_id=tokenizer.pad_token_id,
    max_positions=1024,
  )
  save_pretrained(tmp_path / "base", model, params, tokenizer=tokenizer)
  c = load(f"configs/pretrain_tiny.py:domain=arithmetic,local,start={tmp_path}/base")
  jax.tree.map(np.testing.assert_array_equal, pretrain.beginning(c, tokenizer)[1], params)
  assert (
    run("arithmetic", tmp_path / "further", "--config.eval.every_steps=4", start=tmp_path / "base")
    == 0
  )
  first, *_, last = metrics.read(tmp_path / "further")
  assert last["train/nll"] < first["train/nll"] and last["data/left_out"] == 0
  assert {"eval/notes", "eval/imagine", "eval/imagine_verdict"} <= last.keys()
  assert "verdicts imagined: " in capsys.readouterr().out
  assert run("arithmetic", tmp_path / "other", start="tiny") == 2
  err = capsys.readouterr().err
  assert "start='tiny' has another vocabulary" in err and err.count("\n") == 1


@pytest.mark.parametrize(
  "domain, arguments, message",
  [
    (
      "poetry",
      [],
      "domain='poetry' is unknown; choose from ['arithmetic', 'household', 'tinycode']",
    ),
    (
      "arithmetic",
      ["--config=configs/tinycode.py"],
      "configs/tinycode.py names no domain: it is a file for python -m sdpo_jax.main",
    ),
    ("arithmetic", ["--workdir=/proc/nowhere"], "/proc/nowhere"),
    ("arithmetic", ["--config.optimizer.name=sgd"], "optimizer.name='sgd' is unknown"),
    (
      "arithmetic",
      ["--config.optimizer.clip_norm=0"],
      "config.optimizer.clip_norm=0 must be above 0",
    ),
    ("arithmetic", ["--config.corpus.plain=-5"], "config.corpus.plain=-5.0 must be at least 0"),
    (
      "arithmetic",
      ["--config.corpus.plain=0", "--config.corpus.feedback=0", "--config.corpus.solution=0"]
      + ["--config.corpus.both=0"],
      "config.corpus: the shares {'plain': 0.0",
    ),
    ("arithmetic", ["--config.corpus.lengths=(0.0,0.0,0.0)"], "config.corpus.lengths=(0.0, 0.0"),
    (
      "arithmetic",
      ["--config.batch.length=8"],
      "config.batch.length=8 and config.batch.responses=48 "
      "have room for none of the first batch's 16 texts",
    ),
    ("arithmetic", ["--config.batch.texts=0"], "config.batch.texts=0 must be at least 1"),
  ],
)
def test_a_wrong_setting_is_one_line(domain, arguments, message, tmp_path, capsys):
  assert run(domain, tmp_path / "run", *arguments) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1
  assert not (tmp_path / "run").exists()
