"""Collects rollouts: tasks go to the engine, responses to the judge, groups of Rollout come back.

A response is judged as it finishes, and a group that is judged is handed on, both while others are
still being sampled.
"""

from collections.abc import Callable
import concurrent.futures
import contextlib
import functools
import threading
import time
import zlib

import jax

from sdpo_jax import hosts
from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import TaskError
from sdpo_jax.judging import Judges, busy_s
from sdpo_jax.records import Completion, Feedback, Request, Rollout, Sampling, Status, Task

_TIMES = ("time/judge_hidden_s", "time/pack_hidden_s", "time/judge_wait_s")
Place = tuple[int, int]  # a response: (question, its number)


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


class Source:
  """Where judged groups come from, and how it is dealt with meanwhile."""

  def __init__(self, check_stop: Callable[[], None]):
    """check_stop: called between phases; it may raise."""
    self.check_stop = check_stop
    self._hand_on: Callable[[list[Rollout]], None] | None = None

  @contextlib.contextmanager
  def handing_on(self, hand_on: Callable[[list[Rollout]], None] | None):
    """Has a function called meanwhile with each group that is judged, in whatever thread.

    On several processes a Collector leaves out those that others have sampled, and everywhere a
    group of which one response was not judged in time.
    """
    self._hand_on = hand_on
    try:
      yield
    finally:
      self._hand_on = None

  @contextlib.contextmanager
  def undisturbed(self):
    """Asks nobody meanwhile whether to stop: what is begun is finished."""
    check_stop, self.check_stop = self.check_stop, lambda: None
    try:
      yield
    finally:
      self.check_stop = check_stop


class Collector(Source):
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
    super().__init__(check_stop)
    self.env, self.chat, self.engine = env, chat, engine
    self.max_prompt_tokens = max_prompt_tokens
    self._judges = Judges(env, threads=judge_threads, timeout_s=judge_timeout_s)
    self._by_teacher = False  # the prompts were rendered for the teacher
    self._times = dict.fromkeys(_TIMES, 0.0)

  def close(self) -> None:
    """Ends the judging threads."""
    self._judges.close()

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
    prompts: the ids of each task's prompt, as long as their maker allows; None: the environment's
      messages.
    Raises TaskError for messages that are too long.
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
    batch = _Batch(tasks, prompts, n, self._hand_on)

    def judge(c: Completion) -> None:
      c = _joined(begun, c)
      text = self.chat.response_text(c.tokens, teacher=self._by_teacher)
      then = functools.partial(batch.add, c, text)
      judgement = self._judges.submit(tasks[c.key], text, c, then=then)
      batch.judgements[c.key, c.sample_index] = judgement

    self.engine.load(params, version)
    completions = sample(self.engine, requests, then=judge)
    self.engine.unload()
    self._check_stop_of(batch)
    ended = time.monotonic()
    own = {
      place: self._judges.feedback(tasks[place[0]], judgement)
      for place, judgement in batch.judgements.items()
    }
    feedback = _shared(own)
    self._note_times(batch, ended)
    self.check_stop()
    groups: list[list[Rollout]] = [[] for _ in tasks]
    for completion in completions:
      c = _joined(begun, completion)
      text = self.chat.response_text(c.tokens, teacher=self._by_teacher)
      groups[c.key].append(batch.rollout(c, feedback[c.key, c.sample_index], text))
    return groups

  @contextlib.contextmanager
  def read_by_teacher(self, by_teacher: bool = True):
    """Reads what is sampled meanwhile as answers to prompts that were rendered for the teacher."""
    before, self._by_teacher = self._by_teacher, by_teacher
    try:
      yield
    finally:
      self._by_teacher = before

  def take_times(self) -> dict[str, float]:
    """Returns the metrics of what went on beside sampling since the last call.

    time/judge_hidden_s: while responses were still sampled, some judge was at work.
    time/pack_hidden_s: while responses were still sampled, a group was being handed on.
    time/judge_wait_s: from the end of sampling to the last verdict.
    """
    times, self._times = self._times, dict.fromkeys(_TIMES, 0.0)
    return times

  def _note_times(self, batch: "_Batch", ended: float) -> None:
    """Adds up the times of a batch whose sampling has ended at a time of the clock."""
    self._times["time/judge_wait_s"] += time.monotonic() - ended
    self._times["time/judge_hidden_s"] += busy_s(self._judges.take_busy(), ended)
    self._times["time/pack_hidden_s"] += busy_s(batch.busy, ended)

  def _check_stop_of(self, batch: "_Batch") -> None:
    """Calls check_stop; if that raises, no response is judged any more."""
    try:
      self.check_stop()
    except BaseException:
      for judgement in batch.judgements.values():
        judgement.cancel()
      raise

  def _check_lengths(self, tasks: list[Task], prompts: list[list[int]]) -> None:
    for task, prompt in zip(tasks, prompts, strict=True):
      if len(prompt) > self.max_prompt_tokens:
        raise TaskError(
          f"the prompt of task {task.id} takes {len(prompt)} tokens, "
          f"more than config.data.max_prompt_tokens={self.max_prompt_tokens}"
        )


class _Batch:
  """The responses of this process, from their end to their verdict."""

  def __init__(self, tasks, prompts, n: int, hand_on: Callable[[list[Rollout]], None] | None):
    self._tasks, self._prompts, self._n, self._hand_on = tasks, prompts, n, hand_on
    self.judgements: dict[Place, concurrent.futures.Future] = {}
    self.busy: list[tuple[float, float]] = []  # when groups were handed on
    self._judged: dict[Place, Rollout] = {}
    self._lock = threading.Lock()

  def add(self, c: Completion, text: str, feedback: Feedback) -> None:
    """Adds a judged response, in a judge's thread, and hands its group on with the last one."""
    q = c.key
    rollout = Rollout.of(self._tasks[q], self._prompts[q], c, text, feedback)
    with self._lock:
      self._judged[q, c.sample_index] = rollout
      group = [self._judged.get((q, g)) for g in range(self._n)]
    if all(group) and self._hand_on is not None:
      begun = time.monotonic()
      with contextlib.suppress(Exception):  # what it stumbles over is met again in the main thread
        self._hand_on(group)
      self.busy.append((begun, time.monotonic()))

  def rollout(self, c: Completion, feedback: Feedback, text: str) -> Rollout:
    """Returns a response with its feedback: the same object that was handed on, if it was."""
    known = self._judged.get((c.key, c.sample_index))
    if known is not None and known.feedback == feedback:
      return known
    return Rollout.of(self._tasks[c.key], self._prompts[c.key], c, text, feedback)


def _joined(begun: list[tuple[list[int], list[float]]], c: Completion) -> Completion:
  """Returns a completion with the tokens that its response began with."""
  head, logp = begun[c.key]
  return c._replace(tokens=head + c.tokens, logp=logp + c.logp) if head else c


def _shared(own: dict[Place, Feedback]) -> dict[Place, Feedback]:
  """Returns the feedback of all processes."""
  told = [[q, g, f.reward, f.text, f.status.value] for (q, g), f in own.items()]  # JSON-able
  return {
    (q, g): Feedback(reward, text, Status(status))
    for judged in hosts.share(told)
    for q, g, reward, text, status in judged
  }
