"""Formats numbers and tables in Markdown."""

import math

NONE = "–"


def table(head: list[str], rows: list[list[str]]) -> str:
  """Returns a table in Markdown."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def folded(title: str, body: str) -> str:
  """Returns a part that a reader opens by its title."""
  return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def percent(share: float, sign: str = "") -> str:
  """Returns per cent with one decimal. Rounding first hides the noise of a float difference."""
  return f"{round(100 * share, 6):{sign}.1f}"


def interval(low, high, sign: str = "") -> str:
  """Returns "[low, high]" in per cent; nothing where one sample tells no spread."""
  if low is None or high is None:
    return ""
  return f"[{percent(low, sign)}, {percent(high, sign)}]"


def score(value: float, low, high, sign: str = "") -> str:
  """Returns "value [low, high]" in per cent."""
  return f"{percent(value, sign)} {interval(low, high, sign)}".rstrip()


def lowest_to_highest(scores: list[float]) -> str:
  """Returns "low to high" in per cent."""
  return f"{percent(min(scores))} to {percent(max(scores))}"


def mean(scores: list[float]) -> str:
  """Returns "mean (lowest to highest)" in per cent."""
  return f"{percent(sum(scores) / len(scores))} ({lowest_to_highest(scores)})"


def span(values: list[int]) -> str:
  """Returns "low to high" of counts, or the one count that all have."""
  low, high = min(values), max(values)
  return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def bound(value: float | None) -> str:
  """Returns a ratio, or a bound of one; None has none."""
  return "∞" if value is None or math.isinf(value) else f"{value:.2f}"


def number(value, form: str = ",.0f") -> str:
  """Returns a number in this format; a dash for none."""
  return NONE if value is None else f"{value:{form}}"
