"""Says what a run would need, without its hardware: `--mode=plan`.

  python -m sdpo_jax.main --mode=plan --topology=v5p:2x2x2 --config=configs/plan_8b.py
  python -m sdpo_jax.main --mode=plan --topology=h200:8 --config=configs/plan_8b.py:machine=h200-8

The real train step and the real decode step are compiled for TPUs or GPUs, from shapes alone. Their
compilers run on any machine: libtpu (`pip install "jax[tpu]"`), jax's CUDA plugin ("jax[cuda13]").
Nothing is loaded or downloaded for a model of `model.config.PRESETS`.

Workload: the worst one that the configuration allows. Every prompt, teacher prompt and response is
at its limit, and no row is shared.

Memory: the compiler's own account, per chip. The train state stays where it is during decoding, so
both programs must fit beside it, and with adapters the weights that they stand on. Decoding reads a
copy of the weights in the types of its products, split over config.rollout.tensor chips alone.

Times: what the stated peak rates allow, not predictions. Nothing is lost to waiting, and nothing
overlaps. Operations and collectives are counted as `hlo` says. GB = 10^9 bytes.

GPUs: nothing is tuned, as that takes the device. cuDNN's attention is taken to agree with the
reference (kernels/attention.py). What has to fit is the share of a GPU's memory that jax gives a
program: 75 %, or what XLA_PYTHON_CLIENT_MEM_FRACTION says.
"""

import dataclasses
import functools
import math
import os
import signal
import sys
import threading
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp

from sdpo_jax import learner, session, sharding
from sdpo_jax.chips import CHIPS, Chip, topology_devices, usable_share
from sdpo_jax.config import (
  history_of,
  response_tokens,
  sampled_tokens,
  teacher_texts_per_response,
  texts_per_response,
  turn_limit,
)
from sdpo_jax.data.shapes import Shape, ShapeRules, bucket, full_shape, most_tokens
from sdpo_jax.engine import programs
from sdpo_jax.engine.sampling import needs_sorting
from sdpo_jax.hlo import OutOfMemory, Program, compile_for, kernels, logit_arrays
from sdpo_jax.model import decoder, lora
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.objectives import build
from sdpo_jax.objectives.control import LEARN, Control
from sdpo_jax.records import Reading, Rows, Sampling, Scored, TrainBatch
from sdpo_jax.train_step import TrainState, init_state

# ---- shapes --------------------------------------------------------------------------------------


def state_shapes(
  model: ModelConfig,
  tx,
  mesh,
  *,
  adapters: lora.Lora | None = None,
  keep_teacher: bool,
  teacher_in_float32: bool = False,
) -> TrainState:
  """Returns the train state, of all weights or of adapters alone, as shapes with their places."""
  if adapters is None:
    params, axes = decoder.shapes(model), decoder.axes(model)
  else:
    params, axes = lora.shapes(model, adapters), lora.axes(model, adapters)
  init = functools.partial(
    init_state, tx=tx, keep_teacher=keep_teacher, teacher_in_float32=teacher_in_float32
  )
  state = jax.eval_shape(init, params)
  return _placed(state, sharding.state_shardings(mesh, state, axes))


def weight_shapes(model: ModelConfig, mesh) -> dict:
  """Returns the decoder's weights as shapes with their places; ValueError if they do not divide."""
  decoder.check_mesh(model, mesh)
  return _placed(decoder.shapes(model), sharding.named(mesh, decoder.axes(model)))


def sampling_shapes(model: ModelConfig, mesh) -> dict:
  """Returns the weights as they lie while sampling, as shapes with their places."""
  cast = jax.eval_shape(functools.partial(decoder.cast, config=model), decoder.shapes(model))
  return _placed(cast, sharding.named(mesh, decoder.axes(model), sharding.GATHERED))


def batch_shapes(
  mesh,
  shape: Shape,
  responses: int,
  further_readings: int = 0,
  *,
  asked: int | None = None,
  control: Sequence[str] = (LEARN,),
  also: Sequence[str] = (),
) -> TrainBatch:
  """Returns a batch of `responses` in packs of this shape, and so many further readings of them.

  asked: the tokens that a teacher elsewhere is asked about at each; None: the teacher lives here.
  control: the names of its scalars. also: the fields that the pass before the updates fills.
  """

  def ints(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.int32)

  def floats(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  def texts(rows, length):
    columns = ints(shape.packs, rows, length)
    return Rows(columns, columns, columns, None, ints(shape.packs, shape.tokens))

  policy, teacher, further = (texts(*size) for size in shape.row_sizes())
  B, R = responses, shape.responses
  scored = None
  if asked is not None:
    sizes = shape.packs, shape.tokens, asked
    scored = Scored(ints(*sizes), floats(*sizes), floats(*sizes[:2]))
  plain = Reading(teacher, floats(B, R), scored)
  batch = TrainBatch(
    policy=policy,
    readings=(plain,) + (Reading(further, floats(B, R)),) * further_readings,
    start_B=ints(B),
    response_BR=ints(B, R),
    weight_BR=floats(B, R),
    advantage_BR=floats(B, R),
    route_B=floats(B),
    logp_rollout_BR=floats(B, R),
    logp_old_BR=floats(B, R),
    control={name: floats() for name in control},
    **{name: floats(B, R) for name in also},
  )
  return _placed(batch, sharding.batch_shardings(mesh, batch))


def decode_shapes(
  model: ModelConfig, mesh, *, rows: int, group: int, prompt: int, new: int
) -> tuple:
  """Returns what `programs.decode` takes after the weights, as shapes with their places.

  All rows are at their longest, with `group` of them to a prompt.
  """
  shards = sharding.row_shards(mesh)

  def placed(x, axes: str):
    spec = sharding.spec(axes, sharding.ACTIVATIONS)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

  with jax.set_mesh(mesh):
    columns = programs.page_columns()

  def pool(texts: int, length: int, kind: dict):
    sizes = dict(shards=shards, pages=texts * -(-length // columns), columns=columns)
    with jax.set_mesh(mesh):
      empty = jax.eval_shape(lambda: decoder.init_pool(model, **sizes, **kind))
      return jax.tree.map(placed, empty, decoder.pool_axes(model, **kind))

  texts = rows // shards
  shared = pool(-(-texts // group), prompt, dict(shared=True, stacked=True))
  own = pool(texts, new, dict(shared=False, stacked=True))
  sizes = programs.Sizes(
    shards=shards,
    rows=texts,
    shared_pages=shared.v.shape[2],
    own_pages=own.v.shape[2],
    readers=min(group, texts),
    columns=columns,
    chunk=1,
  )
  tables = programs.empty_tables(sizes)
  everywhere = jax.NamedSharding(mesh, jax.P())
  tables = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tables
  )
  return shared, own, tables


def _placed(tree, shardings):
  """Returns a tree of shapes with the places of another tree."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
  )


def _bytes_per_chip(tree) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


# ---- the report ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Workload:
  """The worst work that a configuration allows, laid over the chips of a topology."""

  c: Any
  model: ModelConfig
  learn: learner.Learner
  adapters: lora.Lora | None  # None: all weights are trained
  chip_name: str
  mesh: jax.sharding.Mesh

  @property
  def chip(self) -> Chip:
    return CHIPS[self.chip_name]

  @property
  def limit(self) -> float:
    """Bytes that programs may take of one chip's memory."""
    return self.chip.memory_gb * 1e9 * usable_share(self.chip_name)

  @property
  def first_weights(self) -> float:
    """Bytes per chip of a copy of the weights that the run starts from, if the method reads one."""
    if self.learn.read_reference is None or self.adapters is not None:
      return 0.0
    return _bytes_per_chip(weight_shapes(self.model, self.mesh))

  @property
  def shards(self) -> int:
    """How many shards the rows of a batch are cut into."""
    return sharding.row_shards(self.mesh)

  @property
  def responses(self) -> int:
    return self.c.rollout.questions * self.c.rollout.group

  @property
  def micro_batches(self) -> int:
    """Micro-batches of a generation batch, those of all its updates together."""
    return self.c.train.updates_per_batch * self.c.train.micro_batches

  @property
  def rows(self) -> int:
    """Responses of one pack: those of one micro-batch on one row shard."""
    return self.responses // (self.micro_batches * self.shards)

  def check(self) -> None:
    """Raises ValueError if the responses do not divide over micro-batches and row shards."""
    if self.responses % (self.micro_batches * self.shards):
      raise ValueError(
        f"{self.responses} responses do not divide into {self.micro_batches} micro-batches "
        f"on {self.shards} row shards of config.mesh"
      )

  def tokens(self, limit: int) -> int:
    """Rounds a limit in tokens up to the length of a padded row."""
    return bucket(limit, self.c.data.length_multiple)

  def full_shape(self, rows: int) -> Shape:
    """Returns the largest shape that a batch of `rows` responses a pack can take."""
    data = self.c.data
    texts = rows * texts_per_response(self.c), rows * teacher_texts_per_response(self.c)
    return full_shape(
      rows,
      self.micro_batches * self.shards,  # one pack each
      most_tokens(data, response_tokens(self.c), sampled_tokens(self.c)),
      ShapeRules.of(data),
      has_teacher=self.learn.method.needs_teacher,
      has_further=self.learn.further_count > 0,
      texts_per_pack=texts,
    )

  def batch(self, rows: int) -> TrainBatch:
    """Returns the shapes of a generation batch of `rows` responses a pack."""
    responses = rows * self.micro_batches * self.shards
    method = self.learn.method
    is_remote = method.teacher_weights.remote is not None
    asked = min(method.divergence["top_k"], self.model.vocab) if is_remote else None
    shape = self.full_shape(rows)
    control = Control(method).names()
    further = self.learn.further_count
    return batch_shapes(
      self.mesh,
      shape,
      responses,
      further,
      asked=asked,
      control=control,
      also=method.found_before_updates,
    )

  def state(self) -> TrainState:
    return state_shapes(
      self.model,
      self.learn.tx,
      self.mesh,
      adapters=self.adapters,
      keep_teacher=self.learn.method.teacher_weights.keep,
      teacher_in_float32=self.learn.method.teacher_weights.in_float32,
    )


def report_lines(c, topology: str) -> Iterator[str]:
  """Checks a configuration as training does, then returns an iterator over the lines of its plan.

  Each line comes as soon as it is known: compilations take minutes. The process's own devices must
  be of another kind than the topology's, so jax is told to use CPUs. ValueError for what training
  refuses, and for a workload that does not divide over the mesh.
  """
  _leave_devices_alone()
  mesh = sharding.make_mesh(topology_devices(topology), **c.mesh)
  _end_at_once_when_told_to()
  model = dataclasses.replace(
    session.model_shape(c.model.path), dtype=c.model.dtype, param_dtype=c.model.param_dtype
  )
  session.check_sampling(c, model, mesh)
  method = build.build_method(c.method.to_dict())
  session.check_positions(session.longest_texts(c, method), model, c.model.path)
  adapters = lora.from_settings(c.model)
  join = None if adapters is None else functools.partial(lora.attach, lora=adapters)
  learn = learner.make_learner(c, model, join)
  workload = Workload(c, model, learn, adapters, topology.partition(":")[0], mesh)
  workload.check()
  return _lines(workload)


def _leave_devices_alone() -> None:
  """Keeps jax off this machine's accelerators and tells libtpu what it asks for."""
  # the compiler alone is wanted: neither a TPU nor its lock
  jax.config.update("jax_platforms", "cpu")
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  # libtpu complains where they are unset; it plans for the topology whatever they say
  for name, value in {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}.items():
    os.environ.setdefault(name, value)


def _end_at_once_when_told_to() -> None:
  """Undoes what libtpu does as it is loaded: it would answer SIGTERM with a trace of its stack."""
  is_ours_to_set = threading.current_thread() is threading.main_thread()
  if is_ours_to_set and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def say(what: str) -> None:
  """Says on stderr what is done next; some of it takes minutes."""
  print(f"plan: {what}", file=sys.stderr, flush=True)


def _lines(w: Workload) -> Iterator[str]:
  """Yields the lines of a plan, compiling between them."""
  limit = w.limit
  weights = weight_shapes(w.model, w.mesh)
  yield from heading_lines(w, weights)
  state = w.state()
  frozen = None if w.adapters is None else weights
  yield state_line(state, frozen)

  places = jax.tree.map(lambda x: x.sharding, state)
  step = jax.jit(w.learn.step, donate_argnums=0, out_shardings=(places, None))
  # with a lag the weights that are being sampled from lie beside the step
  ahead = w.first_weights + (_bytes_per_chip(weights) if w.c.rollout.lag else 0.0)
  say("compiles the train step, which may take minutes")
  training = attempt(ahead, w.mesh, step, state, w.batch(w.rows), frozen)
  size = f"{w.micro_batches} micro-batches of {w.rows * w.shards} responses"
  yield from outcome_lines(f"train step, {size}", training, w.chip)
  if training.program is not None:
    yield from array_lines(w, training.program.text)

  peaks = [training.peak]
  if w.c.rollout.engine == "local":
    say("compiles the decode step")
    decoding = attempt_decoding(w, state, frozen)
    title = f"decode step, one token of {w.c.rollout.rows} responses"
    yield from outcome_lines(title, decoding, w.chip)
    peaks.append(decoding.peak)

  def peak_of(rows: int) -> float:
    say(f"compiles the train step again, with {rows} rows a micro-batch on a shard")
    return compile_for(w.mesh, step, state, w.batch(rows), frozen).peak + ahead

  yield from suggestion(
    training.peak,
    limit,
    rows=w.rows,
    micro_batches=w.c.train.micro_batches,
    shards=w.shards,
    peak_of=peak_of,
  )
  worst = max(peaks)
  verdict = "fits" if worst <= limit else "does not fit"
  yield f"plan: {verdict} ({worst / 1e9:.1f} of {limit / 1e9:.4g} GB per chip)"


def heading_lines(w: Workload, weights: dict) -> Iterator[str]:
  """Yields what is planned: model and method, chips and mesh, texts."""
  c, chip = w.c, w.chip
  count = sum(x.size for x in jax.tree.leaves(weights))
  yield (
    f"{c.model.path}: {count / 1e9:.2f} G weights ({c.model.param_dtype}, "
    f"products in {c.model.dtype}); "
    f"method {c.method.name}, teacher {c.method.teacher_weights.name}"
  )
  yield (
    f"{w.mesh.size} x {w.chip_name} ({chip.memory_gb} GB, {chip.tflops} TFLOP/s, "
    f"{chip.memory_gb_s} GB/s memory, {chip.links_gb_s} GB/s links), mesh {dict(w.mesh.shape)}"
  )
  has_turns = history_of(c) is not None
  turns = f" of up to {texts_per_response(c)} turns, each" if has_turns else ""
  yield (
    f"{w.responses} responses{turns} of {w.tokens(c.data.max_prompt_tokens)} "
    f"+ {w.tokens(response_tokens(c))} tokens, "
    f"teacher prompts of {w.tokens(c.data.max_teacher_tokens)}; remat {c.model.remat}"
  )
  if has_turns and turn_limit(c) is None:
    yield f"not counted: more turns; config.env.name={c.env.name} has no setting limit"
  if "beams" in c.method.counterfactual.get("sources", ()):
    yield "not counted: the beam search for alternatives"
  if "hint_tokens" in c.method.teacher_context:
    yield "not counted: what the policy writes of its episodes in hindsight"
  second = c.method.counterfactual.get("model")
  if second:
    yield f"not counted: weights and sampling of the second model, {second}"


def state_line(state: TrainState, frozen: dict | None) -> str:
  """Returns what the train state takes; frozen: the weights that adapters stand on."""
  line = f"train state {_bytes_per_chip(state) / 1e9:.1f} GB per chip"
  if frozen is None:
    return line
  return f"{line}, and {_bytes_per_chip(frozen) / 1e9:.1f} GB of weights that its adapters stand on"


class Outcome(NamedTuple):
  """What the compiler made of one program, in bytes per chip."""

  needed: float
  resident: float  # of what stays in memory beside it
  program: Program | None  # None: the compiler found no room

  @property
  def peak(self) -> float:
    return self.needed + self.resident


def attempt(resident: float, mesh, function, *args, **kwargs) -> Outcome:
  """Compiles a program beside which `resident` bytes per chip stay in memory."""
  try:
    program = compile_for(mesh, function, *args, **kwargs)
  except OutOfMemory as error:
    return Outcome(error.needed, resident, None)
  return Outcome(program.peak, resident, program)


def attempt_decoding(w: Workload, state: TrainState, frozen: dict | None) -> Outcome:
  """Compiles a decode step of one token of config.rollout.rows responses at their longest.

  It reads a copy of the weights, which lies beside the state; with adapters, beside the weights
  that these stand on, and the sum of both. A single chip whose products are in the weights' type
  copies nothing: it reads the state's weights, or that sum.

  It is compiled for all chips. The processes of a run, each of which compiles it for its own, have
  the same arrays on each chip.
  """
  rollout = w.c.rollout
  if w.model.dtype != w.model.param_dtype or w.mesh.size > 1:
    resident = _bytes_per_chip((state, frozen, frozen))
  elif frozen is None:
    resident = _bytes_per_chip(state._replace(params=None))
  else:
    resident = _bytes_per_chip((state, frozen))
  resident += w.first_weights
  mesh = sharding.sampling_mesh(w.mesh, rollout.tensor).whole
  group, prompt, new = rollout.group, w.c.data.max_prompt_tokens, response_tokens(w.c)
  if history_of(w.c) is not None:  # each turn is read anew, and nobody shares its window
    group, prompt, new = 1, prompt + new - rollout.max_new_tokens, rollout.max_new_tokens
  arguments = decode_shapes(
    w.model, mesh, rows=rollout.rows, group=group, prompt=w.tokens(prompt), new=w.tokens(new)
  )
  sampling = Sampling(1, rollout.temperature, rollout.top_p)
  return attempt(
    resident,
    mesh,
    programs.decode,
    sampling_shapes(w.model, mesh),
    *arguments,
    config=w.model,
    is_sorted=needs_sorting(sampling),
  )


def outcome_lines(name: str, outcome: Outcome, chip: Chip) -> Iterator[str]:
  """Yields a program's memory, collectives, operations and least time, or that it has no room."""
  program = outcome.program
  if program is None:
    yield f"{name}: the compiler needs {outcome.needed / 1e9:.1f} GB per chip and gives up"
    return

  def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"

  yield f"{name}:"
  beside = f" + {gb(outcome.resident)} of the state beside it" if outcome.resident else ""
  yield (
    f"  memory per chip: arguments {gb(program.arguments)}, "
    f"temporaries {gb(program.temporaries)}, peak {gb(program.peak)}{beside}"
  )
  for kind, (times, size) in sorted(program.collectives.items()):
    yield f"  {kind}: {times} runs, {gb(size)} received per chip"
  received = sum(size for _, size in program.collectives.values())
  products_s = program.operations / (chip.tflops * 1e12)
  reading_s = program.arguments / (chip.memory_gb_s * 1e9)
  collectives_s = received / (chip.links_gb_s * 1e9)
  seconds = (products_s, reading_s, collectives_s)
  yield (
    f"  {program.operations / 1e12:.2f} T operations per chip; at peak rates "
    f"{products_s:.3f} s of products, {reading_s:.3f} s to read the arguments once, "
    f"{collectives_s:.3f} s of collectives; step at least {max(seconds):.3f} s, "
    f"{sum(seconds):.3f} s without overlap"
  )


def array_lines(w: Workload, text: str) -> Iterator[str]:
  """Yields the kernels of the compiled train step, and its arrays as large as the logits."""
  yield f"  kernels: {', '.join(kernels(text)) or 'none'}"
  tokens = w.full_shape(w.rows).tokens
  entries = w.model.vocab // w.mesh.shape["tensor"]
  arrays = ", ".join(logit_arrays(text, tokens, entries, w.model))
  yield (
    f"  arrays of {tokens} tokens x {entries} entries of the vocabulary, or half as large: "
    f"{arrays or 'none'}"
  )


def suggestion(
  peak: float,
  limit: float,
  *,
  rows: int,
  micro_batches: int,
  shards: int,
  peak_of: Callable[[int], float],
) -> Iterator[str]:
  """Yields the most responses per micro-batch that fit and divide the responses of one update.

  Temporaries grow in proportion to the rows, so the peak at a second size gives the slope. Nothing
  is yielded where there is no second size.

  Args:
    peak: bytes per chip at `rows` responses a micro-batch and shard.
    limit: bytes that a chip has.
    peak_of: rows -> bytes per chip; OutOfMemory where the compiler finds no room.
  """
  other = rows * 2 if peak <= limit else max(rows // 2, 1)
  if other == rows:
    return
  try:
    other_peak = peak_of(other)
  except OutOfMemory as error:
    other_peak = error.needed
  slope = (other_peak - peak) / (other - rows)
  most = rows + int((limit - peak) // max(slope, 1.0))
  total = rows * micro_batches * shards
  fitting = [m for m in range(1, min(most, total // shards) + 1) if total % (m * shards) == 0]
  if not fitting:
    yield "no micro-batch of whole responses fits: less is needed per response, or more chips"
    return
  responses = fitting[-1] * shards
  yield (
    f"largest micro-batch: {responses} responses "
    f"(config.train.micro_batches={total // responses}), "
    f"from the slope between {rows * shards} and {other * shards}"
  )
