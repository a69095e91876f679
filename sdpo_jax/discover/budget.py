"""What one (question, seed) may still spend."""

from typing import Any

from sdpo_jax.errors import RunError
from sdpo_jax.records import Rollout, Status


def any_judged(rollouts: list[Rollout]) -> bool:
  """Tells whether the environment could judge at least one of them."""
  return any(r.feedback.status is not Status.ENV_FAILED for r in rollouts)


class Budget:
  """Attempts, generated tokens and teacher tokens of one run, and what they were when the first success came.

  attempts, tokens: limits; tokens None: no limit. An attempt counts if the budget was not spent before it, so the last one may go beyond the
  limit of tokens. What could not be judged is neither an attempt nor a failure, and its tokens do not count: `env_failed` says how many those
  were, and RunError ends a run that has `env_failures` batches of them in a row. asked: attempts sampled, counted or not; seeds are numbered by it.
  """

  def __init__(self, attempts: int, tokens: int | None = None, env_failures: int = 3):
    self.limit, self.token_limit, self.env_failures = attempts, tokens, env_failures
    self.asked = self.attempts = self.tokens = self.teacher_tokens = self.successes = (
      self.env_failed
    ) = self.failed_batches = 0
    self.first: dict[str, Any] = {
      "first_success": None,
      "first_success_tokens": None,
      "response": None,
    }

  def count(self, rollouts: list[Rollout]) -> None:
    """One batch, in order; what comes after the end of the budget is ignored, a success as well: it must not matter what shared the batch."""
    self.asked += len(rollouts)
    for r in rollouts:
      if not self.left:
        break
      if r.feedback.status is Status.ENV_FAILED:
        self.env_failed += 1
        continue
      self.attempts += 1
      self.tokens += len(r.tokens)
      if r.feedback.reward >= 1.0:
        self.successes += 1
        if not self.found:
          self.first = {
            "first_success": self.attempts,
            "first_success_tokens": self.tokens,
            "response": r.text,
          }
    self.failed_batches = 0 if any_judged(rollouts) else self.failed_batches + 1
    if self.failed_batches >= self.env_failures:
      raise RunError(
        f"no attempt could be judged in {self.failed_batches} batches in a row: the environment or its sandbox is broken, see the log above; "
        "finished runs are intact, and the same command goes on with the one under way"
      )

  @property
  def found(self) -> bool:
    return self.first["first_success"] is not None

  @property
  def left(self) -> int:
    """Attempts that may still be made."""
    return (
      0
      if self.token_limit is not None and self.tokens >= self.token_limit
      else self.limit - self.attempts
    )

  def record(self) -> dict[str, Any]:
    return self.first | {
      "attempts": self.attempts,
      "successes": self.successes,
      "env_failed": self.env_failed,
      "tokens": self.tokens,
      "teacher_tokens": self.teacher_tokens,
    }
