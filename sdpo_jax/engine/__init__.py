"""Engines sample completions: token ids of prompts in, `Completion` records out.

An engine is an object with one method:

  generate(params, prompts, *, n, sampling, seeds) -> iterator of Completion

`params` are the weights to sample with, `prompts` lists of token ids, `n` the completions of each
prompt, `sampling` a `records.Sampling`, and `seeds` one integer a prompt. The method yields all
`len(prompts) * n` completions as they finish, in no promised order. The caller can thus judge the
first while the last are still being sampled. Every engine guarantees:

  seeds              The tokens of sample s of a prompt depend on the weights, the prompt, its seed
                     and s alone: not on n, on the other prompts or on the order of arrival.
  log-probabilities  `logp` holds one value a token, in nats, over the whole vocabulary: at the
                     sampling temperature, before top-p cuts; at temperature 0, as at temperature 1.
                     In float32 they are within 1e-3 nats of those that training computes.
  stop tokens        A completion ends with its first stop token, which is part of it (`stop`), or
                     has `sampling.max_new_tokens` tokens (`length`).

A new engine is a file of this folder and a row of `ENGINES`; `session.py` makes the one that a run
uses.
"""

from sdpo_jax.engine.local import LocalEngine

ENGINES = {"local": LocalEngine}
