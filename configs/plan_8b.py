r"""Will Qwen3-8B or Olmo-3-7B fit? The lengths of the paper's coding runs (arXiv 2601.20802), for --mode=plan.

Run:    python -m sdpo_jax.main --mode=plan --topology=v5p:2x2x2 --config=configs/plan_8b.py
Other:  --config=configs/plan_8b.py:model=olmo3-7b-instruct   --topology=v5e:8x8 | v6e:4x4
Smoke:  --config=configs/plan_8b.py:local
Cost:   2.0 CPU minutes until both programs are compiled, and as much again for the suggestion of a micro-batch.
Result: Qwen3-8B, EMA teacher, v5p:2x2x2 (8 chips of 95 GB, "v5p-16"): train state 16.4 GB per chip; train step of 32 micro-batches of 8 responses,
        peak 44.7 GB; decode step of 64 responses, 45.1 GB with the state beside it.
        v5e:8x8 (64 chips of 16 GB) with --config.mesh.fsdp=16 --config.mesh.tensor=4 --config.train.micro_batches=16: train state 2.0 GB per chip;
        train step of 16 micro-batches of 16 responses, peak 10.1 GB; decode step of 64 responses, 5.9 GB with the state beside it. 3 CPU minutes,
        without the suggestion of a micro-batch.
Not yet planned: v6e:4x4 and Olmo-3-7B. GPUs cannot be planned: there is no compiler for them without one, and a compilation for virtual CPU
devices says nothing of their memory.
"""

from sdpo_jax import config
from sdpo_jax.objectives import methods

MACHINES = {  # mesh, micro-batches of the 256 responses, responses decoded at a time
    "v5p-16": (dict(fsdp=8, tensor=1), 32, 64),
    "v5e-64": (dict(fsdp=16, tensor=4), 16, 64),
    "v6e-16": (dict(fsdp=8, tensor=2), 32, 64),
    "h200-8": (dict(fsdp=8, tensor=1), 32, 64),
}


def get_config(arg: str = ""):
  a = config.parse_arg(arg, method="sdpo", model="qwen3-8b", machine="v5p-16", local=False)
  if a.machine not in MACHINES:
    raise ValueError(f"machine={a.machine!r} is unknown; choose from {list(MACHINES)}")
  mesh, micro_batches, rows = MACHINES[a.machine]
  c = config.base()
  c.mesh.update(mesh)
  c.method = methods.row(a.method)
  c.model.update(path=a.model, dtype="bfloat16", remat="block")   # weights, moments and teacher in float32: steps of 1e-6 vanish in bfloat16
  c.data.update(max_prompt_tokens=2048, max_teacher_tokens=10240, length_multiple=1024, response_multiple=1024)
  c.rollout.update(questions=32, group=8, max_new_tokens=8192, rows=rows)
  c.train.micro_batches = micro_batches
  c.optimizer.lr = 1e-6
  if a.local:   # a small model, short texts
    c.model.path = "qwen3-0.6b"
    c.data.update(max_prompt_tokens=128, max_teacher_tokens=256, length_multiple=128, response_multiple=128)
    c.rollout.update(questions=16, group=8, max_new_tokens=128, rows=16)
    c.train.micro_batches = 2
  return c
