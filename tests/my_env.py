"""An environment of one's own: this file, and `config.env = dict(name="tests.my_env:ReverseWord", length=5)`."""

import random

from sdpo_jax.records import Feedback, Task


class ReverseWord:
  """Asks for a word of `length` letters backwards."""

  def __init__(self, *, length: int = 5):
    self.length = length

  def task(self, split: str, index: int) -> Task:
    word = "".join(random.Random(f"{split}/{index}").choices("abcdefgh", k=self.length))
    return Task(
      id=f"{split}/{index}", prompt=f"Write {word} backwards.", solution=word[::-1], split=split
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.prompt}]

  def judge(self, task: Task, response: str) -> Feedback:
    wrong = [
      i + 1
      for i, (a, b) in enumerate(zip(response.strip().ljust(self.length), task.solution))
      if a != b
    ]
    if not wrong and len(response.strip()) == self.length:
      return Feedback(1.0, "")
    return Feedback(0.0, f"Wrong letters at places {wrong}." if wrong else "The word is too long.")
