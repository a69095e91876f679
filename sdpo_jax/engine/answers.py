"""What a server may be asked for one sample, and which answers keep the promises of an engine."""

from typing import NamedTuple
import zlib

from sdpo_jax.engine.client import Refused
from sdpo_jax.records import Request, Sampling


def sample_seed(seed: int, sample_index: int) -> int:
  """Returns the seed (uint32) of one sample of a request."""
  return zlib.crc32(f"{seed}/{sample_index}".encode())


class Reports(NamedTuple):
  """Which log-probabilities a server reports."""

  at_temperature: bool  # or at temperature 1
  before_cuts: bool  # top-k, top-p, min-p and biases; or after them


def what_is_wrong(sampling: Sampling, reports: Reports, advice: str) -> str:
  """Returns why a server's log-probabilities are not those that an engine owes; "": they are.

  advice: how such a server is started so that it reports them at the temperature.
  """
  if sampling.temperature not in (0, 1) and not reports.at_temperature:
    return (
      f"reports log-probabilities before the temperature, and temperature={sampling.temperature:g}:"
      f" {advice}, or set config.rollout.temperature=1"
    )
  cut = _cuts(sampling)
  if cut and not reports.before_cuts:
    return (
      f"reports log-probabilities after cuts and biases, and {cut}: start it so that it reports "
      "them before (--logprobs-mode raw_logprobs, with config.rollout.temperature=1), or do "
      "without (config.rollout.top_p=1)"
    )
  return ""


def _cuts(sampling: Sampling) -> str:
  """Returns the first setting that takes tokens out or favours some, with its value; "": none."""
  is_drawn = sampling.temperature > 0
  settings = {
    "top_p": (sampling.top_p, sampling.top_p < 1 and is_drawn),
    "top_k": (sampling.top_k, sampling.top_k > 0 and is_drawn),
    "min_p": (sampling.min_p, sampling.min_p > 0 and is_drawn),
    "logit_bias": (sampling.logit_bias, bool(sampling.logit_bias)),
  }
  return next((f"{name}={value}" for name, (value, is_on) in settings.items() if is_on), "")


def check_answer(
  request: Request, tokens: list[int], logp: list[float], reason: str, vocab: int
) -> str:
  """Returns why an answer ended, if it keeps the engine's promises; else raises Refused."""
  sampling, count = request.sampling, len(tokens)
  problems = {
    f"{len(logp)} log-probabilities for {count} tokens": len(logp) != count,
    "a log-probability that is none": not all(-1e5 < x < 1e-3 for x in logp),
    f"a token that is not in [0, {vocab})": not all(0 <= x < vocab for x in tokens),
    f"{count} tokens where 1 to {sampling.max_new_tokens} were asked for": (
      not 1 <= count <= sampling.max_new_tokens
    ),
    "a stop token before its end": any(x in sampling.stop_tokens for x in tokens[:-1]),
    f"finish_reason {reason!r}": reason not in ("stop", "length"),
  }
  for problem, is_there in problems.items():
    if is_there:
      raise Refused(f"answers with {problem}")
  if tokens[-1] in sampling.stop_tokens:
    return "stop"
  if reason == "length" and count < sampling.max_new_tokens:
    raise Refused(
      f"ended a sample after {count} of {sampling.max_new_tokens} tokens: "
      f"its context is too short for a prompt of {len(request.prompt)}"
    )
  if reason == "stop" and not sampling.stop_strings:
    raise Refused(
      f"stopped at token {tokens[-1]}, which is none of the model's stop tokens: "
      "its generation_config.json is not that of config.model.path"
    )
  return reason
