"""Runs the engine for requests of many clients, which share its batch; and scores texts.

One thread reads completions from the engine, whose queue stays open. Another one scores. Whoever
asks gets a future, and may go away: nothing waits for him.
"""

import concurrent.futures
import itertools
import logging
import threading
from typing import Any, Callable

from sdpo_jax.engine.requests import RequestQueue
from sdpo_jax.engine.scoring import TextScorer, TextScores
from sdpo_jax.records import Completion, Request, Sampling

_log = logging.getLogger(__name__)


class Stopped(Exception):
  """The worker ends, or has ended, before this request was answered."""


class _OpenQueue(RequestQueue):
  """A queue that stays open, and can be left behind between two chunks of decoding."""

  def __init__(self):
    super().__init__(is_open=True)
    self._is_left = threading.Event()

  def leave(self) -> None:
    """Makes the engine end at once, whatever it is doing for others."""
    self._is_left.set()
    self.close()

  def check(self) -> None:
    """Raises Stopped once the queue is left."""
    if self._is_left.is_set():
      raise Stopped("the server was asked to stop")

  def take_dropped(self) -> list[tuple]:
    self.check()  # the engine asks before every chunk
    return super().take_dropped()


class Worker:
  """Answers requests from any thread, between `start` and `close`."""

  def __init__(self, engine, scorer: TextScorer, on_failure: Callable[[], None] = lambda: None):
    """Takes an engine that goes by arrival and a scorer, both with their weights.

    on_failure: called, in the engine's thread, when the engine has failed; nothing is sampled any
      more then.
    """
    self._engine, self._scorer, self._on_failure = engine, scorer, on_failure
    self._queue = _OpenQueue()
    self._keys = itertools.count()
    self._lock = threading.Lock()
    # key -> (future, completions that are missing, those that are there by sample)
    self._asked: dict[int, tuple[concurrent.futures.Future, dict[int, Completion], int]] = {}
    self._scoring = concurrent.futures.ThreadPoolExecutor(1, "scoring")
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self.end: BaseException | None = None  # why nothing is sampled any more

  def start(self) -> None:
    """Starts the engine's thread."""
    self._thread.start()

  def sample(
    self, prompt: list[int], n: int, sampling: Sampling, seed: int
  ) -> concurrent.futures.Future[list[Completion]]:
    """Returns a future of n completions, in the order of their samples."""
    future: concurrent.futures.Future = concurrent.futures.Future()
    # from now on nobody can cancel it: a result would find a cancelled future, and fail
    future.set_running_or_notify_cancel()
    with self._lock:
      if self.end is not None:
        future.set_exception(self.end)
        return future
      key = next(self._keys)
      self._asked[key] = future, {}, n
      self._queue.add(Request(key, prompt, n, sampling, seed))
    return future

  def score(self, tokens: list[int], **what: Any) -> concurrent.futures.Future[TextScores]:
    """Returns a future of a text's scores; `what` is as for `TextScorer.score`."""
    return self._scoring.submit(self._score, tokens, what)

  def _score(self, tokens: list[int], what: dict[str, Any]) -> TextScores:
    self._queue.check()
    return self._scorer.score(tokens, **what)

  def leave(self) -> None:
    """Begins to end: whoever waits, or asks from now on, gets Stopped."""
    self._queue.leave()

  def close(self) -> None:
    """Ends both threads."""
    self.leave()
    self._scoring.shutdown(wait=True)
    self._thread.join()

  def _run(self) -> None:
    try:
      for completion in self._engine.generate(self._queue):
        self._queue.answer(completion, None)
        self._hand_over(completion)
      self._queue.check()  # it ends for no other reason
    except Stopped as stop:
      self._give_up(stop)
    except Exception as error:  # whatever it is, those who wait must hear of it
      _log.exception("the engine has failed")
      self._give_up(error)
      self._on_failure()

  def _hand_over(self, completion: Completion) -> None:
    with self._lock:
      future, done, n = self._asked[completion.key]
      done[completion.sample_index] = completion
      if len(done) < n:
        return
      del self._asked[completion.key]
    future.set_result([done[s] for s in range(n)])

  def _give_up(self, error: BaseException) -> None:
    with self._lock:
      self.end = error
      left, self._asked = list(self._asked.values()), {}
    for future, *_ in left:
      future.set_exception(error)
