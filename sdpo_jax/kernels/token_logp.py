"""Log-probability of each target token and the policy's entropy, from hidden states and an output matrix: no teacher.

For methods and losses that need no divergence (GRPO, supervised training). Where X x V logits are few they are kept for the
gradient; else the vocabulary goes through in blocks over all tokens, each recomputed in the backward pass, so that X x V logits
are never held. Units: nats. Numerics: float32 logits whatever the dtype of the inputs; products as in distill_kl_xla.py. Both
outputs are differentiable with respect to hidden states and output matrix.

Over a mesh (`mesh`) the layout and the collectives are those of distill_kl_sweeps.py: tokens over token_axes, the vocabulary over
vocabulary_axis, the head gathered over head_axis once; no logits and no hidden states leave their device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sdpo_jax.kernels import distill_kl_math as dm
from sdpo_jax.kernels import distill_kl_xla as blocked
from sdpo_jax.kernels.distill_kl_sweeps import Layout, own, reduce_gradients

BLOCK_BYTES = 64 * 2**20  # float32 logits that a device holds at a time
NO_DIVERGENCE = 0.5  # an alpha whose dm.Stats hold no term of both sides


def token_logp(
  hidden_XD: jax.Array,
  head_DV: jax.Array,
  target_X: jax.Array,
  *,
  temperature: float = 1.0,
  mesh=None,
  token_axes=("data", "fsdp"),
  vocabulary_axis="tensor",
  head_axis="fsdp",
) -> tuple[jax.Array, jax.Array]:
  """-> (logp_X, entropy_X), both float32. mesh: None where one device holds everything. X may be anything; D and V must divide over a mesh (ValueError)."""
  X, D = hidden_XD.shape
  V = head_DV.shape[1]
  assert head_DV.shape[0] == D and target_X.shape == (X,), (
    hidden_XD.shape,
    head_DV.shape,
    target_X.shape,
  )
  if mesh is None and 4 * X * V <= BLOCK_BYTES:
    return _all_at_once(hidden_XD, head_DV, target_X, temperature)
  layout, rows = None, X
  if mesh is not None:
    layout = Layout(mesh, tuple(token_axes), vocabulary_axis, head_axis)
    rows, _ = layout.sizes(X, D, V)
    hidden_XD, target_X = layout.pad(hidden_XD), layout.pad(target_X)
  plan = blocked.Plan(NO_DIVERGENCE, temperature, max(BLOCK_BYTES // (4 * rows) // 128 * 128, 128))
  logp_X, entropy_X = _sweep(plan, layout, hidden_XD, head_DV, target_X)
  return logp_X[:X], entropy_X[:X]  # without the padding


def _all_at_once(hidden_XD, head_DV, target_X, temperature):
  logits_XV = blocked.logits(
    blocked.Plan(NO_DIVERGENCE, temperature, 0),
    hidden_XD,
    head_DV,
    blocked.logit_dtype(hidden_XD, head_DV),
  )
  logp_XV = jax.nn.log_softmax(logits_XV)
  logp_X = jnp.take_along_axis(logp_XV, target_X[:, None], -1)[:, 0]
  return logp_X, -jnp.sum(jnp.exp(logp_XV) * logp_XV, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sweep(plan, layout, h, w, target):
  return _forward_rule(plan, layout, h, w, target)[0]


def _forward_rule(plan, layout, h, w, target):
  run = functools.partial(_forward, plan, layout)
  if layout is not None:
    w = layout.gather(w)
    tokens, head = P(layout.token_axes), P(None, layout.vocabulary_axis)
    run = jax.shard_map(
      run, mesh=layout.mesh, check_vma=False, in_specs=(tokens, head, tokens), out_specs=tokens
    )
  out, log_z = run(h, w, target)
  return out, (h, w, target, log_z, out[1])


def _forward(plan, layout, h, w, target):
  """((logp_X, entropy_X), log_z_X) of one device's tokens, the vocabulary's shards combined."""
  X, V = target.shape[0], w.shape[1]
  dtype = blocked.logit_dtype(h, w)
  # the teacher's side of the sums
  target, nobody = own(layout, target, V), jnp.zeros((X, 1), dtype)

  def body(start, size, stats):
    s = blocked.logits(plan, h, jax.lax.dynamic_slice_in_dim(w, start, size, axis=1), dtype)
    return dm.add_block(stats, s, nobody, blocked.hit(target, start, size), plan.alpha)

  stats = blocked.over_blocks(V, plan.size, body, dm.empty_stats(X, dtype))
  if layout is not None:
    stats = dm.add_shards(stats, plan.alpha, layout.vocabulary_axis)
  _, logp, _, scalars = dm.finish(stats, plan.alpha)
  return (logp[:, 0], scalars.entropy[:, 0]), scalars.log_z_s[:, 0]


def _backward_rule(plan, layout, saved, cotangents):
  h, w, *_ = saved
  run = functools.partial(_backward, plan, layout)
  if layout is not None:
    tokens, head = P(layout.token_axes), P(None, layout.vocabulary_axis)
    run = jax.shard_map(
      run,
      mesh=layout.mesh,
      check_vma=False,
      in_specs=(tokens, head, *[tokens] * 5),
      out_specs=(tokens, P(layout.head_axis, layout.vocabulary_axis)),
    )
  dh, dw = run(*saved, *cotangents)
  return dh.astype(h.dtype), dw.astype(w.dtype), None


def _backward(plan, layout, h, w, target, *columns):
  """(dh, dw) of one device's tokens and rows of the head."""
  V = w.shape[1]
  log_z, entropy, g_logp, g_entropy = (x[:, None] for x in columns)
  dtype = log_z.dtype
  target = own(layout, target, V)
  # a column of dw is complete at once, but for the other devices' parts
  dw_dtype = w.dtype if layout is None else dtype

  def body(start, size, carry):
    dh, dw = carry
    head = jax.lax.dynamic_slice_in_dim(w, start, size, axis=1)
    log_pi = blocked.logits(plan, h, head, dtype) - log_z
    d = jnp.where(blocked.hit(target, start, size), g_logp, 0) - jnp.exp(log_pi) * (
      g_entropy * (log_pi + entropy) + g_logp
    )
    dh_part, dw_part = blocked.gradient_products(plan, d, h, head, dtype)
    return dh + dh_part, jax.lax.dynamic_update_slice_in_dim(dw, dw_part.astype(dw_dtype), start, 1)

  dh, dw = blocked.over_blocks(
    V, plan.size, body, (jnp.zeros(h.shape, dtype), jnp.zeros(w.shape, dw_dtype))
  )
  return (dh, dw) if layout is None else reduce_gradients(layout, dh, dw)


_sweep.defvjp(_forward_rule, _backward_rule)
