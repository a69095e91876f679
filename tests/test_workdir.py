"""A work directory belongs to one run: what may change when it goes on, and what is refused."""

import json
import pathlib

import numpy as np
import pytest

from sdpo_jax import checkpoint, config, hosts, main, pretrain, train, workdir
from sdpo_jax.data.corpus import Mixture
from sdpo_jax.data.tasks import RowEnv
from sdpo_jax.envs.math_qa import MathQA
from sdpo_jax.envs.tinycode import TinyCode
from sdpo_jax.session import same_rows
from sdpo_jax.workdir import change_of_devices, change_of_rows, check_same_run, describe_run

ROOT = pathlib.Path(__file__).parent.parent
TINYCODE = f"--config={ROOT}/configs/tinycode.py:local"
MATHS = f"--config={ROOT}/configs/math_qa.py:local"


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


def test_a_run_of_an_earlier_version_that_called_a_value_otherwise_goes_on(tmp_path):
  c = parsed(f"--config={ROOT}/configs/tinycode.py:method=srpo,local")
  begun(tmp_path, c)
  path = tmp_path / "config.json"
  path.write_text(
    path.read_text().replace('"policy_share": "routed"', '"policy_share": "untaught"')
  )
  assert "untaught" in path.read_text()
  check_same_run(tmp_path, c, begun=True, defaults=config.defaults_of(c))


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
  # what a kill left of an old checkpoint after the last save
  (tmp_path / "checkpoints" / "deleted" / "4" / "state").mkdir(parents=True)
  train.train(parsed(TINYCODE, "--config.total_steps=4"), str(tmp_path))
  assert capsys.readouterr().err == (
    f"finished: {tmp_path} holds the checkpoint of step 6 and config.total_steps is 4: "
    "nothing is trained\n"
  )
  assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_run_goes_on_over_other_devices_and_says_what_may_differ(tmp_path):
  c = parsed(TINYCODE)
  begun(tmp_path, c)
  describe_run(tmp_path, c, {"mesh": {"data": 2, "fsdp": 2}})
  other = parsed(TINYCODE, "--config.mesh.data=4", "--config.mesh.fsdp=1")
  check_same_run(tmp_path, other, begun=True, defaults=config.defaults_of(other))
  assert change_of_devices(tmp_path, {"data": 2, "fsdp": 2}) == ""
  change = change_of_devices(tmp_path, {"data": 4, "fsdp": 1})
  assert "mesh {'data': 2, 'fsdp': 2} then, {'data': 4, 'fsdp': 1} now" in change
  assert "the questions and their order stay the same" in change and "processes" not in change
  about = json.loads((tmp_path / "run.json").read_text())
  (tmp_path / "run.json").write_text(json.dumps(about | {"processes": 2}))
  assert "processes 2 then, 1 now" in change_of_devices(tmp_path, {"data": 2, "fsdp": 2})
  del about["processes"]  # as an older version wrote it
  (tmp_path / "run.json").write_text(json.dumps(about))
  assert change_of_devices(tmp_path, {"data": 2, "fsdp": 2}) == ""


# ---- rows ----------------------------------------------------------------------------------------


def fingerprint(rows=4, rows_sha256="r", tasks_sha256="t"):
  return {"rows": rows, "rows_sha256": rows_sha256, "tasks_sha256": tasks_sha256}


BEFORE = {"test": fingerprint(), "train": fingerprint(9)}


@pytest.mark.parametrize(
  "now, says",
  [
    (BEFORE, None),
    ({"dev": fingerprint(1, "x", "x")}, None),  # a split that was not read
    (BEFORE | {"test": fingerprint(4, rows_sha256="x")}, None),  # a column that nothing reads
    (
      BEFORE | {"train": fingerprint(8, "x", "x")},
      "the rows of split 'train' are not those that {} was begun with (9 rows then, 8 now): "
      "restore them, or choose another --workdir",
    ),
  ],
)
def test_other_rows_are_told_with_their_split_and_number(now, says, tmp_path, caplog):
  assert change_of_rows(tmp_path, now) is None  # no run.json
  (tmp_path / "run.json").write_text('{"seed": 0}')
  assert change_of_rows(tmp_path, now) is None  # of a version without fingerprints
  (tmp_path / "run.json").write_text(json.dumps({"rows": BEFORE}))
  said = change_of_rows(tmp_path, now)
  assert said == (says and f"config.data.sources: {says.format(tmp_path)}")
  assert not caplog.messages


def test_the_same_rows_read_otherwise_are_no_other_data(tmp_path, caplog):
  (tmp_path / "run.json").write_text(json.dumps({"rows": BEFORE}))
  assert change_of_rows(tmp_path, {"test": fingerprint(tasks_sha256="x")}) is None
  (message,) = caplog.messages
  assert "the rows of split 'test' are those that" in message and "reads them otherwise" in message


def test_every_process_hears_that_the_rows_of_one_differ(tmp_path, monkeypatch):
  env = RowEnv(MathQA(), (f"{config.ROWS}/math_qa.{{split}}.jsonl",), splits=("train",))
  monkeypatch.setattr(hosts, "share", lambda value: [value, "the rows of process 1"])
  with pytest.raises(ValueError, match="^the rows of process 1$"):
    same_rows(tmp_path, env, ("train",), begun=True)
  monkeypatch.setattr(hosts, "share", lambda value: [value, None])
  (tmp_path / "run.json").write_text(json.dumps({"rows": BEFORE}))
  rows = same_rows(tmp_path, env, ("train",), begun=False)
  assert rows == BEFORE | {"train": env.fingerprint("train")}
  assert same_rows(tmp_path, TinyCode(sandbox=None), ("train",), begun=True) == BEFORE


@pytest.fixture
def maths(tmp_path, monkeypatch):
  """(settings, work directory, file of rows, steps trained): a run whose loop only saves."""
  path = tmp_path / "rows.train.jsonl"
  lines = [json.dumps({"question": f"What is {i}?", "answer": i}) for i in range(6)]
  for name in ("train", "test"):
    path.with_name(f"rows.{name}.jsonl").write_text("\n".join(lines))
  trained = []
  (tmp_path / "run").mkdir()

  def loop(state, host, steps, *, total_steps, limits):
    trained.append(total_steps)
    steps.save(total_steps, state, steps.position(host))
    return state

  monkeypatch.setattr(train, "run", loop)
  monkeypatch.setattr(train.report, "write_report", lambda *_: None)
  source = f"--config.data.sources=('{tmp_path}/rows.{{split}}.jsonl',)"
  return [MATHS, source, CONSTANT], tmp_path / "run", path, trained


def test_a_resumed_run_whose_rows_changed_says_so(maths, capsys):
  """One that was begun before there were fingerprints goes on, and has them from then on."""
  settings, workdir, path, trained = maths
  about = workdir / "run.json"
  train.train(parsed(*settings), str(workdir))
  stored = json.loads(about.read_text())
  assert stored["rows"]["train"]["rows"] == 6 and stored["rows"].keys() == {"train", "test"}
  before, longer = path.read_text(), [*settings, "--config.total_steps=3"]
  # a reward alone: ids and number stay as they are
  path.write_text(before.replace('"answer": 5', '"answer": 4'))
  assert refused(capsys, workdir, *longer) == (
    f"sdpo_jax: config.data.sources: the rows of split 'train' are not those that {workdir} was "
    "begun with (6 rows then, 6 now): restore them, or choose another --workdir"
  )
  assert trained == [2] and json.loads(about.read_text()) == stored
  about.write_text(json.dumps({key: value for key, value in stored.items() if key != "rows"}))
  train.train(parsed(*longer), str(workdir))
  assert trained == [2, 3]
  path.write_text(before)
  line = refused(capsys, workdir, *settings, "--config.total_steps=4")
  assert "the rows of split 'train'" in line and trained == [2, 3]


def test_questions_of_discovery_may_not_change_either(maths, capsys):
  settings, workdir, path, _ = maths
  shown = "--config.method.teacher_context.feedback=without_solution"
  arguments = ["--mode=discover", *settings, "--config.train.updates_per_batch=1", shown]
  c = parsed(*arguments)
  env = RowEnv(MathQA(), c.data.sources, splits=("test",))
  begun(workdir, c)
  (workdir / "discover.jsonl").touch()
  rows = {"rows": {"test": env.fingerprint("test")}}
  (workdir / "run.json").write_text(json.dumps(rows))
  test = path.with_name("rows.test.jsonl")
  test.write_text(test.read_text().replace("What is 0", "what is 0"))
  assert "the rows of split 'test'" in refused(capsys, workdir, *arguments)
  assert json.loads((workdir / "run.json").read_text()) == rows


def test_lines_are_cut_back_before_the_step_that_is_written_next(tmp_path):
  path = tmp_path / "warnings.jsonl"
  workdir.cut_back(path, 3)
  assert not path.exists()
  for step in (1, 3, 3, 4):
    workdir.append_line(path, {"step": step})
  workdir.cut_back(path, 4)
  assert [line["step"] for line in workdir.read_lines(path)] == [1, 3, 3]
  workdir.cut_back(path, 0)
  assert path.read_text() == ""
