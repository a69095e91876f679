r"""Compares the rows of METHODS but those of agents on TinyCode: two learning rates, three seeds.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/methods.py \
          --workdir=runs/methods --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/methods.py:local \
          --workdir=runs/methods_local
Grid:   the rows at TinyCode's default level, 240 steps of 64 responses. Before it, two learning
        rates an arm on one seed of its own, judged on the split tune at their end: the rates that
        headline.py found best for SDPO and for GRPO. All else is configs/tinycode.py, which gives
        rows whose loss is an advantage's alone (GRPO's kin and those with a credit) groups of 8 and
        a constant rate, others groups of 4 and a rate that falls.
End:    the last checkpoints answer 100 questions of each split 16 times at temperature 1, and once
        greedily.
Cost:   2.4 CPU hours for 87 runs, 40 to 175 s a run on one core beside another; the 58 trials took
        1.5 hours before.
Result: held-out avg@4 at the end, means of three seeds: h2sd 94.9 %, sdpo 91.5, counterfactual
        86.1, srpo 86.0, sdpo_forward_kl 85.8, dgrpo 72.5, opd_plus 67.2; grpo 52.4, of the rows of
        the reward alone dapo 56.4 and grpo_std 30.7; opsd and rlrt stay at the base model's 38.8,
        mopd falls to 26.8 and crisp, which asks for short answers and has no reward, to 1.0.
        H2SD's teacher reads the reference solution. Five rows with a divergence to a teacher are
        at 85 and more; credits that spread a reward are at 45 to 53 (rlsd, cscr, anti_sd), but so
        are two with a divergence, sdpo_blend 51 and sc_sdpo 44. One trial a rate on one seed chose
        badly for grpo_std and gspo: seed 0 of each collapsed at 1.5e-3. On policy gspo is
        grpo_std, and cispo dapo, bit for bit; drift_gate's rhythm, made for longer answers than
        nine tokens, changes nothing here.
"""

from sdpo_jax.objectives import build
from sdpo_jax.objectives.methods import METHODS

SUITES = "configs/eval/tinycode.py"

RATES = (5e-4, 1.5e-3)
SEEDS = range(3)
TUNING_SEED = 100
# those of episodes have an experiment of their own
ROWS = [
  name
  for name, row in METHODS.items()
  if not build.reads_turns(row) and row["balance"]["name"] == "none"
]


def get_tuning():
  return {arm: {f"lr_{rate:g}": _trial(arm, rate) for rate in RATES} for arm in ROWS}


def _trial(arm: str, rate: float) -> list[str]:
  """Returns the arguments of a trial; it is evaluated at its end alone."""
  return [
    f"--config=configs/tinycode.py:method={arm},seed={TUNING_SEED}",
    f"--config.optimizer.lr={rate:g}",
    "--config.eval.splits=()",
    "--config.eval.final_splits=('tune',)",
  ]


def get_grid(chosen):
  return {
    f"{arm}_seed{seed}": [
      f"--config=configs/tinycode.py:method={arm},seed={seed}",
      *(x for x in chosen[arm] if x.startswith("--config.optimizer.lr=")),
      "--config.eval.every_steps=60",
    ]
    for seed in SEEDS
    for arm in ROWS
  }


def get_local():
  return {arm: [f"--config=configs/tinycode.py:method={arm},local"] for arm in ROWS}
