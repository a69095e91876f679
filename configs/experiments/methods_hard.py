r"""Compares five rows of METHODS, one of each family, on TinyCode's hard level.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/methods_hard.py \
          --workdir=runs/methods_hard --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/methods_hard.py:local \
          --workdir=runs/methods_hard_local
Grid:   SDPO, SDPO weighed by its question's spread, one routed by the outcome, one that moves the
        advantage of each token, and the reward alone; three seeds, 240 steps of 64 responses.
        Before it, two learning rates an arm on one seed of its own, judged on the split tune at
        their end, as in methods.py. All else is configs/tinycode.py:level=hard.
End:    the last checkpoints answer 100 questions of each split 16 times at temperature 1, and once
        greedily.
Cost:   0.6 CPU hours with its trials, 44 to 84 s a run on one core beside another.
Result: held-out avg@4 at the end, from 3 % of the base model: srpo 55, sdpo 29, the others, which
        learn from rewards or weigh questions by their spread, 1 and less. A reward that comes in
        one of forty attempts teaches nothing here. SRPO above SDPO: +26 points [-11, 71] held out,
        +34 [7, 67] on unseen compositions, in each of three seeds.
"""

SUITES = "configs/eval/tinycode.py:level=hard"

ROWS = ("sdpo", "sc_sdpo", "srpo", "rlsd", "grpo")
RATES = (5e-4, 1.5e-3)
SEEDS = range(3)
TUNING_SEED = 100


def get_tuning():
  return {arm: {f"lr_{rate:g}": _trial(arm, rate) for rate in RATES} for arm in ROWS}


def _trial(arm: str, rate: float) -> list[str]:
  """Returns the arguments of a trial; it is evaluated at its end alone."""
  return [
    f"--config=configs/tinycode.py:method={arm},level=hard,seed={TUNING_SEED}",
    f"--config.optimizer.lr={rate:g}",
    "--config.eval.splits=()",
    "--config.eval.final_splits=('tune',)",
  ]


def get_grid(chosen):
  return {
    f"{arm}_seed{seed}": [
      f"--config=configs/tinycode.py:method={arm},level=hard,seed={seed}",
      *(x for x in chosen[arm] if x.startswith("--config.optimizer.lr=")),
      "--config.eval.every_steps=60",
    ]
    for seed in SEEDS
    for arm in ROWS
  }


def get_local():
  return {arm: [f"--config=configs/tinycode.py:method={arm},level=hard,local"] for arm in ROWS}
