r"""Measures the local engine: useful tokens per second, memory of its cache, programs compiled.

  python -m sdpo_jax.bench rollout [--device=cpu|gpu|tpu] [--shape=small] [--rows=32] \
      [--mixes=equal,heavy,group,queue] [--lengths=FILE] [--json=FILE]

Weights are random, no token ends a response, and each request has its own limit, so that every run
samples the same number of tokens. Prompts have 128 tokens.

Mixes:
  equal   4 prompts, 8 samples each, 128 tokens
  heavy   4 prompts, 32 requests with log-normal lengths of median 60 and at most 1,000 tokens, or
          those of --lengths, a JSON list
  group   one prompt of 1,000 tokens: 8 samples of 2 tokens, and (as `alone_cpu_s`) one sample
  queue   256 requests, with the lengths of `heavy` again and again

A mix runs twice. The first run compiles, and counts the programs; the second is measured.

Units and definitions:

  tokens           sampled, all of them asked for
  cpu_s, time_s    processor seconds of all threads, and wall clock
  tokens_per_cpu_s, tokens_per_s
  first_s          until the first completion is handed out
  floor_s          the least time of the same schedule on this machine: for each step the longer of
                   reading the weights and the keys and values in use once at `memory_gb_s`, and
                   the products of the rows that live at `matrix_gflops`; the prompts' products
  of_floor         floor_s / cpu_s (of time_s on a GPU or TPU)
  live             rows that live, mean over steps
  cache_peak       pages in memory over what the tokens in them need, when most is in memory
  cache_mean       likewise, means over steps
  over_time        of each chunk of the measured run: steps, rows of the program, rows that live,
                   bytes of the cache, bytes that its tokens need (in the JSON alone)
  programs         compiled in the first run, all of them
  compile_s        wall seconds of the compiler
  memory_gb_s      at which a product of one row reads a large matrix, in the same process
  matrix_gflops    of a large product; both per processor second on a CPU

MB = 10^6 bytes.
"""

import argparse
import json
import time

from sdpo_jax.bench import child
from sdpo_jax.bench.step import SHAPES, lengths_of, matrix_rate
from sdpo_jax.bench.timing import best
from sdpo_jax.errors import local_path

MIXES = ("equal", "heavy", "group", "queue")
COLUMNS = (
  "mix",
  "tokens",
  "cpu_s",
  "time_s",
  "tokens_per_cpu_s",
  "tokens_per_s",
  "first_s",
  "floor_s",
  "of_floor",
  "live",
  "cache_peak",
  "cache_mean",
  "programs",
  "compile_s",
)


def main(argv):
  """Measures each mix in a child process; returns 1 if one has failed."""
  parser = argparse.ArgumentParser(
    prog="python -m sdpo_jax.bench rollout",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="cpu")
  parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--mixes", default=",".join(MIXES), help="comma-separated")
  parser.add_argument("--lengths", metavar="FILE", type=local_path)
  parser.add_argument(
    "--json", metavar="FILE", type=local_path, help="also write all results there"
  )
  parser.add_argument("--child", help=argparse.SUPPRESS)  # one measurement, as JSON
  args = parser.parse_args(argv)
  if args.child:
    print(json.dumps(_measure(**json.loads(args.child))))
    return 0
  if args.rows < 1:
    parser.error(f"--rows={args.rows} must be at least 1")
  mixes = args.mixes.split(",")
  for mix in mixes:
    if mix not in MIXES:
      parser.error(f"--mixes: {mix!r} must be one of {', '.join(MIXES)}")
  heavy = [new for _, _, new in lengths_of("heavy", 32)]
  if args.lengths:
    try:
      with open(args.lengths, encoding="utf-8") as file:
        heavy = [int(length) for length in json.load(file)]
      if not heavy or min(heavy) < 1:
        raise ValueError("a length is below 1" if heavy else "it holds no lengths")
    except (OSError, ValueError, TypeError) as error:
      parser.error(f"--lengths={args.lengths}: {error}; it must be a JSON list of numbers")
  results = []
  for mix in mixes:
    request = dict(mix=mix, device=args.device, shape=args.shape, rows=args.rows, lengths=heavy)
    result = child.measure("rollout", request)
    print(json.dumps({k: v for k, v in result.items() if k != "over_time"}), flush=True)
    results.append(result)
  if args.json:
    with open(args.json, "w") as file:
      json.dump(results, file, indent=1)
  print(child.table(COLUMNS, results, error_in="tokens"))
  return 1 if any("error" in result for result in results) else 0


def requests_of(mix: str, lengths: list[int], vocab: int) -> list:
  """Returns the requests of a mix; `lengths` are those of `heavy`."""
  import numpy as np

  from sdpo_jax.records import Request, Sampling

  dice = np.random.default_rng(0)
  prompts = dice.integers(3, vocab, (4, 1000 if mix == "group" else 128)).tolist()
  if mix == "equal":
    return [Request(i, prompt, 8, Sampling(128), i) for i, prompt in enumerate(prompts)]
  if mix == "group":
    return [Request(0, prompts[0], 8, Sampling(2), 0)]
  count = 256 if mix == "queue" else len(lengths)
  return [
    Request(i, prompts[i // 8 % 4], 1, Sampling(lengths[i % len(lengths)]), i) for i in range(count)
  ]


def _measure(mix: str, device: str, shape: str, rows: int, lengths: list[int]) -> dict:
  """Returns the figures of one mix."""
  import jax

  from sdpo_jax.engine.local import LocalEngine
  from sdpo_jax.model import decoder
  from sdpo_jax.model.config import ModelConfig

  dtype = "float32" if device == "cpu" else "bfloat16"
  model = ModelConfig(
    "qwen3", **SHAPES[shape], qk_norm="head", tied=True, dtype=dtype, param_dtype=dtype
  )
  engine = LocalEngine(model, rows=rows)
  engine.load(decoder.init(model, jax.random.key(0)), 0)
  requests = requests_of(mix, lengths, model.vocab)
  on_cpu = device == "cpu"  # per processor second, as everything there
  memory, matrix = _memory_rate(dtype, on_cpu), matrix_rate(1536, dtype, 5, clock=int(on_cpu))
  compiled = []

  def note(event: str, seconds: float, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(note)
  _run(engine, requests)
  programs = len(compiled), sum(compiled)
  tokens, cpu_s, time_s, first_s = _run(engine, requests)
  floor_s = _floor(engine, requests, memory, matrix)
  result = dict(
    mix=mix,
    device=jax.devices()[0].device_kind,
    shape=shape,
    rows=rows,
    tokens=tokens,
    cpu_s=cpu_s,
    time_s=time_s,
    tokens_per_cpu_s=tokens / cpu_s,
    tokens_per_s=tokens / time_s,
    first_s=first_s,
    floor_s=floor_s,
    of_floor=floor_s / (cpu_s if on_cpu else time_s),
    **_over_time(engine),
    programs=programs[0],
    compile_s=programs[1],
    memory_gb_s=memory / 1e9,
    matrix_gflops=matrix / 1e9,
  )
  if mix == "group":
    result["alone_cpu_s"] = _alone(engine, requests[0])
  return result


def _over_time(engine) -> dict:
  """Returns the figures of rows and cache during the last run."""
  width = _bytes_per_token(engine.config)
  steps = [snapshot.steps for snapshot in engine.trace]
  held = [snapshot.pages * engine.columns * width for snapshot in engine.trace]
  need = [snapshot.tokens * width for snapshot in engine.trace]
  most = max(held)
  return dict(
    live=_mean([snapshot.live for snapshot in engine.trace], steps),
    cache_peak=most / max(n for h, n in zip(held, need, strict=True) if h == most),
    cache_mean=_mean(held, steps) / _mean(need, steps),
    over_time=[
      [s.steps, s.rows, s.live, h, n] for s, h, n in zip(engine.trace, held, need, strict=True)
    ],
  )


def _alone(engine, request) -> float:
  """Returns the processor seconds of one sample of a request."""
  requests = [request._replace(n=1)]
  _run(engine, requests)
  return _run(engine, requests)[1]


def _run(engine, requests) -> tuple[int, float, float, float]:
  """Returns (tokens, processor seconds, wall seconds, seconds to the first completion)."""
  tokens, first_s = 0, None
  wall, cpu = time.perf_counter(), time.process_time()
  for completion in engine.generate(requests):
    first_s = first_s or time.perf_counter() - wall
    tokens += len(completion.tokens)
  return tokens, time.process_time() - cpu, time.perf_counter() - wall, first_s


def _mean(values: list[float], weights: list[int]) -> float:
  return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _floor(engine, requests, memory: float, matrix: float) -> float:
  """Returns the least seconds of what the engine did last."""
  import jax

  from sdpo_jax.model import decoder

  model = engine.config
  weights = sum(x.size for x in jax.tree.leaves(decoder.shapes(model)))
  width = 2 if model.dtype == "bfloat16" else 4
  per_token = _bytes_per_token(model)
  read = {tuple(request.prompt) for request in requests}
  seconds = sum(2 * weights * len(prompt) for prompt in read) / matrix
  for snapshot in engine.trace:
    moved = weights * width + snapshot.tokens * per_token
    products = 2 * weights * snapshot.live
    seconds += snapshot.steps * max(moved / memory, products / matrix)
  return seconds


def _bytes_per_token(model) -> int:
  """Returns the bytes of the keys and values of one token."""
  width = 2 if model.dtype == "bfloat16" else 4
  return 2 * model.layers * model.kv_heads * model.head_dim * width


def _memory_rate(dtype: str, on_cpu: bool) -> float:
  """Returns the bytes per second at which a product of one row reads a large matrix."""
  import jax
  import jax.numpy as jnp

  row, matrix = jnp.ones((1, 8192), dtype), jnp.ones((8192, 8192), dtype)
  product = jax.jit(jnp.matmul)
  return matrix.nbytes / best(lambda: product(row, matrix).block_until_ready(), 5)[on_cpu]
