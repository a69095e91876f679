"""Time and memory of the distillation divergence, forward and backward, beside a dense one and the operations' floor.

  python -m sdpo_jax.bench loss [--device=cpu|gpu|tpu] [--shapes=1024x256x151936,...] [--alpha=0.5] [--dtype=float32]
                                [--implementations=reference,xla,...] [--json=FILE]

Every figure is taken in a child process of its own, so that no measurement sees another's memory or compilation.
One JSON object a line as they come in, then a table. Units and definitions:

  time_s            shortest of --repeats runs after one warm-up, wall clock; cpu_s: processor seconds of that run, all threads
  us_per_token      time_s / X
  floor_us_per_token  4 products of 2 X D V operations at `matrix_tflops`, the rate of a large product in the same process
  temporaries_mb    what the compiled program allocates beside arguments and results (the compiler's own figure)
  peak_mb           on CPU: highest resident memory of the whole process, runtime and compiler included, less the inputs;
                    on GPU and TPU: highest device memory in use during the runs, less the inputs. Gradients count.

Implementations are those of kernels/distill_kl.py, where `reference` is the dense one in jax; `xla:weights` promises the
cotangents (weights_X); `torch` is the dense one in PyTorch (where it is installed, CPU only).
The gradient is taken of the mean divergence. MB = 10^6 bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import time

SHAPES = {"cpu": "1024x256x151936,1024x128x704",
          "gpu": "8192x1024x151936,8192x2048x151936,8192x4096x151936",
          "tpu": "8192x1024x151936,8192x2048x151936,8192x4096x151936"}
IMPLEMENTATIONS = {"cpu": "reference,xla,torch", "gpu": "reference,xla,xla:weights",
                   "tpu": "reference,xla,xla:weights,pallas_tpu"}
COLUMNS = ("shape", "dtype", "alpha", "implementation", "time_s", "cpu_s", "us_per_token", "floor_us_per_token",
           "temporaries_mb", "peak_mb")


def main(argv):
  parser = argparse.ArgumentParser(prog="python -m sdpo_jax.bench loss", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--device", choices=sorted(SHAPES), default="cpu")
  parser.add_argument("--shapes", help="comma-separated XxDxV")
  parser.add_argument("--alpha", type=float, default=0.5)
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, else bfloat16")
  parser.add_argument("--implementations", help="comma-separated")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--json", metavar="FILE", help="also write all results there, as one JSON list")
  parser.add_argument("--child", help=argparse.SUPPRESS)  # one measurement, as JSON: what the parent starts
  args = parser.parse_args(argv)
  if args.child:
    print(json.dumps(_measure(**json.loads(args.child))))
    return 0
  try:
    shapes = [tuple(map(int, shape.split("x"))) for shape in (args.shapes or SHAPES[args.device]).split(",")]
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
      raise ValueError
  except ValueError:
    parser.error(f"--shapes={args.shapes} must look like 1024x256x151936,8192x1024x151936")
  dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
  rows, failed = [], 0
  for shape in shapes:
    for implementation in (args.implementations or IMPLEMENTATIONS[args.device]).split(","):
      request = dict(device=args.device, shape=shape, alpha=args.alpha, dtype=dtype, implementation=implementation,
                     repeats=args.repeats)
      child = subprocess.run([sys.executable, "-m", "sdpo_jax.bench", "loss", "--child", json.dumps(request)],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False,
                             env=os.environ | {"JAX_PLATFORMS": {"gpu": "cuda"}.get(args.device, args.device),
                                               "JAX_TRACEBACK_FILTERING": "off"})  # the last line is then the error
      if child.returncode:
        why = (child.stderr.strip().splitlines() or ["no output"])[-1]
        result = request | {"error": f"exit {child.returncode}: {why}"}
        failed += "ModuleNotFoundError: No module named 'torch'" not in why
      else:
        result = json.loads(child.stdout.splitlines()[-1])
      print(json.dumps(result), flush=True)
      rows.append(result)
  if args.json:
    with open(args.json, "w") as f:
      json.dump(rows, f, indent=1)
  print(table(rows))
  return 1 if failed else 0


def table(rows):
  """Markdown; a missing figure is left empty, a failed measurement says so."""
  def cell(row, column):
    value = row.get(column, row.get("error", "") if column == "time_s" else "")
    if column == "shape":
      return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)

  lines = [list(COLUMNS), ["---"] * len(COLUMNS)] + [[cell(row, c) for c in COLUMNS] for row in rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measure(*, device, shape, alpha, dtype, implementation, repeats):
  import numpy as np

  X, D, V = shape
  rng = np.random.default_rng(0)
  normal = lambda *s, scale=1.0: rng.standard_normal(s, np.float32) * np.float32(scale)
  arrays = [normal(X, D), normal(D, V, scale=D**-0.5), normal(X, D), normal(D, V, scale=D**-0.5)]
  target = rng.integers(0, V, X)
  run = _torch if implementation == "torch" else _jax
  result = run(arrays, target, alpha, dtype, implementation, repeats)
  floor = 4 * 2 * D * V / (result["matrix_tflops"] * 1e12) * 1e6
  return dict(device=device, shape=shape, alpha=alpha, dtype=dtype, implementation=implementation) | result | {
      "us_per_token": result["time_s"] / X * 1e6, "floor_us_per_token": floor}


def _best(run, repeats):
  """(wall seconds, processor seconds) of the fastest of several runs after a warm-up."""
  run()
  times = []
  for _ in range(repeats):
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    times.append((time.perf_counter() - wall, time.process_time() - cpu))
  return min(times)


def _resident_peak():
  import resource
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _jax(arrays, target, alpha, dtype, implementation, repeats):
  import jax
  import jax.numpy as jnp

  from sdpo_jax.kernels.distill_kl import distill_kl

  name, _, option = implementation.partition(":")
  if option not in ("", "weights"):
    raise ValueError(f"implementation {implementation!r}: the only option is ':weights'")
  inputs = []
  while arrays:  # one at a time, so that the float32 originals do not pile up
    inputs.append(jnp.asarray(arrays.pop(0)).astype(dtype))
  target = jnp.asarray(target, jnp.int32)
  X = target.shape[0]

  def loss(h, w, g, u, y):
    weights = jnp.full(X, 1 / X, jnp.float32) if option else None
    return jnp.sum(distill_kl(h, w, g, u, y, alpha=alpha, implementation=name, weights_X=weights).divergence_X) / X

  step = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*inputs, target).compile()
  jax.block_until_ready(inputs)
  wall, cpu = _best(lambda: jax.block_until_ready(step(*inputs, target)), repeats)
  input_bytes = sum(x.nbytes for x in inputs)
  device = jax.devices()[0]
  peak = _resident_peak() if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"]
  n = 2048 if device.platform == "cpu" else 8192
  a = jnp.ones((n, n), dtype)
  product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
  rate = 2 * n**3 / _best(lambda: product(a).block_until_ready(), repeats)[0] / 1e12
  return dict(time_s=wall, cpu_s=cpu, temporaries_mb=step.memory_analysis().temp_size_in_bytes / 1e6,
              peak_mb=(peak - input_bytes) / 1e6, matrix_tflops=rate, device_kind=device.device_kind, jax=jax.__version__)


def _torch(arrays, target, alpha, dtype, implementation, repeats):
  import torch

  del implementation
  h, w, g, u = [torch.from_numpy(a).to(getattr(torch, dtype)) for a in arrays]
  input_bytes = sum(x.nbytes for x in (h, w, g, u))
  del arrays[:]
  h.requires_grad_(), w.requires_grad_()

  def step():
    h.grad = w.grad = None
    s = torch.log_softmax((h @ w).float(), -1)
    with torch.no_grad():
      t = torch.log_softmax((g @ u).float(), -1)
    kl = lambda a, b: torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)  # KL(a || b)
    if alpha == 0:
      divergence = kl(t, s)
    elif alpha == 1:
      divergence = kl(s, t)
    else:
      m = torch.logsumexp(torch.stack([s + torch.log1p(torch.tensor(-alpha)), t + torch.log(torch.tensor(alpha))]), 0)
      divergence = (1 - alpha) * kl(s, m) + alpha * kl(t, m)
    divergence.mean().backward()

  wall, cpu = _best(step, repeats)
  peak = _resident_peak()
  a = torch.ones(2048, 2048, dtype=h.dtype)
  rate = 2 * 2048**3 / _best(lambda: a @ a, repeats)[0] / 1e12
  return dict(time_s=wall, cpu_s=cpu, peak_mb=(peak - input_bytes) / 1e6, matrix_tflops=rate, device_kind="cpu",
              torch=torch.__version__)
