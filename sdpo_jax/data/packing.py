"""Packs texts into rows of fixed length, and rows into packs.

A text is a prompt with a response. Several texts share a row, told apart by segment ids, so that
short responses do not pay for long ones. Responses to one question begin alike; what they share may
stand once a row (`records.Rows`). A pack is what one micro-batch holds on one device.

From token lists to rows, as `data/batch.py` and `tests/fakes.py` do it:

  packs = cut_into_packs(texts, first_tokens(lengths, count), families)
  placed = [first_fit(pack.extents, length) for pack in packs]
  rows = lay_out(packs, placed, PackSize(rows, length, tokens), pad_token, share_prefixes=...)
"""

from collections.abc import Sequence
import itertools
import os
from typing import NamedTuple

import numpy as np

from sdpo_jax.records import Rollout, Rows, Segment


class Extent(NamedTuple):
  """The size of a text. Texts of one family begin with the same `shared` tokens."""

  length: int  # with what is shared
  shared: int = 0  # a row needs these tokens once
  family: int = -1


Span = tuple[int, int]  # begin and end, of tokens in a text


class Text(NamedTuple):
  """One text: a prompt, and what follows it of a response."""

  tokens: list[int]
  spans: list[Span]  # what the policy sampled of it: one span, or one a turn
  first: int = 0  # index in the response of the first token in the spans
  weight: float = 1.0  # of each token in the spans, beside that of the reading

  @property
  def prompt(self) -> list[int]:
    """Returns the tokens before what was sampled."""
    return self.tokens[: self.spans[0][0]]


class Texts(NamedTuple):
  """What one reader reads: for each response one text, several that share it out, or none."""

  of: list[list[Text]]

  def prompt(self, b: int) -> list[int]:
    """Returns the tokens before response b in its first text; [] for no text."""
    return self.of[b][0].prompt if self.of[b] else []

  def in_order(self, order: list[int]) -> "Texts":
    """Returns the texts with those of response order[b] at place b."""
    return Texts([self.of[b] for b in order])

  def where(self, others: "Texts") -> "Texts":
    """Returns the texts of those responses that have a text in `others` too."""
    return Texts([own if other else [] for own, other in zip(self.of, others.of, strict=True)])

  def lengths(self) -> list[int]:
    """Returns the tokens of each response's texts together."""
    return [sum(len(text.tokens) for text in texts) for texts in self.of]


def texts_after(prompts: list[list[int] | None], rollouts: list[Rollout]) -> Texts:
  """Returns each prompt with its response behind it; None: there is no text."""
  return Texts(
    [
      [] if prompt is None else [text_after(prompt, rollout)]
      for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]
  )


def text_after(prompt: list[int], rollout: Rollout) -> Text:
  """Returns a prompt with a response behind it."""
  if rollout.sampled is None:
    whole = (len(prompt), len(prompt) + len(rollout.tokens))
    return Text(prompt + rollout.tokens, [whole])
  tokens, spans = list(prompt), []
  for segment in rollout.sampled:
    tokens += segment.before
    spans.append((len(tokens), len(tokens) + len(segment.completion.tokens)))
    tokens += segment.completion.tokens
  return Text(tokens, spans)


def segment_after(prompt: Sequence[int], segment: Segment) -> Text:
  """Returns a prompt with one part of a response behind it."""
  tokens = [*prompt, *segment.completion.tokens]
  return Text(tokens, [(len(prompt), len(tokens))], segment.start)


def texts_read(rollout: Rollout) -> list[Text]:
  """Returns what the policy has read and sampled: one text, or one for each turn with a prompt."""
  turns = [segment for segment in rollout.sampled or () if segment.prompt]
  if not turns:
    return [text_after(rollout.prompt_tokens, rollout)]
  return [segment_after(segment.prompt, segment) for segment in turns]


def sampled_tokens(spans: list[Span]) -> int:
  """Returns how many tokens lie in the spans."""
  return sum(end - begin for begin, end in spans)


class PackTexts(NamedTuple):
  """The texts of one pack, a list entry each."""

  texts: list[Text]
  first: list[int]  # number x of the first token of its spans among those of the pack
  extents: list[Extent]


class PackSize(NamedTuple):
  """The sizes of a pack's arrays."""

  rows: int  # P
  length: int  # T
  tokens: int  # X, response tokens


def deal(sizes: list[int], hands: int) -> list[list[int]]:
  """Deals indices to `hands` lists of equal length and about equal sum of sizes.

  The largest goes first, to the smallest sum that still takes one.
  """
  dealt, total, limit = [[] for _ in range(hands)], [0] * hands, len(sizes) // hands
  for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    open_hands = [hand for hand in range(hands) if len(dealt[hand]) < limit]
    hand = min(open_hands, key=lambda hand: total[hand])
    dealt[hand].append(i)
    total[hand] += sizes[i]
  return [sorted(hand) for hand in dealt]


def balanced_order(
  work: list[int], group: int, updates: int, packs: int, *, whole: bool
) -> list[int]:
  """Returns which response stands at each row of the batch.

  Within each of the `updates`, rows are dealt to its `packs` so that all have about as much work.
  work: of each response; `group` consecutive ones answer one question.
  whole: deals groups as they are, or each group's rows to packs of its own, where either divides.
    What a group shares then need not stand in many packs, but larger pieces come out less even.
  """
  if packs == 1:
    return list(range(len(work)))
  rows = len(work) // updates
  groups, rest = divmod(rows, group)
  keeps_groups = whole and not rest and groups % packs == 0
  splits_groups = whole and not rest and packs % groups == 0 and group % (packs // groups) == 0
  unit = group if keeps_groups else 1  # responses that are dealt as one
  hands = packs // groups if splits_groups else packs  # packs of one deal
  responses_of_deal = rows * hands // packs
  order = []
  for begin in range(0, len(work), responses_of_deal):
    units = range(begin, begin + responses_of_deal, unit)
    for hand in deal([sum(work[i : i + unit]) for i in units], hands):
      for u in hand:
        order += range(units[u], units[u] + unit)
  return order


def in_packs(items: Sequence, packs: int) -> list[Sequence]:
  """Cuts a sequence with one item for each row of the batch into packs of equal size."""
  size = len(items) // packs
  return [items[k * size : (k + 1) * size] for k in range(packs)]


def first_tokens(lengths: list[int], packs: int) -> list[list[int]]:
  """Returns, by pack, the number of each response's first token among those of its pack.

  lengths: response tokens of each row of the batch.
  """
  return [[0, *itertools.accumulate(pack)][:-1] for pack in in_packs(lengths, packs)]


def cut_into_packs(
  texts: Texts, first: list[list[int]], families: list[int] | None
) -> list[PackTexts]:
  """Cuts the texts of a batch into packs.

  first: see `first_tokens`. families: texts of one family share what they begin with in each pack;
  None: nothing is shared.
  """
  count = len(first)
  packs = []
  for of_pack, first_x, family in zip(
    in_packs(texts.of, count), first, in_packs(families or range(len(texts.of)), count), strict=True
  ):
    flat = [
      (text, x + text.first, f)
      for own, x, f in zip(of_pack, first_x, family, strict=True)
      for text in own
    ]
    written = [text for text, _, _ in flat]
    extents = [Extent(len(text.tokens)) for text in written]
    if families is not None:
      extents = shared_beginnings(written, [f for _, _, f in flat])
    packs.append(PackTexts(written, [x for _, x, _ in flat], extents))
  return packs


def shared_beginnings(texts: list[Text], families: list[int]) -> list[Extent]:
  """Finds what the texts of each family share within one pack.

  At least the last token before any response, which predicts it, is left to each text.
  """
  extents = [Extent(len(text.tokens)) for text in texts]
  for family in set(families):
    members = [i for i, f in enumerate(families) if f == family]
    if len(members) < 2:
      continue
    alike = len(os.path.commonprefix([texts[i].tokens for i in members]))
    shared = min(alike, min(texts[i].spans[0][0] for i in members) - 1)
    for i in members:
      extents[i] = Extent(len(texts[i].tokens), shared, family)
  return extents


def tokens_together(extents: list[Extent]) -> int:
  """Returns the tokens of texts that stand in one row."""
  shared_of_family = {text.family: text.shared for text in extents}
  return sum(text.length - text.shared for text in extents) + sum(shared_of_family.values())


def first_fit(extents: list[Extent], length: int) -> list[list[int]]:
  """Places texts in rows of at most `length` tokens; returns the indices of the texts of each row.

  The longest text comes first. Each goes into the first row with room that holds its family, else
  into the first with room, else into a new one. Empty texts are left out.
  """
  rows, room, families = [], [], []
  for i in sorted(range(len(extents)), key=lambda i: -extents[i].length):
    text = extents[i]
    if not text.length:
      continue
    assert text.length <= length, (text.length, length)
    with_family = [k for k in range(len(rows)) if text.family in families[k]]
    fitting_family = [k for k in with_family if room[k] >= text.length - text.shared]
    fitting = [k for k in range(len(rows)) if room[k] >= text.length]
    row = (fitting_family or fitting or [len(rows)])[0]
    if row == len(rows):
      rows.append([])
      room.append(length)
      families.append(set())
    rows[row].append(i)
    room[row] -= text.length - (text.shared if row in with_family else 0)
    if text.shared:
      families[row].add(text.family)
  return rows


def lay_out(
  packs: list[PackTexts],
  placed: list[list[list[int]]],
  size: PackSize,
  pad_token: int,
  *,
  share_prefixes: bool,
) -> Rows:
  """Writes the texts of packs into arrays.

  placed: of each pack, the indices of the texts of each row.
  """
  arrays = []
  for texts, rows in zip(packs, placed, strict=True):
    writer = _PackWriter(size, pad_token)
    for p, row in enumerate(rows):
      writer.begin_row(p)
      for i in row:
        writer.write(texts.texts[i], texts.first[i], texts.extents[i])
    arrays.append(writer.arrays)
  stacked = Rows(*map(np.stack, zip(*arrays, strict=True)))
  return stacked if share_prefixes else stacked._replace(prefix_CPT=None)


class _PackWriter:
  """Writes texts side by side into the rows of one pack."""

  def __init__(self, size: PackSize, pad_token: int):
    self._length = size.length
    token_PT = np.full((size.rows, size.length), pad_token, np.int32)
    segment_PT, position_PT, prefix_PT = (np.zeros_like(token_PT) for _ in range(3))
    at_X = np.zeros(size.tokens, np.int32)
    self.arrays = Rows(token_PT, segment_PT, position_PT, prefix_PT, at_X)  # without the axis C

  def begin_row(self, row: int) -> None:
    self._row, self._column, self._segment = row, 0, 0
    self._prefix_of_family = {}  # the segment that holds what a family shares

  def write(self, text: Text, first: int, extent: Extent) -> None:
    """Appends a text to the row, after what its family shares if that is not there yet.

    first: as in PackTexts.
    """
    tokens, shared, prefix = text.tokens, extent.shared, 0
    if shared:
      if extent.family not in self._prefix_of_family:
        self._put(tokens[:shared], position=0, prefix=0)
        self._prefix_of_family[extent.family] = self._segment
      prefix = self._prefix_of_family[extent.family]
    # The column before a token predicts it.
    column = self._row * self._length + self._column - shared - 1
    for begin, end in text.spans:
      count = end - begin
      self.arrays.at_CX[first : first + count] = column + begin + np.arange(count)
      first += count
    self._put(tokens[shared:], position=shared, prefix=prefix)

  def _put(self, tokens: list[int], *, position: int, prefix: int) -> None:
    """Appends one segment to the row. position: of its first token."""
    self._segment += 1
    place = self._row, slice(self._column, self._column + len(tokens))
    self.arrays.token_CPT[place] = tokens
    self.arrays.segment_CPT[place] = self._segment
    self.arrays.position_CPT[place] = position + np.arange(len(tokens))
    self.arrays.prefix_CPT[place] = prefix
    self._column += len(tokens)
