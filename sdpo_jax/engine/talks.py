"""What is asked of servers: samples in the order of their requests, and whose turn each one is.

A request whose prompt begins with an earlier prompt and its completion is the next turn of that
conversation. All samples of a request belong to one.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
from typing import Any, NamedTuple

from sdpo_jax.engine.requests import RequestQueue
from sdpo_jax.records import Completion, Request


@dataclasses.dataclass(eq=False)
class Talk:
  """A conversation."""

  id: str
  server: Any = None  # that has its texts in the cache; None: it has just begun


class Job(NamedTuple):
  """One sample that is asked for."""

  request: Request
  sample_index: int
  talk: Talk


class Jobs:
  """Cuts requests into samples, and tells conversations apart."""

  def __init__(
    self,
    requests: Iterable[Request] | RequestQueue,
    *,
    names: Iterator[str],
    wake: Callable[[], None],
  ):
    """Keeps the requests.

    Args:
      requests: as for an engine's `generate`.
      names: of conversations, each of which is new.
      wake: called from any thread after a `RequestQueue` has changed.
    """
    self._queue: RequestQueue | None = None
    self._listed: Iterator[Request] = iter(())
    if isinstance(requests, RequestQueue):
      self._queue = requests
      requests.listen(wake)
    else:
      self._listed = iter(requests)
    self._names = names
    self._next: Job | None = None
    self._open: dict[
      tuple, tuple[list[int], Talk]
    ] = {}  # (key, sample) -> what may be gone on with

  def take(self) -> Job | None:
    """Returns the next sample to ask for; None: there is none now."""
    self._look()
    job = self._next
    if job is not None:
      is_last = job.sample_index + 1 >= job.request.n
      self._next = None if is_last else job._replace(sample_index=job.sample_index + 1)
    return job

  def wait(self) -> bool:
    """Waits for a request; False: none will come. Called when no sample is being asked for."""
    if self._queue is None:
      return False
    self._queue.wait(for_all=False)
    self._look()
    return self._next is not None

  def hand_out(self, job: Job, completion: Completion) -> None:
    """Notes that a completion is about to be handed out."""
    if self._queue is not None:
      place = completion.key, completion.sample_index
      self._open[place] = job.request.prompt + completion.tokens, job.talk
      self._queue.hand_out(completion)

  def _look(self) -> None:
    """Sees which request is next, if one is there."""
    if self._next is not None:
      return
    if self._queue is None:
      request = next(self._listed, None)
    else:
      for place in self._queue.take_dropped():
        self._open.pop(place, None)
      request = self._queue.take()
    if request is not None:
      # a copy: the caller may go on with its own
      request = request._replace(prompt=list(request.prompt))
      self._next = Job(request, 0, self._talk_of(request.prompt))

  def _talk_of(self, prompt: list[int]) -> Talk:
    """Returns the conversation that a prompt goes on with, or a new one."""
    fitting = [
      (len(text), place)
      for place, (text, _) in self._open.items()
      if len(text) < len(prompt) and prompt[: len(text)] == text
    ]
    if fitting:
      _, place = max(fitting, key=lambda entry: entry[0])
      return self._open.pop(place)[1]
    return Talk(next(self._names))
