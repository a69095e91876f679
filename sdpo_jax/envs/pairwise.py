"""Judges open requests by comparison: is the response better than the reference answer?

A row has
  prompt     the request
  reference  the answer to beat, such as that of the model before training
  system     a system message, if any
  category   the kind of request, if any

Reward is 1 if the judge prefers the response in both orders, 0 if it prefers the reference in both,
else 0.5 (`pairwise_judge.py`). The thinking block is no part of the response. One without an answer
loses, and nobody is asked.

The mean reward is the win rate with ties as halves. Its value under the model that wrote the
references need not be 0.5: the judge sees other samples of it.
"""

from sdpo_jax.envs.imports import imported
from sdpo_jax.envs.pairwise_judge import ServerJudge, in_both_orders
from sdpo_jax.envs.rows import field, final_text, groups, messages, optional_text, task_id
from sdpo_jax.records import Feedback, Task

_REWARDS = {"a": 1.0, "b": 0.0, "tie": 0.5}
_TEXTS = {
  "a": "",
  "b": "The judge prefers the reference answer.",
  "tie": "The judge does not prefer this answer to the reference.",
}


class Pairwise:
  """Has each response compared with the row's reference.

  judge
      server, or "module.path:function" of one's own with the same arguments and verdicts
  url, model, key_variable
      of the server, as ServerJudge has them
  timeout_s, retries
      of one request. Two requests with all their attempts have to fit into
      config.rollout.judge_timeout_s
  """

  def __init__(
    self,
    *,
    judge: str = "server",
    url: str = "http://127.0.0.1:8000/v1",
    model: str = "",
    key_variable: str = "",
    timeout_s: float = 60.0,
    retries: int = 2,
  ):
    self._server = None
    if judge == "server":
      self._server = ServerJudge(
        url, model, timeout_s=timeout_s, retries=retries, key_variable=key_variable
      )
    self._judge = self._server or imported("config.env.judge", judge, other="'server' or ")

  def open(self) -> None:
    """Asks the server whether it is there and has the model. RuntimeError in one line if not."""
    if self._server is not None:
      self._server.check()

  def task_from_row(self, row: dict, split: str) -> Task:
    """Reads a row. ValueError that names the field."""
    return Task(
      id=task_id(row, split, "pairwise"),
      prompt=field(row, "prompt"),
      system=optional_text(row, "system"),
      split=split,
      data={"reference": field(row, "reference")} | groups(row, kind="category"),
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the request as it stands."""
    return messages(task)

  def judge(self, task: Task, response: str) -> Feedback:
    """Compares the response with the reference, in both orders."""
    text, fault = final_text(response)
    if fault:
      return Feedback(0.0, fault)
    verdict = in_both_orders(self._judge, task.prompt, text, task.data["reference"])
    return Feedback(_REWARDS[verdict], _TEXTS[verdict])
