"""A stand-in of `tests.servers` as a process, in the place of the command of a real server.

  python -m tests.serve_stand_in serve MODEL ... --port N                           as `vllm`
  python -m tests.serve_stand_in -m sglang.launch_server --model-path MODEL ... --port N

It reads the tiny model's weights from MODEL, and lets go on TERM.
"""

import signal
import sys

from tests.servers import RealModel, SglangStandIn, VllmStandIn


def main(words: list[str]) -> None:
  is_vllm = words[0] == "serve"
  path = words[1] if is_vllm else words[words.index("--model-path") + 1]
  port = int(words[words.index("--port") + 1])
  model = RealModel(path)
  server = VllmStandIn(model, path, port=port) if is_vllm else SglangStandIn(model, port=port)
  server.routes |= {"/health": (lambda _: "", None), "/health_generate": (lambda _: "", None)}
  server.routes |= {"/v1/models": (lambda _: {"data": [{"id": path}]}, None)} if not is_vllm else {}
  print("listening", flush=True)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  signal.pause()


if __name__ == "__main__":
  main(sys.argv[1:])
