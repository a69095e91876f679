"""Tuning: the split tune, what a tuning must not be, the choice, and who is told of it."""

import hashlib
import json
import pathlib
import re
import shlex
import shutil

import pytest

from sdpo_jax import config, experiment, summary, tuning
from sdpo_jax.data.tasks import RowEnv, check_sources
from sdpo_jax.envs import arithmetic, composed, tinycode
from sdpo_jax.envs.mcq import MCQ

ROOT = pathlib.Path(__file__).parent.parent
DOMAINS = {"tinycode": tinycode.DOMAIN, "arithmetic": arithmetic.DOMAIN}
# Digests of the first 40 tasks of train, heldout, unseen and adversarial, as they were before tune
STORED = {
  ("tinycode", "easy"): "08d8ef9656ca47af",
  ("tinycode", "default"): "94b3b79a54b3c1f5",
  ("tinycode", "hard"): "8f40aba4f500316c",
  ("tinycode", "very_hard"): "5ff597d361c3ff83",
  ("arithmetic", "easy"): "fbb19e20920240af",
  ("arithmetic", "default"): "6b54868bc53b3448",
  ("arithmetic", "hard"): "aa9b1bdd1837ea89",
  ("arithmetic", "very_hard"): "a99a7400adddf1e1",
}


# The split


@pytest.mark.parametrize("domain, level", STORED)
def test_the_other_splits_are_what_they_were(domain, level):
  digest = hashlib.sha256()
  problems = composed.Problems(DOMAINS[domain], level, words_seed=3)
  if (domain, level) != ("tinycode", "easy"):
    problems.task("tune", 0)  # what was asked before changes nothing
  for split in ("train", "heldout", "unseen", "adversarial"):
    if level == "easy" and split == "unseen":
      continue
    for i in range(40):
      t = problems.task(split, i)
      data = {key: value for key, value in t.data.items() if key != "difficulty"}  # is younger
      digest.update(repr((t.id, t.split, t.prompt, t.solution, data)).encode())
  assert digest.hexdigest()[:16] == STORED[domain, level]


@pytest.mark.parametrize("domain, level", [key for key in STORED if key != ("tinycode", "easy")])
def test_tune_shares_no_question_with_another_split(domain, level):
  problems = composed.Problems(DOMAINS[domain], level)
  counts = {"train": 2000, "heldout": composed.HELDOUT_ASKED, "unseen": 1000, "adversarial": 1000}
  tune = [problems.task("tune", i) for i in range(300)]
  assert {task.split for task in tune} == {"tune"} and len({task.id for task in tune}) == 300
  prompts = {task.prompt for task in tune}
  phrases = {tuple(t.data["phrases"]) for t in tune if len(t.data["phrases"]) > 1}
  for split, count in counts.items():
    if level == "easy" and split == "unseen":
      continue
    others = [problems.task(split, i) for i in range(count)]
    assert not prompts & {task.prompt for task in others}, split
    if split in ("train", "heldout"):  # nor in another frame
      assert not phrases & {tuple(task.data["phrases"]) for task in others}, split
    if split == "unseen":
      ops = {tuple(task.data["ops"]) for task in tune}
      assert not ops & {tuple(task.data["ops"]) for task in others}


@pytest.mark.parametrize("domain", DOMAINS)
def test_tune_is_drawn_like_heldout(domain):
  problems, again = (composed.Problems(DOMAINS[domain], "default") for _ in range(2))
  tune = [problems.task("tune", i) for i in range(400)]
  assert [again.task("tune", i) for i in (7, 2)] == [tune[7], tune[2]]
  heldout = [problems.task("heldout", i) for i in range(400)]
  shares = [sum(len(t.data["ops"]) == 1 for t in tasks) / 400 for tasks in (tune, heldout)]
  assert shares[0] == pytest.approx(shares[1], abs=0.1)
  # held out, so that the first heldout questions alone keep it from being heldout's
  later = {tuple(problems.task("heldout", i).data["phrases"]) for i in range(100, 3000)}
  assert {tuple(task.data["phrases"]) for task in tune} <= later


def test_an_evaluation_asks_no_heldout_question_that_tune_may_show():
  assert config.base().eval.questions <= composed.HELDOUT_ASKED


def test_a_level_with_too_few_statements_has_no_tune():
  with pytest.raises(ValueError, match="'tune' is empty at level 'easy'"):
    composed.Problems(tinycode.DOMAIN, "easy").task("tune", 0)


def test_rows_have_the_split_tune_where_a_file_of_it_is(tmp_path):
  row = {"prompt": "Which?\nA: 1\nB: 2", "answer": "A"}
  (tmp_path / "x.tune.jsonl").write_text(json.dumps(row) + "\n")
  for source in (f"{tmp_path}/x.{{split}}.jsonl", f"tune={tmp_path}/x.tune.jsonl"):
    check_sources([source], {"tune": "config.eval.splits"})
    assert RowEnv(MCQ(), [source], splits=["tune"]).task("tune", 0).split == "tune"
  with pytest.raises(ValueError, match="nothing for the split 'tune', which config.eval.splits"):
    check_sources([f"test={tmp_path}/x.tune.jsonl"], {"tune": "config.eval.splits"})


# What is refused

FILE = """
SEEDS = (100,)
RATES = {"a": (0.001, 0.002, 0.004), "b": (0.001, 0.002, 0.004)}
METHOD = {"a": "sdpo", "b": "grpo"}
ON = ["--config.eval.splits=()", "--config.eval.final_splits=('tune',)"]


def trial(arm, rate, seeds=SEEDS, on=ON):
  each = [
    [f"--config=configs/tinycode.py:method={METHOD[arm]},seed={seed}"]
    + [f"--config.optimizer.lr={rate}", *on]
    for seed in seeds
  ]
  return each if len(each) > 1 else each[0]


def get_tuning():
  return {arm: {f"lr_{rate}": trial(arm, rate) for rate in rates} for arm, rates in RATES.items()}


def get_grid(chosen):
  grid = {
    f"{arm}_seed{seed}": [f"--config=configs/tinycode.py:method={METHOD[arm]},seed={seed}"]
    + [x for x in chosen[arm] if "optimizer.lr" in x]
    for arm in METHOD
    for seed in (0, 1)
  }
  return grid | {"other": ["--config=configs/tinycode.py:seed=5"]}
"""


def changed(**names):
  """Returns the file with other values of its globals."""
  return FILE.replace(
    "\n\n\ndef trial", "".join(f"\n{k} = {v}" for k, v in names.items()) + "\n\n\ndef trial"
  )


def grid_of(arm, *arguments):
  """Returns the file with a grid whose runs of one arm have other arguments."""
  return FILE + (
    "\n\nwhole = get_grid\n"
    "def get_grid(chosen):\n"
    "  grid = whole(chosen)\n"
    f"  return grid | {{'{arm}_seed0': grid['{arm}_seed0'] + {list(arguments)!r}}}\n"
  )


@pytest.mark.parametrize(
  "text, message",
  [
    (
      changed(RATES='{"a": (0.001, 0.002), "b": (0.001,)}'),
      "arms have different numbers of trials: a 2, b 1",
    ),
    (
      FILE.replace("trial(arm, rate) for", "trial(arm, rate, (100, 101)[: 1 + (arm == 'b')]) for"),
      "trials have different numbers of runs: a/lr_0.001 1, ",
    ),
    (changed(SEEDS="(100, 100)"), "tuning/a/lr_0.001: its runs must differ in the seed alone"),
    (
      FILE.replace("lr={rate}", "lr={rate * seed / 100}").replace("(100,)", "(100, 101)"),
      "tuning/a/lr_0.001: its runs must differ in the seed alone",
    ),
    (
      changed(ON="[\"--config.eval.final_splits=('tune',)\"]"),
      "tuning/a/lr_0.001: a trial is evaluated on the split 'tune' alone, "
      "not on ['heldout', 'tune']",
    ),
    (changed(ON="[]"), "not on ['adversarial', 'heldout', 'unseen']"),
    (changed(SEEDS="(100, 1)"), "a_seed1: its seed 1 is the seed of a trial too"),
    (changed(SEEDS="(5,)"), "other: its seed 5 is the seed of a trial too"),
    (
      grid_of("b", "--config.eval.splits=('heldout', 'tune')"),
      "b_seed0: a reported run is not evaluated on the split 'tune'",
    ),
    (
      grid_of("b", "--config.eval.questions=101"),
      "b_seed0: config.eval.questions=101, but the split 'tune' leaves out the first 100",
    ),
    (
      grid_of("a", "--config.optimizer.lr=0.003"),
      "a_seed0: config.optimizer.lr is 0.003, but 0.001 in the chosen trial lr_0.001",
    ),
    (FILE.replace('f"{arm}_seed', 'f"{arm}seed'), "get_grid(): no run is named a, or a_...:"),
    (changed(ON="['--config.optimizer.rate=1']"), "tuning/a/lr_0.001: config.optimizer.rate is"),
    (FILE.replace("get_grid(chosen)", "get_grid()"), "TypeError: get_grid() takes 0"),
    (
      FILE.replace("return {arm: {", "return [{arm: {").replace("items()}\n", "items()}]\n"),
      "get_tuning() returns no dict",
    ),
  ],
)
def test_an_unfair_tuning_is_one_line_before_anything_runs(
  text, message, tmp_path, monkeypatch, capsys
):
  path = tmp_path / "own.py"
  path.write_text(text)
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(experiment, "run_all", lambda *_: pytest.fail("something ran"))
  assert experiment.main([f"--config={path}", f"--workdir={tmp_path}/runs"]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


# The choice

SCORES = {  # arm, learning rate, seed -> the last evaluation
  ("a", 0.001, 100): 0.25,
  ("a", 0.002, 100): 0.5,
  ("a", 0.004, 100): 0.5,  # as good, but later
  ("a", 0.001, 101): 0.25,
  ("a", 0.002, 101): 0.5,
  ("a", 0.004, 101): 0.5,
  ("b", 0.001, 100): 0.5,
  ("b", 0.002, 100): 0.75,  # the best, if it were not for the other seed
  ("b", 0.004, 100): 0.25,
  ("b", 0.001, 101): 0.5,
  ("b", 0.002, 101): 0.0,
  ("b", 0.004, 101): 0.5,
}


class Runs:
  """Stands in for run_all: keeps the grids, and writes what their runs would."""

  def __init__(self, failing=()):
    self.failing, self.grids = failing, []

  def __call__(self, grid, root, jobs, on_end):
    self.grids.append(list(grid))
    for name, (arguments,) in grid.items():
      workdir = root / name
      workdir.mkdir(parents=True, exist_ok=True)
      settings = {"seed": 0, "method": {"name": name[0]}, "env": {"name": "tinycode"}}
      (workdir / "config.json").write_text(json.dumps(settings))
      key, score = "eval/heldout/avg@k", 0.5
      if name.startswith("tuning/"):
        rate, seed = (re.search(rf"{x}=([\d.]+)", f"{arguments}")[1] for x in ("lr", "seed"))
        key, score = "eval/tune/avg@k", SCORES[name.split("/")[1], float(rate), int(seed)]
      first = {"step": 0, "time_s": 0.0, key: 0.9}
      last = {"step": 2, "time_s": 4.0, key: score, f"{key}_low": 0.1, f"{key}_high": 0.8}
      last |= {"train/generations": 64, "train/sampled_tokens": 640}
      lines = [json.dumps(line) + "\n" for line in (first, last)]
      (workdir / "metrics.jsonl").write_text("".join(lines))
      if name not in self.failing:
        on_end(name)
    return [name for name in grid if name in self.failing]


@pytest.fixture
def tuned(tmp_path, monkeypatch):
  """Runs the command over a file, with the stand-in for its runs; the page takes seconds."""

  def call(text, runs, *flags, page=False):
    (tmp_path / "own.py").write_text(text)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(experiment, "run_all", runs)
    if not page:
      monkeypatch.setattr(experiment.report, "write_report", lambda *_: None)
    arguments = [f"--config={tmp_path}/own.py", f"--workdir={tmp_path}/runs", *flags]
    return experiment.main(arguments)

  return call


GRID = ["a_seed0", "a_seed1", "b_seed0", "b_seed1", "other"]


def test_the_best_trial_is_chosen_and_told(tmp_path, tuned):
  runs = Runs()
  assert tuned(FILE, runs, page=True) == 0
  trials = [f"tuning/{arm}/lr_{rate}" for arm in "ab" for rate in (0.001, 0.002, 0.004)]
  assert runs.grids == [trials, GRID]
  record = json.loads((tmp_path / "runs" / "tuning.json").read_text())
  assert record["metric"] == "eval/tune/avg@k" and "first" in record["rule"]
  assert [record["arms"][arm]["chosen"] for arm in "ab"] == ["lr_0.002", "lr_0.002"]
  assert record["arms"]["a"]["trials"]["lr_0.004"] == {
    "arguments": [
      [
        "--config=configs/tinycode.py:method=sdpo,seed=100",
        "--config.optimizer.lr=0.004",
        "--config.eval.splits=()",
        "--config.eval.final_splits=('tune',)",
      ]
    ],
    "seeds": [100],
    "scores": [0.5],
    "mean": 0.5,
    "low": 0.1,  # over questions
    "high": 0.8,
  }
  curves = json.loads((tmp_path / "runs" / "curves.json").read_text())
  assert list(curves) == GRID
  assert curves["a_seed1"]["tuning"] == {"trials": 3, "chosen": "lr_0.002"}
  assert curves["other"]["tuning"] is None
  assert "--config.optimizer.lr=0.002" in curves["b_seed0"]["arguments"]
  page = (tmp_path / "runs" / "report" / "index.html").read_text()
  # once for each run, and once for each arm in the comparison
  assert page.count("tuned: 3 trials on the tune split, chosen lr_0.002") == 4 + 2
  assert page.count("<small>not tuned</small>") == 1 + 1


def test_several_seeds_of_a_trial_count_by_their_mean(tmp_path, tuned):
  runs = Runs()
  assert tuned(changed(SEEDS="(100, 101)"), runs) == 0
  assert runs.grids[0][:2] == ["tuning/a/lr_0.001/run0", "tuning/a/lr_0.001/run1"]
  record = json.loads((tmp_path / "runs" / "tuning.json").read_text())["arms"]
  assert [record[arm]["chosen"] for arm in "ab"] == ["lr_0.002", "lr_0.001"]
  trial = record["b"]["trials"]["lr_0.002"]
  assert (trial["seeds"], trial["scores"], trial["mean"]) == ([100, 101], [0.75, 0.0], 0.375)
  assert trial["low"] < 0.375 < trial["high"]
  assert len(trial["arguments"]) == 2


def test_a_trial_that_failed_ends_all(tmp_path, tuned, capsys):
  runs = Runs(failing=["tuning/b/lr_0.002"])
  assert tuned(FILE, runs) == 1
  assert "nothing is chosen, since trials failed: tuning/b/lr_0.002" in capsys.readouterr().err
  assert len(runs.grids) == 1 and not (tmp_path / "runs" / "tuning.json").exists()


def test_a_report_needs_the_choice_that_was_made(tmp_path, tuned, capsys):
  runs = Runs()
  assert tuned(FILE, runs, "--report") == 2
  assert "tuning.json: no such file" in capsys.readouterr().err
  assert tuned(FILE, runs) == 0
  (tmp_path / "runs" / "curves.json").unlink()
  assert tuned(FILE, runs, "--report") == 0
  assert len(runs.grids) == 2  # nothing ran again
  curves = json.loads((tmp_path / "runs" / "curves.json").read_text())
  assert curves["b_seed0"]["tuning"] == {"trials": 3, "chosen": "lr_0.002"}
  capsys.readouterr()
  assert tuned(FILE.replace("0.004", "0.005"), runs, "--report") == 2
  assert "tuning.json is of other trials" in capsys.readouterr().err


def test_a_file_without_tuning_has_no_tuned_arm(tmp_path, tuned):
  runs = Runs()
  assert tuned("def get_grid(): return {'one': ['--config=x', '--no-setting']}\n", runs) == 0
  assert runs.grids == [["one"]]
  assert not (tmp_path / "runs" / "tuning.json").exists()
  assert json.loads((tmp_path / "runs" / "curves.json").read_text())["one"]["tuning"] is None


def test_a_grid_goes_on_from_its_results_alone(tmp_path, tuned):
  """Neither trials nor runs that ended are repeated, though their directories are gone."""
  results = f"--results={tmp_path}/kept"
  failing = Runs(failing=["a_seed1"])
  assert tuned(FILE, failing, results) == 1 and failing.grids[1] == GRID
  shutil.rmtree(tmp_path / "runs")
  record = (tmp_path / "kept" / "tuning.json").read_text()
  again = Runs()
  assert tuned(FILE, again, results) == 0
  assert again.grids == [[], ["a_seed1"]]
  assert (tmp_path / "kept" / "tuning.json").read_text() == record
  ends = json.loads((tmp_path / "kept" / "curves.json").read_text())
  assert ends.keys() == set(GRID) and all(run["ended"] for run in ends.values())
  other = Runs()
  assert tuned(FILE.replace("seed=5", "seed=6"), other, results) == 0
  assert other.grids == [[], ["other"]]  # its arguments are others now
  assert not (tmp_path / "runs" / "curves.json").exists()


def test_a_grid_takes_over_what_another_has_run(tmp_path, tuned, capsys):
  """Its trials and runs with the same arguments, under its own names; the rest is announced."""
  assert tuned(FILE, Runs(), f"--results={tmp_path}/results/first") == 0
  more = FILE.replace("in (0, 1)", "in (0, 1, 2)").replace("other", "another")
  more = f"REUSED = ('{tmp_path}/results/first',)\nRUN_S = 120.0\n{more}"
  capsys.readouterr()
  again = Runs()
  assert tuned(more, again, f"--results={tmp_path}/results/grid") == 0
  assert again.grids == [[], ["a_seed2", "b_seed2"]]
  said = capsys.readouterr().out
  assert "2 runs to go, about 0.1 CPU hours" in said and "trials to go" not in said
  assert "CPU hours were spent" in said
  ends = json.loads((tmp_path / "results" / "grid" / "curves.json").read_text())
  assert {name for name, run in ends.items() if "from" in run} == {
    "a_seed0",
    "a_seed1",
    "b_seed0",
    "b_seed1",
    "another",
  }
  assert ends["a_seed0"]["tuning"]["chosen"] == "lr_0.002"
  page = summary.text(tmp_path)
  assert f"5 of them are runs of `{tmp_path}/results/first`" in page
  assert "| heldout | `b` | 3 |" in page
  nowhere = more.replace("results/first", "results/nowhere")
  assert tuned(nowhere, again) == 2
  assert "results/nowhere': no such directory" in capsys.readouterr().err


def test_a_cluster_gets_commands_until_all_has_ended(tmp_path, tuned, capsys):
  """The trials first; what others have run under the directory is kept, and the grid follows."""
  root, results = tmp_path / "runs", f"--results={tmp_path}/results/grid"

  def commands():
    capsys.readouterr()
    assert tuned(FILE, lambda *_: pytest.fail("something ran"), "--commands", results) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]

  def run_elsewhere(lines):
    """What each command leaves, as far as the experiment reads it."""
    for line in lines:
      *arguments, workdir = line[3:]
      name = str(pathlib.Path(workdir.removeprefix("--workdir=")).relative_to(root))
      Runs()({name: [arguments]}, root, 1, lambda name: None)
      settings = tuning.settings(name, arguments)
      (root / name / "config.json").write_text(json.dumps(settings.to_dict(), default=repr))
      ended = {"step": settings.total_steps, "stopped": False, "best": None}
      (root / name / "run.json").write_text(json.dumps({"ended": ended, "commit": "0123456789"}))

  trials = commands()
  assert len(trials) == 6 and all(line[:3] == ["python", "-m", "sdpo_jax.main"] for line in trials)
  assert trials[1][-1] == f"--workdir={root}/tuning/a/lr_0.002"
  run_elsewhere(trials[:-1])
  assert commands() == trials[-1:]
  run_elsewhere(trials[-1:])
  runs = commands()
  assert [line[-1].rpartition("/")[2] for line in runs] == GRID
  assert "--config.optimizer.lr=0.002" in runs[0]
  run_elsewhere(runs)
  run_file = root / "other" / "run.json"
  run_file.write_text(run_file.read_text().replace("240", "239"))
  assert commands() == runs[-1:]  # killed before its last step
  run_elsewhere(runs[-1:])
  assert commands() == []
  again = Runs()
  assert tuned(FILE, again, results) == 0 and again.grids == [[], []]
  assert "evaluations included, by the code of 0123456." in summary.text(tmp_path)


def test_a_run_that_has_not_ended_is_kept_as_such_and_is_in_no_table(tmp_path, tuned):
  results = f"--results={tmp_path}/results/grid"
  assert tuned(FILE, Runs(failing=["a_seed0", "a_seed1"]), results) == 1
  ends = json.loads((tmp_path / "results" / "grid" / "curves.json").read_text())
  assert {name for name, run in ends.items() if not run["ended"]} == {"a_seed0", "a_seed1"}
  assert len(ends["a_seed0"]["points"]) == 2
  assert "| heldout | `b` | 2 |" in (page := summary.text(tmp_path))
  assert "| heldout | `a` |" not in page
  again = Runs()
  assert tuned(FILE, again, results) == 0 and again.grids == [[], ["a_seed0", "a_seed1"]]
  assert "| heldout | `a` | 2 |" in summary.text(tmp_path)


def test_broken_results_are_one_line(tmp_path, tuned, capsys):
  (tmp_path / "kept").mkdir()
  (tmp_path / "kept" / "curves.json").write_text("{")
  assert tuned(FILE, Runs(), f"--results={tmp_path}/kept") == 2
  error = capsys.readouterr().err
  assert "curves.json cannot be read" in error and error.count("\n") == 1


def test_results_tell_of_the_tuning(tmp_path, tuned):
  assert tuned(FILE.replace("seed=5", "method=dapo,seed=5"), Runs()) == 0
  folder = tmp_path / "results" / "grid"
  folder.mkdir(parents=True)
  for name in ("curves.json", "tuning.json"):
    (folder / name).write_text((tmp_path / "runs" / name).read_text())
  page = summary.text(tmp_path)
  assert "- `a`, `b`: tuned: 3 trials on the tune split, chosen lr_0.002." in page
  assert "- `dapo`: not tuned." in page
  assert "| `b` | `lr_0.002` | 100 | 75.0 [10.0, 80.0] | chosen |" in page
  assert "| `b` | `lr_0.004` | 100 | 25.0 [10.0, 80.0] |  |" in page


@pytest.mark.slow
def test_trials_and_grid_run_for_real(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  text = changed(RATES='{"a": (0.001, 0.002), "b": (0.001, 0.002)}')
  (tmp_path / "own.py").write_text(text.replace("seed=", "local,seed="))
  arguments = [f"--config={tmp_path}/own.py", f"--workdir={tmp_path}/runs", "--jobs=2"]
  assert experiment.main(arguments) == 0
  record = (tmp_path / "runs" / "tuning.json").read_text()
  assert experiment.main(arguments) == 0  # everything is finished, and left alone
  assert (tmp_path / "runs" / "tuning.json").read_text() == record
  ends = json.loads((tmp_path / "runs" / "curves.json").read_text())
  assert [run["points"][-1]["step"] for run in ends.values()] == [2] * 5
  chosen = json.loads(record)["arms"]["b"]["chosen"].replace("lr_", "lr=")
  settings = json.loads((tmp_path / "runs" / "b_seed1" / "config.json").read_text())
  assert f"lr={settings['optimizer']['lr']}" == chosen
