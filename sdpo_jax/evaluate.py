"""Evaluation: sample k responses to each question of a split, judge them, summarise.

avg@k is the mean reward over questions and their k responses; its interval is a bootstrap over questions (95 %). Questions and
seeds depend on the split alone, so every evaluation of a run, and of runs that are compared, sees the same ones.
"""

from sdpo_jax import stats
from sdpo_jax.data.tasks import first_tasks
from sdpo_jax.records import Sampling, Status
from sdpo_jax.rollout import Collector, prompt_seed


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
