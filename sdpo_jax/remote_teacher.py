"""Asks a teacher on another machine for its log-probabilities: a `python -m sdpo_jax.serve`.

One HTTP request a text: what the teacher reads (prompt with context, then the response, or one turn
of it), and the K tokens that are asked about at each token sampled. The answer has K + 1 numbers a
token, at the rollout's temperature. Responses that the teacher has no context for are not asked
about. Of several processes the first one asks, and shares the answers.

Errors: ValueError of one line from `check`, before training; RunError where the server has been
silent for too long, or refuses. A server that restarts within that time is asked again.
"""

import asyncio
import logging
import time
from typing import Any

import numpy as np

from sdpo_jax import hosts
from sdpo_jax.data.batch import Packed
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.packing import Span, Text
from sdpo_jax.engine.client import Background, Failed, Refused, Server, delay_s, field
from sdpo_jax.errors import ServerLost
from sdpo_jax.objectives.teacher_weights import Remote
from sdpo_jax.records import Scored

SETTING = "config.method.teacher_weights.url"
REQUESTS = 4  # at a time
_PROBE = "def f(x):\n    return [v * 17 for v in x]  # \u00e9\u4e2d"


class RemoteTeacher:
  """The teacher of a run, at the address that its method names."""

  def __init__(self, remote: Remote, *, temperature: float, vocab: int):
    """Takes the rollout's temperature, and the size of the policy's vocabulary."""
    self._remote, self._temperature, self._vocab = remote, temperature, vocab
    self._model = remote.model
    self._server = Server(remote.url, remote.timeout_s)
    self._run = Background().run

  def check(self, chat: Chat, longest: int) -> None:
    """Raises ValueError where the server cannot teach this run.

    longest: the most tokens that the teacher may have to read.
    """
    if not hosts.leads():
      return
    try:
      self._run(self._check_model(longest))
      self._run(self._check_tokens(chat))
    except (Failed, Refused) as error:
      raise ValueError(
        f"{SETTING}={self._remote.url}: the server {error}: start a python -m sdpo_jax.serve with "
        "the teacher there, or name where one is"
      ) from error

  async def _check_model(self, longest: int) -> None:
    listed = field(await self._server.get("/v1/models"), "data")
    models = {field(model, "id"): model for model in listed}
    self._model = self._model or next(iter(models), "")
    if self._model not in models:
      raise Refused(f"has {sorted(models)}, not {self._model!r}")
    positions = models[self._model].get("max_model_len", longest)
    if longest > positions:
      raise Refused(
        f"has {positions} positions, and config.data.max_teacher_tokens and "
        f"config.rollout.max_new_tokens make texts of {longest} tokens"
      )

  async def _check_tokens(self, chat: Chat) -> None:
    """Checks that a text has the same ids there, and that the last id has a log-probability."""
    ids = chat.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    body = {"prompt": _PROBE, "add_special_tokens": False, "return_token_ids": True}
    choice = await self._complete(body | {"prompt_logprob_ids": [[self._vocab - 1]]})
    if field(choice, "prompt_token_ids") != ids:
      raise Refused("gives other ids to a text than the policy's tokenizer: it cannot teach it")

  def read(self, packed: Packed, index_CXM: np.ndarray) -> Packed:
    """Returns the batch with the teacher's log-probabilities at the tokens index_CXM."""
    begun = time.monotonic()
    answers = self._run(self._answers(packed, index_CXM)) if hosts.leads() else None
    answers = hosts.share(answers)[0]
    # what nobody asked about has no weight, and needs numbers that are finite
    logp_CXM = np.full(index_CXM.shape, -np.log(self._vocab), np.float32)
    logp_CX = logp_CXM[..., 0].copy()
    for (c, x, text), answer in zip(_placed(packed, len(index_CXM)), answers, strict=True):
      at_X = _sampled_of(text.spans)
      of_ids, of_tokens = map(np.asarray, answer)
      logp_CXM[c, x : x + len(at_X)] = of_ids[at_X]
      logp_CX[c, x : x + len(at_X)] = of_tokens[at_X]
    plain, *further = packed.batch.readings
    plain = plain._replace(scored=Scored(index_CXM, logp_CXM, logp_CX))
    batch = packed.batch._replace(readings=(plain, *further))
    metrics = packed.metrics | {"time/remote_teacher_s": time.monotonic() - begun}
    return packed._replace(batch=batch, metrics=metrics)

  async def _answers(self, packed: Packed, index_CXM: np.ndarray) -> list[tuple[list, list]]:
    """Returns, for each text, the log-probabilities of the ids, and of the tokens.

    These are of all tokens from the first sampled one on.
    """
    limit = asyncio.Semaphore(REQUESTS)
    questions = []
    for c, x, text in _placed(packed, len(index_CXM)):
      at_X = _sampled_of(text.spans)
      ids_XM = np.zeros((len(text.tokens) - text.spans[0][0], index_CXM.shape[-1]), int)
      ids_XM[at_X] = index_CXM[c, x : x + len(at_X)]
      questions.append(self._answer(text.tokens, ids_XM.tolist(), limit))
    return await asyncio.gather(*questions)

  async def _answer(
    self, text: list[int], ids: list[list[int]], limit: asyncio.Semaphore
  ) -> tuple[list, list]:
    """Asks until there is an answer. Raises ServerLost where that is in vain."""
    where, failures, until = f"{SETTING}={self._remote.url}: the server", 0, None
    while True:
      try:
        async with limit:
          choice = await self._complete({"prompt": text, "prompt_logprob_ids": ids})
        return _checked(choice, ids)
      except Refused as error:
        raise ServerLost(f"{where} {error}; nothing of this step was trained") from error
      except Failed as error:
        now = time.monotonic()
        if until is None:
          until = now + self._remote.timeout_s
          logging.warning("%s %s; it is asked again for %g s", where, error, self._remote.timeout_s)
        if now >= until:
          raise ServerLost(
            f"{where} {error}, for {self._remote.timeout_s:g} s; nothing of this step was trained: "
            "start the server, then run the same command again"
          ) from error
      await asyncio.sleep(delay_s(failures))
      failures += 1

  async def _complete(self, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the one choice of a request that samples nothing."""
    body = {"model": self._model, "max_tokens": 0, "temperature": self._temperature}
    choice = field(await self._server.post("/v1/completions", body | fields), "choices", 0)
    for name in ("prompt_id_logprobs", "prompt_token_logprobs"):
      if name not in choice:
        raise Refused(f"answers without {name}: it has to be a python -m sdpo_jax.serve")
    return choice


def _sampled_of(spans: list[Span]) -> np.ndarray:
  """Returns the places of what was sampled, counted from the first of it."""
  first = spans[0][0]
  return np.concatenate([np.arange(begin - first, end - first) for begin, end in spans])


def _checked(choice: dict[str, Any], ids: list[list[int]]) -> tuple[list, list]:
  """Returns an answer's numbers; Refused unless there is a finite one for each that was asked."""
  of_ids, of_tokens = choice["prompt_id_logprobs"], choice["prompt_token_logprobs"]
  try:
    there = np.shape(np.asarray(of_ids, np.float64)), np.shape(np.asarray(of_tokens, np.float64))
    finite = np.isfinite(of_ids).all() and np.isfinite(of_tokens).all()
  except (TypeError, ValueError):  # ragged, or no numbers
    there, finite = ("ragged",), False
  if there != ((len(ids), len(ids[0])), (len(ids),)) or not finite:
    raise Refused(
      f"answers with log-probabilities of shape {there}, or such as are not finite, where "
      f"{len(ids)} positions x {len(ids[0])} ids were asked about"
    )
  return of_ids, of_tokens


def _placed(packed: Packed, packs: int) -> list[tuple[int, int, Text]]:
  """Returns (pack, first token there, text) of each text that the teacher reads of a batch."""
  start_B = packed.batch.start_B
  return [
    (b // (len(start_B) // packs), int(x) + text.first, text)
    for b, (x, texts) in enumerate(zip(start_B, packed.teacher_texts.of, strict=True))
    for text in texts
  ]
