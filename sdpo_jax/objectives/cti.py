"""Contrasts a response with its siblings at each token: the credit c of CRAFT. Host code, in numpy.

Source: CRAFT, arXiv 2606.29476, pillar 1. With A the advantage of a response and d the gap
log q - log pi of its token, where pi is the policy as it sampled (given_policy.py), for member i of
a group and its token at one place of one turn:

  contrast  sum over siblings j of w_j A_j - A_i, where w = softmax over the siblings of d_j / tau
  c         sign(contrast) (2 sigmoid(beta |contrast|) - 1) = tanh(beta contrast / 2), in [-1, 1]

A sibling counts where it has a token at the same place of the same turn, with a weight and a
reading by the teacher. Without any, or in a group of fewer than g_min members, the contrast is A d.

What it amounts to. With two-valued rewards all advantages of a group are one of two numbers. Then
the siblings' mean lies between the two, whatever the weights are: the contrast is never above 0 for
a success and never below 0 for a failure. As printed, c has the sign of -A wherever the estimator
is used and not the fallback. The loss -c log pi then lowers the tokens of successes and raises
those of failures, against the policy gradient, and the gap decides the size alone. The paper's
table of four quadrants, in which the sign of the gap turns that of c, holds for the fallback.
Moreover standardised advantages saturate c: |contrast| is about 1, and tanh(5 / 2) = .99. So
`cti_sign` = -1 is there to compare with. With many-valued rewards none of this has to hold.
In a group of two the only sibling has all the weight: the gap then decides nothing, and the teacher
teaches nothing but where a token has no sibling (`teacher_gate.py` refuses such a run).

What the estimator tends to. Let the pairs (A, d) of the members be independent and of one
distribution, w = e^(d / tau). The siblings' mean is a self-normalised importance estimate: as G
grows it converges almost surely to E[w A] / E[w], if E[w] is finite. Its variance times G - 1 tends
to E[w^2 (A - m)^2] / E[w]^2 with that limit m, if E[w^2] is finite, and its bias is of order 1 / G.
The paper claims consistency and a bound without these conditions. They fail where gaps have heavy
tails: exp(d / tau) needs two moments. A of a group is standardised by the group itself, so that its
members are independent only in the limit. After the first turn siblings are in states of their own,
and that their tokens are of one distribution is an assumption: `craft/aligned` measures how many
tokens have a sibling at all, not how alike these are.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from sdpo_jax.records import TrainBatch

CREDIT = "credit_BR"  # what a part declares that reads c


def cti_credit(
  gap_GR: np.ndarray,
  adv_G: np.ndarray,
  valid_GR: np.ndarray,
  *,
  tau: float = 1.0,
  beta_pos: float = 5.0,
  beta_neg: float = 5.0,
  g_min: int = 2,
) -> np.ndarray:
  """Returns c [..., G, R] of aligned groups; 0 where a token is not valid.

  gap_GR: nats; column r is the same place of the same turn in all members.
  adv_G: the advantage of each member, or [..., G, R] where it depends on the token.
  valid_GR: bool. What stands under False may be anything.
  g_min: members with a valid token that a group needs for the estimator.
  """
  gap_GR, adv_G = np.asarray(gap_GR), np.asarray(adv_G)
  adv_GR = np.broadcast_to(adv_G if adv_G.ndim == gap_GR.ndim else adv_G[..., None], gap_GR.shape)
  valid_GR = np.asarray(valid_GR, bool)
  gap_GR, adv_GR = np.where(valid_GR, gap_GR, 0), np.where(valid_GR, adv_GR, 0)
  is_large = valid_GR.any(-1).sum(-1)[..., None] >= g_min
  contrast_GR = adv_GR * gap_GR
  for i in range(gap_GR.shape[-2]):
    others_GR = valid_GR.copy()
    others_GR[..., i, :] = False
    mean_R = _softmax_mean(adv_GR, gap_GR / tau, others_GR)
    is_estimated = is_large & others_GR.any(-2)
    contrast_GR[..., i, :] = np.where(
      is_estimated, mean_R - adv_GR[..., i, :], contrast_GR[..., i, :]
    )
  beta_GR = np.where(contrast_GR > 0, beta_pos, beta_neg).astype(contrast_GR.dtype)
  return np.where(valid_GR, np.tanh(0.5 * beta_GR * contrast_GR), 0)


def _softmax_mean(x_GR: np.ndarray, logit_GR: np.ndarray, counts_GR: np.ndarray) -> np.ndarray:
  """Returns the mean over members that count, weighted by the softmax of their logits; else 0.

  The largest logit is that of these members: that of another one may be 700 nats above it.
  """
  masked_GR = np.where(counts_GR, logit_GR, -np.inf)
  top_R = masked_GR.max(-2, keepdims=True)
  weight_GR = np.exp(masked_GR - np.where(np.isfinite(top_R), top_R, 0))
  total_R = weight_GR.sum(-2)
  return (weight_GR * x_GR).sum(-2) / np.where(total_R > 0, total_R, 1)


class Places(NamedTuple):
  """Where the tokens [B, R] of a batch stand in a layout [Q, G, turns x longest turn]."""

  counts_BR: np.ndarray  # the tokens that are laid out
  at: tuple[np.ndarray, ...]  # their indices in the layout, in the order of counts_BR
  sizes: tuple[int, ...]

  @classmethod
  def of(cls, member_B2: np.ndarray, turn_BR, place_BR, counts_BR: np.ndarray) -> "Places":
    """Finds the place of each token that counts.

    member_B2: question and member of each row. turn_BR, place_BR: as in `TrainBatch`. A member may
    have several rows, of different turns.
    """
    row, column = np.nonzero(counts_BR)
    turn, place = np.zeros_like(column), column
    if turn_BR is not None:
      turn, place = turn_BR[row, column], place_BR[row, column]
    longest = place.max(initial=0) + 1
    at = *member_B2[row].T, turn * longest + place
    sizes = tuple(int(x.max(initial=0)) + 1 for x in at)
    return cls(counts_BR, at, sizes)

  def lay_out(self, x_BR: np.ndarray) -> np.ndarray:
    """Returns values in the layout; 0 where no token stands."""
    laid_out = np.zeros(self.sizes, x_BR.dtype)
    laid_out[self.at] = x_BR[self.counts_BR]
    return laid_out

  def take_back(self, x_QGR: np.ndarray) -> np.ndarray:
    """Returns values of the layout as [B, R]; 0 for tokens that were not laid out."""
    taken = np.zeros(self.counts_BR.shape, x_QGR.dtype)
    taken[self.counts_BR] = x_QGR[self.at]
    return taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cti:
  """Computes c for a generation batch, from the pass before its updates.

  It is done once, on whole groups: siblings may be in other packs, in other micro-batches and on
  other devices, and c is detached anyway. With several updates it is that of before the first one.

  tau: nats, of the softmax over siblings.
  beta_pos, beta_neg: how fast c saturates where the contrast is above 0, and below.
  g_min: groups of fewer members take the fallback; 999 makes all of them do (the paper's run A6).
  cti_sign: 1, as printed, or -1, which turns c around for everything that reads it.
  strong: a token with |c| above it counts in train/contrast_strong, which `balance` may read.
  """

  tau: float = 1.0
  beta_pos: float = 5.0
  beta_neg: float = 5.0
  g_min: int = 2
  cti_sign: int = 1
  strong: float = 0.1

  def __post_init__(self):
    if self.cti_sign not in (1, -1):
      raise ValueError(
        f"method.contrast.cti_sign={self.cti_sign!r} must be 1, as printed, or -1, its opposite"
      )

  def credit(
    self, batch: TrainBatch, gap_BR: np.ndarray, member_B2: np.ndarray
  ) -> tuple[np.ndarray, dict[str, float]]:
    """Returns c as float32 [B, R], and metrics of the batch.

    gap_BR: log q - log pi before the updates. member_B2: question and member of each row.
    """
    is_scored_BR = batch.weight_BR > 0
    counts_BR = is_scored_BR & batch.readings[0].has_BR
    places = Places.of(member_B2, batch.turn_BR, batch.place_BR, counts_BR)
    valid_QGR = places.lay_out(counts_BR)
    c_QGR = cti_credit(
      places.lay_out(np.asarray(gap_BR, np.float32)),
      places.lay_out(batch.advantage_BR),
      valid_QGR,
      tau=self.tau,
      beta_pos=self.beta_pos,
      beta_neg=self.beta_neg,
      g_min=self.g_min,
    )
    credit_BR = places.take_back(self.cti_sign * c_QGR).astype(np.float32)
    aligned = (valid_QGR * (valid_QGR.sum(1, keepdims=True) > 1)).sum()
    gap = gap_BR[counts_BR]
    metrics = {}
    if gap.size:
      metrics["craft/aligned"] = float(aligned / is_scored_BR.sum())
      metrics["train/teacher_gap"] = float(gap.mean())
      metrics["train/teacher_gap_abs"] = float(np.abs(gap).mean())
    return credit_BR, metrics


def none() -> None:
  """Compares no response with its siblings."""


CONTRASTS = {"none": none, "cti": Cti}
