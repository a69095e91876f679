"""Tasks: sources, malformed rows, mixtures, processes, exact resumption, one's own environment."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import types

import numpy as np
import pytest

from sdpo_jax import main
from sdpo_jax.data.tasks import RowEnv, TaskStream, check_sources, first_tasks, with_rows
from sdpo_jax.envs.base import ENVS, make_env, plays
from sdpo_jax.envs.coding_rows import mbpp_task
from sdpo_jax.envs.math_qa import MathQA
from sdpo_jax.envs.tinycode import TinyCode
from sdpo_jax.records import Feedback, Task

_DATA = os.environ.get("SDPO_JAX_DATA")
needs_data = pytest.mark.skipif(
  _DATA is None, reason="SDPO_JAX_DATA is unset: no rows of benchmarks"
)


def write(path, rows):
  path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
  return str(path)


def numbers(first, count):
  return [{"question": f"What is {i}?", "answer": i} for i in range(first, first + count)]


@pytest.fixture
def two(tmp_path):
  """Two sources of split train, 6 and 4 rows, and one of split test."""
  write(tmp_path / "a.train.jsonl", numbers(0, 6))
  write(tmp_path / "a.test.jsonl", numbers(50, 5))
  write(tmp_path / "b.jsonl", numbers(100, 4))
  return f"{tmp_path}/a.{{split}}.jsonl", f"train={tmp_path}/b.jsonl x3"


def answers(tasks):
  return [int(t.data["answer"]) for t in tasks]


def test_splits_sizes_and_order(two):
  env = with_rows(MathQA(), two, splits=("train", "test"))
  assert env.size("train") == 10 and env.size("test") == 5 and env.skipped == 0
  assert answers(env.task("train", i) for i in range(10)) == [0, 1, 2, 3, 4, 5, 100, 101, 102, 103]
  assert (
    len({env.task("train", i).id for i in range(10)}) == 10 and env.task("test", 0).split == "test"
  )
  assert (
    env.judge(env.task("train", 9), "\\boxed{103}").reward == 1.0
    and "What is 103?" in env.prompt(env.task("train", 9))[0]["content"]
  )
  with pytest.raises(IndexError):
    env.task("train", 10)
  with pytest.raises(FileNotFoundError, match="a.dev.jsonl"):
    env.task("dev", 0)
  assert with_rows(MathQA(), two, splits=("train",)).size("test") == 5  # opened when asked for


def test_evaluation_sees_the_whole_range_or_all(two):
  env = with_rows(MathQA(), two, splits=("train", "test"))
  assert answers(first_tasks(env, "train", 5)) == [0, 2, 4, 100, 102] and answers(
    first_tasks(env, "test", 64)
  ) == [50, 51, 52, 53, 54]
  own = make_env("tests.my_env:ReverseWord", sandbox=None)
  assert [t.id for t in first_tasks(own, "test", 3)] == ["test/0", "test/1", "test/2"]


def test_weights_passes_and_seeds(two):
  env = with_rows(MathQA(), two, splits=("train",))
  drawn = answers(TaskStream(env, "train", seed=1).take(96))
  assert sum(a >= 100 for a in drawn) == 72  # weights 1 and 3
  small = [a for a in drawn if a < 100]
  passes = [small[i : i + 6] for i in range(0, 24, 6)]
  # each pass whole, in another order
  assert all(sorted(p) == list(range(6)) for p in passes) and len({tuple(p) for p in passes}) > 1
  assert drawn[:24] != answers(TaskStream(env, "train", seed=2).take(24)) and drawn[:24] == answers(
    TaskStream(env, "train", seed=1).take(24)
  )


def test_processes_divide_the_stream(two):
  env = with_rows(MathQA(), two, splits=("train",))
  whole = answers(TaskStream(env, "train").take(60))
  shards = [
    answers(TaskStream(env, "train", process_index=p, process_count=3).take(20)) for p in range(3)
  ]
  assert [a for step in zip(*shards) for a in step] == whole


@pytest.mark.parametrize("generated", [False, True])
def test_resumed_exactly(two, generated):
  env = (
    TinyCode(level="easy", sandbox=None)
    if generated
    else with_rows(MathQA(), two, splits=("train",))
  )
  stream = TaskStream(env, "train", process_index=1, process_count=2)
  stream.take(7)
  state = json.loads(json.dumps(stream.state()))
  expected = [t.id for t in stream.take(30)]
  again = TaskStream(env, "train", process_index=1, process_count=2)
  again.take(3)
  again.restore(state)
  assert [t.id for t in again.take(30)] == expected
  if generated:
    assert expected[0] == f"easy/0/train/{1 + 7 * 2}"


def test_a_position_over_other_data_is_refused(two, tmp_path):
  state = TaskStream(with_rows(MathQA(), two, splits=("train",)), "train").state()
  write(tmp_path / "b.jsonl", numbers(100, 5))
  with pytest.raises(ValueError, match="not what the checkpoint was written with"):
    TaskStream(with_rows(MathQA(), two, splits=("train",)), "train").restore(state)


class Own(MathQA):
  """Its tasks hold what JSON lacks."""

  def __init__(self, kind):
    self.kind = kind

  def task_from_row(self, row, split):
    task = super().task_from_row(row, split)
    data = {
      "address": object(),
      "array": np.full(2000, 0) if self.kind == "array" else np.arange(2000),
      "set": {"a", "b", "c", self.kind},
      "keys": {("a", self.kind): 1},
      "data class": Feedback(1.0, self.kind),
    }
    picked = {key: value for key, value in data.items() if self.kind in ("all", key)}
    return dataclasses.replace(task, data=task.data | (picked or data))


def printed(tmp_path, lines, env=None):
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(lines), encoding="utf-8")
  rows = with_rows(env or MathQA(), (f"train={path}",), splits=("train",), on_bad_row="skip")
  fingerprint = rows.fingerprint("train")
  return fingerprint["rows"], fingerprint["rows_sha256"], fingerprint["tasks_sha256"]


def test_a_fingerprint_tells_rows_and_tasks_from_others(tmp_path, two):
  lines = [json.dumps(row) for row in numbers(0, 3)]
  rows, rows_digest, tasks_digest = printed(tmp_path, lines)
  assert rows == 3 and (rows, rows_digest, tasks_digest) == printed(tmp_path, [*lines, "", ""])
  for other in (
    [*lines[:2], lines[2].replace("What", "what")],  # a question
    [*lines[:2], lines[2].replace('"answer": 2', '"answer": 3')],  # an answer
    lines[::-1],
    lines[:2],
    [*lines, lines[0]],
  ):
    found, *digests = printed(tmp_path, other)
    assert found == len(other) and not {rows_digest, tasks_digest} & set(digests)
  # a bad row is a row, though no task
  found, *digests = printed(tmp_path, [*lines, "{not json"])
  assert found == 4 and digests[0] != rows_digest and digests[1] == tasks_digest
  unread = [line.replace("{", '{"source": "a \\ud800", ') for line in lines]
  found, *digests = printed(tmp_path, unread)
  assert digests[0] != rows_digest and digests[1] == tasks_digest
  both = with_rows(MathQA(), two, splits=("train", "test"))
  swapped = with_rows(MathQA(), two[::-1], splits=("train",))
  assert both.fingerprint("train")["rows"] == 10 and both.fingerprint("test")["rows"] == 5
  assert both.fingerprint("train") != swapped.fingerprint("train")


def test_a_fingerprint_of_tasks_that_json_cannot_hold(tmp_path):
  """It is the same each time, and sees each part."""
  lines = [json.dumps(row) for row in numbers(0, 2)]
  of_all = printed(tmp_path, lines, Own("all"))
  assert of_all == printed(tmp_path, lines, Own("all"))
  parts = [printed(tmp_path, lines, Own(kind)) for kind in ("array", "set", "keys", "data class")]
  assert len({of_all, *parts}) == 5


@pytest.mark.parametrize(
  "line, says",
  [
    ("{not json", "the row is not JSON"),
    ("[1]", r"the row is not an object but '\[1\]'"),
    ('{"question": "Q"}', "field 'solution' is missing"),
    ('{"answer": 1}', "field 'prompt' is missing"),
    ('{"question": "", "answer": 1}', "field 'question' is empty"),
    ('{"question": "Q", "answer": [1]}', "field 'answer' is of type list"),
    ("null", "the row is not"),
    (r'{"question": "\ud800", "answer": 1}', "the prompt holds half of a surrogate pair"),
    ('{"question": "\udcff"}', "the row is not JSON"),
    ("[" * 100000, "the row is not JSON"),
  ],
  ids=range(10),
)
def test_a_malformed_row_is_an_error_with_file_line_and_field_or_skipped(tmp_path, line, says):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(
    f"{json.dumps(numbers(0, 1)[0])}\n\n{line}\n{json.dumps(numbers(2, 1)[0])}\n".encode(
      errors="surrogateescape"
    )
  )
  with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: {says}"):
    with_rows(MathQA(), (f"train={path}",), splits=("train",))
  env = with_rows(MathQA(), (f"train={path}",), splits=("train",), on_bad_row="skip")
  assert env.skipped == 1 and env.size("train") == 2
  path.write_bytes(line.encode(errors="surrogateescape"))
  with pytest.raises(ValueError, match="holds no usable row; 1 are malformed"):
    with_rows(MathQA(), (f"train={path}",), splits=("train",), on_bad_row="skip")


@pytest.mark.parametrize(
  "change, says",
  [
    ({"prompt": 3}, "the prompt is of type int: '3'"),
    ({"prompt": ["a"]}, "the prompt is of type list"),
    ({"prompt": None}, "the prompt is of type NoneType"),
    ({"prompt": " "}, "the prompt is empty"),
    ({"system": {"a": 1}}, "the system is of type dict"),
    ({"solution": 0.5}, "the solution is of type float"),
    ({"solution": "\udfff"}, "the solution holds half"),
  ],
)
def test_what_is_no_text_in_a_task_makes_a_bad_row_of_any_environment(tmp_path, change, says):
  path = write(tmp_path / "r.jsonl", numbers(0, 1))
  careless = types.SimpleNamespace(
    prompt=None,
    judge=None,
    task_from_row=lambda row, split: Task(**({"id": "0", "prompt": "Q", "split": split} | change)),
  )
  with pytest.raises(ValueError, match=rf"r\.jsonl, line 1: {says}"):
    with_rows(careless, (f"train={path}",), splits=("train",))


@pytest.mark.parametrize(
  "sources, splits, says",
  [
    ((), ("train",), "config.data.sources is empty"),
    (("rows.jsonl",), ("train",), "must say which split"),
    (("train=rows.csv",), ("train",), "neither .jsonl nor .parquet"),
    (("train=no.jsonl",), ("train", "test"), "no.jsonl: no such file"),
    (("test=no.jsonl",), ("train",), "nothing for the split 'train'"),
    (("train=no.jsonl x0",), ("train",), "above 0"),
    (("",), ("train",), "not of the form"),
  ],
)
def test_sources_that_cannot_be_used(sources, splits, says):
  with pytest.raises((ValueError, FileNotFoundError), match=says):
    with_rows(MathQA(), sources, splits=splits)


def test_a_split_without_a_source_is_told_with_the_setting_that_asks_for_it(two):
  with pytest.raises(
    ValueError, match="has nothing for the split 'dev', which config.eval.final_splits asks for"
  ):
    check_sources(two[1:], {"train": "training", "dev": "config.eval.final_splits"})


def test_rows_and_generators_do_not_mix(two):
  with pytest.raises(
    ValueError, match="SimpleNamespace is no environment: it has neither task nor task_from_row"
  ):
    with_rows(types.SimpleNamespace(prompt=None, judge=None), (), splits=("train",))
  with pytest.raises(ValueError, match="TinyCode makes its own tasks"):
    with_rows(TinyCode(level="easy", sandbox=None), two, splits=("train",))
  own = make_env("tests.my_env:ReverseWord", sandbox=None)
  assert with_rows(own, (), splits=("train",)) is own
  with pytest.raises(ValueError, match="on_bad_row='ignore' is unknown"):
    with_rows(MathQA(), two, splits=("train",), on_bad_row="ignore")


def test_a_column_of_hints_is_in_the_data_of_any_task(tmp_path):
  row = {"question": "1 + 1?", "answer": "#### 2"}
  lines = [row | {"hint": "Count."}, row, row | {"hint": ""}, row | {"hint": 3}]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
  env = with_rows(MathQA(), (f"train={path}",), splits=("train",))
  hints = [env.task("train", i).data.get("hint") for i in range(3)]
  assert hints == ["Count.", None, None]
  path.write_text(json.dumps(lines[3]) + "\n")
  with pytest.raises(ValueError, match="line 1: the hint is of type int: '3'"):
    with_rows(MathQA(), (f"train={path}",), splits=("train",))


def test_an_environment_says_what_a_response_does_with_rows_as_without(two):
  class Knows(MathQA):
    def behaviour(self, task, response):
      return task.data["answer"], response.strip()

  env = with_rows(Knows(), two, splits=("train",))
  assert env.behaviour(env.task("train", 3), " 7\n") == (env.task("train", 3).data["answer"], "7")
  # its rewards and feedback then tell
  assert not hasattr(with_rows(MathQA(), two, splits=("train",)), "behaviour")


def test_patterns_of_files(tmp_path):
  for i in range(3):
    write(tmp_path / f"part-{i}.jsonl", numbers(10 * i, 2))
  env = with_rows(MathQA(), (f"train={tmp_path}/part-*.jsonl",), splits=("train",))
  assert answers(env.task("train", i) for i in range(6)) == [0, 1, 10, 11, 20, 21]


def test_parquet(tmp_path):
  missing = "pyarrow is not installed: pip install 'sdpo_jax[hub]'"
  pyarrow = pytest.importorskip("pyarrow", reason=missing)
  parquet = pytest.importorskip("pyarrow.parquet", reason=missing)
  row = {"question": "Which?", "options": ["a", "b", "c"], "answer": "C", "answer_index": 2}
  parquet.write_table(pyarrow.Table.from_pylist([row] * 5), tmp_path / "r.parquet")
  env = with_rows(ENVS["mcq"](), (f"test={tmp_path}/r.parquet",), splits=("test",))
  assert env.size("test") == 5 and env.task("test", 4).data == {"answer": "C", "letters": "ABC"}
  parquet.write_table(
    pyarrow.Table.from_pylist([row, row | {"answer_index": 1}]), tmp_path / "bad.parquet"
  )
  with pytest.raises(ValueError, match="bad.parquet, row 1: field 'answer_index'"):
    with_rows(ENVS["mcq"](), (f"test={tmp_path}/bad.parquet",), splits=("test",))


def test_hub_names(monkeypatch):
  asked = []
  hub = types.SimpleNamespace(
    load_dataset=lambda name, config, split: asked.append((name, config, split)) or numbers(0, 3)
  )
  monkeypatch.setitem(sys.modules, "datasets", hub)
  env = with_rows(
    MathQA(), ("hub:openai/gsm8k:main", "test=hub:me/own::validation x2"), splits=("train", "test")
  )
  assert asked == [
    ("openai/gsm8k", "main", "train"),
    ("openai/gsm8k", "main", "test"),
    ("me/own", None, "validation"),
  ]
  assert env.size("train") == 3 and env.size("test") == 6
  malformed = {"question": "Q", "answer": None}
  monkeypatch.setattr(hub, "load_dataset", lambda name, config, split: [malformed])
  with pytest.raises(ValueError, match="hub:openai/gsm8k:main, row 0: field 'answer' is missing"):
    with_rows(MathQA(), ("hub:openai/gsm8k:main",), splits=("train",))


def test_one_file_of_a_hub_repository(monkeypatch, tmp_path):
  asked = []

  def download(repository, path, repo_type):
    asked.append((repository, path, repo_type))
    return write(tmp_path / "cached.jsonl", numbers(0, 3))

  monkeypatch.setitem(
    sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download)
  )
  env = with_rows(MathQA(), ("hub:me/own/data/rows.jsonl",), splits=("train", "test"))
  assert (
    asked == [("me/own", "data/rows.jsonl", "dataset")] * 2
    and env.size("train") == env.size("test") == 3
  )


def test_rows_outside_the_set_and_questions_that_the_run_cannot_use(tmp_path, caplog):
  path = write(tmp_path / "r.jsonl", numbers(0, 6))
  even = types.SimpleNamespace(
    prompt=None,
    judge=None,
    task_from_row=lambda row, split: (
      None if row["answer"] % 2 else MathQA().task_from_row(row, split)
    ),
  )

  def check(task):
    if task.data["answer"] == "4":
      raise ValueError("the question takes 9 tokens")

  with pytest.raises(ValueError, match="line 5: the question takes 9 tokens .*on_bad_row='skip'"):
    with_rows(even, (f"train={path}",), splits=("train",), check=check)
  env = with_rows(even, (f"train={path}",), splits=("train",), check=check, on_bad_row="skip")
  assert (
    answers(env.task("train", i) for i in range(env.size("train"))) == [0, 2] and env.skipped == 1
  )
  assert caplog.messages == [
    f"1 rows of {path} are left out, the first of them {path}, line 5: the question takes 9 tokens"
  ]


@pytest.mark.parametrize(
  "module, source",
  [
    ("datasets", "hub:openai/gsm8k"),
    ("huggingface_hub", "hub:me/own/rows.jsonl"),
    ("pyarrow.parquet", "train={}/rows.parquet"),
  ],
)
def test_a_missing_extra_is_named(monkeypatch, tmp_path, module, source):
  monkeypatch.setitem(sys.modules, module, None)
  (tmp_path / "rows.parquet").touch()
  source = source.format(tmp_path)
  location, package = source.removeprefix("train="), module.split(".")[0]
  message = rf"{location} needs {package}: pip install 'sdpo_jax\[hub\]'"
  with pytest.raises(ValueError, match=message):
    with_rows(MathQA(), (source,), splits=("train",))
  with pytest.raises(ValueError, match=message):
    check_sources((source,), {"train": "training"})


@pytest.mark.parametrize(
  "config_file, said",
  [
    ("math_qa", "hub:openai/gsm8k:main needs datasets: pip install 'sdpo_jax[hub]'"),
    ("science_mcq", "data/sciknoweval/chemistry.train.jsonl: no such file"),
  ],
)
def test_missing_data_are_told_before_a_model_is_looked_for(
  monkeypatch, tmp_path, capsys, config_file, said
):
  monkeypatch.setitem(sys.modules, "datasets", None)
  monkeypatch.delenv("SDPO_JAX_DATA", raising=False)  # where the rows would be
  root = pathlib.Path(__file__).parent.parent
  monkeypatch.chdir(tmp_path)
  assert (
    main.main(
      [
        "main",
        f"--config={root}/configs/{config_file}.py",
        "--config.model.path=/nowhere/model",
        "--workdir=run",
      ]
    )
    == 2
  )
  assert capsys.readouterr().err.splitlines() == [
    "work directory: run",
    f"sdpo_jax: config.data.sources: {said}",
  ]


# An environment of one's own.


def test_my_env_by_name():
  env = make_env("tests.my_env:ReverseWord", sandbox="not asked for", length=4)
  task = TaskStream(env, "train").take(1)[0]
  assert task == env.task("train", 0) and len(task.solution) == 4
  assert (
    env.judge(task, task.solution).reward == 1.0
    and env.judge(task, task.solution + "x").text == "The word is too long."
  )
  assert (
    env.judge(task, "zzzz").text == "Wrong letters at places [1, 2, 3, 4]."
    and env.judge(task, "").reward == 0.0
  )


@pytest.mark.parametrize(
  "name, settings, says",
  [
    ("mqc", {}, "choose from .*'mcq'"),
    ("no_such_module:Env", {}, "cannot be imported: No module named"),
    ("tests.my_env:NoSuch", {}, "cannot be imported: .*NoSuch"),
    ("os:path", {}, "'os:path' is a module, not a class"),
    (
      "tests.my_env:ReverseWord",
      {"lenght": 3},
      r"config.env.lenght is not a setting of .*choose from \['length'\]",
    ),
    ("mcq", {"level": "easy"}, "config.env.level is not a setting of mcq"),
    ("tinycode", {"sandbox2": 1}, "config.env.sandbox2"),
  ],
)
def test_wrong_names_and_settings_are_told(name, settings, says):
  with pytest.raises(ValueError, match=says):
    make_env(name, sandbox=None, **settings)


def test_every_environment_is_made_from_its_name():
  for name, env in ENVS.items():
    if name == "alfworld" and importlib.util.find_spec("alfworld") is None:
      continue
    if name == "search_qa_rows":  # which asks for its corpus
      continue
    made = make_env(name, sandbox=None)
    assert isinstance(made, env)
    assert callable(made.start) if plays(env) else callable(made.prompt) and callable(made.judge)
    assert hasattr(made, "task") != hasattr(made, "task_from_row") or name == "coding"


# Rows of the benchmarks, through sources.


@needs_data
@pytest.mark.parametrize(
  "name, source, splits, size",
  [
    ("mcq", "sciknoweval/*.{split}.jsonl", ("train", "test"), (3901, 434)),
    ("tool_use", "tooluse/{split}.jsonl", ("test",), (68,)),
    ("math_qa", "gsm8k.{split}.jsonl", ("train", "test"), (1500, 500)),
    ("ifeval", "test=ifeval.jsonl", ("test",), (541,)),
  ],
)
def test_benchmark_files(name, source, splits, size):
  head, given, path = source.rpartition("=")
  env = with_rows(make_env(name, sandbox=None), (f"{head}{given}{_DATA}/{path}",), splits=splits)
  assert tuple(env.size(s) for s in splits) == size and env.skipped == 0
  assert isinstance(env.judge(first_tasks(env, splits[-1], 2)[1], "nothing"), Feedback)


@needs_data
def test_mbpp_rows():
  Rows = types.SimpleNamespace(prompt=None, judge=None, task_from_row=mbpp_task)
  env = RowEnv(Rows, (f"train={_DATA}/mbpp_sanitized.jsonl",), splits=("train",))
  assert env.size("train") == 427 and all(env.task("train", i).data["tests"] for i in range(427))
