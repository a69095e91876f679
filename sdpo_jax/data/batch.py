"""Groups of rollouts -> teacher prompts -> one TrainBatch of packed rows, with a count of everything that was cut or dropped.

Several texts share a row of fixed length, told apart by segment ids, so that short responses do not pay for long ones; student and
teacher rows are packed apart and linked by the response tokens' columns. Responses to one question begin alike; where asked, what they share stands once a row. The batch is cut into packs (see TrainBatch), each for one
micro-batch on one device. Within an optimiser update whole questions are dealt to its packs so that all hold about as many tokens.

Every new shape is a compilation of the train step, so one used before is used again wherever it fits, until what that wasted would have paid for a
compilation, as one who does not know how often he will ski rents until the rent would have bought the skis. Lengths drift as a policy learns.
Over-long teacher prompts: the feedback is shortened first, then the solution; the question, the closing instruction and the
generation header are never touched. What was shortened is counted.
"""

import dataclasses
import functools
import math
import os
from typing import NamedTuple

import numpy as np

from sdpo_jax.data.chat import Chat
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Counterfactual, Rollout, Rows, Status, TaskError, TrainBatch

CUT = "\n[...]\n"
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


class Packed(NamedTuple):
  batch: TrainBatch
  rollouts: list[Rollout]  # row b of the batch
  contexts: list[Context | None]  # what its teacher reads; None: nothing
  metrics: dict[str, float]  # counts of what was dropped, shortened, shown
  # what the teacher reads in each of the batch's further readings
  counterfactuals: tuple[list[Context | None], ...] = ()


def bucket(length: int, multiple: int) -> int:
  return max(multiple, -(-length // multiple) * multiple)


def shorten(text: str, keep: int) -> str:
  """At most `keep` characters: the head and the tail, which hold the error and its place, with a visible gap; "" where there is no room for more than the gap."""
  if len(text) <= keep:
    return text
  keep = keep - len(CUT)
  if keep <= 0:  # so that what holds it, a template, goes too
    return ""
  return text[: (keep + 1) // 2] + CUT + (text[len(text) - keep // 2 :] if keep // 2 else "")


def teacher_prompt(
  chat: Chat, messages: list[dict[str, str]], context: Context, max_tokens: int
) -> tuple[list[int], bool]:
  """Tokens of the teacher's prompt and whether its texts had to be shortened. The user's last message carries the context."""

  def render(c: Context) -> list[int]:
    return chat.prompt_tokens(
      messages[:-1] + [messages[-1] | {"content": c.render(messages[-1]["content"])}], teacher=True
    )

  tokens = render(context)
  if len(tokens) <= max_tokens:
    return tokens, False
  for field in ("notes", "attempt", "feedback", "solution"):
    low, high = 0, len(getattr(context, field))  # the longest text that fits, by bisection
    if not high:
      continue
    while low < high:
      middle = (low + high + 1) // 2
      if (
        len(
          render(dataclasses.replace(context, **{field: shorten(getattr(context, field), middle)}))
        )
        <= max_tokens
      ):
        low = middle
      else:
        high = middle - 1
    context = dataclasses.replace(context, **{field: shorten(getattr(context, field), low)})
    tokens = render(context)
    if len(tokens) <= max_tokens:
      return tokens, True
  raise TaskError(
    f"a question with its closing instruction takes {len(tokens)} tokens, more than config.data.max_teacher_tokens={max_tokens}"
  )


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


class Text(NamedTuple):
  """What packing knows of a text. Those of one family begin with the same `shared` tokens, which a row needs once."""

  length: int  # with what is shared
  shared: int = 0
  family: int = -1


def first_fit(texts: list[Text], length: int) -> list[list[int]]:
  """Rows of at most `length` tokens, each a list of indices: the longest text first, each into the first row that holds its family and has room, else
  into the first with room."""
  rows, room, families = [], [], []
  for i in sorted(range(len(texts)), key=lambda i: -texts[i].length):
    text = texts[i]
    if not text.length:
      continue
    assert text.length <= length, (text.length, length)
    need = lambda k: text.length - (text.shared if text.family in families[k] else 0)
    fitting = [k for k, free in enumerate(room) if free >= need(k)]
    row = next(
      (k for k in fitting if text.family in families[k]), fitting[0] if fitting else len(rows)
    )
    if row == len(rows):
      rows.append([])
      room.append(length)
      families.append(set())
    rows[row].append(i)
    room[row] -= need(row)
    if text.shared:
      families[row].add(text.family)
  return rows


def together(texts: list[Text]) -> int:
  """Tokens of texts in one row."""
  return sum(t.length - t.shared for t in texts) + sum({t.family: t.shared for t in texts}.values())


def begin_alike(texts: list[list[int]], starts: list[int], families: list[int]) -> list[Text]:
  """Of the texts of one pack: what each family shares, short of the last token before any response, which predicts it."""
  found = [Text(len(text)) for text in texts]
  for family in set(families):
    mine = [i for i, f in enumerate(families) if f == family and texts[i]]
    if len(mine) > 1:
      shared = min(
        len(os.path.commonprefix([texts[i] for i in mine])), min(starts[i] for i in mine) - 1
      )
      for i in mine:
        found[i] = Text(len(texts[i]), shared, family)
  return found


def deal(sizes: list[int], hands: int) -> list[list[int]]:
  """Indices in `hands` lists of equal length and about equal sum: the largest first, to the smallest sum that still takes one."""
  dealt, total, limit = [[] for _ in range(hands)], [0] * hands, len(sizes) // hands
  for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    hand = min((h for h in range(hands) if len(dealt[h]) < limit), key=lambda h: total[h])
    dealt[hand].append(i)
    total[hand] += sizes[i]
  return [sorted(hand) for hand in dealt]


class Dealt(NamedTuple):
  """One way to cut a batch into packs: what is known of the texts of each, and the lengths of its responses."""

  student: list[list[Text]]
  teacher: list[list[Text]]
  responses: list[list[int]]
  more: tuple[list[list[Text]], ...] = ()  # of each further reading by the teacher


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


def lay_out(
  placed: list[list[int]],
  known: list[Text],
  texts: list[list[int]],
  starts: list[int],
  at: list[int],
  rows: int,
  length: int,
  tokens: int,
  pad_token: int,
) -> Rows:
  """One pack. placed: texts of each row; texts[i]: prompt and response; starts[i]: where its response begins; at[i]: its first token's number x."""
  token_PT, at_X = np.full((rows, length), pad_token, np.int32), np.zeros(tokens, np.int32)
  segment_PT, position_PT, prefix_PT = (np.zeros((rows, length), np.int32) for _ in range(3))
  for p, row in enumerate(placed):
    column, segment, prefixes = 0, 0, {}  # family -> its segment

    def put(words, position, prefix):
      nonlocal column, segment
      here, segment = slice(column, column + len(words)), segment + 1
      token_PT[p, here], segment_PT[p, here], position_PT[p, here], prefix_PT[p, here] = (
        words,
        segment,
        position + np.arange(len(words)),
        prefix,
      )
      column += len(words)

    for i in row:
      shared, family = known[i].shared, known[i].family
      if shared and family not in prefixes:
        put(texts[i][:shared], 0, 0)
        prefixes[family] = segment
      answer = len(texts[i]) - starts[i]
      # the column before a token predicts it
      at_X[at[i] : at[i] + answer] = (
        p * length + column + starts[i] - shared - 1 + np.arange(answer)
      )
      put(texts[i][shared:], shared, prefixes[family] if shared else 0)
  return Rows(token_PT, segment_PT, position_PT, prefix_PT, at_X)


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


def balanced_order(
  work: list[int], group: int, updates: int, packs: int, *, whole: bool
) -> list[int]:
  """Where each row of the batch comes from: within an update, rows are dealt to its packs, about as much `work` to each. whole: groups, or each
  group's rows to packs of its own, where either divides, so that what a group shares need not stand in many packs; larger pieces come out less even."""
  if packs == 1:
    return list(range(len(work)))
  order, rows = [], len(work) // updates
  groups, rest = divmod(rows, group)
  unit = group if whole and not rest and groups % packs == 0 else 1
  # packs of one deal
  hands = (
    packs // groups
    if whole and not rest and packs % groups == 0 and group % (packs // groups) == 0
    else packs
  )
  dealt = rows * hands // packs
  for first in range(0, len(work), dealt):
    sizes = [sum(work[i : i + unit]) for i in range(first, first + dealt, unit)]
    order += [
      first + u * unit + k for hand in deal(sizes, hands) for u in hand for k in range(unit)
    ]
  return order
