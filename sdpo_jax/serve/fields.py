"""The fields of a request: their names, types and ranges, and what they mean to the engine.

Names and defaults are those of OpenAI's and vLLM's routes. Null stands for the default. A field
that is not here is refused by name; so is one that asks for what this server lacks (`_LACKING`).
"""

from typing import Any

import pydantic
from pydantic import Field

from sdpo_jax.records import Sampling

MOST_LOGPROBS = 128  # likeliest entries of a position
MOST_SAMPLES = 1024

# Fields of these routes that this server lacks, with the value that asks for nothing.
_LACKING: dict[str, Any] = {
  "stream": False,
  "echo": False,
  "best_of": 1,
  "use_beam_search": False,
  "presence_penalty": 0,
  "frequency_penalty": 0,
  "repetition_penalty": 1,
  "min_tokens": 0,
}


class Refusal(Exception):
  """A request cannot be answered; `status` is HTTP's, `field` the one that is wrong, if any."""

  def __init__(self, message: str, field: str | None = None, status: int = 400):
    super().__init__(message)
    self.field, self.status = field, status


class _Fields(pydantic.BaseModel):
  """Fields of both routes."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

  model: str | None = None
  user: str | None = None  # anybody's own note; nothing reads it
  n: int = Field(1, ge=1, le=MOST_SAMPLES)
  temperature: float = Field(1.0, ge=0, le=100)
  top_p: float = Field(1.0, gt=0, le=1)
  top_k: int = Field(0, ge=-1)  # 0 and -1: all tokens
  min_p: float = Field(0.0, ge=0, le=1)
  seed: int | None = Field(None, ge=-(2**63), lt=2**63)  # None: another one each time
  stop: str | list[str] = []
  stop_token_ids: list[int] = []  # besides the model's own
  ignore_eos: bool = False  # leaves out the model's own
  include_stop_str_in_output: bool = False  # in the text; ids always have it
  skip_special_tokens: bool = True  # in the text
  logit_bias: dict[str, float] = {}
  return_token_ids: bool = False
  return_tokens_as_token_ids: bool = False  # "token_id:17" instead of a token's text
  prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
  prompt_logprob_ids: list[list[int]] | None = None

  @property
  def token_limit(self) -> int | None:
    """The most tokens to sample; None: as many as there are positions."""
    raise NotImplementedError

  @property
  def top_logprobs_of_samples(self) -> int | None:
    """How many of the likeliest entries are reported at each sampled token; None: nothing is."""
    raise NotImplementedError

  @property
  def stop_strings(self) -> tuple[str, ...]:
    return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

  def sampling(self, own_stops: tuple[int, ...], max_new_tokens: int) -> Sampling:
    """Returns how the engine is to sample. own_stops: the tokens that end the model's turns."""
    try:
      bias = tuple((int(token), value) for token, value in self.logit_bias.items())
    except ValueError as error:
      raise Refusal(f"logit_bias: {error}", "logit_bias") from error
    stops = (*(() if self.ignore_eos else own_stops), *self.stop_token_ids)
    return Sampling(
      max_new_tokens,
      temperature=self.temperature,
      top_p=self.top_p,
      stop_tokens=tuple(dict.fromkeys(stops)),
      top_k=max(0, self.top_k),
      min_p=self.min_p,
      logit_bias=bias,
      stop_strings=self.stop_strings,
    )


class CompletionFields(_Fields):
  """Fields of /v1/completions."""

  prompt: str | list[int]
  add_special_tokens: bool = True  # to a prompt that is a text
  max_tokens: int = Field(16, ge=0)
  logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

  @property
  def token_limit(self) -> int | None:
    return self.max_tokens

  @property
  def top_logprobs_of_samples(self) -> int | None:
    return self.logprobs


class Message(pydantic.BaseModel):
  """One message of a conversation."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)
  role: str
  content: str


class ChatFields(_Fields):
  """Fields of /v1/chat/completions."""

  messages: list[Message] = Field(min_length=1)
  chat_template_kwargs: dict[str, Any] = {}  # such as enable_thinking
  max_tokens: int | None = Field(None, ge=0)
  max_completion_tokens: int | None = Field(None, ge=0)  # max_tokens by its newer name
  logprobs: bool = False
  top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)

  @property
  def token_limit(self) -> int | None:
    newer = self.max_completion_tokens
    return self.max_tokens if newer is None else newer

  @property
  def top_logprobs_of_samples(self) -> int | None:
    return self.top_logprobs if self.logprobs else None


def read_fields(kind: type[_Fields], body: Any):
  """Returns the fields of a request's body. Refusal, of one line, for a body that is not one."""
  if not isinstance(body, dict):
    raise Refusal("the body must be a JSON object")
  given = {name: value for name, value in body.items() if value is not None}
  for name, neutral in _LACKING.items():
    if name in given and given.pop(name) != neutral:
      raise Refusal(f"{name}: this server has it only as {neutral!r}", name)
  try:
    fields = kind.model_validate(given)
  except pydantic.ValidationError as error:
    raise _refusal(error, kind) from error
  if 0 < fields.temperature < 0.001:  # logits divided by it leave float32's range
    raise Refusal("temperature: must be 0, or from 0.001 to 100", "temperature")
  return fields


def _refusal(error: pydantic.ValidationError, kind: type[_Fields]) -> Refusal:
  """Returns the first thing that is wrong, as one line."""
  first = error.errors()[0]
  field = str(first["loc"][0]) if first["loc"] else None
  where = ".".join(map(str, first["loc"]))
  if first["type"] == "extra_forbidden":
    return Refusal(
      f"{where}: not a field of this server; it has {sorted(kind.model_fields)}", where
    )
  if field == "prompt" and first["type"] != "missing":
    return Refusal("prompt: must be a text or a list of ids", field)
  return Refusal(f"{where}: {first['msg']}", field)
