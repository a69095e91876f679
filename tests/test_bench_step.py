"""The step benchmark: its batches hold what it says, and a wrong case is named.

The figures are not tested.
"""

import jax
import numpy as np
import pytest

from sdpo_jax.bench import relative, step
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.objectives import build
from sdpo_jax.optimizer import make_optimizer
from sdpo_jax.train_step import init_state


@pytest.mark.parametrize(
  "kind, packs, share",
  [("equal", 1, False), ("equal", 8, True), ("heavy", 4, False), ("heavy", 2, True)],
)
def test_batches_hold_the_lengths_that_were_asked_for(kind, packs, share):
  lengths = step.lengths_of(kind, 32)
  batch = step.make_batch(lengths, 500, packs, share=share)
  assert sorted(batch.weight_BR.sum(1)) == sorted(n for _, _, n in lengths)
  for half, whole in (
    (batch.policy, sum(p + n for p, _, n in lengths)),
    (batch.readings[0].rows, sum(q + n for _, q, n in lengths)),
  ):
    assert (half.prefix_CPT is not None) == share
    used = (half.segment_CPT > 0).sum()
    if share:
      assert used < 0.8 * whole
    else:
      assert used == whole
  for half in (batch.policy, batch.readings[0].rows):
    for b in range(32):
      pack, n = b // (32 // packs), int(batch.weight_BR[b].sum())
      columns = half.at_CX[pack, batch.start_B[b] : batch.start_B[b] + n]
      np.testing.assert_array_equal(
        half.token_CPT[pack].reshape(-1)[columns + 1], batch.response_BR[b, :n]
      )
  if kind == "heavy":
    responses = [n for _, _, n in lengths]
    assert max(responses) == 1000
    assert 40 <= np.median(responses) <= 90


def test_operations_are_those_of_a_step_that_computes_nothing_twice():
  L, D, N, K, H, F, V = 2, 32, 4, 2, 16, 64, 97
  model = ModelConfig(
    family="qwen3",
    qk_norm="head",
    tied=True,
    width=D,
    layers=L,
    heads=N,
    kv_heads=K,
    head_dim=H,
    ff_width=F,
    vocab=V,
  )
  method = build.build_method(build.method_row("sdpo"))
  tx = make_optimizer(**step.OPTIMIZER)
  batch = step.device_batch(model, method, step.lengths_of("equal", 16), 2, "cpu")
  state = jax.eval_shape(
    lambda key: init_state(decoder.init(model, key), tx, keep_teacher=True), jax.random.key(0)
  )
  counted = step.needed_operations(model, method, tx, state, batch)

  C, rows, T = batch.policy.token_CPT.shape
  _, teacher_rows, S = batch.readings[0].rows.token_CPT.shape
  X = batch.policy.at_CX.size
  weights = L * (D * (2 * N + 2 * K) * H + 3 * D * F)
  # the policy's forward and twice as many backward, the teacher's forward
  products = 2 * weights * C * (3 * rows * T + teacher_rows * S) + 2 * D * V * X * 4
  # of attention: one key block of each query block
  blocks = C * L * ((2 + 5) * rows * -(-T // 64) + 2 * teacher_rows * -(-S // 64))
  assert counted == products + blocks * 2 * N * 64 * 64 * H


def test_methods_are_compared_on_the_same_texts(monkeypatch):
  """Each with the readings that it has; sdpo is there whether asked for or not, and 1."""
  sizes = dict(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ff_width=32, vocab=97)
  monkeypatch.setitem(step.SHAPES, "tiny", sizes)
  request = dict(device="cpu", responses=8, micro_batches=1, remat="none", repeats=2)
  methods = ["grpo", "cscr"]
  result = relative.measure(case="tiny:equal", **request, methods=methods)
  lines = relative.rows(result)
  assert [(line["method"], line["readings"]) for line in lines] == [
    ("sdpo", 1),
    ("grpo", 0),
    ("cscr", 2),
  ]
  assert lines[0]["relative"] == lines[0]["relative_cpu"] == 1.0
  assert all(line["relative"] > 0 and line["time_s"] > 0 for line in lines)
  plain, further = step.make_batch(step.lengths_of("equal", 8), 97, 1, further=1).readings
  assert plain.rows.token_CPT.shape == further.rows.token_CPT.shape
  assert not np.array_equal(plain.rows.token_CPT, further.rows.token_CPT)


@pytest.mark.parametrize(
  "wrong", ["--cases=huge:equal", "--cases=tiny:odd", "--micro_batches=5", "--methods=sdop"]
)
def test_a_wrong_case_is_named(wrong, capsys):
  with pytest.raises(SystemExit) as stop:
    step.main([wrong])
  assert stop.value.code == 2
  assert wrong.partition("=")[2].split(":")[0] in capsys.readouterr().err
