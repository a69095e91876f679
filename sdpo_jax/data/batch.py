"""Packs judged groups of rollouts into one TrainBatch, and counts all that was cut or dropped.

The policy's rows and the teacher's are packed apart and linked by the columns of the response
tokens. The batch is cut into packs (see `TrainBatch`), each for one micro-batch on one device.
Within an optimizer update whole questions are dealt to its packs so that all hold about as many
tokens.
"""

import dataclasses
import functools
from typing import Callable, NamedTuple

import numpy as np

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.packing import (
  Extent,
  PackSize,
  PackTexts,
  balanced_order,
  first_fit,
  in_packs,
  lay_out,
  shared_beginnings,
  stack_packs,
  tokens_together,
)
from sdpo_jax.data.shapes import Load, Rounding, Shape, Shapes, choose_shape
from sdpo_jax.data.teacher_prompt import teacher_prompt
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Reading, Rollout, Rows, Status, TrainBatch


class Packed(NamedTuple):
  """A batch, and what the host knows of its rows."""

  batch: TrainBatch
  rollouts: list[Rollout]  # row b of the batch
  # What the teacher reads at row b: in the plain reading, then in each further one; None: nothing.
  contexts: tuple[list[Context | None], ...]
  metrics: dict[str, float]  # counts of what was dropped, shortened, shown


@dataclasses.dataclass(frozen=True)
class PackSettings:
  """How batches of a run are cut and padded.

  Each of the `updates` gets a pack on each of the `shards` for each of at most `micro_batches`, or
  of a divisor of it where texts are short.
  share_prefixes: what the responses to one question read in common stands once a row.
  """

  max_teacher_tokens: int
  rounding: Rounding
  updates: int = 1
  micro_batches: int = 1
  shards: int = 1
  share_prefixes: bool = False

  def pack_counts(self) -> list[int]:
    """Returns the numbers of packs that a batch may have, ascending."""
    divisors = [m for m in range(1, self.micro_batches + 1) if self.micro_batches % m == 0]
    return [self.updates * self.shards * m for m in divisors]


@dataclasses.dataclass(frozen=True)
class Packer:
  """Packs the generation batches of a run. `shapes` may grow by one with each batch.

  messages(task): the chat messages that ask the question.
  teacher_context(group, i): the teacher's context for rollout i of a group, or None.
  advantage(reward_QG): advantage_QG; a reward that is missing is NaN.
  further_readings(group, i): (context, weight) or None for each further reading by the teacher,
    equally many for all rollouts; None: the method has none.
  """

  chat: Chat
  messages: Callable
  teacher_context: Callable
  advantage: Callable
  settings: PackSettings
  shapes: Shapes
  further_readings: Callable | None = None

  def pack(self, groups: list[list[Rollout]]) -> Packed:
    """Returns the batch of groups[q][g]; all groups have equally many rollouts."""
    batch, responses = pack_responses(
      self._read(groups), len(groups[0]), self.settings, self.shapes, self.chat.pad_token
    )
    metrics = _measure(responses, batch)
    metrics["perf/compiles"] = float(len(self.shapes.known))  # earlier sessions included
    contexts = tuple(reading.contexts for reading in responses.readings)
    return Packed(batch, responses.rollouts, contexts, metrics)

  def _read(self, groups: list[list[Rollout]]) -> "Responses":
    """Renders the texts that policy and teacher read."""
    reward_QG = np.array([[_reward(r) for r in group] for group in groups], np.float32)
    advantage_B = self.advantage(reward_QG).reshape(-1).astype(np.float32)
    rollouts = [r for group in groups for r in group]
    policy = Texts(
      [r.prompt_tokens + r.tokens if is_valid(r) else [] for r in rollouts],
      [len(r.prompt_tokens) for r in rollouts],
    )
    places = [(group, i) for group in groups for i in range(len(group))]
    plain = []
    for group, i in places:
      context = self.teacher_context(group, i) if is_valid(group[i]) else None
      plain.append(None if context is None else (context, 1.0))
    readings = [plain]
    if self.further_readings is not None:
      readings += zip(*(self.further_readings(group, i) for group, i in places))
    readings = [self._reading(rollouts, shown) for shown in readings]
    return Responses(rollouts, advantage_B, policy, readings)

  def _reading(
    self, rollouts: list[Rollout], shown: list[tuple[Context, float] | None]
  ) -> "TeacherReading":
    """Renders the teacher's prompts of one reading.

    shown: the context and weight of each rollout.
    """
    tokens, starts, shortened = [], [], 0
    for rollout, context_and_weight in zip(rollouts, shown):
      if context_and_weight is None:
        tokens.append([])
        starts.append(0)
        continue
      context, _ = context_and_weight
      messages, limit = self.messages(rollout.task), self.settings.max_teacher_tokens
      prompt, was_shortened = teacher_prompt(self.chat, messages, context, limit)
      tokens.append(prompt + rollout.tokens)
      starts.append(len(prompt))
      shortened += was_shortened
    weight_B = np.array([0.0 if x is None else x[1] for x in shown], np.float32)
    contexts = [None if x is None else x[0] for x in shown]
    return TeacherReading(contexts, weight_B, Texts(tokens, starts), shortened)


def is_valid(rollout: Rollout) -> bool:
  """Tells whether a rollout was judged.

  Others lie in no pack, and may be longer than all that do.
  """
  judged = rollout.feedback.status is not Status.ENV_FAILED
  return judged and bool(np.isfinite(rollout.feedback.reward))


def _reward(rollout: Rollout) -> float:
  return np.nan if rollout.feedback.status is Status.ENV_FAILED else rollout.feedback.reward


class Texts(NamedTuple):
  """One text for each response: the tokens of a prompt and the response; [] where there is none."""

  tokens: list[list[int]]
  starts: list[int]  # where the response begins

  def in_order(self, order: list[int]) -> "Texts":
    return Texts([self.tokens[b] for b in order], [self.starts[b] for b in order])


class TeacherReading(NamedTuple):
  """What the teacher reads of each response in one reading."""

  contexts: list[Context | None]
  weight_B: np.ndarray
  texts: Texts
  shortened: int  # texts that had to be shortened

  def in_order(self, order: list[int]) -> "TeacherReading":
    contexts = [self.contexts[b] for b in order]
    return TeacherReading(
      contexts, self.weight_B[order], self.texts.in_order(order), self.shortened
    )


class Responses(NamedTuple):
  """The responses of a batch with the texts that hold them."""

  rollouts: list[Rollout]
  advantage_B: np.ndarray
  policy: Texts
  readings: list[TeacherReading]  # the plain one first

  def in_order(self, order: list[int]) -> "Responses":
    """Returns the same with response order[b] at row b."""
    return Responses(
      [self.rollouts[b] for b in order],
      self.advantage_B[order],
      self.policy.in_order(order),
      [reading.in_order(order) for reading in self.readings],
    )

  def halves(self) -> list[Texts]:
    """The policy's texts, then those of each reading by the teacher."""
    return [self.policy, *(reading.texts for reading in self.readings)]

  def lengths(self) -> list[int]:
    """Response tokens of each row; 0 for one that was not judged."""
    return [len(r.tokens) if is_valid(r) else 0 for r in self.rollouts]


def pack_responses(
  responses: Responses, group: int, settings: PackSettings, shapes: Shapes, pad_token: int
) -> tuple[TrainBatch, Responses]:
  """Deals responses to packs, chooses the shape and fills the arrays.

  group: so many consecutive responses answer one question. `shapes` may grow by one. Returns the
  batch, and the responses in the order of its rows.
  """
  dealing = _Dealing(responses, group, settings)
  shape = choose_shape(dealing.load, settings.pack_counts(), shapes, settings.rounding)
  deal = dealing.deal(shape.packs)
  responses = responses.in_order(deal.order)
  return _lay_out_batch(responses, deal, shape, pad_token, settings), responses


class _Deal(NamedTuple):
  """One way to cut a batch into packs."""

  order: list[int]  # the response at each row of the batch
  halves: list[list[list[Extent]]]  # of each half, of each pack, of each text
  lengths: list[list[int]]  # of each pack, of each response

  def largest_pack(self) -> int:
    """The work of the largest pack. The policy's half goes backward too."""
    work = []
    for policy, *readings in zip(*self.halves):
      work.append(3 * tokens_together(policy) + sum(map(tokens_together, readings)))
    return max(work)


class _Dealing:
  """The ways to cut one batch, each made once."""

  def __init__(self, responses: Responses, group: int, settings: PackSettings):
    self._responses, self._group, self._settings = responses, group, settings
    self._lengths = responses.lengths()
    tokens = [texts.tokens for texts in responses.halves()]
    self._work = [3 * len(p) + sum(map(len, teacher)) for p, *teacher in zip(*tokens)]
    self.deal = functools.cache(self._deal)

  def load(self, packs: int) -> Load:
    """Returns what the batch asks of a shape with so many packs."""
    deal = self.deal(packs)
    policy, teacher, *further = deal.halves
    return Load(
      texts_per_pack=len(policy[0]),
      halves=(policy, teacher, sum(further, [])),
      tokens=max(map(sum, deal.lengths)),
      responses=max(map(max, deal.lengths)),
    )

  def _deal(self, packs: int) -> _Deal:
    """Deals responses to packs; with shared prefixes, groups whole if packs stay as small."""
    if not self._settings.share_prefixes:
      return self._cut(packs, whole=False)
    ways = [self._cut(packs, whole=True), self._cut(packs, whole=False)]
    return min(ways, key=_Deal.largest_pack)

  def _cut(self, packs: int, *, whole: bool) -> _Deal:
    updates = self._settings.updates
    order = balanced_order(self._work, self._group, updates, packs // updates, whole=whole)
    questions = [b // self._group for b in range(len(order))]
    halves = [self._extents(texts, questions, order, packs) for texts in self._responses.halves()]
    return _Deal(order, halves, in_packs(self._lengths, order, packs))

  def _extents(
    self, texts: Texts, questions: list[int], order: list[int], packs: int
  ) -> list[list[Extent]]:
    if not self._settings.share_prefixes:
      return in_packs([Extent(len(tokens)) for tokens in texts.tokens], order, packs)
    parts = (in_packs(x, order, packs) for x in (texts.tokens, texts.starts, questions))
    return [shared_beginnings(*pack) for pack in zip(*parts)]


def _lay_out_batch(
  responses: Responses, deal: _Deal, shape: Shape, pad_token: int, settings: PackSettings
) -> TrainBatch:
  """Fills the arrays. responses: in the order of the deal."""
  first = [[sum(pack[:i]) for i in range(len(pack))] for pack in deal.lengths]
  rows_of = functools.partial(
    _half_rows, first=first, tokens=shape.tokens, pad_token=pad_token, settings=settings
  )
  policy_size, plain_size, further_size = shape.halves()
  sizes = [plain_size] + [further_size] * (len(responses.readings) - 1)
  policy_extents, *teacher_extents = deal.halves
  readings = []
  for reading, extents, size in zip(responses.readings, teacher_extents, sizes):
    readings.append(Reading(rows_of(reading.texts, extents, size), reading.weight_B))
  zeros_BR = np.zeros((len(responses.rollouts), shape.responses), np.float32)
  batch = TrainBatch(
    policy=rows_of(responses.policy, policy_extents, policy_size),
    readings=tuple(readings),
    start_B=np.array(sum(first, []), np.int32),
    response_BR=zeros_BR.astype(np.int32),
    weight_BR=zeros_BR.copy(),
    advantage_B=responses.advantage_B,
    logp_rollout_BR=zeros_BR.copy(),
    logp_old_BR=zeros_BR.copy(),
  )
  for b, r in enumerate(responses.rollouts):
    if is_valid(r):
      n = len(r.tokens)
      batch.response_BR[b, :n] = r.tokens
      batch.logp_rollout_BR[b, :n] = r.logp
      batch.weight_BR[b, :n] = 1.0 if r.weight is None else r.weight
  return batch


def _half_rows(
  texts: Texts,
  extents: list[list[Extent]],
  size: tuple[int, int],
  *,
  first: list[list[int]],
  tokens: int,
  pad_token: int,
  settings: PackSettings,
) -> Rows:
  """Lays out one half of the batch: the policy's texts, or those of one reading."""
  rows, length = size
  order = list(range(len(texts.tokens)))
  parts = [in_packs(x, order, len(extents)) for x in texts]
  packs = []
  for pack in zip(*parts, first, extents):
    pack = PackTexts(*pack)
    placed = first_fit(pack.extents, length)
    packs.append(lay_out(placed, pack, PackSize(rows, length, tokens), pad_token))
  return stack_packs(packs, share_prefixes=settings.share_prefixes)


def _measure(responses: Responses, batch: TrainBatch) -> dict[str, float]:
  """Counts what was dropped, shortened and shown."""
  plain, *further = responses.readings
  halves = [batch.policy]
  if any(context is not None for context in plain.contexts):
    halves.append(batch.readings[0].rows)
  filled = sum((rows.segment_CPT > 0).sum() for rows in halves)
  columns = sum(rows.segment_CPT.size for rows in halves)
  has_solution = [c is not None and bool(c.solution) for c in plain.contexts]
  metrics = {
    "data/dropped": float(sum(not is_valid(r) for r in responses.rollouts)),
    "data/teacher_share": float(plain.weight_B.mean()),
    "data/teacher_shortened": float(plain.shortened),
    "data/solution_share": float(np.mean(has_solution)),
    "data/useful_tokens": float(filled / columns),
  }
  if further:
    tokens, has_notes = 0, []
    for reading in further:
      tokens += sum(map(len, reading.texts.tokens))
      has_notes += [context is not None for context in reading.contexts]
    metrics |= {
      "counterfactual/teacher_tokens": float(tokens),
      "counterfactual/shortened": float(sum(reading.shortened for reading in further)),
      "counterfactual/told_share": float(np.mean(has_notes)),
    }
  return metrics
