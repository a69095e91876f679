"""Asks a teacher on another machine for its log-probabilities: a `python -m sdpo_jax.serve`.

One HTTP request a response: what the teacher reads (prompt with context, then the response), and
the K tokens that are asked about at each response token. The answer has K + 1 numbers a token, at
the rollout's temperature. Responses that the teacher has no context for are not asked about.

The server's token, where it wants one, stands in the variable SDPO_JAX_TOKEN. Of several processes
the first one asks, and shares the answers.

Errors: ValueError of one line from `check`, before training; RunError where the server has been
silent for too long, or refuses. A server that restarts within that time is asked again.
"""

import concurrent.futures
import http.client
import json
import os
import time
from typing import Any
import urllib.error
import urllib.request

import numpy as np

from sdpo_jax import hosts
from sdpo_jax.data.batch import Packed
from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import RunError
from sdpo_jax.objectives.teacher_weights import Remote
from sdpo_jax.records import Scored

SETTING = "config.method.teacher_weights.url"
REQUESTS = 4  # at a time
FIRST_PAUSE_S = 0.5  # before a request is sent again; twice as long each time
_PROBE = "def f(x):\n    return [v * 17 for v in x]  # \u00e9\u4e2d"


class _Refused(Exception):
  """The server answers that it cannot do what it is asked for, or that it lacks a field."""


class RemoteTeacher:
  """The teacher of a run, at the address that its method names."""

  def __init__(self, remote: Remote, *, temperature: float, vocab: int):
    """Takes the rollout's temperature, and the size of the policy's vocabulary."""
    self._remote, self._temperature, self._vocab = remote, temperature, vocab
    self._model = remote.model

  def check(self, chat: Chat, longest: int) -> None:
    """Raises ValueError where the server cannot teach this run.

    longest: the most tokens that the teacher may have to read.
    """
    if not hosts.leads():
      return
    where = f"{SETTING}={self._remote.url}"
    try:
      self._check_model(longest)
      self._check_tokens(chat)
    except (OSError, _Refused) as error:
      raise ValueError(f"{where}: {error}") from error

  def _check_model(self, longest: int) -> None:
    models = {model["id"]: model for model in self._send("/v1/models", None).get("data", [])}
    self._model = self._model or next(iter(models), "")
    if self._model not in models:
      raise _Refused(f"it serves {sorted(models)}, not {self._model!r}")
    positions = models[self._model].get("max_model_len", longest)
    if longest > positions:
      raise _Refused(
        f"the teacher has {positions} positions, and config.data.max_teacher_tokens and "
        f"config.rollout.max_new_tokens make texts of {longest} tokens"
      )

  def _check_tokens(self, chat: Chat) -> None:
    """Checks that a text has the same ids there, and that the last id has a log-probability."""
    ids = chat.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    body = {"prompt": _PROBE, "add_special_tokens": False, "return_token_ids": True}
    choice = self._complete(body | {"prompt_logprob_ids": [[self._vocab - 1]]})
    if choice.get("prompt_token_ids") != ids:
      raise _Refused("its tokenizer gives other ids to a text than the policy's: no teacher for it")

  def read(self, packed: Packed, index_CXM: np.ndarray) -> Packed:
    """Returns the batch with the teacher's log-probabilities at the tokens index_CXM."""
    begun = time.monotonic()
    answers = self._answers(packed, index_CXM) if hosts.leads() else None
    answers = hosts.share(answers)[0]
    # what nobody asked about has no weight, and needs numbers that are finite
    logp_CXM = np.full(index_CXM.shape, -np.log(self._vocab), np.float32)
    logp_CX = logp_CXM[..., 0].copy()
    for (c, x), (of_ids, of_tokens) in zip(_places(packed, len(index_CXM)), answers, strict=True):
      if of_ids:
        logp_CXM[c, x : x + len(of_ids)] = of_ids
        logp_CX[c, x : x + len(of_tokens)] = of_tokens
    plain, *further = packed.batch.readings
    plain = plain._replace(scored=Scored(index_CXM, logp_CXM, logp_CX))
    batch = packed.batch._replace(readings=(plain, *further))
    metrics = packed.metrics | {"time/remote_teacher_s": time.monotonic() - begun}
    return packed._replace(batch=batch, metrics=metrics)

  def _answers(self, packed: Packed, index_CXM: np.ndarray) -> list[tuple[list, list]]:
    """Returns, for each row, the log-probabilities of the ids, and of the response's tokens."""
    texts = packed.teacher_texts
    with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
      futures = []
      for (c, x), text, start in zip(_places(packed, len(index_CXM)), *texts, strict=True):
        ids_XM = index_CXM[c, x : x + len(text) - start]
        futures.append(pool.submit(self._answer, text, ids_XM.tolist()))
      try:
        return [future.result() for future in futures]
      except BaseException:  # else the others would each wait as long
        pool.shutdown(wait=False, cancel_futures=True)
        raise

  def _answer(self, text: list[int], ids: list[list[int]]) -> tuple[list, list]:
    if not ids:
      return [], []
    until = time.monotonic() + self._remote.timeout_s
    pause_s = FIRST_PAUSE_S
    while True:
      try:
        choice = self._complete({"prompt": text, "prompt_logprob_ids": ids})
        return choice["prompt_id_logprobs"], choice["prompt_token_logprobs"]
      except _Refused as error:
        raise RunError(f"{SETTING}={self._remote.url}: {error}") from error
      except OSError as error:
        if time.monotonic() + pause_s > until:
          raise RunError(
            f"{SETTING}={self._remote.url}: {error}, for {self._remote.timeout_s:g} s; nothing of "
            "this step was trained: start the server, then run the same command again"
          ) from error
      time.sleep(pause_s)
      pause_s = 2 * pause_s

  def _complete(self, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the one choice of a request that samples nothing."""
    body = {"model": self._model, "max_tokens": 0, "temperature": self._temperature}
    (choice,) = self._send("/v1/completions", body | fields)["choices"]
    for field in ("prompt_id_logprobs", "prompt_token_logprobs"):
      if field not in choice:
        raise _Refused(f"it answers without {field}: it has to be a python -m sdpo_jax.serve")
    return choice

  def _send(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the answer to a request; without a body it is a GET.

    OSError where it may be asked again, _Refused where that would not help.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    token = os.environ.get("SDPO_JAX_TOKEN")
    if token:
      headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(self._remote.url + path, data, headers)
    try:
      with urllib.request.urlopen(request, timeout=self._remote.timeout_s) as response:
        return json.load(response)
    except urllib.error.HTTPError as error:
      text = error.read().decode(errors="replace")
      if error.code < 500:
        raise _Refused(f"it answers {path} with status {error.code}: {text[:300]}") from error
      raise OSError(f"it answers {path} with status {error.code}") from error
    except urllib.error.URLError as error:
      raise OSError(f"it cannot be reached ({error.reason})") from error
    except (http.client.HTTPException, json.JSONDecodeError) as error:
      raise OSError(f"its answer broke off ({error!r})") from error


def _places(packed: Packed, packs: int) -> list[tuple[int, int]]:
  """Returns (pack, first token there) of each row of a batch."""
  start_B = packed.batch.start_B
  return [(b // (len(start_B) // packs), int(x)) for b, x in enumerate(start_B)]
