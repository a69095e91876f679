r"""Judges mathematics: the final answer stands in the last \boxed{...}.

Where nothing is boxed it stands after ####, as in GSM8K.

Three kinds of rows become tasks:
  GSM8K's   `question`; `answer` is a derivation that ends in "#### 18"
  MATH's    `problem`, and a `solution` with a box
  others    `prompt`, `question` or `problem`, and an `answer`
The instruction to box the answer is added unless the question speaks of boxes.

A box is \boxed{5}, \boxed {5}, \boxed 5, \fbox{5} or \framebox{5}. A row whose answer is missing,
NaN or infinite, or whose solution has neither a box nor ####, is a bad row.

Numbers, quantities and words are compared here, as `quantities.py` says. math-verify compares
everything else, in a worker process, which is killed when it takes longer than `time_s` or more
than `memory_mb`. The answer then counts as wrong, with Status.TIMEOUT: a right answer is not that
hard to compare.

Reward is 1 for an equal answer, else 0. Feedback speaks of the form. It says that an answer is
wrong with `tell_correctness` alone, and never which one is right.
"""

import json
import math
import queue
import re
import sys

from sdpo_jax.envs import math_worker, quantities
from sdpo_jax.envs.child_process import ChildLost, ChildProcess
from sdpo_jax.envs.math_text import has_box, last_boxed
from sdpo_jax.envs.numerals import number
from sdpo_jax.envs.rows import field, final_text, given, groups, messages, optional_text, task_id
from sdpo_jax.records import Feedback, Status, Task

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
FORM = "Put the final answer within \\boxed{}."
MAX_ANSWER = 1000  # characters
# Seconds for a worker to import sympy on a busy machine, before anything is judged.
START_S = 120.0
# The same while a judge waits for it. With the comparison it must stay below
# config.rollout.judge_timeout_s.
RESTART_S = 40.0
# How tables write that a value is missing.
_MISSING = ("nan", "null", "<na>", "n/a")
# Dollars, braces and commands around nothing, and a sentence's end.
_BLANK = re.compile(r"(?:\\(?:text|mathrm|mbox)\b|[\s$.{}\\])*")
_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator annotations


class MathQA:
  """Judges final answers. It is thread-safe.

  `open` starts the workers, else the first judges do; `close` ends them.

  tell_correctness
      says that a wrong answer is wrong
  """

  def __init__(
    self,
    *,
    tell_correctness: bool = False,
    time_s: float = 5.0,
    memory_mb: int = 2048,
    workers: int = 2,
  ):
    if workers < 1 or not 0 < time_s < math.inf or memory_mb < 1:
      raise ValueError(
        f"config.env.workers={workers} and config.env.memory_mb={memory_mb} must be at least 1 "
        f"and config.env.time_s={time_s} must be finite and above 0"
      )
    self.tell_correctness = tell_correctness
    self.time_s = time_s
    self.memory_mb = memory_mb
    self._worker_count = workers
    # Holds each worker that nobody uses, and None for each that has yet to be started.
    self._idle_workers = queue.SimpleQueue()
    for _ in range(workers):
      self._idle_workers.put(None)

  def open(self) -> None:
    """Starts all workers at once and waits for them. RuntimeError if one does not start."""
    workers = [Worker(self.memory_mb, self.time_s) for _ in range(self._worker_count)]
    try:
      for worker in workers:
        worker.wait(START_S)
    except RuntimeError:
      for worker in workers:
        worker.kill()
      raise
    for worker in workers:
      self._idle_workers.get()
      self._idle_workers.put(worker)

  def close(self) -> None:
    """Ends all workers, once nobody uses them."""
    for _ in range(self._worker_count):
      worker = self._idle_workers.get()
      if worker is not None:
        worker.kill()
      self._idle_workers.put(None)

  def task_from_row(self, row: dict, split: str) -> Task:
    """Reads a row of any of the three kinds. ValueError that names the field."""
    name = next((name for name in ("prompt", "question", "problem") if name in row), "prompt")
    question = field(row, name).strip()
    answer, solution = _reference(row)
    return Task(
      id=task_id(row, split, "math"),
      prompt=question if "boxed" in question else question + INSTRUCTION,
      system=optional_text(row, "system"),
      split=split,
      solution=solution or f"\\boxed{{{answer}}}",
      # MATH's names
      data={"answer": answer} | groups(row, kind="type", difficulty="level"),
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the question; the instruction to box the answer is already in the task."""
    return messages(task)

  def answer(self, task: Task, response: str) -> str | None:
    """Returns the final answer as it is written."""
    answer, fault = extract(response)
    return None if fault else answer

  def judge(self, task: Task, response: str) -> Feedback:
    """Compares the final answer with the reference."""
    answer, fault = extract(response)
    if fault:
      return Feedback(0.0, f"{fault} {FORM}")
    are_equal = self.same(task.data["answer"], answer)
    if are_equal is None:
      return Feedback(
        0.0,
        "The final answer is too complicated to be checked in "
        f"{self.time_s:g} s and {self.memory_mb} MB. Simplify it.",
        Status.TIMEOUT,
      )
    if are_equal or not self.tell_correctness:
      return Feedback(float(are_equal), "")
    return Feedback(0.0, f"The final answer {answer} is not correct.")

  def same(self, reference: str, answer: str) -> bool | None:
    """Tells whether two answers are equal; None if a worker exceeded its limits.

    RuntimeError if a worker does not start.
    """
    if " ".join(reference.split()) == " ".join(answer.split()):
      return True
    numbers = (number(reference), number(answer))
    if None not in numbers:
      return numbers[0] == numbers[1]
    pairs = quantities.compare(reference, answer)
    if isinstance(pairs, bool):
      return pairs
    for pair in pairs:
      are_equal = self._ask(*pair)
      if not are_equal:
        return are_equal
    return True

  def _ask(self, reference: str, answer: str) -> bool | None:
    """Has a worker compare mathematics; None if it exceeded its limits."""
    worker = self._idle_workers.get()
    try:
      if worker is None:
        started = Worker(self.memory_mb, self.time_s)
        started.wait(RESTART_S)
        worker = started
      are_equal = worker.ask(reference, answer, self.time_s)
      if are_equal is None:
        worker = None
      return are_equal
    finally:
      # Gives the place back even where no worker has started.
      self._idle_workers.put(worker)


def _reference(row: dict) -> tuple[str, str | None]:
  """Returns the final answer of a row, and its solution if it has one.

  ValueError for a row without an answer: one that is empty or no number, or a solution that says
  nowhere which answer is the final one.
  """
  solution = optional_text(row, "solution")
  # Tables that are read together have a column for every field, empty where a row lacks it.
  if given(row, "answer") is None and ("answer" not in row or solution is not None):
    name, answer = "solution", field(row, "solution")
  else:
    name, answer = "answer", _text(field(row, "answer", (str, int, float)), "answer")
  if "####" in answer:
    derivation, _, answer = answer.rpartition("####")
    derivation = _CALCULATION.sub("", derivation).strip()
    solution = f"{derivation}\nThe answer is \\boxed{{{answer.strip()}}}."
  elif has_box(answer):
    answer, fault = last_boxed(answer)
    if fault:
      raise ValueError(f"field {name!r}: {fault.replace('The response', 'It')}")
  elif name == "solution":
    raise ValueError("field 'solution' has no \\boxed{} and no ####: its final answer is unknown")
  answer = answer.strip()
  if not answer or len(answer) > MAX_ANSWER:
    raise ValueError(
      f"field {name!r} holds {len(answer)} characters; it must hold 1 to {MAX_ANSWER}"
    )
  is_blank = _BLANK.fullmatch(answer) and "\\{" not in answer  # a set may be empty
  if is_blank or answer.strip("$ ").lower() in _MISSING:
    raise ValueError(f"field {name!r} is {answer!r}, which is no answer")
  return answer, solution


def _text(answer: str | int | float, name: str) -> str:
  """Returns an answer as text: a float in full, without the noise in its last digits."""
  if isinstance(answer, str):
    return answer
  if isinstance(answer, float) and not math.isfinite(answer):
    raise ValueError(f"field {name!r} is {answer}, which is no answer")
  if isinstance(answer, float) and not answer.is_integer():
    # 0.1 + 0.2 is stored as 0.30000000000000004; 15 digits are what a float holds for certain.
    return format(answer, ".15g")
  if abs(answer) >= 10**MAX_ANSWER:  # Python writes no number of thousands of digits.
    raise ValueError(f"field {name!r} has more than {MAX_ANSWER} digits")
  return str(int(answer))


class Worker:
  """Runs a process that compares answers.

  It is of use once `wait` has returned, and until `ask` has once returned None.
  """

  def __init__(self, memory_mb: int, time_s: float):
    self._command = [sys.executable, "-P", math_worker.__file__, str(memory_mb), str(time_s)]
    self._process = ChildProcess(self._command)

  def wait(self, within_s: float) -> None:
    """Waits until the process can compare. RuntimeError, and its end, if it does not start."""
    try:
      is_ready = self._process.read(within_s) == b"ready"
    except ChildLost:
      is_ready = False
    if not is_ready:
      self.kill()
      raise RuntimeError(
        f"the process that runs math-verify did not start within {within_s:g} s: "
        f"try {' '.join(self._command)}"
      )

  def ask(self, reference: str, answer: str, time_s: float) -> bool | None:
    """Tells whether two answers are equal; None, and its end, if it does not reply in time."""
    try:
      line = self._process.ask(json.dumps([reference, answer]).encode(), time_s)
    except ChildLost:
      self.kill()
      return None
    return json.loads(line)

  def kill(self) -> None:
    """Ends the process."""
    self._process.close()


def extract(response: str) -> tuple[str, str]:
  """Returns the final answer, and what is wrong with the response's form ("" if nothing)."""
  text, fault = final_text(response)
  if fault:
    return "", fault
  if not has_box(text) and "####" in text:
    first_line = text.rpartition("####")[2].strip().split("\n")[0]
    answer = first_line.strip()
    fault = "" if answer else "Nothing stands after ####."
  else:
    answer, fault = last_boxed(text)
  if len(answer) > MAX_ANSWER:
    return "", f"The final answer has {len(answer)} characters, more than {MAX_ANSWER}."
  return answer, fault
