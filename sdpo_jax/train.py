"""Training: the wiring of a run, and the loop.

The loop reads as a sentence: questions -> judged groups -> batch -> step -> metrics and checkpoint. It owns time, files and
failure and does no arithmetic on weights. What each step does is a function of (configuration, step, weights, data position);
all of these are in the checkpoint, so a killed and resumed run writes the same metrics.jsonl.

Metrics of step i belong to the i-th generation batch (from 1) and, where due, to the evaluation after it; step 0 is the
evaluation of the base model.
"""

import functools
import json
import logging
import pathlib
import time

import jax
import numpy as np

from sdpo_jax import checkpoint, hosts, monitors, report, sharding
from sdpo_jax.config import validate
from sdpo_jax.data.batch import pack
from sdpo_jax.data.shapes import Shape, Shapes, most_tokens
from sdpo_jax.data.tasks import RowEnv, TaskStream
from sdpo_jax.errors import RunError, blame_settings
from sdpo_jax.evaluate import evaluate
from sdpo_jax.learner import learner
from sdpo_jax.metrics import Writer, read, reduce
from sdpo_jax.objectives import build
from sdpo_jax.records import Rollout, Sampling, Status
from sdpo_jax.rollout import prompt_seed
from sdpo_jax.rollout_log import rollout_lines
from sdpo_jax.session import wired
from sdpo_jax.workdir import check_same_run, describe_run, write_atomically


def run(
  state,
  host,
  *,
  total_steps,
  next_tasks,
  collect,
  make_batch,
  step,
  score,
  evaluate,
  due,
  write,
  write_rollouts,
  save,
  limits,
):
  """Trains `state` to total_steps and returns it. Every collaborator is an argument; due(name, i) says what step i calls for.

  host: {"tokens": sampled so far, "alternatives": responses among them that are not trained on, "failed_batches": without a verdict, in a row}; goes into
  the checkpoint.
  limits: {"skipped": non-finite updates in a row, "env_failures": batches without a verdict in a row} that stop the run.
  """
  first = int(state.step)
  if first == 0 and due("eval", 0):
    write(0, evaluate(state, 0))
  saved = first  # the last checkpoint's step; 0: none
  checkpoints = lambda: (
    f"the last checkpoint is step {saved}" if saved else "there is no checkpoint yet"
  )
  for i in range(first + 1, total_steps + 1):
    begun = time.monotonic()
    tasks = next_tasks()
    groups = collect(state, tasks, i)
    sampled = time.monotonic()
    packed = make_batch(groups)
    host["tokens"] += sum(len(r.tokens) + r.extra_tokens for g in groups for r in g)
    host["alternatives"] += sum(r.extra_calls for g in groups for r in g)
    metrics = (
      packed.metrics
      | rollout_metrics(groups)
      | {
        "train/generations": i * sum(map(len, groups)) + host["alternatives"],
        "train/sampled_tokens": host["tokens"],
      }
    )
    host["failed_batches"] = (
      host["failed_batches"] + 1 if metrics["data/dropped"] == len(packed.contexts) else 0
    )
    if host["failed_batches"] >= limits["env_failures"]:
      raise RunError(
        f"no response could be judged in {host['failed_batches']} generation batches in a row (step {i}): the environment or its sandbox is broken, "
        f"see the log above; {checkpoints()}"
      )
    said = score(state, packed.batch) if due("score", i) else None
    if said is not None:
      packed = packed._replace(batch=packed.batch._replace(logp_old_BR=np.asarray(said.logp_BR)))
    if due("rollouts", i):
      write_rollouts(i, packed, said)
    state, stepped = step(state, packed.batch)  # the only line that changes weights
    metrics |= jax.device_get(stepped)
    ended = time.monotonic()
    metrics |= {
      "time/rollout_s": sampled - begun,
      "time/update_s": ended - sampled,
      "perf/tokens_per_s": sum(len(r.tokens) for g in groups for r in g) / (ended - begun),
    }
    if int(state.skipped_in_a_row) >= limits["skipped"]:
      raise RunError(
        f"the gradient was not finite in {int(state.skipped_in_a_row)} updates in a row (step {i}); {checkpoints()}; "
        "lower config.optimizer.lr or look at the rollouts of this step"
      )
    if due("eval", i):
      metrics |= evaluate(state, i)
    write(i, metrics)
    if due("checkpoint", i):
      save(i, state, host)
      saved = i
  return state


def rollout_metrics(groups: list[list[Rollout]]) -> dict[str, float]:
  rows = [r for g in groups for r in g]
  judged = [r for r in rows if r.feedback.status is not Status.ENV_FAILED]
  metrics = {
    "rollout/length": float(np.mean([len(r.tokens) for r in rows])),
    "rollout/truncated": float(np.mean([r.finish_reason == "length" for r in rows])),
    "rollout/timeouts": float(sum(r.feedback.status is Status.TIMEOUT for r in rows)),
  }
  if judged:
    metrics |= {
      "train/reward": float(np.mean([r.feedback.reward for r in judged])),
      "train/solved_questions": float(
        np.mean([any(r.feedback.reward >= 1.0 for r in g) for g in groups])
      ),
    }
  return metrics


def train(c, workdir: str) -> None:
  """Wires a run from its configuration, trains (or resumes) it, and writes the report. A finished run is left as it is.

  Raises SettingError for what cannot run, RunError for a run that cannot go on.
  """
  workdir = pathlib.Path(workdir)
  with blame_settings():
    validate(c)
    part = build.build_method(c.method.to_dict())["counterfactual"]()
    check_same_run(workdir, c, begun=checkpoint.latest_step(workdir) is not None)
    latest = checkpoint.latest_step(workdir)
  if latest is not None and latest >= c.total_steps:
    # killed between the last step and the report
    if hosts.leads() and not (workdir / "report" / "index.html").exists():
      report.write_report([workdir], workdir / "report")
    return

  with wired(c, part=part, taught=True) as w:
    with blame_settings():
      learn = learner(c, w.model, w.join)
      params, frozen = w.trainable(c.seed)
      state = w.fresh_state(params, learn.tx, learn.teacher)
      shards = sharding.row_shards(w.mesh)
      packs = c.train.updates_per_batch * c.train.micro_batches * shards
      if c.rollout.questions * c.rollout.group % packs:
        raise ValueError(
          f"config.rollout.questions x group = {c.rollout.questions * c.rollout.group} responses do not divide into {packs} packs: "
          "train.updates_per_batch x micro_batches x the mesh's data x fsdp"
        )
      host = {
        "tokens": 0,
        "alternatives": 0,
        "failed_batches": 0,
        "data": None,
        "shapes": [],
        "owed": 0.0,
      }
      stream = TaskStream(w.collector.env, "train", seed=c.seed)
      if latest is not None:
        state, stored = checkpoint.restore(workdir, state)
        if stored.keys() != host.keys() or any(
          len(sizes) != len(Shape._fields) for sizes in stored["shapes"]
        ):
          raise ValueError(
            f"the checkpoint in {workdir} was written by another version of sdpo_jax: go on with that one, or choose another --workdir"
          )
        host = stored
        stream.restore(host["data"])
    shapes = Shapes(
      most_tokens(c.data, c.rollout.max_new_tokens),
      [Shape(*sizes) for sizes in host["shapes"]],
      host["owed"],
    )
    places = None if w.mesh is None else jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(learn.step, donate_argnums=0, out_shardings=(places, w.everywhere))
    score = jax.jit(learn.score, out_shardings=w.everywhere)
    on_mesh = functools.partial(sharding.put_rows, w.mesh)
    sampling = Sampling(
      c.rollout.max_new_tokens, c.rollout.temperature, c.rollout.top_p, w.chat.stop_tokens
    )
    writer = None
    if hosts.leads():
      describe_run(
        workdir,
        c,
        {"sandbox_isolation": w.isolation, "mesh": None if w.mesh is None else dict(w.mesh.shape)},
      )
      writer = Writer(workdir, total_steps=c.total_steps)
      writer.truncate(0 if latest is None else latest + 1)

    def evaluate_at(state, i):
      splits = c.eval.final_splits if i in (0, c.total_steps) else c.eval.splits
      return evaluate(
        w.collector,
        w.weights(state.params, frozen),
        splits=splits,
        questions=c.eval.questions,
        samples=c.eval.samples,
        sampling=w.eval_sampling,
      )

    def collect(state, tasks, i):
      seeds = [prompt_seed(c.seed, "train", i, q) for q in range(len(tasks))]
      params = w.weights(state.params, frozen)
      groups = w.collector.collect(params, tasks, n=c.rollout.group, sampling=sampling, seeds=seeds)
      if learn.explore:
        explored.update(
          learn.explore(
            w.collector,
            params,
            groups,
            sampling=sampling,
            seed=c.seed,
            step=i,
            max_prompt_tokens=c.data.max_teacher_tokens,
            other=w.other,
          )
        )
      return groups

    explored = {}  # what the last batch's alternatives cost and said
    skipped = (
      {"data/skipped_rows": float(w.collector.env.skipped)}
      if isinstance(w.collector.env, RowEnv)
      else {}
    )

    def make_batch(groups):
      packed = pack(
        groups,
        chat=w.chat,
        messages=w.collector.env.prompt,
        teacher_context=learn.parts["teacher_context"],
        advantage=learn.parts["advantage"],
        max_teacher_tokens=c.data.max_teacher_tokens,
        length_multiple=c.data.length_multiple,
        response_multiple=c.data.response_multiple,
        shapes=shapes,
        updates=c.train.updates_per_batch,
        micro_batches=c.train.micro_batches,
        shards=shards,
        counterfactual=learn.counterfactual,
        share_prefixes=jax.default_backend() != "tpu",
      )  # splash knows no prefixes
      return packed._replace(
        metrics=packed.metrics
        | explored
        | skipped
        | {"data/copy_rate": monitors.copy_rate(packed.rollouts, packed.contexts, w.chat)}
      )

    # lines as they stand in the file, so that a resumed run sees the same ones
    history, signs = read(workdir), set()

    def write(i, measured):
      if not hosts.leads():
        return
      history.append({"step": i} | reduce(measured))
      found = monitors.warnings(history)
      for sign in sorted(found.keys() - signs):
        logging.warning("step %d: %s", i, found[sign])
      signs.clear()
      signs.update(found)
      writer.write(i, measured | {"train/warnings": len(found)})

    def due(name, i):
      if name == "score":  # a pass of its own, only where somebody reads it
        return learn.score_first or due("rollouts", i)
      every = {
        "eval": c.eval.every_steps,
        "checkpoint": c.checkpoint.every_steps,
        "rollouts": c.log.rollouts_every_steps,
      }
      return i == c.total_steps or i % every[name] == 0 or (name == "rollouts" and i == 1)

    def write_rollouts(i, packed, said):
      if not hosts.leads():
        return
      (workdir / "rollouts").mkdir(exist_ok=True)
      lines = rollout_lines(i, packed, said, w.chat, c.log.rollouts_kept)
      write_atomically(
        workdir / "rollouts" / f"step_{i:06d}.jsonl",
        "".join(json.dumps(line) + "\n" for line in lines),
      )

    def save(i, state, host):
      checkpoint.save(
        workdir,
        i,
        state,
        host | {"data": stream.state(), "shapes": shapes.known, "owed": shapes.owed},
        keep=c.checkpoint.keep,
      )

    try:
      run(
        state,
        host,
        total_steps=c.total_steps,
        next_tasks=lambda: stream.take(c.rollout.questions),
        collect=collect,
        make_batch=make_batch,
        step=lambda state, batch: step(state, on_mesh(batch), frozen),
        score=lambda state, batch: score(state, on_mesh(batch), frozen),
        evaluate=evaluate_at,
        due=due,
        write=write,
        write_rollouts=write_rollouts,
        save=save,
        limits={
          "skipped": c.train.max_skipped_in_a_row,
          "env_failures": c.train.max_env_failures_in_a_row,
        },
      )
    finally:
      if writer:
        writer.close()
  if hosts.leads():
    report.write_report([workdir], workdir / "report")
