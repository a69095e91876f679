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
  policy_share     share of the surrogate in the loss; the token signal has the rest. "routed": a
                   response has the signal alone or the surrogate alone, as the route says

SDPO and GRPO differ in what stands in their rows and in nothing else. A row names what its method
is about; `build.method_row` fills in every other setting of its parts, so that all settings of a
run are visible and can be changed.
"""

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

METHODS: dict[str, dict] = {
  # SDPO, arXiv 2601.20802.
  "sdpo": _SDPO,
  # Its blend with GRPO; policy_share is the paper's lambda.
  "sdpo_blend": _SDPO | _GRPO_TERM | dict(policy_share=0.9),
  # OPSD, arXiv 2601.18734: the frozen initial model reads the task's own solution.
  "opsd": _OPSD | dict(token_signal=dict(name="divergence", alpha=0.5, clip=0.05)),
  # beta-OPSD, arXiv 2607.28582, section 4: OPSD with a teacher between policy and reading, and
  # returns to go. Decided here: OPSD's frozen weights read, and its token mean adds up.
  "beta_opsd": _OPSD
  | dict(
    teacher_logits=dict(name="tilt"),
    token_signal=dict(name="return_to_go", gamma=0.99),
  ),
  # The PMI target, arXiv 2607.02234, section 4, without its tanh.
  "pmi": _OPSD | dict(teacher_context=dict(name="pmi"), teacher_logits=dict(name="pmi")),
  # SRPO, arXiv 2604.02288: failures get the token signal, successes the surrogate.
  "srpo": _SDPO
  | _GRPO_TERM
  | dict(
    policy_share="routed",
    teacher_context=dict(name="feedback_or_solution", only_failures=True),
    token_weight=dict(name="certainty", is_clip=2.0, rollout_is_clip=2.0),
  ),
  # DRIFT, arXiv 2606.30345, with every factor M = 1: SDPO on all responses at first, then on
  # failures alone, while successes get the surrogate by how hard their question is.
  "drift": _DRIFT,
  # The same with its rhythm gate, section 3.3 (rhythm.py).
  "drift_gate": _DRIFT
  | dict(teacher_context=dict(name="drift", medium_successes=True), credit=dict(name="rhythm")),
  # H2SD, arXiv 2607.18955, section 4.2: a success gets RLSD's credit from a teacher that is to
  # rephrase it, a failure the reverse KL to one that reads a hint. Decided here: both over all
  # tokens, the whole vocabulary, and the importance weights of SDPO.
  "h2sd": _SDPO
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
  # SC-SDPO, arXiv 2605.27765: questions count by the spread of their rewards.
  "sc_sdpo": _SDPO
  | dict(
    advantage=dict(name="question_spread"),
    token_weight=dict(name="importance", is_clip=2.0, rollout_is_clip=2.0, by_question=True),
  ),
  # RLSD, arXiv 2604.03128. Decided here: the mean over tokens.
  "rlsd": _GRPO
  | dict(
    advantage=_NORMALIZED,
    surrogate=_SYMMETRIC_CLIP,
    teacher_context=dict(name="reference_solution"),
    teacher_weights=dict(name="frozen"),
    credit=dict(name="rlsd", share=0.5, share_end=0.0, share_steps=50, epsilon=0.2),
  ),
  # RLRT, arXiv 2605.10781, section 5, for base models. Decided here: the success shown is another
  # one, and a success without another keeps its advantage.
  "rlrt": _GRPO
  | dict(
    advantage=_NORMALIZED,
    teacher_context=dict(name="feedback_or_solution", feedback="never", only_successes=True),
    teacher_weights=dict(name="live"),
    credit=dict(name="rlrt", share=0.5, epsilon=1.0),
  ),
  # Anti-SD, arXiv 2605.11609, section 3.2. Decided here: the live policy teaches, for the gate
  # watches a teacher that grows surer with the policy; normalised advantages, the mean over tokens.
  "anti_sd": _GRPO
  | dict(
    advantage=_NORMALIZED,
    surrogate=_SYMMETRIC_CLIP,
    teacher_context=dict(name="solution_and_verdict"),
    teacher_weights=dict(name="live"),
    credit=dict(name="anti_sd", share=0.5),
  ),
  # CSCR, arXiv 2607.27888, sections 2 and 3. The words are ours; the clip is GRPO's.
  "cscr": _GRPO
  | dict(
    advantage=_NORMALIZED,
    surrogate=_SYMMETRIC_CLIP,
    reduction=dict(name="sequence_mean"),
    teacher_context=dict(
      name="instruction",
      text="Every step of the response below is right, and so is its answer.",
      further_texts=("Every step of the response below is wrong, and so is its answer.",),
    ),
    teacher_weights=dict(name="live"),
    credit=dict(name="cscr", threshold=0.05, rate=10.0, depth=0.2),
  ),
  # DistIL, arXiv 2606.05152, without its future term, whose estimator is not printed: forward KL.
  "sdpo_forward_kl": _SDPO | dict(token_signal=dict(name="divergence", alpha=0.0)),
  # MOPD, arXiv 2605.12652, section 4: two successes and a failure of peers.
  "mopd": _SDPO | dict(teacher_context=dict(name="peers")),
  # OPD+, arXiv 2606.01039, section 3: JSD's gradient from the sampled token alone.
  "opd_plus": _SDPO | dict(token_signal=dict(name="sampled_token", alpha=0.5)),
  # vOPD, arXiv 2605.07865: reverse KL's, with the baseline that is known in closed form. Decided
  # here: the teacher is SDPO's, and no task's reward is added.
  "vopd": _SDPO | dict(token_signal=dict(name="sampled_token", baseline=True)),
  # Position weights, arXiv 2606.22600, section 4; the teacher is SDPO's (decided here).
  "position": _SDPO | _SAMPLED | dict(token_weight=dict(name="prefix_gap", gamma=0.5)),
  # The same paper's Prefix-30.
  "prefix_30": _SDPO | _SAMPLED | dict(token_weight=dict(name="first_share", share=0.3)),
  # dGRPO, arXiv 2605.12227, eq. 6, times 2/3: L_PG + 0.5 KL(pi || q). Its sequence mean is that of
  # the surrogate alone, and the teacher is SDPO's (decided here).
  "dgrpo": _SDPO
  | dict(
    token_signal=dict(name="divergence", alpha=1.0),
    advantage=_NORMALIZED,
    surrogate=_SYMMETRIC_CLIP,
    reduction=dict(name="sequence_mean"),
    policy_share=2 / 3,
  ),
  # Derived here: notes on what alternatives would have received (notes.py).
  "counterfactual": _SDPO | dict(counterfactual=dict(name="notes")),
  # GRPO as SDPO's paper runs it: no standard deviation, token mean, asymmetric clip.
  "grpo": _GRPO,
  # GRPO as first published, arXiv 2402.03300.
  "grpo_std": _GRPO
  | dict(
    advantage=_NORMALIZED,
    surrogate=_SYMMETRIC_CLIP,
    reduction=dict(name="sequence_mean"),
  ),
  # DAPO, arXiv 2503.14476, without its dynamic sampling.
  "dapo": _GRPO | dict(advantage=_NORMALIZED),
  # Dr.GRPO, arXiv 2503.20783.
  "dr_grpo": _GRPO
  | dict(surrogate=_SYMMETRIC_CLIP, reduction=dict(name="constant", length=8192.0)),
  # GSPO, arXiv 2507.18071.
  "gspo": _GRPO
  | dict(advantage=_NORMALIZED, surrogate=dict(name="gspo"), reduction=dict(name="sequence_mean")),
  # CISPO, arXiv 2506.13585.
  "cispo": _GRPO | dict(advantage=_NORMALIZED, surrogate=dict(name="cispo")),
}
# A row carries its name, so that config.json and reports show it.
METHODS = {name: dict(row, name=name) for name, row in METHODS.items()}
