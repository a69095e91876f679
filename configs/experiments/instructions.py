r"""Compares methods on the real task: SmolLM2-135M learns short instructions, three seeds an arm.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/instructions.py \
          --workdir=runs/instructions --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/instructions.py:local \
          --workdir=runs/instructions_local
Grid:   the arms of ARMS, 40 steps of 48 responses each. rlrt reads another success of the group and
        cscr an instruction, so neither needs a reference solution, of which the task has none. All
        else is configs/instructions.py.
Tuning: two learning rates an arm on one seed of its own, judged on the split tune at their end.
        Trials have half the steps, which favours the higher rate; it is the same for all arms.
        Adapters have a grid of their own, ten times as high.
End:    the last checkpoints answer 100 questions of each of the task's splits twice.
Cost:   meant for half an hour a run and a quarter of an hour a trial on one core: not measured.
Result: none yet.
"""

SUITES = "configs/eval/instructions.py:transfer=false"

LORA = ("--config.model.lora.rank=16",)
# arm: its row of METHODS, and what else differs from configs/instructions.py
ARMS = {
  "grpo": ("grpo", ()),
  "sdpo": ("sdpo", ()),
  "sdpo_frozen": ("sdpo", ("--config.method.teacher_weights.name=frozen",)),
  "sdpo_blend": ("sdpo_blend", ()),
  "rlrt": ("rlrt", ()),
  "cscr": ("cscr", ()),
  "grpo_lora": ("grpo", LORA),
  "sdpo_blend_lora": ("sdpo_blend", LORA),
}
RATES = (1e-5, 3e-5)
LORA_RATES = (1e-4, 3e-4)
SEEDS = range(3)
TUNING_SEED = 100


def _arguments(arm: str, seed: int, *, local: bool = False) -> list[str]:
  method, changes = ARMS[arm]
  file = f"configs/instructions.py:method={method},seed={seed}"
  file = f"{file},local" if local else file
  return [f"--config={file}", f"--config.label={arm}", *changes]


def get_tuning():
  return {
    arm: {f"lr_{rate:g}": _trial(arm, rate) for rate in _rates(changes)}
    for arm, (_, changes) in ARMS.items()
  }


def _rates(changes: tuple[str, ...]) -> tuple[float, ...]:
  return LORA_RATES if changes == LORA else RATES


def _trial(arm: str, rate: float) -> list[str]:
  """Returns the arguments of a trial; it is evaluated before it and at its end alone."""
  return [
    *_arguments(arm, TUNING_SEED),
    f"--config.optimizer.lr={rate:g}",
    "--config.total_steps=20",
    "--config.eval.splits=()",
    "--config.eval.final_splits=('tune',)",
    "--config.eval.base_logp=False",
  ]


def get_grid(chosen):
  return {
    f"{arm}_seed{seed}": [
      *_arguments(arm, seed),
      *(x for x in chosen[arm] if x.startswith("--config.optimizer.lr=")),
    ]
    for seed in SEEDS
    for arm in ARMS
  }


def get_local():
  return {arm: _arguments(arm, 0, local=True) for arm in ARMS}
