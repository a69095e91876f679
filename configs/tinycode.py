r"""TinyCode: the embedded task. A 1 M-parameter model learns what novel words mean from its own runtime errors.

Run:    python -m sdpo_jax.main --config=configs/tinycode.py
Other:  python -m sdpo_jax.main --config=configs/tinycode.py:method=grpo,level=hard,seed=1
Smoke:  python -m sdpo_jax.main --config=configs/tinycode.py:local
"""

from sdpo_jax import config
from sdpo_jax.objectives import methods


def get_config(arg: str = ""):
  a = config.parse_arg(arg, method="sdpo", model="tiny", level="default", seed=0, local=False)
  c = config.base()
  c.seed, c.model.path, c.env.level = a.seed, a.model, a.level
  c.method = methods.row(a.method)
  if c.method.policy_share == 1.0:
    c.optimizer.lr = 3e-4   # rewards alone: at 7e-4 the held-out accuracy falls before it recovers, at 1.5e-3 it collapses
  if a.local:   # same path, toy sizes, seconds on a CPU
    c.total_steps = 2
    c.rollout.update(questions=2, group=4, rows=8)
    c.eval.update(every_steps=2, questions=4, samples=2, final_splits=("heldout",))
    c.checkpoint.every_steps = 2
    c.log.rollouts_every_steps = 1
  return c
