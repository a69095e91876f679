"""Which shapes are compiled for: room, waste, limits, resume."""

import json
import types

import numpy as np
import pytest

from sdpo_jax.data.packing import Extent
from sdpo_jax.data.shapes import Load, Shape, ShapeRules, Shapes, choose_shape
from tests import fakes


def fresh(known=(), owed=0.0, **kwargs):
  return Shapes((4000, 5000, 3000), list(known), owed, **kwargs)


def test_rows_are_longer_than_a_text_where_the_longest_texts_would_have_as_many_pairs_of_columns():
  """One text of 1,500 tokens and 63 of 1,000: rows of 3,000 leave no gaps, but attention compares
  more columns than in 64 rows of 1,500.
  """
  texts = [[Extent(1500)] + [Extent(1000)] * 63]
  load = Load(64, (texts, texts, []), 6400, 100)

  def chosen(longest):
    shapes = Shapes((longest, longest, 100))
    return choose_shape(lambda packs: load, [1], shapes, fakes.shape_rules(100))

  few, many = chosen(1500), chosen(3000)
  assert few.rows * few.length**2 <= 64 * 1500**2 < many.rows * many.length**2
  assert many.rows * many.length < few.rows * few.length


def one_row(tokens, shapes, multiple=8):
  return choose_shape(
    lambda packs: Load(1, ([[Extent(tokens)]], [[Extent(1)]], []), 8, 8),
    [1],
    shapes,
    fakes.shape_rules(multiple),
  )


def test_lengths_that_are_all_equal_get_no_room():
  shapes = fresh()
  assert {one_row(800, shapes) for _ in range(50)} == set(shapes.known) and shapes.known[
    0
  ].length == 800


def test_room_and_the_price_of_a_compilation_are_settings():
  data = types.SimpleNamespace(length_multiple=8, response_multiple=4, room=0.5)
  data.compilation_steps = 3.0
  rules = ShapeRules.of(data)
  assert rules == ShapeRules(length=8, response=4, room=0.5, compilation=3.0)

  def chosen(texts, shapes):
    load = Load(len(texts), ([[Extent(n) for n in texts]], [[Extent(1)]], []), 8, 8)
    return choose_shape(lambda packs: load, [1], shapes, rules)

  assert chosen([100, 60], fresh()).length == 240  # one row of both, and half of that as room
  assert chosen([100, 100], fresh()).length == 200  # equal lengths do not drift
  shapes = fresh()
  chosen([400], shapes)
  served = [chosen([100], shapes).length for _ in range(6)]
  # each of the first steps wastes nearly two steps' worth
  assert (served[0], len(set(served)), len(shapes.known)) == (400, 2, 2)


def test_a_better_shape_is_compiled_once_its_lack_has_cost_as_much():
  """Lengths fall to a half: the long shape serves until its waste, in steps, is what a compilation
  costs, and no longer.
  """
  shapes = fresh()
  long = one_row(800, shapes)
  served = [one_row(400, shapes) for _ in range(30)]
  # room to grow into
  assert len(shapes.known) == 2 and 400 < (better := shapes.known[1]).length < 450
  assert (
    served.index(better) == -(-10 // (long.cost() / better.cost() - 1.0)) - 1 and not shapes.owed
  )


@pytest.mark.parametrize(
  "multiple, first, then", [(8, 800, 760), (1024, 3000, 2000), (32, 160, 120)]
)
def test_a_waste_that_no_better_shape_would_spare_compiles_nothing(multiple, first, then):
  """Nor one that rounding and room would leave as it is."""
  shapes = fresh()
  one_row(first, shapes, multiple)
  assert len({one_row(then, shapes, multiple) for _ in range(400)}) == len(shapes.known) == 1


def test_once_full_only_what_does_not_fit_compiles():
  shapes = fresh(limit=1)
  one_row(800, shapes)
  assert len({one_row(100, shapes) for _ in range(400)}) == len(shapes.known) == 1
  assert one_row(900, shapes).length >= 900 and len(shapes.known) == 2


def test_there_is_no_room_beyond_the_longest_text():
  """One text a pack, at the run's limits: the sizes that a plan compiles for."""
  shapes = Shapes(longest=(10240, 18432, 8192))

  def at(prompt, response):
    policy, teacher = [[Extent(prompt + response)]], [[Extent(10240 + response)]]
    load = Load(1, (policy, teacher, []), response, response)
    return choose_shape(lambda packs: load, [1], shapes, fakes.shape_rules(1024, 1024))

  at(1000, 1000)
  assert at(2048, 8192)[:6] == (1, 10240, 1, 18432, 8192, 8192)


def test_a_resumed_run_chooses_the_same_shapes():
  """Shapes and debt go through a checkpoint's JSON; without the debt the choice would differ."""
  lengths = np.random.default_rng(0).integers(300, 900, 200).tolist()

  def chosen(stop=None, forget=False):
    shapes, out = fresh(), []
    for i, n in enumerate(lengths):
      if i == stop:
        known, owed = json.loads(json.dumps([shapes.known, shapes.owed]))
        assert owed > 0
        shapes = fresh([Shape(*sizes) for sizes in known], 0.0 if forget else owed)
      out.append(one_row(n, shapes))
    return out

  whole = chosen()
  assert len(set(whole)) > 2 and chosen(stop=20) == whole and chosen(stop=20, forget=True) != whole
