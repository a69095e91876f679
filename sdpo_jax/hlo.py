"""Compiles a program from shapes, for devices that need not be there, and reads what it holds.

Operations are counted on the traced program, a scan's body times its length: the compiler's own
cost model counts the body once. One multiply-add is two operations. Collectives, kernels and
arrays of logits are read off the text of the compiled program, loops times their trip counts.
"""

import math
import re
from typing import Iterator, NamedTuple

import jax
import jax.extend

from sdpo_jax.model.config import ModelConfig

# ---- one program ---------------------------------------------------------------------------------


class Program(NamedTuple):
  """One compiled program, per chip: bytes, but for operations (a multiply-add is two)."""

  arguments: float
  temporaries: float
  peak: float
  operations: float
  collectives: dict[str, tuple[int, float]]  # kind -> (how often it runs, bytes received)
  text: str


class OutOfMemory(Exception):
  """The compiler refused; `needed` is the bytes per chip that it speaks of."""

  def __init__(self, needed: float):
    super().__init__(f"{needed / 1e9:.1f} GB")
    self.needed = needed


def compile_for(mesh, function, *args, **kwargs) -> Program:
  """Compiles a jitted function for the devices of a mesh, from the shapes of its arguments.

  OutOfMemory if the compiler finds no room on a chip; its other errors pass through.
  """
  options = None
  if mesh.devices.flat[0].platform == "gpu":
    options = {"xla_gpu_autotune_level": "0"}  # there is no GPU to try variants on
  with jax.set_mesh(mesh):
    traced = function.trace(*args, **kwargs)
    try:
      compiled = traced.lower().compile(options)
    except jax.errors.JaxRuntimeError as error:
      needed = _bytes_refused(str(error))
      if needed is None:
        raise
      raise OutOfMemory(needed) from error
  memory, text = compiled.memory_analysis(), compiled.as_text()
  # an argument that is donated shares its place with a result
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Program(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    peak=memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
    operations=operations(traced.jaxpr.jaxpr) / mesh.size,
    collectives=collectives(text),
    text=text,
  )


def _bytes_refused(message: str) -> float | None:
  """Returns the bytes that a compiler's error speaks of, in the words of the TPU's or the GPU's."""
  used = re.search(
    r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT]? hbm|HLO temporaries \(([\d.]+)([KMGT])\)", message
  )
  if used is None:
    return None
  size, unit = filter(None, used.groups())
  return float(size) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit]


# ---- operations of a traced program --------------------------------------------------------------


def operations(jaxpr) -> float:
  """Counts the operations of all matrix products of a traced program, on all chips together.

  A `while` of unknown length counts once, of a `cond` the larger branch.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    total += _operations_of(equation)
  return total


def _operations_of(equation) -> float:
  """Counts one equation, with the programs inside it."""
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
  if name.startswith("dot_product_attention_"):
    # cuDNN's: two products forward, five backward, masked or not
    B, T, N, H = equation.invars[0].aval.shape
    S = equation.invars[1].aval.shape[1]
    per_pair = 4.0 if "fwd" in name else 10.0
    return per_pair * B * T * N * H * S
  inner = [operations(jaxpr) for jaxpr in _inner_programs(equation)]
  if name == "cond":
    return max(inner)
  if name == "scan":
    return sum(inner) * params["length"]
  if name == "shard_map":
    # the inner program is that of one device
    mesh, axes = params["mesh"], params["newly_manual_axes"]
    return sum(inner) * math.prod(mesh.shape[axis] for axis in axes)
  if name == "pallas_call":
    return sum(inner) * math.prod(params["grid_mapping"].grid) * _share_computed(equation)
  return sum(inner)


def _inner_programs(equation) -> Iterator[jax.extend.core.Jaxpr]:
  """Yields the programs among an equation's parameters, closed or not, alone or in a tuple."""
  for parameter in equation.params.values():
    values = parameter if isinstance(parameter, (tuple, list)) else (parameter,)
    for value in values:
      jaxpr = getattr(value, "jaxpr", value)
      if isinstance(jaxpr, jax.extend.core.Jaxpr):
        yield jaxpr


def _share_computed(equation) -> float:
  """Returns the share of a Pallas kernel's grid that it computes.

  Causal attention without a window visits every block of the square, and computes those on and
  below the diagonal. With a window it visits only what it computes.
  """
  queries, keys = equation.params["grid_mapping"].grid[-2:]
  if equation.params["name"].startswith("splash") and queries == keys:
    return (queries + 1) / (2 * queries)
  return 1.0


# ---- collectives of a compiled program -----------------------------------------------------------

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLS = re.compile(
  r"(?:calls|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)"
)

_BYTES = {  # of one element; 4 for all other types
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "bf16": 2,
  "f16": 2,
  "s16": 2,
  "u16": 2,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}


def collectives(text: str) -> dict[str, tuple[int, float]]:
  """Returns {kind: (times run, bytes that one chip receives)}, loops times their trip counts."""
  bodies, entry = _computations(text)
  totals: dict[str, tuple[int, float]] = {}
  _add_collectives(entry, 1, bodies, totals)
  return totals


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Splits a compiled program into {name: lines of a computation}, and names the entry."""
  bodies, name, entry = {}, None, None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if header:
      name = header[2]
      bodies[name] = []
      entry = name if header[1] else entry
    elif name is not None:
      bodies[name].append(line)
  return bodies, entry


def _add_collectives(name: str, times: int, bodies: dict, totals: dict) -> None:
  """Adds the collectives of `times` runs of a computation, and of all that it calls, to totals."""
  for line in bodies[name]:
    collective = _COLLECTIVE.search(line)
    if collective:
      shape, kind, start = collective.groups()
      size = _received(shape, kind, bool(start), _group_size(line))
      if "all-reduce-scatter" in name:  # how the TPU compiler writes a fused reduce-scatter
        kind, size = "reduce-scatter", size / 2
      count, total = totals.get(kind, (0, 0.0))
      totals[kind] = count + times, total + times * size
    for callee, turns in _called(line, bodies):
      _add_collectives(callee, times * turns, bodies, totals)


def _called(line: str, bodies: dict) -> Iterator[tuple[str, int]]:
  """Yields (computation, how often it runs) for those that a line calls."""
  loop = _LOOP.search(line)
  if loop:
    condition, body = loop.groups()
    # the CPU compiler writes the count down; of the TPU's the condition is read
    count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    yield body, int(count[1]) if count else _trips(bodies[condition])
    return
  for group in _CALLS.findall(line):
    for callee in group.split(", "):
      if callee.strip("%") in bodies:
        yield callee.strip("%"), 1


def _received(shape: str, kind: str, start: bool, group: int) -> float:
  """Returns the bytes that one chip of a group receives; start: the line starts a collective."""
  sizes = [
    math.prod(map(int, dims.split(","))) * _BYTES.get(dtype, 4)
    for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", shape)
  ]
  if start and kind != "all-reduce":  # names its operands too, before the results
    sizes = sizes[len(sizes) // 2 :]
  others = (group - 1) / group
  received_share = {
    "all-gather": others,
    "all-reduce": 2 * others,
    "reduce-scatter": group - 1.0,  # `shape` is that of the result, one chip's share
    "all-to-all": others,
    "collective-permute": 1.0,
  }
  return float(sum(sizes)) * received_share[kind]


def _group_size(line: str) -> int:
  """Returns how many chips take part, in any of three notations; 2 where none is given."""
  by_axis = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
  if by_axis:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axis[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", by_axis[2]))
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
  if iota:
    return int(iota[1])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  return len(listed[1].split(",")) if listed else 2


def _trips(condition: list[str]) -> int:
  """Returns the trip count of a loop counted up from 0; 1 where it is not a constant."""
  constants = {
    name: int(value)
    for line in condition
    for name, value in re.findall(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", line)
  }
  for line in condition:
    compare = re.search(r"compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", line)
    if compare and compare[1] in constants:
      return constants[compare[1]]
  return 1


# ---- kernels and arrays of a compiled program ----------------------------------------------------


def kernels(text: str) -> list[str]:
  """Names the Pallas kernels that a compiled program calls, and cuDNN's attention."""
  pallas = re.findall(
    r"%([\w.\-]+) = [^\n]*custom_call_target=\"(?:tpu_custom_call|mosaic_gpu_v2)\"", text
  )
  cudnn = re.findall(r'custom_call_target="__(cudnn\$fmha\w+)"', text)
  # the compiler numbers calls of one kernel
  return sorted({re.sub(r"\.\d+$", "", name) for name in pallas} | set(cudnn))


def logit_arrays(text: str, tokens: int, entries: int, model: ModelConfig) -> list[str]:
  """Lists the array types of a compiled program that may be logits of `tokens` x `entries`.

  Those are all with both sizes among their dimensions, and all of at least half as many elements:
  logits may be padded, flat or in two blocks. Stacks along the layers and (parts of) output
  matrices are left out of the latter.
  """
  candidates = []
  for array in sorted(set(re.findall(r"\w+\[[\d,]+\]", text))):
    sizes = [int(size) for size in array.partition("[")[2][:-1].split(",")]
    large = 2 * math.prod(sizes) >= tokens * entries
    explained = model.layers in sizes or _is_output_matrix(sizes, model)
    if {tokens, entries} <= set(sizes) or large and not explained:
      candidates.append(array)
  return candidates


def _is_output_matrix(sizes: list[int], model: ModelConfig) -> bool:
  """Tells whether an array may be a part of the output matrix, or of two side by side.

  Two stand side by side in a trust region.
  """
  matrix = [size for size in sizes if size > 1]
  if len(matrix) != 2:
    return False
  return any(
    model.vocab % entries == 0 and 2 * model.width % width == 0
    for entries, width in (matrix, matrix[::-1])
  )
