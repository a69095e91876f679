"""Over eight virtual devices: every way to split them gives the loss and the gradient of one device; real runs, one and two processes."""

import functools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from sdpo_jax import hosts, metrics, sharding
from sdpo_jax.model import decoder
from sdpo_jax.objectives import methods
from sdpo_jax.objectives.loss import make_objective
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from tests import fakes

ROOT = pathlib.Path(__file__).parent.parent
BLEND = methods.row("sdpo") | dict(advantage=dict(name="group_mean"), surrogate=dict(name="clipped"), policy_share=0.3)
SIZES = dict(vocab=296, heads=8, kv_heads=8)   # every axis divides by every part of eight
MESHES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
FAST = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]


def gradient(mesh, batch, *, micro_batches=1):
  """(loss, gradient) of the blend with a teacher of its own, read back from one SGD step, so long that the rounding of the weights is nothing beside it."""
  config, params = fakes.toy_model(0, **SIZES)
  _, teacher = fakes.toy_model(1, **SIZES)
  objective, tx = make_objective(BLEND), optax.sgd(1024.0)
  step = make_train_step(make_signals(config, objective), objective, tx, micro_batches=micro_batches, recompute_old=True)
  state = init_state(params, tx)._replace(teacher=teacher)
  if mesh is None:
    new, said = jax.jit(step)(state, batch)
  else:
    places = sharding.state_shardings(mesh, state, decoder.axes(config))
    with jax.set_mesh(mesh):
      new, said = jax.jit(step, out_shardings=(places, None))(jax.device_put(state, places), sharding.put_rows(mesh, batch))
    assert new.params["layers"]["mlp"]["gate"].sharding.spec == sharding.spec("LDF", sharding.WEIGHTS)
  return float(said["train/loss"].mean), jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / 1024.0, params, new.params)


@functools.cache
def on_one_device():
  return gradient(None, fakes.toy_batch(rows=16, vocab=296))


def assert_same(got, want):
  assert got[0] == pytest.approx(want[0], rel=1e-5)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(want[1])):
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), jax.tree_util.keystr(path)


@pytest.mark.parametrize("shape", [shape if shape in FAST else pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES])
def test_every_mesh_gives_the_gradient_of_one_device(shape):
  """Texts packed together, one pack a row shard; on one device each text has a row of its own."""
  mesh = sharding.make_mesh(jax.devices(), **dict(zip(sharding.AXES, shape)))
  batch = fakes.toy_batch(rows=16, vocab=296, length=26, teacher_length=34, packs=sharding.row_shards(mesh))
  assert_same(gradient(mesh, batch), on_one_device())


@pytest.mark.slow
def test_micro_batches_on_a_mesh_give_the_gradient_of_one_device():
  mesh = sharding.make_mesh(jax.devices(), data=2, fsdp=2, tensor=2)
  assert_same(gradient(mesh, fakes.toy_batch(rows=16, vocab=296, length=26, teacher_length=34, packs=8), micro_batches=2), on_one_device())


def test_no_activation_is_gathered_over_the_rows():
  """The largest array that any collective over row shards moves is a weight, or a scalar a token: never hidden states."""
  mesh = sharding.make_mesh(jax.devices(), data=8, fsdp=1, tensor=1)
  config = fakes.toy_config(**SIZES)
  objective, tx = make_objective(methods.row("sdpo")), optax.sgd(1.0)
  step = make_train_step(make_signals(config, objective), objective, tx, micro_batches=2, teacher_move=0.05)
  state = jax.eval_shape(lambda p: init_state(p, tx, keep_teacher=True), decoder.shapes(config))
  batch = fakes.toy_batch(rows=32, vocab=296, length=40, teacher_length=40, packs=16)
  put = lambda tree, places: jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places)
  with jax.set_mesh(mesh):
    text = jax.jit(step).lower(put(state, sharding.state_shardings(mesh, state, decoder.axes(config))),
                               put(batch, jax.tree.map(lambda _: sharding.over_rows(mesh), batch))).compile().as_text()
  moved = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
  assert not [m for m in moved if f",{config.width}]" in m and m.startswith("f32[")], moved


def test_a_mesh_that_does_not_multiply_is_named():
  assert dict(sharding.make_mesh(jax.devices(), data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  for wrong in (dict(data=3, fsdp=-1, tensor=1), dict(data=2, fsdp=2, tensor=1), dict(data=-1, fsdp=-1, tensor=1), dict(data=0, fsdp=-1, tensor=1)):
    with pytest.raises(ValueError, match="config.mesh="):
      sharding.make_mesh(jax.devices(), **wrong)


def test_one_process_shares_with_itself_and_a_wrong_address_is_named():
  assert hosts.share([1, "x"]) == [[1, "x"]] and hosts.leads()
  with pytest.raises(ValueError, match="HOST:PORT,PROCESSES,RANK"):
    hosts.start("localhost:1234,two,0")


def start(workdir, devices, *extra):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  return subprocess.Popen([sys.executable, "-m", "sdpo_jax.main", "--config=configs/tinycode.py:local", f"--workdir={workdir}",
                           "--config.mesh.data=2", "--config.mesh.fsdp=2", *extra], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_over_loopback_equal_one(tmp_path):
  """Two steps on four devices: of one process, and of two that hold two each. Same metrics, written once."""
  whole = start(tmp_path / "one", 4)
  _, err = whole.communicate(timeout=900)
  assert whole.returncode == 0, err
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  both = [start(tmp_path / "two", 2, f"--distributed=127.0.0.1:{port},2,{rank}") for rank in range(2)]
  for process in both:
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
  one, two = ([metrics.reproducible(line) for line in metrics.read(tmp_path / name)] for name in ("one", "two"))
  assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 1, 2]
  for a, b in zip(one, two):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
  assert len(json.loads((tmp_path / "two" / "run.json").read_text())["started"]) == 1
