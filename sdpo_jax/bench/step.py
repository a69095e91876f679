"""Time and memory of one optimiser step of SDPO (both forward passes, loss, backward pass, update), on the present device.

  python -m sdpo_jax.bench step [--device=cpu|gpu|tpu] [--cases=small:equal,small:heavy,...] [--micro_batches=1] [--remat=dots] [--json=FILE]

A case is SHAPE:LENGTHS. Shapes are those of SHAPES, random weights, an EMA teacher. Lengths: `equal`, prompt 128, teacher prompt 256 and
response 128 tokens; `heavy`, the same prompts and log-normal responses of median 60 and at most 1,000 tokens. Groups
of 8 have the same prompt and teacher prompt. Rows are packed as in training (but on TPU, a prompt stands once a row for all its responses).
Every case runs in a child process of its own. One JSON object a line as they come in, then a table. Units and definitions:

  time_s           shortest of --repeats steps after one warm-up, wall clock; cpu_s: processor seconds of that step, all threads
  tokens_per_s     tokens of student texts (each response with its prompt, no padding) / time_s;  useful: share of columns that hold text, both halves
  mfu              model-flops utilisation: operations of the step's matrix products, on all columns, none counted twice whatever remat and the
                   divergence compute again / time_s / matrix_tflops, the rate of a large product here. Of attention it has the blocks that splash
                   computes on a TPU, or all that cuDNN is given on a GPU, masked or not, and there what the backward pass computes again; on a
                   CPU one key block for each query block, less than all: how many there are is in the data
  forward_s, pair_s, signals_s   the student's half alone, both halves, and those with the divergence; each a program of its own
  temporaries_mb   what the compiled step allocates beside arguments and results (the compiler's own figure)
  peak_mb          on CPU: highest resident memory of the whole process; on GPU and TPU: highest device memory in use

MB = 10^6 bytes. results/step_cpu.json: small:equal with --micro_batches=4 and small:heavy with 2, one core of a Xeon at real-time priority. On CPU a
batch of SHAPE:equal wants --micro_batches=4, a group each: logits of few tokens are kept instead of computed twice.
"""

import argparse
import json
import os
import subprocess
import sys

from sdpo_jax.bench.timing import best

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
  parser.add_argument(
    "--json", metavar="FILE", help="also write all results there, as one JSON list"
  )
  # one measurement, as JSON: what the parent starts
  parser.add_argument("--child", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.child:
    print(json.dumps(_measure(**json.loads(args.child))))
    return 0
  cases = (args.cases or CASES[args.device]).split(",")
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
  rows, failed = [], 0
  for case in cases:
    request = dict(
      case=case,
      device=args.device,
      responses=args.responses,
      micro_batches=args.micro_batches,
      remat=args.remat,
      repeats=args.repeats,
    )
    child = subprocess.run(
      [sys.executable, "-m", "sdpo_jax.bench", "step", "--child", json.dumps(request)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
      env=os.environ
      | {
        "JAX_PLATFORMS": {"gpu": "cuda"}.get(args.device, args.device),
        "JAX_TRACEBACK_FILTERING": "off",
      },
    )
    if child.returncode:
      result = request | {
        "error": f"exit {child.returncode}: {(child.stderr.strip().splitlines() or ['no output'])[-1]}"
      }
      failed += 1
    else:
      result = json.loads(child.stdout.splitlines()[-1])
    print(json.dumps(result), flush=True)
    rows.append(result)
  if args.json:
    with open(args.json, "w") as f:
      json.dump(rows, f, indent=1)
  print(table(rows))
  return 1 if failed else 0


def table(rows):
  """Markdown; a missing figure is left empty, a failed measurement says so."""

  def cell(row, column):
    value = row.get(column, row.get("error", "") if column == "time_s" else "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)

  lines = [list(COLUMNS), ["---"] * len(COLUMNS)] + [
    [cell(row, c) for c in COLUMNS] for row in rows
  ]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def lengths_of(kind, responses, seed=0):
  """(prompt, teacher prompt, response) tokens of each row."""
  import numpy as np

  if kind == "equal":
    return [(128, 256, 128)] * responses
  drawn = np.exp(np.random.default_rng(seed).normal(np.log(60), 1.2, responses)).astype(int) + 1
  drawn[0] = 1000
  return [(128, 256, int(n)) for n in np.minimum(drawn, 1000)]


def make_batch(lengths, vocab, packs, group=8, share=True, length_multiple=32):
  """Random tokens of these lengths, packed as training packs them; `group` consecutive rows answer one question, read once a row if share."""
  import numpy as np

  from sdpo_jax.data.packing import Dealt, Text, balanced_order, begin_alike, first_fit, lay_out
  from sdpo_jax.data.shapes import Shapes, choose_shape
  from sdpo_jax.records import Rows, TrainBatch

  order = balanced_order([3 * (p + n) + q + n for p, q, n in lengths], group, 1, packs, whole=share)
  lengths, question = [lengths[b] for b in order], [b // group for b in order]
  rng, B = np.random.default_rng(0), len(lengths)
  answers = [rng.integers(1, vocab, n).tolist() for _, _, n in lengths]
  cut = lambda rows: [rows[first : first + B // packs] for first in range(0, B, B // packs)]
  at = [int(sum(pack[:i])) for pack in cut([n for _, _, n in lengths]) for i in range(len(pack))]

  def read(starts):  # (what packing knows, texts, starts) of each pack
    prompts = [rng.integers(1, vocab, max(starts)).tolist() for _ in range(max(question) + 1)]
    texts = [prompts[q][:start] + answer for q, start, answer in zip(question, starts, answers)]
    known = [
      begin_alike(*pack) if share else [Text(len(t)) for t in pack[0]]
      for pack in zip(*map(cut, (texts, starts, question)))
    ]
    return known, cut(texts), cut(starts)

  student, teacher = read([p for p, _, _ in lengths]), read([q for _, q, _ in lengths])
  found = Dealt(student[0], teacher[0], cut([n for _, _, n in lengths]))
  longest = max(n for _, _, n in lengths)
  shapes = Shapes(
    (max(p for p, _, _ in lengths) + longest, max(q for _, q, _ in lengths) + longest, longest)
  )
  shape = choose_shape(
    lambda packs: found, [packs], shapes, length_multiple=length_multiple, response_multiple=8
  )

  def half(read, rows, length):
    laid = [
      lay_out(first_fit(known, length), known, texts, starts, at_C, rows, length, shape.tokens, 0)
      for known, texts, starts, at_C in zip(*read, cut(at))
    ]
    stacked = Rows(*map(np.stack, zip(*laid)))
    return stacked if share else stacked._replace(prefix_CPT=None)

  zeros = lambda: np.zeros((B, shape.responses), np.float32)
  batch = TrainBatch(
    half(student, shape.rows, shape.length),
    half(teacher, shape.teacher_rows, shape.teacher_length),
    np.array(at, np.int32),
    zeros().astype(np.int32),
    zeros(),
    np.zeros(B, np.float32),
    np.ones(B, np.float32),
    zeros(),
    zeros(),
  )
  for b, answer in enumerate(answers):
    batch.response_BR[b, : len(answer)], batch.weight_BR[b, : len(answer)] = answer, 1.0
    batch.logp_rollout_BR[b, : len(answer)] = -1.0
  return batch


def needed_operations(model, objective, tx, state, batch):
  """Of one step's matrix products where nothing is computed twice: traced without remat, and with the divergence as defined, which keeps its logits."""
  import jax

  from sdpo_jax import hlo
  from sdpo_jax.train_step import make_signals, make_train_step

  signals = make_signals(model, objective, remat="none", implementation="reference")
  return hlo.operations(
    jax.make_jaxpr(make_train_step(signals, objective, tx, teacher_move=0.05))(state, batch).jaxpr
  )


def _measure(*, case, device, responses, micro_batches, remat, repeats):
  import resource

  import jax
  import jax.numpy as jnp

  from sdpo_jax import session
  from sdpo_jax.model import decoder
  from sdpo_jax.model.config import ModelConfig
  from sdpo_jax.objectives import build
  from sdpo_jax.objectives.loss import make_objective
  from sdpo_jax.optimizer import make_optimizer
  from sdpo_jax.train_step import (
    forward_pair,
    init_state,
    make_score,
    make_signals,
    make_train_step,
    run_rows,
  )

  shape, kind = case.split(":")
  dtype = "float32" if device == "cpu" else "bfloat16"
  model = ModelConfig(family="qwen3", qk_norm="head", tied=True, dtype=dtype, **SHAPES[shape])
  objective = make_objective(build.method_row("sdpo"))
  tx = make_optimizer(
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
  signals = make_signals(model, objective, remat=remat)
  lengths = lengths_of(kind, responses)
  batch = jax.tree.map(
    jnp.asarray,
    make_batch(
      lengths,
      model.vocab,
      micro_batches,
      share=device != "tpu",
      length_multiple=32 if device == "cpu" else 128,
    ),
  )
  with session.released_by_the_compiler():  # as in training
    state = jax.jit(lambda key: init_state(decoder.init(model, key), tx, keep_teacher=True))(
      jax.random.key(0)
    )
    step = (
      jax.jit(make_train_step(signals, objective, tx, teacher_move=0.05), donate_argnums=0)
      .lower(state, batch)
      .compile()
    )
  operations = needed_operations(model, objective, tx, state, batch)

  def one():
    nonlocal state
    state, _ = step(state, batch)
    jax.block_until_ready(state)

  wall, cpu = best(one, repeats)
  # before the parts below, which are programs of their own
  if jax.devices()[0].platform == "cpu":
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  else:
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
  first = jax.tree.map(lambda x: x[: x.shape[0] // micro_batches], batch)
  one = lambda params: (
    lambda half: [
      decoder.hidden(
        params, model, half[0], positions_BT=half[1], segment_ids_BT=half[2], prefix_ids_BT=half[3]
      )
    ]
  )
  student = jax.jit(lambda s, b: run_rows(one(s.params), b.student))
  parts = {
    "forward_s": (student, first),
    "pair_s": (jax.jit(lambda s, b: forward_pair(s.params, s.teacher, model, b)[::2]), first),
    "signals_s": (jax.jit(make_score(signals)), batch),
  }
  timed = {
    name: best(lambda f=f, b=b: jax.block_until_ready(f(state, b)), repeats)[0]
    * (1 if b is batch else micro_batches)
    for name, (f, b) in parts.items()
  }
  n = 2048 if device == "cpu" else 8192
  a = jnp.ones((n, n), dtype)
  product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
  rate = 2 * n**3 / best(lambda: product(a).block_until_ready(), repeats)[0]
  halves = (batch.student, batch.teacher)
  return dict(
    case=case,
    device=device,
    responses=responses,
    micro_batches=micro_batches,
    remat=remat,
    dtype=dtype,
    time_s=wall,
    cpu_s=cpu,
    tokens_per_s=sum(p + n for p, _, n in lengths) / wall,
    useful=float(
      sum((h.segment_CPT > 0).sum() for h in halves) / sum(h.segment_CPT.size for h in halves)
    ),
    mfu=operations / wall / rate,
    temporaries_mb=step.memory_analysis().temp_size_in_bytes / 1e6,
    peak_mb=peak / 1e6,
    matrix_tflops=rate / 1e12,
    device_kind=jax.devices()[0].device_kind,
    jax=jax.__version__,
    **timed,
  )
