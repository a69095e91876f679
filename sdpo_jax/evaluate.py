"""Evaluation: sample k responses to each question of a split, judge them, summarise.

avg@k is the mean reward over questions and their k responses; its interval is a bootstrap over questions (95 %). Questions and
seeds depend on the split alone, so every evaluation of a run, and of runs that are compared, sees the same ones.
"""

import json
import pathlib

from sdpo_jax import checkpoint, hosts, stats
from sdpo_jax.config import model_of_run
from sdpo_jax.data.tasks import first_tasks
from sdpo_jax.errors import blame_settings
from sdpo_jax.records import Sampling, Status
from sdpo_jax.rollout import Collector, prompt_seed
from sdpo_jax.session import wired
from sdpo_jax.workdir import write_atomically


def evaluate(
  collector: Collector, params, *, splits, questions: int, samples: int, sampling: Sampling
) -> dict[str, float]:
  """-> {"eval/<split>/avg@k": ..., "..._low", "..._high", "eval/<split>/pass@k"}, k = samples."""
  metrics = {}
  for split in splits:
    tasks = first_tasks(collector.env, split, questions)
    seeds = [prompt_seed(0, "eval", split, i) for i in range(len(tasks))]
    groups = collector.collect(params, tasks, n=samples, sampling=sampling, seeds=seeds)
    judged = [
      [r.feedback.reward for r in g if r.feedback.status is not Status.ENV_FAILED] for g in groups
    ]
    judged = [g for g in judged if g]  # a question without one verdict says nothing
    failed = sum(r.feedback.status is Status.ENV_FAILED for g in groups for r in g)
    if failed:
      metrics[f"eval/{split}/env_failed"] = float(failed)
    if not judged:
      continue
    mean, low, high = stats.avg_at_k(judged)
    name = f"eval/{split}/avg@k"
    metrics |= {
      name: mean,
      f"{name}_low": low,
      f"{name}_high": high,
      f"eval/{split}/pass@k": sum(any(x >= 1.0 for x in g) for g in judged) / len(judged),
    }
  return metrics


def evaluate_checkpoint(c, workdir: str, source: str) -> dict[str, float]:
  """Scores WORKDIR[:step] or a Hugging Face directory on the final splits; writes eval/<name>.json into the work directory."""
  workdir = pathlib.Path(workdir)
  head, _, tail = source.rpartition(":")
  root, step = (head, int(tail)) if head and tail.isdigit() else (source, None)
  with blame_settings():
    is_run = checkpoint.latest_step(root) is not None
    if is_run:  # what it stands on, and with which adapters, the run itself says
      c = c.copy_and_resolve_references()
      c.model.update(model_of_run(root))
    if not is_run and not (pathlib.Path(source) / "config.json").exists():
      raise ValueError(
        f"--checkpoint={source}: neither a work directory with a checkpoint nor a Hugging Face directory"
      )
  with wired(c, None if is_run else source) as w:
    params, name = w.params, pathlib.Path(root).name
    if is_run:
      with blame_settings():
        step = checkpoint.latest_step(root) if step is None else step
        trained, frozen = w.trainable(c.seed)
        params, name = (
          w.weights(checkpoint.restore_params(root, trained, step), frozen),
          f"step_{step:06d}",
        )
    metrics = evaluate(
      w.collector,
      params,
      splits=c.eval.final_splits,
      questions=c.eval.questions,
      samples=c.eval.samples,
      sampling=w.eval_sampling,
    )
  if not hosts.leads():
    return metrics
  (workdir / "eval").mkdir(parents=True, exist_ok=True)
  about = {"checkpoint": source, "questions": c.eval.questions, "samples": c.eval.samples}
  write_atomically(workdir / "eval" / f"{name}.json", json.dumps(about | metrics, indent=2) + "\n")
  return metrics


def summary_lines(results: dict[str, float], base: dict[str, float]) -> list[str]:
  """Per split: avg@k with its interval and pass@k, and the base model's beside them where they are known."""

  def interval(metrics, key):
    low, high = metrics.get(key + "_low"), metrics.get(key + "_high")
    pass_at_k = metrics.get(key.replace("avg@k", "pass@k"))
    return (
      f"avg@k {metrics[key]:.1%}"
      + (f" [{low:.1%}, {high:.1%}]" if low is not None else "")
      + (f" pass@k {pass_at_k:.1%}" if pass_at_k is not None else "")
    )

  return [
    f"{key.split('/')[1]:>12}  {interval(results, key)}"
    + (f"   base model {interval(base, key)}" if key in base else "")
    for key in results
    if key.endswith("/avg@k")
  ]
