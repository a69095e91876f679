"""The command line for real: the smoke run, its files, kills, and errors that say who must act."""

import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sdpo_jax import (
  checkpoint,
  config,
  errors,
  experiment,
  export,
  main,
  metrics,
  plan,
  pretrain,
  report,
  session,
)
from sdpo_jax.data.chat import load_tokenizer
from sdpo_jax.evaluation import evaluate
from sdpo_jax.evaluation.files import EvalFiles
from sdpo_jax.report.__main__ import main as report_main
from tests.fakes import no_file_beyond
from tests.test_pairwise import saying, serving

ROOT = pathlib.Path(__file__).parent.parent
ENV = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def start(*args, **kwargs):
  return subprocess.Popen(
    [sys.executable, "-m", "sdpo_jax.main", *args],
    cwd=ROOT,
    env=ENV,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


def run(*args):
  process = start(*args)
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


LOCAL = "--config=configs/tinycode.py:local"
# several batch shapes
LONGER = [
  "--config.total_steps=6",
  "--config.checkpoint.every_steps=2",
  "--config.eval.every_steps=3",
  "--config.data.length_multiple=4",
  "--config.data.response_multiple=8",
  "--config.data.room=0",  # so that several shapes are compiled
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run of six steps."""
  workdir = tmp_path_factory.mktemp("whole")
  status, out, err = run(LOCAL, *LONGER, f"--workdir={workdir}")
  assert status == 0, err
  return workdir, out


def repeatable(workdir):
  return [metrics.reproducible(line) for line in metrics.read(workdir)]


def test_a_run_leaves_everything_that_was_promised(whole):
  workdir, out = whole
  assert "avg@k" in out and "base model" in out
  lines = metrics.read(workdir)
  assert [line["step"] for line in lines] == list(range(7))
  assert (
    "eval/heldout/avg@k" in lines[0]
    and "eval/heldout/avg@k" in lines[3]
    and "train/loss" in lines[1]
  )
  about = json.loads((workdir / "run.json").read_text())
  assert (
    about["sandbox_isolation"]
    and about["versions"]["jax"]
    and about["devices"]
    and about["seed"] == 0
  )
  assert json.loads((workdir / "config.json").read_text())["method"]["name"] == "sdpo"
  rows = [
    json.loads(line)
    for line in (workdir / "rollouts" / "step_000001.jsonl").read_text().splitlines()
  ]
  assert len(rows) == 8 and all(
    {"prompt", "response", "reward", "feedback", "teacher_context", "tokens"} <= r.keys()
    for r in rows
  )
  assert any("teacher_gap" in r for r in rows)
  assert "<html" in (workdir / "report" / "index.html").read_text() and list(
    workdir.glob("events*")
  )


def test_running_a_finished_run_again_changes_nothing(whole):
  workdir, out = whole

  def stamps():
    return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}

  before = stamps()
  status, again, _ = run(LOCAL, *LONGER, f"--workdir={workdir}")
  assert status == 0 and stamps() == before and again == out


def killed_and_resumed(workdir, steps_before_kill, rng):
  process = start(LOCAL, *LONGER, f"--workdir={workdir}", start_new_session=True)
  deadline = time.monotonic() + 300
  while (
    len(metrics.read(workdir)) <= steps_before_kill
    and process.poll() is None
    and time.monotonic() < deadline
  ):
    time.sleep(0.01)
  time.sleep(rng.random() * 0.5)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  status, _, err = run(LOCAL, *LONGER, f"--workdir={workdir}")
  assert status == 0, err


def test_kill_and_resume_write_the_same_metrics(whole, tmp_path):
  killed_and_resumed(tmp_path, steps_before_kill=3, rng=random.Random(0))
  assert repeatable(tmp_path) == repeatable(whole[0])
  compiles = [
    [line["perf/compiles"] for line in metrics.read(workdir) if line["step"]]
    for workdir in (whole[0], tmp_path)
  ]
  # the shapes used so far came back too
  assert compiles[0] == compiles[1] and compiles[0][-1] > 1


@pytest.mark.parametrize("shapes", [None, [list(range(1, 9))]])
def test_a_checkpoint_of_another_version_is_named(whole, tmp_path, shapes):
  """One line names a checkpoint without the batch shapes, or with sizes of another meaning."""
  shutil.copytree(whole[0], tmp_path / "old")
  host = tmp_path / "old" / "checkpoints" / "6" / "host" / "metadata"
  about = json.loads(host.read_text())
  about["host"].pop("shapes")
  about["host"] |= {} if shapes is None else {"shapes": shapes}
  host.write_text(json.dumps(about))
  status, _, err = run(LOCAL, *LONGER, f"--workdir={tmp_path / 'old'}", "--config.total_steps=7")
  assert status == 2 and "was written by another version" in err and "Traceback" not in err


def test_a_full_disk_is_one_line_that_names_the_last_checkpoint(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path / "run")
  with no_file_beyond(1_000_000):  # metrics and report fit, a checkpoint does not
    process = start(LOCAL, *LONGER, f"--workdir={tmp_path / 'run'}", "--config.total_steps=7")
  _, err = process.communicate(timeout=600)
  assert process.returncode == 1 and "Traceback" not in err, err
  last_line = err.splitlines()[-1]
  assert f"File too large: {tmp_path}/run/checkpoints/7 could not be written" in last_line
  assert "goes on from the checkpoint of step 6" in last_line


def test_a_process_alone_can_say_that_its_disk_is_full(tmp_path, monkeypatch):
  """Orbax's manager waits for all processes of a run; only one of them has met the error."""
  for name in ("2", "10", "11.orbax-checkpoint-tmp", "deleted/12"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  monkeypatch.setattr(
    checkpoint.ocp, "CheckpointManager", lambda *args, **kwargs: pytest.fail("asked the manager")
  )
  with (
    pytest.raises(
      errors.RunError, match="goes on from the checkpoint of step 10, the last complete one"
    ),
    errors.blame_disk(tmp_path, checkpoint.latest_step),
  ):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_a_run_that_gets_worse_stops_and_a_resumed_one_alike(tmp_path, capsys):
  """Steps of this size spoil the model at once."""
  spoiling = ["--config.optimizer.lr=0.1", "--config.optimizer.warmup_steps=0"]
  often = ["--config.eval.every_steps=1", "--config.eval.questions=16"]
  stopping = ["--config.train.stop_when_worse=2", "--config.mesh.fsdp=1"]

  def trained(name, total, *settings):
    arguments = [f"--config={ROOT}/configs/tinycode.py:method=grpo,local", *spoiling, *often]
    arguments += [*stopping, f"--config.total_steps={total}", *settings]
    assert main.main(["main", *arguments, f"--workdir={tmp_path / name}"]) == 0
    return capsys.readouterr(), repeatable(tmp_path / name)

  said, lines = trained("whole", 5)
  assert [line["step"] for line in lines] == [0, 1, 2]
  assert "stopped at step 2 of 5" in said.out and "no checkpoint is better" in said.out
  page = (tmp_path / "whole" / "report" / "index.html").read_text()
  assert "2 / 5, stopped: worse than the base model" in page
  # ended between the two evaluations
  trained("parts", 1)
  assert trained("parts", 5)[1] == lines
  # the same command again
  about = (tmp_path / "whole" / "run.json").read_text()
  said, again = trained("whole", 5)
  assert again == lines and "finished: " in said.err and "set that to 0, or higher" in said.err
  assert (tmp_path / "whole" / "run.json").read_text() == about
  # killed before run.json was written
  shutil.copytree(tmp_path / "whole", tmp_path / "killed")
  ended = json.loads(about)
  ended.pop("ended")
  (tmp_path / "killed" / "run.json").write_text(json.dumps(ended))
  assert trained("killed", 5)[1] == lines
  assert json.loads((tmp_path / "killed" / "run.json").read_text())["ended"]["stopped"]
  # on all the same
  _, longer = trained("whole", 3, "--config.train.stop_when_worse=0")
  assert [line["step"] for line in longer] == [0, 1, 2, 3]
  assert not json.loads((tmp_path / "whole" / "run.json").read_text())["ended"]["stopped"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(5))
def test_kill_at_random_moments(whole, tmp_path, moment):
  rng = random.Random(f"moment/{moment}")
  killed_and_resumed(tmp_path, steps_before_kill=rng.randrange(-1, 6), rng=rng)
  assert repeatable(tmp_path) == repeatable(whole[0])


def test_eval_scores_a_checkpoint_and_a_hugging_face_directory(whole, tmp_path):
  workdir, _ = whole
  status, out, err = run(LOCAL, "--mode=eval", f"--checkpoint={workdir}:6", f"--workdir={tmp_path}")
  assert status == 0, err
  scored = json.loads((tmp_path / "eval" / "step_000006.json").read_text())
  assert scored["eval/heldout/avg@k"] == metrics.read(workdir)[-1]["eval/heldout/avg@k"]
  assert export.export(workdir, tmp_path / "exported", step=6) == 6
  status, out, err = run(
    LOCAL, "--mode=eval", f"--checkpoint={tmp_path / 'exported'}", f"--workdir={tmp_path}"
  )
  assert status == 0, err
  again = json.loads((tmp_path / "eval" / "exported.json").read_text())
  # the same weights
  assert {k: v for k, v in again.items() if k.startswith("eval/")} == {
    k: v for k, v in scored.items() if k.startswith("eval/")
  }


def eval_files(workdir):
  return {p.name: p.read_bytes() for p in (workdir / "eval").rglob("*") if p.is_file()}


def test_an_evaluation_that_is_asked_to_stop_goes_on_to_the_same_files(
  tmp_path, monkeypatch, capsys
):
  """The signal comes while the second batch of four is written; a kill cuts the last line too."""
  arguments = [f"--checkpoint={config.MODELS['tiny']}", "--config.eval.questions=16"]
  local = [f"--config={ROOT}/configs/tinycode.py:local", "--config.mesh.fsdp=1"]
  command = ["main", *local, "--mode=eval", *arguments]
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  assert main.main([*command, f"--workdir={whole}"]) == 0
  printed = capsys.readouterr().out
  append = EvalFiles.append

  def append_and_stop(files, part, lines):
    append(files, part, lines)
    if lines[0]["question"] == 4:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(EvalFiles, "append", append_and_stop)
  assert main.main([*command, f"--workdir={stopped}"]) == 143
  *_, message = capsys.readouterr().err.splitlines()
  assert message.endswith(
    f"asked to stop (SIGTERM): the same command, with --workdir={stopped}, goes on with the "
    "questions that are missing"
  )
  monkeypatch.undo()
  lines = stopped / "eval" / "tiny" / "config.heldout.sampled.jsonl"
  assert len(lines.read_text().splitlines()) == 8 and not (stopped / "eval" / "tiny.json").exists()
  os.truncate(lines, lines.stat().st_size - 9)
  assert main.main([*command, f"--workdir={stopped}"]) == 0
  assert capsys.readouterr().out == printed
  assert eval_files(stopped) == eval_files(whole)
  assert main.main([*command, "--config.eval.samples=3", f"--workdir={stopped}"]) == 2
  *_, message = capsys.readouterr().err.splitlines()
  assert "config.eval.samples=3, but" in message and "was begun with 2" in message
  assert eval_files(stopped) == eval_files(whole)


def forgetting_rows(directory):
  """Writes a few rows of our own for configs/eval/forgetting.py."""
  rows = {
    "ifeval.jsonl": [
      {"key": i, "prompt": "Rain?", "instruction_id_list": [name], "kwargs": [{}]}
      for i, name in enumerate(["punctuation:no_comma", "change_case:english_capital"])
    ],
    "mmlu_pro.jsonl": [
      {"question_id": i, "question": "Which?", "options": list("wxyz"), "answer_index": i}
      | {"category": category}
      for i, category in enumerate(["law", "law", "physics"])
    ],
    "chat.jsonl": [{"prompt": "Rain?", "reference": "Yes."}],
  }
  for name, rows_of_file in rows.items():
    (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows_of_file))


def test_suites_go_over_several_environments_in_one_pass(tmp_path, monkeypatch, capsys):
  forgetting_rows(tmp_path)
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  command = [
    "main",
    f"--config={ROOT}/configs/tinycode.py:local",
    "--config.mesh.fsdp=1",
    "--mode=eval",
    f"--checkpoint={config.MODELS['tiny']}",
    f"--workdir={tmp_path / 'run'}",
  ]
  suites = f"--suites={ROOT}/configs/eval/forgetting.py:local,data={tmp_path},judge=m"
  with serving(saying("[[A]]")) as server:  # prefers a place
    assert main.main([*command, f"{suites},url={server.url}"]) == 0, capsys.readouterr().err
    assert len(server.requests) == 3  # whether it is there, and both orders
    unreachable = server.url
  out = capsys.readouterr().out.split()
  assert [word for word in out if ".test" in word] == ["ifeval.test", "mmlu_pro.test", "chat.test"]
  scores = json.loads((tmp_path / "run" / "eval" / "tiny.json").read_text())
  assert scores["suites"]["chat"]["temperature"] == 0.0
  assert scores["eval/chat.test/avg@k"] == 0.5
  assert scores["eval/ifeval.test/questions"] == 2
  assert scores["eval/mmlu_pro.test/kind/law/questions"] == 2
  assert scores["eval/mmlu_pro.test/format_failed"] + 3 * scores["eval/mmlu_pro.test/avg@k"] <= 3
  before = eval_files(tmp_path / "run")
  assert main.main([*command, f"{suites},url={unreachable}"]) == 2
  *_, message = capsys.readouterr().err.splitlines()
  assert f"the judge at {unreachable} cannot be asked" in message
  assert eval_files(tmp_path / "run") == before


def changed_model(tmp_path, change) -> str:
  """A copy of the tiny model, changed by change(directory)."""
  directory = tmp_path / "model"
  shutil.copytree(config.MODELS["tiny"], directory)
  change(directory)
  return str(directory)


def refuse_system_messages(directory):
  template = directory / "chat_template.jinja"
  refusal = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
  )
  template.write_text(refusal + template.read_text())


def forget_system_messages(directory):
  template = directory / "chat_template.jinja"
  rest = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
  template.write_text(rest + template.read_text())


def add_a_token_without_a_row(directory):
  tokenizer = load_tokenizer(str(directory))
  tokenizer.add_tokens(["<|tool|>"])
  tokenizer.save_pretrained(directory)


@pytest.mark.parametrize(
  "change, message",
  [
    (refuse_system_messages, "refuses a conversation of system, user: no system here"),
    (forget_system_messages, "leaves out the text of the system message"),
    (add_a_token_without_a_row, "they belong to different models"),
  ],
)
def test_a_model_that_cannot_read_the_questions_is_refused_at_the_start(
  change, message, tmp_path, capsys
):
  """Science questions begin with a system message, which a row that may be skipped has too."""
  path = changed_model(tmp_path, change)
  science = f"--config={ROOT}/configs/science_mcq.py:local"
  assert (
    main.main(
      [
        "main",
        science,
        f"--config.model.path={path}",
        "--config.data.on_bad_row=skip",
        f"--workdir={tmp_path / 'run'}",
      ]
    )
    == 2
  )
  *_, line = capsys.readouterr().err.splitlines()
  assert message in line and path in line
  assert not (tmp_path / "run" / "config.json").exists()


def test_another_configuration_does_not_continue_a_run(whole):
  status, _, err = run(
    "--config=configs/tinycode.py:local,seed=3", *LONGER, f"--workdir={whole[0]}"
  )
  assert (
    status == 2
    and "config.seed=3" in err
    and "was begun with 0" in err
    and len(err.strip().splitlines()) <= 2
  )


@pytest.mark.parametrize(
  "args, message",
  [
    (["--config=configs/nowhere.py"], "configs/nowhere.py"),
    (
      [
        "--config=configs/tinycode.py:local",
        "--workdir=/proc/nowhere",
        "--distributed=127.0.0.1,1,0",
      ],
      "--distributed='127.0.0.1,1,0' must be auto or HOST:PORT",
    ),
  ],
)
def test_usage_errors_are_one_line_and_status_2(args, message):
  status, out, err = run(*args)
  assert status == 2, err
  assert message in err
  assert len(err.strip().splitlines()) == 1, err
  assert "Traceback" not in err


@pytest.mark.parametrize(
  "args, message",
  [
    (
      ["--checkpoint=runs/x"],
      "--checkpoint would not be read: it is for --mode=eval; "
      "to begin from it, export it and set config.model.path",
    ),
    (
      ["--mode=eval", "--checkpoint=runs/x", "--topology=v5p:2x2x2"],
      "--topology would not be read: it is for --mode=plan",
    ),
    (
      [f"--config.data.sources=('train={config.ROWS}/math_qa.train.jsonl',)"],
      "has nothing for the split 'heldout', which config.eval.splits asks for",
    ),
    (
      ["--config.data.max_teacher_tokens=10"],
      "tokens, more than config.data.max_teacher_tokens=10",
    ),
    (
      ["--suites=configs/eval/tinycode.py"],
      "--suites would not be read: it is for --mode=eval",
    ),
    (
      ["--mode=eval", f"--checkpoint={config.MODELS['tiny']}", "--suites=/nowhere.py"],
      "--suites=/nowhere.py: no such file",
    ),
    (
      ["--mode=eval", "--checkpoint={pretrained}"],
      "is a work directory of sdpo_jax.pretrain: use what it wrote for transformers",
    ),
  ],
)
def test_wrong_commands_end_in_one_line(args, message, tmp_path, capsys):
  pretrained = tmp_path / "pretrained"
  checkpoint.save(pretrained, 1, {"x": np.zeros(1)}, {})
  (pretrained / "config.json").write_text(json.dumps({"model": {"ff_width": 64}}))
  assert (
    main.main(
      [
        "main",
        f"--config={ROOT}/configs/tinycode.py:local",
        f"--workdir={tmp_path / 'run'}",
        *(a.format(pretrained=pretrained) for a in args),
      ]
    )
    == 2
  )
  assert message in capsys.readouterr().err.splitlines()[-1]
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [main, export, pretrain])
def test_help_shows_the_flags(module, capsys):
  assert module.main(["name", "--help"]) == 0
  help_text = capsys.readouterr().out
  assert "--workdir" in help_text
  assert module.__doc__ in help_text


def planned(monkeypatch, *settings):
  monkeypatch.setattr(plan, "topology_devices", lambda name: jax.devices())
  # set, so that they go back to what they were
  for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_WORKER_HOSTNAMES"):
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
  _, c = main.parse(["main", f"--config={ROOT}/configs/plan_8b.py:local", *settings])
  return plan.report_lines(c, "v5p:2x2x2")


@pytest.mark.parametrize(
  "setting, message",
  [
    ("rollout.rows=12", "config.rollout.rows=12 does not divide among the 8 parts"),
    ("rollout.max_new_tokens=50000", "together exceed the 40960 positions of qwen3-0.6b"),
  ],
)
def test_plan_refuses_what_training_refuses(setting, message, monkeypatch):
  with pytest.raises(ValueError, match=message):
    planned(monkeypatch, f"--config.{setting}")


def test_plan_tells_libtpu_what_it_asks_for_and_leaves_what_is_set(monkeypatch):
  monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-8")
  planned(monkeypatch)
  assert (os.environ["TPU_WORKER_HOSTNAMES"], os.environ["TPU_ACCELERATOR_TYPE"]) == (
    "localhost",
    "v6e-8",
  )


def test_config_files_cannot_add_or_lose_settings():
  c = config.base()
  c.rollout.qestions = 3
  with pytest.raises(
    ValueError,
    match=r"config.rollout.qestions is not a setting; did you mean config.rollout.questions",
  ):
    config.validate(c)
  c = config.base()
  del c.rollout["group"]
  with pytest.raises(ValueError, match="config.rollout.group is missing"):
    config.validate(c)
  config.validate(config.base())


def test_summary_lines_show_both_models_with_intervals():
  base = {
    "eval/heldout/avg@k": 0.1,
    "eval/heldout/avg@k_low": 0.05,
    "eval/heldout/avg@k_high": 0.15,
  }
  (line,) = evaluate.summary_lines(base | {"eval/heldout/avg@k": 0.4}, base)
  assert line.split() == [
    "heldout",
    "avg@k",
    "40.0%",
    "[5.0%,",
    "15.0%]",
    "base",
    "model",
    "avg@k",
    "10.0%",
    "[5.0%,",
    "15.0%]",
  ]
  assert main.MODES == ("train", "eval", "diagnose", "discover", "plan")


def test_a_tilde_in_a_path_is_the_home_directory(tmp_path, monkeypatch, capsys):
  home, here = tmp_path / "home", tmp_path / "here"
  home.mkdir()
  here.mkdir()
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.chdir(here)
  main.check_writable("~/runs/A")
  assert (home / "runs" / "A").is_dir()
  shutil.copy(ROOT / "configs" / "tinycode.py", home)
  flags = ["--config=~/tinycode.py:local", "--workdir=~/runs/B", "--checkpoint=~/runs/A:2"]
  f, c = main.parse(["main", *flags])
  assert c.total_steps == 2
  assert (f.workdir, f.checkpoint) == (f"{home}/runs/B", f"{home}/runs/A:2")
  # what the other commands say of a path that is not there
  commands = [
    (export.main, ["export", "--workdir=~/runs/A", "--out=~/out"]),
    (pretrain.main, ["pretrain", "--config=~/own.py", "--workdir=~/runs/A"]),
    (experiment.main, ["--config=~/own.py", "--workdir=~/runs/A"]),
    (report_main, ["~/runs/none", "--out=~/out"]),
  ]
  for command, arguments in commands:
    assert command(arguments) == 2
    err = capsys.readouterr().err
    assert str(home) in err and "~" not in err
  report.write_report([home / "runs" / "A"], home / "out")
  assert report_main(["~/runs/A", "--out=~/page"]) == 0
  assert (home / "page" / "index.html").exists()
  c.model.path = "~/model"
  with pytest.raises(errors.SettingError, match=f"{home}/model: no such directory"):
    with session.open_session(c):
      pass
  assert not list(here.iterdir())
