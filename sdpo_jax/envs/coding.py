"""Judges code problems: the response's program runs in the sandbox against tests.

The feedback is what an online judge says. Reward is 1 where all tests pass, else 0.

A task's `data`:
  tests     list of dictionaries with the fields of `sandbox.TestCase`
  fn_name   the function, or method of class Solution, that the tests call; absent or None: a
            program that reads standard input and writes standard output
  starter   code that the question gives to begin with, if any
`coding_rows.py` makes such tasks from the rows of public data sets.

The program of a response is its last fenced Python block, else its last unlabelled one.
A response has the wrong form if it ends inside its thinking or its code block, or has no block.
It then gets reward 0 and a feedback that says so.

`sandbox/compare.py` has the rules of comparison. Where several answers are right, a test has a
tolerance or a check, a program that judges: `coding_rows.py` says how a row states that. The
solution of a row with a check must pass it, or the row is refused.

Before a program starts it gets what LiveCodeBench's grader gives: the names of its imports, 50,000
for the recursion limit and for the digits of an integer. The graders of HumanEval and MBPP give
none of this, so a solution that forgot an import passes here and fails there.
"""

import dataclasses
import datetime
import re

from sdpo_jax.envs import coding_rows
from sdpo_jax.envs.rows import final_text
from sdpo_jax.records import Feedback, Status, Task
from sdpo_jax.sandbox import Limits, Sandbox, TestCase, Verdict
from sdpo_jax.text import cut

STDIN_FORM = (
  "Write a Python program that reads the input from standard input and writes the answer to "
  "standard output. Answer with the whole program in one code block that begins with ```python "
  "and ends with ```."
)
FUNCTION_FORM = (
  "Write the Python function `{name}`; it is called with the arguments of each test. "
  "Answer with the whole code in one code block that begins with ```python and ends with ```."
)
_STATUS = {"sandbox_failed": Status.ENV_FAILED, "time_limit": Status.TIMEOUT}  # else SCORED
_PYTHON_LABELS = {"python", "python3", "py", "py3"}
# A line that opens or closes a block: indentation, backticks or tildes, the label.
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*$")


class Coding:
  """Judges programs. It is as thread-safe as its sandbox.

  reveal_hidden
      shows inputs and expected outputs of hidden tests as well, as the SDPO release does
  first_date, last_date
      dates of LiveCodeBench's questions, both inclusive, as "2025-02-01"; a question outside
      them is not part of the set
  """

  def __init__(
    self,
    *,
    sandbox: Sandbox,
    time_s: float = 6.0,
    memory_mb: int = 1024,
    output_kb: int = 4096,
    max_failures: int = 2,
    reveal_hidden: bool = False,
    first_date: str = "0001-01-01",
    last_date: str = "9999-12-31",
  ):
    self.sandbox = sandbox
    self.limits = Limits(time_s=time_s, memory_mb=memory_mb, output_kb=output_kb)
    self.max_failures = max_failures
    self.reveal_hidden = reveal_hidden
    self.first_date = datetime.date.fromisoformat(first_date)
    self.last_date = datetime.date.fromisoformat(last_date)

  def task_from_row(self, row: dict, split: str) -> Task | None:
    """Reads a row of any set that `coding_rows` knows. None: outside the window of dates."""
    if coding_rows.is_livecodebench(row):
      date = datetime.date.fromisoformat(str(row["contest_date"])[:10])
      if not self.first_date <= date <= self.last_date:
        return None
    task = coding_rows.task_from_row(row, split)
    if task.solution and any(test.get("check") for test in task.data["tests"]):
      self._require_solved(task)
    return task

  def _require_solved(self, task: Task) -> None:
    """Raises ValueError if the task's own solution does not pass its check.

    A check may be wrong in ways that only a run shows.
    """
    program, fault = extract(task.solution)
    verdict = self._run(task, task.solution if fault else program)
    if not verdict.passed:
      raise ValueError(
        f"{task.id}: its own solution does not pass its check: {cut(verdict.feedback, 500)}"
      )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the question, says which form the answer must have, and gives the starting code."""
    starter = task.data.get("starter")
    paragraphs = [task.prompt.strip(), form(task)]
    if starter and starter.strip():
      paragraphs.append(f"Begin with this code:\n```python\n{starter.rstrip()}\n```")
    system = [{"role": "system", "content": task.system}] if task.system else []
    return system + [{"role": "user", "content": "\n\n".join(paragraphs)}]

  def judge(self, task: Task, response: str) -> Feedback:
    """Runs the response's program against the task's tests."""
    program, fault = extract(response)
    if fault:
      return Feedback(0.0, f"{fault} {form(task)}")
    verdict = self._run(task, program)
    status = _STATUS.get(verdict.kind, Status.SCORED)
    return Feedback(float(verdict.passed), verdict.feedback, status)

  def _run(self, task: Task, program: str) -> Verdict:
    tests = [TestCase(**test) for test in task.data["tests"]]
    if self.reveal_hidden:
      tests = [dataclasses.replace(test, hidden=False) for test in tests]
    return self.sandbox.run(
      program, tests, task.data.get("fn_name"), self.limits, max_failures=self.max_failures
    )


def form(task: Task) -> str:
  """Returns the sentence that says which form a response must have."""
  name = task.data.get("fn_name")
  return FUNCTION_FORM.format(name=name) if name else STDIN_FORM


def extract(response: str) -> tuple[str, str]:
  """Returns the program and what is wrong with the response's form; one of the two is ""."""
  text, fault = final_text(response)
  if fault:
    return "", fault
  blocks = _fenced_blocks(text)
  python = [block for block in blocks if block.label in _PYTHON_LABELS]
  candidates = python or [block for block in blocks if not block.label]
  if not candidates:
    return "", "The response holds no Python code block."
  last = candidates[-1]
  if not last.is_closed:
    return "", "The response ends inside its code block."
  return "\n".join(last.lines) + "\n", ""


@dataclasses.dataclass
class _Block:
  """Holds a fenced block: the parts of its opening line, the label in small letters, its text."""

  indent: str
  mark: str
  label: str
  lines: list[str] = dataclasses.field(default_factory=list)
  is_closed: bool = False

  def is_closed_by(self, fence: re.Match) -> bool:
    """Tells whether a fence closes this block.

    It needs the opening's character, at least its length, no label and no deeper indentation.
    So a docstring inside the block may hold an indented fence.
    """
    indent, mark, label = fence.groups()
    has_same_mark = mark[0] == self.mark[0] and len(mark) >= len(self.mark)
    return has_same_mark and not label and len(indent) <= len(self.indent)


def _fenced_blocks(text: str) -> list[_Block]:
  """Returns the blocks of a Markdown text; the last one may not be closed.

  A Python label opens a block even inside one of another label, whose beginning is then dropped:
  the response may be a Markdown document that holds the program.
  """
  blocks = []
  block = None  # the one that the current line is inside
  for line in text.split("\n"):
    fence = _FENCE.match(line.rstrip("\r"))
    if fence and block is not None and block.is_closed_by(fence):
      block.is_closed = True
      blocks.append(block)
      block = None
    elif fence and _opens_block(fence, block):
      indent, mark, label = fence.groups()
      block = _Block(indent, mark, label.lower())
    elif block is not None:
      block.lines.append(line.removeprefix(block.indent))
  if block is not None:
    blocks.append(block)
  return blocks


def _opens_block(fence: re.Match, block: _Block | None) -> bool:
  """Tells whether a fence opens a block where `block` is open, or none."""
  if block is None:
    return True
  return fence[3].lower() in _PYTHON_LABELS and block.label not in _PYTHON_LABELS
