"""Packs judged groups of rollouts into one TrainBatch, and counts all that was cut or dropped.

The policy's rows and the teacher's are packed apart and linked by the columns of the response
tokens. The batch is cut into packs (see `TrainBatch`), each for one micro-batch on one device.
Within an optimizer update whole questions are dealt to its packs so that all hold about as many
tokens.

`Packer.pack` goes through these steps:

  read      what policy and teacher read of each response, as tokens         -> Responses
  deal      responses to packs, for each number of packs that is allowed     -> Deal
  choose    the shape that all packs take (`data/shapes.py`)                 -> Shape
  lay out   the texts in rows, the responses in *_BR arrays                  -> TrainBatch
  check     that these hold what the engine returned (`data/sampled.py`)

`Packer.emptied` lays the same responses out again under a teacher that reads no context.
"""

import dataclasses
import functools
from typing import Callable, NamedTuple

import numpy as np

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.packing import (
  PackSize,
  PackTexts,
  Texts,
  balanced_order,
  cut_into_packs,
  first_fit,
  first_tokens,
  in_packs,
  lay_out,
  sampled_tokens,
  texts_read,
  tokens_together,
)
from sdpo_jax.data.sampled import check_sampled
from sdpo_jax.data.shapes import Load, Shape, ShapeRules, Shapes, choose_shape
from sdpo_jax.data.teacher_prompt import Shown, TeacherReader
from sdpo_jax.objectives.build import Method
from sdpo_jax.objectives.memory import Standing
from sdpo_jax.objectives.route import Lot, measure
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Reading, Rollout, Rows, Status, TrainBatch


class Packed(NamedTuple):
  """A batch, and what the host knows of its rows."""

  batch: TrainBatch
  rollouts: list[Rollout]  # row b of the batch
  # What the teacher reads at row b: in the plain reading, then in each further one; None: nothing.
  contexts: tuple[list[Context | None], ...]
  metrics: dict[str, float]  # counts of what was dropped, shortened, shown
  # The tokens that the teacher reads at row b in the plain reading, its prompt first; []: nothing.
  teacher_texts: Texts = Texts([])
  deal: "Deal | None" = None  # from which the batch was laid out; None: by somebody else
  # int: the question of row b, and which of its responses it is; None: by somebody else
  member_B2: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class PackSettings:
  """How the batches of a run are cut and padded.

  A batch has updates x shards x m packs. m divides `micro_batches`; it is the smallest one whose
  packs take no more memory than those of full-length texts.
  share_prefixes: what the responses to one question read in common stands once a row.
  turn_penalty: what an invalid turn of an episode costs where its advantage is computed.
  history: the turns that the prompt of a turn shows, where each is a row; None: episodes are rows.
  """

  max_teacher_tokens: int  # of a teacher's prompt
  shape_rules: ShapeRules
  updates: int = 1
  micro_batches: int = 1
  shards: int = 1
  share_prefixes: bool = False
  turn_penalty: float = 0.0
  history: int | None = None

  def pack_counts(self) -> list[int]:
    """Returns the numbers of packs that a batch may have, ascending."""
    divisors = [m for m in range(1, self.micro_batches + 1) if self.micro_batches % m == 0]
    return [self.updates * self.shards * m for m in divisors]


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
  advantages: list[list[float]]  # of each response; one a turn where it has turns
  route_B: np.ndarray
  policy: Texts
  readings: list[TeacherReading]  # the plain one first
  standings: list[Standing]  # of the questions; empty without a memory

  def in_order(self, order: list[int]) -> "Responses":
    """Returns the same with response order[b] at row b."""
    return Responses(
      [self.rollouts[b] for b in order],
      [self.advantages[b] for b in order],
      self.route_B[order],
      self.policy.in_order(order),
      [reading.in_order(order) for reading in self.readings],
      self.standings,
    )

  def texts(self) -> list[Texts]:
    """Returns the policy's texts, then those of each reading by the teacher."""
    return [self.policy, *(reading.texts for reading in self.readings)]

  def lengths(self) -> list[int]:
    """Returns the response tokens of each row.

    They are 0 for a response that was not judged: it lies in no pack, and may be longer than all
    that do.
    """
    return [len(r.tokens) if r.is_judged else 0 for r in self.rollouts]


@dataclasses.dataclass(frozen=True)
class Packer:
  """Packs the generation batches of a run. `shapes` may grow by one with each batch.

  messages(task): the chat messages that ask the question.
  method: of its parts, teacher_context(group, i), the teacher's context for rollout i of a group or
    None; advantage(reward_QG), where a reward that is missing is NaN; route; and memory. Contexts
    that need a memory are called with the question's standing as well.
  further_readings(group, i): (context, weight) or None for each further reading by the teacher,
    equally many for all rollouts; None: the method has none.
  """

  chat: Chat
  messages: Callable
  method: Method
  settings: PackSettings
  shapes: Shapes
  further_readings: Callable | None = None
  # What `prepare` has rendered, by the identity of the group's rollouts; these are kept beside it,
  # so that no other object has their identity.
  _prepared: dict[tuple, tuple[list, list]] = dataclasses.field(default_factory=dict)

  def prepare(self, group: list[Rollout]) -> None:
    """Renders what the teacher reads of a judged group, so that `pack` finds it done.

    It may be called in any thread, once the group is as it will be packed. Where the teacher reads
    what earlier groups have left in a memory, it is done by `pack` alone.
    """
    if self.method.memory is None:
      self._prepared[_identity(group)] = group, self._reader.of_group(group)

  def pack(self, groups: list[list[Rollout]]) -> Packed:
    """Returns the batch of groups[q][g]; all groups have equally many rollouts.

    Raises RunError for a batch that would train what was not sampled (data/sampled.py).
    """
    responses = self._read(groups)
    batch, deal = pack_responses(
      responses, len(groups[0]), self.settings, self.shapes, self.chat.pad_token
    )
    responses = deal.responses
    check_sampled(batch, responses.rollouts)
    metrics = _measure(responses, batch) | self._measure_routes(responses)
    metrics["perf/compiles"] = float(len(self.shapes.known))  # earlier sessions included
    self._prepared.clear()
    contexts = tuple(reading.contexts for reading in responses.readings)
    texts = responses.readings[0].texts
    members = _members(groups, responses.rollouts)
    return Packed(batch, responses.rollouts, contexts, metrics, texts, deal, members)

  def emptied(self, packed: Packed) -> Packed:
    """Returns the batch with a teacher that reads what the policy reads, in all of its readings.

    Its arrays have the shapes that they had, unless a teacher's prompt is shorter than the policy's
    and leaves too little room: then the reading has the shapes of the policy's rows.
    """
    responses = packed.deal.responses
    readings = []
    for number, reading in enumerate(packed.batch.readings):
      rows = self._without_context(reading.rows, packed.deal, number)
      rows = packed.batch.policy if rows is None else rows
      readings.append(reading._replace(rows=rows, scored=None))
    texts = responses.policy.where(packed.teacher_texts)
    return packed._replace(
      batch=packed.batch._replace(readings=tuple(readings)), teacher_texts=texts
    )

  def _without_context(self, rows: Rows, deal: "Deal", number: int) -> Rows | None:
    """Lays what the policy reads out in the rows of a reading; None where it does not fit.

    It does where no prompt is longer than the one in whose place it stands, and a response has no
    more than one text.
    """
    read = deal.responses.readings[number].texts
    if any(len(texts) > 1 for texts in [*read.of, *deal.responses.policy.of]):
      return None
    (_, P, T), X = rows.token_CPT.shape, rows.at_CX.shape[1]
    placed = [first_fit(texts.extents, T) for texts in deal.packs[1 + number]]
    others = deal.cut(deal.responses.policy.where(read))
    for texts, of_rows in zip(others, placed, strict=True):
      if any(tokens_together([texts.extents[i] for i in row]) > T for row in of_rows):
        return None
    size = PackSize(P, T, X)
    share_prefixes = self.settings.share_prefixes
    return lay_out(others, placed, size, self.chat.pad_token, share_prefixes=share_prefixes)

  def silences(self, packed: Packed) -> list[bool]:
    """Tells of each context with texts whether the teacher's prompt is the same without them.

    Contexts whose words are all in their templates are left out.
    """
    silent = []
    texts = packed.teacher_texts
    for b, context in enumerate(packed.contexts[0]):
      if context is None or context.turns or context == context.without_texts():
        continue
      task = packed.rollouts[b].task
      silent.append(self._reader.says_nothing(task, context, texts.prompt(b)))
    return silent

  @property
  def _reader(self) -> TeacherReader:
    return TeacherReader(
      self.chat,
      self.messages,
      self.method.teacher_context,
      self.settings.max_teacher_tokens,
      self.further_readings,
      self.method.further_count,
      self.settings.history,
    )

  def _read(self, groups: list[list[Rollout]]) -> Responses:
    """Renders the texts that policy and teacher read."""
    rollouts = [r for group in groups for r in group]
    policy = Texts([texts_read(r) if r.is_judged else [] for r in rollouts])
    by_group, lots_QG, standings = [], [], []
    for group in groups:
      lots, standing = self._route(group)
      standings += [standing] if standing else []
      _, rendered = self._prepared.get(_identity(group), (None, None))
      by_group.append(rendered or self._reader.of_group(group, standing))
      lots_QG.append(lots)
    readings = []
    for shown_by_group in zip(*by_group, strict=True):
      shown = [shown for group in shown_by_group for shown in group]
      readings.append(_teacher_reading(shown))
    route_B = [
      float(bool(weight) if lot.distils is None else lot.distils)
      for lot, weight in zip(sum(lots_QG, []), readings[0].weight_B, strict=True)
    ]
    return Responses(
      rollouts,
      self._advantages(groups, lots_QG),
      np.array(route_B, np.float32),
      policy,
      readings,
      standings,
    )

  def _advantages(self, groups: list[list[Rollout]], lots_QG) -> list[list[float]]:
    """Returns the advantages of each response, one a turn where it has turns.

    Without a penalty all turns of an episode have one return, and count once in the statistics of
    their group. With one, or where turns are rows, each turn is a row of its own there, as in
    verl-agent's loop: its return is the episode's, minus the penalty where it is invalid.
    """
    penalty = self.settings.turn_penalty
    if not penalty and self.settings.history is None:
      reward_QG = np.array([[_reward(r) for r in group] for group in groups], np.float32)
      factor_QG = np.array([[lot.factor for lot in lots] for lots in lots_QG])
      advantage_QG = self.method.advantage(reward_QG) * factor_QG
      return [[float(a)] for a in advantage_QG.reshape(-1)]
    advantages = []
    for group, lots in zip(groups, lots_QG, strict=True):
      returns = [[_reward(r) - penalty * (not t.valid) for t in r.turns] for r in group]
      flat = np.array([sum(returns, [])], np.float32)
      found = iter(self.method.advantage(flat)[0] if flat.size else ())
      for of_turns, lot in zip(returns, lots, strict=True):
        advantages.append([float(next(found)) * lot.factor for _ in of_turns])
    return advantages

  def _route(self, group: list[Rollout]) -> tuple[list[Lot], Standing | None]:
    """Notes the group in the memory, if there is one, and decides what its responses learn from."""
    memory = self.method.memory
    return self.method.route(group, None if memory is None else memory.visit(group))

  def _measure_routes(self, responses: Responses) -> dict[str, float]:
    """Measures what responses learn from, where routes decide it, and what is remembered."""
    metrics = {}
    plain, memory = responses.readings[0], self.method.memory
    if self.method.policy_share is None:
      is_judged_B = np.array([r.is_judged for r in responses.rollouts])
      metrics = measure(responses.standings, responses.route_B, plain.weight_B > 0, is_judged_B)
    if memory is not None:
      read = sum(context is not None and context.remembered for context in plain.contexts)
      metrics |= memory.metrics() | {"memory/read": float(read)}
    return metrics


def _members(groups: list[list[Rollout]], rollouts: list[Rollout]) -> np.ndarray:
  """Returns (q, g) of each rollout, which is groups[q][g]."""
  places = {id(r): (q, g) for q, group in enumerate(groups) for g, r in enumerate(group)}
  return np.array([places[id(r)] for r in rollouts])


def _identity(group: list[Rollout]) -> tuple[int, ...]:
  return tuple(map(id, group))


def _teacher_reading(shown: list[Shown | None]) -> TeacherReading:
  """Joins what the teacher reads of each response; None: nothing."""
  texts = Texts([s.texts if s else [] for s in shown])
  weight_B = np.array([s.weight if s else 0.0 for s in shown], np.float32)
  contexts = [s.context if s else None for s in shown]
  shortened = sum(s.was_shortened for s in shown if s)
  return TeacherReading(contexts, weight_B, texts, shortened)


def _reward(rollout: Rollout) -> float:
  return np.nan if rollout.feedback.status is Status.ENV_FAILED else rollout.feedback.reward


def pack_responses(
  responses: Responses, group: int, settings: PackSettings, shapes: Shapes, pad_token: int
) -> tuple[TrainBatch, "Deal"]:
  """Deals responses to packs, chooses the shape and fills the arrays.

  group: so many consecutive responses answer one question. `shapes` may grow by one. Returns the
  batch, and the deal that it holds, with the responses in the order of its rows.
  """
  dealing = _Dealing(responses, group, settings)
  shape = choose_shape(dealing.load, settings.pack_counts(), shapes, settings.shape_rules)
  deal = dealing.deal(shape.packs)
  batch = _lay_out_batch(deal, shape, pad_token, share_prefixes=settings.share_prefixes)
  return batch, deal


class Deal(NamedTuple):
  """One way to cut a batch into packs."""

  responses: Responses  # in the order of the batch's rows
  lengths: list[list[int]]  # of the responses of each pack
  questions: list[int] | None  # of each response, where those of one share what they begin with
  packs: list[list[PackTexts]]  # of the policy, then of each reading; a list of packs each

  def cut(self, texts: Texts) -> list[PackTexts]:
    """Cuts texts of the responses into packs."""
    first = first_tokens(sum(self.lengths, []), len(self.lengths))
    return cut_into_packs(texts, first, self.questions)

  def largest_work(self) -> int:
    """Returns the work of the largest pack, in passes of a token."""
    work = []
    for policy, *readings in zip(*self.packs, strict=True):
      teacher = sum(tokens_together(texts.extents) for texts in readings)
      # The policy's texts go backward too.
      work.append(3 * tokens_together(policy.extents) + teacher)
    return max(work)


class _Dealing:
  """The ways to cut one batch, each made once."""

  def __init__(self, responses: Responses, group: int, settings: PackSettings):
    self._responses, self._group, self._settings = responses, group, settings
    lengths = [texts.lengths() for texts in responses.texts()]
    self._work = []  # of each response, as in largest_work but with nothing shared
    for policy, *teacher in zip(*lengths, strict=True):
      self._work.append(3 * policy + sum(teacher))
    self.deal = functools.cache(self._deal)

  def load(self, packs: int) -> Load:
    """Returns what the batch asks of a shape with so many packs."""
    deal = self.deal(packs)
    extents = []
    for texts_of_packs in deal.packs:
      extents.append([texts.extents for texts in texts_of_packs])
    policy, plain, *further = extents
    return Load(
      responses_per_pack=len(deal.lengths[0]),
      extents=(policy, plain, sum(further, [])),
      tokens=max(map(sum, deal.lengths)),
      responses=max(map(max, deal.lengths)),
    )

  def _deal(self, packs: int) -> Deal:
    """Deals the responses to packs.

    With shared prefixes, groups stay whole if the largest pack gets no larger by it.
    """
    if not self._settings.share_prefixes:
      return self._cut(packs, whole=False)
    ways = [self._cut(packs, whole=True), self._cut(packs, whole=False)]
    return min(ways, key=Deal.largest_work)

  def _cut(self, packs: int, *, whole: bool) -> Deal:
    updates = self._settings.updates
    order = balanced_order(self._work, self._group, updates, packs // updates, whole=whole)
    responses = self._responses.in_order(order)
    questions = [b // self._group for b in order] if self._settings.share_prefixes else None
    deal = Deal(responses, in_packs(responses.lengths(), packs), questions, [])
    return deal._replace(packs=[deal.cut(texts) for texts in responses.texts()])


def _lay_out_batch(deal: Deal, shape: Shape, pad_token: int, *, share_prefixes: bool) -> TrainBatch:
  """Fills the arrays of a batch."""
  policy_size, plain_size, further_size = shape.row_sizes()
  sizes = [policy_size, plain_size] + [further_size] * (len(deal.packs) - 2)
  rows_of_readers = []
  for packs, (rows, length) in zip(deal.packs, sizes, strict=True):
    placed = [first_fit(texts.extents, length) for texts in packs]
    size = PackSize(rows, length, shape.tokens)
    rows_of_readers.append(lay_out(packs, placed, size, pad_token, share_prefixes=share_prefixes))
  policy, *teacher = rows_of_readers
  R = shape.responses
  weights = [_reading_weight(reading, R) for reading in deal.responses.readings]
  start_B = sum(first_tokens(sum(deal.lengths, []), len(deal.lengths)), [])
  arrays = _response_arrays(deal.responses, R)
  return TrainBatch(
    policy=policy,
    readings=tuple(map(Reading, teacher, weights)),
    start_B=np.array(start_B, np.int32),
    route_B=deal.responses.route_B,
    logp_old_BR=np.zeros((len(start_B), R), np.float32),
    control={},
    **arrays,
  )


def _reading_weight(reading: TeacherReading, R: int) -> np.ndarray:
  """Returns the weight [B, R] of each token in a reading: 0 for one that no text holds."""
  weight_BR = np.zeros((len(reading.weight_B), R), np.float32)
  for b, texts in enumerate(reading.texts.of):
    for text in texts:
      place = slice(text.first, text.first + sampled_tokens(text.spans))
      weight_BR[b, place] = reading.weight_B[b] * text.weight
  return weight_BR


def _response_arrays(responses: Responses, R: int) -> dict[str, np.ndarray]:
  """Returns what a batch says of the tokens of its responses, in R columns, by field."""
  B = len(responses.rollouts)
  response_BR, turn_BR, place_BR = (np.zeros((B, R), np.int32) for _ in range(3))
  weight_BR, advantage_BR, logp_BR = (np.zeros((B, R), np.float32) for _ in range(3))
  for b, r in enumerate(responses.rollouts):
    if not r.is_judged:
      continue
    n = len(r.tokens)
    response_BR[b, :n] = r.tokens
    logp_BR[b, :n] = r.logp
    weight_BR[b, :n] = 1.0
    of_turns = responses.advantages[b]
    lengths = [n] if r.turns is None else [len(s.completion.tokens) for s in r.sampled]
    turn_BR[b, :n] = np.repeat(np.arange(len(lengths)), lengths)
    place_BR[b, :n] = np.concatenate([np.arange(length) for length in lengths])
    advantage_BR[b, :n] = of_turns[0] if len(of_turns) == 1 else np.repeat(of_turns, lengths)
  fields = dict(
    response_BR=response_BR,
    weight_BR=weight_BR,
    advantage_BR=advantage_BR,
    logp_rollout_BR=logp_BR,
  )
  if any(r.turns is not None for r in responses.rollouts):
    fields |= dict(turn_BR=turn_BR, place_BR=place_BR)
  return fields


def _measure(responses: Responses, batch: TrainBatch) -> dict[str, float]:
  """Counts what was dropped, shortened and shown."""
  plain, *further = responses.readings
  read_rows = [batch.policy]
  if any(context is not None for context in plain.contexts):
    read_rows.append(batch.readings[0].rows)
  filled = sum((rows.segment_CPT > 0).sum() for rows in read_rows)
  columns = sum(rows.segment_CPT.size for rows in read_rows)
  has_solution = [c is not None and bool(c.solution) for c in plain.contexts]
  metrics = {
    "data/dropped": float(sum(not r.is_judged for r in responses.rollouts)),
    "data/teacher_share": float(plain.weight_B.mean()),
    "data/teacher_shortened": float(plain.shortened),
    "data/solution_share": float(np.mean(has_solution)),
    "data/useful_tokens": float(filled / columns),
  }
  if further:
    tokens, has_notes = 0, []
    for reading in further:
      tokens += sum(reading.texts.lengths())
      has_notes += [context is not None for context in reading.contexts]
    metrics |= {
      "counterfactual/teacher_tokens": float(tokens),
      "counterfactual/shortened": float(sum(reading.shortened for reading in further)),
      "counterfactual/told_share": float(np.mean(has_notes)),
    }
  return metrics
