"""What multi_turn reads of a run's earlier attempts: the newest last, as many as its prompt holds.

feedback              the feedback on each, below the question, in the words that the teacher
                      reads
attempt_and_feedback  a conversation (data/conversation.py): the attempts are the policy's own
                      turns, as the ids that it sampled, and the feedback answers them
"""

import dataclasses
from typing import Callable

from sdpo_jax.data.conversation import Continuation, converse
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Rollout, Task

HISTORIES = ("feedback", "attempt_and_feedback")


class History:
  """The earlier attempts of one run, and the prompt that shows them."""

  def __init__(self, render: Callable, max_prompt_tokens: int):
    """render(turns) -> (ids of the prompt, whether a chat template had to render it anew)."""
    self._render = render
    self._limit = max_prompt_tokens
    self._turns: list[Rollout] = []
    self.rendered_again = 0  # prompts

  def add(self, rollout: Rollout) -> None:
    """Adds an attempt whose feedback says something."""
    self._turns.append(rollout)

  def prompt(self) -> list[int]:
    """Returns the ids of the next prompt. Turns that it has no room for are dropped for good."""
    tokens, is_rendered_again = self._render(self._turns)
    while self._turns and len(tokens) > self._limit:
      self._turns.pop(0)
      tokens, is_rendered_again = self._render(self._turns)
    self.rendered_again += is_rendered_again
    return tokens


def make_history(
  task: Task,
  messages_of: Callable,
  chat,
  continuation: Continuation | None,
  max_prompt_tokens: int,
) -> History:
  """Returns the empty history of a run.

  messages_of(task): the messages that ask the question.
  continuation: how conversations go on; None: only feedback is shown.
  """

  def feedback_alone(turns: list[Rollout]) -> tuple[list[int], bool]:
    return chat.prompt_tokens(messages_of(with_feedback(task, turns))), False

  def conversation(turns: list[Rollout]) -> tuple[list[int], bool]:
    held = converse(continuation, messages_of(task), turns)
    return held.prompt, held.rendered_again > 0

  return History(feedback_alone if continuation is None else conversation, max_prompt_tokens)


def with_feedback(task: Task, turns: list[Rollout]) -> Task:
  """Returns the task with the feedback on earlier attempts in its prompt."""
  if not turns:
    return task
  feedback = "\n\n".join(turn.feedback.text for turn in turns)
  return dataclasses.replace(task, prompt=Context(feedback=feedback).render(task.prompt))
