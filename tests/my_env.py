"""This file is a whole environment of one's own.

`config.env = dict(name="tests.my_env:ReverseWord", length=5)` names it.
"""

import random

from sdpo_jax.records import Feedback, Task


class ReverseWord:
  """Asks for a word of `length` letters backwards."""

  def __init__(self, *, length: int = 5):
    self.length = length

  def task(self, split: str, index: int) -> Task:
    """Makes a question: the same arguments give the same word."""
    word = "".join(random.Random(f"{split}/{index}").choices("abcdefgh", k=self.length))
    return Task(
      id=f"{split}/{index}", prompt=f"Write {word} backwards.", solution=word[::-1], split=split
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Returns the messages that the policy reads."""
    return [{"role": "user", "content": task.prompt}]

  def judge(self, task: Task, response: str) -> Feedback:
    """Gives 1 for the right word, else 0 and a text that says which letters are wrong."""
    word = response.strip()
    if word == task.solution:
      return Feedback(1.0, "")
    padded = word.ljust(self.length)
    places = [i + 1 for i in range(self.length) if padded[i] != task.solution[i]]
    if places:
      return Feedback(0.0, f"Wrong letters at places {places}.")
    return Feedback(0.0, "The word is too long.")
