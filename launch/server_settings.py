"""Says how the inference servers of a run have to be started; servers.sh asks it.

  python launch/server_settings.py vllm|sglang MODEL ARGUMENTS OF sdpo_jax.main

It prints, a line each: what is served, the name that it has there, and flags of the server. MODEL
is what is served, or empty: the model of the run. Nothing is loaded. Exit status: 0, or 2 with one
line for settings that the trainer would refuse.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # of a checkout that isn't installed

from sdpo_jax import config  # noqa: E402
from sdpo_jax import main as trainer

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows as --max-lora-rank


def flags(kind: str, c) -> list[str]:
  """Returns the flags with which a server of this kind does what the trainer asks of it."""
  if kind == "sglang":
    return ["--enable-deterministic-inference"]
  rank = c.model.lora.rank
  if rank > LORA_RANKS[-1]:
    raise ValueError(f"config.model.lora.rank={rank}: vLLM takes adapters up to {LORA_RANKS[-1]}")
  words = ["--enable-lora", "--max-lora-rank", str(next(x for x in LORA_RANKS if x >= rank))]
  if c.rollout.temperature != 1:
    words += ["--logprobs-mode", "processed_logprobs"]
  return words


def main(argv: list[str]) -> int:
  kind, model, *arguments = argv[1:]
  try:
    _, c = trainer.parse(["main", *arguments])
    config.validate(c)
    path = model or config.model_location(c.model.path)
    name = path
    if kind == "vllm":
      name = c.rollout.server.model or path
    samples = c.rollout.engine != "local"
    lines = [path, name, *(flags(kind, c) if samples else [])]
  except (trainer.UsageError, ValueError, OSError) as error:
    print(f"server_settings: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  print("\n".join(lines))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
