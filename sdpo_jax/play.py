"""One episode that is being played: what the policy and the world have said, and how it ends."""

import contextlib
import math
import numbers
from typing import NamedTuple

from sdpo_jax.data.conversation import Conversation
from sdpo_jax.data.window import WindowedConversation, message_of
from sdpo_jax.errors import TaskError
from sdpo_jax.records import (
  Completion,
  Feedback,
  Request,
  Rollout,
  Sampling,
  Status,
  Task,
  Turn,
)
from sdpo_jax.rollout import Place, prompt_seed
from sdpo_jax.text import MAX_CHARS, clean, cut
from sdpo_jax.worlds import Lost

MAX_OBSERVATION = 4 * MAX_CHARS  # characters of one


class Room(NamedTuple):
  """How much of an episode its prompts hold."""

  max_prompt_tokens: int  # of what comes before the first turn
  max_episode_tokens: int  # of all that follows it in one text
  # turns that a prompt shows, where each turn has one of its own; None: the episode is one text
  history: int | None = None


class Play:
  """One episode, from its start to its rollout. One thread at a time is in it."""

  def __init__(self, player, task: Task, place: Place, sampling: Sampling, seed: int):
    self.task, self.place = task, place
    self._player, self._sampling, self._seed = player, sampling, seed
    self._world = None
    self._conversation: Conversation | WindowedConversation | None = None
    self._completions: list[Completion] = []
    self._turns: list[Turn] = []
    self._messages: list[str] = []  # of the policy, without its thoughts
    self._end = ""
    self._why_lost = ""
    self.is_busy = False  # some thread is in the world, or will be
    self.too_long: TaskError | None = None  # what the first messages are, for the caller to raise

  # ---- in a thread of the worlds

  def start(self) -> list[dict[str, str]]:
    """Starts the world, and returns its first messages."""
    world = self._player.env.start(self.task)
    self._world = world
    return world.prompt()

  def step(self, message: str) -> Turn:
    """Has the world answer a message."""
    return checked(self._world.step(message))

  # ---- when the call has ended, there or in the watch

  def begun(self, found) -> Request | None:
    """Takes what `start` returned or a Lost; returns the first request, if there is one."""
    if isinstance(found, Lost):
      return self.lose(found)
    self._conversation = self._player.conversation(found)
    self._player.env.remember(self.task, found)
    length, limit = len(self._conversation.prompt), self._player.room.max_prompt_tokens
    if length > limit:
      self.too_long = TaskError(
        f"the beginning of episode {self.task.id} takes {length} tokens, "
        f"more than config.data.max_prompt_tokens={limit}"
      )
      return self.lose(Lost(str(self.too_long)))
    return self._request()

  def answered(self, found) -> Request | None:
    """Takes what `step` returned or a Lost; returns the next request, None at the end."""
    if isinstance(found, Lost):
      return self.lose(found)
    was_cut_off = self._completions[-1].finish_reason == "length"
    turn = found._replace(valid=found.valid and not was_cut_off)
    self._turns.append(turn)
    if turn.done:
      self._end = "done"
      return None
    self._conversation.add_message(turn.observation)
    used = len(self._conversation.prompt) - self._first_length()
    if used + self._sampling.max_new_tokens > self._player.room.max_episode_tokens:
      self._end = "budget"
      return None
    return self._request()

  def lose(self, lost: Lost) -> None:
    """Ends the episode, which nothing is learned from."""
    self._end, self._why_lost = "lost", str(lost)

  # ---- in the main thread

  def said(self, completion: Completion) -> str:
    """Takes a turn of the policy, and returns what the world gets to read of it."""
    self._completions.append(completion)
    self._conversation.add_response(completion)
    text = self._player.chat.response_text(completion.tokens)
    self._messages.append(message_of(text))
    return text if getattr(self._player.env, "reads_thoughts", False) else self._messages[-1]

  @property
  def is_over(self) -> bool:
    """Tells whether the episode has come to an end."""
    return bool(self._end)

  def stop(self) -> None:
    """Ends the episode where it is; what a call still returns is of no use."""
    self._end = self._end or "stopped"

  @property
  def is_open(self) -> bool:
    """Tells whether there is a world that has not been closed."""
    return self._world is not None

  def close(self) -> None:
    """Ends the world, if there is one; whatever it raises is its own affair."""
    world, self._world = self._world, None
    if world is not None:
      with contextlib.suppress(Exception):
        world.close()

  def rollout(self) -> Rollout:
    """Returns the episode as one response."""
    if self._conversation is None or not self._completions:
      prompt = [] if self._conversation is None else self._conversation.prompt
      failed = Feedback(0.0, self._why_lost, Status.ENV_FAILED)
      return Rollout(self.task, prompt, [], [], self._end, "", failed, sampled=[], turns=[])
    (row,) = self._conversation.rows()
    reward = self._turns[-1].reward if self._turns else 0.0
    trace = cut(clean(self._trace()), MAX_CHARS)
    feedback = Feedback(reward, trace)
    if self._end == "lost":
      feedback = Feedback(0.0, self._why_lost, Status.ENV_FAILED)
    return Rollout(
      self.task,
      row.prompt_tokens,
      row.tokens,
      row.logp,
      self._end,
      self._trace(),
      feedback,
      sampled=row.sampled,
      turns=self._turns,
    )

  def _trace(self) -> str:
    """Returns what was said in turns, without the thoughts of the policy."""
    lines = []
    for number, message in enumerate(self._messages):
      lines.append(f"> {message}")
      if number < len(self._turns):
        lines.append(self._turns[number].observation)
    return "\n".join(lines)

  def _request(self) -> Request:
    turn = len(self._completions)
    key = (*self.place, turn)
    seed = prompt_seed(self._seed, "turn", self.place[1], turn)
    return Request(key, self._conversation.prompt, 1, self._sampling, seed)

  def _first_length(self) -> int:
    return len(self._conversation.rows()[0].prompt_tokens)


def checked(turn: Turn) -> Turn:
  """Returns a turn as the rest of the run may read it. ValueError for what no world may say."""
  observation, reward, done, valid = turn
  is_number = isinstance(reward, numbers.Real) and not isinstance(reward, bool)
  if not is_number or not math.isfinite(reward) or not 0.0 <= reward <= 1.0:
    raise ValueError(f"the world gave the reward {reward!r}, not a number in [0, 1]")
  if not isinstance(observation, str):
    raise ValueError(f"the world said a {type(observation).__name__}, not a str")
  text = cut(clean(observation), MAX_OBSERVATION)
  return Turn(text, float(reward), bool(done), bool(valid))
