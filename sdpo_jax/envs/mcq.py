"""Judges multiple choice: the response ends with one option's letter between <answer> tags.

Three kinds of rows become tasks:
  the SDPO paper's (SciKnowEval)   `prompt`, `system` and `answer` are used as they are
  GPQA's                           `Question`, `Correct Answer`, `Incorrect Answer 1` to `3`; the
                                   order of the options depends on the record alone
  MMLU-Pro's                       `question`, `options`, `answer_index` (from 0) or `answer` (a
                                   letter); `category` is the kind of task
The last two are asked in the same form as the first.

Reward is 1 for the right letter and nothing else in the last answer, else 0. What counts as the
letter B is the setting `letters`:
  exact   B alone: the paper's rule, and what the system message asks for
  loose   B or b; also in a pair of round, square or curly brackets, or before a closing one; also
          with a full stop or a colon behind it; also in Markdown's stars; also in full width
The same rule reads the answer and the lines of options of the paper's rows: with `exact`, a row
whose answer is "(b)" or whose options begin with "B." is refused.

Feedback on a response of the wrong form says so. Feedback on a wrong letter is empty unless
`tell_correctness` is set: the paper trains these tasks without feedback.
"""

import random
import re
import unicodedata

from sdpo_jax.envs.rows import (
  field,
  final_text,
  given,
  groups,
  messages,
  optional_text,
  row_name,
  task_id,
  whole_number,
)
from sdpo_jax.errors import unknown
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
Given a question and {number} options, please select the right answer. \
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option ({letters}), \
and nothing else. Do not restate the answer text. \
For example, if the answer is "A", just output:
<answer>
A
</answer>
"""
FORM = "Give the letter of one option ({letters}) and nothing else between <answer> and </answer>."
# An answer holds no other opening tag.
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
# Rule: (how an answer writes a letter, how a line of options begins).
_LOOSE = r"\(([A-Ja-j])\)|\[([A-Ja-j])\]|\{([A-Ja-j])\}"
LETTER_RULES = {
  "exact": (re.compile(r"([A-J])"), re.compile(r"^([A-J]):", re.MULTILINE)),
  "loose": (
    re.compile(rf"(?:{_LOOSE}|([A-Ja-j])\)?)[.:]?"),
    # A letter alone begins a sentence, so a line needs a mark behind it.
    re.compile(rf"^(?:{_LOOSE}|([A-Ja-j])[.:)])", re.MULTILINE),
  ),
}


class MCQ:
  """Judges letters.

  tell_correctness
      says that a wrong letter is wrong, but never which one is right
  letters
      exact | loose: what counts as a letter
  """

  def __init__(self, *, tell_correctness: bool = False, letters: str = "exact"):
    if letters not in LETTER_RULES:
      raise ValueError(unknown("config.env.letters", letters, sorted(LETTER_RULES)))
    self.tell_correctness = tell_correctness
    self.letters = letters

  def task_from_row(self, row: dict, split: str) -> Task:
    """Reads a row of any of the three kinds. ValueError that names the field."""
    # A table that mixes the kinds has the fields of all of them, empty where they do not apply.
    if given(row, "options") is not None:
      return _mmlu_pro_task(row, split, self.letters)
    if given(row, "Correct Answer") is not None:
      return _gpqa_task(row, split)
    return _paper_task(row, split, self.letters)

  def prompt(self, task: Task) -> list[dict[str, str]]:
    """Asks the question; its form is already in the task."""
    return messages(task)

  def answer(self, task: Task, response: str) -> str | None:
    """Returns the letter of the last answer."""
    return extract(response, task.data["letters"], self.letters)[0] or None

  def judge(self, task: Task, response: str) -> Feedback:
    """Compares the letter of the last answer with the right one."""
    letters = task.data["letters"]
    letter, fault = extract(response, letters, self.letters)
    if fault:
      return Feedback(0.0, f"{fault} {FORM.format(letters=', '.join(letters))}")
    if letter == task.data["answer"]:
      return Feedback(1.0, "")
    return Feedback(0.0, f"The answer {letter} is not correct." if self.tell_correctness else "")


def extract(response: str, letters: str, rule: str = "exact") -> tuple[str, str]:
  """Returns the last answer's letter and what is wrong with the form; one of the two is ""."""
  text, fault = final_text(response)
  if fault:
    return "", fault
  if "<answer>" not in text:
    return "", "The response has no <answer> ... </answer>."
  answers = _ANSWER.findall(text)
  if not answers or "<answer>" in text.rpartition("</answer>")[2]:
    return "", "The last <answer> of the response is not closed."
  answer = answers[-1].strip()
  if not answer:
    return "", "The answer is empty."
  letter = read_letter(answer, rule)
  if not letter or letter not in letters:
    return "", f"The answer {answer[:40]!r} is not the letter of an option."
  return letter, ""


def read_letter(text: str, rule: str) -> str:
  """Returns the letter that a text consists of, as a capital; "" if it is no letter of LETTERS."""
  text = text.strip()
  if rule == "loose":
    text = unicodedata.normalize("NFKC", text).strip("*").strip()
  match = LETTER_RULES[rule][0].fullmatch(text)
  return match[match.lastindex].upper() if match else ""


def _paper_task(row: dict, split: str, rule: str) -> Task:
  prompt = field(row, "prompt")
  answer = field(row, "answer").strip()
  if optional_text(row, "kind") not in (None, "mcq"):
    raise ValueError(f"field 'kind' is {row['kind']!r}, not 'mcq'")
  return _task(
    task_id(row, split, "mcq"),
    split,
    prompt=prompt,
    system=optional_text(row, "system"),
    answer=read_letter(answer, rule) or answer,
    letters=_option_letters(prompt, rule),
  )


def _option_letters(prompt: str, rule: str) -> str:
  """Returns the options' letters: the last list of lines that begin with A:, B: and so on."""
  letters = ""
  for match in LETTER_RULES[rule][1].finditer(prompt):
    letter = match[match.lastindex].upper()
    if letter == "A":
      letters = "A"
    elif letters and letter == LETTERS[len(letters) % len(LETTERS)]:
      letters += letter
  if len(letters) < 2:
    raise ValueError("field 'prompt' has no options: lines that begin with 'A: ', 'B: ' and so on")
  return letters


def _mmlu_pro_task(row: dict, split: str, rule: str) -> Task:
  options = list(field(row, "options", (list, tuple)))
  are_texts = all(isinstance(option, str) and option.strip() for option in options)
  if not 2 <= len(options) <= len(LETTERS) or not are_texts:
    raise ValueError(f"field 'options' must hold 2 to {len(LETTERS)} texts, not {len(options)}")
  return _task_in_paper_form(
    f"mmlu_pro/{split}/{row_name(row, 'question_id')}",
    split,
    question=field(row, "question"),
    options=options,
    answer=_mmlu_pro_answer(row, len(options), rule),
    about=groups(row, kind="category"),
  )


def _mmlu_pro_answer(row: dict, count: int, rule: str) -> str:
  """Returns the letter that `answer_index` and `answer` name; a row may lack one of them."""
  index = given(row, "answer_index")
  if index is None:
    answer = field(row, "answer").strip()
    return read_letter(answer, rule) or answer
  place = whole_number(index)
  if place is None or not 0 <= place < count:
    raise ValueError(f"field 'answer_index' is {index!r}, not a number from 0 to {count - 1}")
  if given(row, "answer") is None:
    return LETTERS[place]
  answer = field(row, "answer").strip()
  if read_letter(answer, rule) != LETTERS[place]:
    raise ValueError(f"field 'answer_index' is {index!r}, but field 'answer' is {answer!r}")
  return LETTERS[place]


def _gpqa_task(row: dict, split: str) -> Task:
  options = [field(row, "Correct Answer").strip()]
  options += [field(row, f"Incorrect Answer {i}").strip() for i in (1, 2, 3)]
  name = row_name(row, "Record ID")
  # Two options may have the same text, so their places are shuffled.
  order = list(range(4))
  random.Random(f"gpqa/{name}").shuffle(order)
  return _task_in_paper_form(
    f"gpqa/{split}/{name}",
    split,
    question=field(row, "Question"),
    options=[options[i] for i in order],
    answer=LETTERS[order.index(0)],
    about=groups(row, kind="High-level domain", difficulty="Writer's Difficulty Estimate"),
  )


def _task_in_paper_form(name, split, *, question, options, answer, about) -> Task:
  """Asks a question with its options as the paper's rows do. about: more for `Task.data`."""
  letters = LETTERS[: len(options)]
  lines = [f"{letter}: {option}\n" for letter, option in zip(letters, options, strict=True)]
  last_comma = ", or " if len(letters) > 2 else " or "
  system = SYSTEM.format(
    number=NUMBERS[len(options)],
    letters=", ".join(letters[:-1]) + last_comma + letters[-1],
  )
  return _task(
    name,
    split,
    prompt=f"{question.strip()}\n\n{''.join(lines)}Please reason step by step.",
    system=system,
    answer=answer,
    letters=letters,
    about=about,
  )


def _task(name, split, *, prompt, system, answer, letters, about=()) -> Task:
  if len(answer) != 1 or answer not in letters:
    raise ValueError(f"field 'answer' is {answer!r}, not one of {', '.join(letters)}")
  return Task(
    id=name,
    prompt=prompt,
    system=system,
    solution=f"<answer>\n{answer}\n</answer>",
    split=split,
    data={"answer": answer, "letters": letters, **dict(about)},
  )
