r"""SDPO and GRPO on TinyCode at the default difficulty, five seeds each.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/tinycode_seeds.py --workdir=runs/tinycode_seeds --jobs=2
Cost:   about 52 CPU minutes.
Result: results/tinycode_seeds/curves.json. Held-out avg@4, mean of five seeds (lowest to highest): base model 38.5 %; SDPO 91.0 % (86.0 to 96.3), GRPO
        52.4 % (43.2 to 59.8) after 15,360 responses each; SDPO after 3,840: 58.7 % (50.0 to 65.5).
"""


def get_grid():
  return {
    f"{method}_seed{seed}": [f"--config=configs/tinycode.py:method={method},seed={seed}"]
    for seed in range(5)
    for method in ("sdpo", "grpo")
  }
