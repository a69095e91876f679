"""Collects rollouts: tasks go to the engine, responses to the judge, groups of Rollout come back.

Judging runs in threads: each waits for a sandboxed process, none computes. It starts as each
response finishes, while others are still being sampled.

A judge that raises, hangs or returns a reward that is not a number in [0, 1] costs its own response
only. That response becomes ENV_FAILED, is counted and never trained on. The text of a feedback is
cleaned and bounded here, once for every environment (`text.py`).

A judge sees text, not why it ended. The feedback on a response that ran into `max_new_tokens` is
therefore preceded by that fact, for every environment alike. An empty feedback stays empty.
"""

from collections.abc import Callable
import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import numbers
import queue
import threading
import time
import zlib

import jax

from sdpo_jax import hosts
from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import TaskError
from sdpo_jax.records import Completion, Feedback, Request, Rollout, Sampling, Segment, Status, Task
from sdpo_jax.text import MAX_CHARS, clean, cut


def prompt_seed(seed: int, *path) -> int:
  """Returns a seed (uint32) that depends on the run's seed and the path (step, task id) alone."""
  return zlib.crc32(repr((seed, *path)).encode())


def sample(
  engine, requests: list[Request], *, then: Callable[[Completion], None] = lambda completion: None
) -> list[Completion]:
  """Returns the completions of all requests, in their order; every process calls it alike.

  Each process samples a share of the requests on its own devices, or process 0 asks servers for
  all. Only ids and what is known of them travel. then: called with each completion of this process
  as it ends, while others are being sampled.
  """
  processes = jax.process_count() if engine.samples_alone else 1
  shares = [list(range(p, len(requests), processes)) for p in range(processes)]
  shares += [[] for _ in range(processes, jax.process_count())]
  asked = [requests[r]._replace(key=r) for r in shares[jax.process_index()]]
  has_beams = bool(requests) and requests[0].sampling.beams > 0
  own = []
  for completion in (engine.search if has_beams else engine.generate)(asked):
    own.append(completion)
    then(completion._replace(key=requests[completion.key].key))
  done = [Completion(*fields) for share in hosts.share(own) for fields in share]
  done.sort(key=lambda c: (c.key, c.sample_index))
  return [c._replace(key=requests[c.key].key) for c in done]


class Collector:
  """Samples responses and has them judged. A run has one; `close` ends its threads."""

  def __init__(
    self,
    env,
    chat: Chat,
    engine,
    *,
    max_prompt_tokens: int,
    judge_threads: int,
    judge_timeout_s: float,
    check_stop: Callable[[], None] = lambda: None,
  ):
    """check_stop: called between sampling and judging and after both; it may raise."""
    self.env, self.chat, self.engine = env, chat, engine
    self.check_stop = check_stop
    self.max_prompt_tokens = max_prompt_tokens
    self.judge_timeout_s = judge_timeout_s
    self._judge_threads = judge_threads
    self._waiting = queue.SimpleQueue()  # of (future, arguments of _judge); None ends a thread
    self._alive = 0  # threads that take from it
    self._is_closed = False
    self._judged: list[tuple[float, float]] = []  # begin and end of each judging, in seconds
    self._judge_hidden_s = self._judge_wait_s = 0.0

  def close(self) -> None:
    """Ends the waiting threads. One that hangs in a judge is a daemon and ends with the process."""
    self._is_closed = True
    for _ in range(self._alive):
      self._waiting.put(None)
    self._alive = 0

  def collect(
    self,
    params,
    tasks: list[Task],
    *,
    n: int,
    sampling: Sampling,
    seeds: list[int],
    begun: list[tuple[list[int], list[float]]] | None = None,
    version: int = 0,
    prompts: list[list[int]] | None = None,
  ) -> list[list[Rollout]]:
    """Returns n judged rollouts of each task, as groups[q][g].

    seeds: one a task.
    begun[q]: tokens, with their log-probabilities, that all responses to task q begin with; their
      entropy is nobody's, so that `sampling` asks for none then.
    version: of the weights.
    prompts: the ids of each task's prompt, for conversations; None: the environment's messages.
    Raises TaskError for a prompt that is too long.
    """
    if prompts is None:
      prompts = [self.chat.prompt_tokens(self.env.prompt(task)) for task in tasks]
    self._check_lengths(tasks, prompts)
    assert not (begun and sampling.entropy), "a response would have the entropy of its end alone"
    begun = begun or [([], [])] * len(tasks)
    requests = [
      Request(q, prompt + head, n, sampling, seed)
      for q, (prompt, (head, _), seed) in enumerate(zip(prompts, begun, seeds, strict=True))
    ]
    judgements: dict[tuple[int, int], concurrent.futures.Future] = {}  # those of this process

    def whole(c: Completion) -> Completion:
      head, logp = begun[c.key]
      return c._replace(tokens=head + c.tokens, logp=logp + c.logp)

    def begin_judging(c: Completion) -> None:
      text = self.chat.response_text(whole(c).tokens)
      judgements[c.key, c.sample_index] = self._submit(tasks[c.key], text, whole(c))

    self.engine.load(params, version)
    completions = sample(self.engine, requests, then=begin_judging)
    self.engine.unload()
    self._check_stop_of(judgements)
    ended = time.monotonic()
    feedback = self._await_feedback(tasks, judgements)
    self._judge_wait_s += time.monotonic() - ended
    self._judge_hidden_s += busy_s(self._judged, ended)
    self._judged = []
    self.check_stop()
    groups: list[list[Rollout]] = [[] for _ in tasks]
    for c in completions:
      q, g = c.key, c.sample_index
      groups[q].append(self._rollout(tasks[q], prompts[q], whole(c), feedback[q, g]))
    return groups

  def _rollout(self, task: Task, prompt: list[int], c: Completion, feedback: Feedback) -> Rollout:
    return Rollout(
      task,
      prompt,
      list(c.tokens),
      list(c.logp),
      c.finish_reason,
      self.chat.response_text(c.tokens),
      feedback,
      entropy=c.entropy,
      sampled=[Segment(0, c)],
    )

  @contextlib.contextmanager
  def undisturbed(self):
    """Asks nobody meanwhile whether to stop: what is begun is finished."""
    check_stop, self.check_stop = self.check_stop, lambda: None
    try:
      yield
    finally:
      self.check_stop = check_stop

  def take_judge_times(self) -> dict[str, float]:
    """Returns the metrics of judging since the last call.

    time/judge_hidden_s: while responses were still sampled, some judge was at work.
    time/judge_wait_s: from the end of sampling to the last verdict.
    """
    hidden, wait = self._judge_hidden_s, self._judge_wait_s
    self._judge_hidden_s = self._judge_wait_s = 0.0
    return {"time/judge_hidden_s": hidden, "time/judge_wait_s": wait}

  def _check_stop_of(self, judgements: dict[tuple[int, int], concurrent.futures.Future]) -> None:
    """Calls check_stop; if that raises, no response is judged any more."""
    try:
      self.check_stop()
    except BaseException:
      for judgement in judgements.values():
        judgement.cancel()
      raise

  def _check_lengths(self, tasks: list[Task], prompts: list[list[int]]) -> None:
    for task, prompt in zip(tasks, prompts, strict=True):
      if len(prompt) > self.max_prompt_tokens:
        raise TaskError(
          f"the prompt of task {task.id} takes {len(prompt)} tokens, "
          f"more than config.data.max_prompt_tokens={self.max_prompt_tokens}"
        )

  def _await_feedback(
    self, tasks: list[Task], judgements: dict[tuple[int, int], concurrent.futures.Future]
  ) -> dict[tuple[int, int], Feedback]:
    """Returns the feedback on all responses, those that other processes judged included."""
    own = []
    for (q, g), judgement in judgements.items():
      f = self._await_one(tasks[q], judgement)
      own.append([q, g, f.reward, f.text, f.status.value])  # JSON-able
    return {
      (q, g): Feedback(reward, text, Status(status))
      for judged in hosts.share(own)
      for q, g, reward, text, status in judged
    }

  def _await_one(self, task: Task, judgement: concurrent.futures.Future) -> Feedback:
    try:
      return judgement.result(timeout=self.judge_timeout_s)
    except concurrent.futures.TimeoutError:
      logging.error("judging a response to %s took more than %g s", task.id, self.judge_timeout_s)
      if not judgement.cancel():  # a thread hangs in it: another takes its place
        self._alive -= 1
      return Feedback(0.0, "the judge did not answer in time", Status.ENV_FAILED)

  def _submit(self, *job) -> concurrent.futures.Future:
    """Queues a job, the arguments of _judge, and sees that all threads run."""
    while self._alive < self._judge_threads:
      threading.Thread(target=self._work, name="judge", daemon=True).start()
      self._alive += 1
    future = concurrent.futures.Future()
    self._waiting.put((future, job))
    return future

  def _work(self) -> None:
    """Judges what is queued, until the queue gives None."""
    while (item := self._waiting.get()) is not None:
      future, job = item
      if future.set_running_or_notify_cancel():
        begun = time.monotonic()
        feedback = self._judge(*job)
        self._judged.append((begun, time.monotonic()))
        future.set_result(feedback)

  def _judge(self, task: Task, text: str, completion: Completion) -> Feedback:
    """Returns the environment's feedback as the rest of the run may read it."""
    try:
      feedback = self.env.judge(task, text)
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
