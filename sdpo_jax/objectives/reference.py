"""The whole SDPO objective on plain logits: the specification that the fast path is tested against.

Source: arXiv 2601.20802, sections 2-3 and appendix; formulas in the paper's order. Everything is
dense and in the dtype of the logits (float32 or float64). Shapes: logits are [B, R, V], everything
else [B, R] or [B]. Units: nats.
"""

import jax
import jax.numpy as jnp


def divergence(logp_BRV, logq_BRV, alpha: float):
  """Computes D(pi, q) per token.

  alpha = 0: KL(q || pi); 1: KL(pi || q); between them
  (1-a) KL(pi || m) + a KL(q || m) with m = (1-a) pi + a q.
  """
  if alpha == 0.0:
    return _kl(logq_BRV, logp_BRV)
  if alpha == 1.0:
    return _kl(logp_BRV, logq_BRV)
  logm_BRV = jnp.logaddexp(logp_BRV + jnp.log1p(-alpha), logq_BRV + jnp.log(alpha))
  return (1.0 - alpha) * _kl(logp_BRV, logm_BRV) + alpha * _kl(logq_BRV, logm_BRV)


def _kl(a_BRV, b_BRV):
  """KL(a || b); an entry of probability 0 under a adds nothing."""
  return jnp.sum(jnp.where(jnp.isneginf(a_BRV), 0.0, jnp.exp(a_BRV) * (a_BRV - b_BRV)), -1)


def keep_top_k(logp_BRV, logq_BRV, k: int, add_tail: bool):
  """Keeps the policy's k likeliest entries of both distributions.

  The rest of the mass goes into one more entry with `add_tail`; else the kept ones are
  renormalised.
  """
  top_logp_BRM, top_BRM = jax.lax.top_k(logp_BRV, k)
  top_logq_BRM = jnp.take_along_axis(logq_BRV, top_BRM, -1)
  if add_tail:
    return _with_tail(top_logp_BRM), _with_tail(top_logq_BRM)
  return jax.nn.log_softmax(top_logp_BRM), jax.nn.log_softmax(top_logq_BRM)


def _with_tail(logp_BRM):
  # The bound keeps log(1 - mass) finite where all of the mass is among the kept entries.
  log_mass_BR1 = jnp.minimum(jax.nn.logsumexp(logp_BRM, -1, keepdims=True), -1e-7)
  return jnp.concatenate([logp_BRM, jnp.log(-jnp.expm1(log_mass_BR1))], -1)


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
  ratio_bounds=(),
):
  """Computes the scalar loss: the mean over tokens, weighted by weight_BR * distill_B.

  No gradient reaches the teacher, the ratios or the detached advantages.

  logp_old_BR: None means that the ratio is 1. logp_rollout_BR: None means no engine mismatch.
  granularity: "logit" | "token" | "sequence".
  is_clip, rollout_is_clip: None leaves the factor out.
  advantage_clip: takes reverse KL at logit level with each entry's advantage log q - log pi as a
    constant, held within +-advantage_clip. Its gradient is the policy gradient of Prop. 2.1 with
    these advantages.
  ratio_bounds: (least, most) of q / pi in each entry at logit level, or (). pi is a constant there,
    and q is not renormalised (RESD, arXiv 2605.12741).
  """
  sg = jax.lax.stop_gradient
  logp_BRV = jax.nn.log_softmax(student_logits_BRV)
  logq_BRV = sg(jax.nn.log_softmax(teacher_logits_BRV))
  logp_BR, logq_BR = _at(logp_BRV, response_BR), _at(logq_BRV, response_BR)
  gap_BR = sg(logq_BR - logp_BR)
  if granularity == "logit":
    kept = keep_top_k(logp_BRV, logq_BRV, top_k, add_tail) if top_k else (logp_BRV, logq_BRV)
    loss_BR = _logit_loss(*kept, alpha, advantage_clip, ratio_bounds)
  elif granularity == "token":
    assert alpha == 1.0, (
      f"token-level credit is the score-function form of reverse KL: alpha must be 1, not {alpha}"
    )
    loss_BR = -gap_BR * logp_BR
  elif granularity == "sequence":
    length_B1 = jnp.maximum(jnp.sum(weight_BR, -1, keepdims=True), 1.0)
    mean_B1 = jnp.sum(gap_BR * weight_BR, -1, keepdims=True) / length_B1
    loss_BR = -mean_B1 * logp_BR
  else:
    raise ValueError(
      f"granularity={granularity!r} is unknown; choose from ['logit', 'sequence', 'token']"
    )
  old_BR = sg(logp_BR) if logp_old_BR is None else logp_old_BR
  if is_clip is not None:
    loss_BR = loss_BR * sg(_capped_ratio(logp_BR - old_BR, is_clip))
  if rollout_is_clip is not None and logp_rollout_BR is not None:
    loss_BR = loss_BR * sg(_capped_ratio(old_BR - logp_rollout_BR, rollout_is_clip))
  weight_BR = weight_BR * distill_B[:, None]
  return jnp.sum(loss_BR * weight_BR) / jnp.maximum(jnp.sum(weight_BR), 1.0)


def _at(x_BRV, token_BR):
  return jnp.take_along_axis(x_BRV, token_BR[..., None], -1)[..., 0]


def _logit_loss(
  logp_BRV, logq_BRV, alpha: float, advantage_clip: float | None, ratio_bounds: tuple
):
  if ratio_bounds:
    least_BRV, most_BRV = (jax.lax.stop_gradient(logp_BRV) + jnp.log(x) for x in ratio_bounds)
    logq_BRV = jnp.clip(logq_BRV, least_BRV, most_BRV)
  if advantage_clip is None:
    return divergence(logp_BRV, logq_BRV, alpha)
  assert alpha == 1.0, (
    f"the advantage of an entry is that of reverse KL: alpha must be 1, not {alpha}"
  )
  advantage_BRV = jnp.clip(logq_BRV - logp_BRV, -advantage_clip, advantage_clip)
  return -jnp.sum(jnp.exp(logp_BRV) * jax.lax.stop_gradient(advantage_BRV), -1)


def _capped_ratio(log_ratio_BR, cap: float):
  return jnp.minimum(jnp.exp(jnp.clip(log_ratio_BR, -20.0, 20.0)), cap)
