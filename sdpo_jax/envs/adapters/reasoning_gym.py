"""Judges answers to the questions of reasoning-gym's generators.

The policy reads a question, and answers between `<answer>` and `</answer>`. The package scores the
answer, and says nothing else: the feedback tells a missing answer, one that the package cannot
read, and how much of the full score a wrong one gets.

A generator's own seeds are counted on from that of its data set. Data sets of CHUNK questions
follow one another in a split's range of seeds, and the ranges of no two splits meet. That the texts
differ is another matter: a generator with few questions asks the same in all splits.

Some generators evaluate the answer as Python. They are refused, since whatever the policy writes
would be carried out in this process; but ARITHMETIC ones get answers of digits and operators.

`pip install 'sdpo_jax[reasoning_gym]'` brings the package.
"""

import functools
import json
import re
import threading

from sdpo_jax.envs.adapters.foreign import read_arguments, seed_of
from sdpo_jax.envs.imports import need
from sdpo_jax.envs.rows import final_text
from sdpo_jax.errors import SettingError
from sdpo_jax.records import Feedback, Task

CHUNK = 500  # questions, the package's own size of a data set
KEPT = 8  # data sets
MAX_ANSWER = 10_000  # characters
EVALUATING = frozenset(
  "binary_matrix intermediate_integration n_queens polynomial_multiplication simple_integration "
  "spiral_matrix string_insertion".split()
)
ARITHMETIC = frozenset({"countdown", "puzzle24"})
ASK = "Think step by step, then give the final answer alone between <answer> and </answer>."
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SUM = re.compile(r"(?!.*\*\*)[-+*/() 0-9]{1,200}")  # no powers: 9**9**9 would never end


class ReasoningGym:
  """Asks the questions of some generators by turns.

  generators: their names, with commas between them.
  arguments: of all of them, as JSON: {"min_terms": 2}.
  """

  def __init__(self, *, generators: str, arguments: str = ""):
    need("sdpo_jax.envs.adapters.reasoning_gym:ReasoningGym", "reasoning_gym", ("reasoning_gym",))
    self._names = [name.strip() for name in generators.split(",")]
    self._arguments = read_arguments(arguments)
    refused = sorted(EVALUATING.intersection(self._names))
    if refused:
      raise SettingError(
        f"config.env.generators: {', '.join(refused)} would evaluate what the policy answers as "
        "Python; leave it out"
      )
    self._lock = threading.Lock()  # the package's generators promise nothing about threads
    self._data_set = functools.lru_cache(KEPT)(self._make_data_set)
    for name in self._names:
      self._data_set(name, 0)

  def task(self, split: str, index: int) -> Task:
    """Returns a question. ValueError for a split that does not exist."""
    number, place = divmod(index, len(self._names))
    name = self._names[place]
    seed = seed_of(split, number)
    with self._lock:
      entry = self._data_set(name, seed - number % CHUNK)[number % CHUNK]
    answer = entry["answer"]
    return Task(
      f"reasoning_gym/{name}/{split}/{number}",
      f"{entry['question']}\n\n{ASK}",
      solution=f"<answer>{answer}</answer>" if isinstance(answer, str) else None,
      split=split,
      data={"kind": name, "seed": seed - number % CHUNK, "place": number % CHUNK},
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the question."""
    return [{"role": "user", "content": task.prompt}]

  def answer(self, task: Task, response: str) -> str | None:
    """Returns what stands in the last pair of tags."""
    found = _ANSWER.findall(final_text(response)[0])
    return found[-1].strip() if found else None

  def judge(self, task: Task, response: str) -> Feedback:
    """Gives the package's score, which may lie between 0 and 1."""
    kind, answer = task.data["kind"], self.answer(task, response)
    if answer is None:
      return Feedback(0.0, "Wrong format\nThe answer must stand between <answer> and </answer>.")
    if len(answer) > MAX_ANSWER:
      return Feedback(0.0, f"Wrong format\nThe answer has more than {MAX_ANSWER} characters.")
    if kind in ARITHMETIC and not _SUM.fullmatch(answer):
      return Feedback(0.0, "Wrong format\nThe answer must consist of numbers, + - * / and ( ).")
    with self._lock:
      data_set = self._data_set(kind, task.data["seed"])
      entry = data_set[task.data["place"]]
      try:
        score = float(data_set.score_answer(answer, entry))
      except Exception as error:  # the package reads answers with int() and the like
        return Feedback(0.0, f"Wrong format\nThe answer cannot be read: {error}")
    if score >= 1.0:
      return Feedback(1.0, "")
    quoted = json.dumps(answer[:60], ensure_ascii=False)
    return Feedback(score, f"Wrong answer\n{quoted} scores {score:.2f} of 1.")

  def _make_data_set(self, name: str, seed: int):
    """Returns a data set of the package. SettingError for a name or an argument that it refuses."""
    import reasoning_gym

    try:
      return reasoning_gym.create_dataset(name, seed=seed, size=CHUNK, **self._arguments)
    except (ValueError, TypeError, AssertionError) as error:
      raise SettingError(f"config.env.generators={name!r}: {error}") from None
