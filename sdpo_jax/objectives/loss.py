"""Joins the parts of a method into one loss; `reference.py` is the specification.

A loss is a sum of terms. Each term is a mean over its own tokens:

  loss = sum over terms of share * sum(loss_BR * weight_BR) / normaliser

  distill         the token signal of the plain reading, on responses whose teacher has a context
  policy          the surrogate, on all responses, with the advantage of the response or the credit
                  of each token; the method's reduction weighs and divides it
  counterfactual  the token signal of each further reading (`notes.py`), on its own responses
  reference       the KL to the first weights (`reference_kl.py`), on all responses

The shares of `distill` and `policy` add up to 1, unless a `balance` adds the former to the whole of
the latter. The reference KL has a coefficient of its own, or the balance's.

With policy_share "routed" every response belongs to one term alone: to `distill` where route_B is
1, else to `policy`. Both sums are then divided by the tokens of the whole batch. A response that is
routed to `distill` without a reading is in neither.

All further readings are divided by the same number, the tokens of responses that any reading
weighs. A failed response adds D(plain) + sum over readings of weight * D(reading), all over it.
With `gate` a token counts only where sign(log q - log pi) is the same in the plain and the further
reading. The metric `counterfactual/agreement` is the share of such tokens among those with both
readings, gate or not. In a mixture the further readings are part of the teacher, and there is
neither this term nor the metric. The further reading of a credit, whose metric it is too, has no
term.

The normalisers depend on the batch alone. They are taken over the whole batch before it is cut into
micro-batches, so that the cut changes neither loss nor gradient.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.objectives.balance import STRONG
from sdpo_jax.objectives.build import Method
from sdpo_jax.objectives.credit import advantages
from sdpo_jax.objectives.signals import TEACHER_ENTROPY, Signals
from sdpo_jax.objectives.surrogate import token_mean
from sdpo_jax.records import LEAST, Histogram, Ratio, TrainBatch, bin_ratio

# of histograms: a sixth a bin, and 1 % a bin where small changes of a quantile decide something
COARSE, FINE = 128, 2048


class Term(NamedTuple):
  """One addend of the loss, before it is divided by its normaliser."""

  name: str
  share: float | jax.Array  # its coefficient in the loss
  loss_BR: jax.Array  # nats
  weight_BR: jax.Array


def token_loss(
  method: Method,
  signals: tuple[Signals, ...],
  batch: TrainBatch,
  normalisers: dict[str, jax.Array],
) -> tuple[jax.Array, dict[str, Ratio | Histogram]]:
  """Returns the loss of a batch, or its share of one for a micro-batch, in nats; and metrics.

  signals: of the plain reading, then of each further one. normalisers: of the whole batch.
  """
  signals, batch = zero_where_unweighted(signals, batch)
  loss: Any = 0.0
  sums: dict[str, list] = {}
  for term in [*plain_terms(method, signals, batch), *further_terms(method, signals, batch)]:
    total = jnp.sum(term.loss_BR * term.weight_BR)
    loss += term.share * total / normalisers[term.name]
    sums.setdefault(term.name, []).append((total, jnp.sum(term.weight_BR)))
  metrics = {}
  for name, totals_and_counts in sums.items():
    totals, counts = zip(*totals_and_counts)
    metrics[f"train/loss_{name}"] = Ratio(sum(totals), sum(counts))
  return loss, metrics | diagnostics(method, signals, batch)


def normalisers(method: Method, batch: TrainBatch) -> dict[str, jax.Array]:
  """Returns what the sum of each term is divided by: a scalar over the whole batch."""
  divisors = {name: divisor for name, (_, divisor) in plain_weights(method, batch).items()}
  if batch.readings[1:] and method.compares_further:
    has_teacher_BR = functools.reduce(jnp.maximum, [r.has_BR for r in batch.readings])
    tokens = jnp.sum(batch.weight_BR * has_teacher_BR)
    divisors["counterfactual"] = jnp.maximum(tokens, 1.0)
  return divisors


def zero_where_unweighted(
  signals: tuple[Signals, ...], batch: TrainBatch
) -> tuple[tuple[Signals, ...], TrainBatch]:
  """Replaces by 0 what stands where the weight is 0, which may be anything.

  To leave it out of the sum is not enough: 0 * inf is NaN, in the gradient even behind a `where`.
  """
  has_weight_BR = batch.weight_BR > 0

  def zeroed(x_BR):
    return jnp.where(has_weight_BR, x_BR, 0.0)

  batch = batch._replace(
    logp_old_BR=zeroed(batch.logp_old_BR),
    logp_rollout_BR=zeroed(batch.logp_rollout_BR),
    advantage_BR=zeroed(batch.advantage_BR),
    # where there are none they stay None
    credit_BR=jax.tree.map(zeroed, batch.credit_BR),
    logp_ref_BR=jax.tree.map(zeroed, batch.logp_ref_BR),
  )
  return jax.tree.map(zeroed, signals), batch


def plain_weights(method: Method, batch: TrainBatch) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns {term: (weight_BR, normaliser)} of `distill`, `policy` and `reference`."""
  weights = teaching_weights(method, batch)
  if method.reference_kl is not None:
    weights["reference"] = token_mean(batch.weight_BR)
  return weights


def teaching_weights(method: Method, batch: TrainBatch) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns {term: (weight_BR, normaliser)} of the terms `distill` and `policy`."""
  if method.policy_share is None:
    distils_B1 = (batch.route_B > 0)[:, None]
    has_reading_BR = batch.readings[0].has_BR
    weight_BR, normaliser = method.reduction(batch.weight_BR)
    return {
      "distill": (weight_BR * (distils_B1 & has_reading_BR), normaliser),
      "policy": (weight_BR * ~distils_B1, normaliser),
    }
  weights = {}
  if method.token_signal is not None:
    weights["distill"] = token_mean(batch.weight_BR * batch.readings[0].weight_BR)
  if method.surrogate is not None:
    weights["policy"] = method.reduction(batch.weight_BR)
  return weights


def plain_terms(method: Method, signals: tuple[Signals, ...], batch: TrainBatch) -> list[Term]:
  """Returns the terms of the plain reading: token signal, surrogate and reference KL."""
  plain = signals[0]
  terms = []
  for name, (weight_BR, _) in plain_weights(method, batch).items():
    if name == "distill":
      loss_BR = method.token_signal(plain, batch) * method.token_weight(plain, batch)
    elif name == "policy":
      loss_BR = method.surrogate(plain, batch, advantages(method.credit, signals, batch))
    else:
      loss_BR = method.reference_kl(plain, batch)
    terms.append(Term(name, share_of(method, name, batch), loss_BR, weight_BR))
  return terms


def further_terms(method: Method, signals: tuple[Signals, ...], batch: TrainBatch) -> list[Term]:
  """Returns one term for each further reading that is compared."""
  terms: list[Term] = []
  if not method.compares_further:
    return terms
  for reading, further in zip(batch.readings[1:], signals[1:]):
    weight_BR = batch.weight_BR * reading.weight_BR
    if method.notes.gate:
      agree_BR, both_BR = agreement(signals[0], further, weight_BR, batch)
      weight_BR = jnp.where(both_BR & ~agree_BR, 0.0, weight_BR)
    loss_BR = method.token_signal(further, batch) * method.token_weight(further, batch)
    terms.append(Term("counterfactual", share_of(method, "distill", batch), loss_BR, weight_BR))
  return terms


def share_of(method: Method, term: str, batch: TrainBatch) -> float | jax.Array:
  """Returns the coefficient of a term: a constant of the program, unless a balance moves it."""
  if term == "reference":
    own = method.reference_kl.coefficient
    return method.balance.reference(batch.control) if own is None else own
  if term == "distill" and method.balance is not None:
    return method.balance.signal(batch.control)
  if method.policy_share is None:
    return 1.0
  return method.policy_share if term == "policy" else 1.0 - method.policy_share


def agreement(
  plain: Signals, further: Signals, weight_BR: jax.Array, batch: TrainBatch
) -> tuple[jax.Array, jax.Array]:
  """Returns (agree_BR, both_BR): the gaps have one sign; both readings weigh the token."""
  both_BR = (weight_BR > 0) & batch.readings[0].has_BR
  agree_BR = jnp.sign(further.gap_BR) == jnp.sign(plain.gap_BR)
  return agree_BR, both_BR


def diagnostics(
  method: Method, signals: tuple[Signals, ...], batch: TrainBatch
) -> dict[str, Ratio | Histogram]:
  """Returns metrics of the policy, of the plain reading, and of how the readings agree."""
  plain = signals[0]
  # between the engine that sampled and the trainer before the batch's updates
  rollout_gap_BR = batch.logp_rollout_BR - batch.logp_old_BR
  metrics: dict[str, Ratio | Histogram] = {
    "train/entropy": weighted_mean(plain.entropy_BR, batch.weight_BR),
    "train/rollout_kl": weighted_mean(rollout_gap_BR, batch.weight_BR),
    "train/rollout_gap": weighted_mean(jnp.abs(rollout_gap_BR), batch.weight_BR),
    "train/rollout_gap_p99": histogram(jnp.abs(rollout_gap_BR), batch.weight_BR > 0, COARSE),
  }
  if method.contrast is not None:
    is_strong_BR = jnp.abs(batch.credit_BR) > method.contrast.strong
    is_scored_BR = batch.weight_BR > 0
    strong = jnp.sum(is_strong_BR & is_scored_BR, dtype=jnp.float32)
    metrics[STRONG] = Ratio(strong, jnp.sum(is_scored_BR, dtype=jnp.float32))
  if method.token_signal is not None and plain.logp_teacher_BR is not None:
    weight_BR, _ = plain_weights(method, batch)["distill"]
    metrics["train/teacher_gap"] = weighted_mean(plain.gap_BR, weight_BR)
    metrics["train/teacher_gap_abs"] = weighted_mean(jnp.abs(plain.gap_BR), weight_BR)
  if method.credit is not None:
    has_reading_BR = batch.weight_BR * batch.readings[0].has_BR
    is_credited_BR = has_reading_BR * (plain_weights(method, batch)["policy"][0] > 0)
    change_BR = advantages(method.credit, signals, batch) - batch.advantage_BR
    metrics["train/credit_change"] = weighted_mean(jnp.abs(change_BR), is_credited_BR)
    metrics["train/teacher_gap"] = weighted_mean(plain.gap_BR, has_reading_BR)
    metrics["train/teacher_gap_abs"] = weighted_mean(jnp.abs(plain.gap_BR), has_reading_BR)
  if TEACHER_ENTROPY in method.reads:
    is_read_BR = (batch.weight_BR > 0) & batch.readings[0].has_BR
    entropies = histogram(plain.entropy_teacher_BR, is_read_BR, FINE)
    metrics["train/teacher_entropy_p50"] = entropies
  agreeing, compared = [], []
  for reading, further in zip(batch.readings[1:], signals[1:]):
    weight_BR = batch.weight_BR * reading.weight_BR
    agree_BR, both_BR = agreement(plain, further, weight_BR, batch)
    agreeing.append(jnp.sum(agree_BR & both_BR, dtype=jnp.float32))
    compared.append(jnp.sum(both_BR, dtype=jnp.float32))
  if compared:
    metrics["counterfactual/agreement"] = Ratio(sum(agreeing), sum(compared))
  return metrics


def histogram(x_BR: jax.Array, is_counted_BR: jax.Array, bins: int) -> Histogram:
  """Counts values >= 0; one that rounding has put below 0 counts as 0."""
  x_BR = jnp.maximum(x_BR, 0.0)
  place_BR = jnp.floor(jnp.log(x_BR / LEAST) / math.log(bin_ratio(bins)) + 1)
  place_BR = jnp.clip(place_BR, 0, bins - 1).astype(jnp.int32)
  counts = jnp.zeros(bins, jnp.int32).at[place_BR].add(is_counted_BR.astype(jnp.int32))
  return Histogram(counts)


def weighted_mean(x_BR: jax.Array, weight_BR: jax.Array) -> Ratio:
  """Returns the weighted sum and the sum of weights."""
  return Ratio(jnp.sum(x_BR * weight_BR), jnp.sum(weight_BR))
