"""Log-probability of each target token and the policy's entropy, from hidden states and an output matrix: no teacher.

For methods and losses that need no divergence (GRPO, supervised training). Tokens go through in blocks, each recomputed in the
backward pass, so that X x V logits are never held for a large vocabulary. Units: nats. Numerics: float32 logits whatever the
dtype of the inputs. Both outputs are differentiable with respect to hidden states and output matrix.
"""

import jax
import jax.numpy as jnp

BLOCK_BYTES = 64 * 2**20   # float32 logits held at a time


def _block(hidden_XD, head_DV, target_X, temperature):
  logits_XV = jnp.matmul(hidden_XD, head_DV, preferred_element_type=jnp.float32) / temperature
  logp_XV = jax.nn.log_softmax(logits_XV)
  logp_X = jnp.take_along_axis(logp_XV, target_X[:, None], -1)[:, 0]
  return logp_X, -jnp.sum(jnp.exp(logp_XV) * logp_XV, -1)


def token_logp(hidden_XD: jax.Array, head_DV: jax.Array, target_X: jax.Array, *, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
  """-> (logp_X, entropy_X), both float32."""
  X, D = hidden_XD.shape
  V = head_DV.shape[1]
  assert head_DV.shape[0] == D and target_X.shape == (X,), (hidden_XD.shape, head_DV.shape, target_X.shape)
  block = max(1, BLOCK_BYTES // (4 * V))
  if X <= block:
    return _block(hidden_XD, head_DV, target_X, temperature)
  blocks = -(-X // block)
  pad = lambda x: jnp.pad(x, [(0, blocks * block - X)] + [(0, 0)] * (x.ndim - 1)).reshape(blocks, block, *x.shape[1:])
  one = jax.checkpoint(lambda piece: _block(piece[0], head_DV, piece[1], temperature))
  logp, entropy = jax.lax.map(one, (pad(hidden_XD), pad(target_X)))
  return logp.reshape(-1)[:X], entropy.reshape(-1)[:X]
