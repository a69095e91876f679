"""Judges responses in threads: each waits for a sandboxed process, none computes.

A judge that raises, hangs or returns a reward that is not a number in [0, 1] costs its own response
only. That response becomes ENV_FAILED, is counted and never trained on. The text of a feedback is
cleaned and bounded here, once for every environment (`text.py`).

A judge sees text, not why it ended. The feedback on a response that ran into `max_new_tokens` is
therefore preceded by that fact, for every environment alike. An empty feedback stays empty.
"""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import logging
import math
import numbers
import queue
import threading
import time

from sdpo_jax.records import Completion, Feedback, Status, Task
from sdpo_jax.text import MAX_CHARS, clean, cut


class Judges:
  """Threads that judge with one environment, in the order of `submit`. `close` ends them."""

  def __init__(self, env, *, threads: int, timeout_s: float):
    """timeout_s: how long `feedback` waits for one verdict."""
    self._env = env
    self._threads = threads
    self._timeout_s = timeout_s
    # of (future, then, arguments of _judge); None ends a thread
    self._waiting: queue.SimpleQueue = queue.SimpleQueue()
    self._alive = 0  # threads that take from it
    self._is_closed = False
    self._busy: list[tuple[float, float]] = []  # begin and end of each judging, in seconds

  def submit(
    self,
    task: Task,
    text: str,
    completion: Completion,
    *,
    then: Callable[[Feedback], None] = lambda feedback: None,
  ) -> concurrent.futures.Future:
    """Queues a response, and sees that all threads run. The future has its Feedback.

    then: called with the feedback in the judge's thread, before the future has it; raises nothing.
    """
    while self._alive < self._threads:
      threading.Thread(target=self._work, name="judge", daemon=True).start()
      self._alive += 1
    future = concurrent.futures.Future()
    self._waiting.put((future, then, (task, text, completion)))
    return future

  def feedback(self, task: Task, judgement: concurrent.futures.Future) -> Feedback:
    """Waits for the feedback on a response; ENV_FAILED where it does not come in time."""
    try:
      return judgement.result(timeout=self._timeout_s)
    except concurrent.futures.TimeoutError:
      logging.error("judging a response to %s took more than %g s", task.id, self._timeout_s)
      if not judgement.cancel():  # a thread hangs in it: another takes its place
        self._alive -= 1
      return Feedback(0.0, "the judge did not answer in time", Status.ENV_FAILED)

  def take_busy(self) -> list[tuple[float, float]]:
    """Returns when a thread was at work since the last call, as (begin, end) of the clock."""
    busy, self._busy = self._busy, []
    return busy

  def close(self) -> None:
    """Ends the waiting threads. One that hangs in a judge is a daemon and ends with the process."""
    self._is_closed = True
    for _ in range(self._alive):
      self._waiting.put(None)
    self._alive = 0

  def _work(self) -> None:
    """Judges what is queued, until the queue gives None."""
    while (item := self._waiting.get()) is not None:
      future, then, job = item
      if future.set_running_or_notify_cancel():
        begun = time.monotonic()
        feedback = self._judge(*job)
        self._busy.append((begun, time.monotonic()))
        then(feedback)
        future.set_result(feedback)

  def _judge(self, task: Task, text: str, completion: Completion) -> Feedback:
    """Returns the environment's feedback as the rest of the run may read it."""
    try:
      feedback = self._env.judge(task, text)
      _check(feedback)
    except Exception as error:  # whatever a judge throws, the run goes on without this row
      if not self._is_closed:  # else nobody waits for it, and the sandbox is gone
        logging.exception("judging a response to %s failed", task.id)
      return Feedback(0.0, f"{type(error).__name__}: {error}", Status.ENV_FAILED)
    message = cut(clean(feedback.text), MAX_CHARS)
    was_cut_off = completion.finish_reason == "length"
    if was_cut_off and message and feedback.status is not Status.ENV_FAILED:
      count = len(completion.tokens)
      message = f"The response was too long: it was cut off after {count} tokens.\n{message}"
    return dataclasses.replace(feedback, reward=float(feedback.reward), text=message)


def busy_s(spans: list[tuple[float, float]], until: float) -> float:
  """Returns the seconds before `until` that at least one span (begin, end) covers."""
  total, covered = 0.0, -math.inf
  for begin, end in sorted(spans):
    end = min(end, until)
    total += max(0.0, end - max(begin, covered))
    covered = max(covered, end)
  return total


def _check(feedback: Feedback) -> None:
  """Raises ValueError for a reward that is no number in [0, 1], or a text that is no str."""
  is_number = isinstance(feedback.reward, numbers.Real)
  if is_number and 0.0 <= feedback.reward <= 1.0 and isinstance(feedback.text, str):
    return
  raise ValueError(
    f"the judge returned reward {feedback.reward!r} and text {type(feedback.text).__name__}, "
    "not a number in [0, 1] and a str"
  )
