"""METHODS: a method is a row of parts. New method = new row, and at most one new function in one table.

axis             what it decides                                                     table
teacher_context  what the teacher reads (host: text)                                 teacher_context.TEACHER_CONTEXTS
teacher_weights  which weights teach: live, ema, trust_region, frozen, none          TEACHER_WEIGHTS, applied by train_step
token_signal     what a re-scored token contributes                                  divergence.TOKEN_SIGNALS
token_weight     a detached factor on it                                             token_weight.TOKEN_WEIGHTS
advantage        the baseline of the rewards of a group (host: numpy)                advantage.ADVANTAGES
surrogate        the policy-gradient term that uses the advantage                    advantage.SURROGATES
reduction        how the tokens of that term add up                                  advantage.REDUCTIONS
counterfactual   what failed responses also learn from what might have been          counterfactual.COUNTERFACTUALS
policy_share     the blend: policy_share * surrogate + (1 - policy_share) * token_signal (arXiv 2601.20802); or "untaught": responses with
                 a teacher get the token signal, the others the surrogate

SDPO and GRPO differ in what stands in their rows and in nothing else. A row names what its method is about; `row` adds every other argument
of its parts with its default, so that a run's settings are all visible and can all be changed.
"""

_SDPO = dict(
  teacher_context=dict(name="feedback_or_solution"),
  teacher_weights=dict(name="ema", rate=0.05),
  token_signal=dict(name="divergence", alpha=0.5),
  token_weight=dict(name="importance", is_clip=2.0, rollout_is_clip=2.0),
  advantage=dict(name="zero"),
  surrogate=dict(name="none"),
  reduction=dict(name="token_mean"),
  counterfactual=dict(name="none"),
  policy_share=0.0,
)


_GRPO = dict(
  teacher_context=dict(name="none"),
  teacher_weights=dict(name="none"),
  token_signal=dict(name="none"),
  token_weight=dict(name="uniform"),
  advantage=dict(name="group_mean", normalize_std=False),
  surrogate=dict(name="clipped", low=0.2, high=0.28, rollout_is_clip=2.0),
  reduction=dict(name="token_mean"),
  counterfactual=dict(name="none"),
  policy_share=1.0,
)


_STD = dict(name="group_mean", normalize_std=True)


METHODS = {
  name: dict(row, name=name)
  for name, row in {
    "sdpo": _SDPO,
    # lambda of arXiv 2601.20802
    "sdpo_blend": _SDPO
    | {k: _GRPO[k] for k in ("advantage", "surrogate")}
    | dict(policy_share=0.9),
    # arXiv 2601.18734
    "opsd": _SDPO
    | dict(
      teacher_context=dict(name="reference_solution"),
      teacher_weights=dict(name="frozen"),
      token_signal=dict(name="divergence", alpha=0.5, clip=0.05),
      token_weight=dict(name="uniform"),
    ),
    # 2604.02288
    "srpo": _SDPO
    | {k: _GRPO[k] for k in ("advantage", "surrogate")}
    | dict(
      policy_share="untaught",
      teacher_context=dict(name="feedback_or_solution", only_failures=True),
      token_weight=dict(name="certainty", is_clip=2.0, rollout_is_clip=2.0),
    ),
    # 2605.27765
    "sc_sdpo": _SDPO
    | dict(
      advantage=dict(name="question_spread"),
      token_weight=dict(name="importance", is_clip=2.0, rollout_is_clip=2.0, by_question=True),
    ),
    "counterfactual": _SDPO | dict(counterfactual=dict(name="notes")),
    # SDPO's baseline: no std, token mean
    "grpo": _GRPO,
    # 2402.03300
    "grpo_std": _GRPO
    | dict(
      advantage=_STD,
      surrogate=dict(name="clipped", low=0.2, high=0.2),
      reduction=dict(name="sequence_mean"),
    ),
    # 2503.14476 without its dynamic sampling
    "dapo": _GRPO | dict(advantage=_STD),
    # 2503.20783
    "dr_grpo": _GRPO
    | dict(
      surrogate=dict(name="clipped", low=0.2, high=0.2),
      reduction=dict(name="constant", length=8192.0),
    ),
    # 2507.18071
    "gspo": _GRPO
    | dict(advantage=_STD, surrogate=dict(name="gspo"), reduction=dict(name="sequence_mean")),
    # 2506.13585
    "cispo": _GRPO | dict(advantage=_STD, surrogate=dict(name="cispo")),
  }.items()
}
