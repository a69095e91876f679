"""Texts to rows of fixed length, rows to packs."""

import os
from typing import NamedTuple

import numpy as np

from sdpo_jax.records import Rows


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
