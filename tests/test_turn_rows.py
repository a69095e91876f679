"""Rows as turns on a model: the update, the base model's reading, and whole runs."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpo_jax import main, metrics
from sdpo_jax.envs.agents.household import Household
from sdpo_jax.evaluation.fluency import BaseReader
from sdpo_jax.model import decoder
from sdpo_jax.objectives import build
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from tests import fakes
from tests.test_window import packed, played, wander

ROOT = pathlib.Path(__file__).parent.parent
SMALL = dict(layers=1, width=16, heads=2, kv_heads=1)


T, R = 640, 40  # that a row and its turn are padded to


@pytest.fixture(scope="module")
def episodes():
  """One group of two episodes, of four turns each, the second of which begins with invalid ones."""
  _, _, groups = played(wander, history=1, count=1, env=Household(limit=4))
  return groups


@pytest.fixture(scope="module")
def rows(episodes):
  """Arrays of one row for each turn, which holds its prompt and nothing else, by episode."""
  return [[row_of(segment) for segment in rollout.sampled] for rollout in episodes[0]]


def row_of(segment):
  """Returns a turn's row: its tokens [T], the columns that predict what was sampled, and that."""
  prompt, tokens = list(segment.prompt), segment.completion.tokens
  token_T, at_R, target_R = np.zeros(T, int), np.zeros(R, int), np.full(R, -1)
  token_T[: len(prompt + tokens)] = prompt + tokens
  at_R[: len(tokens)] = np.arange(len(tokens)) + len(prompt) - 1
  target_R[: len(tokens)] = tokens
  return token_T, at_R, target_R


def total_logp(params, model, row):
  """The log-probability of a turn, from plain logits."""
  token_T, at_R, target_R = row
  logp_TV = jax.nn.log_softmax(decoder.logits(params, model, token_T[None])[0])
  return jnp.where(target_R >= 0, logp_TV[at_R, target_R], 0).sum()


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_the_gradient_is_that_of_single_turns_with_the_same_advantages(
  episodes, rows, share_prefixes
):
  """By hand: the mean over all tokens of all turns, one row a turn, of -A log pi."""
  model, params = fakes.toy_model(0, **SMALL)
  method = build.build_method(build.method_row("grpo"))
  settings = dict(history=1, turn_penalty=0.1, share_prefixes=share_prefixes)
  _, p = packed(episodes, **settings)
  signals = make_signals(model, method)
  (before,) = jax.jit(signals)(params, None, p.batch)
  batch = p.batch._replace(logp_rollout_BR=before.logp_BR)
  step = jax.jit(make_train_step(signals, method, optax.sgd(1.0)))
  new, _ = step(init_state(params, optax.sgd(1.0)), batch)

  returns = [-0.1 * (not turn.valid) for rollout in episodes[0] for turn in rollout.turns]
  tokens = sum(len(rollout.tokens) for rollout in episodes[0])
  assert len(set(returns)) > 1 and len(returns) == len(sum(rows, [])) == 8
  gradient_of = jax.jit(jax.grad(lambda params, row: total_logp(params, model, row)))
  want = jax.tree.map(jnp.zeros_like, params)
  for value, row in zip(returns, sum(rows, []), strict=True):
    scale = -(value - np.mean(returns)) / tokens
    want = jax.tree.map(lambda x, g: x + scale * g, want, gradient_of(params, row))
  got = jax.tree.map(lambda a, b: a - b, params, new.params)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
  assert largest > 1e-4
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), got, want)


def test_the_base_model_reads_each_turn_after_its_own_prompt(episodes, rows):
  model, params = fakes.toy_model(0, **SMALL)
  read = jax.jit(lambda row: total_logp(params, model, row))
  means = BaseReader(model, params, None).mean_logp(episodes[0])
  for rollout, of_turns, mean in zip(episodes[0], rows, means, strict=True):
    want = sum(float(read(row)) for row in of_turns) / len(rollout.tokens)
    assert mean == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("method", [pytest.param("grpo", marks=pytest.mark.slow), "sdpo_turns"])
def test_a_run_trains_turns(method, tmp_path):
  settings = f"local,rows=turns,method={method}"
  command = ["main", f"--config={ROOT}/configs/agentic.py:{settings}", f"--workdir={tmp_path}"]
  assert main.main([*command, "--config.rollout.history=1"]) == 0
  lines = metrics.read(tmp_path)
  assert [line["step"] for line in lines] == [0, 1, 2]
  for line in lines[1:]:
    assert np.isfinite(line["train/loss"]) and line["env/lost_episodes"] == 0
    assert line["rollout/turns"] > 1 and line["train/rollout_gap"] < 1e-3
  rows = (tmp_path / "rollouts" / "step_000002.jsonl").read_text().splitlines()
  assert rows and all(json.loads(row)["status"] != "env_failed" for row in rows)
