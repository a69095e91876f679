"""Samples from vLLM servers, whose LoRA adapters are the weights that change.

  POST /v1/completions        ids in (`prompt`), ids out (`return_token_ids`), log-probabilities
  GET  /v1/models             the names that a server answers to
  POST /v1/load_lora_adapter, /v1/unload_lora_adapter

vLLM loads no whole weights from a disk into a running server, so adapters are trained. Each set of
them is loaded under a name of its own, which the answer repeats as `model`. The server needs
--enable-lora, a --max-lora-rank that is large enough and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.

Log-probabilities: by default vLLM reports them at temperature 1, before cuts and biases; with
--logprobs-mode processed_logprobs, at the temperature but after cuts and biases. What is asked for
must have the same value in both ways, or the server's.

`ignore_eos` leaves stopping to `stop_token_ids`, and the neutral penalties stand in each question
because the model's generation_config.json may set others.
"""

from typing import Any

from sdpo_jax.engine.answers import sample_seed
from sdpo_jax.engine.client import Failed, Refused, Server, field
from sdpo_jax.engine.remote import OtherWeights, RemoteEngine, Weights
from sdpo_jax.engine.talks import Job
from sdpo_jax.model import lora
from sdpo_jax.records import Sampling

_LEAST_TEMPERATURE = 0.01  # lower ones are raised to it
_MOST_BIAS = 100.0  # larger ones are lowered to it
_RUNTIME_LORA = "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


class VllmEngine(RemoteEngine):
  """Samples from vLLM servers, or others with its routes."""

  takes_adapters = True
  advice = "start vLLM with --logprobs-mode processed_logprobs"

  @property
  def base_weights(self) -> Weights:
    """The model that the servers were started with, by its served name."""
    return Weights(self.settings.model or self.path, None, 0)

  async def examine(self, server: Server, longest: int) -> None:
    """Checks that the model is served, has room, and that adapters can be loaded."""
    wanted = self.base_weights.name
    served = await self._served(server)
    if wanted not in served:
      raise Refused(
        f"serves {sorted(served)} and not {wanted!r} (config.rollout.server.model; empty: "
        "config.model.path)"
      )
    room = served[wanted].get("max_model_len")
    if room is not None and room < longest:
      raise Refused(
        f"has room for {room} tokens, and config.data.max_prompt_tokens with "
        f"config.rollout.max_new_tokens makes {longest}: start vLLM with a larger --max-model-len"
      )
    if self.adapters is None:
      return
    try:
      await server.tell("/v1/unload_lora_adapter", {"lora_name": "sdpo-none"})
    except Refused as error:
      # 404 is also the answer to a name that is not loaded; a route that is not there says no more
      if error.status == 405 or str(error).endswith("Not Found"):
        raise Refused(f"has no /v1/load_lora_adapter: {_RUNTIME_LORA}") from None

  def write(self, path: str, params) -> None:
    """Writes a PEFT directory."""
    lora.save_adapters(path, self.config, self.adapters, params, base=self.path)

  async def hand_over(self, server: Server, weights: Weights) -> None:
    """Loads an adapter, if the server does not have it, and unloads the earlier ones."""
    if weights.path is None:
      return
    served = await self._served(server)
    if weights.name not in served:
      question = {"lora_name": weights.name, "lora_path": weights.path}
      await server.tell("/v1/load_lora_adapter", question)
    for name in sorted(served.keys() - {weights.name}):
      if name.startswith(f"{self.prefix}-"):
        await server.tell("/v1/unload_lora_adapter", {"lora_name": name})

  async def ask(self, server: Server, job: Job, weights: Weights, *, top: bool = False) -> Any:
    """Asks for a completion of a prompt of ids."""
    sampling = job.request.sampling
    question = {
      "model": weights.name,
      "prompt": job.request.prompt,
      "max_tokens": sampling.max_new_tokens,
      "n": 1,
      "temperature": sampling.temperature,
      "top_p": sampling.top_p,
      "top_k": sampling.top_k,
      "min_p": sampling.min_p,
      "presence_penalty": 0.0,
      "frequency_penalty": 0.0,
      "repetition_penalty": 1.0,
      "seed": sample_seed(job.request.seed, job.sample_index),
      "stop_token_ids": list(sampling.stop_tokens),
      "ignore_eos": True,
      "logprobs": int(top),  # besides the sampled token's
      "return_token_ids": True,
    }
    if sampling.stop_strings:
      question["stop"] = list(sampling.stop_strings)
    if sampling.logit_bias:
      question["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    try:
      return await server.post("/v1/completions", question, {"x-session-id": job.talk.id})
    except Refused as error:
      if error.status == 404 and weights.path is not None:
        raise OtherWeights(str(error)) from None
      raise

  def read(self, answer: Any, job: Job, weights: Weights) -> tuple[list[int], list[float], str]:
    """Reads the one choice of a completion."""
    model = field(answer, "model")
    if model != weights.name:
      raise OtherWeights(f"answers with model {model!r} where {weights.name!r} was asked for")
    if field(answer, "choices", 0, "finish_reason") == "abort":  # it stops, or somebody pauses it
      raise Failed("gave up a sample")
    tokens = field(answer, "choices", 0, "token_ids")
    logp = field(answer, "choices", 0, "logprobs", "token_logprobs")
    for x in range(len(logp)):
      field(answer, "choices", 0, "logprobs", "token_logprobs", x)
    read = answer["choices"][0].get("prompt_token_ids")
    if read is not None and read != job.request.prompt:
      raise Refused(f"read a prompt of {len(read)} tokens that is not the one that it was sent")
    return tokens, logp, field(answer, "choices", 0, "finish_reason")

  def read_top(self, answer: Any) -> float:
    """Returns the highest entry of the first token's `top_logprobs`."""
    entries = field(answer, "choices", 0, "logprobs", "top_logprobs", 0)
    return max(entries.values(), default=0.0)

  def refuse(self, sampling: Sampling) -> str | None:
    """vLLM cannot ban tokens, and bounds temperatures and biases."""
    if sampling.banned_tokens:
      return "banned_tokens"
    if 0 < sampling.temperature < _LEAST_TEMPERATURE:
      return f"temperature={sampling.temperature:g} (the least is {_LEAST_TEMPERATURE:g}, or 0)"
    if any(abs(bias) > _MOST_BIAS for _, bias in sampling.logit_bias):
      return f"a logit_bias beyond {_MOST_BIAS:g}"
    return None

  async def _served(self, server: Server) -> dict[str, dict]:
    """Returns what a server says of each model and adapter that it has, by name."""
    models = field(await server.get("/v1/models"), "data")
    return {field(model, "id"): model for model in models}
