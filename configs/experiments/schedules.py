r"""Trains SDPO on TinyCode for 600 steps under nine schedules of the teacher's weights.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/schedules.py \
          --workdir=runs/schedules --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/schedules.py:local \
          --workdir=runs/schedules_local
Grid:   nine schedules, three seeds. All else is configs/tinycode.py with its settings for SDPO, at
        a constant learning rate: a teacher that runs away with the policy must not be saved by
        steps that grow smaller. Nothing is tuned for a schedule.
End:    the last checkpoints answer 100 questions of each split 16 times at temperature 1, and once
        greedily.
Look:   which runs collapse and when (eval/heldout/avg@k, train/reward, train/warnings), and how
        many steps earlier rollout/length_tail rose. control/teacher_weights tells when the teacher
        moved, control/gate_* what held the gated one.
Cost:   1.9 CPU hours for the 27 runs, 132 to 650 s each on one core beside another: those that
        collapse write long answers.
Result: three seeds, held-out avg@4 at the end. The slower the teacher, the longer its policy lasts,
        and the one that never moves is best: frozen 98 %; gated 72 and ema_0.01 70, both below
        their best (82 and 95); every_50 13, ema_0.05 9, lag_matched_ema_50 8, restart_10 2,
        every_10 and every_1 0: all these collapsed in every seed. A copy of every step is lost by
        step 60 to 80, one of every 50 at 400 to 520. The length tail was seen 35 steps before 2 of
        the 16 collapses that could have shown it, and in 1 of 9 runs that lasted: in some runs
        answers grow long when all is lost. An evaluation that was worse came up to 240 steps before
        a collapse, but also in 7 of the 9 runs that lasted.
"""

SUITES = "configs/eval/tinycode.py"
RUN_S = 270.0

SCHEDULES = {
  "every_1": dict(name="every", period=1),
  "every_10": dict(name="every", period=10),
  "every_50": dict(name="every", period=50),
  "ema_0.01": dict(name="ema", rate=0.01),
  "ema_0.05": dict(name="ema", rate=0.05),
  "lag_matched_ema_50": dict(name="lag_matched_ema", period=50),
  "frozen": dict(name="frozen"),
  # a whole copy every 10 batches is every_10: this one moves as far as the faster average
  "restart_10": dict(name="restart", period=10, match_rate=0.05),
  "gated": dict(name="gated"),
}
STEPS = 600
SEEDS = range(3)


def get_grid():
  return {
    f"{name}_seed{seed}": [
      f"--config=configs/tinycode.py:method=sdpo,seed={seed}",
      f"--config.total_steps={STEPS}",
      "--config.optimizer.decay_steps=0",
      *_schedule(name),
    ]
    for seed in SEEDS
    for name in SCHEDULES
  }


def get_local():
  local = "--config=configs/tinycode.py:method=sdpo,local"
  return {name: [local, *_schedule(name)] for name in ("every_1", "gated")}


def _schedule(name: str) -> list[str]:
  settings = SCHEDULES[name]
  return [f"--config.method.teacher_weights.{key}={value}" for key, value in settings.items()]
