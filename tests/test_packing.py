"""Where texts stand in rows and packs, worked by hand."""

import numpy as np

from sdpo_jax.data.packing import (
  Extent,
  PackSize,
  Text,
  Texts,
  balanced_order,
  cut_into_packs,
  deal,
  first_fit,
  first_tokens,
  lay_out,
  shared_beginnings,
  tokens_together,
)


def test_the_longest_text_comes_first_into_the_first_row_with_room():
  extents = [Extent(n) for n in (3, 0, 7, 5, 2)]
  assert first_fit(extents, 8) == [[2], [3, 0], [4]]
  assert first_fit(extents, 17) == [[2, 3, 0, 4]]
  assert first_fit([Extent(0)], 8) == []


def test_a_text_goes_where_its_family_stands():
  """Text 2 fits beside text 1 as well, and text 3 fits nowhere else."""
  extents = [Extent(6, 4, 0), Extent(5), Extent(5, 4, 0), Extent(5, 4, 0)]
  assert first_fit(extents, 8) == [[0, 2, 3], [1]]
  assert tokens_together([extents[i] for i in (0, 2, 3)]) == 8
  assert tokens_together(extents) == 13


def test_what_a_family_shares_ends_before_the_token_that_predicts_a_response():
  texts = [Text([1, 2, last, 9], [(3, 4)]) for last in (3, 3, 4)] + [Text([5, 6], [(1, 2)])]
  families = [0, 0, 1, 2]
  # Family 0 has three tokens in common, of which the last predicts; the others are alone.
  assert shared_beginnings(texts, families) == [
    Extent(4, 2, 0),
    Extent(4, 2, 0),
    Extent(4),
    Extent(2),
  ]


def test_hands_are_of_equal_length_and_about_equal_sum():
  assert deal([9, 1, 5, 5, 2, 8], 2) == [[0, 1, 3], [2, 4, 5]]  # 15 each


def test_updates_keep_their_responses_and_packs_their_groups():
  work = [8, 8, 5, 5, 1, 1, 4, 4] * 2
  apart = balanced_order(work, 2, 2, 2, whole=False)
  whole = balanced_order(work, 2, 2, 2, whole=True)
  for order in (apart, whole):
    assert sorted(order[:8]) == list(range(8))
    assert sorted(order[8:]) == list(range(8, 16))
  assert whole[:8] == [0, 1, 4, 5, 2, 3, 6, 7]
  assert balanced_order(work, 2, 2, 1, whole=True) == list(range(16))
  # Four packs for two groups of four: each group has two packs of its own.
  split = balanced_order([1] * 8, 4, 1, 4, whole=True)
  assert [{b // 4 for b in split[k : k + 2]} for k in (0, 2, 4, 6)] == [{0}, {0}, {1}, {1}]


def laid_out(families):
  texts = Texts(
    [[Text([1, 2, 7, 8], [(2, 4)])], [Text([1, 2, 9], [(2, 3)])], [Text([3, 4, 5], [(1, 3)])]]
  )
  (pack,) = packs = cut_into_packs(texts, first_tokens([2, 1, 2], 1), families)
  placed = [first_fit(pack.extents, 8)]
  return lay_out(packs, placed, PackSize(2, 8, 6), 0, share_prefixes=families is not None)


def test_rows_without_shared_beginnings():
  rows = laid_out(None)
  assert rows.prefix_CPT is None
  np.testing.assert_array_equal(
    rows.token_CPT, [[[1, 2, 7, 8, 1, 2, 9, 0], [3, 4, 5, 0, 0, 0, 0, 0]]]
  )
  np.testing.assert_array_equal(
    rows.segment_CPT, [[[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0, 0]]]
  )
  np.testing.assert_array_equal(
    rows.position_CPT, [[[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0, 0, 0]]]
  )
  # The columns before 7, 8; before 9; before 4, 5 in the second row; and one token of padding.
  np.testing.assert_array_equal(rows.at_CX, [[1, 2, 5, 8, 9, 0]])


def test_a_shared_beginning_is_a_segment_that_the_others_continue():
  rows = laid_out([0, 0, 1])
  np.testing.assert_array_equal(
    rows.token_CPT, [[[1, 2, 7, 8, 2, 9, 0, 0], [3, 4, 5, 0, 0, 0, 0, 0]]]
  )
  np.testing.assert_array_equal(rows.segment_CPT[0, 0], [1, 2, 2, 2, 3, 3, 0, 0])
  np.testing.assert_array_equal(rows.position_CPT[0, 0], [0, 1, 2, 3, 1, 2, 0, 0])
  np.testing.assert_array_equal(rows.prefix_CPT[0, 0], [0, 1, 1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(rows.at_CX, [[1, 2, 4, 8, 9, 0]])


def test_packs_number_their_response_tokens_by_themselves():
  assert first_tokens([2, 0, 3, 1], 1) == [[0, 2, 2, 5]]
  assert first_tokens([2, 0, 3, 1], 2) == [[0, 2], [0, 3]]
