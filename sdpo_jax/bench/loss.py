"""Time and memory of the distillation divergence, forward and backward, beside others' and the operations' floor.

  python -m sdpo_jax.bench loss [--device=cpu|gpu|tpu] [--shapes=1024x256x151936,...] [--alpha=0.5] [--dtype=float32]
                                [--implementations=reference,xla,...] [--json=FILE]

Every figure is taken in a child process of its own, so that no measurement sees another's memory or compilation.
One JSON object a line as they come in, then a table. Units and definitions:

  time_s            shortest of --repeats runs after one warm-up, wall clock; cpu_s: processor seconds of that run, all threads
  us_per_token      time_s / X; on CPU cpu_s / X, which other work on the machine disturbs less
  floor_us_per_token  4 products of 2 X D V operations at `matrix_tflops`, the rate of a large product in the same process (on CPU: of
                    one core)
  temporaries_mb    what the compiled program allocates beside arguments and results (the compiler's own figure)
  peak_mb           on CPU: highest resident memory of the whole process, runtime and compiler included, less the inputs;
                    on GPU and TPU: highest device memory in use during the runs, less the inputs. Gradients count:
                    gradients_mb in float32
  value_error, gradient_error   against the float32 reference at 64x128x70001: largest difference of a divergence, and
                    of a gradient relative to its largest entry. More than rounding explains fails the row
  peer_speedup      the peer's time over this one's, processor time on CPU and wall clock elsewhere: torch on CPU, liger
                    on GPU, where the same run measured it
  cores             processor cores that the run was allowed (one: `taskset -c 1 python -m sdpo_jax.bench loss`)

Implementations are those of kernels/distill_kl.py, where `reference` is the dense one in jax; `xla:weights` promises the
cotangents (weights_X); `torch` is the dense one in PyTorch (CPU), `liger` the fused linear JSD of liger-kernel in Triton
(GPU), each only where it is installed. A peer returns a mean alone: its value_error is that of the mean.
Shapes on GPU and TPU are the heads of Qwen3-0.6B, 1.7B and 8B.
The gradient is taken of the mean divergence. Heads repeat after 4096 random columns. MB = 10^6 bytes.

results/loss_cpu.json: `taskset -c 1 python -m sdpo_jax.bench loss --shapes=1024x256x151936 --repeats=1 --json=FILE`, jax 0.10.2
and torch 2.13.0 on one core of an Intel(R) Xeon(R) Processor shared with other work: its processor seconds count, not its wall clock.
"""

import argparse
import functools
import json
import math
import os
import subprocess
import sys

from sdpo_jax.bench.timing import best

SHAPES = {
  "cpu": "1024x256x151936,1024x128x704",
  "gpu": "8192x1024x151936,8192x2048x151936,8192x4096x151936",
  "tpu": "8192x1024x151936,8192x2048x151936,8192x4096x151936",
}
IMPLEMENTATIONS = {
  "cpu": "reference,xla,torch",
  "gpu": "reference,xla,xla:weights,pallas_gpu,liger",
  "tpu": "reference,xla,xla:weights,pallas_tpu",
}
PEERS = {"torch", "liger"}
# X, D, V of the comparison with the reference: large enough for blocks, and ragged
CHECKED = 64, 128, 70001
COLUMNS = (
  "shape",
  "dtype",
  "alpha",
  "implementation",
  "time_s",
  "cpu_s",
  "us_per_token",
  "floor_us_per_token",
  "temporaries_mb",
  "peak_mb",
  "gradient_error",
  "peer_speedup",
)


def main(argv):
  parser = argparse.ArgumentParser(
    prog="python -m sdpo_jax.bench loss",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--device", choices=sorted(SHAPES), default="cpu")
  parser.add_argument("--shapes", help="comma-separated XxDxV")
  parser.add_argument("--alpha", type=float, default=0.5)
  parser.add_argument(
    "--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, else bfloat16"
  )
  parser.add_argument("--implementations", help="comma-separated")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument(
    "--json", metavar="FILE", help="also write all results there, as one JSON list"
  )
  # one measurement, as JSON: what the parent starts
  parser.add_argument("--child", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.child:
    print(json.dumps(_measure(**json.loads(args.child))))
    return 0
  try:
    shapes = [
      tuple(map(int, shape.split("x"))) for shape in (args.shapes or SHAPES[args.device]).split(",")
    ]
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
      raise ValueError
  except ValueError:
    parser.error(f"--shapes={args.shapes} must look like 1024x256x151936,8192x1024x151936")
  dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
  rows, failed = [], 0
  for shape in shapes:
    for implementation in (args.implementations or IMPLEMENTATIONS[args.device]).split(","):
      request = dict(
        device=args.device,
        shape=shape,
        alpha=args.alpha,
        dtype=dtype,
        implementation=implementation,
        repeats=args.repeats,
      )
      child = subprocess.run(
        [sys.executable, "-m", "sdpo_jax.bench", "loss", "--child", json.dumps(request)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ
        | {
          "JAX_PLATFORMS": {"gpu": "cuda"}.get(args.device, args.device),
          # the last line is then the error
          "JAX_TRACEBACK_FILTERING": "off",
        },
      )
      if child.returncode:
        why = (child.stderr.strip().splitlines() or ["no output"])[-1]
        result = request | {"error": f"exit {child.returncode}: {why}"}
        failed += not (implementation in PEERS and "ModuleNotFoundError: No module named" in why)
      else:
        result = json.loads(child.stdout.splitlines()[-1])
      print(json.dumps(result), flush=True)
      rows.append(result)
      if args.json:  # at once: a long table may be cut short
        with open(args.json, "w") as f:
          json.dump(with_speedups(rows), f, indent=1)
  print(table(with_speedups(rows)))
  return 1 if failed else 0


def with_speedups(rows):
  """rows, with peer_speedup where the same shape's peer was measured."""
  key = lambda row: (tuple(row["shape"]), row["alpha"], row["dtype"])
  cost = lambda row: _cost(row["device"], row)
  peers = {
    key(row): cost(row) for row in rows if row["implementation"] in PEERS and "error" not in row
  }
  return [
    row | {"peer_speedup": peers[key(row)] / cost(row)}
    if key(row) in peers and "error" not in row
    else row
    for row in rows
  ]


def _cost(device, row):
  return row["cpu_s" if device == "cpu" else "time_s"]


def table(rows):
  """Markdown; a missing figure is left empty, a failed measurement says so."""

  def cell(row, column):
    value = row.get(column, row.get("error", "") if column == "time_s" else "")
    if column == "shape":
      return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)

  lines = [list(COLUMNS), ["---"] * len(COLUMNS)] + [
    [cell(row, c) for c in COLUMNS] for row in rows
  ]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measure(*, device, shape, alpha, dtype, implementation, repeats):
  X, D, V = shape
  run = _peer if implementation in PEERS else _jax
  result = run(
    _problem(shape, dtype), alpha, implementation, device, repeats, _problem(CHECKED, dtype)
  )
  floor = 4 * 2 * D * V / (result["matrix_tflops"] * 1e12) * 1e6
  # Values: float32 sums. Gradients: dlogits and results are rounded to dtype; tensor cores and
  # torch reorder sums.
  value, gradient = (1e-3, 0.03) if dtype == "bfloat16" else (1e-4, 1e-3)
  if implementation not in PEERS and not (
    result["value_error"] <= value and result["gradient_error"] <= gradient
  ):
    raise ArithmeticError(
      f"off the reference at {CHECKED}: values by {result['value_error']}, gradients by {result['gradient_error']}"
    )
  return (
    dict(device=device, shape=shape, alpha=alpha, dtype=dtype, implementation=implementation)
    | result
    | {
      "us_per_token": _cost(device, result) / X * 1e6,
      "floor_us_per_token": floor,
      "gradients_mb": 4 * D * (X + V) / 1e6,
      "cores": len(os.sched_getaffinity(0)),
    }
  )


def _problem(shape, dtype):
  """[h, w, g, u, target] in NumPy."""
  import ml_dtypes
  import numpy as np

  X, D, V = shape
  rng = np.random.default_rng(0)
  cast = lambda x: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
  normal = lambda *s, scale=1.0: cast(rng.standard_normal(s, np.float32) * np.float32(scale))
  head = lambda: np.tile(normal(D, min(V, 4096), scale=D**-0.5), -(-V // 4096))[:, :V]
  return [normal(X, D), head(), normal(X, D), head(), rng.integers(0, V, X).astype(np.int32)]


def _resident_peak():
  import resource

  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _jax(problem, alpha, implementation, device, repeats, checked):
  import jax
  import jax.numpy as jnp
  import numpy as np

  from sdpo_jax.kernels.distill_kl import distill_kl

  name, _, option = implementation.partition(":")
  if option not in ("", "weights"):
    raise ValueError(f"implementation {implementation!r}: the only option is ':weights'")
  inputs = []
  while problem:  # one at a time, so that host and device copies do not pile up
    inputs.append(jnp.asarray(problem.pop(0)))

  def loss(h, w, g, u, y, name=name):
    X = y.shape[0]
    weights = jnp.full(X, 1 / X, jnp.float32) if option and name == "xla" else None
    divergence_X = distill_kl(
      h, w, g, u, y, alpha=alpha, implementation=name, weights_X=weights
    ).divergence_X
    return jnp.sum(divergence_X) / X, divergence_X

  gradients = jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1))
  step = jax.jit(gradients).lower(*inputs).compile()
  jax.block_until_ready(inputs)
  wall, cpu = best(lambda: jax.block_until_ready(step(*inputs)), repeats)
  input_bytes = sum(x.nbytes for x in inputs)
  here = jax.devices()[0]
  peak = _resident_peak() if here.platform == "cpu" else here.memory_stats()["peak_bytes_in_use"]
  del inputs
  n = 2048 if here.platform == "cpu" else 8192
  a = jax.random.normal(jax.random.key(0), (n, n)).astype(checked[0].dtype)
  product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
  rate = (
    2 * n**3 / best(lambda: product(a).block_until_ready(), repeats)[here.platform == "cpu"] / 1e12
  )

  both = lambda name: jax.jit(
    jax.value_and_grad(functools.partial(loss, name=name), argnums=(0, 1), has_aux=True)
  )
  (_, got), got_grads = both(name)(*checked)
  (_, want), want_grads = both("reference")(
    *[x.astype(np.float32) for x in checked[:4]], checked[4]
  )
  return dict(
    time_s=wall,
    cpu_s=cpu,
    temporaries_mb=step.memory_analysis().temp_size_in_bytes / 1e6,
    peak_mb=(peak - input_bytes) / 1e6,
    matrix_tflops=rate,
    device_kind=here.device_kind,
    jax=jax.__version__,
    **_errors(got, got_grads, want, want_grads),
  )


def _errors(got, got_grads, want, want_grads):
  import numpy as np

  f32 = lambda x: np.asarray(x).astype(np.float32)
  off = [
    np.abs(f32(a) - f32(b)).max() / np.abs(f32(b)).max() for a, b in zip(got_grads, want_grads)
  ]
  return dict(value_error=float(np.abs(f32(got) - f32(want)).max()), gradient_error=float(max(off)))


def _peer(problem, alpha, implementation, device, repeats, checked):
  import numpy as np
  import torch

  where = "cuda" if device == "gpu" else device
  wait = torch.cuda.synchronize if where == "cuda" else lambda: None
  step = _liger if implementation == "liger" else _torch
  dtype = torch.bfloat16 if checked[0].dtype.itemsize == 2 else torch.float32

  def tensors(problem):
    out = []
    while problem:
      x = torch.from_numpy(
        np.ascontiguousarray(
          problem[0].T if implementation == "liger" and len(out) in (1, 3) else problem[0],
          # liger's heads are [V, D]
          np.float32 if len(out) < 4 else np.int64,
        )
      )
      out.append(x.to(where, dtype) if len(out) < 4 else x.to(where))
      problem.pop(0)
    for x in out[:2]:
      x.requires_grad_()
    return out

  def run(h, w, *others):
    h.grad = w.grad = None
    loss = step(h, w, *others, alpha)
    loss.backward()
    wait()
    return loss

  inputs = tensors(problem)
  input_bytes = sum(x.nbytes for x in inputs)
  wall, cpu = best(lambda: run(*inputs), repeats)
  peak = _resident_peak() if where == "cpu" else torch.cuda.max_memory_allocated()
  del inputs
  n = 2048 if where == "cpu" else 8192
  a = torch.randn(n, n, dtype=dtype, device=where)
  rate = 2 * n**3 / best(lambda: (a @ a, wait()), repeats)[where == "cpu"] / 1e12

  numpy = lambda x: x.detach().float().cpu().numpy()
  # on the CPU: no shortened products
  exact = [torch.from_numpy(x.astype(np.float32)) for x in checked[:4]]
  exact[0].requires_grad_(), exact[1].requires_grad_()
  want = _torch(*exact, None, alpha)
  want.backward()
  small = tensors(checked)
  got = run(*small)
  got_head = small[1].grad.T if implementation == "liger" else small[1].grad
  return dict(
    time_s=wall,
    cpu_s=cpu,
    peak_mb=(peak - input_bytes) / 1e6,
    matrix_tflops=rate,
    torch=torch.__version__,
    device_kind=torch.cuda.get_device_name() if where == "cuda" else "cpu",
    **_errors(
      numpy(got),
      map(numpy, (small[0].grad, got_head)),
      numpy(want),
      map(numpy, (exact[0].grad, exact[1].grad)),
    ),
  )


def _torch(h, w, g, u, target, alpha):
  """The mean divergence, dense."""
  import torch

  del target
  s = torch.log_softmax((h @ w).float(), -1)
  with torch.no_grad():
    t = torch.log_softmax((g @ u).float(), -1)
  # KL(a || b)
  kl = lambda a, b: torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)
  if alpha == 0:
    return kl(t, s).mean()
  if alpha == 1:
    return kl(s, t).mean()
  m = torch.logsumexp(torch.stack([s + math.log1p(-alpha), t + math.log(alpha)]), 0)
  return ((1 - alpha) * kl(s, m) + alpha * kl(t, m)).mean()


def _liger(h, w_VD, g, u_VE, target, alpha):
  from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

  return LigerFusedLinearJSDFunction.apply(h, w_VD, g, u_VE, target, alpha)
