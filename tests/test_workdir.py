"""A work directory belongs to one run: what may change when it goes on, and what is refused."""

import json
import pathlib

import numpy as np
import pytest

from sdpo_jax import checkpoint, config, main, pretrain, train
from sdpo_jax.data.corpus import Mixture
from sdpo_jax.workdir import check_same_run

ROOT = pathlib.Path(__file__).parent.parent
TINYCODE = f"--config={ROOT}/configs/tinycode.py:local"


def parsed(*arguments):
  return main.parse(["main", *arguments])[1]


def begun(workdir, c, step=2, without=()):
  """Makes a work directory with a checkpoint and the settings of c, but for those left out."""
  settings = c.to_dict()
  for path in without:
    *sections, key = path.split(".")
    node = settings
    for section in sections:
      node = node[section]
    del node[key]
  checkpoint.save(workdir, step, {"x": np.zeros(1)}, {})
  (workdir / "config.json").write_text(json.dumps(settings))


def refused(capsys, workdir, *arguments):
  """Returns the line that a command ends with."""
  assert main.main(["main", *arguments, f"--workdir={workdir}"]) == 2
  return capsys.readouterr().err.splitlines()[-1]


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "path, changed",
  [
    ("log.rollouts_kept", "--config.log.rollouts_kept=3"),
    ("eval.splits", "--config.eval.splits=('unseen',)"),  # a tuple here, a list in the file
    ("discover", "--config.discover.questions=3"),  # a section
    ("optimizer.clip_norm", "--config.optimizer.clip_norm=None"),
    ("method.token_signal.top_k", "--config.method.token_signal.top_k=20"),
    ("method.advantage", "--config.method.advantage.name=group_mean"),  # an axis
    ("method.policy_share", "--config.method.policy_share=0.5"),
    ("env.words_seed", "--config.env.words_seed=1"),
  ],
)
def test_a_younger_setting_has_to_be_at_its_default(path, changed, tmp_path):
  c = parsed(TINYCODE)
  begun(tmp_path, c, without=[path])
  check_same_run(tmp_path, c, begun=True, defaults=config.defaults_of(c))
  key = changed.removeprefix("--").partition("=")[0]
  c = parsed(TINYCODE, changed)
  with pytest.raises(ValueError, match=f"^{key}=.* but {tmp_path} was begun with "):
    check_same_run(tmp_path, c, begun=True, defaults=config.defaults_of(c))


def test_settings_of_another_environment_and_part_have_their_own_defaults(tmp_path):
  own = ["--config.env.name=tests.my_env:ReverseWord", "--config.method.teacher_weights.name=ema"]
  c = parsed(TINYCODE, *own)
  begun(tmp_path, c, without=["env.length", "method.teacher_weights.rate"])
  check_same_run(tmp_path, c, begun=True, defaults=config.defaults_of(c))
  c = parsed(TINYCODE, *own, "--config.env.length=9")
  with pytest.raises(ValueError, match="^config.env.length=9 but .* was begun with "):
    check_same_run(tmp_path, c, begun=True, defaults=config.defaults_of(c))


def test_a_setting_that_is_no_more_is_refused(tmp_path):
  c = parsed(TINYCODE)
  begun(tmp_path, c)
  settings = json.loads((tmp_path / "config.json").read_text())
  settings["rollout"]["speculative"] = 4
  (tmp_path / "config.json").write_text(json.dumps(settings))
  with pytest.raises(ValueError, match="^config.rollout.speculative=None but .* begun with 4: "):
    check_same_run(tmp_path, c, begun=True, defaults=config.defaults_of(c))


def test_pretraining_has_defaults_of_its_own(tmp_path):
  file = f"{ROOT}/configs/pretrain_tiny.py:local"
  c = pretrain.configuration(file, ["pretrain"])
  begun(tmp_path, c, without=["log_every_steps", "corpus.twist", "optimizer.b2"])
  defaults = pretrain.default_settings(file)
  check_same_run(tmp_path, c, begun=True, defaults=defaults)
  for key, value in (("log_every_steps", "7"), ("corpus.twist", "0.75"), ("optimizer.b2", "0.5")):
    c = pretrain.configuration(file, ["pretrain", f"--config.{key}={value}"])
    with pytest.raises(ValueError, match=f"^config.{key}={value} but .* was begun with "):
      check_same_run(tmp_path, c, begun=True, defaults=defaults)
  # what a file says of the corpus is no default of it
  own = tmp_path / "own.py"
  own.write_text(pathlib.Path(file.removesuffix(":local")).read_text().replace("0.45", "0.46"))
  assert pretrain.default_settings(f"{own}:start=tiny")["corpus"]["notes"] == Mixture().notes


# ---- the number of steps -------------------------------------------------------------------------


CONSTANT = "--config.optimizer.decay_steps=0"


@pytest.mark.parametrize(
  "schedule, longer",
  [
    (CONSTANT, "--config.total_steps=500"),
    ("--config.optimizer.decay_steps=240", "--config.total_steps=240"),  # stated in steps
  ],
)
def test_more_steps_within_the_schedule_are_the_same_run(schedule, longer, tmp_path):
  begun(tmp_path, parsed(TINYCODE, schedule))
  c = parsed(TINYCODE, schedule, longer)
  config.validate(c)
  check_same_run(tmp_path, c, begun=True, defaults=config.defaults_of(c))


def test_more_steps_than_the_schedule_has_are_refused_with_the_reason(tmp_path, capsys):
  longer = ["--config.total_steps=480", "--config.train.updates_per_batch=2"]
  begun(tmp_path, parsed(TINYCODE, longer[1]))
  line = refused(capsys, tmp_path, TINYCODE, *longer)
  assert "means 960 updates, but the learning rate is 0 after" in line
  assert "one that was begun so ends by step 120" in line
  line = refused(capsys, tmp_path, TINYCODE, *longer, "--config.optimizer.decay_steps=960")
  assert f"decay_steps=960 but {tmp_path} was begun with 240: choose another --workdir" in line
  assert "its learning rate is on the way to 0 at update 240" in line
  line = refused(capsys, tmp_path, TINYCODE, *longer, CONSTANT)
  assert "its learning rate is on the way to 0 at update 240" in line
  begun(tmp_path / "constant", parsed(TINYCODE, CONSTANT))
  line = refused(capsys, tmp_path / "constant", TINYCODE)
  assert line.endswith("was begun with 0: choose another --workdir, or the same settings")
  config_file = f"{ROOT}/configs/pretrain_tiny.py:local"
  with pytest.raises(ValueError, match="so ends by step 4$"):
    pretrain.configuration(config_file, ["pretrain", "--config.total_steps=5"])


def test_fewer_steps_than_are_done_train_nothing(tmp_path, capsys):
  begun(tmp_path, parsed(TINYCODE), step=6)
  (tmp_path / "report").mkdir()
  (tmp_path / "report" / "index.html").touch()
  before = sorted(path for path in tmp_path.rglob("*"))
  train.train(parsed(TINYCODE, "--config.total_steps=4"), str(tmp_path))
  assert capsys.readouterr().err == (
    f"finished: {tmp_path} holds the checkpoint of step 6 and config.total_steps is 4: "
    "nothing is trained\n"
  )
  assert sorted(path for path in tmp_path.rglob("*")) == before
