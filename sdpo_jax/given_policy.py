"""Reads a batch with the teacher alone; the policy's log-probabilities are those it sampled with.

A contrast compares siblings by the gap log q - log pi before the update. The engine has recorded
log pi of every token that it sampled, so the policy is not run for it: this saves one of its passes
a step. `train/rollout_gap` tells how far the record is from what the trainer would compute.
"""

from typing import Callable

import jax
import jax.numpy as jnp

from sdpo_jax.kernels.distill_kl_sweeps import Inputs
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.records import TrainBatch
from sdpo_jax.train_step import heard, read_again, targets, teacher_head


def make_recorded_signals(
  config: ModelConfig, *, mix: float | None, temperature: float = 1.0, join: Callable | None = None
) -> Callable:
  """Returns what `make_signals` does, for the plain reading and without anything to learn from.

  The policy's entropy, which nobody recorded, is 0. mix: as in `forward_pair`.
  """

  def signals(params, teacher, batch: TrainBatch, frozen=None) -> tuple[Signals, ...]:
    if join is not None:
      params = join(frozen, params)
      teacher = None if teacher is None else join(frozen, teacher)
    teacher_XE = read_again(params, teacher, config, batch.readings[0].rows, mix=mix)
    head_EV = teacher_head(params, teacher, config, mix=mix)
    no_policy = jnp.zeros((1, 1)), jnp.zeros((1, 1))
    inputs = Inputs(*no_policy, teacher_XE, head_EV, targets(batch.policy))
    logp_BR = jnp.asarray(batch.logp_rollout_BR)
    policy = Signals(logp_BR, jnp.zeros_like(logp_BR), None, None)
    return (jax.lax.stop_gradient(heard(policy, inputs, batch, temperature)),)

  return signals
