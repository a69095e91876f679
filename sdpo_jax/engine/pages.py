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
  """Says which pages of one pool are free, for each shard of rows. Lowest numbers go first."""

  def __init__(self, shards: int):
    self.size = 0  # pages of a shard
    self._free: list[list[int]] = [[] for _ in range(shards)]  # heaps

  def used(self, z: int) -> int:
    """Returns how many pages of a shard are in use."""
    return self.size - len(self._free[z])

  def take(self, z: int, count: int) -> list[int]:
    """Returns so many free pages of a shard, which has them."""
    return [heapq.heappop(self._free[z]) for _ in range(count)]

  def give_back(self, z: int, pages: list[int]) -> None:
    """Frees pages of a shard."""
    for page in pages:
      heapq.heappush(self._free[z], page)

  def resize(self, size: int, lists: list[list[list[int]]]) -> list[list[int]]:
    """Renumbers the pages for a pool of another size.

    Args:
      size: the new number of pages of a shard.
      lists: for each shard, the lists of pages in use; they are changed in place.

    Returns:
      For each shard, the old page that each new one holds; 0 where the new one is free.
    """
    source = []
    for z, owners in enumerate(lists):
      old = [page for pages in owners for page in pages]
      new = iter(range(len(old)))
      for pages in owners:
        pages[:] = [next(new) for _ in pages]
      source.append(old + [0] * (size - len(old)))
      self._free[z] = list(range(len(old), size))
    self.size = size
    return source
