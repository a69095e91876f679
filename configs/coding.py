r"""Trains on code problems with execution feedback.

The teacher reads what the judge said, or another rollout's program that passed.

Run:    python -m sdpo_jax.main --config=configs/coding.py:model=qwen3-8b \
          --workdir=runs/livecodebench
Other:  python -m sdpo_jax.main --config=configs/coding.py:tasks=mbpp,method=grpo,seed=1 \
          --workdir=runs/mbpp_grpo
Smoke:  python -m sdpo_jax.main --config=configs/coding.py:local --workdir=runs/coding_smoke
Data:   tasks=livecodebench (v6, 2025-02-01 to 2025-05-01: 131 questions in the paper) or mbpp, from
        the hub; data= names another source for the training and the test split.
        Of livecodebench, training sees a random half of each question's tests, evaluation all.
        mbpp trains on its train split and evaluates on its test split and on HumanEval.
        Rows whose tests are no plain asserts, and too long questions, are left out and counted as
        data/skipped_rows.
Cost:   the full run has not been measured.
Result: the full run has not been measured.
"""

import os

from sdpo_jax import config

MBPP = "hub:google-research-datasets/mbpp:sanitized"
SOURCES = {
  "livecodebench": ("hub:livecodebench/code_generation_lite/test6.jsonl",),
  "mbpp": (
    f"train={MBPP}:train",
    f"test={MBPP}:test",
    "humaneval=hub:openai/openai_humaneval::test",
  ),
}


def get_config(arg: str = ""):
  a = config.parse_arg(
    arg,
    tasks="livecodebench",
    data="",
    top_k=20,
    method="sdpo",
    model="qwen3-8b",
    seed=0,
    local=False,
  )
  if a.tasks not in SOURCES:
    raise ValueError(f"tasks={a.tasks!r} is unknown; choose from {sorted(SOURCES)}")
  c = config.paper(a, rich_feedback=True)
  c.env = dict(name="coding")
  c.data.sources = SOURCES[a.tasks]
  c.data.on_bad_row = "skip"
  if a.tasks == "livecodebench":
    c.env.update(first_date="2025-02-01", last_date="2025-05-01")
  else:
    c.eval.final_splits = ("test", "humaneval")
  if a.local and not a.data:
    config.refuse(a, "tasks", because=config.EXAMPLES)
  if a.data or a.local:
    c.data.sources = (a.data or os.path.join(config.ROWS, "coding.{split}.jsonl"),)
    c.eval.final_splits = ("test",)
  c.sandbox.workers = 1 if a.local else 16
  c.rollout.update(judge_threads=2 if a.local else 16, judge_timeout_s=300.0)
  return c
