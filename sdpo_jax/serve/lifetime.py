"""Runs the routes under uvicorn, from the ready line to the polite stop."""

import asyncio
import signal
import socket
from typing import Callable

import uvicorn

from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.engine.scoring import TextScorer
from sdpo_jax.serve.routes import Routes
from sdpo_jax.serve.worker import Stopped, Worker
from sdpo_jax.session import Loaded

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server:
  """Serves one model. After `run`, `signal` says what ended it, or `failure`."""

  def __init__(self, name: str, loaded: Loaded, *, rows: int, token: str):
    """Takes the model's name for clients. token: what they must show; "": nothing."""
    engine = LocalEngine(
      loaded.model, rows=rows, text_of=loaded.chat.plain_text, deterministic=False
    )
    engine.load(loaded.params, 0)
    scorer = TextScorer(loaded.model)
    scorer.load(loaded.params)
    self._name = name
    self._worker = Worker(engine, scorer, on_failure=self._stop)
    self._routes = Routes(name, loaded.model, loaded.chat, self._worker, token)
    self._http: uvicorn.Server | None = None
    self.signal: int | None = None
    self.failure: BaseException | None = None

  def run(self, listener: socket.socket, *, grace_s: int) -> None:
    """Serves on a socket until SIGINT, SIGTERM or a failure of the engine.

    grace_s: how long requests that are being answered may go on after that.
    """
    settings = uvicorn.Config(
      self._routes.app(), log_level="warning", access_log=False, lifespan="off"
    )
    self._http = _Announced(settings, listener, self._name)
    self._http.end_answers, self._http.grace_s = self._worker.leave, grace_s
    # uvicorn raises a signal again once it has ended: then it comes here
    before = {number: signal.signal(number, self._note) for number in _SIGNALS}
    self._worker.start()
    try:
      self._http.run(sockets=[listener])
    finally:
      if not isinstance(self._worker.end, Stopped):
        self.failure = self._worker.end
      self._worker.close()
      for number, handler in before.items():
        signal.signal(number, handler)

  def _note(self, number: int, _) -> None:
    self.signal = number
    self._stop()

  def _stop(self) -> None:
    if self._http is not None:
      self._http.should_exit = True


class _Announced(uvicorn.Server):
  """Prints the address once connections are accepted, and waits a while for what is unanswered."""

  def __init__(self, settings: uvicorn.Config, listener: socket.socket, name: str):
    super().__init__(settings)
    host, port, *_ = listener.getsockname()
    host = f"[{host}]" if ":" in host else host
    self._line = f"ready: http://{host}:{port} serves {name}"
    self.grace_s: float = 0
    self.end_answers: Callable[[], None] = lambda: None  # answers all requests with an error

  async def startup(self, sockets=None) -> None:
    await super().startup(sockets)
    print(self._line, flush=True)

  async def shutdown(self, sockets=None) -> None:
    """Ends when all requests are answered, be it with an error."""
    # uvicorn's own limit would cancel the handlers, each with a traceback
    asyncio.get_running_loop().call_later(self.grace_s, self.end_answers)
    await super().shutdown(sockets)
