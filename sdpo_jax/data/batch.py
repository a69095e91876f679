"""Groups of rollouts -> teacher prompts -> one TrainBatch of packed rows, with a count of everything that was cut or dropped.

Several texts share a row of fixed length, told apart by segment ids, so that short responses do not pay for long ones; student and
teacher rows are packed apart and linked by the response tokens' columns. Responses to one question begin alike; where asked, what they share stands once a row. The batch is cut into packs (see TrainBatch), each for one
micro-batch on one device. Within an optimiser update whole questions are dealt to its packs so that all hold about as many tokens.

Every new shape is a compilation of the train step, so one used before is used again wherever it fits, until what that wasted would have paid for a
compilation, as one who does not know how often he will ski rents until the rent would have bought the skis. Lengths drift as a policy learns.
Over-long teacher prompts: the feedback is shortened first, then the solution; the question, the closing instruction and the
generation header are never touched. What was shortened is counted.
"""

import functools
from typing import NamedTuple

import numpy as np

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.packing import (
  Dealt,
  Text,
  balanced_order,
  begin_alike,
  first_fit,
  lay_out,
  together,
)
from sdpo_jax.data.shapes import Shapes, choose_shape
from sdpo_jax.data.teacher_prompt import teacher_prompt
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Counterfactual, Rollout, Rows, Status, TrainBatch


class Packed(NamedTuple):
  batch: TrainBatch
  rollouts: list[Rollout]  # row b of the batch
  contexts: list[Context | None]  # what its teacher reads; None: nothing
  metrics: dict[str, float]  # counts of what was dropped, shortened, shown
  # what the teacher reads in each of the batch's further readings
  counterfactuals: tuple[list[Context | None], ...] = ()


def pack(
  groups: list[list[Rollout]],
  *,
  chat: Chat,
  messages,
  teacher_context,
  advantage,
  max_teacher_tokens: int,
  length_multiple: int,
  response_multiple: int,
  shapes: Shapes,
  updates: int = 1,
  micro_batches: int = 1,
  shards: int = 1,
  counterfactual=None,
  share_prefixes: bool = False,
) -> Packed:
  """groups[q][g]: rollouts. messages(task) -> chat messages; teacher_context(group, i) -> Context | None; advantage(reward_QG) -> advantage_QG.

  counterfactual(group, i) -> (Context, weight) or None for each further reading, equally many for all; None: there is none.
  Each of the `updates` gets a pack on each of the `shards` for each of at most `micro_batches`, or of a divisor of it where texts are short. shapes: may grow by one.
  share_prefixes: what the responses to one question read in common stands once a row.
  """
  valid = lambda r: r.feedback.status is not Status.ENV_FAILED and np.isfinite(r.feedback.reward)
  reward_QG = np.array(
    [
      [r.feedback.reward if r.feedback.status is not Status.ENV_FAILED else np.nan for r in g]
      for g in groups
    ],
    np.float32,
  )
  advantage_B = advantage(reward_QG).reshape(-1).astype(np.float32)
  rollouts = [r for group in groups for r in group]
  contexts = [
    teacher_context(group, i) if valid(group[i]) else None
    for group in groups
    for i in range(len(group))
  ]
  readings = (
    [counterfactual(group, i) for group in groups for i in range(len(group))]
    if counterfactual
    else []
  )
  more_contexts = [[None if r is None else r[0] for r in reading] for reading in zip(*readings)]
  more_weights = [
    np.array([0.0 if r is None else r[1] for r in reading], np.float32)
    for reading in zip(*readings)
  ]

  def teacher_texts(contexts) -> tuple[list[list[int]], list[int], int]:
    """Prompt and response of each row, nothing where the teacher reads nothing; where the responses begin; how many were shortened."""
    found = [
      ([], False) if c is None else teacher_prompt(chat, messages(r.task), c, max_teacher_tokens)
      for r, c in zip(rollouts, contexts)
    ]
    return (
      [p + r.tokens if p else [] for (p, _), r in zip(found, rollouts)],
      [len(p) for p, _ in found],
      sum(was_cut for _, was_cut in found),
    )

  B, G = len(rollouts), len(groups[0])
  student = (
    [r.prompt_tokens + r.tokens if valid(r) else [] for r in rollouts],
    [len(r.prompt_tokens) for r in rollouts],
  )
  (*teacher, shortened), more = teacher_texts(contexts), [teacher_texts(c) for c in more_contexts]
  read = [student, teacher, *(reading[:2] for reading in more)]
  answers = [len(r.tokens) if valid(r) else 0 for r in rollouts]
  # the student's half goes backward too
  work = [3 * len(s) + sum(map(len, t)) for s, *t in zip(*(texts for texts, _ in read))]

  def in_packs(rows, order, packs):
    return [
      [rows[b] for b in order[first : first + B // packs]] for first in range(0, B, B // packs)
    ]

  @functools.cache
  def dealt(packs) -> tuple[Dealt, list[int]]:
    """And the order in which the rows of the batch then stand."""

    def so(whole):
      order = balanced_order(work, G, updates, packs // updates, whole=whole)
      question = in_packs([b // G for b in range(B)], order, packs)
      known = lambda texts, starts: [
        begin_alike(*pack) if share_prefixes else [Text(len(t)) for t in pack[0]]
        for pack in zip(in_packs(texts, order, packs), in_packs(starts, order, packs), question)
      ]
      student, teacher, *more = (known(*half) for half in read)
      return Dealt(student, teacher, in_packs(answers, order, packs), tuple(more)), order

    largest = lambda found: max(
      3 * together(s) + sum(map(together, t))
      for s, *t in zip(found[0].student, found[0].teacher, *found[0].more)
    )
    return min(
      (so(whole) for whole in ((True, False) if share_prefixes else (False,))), key=largest
    )

  counts = [updates * shards * m for m in range(1, micro_batches + 1) if micro_batches % m == 0]
  shape = choose_shape(
    lambda packs: dealt(packs)[0],
    counts,
    shapes,
    length_multiple=length_multiple,
    response_multiple=response_multiple,
  )
  chosen, order = dealt(shape.packs)
  at = [[sum(pack[:i]) for i in range(len(pack))] for pack in chosen.responses]

  def half(known, texts, starts, rows, length):
    placed = [first_fit(pack, length) for pack in known]
    mine = (in_packs(x, order, shape.packs) for x in (texts, starts))
    laid = [
      lay_out(*pack, rows, length, shape.tokens, chat.pad_token)
      for pack in zip(placed, known, *mine, at)
    ]
    stacked = Rows(*map(np.stack, zip(*laid)))
    return stacked if share_prefixes else stacked._replace(prefix_CPT=None)

  zeros = lambda dtype: np.zeros((B, shape.responses), dtype)
  taught = [context is not None for context in contexts]
  rows, teacher_rows, more_rows = shape.halves()
  batch = TrainBatch(
    student=half(chosen.student, *read[0], *rows),
    teacher=half(chosen.teacher, *read[1], *teacher_rows),
    start_B=np.array(sum(at, []), np.int32),
    response_BR=zeros(np.int32),
    weight_BR=zeros(np.float32),
    advantage_B=advantage_B[order],
    distill_B=np.array(taught, np.float32)[order],
    logp_rollout_BR=zeros(np.float32),
    logp_old_BR=zeros(np.float32),
    counterfactuals=tuple(
      Counterfactual(half(known, *r, *more_rows), w[order])
      for known, r, w in zip(chosen.more, read[2:], more_weights)
    ),
  )
  rollouts, contexts, *more_contexts = (
    [found[b] for b in order] for found in (rollouts, contexts, *more_contexts)
  )
  for b, r in enumerate(rollouts):
    if valid(r):  # others lie in no pack, and may be longer than all that do
      n = len(r.tokens)
      batch.response_BR[b, :n], batch.logp_rollout_BR[b, :n], batch.weight_BR[b, :n] = (
        r.tokens,
        r.logp,
        1.0,
      )
  halves = (batch.student, batch.teacher) if any(taught) else (batch.student,)
  metrics = {
    "data/dropped": float(sum(not valid(r) for r in rollouts)),
    "data/teacher_share": float(batch.distill_B.mean()),
    "data/teacher_shortened": float(shortened),
    "data/solution_share": float(np.mean([c is not None and bool(c.solution) for c in contexts])),
    "data/useful_tokens": float(
      sum((half.segment_CPT > 0).sum() for half in halves)
      / sum(half.segment_CPT.size for half in halves)
    ),
    # of the train step, this run's earlier sessions included
    "perf/compiles": float(len(shapes.known)),
  }
  if counterfactual:
    metrics |= {
      "counterfactual/teacher_tokens": float(sum(len(t) for texts, _, _ in more for t in texts)),
      "counterfactual/shortened": float(sum(n for _, _, n in more)),
      "counterfactual/told_share": float(
        np.mean([c is not None for row in more_contexts for c in row])
      ),
    }
  return Packed(batch, rollouts, contexts, metrics, tuple(more_contexts))
