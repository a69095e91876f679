"""How a run ends: when it stops itself, which checkpoint is best, and what it says of both."""

import json

import pytest

from sdpo_jax import config, ending, workdir

FRESH = {"best": None, "worse": 0}
SCORE = "eval/heldout/avg@k"


def settings(**changes):
  c = config.base()
  c.total_steps = 9
  c.train.stop_when_worse = 2
  c.update(changes)
  return c


def noted(values, c=None, has_checkpoint=lambda i: True):
  """What is noted after steps 0, 1, ... with these metrics."""
  host, c = dict(FRESH), c or settings()
  for i, metrics in enumerate(values):
    ending.note(c, host, i, metrics, has_checkpoint=has_checkpoint(i))
  return host


def test_the_best_checkpoint_is_the_first_with_the_highest_value():
  scores = [{SCORE: value} for value in (0.9, 0.8, 0.3, 0.9, 0.5, None, 0.5, 0.9)]
  found = [noted(scores[: n + 1], has_checkpoint=lambda i: i % 2 == 0)["best"] for n in range(8)]
  # step 0 has no checkpoint, and neither have odd steps
  assert [best and best[0] for best in found] == [None, None, 2, 2, 4, 4, 4, 4]
  assert found[-1] == [4, 0.5, SCORE]


def test_what_is_best_may_be_any_metric_or_none():
  values = [{}, {SCORE: 0.5, "train/reward": 0.1}, {SCORE: 0.4, "train/reward": 0.2}]
  by_reward = settings(checkpoint=dict(best="train/reward"))
  assert noted(values, by_reward)["best"] == [2, 0.2, "train/reward"]
  assert noted(values, settings(checkpoint=dict(best="")))["best"] is None
  # values of two metrics cannot be compared, nor does an older checkpoint tell which it was
  for earlier in ([1, 0.9, SCORE], [1, 0.9]):
    host = FRESH | {"best": earlier}
    ending.note(by_reward, host, 2, values[2], has_checkpoint=True)
    assert host["best"] == [2, 0.2, "train/reward"]


def evaluation(low, high):
  bounds = {} if low is None else {"eval/heldout/gain_low": low, "eval/heldout/gain_high": high}
  return {SCORE: 0.3, "eval/heldout/gain": -0.1} | bounds


WORSE, UNSURE, FEW = evaluation(-0.2, -0.01), evaluation(-0.2, 0.01), evaluation(None, None)


@pytest.mark.parametrize(
  "values, worse",
  [
    ([WORSE, WORSE], 2),
    ([WORSE, {}, {"train/loss": 1.0}, WORSE], 2),  # steps between two evaluations
    ([WORSE, UNSURE, WORSE], 1),
    ([WORSE, WORSE, FEW], 0),
    ([WORSE | {"eval/heldout/gain_high": 0.0}], 0),
    ([{"eval/unseen/gain": -0.5, "eval/unseen/gain_high": -0.4}], 0),
  ],
)
def test_evaluations_below_the_base_model_are_counted_in_a_row(values, worse):
  host = noted([{}, *values])
  assert host["worse"] == worse and ending.has_stopped(settings(), host) == (worse >= 2)
  assert not ending.has_stopped(config.base(), host)  # off


@pytest.mark.parametrize(
  "changes, says",
  [
    ({"checkpoint": {"best": "reward"}}, "config.checkpoint.best='reward' must be auto"),
    ({"checkpoint": {"best": "eval/heldout/avg@4"}}, "did you mean 'eval/heldout/avg@k'"),
    ({"checkpoint": {"best": "eval/test/avg@k"}}, "'eval/test/avg@k' is unknown"),
    ({"eval": {"splits": ("held",)}}, "config.train.stop_when_worse=2 compares the first of"),
    ({"eval": {"splits": ()}}, "config.train.stop_when_worse=2 compares the first of"),
    ({"train": {"stop_when_worse": -1}}, "config.train.stop_when_worse=-1 must be at least 0"),
  ],
)
def test_what_is_never_measured_is_refused(changes, says):
  config.validate(settings())
  with pytest.raises(ValueError, match=says.replace("(", r"\(")):
    config.validate(settings(**changes))


def lines_of(tmp_path, host, step, scores):
  """The closing lines of a run whose evaluations were (value, low, high) at these steps."""
  (tmp_path / "run.json").write_text(json.dumps({"seed": 0}))
  c = settings()
  ending.note_in_run_file(tmp_path, c, step, host)
  history = [
    {"step": i, SCORE: value, SCORE + "_low": low, SCORE + "_high": high}
    for i, (value, low, high) in scores.items()
  ]
  return ending.closing_lines(tmp_path, c, history)


def test_a_run_that_stopped_says_why_and_which_checkpoint_is_left(tmp_path):
  host = FRESH | {"best": [2, 0.57, SCORE], "worse": 2}
  scores = {0: (0.4, 0.3, 0.5), 2: (0.57, 0.5, 0.6), 6: (0.23, 0.15, 0.31)}
  stopped, best, note = lines_of(tmp_path, host, 6, scores)
  assert stopped.split() == ["note", *ending.why_stopped(settings(), 6).split()]
  assert "stopped at step 6 of 9" in stopped and "at 2 evaluations in a row" in stopped
  assert best.startswith(
    f"        best  step 2: {SCORE} 0.570; --mode=eval --checkpoint={tmp_path}:2"
  )
  assert f"python -m sdpo_jax.export --workdir={tmp_path} --step=2 --out=DIR" in best
  assert note.endswith("step 6, is below it beyond both intervals: 0.230 [0.150, 0.310]")
  about = json.loads((tmp_path / "run.json").read_text())
  assert about["seed"] == 0 and about["ended"] == {
    "step": 6,
    "stopped": True,
    "best": {"step": 2, "value": 0.57, "metric": SCORE},
  }


def test_a_run_that_came_to_its_end_says_less(tmp_path):
  best = FRESH | {"best": [9, 0.5, SCORE], "worse": 2}  # worse at the last step is no stop
  (line,) = lines_of(tmp_path, best, 9, {0: (0.4, 0.3, 0.5), 9: (0.5, 0.4, 0.6)})
  assert line == f"        best  the last checkpoint, step 9: {SCORE} 0.500"
  # within the last one's interval, and not above the base model
  best["best"] = [4, 0.55, SCORE]
  _, note = lines_of(tmp_path, best, 9, {0: (0.55, 0.4, 0.7), 9: (0.5, 0.4, 0.6)})
  assert note == "        note  no checkpoint is better than the base model: 0.550"
  assert lines_of(tmp_path, dict(FRESH), 9, {}) == []
  assert ending.closing_lines(tmp_path / "older", settings(), []) == []


def test_when_a_run_stops_and_what_is_best_may_change_while_it_goes_on(tmp_path):
  before = config.base()
  workdir.write_atomically(tmp_path / "config.json", json.dumps(before.to_dict()))
  defaults = config.defaults_of(before)
  changed = settings(total_steps=before.total_steps, checkpoint=dict(best=""))
  workdir.check_same_run(tmp_path, changed, begun=True, defaults=defaults)
