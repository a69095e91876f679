"""Export of a run: transformers loads what it writes; a wrong argument is one line and status 2."""

import json

from absl.testing import flagsaver
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from sdpo_jax import checkpoint, export, train_step
from sdpo_jax.config import MODELS
from sdpo_jax.evaluation.evaluate import find_model
from sdpo_jax.model import decoder, hf_weights
from sdpo_jax.serve.weights import load_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Makes a work directory of the tiny model with checkpoints 2 and 4.

  Their weights are 1.25 and 1.5 times the base model's.
  """
  workdir = tmp_path_factory.mktemp("run")
  (workdir / "config.json").write_text(
    json.dumps(dict(model=dict(path="tiny", param_dtype="float32", lora=dict(rank=0))))
  )
  config, params = hf_weights.load_pretrained(MODELS["tiny"], dtype=jnp.float32)
  for step, factor in ((2, 1.25), (4, 1.5)):
    scaled = jax.tree.map(lambda x, factor=factor: factor * x, params)
    host = {"tokens": 0, "best": [2, 0.5, "eval/heldout/avg@k"]}
    checkpoint.save(workdir, step, train_step.init_state(scaled, optax.sgd(0.1)), host)
  return workdir, config, params


def scaled_logits(config, params, factor, tokens):
  return np.asarray(decoder.logits(jax.tree.map(lambda x: factor * x, params), config, tokens))


@pytest.mark.parametrize("step, factor", [(None, 1.5), (2, 1.25), (0, 1.0)])
def test_transformers_loads_the_exported_policy(run, tmp_path, step, factor):
  workdir, config, params = run
  assert export.export(workdir, tmp_path / "out", step=step) == (4 if step is None else step)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
  assert model.dtype == torch.float32
  tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 20)).astype(np.int32)
  with torch.no_grad():
    theirs = model(torch.tensor(tokens).long()).logits.numpy()
  np.testing.assert_allclose(
    theirs, scaled_logits(config, params, factor, tokens), atol=2e-3, rtol=1e-4
  )
  ours, original = (
    transformers.AutoTokenizer.from_pretrained(p) for p in (tmp_path / "out", MODELS["tiny"])
  )
  messages = [dict(role="system", content="Write Python."), dict(role="user", content="return x")]
  prompts = [
    t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for t in (ours, original)
  ]
  assert prompts[0] == prompts[1]
  assert ours(prompts[0])["input_ids"] == original(prompts[0])["input_ids"]


def test_evaluation_and_server_find_the_best_checkpoint(run, tmp_path):
  workdir, _, params = run
  assert find_model(f"{workdir}:best") == (str(workdir), 2, "step_000002")
  assert find_model(f"{workdir}:4").step == find_model(str(workdir)).step == 4
  settings = json.loads((workdir / "config.json").read_text())
  settings["model"]["dtype"] = "float32"
  (workdir / "config.json").write_text(json.dumps(settings))
  served = load_checkpoint(f"{workdir}:best", None).params
  assert all(
    np.array_equal(w, 1.25 * p)
    for w, p in zip(jax.tree.leaves(served), jax.tree.leaves(params), strict=True)
  )
  checkpoint.save(tmp_path, 1, train_step.init_state(params, optax.sgd(0.1)), {"best": None})
  with pytest.raises(FileNotFoundError, match="none is the best one"):
    find_model(f"{tmp_path}:best")


def test_another_dtype(run, tmp_path):
  workdir, _, params = run
  export.export(workdir, tmp_path / "out", dtype="bfloat16")
  config, written = hf_weights.load_pretrained(tmp_path / "out", dtype=jnp.bfloat16)
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
  assert all(
    np.array_equal(w, (1.5 * p).astype(jnp.bfloat16))
    for w, p in zip(jax.tree.leaves(written), jax.tree.leaves(params), strict=True)
  )


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "--workdir=... is needed"),
    (["--workdir={run}"], "--out=... is needed"),
    (["--workdir={run}", "--out={run}"], "exists and is not an empty directory"),
    (["--workdir={out}", "--out={out}"], "no config.json"),
    (
      ["--workdir={pretrained}", "--out={out}"],
      "is a work directory of sdpo_jax.pretrain: use what it wrote for transformers",
    ),
    (["--workdir={run}", "--out={out}", "--step=3"], "no checkpoint of step 3"),
    (["--workdir={run}", "--out={out}", "--step=last"], "--step='last': give the number"),
    (["--workdir={run}", "--out={out}", "--dtype=int8"], "int8"),
    (["--workdir={run}", "--out={out}", "--setp=3"], "setp"),
    (["--workdir={run}", "--out={out}", "now"], "unknown argument 'now'"),
  ],
)
def test_a_wrong_argument_is_one_line(run, tmp_path, capsys, arguments, words):
  (tmp_path / "config.json").write_text(json.dumps(dict(model=dict(width=8))))
  filled = [a.format(run=run[0], out=tmp_path / "out", pretrained=tmp_path) for a in arguments]
  with flagsaver.flagsaver():
    assert export.main(["export", *filled]) == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1 and err.startswith("sdpo_jax: ")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["2", "best"])
def test_the_command_line_says_what_it_wrote(step, run, tmp_path, capsys):
  with flagsaver.flagsaver():
    arguments = [f"--workdir={run[0]}", f"--out={tmp_path / 'out'}", f"--step={step}"]
    assert export.main(["export", *arguments]) == 0
  assert capsys.readouterr().out == f"step 2 of {run[0]} written to {tmp_path / 'out'}\n"
