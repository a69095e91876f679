"""Engines sample completions: requests with the ids of prompts in, `Completion` records out.

An engine is an object with four methods

  load(params, version)   the weights that are sampled from now on
  generate(requests)      an iterator of Completion, n for each Request, as they end
  unload()                lets go of the weights
  interrupt()             ends what other threads generate, with Preempted, and for good

and with two marks:

  samples_alone           True: each process of a run samples its share of the requests; False:
                          process 0 asks for all
  takes_adapters          whether `load` takes adapters, and not their sum with the base

The local engine has one more method, which servers lack:

  search(requests)        an iterator of the n likeliest completions of each Request that a beam
                          search of width `sampling.beams` finds, the likeliest first (`beams`)

Requests may come from a generator, of which the engine takes the next one when it has room; it must
not wait for completions of the same call. Those that answer a completion (the next turn of a
conversation) come through a `RequestQueue`. Completions come in no promised order, so that the
caller can judge the first while the last are still being sampled. Every engine guarantees:

  seeds              The tokens of sample s of a request depend on the weights, the prompt, its seed
                     and s alone: not on n or on other requests, but for how a product is rounded in
                     the shapes that these lead to.
  log-probabilities  `logp` holds one value a token, in nats, over the whole vocabulary: at the
                     sampling temperature, before cuts and biases; at temperature 0, as at
                     temperature 1. In float32 they are within 1e-3 nats of those that training
                     computes. `[]` where nobody wants them and the engine has others.
  entropy            Where `sampling.entropy` asks for it: the policy's at each token, in nats, of
                     what the log-probabilities are of.
  stop tokens        A completion ends with its first stop token or with the token that completes a
                     stop string, which is part of it (`stop`), or has `sampling.max_new_tokens`
                     tokens (`length`).

A new engine is a file of this folder and a row of `ENGINES`; `session.py` makes the one that a run
uses. One for servers is a subclass of `remote.RemoteEngine`.
"""

from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.engine.sglang import SglangEngine
from sdpo_jax.engine.vllm import VllmEngine

ENGINES = {"local": LocalEngine, "vllm": VllmEngine, "sglang": SglangEngine}
