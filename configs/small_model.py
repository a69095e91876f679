r"""Asks what a small model learns from questions of mathematics and of code, on two CPU cores.

Run:    python -m sdpo_jax.main --config=configs/small_model.py:task=gsm8k,method=grpo \
          --workdir=runs/small_gsm8k
Before: python -m sdpo_jax.main --mode=diagnose --config=configs/small_model.py:task=mbpp \
          --workdir=runs/diagnosis_mbpp
Base:   what the model solves as it is, of 100 questions in 8 attempts; DIR holds the model:
        python -m sdpo_jax.main --mode=eval --config=configs/small_model.py:task=gsm8k \
          --checkpoint=DIR --suites=configs/eval/small_model.py:task=gsm8k \
          --workdir=runs/base_gsm8k
Smoke:  python -m sdpo_jax.main --config=configs/small_model.py:local --workdir=runs/small_smoke
Model:  SmolLM2-135M-Instruct by default, model=DIR or model=NAME any other.
Data:   GSM8K and MBPP (sanitized) from the hub, or data= a source with the splits train and test,
        such as data=data/gsm8k.{split}.jsonl (data/tasks.py says which forms it can have). Of a
        file with all 427 of MBPP's rows every fourth, from the first, was for evaluation:
        awk 'NR % 4 == 1' mbpp_sanitized.jsonl > data/mbpp.test.jsonl, the others for training.
Cost:   of the base model's 800 answers, eight minutes on one core for each task; of the diagnosis
        with --config.diagnose.responses=400, eleven.
Result: SmolLM2-135M-Instruct solves none of 100 questions of GSM8K in 8 attempts each: 99 % of its
        answers have no box, 75 % are cut off. Of MBPP it solves 2.4 % [1.1, 3.9] of the attempts
        and 13 % [7, 20] of the questions in one of 8. No training has been measured.
"""

import os

from sdpo_jax import config
from sdpo_jax.objectives import build

TASKS = {  # its environment, where its rows are, where rows to try it with are
  "gsm8k": ("math_qa", "hub:openai/gsm8k:main", "math_qa.{split}.jsonl"),
  "mbpp": ("coding", "hub:google-research-datasets/mbpp:sanitized", "coding.{split}.jsonl"),
}


def get_config(arg: str = ""):
  a = config.parse_arg(
    arg, task="gsm8k", data="", method="sdpo", model="smollm2-135m", seed=0, local=False
  )
  if a.task not in TASKS:
    raise ValueError(f"task={a.task!r} is unknown; choose from {list(TASKS)}")
  env, source, example = TASKS[a.task]
  if a.local:
    source = os.path.join(config.ROWS, example)
  c = config.base()
  c.seed = a.seed
  c.model.path = a.model
  c.method = build.method_row(a.method)
  c.env = dict(name=env)
  c.data.sources = (a.data or source,)
  c.data.on_bad_row = "skip"
  c.total_steps = 15
  c.data.update(max_prompt_tokens=320, max_teacher_tokens=768)
  # at temperature 1 a model this small writes incoherent text
  c.rollout.update(questions=6, group=8, max_new_tokens=192, temperature=0.7, rows=48)
  c.rollout.judge_threads = 2
  c.sandbox.workers = 1
  c.optimizer.update(lr=2e-5, warmup_steps=2)
  c.eval.update(
    every_steps=15, questions=50, samples=1, temperature=0.7, top_p=1.0,
    splits=("test",), final_splits=("test",),
  )  # fmt: skip
  c.checkpoint.update(every_steps=15, keep=1)
  c.discover.split = "test"
  if c.method.reduction.name == "constant":
    c.method.reduction.length = float(c.rollout.max_new_tokens)
  if c.method.memory.name != "none":
    c.data.questions = 32
  if a.local:
    config.toy_sizes(c, a)
  return c
