r"""Counterfactual self-distillation, SDPO and GRPO on TinyCode and arithmetic at matched generated tokens: seven arms, two domains, three seeds.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/counterfactual.py --workdir=runs/counterfactual_grid --jobs=2
"""

ARMS = (
  "sdpo",
  "sdpo_extra",
  "counterfactual",
  "counterfactual_imagined",
  "counterfactual_siblings",
  "grpo",
  "grpo_extra",
)


def get_grid():
  return {
    f"{domain}_{arm}_seed{seed}": [
      f"--config=configs/counterfactual.py:domain={domain},arm={arm},seed={seed}"
    ]
    for seed in range(3)
    for domain in ("tinycode", "arithmetic")
    for arm in ARMS
  }
