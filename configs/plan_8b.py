r"""Tells whether Qwen3-8B or Olmo-3-7B fits, at the lengths of the paper's coding runs.

The lengths are those of arXiv 2601.20802; the file is for --mode=plan.

Run:    python -m sdpo_jax.main --mode=plan --topology=v5p:2x2x2 --config=configs/plan_8b.py
GPUs:   python -m sdpo_jax.main --mode=plan --topology=h200:8 \
          --config=configs/plan_8b.py:machine=h200-8
Other:  machine=v5e-64 for --topology=v5e:8x8, machine=v6e-16 for --topology=v6e:4x4;
        model=olmo3-7b-instruct
Smoke:  --config=configs/plan_8b.py:local
Cost:   4.7 CPU minutes for v5p:2x2x2, about half of them for the suggestion of a micro-batch;
        h200:8 40 CPU seconds in all.
Result: peak GB per chip of the train step, and of the decode step of 64 responses with the train
        state beside it; moving-average teacher. Each chip, or each `tensor` of them, has a copy of
        the weights to sample with, and decodes without a collective. -: not compiled since.

                               Qwen3-8B        Olmo-3-7B       each chip has
        v5p-16 (8 chips)       44.6  44.8      41.1     -      95
        v5e-64 (64 chips)      10.1     -      10.1     -      16
        v6e-16 (16 chips)      24.6     -      22.6     -      32
        h200-8 (8 GPUs)        36.2  43.4      30.9     -      141, of which jax uses 105.8

        Qwen3-1.7B on four chips of v6e: 19.4 and 26.8, of 32. The command is
        python -m sdpo_jax.main --mode=plan --topology=v6e:2x2 \
          --config=configs/plan_8b.py:machine=v6e-16,model=qwen3-1.7b --config.mesh.fsdp=4 \
          --config.mesh.tensor=1 --config.train.micro_batches=64

        On h200-8 attention is by cuDNN and the divergence by `xla`; nothing has run on a GPU yet.
        No program holds an array of tokens x vocabulary. On v5e-64 the kernel's workspace holds the
        quarter of Qwen3-8B's vocabulary that a chip has, 0.6 GB in bfloat16.
"""

from sdpo_jax import config
from sdpo_jax.objectives import build

MACHINES = {  # mesh, micro-batches of the 256 responses
  "v5p-16": (dict(fsdp=8, tensor=1), 32),
  "v5e-64": (dict(fsdp=16, tensor=4), 16),
  "v6e-16": (dict(fsdp=8, tensor=2), 32),
  "h200-8": (dict(fsdp=8, tensor=1), 32),
}
OLMO3 = {"v5e-64": (dict(fsdp=32, tensor=2), 8)}  # 4 does not divide its vocabulary


def get_config(arg: str = ""):
  a = config.parse_arg(arg, method="sdpo", model="qwen3-8b", machine="v5p-16", local=False)
  if a.machine not in MACHINES:
    raise ValueError(f"machine={a.machine!r} is unknown; choose from {list(MACHINES)}")
  machines = MACHINES | OLMO3 if a.model.startswith("olmo3") else MACHINES
  mesh, micro_batches = machines[a.machine]
  c = config.base()
  c.mesh.update(mesh)
  c.method = build.method_row(a.method)
  # weights, moments and teacher stay float32: steps of 1e-6 vanish in bfloat16
  c.model.update(path=a.model, dtype="bfloat16", remat="block")
  c.data.update(
    max_prompt_tokens=2048, max_teacher_tokens=10240, length_multiple=1024, response_multiple=1024
  )
  c.rollout.update(questions=32, group=8, max_new_tokens=8192, rows=64)
  c.train.micro_batches = micro_batches
  c.optimizer.lr = 1e-6
  if a.local:
    # a small model and shorter texts; with fewer tokens a micro-batch their logits would be no
    # larger than what the kernels may use
    c.model.path = "qwen3-0.6b"
    c.data.update(
      max_prompt_tokens=128, max_teacher_tokens=256, length_multiple=128, response_multiple=128
    )
    c.rollout.update(questions=16, group=8, max_new_tokens=1024, rows=16)
    c.train.micro_batches = 2
  return c
