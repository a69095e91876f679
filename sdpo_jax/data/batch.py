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
import math
import os
from typing import NamedTuple

import numpy as np

from sdpo_jax.data.chat import Chat
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Counterfactual, Rollout, Rows, Status, TaskError, TrainBatch

CUT = "\n[...]\n"
MAX_SHAPES = 16         # compilations that a run whose lengths never settle may ask for; beyond, only what fits nowhere makes one
COMPILATION = 10.0      # what a compilation costs, in steps: tiny models on CPU take 4 s for it against 0.4 s a step
WASTE = 0.08            # a share of a step that nobody compiles for
ATTENTION_TOKENS = 8192  # row length at which attention costs about as much as a layer's matrix products (width 1,000): longer rows pack better but cost more


class Packed(NamedTuple):
  batch: TrainBatch
  rollouts: list[Rollout]          # row b of the batch
  contexts: list[Context | None]   # what its teacher reads; None: nothing
  metrics: dict[str, float]        # counts of what was dropped, shortened, shown
  counterfactuals: tuple[list[Context | None], ...] = ()   # what the teacher reads in each of the batch's further readings


def bucket(length: int, multiple: int) -> int:
  return max(multiple, -(-length // multiple) * multiple)


def shorten(text: str, keep: int) -> str:
  """At most `keep` characters: the head and the tail, which hold the error and its place, with a visible gap."""
  if len(text) <= keep:
    return text
  keep = max(keep - len(CUT), 0)
  return text[:(keep + 1) // 2] + CUT + (text[len(text) - keep // 2:] if keep // 2 else "")


def teacher_prompt(chat: Chat, messages: list[dict[str, str]], context: Context, max_tokens: int) -> tuple[list[int], bool]:
  """Tokens of the teacher's prompt and whether its texts had to be shortened. The user's last message carries the context."""

  def render(c: Context) -> list[int]:
    return chat.prompt_tokens(messages[:-1] + [messages[-1] | {"content": c.render(messages[-1]["content"])}], teacher=True)

  tokens = render(context)
  if len(tokens) <= max_tokens:
    return tokens, False
  for field in ("notes", "attempt", "feedback", "solution"):
    low, high = 0, len(getattr(context, field))   # the longest text that fits, by bisection
    if not high:
      continue
    while low < high:
      middle = (low + high + 1) // 2
      if len(render(dataclasses.replace(context, **{field: shorten(getattr(context, field), middle)}))) <= max_tokens:
        low = middle
      else:
        high = middle - 1
    context = dataclasses.replace(context, **{field: shorten(getattr(context, field), low)})
    tokens = render(context)
    if len(tokens) <= max_tokens:
      return tokens, True
  raise TaskError(f"a question with its closing instruction takes {len(tokens)} tokens, more than data.max_teacher_tokens={max_tokens}")


class Shape(NamedTuple):
  """Sizes of one pack, and the response positions R. All that the compiled step depends on."""
  rows: int
  length: int
  teacher_rows: int
  teacher_length: int
  tokens: int
  responses: int
  more_rows: int = 0     # of each further reading by the teacher, if the method has any
  more_length: int = 0

  def cost(self) -> float:
    """In passes of a token forward: the student's half goes forward and backward, and the vocabulary is met by the response tokens."""
    half = lambda rows, length: rows * length * (1.0 + length / ATTENTION_TOKENS)
    return 3.0 * half(self.rows, self.length) + half(self.teacher_rows, self.teacher_length) + half(self.more_rows, self.more_length) + 3.0 * self.tokens


@dataclasses.dataclass
class Shapes:
  """Those that a run has used. Its state: a resumed run has to choose the same ones to compute the same."""
  known: list[Shape] = dataclasses.field(default_factory=list)
  owed: float = 0.0         # steps' worth of waste that a better one would have spared, of all batches together, since one was last added for that reason
  limit: int = MAX_SHAPES   # of `known`; then only where none fits, and what is added holds all that was ever seen
  longest: tuple[int, int, int] | None = None   # tokens that a text of the student, one of the teacher, and a response can have: no room beyond that


class Text(NamedTuple):
  """What packing knows of a text. Those of one family begin with the same `shared` tokens, which a row needs once."""
  length: int       # with what is shared
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
    row = next((k for k in fitting if text.family in families[k]), fitting[0] if fitting else len(rows))
    if row == len(rows):
      rows.append([])
      room.append(length)
      families.append(set())
    rows[row].append(i)
    room[row] -= need(row)
    if text.shared:
      families[row].add(text.family)
  return rows


def begin_alike(texts: list[list[int]], starts: list[int], families: list[int]) -> list[Text]:
  """Of the texts of one pack: what each family shares, short of the last token before any response, which predicts it."""
  found = [Text(len(text)) for text in texts]
  for family in set(families):
    mine = [i for i, f in enumerate(families) if f == family and texts[i]]
    if len(mine) > 1:
      shared = min(len(os.path.commonprefix([texts[i] for i in mine])), min(starts[i] for i in mine) - 1)
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


def choose_shape(student: list[list[Text]], teacher: list[list[Text]], responses: list[list[int]], shapes: Shapes, *, length_multiple: int,
                 response_multiple: int, more: list[list[Text]] = ()) -> Shape:
  """Each pack's texts, and lengths of its responses -> a shape that holds them: one of `shapes`, or a new one, which is added to them. more: packs of
  all further readings."""
  most = lambda packs: max((text.length for texts in packs for text in texts), default=0)
  together = lambda texts: sum(t.length - t.shared for t in texts) + sum({t.family: t.shared for t in texts}.values())

  def best(packs):   # (rows, length) of the cheapest packing: rows as long as the longest text, or longer ones with less left over, up to a whole pack
    longest, whole = most(packs), max(map(together, packs))
    fitting = []
    for wanted in {*(int(longest * stretch) for stretch in (1.0, 1.5, 2.0, 3.0)), *(max(longest, -(-whole // n)) for n in (1, 2, 3))}:
      length = bucket(wanted, length_multiple)
      rows = max(1, max(len(first_fit(texts, length)) for texts in packs))
      fitting.append((rows * length * (1.0 + length / ATTENTION_TOKENS), rows, length))
    return min(fitting)[1:]

  def holds(shape: Shape) -> bool:
    fit = lambda packs, rows, length: most(packs) <= length and all(len(first_fit(texts, length)) <= rows for texts in packs)
    return (shape.tokens >= tokens and shape.responses >= longest and fit(student, shape.rows, shape.length)
            and fit(teacher, shape.teacher_rows, shape.teacher_length) and (not more or shape.more_rows > 0 and fit(more, shape.more_rows, shape.more_length)))

  tokens, longest = max(map(sum, responses)), max(map(max, responses))
  count, full = len(student[0]), shapes.longest or (math.inf,) * 3   # texts of a pack, tokens of a text

  def room(n, most):   # so that the next batch, a little larger, fits too
    return max(n, min(n + n // 16, most))

  def sizes(packs, text):   # (rows, length) with room. None in the length of the first shape: lengths may all be equal
    rows, length = best(packs)
    return room(rows, count), bucket(room(length, count * text), length_multiple) if rows == 1 and shapes.known else length

  new = Shape(*sizes(student, full[0]), *sizes(teacher, full[1]), bucket(room(tokens, count * full[2]), response_multiple), bucket(longest, response_multiple),
              *(sizes(more, full[1]) if more else ()))
  usable = min((s for s in shapes.known if holds(s)), key=Shape.cost, default=None)
  if usable:
    waste = usable.cost() / new.cost() - 1.0
    shapes.owed += waste if waste > WASTE else 0.0
    if waste <= WASTE or shapes.owed < COMPILATION or len(shapes.known) >= shapes.limit:
      return usable
    shapes.owed = 0.0
  if len(shapes.known) >= shapes.limit:   # a length never seen: from now on everything fits into this one
    new = Shape(*(max(sizes) for sizes in zip(new, *shapes.known)))
    rows = lambda packs, length: max(len(first_fit(texts, length)) for texts in packs)   # longer rows can pack worse
    new = new._replace(rows=max(new.rows, rows(student, new.length)), teacher_rows=max(new.teacher_rows, rows(teacher, new.teacher_length)),
                       more_rows=max(new.more_rows, rows(more, new.more_length)) if more else new.more_rows)
  shapes.known.append(new)
  return new


def lay_out(placed: list[list[int]], known: list[Text], texts: list[list[int]], starts: list[int], at: list[int], rows: int, length: int, tokens: int,
            pad_token: int) -> Rows:
  """One pack. placed: texts of each row; texts[i]: prompt and response; starts[i]: where its response begins; at[i]: its first token's number x."""
  token_PT, at_X = np.full((rows, length), pad_token, np.int32), np.zeros(tokens, np.int32)
  segment_PT, position_PT, prefix_PT = (np.zeros((rows, length), np.int32) for _ in range(3))
  for p, row in enumerate(placed):
    column, segment, prefixes = 0, 0, {}   # family -> its segment

    def put(words, position, prefix):
      nonlocal column, segment
      here, segment = slice(column, column + len(words)), segment + 1
      token_PT[p, here], segment_PT[p, here], position_PT[p, here], prefix_PT[p, here] = words, segment, position + np.arange(len(words)), prefix
      column += len(words)

    for i in row:
      shared, family = known[i].shared, known[i].family
      if shared and family not in prefixes:
        put(texts[i][:shared], 0, 0)
        prefixes[family] = segment
      answer = len(texts[i]) - starts[i]
      at_X[at[i]:at[i] + answer] = p * length + column + starts[i] - shared - 1 + np.arange(answer)   # the column before a token predicts it
      put(texts[i][shared:], shared, prefixes[family] if shared else 0)
  return Rows(token_PT, segment_PT, position_PT, prefix_PT, at_X)


def pack(groups: list[list[Rollout]], *, chat: Chat, messages, teacher_context, advantage, max_teacher_tokens: int, length_multiple: int,
         response_multiple: int, shapes: Shapes, updates: int = 1, packs: int = 1, counterfactual=None, share_prefixes: bool = False) -> Packed:
  """groups[q][g]: rollouts. messages(task) -> chat messages; teacher_context(group, i) -> Context | None; advantage(reward_QG) -> advantage_QG.

  counterfactual(group, i) -> (Context, weight) or None for each further reading, equally many for all; None: there is none.
  packs: of the whole batch; each of the `updates` gets as many. shapes: may grow by one. share_prefixes: what the responses
  to one question read in common stands once a row.
  """
  valid = lambda r: r.feedback.status is not Status.ENV_FAILED and np.isfinite(r.feedback.reward)
  reward_QG = np.array([[r.feedback.reward if r.feedback.status is not Status.ENV_FAILED else np.nan for r in g] for g in groups], np.float32)
  advantage_B = advantage(reward_QG).reshape(-1).astype(np.float32)
  rollouts = [r for group in groups for r in group]
  contexts = [teacher_context(group, i) if valid(group[i]) else None for group in groups for i in range(len(group))]
  readings = [counterfactual(group, i) for group in groups for i in range(len(group))] if counterfactual else []
  more_contexts = [[None if r is None else r[0] for r in reading] for reading in zip(*readings)]
  more_weights = [np.array([0.0 if r is None else r[1] for r in reading], np.float32) for reading in zip(*readings)]

  def teacher_prompts(contexts) -> tuple[list[list[int]], int]:
    found = [([], False) if c is None else teacher_prompt(chat, messages(r.task), c, max_teacher_tokens) for r, c in zip(rollouts, contexts)]
    return [tokens for tokens, _ in found], sum(was_cut for _, was_cut in found)

  prompts, shortened = teacher_prompts(contexts)
  more = [teacher_prompts(c) for c in more_contexts]

  B, G = len(rollouts), len(groups[0])
  texts = [r.prompt_tokens + r.tokens if valid(r) else [] for r in rollouts]
  taught = [context is not None for context in contexts]
  order = balanced_order([len(t) for t in texts], G, updates, packs // updates)
  rollouts, contexts, prompts, texts, taught = ([rows[b] for b in order] for rows in (rollouts, contexts, prompts, texts, taught))
  more_contexts = [[rows[b] for b in order] for rows in more_contexts]
  more_prompts = [[rows[b] for b in order] for rows, _ in more]
  more_texts = [[prompt + r.tokens if prompt else [] for prompt, r in zip(rows, rollouts)] for rows in more_prompts]

  teacher_texts = [prompt + r.tokens if t else [] for prompt, r, t in zip(prompts, rollouts, taught)]
  answers = [len(r.tokens) if valid(r) else 0 for r in rollouts]
  cut = lambda rows: [rows[first:first + B // packs] for first in range(0, B, B // packs)]
  question = [b // G for b in order]

  def known(texts, starts):
    return [begin_alike(*pack) if share_prefixes else [Text(len(t)) for t in pack[0]] for pack in zip(*map(cut, (texts, starts, question)))]

  measured = lambda prompts: [len(p) for p in prompts]
  read = [(texts, [len(r.prompt_tokens) for r in rollouts]), (teacher_texts, measured(prompts)), *zip(more_texts, map(measured, more_prompts))]
  student, teacher, *others = (known(*half) for half in read)
  shape = choose_shape(student, teacher, cut(answers), shapes, length_multiple=length_multiple, response_multiple=response_multiple, more=sum(others, []))
  at = [int(sum(pack[:i])) for pack in cut(answers) for i in range(len(pack))]

  def half(known, texts, starts, rows, length):
    placed = [first_fit(pack, length) for pack in known]
    laid = [lay_out(*pack, rows, length, shape.tokens, chat.pad_token) for pack in zip(placed, known, *map(cut, (texts, starts, at)))]
    stacked = Rows(*map(np.stack, zip(*laid)))
    return stacked if share_prefixes else stacked._replace(prefix_CPT=None)

  zeros = lambda dtype: np.zeros((B, shape.responses), dtype)
  batch = TrainBatch(student=half(student, *read[0], shape.rows, shape.length),
                     teacher=half(teacher, *read[1], shape.teacher_rows, shape.teacher_length), start_B=np.array(at, np.int32), response_BR=zeros(np.int32),
                     weight_BR=zeros(np.float32), advantage_B=advantage_B[order], distill_B=np.array(taught, np.float32),
                     logp_rollout_BR=zeros(np.float32), logp_old_BR=zeros(np.float32),
                     counterfactuals=tuple(Counterfactual(half(known, *r, shape.more_rows, shape.more_length), w[order])
                                           for known, r, w in zip(others, read[2:], more_weights)))
  for b, r in enumerate(rollouts):
    n = len(r.tokens)
    batch.response_BR[b, :n], batch.logp_rollout_BR[b, :n] = r.tokens, r.logp
    batch.weight_BR[b, :n] = float(valid(r))
  halves = (batch.student, batch.teacher) if any(taught) else (batch.student,)
  metrics = {"data/dropped": float(sum(not valid(r) for r in rollouts)), "data/teacher_share": float(batch.distill_B.mean()),
             "data/teacher_shortened": float(shortened), "data/solution_share": float(np.mean([c is not None and bool(c.solution) for c in contexts])),
             "data/useful_tokens": float(sum((half.segment_CPT > 0).sum() for half in halves) / sum(half.segment_CPT.size for half in halves)),
             "perf/compiles": float(len(shapes.known))}   # of the train step, this run's earlier sessions included
  if counterfactual:
    metrics |= {"counterfactual/teacher_tokens": float(sum(map(len, sum(more_texts, [])))), "counterfactual/shortened": float(sum(n for _, n in more)),
                "counterfactual/told_share": float(np.mean([c is not None for row in more_contexts for c in row]))}
  return Packed(batch, rollouts, contexts, metrics, tuple(more_contexts))


def balanced_order(lengths: list[int], group: int, updates: int, packs: int) -> list[int]:
  """Where each row of the batch comes from: within an update, groups are dealt to its packs, or each group's rows to packs of its own, or, where neither
  divides, rows."""
  if packs == 1:
    return list(range(len(lengths)))
  order, rows = [], len(lengths) // updates
  groups, rest = divmod(rows, group)
  unit = group if not rest and groups % packs == 0 else 1
  hands = packs // groups if not rest and packs % groups == 0 and group % (packs // groups) == 0 else packs   # packs of one deal
  dealt = rows * hands // packs
  for first in range(0, len(lengths), dealt):
    sizes = [sum(lengths[i:i + unit]) for i in range(first, first + dealt, unit)]
    order += [first + u * unit + k for hand in deal(sizes, hands) for u in hand for k in range(unit)]
  return order
