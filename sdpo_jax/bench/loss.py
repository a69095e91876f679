"""Measures time and memory of the distillation divergence, forward and backward.

Other implementations' figures stand beside ours, and the floor that the operations set.

  python -m sdpo_jax.bench loss [--device=cpu|gpu|tpu] [--shapes=1024x256x151936,...]
                                [--alpha=0.5] [--dtype=float32]
                                [--implementations=reference,xla,...] [--json=FILE]

Every figure is taken in a child process of its own, so that no measurement sees another's memory or
compilation. One JSON object a line comes first, as they arrive, then a table.

Units and definitions; MB = 10^6 bytes:

  time_s              shortest of --repeats runs after one warm-up, wall clock
  cpu_s               processor seconds of that run, all threads
  us_per_token        time_s / X; on CPU cpu_s / X, which other work on the machine disturbs less
  floor_us_per_token  4 products of 2 X D V operations at `matrix_tflops`, the rate of a large
                      product in the same process (on CPU: of one core)
  temporaries_mb      what the compiled program allocates beside arguments and results (the
                      compiler's own figure)
  peak_mb             on CPU: highest resident memory of the whole process, runtime and compiler
                      included, less the inputs; on GPU and TPU: highest device memory in use
                      during the runs, less the inputs. Gradients count: gradients_mb in float32
  value_error         largest difference of a divergence from the float32 reference's, at
                      64x128x70001
  gradient_error      likewise of a gradient, relative to its largest entry. A row whose errors
                      exceed what rounding explains fails
  peer_speedup        the peer's time over this one's, processor time on CPU and wall clock
                      elsewhere: torch on CPU, liger on GPU, where the same run measured it
  cores               processor cores that the run was allowed
                      (one: `taskset -c 1 python -m sdpo_jax.bench loss`)

Implementations are those of kernels/distill_kl.py, where `reference` is the dense one in jax.
`xla:weights` promises the cotangents (weights_X). `torch` is the dense one in PyTorch (CPU), and
`liger` the fused linear JSD of liger-kernel in Triton (GPU), each only where it is installed. A
peer returns a mean alone: its value_error is that of the mean.
Shapes on GPU and TPU are the heads of Qwen3-0.6B, 1.7B and 8B. The gradient is taken of the mean
divergence. Heads repeat after 4096 random columns.

results/loss_cpu.json was written by
  taskset -c 1 python -m sdpo_jax.bench loss --shapes=1024x256x151936 --repeats=1 --json=FILE
with jax 0.10.2 and torch 2.13.0, on one core of an Intel(R) Xeon(R) Processor that was shared with
other work: its processor seconds count, not its wall clock.
"""

import argparse
import functools
import json
import math
import os

from sdpo_jax.bench import child
from sdpo_jax.bench.timing import best
from sdpo_jax.errors import local_path

# jax, torch and NumPy are imported where they are used: the parent process measures nothing, and a
# child's memory must not hold the other framework.

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
  """Measures every shape by every implementation. Returns 1 if a measurement failed, else 0."""
  parser = _parser()
  args = parser.parse_args(argv)
  if args.child:
    print(json.dumps(_measure(**json.loads(args.child))))
    return 0
  try:
    shapes = _parse_shapes(args.shapes or SHAPES[args.device])
  except ValueError:
    parser.error(f"--shapes={args.shapes} must look like 1024x256x151936,8192x1024x151936")
  implementations = (args.implementations or IMPLEMENTATIONS[args.device]).split(",")
  rows, has_failed = [], False
  for shape in shapes:
    for implementation in implementations:
      request = dict(
        device=args.device,
        shape=shape,
        alpha=args.alpha,
        dtype=args.dtype or ("float32" if args.device == "cpu" else "bfloat16"),
        implementation=implementation,
        repeats=args.repeats,
      )
      row = child.measure("loss", request)
      has_failed |= "error" in row and not _is_missing_peer(row)
      print(json.dumps(row), flush=True)
      rows.append(row)
      if args.json:  # at once: a long table may be cut short
        with open(args.json, "w") as f:
          json.dump(with_speedups(rows), f, indent=1)
  print(child.table(COLUMNS, with_speedups(rows), error_in="time_s"))
  return int(has_failed)


def _parser():
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
    "--json",
    metavar="FILE",
    type=local_path,
    help="also write all results there, as one JSON list",
  )
  # one measurement, as JSON: what the parent starts
  parser.add_argument("--child", help=argparse.SUPPRESS)
  return parser


def _parse_shapes(text):
  """Returns [(X, D, V)] from "XxDxV,..."; ValueError for anything else."""
  shapes = [tuple(map(int, shape.split("x"))) for shape in text.split(",")]
  if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
    raise ValueError(text)
  return shapes


# ---- rows of the table


def _is_missing_peer(row):
  """Tells whether a row failed only because a peer is not installed."""
  is_peer = row["implementation"] in PEERS
  return is_peer and "ModuleNotFoundError: No module named" in row["error"]


def with_speedups(rows):
  """Returns the rows, with peer_speedup where the same shape's peer was measured."""
  peer_costs = {}
  for row in rows:
    if row["implementation"] in PEERS and "error" not in row:
      peer_costs[_problem_key(row)] = _cost(row["device"], row)
  result = []
  for row in rows:
    peer_cost = peer_costs.get(_problem_key(row))
    if peer_cost is not None and "error" not in row:
      row = row | {"peer_speedup": peer_cost / _cost(row["device"], row)}
    result.append(row)
  return result


def _problem_key(row):
  return tuple(row["shape"]), row["alpha"], row["dtype"]


def _cost(device, row):
  return row["cpu_s" if device == "cpu" else "time_s"]


# ---- one measurement, in a child process


def _measure(*, device, shape, alpha, dtype, implementation, repeats):
  """Returns a row. ArithmeticError if an implementation of ours is off the reference."""
  X, D, V = shape
  run = _measure_peer if implementation in PEERS else _measure_jax
  problem, checked = _problem(shape, dtype), _problem(CHECKED, dtype)
  result = run(problem, alpha, implementation, device, repeats, checked)
  if implementation not in PEERS:
    _check_errors(result, dtype)
  request = dict(
    device=device, shape=shape, alpha=alpha, dtype=dtype, implementation=implementation
  )
  floor_s = 4 * 2 * D * V / (result["matrix_tflops"] * 1e12)  # a token
  derived = {
    "us_per_token": _cost(device, result) / X * 1e6,
    "floor_us_per_token": floor_s * 1e6,
    "gradients_mb": 4 * D * (X + V) / 1e6,
    "cores": len(os.sched_getaffinity(0)),
  }
  return request | result | derived


def _check_errors(result, dtype):
  # Values: float32 sums. Gradients: dlogits and results are rounded to dtype; tensor cores and
  # torch reorder sums.
  max_value, max_gradient = (1e-3, 0.03) if dtype == "bfloat16" else (1e-4, 1e-3)
  value, gradient = result["value_error"], result["gradient_error"]
  if not (value <= max_value and gradient <= max_gradient):  # so written for NaN
    raise ArithmeticError(
      f"off the reference at {CHECKED}: values by {value}, gradients by {gradient}"
    )


def _problem(shape, dtype):
  """Returns [policy hidden, policy head, teacher hidden, teacher head, target] in NumPy."""
  import ml_dtypes
  import numpy as np

  X, D, V = shape
  rng = np.random.default_rng(0)

  def normal(*size, scale=1.0):
    x = rng.standard_normal(size, np.float32) * np.float32(scale)
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)

  def head():
    return np.tile(normal(D, min(V, 4096), scale=D**-0.5), -(-V // 4096))[:, :V]

  return [normal(X, D), head(), normal(X, D), head(), rng.integers(0, V, X).astype(np.int32)]


def _resident_peak():
  import resource

  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _errors(values, gradients, exact_values, exact_gradients):
  import numpy as np

  def float32(x):
    return np.asarray(x).astype(np.float32)

  def off_by(x, exact):
    return np.abs(float32(x) - float32(exact)).max()

  gradient_errors = [
    off_by(x, exact) / np.abs(float32(exact)).max()
    for x, exact in zip(gradients, exact_gradients, strict=True)
  ]
  return dict(
    value_error=float(off_by(values, exact_values)), gradient_error=float(max(gradient_errors))
  )


# ---- jax


def _measure_jax(problem, alpha, implementation, device, repeats, checked):
  """Returns the measured part of a row. `problem` is emptied, so that it does not count."""
  import jax
  import numpy as np

  del device  # JAX_PLATFORMS names it
  name, _, option = implementation.partition(":")
  if option not in ("", "weights"):
    raise ValueError(f"implementation {implementation!r}: the only option is ':weights'")
  promises_weights = option == "weights" and name == "xla"
  loss = functools.partial(
    _mean_divergence, alpha=alpha, name=name, promises_weights=promises_weights
  )
  exact_loss = functools.partial(_mean_divergence, alpha=alpha, name="reference")
  timed = _time_jax(problem, loss, repeats)
  rate = _jax_matrix_tflops(checked[0].dtype, repeats)

  def value_and_gradients(loss, arrays):
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, divergence_X), gradients = run(*arrays)
    return divergence_X, gradients

  in_float32 = [x.astype(np.float32) for x in checked[:4]]
  result = value_and_gradients(loss, checked)
  exact = value_and_gradients(exact_loss, [*in_float32, checked[4]])
  return timed | dict(
    matrix_tflops=rate,
    device_kind=jax.devices()[0].device_kind,
    jax=jax.__version__,
    **_errors(*result, *exact),
  )


def _mean_divergence(*arrays, alpha, name, promises_weights=False):
  """Returns (mean divergence, divergence_X)."""
  import jax.numpy as jnp

  from sdpo_jax.kernels.distill_kl import distill_kl

  X = arrays[-1].shape[0]
  weights_X = jnp.full(X, 1 / X, jnp.float32) if promises_weights else None
  result = distill_kl(*arrays, alpha=alpha, implementation=name, weights_X=weights_X)
  return jnp.sum(result.divergence_X) / X, result.divergence_X


def _time_jax(problem, loss, repeats):
  """Returns time and memory of the gradient of `loss`. The inputs are gone when it returns."""
  import jax
  import jax.numpy as jnp

  inputs = []
  while problem:  # one at a time, so that host and device copies do not pile up
    inputs.append(jnp.asarray(problem.pop(0)))
  gradients = jax.grad(lambda *arrays: loss(*arrays)[0], argnums=(0, 1))
  step = jax.jit(gradients).lower(*inputs).compile()
  jax.block_until_ready(inputs)
  wall_s, cpu_s = best(lambda: jax.block_until_ready(step(*inputs)), repeats)
  device = jax.devices()[0]
  if device.platform == "cpu":
    peak_bytes = _resident_peak()
  else:
    peak_bytes = device.memory_stats()["peak_bytes_in_use"]
  return dict(
    time_s=wall_s,
    cpu_s=cpu_s,
    temporaries_mb=step.memory_analysis().temp_size_in_bytes / 1e6,
    peak_mb=(peak_bytes - sum(x.nbytes for x in inputs)) / 1e6,
  )


def _jax_matrix_tflops(dtype, repeats):
  """Returns the rate of a large square product, in 10^12 operations a second."""
  import jax
  import jax.numpy as jnp

  on_cpu = jax.devices()[0].platform == "cpu"
  n = 2048 if on_cpu else 8192
  matrix = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
  product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
  wall_s, cpu_s = best(lambda: product(matrix).block_until_ready(), repeats)
  return 2 * n**3 / (cpu_s if on_cpu else wall_s) / 1e12


# ---- peers


def _measure_peer(problem, alpha, implementation, device, repeats, checked):
  """Returns the measured part of a row. Both problems are emptied, so that they do not count."""
  import numpy as np
  import torch

  where = "cuda" if device == "gpu" else device
  step = _liger if implementation == "liger" else _torch
  dtype = torch.bfloat16 if checked[0].dtype.itemsize == 2 else torch.float32
  to_torch = functools.partial(_to_torch, implementation=implementation, where=where, dtype=dtype)
  timed = _time_peer(to_torch(problem), step, alpha, where, repeats)
  rate = _torch_matrix_tflops(dtype, where, repeats)

  def to_numpy(x):
    return x.detach().float().cpu().numpy()

  # The definition runs on the CPU, where no product is shortened.
  exact = [torch.from_numpy(x.astype(np.float32)) for x in checked[:4]]
  exact[0].requires_grad_()
  exact[1].requires_grad_()
  exact_loss = _torch(*exact, None, alpha)
  exact_loss.backward()
  inputs = to_torch(checked)
  loss = step(*inputs, alpha)
  loss.backward()
  _synchronise(where)
  head_gradient = inputs[1].grad.T if implementation == "liger" else inputs[1].grad
  gradients = [to_numpy(inputs[0].grad), to_numpy(head_gradient)]
  exact_gradients = [to_numpy(exact[0].grad), to_numpy(exact[1].grad)]
  errors = _errors(to_numpy(loss), gradients, to_numpy(exact_loss), exact_gradients)
  return timed | dict(
    matrix_tflops=rate,
    torch=torch.__version__,
    device_kind=torch.cuda.get_device_name() if where == "cuda" else "cpu",
    **errors,
  )


def _to_torch(problem, *, implementation, where, dtype):
  """Returns the problem as tensors, and empties it on the way; liger's heads are [V, D]."""
  import numpy as np
  import torch

  tensors = []
  while problem:
    is_target = len(tensors) == 4
    is_head = len(tensors) in (1, 3)
    array = problem.pop(0)
    if is_head and implementation == "liger":
      array = array.T
    array = np.ascontiguousarray(array, np.int64 if is_target else np.float32)
    tensor = torch.from_numpy(array)
    tensors.append(tensor.to(where) if is_target else tensor.to(where, dtype))
  tensors[0].requires_grad_()
  tensors[1].requires_grad_()
  return tensors


def _time_peer(inputs, step, alpha, where, repeats):
  """Returns time and memory of a peer's loss and gradients."""
  import torch

  def run():
    inputs[0].grad = inputs[1].grad = None
    step(*inputs, alpha).backward()
    _synchronise(where)

  input_bytes = sum(x.nbytes for x in inputs)
  wall_s, cpu_s = best(run, repeats)
  peak_bytes = _resident_peak() if where == "cpu" else torch.cuda.max_memory_allocated()
  return dict(time_s=wall_s, cpu_s=cpu_s, peak_mb=(peak_bytes - input_bytes) / 1e6)


def _torch_matrix_tflops(dtype, where, repeats):
  """Returns the rate of a large square product, in 10^12 operations a second."""
  import torch

  n = 2048 if where == "cpu" else 8192
  matrix = torch.randn(n, n, dtype=dtype, device=where)

  def run():
    product = matrix @ matrix
    _synchronise(where)
    return product

  wall_s, cpu_s = best(run, repeats)
  return 2 * n**3 / (cpu_s if where == "cpu" else wall_s) / 1e12


def _synchronise(where):
  if where == "cuda":
    import torch

    torch.cuda.synchronize()


def _torch(hidden, head, teacher_hidden, teacher_head, target, alpha):
  """Returns the mean divergence from whole logits."""
  import torch

  del target
  policy = torch.log_softmax((hidden @ head).float(), -1)
  with torch.no_grad():
    teacher = torch.log_softmax((teacher_hidden @ teacher_head).float(), -1)

  def kl(a, b):
    """Returns KL(a || b) of two arrays of log-probabilities."""
    return torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)

  if alpha == 0:
    return kl(teacher, policy).mean()
  if alpha == 1:
    return kl(policy, teacher).mean()
  terms = torch.stack([policy + math.log1p(-alpha), teacher + math.log(alpha)])
  mixture = torch.logsumexp(terms, 0)
  return ((1 - alpha) * kl(policy, mixture) + alpha * kl(teacher, mixture)).mean()


def _liger(hidden, head_VD, teacher_hidden, teacher_head_VE, target, alpha):
  from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

  return LigerFusedLinearJSDFunction.apply(
    hidden, head_VD, teacher_hidden, teacher_head_VE, target, alpha
  )
