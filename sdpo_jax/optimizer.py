"""Makes the optimizer of a run from its settings."""

import jax
import optax

from sdpo_jax.errors import unknown


def make_optimizer(
  *, name: str, clip_norm: float | None, state_dtype: str | None, **settings
) -> optax.GradientTransformation:
  """Returns the optimizer of this name, with clipping of the gradient's global norm.

  The arguments are those of `config.optimizer`; `settings` go to the function of OPTIMIZERS.
  `state_dtype`: see `in_dtype`. A `clip_norm` of None means no clipping.
  """
  if name not in OPTIMIZERS:
    raise ValueError(unknown("optimizer.name", name, OPTIMIZERS))
  tx = in_dtype(OPTIMIZERS[name](**settings), state_dtype)
  return tx if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), tx)


def adamw(
  *,
  lr: float,
  warmup_steps: int,
  decay_steps: int | None,
  weight_decay: float,
  b1: float,
  b2: float,
) -> optax.GradientTransformation:
  """Returns AdamW, its learning rate warmed up linearly from 0.

  Afterwards the rate is constant, or falls as a cosine to 0 at `decay_steps`. Steps are optimizer
  updates.
  """
  first_lr = 0.0 if warmup_steps else lr
  if decay_steps:
    schedule = optax.schedules.warmup_cosine_decay_schedule(first_lr, lr, warmup_steps, decay_steps)
  else:
    schedule = optax.schedules.warmup_constant_schedule(first_lr, lr, warmup_steps)
  return optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay)


OPTIMIZERS = {"adamw": adamw}


def in_dtype(tx: optax.GradientTransformation, dtype: str | None) -> optax.GradientTransformation:
  """Runs tx in `dtype`, so both Adam moments have it (optax's `mu_dtype` casts only the first).

  With None the state has the weights' type. bfloat16 cannot hold a second moment, whose changes
  of 1 - b2 are below its resolution.
  """
  if dtype is None:
    return tx

  def cast(tree):
    return None if tree is None else jax.tree.map(lambda x: x.astype(dtype), tree)

  def init(params):
    return tx.init(cast(params))

  def update(grads, state, params=None):
    return tx.update(cast(grads), state, cast(params))

  return optax.GradientTransformation(init, update)
