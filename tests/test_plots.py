"""Figures: what they draw, by hand."""

import dataclasses

from matplotlib.figure import Figure
import numpy as np
import pytest

from sdpo_jax import plots, report
from sdpo_jax.transcripts import SpokenTurn


@pytest.fixture
def axes():
  return Figure(figsize=(3.3, 2.2)).add_subplot()


def is_labelled(axes):
  return bool(axes.get_xlabel() and axes.get_ylabel())


def test_tokens_are_bars_with_their_text_below(axes):
  plots.draw_tokens(axes, [" a", "\n$x$", ""], [1.5, -2.0, 0.0], "gap, nats")
  bars = axes.patches
  assert [bar.get_height() for bar in bars] == [1.5, -2.0, 0.0]
  blue, orange = bars[0].get_facecolor(), bars[1].get_facecolor()
  assert blue != orange and is_labelled(axes)
  assert [label.get_text() for label in axes.get_xticklabels()] == ["·a", "↵$x$", "∅"]
  axes.figure.canvas.draw()  # no mathematics in a token
  with pytest.raises(AssertionError, match="1 tokens and 2 values"):
    plots.draw_tokens(axes, ["a"], [1.0, 2.0], "nats")


def test_concentration_is_the_share_of_the_strongest_tokens(axes):
  plots.draw_concentration(axes, [0.0, -3.0, 1.0, 0.0], "x")
  line = axes.lines[0]
  np.testing.assert_allclose(line.get_xdata(), [0, 25, 50, 75, 100])
  np.testing.assert_allclose(line.get_ydata(), [0, 75, 100, 100, 100])
  assert is_labelled(axes) and line.get_label() == "x"


def test_no_disagreement_draws_the_even_spread_alone(axes):
  plots.draw_concentration(axes, [0.0, 0.0])
  assert len(axes.lines) == 1


@dataclasses.dataclass
class Episode:
  turns: list


def test_surprise_is_the_mean_over_tokens_of_episodes_that_go_on(axes):
  turn = lambda *logp: SpokenTurn("", [""] * len(logp), list(logp), "", 0.0, True)
  plots.draw_surprise(axes, [Episode([turn(-1.0, -2.0), turn(-4.0)]), Episode([turn(-3.0)])], "x")
  assert axes.lines[0].get_xdata().tolist() == [1, 2]
  np.testing.assert_allclose(axes.lines[0].get_ydata(), [2.0, 4.0])
  assert is_labelled(axes)


def test_the_style_is_one_that_matplotlib_knows():
  import matplotlib

  with matplotlib.rc_context(plots.PAPER):
    colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
  assert colours == list(report.COLOURS)
