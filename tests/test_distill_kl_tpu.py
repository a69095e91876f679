"""Tests the TPU kernels without a TPU: interpret modes with race detection, and the real compiler.

The compiler tests need libtpu (`pip install "jax[tpu]"`). They compile for a described topology, no
device involved.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.kernels import distill_kl_tpu
from sdpo_jax.kernels.distill_kl import distill_kl
from tests.test_distill_kl import check, exact, extreme, problem, run, sharded

BASELINE = pathlib.Path(__file__).parent / "distill_kl_tpu_baseline.json"
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)


@pytest.fixture
def small_tiles(monkeypatch):
  """Sets tiles of 16 tokens x 256 entries in two sub-tiles, and a workspace of one tile.

  So a small problem has several of each.
  """
  monkeypatch.setattr(distill_kl_tpu, "TILES", ((16, 256, 128),))
  monkeypatch.setattr(distill_kl_tpu, "WORKSPACE_BYTES", 1)


@pytest.mark.parametrize("alpha", (0, 0.5, 1))
def test_interpret_mode(alpha, small_tiles):
  """21 tokens are two tiles, the second ragged; 700 entries three, likewise."""
  args = problem(21, 128, 256, 700, scale=3.0)
  check(
    run(
      functools.partial(distill_kl, implementation="pallas_tpu"),
      *args,
      alpha=alpha,
      temperature=0.7,
    ),
    exact(*args, alpha=alpha, temperature=0.7),
  )


@pytest.mark.parametrize("copies", ("eager", "on_wait"))
@pytest.mark.parametrize(
  "alpha", (0.5, pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow))
)
def test_no_races(alpha, copies, small_tiles):
  # where the detector leaves its finding
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  mode = pltpu.InterpretParams(detect_races=True, dma_execution_mode=copies)
  args = problem(21, 128, 256, 700, scale=3.0)
  got = run(distill_kl_tpu.distill_kl, *args, alpha=alpha, temperature=0.7, interpret=mode)
  assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found
  check(got, exact(*args, alpha=alpha, temperature=0.7))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("eighty", "one_hot", "teacher_sure"))
def test_extreme_logits(kind, small_tiles):
  for alpha in (0, 0.5, 1):
    check(
      run(distill_kl_tpu.distill_kl, *extreme(kind), alpha=alpha, temperature=1.0),
      exact(*extreme(kind), alpha=alpha, temperature=1.0),
    )


@pytest.mark.slow
@pytest.mark.parametrize("X,D,E,V", [(1, 128, 128, 257), (13, 4096, 128, 131), (3, 128, 128, 2)])
def test_odd_sizes_with_the_real_tiles(X, D, E, V):
  args = problem(X, D, E, V, scale=2.0)
  for alpha in (0.5, 1):
    check(
      run(distill_kl_tpu.distill_kl, *args, alpha=alpha, temperature=1.0),
      exact(*args, alpha=alpha, temperature=1.0),
    )


@pytest.mark.slow
def test_bfloat16_and_teacher_equal_to_policy(small_tiles):
  arrays, target, cotangents = problem(21, 128, 256, 391, scale=3.0, dtype=jnp.bfloat16)
  for alpha in (0, 0.5, 1):
    args = arrays, target, cotangents
    check(
      run(distill_kl_tpu.distill_kl, *args, alpha=alpha, temperature=1.0),
      exact(*args, alpha=alpha, temperature=1.0),
      gradient_tolerance=2**-7,
    )
    only_divergence = cotangents[:1] + [np.zeros_like(c) for c in cotangents[1:]]
    (value, *_), grads = run(
      distill_kl_tpu.distill_kl,
      arrays[:2] * 2,
      target,
      only_divergence,
      alpha=alpha,
      temperature=1.0,
    )
    assert np.abs(value).max() <= 1e-6 and not grads[0].any() and not grads[1].any()


@pytest.mark.slow
def test_sharded(small_tiles):
  mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  args = problem(21, 128, 128, 600, scale=3.0)
  check(
    run(
      sharded(mesh, implementation="pallas_tpu"),
      *args,
      alpha=0.5,
      temperature=0.7,
    ),
    exact(*args, alpha=0.5, temperature=0.7),
  )


# ---- the real compiler, each compilation in a process of its own
# ---------------------------------------------------


def compile_for(topology, D, alpha, tmp_path, X=4096, V=151936):
  """Returns {"temporaries": bytes, "gradients": float32 bytes, "busy": {kernel: share}}.

  The share is that of the matrix unit's slots in use.
  """
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true",
  }
  child = subprocess.run(
    [sys.executable, __file__, topology, *map(str, (D, alpha, X, V))],
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    check=False,
  )
  assert child.returncode == 0, child.stderr[-2000:]
  result = json.loads(child.stdout.splitlines()[-1])
  busy = {}
  for path in sorted(tmp_path.glob("*distill_kl_*final_hlo-static-per-bundle-utilization.txt")):
    kernel = path.name.split("distill_kl_")[1].split(".")[0]
    header, capacity, _, *bundles = path.read_text().splitlines()[1:]
    assert header.startswith("MXU"), header
    busy[kernel] = sum(int(b.split()[0]) for b in bundles) / int(capacity.split()[0]) / len(bundles)
  return result | {"busy": busy}


def _compile_in_child(topology, D, alpha, X, V):
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  sharding = NamedSharding(Mesh(np.array(description.devices[:1]), ("x",)), PartitionSpec())
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  args = [array(s, jnp.bfloat16) for s in ((X, D), (D, V), (X, D), (D, V))] + [
    array((X,), jnp.int32)
  ]

  def loss(*arrays):
    out = distill_kl(*arrays, alpha=alpha, implementation="pallas_tpu")
    return jnp.mean(out.divergence_X), out

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(*args).compile()
  print(
    json.dumps(
      {"temporaries": compiled.memory_analysis().temp_size_in_bytes, "gradients": 4 * D * (X + V)}
    )
  )


@needs_libtpu
def test_small_problem_compiles_for_a_real_tpu(tmp_path):
  assert set(compile_for("v6e:2x2", 128, 0.5, tmp_path, X=40, V=700)["busy"]) == {
    "statistics",
    "mixture",
    "dlogits",
  }


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(json.loads(BASELINE.read_text())))
def test_real_heads_compile_within_memory_and_keep_the_matrix_unit_busy(case, tmp_path):
  """Forward and backward keep the recorded utilisation, with 2 % slack, in bfloat16."""
  topology, D, alpha = case.split()
  result = compile_for(topology, int(D), alpha, tmp_path)
  assert result["temporaries"] <= distill_kl_tpu.WORKSPACE_BYTES + result["gradients"]
  recorded = json.loads(BASELINE.read_text())[case]
  assert set(result["busy"]) == set(recorded)
  for kernel, share in result["busy"].items():
    assert share >= recorded[kernel] - 0.02, f"{kernel}: {share:.3f}, recorded {recorded[kernel]}"


if __name__ == "__main__":
  topology_name, width, alpha_text, *sizes = sys.argv[1:]
  as_number = float if "." in alpha_text else int
  _compile_in_child(topology_name, int(width), as_number(alpha_text), *map(int, sizes))
