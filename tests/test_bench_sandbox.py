"""The sandbox benchmark refuses nonsense. The figures are not tested."""

import pytest

from sdpo_jax.bench import sandbox


@pytest.mark.parametrize(
  "wrong, least", [("--workers=0", 1), ("--programs=1", 2), ("--repeats=0", 1)]
)
def test_a_wrong_count_is_named(wrong, least, capsys):
  with pytest.raises(SystemExit) as stop:
    sandbox.main([wrong])
  assert stop.value.code == 2 and f"{wrong} must be at least {least}" in capsys.readouterr().err
