r"""Trains a small real model on mathematics and on code.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/small_model.py \
          --workdir=runs/small_model --results=results/small_model --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/small_model.py:local \
          --workdir=runs/small_model_local
Grid:   SDPO, GRPO and their blend on GSM8K and on MBPP; one seed, 15 steps of 48 responses. All
        else is configs/small_model.py, whose docstring says where the rows in data/ come from.
Before: the commands there that give what the model solves as it is, and what the diagnosis says.
Cost:   not measured.
Result: of the grid none yet. As it is, SmolLM2-135M-Instruct solves none of 100 questions of GSM8K
        in 8 attempts each: 99 % of its answers have no box, 75 % are cut off. Of MBPP it solves
        2.4 % [1.1, 3.9]. The diagnosis (400 responses, 11 minutes on one core) finds nothing to
        learn from in either: no group of mixed rewards among 16 questions, and a teacher whom
        feedback does not help. With the solution before it the model solves 12 % [4, 21] and 16 %
        [5, 28].
"""

ARMS = ("sdpo", "grpo", "sdpo_blend")
TASKS = ("gsm8k", "mbpp")


def get_grid():
  return {
    f"{arm}_on_{task}_seed0": [
      f"--config=configs/small_model.py:task={task},data=data/{task}.{{split}}.jsonl,"
      f"method={arm},seed=0"
    ]
    for task in TASKS
    for arm in ARMS
  }


def get_local():
  return {
    f"{arm}_on_{task}": [f"--config=configs/small_model.py:task={task},method={arm},local"]
    for task in TASKS
    for arm in ARMS
  }
