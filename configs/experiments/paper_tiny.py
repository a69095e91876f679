r"""Takes SDPO apart on TinyCode: each of its choices changed alone, and the controls beside GRPO.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/paper_tiny.py \
          --workdir=runs/paper_tiny --results=results/paper_tiny --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/paper_tiny.py:local \
          --workdir=runs/paper_tiny_local
Grid:   the arms of ARMS, five seeds of 240 steps with 64 responses each. All else is
        configs/tinycode.py. Two learning rates an arm on one seed of its own, judged on the split
        tune at their end. Rows of methods.py, and the seeds that it has run, are taken from its
        results.
Arms:   granularity (all tokens of the vocabulary; the sampled ones, by JSD in `opd_plus`, by
        reverse KL in `sampled_token` and, weighed by their place, in `position`; whole responses,
        which take reverse KL), divergence (Jensen-Shannon, either KL, the top 20 tokens), the
        teacher's weights (two moving averages, frozen, live), its context (both, solutions alone,
        feedback alone, the own attempt beside them), the share of the reward (none, .5, .9, and
        all: `rewards_alone` has SDPO's groups of 4 and its falling rate), and rewards that a
        teacher spreads over tokens. `mopd` and `drift` read solutions alone, `drift` over 512
        questions again and again: `solutions_alone` and `solutions_repeated` are SDPO under the
        same conditions, as `rewards_alone` is GRPO under those of `dgrpo` and `h2sd`. `grpo` has
        the settings that suit rewards better: groups of 8, a constant rate. Three controls differ
        from it in one thing: four updates a batch; supervised training on its own filtered
        successes (a bonus in the advantage, on policy the same gradient); a moving average of
        itself that holds it.
End:    the last checkpoints answer 100 questions of each split 16 times at temperature 1, and once
        greedily.
Cost:   75 s a run on one core by the runs of methods.py: 3.5 CPU hours with nothing taken over.
Result: none yet.
"""

SUITES = "configs/eval/tinycode.py"
REUSED = ("results/methods",)
RUN_S = 75.0

RATES = (5e-4, 1.5e-3)
SEEDS = range(5)
TUNING_SEED = 100

_SIGNAL = "--config.method.token_signal."
_CONTEXT = "--config.method.teacher_context."
_WEIGHTS = "--config.method.teacher_weights."
# as a row of the reward alone has them
_LIKE_GRPO = (
  "--config.rollout.questions=8",
  "--config.rollout.group=8",
  "--config.optimizer.decay_steps=0",
)
_LIKE_SDPO = (
  "--config.rollout.questions=16",
  "--config.rollout.group=4",
  "--config.optimizer.decay_steps=240",
)
# arm: its row, and what differs from it
ARMS = {
  "sdpo": ("sdpo", ()),
  "opd_plus": ("opd_plus", ()),
  "sampled_token": ("opd_plus", (f"{_SIGNAL}alpha=1.0",)),
  "position": ("position", ()),
  "whole_responses": ("sdpo", (f"{_SIGNAL}name=sequence",)),
  "sdpo_forward_kl": ("sdpo_forward_kl", ()),
  "reverse_kl": ("sdpo", (f"{_SIGNAL}alpha=1.0",)),
  "top_20": ("sdpo", (f"{_SIGNAL}top_k=20",)),
  "ema_0.05": ("sdpo", (f"{_WEIGHTS}rate=0.05",)),
  "frozen": ("sdpo", (f"{_WEIGHTS}name=frozen",)),
  "live": ("sdpo", (f"{_WEIGHTS}name=live",)),
  "solutions_alone": ("sdpo", (f"{_CONTEXT}feedback=never",)),
  "feedback_alone": ("sdpo", (f"{_CONTEXT}use_solution=False",)),
  "attempt_shown": ("sdpo", (f"{_CONTEXT}show_attempt=True",)),
  "blend_0.5": ("sdpo_blend", ("--config.method.policy_share=0.5",)),
  "sdpo_blend": ("sdpo_blend", ()),
  "mopd": ("mopd", ()),
  "drift": ("drift", ()),
  "solutions_repeated": (
    "sdpo",
    (f"{_CONTEXT}feedback=never", "--config.data.questions=512"),
  ),
  "dgrpo": ("dgrpo", ()),
  "h2sd": ("h2sd", ()),
  "rlsd": ("rlsd", ()),
  "rlrt": ("rlrt", ()),
  "rewards_alone": ("grpo", _LIKE_SDPO),
  "grpo": ("grpo", ()),
  "four_updates": ("grpo", ("--config.train.updates_per_batch=4",)),
  "filtered_successes": ("grpo", ("--config.method.advantage.success_bonus=0.5",)),
  "ema_anchor": (
    "sdpo_blend",
    (f"{_CONTEXT}name=question_alone", f"{_SIGNAL}alpha=1.0", *_LIKE_GRPO),
  ),
}


def _arguments(arm: str, more: str) -> list[str]:
  row, changes = ARMS[arm]
  label = [f"--config.label={arm}"] if changes else []
  return [f"--config=configs/tinycode.py:method={row},{more}", *label, *changes]


def get_tuning():
  return {arm: {f"lr_{rate:g}": _trial(arm, rate) for rate in RATES} for arm in ARMS}


def _trial(arm: str, rate: float) -> list[str]:
  """Returns the arguments of a trial; it is evaluated at its end alone."""
  return [
    *_arguments(arm, f"seed={TUNING_SEED}"),
    f"--config.optimizer.lr={rate:g}",
    "--config.eval.splits=()",
    "--config.eval.final_splits=('tune',)",
  ]


def get_grid(chosen):
  return {
    f"{arm}_seed{seed}": [
      *_arguments(arm, f"seed={seed}"),
      *(x for x in chosen[arm] if x.startswith("--config.optimizer.lr=")),
      "--config.eval.every_steps=60",
    ]
    for seed in SEEDS
    for arm in ARMS
  }


def get_local():
  return {arm: _arguments(arm, "local") for arm in ARMS}
