"""Per-token divergence between teacher and policy, straight from hidden states and output matrices.

The definition is distill_kl_ref.py; this file only chooses who computes it.

Shapes: tokens X, policy width D, teacher width E, vocabulary V. Any X and V. Units: nats.
Gradient: to student_hidden_XD and student_head_DV only, from any cotangents of divergence, log-probability and
entropy, each per token: importance weights, blends with a policy gradient and entropy bonuses compose outside.
temperature divides both sides' logits and applies to every output.
weights_X, if given, promises that divergence_X will only ever be differentiated with cotangents c * weights_X (c any
scalar), which lets an implementation make the gradient in the forward pass; a broken promise gives NaN gradients.
All implementations but "reference" never hold X x V logits (but for sizes where those are a few MB).
Numerics: inputs may be bfloat16, logits are float32. With the teacher close to the policy (KL below about 1e-2, where
training spends its time) the divergence is a small difference of logits: bfloat16 logits lose it, and a gradient made
from them is off by 33 to 250 %. Here only the gradient with respect to the logits is rounded, just before the two
products that need it, so that with bfloat16 inputs the gradient stays within 5e-3 of float64's from KL 1e-4 to 1.
None chooses: "pallas_tpu" on a TPU where the logits are worth avoiding, else "xla". XLA cannot split a Pallas kernel
by itself, so that where several devices share the arrays only distill_kl_sharded gets it. "pallas_gpu" (Hopper) is
taken only when asked for, until a GPU has shown where it wins.
Errors: ValueError for an unknown implementation, alpha outside [0, 1] or temperature <= 0; AssertionError while
tracing for shapes that disagree.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from sdpo_jax.kernels import distill_kl_gpu, distill_kl_ref, distill_kl_tpu, distill_kl_xla, target
from sdpo_jax.kernels.distill_kl_ref import DistillKL
from sdpo_jax.kernels.distill_kl_sweeps import Layout, distill

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")


def distill_kl(
  student_hidden_XD,
  student_head_DV,
  teacher_hidden_XE,
  teacher_head_EV,
  target_X,
  *,
  alpha,
  temperature=1.0,
  weights_X=None,
  implementation=None,
) -> DistillKL:
  """Divergence, log-probabilities of the target under policy and teacher, and the policy's entropy, per token."""
  arrays = student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X
  _check(*arrays, weights_X, alpha, temperature)
  name = _choose(
    implementation, arrays, target_X.shape[0], student_head_DV.shape[1], alone=_on_one_device()
  )
  if name == "reference":
    return distill_kl_ref.distill_kl(*arrays, alpha=alpha, temperature=temperature)
  if name == "pallas_tpu":
    return distill_kl_tpu.distill_kl(*arrays, alpha=alpha, temperature=temperature)
  if name == "pallas_gpu":
    return distill_kl_gpu.distill_kl(*arrays, alpha=alpha, temperature=temperature)
  return distill_kl_xla.distill_kl(
    *arrays, alpha=alpha, temperature=temperature, weights_X=weights_X
  )


def distill_kl_sharded(
  student_hidden_XD,
  student_head_DV,
  teacher_hidden_XE,
  teacher_head_EV,
  target_X,
  *,
  mesh,
  alpha,
  temperature=1.0,
  implementation=None,
  token_axes=("data", "fsdp"),
  vocabulary_axis="tensor",
  head_axis="fsdp",
) -> DistillKL:
  """The same over a mesh: tokens split over token_axes, heads over (head_axis, vocabulary_axis); same values, same gradients."""
  arrays = student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X
  _check(*arrays, None, alpha, temperature)
  layout = Layout(mesh, tuple(token_axes), vocabulary_axis, head_axis)
  rows, V = layout.sizes(*student_hidden_XD.shape, student_head_DV.shape[1])
  name = _choose(implementation, arrays, rows, V, alone=True)
  if name == "reference":
    raise ValueError("implementation='reference' has no sharded form of its own: call distill_kl")
  if name == "pallas_tpu":
    shapes = [
      jax.ShapeDtypeStruct((rows, a.shape[1]) if i % 2 == 0 else (a.shape[0], V), a.dtype)
      for i, a in enumerate(arrays[:4])
    ]
    module, plan = distill_kl_tpu, distill_kl_tpu.make_plan(*shapes, alpha, temperature)
  elif name == "pallas_gpu":
    module, plan = distill_kl_gpu, distill_kl_gpu.make_plan(alpha, temperature)
  else:
    module, plan = distill_kl_xla, distill_kl_xla.vocabulary_plan(rows, alpha, temperature)
  h, w, g, u, target = arrays
  out = distill(module, plan, layout, layout.pad(h), w, layout.pad(g), u, layout.pad(target))
  return jax.tree.map(lambda x: x[: target.shape[0]], out)  # padded rows are cut off again


def _check(
  student_hidden_XD,
  student_head_DV,
  teacher_hidden_XE,
  teacher_head_EV,
  target_X,
  weights_X,
  alpha,
  temperature,
):
  X, D = student_hidden_XD.shape
  E, V = teacher_head_EV.shape
  assert student_head_DV.shape == (D, V), (
    student_hidden_XD.shape,
    student_head_DV.shape,
    teacher_head_EV.shape,
  )
  assert teacher_hidden_XE.shape == (X, E), (
    student_hidden_XD.shape,
    teacher_hidden_XE.shape,
    teacher_head_EV.shape,
  )
  assert target_X.shape == (X,), (student_hidden_XD.shape, target_X.shape)
  assert weights_X is None or weights_X.shape == (X,), (student_hidden_XD.shape, weights_X.shape)
  if not 0 <= alpha <= 1:
    raise ValueError(
      f"alpha={alpha!r} must lie in [0, 1]: 0 is KL(teacher || policy), 1 is KL(policy || teacher)"
    )
  if not temperature > 0:
    raise ValueError(f"temperature={temperature!r} must be > 0")


def _choose(implementation, arrays, X, V, alone):
  """The implementation's name, for X tokens and V entries on one device. alone: the compiler splits nothing here."""
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} is unknown; choose from {IMPLEMENTATIONS}")
  platform = target.target_platform()
  for_tpu = (
    platform == "tpu"
    and alone
    and X * V > distill_kl_xla.ONE_BLOCK_ENTRIES
    and all(a.dtype in (jnp.float32, jnp.bfloat16) for a in arrays[:4])
  )
  name = implementation or ("pallas_tpu" if for_tpu else "xla")
  _log_once(name, platform)
  return name


def _on_one_device():
  mesh = jax.sharding.get_abstract_mesh()
  return jax.device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)


@functools.cache
def _log_once(name, platform):
  logging.getLogger(__name__).info(
    "distillation divergence: implementation %s on %s", name, platform
  )
