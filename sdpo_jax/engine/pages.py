"""Keeps the books of a pool of pages: which are free, and how many the pool should have."""

import heapq


def power_of_two(count: int) -> int:
  """Returns the least power of two that is not below a count; 0 for 0."""
  return 1 << (count - 1).bit_length() if count else 0


def pool_size(need: int, *, parts: int = 1) -> int:
  """Returns the pages of the smallest pool that holds `need`.

  Sizes are few, for a program is compiled for each: powers of two from 8 on, with parts - 1 more
  between each and its half.
  """
  size = max(8, power_of_two(need))
  step = max(1, size // 2 // parts)
  return max(8, -(-need // step) * step)


class Book:
  """Says which pages of one shard of a pool are free. Lowest numbers go first."""

  def __init__(self) -> None:
    self.size = 0
    self._free: list[int] = []  # a heap

  @property
  def used(self) -> int:
    """How many pages are in use."""
    return self.size - len(self._free)

  def take(self, count: int) -> list[int]:
    """Returns so many free pages, which there must be."""
    return [heapq.heappop(self._free) for _ in range(count)]

  def give_back(self, pages: list[int]) -> None:
    """Frees pages."""
    for page in pages:
      heapq.heappush(self._free, page)

  def resize(self, size: int, holders: list[list[int]]) -> list[int]:
    """Renumbers the pages for a pool of another size.

    Args:
      size: the new number of pages.
      holders: the lists of all pages in use; they are changed in place.

    Returns:
      The old page that each new one holds; 0 where the new one is free.
    """
    old = [page for pages in holders for page in pages]
    new = iter(range(len(old)))
    for pages in holders:
      pages[:] = [next(new) for _ in pages]
    self._free = list(range(len(old), size))
    self.size = size
    return old + [0] * (size - len(old))
