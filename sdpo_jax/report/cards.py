"""Turns lines of rollout files into cards: texts, and tokens painted by the teacher's gap.

A card is plain data. Pages draw it by `assets/parts.html`, or by `assets/rollouts.js` from JSON
that a page carries. Episodes are cut into turns, each with its own tokens, answer and context.

Responses are hostile: templates escape every value, the script sets text only, and the JSON holds
no character that could end its element.
"""

import json
from typing import Iterable

from sdpo_jax.report.files import is_number, sequence, spread
from sdpo_jax.report.runs import Run
from sdpo_jax.report.templates import printable, template

FULL_COLOUR_NATS = 2.0  # a gap this large is painted at full strength
STRONGEST = 0.75  # opacity of a token's colour
MORE, LESS = "0,114,178", "213,94,0"  # where the teacher likes a token more than the policy, less
LEGEND_GAPS = (-2, -1, -0.5, 0, 0.5, 1, 2)  # nats
NONE = "–"
JSON_BYTES = 6_000_000  # of all cards that a page carries
TEXT_KEPT = 20_000  # characters of a text that a page carries
TOKENS_KEPT = 4_000  # of a response
TURNS_KEPT = 40
SHORT_TEXT, SHORT_TOKENS = 2_000, 200
CONTEXTS_KEPT = 8


def card(rollout: dict) -> dict:
  """Returns what a template draws of one line of a rollout file; any field may be missing."""
  return _painted(record(rollout))


def short_card(rollout: dict) -> dict:
  """Returns a card whose texts and tokens are few: every token is an element of the page."""
  return _painted(_small(record(rollout), texts=SHORT_TEXT, tokens=SHORT_TOKENS) | {"answers": []})


def _painted(found: dict) -> dict:
  """Returns a record whose tokens are as a template draws them."""
  for part in (found, *found["turns"]):
    tokens, gaps = part["tokens"], part.pop("gaps")
    if tokens is not None:
      part["tokens"] = [_token(token, gap) for token, gap in zip(tokens, gaps)]
  return found


def record(rollout: dict) -> dict:
  """Returns the facts of a card: texts, tokens with their gaps, and the turns of an episode.

  Tokens are None where there is no gap for each; then the response stands as plain text.
  """
  tokens, gaps = rollout.get("tokens"), rollout.get("teacher_gap")
  has_gaps = isinstance(tokens, list) and isinstance(gaps, list) and len(tokens) == len(gaps)
  tokens, gaps = (tokens, gaps) if has_gaps else (None, None)
  badge, reward = reward_badge(rollout.get("reward"))
  step = f"step {rollout['step']}" if "step" in rollout else ""
  head = (step, rollout.get("task_id", ""), rollout.get("status", ""))
  contexts = rollout.get("counterfactual_contexts")
  return {
    "badge": badge,
    "reward": reward,
    "step": rollout.get("step"),
    "head": [str(text) for text in head if text],
    "prompt": _text(rollout.get("prompt")),
    "feedback": _text(rollout.get("feedback")) or NONE,
    "teacher_context": _text(rollout.get("teacher_context")),
    "alternatives": list(map(_text, contexts)) if isinstance(contexts, list) else [],
    "answers": [answer for answer in sequence(rollout.get("answers")) if isinstance(answer, dict)],
    "reflection": _text(rollout.get("reflection")),
    "response": _text(rollout.get("response")),
    "tokens": tokens,
    "gaps": gaps,
    "turns": _turns(rollout.get("turns"), tokens, gaps),
  }


def _text(value) -> str:
  return "" if value is None else str(value)


def _turns(turns, tokens: list | None, gaps: list | None) -> list[dict]:
  """Returns the turns of an episode, each with its own part of the tokens; [] for none."""
  if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
    return []
  counts = [turn.get("tokens") for turn in turns]
  known = tokens is not None and all(isinstance(count, int) and count >= 0 for count in counts)
  known = known and sum(counts) == len(tokens)
  found, start = [], 0
  for number, turn in enumerate(turns, start=1):
    end = start + counts[number - 1] if known else start
    own_tokens, own_gaps = None, None
    if known:
      own_tokens, own_gaps = tokens[start:end], gaps[start:end]
    badge, reward = reward_badge(turn.get("reward"))
    own = {
      "number": number,
      "message": _text(turn.get("message")),
      "observation": turn.get("observation"),
      "badge": badge,
      "reward": reward,
      "valid": turn.get("valid") is not False,
      "teacher_context": _text(turn.get("teacher_context")),
      "tokens": own_tokens,
      "gaps": own_gaps,
    }
    found.append(own)
    start = end
  return found


def reward_badge(reward) -> tuple[str, str]:
  """Returns a badge's class in the page's style, and its text."""
  if not is_number(reward):
    return "part", "?"
  if reward >= 1:
    return "right", f"{reward:g}"
  return ("wrong" if reward <= 0 else "part"), f"{reward:g}"


def _token(token, gap) -> dict:
  """Returns a token's lines (none: the token is empty), and its colour if its gap is a number."""
  lines = str(token).split("\n") if token else []
  if not is_number(gap):
    return {"lines": lines, "style": None}
  return {"lines": lines, "style": _paint(gap), "title": f"{gap:+.2f} nats"}


def legend() -> list[tuple[str, str]]:
  """Returns (text, CSS) of the colours that tokens have."""
  return [(f"{gap:+g}", _paint(gap)) for gap in LEGEND_GAPS]


def _paint(gap: float) -> str:
  """Returns CSS: blue where the teacher likes a token better than the policy does, else orange."""
  strength = min(abs(gap) / FULL_COLOUR_NATS, 1.0)
  colour = MORE if gap > 0 else LESS
  white_text = ";color:#fff" if strength > 0.8 else ""
  return f"background:rgba({colour},{STRONGEST * strength:.2f}){white_text}"


def embedded(rollouts: Iterable[dict], height_px: int = 480) -> str:
  """Returns cards of rollouts as the HTML of a frame, so that a notebook keeps its own style.

  rollouts: lines of rollout files, or what else `card` shows.
  """
  cards = [card(rollout) for rollout in rollouts]
  page = template("cards.html").render(cards=cards, legend=legend())
  return template("frame.html").render(page=page, height_px=height_px)


# ---- cards that a page carries as JSON -----------------------------------------------------------


def rollout_data(runs: list[Run]) -> tuple[str, list[int]]:
  """Returns the JSON of the runs' cards, at most JSON_BYTES long, and how many each run has.

  Every run has an equal share. Where its cards take more, those at even distances stay.
  """
  share = (JSON_BYTES - 10_000) // max(len(runs), 1)
  by_run = [_chosen(run.rollouts, number, share) for number, run in enumerate(runs)]
  cards = [text for texts in by_run for text in texts]
  colours = {"more": MORE, "less": LESS, "full": FULL_COLOUR_NATS, "strongest": STRONGEST}
  return f'{{"colours":{_json(colours)},"cards":[{",".join(cards)}]}}', list(map(len, by_run))


def _chosen(rollouts: list[dict], run: int, limit: int) -> list[str]:
  """Returns the JSON of cards that fit into so many bytes, in their order."""
  texts: dict[int, str] = {}
  used = 0
  for i in _coarse_to_fine(len(rollouts)):
    text = _json(_small({"run": run} | record(rollouts[i])))
    if used + len(text) + 1 <= limit:
      texts[i] = text
      used += len(text) + 1
  if rollouts and not texts:  # one that is cut short says more than none
    short = _small({"run": run} | record(rollouts[-1]), texts=SHORT_TEXT, tokens=SHORT_TOKENS)
    return [_json(short)]
  return [texts[i] for i in sorted(texts)]


def _coarse_to_fine(count: int) -> list[int]:
  """Returns the numbers below `count` in an order of which every beginning is spread evenly."""
  order: dict[int, None] = {}
  places, width = list(range(count)), 2
  while len(order) < count:
    order |= dict.fromkeys(spread(places, width))
    width = 2 * width - 1
  return list(order)


def _json(value) -> str:
  """Returns JSON of letters that end no element of a page: ASCII without < > &."""
  text = json.dumps(value, separators=(",", ":"), allow_nan=False)
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text


def _small(found: dict, *, texts: int = TEXT_KEPT, tokens: int = TOKENS_KEPT) -> dict:
  """Returns a record whose texts are printable.

  texts: the most characters of one. tokens: the most of the response.
  """
  del found["answers"]  # of a diagnosis
  found["alternatives"] = found["alternatives"][:CONTEXTS_KEPT]
  turns = found["turns"]
  left_out = len(turns) - TURNS_KEPT
  if left_out > 0:
    turns = turns[: TURNS_KEPT // 2] + turns[-TURNS_KEPT // 2 :]
  found["turns"] = turns
  kept = tokens // max(len(turns), 1)
  for part in (found, *turns):
    _bound_tokens(part, kept)
  if turns:  # they hold what was said
    found |= {"response": "", "tokens": None, "gaps": None, "turns_left_out": max(left_out, 0)}
  return _bounded(found, texts)


def _bound_tokens(part: dict, kept: int) -> None:
  """Leaves tokens out of the middle, and says so in their place."""
  tokens, gaps = part["tokens"], part["gaps"]
  if tokens is None:
    return
  gaps = [round(gap, 3) if is_number(gap) else None for gap in gaps]
  tokens = [_text(token) for token in tokens]
  if len(tokens) > kept:
    half = kept // 2
    note = f"\n[{len(tokens) - 2 * half:,} tokens left out]\n"
    tokens = [*tokens[:half], note, *tokens[-half:]]
    gaps = [*gaps[:half], None, *gaps[-half:]]
  part |= {"tokens": tokens, "gaps": gaps}


def _bounded(value, limit: int):
  """Returns nested values with their texts printable, and shortened in the middle."""
  if isinstance(value, str):
    if len(value) > limit:
      half = limit // 2
      note = f"\n[{len(value) - 2 * half:,} characters left out]\n"
      value = value[:half] + note + value[-half:]
    return printable(value)
  if isinstance(value, list):
    return [_bounded(one, limit) for one in value]
  if isinstance(value, dict):
    return {str(name): _bounded(one, limit) for name, one in value.items()}
  return value if value is None or isinstance(value, bool) or is_number(value) else NONE
