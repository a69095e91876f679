"""What a run would need, without its hardware: compiles the real train step and the real decode step for TPUs or GPUs, from shapes alone.

  python -m sdpo_jax.main --mode=plan --topology=v5p:2x2x2 --config=configs/plan_8b.py
  python -m sdpo_jax.main --mode=plan --topology=h200:8 --config=configs/plan_8b.py:machine=h200-8

The workload is the worst one that the configuration allows: every prompt, teacher prompt and response at its limit, no row shared. Needs
libtpu (`pip install "jax[tpu]"`) or jax's CUDA plugin ("jax[cuda13]"); their compilers run on any machine. For a GPU nothing is tuned, as that takes the
device, and cuDNN's attention is taken to agree with the reference (kernels/attention.py); what has to fit is the share of a GPU's memory that jax
gives a program: 75 %, or what XLA_PYTHON_CLIENT_MEM_FRACTION says. Nothing is loaded or downloaded for a model of `model.config.PRESETS`.

Memory is the compiler's own account, per chip. The train state stays where it is during decoding, so that both programs must fit beside it; with
adapters so do the weights that they stand on, and decoding reads a merged copy.
Operations are counted on the traced program, scans times their lengths (the compiler's cost model counts a scan's body once); one
multiply-add is two. Collectives are read off the compiled program, loops times their trip counts; bytes are those that one chip
receives. Times are what the stated peak rates allow, not predictions: nothing is lost to waiting, and nothing overlaps. GB = 10^9 bytes.
"""

import functools
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from sdpo_jax import sharding
from sdpo_jax.data.shapes import Shape, bucket, full_shape, most_tokens
from sdpo_jax.engine.local import DecodeState, decode
from sdpo_jax.hlo import collectives, kernels, logit_arrays, operations
from sdpo_jax.model import decoder, lora
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Counterfactual, Rows, Sampling, TrainBatch
from sdpo_jax.train_step import TrainState, init_state


class Chip(NamedTuple):
  """As their maker states them. Interconnect: all links of a chip together, one direction each; of a GPU, those within its node."""

  memory_gb: float
  tflops: float  # bfloat16
  memory_gb_s: float
  links_gb_s: float


CHIPS = {
  "v4": Chip(32, 275, 1228, 300),
  "v5e": Chip(16, 197, 819, 200),
  "v5p": Chip(95, 459, 2765, 600),
  "v6e": Chip(32, 918, 1640, 448),
  "h100": Chip(80, 989, 3350, 450),
  "h200": Chip(141, 989, 4800, 450),
}


GPUS = ("h100", "h200")


HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 memory_bandwidth: {memory_gb_s}000000000 device_memory_size: {memory_gb}000000000
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""  # what the compiler for GPUs asks of a device, told by one that is not there (XLA: tools/hlo_opt/gpu_specs)


class Program(NamedTuple):
  """One compiled program, per chip. Bytes, but for operations (multiply-adds count two)."""

  arguments: float
  temporaries: float
  peak: float
  operations: float
  collectives: dict[str, tuple[int, float]]  # kind -> (how often it runs, bytes received)
  text: str


class OutOfMemory(Exception):
  """The compiler refused: `needed` bytes a chip, as far as it says."""

  def __init__(self, needed: float):
    super().__init__(f"{needed / 1e9:.1f} GB")
    self.needed = needed


# ---- shapes --------------------------------------------------------------------------------------
# ---------------------


def state_shapes(
  model: ModelConfig,
  tx,
  mesh,
  *,
  adapters: lora.Lora | None = None,
  keep_teacher: bool,
  teacher_move: float = 0.0,
) -> TrainState:
  """The train state, of all weights or of adapters alone, as shapes with their places."""
  params, axes = (
    (decoder.shapes(model), decoder.axes(model))
    if adapters is None
    else (lora.shapes(model, adapters), lora.axes(model, adapters))
  )
  state = jax.eval_shape(
    lambda p: init_state(p, tx, keep_teacher=keep_teacher, teacher_move=teacher_move), params
  )
  return _placed(state, sharding.state_shardings(mesh, state, axes))


def weight_shapes(model: ModelConfig, mesh) -> dict:
  """The decoder's weights."""
  decoder.check_mesh(model, mesh)
  return _placed(decoder.shapes(model), sharding.named(mesh, decoder.axes(model)))


def batch_shapes(mesh, shape: Shape, responses: int, readings: int = 0) -> TrainBatch:
  """A batch of so many responses in packs of this shape. readings: further ones by the teacher."""
  ints, floats = (
    (lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)),
    (lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)),
  )
  student, teacher, more = (
    Rows(*(ints(shape.packs, *half),) * 3, None, ints(shape.packs, shape.tokens))
    for half in shape.halves()
  )
  B, R = responses, shape.responses
  batch = TrainBatch(
    student,
    teacher,
    ints(B),
    ints(B, R),
    floats(B, R),
    floats(B),
    floats(B),
    floats(B, R),
    floats(B, R),
    (Counterfactual(more, floats(B)),) * readings,
  )
  return _placed(batch, jax.tree.map(lambda _: sharding.row_sharding(mesh), batch))


def decode_shapes(
  model: ModelConfig, mesh, *, rows: int, prompt: int, new: int
) -> tuple[DecodeState, jax.ShapeDtypeStruct]:
  """(state, keys) of a decode step with full caches."""
  with jax.set_mesh(mesh):  # the order of the cache is the platform's
    cache, axes = (
      jax.eval_shape(lambda: decoder.init_cache(model, rows, prompt + new)),
      decoder.cache_axes(),
    )
  put = lambda x, axes: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.NamedSharding(mesh, sharding.spec(axes, sharding.ACTIVATIONS))
  )
  by_row = lambda dtype, *rest: put(
    jax.ShapeDtypeStruct((rows, *rest), dtype), "BTT"[: 1 + len(rest)]
  )
  cache = decoder.Cache(put(cache.k, axes), put(cache.v, axes), put(cache.valid_BS, "BS"))
  state = DecodeState(
    cache,
    by_row(jnp.dtype(model.dtype), model.width),
    by_row(jnp.int32),
    by_row(bool),
    by_row(jnp.int32, new),
    by_row(jnp.float32, new),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  key = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32)))
  return state, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.row_sharding(mesh))


def _placed(tree, shardings):
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
  )


def _bytes_per_chip(tree) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


# ---- one program ---------------------------------------------------------------------------------
# ---------------------


def compile_for(mesh, function, *args, **kwargs) -> Program:
  """function: jitted. OutOfMemory where the compiler finds no place."""
  with jax.set_mesh(mesh):
    traced = function.trace(*args, **kwargs)
    try:
      lowered = traced.lower()
      # no GPU to try on
      compiled = lowered.compile(
        {"xla_gpu_autotune_level": "0"} if mesh.devices.flat[0].platform == "gpu" else None
      )
    except jax.errors.JaxRuntimeError as error:
      used = re.search(
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT]? hbm|HLO temporaries \(([\d.]+)([KMGT])\)",
        str(error),
      )
      if used is None:
        raise
      size, unit = filter(None, used.groups())
      raise OutOfMemory(float(size) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit]) from error
  m, text = compiled.memory_analysis(), compiled.as_text()
  peak = (
    m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
  )
  return Program(
    m.argument_size_in_bytes,
    m.temp_size_in_bytes,
    peak,
    operations(traced.jaxpr.jaxpr) / mesh.size,
    collectives(text),
    text,
  )


# ---- the report ----------------------------------------------------------------------------------
# ---------------------


def topology_devices(name: str):
  """Devices of a topology such as "v5p:2x2x2", or "h200:2x8", two nodes of eight. ValueError with the choices."""
  chip, _, shape = name.partition(":")
  if chip not in CHIPS or not re.fullmatch(
    r"[1-9]\d*(x[1-9]\d*)" + ("?" if chip in GPUS else "*"), shape
  ):
    raise ValueError(
      f"--topology={name!r} must look like v5p:2x2x2, v5e:8x8, v6e:4x4, h200:8 or h200:2x8; choose the chip from {sorted(CHIPS)}"
    )
  try:
    if chip in GPUS:
      slices_nodes_gpus = f"1x{shape}" if "x" in shape else f"1x1x{shape}"
      return topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=slices_nodes_gpus,
        target_config=HOPPER.format(name=chip, **CHIPS[chip]._asdict()),
      ).devices
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise ValueError(
      f'--topology={name!r}: {str(error).splitlines()[0]} (plan needs the compiler: pip install "jax[{"cuda13" if chip in GPUS else "tpu"}]")'
    ) from error


def usable_share(chip: str) -> float:
  """Of a chip's memory: what jax gives a program."""
  # its new name and the one that most know
  asked = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get(
    "XLA_PYTHON_CLIENT_MEM_FRACTION"
  )
  try:
    return float(asked or 0.75) if chip in GPUS else 1.0
  except ValueError:
    raise ValueError(
      f"XLA_PYTHON_CLIENT_MEM_FRACTION={asked!r} must be a number, such as 0.9"
    ) from None


def plan(c, topology: str, model: ModelConfig, learn, adapters: lora.Lora | None = None):
  """Yields the lines of the report. learn: the wiring.Learner of this configuration, adapters: those that it trains. The process's own devices must be of another kind than the topology's
  (main.py asks for CPUs). ValueError for a workload that does not divide over the mesh."""
  name = topology.partition(":")[0]
  devices, chip = topology_devices(topology), CHIPS[name]
  mesh = sharding.make_mesh(devices, **c.mesh)
  shards = sharding.row_shards(mesh)
  rollouts, pieces = (
    c.rollout.questions * c.rollout.group,
    c.train.updates_per_batch * c.train.micro_batches,
  )
  if rollouts % (pieces * shards):
    raise ValueError(
      f"{rollouts} responses do not divide into {pieces} micro-batches on {shards} row shards of config.mesh"
    )
  limit = chip.memory_gb * 1e9 * usable_share(name)
  up = functools.partial(bucket, multiple=c.data.length_multiple)
  prompt, new, teacher = (
    up(c.data.max_prompt_tokens),
    up(c.rollout.max_new_tokens),
    up(c.data.max_teacher_tokens),
  )
  weights = weight_shapes(model, mesh)
  yield (
    f"{c.model.path}: {sum(x.size for x in jax.tree.leaves(weights)) / 1e9:.2f} G weights ({c.model.param_dtype}, products in {c.model.dtype}); method {c.method.name}, teacher {c.method.teacher_weights.name}"
  )
  yield f"{len(devices)} x {name} ({chip.memory_gb} GB, {chip.tflops} TFLOP/s, {chip.memory_gb_s} GB/s memory, {chip.links_gb_s} GB/s links), mesh {dict(mesh.shape)}"
  yield f"{rollouts} responses of {prompt} + {new} tokens, teacher prompts of {teacher}; remat {c.model.remat}"
  if second := c.method.counterfactual.get("model"):
    yield f"not counted: weights and sampling of the second model, {second}"

  state = state_shapes(
    model,
    learn.tx,
    mesh,
    adapters=adapters,
    keep_teacher=learn.teacher.keep,
    teacher_move=learn.teacher.move,
  )
  frozen = None if adapters is None else weights
  places = jax.tree.map(lambda x: x.sharding, state)
  full = lambda rows: full_shape(
    rows,
    pieces * shards,
    most_tokens(c.data, c.rollout.max_new_tokens),
    length_multiple=c.data.length_multiple,
    response_multiple=c.data.response_multiple,
    taught=learn.objective.needs_teacher,
    more=learn.readings > 0,
  )
  shapes = lambda rows: batch_shapes(
    mesh, full(rows), rows * pieces * shards, readings=learn.readings
  )
  rows = rollouts // (pieces * shards)
  step = jax.jit(learn.step, donate_argnums=0, out_shardings=(places, None))
  yield f"train state {_bytes_per_chip(state) / 1e9:.1f} GB per chip" + (
    ""
    if frozen is None
    else f", and {_bytes_per_chip(frozen) / 1e9:.1f} GB of weights that its adapters stand on"
  )
  peaks, programs = [], []

  def report(name, resident, *args, **kwargs):
    try:
      program = compile_for(mesh, *args, **kwargs)
    except OutOfMemory as error:
      peaks.append(error.needed + resident)
      yield f"{name}: the compiler needs {error.needed / 1e9:.1f} GB per chip and gives up"
      return
    peaks.append(program.peak + resident)
    programs.append(program)
    yield from lines(name, program, chip, resident)

  yield from report(
    f"train step, {pieces} micro-batches of {rows * shards} responses",
    0.0,
    step,
    state,
    shapes(rows),
    frozen,
  )
  if programs:
    yield f"  kernels: {', '.join(kernels(programs[0].text)) or 'none'}"
    found = logit_arrays(
      programs[0].text,
      tokens := full(rows).tokens,
      entries := model.vocab // mesh.shape["tensor"],
      model,
    )
    yield f"  arrays of {tokens} tokens x {entries} entries of the vocabulary, or half as large: {', '.join(found) or 'none'}"
  sampling = Sampling(new, c.rollout.temperature, c.rollout.top_p, (0,))
  resident = _bytes_per_chip(
    (state._replace(params=None), None) if frozen is None else (state, frozen)
  )
  args = decode_shapes(model, mesh, rows=c.rollout.rows, prompt=prompt, new=new)
  yield from report(
    f"decode step, one token of {c.rollout.rows} responses",
    resident,
    decode,
    weights,
    *args,
    config=model,
    sampling=sampling,
    chunk=1,
  )
  yield from suggestion(
    peaks[0],
    limit,
    rows,
    c.train.micro_batches,
    shards,
    lambda rows: compile_for(mesh, step, state, shapes(rows), frozen).peak,
  )
  worst = max(peaks)
  yield f"plan: {'fits' if worst <= limit else 'does not fit'} ({worst / 1e9:.1f} of {limit / 1e9:.4g} GB per chip)"


def lines(name: str, program: Program, chip: Chip, resident: float):
  gb = lambda n: f"{n / 1e9:.2f} GB"
  yield f"{name}:"
  beside = f" + {gb(resident)} of the state beside it" if resident else ""
  yield f"  memory per chip: arguments {gb(program.arguments)}, temporaries {gb(program.temporaries)}, peak {gb(program.peak)}{beside}"
  for kind, (times, size) in sorted(program.collectives.items()):
    yield f"  {kind}: {times} runs, {gb(size)} received per chip"
  moved = sum(size for _, size in program.collectives.values())
  times = (
    program.operations / (chip.tflops * 1e12),
    program.arguments / (chip.memory_gb_s * 1e9),
    moved / (chip.links_gb_s * 1e9),
  )
  yield (
    f"  {program.operations / 1e12:.2f} T operations per chip; at peak rates {times[0]:.3f} s of products, {times[1]:.3f} s to read the arguments once, "
    f"{times[2]:.3f} s of collectives; step at least {max(times):.3f} s, {sum(times):.3f} s without overlap"
  )


def suggestion(peak: float, limit: float, rows: int, micro_batches: int, shards: int, peak_of):
  """The most responses per micro-batch that fit, out of one update's: temporaries grow in proportion, so a second size gives the slope."""
  other = rows * 2 if peak <= limit else max(rows // 2, 1)
  if other == rows:
    return
  try:
    slope = (peak_of(other) - peak) / (other - rows)
  except OutOfMemory as error:
    slope = (error.needed - peak) / (other - rows)
  most = rows + int((limit - peak) // max(slope, 1.0))
  total = rows * micro_batches * shards
  fitting = [m for m in range(1, min(most, total // shards) + 1) if total % (m * shards) == 0]
  if fitting:
    yield f"largest micro-batch: {fitting[-1] * shards} responses (config.train.micro_batches={total // (fitting[-1] * shards)}), from the slope between {rows * shards} and {other * shards}"
  else:
    yield "no micro-batch of whole responses fits: less is needed per response, or more chips"
