r"""Trains on mathematics with one final answer, without feedback.

The questions are GSM8K, or any rows of its form or MATH's. The teacher reads another rollout's
correct answer.

Run:    python -m sdpo_jax.main --config=configs/math_qa.py:model=qwen3-8b --workdir=runs/gsm8k
Other:  python -m sdpo_jax.main --config=configs/math_qa.py:method=opsd,model=qwen3-1.7b \
          --workdir=runs/gsm8k_opsd
Smoke:  python -m sdpo_jax.main --config=configs/math_qa.py:local --workdir=runs/math_smoke
Data:   the hub's openai/gsm8k; data= names another source (data/tasks.py says which forms it can
        have) with the splits train and test.
        The paper trains no maths: these are its settings for science, with `method=opsd` for OPSD's
        (arXiv 2601.18734).
Cost:   the full run has not been measured.
Result: the full run has not been measured.
"""

import os

from sdpo_jax import config


def get_config(arg: str = ""):
  a = config.parse_arg(
    arg,
    data="hub:openai/gsm8k:main",
    top_k=100,
    method="sdpo",
    model="qwen3-8b",
    seed=0,
    local=False,
  )
  c = config.paper(a, rich_feedback=False)
  c.env = dict(name="math_qa")
  c.data.sources = (a.data,)
  if a.local and "data" not in a.given:
    c.data.sources = (os.path.join(config.ROWS, "math_qa.{split}.jsonl"),)
  return c
