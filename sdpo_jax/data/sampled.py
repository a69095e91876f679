"""The gate between engine and trainer: what is trained is what was sampled.

A wrong id, or a log-probability one place off, trains without a complaint: the loss is finite and
the run learns something else. Every batch is therefore compared with the completions that the
engine returned, which `Rollout.sampled` keeps untouched. It costs a pass over the tokens.
"""

import numpy as np

from sdpo_jax.errors import RunError
from sdpo_jax.records import Completion, Rollout, Rows, Segment, TrainBatch


def check_sampled(batch: TrainBatch, rollouts: list[Rollout]) -> None:
  """Raises RunError, naming the row, unless the batch trains what the engine returned.

  rollouts: of the batch's rows, in their order. In each row that trains anything, tokens with a
  weight are those of a completion, with its log-probabilities at the same places. The packed rows
  of the policy, and of each reading that shows the response, hold the same ids as `response_BR`.
  A rollout without `sampled` is compared with its own tokens.
  """
  for b, rollout in enumerate(rollouts):
    if batch.weight_BR[b].any():
      _check_row(batch, b, rollout)


def _check_row(batch: TrainBatch, b: int, rollout: Rollout) -> None:
  token_R, logp_R = _as_sampled(batch, b, rollout)
  R = len(rollout.tokens)
  for name, there_R, want_R in (
    ("token", batch.response_BR[b], token_R),
    ("log-probability", batch.logp_rollout_BR[b], logp_R),
  ):
    wrong_R = (batch.weight_BR[b] > 0) & (there_R != want_R)  # NaN, which nothing equals, is wrong
    _refuse_any(wrong_R, b, rollout, f"trains another {name} than the engine returned")
  everywhere_R = np.ones(R, bool)
  readings = [("the policy's row", batch.policy, everywhere_R)]
  for number, reading in enumerate(batch.readings):
    if reading.has_BR[b].any():
      name = f"the teacher's row of reading {number}"
      readings.append((name, reading.rows, reading.has_BR[b, :R]))
  for name, rows, is_there_R in readings:
    wrong_R = is_there_R & (_tokens_of_row(rows, batch, b, R) != np.asarray(rollout.tokens))
    _refuse_any(wrong_R, b, rollout, f"holds other tokens in {name} than the response has")


def _as_sampled(batch: TrainBatch, b: int, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
  """Returns the tokens and log-probabilities [R] of row b as sampled: -1 and NaN elsewhere."""
  token_R = np.full(batch.response_BR.shape[1], -1, np.int64)
  logp_R = np.full(len(token_R), np.nan, np.float32)
  segments = rollout.sampled
  if segments is None:
    whole = Completion("", 0, rollout.tokens, rollout.logp, rollout.finish_reason)
    segments = [Segment(0, whole)]
  for segment in segments:
    completion = segment.completion
    place = slice(segment.start, segment.start + len(completion.tokens))
    token_R[place], logp_R[place] = completion.tokens, completion.logp
  return token_R, logp_R


def _tokens_of_row(rows: Rows, batch: TrainBatch, b: int, count: int) -> np.ndarray:
  """Returns the response tokens [R] of row b that stand in packed rows, as the step finds them."""
  C, X = rows.at_CX.shape
  pack = b * C // len(batch.start_B)
  first = batch.start_B[b]
  columns = rows.at_CX[pack, first : first + count] + 1
  return rows.token_CPT[pack].reshape(-1)[columns]


def _refuse_any(wrong_R: np.ndarray, b: int, rollout: Rollout, what: str) -> None:
  if wrong_R.any():
    raise RunError(
      f"row {b} of the batch (task {rollout.task.id}) {what}, first at token "
      f"{int(np.argmax(wrong_R))}: a mistake in sdpo_jax or in its engine; nothing of this batch "
      "was trained, and what is on disk is intact"
    )
