"""Figures for notebooks and papers: a style, and what is drawn of single responses.

Curves of runs are `report.draw_curves`, and the figures of a diagnosis are in `diagnose/page.py`.
All of them draw into an Axes that the caller has made, with the colours of the report.
"""

from cycler import cycler
import numpy as np

from sdpo_jax.report import COLOURS
from sdpo_jax.transcripts import Transcript

# For plt.rcParams.update: a figure 6.8 inches wide fills a page, one of 3.3 inches a column.
PAPER = {
  "figure.dpi": 150,
  "figure.constrained_layout.use": True,
  "savefig.bbox": "tight",
  "font.size": 8,
  "axes.titlesize": 8,
  "axes.labelsize": 8,
  "legend.fontsize": 7,
  "xtick.labelsize": 7,
  "ytick.labelsize": 7,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.prop_cycle": cycler(color=COLOURS),
  "pdf.fonttype": 42,  # letters that can be searched and edited
}
BETTER, WORSE = COLOURS[0], COLOURS[1]  # of a gap: the teacher likes a token more, or less
_SIGNS = {"\n": "↵", "\t": "⇥", " ": "·"}


def printed(token: str) -> str:
  """Returns a token with signs for its blanks and line ends, and one for no text at all."""
  return "".join(_SIGNS.get(c, c) for c in token) or "∅"


def draw_tokens(plot, tokens: list[str], values: list[float], unit: str) -> None:
  """Draws a number of each token of a response as a bar, with the tokens along the x axis.

  unit: what the numbers are, at the y axis. Bars below 0 have a colour of their own.
  """
  assert len(tokens) == len(values), f"{len(tokens)} tokens and {len(values)} values"
  colours = [BETTER if value > 0 else WORSE for value in values]
  plot.bar(range(len(values)), values, color=colours, width=0.8)
  plot.axhline(0.0, color="black", linewidth=0.6)
  labels = [printed(token) for token in tokens]
  plot.set_xticks(range(len(values)), labels, rotation=90, family="monospace", parse_math=False)
  plot.set(xlabel="token", ylabel=unit, xlim=(-0.6, len(values) - 0.4))


def draw_concentration(plot, gaps: list[float], label: str = "") -> None:
  """Draws which share of the disagreement lies in which share of the tokens, the strongest first.

  gaps: log q - log pi of tokens, nats. Nothing is drawn where all of them are 0.
  """
  size_X = np.sort(np.abs(np.asarray(gaps, dtype=float)))[::-1]
  if size_X.sum():
    share_X = np.concatenate([[0.0], np.cumsum(size_X) / size_X.sum()])
    plot.plot(np.linspace(0, 100, len(share_X)), 100 * share_X, label=label or None)
  plot.plot([0, 100], [0, 100], color="0.7", linewidth=0.8, linestyle=":")
  plot.set(
    xlabel="tokens, strongest disagreement first, %", ylabel="of the total |log q - log π|, %"
  )
  plot.set(xlim=(0, 100), ylim=(0, 102))


def draw_surprise(plot, episodes: list[Transcript], label: str) -> None:
  """Draws how surprising the policy's own tokens were to it, turn by turn: the mean over episodes.

  Episodes that are over are left out of later turns.
  """
  turns = max((len(episode.turns) for episode in episodes), default=0)
  means = []
  for number in range(turns):
    spoken = [e.turns[number].logp for e in episodes if number < len(e.turns)]
    means.append(-float(np.mean(np.concatenate(spoken))))
  plot.plot(range(1, turns + 1), means, marker="o", markersize=3, label=label)
  plot.set(xlabel="turn", ylabel="-log π, nats a token")
