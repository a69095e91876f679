r"""Repeats the SDPO paper's experiments at their own size: two models, six tasks, three methods.

Run:    python -m sdpo_jax.experiment --config=configs/experiments/paper.py \
          --workdir=runs/paper --commands
        prints a command for each run, on later calls for each that is left. Each is for a node of
        eight GPUs (fsdp=8); launch/ starts it on the hosts of a pod, as a v5p-16, likewise.
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/paper.py:local \
          --workdir=runs/paper_local
Grid:   Qwen3-8B and Olmo-3-7B-Instruct on four sciences, tool calls and LiveCodeBench v6; SDPO,
        GRPO with four updates a batch, and GRPO with one ("on policy") at ten times the rate; three
        seeds. On LiveCodeBench, Qwen3-8B also has SDPO with the other teachers of the paper's
        ablation: live, frozen, trust region. Hyper-parameters are the paper's (arXiv 2601.20802),
        nothing is tuned; it trains by the clock where there is no feedback, these runs for 100
        steps.
Cost:   by --mode=plan --topology=v5p:2x2x2 --config=configs/science_mcq.py --config.mesh.fsdp=8, at
        peak rates and with every text at its limit: an update of SDPO takes at least 83 s, a token
        of 256 responses 0.020 s, so 100 steps of 8,192 tokens 6.9 hours on eight chips, evaluations
        apart; with responses of 1,000 tokens about an eighth. It fits: 44.7 and 75.5 of 95 GB a
        chip. 117 runs.
Result: none: no such machine was at hand.
"""

MODELS = ("qwen3-8b", "olmo3-7b-instruct")
TASKS = {
  "chemistry": "configs/science_mcq.py:subject=chemistry,",
  "physics": "configs/science_mcq.py:subject=physics,",
  "biology": "configs/science_mcq.py:subject=biology,",
  "material": "configs/science_mcq.py:subject=material,",
  "tool_use": "configs/tool_use.py:",
  "livecodebench": "configs/coding.py:tasks=livecodebench,",
}
SEEDS = range(3)
_ON_POLICY = (
  "--config.optimizer.lr=1e-5",
  "--config.train.updates_per_batch=1",
  "--config.train.micro_batches=32",
)
# arm: its row of METHODS, and what else differs from the task's configuration
ARMS = {
  "sdpo": ("sdpo", ()),
  "grpo": ("grpo", ()),
  "grpo_on_policy": ("grpo", _ON_POLICY),
}
_WEIGHTS = "--config.method.teacher_weights"
TEACHERS = {
  "live": ("sdpo", (f"{_WEIGHTS}.name=live",)),
  "frozen": ("sdpo", (f"{_WEIGHTS}.name=frozen",)),
  "trust_region": ("sdpo", (f"{_WEIGHTS}.name=trust_region", f"{_WEIGHTS}.rate=0.01")),
}


def _arms(task: str, model: str) -> dict:
  has_ablation = task == "livecodebench" and model == MODELS[0]
  return ARMS | TEACHERS if has_ablation else ARMS


def get_grid():
  return {
    f"{arm}_on_{task}_{model}_seed{seed}": [
      f"--config={file}method={row},model={model},seed={seed}",
      f"--config.label={arm}_on_{task}_{model}",
      "--config.mesh.fsdp=8",
      *changes,
    ]
    for seed in SEEDS
    for model in MODELS
    for task, file in TASKS.items()
    for arm, (row, changes) in _arms(task, model).items()
  }


def get_local():
  files = ("configs/science_mcq.py", "configs/tool_use.py", "configs/coding.py")
  return {
    f"{arm}_on_{file[8:-3]}": [f"--config={file}:method={row},local", *changes]
    for file in files
    for arm, (row, changes) in ARMS.items()
    if arm != "grpo_on_policy"
  }
