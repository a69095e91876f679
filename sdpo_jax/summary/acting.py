"""Makes the table of how the policies of a grid act in their worlds."""

from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.runs import Run

LEGEND = """\
The episodes of the last step of training, mean over seeds (lowest to highest): turns; the share of
turns in which nothing was done that the world knows, in per cent; tokens that the policy wrote,
over the whole run. The last column has the share of tokens, in per cent, whose turn and place in it
another episode of the same group reached too: where none did, CRAFT has nothing to compare with."""


def acting(arms: dict[str, list[Run]]) -> list[str]:
  """Returns the table with its legend; nothing for runs that do not act."""
  members = [run for runs in arms.values() for run in runs]
  if not all("rollout/turns" in run.points[-1] for run in members):
    return []
  head = ["arm", "turns", "invalid turns", "tokens an episode", "tokens with siblings"]
  return [LEGEND, md.table(head, [_row(arm, runs) for arm, runs in arms.items()])]


def _row(arm: str, runs: list[Run]) -> list[str]:
  ends = [run.points[-1] for run in runs]
  tokens = [end["train/sampled_tokens"] / end["train/generations"] for end in ends]
  aligned = [end["craft/aligned"] for end in ends if "craft/aligned" in end]
  return [
    f"`{arm}`",
    _numbers([end["rollout/turns"] for end in ends]),
    md.mean([end["rollout/invalid_turns"] for end in ends]),
    _numbers(tokens),
    md.mean(aligned) if aligned else md.NONE,
  ]


def _numbers(values: list[float]) -> str:
  """Returns "mean (lowest to highest)"."""
  return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"
