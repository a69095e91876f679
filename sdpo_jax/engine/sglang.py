"""Samples from SGLang servers, whose whole weights are changed while they run.

  POST /generate                   ids in (`input_ids`), ids and log-probabilities out
  GET  /model_info                 the version of the weights
  POST /update_weights_from_disk   other weights, and the name of their version

Adapters are added to the weights that they stand on before these are written. `weight_version` is
the name of the weights, and each answer repeats it.

Log-probabilities: SGLang reports them at the temperature, before cuts but after biases; with
SGLANG_RETURN_ORIGINAL_LOGPROB=1, at temperature 1. Seeds count only for a server that was started
with --enable-deterministic-inference: others answer differently each time.

`ignore_eos` would make SGLang ignore `stop_token_ids` too, so it is left out.
"""

import logging
from typing import Any

from sdpo_jax.engine.answers import sample_seed
from sdpo_jax.engine.client import Failed, Refused, Server, field
from sdpo_jax.engine.remote import OtherWeights, RemoteEngine, Weights
from sdpo_jax.engine.talks import Job
from sdpo_jax.model.hf_weights import save_pretrained
from sdpo_jax.records import Sampling


class SglangEngine(RemoteEngine):
  """Samples from SGLang servers."""

  takes_adapters = False
  advice = "start SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB"

  @property
  def base_weights(self) -> Weights:
    """Whatever weights the server has."""
    return Weights("", None, 0)

  async def examine(self, server: Server, longest: int) -> None:
    """Checks that the server knows versions and has room; warns where it does not heed seeds."""
    field(await server.get("/model_info"), "weight_version")
    info = await server.get("/server_info")
    # the first is null where the model's own length is taken; a prompt leaves room for one token
    room = info.get("context_length") or field(info, "max_req_input_len") + 1
    if room < longest:
      raise Refused(
        f"has room for {room} tokens, and config.data.max_prompt_tokens with "
        f"config.rollout.max_new_tokens makes {longest}: start SGLang with a larger "
        "--context-length"
      )
    if not info.get("enable_deterministic_inference"):
      logging.warning(
        "%s was started without --enable-deterministic-inference: "
        "its samples depend on more than their seeds, and a run does not repeat",
        server.url,
      )

  def write(self, path: str, params) -> None:
    """Writes a directory as transformers does."""
    save_pretrained(path, self.config, params)

  async def hand_over(self, server: Server, weights: Weights) -> None:
    """Has the server read the weights, if it does not have them."""
    if await self._version(server) == weights.name:
      return
    question = {
      "model_path": weights.path,
      "weight_version": weights.name,
      "flush_cache": True,
    }
    answer = await server.post("/update_weights_from_disk", question)
    if not field(answer, "success"):
      raise Refused(f"did not take the weights of {weights.path}: {answer.get('message')}")
    version = await self._version(server)
    if version != weights.name:
      raise Refused(
        f"reports weight_version {version!r} after it was given {weights.name!r}: "
        "it lacks versions of weights"
      )

  async def ask(self, server: Server, job: Job, weights: Weights, *, top: bool = False) -> Any:
    """Asks for a completion of a prompt of ids."""
    sampling = job.request.sampling
    settings = {
      "max_new_tokens": sampling.max_new_tokens,
      "temperature": sampling.temperature,
      "top_p": sampling.top_p,
      "top_k": sampling.top_k or -1,
      "min_p": sampling.min_p,
      "presence_penalty": 0.0,
      "frequency_penalty": 0.0,
      "repetition_penalty": 1.0,
      "sampling_seed": sample_seed(job.request.seed, job.sample_index),
      "stop_token_ids": list(sampling.stop_tokens),
    }
    if sampling.stop_strings:
      settings["stop"] = list(sampling.stop_strings)
    if sampling.logit_bias:
      settings["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    question = {
      "input_ids": job.request.prompt,
      "sampling_params": settings,
      "return_logprob": True,
      "top_logprobs_num": int(top),
      "stream": False,
    }
    return await server.post("/generate", question)

  def read(self, answer: Any, job: Job, weights: Weights) -> tuple[list[int], list[float], str]:
    """Reads the tokens from beside their log-probabilities."""
    reason = field(answer, "meta_info", "finish_reason", "type")
    if reason == "abort":  # the server is about to stop, or somebody pauses it
      message = answer["meta_info"]["finish_reason"].get("message", "")
      raise Failed(f"gave up a sample: {message}")
    version = field(answer, "meta_info", "weight_version")
    if weights.path is not None and version != weights.name:
      raise OtherWeights(
        f"answers with weight_version {version!r} where {weights.name!r} was asked for"
      )
    pairs = field(answer, "meta_info", "output_token_logprobs")
    tokens, logp = [], []
    for x in range(len(pairs)):
      logp.append(field(answer, "meta_info", "output_token_logprobs", x, 0))
      tokens.append(field(answer, "meta_info", "output_token_logprobs", x, 1))
    if field(answer, "output_ids") != tokens:
      raise Refused("answers with output_ids that are not those of meta_info.output_token_logprobs")
    count = field(answer, "meta_info", "prompt_tokens")
    if count != len(job.request.prompt):
      raise Refused(f"read {count} tokens of a prompt of {len(job.request.prompt)}")
    return tokens, logp, reason

  def read_top(self, answer: Any) -> float:
    """Returns the likeliest token's entry of `output_top_logprobs`."""
    return field(answer, "meta_info", "output_top_logprobs", 0, 0, 0)

  def refuse(self, sampling: Sampling) -> str | None:
    """SGLang cannot ban tokens, and adds biases before it reports log-probabilities."""
    if sampling.banned_tokens:
      return "banned_tokens"
    if sampling.logit_bias and sampling.wants_logp:
      return "logit_bias with log-probabilities before it"
    return None

  async def _version(self, server: Server) -> str:
    return field(await server.get("/model_info"), "weight_version")
