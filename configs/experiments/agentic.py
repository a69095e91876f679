r"""Compares CRAFT, what it is compared with, and feedback turn by turn, in the household.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/agentic.py \
          --workdir=runs/agentic_grid --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/agentic.py:local \
          --workdir=runs/agentic_local
Grid:   the arms of ARMS, three seeds, 150 steps of 64 episodes each. SDPO's teacher, SDAR's and
        CRAFT's read the skill; `sdpo_turns`, `ocsd` and `hero` what their rows say; `demonstration`
        the whole way to the goal, and `random_skill` lines about other words: these two must fail.
        The tiny model writes no JSON: `hero` is asked for its hints, has none, and learns nothing.
Tuning: two learning rates an arm on one seed of its own, half the steps each (75 of 150), judged on
        the split tune at their end.
End:    the last checkpoints play 200 tasks of heldout and of unseen, whose templates no other
        split has, twice each.
Cost:   meant for 90 minutes a seed on two cores: not measured.
Result: none yet.
"""

SUITES = "configs/eval/agentic.py"

# arm: the arguments of configs/agentic.py, and what else differs
ARMS = {
  "grpo": ("method=grpo", ()),
  "grpo_opsd": ("method=grpo_opsd", ()),
  "skill_sd": ("method=skill_sd", ()),
  "rlsd": ("method=rlsd", ()),
  "sdar": ("method=sdar", ()),
  "adaptive_cringe": ("method=adaptive_cringe", ()),
  "craft": ("method=craft", ()),
  "craft_reversed": ("method=craft_reversed", ()),
  "craft_distil": ("method=craft_distil", ()),
  "craft_cti": ("method=craft_cti", ()),
  "craft_balance": ("method=craft_balance", ()),
  "craft_polarised": ("method=craft_polarised", ()),
  "craft_fallback": ("method=craft_fallback", ()),
  "craft_swapped": ("method=craft_swapped", ()),
  "sdpo": ("method=sdpo", ()),
  "sdpo_turns": ("method=sdpo_turns", ()),
  "ocsd": ("method=ocsd", ()),
  "hero": ("method=hero", ()),
  "demonstration": ("method=opsd,context=row", ()),
  "random_skill": ("method=sdpo", ("--config.env.skill=random",)),
}
RATES = (5e-4, 1.5e-3)
SEEDS = range(3)
TUNING_SEED = 100


def _arguments(arm: str, more: str) -> list[str]:
  settings, changes = ARMS[arm]
  return [f"--config=configs/agentic.py:{settings},{more}", f"--config.label={arm}", *changes]


def get_tuning():
  return {arm: {f"lr_{rate:g}": _trial(arm, rate) for rate in RATES} for arm in ARMS}


def _trial(arm: str, rate: float) -> list[str]:
  """Returns the arguments of a trial; it is evaluated at its end alone."""
  return [
    *_arguments(arm, f"seed={TUNING_SEED}"),
    f"--config.optimizer.lr={rate:g}",
    "--config.total_steps=75",
    "--config.eval.splits=()",
    "--config.eval.final_splits=('tune',)",
  ]


def get_grid(chosen):
  return {
    f"{arm}_seed{seed}": [
      *_arguments(arm, f"seed={seed}"),
      *(x for x in chosen[arm] if x.startswith("--config.optimizer.lr=")),
    ]
    for seed in SEEDS
    for arm in ARMS
  }


def get_local():
  return {arm: _arguments(arm, "local") for arm in ARMS}
