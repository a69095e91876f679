"""Memories: what a run remembers of its questions from one visit to the next. Host code.

A part of this axis is made from its settings, once a run; `visit(group)` is called with each judged
group in the order of the batch, and returns where the question stands. The memory is in the
checkpoint. Every process sees every group and so keeps the same memory, whatever their number.

`questions` keeps of each question, by its id, the pass rate, the number of visits, and a few
successes of earlier visits. Source: DRIFT, arXiv 2606.30345, sections 3.2 and 3.4:

  * r_now is the share of successes among the judged responses of a visit; r is r_now at the first
    visit (decided here), then r <- alpha r + (1 - alpha) r_now.
  * A success is kept as the environment judged it, without its thinking block. Where as many are
    kept as may be, `replace` says what a new one does. "reward", as printed: it takes the place of
    the one with the lowest reward if its own is higher. Where every success has the same reward
    the first ones are thus kept for ever. "oldest": it takes the place of the one kept longest.
  * Equal texts are kept once, and of equal rewards the one kept longest goes (decided here).
  * A response that was not judged does not count. A visit without any verdict is none.

Errors: for a question without an id, and for one id with two prompts, ValueError where the
questions are known before the run (`check_ids`), else RunError.
"""

from collections.abc import Iterable
import dataclasses
from typing import Any, NamedTuple, Protocol
import zlib

from sdpo_jax import ranges
from sdpo_jax.errors import RunError, unknown
from sdpo_jax.objectives.teacher_context import without_thinking
from sdpo_jax.records import Rollout, Task


@dataclasses.dataclass(frozen=True)
class Standing:
  """What is known of a question, its present visit included."""

  pass_rate: float  # in [0, 1], a moving average over visits
  visits: int
  solutions: tuple[str, ...] = ()  # of earlier visits
  # what a route has decided
  stage: int = 2
  level: str = "medium"  # easy | medium | hard


class Memory(Protocol):
  """What a part of this axis is."""

  def visit(self, group: list[Rollout]) -> Standing:
    """Notes a judged group and returns where its question stands."""

  def metrics(self) -> dict[str, float]:
    """Returns how much is remembered, as `memory/...`."""

  def state(self) -> Any:
    """Returns all of it, JSON-able; later visits do not show in it."""

  def restore(self, state: Any) -> None:
    """Goes on from a state."""


def none() -> None:
  """Remembers nothing."""


class Known(NamedTuple):
  """What is kept of a question beside its solutions."""

  prompt: int  # a checksum
  pass_rate: float
  visits: int


class Solution(NamedTuple):
  """A success that is kept."""

  text: str  # without its thinking block
  reward: float
  visit: int  # of its question, counted from 1


class Questions:
  """Remembers every question by its id.

  alpha: the share of the past in the pass rate.
  solutions: the most that are kept of a question.
  replace: "reward" | "oldest", what a new success does where as many are kept.
  megabytes: the most that all their texts take, in 10^6 bytes of UTF-8; beyond it the question that
    was visited longest ago loses its own.
  """

  def __init__(
    self,
    success_threshold: float = 0.5,
    *,
    alpha: float = 0.7,
    solutions: int = 3,
    replace: str = "reward",
    megabytes: float = 300.0,
  ):
    if replace not in ("oldest", "reward"):
      raise ValueError(unknown("method.memory.replace", replace, ("oldest", "reward")))
    for name, value in (("alpha", alpha), ("solutions", solutions), ("megabytes", megabytes)):
      ranges.check(f"method.memory.{name}", value)
    self._success_threshold = success_threshold
    self._alpha, self._most, self._replace = alpha, solutions, replace
    self._most_bytes = megabytes * 1e6
    # Entries are never changed, only replaced: so a copy of these two is a state.
    self._known: dict[str, Known] = {}
    self._solutions: dict[str, tuple[Solution, ...]] = {}  # the question visited last comes last
    self._bytes = 0

  def visit(self, group: list[Rollout]) -> Standing:
    task = group[0].task
    known = self._known.get(task.id) or Known(_checksum(task), 0.0, 0)
    earlier = self._solutions.get(task.id, ())
    if _is_mistaken(task, known.prompt):
      raise RunError(_mistake(task))
    judged = [r for r in group if r.is_judged]
    if judged:
      successes = [r for r in judged if r.feedback.reward >= self._success_threshold]
      known = self._after(known, len(successes) / len(judged))
      self._known[task.id] = known
      self._keep(task.id, self._with(earlier, successes, known.visits))
    return Standing(known.pass_rate, known.visits, tuple(s.text for s in earlier))

  def metrics(self) -> dict[str, float]:
    return {
      "memory/questions": float(len(self._known)),
      "memory/solutions": float(sum(map(len, self._solutions.values()))),
      "memory/megabytes": self._bytes / 1e6,
    }

  def state(self) -> dict:
    return {"known": list(self._known.items()), "solutions": list(self._solutions.items())}

  def restore(self, state: dict) -> None:
    self._known = {task_id: Known(*known) for task_id, known in state["known"]}
    self._solutions = {
      task_id: tuple(Solution(*s) for s in solutions) for task_id, solutions in state["solutions"]
    }
    self._bytes = sum(map(_bytes, self._solutions.values()))

  def _after(self, known: Known, pass_rate: float) -> Known:
    """What is known of a question after a visit with this share of successes."""
    if known.visits:
      pass_rate = self._alpha * known.pass_rate + (1.0 - self._alpha) * pass_rate
    return known._replace(pass_rate=pass_rate, visits=known.visits + 1)

  def _with(
    self, kept: tuple[Solution, ...], successes: list[Rollout], visit: int
  ) -> tuple[Solution, ...]:
    """The solutions of a question with those successes of a visit that find a place."""
    solutions = list(kept)  # the one kept longest comes first
    for rollout in successes:
      new = Solution(without_thinking(rollout.text), float(rollout.feedback.reward), visit)
      if not new.text or any(new.text == s.text for s in solutions):
        continue
      if len(solutions) == self._most:
        leaving = self._leaving(solutions, new)
        if leaving is None:
          continue
        solutions.remove(leaving)
      solutions.append(new)
    return tuple(solutions)

  def _leaving(self, solutions: list[Solution], new: Solution) -> Solution | None:
    """The solution whose place a new one takes; None: it finds no place."""
    if not solutions or self._replace == "oldest":
      return next(iter(solutions), None)
    lowest = min(solutions, key=lambda s: s.reward)
    return lowest if new.reward > lowest.reward else None

  def _keep(self, task_id: str, solutions: tuple[Solution, ...]) -> None:
    """Puts the solutions of the question that was visited last in their place."""
    self._bytes += _bytes(solutions) - _bytes(self._solutions.pop(task_id, ()))
    if solutions:
      self._solutions[task_id] = solutions
    while self._bytes > self._most_bytes:
      longest_ago = next(iter(self._solutions))
      self._bytes -= _bytes(self._solutions.pop(longest_ago))


def check_ids(tasks: Iterable[Task]) -> None:
  """Raises ValueError for a question without an id, and for two with one id."""
  prompts: dict[str, int] = {}
  for task in tasks:
    if _is_mistaken(task, prompts.setdefault(task.id, _checksum(task))):
      raise ValueError(_mistake(task))


def _is_mistaken(task: Task, prompt: int) -> bool:
  """Tells whether an id does not tell which question it is. prompt: that of the same id."""
  return not task.id or prompt != _checksum(task)


def _mistake(task: Task) -> str:
  return (
    f"config.method.memory tells questions by Task.id, and {task.id!r} is that of "
    f"{'two' if task.id else 'none'}, {task.prompt[:80]!r} for one: "
    "the environment must give each an id of its own"
  )


def _checksum(task: Task) -> int:
  return zlib.crc32(f"{task.system}\n{task.prompt}".encode(errors="replace"))


def _bytes(solutions: tuple[Solution, ...]) -> int:
  return sum(len(s.text.encode(errors="replace")) for s in solutions)


MEMORIES = {"none": none, "questions": Questions}
