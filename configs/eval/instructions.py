r"""Measures a model on its own instructions, and on what training on them may carry over to.

Compare the checkpoint with the model that it began from, by the same command for both.

Run:    python -m sdpo_jax.main --mode=eval --config=configs/instructions.py \
          --checkpoint=runs/instructions --suites=configs/eval/instructions.py \
          --workdir=runs/instructions_eval
Other:  the task's own splits alone, without data:
        --suites=configs/eval/instructions.py:transfer=false
Data:   data=DIR, by default $SDPO_JAX_DATA or data, holds
          ifeval.jsonl        the 541 rows of IFEval
          gsm8k.test.jsonl    rows of GSM8K: grade-school mathematics
questions=N takes N of each set, those of a file spread evenly. The task's splits are sampled as in
training and read by the base model too; the others are answered greedily, one answer a question.
"""

import os

from sdpo_jax import config


def get_suites(arg: str = ""):
  a = config.parse_arg(
    arg,
    data=os.environ.get("SDPO_JAX_DATA", "data"),
    questions=100,
    samples=2,
    transfer=True,
    local=False,
  )
  own = {
    "env": {"name": "instructions"},
    "splits": ("heldout", "unseen", "adversarial"),
    "questions": a.questions,
    "samples": a.samples,
    "temperature": 0.7,
    "top_p": 1.0,
    "keep_texts": True,
    "base_logp": True,
  }
  if not a.transfer:
    config.refuse(a, "data", because="transfer=false reads no files")
    return {"instructions": own}
  return {
    "instructions": own,
    "ifeval": _greedy(a, "ifeval", "ifeval.jsonl", max_new_tokens=256),
    "gsm8k": _greedy(a, "math_qa", "gsm8k.test.jsonl", max_new_tokens=256),
  }


def _greedy(a, env: str, file: str, *, max_new_tokens: int) -> dict:
  rollout, data = {"max_new_tokens": max_new_tokens}, {"max_prompt_tokens": 1024}
  if a.local:  # same path, toy sizes; the tiny model reads byte by byte
    rollout["max_new_tokens"] = 16
    data.update(max_prompt_tokens=1000, on_bad_row="skip")
  return {
    "env": {"name": env},
    "data": data | {"sources": (f"test={os.path.join(a.data, file)}",)},
    "rollout": rollout,
    "splits": ("test",),
    "questions": a.questions,
    "samples": 1,
    "temperature": 0.0,
    "top_p": 1.0,
    "keep_texts": False,
    "base_logp": False,
  }
