"""Tests the Mosaic GPU kernels without a GPU.

That is GPU interpret mode with race detection, lowering for CUDA, and the real compiler.

The compiler test needs jax's CUDA plugin and ptxas (`pip install "jax[cuda13]"`, Python 3.12). It
compiles for a described H200 (plan.HOPPER), no device involved.
"""

import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
import numpy as np
import pytest

from sdpo_jax import plan
from sdpo_jax.kernels import distill_kl_gpu
from sdpo_jax.kernels.distill_kl import distill_kl
from tests.test_distill_kl import check, exact, extreme, problem, run, sharded

gpu = functools.partial(distill_kl, implementation="pallas_gpu")


@pytest.fixture
def one_part(monkeypatch):
  """Lets each block of tokens walk the whole vocabulary.

  The interpreter compiles each block anew, so fewer blocks are faster.
  """
  monkeypatch.setattr(distill_kl_gpu, "PARTS", 1)
  monkeypatch.setattr(distill_kl_gpu, "GROUP", 1)


@pytest.mark.parametrize(
  "alpha",
  (
    0.5,
    pytest.param(0, marks=pytest.mark.slow),
    pytest.param(0.2, marks=pytest.mark.slow),
    pytest.param(1, marks=pytest.mark.slow),
  ),
)
def test_interpret_mode(alpha, one_part):
  """bfloat16, E != D, two tiles of the vocabulary, the last one ragged, and a temperature."""
  args = problem(21, 128, 192, 200, scale=3.0, dtype=jnp.bfloat16)
  check(
    run(gpu, *args, alpha=alpha, temperature=0.7),
    exact(*args, alpha=alpha, temperature=0.7),
    gradient_tolerance=2**-7,
  )


@pytest.mark.slow
@pytest.mark.parametrize("alpha", (0, 0.5, 1))
def test_several_blocks_and_parts(alpha, monkeypatch):
  """Two blocks of tokens go in groups of one; the last of three vocabulary parts is empty."""
  monkeypatch.setattr(distill_kl_gpu, "PARTS", 3)
  monkeypatch.setattr(distill_kl_gpu, "GROUP", 1)
  monkeypatch.setattr(distill_kl_gpu, "WORKSPACE_BYTES", 1)
  args = problem(130, 64, 64, 390, scale=3.0)
  check(run(gpu, *args, alpha=alpha, temperature=0.7), exact(*args, alpha=alpha, temperature=0.7))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("eighty", "one_hot", "teacher_sure"))
def test_extreme_logits(kind, one_part):
  for alpha in (0, 0.5, 1):
    check(
      run(gpu, *extreme(kind), alpha=alpha), exact(*extreme(kind), alpha=alpha, temperature=1.0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("X,D,E,V", [(1, 128, 128, 257), (3, 128, 64, 2), (5, 100, 40, 130)])
def test_odd_sizes(X, D, E, V, one_part):
  args = problem(X, D, E, V, scale=2.0)
  check(run(gpu, *args, alpha=0.5), exact(*args, alpha=0.5, temperature=1.0))


@pytest.mark.slow
def test_teacher_equal_to_policy_gives_exactly_nothing(one_part):
  (hidden, head, _, _), target, (weight, *_) = problem(
    21, 128, 128, 257, scale=5.0, dtype=jnp.bfloat16
  )
  cotangents = [weight] + [np.zeros_like(weight)] * 3
  for alpha in (0, 0.5, 1):
    (value, *_), grads = run(gpu, (hidden, head, hidden, head), target, cotangents, alpha=alpha)
    assert np.abs(value).max() <= 1e-6 and not grads[0].any() and not grads[1].any()


@pytest.mark.slow
def test_sharded_form_on_a_mesh_of_one(one_part):
  """One device is enough here: the GPU interpreter simulates one at a time.

  What is common to all implementations is held on eight in test_distill_kl.py.
  """
  mesh = jax.make_mesh(
    (1, 1, 1),
    ("data", "fsdp", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:1],
  )
  args = problem(21, 64, 64, 300, scale=3.0, dtype=jnp.bfloat16)
  check(
    run(
      sharded(mesh, implementation="pallas_gpu"),
      *args,
      alpha=0.5,
    ),
    exact(*args, alpha=0.5, temperature=1.0),
    gradient_tolerance=2**-7,
  )


@pytest.mark.slow
def test_no_races(one_part):
  """The interpreter watches each access to shared memory; jax 0.10 leaves out wgmma and TMA."""
  if jax.__version_info__ < (0, 11):
    pytest.skip("jax 0.11's GPU interpreter is the first that watches wgmma and the copies")
  from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
  from jax.experimental.pallas import mosaic_gpu as plgpu

  mode = plgpu.InterpretGPUParams(detect_races=True)
  args = problem(21, 192, 384, 300, scale=3.0, dtype=jnp.bfloat16)
  check(
    run(distill_kl_gpu.distill_kl, *args, alpha=0.5, temperature=0.7, interpret=mode),
    exact(*args, alpha=0.5, temperature=0.7),
    gradient_tolerance=2**-7,
  )
  assert not get_races().races_found


# ---- lowering and compilation
# ---------------------------------------------------------------------------------------


def lower_for_h200(lower, alpha, X, D, E, V, dtype, sharding=None):
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  args = [array(s, dtype) for s in ((X, D), (D, V), (X, E), (E, V))] + [array((X,), jnp.int32)]

  def loss(*arrays):
    out = gpu(*arrays, alpha=alpha, temperature=0.7)
    return jnp.mean(out.divergence_X), out

  device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
  with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    return lower(jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)))(*args)


@pytest.mark.parametrize(
  "alpha,D,E,V,dtype",
  [
    (0.5, 1024, 2048, 151936, "bfloat16"),
    pytest.param(0, 4096, 4096, 151936, "bfloat16", marks=pytest.mark.slow),
    pytest.param(1, 128, 128, 300, "float32", marks=pytest.mark.slow),
  ],
)
def test_lowers_for_cuda(alpha, D, E, V, dtype):
  checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
  lowered = lower_for_h200(
    functools.partial(export.export, platforms=["cuda"], disabled_checks=checks),
    alpha,
    300,
    D,
    E,
    V,
    dtype,
  )
  assert lowered.mlir_module().count("@mosaic_gpu_v2") >= (3 if alpha == 0.5 else 2)


@pytest.mark.slow
@pytest.mark.parametrize("D,alpha", [(1024, 0.5), (2048, 0), (4096, 0.5), (4096, 1)])
def test_compiles_for_an_h200_without_serialised_products(D, alpha):
  """ptxas reports no spills and no products that it had to serialise; memory is bounded."""
  if importlib.util.find_spec("jax_cuda13_plugin") is None or _ptxas() is None:
    pytest.skip("no CUDA compiler: jax's CUDA plugin and ptxas are not installed")
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    "PATH": os.pathsep.join((str(_ptxas().parent), os.environ["PATH"])),
  }
  child = subprocess.run(
    [sys.executable, __file__, str(D), str(alpha)],
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    check=False,
  )
  assert child.returncode == 0, child.stdout[-2000:]
  reports = child.stdout.count("bytes stack frame")
  assert reports >= (3 if alpha == 0.5 else 2), child.stdout[-2000:]
  assert (
    child.stdout.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == reports
  ), child.stdout
  assert "serialized" not in child.stdout, child.stdout
  temporaries = int(child.stdout.splitlines()[-1])
  assert temporaries <= distill_kl_gpu.WORKSPACE_BYTES + 4 * D * (4096 + 151936)


def _ptxas():
  """Path of the ptxas that pip installed, else of the one on PATH."""
  installed = [
    path for root in sys.path for path in pathlib.Path(root or ".").glob("nvidia/*/bin/ptxas")
  ]
  found = installed or list(filter(None, [shutil.which("ptxas")]))
  return pathlib.Path(found[0]) if found else None


def _compile_in_child(D, alpha):
  sharding = jax.sharding.NamedSharding(
    jax.sharding.Mesh(np.array(plan.topology_devices("h200:1")), ("x",)),
    jax.sharding.PartitionSpec(),
  )
  lowered = lower_for_h200(lambda f: f.lower, alpha, 4096, D, D, 151936, jnp.bfloat16, sharding)
  print(lowered.compile().memory_analysis().temp_size_in_bytes)


if __name__ == "__main__":
  _compile_in_child(
    int(sys.argv[1]), float(sys.argv[2]) if "." in sys.argv[2] else int(sys.argv[2])
  )
