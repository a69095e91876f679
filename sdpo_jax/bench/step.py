r"""Measures time and memory of one optimiser step of SDPO on the present device.

  python -m sdpo_jax.bench step [--device=cpu|gpu|tpu] [--cases=small:equal,small:heavy,...] \
      [--micro_batches=1] [--remat=dots] [--methods=grpo,rlsd,...] [--json=FILE]

A step is both forward passes, loss, backward pass and update. A case is SHAPE:LENGTHS. Shapes are
those of SHAPES, with random weights and an EMA teacher. Every case runs in a child process of its
own. One JSON object a line comes out as cases end, then a table.

Lengths: `equal` is prompt 128, teacher prompt 256 and response 128 tokens; `heavy` has the same
prompts and log-normal responses of median 60 and at most 1,000 tokens. Groups of 8 have the same
prompt and teacher prompt. Rows are packed as in training: but on TPU, a prompt stands once a row
for all its responses.

Units and definitions:

  time_s          shortest of --repeats steps after one warm-up, wall clock
  cpu_s           processor seconds of that step, all threads
  tokens_per_s    tokens of the policy's texts (each response with its prompt, no padding) / time_s
  useful          share of columns that hold text, both halves
  mfu             model-flops utilisation: operations of the step's matrix products / time_s /
                  matrix_tflops. The products are those on all columns, none counted twice whatever
                  remat and the divergence compute again. Of attention they are the blocks that
                  splash computes on a TPU; on a GPU all that cuDNN is given, masked or not, and
                  there what the backward pass computes again; on a CPU one key block for each query
                  block, less than all: how many there are is in the data
  forward_s, pair_s, signals_s
                  the policy's half alone, both halves, and those with the divergence; each a
                  program of its own
  temporaries_mb  what the compiled step allocates beside arguments and results (the compiler's own
                  figure)
  peak_mb         on CPU the highest resident memory of the whole process; on GPU and TPU the
                  highest device memory in use
  matrix_tflops   the rate of a large product on this device

MB = 10^6 bytes.

--methods measures something else instead: the time of a step of each of these rows of
objectives/methods.py relative to that of `sdpo` (see relative.py).

results/step_cpu.json holds small:equal with --micro_batches=4 and small:heavy with 2, on one core
of a Xeon at real-time priority. On CPU a batch of SHAPE:equal wants --micro_batches=4, a group
each: logits of few tokens are kept instead of computed twice.
"""

import argparse
import json

from sdpo_jax.bench import child, relative
from sdpo_jax.bench.timing import best
from sdpo_jax.errors import local_path, unknown
from sdpo_jax.objectives.methods import METHODS

# the parent measures nothing: what needs jax is imported in the functions of the child

SHAPES = {  # name: sizes of a Qwen3-like decoder
  "tiny": dict(width=256, layers=4, heads=4, kv_heads=2, head_dim=64, ff_width=704, vocab=4096),
  "small": dict(width=512, layers=8, heads=8, kv_heads=4, head_dim=64, ff_width=1536, vocab=32768),
  "wide-vocab": dict(
    width=256, layers=2, heads=4, kv_heads=2, head_dim=64, ff_width=704, vocab=151936
  ),
  "qwen3-0.6b": dict(
    width=1024, layers=28, heads=16, kv_heads=8, head_dim=128, ff_width=3072, vocab=151936
  ),
  "qwen3-1.7b": dict(
    width=2048, layers=28, heads=16, kv_heads=8, head_dim=128, ff_width=6144, vocab=151936
  ),
}
CASES = {
  "cpu": "tiny:equal,tiny:heavy,small:equal,small:heavy",
  "gpu": "qwen3-0.6b:equal,qwen3-1.7b:equal,qwen3-1.7b:heavy",
  "tpu": "qwen3-0.6b:equal,qwen3-1.7b:equal,qwen3-1.7b:heavy",
}
OPTIMIZER = dict(
  name="adamw",
  lr=1e-6,
  warmup_steps=0,
  decay_steps=0,
  weight_decay=0.01,
  clip_norm=1.0,
  b1=0.9,
  b2=0.999,
  state_dtype="float32",
)
COLUMNS = (
  "case",
  "responses",
  "time_s",
  "cpu_s",
  "tokens_per_s",
  "useful",
  "mfu",
  "forward_s",
  "pair_s",
  "signals_s",
  "temporaries_mb",
  "peak_mb",
)


def main(argv):
  """Runs every case in a child process and prints the results; returns 1 if one has failed."""
  parser = _parser()
  args = parser.parse_args(argv)
  if args.child:
    request = json.loads(args.child)
    print(json.dumps(relative.measure(**request) if "methods" in request else _measure(**request)))
    return 0
  cases = (args.cases or CASES[args.device]).split(",")
  _check(parser, args, cases)
  names = ("device", "responses", "micro_batches", "remat", "repeats")
  request = {name: getattr(args, name) for name in names}
  if args.methods:
    request["methods"] = args.methods.split(",")
  results = []
  for case in cases:
    result = child.measure("step", dict(case=case, **request))
    print(json.dumps(result), flush=True)
    results.append(result)
  if args.json:
    with open(args.json, "w") as file:
      json.dump(results, file, indent=1)
  if args.methods:
    lines = [line for result in results for line in relative.rows(result)]
    print(child.table(relative.COLUMNS, lines, error_in="time_s"))
  else:
    print(child.table(COLUMNS, results, error_in="time_s"))
  return 1 if any("error" in result for result in results) else 0


def _parser():
  parser = argparse.ArgumentParser(
    prog="python -m sdpo_jax.bench step",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--device", choices=sorted(CASES), default="cpu")
  parser.add_argument("--cases", help="comma-separated SHAPE:LENGTHS")
  parser.add_argument("--responses", type=int, default=32)
  parser.add_argument("--micro_batches", type=int, default=1)
  parser.add_argument("--remat", choices=("none", "dots", "block"), default="dots")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--methods", help="comma-separated names of rows, to compare with sdpo")
  parser.add_argument(
    "--json",
    metavar="FILE",
    type=local_path,
    help="also write all results there, as one JSON list",
  )
  # one measurement, as JSON: what the parent starts
  parser.add_argument("--child", help=argparse.SUPPRESS)
  return parser


def _check(parser, args, cases):
  """Ends the program with one line for a case, a method or a division that cannot be."""
  for case in cases:
    shape, _, lengths = case.partition(":")
    if shape not in SHAPES or lengths not in ("equal", "heavy"):
      parser.error(
        f"--cases: {case!r} must be SHAPE:equal or SHAPE:heavy with a shape of {sorted(SHAPES)}"
      )
  if args.responses % args.micro_batches:
    parser.error(
      f"--micro_batches={args.micro_batches} does not divide --responses={args.responses}"
    )
  methods = args.methods.split(",") if args.methods else ()
  for name in methods:
    if name not in METHODS:
      parser.error(f"--methods: {unknown('method', name, sorted(METHODS))}")


def lengths_of(kind, responses, seed=0):
  """Returns (prompt, teacher prompt, response) tokens of each row."""
  import numpy as np

  if kind == "equal":
    return [(128, 256, 128)] * responses
  drawn = np.exp(np.random.default_rng(seed).normal(np.log(60), 1.2, responses)).astype(int) + 1
  drawn[0] = 1000
  return [(128, 256, int(n)) for n in np.minimum(drawn, 1000)]


def make_batch(lengths, vocab, packs, group=8, share=True, length_multiple=32, further=0):
  """Makes a batch of random tokens with these lengths, packed as training packs them.

  `group` consecutive rows answer one question; share: its prompt stands once a row. further: so
  many more readings by the teacher.
  """
  import numpy as np

  from sdpo_jax.config import base
  from sdpo_jax.data.batch import PackSettings, Responses, TeacherReading, pack_responses
  from sdpo_jax.data.packing import texts_after
  from sdpo_jax.data.shapes import ShapeRules, Shapes
  from sdpo_jax.objectives.teacher_context import Context
  from sdpo_jax.records import Feedback, Rollout, Task

  rng, B = np.random.default_rng(0), len(lengths)
  rollouts = []
  for _, _, n in lengths:
    tokens = rng.integers(1, vocab, n).tolist()
    rollouts.append(Rollout(Task("", ""), [], tokens, [-1.0] * n, "stop", "", Feedback(0.0, "")))

  def texts(starts):
    questions = -(-B // group)
    prompts = [rng.integers(1, vocab, max(starts)).tolist() for _ in range(questions)]
    return texts_after([prompts[b // group][: starts[b]] for b in range(B)], rollouts)

  prompts_B, teacher_prompts_B, _ = map(list, zip(*lengths, strict=True))
  policy, readings = texts(prompts_B), []
  for read in [texts(teacher_prompts_B) for _ in range(1 + further)]:
    contexts = [Context("a solution")] * B
    readings.append(TeacherReading(contexts, np.ones(B, np.float32), read, 0))
  responses = Responses(rollouts, [[0.0]] * B, np.ones(B, np.float32), policy, readings, [])
  longest = max(n for _, _, n in lengths)
  most = [max(lengths_B) + longest for lengths_B in (prompts_B, teacher_prompts_B)]
  shapes = Shapes((*most, longest))
  rules = ShapeRules.of(base().data)._replace(length=length_multiple)  # as a run packs
  settings = PackSettings(0, rules, shards=packs, share_prefixes=share)
  batch, _ = pack_responses(responses, group, settings, shapes, pad_token=0)
  return batch


def needed_operations(model, method, tx, state, batch):
  """Counts the operations of one step's matrix products where nothing is computed twice.

  It is traced without remat, and with the divergence as defined, which keeps its logits.
  """
  import jax

  from sdpo_jax import hlo
  from sdpo_jax.train_step import make_signals, make_train_step

  signals = make_signals(model, method, remat="none", implementation="reference")
  step = make_train_step(signals, method, tx)
  return hlo.operations(jax.make_jaxpr(step)(state, batch).jaxpr)


def _measure(*, case, device, responses, micro_batches, remat, repeats):
  """Returns the figures of one case, measured in this process."""
  import jax

  from sdpo_jax.objectives import build
  from sdpo_jax.optimizer import make_optimizer
  from sdpo_jax.train_step import make_signals

  shape, kind = case.split(":")
  model = model_of(shape, device)
  method = build.build_method(build.method_row("sdpo"))
  tx = make_optimizer(**OPTIMIZER)
  signals = make_signals(model, method, remat=remat)
  lengths = lengths_of(kind, responses)
  batch = device_batch(model, method, lengths, micro_batches, device)
  state, step = compiled_step(model, method, tx, signals, batch)
  operations = needed_operations(model, method, tx, state, batch)
  wall_s, cpu_s, state = _time_steps(step, state, batch, repeats)
  peak = _peak_bytes()  # before the programs below
  parts = _time_parts(model, signals, state, batch, micro_batches, repeats)
  rate = matrix_rate(2048 if device == "cpu" else 8192, model.dtype, repeats)
  halves = (batch.policy, batch.readings[0].rows)
  used = sum((half.segment_CPT > 0).sum() for half in halves)
  return dict(
    case=case,
    device=device,
    responses=responses,
    micro_batches=micro_batches,
    remat=remat,
    dtype=model.dtype,
    time_s=wall_s,
    cpu_s=cpu_s,
    tokens_per_s=sum(prompt + response for prompt, _, response in lengths) / wall_s,
    useful=float(used / sum(half.segment_CPT.size for half in halves)),
    mfu=operations / wall_s / rate,
    temporaries_mb=step.memory_analysis().temp_size_in_bytes / 1e6,
    peak_mb=peak / 1e6,
    matrix_tflops=rate / 1e12,
    device_kind=jax.devices()[0].device_kind,
    jax=jax.__version__,
    **parts,
  )


def model_of(shape, device):
  """Returns the decoder of a shape, in the type that a device multiplies in."""
  from sdpo_jax.model.config import ModelConfig

  dtype = "float32" if device == "cpu" else "bfloat16"
  return ModelConfig(family="qwen3", qk_norm="head", tied=True, dtype=dtype, **SHAPES[shape])


def device_batch(model, method, lengths, micro_batches, device, further=0):
  """Returns `make_batch` on the device, with what a method's first step reads beside it."""
  import jax
  import jax.numpy as jnp

  from sdpo_jax.objectives.control import Control

  packed = make_batch(
    lengths,
    model.vocab,
    micro_batches,
    share=device != "tpu",
    length_multiple=32 if device == "cpu" else 128,
    further=further,
  )
  scalars, _ = Control(method).begin([], 1)
  # what the pass before the updates would find takes the same time whatever it is
  found = {name: 0.0 * packed.logp_rollout_BR for name in method.found_before_updates}
  return jax.tree.map(jnp.asarray, packed._replace(control=scalars, **found))


def compiled_step(model, method, tx, signals, batch):
  """Returns a fresh train state and the compiled step, which takes over its state."""
  import jax

  from sdpo_jax import session
  from sdpo_jax.model import decoder
  from sdpo_jax.train_step import init_state, make_train_step

  weights = method.teacher_weights

  def fresh(key):
    params = decoder.init(model, key)
    return init_state(params, tx, keep_teacher=weights.keep, teacher_in_float32=weights.in_float32)

  step = make_train_step(signals, method, tx)
  with session.released_by_the_compiler():  # as in training
    state = jax.jit(fresh)(jax.random.key(0))
    return state, jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def _time_steps(step, state, batch, repeats):
  """Returns (wall seconds, processor seconds, state after the steps)."""
  import jax

  def run():
    nonlocal state
    state, _ = step(state, batch)
    jax.block_until_ready(state)

  wall_s, cpu_s = best(run, repeats)
  return wall_s, cpu_s, state


def _peak_bytes():
  """Returns the most memory used so far: of the process on a CPU, else of the device."""
  import resource

  import jax

  device = jax.devices()[0]
  if device.platform == "cpu":
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return device.memory_stats()["peak_bytes_in_use"]


def _time_parts(model, signals, state, batch, micro_batches, repeats):
  """Returns the seconds of the parts of a step, each a program of its own, over the whole batch."""
  import jax

  from sdpo_jax.model import decoder
  from sdpo_jax.train_step import forward_pair, make_score, run_rows

  def policy_half(state, batch):
    def hidden(half):
      tokens, positions, segments, prefixes = half
      return [
        decoder.hidden(
          state.params,
          model,
          tokens,
          positions_BT=positions,
          segment_ids_BT=segments,
          prefix_ids_BT=prefixes,
        )
      ]

    return run_rows(hidden, batch.policy)

  def pair(state, batch):
    return forward_pair(state.params, state.teacher, model, batch)[::2]

  def seconds(part, batch):
    program = jax.jit(part)
    return best(lambda: jax.block_until_ready(program(state, batch)), repeats)[0]

  # the first two on one micro-batch; `make_score` runs over all of them
  first = jax.tree.map(lambda x: x[: x.shape[0] // micro_batches], batch)
  return {
    "forward_s": seconds(policy_half, first) * micro_batches,
    "pair_s": seconds(pair, first) * micro_batches,
    "signals_s": seconds(make_score(signals), batch),
  }


def matrix_rate(size, dtype, repeats, *, clock=0):
  """Returns the operations per second of a product of two square matrices.

  clock: 0 for seconds of the wall clock, 1 for processor seconds (see `best`).
  """
  import jax
  import jax.numpy as jnp

  matrix = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
  return 2 * size**3 / best(lambda: product(matrix).block_until_ready(), repeats)[clock]
