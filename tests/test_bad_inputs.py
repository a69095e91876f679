"""What people get wrong, in one table: each ends in one line that names it, with status 2.

Nothing is trained and nothing that was there is lost. Full disks and kills are in test_main.py,
damaged checkpoints in test_checkpoint.py.
"""

import json
import os
import pathlib
import shutil

import jax.numpy as jnp
import pytest

from sdpo_jax import checkpoint, config, export, main, pretrain
from sdpo_jax.report.__main__ import main as report_main

ROOT = pathlib.Path(__file__).parent.parent
TINY = f"--config={ROOT}/configs/tinycode.py:local"
MATHS = f"--config={ROOT}/configs/math_qa.py:local"
SCIENCE = f"--config={ROOT}/configs/science_mcq.py:local"


def rows(*lines):
  """A file of rows in place of the configuration's own."""

  def arguments(folder):
    path = folder / "rows.jsonl"
    path.write_text(
      "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return [MATHS, f"--config.data.sources=('train={path}', 'test={path}')"]

  return arguments


def model(change):
  """A copy of the tiny model, changed."""

  def arguments(folder):
    directory = folder / "model"
    shutil.copytree(config.MODELS["tiny"], directory)
    change(directory)
    return [TINY, f"--config.model.path={directory}"]

  return arguments


def rewrite(name, text):
  return lambda directory: (directory / name).write_text(text)


def change_json(name, **changes):
  def change(directory):
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


def remove(*names):
  def change(directory):
    for name in names:
      for path in directory.glob(name):
        path.unlink()

  return change


def cut_weights(directory):
  os.truncate(next(directory.glob("*.safetensors")), 1000)


def begun(folder):
  """A work directory that was begun with another seed."""
  checkpoint.save(folder / "run", 1, {"step": jnp.int32(1)}, {})
  c = main.parse(["main", TINY, "--config.seed=3"])[1]
  (folder / "run" / "config.json").write_text(json.dumps(c.to_dict()))
  return [TINY]


def of_another_version(folder):
  """A work directory whose checkpoint holds other arrays."""
  c = main.parse(["main", TINY])[1]
  checkpoint.save(folder / "run", 1, {"step": jnp.int32(1)}, {})
  (folder / "run" / "config.json").write_text(json.dumps(c.to_dict()))
  return [TINY]


def damaged(folder):
  arguments = of_another_version(folder)
  shutil.rmtree(folder / "run" / "checkpoints" / "1" / "host")
  return arguments


def a_file(folder):
  (folder / "file").write_text("")
  return [TINY, f"--workdir={folder / 'file'}"]


GOOD = {"question": "What is 1 + 1?", "answer": "2"}
BAD = {
  # command line
  "no_such_file": (["--config=configs/nowhere.py"], "configs/nowhere.py: no such file"),
  "no_configuration": ([f"--config={ROOT}/tests/my_env.py"], "my_env.py"),
  "unknown_argument": (
    [f"--config={ROOT}/configs/tinycode.py:metod=grpo"],
    "'metod' of the config file is unknown; did you mean 'method'; choose",
  ),
  "unknown_method": (
    [f"--config={ROOT}/configs/tinycode.py:method=gspoo"],
    "method='gspoo' is unknown; did you mean 'gspo'; choose from ['adaptive_cringe'",
  ),
  "unknown_mode": (
    [TINY, "--mode=training"],
    "choose from ['train', 'eval', 'diagnose', 'discover', 'plan']",
  ),
  "unknown_flag": ([TINY, "--nonsense"], "nonsense"),
  "eval_of_nothing": ([TINY, "--mode=eval"], "--checkpoint"),
  "flag_of_another_mode": ([TINY, "--topology=v5e:8x8"], "--topology would not be read"),
  "plan_for_nothing": ([TINY, "--mode=plan"], "--mode=plan needs --topology"),
  "unknown_chip": ([TINY, "--mode=plan", "--topology=v9:2x2"], "v9"),
  "processes_without_a_place": (
    [TINY, "--workdir=", "--distributed=127.0.0.1:99,2,0"],
    "--distributed needs --workdir",
  ),
  "wrong_address": ([TINY, "--distributed=127.0.0.1,1,0"], "must be auto or HOST:PORT,PROCESSES"),
  "no_patience": ([TINY, "--peer_timeout_s=1"], "peer_timeout_s"),
  # places
  "object_store": ([TINY, "--workdir=gs://bucket/run"], "--workdir=gs://bucket/run: files are"),
  "object_store_to_score": (
    [TINY, "--mode=eval", "--checkpoint=s3://bucket/run"],
    "--checkpoint=s3://bucket/run: files are read and written by their paths; mount the bucket",
  ),
  "object_store_of_rows": (
    [MATHS, "--config.data.sources=('gs://b/{split}.jsonl',)"],
    "gs://b/train.jsonl: files",
  ),
  "object_store_of_a_model": ([TINY, "--config.model.path=gs://b/model"], "gs://b/model: files"),
  "place_that_cannot_be": ([TINY, "--workdir=/proc/nowhere"], "/proc/nowhere: cannot write there"),
  "place_that_is_a_file": (a_file, "file: cannot write there"),
  "cache_that_cannot_be": ([TINY, "--compilation_cache=/proc/no"], "/proc/no: cannot write there"),
  # settings
  "unknown_setting": ([TINY, "--config.rollout.grup=4"], "grup"),
  "word_for_a_number": ([TINY, "--config.rollout.group=four"], "four"),
  "no_number": ([TINY, "--config.rollout.temperature=nan"], "config.rollout.temperature"),
  "out_of_range": ([TINY, "--config.method.token_signal.alpha=2.0"], "alpha"),
  "group_of_one": (
    [f"--config={ROOT}/configs/tinycode.py:local,method=grpo", "--config.rollout.group=1"],
    "config.rollout.group=1 with advantage 'group_mean'",
  ),
  "batch_that_does_not_divide": ([TINY, "--config.train.micro_batches=3"], "do not divide"),
  "mesh_that_does_not_divide": ([TINY, "--config.mesh.data=3"], "config.mesh="),
  "more_positions_than_there_are": ([TINY, "--config.rollout.max_new_tokens=4000"], "positions"),
  "unknown_isolation": ([TINY, "--config.sandbox.isolation=jail"], "jail"),
  # environments
  "unknown_environment": ([TINY, "--config.env.name=tinycod"], "did you mean 'tinycode'"),
  "unknown_level": ([TINY, "--config.env.level=harder"], "very_hard"),
  "no_such_module": ([TINY, "--config.env.name=nowhere:Env"], "nowhere"),
  "no_such_class": ([TINY, "--config.env.name=tests.my_env:Nothing"], "Nothing"),
  # rows
  "no_rows": ([MATHS, "--config.data.sources=('/nowhere/rows.jsonl',)"], "/nowhere/rows.jsonl"),
  "rows_of_another_kind": ([MATHS, "--config.data.sources=('{split}.csv',)"], ".csv is neither"),
  "empty_file": (rows(), "rows.jsonl"),
  "line_cut_short": (rows(GOOD, '{"question": "x", "answ'), "rows.jsonl"),
  "row_without_an_answer": (rows(GOOD, {"question": "x"}), "line 2: field 'solution' is missing"),
  "answer_that_is_no_number": (rows({"question": "x", "answer": float("nan")}), "'answer'"),
  "question_that_is_too_long": (rows(GOOD | {"question": "x " * 9000}), "max_prompt_tokens"),
  # models
  "no_model": ([TINY, "--config.model.path=/nowhere/model"], "/nowhere/model"),
  "model_without_a_configuration": (model(remove("config.json")), "config.json"),
  "configuration_that_is_no_json": (model(rewrite("config.json", "{")), "config.json"),
  "unknown_family": (model(change_json("config.json", model_type="gpt9")), "gpt9"),
  "model_without_weights": (model(remove("*.safetensors")), "safetensors"),
  "weights_cut_short": (model(cut_weights), "safetensors"),
  "model_without_a_tokenizer": (model(remove("tokenizer*", "*.jinja", "vocab*")), "tokenizer"),
  "template_that_is_none": (model(rewrite("chat_template.jinja", "{% if %}")), "template"),
  "layers_that_are_not_there": (
    model(change_json("config.json", num_hidden_layers=9)),
    "model.layers.",
  ),
  # checkpoints
  "suite_without_its_data": (
    [
      *[TINY, "--mode=eval", f"--checkpoint={config.MODELS['tiny']}"],
      f"--suites={ROOT}/configs/eval/instructions.py:data=/nowhere",
    ],
    "suite ifeval: config.data.sources: /nowhere/ifeval.jsonl: no such file; the first lines of",
  ),
  "nothing_to_score": ([TINY, "--mode=eval", "--checkpoint=/nowhere/run"], "/nowhere/run"),
  "other_settings": (begun, "config.seed=0 but"),
  "other_arrays": (of_another_version, "holds another state"),
  "checkpoint_that_is_damaged": (damaged, "is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_says_what_is_wrong(name, tmp_path, capsys):
  arguments, message = BAD[name]
  arguments = arguments(tmp_path) if callable(arguments) else arguments
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
  status = main.main(["main", f"--workdir={tmp_path / 'run'}", *arguments])
  captured = capsys.readouterr()
  lines = [line for line in captured.err.splitlines() if line.startswith("sdpo_jax: ")]
  assert status == 2 and len(lines) == 1, captured.err
  assert message in lines[0]
  assert "Traceback" not in captured.err
  assert before.items() <= {p: p.stat().st_mtime_ns for p in before}.items()


def test_the_other_commands_refuse_an_object_store_too(capsys):
  assert pretrain.main(["pretrain", "--workdir=gs://b/run"]) == 2
  assert export.main(["export", "--workdir=gs://b/run", "--out=x"]) == 2
  for line in capsys.readouterr().err.splitlines():
    assert "gs://b/run: files are read and written by their paths" in line
  with pytest.raises(SystemExit, match="2"):
    report_main(["gs://b/run"])
  assert "gs://b/run: files are" in capsys.readouterr().err
