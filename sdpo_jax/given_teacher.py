"""Compares the policy with a teacher whose log-probabilities are given, and says where to ask them.

This is the device's side of a teacher on another machine; `remote_teacher.py` is the host's. Both
functions go over the policy's half alone: what the teacher reads, it reads where it lives.

The divergence is over K + 1 buckets (kernels/distill_topk.py): today's policy and the given numbers
at K tokens, and one bucket for the rest of either.
"""

from typing import Callable

import jax
import jax.numpy as jnp

from sdpo_jax import sharding
from sdpo_jax.kernels.distill_kl_sweeps import Inputs
from sdpo_jax.kernels.distill_topk import TopLogProbs, in_buckets, top_log_probs
from sdpo_jax.kernels.given_logp import given_log_probs
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.objectives.build import Method
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.records import TrainBatch
from sdpo_jax.train_step import (
  TrainState,
  by_response,
  cut,
  micro_batches,
  output_matrix,
  run_half,
  targets,
)


def make_given_signals(
  config: ModelConfig,
  method: Method,
  *,
  temperature: float = 1.0,
  remat: str = "none",
  join: Callable | None = None,
) -> Callable:
  """Returns what `make_signals` does, for batches whose plain reading is `Scored`."""
  settings = {key: value for key, value in method.divergence.items() if key != "top_k"}

  def signals(params, teacher, batch: TrainBatch, frozen=None) -> tuple[Signals, ...]:
    del teacher
    params = params if join is None else join(frozen, params)
    scored = batch.readings[0].scored
    flat_XM = [jnp.reshape(x, (-1, x.shape[-1])) for x in (scored.index_CXM, scored.logp_CXM)]
    index_XM, logp_teacher_XM = flat_XM
    given = given_log_probs(
      run_half(params, config, batch.policy, remat),
      output_matrix(params, config),
      targets(batch.policy),
      index_XM,
      temperature=temperature,
      mesh=sharding.current_mesh(),
    )
    logp_teacher_X = jnp.reshape(scored.logp_CX, -1)
    top = TopLogProbs(
      given.logp_XM, logp_teacher_XM, index_XM, given.logp_X, logp_teacher_X, given.entropy_X
    )
    out = in_buckets(top, **settings)
    per_token = (out.logp_X, out.entropy_X, out.divergence_X, out.logp_teacher_X)
    return (Signals(*(by_response(x_X, batch) for x_X in per_token)),)

  return signals


def make_candidates(
  config: ModelConfig,
  method: Method,
  *,
  temperature: float = 1.0,
  join: Callable | None = None,
) -> Callable:
  """Returns candidates(state, batch, frozen=None) -> index_CXM: where to ask the teacher.

  These are the policy's K likeliest tokens at each response token, under the weights of `state`.
  """

  def of_piece(params, batch: TrainBatch) -> jax.Array:
    policy_XD, head_DV = run_half(params, config, batch.policy), output_matrix(params, config)
    X, V = len(policy_XD), head_DV.shape[1]
    no_teacher = jnp.zeros((X, 1), policy_XD.dtype), jnp.zeros((1, V), head_DV.dtype)
    inputs = Inputs(policy_XD, head_DV, *no_teacher, targets(batch.policy))
    mesh = sharding.current_mesh()
    top_k = method.divergence["top_k"]
    top = top_log_probs(inputs, top_k=top_k, temperature=temperature, mesh=mesh)
    return top.index_XM.reshape(*batch.policy.at_CX.shape, -1)

  def candidates(state: TrainState, batch: TrainBatch, frozen=None) -> jax.Array:
    params = state.params if join is None else join(frozen, state.params)
    pieces = cut(batch, micro_batches(batch))
    index = jax.lax.map(lambda piece: of_piece(params, piece), pieces)
    return index.reshape(-1, *index.shape[2:])

  return candidates
