r"""Pre-trains the tiny base models on TinyCode programs or on chains of arithmetic.

The corpus has rows with and without hindsight; with `start` also rows that hold notes on other
attempts, and questions for verdicts.

Run:    python -m sdpo_jax.pretrain --config=configs/pretrain_tiny.py \
          --workdir=runs/pretrain_tiny --out=sdpo_jax/assets/tiny
Other:  python -m sdpo_jax.pretrain --config=configs/pretrain_tiny.py:domain=arithmetic \
          --workdir=runs/pretrain_arithmetic --out=sdpo_jax/assets/tiny_arithmetic
Notes:  goes on from a model of the same vocabulary
        python -m sdpo_jax.pretrain \
          --config=configs/pretrain_tiny.py:domain=arithmetic,start=runs/notes_first/hf \
          --workdir=runs/notes --out=sdpo_jax/assets/tiny_arithmetic
First:  python -m sdpo_jax.pretrain \
          --config=configs/pretrain_tiny.py:domain=arithmetic,start=runs/pretrain_arithmetic/hf \
          --workdir=runs/notes_first --config.optimizer.lr=1e-3 \
          --config.corpus.plain=0.12 --config.corpus.feedback=0.25 \
          --config.corpus.solution=0.08 --config.corpus.notes=0.3 --config.corpus.imagine=0.2 \
          --config.corpus.alternatives=3 --config.corpus.success=0.2 \
          --config.batch.rows=12 --config.batch.length=384
Code:   python -m sdpo_jax.pretrain --config=configs/pretrain_tiny.py:start=tiny \
          --workdir=runs/code_first \
          --config.total_steps=2400 --config.optimizer.decay_steps=2400
        python -m sdpo_jax.pretrain --config=configs/pretrain_tiny.py:start=runs/code_first/hf \
          --workdir=runs/code_notes --out=sdpo_jax/assets/tiny_notes \
          --config.total_steps=2000 --config.optimizer.decay_steps=2000 \
          --config.optimizer.lr=2e-3 --config.corpus.plain=0.08 --config.corpus.feedback=0.2 \
          --config.corpus.solution=0.04 --config.corpus.both=0.03 \
          --config.corpus.notes=0.35 --config.corpus.imagine=0.3
Smoke:  python -m sdpo_jax.pretrain --config=configs/pretrain_tiny.py:local --workdir=runs/smoke
Cost:   7,000 steps of about 60 rows, 62 CPU minutes (half an hour of wall time when two cores are
        free); 0.68 M parameters. With start=, 1,200 steps of about 27 longer rows, 20 to 24 minutes
        on one core; both passes of Code 63 minutes.
Result: problems with novel words solved, greedy, 256 problems of one to three operations, seed 0.
        `alone` shows the bare problem; `feedback` is on a failed attempt; `notes` are on one or two
        other failures, which are those of a policy that has learnt some of the words.

        model             alone    feedback  solution  notes
        tiny              11.3 %   41.0 %    100.0 %           sdpo_jax/assets/tiny
        arithmetic        6.6 %    63.3 %    100.0 %           after 63 CPU minutes
        tiny_arithmetic   7.0 %    64.8 %    100.0 %   79.3 %  went on twice, First and Notes
        tiny_notes        8.6 %    39.8 %    99.6 %    39.5 %  went on from tiny, Code

        tiny_arithmetic reads feedback and notes together. Asked for the verdict that another
        attempt would receive, it says the judge's word for word in 58.2 %, its first line in
        89.1 %.
        tiny_notes solved 37.1 % and 41.0 % after the first pass. Of the verdicts it says 0.4 %
        word for word, and 84.0 % in their first line: the first of the inputs, which stand in the
        question, is copied rightly in 7 of 86. Notes neither help nor mislead it.
"""

import dataclasses

import ml_collections

from sdpo_jax.config import parse_arg
from sdpo_jax.data.corpus import Mixture

FURTHER = {  # sizes of a batch with `start`: rows of notes are longer
  "tinycode": dict(rows=12, length=432, responses=128, texts=30),
  "arithmetic": dict(rows=16, length=288, responses=80, texts=27),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  a = parse_arg(arg, domain="tinycode", start="", seed=0, local=False)
  c = ml_collections.ConfigDict()
  c.seed = a.seed
  c.domain = a.domain
  c.start = a.start
  c.total_steps = 7_000
  c.log_every_steps = 50
  c.checkpoint_every_steps = 500
  c.model = dict(
    width=128,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ff_width=256,
    rope_theta=10_000.0,
    max_positions=1024,
  )
  c.corpus = dataclasses.asdict(Mixture())
  c.batch = dict(rows=32, length=112, responses=48, texts=62)
  c.optimizer = dict(
    name="adamw",
    lr=2e-3,
    warmup_steps=200,
    decay_steps=c.total_steps,
    weight_decay=0.01,
    b1=0.9,
    b2=0.98,
    state_dtype=None,
    # None: no clipping
    clip_norm=ml_collections.FieldReference(1.0, field_type=object),
  )
  c.eval = dict(every_steps=500, questions=256, max_new_tokens=28)
  if a.start:
    # its shape is its own; notes and verdicts, and enough of the rest not to forget it
    c.total_steps = 1_200
    c.corpus.update(plain=0.1, feedback=0.2, solution=0.05, both=0.05, notes=0.45, imagine=0.15)
    c.batch.update(**FURTHER[a.domain])
    c.optimizer.update(lr=1.5e-3, warmup_steps=50, decay_steps=c.total_steps)
    c.eval.every_steps = 600
    del c.model
  if a.local:
    c.total_steps = 4
    c.log_every_steps = 1
    c.checkpoint_every_steps = 2
    if not a.start:
      c.model.update(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff_width=64)
    c.batch.update(rows=8, texts=8 if a.start else 16)
    c.eval.update(every_steps=2, questions=8)
    c.optimizer.update(warmup_steps=1, decay_steps=4)
  return c
