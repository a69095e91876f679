"""The methods by family, a line each: `python -m sdpo_jax.objectives.methods --short` prints them.

A line says what sets a method apart within its family; where it comes from is in `methods.ABOUT`.
`page.py` prints every difference.
"""

FAMILIES = {
  "SDPO and its variants: the policy, shown feedback or a success, teaches every token": {
    "sdpo": "Jensen-Shannon divergence from a moving-average teacher",
    "sdpo_blend": "one tenth of it, and nine tenths of GRPO's term",
    "sdpo_forward_kl": "the divergence is KL(teacher || policy)",
    "sc_sdpo": "weighs questions by how much their outcomes differ",
    "mopd": "the teacher reads other successes and failures of the group",
    "crisp": "the teacher is asked to be brief, and is renewed now and then",
    "counterfactual": "notes what other attempts would have received",
  },
  "Taught or rewarded, response by response": {
    "srpo": "failures learn from the teacher where it is sure, the others from the reward",
    "drift": "the stage of a question decides, by what is remembered of it",
    "drift_gate": "likewise; successes get the reward by the rhythm of the teacher's opinion",
    "h2sd": "failures learn from a teacher with a hint or a solution, successes from the reward",
  },
  "Distillation from a teacher that reads the reference solution": {
    "opsd": "the first weights teach; the divergence of a token is clipped",
    "beta_opsd": "the teacher moves from the policy towards the one with the solution",
    "pmi": "teaches what the question adds to a solution",
  },
  "Distillation on the sampled tokens alone": {
    "opd_plus": "a policy gradient whose mean is SDPO's divergence",
    "vopd": "reverse KL, less its mean as a baseline",
    "position": "weighs early tokens by the gaps that are still to come",
    "prefix_30": "the first tokens of a response alone",
  },
  "Rewards alone": {
    "grpo": "reward minus group mean, clipped ratios, as SDPO's paper runs it",
    "grpo_std": "as first published: divided by the spread, mean over responses",
    "dapo": "divided by the spread, mean over tokens, a higher upper clip",
    "dr_grpo": "neither spread nor length divides",
    "gspo": "one ratio a sequence",
    "cispo": "clipped ratios that weigh, so that no token loses its gradient",
  },
  "Rewards, which a teacher's reading spreads over the tokens": {
    "rlsd": "more for tokens on which the teacher agrees with the outcome",
    "rlrt": "more, in a success, for what the teacher would not have said",
    "anti_sd": "less for what only repeats the teacher",
    "cscr": "less for tokens that an opinion on the response moves",
  },
  "Rewards, and a teacher's signal beside them; in CRAFT's, siblings are compared": {
    "dgrpo": "GRPO's term, and reverse KL to the teacher beside it",
    "grpo_opsd": "GRPO, and distillation with a constant weight",
    "skill_sd": "an importance-weighted estimate of KL(policy || teacher)",
    "sdar": "distillation that a gate opens where the teacher likes a token better",
    "adaptive_cringe": "contrasts a token that the teacher dislikes with a likely one",
    "craft": "credit by siblings that part at a token, with a polarised reference penalty",
    "craft_reversed": "its credit with the other sign",
    "craft_distil": "its credit weighs the divergence from the teacher",
    "craft_fallback": "without siblings: credit of advantage and divergence alone",
    "craft_swapped": "the penalty's two signs are exchanged",
    "craft_cti": "its credit alone",
    "craft_balance": "its balance of signal and penalty alone",
    "craft_polarised": "its penalty alone",
  },
  "Episodes": {
    "sdpo_turns": "each turn is read with the world's answer to it",
    "ocsd": "an outcome is credited to the turns that later observations speak for",
    "hero": "each turn is read with a hint that the policy writes in hindsight",
  },
}
