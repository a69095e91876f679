r"""Compares counterfactual self-distillation, SDPO and GRPO at matched generated tokens.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/counterfactual.py \
          --workdir=runs/counterfactual_grid --jobs=2
Grid:   ten arms (configs/counterfactual.py), TinyCode and arithmetic, five seeds.
Cost:   TinyCode: 163 s (sdpo_extra) to 318 s (siblings) a run on one core of its own or with as
        much other work, up to 1,123 s in the worst hour. Most of it is compilation, of which
        JAX_COMPILATION_CACHE_DIR spares the shapes that an earlier run has used. Arithmetic: 91 s
        (grpo) to 253 s (counterfactual_imagined) likewise; the last runs, beside a test run, up to
        431 s.
Result: three seeds of seven arms so far: no arm is shown to beat plain SDPO, in either domain.
        RESULTS.md, counterfactual.
"""

ARMS = (
  "sdpo",
  "sdpo_extra",
  "counterfactual",
  "counterfactual_imagined",
  "counterfactual_siblings",
  "counterfactual_branches",
  "counterfactual_beams",
  "counterfactual_opposite",
  "grpo",
  "grpo_extra",
)


def get_grid():
  return {
    f"{domain}_{arm}_seed{seed}": [
      f"--config=configs/counterfactual.py:domain={domain},arm={arm},seed={seed}"
    ]
    for seed in range(5)
    for domain in ("tinycode", "arithmetic")
    for arm in ARMS
  }
