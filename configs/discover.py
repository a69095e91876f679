r"""Test-time self-distillation: one hard question, binary reward, feedback alone; SDPO against independent sampling.

Run:    python -m sdpo_jax.main --mode=discover --config=configs/discover.py --workdir=runs/discover
Other:  python -m sdpo_jax.main --mode=discover --config=configs/discover.py --config.discover.arms='("sdpo","best_of_k","multi_turn")'
Smoke:  python -m sdpo_jax.main --mode=discover --config=configs/discover.py:local
Setting of arXiv 2601.20802, section 5: the teacher reads the feedback alone (no solution is known), its weights follow the policy at 0.01,
reverse KL over the top 20 with a tail, advantages clipped at 5, 16 attempts an update, stop at the first success. The questions are TinyCode's
three operations, each named by a novel word; those are used that the base model solves with pass@64 < 0.03.
The learning rate is 3e-3: on 24 questions of `train` (any difficulty, one seed) 3e-3 and 1e-3 both found 9 within 85 attempts and 19 within 256.
"""

from sdpo_jax import config
from sdpo_jax.objectives import methods


def get_config(arg: str = ""):
  a = config.parse_arg(arg, model="tiny", level="very_hard", seed=0, local=False)
  c = config.base()
  c.seed, c.model.path, c.env.level = a.seed, a.model, a.level
  c.method = methods.row("sdpo")
  c.method.teacher_context = dict(name="feedback_or_solution", use_solution=False, feedback="always")
  c.method.teacher_weights.rate = 0.01
  c.method.token_signal = dict(name="divergence", alpha=1.0, top_k=20, advantage_clip=5.0)
  c.optimizer.update(lr=3e-3, warmup_steps=0, weight_decay=0.0)
  c.data.update(length_multiple=64, response_multiple=24)   # few shapes: the programs compile once
  c.discover.below_pass_at_64 = 0.03
  if a.local:   # same path, toy sizes
    c.discover.update(questions=2, seeds=2, attempts=16, rollouts=8, candidates=4, calibration=64, arms=("sdpo", "best_of_k", "multi_turn"))
  return c
