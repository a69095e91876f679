r"""SDPO and GRPO on TinyCode at the default difficulty, five seeds each.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/tinycode_seeds.py --workdir=runs/tinycode_seeds --jobs=2
"""


def get_grid():
  return {f"{method}_seed{seed}": [f"--config=configs/tinycode.py:method={method},seed={seed}"] for seed in range(5) for method in ("sdpo", "grpo")}
