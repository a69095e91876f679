"""The rollout benchmark asks for what it says. The figures are not tested."""

import pytest

from sdpo_jax.bench import child, rollout


@pytest.mark.parametrize(
  "mix, count, tokens",
  [("equal", 32, 4096), ("heavy", 4, 106), ("group", 8, 16), ("queue", 256, 6784)],
)
def test_mixes_hold_what_is_asked_for(mix, count, tokens):
  requests = rollout.requests_of(mix, [1, 5, 40, 60], vocab=99)
  assert sum(request.n for request in requests) == count
  assert sum(request.n * request.sampling.max_new_tokens for request in requests) == tokens
  assert {len(request.prompt) for request in requests} == {1000 if mix == "group" else 128}


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--mixes=even", "'even' must be one of equal"),
    ("--lengths=nowhere.json", "nowhere.json"),
    ("--rows=0", "--rows=0 must be at least 1"),
  ],
)
def test_a_wrong_argument_is_named(argument, words, capsys):
  with pytest.raises(SystemExit) as end:
    rollout.main([argument])
  assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("text, words", [("[]", "no lengths"), ("[3, 0]", "below 1"), ("{}", "")])
def test_lengths_that_cannot_be_are_named(tmp_path, text, words, capsys):
  (tmp_path / "lengths.json").write_text(text)
  with pytest.raises(SystemExit) as end:
    rollout.main([f"--lengths={tmp_path / 'lengths.json'}"])
  error = capsys.readouterr().err
  assert end.value.code == 2 and "lengths.json" in error and words in error


def test_the_table_tells_of_a_measurement_that_failed():
  results = [{"mix": "equal", "error": "exit 1: no memory"}, {"mix": "heavy", "cpu_s": 2.0}]
  text = child.table(rollout.COLUMNS, results, error_in="tokens")
  assert "| equal | exit 1: no memory |" in text and "| heavy |  | 2 |" in text
