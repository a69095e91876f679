"""Evaluation: figures from lines, suites, and files that go on exactly or refuse to."""

import json
import math
import pathlib
import zlib

import numpy as np
import pytest

from sdpo_jax import config, main
from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import RunError, SettingError
from sdpo_jax.evaluation import evaluate, scores
from sdpo_jax.evaluation.files import EvalFiles
from sdpo_jax.evaluation.scores import headline, summarise
from sdpo_jax.evaluation.suites import Suite, read_suites
from sdpo_jax.records import Completion, Feedback, Sampling, Task
from sdpo_jax.rollout import Collector
from tests import fakes

ROOT = pathlib.Path(__file__).parent.parent


def response(reward, *, length=4, mean_logp=-0.5, status="scored", finish="stop", **answer):
  return {
    "reward": reward,
    "status": status,
    "length": length,
    "finish_reason": finish,
    "mean_logp": mean_logp,
  } | answer


def line(*responses, kind=None, difficulty=None):
  return {"kind": kind, "difficulty": difficulty, "responses": list(responses)}


# ---- figures -------------------------------------------------------------------------------------

LINES = [
  line(*[response(1.0)] + [response(0.0, length=8, mean_logp=-1.0)] * 3, kind="law", difficulty=2),
  line(*[response(1.0)] * 2 + [response(0.5)] * 2, kind="law", difficulty=10),
  line(*[response(0.0, length=100, finish="length", mean_logp=-2.0)] * 4, kind="art"),
]


def test_figures_worked_by_hand():
  m = summarise("eval/test", LINES, has_entropy=True)
  assert m["eval/test/avg@k"] == pytest.approx((1 / 4 + 3 / 4 + 0) / 3)
  assert m["eval/test/pass@k"] == 2 / 3
  assert m["eval/test/pass@1"] == pytest.approx((1 / 4 + 2 / 4) / 3)
  # one of two drawn without replacement: 1 - 3/4 * 2/3, and 1 - 2/4 * 1/3
  assert m["eval/test/pass@2"] == pytest.approx((1 / 2 + 5 / 6) / 3)
  assert m["eval/test/pass@4"] == 2 / 3 and "eval/test/pass@8" not in m
  assert m["eval/test/pass@2_low"] < m["eval/test/pass@2"] < m["eval/test/pass@2_high"]
  tokens = 4 + 3 * 8 + 4 * 4 + 4 * 100
  nats = 4 * 0.5 + 3 * 8 * 1.0 + 4 * 4 * 0.5 + 4 * 100 * 2.0
  assert m["eval/test/entropy"] == pytest.approx(nats / tokens)
  lengths = [4, 8, 8, 8] + [4] * 4 + [100] * 4
  assert m["eval/test/length_mean"] == tokens / 12 and m["eval/test/cut_off"] == 4 / 12
  for share, name in ((50, "p50"), (90, "p90"), (99, "p99")):
    assert m[f"eval/test/length_{name}"] == np.percentile(lengths, share)
  assert m["eval/test/kind/law/avg@k"] == 0.5 and m["eval/test/kind/law/questions"] == 2
  assert m["eval/test/kind/art/pass@k"] == 0 and m["eval/test/difficulty/10/avg@k"] == 0.75
  groups = [key for key in m if "/difficulty/" in key and key.endswith("questions")]
  assert groups == [f"eval/test/difficulty/{value}/questions" for value in (2, 10)]


def test_entropy_is_left_out_where_tokens_were_sampled_otherwise():
  with_it = summarise("x", LINES, has_entropy=True)
  assert summarise("x", LINES, has_entropy=False) == {
    key: value for key, value in with_it.items() if key != "x/entropy"
  }


def test_responses_without_a_verdict_are_counted_and_count_for_nothing_else():
  failed = response(0.0, status="env_failed", length=50)
  m = summarise("x", [line(response(1.0), failed), line(failed, failed)], has_entropy=False)
  assert (m["x/env_failed"], m["x/avg@k"], m["x/pass@1"]) == (3.0, 1.0, 1.0)
  assert "x/pass@2" not in m and m["x/length_mean"] == (4 + 3 * 50) / 4
  assert headline("x", [line(failed)]) == {"x/env_failed": 1.0}
  assert "x/env_failed" not in headline("x", [line(response(0.0))])


def test_answers_of_the_wrong_form_and_timeouts_are_counted():
  lines = [line(response(1.0, answer="A"), response(0.0, answer=None, status="timeout"))]
  m = summarise("x", lines, has_entropy=False)
  assert (m["x/format_failed"], m["x/timeouts"]) == (1.0, 1.0)
  assert "x/format_failed" not in summarise("x", LINES, has_entropy=False)


def test_the_majority_votes_where_answers_are_extracted():
  def vote(answer):
    return response(float(answer == "A"), answer=answer)

  lines = [line(*map(vote, "AAB")), line(*map(vote, "BBA"))]
  m = summarise("x", lines, has_entropy=False)
  # of two of the three: AA wins, AB and BA tie, BB loses
  assert m["x/maj@2"] == pytest.approx(((1 + 2 / 2) / 3 + (2 / 2) / 3) / 2)
  assert "x/maj@4" not in m and m["x/maj@2_low"] is not None
  assert not any("/maj@" in key for key in summarise("x", LINES, has_entropy=False))


# ---- suites --------------------------------------------------------------------------------------


def settings(**changes):
  _, c = main.parse(["main", f"--config={ROOT}/configs/tinycode.py:local"])
  c.eval.update(questions=10, samples=2, **changes)
  c.rollout.rows = 6
  return c


def suites_of(tmp_path, text, c=None):
  (tmp_path / "suites.py").write_text(f"def get_suites(arg='none'):\n  return {text}\n")
  return read_suites(f"{tmp_path}/suites.py", c or settings())


def test_a_suite_changes_what_it_names_and_keeps_the_rest(tmp_path):
  first, second = suites_of(
    tmp_path,
    {
      "hard": {"env": {"name": "arithmetic", "level": "hard"}, "samples": 3, "greedy": True},
      "rows": {
        "env": {"name": "mcq"},
        "data": {"sources": ["test=rows.jsonl"]},
        "rollout": {"max_new_tokens": 7},
        "splits": ["test"],
        "temperature": 0,
      },
    },
  )
  assert first.c.env.to_dict() == {"name": "arithmetic", "level": "hard", "words_seed": 0}
  assert [(p.name, p.decoding, p.samples, p.metric) for p in first.parts()] == [
    ("hard.heldout", "sampled", 3, "eval/hard.heldout"),
    ("hard.heldout", "greedy", 1, "eval/hard.heldout.greedy"),
  ]
  assert second.c.rollout.max_new_tokens == 7 and second.c.rollout.rows == 6
  assert tuple(second.c.data.sources) == ("test=rows.jsonl",)
  assert second.splits == {"test": "suite rows"}
  (part,) = second.parts()
  assert (part.decoding, part.samples, part.metric) == ("greedy", 2, "eval/rows.test")
  (own,) = read_suites(None, settings())
  assert [(p.file, p.metric) for p in own.parts()] == [
    ("config.heldout.sampled.jsonl", "eval/heldout")
  ]


@pytest.mark.parametrize("temperature, top_p, has_entropy", [(1, 1, True), (1, 0.9, False)])
def test_entropy_needs_the_policys_own_distribution(temperature, top_p, has_entropy):
  c = settings(temperature=float(temperature), top_p=float(top_p), greedy=True)
  assert [part.has_entropy for part in Suite("", c).parts()] == [has_entropy, False]


@pytest.mark.parametrize(
  "text, says",
  [
    ("{}", "get_suites() returns {}, not suites"),
    ("{'a/b': {}}", "suite 'a/b': a name has letters"),
    ("{'config': {}}", "suite 'config': a name has"),
    ("{'a': {'split': 1}}", "suite 'a': 'split' is unknown; did you mean 'splits'; choose"),
    ("{'a': {'env': {'name': 'tinycod'}}}", "suite 'a': config.env.name='tinycod' is unknown"),
    ("{'a': {'samples': 0}}", "suite 'a': config.eval.samples=0 must be at least 1"),
    ("{'a': {'samples': 'x'}}", "suite 'a': "),
    ("{'a': {'splits': ()}}", "suite 'a': its splits are empty"),
    ("{'a': {'rollout': {'row': 1}}}", "config.rollout.row is not a setting; did you mean"),
    ("missing", "suites.py, line 2: NameError"),
  ],
)
def test_a_wrong_suite_is_one_line(tmp_path, text, says):
  with pytest.raises(ValueError) as error:
    suites_of(tmp_path, text)
  assert says in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_another_kind_is_named():
  with pytest.raises(ValueError, match=r"no get_suites\(\); settings of a run are for --config"):
    read_suites(f"{ROOT}/configs/tinycode.py", settings())
  with pytest.raises(ValueError, match=r"no get_config\(\); suites of questions are for --suites"):
    config.load(f"{ROOT}/configs/eval/tinycode.py")


@pytest.mark.parametrize("arg", ["", ":judge=m,data=/d,questions=5"])
def test_the_suites_of_the_package_are_valid(arg):
  suites = read_suites(f"{ROOT}/configs/eval/forgetting.py{arg}", settings())
  assert [s.name for s in suites] == ["ifeval", "mmlu_pro", "chat"][: 3 if arg else 2]
  if arg:
    assert suites[2].c.env.model == "m" and suites[0].c.data.sources == ("test=/d/ifeval.jsonl",)
  (tinycode,) = read_suites(f"{ROOT}/configs/eval/tinycode.py", settings())
  parts = list(tinycode.parts())
  assert len(parts) == 6 and parts[0].samples == 16 and parts[0].has_entropy


# ---- going on ------------------------------------------------------------------------------------


class Env(fakes.ListEnv):
  """Has kinds and difficulties, extracts answers, and may have other questions."""

  def __init__(self, answers, words=""):
    super().__init__(answers)
    self.words = words

  def task(self, split, index):
    data = {"kind": "odd" if index % 2 else "even", "difficulty": index // 4}
    return Task(f"{split}/{index}", f"question {index}{self.words}", split=split, data=data)

  def answer(self, task, text):
    return text if text in "01" else None


class RoundingEngine(fakes.ScriptedEngine):
  """Answers by the seed; log-probabilities depend, like rounding, on all that shares the batch."""

  def __init__(self, calls=math.inf):
    self.calls = calls

  def generate(self, requests):
    if self.calls <= 0:
      raise KeyboardInterrupt
    self.calls -= 1
    shared = zlib.crc32(repr([(r.prompt, r.n) for r in requests]).encode()) / 2**40
    for key, _, n, sampling, seed in requests:
      for s in range(n):
        text = str(zlib.crc32(f"{seed}/{s}/{sampling.temperature}".encode()) % 3)
        tokens = [*text.encode() * (1 + seed % 2), 257]
        logp = [-(seed % 7) / 3 - shared] * len(tokens)
        yield Completion(key, s, tokens, logp, "stop")


def collector_of(engine, answers=None, words=""):
  env = Env({"1": Feedback(1.0, "")} if answers is None else answers, words)
  chat = Chat(fakes.ByteTokenizer())
  return Collector(env, chat, engine, max_prompt_tokens=99, judge_threads=2, judge_timeout_s=9.0)


def finish(directory, engine, c=None, **env):
  """Does what --mode=eval does once a model is loaded; returns the metrics."""
  suite = Suite("", c or settings(greedy=True, temperature=1.0, top_p=1.0))
  files, collector = EvalFiles(directory), collector_of(engine, **env)
  files.check_settings(suite)
  files.check_weights({"x": 1})
  try:
    for part in suite.parts():
      evaluate._finish(part, suite, collector, None, files)
  finally:
    collector.close()
  return files.metrics(suite.parts())


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  directory = tmp_path_factory.mktemp("whole")
  return directory, finish(directory, RoundingEngine())


def test_a_line_has_what_was_sampled(whole):
  lines = EvalFiles(whole[0]).lines(next(Suite("", settings()).parts()))
  assert [one["question"] for one in lines] == list(range(10))
  assert lines[5]["id"] == "heldout/5"
  assert (lines[5]["kind"], lines[5]["difficulty"]) == ("odd", 1)
  (first, _) = lines[5]["responses"]
  assert first["reward"] == float(first["answer"] == "1")
  assert first["length"] in (2, 3) and first["mean_logp"] <= 0


@pytest.mark.parametrize("calls", range(6))
def test_a_stopped_evaluation_ends_with_the_same_files(whole, tmp_path, calls):
  """Four batches of sampled responses and two greedy ones: 10 questions, 3 or 6 a batch."""
  with pytest.raises(KeyboardInterrupt):
    finish(tmp_path, RoundingEngine(calls))
  assert finish(tmp_path, RoundingEngine(6 - calls)) == whole[1]  # asks for no batch again
  assert contents(tmp_path) == contents(whole[0])


@pytest.mark.parametrize("share", np.linspace(0, 0.99, 12))
def test_a_file_that_a_kill_cut_anywhere_is_completed(whole, tmp_path, share):
  for name, data in contents(whole[0]).items():
    is_cut = name.endswith("sampled.jsonl")
    (tmp_path / name).write_bytes(data[: int(share * len(data))] if is_cut else data)
  assert finish(tmp_path, RoundingEngine()) == whole[1]
  assert contents(tmp_path) == contents(whole[0])


def test_figures_can_be_computed_from_the_files_alone(whole):
  """By other means than summarise, from what json reads."""
  directory, metrics = whole
  lines = [json.loads(text) for text in open(directory / "config.heldout.sampled.jsonl")]
  rewards = np.array([[r["reward"] for r in one["responses"]] for one in lines])
  assert metrics["eval/heldout/avg@k"] == pytest.approx(rewards.mean(), abs=1e-12)
  assert metrics["eval/heldout/pass@2"] == pytest.approx(rewards.any(1).mean(), abs=1e-12)
  responses = [r for one in lines for r in one["responses"]]
  length = np.array([r["length"] for r in responses])
  logp = np.array([r["mean_logp"] for r in responses])
  assert metrics["eval/heldout/entropy"] == pytest.approx(-(length * logp).sum() / length.sum())
  odd = [one["question"] % 2 == 1 for one in lines]
  assert metrics["eval/heldout/kind/odd/avg@k"] == pytest.approx(rewards[odd].mean(), abs=1e-12)
  assert metrics["eval/heldout/format_failed"] == sum(r["answer"] is None for r in responses) > 0
  assert "eval/heldout.greedy/avg@k" in metrics and "eval/heldout.greedy/entropy" not in metrics


def test_training_computes_its_headline_from_the_same_lines(whole):
  collector = collector_of(RoundingEngine())
  sampling = Sampling(24, temperature=1.0, stop_tokens=(257,))
  try:
    kept = {}
    metrics = evaluate.evaluate(
      collector,
      None,
      settings().eval,
      splits=("heldout",),
      sampling=sampling,
      keep=kept.__setitem__,
    )
  finally:
    collector.close()
  assert metrics == {key: whole[1][key] for key in metrics}
  names = ("avg@k", "avg@k_low", "avg@k_high", "pass@k")
  assert metrics.keys() == {f"eval/heldout/{name}" for name in names}
  means = scores.mean_rewards(kept["heldout"])
  assert len(means) == 10
  assert np.mean(means) == pytest.approx(metrics["eval/heldout/avg@k"], abs=1e-12)


@pytest.mark.parametrize(
  "change, says",
  [
    ({"eval.samples": 4}, "config.eval.samples=4, but .* was begun with 2: choose another"),
    ({"eval.temperature": 0.5}, "config.eval.temperature=0.5, but .* was begun with 1.0"),
    ({"env.level": "hard"}, "config.env.level='hard', but .* was begun with 'default'"),
    ({"rollout.rows": 8}, "config.rollout.rows=8, but .* was begun with 6"),
    ({"model.lora.rank": 2}, "config.model.lora={'alpha': 32.0, 'rank': 2, .* was begun with"),
  ],
)
def test_other_settings_are_refused(whole, change, says):
  c = settings(greedy=True, temperature=1.0, top_p=1.0)
  c.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=says) as error:
    finish(whole[0], RoundingEngine(0), c)
  assert "\n" not in str(error.value)


def test_what_changes_no_line_may_change(whole):
  c = settings(greedy=False, temperature=1.0, top_p=1.0)
  c.total_steps, c.eval.every_steps, c.rollout.judge_threads = 9, 7, 1
  metrics = finish(whole[0], RoundingEngine(0), c)
  assert metrics == {key: value for key, value in whole[1].items() if ".greedy" not in key}


def test_other_weights_and_other_questions_are_refused(whole):
  with pytest.raises(ValueError, match="the weights are not those that .* was begun with"):
    EvalFiles(whole[0]).check_weights({"x": 2})
  with pytest.raises(SettingError, match="the questions of config.heldout are not those that"):
    finish(whole[0], RoundingEngine(0), words="?")


def test_a_setting_younger_than_the_files_was_at_its_default(whole, tmp_path):
  for name, data in contents(whole[0]).items():
    (tmp_path / name).write_bytes(data)
  stored = json.loads((tmp_path / "settings.json").read_text())
  del stored["suites"][""]["config.env.words_seed"]
  (tmp_path / "settings.json").write_text(json.dumps(stored))
  c = settings(greedy=True, temperature=1.0, top_p=1.0)
  assert finish(tmp_path, RoundingEngine(0), c) == whole[1]
  c.env.words_seed = 1
  with pytest.raises(ValueError, match="config.env.words_seed=1, but .* was begun with 0"):
    finish(tmp_path, RoundingEngine(0), c)


def test_nothing_is_begun_before_the_first_line(tmp_path):
  directory = tmp_path / "eval"
  with pytest.raises(KeyboardInterrupt):
    finish(directory, RoundingEngine(0))
  assert not directory.exists()
  finish(directory, RoundingEngine(), settings(temperature=0.5))  # other settings, then


def test_a_batch_without_a_verdict_stops_and_is_not_written(whole, tmp_path):
  broken = {str(i): fakes.FAILED for i in range(3)} | {str(i) * 2: fakes.FAILED for i in range(3)}
  with pytest.raises(RunError, match="none of 6 responses to 3 questions could be judged") as error:
    finish(tmp_path, RoundingEngine(), answers=broken)
  assert "the same command goes on" in str(error.value)
  assert finish(tmp_path, RoundingEngine()) == whole[1]
  one = settings()
  one.eval.questions = 1  # its fault, perhaps
  metrics = finish(tmp_path / "one", RoundingEngine(), one, answers=broken)
  assert metrics["eval/heldout/env_failed"] == 2.0 and "eval/heldout/avg@k" not in metrics


def test_the_gain_over_the_base_model_is_paired_by_question():
  base, now = [0.0, 0.5, 1.0, None, 0.5], [0.5, 0.5, 1.0, 1.0, None]
  gained = scores.gain("eval/x", now, base)
  assert gained["eval/x/gain"] == pytest.approx(0.5 / 3)  # of the three with both verdicts
  # forty questions that spread widely, each a little worse
  spread = np.linspace(0.1, 1.0, 40)
  worse = spread - np.where(np.arange(40) % 2, 0.02, 0.06)
  gained = scores.gain("eval/x", list(worse), list(spread))
  assert gained["eval/x/gain_low"] < -0.04 < gained["eval/x/gain_high"] < -0.03


def test_a_difference_that_few_questions_cannot_tell_has_no_bounds():
  assert scores.gain("x", [None], [1.0]) == {}
  assert scores.gain("x", [0.0], [1.0]) == {"x/gain": -1.0}
  # three that all fell could be chance, eight could not; none that moved is no difference
  assert scores.gain("x", [0.0] * 3, [1.0] * 3) == {"x/gain": -1.0}
  assert scores.gain("x", [0.0] * 8, [1.0] * 8)["x/gain_high"] == -1.0
  assert scores.gain("x", [1.0] * 8, [1.0] * 8) == {"x/gain": 0.0}
