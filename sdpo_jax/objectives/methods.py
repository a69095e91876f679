"""METHODS: a method is a row of parts. A new method is a new row, and at most one new function.

  axis             what it decides                                      table
  teacher_context  what the teacher reads (host: text)                  contexts.py
  teacher_weights  which weights teach, and how they follow the policy  teacher_weights.py
  teacher_logits   a teacher made of several readings' logits           teacher_logits.py
  token_signal     what a re-scored token contributes                   signals.py
  token_weight     a detached factor on it                              token_weight.py
  advantage        the baseline of a group's rewards (host: numpy)      advantage.py
  credit           what a reading does to the advantage of each token   credit.py
  surrogate        the policy-gradient term that uses the advantage     surrogate.py
  reduction        how the tokens of that term add up                   surrogate.py
  counterfactual   what failed responses learn from alternatives        notes.py
  memory           what is remembered of each question (host)           memory.py
  route            which responses learn from which term (host)         route.py
  contrast         what siblings say of each token's credit (host: numpy)   cti.py
  balance          how much the signal counts where it is added             balance.py
  reference_kl     what leaving the first weights costs                     reference_kl.py
  policy_share     share of the surrogate in the loss; the token signal has the rest. "routed": a
                   response has the signal alone or the surrogate alone, as the route says. With a
                   balance it is 1, and the signal is added

SDPO and GRPO differ in what stands in their rows and in nothing else. A row names what its method
is about; `build.method_row` fills in every other setting of its parts, so that all settings of a
run are visible and can be changed. Beside it stands where it comes from, and what its paper leaves
open or does otherwise.

  python -m sdpo_jax.objectives.methods [--short]

prints all rows, what they change and what they need (page.py); with --short a line for each
(families.py).
"""

from typing import NamedTuple


class About(NamedTuple):
  """Where a row comes from."""

  source: str  # the paper, and the place in it
  decided: str = ""  # what is not the paper's; "": it is as printed


_SDPO = dict(
  teacher_context=dict(name="feedback_or_solution"),
  teacher_weights=dict(name="ema", rate=0.05),
  teacher_logits=dict(name="plain"),
  token_signal=dict(name="divergence", alpha=0.5),
  token_weight=dict(name="importance", is_clip=2.0, rollout_is_clip=2.0),
  advantage=dict(name="zero"),
  surrogate=dict(name="none"),
  reduction=dict(name="token_mean"),
  credit=dict(name="none"),
  counterfactual=dict(name="none"),
  memory=dict(name="none"),
  route=dict(name="taught"),
  contrast=dict(name="none"),
  balance=dict(name="none"),
  reference_kl=dict(name="none"),
  policy_share=0.0,
)
_GRPO = dict(
  teacher_context=dict(name="none"),
  teacher_weights=dict(name="none"),
  teacher_logits=dict(name="plain"),
  token_signal=dict(name="none"),
  token_weight=dict(name="uniform"),
  advantage=dict(name="group_mean", normalize_std=False),
  surrogate=dict(name="clipped", low=0.2, high=0.28, rollout_is_clip=2.0),
  reduction=dict(name="token_mean"),
  credit=dict(name="none"),
  counterfactual=dict(name="none"),
  memory=dict(name="none"),
  route=dict(name="taught"),
  contrast=dict(name="none"),
  balance=dict(name="none"),
  reference_kl=dict(name="none"),
  policy_share=1.0,
)
_GRPO_TERM = dict(advantage=_GRPO["advantage"], surrogate=_GRPO["surrogate"])
_NORMALIZED = dict(name="group_mean", normalize_std=True)
_SYMMETRIC_CLIP = dict(name="clipped", low=0.2, high=0.2)
_DRIFT = (
  _SDPO
  | _GRPO_TERM
  | dict(
    policy_share="routed",
    teacher_context=dict(name="drift"),
    memory=dict(name="questions"),
    route=dict(name="drift"),
  )
)

_OPSD = _SDPO | dict(
  teacher_context=dict(name="reference_solution"),
  teacher_weights=dict(name="frozen"),
  token_weight=dict(name="uniform"),
)
_SAMPLED = dict(token_signal=dict(name="sampled_token"))

_MU = 0.01  # of the reference KL, where no balance decides it
# SDAR's loop; its teacher reads a skill, which single-turn tasks have none of.
_SDAR = _GRPO | dict(
  teacher_context=dict(name="feedback_or_solution"),
  teacher_weights=dict(name="live"),
  token_signal=dict(name="gated", beta=5.0),
  advantage=_NORMALIZED,
  surrogate=dict(name="clipped", low=0.2, high=0.2, rollout_is_clip=None, dual_clip=3.0),
  balance=dict(name="fixed", share=0.01),
  reference_kl=dict(name="k3", coefficient=_MU),
)


def _craft(
  *, cti: bool = True, balance: bool = True, polarised: bool = True, contrast: dict | None = None
) -> dict:
  """Returns CRAFT's row with some of its pillars; without any it is SDAR's.

  contrast: settings of it that are not the paper's.
  """
  row = dict(_SDAR)
  if cti or balance or polarised:
    row["contrast"] = dict(name="cti") | (contrast or {})
  if cti:
    row["token_signal"] = dict(name="contrast")
  if balance:
    row["balance"] = dict(name="contrast")
  coefficient = None if balance else _MU
  if polarised:
    row["reference_kl"] = dict(name="polarised", coefficient=coefficient)
  elif balance:
    row["reference_kl"] = dict(name="k3", coefficient=coefficient)
  return row


_SDAR_DECIDED = "the context, where there is no skill; log q is today's in every update"
RIGHT = "Every step of the response below is right, and so is its answer."
WRONG = "Every step of the response below is wrong, and so is its answer."
CONCISE = "Be as brief as you can: leave out every step that the answer does not need."

_ROWS: dict[str, tuple[dict, About]] = {
  "sdpo": (
    _SDPO,
    About("2601.20802", "the whole vocabulary, where the paper keeps 20 or 100 tokens and a tail"),
  ),
  "sdpo_blend": (
    _SDPO | _GRPO_TERM | dict(policy_share=0.9),
    About("2601.20802, appendix", "the whole vocabulary"),
  ),
  "sdpo_forward_kl": (
    _SDPO | dict(token_signal=dict(name="divergence", alpha=0.0)),
    About("2606.05152 (DistIL)", "without its future term, whose estimator is not printed"),
  ),
  "sc_sdpo": (
    _SDPO
    | dict(
      advantage=dict(name="question_spread"),
      token_weight=dict(name="importance", is_clip=2.0, rollout_is_clip=2.0, by_question=True),
    ),
    About("2605.27765", "the whole vocabulary"),
  ),
  "mopd": (
    _SDPO | dict(teacher_context=dict(name="peers")),
    About(
      "2605.12652, section 4", "the whole vocabulary; peers in the order of the group; the template"
    ),
  ),
  "crisp": (
    _SDPO
    | dict(
      teacher_context=dict(name="instruction", text=CONCISE),
      teacher_weights=dict(name="every", period=50),
      token_signal=dict(name="divergence", alpha=1.0),
    ),
    About("2603.05433", "the words of the request; SDPO's importance weights"),
  ),
  "srpo": (
    _SDPO
    | _GRPO_TERM
    | dict(
      policy_share="routed",
      teacher_context=dict(name="feedback_or_solution", only_failures=True),
      token_weight=dict(name="certainty", is_clip=2.0, rollout_is_clip=2.0),
    ),
    About("2604.02288", "certainty is relative to the mean of its response"),
  ),
  "drift": (
    _DRIFT,
    About("2606.30345, 3.1, 3.2, 3.4", "all settings, which are not printed; stages by visits"),
  ),
  "drift_gate": (
    _DRIFT
    | dict(teacher_context=dict(name="drift", medium_successes=True), credit=dict(name="rhythm")),
    About("2606.30345, 3.3", "all settings, which are not printed"),
  ),
  "h2sd": (
    _SDPO
    | dict(
      policy_share="routed",
      teacher_context=dict(name="rephrase_or_hint"),
      teacher_weights=dict(name="frozen"),
      token_signal=dict(name="divergence", alpha=1.0),
      advantage=_NORMALIZED,
      surrogate=_SYMMETRIC_CLIP,
      credit=dict(name="rlsd", share=1.0, share_end=1.0, epsilon=0.2),
      route=dict(name="outcome"),
    ),
    About(
      "2607.18955, 4.2",
      "one mean over all tokens, the whole vocabulary, SDPO's importance weights; without hints a "
      "solution is shown",
    ),
  ),
  "opsd": (
    _OPSD | dict(token_signal=dict(name="divergence", alpha=0.5, clip=0.05)),
    About("2601.18734"),
  ),
  "beta_opsd": (
    _OPSD
    | dict(
      teacher_logits=dict(name="tilt"),
      token_signal=dict(name="return_to_go", gamma=0.99),
    ),
    About("2607.28582, section 4", "OPSD's frozen weights read; the mean over tokens"),
  ),
  "pmi": (
    _OPSD | dict(teacher_context=dict(name="pmi"), teacher_logits=dict(name="pmi")),
    About("2607.02234, section 4", "without its tanh"),
  ),
  "opd_plus": (
    _SDPO | dict(token_signal=dict(name="sampled_token", alpha=0.5)),
    About("2606.01039, section 3", "the teacher is SDPO's"),
  ),
  "vopd": (
    _SDPO | dict(token_signal=dict(name="sampled_token", baseline=True)),
    About("2605.07865", "the teacher is SDPO's, and no task's reward is added"),
  ),
  "position": (
    _SDPO | _SAMPLED | dict(token_weight=dict(name="prefix_gap", gamma=0.5)),
    About("2606.22600, section 4", "the teacher is SDPO's"),
  ),
  "prefix_30": (
    _SDPO | _SAMPLED | dict(token_weight=dict(name="first_share", share=0.3)),
    About("2606.22600, section 4", "the teacher is SDPO's"),
  ),
  "counterfactual": (
    _SDPO | dict(counterfactual=dict(name="notes")),
    About("of this project (notes.py)", "all of it"),
  ),
  "grpo": (
    _GRPO,
    About("2402.03300, as 2601.20802 runs it"),
  ),
  "grpo_std": (
    _GRPO
    | dict(
      advantage=_NORMALIZED,
      surrogate=_SYMMETRIC_CLIP,
      reduction=dict(name="sequence_mean"),
    ),
    About("2402.03300", "without its KL to the initial model"),
  ),
  "dapo": (
    _GRPO | dict(advantage=_NORMALIZED),
    About("2503.14476", "without its dynamic sampling"),
  ),
  "dr_grpo": (
    _GRPO | dict(surrogate=_SYMMETRIC_CLIP, reduction=dict(name="constant", length=8192.0)),
    About("2503.20783"),
  ),
  "gspo": (
    _GRPO
    | dict(
      advantage=_NORMALIZED, surrogate=dict(name="gspo"), reduction=dict(name="sequence_mean")
    ),
    About("2507.18071"),
  ),
  "cispo": (
    _GRPO | dict(advantage=_NORMALIZED, surrogate=dict(name="cispo")),
    About("2506.13585"),
  ),
  "dgrpo": (
    _SDPO
    | dict(
      token_signal=dict(name="divergence", alpha=1.0),
      advantage=_NORMALIZED,
      surrogate=_SYMMETRIC_CLIP,
      reduction=dict(name="sequence_mean"),
      policy_share=2 / 3,
    ),
    About(
      "2605.12227, eq. 6",
      "times 2/3, so as to be a blend; the divergence keeps the mean over tokens; SDPO's teacher",
    ),
  ),
  "rlsd": (
    _GRPO
    | dict(
      advantage=_NORMALIZED,
      surrogate=_SYMMETRIC_CLIP,
      teacher_context=dict(name="reference_solution"),
      teacher_weights=dict(name="frozen"),
      credit=dict(name="rlsd", share=0.5, share_end=0.0, share_steps=50, epsilon=0.2),
    ),
    About("2604.03128", "the mean over tokens"),
  ),
  "rlrt": (
    _GRPO
    | dict(
      advantage=_NORMALIZED,
      teacher_context=dict(name="feedback_or_solution", feedback="never", only_successes=True),
      teacher_weights=dict(name="live"),
      credit=dict(name="rlrt", share=0.5, epsilon=1.0),
    ),
    About("2605.10781, section 5", "the success shown is another one; without one A stays"),
  ),
  # The live policy teaches, since the gate watches a teacher that grows surer with the policy.
  "anti_sd": (
    _GRPO
    | dict(
      advantage=_NORMALIZED,
      surrogate=_SYMMETRIC_CLIP,
      teacher_context=dict(name="solution_and_verdict"),
      teacher_weights=dict(name="live"),
      credit=dict(name="anti_sd", share=0.5),
    ),
    About("2605.11609, 3.2", "the live policy teaches; the mean over tokens; how the gate begins"),
  ),
  "cscr": (
    _GRPO
    | dict(
      advantage=_NORMALIZED,
      surrogate=_SYMMETRIC_CLIP,
      reduction=dict(name="sequence_mean"),
      teacher_context=dict(name="instruction", text=RIGHT, further_texts=(WRONG,)),
      teacher_weights=dict(name="live"),
      credit=dict(name="cscr", threshold=0.05, rate=10.0, depth=0.2),
    ),
    About("2607.27888, sections 2 and 3", "the words, and GRPO's clip"),
  ),
  "grpo_opsd": (
    _SDAR | dict(token_signal=dict(name="gated", beta=0.0)),
    About("2605.15155, a baseline", _SDAR_DECIDED),
  ),
  "skill_sd": (
    _SDAR | dict(token_signal=dict(name="weighted_k3"), balance=dict(name="fixed", share=0.001)),
    About("2604.10674, as 2605.15155 runs it", _SDAR_DECIDED),
  ),
  "sdar": (_SDAR, About("2605.15155", _SDAR_DECIDED)),
  "adaptive_cringe": (
    _craft(cti=False, polarised=False) | dict(token_signal=dict(name="likelier")),
    About("2606.29476, a baseline", "the mean over its draw of a token; its threshold, 0"),
  ),
  "craft": (
    _craft(),
    About(
      "2606.29476",
      "when and where siblings are compared (cti.py). As printed: with two-valued rewards c has "
      "the sign of -A, and its signal opposes the surrogate; SDAR's teacher",
    ),
  ),
  "craft_reversed": (
    _craft(contrast=dict(cti_sign=-1)),
    About("of this project", "c with the opposite sign, that of A with two-valued rewards"),
  ),
  "craft_distil": (
    _craft()
    | dict(token_signal=dict(name="divergence", alpha=0.5), token_weight=dict(name="contrast")),
    About("of this project", "max(c, 0) weighs the divergence from the teacher"),
  ),
  "craft_fallback": (
    _craft(contrast=dict(g_min=999)),
    About("2606.29476, run A6", "c is made of A d alone"),
  ),
  "craft_swapped": (
    _craft() | dict(reference_kl=dict(name="polarised", coefficient=None, swap=True)),
    About("2606.29476, run A7", "as craft"),
  ),
  "craft_cti": (
    _craft(balance=False, polarised=False),
    About("2606.29476, pillar 1", "as craft"),
  ),
  "craft_balance": (
    _craft(cti=False, polarised=False),
    About("2606.29476, pillar 2", "as craft"),
  ),
  "craft_polarised": (
    _craft(cti=False, balance=False),
    About("2606.29476, pillar 3", "as craft"),
  ),
  "sdpo_turns": (
    _SDPO | dict(teacher_context=dict(name="turn_words")),
    About("of this project", "all of it: each turn is read with the world's answer to it"),
  ),
  "ocsd": (
    _GRPO
    | dict(
      advantage=_NORMALIZED,
      surrogate=_SYMMETRIC_CLIP,
      teacher_context=dict(name="later_observations", share=0.2),
      teacher_weights=dict(name="live"),
      credit=dict(name="ocsd", share=0.5),
    ),
    About("2608.04788, eq. 6-11", "the words; what is later goes to the end of the episode"),
  ),
  # Its turns count alike: a weight of the context's readings (data/turn_prompt.py).
  "hero": (
    _SDPO
    | dict(
      teacher_context=dict(name="hindsight"),
      teacher_weights=dict(name="ema", rate=0.001),
      token_signal=dict(name="divergence", alpha=0.5, top_k=100, ratio_bounds=(0.4, 10.0)),
      token_weight=dict(name="uniform"),
    ),
    About(
      "2606.11559, section 3",
      "the words, and that a hint stands behind the observation; its clipped importance weighting, "
      "which is not defined, is read as RESD's bound on q / pi (2605.12741); any group size",
    ),
  ),
}
# A row carries its name, so that config.json and reports show it.
METHODS = {name: dict(row, name=name) for name, (row, _) in _ROWS.items()}
ABOUT = {name: about for name, (_, about) in _ROWS.items()}

if __name__ == "__main__":
  import sys

  from sdpo_jax.objectives.page import print_page

  print_page(sys.argv[1:])
