"""Plays episodes: the policy writes a turn, a world answers it, and so on to the end of either.

An episode is a conversation (`data/conversation.py`) whose messages a world says. An episode that
waits for its world takes no part in decoding, and what it has read stays in the engine's cache.
Each turn is a request of its own, with a seed that depends on the run's seed, the task, the
episode's number and the turn alone. With rows as turns each has a prompt of its own too
(`data/window.py`), which shows the last turns alone and is read anew.

Worlds may be few: an environment with `at_once` plays so many episodes together. Episode i is
played in lane i modulo their number, after those of its lane that come before it, so that what
shares a batch does not depend on which world is quicker.

How an episode ends (`Rollout.finish_reason`):

  done      The world says so.
  budget    What comes next, a turn as long as can be included, may not fit in
            config.rollout.max_episode_tokens: with rows as turns, the turns that its prompt shows
            and itself.
  lost      The world has raised, hung, or said what it may not say (`play.checked`). The episode is
            never trained on, and counted: its status is ENV_FAILED, as of a judge that fails.

A turn that is cut off at config.rollout.max_new_tokens is played as far as it goes and counts as
invalid: the end of turn that it lacks was not sampled.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import logging
import queue
import threading
import time
from typing import Any

import jax

from sdpo_jax import hosts
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.conversation import Continuation, Conversation
from sdpo_jax.data.window import WindowedConversation
from sdpo_jax.engine.requests import RequestQueue
from sdpo_jax.errors import SettingError, TaskError
from sdpo_jax.judging import busy_s
from sdpo_jax.play import Play, Room
from sdpo_jax.records import (
  Completion,
  Request,
  Rollout,
  Sampling,
  Task,
)
from sdpo_jax.rollout import Place, Source
from sdpo_jax.stored import restored, stored
from sdpo_jax.worlds import Lost, Worlds

_TIMES = ("time/worlds_hidden_s", "time/worlds_wait_s")


class Played:
  """An environment of episodes, with the first messages of its tasks at hand.

  They are those of an episode: reading them may start a process. So they are remembered.
  """

  KEPT = 4096

  def __init__(self, env):
    self.env = env
    self.at_once: int | None = getattr(env, "at_once", None)
    self._messages: dict[tuple[str, str], list[dict[str, str]]] = {}
    self._lock = threading.Lock()

  def __getattr__(self, name: str):
    return getattr(self.env, name)

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Returns what the policy reads before its first turn; the world says the same each time."""
    known = self._messages.get((task.split, task.id))
    if known is None:
      with contextlib.closing(self.env.start(task)) as episode:
        known = episode.prompt()
      self.remember(task, known)
    return known

  def remember(self, task: Task, messages: list[dict[str, str]]) -> None:
    """Keeps the first messages of a task."""
    with self._lock:
      while len(self._messages) >= self.KEPT:
        del self._messages[next(iter(self._messages))]
      self._messages[task.split, task.id] = messages


class Player(Source):
  """Plays episodes with an engine. A run has one, in place of a `rollout.Collector`."""

  def __init__(
    self,
    env: Played,
    chat: Chat,
    engine,
    room: Room,
    *,
    threads: int,
    timeout_s: float,
    check_stop: Callable[[], None] = lambda: None,
  ):
    """Keeps the settings; `close` ends what it starts.

    Args:
      env: starts the worlds.
      chat: of the policy.
      engine: samples; see `sdpo_jax.engine`.
      room: how much of an episode its prompts hold.
      threads: calls of worlds that are made at a time.
      timeout_s: of one call.
      check_stop: called before episodes are played and after them; it may raise.

    SettingError for a chat template that takes no conversation, or cannot go on with one that is
    one text.
    """
    super().__init__(check_stop)
    self.env, self.chat, self.engine, self.room = env, chat, engine, room
    self._continuation = Continuation(chat)
    if room.history is None:
      if self._continuation.glue is None:
        raise SettingError(f"{self._continuation.describe()}, and an episode is one text")
      if self._continuation.finding.way == "kept":
        logging.info("%s", self._continuation.describe())
    self._at_once = _share_of(env.at_once)
    self._worlds = Worlds(threads=threads, timeout_s=timeout_s)
    self._times = dict.fromkeys(_TIMES, 0.0)

  def close(self) -> None:
    """Ends the threads."""
    self._worlds.close()

  def conversation(self, messages: list[dict[str, str]]) -> Conversation | WindowedConversation:
    """Returns an episode that begins with these messages."""
    if self.room.history is None:
      return Conversation(self._continuation, messages)
    return WindowedConversation(self.chat, messages, self.room.history)

  def collect(
    self,
    params,
    tasks: list[Task],
    *,
    n: int,
    sampling: Sampling,
    seeds: list[int],
    version: int = 0,
  ) -> list[list[Rollout]]:
    """Plays n episodes of each task, and returns them as groups[q][g].

    seeds: one a task. version: of the weights. sampling: of one turn.
    Raises TaskError for first messages that are too long.
    """
    self.check_stop()
    processes = jax.process_count() if self.engine.samples_alone else 1
    plays = [
      Play(self, tasks[q], (q, g), sampling, seeds[q])
      for q in range(len(tasks))
      for g in range(n)
      if q % processes == jax.process_index()
    ]
    self.engine.load(params, version)
    try:
      self._play(plays)
    finally:
      self._close(plays)
    self.engine.unload()
    too_long = [play.too_long for play in plays if play.too_long]
    if any(hosts.share(bool(too_long))):
      raise too_long[0] if too_long else TaskError("another process has a task that is too long")
    self.check_stop()
    own = {play.place: play.rollout() for play in plays}
    groups = _shared(own, tasks, n)
    if self._hand_on is not None:
      for group in groups:
        self._hand_on(group)
    return groups

  def _play(self, plays: list[Play]) -> None:
    """Plays the episodes of this process to their ends."""
    self._worlds.take_busy()
    count = min(len(plays), self._at_once or len(plays))
    lanes = [iter(plays[lane::count]) for lane in range(count)]
    first: queue.SimpleQueue = queue.SimpleQueue()  # (lane, its first request or None)
    for number, lane in enumerate(lanes):
      self._begin(lane, functools.partial(_put, first, number))
    started = time.monotonic()
    begun = dict(first.get() for _ in lanes)
    waited_s = time.monotonic() - started
    lane_of: dict[Place, Iterator[Play]] = {}
    for lane in range(count):
      lane_of |= {play.place: lanes[lane] for play in plays[lane::count]}
    by_place = {play.place: play for play in plays}
    requests = RequestQueue(begun[lane] for lane in range(count) if begun[lane] is not None)
    for completion in self.engine.generate(requests):
      place = completion.key[:2]
      answer = functools.partial(requests.answer, completion)
      self._step(by_place[place], lane_of[place], completion, answer)
    ended = time.monotonic()
    waited_s += requests.waited_s
    self._times["time/worlds_wait_s"] += waited_s
    busy = busy_s(self._worlds.take_busy(), ended)
    self._times["time/worlds_hidden_s"] += max(0.0, busy - waited_s)

  def _begin(self, lane: Iterator[Play], answer: Callable[[Request | None], None]) -> None:
    """Starts the next episode of a lane, and answers with its first request; None: no more."""
    play = next((play for play in lane if not play.is_over), None)
    if play is None:
      answer(None)
      return
    self._call(f"starting {play.task.id}", play.start, play, lane, answer, play.begun)

  def _step(
    self,
    play: Play,
    lane: Iterator[Play],
    completion: Completion,
    answer: Callable[[Request | None], None],
  ) -> None:
    """Has the world answer a turn, and answers with what is sampled next in its lane."""
    step = functools.partial(play.step, play.said(completion))
    self._call(f"a turn of {play.task.id}", step, play, lane, answer, play.answered)

  def _call(self, what: str, function: Callable[[], Any], play: Play, *then) -> None:
    """Has a thread of the worlds call a function of an episode, and goes on with what it returns.

    then: the arguments of `_go_on` behind the episode.
    """
    play.is_busy = True
    go_on = functools.partial(self._go_on, play, *then)
    self._worlds.submit(what, function, go_on, late=play.close)

  def _go_on(
    self,
    play: Play,
    lane: Iterator[Play],
    answer: Callable[[Request | None], None],
    take: Callable[[Any], Request | None],
    found: Any,
  ) -> None:
    """Answers with what follows a call: a request, or after the episode's end the next one's."""
    play.is_busy = isinstance(found, Lost) and found.hangs
    try:
      request = None if play.is_over else take(found)
    except Exception as error:  # what a template or tokenizer makes of a world's words
      logging.exception("episode %s is lost", play.task.id)
      request = play.lose(Lost(f"{type(error).__name__}: {error}"))
    if request is not None:
      answer(request)
    elif play.is_busy:  # the thread that hangs in the world closes it
      self._begin(lane, answer)
    else:
      self._worlds.submit(
        f"closing {play.task.id}", play.close, lambda _: self._begin(lane, answer)
      )

  def _close(self, plays: list[Play]) -> None:
    """Closes the worlds that are open, where playing has been ended in the middle.

    A world that is in a call is closed when that ends.
    """
    for play in plays:
      play.stop()
    left = [play for play in plays if play.is_open and not play.is_busy]
    closed: queue.SimpleQueue = queue.SimpleQueue()
    for play in left:
      self._worlds.submit(f"closing {play.task.id}", play.close, closed.put)
    for _ in left:
      closed.get()

  def take_times(self) -> dict[str, float]:
    """Returns the metrics of what worlds took since the last call.

    time/worlds_wait_s: the engine had nothing to sample, and waited for worlds.
    time/worlds_hidden_s: some world was at work while others' turns were sampled.
    """
    times, self._times = self._times, dict.fromkeys(_TIMES, 0.0)
    return times


def _share_of(at_once: int | None) -> int | None:
  """Returns how many episodes this process may play at a time; None: as many as there are."""
  if at_once is None:
    return None
  processes = jax.process_count()
  if at_once < processes:
    raise SettingError(
      f"the environment plays {at_once} episodes at once, fewer than the {processes} processes"
    )
  return at_once // processes


def _put(first: queue.SimpleQueue, lane: int, request: Request | None) -> None:
  first.put((lane, request))


def _shared(own: dict[Place, Rollout], tasks: list[Task], n: int) -> list[list[Rollout]]:
  """Returns the episodes of all processes, as groups[q][g]."""
  if jax.process_count() == 1:
    return [[own[q, g] for g in range(n)] for q in range(len(tasks))]
  told = [[place, row] for place, (row,) in ((p, stored([[r]])[0]) for p, r in own.items())]
  by_place = {tuple(place): row for rows in hosts.share(told) for place, row in rows}
  return restored(tasks, [[by_place[q, g] for g in range(n)] for q in range(len(tasks))])
