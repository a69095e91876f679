r"""Compares methods on the real task: SmolLM2-135M learns short instructions, three seeds an arm.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/instructions.py \
          --workdir=runs/instructions --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/instructions.py:local \
          --workdir=runs/instructions_local
Grid:   four arms, three seeds, 30 steps of 48 responses each. All else is
        configs/instructions.py, and nothing is tuned: every arm has its learning rate.
Before: python -m sdpo_jax.main --mode=diagnose --workdir=runs/diagnosis_instructions \
          --config=configs/instructions.py:method=sdpo
        What it said is in results/diagnose, from before any of these runs.
End:    the last checkpoints answer 100 questions of each of the task's splits twice.
Cost:   meant for half an hour a run on two cores: not measured.
Result: none yet.
"""

SUITES = "configs/eval/instructions.py:transfer=false"

# arm: its row of METHODS, and what else differs from configs/instructions.py
ARMS = {
  "grpo": ("grpo", ()),
  "sdpo": ("sdpo", ()),
  "sdpo_frozen": ("sdpo", ("--config.method.teacher_weights.name=frozen",)),
  "sdpo_blend": ("sdpo_blend", ()),
}
SEEDS = range(3)


def _arguments(arm: str, seed: int, *, local: bool = False) -> list[str]:
  method, changes = ARMS[arm]
  file = f"configs/instructions.py:method={method},seed={seed}"
  file = f"{file},local" if local else file
  return [f"--config={file}", f"--config.label={arm}", *changes]


def get_grid():
  return {f"{arm}_seed{seed}": _arguments(arm, seed) for seed in SEEDS for arm in ARMS}


def get_local():
  return {arm: _arguments(arm, 0, local=True) for arm in ARMS}
