r"""Trains on TinyCode for 1,000 steps, four times as long as elsewhere: who collapses?

Run:    python -m sdpo_jax.experiment --config=configs/experiments/long_tiny.py \
          --workdir=runs/long_tiny --results=results/long_tiny --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/long_tiny.py:local \
          --workdir=runs/long_tiny_local
Grid:   SDPO, SDPO with a gated teacher (schedules.py compares nine), GRPO; three seeds. All else is
        configs/tinycode.py at a constant learning rate: what steps that grow smaller would save
        must show. Nothing is tuned.
Look:   which runs fall below their own best evaluation and when, and how many steps earlier a sign
        of collapse was seen (`warned` in curves.json).
Cost:   380 s a run on one core by the runs of methods.py: about 1 CPU hour.
Result: none yet.
"""

SUITES = "configs/eval/tinycode.py"
RUN_S = 380.0
STEPS = 1000
SEEDS = range(3)
ARMS = {
  "sdpo": ("sdpo", ()),
  "gated": ("sdpo", ("--config.label=gated", "--config.method.teacher_weights.name=gated")),
  "grpo": ("grpo", ()),
}


def _arguments(arm: str, more: str) -> list[str]:
  row, changes = ARMS[arm]
  return [f"--config=configs/tinycode.py:method={row},{more}", *changes]


def get_grid():
  return {
    f"{arm}_seed{seed}": [
      *_arguments(arm, f"seed={seed}"),
      f"--config.total_steps={STEPS}",
      "--config.optimizer.decay_steps=0",
      "--config.eval.every_steps=100",
    ]
    for seed in SEEDS
    for arm in ARMS
  }


def get_local():
  return {arm: _arguments(arm, "local") for arm in ARMS}
