"""Trackers beside a run: what they are sent, across starts, and what a broken one costs.

A stand-in is a module of the tracker's name that records the calls and misbehaves as the test says.
The real packages are asked too, without a network, where they are installed.
"""

import importlib.util
import json
import os
import pathlib
import struct
import sys
import time

import pytest

from sdpo_jax import config, hosts, main
from sdpo_jax.errors import Preempted
from sdpo_jax.trackers import __main__ as process
from sdpo_jax.trackers import child, sinks

# records every call; $MISBEHAVE is "PLACE HOW": where, and whether it raises, hangs or dies
COMMON = """
import json, os, signal, time

def note(place, **what):
  with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps({"call": place} | what) + "\\n")
  where, _, how = os.environ.get("MISBEHAVE", "").partition(" ")
  if where != place:
    return
  if how == "raises":
    raise RuntimeError("the tracker's\\nservice is down")
  if how == "hangs":
    open(os.environ["RECORD"] + ".pid", "w").write(str(os.getpid()))
    time.sleep(600)
  if how == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
"""
WANDB = (
  COMMON
  + """
class Settings(dict):
  def __init__(self, **settings):
    super().__init__(settings)

class Table:
  def __init__(self, columns, data):
    self.columns, self.data = columns, data

class Run:
  url, offline = "https://wandb.invalid/run", False
  def __init__(self, id):
    self.id = id
    self.config = self
  def update(self, settings, allow_val_change):
    pass
  def log(self, entries, step, commit):
    entries = {k: vars(v) if isinstance(v, Table) else v for k, v in entries.items()}
    note("log", step=step, entries=entries)
  def mark_preempting(self):
    note("mark_preempting")
  def finish(self, exit_code):
    note("finish", exit_code=exit_code)

def init(project, name, id, config, dir, resume, settings):
  note("init", project=project, name=name, id=id, config=config, dir=str(dir), resume=resume)
  print("wandb: advertisement")
  return Run(id)
"""
)
MLFLOW = {
  "__init__.py": COMMON
  + """
from types import SimpleNamespace
from . import entities

def set_tracking_uri(uri):
  note("uri", uri=uri)

def set_experiment(name):
  note("experiment", name=name)
  return SimpleNamespace(experiment_id="7")

class MlflowClient:
  def __init__(self, uri):
    pass
  def create_run(self, experiment, run_name):
    note("create_run", experiment=experiment, name=run_name)
    return SimpleNamespace(info=SimpleNamespace(run_id="r1"))
  def update_run(self, id, status):
    note("update_run", id=id, status=status)
  def log_batch(self, id, metrics=(), params=()):
    assert len(params) <= 100
    assert not any("@" in key for key, *_ in metrics)
    note("log_batch", id=id, metrics=metrics, params=params)
  def log_dict(self, id, value, path):
    note("log_dict", path=path, value=value)
  def log_text(self, id, text, path):
    note("log_text", path=path, text=text)
  def set_terminated(self, id, status):
    note("set_terminated", id=id, status=status)
""",
  "entities.py": """
def Metric(key, value, timestamp, step):
  return [key, value, step]

def Param(key, value):
  return [key, value]
""",
}
SETTINGS = {
  "seed": 3,
  "method": {"name": "sdpo", "top_k": None},
  "many": {f"x{i}": i for i in range(150)},
}
ROLLOUT = {
  "step": 2,
  "task_id": "t",
  "prompt": "add two",
  "teacher_context": "add two\n\nfeedback: {no} \\n <|im_end|>",
  "response": "a+b",
  "reward": 0.5,
  "feedback": "{no}",
  "tokens": ["a", "+", "b"],
}


class Stage:
  """A work directory with files of a run, and the calls that the stand-ins have recorded."""

  def __init__(self, path: pathlib.Path, monkeypatch):
    self.path, self.workdir = path, path / "run"
    (self.workdir / "rollouts").mkdir(parents=True)
    packages = path / "packages"
    (packages / "mlflow").mkdir(parents=True)
    (packages / "wandb.py").write_text(WANDB)
    for name, text in MLFLOW.items():
      (packages / "mlflow" / name).write_text(text)
    root = str(pathlib.Path(config.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), root]))
    monkeypatch.setenv("RECORD", str(path / "calls"))
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "MISBEHAVE"):
      monkeypatch.delenv(name, raising=False)
    (self.workdir / "config.json").write_text(json.dumps(SETTINGS))
    (self.workdir / "run.json").write_text(json.dumps({"commit": "c0ffee"}))

  def write(self, *steps: int, mode="a") -> None:
    with (self.workdir / "metrics.jsonl").open(mode) as file:
      for step in steps:
        line = {
          "step": step,
          "time_s": 1.5 * step,
          "train/loss": step / 7,
          "eval/heldout/avg@k": 0.5,
        }
        file.write(json.dumps(line) + "\n")

  def write_rollouts(self, step: int, count=20) -> None:
    text = "".join(json.dumps(ROLLOUT | {"step": step}) + "\n" for _ in range(count))
    (self.workdir / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)

  def calls(self, name="") -> list[dict]:
    path = self.path / "calls"
    calls = [json.loads(line) for line in path.open()] if path.exists() else []
    return [call for call in calls if name in ("", call["call"])]

  def wait_for(self, name: str, count: int) -> None:
    end = time.monotonic() + 30
    while len(self.calls(name)) < count:
      assert time.monotonic() < end, self.calls()
      time.sleep(0.02)

  def tracked(self, *names, anew=True, timeout_s=20.0, project="p"):
    log = config.base().log
    log.trackers, log.project, log.tracker_timeout_s = names, project, timeout_s
    return child.tracked(log, self.workdir, anew=anew)


@pytest.fixture
def stage(tmp_path, monkeypatch):
  return Stage(tmp_path, monkeypatch)


def only_line(captured) -> str:
  """Returns the one line that is there beside those that say where the run is found."""
  lines = [line for line in captured.err.splitlines() if "wandb.invalid" not in line]
  assert len(lines) == 1, captured.err
  return lines[0]


# ---- what is sent


def test_wandb_gets_the_settings_each_step_and_what_the_teacher_read(stage, capfd):
  with stage.tracked("wandb"):
    stage.write(0, 1)
    stage.wait_for("log", 2)  # while the run goes on
    stage.write_rollouts(2)
    stage.write(2)
  [begun] = stage.calls("init")
  assert (begun["project"], begun["name"], begun["resume"]) == ("p", "run", "allow")
  assert begun["config"] == SETTINGS | {"run": {"commit": "c0ffee"}}
  assert begun["dir"] == str(stage.workdir / "trackers")
  logged = stage.calls("log")
  assert [call["step"] for call in logged] == [0, 1, 2]
  assert logged[1]["entries"] == {"time_s": 1.5, "train/loss": 1 / 7, "eval/heldout/avg@k": 0.5}
  table = logged[2]["entries"]["rollouts"]
  assert len(table["data"]) == 8  # a few of the twenty
  row = dict(zip(table["columns"], table["data"][0]))
  assert row == {key: value for key, value in ROLLOUT.items() if key not in ("step", "tokens")}
  assert stage.calls()[-1] == {"call": "finish", "exit_code": 0}
  assert capfd.readouterr().err == "sdpo_jax: wandb: https://wandb.invalid/run\n"
  assert "advertisement" in (stage.workdir / "trackers" / "wandb.log").read_text()


def test_mlflow_gets_parameters_metrics_and_artifacts(stage):
  with stage.tracked("mlflow"):
    stage.write_rollouts(1, count=2)
    stage.write(0, 1)
  [uri] = stage.calls("uri")
  assert uri["uri"] == (stage.workdir / "trackers" / "mlflow").as_uri()
  assert stage.calls("create_run") == [{"call": "create_run", "experiment": "7", "name": "run"}]
  params = dict(pair for call in stage.calls("log_batch") for pair in call["params"])
  assert len(params) == 153 and (params["method.name"], params["method.top_k"]) == ("sdpo", "None")
  metrics = [entry for call in stage.calls("log_batch") for entry in call["metrics"]]
  assert ["train/loss", 1 / 7, 1] in metrics and ["eval/heldout/avg_at_k", 0.5, 0] in metrics
  assert {call["path"]: call["value"] for call in stage.calls("log_dict")} == {
    "config.json": SETTINGS,
    "run.json": {"commit": "c0ffee"},
  }
  [text] = stage.calls("log_text")
  assert text["path"] == "rollouts/step_000001.json"
  assert [line["teacher_context"] for line in json.loads(text["text"])] == [
    ROLLOUT["teacher_context"]
  ] * 2
  assert stage.calls()[-1]["status"] == "FINISHED"


def test_an_address_in_the_environment_is_where_mlflow_goes(stage, monkeypatch):
  monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.invalid")
  with stage.tracked("mlflow"):
    pass
  assert stage.calls("uri")[0]["uri"] == "http://tracking.invalid"


def test_both_at_once(stage):
  with stage.tracked("wandb", "mlflow"):
    stage.write(0)
  assert len(stage.calls("log")) == len(stage.calls("set_terminated")) == 1


def test_a_line_is_sent_once_it_is_whole(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = process.Metrics(path, -1)
  assert list(lines.new()) == []  # no file
  path.write_text('{"step": 0, "a/b": 1}\n{"step": 1, "a')
  assert list(lines.new()) == [(0, {"a/b": 1})]
  with path.open("a") as file:
    file.write('/b": 2}\n')
  assert list(lines.new()) == [(1, {"a/b": 2})] and list(lines.new()) == []


# ---- across starts


def test_a_resumed_run_is_the_same_run_and_repeats_no_step(stage):
  with pytest.raises(RuntimeError), stage.tracked("wandb"):
    stage.write(0, 1, 2, 3)
    raise RuntimeError
  stage.write(0, 1, 2, mode="w")  # cut back to the checkpoint of step 2
  with stage.tracked("wandb", anew=False):
    stage.write(3)  # again
    stage.write(4)
  first, second = stage.calls("init")
  assert first["id"] == second["id"] and len(first["id"]) == 8
  assert [call["step"] for call in stage.calls("log")] == [0, 1, 2, 3, 4]
  assert [call["exit_code"] for call in stage.calls("finish")] == [1, 0]


def test_a_file_that_is_cut_back_under_a_process_is_read_again(stage):
  with stage.tracked("wandb"):
    stage.write(0, 1, 2)
    stage.wait_for("log", 3)
    scratch = stage.workdir / "scratch"
    scratch.write_text((stage.workdir / "metrics.jsonl").read_text())
    scratch.replace(stage.workdir / "metrics.jsonl")
    stage.write(3)
  assert [call["step"] for call in stage.calls("log")] == [0, 1, 2, 3]


def test_mlflow_goes_on_with_its_run(stage):
  with pytest.raises(Preempted), stage.tracked("mlflow"):
    stage.write(0)
    raise Preempted
  assert stage.calls("set_terminated")[0]["status"] == "KILLED"
  with stage.tracked("mlflow", anew=False):
    pass
  assert len(stage.calls("create_run")) == 1
  assert stage.calls("update_run") == [{"call": "update_run", "id": "r1", "status": "RUNNING"}]


@pytest.mark.parametrize("change", [{"anew": True}, {"anew": False, "project": "q"}])
def test_a_run_that_begins_anew_and_another_project_get_all_steps(change, stage):
  with stage.tracked("wandb"):
    stage.write(0, 1)
  with stage.tracked("wandb", **change):
    pass
  first, second = stage.calls("init")
  assert first["id"] != second["id"]
  assert [call["step"] for call in stage.calls("log")] == [0, 1, 0, 1]


def test_a_tracker_is_told_how_the_run_ended(stage):
  with pytest.raises(Preempted), stage.tracked("wandb"):
    raise Preempted
  assert [call["call"] for call in stage.calls()[-2:]] == ["mark_preempting", "finish"]


def test_a_killed_run_ends_as_failed(stage, monkeypatch):
  monkeypatch.setattr(child._Child, "tell", lambda self, _: self._process.stdin.close())
  with stage.tracked("wandb"):
    stage.write(0)
  assert stage.calls("log")[0]["step"] == 0
  assert stage.calls()[-1] == {"call": "finish", "exit_code": 1}


def test_what_a_tracker_missed_is_sent_later(stage, monkeypatch, capfd):
  monkeypatch.setenv("MISBEHAVE", "log raises")
  with stage.tracked("wandb"):
    stage.write(0, 1)
  line = only_line(capfd.readouterr())
  command = line.partition("python -m ")[2].partition(" sends")[0].split()
  assert command[0] == "sdpo_jax.trackers"
  monkeypatch.delenv("MISBEHAVE")
  done = child.subprocess.run([sys.executable, "-m", *command], check=True)
  assert done.returncode == 0
  first, second = stage.calls("init")
  assert second["id"] == first["id"] and second["project"] == "p"
  assert [call["step"] for call in stage.calls("log")] == [0, 0, 1]
  # all of it is there now
  child.subprocess.run([sys.executable, "-m", *command], check=True)
  assert len(stage.calls("log")) == 3


# ---- what a broken tracker costs


@pytest.mark.parametrize(
  "place, when", [("init", "as it began"), ("log", "after step 0"), ("finish", "as it ended")]
)
def test_a_tracker_that_raises_is_one_line(place, when, stage, monkeypatch, capfd):
  monkeypatch.setenv("MISBEHAVE", f"{place} raises")
  with stage.tracked("wandb"):
    stage.write(0)
    stage.write(1)
  line = only_line(capfd.readouterr())
  assert line.startswith("sdpo_jax: the tracker wandb failed")
  assert "RuntimeError: the tracker's service is down" in line
  assert str(stage.workdir / "trackers" / "wandb.log") in line
  if place != "log":
    assert when in line
  assert len(stage.calls("log")) <= 2


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_tracker_that_hangs_is_killed_after_the_run(place, stage, monkeypatch, capfd):
  monkeypatch.setenv("MISBEHAVE", f"{place} hangs")
  with stage.tracked("wandb", timeout_s=1.0 if place == "init" else 3.0):
    stage.write(0)
    stage.wait_for("init", 1)
    begun = time.monotonic()
  assert time.monotonic() - begun < 6
  line = only_line(capfd.readouterr())
  assert "the tracker wandb was not done" in line and "sends the rest later" in line
  pid = int((stage.path / "calls.pid").read_text())
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_a_process_that_lost_its_run_ends_although_its_tracker_hangs(stage, monkeypatch):
  monkeypatch.setenv("MISBEHAVE", "init hangs")
  started = child._Child("wandb", config_log("wandb", 1.0), stage.workdir, True)
  stage.wait_for("init", 1)
  started._process.stdin.close()  # killed
  assert started._process.wait(10) == process.LATE


def config_log(name, timeout_s):
  log = config.base().log
  log.trackers, log.tracker_timeout_s = (name,), timeout_s
  return log


def test_a_run_that_does_not_end_well_hardly_waits(stage, monkeypatch, capfd):
  monkeypatch.setenv("MISBEHAVE", "log hangs")
  monkeypatch.setattr(child, "HURRY_S", 0.5)
  with pytest.raises(Preempted), stage.tracked("wandb", timeout_s=500.0):
    stage.write(0)
    stage.wait_for("log", 1)
    begun = time.monotonic()
    raise Preempted
  assert time.monotonic() - begun < 5 and "0.5 s" in only_line(capfd.readouterr())


def test_a_tracker_that_crashes_is_one_line(stage, monkeypatch, capfd):
  monkeypatch.setenv("MISBEHAVE", "log dies")
  with stage.tracked("wandb"):
    stage.write(0)
  assert "the tracker wandb ended with status -9" in only_line(capfd.readouterr())


def test_a_process_that_cannot_be_started_is_one_line(stage, monkeypatch, capfd):
  monkeypatch.setattr(child.sys, "executable", "/nowhere/python")
  with stage.tracked("wandb"):
    pass
  assert "could not be started (No such file" in only_line(capfd.readouterr())


def test_process_0_alone_has_trackers(stage, monkeypatch):
  monkeypatch.setattr(hosts, "leads", lambda: False)
  with stage.tracked("wandb"):
    stage.write(0)
  assert not stage.calls() and not (stage.workdir / "trackers").exists()
  child.check_installed(config_log("nothing_of_this_name", 1.0))


# ---- settings


def test_a_package_that_is_missing_names_its_extra(monkeypatch):
  monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError) as error:
    child.check_installed(config_log("mlflow", 1.0))
  assert str(error.value) == (
    "config.log.trackers holds 'mlflow', whose package is not installed: "
    'pip install -e ".[mlflow]"'
  )


def test_a_directory_called_wandb_is_no_package(tmp_path, monkeypatch):
  (tmp_path / "wandb_offline").mkdir()
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match="not installed"):
    child.check_installed(config_log("wandb_offline", 1.0))


def test_every_tracker_has_an_extra():
  setup = (pathlib.Path(config.__file__).parent.parent / "setup.py").read_text()
  for name in sinks.SINKS:
    assert f'"{name}": {name.upper()},' in setup


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["trackers=wandbb"], "config.log.trackers='wandbb' is unknown; did you mean 'wandb'; choose"),
    (["trackers=('wandb','wandb')"], "names a tracker twice"),
    (["trackers=wandb", "project=a/b"], "config.log.project='a/b' must be"),
    (["trackers=wandb", "tracker_timeout_s=0"], "tracker_timeout_s=0.0 must be above 0"),
    (["project=mine"], "config.log.project='mine' would not be read"),
    (["tracker_timeout_s=5"], "config.log.tracker_timeout_s=5.0 would not be read"),
  ],
)
def test_a_wrong_setting_is_named(arguments, message):
  with pytest.raises(ValueError) as error:
    flags = [f"--config.log.{argument}" for argument in arguments]
    config.validate(main.parse(["main", "--config=configs/tinycode.py", *flags])[1])
  assert message in str(error.value) and "\n" not in str(error.value)


def test_one_tracker_needs_no_parentheses():
  parsed = main.parse(["main", "--config=configs/tinycode.py", "--config.log.trackers=mlflow"])[1]
  assert parsed.log.trackers == ("mlflow",)


def test_a_workdir_without_metrics_is_refused(tmp_path, capsys):
  with pytest.raises(SystemExit, match="2"):
    process.main(["trackers", f"--workdir={tmp_path}", "--tracker=wandb"])
  assert "holds no metrics.jsonl" in capsys.readouterr().err


# ---- the real packages, without a network


PATIENCE_S = 300.0  # of a busy machine, on which their imports take long


def real(stage, name):
  """Takes the stand-ins away."""
  (stage.path / "packages").rename(stage.path / "unused")
  if importlib.util.find_spec(name) is None:
    pytest.skip(f"{name} is not installed")


def test_the_real_wandb_offline(stage, monkeypatch, capfd):
  real(stage, "wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  for anew in (True, False):
    with stage.tracked("wandb", anew=anew, timeout_s=PATIENCE_S):
      stage.write_rollouts(1)
      stage.write(*([0, 1] if anew else [2]))
  err = capfd.readouterr().err
  folders = sorted((stage.workdir / "trackers" / "wandb").glob("offline-run-*"))
  run_id = json.loads((stage.workdir / "trackers" / "wandb.json").read_text())["id"]
  assert len(folders) == 2 and all(path.name.endswith(run_id) for path in folders)
  lines = err.splitlines()
  assert len(lines) == 2 and all("offline; `wandb sync" in line for line in lines), err
  assert str(folders[0]) in lines[0]
  first, second = [wandb_history(path / f"run-{run_id}.wandb") for path in folders]
  assert [line["_step"] for line in first] == [0, 1] and [x["_step"] for x in second] == [2]
  assert first[1]["train/loss"] == 1 / 7 and first[1]["rollouts/nrows"] == 8
  [table] = (folders[0] / "files" / "media" / "table").glob("rollouts_*.json")
  assert ROLLOUT["teacher_context"] in json.loads(table.read_text())["data"][0]


def wandb_history(path: pathlib.Path) -> list[dict]:
  """Reads the history of a run from wandb's own file, which has LevelDB's format of logs.

  Blocks of 32 KiB hold pieces: checksum (4 bytes), length (2), kind (1: all of a record, 2: its
  begin, 3: its middle, 4: its end). The first block begins with 7 bytes of wandb's.
  """
  from wandb.proto import wandb_internal_pb2

  data, at, whole, lines = path.read_bytes(), 7, b"", []
  while at + 7 <= len(data):
    left = 32768 - at % 32768
    if left < 7:
      at += left
      continue
    length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
    whole = data[at + 7 : at + 7 + length] if kind in (1, 2) else whole + data[at + 7 :][:length]
    at += 7 + length
    if kind in (1, 4):
      record = wandb_internal_pb2.Record.FromString(whole)
      if record.WhichOneof("record_type") == "history":
        items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
        lines.append({key: json.loads(item.value_json) for key, item in items.items()})
  return lines


def test_the_real_mlflow_in_files(stage, capfd):
  real(stage, "mlflow")
  for anew in (True, False):
    with stage.tracked("mlflow", anew=anew, timeout_s=PATIENCE_S):
      stage.write_rollouts(1)
      stage.write(*([0, 1] if anew else [2]))
  lines = capfd.readouterr().err.splitlines()
  assert len(lines) == 2 and all("experiment 'p', run " in line for line in lines), lines
  run_id = json.loads((stage.workdir / "trackers" / "mlflow.json").read_text())["id"]
  [run] = (stage.workdir / "trackers" / "mlflow").glob(f"*/{run_id}")
  assert (run / "params" / "method.name").read_text() == "sdpo"
  values = (run / "metrics" / "train" / "loss").read_text().split()
  assert values[2::3] == ["0", "1", "2"] and float(values[4]) == 1 / 7
  assert (run / "metrics" / "eval" / "heldout" / "avg_at_k").exists()
  artifact = json.loads((run / "artifacts" / "rollouts" / "step_000001.json").read_text())
  assert artifact[0]["teacher_context"] == ROLLOUT["teacher_context"] and len(artifact) == 8
  assert json.loads((run / "artifacts" / "config.json").read_text()) == SETTINGS
