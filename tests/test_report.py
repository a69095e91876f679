"""The report: what the page shows of finished, live and damaged work directories."""

import base64
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys

from matplotlib.figure import Figure
import numpy as np
import pytest

from sdpo_jax import report
from sdpo_jax.report import answers, curves, templates
from sdpo_jax.report.runs import groups_of, label

NASTY = (
  "{x} {{y}} \\n \\frac{1}{2} $a_b$ %s <|im_start|>assistant\n"
  "</pre><script>alert('1')</script> &amp; \x00\x1b[31m \ud800 \u202e é 日本"
)


class Page(html.parser.HTMLParser):
  """Checks that tags nest, and collects text, tags and attributes."""

  VOID = {"meta", "link", "img", "input", "br"}

  def __init__(self, path):
    super().__init__()
    self.open, self.tags, self.text = [], [], []
    self.source = path.read_bytes().decode("utf-8")  # strict
    self.feed(self.source)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if not {"script", "style"} & set(self.open):
      self.text.append(data)

  def has(self, text):
    return text in re.sub(r"\s+", " ", "".join(self.text))

  def rows(self):
    """Rows of tables as markup, without the blanks between tags."""
    source = re.sub(r">\s+<", "><", self.source)
    return re.findall(r"<tr>.*?</tr>", source, re.DOTALL)

  def pictures(self):
    return [attrs["src"] for tag, attrs in self.tags if tag == "img"]


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
  """Pictures of no points, but for tests that look at them."""
  if not {"plots", "drawn"} & set(request.fixturenames):
    monkeypatch.setattr(curves, "_drawn", lambda *_: b"PNG")


@pytest.fixture
def drawn():
  """Asks for real pictures."""


def kept_texts(path, step, count=12, **changes):
  """Writes what a run keeps of an evaluation after a step."""
  folder = path / "eval" / "texts"
  folder.mkdir(parents=True, exist_ok=True)
  lines = [
    {"question": i, "prompt": f"Question {i}?"}
    | {"responses": [{"reward": i % 2, "text": f"Answer {i} of step {step}."}]}
    | changes
    for i in range(count)
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / f"heldout.step_{step:06d}.jsonl").write_text(text)


def rollout(step, **changes):
  return {
    "step": step,
    "task_id": "train/7",
    "prompt": "Reverse the list.",
    "response": "return xs[::-1]",
    "reward": 0.0,
    "status": "scored",
    "feedback": "Wrong Answer",
    "teacher_context": "Reverse the list.\nWrong Answer",
    "tokens": ["return", " xs", "[::-1]", "\n"],
    "teacher_gap": [0.5, -1.25, 6.0, 0.0],
  } | changes


def workdir(
  path, *, method="sdpo", seed=0, accuracy=(0.1, 0.5, 0.9), rollouts=(), config=None, unseen=True
):
  path.mkdir()
  settings = {
    "seed": seed,
    "total_steps": 2,
    "method": {"name": method},
    "env": {"name": "tinycode"},
    "eval": {"samples": 4},
  } | (config or {})
  (path / "config.json").write_text(json.dumps(settings))
  (path / "run.json").write_text(
    json.dumps(
      {
        "command": "python -m sdpo_jax.main --config=x",
        "versions": {"jax": "0.10.2"},
        "devices": ["cpu:0"],
        "rows": {"train": {"rows": 9, "rows_sha256": "f"}, "test": {"rows": 4}},
        "commit": None,
      }
    )
  )
  lines = []
  for step, value in enumerate(accuracy):
    line = {
      "step": step,
      "time_s": 2.0 * step,
      "eval/heldout/avg@k": value,
      "eval/heldout/avg@k_low": value - 0.05,
      "eval/heldout/avg@k_high": value + 0.05,
    }
    line |= (
      {
        "train/reward": value,
        "train/loss": 1 - value,
        "train/generations": 64 * step,
        "train/sampled_tokens": 1000 * step + seed,
        "rollout/length": 9.0,
      }
      if step
      else {}
    )
    lines.append(line | ({"eval/unseen/avg@k": value} if unseen and step == 0 else {}))
  (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  if rollouts:
    (path / "rollouts").mkdir()
    for step, lines_of_step in rollouts:
      (path / "rollouts" / f"step_{step:06d}.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in lines_of_step)
      )
  return path


def test_a_run_that_stopped_itself_says_so_and_which_checkpoint_is_best(tmp_path):
  run = workdir(tmp_path / "run")
  about = json.loads((run / "run.json").read_text())
  best = {"step": 1, "value": 0.5, "metric": "eval/heldout/avg@k"}
  about["ended"] = {"step": 2, "stopped": True, "best": best}
  (run / "run.json").write_text(json.dumps(about))
  page = Page(report.write_report([run], tmp_path / "out"))
  assert page.has("2 / 2, stopped: worse than the base model, best at 1")
  about["ended"] |= {"stopped": False, "best": best | {"step": 2}}
  (run / "run.json").write_text(json.dumps(about))
  page = Page(report.write_report([run], tmp_path / "out"))
  assert page.has("2 / 2") and not page.has("2 / 2, ")


def test_a_run(tmp_path, drawn):
  run = workdir(
    tmp_path / "run",
    rollouts=[
      (1, [rollout(1)]),
      (2, [rollout(2, reward=1.0, counterfactual_contexts=["If you had tried"])]),
    ],
  )
  path = report.write_report([run], tmp_path / "out")
  page = Page(path)
  assert path == tmp_path / "out" / "index.html"
  for text in (
    "sdpo on tinycode",
    "python -m sdpo_jax.main --config=x",
    "10.0% [5.0%, 15.0%]",
    "90.0% [85.0%, 95.0%]",
    "10.0% at step 0",
    "128",
    "jax 0.10.2",
    "train 9, test 4",
    "What the teacher read",
    "What it read of alternatives",
    "If you had tried",
    "reward 1",
  ):
    assert page.has(text), text
  assert "Comparison" not in page.source
  files = {file.name for file in (tmp_path / "out").glob("*.png")}
  assert {
    "eval_heldout_avg_k_by_step.png",
    "eval_heldout_avg_k_by_generations.png",
    "eval_heldout_avg_k_by_time_s.png",
    "train_reward_by_step.png",
  } <= files
  # every picture is inside the page, and nothing is fetched
  assert len(page.pictures()) == len(files)
  assert {
    base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in page.pictures()
  } == {file.read_bytes() for file in (tmp_path / "out").glob("*.png")}
  assert not re.search(r"(src|href)='(?!data:|#)", page.source)


def test_tokens_are_painted_by_the_gap(tmp_path):
  run = workdir(tmp_path / "run", rollouts=[(1, [rollout(1)])])
  page = Page(report.write_report([run], tmp_path / "out"))
  titles = {attrs["title"]: attrs["style"] for tag, attrs in page.tags if "title" in attrs}
  assert all(attrs["tabindex"] == "-1" for _, attrs in page.tags if "title" in attrs)
  assert list(titles) == ["+0.50 nats", "-1.25 nats", "+6.00 nats", "+0.00 nats"]
  alpha = {
    title: float(re.search(r"rgba\((\d+),\d+,\d+,([\d.]+)\)", style)[2])
    for title, style in titles.items()
  }
  red = {title: int(re.search(r"rgba\((\d+)", style)[1]) for title, style in titles.items()}
  # full strength at 2 nats
  assert (
    alpha["+0.00 nats"]
    == 0
    < alpha["+0.50 nats"]
    < alpha["-1.25 nats"]
    < alpha["+6.00 nats"]
    == 0.75
  )
  assert red["-1.25 nats"] > 200 and red["+0.50 nats"] == 0


def test_text_that_looks_like_markup_stays_text(tmp_path):
  run = workdir(
    tmp_path / "run",
    method=NASTY,
    config={"env": {"name": NASTY}},
    rollouts=[
      (
        1,
        [
          rollout(
            1,
            prompt=NASTY,
            response=NASTY,
            feedback=NASTY,
            teacher_context=NASTY,
            task_id=NASTY,
            status=NASTY,
            tokens=[NASTY, NASTY, "", "<b>"],
          ),
          rollout(1, response=NASTY, tokens=None),
        ],
      )
    ],
  )
  page = Page(report.write_report([run], tmp_path / "out"))
  scripts = [attrs for tag, attrs in page.tags if tag == "script"]
  assert scripts == [{"type": "application/json", "id": "data"}, {}]
  data = re.search(r"id='data'>(.*?)</script>", page.source, re.DOTALL)[1]
  outside = page.source.replace(data, "")
  assert outside.count("alert(") == outside.count("script&gt;alert(") and "<" not in data
  assert page.has("{x} {{y}} \\n \\frac{1}{2} $a_b$ %s <|im_start|>assistant")
  assert page.has("</pre><script>alert('1')</script> &amp; ␀␛[31m")
  assert not re.search(r"[\x00-\x08\x0b-\x1f]", page.source)


def test_seeds_make_a_group_and_other_settings_another(tmp_path):
  runs = [
    workdir(
      tmp_path / f"sdpo{seed}",
      seed=seed,
      accuracy=(0.1, 0.6 + seed / 10, 0.8),
      config={"log": {"rollouts_kept": seed}},
    )
    for seed in range(3)
  ]
  runs += [
    workdir(
      tmp_path / f"grpo{seed}", method="grpo", seed=seed, accuracy=(0.1, 0.2, 0.6 + seed / 100)
    )
    for seed in range(3)
  ]
  runs += [workdir(tmp_path / "wide", config={"rollout": {"group": 16}, "seed": 9})]
  loaded = [report.read_run(run) for run in runs]
  label(loaded)
  assert {label: len(members) for label, members in groups_of(loaded).items()} == {
    "sdpo, rollout.group=None": 3,
    "grpo": 3,
    "sdpo, rollout.group=16": 1,
  }
  page = Page(report.write_report(runs, tmp_path / "out"))
  assert (
    page.has("sdpo, grpo on tinycode")
    and page.has("Comparison")
    and page.has("grpo's 61.0%: 64 / 128 responses (2.0×), 1,001 / 2,001 tokens (2.0×)")
  )
  assert page.has("sdpo, rollout.group=None's 80.0%: not reached")
  (row,) = [row for row in page.rows() if "<td>heldout</td><td><b>grpo</b>" in row]
  # seed by seed: -20, -19, -18
  assert re.search(r"<td>-19\.0 points <small>\[-2\d\.\d, -1\d\.\d\]</small></td>", row), row


def test_curves_of_seeds_of_unequal_length_are_averaged_where_all_have_values(tmp_path):
  runs = [
    report.read_run(workdir(tmp_path / f"r{seed}", seed=seed, accuracy=accuracy))
    for seed, accuracy in enumerate([(0.0, 0.5, 1.0), (0.5, 1.0)])
  ]
  assert curves.mean_curve(runs, "eval/heldout/avg@k", "train/generations") == [
    (0, 0.25),
    (64, 0.75),
  ]
  report.write_report([run.workdir for run in runs], tmp_path / "out")


def test_what_was_only_evaluated_before_training_is_left_out_and_said_to_be(tmp_path):
  runs = [
    workdir(tmp_path / f"sdpo{seed}", seed=seed, accuracy=accuracy, unseen=False)
    for seed, accuracy in enumerate([(0.1, 0.5), (0.1, 0.7), (0.1,)])
  ]
  runs += [
    workdir(tmp_path / "grpo", method="grpo", accuracy=(0.1,), unseen=False),
    workdir(tmp_path / "worse", method="dapo", accuracy=(0.1, 0.05), unseen=False),
  ]
  page = Page(report.write_report(runs, tmp_path / "out"))
  (row,) = [row for row in page.rows() if "<td>heldout</td><td><b>sdpo</b>" in row]
  # the third seed's base model is not among what sdpo learned
  assert "<td>2</td>" in row and "60.0%" in row
  assert (
    page.has("dapo's 5.0%: the base model already")
    and page.has("sdpo's 60.0%: not reached")
    and not page.has("grpo's")
  )
  assert page.has(
    "Left out, not evaluated since the base model: "
    "heldout: sdpo (1 of 3 runs); heldout: grpo (1 of 1 runs)."
  )


def test_tasks_are_compared_apart_and_labels_are_names(tmp_path):
  runs = [
    workdir(tmp_path / f"{task}{seed}", seed=seed, config={"env": {"name": task}, "label": "mine"})
    for task in ("a", "b")
    for seed in range(2)
  ]
  runs += [workdir(tmp_path / "other", config={"env": {"name": "b"}, "label": "other"})]
  page = Page(report.write_report(runs, tmp_path / "out"))
  assert page.has("sdpo on a, b")
  files = {file.name for file in (tmp_path / "out").glob("*.png")}
  assert {
    "a_eval_heldout_avg_k_by_sampled_tokens.png",
    "b_eval_heldout_avg_k_by_step.png",
  } <= files and len(page.pictures()) == len(files)
  assert page.has("other's 90.0%: 128 / 128 responses, 2,000 / 2,000 tokens")
  ids = [attrs["id"] for tag, attrs in page.tags if attrs.get("type") == "radio"]
  assert len(ids) == len(set(ids)) == 8


def test_runs_of_one_label_are_seeds_only_where_all_else_is_equal(tmp_path):
  """Of one task: on another one a label's settings differ as they must."""

  def labelled(task, seed, group, **changes):
    settings = {"label": "mine", "env": {"name": task}, "rollout": {"group": group}}
    return workdir(tmp_path / f"{task}{seed}{group}", seed=seed, config=settings | changes)

  runs = [
    labelled("a", 0, 4, log={"rollouts_kept": 3}),
    labelled("a", 1, 4, log={"rollouts_kept": 5}),
    labelled("a", 2, 16),
    labelled("b", 0, 8),
    labelled("b", 1, 8),
  ]
  loaded = [report.read_run(run) for run in runs]
  label(loaded)
  assert [run.label for run in loaded] == ["mine, rollout.group=4"] * 2 + [
    "mine, rollout.group=16"
  ] + ["mine"] * 2
  page = Page(report.write_report(runs, tmp_path / "out"))
  assert page.has("mine, rollout.group=16's 90.0%") and page.has(f"b: {tmp_path / 'b08'}")


def test_running_mean_stays_centred():
  line = [float(x) for x in range(100)]
  assert list(curves.smooth(np.array(line))) == pytest.approx(line)


@pytest.mark.parametrize(
  "missing", ["config.json", "run.json", "metrics.jsonl", "rollouts", "everything"]
)
def test_missing_files_are_left_out(tmp_path, missing):
  run = workdir(tmp_path / "run", rollouts=[(1, [rollout(1)])])
  for path in list(run.iterdir()):
    if missing in (path.name, "everything"):
      path.rename(tmp_path / f"gone_{path.name}")
  page = Page(report.write_report([run], run / "report"))
  assert page.has("No metrics yet.") == (missing in ("metrics.jsonl", "everything"))
  assert page.has("None recorded") == (missing in ("rollouts", "everything"))
  assert page.has("config.json is missing.") == (missing in ("config.json", "everything"))


def test_damaged_files_and_odd_rollouts(tmp_path):
  run = workdir(
    tmp_path / "run",
    rollouts=[
      (1, []),
      (2, [rollout(2)]),
      (
        3,
        [
          {},
          rollout(3, teacher_gap=[1.0]),
          rollout(3, teacher_gap=[None, "x", float("nan"), 1]),
          rollout(3, reward=None, teacher_context=None, feedback=""),
        ],
      ),
    ],
  )
  with (run / "metrics.jsonl").open("ab") as file:
    file.write(b'[1]\n{"step": "x"}\n\xff\xfe\n{"step": 3, "train/rew')
  (run / "run.json").write_text("[")
  page = Page(report.write_report([run], tmp_path / "out"))
  assert (
    page.has("3 unreadable lines left out.")
    and page.has("reward ?")
    and page.has("The teacher read nothing more.")
  )


def test_a_live_run_without_evaluations(tmp_path):
  run = workdir(tmp_path / "run")
  (run / "metrics.jsonl").write_text('{"step": 1, "time_s": 1.0, "train/reward": 0.5}\n')
  page = Page(report.write_report([run], tmp_path / "out"))
  assert len(page.pictures()) == 2 and page.has("1 / 2")  # by step and by second


def test_command(tmp_path):
  run = workdir(tmp_path / "run")
  root = pathlib.Path(__file__).parent.parent
  command = [sys.executable, "-m", "sdpo_jax.report", str(run)]
  result = subprocess.run(
    command,
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (result.returncode, result.stdout.strip(), result.stderr) == (
    0,
    str(run / "report" / "index.html"),
    "",
  )
  assert (run / "report" / "index.html").exists()
  result = subprocess.run(
    [*command, str(tmp_path / "nowhere")],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 2 and result.stderr.splitlines() == [
    f"sdpo_jax.report: no work directory {tmp_path / 'nowhere'}"
  ]


def test_the_package_ships_the_page():
  root = pathlib.Path(__file__).parent.parent
  setup = (root / "setup.py").read_text(encoding="utf-8")
  assert '"assets/*.html"' in setup and '"assets/*.js"' in setup
  assert {"report.html", "parts.html", "rollouts.js"} <= {
    x.name for x in templates.ASSETS.iterdir()
  }


def test_needs_no_jax():
  root = pathlib.Path(__file__).parent.parent
  code = (
    "import sys, sdpo_jax.report; "
    "names = ('jax', 'flax', 'torch', 'matplotlib.pyplot'); "
    "print([name for name in names if name in sys.modules])"
  )
  assert (
    subprocess.run(
      [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    == "[]"
  )


@pytest.fixture
def plots(monkeypatch):
  """The axes of every picture, as they are saved."""
  saved = []
  save = curves.Figure.savefig

  def keep(figure, *args, **kwargs):
    saved.append(figure.axes[0])
    return save(figure, *args, **kwargs)

  monkeypatch.setattr(curves.Figure, "savefig", keep)
  return saved


def write_run(directory, label, lines, **settings):
  directory.mkdir()
  config = {"seed": 0, "label": label, "env": {"name": "math_qa"}, "method": {"name": "sdpo"}}
  (directory / "config.json").write_text(json.dumps(config | settings))
  (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return directory


def points(*rewards):
  return [
    {"step": i, "time_s": i, "train/reward": reward} for i, reward in enumerate(rewards, start=1)
  ]


def legend_of(plot):
  return [text.get_text() for text in plot.get_legend().get_texts()]


def mean_lines(plot):
  return [line for line in plot.get_lines() if line.get_linewidth() == 1.8]


@pytest.mark.parametrize(
  "labels",
  [
    ("_baseline", "new"),
    ("__", "_nolegend_"),
    ("costs $5", "$x_1$ and $y$"),
    (r"\frac{1}", r"a\$b"),
    ("%s {x}", "e_1^2"),
    ("begins alike " * 6 + "A", "begins alike " * 6 + "B"),
    ("x" * 80 + "1", "x" * 80 + "2"),
  ],
)
def test_every_label_stands_in_the_legend(labels, tmp_path, plots):
  directories = [
    write_run(tmp_path / str(i), label, points(0.5, 0.6)) for i, label in enumerate(labels)
  ]
  report.write_report(directories, tmp_path / "out")
  written = legend_of(plots[0])
  assert len(set(written)) == 2
  for name, text in zip(labels, written, strict=True):
    if len(name) <= 60:
      assert text == name
    else:
      assert text.split()[0].startswith(name.split()[0][:10]) and text.endswith(name[-1])
  assert not any(text.get_parse_math() for text in plots[0].get_legend().get_texts())


def test_a_long_label_keeps_both_ends():
  label = "counterfactual, " + "data.max_prompt_tokens=2048, " * 3 + "rollout.group=8"
  text = curves.legend_text(label, [label, "sdpo"])
  assert text.startswith("counterfactual, ") and text.endswith("rollout.group=8")
  assert " ... " in text and len(text) <= 60


def test_more_runs_than_colours_are_told_apart(tmp_path, plots):
  count = len(report.COLOURS) + 2
  directories = [
    write_run(tmp_path / str(i), f"run {i}", points(i / 10, 0.5)) for i in range(count)
  ]
  report.write_report(directories, tmp_path / "out")
  styles = [(line.get_color(), line.get_linestyle()) for line in mean_lines(plots[0])]
  assert len(set(styles)) == len(legend_of(plots[0])) == count


def test_the_first_step_of_a_run_can_be_seen(tmp_path, plots):
  """A line between fewer than two points has no length."""
  report.write_report([write_run(tmp_path / "a", "new", points(0.5))], tmp_path / "out")
  assert mean_lines(plots[0])[0].get_marker() == "o"


def test_values_that_are_no_numbers_are_left_out_and_counted(tmp_path, plots):
  values = [0.5, float("nan"), 0.7, float("inf"), -float("inf"), "much", 0.9]
  directory = write_run(tmp_path / "a", "new", points(*values))
  page = Page(report.write_report([directory], tmp_path / "out"))
  (line,) = mean_lines(plots[0])
  assert line.get_xdata().tolist() == [1, 3, 7]
  assert line.get_ydata().tolist() == pytest.approx([0.5, 0.7, 0.9])
  assert page.has("4 values of metrics left out: not a finite number.")


def test_answers_before_and_after_stand_side_by_side(tmp_path):
  run = workdir(tmp_path / "A")
  kept_texts(run, 0)
  kept_texts(run, 2)
  page = Page(report.write_report([run], tmp_path / "out"))
  shown = [i for i in range(12) if page.has(f"Question {i}?")]
  assert len(shown) == answers.QUESTIONS
  for i in range(12):
    both = page.has(f"Answer {i} of step 0."), page.has(f"Answer {i} of step 2.")
    assert both == (i in shown,) * 2
  again = Page(report.write_report([run], tmp_path / "again"))
  assert (
    again.source.partition("<h2 id='rollouts'>")[0]
    == page.source.partition("<h2 id='rollouts'>")[0]
  )
  kept_texts(run, 2, responses=[{"reward": None, "text": NASTY}])
  assert "&lt;script&gt;" in Page(report.write_report([run], tmp_path / "nasty")).source


@pytest.mark.parametrize("damage", ["one end", "no texts", "not JSON", "another set"])
def test_answers_are_left_out_where_they_cannot_be_compared(tmp_path, damage):
  run = workdir(tmp_path / "A")
  kept_texts(run, 0)
  if damage != "one end":
    kept_texts(run, 2, **({"responses": [{"reward": 1.0}]} if damage == "no texts" else {}))
  if damage == "not JSON":
    (run / "eval" / "texts" / "heldout.step_000002.jsonl").write_text('{"question": 0\n')
  if damage == "another set":
    kept_texts(run, 2, prompt="Another?")
  assert "Answers before" not in Page(report.write_report([run], tmp_path / "out")).source


# ---- what notebooks use --------------------------------------------------------------------------


def test_curves_are_drawn_into_any_axes(tmp_path):
  folders = [workdir(tmp_path / name, method=name) for name in ("sdpo", "grpo")]
  plot = Figure().add_subplot()
  report.draw_curves(plot, report.read_runs(folders), "eval/heldout/avg@k")
  first, second = plot.lines
  assert list(first.get_xdata()) == [0, 64, 128] and list(second.get_ydata()) == [0.1, 0.5, 0.9]
  assert [text.get_text() for text in plot.get_legend().get_texts()] == ["sdpo", "grpo"]
  assert plot.get_xlabel() == "responses generated" and plot.get_title() == "Evaluation: heldout"
  assert plot.get_ylabel() == "mean reward (avg@k)"
  other = Figure().add_subplot()
  report.draw_curves(other, report.read_runs(folders[:1]), "perf/first_step_s", "step")
  assert other.get_ylabel() == "perf/first_step_s" and not other.get_legend()


def test_all_rollouts_are_read_the_oldest_first(tmp_path):
  many = [rollout(10, task_id=str(i)) for i in range(30)]
  path = workdir(tmp_path / "run", rollouts=[(10, many), (2, [rollout(2)])])
  with open(path / "rollouts" / "step_000010.jsonl", "a") as file:
    file.write('{"step": 10, "task')  # a run that is still writing
  lines = report.read_rollouts(path)
  assert [line["step"] for line in lines] == [2] + [10] * 30 and lines[1:] == many
  assert report.read_rollouts(tmp_path) == []


def test_a_frame_holds_the_cards_as_a_page_of_its_own(tmp_path):
  text = report.embedded([rollout(1, prompt=NASTY), rollout(2, tokens=None)], height_px=99)
  (tmp_path / "frame.html").write_bytes(text.encode("utf-8", "replace"))
  outer = Page(tmp_path / "frame.html")
  (frame,) = [attributes for tag, attributes in outer.tags if tag == "iframe"]
  assert "height: 99px" in frame["style"] and "script" not in dict(outer.tags)
  (tmp_path / "cards.html").write_text(frame["srcdoc"], encoding="utf-8")
  inner = Page(tmp_path / "cards.html")
  assert inner.has("<script>alert('1')</script> &amp;") and "script" not in dict(inner.tags)
  assert len([a for _, a in inner.tags if a.get("class") == "card"]) == 2
