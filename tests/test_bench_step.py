"""The step benchmark: its batches hold what it says, and a wrong case is named. The figures are not tested."""

import numpy as np
import pytest

from sdpo_jax.bench import step


@pytest.mark.parametrize("kind, packs, share", [("equal", 1, False), ("equal", 8, True), ("heavy", 4, False), ("heavy", 2, True)])
def test_batches_hold_the_lengths_that_were_asked_for(kind, packs, share):
  lengths = step.lengths_of(kind, 32)
  batch = step.make_batch(lengths, 500, packs, share=share)
  assert sorted(batch.weight_BR.sum(1)) == sorted(n for _, _, n in lengths)
  for half, whole in ((batch.student, sum(p + n for p, _, n in lengths)), (batch.teacher, sum(q + n for _, q, n in lengths))):
    assert (half.prefix_CPT is not None) == share
    assert (half.segment_CPT > 0).sum() < 0.8 * whole if share else (half.segment_CPT > 0).sum() == whole
  for half in (batch.student, batch.teacher):
    for b in range(32):
      pack, n = b // (32 // packs), int(batch.weight_BR[b].sum())
      columns = half.at_CX[pack, batch.start_B[b]:batch.start_B[b] + n]
      np.testing.assert_array_equal(half.token_CPT[pack].reshape(-1)[columns + 1], batch.response_BR[b, :n])
  if kind == "heavy":
    assert max(n for _, _, n in lengths) == 1000 and 40 <= np.median([n for _, _, n in lengths]) <= 90


@pytest.mark.parametrize("wrong", ["--cases=huge:equal", "--cases=tiny:odd", "--micro_batches=5"])
def test_a_wrong_case_is_named(wrong, capsys):
  with pytest.raises(SystemExit) as stop:
    step.main([wrong])
  assert stop.value.code == 2 and wrong.partition("=")[2].split(":")[0] in capsys.readouterr().err
