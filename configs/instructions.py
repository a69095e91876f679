r"""Trains a real language model to follow short instructions that a program can check.

Run:    python -m sdpo_jax.main --config=configs/instructions.py --workdir=runs/instructions
Other:  python -m sdpo_jax.main --config=configs/instructions.py:method=sdpo_blend,seed=1 \
          --workdir=runs/instructions_blend
Smoke:  python -m sdpo_jax.main --config=configs/instructions.py:local \
          --workdir=runs/instructions_smoke
Model:  SmolLM2-135M-Instruct by default, model=DIR or model=NAME any other.
Task:   envs/instructions.py makes the questions. It was fixed before anything was trained on it:
        SmolLM2-135M-Instruct as it is solves 22.9 % [16.0, 29.8] of heldout (120 questions twice,
        temperature 0.7, at most 64 tokens); at such a rate many groups hold both outcomes.
Kept:   eval/texts/ has the answers of the first and the last evaluation, and the report ten of them
        side by side; the metrics eval/SPLIT/distinct_2 and eval/SPLIT/base_logp tell whether they
        are still language (evaluation/scores.py).
Cost:   49 s a step with grpo on two CPU cores of an AMD EPYC, 18 of them sampling: 25 minutes of
        steps. The whole, evaluations included, is not measured. 7 GB of memory, 2 GB of disk.
Result: not measured.
"""

from sdpo_jax import config
from sdpo_jax.objectives import build


def get_config(arg: str = ""):
  # rewards carried this model furthest on tasks of this kind; what else learns is measured by
  # configs/experiments/instructions.py
  a = config.parse_arg(arg, method="grpo", model="smollm2-135m", seed=0, local=False)
  c = config.base()
  c.seed = a.seed
  c.model.path = a.model
  c.method = build.method_row(a.method)
  c.env = dict(name="instructions")
  c.total_steps = 30
  # questions have up to 150 tokens, of which the chat template's system message is a part
  c.data.update(max_prompt_tokens=192, max_teacher_tokens=512)
  # at temperature 1 a model this small writes incoherent text
  c.rollout.update(questions=8, group=6, max_new_tokens=64, temperature=0.7, rows=48)
  c.optimizer.update(lr=2e-5, warmup_steps=2)
  c.eval.update(every_steps=15, questions=60, samples=1, temperature=0.7, top_p=1.0)
  c.checkpoint.update(every_steps=15, keep=1)  # at each evaluation; 1.6 GB each
  # whether what was learned is language
  c.eval.update(keep_texts=True, base_logp=True)
  if c.method.reduction.name == "constant":
    c.method.reduction.length = float(c.rollout.max_new_tokens)
  if c.method.memory.name != "none":  # five passes
    c.data.questions = 64
  if a.local:
    config.toy_sizes(c, a)
    c.eval.final_splits = ("heldout",)
  return c
