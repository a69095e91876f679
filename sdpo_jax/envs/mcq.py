"""Multiple choice: the response ends with the letter of one option between <answer> and </answer>.

Rows: the SDPO paper's (SciKnowEval; `prompt`, `system`, `answer` are used as they are), GPQA's (`Question`, `Correct Answer`,
`Incorrect Answer 1` to `3`; the order of the options depends on the record alone) and MMLU-Pro's (`question`, `options`, `answer`).
The last two are asked in the same form as the first.

Reward is 1 for the right letter and nothing else in the last answer, else 0. A response of the wrong form is told so. That a letter is
wrong is only said with `tell_correctness`: the paper trains these tasks without feedback.
"""

import random
import re

from sdpo_jax.envs.rows import field, final_text, messages, task_id
from sdpo_jax.records import Feedback, Task

LETTERS = "ABCDEFGHIJ"
NUMBERS = {
  2: "two",
  3: "three",
  4: "four",
  5: "five",
  6: "six",
  7: "seven",
  8: "eight",
  9: "nine",
  10: "ten",
}
SYSTEM = """
Given a question and {number} options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option ({letters}), and nothing else. Do not restate the answer text. \
For example, if the answer is "A", just output:
<answer>
A
</answer>
"""
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_OPTION = re.compile(r"^([A-J]):", re.MULTILINE)


class MCQ:
  """Judges letters. tell_correctness: say that a wrong letter is wrong (never which one is right)."""

  def __init__(self, *, tell_correctness: bool = False):
    self.tell_correctness = tell_correctness

  def task_from_row(self, row: dict, split: str) -> Task:
    if "options" in row:
      return _mmlu_pro(row, split)
    if "Correct Answer" in row:
      return _gpqa(row, split)
    prompt, answer = field(row, "prompt"), field(row, "answer").strip()
    if row.get("kind", "mcq") != "mcq":
      raise ValueError(f"field 'kind' is {row['kind']!r}, not 'mcq'")
    return _task(
      task_id(row, split, "mcq"), split, prompt, row.get("system"), answer, _letters(prompt)
    )

  def prompt(self, task: Task) -> list[dict[str, str]]:
    return messages(task)

  def judge(self, task: Task, response: str) -> Feedback:
    letters = task.data["letters"]
    given, fault = extract(response, letters)
    if fault:
      return Feedback(
        0.0,
        f"{fault} Give the letter of one option ({', '.join(letters)}) and nothing else between <answer> and </answer>.",
      )
    if given == task.data["answer"]:
      return Feedback(1.0, "")
    return Feedback(0.0, f"The answer {given} is not correct." if self.tell_correctness else "")


def extract(response: str, letters: str) -> tuple[str, str]:
  """-> the letter of the last answer, and what is wrong with the response's form ("" if nothing)."""
  text, fault = final_text(response)
  if fault:
    return "", fault
  found = _ANSWER.findall(text)
  if not found or "<answer>" in text.rpartition("</answer>")[2]:
    return (
      "",
      "The last <answer> of the response is not closed."
      if "<answer>" in text
      else "The response has no <answer> ... </answer>.",
    )
  given = found[-1].strip()
  if len(given) != 1 or given not in letters:
    return (
      "",
      f"The answer {given[:40]!r} is not the letter of an option."
      if given
      else "The answer is empty.",
    )
  return given, ""


def _letters(prompt: str) -> str:
  """The options' letters: the last list of lines that begin with A:, B: and so on."""
  letters = ""
  for letter in _OPTION.findall(prompt):
    if letter == "A":
      letters = "A"
    elif letters and letter == LETTERS[len(letters) % len(LETTERS)]:
      letters += letter
  if len(letters) < 2:
    raise ValueError("field 'prompt' has no options: lines that begin with 'A: ', 'B: ' and so on")
  return letters


def _task(name, split, prompt, system, answer, letters) -> Task:
  if len(answer) != 1 or answer not in letters:
    raise ValueError(f"field 'answer' is {answer!r}, not one of {', '.join(letters)}")
  return Task(
    id=name,
    prompt=prompt,
    system=system,
    solution=f"<answer>\n{answer}\n</answer>",
    split=split,
    data={"answer": answer, "letters": letters},
  )


def _question(name, split, question, options, answer) -> Task:
  letters = LETTERS[: len(options)]
  lines = "".join(f"{letter}: {option}\n" for letter, option in zip(letters, options))
  system = SYSTEM.format(
    number=NUMBERS[len(options)],
    letters=", ".join(letters[:-1]) + (", or " if len(letters) > 2 else " or ") + letters[-1],
  )
  return _task(
    name,
    split,
    f"{question.strip()}\n\n{lines}Please reason step by step.",
    system,
    answer,
    letters,
  )


def _mmlu_pro(row: dict, split: str) -> Task:
  options, answer = list(field(row, "options", (list, tuple))), field(row, "answer").strip()
  if not 2 <= len(options) <= len(LETTERS) or not all(isinstance(o, str) for o in options):
    raise ValueError(f"field 'options' must hold 2 to {len(LETTERS)} texts, not {len(options)}")
  index = row.get("answer_index")
  if index is not None and LETTERS[index : index + 1] != answer:
    raise ValueError(f"field 'answer_index' is {index}, but field 'answer' is {answer!r}")
  return _question(
    f"mmlu_pro/{split}/{row.get('question_id', row['idx'])}",
    split,
    field(row, "question"),
    options,
    answer,
  )


def _gpqa(row: dict, split: str) -> Task:
  right = field(row, "Correct Answer").strip()
  options = [right] + [field(row, f"Incorrect Answer {i}").strip() for i in (1, 2, 3)]
  name = row.get("Record ID", row["idx"])
  order = list(range(4))
  # two options may have the same text, so places are shuffled
  random.Random(f"gpqa/{name}").shuffle(order)
  return _question(
    f"gpqa/{split}/{name}",
    split,
    field(row, "Question"),
    [options[i] for i in order],
    LETTERS[order.index(0)],
  )
