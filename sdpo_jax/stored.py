"""Rollouts as JSON: for a checkpoint that holds a batch, and between processes."""

from sdpo_jax.records import Completion, Feedback, Rollout, Segment, Status, Task, Turn


def stored(groups: list[list[Rollout]]) -> list[list[dict]]:
  """Returns rollouts, for which nothing was sampled but themselves, as JSON holds them."""
  return [[_stored(rollout) for rollout in group] for group in groups]


def _stored(rollout: Rollout) -> dict:
  assert rollout.sampled is not None and not rollout.alternatives and rollout.reflection is None
  feedback, turns = rollout.feedback, rollout.turns
  return {
    "prompt": rollout.prompt_tokens,
    "sampled": [[s.start, s.completion._asdict(), s.before, s.prompt] for s in rollout.sampled],
    "finish_reason": rollout.finish_reason,
    "text": rollout.text,
    "feedback": [feedback.reward, feedback.text, feedback.status.value],
    "turns": None if turns is None else [list(turn) for turn in turns],
  }


def restored(tasks: list[Task], groups: list[list[dict]]) -> list[list[Rollout]]:
  """Returns the rollouts that were stored. tasks: their questions."""
  return [
    [_restored(task, row) for row in group] for task, group in zip(tasks, groups, strict=True)
  ]


def _restored(task: Task, row: dict) -> Rollout:
  sampled = [
    Segment(start, Completion(**completion), *map(tuple, texts))
    for start, completion, *texts in row["sampled"]
  ]
  reward, words, status = row["feedback"]
  entropy = sampled[0].completion.entropy if len(sampled) == 1 else None
  turns = row["turns"]
  return Rollout(
    task,
    row["prompt"],
    [token for segment in sampled for token in segment.completion.tokens],
    [logp for segment in sampled for logp in segment.completion.logp],
    row["finish_reason"],
    row["text"],
    Feedback(reward, words, Status(status)),
    entropy=entropy,
    sampled=sampled,
    turns=turns and [Turn(*turn) for turn in turns],
  )
