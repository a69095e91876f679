"""A queue of requests that grows while their completions are read: conversations.

  queue = RequestQueue(first_requests)
  for completion in engine.generate(queue):
    ...                                      # judge it, and say what comes next:
    queue.answer(completion, next_request)   # its prompt: the earlier one, the completion, and more
    queue.answer(completion, None)           # or nothing

Every completion is answered once, from any thread, at any time. The engine ends when no request
waits, nothing is sampled and no answer is missing.

A queue that is open takes new requests from any thread until it is closed, and the engine goes on
so long: this is how a server feeds one. It is for an engine that goes by arrival
(`deterministic=False`); one that does not would begin when the queue is closed.
"""

from collections.abc import Callable, Iterable
import heapq
import math
import threading
import time

from sdpo_jax.records import Completion, Request

LOOK_S = 0.5  # between two looks at whether an engine that waits is interrupted


def check(request: Request, vocab: int, *, has_text: bool, searches: bool = False) -> None:
  """Raises ValueError for a request that the engine cannot answer.

  searches: whether beams may be asked for.
  """
  sampling, prompt = request.sampling, request.prompt
  named = (*prompt, *sampling.banned_tokens, *(token for token, _ in sampling.logit_bias), 0)
  problems = {
    "an empty prompt": not prompt,
    f"a token that is not in [0, {vocab})": not 0 <= min(named) <= max(named) < vocab,
    f"n={request.n}": request.n < 1,
    f"max_new_tokens={sampling.max_new_tokens}": sampling.max_new_tokens < 1,
    f"temperature={sampling.temperature}": not 0 <= sampling.temperature < math.inf,
    f"top_p={sampling.top_p}": not 0 < sampling.top_p <= 1,
    f"min_p={sampling.min_p}": not 0 <= sampling.min_p <= 1,
    f"top_k={sampling.top_k}": sampling.top_k < 0,
    "a bias that is not finite": not all(math.isfinite(x) for _, x in sampling.logit_bias),
    f"beams={sampling.beams}, which `search` reads": sampling.beams != 0 and not searches,
    "an empty stop string": "" in sampling.stop_strings,
    "stop strings, and the engine has no text_of": bool(sampling.stop_strings) and not has_text,
    "every token banned": len(set(sampling.banned_tokens)) >= vocab,
  }
  for problem, is_there in problems.items():
    if is_there:
      raise ValueError(f"request {request.key!r} has {problem}")


class RequestQueue:
  """Hands requests to an engine in order: an answer has the place of its completion."""

  def __init__(self, requests: Iterable[Request] = (), *, is_open: bool = False):
    self._is_open = is_open
    self._waiting = [(number, request) for number, request in enumerate(requests)]  # a heap
    self._next = len(self._waiting)
    self._unanswered: dict[tuple, int] = {}  # (key, sample) -> its place
    self._dropped: list[tuple] = []
    self._changed = threading.Condition()
    self._listeners: list[Callable[[], None]] = []
    self.waited_s = 0.0  # in `wait`: an engine had nothing to do

  def answer(self, completion: Completion, request: Request | None) -> None:
    """Says what follows a completion: a request, or nothing.

    Raises ValueError for a completion that awaits no answer.
    """
    place = completion.key, completion.sample_index
    with self._changed:
      if place not in self._unanswered:
        raise ValueError(f"completion {place} awaits no answer: it was answered, or never sampled")
      number = self._unanswered.pop(place)
      if request is None:
        self._dropped.append(place)
      else:
        heapq.heappush(self._waiting, (number, request))
      self._changed.notify_all()
    for listener in self._listeners:
      listener()

  def add(self, request: Request) -> None:
    """Adds a request behind all that are there. Raises ValueError once the queue is closed."""
    with self._changed:
      if not self._is_open:
        raise ValueError("this queue is closed: it takes answers alone")
      heapq.heappush(self._waiting, (self._next, request))
      self._next += 1
      self._changed.notify_all()

  def close(self) -> None:
    """Takes no more new requests: the engine ends when it has done what is there."""
    with self._changed:
      self._is_open = False
      self._changed.notify_all()

  # ---- what an engine asks

  def listen(self, listener: Callable[[], None]) -> None:
    """Has a function called after each answer, for an engine that waits for other things too."""
    self._listeners.append(listener)

  def hand_out(self, completion: Completion) -> None:
    """Notes that a completion is about to be handed out."""
    with self._changed:
      self._unanswered[completion.key, completion.sample_index] = self._next
      self._next += 1

  def take(self) -> Request | None:
    """Returns the next request that waits, if one does."""
    with self._changed:
      return heapq.heappop(self._waiting)[1] if self._waiting else None

  def take_dropped(self) -> list[tuple]:
    """Returns (key, sample) of the completions that nothing follows, since the last call."""
    with self._changed:
      dropped, self._dropped = self._dropped, []
      return dropped

  def wait(self, *, for_all: bool, is_interrupted: Callable[[], bool] = lambda: False) -> None:
    """Returns when a request waits or nothing can come; for_all: only when nothing can come.

    What can come are answers that are missing, and new requests while the queue is open.
    is_interrupted: is asked now and then, and ends the waiting when it says so.
    """
    begun = time.monotonic()
    with self._changed:
      while (self._unanswered or self._is_open) and (for_all or not self._waiting):
        if is_interrupted():
          break
        self._changed.wait(LOOK_S)
      self.waited_s += time.monotonic() - begun
