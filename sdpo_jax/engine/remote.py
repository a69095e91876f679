"""Engines whose samples come from inference servers: what those for vLLM and SGLang share.

Each sample is a question of its own, with a seed made of the request's and the sample's index. Up
to `concurrency` of them are asked at a time. Questions are spread over the servers; those of one
conversation, and the samples of one request, go to the same one, whose cache has their prompt.

Weights are handed over as files in a directory that trainer and servers see. `load` writes them; a
server reads them before the first question that wants them, also after it was restarted. They have
a name that no other weights have, and each answer is checked for it. Sampling has ended before
others are loaded, so no sample spans a change.

A server that does not answer, or answers that it cannot now, is asked again after a while, or
another one is, until `patience_s` have passed. What cannot be answered at all ends in one RunError
with the server's URL and the request's key. `start` finds most of that before the run.

With several processes all call every method, and process 0 asks for all (`rollout.sample`).
"""

import abc
import asyncio
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import dataclasses
import itertools
import os
import queue
import secrets
import shutil
import time
from typing import Any, ClassVar, NamedTuple
import weakref

import jax

from sdpo_jax import hosts
from sdpo_jax.engine.answers import Reports, check_answer, what_is_wrong
from sdpo_jax.engine.client import Background, Failed, Refused, Server, delay_s
from sdpo_jax.engine.requests import RequestQueue, check
from sdpo_jax.engine.talks import Job, Jobs, Talk
from sdpo_jax.errors import Preempted, RunError, ServerLost
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.model.lora import Lora
from sdpo_jax.records import Completion, Request, Sampling

_WAKE = None  # in a queue of futures: there may be new requests


class ServerSettings(NamedTuple):
  """`config.rollout.server`."""

  urls: tuple[str, ...]
  model: str
  weights_dir: str
  timeout_s: float
  patience_s: float
  concurrency: int


class Weights(NamedTuple):
  """Weights that servers are to sample from."""

  name: str
  path: str | None  # None: those that the servers were started with
  version: int


class OtherWeights(Refused):
  """The answer comes from other weights than were asked for, or the server lacks those."""


class RemoteEngine(abc.ABC):
  """Samples by asking servers. `sdpo_jax.engine` states what `generate` guarantees."""

  takes_adapters: ClassVar[bool]  # and not the sum of adapters and base
  samples_alone = False  # of several processes the first asks for all
  advice: ClassVar[str]  # how such a server is started so that it reports what is wanted

  def __init__(
    self,
    config: ModelConfig,
    settings: ServerSettings,
    *,
    base: Any,
    path: str,
    adapters: Lora | None,
  ):
    """Keeps the settings; `start` speaks to the servers.

    Args:
      config: the decoder that samples.
      settings: `config.rollout.server`.
      base: the weights that the servers were started with.
      path: the directory or hub id of `base`.
      adapters: what is trained; None: all weights.
    """
    self.config, self.settings, self.adapters = config, settings, adapters
    self.path = path
    self.servers = [Server(url, settings.timeout_s) for url in settings.urls]
    self._base = base
    self._background: Background | None = None
    self.prefix = f"sdpo-{hosts.share(secrets.token_hex(4))[0]}"  # of the names of its weights
    self._talk_names = (f"{self.prefix}-{number}" for number in itertools.count())
    self._count = 0  # of weights that were written
    self._weights: Weights | None = None
    self._written: list[weakref.ref] = []  # the arrays of `_weights`
    self._is_loaded = False
    self._calls = 0  # of `generate` that are not over
    self._wakers: list[Callable[[], None]] = []  # one a call
    self._is_interrupted = False
    self._reports: list[Reports] = []  # of each server

  # ---- what each kind of server has its own way for

  @abc.abstractmethod
  async def examine(self, server: Server, longest: int) -> None:
    """Checks the server before the run, whose longest text has so many tokens.

    Raises Failed or Refused.
    """

  @abc.abstractmethod
  def write(self, path: str, params) -> None:
    """Writes weights as the server reads them. Every process calls it, process 0 writes."""

  @abc.abstractmethod
  async def hand_over(self, server: Server, weights: Weights) -> None:
    """Lets a server sample from weights that it may hold already."""

  @abc.abstractmethod
  async def ask(self, server: Server, job: Job, weights: Weights, *, top: bool = False) -> Any:
    """Returns the server's answer; top: with the likeliest token beside each."""

  @abc.abstractmethod
  def read(self, answer: Any, job: Job, weights: Weights) -> tuple[list[int], list[float], str]:
    """Returns (tokens, logp, "stop" or "length") of an answer. Raises Failed or Refused."""

  @abc.abstractmethod
  def read_top(self, answer: Any) -> float:
    """Returns the log-probability of the likeliest first token. Raises Refused."""

  @abc.abstractmethod
  def refuse(self, sampling: Sampling) -> str | None:
    """Returns the setting that such a server does not take as it is meant; None: it takes all."""

  @property
  @abc.abstractmethod
  def base_weights(self) -> Weights:
    """The weights that the servers were started with."""

  # ---- the engine

  def start(self, sampling: Sampling, longest: int) -> None:
    """Checks that the servers are there and can do what will be asked of them.

    longest: tokens of a prompt and its response together. Raises ValueError, one line, for a server
    that lacks something, or a directory that cannot be made.
    """
    if not hosts.leads():
      return
    try:
      os.makedirs(self.settings.weights_dir, exist_ok=True)
    except OSError as error:
      raise ValueError(
        f"config.rollout.server.weights_dir={self.settings.weights_dir!r}: {error.strerror}"
      ) from error
    run = self._in_background().run
    stop_tokens = sampling.stop_tokens
    self._reports = [run(self._examine(server, stop_tokens, longest)) for server in self.servers]
    self._check_sampling(sampling)

  def close(self) -> None:
    """Removes the files of the last weights. Servers keep what they have read."""
    self._remove(self._weights)

  def load(self, params, version: int) -> None:
    """Takes the weights that are sampled from now on; writes them, if they are not there yet."""
    assert not self._calls, "sampling goes on: no sample may span a change of weights"
    self._is_loaded = True
    if self._is_same(params, self._written):
      self._weights = self._weights._replace(version=version)
      return
    former = self._weights
    if self.takes_adapters and self._is_same(params, _references(self._base)):
      self._weights = self.base_weights._replace(version=version)
    else:
      self._count += 1
      name = f"{self.prefix}-{self._count}"
      path = os.path.abspath(os.path.join(self.settings.weights_dir, name))
      try:
        self.write(path, params)
      except OSError as error:
        raise RunError(
          f"{error.strerror}: the weights could not be written to {path}: make room there, or name "
          "another directory (config.rollout.server.weights_dir), then run the same command again"
        ) from error
      self._weights = Weights(name, path, version)
    self._written = _references(params)
    self._remove(former)

  def _remove(self, weights: Weights | None) -> None:
    if weights is not None and weights.path is not None and hosts.leads():
      shutil.rmtree(weights.path, ignore_errors=True)

  def unload(self) -> None:
    """Lets go of the weights. Servers keep them: they are often asked for again."""
    self._is_loaded = False

  def interrupt(self) -> None:
    """Ends every `generate`, those of other threads too, with Preempted. For good."""
    self._is_interrupted = True
    for wake in list(self._wakers):  # calls end meanwhile
      wake()

  def generate(self, requests: Iterable[Request] | RequestQueue) -> Iterator[Completion]:
    """Returns an iterator over the completions of all requests, as they end.

    Raises ValueError for a request that cannot be, when its turn comes; RunError for one that no
    server answers.
    """
    assert self._is_loaded, "`load` gives the engine its weights"
    return self._completions(requests, self._weights)

  def _completions(self, requests, weights: Weights) -> Iterator[Completion]:
    done: queue.SimpleQueue = queue.SimpleQueue()

    def wake() -> None:
      done.put(_WAKE)

    jobs = Jobs(requests, names=self._talk_names, wake=wake)
    running: dict[concurrent.futures.Future, Job] = {}
    background = self._in_background()
    self._calls += 1
    self._wakers.append(wake)
    try:
      while True:
        if self._is_interrupted:
          raise Preempted("sampling was interrupted")
        while len(running) < self.settings.concurrency and (job := jobs.take()) is not None:
          self._check(job.request)
          future = background.submit(self._sample(job, weights))
          running[future] = job
          future.add_done_callback(done.put)
        if running:
          future = done.get()
          if future is not _WAKE:
            job = running.pop(future)
            completion = future.result()
            jobs.hand_out(job, completion)
            yield completion
        elif not jobs.wait():
          return
    finally:
      self._calls -= 1
      self._wakers.remove(wake)
      for future in running:
        future.cancel()

  def _in_background(self) -> Background:
    if self._background is None:
      self._background = Background()
    return self._background

  # ---- one sample

  async def _sample(self, job: Job, weights: Weights) -> Completion:
    """Asks for one sample until it is there. Raises ServerLost where that is in vain."""
    failing_since, attempts, had_other_weights = None, 0, False
    failed: Server | None = None  # last
    while True:
      attempts += 1
      server = self._server_for(job.talk, failed)
      what = f"request {job.request.key!r}, sample {job.sample_index}"
      try:
        return await self._ask_once(server, job, weights)
      except OtherWeights as error:
        if had_other_weights:
          raise ServerLost(f"{server.url} {error} ({what}); {_ON_OTHER_WEIGHTS}") from None
        had_other_weights = True  # a server that was restarted has forgotten them
        server.holds = None
      except Refused as error:
        raise ServerLost(f"{server.url} {error} ({what}); {_GOES_ON}") from None
      except Failed as error:
        server.note_failure()
        failed = server
        failing_since = failing_since or time.monotonic()
        waited = time.monotonic() - failing_since
        if waited >= self.settings.patience_s:
          raise ServerLost(
            f"{server.url} {error}; {what}, was asked {attempts} times, for {waited:.0f} s "
            "after the first failure "
            f"(config.rollout.server.patience_s={self.settings.patience_s:g}): "
            f"see to the server, then {_GOES_ON}"
          ) from None
        await asyncio.sleep(delay_s(attempts - 1))

  async def _ask_once(self, server: Server, job: Job, weights: Weights) -> Completion:
    server.asked += 1
    try:
      async with server.handing_over:
        if server.holds != weights.name:
          await self.hand_over(server, weights)
          server.holds = weights.name
      answer = await self.ask(server, job, weights)
      tokens, logp, reason = self.read(answer, job, weights)
      server.note_answer()
      reason = check_answer(job.request, tokens, logp, reason, self.config.vocab)
      wants_logp = job.request.sampling.wants_logp
      return Completion(
        key=job.request.key,
        sample_index=job.sample_index,
        tokens=tokens,
        logp=logp if wants_logp else [],
        finish_reason=reason,
        version=weights.version,
      )
    finally:
      server.asked -= 1

  def _server_for(self, talk: Talk, failed: Server | None) -> Server:
    """Returns the server of a conversation: the one it had, unless that is down or just failed."""
    if talk.server is None or talk.server is failed or not talk.server.is_up:
      up = [server for server in self.servers if server.is_up and server is not failed]
      talk.server = min(up or self.servers, key=lambda server: server.asked)
    return talk.server

  # ---- checks

  def _is_same(self, params, known: list[weakref.ref]) -> bool:
    """Tells whether params are made of these very arrays."""
    leaves = jax.tree.leaves(params)
    return len(leaves) == len(known) and all(x is ref() for x, ref in zip(leaves, known))

  def _check(self, request: Request) -> None:
    """Raises ValueError for a request that the servers cannot answer."""
    check(request, self.config.vocab, has_text=True)
    self._check_sampling(request.sampling)

  def _check_sampling(self, sampling: Sampling) -> None:
    missing = "entropy" if sampling.entropy else self.refuse(sampling)
    if missing is not None:
      raise ValueError(f"{self.servers[0].url} takes no {missing}: leave it out")
    if not sampling.wants_logp:
      return
    for server, reports in zip(self.servers, self._reports, strict=True):
      problem = what_is_wrong(sampling, reports, self.advice)
      if problem:
        raise ValueError(f"{server.url} {problem}")

  async def _examine(self, server: Server, stop_tokens: tuple[int, ...], longest: int) -> Reports:
    """Returns which log-probabilities a server reports, after a few one-token questions.

    At a high temperature the likeliest token becomes less likely, and with top-k 1 certain, if the
    server takes them into account. Raises ValueError for a server that cannot be used.
    """
    try:
      await self.examine(server, longest)
      one = Sampling(1, stop_tokens=stop_tokens)
      plain = await self._first_top(server, one)
      hot = await self._first_top(server, dataclasses.replace(one, temperature=8.0))
      cut = await self._first_top(server, dataclasses.replace(one, top_k=1))
    except (Failed, Refused) as error:
      raise ValueError(
        f"{server.url} {error}: see to the server, or to config.rollout.server.urls"
      ) from None
    return Reports(at_temperature=plain - hot > 0.05, before_cuts=abs(cut - plain) < -plain / 2)

  async def _first_top(self, server: Server, sampling: Sampling) -> float:
    request = Request("the first question", [1], 1, sampling, 0)
    job = Job(request, 0, Talk(next(self._talk_names)))
    weights = self.base_weights
    answer = await self.ask(server, job, weights, top=True)
    check_answer(request, *self.read(answer, job, weights), self.config.vocab)
    return self.read_top(answer)


def _references(params) -> list[weakref.ref]:
  return [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]


_GOES_ON = "the same command goes on from the last checkpoint"
_ON_OTHER_WEIGHTS = f"let nobody else change the weights of this server; {_GOES_ON}"
