"""Evaluates: samples k responses to each question of a split, judges them, summarises.

avg@k is the mean reward over questions and their k responses; its interval is a bootstrap over
questions (95 %). Questions and seeds depend on the split alone. Every evaluation of a run, and of
runs that are compared, therefore sees the same ones.
"""

import json
import pathlib

from sdpo_jax import checkpoint, hosts, stats
from sdpo_jax.config import model_of_run
from sdpo_jax.data.tasks import first_tasks
from sdpo_jax.errors import blame_settings
from sdpo_jax.preemption import Notice
from sdpo_jax.records import Rollout, Sampling, Status
from sdpo_jax.rollout import Collector, prompt_seed
from sdpo_jax.session import Session, open_session
from sdpo_jax.workdir import write_atomically


def evaluate(
  collector: Collector, params, *, splits, questions: int, samples: int, sampling: Sampling
) -> dict[str, float]:
  """Returns the metrics eval/<split>/avg@k with `_low` and `_high`, and pass@k; k = samples."""
  metrics = {}
  for split in splits:
    tasks = first_tasks(collector.env, split, questions)
    seeds = [prompt_seed(0, "eval", split, i) for i in range(len(tasks))]
    groups = collector.collect(params, tasks, n=samples, sampling=sampling, seeds=seeds)
    metrics |= summarise(split, groups)
  return metrics


def summarise(split: str, groups: list[list[Rollout]]) -> dict[str, float]:
  """Returns the metrics of one split. Responses without a verdict are left out and counted."""
  rollouts = [r for group in groups for r in group]
  failed = sum(r.feedback.status is Status.ENV_FAILED for r in rollouts)
  metrics = {f"eval/{split}/env_failed": float(failed)} if failed else {}
  rewards = []
  for group in groups:
    judged = [r for r in group if r.feedback.status is not Status.ENV_FAILED]
    if judged:  # a question without one verdict tells nothing
      rewards.append([r.feedback.reward for r in judged])
  if not rewards:
    return metrics
  mean, low, high = stats.avg_at_k(rewards)
  solved = sum(any(reward >= 1.0 for reward in group) for group in rewards)
  name = f"eval/{split}/avg@k"
  metrics |= {name: mean, f"{name}_low": low, f"{name}_high": high}
  return metrics | {f"eval/{split}/pass@k": solved / len(rewards)}


def evaluate_checkpoint(c, workdir: str, source: str) -> dict[str, float]:
  """Scores WORKDIR[:step] or a Hugging Face directory on the final splits.

  Writes eval/<name>.json into the work directory.
  """
  workdir = pathlib.Path(workdir)
  root, step = _split_step(source)
  with blame_settings():
    is_run = checkpoint.latest_step(root) is not None
    if is_run:
      # The run itself tells which model its checkpoint stands on, and with which adapters.
      c = c.copy_and_resolve_references()
      c.model.update(model_of_run(root))
    elif not (pathlib.Path(source) / "config.json").exists():
      raise ValueError(
        f"--checkpoint={source}: neither a work directory with a checkpoint "
        "nor a Hugging Face directory"
      )
  notice = Notice("the same command begins anew")
  with open_session(c, None if is_run else source, check_stop=notice.check) as session, notice:
    params, name = session.params, pathlib.Path(root).name
    if is_run:
      with blame_settings():
        step = checkpoint.latest_step(root) if step is None else step
        params, name = _restore(c, session, root, step), f"step_{step:06d}"
    metrics = evaluate(
      session.collector,
      params,
      splits=c.eval.final_splits,
      questions=c.eval.questions,
      samples=c.eval.samples,
      sampling=session.eval_sampling,
    )
  if hosts.leads():
    (workdir / "eval").mkdir(parents=True, exist_ok=True)
    about = {"checkpoint": source, "questions": c.eval.questions, "samples": c.eval.samples}
    text = json.dumps(about | metrics, indent=2) + "\n"
    write_atomically(workdir / "eval" / f"{name}.json", text)
  return metrics


def _split_step(source: str) -> tuple[str, int | None]:
  """WORKDIR:step as (WORKDIR, step); without a step, None."""
  head, _, tail = source.rpartition(":")
  return (head, int(tail)) if head and tail.isdigit() else (source, None)


def _restore(c, session: Session, root: str, step: int):
  """The weights of a run's checkpoint, as sampling wants them."""
  trainable, frozen = session.trainable(c.seed)
  return session.weights(checkpoint.restore_params(root, trainable, step), frozen)


def summary_lines(results: dict[str, float], base: dict[str, float]) -> list[str]:
  """Returns a line per split: avg@k with its interval and pass@k.

  The base model's stand beside them where they are known.
  """
  lines = []
  for key in results:
    if not key.endswith("/avg@k"):
      continue
    line = f"{key.split('/')[1]:>12}  {_figures(results, key)}"
    if key in base:
      line += f"   base model {_figures(base, key)}"
    lines.append(line)
  return lines


def _figures(metrics: dict[str, float], key: str) -> str:
  """avg@k with its interval and pass@k, as far as they are there."""
  text = f"avg@k {metrics[key]:.1%}"
  low, high = metrics.get(key + "_low"), metrics.get(key + "_high")
  if low is not None:
    text += f" [{low:.1%}, {high:.1%}]"
  pass_at_k = metrics.get(key.replace("avg@k", "pass@k"))
  if pass_at_k is not None:
    text += f" pass@k {pass_at_k:.1%}"
  return text
