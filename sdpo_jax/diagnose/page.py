"""Writes the page of a diagnosis: diagnose/index.html, with its picture inside."""

import base64
import pathlib

from matplotlib.figure import Figure

from sdpo_jax import report
from sdpo_jax.data.chat import Chat
from sdpo_jax.diagnose.again import Again
from sdpo_jax.diagnose.prompts import ABOUT, CONTROL, OWN, TURN
from sdpo_jax.diagnose.tokens import PARTS, Reading

CARDS = 8  # attempts that are shown
COLOUR, GREY = "#0072b2", "#999999"


def write_page(
  found: dict,
  lines: list[str],
  readings: list[Reading],
  made: list[Again],
  chat: Chat,
  directory: pathlib.Path,
) -> None:
  """Writes index.html and tokens.png. lines: what is printed of the diagnosis."""
  picture = directory / "tokens.png"
  draw(found, picture)
  gaps = {id(reading.attempt): reading for reading in readings}
  page = report.template("diagnose.html").render(
    verdict=found["verdict"],
    lines=lines,
    picture=base64.b64encode(picture.read_bytes()).decode(),
    cards=[_card(again, gaps.get(id(again.attempt)), chat) for again in made[:CARDS]],
    legend=report.legend(),
  )
  (directory / "index.html").write_bytes(page.encode("utf-8", "replace"))


def draw(found: dict, path: pathlib.Path) -> None:
  """Draws what each prompt is worth, and where in a response teacher and policy disagree."""
  figure = Figure(figsize=(10.5, 3.4), dpi=110, layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  draw_prompts(left, found["again"]["failed"])
  draw_parts(right, found["tokens"])
  figure.savefig(path, format="png")


def draw_prompts(plot, failed: dict) -> None:
  """Draws into an Axes what failed attempts get that are made again, by prompt.

  failed: `again.failed` of a diagnosis.
  """
  for y, (name, of_name) in enumerate(reversed(failed.items())):
    reward = of_name["reward"]
    colour = GREY if name == CONTROL else COLOUR
    plot.plot(reward["mean"], y, "o", color=colour)
    if reward["low"] is not None:
      plot.plot([reward["low"], reward["high"]], [y, y], color=colour, linewidth=2)
  plot.set_yticks(range(len(failed)), [ABOUT[name] for name in reversed(failed)])
  plot.set(xlim=(-0.02, 1.02), xlabel="reward of failed attempts, made again (95 %)")
  _finish(plot)


def draw_parts(plot, read: dict) -> None:
  """Draws into an Axes how far apart teacher and policy are in each tenth of a response.

  read: `tokens.figures`, or `tokens` of a diagnosis.
  """
  if read["attempts"]:
    gaps = [gap or 0.0 for gap in read["gap_by_part"]]
    plot.bar(range(1, PARTS + 1), gaps, color=COLOUR)
  else:
    plot.text(0.5, 0.5, "not read", ha="center", transform=plot.transAxes)
  plot.set(xlabel="tenth of the response", ylabel="|teacher - policy|, nats a token")
  _finish(plot)


def _finish(plot) -> None:
  plot.grid(alpha=0.25)
  plot.spines[["top", "right"]].set_visible(False)


def _card(again: Again, reading: Reading | None, chat: Chat) -> dict:
  """Returns an attempt as the report shows responses, with the answers to its other prompts."""
  attempt = again.attempt
  shown = again.prompts.get(OWN, again.prompts.get(TURN))
  rollout = {
    "task_id": attempt.task.id,
    "status": attempt.feedback.status.value,
    "reward": attempt.feedback.reward,
    "prompt": chat.plain_text(attempt.prompt_tokens),
    "feedback": attempt.feedback.text,
    "response": attempt.text,
    "answers": [
      {"shown": ABOUT[name], "reward": f"{answer.feedback.reward:g}", "text": answer.text}
      for name, answer in again.answers.items()
    ],
  }
  if shown is not None:
    rollout["teacher_context"] = chat.plain_text(shown.tokens)
  if reading is not None:
    rollout |= {"tokens": reading.strings, "teacher_gap": reading.gap}
  return report.card(rollout)
