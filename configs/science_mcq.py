r"""Trains on science questions with four choices (SciKnowEval), without feedback.

The teacher reads another rollout's correct answer.

Run:    python -m sdpo_jax.main --config=configs/science_mcq.py:subject=chemistry,model=qwen3-8b \
          --workdir=runs/chemistry
Other:  python -m sdpo_jax.main --config=configs/science_mcq.py:subject=physics,method=grpo,seed=1 \
          --workdir=runs/physics_grpo
        GRPO has four updates a batch, the paper's default. Its on-policy form is one update at ten
        times the rate:
        python -m sdpo_jax.main --config=configs/science_mcq.py:method=grpo \
          --config.optimizer.lr=1e-5 \
          --config.train.updates_per_batch=1 --config.train.micro_batches=32
Smoke:  python -m sdpo_jax.main --config=configs/science_mcq.py:local --workdir=runs/science_smoke
Data:   data=DIR holds {biology,chemistry,material,physics}.{train,test}.jsonl in the row format of
        the paper's repository, lasgroup/SDPO; by default $SDPO_JAX_DATA/sciknoweval, or
        data/sciknoweval.
        top_k=0 takes the divergence over the whole vocabulary, by the fused kernel, instead of the
        paper's 100.
Cost:   the full run has not been measured.
Result: the full run has not been measured.
"""

import os

from sdpo_jax import config


def get_config(arg: str = ""):
  a = config.parse_arg(
    arg,
    subject="chemistry",
    data=os.path.join(os.environ.get("SDPO_JAX_DATA", "data"), "sciknoweval"),
    top_k=100,
    method="sdpo",
    model="qwen3-8b",
    seed=0,
    local=False,
  )
  c = config.paper(a, rich_feedback=False)
  c.env = dict(name="mcq")
  c.data.sources = (os.path.join(a.data, a.subject + ".{split}.jsonl"),)
  if a.local and "data" not in a.given:
    config.refuse(a, "subject", because=config.EXAMPLES)
    c.data.sources = (os.path.join(config.ROWS, "science_mcq.{split}.jsonl"),)
  return c
