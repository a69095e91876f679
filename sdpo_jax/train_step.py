"""The train step: one jitted program from a TrainBatch to new weights.

It is pure: it reads no config, clock, file or global. It cuts a generation batch into `updates`
mini-batches. Each of these is cut into micro-batches, whose gradients a scan adds up. There is one
optimizer update per mini-batch; then the teacher moves once (arXiv 2601.20802: once per generation
batch, and only on a finite gradient).

Policy and teacher logits come from one program, `forward_pair`. The logits themselves are never
stored: the kernels take hidden states and output matrices.

A gradient that is not finite leaves parameters, optimizer and teacher as they were, and is counted
in the state.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdpo_jax import sharding
from sdpo_jax.kernels.distill_kl import distill_kl, distill_kl_sharded
from sdpo_jax.kernels.distill_kl_sweeps import Inputs
from sdpo_jax.kernels.distill_topk import distill_mixture, distill_topk, top_log_probs
from sdpo_jax.kernels.token_logp import token_logp
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig
from sdpo_jax.objectives import loss
from sdpo_jax.objectives.build import Method
from sdpo_jax.objectives.control import LEARN
from sdpo_jax.objectives.signals import NO_RIVAL, RIVALS, TEACHER_ENTROPY, Signals
from sdpo_jax.records import Ratio, Rows, TrainBatch


class TrainState(NamedTuple):
  """Everything that a step changes."""

  step: jax.Array  # generation batches done
  params: Any  # what is trained: the policy's weights, or its adapters
  opt_state: Any
  teacher: Any  # a second tree like params; None: the live policy teaches itself, or nobody does
  skipped: jax.Array  # updates skipped so far because the gradient was not finite
  skipped_in_a_row: jax.Array


def init_state(
  params,
  tx: optax.GradientTransformation,
  *,
  keep_teacher: bool = False,
  teacher_in_float32: bool = False,
) -> TrainState:
  """Returns the state before the first step.

  keep_teacher: a copy of `params` travels along as the teacher's weights (moving, frozen, or the
    anchor of a trust region).
  teacher_in_float32: for a teacher that moves in small steps. One of 1 % of a small difference
    vanishes in bfloat16, and the average would stand still.
  """

  def copied(p):
    dtype = jnp.promote_types(p.dtype, jnp.float32) if teacher_in_float32 else p.dtype
    return jnp.array(p, dtype=dtype)  # jnp.array copies, jnp.asarray would share

  teacher = jax.tree.map(copied, params) if keep_teacher else None
  return TrainState(jnp.int32(0), params, tx.init(params), teacher, jnp.int32(0), jnp.int32(0))


# ---- packed rows --------------------------------------------------------------------------------


def run_rows(hidden: Callable, *halves: Rows) -> list[jax.Array]:
  """Runs packed rows through the decoder and keeps the columns that predict the response.

  hidden((tokens_BT, positions_BT, segments_BT, prefixes_BT or None), ...) returns hidden_BTD of
  each half. Returns [C * X, D] of each half.
  """
  outs = hidden(*(_decoder_inputs(half) for half in halves))
  kept = []
  for half, out_BTD in zip(halves, outs):
    (C, P, T), D = half.token_CPT.shape, out_BTD.shape[-1]
    # A pack lies on one device, and so does what is taken from it.
    out_CXD = sharding.constrain(out_BTD.reshape(C, P * T, D), "BTD")
    at_CX1 = jnp.asarray(half.at_CX)[..., None]
    out_CXD = jnp.take_along_axis(out_CXD, at_CX1, axis=1, mode="promise_in_bounds")
    kept.append(sharding.constrain(out_CXD, "BTD").reshape(-1, D))
  return kept


def _decoder_inputs(rows: Rows) -> tuple:
  """Tokens, positions, segments and prefixes (or None) as [B, T], the packs one after another."""

  def flat(x_CPT):
    if x_CPT is None:
      return None
    return sharding.constrain(jnp.reshape(x_CPT, (-1, x_CPT.shape[-1])), "BT")

  arrays = (rows.token_CPT, rows.position_CPT, rows.segment_CPT, rows.prefix_CPT)
  return tuple(flat(x_CPT) for x_CPT in arrays)


def targets(rows: Rows) -> jax.Array:
  """Returns the response tokens [C * X]; each stands a column after the one that predicts it."""
  C, P, T = rows.token_CPT.shape
  token_CX = jnp.reshape(rows.token_CPT, (C, P * T))
  return jnp.take_along_axis(token_CX, rows.at_CX + 1, axis=1, mode="clip").reshape(-1)


def by_response(x_X: jax.Array, batch: TrainBatch) -> jax.Array:
  """Rearranges values per token of the packs [C * X] to [B, R], response and position.

  What stands where the weight is 0 means nothing.
  """
  C, X = batch.policy.at_CX.shape
  B, R = batch.response_BR.shape
  x_CX = jnp.pad(x_X.reshape(C, X), ((0, 0), (0, R)))

  def response(x_X, start):
    return jax.lax.dynamic_slice_in_dim(x_X, start, R)

  responses_of_packs = jax.vmap(jax.vmap(response, (None, 0)))
  x_CBR = responses_of_packs(x_CX, jnp.reshape(batch.start_B, (C, B // C)))
  return sharding.constrain(x_CBR.reshape(B, R), "BR")


def mixture_weights(batch: TrainBatch) -> jax.Array:
  """Returns [G, C * X]: the share of each of G readings in the teacher of each response token.

  The plain reading comes first, with weight 1 before the shares are normalised.
  """
  C, X = batch.policy.at_CX.shape
  plain, *further = batch.readings
  plain_BR = jnp.ones_like(plain.weight_BR)
  weight_GBR = jnp.stack([plain_BR, *(reading.weight_BR for reading in further)])
  G, _, R = weight_GBR.shape
  share_GCBR = (weight_GBR / jnp.sum(weight_GBR, 0)).reshape(G, C, -1, R)

  def of_tokens(start_B, share_GBR):
    x = jnp.arange(X)
    row_X = jnp.searchsorted(start_B, x, side="right") - 1
    return share_GBR[:, row_X, jnp.minimum(x - start_B[row_X], R - 1)]

  share_GCX = jax.vmap(of_tokens, (0, 1), 1)(jnp.reshape(batch.start_B, (C, -1)), share_GCBR)
  return share_GCX.reshape(G, C * X)


# ---- policy and teacher on the same tokens ------------------------------------------------------


def forward_pair(
  params,
  teacher,
  config: ModelConfig,
  batch: TrainBatch,
  *,
  mix: float | None = None,
  remat: str = "none",
):
  """Returns hidden states and output matrices of the same response tokens under the two prompts.

  These are (policy_XD, head_DV, teacher_XE, teacher_head_EV). Both halves go through each layer
  inside one scan, so that each layer's weights are read once. The teacher's half is under
  stop_gradient from its input on, so that no backward work is spent on it.

  mix: a trust region (arXiv 2601.20802) has the logits (1 - mix) of `teacher` + mix of the live
    policy, both on the teacher's prompt. Since [a, b] @ [[A], [B]] = a A + b B, two hidden states
    side by side and two output matrices one above the other give this sum; so E = 2 D.
  """

  def hidden_pair(policy_inputs, teacher_inputs):
    return decoder.hidden_pair(params, teacher, config, policy_inputs, teacher_inputs, remat=remat)

  policy_XD, teacher_XD = run_rows(hidden_pair, batch.policy, batch.readings[0].rows)
  head_DV = output_matrix(params, config)
  teacher_head_EV = teacher_head(params, teacher, config, mix=mix)
  if mix is None:
    return policy_XD, head_DV, teacher_XD, teacher_head_EV
  live = jax.lax.stop_gradient(params)
  teacher_XE = _beside_live(teacher_XD, live, config, batch.readings[0].rows, mix)
  return policy_XD, head_DV, teacher_XE, teacher_head_EV


def teacher_head(params, teacher, config: ModelConfig, *, mix: float | None = None) -> jax.Array:
  """Returns the teacher's output matrix [E, V], detached; see `forward_pair` for `mix` and E."""
  weights = params if teacher is None else teacher
  head_DV = jax.lax.stop_gradient(output_matrix(weights, config))
  if mix is None:
    return head_DV
  live_DV = output_matrix(jax.lax.stop_gradient(params), config)
  return jnp.concatenate([head_DV, live_DV], axis=0)


def read_again(
  params, teacher, config: ModelConfig, rows: Rows, *, mix: float | None = None
) -> jax.Array:
  """Returns the teacher's hidden states [X, E] of the same response tokens under one more prompt.

  Its output matrix is that of `forward_pair`.
  """
  weights = jax.lax.stop_gradient(params if teacher is None else teacher)
  teacher_XD = run_half(weights, config, rows)
  if mix is None:
    return teacher_XD
  return _beside_live(teacher_XD, jax.lax.stop_gradient(params), config, rows, mix)


def _beside_live(teacher_XD, live, config: ModelConfig, rows: Rows, mix: float) -> jax.Array:
  """The two hidden states of a trust region side by side: [X, 2 D]."""
  live_XD = run_half(live, config, rows)
  return jnp.concatenate([(1.0 - mix) * teacher_XD, mix * live_XD], axis=1)


def run_half(params, config: ModelConfig, rows: Rows, remat: str = "none") -> jax.Array:
  """Returns the hidden states [C * X, D] of the response tokens of packed rows."""

  def hidden(inputs):
    tokens_BT, positions_BT, segments_BT, prefixes_BT = inputs
    hidden_BTD = decoder.hidden(
      params,
      config,
      tokens_BT,
      positions_BT=positions_BT,
      segment_ids_BT=segments_BT,
      prefix_ids_BT=prefixes_BT,
      remat=remat,
    )
    return [hidden_BTD]

  (half_XD,) = run_rows(hidden, rows)
  return half_XD


def output_matrix(params, config: ModelConfig) -> jax.Array:
  """Returns the output matrix [D, V] in the type of the products."""
  return decoder.head(params, config).astype(config.dtype)


# ---- signals ------------------------------------------------------------------------------------


def make_signals(
  config: ModelConfig,
  method: Method,
  *,
  temperature: float = 1.0,
  remat: str = "none",
  implementation: str | None = None,
  join: Callable | None = None,
) -> Callable:
  """Returns signals(params, teacher, batch, frozen=None) -> (Signals of each reading, ...).

  The plain reading comes first. A mixture has one teacher and so one entry.

  temperature: the rollout's; it applies to every quantity.
  implementation: of the divergence kernel; None chooses.
  join(frozen, params): makes the decoder's weights from what is trained and the weights that it
    stands on (lora.attach); None: what is trained is all.
  """
  mix = method.teacher_weights.mix
  compare = functools.partial(
    compare_heads, method, temperature=temperature, implementation=implementation
  )

  def signals(params, teacher, batch: TrainBatch, frozen=None) -> tuple[Signals, ...]:
    if join is not None:
      params = join(frozen, params)
      teacher = None if teacher is None else join(frozen, teacher)
    if not method.reads:
      return (_policy_signals(params, config, batch, temperature=temperature, remat=remat),)
    policy_XD, head_DV, teacher_XE, teacher_head_EV = forward_pair(
      params, teacher, config, batch, mix=mix, remat=remat
    )
    inputs = Inputs(policy_XD, head_DV, teacher_XE, teacher_head_EV, targets(batch.policy))
    readings = [inputs]
    for reading in batch.readings[1:]:
      again_XE = read_again(params, teacher, config, reading.rows, mix=mix)
      readings.append(inputs._replace(teacher_hidden_XE=again_XE))
    if method.teacher_logits is not None:
      coefficients = method.teacher_logits.coefficients(batch.control)
      return (compare([virtual_teacher(readings, *coefficients, alone=teacher is None)], batch),)
    if method.mixes_readings:
      return (compare(readings, batch),)
    plain = compare([inputs], batch)
    if method.compares_further:
      return plain, *(compare([reading], batch) for reading in readings[1:])
    return plain, *(heard(plain, reading, batch, temperature) for reading in readings[1:])

  return signals


def virtual_teacher(
  readings: list[Inputs], of_policy, of_readings: tuple, *, alone: bool
) -> Inputs:
  """Returns one reading whose teacher has a sum of logits, times coefficients that may move.

  of_policy: the factor on the policy's logits under its own prompt, detached; None: it has none.
  alone: policy and teacher have one set of weights.
  """
  plain = readings[0]
  hidden_XD, head_DV = jax.lax.stop_gradient((plain.policy_hidden_XD, plain.policy_head_DV))
  # Rounded once, after the sum: where the readings agree, most of it cancels.
  wide = jnp.promote_types(hidden_XD.dtype, jnp.float32)
  teacher_XD = sum(
    c * x.teacher_hidden_XE.astype(wide) for c, x in zip(of_readings, readings, strict=True)
  )
  head_EV = plain.teacher_head_EV
  if of_policy is not None and alone:
    teacher_XD = teacher_XD + of_policy * hidden_XD
  elif of_policy is not None:
    teacher_XD = jnp.concatenate([teacher_XD, of_policy * hidden_XD], axis=1)
    head_EV = jnp.concatenate([head_EV, head_DV], axis=0)
  teacher_XD = teacher_XD.astype(hidden_XD.dtype)
  return plain._replace(teacher_hidden_XE=teacher_XD, teacher_head_EV=head_EV)


def heard(plain: Signals, reading: Inputs, batch: TrainBatch, temperature: float) -> Signals:
  """Returns the signals of a further reading of which only log-probabilities are wanted."""
  logp_X, entropy_X = _teacher_logp(reading, temperature)
  return plain._replace(
    divergence_BR=None,
    logp_teacher_BR=by_response(logp_X, batch),
    entropy_teacher_BR=by_response(entropy_X, batch),
  )


def _teacher_logp(reading: Inputs, temperature: float) -> tuple[jax.Array, jax.Array]:
  """Returns (log q, H(q)) of the teacher at every response token."""
  teacher_XE, head_EV = jax.lax.stop_gradient((reading.teacher_hidden_XE, reading.teacher_head_EV))
  return token_logp(
    teacher_XE, head_EV, reading.target_X, temperature=temperature, mesh=sharding.current_mesh()
  )


def _policy_signals(
  params, config: ModelConfig, batch: TrainBatch, *, temperature: float, remat: str
) -> Signals:
  """The signals of a method without a teacher: only the policy's half is run."""
  policy_XD = run_half(params, config, batch.policy, remat)
  logp_X, entropy_X = token_logp(
    policy_XD,
    output_matrix(params, config),
    targets(batch.policy),
    temperature=temperature,
    mesh=sharding.current_mesh(),
  )
  return Signals(by_response(logp_X, batch), by_response(entropy_X, batch), None, None)


def compare_heads(
  method: Method,
  readings: list[Inputs],
  batch: TrainBatch,
  *,
  temperature: float,
  implementation: str | None,
) -> Signals:
  """Compares policy and teacher on every response token, through the kernel that the method needs.

  readings: one reading by the teacher, or those that are mixed into one teacher.
  """
  mesh = sharding.current_mesh()
  plain = readings[0]
  settings = method.divergence
  shared = dict(temperature=temperature, mesh=mesh)
  if RIVALS in method.reads:
    return _with_rivals(plain, batch, method.rivals, temperature)
  if settings is None:
    return _heard_both(plain, batch, temperature)
  if len(readings) > 1:
    out = distill_mixture(readings, mixture_weights(batch), **shared, **settings)
  elif settings["top_k"] is not None:
    out = distill_topk(plain, **shared, **settings)
  elif mesh is not None:
    out = distill_kl_sharded(
      plain, alpha=settings["alpha"], implementation=implementation, **shared
    )
  else:
    out = distill_kl(
      *plain, alpha=settings["alpha"], temperature=temperature, implementation=implementation
    )
  per_token = [out.logp_X, out.entropy_X, out.divergence_X, out.logp_teacher_X]
  if TEACHER_ENTROPY in method.reads:
    # The plain reading's, also in a mixture.
    per_token.append(_teacher_logp(plain, temperature)[1])
  return Signals(*(by_response(x_X, batch) for x_X in per_token))


def _heard_both(plain: Inputs, batch: TrainBatch, temperature: float) -> Signals:
  """Compares log-probabilities alone, for methods that read no divergence."""
  logp_X, entropy_X = token_logp(
    plain.policy_hidden_XD,
    plain.policy_head_DV,
    plain.target_X,
    temperature=temperature,
    mesh=sharding.current_mesh(),
  )
  policy = Signals(by_response(logp_X, batch), by_response(entropy_X, batch), None, None)
  return heard(policy, plain, batch, temperature)


def _with_rivals(plain: Inputs, batch: TrainBatch, count: int, temperature: float) -> Signals:
  """Compares log-probabilities, and adds those of the policy's likeliest tokens."""
  mesh = sharding.current_mesh()
  top = top_log_probs(plain, top_k=count, temperature=temperature, mesh=mesh)
  logp_XM = jnp.where(top.index_XM == plain.target_X[:, None], NO_RIVAL, top.logp_XM)
  per_token = (top.logp_X, top.entropy_X, top.logp_teacher_X)
  logp_BR, entropy_BR, logp_teacher_BR = (by_response(x_X, batch) for x_X in per_token)
  rivals = tuple(by_response(logp_X, batch) for logp_X in logp_XM.T)
  return Signals(logp_BR, entropy_BR, None, logp_teacher_BR, logp_rivals=rivals)


# ---- the step -----------------------------------------------------------------------------------


def cut(batch: TrainBatch, pieces: int) -> TrainBatch:
  """Gives every array a leading axis of `pieces`, each a batch of whole packs."""
  packs = batch.policy.at_CX.shape[0]
  assert packs % pieces == 0, f"{packs} packs do not divide into {pieces} pieces"

  def split(x):
    if not jnp.ndim(x):
      return jnp.broadcast_to(x, (pieces,))
    return sharding.constrain_rows(jnp.reshape(x, (pieces, x.shape[0] // pieces, *x.shape[1:])), 1)

  return jax.tree.map(split, batch)


def learns(batch: TrainBatch) -> jax.Array | bool:
  """Tells whether the batch changes the state, or is a trial whose metrics are wanted."""
  return batch.control[LEARN] > 0 if LEARN in batch.control else True


def micro_batches(batch: TrainBatch) -> int:
  """Returns how many micro-batches there are, each of one pack on each of the mesh's row shards."""
  packs, shards = batch.policy.at_CX.shape[0], sharding.row_shards(sharding.current_mesh())
  assert packs % shards == 0, f"{packs} packs do not divide among {shards} row shards"
  return packs // shards


def make_score(signals: Callable) -> Callable:
  """Returns score(state, batch, frozen=None) -> Signals of the plain reading of the whole batch.

  One micro-batch goes after another.
  """

  def score(state: TrainState, batch: TrainBatch, frozen=None) -> Signals:
    def score_piece(piece):
      plain, *_ = signals(state.params, state.teacher, piece, frozen)
      return plain

    scored = jax.lax.map(score_piece, cut(batch, micro_batches(batch)))
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), scored)

  return score


def make_reader(config: ModelConfig, *, temperature: float = 1.0) -> Callable:
  """Returns read(params, batch) -> logp_BR: what other weights say of the policy's own texts.

  params: plain weights, without adapters. One micro-batch goes after another.
  """

  def read(params, batch: TrainBatch) -> jax.Array:
    def read_piece(piece):
      return _policy_signals(params, config, piece, temperature=temperature, remat="none").logp_BR

    logp = jax.lax.map(read_piece, cut(batch, micro_batches(batch)))
    return logp.reshape(-1, logp.shape[-1])

  return read


def make_train_step(
  signals: Callable,
  method: Method,
  tx: optax.GradientTransformation,
  *,
  updates: int = 1,
  recompute_old: bool = False,
) -> Callable:
  """Returns step(state, batch, frozen=None) -> (state, {metric: Ratio}).

  frozen: the weights that adapters stand on; policy and teacher share them, and they never move.
  updates: optimizer updates per generation batch, among which its packs divide.
  recompute_old: takes logp_old from the batch, as several updates need. With one update the present
    policy is the old one and the ratio is 1.
  """

  def loss_fn(params, teacher, batch: TrainBatch, normalisers, frozen):
    per_reading = signals(params, teacher, batch, frozen)
    if not recompute_old:
      batch = batch._replace(logp_old_BR=jax.lax.stop_gradient(per_reading[0].logp_BR))
    total, metrics = loss.token_loss(method, per_reading, batch, normalisers)
    return total, {"train/loss": Ratio(total, 1.0), **metrics}

  gradients_of = functools.partial(accumulated_gradients, loss_fn, method)

  def mini_batch(state: TrainState, batch: TrainBatch, frozen):
    gradients, metrics = gradients_of(state, batch, frozen)
    return apply_gradients(tx, state, gradients, metrics, learn=learns(batch))

  def step(state: TrainState, batch: TrainBatch, frozen=None):
    if updates == 1:
      state, metrics = mini_batch(state, batch, frozen)
    else:
      one_update = functools.partial(mini_batch, frozen=frozen)
      state, metrics = jax.lax.scan(one_update, state, cut(batch, updates))
      metrics = jax.tree.map(lambda x: jnp.sum(x, 0), metrics)
    if method.teacher_weights.controller is not None:
      state = move_teacher(state, batch.control["teacher_weights"] * learns(batch))
    return state._replace(step=state.step + learns(batch)), metrics

  return step


def accumulated_gradients(
  loss_fn: Callable, method: Method, state: TrainState, batch: TrainBatch, frozen
):
  """Returns (gradients, metrics) of a mini-batch, summed over its micro-batches in float32."""
  normalisers = loss.normalisers(method, batch)
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

  def accumulate(sums, piece):
    (_, metrics), gradients = value_and_grad(
      state.params, state.teacher, piece, normalisers, frozen
    )
    # Else the TPU compiler tries to move the sums over devices out of the loop, and fails.
    gradients = jax.lax.optimization_barrier(gradients)
    return jax.tree.map(lambda a, g: a + g.astype(a.dtype), sums, gradients), metrics

  pieces = micro_batches(batch)
  if pieces == 1:
    (_, metrics), gradients = value_and_grad(
      state.params, state.teacher, batch, normalisers, frozen
    )
    return gradients, metrics
  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
  gradients, metrics = jax.lax.scan(accumulate, zeros, cut(batch, pieces))
  metrics = jax.tree.map(lambda x: jnp.sum(x, 0), metrics)
  # Each piece is divided by the whole batch's normaliser already, so the sum is the loss.
  metrics["train/loss"] = Ratio(metrics["train/loss"].total, 1.0)
  return gradients, metrics


def apply_gradients(
  tx: optax.GradientTransformation, state: TrainState, gradients, metrics: dict, *, learn=True
) -> tuple[TrainState, dict]:
  """Makes one optimizer update, or skips and counts it where the gradient is not finite.

  learn: without it nothing of the state changes.
  """
  norm = optax.tree.norm(gradients)
  finite = jnp.isfinite(norm)
  delta, opt_state = tx.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, delta)
  in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
  state = state._replace(
    params=_where(finite & learn, params, state.params),
    opt_state=_where(finite & learn, opt_state, state.opt_state),
    skipped=state.skipped + (~finite & learn),
    skipped_in_a_row=jnp.where(learn, in_a_row, state.skipped_in_a_row),
  )
  metrics["train/grad_norm"] = Ratio(jnp.where(finite, norm, 0.0), finite.astype(jnp.float32))
  metrics["train/update_skipped"] = Ratio((~finite).astype(jnp.float32), 1.0)
  return state, metrics


def move_teacher(state: TrainState, rho: jax.Array) -> TrainState:
  """Moves the teacher by the share rho of its way to the policy: 0 leaves it, 1 makes it a copy.

  A last gradient that was not finite leaves it too. These are chosen, not computed: what is not
  finite in an old teacher does not outlive a copy.
  """

  def moved(teacher, policy):
    policy = policy.astype(teacher.dtype)
    between = teacher + rho.astype(teacher.dtype) * (policy - teacher)
    return jnp.where(stays, teacher, jnp.where(rho == 1, policy, between))

  stays = (rho == 0) | (state.skipped_in_a_row > 0)
  return state._replace(teacher=jax.tree.map(moved, state.teacher, state.params))


def _where(condition: jax.Array, new, old):
  """Chooses one of two trees as a whole."""
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
