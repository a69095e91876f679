r"""Trains adapters of a small model on one GPU of 16 or 24 GB.

The questions are GSM8K. The weights stand on the GPU once, in bfloat16. Adapters alone are trained
and kept a second time for the teacher; while sampling, their sum with the weights is a copy.

Run:    python -m sdpo_jax.main --config=configs/small_gpu.py:machine=gpu-16,model=qwen3-1.7b \
          --workdir=runs/small_gpu
Plan:   python -m sdpo_jax.main --mode=plan --topology=rtx4080:1 \
          --config=configs/small_gpu.py:machine=gpu-16,model=qwen3-1.7b
Other:  machine=gpu-24 for --topology=l4:1; model=qwen3-0.6b; method=grpo
Smoke:  python -m sdpo_jax.main --config=configs/small_gpu.py:local --workdir=runs/small_gpu_smoke
GPUs:   of compute capability 8.0 or more, since products are in bfloat16: not the T4 (7.5), whose
        16-bit products are float16 alone.
Cost:   a plan takes about one CPU minute; no run has been measured.
Result: no run has been measured. By the plan, peak GB of the train step, and of the decode step
        with the train state beside it, of the 75 % of the memory that jax takes:

                                        Qwen3-1.7B      Qwen3-0.6B      jax takes
        gpu-16 (RTX 4080), sdpo         7.2  10.4       4.0   5.7       12
        gpu-24 (L4), sdpo               7.5  15.4       4.0  10.8       18
"""

import os

from sdpo_jax import config
from sdpo_jax.objectives import build

MACHINES = {  # responses that are sampled together, and responses of a micro-batch
  "gpu-16": (48, 8),
  "gpu-24": (128, 16),
}


def get_config(arg: str = ""):
  a = config.parse_arg(
    arg,
    machine="gpu-16",
    data="hub:openai/gsm8k:main",
    method="sdpo",
    model="qwen3-1.7b",
    seed=0,
    local=False,
  )
  if a.machine not in MACHINES:
    raise ValueError(f"machine={a.machine!r} is unknown; choose from {list(MACHINES)}")
  rows, responses = MACHINES[a.machine]
  c = config.base()
  c.seed = a.seed
  c.total_steps = 200
  c.method = build.method_row(a.method)
  # adapters and their moments are float32 whatever the weights are
  c.model.update(path=a.model, dtype="bfloat16", param_dtype="bfloat16", remat="block")
  c.model.lora.rank = 16
  c.env = dict(name="math_qa")
  c.data.sources = (a.data,)
  c.data.update(
    max_prompt_tokens=256, max_teacher_tokens=1024, length_multiple=128, response_multiple=128
  )
  c.rollout.update(questions=16, group=8, max_new_tokens=512, rows=rows, chunk=64)
  c.train.micro_batches = c.rollout.questions * c.rollout.group // responses
  c.optimizer.update(lr=1e-4, warmup_steps=10)
  c.eval.update(splits=("test",), final_splits=("test",), questions=200, samples=2)
  c.sandbox.workers = 2
  if a.local:
    c.total_steps = 2
    c.mesh.fsdp = 1  # too few rows to share
    c.model.update(path="tiny", dtype="float32", param_dtype="float32", remat="dots")
    c.data.update(
      max_prompt_tokens=700, max_teacher_tokens=1000, length_multiple=128, response_multiple=8
    )
    c.rollout.update(questions=2, group=2, max_new_tokens=16, rows=4, chunk=16)
    c.train.micro_batches = 1
    c.eval.update(every_steps=2, questions=2, samples=1)
    c.checkpoint.every_steps = 2
    c.log.rollouts_every_steps = 1
    if "data" not in a.given:
      c.data.sources = (os.path.join(config.ROWS, "math_qa.{split}.jsonl"),)
  return c
