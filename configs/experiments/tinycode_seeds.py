r"""Compares SDPO and GRPO on TinyCode at the default difficulty, with five seeds each.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/tinycode_seeds.py \
          --workdir=runs/tinycode_seeds --jobs=2
Cost:   about 52 CPU minutes.
Result: held-out avg@4, base model 38.5 %: SDPO 91.0 %, GRPO 52.4 %, means of the seeds after 15,360
        responses each. RESULTS.md, tinycode_seeds.
"""


def get_grid():
  return {
    f"{method}_seed{seed}": [f"--config=configs/tinycode.py:method={method},seed={seed}"]
    for seed in range(5)
    for method in ("sdpo", "grpo")
  }
