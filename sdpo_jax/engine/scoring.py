"""Scores given texts: the log-probabilities of their tokens, of the likeliest ones, of named ones.

A position's log-probabilities are those of what may stand there, given all tokens before it. They
are at the temperature, over the whole vocabulary, as those of sampled tokens are, and equal the
trainer's to rounding. Units: nats.

A text is read at once, and the vocabulary goes through in blocks, so X x V logits are never held.
Text, positions and entries are padded to powers of two: a model with P positions has at most
log2(P / 128) + 1 lengths of texts, each with as many counts of positions, and few of entries.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.engine.pages import power_of_two
from sdpo_jax.kernels.distill_kl_sweeps import Inputs
from sdpo_jax.kernels.distill_topk import top_log_probs
from sdpo_jax.kernels.given_logp import given_log_probs
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.records import Array

LEAST_TOKENS = 128  # that a text is padded to


class TextScores(NamedTuple):
  """Holds log-probabilities at X positions of a text, on the host."""

  logp_X: Array  # of the text's own tokens
  logp_XM: Array  # of the named entries; those that pad a shorter list mean nothing
  top_token_XM: Array  # int32: the likeliest entries, the likeliest first
  top_logp_XM: Array


class TextScorer:
  """Scores texts with the weights that `load` gives it. Threads may share it."""

  def __init__(self, config: ModelConfig):
    self.config = config
    self._params: Any = None

  def load(self, params) -> None:
    """Takes the weights: a tree as `decoder.init` makes it."""
    self._params = params

  def score(
    self,
    tokens: list[int],
    *,
    begin: int = 1,
    temperature: float = 1.0,
    top: int = 0,
    named: list[list[int]] | None = None,
  ) -> TextScores:
    """Returns the scores of the positions from `begin` on, which is at least 1.

    Args:
      tokens: the text, at least two tokens of the vocabulary.
      temperature: above 0.
      top: how many of the likeliest entries.
      named: the entries of each position; lists may differ in length.
    """
    count = len(tokens) - begin
    assert begin >= 1 and count >= 1, f"positions {begin} to {len(tokens)} of a text"
    T = max(LEAST_TOKENS, power_of_two(len(tokens)))
    X = min(T, max(LEAST_TOKENS // 2, power_of_two(count)))
    named = [[]] * count if named is None else named
    M = power_of_two(max(map(len, named)))
    token_1T, at_X = np.zeros((1, T), np.int32), np.zeros(X, np.int32)
    target_X, index_XM = np.zeros(X, np.int32), np.zeros((X, M), np.int32)
    token_1T[0, : len(tokens)] = tokens
    at_X[:count] = np.arange(begin - 1, len(tokens) - 1)
    target_X[:count] = tokens[begin:]
    for index_M, entries in zip(index_XM, named, strict=False):
      index_M[: len(entries)] = entries
    V = self.config.vocab
    scores = _score(
      self._params,
      token_1T,
      at_X,
      target_X,
      index_XM,
      None if temperature == 1 else np.float32(temperature),
      config=self.config,
      top=min(V, power_of_two(top)),
    )
    logp_X, logp_XM, top_token_XM, top_logp_XM = (np.asarray(x)[:count] for x in scores)
    return TextScores(logp_X, logp_XM, top_token_XM[:, :top], top_logp_XM[:, :top])


@functools.partial(jax.jit, static_argnames=("config", "top"))
def _score(
  params, token_1T, at_X, target_X, index_XM, temperature, *, config: ModelConfig, top: int
) -> TextScores:
  """Scores the tokens that follow the columns at_X; temperature None is 1."""
  hidden_XD = decoder.hidden(params, config, token_1T)[0, at_X]
  if temperature is not None:
    # exact, and one program for all temperatures: that of a kernel is compiled into it
    hidden_XD = hidden_XD.astype(jnp.float32) / temperature
  head_DV = decoder.head(params, config).astype(config.dtype)
  given = given_log_probs(hidden_XD, head_DV, target_X, index_XM)
  X, V = len(at_X), head_DV.shape[1]
  if not top:
    nothing = jnp.zeros((X, 0))
    return TextScores(given.logp_X, given.logp_XM, nothing.astype(jnp.int32), nothing)
  no_teacher = jnp.zeros((X, 1), hidden_XD.dtype), jnp.zeros((1, V), head_DV.dtype)
  best = top_log_probs(Inputs(hidden_XD, head_DV, *no_teacher, target_X), top_k=top)
  return TextScores(given.logp_X, given.logp_XM, best.index_XM, best.logp_XM)
