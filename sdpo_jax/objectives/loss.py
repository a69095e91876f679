"""Joins the parts of a method into one loss over response tokens.

A loss is a sum of terms; each term is a mean over its own tokens:

  loss = sum over terms of share * sum(loss_BR * weight_BR) / normaliser,   by default max(sum(weight_BR), 1)

  distill  weight_BR * distill_B: tokens of responses whose teacher has something to show
  policy   weight_BR: all response tokens, weighted and divided as the method's reduction says
  counterfactual   for each further reading of the batch (`objectives/counterfactual`), weight_BR * its weight_B; all are divided by the
           tokens of responses that any reading teaches, so that a failed response adds D(feedback) + sum over readings of weight * D(reading).
           With `gate` only tokens of which both readings say the same: sign(log q - log pi) of the feedback's and of the alternatives' agree;
           `counterfactual/agreement` is the share of those, gate or not. With form="mixture" there is neither this term nor that metric: the
           readings are one teacher, and `distill` is all.

With policy_share="untaught" every response belongs to one term alone: to `distill` if its teacher has something to show, else to
`policy`. Both sums are then divided by the tokens of the whole batch and added as they are.

The normalisers depend on the batch alone, so they are taken over the whole batch before it is cut into micro-batches, and the
cut changes neither loss nor gradient. A different reduction is a different weight.
"""

import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.objectives import build
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.objectives.surrogate import token_mean
from sdpo_jax.records import Ratio, TrainBatch


class Objective(NamedTuple):
  """A method as functions of arrays."""

  # (Signals, TrainBatch, normalisers) -> (scalar loss in nats, {metric: Ratio})
  token_loss: Callable
  normalisers: Callable  # TrainBatch -> {term: scalar}
  # alpha, top_k, add_tail, advantage_clip of the divergence that the kernel must compute; None:
  # none
  divergence: dict | None
  needs_teacher: bool
  needs_teacher_entropy: bool = False
  # the batch's further readings are mixed into the teacher, not terms of their own
  mixture: bool = False


def make_objective(method: dict) -> Objective:
  """method: a row of METHODS (or one like it). Raises ValueError as `methods.build` does."""
  parts = build.build_method(method)
  signal, weigh, surrogate, reduction = (
    parts[axis] for axis in ("token_signal", "token_weight", "surrogate", "reduction")
  )
  share, notes = method["policy_share"], parts["counterfactual"]()  # no notes: None
  gate, mixture = notes is not None and notes.gate, notes is not None and notes.form == "mixture"
  factors = (
    {"distill": 1.0, "policy": 1.0}
    if share == "untaught"
    else {"distill": 1.0 - share, "policy": share}
  )

  def terms(batch: TrainBatch) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{term: (weight_BR, normaliser)}"""
    found = {}
    if share == "untaught":
      taught_B1 = (batch.distill_B > 0)[:, None]
      weight_BR, normaliser = reduction(batch.weight_BR)
      return {
        "distill": (weight_BR * taught_B1, normaliser),
        "policy": (weight_BR * ~taught_B1, normaliser),
      }
    if signal is not None:
      found["distill"] = token_mean(batch.weight_BR * batch.distill_B[:, None])
    if surrogate is not None:
      found["policy"] = reduction(batch.weight_BR)
    return found

  def normalisers(batch: TrainBatch) -> dict[str, jax.Array]:
    found = {term: normaliser for term, (_, normaliser) in terms(batch).items()}
    if batch.counterfactuals and not mixture:
      taught_B = functools.reduce(
        jnp.maximum, [c.weight_B > 0 for c in batch.counterfactuals], batch.distill_B > 0
      )
      found["counterfactual"] = jnp.maximum(jnp.sum(batch.weight_BR * taught_B[:, None]), 1.0)
    return found

  def token_loss(signals: Signals, batch: TrainBatch, norm: dict[str, jax.Array]):
    # What stands where the weight is 0 may be anything. It is replaced before use, not only left
    # out of the sum: 0 * inf is NaN,
    # in the gradient even behind a `where`.
    counted_BR = batch.weight_BR > 0
    clean = lambda x_BR: jnp.where(counted_BR, x_BR, 0.0)
    signals = jax.tree.map(clean, signals)
    batch = batch._replace(
      logp_old_BR=clean(batch.logp_old_BR),
      logp_rollout_BR=clean(batch.logp_rollout_BR),
      advantage_B=jnp.where(jnp.any(counted_BR, -1), batch.advantage_B, 0.0),
    )
    loss, metrics = 0.0, {}
    for term, (weight_BR, _) in terms(batch).items():
      if term == "distill":
        loss_BR = signal(signals, batch) * weigh(signals, batch)
      else:
        loss_BR = surrogate(signals, batch)
      total = jnp.sum(loss_BR * weight_BR)
      loss += factors[term] * total / norm[term]
      metrics[f"train/loss_{term}"] = Ratio(total, jnp.sum(weight_BR))
    agreed, read, added, told = 0.0, 0.0, 0.0, 0.0
    for counterfactual, said in zip(batch.counterfactuals, signals.counterfactuals):
      weight_BR = batch.weight_BR * counterfactual.weight_B[:, None]
      both_BR = (weight_BR > 0) & (batch.distill_B > 0)[:, None]
      agree_BR = jnp.sign(said.gap_BR) == jnp.sign(signals.gap_BR)
      agreed, read = agreed + jnp.sum(agree_BR & both_BR), read + jnp.sum(both_BR)
      if gate:
        weight_BR = jnp.where(both_BR & ~agree_BR, 0.0, weight_BR)
      total = jnp.sum(signal(said, batch) * weigh(said, batch) * weight_BR)
      loss += factors["distill"] * total / norm["counterfactual"]
      added, told = added + total, told + jnp.sum(weight_BR)
    if signals.counterfactuals:
      metrics["train/loss_counterfactual"] = Ratio(added, told)
      metrics["counterfactual/agreement"] = Ratio(agreed, read)
    mean = lambda x_BR, w_BR: Ratio(jnp.sum(x_BR * w_BR), jnp.sum(w_BR))
    metrics["train/entropy"] = mean(signals.entropy_BR, batch.weight_BR)
    metrics["train/rollout_kl"] = mean(batch.logp_rollout_BR - signals.logp_BR, batch.weight_BR)
    if signal is not None:
      taught_BR, _ = terms(batch)["distill"]
      metrics["train/teacher_gap"] = mean(signals.gap_BR, taught_BR)
      metrics["train/teacher_gap_abs"] = mean(jnp.abs(signals.gap_BR), taught_BR)
    return loss, metrics

  wanted = (
    build.part_settings(method, "token_signal")
    if method["token_signal"]["name"] == "divergence"
    else None
  )
  return Objective(
    token_loss,
    normalisers,
    wanted and {k: wanted[k] for k in ("alpha", "top_k", "add_tail", "advantage_clip")},
    signal is not None,
    method["token_weight"]["name"] == "certainty",
    mixture,
  )
