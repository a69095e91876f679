"""Tasks -> engine -> judge -> groups of Rollout. Host side.

Judging runs in threads (each waits for a sandboxed process, none computes) and starts as each response finishes, while others
are still being sampled. A judge that raises, hangs or returns a reward that is not a number in [0, 1] costs its own response only: the row
becomes ENV_FAILED, is counted and never trained on. What it says is cleaned and bounded here, once for every environment (`verdict`).

A judge sees text, not why it ended. What it says of a response that ran into `max_new_tokens` is therefore preceded by that fact,
for every environment alike; where it says nothing, nothing is added.
"""

import concurrent.futures
import dataclasses
import logging
import numbers
import queue
import threading
import zlib

import jax

from sdpo_jax import hosts
from sdpo_jax.data.chat import Chat
from sdpo_jax.errors import TaskError
from sdpo_jax.records import Completion, Feedback, Rollout, Sampling, Status, Task
from sdpo_jax.text import MAX_CHARS, clean, cut


def prompt_seed(seed: int, *path) -> int:
  """A seed per prompt that depends on the run's seed and the path (step, task id) alone; uint32."""
  return zlib.crc32(repr((seed, *path)).encode())


class Collector:
  """Samples and judges. One per run; `close` ends its threads."""

  def __init__(
    self,
    env,
    chat: Chat,
    engine,
    *,
    max_prompt_tokens: int,
    judge_threads: int,
    judge_timeout_s: float,
  ):
    self.env, self.chat, self.engine = env, chat, engine
    self.max_prompt_tokens, self.judge_timeout_s = max_prompt_tokens, judge_timeout_s
    self._judge_threads, self._waiting, self._alive = judge_threads, queue.SimpleQueue(), 0

  def close(self) -> None:
    """Ends the threads that wait; one that hangs in a judge is a daemon and ends with the process."""
    for _ in range(self._alive):
      self._waiting.put(None)
    self._alive = 0

  def _submit(self, *job) -> concurrent.futures.Future:
    while self._alive < self._judge_threads:
      threading.Thread(target=self._work, name="judge", daemon=True).start()
      self._alive += 1
    future = concurrent.futures.Future()
    self._waiting.put((future, job))
    return future

  def _work(self) -> None:
    while (item := self._waiting.get()) is not None:
      future, job = item
      if future.set_running_or_notify_cancel():
        future.set_result(self._judge(*job))

  def _judge(self, task: Task, text: str, completion: Completion) -> Feedback:
    try:
      feedback = self.env.judge(task, text)
      if not (
        isinstance(feedback.reward, numbers.Real)
        and 0.0 <= feedback.reward <= 1.0
        and isinstance(feedback.text, str)
      ):
        raise ValueError(
          f"the judge returned reward {feedback.reward!r} and text {type(feedback.text).__name__}, not a number in [0, 1] and a str"
        )
    except Exception as error:  # whatever a judge throws, the run goes on without this row
      logging.exception("judging a response to %s failed", task.id)
      return Feedback(0.0, f"{type(error).__name__}: {error}", Status.ENV_FAILED)
    feedback = dataclasses.replace(
      feedback,
      reward=float(feedback.reward),
      text=cut(clean(feedback.text), MAX_CHARS),
    )
    if (
      completion.finish_reason == "length"
      and feedback.text
      and feedback.status is not Status.ENV_FAILED
    ):
      said = f"The response was too long: it was cut off after {len(completion.tokens)} tokens.\n{feedback.text}"
      return dataclasses.replace(feedback, text=said)
    return feedback

  def collect(
    self,
    params,
    tasks: list[Task],
    *,
    n: int,
    sampling: Sampling,
    seeds: list[int],
    begun: list[tuple[list[int], list[float]]] | None = None,
  ) -> list[list[Rollout]]:
    """n judged rollouts of each task, as groups[q][g]. begun[q]: tokens, and their log-probabilities, with which all responses to task q begin."""
    prompts = [self.chat.prompt_tokens(self.env.prompt(task)) for task in tasks]
    for task, prompt in zip(tasks, prompts):
      if len(prompt) > self.max_prompt_tokens:
        raise TaskError(
          f"the prompt of task {task.id} takes {len(prompt)} tokens, more than config.data.max_prompt_tokens={self.max_prompt_tokens}"
        )
    pending: dict[tuple[int, int], tuple[Completion, str, concurrent.futures.Future | None]] = {}
    begun = begun or [([], [])] * len(tasks)
    for c in self.engine.generate(
      params,
      [prompt + head for prompt, (head, _) in zip(prompts, begun)],
      n=n,
      sampling=sampling,
      seeds=seeds,
    ):
      head, logp = begun[c.prompt_index]
      c = c._replace(tokens=head + c.tokens, logp=logp + c.logp)
      text = self.chat.response_text(c.tokens)
      # every process samples all, judges its share
      mine = (c.prompt_index * n + c.sample_index) % jax.process_count() == jax.process_index()
      future = self._submit(tasks[c.prompt_index], text, c) if mine else None
      pending[c.prompt_index, c.sample_index] = (c, text, future)
    said = {}
    for (q, g), (_, _, future) in pending.items():
      if future is None:
        continue
      try:
        said[q, g] = future.result(timeout=self.judge_timeout_s)
      except concurrent.futures.TimeoutError:
        logging.error(
          "judging a response to %s took more than %g s", tasks[q].id, self.judge_timeout_s
        )
        if not future.cancel():  # a thread hangs in it: another takes its place
          self._alive -= 1
        said[q, g] = Feedback(0.0, "the judge did not answer in time", Status.ENV_FAILED)
    for told in hosts.share(
      [[q, g, f.reward, f.text, f.status.value] for (q, g), f in said.items()]
    ):
      said |= {
        (q, g): Feedback(reward, text, Status(status)) for q, g, reward, text, status in told
      }

    def rollout(q: int, g: int) -> Rollout:
      completion, text, _ = pending[q, g]
      return Rollout(
        tasks[q],
        prompts[q],
        completion.tokens,
        completion.logp,
        completion.finish_reason,
        text,
        said[q, g],
      )

    return [[rollout(q, g) for g in range(n)] for q in range(len(tasks))]
