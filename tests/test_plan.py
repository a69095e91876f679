"""The plan: counts of programs whose numbers are known, and the real TPU compiler on a small model.

Counted are operations and collectives.
"""

import dataclasses
import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sdpo_jax import chips, config, hlo, main, plan, session, sharding
from sdpo_jax.engine import programs
from sdpo_jax.kernels import attention
from sdpo_jax.model import decoder, lora
from sdpo_jax.model.config import PRESETS
from sdpo_jax.objectives import build

ROOT = os.path.dirname(os.path.dirname(__file__))
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)
needs_gpu_compiler = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="jax's CUDA plugin is not installed: no compiler for GPUs",
)


def test_operations_count_scans_branches_and_shards():
  square = jnp.ones((16, 16))
  product = 2.0 * 16**3

  def f(x):
    x, _ = jax.lax.scan(lambda x, _: (jax.checkpoint(lambda y: y @ square)(x), None), x, length=5)
    x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ square @ square, lambda x: x @ square, x)
    return jax.shard_map(
      lambda a: a @ square, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False
    )(x)

  with jax.set_mesh(sharding.make_mesh(jax.devices()[:4], data=2, fsdp=1, tensor=-1)):
    counted = hlo.operations(jax.make_jaxpr(f)(square).jaxpr)
  # the last one is computed by both devices along "tensor"
  assert counted == (5 + 2 + 1 * 2) * product


def test_causal_attention_counts_the_blocks_on_and_below_the_diagonal():
  B, T, N, K, H = 2, 2048, 4, 2, 128
  queries = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
  keys = jax.ShapeDtypeStruct((B, T, K, H), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((B, T), jnp.int32)

  def count(window):
    traced = jax.make_jaxpr(lambda q, k, v, s: attention.splash(q, k, v, s, window))
    return hlo.operations(traced(queries, keys, keys, segments).jaxpr)

  # two products; blocks of 1024: three of four are on or below the diagonal
  square = 2 * 2.0 * B * N * T * T * H
  assert count(None) == 0.75 * square and count(512) <= square


def test_operations_of_attention_that_is_no_program_of_ours():
  q, k = jnp.ones((2, 30, 8, 16)), jnp.ones((2, 50, 4, 16))
  for name, products in (
    ("dot_product_attention_fwd_wrapper", 2),
    ("dot_product_attention_bwd_wrapper", 5),
  ):
    fused = jax.extend.core.Primitive(name)
    fused.def_abstract_eval(lambda q, k, v: q)
    assert (
      hlo.operations(jax.make_jaxpr(fused.bind)(q, k, k).jaxpr)
      == products * 2 * 2 * 30 * 50 * 8 * 16
    )


@pytest.mark.parametrize("local", ["", ",local"])
@pytest.mark.parametrize("model", ["qwen3-8b", "olmo3-7b-instruct"])
@pytest.mark.parametrize(
  "machine, chips", [("v5p-16", 8), ("v5e-64", 64), ("v6e-16", 16), ("h200-8", 8)]
)
def test_the_presets_divide_over_their_machines(machine, chips, model, local):
  c = config.load(os.path.join(ROOT, f"configs/plan_8b.py:machine={machine},model={model}{local}"))
  assert c.mesh.data * c.mesh.fsdp * c.mesh.tensor == chips
  assert (
    c.rollout.questions * c.rollout.group % (c.train.micro_batches * c.mesh.data * c.mesh.fsdp) == 0
  )
  shape = PRESETS[c.model.path]
  all_axes = jax.tree.leaves(decoder.axes(shape))
  for axes, leaf in zip(all_axes, jax.tree.leaves(decoder.shapes(shape)), strict=True):
    for letter, size in zip(axes, leaf.shape, strict=True):
      axis = sharding.WEIGHTS[letter]
      assert axis is None or size % c.mesh[axis] == 0, (axes, leaf.shape, axis)


def test_kernels_are_named():
  text = """
  %splash_mha_fwd.3 = bf16[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
  %mpmd_map.1 = f32[8]{0} custom-call(%a), custom_call_target="mosaic_gpu_v2"
  %cudnn-fmha.7 = bf16[8]{0} custom-call(%a), \
custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"
"""
  assert hlo.kernels(text) == ["cudnn$fmhaScaleBiasSoftmaxBackward", "mpmd_map", "splash_mha_fwd"]


def test_arrays_as_large_as_the_logits_are_named():
  model = dataclasses.replace(PRESETS["qwen3-8b"], vocab=1000, width=64, layers=4)

  def named(*types):
    return hlo.logit_arrays(" ".join(types), 512, 1000, model)

  # padded, whole, two blocks at once, one of two, flat
  logits = ["bf16[1024,512]", "bf16[512,1000]", "f32[2,512,500]", "f32[512,512]", "f32[512000]"]
  assert named(*logits) == sorted(logits)
  # a block, a stack over the layers, hidden states
  assert not named("bf16[512,128]", "f32[4,1000,64,12]", "f32[2,512,64]")
  # output matrices are larger than the logits of few tokens; two stand side by side in a trust
  # region
  few = dataclasses.replace(model, width=2048)
  assert not hlo.logit_arrays(
    "f32[2048,1000] bf16[1000,1,1024] bf16[500,2048] bf16[4096,1000]", 512, 1000, few
  )


@pytest.fixture
def planned(monkeypatch):
  """Plans for eight devices of this machine: returns the report and what would be compiled.

  Programs are traced, and given this peak.
  """

  def run(topology, *arguments, peak=1e9, chips=8):
    _, c = main.parse(["main", f"--config={ROOT}/configs/tinycode.py:local", *arguments])
    compiled = []

    def compile_for(mesh, function, *args, **kwargs):
      with jax.set_mesh(mesh):
        function.trace(*args, **kwargs)
      compiled.append(args)
      return hlo.Program(0.0, 0.0, peak, 1.0, {}, "")

    monkeypatch.setattr(plan, "topology_devices", lambda name: jax.devices()[:chips])
    monkeypatch.setattr(plan, "compile_for", compile_for)
    return list(plan.report_lines(c, topology)), compiled

  return run


def test_a_dimension_that_the_mesh_does_not_divide_is_named(planned):
  with pytest.raises(
    ValueError, match=r"config.mesh.tensor=4 does not divide kv_heads=2 of the model"
  ):
    planned("v5p:2x2x2", "--config.mesh.tensor=4")


def test_adapters_train_on_weights_that_stand_beside_them(planned):
  whole, _ = planned("v5p:2x2x2")
  lines, (step, decoding, _) = planned("v5p:2x2x2", "--config.model.lora.rank=2")
  state, _, frozen = step
  model = session.model_shape("tiny")

  def sizes(tree):
    return jax.tree.map(lambda x: x.shape, tree)

  assert (
    sizes(state.params) == sizes(state.teacher) == sizes(lora.shapes(model, lora.Lora(2, 32.0)))
  )
  assert sizes(frozen) == sizes(decoding[0]) == sizes(decoder.shapes(model))
  assert any("weights that its adapters stand on" in line for line in lines) and not any(
    "adapters" in line for line in whole
  )


@pytest.mark.parametrize("rank", [0, 2])
def test_a_single_chip_copies_no_weights_of_the_type_of_its_products(planned, monkeypatch, rank):
  """Adapters are summed with their weights even so."""
  residents, attempt = [], plan.attempt

  def noting(resident, *arguments, **named):
    residents.append(resident)
    return attempt(resident, *arguments, **named)

  monkeypatch.setattr(plan, "attempt", noting)
  for dtype in ("float32", "bfloat16"):
    settings = [f"--config.model.lora.rank={rank}", f"--config.model.dtype={dtype}"]
    planned("v5p:1x1x1", *settings, chips=1)
  _, same, _, cast = residents  # beside a train step and a decode step each
  weights = sum(x.size * 4 for x in jax.tree.leaves(decoder.shapes(session.model_shape("tiny"))))
  assert cast - same == weights


def test_the_suggestion_is_a_setting_that_validates(planned):
  """Micro-batches are those of one update."""
  settings = ["--config.rollout.questions=16", "--config.train.updates_per_batch=4"]
  lines, _ = planned("v5p:2x2x2", *settings, "--config.train.micro_batches=2")
  (line,) = [line for line in lines if line.startswith("largest micro-batch")]
  assert line.startswith("largest micro-batch: 16 responses (config.train.micro_batches=1)")


def test_of_a_gpu_jax_gives_a_program_a_share(planned, monkeypatch):

  def last(topology):
    return planned(topology, peak=120e9)[0][-1]

  for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
    monkeypatch.delenv(name, raising=False)
  assert last("h200:8") == "plan: does not fit (120.0 of 105.8 GB per chip)" and last(
    "v5p:2x2x2"
  ).endswith("of 95 GB per chip)")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
  assert last("h200:8") == "plan: fits (120.0 of 126.9 GB per chip)" and last("v5p:2x2x2").endswith(
    "of 95 GB per chip)"
  )


@needs_libtpu
def test_decoding_on_a_tpu_copies_no_cache():
  devices = plan.topology_devices("v5p:2x2x1")
  mesh = sharding.make_mesh(devices, data=1, fsdp=4, tensor=1)
  model = dataclasses.replace(PRESETS["qwen3-8b"], layers=2, vocab=1024, dtype="bfloat16")
  params = jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    decoder.shapes(model),
    sharding.named(mesh, decoder.axes(model)),
  )
  shared, own, tables = plan.decode_shapes(model, mesh, rows=64, group=8, prompt=1024, new=1024)
  program = hlo.compile_for(
    mesh, programs.decode, params, shared, own, tables, config=model, is_sorted=False
  )
  for pages in (*shared, *own):
    shape = ",".join(map(str, pages.sharding.shard_shape(pages.shape)))
    assert f"bf16[{shape}]" in program.text
    assert not re.search(rf"bf16\[{shape}\]\S* copy\(", program.text)


def test_collectives_of_a_real_program_count_every_turn_of_the_loop():
  mesh = sharding.make_mesh(jax.devices(), data=1, fsdp=8, tensor=1)
  whole = jax.NamedSharding(mesh, jax.P())

  def f(x):
    def body(y, _):
      y = jax.lax.with_sharding_constraint(jnp.sin(y), whole)
      return jax.lax.with_sharding_constraint(y * 2.0, jax.NamedSharding(mesh, jax.P("fsdp"))), None

    return jax.lax.scan(body, x, length=7)[0]

  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))
  counted = hlo.collectives(jax.jit(f).lower(x).compile().as_text())
  assert counted == {"all-gather": (7, 7 * 64 * 32 * 4 * 7 / 8)}


def test_collectives_in_the_words_of_the_tpu_compiler():
  text = """
%add (a: f32[], b: f32[]) -> f32[] {
}
%all-reduce-scatter.3 (p: bf16[64,128]) -> bf16[8,128] {
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} \
all-reduce(%p), replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, to_apply=%add
}
%cond.1 (t: (s32[], f32[8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(36), backend_config={}
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.1, %constant.5), direction=LT
}
%body.1 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather-start.1 = (bf16[8,128]{1,0}, bf16[64,128]{1,0:T(8,128)(2,1)}) \
all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %fusion.2 = bf16[8,128]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[]{:T(128)}, f32[8]{0}) while(%tuple), \
condition=%cond.1, body=%body.1, metadata={}
  %all-reduce.9 = (f32[8]{0}, f32[4]{0}) \
all-reduce(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""
  size = 64 * 128 * 2
  assert hlo.collectives(text) == {
    "all-gather": (36, 36 * size * 7 / 8),
    "reduce-scatter": (36, 36 * size * 7 / 8),
    "all-reduce": (1, 2 * 48 * 3 / 4),
  }


def test_collectives_in_the_words_of_the_gpu_compiler():
  """Several tensors travel in one collective, whose start names operands and results."""
  text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %all-gather-start = ((bf16[8,64]{1,0}, bf16[8,32]{1,0}), (bf16[64,64]{1,0}, bf16[64,32]{1,0})) \
all-gather-start(%a, %b), replica_groups=[1,8]<=[8], dimensions={0}
  %all-gather-done = (bf16[64,64]{1,0}, bf16[64,32]{1,0}) all-gather-done(%all-gather-start)
  %reduce-scatter-start = ((f32[64,64]{1,0}, f32[64,32]{1,0}), (f32[8,64]{1,0}, f32[8,32]{1,0})) \
reduce-scatter-start(%c, %d), replica_groups=[1,8]<=[8], to_apply=%add
  %collective-permute-start = (f32[8]{0}, f32[8]{0}, u32[], u32[]) \
collective-permute-start(%e), source_target_pairs={{0,1}}
}
"""
  whole = 64 * (64 + 32)
  assert hlo.collectives(text) == {
    "all-gather": (1, 2 * whole * 7 / 8),
    "reduce-scatter": (1, 4 * whole * 7 / 8),
    "collective-permute": (1, 32.0),
  }


@pytest.mark.parametrize(
  "name, shape", [("h200:8", (1, 1, 8)), ("h100:2x8", (1, 2, 8)), ("l4:1", (1, 1, 1))]
)
def test_a_topology_of_gpus_is_slices_x_nodes_x_gpus(name, shape, monkeypatch):
  request = {}

  def get_topology_desc(**kwargs):
    request.update(kwargs)
    return jax.sharding.Mesh(jax.devices(), "x")

  monkeypatch.setattr(chips.topologies, "get_topology_desc", get_topology_desc)
  plan.topology_devices(name)
  assert request["platform"] == "cuda"
  assert request["topology"] == "x".join(map(str, shape))
  assert f'"{name.partition(":")[0]}"' in request["target_config"]
  capability = "major: 8 minor: 9" if name.startswith("l4") else "major: 9"
  assert f"cuda_compute_capability {{ {capability} }}" in request["target_config"]


def test_a_description_of_a_gpu_has_whole_bytes():
  text = chips.description("rtx4080")
  assert "memory_bandwidth: 716800000000\n" in text
  assert "device_memory_size: 16000000000\n" in text


@pytest.mark.slow
@needs_gpu_compiler
@pytest.mark.parametrize("topology, machine", [("rtx4080:1", "gpu-16"), ("l4:1", "gpu-24")])
@pytest.mark.parametrize("model", ["qwen3-0.6b", "qwen3-1.7b"])
def test_the_recipes_for_a_small_gpu_fit(topology, machine, model, monkeypatch):
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
  settings = f"configs/small_gpu.py:machine={machine},model={model}"
  c = config.load(os.path.join(ROOT, settings))
  *_, last = plan.report_lines(c, topology)
  assert last.startswith("plan: fits ("), last


@needs_libtpu
def test_a_mesh_that_shares_a_side_of_the_grid_between_two_axes():
  mesh = sharding.make_mesh(plan.topology_devices("v6e:4x4"), data=1, fsdp=8, tensor=2)
  assert len({d.id for d in mesh.devices.flat}) == 16 and mesh.devices.shape == (1, 8, 2)


@needs_libtpu
def test_a_plan_that_is_told_to_end_ends_without_a_trace_of_its_stack():
  command = "--mode=plan --topology=v5p:2x2x2 --config=configs/plan_8b.py:local".split()
  child = subprocess.Popen(
    [sys.executable, "-m", "sdpo_jax.main", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
  )
  said = ""
  for line in child.stderr:
    said += line
    if line.startswith("plan: compiles"):
      child.send_signal(signal.SIGTERM)
  assert child.wait(60) == -signal.SIGTERM
  assert "plan: compiles the train step" in said
  assert "SIGTERM" not in said


def test_the_suggestion_divides_the_responses():
  def suggested(limit):
    return list(
      plan.suggestion(
        30e9,
        limit,
        rows=2,
        micro_batches=16,
        shards=8,
        peak_of=lambda rows: 10e9 + 10e9 * rows,
      )
    )

  assert suggested(95e9) == [
    "largest micro-batch: 64 responses (config.train.micro_batches=4), "
    "from the slope between 16 and 32"
  ]
  assert suggested(25e9)[0].startswith(
    "largest micro-batch: 8 responses (config.train.micro_batches=32)"
  )
  assert suggested(15e9)[0].startswith("no micro-batch")


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:2xx", "h200:0", "h200:2x2x2"])
def test_a_topology_that_does_not_exist_is_named(name):
  with pytest.raises(ValueError, match=re.escape(name)):
    plan.topology_devices(name)


def test_what_finds_alternatives_is_said_not_to_be_counted(monkeypatch):
  monkeypatch.setattr(plan, "topology_devices", lambda name: jax.devices())
  c = config.base()
  c.model.path = "qwen3-0.6b"
  c.method = build.method_row("counterfactual")

  def heading():
    # nothing is compiled yet
    return "\n".join(itertools.islice(plan.report_lines(c, "v5p:2x2x2"), 4))

  assert "not counted" not in heading()
  c.method.counterfactual.update(sources=("model",), model="qwen3-8b")
  assert "not counted: weights and sampling of the second model, qwen3-8b" in heading()
  c.method.counterfactual.update(sources=("beams",), model="")
  assert "not counted: the beam search for alternatives" in heading()


@pytest.mark.slow
@pytest.mark.parametrize(
  "topology, memory_gb, kernels",
  [
    pytest.param(
      "v5p:2x2x2",
      "95",
      ["splash_mha_fwd_segmented_residuals", "distill_kl_statistics", "distill_kl_dlogits"],
      marks=needs_libtpu,
    ),
    pytest.param(
      "h200:8",
      "105.8",
      ["cudnn$fmhaScaleBiasSoftmaxBackward"],
      marks=needs_gpu_compiler,
    ),
  ],
)
def test_plan_of_a_small_model_from_the_command_line(topology, memory_gb, kernels):
  """The real compiler: the report ends with the promised line.

  Attention, and on a TPU the divergence, are on the chip's own kernels, and no array is as large as
  the logits.
  """
  child = subprocess.run(
    [
      sys.executable,
      "-m",
      "sdpo_jax.main",
      "--mode=plan",
      f"--topology={topology}",
      "--config=configs/plan_8b.py:local",
    ],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": "", "XLA_PYTHON_CLIENT_MEM_FRACTION": ""},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  assert child.returncode == 0, child.stderr[-2000:]
  assert "host bounds" not in child.stderr and "E0000" not in child.stderr, child.stderr[-2000:]
  lines = child.stdout.splitlines()
  assert re.fullmatch(rf"plan: fits \([\d.]+ of {re.escape(memory_gb)} GB per chip\)", lines[-1]), (
    lines
  )
  (named,) = [
    line.removeprefix("  kernels: ").split(", ") for line in lines if line.startswith("  kernels: ")
  ]
  assert set(kernels) <= set(named), named
  assert any(
    line.startswith("  arrays of 8192 tokens x 151936 entries") and line.endswith(": none")
    for line in lines
  ), lines
  assert any(line.startswith("train step") for line in lines) and any(
    line.startswith("decode step") for line in lines
  )
