import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from sdpo_jax import checkpoint
from tests.fakes import no_file_beyond


class State(NamedTuple):
  step: Any
  params: Any
  opt_state: Any
  teacher: Any
  controller: Any


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed=0, width=4, teacher=True):
  rng = np.random.default_rng(seed)
  params = {
    "embed": {"table": jnp.asarray(rng.normal(size=(8, width)), jnp.bfloat16)},
    "layers": {"odd\\name {x}": jnp.asarray(rng.normal(size=(3, width)), jnp.float32)},
  }
  return State(
    jnp.int32(seed),
    params,
    TX.init(params),
    jax.tree.map(jnp.copy, params) if teacher else None,
    {"lambda": jnp.float32(0.1)},
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("teacher", [True, False])
def test_round_trip_bit_for_bit(tmp_path, teacher):
  state = make_state(3, teacher=teacher)
  special = state.params["layers"]["odd\\name {x}"].at[0, :3].set(jnp.array([-0.0, jnp.inf, 1e-42]))
  state.params["layers"]["odd\\name {x}"] = special
  host = {
    "data": b'{"next": \x00\xff}',
    "rng": np.random.default_rng(0).bit_generator.state,
    "names": ["a", None, {"bytes": "text"}, [b""]],
    "generations": 10**20,
  }
  checkpoint.save(tmp_path, 3, state, host)
  assert checkpoint.latest_step(tmp_path) == 3
  restored, restored_host = checkpoint.restore(tmp_path, make_state(0, teacher=teacher))
  assert_same(restored, state)
  assert restored_host == host


def flip(path):
  """Changes one bit in the middle of a file."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def largest(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
  "a_bit": lambda folder: flip(largest(folder / "state")),
  "cut_short": lambda folder: os.truncate(largest(folder / "state"), 100),
  "a_missing_file": lambda folder: largest(folder / "state").unlink(),
  "no_state": lambda folder: shutil.rmtree(folder / "state"),
  "no_host": lambda folder: shutil.rmtree(folder / "host"),
  "host_cut_short": lambda folder: os.truncate(folder / "host" / "metadata", 20),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, name):
  rng = np.random.default_rng(0)

  def state_of(step):  # large enough that a bit of the data is hit, and not compressible
    return State(jnp.int32(step), {"w": jnp.asarray(rng.normal(size=(300, 100)))}, None, None, {})

  states = {step: state_of(step) for step in (1, 2)}
  for step, state in states.items():
    checkpoint.save(tmp_path, step, state, {"at": step})
  DAMAGE[name](tmp_path / "checkpoints" / "2")
  with pytest.raises(checkpoint.Damaged, match=r"checkpoints/2 is damaged"):
    checkpoint.restore(tmp_path, states[2])
  step, restored, host = checkpoint.restore_newest(tmp_path, states[2])
  assert step == 1 and host == {"at": 1}
  assert_same(restored, states[1])
  assert "checkpoints/2 is damaged" in caplog.text and "going on from step 1" in caplog.text
  assert checkpoint.all_steps(tmp_path) == [1]
  checkpoint.save(tmp_path, 2, states[2], {"at": 2})  # its place is free
  assert checkpoint.restore_newest(tmp_path, states[2])[0] == 2
  for step in (1, 2):
    DAMAGE[name](tmp_path / "checkpoints" / str(step))
  with pytest.raises(checkpoint.Damaged, match="checkpoints/1 is damaged.*no earlier one"):
    checkpoint.restore_newest(tmp_path, states[2])


def test_a_wrong_checksum_is_damage_whatever_the_files_say(tmp_path):
  """A value that changed before it was written: the files themselves are whole."""
  state = make_state(1)
  checkpoint.save(tmp_path, 1, state, {})
  path = tmp_path / "checkpoints" / "1" / "host" / "metadata"
  about = json.loads(path.read_text())
  about["checksums"][".step"] ^= 1
  path.write_text(json.dumps(about))
  with pytest.raises(checkpoint.Damaged, match="1 arrays are not those that were written, .step"):
    checkpoint.restore(tmp_path, state)
  del about["checksums"]  # as written before there were any
  path.write_text(json.dumps(about))
  assert_same(checkpoint.restore(tmp_path, state)[0], state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_, jnp.uint32])
def test_a_checksum_sees_every_value_and_place_and_no_sharding(dtype):
  mesh = jax.make_mesh((4, 2), ("a", "b"), devices=jax.devices()[:8])
  x = jnp.asarray(np.random.default_rng(0).integers(0, 2, size=(8, 6)), dtype)
  value = int(checkpoint._checksum(x))
  for spec in (PartitionSpec("a", "b"), PartitionSpec("b"), PartitionSpec(None, "b")):
    assert int(checkpoint._checksum(jax.device_put(x, NamedSharding(mesh, spec)))) == value
  others = [x.at[i, j].set(x[i, j] == 0) for i in range(8) for j in range(6)]
  others += [x[::-1], x.reshape(6, 8).reshape(8, 6)[:, ::-1]]
  assert value not in [int(checkpoint._checksum(other)) for other in others]


def test_steps_may_be_kept_beside_the_last_ones(tmp_path):
  for step in range(1, 6):
    checkpoint.save(tmp_path, step, make_state(step), {}, keep=2, keep_also=[2] if step > 2 else [])
  assert checkpoint.all_steps(tmp_path) == [2, 4, 5]
  checkpoint.save(tmp_path, 6, make_state(6), {}, keep=2, keep_also=[5])
  assert checkpoint.all_steps(tmp_path) == [5, 6]


def test_restore_from_abstract_state_and_into_donated_step(tmp_path):
  state = make_state(1)
  checkpoint.save(tmp_path, 1, state, {})
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
  expected = jax.tree.map(np.asarray, state)
  restored, _ = checkpoint.restore(tmp_path, like)
  assert_same(restored, expected)
  bump = jax.jit(lambda s: s._replace(step=s.step + 1), donate_argnums=0)
  # a save is over when it returns, so donating afterwards is safe
  checkpoint.save(tmp_path, 2, bump(restored), {})
  bump(checkpoint.restore(tmp_path, like)[0])
  assert checkpoint.restore(tmp_path, like)[0].step == 2


def test_restore_onto_other_shardings(tmp_path):
  devices = jax.devices()
  if len(devices) < 8:
    pytest.skip("needs 8 devices")
  x = np.arange(64, dtype=np.float32).reshape(8, 8)
  put = lambda mesh, spec: {
    "w": jax.device_put(x, NamedSharding(mesh, spec)),
    "n": jax.device_put(np.int32(5), NamedSharding(mesh, PartitionSpec())),
  }
  saved = put(jax.make_mesh((2, 4), ("a", "b"), devices=devices[:8]), PartitionSpec("a", "b"))
  wanted = put(jax.make_mesh((4,), ("c",), devices=devices[4:8]), PartitionSpec(None, "c"))
  checkpoint.save(tmp_path, 1, saved, {})
  restored, _ = checkpoint.restore(
    tmp_path,
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted),
  )
  assert_same(restored, wanted)
  assert (
    restored["w"].sharding == wanted["w"].sharding
    and restored["n"].sharding == wanted["n"].sharding
  )


def test_params_alone(tmp_path):
  state = make_state(5)
  checkpoint.save(tmp_path, 5, state, {})
  assert_same(checkpoint.restore_params(tmp_path, make_state(0).params), state.params)
  with pytest.raises(
    ValueError,
    match=r"\.params\['embed'\]\['table'\]: stored bfloat16\[8, 4\], wanted bfloat16\[8, 6\]",
  ):
    checkpoint.restore_params(tmp_path, make_state(0, width=6).params)
  with pytest.raises(ValueError, match="wanted nothing"):
    checkpoint.restore_params(tmp_path, {"embed": state.params["embed"]})


def test_keeps_the_last(tmp_path):
  for step in range(1, 6):
    checkpoint.save(tmp_path, step, make_state(step), {"step": step}, keep=2)
  assert checkpoint.all_steps(tmp_path) == [4, 5]
  state, host = checkpoint.restore(tmp_path, make_state(), step=4)
  assert state.step == 4 and host == {"step": 4}


def test_missing_checkpoints_are_named(tmp_path):
  assert checkpoint.latest_step(tmp_path / "nowhere") is None
  with pytest.raises(
    FileNotFoundError, match="no checkpoint in .*nowhere/checkpoints; it holds none"
  ):
    checkpoint.restore(tmp_path / "nowhere", make_state())
  assert not (tmp_path / "nowhere").exists()  # looking does not create
  checkpoint.save(tmp_path, 4, make_state(), {})
  with pytest.raises(
    FileNotFoundError, match=r"no checkpoint of step 9 in .*; it holds steps \[4\]"
  ):
    checkpoint.restore(tmp_path, make_state(), step=9)


def test_another_state_is_refused(tmp_path):
  checkpoint.save(tmp_path, 1, make_state(), {})
  with pytest.raises(
    ValueError,
    match=r"2 arrays differ\): \.teacher\['embed'\]\['table'\]: "
    r"stored bfloat16\[8, 4\], wanted nothing",
  ):
    checkpoint.restore(tmp_path, make_state(teacher=False))
  # no silent conversion
  with pytest.raises(ValueError, match=r"\.step: stored int32\[\], wanted float32\[\]"):
    checkpoint.restore(tmp_path, make_state()._replace(step=jnp.float32(0)))


def test_a_step_is_written_once(tmp_path):
  checkpoint.save(tmp_path, 1, make_state(), {"which": "first"})
  with pytest.raises(ValueError, match="already exists"):
    checkpoint.save(tmp_path, 1, make_state(), {"which": "second"})
  assert checkpoint.restore(tmp_path, make_state())[1] == {"which": "first"}


def test_a_full_disk_is_a_system_error_and_spares_the_earlier_checkpoint(tmp_path):
  state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(100_000,)), jnp.float32)}
  checkpoint.save(tmp_path, 1, state, {})
  with no_file_beyond(100_000), pytest.raises(OSError) as raised:
    checkpoint.save(tmp_path, 2, state, {})
  assert raised.value.errno == errno.EFBIG and raised.value.filename == str(
    tmp_path / "checkpoints" / "2"
  )
  assert checkpoint.all_steps(tmp_path) == [1]
  assert_same(checkpoint.restore(tmp_path, state)[0], state)
  checkpoint.save(tmp_path, 2, state, {})  # there is room again
  assert checkpoint.all_steps(tmp_path) == [1, 2]


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
  overwrite = jax.jit(lambda w: w * 0 - 1, donate_argnums=0)
  saver = checkpoint.Saver(tmp_path)
  wanted = {}
  for step in (1, 2):
    w = jax.random.normal(jax.random.key(step), (1_000_000,))
    wanted[step] = np.array(w)
    saver.save(step, {"w": w}, {})
    for _ in range(3):
      w = overwrite(w)
    assert w[0] == -1
  saver.close()
  for step, w in wanted.items():
    assert_same(checkpoint.restore(tmp_path, {"w": jnp.asarray(w)}, step)[0], {"w": w})


@pytest.mark.parametrize("then", ["save", "close"])
def test_a_save_that_fails_later_is_told_by_the_next_call(tmp_path, then):
  state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(100_000,)), jnp.float32)}
  saver = checkpoint.Saver(tmp_path)
  saver.save(1, state, {})
  saver.wait()
  with no_file_beyond(100_000), pytest.raises(OSError) as raised:
    saver.save(2, state, {})
    saver.save(3, state, {}) if then == "save" else saver.close()
  assert raised.value.filename == str(tmp_path / "checkpoints" / "2")
  saver.close()  # once is enough
  assert checkpoint.all_steps(tmp_path) == [1]


DROPPED = """
import asyncio, gc, sys
from orbax.checkpoint._src.serialization import serialization
from sdpo_jax import checkpoint
if sys.argv[1] == "once":
  checkpoint.tell_failures_once()
async def begin(*coroutines):
  tasks = [asyncio.ensure_future(c) for c in coroutines]   # and nobody asks how they ended
  await asyncio.sleep(0)
async def ours():
  raise ValueError("of another library")
asyncio.run(begin(serialization.async_serialize_from_host(None, {}), ours()))
gc.collect()
"""


def test_writes_that_fail_unseen_print_nothing_and_other_libraries_still_do():
  """What a full disk leaves behind when several of Orbax's writes fail.

  Which of them asyncio drops is chance, so here one is made to fail.
  """
  printed = {}
  for how in ("as it is", "once"):
    printed[how] = subprocess.run(
      [sys.executable, "-c", DROPPED, how],
      capture_output=True,
      text=True,
      check=True,
      cwd=pathlib.Path(__file__).parent.parent,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ).stderr
  assert "async_serialize_from_host" in printed["as it is"]  # or this shows nothing
  assert "orbax" not in printed["once"]
  assert printed["once"].count("Traceback") == 1
  assert "of another library" in printed["once"]


def test_a_save_of_a_million_parameters_is_quick(tmp_path):
  params = {
    f"w{i}": jnp.asarray(np.random.default_rng(i).normal(size=(100_000,)), jnp.float32)
    for i in range(10)
  }
  state = State(jnp.int32(0), params, TX.init(params), params, {})
  seconds = []
  for step in range(4):
    start = time.process_time()  # not the clock: other programs must not decide
    checkpoint.save(tmp_path, step, state, {})
    seconds.append(time.process_time() - start)
  assert min(seconds) < 0.3


SAVER = """
import sys
import jax.numpy as jnp
from sdpo_jax import checkpoint
workdir, first = sys.argv[1], int(sys.argv[2])
for step in range(first, first + 10_000):
  params = {f"w{i}": jnp.full((20_000,), step, jnp.float32) for i in range(8)}
  state = {"step": jnp.int32(step), "params": params}
  checkpoint.save(workdir, step, state, {"step": step})
  print(step, flush=True)
"""


def kill_while_saving(workdir, delay_s):
  """Saves step after step in another process and kills it; returns the last step it reported."""
  first = (checkpoint.latest_step(workdir) or 0) + 1
  process = subprocess.Popen(
    [sys.executable, "-c", SAVER, str(workdir), str(first)],
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parent.parent,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  process.stdout.readline()  # it saves from here on
  time.sleep(delay_s)
  process.send_signal(signal.SIGKILL)
  reported = [int(line) for line in process.stdout.read().splitlines()]
  process.wait()
  return reported[-1] if reported else first


def check_survivor(workdir, reported):
  latest = checkpoint.latest_step(workdir)
  assert latest >= reported  # what was reported as saved is there
  like = {
    "step": jnp.int32(0),
    "params": {f"w{i}": jnp.zeros((20_000,), jnp.float32) for i in range(8)},
  }
  for step in checkpoint.all_steps(workdir):
    state, host = checkpoint.restore(workdir, like, step)
    assert host == {"step": step} and state["step"] == step
    assert all(bool((w == step).all()) for w in state["params"].values())
  # the next save cleans up and goes on
  checkpoint.save(workdir, latest + 1, like, {"step": latest + 1})
  assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir() if path.is_dir())
  shutil.rmtree(workdir / "checkpoints" / str(latest + 1))


def test_kill_in_the_middle_of_a_save(tmp_path):
  check_survivor(tmp_path, kill_while_saving(tmp_path, 0.11))


@pytest.mark.slow
def test_kill_at_many_random_moments(tmp_path):
  dice = random.Random(0)
  for _ in range(12):
    check_survivor(tmp_path, kill_while_saving(tmp_path, dice.uniform(0, 0.3)))
