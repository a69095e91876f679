"""What a compiled program holds: operations, collectives, kernels, and arrays of logits."""

import math
import re

import jax

from sdpo_jax.model.config import ModelConfig


def operations(jaxpr) -> float:
  """Of the matrix products of a traced program, on all chips. A `while` of unknown length counts once, of a `cond` the larger branch."""
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = [
      operations(getattr(j, "jaxpr", j))
      for p in eqn.params.values()
      for j in (p if isinstance(p, (tuple, list)) else (p,))
      if isinstance(getattr(j, "jaxpr", j), jax.extend.core.Jaxpr)
    ]
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      total += (
        2.0
        * math.prod(eqn.outvars[0].aval.shape)
        * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
      )
    # cuDNN's: two products forward, five backward, masked or not
    elif eqn.primitive.name.startswith("dot_product_attention_"):
      (B, T, N, H), S = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
      total += (4.0 if "fwd" in eqn.primitive.name else 10.0) * B * T * N * H * S
    elif eqn.primitive.name == "cond":
      total += max(inner)
    elif eqn.primitive.name == "scan":
      total += sum(inner) * eqn.params["length"]
    elif eqn.primitive.name == "shard_map":
      total += sum(inner) * math.prod(
        eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"]
      )
    elif eqn.primitive.name == "pallas_call":
      total += sum(inner) * math.prod(eqn.params["grid_mapping"].grid) * _share_computed(eqn)
    else:
      total += sum(inner)
  return total


def _share_computed(eqn) -> float:
  """Causal attention visits every block of the square and computes those on and below the diagonal; with a window it visits what it computes."""
  queries, keys = eqn.params["grid_mapping"].grid[-2:]
  return (
    (queries + 1) / (2 * queries)
    if eqn.params["name"].startswith("splash") and queries == keys
    else 1.0
  )


# ---- collectives of a compiled program
# ----------------------------------------------------------------------------------

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


_BYTES = {
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
  """{kind: (times run, bytes that one chip receives)}, loops times their trip counts."""
  bodies, name, entry = {}, None, None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if header:
      name = header[2]
      bodies[name] = []
      entry = name if header[1] else entry
    elif name is not None:
      bodies[name].append(line)
  found: dict[str, tuple[int, float]] = {}

  def visit(name: str, times: int):
    for line in bodies[name]:
      op = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(", line)
      if op:
        kind, size = op[2], _received(op[1], op[2], bool(op[3]), _group_size(line))
        if "all-reduce-scatter" in name:  # how the TPU compiler writes a fused reduce-scatter
          kind, size = "reduce-scatter", size / 2
        count, total = found.get(kind, (0, 0.0))
        found[kind] = count + times, total + times * size
      loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
      if loop:
        # the CPU compiler says so; the TPU's condition is read
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        visit(loop[2], times * (int(known[1]) if known else _trips(bodies[loop[1]])))
        continue
      for group in re.findall(
        r"(?:calls|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)", line
      ):
        for callee in re.split(r", ", group):
          if callee.strip("%") in bodies:
            visit(callee.strip("%"), times)

  visit(entry, 1)
  return found


def _received(shape: str, kind: str, start: bool, group: int) -> float:
  sizes = [
    math.prod(map(int, dims.split(","))) * _BYTES.get(dtype, 4)
    for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", shape)
  ]
  if start and kind != "all-reduce":  # names its operands too, before the results
    sizes = sizes[len(sizes) // 2 :]
  total = float(sum(sizes))
  share = (group - 1) / group
  return (
    total
    * {
      "all-gather": share,
      "all-reduce": 2 * share,
      "reduce-scatter": group - 1.0,
      "all-to-all": share,
      "collective-permute": 1.0,
    }[kind]
  )


def _group_size(line: str) -> int:
  named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
  if iota:
    return int(iota[1])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  return len(listed[1].split(",")) if listed else 2


def _trips(condition: list[str]) -> int:
  """Of a loop counted up from 0; 1 where the length is not a constant."""
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


def kernels(text: str) -> list[str]:
  """Names of the Pallas kernels that a compiled program calls, and of cuDNN's attention."""
  pallas = re.findall(
    r"%([\w.\-]+) = [^\n]*custom_call_target=\"(?:tpu_custom_call|mosaic_gpu_v2)\"", text
  )
  return sorted(
    {re.sub(r"\.\d+$", "", name) for name in pallas}
    | set(re.findall(r'custom_call_target="__(cudnn\$fmha\w+)"', text))
  )


def logit_arrays(text: str, tokens: int, entries: int, model: ModelConfig) -> list[str]:
  """Types of a compiled program that may be logits of so many tokens: those with both sizes among their dimensions, and all others of at least half as many
  elements, padded, flat or in two blocks as they may be, but for what is stacked along the layers and for (parts of) output matrices."""

  def may_be(sizes: list[int]) -> bool:
    if {tokens, entries} <= set(sizes):
      return True
    a, *rest = sorted(size for size in sizes if size > 1) or [1]
    # 2: a trust region's two side by side
    matrix = len(rest) == 1 and any(
      model.vocab % v == 0 and 2 * model.width % d == 0 for v, d in ((a, *rest), (*rest, a))
    )
    return 2 * math.prod(sizes) >= tokens * entries and not matrix and model.layers not in sizes

  types = set(re.findall(r"\w+\[[\d,]+\]", text))
  return sorted(
    t for t in types if may_be([int(size) for size in t.partition("[")[2][:-1].split(",")])
  )
