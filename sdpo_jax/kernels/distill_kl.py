"""Chooses who computes the divergence between teacher and policy.

The divergence is made straight from hidden states and heads (output matrices), one number a token.
distill_kl_ref.py defines it.

Shapes: tokens X, policy width D, teacher width E, vocabulary V. Any X and V are fine. Units: nats.
`temperature` divides both sides' logits and applies to every output.

Gradient. It flows to student_hidden_XD and student_head_DV only, from any cotangents of
divergence, log-probability and entropy. Each of them is per token, so importance weights, blends
with a policy gradient and entropy bonuses compose outside.
`weights_X` is a promise: divergence_X is only ever differentiated with cotangents c * weights_X,
for any scalar c. It lets an implementation make the gradient in the forward pass. A broken promise
gives NaN gradients.

Memory: all implementations but "reference" never hold X x V logits, except where those are so few
that keeping them pays (distill_kl_xla.py says when).

Numerics: inputs may be bfloat16; logits are float32. Where the teacher is close to the policy, the
divergence is a small difference of logits. That is at a KL below about 1e-2, where training spends
its time. bfloat16 logits lose it: a gradient made from them is off by 33 to 250 %. Here only the
gradient with respect to the logits is rounded, just before the two products that need it. So with
bfloat16 inputs the gradient stays within 5e-3 of float64's from KL 1e-4 to 1.

Choice. None stands for "pallas_tpu" on a TPU where the logits are worth avoiding, else for "xla".
XLA cannot split a Pallas kernel by itself. Where several devices share the arrays, only
distill_kl_sharded chooses it. "pallas_gpu" (Hopper) has to be named, until a GPU has measured where
it wins.

Errors: ValueError for an unknown implementation, alpha outside [0, 1] or temperature <= 0;
AssertionError while tracing for shapes that disagree.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from sdpo_jax.kernels import distill_kl_gpu, distill_kl_ref, distill_kl_tpu, distill_kl_xla, target
from sdpo_jax.kernels.distill_kl_ref import DistillKL
from sdpo_jax.kernels.distill_kl_sweeps import Inputs, Layout, distill

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
  """Computes divergence, both log-probabilities of the target, and the policy's entropy.

  Args:
    alpha: in [0, 1]; 0 is KL(teacher || policy), 1 is KL(policy || teacher).
    weights_X: the promised cotangents of the divergence, up to a scalar, or None.
    implementation: one of IMPLEMENTATIONS, or None to choose.
  """
  inputs = Inputs(student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X)
  _check(inputs, weights_X, alpha, temperature)
  X, V = target_X.shape[0], student_head_DV.shape[1]
  name = _choose(implementation, inputs.matrices, X, V, alone=_on_one_device())
  settings = dict(alpha=alpha, temperature=temperature)
  if name == "reference":
    return distill_kl_ref.distill_kl(*inputs, **settings)
  if name == "pallas_tpu":
    return distill_kl_tpu.distill_kl(*inputs, **settings)
  if name == "pallas_gpu":
    return distill_kl_gpu.distill_kl(*inputs, **settings)
  return distill_kl_xla.distill_kl(*inputs, **settings, weights_X=weights_X)


def distill_kl_sharded(
  inputs: Inputs, *, mesh, alpha, temperature=1.0, implementation=None
) -> DistillKL:
  """Computes what distill_kl does, with the same values and gradients, over a mesh.

  `Layout` says over which axes tokens and heads are split. ValueError for heads that do not divide,
  and for "reference".
  """
  _check(inputs, None, alpha, temperature)
  layout = Layout(mesh)
  X, D = inputs.policy_hidden_XD.shape
  rows, entries = layout.sizes(X, D, inputs.policy_head_DV.shape[1])
  name = _choose(implementation, inputs.matrices, rows, entries, alone=True)
  if name == "reference":
    raise ValueError("implementation='reference' has no sharded form of its own: call distill_kl")
  if name == "pallas_tpu":
    module = distill_kl_tpu
    plan = distill_kl_tpu.make_plan(inputs, rows, entries, alpha, temperature)
  elif name == "pallas_gpu":
    module = distill_kl_gpu
    plan = distill_kl_gpu.make_plan(alpha, temperature)
  else:
    module = distill_kl_xla
    plan = distill_kl_xla.vocabulary_plan(rows, alpha, temperature)
  padded = distill(module, plan, layout, layout.pad_tokens(inputs))
  return jax.tree.map(lambda x: x[:X], padded)


def _check(inputs: Inputs, weights_X, alpha, temperature):
  X, D = inputs.policy_hidden_XD.shape
  E, V = inputs.teacher_head_EV.shape
  shapes = [x.shape for x in inputs]
  assert inputs.policy_head_DV.shape == (D, V), shapes
  assert inputs.teacher_hidden_XE.shape == (X, E), shapes
  assert inputs.target_X.shape == (X,), shapes
  assert weights_X is None or weights_X.shape == (X,), (shapes, weights_X.shape)
  if not 0 <= alpha <= 1:
    raise ValueError(
      f"alpha={alpha!r} must lie in [0, 1]: 0 is KL(teacher || policy), 1 is KL(policy || teacher)"
    )
  if not temperature > 0:
    raise ValueError(f"temperature={temperature!r} must be > 0")


def _choose(implementation, matrices, X, V, alone):
  """Returns the implementation's name for X tokens and V entries on one device, and logs it.

  alone: the compiler splits nothing here, so a Pallas kernel may be used.
  """
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} is unknown; choose from {IMPLEMENTATIONS}")
  platform = target.target_platform()
  suits_tpu_kernel = (
    platform == "tpu"
    and alone
    and X * V > distill_kl_xla.ONE_BLOCK_ENTRIES
    and all(x.dtype in (jnp.float32, jnp.bfloat16) for x in matrices)
  )
  name = implementation or ("pallas_tpu" if suits_tpu_kernel else "xla")
  _log_once(name, platform)
  return name


def _on_one_device() -> bool:
  """Tells whether one device has the arrays: the only one, or inside a shard_map."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)


@functools.cache
def _log_once(name, platform):
  logging.getLogger(__name__).info(
    "distillation divergence: implementation %s on %s", name, platform
  )
