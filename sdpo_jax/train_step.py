"""The train step: one jitted program from a TrainBatch to new weights. Pure; reads no config, clock, file or global.

Per generation batch: cut into `updates` mini-batches, each into micro-batches whose gradients add up in a scan; one optimiser
update per mini-batch; then one move of the teacher (arXiv 2601.20802: once per generation batch, only on a finite gradient).
Policy and teacher logits come from one program, `forward_pair`; the logits themselves are never stored, the kernel takes hidden
states and output matrices.

A gradient that is not finite leaves parameters, optimiser and teacher as they were, and is counted in the state.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdpo_jax import sharding
from sdpo_jax.kernels.distill_kl import distill_kl, distill_kl_sharded
from sdpo_jax.kernels.distill_topk import distill_mixture, distill_topk
from sdpo_jax.kernels.token_logp import token_logp
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.objectives.loss import Objective
from sdpo_jax.objectives.signals import Signals
from sdpo_jax.records import Ratio, Rows, TrainBatch


class TrainState(NamedTuple):
  step: jax.Array  # generation batches done
  params: Any  # what is trained: the policy's weights, or its adapters
  opt_state: Any
  # None: the live policy teaches itself (or there is no teacher); else a second tree like params
  teacher: Any
  skipped: jax.Array  # updates skipped so far because the gradient was not finite
  skipped_in_a_row: jax.Array


def init_state(
  params, tx: optax.GradientTransformation, *, keep_teacher: bool = False, teacher_move: float = 0.0
) -> TrainState:
  """keep_teacher: a copy of `params` travels along as the teacher's (moving, frozen or the anchor of a trust region). One that moves is kept in
  float32: a step of 1 % of a small difference vanishes in bfloat16, and the average would stand still."""
  # jnp.array copies
  kept = lambda p: jnp.array(
    p, dtype=jnp.promote_types(p.dtype, jnp.float32) if teacher_move else p.dtype
  )
  teacher = jax.tree.map(kept, params) if keep_teacher else None
  return TrainState(jnp.int32(0), params, tx.init(params), teacher, jnp.int32(0), jnp.int32(0))


def run_rows(hidden: Callable, *halves: Rows) -> list[jax.Array]:
  """hidden((tokens_BT, positions_BT, segments_BT, prefixes_BT or None), ...) -> hidden_BTD of each half, and of those the columns that predict the response: [C * X, D] each."""
  flat = lambda x_CPT: (
    None if x_CPT is None else sharding.constrain(jnp.reshape(x_CPT, (-1, x_CPT.shape[-1])), "BT")
  )
  outs = hidden(
    *(tuple(map(flat, (h.token_CPT, h.position_CPT, h.segment_CPT, h.prefix_CPT))) for h in halves)
  )
  found = []
  for h, out_BTD in zip(halves, outs):
    (C, P, T), D = h.token_CPT.shape, out_BTD.shape[-1]
    # a pack lies on one device, and so does what is taken from it
    out_CYD = sharding.constrain(out_BTD.reshape(C, P * T, D), "BTD")
    out_CXD = jnp.take_along_axis(
      out_CYD, jnp.asarray(h.at_CX)[..., None], axis=1, mode="promise_in_bounds"
    )
    found.append(sharding.constrain(out_CXD, "BTD").reshape(-1, D))
  return found


def targets(rows: Rows) -> jax.Array:
  """The response tokens [C * X]: each stands in the column after the one that predicts it."""
  C, P, T = rows.token_CPT.shape
  return jnp.take_along_axis(
    jnp.reshape(rows.token_CPT, (C, P * T)), rows.at_CX + 1, axis=1, mode="clip"
  ).reshape(-1)


def by_response(x_X: jax.Array, batch: TrainBatch) -> jax.Array:
  """Per token of the packs -> per response and position; what stands where the weight is 0 means nothing."""
  C, X = batch.student.at_CX.shape
  B, R = batch.response_BR.shape
  x_CX = jnp.pad(x_X.reshape(C, X), ((0, 0), (0, R)))
  take = jax.vmap(
    jax.vmap(lambda x_X, start: jax.lax.dynamic_slice_in_dim(x_X, start, R), (None, 0))
  )
  return sharding.constrain(take(x_CX, jnp.reshape(batch.start_B, (C, B // C))).reshape(B, R), "BR")


def mixture_weights(batch: TrainBatch) -> jax.Array:
  """[M, C * X]: the share of the plain reading (weight 1) and of each further one in the teacher of each response token."""
  C, X = batch.student.at_CX.shape
  weight_MB = jnp.stack(
    [jnp.ones_like(batch.distill_B), *(c.weight_B for c in batch.counterfactuals)]
  )
  share_MCB = (weight_MB / jnp.sum(weight_MB, 0)).reshape(len(weight_MB), C, -1)
  row_CX = jax.vmap(lambda start_B: jnp.searchsorted(start_B, jnp.arange(X), side="right") - 1)(
    jnp.reshape(batch.start_B, (C, -1))
  )
  return jax.vmap(lambda share_CB: jnp.take_along_axis(share_CB, row_CX, axis=1))(
    share_MCB
  ).reshape(len(weight_MB), C * X)


def forward_pair(
  params,
  teacher,
  config: ModelConfig,
  batch: TrainBatch,
  *,
  mix: float | None = None,
  remat: str = "none",
):
  """Hidden states and output matrices of the same response tokens under the two prompts: (policy_XD, head_DV, teacher_XE, teacher_head_EV).

  Both halves go through each layer inside one scan, so each layer's weights are read once; the teacher's half is under
  stop_gradient from its input on, so no backward work is spent on it.
  mix: a trust region (arXiv 2601.20802), logits (1 - mix) of `teacher` + mix of the live policy, both on the teacher's prompt. A sum
  of two products is the product of two hidden states side by side with two matrices one above the other, so E = 2 D.
  """
  pair = lambda student, teaching: decoder.hidden_pair(
    params, teacher, config, student, teaching, remat=remat
  )
  policy_XD, teacher_XD = run_rows(pair, batch.student, batch.teacher)
  head = lambda weights: decoder.head(weights, config).astype(config.dtype)
  head_DV, teacher_head_DV = (
    head(params),
    jax.lax.stop_gradient(head(params if teacher is None else teacher)),
  )
  if mix is None:
    return policy_XD, head_DV, teacher_XD, teacher_head_DV
  live = jax.lax.stop_gradient(params)
  return (
    policy_XD,
    head_DV,
    _with_live(teacher_XD, live, config, batch.teacher, mix),
    jnp.concatenate([teacher_head_DV, head(live)], axis=0),
  )


def _with_live(teacher_XD, live, config: ModelConfig, rows: Rows, mix: float) -> jax.Array:
  (live_XD,) = run_rows(_one_half(live, config, "none"), rows)
  return jnp.concatenate([(1.0 - mix) * teacher_XD, mix * live_XD], axis=1)


def read_again(
  params, teacher, config: ModelConfig, rows: Rows, *, mix: float | None = None
) -> jax.Array:
  """The teacher's hidden states [X, E] of the same response tokens under one more prompt; its output matrix is that of forward_pair."""
  weights = jax.lax.stop_gradient(params if teacher is None else teacher)
  (teacher_XD,) = run_rows(_one_half(weights, config, "none"), rows)
  return (
    teacher_XD
    if mix is None
    else _with_live(teacher_XD, jax.lax.stop_gradient(params), config, rows, mix)
  )


def _one_half(params, config: ModelConfig, remat: str) -> Callable:
  return lambda half: [
    decoder.hidden(
      params,
      config,
      half[0],
      positions_BT=half[1],
      segment_ids_BT=half[2],
      prefix_ids_BT=half[3],
      remat=remat,
    )
  ]


def make_signals(
  config: ModelConfig,
  objective: Objective,
  *,
  mix: float | None = None,
  temperature: float = 1.0,
  remat: str = "none",
  implementation: str | None = None,
  join: Callable | None = None,
) -> Callable:
  """-> signals(params, teacher, batch, frozen=None) -> Signals. mix: see forward_pair. temperature: the rollout's; it applies to every quantity.

  join(frozen, params): the decoder's weights from what is trained and the weights it stands on (lora.attach); None: what is trained is all.
  """

  def signals(params, teacher, batch: TrainBatch, frozen=None) -> Signals:
    if join is not None:
      params, teacher = join(frozen, params), None if teacher is None else join(frozen, teacher)
    target_X = targets(batch.student)
    mesh = sharding.current_mesh()
    if not objective.needs_teacher:
      (policy_XD,) = run_rows(_one_half(params, config, remat), batch.student)
      logp_X, entropy_X = token_logp(
        policy_XD,
        decoder.head(params, config).astype(config.dtype),
        target_X,
        temperature=temperature,
        mesh=mesh,
      )
      return Signals(by_response(logp_X, batch), by_response(entropy_X, batch), None, None)
    halves = forward_pair(params, teacher, config, batch, mix=mix, remat=remat)
    # sampled-token signals read the rest of the result
    wanted = objective.divergence or {"alpha": 0.5, "top_k": None}

    policy_XD, head_DV, teacher_XE, teacher_head_EV = halves
    again = [read_again(params, teacher, config, c.teacher, mix=mix) for c in batch.counterfactuals]

    def compare(*halves) -> Signals:
      if objective.mixture and again:
        out = distill_mixture(
          policy_XD,
          head_DV,
          [teacher_XE, *again],
          teacher_head_EV,
          target_X,
          mixture_weights(batch),
          temperature=temperature,
          mesh=mesh,
          **wanted,
        )
      elif wanted["top_k"] is None:
        kernel = distill_kl if mesh is None else functools.partial(distill_kl_sharded, mesh=mesh)
        out = kernel(
          *halves,
          target_X,
          alpha=wanted["alpha"],
          temperature=temperature,
          implementation=implementation,
        )
      else:
        out = distill_topk(*halves, target_X, temperature=temperature, mesh=mesh, **wanted)
      found = [out.logp_X, out.entropy_X, out.divergence_X, out.logp_teacher_X]
      if objective.needs_teacher_entropy:
        found.append(
          token_logp(
            *map(jax.lax.stop_gradient, halves[2:]), target_X, temperature=temperature, mesh=mesh
          )[1]
        )
      return Signals(*(by_response(x, batch) for x in found))

    more = [
      compare(policy_XD, head_DV, again_XE, teacher_head_EV)
      for again_XE in again
      if not objective.mixture
    ]
    return compare(*halves)._replace(counterfactuals=tuple(more))

  return signals


def cut(batch: TrainBatch, pieces: int) -> TrainBatch:
  """A leading axis of `pieces`, each a batch of whole packs."""
  packs = batch.student.at_CX.shape[0]
  assert packs % pieces == 0, f"{packs} packs do not divide into {pieces} pieces"
  split = lambda x: sharding.constrain_rows(
    jnp.reshape(x, (pieces, x.shape[0] // pieces, *x.shape[1:])), 1
  )
  return jax.tree.map(split, batch)


def micro_batches(batch: TrainBatch) -> int:
  """How many there are, of one pack on each of the mesh's row shards."""
  packs, shards = batch.student.at_CX.shape[0], sharding.row_shards(sharding.current_mesh())
  assert packs % shards == 0, f"{packs} packs do not divide among {shards} row shards"
  return packs // shards


def make_score(signals: Callable) -> Callable:
  """-> score(state, batch, frozen=None) -> Signals of the whole batch, one micro-batch after another."""

  def score(state: TrainState, batch: TrainBatch, frozen=None) -> Signals:
    said = jax.lax.map(
      lambda piece: signals(state.params, state.teacher, piece, frozen),
      cut(batch, micro_batches(batch)),
    )
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), said)

  return score


def make_train_step(
  signals: Callable,
  objective: Objective,
  tx: optax.GradientTransformation,
  *,
  teacher_move: float = 0.0,
  updates: int = 1,
  recompute_old: bool = False,
) -> Callable:
  """-> step(state, batch, frozen=None) -> (state, {metric: Ratio}). frozen: what adapters stand on; shared by policy and teacher, never moved.

  teacher_move: the teacher's rate towards the policy, 0 to leave it alone. updates: optimiser updates per generation batch, among which its packs
  divide; within each the gradients of its `micro_batches` add up. recompute_old: take logp_old from the batch (several updates) instead of the present policy's (one update: ratio 1).
  """

  def loss_fn(params, teacher, batch: TrainBatch, norm, frozen):
    said = signals(params, teacher, batch, frozen)
    if not recompute_old:  # on-policy: the policy before this update is the policy now
      batch = batch._replace(logp_old_BR=jax.lax.stop_gradient(said.logp_BR))
    loss, metrics = objective.token_loss(said, batch, norm)
    return loss, {"train/loss": Ratio(loss, 1.0), **metrics}

  def mini_batch(state: TrainState, batch: TrainBatch, frozen):
    norm = objective.normalisers(batch)
    pieces = micro_batches(batch)

    def accumulate(grads, piece):
      (_, metrics), new = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state.teacher, piece, norm, frozen
      )
      # else the TPU compiler tries to move the sums over devices out of the loop, and fails
      new = jax.lax.optimization_barrier(new)
      return jax.tree.map(lambda a, g: a + g.astype(a.dtype), grads, new), metrics

    if pieces == 1:
      (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state.teacher, batch, norm, frozen
      )
    else:
      zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
      grads, metrics = jax.lax.scan(accumulate, zeros, cut(batch, pieces))
      metrics = jax.tree.map(lambda x: jnp.sum(x, 0), metrics)
      # shares of one loss, not a mean of losses
      metrics["train/loss"] = Ratio(metrics["train/loss"].total, 1.0)
    norm_of_grads = optax.tree.norm(grads)
    finite = jnp.isfinite(norm_of_grads)
    delta, opt_state = tx.update(grads, state.opt_state, state.params)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    state = state._replace(
      params=keep(optax.apply_updates(state.params, delta), state.params),
      opt_state=keep(opt_state, state.opt_state),
      skipped=state.skipped + ~finite,
      skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    metrics["train/grad_norm"] = Ratio(
      jnp.where(finite, norm_of_grads, 0.0), finite.astype(jnp.float32)
    )
    metrics["train/update_skipped"] = Ratio((~finite).astype(jnp.float32), 1.0)
    return state, metrics

  def step(state: TrainState, batch: TrainBatch, frozen=None):
    if updates == 1:
      state, metrics = mini_batch(state, batch, frozen)
    else:
      state, metrics = jax.lax.scan(
        functools.partial(mini_batch, frozen=frozen), state, cut(batch, updates)
      )
      metrics = jax.tree.map(lambda x: jnp.sum(x, 0), metrics)
    if teacher_move:
      moved = jax.tree.map(
        lambda t, p: t + teacher_move * (p.astype(t.dtype) - t), state.teacher, state.params
      )
      finite = state.skipped_in_a_row == 0
      state = state._replace(
        teacher=jax.tree.map(lambda n, o: jnp.where(finite, n, o), moved, state.teacher)
      )
    return state._replace(step=state.step + 1), metrics

  return step
