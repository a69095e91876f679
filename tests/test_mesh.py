"""Over eight virtual devices: every way to split them gives loss and gradient of one device.

Also real runs of one and of two processes.
"""

import functools
import itertools
import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpo_jax import hlo, hosts, metrics, sharding
from sdpo_jax.kernels import token_logp
from sdpo_jax.kernels.distill_kl import distill_kl_sharded
from sdpo_jax.kernels.distill_kl_sweeps import Inputs
from sdpo_jax.model import decoder
from sdpo_jax.objectives import build, loss
from sdpo_jax.train_step import (
  forward_pair,
  init_state,
  make_signals,
  make_train_step,
  run_rows,
  targets,
)
from tests import fakes

ROOT = pathlib.Path(__file__).parent.parent
BLEND = build.method_row("sdpo") | dict(
  advantage=dict(name="group_mean"), surrogate=dict(name="clipped"), policy_share=0.3
)
# every axis divides by every part of eight; queries are grouped
SIZES = dict(vocab=296, heads=16, kv_heads=8)
MESHES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
FAST = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]


def gradient(mesh, batch, *, method=BLEND):
  """Returns (loss, gradient) of the blend (or another row) with a teacher of its own.

  They are read back from one SGD step, so long that the rounding of the weights is nothing beside
  it.
  """
  config, params = fakes.toy_model(0, **SIZES)
  _, teacher = fakes.toy_model(1, **SIZES)
  method, tx = build.build_method(method), optax.sgd(1024.0)
  step = make_train_step(make_signals(config, method, remat="dots"), method, tx, recompute_old=True)
  state = init_state(params, tx)._replace(teacher=teacher)
  if mesh is None:
    new, measured = jax.jit(step)(state, batch)
  else:
    places = sharding.state_shardings(mesh, state, decoder.axes(config))
    with jax.set_mesh(mesh):
      new, measured = jax.jit(step, out_shardings=(places, None))(
        jax.device_put(state, places), sharding.put_rows(mesh, batch)
      )
    assert new.params["layers"]["mlp"]["gate"].sharding.spec == sharding.spec(
      "LDF", sharding.WEIGHTS
    )
  return float(measured["train/loss"].mean), jax.tree.map(
    lambda a, b: (np.asarray(a) - np.asarray(b)) / 1024.0, params, new.params
  )


@functools.cache
def on_one_device():
  return gradient(None, fakes.toy_batch(rows=16, vocab=296))


def assert_same(got, want):
  assert got[0] == pytest.approx(want[0], rel=1e-5)
  got_leaves = jax.tree_util.tree_leaves_with_path(got[1])
  for (path, x), y in zip(got_leaves, jax.tree.leaves(want[1]), strict=True):
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
  "shape",
  [shape if shape in FAST else pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES],
)
def test_every_mesh_gives_the_gradient_of_one_device(shape):
  """Texts packed together, one pack a row shard; on one device each text has a row of its own."""
  mesh = sharding.make_mesh(jax.devices(), **dict(zip(sharding.AXES, shape, strict=True)))
  batch = fakes.toy_batch(
    rows=16, vocab=296, length=26, teacher_length=34, packs=sharding.row_shards(mesh)
  )
  assert_same(gradient(mesh, batch), on_one_device())


@pytest.mark.parametrize(
  "name,shape",
  [
    ("grpo", (2, 2, 2)),
    pytest.param("grpo", (1, 8, 1), marks=pytest.mark.slow),
    pytest.param("srpo", (2, 2, 2), marks=pytest.mark.slow),
  ],
)
def test_without_a_divergence_every_mesh_gives_the_gradient_of_one_device(name, shape, monkeypatch):
  """Log-probability and entropy by themselves.

  The vocabulary is in blocks of 128 on the mesh, in one piece on one device.
  """
  mesh = sharding.make_mesh(jax.devices(), **dict(zip(sharding.AXES, shape, strict=True)))
  method = build.method_row(name)
  want = gradient(None, fakes.toy_batch(rows=16, vocab=296), method=method)
  monkeypatch.setattr(token_logp, "BLOCK_BYTES", 1)
  assert_same(
    gradient(
      mesh,
      fakes.toy_batch(
        rows=16, vocab=296, length=26, teacher_length=34, packs=sharding.row_shards(mesh)
      ),
      method=method,
    ),
    want,
  )


@pytest.mark.slow
def test_micro_batches_on_a_mesh_give_the_gradient_of_one_device():
  mesh = sharding.make_mesh(jax.devices(), data=2, fsdp=2, tensor=2)
  assert_same(
    gradient(mesh, fakes.toy_batch(rows=16, vocab=296, length=26, teacher_length=34, packs=8)),
    on_one_device(),
  )


def compiled_passes(mesh, config, batch, remat):
  """Returns compiled programs, the first two with the divergence behind them.

  They are the gradient of the live-teacher pair, that of the policy against given teacher states,
  and the teacher's forward pass.
  """
  where = sharding.named(mesh, decoder.axes(config))
  place = lambda tree, places: jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places
  )
  params = place(decoder.shapes(config), where)
  rows = place(batch, sharding.batch_shardings(mesh, batch))
  one = lambda p, half: run_rows(
    lambda x: [
      decoder.hidden(p, config, x[0], positions_BT=x[1], segment_ids_BT=x[2], remat=remat)
    ],
    half,
  )[0]
  divergence = lambda halves, batch: jnp.sum(
    distill_kl_sharded(Inputs(*halves, targets(batch.policy)), mesh=mesh, alpha=0.5).divergence_X
  )
  pair = lambda p, batch: divergence(forward_pair(p, None, config, batch, remat=remat), batch)

  def policy(p, batch, teacher_XD):
    head = decoder.head(p, config)
    return divergence((one(p, batch.policy), head, teacher_XD, jax.lax.stop_gradient(head)), batch)

  with jax.set_mesh(mesh):
    teacher_XD = jax.ShapeDtypeStruct(
      (batch.policy.at_CX.size, config.width), jnp.float32, sharding=sharding.row_sharding(mesh)
    )
    compile_one = lambda f, *args: jax.jit(f).lower(*args).compile()
    return (
      compile_one(jax.value_and_grad(pair), params, rows),
      compile_one(jax.value_and_grad(policy), params, rows, teacher_XD),
      compile_one(lambda p, batch: one(p, batch.readings[0].rows), params, rows),
    )


def collectives(text):
  """Returns [(kind, type, shape without axes of 1)] of every array that a collective returns.

  Pieces of one (an all-to-all's tuple) count as one; groups of one device move nothing.
  """
  moved = []
  for line in text.splitlines():
    op = re.match(
      r"\s*(?:ROOT )?%?\S+ = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|"
      r"ragged-all-to-all|collective-permute|collective-broadcast)(?:-start)?\(",
      line,
    )
    if op is None or op[2] != "collective-permute" and hlo._group_size(line) == 1:
      continue
    arrays = [
      (op[2], dtype, tuple(int(n) for n in dims.split(",") if n not in ("", "1")))
      for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", op[1])
    ]
    assert arrays, line
    if op[2] == "all-to-all":
      arrays = [(*arrays[0][:2], (len(arrays), *arrays[0][2]))]
    moved += arrays
  assert moved
  return moved


def weight_shapes(config, mesh):
  """Returns shapes, without axes of 1, of the weights of a layer and around the layers.

  They are whole or split over mesh axes, neighbouring axes joined or not, in either order.
  """
  joined = lambda shape: (
    {shape}
    if len(shape) < 2
    else {shape[:1] + rest for rest in joined(shape[1:])}
    | joined((shape[0] * shape[1], *shape[2:]))
  )
  shapes = set()
  for w, letters in zip(
    jax.tree.leaves(decoder.shapes(config)), jax.tree.leaves(decoder.axes(config)), strict=True
  ):
    splits = [
      {1, mesh.shape[axis] if axis else 1} for axis in sharding.spec(letters, sharding.WEIGHTS)
    ]
    for split in itertools.product(*splits):
      axes = zip(w.shape, split, letters, strict=True)
      shape = tuple(n // k for n, k, letter in axes if letter != "L")
      shapes |= joined(shape) | joined(shape[::-1])
  return {tuple(n for n in shape if n != 1) for shape in shapes}


def test_a_live_teacher_costs_its_forward_pass_and_no_collective_more():
  """Compares compiled programs of eight devices.

  The pair takes at most 1.03 times the operations of its two halves. (That is without
  rematerialisation; each program counts its scan's body once.) Weights are gathered as often as for
  the policy alone. What is gathered is a weight: never hidden states, over whatever axis.
  """
  mesh = sharding.make_mesh(jax.devices(), data=2, fsdp=4, tensor=1)
  config = fakes.toy_config(**SIZES)
  batch = fakes.toy_batch(rows=32, vocab=296, length=40, teacher_length=40, packs=8)
  pair, policy, teacher = compiled_passes(mesh, config, batch, "none")
  operations = lambda compiled: compiled.cost_analysis()["flops"]
  assert operations(pair) <= 1.03 * (operations(policy) + operations(teacher)), [
    operations(x) for x in (pair, policy, teacher)
  ]
  pair, policy, _ = compiled_passes(mesh, config, batch, "block")
  texts = pair.as_text(), policy.as_text()
  split = sum("D" in axes for axes in jax.tree.leaves(decoder.axes(config)["layers"]))
  in_layers = [len(re.findall(r" all-gather(?:-start)?\(.*while/body", text)) for text in texts]
  assert in_layers == [2 * split] * 2  # forward, and again for the backward pass
  # not token ids, nor scales of norms
  wide = [
    sorted(
      shape
      for kind, dtype, shape in collectives(text)
      if kind == "all-gather" and dtype == "f32" and len(shape) > 1
    )
    for text in texts
  ]
  assert wide[0] == wide[1], wide
  gathered, weights = set(wide[0]), weight_shapes(config, mesh)
  assert gathered <= weights, gathered - weights


def compiled_step(mesh, config, name, batch):
  """The compiled train step's text."""
  method, tx = build.build_method(build.method_row(name)), optax.sgd(1.0)
  step = make_train_step(make_signals(config, method), method, tx)
  state = jax.eval_shape(
    lambda p: init_state(p, tx, keep_teacher=method.needs_teacher), decoder.shapes(config)
  )
  put = lambda tree, places: jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places
  )
  with jax.set_mesh(mesh):
    return (
      jax.jit(step)
      .lower(
        put(state, sharding.state_shardings(mesh, state, decoder.axes(config))),
        put(batch, sharding.batch_shardings(mesh, batch)),
      )
      .compile()
      .as_text()
    )


@pytest.mark.parametrize("method", ["sdpo", "grpo"])
def test_no_activation_is_gathered_over_the_rows(method):
  """Rows are split eight ways, weights copied.

  Each array that comes out of a collective, whatever its kind and type, is shaped like a weight
  (its gradient), or it counts values, or it has no more elements than a device has tokens. Hidden
  states of a device
  have more, even those of a micro-batch's response tokens alone.
  """
  mesh = sharding.make_mesh(jax.devices(), data=8, fsdp=1, tensor=1)
  config = fakes.toy_config(**SIZES)
  batch = fakes.toy_batch(rows=32, vocab=296, length=40, teacher_length=40, packs=16)
  tokens = batch.policy.token_CPT.size // 8
  assert batch.policy.at_CX.size // 2 // 8 * config.width > tokens
  weights = weight_shapes(config, mesh)
  moved = collectives(compiled_step(mesh, config, method, batch))
  counts = (loss.COARSE,)
  assert not [m for m in moved if math.prod(m[2]) > tokens and m[2] not in {*weights, counts}]


LARGE = SIZES | dict(vocab=8192)


@pytest.mark.parametrize(
  "method,shape",
  [
    ("grpo", (1, 8, 1)),
    pytest.param("grpo", (2, 2, 2), marks=pytest.mark.slow),
    ("srpo", (2, 2, 2)),
  ],
)
def test_no_logits_cross_devices(method, shape, monkeypatch):
  """Methods that read log-probability or entropy without a divergence, a vocabulary in blocks.

  What comes out of a collective, forward and backward, is a weight, or no larger than a device's
  hidden states. The logits of one token are larger, even of one shard of the vocabulary.
  """
  # the logits of five tokens: no part of a weight has such an axis
  monkeypatch.setattr(token_logp, "BLOCK_BYTES", 4 * 8192 * 5)
  mesh = sharding.make_mesh(jax.devices(), **dict(zip(sharding.AXES, shape, strict=True)))
  config = fakes.toy_config(**LARGE)
  batch = fakes.toy_batch(rows=16, vocab=8192, length=40, teacher_length=40, packs=8)
  hidden = (
    max(half.token_CPT.size for half in (batch.policy, batch.readings[0].rows))
    // sharding.row_shards(mesh)
    * config.width
  )
  assert hidden < config.vocab // mesh.shape["tensor"]
  weights = weight_shapes(config, mesh)
  moved = collectives(compiled_step(mesh, config, method, batch))
  assert not [m for m in moved if math.prod(m[2]) > hidden and m[2] not in weights]


def test_a_mesh_that_does_not_multiply_is_named():
  assert dict(sharding.make_mesh(jax.devices(), data=2, fsdp=-1, tensor=2).shape) == {
    "data": 2,
    "fsdp": 2,
    "tensor": 2,
  }
  for wrong in (
    dict(data=3, fsdp=-1, tensor=1),
    dict(data=2, fsdp=2, tensor=1),
    dict(data=-1, fsdp=-1, tensor=1),
    dict(data=0, fsdp=-1, tensor=1),
  ):
    with pytest.raises(ValueError, match="config.mesh="):
      sharding.make_mesh(jax.devices(), **wrong)


def test_one_process_shares_with_itself_and_a_wrong_address_is_named():
  assert hosts.share([1, "x"]) == [[1, "x"]] and hosts.leads()
  for wrong in (
    "localhost:1234,two,0",
    "localhost:1234",
    "127.0.0.1,1,0",
    "localhost:port,1,0",
    "localhost:1234,2,2",
  ):
    with pytest.raises(
      ValueError, match=f"--distributed='{wrong}' must be auto or HOST:PORT,PROCESSES,RANK"
    ):
      hosts.start(wrong)


def start(workdir, devices, *extra):
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "sdpo_jax.main",
      "--config=configs/tinycode.py:local",
      f"--workdir={workdir}",
      "--config.mesh.data=2",
      "--config.mesh.fsdp=2",
      *extra,
    ],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_two_processes_over_loopback_equal_one(tmp_path):
  """Two steps on four devices, of one process, and of two that hold two each.

  The metrics are the same, written once.
  """
  whole = start(tmp_path / "one", 4)
  _, err = whole.communicate(timeout=900)
  assert whole.returncode == 0, err
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  both = [
    start(tmp_path / "two", 2, f"--distributed=127.0.0.1:{port},2,{rank}") for rank in range(2)
  ]
  for process in both:
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
  one, two = (
    [metrics.reproducible(line) for line in metrics.read(tmp_path / name)]
    for name in ("one", "two")
  )
  assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 1, 2]
  for a, b in zip(one, two, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
  assert len(json.loads((tmp_path / "two" / "run.json").read_text())["started"]) == 1
