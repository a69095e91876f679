"""A run with adapters: only they are trained and saved, and a resumed run goes on.

Export writes them merged or alone.
"""

import json
import shutil

from absl.testing import flagsaver
import grain  # noqa: F401 - defines flags: imported first inside flagsaver, it would lose them
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from sdpo_jax import checkpoint, export, main, metrics
from sdpo_jax.config import MODELS
from sdpo_jax.model import decoder, hf_weights, lora

LORA = lora.Lora(4, 8.0, ("q_proj", "down_proj"))
ARGS = [
  "--config=configs/tinycode.py:local",
  "--config.model.lora.rank=4",
  "--config.model.lora.alpha=8.0",
  "--config.model.lora.targets=('q_proj','down_proj')",
  "--config.eval.questions=2",
  "--config.eval.samples=1",
  "--config.checkpoint.every_steps=1",
  "--config.optimizer.warmup_steps=0",
  "--config.optimizer.decay_steps=0",  # a constant rate, so that a run may become longer
]


def run(workdir, *more):
  with flagsaver.flagsaver():
    return main.main(["main", *ARGS, f"--workdir={workdir}", *more])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("lora")
  assert run(path) == 0
  return path


def adapters(workdir, step):
  config = hf_weights.read_config(MODELS["tiny"], dtype="float32")
  return config, checkpoint.restore_params(workdir, lora.shapes(config, LORA), step)


def test_only_adapters_are_trained_and_saved(workdir):
  config, after = adapters(workdir, 2)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(after))  # b began at zero
  saved = sum(
    p.stat().st_size for p in (workdir / "checkpoints" / "2" / "state").rglob("*") if p.is_file()
  )
  weights = sum(np.prod(s.shape) * 4 for s in jax.tree.leaves(decoder.shapes(config)))
  assert saved < weights / 4  # adapters, their optimiser and their teacher


def test_a_resumed_run_writes_the_same_metrics(workdir, tmp_path):
  cut_short = tmp_path / "cut_short"  # as a kill behind the checkpoint of step 1 leaves it
  shutil.copytree(workdir, cut_short)
  shutil.rmtree(cut_short / "checkpoints" / "2")
  assert run(cut_short) == 0
  ours, theirs = (
    [metrics.reproducible(line) for line in metrics.read(w)] for w in (cut_short, workdir)
  )
  assert ours == theirs and ours[-1]["step"] == 2


def test_export_merges_adapters_or_writes_them_alone(workdir, tmp_path):
  config, trained = adapters(workdir, 2)
  _, base = hf_weights.load_pretrained(MODELS["tiny"], dtype="float32")
  assert export.export(workdir, tmp_path / "merged") == 2
  _, merged = hf_weights.load_pretrained(tmp_path / "merged", dtype="float32")
  expected = lora.merge(base, trained, LORA)
  jax.tree.map(np.testing.assert_array_equal, merged, expected)
  assert not np.array_equal(merged["layers"]["attn"]["q"], base["layers"]["attn"]["q"])
  np.testing.assert_array_equal(merged["layers"]["attn"]["k"], base["layers"]["attn"]["k"])
  assert export.export(workdir, tmp_path / "alone", adapters=True) == 2
  about, alone = (
    json.loads((tmp_path / "alone" / "adapter_config.json").read_text()),
    load_file(tmp_path / "alone" / "adapter_model.safetensors"),
  )
  assert (about["r"], about["lora_alpha"], about["target_modules"]) == (
    4,
    8.0,
    ["down_proj", "q_proj"],
  ) and len(alone) == 2 * 2 * config.layers
  for layer in range(config.layers):
    for letter in "ab":  # tests/test_lora.py says what the numbers mean
      tensor = alone[
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{letter.upper()}.weight"
      ]
      np.testing.assert_array_equal(
        tensor.T.reshape(-1), np.asarray(trained["layers"]["attn"]["q"][letter][layer]).reshape(-1)
      )


def test_adapters_of_a_run_without_them_is_an_error(tmp_path):
  (tmp_path / "config.json").write_text(
    json.dumps(dict(model=dict(path="tiny", param_dtype="float32", lora=dict(rank=0))))
  )
  with pytest.raises(ValueError, match="its run trained all weights"):
    export.export(tmp_path, tmp_path / "out", adapters=True)


def test_the_evaluation_of_a_checkpoint_reads_the_adapters(workdir, tmp_path):
  assert run(tmp_path, "--mode=eval", f"--checkpoint={workdir}") == 0
  scored = json.loads((tmp_path / "eval" / "step_000002.json").read_text())
  assert scored["eval/heldout/avg@k"] == metrics.read(workdir)[-1]["eval/heldout/avg@k"]
