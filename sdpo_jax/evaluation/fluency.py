"""Notes of answers how they read as language, since rewards are also won by text that nobody reads.

Their texts are kept, or the base model reads them, or both. It is the weights that the run began
with, at temperature 1. What it says of an answer is the mean log-probability, in nats, over the
tokens that the policy sampled, the stop token included.

The base model reads each answer after its prompt, one pass over the texts; an answer whose turns
have prompts of their own has a text for each. With adapters its weights are there. Otherwise they
are loaded for the evaluation and given back after it: so long one more set of weights is in memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax import hosts, sharding
from sdpo_jax.config import model_location
from sdpo_jax.data.packing import Text, sampled_tokens, texts_read
from sdpo_jax.engine.pages import power_of_two
from sdpo_jax.kernels.token_logp import token_logp
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Rollout
from sdpo_jax.session import Session, load
from sdpo_jax.train_step import output_matrix

ROWS = 8  # texts that each shard of the mesh reads at a time
LEAST_TOKENS = 128  # that a text is padded to
LEAST_RESPONSE = 16  # likewise for the response


class BaseReader:
  """Reads responses with the weights that a run began with."""

  def __init__(self, model: ModelConfig, params: Any, mesh: jax.sharding.Mesh | None):
    self._model, self._params, self._mesh = model, params, mesh

  def mean_logp(self, rollouts: list[Rollout]) -> list[float | None]:
    """Returns each response's mean log-probability per token; None for one without tokens."""
    texts_of = [texts_read(rollout) for rollout in rollouts]
    texts = sum(texts_of, [])
    size = ROWS * sharding.row_shards(self._mesh)
    sums: list[float] = []
    for first in range(0, len(texts), size):
      sums += self._sums(texts[first : first + size], size)
    left = iter(sums)
    means: list[float | None] = []
    for rollout, own in zip(rollouts, texts_of, strict=True):
      total = sum(next(left) for _ in own)
      means.append(total / len(rollout.tokens) if rollout.tokens else None)
    return means

  def _sums(self, texts: list[Text], size: int) -> list[float]:
    """Returns the sum over what was sampled of each of at most `size` texts."""
    counts = [sampled_tokens(text.spans) for text in texts]
    T = max(LEAST_TOKENS, power_of_two(max(len(text.tokens) for text in texts)))
    R = max(LEAST_RESPONSE, power_of_two(max(counts)))
    token_BT, at_BR = np.zeros((size, T), np.int32), np.zeros((size, R), np.int32)
    for b, text in enumerate(texts):
      token_BT[b, : len(text.tokens)] = text.tokens
      # a token is predicted by the column before it
      columns = np.concatenate(
        [np.zeros(0, int)] + [np.arange(begin - 1, end - 1) for begin, end in text.spans]
      )
      at_BR[b, : len(columns)] = columns
    rows = sharding.put_rows(self._mesh, (token_BT, at_BR))
    logp_BR = hosts.to_host(_logp(self._params, *rows, config=self._model))
    return [
      float(np.sum(logp_R[:count], dtype=np.float64))
      for count, logp_R in zip(counts, logp_BR, strict=False)
    ]


@functools.partial(jax.jit, static_argnames="config")
def _logp(params, token_BT, at_BR, *, config: ModelConfig) -> jax.Array:
  """Returns the log-probabilities [B, R] of the tokens that follow the columns at_BR."""
  hidden_BTD = decoder.hidden(params, config, token_BT)
  hidden_BRD = jnp.take_along_axis(hidden_BTD, at_BR[..., None], axis=1)
  target_BR = jnp.take_along_axis(token_BT, at_BR + 1, axis=1)
  B, R, D = hidden_BRD.shape
  mesh = sharding.current_mesh()
  logp_X, _ = token_logp(
    hidden_BRD.reshape(B * R, D),
    output_matrix(params, config),
    target_BR.reshape(-1),
    mesh=mesh,
  )
  logp_BR = logp_X.reshape(B, R)
  # every process reads all of them
  return logp_BR if mesh is None else jax.lax.with_sharding_constraint(logp_BR, jax.P())


class Fluency(NamedTuple):
  """Says what an evaluation notes of its answers as language."""

  keeps_texts: bool = False
  base: BaseReader | None = None  # None: no base model reads them

  @classmethod
  def of(cls, c, session: Session, *, holds_base: bool) -> "Fluency":
    """Returns what config.eval asks for.

    holds_base: whether the session's weights are those that the run began with, and still there.
    """
    if not c.eval.base_logp:
      return cls(c.eval.keep_texts)
    if holds_base or session.adapters is not None:
      params = session.params
    else:
      params = load(c, model_location(c.model.path), session.mesh).params
    return cls(c.eval.keep_texts, BaseReader(session.model, params, session.mesh))


NOTHING = Fluency()
