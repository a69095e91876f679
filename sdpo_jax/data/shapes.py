"""Chooses which array shapes a run compiles its train step for.

Every new shape is a compilation. A shape used before is used again wherever it fits, until the
padding that this wasted would have paid for a compilation. This is the ski-rental rule: one who
does not know how often he will ski rents until the rent would have bought the skis. Lengths drift
as a policy learns.
"""

import dataclasses
import math
from typing import Callable, NamedTuple

from sdpo_jax.data.packing import Extent, first_fit, tokens_together

# Compilations that a run whose lengths never settle may ask for. Beyond, only what fits nowhere
# makes a shape, and that one holds whatever can come.
MAX_SHAPES = 16
# The share of a step that is too small to compile for.
WASTE = 0.08
# Pairs of columns that attention may compare whatever the shape: a mask of so many takes little
# memory on any device.
FEW_PAIRS = 2**26
# The row length at which attention costs about as much as a layer's matrix products (width 1,000).
# Longer rows pack better but cost more.
ATTENTION_TOKENS = 8192


class Shape(NamedTuple):
  """The sizes of a batch, all that the compiled step depends on.

  All fields but the last are sizes of one pack. Checkpoints store them in this order.
  """

  rows: int
  length: int
  teacher_rows: int  # of the plain reading
  teacher_length: int
  tokens: int  # X, response tokens
  responses: int  # R, positions of the longest response
  further_rows: int  # of each further reading by the teacher; 0: the method has none
  further_length: int
  packs: int  # C

  def row_sizes(self) -> tuple[tuple[int, int], ...]:
    """Returns (rows, length) of the policy, the plain reading, and each further reading."""
    return (
      (self.rows, self.length),
      (self.teacher_rows, self.teacher_length),
      (self.further_rows, self.further_length),
    )

  def cost(self) -> float:
    """Returns the cost of a step, in passes of a token forward.

    The policy's rows go forward and backward, and response tokens meet the vocabulary.
    """
    policy, teacher, further = (_row_cost(*size) for size in self.row_sizes())
    return self.packs * (3.0 * policy + teacher + further + 3.0 * self.tokens)

  def within(self, other: "Shape") -> bool:
    """Tells whether a pack takes no more memory than one of `other`."""
    return all(a <= b for a, b in zip(self._memory(), other._memory(), strict=True))

  def _memory(self) -> list[int]:
    """What takes memory: response tokens, columns, and the pairs that attention compares."""
    sizes = [self.tokens]
    for rows, length in self.row_sizes():
      sizes += [rows * length, attention_pairs(rows, length)]
    return sizes


class Load(NamedTuple):
  """What one way to cut a batch into packs asks of a shape."""

  responses_per_pack: int
  # The texts of each pack: the policy's, those of the plain reading, and those of all further
  # readings, whose packs follow each other.
  extents: tuple[list[list[Extent]], list[list[Extent]], list[list[Extent]]]
  tokens: int  # the most response tokens of a pack
  responses: int  # the length of the longest response

  def texts_per_pack(self) -> tuple[int, int]:
    """Returns the most texts of a pack: the policy's, and those of one reading by the teacher.

    They are as many as responses, unless one has several.
    """
    policy, *teacher = (max(map(len, packs), default=0) for packs in self.extents)
    least = self.responses_per_pack
    return max(least, policy), max(least, *teacher)


class ShapeRules(NamedTuple):
  """How much larger than a batch a shape may be: fewer compilations, more padding."""

  length: int  # a multiple, which lengths of rows are rounded up to
  response: int  # a multiple, likewise for response tokens and positions
  room: float  # the share that a new shape has above its batch, since lengths drift
  compilation: float  # what it costs to compile a shape, in steps

  @classmethod
  def of(cls, data) -> "ShapeRules":
    """Returns the rules that config.data sets."""
    return cls(data.length_multiple, data.response_multiple, data.room, data.compilation_steps)

  def with_room(self, size: int, most: int) -> int:
    """Returns a size with room above it, but not beyond `most` unless the size is."""
    return max(size, min(size + int(size * self.room), most))


@dataclasses.dataclass
class Shapes:
  """The shapes that a run has used.

  `known` and `owed` are state: a resumed run has to choose the same shapes to compute the same.
  """

  longest: tuple[int, int, int]  # see `most_tokens`: no room is made beyond that
  known: list[Shape] = dataclasses.field(default_factory=list)
  # Steps' worth of padding, over all batches, that a better shape would have spared since one was
  # last added for that reason.
  owed: float = 0.0
  limit: int = MAX_SHAPES  # of `known`


def bucket(length: int, multiple: int) -> int:
  """Rounds up to a multiple, and to at least one of them."""
  return max(multiple, -(-length // multiple) * multiple)


def attention_pairs(rows: int, length: int) -> int:
  """Returns the pairs of columns that attention compares in all rows, at least FEW_PAIRS."""
  return max(rows * length**2, FEW_PAIRS)


def most_tokens(data, new_tokens: int, sampled_tokens: int) -> tuple[int, int, int]:
  """Returns the most tokens of a policy's text, a teacher's text, and a response.

  data: the settings of config.data. new_tokens: that follow a prompt in one text. sampled_tokens:
  of a response, in all of its texts together.
  """
  return (
    data.max_prompt_tokens + new_tokens,
    data.max_teacher_tokens + new_tokens,
    sampled_tokens,
  )


def full_shape(
  responses_per_pack: int,
  packs: int,
  longest: tuple[int, int, int],
  rules: ShapeRules,
  *,
  has_teacher: bool,
  has_further: bool,
  texts_per_pack: tuple[int, int] | None = None,
) -> Shape:
  """Returns the shape that holds whatever can come, one text as long as can be a row.

  texts_per_pack: of the policy, and of one reading by the teacher; None: as many as responses.

  This is what a plan compiles for.
  """
  policy_length, teacher_length = (bucket(n, rules.length) for n in longest[:2])
  response = bucket(longest[2], rules.response)
  policy_texts, texts = texts_per_pack or (responses_per_pack, responses_per_pack)
  plain_size = (texts, teacher_length) if has_teacher else (1, rules.length)
  further_size = (texts, teacher_length) if has_further else (0, 0)
  return Shape(
    policy_texts,
    policy_length,
    *plain_size,
    responses_per_pack * response,
    response,
    *further_size,
    packs,
  )


def choose_shape(
  load_of: Callable[[int], Load], counts: list[int], shapes: Shapes, rules: ShapeRules
) -> Shape:
  """Returns a shape that holds the batch: one of `shapes`, or a new one, which is added to them.

  load_of(packs): the load of the batch cut into so many packs.
  counts: of packs, ascending: from the fewest that devices and updates need to the most that memory
    may need, when texts are as long as can be. Long answers need many packs; short ones lie
    together.
  """
  full = _full_shape_of(load_of(counts[-1]), counts[-1], shapes.longest, rules)
  best = _best_shape(load_of, counts, full, rules, has_history=bool(shapes.known))
  # A run may go on with another number of devices.
  usable = [shape for shape in shapes.known if shape.packs in counts]
  no_more = len(usable) >= shapes.limit
  fitting = [shape for shape in usable if _holds(shape, load_of(shape.packs))]
  if fitting:
    cheapest = min(fitting, key=Shape.cost)
    waste = cheapest.cost() / best.cost() - 1.0
    if waste <= WASTE:
      return cheapest
    shapes.owed += waste
    if shapes.owed < rules.compilation or no_more:
      return cheapest
    shapes.owed = 0.0
  chosen = full if no_more else best
  shapes.known.append(chosen)
  return chosen


def _full_shape_of(
  load: Load, packs: int, longest: tuple[int, int, int], rules: ShapeRules
) -> Shape:
  """The shape that holds whatever can come of batches with these kinds of texts."""
  _, teacher, further = load.extents
  # no setting bounds what is sampled in all turns of an episode, where its world has no limit
  most_sampled = max(longest[2], load.responses)
  return full_shape(
    load.responses_per_pack,
    packs,
    (*longest[:2], most_sampled),
    rules,
    has_teacher=_longest(teacher) > 0,
    has_further=bool(further),
    texts_per_pack=load.texts_per_pack(),
  )


def _best_shape(
  load_of: Callable[[int], Load],
  counts: list[int],
  full: Shape,
  rules: ShapeRules,
  *,
  has_history: bool,
) -> Shape:
  """A shape made for this batch, with the fewest packs that take no more memory than `full` has."""
  for packs in counts:
    shape = _fitting_shape(load_of(packs), packs, full, rules, has_history)
    if shape.within(full):
      return shape
  return shape  # of the largest count


def _fitting_shape(
  load: Load, packs: int, full: Shape, rules: ShapeRules, has_history: bool
) -> Shape:
  """The cheapest shape for a load, with room for the next batch, which may be a little larger.

  has_history: the run has used shapes before.
  """

  def sizes(texts: list[list[Extent]], full_size: tuple[int, int]) -> tuple[int, int]:
    rows, length = _cheapest_rows(texts, full_size, rules)
    # Lengths drift; only a first batch whose lengths are all equal gets no room.
    if rows == 1 and (has_history or not _all_equal(texts)):
      length = bucket(rules.with_room(length, math.prod(full_size)), rules.length)
    return rules.with_room(rows, max(load.responses_per_pack, full_size[0])), length

  policy, plain, further = load.extents
  full_policy, full_plain, full_further = full.row_sizes()
  further_size = sizes(further, full_further) if further else full_further
  tokens = bucket(rules.with_room(load.tokens, full.tokens), rules.response)
  responses = bucket(load.responses, rules.response)
  return Shape(
    *sizes(policy, full_policy),
    *sizes(plain, full_plain),
    tokens,
    responses,
    *further_size,
    packs,
  )


def _cheapest_rows(
  texts: list[list[Extent]], full_size: tuple[int, int], rules: ShapeRules
) -> tuple[int, int]:
  """(rows, length) of the cheapest packing.

  Rows are as long as the longest text, or longer with less left over, up to a whole pack. A packing
  with more pairs for attention than the full size has is only taken if all have more.
  """
  longest, whole = _longest(texts), max(map(tokens_together, texts))
  lengths = [int(longest * stretch) for stretch in (1.0, 1.5, 2.0, 3.0)]
  lengths += [max(longest, -(-whole // rows)) for rows in (1, 2, 3)]
  packings = []
  for length in {bucket(length, rules.length) for length in lengths}:
    rows = _rows_needed(texts, length)
    too_many_pairs = attention_pairs(rows, length) > attention_pairs(*full_size)
    packings.append((too_many_pairs, _row_cost(rows, length), rows, length))
  _, _, rows, length = min(packings)
  return rows, length


def _holds(shape: Shape, load: Load) -> bool:
  if shape.tokens < load.tokens or shape.responses < load.responses:
    return False
  for texts, (rows, length) in zip(load.extents, shape.row_sizes(), strict=True):
    if texts and (_longest(texts) > length or _rows_needed(texts, length) > rows):
      return False
  return True


def _row_cost(rows: int, length: int) -> float:
  """The cost of rows, in passes of a token forward: longer rows have more to attend to."""
  return rows * length * (1.0 + length / ATTENTION_TOKENS)


def _longest(packs: list[list[Extent]]) -> int:
  return max((text.length for texts in packs for text in texts), default=0)


def _all_equal(packs: list[list[Extent]]) -> bool:
  return len({text.length for texts in packs for text in texts}) <= 1


def _rows_needed(packs: list[list[Extent]], length: int) -> int:
  """The rows of this length that the fullest pack needs."""
  return max(1, max(len(first_fit(texts, length)) for texts in packs))
