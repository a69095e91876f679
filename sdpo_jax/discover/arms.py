"""The ways to spend a budget on one question."""

import dataclasses
from typing import Callable

from sdpo_jax.discover.budget import Budget, any_judged
from sdpo_jax.objectives.teacher_context import CLOSING, TEMPLATES, Context, fill
from sdpo_jax.records import Rollout, Status, Task

ARMS = ("sdpo", "counterfactual", "best_of_k", "multi_turn")


LEARNING = ARMS[:2]


HISTORIES = ("feedback", "attempt_and_feedback")


def solve_by_learning(
  task: Task,
  budget: Budget,
  *,
  fresh: Callable,
  collect: Callable,
  make_batch: Callable,
  step: Callable,
):
  """SDPO on one question from fresh() weights, until a success or the budget's end; returns the last state. collect(params, [(task, first attempt)]) -> groups."""
  state = fresh()
  while not budget.found and budget.left:
    groups = collect(state.params, [(task, budget.asked)])
    budget.count(groups[0])
    if not budget.found and budget.left and any_judged(groups[0]):
      packed = make_batch(groups)
      budget.teacher_tokens += sum(
        int((half.segment_CPT > 0).sum())
        for half in (packed.batch.teacher, *(c.teacher for c in packed.batch.counterfactuals))
      )
      state = step(state, packed.batch)
  return state


def solve_by_sampling(
  task: Task, budget: Budget, *, params, collect: Callable, rollouts: int, together: int = 1
) -> None:
  """All of the budget, independent, in `together` batches of `rollouts` attempts at a time."""
  while budget.left:
    groups = collect(
      params,
      [(task, budget.asked + i * rollouts) for i in range(together) if i * rollouts < budget.left],
    )
    budget.count(sum(groups, []))


def solve_by_turns(
  task: Task,
  budget: Budget,
  *,
  params,
  collect: Callable,
  fits: Callable,
  history: str = "feedback",
) -> None:
  """What was said of earlier attempts stays in the prompt, newest last; the oldest is dropped while the prompt does not fit."""
  turns: list[Rollout] = []
  while not budget.found and budget.left:
    shown = list(turns)
    while shown and not fits(prompt_with(task, shown, history)):
      shown.pop(0)
    (rollout,) = collect(params, [(prompt_with(task, shown, history), budget.asked)])[0]
    budget.count([rollout])
    if rollout.feedback.text and rollout.feedback.status is not Status.ENV_FAILED:
      turns.append(rollout)


def prompt_with(task: Task, turns: list[Rollout], history: str) -> Task:
  """The task with earlier turns in its prompt, in the words that the teacher reads."""
  if not turns:
    return task
  if history == "feedback":
    prompt = Context(feedback="\n\n".join(r.feedback.text for r in turns)).render(task.prompt)
  else:
    said = [
      fill(TEMPLATES["attempt"], {"text": r.text})
      + fill(TEMPLATES["feedback"], {"text": r.feedback.text})
      for r in turns
    ]
    prompt = task.prompt + "".join(said) + CLOSING
  return dataclasses.replace(task, prompt=prompt)
