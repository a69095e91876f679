"""Tells the thought of a response from its answer, in the forms of public models.

A model of the first form may begin in the middle of its thought, and its tags count wherever they
stand. Tags of another form count in a response that begins with one of them: elsewhere "[THINK]"
is a text like any other. Who writes the opening tag, model or template, makes no difference:
`data/chat.py` puts that of a template in front of the response.

Not among them are words without tags (Granite 3.2's "Here is my thought process:"), and
<reasoning>, which prompts of data sets ask for as a part of the answer.
"""

from typing import NamedTuple


class Form(NamedTuple):
  """The tags around a thought, and those around the answer behind it, if the form has any."""

  opening: str
  closing: str
  answer: tuple[str, str] | None = None


FORMS = (
  Form("<think>", "</think>"),  # Qwen3, DeepSeek-R1, GLM, Olmo, Granite 3.3, EXAONE 4 and others
  Form("<thinking>", "</thinking>"),
  Form("<thought>", "</thought>"),  # EXAONE Deep
  Form(
    "<|begin_of_thought|>",
    "<|end_of_thought|>",
    ("<|begin_of_solution|>", "<|end_of_solution|>"),  # Sky-T1, OpenThinker
  ),
  Form("[THINK]", "[/THINK]"),  # Magistral
  Form("<seed:think>", "</seed:think>"),  # Seed-OSS
  Form("<mm:think>", "</mm:think>"),  # MiniMax M3
  Form("◁think▷", "◁/think▷"),  # Kimi
  Form(
    "<|START_THINKING|>",
    "<|END_THINKING|>",
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),  # Command A Reasoning
  ),
  Form("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
  Form("<|channel>thought", "<channel|>"),  # Gemma 4
  # gpt-oss: every channel but the last is no answer.
  Form("<|channel|>", "<|channel|>final<|message|>"),
)


def split(response: str) -> tuple[str, bool]:
  """Returns the text after the last thought, and whether a thought is open at its end."""
  form = _form(response)
  _, closing, text = response.rpartition(form.closing)
  if closing and form.answer and text.strip().startswith(form.answer[0]):
    text = text.strip().removeprefix(form.answer[0]).partition(form.answer[1])[0]
  return text, form.opening in text


def opened(header: str) -> str:
  """Returns the end of a prompt from the opening tag of an open thought on; "" without one."""
  for form in FORMS:
    at = header.rfind(form.opening)
    if at > header.rfind(form.closing):
      return header[at:]
  return ""


def _form(response: str) -> Form:
  """Returns the form of which a response has the tags."""
  beginning = response.lstrip()
  for form in FORMS:
    if beginning.startswith((form.opening, form.closing)):
      return form
  return FORMS[0]
