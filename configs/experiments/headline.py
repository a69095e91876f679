r"""Compares SDPO and GRPO on TinyCode with learning rates that were tuned apart.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/headline.py \
          --workdir=runs/headline --jobs=2
Grid:   two arms, five seeds. Before it, four learning rates an arm on two seeds of their own,
        judged on the split tune at their end alone. Trials are as long as the reported runs, since
        a shorter one would favour higher rates.
Rates:  one grid for both arms, so that neither gets the finer one. It holds the rate that each had
        before (SDPO 1.5e-3, GRPO 5e-4), with at least one lower and one higher beside it.
End:    the last checkpoints answer 100 questions of each split 16 times at temperature 1, and once
        greedily.
Cost:   80 minutes on two cores that other work shared, of which 5 are the last evaluations: less
        than 2.7 CPU hours for 26 runs.
Result: held-out avg@16: SDPO 89.7 % [83.2, 95.6], GRPO 50.6 % [40.3, 60.6]; as good as GRPO's last
        after 0.26 [0.24, 0.57] of its generations. RESULTS.md, headline.
"""

SUITES = "configs/eval/tinycode.py"

ARMS = ("sdpo", "grpo")
RATES = (2.5e-4, 5e-4, 1.5e-3, 3e-3)
SEEDS = range(5)
TUNING_SEEDS = (100, 101)


def get_tuning():
  return {arm: {f"lr_{rate:g}": _trial(arm, rate) for rate in RATES} for arm in ARMS}


def _trial(arm: str, rate: float) -> list[list[str]]:
  """Returns the arguments of a trial, for each seed; it is evaluated at its end alone."""
  return [
    [
      f"--config=configs/tinycode.py:method={arm},seed={seed}",
      f"--config.optimizer.lr={rate:g}",
      "--config.eval.splits=()",
      "--config.eval.final_splits=('tune',)",
    ]
    for seed in TUNING_SEEDS
  ]


def get_grid(chosen):
  return {
    f"{arm}_seed{seed}": [
      f"--config=configs/tinycode.py:method={arm},seed={seed}",
      *(x for x in chosen[arm] if x.startswith("--config.optimizer.lr=")),
    ]
    for seed in SEEDS
    for arm in ARMS
  }
