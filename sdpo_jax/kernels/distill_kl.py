"""Per-token divergence between teacher and policy, straight from hidden states and output matrices.

The definition is distill_kl_ref.py; this file only chooses who computes it.

Shapes: tokens X, policy width D, teacher width E, vocabulary V. Any X and V. Units: nats.
Gradient: to student_hidden_XD and student_head_DV only, from any cotangents of divergence, log-probability and
entropy, each per token: importance weights, blends with a policy gradient and entropy bonuses compose outside.
temperature divides both sides' logits and applies to every output.
weights_X, if given, promises that divergence_X will only ever be differentiated with cotangents c * weights_X (c any
scalar), which lets an implementation make the gradient in the forward pass; a broken promise gives NaN gradients.
All implementations but "reference" never hold X x V logits (but for sizes where those are a few MB).
Errors: ValueError for an unknown implementation, alpha outside [0, 1] or temperature <= 0; AssertionError while
tracing for shapes that disagree.
"""

import functools
import logging

import jax

from sdpo_jax.kernels import distill_kl_ref
from sdpo_jax.kernels import distill_kl_xla
from sdpo_jax.kernels.distill_kl_ref import DistillKL

IMPLEMENTATIONS = ("reference", "xla")


def distill_kl(student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X, *, alpha, temperature=1.0,
               weights_X=None, implementation=None) -> DistillKL:
  """Divergence, log-probabilities of the target under policy and teacher, and the policy's entropy, per token."""
  X, D = student_hidden_XD.shape
  E, V = teacher_head_EV.shape
  assert student_head_DV.shape == (D, V), (student_hidden_XD.shape, student_head_DV.shape, teacher_head_EV.shape)
  assert teacher_hidden_XE.shape == (X, E), (student_hidden_XD.shape, teacher_hidden_XE.shape, teacher_head_EV.shape)
  assert target_X.shape == (X,), (student_hidden_XD.shape, target_X.shape)
  assert weights_X is None or weights_X.shape == (X,), (student_hidden_XD.shape, weights_X.shape)
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha={alpha!r} must lie in [0, 1]: 0 is KL(teacher || policy), 1 is KL(policy || teacher)")
  if not temperature > 0:
    raise ValueError(f"temperature={temperature!r} must be > 0")
  name = implementation or "xla"
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} is unknown; choose from {IMPLEMENTATIONS}")
  _log_once(name)
  arrays = student_hidden_XD, student_head_DV, teacher_hidden_XE, teacher_head_EV, target_X
  if name == "reference":
    return distill_kl_ref.distill_kl(*arrays, alpha=alpha, temperature=temperature)
  return distill_kl_xla.distill_kl(*arrays, alpha=alpha, temperature=temperature, weights_X=weights_X)


@functools.cache
def _log_once(name):
  logging.getLogger(__name__).info("distillation divergence: implementation %s on %s", name, jax.default_backend())
