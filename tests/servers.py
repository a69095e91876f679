"""Stand-ins for vLLM and SGLang: HTTP servers on loopback with the routes and fields of the real
ones.

They insist on the types of fields and refuse unknown ones, read weights from the directories that
they are given, and can be stopped, started again (having forgotten all) and told to misbehave.
"""

import http.server
import json
import pathlib
import socket
import threading
import zlib

import numpy as np
from safetensors.numpy import load_file, save_file

from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.model.hf_weights import load_pretrained
from sdpo_jax.records import Request, Sampling

NUMBER = (int, float)


class Status(Exception):
  """An error status with its message."""

  def __init__(self, status, message):
    super().__init__(message)
    self.status = status


class Drop(Exception):
  """Closes the connection without an answer."""


class HashModel:
  """Draws from logits that are a hash of the weights' file and the last two tokens."""

  vocab = 300

  def read(self, path):
    files = sorted(pathlib.Path(path).glob("*.safetensors"))
    return zlib.crc32(b"".join(file.read_bytes() for file in files))

  def sample(self, weights, prompt, sampling: Sampling, seed, mode="raw"):
    """Returns (tokens, logp, log-probability of each likeliest token, finish reason)."""
    dice, tokens, logp, top = np.random.default_rng(seed), [], [], []
    while True:
      ids = (*prompt, *tokens)[-2:]
      logits_V = 2 * np.random.default_rng([weights, *ids]).normal(size=self.vocab)
      heat = sampling.temperature or 1.0
      drawn_V = _cut(log_softmax(logits_V / heat), sampling)
      reported_V = log_softmax(logits_V / heat)
      if mode == "raw":
        reported_V = log_softmax(logits_V)
      elif mode == "processed":
        reported_V = drawn_V
      p_V = np.exp(drawn_V)
      token = int(drawn_V.argmax())
      if sampling.temperature:
        token = int(np.searchsorted(np.cumsum(p_V / p_V.sum()), dice.random()))
      tokens.append(token)
      logp.append(float(reported_V[token]))
      top.append(float(reported_V.max()))
      if token in sampling.stop_tokens:
        return tokens, logp, top, "stop"
      if len(tokens) == sampling.max_new_tokens:
        return tokens, logp, top, "length"


def _cut(logp_V, sampling):
  order = np.argsort(-logp_V)
  count = sampling.top_k or len(logp_V)
  if sampling.top_p < 1:
    count = min(count, int(np.searchsorted(np.cumsum(np.exp(logp_V[order])), sampling.top_p)) + 1)
  if count == len(logp_V):
    return logp_V
  kept_V = np.full_like(logp_V, -np.inf)
  kept_V[order[:count]] = logp_V[order[:count]]
  return log_softmax(kept_V)


def log_softmax(x_V):
  x_V = x_V - x_V.max()
  return x_V - np.log(np.exp(x_V).sum())


class RealModel:
  """A checkpoint, read from whole weights or from an adapter on top of its own."""

  def __init__(self, path):
    self.path = pathlib.Path(path)
    self.lock = threading.Lock()
    self.config, self.params = load_pretrained(path, dtype="float32")
    self.vocab = self.config.vocab
    self.engine = LocalEngine(self.config, rows=1)

  def read(self, path):
    path = pathlib.Path(path)
    if (path / "adapter_config.json").exists():
      path = self._add(path)
    return load_pretrained(path, dtype="float32")[1]

  def _add(self, path):
    """Adds an adapter to the checkpoint's own weights, as PEFT defines it."""
    c = json.loads((path / "adapter_config.json").read_text())
    adapter = load_file(path / "adapter_model.safetensors")
    weights = load_file(self.path / "model.safetensors")
    for name in adapter:
      if name.endswith(".lora_A.weight"):
        a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        name = name.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[name] = weights[name] + c["lora_alpha"] / c["r"] * (b @ a).astype(np.float32)
    merged = path.parent / f"{path.name}-merged"
    merged.mkdir()
    save_file(weights, merged / "model.safetensors")
    for file in ("config.json", "generation_config.json"):
      (merged / file).write_text((self.path / file).read_text())
    return merged

  def sample(self, weights, prompt, sampling, seed, mode="raw"):
    with self.lock:
      self.engine.load(self.params if weights == 0 else weights, 0)
      (done,) = self.engine.generate([Request(0, prompt, 1, sampling, seed)])
      return done.tokens, done.logp, done.logp, done.finish_reason


class StandIn:
  """A server. `before(path, body)` may raise; `edit(path, answer)` returns what is sent."""

  def __init__(self, model, mode="raw", port=0):
    self.model, self.mode = model, mode
    self.before = lambda path, body: None
    self.edit = lambda path, answer: answer
    self.asked = []  # (path, body, session) of each question
    self.port = port  # 0: one that is free
    self.start()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.port}"

  def start(self):
    self.forget()
    owner, self._sockets = self, []

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def setup(self):
        super().setup()
        owner._sockets.append(self.connection)

      def do_GET(self):
        self.answer(None)

      def do_POST(self):
        length = int(self.headers["content-length"])
        self.answer(json.loads(self.rfile.read(length)))

      def answer(self, body):
        try:
          status, content = 200, owner.reply(self.path, body, self.headers.get("x-session-id"))
        except Status as error:
          status, content = error.status, owner.error(error)
        except Drop:
          self.close_connection = True
          return
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

      def log_message(self, *_):
        pass

      def handle(self):
        try:
          super().handle()
        except OSError:  # its connection was cut
          pass

    self._http = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
    self._http.daemon_threads, self._http.block_on_close = True, False
    self.port = self._http.server_address[1]
    threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

  def stop(self):
    """Cuts all connections, as a killed process does."""
    self._http.shutdown()
    self._http.server_close()
    for connection in self._sockets:
      try:
        connection.shutdown(socket.SHUT_RDWR)
      except OSError:
        pass

  def reply(self, path, body, session):
    self.asked.append((path, body, session))
    self.before(path, body)
    if path not in self.routes:
      raise Status(404, "Not Found")
    method, fields = self.routes[path]
    if (body is None) != (fields is None):
      raise Status(405, "Method Not Allowed")
    if fields is not None:
      check_fields(body, fields)
    return self.edit(path, method(body))

  def error(self, error):
    if str(error) == "Not Found":
      return {"detail": "Not Found"}
    return {"error": {"message": str(error), "code": error.status}}

  def draw(self, weights, prompt, settings, seed):
    return self.model.sample(weights, prompt, Sampling(**settings), seed, self.mode)


def check_fields(body, fields):
  for name, value in body.items():
    if name not in fields:
      raise Status(400, f"unknown field {name!r}")
    if not isinstance(value, fields[name]):
      raise Status(422, f"{name}: {type(value).__name__} is no {fields[name]}")


class VllmStandIn(StandIn):
  """With a base model and adapters."""

  def __init__(self, model, name, **settings):
    self.name = name
    self.routes = {
      "/v1/models": (self.models, None),
      "/v1/completions": (self.complete, COMPLETION),
      "/v1/load_lora_adapter": (self.load, {"lora_name": str, "lora_path": str}),
      "/v1/unload_lora_adapter": (self.unload, {"lora_name": str}),
    }
    super().__init__(model, **settings)

  def forget(self):
    self.weights = {self.name: 0}

  def models(self, _):
    cards = [{"id": name, "object": "model", "max_model_len": 1024} for name in self.weights]
    return {"object": "list", "data": cards}

  def load(self, body):
    if body["lora_name"] in self.weights:
      raise Status(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
    self.weights[body["lora_name"]] = self.model.read(body["lora_path"])
    return f"Success: LoRA adapter '{body['lora_name']}' added successfully."

  def unload(self, body):
    if body["lora_name"] not in self.weights:
      raise Status(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
    del self.weights[body["lora_name"]]
    return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

  def complete(self, body):
    if body["model"] not in self.weights:
      raise Status(404, f"The model `{body['model']}` does not exist.")
    settings = {key: body[key] for key in ("temperature", "top_p", "top_k", "min_p")}
    settings |= {"max_new_tokens": body["max_tokens"], "stop_tokens": body["stop_token_ids"]}
    tokens, logp, top, reason = self.draw(
      self.weights[body["model"]], body["prompt"], settings, body["seed"]
    )
    logprobs = {
      "token_logprobs": logp,
      "tokens": [str(token) for token in tokens],
      "top_logprobs": [{"a": x, "b": y} for x, y in zip(logp, top)],
      "text_offset": [0] * len(tokens),
    }
    choice = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": reason}
    choice |= {"token_ids": tokens, "prompt_token_ids": body["prompt"]}
    return {"object": "text_completion", "model": body["model"], "choices": [choice]}


COMPLETION = {
  "model": str,
  "prompt": list,
  "max_tokens": int,
  "n": int,
  "temperature": NUMBER,
  "top_p": NUMBER,
  "top_k": int,
  "min_p": NUMBER,
  "presence_penalty": NUMBER,
  "frequency_penalty": NUMBER,
  "repetition_penalty": NUMBER,
  "seed": int,
  "stop": list,
  "stop_token_ids": list,
  "ignore_eos": bool,
  "logit_bias": dict,
  "logprobs": int,
  "return_token_ids": bool,
}


class SglangStandIn(StandIn):
  """With one set of weights, which has a version."""

  def __init__(self, model, **settings):
    self.routes = {
      "/model_info": (lambda _: {"weight_version": self.version, "is_generation": True}, None),
      "/server_info": (lambda _: INFO, None),
      "/generate": (self.complete, GENERATE),
      "/update_weights_from_disk": (
        self.update,
        {"model_path": str, "weight_version": str, "flush_cache": bool},
      ),
    }
    super().__init__(model, **settings)

  def forget(self):
    self.version, self.weights = "default", 0

  def update(self, body):
    self.weights, self.version = self.model.read(body["model_path"]), body["weight_version"]
    return {"success": True, "message": "Succeeded to update model weights."}

  def complete(self, body):
    asked = body["sampling_params"]
    check_fields(asked, SAMPLING)
    settings = {key: asked[key] for key in ("temperature", "top_p", "min_p", "max_new_tokens")}
    settings |= {"top_k": max(0, asked["top_k"]), "stop_tokens": asked["stop_token_ids"]}
    tokens, logp, top, reason = self.draw(
      self.weights, body["input_ids"], settings, asked["sampling_seed"]
    )
    info = {
      "finish_reason": {"type": reason},
      "prompt_tokens": len(body["input_ids"]),
      "weight_version": self.version,
      "output_token_logprobs": [[x, token, None] for x, token in zip(logp, tokens)],
    }
    if body["top_logprobs_num"]:
      info["output_top_logprobs"] = [[[x, 0, None]] for x in top]
    return {"text": "", "output_ids": tokens, "meta_info": info}


INFO = {
  "enable_deterministic_inference": True,
  "context_length": None,
  "max_req_input_len": 1023,
}
GENERATE = {
  "input_ids": list,
  "sampling_params": dict,
  "return_logprob": bool,
  "top_logprobs_num": int,
  "stream": bool,
}
SAMPLING = {
  "max_new_tokens": int,
  "temperature": NUMBER,
  "top_p": NUMBER,
  "top_k": int,
  "min_p": NUMBER,
  "presence_penalty": NUMBER,
  "frequency_penalty": NUMBER,
  "repetition_penalty": NUMBER,
  "sampling_seed": int,
  "stop": list,
  "stop_token_ids": list,
  "logit_bias": dict,
}
