"""The arms: the ways in which a run may spend its budget on one question.

Source: arXiv 2601.20802, section 5. All arms share the sampler, the judge and the accounting:

  sdpo            batches of attempts from fresh weights; each batch without a success is one
                  update on its feedback alone
  counterfactual  like sdpo, but the teacher is also told what the batch's other attempts
                  received (solver.method_of)
  best_of_k       independent attempts of the base model
  multi_turn      one attempt after another, with the feedback on the earlier ones in the prompt,
                  or with both (`turns.py`)

Each arm gets what touches a model as functions, so these loops know no arrays.
collect(params, batches) -> groups samples and judges. A batch is (task, number of its first
attempt), the number choosing its seed; its attempts are the group at the same place.
"""

from typing import Callable, NamedTuple

from sdpo_jax.discover.budget import Budget, any_judged
from sdpo_jax.discover.turns import History
from sdpo_jax.records import Status, Task, TrainBatch

ARMS = ("sdpo", "counterfactual", "best_of_k", "multi_turn")
LEARNING = ("sdpo", "counterfactual")


class ArmRun(NamedTuple):
  """One run: an arm spends its budget on one question, with one seed."""

  number: int  # in the list of all runs
  arm: str
  task: Task
  place: int  # of the task among the questions
  seed: int

  @property
  def key(self) -> tuple[str, str, int]:
    """Identifies the run in the files of the work directory."""
    return self.arm, self.task.id, self.seed


def solve_by_learning(
  task: Task,
  budget: Budget,
  *,
  fresh_state: Callable,
  collect: Callable,
  make_batch: Callable,
  step: Callable,
):
  """Learns between batches until a success or the budget's end, and returns the last state.

  make_batch(groups, i) -> Packed, for the i-th update from 1; step(state, packed) -> state.
  """
  state, updates = fresh_state(), 0
  while not budget.solved and budget.attempts_left:
    groups = collect(state.params, [(task, budget.sampled)])
    budget.count(groups[0])
    # An update is wasted if no attempt follows it, and impossible without a verdict.
    run_goes_on = not budget.solved and budget.attempts_left
    if run_goes_on and any_judged(groups[0]):
      updates += 1
      packed = make_batch(groups, updates)
      budget.teacher_tokens += teacher_tokens(packed.batch)
      state = step(state, packed)
  return state


def teacher_tokens(batch: TrainBatch) -> int:
  """Counts the tokens that the teacher reads in a batch, in all of its readings."""
  return sum(int((reading.rows.segment_CPT > 0).sum()) for reading in batch.readings)


def solve_by_sampling(
  task: Task, budget: Budget, *, params, collect: Callable, rollouts: int, together: int = 1
) -> None:
  """Spends the whole budget on independent attempts, a success or not.

  together: batches of `rollouts` attempts that are sampled at a time.
  """
  while budget.attempts_left:
    offsets = [i * rollouts for i in range(together) if i * rollouts < budget.attempts_left]
    groups = collect(params, [(task, budget.sampled + offset) for offset in offsets])
    budget.count([rollout for group in groups for rollout in group])


def solve_by_turns(
  task: Task, budget: Budget, *, params, collect: Callable, history: History
) -> None:
  """Attempts again and again, with what `history` keeps of earlier attempts in the prompt.

  collect(params, batches, prompts): prompts are the ids that the attempts of each batch follow.
  """
  while not budget.solved and budget.attempts_left:
    groups = collect(params, [(task, budget.sampled)], [history.prompt()])
    (rollout,) = groups[0]
    budget.count([rollout])
    if rollout.feedback.text and rollout.feedback.status is not Status.ENV_FAILED:
      history.add(rollout)
