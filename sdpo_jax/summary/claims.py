"""Lists claims of papers, and holds each against what the grids here measured.

A row says what is claimed, where, and which measurement would show it at this scale: tiny models
on TinyCode and its kin, unless the row says otherwise. A claim about another model, another task or
another size is neither proved nor refuted by a verdict here.
"""

import pathlib
from typing import NamedTuple

from sdpo_jax.summary import evidence
from sdpo_jax.summary import markdown as md
from sdpo_jax.summary.evidence import MARGIN, Measure

LEGEND = f"""\
What papers claim, and what the grids below say of it at the scale of one CPU: models of half a
million parameters, unless a row says otherwise. "holds": the whole 95 % interval (ratios: that of
their table) is on the claimed side. "does not hold": all of it is short of that, for a difference
below {100 * MARGIN:.0f} points. Else "cannot be told", as of any difference that one seed shows.
Intervals are not corrected for the number of claims. The command of each row, its cost and how its
arms were tuned stand in the section that it names. All runs were made on x86 cores."""


class Claim(NamedTuple):
  """A row of the table."""

  says: str
  source: str
  section: str  # of RESULTS.md
  measure: Measure
  but: str = ""  # why the figure says less than it seems to


_SDPO = "2601.20802"
_CGTR = "2606.03532"
_STABLE = "2607.01763"


def _on_methods(says: str, source: str, arm: str, other: str) -> Claim:
  return Claim(says, source, "methods", evidence.above("methods", arm, other))


def _beats_grpo(name: str, source: str, arm: str) -> Claim:
  measure = evidence.above_best("methods", arm, ("grpo", "grpo_std"))
  return Claim(f"{name} ends above GRPO", source, "methods", measure)


def _on_paper(says: str, arm: str, other: str) -> Claim:
  return Claim(says, _SDPO, "paper_tiny", evidence.above("paper_tiny", arm, other))


def _on_counterfactual(says: str, other: str, domain: str) -> Claim:
  measure = evidence.above("counterfactual", "counterfactual", other, domain=domain)
  return Claim(says, "hypothesis of this project", "counterfactual", measure)


CLAIMS = (
  Claim(
    "SDPO ends above GRPO after as many responses",
    _SDPO,
    "headline",
    evidence.above("headline", "sdpo", "grpo"),
  ),
  Claim(
    "so it does on tasks that training never showed",
    _SDPO,
    "headline",
    evidence.above("headline", "sdpo", "grpo", split="unseen"),
  ),
  Claim(
    "SDPO is as good as GRPO's end with a quarter of the responses",
    _SDPO,
    "headline",
    evidence.sooner("headline", "sdpo", "grpo", 0.25),
  ),
  Claim(
    "SDPO's responses are at most half as long as GRPO's",
    _SDPO,
    "headline",
    evidence.shorter("headline", "sdpo", "grpo", 0.5),
    "most answers have one length here",
  ),
  _on_paper(
    "the divergence token by token beats its mean by response", "reverse_kl", "whole_responses"
  ),
  _on_paper("the divergence of all tokens beats that of the sampled one", "sdpo", "opd_plus"),
  _on_paper("a teacher that is averaged beats one with the policy's own weights", "sdpo", "live"),
  _on_paper("a frozen teacher beats one with the policy's own weights", "frozen", "live"),
  _on_paper("the teacher's context is better without the own attempt", "sdpo", "attempt_shown"),
  _on_paper("feedback and solutions together beat feedback alone", "sdpo", "feedback_alone"),
  _on_paper("feedback and solutions together beat solutions alone", "sdpo", "solutions_alone"),
  Claim(
    "GRPO beside SDPO helps a small model (SmolLM2-135M)",
    _SDPO,
    "instructions",
    evidence.above("instructions", "sdpo_blend", "sdpo"),
  ),
  Claim(
    "below a billion parameters GRPO beats SDPO (SmolLM2-135M)",
    _SDPO,
    "instructions",
    evidence.above("instructions", "grpo", "sdpo"),
  ),
  Claim(
    "SDPO forgets less than GRPO",
    _SDPO,
    "forgetting_tiny",
    evidence.forgets_less("forgetting_tiny", "sdpo", "grpo"),
  ),
  Claim(
    "at test time SDPO discovers what best-of-k does with a third of the attempts",
    _SDPO,
    "discover",
    evidence.discovers_sooner("sdpo", 1 / 3),
  ),
  Claim(
    "best-of-k discovers more than a conversation of several turns",
    _SDPO,
    "discover",
    evidence.discovers_more("best_of_k", "multi_turn"),
  ),
  Claim(
    "a teacher that is copied every step collapses within 16 steps",
    _CGTR,
    "schedules",
    evidence.falls("schedules", "every_1", within=20),
  ),
  Claim(
    "one that is copied every 50 steps collapses later",
    _CGTR,
    "schedules",
    evidence.falls("schedules", "every_50"),
  ),
  Claim("a gated teacher lasts", _CGTR, "schedules", evidence.lasts("schedules", "gated")),
  Claim(
    "the length tail warns 35 steps before a collapse",
    _CGTR,
    "schedules",
    evidence.told_before("schedules", "length_tail", 35),
  ),
  Claim(
    "a gated teacher ends above an average",
    _CGTR,
    "schedules",
    evidence.above("schedules", "gated", "ema_0.05"),
  ),
  Claim(
    "a frozen teacher ends above an average",
    _STABLE,
    "schedules",
    evidence.above("schedules", "frozen", "ema_0.05"),
  ),
  Claim(
    "a teacher that is restarted and then frozen ends above a frozen one",
    _STABLE,
    "schedules",
    evidence.above("schedules", "restart_10", "frozen"),
  ),
  _beats_grpo("RLSD", "2604.03128", "rlsd"),
  _beats_grpo("RLRT", "2605.10781", "rlrt"),
  _beats_grpo("Anti-SD", "2605.11609", "anti_sd"),
  _beats_grpo("CSCR", "2607.27888", "cscr"),
  _on_methods("CSCR ends above SDPO", "2607.27888", "cscr", "sdpo"),
  _beats_grpo("dGRPO", "2605.12227", "dgrpo"),
  _on_methods("two successes and a failure beat one success", "2605.12652", "mopd", "sdpo"),
  _on_methods("DRIFT ends above SDPO", "2606.30345", "drift", "sdpo"),
  _on_methods("DRIFT ends above SRPO", "2606.30345", "drift", "srpo"),
  _on_methods("H2SD ends above SDPO", "2607.18955", "h2sd", "sdpo"),
  _beats_grpo("H2SD", "2607.18955", "h2sd"),
  _on_methods("β-OPSD ends above OPSD", "2607.28582", "beta_opsd", "opsd"),
  _on_methods("the PMI target ends above OPSD", "2607.02234", "pmi", "opsd"),
  _on_methods("weights that fall along the response help", "2606.22600", "position", "opd_plus"),
  _on_counterfactual("verified notes beat SDPO (TinyCode)", "sdpo", "tinycode"),
  _on_counterfactual("verified notes beat SDPO (arithmetic)", "sdpo", "arithmetic"),
  _on_counterfactual("they beat SDPO with larger groups (TinyCode)", "sdpo_extra", "tinycode"),
  _on_counterfactual("they beat SDPO with larger groups (arithmetic)", "sdpo_extra", "arithmetic"),
  Claim(
    "CRAFT ends above SDAR (household)",
    "2606.29476",
    "agentic",
    evidence.above("agentic", "craft", "sdar"),
  ),
  Claim(
    "CRAFT ends above GRPO (household)",
    "2606.29476",
    "agentic",
    evidence.above("agentic", "craft", "grpo"),
  ),
)


def claims(results: pathlib.Path) -> str:
  """Returns the section with the table; results: the folder of all grids."""
  rows = []
  for claim in CLAIMS:
    found = claim.measure(results)
    source = f"arXiv {claim.source}" if claim.source[0].isdigit() else claim.source
    verdict, figure = ("not run yet", md.NONE)
    if found:
      verdict = f"**{found.verdict}**"
      figure = f"{found.figure}; {claim.but}" if claim.but else found.figure
    has_section = (results / claim.section).is_dir()
    section = f"[{claim.section}](#{claim.section})" if has_section else f"`{claim.section}`"
    rows.append([claim.says, source, verdict, figure, section])
  head = ["claim", "source", "here", "figure", "measured in"]
  return "\n\n".join(["## Claims", LEGEND, md.table(head, rows)]) + "\n"
