"""The whole SDPO objective on plain logits: the specification that the fast path is tested against.

Source: arXiv 2601.20802, sections 2-3 and appendix; formulas in the paper's order. Everything is dense and in the dtype of the
logits (float32 or float64). Shapes: logits are [B, R, V], everything else [B, R] or [B]. Units: nats.
"""

import jax
import jax.numpy as jnp


def divergence(logp_BRV, logq_BRV, alpha: float):
  """D(pi, q) per token. alpha = 0: KL(q || pi); 1: KL(pi || q); else (1-a) KL(pi || m) + a KL(q || m), m = (1-a) pi + a q."""
  kl = lambda a, b: jnp.sum(jnp.where(jnp.isneginf(a), 0.0, jnp.exp(a) * (a - b)), -1)
  if alpha == 0.0:
    return kl(logq_BRV, logp_BRV)
  if alpha == 1.0:
    return kl(logp_BRV, logq_BRV)
  logm_BRV = jnp.logaddexp(logp_BRV + jnp.log1p(-alpha), logq_BRV + jnp.log(alpha))
  return (1.0 - alpha) * kl(logp_BRV, logm_BRV) + alpha * kl(logq_BRV, logm_BRV)


def keep_top_k(logp_BRV, logq_BRV, k: int, add_tail: bool):
  """The policy's k likeliest entries of both; then a bucket with the rest of the mass, or renormalised."""
  top_logp, top_BRK = jax.lax.top_k(logp_BRV, k)
  top_logq = jnp.take_along_axis(logq_BRV, top_BRK, -1)
  if add_tail:

    def with_tail(x):
      s = jnp.minimum(jax.nn.logsumexp(x, -1, keepdims=True), -1e-7)
      return jnp.concatenate([x, jnp.log(-jnp.expm1(s))], -1)

    return with_tail(top_logp), with_tail(top_logq)
  return jax.nn.log_softmax(top_logp), jax.nn.log_softmax(top_logq)


def sdpo_loss(
  student_logits_BRV,
  teacher_logits_BRV,
  response_BR,
  weight_BR,
  distill_B,
  *,
  logp_old_BR=None,
  logp_rollout_BR=None,
  alpha=0.5,
  top_k=None,
  add_tail=True,
  granularity="logit",
  is_clip=2.0,
  rollout_is_clip=2.0,
  advantage_clip=None,
):
  """Scalar loss: token mean over weight_BR * distill_B.

  granularity: "logit" | "token" | "sequence". A clip of None: that factor is absent. logp_old None: ratio 1; logp_rollout None:
  no engine mismatch. advantage_clip: reverse KL at logit level with each entry's advantage log q - log pi, a constant, held within
  +-advantage_clip; the gradient is the policy gradient of Prop. 2.1 with these advantages. No gradient reaches the teacher, the ratios or the detached advantages.
  """
  sg = jax.lax.stop_gradient
  logp_BRV = jax.nn.log_softmax(student_logits_BRV)
  logq_BRV = sg(jax.nn.log_softmax(teacher_logits_BRV))
  pick = lambda x_BRV: jnp.take_along_axis(x_BRV, response_BR[..., None], -1)[..., 0]
  logp_BR, logq_BR = pick(logp_BRV), pick(logq_BRV)
  gap_BR = sg(logq_BR - logp_BR)
  if granularity == "logit":
    kept = keep_top_k(logp_BRV, logq_BRV, top_k, add_tail) if top_k else (logp_BRV, logq_BRV)
    if advantage_clip is None:
      loss_BR = divergence(*kept, alpha)
    else:
      assert alpha == 1.0, (
        f"the advantage of an entry is that of reverse KL: alpha must be 1, not {alpha}"
      )
      logp_kept, logq_kept = kept
      loss_BR = -jnp.sum(
        jnp.exp(logp_kept) * sg(jnp.clip(logq_kept - logp_kept, -advantage_clip, advantage_clip)),
        -1,
      )
  elif granularity == "token":
    assert alpha == 1.0, (
      f"token-level credit is the score-function form of reverse KL: alpha must be 1, not {alpha}"
    )
    loss_BR = -gap_BR * logp_BR
  elif granularity == "sequence":
    mean_B1 = jnp.sum(gap_BR * weight_BR, -1, keepdims=True) / jnp.maximum(
      jnp.sum(weight_BR, -1, keepdims=True), 1.0
    )
    loss_BR = -mean_B1 * logp_BR
  else:
    raise ValueError(
      f"granularity={granularity!r} is unknown; choose from ['logit', 'sequence', 'token']"
    )
  old_BR = sg(logp_BR) if logp_old_BR is None else logp_old_BR
  if is_clip is not None:
    loss_BR = loss_BR * sg(jnp.minimum(jnp.exp(jnp.clip(logp_BR - old_BR, -20.0, 20.0)), is_clip))
  if rollout_is_clip is not None and logp_rollout_BR is not None:
    loss_BR = loss_BR * sg(
      jnp.minimum(jnp.exp(jnp.clip(old_BR - logp_rollout_BR, -20.0, 20.0)), rollout_is_clip)
    )
  counted_BR = weight_BR * distill_B[:, None]
  return jnp.sum(loss_BR * counted_BR) / jnp.maximum(jnp.sum(counted_BR), 1.0)
