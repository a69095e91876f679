r"""Measures what training on something else has cost: instructions, knowledge, open requests.

Compare the checkpoint with the model that it began from, by the same command for both.

Run:    python -m sdpo_jax.main --mode=eval --config=configs/science_mcq.py:model=qwen3-8b \
          --checkpoint=runs/chemistry --suites=configs/eval/forgetting.py:data=data/forgetting \
          --workdir=runs/chemistry_forgetting
Other:  with a judge behind an OpenAI-style server:
        --suites=configs/eval/forgetting.py:judge=qwen3-32b,url=http://127.0.0.1:8000/v1
Data:   data=DIR, by default $SDPO_JAX_DATA/forgetting or data/forgetting, holds
          ifeval.jsonl         rows of IFEval
          mmlu_pro.parquet     or .jsonl: rows of MMLU-Pro's split `test`
          chat.jsonl           {"prompt", "reference"}: requests, and what the model before training
                               answers; read with judge= alone
All answers are greedy, one a question. questions=N takes N of each set, spread evenly.
"""

import os

from sdpo_jax import config


def get_suites(arg: str = ""):
  a = config.parse_arg(
    arg,
    data=os.path.join(os.environ.get("SDPO_JAX_DATA", "data"), "forgetting"),
    questions=100_000,
    judge="",
    url="http://127.0.0.1:8000/v1",
    local=False,
  )
  suites = {
    "ifeval": _suite(a, {"name": "ifeval"}, "ifeval.jsonl"),
    "mmlu_pro": _suite(a, {"name": "mcq"}, "mmlu_pro.*"),
  }
  if a.judge:
    env = {"name": "pairwise", "model": a.judge, "url": a.url}
    suites["chat"] = _suite(a, env, "chat.jsonl")
  else:
    config.refuse(a, "url", because="judge= names no model")
  return suites


def _suite(a, env: dict, file: str) -> dict:
  # Two requests to a judge, each of three attempts of 60 s, have to fit.
  rollout = {"max_new_tokens": 4096, "judge_timeout_s": 600.0}
  data = {"sources": (f"test={os.path.join(a.data, file)}",), "max_prompt_tokens": 4096}
  if a.local:  # same path, toy sizes
    rollout.update(max_new_tokens=16, rows=8)
    data.update(max_prompt_tokens=900)
  return {
    "env": env,
    "data": data,
    "rollout": rollout,
    "splits": ("test",),
    "questions": a.questions,
    "samples": 1,
    "temperature": 0.0,
    "top_p": 1.0,
  }
