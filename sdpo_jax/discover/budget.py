"""Counts what one run has spent of its budget, and what it had spent at its first success.

The limits are attempts and, if set, generated tokens. An attempt counts if the budget was not yet
spent before it, so the last one may go beyond the limit of tokens.

An attempt that the environment could not judge is neither an attempt nor a failure, and its tokens
do not count; `env_failed` says how many there were.

Errors: RunError where several batches in a row hold no verdict at all.
"""

from typing import Any

from sdpo_jax.errors import RunError
from sdpo_jax.records import Rollout, Status


def any_judged(rollouts: list[Rollout]) -> bool:
  """Tells whether the environment could judge at least one of the rollouts."""
  return any(r.feedback.status is not Status.ENV_FAILED for r in rollouts)


class Budget:
  """Holds the limits and the counts of one run.

  attempts, tokens: the limits; tokens of None means no limit.
  max_failed_batches: so many batches in a row without any verdict end the run.
  """

  def __init__(self, attempts: int, tokens: int | None = None, max_failed_batches: int = 3):
    self.attempt_limit = attempts
    self.token_limit = tokens
    self.max_failed_batches = max_failed_batches
    self.sampled = 0  # attempts, counted or not; seeds are numbered by it
    self.attempts = 0
    self.successes = 0
    self.env_failed = 0
    self.failed_batches = 0  # in a row
    self.tokens = 0  # generated
    self.teacher_tokens = 0  # read by the teacher
    self.at_first_success: dict[str, Any] = {
      "first_success": None,
      "first_success_tokens": None,
      "response": None,
    }

  def count(self, rollouts: list[Rollout]) -> None:
    """Counts one batch, in order, up to the end of the budget.

    What comes after that end is ignored, even a success: the result must not depend on what
    shared the batch.
    """
    self.sampled += len(rollouts)
    for rollout in rollouts:
      if not self.attempts_left:
        break
      if rollout.feedback.status is Status.ENV_FAILED:
        self.env_failed += 1
      else:
        self._count_judged(rollout)
    self.failed_batches = 0 if any_judged(rollouts) else self.failed_batches + 1
    if self.failed_batches >= self.max_failed_batches:
      raise RunError(
        f"no attempt could be judged in {self.failed_batches} batches in a row: the environment "
        "or its sandbox is broken, see the log above; finished runs are intact, and the same "
        "command goes on with the one under way"
      )

  def _count_judged(self, rollout: Rollout) -> None:
    self.attempts += 1
    self.tokens += len(rollout.tokens)
    if rollout.feedback.reward < 1.0:
      return
    self.successes += 1
    if not self.solved:
      self.at_first_success = {
        "first_success": self.attempts,
        "first_success_tokens": self.tokens,
        "response": rollout.text,
      }

  @property
  def solved(self) -> bool:
    """Tells whether an attempt within the budget succeeded."""
    return self.at_first_success["first_success"] is not None

  @property
  def attempts_left(self) -> int:
    """Attempts that may still be made; 0 once the tokens are spent."""
    if self.token_limit is not None and self.tokens >= self.token_limit:
      return 0
    return self.attempt_limit - self.attempts

  def record(self) -> dict[str, Any]:
    """Returns the counts as the fields of the run's line in discover.jsonl."""
    return self.at_first_success | {
      "attempts": self.attempts,
      "successes": self.successes,
      "env_failed": self.env_failed,
      "tokens": self.tokens,
      "teacher_tokens": self.teacher_tokens,
    }
