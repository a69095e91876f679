"""Which array shapes a run compiles its step for."""

import dataclasses
import math
from typing import NamedTuple

from sdpo_jax.data.packing import first_fit, together

# compilations that a run whose lengths never settle may ask for; beyond, only what fits nowhere
# makes one
MAX_SHAPES = 16


# what a compilation costs, in steps: tiny models on CPU take 4 s for it against 0.4 s a step
COMPILATION = 10.0


WASTE = 0.08  # a share of a step that nobody compiles for


# of columns that attention may compare: a mask of so many takes little memory on any device
FEW_PAIRS = 2**26


# row length at which attention costs about as much as a layer's matrix products (width 1,000):
# longer rows pack better but cost more
ATTENTION_TOKENS = 8192


def bucket(length: int, multiple: int) -> int:
  return max(multiple, -(-length // multiple) * multiple)


def pairs(rows: int, length: int) -> int:
  """Of columns of one row, in all rows; few are as good as none."""
  return max(rows * length**2, FEW_PAIRS)


class Shape(NamedTuple):
  """Sizes of one pack, the response positions R, and how many packs there are. All that the compiled step depends on."""

  rows: int
  length: int
  teacher_rows: int
  teacher_length: int
  tokens: int
  responses: int
  more_rows: int  # of each further reading by the teacher; 0: the method has none
  more_length: int
  packs: int

  def halves(self) -> tuple[tuple[int, int], ...]:
    """(rows, length) of student, teacher, and the teacher's further readings."""
    return (
      (self.rows, self.length),
      (self.teacher_rows, self.teacher_length),
      (self.more_rows, self.more_length),
    )

  def cost(self) -> float:
    """In passes of a token forward: the student's half goes forward and backward, and the vocabulary is met by the response tokens."""
    student, teacher, more = (
      rows * length * (1.0 + length / ATTENTION_TOKENS) for rows, length in self.halves()
    )
    return self.packs * (3.0 * student + teacher + more + 3.0 * self.tokens)

  def within(self, other: "Shape") -> bool:
    """A pack takes no more memory than one of `other`: columns, attention over pairs of them, response tokens."""
    sizes = lambda shape: [
      shape.tokens,
      *(n for half in shape.halves() for n in (math.prod(half), pairs(*half))),
    ]
    return all(mine <= theirs for mine, theirs in zip(sizes(self), sizes(other)))


@dataclasses.dataclass
class Shapes:
  """Those that a run has used. Its state, `known` and `owed`: a resumed run has to choose the same ones to compute the same."""

  longest: tuple[int, int, int]  # see most_tokens: no room beyond that
  known: list[Shape] = dataclasses.field(default_factory=list)
  # steps' worth of waste that a better one would have spared, of all batches together, since one
  # was last added for that reason
  owed: float = 0.0
  # of `known`; then only where none fits, and what is added holds whatever can come
  limit: int = MAX_SHAPES


def choose_shape(
  dealt, counts: list[int], shapes: Shapes, *, length_multiple: int, response_multiple: int
) -> Shape:
  """A shape that holds the batch: one of `shapes`, or a new one, which is added to them.

  counts: of packs, ascending: the fewest that the devices and updates want, to the most that memory may want; dealt(packs) -> Dealt. A new shape
  has the fewest whose packs take no more memory than those of the last count with texts as long as can be: so many are for long answers, and short ones lie together.
  """
  most = lambda packs: max((text.length for texts in packs for text in texts), default=0)
  needed = lambda packs, length: max(1, max(len(first_fit(texts, length)) for texts in packs))
  tokens_of, responses_of = (
    lambda d: max(map(sum, d.responses)),
    lambda d: max(map(max, d.responses)),
  )

  # (rows, length) of the cheapest packing: rows as long as the longest text, or longer ones with
  # less left over, up to a whole pack
  def best(packs, full):
    longest, whole = most(packs), max(map(together, packs))
    fitting = []
    for wanted in {
      *(int(longest * stretch) for stretch in (1.0, 1.5, 2.0, 3.0)),
      *(max(longest, -(-whole // n)) for n in (1, 2, 3)),
    }:
      length = bucket(wanted, length_multiple)
      rows = needed(packs, length)
      fitting.append(
        (
          pairs(rows, length) > pairs(*full),
          rows * length * (1.0 + length / ATTENTION_TOKENS),
          rows,
          length,
        )
      )
    return min(fitting)[2:]

  def holds(shape: Shape) -> bool:
    d = dealt(shape.packs)
    fit = lambda packs, rows, length: most(packs) <= length and needed(packs, length) <= rows
    return (
      shape.tokens >= tokens_of(d)
      and shape.responses >= responses_of(d)
      and all(
        fit(packs, *half)
        for packs, half in zip((d.student, d.teacher, sum(d.more, [])), shape.halves())
        if packs
      )
    )

  def room(n, most):  # so that the next batch, a little larger, fits too
    return max(n, min(n + n // 16, most))

  def fitting(packs: int) -> Shape:
    d = dealt(packs)
    count = len(d.student[0])

    # (rows, length) with room. None in the length of the first shape: lengths may all be equal
    def sizes(packs, full):
      rows, length = best(packs, full)
      return room(rows, count), bucket(
        room(length, math.prod(full)), length_multiple
      ) if rows == 1 and shapes.known else length

    student, teacher, more = worst.halves()
    return Shape(
      *sizes(d.student, student),
      *sizes(d.teacher, teacher),
      bucket(room(tokens_of(d), worst.tokens), response_multiple),
      bucket(responses_of(d), response_multiple),
      *(sizes(sum(d.more, []), more) if d.more else more),
      packs,
    )

  last = dealt(counts[-1])
  worst = full_shape(
    len(last.student[0]),
    counts[-1],
    shapes.longest,
    length_multiple=length_multiple,
    response_multiple=response_multiple,
    taught=most(last.teacher) > 0,
    more=bool(last.more),
  )
  new = next(
    shape for shape in map(fitting, counts) if shape.packs == counts[-1] or shape.within(worst)
  )
  # a run may go on with another number of devices
  known = [s for s in shapes.known if s.packs in counts]
  usable = min(filter(holds, known), key=Shape.cost, default=None)
  if usable:
    waste = usable.cost() / new.cost() - 1.0
    shapes.owed += waste if waste > WASTE else 0.0
    if waste <= WASTE or shapes.owed < COMPILATION or len(known) >= shapes.limit:
      return usable
    shapes.owed = 0.0
  # a length never seen: from now on everything fits into this one
  if len(known) >= shapes.limit:
    new = worst
  shapes.known.append(new)
  return new


def most_tokens(data, max_new_tokens: int) -> tuple[int, int, int]:
  """Tokens that a text of the student, one of the teacher and a response can have. data: the settings."""
  return (
    data.max_prompt_tokens + max_new_tokens,
    data.max_teacher_tokens + max_new_tokens,
    max_new_tokens,
  )


def full_shape(
  rows: int,
  packs: int,
  longest: tuple[int, int, int],
  *,
  length_multiple: int,
  response_multiple: int,
  taught: bool,
  more: bool,
) -> Shape:
  """Of packs of `rows` texts, each as long as can be: what a plan compiles for. It holds whatever can come. taught, more: there is a teacher, and it reads again."""
  student, teacher = (bucket(n, length_multiple) for n in longest[:2])
  response = bucket(longest[2], response_multiple)
  half = (rows, teacher)
  return Shape(
    rows,
    student,
    *(half if taught else (1, length_multiple)),
    rows * response,
    response,
    *(half if more else (0, 0)),
    packs,
  )
