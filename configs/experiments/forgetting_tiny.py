r"""Teaches TinyCode's novel words in four groups, one after another: what is forgotten?

Run:    python -m sdpo_jax.experiment --config=configs/experiments/forgetting_tiny.py \
          --workdir=runs/forgetting_tiny --results=results/forgetting_tiny --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/forgetting_tiny.py:local \
          --workdir=runs/forgetting_tiny_local
Grid:   SDPO, SDPO with a frozen teacher, GRPO; three seeds, four stages of 60 steps with 64
        responses each, a constant learning rate. All else is configs/tinycode.py: GRPO has a third
        of SDPO's learning rate (5e-4) and groups of 8; the "slow" arms are SDPO at GRPO's rate.
        Nothing is tuned.
Look:   after each stage the policy is asked about every group (stage_1 to stage_4), and about all
        words together (heldout).
Cost:   0.8 CPU hours for the 15 runs; 118 to 427 s a run on one core, the longest beside other
        work.
Result: every arm forgets, and the rate is not what makes the difference. At the end SDPO has lost
        89 % of the best that it knew of the earlier groups, with a frozen teacher 99 %, GRPO 60 %;
        SDPO at GRPO's rate 87 %, with a frozen teacher 92 %: GRPO forgets less than the latter (33
        points [8, 81]), which against SDPO cannot be told. GRPO also had learnt less to lose, and
        has groups of 8 and half the questions. A group has 9 to 15 different statements, so single
        runs move in steps of about 10 points. Held-out accuracy tells no arms apart.
"""

RUN_S = 180.0
STAGES = 4
STEPS = 60  # of a stage
SEEDS = range(3)
ARMS = {
  "sdpo": ("sdpo", ()),
  "frozen": ("sdpo", ("--config.label=frozen", "--config.method.teacher_weights.name=frozen")),
  "grpo": ("grpo", ()),
  "sdpo_slow": ("sdpo", ("--config.label=sdpo_slow", "--config.optimizer.lr=5e-4")),
  "frozen_slow": (
    "sdpo",
    (
      "--config.label=frozen_slow",
      "--config.optimizer.lr=5e-4",
      "--config.method.teacher_weights.name=frozen",
    ),
  ),
}
QUESTIONS = {"sdpo": 16, "grpo": 8}  # of a step, as configs/tinycode.py has them
SPLITS = ("heldout", *(f"stage_{i + 1}" for i in range(STAGES)))


def _arguments(arm: str, more: str, steps: int) -> list[str]:
  """Returns the arguments of a run whose stages have so many steps."""
  row, changes = ARMS[arm]
  return [
    f"--config=configs/tinycode.py:method={row},{more}",
    f"--config.env.stages={STAGES}",
    f"--config.env.stage_questions={steps * QUESTIONS[row]}",
    f"--config.eval.splits={SPLITS}",
    f"--config.eval.final_splits={SPLITS}",
    "--config.optimizer.decay_steps=0",
    *changes,
  ]


def get_grid():
  return {
    f"{arm}_seed{seed}": [
      *_arguments(arm, f"seed={seed}", STEPS),
      f"--config.total_steps={STAGES * STEPS}",
      f"--config.eval.every_steps={STEPS}",
    ]
    for seed in SEEDS
    for arm in ARMS
  }


def get_local():
  return {arm: _arguments(arm, "local", 1) for arm in ARMS}
