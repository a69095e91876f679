"""The routes of the server: from an HTTP request to the worker, and back."""

import asyncio
import json
import secrets
import time

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.routing import Route

from sdpo_jax.data.chat import Chat
from sdpo_jax.engine.requests import check
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Completion, Request, Sampling
from sdpo_jax.serve.bodies import Writer
from sdpo_jax.serve.fields import ChatFields, CompletionFields, Refusal, read_fields
from sdpo_jax.serve.worker import Stopped, Worker


class Routes:
  """Answers requests about one model. Its methods are the routes."""

  def __init__(self, name: str, config: ModelConfig, chat: Chat, worker: Worker, token: str):
    """Takes the model's name for clients. token: what they must show; "": nothing."""
    self.name, self.config, self.chat, self.worker = name, config, chat, worker
    self._token, self._created = token, int(time.time())

  def app(self) -> Starlette:
    """Returns the application that an ASGI server runs."""
    routes = [
      Route("/health", self.health),
      Route("/v1/models", self.models),
      Route("/v1/completions", self.completions, methods=["POST"]),
      Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
    ]
    handlers = {Refusal: _refuse, Stopped: _say_stopped, HTTPException: _say_http, Exception: _fail}
    return Starlette(routes=routes, exception_handlers=handlers)

  async def health(self, _: HttpRequest) -> JSONResponse:
    """Says whether the engine runs."""
    if self.worker.end is not None:
      return JSONResponse({"status": "the engine has ended"}, 503)
    return JSONResponse({"status": "ok"})

  async def models(self, http: HttpRequest) -> JSONResponse:
    """Lists the one model."""
    self._check_token(http)
    model = {
      "id": self.name,
      "object": "model",
      "created": self._created,
      "owned_by": "sdpo_jax",
      "max_model_len": self.config.max_positions,
    }
    return JSONResponse({"object": "list", "data": [model]})

  async def completions(self, http: HttpRequest) -> JSONResponse:
    """Continues a text."""
    fields = read_fields(CompletionFields, await self._body(http))
    prompt = fields.prompt
    if isinstance(prompt, str):
      prompt = self.chat.tokenizer(prompt, add_special_tokens=fields.add_special_tokens)[
        "input_ids"
      ]
    return await self._answer(fields, prompt)

  async def chat_completions(self, http: HttpRequest) -> JSONResponse:
    """Answers a conversation."""
    fields = read_fields(ChatFields, await self._body(http))
    messages = [
      {"role": message.role, "content": self.chat.neutral(message.content)}
      for message in fields.messages
    ]
    try:
      text = self.chat.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **fields.chat_template_kwargs
      )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise Refusal(f"messages: the model's chat template refuses them: {error}") from error
    return await self._answer(
      fields, self.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    )

  # ---- one request

  async def _body(self, http: HttpRequest):
    self._check_token(http)
    try:
      return await http.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
      raise Refusal(f"the body is not JSON: {error}") from error

  def _check_token(self, http: HttpRequest) -> None:
    scheme, _, shown = http.headers.get("authorization", "").partition(" ")
    shown = shown if scheme.lower() == "bearer" else ""
    if self._token and not secrets.compare_digest(shown.encode(), self._token.encode()):
      raise Refusal("a wrong token, or none: send `Authorization: Bearer TOKEN`", status=401)

  async def _answer(self, fields, prompt: list[int]) -> JSONResponse:
    if fields.model is not None and fields.model != self.name:
      raise Refusal(f"model {fields.model!r} is not served here, {self.name!r} is", "model", 404)
    sampling = self._checked(fields, prompt)
    writer = Writer(self.chat, fields, prompt, sampling)
    temperature = fields.temperature or 1.0
    of_prompt = await self._about_prompt(writer, temperature)
    seed = secrets.randbits(32) if fields.seed is None else fields.seed % 2**64
    if sampling.max_new_tokens:
      sampled = self.worker.sample(prompt, fields.n, sampling, seed)
      completions = await asyncio.wrap_future(sampled)
    else:
      completions = [Completion(None, s, [], [], "length") for s in range(fields.n)]
    tops = [await self._tops(fields, prompt, c, temperature) for c in completions]
    return JSONResponse(writer.body(self.name, completions, tops, of_prompt))

  def _checked(self, fields, prompt: list[int]) -> Sampling:
    """Returns how to sample. Refusal for what the model cannot do."""
    room = self.config.max_positions - len(prompt)
    limit = room if fields.token_limit is None else fields.token_limit
    if limit > room:
      raise Refusal(
        f"a prompt of {len(prompt)} tokens and {limit} more exceed the model's "
        f"{self.config.max_positions} positions",
        "max_tokens",
      )
    sampling = fields.sampling(self.chat.stop_tokens, limit)
    asks_of_prompt = fields.prompt_logprobs is not None or fields.prompt_logprob_ids is not None
    if not limit and not asks_of_prompt:
      raise Refusal(
        "max_tokens: 0 is for requests with prompt_logprobs or prompt_logprob_ids", "max_tokens"
      )
    # the engine's own check, of a request that samples
    checked = Request("", prompt, fields.n, fields.sampling(self.chat.stop_tokens, limit or 1), 0)
    vocab = self.config.vocab
    try:
      check(checked, vocab, has_text=True)
    except ValueError as error:
      raise Refusal(str(error).replace("request '' has", "the request has")) from error
    named = fields.prompt_logprob_ids
    if named is not None:
      _check_named(named, len(prompt), vocab)
    return sampling

  async def _about_prompt(self, writer: Writer, temperature: float) -> dict:
    """Returns what every choice says of the prompt, as the request asks."""
    fields, about = writer.fields, {}
    if fields.prompt_logprobs is not None and len(writer.prompt) > 1:
      scores = self.worker.score(writer.prompt, temperature=temperature, top=fields.prompt_logprobs)
      about["prompt_logprobs"] = writer.prompt_logprobs(await asyncio.wrap_future(scores))
    elif fields.prompt_logprobs is not None:
      about["prompt_logprobs"] = [None]
    named = fields.prompt_logprob_ids
    if named:
      begin = len(writer.prompt) - len(named)
      scores = self.worker.score(writer.prompt, begin=begin, temperature=temperature, named=named)
      about |= writer.id_logprobs(await asyncio.wrap_future(scores))
    return about

  async def _tops(self, fields, prompt: list[int], completion: Completion, temperature: float):
    """Returns the likeliest entries at each token of a completion, where they are asked for."""
    top = fields.top_logprobs_of_samples
    if not top or not completion.tokens:
      return None
    scores = self.worker.score(
      prompt + completion.tokens, begin=len(prompt), temperature=temperature, top=top
    )
    return await asyncio.wrap_future(scores)


def _check_named(named: list[list[int]], length: int, vocab: int) -> None:
  """Raises Refusal for ids that cannot be looked up."""
  problem = None
  if len(named) >= length:
    problem = f"{len(named)} lists for the {length - 1} positions behind the first token"
  elif not all(0 <= token < vocab for tokens in named for token in tokens):
    problem = f"a token that is not in [0, {vocab})"
  elif max(map(len, named), default=0) > vocab:
    problem = f"more than the {vocab} tokens of the vocabulary for one position"
  if problem:
    raise Refusal(f"prompt_logprob_ids: {problem}", "prompt_logprob_ids")


# ---- what goes wrong


def _error(message: str, status: int, field: str | None = None) -> JSONResponse:
  kind = "invalid_request_error" if status < 500 else "server_error"
  error = {"message": message, "type": kind, "param": field, "code": status}
  return JSONResponse({"error": error}, status)


async def _refuse(_: HttpRequest, error: Refusal) -> JSONResponse:
  return _error(str(error), error.status, error.field)


async def _say_stopped(_: HttpRequest, error: Stopped) -> JSONResponse:
  return _error(str(error), 503)


async def _say_http(_: HttpRequest, error: HTTPException) -> JSONResponse:
  return _error(str(error.detail), error.status_code)


async def _fail(_: HttpRequest, error: Exception) -> JSONResponse:
  return _error(f"{type(error).__name__}: {error}", 500)
