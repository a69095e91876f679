r"""Mathematics: the final answer stands in the last \boxed{...}, or after #### as in GSM8K where nothing is boxed.

Rows: GSM8K's (`question`; `answer` is a derivation that ends in "#### 18"), MATH's (`problem`, `solution` with a box), and any row
with `prompt`, `question` or `problem` and an `answer`. The instruction to box the answer is added unless the question speaks of boxes.

Plain numbers are compared exactly, here; everything else by math-verify in a worker process that is killed when it takes longer than
`time_s` or more than `memory_mb` (then the answer counts as wrong, with Status.TIMEOUT: a right answer is not that hard to compare).
Reward is 1 for an equal answer, else 0. Feedback speaks of the form; that an answer is wrong is only said with `tell_correctness`, and what the
right one is, never.
"""

import fractions
import json
import os
import queue
import re
import select
import subprocess
import sys
import time

from sdpo_jax.envs import math_worker
from sdpo_jax.envs.rows import field, final_text, messages, task_id
from sdpo_jax.records import Feedback, Status, Task

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
FORM = "Put the final answer within \\boxed{}."
MAX_ANSWER = 1000  # characters
START_S = 120.0  # importing sympy on a busy machine, before anything is judged
# the same while a judge waits for it: with the comparison, less than config.rollout.judge_timeout_s
RESTART_S = 40.0
_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?")
_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator annotations


class MathQA:
  """Judges final answers. Thread-safe; start() starts the workers, else the first judges do; close() ends them. tell_correctness: say that a wrong answer is wrong."""

  def __init__(
    self,
    *,
    tell_correctness: bool = False,
    time_s: float = 5.0,
    memory_mb: int = 2048,
    workers: int = 2,
  ):
    if workers < 1 or time_s <= 0:
      raise ValueError(
        f"config.env.workers={workers} must be at least 1 and config.env.time_s={time_s} above 0"
      )
    self.tell_correctness, self.time_s, self.memory_mb = tell_correctness, time_s, memory_mb
    self._places = queue.SimpleQueue()  # of a worker, or None where one has yet to be started
    self._workers = workers
    for _ in range(workers):
      self._places.put(None)

  def start(self) -> None:
    """Starts all workers at once and waits for them. RuntimeError if one does not start."""
    workers = [Worker(self.memory_mb, self.time_s) for _ in range(self._workers)]
    try:
      for worker in workers:
        worker.wait(START_S)
    except RuntimeError:
      for worker in workers:
        worker.kill()
      raise
    for worker in workers:
      self._places.get()
      self._places.put(worker)

  def close(self) -> None:
    for _ in range(self._workers):
      worker = self._places.get()
      if worker is not None:
        worker.kill()
      self._places.put(None)

  def task_from_row(self, row: dict, split: str) -> Task:
    name = next((name for name in ("prompt", "question", "problem") if name in row), "prompt")
    question, solution = field(row, name).strip(), row.get("solution")
    answer = str(
      field(row, "answer", (str, int, float)) if "answer" in row else field(row, "solution")
    )
    if "####" in answer:
      derivation, _, answer = answer.rpartition("####")
      solution = (
        f"{_CALCULATION.sub('', derivation).strip()}\nThe answer is \\boxed{{{answer.strip()}}}."
      )
    elif "\\boxed" in answer:
      answer, fault = last_boxed(answer)
      if fault:
        raise ValueError(f"field {'answer' if 'answer' in row else 'solution'!r}: {fault}")
    answer = answer.strip()
    if not answer or len(answer) > MAX_ANSWER:
      raise ValueError(
        f"field 'answer' holds {len(answer)} characters; it must hold 1 to {MAX_ANSWER}"
      )
    return Task(
      id=task_id(row, split, "math"),
      prompt=question + ("" if "boxed" in question else INSTRUCTION),
      system=row.get("system"),
      split=split,
      solution=solution or f"\\boxed{{{answer}}}",
      data={"answer": answer},
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    return messages(task)

  def judge(self, task: Task, response: str) -> Feedback:
    answer, fault = extract(response)
    if fault:
      return Feedback(0.0, f"{fault} {FORM}")
    same = self.same(task.data["answer"], answer)
    if same is None:
      return Feedback(
        0.0,
        f"The final answer is too complicated to be checked in {self.time_s:g} s and {self.memory_mb} MB. Simplify it.",
        Status.TIMEOUT,
      )
    return Feedback(
      float(same),
      "" if same or not self.tell_correctness else f"The final answer {answer} is not correct.",
    )

  def same(self, reference: str, answer: str) -> bool | None:
    """Whether two answers are equal; None if a worker could not tell within its limits. RuntimeError if workers do not start."""
    if " ".join(reference.split()) == " ".join(answer.split()):
      return True
    numbers = number(reference), number(answer)
    if None not in numbers:
      return numbers[0] == numbers[1]
    worker = self._places.get()
    try:
      if worker is None:
        started = Worker(self.memory_mb, self.time_s)
        started.wait(RESTART_S)
        worker = started
      verdict = worker.ask(reference, answer, self.time_s)
      if verdict is None:
        worker = None
      return verdict
    finally:
      self._places.put(worker)


class Worker:
  """One comparing process; of use once `wait` has returned, and until it has once not answered."""

  def __init__(self, memory_mb: int, time_s: float):
    self._command = [sys.executable, "-P", math_worker.__file__, str(memory_mb), str(time_s)]
    self._process = subprocess.Popen(
      self._command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      bufsize=0,
    )

  def wait(self, within_s: float) -> None:
    if self._line(within_s) != b"ready":
      self.kill()
      raise RuntimeError(
        f"the process that runs math-verify did not start within {within_s:g} s: try {' '.join(self._command)}"
      )

  def ask(self, reference: str, answer: str, time_s: float) -> bool | None:
    try:
      self._process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
      line = self._line(time_s)
    except BrokenPipeError:
      line = None
    if line is None:
      self.kill()
      return None
    return json.loads(line)

  def _line(self, time_s: float) -> bytes | None:
    """One line of its output, without the newline; None if it ends, or does not come in time."""
    deadline, text = time.monotonic() + time_s, b""
    poll = select.poll()  # select takes no descriptor above 1023
    poll.register(self._process.stdout, select.POLLIN)
    while not text.endswith(b"\n"):
      readable = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
      piece = os.read(self._process.stdout.fileno(), 4096) if readable else b""
      if not piece:
        return None
      text += piece
    return text.strip()

  def kill(self) -> None:
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()


def number(text: str) -> fractions.Fraction | None:
  r"""A plain number, with or without a dollar sign and commas between thousands; None for everything else."""
  text = (
    text.strip()
    .strip("$")
    .replace("\\$", "")
    .replace("\\,", "")
    .replace("{,}", ",")
    .replace("\\!", "")
    .strip()
    .removeprefix("$")
    .strip()
  )
  if (
    len(text) > 60
    or not any(c.isdecimal() for c in text)
    or not text.isascii()
    or not _NUMBER.fullmatch(text)
  ):
    return None
  return fractions.Fraction(text.replace(",", "").rstrip("."))


def last_boxed(text: str) -> tuple[str, str]:
  r"""-> what the last \boxed{...} holds, braces matched, and what is wrong ("" if nothing)."""
  start = text.rfind("\\boxed{")
  if start < 0:
    return "", "The response has no \\boxed{}."
  begin, depth = start + len("\\boxed{"), 1
  for end in range(begin, len(text)):
    if text[end] in "{}" and text[end - 1] != "\\":
      depth += 1 if text[end] == "{" else -1
      if not depth:
        content = text[begin:end].strip()
        return content, "" if content else "The last \\boxed{} is empty."
  return "", "The response ends inside \\boxed{: a brace is not closed."


def extract(response: str) -> tuple[str, str]:
  """-> the final answer, and what is wrong with the response's form ("" if nothing)."""
  text, fault = final_text(response)
  if fault:
    return "", fault
  if "\\boxed{" not in text and "####" in text:
    answer = text.rpartition("####")[2].strip().split("\n")[0].strip()
    fault = "" if answer else "Nothing stands after ####."
  else:
    answer, fault = last_boxed(text)
  if len(answer) > MAX_ANSWER:
    return "", f"The final answer has {len(answer)} characters, more than {MAX_ANSWER}."
  return answer, fault
