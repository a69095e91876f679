r"""Pre-trains the tiny base model that acts in the household world.

Run:    python -m sdpo_jax.pretrain --config=configs/pretrain_household.py \
          --workdir=runs/pretrain_household --out=sdpo_jax/assets/tiny_household
Smoke:  python -m sdpo_jax.pretrain --config=configs/pretrain_household.py:local \
          --workdir=runs/smoke
Cost:   1,600 steps of about 43 episodes, about 20 CPU minutes (31 minutes of one shared core);
        0.50 M parameters.
Result: held-out tasks that are done at temperature 1, in per cent, 256 tasks, seed 0. The columns
        are the novel words of a task, of all its words. A novel word without the skill is a guess
        of one in eight.

        view          all   0 of 1  0 of 2  1 of 1  1 of 2  2 of 2
        alone         45.3   100.0    97.3    13.6    17.7     0.0
        skill         87.9   100.0    97.3    97.0    87.1    35.5
        random_skill  39.8   100.0    97.3     6.1     3.2     0.0

        With the skill: 39.1 after 400 steps, 73.0 after 800, 82.4 after 1,200. Two novel words are
        where more steps still pay.
"""

import dataclasses

import ml_collections

from sdpo_jax.config import parse_arg
from sdpo_jax.data.household_rows import Mixture


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  a = parse_arg(arg, seed=0, local=False)
  c = ml_collections.ConfigDict()
  c.seed = a.seed
  c.domain = "household"
  c.start = ""
  c.total_steps = 1_600
  c.log_every_steps = 20
  c.checkpoint_every_steps = 100
  c.model = dict(
    width=128,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ff_width=256,
    rope_theta=10_000.0,
    max_positions=1024,
  )
  c.corpus = dataclasses.asdict(Mixture())
  c.batch = dict(rows=16, length=296, responses=296, texts=44)
  c.optimizer = dict(
    name="adamw",
    lr=3e-3,
    warmup_steps=60,
    decay_steps=c.total_steps,
    weight_decay=0.01,
    b1=0.9,
    b2=0.98,
    state_dtype=None,
    # None: no clipping
    clip_norm=ml_collections.FieldReference(1.0, field_type=object),
  )
  c.eval = dict(every_steps=400, questions=256)
  if a.local:
    c.total_steps = 4
    c.log_every_steps = 1
    c.checkpoint_every_steps = 2
    c.model.update(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff_width=64)
    c.batch.update(rows=8, texts=16)
    c.eval.update(every_steps=4, questions=4)
    c.optimizer.update(warmup_steps=1, decay_steps=4)
  return c
