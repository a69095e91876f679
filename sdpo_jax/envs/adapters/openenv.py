"""Plays environments that live behind a server of OpenEnv.

A session is a WebSocket at URL/ws, and a world of its own on the server. Messages are JSON:

  {"type": "reset", "data": {"seed": 7}}        {"type": "step", "data": {KEY: TEXT}}
  {"type": "close"}

The first two are answered by

  {"type": "observation", "data": {"observation": {...}, "reward": 0.5, "done": false}}
  {"type": "error", "data": {"message": TEXT, "code": TEXT}}

A task is a seed, and the reward of an episode the sum of those of its steps; null counts as 0.

`pip install 'sdpo_jax[openenv]'` brings the one package that is needed, websockets.
"""

import contextlib
import json
import re

from sdpo_jax.envs.adapters.foreign import Rewards, opening, seed_task
from sdpo_jax.envs.imports import need
from sdpo_jax.errors import SettingError
from sdpo_jax.records import Task, Turn

TIME_S = 60.0  # for an answer, as OpenEnv's own client
CLOSE_S = 5.0
MAX_BYTES = 1 << 24  # of an answer


class OpenEnvText:
  """Opens a session for each episode.

  Args:
    url: of the server, such as http://127.0.0.1:8000.
    action: the field of an action that takes the policy's message.
    observation: the field of an observation that the policy reads; empty: all of them, as JSON.
    instruction: stands before the first observation.
    sessions: the server's limit (`max_concurrent_envs`), which is 1 unless it is raised there.
    reward_range: (lowest, highest) sum of the rewards of an episode.
  """

  def __init__(
    self,
    *,
    url: str,
    action: str = "message",
    observation: str = "",
    instruction: str = "",
    sessions: int = 1,
    reward_range: tuple[float, float] = (0.0, 1.0),
  ):
    need("sdpo_jax.envs.adapters.openenv:OpenEnvText", "openenv", ("websockets",))
    if not re.match(r"(http|ws)s?://", url):
      raise SettingError(f"config.env.url={url!r} must begin with http:// or https://")
    if sessions < 1:
      raise SettingError(f"config.env.sessions={sessions} must be at least 1")
    self.url = re.sub("^http", "ws", url.rstrip("/")) + "/ws"
    self.action, self.observation, self.instruction = action, observation, instruction
    self.at_once = sessions
    self.rewards = Rewards(reward_range)

  def open(self) -> None:
    """Asks the server once. RuntimeError if it does not answer."""
    self.start(self.task("train", 0)).close()

  def task(self, split: str, index: int) -> Task:
    """Returns a seed as a task. ValueError for a split that does not exist."""
    return seed_task(self.url, self.instruction, split, index)

  def start(self, task: Task) -> "Session":
    """Opens a session. RuntimeError if the server does not answer."""
    return Session(self, task.data["seed"])


class Session:
  """One episode, over a connection of its own."""

  def __init__(self, env: OpenEnvText, seed: int):
    from websockets.sync.client import connect

    self._env, self._seed, self._return = env, seed, 0.0
    self._connection = contextlib.ExitStack()
    try:
      socket = connect(env.url, max_size=MAX_BYTES, close_timeout=CLOSE_S, proxy=None)
      self._socket = self._connection.enter_context(socket)
    except Exception as error:  # a refusal, a time limit, a server that speaks another protocol
      raise RuntimeError(f"the server at {env.url} does not answer: {error}") from None

  def prompt(self) -> list[dict[str, str]]:
    """Begins the episode."""
    seen = self._ask("reset", {"seed": self._seed}).observation
    return opening(self._env.instruction, seen)

  def step(self, message: str) -> Turn:
    """Has the server carry out the message."""
    text = message.encode("utf-8", "replace").decode()  # no half of a surrogate pair
    return self._ask("step", {self._env.action: text})

  def close(self) -> None:
    """Ends the session, and waits until the server has: a new one may need its place."""
    with contextlib.suppress(Exception):
      self._socket.send(json.dumps({"type": "close"}))
      self._socket.recv(timeout=CLOSE_S)  # raises once the connection is closed
    self._connection.close()

  def _ask(self, kind: str, data: dict) -> Turn:
    """Returns what the server says. RuntimeError for an error, and for what is no observation."""
    with contextlib.suppress(Exception):  # a server that is full says so, and hangs up
      self._socket.send(json.dumps({"type": kind, "data": data}))
    answer = json.loads(self._socket.recv(timeout=TIME_S))
    said = answer.get("data", {})
    if answer.get("type") != "observation":
      raise RuntimeError(f"the server says {said.get('code')}: {said.get('message')}")
    seen, key = said["observation"], self._env.observation
    if key and key not in seen:
      raise RuntimeError(f"config.env.observation={key!r}: the server shows {sorted(seen)}")
    self._return += float(said.get("reward") or 0.0)
    text = str(seen[key]) if key else json.dumps(seen, ensure_ascii=False)
    return Turn(text, self._env.rewards.mapped(self._return), bool(said.get("done")))
