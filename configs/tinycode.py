r"""Trains on TinyCode: a 0.7 M-parameter model learns novel words from its own runtime errors.

Run:    python -m sdpo_jax.main --config=configs/tinycode.py
Other:  python -m sdpo_jax.main --config=configs/tinycode.py:method=grpo,level=hard,seed=1
Smoke:  python -m sdpo_jax.main --config=configs/tinycode.py:local
Cost:   2 min 46 s on two cores of an AMD EPYC, compilation and evaluations included (240 steps of
        16 x 4 responses), less with method=grpo.
Result: held-out avg@4 over 100 questions, seed 0: base model 38.8 %, after training 96.0 %.
        Other splits, seeds and levels: RESULTS.md, headline.
"""

from sdpo_jax import config


def get_config(arg: str = ""):
  a = config.parse_arg(arg, method="sdpo", model="tiny", level="default", seed=0, local=False)
  c = config.tiny(a)
  c.env.level = a.level
  if a.level == "easy":  # one operation alone: there is no unseen composition
    c.eval.final_splits = tuple(split for split in c.eval.final_splits if split != "unseen")
  return c
