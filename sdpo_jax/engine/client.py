"""One inference server, asked over HTTP: JSON goes out, JSON comes back, and failures get a name.

  Failed   no answer, or one that a healthy server would not give: the same question may be answered
           later, by this server or another one
  Refused  an answer that asking again will not change

Servers are asked directly, past any proxy that the environment names. They are shown the token that
the variable SDPO_JAX_TOKEN holds, if it holds one.
"""

import asyncio
from collections.abc import Coroutine
import concurrent.futures
import functools
import os
import threading
import time
from typing import Any

import httpx2

_ASK_AGAIN = (408, 409, 425, 429)  # of the statuses below 500
_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 15.0
_MAX_MESSAGE = 300  # characters of a server's own words


class Failed(Exception):
  """The server gave no answer of use; the message is the rest of a sentence after its URL."""


class Refused(Exception):
  """The server's answer would be the same again; the message is as for `Failed`."""

  def __init__(self, message: str, status: int | None = None):
    super().__init__(message)
    self.status = status  # of HTTP, if that is what refuses


class Background:
  """A thread with an event loop, which ends with the process."""

  def __init__(self):
    self._loop = asyncio.new_event_loop()
    threading.Thread(target=self._loop.run_forever, name="servers", daemon=True).start()

  def submit(self, work: Coroutine) -> concurrent.futures.Future:
    """Begins some work; its future may be cancelled, which closes the work's connection."""
    return asyncio.run_coroutine_threadsafe(work, self._loop)

  def run(self, work: Coroutine) -> Any:
    """Returns what some work returns."""
    return self.submit(work).result()


class Server:
  """A server and what is known of it. All but the constructor is for `Background`'s thread."""

  def __init__(self, url: str, timeout_s: float):
    """timeout_s: from sending a question to the last byte of its answer."""
    self.url = url.rstrip("/")
    self.timeout_s = timeout_s
    self.asked = 0  # questions that are not answered yet
    self.holds: str | None = None  # name of the weights that it has; None: not known
    self.handing_over = asyncio.Lock()  # held while it gets weights
    self._failures = 0  # since the last answer
    self._retry_at = 0.0  # by the monotonic clock

  @functools.cached_property
  def _client(self) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    token = os.environ.get("SDPO_JAX_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False, headers=headers)

  @property
  def is_up(self) -> bool:
    """Tells whether it answered last, or has been left alone for long enough since."""
    return time.monotonic() >= self._retry_at

  def note_answer(self) -> None:
    """Notes that the server is well."""
    self._failures, self._retry_at = 0, 0.0

  def note_failure(self) -> None:
    """Notes a failure; those of questions that were under way at the time count once.

    What the server holds is not known any more: it may have been restarted.
    """
    self.holds = None
    if self.is_up:
      self._retry_at = time.monotonic() + delay_s(self._failures)
      self._failures += 1

  async def get(self, path: str) -> Any:
    """Returns the JSON that stands at a path. Raises Failed or Refused."""
    return _json(path, await self._send("GET", path))

  async def post(self, path: str, body: dict, headers: dict[str, str] | None = None) -> Any:
    """Returns the JSON that answers a question. Raises Failed or Refused."""
    return _json(path, await self._send("POST", path, body, headers))

  async def tell(self, path: str, body: dict) -> None:
    """Posts what is answered by its status alone. Raises Failed or Refused."""
    await self._send("POST", path, body)

  async def _send(self, method: str, path: str, body=None, headers=None) -> httpx2.Response:
    try:
      async with asyncio.timeout(self.timeout_s):
        response = await self._client.request(method, self.url + path, json=body, headers=headers)
    except TimeoutError:
      raise Failed(f"did not answer {path} within {self.timeout_s:g} s") from None
    except httpx2.TransportError as error:
      raise Failed(
        f"did not answer {path} ({_one_line(str(error)) or type(error).__name__})"
      ) from None
    status = response.status_code
    if status < 300:
      return response
    message = f"answered {path} with status {status}: {_message(response)}"
    if status >= 500 or status in _ASK_AGAIN:
      raise Failed(message)
    raise Refused(message, status)


def delay_s(failures: int) -> float:
  """Returns how long to wait after a failure that so many went before: twice as long each time."""
  return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(failures, 16))


def field(answer: Any, *path: str | int) -> Any:
  """Returns answer[path[0]][path[1]]...; Refused has the name of what is missing or null."""
  for depth, key in enumerate(path):
    try:
      answer = answer[key]
    except (KeyError, IndexError, TypeError):
      answer = None
    if answer is None:
      raise Refused(f"answers without {_name(path[: depth + 1])}")
  return answer


def _name(path: tuple[str | int, ...]) -> str:
  """Returns a path as one would write it: choices[0].token_ids."""
  text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
  return text.removeprefix(".")


def _json(path: str, response: httpx2.Response) -> Any:
  try:
    return response.json()
  except ValueError:
    raise Refused(f"answered {path} with what is not JSON: {_one_line(response.text)}") from None


def _message(response: httpx2.Response) -> str:
  """Returns what a server says about an error, wherever in its answer it does."""
  try:
    content = response.json()
  except ValueError:
    return _one_line(response.text)
  for key in ("error", "message", "detail"):
    if isinstance(content, dict) and content.get(key):
      content = content[key]
  return _one_line(str(content))


def _one_line(text: str) -> str:
  return " ".join(text.split())[:_MAX_MESSAGE]
