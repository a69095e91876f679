"""Lists claims of papers, and holds each against what the grids here measured.

A row says what is claimed, in which paper, and which measurement would show it at this scale: tiny
models on TinyCode and its kin, unless the row says otherwise. A claim about another model, another
task or another size is neither proved nor refuted by a verdict here.

A pair of arms that differs in more than the claim is about cannot tell, whatever its figure: the
row names what else differs (`confounded_by`).
"""

import dataclasses
import pathlib
from typing import NamedTuple

from sdpo_jax.summary import evidence
from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.description import field
from sdpo_jax.summary.evidence import (
  MARGIN,
  OPEN,
  SEEDS,
  Above,
  Collapses,
  DiscoversMore,
  DiscoversSooner,
  ForgetsLess,
  Lasts,
  Measure,
  Shorter,
  Sooner,
  WarnsBefore,
)

LEGEND = f"""\
What papers claim, and what the grids below say of it at the scale of one CPU: models of less than a
million parameters, unless a row says otherwise. "Does not hold": the whole interval is short of the
claim, for a difference below {100 * MARGIN:.0f} points. "Holds": it is on the claimed side. Else
"cannot be told", as of any difference that fewer than {SEEDS} seeds show, and of arms that differ
in more than the claim is about. Differences have 95 % intervals, over seeds and questions; ratios
those of their tables; lengths the span of their seeds. A collapse is claimed of every run. Nothing
is corrected for the number of claims. How arms were tuned stands in the sections."""
PLACES_LEGEND = """\
Where these are measured, with which command, and what the recorded runs cost. To repeat one run,
take its arguments from "Every run" in its section, and the code that the section names. With as
many cores of the same kind (a core a run: `taskset -c 0`) its metrics are the same to the last
digit. On others rounding differs, and after some dozens of steps single answers do."""


class Claim(NamedTuple):
  """A row of the table."""

  says: str
  source: str
  measure: Measure
  confounded_by: str = ""  # what else differs between the arms
  remark: str = ""


_SDPO = "2601.20802"
_CGTR = "2606.03532"
_STABLE = "2607.01763"
_DRIFT = "2606.30345"
_CRAFT = "2606.29476"
_OWN = "hypothesis of this project"
_GRPO = ("grpo", "grpo_std")


def _headline() -> list[Claim]:
  above, unseen = (Above("headline", "sdpo", ("grpo",), split=x) for x in ("heldout", "unseen"))
  quarter = Sooner("headline", "sdpo", "grpo", 0.25)
  half = Shorter("headline", "sdpo", "grpo", 0.5)
  return [
    Claim("SDPO ends above GRPO after as many responses", _SDPO, above),
    Claim("so it does on tasks that training never showed", _OWN, unseen),
    Claim("SDPO is as good as GRPO's end with a quarter of the responses", _SDPO, quarter),
    Claim(
      "SDPO's responses are at most half as long as GRPO's",
      _SDPO,
      half,
      remark="most answers have one length here",
    ),
  ]


def _ablations() -> list[Claim]:
  """Returns the claims about SDPO's own choices, and about controls beside it."""

  def row(says: str, arm: str, *others: str, source: str = _SDPO, **remarks) -> Claim:
    return Claim(says, source, Above("paper_tiny", arm, others), **remarks)

  return [
    row(
      "the divergence of all tokens beats that of the sampled one", "reverse_kl", "sampled_token"
    ),
    row(
      "that of the sampled tokens beats its mean by response", "sampled_token", "whole_responses"
    ),
    row("a teacher that is averaged beats one with the policy's own weights", "sdpo", "live"),
    row("a frozen teacher beats one with the policy's own weights", "frozen", "live"),
    row("the teacher's context is better without the own attempt", "sdpo", "attempt_shown"),
    row("feedback and solutions together beat feedback alone", "sdpo", "feedback_alone"),
    row("feedback and solutions together beat solutions alone", "sdpo", "solutions_alone"),
    row("SDPO beats GRPO with a bonus for successes", "sdpo", "filtered_successes", source=_OWN),
    row("SDPO beats GRPO held by an average of itself", "sdpo", "ema_anchor", source=_OWN),
    row(
      "weights that fall along the response help", "position", "sampled_token", source="2606.22600"
    ),
    row(
      "two successes and a failure beat one success", "mopd", "solutions_alone", source="2605.12652"
    ),
    row("DRIFT ends above SDPO", "drift", "solutions_repeated", source=_DRIFT),
    row(
      "dGRPO ends above GRPO",
      "dgrpo",
      "grpo",
      "rewards_alone",
      source="2605.12227",
      remark="their teacher is a larger model",
    ),
    row(
      "H2SD ends above GRPO",
      "h2sd",
      "grpo",
      "rewards_alone",
      source="2607.18955",
      remark="its teacher reads the reference solution",
    ),
  ]


def _methods() -> list[Claim]:
  def row(says: str, source: str, arm: str, *others: str, **remarks) -> Claim:
    return Claim(says, source, Above("methods", arm, others), **remarks)

  reference = "its teacher reads the reference solution"
  rewards = "groups of 8 and a constant rate, which suit rewards"
  return [
    row("RLSD ends above GRPO", "2606.04036", "rlsd", *_GRPO),
    row("RLRT ends above GRPO", "2605.10781", "rlrt", *_GRPO),
    row("RLRT ends above SDPO", "2605.10781", "rlrt", "sdpo", confounded_by=rewards),
    row("Anti-SD ends above GRPO", "2605.11609", "anti_sd", *_GRPO),
    row("CSCR ends above GRPO", "2607.27888", "cscr", *_GRPO),
    row("CSCR ends above SDPO", "2607.27888", "cscr", "sdpo", confounded_by=rewards),
    row("SRPO ends above SDPO", _DRIFT, "srpo", "sdpo"),
    row("SC-SDPO ends above SDPO", _DRIFT, "sc_sdpo", "sdpo"),
    row("H2SD ends above SDPO", "2607.18955", "h2sd", "sdpo", confounded_by=reference),
    row("β-OPSD ends above OPSD", "2607.28582", "beta_opsd", "opsd"),
    row("the PMI target ends above OPSD", "2607.02234", "pmi", "opsd"),
  ]


def _schedules() -> list[Claim]:
  grid = "schedules"
  return [
    Claim(
      "a teacher that is copied every step collapses within 16 steps",
      _CGTR,
      Collapses(grid, "every_1", within=20),
      remark="evaluated every 20 steps",
    ),
    Claim(
      "one that is copied every 50 steps collapses later",
      _CGTR,
      Collapses(grid, "every_50", later_than="every_1"),
    ),
    Claim("a gated teacher lasts", _CGTR, Lasts(grid, "gated")),
    Claim(
      "the length tail warns 35 steps before a collapse",
      _CGTR,
      WarnsBefore(grid, "length_tail", 35, after=60),
    ),
    Claim(
      "a gated teacher ends above an average", _CGTR, Above(grid, "gated", ("ema_0.01", "ema_0.05"))
    ),
    Claim(
      "a frozen teacher ends above an average",
      _STABLE,
      Above(grid, "frozen", ("ema_0.01", "ema_0.05")),
    ),
    Claim(
      "a teacher copied every 10 steps and frozen between ends above a frozen one",
      _STABLE,
      Above(grid, "every_10", ("frozen",)),
    ),
  ]


def _of_small_models() -> list[Claim]:
  grid = "instructions"
  return [
    Claim(
      "GRPO beside SDPO helps a small model (SmolLM2-135M)",
      _SDPO,
      Above(grid, "sdpo_blend", ("sdpo",)),
    ),
    Claim(
      "for a small model GRPO ends above SDPO (SmolLM2-135M)",
      "2606.11709",
      Above(grid, "grpo", ("sdpo",)),
    ),
  ]


def _of_later_tasks() -> list[Claim]:
  grid, groups = "forgetting_tiny", "groups of 8 and half the questions"
  return [
    Claim(
      "SDPO forgets less than GRPO, at one rate",
      _SDPO,
      ForgetsLess(grid, "sdpo_slow", "grpo"),
      confounded_by=groups,
    ),
    Claim(
      "GRPO forgets less than SDPO with a frozen teacher, at one rate",
      _STABLE,
      ForgetsLess(grid, "grpo", "frozen_slow"),
      confounded_by=groups,
    ),
  ]


def _at_test_time() -> list[Claim]:
  return [
    Claim(
      "at test time SDPO discovers what best-of-k does with a third of the attempts",
      _SDPO,
      DiscoversSooner("sdpo", 1 / 3),
    ),
    Claim("it discovers more than best-of-k", _SDPO, DiscoversMore("sdpo", "best_of_k")),
    Claim("it discovers more than several turns", _SDPO, DiscoversMore("sdpo", "multi_turn")),
    Claim(
      "best-of-k discovers more than several turns",
      _SDPO,
      DiscoversMore("best_of_k", "multi_turn"),
    ),
  ]


def _counterfactual() -> list[Claim]:
  rows = []
  for domain in ("tinycode", "arithmetic"):
    for arm, other, says in (
      ("counterfactual", "sdpo", "verified notes beat SDPO"),
      ("counterfactual", "sdpo_extra", "verified notes beat SDPO with larger groups"),
      ("counterfactual", "counterfactual_opposite", "notes beat notes that say the opposite"),
    ):
      measure = Above("counterfactual", arm, (other,), domain=domain)
      rows.append(Claim(f"{says} ({domain})", _OWN, measure))
  return rows


def _agents() -> list[Claim]:
  def row(says: str, arm: str, other: str, source: str = _CRAFT) -> Claim:
    return Claim(says, source, Above("agentic", arm, (other,)))

  return [
    row("CRAFT ends above SDAR (household)", "craft", "sdar"),
    row("CRAFT ends above GRPO (household)", "craft", "grpo"),
    row("SDAR ends above GRPO (household)", "sdar", "grpo"),
    row("a constant gate harms GRPO (household)", "grpo", "grpo_opsd"),
    row(
      "a full demonstration at every turn fails (household)", "grpo", "demonstration", "2606.11559"
    ),
    row("OCSD ends above GRPO (household)", "ocsd", "grpo", "2608.04788"),
  ]


CLAIMS = (
  *_headline(),
  *_ablations(),
  *_methods(),
  *_schedules(),
  *_of_small_models(),
  *_of_later_tasks(),
  *_at_test_time(),
  *_counterfactual(),
  *_agents(),
)


def claims(root: pathlib.Path) -> str:
  """Returns the section with both tables; root: of the repository."""
  results = root / "results"
  rows = []
  for claim in CLAIMS:
    source = f"arXiv {claim.source}" if claim.source[0].isdigit() else claim.source
    rows.append([claim.says, source, *_cells(claim, results), _link(results, claim.measure.grid)])
  places = [
    [_link(results, grid), f"`{field(root, grid, 'Run')}`", *_cost(results / grid)]
    for grid in dict.fromkeys(claim.measure.grid for claim in CLAIMS)
  ]
  return (
    "\n\n".join(
      [
        "## Claims",
        LEGEND,
        md.table(["claim", "source", "here", "figure", "measured in"], rows),
        PLACES_LEGEND,
        md.table(["grid", "command", "runs", "hours", "processor"], places),
      ]
    )
    + "\n"
  )


def _cells(claim: Claim, results: pathlib.Path) -> list[str]:
  """Returns the verdict and its figure."""
  verdict = claim.measure(results)
  if verdict is None:
    return ["not measured yet", md.NONE]
  if claim.confounded_by:
    verdict = dataclasses.replace(verdict, word=OPEN)
  differs = f"they also differ in: {claim.confounded_by}" if claim.confounded_by else ""
  figure = "; ".join(x for x in (verdict.figure, differs, claim.remark) if x)
  return [f"**{verdict.word}**", figure]


def _link(results: pathlib.Path, grid: str) -> str:
  return f"[{grid}](#{grid})" if (results / grid).is_dir() else f"`{grid}`"


def _cost(folder: pathlib.Path) -> list[str]:
  """Returns how many runs are recorded, their hours and their processors."""
  arms = evidence.read(folder / "discover.json").get("arms", {})
  entries = [x for x in evidence.read(folder / "curves.json").values() if x["points"]]
  if not entries and not arms:
    return [md.NONE] * 3
  count = len(entries) + sum(arm["runs"] for arm in arms.values())
  hours = sum(arm["time_s"] for arm in arms.values()) / 3600
  hours += sum(entry["points"][-1]["time_s"] for entry in entries) / 3600
  machines = [entry["machine"] for entry in entries if entry.get("machine")]
  names = sorted({machine.get("accelerator", machine["cpu"]) for machine in machines})
  return [str(count), f"{hours:.1f}", ", ".join(names) or "an x86 core a run"]
