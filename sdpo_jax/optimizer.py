"""The optimizer of a run, from its settings."""

import jax
import optax


def make_optimizer(
  *,
  name: str,
  lr: float,
  warmup_steps: int,
  decay_steps: int | None,
  weight_decay: float,
  clip_norm: float | None,
  b1: float,
  b2: float,
  state_dtype: str | None,
) -> optax.GradientTransformation:
  """AdamW with linear warm-up from 0 (in optimiser updates), then constant, or cosine to 0 at decay_steps."""
  if name != "adamw":
    raise ValueError(f"optimizer.name={name!r} is unknown; choose from ['adamw']")
  if decay_steps:
    schedule = optax.schedules.warmup_cosine_decay_schedule(
      0.0 if warmup_steps else lr, lr, warmup_steps, decay_steps
    )
  else:
    schedule = optax.schedules.warmup_constant_schedule(
      0.0 if warmup_steps else lr, lr, warmup_steps
    )
  adamw = in_dtype(optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay), state_dtype)
  return adamw if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def in_dtype(tx: optax.GradientTransformation, dtype: str | None) -> optax.GradientTransformation:
  """The same transformation on gradients and weights of this type, so that all of its state has it (optax's mu_dtype leaves the second moment out).

  With None the state has the weights' type: bfloat16 cannot hold a second moment, whose changes of 1 - b2 are below its resolution.
  """
  if dtype is None:
    return tx
  cast = lambda tree: None if tree is None else jax.tree.map(lambda x: x.astype(dtype), tree)
  return optax.GradientTransformation(
    lambda params: tx.init(cast(params)),
    lambda grads, state, params=None: tx.update(cast(grads), state, cast(params)),
  )
